//! Checks: what must hold, over the whole result, before anything is published.
//!
//! Checks of rows become columns of the checked relation's own query, so that rows are sorted out while they stream
//! into the spool, or to the one who reads them ([`sieve`]); checks of all rows together are queries over the spool. A finding names places and
//! counts, never values.

use std::sync::Arc;

use arrow::{
    array::{Array, AsArray, RecordBatch, StringBuilder},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
    util::display::{ArrayFormatter, FormatOptions},
};
use datafusion::prelude::SessionContext;

pub mod sieve;
mod validate;

use crate::{
    connector::scan::POSITION_COLUMN,
    error::{Error, Result},
    job::{CheckSpec, OnFail, micros, parts_per_million},
    names::{quoted, quoted_list},
    plan::sql::Select,
    record::{
        Lot,
        run::{CheckReport, Verdict},
    },
};

/// One check of a plan.
#[derive(Debug, Clone)]
pub struct Check {
    /// The source or model.
    pub on: String,
    /// What it says.
    pub spec: CheckSpec,
    /// Its query, if it is one; of an expression, the query that has it as its one column.
    pub query: Option<Select>,
}

/// How many offences are shown.
const SHOWN: usize = 5;

impl Check {
    /// As people read it: `not_null account`.
    pub fn words(&self) -> String {
        let spec = &self.spec;
        let names = |names: &crate::job::OneOrMany| names.to_vec().join(", ");
        if let Some(columns) = &spec.not_null {
            format!("not_null {}", names(columns))
        } else if let Some(columns) = &spec.unique {
            format!("unique {}", names(columns))
        } else if let Some(accepted) = &spec.accepted {
            format!("accepted {}", accepted.column)
        } else if let Some(range) = &spec.range {
            format!("range {}", range.column)
        } else if let Some(matches) = &spec.matches {
            format!("matches {}", matches.column)
        } else if let Some(references) = &spec.references {
            format!("references {} in {}", references.column, references.r#in)
        } else if spec.row_count.is_some() {
            "row_count".to_owned()
        } else if let Some(freshness) = &spec.freshness {
            format!("freshness {}", freshness.column)
        } else if let Some(expression) = &spec.expression {
            format!("expression {expression}")
        } else if let Some(query) = &spec.query {
            format!("query {query}")
        } else if let Some(same) = &spec.same_total {
            format!("same_total {} of {}", same.sum, same.of.join(", "))
        } else if let Some(balanced) = &spec.balanced {
            format!("balanced {}", balanced.sum)
        } else if let Some(other) = &spec.joined_once {
            format!("joined_once {other}")
        } else {
            "nothing".to_owned()
        }
    }

    /// The other relations that it looks at.
    pub fn reads(&self) -> Vec<String> {
        let mut reads: Vec<String> = self.spec.same_total.iter().flat_map(|same| same.of.clone()).collect();
        reads.extend(self.spec.joined_once.clone());
        reads.extend(
            self.spec
                .references
                .iter()
                .filter_map(|references| Some(references.r#in.split_once('.')?.0.to_owned())),
        );
        reads.extend(
            self.query.iter().flat_map(|query| query.reads.iter().filter(|read| **read != self.on).cloned()),
        );
        reads
    }

    /// Whether it looks at its own relation for each row of it.
    pub fn reads_itself(&self) -> bool {
        let other = self.spec.references.as_ref().and_then(|references| references.r#in.split_once('.'));
        other.is_some_and(|(relation, _)| relation == self.on)
    }

    /// Whether each row meets it or not, whatever the others are.
    pub fn is_of_rows(&self) -> bool {
        self.condition(0, &Schema::empty()).is_ok_and(|condition| condition.is_some())
    }

    /// The condition that a good row meets, if this is a check of rows.
    fn condition(&self, index: usize, schema: &Schema) -> Result<Option<String>> {
        let spec = &self.spec;
        let on = quoted(&self.on)?;
        let of = |column: &str| quoted(column).map(|column| format!("{on}.{column}"));
        Ok(Some(if let Some(columns) = &spec.not_null {
            let parts = columns
                .to_vec()
                .iter()
                .map(|column| Ok(format!("{} IS NOT NULL", of(column)?)))
                .collect::<Result<Vec<_>>>()?;
            parts.join(" AND ")
        } else if let Some(accepted) = &spec.accepted {
            let values: Vec<String> =
                accepted.values.iter().map(|value| literal(schema, &accepted.column, value)).collect();
            format!("coalesce({} IN ({}), true)", of(&accepted.column)?, values.join(", "))
        } else if let Some(range) = &spec.range {
            let column = of(&range.column)?;
            let mut parts = Vec::new();
            if let Some(min) = &range.min {
                parts.push(format!("{column} >= {}", literal(schema, &range.column, min)));
            }
            if let Some(max) = &range.max {
                parts.push(format!("{column} <= {}", literal(schema, &range.column, max)));
            }
            if parts.is_empty() {
                "true".to_owned()
            } else {
                format!("coalesce({}, true)", parts.join(" AND "))
            }
        } else if let Some(matches) = &spec.matches {
            let pattern = matches.pattern.replace('\'', "''");
            format!("coalesce(regexp_like(CAST({} AS VARCHAR), '{pattern}'), true)", of(&matches.column)?)
        } else if let Some(references) = &spec.references {
            format!("({} IS NULL OR r{index}.hit_{index} IS NOT NULL)", of(&references.column)?)
        } else if let Some(expression) = self.query.as_ref().filter(|_| spec.expression.is_some()) {
            format!("coalesce(({}), true)", validate::condition(expression).unwrap_or_default())
        } else {
            return Ok(None);
        }))
    }

    /// The query that counts offences among all rows together, if this is such a check.
    fn counting(&self, as_of: chrono::DateTime<chrono::Utc>) -> Result<Option<String>> {
        let (spec, on) = (&self.spec, quoted(&self.on)?);
        let list = |columns: &[String]| quoted_list(columns.iter().map(String::as_str));
        Ok(Some(if let Some(columns) = &spec.unique {
            format!(
                "SELECT count(*) FROM (SELECT 1 FROM {on} GROUP BY {} HAVING count(*) > 1)",
                list(&columns.to_vec())?
            )
        } else if let Some(freshness) = &spec.freshness {
            let oldest = as_of - chrono::TimeDelta::microseconds(micros(&freshness.max_age).unwrap_or(0));
            let newest = format!("max(CAST({} AS TIMESTAMP))", quoted(&freshness.column)?);
            format!(
                "SELECT CASE WHEN {newest} >= TIMESTAMP '{}' THEN 0 ELSE 1 END FROM {on}",
                oldest.format("%Y-%m-%dT%H:%M:%S")
            )
        } else if let Some(balanced) = &spec.balanced {
            let sum = quoted(&balanced.sum)?;
            let group = if balanced.by.is_empty() {
                String::new()
            } else {
                format!("GROUP BY {}", list(&balanced.by)?)
            };
            format!("SELECT count(*) FROM (SELECT 1 FROM {on} {group} HAVING sum({sum}) <> 0)")
        } else if let Some(other) = &spec.joined_once {
            format!("SELECT abs((SELECT count(*) FROM {on}) - (SELECT count(*) FROM {}))", quoted(other)?)
        } else {
            return Ok(None);
        }))
    }

    fn columns(&self) -> Vec<String> {
        let spec = &self.spec;
        let mut columns: Vec<String> = Vec::new();
        columns.extend(spec.not_null.iter().flat_map(crate::job::OneOrMany::to_vec));
        columns.extend(spec.unique.iter().flat_map(crate::job::OneOrMany::to_vec));
        columns.extend(spec.accepted.iter().map(|accepted| accepted.column.clone()));
        columns.extend(spec.range.iter().map(|range| range.column.clone()));
        columns.extend(spec.matches.iter().map(|matches| matches.column.clone()));
        columns.extend(spec.references.iter().map(|references| references.column.clone()));
        columns.extend(spec.freshness.iter().map(|freshness| freshness.column.clone()));
        columns.extend(
            spec.balanced.iter().flat_map(|balanced| balanced.by.iter().chain([&balanced.sum]).cloned()),
        );
        columns.extend(spec.same_total.iter().flat_map(|same| same.by.iter().chain([&same.sum]).cloned()));
        columns
    }

    /// How many offences are allowed among `rows`.
    fn allowed(&self, rows: u64) -> u64 {
        let by_ratio = self
            .spec
            .max_ratio
            .as_deref()
            .and_then(parts_per_million)
            .map(|ppm| u64::try_from(u128::from(rows) * u128::from(ppm) / 1_000_000).unwrap_or(u64::MAX));
        match (self.spec.max_rows, by_ratio) {
            (Some(rows), Some(ratio)) => rows.min(ratio),
            (Some(allowed), None) | (None, Some(allowed)) => allowed,
            (None, None) if self.spec.on_fail == OnFail::Quarantine => u64::MAX,
            (None, None) => 0,
        }
    }

    fn report(&self, found: u64, rows: u64, details: Vec<String>) -> CheckReport {
        let verdict = match self.spec.on_fail {
            _ if found == 0 => Verdict::Passed,
            OnFail::Warn => Verdict::Warned,
            _ if found > self.allowed(rows) => Verdict::Failed,
            OnFail::Quarantine => Verdict::Quarantined,
            OnFail::Fail => Verdict::Warned,
        };
        CheckReport { on: self.on.clone(), check: self.words(), verdict, found, details }
    }
}

/// The query of a relation with one column more for each check of rows; `None` if there is none.
///
/// # Errors
///
/// If a name cannot be quoted.
pub fn row_query(on: &str, checks: &[Check], schema: &Schema) -> Result<Option<String>> {
    let (mut columns, mut joins) = (Vec::new(), Vec::new());
    for (index, check) in checks.iter().enumerate() {
        let Some(condition) = check.condition(index, schema)? else { continue };
        columns.push(format!("({condition}) AS \"{}\"", flag(index)));
        if let Some((relation, column)) =
            check.spec.references.as_ref().and_then(|references| references.r#in.split_once('.'))
        {
            let own = check
                .spec
                .references
                .as_ref()
                .map(|references| references.column.as_str())
                .unwrap_or_default();
            joins.push(format!(
                " LEFT JOIN (SELECT DISTINCT {column} AS hit_{index} FROM {relation}) AS r{index} ON {on}.{own} = r{index}.hit_{index}",
                on = quoted(on)?,
                column = quoted(column)?,
                relation = quoted(relation)?,
                own = quoted(own)?
            ));
        }
    }
    if columns.is_empty() {
        return Ok(None);
    }
    Ok(Some(format!("SELECT {on}.*, {} FROM {on}{}", columns.join(", "), joins.join(""), on = quoted(on)?)))
}

/// A value as SQL that compares with `column` by its type: `1` equals `1.00` where the column is a number.
fn literal(schema: &Schema, column: &str, value: &str) -> String {
    let text = format!("'{}'", value.replace('\'', "''"));
    let of = schema.field_with_name(column).map(Field::data_type);
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    match of {
        Ok(of) if of.is_numeric() => {
            let (whole, fraction) = value.split_once('.').unwrap_or((value, "0"));
            let plain = digits(whole.strip_prefix('-').unwrap_or(whole)) && digits(fraction);
            // What is no number is told when it is computed.
            if plain { value.to_owned() } else { format!("arrow_cast({text}, '{of}')") }
        }
        Ok(of) if !of.is_string() => format!("arrow_cast({text}, '{of}')"),
        _ => text,
    }
}

fn flag(index: usize) -> String {
    format!("_check_{index}")
}

/// What a row is set aside by that could not be read: no check, but its source.
pub const READABLE: &str = "readable";

/// The lot of a row that `release` set aside of `on` by `check`.
pub fn lot(release: u64, on: &str, check: &str) -> Lot {
    Lot { release, on: on.to_owned(), unread: check == READABLE }
}

/// The columns of rows that were set aside.
pub fn quarantine_schema() -> SchemaRef {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    Arc::new(Schema::new(vec![text("on"), text("check"), text("reason"), text("position"), text("row")]))
}

/// Rows that were set aside, as a batch.
///
/// # Errors
///
/// None in practice: the columns are those of the schema.
pub fn quarantine_batch(rows: impl IntoIterator<Item = [String; 5]>) -> Result<RecordBatch> {
    let mut builders: [StringBuilder; 5] = Default::default();
    for row in rows {
        for (builder, value) in builders.iter_mut().zip(row) {
            builder.append_value(value);
        }
    }
    let arrays = builders.into_iter().map(|mut builder| Arc::new(builder.finish()) as _).collect();
    Ok(RecordBatch::try_new(quarantine_schema(), arrays)?)
}

/// Sorts the rows of a relation out while they stream by.
#[derive(Debug)]
pub struct Sorter {
    checks: Vec<Check>,
    found: Vec<u64>,
    details: Vec<Vec<String>>,
    rows: u64,
}

impl Sorter {
    /// For these checks, in the order of the query's flags.
    pub fn new(checks: Vec<Check>) -> Self {
        let count = checks.len();
        Self { checks, found: vec![0; count], details: vec![Vec::new(); count], rows: 0 }
    }

    /// The rows of `batch` that pass, without the flags, and those that are set aside.
    ///
    /// # Errors
    ///
    /// If a flag is not a boolean.
    pub fn sort(&mut self, batch: &RecordBatch) -> Result<(RecordBatch, Vec<[String; 5]>)> {
        let kept: Vec<usize> = batch
            .schema()
            .fields()
            .iter()
            .enumerate()
            .filter(|(_, field)| !field.name().starts_with("_check_"))
            .map(|(index, _)| index)
            .collect();
        let rows = batch.project(&kept)?;
        let positions = rows.column_by_name(POSITION_COLUMN).map(|array| array.as_string::<i32>().clone());
        let mut pass = vec![true; batch.num_rows()];
        let mut aside = Vec::new();
        for (index, check) in self.checks.iter().enumerate() {
            let Some(column) = batch.column_by_name(&flag(index)) else { continue };
            let column = column.as_boolean_opt().ok_or_else(|| {
                Error::configuration(format!("check `{}` on `{}` is no condition", check.words(), check.on))
                    .hint("Write an expression that is true or false.")
            })?;
            if column.true_count() + column.null_count() == column.len() {
                continue;
            }
            for (row, still) in pass.iter_mut().enumerate() {
                if column.is_null(row) || column.value(row) {
                    continue;
                }
                let position = positions.as_ref().map_or_else(
                    || format!("{} row {}", check.on, self.rows + row as u64 + 1),
                    |positions| positions.value(row).to_owned(),
                );
                if let (Some(found), Some(details)) = (self.found.get_mut(index), self.details.get_mut(index))
                {
                    *found += 1;
                    if details.len() < SHOWN {
                        details.push(position.clone());
                    }
                }
                if check.spec.on_fail == OnFail::Quarantine && std::mem::take(still) {
                    let reason = format!("does not meet `{}`", check.words());
                    aside.push([check.on.clone(), check.words(), reason, position, row_json(&rows, row)?]);
                }
            }
        }
        self.rows += batch.num_rows() as u64;
        if aside.is_empty() {
            return Ok((rows, aside));
        }
        let mask = arrow::array::BooleanArray::from(pass);
        Ok((arrow::compute::filter_record_batch(&rows, &mask)?, aside))
    }

    /// What the checks found.
    pub fn reports(&self) -> Vec<CheckReport> {
        self.checks
            .iter()
            .zip(self.found.iter().zip(&self.details))
            .filter(|(check, _)| check.is_of_rows())
            .map(|(check, (found, details))| check.report(*found, self.rows, details.clone()))
            .collect()
    }
}

/// A row as the quarantine keeps it: its columns as text.
pub(crate) fn row_json(batch: &RecordBatch, row: usize) -> Result<String> {
    let options = FormatOptions::default();
    let mut object = serde_json::Map::new();
    let columns = batch.schema();
    let columns = columns.fields().iter().zip(batch.columns());
    for (field, array) in columns.filter(|(field, _)| field.name() != POSITION_COLUMN) {
        let value = if array.is_null(row) {
            serde_json::Value::Null
        } else {
            ArrayFormatter::try_new(array.as_ref(), &options)?.value(row).to_string().into()
        };
        object.insert(field.name().clone(), value);
    }
    Ok(serde_json::Value::Object(object).to_string())
}

/// Runs the checks of a whole relation, which the session knows by its name.
///
/// # Errors
///
/// If a query fails.
pub async fn whole(
    context: &SessionContext,
    checks: &[&Check],
    rows: u64,
    as_of: chrono::DateTime<chrono::Utc>,
) -> Result<Vec<CheckReport>> {
    let mut reports = Vec::new();
    for check in checks {
        if let Some(count) = &check.spec.row_count {
            let few = count.min.is_some_and(|min| rows < min);
            let many = count.max.is_some_and(|max| rows > max);
            let details = vec![format!(
                "{rows} rows, and between {} and {} are expected",
                count.min.unwrap_or(0),
                count.max.map_or_else(|| "any number".to_owned(), |max| max.to_string())
            )];
            reports.push(check.report(
                u64::from(few || many),
                rows,
                if few || many { details } else { Vec::new() },
            ));
        } else if let (Some(query), Some(_)) = (&check.query, &check.spec.query) {
            let plan = crate::plan::typed(context, query).await.map_err(Error::from)?;
            let batches = context.execute_logical_plan(plan).await?.collect().await?;
            let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
            reports.push(check.report(found as u64, rows, Vec::new()));
        } else if let Some(same) = &check.spec.same_total {
            let (ours, theirs) = (
                sums(context, std::slice::from_ref(&check.on), same).await?,
                sums(context, &same.of, same).await?,
            );
            let mut details = Vec::new();
            let mut found = 0;
            let groups: std::collections::BTreeSet<&Vec<String>> = ours.keys().chain(theirs.keys()).collect();
            for group in groups {
                let zero = "0".to_owned();
                let (left, right) = (ours.get(group).unwrap_or(&zero), theirs.get(group).unwrap_or(&zero));
                let differ = left != right;
                found += u64::from(differ);
                details.push(format!(
                    "{}{left} {} {right}",
                    group.iter().map(|value| format!("{value} ")).collect::<String>(),
                    if differ { "is not" } else { "=" }
                ));
            }
            details.truncate(20);
            reports.push(check.report(found, rows, details));
        } else if let Some(sql) = check.counting(as_of)? {
            let batches = context.sql(&sql).await?.collect().await?;
            let found = batches
                .iter()
                .filter(|batch| batch.num_rows() > 0)
                .map(|batch| batch.column(0).as_primitive::<Int64Type>().value(0))
                .sum::<i64>();
            reports.push(check.report(found.unsigned_abs(), rows, Vec::new()));
        }
    }
    Ok(reports)
}

async fn sums(
    context: &SessionContext,
    relations: &[String],
    same: &crate::job::SameTotalSpec,
) -> Result<std::collections::BTreeMap<Vec<String>, String>> {
    let by: Vec<String> = same
        .by
        .iter()
        .map(|column| Ok(format!("CAST({} AS VARCHAR)", quoted(column)?)))
        .collect::<Result<_>>()?;
    let names: Vec<String> = (0..by.len()).map(|index| format!("g{index}")).collect();
    let select: Vec<String> =
        by.iter().zip(&names).map(|(column, name)| format!("{column} AS {name}, ")).collect();
    let unions = relations
        .iter()
        .map(|relation| {
            Ok(format!("SELECT {}{} AS x FROM {}", select.join(""), quoted(&same.sum)?, quoted(relation)?))
        })
        .collect::<Result<Vec<_>>>()?
        .join(" UNION ALL ");
    let group = if names.is_empty() { String::new() } else { format!(" GROUP BY {}", names.join(", ")) };
    let listed: String = names.iter().map(|name| format!("{name}, ")).collect();
    let batches =
        context.sql(&format!("SELECT {listed}sum(x) FROM ({unions}){group}")).await?.collect().await?;
    let options = FormatOptions::default().with_null("null");
    let mut sums = std::collections::BTreeMap::new();
    for batch in &batches {
        let columns = batch
            .columns()
            .iter()
            .map(|array| Ok(ArrayFormatter::try_new(array.as_ref(), &options)?))
            .collect::<Result<Vec<_>>>()?;
        for row in 0..batch.num_rows() {
            let mut values: Vec<String> =
                columns.iter().map(|column| column.value(row).to_string()).collect();
            let sum = values.pop().unwrap_or_default();
            sums.insert(values, if sum == "null" { "0".to_owned() } else { sum });
        }
    }
    Ok(sums)
}
