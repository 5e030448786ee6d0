//! What is remembered of a load and of a run.
//!
//! A [`LoadRecord`] goes into the target, in the same act as the rows: it is the truth. A `RunRecord`
//! ([`run`]) is the history on this machine. Both carry a version; a record of a newer floodmark is refused, not
//! guessed at.

use std::collections::{BTreeMap, BTreeSet};

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    lateness::Tail,
    watermark::{Mark, Window},
};

pub mod rowhash;
pub mod run;
pub mod totals;

/// The version of [`LoadRecord`] that this floodmark writes. Version 2 knows which rows of the quarantine are settled, version 3 which
/// system a mark is of and what lies before it: who does not know it would forget it.
pub const RECORD_VERSION: u32 = 3;

/// One release of one job, as the target remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadRecord {
    /// The record's version.
    pub v: u32,
    /// The project's name.
    pub project: String,
    /// The job's name.
    pub job: String,
    /// Made by the job's first commit into this target. Another one means another history.
    pub incarnation: Uuid,
    /// Counts the job's commits into this target, from 1.
    pub seq: u64,
    /// The SHA-256 of the record before, or of nothing.
    pub prev_record_sha256: Option<String>,
    /// The run that committed.
    pub run_id: Uuid,
    /// The attempt that committed: after a lost answer it tells whose commit landed.
    pub attempt_id: Uuid,
    /// When, by the committing machine's clock.
    pub committed_at: String,
    /// What `now()` was.
    pub as_of: String,
    /// The engine's version.
    pub engine: String,
    /// BLAKE3 of the job's file, its SQL, its parameters, and what its connections are written as.
    pub mapping_fp: String,
    /// What was read.
    pub sources: IndexMap<String, SourceRecord>,
    /// What was written.
    pub outputs: IndexMap<String, OutputRecord>,
    /// Where rows that were set aside went, if any.
    pub quarantined: u64,
    /// Files of set-aside rows, relative to the root; empty for databases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantine_files: Vec<String>,
    /// Which rows that were set aside wait for nothing any more.
    #[serde(default, skip_serializing_if = "Settled::is_nothing")]
    pub settled: Settled,
}

/// Which rows of the quarantine wait for nothing any more: they went through the job again, were let go, or everything was read anew.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// All that releases before this one set aside.
    #[serde(default)]
    pub before: u64,
    /// And these.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub lots: BTreeSet<Lot>,
}

/// What one release set aside of one source or model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lot {
    /// The release.
    pub release: u64,
    /// The source or model.
    pub on: String,
    /// Whether the rows could not be read; the others did not meet a check.
    pub unread: bool,
}

impl Settled {
    /// What a job's last record knows of it.
    pub fn of(base: Option<&LoadRecord>) -> Self {
        base.map(|base| base.settled.clone()).unwrap_or_default()
    }

    /// All that releases before `seq` set aside.
    pub fn before(seq: u64) -> Self {
        Self { before: seq, lots: BTreeSet::new() }
    }

    /// Whether the rows of a lot wait for nothing any more.
    pub fn holds(&self, lot: &Lot) -> bool {
        lot.release < self.before || self.lots.contains(lot)
    }

    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// How far a source was read, and what came of its rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// How far it is read now; `None` for what is read whole.
    pub mark: Option<Mark>,
    /// What the mark is of.
    #[serde(default)]
    pub reads: String,
    /// Which system that is, where it can be told from others at the same address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// What lies within the overlap before the mark: what the next run reads again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<Tail>,
    /// The window of this run, as people read it.
    pub window: String,
    /// Rows that came from the window.
    pub extracted: u64,
    /// Rows handed to models.
    pub passed: u64,
    /// Rows dropped by a filter of the job.
    pub filtered: u64,
    /// Rows set aside by parsing or row checks.
    pub rejected: u64,
}

/// One output after this release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRecord {
    /// The mode it was written in.
    pub mode: String,
    /// Rows that the model produced.
    pub rows: u64,
    /// Rows that are new.
    pub inserted: u64,
    /// Rows that were changed.
    pub updated: u64,
    /// Rows that were there already.
    pub unchanged: u64,
    /// Rows that are gone.
    pub deleted: u64,
    /// Rows that the output holds.
    pub rows_after: u64,
    /// The order-free hash of the rows that the model produced.
    pub rowhash: String,
    /// Its columns.
    pub columns: Vec<ColumnRecord>,
    /// The columns that identify a row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<String>,
    /// The live files, for folders.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<DataFile>,
}

/// A column of an output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnRecord {
    /// Its name.
    pub name: String,
    /// Its Arrow type, as Arrow spells it.
    pub r#type: String,
    /// Whether it may be null.
    pub nullable: bool,
}

/// One file of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Relative to the output's root.
    pub path: String,
    /// Its rows.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
}

impl LoadRecord {
    /// Reads a record.
    ///
    /// # Errors
    ///
    /// If it is damaged, or written by a newer floodmark.
    pub fn from_json(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        let damaged = |error: serde_json::Error| {
            Error::failed("the load record in the target is damaged").note(error.to_string())
        };
        let version: Version = serde_json::from_str(text).map_err(damaged)?;
        if version.v > RECORD_VERSION {
            return Err(Error::failed(format!(
                "the load record in the target has version {}, and this floodmark knows {RECORD_VERSION}",
                version.v
            ))
            .hint("Use the floodmark that wrote it, or a newer one."));
        }
        serde_json::from_str(text).map_err(damaged)
    }

    /// The record as it is stored.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// What the next record calls its predecessor.
    pub fn sha256(&self) -> String {
        hex::encode(Sha256::digest(self.to_json().as_bytes()))
    }

    /// How far each source was read.
    pub fn marks(&self) -> BTreeMap<String, Mark> {
        self.sources.iter().filter_map(|(name, source)| Some((name.clone(), source.mark.clone()?))).collect()
    }
}

impl SourceRecord {
    /// The record of a source that was read through `window`. Where nothing is remembered of the window, the mark of before
    /// stays.
    pub fn of(window: &Window, reads: String, counts: run::Counts, before: Option<&Self>) -> Self {
        Self {
            origin: before.and_then(|before| before.origin.clone()),
            tail: before.and_then(|before| before.tail.clone()),
            mark: window.mark().or_else(|| before?.mark.clone()),
            reads: match (window.mark(), before) {
                (None, Some(before)) if before.mark.is_some() => before.reads.clone(),
                _ => reads,
            },
            window: window.to_string(),
            extracted: counts.extracted,
            passed: counts.passed,
            filtered: counts.filtered,
            rejected: counts.rejected,
        }
    }
}

impl OutputRecord {
    /// The columns as a schema.
    ///
    /// # Errors
    ///
    /// If a type is unknown to this floodmark.
    pub fn schema(&self) -> Result<SchemaRef> {
        schema_of(&self.columns)
    }
}

/// A schema in the words of a record.
pub fn columns_of(schema: &Schema) -> Vec<ColumnRecord> {
    schema
        .fields()
        .iter()
        .map(|field| ColumnRecord {
            name: field.name().clone(),
            r#type: bare(field.data_type()).to_string(),
            nullable: field.is_nullable(),
        })
        .collect()
}

/// A type without what is noted of the fields in it: of an array, what its values are in their database.
fn bare(data_type: &DataType) -> DataType {
    let field =
        |field: &FieldRef| Field::new(field.name(), bare(field.data_type()), field.is_nullable()).into();
    match data_type {
        DataType::List(item) => DataType::List(field(item)),
        DataType::LargeList(item) => DataType::LargeList(field(item)),
        DataType::FixedSizeList(item, size) => DataType::FixedSizeList(field(item), *size),
        DataType::Map(entries, is_sorted) => DataType::Map(field(entries), *is_sorted),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(field).collect()),
        other => other.clone(),
    }
}

/// The schema that a record describes.
///
/// # Errors
///
/// If a type is unknown to this floodmark.
pub fn schema_of(columns: &[ColumnRecord]) -> Result<SchemaRef> {
    let fields = columns
        .iter()
        .map(|column| {
            let data_type = column.r#type.parse().map_err(|_| {
                Error::failed(format!(
                    "the record has a type that this floodmark does not know: {}",
                    column.r#type
                ))
            })?;
            Ok(Field::new(&column.name, data_type, column.nullable))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Schema::new(fields).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_an_output_can_have_survives_its_record() {
        use std::{collections::HashMap, sync::Arc};

        use arrow::datatypes::TimeUnit;
        let list = |item: Field| DataType::List(Arc::new(item));
        let types = [
            DataType::Utf8,
            DataType::Int64,
            DataType::Int32,
            DataType::Decimal128(38, 10),
            DataType::Float64,
            DataType::Boolean,
            DataType::Date32,
            DataType::Timestamp(TimeUnit::Microsecond, None),
            DataType::Timestamp(TimeUnit::Microsecond, Some("+00:00".into())),
            DataType::Time64(TimeUnit::Microsecond),
            DataType::Binary,
            list(Field::new_list_field(DataType::Decimal128(10, 2), true)),
            list(Field::new_list_field(list(Field::new_list_field(DataType::Utf8, true)), true)),
            DataType::LargeList(Arc::new(Field::new_list_field(DataType::Utf8, true))),
            DataType::FixedSizeList(Arc::new(Field::new_list_field(DataType::Int32, true)), 3),
            DataType::Struct(
                vec![Field::new("a b", DataType::Utf8, true), Field::new("n", DataType::Int64, false)].into(),
            ),
        ];
        let fields: Vec<Field> = types
            .into_iter()
            .enumerate()
            .map(|(index, t)| Field::new(format!("c{index}"), t, index % 2 == 0))
            .collect();
        let schema = Schema::new(fields);
        assert_eq!(*schema_of(&columns_of(&schema)).unwrap(), schema);

        let noted = HashMap::from([("floodmark:postgres".to_owned(), "state".to_owned())]);
        let noted = list(Field::new_list_field(DataType::Utf8, true).with_metadata(noted));
        let read = schema_of(&columns_of(&Schema::new(vec![Field::new("states", noted, true)]))).unwrap();
        assert_eq!(*read.field(0).data_type(), list(Field::new_list_field(DataType::Utf8, true)));
    }

    #[test]
    fn a_record_of_a_newer_floodmark_is_refused() {
        let error = LoadRecord::from_json(r#"{"v": 99, "whatever": true}"#).unwrap_err();
        assert!(error.to_string().contains("version 99"), "{error}");
    }
}
