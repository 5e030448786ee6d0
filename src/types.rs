//! The types that a job file can name, and what they are in Arrow.
//!
//! A column without a declared type gets one from its source; a declared type wins. Every type here is exact:
//! `float` is the one that is not, and nothing becomes a float unless a user or a database says so.

use std::{fmt, str::FromStr, sync::Arc};

use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, TimeUnit};

/// A column's type as written in `columns:`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ColumnType {
    /// Text, as it stands.
    String,
    /// A whole number of 64 bits.
    Int,
    /// An exact number of `precision` digits, `scale` of them after the point.
    Decimal {
        /// Digits in all, 1 to 38.
        precision: u8,
        /// Digits after the point, 0 to `precision`.
        scale: i8,
    },
    /// A binary fraction of 64 bits. Not for money.
    Float,
    /// True or false.
    Bool,
    /// A day, read by a `strftime` format, or as `2026-10-31`.
    Date(Option<String>),
    /// A point on somebody's wall clock, without a zone; microseconds.
    Timestamp(Option<String>),
    /// A point in time, kept in UTC; microseconds.
    TimestampTz(Option<String>),
    /// A time of day; microseconds.
    Time,
    /// Bytes; written as hexadecimal text where only text can be written.
    Binary,
    /// A JSON document, kept as its text.
    Json,
}

/// The one zone that timestamps with a zone have inside floodmark.
pub const UTC: &str = "+00:00";

impl ColumnType {
    /// The Arrow type.
    pub fn arrow(&self) -> DataType {
        match self {
            Self::String | Self::Json => DataType::Utf8,
            Self::Int => DataType::Int64,
            Self::Decimal { precision, scale } => DataType::Decimal128(*precision, *scale),
            Self::Float => DataType::Float64,
            Self::Bool => DataType::Boolean,
            Self::Date(_) => DataType::Date32,
            Self::Timestamp(_) => DataType::Timestamp(TimeUnit::Microsecond, None),
            Self::TimestampTz(_) => DataType::Timestamp(TimeUnit::Microsecond, Some(Arc::from(UTC))),
            Self::Time => DataType::Time64(TimeUnit::Microsecond),
            Self::Binary => DataType::Binary,
        }
    }
}

impl fmt::Display for ColumnType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, format) = match self {
            Self::String => ("string", None),
            Self::Int => ("int", None),
            Self::Decimal { precision, scale } => return write!(f, "decimal({precision},{scale})"),
            Self::Float => ("float", None),
            Self::Bool => ("bool", None),
            Self::Date(format) => ("date", format.as_ref()),
            Self::Timestamp(format) => ("timestamp", format.as_ref()),
            Self::TimestampTz(format) => ("timestamptz", format.as_ref()),
            Self::Time => ("time", None),
            Self::Binary => ("binary", None),
            Self::Json => ("json", None),
        };
        match format {
            Some(format) => write!(f, "{name}({format})"),
            None => f.write_str(name),
        }
    }
}

/// Why a written type is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// The word before the bracket is no type.
    #[error("there is no type `{0}`")]
    Unknown(String),
    /// A decimal's numbers do not work.
    #[error(
        "a decimal is written `decimal(precision,scale)`, with 1 to 38 digits and no more decimals than digits"
    )]
    Decimal,
    /// A format's percent signs do not work.
    #[error("`{0}` is not a date format")]
    Format(String),
    /// A bracket after a type that takes none.
    #[error("the type `{0}` takes nothing in brackets")]
    NoArguments(String),
}

/// The words for types, for hints.
pub const TYPE_NAMES: [&str; 11] = [
    "string",
    "int",
    "decimal(18,2)",
    "float",
    "bool",
    "date",
    "timestamp",
    "timestamptz",
    "time",
    "binary",
    "json",
];

impl FromStr for ColumnType {
    type Err = TypeError;

    fn from_str(written: &str) -> Result<Self, TypeError> {
        let written = written.trim();
        let (name, argument) = match written.split_once('(') {
            Some((name, rest)) => {
                let argument =
                    rest.strip_suffix(')').ok_or_else(|| TypeError::Unknown(written.to_owned()))?;
                (name.trim(), Some(argument.trim()))
            }
            None => (written, None),
        };
        let format = || match argument {
            Some(format) => {
                let bad = chrono::format::StrftimeItems::new(format)
                    .any(|item| matches!(item, chrono::format::Item::Error));
                if bad || format.is_empty() {
                    Err(TypeError::Format(format.to_owned()))
                } else {
                    Ok(Some(format.to_owned()))
                }
            }
            None => Ok(None),
        };
        let plain = |this: Self| match argument {
            Some(_) => Err(TypeError::NoArguments(name.to_owned())),
            None => Ok(this),
        };
        match name.to_ascii_lowercase().as_str() {
            "string" | "text" | "varchar" => plain(Self::String),
            "int" | "integer" | "bigint" => plain(Self::Int),
            "decimal" | "numeric" => {
                let (precision, scale) = argument
                    .and_then(|argument| argument.split_once(',').or(Some((argument, "0"))))
                    .and_then(|(p, s)| Some((p.trim().parse::<u8>().ok()?, s.trim().parse::<i8>().ok()?)))
                    .ok_or(TypeError::Decimal)?;
                let fits = (1..=DECIMAL128_MAX_PRECISION).contains(&precision)
                    && u8::try_from(scale).is_ok_and(|scale| scale <= precision);
                if fits { Ok(Self::Decimal { precision, scale }) } else { Err(TypeError::Decimal) }
            }
            "float" | "double" => plain(Self::Float),
            "bool" | "boolean" => plain(Self::Bool),
            "date" => Ok(Self::Date(format()?)),
            "timestamp" => Ok(Self::Timestamp(format()?)),
            "timestamptz" => Ok(Self::TimestampTz(format()?)),
            "time" => plain(Self::Time),
            "binary" => plain(Self::Binary),
            "json" => plain(Self::Json),
            _ => Err(TypeError::Unknown(name.to_owned())),
        }
    }
}

/// A type as people read it: the words of `columns:` where there is one, else Arrow's own name.
pub fn describe(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "string".to_owned(),
        DataType::Int64 => "int".to_owned(),
        DataType::Decimal128(precision, scale) => format!("decimal({precision},{scale})"),
        DataType::Float64 => "float".to_owned(),
        DataType::Boolean => "bool".to_owned(),
        DataType::Date32 => "date".to_owned(),
        DataType::Timestamp(TimeUnit::Microsecond, None) => "timestamp".to_owned(),
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "timestamptz".to_owned(),
        DataType::Time64(TimeUnit::Microsecond) => "time".to_owned(),
        DataType::Binary | DataType::BinaryView => "binary".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_reads_back_as_it_is_written() {
        for written in [
            "string",
            "int",
            "decimal(18,2)",
            "decimal(38,0)",
            "float",
            "bool",
            "date",
            "date(%d.%m.%Y)",
            "timestamp",
            "timestamp(%d.%m.%Y %H:%M)",
            "timestamptz",
            "time",
            "binary",
            "json",
        ] {
            assert_eq!(written.parse::<ColumnType>().unwrap().to_string(), written);
        }
    }

    #[test]
    fn what_is_no_type_says_why() {
        for (written, expected) in [
            ("strng", TypeError::Unknown("strng".to_owned())),
            ("decimal", TypeError::Decimal),
            ("decimal(39,2)", TypeError::Decimal),
            ("decimal(4,5)", TypeError::Decimal),
            ("date(%Q%)", TypeError::Format("%Q%".to_owned())),
            ("int(4)", TypeError::NoArguments("int".to_owned())),
        ] {
            assert_eq!(written.parse::<ColumnType>(), Err(expected), "{written}");
        }
    }
}
