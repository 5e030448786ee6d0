//! A job as it is written: the structs behind `jobs/*.yaml`. No I/O, nothing resolved.
//!
//! The doc comments are the user's documentation: `floodmark schema job` prints them, editors show them.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    connector::spec::{ApiRequest, BadRows, Contract, Deletes, Format, Mode, OnNull},
    record::totals::TotalsSpec,
    watermark::Overlap,
};

pub mod param;

/// A job: one atomic release into one system.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobFile {
    /// The job's name. Its identity, with the project's name.
    pub job: String,
    /// What it is for.
    pub description: Option<String>,
    /// Who is asked when it fails.
    pub owner: Option<String>,
    /// Words to select it by: `floodmark run --select tag:nightly`.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Values that SQL names as `$name`.
    #[serde(default)]
    pub params: IndexMap<String, ParamSpec>,
    /// What is read, by the name that SQL uses.
    pub sources: IndexMap<String, SourceSpec>,
    /// SELECTs, by the name that SQL uses, and their files. Unless given, `sql/mappings/<job>/<model>.sql`.
    #[serde(default)]
    pub models: IndexMap<String, Option<String>>,
    /// What must hold, by source or model.
    #[serde(default)]
    pub checks: IndexMap<String, Vec<CheckSpec>>,
    /// Where it goes.
    pub target: TargetSpec,
}

/// A typed parameter.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParamSpec {
    /// `string`, `int`, `decimal(p,s)`, `bool`, `date` or `timestamptz`.
    pub r#type: String,
    /// The value where none is given. For dates also `today`, `yesterday`, `first_day_of_month`,
    /// `last_day_of_previous_month`, counted from `as_of`.
    pub default: Option<String>,
}

/// Something that is read.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// The connection's name. Without one, `file` and `files` are looked for in the project's folder.
    pub connection: Option<String>,
    /// A table or view; in a folder, an output that a job published there.
    pub table: Option<String>,
    /// Tables by pattern, such as `gl.*`: each becomes a source of its own name, and each output that is made `from` this one and
    /// has a `*` in its name becomes one for each table.
    pub tables: Option<String>,
    /// With `tables`: those that are left out.
    #[serde(default)]
    pub except: Vec<String>,
    /// With `tables`: what holds for single ones, by their names.
    #[serde(default)]
    pub each: IndexMap<String, EachSpec>,
    /// A file with a SELECT in the source's own dialect.
    pub query: Option<String>,
    /// One file, read whole on every run.
    pub file: Option<String>,
    /// Files by pattern; each is read once.
    pub files: Option<String>,
    /// What is asked of an API.
    pub request: Option<ApiRequest>,
    /// With `files`: `always` reads all of them on every run.
    pub read: Option<ReadHow>,
    /// How the bytes of files are to be understood.
    pub format: Option<Format>,
    /// Types that are declared; they win over what the source says.
    #[serde(default)]
    pub columns: IndexMap<String, String>,
    /// The columns that identify a row; checked to be there and unique.
    #[serde(default)]
    pub key: Vec<String>,
    /// Reads only what is new, by a cursor.
    pub incremental: Option<IncrementalSpec>,
    /// The zone of timestamps that have none, such as `Europe/Berlin`.
    pub timezone: Option<String>,
    /// What to do with a row that cannot be read.
    #[serde(default)]
    pub bad_rows: BadRows,
    /// How many rows may be set aside for that before the run fails. Unless set, 1000.
    pub max_bad_rows: Option<u64>,
    /// Columns in which a value that does not fit becomes null instead; the run counts them.
    #[serde(default)]
    pub unfit_as_null: Vec<String>,
    /// Control totals of what was read.
    pub totals: Option<TotalsSpec>,
}

/// What holds for one of several tables; it wins over what holds for all.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EachSpec {
    /// The columns that identify a row; unless set, the primary key.
    pub key: Vec<String>,
    /// Types that are declared.
    pub columns: IndexMap<String, String>,
    /// Reads only what is new, by a cursor.
    pub incremental: Option<IncrementalSpec>,
    /// The zone of timestamps that have none.
    pub timezone: Option<String>,
    /// Columns in which a value that does not fit becomes null.
    pub unfit_as_null: Vec<String>,
}

/// How often a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReadHow {
    /// Once.
    Once,
    /// On every run.
    Always,
}

/// Reads only what is new.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IncrementalSpec {
    /// The column that grows, or several in order.
    pub cursor: OneOrMany,
    /// How far behind the last run to read again: `2h`, `3d`; for whole numbers a count. Needs `merge`.
    pub overlap: Option<OverlapSpec>,
    /// What to do with rows whose cursor is null.
    #[serde(default)]
    pub on_null: OnNull,
}

/// One name, or a list of names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// As a list.
    pub fn to_vec(&self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name.clone()],
            Self::Many(names) => names.clone(),
        }
    }
}

/// What a check does when it finds something.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnFail {
    /// The run is refused.
    #[default]
    Fail,
    /// The rows are set aside; only for checks of rows.
    Quarantine,
    /// It is said.
    Warn,
}

/// One check. It has exactly one kind, and may have `on_fail`, `max_rows` and `max_ratio`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckSpec {
    /// These columns are never null.
    pub not_null: Option<OneOrMany>,
    /// These columns together never come twice.
    pub unique: Option<OneOrMany>,
    /// A column has only these values.
    pub accepted: Option<AcceptedSpec>,
    /// A column lies between two values.
    pub range: Option<RangeSpec>,
    /// A column matches a regular expression.
    pub matches: Option<MatchesSpec>,
    /// A column's values are there in another source or model.
    pub references: Option<ReferencesSpec>,
    /// How many rows there are.
    pub row_count: Option<RowCountSpec>,
    /// A timestamp is not too old.
    pub freshness: Option<FreshnessSpec>,
    /// A condition that every row meets; null counts as met.
    pub expression: Option<String>,
    /// A file with a SELECT of the offending rows.
    pub query: Option<String>,
    /// A sum equals the sum over other sources or models.
    pub same_total: Option<SameTotalSpec>,
    /// A sum is zero.
    pub balanced: Option<BalancedSpec>,
    /// There are as many rows as in this source or model.
    pub joined_once: Option<String>,
    /// What to do with what is found.
    pub on_fail: OnFail,
    /// So many are allowed.
    pub max_rows: Option<u64>,
    /// Such a part of all rows is allowed, as in `0.5%`.
    pub max_ratio: Option<String>,
}

/// A column and its values.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AcceptedSpec {
    /// The column.
    pub column: String,
    /// The values, as text.
    pub values: Vec<String>,
}

/// A column and its bounds.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RangeSpec {
    /// The column.
    pub column: String,
    /// The least value, as text.
    pub min: Option<String>,
    /// The greatest value, as text.
    pub max: Option<String>,
}

/// A column and its pattern.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatchesSpec {
    /// The column.
    pub column: String,
    /// The regular expression.
    pub pattern: String,
}

/// A column and where its values must be.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReferencesSpec {
    /// The column.
    pub column: String,
    /// `source.column` or `model.column`.
    pub r#in: String,
}

/// How many rows.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RowCountSpec {
    /// At least.
    pub min: Option<u64>,
    /// At most.
    pub max: Option<u64>,
}

/// How old.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FreshnessSpec {
    /// The timestamp or date.
    pub column: String,
    /// The greatest age of its newest value at `as_of`: `36h`, `3d`.
    pub max_age: String,
}

/// A sum and where it must be the same.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SameTotalSpec {
    /// Sources or models whose rows together have the same sum.
    pub of: Vec<String>,
    /// The column, of that name everywhere.
    pub sum: String,
    /// Compared per these columns.
    #[serde(default)]
    pub by: Vec<String>,
}

/// A sum that is zero.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BalancedSpec {
    /// The column.
    pub sum: String,
    /// Per these columns.
    #[serde(default)]
    pub by: Vec<String>,
}

/// Where a job's results go.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetSpec {
    /// The connection's name.
    pub connection: String,
    /// Tables or folders, by name.
    pub outputs: IndexMap<String, OutputSpecFile>,
    /// What is refused although it is well-formed.
    #[serde(default)]
    pub guard: GuardSpec,
    /// What the outputs' columns may become.
    #[serde(default)]
    pub contract: Contract,
}

/// One output.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OutputSpecFile {
    /// The model or source that it holds.
    pub from: String,
    /// How its rows become visible.
    pub mode: Mode,
    /// The columns that identify a row. `merge` needs them.
    #[serde(default)]
    pub key: Vec<String>,
    /// `history`: the column of the model that says since when a row is so; it becomes `valid_from`. Unless set, the run's `as_of`.
    pub effective: Option<String>,
    /// `merge`, `history`: what becomes of rows that the model no longer has. Anything but `ignore` needs a model that sees
    /// everything.
    #[serde(default)]
    pub deletes: Deletes,
    /// The columns that a match may change; unless set, all.
    #[serde(default)]
    pub update: Vec<String>,
    /// Of several rows with one key, the one with the greatest value here wins.
    pub latest_by: Option<String>,
    /// The columns whose values make a range. `replace_range` needs them.
    #[serde(default)]
    pub range: Vec<String>,
    /// In folders and buckets: files are laid into one folder for each value of these columns, as `period=2026-10/`.
    #[serde(default)]
    pub partition_by: Vec<String>,
    /// Control totals of what was written.
    pub totals: Option<TotalsSpec>,
}

/// What is refused although it is well-formed.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSpec {
    /// Whether `replace` may leave an output without rows.
    pub allow_empty: bool,
    /// How much of an output `deletes` may take out in one run, as in `5%`. Unless set, `50%`.
    pub max_deleted: Option<String>,
    /// How much smaller an output may become in one run, as in `10%`. Unless set, it may.
    pub max_shrink: Option<String>,
}

/// A part of a whole: `10%`, `0.5%`, in millionths.
pub fn parts_per_million(written: &str) -> Option<u64> {
    let number = written.trim().strip_suffix('%')?.trim();
    let value = crate::connector::columns::decimal(number, b'.', None, 7, 4).ok()?;
    u64::try_from(value).ok().filter(|value| *value <= 1_000_000)
}

/// An overlap as it is written: a span of time, or a count.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum OverlapSpec {
    /// `1000`: for cursors that are whole numbers.
    Count(u64),
    /// `2h`: for cursors that are times.
    Span(String),
}

impl OverlapSpec {
    /// The overlap, unless what is written is none.
    pub fn get(&self) -> Option<Overlap> {
        match self {
            Self::Count(count) => i64::try_from(*count).ok().map(Overlap::Count),
            Self::Span(written) => match written.parse::<u32>() {
                Ok(count) => Some(Overlap::Count(count.into())),
                Err(_) => micros(written).map(Overlap::Micros),
            },
        }
    }
}

/// A span of time: `90s`, `15m`, `2h`, `3d`, in microseconds.
pub fn micros(written: &str) -> Option<i64> {
    let written = written.trim();
    let at = written.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = written.split_at(at);
    let each = match unit.trim() {
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" | "min" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        "w" => 604_800_000_000,
        _ => return None,
    };
    number.parse::<i64>().ok()?.checked_mul(each)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_parts_are_exact() {
        for (written, expected) in [
            ("10%", Some(100_000)),
            ("0.5%", Some(5_000)),
            ("100%", Some(1_000_000)),
            ("101%", None),
            ("10", None),
            ("-1%", None),
        ] {
            assert_eq!(parts_per_million(written), expected, "{written}");
        }
        for (written, expected) in [
            ("2h", Some(7_200_000_000)),
            ("90s", Some(90_000_000)),
            ("3d", Some(259_200_000_000)),
            ("2", None),
            ("h", None),
            ("2y", None),
        ] {
            assert_eq!(micros(written), expected, "{written}");
        }
    }
}
