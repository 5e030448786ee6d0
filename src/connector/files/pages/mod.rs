//! Column chunks of Parquet that are encoded here: of whole numbers, dates, times, decimals, texts and bytes, not nested.
//!
//! They are what most tables have, and what the library takes longest for: it asks for each value by its number, hashes it, and keeps eight bytes of it until its page
//! is full. Here a batch's values are gone through in their own type. All other columns are the library's ([`Chunk::new`] says which), and so are the file, its footer and its
//! reading.
//!
//! # What is written
//!
//! Data pages of version 1, each with statistics in the page index and none in its header; a dictionary until its words take a megabyte, from then on numbers by their
//! steps (`DELTA_BINARY_PACKED`, where the library writes them plainly), and texts and decimals of more than 18 digits plainly; validity as a run, or as the bits that Arrow has; zstd. The same batches
//! give the same bytes.
//!
//! Not done: encryption, Bloom filters, pages of version 2.

mod bits;
mod numbers;
mod places;
#[cfg(test)]
mod tests;
mod texts;

use std::{cell::RefCell, cmp::Ordering, io::Write, ops::Range};

use ::parquet::{
    basic::{BoundaryOrder, Compression, Encoding, PageType, Type as PhysicalType, ZstdLevel},
    column::{
        page::{CompressedPage, Page, PageWriter},
        writer::ColumnCloseResult,
    },
    errors::{ParquetError, Result},
    file::{
        metadata::{
            ColumnChunkMetaData, ColumnIndexBuilder, LevelHistogram, OffsetIndexBuilder, PageEncodingStats,
        },
        statistics::Statistics,
        writer::{SerializedPageWriter, SerializedRowGroupWriter, TrackedWrite},
    },
    schema::types::{ColumnDescPtr, ColumnPath},
};
use arrow::{
    array::{Array, BooleanBufferBuilder},
    buffer::NullBuffer,
    datatypes::DataType,
};
use bytes::Bytes;

use self::{bits::put_levels, numbers::Numbers, texts::Texts};

/// Rows of a page at most: what a reader that wants few rows decodes.
const PAGE_ROWS: usize = 20_000;

/// Bytes of a page's texts at most, more or less, unless one is longer than that.
const PAGE_BYTES: usize = 1 << 20;

/// Bytes of a dictionary's words at most.
const DICTIONARY_BYTES: usize = 1 << 20;

/// Plain values, words and validity are put down as memory has them.
const _: () =
    assert!(cfg!(target_endian = "little"), "Parquet is written as a little-endian machine holds it");

thread_local! {
    /// What pages are put together and compressed in: a thread makes one at a time.
    static WORKBENCH: RefCell<Option<Workbench>> = const { RefCell::new(None) };
}

struct Workbench {
    page: Vec<u8>,
    compressed: Vec<u8>,
    compressor: zstd::bulk::Compressor<'static>,
}

/// The level at which pages are compressed: the fastest of the real ones.
pub(super) const ZSTD_LEVEL: i32 = 1;

impl Workbench {
    /// Lets `make` write a page, compresses it, and appends it to `out`: what `make` told, and the bytes that it took there, header and all, and would have taken.
    fn page<T>(
        out: &mut TrackedWrite<Vec<u8>>,
        make: impl FnOnce(&mut Vec<u8>) -> (NewPage, T),
    ) -> Result<(NewPage, T, Written)> {
        WORKBENCH.with_borrow_mut(|bench| {
            let bench = match bench {
                Some(bench) => bench,
                none => none.insert(Self {
                    page: Vec::new(),
                    compressed: Vec::new(),
                    compressor: zstd::bulk::Compressor::new(ZSTD_LEVEL)?,
                }),
            };
            let (page, found) = make(&mut bench.page);
            bench.compressed.reserve(zstd::zstd_safe::compress_bound(bench.page.len()));
            bench.compressor.compress_to_buffer(&bench.page, &mut bench.compressed)?;
            let buf = Bytes::copy_from_slice(&bench.compressed);
            let num_values =
                u32::try_from(page.values).map_err(|_| ParquetError::General("too many values".into()))?;
            let content = match page.kind {
                PageType::DICTIONARY_PAGE => {
                    Page::DictionaryPage { buf, num_values, encoding: page.encoding, is_sorted: false }
                }
                _ => Page::DataPage {
                    buf,
                    num_values,
                    encoding: page.encoding,
                    def_level_encoding: Encoding::RLE,
                    rep_level_encoding: Encoding::RLE,
                    statistics: None,
                },
            };
            let content = CompressedPage::new(content, bench.page.len());
            let offset = out.bytes_written();
            let spec = SerializedPageWriter::new(out).write_page(content)?;
            // One that was very long is not kept for those that are not.
            for buffer in [&mut bench.page, &mut bench.compressed] {
                buffer.clear();
                buffer.shrink_to(2 * PAGE_BYTES);
            }
            let written = Written { offset, bytes: spec.compressed_size, plain: spec.uncompressed_size };
            Ok((page, found, written))
        })
    }
}

/// A page that has been put together.
struct NewPage {
    kind: PageType,
    encoding: Encoding,
    values: usize,
}

/// What a page has become, header and all.
struct Written {
    offset: usize,
    bytes: usize,
    plain: usize,
}

impl Written {
    fn bytes_of_page(&self) -> Result<i32> {
        i32::try_from(self.bytes).map_err(|_| ParquetError::General("a page has more than 2 GiB".into()))
    }
}

/// A column chunk under construction.
pub(super) struct Chunk {
    column: ColumnDescPtr,
    data_type: DataType,
    values: Box<dyn Values>,
    /// Of the open page.
    rows: usize,
    nulls: usize,
    valid: BooleanBufferBuilder,
    /// The pages that are ready.
    pages: TrackedWrite<Vec<u8>>,
    /// Behind them in time, before them in the file.
    dictionary: Option<Vec<u8>>,
    so_far: Sums,
    index: ColumnIndexBuilder,
    offsets: OffsetIndexBuilder,
    encodings: Vec<PageEncodingStats>,
    order: Order,
}

/// Of a chunk's pages together.
#[derive(Default)]
struct Sums {
    rows: usize,
    nulls: usize,
    bytes: usize,
    plain: usize,
    text_bytes: Option<i64>,
    ends: Option<Ends>,
}

/// The least and the greatest value, as statistics tell them.
#[derive(Debug, Clone)]
struct Ends {
    least: Bound,
    greatest: Bound,
}

/// An end, as Parquet writes a value.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bound {
    value: Vec<u8>,
    /// Whether it is a value, and not only before or behind all.
    is_exact: bool,
}

/// Whether both ends of pages rise or fall from page to page.
struct Order {
    last: Option<Ends>,
    rises: bool,
    falls: bool,
}

impl Chunk {
    /// Of a column that is encoded here; `None` if the library encodes it. `with_dictionary` says whether a dictionary is begun for it.
    pub(super) fn new(column: &ColumnDescPtr, data_type: &DataType, with_dictionary: bool) -> Option<Self> {
        if column.max_rep_level() > 0 || column.max_def_level() > 1 {
            return None;
        }
        let values: Box<dyn Values> = match (column.physical_type(), data_type) {
            (
                PhysicalType::INT32,
                DataType::Int8
                | DataType::Int16
                | DataType::Int32
                | DataType::Date32
                | DataType::Time32(_)
                | DataType::Decimal128(..),
            ) => Box::new(Numbers::<i32>::new(size_of::<i32>(), with_dictionary)),
            (
                PhysicalType::INT64,
                DataType::Int64 | DataType::Timestamp(..) | DataType::Time64(_) | DataType::Decimal128(..),
            ) => Box::new(Numbers::<i64>::new(size_of::<i64>(), with_dictionary)),
            (PhysicalType::FIXED_LEN_BYTE_ARRAY, DataType::Decimal128(..)) => {
                let width = usize::try_from(column.type_length()).ok()?;
                if width > size_of::<i128>() {
                    return None;
                }
                Box::new(Numbers::<i128>::new(width, with_dictionary))
            }
            (PhysicalType::BYTE_ARRAY, DataType::Utf8) => Box::new(Texts::new(true, with_dictionary)),
            (PhysicalType::BYTE_ARRAY, DataType::Binary) => Box::new(Texts::new(false, with_dictionary)),
            _ => return None,
        };
        Some(Self {
            column: ColumnDescPtr::clone(column),
            data_type: data_type.clone(),
            values,
            rows: 0,
            nulls: 0,
            valid: BooleanBufferBuilder::new(0),
            pages: TrackedWrite::new(Vec::new()),
            dictionary: None,
            so_far: Sums::default(),
            index: ColumnIndexBuilder::new(column.physical_type()),
            offsets: OffsetIndexBuilder::new(),
            encodings: Vec::new(),
            order: Order { last: None, rises: true, falls: true },
        })
    }

    fn is_nullable(&self) -> bool {
        self.column.max_def_level() > 0
    }

    /// Appends the values of `array`.
    pub(super) fn write(&mut self, array: &dyn Array) -> Result<()> {
        let (expected, found) = (&self.data_type, array.data_type());
        if !expected.equals_datatype(found) {
            let name = self.column.name();
            return Err(ParquetError::General(format!(
                "column `{name}` is of type {expected}, and its values of {found}"
            )));
        }
        let nulls = array.logical_nulls().filter(|nulls| nulls.null_count() > 0);
        if nulls.is_some() && !self.is_nullable() {
            let name = self.column.name();
            return Err(ParquetError::General(format!("column `{name}` has a null and no place for one")));
        }
        self.values.load(array, nulls.as_ref())?;
        let mut at = 0;
        while at < array.len() {
            let most = (PAGE_ROWS - self.rows).min(array.len() - at);
            let rows = at..at + self.values.fit(at..at + most);
            match nulls.as_ref().map(|nulls| nulls.slice(rows.start, rows.len())) {
                Some(nulls) if nulls.null_count() > 0 => {
                    for (from, to) in nulls.valid_slices() {
                        self.values.put(rows.start + from..rows.start + to);
                    }
                    self.nulls += nulls.null_count();
                    self.valid.append_buffer(nulls.inner());
                }
                _ => {
                    self.values.put(rows.clone());
                    if self.is_nullable() {
                        self.valid.append_n(rows.len(), true);
                    }
                }
            }
            self.rows += rows.len();
            at = rows.end;
            let outgrown = self.values.dictionary_bytes().is_some_and(|bytes| bytes >= DICTIONARY_BYTES);
            if outgrown || self.rows >= PAGE_ROWS || self.values.page_bytes() >= PAGE_BYTES {
                self.finish_page()?;
            }
            if outgrown {
                self.finish_dictionary()?;
            }
        }
        self.values.unload();
        Ok(())
    }

    /// Closes the open page.
    fn finish_page(&mut self) -> Result<()> {
        let (rows, nulls) = (self.rows, self.nulls);
        let levels = self.is_nullable().then(|| self.valid.as_slice());
        let values = &mut self.values;
        let (page, found, written) = Workbench::page(&mut self.pages, |page| {
            if let Some(valid) = levels {
                put_levels(valid, rows, nulls, page);
            }
            let found = values.finish_page(page);
            (NewPage { kind: PageType::DATA_PAGE, encoding: found.encoding, values: rows }, found)
        })?;
        self.count(&page, &written);
        let histogram =
            self.is_nullable().then(|| LevelHistogram::from(vec![signed(nulls), signed(rows - nulls)]));
        self.index.append_histograms(&None, &histogram);
        self.offsets.append_row_count(signed(rows));
        self.offsets.append_unencoded_byte_array_data_bytes(found.text_bytes);
        self.offsets.append_offset_and_size(signed(written.offset), written.bytes_of_page()?);
        if let Some(bytes) = found.text_bytes {
            *self.so_far.text_bytes.get_or_insert(0) += bytes;
        }
        match found.ends {
            Some(ends) => {
                let (least, greatest) = (ends.least.value.clone(), ends.greatest.value.clone());
                self.index.append(false, least, greatest, signed(nulls));
                self.order.next(&*self.values, &ends);
                widen(&mut self.so_far.ends, &*self.values, ends);
            }
            None => self.index.append(true, Vec::new(), Vec::new(), signed(nulls)),
        }
        self.so_far.rows += rows;
        self.so_far.nulls += nulls;
        (self.rows, self.nulls) = (0, 0);
        self.valid.truncate(0);
        Ok(())
    }

    /// Closes the dictionary, if there is one: what comes is written plainly.
    fn finish_dictionary(&mut self) -> Result<()> {
        let Some((words, count)) = self.values.take_dictionary() else { return Ok(()) };
        let mut dictionary = TrackedWrite::new(Vec::new());
        let (page, (), written) = Workbench::page(&mut dictionary, |page| {
            page.extend_from_slice(&words);
            (NewPage { kind: PageType::DICTIONARY_PAGE, encoding: Encoding::PLAIN, values: count }, ())
        })?;
        self.count(&page, &written);
        self.dictionary = Some(dictionary.into_inner()?);
        Ok(())
    }

    fn count(&mut self, page: &NewPage, written: &Written) {
        self.so_far.bytes += written.bytes;
        self.so_far.plain += written.plain;
        match self.encodings.last_mut() {
            Some(last) if (last.page_type, last.encoding) == (page.kind, page.encoding) => last.count += 1,
            _ => {
                let new = PageEncodingStats { page_type: page.kind, encoding: page.encoding, count: 1 };
                // Some readers look for the dictionary at the first place, where it is in the file.
                let at = if page.kind == PageType::DICTIONARY_PAGE { 0 } else { self.encodings.len() };
                self.encodings.insert(at, new);
            }
        }
    }

    /// Bytes that are ready for the file.
    pub(super) fn encoded_bytes(&self) -> usize {
        self.so_far.bytes + self.values.page_bytes() + self.values.dictionary_bytes().unwrap_or_default()
    }

    /// Bytes of memory that are held.
    pub(super) fn held_bytes(&self) -> usize {
        self.pages.inner().capacity()
            + self.dictionary.as_ref().map_or(0, Vec::capacity)
            + self.values.held_bytes()
    }

    /// Closes the chunk.
    pub(super) fn close(mut self) -> Result<EncodedChunk> {
        if self.rows > 0 {
            self.finish_page()?;
        }
        let values = self.so_far.rows - self.so_far.nulls;
        let is_outgrown = self.dictionary.is_some();
        let has_many = is_outgrown || self.values.word_count() > values / 2 && values >= PAGE_ROWS;
        self.finish_dictionary()?;
        let Sums { rows, nulls, bytes, plain, text_bytes, ends } = std::mem::take(&mut self.so_far);
        let histogram =
            self.is_nullable().then(|| LevelHistogram::from(vec![signed(nulls), signed(rows - nulls)]));
        let mut encodings: Vec<Encoding> = self.encodings.iter().map(|page| page.encoding).collect();
        encodings.push(Encoding::RLE);
        let level = ZstdLevel::try_new(ZSTD_LEVEL)?;
        let metadata = ColumnChunkMetaData::builder(self.column)
            .set_compression(Compression::ZSTD(level))
            .set_encodings(encodings)
            .set_page_encoding_stats(self.encodings)
            .set_total_compressed_size(signed(bytes))
            .set_total_uncompressed_size(signed(plain))
            .set_num_values(signed(rows))
            .set_data_page_offset(0)
            .set_statistics(self.values.statistics(ends.as_ref(), nulls as u64))
            .set_unencoded_byte_array_data_bytes(text_bytes)
            .set_definition_level_histogram(histogram)
            .build()?;
        self.index.set_boundary_order(match (self.order.rises, self.order.falls) {
            (true, _) => BoundaryOrder::ASCENDING,
            (false, true) => BoundaryOrder::DESCENDING,
            (false, false) => BoundaryOrder::UNORDERED,
        });
        let close = ColumnCloseResult {
            bytes_written: bytes as u64,
            rows_written: rows as u64,
            metadata,
            bloom_filter: None,
            column_index: Some(self.index.build()?),
            offset_index: Some(self.offsets.build()),
        };
        let (mut bytes, mut pages) = (self.dictionary.unwrap_or_default(), self.pages.into_inner()?);
        let close = close.update_dictionary_location(bytes.len())?;
        // What has no dictionary, texts above all, is not copied.
        if bytes.is_empty() {
            bytes = pages;
        } else {
            bytes.append(&mut pages);
        }
        Ok(EncodedChunk { bytes: bytes.into(), close, has_many })
    }
}

/// A column chunk that is ready for the file.
pub(super) struct EncodedChunk {
    /// Its dictionary, if it has one, and its pages.
    bytes: Bytes,
    close: ColumnCloseResult,
    /// Whether a dictionary was begun that holds more values than pay for it: the next row group does without.
    pub(super) has_many: bool,
}

impl EncodedChunk {
    pub(super) fn path(&self) -> &ColumnPath {
        self.close.metadata.column_path()
    }

    pub(super) fn append_to<W: Write + Send>(
        self,
        group: &mut SerializedRowGroupWriter<'_, W>,
    ) -> Result<()> {
        group.append_column(&self.bytes, self.close)
    }
}

/// A count as Parquet has it. Nothing that is counted here comes near its end.
fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn widen(ends: &mut Option<Ends>, values: &dyn Values, by: Ends) {
    match ends {
        None => *ends = Some(by),
        Some(ends) => {
            // Of two that are alike the exact one is the end.
            let is_wider = |by: &Bound, than: &Bound, wider: Ordering| {
                let order = values.compare(&by.value, &than.value);
                order == wider || order.is_eq() && by.is_exact
            };
            if is_wider(&by.least, &ends.least, Ordering::Less) {
                ends.least = by.least;
            }
            if is_wider(&by.greatest, &ends.greatest, Ordering::Greater) {
                ends.greatest = by.greatest;
            }
        }
    }
}

impl Order {
    fn next(&mut self, values: &dyn Values, ends: &Ends) {
        if let Some(last) = &self.last {
            let least = values.compare(&last.least.value, &ends.least.value);
            let greatest = values.compare(&last.greatest.value, &ends.greatest.value);
            self.rises &= least.is_le() && greatest.is_le();
            self.falls &= least.is_ge() && greatest.is_ge();
        }
        self.last = Some(ends.clone());
    }
}

/// What a page's values are, once they are put down.
struct PageValues {
    encoding: Encoding,
    ends: Option<Ends>,
    /// Bytes of the values without what tells them apart, of texts.
    text_bytes: Option<i64>,
}

/// Which end of a range a statistic tells.
#[derive(Clone, Copy)]
enum End {
    Least,
    Greatest,
}

/// The values of a column, without the nulls.
trait Values: Send {
    /// Takes up a batch, of which [`Values::put`] takes rows.
    fn load(&mut self, array: &dyn Array, nulls: Option<&NullBuffer>) -> Result<()>;
    /// How many of these rows of the batch go on in one step; one at least.
    fn fit(&self, rows: Range<usize>) -> usize {
        rows.len()
    }
    /// Puts rows of the batch into the open page, none of which is null.
    fn put(&mut self, rows: Range<usize>);
    /// Lets go of the batch.
    fn unload(&mut self);
    /// Bytes of the open page, if it is plain.
    fn page_bytes(&self) -> usize;
    /// Writes the values of the open page, and begins another.
    fn finish_page(&mut self, page: &mut Vec<u8>) -> PageValues;
    /// Bytes of the words, while there is a dictionary.
    fn dictionary_bytes(&self) -> Option<usize>;
    /// How many words they are.
    fn word_count(&self) -> usize;
    /// Ends the dictionary: its words, plain, and how many. The open page is empty.
    fn take_dictionary(&mut self) -> Option<(Vec<u8>, usize)>;
    /// The order of two values, as Parquet writes them.
    fn compare(&self, one: &[u8], other: &[u8]) -> Ordering;
    fn statistics(&self, ends: Option<&Ends>, nulls: u64) -> Statistics;
    fn held_bytes(&self) -> usize;
}
