//! Conditions of models in the server's SQL, where it surely keeps every row that meets them.
//!
//! The same operators mean the same for whole numbers, decimals, days, points in time and booleans. Text is compared for equality
//! only: how it is ordered is the server's business. Floats (`-0`), clocks without a zone that the job puts into one, and whatever
//! is shown in another form than the server's own are left to the model.

use chrono::TimeDelta;
use tokio_postgres::types::Type;

use super::{
    bounds::{literal, text},
    source::{ReadAs, Shape},
    types::Wire,
};
use crate::{
    connector::condition::{Comparison, Condition, Value},
    error::Result,
    names::quoted,
    watermark::CursorValue,
};

/// `condition` for a WHERE; `None` if nothing of it can be asked of the server. In the columns `nulled` a model may see nulls that the
/// server does not.
pub(super) fn sql(condition: &Condition, shape: &Shape, nulled: &[String]) -> Result<Option<String>> {
    Ok(match condition {
        Condition::Compares { column, by, value } => compares(shape, column, *by, value)?,
        Condition::OneOf { column, values } => {
            let equal = values.iter().map(|value| compares(shape, column, Comparison::Equal, value));
            equal.collect::<Result<Option<Vec<_>>>>()?.map(|parts| joined(&parts, " OR "))
        }
        Condition::Null { column, is: true } if nulled.contains(column) => None,
        Condition::Null { column, is } => match shape.column(column) {
            None => None,
            // A composite of nulls is null to the server.
            Some(known) if matches!(known.read, ReadAs::Wire(Wire::Struct(_), _)) => None,
            Some(known) => Some(format!("({}) IS {}NULL", known.sql()?, if *is { "" } else { "NOT " })),
        },
        Condition::All(parts) => {
            let known = parts.iter().filter_map(|part| sql(part, shape, nulled).transpose());
            let known = known.collect::<Result<Vec<_>>>()?;
            (!known.is_empty()).then(|| joined(&known, " AND "))
        }
        Condition::Any(parts) => {
            let known =
                parts.iter().map(|part| sql(part, shape, nulled)).collect::<Result<Option<Vec<_>>>>()?;
            known.map(|parts| joined(&parts, " OR "))
        }
    })
}

fn joined(parts: &[String], word: &str) -> String {
    format!("({})", parts.join(word))
}

fn compares(shape: &Shape, column: &str, by: Comparison, value: &Value) -> Result<Option<String>> {
    let Some(known) = shape.column(column) else { return Ok(None) };
    let ReadAs::Wire(wire, None) = &known.read else { return Ok(None) };
    let name = quoted(column)?;
    let at = |value| literal(&value, TimeDelta::zero());
    let literal = match (wire, value) {
        (Wire::Int2 | Wire::Int4 | Wire::Int8, Value::Int(value)) => at(CursorValue::Int(*value)),
        (Wire::Decimal { .. }, Value::Int(value)) => format!("({value})::numeric"),
        (Wire::Decimal { .. }, Value::Decimal(digits)) => format!("({digits})::numeric"),
        (Wire::Bool, Value::Bool(value)) => value.to_string(),
        (Wire::Date, Value::Date(day)) if is_written(*day) => at(CursorValue::Date(*day)),
        (Wire::Timestamp, Value::Timestamp { at, zoned: false }) if is_written(at.date_naive()) => {
            format!("{}::timestamp", text(&at.format("%Y-%m-%d %H:%M:%S%.6f").to_string()))
        }
        (Wire::TimestampTz, Value::Timestamp { at: instant, zoned: true })
            if is_written(instant.date_naive()) =>
        {
            at(CursorValue::Instant(*instant))
        }
        // What a server in another encoding cannot spell it refuses.
        (Wire::Text, Value::Text(value)) if value.is_ascii() && !value.contains('\0') => {
            return Ok(same_text(&name, &known.of, by, value));
        }
        _ => return Ok(None),
    };
    Ok(Some(format!("{name} {by} {literal}")))
}

/// Years that the server reads as they are written here.
fn is_written(day: chrono::NaiveDate) -> bool {
    use chrono::Datelike;
    (1..=9999).contains(&day.year())
}

/// Whether a text is, or is not, a value. A server that takes more for equal than we do gives more rows, and an index still serves.
fn same_text(name: &str, of: &Type, by: Comparison, value: &str) -> Option<String> {
    let is_plain = matches!(*of, Type::TEXT | Type::VARCHAR);
    let literal = text(value);
    match by {
        // Blanks at the end of a `character(n)` mean nothing to the server.
        Comparison::Equal if is_plain || *of == Type::BPCHAR => Some(format!("{name} = {literal}")),
        // An enum knows only its own values, and JSON no equality.
        Comparison::Equal => Some(format!("({name})::text = {literal}")),
        Comparison::NotEqual if is_plain => Some(format!("{name} COLLATE \"C\" <> {literal} COLLATE \"C\"")),
        _ => None,
    }
}
