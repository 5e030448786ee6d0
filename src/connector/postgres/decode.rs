//! From the frames of a binary COPY to Arrow, one match for a column of a frame.
//!
//! A [`Column`] takes a value in the form that its [`Wire`] says, exactly or not at all: what does not fit is a [`Misfit`], and the
//! column is as it was; of several values, as far as they fitted, and the caller takes them back. Text is checked once a batch. Nothing here believes a length that the frame does not have.

use std::{net::Ipv6Addr, sync::Arc};

use arrow::{
    array::{
        ArrayRef, BinaryArray, BooleanArray, BooleanBufferBuilder, Date32Array, Decimal128Array,
        Decimal256Array, Float32Array, Float64Array, Int16Array, Int32Array, Int64Array,
        IntervalMonthDayNanoArray, ListArray, NullBufferBuilder, StringArray, StructArray,
        Time64MicrosecondArray, TimestampMicrosecondArray, UInt32Array, UInt64Array,
    },
    buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer},
    datatypes::{DataType, Field, Fields, IntervalMonthDayNano, i256},
};
use chrono::DateTime;

use super::types::{Attribute, Wire, range_fields, timetz_fields};
use crate::{
    connector::columns::{ColumnBuilder, Misfit, POWERS, in_zone},
    error::{Error, Result},
    runtime::BATCH_BYTES,
};

/// Days from 1970 to PostgreSQL's own zero, 2000-01-01.
pub(super) const EPOCH_DAYS: i32 = 10_957;
/// The same in microseconds.
pub(super) const EPOCH_MICROS: i64 = 946_684_800_000_000;
const DAY_MICROS: i64 = 86_400_000_000;

fn misfit<T>(why: &str) -> Result<T, Misfit> {
    Err(Misfit(why.to_owned()))
}

/// The server sent fewer bytes than it announced, or more.
fn torn() -> Misfit {
    Misfit("came in a form that this floodmark does not know".to_owned())
}

/// Bytes that are taken off from the front.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn i16(&mut self) -> Option<i16> {
        self.array().map(i16::from_be_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_be_bytes)
    }

    fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_be_bytes)
    }

    /// A value with its length in front; `Some(None)` is null.
    pub(super) fn value(&mut self) -> Option<Option<&'a [u8]>> {
        match self.i32()? {
            -1 => Some(None),
            length => self.take(usize::try_from(length).ok()?).map(Some),
        }
    }
}

/// One number, whole.
fn fixed<const N: usize>(value: &[u8]) -> Result<[u8; N], Misfit> {
    value.try_into().map_err(|_| torn())
}

/// Reads numbers of so many bytes.
fn number<const N: usize, T>(from: impl Fn([u8; N]) -> T) -> impl Fn(&[u8]) -> Result<T, Misfit> {
    move |value| fixed(value).map(&from)
}

/// Appends each value by `push`, and which of them are none.
fn each<'v>(
    valid: &mut NullBufferBuilder,
    values: impl Iterator<Item = Option<&'v [u8]>>,
    mut push: impl FnMut(Option<&[u8]>) -> Result<(), Misfit>,
) -> Result<(), Misfit> {
    let mut run = 0;
    for value in values {
        push(value)?;
        if value.is_some() {
            run += 1;
        } else {
            valid.append_n_non_nulls(std::mem::take(&mut run));
            valid.append_null();
        }
    }
    valid.append_n_non_nulls(run);
    Ok(())
}

/// Appends what `read` makes of each value, and a zero for each null.
fn numbers<'v, T: Default>(
    into: &mut Vec<T>,
    valid: &mut NullBufferBuilder,
    values: impl Iterator<Item = Option<&'v [u8]>>,
    read: impl Fn(&[u8]) -> Result<T, Misfit>,
) -> Result<(), Misfit> {
    each(valid, values, |value| {
        into.push(value.map(&read).transpose()?.unwrap_or_default());
        Ok(())
    })
}

/// The offsets of a column count to 2 GiB.
fn fits(values: &[u8]) -> Result<(), Misfit> {
    i32::try_from(values.len()).map(drop).map_err(|_| Misfit("makes a batch of more than 2 GiB".to_owned()))
}

/// Values under construction.
enum Data {
    Bool(BooleanBufferBuilder),
    I16(Vec<i16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    I128(Vec<i128>),
    I256(Vec<i256>),
    Bytes {
        offsets: Vec<i32>,
        values: Vec<u8>,
    },
    Interval(Vec<IntervalMonthDayNano>),
    List {
        offsets: Vec<i32>,
        items: Box<Column>,
    },
    Struct(Vec<Column>),
    /// Text from the server that our own rules read.
    Parsed(Box<ColumnBuilder>),
}

/// One column under construction.
pub(super) struct Column {
    wire: Wire,
    data: Data,
    valid: NullBufferBuilder,
}

impl Column {
    /// An empty column of values that come as `wire`.
    pub(super) fn new(wire: Wire, rows: usize) -> Self {
        let bound = |attribute: &Attribute| Self::new(attribute.wire.clone(), rows);
        let range = |of: &Attribute| {
            let flag = || Self::new(Wire::Bool, rows);
            Data::Struct(vec![bound(of), bound(of), flag(), flag(), flag()])
        };
        let list = |items: Self| {
            let mut offsets = Vec::with_capacity(rows + 1);
            offsets.push(0);
            Data::List { offsets, items: Box::new(items) }
        };
        let data = match &wire {
            Wire::Bool => Data::Bool(BooleanBufferBuilder::new(rows)),
            Wire::Int2 => Data::I16(Vec::with_capacity(rows)),
            Wire::Int4 | Wire::Date => Data::I32(Vec::with_capacity(rows)),
            Wire::Int8 | Wire::Time | Wire::Timestamp | Wire::TimestampTz | Wire::TimestampIn(_) => {
                Data::I64(Vec::with_capacity(rows))
            }
            Wire::UInt4 => Data::U32(Vec::with_capacity(rows)),
            Wire::UInt8 => Data::U64(Vec::with_capacity(rows)),
            Wire::Float4 => Data::F32(Vec::with_capacity(rows)),
            Wire::Float8 => Data::F64(Vec::with_capacity(rows)),
            Wire::Decimal { .. } | Wire::Money { .. } => Data::I128(Vec::with_capacity(rows)),
            Wire::Decimal256 { .. } => Data::I256(Vec::with_capacity(rows)),
            Wire::NumericText
            | Wire::Text
            | Wire::Jsonb
            | Wire::Bytea
            | Wire::Uuid
            | Wire::Inet
            | Wire::MacAddr
            | Wire::Bits => {
                let mut offsets = Vec::with_capacity(rows + 1);
                offsets.push(0);
                Data::Bytes { offsets, values: Vec::with_capacity(rows * 12) }
            }
            Wire::Interval => Data::Interval(Vec::with_capacity(rows)),
            Wire::TimeTz => Data::Struct(vec![Self::new(Wire::Time, rows), Self::new(Wire::Int4, rows)]),
            Wire::List(element) => list(bound(element)),
            Wire::Struct(attributes) => Data::Struct(attributes.iter().map(bound).collect()),
            Wire::Range(of) => range(of),
            Wire::Multirange(of) => list(Self::new(Wire::Range(of.clone()), rows)),
        };
        Self { wire, data, valid: NullBufferBuilder::new(rows) }
    }

    /// An empty column of text that `builder` reads.
    pub(super) fn parsed(builder: ColumnBuilder) -> Self {
        Self { wire: Wire::Text, data: Data::Parsed(Box::new(builder)), valid: NullBufferBuilder::new(0) }
    }

    /// Whether values can be taken back.
    pub(super) fn takes_blocks(&self) -> bool {
        !matches!(self.data, Data::Parsed(_))
    }

    fn len(&self) -> usize {
        self.valid.len()
    }

    /// Appends a value, or null.
    ///
    /// # Errors
    ///
    /// A [`Misfit`], and nothing is appended.
    pub(super) fn append(&mut self, value: Option<&[u8]>) -> Result<(), Misfit> {
        let length = self.len();
        self.append_all(std::iter::once(value)).inspect_err(|_| self.truncate(length)).map(drop)
    }

    /// Appends values and nulls; how many bytes they are.
    ///
    /// # Errors
    ///
    /// The first [`Misfit`]: what stood before it is appended, and [`Self::truncate`] takes it back.
    pub(super) fn append_all<'v>(
        &mut self,
        values: impl Iterator<Item = Option<&'v [u8]>>,
    ) -> Result<usize, Misfit> {
        let mut bytes = 0;
        let values = values.inspect(|value| bytes += value.map_or(0, <[u8]>::len));
        let valid = &mut self.valid;
        match (&self.wire, &mut self.data) {
            (Wire::Int2, Data::I16(into)) => numbers(into, valid, values, number(i16::from_be_bytes))?,
            (Wire::Int4, Data::I32(into)) => numbers(into, valid, values, number(i32::from_be_bytes))?,
            (Wire::Int8, Data::I64(into)) => numbers(into, valid, values, number(i64::from_be_bytes))?,
            (Wire::UInt4, Data::U32(into)) => numbers(into, valid, values, number(u32::from_be_bytes))?,
            (Wire::UInt8, Data::U64(into)) => numbers(into, valid, values, number(u64::from_be_bytes))?,
            (Wire::Float4, Data::F32(into)) => numbers(into, valid, values, number(f32::from_be_bytes))?,
            (Wire::Float8, Data::F64(into)) => numbers(into, valid, values, number(f64::from_be_bytes))?,
            (Wire::Money { .. }, Data::I128(into)) => {
                numbers(into, valid, values, number(|cents| i64::from_be_bytes(cents).into()))?;
            }
            (Wire::Decimal { precision, scale }, Data::I128(into)) => {
                numbers(into, valid, values, |of| decimal(of, *precision, *scale))?;
            }
            (Wire::Decimal256 { precision, scale }, Data::I256(into)) => {
                numbers(into, valid, values, |of| Numeric::read(of)?.decimal256(*precision, *scale))?;
            }
            (Wire::Date, Data::I32(into)) => numbers(into, valid, values, date)?,
            (Wire::Time, Data::I64(into)) => numbers(into, valid, values, time)?,
            (Wire::Timestamp | Wire::TimestampTz, Data::I64(into)) => {
                numbers(into, valid, values, timestamp)?;
            }
            (Wire::TimestampIn(zone), Data::I64(into)) => {
                numbers(into, valid, values, |of| {
                    let local = DateTime::from_timestamp_micros(timestamp(of)?)
                        .ok_or_else(|| Misfit("is too far away for a time zone".to_owned()))?;
                    in_zone(&local.naive_utc(), *zone)
                })?;
            }
            (Wire::Interval, Data::Interval(into)) => numbers(into, valid, values, interval)?,
            (Wire::Text | Wire::Bytea, Data::Bytes { offsets, values: into }) => {
                each(valid, values, |value| {
                    into.extend_from_slice(value.unwrap_or_default());
                    offsets.push(end(into.len()));
                    Ok(())
                })?;
                fits(into)?;
            }
            _ => {
                for value in values {
                    match value {
                        Some(of) => self.push(of)?,
                        None => self.push_null()?,
                    }
                    self.valid.append(value.is_some());
                }
            }
        }
        Ok(bytes)
    }

    /// Appends a null of a kind that is more than a number.
    fn push_null(&mut self) -> Result<(), Misfit> {
        match &mut self.data {
            Data::Bool(into) => into.append(false),
            Data::Bytes { offsets, values } => offsets.push(end(values.len())),
            Data::List { offsets, items } => offsets.push(end(items.len())),
            Data::Struct(parts) => parts.iter_mut().try_for_each(|part| part.append(None))?,
            Data::Parsed(builder) => builder.null(),
            _ => return Err(torn()),
        }
        Ok(())
    }

    /// Appends a value of a kind that is more than a number.
    fn push(&mut self, value: &[u8]) -> Result<(), Misfit> {
        match (&self.wire, &mut self.data) {
            (_, Data::Parsed(builder)) => builder.text(text(value)?)?,
            (Wire::Bool, Data::Bool(into)) => into.append(fixed::<1>(value)? != [0]),
            (Wire::TimeTz, Data::Struct(parts)) => {
                let mut bytes = Bytes(value);
                let (clock, west) = (bytes.take(8).ok_or_else(torn)?, bytes.i32().ok_or_else(torn)?);
                // The wire counts seconds west of Greenwich, everybody else east.
                let east = west.checked_neg().ok_or_else(torn)?.to_be_bytes();
                for (part, value) in parts.iter_mut().zip([clock, &east]) {
                    part.append(Some(value))?;
                }
            }
            (Wire::List(_), Data::List { offsets, items }) => {
                list(value, items)?;
                offsets.push(end(items.len()));
            }
            (Wire::Multirange(_), Data::List { offsets, items }) => {
                let mut bytes = Bytes(value);
                for _ in 0..bytes.i32().ok_or_else(torn)? {
                    items.append(bytes.value().ok_or_else(torn)?)?;
                }
                offsets.push(end(items.len()));
            }
            (Wire::Struct(_), Data::Struct(parts)) => {
                let mut bytes = Bytes(value);
                if bytes.i32().and_then(|count| usize::try_from(count).ok()) != Some(parts.len()) {
                    return misfit("has other attributes than its type had when the run began");
                }
                for part in parts {
                    bytes.i32().ok_or_else(torn)?;
                    part.append(bytes.value().ok_or_else(torn)?)?;
                }
            }
            (Wire::Range(_), Data::Struct(parts)) => range(value, parts)?,
            (wire, Data::Bytes { offsets, values }) => {
                match (wire, value) {
                    (Wire::Jsonb, [1, json @ ..]) => values.extend_from_slice(json),
                    (Wire::Jsonb, _) => return Err(torn()),
                    _ => values.extend_from_slice(shown(wire, value)?.as_bytes()),
                }
                fits(values)?;
                offsets.push(end(values.len()));
            }
            _ => return Err(torn()),
        }
        Ok(())
    }

    /// Takes back what stands behind `length` values.
    pub(super) fn truncate(&mut self, length: usize) {
        self.valid.truncate(length);
        match &mut self.data {
            Data::Bool(values) => values.truncate(length),
            Data::I16(values) => values.truncate(length),
            Data::I32(values) => values.truncate(length),
            Data::I64(values) => values.truncate(length),
            Data::U32(values) => values.truncate(length),
            Data::U64(values) => values.truncate(length),
            Data::F32(values) => values.truncate(length),
            Data::F64(values) => values.truncate(length),
            Data::I128(values) => values.truncate(length),
            Data::I256(values) => values.truncate(length),
            Data::Interval(values) => values.truncate(length),
            Data::Bytes { offsets, values } => {
                offsets.truncate(length + 1);
                values.truncate(last(offsets));
            }
            Data::List { offsets, items } => {
                offsets.truncate(length + 1);
                items.truncate(last(offsets));
            }
            Data::Struct(parts) => parts.iter_mut().for_each(|part| part.truncate(length)),
            // It appends nothing on a misfit, is never part of another column, and takes values one by one.
            Data::Parsed(_) => {}
        }
    }

    /// The column, and an empty one for the next batch.
    ///
    /// # Errors
    ///
    /// If text is not UTF-8.
    pub(super) fn finish(&mut self) -> Result<ArrayRef> {
        let valid = self.valid.finish();
        Ok(match &mut self.data {
            Data::Parsed(builder) => builder.finish(),
            Data::Bool(values) => Arc::new(BooleanArray::new(values.finish(), valid)),
            Data::I16(values) => Arc::new(Int16Array::new(take(values), valid)),
            Data::I32(values) if self.wire == Wire::Date => Arc::new(Date32Array::new(take(values), valid)),
            Data::I32(values) => Arc::new(Int32Array::new(take(values), valid)),
            Data::I64(values) => match self.wire {
                Wire::Time => Arc::new(Time64MicrosecondArray::new(take(values), valid)),
                Wire::Int8 => Arc::new(Int64Array::new(take(values), valid)),
                _ => Arc::new(
                    TimestampMicrosecondArray::new(take(values), valid).with_data_type(self.wire.arrow()),
                ),
            },
            Data::U32(values) => Arc::new(UInt32Array::new(take(values), valid)),
            Data::U64(values) => Arc::new(UInt64Array::new(take(values), valid)),
            Data::F32(values) => Arc::new(Float32Array::new(take(values), valid)),
            Data::F64(values) => Arc::new(Float64Array::new(take(values), valid)),
            Data::I128(values) => {
                Arc::new(Decimal128Array::new(take(values), valid).with_data_type(self.wire.arrow()))
            }
            Data::I256(values) => {
                Arc::new(Decimal256Array::new(take(values), valid).with_data_type(self.wire.arrow()))
            }
            Data::Interval(values) => Arc::new(IntervalMonthDayNanoArray::new(take(values), valid)),
            Data::Bytes { offsets, values } => {
                let (offsets, values) = (ends(offsets), Buffer::from_vec(emptied(values, values.len() / 16)));
                if self.wire == Wire::Bytea {
                    Arc::new(BinaryArray::try_new(offsets, values, valid)?)
                } else {
                    let texts = StringArray::try_new(offsets, values, valid);
                    Arc::new(texts.map_err(|_| Error::data("the server sent text that is not UTF-8"))?)
                }
            }
            Data::List { offsets, items } => {
                let (offsets, items) = (ends(offsets), items.finish()?);
                let DataType::List(field) = self.wire.arrow() else {
                    return Err(Error::bug("a list that is none"));
                };
                Arc::new(ListArray::try_new(field, offsets, items, valid)?)
            }
            Data::Struct(parts) => {
                let parts = parts.iter_mut().map(Self::finish).collect::<Result<Vec<_>>>()?;
                Arc::new(structure(&self.wire, parts, valid)?)
            }
        })
    }
}

fn structure(wire: &Wire, parts: Vec<ArrayRef>, valid: Option<NullBuffer>) -> Result<StructArray> {
    let fields = match wire {
        Wire::TimeTz => timetz_fields(),
        Wire::Range(bound) => range_fields(bound),
        Wire::Struct(attributes) => attributes.iter().map(Attribute::field).collect::<Fields>(),
        _ => return Err(Error::bug("a structure that is none")),
    };
    Ok(StructArray::try_new(fields, parts, valid)?)
}

fn take<T: arrow::datatypes::ArrowNativeType>(values: &mut Vec<T>) -> ScalarBuffer<T> {
    emptied(values, 0).into()
}

/// The values so far; there is room for the next ones, which are about as many, or so many more. But one batch of long values makes no room for others.
fn emptied<T>(values: &mut Vec<T>, more: usize) -> Vec<T> {
    let next = Vec::with_capacity((values.len() + more).min(BATCH_BYTES / size_of::<T>().max(1)));
    std::mem::replace(values, next)
}

/// The offsets so far; the next begin at zero.
fn ends(offsets: &mut Vec<i32>) -> OffsetBuffer<i32> {
    let ends = emptied(offsets, 0);
    offsets.push(0);
    OffsetBuffer::new(ends.into())
}

fn end(length: usize) -> i32 {
    // Checked where bytes are appended; items are fewer than the frame has bytes.
    i32::try_from(length).unwrap_or(i32::MAX)
}

fn last(offsets: &[i32]) -> usize {
    offsets.last().and_then(|end| usize::try_from(*end).ok()).unwrap_or_default()
}

fn text(value: &[u8]) -> Result<&str, Misfit> {
    std::str::from_utf8(value).map_err(|_| Misfit("is text that is not UTF-8".to_owned()))
}

fn date(value: &[u8]) -> Result<i32, Misfit> {
    match i32::from_be_bytes(fixed(value)?) {
        i32::MAX | i32::MIN => misfit("is infinity, and no day"),
        days => days.checked_add(EPOCH_DAYS).ok_or_else(|| Misfit("is too far away".to_owned())),
    }
}

fn time(value: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(fixed(value)?) {
        DAY_MICROS => misfit("is 24:00:00, which no other system knows"),
        micros => Ok(micros),
    }
}

fn timestamp(value: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(fixed(value)?) {
        i64::MAX | i64::MIN => misfit("is infinity, and no point in time"),
        micros => micros
            .checked_add(EPOCH_MICROS)
            .ok_or_else(|| Misfit("is later than 64 bits of microseconds since 1970 can say".to_owned())),
    }
}

fn interval(value: &[u8]) -> Result<IntervalMonthDayNano, Misfit> {
    let mut bytes = Bytes(value);
    let parts = (bytes.i64(), bytes.i32(), bytes.i32());
    let (Some(micros), Some(days), Some(months)) = parts else { return Err(torn()) };
    if (micros, days, months) == (i64::MAX, i32::MAX, i32::MAX)
        || (micros, days, months) == (i64::MIN, i32::MIN, i32::MIN)
    {
        return misfit("is infinity, and no length of time");
    }
    let nanos = micros.checked_mul(1000).ok_or_else(|| {
        Misfit("has hours for more than 292 years, which nanoseconds cannot say".to_owned())
    })?;
    Ok(IntervalMonthDayNano::new(months, days, nanos))
}

fn list(value: &[u8], items: &mut Column) -> Result<(), Misfit> {
    let mut bytes = Bytes(value);
    let (Some(dimensions), Some(_), Some(_)) = (bytes.i32(), bytes.i32(), bytes.i32()) else {
        return Err(torn());
    };
    match dimensions {
        0 => Ok(()),
        1 => {
            let (Some(count), Some(first)) = (bytes.i32(), bytes.i32()) else { return Err(torn()) };
            if first != 1 {
                return misfit("is an array that does not begin at 1; declare the column `string`");
            }
            for _ in 0..count {
                items.append(bytes.value().ok_or_else(torn)?)?;
            }
            Ok(())
        }
        _ => misfit("is an array of several dimensions; declare the column `string`"),
    }
}

fn range(value: &[u8], parts: &mut [Column]) -> Result<(), Misfit> {
    let mut bytes = Bytes(value);
    let [flags] = bytes.array().ok_or_else(torn)?;
    let is = |bit: u8| flags & bit != 0;
    let mut bound = |infinite: bool| match infinite || is(1) {
        true => Ok(None),
        false => bytes.value().flatten().map(Some).ok_or_else(torn),
    };
    let (lower, upper) = (bound(is(8))?, bound(is(16))?);
    let flag = |set: bool| if set { [1_u8] } else { [0] };
    let flags = [flag(is(2)), flag(is(4)), flag(is(1))];
    let values = [lower, upper].into_iter().chain(flags.iter().map(|flag| Some(flag.as_slice())));
    parts.iter_mut().zip(values).try_for_each(|(part, value)| part.append(value))
}

/// What most numbers are: at most four groups of four digits, which the column holds as they are. `None` of everything else, which
/// [`Numeric`] reads.
fn short_numeric(value: &[u8], precision: u8, scale: i8) -> Option<i64> {
    let mut bytes = Bytes(value);
    let (count, weight, sign, _) = (bytes.i16()?, bytes.i16()?, bytes.u16()?, bytes.i16()?);
    if !(0..=4).contains(&count) || bytes.0.len() != 2 * usize::try_from(count).ok()? || sign & !0x4000 != 0 {
        return None;
    }
    let mut short = 0_u64;
    while let Some(group) = bytes.u16() {
        short = (group < 10_000).then(|| short * 10_000 + u64::from(group))?;
    }
    // By how many digits the last group's end is away from where the column ends.
    let shift = i32::from(scale) + 4 * (i32::from(weight) - i32::from(count) + 1);
    let power = *POWERS.get(usize::try_from(shift.unsigned_abs()).ok()?)?;
    let short = match shift < 0 {
        false => short.checked_mul(power)?,
        true => short.is_multiple_of(power).then(|| short / power)?,
    };
    let limit = POWERS.get(usize::from(precision)).or(POWERS.last())?;
    let short = i64::try_from((short < *limit).then_some(short)?).ok()?;
    Some(if sign == 0 { short } else { -short })
}

#[inline]
fn decimal(value: &[u8], precision: u8, scale: i8) -> Result<i128, Misfit> {
    match short_numeric(value, precision, scale) {
        Some(short) => Ok(short.into()),
        None => Numeric::read(value)?.decimal(precision, scale),
    }
}

/// A number as the wire has it.
struct Numeric<'a> {
    /// Groups of four digits.
    groups: &'a [u8],
    /// The power of 10000 of the first group.
    weight: i32,
    sign: u16,
    /// How many decimals are shown.
    shown: usize,
}

impl<'a> Numeric<'a> {
    fn read(value: &'a [u8]) -> Result<Self, Misfit> {
        let mut bytes = Bytes(value);
        let parts = (bytes.u16(), bytes.i16(), bytes.u16(), bytes.u16());
        let (Some(count), Some(weight), Some(sign), Some(shown)) = parts else { return Err(torn()) };
        if bytes.0.len() != usize::from(count) * 2 {
            return Err(torn());
        }
        Ok(Self { groups: bytes.0, weight: weight.into(), sign, shown: shown.into() })
    }

    fn digits(&self) -> impl DoubleEndedIterator<Item = u16> + ExactSizeIterator + '_ {
        self.groups.chunks_exact(2).map(|pair| match pair {
            [high, low] => u16::from_be_bytes([*high, *low]),
            _ => 0,
        })
    }

    fn finite(&self) -> Result<(), Misfit> {
        match self.sign {
            0x0000 | 0x4000 => Ok(()),
            0xC000 => misfit("is NaN, and no number"),
            0xD000 | 0xF000 => misfit("is infinity, and no number"),
            _ => Err(torn()),
        }
    }

    /// The value without its sign in units of the last of `scale` decimals, by steps of `value * factor + digits`; `None` if a step
    /// has no room.
    fn scaled<T>(
        &self,
        scale: i8,
        zero: T,
        step: impl Fn(T, u16, u16) -> Option<T>,
    ) -> Result<Option<T>, Misfit> {
        self.finite()?;
        let mut value = Some(zero);
        // The power of ten of the unit of each group.
        let mut power = self.weight * 4 + i32::from(scale);
        for group in self.digits() {
            let behind = 10_u16.pow(power.clamp(-4, 0).unsigned_abs());
            if group % behind != 0 {
                return Err(Misfit(format!("has more than {scale} decimal places")));
            }
            value = value.and_then(|value| step(value, 10_000 / behind, group / behind));
            power -= 4;
        }
        // Groups of zeros that the wire leaves out.
        let left_out = if self.groups.is_empty() { 0 } else { power + 4 };
        for _ in 0..left_out {
            value = value.and_then(|value| step(value, 10, 0));
        }
        Ok(value)
    }

    fn decimal(&self, precision: u8, scale: i8) -> Result<i128, Misfit> {
        let value = self.scaled(scale, 0_i128, |value, factor, digits| {
            value.checked_mul(factor.into())?.checked_add(digits.into())
        })?;
        match (value, 10_i128.checked_pow(precision.into())) {
            (Some(value), Some(limit)) if value < limit => Ok(if self.sign == 0 { value } else { -value }),
            _ => Err(Misfit(format!("has more than {precision} digits"))),
        }
    }

    fn decimal256(&self, precision: u8, scale: i8) -> Result<i256, Misfit> {
        let wide = |value: u16| i256::from_i128(value.into());
        let value = self.scaled(scale, i256::ZERO, |value, factor, digits| {
            value.checked_mul(wide(factor))?.checked_add(wide(digits))
        })?;
        match (value, wide(10).checked_pow(precision.into())) {
            (Some(value), Some(limit)) if value < limit => {
                Ok(if self.sign == 0 { value } else { value.wrapping_neg() })
            }
            _ => Err(Misfit(format!("has more than {precision} digits"))),
        }
    }

    /// The exact text, as the server would write it.
    fn text(&self) -> Result<String, Misfit> {
        match self.sign {
            0xC000 => return Ok("NaN".to_owned()),
            0xD000 => return Ok("Infinity".to_owned()),
            0xF000 => return Ok("-Infinity".to_owned()),
            _ => self.finite()?,
        }
        let groups: Vec<u16> = self.digits().collect();
        let group = |power: i32| {
            let index = usize::try_from(self.weight - power).ok();
            index.and_then(|index| groups.get(index)).copied().unwrap_or_default()
        };
        let mut text = String::new();
        if self.sign == 0x4000 {
            text.push('-');
        }
        if self.weight < 0 {
            text.push('0');
        } else {
            text.push_str(&group(self.weight).to_string());
            for power in (0..self.weight).rev() {
                text.push_str(&format!("{:04}", group(power)));
            }
        }
        if self.shown > 0 {
            let mut fraction = String::new();
            let mut power = -1;
            while fraction.len() < self.shown {
                fraction.push_str(&format!("{:04}", group(power)));
                power -= 1;
            }
            fraction.truncate(self.shown);
            text.push('.');
            text.push_str(&fraction);
        }
        Ok(text)
    }
}

/// A value as text: for types that we keep as text, and for rows that are set aside.
pub(super) fn shown(wire: &Wire, value: &[u8]) -> Result<String, Misfit> {
    Ok(match wire {
        Wire::NumericText | Wire::Decimal { .. } | Wire::Decimal256 { .. } => Numeric::read(value)?.text()?,
        Wire::Uuid => uuid::Uuid::from_bytes(fixed(value)?).to_string(),
        Wire::Inet => inet(value)?,
        Wire::MacAddr => {
            let pairs: Vec<String> = value.iter().map(|byte| format!("{byte:02x}")).collect();
            pairs.join(":")
        }
        Wire::Bits => {
            let mut bytes = Bytes(value);
            let count = bytes.i32().and_then(|count| usize::try_from(count).ok()).ok_or_else(torn)?;
            if bytes.0.len() != count.div_ceil(8) {
                return Err(torn());
            }
            let bits = bytes.0.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1));
            bits.take(count).map(|bit| if bit == 1 { '1' } else { '0' }).collect()
        }
        Wire::Text => text(value)?.to_owned(),
        Wire::Jsonb => text(value.get(1..).unwrap_or_default())?.to_owned(),
        Wire::Bool => (value != [0]).to_string(),
        Wire::Int2 => i16::from_be_bytes(fixed(value)?).to_string(),
        Wire::Int4 => i32::from_be_bytes(fixed(value)?).to_string(),
        Wire::Int8 => i64::from_be_bytes(fixed(value)?).to_string(),
        Wire::UInt4 => u32::from_be_bytes(fixed(value)?).to_string(),
        Wire::UInt8 => u64::from_be_bytes(fixed(value)?).to_string(),
        Wire::Float4 => f32::from_be_bytes(fixed(value)?).to_string(),
        Wire::Float8 => f64::from_be_bytes(fixed(value)?).to_string(),
        Wire::Date => match i32::from_be_bytes(fixed(value)?) {
            i32::MAX => "infinity".to_owned(),
            i32::MIN => "-infinity".to_owned(),
            _ => in_column(wire, value)?,
        },
        Wire::Timestamp | Wire::TimestampTz | Wire::TimestampIn(_) => {
            match i64::from_be_bytes(fixed(value)?) {
                i64::MAX => "infinity".to_owned(),
                i64::MIN => "-infinity".to_owned(),
                _ => in_column(wire, value)?,
            }
        }
        Wire::Bytea => hex::encode(value),
        _ => in_column(wire, value).unwrap_or_else(|_| hex::encode(value)),
    })
}

/// A value as Arrow shows it.
fn in_column(wire: &Wire, value: &[u8]) -> Result<String, Misfit> {
    let mut column = Column::new(wire.clone(), 1);
    column.append(Some(value))?;
    let array = column.finish().map_err(|_| torn())?;
    let options = arrow::util::display::FormatOptions::default();
    arrow::util::display::ArrayFormatter::try_new(array.as_ref(), &options)
        .map(|formatter| formatter.value(0).to_string())
        .map_err(|_| torn())
}

fn inet(value: &[u8]) -> Result<String, Misfit> {
    let mut bytes = Bytes(value);
    let [family, bits, is_cidr, _] = bytes.array().ok_or_else(torn)?;
    let (address, all) = match family {
        2 => (std::net::Ipv4Addr::from(fixed::<4>(bytes.0)?).to_string(), 32),
        3 => (Ipv6Addr::from(fixed::<16>(bytes.0)?).to_string(), 128),
        _ => return Err(torn()),
    };
    Ok(if bits == all && is_cidr == 0 { address } else { format!("{address}/{bits}") })
}

/// The field of a column named `name` that comes as `wire`.
pub(super) fn field(name: &str, wire: &Wire, type_name: Option<&String>) -> Field {
    Attribute { name: name.to_owned(), wire: wire.clone(), type_name: type_name.cloned() }.field()
}

#[cfg(test)]
mod unit {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_short_number_is_read_as_a_long_one(
            groups in prop::collection::vec(0_u16..10_001, 0..6), weight in -4_i16..5, sign in prop::sample::select(vec![0_u16, 0x4000, 0xC000]),
            precision in 1_u8..=38, scale in 0_i8..12,
        ) {
            let bytes = wire(&groups, weight, sign, 4);
            if let Some(short) = short_numeric(&bytes, precision, scale) {
                prop_assert_eq!(Numeric::read(&bytes).and_then(|number| number.decimal(precision, scale)), Ok(short.into()));
            }
        }
    }

    /// A number as the wire has it.
    fn wire(groups: &[u16], weight: i16, sign: u16, shown: u16) -> Vec<u8> {
        let count = u16::try_from(groups.len()).unwrap();
        let mut bytes = Vec::new();
        for part in [count, weight.cast_unsigned(), sign, shown].iter().chain(groups) {
            bytes.extend(part.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn a_number_becomes_its_decimal_or_says_why_not() {
        for (groups, weight, sign, shown, precision, scale, expected) in [
            (&[1, 2345][..], 1, 0, 0, 18, 2, Ok(1_234_500)),
            (&[1, 2345, 6700], 1, 0x4000, 2, 18, 2, Ok(-1_234_567)),
            (&[], 0, 0, 2, 18, 2, Ok(0)),
            (&[5000], -1, 0, 1, 18, 2, Ok(50)),
            (&[5], -1, 0, 4, 18, 2, Err("has more than 2 decimal places")),
            (&[1], 4, 0, 0, 18, 2, Err("has more than 18 digits")),
            (&[1], 30, 0, 0, 38, 0, Err("has more than 38 digits")),
            (&[], 0, 0xC000, 0, 18, 2, Err("is NaN, and no number")),
            (&[], 0, 0xF000, 0, 18, 2, Err("is infinity, and no number")),
        ] {
            let bytes = wire(groups, weight, sign, shown);
            let found = Numeric::read(&bytes).and_then(|number| number.decimal(precision, scale));
            assert_eq!(found, expected.map_err(|why: &str| Misfit(why.to_owned())), "{groups:?}");
        }
        // 38 digits whose last group is full: what is on the way has more digits than 128 bits.
        let bytes = wire(&[99, 9999, 9999, 9999, 9999, 9999, 9999, 9999, 9999, 9900], 0, 0, 36);
        let number = Numeric::read(&bytes).unwrap();
        assert_eq!(number.decimal(38, 36), Ok(99_999_999_999_999_999_999_999_999_999_999_999_900));
        assert_eq!(number.text().unwrap(), "99.999999999999999999999999999999999900");
    }

    proptest! {
        /// Whatever bytes come, a column takes them or says why not, and is as it was; together as one by one.
        #[test]
        fn no_bytes_make_a_column_panic(
            kind in 0_usize..20,
            values in prop::collection::vec(prop::option::of(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..40), prop::collection::vec(any::<u8>(), 4), prop::collection::vec(any::<u8>(), 8),
            ]), 0..12),
        ) {
            let part = |wire: Wire| Box::new(Attribute { name: "x".to_owned(), wire, type_name: None });
            let wires = [
                Wire::Bool, Wire::Int2, Wire::Int4, Wire::Decimal { precision: 18, scale: 2 }, Wire::NumericText,
                Wire::Decimal256 { precision: 60, scale: 9 }, Wire::Jsonb, Wire::Bytea, Wire::Uuid, Wire::Inet,
                Wire::Bits, Wire::Date, Wire::TimeTz, Wire::TimestampIn(chrono_tz::Europe::Berlin), Wire::Interval,
                Wire::List(part(Wire::Int4)), Wire::Struct(vec![*part(Wire::Int8), *part(Wire::Text)]),
                Wire::Range(part(Wire::Date)), Wire::Multirange(part(Wire::Int4)), Wire::Money { scale: 2 },
            ];
            let new = || Column::new(wires[kind].clone(), 4);
            let (mut column, mut together) = (new(), new());
            let all = || values.iter().map(|value| value.as_deref());
            let fitting: Vec<_> = all().filter(|value| column.append(*value).is_ok()).collect();
            let (some, rest) = fitting.split_at(fitting.len() / 2);
            prop_assert!(together.append_all(some.iter().copied()).is_ok());
            prop_assert_eq!(together.append_all(all()).is_ok(), fitting.len() == values.len());
            together.truncate(some.len());
            prop_assert!(together.append_all(rest.iter().copied()).is_ok());
            if let Ok(array) = column.finish() {
                prop_assert_eq!(array.len(), fitting.len());
                prop_assert_eq!(&array, &together.finish().unwrap());
            }
        }
    }
}
