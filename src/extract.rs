//! What a run reads: the windows of its sources, one snapshot a connection, and the models over them, in one session if there are any.
//!
//! Windows are fixed before any snapshot opens. A relation that is read more than once, or whose rows are checked together, is written down
//! once. Where each row is checked by itself, rows are sorted out on the way: there, or to the one who reads them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use datafusion::{datasource::ViewTable, logical_expr::LogicalPlanBuilder, prelude::SessionContext};
use indexmap::IndexMap;
use tracing::{info, warn};

use crate::{
    check::{
        Check, quarantine_schema, row_query,
        sieve::{Aside, Sieve},
    },
    connector::{
        Bounds, Exactness, Marks, RunTime,
        scan::{OpenSource, OpenSources},
        spec::{Mode, StreamSpec},
        tap::Tap,
    },
    error::{Error, Result},
    lateness::Watch,
    names::quoted,
    plan::{Plan, Request, scan_table, typed},
    record::{LoadRecord, Settled, run::RunRecord},
    replay::Waiting,
    run::{Conductor, Connections, Counter},
    runtime,
    session::Tables,
    spool::{Scratch, Spool, SpoolWriter},
    watermark::{FileVersion, Mark, Position, Window},
};

/// What to read, and how.
#[derive(Debug)]
pub struct Extract<'a> {
    /// The job.
    pub plan: &'a Plan,
    /// Its last record.
    pub base: Option<&'a LoadRecord>,
    /// Memory and disk.
    pub scratch: &'a Scratch,
    /// The call that it belongs to.
    pub conductor: &'a Conductor,
    /// What was asked for.
    pub request: &'a Request,
    /// How models are joined.
    pub joins: Joins,
    /// Which rows of windowed sources.
    pub reading: Reading,
}

/// How models are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Joins {
    /// In memory: the fastest, and it cannot spill.
    Hashed,
    /// Sorted first, which spills; and what is checked is written down, since it may be read more than once.
    Sorted,
}

/// Which rows of sources that are read by windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// What is new: behind the marks.
    New,
    /// What releases have read: up to the marks.
    Loaded,
    /// What waits for the next run: behind the marks, and nothing a second time.
    Waiting,
}

/// Turns windows that follow `marks` into those that end there.
fn loaded(streams: &[StreamSpec], marks: &Marks, bounds: &mut Bounds) {
    let by_cursor =
        |name: &String| streams.iter().any(|stream| stream.name == *name && stream.cursor.is_some());
    for (name, window) in &mut bounds.windows {
        *window = match (&*window, marks.get(name)) {
            // Nothing of it was read yet.
            (_, None) if by_cursor(name) => Window::Cursor { lo: None, from: None, hi: Position(Vec::new()) },
            (_, Some(Mark::Cursor(hi))) => Window::Cursor { lo: None, from: None, hi: hi.clone() },
            (Window::Files { new, at, .. }, Some(Mark::Files(read))) => {
                // One that was delivered anew waits for the next run.
                let still = |file: &&FileVersion| !new.iter().any(|newer| newer.path == file.path);
                Window::Files { new: read.iter().filter(still).cloned().collect(), seen: Vec::new(), at: *at }
            }
            _ => continue,
        };
    }
}

/// Leaves the overlap out of windows, and their ends: also what no bound lets in yet has been written.
fn waiting(bounds: &mut Bounds) {
    for window in bounds.windows.values_mut() {
        if let Window::Cursor { lo, from, hi } = window {
            from.clone_from(lo);
            *hi = hi.last();
        }
    }
}

/// The windows of one connection's streams.
#[derive(Debug)]
pub struct Fixed<'a> {
    /// The connection.
    pub connection: &'a str,
    /// What is read there.
    pub streams: Vec<StreamSpec>,
    /// The windows, and how sure their ends are.
    pub bounds: Bounds,
    /// Which system answered.
    pub origin: Option<String>,
}

/// The window of one source.
#[derive(Debug, Clone)]
pub struct Bounded {
    /// The window.
    pub window: Window,
    /// How sure its end is.
    pub exactness: Option<Exactness>,
    /// Which system it is of.
    pub origin: Option<String>,
}

/// What was opened: the sources and models of a job.
#[expect(missing_debug_implementations, reason = "a session has none")]
pub struct Relations {
    /// Which they are, by their names.
    pub tables: Tables,
    /// What counts the rows of each source.
    pub taps: IndexMap<String, Arc<Tap>>,
    /// The window of each source.
    pub windows: IndexMap<String, Bounded>,
    /// Rows of the quarantine that go through the job, if any do.
    pub waiting: Option<Waiting>,
    /// What row checks set aside.
    pub aside: Aside,
    /// How many rows that was, by relation.
    pub row_rejects: HashMap<String, u64>,
    /// Relations whose rows are sorted out while they are read.
    pub sieves: Vec<Sieve>,
}

impl Extract<'_> {
    /// Opens everything; `None` where rows of the quarantine were asked for and none wait. What is worth a word is said in `record`.
    ///
    /// # Errors
    ///
    /// If a source cannot be read, or holds what is refused.
    pub async fn relations(
        &self,
        connections: &Connections,
        marks: &Marks,
        record: &mut RunRecord,
    ) -> Result<Option<Relations>> {
        let plan = self.plan;
        let (open, windows) = self.open(connections, marks, record).await?;
        let taps: IndexMap<String, Arc<Tap>> =
            open.0.iter().map(|(name, source)| (name.clone(), Arc::clone(&source.tap))).collect();
        let hashed = self.joins == Joins::Hashed;
        let open = Arc::new(open);
        let partitions = if plan.is_order_free() { runtime::cores() } else { 1 };
        let target = connections.get(&plan.target).and_then(|target| target.target());
        // A database takes rows one behind the other.
        let is_loaded = self.reading == Reading::New && target.is_some_and(|target| !target.has_folders());
        // A side of a join that is empty ends it before the other one is read: a window must be read to its end.
        let knows_rows = !plan.models.is_empty()
            && windows.values().all(|bounded: &Bounded| bounded.window == Window::Whole);
        let mut tables = Tables::for_joins(self.scratch, plan.as_of, Arc::clone(&open), hashed, partitions);
        let aside = SpoolWriter::new("set aside", quarantine_schema(), self.scratch);
        let (aside, mut sieves): (Aside, Vec<Sieve>) = (Arc::new(Mutex::new(aside)), Vec::new());
        let waiting = self.waiting(connections, &taps, record).await?;
        if waiting.as_ref().is_some_and(Waiting::is_empty) {
            record.warnings.push("no rows wait in the quarantine".to_owned());
            return Ok(None);
        }
        if let Some(waiting) = &waiting {
            waiting.refuse_looking(plan)?;
        }
        let waits = |name: &str| waiting.as_ref().and_then(|waiting| waiting.at(name));
        let mut row_rejects: HashMap<String, u64> = HashMap::new();
        for (name, stream) in &plan.streams {
            match waits(name) {
                Some(rows) => tables.add(name, rows.table()?)?,
                None => {
                    let window = windows.get(name).map_or(Window::Whole, |bounded| bounded.window.clone());
                    let rows = if knows_rows { open.rows(&stream.spec).await? } else { None };
                    let mut table = scan_table(stream, window);
                    (table.rows, table.scan.order) = (rows, plan.order_of(name));
                    table.scan.in_one_stream = is_loaded && plan.is_copied(stream);
                    tables.add_source(name, table)?;
                }
            }
            let checks = self.checks_of(name);
            if stream.spool || !(checks.is_empty() || self.sifts()) {
                let count = self.write_down(&mut tables, name, checks, &aside, record).await;
                let count = count.map_err(|error| error.note(format!("while source `{name}` was read")))?;
                row_rejects.insert(name.clone(), count);
            } else if !checks.is_empty() {
                sieves.push(self.sift(&mut tables, name, checks, &aside).await?);
            }
        }
        for (name, model) in &plan.models {
            let context = tables.context()?;
            let view = typed(&context, &model.select).await?;
            if let Some(waiting) = &waiting {
                waiting.refuse_meeting(plan, name, &view)?;
            }
            let view = match waits(name) {
                Some(rows) => {
                    let rows = context.read_table(rows.table()?)?.into_unoptimized_plan();
                    LogicalPlanBuilder::from(view).union(rows)?.build()?
                }
                None => view,
            };
            tables.add(name, Arc::new(ViewTable::new(view, None)))?;
            let checks = self.checks_of(name);
            if model.spool || !(checks.is_empty() || self.sifts()) {
                let count = self.write_down(&mut tables, name, checks, &aside, record).await;
                let count = count.map_err(|error| error.note(format!("while model `{name}` was made")))?;
                row_rejects.insert(name.clone(), count);
            } else if !checks.is_empty() {
                sieves.push(self.sift(&mut tables, name, checks, &aside).await?);
            }
        }
        Ok(Some(Relations { tables, taps, windows, waiting, aside, row_rejects, sieves }))
    }

    fn checks_of(&self, relation: &str) -> Vec<Check> {
        self.plan.checks.iter().filter(|check| check.on == relation).cloned().collect()
    }

    /// Whether rows may be checked while they are read: by a run, which reads each relation as its plan says; and not if that was tried, and one
    /// was read more than once.
    fn sifts(&self) -> bool {
        self.reading == Reading::New && self.joins == Joins::Hashed
    }

    /// The rows of the quarantine that go through the job now, if it is asked to replay any.
    async fn waiting(
        &self,
        connections: &Connections,
        taps: &IndexMap<String, Arc<Tap>>,
        record: &mut RunRecord,
    ) -> Result<Option<Waiting>> {
        let Some(replay) = &self.request.replay else { return Ok(None) };
        let target = connections.get(&self.plan.target).and_then(|connection| connection.target());
        let target = target.ok_or_else(|| Error::bug("the target is not open"))?;
        let rows = target.quarantined(&self.plan.id).await?;
        let waiting =
            Waiting::of(rows, self.plan, replay, &Settled::of(self.base), taps, self.scratch).await?;
        record.warnings.extend(waiting.warnings.iter().cloned());
        Ok(Some(waiting))
    }

    /// Lists activity and fixes each window, connection by connection.
    ///
    /// # Errors
    ///
    /// If a source is not the one that its mark is of, or cannot follow it.
    pub async fn fix<'c>(&'c self, connections: &Connections, marks: &Marks) -> Result<Vec<Fixed<'c>>> {
        let time = RunTime { now: self.conductor.clock.now(), as_of: self.plan.as_of };
        let mut by_connection: IndexMap<&str, Vec<StreamSpec>> = IndexMap::new();
        for stream in self.plan.streams.values() {
            by_connection.entry(&stream.connection).or_default().push(stream.spec.clone());
        }
        let mut all = Vec::new();
        for (connection, streams) in by_connection {
            let source = connections
                .get(connection)
                .and_then(|connection| connection.source())
                .ok_or_else(|| Error::bug("a source is not open"))?;
            let by_cursor = streams.iter().any(|stream| stream.cursor.is_some());
            let origin = if by_cursor { source.origin().await? } else { None };
            let base = self.base.filter(|_| !self.request.full_refresh);
            for stream in &streams {
                let known = base.and_then(|base| base.sources.get(&stream.name));
                let known =
                    known.filter(|known| known.mark.is_some()).and_then(|known| known.origin.as_ref());
                if let (Some(known), Some(found)) = (known, &origin)
                    && known != found
                {
                    return Err(Error::data(format!(
                        "source `{}`: connection `{connection}` leads to another database than last time",
                        stream.name
                    ))
                    .note("the watermark of one says nothing about the other: rows would be left out")
                    .hint(format!(
                        "If it is the same one, moved or restored, go on with it: `floodmark state adopt {job}`; if not, mend the connection, or load anew: `floodmark run {job} --full-refresh`.",
                        job = self.plan.id.job
                    )));
                }
            }
            // What was loaded ends at its mark, whoever is writing now.
            let asked: Vec<StreamSpec> = match self.reading {
                Reading::Loaded => {
                    streams.iter().map(|stream| StreamSpec { cursor: None, ..stream.clone() }).collect()
                }
                Reading::New | Reading::Waiting => streams.clone(),
            };
            let mut bounds = source.bounds(&asked, marks, time).await?;
            match self.reading {
                Reading::New if self.request.leaves_marks() => self.read_again(&streams, &mut bounds)?,
                Reading::New => {}
                Reading::Loaded => loaded(&streams, marks, &mut bounds),
                Reading::Waiting => waiting(&mut bounds),
            }
            all.push(Fixed { connection, streams, bounds, origin });
        }
        Ok(all)
    }

    /// Fixes the windows, then opens one snapshot a connection.
    async fn open(
        &self,
        connections: &Connections,
        marks: &Marks,
        record: &mut RunRecord,
    ) -> Result<(OpenSources, IndexMap<String, Bounded>)> {
        let fixed = self.fix(connections, marks).await?;
        let (mut open, mut windows) = (OpenSources::default(), IndexMap::new());
        for Fixed { bounds, origin, .. } in &fixed {
            for warning in &bounds.warnings {
                warn!("{warning}");
            }
            record.warnings.extend(bounds.warnings.iter().cloned());
            for (source, window) in &bounds.windows {
                info!(source, %window, "the window is fixed");
                let exactness = bounds.exactness.get(source).copied();
                let bounded = Bounded { window: window.clone(), exactness, origin: origin.clone() };
                windows.insert(source.clone(), bounded);
            }
        }
        self.refuse_changed_files_on_append(&windows)?;
        for Fixed { connection: name, streams, bounds, .. } in fixed {
            let Some(connection) = connections.get(name) else { continue };
            let source = connection.source().ok_or_else(|| Error::bug("a source is not open"))?;
            let snapshot = source.snapshot(&streams, &bounds).await?;
            for stream in streams {
                let totals = self.plan.streams.get(&stream.name).and_then(|stream| stream.totals.clone());
                let cursor = stream.cursor.as_ref().filter(|_| self.reading == Reading::New);
                let watch = cursor.and_then(|cursor| {
                    Watch::of(cursor.columns.first()?, cursor.overlap?, bounds.windows.get(&stream.name)?)
                });
                let tap = Arc::new(Tap::counting(totals, watch));
                self.conductor.progress.watch(
                    &self.plan.id.job,
                    &stream.name,
                    Counter::Read(Arc::clone(&tap)),
                );
                open.0.insert(
                    stream.name.clone(),
                    OpenSource { connection: Arc::clone(connection), snapshot: snapshot.clone(), tap },
                );
            }
        }
        Ok((open, windows))
    }

    /// Puts the range of a backfill, or nothing, in the place of what is new. Sources without a cursor are read as ever; of files,
    /// none.
    fn read_again(&self, streams: &[StreamSpec], fixed: &mut Bounds) -> Result<()> {
        for stream in streams.iter().filter_map(|spec| self.plan.streams.get(&spec.name)) {
            let name = &stream.spec.name;
            let range = match &self.request.backfill {
                Some(backfill) => stream.again(backfill)?,
                None => None,
            };
            let window = match (range, fixed.windows.get(name)) {
                (Some(window), _) => window,
                // Nothing of it: the next run reads what is new.
                (None, Some(Window::Cursor { lo, .. })) => {
                    let at = lo.clone().unwrap_or(Position(Vec::new()));
                    Window::Cursor { lo: Some(at.clone()), from: Some(at.clone()), hi: at }
                }
                (None, Some(Window::Files { seen, at, .. })) => {
                    Window::Files { new: Vec::new(), seen: seen.clone(), at: *at }
                }
                (None, _) => Window::Whole,
            };
            fixed.windows.insert(name.clone(), window);
        }
        Ok(())
    }

    /// A file that was read and has changed would be appended a second time.
    fn refuse_changed_files_on_append(&self, windows: &IndexMap<String, Bounded>) -> Result<()> {
        let Some(output) =
            self.plan.outputs.iter().find(|output| output.spec.mode == Mode::Append && !output.spec.rebuild)
        else {
            return Ok(());
        };
        for (name, window) in windows {
            let Window::Files { new, seen, .. } = &window.window else { continue };
            if let Some(file) = new.iter().find(|file| seen.iter().any(|known| known.path == file.path)) {
                return Err(Error::data(format!("source `{name}`: `{}` was read before and has changed", file.path))
                    .note(format!("output `{}` appends, and would hold the rows of both versions", output.spec.name))
                    .hint("Deliver corrections under a new name, use `mode: merge` with a `key`, or load anew with `--full-refresh`."));
            }
        }
        Ok(())
    }

    /// Writes a relation down, sorts its rows out, and puts the spool in its place. How many rows were set aside.
    async fn write_down(
        &self,
        tables: &mut Tables,
        name: &str,
        checks: Vec<Check>,
        aside: &Aside,
        record: &mut RunRecord,
    ) -> Result<u64> {
        let sieve = self.sieve(&tables.context()?, name, checks, aside).await?;
        let spool = Spool::of(name, sieve.rows(), self.scratch).await?;
        let (reports, count) = sieve.finish().await?;
        record.checks.extend(reports);
        info!(relation = name, rows = spool.rows(), set_aside = count, "written down");
        tables.add(name, spool.table()?)?;
        Ok(count)
    }

    /// Puts a relation of which each row is checked by itself in its own place: its rows are sorted out while they are read.
    async fn sift(
        &self,
        tables: &mut Tables,
        name: &str,
        checks: Vec<Check>,
        aside: &Aside,
    ) -> Result<Sieve> {
        let sieve = self.sieve(&tables.context()?, name, checks, aside).await?;
        tables.add(name, sieve.table()?)?;
        Ok(sieve)
    }

    /// What sorts the rows of a relation out, as it is registered now.
    async fn sieve(
        &self,
        context: &SessionContext,
        name: &str,
        checks: Vec<Check>,
        aside: &Aside,
    ) -> Result<Sieve> {
        let schema = self.relation_schema(name)?;
        let sql = row_query(name, &checks, &schema)?.unwrap_or(format!("SELECT * FROM {}", quoted(name)?));
        Sieve::new(name, schema, context.sql(&sql).await?, checks, Arc::clone(aside)).await
    }

    fn relation_schema(&self, name: &str) -> Result<arrow::datatypes::SchemaRef> {
        let stream = self.plan.streams.get(name).map(|stream| &stream.schema);
        let schema = stream.or_else(|| self.plan.models.get(name).map(|model| &model.schema));
        schema.cloned().ok_or_else(|| Error::bug(format!("no relation `{name}`")))
    }
}
