//! The command line: what a verb is called with, and what it calls. Only [`render`] prints.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
};

use clap::{ArgAction, CommandFactory, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    connector::{CONNECTORS, CatalogTable, Connector, spec::Mode},
    error::{Error, ErrorKind, Result},
    plan::{Backfill, Replay, Request},
    project::{self, Project},
    reconcile::{Question, reconcile},
    run::{Conductor, Progress, exit_code, find_project},
    runtime::{self, Clock, SystemClock},
    spool::Scratch,
    state::Store,
};
use render::Renderer;

mod adhoc;
mod clean;
mod init;
mod preview;
mod quarantine;
mod render;
mod state;

/// Batch data integration that is exact, audited before it is published, and never counts twice.
#[derive(Debug, Parser)]
#[command(name = "floodmark", version, max_term_width = 100)]
struct Arguments {
    /// The project's folder. Unless given, the nearest one at or above the current folder.
    #[arg(long, global = true, env = "FLOODMARK_PROJECT", value_name = "DIR")]
    project: Option<PathBuf>,
    /// The environment.
    #[arg(long, global = true, env = "FLOODMARK_ENV", value_name = "NAME")]
    env: Option<String>,
    /// How results are printed.
    #[arg(long, global = true, env = "FLOODMARK_OUTPUT", default_value = "text", value_name = "FORMAT")]
    output: Format,
    /// Tell on stderr what each run does; twice (`-vv`), every step of it.
    #[arg(short, long, global = true, env = "FLOODMARK_VERBOSE", action = ArgAction::Count)]
    verbose: u8,
    /// How stderr is written. `json` is one document a line, and tells as much as `-v`.
    #[arg(long, global = true, env = "FLOODMARK_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    log_format: Format,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Text,
    /// For machines.
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a project that runs at once.
    Init {
        /// Its folder.
        #[arg(default_value = ".")]
        folder: PathBuf,
        /// Make a job in the project instead, which loads the tables of this connection of its.
        #[arg(long, env = "FLOODMARK_FROM", value_name = "CONNECTION")]
        from: Option<String>,
        /// With `--from`: only tables like this.
        #[arg(long, env = "FLOODMARK_TABLES", value_name = "PATTERN")]
        tables: Option<String>,
    },
    /// Parse, resolve, connect and type-check; read no rows.
    Check {
        /// The jobs; all, unless given.
        jobs: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// Show what a run would read and write.
    Plan {
        /// The job.
        job: String,
        #[command(flatten)]
        how: How,
    },
    /// Show rows of a source or model; write nothing.
    Preview {
        /// The job.
        job: String,
        /// The source or model. Unless given, what the first output holds.
        #[arg(long, env = "FLOODMARK_MODEL", value_name = "NAME")]
        model: Option<String>,
        /// How many rows.
        #[arg(long, env = "FLOODMARK_LIMIT", default_value_t = 20, value_name = "ROWS")]
        limit: usize,
        #[command(flatten)]
        how: How,
    },
    /// Run jobs, in the order in which they read each other.
    Run {
        /// The jobs; all, unless given.
        jobs: Vec<String>,
        /// Select jobs by tag: `tag:nightly`. Several with commas.
        #[arg(long, env = "FLOODMARK_SELECT", value_delimiter = ',', value_name = "tag:NAME")]
        select: Vec<String>,
        /// Read everything again, and replace what was there once it is audited.
        #[arg(long, env = "FLOODMARK_FULL_REFRESH")]
        full_refresh: bool,
        /// A range that `replace_range` also deletes, where the run produces no row for it.
        #[arg(long, env = "FLOODMARK_RANGE", value_delimiter = ',', value_name = "VALUE")]
        range: Vec<String>,
        /// The exit code where there is nothing new.
        #[arg(long, env = "FLOODMARK_SKIP_CODE", value_name = "CODE")]
        skip_code: Option<u8>,
        #[command(flatten)]
        how: How,
    },
    /// Show past runs.
    Runs {
        /// One run, by the start of its id.
        id: Option<String>,
        /// How many.
        #[arg(long, env = "FLOODMARK_LIMIT", default_value_t = 20, value_name = "RUNS")]
        limit: u32,
    },
    /// Look at rows that were set aside, or replay them.
    Quarantine {
        #[command(subcommand)]
        verb: QuarantineVerb,
    },
    /// Look at what targets remember.
    State {
        #[command(subcommand)]
        verb: StateVerb,
    },
    /// Read a range of sources again; the watermarks stay.
    Backfill {
        /// The job.
        job: String,
        /// Where to begin: a value of the cursors of the job's sources.
        #[arg(long, env = "FLOODMARK_FROM", value_name = "VALUE")]
        from: String,
        /// Where to end, before this value.
        #[arg(long, env = "FLOODMARK_TO", value_name = "VALUE")]
        to: String,
        /// Only this source; unless given, every one that is read by a cursor.
        #[arg(long, env = "FLOODMARK_SOURCE", value_name = "NAME")]
        source: Option<String>,
        #[command(flatten)]
        how: How,
    },
    /// Remove files that attempts left behind which died: no release lists them.
    Clean {
        /// The jobs; all, unless given.
        jobs: Vec<String>,
        /// How old they must be: longer than the longest run.
        #[arg(long, env = "FLOODMARK_GRACE", default_value = "7d", value_name = "SPAN")]
        grace: String,
        /// Only show them.
        #[arg(long, env = "FLOODMARK_DRY_RUN")]
        dry_run: bool,
        /// Also where the grace is shorter than a day: no run of these jobs goes on anywhere.
        #[arg(long, env = "FLOODMARK_FORCE")]
        force: bool,
    },
    /// Compare what outputs hold with what their sources say, down to the keys that differ.
    ///
    /// Sources are read up to their watermarks and go through the job's models. Ends with 3 where something differs.
    Reconcile {
        /// The job.
        job: String,
        /// Only this output.
        table: Option<String>,
        /// The columns that tell rows apart; unless given, the output's key, or all its columns.
        #[arg(long, env = "FLOODMARK_KEY", value_delimiter = ',', value_name = "COLUMN")]
        key: Vec<String>,
        /// How many differences to list, for each output.
        #[arg(long, env = "FLOODMARK_LIMIT", default_value_t = 20, value_name = "KEYS")]
        limit: usize,
        #[command(flatten)]
        how: How,
    },
    /// Ask files and databases without a project.
    ///
    /// Tables are places in quotes: `'a.csv'`, `'data/*.parquet'`, `'s3://bucket/a.json'`, `'sqlite:erp.db#orders'`.
    Sql {
        /// The SELECT.
        query: String,
        /// How many rows.
        #[arg(long, env = "FLOODMARK_LIMIT", default_value_t = 1000, value_name = "ROWS")]
        limit: usize,
    },
    /// Copy a file or a table without a project.
    ///
    /// Into a Parquet file, a folder, a bucket or a database.
    Copy {
        /// Where from: a file, a pattern of files, or a URL.
        from: String,
        /// Where to: a file `….parquet`, or a URL.
        to: String,
        /// The table to copy.
        #[arg(long, env = "FLOODMARK_TABLE", value_name = "NAME")]
        table: Option<String>,
        /// A SELECT in the source's own dialect.
        #[arg(long, env = "FLOODMARK_QUERY", value_name = "SQL", conflicts_with = "table")]
        query: Option<String>,
        /// What it is called there; unless given, as here.
        #[arg(long, env = "FLOODMARK_TO_TABLE", value_name = "NAME")]
        to_table: Option<String>,
        /// How rows become visible there.
        #[arg(long, env = "FLOODMARK_MODE", default_value = "replace", value_name = "MODE")]
        mode: CopyMode,
        /// With `--mode merge`: the columns that tell rows apart.
        #[arg(long, env = "FLOODMARK_KEY", value_delimiter = ',', value_name = "COLUMN")]
        key: Vec<String>,
    },
    /// Show what a connection offers.
    Discover {
        /// The connection.
        connection: String,
        /// Only tables like this; of a single one, its columns.
        table: Option<String>,
    },
    /// Look at connections.
    Connections {
        #[command(subcommand)]
        verb: ConnectionsVerb,
    },
    /// Print the JSON Schema of a kind of file.
    Schema {
        /// Which.
        kind: SchemaKind,
    },
    /// Print completions for a shell.
    Completions {
        /// Which.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Subcommand)]
enum QuarantineVerb {
    /// How many rows, by job, release and check.
    List {
        /// The job; all, unless given.
        job: Option<String>,
    },
    /// Let rows that were set aside go through the job again.
    ///
    /// In the place of what is new; the watermarks stay. Rows that still do not hold are set aside again.
    Replay {
        /// The job.
        job: String,
        /// Only those of one release; unless given, all that wait.
        #[arg(long, env = "FLOODMARK_RELEASE", value_name = "NUMBER")]
        release: Option<u64>,
        /// Let them win over rows that an output holds under their keys, which may be newer.
        #[arg(long, env = "FLOODMARK_OVERWRITE")]
        overwrite: bool,
        #[command(flatten)]
        how: How,
    },
    /// Let rows that were set aside go: they are not replayed any more, and stay to be looked at.
    Dismiss {
        /// The job.
        job: String,
        /// Only those of one release; unless given, all that wait.
        #[arg(long, env = "FLOODMARK_RELEASE", value_name = "NUMBER")]
        release: Option<u64>,
    },
    /// The rows of a job.
    Show {
        /// The job.
        job: String,
        /// Only those of one release.
        #[arg(long, env = "FLOODMARK_RELEASE", value_name = "NUMBER")]
        release: Option<u64>,
        /// How many rows.
        #[arg(long, env = "FLOODMARK_LIMIT", default_value_t = 100, value_name = "ROWS")]
        limit: usize,
    },
}

#[derive(Debug, Subcommand)]
enum StateVerb {
    /// How far each source of a job was read.
    Show {
        /// The job; all, unless given.
        job: Option<String>,
    },
    /// Take a target as it is now; the watermarks stay.
    Adopt {
        /// The job.
        job: String,
    },
    /// Forget how far a job's sources were read.
    Reset {
        /// The job.
        job: String,
    },
    /// Go on with the history of a job that had another name.
    Rename {
        /// The name that it had.
        old: String,
        /// The name that it has now.
        new: String,
    },
}

#[derive(Debug, Subcommand)]
enum ConnectionsVerb {
    /// List them.
    List,
    /// Reach them.
    Test {
        /// Which; all, unless given.
        names: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CopyMode {
    /// What was there is replaced.
    Replace,
    /// Rows are added.
    Append,
    /// Rows are inserted, or updated by key.
    Merge,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SchemaKind {
    /// `jobs/*.yaml`
    Job,
    /// `floodmark.yaml`
    Project,
    /// `connections.yaml`
    Connections,
}

#[derive(Debug, Default, clap::Args)]
struct How {
    /// A parameter's value. `FLOODMARK_PARAM_<NAME>` in the environment is the same.
    #[arg(long = "param", value_name = "NAME=VALUE")]
    params: Vec<String>,
    /// What `now()` is; no window ends after it.
    #[arg(long, value_name = "TIME", env = "FLOODMARK_AS_OF")]
    as_of: Option<String>,
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            drop(error.print());
            return ExitCode::from(code);
        }
    };
    let level = arguments.verbose.max(u8::from(arguments.log_format == Format::Json));
    let renderer =
        Renderer::new(arguments.output == Format::Json, arguments.log_format == Format::Json, level);
    std::panic::set_hook(Box::new(render::panic_hook));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let code = match runtime {
        Ok(runtime) => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let code = runtime.block_on(Box::pin(execute(arguments, &renderer)));
                runtime.block_on(runtime::tidied());
                code
            }));
            runtime.shutdown_background();
            code.unwrap_or(Ok(70))
        }
        Err(error) => Err(Error::failed("cannot start").note(error.to_string())),
    };
    match code.and_then(|code| {
        render::unwritten().map_or(Ok(code), |error| if code == 0 { Err(error) } else { Ok(code) })
    }) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            renderer.error(&error);
            ExitCode::from(exit_code(error.kind()))
        }
    }
}

async fn execute(arguments: Arguments, renderer: &Renderer) -> Result<u8> {
    let open = || -> Result<Project> {
        let root = match &arguments.project {
            Some(root) => root.clone(),
            None => find_project(&std::env::current_dir().unwrap_or_default())
                .unwrap_or_else(|| PathBuf::from(".")),
        };
        Project::load(&root, arguments.env.as_deref())
    };
    match arguments.verb {
        Verb::Init { from: Some(connection), tables, .. } => {
            renderer.created(&init::job_from(&open()?, &connection, tables.as_deref()).await?);
        }
        Verb::Init { folder, .. } => renderer.created(&init::init(&folder)?),
        Verb::Schema { kind } => renderer.json(&schema(kind)),
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "floodmark", &mut text);
            renderer.raw(&String::from_utf8_lossy(&text));
        }
        Verb::Check { jobs, how } => {
            let (conductor, request) = conductor(open()?, &how, false, Vec::new())?;
            let selected = select(&conductor.project, &jobs, &[])?;
            let plans = conductor.plan_all(&conductor.waves(&selected)?, &request).await?;
            renderer.checked(&plans);
        }
        Verb::Plan { job, how } => {
            let (conductor, request) = conductor(open()?, &how, false, Vec::new())?;
            let selected =
                with_upstream(&conductor, &select(&conductor.project, std::slice::from_ref(&job), &[])?);
            let plans = conductor.plan_all(&conductor.waves(&selected)?, &request).await?;
            if let Some(plan) = plans.get(&job) {
                let mut warnings = Vec::new();
                let asked = conductor.windows(plan, &request, &mut warnings);
                let windows = runtime::within(PLAN_PATIENCE, asked).await.unwrap_or_else(|| {
                    Err(Error::temporary("the source waits for transactions that are open, as a run would"))
                });
                let windows = windows.unwrap_or_else(|error| {
                    warnings.push(format!("what is new is not known: {error}"));
                    indexmap::IndexMap::new()
                });
                let ways = conductor.ways(plan).await.unwrap_or_else(|error| {
                    warnings.push(format!("how rows get into the target is not known: {error}"));
                    indexmap::IndexMap::new()
                });
                renderer.plan(plan, &plan.asked(&conductor.scratch).await?, &windows, &ways, &warnings);
            }
        }
        Verb::Preview { job, model, limit, how } => {
            let (conductor, request) = conductor(open()?, &how, false, Vec::new())?;
            select(&conductor.project, std::slice::from_ref(&job), &[])?;
            let batches = preview::preview(&conductor, &job, model.as_deref(), limit, &request).await?;
            renderer.rows(&batches)?;
        }
        Verb::Run { jobs, select: tags, full_refresh, range, skip_code, how } => {
            let (conductor, request) = conductor(open()?, &how, full_refresh, range)?;
            return run(&conductor, renderer, &jobs, &tags, &request, skip_code).await;
        }
        Verb::Runs { id, limit } => {
            let store = Store::open(&open()?.root)?;
            match id {
                None => renderer.history(&store.runs(limit)?),
                Some(id) => {
                    let runs = store.runs(u32::MAX)?;
                    let run = runs.iter().find(|run| run.run_id.to_string().starts_with(&id));
                    let run = run.ok_or_else(|| {
                        Error::configuration(format!("there is no run `{id}`"))
                            .hint("`floodmark runs` lists them.")
                    })?;
                    renderer.run(run);
                }
            }
        }
        Verb::Quarantine { verb: QuarantineVerb::List { job } } => {
            let project = open()?;
            let jobs = select(&project, &job.into_iter().collect::<Vec<_>>(), &[])?;
            renderer.quarantine(&quarantine::count(&project, &jobs).await?);
        }
        Verb::Quarantine { verb: QuarantineVerb::Replay { job, release, overwrite, how } } => {
            let (conductor, mut request) = conductor(open()?, &how, false, Vec::new())?;
            request.replay = Some(Replay { release, overwrite });
            return run(&conductor, renderer, &[job], &[], &request, None).await;
        }
        Verb::Quarantine { verb: QuarantineVerb::Dismiss { job, release } } => {
            let project = open()?;
            select(&project, std::slice::from_ref(&job), &[])?;
            let record = state::dismiss(&project, &job, release).await?;
            renderer.dismissed(&job, record.as_ref());
        }
        Verb::Quarantine { verb: QuarantineVerb::Show { job, release, limit } } => {
            let project = open()?;
            select(&project, std::slice::from_ref(&job), &[])?;
            renderer.rows(&quarantine::rows(&project, &job, release, limit).await?)?;
        }
        Verb::State { verb: StateVerb::Adopt { job } } => {
            let project = open()?;
            select(&project, std::slice::from_ref(&job), &[])?;
            let record = state::adopt(&project, &job).await?;
            renderer.state(&[(job, Some(record))]);
        }
        Verb::State { verb: StateVerb::Reset { job } } => {
            let project = open()?;
            select(&project, std::slice::from_ref(&job), &[])?;
            let record = state::reset(&project, &job).await?;
            renderer.state(&[(job, Some(record))]);
        }
        Verb::State { verb: StateVerb::Rename { old, new } } => {
            let project = open()?;
            select(&project, std::slice::from_ref(&new), &[])?;
            let record = state::rename(&project, &old, &new).await?;
            renderer.state(&[(new, Some(record))]);
        }
        Verb::Backfill { job, from, to, source, how } => {
            let (conductor, mut request) = conductor(open()?, &how, false, Vec::new())?;
            request.backfill = Some(Backfill { from, to, source });
            return run(&conductor, renderer, &[job], &[], &request, None).await;
        }
        Verb::Clean { jobs, grace, dry_run, force } => {
            let project = open()?;
            let jobs = select(&project, &jobs, &[])?;
            renderer.cleaned(&clean::clean(&project, &jobs, &grace, dry_run, force).await?, dry_run);
        }
        Verb::Reconcile { job, table, key, limit, how } => {
            let (conductor, request) = conductor(open()?, &how, false, Vec::new())?;
            select(&conductor.project, std::slice::from_ref(&job), &[])?;
            let question = Question { output: table, key, limit };
            let reconciled = Box::pin(reconcile(&conductor, &job, &question, &request)).await?;
            renderer.reconciled(&reconciled);
            return Ok(if reconciled.agrees { 0 } else { exit_code(ErrorKind::Data) });
        }
        Verb::Sql { query, limit } => {
            let mut adhoc = adhoc::Adhoc::new()?;
            adhoc.of_query(&query)?;
            let (conductor, request) = conductor(adhoc.load()?, &How::default(), false, Vec::new())?;
            let rows = preview::preview(&conductor, adhoc::JOB, None, limit, &request).await;
            renderer.rows(&rows.map_err(adhoc::plain)?)?;
        }
        Verb::Copy { from, to, table, query, to_table, mode, key } => {
            let mode = match mode {
                CopyMode::Replace => Mode::Replace,
                CopyMode::Append => Mode::Append,
                CopyMode::Merge => Mode::Merge,
            };
            let copy = adhoc::Copy { from, to, table, query, to_table, mode, key };
            let mut adhoc = adhoc::Adhoc::new()?;
            let file = adhoc.of_copy(&copy)?;
            let (conductor, request) = conductor(adhoc.load()?, &How::default(), false, Vec::new())?;
            let Some(file) = file else {
                return run(&conductor, renderer, &[], &[], &request, None).await.map_err(adhoc::plain);
            };
            let rows = preview::stream(&conductor, adhoc::JOB, &request).await.map_err(adhoc::plain)?;
            let (count, bytes) = crate::connector::files::write_parquet(&file, rows, &conductor.scratch)
                .await
                .map_err(adhoc::plain)?;
            renderer.copied(&copy.to, count, bytes);
        }
        Verb::Discover { connection, table } => {
            let project = open()?;
            let known: Vec<&str> = project.connections.keys().map(String::as_str).collect();
            if !known.contains(&connection.as_str()) {
                let error = Error::configuration(format!("there is no connection `{connection}`"));
                return Err(match crate::error::nearest(&connection, known.iter().copied()) {
                    Some(near) => error.hint(format!("Did you mean `{near}`?")),
                    None => error.hint(format!("There are: {}.", known.join(", "))),
                });
            }
            let tables = project.connection(&connection)?.discover().await?;
            renderer.tables(&discovered(tables, table.as_deref(), &connection)?);
        }
        Verb::State { verb: StateVerb::Show { job } } => {
            let project = open()?;
            let jobs = select(&project, &job.into_iter().collect::<Vec<_>>(), &[])?;
            let mut records = Vec::new();
            for name in &jobs {
                let Some(document) = project.jobs.get(name) else { continue };
                let connection = project.connection(&document.job.target.connection)?;
                let id = crate::names::JobId { project: project.name.clone(), job: name.clone() };
                let record = match connection.target() {
                    Some(target) => target.last_record(&id).await?,
                    None => None,
                };
                records.push((name.clone(), record));
            }
            renderer.state(&records);
        }
        Verb::Connections { verb } => {
            let project = open()?;
            match verb {
                ConnectionsVerb::List => renderer.connections(&project),
                ConnectionsVerb::Test { names } => {
                    let names =
                        if names.is_empty() { project.connections.keys().cloned().collect() } else { names };
                    let mut worst = 0;
                    for name in names {
                        let answer = match project.connection(&name) {
                            Ok(connection) => connection.ping().await,
                            Err(error) => Err(error),
                        };
                        if let Err(error) = &answer {
                            worst = worse(worst, exit_code(error.kind()));
                        }
                        renderer.reached(&name, &answer);
                    }
                    return Ok(worst);
                }
            }
        }
    }
    Ok(0)
}

/// How long a plan waits to learn what is new.
const PLAN_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

fn conductor(
    mut project: Project,
    how: &How,
    full_refresh: bool,
    ranges: Vec<String>,
) -> Result<(Conductor, Request)> {
    let clock = SystemClock;
    let as_of = match &how.as_of {
        Some(written) => project::as_of(written)?,
        None => project.as_of()?.unwrap_or_else(|| clock.now()),
    };
    let mut params = BTreeMap::new();
    for given in &how.params {
        let (name, value) = given.split_once('=').ok_or_else(|| {
            Error::configuration(format!("`{given}` gives no parameter a value"))
                .hint("Write `--param name=value`.")
        })?;
        if !project.jobs.values().any(|job| job.job.params.contains_key(name)) {
            let known: Vec<&str> =
                project.jobs.values().flat_map(|job| job.job.params.keys().map(String::as_str)).collect();
            let error = Error::configuration(format!("no job has a parameter `{name}`"));
            return Err(match crate::error::nearest(name, known) {
                Some(near) => error.hint(format!("Did you mean `{near}`?")),
                None => error,
            });
        }
        if params.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(
                Error::configuration(format!("`--param {name}=…` is given twice")).hint("Keep one of them.")
            );
        }
    }
    for name in project.jobs.values().flat_map(|job| job.job.params.keys()) {
        let twin = format!("FLOODMARK_PARAM_{}", name.to_uppercase());
        if !params.contains_key(name)
            && let Some(value) = project::variable(&project.root, &twin)
        {
            params.insert(name.clone(), value);
        }
    }
    let scratch = Scratch::new(&project.limits)?;
    // What connections fetch lies there as well.
    project.limits = scratch.limits.clone();
    let conductor = Conductor {
        project,
        clock: Arc::new(clock),
        scratch,
        progress: Progress::default(),
        stop: CancellationToken::new(),
        opener: crate::run::Opener::default(),
        opened: Mutex::default(),
    };
    Ok((conductor, Request { as_of, params, full_refresh, ranges, backfill: None, replay: None }))
}

/// The tables whose names are like `wanted`.
fn discovered(
    tables: Vec<CatalogTable>,
    wanted: Option<&str>,
    connection: &str,
) -> Result<Vec<CatalogTable>> {
    let Some(wanted) = wanted else { return Ok(tables) };
    let glob = globset::Glob::new(wanted).map_err(|error| {
        Error::configuration(format!("`{wanted}` is no pattern"))
            .note(error.to_string())
            .hint("Such as `gl.*`.")
    })?;
    let glob = glob.compile_matcher();
    let (found, others): (Vec<_>, Vec<_>) = tables.into_iter().partition(|table| glob.is_match(&table.name));
    if found.is_empty() {
        let error = Error::configuration(format!("connection `{connection}` has no table `{wanted}`"));
        return Err(match crate::error::nearest(wanted, others.iter().map(|table| table.name.as_str())) {
            Some(near) => error.hint(format!("Did you mean `{near}`?")),
            None => error.hint(format!("`floodmark discover {connection}` lists them.")),
        });
    }
    Ok(found)
}

/// The jobs that names and tags select.
fn select(project: &Project, names: &[String], tags: &[String]) -> Result<Vec<String>> {
    for name in names {
        if !project.jobs.contains_key(name) {
            let known: Vec<&str> = project.jobs.keys().map(String::as_str).collect();
            let error = Error::configuration(format!("there is no job `{name}`"));
            return Err(match crate::error::nearest(name, known.iter().copied()) {
                Some(near) => error.hint(format!("Did you mean `{near}`?")),
                None if known.is_empty() => {
                    error.hint("The project has no jobs yet: write one into `jobs/`.")
                }
                None => error.hint(format!("There are: {}.", known.join(", "))),
            });
        }
    }
    let mut wanted = Vec::new();
    for tag in tags {
        let tag = tag.strip_prefix("tag:").ok_or_else(|| {
            Error::configuration(format!("`{tag}` selects nothing")).hint("Write `--select tag:nightly`.")
        })?;
        wanted.push(tag.to_owned());
    }
    let selected: Vec<String> = project
        .jobs
        .iter()
        .filter(|(name, _)| names.is_empty() || names.contains(name))
        .filter(|(_, job)| wanted.is_empty() || wanted.iter().any(|tag| job.job.tags.contains(tag)))
        .map(|(name, _)| name.clone())
        .collect();
    if selected.is_empty() {
        return Err(Error::configuration("the selection matches no job")
            .hint("`floodmark check` lists the jobs; `--select` takes `tag:` and a tag of theirs."));
    }
    Ok(selected)
}

fn with_upstream(conductor: &Conductor, selected: &[String]) -> Vec<String> {
    let mut all = selected.to_vec();
    let mut at = 0;
    while let Some(name) = all.get(at).cloned() {
        if let Some(job) = conductor.project.jobs.get(&name) {
            for other in conductor.project.jobs.keys() {
                if !all.contains(other) && conductor.reads_from(job, other) {
                    all.push(other.clone());
                }
            }
        }
        at += 1;
    }
    all
}

async fn run(
    conductor: &Conductor,
    renderer: &Renderer,
    jobs: &[String],
    tags: &[String],
    request: &Request,
    skip_code: Option<u8>,
) -> Result<u8> {
    let selected = select(&conductor.project, jobs, tags)?;
    let replaces = |output: &crate::job::OutputSpecFile| output.mode == Mode::ReplaceRange;
    let in_ranges = selected
        .iter()
        .filter_map(|name| conductor.project.jobs.get(name))
        .any(|job| job.job.target.outputs.values().any(replaces));
    if !request.ranges.is_empty() && !in_ranges {
        return Err(Error::configuration(
            "`--range` goes with `mode: replace_range`, and no output of this run has it",
        )
        .hint("Remove it, or run the job whose output is replaced by ranges."));
    }
    let waves = conductor.waves(&selected)?;
    let stop = conductor.stop.clone();
    let signalled = Arc::new(AtomicU8::new(130));
    let caught = Arc::clone(&signalled);
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return Err(Error::failed("signals cannot be caught, so that the run could not be stopped cleanly"));
    };
    let told = *renderer;
    let _signals = runtime::spawn(async move {
        let mut next = async move || {
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
            }
        };
        let first = next().await;
        caught.store(first, Ordering::Relaxed);
        stop.cancel();
        told.stopping();
        // Whoever asks twice does not want to wait; what a kill leaves behind, the next run puts right.
        runtime::exit(next().await);
    });
    let progress = renderer.progress(conductor.progress.clone());
    let done = conductor.run_all(&waves, request).await;
    drop(progress);
    let done = match done {
        Err(error) if error.kind() == ErrorKind::Interrupted => {
            renderer.error(&error);
            return Ok(signalled.load(Ordering::Relaxed));
        }
        done => done?,
    };
    let mut code = 0;
    for (record, error) in &done {
        renderer.run(record);
        if let Some(error) = error {
            renderer.error(error);
        }
        let own = if record.outcome == crate::record::run::Outcome::Interrupted {
            signalled.load(Ordering::Relaxed)
        } else {
            record.exit_code
        };
        code = worse(code, own);
    }
    let nothing = done.iter().all(|(record, _)| record.outcome == crate::record::run::Outcome::NothingNew);
    Ok(if code == 0 && nothing { skip_code.unwrap_or(0) } else { code })
}

/// The more severe of two exit codes.
fn worse(a: u8, b: u8) -> u8 {
    const ORDER: [u8; 8] = [0, 75, 3, 1, 2, 130, 143, 70];
    let rank = |code: u8| ORDER.iter().position(|known| *known == code).unwrap_or(ORDER.len());
    if rank(b) > rank(a) { b } else { a }
}

fn schema(kind: SchemaKind) -> serde_json::Value {
    match kind {
        SchemaKind::Job => schemars::schema_for!(crate::job::JobFile).to_value(),
        SchemaKind::Project => schemars::schema_for!(project::files::ProjectFile).to_value(),
        SchemaKind::Connections => {
            let kinds: Vec<serde_json::Value> = CONNECTORS
                .iter()
                .map(|connector: &&Connector| {
                    let mut schema = (connector.options)().to_value();
                    if let Some(properties) =
                        schema.get_mut("properties").and_then(serde_json::Value::as_object_mut)
                    {
                        properties.insert(
                            "kind".to_owned(),
                            serde_json::json!({ "const": connector.name, "description": connector.summary }),
                        );
                    }
                    schema
                })
                .collect();
            serde_json::json!({
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "connections.yaml",
                "type": "object",
                "additionalProperties": { "anyOf": kinds }
            })
        }
    }
}

/// Whether a folder may take a new project.
pub(crate) fn is_free(folder: &Path) -> Result<()> {
    if folder.join("floodmark.yaml").exists() {
        return Err(Error::new(
            ErrorKind::Configuration,
            format!("`{}` holds a project already", folder.display()),
        )
        .hint("Choose another folder."));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_has_a_twin_in_the_environment() {
        let mut waiting = vec![Arguments::command()];
        while let Some(command) = waiting.pop() {
            for argument in command.get_arguments() {
                let Some(long) = argument.get_long().filter(|long| *long != "param") else { continue };
                let twin = format!("FLOODMARK_{}", long.to_uppercase().replace('-', "_"));
                assert_eq!(argument.get_env().and_then(|env| env.to_str()), Some(twin.as_str()));
            }
            waiting.extend(command.get_subcommands().cloned());
        }
    }
}
