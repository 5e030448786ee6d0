//! From Arrow to the frames of a binary COPY.
//!
//! Plain values go in the server's binary form; lists and structures as the text that the server reads as its own type. What
//! PostgreSQL cannot hold is an error that names the column and the row; so is what a column of the table would cut, where rows are
//! copied into it ([`As`]).

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Decimal128Array, Decimal256Array, RecordBatch,
        StringArray,
    },
    compute::cast,
    datatypes::{
        DataType, Date32Type, Field, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type,
        IntervalMonthDayNanoType, IntervalUnit, Time64MicrosecondType, TimeUnit, TimestampMicrosecondType,
    },
    temporal_conversions::{date32_to_datetime, time64us_to_time, timestamp_us_to_datetime},
};
use bytes::{BufMut, BytesMut};

use super::{
    decode::{EPOCH_DAYS, EPOCH_MICROS},
    types::{TYPE_NAME, stage_type, timetz_fields},
};
use crate::error::{Error, Result};

/// What every binary COPY begins with: the signature, no flags, no more header.
pub(super) const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// What it ends with.
pub(super) const TRAILER: &[u8] = &[0xff, 0xff];

/// How the values of a column are written for a column of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum As {
    /// In the form of [`stage_type`], which the server's column has too.
    Staged,
    /// After a cast of the array that loses nothing.
    Widened(DataType),
    /// Text as a UUID.
    Uuid,
    /// Text as JSON in the server's own form.
    Jsonb,
    /// Text of so many characters at most, blanks behind it not counted if they are padding.
    Chars { most: usize, padded: bool },
}

impl As {
    /// How `field` is written into a column that the catalog calls `kept`, such that the server takes every value as it is or refuses it;
    /// `None` if only a cast in SQL does that.
    pub(super) fn of(field: &Field, kept: &str) -> Option<Self> {
        let staged = stage_type(field.data_type());
        let in_brackets = |name: &str| -> Option<(usize, usize)> {
            let shape = kept.strip_prefix(name)?.strip_prefix('(')?.strip_suffix(')')?;
            let (first, second) = shape.split_once(',').unwrap_or((shape, "0"));
            Some((first.parse().ok()?, second.parse().ok()?))
        };
        match field.data_type() {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => match kept {
                "text" | "character varying" | "json" => Some(Self::Staged),
                "uuid" => Some(Self::Uuid),
                "jsonb" => Some(Self::Jsonb),
                _ => {
                    let varying =
                        in_brackets("character varying").map(|(most, _)| Self::Chars { most, padded: false });
                    varying.or(in_brackets("character").map(|(most, _)| Self::Chars { most, padded: true }))
                }
            },
            // What has no binary form of ours goes as text, which only a cast turns into something else.
            _ if staged == "text" => None,
            _ if staged == kept => Some(Self::Staged),
            of if of.is_integer() => match kept {
                "bigint" if *of != DataType::UInt64 => Some(Self::Widened(DataType::Int64)),
                "integer" if staged == "smallint" => Some(Self::Widened(DataType::Int32)),
                _ => None,
            },
            DataType::Float32 if kept == "double precision" => Some(Self::Widened(DataType::Float64)),
            DataType::Decimal128(..) | DataType::Decimal256(..) if kept == "numeric" => Some(Self::Staged),
            DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale) => {
                let scale = usize::try_from(*scale).ok()?;
                let (most, places) = in_brackets("numeric")?;
                let whole = usize::from(*precision).checked_sub(scale)?;
                (places >= scale && most.checked_sub(places)? >= whole).then_some(Self::Staged)
            }
            _ => None,
        }
    }
}

/// One column of a batch, in a type whose values we write.
enum Values {
    Bool(BooleanArray),
    I16(ArrayRef),
    I32(ArrayRef),
    I64(ArrayRef),
    F32(ArrayRef),
    F64(ArrayRef),
    Decimal(Decimal128Array, usize),
    Decimal256(Decimal256Array),
    /// And whether no value holds what PostgreSQL cannot keep.
    Text(StringArray, bool),
    Uuid(StringArray),
    Jsonb(StringArray),
    Chars(StringArray, usize, bool),
    Binary(BinaryArray),
    Date(ArrayRef),
    Time(ArrayRef),
    Timestamp(ArrayRef),
    Interval(ArrayRef),
    /// What goes as the server's own text.
    Literal(ArrayRef),
}

impl Values {
    fn of(array: &ArrayRef, written: &As) -> Result<Self> {
        let text = |array: &ArrayRef| -> Result<StringArray> {
            Ok(cast(array, &DataType::Utf8)?.as_string().clone())
        };
        match written {
            As::Staged => Self::plain(array),
            As::Widened(to) => Self::plain(&cast(array, to)?),
            As::Uuid => Ok(Self::Uuid(text(array)?)),
            As::Jsonb => Ok(Self::Jsonb(text(array)?)),
            As::Chars { most, padded } => Ok(Self::Chars(text(array)?, *most, *padded)),
        }
    }

    fn plain(array: &ArrayRef) -> Result<Self> {
        let to = |data_type: DataType| -> Result<ArrayRef> { Ok(cast(array, &data_type)?) };
        let same = || ArrayRef::clone(array);
        Ok(match array.data_type() {
            DataType::Boolean => Self::Bool(array.as_boolean().clone()),
            DataType::Int16 => Self::I16(same()),
            DataType::Int8 | DataType::UInt8 => Self::I16(to(DataType::Int16)?),
            DataType::Int32 => Self::I32(same()),
            DataType::UInt16 => Self::I32(to(DataType::Int32)?),
            DataType::Int64 => Self::I64(same()),
            DataType::UInt32 => Self::I64(to(DataType::Int64)?),
            DataType::UInt64 => Self::Decimal(to(DataType::Decimal128(20, 0))?.as_primitive().clone(), 0),
            DataType::Float32 => Self::F32(same()),
            DataType::Float64 => Self::F64(same()),
            DataType::Decimal128(_, scale) => {
                Self::Decimal(array.as_primitive().clone(), usize::try_from(*scale).unwrap_or_default())
            }
            DataType::Decimal256(..) => Self::Decimal256(array.as_primitive().clone()),
            DataType::Utf8 => Self::text(array.as_string().clone()),
            DataType::LargeUtf8 | DataType::Utf8View => Self::text(to(DataType::Utf8)?.as_string().clone()),
            DataType::Binary => Self::Binary(array.as_binary().clone()),
            DataType::LargeBinary | DataType::BinaryView => {
                Self::Binary(to(DataType::Binary)?.as_binary().clone())
            }
            DataType::Date32 => Self::Date(same()),
            DataType::Time64(TimeUnit::Microsecond) => Self::Time(same()),
            DataType::Timestamp(TimeUnit::Microsecond, _) => Self::Timestamp(same()),
            DataType::Interval(IntervalUnit::MonthDayNano) => Self::Interval(same()),
            _ => Self::Literal(same()),
        })
    }

    /// All bytes are looked at together, one by one only where that finds something.
    fn text(array: StringArray) -> Self {
        let ends = array.value_offsets();
        let end = |end: Option<&i32>| end.map_or(0, |end| end.cast_unsigned() as usize);
        let held = array.value_data().get(end(ends.first())..end(ends.last()));
        let is_clean = held.is_some_and(|held| memchr::memchr(0, held).is_none());
        Self::Text(array, is_clean)
    }

    fn array(&self) -> &dyn Array {
        match self {
            Self::Bool(array) => array,
            Self::Decimal(array, _) => array,
            Self::Decimal256(array) => array,
            Self::Text(array, _) | Self::Uuid(array) | Self::Jsonb(array) | Self::Chars(array, ..) => array,
            Self::Binary(array) => array,
            Self::I16(array)
            | Self::I32(array)
            | Self::I64(array)
            | Self::F32(array)
            | Self::F64(array)
            | Self::Date(array)
            | Self::Time(array)
            | Self::Timestamp(array)
            | Self::Interval(array)
            | Self::Literal(array) => array,
        }
    }

    /// Writes one value with its length in front, or says why it cannot be.
    fn write(&self, row: usize, out: &mut BytesMut) -> Result<(), &'static str> {
        const FAR: &str = "is a day that PostgreSQL does not have";
        match self {
            Self::Bool(array) => {
                out.put_i32(1);
                out.put_u8(array.value(row).into());
            }
            Self::I16(array) => {
                out.put_i32(2);
                out.put_i16(array.as_primitive::<Int16Type>().value(row));
            }
            Self::I32(array) => four(array.as_primitive::<Int32Type>().value(row), out),
            Self::I64(array) => eight(array.as_primitive::<Int64Type>().value(row), out),
            Self::F32(array) => {
                four(array.as_primitive::<Float32Type>().value(row).to_bits().cast_signed(), out);
            }
            Self::F64(array) => {
                eight(array.as_primitive::<Float64Type>().value(row).to_bits().cast_signed(), out);
            }
            Self::Decimal(array, scale) => {
                let value = array.value(row);
                match u64::try_from(value.unsigned_abs()) {
                    Ok(small) if small < SMALL && *scale <= 20 => short_number(value < 0, small, *scale, out),
                    _ => number(value < 0, &value.unsigned_abs().to_string(), *scale, out),
                }
            }
            Self::Decimal256(array) => {
                let text = array.value(row).to_string();
                let scale = usize::try_from(array.scale()).unwrap_or_default();
                number(text.starts_with('-'), text.trim_start_matches('-'), scale, out);
            }
            Self::Text(array, true) => bytes(array.value(row).as_bytes(), out)?,
            Self::Text(array, false) => text(array.value(row), out)?,
            Self::Uuid(array) => {
                let value = array.value(row);
                // The server takes hyphens behind any four digits.
                let plain = || value.chars().filter(|c| !matches!(c, '-' | '{' | '}')).collect::<String>();
                let value = uuid::Uuid::parse_str(value).or_else(|_| uuid::Uuid::parse_str(&plain()));
                let value = value.map_err(|_| "is no UUID")?;
                bytes(value.as_bytes(), out)?;
            }
            Self::Jsonb(array) => {
                let value = array.value(row);
                out.put_i32(i32::try_from(value.len() + 1).map_err(|_| "has more than 2 GiB")?);
                out.put_u8(1);
                out.put_slice(value.as_bytes());
            }
            Self::Chars(array, most, padded) => {
                let value = array.value(row);
                let kept = if *padded { value.trim_end_matches(' ') } else { value };
                if kept.len() > *most && kept.chars().count() > *most {
                    return Err("has more characters than its column there");
                }
                text(kept, out)?;
            }
            Self::Binary(array) => bytes(array.value(row), out)?,
            Self::Date(array) => {
                let days = array.as_primitive::<Date32Type>().value(row);
                // The first day is 4713-11-24 BC, the last in the year 5874897.
                match days.checked_sub(EPOCH_DAYS) {
                    Some(days @ -2_451_545..=2_145_031_948) => four(days, out),
                    _ => return Err(FAR),
                }
            }
            Self::Time(array) => eight(array.as_primitive::<Time64MicrosecondType>().value(row), out),
            Self::Timestamp(array) => {
                let micros = array.as_primitive::<TimestampMicrosecondType>().value(row);
                match micros.checked_sub(EPOCH_MICROS) {
                    Some(micros @ -211_813_488_000_000_000..=9_223_371_331_199_999_999) => eight(micros, out),
                    _ => return Err(FAR),
                }
            }
            Self::Interval(array) => {
                let value = array.as_primitive::<IntervalMonthDayNanoType>().value(row);
                if value.nanoseconds % 1000 != 0 {
                    return Err("has fractions of a microsecond, which PostgreSQL does not hold");
                }
                out.put_i32(16);
                out.put_i64(value.nanoseconds / 1000);
                out.put_i32(value.days);
                out.put_i32(value.months);
            }
            Self::Literal(array) => text(&literal(array, row)?, out)?,
        }
        Ok(())
    }
}

/// A value of four bytes, with its length.
fn four(value: i32, out: &mut BytesMut) {
    out.put_u64(4 << 32 | u64::from(value.cast_unsigned()));
}

/// A value of eight bytes, with its length.
fn eight(value: i64, out: &mut BytesMut) {
    let mut cell = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    cell.last_chunk_mut().into_iter().for_each(|behind| *behind = value.to_be_bytes());
    out.put_slice(&cell);
}

fn bytes(value: &[u8], out: &mut BytesMut) -> Result<(), &'static str> {
    out.put_i32(i32::try_from(value.len()).map_err(|_| "has more than 2 GiB")?);
    out.put_slice(value);
    Ok(())
}

fn text(value: &str, out: &mut BytesMut) -> Result<(), &'static str> {
    if memchr::memchr(0, value.as_bytes()).is_some() {
        return Err("holds the character U+0000, which PostgreSQL cannot keep in text");
    }
    bytes(value.as_bytes(), out)
}

/// Numbers below have a multiple by 1000 that is still a `u64`.
const SMALL: u64 = u64::MAX / 1000;

/// A number in base 10000, of an unscaled value below [`SMALL`].
fn short_number(negative: bool, value: u64, scale: usize, out: &mut BytesMut) {
    // Moved so that the point is between two groups.
    let missing = (4 - scale % 4) % 4;
    let mut rest = value * [1, 10, 100, 1000].get(missing).copied().unwrap_or(1);
    let mut weight = -i16::try_from((scale + missing) / 4).unwrap_or_default();
    while rest != 0 && rest.is_multiple_of(10_000) {
        rest /= 10_000;
        weight += 1;
    }
    // From the last group to the first, and what stands in front of them: twenty digits are five groups, and one more.
    let (mut cell, mut at) = ([0_u8; 24], 24);
    let mut put = |bytes: &[u8]| {
        at -= bytes.len();
        cell.get_mut(at..at + bytes.len()).into_iter().for_each(|place| place.copy_from_slice(bytes));
        at
    };
    let mut count = 0_i16;
    while rest != 0 {
        put(&u16::try_from(rest % 10_000).unwrap_or_default().to_be_bytes());
        count += 1;
        rest /= 10_000;
    }
    let weight = if count == 0 { 0 } else { weight + count - 1 };
    put(&u16::try_from(scale).unwrap_or_default().to_be_bytes());
    put(&[if negative && count > 0 { 0x40 } else { 0 }, 0]);
    put(&weight.to_be_bytes());
    put(&count.to_be_bytes());
    let start = put(&(8 + 2 * i32::from(count)).to_be_bytes());
    out.put_slice(cell.get(start..).unwrap_or_default());
}

/// A number in base 10000: `digits` are those of the unscaled value.
fn number(negative: bool, digits: &str, scale: usize, out: &mut BytesMut) {
    // Zeros in front so that the point is between two digits, and so that both sides are whole groups.
    let digits = digits.trim_start_matches('0');
    let whole = digits.len().saturating_sub(scale);
    let in_front = (4 - whole % 4) % 4 + scale.saturating_sub(digits.len());
    let behind = (4 - scale % 4) % 4;
    let padded =
        std::iter::repeat_n(b'0', in_front).chain(digits.bytes()).chain(std::iter::repeat_n(b'0', behind));
    let mut groups: Vec<u16> = Vec::with_capacity(20);
    for (index, digit) in padded.enumerate() {
        let digit = u16::from(digit - b'0');
        match groups.last_mut().filter(|_| index % 4 != 0) {
            Some(group) => *group = *group * 10 + digit,
            None => groups.push(digit),
        }
    }
    let leading = groups.iter().take_while(|group| **group == 0).count();
    let trailing = groups.iter().rev().take_while(|group| **group == 0).count();
    let kept = groups.get(leading..groups.len().saturating_sub(trailing)).unwrap_or_default();
    let power = |groups: usize| i16::try_from(groups).unwrap_or_default();
    let weight = if kept.is_empty() { 0 } else { power(whole.div_ceil(4)) - 1 - power(leading) };
    let count = u16::try_from(kept.len()).unwrap_or_default();
    out.put_i32(8 + 2 * i32::from(count));
    out.put_u16(count);
    out.put_i16(weight);
    out.put_u16(if negative && !kept.is_empty() { 0x4000 } else { 0 });
    out.put_u16(u16::try_from(scale).unwrap_or_default());
    for group in kept {
        out.put_u16(*group);
    }
}

/// Writes the rows of `batch`, each column as `written` says; `row` is the number of its first one, from 1.
pub(super) fn rows(
    output: &str,
    batch: &RecordBatch,
    written: &[As],
    row: u64,
    out: &mut BytesMut,
) -> Result<()> {
    let schema = batch.schema();
    let columns = batch.columns().iter().zip(written);
    let columns = columns.map(|(array, written)| {
        let values = Values::of(array, written)?;
        // Asked of each value, and there are columns that have none.
        let nulls = values.array().nulls().filter(|nulls| nulls.null_count() > 0).cloned();
        Ok((values, nulls))
    });
    let columns = columns.collect::<Result<Vec<_>>>()?;
    let count = i16::try_from(columns.len()).map_err(|_| {
        Error::configuration(format!("output `{output}` has more columns than PostgreSQL holds"))
    })?;
    for index in 0..batch.num_rows() {
        out.put_i16(count);
        for ((values, nulls), field) in columns.iter().zip(schema.fields()) {
            if nulls.as_ref().is_some_and(|nulls| nulls.is_null(index)) {
                out.put_i32(-1);
                continue;
            }
            values.write(index, out).map_err(|why| {
                Error::data(format!(
                    "output `{output}`: row {} of the model: `{}` {why}",
                    row + index as u64,
                    field.name()
                ))
                .hint("Mend it in the model; or set such rows aside with a check and `on_fail: quarantine`.")
            })?;
        }
    }
    Ok(())
}

/// A value as the text that the server reads as its own type.
fn literal(array: &dyn Array, row: usize) -> Result<String, &'static str> {
    const FAR: &str = "is a time that cannot be written";
    Ok(match array.data_type() {
        DataType::Boolean => array.as_boolean().value(row).to_string(),
        DataType::Utf8 => array.as_string::<i32>().value(row).to_owned(),
        DataType::Binary => format!("\\x{}", hex::encode(array.as_binary::<i32>().value(row))),
        DataType::Date32 => {
            let day = date32_to_datetime(array.as_primitive::<Date32Type>().value(row)).ok_or(FAR)?;
            era(day.date(), "%Y-%m-%d")
        }
        DataType::Timestamp(TimeUnit::Microsecond, zone) => {
            let micros = array.as_primitive::<TimestampMicrosecondType>().value(row);
            let at = timestamp_us_to_datetime(micros).ok_or(FAR)?;
            let clock = at.format("%H:%M:%S%.6f").to_string();
            let clock = if zone.is_some() { format!("{clock}+00") } else { clock };
            let day = era(at.date(), "%Y-%m-%d");
            match day.strip_suffix(" BC") {
                Some(day) => format!("{day} {clock} BC"),
                None => format!("{day} {clock}"),
            }
        }
        DataType::Time64(TimeUnit::Microsecond) => {
            let time =
                time64us_to_time(array.as_primitive::<Time64MicrosecondType>().value(row)).ok_or(FAR)?;
            time.format("%H:%M:%S%.6f").to_string()
        }
        DataType::Interval(IntervalUnit::MonthDayNano) => {
            let value = array.as_primitive::<IntervalMonthDayNanoType>().value(row);
            if value.nanoseconds % 1000 != 0 {
                return Err("has fractions of a microsecond, which PostgreSQL does not hold");
            }
            format!("{} months {} days {} microseconds", value.months, value.days, value.nanoseconds / 1000)
        }
        DataType::List(_) | DataType::LargeList(_) => {
            let (items, element) = match array.data_type() {
                DataType::List(element) => (array.as_list::<i32>().value(row), element),
                DataType::LargeList(element) => (array.as_list::<i64>().value(row), element),
                _ => return Err("is a list of a kind that cannot be written"),
            };
            let parts = (0..items.len())
                .map(|index| part(&items, element, index))
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .map(|part| part.unwrap_or_else(|| "NULL".to_owned()));
            format!("{{{}}}", parts.collect::<Vec<_>>().join(","))
        }
        DataType::Struct(fields) => {
            let parts = array.as_struct();
            let at = |name: &str| {
                let index = fields.iter().position(|field| field.name() == name)?;
                fields.get(index).map(|field| (parts.column(index), field))
            };
            if *fields == timetz_fields() {
                let clock = literal(parts.column(0), row)?;
                let offset = parts.column(1).as_primitive::<Int32Type>().value(row);
                let (sign, offset) = (if offset < 0 { '-' } else { '+' }, offset.unsigned_abs());
                format!("{clock}{sign}{:02}:{:02}:{:02}", offset / 3600, offset / 60 % 60, offset % 60)
            } else if let (Some((empty, _)), Some((lower, bound)), Some((upper, _))) =
                (at("empty"), at("lower"), at("upper"))
            {
                let is = |name: &str| at(name).is_some_and(|(flag, _)| flag.as_boolean().value(row));
                if empty.as_boolean().value(row) {
                    return Ok("empty".to_owned());
                }
                let (lower, upper) = (part(lower, bound, row)?, part(upper, bound, row)?);
                format!(
                    "{}{},{}{}",
                    if is("lower_inc") { '[' } else { '(' },
                    lower.unwrap_or_default(),
                    upper.unwrap_or_default(),
                    if is("upper_inc") { ']' } else { ')' }
                )
            } else {
                let parts = fields
                    .iter()
                    .zip(parts.columns())
                    .map(|(field, array)| Ok(part(array, field, row)?.unwrap_or_default()))
                    .collect::<Result<Vec<_>, &'static str>>()?;
                format!("({})", parts.join(","))
            }
        }
        of if of.is_primitive() => {
            let options = arrow::util::display::FormatOptions::default();
            arrow::util::display::ArrayFormatter::try_new(array, &options)
                .map(|formatter| formatter.value(row).to_string())
                .map_err(|_| "cannot be written as text")?
        }
        _ => return Err("is of a type that cannot be written"),
    })
}

/// A part of a list or a structure, quoted; `None` is null. Multiranges hold ranges without quotes.
fn part(array: &ArrayRef, field: &Field, row: usize) -> Result<Option<String>, &'static str> {
    if array.is_null(row) {
        return Ok(None);
    }
    let text = literal(array, row)?;
    let bare = matches!(array.data_type(), DataType::Struct(fields) if fields.iter().any(|field| field.name() == "empty"))
        && !field.metadata().contains_key(TYPE_NAME);
    Ok(Some(if bare { text } else { format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")) }))
}

/// A day, with the era that PostgreSQL writes.
fn era(day: chrono::NaiveDate, format: &str) -> String {
    use chrono::Datelike;
    if day.year() > 0 {
        return if day.year() > 9999 {
            day.format(&format.replace("%Y", &day.year().to_string())).to_string()
        } else {
            day.format(format).to_string()
        };
    }
    format!("{:04}-{:02}-{:02} BC", 1 - day.year(), day.month(), day.day())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_decimal_is_written_as_the_server_would() {
        #[rustfmt::skip]
        let cases: [(&str, usize, i16, &[u16]); 8] = [
            // digits      scale  weight  groups
            ("0",          2,     0,      &[]),
            ("1",          0,     0,      &[1]),
            ("12345",      0,     1,      &[1, 2345]),
            ("10000",      0,     1,      &[1]),
            ("12345",      2,     0,      &[123, 4500]),
            ("5",          4,     -1,     &[5]),
            ("5",          9,     -3,     &[5000]),
            ("1000000005", 9,     0,      &[1, 0, 0, 5000]),
        ];
        for (digits, scale, weight, groups) in cases {
            let mut out = BytesMut::new();
            number(false, digits, scale, &mut out);
            let mut expected = BytesMut::new();
            expected.put_i32(i32::try_from(8 + 2 * groups.len()).unwrap());
            expected.put_u16(u16::try_from(groups.len()).unwrap());
            expected.put_i16(weight);
            expected.put_u16(0);
            expected.put_u16(u16::try_from(scale).unwrap());
            groups.iter().for_each(|group| expected.put_u16(*group));
            assert_eq!(out, expected, "{digits} by {scale}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_short_number_is_written_as_a_long_one(value: u64, bits in 0_u32..64, scale in 0_usize..=20, negative: bool) {
            let value = (value >> bits).min(SMALL - 1);
            let (mut short, mut long) = (BytesMut::new(), BytesMut::new());
            short_number(negative, value, scale, &mut short);
            number(negative, &value.to_string(), scale, &mut long);
            proptest::prop_assert_eq!(short, long, "{} by {}", value, scale);
        }
    }

    #[test]
    fn what_goes_straight_into_a_column_is_kept_whole_there() {
        let of = |data_type: DataType, kept: &str| As::of(&Field::new("x", data_type, true), kept);
        let decimal = DataType::Decimal128(15, 2);
        for (data_type, kept, expected) in [
            (DataType::Utf8, "text", Some(As::Staged)),
            (DataType::Utf8, "character varying", Some(As::Staged)),
            (DataType::Utf8, "character varying(5)", Some(As::Chars { most: 5, padded: false })),
            (DataType::Utf8, "character(5)", Some(As::Chars { most: 5, padded: true })),
            (DataType::Utf8, "uuid", Some(As::Uuid)),
            (DataType::Utf8, "xml", None),
            (DataType::Utf8, "integer[]", None),
            (decimal.clone(), "numeric(15,2)", Some(As::Staged)),
            (decimal.clone(), "numeric(18,5)", Some(As::Staged)),
            (decimal.clone(), "numeric(18,6)", None),
            (decimal.clone(), "numeric(20,1)", None),
            (decimal.clone(), "numeric", Some(As::Staged)),
            (decimal, "double precision", None),
            (DataType::Int32, "bigint", Some(As::Widened(DataType::Int64))),
            (DataType::Int64, "integer", None),
            (DataType::UInt64, "bigint", None),
            (DataType::Float64, "real", None),
            (DataType::Timestamp(TimeUnit::Microsecond, None), "timestamp(3) without time zone", None),
        ] {
            assert_eq!(of(data_type.clone(), kept), expected, "{data_type} into {kept}");
        }
    }
}
