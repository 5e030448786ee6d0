//! Control totals, computed outside the query engine.
//!
//! A total is a sum in 256 bits of an exact column, per group: it cannot wrap before more rows than any disk
//! holds.

use std::collections::BTreeMap;

use arrow::{
    array::{Array, AsArray},
    datatypes::{DataType, Decimal128Type, Int64Type, Schema, i256},
    record_batch::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which columns to add up, and per what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TotalsSpec {
    /// Columns of whole numbers or decimals.
    pub sum: Vec<String>,
    /// Columns to group by; unless set, one total for all rows.
    #[serde(default)]
    pub by: Vec<String>,
}

/// Groups beyond which a total is no control total any more.
const MAX_GROUPS: usize = 1000;

/// Sums under construction.
#[derive(Debug, Clone)]
pub struct Totals {
    spec: TotalsSpec,
    sums: BTreeMap<Vec<String>, Group>,
}

#[derive(Debug, Clone)]
struct Group {
    rows: u64,
    sums: Vec<i256>,
    scales: Vec<i8>,
}

/// Finished sums of one group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// The values of the grouping columns.
    pub group: Vec<String>,
    /// How many rows.
    pub rows: u64,
    /// Each summed column and its exact sum.
    pub sums: Vec<(String, String)>,
}

impl Totals {
    /// Nothing added up yet.
    pub fn new(spec: TotalsSpec) -> Self {
        Self { spec, sums: BTreeMap::new() }
    }

    /// What is wrong with `spec` for rows of `schema`: a column that is not there, or is not exact.
    pub fn problem(spec: &TotalsSpec, schema: &Schema) -> Option<String> {
        for name in spec.sum.iter().chain(&spec.by) {
            if schema.field_with_name(name).is_err() {
                return Some(format!("there is no column `{name}`"));
            }
        }
        spec.sum.iter().find_map(|name| {
            let field = schema.field_with_name(name).ok()?;
            match field.data_type() {
                DataType::Int64 | DataType::Decimal128(..) => None,
                other => Some(format!(
                    "`{name}` is {}, and only int and decimal add up exactly",
                    crate::types::describe(other)
                )),
            }
        })
    }

    /// Adds the rows of `batch`. Null adds nothing and counts as a row.
    ///
    /// # Errors
    ///
    /// More than a thousand groups, or a column of another type.
    pub fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        let options = FormatOptions::default().with_null("null");
        let by = self.spec.by.iter().map(|name| column(batch, name)).collect::<Result<Vec<_>>>()?;
        let by = by
            .into_iter()
            .map(|array| ArrayFormatter::try_new(array, &options).map_err(Error::from))
            .collect::<Result<Vec<_>>>()?;
        let columns = self.spec.sum.iter().map(|name| column(batch, name)).collect::<Result<Vec<_>>>()?;
        let scales: Vec<i8> = columns
            .iter()
            .map(|array| match array.data_type() {
                DataType::Decimal128(_, scale) => *scale,
                _ => 0,
            })
            .collect();
        let mut key = Vec::with_capacity(by.len());
        for row in 0..batch.num_rows() {
            key.clear();
            key.extend(by.iter().map(|formatter| formatter.value(row).to_string()));
            if !self.sums.contains_key(&key) {
                if self.sums.len() == MAX_GROUPS {
                    return Err(Error::configuration(format!(
                        "`totals` by {} make more than {MAX_GROUPS} groups",
                        self.spec.by.join(", ")
                    ))
                    .hint("Group control totals by something with few values, such as a period."));
                }
                let group = Group { rows: 0, sums: vec![i256::ZERO; columns.len()], scales: scales.clone() };
                self.sums.insert(key.clone(), group);
            }
            let Some(group) = self.sums.get_mut(&key) else { continue };
            group.rows += 1;
            for (sum, array) in group.sums.iter_mut().zip(&columns) {
                if array.is_null(row) {
                    continue;
                }
                let value = match array.data_type() {
                    DataType::Int64 => i128::from(array.as_primitive::<Int64Type>().value(row)),
                    DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value(row),
                    other => {
                        return Err(Error::configuration(format!(
                            "totals of a {other} column are not exact"
                        )));
                    }
                };
                *sum = sum
                    .checked_add(i256::from_i128(value))
                    .ok_or_else(|| Error::failed("a control total has more than 76 digits"))?;
            }
        }
        Ok(())
    }

    /// The sums, by group in order.
    pub fn finish(&self) -> Vec<Total> {
        self.sums
            .iter()
            .map(|(group, sums)| Total {
                group: group.clone(),
                rows: sums.rows,
                sums: self
                    .spec
                    .sum
                    .iter()
                    .zip(sums.sums.iter().zip(&sums.scales))
                    .map(|(name, (sum, scale))| (name.clone(), unscaled(*sum, *scale)))
                    .collect(),
            })
            .collect()
    }
}

/// An unscaled number with its decimals.
pub fn unscaled(value: i256, scale: i8) -> String {
    let text = value.to_string();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", text.as_str()),
    };
    let scale = usize::try_from(scale).unwrap_or(0);
    if scale == 0 {
        return text;
    }
    let padded = format!("{digits:0>width$}", width = scale + 1);
    let (whole, fraction) = padded.split_at(padded.len() - scale);
    format!("{sign}{whole}.{fraction}")
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a dyn Array> {
    batch
        .column_by_name(name)
        .map(AsRef::as_ref)
        .ok_or_else(|| Error::bug(format!("totals of a column that is not there: {name}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Decimal128Array, StringArray};
    use arrow::datatypes::Field;

    use super::*;

    fn batch(rows: &[(&str, i128)]) -> RecordBatch {
        let names: StringArray = rows.iter().map(|row| Some(row.0)).collect();
        let amounts: Decimal128Array = rows.iter().map(|row| Some(row.1)).collect();
        let amounts = amounts.with_precision_and_scale(38, 2).unwrap();
        RecordBatch::try_from_iter([("name", Arc::new(names) as _), ("amount", Arc::new(amounts) as _)])
            .unwrap()
    }

    #[test]
    fn totals_do_not_wrap_where_the_column_would() {
        let largest = 10_i128.pow(38) - 1;
        let spec = TotalsSpec { sum: vec!["amount".to_owned()], by: vec!["name".to_owned()] };
        let mut totals = Totals::new(spec);
        totals.add(&batch(&[("a", largest), ("a", largest), ("b", -5)])).unwrap();
        let sums: Vec<String> = totals.finish().into_iter().map(|total| total.sums[0].1.clone()).collect();
        assert_eq!(sums, ["1999999999999999999999999999999999999.98", "-0.05"]);
    }

    #[test]
    fn a_total_of_floats_is_refused() {
        let schema = Schema::new(vec![Field::new("x", DataType::Float64, true)]);
        let spec = TotalsSpec { sum: vec!["x".to_owned()], by: vec![] };
        assert!(Totals::problem(&spec, &schema).is_some());
    }
}
