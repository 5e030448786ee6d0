//! What stands between floodmark and the systems that it reads and writes.
//!
//! A connector is a value in [`CONNECTORS`]; no other module names one. It knows streams, windows and outputs
//! as plain data ([`spec`]), and neither jobs nor runs nor files of SQL. What a connector promises are the
//! numbered sentences of [`Source`] and [`Target`]; `contract` tests them, for every connector.

use std::{any::Any, collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use datafusion::physical_plan::SendableRecordBatchStream;
use indexmap::IndexMap;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{Notify, watch};
use url::Url;

use crate::{
    error::{Error, Result, nearest, without_values},
    names::JobId,
    record::LoadRecord,
    runtime,
    spool::Scratch,
    watermark::{Mark, Position, Window},
};
use spec::{Guarantee, OutputSpec, StreamSpec};

pub mod columns;
pub mod condition;
#[cfg(test)]
pub(crate) mod contract;
pub mod evolve;
pub mod files;
pub mod http;
pub mod json;
pub mod postgres;
pub mod rows;
pub mod scan;
#[cfg(test)]
#[path = "../../tests/services/mod.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "shared with the tests of the whole program, which use the rest"
)]
mod services;
pub mod spec;
pub mod sqlite;
pub mod tap;

/// Every connector there is.
pub static CONNECTORS: &[&Connector] = &[
    &files::CONNECTOR,
    &files::bucket::S3,
    &files::bucket::GCS,
    &files::bucket::AZURE,
    &http::CONNECTOR,
    &postgres::CONNECTOR,
    &sqlite::CONNECTOR,
];

/// A kind of system.
#[derive(Debug)]
pub struct Connector {
    /// What `kind:` says.
    pub name: &'static str,
    /// One line for lists.
    pub summary: &'static str,
    /// The schema of its options; their doc comments are the user's documentation.
    pub options: fn() -> schemars::Schema,
    /// The schemes of the URLs that say where such a system is: `sqlite` for `sqlite:///data/erp.db`.
    pub schemes: &'static [&'static str],
    /// Variables of the environment that give an option where the project does not: the variable and the option.
    pub variables: &'static [(&'static str, &'static str)],
    /// Options that say together who asks: if the project gives one of them, variables give none.
    pub credentials: &'static [&'static str],
    /// The options that such a URL stands for, without those behind its `?`.
    pub from_url: fn(&Url) -> Result<serde_json::Map<String, serde_json::Value>>,
    /// Checks the options and opens nothing.
    pub open: fn(Options) -> Result<Arc<dyn Connection>>,
}

impl Connector {
    /// The connector that `kind` names.
    pub fn named(kind: &str) -> Option<&'static Self> {
        CONNECTORS.iter().copied().find(|connector| connector.name == kind)
    }

    /// The connector and the options that a URL stands for. What is behind `?` are options by their names.
    ///
    /// # Errors
    ///
    /// If it is no URL, or not one of a connector's. Never with the URL's text, which may hold a password.
    pub fn of_url(written: &str) -> Result<(&'static Self, serde_json::Value)> {
        let schemes = || CONNECTORS.iter().flat_map(|connector| connector.schemes).copied();
        let known = || format!("Such as `{}://…`.", schemes().collect::<Vec<_>>().join("://…`, `"));
        let none = |why: String| Error::configuration("its value is no URL").note(why).hint(known());
        let (scheme, rest) = written
            .split_once(':')
            .filter(|(scheme, _)| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
            .ok_or_else(|| none("it does not start with a scheme".to_owned()))?;
        // To the standard `file:data` is `file:///data`; in a scheme that it does not know a path stays as written.
        let url = Url::parse(&format!("x-{scheme}:{rest}")).map_err(|error| none(error.to_string()))?;
        let connector = CONNECTORS.iter().copied().find(|connector| connector.schemes.contains(&scheme));
        let connector = connector.ok_or_else(|| {
            let error = Error::configuration(format!("there is no connector for `{scheme}://…`"));
            match nearest(scheme, schemes()) {
                Some(near) => error.hint(format!("Did you mean `{near}://…`?")),
                None => error.hint(known()),
            }
        })?;
        let mut options = (connector.from_url)(&url)?;
        let schema = (connector.options)().to_value();
        for (name, value) in url.query_pairs() {
            let properties = schema.get("properties").and_then(serde_json::Value::as_object);
            let known: Vec<&str> =
                properties.into_iter().flat_map(|known| known.keys()).map(String::as_str).collect();
            let types = properties.and_then(|known| known.get(&*name)).map(|option| option["type"].clone());
            let types = types.ok_or_else(|| {
                let error = Error::configuration(format!("there is no option `{name}` for `{scheme}://…`"));
                match nearest(&name, known.iter().copied()) {
                    Some(near) => error.hint(format!("Did you mean `{near}`?")),
                    None => error.hint(format!("There are: {}.", known.join(", "))),
                }
            })?;
            let integer =
                types == "integer" || types.as_array().is_some_and(|types| types.contains(&"integer".into()));
            let value = if integer {
                value.parse::<u64>().map(serde_json::Value::from).map_err(|_| {
                    Error::configuration(format!("the option `{name}` is a whole number"))
                        .hint(format!("Such as `{scheme}:…?{name}=1000`."))
                })?
            } else {
                value.into()
            };
            options.insert(name.into_owned(), value);
        }
        Ok((connector, options.into()))
    }
}

/// A connection's options, with every reference resolved.
#[derive(Clone)]
pub struct Options {
    /// The connection's name in the project.
    pub name: String,
    /// The project's folder: relative paths start there.
    pub base: PathBuf,
    /// The options, without `kind`.
    pub values: serde_json::Value,
    /// Where copies may be kept while the connection lives.
    pub spill: PathBuf,
}

impl fmt::Debug for Options {
    /// Without the values, which may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Options {
    /// The options as a connector's own struct.
    ///
    /// # Errors
    ///
    /// If they do not fit, which validation against the schema has told before.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.values.clone()).map_err(|error| {
            Error::configuration(format!("the options of connection `{}` do not fit", self.name))
                .note(without_values(&error.to_string()))
                .hint("`floodmark schema connections` lists them.")
        })
    }
}

/// A folder that a connector fills with files, to be read as any other; people know it as `shown`.
fn folder(name: &str, shown: &str, root: PathBuf) -> Arc<dyn Connection> {
    files::reader(name, shown, root)
}

/// What is common to URLs of buckets: the bucket, and the prefix in it.
fn bucket_of(url: &Url) -> Result<(String, Option<String>)> {
    let bucket = url.host_str().filter(|_| url.username().is_empty() && url.port().is_none());
    let bucket = bucket.ok_or_else(|| {
        let scheme = url.scheme().trim_start_matches("x-");
        Error::configuration(format!("a `{scheme}` URL names a bucket, and no user and no port"))
            .hint(format!("Such as `{scheme}://bucket/prefix`."))
    })?;
    let prefix = percent_encoding::percent_decode_str(url.path().trim_matches('/')).decode_utf8_lossy();
    Ok((bucket.to_owned(), (!prefix.is_empty()).then(|| prefix.into_owned())))
}

/// The path of a URL whose system is a file: everything behind `scheme://`, or behind `scheme:` where it is relative.
fn path_of(url: &Url) -> Result<String> {
    let misplaced = || {
        let scheme = url.scheme().trim_start_matches("x-");
        Error::configuration(format!("a `{scheme}` URL has no place for a host or a user"))
            .hint(format!("Three slashes for an absolute path, none for one in the project: `{scheme}:///data/x`, `{scheme}:data/x`."))
    };
    if url.has_host() || !url.username().is_empty() {
        return Err(misplaced());
    }
    let path = percent_encoding::percent_decode_str(url.path()).decode_utf8();
    path.map(std::borrow::Cow::into_owned)
        .map_err(|_| Error::configuration("the path of this URL is not UTF-8"))
}

/// Who answered, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// The product and its version.
    pub product: String,
    /// Where it is, without secrets.
    pub place: String,
}

/// A table that a connection offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CatalogTable {
    /// Its name, as a job would write it.
    pub name: String,
    /// The schema that it is in, where there are schemas.
    pub schema: Option<String>,
    /// Whether it is a view.
    pub view: bool,
    /// Its columns and their types, in the source's own words.
    pub columns: Vec<(String, String)>,
    /// The columns of its primary key.
    pub key: Vec<String>,
    /// About how many rows it has, if the source keeps count.
    pub rows: Option<u64>,
}

impl CatalogTable {
    /// Columns that may grow with every change: what `incremental` could go by, the likeliest first.
    pub fn cursors(&self) -> Vec<&str> {
        const WORDS: [&str; 8] =
            ["updated", "modified", "changed", "last_", "mtime", "created", "inserted", "loaded"];
        let time = |of: &str| of.starts_with("timestamp") || of.starts_with("datetime");
        let likely = |name: &str| WORDS.iter().position(|word| name.to_lowercase().contains(word));
        let mut found: Vec<(usize, &str)> = self
            .columns
            .iter()
            .filter(|(_, of)| time(&of.to_lowercase()))
            .filter_map(|(name, _)| Some((likely(name)?, name.as_str())))
            .collect();
        found.sort_unstable();
        let number = |of: &str| of.to_lowercase().contains("int");
        let counted = match self.key.as_slice() {
            [one] => self.columns.iter().find(|(name, of)| name == one && number(of)),
            _ => None,
        };
        found.into_iter().map(|(_, name)| name).chain(counted.map(|(name, _)| name.as_str())).collect()
    }
}

/// A system, reached by one connection of the project.
#[async_trait]
pub trait Connection: fmt::Debug + Send + Sync {
    /// Reaches the system and says who is there.
    async fn ping(&self) -> Result<Identity>;
    /// The tables there.
    async fn discover(&self) -> Result<Vec<CatalogTable>>;
    /// The reading side, if there is one.
    fn source(&self) -> Option<&dyn Source>;
    /// The writing side, if there is one.
    fn target(&self) -> Option<&dyn Target>;
}

/// How far each stream of a job was read, by the source's name.
pub type Marks = BTreeMap<String, Mark>;

/// How sure a bound is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exactness {
    /// No row below the bound can still appear.
    Exact,
    /// None can, unless a clock is off by more than the margin.
    Margin,
    /// Some can: what comes late is found by the overlap, as far as that goes.
    Lookback,
}

impl fmt::Display for Exactness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Margin => "margin",
            Self::Lookback => "lookback",
        })
    }
}

/// What each stream is read for in this run.
#[derive(Debug, Clone, Default)]
pub struct Bounds {
    /// The window of each stream, by its name.
    pub windows: IndexMap<String, Window>,
    /// How sure each window's end is.
    pub exactness: BTreeMap<String, Exactness>,
    /// What a person should know: rows from the future, a file that changed.
    pub warnings: Vec<String>,
}

impl Bounds {
    /// Reads a stream from where its mark is to `hi`; a table that is empty has none, and stays where it is.
    ///
    /// # Errors
    ///
    /// If the window cannot follow the mark, see [`Window::after`].
    pub fn follow(
        &mut self,
        stream: &StreamSpec,
        mark: Option<&Mark>,
        hi: Option<Position>,
        exactness: Exactness,
    ) -> Result<()> {
        let hi = match (hi, mark) {
            (Some(hi), _) => hi,
            (None, Some(Mark::Cursor(lo))) => lo.clone(),
            (None, _) => Position(Vec::new()),
        };
        // A transaction that a run before this one did not see yet may be older than where that run ended, by a moment: then nothing is
        // new. A clock that went back by more is refused.
        let hi = match mark {
            Some(Mark::Cursor(lo)) if exactness != Exactness::Exact && hi.is_shortly_before(lo) => lo.clone(),
            _ => hi,
        };
        let overlap = stream.cursor.as_ref().and_then(|cursor| cursor.overlap);
        let window = Window::after(mark, hi, overlap).map_err(|error| {
            Error::data(format!("source `{}`: {error}", stream.name))
                .hint("If that is right, load it anew: `floodmark run --full-refresh`.")
        })?;
        self.windows.insert(stream.name.clone(), window);
        self.exactness.insert(stream.name.clone(), exactness);
        Ok(())
    }
}

/// One consistent view of a system, held open until the last scan has ended.
#[derive(Clone)]
pub struct Snapshot {
    /// What a person or another system could call it.
    pub token: String,
    /// What keeps it open; only the connector that made it looks inside.
    pub hold: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot").field("token", &self.token).finish_non_exhaustive()
    }
}

/// When a run happens.
#[derive(Debug, Clone, Copy)]
pub struct RunTime {
    /// The machine's clock, for bounds.
    pub now: DateTime<Utc>,
    /// What `now()` is in SQL; no bound lies after it.
    pub as_of: DateTime<Utc>,
}

/// In the metadata of a described schema: nothing is there yet, and its columns are only those that were declared.
pub const NOTHING_YET: &str = "floodmark:nothing_yet";

/// Where rows come from.
///
/// # Contract
///
/// Who implements this promises the following, and `contract::source` tests it:
///
/// 1. [`describe`](Self::describe) reads no more than it needs to know names and types, and gives the same answer
///    until the source's shape changes.
/// 2. The windows of [`bounds`](Self::bounds) start where the marks end.
/// 3. A scan gives the rows of the window and no others, once each, with the described columns.
///    Of rows that do not meet its conditions it may leave out any; with a limit it may stop after so many.
/// 4. A scan of a projection gives those columns in that order; of none, the right number of rows.
/// 5. Rows written after the snapshot was opened are not seen, and are in the next window.
/// 6. Every row that left the source is counted in the tap: as a row, as filtered or as rejected.
/// 7. A value that does not fit its column is an error that names column and position, or its row is set aside, or it is a
///    null that is counted; never changed in silence.
#[async_trait]
pub trait Source: Send + Sync {
    /// Whether scans of a stream leave out rows that do not meet the conditions of models.
    fn applies_conditions(&self, _: &StreamSpec) -> bool {
        false
    }
    /// The columns of a stream.
    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef>;
    /// What tells this system from another one at the same address, if it has such a thing: a watermark is of one of them only.
    async fn origin(&self) -> Result<Option<String>> {
        Ok(None)
    }
    /// Lists activity and fixes each stream's window, before anything is opened.
    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds>;
    /// One view for everything this run reads from this connection; never older than the bounds.
    async fn snapshot(&self, streams: &[StreamSpec], bounds: &Bounds) -> Result<Snapshot>;
    /// About how many rows a stream has in the snapshot, where that is quickly known. Only how joins are made depends on it.
    async fn rows(&self, _snapshot: &Snapshot, _stream: &StreamSpec) -> Result<Option<u64>> {
        Ok(None)
    }
    /// The rows of one scan. Starts no work before the stream is polled.
    ///
    /// # Errors
    ///
    /// If the snapshot is not this connection's, or is gone.
    fn scan(
        &self,
        snapshot: &Snapshot,
        scan: &scan::Scan,
        tap: Arc<tap::Tap>,
    ) -> Result<SendableRecordBatchStream>;
}

/// Where rows go.
///
/// # Contract
///
/// Who implements this promises the following, and `contract::target` tests it:
///
/// 1. Readers see none of the staged rows until [`Load::commit`], and all of them when it has returned.
/// 2. The record is committed in the same act as the rows, and [`last_record`](Self::last_record) finds it, also in a
///    process that never made one.
/// 3. A commit whose `seq` is not the next one is rejected and changes nothing.
/// 4. A load that is discarded, or dropped, leaves no row behind.
/// 5. The counts of [`Staged`] are those of the commit.
/// 6. `merge` updates what its key finds, inserts the rest, and touches no row that is equal already.
/// 7. `replace` leaves exactly the staged rows; `replace_range` exactly them within their ranges.
/// 8. What the contract refuses (a new, a dropped, a retyped column) is refused before anything is written.
/// 9. A key that is null, or comes twice in one load, is refused.
/// 10. What [`sealed`](Self::sealed) finds was staged whole, can be committed once, and is found no more when another release has its `seq`
///     (tested beside the targets that seal).
#[async_trait]
pub trait Target: Send + Sync {
    /// What is promised for this output.
    fn guarantee(&self, output: &OutputSpec) -> Guarantee;
    /// Whether outputs are files that `partition_by` can lay into folders.
    fn has_folders(&self) -> bool {
        false
    }
    /// How rows of a model would get into an output, in a few words, where there is more than one way. A run looks again: the output may
    /// be another one by then.
    async fn way(&self, _output: &OutputSpec, _model: &SchemaRef) -> Result<Option<&'static str>> {
        Ok(None)
    }
    /// The newest record of the job: the truth about what was loaded.
    async fn last_record(&self, job: &JobId) -> Result<Option<LoadRecord>>;
    /// The record of one release of the job: whether an attempt whose answer was lost has landed, also if others did since.
    async fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>>;
    /// The columns that an output has now, and whether it holds rows; `None` if it is not there.
    async fn current(&self, job: &JobId, output: &str) -> Result<Option<Current>>;
    /// The rows that the job's releases set aside: the columns of `check::quarantine_schema`, behind the release's `seq`.
    async fn quarantined(&self, job: &JobId) -> Result<SendableRecordBatchStream>;
    /// What attempts that died left behind of a job and its outputs, and wrote before `before`: no release lists it.
    async fn orphans(&self, _: &JobId, _: &[String], _: DateTime<Utc>) -> Result<Vec<Orphan>> {
        // What a database has not committed is gone with the session.
        Ok(Vec::new())
    }
    /// Removes what [`orphans`](Self::orphans) found.
    async fn remove(&self, _: &[Orphan]) -> Result<()> {
        Ok(())
    }
    /// What attempts had sealed on top of `base`, and nobody knows to be committed: their process died, or their answer was lost.
    /// All of each is there and durable, and waits for [`commit_sealed`](Self::commit_sealed).
    async fn sealed(&self, _: &JobId, _base: Option<&LoadRecord>) -> Result<Vec<LoadRecord>> {
        // What a database has not committed is gone with the session.
        Ok(Vec::new())
    }
    /// Commits what [`sealed`](Self::sealed) found, as its attempt would have.
    async fn commit_sealed(&self, _: &JobId, _: &LoadRecord) -> CommitOutcome {
        CommitOutcome::Rejected(Error::bug("nothing is sealed in this target"))
    }
    /// Starts one attempt of a release on top of `base`, the last record.
    async fn begin(&self, job: &JobId, attempt: &Attempt, base: Option<&LoadRecord>)
    -> Result<Box<dyn Load>>;
}

/// The columns of rows that were set aside, as a target gives them back.
pub fn quarantined_schema() -> SchemaRef {
    use arrow::datatypes::{DataType, Field, Schema};
    let texts =
        ["on", "check", "reason", "position", "row"].map(|name| Field::new(name, DataType::Utf8, false));
    Arc::new(Schema::new(
        [Field::new("seq", DataType::Int64, false)].into_iter().chain(texts).collect::<Vec<_>>(),
    ))
}

/// A file that no release lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// Relative to the target's root.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written.
    pub written_at: DateTime<Utc>,
}

/// What an output is before a load.
#[derive(Debug, Clone)]
pub struct Current {
    /// Its columns, in the target's own order.
    pub schema: SchemaRef,
    /// How many rows it has.
    pub rows: u64,
}

/// One try at one release.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Unique to this try; in the name of everything that it writes.
    pub id: uuid::Uuid,
    /// The run it belongs to.
    pub run_id: uuid::Uuid,
    /// The sequence number that it will commit.
    pub seq: u64,
    /// The incarnation that the target has, or will get by the first commit.
    pub incarnation: uuid::Uuid,
    /// How many outputs it stages: with the last one, a target that can may begin to publish.
    pub outputs: usize,
    /// How many rows outputs held when the run began.
    pub held: Held,
    /// Where rows may be put in the meantime.
    pub scratch: Scratch,
}

/// How many rows outputs held when the run began, which is counted while it goes on.
#[derive(Debug, Clone)]
pub struct Held {
    counts: watch::Receiver<BTreeMap<String, u64>>,
    wanted: Arc<Notify>,
}

/// What tells [`Held`]. Nobody waits for one that is dropped.
#[derive(Debug)]
pub struct Counting {
    counts: watch::Sender<BTreeMap<String, u64>>,
    wanted: Arc<Notify>,
}

impl Counting {
    /// Tells the rows of one output.
    pub fn tell(&self, output: &str, rows: u64) {
        self.counts.send_modify(|counts| counts.extend([(output.to_owned(), rows)]));
    }

    /// Waits until somebody wants to know, or the run takes long.
    pub async fn wanted(&self) {
        runtime::within(Duration::from_secs(1), self.wanted.notified()).await;
    }
}

impl Held {
    /// To be told by who counts.
    pub fn counting() -> (Counting, Self) {
        let (counts, told) = watch::channel(BTreeMap::new());
        let wanted = Arc::new(Notify::new());
        (Counting { counts, wanted: Arc::clone(&wanted) }, Self { counts: told, wanted })
    }

    /// Nobody counts.
    pub fn unknown() -> Self {
        Self::counting().1
    }

    /// Says that what is large should be counted now: rows are where the target has them, and it will work alone for a while.
    pub fn want(&self) {
        self.wanted.notify_one();
    }

    /// The rows of one output, once they are counted; `None` if they are not.
    pub async fn of(&self, output: &str) -> Option<u64> {
        self.want();
        let mut told = self.counts.clone();
        let counts = told.wait_for(|counts| counts.contains_key(output)).await.ok()?;
        counts.get(output).copied()
    }
}

/// What staging one output came to. Nothing of it is visible yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Staged {
    /// Rows that the model produced.
    pub rows: u64,
    /// Rows that will be new.
    pub inserted: u64,
    /// Rows that will be changed.
    pub updated: u64,
    /// Rows that are in the target already, as they are.
    pub unchanged: u64,
    /// Rows that will be gone.
    pub deleted: u64,
    /// Rows that the output has now.
    pub rows_before: u64,
    /// Rows that the output will have.
    pub rows_after: u64,
}

impl Staged {
    /// Whether a commit would change the output at all.
    pub fn changes(&self) -> bool {
        self.inserted + self.updated + self.deleted > 0
    }
}

/// What came of a commit. `Unknown` is settled by asking the target, never by guessing.
#[derive(Debug)]
pub enum CommitOutcome {
    /// The release is visible. What could not be done behind it, for people: nothing of it can undo the release.
    Committed(Option<String>),
    /// It is not, and will not be.
    Rejected(Error),
    /// The answer was lost.
    Unknown(Error),
}

/// One attempt of a job's atomic release.
#[async_trait]
pub trait Load: Send {
    /// Writes `rows` where readers do not look, and says what a commit would change.
    async fn stage(&mut self, output: &OutputSpec, rows: SendableRecordBatchStream) -> Result<Staged>;
    /// Keeps rows that were set aside; they become visible with the release.
    async fn quarantine(&mut self, rows: SendableRecordBatchStream) -> Result<u64>;
    /// Makes all staged outputs visible together with `record`.
    async fn commit(self: Box<Self>, record: &LoadRecord) -> CommitOutcome;
    /// Removes what was staged.
    async fn discard(self: Box<Self>) -> Result<()>;
}
