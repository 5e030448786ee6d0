//! Control totals and row hashes, computed outside the query engine.
//!
//! A total is a sum in 256 bits of an exact column, per group: it cannot wrap before more rows than any disk
//! holds. A row hash is the sum modulo 2^256 of BLAKE3 over each row's bytes; adding instead of XOR-ing makes a
//! doubled row show, and makes the order of rows not matter.

use std::collections::BTreeMap;

use arrow::{
    array::{Array, AsArray},
    datatypes::{DataType, Decimal128Type, Int64Type, Schema, i256},
    record_batch::RecordBatch,
    row::{RowConverter, SortField},
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

/// A sum of hashes modulo 2^256: least significant limb first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HashSum([u64; 4]);

impl HashSum {
    /// Adds the BLAKE3 of one row.
    pub fn add(&mut self, hash: &blake3::Hash) {
        let mut carry = false;
        for (limb, bytes) in self.0.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
            let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
            let (sum, over) = limb.overflowing_add(value);
            let (sum, over_again) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = over || over_again;
        }
    }
}

impl std::fmt::Display for HashSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{d:016x}{c:016x}{b:016x}{a:016x}")
    }
}

/// The order-free hash of rows.
#[derive(Debug)]
pub struct RowHash {
    converter: RowConverter,
    sum: HashSum,
    rows: u64,
}

impl RowHash {
    /// Of no rows, for rows of `schema`.
    ///
    /// # Errors
    ///
    /// If a column's type has no row format.
    pub fn new(schema: &Schema) -> Result<Self> {
        let fields = schema.fields().iter().map(|field| SortField::new(field.data_type().clone())).collect();
        Ok(Self { converter: RowConverter::new(fields)?, sum: HashSum::default(), rows: 0 })
    }

    /// Adds the rows of `batch`.
    ///
    /// # Errors
    ///
    /// If the batch is of another schema.
    pub fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        let rows = self.converter.convert_columns(batch.columns())?;
        for row in &rows {
            self.sum.add(&blake3::hash(row.as_ref()));
            self.rows += 1;
        }
        Ok(())
    }

    /// The hash, with its algorithm's name.
    pub fn finish(&self) -> String {
        format!("blake3-256-sum:{}:{}", self.rows, self.sum)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Decimal128Array, Int64Array, StringArray};
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

    #[test]
    fn the_row_hash_ignores_order_and_sees_a_doubled_pair() {
        let hash = |batches: &[RecordBatch]| {
            let mut hash = RowHash::new(&batches[0].schema()).unwrap();
            for batch in batches {
                hash.add(batch).unwrap();
            }
            hash.finish()
        };
        let one = hash(&[batch(&[("a", 1), ("b", 2), ("c", 3)])]);
        assert_eq!(one, hash(&[batch(&[("c", 3)]), batch(&[("b", 2), ("a", 1)])]));
        let twice = hash(&[batch(&[("a", 1), ("b", 2), ("c", 3), ("x", 9), ("x", 9)])]);
        assert_ne!(one.rsplit(':').next(), twice.rsplit(':').next());
        // Why hashes are added: an exclusive or does not see a pair of equal rows.
        let combined = |rows: &[(&str, i128)]| {
            let batch = batch(rows);
            let schema = batch.schema();
            let fields = schema.fields().iter().map(|field| SortField::new(field.data_type().clone()));
            let converter = RowConverter::new(fields.collect()).unwrap();
            let rows = converter.convert_columns(batch.columns()).unwrap();
            rows.iter().fold([0_u8; 32], |sum, row| {
                let hash = blake3::hash(row.as_ref());
                std::array::from_fn(|at| sum[at] ^ hash.as_bytes()[at])
            })
        };
        let pair = [("a", 1), ("b", 2), ("c", 3), ("x", 9), ("x", 9)];
        assert_eq!(combined(&pair[..3]), combined(&pair));
        let numbers =
            RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(vec![None, Some(0)])) as _)])
                .unwrap();
        assert_ne!(hash(&[numbers.slice(0, 1)]), hash(&[numbers.slice(1, 1)]), "null is not zero");
    }
}
