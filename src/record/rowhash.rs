//! The order-free hash of rows: the sum modulo 2^128 of XXH3-128 over each row's bytes.
//!
//! Adding instead of XOR-ing makes a doubled row show, and makes the order of rows not matter. It finds accidents and no forgers: who may write
//! to the target may make rows of any hash. It is taken of every row of every run, so it must cost next to nothing; `cargo bench --bench
//! bounds` measures it. BLAKE3, which was here before, took a third of a copy.
//!
//! # The bytes of a row
//!
//! First the columns whose values have one width, in order: 1 and the value, little end first, or 0 and as many zeros where it is null. Then
//! the others, in order: 1, the length in four bytes and the bytes; or five zeros. A text or binary value is its bytes; anything else (lists, structs)
//! is what Arrow's row format makes of it.

use arrow::{
    array::{Array, ArrayRef, AsArray, GenericByteArray},
    buffer::NullBuffer,
    datatypes::{BinaryType, ByteArrayType, DataType, Schema, Utf8Type},
    record_batch::RecordBatch,
    row::{RowConverter, SortField},
};
use twox_hash::XxHash3_128;

use crate::error::{Error, Result};

/// A hash of rows under construction.
#[derive(Debug)]
pub struct RowHash {
    columns: Vec<Layout>,
    sum: u128,
    rows: u64,
    /// The bytes of a batch's rows, one behind the other.
    bytes: Vec<u8>,
    /// Where each row ends there.
    ends: Vec<usize>,
    /// Where the next value of each row goes.
    places: Vec<usize>,
}

/// How a column's values become bytes.
#[derive(Debug)]
enum Layout {
    /// So many bytes, always.
    Fixed(usize),
    /// One byte: 0 or 1.
    Boolean,
    Text,
    Binary,
    Other(RowConverter),
}

/// What stands before the bytes of a value that has no fixed width: that it is one, and its length.
const HEAD: usize = 5;

impl RowHash {
    /// Of no rows, for rows of `schema`.
    ///
    /// # Errors
    ///
    /// If a column's type has no row format.
    pub fn new(schema: &Schema) -> Result<Self> {
        let layout = |data_type: &DataType| {
            Ok(match (data_type, data_type.primitive_width()) {
                (_, Some(width)) => Layout::Fixed(width),
                (DataType::Boolean, _) => Layout::Boolean,
                (DataType::Utf8, _) => Layout::Text,
                (DataType::Binary, _) => Layout::Binary,
                _ => Layout::Other(RowConverter::new(vec![SortField::new(data_type.clone())])?),
            })
        };
        let columns = schema.fields().iter().map(|field| layout(field.data_type())).collect::<Result<_>>()?;
        let (bytes, ends, places) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { columns, sum: 0, rows: 0, bytes, ends, places })
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
        let mut width = 0;
        let mut columns = Vec::with_capacity(self.columns.len());
        for (layout, array) in self.columns.iter().zip(batch.columns()) {
            let column = Column::of(layout, array)?;
            width += column.width();
            columns.push(column);
        }
        self.ends.clear();
        self.ends.resize(batch.num_rows(), width);
        columns.iter().for_each(|column| column.lengths(&mut self.ends));
        let mut end = 0;
        self.places.clear();
        for length in &mut self.ends {
            self.places.push(end);
            end += *length;
            *length = end;
        }
        // What is there from the batch before is written over.
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let mut at = 0;
        for column in columns.iter().filter(|column| column.is_fixed()) {
            column.put(&mut self.bytes, &mut self.places, at);
            at += column.width();
        }
        self.places.iter_mut().for_each(|place| *place += at);
        for column in columns.iter().filter(|column| !column.is_fixed()) {
            column.put(&mut self.bytes, &mut self.places, 0);
        }
        let mut start = 0;
        for end in &self.ends {
            let row = self.bytes.get(start..*end).unwrap_or_default();
            self.sum = self.sum.wrapping_add(XxHash3_128::oneshot(row));
            start = *end;
        }
        self.rows += batch.num_rows() as u64;
        Ok(())
    }

    /// The hash, with its algorithm's name and the number of rows.
    pub fn finish(&self) -> String {
        format!("xxh3-128-sum:{}:{:032x}", self.rows, self.sum)
    }
}

/// A column of a batch, ready to be written.
enum Column<'a> {
    Fixed(usize, arrow::array::ArrayData),
    Boolean(&'a arrow::array::BooleanArray),
    Text(&'a GenericByteArray<Utf8Type>),
    Binary(&'a GenericByteArray<BinaryType>),
    Other(arrow::row::Rows, Option<NullBuffer>),
}

impl<'a> Column<'a> {
    fn of(layout: &Layout, array: &'a ArrayRef) -> Result<Self> {
        let another = || Error::bug("a column of another type cannot be hashed");
        Ok(match layout {
            Layout::Fixed(width) if array.data_type().primitive_width() == Some(*width) => {
                Self::Fixed(*width, array.to_data())
            }
            Layout::Fixed(_) => return Err(another()),
            Layout::Boolean => Self::Boolean(array.as_boolean_opt().ok_or_else(another)?),
            Layout::Text => Self::Text(array.as_bytes_opt().ok_or_else(another)?),
            Layout::Binary => Self::Binary(array.as_bytes_opt().ok_or_else(another)?),
            Layout::Other(converter) => {
                Self::Other(converter.convert_columns(std::slice::from_ref(array))?, array.logical_nulls())
            }
        })
    }

    fn is_fixed(&self) -> bool {
        matches!(self, Self::Fixed(..) | Self::Boolean(_))
    }

    /// Its bytes in every row.
    fn width(&self) -> usize {
        match self {
            Self::Fixed(width, _) => width + 1,
            Self::Boolean(_) => 2,
            Self::Text(_) | Self::Binary(_) | Self::Other(..) => HEAD,
        }
    }

    /// Adds its other bytes to the length of each row.
    fn lengths(&self, lengths: &mut [usize]) {
        match self {
            Self::Fixed(..) | Self::Boolean(_) => {}
            Self::Text(array) => lengths_of(array, lengths),
            Self::Binary(array) => lengths_of(array, lengths),
            Self::Other(rows, nulls) => {
                for (row, (length, value)) in lengths.iter_mut().zip(rows).enumerate() {
                    *length += if is_valid(nulls.as_ref(), row) { value.as_ref().len() } else { 0 };
                }
            }
        }
    }

    /// Writes its values, each `at` bytes behind its row's place; places move behind what has no fixed width.
    fn put(&self, bytes: &mut [u8], places: &mut [usize], at: usize) {
        match self {
            Self::Fixed(1, data) => put_fixed::<1>(bytes, places, at, data),
            Self::Fixed(2, data) => put_fixed::<2>(bytes, places, at, data),
            Self::Fixed(4, data) => put_fixed::<4>(bytes, places, at, data),
            Self::Fixed(8, data) => put_fixed::<8>(bytes, places, at, data),
            Self::Fixed(16, data) => put_fixed::<16>(bytes, places, at, data),
            // No type is wider than a decimal of 256 bits.
            Self::Fixed(_, data) => put_fixed::<32>(bytes, places, at, data),
            Self::Boolean(array) => {
                for (row, place) in places.iter().enumerate() {
                    let value = array.is_valid(row) && array.value(row);
                    write(bytes, place + at, &[u8::from(array.is_valid(row)), u8::from(value)]);
                }
            }
            Self::Text(array) => put_bytes(bytes, places, array),
            Self::Binary(array) => put_bytes(bytes, places, array),
            Self::Other(rows, nulls) => {
                for (row, (place, value)) in places.iter_mut().zip(rows).enumerate() {
                    let value = is_valid(nulls.as_ref(), row).then_some(value.as_ref());
                    put_value(bytes, place, value);
                }
            }
        }
    }
}

fn is_valid(nulls: Option<&NullBuffer>, row: usize) -> bool {
    nulls.is_none_or(|nulls| nulls.is_valid(row))
}

fn write(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}

fn lengths_of<T: ByteArrayType<Offset = i32>>(array: &GenericByteArray<T>, lengths: &mut [usize]) {
    let found = array.offsets().lengths();
    match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => lengths.iter_mut().zip(found).for_each(|(length, value)| *length += value),
        // What a null hides is not part of the row.
        Some(nulls) => {
            for ((length, value), is_valid) in lengths.iter_mut().zip(found).zip(nulls) {
                *length += if is_valid { value } else { 0 };
            }
        }
    }
}

fn put_fixed<const N: usize>(bytes: &mut [u8], places: &[usize], at: usize, data: &arrow::array::ArrayData) {
    let values = data.buffers().first().and_then(|buffer| buffer.as_slice().get(data.offset() * N..));
    let values = values.unwrap_or_default().chunks_exact(N);
    match data.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => {
            for (place, value) in places.iter().zip(values) {
                if let Some([is_valid, cell @ ..]) = bytes.get_mut(place + at..place + at + N + 1) {
                    *is_valid = 1;
                    cell.copy_from_slice(value);
                }
            }
        }
        Some(nulls) => {
            for ((place, value), valid) in places.iter().zip(values).zip(nulls) {
                if let Some([is_valid, cell @ ..]) = bytes.get_mut(place + at..place + at + N + 1) {
                    *is_valid = u8::from(valid);
                    cell.copy_from_slice(if valid { value } else { &[0; N] });
                }
            }
        }
    }
}

fn put_bytes<T: ByteArrayType<Offset = i32>>(
    bytes: &mut [u8],
    places: &mut [usize],
    array: &GenericByteArray<T>,
) where
    T::Native: AsRef<[u8]>,
{
    for (place, value) in places.iter_mut().zip(array) {
        put_value(bytes, place, value.map(AsRef::as_ref));
    }
}

#[inline]
fn put_value(bytes: &mut [u8], place: &mut usize, value: Option<&[u8]>) {
    let length = value.map_or(0, <[u8]>::len);
    if let Some(cell) = bytes.get_mut(*place..*place + HEAD + length)
        && let Some((head, tail)) = cell.split_first_chunk_mut::<HEAD>()
    {
        // Arrow's texts have at most two billion bytes.
        let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        *head = [u8::from(value.is_some()), a, b, c, d];
        tail.copy_from_slice(value.unwrap_or_default());
    }
    *place += HEAD + length;
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
        let bytes = [&[1_u8][..], &[5; 1], &[0; 15], &[1, 2, 0, 0, 0], b"ab"].concat();
        let expected = format!("xxh3-128-sum:1:{:032x}", XxHash3_128::oneshot(&bytes));
        assert_eq!(hash(&[batch(&[("ab", 5)])]), expected);
        assert_eq!(expected, "xxh3-128-sum:1:703e4ca4cb72c8c5cc2a1b93330ced16");
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
