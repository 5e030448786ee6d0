//! The history of a run: the document that `run --output json` ends with and `.floodmark/runs/` keeps.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::totals::Total;
use crate::lateness::Late;

/// The version of [`RunRecord`] that this floodmark writes.
pub const RUN_VERSION: u32 = 1;

/// What came of a source's rows. `extracted = passed + filtered + rejected`, always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows that came from the window.
    pub extracted: u64,
    /// Rows handed to models.
    pub passed: u64,
    /// Rows dropped by a filter of the job.
    pub filtered: u64,
    /// Rows set aside by parsing or row checks.
    pub rejected: u64,
}

impl Counts {
    /// Whether every row is accounted for.
    pub fn add_up(self) -> bool {
        self.extracted == self.passed + self.filtered + self.rejected
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Rows were published.
    Published,
    /// There was nothing to publish.
    NothingNew,
    /// The data was refused; the target is as it was.
    Refused,
    /// It failed; the target is as it was.
    Failed,
    /// It was stopped; the target is as it was.
    Interrupted,
    /// A job that it reads from did not succeed.
    Skipped,
}

impl Outcome {
    /// As people read it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::NothingNew => "nothing new",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::Skipped => "skipped",
        }
    }
}

/// One source in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceReport {
    /// What was read.
    pub window: String,
    /// How sure the window's end is: `exact`, `margin` or `lookback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<String>,
    /// Rows that came late, and were found by the overlap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub late: Option<Late>,
    /// What came of its rows.
    pub counts: Counts,
    /// Bytes read.
    pub bytes: u64,
    /// Whether it was read to its end; a model with a LIMIT may stop before.
    pub complete: bool,
    /// Control totals of the rows extracted and not rejected by parsing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub totals: Vec<Total>,
    /// Values that did not fit their column and are null, as the job allows: how many, by column.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nulled: BTreeMap<String, u64>,
}

/// One output in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputReport {
    /// The mode.
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
    /// Control totals of the rows that the model produced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub totals: Vec<Total>,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing found, or no more than allowed.
    Passed,
    /// Found, and said.
    Warned,
    /// Found, and set aside.
    Quarantined,
    /// Found: the run is refused.
    Failed,
}

impl Verdict {
    /// As people read it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Warned => "warned",
            Self::Quarantined => "set aside",
            Self::Failed => "failed",
        }
    }
}

/// One check in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The source or model.
    pub on: String,
    /// The check, as people read it: `not_null account`.
    pub check: String,
    /// How it ended.
    pub verdict: Verdict,
    /// Offending rows, or groups.
    pub found: u64,
    /// What was compared, or where the first offences are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// One job in a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The record's version.
    pub v: u32,
    /// Unique, ordered by time.
    pub run_id: uuid::Uuid,
    /// The project.
    pub project: String,
    /// The job.
    pub job: String,
    /// The environment.
    pub environment: String,
    /// When it started.
    pub started_at: String,
    /// How long it took.
    pub duration_ms: u64,
    /// What `now()` was.
    pub as_of: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The exit code that it stands for.
    pub exit_code: u8,
    /// The sequence number that it committed, if it committed.
    pub seq: Option<u64>,
    /// The sources.
    pub sources: IndexMap<String, SourceReport>,
    /// The outputs.
    pub outputs: IndexMap<String, OutputReport>,
    /// The checks.
    pub checks: Vec<CheckReport>,
    /// Rows set aside.
    pub quarantined: u64,
    /// What a person should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Why it did not succeed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}
