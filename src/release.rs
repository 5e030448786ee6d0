//! One attempt at one release: extracted, mapped, checked, staged and audited where nobody looks, down to the record that is to be
//! committed with it.
//!
//! Nothing of it is visible before [`crate::run`] commits the record; whatever is refused on the way leaves the target as it was.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use chrono::{DateTime, SecondsFormat, Utc};
use datafusion::physical_plan::{SendableRecordBatchStream, stream::RecordBatchStreamAdapter};
use futures::StreamExt;
use indexmap::IndexMap;
use tracing::info;

use crate::{
    check::{Check, READABLE, quarantine_batch, quarantine_schema, whole},
    connector::{Attempt, Load, Marks, Staged, spec::Mode, tap::Tap},
    dimension::Sides,
    error::{Error, ErrorKind, Result},
    extract::{Bounded, Extract, Joins, Reading, Relations},
    job::parts_per_million,
    plan::{Output, Plan, Replay, Request},
    record::{
        LoadRecord, OutputRecord, RECORD_VERSION, Settled, SourceRecord, columns_of,
        rowhash::RowHash,
        run::{CheckReport, Counts, OutputReport, RunRecord, SourceReport, Verdict},
        totals::Totals,
    },
    replay::Waiting,
    run::{Conductor, Connections, Counter},
    session::{self, Tables},
    spool::{Spool, SpoolWriter},
    watermark::Window,
};

/// One attempt at one release.
pub(crate) struct Release<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) base: Option<&'a LoadRecord>,
    pub(crate) attempt: &'a Attempt,
    pub(crate) conductor: &'a Conductor,
    pub(crate) load: Box<dyn Load>,
    pub(crate) request: &'a Request,
    pub(crate) joins: Joins,
    /// Whether something was sealed in its place that must never be published: then it is committed even if it changes nothing.
    pub(crate) overtakes: bool,
}

impl Release<'_> {
    /// Extracts, maps, checks, stages and audits. The record to commit, or `None` where there is nothing to remember.
    pub(crate) async fn stage(
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
        let Relations { mut tables, taps, windows, waiting, aside, mut row_rejects, sieves } = relations;
        let waits = |name: &str| waiting.as_ref().and_then(|waiting| waiting.at(name));
        self.whole_checks(&mut tables, record).await?;
        tell(&record.checks);
        let written = match refuse(&record.checks, &plan.id.job) {
            Ok(()) => self.outputs(&mut tables, connections, waiting.as_ref(), record).await,
            Err(error) => Err(error),
        };
        // Of rows that are not as they should be, their own checks tell more than what an output makes of them.
        if written.as_ref().map_or_else(|error| error.kind() == ErrorKind::Data, |_| true) {
            let before = record.checks.len();
            // Who reads another one's rows comes first, and asks for all of them.
            for sieve in sieves.into_iter().rev() {
                let name = sieve.name().to_owned();
                let (reports, set_aside) = match sieve.finish().await {
                    Ok(found) => found,
                    Err(error) => return Err(written.err().unwrap_or(error)),
                };
                row_rejects.insert(name, set_aside);
                record.checks.extend(reports);
            }
            tell(record.checks.get(before..).unwrap_or_default());
            self.in_order(&mut record.checks);
            refuse(&record.checks, &plan.id.job)?;
        }
        let written = written?;
        // Sources are let go before tables of the target are altered: they may be the same database.
        drop(tables);
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
            aside.lock().unwrap_or_else(PoisonError::into_inner).push(&quarantine_batch(rows)?)?;
        }
        let none = SpoolWriter::new("set aside", quarantine_schema(), &self.attempt.scratch);
        let aside = std::mem::replace(&mut *aside.lock().unwrap_or_else(PoisonError::into_inner), none);
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
        if unchanged
            && before == after
            && aside.rows() == 0
            && self.base.is_some()
            && !settles
            && !self.overtakes
        {
            return Ok(None);
        }
        Ok(Some(self.load_record(sources, &written, aside.rows(), settled)))
    }

    /// The checks that look at all rows together, once every relation that they read is there.
    async fn whole_checks(&self, tables: &mut Tables, record: &mut RunRecord) -> Result<()> {
        let names: Vec<String> = self.plan.streams.keys().chain(self.plan.models.keys()).cloned().collect();
        for name in names {
            let checks: Vec<&Check> =
                self.plan.checks.iter().filter(|check| check.on == name && !check.is_of_rows()).collect();
            if checks.is_empty() {
                continue;
            }
            let context = tables.context()?;
            let rows = context.table(name.as_str()).await?.count().await? as u64;
            record.checks.extend(whole(&context, &checks, rows, self.plan.as_of).await?);
        }
        Ok(())
    }

    /// Puts reports as relations stand in the plan: what is checked row by row first, whenever it was known.
    fn in_order(&self, reports: &mut [CheckReport]) {
        let relations: Vec<&String> = self.plan.streams.keys().chain(self.plan.models.keys()).collect();
        reports.sort_by_key(|report| {
            let of = |check: &&Check| check.on == report.on && check.words() == report.check;
            let of_rows = self.plan.checks.iter().find(of).is_some_and(Check::is_of_rows);
            (!of_rows, relations.iter().position(|relation| **relation == report.on))
        });
    }

    /// Stages all outputs, as far as none is refused.
    async fn outputs(
        &mut self,
        tables: &mut Tables,
        connections: &Connections,
        waiting: Option<&Waiting>,
        record: &mut RunRecord,
    ) -> Result<IndexMap<String, (Staged, String)>> {
        let mut written = IndexMap::new();
        for output in &self.plan.outputs {
            let (staged, hash) = self.output(tables, output, connections, record).await?;
            self.guard(output, &staged)?;
            if let (Some(waiting), Some(Replay { overwrite: false, .. })) = (waiting, &self.request.replay) {
                waiting.refuse_overwriting(self.plan, output, staged.updated)?;
            }
            written.insert(output.spec.name.clone(), (staged, hash));
        }
        Ok(written)
    }

    /// Stages one output, and counts, sums and hashes its rows on the way.
    async fn output(
        &mut self,
        tables: &mut Tables,
        output: &Output,
        connections: &Connections,
        record: &mut RunRecord,
    ) -> Result<(Staged, String)> {
        let copied = match output.latest_by {
            Some(_) => None,
            None => tables.read(&output.from, &output.schema)?,
        };
        let rows = match copied {
            Some(rows) => rows,
            None => tables.context()?.sql(&output.sql()?).await?.execute_stream().await?,
        };
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
        let columns_before = before.columns.iter().map(|column| (&column.name, &column.r#type));
        let columns = columns_of(&output.schema);
        let same = before.rowhash == hash
            && before.rows_after == staged.rows_after
            && before.rows_after == staged.rows_before
            && before.mode == Mode::Replace.to_string()
            && columns_before.eq(columns.iter().map(|column| (&column.name, &column.r#type)))
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

fn tell(reports: &[CheckReport]) {
    for check in reports {
        info!(
            check = check.check,
            on = check.on,
            found = check.found,
            verdict = check.verdict.words(),
            "checked"
        );
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
    Box::pin(RecordBatchStreamAdapter::new(schema, rows))
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
    Box::pin(RecordBatchStreamAdapter::new(schema, rows))
}
