//! The order-free hash of rows: the sum modulo 2^128 of XXH3-128 over each row's bytes.
//!
//! Adding instead of XOR-ing makes a doubled row show, and makes the order of rows not matter. It finds accidents and no forgers: who may write
//! to the target may make rows of any hash. It is taken of every row of every run, so it must cost next to nothing; `cargo bench --bench
//! bounds` measures it. BLAKE3 over Arrow's row format, which was here before, took a third of a copy.
//!
//! # The bytes of a row
//!
//! One cell for each column, in order: 1 and the value, or 0 and as many zeros where it is null. Numbers and times are what Arrow holds, little end first;
//! a boolean is a byte; a text or a binary value is the XXH3-64 of its bytes; anything else (lists, structs) that of what Arrow's row format makes
//! of it. So a text that was changed by accident is missed once in 2^64 times.

use std::ops::Range;

use arrow::{
    array::{Array, ArrayRef, AsArray},
    buffer::{BooleanBuffer, Buffer, NullBuffer},
    datatypes::{DataType, Schema},
    record_batch::RecordBatch,
    row::{RowConverter, Rows, SortField},
};
use twox_hash::{XxHash3_64, XxHash3_128};

use crate::error::{Error, Result};

/// A hash of rows under construction.
#[derive(Debug)]
pub struct RowHash {
    columns: Vec<Layout>,
    sum: u128,
    rows: u64,
    /// The bytes of a block's rows, one behind the other.
    bytes: Vec<u8>,
}

/// Of rows that are written down together before they are hashed: each column goes through all of them, so they stay in the processor's first cache.
const BLOCK_BYTES: usize = 16 << 10;

/// How a column's values become bytes.
#[derive(Debug)]
enum Layout {
    /// So many bytes, as they are.
    Fixed(usize),
    Boolean,
    Text,
    Binary,
    Other(RowConverter),
}

impl Layout {
    fn of(data_type: &DataType) -> Result<Self> {
        Ok(match (data_type, data_type.primitive_width()) {
            (_, Some(width)) => Self::Fixed(width),
            (DataType::Boolean, _) => Self::Boolean,
            (DataType::Utf8, _) => Self::Text,
            (DataType::Binary, _) => Self::Binary,
            _ => Self::Other(RowConverter::new(vec![SortField::new(data_type.clone())])?),
        })
    }

    /// The values of `array`, which is of this layout.
    fn of_array<'a>(&self, array: &'a ArrayRef) -> Result<Column<'a>> {
        let another = || Error::bug("a column of another type cannot be hashed");
        let values = match self {
            Self::Fixed(width) if array.data_type().primitive_width() != Some(*width) => {
                return Err(another());
            }
            Self::Fixed(width) => {
                let data = array.to_data();
                let buffer = data.buffers().first().ok_or_else(another)?;
                Values::Fixed(*width, buffer.slice_with_length(data.offset() * width, data.len() * width))
            }
            Self::Boolean => Values::Boolean(array.as_boolean_opt().ok_or_else(another)?.values()),
            Self::Text => {
                let texts = array.as_string_opt::<i32>().ok_or_else(another)?;
                Values::Bytes(texts.value_data(), texts.value_offsets())
            }
            Self::Binary => {
                let values = array.as_binary_opt::<i32>().ok_or_else(another)?;
                Values::Bytes(values.value_data(), values.value_offsets())
            }
            Self::Other(converter) => Values::Other(converter.convert_columns(std::slice::from_ref(array))?),
        };
        Ok(Column { values, nulls: array.logical_nulls() })
    }

    /// The bytes of a cell.
    fn width(&self) -> usize {
        1 + match self {
            Self::Fixed(width) => *width,
            Self::Boolean => 1,
            Self::Text | Self::Binary | Self::Other(_) => size_of::<u64>(),
        }
    }
}

impl RowHash {
    /// Of no rows, for rows of `schema`.
    ///
    /// # Errors
    ///
    /// If a column's type has no row format.
    pub fn new(schema: &Schema) -> Result<Self> {
        let columns =
            schema.fields().iter().map(|field| Layout::of(field.data_type())).collect::<Result<_>>()?;
        Ok(Self { columns, sum: 0, rows: 0, bytes: Vec::new() })
    }

    /// Adds the rows of `batch`.
    ///
    /// # Errors
    ///
    /// If the batch is of another schema.
    pub fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        if batch.num_columns() != self.columns.len() {
            return Err(Error::bug("rows of another schema cannot be hashed"));
        }
        let width: usize = self.columns.iter().map(Layout::width).sum();
        self.rows += batch.num_rows() as u64;
        // Rows without columns are only counted.
        let Some(rows) = BLOCK_BYTES.checked_div(width).map(|rows| rows.max(1)) else { return Ok(()) };
        let columns = self.columns.iter().zip(batch.columns());
        let columns: Vec<Column<'_>> =
            columns.map(|(layout, array)| layout.of_array(array)).collect::<Result<_>>()?;
        for start in (0..batch.num_rows()).step_by(rows) {
            let rows = start..batch.num_rows().min(start + rows);
            // What is there from the block before is written over.
            self.bytes.resize(rows.len() * width, 0);
            let mut cells = Cells { bytes: &mut self.bytes, width, at: 0 };
            for (layout, column) in self.columns.iter().zip(&columns) {
                cells.put(column, rows.clone());
                cells.at += layout.width();
            }
            let hashes = self.bytes.chunks_exact(width).map(XxHash3_128::oneshot);
            self.sum = hashes.fold(self.sum, u128::wrapping_add);
        }
        Ok(())
    }

    /// The hash, with its algorithm's name and the number of rows.
    pub fn finish(&self) -> String {
        format!("xxh3-128-sum:{}:{:032x}", self.rows, self.sum)
    }
}

/// A column's values in a batch.
struct Column<'a> {
    values: Values<'a>,
    nulls: Option<NullBuffer>,
}

enum Values<'a> {
    /// Of so many bytes.
    Fixed(usize, Buffer),
    Boolean(&'a BooleanBuffer),
    /// Their bytes, and where each ends and the next begins.
    Bytes(&'a [u8], &'a [i32]),
    Other(Rows),
}

/// The bytes of rows, at the cells of one column.
struct Cells<'a> {
    bytes: &'a mut [u8],
    /// Those of a row.
    width: usize,
    /// Where in it the column's cell begins.
    at: usize,
}

impl Cells<'_> {
    fn put(&mut self, column: &Column<'_>, rows: Range<usize>) {
        let nulls = column.nulls.as_ref().map(|nulls| nulls.slice(rows.start, rows.len()));
        match &column.values {
            Values::Fixed(1, bytes) => self.put_fixed::<1>(bytes, rows, nulls),
            Values::Fixed(2, bytes) => self.put_fixed::<2>(bytes, rows, nulls),
            Values::Fixed(4, bytes) => self.put_fixed::<4>(bytes, rows, nulls),
            Values::Fixed(8, bytes) => self.put_fixed::<8>(bytes, rows, nulls),
            Values::Fixed(16, bytes) => self.put_fixed::<16>(bytes, rows, nulls),
            // Nothing is wider than a decimal of 256 bits.
            Values::Fixed(_, bytes) => self.put_fixed::<32>(bytes, rows, nulls),
            Values::Boolean(bits) => {
                let bits = bits.slice(rows.start, rows.len());
                self.put_all(bits.iter().map(|bit| [u8::from(bit)]), nulls);
            }
            Values::Bytes(bytes, ends) => {
                let ends = ends.get(rows.start..=rows.end).unwrap_or_default();
                let values = ends.array_windows().map(|[start, end]| {
                    let places = start.cast_unsigned() as usize..end.cast_unsigned() as usize;
                    hashed(bytes.get(places).unwrap_or_default())
                });
                self.put_all(values, nulls);
            }
            Values::Other(values) => {
                self.put_all(rows.map(|row| hashed(values.row(row).as_ref())), nulls);
            }
        }
    }

    /// Writes a value into the column's cell of each row; `nulls` says where there is none.
    #[inline]
    fn put_all<const N: usize>(&mut self, values: impl Iterator<Item = [u8; N]>, nulls: Option<NullBuffer>) {
        let (at, rows) = (self.at, self.bytes.chunks_exact_mut(self.width));
        let write = |row: &mut [u8], is_valid: bool, value: [u8; N]| {
            if let Some([head, cell @ ..]) = row.get_mut(at..=at + N) {
                *head = u8::from(is_valid);
                cell.copy_from_slice(&value);
            }
        };
        match nulls.filter(|nulls| nulls.null_count() > 0) {
            None => rows.zip(values).for_each(|(row, value)| write(row, true, value)),
            // What a null hides is not part of the row.
            Some(nulls) => {
                for ((row, value), is_valid) in rows.zip(values).zip(&nulls) {
                    write(row, is_valid, if is_valid { value } else { [0; N] });
                }
            }
        }
    }

    fn put_fixed<const N: usize>(&mut self, bytes: &Buffer, rows: Range<usize>, nulls: Option<NullBuffer>) {
        let (values, _) = bytes.as_slice().as_chunks::<N>();
        self.put_all(values.get(rows).unwrap_or_default().iter().copied(), nulls);
    }
}

fn hashed(bytes: &[u8]) -> [u8; size_of::<u64>()] {
    XxHash3_64::oneshot(bytes).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::{
        array::{
            BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int16Array, Int64Array,
            ListArray, StringArray,
        },
        compute::{concat_batches, take_record_batch},
        datatypes::{Field, Int32Type},
    };
    use proptest::prelude::*;

    use super::*;

    fn hash(batches: &[RecordBatch]) -> String {
        let mut hash = RowHash::new(&batches[0].schema()).unwrap();
        batches.iter().for_each(|batch| hash.add(batch).unwrap());
        hash.finish()
    }

    fn batch(rows: &[(&str, i128)]) -> RecordBatch {
        let names: StringArray = rows.iter().map(|row| Some(row.0)).collect();
        let amounts: Decimal128Array = rows.iter().map(|row| Some(row.1)).collect();
        let amounts = amounts.with_precision_and_scale(38, 2).unwrap();
        RecordBatch::try_from_iter([("name", Arc::new(names) as ArrayRef), ("amount", Arc::new(amounts))])
            .unwrap()
    }

    #[test]
    fn the_row_hash_ignores_order_and_sees_a_doubled_pair() {
        let one = hash(&[batch(&[("a", 1), ("b", 2), ("c", 3)])]);
        assert_eq!(one, hash(&[batch(&[("c", 3)]), batch(&[("b", 2), ("a", 1)])]));
        let sum = |hash: String| u128::from_str_radix(hash.rsplit(':').next().unwrap(), 16).unwrap();
        let pair = hash(&[batch(&[("a", 1), ("b", 2), ("c", 3), ("x", 9), ("x", 9)])]);
        assert_ne!(sum(one.clone()), sum(pair.clone()));
        // Why hashes are added: an exclusive or does not see a pair of equal rows.
        let hashes = ["a", "b", "c", "x", "x"].into_iter().zip([1, 2, 3, 9, 9]);
        let hashes: Vec<u128> = hashes.map(|row| sum(hash(&[batch(&[row])]))).collect();
        assert_eq!(hashes.iter().copied().fold(0, u128::wrapping_add), sum(pair));
        let xor = |hashes: &[u128]| hashes.iter().fold(0, |sum, hash| sum ^ hash);
        assert_eq!(xor(&hashes), xor(&hashes[..3]));
    }

    #[test]
    fn the_row_hash_stays_what_it_is() {
        // Records hold it: another algorithm has another name.
        let name = XxHash3_64::oneshot(b"ab").to_le_bytes();
        let bytes = [&[1_u8][..], &name, &[1, 5], &[0; 15]].concat();
        let expected = format!("xxh3-128-sum:1:{:032x}", XxHash3_128::oneshot(&bytes));
        assert_eq!(hash(&[batch(&[("ab", 5)])]), expected);
        assert_eq!(expected, "xxh3-128-sum:1:d068658cd7e4649c0d9f4f03c3d89a3c");
    }

    #[test]
    fn what_looks_alike_is_not() {
        let texts = |rows: &[[Option<&str>; 2]]| {
            let column =
                |at: usize| Arc::new(rows.iter().map(|row| row[at]).collect::<StringArray>()) as ArrayRef;
            RecordBatch::try_from_iter_with_nullable([("a", column(0), true), ("b", column(1), true)])
                .unwrap()
        };
        let numbers = |numbers: &[Option<i64>]| {
            let column = Arc::new(Int64Array::from(numbers.to_vec())) as ArrayRef;
            RecordBatch::try_from_iter_with_nullable([("n", column, true)]).unwrap()
        };
        let all = [
            hash(&[texts(&[[Some("ab"), Some("c")]])]),
            hash(&[texts(&[[Some("a"), Some("bc")]])]),
            hash(&[texts(&[[Some(""), Some("abc")]])]),
            hash(&[texts(&[[None, Some("abc")]])]),
            hash(&[texts(&[[None, None]])]),
            hash(&[texts(&[[Some(""), None]])]),
            hash(&[texts(&[[None, Some("")]])]),
            hash(&[numbers(&[None])]),
            hash(&[numbers(&[Some(0)])]),
            hash(&[numbers(&[Some(1)])]),
            hash(&[numbers(&[])]),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(one), "{at}: {all:?}");
        }
    }

    #[test]
    fn what_a_null_hides_is_not_part_of_a_row() {
        use arrow::{
            array::{ArrayData, make_array},
            buffer::NullBuffer,
        };
        let shown: [ArrayRef; 5] = [
            Arc::new(Int64Array::from(vec![7, 8])),
            Arc::new(StringArray::from(vec!["hidden", "text"])),
            Arc::new(BooleanArray::from(vec![true, true])),
            Arc::new(BinaryArray::from(vec![&b"hidden"[..], &b"bytes"[..]])),
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([Some([Some(1)]), Some([Some(2)])])),
        ];
        for array in shown {
            let nulls = NullBuffer::from(vec![false, true]);
            let hiding: ArrayData = array.to_data().into_builder().nulls(Some(nulls)).build().unwrap();
            let row = |array: ArrayRef| {
                hash(&[RecordBatch::try_from_iter_with_nullable([("x", array, true)]).unwrap()])
            };
            let of_null = row(arrow::array::new_null_array(array.data_type(), 1));
            assert_eq!(row(make_array(hiding).slice(0, 1)), of_null, "{}", array.data_type());
            assert_ne!(row(array.slice(0, 1)), of_null, "{}", array.data_type());
        }
    }

    type Row = (
        Option<i64>,
        Option<String>,
        Option<bool>,
        Option<Vec<u8>>,
        Option<i16>,
        Option<Vec<Option<i32>>>,
        f64,
    );

    fn wide(rows: &[Row]) -> RecordBatch {
        let decimals: Decimal128Array = rows.iter().map(|row| row.0.map(i128::from)).collect();
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("int", Arc::new(rows.iter().map(|row| row.0).collect::<Int64Array>())),
            ("text", Arc::new(rows.iter().map(|row| row.1.clone()).collect::<StringArray>())),
            ("bool", Arc::new(rows.iter().map(|row| row.2).collect::<BooleanArray>())),
            ("bytes", Arc::new(rows.iter().map(|row| row.3.clone()).collect::<BinaryArray>())),
            ("small", Arc::new(rows.iter().map(|row| row.4).collect::<Int16Array>())),
            (
                "list",
                Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
                    rows.iter().map(|row| row.5.clone()),
                )),
            ),
            ("float", Arc::new(rows.iter().map(|row| row.6).collect::<Float64Array>())),
            ("date", Arc::new(rows.iter().map(|row| row.4.map(i32::from)).collect::<Date32Array>())),
            ("decimal", Arc::new(decimals)),
        ];
        let fields: Vec<Field> =
            columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
        let arrays = columns.into_iter().map(|(_, array)| array).collect();
        RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
    }

    /// The hash by its definition: each row's bytes put together by themselves.
    fn by_definition(rows: &[Row], lists: &ArrayRef) -> String {
        fn cell<const N: usize>(value: Option<[u8; N]>) -> Vec<u8> {
            value.map_or_else(|| vec![0; N + 1], |value| [&[1][..], &value].concat())
        }
        let converter = RowConverter::new(vec![SortField::new(lists.data_type().clone())]).unwrap();
        let hashes = rows.iter().enumerate().map(|(at, (int, text, is, bytes, small, list, float))| {
            let list = list
                .as_ref()
                .map(|_| hashed(converter.convert_columns(&[lists.slice(at, 1)]).unwrap().row(0).as_ref()));
            let row = [
                cell(int.map(i64::to_le_bytes)),
                cell(text.as_ref().map(|text| hashed(text.as_bytes()))),
                cell(is.map(|is| [u8::from(is)])),
                cell(bytes.as_ref().map(|bytes| hashed(bytes))),
                cell(small.map(i16::to_le_bytes)),
                cell(list),
                cell(Some(float.to_le_bytes())),
                cell(small.map(|small| i32::from(small).to_le_bytes())),
                cell(int.map(|int| i128::from(int).to_le_bytes())),
            ];
            XxHash3_128::oneshot(&row.concat())
        });
        format!("xxh3-128-sum:{}:{:032x}", rows.len(), hashes.fold(0, u128::wrapping_add))
    }

    #[test]
    fn rows_of_many_blocks_have_the_hash_of_the_definition() {
        let rows: Vec<Row> = (0..1000_i16)
            .map(|row| {
                let some = |every| row % every != 0;
                let text = "x".repeat(usize::try_from(row % 40).unwrap());
                let list = vec![Some(i32::from(row)), None];
                (
                    some(3).then(|| row.into()),
                    some(5).then(|| text.clone()),
                    some(7).then_some(row % 2 == 0),
                    some(11).then(|| text.into_bytes()),
                    some(13).then_some(row),
                    some(17).then_some(list),
                    row.into(),
                )
            })
            .collect();
        let all = wide(&rows);
        let width: usize = RowHash::new(&all.schema()).unwrap().columns.iter().map(Layout::width).sum();
        assert!(width * rows.len() > 3 * BLOCK_BYTES);
        let expected = by_definition(&rows, all.column(5));
        assert_eq!(hash(std::slice::from_ref(&all)), expected);
        assert_eq!(hash(&[all.slice(0, 333), all.slice(333, 667)]), expected);
    }

    #[test]
    fn rows_without_columns_are_counted() {
        let options = arrow::record_batch::RecordBatchOptions::new().with_row_count(Some(3));
        let rows = RecordBatch::try_new_with_options(Schema::empty().into(), Vec::new(), &options).unwrap();
        assert_eq!(hash(&[rows]), format!("xxh3-128-sum:3:{:032x}", 0));
    }

    proptest! {
        /// Neither the order of rows nor how they are cut into batches matters; each cell does.
        #[test]
        fn the_row_hash_is_of_rows_and_of_every_cell(
            rows: Vec<Row>,
            cuts in prop::collection::vec(0_usize..20, 0..3),
            turn in 0_usize..20,
            other: Row,
            column in 0_usize..7,
        ) {
            let all = wide(&rows);
            let one = hash(std::slice::from_ref(&all));
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(rows.len())).chain([0, rows.len()]).collect();
            cuts.sort_unstable();
            // Slices have offsets.
            let parts: Vec<_> = cuts.windows(2).map(|cut| all.slice(cut[0], cut[1] - cut[0])).rev().collect();
            prop_assert_eq!(&hash(&parts), &one);
            prop_assert_eq!(&hash(&[concat_batches(&all.schema(), &parts).unwrap()]), &one);
            if let Some(turned) = (!rows.is_empty()).then(|| turn % rows.len()) {
                let order = (0..rows.len() as u64).map(|row| (row + turned as u64) % rows.len() as u64);
                let order = arrow::array::UInt64Array::from_iter_values(order);
                prop_assert_eq!(&hash(&[take_record_batch(&all, &order).unwrap()]), &one);
                let mut changed = rows.clone();
                let row = &mut changed[turned];
                let before = format!("{row:?}");
                match column {
                    0 => row.0 = other.0,
                    1 => row.1 = other.1,
                    2 => row.2 = other.2,
                    3 => row.3 = other.3,
                    4 => row.4 = other.4,
                    5 => row.5 = other.5,
                    _ => row.6 = other.6,
                }
                let same = format!("{row:?}") == before;
                prop_assert_eq!(hash(&[wide(&changed)]) == one, same);
            }
        }
    }
}
