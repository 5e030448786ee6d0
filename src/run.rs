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
    collections::BTreeMap,
    path::Path,
    pin::pin,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant},
};

use chrono::SecondsFormat;
use futures::future::{Either, join_all, maybe_done, select};
use indexmap::IndexMap;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, info_span, warn};
use uuid::Uuid;

use crate::{
    connector::{Attempt, CommitOutcome, Connection, Exactness, Held, Marks, Target, spec::Mode, tap::Tap},
    error::{Error, ErrorKind, Result},
    extract::{Extract, Joins, Reading},
    history,
    lease::{Lease, Leased},
    load,
    plan::{self, Backfill, Plan, Promised, Request},
    project::{JobDocument, PROJECT_CONNECTION, Project},
    record::{
        LoadRecord,
        run::{Outcome, OutputReport, RUN_VERSION, RunRecord},
    },
    release::Release,
    runtime::{self, Clock},
    secret,
    spool::Scratch,
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
        let mut planned = self.plan_patiently(waves, request).await?;
        if let [_, later @ ..] = waves {
            // What they read may be another after the first: they are planned again.
            planned.retain(|name, _| !later.iter().any(|wave| wave.contains(name)));
        }
        let mut done: Vec<(RunRecord, Option<Error>)> = Vec::new();
        for wave in waves {
            let runs = wave.iter().filter_map(|name| self.project.jobs.get(name)).map(|job| {
                let failed = done.iter().find(|(run, _)| {
                    !matches!(run.outcome, Outcome::Published | Outcome::NothingNew)
                        && self.reads_from(job, &run.job)
                });
                let failed = failed.map(|(run, _)| run.job.clone());
                let planned = planned.swap_remove(&job.job.job);
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
                        None => self.run(job, request, planned).await,
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

    /// How rows would get into each output of a plan, where its target has more than one way.
    ///
    /// # Errors
    ///
    /// If the target cannot be asked.
    pub async fn ways(&self, plan: &Plan) -> Result<IndexMap<String, &'static str>> {
        let job = self.project.jobs.get(&plan.id.job).ok_or_else(|| Error::bug("no such job"))?;
        let connections = self.connections(job)?;
        let target = connections.get(&plan.target).and_then(|target| target.target());
        let target = target.ok_or_else(|| Error::bug("the target cannot be written"))?;
        let mut ways = IndexMap::new();
        for output in &plan.outputs {
            // Of history and deletes the rows are worked out first, and merged.
            let spec = match output.dimension.looks_back() {
                true => output.dimension.merge(&output.spec),
                false => output.spec.clone(),
            };
            let schema = Arc::new(output.dimension.schema(&output.schema));
            if let Some(way) = target.way(&spec, &schema).await? {
                ways.insert(output.spec.name.clone(), way);
            }
        }
        Ok(ways)
    }

    /// Runs one job, as it was planned a moment ago if it was. Whatever happens is in the record; an error is also given back, with its places.
    async fn run(
        &self,
        job: &JobDocument,
        request: &Request,
        planned: Option<Plan>,
    ) -> (RunRecord, Option<Error>) {
        let mut record = self.blank(job, request);
        let started = Instant::now();
        let mut request = request.clone();
        request.params.retain(|param, _| job.job.params.contains_key(param));
        let span = info_span!("run", job = %job.job.job, run_id = %record.run_id);
        let result = Box::pin(self.tries(job, &request, planned, &mut record)).instrument(span.clone()).await;
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
    async fn tries(
        &self,
        job: &JobDocument,
        request: &Request,
        planned: Option<Plan>,
        record: &mut RunRecord,
    ) -> Result<Outcome> {
        let mut left = Left { planned, ..Left::default() };
        let outcome = Box::pin(self.tries_until(job, request, &mut left, record)).await;
        let resumed = left
            .resumed
            .map(|seq| format!("release {seq}, which a run had sealed and not seen committed, is published"));
        record.warnings.splice(0..0, resumed);
        match (outcome, left.unsettled) {
            (Ok(Outcome::NothingNew), _) if left.resumed.is_some() => {
                record.seq = record.seq.or(left.resumed);
                Ok(Outcome::Published)
            }
            (Err(error), Some(Unsettled { committing, .. })) => Err(error.note(format!(
                "whether release {} was published is not known: its answer was lost, and the next run asks the target first",
                committing.seq
            ))),
            (outcome, _) => outcome,
        }
    }

    async fn tries_until(
        &self,
        job: &JobDocument,
        request: &Request,
        left: &mut Left,
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
            let error = match Box::pin(self.attempt(job, request, joins, left, record)).await {
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

    /// One try. If an earlier one whose commit nobody answered has landed after all, this one only says so.
    async fn attempt(
        &self,
        job: &JobDocument,
        request: &Request,
        joins: Joins,
        left: &mut Left,
        record: &mut RunRecord,
    ) -> Result<Outcome> {
        let connections = self.connections(job)?;
        let plan = match left.planned.take() {
            Some(plan) => plan,
            None => {
                let promised = Promised::new();
                let planned = plan::plan(&self.project, job, request, &promised, &connections, &self.scratch);
                self.unless_stopped(Box::pin(planned)).await?
            }
        };
        record.warnings.extend(plan.warnings.iter().map(|warning| warning.message.clone()));
        let open =
            connections.get(&plan.target).cloned().ok_or_else(|| Error::bug("the target is not open"))?;
        let target = open.target().ok_or_else(|| Error::bug("the target cannot be written"))?;
        let remembered =
            Store::open(&self.project.root).and_then(|store| store.last_seen(&plan.id, &plan.target));
        let remembered = remembered.unwrap_or_else(|error| {
            record.warnings.push(format!("whether the target is the one of last time is not known: {error}"));
            None
        });
        let base = self.unless_stopped(target.last_record(&plan.id)).await?;
        let sealed = self.unless_stopped(target.sealed(&plan.id, base.as_ref())).await?;
        let chosen = sealed.iter().find(|sealed| {
            let known = remembered.is_none_or(|seen| seen.incarnation == sealed.incarnation);
            // What is loaded anew needs nothing of before, and what the job would not make any more is made again.
            let same = known && !request.full_refresh && sealed.mapping_fp == plan.mapping_fp;
            sealed.run_id == record.run_id || same
        });
        let overtakes = chosen.is_none() && !sealed.is_empty();
        let base = match chosen {
            Some(sealed) => {
                self.resume(&plan, target, sealed, left, record).await?;
                self.unless_stopped(target.last_record(&plan.id)).await?
            }
            None => base,
        };
        if let Some(sealed) = sealed.first().filter(|_| overtakes && !request.full_refresh) {
            record.warnings.push(format!(
                "release {} was sealed by a run of the job as it was before, and is not published: it is made again",
                sealed.seq
            ));
        }
        info!(release = base.as_ref().map_or(0, |base| base.seq), "the target was asked");
        let unsettled = &mut left.unsettled;
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
        let (anew, warnings) = (request.full_refresh, &mut record.warnings);
        let asked = history::of_target(&plan, target, base.as_ref(), remembered, warnings);
        self.unless_stopped(asked).await?;
        if request.leaves_marks() && base.is_none() {
            return Err(Error::configuration(format!("job `{}` has not run yet", plan.id.job))
                .hint("Run it first: its first run reads everything."));
        }
        if let Some(backfill) = &request.backfill {
            refuse_backfill(&plan, backfill)?;
        }
        let at = warnings.len();
        let marks = if anew { Marks::new() } else { history::marks(&plan, base.as_ref(), warnings)? };
        let (counting, held) = Held::counting();
        let counted = history::of_outputs(&plan, target, base.as_ref(), anew, counting);
        let mut counted = Box::pin(maybe_done(counted));
        let attempt = Attempt {
            id: Uuid::now_v7(),
            run_id: record.run_id,
            seq: base.as_ref().map_or(1, |base| base.seq + 1),
            incarnation: base.as_ref().map_or_else(Uuid::new_v4, |base| base.incarnation),
            outputs: plan.outputs.len(),
            held,
            scratch: self.scratch.clone(),
        };
        let load = beside(&mut counted, target.begin(&plan.id, &attempt, base.as_ref())).await?;
        let mut release = Release {
            plan: &plan,
            base: base.as_ref(),
            attempt: &attempt,
            conductor: self,
            load,
            request,
            joins,
            overtakes,
        };
        let counted = async {
            counted.as_mut().await;
            counted.as_mut().take_output().unwrap_or_else(|| Err(Error::bug("the rows were counted before")))
        };
        let staging = async {
            let staged = release.stage(&connections, &marks, record).await;
            attempt.held.want();
            staged
        };
        let side_by_side = both(counted, Box::pin(staging));
        let ended = self.unless_stopped(async { Ok(side_by_side.await) }).await;
        let staged = match ended {
            Ok((Ok(warnings), Some(staged))) => {
                record.warnings.splice(at..at, warnings);
                staged
            }
            Ok((Ok(_), None)) => Err(Error::bug("nothing was staged")),
            Ok((Err(missing), _)) => {
                record.outputs.clear();
                release.load.discard().await?;
                // Rows that are missing may be another run's doing.
                let overtaken = missing.kind() == ErrorKind::Data
                    && history::is_overtaken(&plan, target, base.as_ref()).await?;
                return Err(if overtaken { load::overtaken(&plan.id) } else { missing });
            }
            Err(interrupted) => Err(interrupted),
        };
        let load_record = match staged {
            Ok(Some(load_record)) => load_record,
            Ok(None) => {
                release.load.discard().await?;
                return Ok(Outcome::NothingNew);
            }
            Err(error) => {
                // Nothing of it is there.
                record.outputs.clear();
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
                        left.unsettled = Some(Unsettled { committing: load_record, report: record.clone() });
                        Err(error.hint(
                            "Run again: it asks the target first, and loads nothing that is there already.",
                        ))
                    }
                }
            }
        }
    }

    /// Commits what an attempt had sealed, of this run or of one that ended before it saw it committed: it was audited, and its watermark goes
    /// with it.
    async fn resume(
        &self,
        plan: &Plan,
        target: &dyn Target,
        sealed: &LoadRecord,
        left: &mut Left,
        record: &mut RunRecord,
    ) -> Result<()> {
        match target.commit_sealed(&plan.id, sealed).await {
            CommitOutcome::Committed(warning) => {
                record.warnings.extend(warning);
                info!(release = sealed.seq, attempt_id = %sealed.attempt_id, "what was sealed is committed");
                self.remember(plan, sealed, record);
                let others = sealed.run_id != record.run_id;
                left.resumed = left.resumed.or(others.then_some(sealed.seq));
                Ok(())
            }
            // Another run was faster.
            CommitOutcome::Rejected(error) if error.kind() == ErrorKind::Busy => Ok(()),
            CommitOutcome::Rejected(error) | CommitOutcome::Unknown(error) => Err(error),
        }
    }

    /// Keeps in the local store what the target is now.
    fn remember(&self, plan: &Plan, landed: &LoadRecord, record: &mut RunRecord) {
        let remembered =
            Store::open(&self.project.root).and_then(|store| store.remember(&plan.id, &plan.target, landed));
        if let Err(error) = remembered {
            record.warnings.push(format!("the local store could not be brought up to date: {error}"));
        }
    }

    /// A release has landed: what is left to do, of which nothing can undo it.
    fn committed(&self, plan: &Plan, load_record: &LoadRecord, record: &mut RunRecord) -> Outcome {
        record.seq = Some(load_record.seq);
        info!(release = load_record.seq, "committed");
        self.remember(plan, load_record, record);
        if self.stop.is_cancelled() {
            record.warnings.push("interrupted after the commit had landed: the run is finished".to_owned());
        }
        let changes = |output: &OutputReport| output.inserted + output.updated + output.deleted > 0;
        let changed = record.outputs.values().any(changes) || record.quarantined > 0;
        if changed { Outcome::Published } else { Outcome::NothingNew }
    }
}

/// What the tries of a run leave to each other.
#[derive(Debug, Default)]
struct Left {
    /// The plan that was made before the first one, and is for it alone: each other one looks at what is there by then.
    planned: Option<Plan>,
    unsettled: Option<Unsettled>,
    /// The release of another run that this one has committed.
    resumed: Option<u64>,
}

/// A release that was committing when its answer was lost, and what its run came to until then.
#[derive(Debug)]
struct Unsettled {
    committing: LoadRecord,
    report: RunRecord,
}

/// What `work` comes to, while the other goes on as far as it gets.
async fn beside<T>(other: &mut (impl Future + Unpin), work: impl Future<Output = T>) -> T {
    match select(other, pin!(work)).await {
        Either::Left((_, work)) => work.await,
        Either::Right((done, _)) => done,
    }
}

/// What two pieces of work come to, side by side. What the first one refuses ends the second.
async fn both<A, B>(
    first: impl Future<Output = Result<A>>,
    second: impl Future<Output = B> + Unpin,
) -> (Result<A>, Option<B>) {
    match select(pin!(first), second).await {
        Either::Left((Err(error), _)) => (Err(error), None),
        Either::Left((first, second)) => (first, Some(second.await)),
        Either::Right((second, first)) => (first.await, Some(second)),
    }
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

/// The folder of a project at or above `from`.
pub fn find_project(from: &Path) -> Option<std::path::PathBuf> {
    from.ancestors().find(|folder| folder.join("floodmark.yaml").is_file()).map(Path::to_path_buf)
}
