//! Files that are whole and durable, or not there.
//!
//! Written under a temporary name, flushed to the disk, then given their name, then the folder is flushed. What
//! failed to flush is never flushed again: the kernel may have forgotten the pages; the file is thrown away and
//! the attempt fails.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// A file under construction. Dropped before [`finish`](Self::finish), it is removed.
#[derive(Debug)]
pub(super) struct NewFile {
    temporary: PathBuf,
    path: PathBuf,
    file: Option<BufWriter<File>>,
}

impl NewFile {
    /// Starts the file that will be `path`.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        make_folder(folder)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = folder.join(format!(".{name}.{}.tmp", uuid::Uuid::new_v4().simple()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(|error| Error::io("write", path.display(), error))?;
        Ok(Self { temporary, path: path.to_owned(), file: Some(BufWriter::with_capacity(1 << 20, file)) })
    }

    /// Makes the content durable, still under the temporary name.
    fn flush_to_disk(&mut self) -> Result<()> {
        let failed = |error| Error::io("write", self.path.display(), error);
        if let Some(file) = self.file.take() {
            let file = file.into_inner().map_err(|error| failed(error.into_error()))?;
            file.sync_all().map_err(failed)?;
        }
        Ok(())
    }

    /// Gives the file its name, replacing what had it. Returns its bytes.
    pub(super) fn finish(mut self) -> Result<u64> {
        self.flush_to_disk()?;
        let failed = |error| Error::io("write", self.path.display(), error);
        let bytes = self.temporary.metadata().map_err(failed)?.len();
        fs::rename(&self.temporary, &self.path).map_err(failed)?;
        sync_folder(&self.path)?;
        Ok(bytes)
    }

    /// Gives the file its name only if nothing has it. False if something has.
    pub(super) fn finish_new(mut self) -> Result<bool> {
        self.flush_to_disk()?;
        match fs::hard_link(&self.temporary, &self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            Err(error) => return Err(Error::io("write", self.path.display(), error)),
        }
        sync_folder(&self.path)?;
        Ok(true)
    }
}

impl Write for NewFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(buffer),
            None => Err(io::Error::other("the file is finished")),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // What matters is made durable by `finish`; flushing the buffer early would only cost.
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.temporary));
    }
}

/// Writes a small file whole, only if nothing has its name. False if something has.
pub(super) fn write_new(path: &Path, content: &[u8]) -> Result<bool> {
    let mut file = NewFile::create(path)?;
    file.write_all(content).map_err(|error| Error::io("write", path.display(), error))?;
    file.finish_new()
}

/// Makes a folder and those above it, and makes their names durable.
pub(super) fn make_folder(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_folder(parent)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => sync_folder(folder),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("make the folder", folder.display(), error)),
    }
}

/// Makes the name of `path` durable: flushes the folder that holds it.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|handle| handle.sync_all())
        .map_err(|error| Error::io("make durable the folder", folder.display(), error))
}
