//! Parquet in and out.
//!
//! Out: one file a call, its columns encoded side by side by rayon, a row group closed by rows, by encoded bytes or when the budget has
//! no more memory for it, whichever comes first, so that wide rows do not hold more than narrow ones.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufReader},
    os::unix::fs::FileExt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use ::parquet::{
    arrow::{
        ArrowSchemaConverter, ArrowWriter, ProjectionMask,
        arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
        arrow_writer::{ArrowColumnChunk, ArrowColumnWriter, compute_leaves},
    },
    basic::{Compression, Encoding, PageType, Type as PhysicalType, ZstdLevel},
    file::{
        metadata::{ColumnChunkMetaData, PageEncodingStats, ParquetMetaData},
        properties::{WriterProperties, WriterPropertiesBuilder},
        reader::{ChunkReader, Length},
        writer::SerializedFileWriter,
    },
    schema::types::{ColumnPath, SchemaDescriptor},
};
use arrow::{
    array::{
        Array, ArrayRef, AsArray, Int64Array, RecordBatch, RecordBatchOptions, StringBuilder, new_null_array,
    },
    compute::{cast, concat_batches},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    util::display::{ArrayFormatter, FormatOptions},
};
use bytes::Bytes;
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;
use rayon::prelude::*;

use super::{
    FilesConnection,
    manifest::listed,
    pages::{Chunk, EncodedChunk, ZSTD_LEVEL},
    place::{Sink, io_error},
    prune,
};
use crate::{
    budget::Share,
    connector::{
        columns::Misfit,
        quarantined_schema,
        scan::{Order, POSITION_COLUMN, Scan},
        tap::Tap,
    },
    error::{Error, Result},
    functions::cast::{cast_exactly, cast_or_misfit},
    record::DataFile,
    runtime::{self, BATCH_BYTES, BATCH_ROWS, BatchSender, Batches, Consumer},
};

fn damaged(path: &str, error: impl std::fmt::Display) -> Error {
    Error::data(format!("`{path}` is no Parquet file, or is damaged")).note(error.to_string())
}

/// What a file says of itself.
fn metadata(file: &File, path: &str) -> Result<ArrowReaderMetadata> {
    ArrowReaderMetadata::load(file, ArrowReaderOptions::new()).map_err(|error| damaged(path, error))
}

/// The columns of a file, with strings and bytes as plain arrays.
pub(super) fn schema(file: &File, path: &str) -> Result<SchemaRef> {
    let metadata = metadata(file, path)?;
    Ok(Arc::new(crate::model::plain_schema(metadata.schema())))
}

/// How many rows a file has.
pub(super) fn rows(file: &File, path: &str) -> Result<u64> {
    let metadata = metadata(file, path)?;
    Ok(metadata.metadata().file_metadata().num_rows().unsigned_abs())
}

/// A file that is read at several places at once, by who says where each time.
#[derive(Clone)]
struct Positioned(Arc<File>);

/// One of these places, and what comes behind it.
struct Reading {
    file: Arc<File>,
    at: u64,
}

impl io::Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Length for Positioned {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Positioned {
    type T = BufReader<Reading>;

    fn get_read(&self, start: u64) -> ::parquet::errors::Result<Self::T> {
        Ok(BufReader::new(Reading { file: Arc::clone(&self.0), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ::parquet::errors::Result<Bytes> {
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, start)?;
        Ok(bytes.into())
    }
}

/// Row groups that are read one behind the other.
struct Part {
    groups: Vec<usize>,
    /// Rows of the file that come before.
    before: u64,
}

/// Sends the rows of one file: from its first to its last one, or its row groups side by side where nobody sees their order. False once nobody reads any more.
pub(super) fn read(file: File, path: &str, scan: &Scan, tap: &Tap, out: &BatchSender) -> Result<bool> {
    let size = file.metadata().map(|meta| meta.len()).unwrap_or(0);
    let metadata = metadata(&file, path)?;
    let file_schema = Arc::clone(metadata.schema());
    let mut wanted = Vec::new();
    for field in scan.schema.fields() {
        match file_schema.index_of(field.name()) {
            Ok(index) => wanted.push(index),
            Err(_) if field.name() == POSITION_COLUMN => {}
            Err(_) => {
                return Err(Error::data(format!(
                    "source `{}`: `{path}` has no column `{}`",
                    scan.stream.name,
                    field.name()
                )));
            }
        }
    }
    let mask = ProjectionMask::roots(metadata.parquet_schema(), wanted);
    let rows_in_all = metadata.metadata().file_metadata().num_rows().unsigned_abs().max(1);
    let batch_rows = batch_rows(metadata.metadata(), &mask, scan.batch_bytes);
    let groups = metadata.metadata().row_groups().iter().map(|group| group.num_rows().unsigned_abs());
    let groups: Vec<(usize, u64, bool)> = groups
        .zip(prune::wanted(&metadata, scan))
        .enumerate()
        .map(|(group, (rows, wanted))| (group, rows, wanted))
        .collect();
    let (mut parts, mut before) = (Vec::new(), 0_u64);
    let go_together = |(.., one): &(usize, u64, bool), (.., other): &(usize, u64, bool)| {
        one == other && !(*one && scan.order == Order::Unseen)
    };
    for groups in groups.chunk_by(go_together) {
        let rows: u64 = groups.iter().map(|(_, rows, _)| rows).sum();
        if groups.iter().all(|(.., wanted)| *wanted) {
            parts.push(Part { groups: groups.iter().map(|(group, ..)| *group).collect(), before });
        } else {
            tap.filtered(rows);
            tap.bytes(size * rows / rows_in_all);
        }
        before += rows;
    }
    let file = Positioned(Arc::new(file));
    let read_part = |part: &Part, is_over: &AtomicBool| {
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), metadata.clone())
            .with_row_groups(part.groups.clone())
            .with_projection(mask.clone())
            .with_batch_size(batch_rows)
            .build()
            .map_err(|error| damaged(path, error))?;
        let mut number = part.before;
        for batch in reader {
            let batch = batch.map_err(|error| damaged(path, error))?;
            let rows = batch.num_rows() as u64;
            tap.bytes(size * rows / rows_in_all);
            let fitting = match typed(&batch, path, number, scan, tap)? {
                Ok(batch) => batch,
                Err(_) => sort_out(&batch, path, number, scan, tap)?,
            };
            number += rows;
            tap.rows(&fitting)?;
            if is_over.load(Ordering::Relaxed) || !out.send(fitting) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    runtime::side_by_side(scan.readers(), &parts, read_part)
}

/// How many rows come to a batch that is not too large, by what the file says of the columns that are read.
fn batch_rows(metadata: &ParquetMetaData, mask: &ProjectionMask, batch_bytes: usize) -> usize {
    let widest = metadata.row_groups().iter().filter(|group| group.num_rows() > 0).map(|group| {
        let columns = group.columns().iter().enumerate().filter(|(leaf, _)| mask.leaf_included(*leaf));
        let bytes = columns.map(|(_, column)| {
            // Of a dictionary only the words are in the file, of what rises only by what.
            let texts = column.unencoded_byte_array_data_bytes().unwrap_or_default();
            let width = match column.column_type() {
                PhysicalType::INT32 | PhysicalType::FLOAT => 4,
                PhysicalType::INT64 | PhysicalType::DOUBLE => 8,
                // A decimal or an identity.
                PhysicalType::FIXED_LEN_BYTE_ARRAY => 16,
                _ => 0,
            };
            column.uncompressed_size().max(texts).max(column.num_values() * width)
        });
        bytes.sum::<i64>() / group.num_rows()
    });
    let bytes = usize::try_from(widest.max().unwrap_or_default()).unwrap_or_default();
    (batch_bytes / bytes.max(1)).clamp(1, BATCH_ROWS)
}

/// A batch as the scan wants it, or the column that does not fit and why; `number` rows of the file came before.
fn typed(
    batch: &RecordBatch,
    path: &str,
    number: u64,
    scan: &Scan,
    tap: &Tap,
) -> Result<Result<RecordBatch, String>> {
    let rows = batch.num_rows();
    let mut nulled = Vec::new();
    let mut arrays: Vec<ArrayRef> = Vec::with_capacity(scan.schema.fields().len());
    for field in scan.schema.fields() {
        if field.name() == POSITION_COLUMN {
            let mut positions = StringBuilder::new();
            for row in 0..rows as u64 {
                positions.append_value(format!("{path} row {}", number + row + 1));
            }
            arrays.push(Arc::new(positions.finish()));
            continue;
        }
        let array =
            batch.column_by_name(field.name()).ok_or_else(|| Error::bug("a projected column is missing"))?;
        match cast_or_misfit(array, field.data_type()) {
            Ok(array) => arrays.push(array),
            // Row by row, once a batch had one that does not fit.
            Err(_) if rows == 1 && scan.stream.unfit_as_null.contains(field.name()) => {
                nulled.push(field.name());
                arrays.push(new_null_array(field.data_type(), 1));
            }
            Err(Misfit(why)) => return Ok(Err(format!("`{}` {why}", field.name()))),
        }
    }
    nulled.into_iter().for_each(|column| tap.null(column));
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(Ok(RecordBatch::try_new_with_options(Arc::clone(&scan.schema), arrays, &options)?))
}

/// The rows of a batch that fit, once one of them does not: row by row, each misfit set aside or refused.
fn sort_out(batch: &RecordBatch, path: &str, number: u64, scan: &Scan, tap: &Tap) -> Result<RecordBatch> {
    let mut fitting = Vec::new();
    for row in 0..batch.num_rows() {
        let one = batch.slice(row, 1);
        match typed(&one, path, number + row as u64, scan, tap)? {
            Ok(one) => fitting.push(one),
            Err(why) => {
                let place = format!("`{path}` row {}", number + row as u64 + 1);
                tap.reject(&scan.stream, place, why, || row_json(&one))?;
            }
        }
    }
    Ok(concat_batches(&scan.schema, &fitting)?)
}

/// A row as JSON, for the quarantine: the columns that were read.
fn row_json(row: &RecordBatch) -> String {
    let options = FormatOptions::new();
    let object: serde_json::Map<String, serde_json::Value> = row
        .schema()
        .fields()
        .iter()
        .zip(row.columns())
        .map(|(field, array)| {
            let text =
                ArrayFormatter::try_new(array, &options).ok().map(|values| values.value(0).to_string());
            (field.name().clone(), text.filter(|_| array.is_valid(0)).into())
        })
        .collect();
    serde_json::Value::Object(object).to_string()
}

/// Sends the rows that one release set aside. False once nobody reads any more.
pub(super) fn read_quarantined(file: File, path: &str, seq: u64, out: &BatchSender) -> Result<bool> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| damaged(path, error))?;
    for batch in builder.with_batch_size(BATCH_ROWS).build().map_err(|error| damaged(path, error))? {
        let batch = batch.map_err(|error| damaged(path, error))?;
        let seq: ArrayRef = Arc::new(Int64Array::from(vec![seq.cast_signed(); batch.num_rows()]));
        let columns = [seq].into_iter().chain(batch.columns().iter().cloned()).collect();
        if !out.send(RecordBatch::try_new(quarantined_schema(), columns)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The rows of one data file of our own, as they are.
pub(super) fn data_file(
    connection: &Arc<FilesConnection>,
    output: &str,
    file: &DataFile,
    schema: SchemaRef,
) -> SendableRecordBatchStream {
    let (connection, file) = (Arc::clone(connection), listed(output, file));
    let stream_schema = Arc::clone(&schema);
    runtime::blocking_stream(stream_schema, move |out| {
        let handle = connection.place.open(&file)?;
        let shown = file.path;
        let builder =
            ParquetRecordBatchReaderBuilder::try_new(handle).map_err(|error| damaged(&shown, error))?;
        let batch_rows = batch_rows(builder.metadata(), &ProjectionMask::all(), BATCH_BYTES);
        for batch in builder.with_batch_size(batch_rows).build().map_err(|error| damaged(&shown, error))? {
            let batch = batch.map_err(|error| damaged(&shown, error))?;
            let rows = batch.num_rows();
            let arrays = schema
                .fields()
                .iter()
                .map(|field| match batch.column_by_name(field.name()) {
                    Some(array) => cast_exactly(array, field.data_type()),
                    None => Ok(new_null_array(field.data_type(), rows)),
                })
                .collect::<Result<Vec<_>>>()?;
            if !out.send(RecordBatch::try_new(Arc::clone(&schema), arrays)?) {
                return Ok(());
            }
        }
        Ok(())
    })
}

/// How files are written; of columns in `many` a dictionary would hold too many values, and those in `rising` are told best by what they rise.
fn properties(many: &HashSet<ColumnPath>, rising: &HashSet<ColumnPath>) -> WriterProperties {
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(ZSTD_LEVEL).unwrap_or_default()))
        .set_created_by(concat!("floodmark ", env!("CARGO_PKG_VERSION")).to_owned());
    let without = |properties: WriterPropertiesBuilder, column: &ColumnPath| {
        properties.set_column_dictionary_enabled(column.clone(), false)
    };
    let by_difference = |properties: WriterPropertiesBuilder, column: &ColumnPath| {
        without(properties, column).set_column_encoding(column.clone(), Encoding::DELTA_BINARY_PACKED)
    };
    rising.iter().fold(many.iter().fold(properties, without), by_difference).build()
}

/// Whether the whole numbers or times of a column rise from row to row within each of its `parts`, and stay for a few rows at most: keys and the time of events
/// do. Their dictionary would hold so many that it helps less than it costs. Few values tell nothing.
fn rises<'a>(parts: impl Iterator<Item = &'a dyn Array>) -> bool {
    let (mut rises, mut falls, mut count) = (0, 0, 0);
    for part in parts {
        let is_time =
            matches!(part.data_type(), DataType::Timestamp(..) | DataType::Date32 | DataType::Time64(_));
        if !is_time && !part.data_type().is_integer() {
            return false;
        }
        let Ok(numbers) = cast(part, &DataType::Int64) else { return false };
        let numbers: Vec<i64> = numbers.as_primitive::<Int64Type>().iter().flatten().collect();
        for (one, next) in numbers.iter().zip(numbers.iter().skip(1)) {
            rises += usize::from(one < next);
            falls += usize::from(one > next);
        }
        count += numbers.len();
    }
    count >= ENOUGH_ROWS && rises > count / FEW_ROWS && falls <= count / FALL_ROWS
}

/// Whether a dictionary was begun for a column, and given up because it held too many values.
fn outgrew_dictionary(column: &ColumnChunkMetaData) -> bool {
    let plain_data = |page: &PageEncodingStats| {
        matches!(page.page_type, PageType::DATA_PAGE | PageType::DATA_PAGE_V2)
            && page.encoding != Encoding::RLE_DICTIONARY
    };
    column.dictionary_page_offset().is_some()
        && column.page_encoding_stats().is_some_and(|pages| pages.iter().any(plain_data))
}

/// A column of the open row group: encoded by us, or by the library, which parts one that is nested.
enum Column {
    Ours(Box<Chunk>),
    Library(Vec<ArrowColumnWriter>),
}

impl Column {
    /// The columns of a row group. Of those in `many` a dictionary would hold too many values, and those in `rising` are told best by what they rise.
    fn of_group(
        file: &SchemaDescriptor,
        schema: &Schema,
        many: &HashSet<ColumnPath>,
        rising: &HashSet<ColumnPath>,
    ) -> ::parquet::errors::Result<Vec<Self>> {
        let properties = Arc::new(properties(many, rising));
        // The first leaf of each, which is the only one of those that are not nested.
        let leaves: HashMap<usize, usize> =
            (0..file.num_columns()).rev().map(|leaf| (file.get_column_root_idx(leaf), leaf)).collect();
        let fields = schema.fields().iter().enumerate();
        fields
            .map(|(at, field)| {
                let leaf = leaves.get(&at).map(|leaf| file.column(*leaf));
                let ours = leaf.and_then(|leaf| {
                    let has_dictionary = !many.contains(leaf.path()) && !rising.contains(leaf.path());
                    Chunk::new(&leaf, field.data_type(), has_dictionary)
                });
                if let Some(chunk) = ours {
                    return Ok(Self::Ours(Box::new(chunk)));
                }
                let alone: SchemaRef = Arc::new(Schema::new(vec![Arc::clone(field)]));
                #[expect(
                    deprecated,
                    reason = "its successor takes its properties from the file, for all row groups"
                )]
                let writers = ::parquet::arrow::arrow_writer::get_column_writers(
                    &ArrowSchemaConverter::new().convert(&alone)?,
                    &properties,
                    &alone,
                )?;
                Ok(Self::Library(writers))
            })
            .collect()
    }

    fn write(&mut self, field: &Field, array: &ArrayRef) -> ::parquet::errors::Result<()> {
        match self {
            Self::Ours(chunk) => chunk.write(array),
            Self::Library(writers) => {
                let leaves = compute_leaves(field, array)?;
                writers.iter_mut().zip(&leaves).try_for_each(|(writer, leaf)| writer.write(leaf))
            }
        }
    }

    /// Bytes that are ready for the file, more or less.
    fn encoded_bytes(&self) -> usize {
        match self {
            Self::Ours(chunk) => chunk.encoded_bytes(),
            Self::Library(writers) => writers.iter().map(ArrowColumnWriter::get_estimated_total_bytes).sum(),
        }
    }

    /// Bytes of memory that are held.
    fn held_bytes(&self) -> usize {
        match self {
            Self::Ours(chunk) => chunk.held_bytes(),
            Self::Library(writers) => writers.iter().map(ArrowColumnWriter::memory_size).sum(),
        }
    }

    fn close(self) -> ::parquet::errors::Result<Encoded> {
        Ok(match self {
            Self::Ours(chunk) => Encoded::Ours(Box::new(chunk.close()?)),
            Self::Library(writers) => {
                let chunks = writers.into_iter().map(ArrowColumnWriter::close);
                Encoded::Library(chunks.collect::<::parquet::errors::Result<_>>()?)
            }
        })
    }
}

/// A column that is ready for the file.
enum Encoded {
    Ours(Box<EncodedChunk>),
    Library(Vec<ArrowColumnChunk>),
}

/// A Parquet file under construction.
struct Writer {
    file: SerializedFileWriter<Sink>,
    /// Columns for which no dictionary is begun any more: that of an earlier row group held too many values.
    many: HashSet<ColumnPath>,
    columns: Vec<Column>,
    schema: SchemaRef,
    group_rows: usize,
    limits: (usize, usize),
    /// What the open row group has.
    memory: Share,
}

impl Writer {
    fn new(connection: &FilesConnection, path: &str, schema: SchemaRef, memory: &Share) -> Result<Self> {
        let sink = connection.place.new_file(path, memory)?;
        let limits = (connection.row_group_rows, connection.row_group_bytes);
        ArrowSchemaConverter::new().convert(&schema).map_err(|error| {
            Error::configuration("a column cannot be written as Parquet").note(error.to_string())
        })?;
        let writer = ArrowWriter::try_new(
            sink,
            Arc::clone(&schema),
            Some(properties(&HashSet::new(), &HashSet::new())),
        )
        .map_err(failed(path))?;
        let (file, _) = writer.into_serialized_writer().map_err(failed(path))?;
        let (memory, many) = (memory.another(), HashSet::new());
        Ok(Self { file, many, columns: Vec::new(), schema, group_rows: 0, limits, memory })
    }

    /// Writes all that come, and finishes the file: its rows and bytes.
    fn write_all(mut self, path: &str, batches: &mut Batches, written: &AtomicU64) -> Result<(u64, u64)> {
        let mut rows = 0;
        while let Some(batches) = batches.more()? {
            let mut batches = batches.as_slice();
            while !batches.is_empty() {
                // As many as the row group takes, and not so many that it would grow by much before it is looked how large it is.
                let (mut space, mut bytes) = (self.limits.0.saturating_sub(self.group_rows), STEP_BYTES);
                let more = |batch: &&RecordBatch| {
                    let goes_on = space > 0 && bytes > 0;
                    space = space.saturating_sub(batch.num_rows());
                    bytes = bytes.saturating_sub(batch.get_array_memory_size());
                    goes_on
                };
                let fits = batches.iter().take_while(more).count().max(1);
                let (now, later) = batches.split_at(fits);
                self.write(now).map_err(failed(path))?;
                rows += now.iter().map(|batch| batch.num_rows() as u64).sum::<u64>();
                batches = later;
            }
            written.store(self.file.bytes_written() as u64, Ordering::Relaxed);
        }
        self.close_group().map_err(failed(path))?;
        let file = self.file.into_inner().map_err(failed(path))?;
        Ok((rows, file.finish()?))
    }

    /// Writes batches, the columns side by side.
    fn write(&mut self, batches: &[RecordBatch]) -> ::parquet::errors::Result<()> {
        if self.columns.is_empty() {
            let rising = self.schema.fields().iter().enumerate();
            let rising =
                rising.filter(|(at, _)| rises(batches.iter().map(|batch| batch.column(*at).as_ref())));
            let rising = rising.map(|(_, field)| ColumnPath::from(field.name().as_str())).collect();
            self.columns = Column::of_group(self.file.schema_descr(), &self.schema, &self.many, &rising)?;
        }
        // The dearest first, each a task of its own: at the end nobody waits for one that began late.
        let mut work: Vec<_> = self.columns.iter_mut().zip(self.schema.fields()).enumerate().collect();
        work.sort_by_key(|(_, (column, _))| std::cmp::Reverse(column.encoded_bytes()));
        let failed = Mutex::new(None);
        let told = &failed;
        rayon::scope_fifo(|scope| {
            for (at, (column, field)) in work {
                scope.spawn_fifo(move |_| {
                    let mut arrays = batches.iter().map(|batch| batch.column(at));
                    if let Err(error) = arrays.try_for_each(|array| column.write(field, array)) {
                        told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        self.group_rows += batches.iter().map(RecordBatch::num_rows).sum::<usize>();
        let bytes: usize = self.columns.iter().map(Column::encoded_bytes).sum();
        let held: usize = self.columns.iter().map(Column::held_bytes).sum();
        self.memory.uses(held.min(LEAST_GROUP));
        let has_room = self.memory.wishes(held.saturating_sub(LEAST_GROUP));
        if self.group_rows >= self.limits.0 || bytes >= self.limits.1 || !has_room {
            self.close_group()?;
        }
        Ok(())
    }

    fn close_group(&mut self) -> ::parquet::errors::Result<()> {
        let columns = std::mem::take(&mut self.columns);
        if columns.is_empty() {
            return Ok(());
        }
        let columns =
            columns.into_par_iter().map(Column::close).collect::<::parquet::errors::Result<Vec<_>>>()?;
        let mut group = self.file.next_row_group()?;
        for column in columns {
            match column {
                Encoded::Ours(chunk) => {
                    if chunk.has_many {
                        self.many.insert(chunk.path().clone());
                    }
                    chunk.append_to(&mut group)?;
                }
                Encoded::Library(chunks) => {
                    chunks.into_iter().try_for_each(|chunk| chunk.append_to_row_group(&mut group))?;
                }
            }
        }
        let written = group.close()?;
        let outgrown = written.columns().iter().filter(|column| outgrew_dictionary(column));
        self.many.extend(outgrown.map(|column| column.column_path().clone()));
        self.group_rows = 0;
        self.memory.free();
        Ok(())
    }
}

/// An error of the Parquet writer as one for people: underneath it is nearly always the disk.
fn failed(path: &str) -> impl Fn(::parquet::errors::ParquetError) -> Error {
    let shown = path.to_owned();
    move |error| match error {
        ::parquet::errors::ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(io) => io_error("write", &shown, *io),
            Err(inner) => Error::failed(format!("cannot write `{shown}`")).note(inner.to_string()),
        },
        error => Error::failed(format!("cannot write `{shown}`")).note(error.to_string()),
    }
}

/// Bytes that a row group has at least before it is closed for want of memory: many small ones would cost more than they save.
const LEAST_GROUP: usize = 1 << 20;

/// For how many rows a value of a column that rises may stay on average.
const FEW_ROWS: usize = 8;

/// In how many rows a column that rises may fall once, more or less: as one does whose table was written in several places. Each fall makes a block of steps wide.
const FALL_ROWS: usize = 512;

/// Values that tell whether a column rises.
const ENOUGH_ROWS: usize = 1024;

/// Bytes of rows that are encoded in one go, more or less.
const STEP_BYTES: usize = 2 << 20;

/// Bytes after which a file is closed and the next one begun.
const FILE_BYTES: u64 = 512 << 20;

/// What a folder is called whose value is null, as Hive calls it.
const NULL_PARTITION: &str = "__HIVE_DEFAULT_PARTITION__";

/// Writes rows, which are sorted by `partition_by`, into files `data/<folder>/<name>` of an output: a folder for each of these
/// columns' values, a new file where one is large enough. The columns stay in the files.
pub(super) async fn write_parts(
    connection: &Arc<FilesConnection>,
    output: &str,
    mut name: impl FnMut() -> String,
    mut rows: SendableRecordBatchStream,
    partition_by: &[String],
    memory: &Share,
) -> Result<Vec<DataFile>> {
    let (schema, mut files) = (rows.schema(), Vec::new());
    let mut open: Option<(String, String, FileWriter)> = None;
    while let Some(batch) = rows.next().await {
        for (folder, part) in partitions(&batch?, partition_by)? {
            let (folder, path, mut file) = match open.take() {
                Some((current, path, file)) if current == folder && file.bytes() < FILE_BYTES => {
                    (current, path, file)
                }
                other => {
                    if let Some((_, path, file)) = other {
                        files.push(file.into_data_file(path).await?);
                    }
                    let path = format!("data/{folder}{}", name());
                    let file = FileWriter::new(connection, format!("{output}/{path}"), &schema, memory);
                    (folder, path, file)
                }
            };
            file.take(part).await?;
            open = Some((folder, path, file));
        }
    }
    if let Some((_, path, file)) = open {
        files.push(file.into_data_file(path).await?);
    }
    Ok(files)
}

/// A file that is written on a thread of its own, while its rows are made.
struct FileWriter {
    writing: Consumer<(u64, u64)>,
    written: Arc<AtomicU64>,
}

impl FileWriter {
    fn new(connection: &Arc<FilesConnection>, path: String, schema: &SchemaRef, memory: &Share) -> Self {
        let (connection, schema, memory) = (Arc::clone(connection), Arc::clone(schema), memory.another());
        let written = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&written);
        let writing = Consumer::new(move |batches| {
            Writer::new(&connection, &path, schema, &memory)?.write_all(&path, batches, &counter)
        });
        Self { writing, written }
    }

    async fn take(&mut self, batch: RecordBatch) -> Result<()> {
        self.writing.take(batch).await
    }

    /// Bytes that are in the file so far, without the row group that is open.
    fn bytes(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Its rows and bytes, once it is durable.
    async fn finish(self) -> Result<(u64, u64)> {
        self.writing.finish().await
    }

    async fn into_data_file(self, path: String) -> Result<DataFile> {
        let (rows, bytes) = self.finish().await?;
        Ok(DataFile { path, rows, bytes })
    }
}

/// The parts of a batch whose rows lie in one folder each.
fn partitions(batch: &RecordBatch, partition_by: &[String]) -> Result<Vec<(String, RecordBatch)>> {
    if batch.num_rows() == 0 {
        return Ok(Vec::new());
    }
    if partition_by.is_empty() {
        return Ok(vec![(String::new(), batch.clone())]);
    }
    let columns = partition_by
        .iter()
        .map(|name| {
            batch.column_by_name(name).cloned().ok_or_else(|| Error::bug("a partition column is missing"))
        })
        .collect::<Result<Vec<ArrayRef>>>()?;
    let options = FormatOptions::new();
    let texts = columns
        .iter()
        .map(|array| ArrayFormatter::try_new(array, &options))
        .collect::<Result<Vec<_>, _>>()?;
    let ranges = arrow::compute::partition(&columns)?.ranges();
    Ok(ranges
        .into_iter()
        .map(|range| {
            let folder: String = partition_by
                .iter()
                .zip(columns.iter().zip(&texts))
                .map(|(name, (array, text))| {
                    let value = match array.is_null(range.start) {
                        true => NULL_PARTITION.to_owned(),
                        false => folder_of(&text.value(range.start).to_string()),
                    };
                    format!("{}={value}/", folder_of(name))
                })
                .collect();
            (folder, batch.slice(range.start, range.len()))
        })
        .collect())
}

/// A value as a part of a path: what is not a letter, a digit, `_`, `-` or `.` is written `%xx`.
fn folder_of(value: &str) -> String {
    const PLAIN: &percent_encoding::AsciiSet =
        &percent_encoding::NON_ALPHANUMERIC.remove(b'_').remove(b'-').remove(b'.');
    let encoded = percent_encoding::utf8_percent_encode(value, PLAIN).to_string();
    // Neither an empty name nor one that is a way.
    if encoded.bytes().all(|byte| byte == b'.') { encoded.replace('.', "%2E") } else { encoded }
}

/// Writes all rows into the file `data/<name>` of an output and makes it durable; `None` where there is no row.
pub(super) async fn write(
    connection: &Arc<FilesConnection>,
    output: &str,
    name: &str,
    mut rows: SendableRecordBatchStream,
    memory: &Share,
) -> Result<Option<DataFile>> {
    let (schema, path, mut file) = (rows.schema(), format!("data/{name}"), None);
    while let Some(batch) = rows.next().await {
        let batch = batch?;
        if batch.num_rows() > 0 {
            let whole = || format!("{output}/{path}");
            file.get_or_insert_with(|| FileWriter::new(connection, whole(), &schema, memory))
                .take(batch)
                .await?;
        }
    }
    match file {
        Some(file) => file.into_data_file(path).await.map(Some),
        None => Ok(None),
    }
}

/// Writes all rows into one file, be there none, and makes it durable; its rows and bytes.
pub(super) async fn write_file(
    connection: &Arc<FilesConnection>,
    path: String,
    mut rows: SendableRecordBatchStream,
    memory: &Share,
) -> Result<(u64, u64)> {
    let mut file = FileWriter::new(connection, path, &rows.schema(), memory);
    while let Some(batch) = rows.next().await {
        file.take(batch?).await?;
    }
    file.finish().await
}
