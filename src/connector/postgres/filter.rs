//! Conditions of models in the server's SQL, where it surely keeps every row that meets them.
//!
//! The same operators mean the same for whole numbers, decimals, days, points in time and booleans. Text is compared for equality
//! only: how it is ordered is the server's business. Floats (`-0`), clocks without a zone that the job puts into one, and whatever
//! is shown in another form than the server's own are left to the model.

use super::{
    bounds::text,
    source::{ReadAs, Shape},
    types::Wire,
};
use crate::{
    connector::condition::{Comparison, Condition, Value},
    error::Result,
    names::quoted,
};

/// `condition` for a WHERE; `None` if nothing of it can be asked of the server.
pub(super) fn sql(condition: &Condition, shape: &Shape) -> Result<Option<String>> {
    Ok(match condition {
        Condition::Compares { column, by, value } => compares(shape, column, *by, value)?,
        Condition::OneOf { column, values } => {
            let equal = values.iter().map(|value| compares(shape, column, Comparison::Equal, value));
            equal.collect::<Result<Option<Vec<_>>>>()?.map(|parts| joined(&parts, " OR "))
        }
        Condition::Null { column, is } => match shape.column(column).map(|column| &column.read) {
            // A composite of nulls is null to the server.
            Some(ReadAs::Wire(Wire::Struct(_), _)) | None => None,
            Some(_) => Some(format!("{} IS {}NULL", quoted(column)?, if *is { "" } else { "NOT " })),
        },
        Condition::All(parts) => {
            let known = parts.iter().filter_map(|part| sql(part, shape).transpose());
            Some(known.collect::<Result<Vec<_>>>()?)
                .filter(|parts| !parts.is_empty())
                .map(|p| joined(&p, " AND "))
        }
        Condition::Any(parts) => {
            let known = parts.iter().map(|part| sql(part, shape)).collect::<Result<Option<Vec<_>>>>()?;
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
    let literal = match (wire, value) {
        (Wire::Int2 | Wire::Int4 | Wire::Int8, Value::Int(value)) => format!("({value})::int8"),
        (Wire::Decimal { .. }, Value::Int(value)) => format!("({value})::numeric"),
        (Wire::Decimal { .. }, Value::Decimal(digits)) => format!("({digits})::numeric"),
        (Wire::Bool, Value::Bool(value)) => value.to_string(),
        (Wire::Date, Value::Date(day)) if is_written(*day) => format!("{}::date", text(&day.to_string())),
        (Wire::Timestamp, Value::Timestamp { at, zoned: false }) if is_written(at.date_naive()) => {
            format!("{}::timestamp", text(&at.format("%Y-%m-%d %H:%M:%S%.6f").to_string()))
        }
        (Wire::TimestampTz, Value::Timestamp { at, zoned: true }) if is_written(at.date_naive()) => {
            format!("{}::timestamptz", text(&at.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string()))
        }
        // What a server in another encoding cannot spell it refuses.
        (Wire::Text, Value::Text(value)) if value.is_ascii() && !value.contains('\0') => {
            return Ok(same_text(&name, known.type_name.as_deref(), by, value));
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
fn same_text(name: &str, type_name: Option<&str>, by: Comparison, value: &str) -> Option<String> {
    let is_plain = type_name.is_none_or(|of| of.starts_with("character varying"));
    // Blanks at its end mean nothing to it.
    let is_padded =
        type_name.is_some_and(|of| of.starts_with("character") && !of.starts_with("character varying"));
    let literal = text(value);
    match by {
        Comparison::Equal if is_plain || is_padded => Some(format!("{name} = {literal}")),
        // An enum knows only its own values.
        Comparison::Equal => Some(format!("({name})::text = {literal}")),
        Comparison::NotEqual if is_plain => Some(format!("{name} COLLATE \"C\" <> {literal} COLLATE \"C\"")),
        _ => None,
    }
}
