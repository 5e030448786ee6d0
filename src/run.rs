//! One run of a job, from the marks it finds in the target to the record it leaves there.
//!
//! # What a run promises
//!
//! **Every row of the window is in every output once, or the target is as it was.** The target is asked first; windows are fixed
//! before the snapshot opens; everything is staged where nobody looks and audited there; rows and marks become true in
//! one act of the target; an answer that was lost is settled by asking the target, never by guessing.
//!
//! # What it does not do
//!
//! It does not lock the job: of two runs at once, the sequence number lets one commit, and the other ends with exit code 75. A lease
//! only saves the second one the work.
//!
//! A run is one or more tries, each from the target's last record on: another one begins after what may pass
//! ([`crate::patience`]), and once more, with joins that sort and spill, where a hash join did not fit into the memory.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chrono::{DateTime, SecondsFormat, Utc};
use datafusion::{physical_plan::SendableRecordBatchStream, prelude::SessionContext};
use futures::{StreamExt, future::join_all};
use indexmap::IndexMap;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};
use uuid::Uuid;

use crate::{
    check::{Check, READABLE, quarantine_batch, whole},
    connector::{Attempt, CommitOutcome, Connection, Exactness, Load, Marks, Staged, spec::Mode, tap::Tap},
    dimension::Sides,
    error::{Error, ErrorKind, Result},
    extract::{Bounded, Extract, Joins, Reading, Relations},
    history,
    job::parts_per_million,
    lease::{Lease, Leased},
    plan::{self, Backfill, Output, Plan, Promised, Replay, Request},
    project::{JobDocument, PROJECT_CONNECTION, Project},
    record::{
        LoadRecord, OutputRecord, RECORD_VERSION, Settled, SourceRecord, columns_of,
        run::{CheckReport, Counts, Outcome, OutputReport, RUN_VERSION, RunRecord, SourceReport, Verdict},
        totals::{RowHash, Totals},
    },
    runtime::{self, Clock},
    secret, session,
    spool::{Scratch, Spool},
    state::Store,
    watermark::Window,
};

/// What the renderer looks at while runs go on: the sources and outputs of each job, and their counters.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<Mutex<Vec<Watched>>>);

/// A source or an output of a job, and what it counts.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The job.
    pub job: String,
    /// The source or the output.
    pub name: String,
    /// Its counters.
    pub counter: Counter,
}

/// What is counted while a run goes on.
#[derive(Debug, Clone)]
pub enum Counter {
    /// What is read from a source.
    Read(Arc<Tap>),
    /// Rows on their way into an output.
    Staged(Arc<AtomicU64>),
}

impl Progress {
    pub(crate) fn watch(&self, job: &str, name: &str, counter: Counter) {
        let watched = Watched { job: job.to_owned(), name: name.to_owned(), counter };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(watched);
    }

    /// What moves at the moment, in the order in which it began.
    pub fn watched(&self) -> Vec<Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What all runs of one call share.
#[derive(Debug)]
pub struct Conductor {
    /// The project.
    pub project: Project,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// Memory and disk.
    pub scratch: Scratch,
    /// Counters for the renderer.
    pub progress: Progress,
    /// Ends everything that has not begun to commit.
    pub stop: CancellationToken,
    /// How connections are opened.
    pub opener: Opener,
    /// Those that are open, by name, until a wave of jobs is done: what planning fetched, the run reads.
    pub opened: Mutex<Connections>,
}

/// How connections are opened: by the project, unless a test puts something around them.
#[derive(Clone)]
pub struct Opener(pub Arc<Open>);

/// Opens the connection of that name.
pub type Open = dyn Fn(&Project, &str) -> Result<Arc<dyn Connection>> + Send + Sync;

impl Default for Opener {
    fn default() -> Self {
        Self(Arc::new(Project::connection))
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener")
    }
}

/// Connections by name, opened as jobs need them.
pub type Connections = BTreeMap<String, Arc<dyn Connection>>;

impl Conductor {
    /// The connections that a job uses.
    ///
    /// # Errors
    ///
    /// If one cannot be opened.
    pub fn connections(&self, job: &JobDocument) -> Result<Connections> {
        let names =
            job.job.sources.values().map(|source| source.connection.as_deref().unwrap_or(PROJECT_CONNECTION));
        names
            .chain([job.job.target.connection.as_str()])
            .map(|name| {
                let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
                let connection = match opened.get(name) {
                    Some(connection) => Arc::clone(connection),
                    None => {
                        let connection = self.opener.0(&self.project, name)?;
                        opened.insert(name.to_owned(), Arc::clone(&connection));
                        connection
                    }
                };
                Ok((name.to_owned(), connection))
            })
            .collect()
    }

    /// The jobs in waves: each job after those whose outputs it reads.
    ///
    /// # Errors
    ///
    /// If jobs read each other in a circle.
    pub fn waves(&self, selected: &[String]) -> Result<Vec<Vec<String>>> {
        let reads = |job: &str| -> Vec<&String> {
            let Some(document) = self.project.jobs.get(job) else { return Vec::new() };
            selected.iter().filter(|other| *other != job && self.reads_from(document, other)).collect()
        };
        let mut waves: Vec<Vec<String>> = Vec::new();
        let mut waiting: Vec<&String> = selected.iter().collect();
        while !waiting.is_empty() {
            let ready: Vec<String> = waiting
                .iter()
                .filter(|job| reads(job).iter().all(|other| !waiting.contains(other)))
                .map(|job| (*job).clone())
                .collect();
            if ready.is_empty() {
                let names: Vec<&str> = waiting.iter().map(|name| name.as_str()).collect();
                return Err(Error::configuration(format!(
                    "these jobs read each other's outputs in a circle: {}",
                    names.join(", ")
                ))
                .hint("Let one of them read the source itself."));
            }
            waiting.retain(|job| !ready.contains(job));
            waves.push(ready);
        }
        Ok(waves)
    }

    /// Whether a job reads what the job `other` publishes.
    pub fn reads_from(&self, job: &JobDocument, other: &str) -> bool {
        let Some(other) = self.project.jobs.get(other) else { return false };
        job.job.sources.values().any(|source| {
            let outputs = &other.job.target.outputs;
            // Which tables a pattern stands for is known when it is planned.
            let all = source.tables.is_some() && !outputs.is_empty();
            let one = source.table.as_ref().is_some_and(|table| {
                outputs.contains_key(table) || outputs.keys().any(|output| output.contains('*'))
            });
            source.connection.as_ref() == Some(&other.job.target.connection) && (all || one)
        })
    }

    /// Plans every selected job, in order, so that all mistakes are told before any of them runs.
    ///
    /// # Errors
    ///
    /// All mistakes of all jobs.
    pub async fn plan_all(&self, waves: &[Vec<String>], request: &Request) -> Result<IndexMap<String, Plan>> {
        let (mut plans, mut problems, mut promised) = (IndexMap::new(), Vec::new(), Promised::new());
        for name in waves.iter().flatten() {
            let Some(job) = self.project.jobs.get(name) else { continue };
            let mut request = request.clone();
            request
                .params
                .retain(|param, _| job.job.params.contains_key(param) || waves.iter().flatten().count() == 1);
            let planned = match self.connections(job) {
                Ok(connections) => {
                    plan::plan(&self.project, job, &request, &promised, &connections, &self.scratch).await
                }
                Err(error) => Err(error),
            };
            match planned {
                Ok(plan) => {
                    for output in &plan.outputs {
                        let will_be = plan::PromisedOutput {
                            schema: Arc::new(output.dimension.schema(&output.schema)),
                            key: output.spec.key.clone(),
                        };
                        promised.insert((plan.target.clone(), output.spec.name.clone()), will_be);
                    }
                    plans.insert(name.clone(), plan);
                }
                Err(error) if error.kind() == ErrorKind::Configuration => {
                    problems.extend(error.into_problems());
                }
                Err(error) => return Err(error),
            }
        }
        Error::of(ErrorKind::Configuration, problems)?;
        Ok(plans)
    }

    /// Runs the selected jobs, each wave side by side. A job whose source's job did not succeed is skipped.
    ///
    /// # Errors
    ///
    /// Mistakes of the project; what a job itself comes to is in its record.
    pub async fn run_all(
        &self,
        waves: &[Vec<String>],
        request: &Request,
    ) -> Result<Vec<(RunRecord, Option<Error>)>> {
        drop(self.plan_patiently(waves, request).await?);
        let mut done: Vec<(RunRecord, Option<Error>)> = Vec::new();
        for wave in waves {
            let runs = wave.iter().filter_map(|name| self.project.jobs.get(name)).map(|job| {
                let failed = done.iter().find(|(run, _)| {
                    !matches!(run.outcome, Outcome::Published | Outcome::NothingNew)
                        && self.reads_from(job, &run.job)
                });
                let failed = failed.map(|(run, _)| run.job.clone());
                async move {
                    match failed {
                        Some(other) => {
                            let mut record = self.blank(job, request);
                            record.outcome = Outcome::Skipped;
                            record.warnings.push(format!(
                                "skipped: job `{other}`, which it reads from, did not succeed"
                            ));
                            (record, None)
                        }
                        None => self.run(job, request).await,
                    }
                }
            });
            done.extend(join_all(runs.collect::<Vec<_>>()).await);
            // What was fetched for this wave is let go; the next one reads its own.
            self.opened.lock().unwrap_or_else(PoisonError::into_inner).clear();
        }
        Ok(done)
    }

    /// Plans everything, and again while that may help.
    async fn plan_patiently(
        &self,
        waves: &[Vec<String>],
        request: &Request,
    ) -> Result<IndexMap<String, Plan>> {
        let (began, mut tries) = (Instant::now(), 0);
        loop {
            tries += 1;
            let planned = self.unless_stopped(Box::pin(self.plan_all(waves, request))).await;
            let Err(error) = &planned else { return planned };
            let Some(wait) = self.project.patience.next(error.kind(), tries, began.elapsed()) else {
                return planned;
            };
            warn!("{error}: tried again");
            self.pause(wait).await?;
        }
    }

    /// Waits for as long, more or less, unless the run is stopped.
    async fn pause(&self, wait: Duration) -> Result<()> {
        let wait = runtime::jittered(wait);
        self.unless_stopped(async {
            runtime::sleep(wait).await;
            Ok(())
        })
        .await
    }

    /// What `work` comes to, unless the run is stopped before.
    async fn unless_stopped<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Error::new(ErrorKind::Interrupted, "interrupted; nothing was published")),
            done = work => done,
        }
    }

    /// The record of a run that has done nothing yet.
    pub(crate) fn blank(&self, job: &JobDocument, request: &Request) -> RunRecord {
        RunRecord {
            v: RUN_VERSION,
            run_id: Uuid::now_v7(),
            project: self.project.name.clone(),
            job: job.job.job.clone(),
            environment: self.project.environment.clone(),
            started_at: self.clock.now().to_rfc3339_opts(SecondsFormat::Millis, true),
            duration_ms: 0,
            as_of: request.as_of.to_rfc3339_opts(SecondsFormat::AutoSi, true),
            outcome: Outcome::Failed,
            exit_code: 0,
            seq: None,
            sources: IndexMap::new(),
            outputs: IndexMap::new(),
            checks: Vec::new(),
            quarantined: 0,
            warnings: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// What a run of a plan would read now: the window of each source, and how sure its end is.
    ///
    /// # Errors
    ///
    /// If the target or a source cannot be asked, or what is read cannot follow what was read.
    pub async fn windows(
        &self,
        plan: &Plan,
        request: &Request,
        warnings: &mut Vec<String>,
    ) -> Result<IndexMap<String, (Window, Option<Exactness>)>> {
        let job = self.project.jobs.get(&plan.id.job).ok_or_else(|| Error::bug("no such job"))?;
        let connections = self.connections(job)?;
        let target = connections.get(&plan.target).and_then(|target| target.target());
        let target = target.ok_or_else(|| Error::bug("the target cannot be written"))?;
        let base = target.last_record(&plan.id).await?;
        let marks = history::marks(plan, base.as_ref(), warnings)?;
        let (scratch, joins) = (&self.scratch, Joins::Hashed);
        let reading = Reading::New;
        let extract =
            Extract { plan, base: base.as_ref(), scratch, conductor: self, request, joins, reading };
        let mut windows = IndexMap::new();
        for fixed in extract.fix(&connections, &marks).await? {
            warnings.extend(fixed.bounds.warnings);
            for (name, window) in fixed.bounds.windows {
                let exactness = fixed.bounds.exactness.get(&name).copied();
                windows.insert(name, (window, exactness));
            }
        }
        Ok(windows)
    }

    /// Runs one job. Whatever happens is in the record; an error is also given back, with its places.
    pub async fn run(&self, job: &JobDocument, request: &Request) -> (RunRecord, Option<Error>) {
        let mut record = self.blank(job, request);
        let started = Instant::now();
        let mut request = request.clone();
        request.params.retain(|param, _| job.job.params.contains_key(param));
        let span = info_span!("run", job = %job.job.job, run_id = %record.run_id);
        let result = Box::pin(self.tries(job, &request, &mut record)).instrument(span.clone()).await;
        record.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let error = match result {
            Ok(outcome) => {
                record.outcome = outcome;
                None
            }
            Err(error) => {
                record.outcome = match error.kind() {
                    ErrorKind::Data => Outcome::Refused,
                    ErrorKind::Interrupted => Outcome::Interrupted,
                    _ => Outcome::Failed,
                };
                let messages = error.problems().iter().map(|problem| secret::scrubbed(&problem.message));
                record.errors = messages.collect();
                Some(error)
            }
        };
        for warning in &mut record.warnings {
            *warning = secret::scrubbed(warning);
        }
        record.exit_code = error.as_ref().map_or(0, |error| exit_code(error.kind()));
        span.in_scope(|| {
            let outcome = record.outcome.words();
            info!(outcome, exit_code = record.exit_code, duration_ms = record.duration_ms, "ended");
        });
        if let Err(error) = Store::open(&self.project.root).and_then(|store| store.keep_run(&record)) {
            record.warnings.push(format!("the run could not be recorded here: {error}"));
        }
        (record, error)
    }

    /// Tries until the run has succeeded, or trying again would not help.
    async fn tries(&self, job: &JobDocument, request: &Request, record: &mut RunRecord) -> Result<Outcome> {
        let mut unsettled = None;
        let outcome = Box::pin(self.tries_until(job, request, &mut unsettled, record)).await;
        outcome.map_err(|error| match unsettled {
            Some(Unsettled { committing, .. }) => error.note(format!(
                "whether release {} was published is not known: its answer was lost, and the next run asks the target first",
                committing.seq
            )),
            None => error,
        })
    }

    async fn tries_until(
        &self,
        job: &JobDocument,
        request: &Request,
        unsettled: &mut Option<Unsettled>,
        record: &mut RunRecord,
    ) -> Result<Outcome> {
        info!(as_of = %request.as_of, environment = self.project.environment, "begins");
        let _lease = match Lease::take(&self.project, &job.job.job, record.run_id, &self.clock) {
            Ok(Leased::Held(lease)) => Some(lease),
            Ok(Leased::Passed(whom)) => {
                record.warnings.push(whom);
                None
            }
            Err(error) if error.kind() == ErrorKind::Busy => return Err(error),
            Err(error) => {
                record.warnings.push(format!("other runs of this job are not kept out: {error}"));
                None
            }
        };
        let began = Instant::now();
        let (mut tries, mut joins) = (0, Joins::Hashed);
        let mut blank = record.clone();
        loop {
            tries += 1;
            let error = match Box::pin(self.attempt(job, request, joins, unsettled, record)).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => error,
            };
            let why = error.problems().first().map(|problem| problem.message.clone()).unwrap_or_default();
            let told = if error.kind() == ErrorKind::Memory && joins == Joins::Hashed {
                joins = Joins::Sorted;
                format!("{why}: planned again, with joins that sort and spill")
            } else {
                let Some(wait) = self.project.patience.next(error.kind(), tries, began.elapsed()) else {
                    return Err(match tries {
                        1 => error,
                        _ => error.note(format!("this was try {tries} of the run")),
                    });
                };
                self.pause(wait).await?;
                format!("{why}: tried again")
            };
            warn!("{told}");
            blank.warnings.push(told);
            record.clone_from(&blank);
        }
    }

    /// One try. An earlier one whose commit nobody answered is `unsettled`: if it has landed after all, this one only says so.
    async fn attempt(
        &self,
        job: &JobDocument,
        request: &Request,
        joins: Joins,
        unsettled: &mut Option<Unsettled>,
        record: &mut RunRecord,
    ) -> Result<Outcome> {
        let connections = self.connections(job)?;
        let promised = Promised::new();
        let planned = plan::plan(&self.project, job, request, &promised, &connections, &self.scratch);
        let plan = self.unless_stopped(Box::pin(planned)).await?;
        record.warnings.extend(plan.warnings.iter().map(|warning| warning.message.clone()));
        let open =
            connections.get(&plan.target).cloned().ok_or_else(|| Error::bug("the target is not open"))?;
        let target = open.target().ok_or_else(|| Error::bug("the target cannot be written"))?;
        let base = self.unless_stopped(target.last_record(&plan.id)).await?;
        info!(release = base.as_ref().map_or(0, |base| base.seq), "the target was asked");
        if let Some(seq) = unsettled.as_ref().map(|unsettled| unsettled.committing.seq) {
            let there = self.unless_stopped(target.record_at(&plan.id, seq)).await?;
            if let Some(Unsettled { committing, report }) = unsettled.take()
                && there.is_some_and(|there| there.attempt_id == committing.attempt_id)
            {
                record.warnings.extend(report.warnings.iter().cloned());
                *record = RunRecord { warnings: std::mem::take(&mut record.warnings), ..report };
                return Ok(self.committed(&plan, &committing, record));
            }
        }
        let remembered =
            Store::open(&self.project.root).and_then(|store| store.last_seen(&plan.id, &plan.target));
        let remembered = remembered.unwrap_or_else(|error| {
            record.warnings.push(format!("whether the target is the one of last time is not known: {error}"));
            None
        });
        let (anew, warnings) = (request.full_refresh, &mut record.warnings);
        history::of_target(&plan, target, base.as_ref(), remembered, anew, warnings).await?;
        if request.leaves_marks() && base.is_none() {
            return Err(Error::configuration(format!("job `{}` has not run yet", plan.id.job))
                .hint("Run it first: its first run reads everything."));
        }
        if let Some(backfill) = &request.backfill {
            refuse_backfill(&plan, backfill)?;
        }
        let marks = if anew { Marks::new() } else { history::marks(&plan, base.as_ref(), warnings)? };
        let attempt = Attempt {
            id: Uuid::now_v7(),
            run_id: record.run_id,
            seq: base.as_ref().map_or(1, |base| base.seq + 1),
            incarnation: base.as_ref().map_or_else(Uuid::new_v4, |base| base.incarnation),
            scratch: self.scratch.clone(),
        };
        let load = target.begin(&plan.id, &attempt, base.as_ref()).await?;
        let mut release = Release {
            plan: &plan,
            base: base.as_ref(),
            attempt: &attempt,
            conductor: self,
            load,
            request,
            joins,
        };
        let staged = self.unless_stopped(Box::pin(release.stage(&connections, &marks, record))).await;
        let load_record = match staged {
            Ok(Some(load_record)) => load_record,
            Ok(None) => {
                release.load.discard().await?;
                return Ok(Outcome::NothingNew);
            }
            Err(error) => {
                release.load.discard().await?;
                return Err(error);
            }
        };
        match release.load.commit(&load_record).await {
            CommitOutcome::Committed(warning) => {
                record.warnings.extend(warning);
                Ok(self.committed(&plan, &load_record, record))
            }
            CommitOutcome::Rejected(error) => Err(error),
            CommitOutcome::Unknown(error) => {
                // The answer was lost. The target knows.
                match target.record_at(&plan.id, attempt.seq).await {
                    Ok(Some(landed)) if landed.attempt_id == attempt.id => {
                        Ok(self.committed(&plan, &load_record, record))
                    }
                    _ => {
                        *unsettled = Some(Unsettled { committing: load_record, report: record.clone() });
                        Err(error.hint(
                            "Run again: it asks the target first, and loads nothing that is there already.",
                        ))
                    }
                }
            }
        }
    }

    /// A release has landed: what is left to do, of which nothing can undo it.
    fn committed(&self, plan: &Plan, load_record: &LoadRecord, record: &mut RunRecord) -> Outcome {
        record.seq = Some(load_record.seq);
        info!(release = load_record.seq, "committed");
        let remembered = Store::open(&self.project.root)
            .and_then(|store| store.remember(&plan.id, &plan.target, load_record));
        if let Err(error) = remembered {
            record.warnings.push(format!("the local store could not be brought up to date: {error}"));
        }
        if self.stop.is_cancelled() {
            record.warnings.push("interrupted after the commit had landed: the run is finished".to_owned());
        }
        let changes = |output: &OutputReport| output.inserted + output.updated + output.deleted > 0;
        let changed = record.outputs.values().any(changes) || record.quarantined > 0;
        if changed { Outcome::Published } else { Outcome::NothingNew }
    }
}

/// A release that was committing when its answer was lost, and what its run came to until then.
#[derive(Debug)]
struct Unsettled {
    committing: LoadRecord,
    report: RunRecord,
}

/// Refuses a backfill that would hold rows twice, or that reads nothing.
fn refuse_backfill(plan: &Plan, backfill: &Backfill) -> Result<()> {
    let by_cursor = |name: &String| plan.streams.get(name).is_some_and(|stream| stream.spec.cursor.is_some());
    let wrong = |what: String, hint: &str| Err(Error::configuration(what).hint(hint));
    match &backfill.source {
        Some(source) if !by_cursor(source) => {
            return wrong(
                format!("job `{}` has no source `{source}` that is read by a cursor", plan.id.job),
                "`floodmark plan` lists its sources.",
            );
        }
        None if !plan.streams.keys().any(by_cursor) => {
            return wrong(
                format!("job `{}` reads no source by a cursor", plan.id.job),
                "Other sources are read whole on every run; files by `state reset`.",
            );
        }
        _ => {}
    }
    if let Some(output) = plan.outputs.iter().find(|output| output.spec.mode == Mode::Append) {
        return wrong(
            format!("output `{}` appends, and would hold the rows of the range twice", output.spec.name),
            "Use `mode: merge` with a `key`, or load anew with `--full-refresh`.",
        );
    }
    Ok(())
}

/// The exit code of an error.
pub fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Configuration => 2,
        ErrorKind::Data => 3,
        ErrorKind::Failed | ErrorKind::Memory => 1,
        ErrorKind::Temporary | ErrorKind::Busy => 75,
        ErrorKind::Interrupted => 130,
        ErrorKind::Bug => 70,
    }
}

/// One attempt at one release.
struct Release<'a> {
    plan: &'a Plan,
    base: Option<&'a LoadRecord>,
    attempt: &'a Attempt,
    conductor: &'a Conductor,
    load: Box<dyn Load>,
    request: &'a Request,
    joins: Joins,
}

impl Release<'_> {
    /// Extracts, maps, checks, stages and audits. The record to commit, or `None` where there is nothing to remember.
    async fn stage(
        &mut self,
        connections: &Connections,
        marks: &Marks,
        record: &mut RunRecord,
    ) -> Result<Option<LoadRecord>> {
        let plan = self.plan;
        let extract = Extract {
            plan,
            base: self.base,
            scratch: &self.attempt.scratch,
            conductor: self.conductor,
            request: self.request,
            joins: self.joins,
            reading: Reading::New,
        };
        let Some(relations) = extract.relations(connections, marks, record).await? else { return Ok(None) };
        let Relations { context, taps, windows, waiting, mut aside, row_rejects } = relations;
        let waits = |name: &str| waiting.as_ref().and_then(|waiting| waiting.at(name));
        self.whole_checks(&context, record).await?;
        for check in &record.checks {
            info!(
                check = check.check,
                on = check.on,
                found = check.found,
                verdict = check.verdict.words(),
                "checked"
            );
        }
        refuse(&record.checks, &plan.id.job)?;
        let mut written = IndexMap::new();
        for output in &plan.outputs {
            let (staged, hash) = self.output(&context, output, connections, record).await?;
            self.guard(output, &staged)?;
            if let (Some(waiting), Some(Replay { overwrite: false, .. })) = (&waiting, &self.request.replay) {
                waiting.refuse_overwriting(plan, output, staged.updated)?;
            }
            written.insert(output.spec.name.clone(), (staged, hash));
        }
        // Sources are let go before the target is locked: they may be the same database.
        drop(context);
        let sources = self.account(&taps, &windows, &row_rejects, record)?;
        for (name, source) in &mut record.sources {
            if waits(name).is_some() {
                "set aside before".clone_into(&mut source.window);
            }
        }
        for (name, tap) in &taps {
            let rejects = tap.rejects();
            let rows = rejects.into_iter().map(|reject| {
                [name.clone(), READABLE.to_owned(), reject.reason, reject.position, reject.row]
            });
            aside.push(&quarantine_batch(rows)?)?;
        }
        let aside = aside.finish()?;
        record.quarantined = aside.rows();
        if aside.rows() > 0 {
            self.load.quarantine(aside.stream()).await?;
        }
        let unchanged = plan.outputs.iter().all(|output| {
            written
                .get(&output.spec.name)
                .is_some_and(|(staged, hash)| self.is_unchanged(output, staged, hash))
        });
        if unchanged {
            for output in record.outputs.values_mut() {
                (output.unchanged, output.inserted, output.updated, output.deleted) = (output.rows, 0, 0, 0);
            }
        }
        let before = self.base.map(LoadRecord::marks).unwrap_or_default();
        let after: Marks =
            sources.iter().filter_map(|(name, source)| Some((name.clone(), source.mark.clone()?))).collect();
        // What all still does not hold waits where it is.
        if let (Some(waiting), true) = (&waiting, unchanged) {
            let unread = taps.iter().map(|(name, tap)| (name, tap.rejected_rows()));
            let again = unread.chain(row_rejects.iter().map(|(name, count)| (name, *count)));
            let again: u64 =
                again.filter(|(name, _)| waiting.reaches(plan, name)).map(|(_, count)| count).sum();
            if again >= waiting.count {
                record.warnings.push(format!("none of the {} rows that wait holds yet", waiting.count));
                return Ok(None);
            }
            record.warnings.push(format!(
                "{} rows hold, and change nothing that an output holds",
                waiting.count - again
            ));
        }
        let settled = match waiting {
            Some(waiting) => waiting.settled,
            None if self.request.full_refresh => Settled::before(self.attempt.seq),
            None => Settled::of(self.base),
        };
        let settles = settled != Settled::of(self.base) && !self.request.full_refresh;
        if unchanged && before == after && aside.rows() == 0 && self.base.is_some() && !settles {
            return Ok(None);
        }
        Ok(Some(self.load_record(sources, &written, aside.rows(), settled)))
    }

    /// The checks that look at all rows together, once every relation that they read is there.
    async fn whole_checks(&self, context: &SessionContext, record: &mut RunRecord) -> Result<()> {
        let names: Vec<String> = self.plan.streams.keys().chain(self.plan.models.keys()).cloned().collect();
        for name in names {
            let checks: Vec<&Check> = self.plan.checks.iter().filter(|check| check.on == name).collect();
            if checks.is_empty() {
                continue;
            }
            let rows = context.table(name.as_str()).await?.count().await? as u64;
            record.checks.extend(whole(context, &checks, rows, self.plan.as_of).await?);
        }
        Ok(())
    }

    /// Stages one output, and counts, sums and hashes its rows on the way.
    async fn output(
        &mut self,
        context: &SessionContext,
        output: &Output,
        connections: &Connections,
        record: &mut RunRecord,
    ) -> Result<(Staged, String)> {
        let rows = context.sql(&output.sql()?).await?.execute_stream().await?;
        let rows = session::conform(rows, Arc::clone(&output.schema));
        let counted =
            Arc::new(Mutex::new((RowHash::new(&output.schema)?, output.totals.clone().map(Totals::new))));
        let passed = Arc::new(AtomicU64::new(0));
        let counter = Counter::Staged(Arc::clone(&passed));
        self.conductor.progress.watch(&self.plan.id.job, &output.spec.name, counter);
        let rows = tee(count(rows, Arc::clone(&passed)), Arc::clone(&counted));
        let staged = self.stage_output(output, rows, connections).await.map_err(|error| {
            error.note(format!("while output `{}` was made from `{}`", output.spec.name, output.from))
        })?;
        as_made(&output.spec.name, passed.load(Ordering::Relaxed), staged.rows)?;
        info!(
            output = output.spec.name,
            rows = staged.rows,
            inserted = staged.inserted,
            updated = staged.updated,
            deleted = staged.deleted,
            "staged"
        );
        let counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = counted.0.finish();
        record.outputs.insert(
            output.spec.name.clone(),
            OutputReport {
                mode: output.spec.mode.to_string(),
                rows: staged.rows,
                inserted: staged.inserted,
                updated: staged.updated,
                unchanged: staged.unchanged,
                deleted: staged.deleted,
                rows_after: staged.rows_after,
                totals: counted.1.as_ref().map(Totals::finish).unwrap_or_default(),
            },
        );
        Ok((staged, hash))
    }

    /// Stages the rows of a model, or what history and deletes make of them.
    async fn stage_output(
        &mut self,
        output: &Output,
        rows: SendableRecordBatchStream,
        connections: &Connections,
    ) -> Result<Staged> {
        let dimension = &output.dimension;
        if !dimension.looks_back() {
            return self.load.stage(&output.spec, rows).await;
        }
        let model = Spool::of(&output.spec.name, rows, &self.attempt.scratch).await?;
        let target = connections.get(&self.plan.target);
        let known = self.base.is_some_and(|base| base.outputs.contains_key(&output.spec.name));
        let sides = Sides {
            dimension,
            output: &output.spec,
            schema: Arc::new(dimension.schema(&output.schema)),
            model: &model,
            as_of: self.plan.as_of,
            scratch: &self.attempt.scratch,
        };
        let (rows, gone) = sides.rows(target.filter(|_| known && !output.spec.rebuild)).await?;
        let written = self.plan.guard.max_deleted.as_deref().unwrap_or("50%");
        if !gone.is_within(parts_per_million(written).unwrap_or(0)) {
            return Err(Error::data(format!(
                "output `{}`: {} of its {} rows are gone from the model, more than {written}",
                output.spec.name, gone.rows, gone.of
            ))
            .note("the target is as it was; a source that was read in part often looks like this")
            .hint("If that is meant, raise `target: { guard: { max_deleted: … } }` for this run."));
        }
        let given = Arc::new(AtomicU64::new(0));
        let staged = self.load.stage(&dimension.merge(&output.spec), count(rows, Arc::clone(&given))).await?;
        as_made(&output.spec.name, given.load(Ordering::Relaxed), staged.rows)?;
        Ok(Staged { rows: model.rows(), ..staged })
    }

    /// Refuses empty and shrunken results.
    fn guard(&self, output: &Output, staged: &Staged) -> Result<()> {
        let replaces = output.spec.mode.needs_whole() || self.request.full_refresh;
        if replaces
            && staged.rows_after == 0
            && !self.plan.guard.allow_empty
            && (staged.rows_before > 0 || output.spec.mode == Mode::Replace)
        {
            return Err(Error::data(format!("output `{}` would be left without rows", output.spec.name))
                .note(format!("it holds {} rows now; the target is as it was", staged.rows_before))
                .hint("If that is meant, allow it in the job: `target: { guard: { allow_empty: true } }`."));
        }
        let Some(allowed) = self.plan.guard.max_shrink.as_deref().and_then(parts_per_million) else {
            return Ok(());
        };
        let least = u128::from(staged.rows_before) * u128::from(1_000_000 - allowed);
        if u128::from(staged.rows_after) * 1_000_000 < least {
            return Err(Error::data(format!(
                "output `{}` would shrink from {} rows to {}, by more than {}",
                output.spec.name,
                staged.rows_before,
                staged.rows_after,
                self.plan.guard.max_shrink.as_deref().unwrap_or_default()
            ))
            .note("the target is as it was")
            .hint("If that is meant, raise `target: { guard: { max_shrink: … } }` for this run."));
        }
        Ok(())
    }

    /// Every row is accounted for, or nothing is committed.
    fn account(
        &self,
        taps: &IndexMap<String, Arc<Tap>>,
        windows: &IndexMap<String, Bounded>,
        row_rejects: &HashMap<String, u64>,
        record: &mut RunRecord,
    ) -> Result<IndexMap<String, SourceRecord>> {
        let mut sources = IndexMap::new();
        // What is loaded anew remembers nothing of before.
        let base = self.base.filter(|_| !self.request.full_refresh);
        for (name, stream) in &self.plan.streams {
            let Some(tap) = taps.get(name) else { continue };
            let bounded = windows.get(name);
            let window = bounded.map_or(Window::Whole, |bounded| bounded.window.clone());
            let rejected = tap.rejected_rows() + row_rejects.get(name).copied().unwrap_or_default();
            let (extracted, filtered) = (tap.extracted(), tap.filtered_rows());
            let passed = extracted
                .checked_sub(filtered + rejected)
                .ok_or_else(|| Error::bug(format!("source `{name}`: rows do not add up")))?;
            info!(source = name, extracted, passed, filtered, rejected, bytes = tap.progress().0, "was read");
            let counts = Counts { extracted, passed, filtered, rejected };
            // Counted a second time, where they reached the models: what is lost or doubled on the way is seen here.
            let set_aside = row_rejects.get(name).copied().unwrap_or_default();
            if tap.handed().is_some_and(|handed| handed != passed + set_aside) {
                return Err(Error::bug(format!("source `{name}`: rows do not add up"))
                    .note(format!(
                        "{} left the source, and {} reached the models",
                        passed + set_aside,
                        tap.handed().unwrap_or_default()
                    ))
                    .hint("Nothing was published. Report it."));
            }
            if window != Window::Whole && tap.is_started() && !tap.is_complete() {
                return Err(Error::data(format!("source `{name}` was not read to the end of its window"))
                    .note("a model stopped before, by a LIMIT or a join without partners: what was not read would be lost, since the watermark moves on")
                    .hint("Remove the LIMIT, or read the source without `incremental`."));
            }
            let before = base.and_then(|base| base.sources.get(name));
            let watch = tap.watch().filter(|_| tap.is_complete());
            let late =
                watch.as_ref().and_then(|watch| watch.late(before.and_then(|before| before.tail.as_ref())));
            if let Some(late) = late.filter(|late| late.is_close()) {
                record.warnings.push(format!(
                    "source `{name}`: {late}, and used more than half of `overlap`: what comes later still is missed. Widen it"
                ));
            }
            record.sources.insert(
                name.clone(),
                SourceReport {
                    window: window.to_string(),
                    bound: bounded
                        .and_then(|bounded| bounded.exactness)
                        .map(|exactness| exactness.to_string()),
                    late,
                    counts,
                    bytes: tap.progress().0,
                    complete: tap.is_complete(),
                    totals: tap.totals(),
                    nulled: tap.nulled(),
                },
            );
            for (column, count) in tap.nulled() {
                record.warnings.push(format!(
                    "source `{name}`: {count} values did not fit `{column}`, and are null there"
                ));
            }
            // What nobody asked for was not read: its mark does not move. Nor does that of a range that was read again.
            let moves = tap.is_started() && !self.request.leaves_marks();
            let read = if moves { &window } else { &Window::Whole };
            let reads = stream.identity();
            let mut source = SourceRecord::of(read, reads, counts, before);
            if moves && source.mark.is_some() {
                source.origin = bounded.and_then(|bounded| bounded.origin.clone()).or(source.origin);
                source.tail = watch.map(|watch| watch.tail().clone());
            }
            sources.insert(name.clone(), source);
        }
        // A source that is not in the job now may come back.
        for (name, known) in base.iter().flat_map(|base| &base.sources) {
            // Nor is it kept for one that another source goes on with.
            let taken = self.plan.streams.values().any(|stream| stream.identity() == known.reads);
            if known.mark.is_some() && !taken && !sources.contains_key(name) {
                sources.insert(
                    name.clone(),
                    SourceRecord { extracted: 0, passed: 0, filtered: 0, rejected: 0, ..known.clone() },
                );
            }
        }
        Ok(sources)
    }

    /// Whether an output would be as it is: nothing changes, or it is replaced by the same rows.
    fn is_unchanged(&self, output: &Output, staged: &Staged, hash: &str) -> bool {
        let Some(before) = self.base.and_then(|base| base.outputs.get(&output.spec.name)) else {
            return false;
        };
        let names = before.columns.iter().map(|column| &column.name);
        let same = before.rowhash == hash
            && before.rows_after == staged.rows_after
            && before.rows_after == staged.rows_before
            && before.mode == Mode::Replace.to_string()
            && names.eq(output.schema.fields().iter().map(|field| field.name()))
            && !output.spec.rebuild;
        !staged.changes() || same
    }

    fn load_record(
        &self,
        sources: IndexMap<String, SourceRecord>,
        written: &IndexMap<String, (Staged, String)>,
        quarantined: u64,
        settled: Settled,
    ) -> LoadRecord {
        let now: DateTime<Utc> = self.conductor.clock.now();
        let outputs = self.plan.outputs.iter().filter_map(|output| {
            let (staged, hash) = written.get(&output.spec.name)?;
            let record = OutputRecord {
                mode: output.spec.mode.to_string(),
                rows: staged.rows,
                inserted: staged.inserted,
                updated: staged.updated,
                unchanged: staged.unchanged,
                deleted: staged.deleted,
                rows_after: staged.rows_after,
                rowhash: hash.clone(),
                columns: columns_of(&output.schema),
                key: output.spec.key.clone(),
                files: Vec::new(),
            };
            Some((output.spec.name.clone(), record))
        });
        // Outputs that the job no longer has stay as they were.
        let gone = self.base.iter().flat_map(|base| &base.outputs);
        let gone = gone.filter(|(name, _)| !written.contains_key(*name));
        let gone = gone.map(|(name, before)| (name.clone(), before.clone()));
        LoadRecord {
            v: RECORD_VERSION,
            project: self.plan.id.project.clone(),
            job: self.plan.id.job.clone(),
            incarnation: self.attempt.incarnation,
            seq: self.attempt.seq,
            prev_record_sha256: self.base.map(LoadRecord::sha256),
            run_id: self.attempt.run_id,
            attempt_id: self.attempt.id,
            committed_at: now.to_rfc3339_opts(SecondsFormat::Micros, true),
            as_of: self.plan.as_of.to_rfc3339_opts(SecondsFormat::AutoSi, true),
            engine: concat!("floodmark ", env!("CARGO_PKG_VERSION")).to_owned(),
            mapping_fp: self.plan.mapping_fp.clone(),
            sources,
            outputs: outputs.chain(gone).collect(),
            quarantined,
            quarantine_files: Vec::new(),
            settled,
        }
    }
}

fn refuse(checks: &[CheckReport], job: &str) -> Result<()> {
    let failed: Vec<&CheckReport> = checks.iter().filter(|check| check.verdict == Verdict::Failed).collect();
    let Some(first) = failed.first() else { return Ok(()) };
    let more = if failed.len() > 1 { format!(", and {} more", failed.len() - 1) } else { String::new() };
    let mut error =
        Error::data(format!("job `{job}`: check `{}` on `{}` failed{more}", first.check, first.on));
    for check in failed.iter().take(5) {
        let places =
            if check.details.is_empty() { String::new() } else { format!(": {}", check.details.join("; ")) };
        error = error.note(format!("`{}` on `{}` found {}{places}", check.check, check.on, check.found));
    }
    Err(error.hint("Nothing was published. Mend the data or the mapping; or say in the job what may pass: `max_rows`, `on_fail: quarantine`, `on_fail: warn`."))
}

/// Refuses an output of which other rows were staged than were made.
fn as_made(output: &str, made: u64, staged: u64) -> Result<()> {
    if made == staged {
        return Ok(());
    }
    Err(Error::bug(format!("output `{output}`: rows do not add up"))
        .note(format!("{made} were made, and {staged} were staged"))
        .hint("Nothing was published. Report it."))
}

/// Rows that are counted while they pass.
fn count(rows: SendableRecordBatchStream, passed: Arc<AtomicU64>) -> SendableRecordBatchStream {
    let schema = rows.schema();
    let rows = rows.inspect(move |batch| {
        if let Ok(batch) = batch {
            passed.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        }
    });
    Box::pin(datafusion::physical_plan::stream::RecordBatchStreamAdapter::new(schema, rows))
}

/// Rows that are hashed and summed while they pass.
fn tee(
    rows: SendableRecordBatchStream,
    counted: Arc<Mutex<(RowHash, Option<Totals>)>>,
) -> SendableRecordBatchStream {
    let schema = rows.schema();
    let rows = rows.map(move |batch| {
        let batch = batch?;
        let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.0.add(&batch)?;
        if let Some(totals) = counted.1.as_mut() {
            totals.add(&batch)?;
        }
        Ok(batch)
    });
    Box::pin(datafusion::physical_plan::stream::RecordBatchStreamAdapter::new(schema, rows))
}

/// The folder of a project at or above `from`.
pub fn find_project(from: &Path) -> Option<std::path::PathBuf> {
    from.ancestors().find(|folder| folder.join("floodmark.yaml").is_file()).map(Path::to_path_buf)
}
