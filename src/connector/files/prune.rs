//! Row groups of a Parquet file in which no row meets what models ask for, by what the file says of their values.
//!
//! Least and greatest values are believed of whole numbers, exact numbers, days and points in time, where the file has the stream's own
//! type; of text, floats and everything else nothing is concluded. A group of which nothing is said is read.

use std::sync::Arc;

use ::parquet::{
    arrow::arrow_reader::{ArrowReaderMetadata, statistics::StatisticsConverter},
    errors::ParquetError,
    file::statistics::Statistics,
};
use arrow::{
    array::{
        Array, ArrayRef, BooleanArray, Date32Array, Datum, Decimal128Array, Int64Array, Scalar,
        TimestampMicrosecondArray, UInt64Array,
    },
    compute::{CastOptions, cast_with_options, kernels::cmp},
    datatypes::{DataType, TimeUnit},
    error::ArrowError,
};

use crate::connector::{
    columns::decimal,
    condition::{Comparison, Condition, Value},
    scan::Scan,
};

/// For each row group whether a row in it may meet all conditions of the scan.
pub(super) fn wanted(file: &ArrowReaderMetadata, scan: &Scan) -> Vec<bool> {
    let mut wanted = vec![true; file.metadata().num_row_groups()];
    for condition in &scan.conditions {
        if let Some(may_hold) = groups(condition, file, scan) {
            wanted.iter_mut().zip(may_hold).for_each(|(wanted, may)| *wanted &= may);
        }
    }
    wanted
}

/// For each row group whether a condition may hold there; `None` if nothing can be said.
fn groups(condition: &Condition, file: &ArrowReaderMetadata, scan: &Scan) -> Option<Vec<bool>> {
    match condition {
        Condition::Compares { column, by, value } => Said::of(column, file, scan)?.compares(*by, value),
        Condition::OneOf { column, values } => {
            let said = Said::of(column, file, scan)?;
            any(values.iter().map(|value| said.compares(Comparison::Equal, value)))
        }
        Condition::Null { column, is } => Said::of(column, file, scan)?.nulls(*is),
        Condition::All(parts) => {
            let known = parts.iter().filter_map(|part| groups(part, file, scan));
            known.reduce(|one, other| one.into_iter().zip(other).map(|(one, other)| one && other).collect())
        }
        Condition::Any(parts) => any(parts.iter().map(|part| groups(part, file, scan))),
    }
}

/// Where at least one may hold.
fn any(parts: impl Iterator<Item = Option<Vec<bool>>>) -> Option<Vec<bool>> {
    let parts = parts.collect::<Option<Vec<_>>>()?;
    parts
        .into_iter()
        .reduce(|one, other| one.into_iter().zip(other).map(|(one, other)| one || other).collect())
}

/// What a file says of one column, row group by row group.
struct Said {
    least: ArrayRef,
    greatest: ArrayRef,
    nulls: UInt64Array,
    rows: Vec<u64>,
}

impl Said {
    fn of(column: &str, file: &ArrowReaderMetadata, scan: &Scan) -> Option<Self> {
        let known = file.schema().field_with_name(column).ok()?;
        let read = scan.stream.declared(column).map_or_else(
            || known.data_type().clone(),
            |declared| crate::connector::columns::arrow_type(&declared, &scan.stream),
        );
        if known.data_type() != &read {
            return None;
        }
        let groups = file.metadata().row_groups();
        let said = || -> Result<Self, ParquetError> {
            let converter = StatisticsConverter::try_new(column, file.schema(), file.parquet_schema())?;
            let at = converter.parquet_column_index();
            let chunks = groups.iter().filter_map(|group| group.columns().get(at?)?.statistics());
            let is_old = |said: &Statistics| {
                said.is_min_max_deprecated()
                    && (said.min_bytes_opt().is_some() || said.max_bytes_opt().is_some())
            };
            if chunks.into_iter().any(is_old) {
                // They were ordered as signed bytes, whatever they are.
                return Err(ParquetError::General("of an old writer".to_owned()));
            }
            Ok(Self {
                least: converter.row_group_mins(groups)?,
                greatest: converter.row_group_maxes(groups)?,
                nulls: converter.with_missing_null_counts_as_zero(false).row_group_null_counts(groups)?,
                rows: groups.iter().map(|group| group.num_rows().unsigned_abs()).collect(),
            })
        };
        said().ok()
    }

    fn compares(&self, by: Comparison, value: &Value) -> Option<Vec<bool>> {
        let value = scalar(value, self.least.data_type())?;
        let value: &dyn Datum = &value;
        let (least, greatest): (&dyn Datum, &dyn Datum) = (&self.least, &self.greatest);
        let may_hold = || -> Result<Vec<bool>, ArrowError> {
            let unless_false = |array: &BooleanArray, at: usize| array.is_null(at) || array.value(at);
            let one = |array: BooleanArray| (0..array.len()).map(|at| unless_false(&array, at)).collect();
            Ok(match by {
                Comparison::Less => one(cmp::lt(least, value)?),
                Comparison::AtMost => one(cmp::lt_eq(least, value)?),
                Comparison::More => one(cmp::gt(greatest, value)?),
                Comparison::AtLeast => one(cmp::gt_eq(greatest, value)?),
                Comparison::Equal => {
                    let (from, to) = (cmp::lt_eq(least, value)?, cmp::gt_eq(greatest, value)?);
                    (0..from.len()).map(|at| unless_false(&from, at) && unless_false(&to, at)).collect()
                }
                Comparison::NotEqual => {
                    let (from, to) = (cmp::neq(least, value)?, cmp::neq(greatest, value)?);
                    (0..from.len()).map(|at| unless_false(&from, at) || unless_false(&to, at)).collect()
                }
            })
        };
        may_hold().ok()
    }

    fn nulls(&self, is: bool) -> Option<Vec<bool>> {
        let nulls = self.nulls.iter().zip(&self.rows);
        Some(
            nulls
                .map(|(nulls, rows)| nulls.is_none_or(|nulls| if is { nulls > 0 } else { nulls < *rows }))
                .collect(),
        )
    }
}

/// A value as one of a column's type, if it is one without loss.
fn scalar(value: &Value, of: &DataType) -> Option<Scalar<ArrayRef>> {
    let array: ArrayRef = match (value, of) {
        (Value::Int(value), of) if of.is_integer() => {
            let options = CastOptions { safe: false, ..CastOptions::default() };
            cast_with_options(&Int64Array::from(vec![*value]), of, &options).ok()?
        }
        (Value::Int(value), DataType::Decimal128(_, scale)) => of_decimal(&value.to_string(), *scale)?,
        (Value::Decimal(digits), DataType::Decimal128(_, scale)) => of_decimal(digits, *scale)?,
        (Value::Date(day), DataType::Date32) => {
            let days = day.signed_duration_since(chrono::NaiveDate::default()).num_days();
            Arc::new(Date32Array::from(vec![i32::try_from(days).ok()?]))
        }
        (Value::Timestamp { at, zoned }, DataType::Timestamp(TimeUnit::Microsecond, zone))
            if *zoned == zone.is_some() =>
        {
            let array = TimestampMicrosecondArray::from(vec![at.timestamp_micros()]);
            Arc::new(array.with_timezone_opt(zone.clone()))
        }
        _ => return None,
    };
    // Decimals compare by their digits: the precision is the column's.
    let array = match of {
        DataType::Decimal128(..) => {
            arrow::array::make_array(array.to_data().into_builder().data_type(of.clone()).build().ok()?)
        }
        _ => array,
    };
    Some(Scalar::new(array))
}

fn of_decimal(digits: &str, scale: i8) -> Option<ArrayRef> {
    let value = decimal(digits, b'.', None, 38, scale).ok()?;
    Some(Arc::new(Decimal128Array::from(vec![value])))
}

#[cfg(test)]
mod tests {
    use ::parquet::{
        arrow::{ArrowWriter, arrow_reader::ArrowReaderOptions},
        file::properties::WriterProperties,
    };
    use arrow::{
        array::{Float64Array, RecordBatch, StringArray},
        datatypes::{Field, Schema},
    };

    use super::*;
    use crate::{
        connector::spec::{Read, StreamSpec},
        watermark::Window,
    };

    /// Three row groups: 1 to 10, 11 to 20, and nulls.
    fn file() -> ArrowReaderMetadata {
        let numbers = (1..=20_i64).map(Some).chain([None; 10]);
        let numbers: Vec<Option<i64>> = numbers.collect();
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("id", Arc::new(Int64Array::from(numbers.clone()))),
            (
                "amount",
                Arc::new(
                    Decimal128Array::from_iter(numbers.iter().map(|n| n.map(|n| i128::from(n) * 100)))
                        .with_precision_and_scale(15, 2)
                        .unwrap(),
                ),
            ),
            (
                "day",
                Arc::new(Date32Array::from_iter(
                    numbers.iter().map(|n| n.map(|n| i32::try_from(n).unwrap())),
                )),
            ),
            ("name", Arc::new(StringArray::from_iter(numbers.iter().map(|n| n.map(|n| n.to_string()))))),
            ("ratio", Arc::new(Float64Array::from_iter(numbers.iter().map(|n| n.map(|_| f64::NAN))))),
        ];
        let fields: Vec<Field> =
            columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
        let schema = Arc::new(Schema::new(fields));
        let batch =
            RecordBatch::try_new(Arc::clone(&schema), columns.into_iter().map(|(_, array)| array).collect());
        let properties = WriterProperties::builder().set_max_row_group_row_count(Some(10)).build();
        let mut bytes = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut bytes, schema, Some(properties)).unwrap();
        writer.write(&batch.unwrap()).unwrap();
        writer.close().unwrap();
        ArrowReaderMetadata::load(&bytes::Bytes::from(bytes), ArrowReaderOptions::new()).unwrap()
    }

    #[test]
    fn only_groups_that_may_hold_a_row_are_read() {
        let file = file();
        let compares =
            |column: &str, by, value: Value| Condition::Compares { column: column.to_owned(), by, value };
        let int = |by, value| compares("id", by, Value::Int(value));
        let amount = |by, value: &str| compares("amount", by, Value::Decimal(value.to_owned()));
        let day = chrono::NaiveDate::from_ymd_opt(1970, 1, 16).unwrap();
        // Of nulls no least value is said: the last group is read unless nulls are asked for.
        for (condition, expected) in [
            (int(Comparison::Less, 1), [false, false, true]),
            (int(Comparison::AtMost, 1), [true, false, true]),
            (int(Comparison::More, 10), [false, true, true]),
            (int(Comparison::AtLeast, 10), [true, true, true]),
            (int(Comparison::Equal, 11), [false, true, true]),
            (int(Comparison::Equal, 99), [false, false, true]),
            (int(Comparison::NotEqual, 1), [true, true, true]),
            (amount(Comparison::More, "10.00"), [false, true, true]),
            (amount(Comparison::More, "10.001"), [true, true, true]),
            (amount(Comparison::Less, "11"), [true, false, true]),
            (compares("amount", Comparison::Equal, Value::Int(12)), [false, true, true]),
            (compares("day", Comparison::AtLeast, Value::Date(day)), [false, true, true]),
            (compares("name", Comparison::Equal, Value::Text("99".to_owned())), [true, true, true]),
            (compares("ratio", Comparison::Equal, Value::Int(1)), [true, true, true]),
            (Condition::Null { column: "id".to_owned(), is: true }, [false, false, true]),
            (Condition::Null { column: "id".to_owned(), is: false }, [true, true, false]),
            (
                Condition::OneOf { column: "id".to_owned(), values: vec![Value::Int(0), Value::Int(15)] },
                [false, true, true],
            ),
            (Condition::Any(vec![int(Comparison::Less, 3), int(Comparison::More, 18)]), [true, true, true]),
            (
                Condition::All(vec![
                    int(Comparison::More, 3),
                    int(Comparison::Less, 8),
                    Condition::Null { column: "id".to_owned(), is: false },
                ]),
                [true, false, false],
            ),
            // Of one side nothing is known.
            (
                Condition::Any(vec![
                    int(Comparison::Less, 3),
                    compares("name", Comparison::Equal, Value::Text("x".to_owned())),
                ]),
                [true, true, true],
            ),
            (int(Comparison::Equal, i64::MAX), [false, false, true]),
        ] {
            let stream = StreamSpec::whole("lines", Read::File("x.parquet".to_owned()));
            let scan = Scan {
                conditions: vec![condition.clone()],
                ..Scan::new(stream, Arc::clone(file.schema()), Window::Whole)
            };
            assert_eq!(wanted(&file, &scan), expected, "{condition:?}");
        }
    }
}
