//! Conditions of models that a source may apply by itself, as plain data.
//!
//! A condition is a permission: a source may leave out rows that do not meet it, and never one that does. What it gives is
//! filtered once more, so that a server's own idea of text or time cannot change a result.

use std::fmt;

use arrow::datatypes::{DataType, Decimal128Type, DecimalType, Schema};
use chrono::{DateTime, NaiveDate};
use datafusion::{
    logical_expr::{
        BinaryExpr, Expr, Operator,
        expr::{Between, Cast, InList},
    },
    scalar::ScalarValue,
};

use crate::functions::cast::{can_fail, can_lose};

/// What a row must meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// A column stands so to a value. Null meets it never.
    Compares {
        /// The column.
        column: String,
        /// How.
        by: Comparison,
        /// The value.
        value: Value,
    },
    /// A column is one of these values.
    OneOf {
        /// The column.
        column: String,
        /// The values.
        values: Vec<Value>,
    },
    /// A column is null, or is not.
    Null {
        /// The column.
        column: String,
        /// Whether it is.
        is: bool,
    },
    /// All of these.
    All(Vec<Self>),
    /// At least one of these.
    Any(Vec<Self>),
}

/// How a column stands to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `<>`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    More,
    /// `>=`
    AtLeast,
}

/// A value that a condition names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// An exact number, by its digits.
    Decimal(String),
    /// Text.
    Text(String),
    /// A day.
    Date(NaiveDate),
    /// A point in time or, without a zone, on somebody's clock.
    Timestamp {
        /// In UTC, to the microsecond.
        at: DateTime<chrono::Utc>,
        /// Whether it is a point in time.
        zoned: bool,
    },
}

impl Condition {
    /// What `filter` asks of a row of `schema` at least; `None` if nothing can be said of single columns and values.
    pub fn of(filter: &Expr, schema: &Schema) -> Option<Self> {
        let column = |of: &Expr| column(of, schema);
        let is = |of: &Expr, is| {
            Some(Self::Compares { column: column(of)?, by: Comparison::Equal, value: Value::Bool(is) })
        };
        match filter {
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::And, right }) => {
                match (Self::of(left, schema), Self::of(right, schema)) {
                    (Some(left), Some(right)) => Some(Self::All(vec![left, right])),
                    (one, other) => one.or(other),
                }
            }
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::Or, right }) => {
                Some(Self::Any(vec![Self::of(left, schema)?, Self::of(right, schema)?]))
            }
            Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
                let by = Comparison::of(*op)?;
                let (column, by, value) = match (column(left), column(right)) {
                    (Some(column), None) => (column, by, Value::of(right)?),
                    (None, Some(column)) => (column, by.turned(), Value::of(left)?),
                    _ => return None,
                };
                // How text is ordered is each system's own business.
                let ordered = !matches!(by, Comparison::Equal | Comparison::NotEqual);
                (!ordered || !matches!(value, Value::Text(_))).then_some(Self::Compares { column, by, value })
            }
            Expr::Between(Between { expr, negated: false, low, high }) => {
                let bound =
                    |by, value| Some(Self::Compares { column: column(expr)?, by, value: Value::of(value)? });
                let ends = [bound(Comparison::AtLeast, low)?, bound(Comparison::AtMost, high)?];
                let is_text =
                    ends.iter().any(|end| matches!(end, Self::Compares { value: Value::Text(_), .. }));
                (!is_text).then_some(Self::All(ends.into()))
            }
            Expr::InList(InList { expr, list, negated }) => {
                let column = column(expr)?;
                let values = list.iter().map(Value::of).collect::<Option<Vec<_>>>()?;
                let differs =
                    |value| Self::Compares { column: column.clone(), by: Comparison::NotEqual, value };
                Some(if *negated {
                    Self::All(values.into_iter().map(differs).collect())
                } else {
                    Self::OneOf { column, values }
                })
            }
            Expr::IsNull(of) => Some(Self::Null { column: column(of)?, is: true }),
            Expr::IsNotNull(of) => Some(Self::Null { column: column(of)?, is: false }),
            Expr::Column(_) => is(filter, true),
            Expr::IsTrue(of) => is(of, true),
            Expr::Not(of) | Expr::IsFalse(of) => is(of, false),
            _ => None,
        }
    }
}

/// The column that an expression is; also one that is cast so that no value and no order can change.
fn column(of: &Expr, schema: &Schema) -> Option<String> {
    match of {
        Expr::Column(column) => Some(column.name.clone()),
        Expr::Cast(Cast { expr, field }) => {
            let name = column(expr, schema)?;
            let (from, to) = (schema.field_with_name(&name).ok()?.data_type(), field.data_type());
            let exact = |of: &DataType| of.is_integer() || matches!(of, DataType::Decimal128(..));
            (exact(from) && exact(to) && !can_lose(from, to) && !can_fail(from, to)).then_some(name)
        }
        _ => None,
    }
}

impl Comparison {
    fn of(operator: Operator) -> Option<Self> {
        Some(match operator {
            Operator::Eq => Self::Equal,
            Operator::NotEq => Self::NotEqual,
            Operator::Lt => Self::Less,
            Operator::LtEq => Self::AtMost,
            Operator::Gt => Self::More,
            Operator::GtEq => Self::AtLeast,
            _ => return None,
        })
    }

    /// The same with its sides exchanged.
    fn turned(self) -> Self {
        match self {
            Self::Equal | Self::NotEqual => self,
            Self::Less => Self::More,
            Self::AtMost => Self::AtLeast,
            Self::More => Self::Less,
            Self::AtLeast => Self::AtMost,
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equal => "=",
            Self::NotEqual => "<>",
            Self::Less => "<",
            Self::AtMost => "<=",
            Self::More => ">",
            Self::AtLeast => ">=",
        })
    }
}

impl Value {
    fn of(literal: &Expr) -> Option<Self> {
        let Expr::Literal(value, _) = literal else { return None };
        let timestamp = |micros: i64, zone: &Option<std::sync::Arc<str>>| {
            let at = DateTime::from_timestamp_micros(micros)?;
            Some(Self::Timestamp { at, zoned: zone.is_some() })
        };
        match value {
            ScalarValue::Boolean(Some(value)) => Some(Self::Bool(*value)),
            ScalarValue::Int8(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::Int16(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::Int32(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::Int64(Some(value)) => Some(Self::Int(*value)),
            ScalarValue::UInt8(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::UInt16(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::UInt32(Some(value)) => Some(Self::Int((*value).into())),
            ScalarValue::Decimal128(Some(value), precision, scale) => {
                Some(Self::Decimal(Decimal128Type::format_decimal(*value, *precision, *scale)))
            }
            ScalarValue::Utf8(Some(text))
            | ScalarValue::LargeUtf8(Some(text))
            | ScalarValue::Utf8View(Some(text)) => Some(Self::Text(text.clone())),
            ScalarValue::Date32(Some(days)) => NaiveDate::from_epoch_days(*days).map(Self::Date),
            ScalarValue::TimestampMicrosecond(Some(micros), zone) => timestamp(*micros, zone),
            ScalarValue::TimestampNanosecond(Some(nanos), zone) if nanos % 1000 == 0 => {
                timestamp(nanos / 1000, zone)
            }
            _ => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Decimal(digits) => f.write_str(digits),
            Self::Text(text) => write!(f, "'{}'", text.replace('\'', "''")),
            Self::Date(day) => write!(f, "'{day}'"),
            Self::Timestamp { at, zoned: true } => write!(f, "'{}'", at.format("%Y-%m-%d %H:%M:%S%.fZ")),
            Self::Timestamp { at, zoned: false } => write!(f, "'{}'", at.format("%Y-%m-%d %H:%M:%S%.f")),
        }
    }
}

impl fmt::Display for Condition {
    /// As people read it: `amount >= 0 and region in ('DE', 'AT')`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>, parts: &[Self], word: &str| {
            for (index, part) in parts.iter().enumerate() {
                if index > 0 {
                    write!(f, " {word} ")?;
                }
                match part {
                    Self::All(_) | Self::Any(_) => write!(f, "({part})")?,
                    _ => write!(f, "{part}")?,
                }
            }
            Ok(())
        };
        match self {
            Self::Compares { column, by, value } => write!(f, "{column} {by} {value}"),
            Self::OneOf { column, values } => {
                let values: Vec<String> = values.iter().map(Value::to_string).collect();
                write!(f, "{column} in ({})", values.join(", "))
            }
            Self::Null { column, is } => write!(f, "{column} is {}null", if *is { "" } else { "not " }),
            Self::All(parts) => joined(f, parts, "and"),
            Self::Any(parts) => joined(f, parts, "or"),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::{Field, TimeUnit};
    use datafusion::prelude::{col, lit};

    use super::*;

    fn schema() -> Schema {
        Schema::new(vec![
            Field::new("id", DataType::Int32, false),
            Field::new("amount", DataType::Decimal128(18, 2), true),
            Field::new("name", DataType::Utf8, true),
            Field::new("share", DataType::Float64, true),
            Field::new("active", DataType::Boolean, true),
            Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
        ])
    }

    #[test]
    fn what_is_said_of_columns_and_values_is_understood() {
        let wide = |of: &str, to| Expr::Cast(Cast::new(Box::new(col(of)), to));
        for (filter, expected) in [
            (col("id").gt(lit(5)), Some("id > 5")),
            (lit(5).gt(col("id")), Some("id < 5")),
            (wide("id", DataType::Int64).lt_eq(lit(5_i64)), Some("id <= 5")),
            (wide("id", DataType::Float64).lt_eq(lit(5.0)), None),
            (
                wide("amount", DataType::Decimal128(20, 2)).eq(lit(ScalarValue::Decimal128(
                    Some(-150),
                    20,
                    2,
                ))),
                Some("amount = -1.50"),
            ),
            (
                wide("amount", DataType::Decimal128(18, 1)).eq(lit(ScalarValue::Decimal128(Some(15), 18, 1))),
                None,
            ),
            (col("name").in_list(vec![lit("a"), lit("it's")], false), Some("name in ('a', 'it''s')")),
            (col("name").in_list(vec![lit("a"), lit("b")], true), Some("name <> 'a' and name <> 'b'")),
            (col("name").in_list(vec![lit("a"), lit(ScalarValue::Utf8(None))], true), None),
            (col("id").between(lit(1), lit(9)), Some("id >= 1 and id <= 9")),
            (col("id").not_between(lit(1), lit(9)), None),
            (col("name").gt(lit("a")), None),
            (col("name").is_null().or(col("id").eq(lit(1))), Some("name is null or id = 1")),
            (col("share").gt(col("id")).or(col("id").eq(lit(1))), None),
            // A part of what must all hold is a condition, too.
            (col("share").gt(col("id")).and(col("id").eq(lit(1))), Some("id = 1")),
            (!(col("share").gt(col("id")).and(col("id").eq(lit(1)))), None),
            (col("active"), Some("active = true")),
            (!col("active"), Some("active = false")),
            (col("at").lt(lit(ScalarValue::TimestampNanosecond(Some(1), None))), None),
            (
                col("at").lt(lit(ScalarValue::TimestampNanosecond(Some(1000), None))),
                Some("at < '1970-01-01 00:00:00.000001'"),
            ),
        ] {
            let condition = Condition::of(&filter, &schema()).map(|condition| condition.to_string());
            assert_eq!(condition.as_deref(), expected, "{filter}");
        }
    }
}
