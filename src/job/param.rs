//! Parameters: typed values that SQL names as `$name`.

use chrono::{DateTime, Datelike, NaiveDate, TimeDelta, Utc};
use sqlparser::ast::{CastKind, Expr, Value};

use super::ParamSpec;
use crate::types::ColumnType;

/// Why a value is none for its parameter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamError {
    /// The type is unknown.
    #[error("the type `{0}` is none for a parameter")]
    Type(String),
    /// The value does not fit.
    #[error("the value {0}")]
    Value(String),
    /// No value is given and there is no default.
    #[error("it has no default and was not given")]
    Missing,
}

/// A parameter's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    column: ColumnType,
    text: String,
}

impl Param {
    /// The value of a parameter: the one given, or its default at `as_of`.
    ///
    /// # Errors
    ///
    /// See [`ParamError`].
    pub fn of(spec: &ParamSpec, given: Option<&str>, as_of: DateTime<Utc>) -> Result<Self, ParamError> {
        let column: ColumnType = spec.r#type.parse().map_err(|_| ParamError::Type(spec.r#type.clone()))?;
        let text = given.or(spec.default.as_deref()).ok_or(ParamError::Missing)?;
        let text = match (&column, relative_day(text, as_of.date_naive())) {
            (ColumnType::Date(_), Some(day)) => day.to_string(),
            _ => text.to_owned(),
        };
        let misfit = |why: crate::connector::columns::Misfit| ParamError::Value(why.to_string());
        match &column {
            ColumnType::String | ColumnType::Json => {}
            ColumnType::Int => {
                text.parse::<i64>().map_err(|error| {
                    use std::num::IntErrorKind::{NegOverflow, PosOverflow};
                    ParamError::Value(match error.kind() {
                        PosOverflow | NegOverflow => "has more than 64 bits".to_owned(),
                        _ => "is not a whole number".to_owned(),
                    })
                })?;
            }
            ColumnType::Decimal { precision, scale } => {
                crate::connector::columns::decimal(&text, b'.', None, *precision, *scale).map_err(misfit)?;
            }
            ColumnType::Bool if matches!(text.as_str(), "true" | "false") => {}
            ColumnType::Date(_) => {
                crate::connector::columns::date(&text, None).map_err(misfit)?;
            }
            ColumnType::TimestampTz(_) => {
                crate::connector::columns::instant(&text, None, None).map_err(misfit)?;
            }
            ColumnType::Bool => return Err(ParamError::Value("is not true or false".to_owned())),
            other => return Err(ParamError::Type(other.to_string())),
        }
        Ok(Self { column, text })
    }

    /// The value as it is written outside SQL.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// In place of a value that was refused, so that the rest can be looked at.
    pub fn unknown() -> Self {
        Self { column: ColumnType::String, text: String::new() }
    }

    /// How a value of a type is written.
    pub fn example(r#type: &str) -> &'static str {
        match r#type.parse() {
            Ok(ColumnType::Int) => "such as `42`",
            Ok(ColumnType::Decimal { .. }) => "such as `12.50`",
            Ok(ColumnType::Bool) => "`true` or `false`",
            Ok(ColumnType::Date(_)) => {
                "such as `2026-10-31`, `today`, `yesterday`, `first_day_of_month` or `last_day_of_previous_month`"
            }
            Ok(ColumnType::TimestampTz(_)) => "such as `2026-10-31T08:00:00Z`",
            _ => "any text",
        }
    }

    /// The value as an SQL expression of its type. Text never becomes SQL.
    pub fn expression(&self) -> Expr {
        use sqlparser::ast::{DataType, ExactNumberInfo, TimezoneInfo};
        let data_type = match &self.column {
            ColumnType::Int => DataType::BigInt(None),
            ColumnType::Decimal { precision, scale } => DataType::Decimal(
                ExactNumberInfo::PrecisionAndScale(u64::from(*precision), i64::from(*scale)),
            ),
            ColumnType::Bool => DataType::Boolean,
            ColumnType::Date(_) => DataType::Date,
            ColumnType::TimestampTz(_) => DataType::Timestamp(None, TimezoneInfo::WithTimeZone),
            _ => return Expr::Value(Value::SingleQuotedString(self.text.clone()).into()),
        };
        Expr::Cast {
            kind: CastKind::Cast,
            expr: Box::new(Expr::Value(Value::SingleQuotedString(self.text.clone()).into())),
            data_type,
            array: false,
            format: None,
        }
    }
}

/// Days that are counted from `as_of`.
fn relative_day(word: &str, today: NaiveDate) -> Option<NaiveDate> {
    match word {
        "today" => Some(today),
        "yesterday" => today.pred_opt(),
        "first_day_of_month" => today.with_day(1),
        "last_day_of_previous_month" => today.with_day(1).map(|first| first - TimeDelta::days(1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_fits_its_type_or_says_why() {
        let as_of = DateTime::parse_from_rfc3339("2026-11-24T01:00:00Z").unwrap().to_utc();
        for (r#type, given, expected) in [
            ("date", "last_day_of_previous_month", Ok("2026-10-31")),
            ("date", "2026-02-30", Err(())),
            ("int", "4.5", Err(())),
            ("decimal(5,2)", "1.25", Ok("1.25")),
            ("decimal(5,2)", "1.255", Err(())),
            ("string", "'; drop table x", Ok("'; drop table x")),
            ("bool", "yes", Err(())),
            ("blob", "x", Err(())),
        ] {
            let spec = ParamSpec { r#type: r#type.to_owned(), default: None };
            let param = Param::of(&spec, Some(given), as_of).map(|param| param.text).map_err(drop);
            assert_eq!(param, expected.map(str::to_owned), "{type} {given}");
        }
    }

    #[test]
    fn text_never_becomes_sql() {
        let spec = ParamSpec { r#type: "string".to_owned(), default: None };
        let param = Param::of(&spec, Some("x' or '1'='1"), DateTime::default()).unwrap();
        assert_eq!(param.expression().to_string(), "'x'' or ''1''=''1'");
    }
}
