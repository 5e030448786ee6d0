//! From text to typed columns, exactly or not at all.
//!
//! Files and dynamically typed databases hand over text; a [`ColumnBuilder`] turns it into one Arrow column.
//! What does not fit is never rounded, cut or nulled: the caller gets a [`Misfit`] that says why, without the
//! value, and decides whether the run fails or the row is set aside.

use std::{fmt, sync::Arc};

use arrow::{
    array::{
        ArrayRef, ArrowPrimitiveType, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder,
        Float64Builder, Int64Builder, PrimitiveBuilder, StringBuilder, Time64MicrosecondBuilder,
        TimestampMicrosecondBuilder,
    },
    datatypes::{DataType, Field, Schema},
};
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, TimeZone, Utc};
use chrono_tz::Tz;

use super::spec::StreamSpec;
use crate::{
    error::{Error, Result},
    types::{ColumnType, UTC},
    watermark::Overlap,
};

/// Why a value does not fit its column. Never holds the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit(pub String);

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn misfit<T>(why: impl Into<String>) -> Result<T, Misfit> {
    Err(Misfit(why.into()))
}

/// How a stream writes its values.
#[derive(Debug, Clone)]
pub struct TextRules {
    decimal: u8,
    thousands: Option<u8>,
    date: Option<String>,
    timestamp: Option<String>,
    zone: Option<Tz>,
}

impl TextRules {
    /// The zone of timestamps that have none.
    pub fn zone(&self) -> Option<Tz> {
        self.zone
    }

    /// The rules that a stream declares.
    ///
    /// # Errors
    ///
    /// A mark that is not one ASCII character, two marks that are the same, an unknown zone.
    pub fn of(stream: &StreamSpec) -> Result<Self> {
        let format = stream.format.clone().unwrap_or_default();
        let decimal = single("decimal", format.decimal.as_deref())?.unwrap_or(b'.');
        let thousands = single("thousands", format.thousands.as_deref())?;
        if thousands == Some(decimal) {
            return Err(Error::configuration("`decimal` and `thousands` are the same character"));
        }
        let zone = stream.timezone.as_deref().map(zone).transpose()?;
        Ok(Self { decimal, thousands, date: format.date, timestamp: format.timestamp, zone })
    }
}

/// The one ASCII character that an option names.
///
/// # Errors
///
/// If it is empty, longer, or not ASCII.
pub fn single(option: &str, written: Option<&str>) -> Result<Option<u8>> {
    match written.map(str::as_bytes) {
        None => Ok(None),
        Some([byte]) if byte.is_ascii() => Ok(Some(*byte)),
        Some(_) if matches!(written, Some("\\t" | "tab")) => Ok(Some(b'\t')),
        Some(_) => Err(Error::configuration(format!("`{option}` must be one ASCII character"))
            .hint("Such as `;`, or `\\t` for a tab.")),
    }
}

/// An IANA zone by name.
///
/// # Errors
///
/// If there is none of that name.
pub fn zone(name: &str) -> Result<Tz> {
    name.parse().map_err(|_| {
        let near = crate::error::nearest(name, chrono_tz::TZ_VARIANTS.iter().map(|zone| zone.name()));
        let error = Error::configuration(format!("there is no time zone `{name}`"));
        match near {
            Some(near) => error.hint(format!("Did you mean `{near}`?")),
            None => error.hint("Use an IANA name such as `Europe/Berlin`."),
        }
    })
}

/// The day before which all days are over at `now`: in the stream's zone, or without one wherever the sun is last.
///
/// # Errors
///
/// If there is no zone of that name.
pub fn last_closed_day(now: DateTime<Utc>, stream: &StreamSpec) -> Result<NaiveDate> {
    Ok(match stream.timezone.as_deref() {
        Some(name) => now.with_timezone(&zone(name)?).date_naive(),
        None => (now - chrono::TimeDelta::hours(12)).date_naive(),
    })
}

/// The latest end of a window, not after `now`, below which a clock in `zone` can show no more times, as [`in_zone`] reads
/// them: where it goes back, it shows times again, and the later one is read as the first. `overlap` reads so far behind the end
/// again, so that it may lie so much later.
pub fn last_closed_instant(now: DateTime<Utc>, zone: Tz, overlap: Option<Overlap>) -> DateTime<Utc> {
    let passes = |at: DateTime<Utc>| zone.from_local_datetime(&at.with_timezone(&zone).naive_local());
    let chrono::LocalResult::Ambiguous(first, second) = passes(now) else { return now };
    let closed = if now < second.to_utc() {
        // The first time round: all that it shows from where the two passes begin may come again.
        let (mut before, mut within) = (now - second.signed_duration_since(first), now);
        while within - before > chrono::TimeDelta::seconds(1) {
            let between = before + chrono::TimeDelta::seconds((within - before).num_seconds() / 2);
            let is_within = matches!(passes(between), chrono::LocalResult::Ambiguous(..));
            *if is_within { &mut within } else { &mut before } = between;
        }
        // Clocks change at whole seconds.
        chrono::SubsecRound::trunc_subsecs(within, 0)
    } else {
        first.to_utc()
    };
    match overlap {
        Some(Overlap::Micros(micros)) => now.min(closed + chrono::TimeDelta::microseconds(micros)),
        _ => closed,
    }
}

/// The type a column has after its stream's zone is applied: with `timezone:`, wall-clock timestamps become
/// points in time.
pub fn effective(column: ColumnType, stream: &StreamSpec) -> ColumnType {
    match column {
        ColumnType::Timestamp(format) if stream.timezone.is_some() => ColumnType::TimestampTz(format),
        other => other,
    }
}

/// The declared columns of a stream.
pub fn declared_schema(stream: &StreamSpec) -> Schema {
    let field = |name: &String| {
        let column = stream.declared(name).unwrap_or(ColumnType::String);
        Field::new(name, arrow_type(&column, stream), true)
    };
    Schema::new(stream.columns.keys().map(field).collect::<Vec<_>>())
}

/// One column under construction.
#[derive(Debug)]
pub struct ColumnBuilder {
    kind: Kind,
    rules: TextRules,
    format: Option<String>,
}

#[derive(Debug)]
enum Kind {
    Text(StringBuilder),
    Int(Int64Builder),
    Decimal(Decimal128Builder, u8, i8),
    Float(Float64Builder),
    Bool(BooleanBuilder),
    Date(Date32Builder),
    Timestamp(TimestampMicrosecondBuilder),
    TimestampTz(TimestampMicrosecondBuilder),
    Time(Time64MicrosecondBuilder),
    Binary(BinaryBuilder),
}

impl ColumnBuilder {
    /// A column of `column`'s type, for about `rows` rows.
    ///
    /// # Errors
    ///
    /// If Arrow cannot hold a decimal of that shape.
    pub fn new(column: &ColumnType, rules: &TextRules, rows: usize) -> Result<Self> {
        let (kind, format) = match column {
            ColumnType::String | ColumnType::Json => {
                (Kind::Text(StringBuilder::with_capacity(rows, rows * 12)), None)
            }
            ColumnType::Int => (Kind::Int(Int64Builder::with_capacity(rows)), None),
            ColumnType::Decimal { precision, scale } => {
                let builder =
                    Decimal128Builder::with_capacity(rows).with_precision_and_scale(*precision, *scale)?;
                (Kind::Decimal(builder, *precision, *scale), None)
            }
            ColumnType::Float => (Kind::Float(Float64Builder::with_capacity(rows)), None),
            ColumnType::Bool => (Kind::Bool(BooleanBuilder::with_capacity(rows)), None),
            ColumnType::Date(format) => (
                Kind::Date(Date32Builder::with_capacity(rows)),
                format.clone().or_else(|| rules.date.clone()),
            ),
            ColumnType::Timestamp(format) => (
                Kind::Timestamp(TimestampMicrosecondBuilder::with_capacity(rows)),
                format.clone().or_else(|| rules.timestamp.clone()),
            ),
            ColumnType::TimestampTz(format) => (
                Kind::TimestampTz(TimestampMicrosecondBuilder::with_capacity(rows).with_timezone(UTC)),
                format.clone().or_else(|| rules.timestamp.clone()),
            ),
            ColumnType::Time => (Kind::Time(Time64MicrosecondBuilder::with_capacity(rows)), None),
            ColumnType::Binary => (Kind::Binary(BinaryBuilder::with_capacity(rows, rows * 12)), None),
        };
        Ok(Self { kind, rules: rules.clone(), format })
    }

    /// Appends a null.
    pub fn null(&mut self) {
        match &mut self.kind {
            Kind::Text(builder) => builder.append_null(),
            Kind::Int(builder) => builder.append_null(),
            Kind::Decimal(builder, ..) => builder.append_null(),
            Kind::Float(builder) => builder.append_null(),
            Kind::Bool(builder) => builder.append_null(),
            Kind::Date(builder) => builder.append_null(),
            Kind::Timestamp(builder) | Kind::TimestampTz(builder) => builder.append_null(),
            Kind::Time(builder) => builder.append_null(),
            Kind::Binary(builder) => builder.append_null(),
        }
    }

    /// Appends what each text says, and a null where there is none; how many bytes that were.
    ///
    /// # Errors
    ///
    /// The first [`Misfit`]: what stood before it is appended, and nobody knows how much that is.
    pub fn texts<'t>(&mut self, texts: impl Iterator<Item = Option<&'t str>>) -> Result<usize, Misfit> {
        let (rules, format) = (&self.rules, self.format.as_deref());
        let mut bytes = 0;
        let texts = texts.inspect(|text| bytes += text.map_or(0, str::len));
        match &mut self.kind {
            Kind::Text(builder) => texts.for_each(|text| builder.append_option(text)),
            Kind::Int(builder) => append_all(builder, texts, |text| int(text, rules))?,
            Kind::Decimal(builder, precision, scale) => {
                let (precision, scale) = (*precision, *scale);
                append_all(builder, texts, |text| {
                    decimal(text, rules.decimal, rules.thousands, precision, scale)
                })?;
            }
            Kind::Date(builder) => append_all(builder, texts, |text| date(text, format))?,
            _ => {
                for text in texts {
                    match text {
                        Some(text) => self.text(text)?,
                        None => self.null(),
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// Appends what `text` says.
    ///
    /// # Errors
    ///
    /// A [`Misfit`], and nothing is appended: the caller appends a null to keep the columns even.
    pub fn text(&mut self, text: &str) -> Result<(), Misfit> {
        let rules = &self.rules;
        let format = self.format.as_deref();
        match &mut self.kind {
            Kind::Text(builder) => builder.append_value(text),
            Kind::Int(builder) => builder.append_value(int(text, rules)?),
            Kind::Decimal(builder, precision, scale) => {
                builder.append_value(decimal(text, rules.decimal, rules.thousands, *precision, *scale)?);
            }
            Kind::Float(builder) => builder.append_value(float(text, rules)?),
            Kind::Bool(builder) => builder.append_value(boolean(text)?),
            Kind::Date(builder) => builder.append_value(date(text, format)?),
            Kind::Timestamp(builder) => builder.append_value(naive(text, format)?),
            Kind::TimestampTz(builder) => builder.append_value(instant(text, format, rules.zone)?),
            Kind::Time(builder) => builder.append_value(time(text)?),
            Kind::Binary(builder) => {
                builder.append_value(hex::decode(text).map_err(|_| Misfit("is not hexadecimal".to_owned()))?);
            }
        }
        Ok(())
    }

    /// Appends a number that is spelled with a point, as JSON does.
    ///
    /// # Errors
    ///
    /// As [`Self::text`].
    pub fn number(&mut self, text: &str) -> Result<(), Misfit> {
        match &mut self.kind {
            Kind::Decimal(builder, precision, scale) => {
                builder.append_value(decimal(text, b'.', None, *precision, *scale)?);
                Ok(())
            }
            Kind::Float(builder) => {
                builder.append_value(text.parse().map_err(|_| Misfit("is not a number".to_owned()))?);
                Ok(())
            }
            _ => self.text(text),
        }
    }

    /// Appends a whole number.
    ///
    /// # Errors
    ///
    /// As [`Self::text`].
    pub fn int(&mut self, value: i64) -> Result<(), Misfit> {
        match &mut self.kind {
            Kind::Int(builder) => builder.append_value(value),
            Kind::Bool(builder) => match value {
                0 => builder.append_value(false),
                1 => builder.append_value(true),
                _ => return misfit("is a number other than 0 and 1"),
            },
            Kind::Float(builder) => {
                #[expect(clippy::cast_precision_loss, reason = "checked to be exact on the next line")]
                let float = value as f64;
                #[expect(clippy::cast_possible_truncation, reason = "this is the check")]
                if float as i64 != value || value == i64::MAX {
                    return misfit("is a whole number that a float cannot hold");
                }
                builder.append_value(float);
            }
            Kind::Date(_) | Kind::Timestamp(_) | Kind::TimestampTz(_) | Kind::Time(_) => {
                return misfit("is a number, not a date or time");
            }
            Kind::Binary(_) => return misfit("is a number, not bytes"),
            Kind::Text(_) | Kind::Decimal(..) => {
                let text = value.to_string();
                return match &mut self.kind {
                    Kind::Decimal(builder, precision, scale) => {
                        builder.append_value(decimal(&text, b'.', None, *precision, *scale)?);
                        Ok(())
                    }
                    _ => self.text(&text),
                };
            }
        }
        Ok(())
    }

    /// Appends a binary fraction.
    ///
    /// A decimal takes it only if its shortest spelling has at most 15 digits: up to there SQLite and IEEE 754
    /// promise that a written decimal comes back as it was written.
    ///
    /// # Errors
    ///
    /// As [`Self::text`].
    pub fn real(&mut self, value: f64) -> Result<(), Misfit> {
        match &mut self.kind {
            Kind::Float(builder) => builder.append_value(value),
            Kind::Decimal(builder, precision, scale) => {
                if !value.is_finite() {
                    return misfit("is not a finite number");
                }
                let text = value.to_string();
                let digits = text.bytes().filter(u8::is_ascii_digit).count()
                    - text
                        .bytes()
                        .take_while(|byte| matches!(byte, b'-' | b'0' | b'.'))
                        .filter(u8::is_ascii_digit)
                        .count();
                if digits > 15 {
                    return misfit("is a binary fraction that is no exact decimal");
                }
                builder.append_value(decimal(&text, b'.', None, *precision, *scale)?);
            }
            Kind::Text(builder) => builder.append_value(value.to_string()),
            _ => return misfit("is a binary fraction"),
        }
        Ok(())
    }

    /// Appends bytes.
    ///
    /// # Errors
    ///
    /// As [`Self::text`].
    pub fn bytes(&mut self, value: &[u8]) -> Result<(), Misfit> {
        match &mut self.kind {
            Kind::Binary(builder) => builder.append_value(value),
            _ => return misfit("is a blob"),
        }
        Ok(())
    }

    /// The column, and an empty builder for the next one.
    pub fn finish(&mut self) -> ArrayRef {
        match &mut self.kind {
            Kind::Text(builder) => Arc::new(builder.finish()),
            Kind::Int(builder) => Arc::new(builder.finish()),
            Kind::Decimal(builder, ..) => Arc::new(builder.finish()),
            Kind::Float(builder) => Arc::new(builder.finish()),
            Kind::Bool(builder) => Arc::new(builder.finish()),
            Kind::Date(builder) => Arc::new(builder.finish()),
            Kind::Timestamp(builder) | Kind::TimestampTz(builder) => Arc::new(builder.finish()),
            Kind::Time(builder) => Arc::new(builder.finish()),
            Kind::Binary(builder) => Arc::new(builder.finish()),
        }
    }
}

/// The unscaled value of an exact decimal with `scale` decimals.
///
/// Zeros beyond the scale are dropped; any other digit there is a misfit. An exponent (`1.5e3`, as JSON writes
/// it) is followed exactly.
///
/// # Errors
///
/// A [`Misfit`] for what is no number, has too many decimals, or too many digits.
pub fn decimal(
    text: &str,
    mark: u8,
    thousands: Option<u8>,
    precision: u8,
    scale: i8,
) -> Result<i128, Misfit> {
    if let Some(value) = short_decimal(text.as_bytes(), mark, precision, scale) {
        return Ok(value);
    }
    let not_a_number = || Misfit("is not a number".to_owned());
    let bytes = text.trim().as_bytes();
    let (negative, bytes) = match bytes {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let (mantissa, exponent) = match bytes.iter().position(|byte| matches!(byte, b'e' | b'E')) {
        Some(at) => {
            let (mantissa, exponent) = bytes.split_at(at);
            let exponent = std::str::from_utf8(exponent).ok().and_then(|text| text.get(1..));
            (mantissa, exponent.and_then(|text| text.parse::<i32>().ok()).ok_or_else(not_a_number)?)
        }
        None => (bytes, 0),
    };
    let mut value: i128 = 0;
    let mut decimals: Option<i32> = None;
    let mut any = false;
    for byte in mantissa {
        match byte {
            b'0'..=b'9' => {
                any = true;
                value = value
                    .checked_mul(10)
                    .and_then(|value| value.checked_add(i128::from(byte - b'0')))
                    .ok_or_else(|| Misfit(format!("has more than {precision} digits")))?;
                decimals = decimals.map(|count| count + 1);
            }
            byte if *byte == mark && decimals.is_none() => decimals = Some(0),
            byte if Some(*byte) == thousands && any && decimals.is_none() => {}
            _ => return Err(not_a_number()),
        }
    }
    if !any {
        return Err(not_a_number());
    }
    let shift = i64::from(scale) - i64::from(decimals.unwrap_or(0)) + i64::from(exponent);
    let too_long = || Misfit(format!("has more digits than decimal({precision},{scale}) holds"));
    if shift >= 0 {
        for _ in 0..shift.min(80) {
            value = value.checked_mul(10).ok_or_else(too_long)?;
        }
    } else {
        for dropped in 0..-shift {
            if value == 0 {
                break;
            }
            if value % 10 != 0 {
                return misfit(format!(
                    "has {} decimal places and the column keeps {scale}",
                    i64::from(scale) + (-shift - dropped)
                ));
            }
            value /= 10;
        }
    }
    if value >= 10_i128.pow(u32::from(precision)) {
        return Err(too_long());
    }
    Ok(if negative { -value } else { value })
}

/// The powers of ten that a `u64` holds with a digit to spare.
#[rustfmt::skip]
pub const POWERS: [u64; 19] = [
    1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000, 100_000_000_000,
    1_000_000_000_000, 10_000_000_000_000, 100_000_000_000_000, 1_000_000_000_000_000, 10_000_000_000_000_000, 100_000_000_000_000_000,
    1_000_000_000_000_000_000,
];

/// What most numbers are: at most 18 digits and one mark, of which no more stand behind it than the column keeps. `None` of
/// everything else, which [`decimal`] reads.
fn short_decimal(text: &[u8], mark: u8, precision: u8, scale: i8) -> Option<i128> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    if digits.len() > 19 {
        return None;
    }
    let (mut value, mut seen, mut behind) = (0_u64, 0_usize, None);
    for (at, byte) in digits.iter().enumerate() {
        let digit = byte.wrapping_sub(b'0');
        if digit < 10 {
            value = value * 10 + u64::from(digit);
            seen += 1;
        } else if *byte == mark && behind.is_none() {
            behind = Some(digits.len() - at - 1);
        } else {
            return None;
        }
    }
    let missing = usize::try_from(scale).ok()?.checked_sub(behind.unwrap_or(0))?;
    if seen == 0 || seen + missing > 18 {
        return None;
    }
    let value = value * POWERS.get(missing)?;
    if POWERS.get(usize::from(precision)).is_some_and(|limit| value >= *limit) {
        return None;
    }
    let value = i128::from(value);
    Some(if negative { -value } else { value })
}

fn append_all<'t, T: ArrowPrimitiveType>(
    builder: &mut PrimitiveBuilder<T>,
    texts: impl Iterator<Item = Option<&'t str>>,
    value: impl Fn(&str) -> Result<T::Native, Misfit>,
) -> Result<(), Misfit> {
    for text in texts {
        match text {
            Some(text) => builder.append_value(value(text)?),
            None => builder.append_null(),
        }
    }
    Ok(())
}

fn int(text: &str, rules: &TextRules) -> Result<i64, Misfit> {
    let exact = decimal(text, rules.decimal, rules.thousands, 19, 0).map_err(|why| {
        if why.0.contains("decimal places") { Misfit("is not a whole number".to_owned()) } else { why }
    })?;
    i64::try_from(exact).map_err(|_| Misfit("is too large for an int".to_owned()))
}

fn float(text: &str, rules: &TextRules) -> Result<f64, Misfit> {
    let text = text.trim();
    let plain = if rules.decimal == b'.' && rules.thousands.is_none() {
        text.parse()
    } else {
        let kept = text.chars().filter(|c| rules.thousands.is_none_or(|mark| *c != char::from(mark)));
        kept.map(|c| if c == char::from(rules.decimal) { '.' } else { c }).collect::<String>().parse()
    };
    plain.map_err(|_| Misfit("is not a number".to_owned()))
}

fn boolean(text: &str) -> Result<bool, Misfit> {
    match text.trim() {
        "true" | "TRUE" | "True" | "t" | "T" | "1" | "yes" | "YES" | "Yes" | "y" | "Y" => Ok(true),
        "false" | "FALSE" | "False" | "f" | "F" | "0" | "no" | "NO" | "No" | "n" | "N" => Ok(false),
        _ => misfit("is not true or false"),
    }
}

/// Days since 1970.
///
/// # Errors
///
/// A [`Misfit`] for what is no day, or not in the format.
pub fn date(text: &str, format: Option<&str>) -> Result<i32, Misfit> {
    if let (None, Some(days)) = (format, short_date(text.as_bytes())) {
        return Ok(days);
    }
    let text = text.trim();
    let day = match format {
        Some(format) => NaiveDate::parse_from_str(text, format)
            .map_err(|_| Misfit(format!("is not a date in the format `{format}`")))?,
        None => iso_date(text).ok_or_else(|| Misfit("is not a date such as 2026-10-31".to_owned()))?,
    };
    i32::try_from(day.signed_duration_since(NaiveDate::default()).num_days())
        .map_err(|_| Misfit("is too far away for a date".to_owned()))
}

/// Days since 1970 of `2026-10-31`; `None` of everything else.
fn short_date(text: &[u8]) -> Option<i32> {
    let &[a, b, c, d, b'-', e, f, b'-', g, h] = text else { return None };
    let number = |digits: &[u8]| {
        let mut all = digits.iter().map(|byte| byte.wrapping_sub(b'0'));
        all.try_fold(0, |sum, digit| (digit < 10).then(|| sum * 10 + i32::from(digit)))
    };
    let (year, month, day) = (number(&[a, b, c, d])?, number(&[e, f])?, number(&[g, h])?);
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days_in = match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 => 28 + i32::from(is_leap),
        _ => return None,
    };
    if !(1..=days_in).contains(&day) {
        return None;
    }
    // A year begins in March here, so that the day that some lack is its last.
    let (years, months) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let era = years.div_euclid(400);
    let of_era = years.rem_euclid(400);
    let of_year = (153 * months + 2) / 5 + day - 1;
    Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468)
}

fn iso_date(text: &str) -> Option<NaiveDate> {
    let bytes = text.as_bytes();
    if bytes.len() != 10 || bytes.get(4) != Some(&b'-') || bytes.get(7) != Some(&b'-') {
        return None;
    }
    let number = |range: std::ops::Range<usize>| -> Option<u32> {
        bytes
            .get(range)?
            .iter()
            .try_fold(0, |sum, byte| byte.is_ascii_digit().then(|| sum * 10 + u32::from(byte - b'0')))
    };
    NaiveDate::from_ymd_opt(i32::try_from(number(0..4)?).ok()?, number(5..7)?, number(8..10)?)
}

/// A wall-clock timestamp and the offset written behind it, if one is.
fn iso_timestamp(text: &str) -> Option<(NaiveDateTime, Option<i32>)> {
    let day = iso_date(text.get(..10)?)?;
    let rest = text.get(10..)?;
    if rest.is_empty() {
        return Some((day.and_time(NaiveTime::MIN), None));
    }
    let rest = rest.strip_prefix(['T', 't', ' '])?;
    let zone_at = rest.find(['Z', 'z', '+', '-']).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at(zone_at);
    let offset = match zone.trim() {
        "" => None,
        "Z" | "z" => Some(0),
        zone => {
            let sign = if zone.starts_with('-') { -1 } else { 1 };
            let digits: String = zone.chars().filter(char::is_ascii_digit).collect();
            let (hours, minutes) = match digits.len() {
                2 => (digits.parse::<i32>().ok()?, 0),
                4 => (digits.get(..2)?.parse::<i32>().ok()?, digits.get(2..)?.parse::<i32>().ok()?),
                _ => return None,
            };
            (hours < 24 && minutes < 60).then_some(())?;
            Some(sign * (hours * 3600 + minutes * 60))
        }
    };
    Some((day.and_time(clock_time(clock.trim_end())?), offset))
}

/// `HH:MM`, `HH:MM:SS` or with a fraction of at most six digits (zeros may follow).
fn clock_time(text: &str) -> Option<NaiveTime> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut parts = whole.split(':');
    let mut number = || -> Option<Option<u32>> {
        match parts.next() {
            None => Some(None),
            Some(part) if part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit()) => {
                part.parse().ok().map(Some)
            }
            Some(_) => None,
        }
    };
    let (hour, minute, second) = (number()??, number()??, number()?.unwrap_or(0));
    number()?.is_none().then_some(())?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit())
        || fraction.get(6..).is_some_and(|rest| rest.bytes().any(|byte| byte != b'0'))
    {
        return None;
    }
    let micros: u32 = format!("{:0<6}", fraction.get(..6).unwrap_or(fraction)).parse().ok()?;
    NaiveTime::from_hms_micro_opt(hour, minute, second, micros)
}

const TIMESTAMP_SHAPE: &str =
    "is not a timestamp such as 2026-10-31 23:59:59, with at most six digits after the second";

/// Microseconds of a wall clock since 1970.
fn naive(text: &str, format: Option<&str>) -> Result<i64, Misfit> {
    let text = text.trim();
    match format {
        Some(format) => NaiveDateTime::parse_from_str(text, format)
            .map(|value| value.and_utc().timestamp_micros())
            .map_err(|_| Misfit(format!("is not a timestamp in the format `{format}`"))),
        None => match iso_timestamp(text) {
            Some((value, None)) => Ok(value.and_utc().timestamp_micros()),
            Some((_, Some(_))) => misfit("has a zone and the column has none: declare it `timestamptz`"),
            None => misfit(TIMESTAMP_SHAPE),
        },
    }
}

/// Microseconds since 1970 in UTC. Without an offset the stream's zone decides; in the hour that is repeated
/// in autumn, the first of the two is taken.
///
/// # Errors
///
/// A [`Misfit`] also for a wall-clock time that the zone skips.
pub fn instant(text: &str, format: Option<&str>, zone: Option<Tz>) -> Result<i64, Misfit> {
    let text = text.trim();
    let (local, offset) = match format {
        Some(format) => match DateTime::parse_from_str(text, format) {
            Ok(value) => return Ok(value.timestamp_micros()),
            Err(_) => match NaiveDateTime::parse_from_str(text, format) {
                Ok(value) => (value, None),
                Err(_) => return misfit(format!("is not a timestamp in the format `{format}`")),
            },
        },
        None => iso_timestamp(text).ok_or_else(|| Misfit(TIMESTAMP_SHAPE.to_owned()))?,
    };
    match (offset, zone) {
        (Some(seconds), _) => Ok(local.and_utc().timestamp_micros() - i64::from(seconds) * 1_000_000),
        (None, Some(zone)) => in_zone(&local, zone),
        (None, None) => misfit("has no zone: set `timezone:` on the source"),
    }
}

/// Microseconds since 1970 in UTC of what a clock in `zone` showed; of a repeated hour, the first.
///
/// # Errors
///
/// A [`Misfit`] for a time that the zone skips.
pub fn in_zone(local: &NaiveDateTime, zone: Tz) -> Result<i64, Misfit> {
    zone.from_local_datetime(local)
        .earliest()
        .map(|value| value.timestamp_micros())
        .ok_or_else(|| Misfit(format!("is a time that {zone} skips when clocks go forward")))
}

fn time(text: &str) -> Result<i64, Misfit> {
    use chrono::Timelike;
    let value = clock_time(text.trim()).ok_or_else(|| Misfit("is not a time such as 23:59:59".to_owned()))?;
    Ok(i64::from(value.num_seconds_from_midnight()) * 1_000_000 + i64::from(value.nanosecond() / 1_000))
}

/// The narrowest exact type that holds every text it was shown.
///
/// Numbers that look like identifiers stay text: a leading zero, or more than 18 digits. Decimals get room for
/// more digits than were seen, and never become floats.
#[derive(Debug, Default, Clone)]
pub struct Guess {
    seen: bool,
    text: bool,
    int: Option<()>,
    integer_digits: usize,
    decimals: usize,
    kinds: [usize; 4],
    count: usize,
}

const NUMBER: usize = 0;
const DATE: usize = 1;
const STAMP: usize = 2;
const BOOL: usize = 3;

impl Guess {
    /// Takes one value into account.
    pub fn see(&mut self, text: &str, rules: &TextRules) {
        self.seen = true;
        self.count += 1;
        if self.text {
            return;
        }
        if let Some((integer, decimals)) = number_shape(text, rules) {
            self.kinds[NUMBER] += 1;
            self.integer_digits = self.integer_digits.max(integer);
            self.decimals = self.decimals.max(decimals);
            if integer + decimals > 18 {
                self.text = true;
            }
        } else if date(text, rules.date.as_deref()).is_ok() {
            self.kinds[DATE] += 1;
        } else if naive(text, rules.timestamp.as_deref()).is_ok()
            || instant(text, rules.timestamp.as_deref(), None).is_ok()
        {
            self.kinds[STAMP] += 1;
            if rules.timestamp.is_none()
                && iso_timestamp(text.trim()).is_some_and(|(_, offset)| offset.is_some())
            {
                self.int = Some(());
            }
        } else if matches!(text, "true" | "false" | "TRUE" | "FALSE" | "True" | "False") {
            self.kinds[BOOL] += 1;
        } else {
            self.text = true;
        }
    }

    /// Says that the value was text in quotes in a format that has numbers of its own.
    pub fn see_text(&mut self) {
        self.seen = true;
        self.text = true;
    }

    /// The type that holds them all.
    pub fn column_type(&self) -> ColumnType {
        let all = |kind: usize| self.kinds.get(kind) == Some(&self.count);
        if !self.seen || self.text {
            ColumnType::String
        } else if all(NUMBER) && self.decimals == 0 {
            ColumnType::Int
        } else if all(NUMBER) {
            let scale = self.decimals;
            let precision = if self.integer_digits + scale <= 15 { 18 } else { 38 };
            ColumnType::Decimal { precision, scale: i8::try_from(scale).unwrap_or(18) }
        } else if all(DATE) {
            ColumnType::Date(None)
        } else if all(STAMP) && self.int.is_some() {
            ColumnType::TimestampTz(None)
        } else if all(STAMP) {
            ColumnType::Timestamp(None)
        } else if all(BOOL) {
            ColumnType::Bool
        } else {
            ColumnType::String
        }
    }
}

/// Digits before and after the mark of what is a number and not an identifier.
fn number_shape(text: &str, rules: &TextRules) -> Option<(usize, usize)> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (whole, fraction) = match digits.split_once(char::from(rules.decimal)) {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (digits, None),
    };
    let whole: Vec<u8> = whole.bytes().filter(|byte| Some(*byte) != rules.thousands).collect();
    let plain = |digits: &[u8]| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    if !plain(&whole) || fraction.is_some_and(|fraction| !plain(fraction.as_bytes())) {
        return None;
    }
    if whole.len() > 1 && whole.first() == Some(&b'0') {
        return None;
    }
    Some((whole.len(), fraction.map_or(0, str::len)))
}

/// The Arrow type that `column` has in `stream`.
pub fn arrow_type(column: &ColumnType, stream: &StreamSpec) -> DataType {
    effective(column.clone(), stream).arrow()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> TextRules {
        TextRules { decimal: b'.', thousands: None, date: None, timestamp: None, zone: None }
    }

    #[test]
    fn a_window_ends_where_no_clock_shows_an_earlier_time_again() {
        let at = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().to_utc();
        let half = Some(Overlap::Micros(1_800_000_000));
        #[rustfmt::skip]
        let cases = [
            // now                     overlap  end
            ("2026-10-25T23:59:59Z",   None,    "2026-10-25T23:59:59Z"),
            ("2026-10-24T23:59:59.5Z", None,    "2026-10-24T23:59:59.5Z"),
            // 02:00 the first time, and how long clocks show what they will show again.
            ("2026-10-25T00:00:00Z",   None,    "2026-10-25T00:00:00Z"),
            ("2026-10-25T00:00:00.7Z", None,    "2026-10-25T00:00:00Z"),
            ("2026-10-25T00:59:59.9Z", None,    "2026-10-25T00:00:00Z"),
            ("2026-10-25T00:20:00Z",   half,    "2026-10-25T00:20:00Z"),
            ("2026-10-25T00:50:00Z",   half,    "2026-10-25T00:30:00Z"),
            // 02:00 the second time.
            ("2026-10-25T01:00:00Z",   None,    "2026-10-25T00:00:00Z"),
            ("2026-10-25T01:40:00.5Z", None,    "2026-10-25T00:40:00.5Z"),
            ("2026-10-25T01:40:00Z",   half,    "2026-10-25T01:10:00Z"),
            ("2026-10-25T02:00:00Z",   None,    "2026-10-25T02:00:00Z"),
            // Nothing comes twice where clocks go forward.
            ("2026-03-29T01:00:00Z",   None,    "2026-03-29T01:00:00Z"),
        ];
        for (now, overlap, end) in cases {
            let found = last_closed_instant(at(now), Tz::Europe__Berlin, overlap);
            assert_eq!(found, at(end), "{now} {overlap:?}");
        }
    }

    #[test]
    fn a_decimal_is_exact_or_a_misfit() {
        for (text, precision, scale, expected) in [
            ("12.34", 18, 2, Ok(1234)),
            ("-0.05", 18, 2, Ok(-5)),
            ("12.3400", 18, 2, Ok(1234)),
            ("12.345", 18, 2, Err("has 3 decimal places and the column keeps 2")),
            ("1.5e3", 18, 2, Ok(150_000)),
            ("15e-1", 18, 2, Ok(150)),
            ("1e400", 18, 2, Err("has more digits than decimal(18,2) holds")),
            ("0e400", 18, 2, Ok(0)),
            ("999.99", 5, 2, Ok(99_999)),
            ("1000.00", 5, 2, Err("has more digits than decimal(5,2) holds")),
            ("99999999999999999999999999999999999999", 38, 0, Ok(10_i128.pow(38) - 1)),
            (
                "100000000000000000000000000000000000000",
                38,
                0,
                Err("has more digits than decimal(38,0) holds"),
            ),
            ("", 18, 2, Err("is not a number")),
            (".", 18, 2, Err("is not a number")),
            (".5", 18, 2, Ok(50)),
            ("NaN", 18, 2, Err("is not a number")),
            ("1,000", 18, 2, Err("is not a number")),
        ] {
            let outcome = decimal(text, b'.', None, precision, scale);
            assert_eq!(outcome, expected.map_err(|why| Misfit(why.to_owned())), "{text}");
        }
        assert_eq!(decimal("1.234.567,89", b',', Some(b'.'), 18, 2), Ok(123_456_789));
    }

    #[test]
    fn a_real_becomes_a_decimal_only_where_nothing_is_guessed() {
        let mut builder =
            ColumnBuilder::new(&ColumnType::Decimal { precision: 18, scale: 2 }, &rules(), 8).unwrap();
        assert_eq!(builder.real(1234.56), Ok(()));
        assert_eq!(
            builder.real(0.1 + 0.2),
            Err(Misfit("is a binary fraction that is no exact decimal".to_owned()))
        );
        assert!(builder.real(f64::NAN).is_err());
        assert!(builder.real(0.125).is_err());
        assert_eq!(builder.finish().len(), 1);
    }

    #[test]
    fn timestamps_keep_their_meaning() {
        let berlin = Some(chrono_tz::Europe::Berlin);
        let utc = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros();
        for (text, zone, expected) in [
            ("2026-07-01 12:00:00", berlin, Ok(utc("2026-07-01T10:00:00Z"))),
            ("2026-07-01T12:00:00.123456+09:00", None, Ok(utc("2026-07-01T03:00:00.123456Z"))),
            ("2026-10-25 02:30:00", berlin, Ok(utc("2026-10-25T00:30:00Z"))),
            ("2026-03-29 02:30:00", berlin, Err("is a time that Europe/Berlin skips when clocks go forward")),
            ("2026-07-01 12:00:00", None, Err("has no zone: set `timezone:` on the source")),
            ("2026-07-01 12:00:00.1234567Z", None, Err(TIMESTAMP_SHAPE)),
            ("2026-02-30 12:00:00Z", None, Err(TIMESTAMP_SHAPE)),
        ] {
            assert_eq!(instant(text, None, zone), expected.map_err(|why| Misfit(why.to_owned())), "{text}");
        }
    }

    #[test]
    fn identifiers_are_not_taken_for_numbers() {
        for (values, expected) in [
            (&["1", "20", "-3"][..], "int"),
            (&["1", "2.50"], "decimal(18,2)"),
            (&["12345678901234.5", "0.25"], "decimal(38,2)"),
            (&["007", "12"], "string"),
            (&["1234567890123456789"], "string"),
            (&["2026-10-31", "2026-11-01"], "date"),
            (&["2026-10-31 10:00:00"], "timestamp"),
            (&["2026-10-31T10:00:00Z"], "timestamptz"),
            (&["true", "false"], "bool"),
            (&["1", "x"], "string"),
            (&["2026-10-31", "1"], "string"),
            (&[], "string"),
        ] {
            let mut guess = Guess::default();
            for value in values {
                guess.see(value, &rules());
            }
            assert_eq!(guess.column_type().to_string(), expected, "{values:?}");
        }
    }

    proptest! {
        #[test]
        fn what_a_decimal_writes_it_reads(value in -(10_i128.pow(38) - 1)..10_i128.pow(38), scale in 0_i8..=38) {
            let text = arrow::datatypes::Decimal128Type::format_decimal(value, 38, scale);
            prop_assert_eq!(decimal(&text, b'.', None, 38, scale), Ok(value));
        }

        #[test]
        fn short_ways_come_to_the_same(text in "-?[0-9]{0,20}(\\.[0-9]{0,4})?", scale in 0_i8..6, precision in 1_u8..=38) {
            if let Some(short) = short_decimal(text.as_bytes(), b'.', precision, scale) {
                // Beyond what is short the number has a sign more, which changes nothing.
                let long = text.strip_prefix('-').map_or_else(|| format!("+{text}"), |text| format!("-0000000000000000000000{text}"));
                prop_assert_eq!(decimal(&long, b'.', None, precision, scale), Ok(short), "{}", text);
            }
        }

        #[test]
        fn every_day_is_the_calendars(days in -719_528..2_932_897_i32) {
            let day = NaiveDate::default() + chrono::TimeDelta::days(days.into());
            prop_assert_eq!(short_date(day.to_string().as_bytes()), Some(days));
        }

        #[test]
        fn what_is_no_day_is_none(year in 0..10_000, month in 0..14_u32, day in 0..33_u32) {
            let text = format!("{year:04}-{month:02}-{day:02}");
            let known = NaiveDate::from_ymd_opt(year, month, day).is_some();
            prop_assert_eq!(short_date(text.as_bytes()).is_some(), known, "{}", text);
        }

        #[test]
        fn no_text_makes_a_value_panic(text in "\\PC{0,24}") {
            for column in ["int", "decimal(5,2)", "float", "bool", "date", "timestamp", "timestamptz", "time", "binary"] {
                let mut builder = ColumnBuilder::new(&column.parse().unwrap(), &rules(), 1).unwrap();
                let fits = builder.text(&text).is_ok();
                prop_assert_eq!(builder.finish().len(), usize::from(fits));
            }
        }
    }

    use arrow::datatypes::DecimalType;
}
