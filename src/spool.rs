//! Rows that are read more than once: in memory while they are few, in a file when they are many.
//!
//! A spool is written once, then read as a table as often as needed. Its memory is taken from the run's pool; what
//! the pool does not give goes into an Arrow file in the spill folder, which is gone when the spool is dropped.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    datatypes::SchemaRef,
    ipc::{
        CompressionType,
        reader::StreamReader,
        writer::{IpcWriteOptions, StreamWriter},
    },
    record_batch::RecordBatch,
};
use datafusion::{
    catalog::streaming::StreamingTable,
    execution::{
        TaskContext,
        memory_pool::{MemoryConsumer, MemoryReservation},
        runtime_env::RuntimeEnv,
    },
    physical_plan::{SendableRecordBatchStream, streaming::PartitionStream},
};
use futures::StreamExt;
use tempfile::NamedTempFile;

use crate::{
    budget::Share,
    error::{Error, Result},
    runtime::{self, Limits},
};

/// Bytes that one spool keeps in memory at most.
const MEMORY_BYTES: usize = 16 << 20;

/// Where spools may put their rows.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// The limits of the run.
    pub limits: Limits,
    /// DataFusion's side of them.
    pub environment: Arc<RuntimeEnv>,
    /// What keeps the folder, and takes it away in the end.
    _folder: Arc<Folder>,
}

/// A folder for what one call writes down. Its lock says that the call is alive.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// A new one below `spill`, from which is taken away what calls that were killed left there.
    fn new(spill: &Path) -> Result<Self> {
        let failed = |error| Error::io("make the spill folder", spill.display(), error);
        fs::create_dir_all(spill).map_err(failed)?;
        for entry in fs::read_dir(spill).map_err(failed)?.flatten() {
            // The place may be shared: only what has a name of ours is ours.
            if uuid::Uuid::try_parse(&entry.file_name().to_string_lossy()).is_err() {
                continue;
            }
            let lock = File::open(entry.path().join(LOCK));
            if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
                drop(fs::remove_dir_all(entry.path()));
            }
        }
        let path = spill.join(uuid::Uuid::now_v7().simple().to_string());
        fs::create_dir(&path).map_err(failed)?;
        // Locked before it has its name: one that is there and not locked is a dead call's.
        let unnamed = path.join("locking");
        let made = File::create(&unnamed).and_then(|lock| {
            lock.try_lock()?;
            fs::rename(&unnamed, path.join(LOCK))?;
            Ok(lock)
        });
        match made {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err(error) => {
                drop(fs::remove_dir_all(&path));
                Err(failed(error))
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.path));
    }
}

/// The file in a call's folder that it holds locked.
const LOCK: &str = "floodmark.lock";

impl Scratch {
    /// The scratch space of a run.
    ///
    /// # Errors
    ///
    /// If the spill folder cannot be used.
    pub fn new(limits: &Limits) -> Result<Self> {
        let folder = Folder::new(&limits.spill)?;
        let limits = Limits { spill: folder.path.clone(), ..limits.clone() };
        let environment = limits.environment()?;
        Ok(Self { limits, environment, _folder: Arc::new(folder) })
    }

    /// The memory of an output for what it has not written yet.
    pub fn of_output(&self, name: &str) -> Share {
        Share::of_output(name, &self.environment.memory_pool)
    }
}

/// Rows that are being written down.
pub struct SpoolWriter {
    schema: SchemaRef,
    scratch: Scratch,
    memory: Vec<RecordBatch>,
    reservation: MemoryReservation,
    file: Option<(NamedTempFile, StreamWriter<BufWriter<File>>)>,
    rows: u64,
}

impl SpoolWriter {
    /// An empty spool for rows of `schema`.
    pub fn new(name: &str, schema: SchemaRef, scratch: &Scratch) -> Self {
        let reservation =
            MemoryConsumer::new(format!("spool {name}")).register(&scratch.environment.memory_pool);
        Self { schema, scratch: scratch.clone(), memory: Vec::new(), reservation, file: None, rows: 0 }
    }

    /// Adds rows.
    ///
    /// # Errors
    ///
    /// If the spill file cannot be written.
    pub fn push(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_rows() == 0 {
            return Ok(());
        }
        self.rows += batch.num_rows() as u64;
        let bytes = batch.get_array_memory_size();
        if self.file.is_none()
            && self.reservation.size() + bytes <= MEMORY_BYTES
            && self.reservation.try_grow(bytes).is_ok()
        {
            self.memory.push(batch.clone());
            return Ok(());
        }
        let full = |error: arrow::error::ArrowError| {
            Error::failed(format!(
                "cannot write to the spill folder `{}`",
                self.scratch.limits.spill.display()
            ))
            .note(error.to_string())
            .hint("Make room there, or set `limits: { spill: … }` in floodmark.yaml.")
        };
        let (_, writer) = match &mut self.file {
            Some(file) => file,
            none => {
                let spill = &self.scratch.limits.spill;
                let temporary = NamedTempFile::new_in(spill)
                    .map_err(|error| Error::io("write to the spill folder", spill.display(), error))?;
                let handle = temporary.reopen().map_err(|error| Error::io("open", spill.display(), error))?;
                let options =
                    IpcWriteOptions::default().try_with_compression(Some(CompressionType::LZ4_FRAME))?;
                let writer =
                    StreamWriter::try_new_with_options(BufWriter::new(handle), &self.schema, options)
                        .map_err(full)?;
                none.insert((temporary, writer))
            }
        };
        writer.write(batch).map_err(full)
    }

    /// The rows, ready to be read.
    ///
    /// # Errors
    ///
    /// If the spill file cannot be written.
    pub fn finish(mut self) -> Result<Spool> {
        let file = match self.file.take() {
            Some((temporary, mut writer)) => {
                writer.finish().map_err(|error| {
                    Error::failed(format!(
                        "cannot write to the spill folder `{}`",
                        self.scratch.limits.spill.display()
                    ))
                    .note(error.to_string())
                })?;
                Some(temporary)
            }
            None => None,
        };
        Ok(Spool {
            schema: self.schema,
            rows: self.rows,
            inner: Arc::new(Inner { memory: self.memory, file, _reservation: self.reservation }),
        })
    }
}

impl std::fmt::Debug for SpoolWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpoolWriter").field("rows", &self.rows).finish_non_exhaustive()
    }
}

/// Rows that were written down.
#[derive(Debug, Clone)]
pub struct Spool {
    schema: SchemaRef,
    rows: u64,
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: Vec<RecordBatch>,
    file: Option<NamedTempFile>,
    _reservation: MemoryReservation,
}

impl Spool {
    /// Writes down all rows of a stream.
    ///
    /// # Errors
    ///
    /// What the stream says, or the spill folder.
    pub async fn of(name: &str, mut rows: SendableRecordBatchStream, scratch: &Scratch) -> Result<Self> {
        let mut writer = SpoolWriter::new(name, rows.schema(), scratch);
        while let Some(batch) = rows.next().await {
            writer.push(&batch?)?;
        }
        writer.finish()
    }

    /// The columns.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// How many rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The rows again, in the order in which they came.
    pub fn stream(&self) -> SendableRecordBatchStream {
        let inner = Arc::clone(&self.inner);
        runtime::blocking_stream(Arc::clone(&self.schema), move |out| {
            for batch in &inner.memory {
                if !out.send(batch.clone()) {
                    return Ok(());
                }
            }
            if let Some(file) = &inner.file {
                let handle =
                    file.reopen().map_err(|error| Error::io("read", file.path().display(), error))?;
                for batch in StreamReader::try_new_buffered(handle, None)? {
                    if !out.send(batch?) {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    /// The rows as a table.
    ///
    /// # Errors
    ///
    /// None in practice: the schema is the table's own.
    pub fn table(&self) -> Result<Arc<StreamingTable>> {
        let partition: Arc<dyn PartitionStream> = Arc::new(self.clone());
        Ok(Arc::new(StreamingTable::try_new(Arc::clone(&self.schema), vec![partition])?))
    }
}

impl PartitionStream for Spool {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        self.stream()
    }
}
