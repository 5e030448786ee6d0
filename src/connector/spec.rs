//! What a job asks of a connector, as plain data: streams to read, outputs to write.
//!
//! Nothing here holds a handle or a secret, and everything serialises, so that a scan can be sent to another
//! machine as it is.

use std::{fmt, sync::Arc};

use arrow::datatypes::{Schema, SchemaRef};
use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{types::ColumnType, watermark::Overlap};

/// One stream of rows that a job reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamSpec {
    /// The source's name in the job.
    pub name: String,
    /// Where the rows are.
    pub read: Read,
    /// Types that the job declares; they win over what the source says. Spelled as in the job file.
    pub columns: IndexMap<String, String>,
    /// How the bytes of files are to be understood.
    pub format: Option<Format>,
    /// The cursor, for incremental reads.
    pub cursor: Option<CursorSpec>,
    /// The zone of timestamps that have none, as an IANA name.
    pub timezone: Option<String>,
    /// What to do with a row that cannot be read.
    pub bad_rows: BadRows,
    /// How many rows may be set aside before the run fails.
    pub max_bad_rows: u64,
    /// Columns in which a value that does not fit becomes null, and is counted.
    pub unfit_as_null: Vec<String>,
}

impl StreamSpec {
    /// All of something, as its connection tells it.
    pub fn whole(name: &str, read: Read) -> Self {
        Self {
            name: name.to_owned(),
            read,
            columns: IndexMap::new(),
            format: None,
            cursor: None,
            timezone: None,
            bad_rows: BadRows::Error,
            max_bad_rows: 0,
            unfit_as_null: Vec::new(),
        }
    }

    /// The declared type of `column`.
    pub fn declared(&self, column: &str) -> Option<ColumnType> {
        self.columns.get(column).and_then(|written| written.parse().ok())
    }
}

/// Where a stream's rows are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Read {
    /// A table or view; for a folder, an output that a job published there.
    Table(String),
    /// A SELECT in the source's own dialect.
    Query {
        /// The file it stands in, as the user knows it.
        file: String,
        /// The SELECT.
        sql: String,
    },
    /// One file, read whole on every run.
    File(String),
    /// Files by pattern.
    Files {
        /// A glob, relative to the connection's root.
        pattern: String,
        /// Whether each file is read once, or all of them on every run.
        once: bool,
    },
    /// What an API answers.
    Request(Box<ApiRequest>),
}

/// A request to an API, and where the rows are in its answers.
///
/// `$name` in `path`, `query`, `headers` and `body` is a parameter of the job; with `incremental`, `$from` and `$until` are the
/// window. A query parameter whose `$from` has no value yet is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiRequest {
    /// Behind the connection's URL.
    pub path: String,
    /// `get` unless set.
    #[serde(default)]
    pub method: Method,
    /// What stands behind `?`.
    #[serde(default)]
    pub query: IndexMap<String, String>,
    /// Headers beside those of the connection.
    #[serde(default)]
    pub headers: IndexMap<String, String>,
    /// With `method: post`: a JSON document, as text.
    pub body: Option<String>,
    /// With `method: post`: whether the request may be sent again when its answer was lost. Unless set, no.
    #[serde(default)]
    pub repeatable: bool,
    /// Where the list of rows is in an answer, as JSONPath: `$.data.items`. Unless set, the answer is the list.
    pub records: Option<String>,
    /// Where a column is in a row, as JSONPath: `rate: $.value.amount`. Unless set, under the column's own name.
    #[serde(default)]
    pub fields: IndexMap<String, String>,
    /// How the list goes on. Unless set, one answer holds all of it.
    pub pages: Option<Pages>,
    /// How `$from` and `$until` are written: `rfc3339`, `unix`, `unix_ms`, or a `strftime` format. Unless set, `rfc3339`;
    /// days as `2026-10-31`.
    pub time_format: Option<String>,
}

/// How a request asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// GET.
    #[default]
    Get,
    /// POST.
    Post,
}

/// How a list goes on over several answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pages {
    /// The style.
    pub kind: PageStyle,
    /// `cursor`, `next_url`: where the answer says how to go on, as JSONPath. `header`: the header's name.
    pub next: Option<String>,
    /// The query parameter that asks for a page: by default `offset`, `page` or `cursor`.
    pub param: Option<String>,
    /// `offset`, `page`: rows of a page, told to the server as `size_param`. An `offset` counts what came.
    pub size: Option<u64>,
    /// The query parameter for `size`; by default `limit`.
    pub size_param: Option<String>,
    /// `page`: the first page's number; by default 1.
    pub first: Option<u64>,
    /// `cursor`, `next_url`: whether an answer that lacks even the place where `next` would stand ends the list. Unless set, only null,
    /// an empty text or a missing last name does: a path that is misspelt would end every list with its first page.
    #[serde(default)]
    pub lenient: bool,
    /// `offset`, `page`: whether the list keeps still while it is read. Unless set, it is read until two readings are equal, since
    /// a row that comes or goes moves others from one page to another.
    #[serde(default)]
    pub stable: bool,
}

/// The styles of paging.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PageStyle {
    /// By the number of rows before the page; ends with an empty page.
    Offset,
    /// By the page's number; ends with an empty page.
    Page,
    /// By a token in the answer's body; ends where there is none.
    Cursor,
    /// By the header `Link: <…>; rel="next"`.
    Link,
    /// By a URL in the answer's body.
    NextUrl,
    /// By a token in a header of the answer.
    Header,
}

impl PageStyle {
    /// Whether rows can move from one page to another while the list is read.
    pub fn shifts(self) -> bool {
        matches!(self, Self::Offset | Self::Page)
    }
}

/// A text with each `$name` replaced by its value, and `$$` by `$`.
pub fn with_values(text: &str, mut value: impl FnMut(&str) -> String) -> String {
    let mut parts = text.split('$');
    let mut bound = parts.next().unwrap_or_default().to_owned();
    let mut doubled = false;
    for part in parts {
        let end = part.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        if doubled {
            doubled = false;
            bound.push_str(part);
        } else if part.is_empty() {
            doubled = true;
            bound.push('$');
        } else if name.is_empty() {
            bound.push('$');
            bound.push_str(part);
        } else {
            bound.push_str(&value(name));
            bound.push_str(rest);
        }
    }
    bound
}

/// The cursor of an incremental read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CursorSpec {
    /// One column, or several in order.
    pub columns: Vec<String>,
    /// How far behind the mark to read again.
    pub overlap: Option<Overlap>,
    /// What to do with rows whose cursor is null.
    pub on_null: OnNull,
}

/// What to do with rows whose cursor is null.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNull {
    /// Refuse the run.
    #[default]
    Error,
    /// Read them again on every run.
    Include,
    /// Leave them out, and count them as filtered.
    Exclude,
}

/// What to do with a row that cannot be read: ragged, or with a value that does not fit its column.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BadRows {
    /// Refuse the run, with line and reason.
    #[default]
    Error,
    /// Set the row aside and go on.
    Quarantine,
}

/// The kinds of files that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FormatKind {
    /// Separated values.
    Csv,
    /// One JSON object a line.
    JsonLines,
    /// One JSON array of objects.
    Json,
    /// Apache Parquet.
    Parquet,
}

/// How the bytes of files are to be understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// The kind. Unless set, by the file's ending: `.csv`, `.tsv`, `.jsonl`, `.ndjson`, `.json`, `.parquet`, also
    /// with `.gz` or `.zst` behind it.
    pub kind: Option<FormatKind>,
    /// CSV: whether the first line names the columns. Without it, `columns` names them in order.
    #[serde(default = "yes")]
    pub header: bool,
    /// CSV: one character between fields. Unless set, a comma.
    pub delimiter: Option<String>,
    /// CSV: one character around fields, or `none`. Unless set, `"`.
    pub quote: Option<String>,
    /// CSV: one character before a quote inside quotes. Unless set, quotes are doubled.
    pub escape: Option<String>,
    /// CSV: lines that start with this character are skipped.
    pub comment: Option<String>,
    /// CSV: whether blanks around unquoted fields are dropped.
    #[serde(default)]
    pub trim: bool,
    /// The mark before decimals, `.` or `,`.
    pub decimal: Option<String>,
    /// The mark between thousands, which is dropped.
    pub thousands: Option<String>,
    /// How dates are written, in `strftime` notation, such as `%d.%m.%Y`.
    pub date: Option<String>,
    /// How timestamps are written, in `strftime` notation.
    pub timestamp: Option<String>,
    /// The encoding's name, such as `latin1`, `windows-1252`, `shift_jis`, `utf-16le`. Unless set, UTF-8.
    pub encoding: Option<String>,
    /// Unquoted words that mean null, beside the empty field.
    #[serde(default)]
    pub nulls: Vec<String>,
}

fn yes() -> bool {
    true
}

impl Default for Format {
    fn default() -> Self {
        Self {
            kind: None,
            header: true,
            delimiter: None,
            quote: None,
            escape: None,
            comment: None,
            trim: false,
            decimal: None,
            thousands: None,
            date: None,
            timestamp: None,
            encoding: None,
            nulls: Vec::new(),
        }
    }
}

/// How the rows of an output become visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Rows are added.
    Append,
    /// Rows are inserted, or updated by key.
    Merge,
    /// The whole table is replaced.
    Replace,
    /// All rows of the ranges that this run produced are replaced.
    ReplaceRange,
    /// Every version of a row is kept, with `valid_from` and `valid_to`.
    History,
}

/// What becomes of rows that the output holds and the model no longer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Deletes {
    /// They stay.
    #[default]
    Ignore,
    /// They stay, and `deleted_at` says since when they are gone.
    Soft,
    /// They are deleted; of `history`, their last version ends.
    KeyCompare,
}

/// The column by which staged rows of a merge say that their key is to be taken out.
pub const GONE: &str = "_floodmark_gone";

impl Mode {
    /// Whether this mode needs a model that sees everything.
    pub fn needs_whole(self) -> bool {
        matches!(self, Self::Replace | Self::ReplaceRange)
    }
}

impl Mode {
    /// Whether rows are told apart by a key.
    pub fn needs_key(self) -> bool {
        matches!(self, Self::Merge | Self::History)
    }

    /// Whether nothing stays of what was there before.
    pub fn replaces_all(self) -> bool {
        self == Self::Replace
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Append => "append",
            Self::Merge => "merge",
            Self::Replace => "replace",
            Self::ReplaceRange => "replace_range",
            Self::History => "history",
        })
    }
}

/// What becomes of a column that is new, gone or of another type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NewColumn {
    /// Refuse the run.
    #[default]
    Error,
    /// Add it; older rows are null there.
    Add,
}

/// What becomes of a column that the model no longer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DroppedColumn {
    /// Refuse the run.
    #[default]
    Error,
    /// Keep it; newer rows are null there.
    Keep,
}

/// What becomes of a column whose type changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TypeChange {
    /// Refuse the run.
    #[default]
    Error,
    /// Take it if every old value fits the new type exactly.
    Widen,
}

/// What a target's tables may become.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Contract {
    /// A column that the output does not have yet.
    pub new_column: NewColumn,
    /// A column that the model no longer has.
    pub dropped_column: DroppedColumn,
    /// A column whose type changed.
    pub type_change: TypeChange,
}

/// One output of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputSpec {
    /// The table, or the folder below the root.
    pub name: String,
    /// How rows become visible.
    pub mode: Mode,
    /// The columns that identify a row.
    pub key: Vec<String>,
    /// The columns that a match may change; all, if empty.
    pub update: Vec<String>,
    /// The columns whose values make a range.
    pub range: Vec<String>,
    /// Range values named on the command line, deleted also where the run produced no row for them.
    pub named_ranges: Vec<String>,
    /// The columns by whose values files are laid into folders.
    pub partition_by: Vec<String>,
    /// What the table may become.
    pub contract: Contract,
    /// Whether the output's rows are replaced whatever the mode says (`--full-refresh`).
    pub rebuild: bool,
    /// Whether staged rows of a merge have the column [`GONE`], which is not the output's: where it is true the row with that
    /// key is deleted.
    pub marked: bool,
}

impl OutputSpec {
    /// A condition on staged rows `s`, in any SQL: the row is to be there. With ` AND ` before it.
    pub fn and_stays(&self) -> String {
        if self.marked { format!(" AND NOT s.\"{GONE}\"") } else { String::new() }
    }

    /// The columns of staged rows that are the output's.
    pub fn own(&self, staged: &Schema) -> SchemaRef {
        let own = staged.fields().iter().filter(|field| !self.marked || field.name() != GONE);
        Arc::new(Schema::new(own.cloned().collect::<Vec<_>>()))
    }
}

/// How strong a target's promise is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// Rows and watermark commit in one act.
    ExactlyOnce,
    /// Repeats change nothing, by this key.
    EffectivelyOnce(Vec<String>),
    /// Rows may come twice.
    AtLeastOnce,
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExactlyOnce => f.write_str("exactly once"),
            Self::EffectivelyOnce(key) => write!(f, "effectively once, by {}", key.join(", ")),
            Self::AtLeastOnce => f.write_str("at least once"),
        }
    }
}
