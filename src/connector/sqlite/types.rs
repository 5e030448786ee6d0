//! SQLite's types and ours.
//!
//! In: a declared type gives the column's type, and every value's storage class is checked against it. Out: types
//! are declared so that SQLite keeps what it is given. A decimal is canonical text in a column of TEXT
//! affinity: NUMERIC affinity would turn it into a binary fraction. The declared names say what the text is, so
//! that floodmark reads its own tables back with their types.

use arrow::datatypes::{DataType, TimeUnit};

use crate::{
    error::{Error, Result},
    types::ColumnType,
};

/// The type of a column declared as `declared`; `None` if the declaration says nothing about the values.
pub(super) fn declared_type(declared: &str) -> Option<ColumnType> {
    let declared = declared.trim().to_ascii_uppercase();
    let name = declared.split('(').next().unwrap_or_default().trim();
    let arguments = declared.split_once('(').map(|(_, rest)| rest.trim_end_matches(')').to_owned());
    match name {
        "" | "ANY" => None,
        "DECIMAL" | "NUMERIC" | "DECIMAL_TEXT" | "MONEY" => arguments
            .and_then(|arguments| format!("decimal({arguments})").parse().ok())
            .or(Some(ColumnType::String)),
        "BOOLEAN" | "BOOL" => Some(ColumnType::Bool),
        "DATE" | "DATE_TEXT" => Some(ColumnType::Date(None)),
        "DATETIME" | "TIMESTAMP" | "TIMESTAMP_TEXT" => Some(ColumnType::Timestamp(None)),
        "TIMESTAMPTZ" | "TIMESTAMPTZ_TEXT" | "TIMESTAMP WITH TIME ZONE" => {
            Some(ColumnType::TimestampTz(None))
        }
        "TIME" | "TIME_TEXT" => Some(ColumnType::Time),
        "JSON" => Some(ColumnType::Json),
        _ if name.contains("INT") => Some(ColumnType::Int),
        _ if ["CHAR", "CLOB", "TEXT"].iter().any(|word| name.contains(word)) => Some(ColumnType::String),
        _ if name.contains("BLOB") => Some(ColumnType::Binary),
        _ if ["REAL", "FLOA", "DOUB"].iter().any(|word| name.contains(word)) => Some(ColumnType::Float),
        _ => Some(ColumnType::String),
    }
}

/// How a column of `data_type` is declared.
///
/// # Errors
///
/// If SQLite has no exact counterpart.
pub(super) fn declaration(name: &str, data_type: &DataType) -> Result<String> {
    Ok(match data_type {
        DataType::Utf8 => "TEXT".to_owned(),
        DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32 => "INTEGER".to_owned(),
        DataType::Decimal128(precision, scale) => format!("DECIMAL_TEXT({precision},{scale})"),
        DataType::Float32 | DataType::Float64 => "REAL".to_owned(),
        DataType::Boolean => "BOOLEAN".to_owned(),
        DataType::Date32 => "DATE_TEXT".to_owned(),
        DataType::Timestamp(TimeUnit::Microsecond, None) => "TIMESTAMP_TEXT".to_owned(),
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "TIMESTAMPTZ_TEXT".to_owned(),
        DataType::Time64(TimeUnit::Microsecond) => "TIME_TEXT".to_owned(),
        DataType::Binary => "BLOB".to_owned(),
        other => {
            return Err(Error::configuration(format!(
                "column `{name}` is {other}, which SQLite cannot hold"
            ))
            .hint("Cast it in the model, for example to text."));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_floodmark_declares_it_reads_back_as_the_same_type() {
        for written in [
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
        ] {
            let column: ColumnType = written.parse().unwrap();
            let declared = declaration("c", &column.arrow()).unwrap();
            assert_eq!(declared_type(&declared), Some(column), "{declared}");
        }
    }

    #[test]
    fn decimals_never_get_numeric_affinity() {
        let declared = declaration("c", &DataType::Decimal128(18, 2)).unwrap();
        assert!(
            declared.contains("TEXT") && !declared.contains("INT"),
            "{declared}: SQLite's affinity rules 1 and 2"
        );
    }
}
