//! From a job to a plan: names resolved, SQL parsed and typed, edges decided, guarantees derived.
//!
//! Planning asks sources for the names and types of columns, and reads no rows. What a run would do is all here;
//! `explain` prints it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use arrow::datatypes::{DataType, Schema, SchemaRef, TimeUnit};
use chrono::{DateTime, Utc};
use datafusion::{common::tree_node::TreeNodeRecursion, logical_expr::LogicalPlan, prelude::SessionContext};
use indexmap::IndexMap;

use crate::{
    check::Check,
    connector::{
        Connection, NOTHING_YET, columns,
        condition::Condition,
        scan::{OpenSources, Order, POSITION_COLUMN, Scan, ScanTable, with_position},
        spec::{ApiRequest, CursorSpec, Deletes, Guarantee, Mode, OutputSpec, Read, StreamSpec, with_values},
    },
    dimension::{self, Dimension},
    error::{Error, ErrorKind, Place, Problem, Result, nearest},
    functions::rules,
    job::{
        GuardSpec, JobFile, OnFail, OverlapSpec, SourceSpec,
        param::{Param, ParamError},
    },
    model::plain_schema,
    names::{JobId, quoted, quoted_list},
    project::{JobDocument, PROJECT_CONNECTION, Project},
    record::totals::{Totals, TotalsSpec},
    session::{self, Tables},
    spool::Scratch,
    types::describe,
    watermark::{CursorValue, Overlap, Position, Window},
};

pub mod replicate;
pub mod sql;

/// What the command line says about a run.
#[derive(Debug, Clone)]
pub struct Request {
    /// What `now()` is.
    pub as_of: DateTime<Utc>,
    /// Values of parameters.
    pub params: BTreeMap<String, String>,
    /// Whether everything is read again and replaces what was there.
    pub full_refresh: bool,
    /// Ranges that `replace_range` also deletes.
    pub ranges: Vec<String>,
    /// A range that is read again instead of what is new.
    pub backfill: Option<Backfill>,
    /// Rows that were set aside go through the job instead of what is new.
    pub replay: Option<Replay>,
}

impl Request {
    /// Whether the run reads something else than what is new, so that watermarks stay.
    pub fn leaves_marks(&self) -> bool {
        self.backfill.is_some() || self.replay.is_some()
    }
}

/// Rows that were set aside go through the job again. The watermarks stay.
#[derive(Debug, Clone)]
pub struct Replay {
    /// Only those of this release.
    pub release: Option<u64>,
    /// Whether they win over rows that an output holds under their keys, which may be newer.
    pub overwrite: bool,
}

/// A range of cursors that is read again. The watermarks stay.
#[derive(Debug, Clone)]
pub struct Backfill {
    /// Where it begins.
    pub from: String,
    /// Where it ends, before this value.
    pub to: String,
    /// The source; unless named, every one that is read by a cursor.
    pub source: Option<String>,
}

/// A job, ready to run.
#[derive(Debug)]
pub struct Plan {
    /// The job's identity.
    pub id: JobId,
    /// What `now()` is.
    pub as_of: DateTime<Utc>,
    /// What is read.
    pub streams: IndexMap<String, Stream>,
    /// What is computed, in an order in which it can be.
    pub models: IndexMap<String, Model>,
    /// What must hold.
    pub checks: Vec<Check>,
    /// What is written.
    pub outputs: Vec<Output>,
    /// Where to.
    pub target: String,
    /// What is refused although it is well-formed.
    pub guard: GuardSpec,
    /// The fingerprint of the job's file, its SQL, its parameters, and what its connections are written as.
    pub mapping_fp: String,
    /// What a person should know.
    pub warnings: Vec<Problem>,
}

impl Plan {
    /// Whether the order in which rows come decides about nothing that outputs hold.
    pub fn is_order_free(&self) -> bool {
        self.models.values().all(|model| model.order != Order::Decides)
            && self.outputs.iter().all(|output| output.latest_by.is_none())
    }

    /// Whether a source goes into an output as it comes: it is not written down, so nobody else reads it, and what the output holds is not asked for.
    pub fn is_copied(&self, source: &Stream) -> bool {
        let takes = |output: &Output| output.from == source.spec.name && !output.dimension.looks_back();
        !source.spool && self.outputs.iter().any(takes)
    }

    /// What the order of a source's rows is to those that read it. An output shows it, and so do checks, which count rows; of rows that are set
    /// aside the number tells one from another.
    pub fn order_of(&self, source: &str) -> Order {
        let is_shown = |check: &Check| {
            check.on == source
                || check.reads().iter().any(|read| read == source)
                || check.spec.on_fail == OnFail::Quarantine && self.upstream(&check.on).contains(source)
        };
        let mut models = self.models.values().filter(|model| model.select.reads.contains(source));
        if !self.is_order_free() {
            Order::Decides
        } else if self.outputs.iter().any(|output| output.from == source)
            || self.checks.iter().any(is_shown)
            || models.any(|model| model.order == Order::Shows)
        {
            Order::Shows
        } else {
            Order::Unseen
        }
    }

    /// The sources that a source or model is made from.
    pub fn upstream<'a>(&'a self, relation: &'a str) -> BTreeSet<&'a str> {
        let (mut found, mut waiting) = (BTreeSet::new(), vec![relation]);
        while let Some(name) = waiting.pop() {
            match self.models.get(name) {
                Some(model) => waiting.extend(model.select.reads.iter().map(String::as_str)),
                None => {
                    found.insert(name);
                }
            }
        }
        found
    }
}

impl Plan {
    /// What is asked of each source that leaves out what its model does not want, as far as a source can be told.
    ///
    /// # Errors
    ///
    /// If a model cannot be computed.
    pub async fn asked(&self, scratch: &Scratch) -> Result<IndexMap<&str, Vec<Condition>>> {
        let context = session::for_models(scratch, self.as_of, Arc::new(OpenSources::default()));
        for (name, stream) in &self.streams {
            context.register_table(name, Arc::new(scan_table(stream, Window::Whole)))?;
        }
        for (name, model) in &self.models {
            context.register_table(name, placeholder(name, &model.schema))?;
        }
        let mut asked = IndexMap::new();
        for (name, stream) in self.streams.iter().filter(|(_, stream)| stream.selective && !stream.spool) {
            let reader = self.models.values().find(|model| model.select.reads.contains(name));
            let Some(reader) = reader else { continue };
            let logical = context.state().optimize(&typed(&context, &reader.select).await?)?;
            asked.insert(name.as_str(), conditions(&logical, name, &stream.schema));
        }
        Ok(asked)
    }
}

/// A source in a plan.
#[derive(Debug, Clone)]
pub struct Stream {
    /// What is asked of the connector.
    pub spec: StreamSpec,
    /// The connection's name.
    pub connection: String,
    /// The columns that models see.
    pub schema: SchemaRef,
    /// Whether a run sees its window only.
    pub partial: bool,
    /// Whether its rows are written down because several read them, or checks look at all of them together.
    pub spool: bool,
    /// Control totals.
    pub totals: Option<TotalsSpec>,
    /// Whether its source leaves out what a model does not want.
    pub selective: bool,
}

impl Stream {
    /// The window of a backfill, if this stream has one.
    ///
    /// # Errors
    ///
    /// If its ends are no values of the cursor, or stand the wrong way round.
    pub fn again(&self, backfill: &Backfill) -> Result<Option<Window>> {
        let Some(first) = self.spec.cursor.as_ref().and_then(|cursor| cursor.columns.first()) else {
            return Ok(None);
        };
        if backfill.source.as_ref().is_some_and(|source| *source != self.spec.name) {
            return Ok(None);
        }
        let of = self.schema.field_with_name(first)?.data_type().clone();
        let zone = self.spec.timezone.as_deref().map(columns::zone).transpose()?;
        let value = |written: &str| -> Result<Position> {
            let wrong = || {
                Error::configuration(format!("`{written}` is no value of the cursor `{first}`, which is {}", describe(&of)))
                    .hint("Such as `2026-10-01`, `2026-10-01T08:00:00Z`, or a number; `floodmark state show` tells where the watermark is.")
            };
            Ok(Position::of(match &of {
                DataType::Utf8 => CursorValue::Text(written.to_owned()),
                DataType::Date32 => columns::date(written, None)
                    .ok()
                    .and_then(chrono::NaiveDate::from_epoch_days)
                    .map(CursorValue::Date)
                    .ok_or_else(wrong)?,
                DataType::Timestamp(..) => columns::instant(written, None, zone.or(Some(chrono_tz::UTC)))
                    .ok()
                    .and_then(DateTime::from_timestamp_micros)
                    .map(CursorValue::instant)
                    .ok_or_else(wrong)?,
                _ => CursorValue::Int(written.parse().map_err(|_| wrong())?),
            }))
        };
        let (from, to) = (value(&backfill.from)?, value(&backfill.to)?);
        if from >= to {
            return Err(Error::configuration(format!(
                "nothing lies between `{}` and `{}`",
                backfill.from, backfill.to
            ))
            .hint("`--from` comes before `--to`."));
        }
        Ok(Some(Window::Cursor { lo: Some(from.clone()), from: Some(from), hi: to }))
    }

    /// What is read, in words that change only if a mark of it would mean something else.
    pub fn identity(&self) -> String {
        let what = match &self.spec.read {
            Read::Table(table) => format!("table `{table}`"),
            Read::Query { file, .. } => format!("query `{file}`"),
            // What is behind `?` may be a signature.
            Read::File(path) => format!("file `{}`", path.split('?').next().unwrap_or_default()),
            // Each file is remembered by itself.
            Read::Files { .. } => "files".to_owned(),
            Read::Request(request) => format!("request `{}`", request.path),
        };
        let cursor = self.spec.cursor.as_ref().map(|cursor| format!(" by {}", cursor.columns.join(", ")));
        format!("{what} of connection `{}`{}", self.connection, cursor.unwrap_or_default())
    }
}

/// A model in a plan.
#[derive(Debug, Clone)]
pub struct Model {
    /// Its SELECT.
    pub select: sql::Select,
    /// Its columns.
    pub schema: SchemaRef,
    /// Whether a windowed source is upstream.
    pub partial: bool,
    /// Whether its rows are written down.
    pub spool: bool,
    /// What the order of the rows that it reads is to its own.
    pub order: Order,
}

/// An output in a plan.
#[derive(Debug, Clone)]
pub struct Output {
    /// What is asked of the target.
    pub spec: OutputSpec,
    /// The source or model that it holds.
    pub from: String,
    /// The column that decides between rows with one key.
    pub latest_by: Option<String>,
    /// Control totals.
    pub totals: Option<TotalsSpec>,
    /// The columns of its model.
    pub schema: SchemaRef,
    /// What it does beside merging.
    pub dimension: Dimension,
    /// What the target promises.
    pub guarantee: Guarantee,
}

impl Output {
    /// The rows that it takes from its model: where several have one key, the one that `latest_by` prefers.
    ///
    /// # Errors
    ///
    /// If a column cannot be named.
    pub fn sql(&self) -> Result<String> {
        let columns = quoted_list(self.schema.fields().iter().map(|field| field.name().as_str()))?;
        let from = quoted(&self.from)?;
        let Some(latest) = &self.latest_by else { return Ok(format!("SELECT {columns} FROM {from}")) };
        // Of a history every version has a latest row of its own.
        let key = quoted_list(self.spec.key.iter().chain(&self.dimension.effective).map(String::as_str))?;
        let latest = quoted(latest)?;
        Ok(format!(
            "SELECT {columns} FROM (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY {latest} DESC NULLS LAST) AS _nth FROM {from}) WHERE _nth = 1"
        ))
    }
}

/// Columns of outputs that jobs of this project publish, by connection and output: what a job sees that is planned
/// before the other has run.
pub type Promised = HashMap<(String, String), PromisedOutput>;

/// An output that another job will have published by the time.
#[derive(Debug, Clone)]
pub struct PromisedOutput {
    /// Its columns.
    pub schema: SchemaRef,
    /// The columns that identify a row.
    pub key: Vec<String>,
}

/// Plans one job.
///
/// # Errors
///
/// Every mistake that planning finds, each with its place.
pub async fn plan(
    project: &Project,
    job: &JobDocument,
    request: &Request,
    promised: &Promised,
    connections: &BTreeMap<String, Arc<dyn Connection>>,
    scratch: &Scratch,
) -> Result<Plan> {
    let expanded = replicate::expand(&job.job, &job.document, connections, promised).await?;
    Planner {
        project,
        job: expanded.as_ref().unwrap_or(&job.job),
        document: &job.document,
        request,
        promised,
        connections,
        problems: Vec::new(),
        warnings: Vec::new(),
        unseen: BTreeSet::new(),
    }
    .plan(scratch)
    .await
}

struct Planner<'a> {
    project: &'a Project,
    job: &'a JobFile,
    document: &'a crate::project::yaml::Document,
    request: &'a Request,
    promised: &'a Promised,
    connections: &'a BTreeMap<String, Arc<dyn Connection>>,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Sources of which only the declared columns are known, because nothing is there yet.
    unseen: BTreeSet<String>,
}

impl Planner<'_> {
    fn take(&mut self, error: Error, path: &[&str]) -> Option<Error> {
        if error.kind() != ErrorKind::Configuration {
            return Some(error);
        }
        self.problems.extend(error.at(self.document.place(path)).into_problems());
        None
    }

    fn done(&mut self) -> Result<()> {
        Error::of(ErrorKind::Configuration, std::mem::take(&mut self.problems))
    }

    async fn plan(mut self, scratch: &Scratch) -> Result<Plan> {
        let params = self.params();
        let selects = self.selects(&params);
        self.done()?;
        let positions = selects.values().any(|select| select.file.text.contains(POSITION_COLUMN));
        let mut streams = self.streams(positions, &params).await?;
        let order = self.order(&selects, &streams);
        self.done()?;
        let mut tables = Tables::for_models(scratch, self.request.as_of, Arc::default());
        for (name, stream) in &streams {
            tables.add(name, Arc::new(scan_table(stream, Window::Whole)))?;
        }
        let mut models: IndexMap<String, Model> = IndexMap::new();
        let mut readers: BTreeMap<String, usize> = BTreeMap::new();
        for name in order {
            let Some(select) = selects.get(&name) else { continue };
            match typed(&tables.context()?, select).await {
                Ok(logical) => {
                    // Who goes round reads again each time.
                    let times = if is_recursive(&logical) { 2 } else { 1 };
                    for table in scanned(&logical) {
                        *readers.entry(table).or_default() += times;
                    }
                    for (what, span) in rules::floats_of_money(&logical) {
                        let place = span.map(|span| {
                            let of =
                                |location: datafusion::common::Location| sqlparser::tokenizer::Location {
                                    line: location.line,
                                    column: location.column,
                                };
                            sql::place(
                                &select.file,
                                sqlparser::tokenizer::Span { start: of(span.start), end: of(span.end) },
                            )
                        });
                        self.warnings.push(
                            Problem::new(format!(
                                "model `{name}`: `{what}` is exact and becomes a float here"
                            ))
                            .at(place.unwrap_or_else(|| Place::whole(&select.file)))
                            .hint("Cast the other side to a decimal instead."),
                        );
                    }
                    let schema = Arc::new(plain_schema(logical.schema().as_arrow()));
                    if let Some(field) =
                        schema.fields().iter().find(|field| field.data_type() == &DataType::Null)
                    {
                        self.problems.push(
                            Problem::new(format!(
                                "model `{name}`: the column `{}` has no type",
                                field.name()
                            ))
                            .at(Place::whole(&select.file))
                            .hint("Give its null a type: `cast(null as varchar)`."),
                        );
                    }
                    let partial = select.reads.iter().any(|read| {
                        streams.get(read).is_some_and(|stream| stream.partial)
                            || models.get(read).is_some_and(|model| model.partial)
                    });
                    // Readers see the model as a table of its own columns: so uses are counted per model.
                    tables.add(&name, placeholder(&name, &schema))?;
                    let (select, order) = (select.clone(), session::order_of(&logical));
                    models.insert(name.clone(), Model { select, schema, partial, spool: false, order });
                }
                Err(problem) => {
                    for source in self.unseen.iter().filter(|source| select.reads.contains(*source)) {
                        self.problems.push(self.nothing_yet(source));
                    }
                    self.problems.push(problem);
                    // Models above it would only repeat the problem.
                    break;
                }
            }
        }
        self.done()?;
        let relations: IndexMap<String, SchemaRef> = streams
            .iter()
            .map(|(name, stream)| (name.clone(), Arc::clone(&stream.schema)))
            .chain(models.iter().map(|(name, model)| (name.clone(), Arc::clone(&model.schema))))
            .collect();
        let checks = self.checks(&mut tables, &relations, &params, &mut readers).await?;
        // A check that looks at its own relation once more has it made twice.
        for model in
            checks.iter().filter(|check| check.reads_itself()).filter_map(|check| models.get(&check.on))
        {
            model.select.reads.iter().for_each(|read| *readers.entry(read.clone()).or_default() += 1);
        }
        let outputs = self.outputs(&relations, &streams, &models, &mut readers)?;
        self.done()?;
        for (name, stream) in &mut streams {
            let count = readers.get(name).copied().unwrap_or_default();
            stream.spool = is_written_down(name, count, &checks);
            // Checks look at all rows.
            stream.selective &= !is_checked(name, &checks);
            if count == 0 && !is_checked(name, &checks) {
                self.warnings.push(
                    Problem::new(format!("source `{name}` is read by no model and no output"))
                        .at(self.document.key_place(&["sources", name]))
                        .hint("Remove it, or select from it."),
                );
            }
        }
        for (name, model) in &mut models {
            let count = readers.get(name).copied().unwrap_or_default();
            model.spool = is_written_down(name, count, &checks);
        }
        let mapping_fp = fingerprint(&self, &selects, &params, &streams, &checks);
        Ok(Plan {
            id: JobId { project: self.project.name.clone(), job: self.job.job.clone() },
            as_of: self.request.as_of,
            streams,
            models,
            checks,
            outputs,
            target: self.job.target.connection.clone(),
            guard: self.job.target.guard.clone(),
            mapping_fp,
            warnings: self.warnings,
        })
    }

    fn params(&mut self) -> IndexMap<String, Param> {
        let mut params = IndexMap::new();
        for given in self.request.params.keys() {
            if !self.job.params.contains_key(given) {
                let problem = Problem::new(format!("job `{}` has no parameter `{given}`", self.job.job));
                self.problems.push(match nearest(given, self.job.params.keys().map(String::as_str)) {
                    Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                    None => problem,
                });
            }
        }
        for (name, spec) in &self.job.params {
            let given = self.request.params.get(name);
            let by_environment = self.project.settings.params.get(name);
            let value = given.or(by_environment).map(String::as_str);
            let error = match Param::of(spec, value, self.request.as_of) {
                Ok(param) => {
                    params.insert(name.clone(), param);
                    continue;
                }
                Err(error) => error,
            };
            // What the SQL says of it is looked at all the same.
            params.insert(name.clone(), Param::unknown());
            let problem = Problem::new(format!("parameter `{name}`: {error}"));
            self.problems.push(match (&error, given, by_environment) {
                (ParamError::Missing, ..) => problem
                    .at(self.document.key_place(&["params", name]))
                    .hint(format!("Give it with `--param {name}=…`, or a `default:`.")),
                (ParamError::Type(_), ..) => problem
                    .at(self.document.place(&["params", name, "type"]))
                    .hint("A parameter is a string, int, decimal, bool, date or timestamptz."),
                (_, Some(_), _) => problem
                    .note("the command line, or the environment's `FLOODMARK_PARAM_…`, gives it")
                    .hint(format!("It is declared as {}: {}.", spec.r#type, Param::example(&spec.r#type))),
                (_, None, Some(_)) => problem
                    .note(format!(
                        "the environment `{}` in floodmark.yaml gives it",
                        self.project.environment
                    ))
                    .hint(format!("It is declared as {}: {}.", spec.r#type, Param::example(&spec.r#type))),
                (_, None, None) => problem
                    .at(self.document.place(&["params", name, "default"]))
                    .hint(format!("It is declared as {}: {}.", spec.r#type, Param::example(&spec.r#type))),
            });
        }
        params
    }

    fn selects(&mut self, params: &IndexMap<String, Param>) -> IndexMap<String, sql::Select> {
        let mut selects = IndexMap::new();
        for name in self.job.models.keys() {
            let parsed = self
                .project
                .sql(&Project::model_path(self.job, name))
                .and_then(|file| sql::parse(&file, params));
            match parsed {
                Ok(select) => {
                    selects.insert(name.clone(), select);
                }
                Err(error) => self.problems.extend(error.into_problems()),
            }
        }
        selects
    }

    async fn streams(
        &mut self,
        positions: bool,
        params: &IndexMap<String, Param>,
    ) -> Result<IndexMap<String, Stream>> {
        let mut streams = IndexMap::new();
        for (name, source) in &self.job.sources {
            let mut spec = self.stream(name, source)?;
            if let Read::Request(request) = &mut spec.read {
                self.bind(name, request, source.incremental.is_some(), params);
            }
            let connection = source.connection.clone().unwrap_or_else(|| PROJECT_CONNECTION.to_owned());
            let Some(open) = self.connections.get(&connection) else { continue };
            let Some(readable) = open.source() else {
                self.problems.push(
                    Problem::new(format!("connection `{connection}` cannot be read"))
                        .at(self.document.place(&["sources", name]))
                        .hint("`floodmark connections list` says which kinds can be."),
                );
                continue;
            };
            let promised = match &spec.read {
                Read::Table(table) => self.promised.get(&(connection.clone(), table.clone())),
                _ => None,
            };
            let described = match (readable.describe(&spec).await, promised) {
                (Ok(schema), _) => Ok(schema),
                (Err(_), Some(promised)) => Ok(Arc::clone(&promised.schema)),
                (Err(error), None) => Err(error),
            };
            let schema = match described {
                Ok(schema) => schema,
                Err(error) => {
                    if let Some(fatal) = self.take(error, &["sources", name]) {
                        return Err(fatal.at(self.document.key_place(&["sources", name])));
                    }
                    continue;
                }
            };
            let schema = if schema.metadata().contains_key(NOTHING_YET) {
                self.unseen.insert(name.clone());
                Arc::new(schema.as_ref().clone().with_metadata(HashMap::new()))
            } else {
                schema
            };
            let mut known = BTreeSet::new();
            if let Some(twice) = schema.fields().iter().find(|field| !known.insert(field.name())) {
                self.problems.push(
                    Problem::new(format!("source `{name}` has two columns `{}`", twice.name()))
                        .at(self.document.key_place(&["sources", name]))
                        .hint("Give one of them another name where they come from."),
                );
                continue;
            }
            let keys =
                source.key.iter().map(|column| (column, self.document.place(&["sources", name, "key"])));
            let typed = spec
                .columns
                .keys()
                .map(|column| (column, self.document.key_place(&["sources", name, "columns", column])));
            let cursor = spec
                .cursor
                .iter()
                .flat_map(|cursor| &cursor.columns)
                .map(|column| (column, self.document.place(&["sources", name, "incremental", "cursor"])));
            let unfit = spec
                .unfit_as_null
                .iter()
                .map(|column| (column, self.document.place(&["sources", name, "unfit_as_null"])));
            for (column, place) in keys.chain(typed).chain(cursor).chain(unfit) {
                if schema.field_with_name(column).is_err() {
                    let names: Vec<&str> =
                        schema.fields().iter().map(|field| field.name().as_str()).collect();
                    let problem = Problem::new(format!("source `{name}` has no column `{column}`")).at(place);
                    self.problems.push(match nearest(column, names.iter().copied()) {
                        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                        None => problem.hint(format!("It has: {}.", names.join(", "))),
                    });
                }
            }
            self.cursor(name, &spec, &schema);
            if let Some(why) = source.totals.as_ref().and_then(|totals| Totals::problem(totals, &schema)) {
                self.problems.push(
                    Problem::new(format!("source `{name}`, totals: {why}"))
                        .at(self.document.place(&["sources", name, "totals"])),
                );
            }
            let partial = spec.cursor.is_some() || matches!(spec.read, Read::Files { once: true, .. });
            let partial = partial && !self.request.full_refresh;
            let schema = if positions { with_position(&schema) } else { schema };
            streams.insert(
                name.clone(),
                Stream {
                    // Control totals are of all rows.
                    selective: readable.applies_conditions(&spec) && source.totals.is_none(),
                    spec,
                    connection,
                    schema,
                    partial,
                    spool: false,
                    totals: source.totals.clone(),
                },
            );
        }
        self.done()?;
        Ok(streams)
    }

    fn nothing_yet(&self, source: &str) -> Problem {
        let pattern =
            self.job.sources.get(source).and_then(|source| source.files.as_deref()).unwrap_or_default();
        Problem::new(format!(
            "source `{source}`: no file matches `{pattern}` yet, so that only its declared columns are known"
        ))
        .at(self.document.place(&["sources", source, "files"]))
        .hint("Mend the pattern, or declare every column that the job uses.")
    }

    fn stream(&self, name: &str, source: &SourceSpec) -> Result<StreamSpec> {
        let read = match (&source.table, &source.query, &source.file, &source.files) {
            _ if source.request.is_some() => {
                Read::Request(Box::new(source.request.clone().unwrap_or_default()))
            }
            (Some(table), ..) => Read::Table(table.clone()),
            (_, Some(file), ..) => {
                Read::Query { file: file.clone(), sql: self.project.sql(file)?.text.clone() }
            }
            (.., Some(file), _) => Read::File(file.clone()),
            (.., files) => Read::Files {
                pattern: files.clone().unwrap_or_default(),
                once: source.read != Some(crate::job::ReadHow::Always),
            },
        };
        let cursor = source.incremental.as_ref().map(|incremental| CursorSpec {
            columns: incremental.cursor.to_vec(),
            overlap: incremental.overlap.as_ref().and_then(OverlapSpec::get),
            on_null: incremental.on_null,
        });
        Ok(StreamSpec {
            name: name.to_owned(),
            read,
            columns: source.columns.clone(),
            format: source.format.clone(),
            cursor,
            timezone: source.timezone.clone(),
            bad_rows: source.bad_rows,
            max_bad_rows: source.max_bad_rows.unwrap_or(1000),
            unfit_as_null: source.unfit_as_null.clone(),
        })
    }

    /// Puts the values of parameters into a request. `$from` and `$until` stay for the window.
    fn bind(
        &mut self,
        source: &str,
        request: &mut ApiRequest,
        window: bool,
        params: &IndexMap<String, Param>,
    ) {
        let mut unknown = BTreeSet::new();
        let mut value = |name: &str, encode: fn(&str) -> String| match params.get(name) {
            Some(param) => encode(param.text()),
            None if window && matches!(name, "from" | "until") => format!("${name}"),
            None => {
                unknown.insert(name.to_owned());
                String::new()
            }
        };
        let plain = |text: &str| text.to_owned();
        let in_path = |text: &str| {
            percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
        };
        // The value stands within quotes of the document.
        let in_json = |text: &str| {
            let quoted = serde_json::Value::from(text).to_string();
            quoted.get(1..quoted.len() - 1).unwrap_or_default().to_owned()
        };
        request.path = with_values(&request.path, |name| value(name, in_path));
        for text in request.query.values_mut().chain(request.headers.values_mut()) {
            *text = with_values(text, |name| value(name, plain));
        }
        if let Some(body) = &mut request.body {
            *body = with_values(body, |name| value(name, in_json));
        }
        for name in unknown {
            let problem = Problem::new(format!("source `{source}`: there is no parameter `${name}`"))
                .at(self.document.place(&["sources", source, "request"]));
            self.problems.push(match nearest(&name, params.keys().map(String::as_str)) {
                Some(near) => problem.hint(format!("Did you mean `${near}`?")),
                None if matches!(name.as_str(), "from" | "until") => {
                    problem.hint("A window comes with `incremental: { cursor: … }`.")
                }
                None => problem.hint(format!(
                    "Declare it in the job: `params: {{ {name}: {{ type: string }} }}`. A dollar sign is written `$$`."
                )),
            });
        }
    }

    /// A cursor must have an order that source and target agree on, and an overlap that can be taken from it.
    fn cursor(&mut self, name: &str, spec: &StreamSpec, schema: &Schema) {
        let Some(cursor) = &spec.cursor else { return };
        let place = |key| self.document.place(&["sources", name, "incremental", key]);
        for column in &cursor.columns {
            let Ok(field) = schema.field_with_name(column) else { continue };
            let problem = match field.data_type() {
                DataType::Timestamp(_, None) => Problem::new(format!(
                    "source `{name}`: the cursor `{column}` has no time zone"
                ))
                .hint("Declare the zone of its timestamps: `timezone: Europe/Berlin`, or `timezone: UTC`."),
                DataType::Int16
                | DataType::Int32
                | DataType::Int64
                | DataType::Date32
                | DataType::Timestamp(..)
                | DataType::Utf8 => continue,
                other => {
                    Problem::new(format!("source `{name}`: the cursor `{column}` is {}", describe(other)))
                        .hint("A cursor is an int, a date, a timestamp with a zone, or text in binary order.")
                }
            };
            self.problems.push(problem.at(place("cursor")));
        }
        let Some((overlap, first)) = cursor.overlap.zip(cursor.columns.first()) else { return };
        let Ok(first) = schema.field_with_name(first) else { return };
        let problem = match (overlap, first.data_type()) {
            (Overlap::Micros(_), DataType::Date32 | DataType::Timestamp(..)) => return,
            (Overlap::Count(_), of) if of.is_integer() => return,
            (_, of) if of.is_integer() => Problem::new(format!(
                "source `{name}`: the cursor is an int, and no time can be taken from it"
            ))
            .hint("Give the overlap as a number: `overlap: 1000`."),
            (_, DataType::Date32 | DataType::Timestamp(..)) => {
                Problem::new(format!("source `{name}`: the cursor is a time, and the overlap has no unit"))
                    .hint("Such as `overlap: 2h`, or `overlap: 3d`.")
            }
            _ => Problem::new(format!("source `{name}`: a cursor of text has no overlap"))
                .hint("Remove the overlap, or use a cursor of numbers or times."),
        };
        self.problems.push(problem.at(place("overlap")));
    }

    /// The models in an order in which each comes after what it reads.
    fn order(
        &mut self,
        selects: &IndexMap<String, sql::Select>,
        streams: &IndexMap<String, Stream>,
    ) -> Vec<String> {
        for (name, select) in selects {
            for read in &select.reads {
                if !streams.contains_key(read) && !selects.contains_key(read) {
                    let known: Vec<&str> = streams
                        .keys()
                        .chain(selects.keys())
                        .map(String::as_str)
                        .filter(|known| known != name)
                        .collect();
                    let problem = Problem::new(format!(
                        "model `{name}` reads `{read}`, which is no source and no model of the job"
                    ))
                    .at(select.place_of(read));
                    self.problems.push(match nearest(read, known.iter().copied()) {
                        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                        None => problem.hint(format!("There are: {}.", known.join(", "))),
                    });
                }
            }
        }
        let mut order: Vec<String> = Vec::new();
        let mut waiting: Vec<&String> = selects.keys().collect();
        loop {
            let ready: Vec<&String> = waiting
                .iter()
                .copied()
                .filter(|name| {
                    selects.get(*name).is_some_and(|select| {
                        select.reads.iter().all(|read| !selects.contains_key(read) || order.contains(read))
                    })
                })
                .collect();
            if ready.is_empty() {
                break;
            }
            waiting.retain(|name| !ready.contains(name));
            order.extend(ready.into_iter().cloned());
        }
        if let (Some(first), true) = (waiting.first(), self.problems.is_empty()) {
            let names: Vec<&str> = waiting.iter().map(|name| name.as_str()).collect();
            self.problems.push(
                Problem::new(format!("these models read each other in a circle: {}", names.join(", ")))
                    .at(self.document.key_place(&["models", first]))
                    .hint("Take the part that both need into a model of its own."),
            );
        }
        order
    }

    /// What history and deletes need of a model.
    fn dimension(&mut self, name: &str, dimension: &Dimension, model: &Schema, partial: bool) {
        let at = |key: &str| self.document.place(&["target", "outputs", name, key]);
        let mut problems = Vec::new();
        if dimension.deletes != Deletes::Ignore && partial {
            problems.push(
                Problem::new(format!("output `{name}` takes out what its model no longer has, and the model sees only what is new"))
                    .at(at("deletes"))
                    .hint("Read the source whole, without `incremental`; or let deleted rows come as rows with a column that says so."),
            );
        }
        let remembers =
            dimension.history && dimension.effective.is_none() || dimension.deletes == Deletes::Soft;
        if remembers && self.request.full_refresh {
            problems.push(
                Problem::new(format!(
                    "output `{name}` keeps what no source has any more, and `--full-refresh` would forget it"
                ))
                .at(at("mode"))
                .hint("Run without it; or give the output another name, and begin anew there."),
            );
        }
        if let Some(field) =
            dimension.effective.as_ref().and_then(|column| model.field_with_name(column).ok())
            && !matches!(
                field.data_type(),
                DataType::Date32 | DataType::Timestamp(TimeUnit::Microsecond, Some(_))
            )
        {
            problems.push(
                Problem::new(format!(
                    "output `{name}`: `{}` is {}, and no time that a version can begin at",
                    field.name(),
                    describe(field.data_type())
                ))
                .at(at("effective"))
                .hint("Name a date, or a timestamp with a zone."),
            );
        }
        let ours = [
            (dimension.history, dimension::VALID_FROM),
            (dimension.history, dimension::VALID_TO),
            (dimension.deletes == Deletes::Soft, dimension::DELETED_AT),
        ];
        for (_, column) in ours.iter().filter(|(asked, _)| *asked) {
            if model.field_with_name(column).is_ok() && dimension.effective.as_deref() != Some(*column) {
                problems.push(
                    Problem::new(format!("output `{name}` makes a column `{column}`, and the model has one"))
                        .at(at("mode"))
                        .hint("Give the model's column another name."),
                );
            }
        }
        self.problems.extend(problems);
    }

    async fn checks(
        &mut self,
        tables: &mut Tables,
        relations: &IndexMap<String, SchemaRef>,
        params: &IndexMap<String, Param>,
        readers: &mut BTreeMap<String, usize>,
    ) -> Result<Vec<Check>> {
        let mut checks = Vec::new();
        for (on, specs) in &self.job.checks {
            for (index, spec) in specs.iter().enumerate() {
                let index = index.to_string();
                let place = match spec.expression {
                    Some(_) => self.document.place(&["checks", on, &index, "expression"]),
                    None => self.document.place(&["checks", on, &index]),
                };
                let query = match (&spec.query, &spec.expression) {
                    (Some(path), _) => {
                        self.project.sql(path).and_then(|file| sql::parse(&file, params)).map(Some)
                    }
                    (None, Some(expression)) => {
                        Check::expression(on, expression, params, &place).map(Some).map_err(Error::from)
                    }
                    (None, None) => Ok(None),
                };
                let query = match query {
                    Ok(query) => query,
                    Err(error) => {
                        self.problems.extend(error.into_problems());
                        continue;
                    }
                };
                let check = Check { on: on.clone(), spec: spec.clone(), query };
                if let Err(problem) = check.validate(&tables.context()?, relations, &place).await {
                    self.problems.push(problem);
                    continue;
                }
                for other in check.reads() {
                    // A query may look at it as often as it likes.
                    *readers.entry(other).or_default() += if check.query.is_some() { 2 } else { 1 };
                }
                checks.push(check);
            }
        }
        for (name, source) in &self.job.sources {
            if source.key.is_empty() {
                continue;
            }
            let key = crate::job::OneOrMany::Many(source.key.clone());
            for spec in [
                crate::job::CheckSpec { not_null: Some(key.clone()), ..Default::default() },
                crate::job::CheckSpec { unique: Some(key.clone()), ..Default::default() },
            ] {
                checks.push(Check { on: name.clone(), spec, query: None });
            }
        }
        Ok(checks)
    }

    fn outputs(
        &mut self,
        relations: &IndexMap<String, SchemaRef>,
        streams: &IndexMap<String, Stream>,
        models: &IndexMap<String, Model>,
        readers: &mut BTreeMap<String, usize>,
    ) -> Result<Vec<Output>> {
        let mut outputs = Vec::new();
        let connection = self.connections.get(&self.job.target.connection);
        let Some(target) = connection.and_then(|connection| connection.target()) else {
            self.problems.push(
                Problem::new(format!("connection `{}` cannot be written", self.job.target.connection))
                    .at(self.document.place(&["target", "connection"]))
                    .hint("`floodmark connections list` says which kinds can be."),
            );
            return Ok(outputs);
        };
        for (name, output) in &self.job.target.outputs {
            let path = ["target", "outputs", name.as_str()];
            let Some(schema) = relations.get(&output.from) else { continue };
            *readers.entry(output.from.clone()).or_default() += 1;
            let columns: BTreeSet<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            for column in output
                .key
                .iter()
                .chain(&output.range)
                .chain(&output.update)
                .chain(&output.latest_by)
                .chain(&output.effective)
                .chain(&output.partition_by)
            {
                if !columns.contains(column.as_str()) {
                    let problem =
                        Problem::new(format!("output `{name}`: `{}` has no column `{column}`", output.from))
                            .at(self.document.place(&path));
                    self.problems.push(match nearest(column, columns.iter().copied()) {
                        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                        None => problem.hint(format!(
                            "It has: {}.",
                            columns.iter().copied().collect::<Vec<_>>().join(", ")
                        )),
                    });
                }
            }
            if let Some(why) = output.totals.as_ref().and_then(|totals| Totals::problem(totals, schema)) {
                self.problems.push(
                    Problem::new(format!("output `{name}`, totals: {why}")).at(self.document.place(&path)),
                );
            }
            let partial = streams.get(&output.from).is_some_and(|stream| stream.partial)
                || models.get(&output.from).is_some_and(|model| model.partial);
            if partial && output.mode.needs_whole() {
                self.problems.push(
                    Problem::new(format!("output `{name}` replaces rows by those of `{}`, which sees only what is new", output.from))
                        .at(self.document.place(&["target", "outputs", name, "mode"]))
                        .hint("Publish the lines with `merge` or `append` in this job, and let a second job read what was published and replace."),
                );
            }
            let dimension = Dimension {
                history: output.mode == Mode::History,
                effective: output.effective.clone(),
                deletes: output.deletes,
            };
            self.dimension(name, &dimension, schema, partial);
            if !output.partition_by.is_empty() && !target.has_folders() {
                self.problems.push(
                    Problem::new(format!("output `{name}` is a table, and has no folders to lay files into"))
                        .at(self.document.place(&["target", "outputs", name, "partition_by"]))
                        .hint("Remove `partition_by`; it is for files in folders and buckets."),
                );
            }
            let kept: Vec<_> =
                schema.fields().iter().filter(|field| field.name() != POSITION_COLUMN).cloned().collect();
            let spec = OutputSpec {
                name: name.clone(),
                mode: output.mode,
                key: output.key.clone(),
                update: output.update.clone(),
                range: output.range.clone(),
                named_ranges: if output.mode == Mode::ReplaceRange {
                    self.request.ranges.clone()
                } else {
                    Vec::new()
                },
                partition_by: output.partition_by.clone(),
                contract: self.job.target.contract,
                rebuild: self.request.full_refresh,
                marked: false,
            };
            let guarantee = target.guarantee(&spec);
            outputs.push(Output {
                spec,
                from: output.from.clone(),
                latest_by: output.latest_by.clone(),
                totals: output.totals.clone(),
                schema: Arc::new(Schema::new(kept)),
                dimension,
                guarantee,
            });
        }
        Ok(outputs)
    }
}

fn is_checked(relation: &str, checks: &[Check]) -> bool {
    checks.iter().any(|check| check.on == relation)
}

/// Whether a relation with so many readers is written down once: several read it, or its rows are checked together. Rows that are checked one by
/// one are sorted out on the way to the one who reads them.
fn is_written_down(relation: &str, readers: usize, checks: &[Check]) -> bool {
    let passes_on = || {
        let of_rows = checks.iter().filter(|check| check.on == relation).all(Check::is_of_rows);
        readers == 1
            && of_rows
            && !checks.iter().any(|check| check.reads().iter().any(|read| read == relation))
    };
    readers > 1 || is_checked(relation, checks) && !passes_on()
}

/// A stream as a table of a session: all rows of `window`, in their order.
pub fn scan_table(stream: &Stream, window: Window) -> ScanTable {
    let scan = Scan::new(stream.spec.clone(), Arc::clone(&stream.schema), window);
    ScanTable { scan, selective: stream.selective && !stream.spool, rows: None }
}

fn placeholder(name: &str, schema: &SchemaRef) -> Arc<ScanTable> {
    let stream = StreamSpec::whole(name, Read::Table(name.to_owned()));
    let scan = Scan::new(stream, Arc::clone(schema), Window::Whole);
    Arc::new(ScanTable { scan, selective: false, rows: None })
}

/// A SELECT's plan, with all types settled.
///
/// # Errors
///
/// The problem, at its place in the file.
pub async fn typed(context: &SessionContext, select: &sql::Select) -> Result<LogicalPlan, Problem> {
    session::plan_of(context, select.for_datafusion(), &select.file)
        .await
        .map_err(|error| sql::problem(&error, &select.file))
}

fn is_recursive(plan: &LogicalPlan) -> bool {
    let mut found = false;
    // The visitor fails nowhere.
    drop(plan.apply_with_subqueries(|node| {
        found |= matches!(node, LogicalPlan::RecursiveQuery(_));
        Ok(TreeNodeRecursion::Continue)
    }));
    found
}

/// The tables that a plan scans, as often as it does.
pub fn scanned(plan: &LogicalPlan) -> Vec<String> {
    let mut tables = Vec::new();
    drop(plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node {
            tables.push(scan.table_name.table().to_owned());
        }
        Ok(TreeNodeRecursion::Continue)
    }));
    tables
}

/// What a plan wants of the rows of `table`, as far as a source can be told.
fn conditions(plan: &LogicalPlan, table: &str, schema: &Schema) -> Vec<Condition> {
    let mut found = Vec::new();
    drop(plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node
            && scan.table_name.table() == table
        {
            found.extend(scan.filters.iter().filter_map(|filter| Condition::of(filter, schema)));
        }
        Ok(TreeNodeRecursion::Continue)
    }));
    found
}

/// What decides which rows a job makes, as far as a project holds it: two runs of one fingerprint would make the same of the same sources. What
/// references in connections resolve to is not in it.
fn fingerprint(
    planner: &Planner<'_>,
    selects: &IndexMap<String, sql::Select>,
    params: &IndexMap<String, Param>,
    streams: &IndexMap<String, Stream>,
    checks: &[Check],
) -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |part: &str| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    add(&planner.document.file.text);
    selects.values().chain(checks.iter().filter_map(|check| check.query.as_ref())).for_each(|select| {
        add(&select.file.text);
    });
    add(&format!("{params:?}"));
    let json = |value: serde_json::Result<String>| value.unwrap_or_default();
    streams.values().for_each(|stream| add(&json(serde_json::to_string(&stream.spec))));
    let targets = [planner.job.target.connection.as_str()];
    let names: BTreeSet<&str> =
        streams.values().map(|stream| stream.connection.as_str()).chain(targets).collect();
    for connection in names.iter().filter_map(|name| planner.project.connections.get(*name)) {
        add(connection.connector.name);
        add(&json(serde_json::to_string(&connection.options)));
    }
    format!("blake3:{}", hash.finalize().to_hex())
}
