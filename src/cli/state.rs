//! `state`: what a target remembers of a job, and how to set it right. Each change is a commit of its own, without rows.

use std::collections::BTreeSet;

use arrow::{array::AsArray, datatypes::Int64Type};
use chrono::{SecondsFormat, Utc};
use futures::StreamExt;
use uuid::Uuid;

use crate::{
    check::lot,
    connector::{Attempt, CommitOutcome, Connection, Held, Target, spec::Mode},
    error::{Error, Result},
    names::JobId,
    project::{JobDocument, Project},
    record::{LoadRecord, Lot, OutputRecord, RECORD_VERSION, Settled, columns_of},
    runtime::{Clock, SystemClock},
    spool::Scratch,
    state::Store,
};

/// A job's target, opened.
struct Opened<'a> {
    project: &'a Project,
    document: &'a JobDocument,
    connection: std::sync::Arc<dyn Connection>,
}

impl<'a> Opened<'a> {
    fn new(project: &'a Project, job: &str) -> Result<Self> {
        let document =
            project.jobs.get(job).ok_or_else(|| Error::bug("the job was selected and is not there"))?;
        let connection = project.connection(&document.job.target.connection)?;
        Ok(Self { project, document, connection })
    }

    fn target(&self) -> Result<&dyn Target> {
        self.connection.target().ok_or_else(|| {
            Error::configuration(format!(
                "connection `{}` cannot be written",
                self.document.job.target.connection
            ))
            .hint("`floodmark connections list` says which kinds can be.")
        })
    }

    /// What waits in a job's quarantine.
    async fn waiting(&self, id: &JobId, record: &LoadRecord) -> Result<BTreeSet<Lot>> {
        let mut rows = self.target()?.quarantined(id).await?;
        let mut lots = BTreeSet::new();
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let text = |column: usize, row| batch.column(column).as_string::<i32>().value(row);
            for row in 0..batch.num_rows() {
                let release = batch.column(0).as_primitive::<Int64Type>().value(row).cast_unsigned();
                lots.insert(lot(release, text(1, row), text(2, row)));
            }
        }
        lots.retain(|lot| !record.settled.holds(lot));
        Ok(lots)
    }

    fn id(&self, job: &str) -> JobId {
        JobId { project: self.project.name.clone(), job: job.to_owned() }
    }

    /// Commits a record without rows on top of `base`.
    async fn commit(&self, id: &JobId, base: Option<&LoadRecord>, record: LoadRecord) -> Result<LoadRecord> {
        let attempt = Attempt {
            id: record.attempt_id,
            run_id: record.run_id,
            seq: record.seq,
            incarnation: record.incarnation,
            outputs: 0,
            held: Held::unknown(),
            scratch: Scratch::new(&self.project.limits)?,
        };
        let load = self.target()?.begin(id, &attempt, base).await?;
        match load.commit(&record).await {
            CommitOutcome::Committed(_) => {}
            CommitOutcome::Rejected(error) | CommitOutcome::Unknown(error) => return Err(error),
        }
        Store::open(&self.project.root)?.remember(id, &self.document.job.target.connection, &record)?;
        Ok(record)
    }
}

/// The record that follows `base`, with its sources and outputs.
fn following(id: &JobId, base: Option<&LoadRecord>) -> LoadRecord {
    let now = SystemClock.now().with_timezone(&Utc).to_rfc3339_opts(SecondsFormat::Millis, true);
    LoadRecord {
        v: RECORD_VERSION,
        project: id.project.clone(),
        job: id.job.clone(),
        incarnation: base.map_or_else(Uuid::new_v4, |base| base.incarnation),
        seq: base.map_or(1, |base| base.seq + 1),
        prev_record_sha256: base.map(LoadRecord::sha256),
        run_id: Uuid::now_v7(),
        attempt_id: Uuid::now_v7(),
        committed_at: now.clone(),
        as_of: now,
        engine: env!("CARGO_PKG_VERSION").to_owned(),
        mapping_fp: base.map(|base| base.mapping_fp.clone()).unwrap_or_default(),
        sources: base.map(|base| base.sources.clone()).unwrap_or_default(),
        outputs: base.map(|base| base.outputs.clone()).unwrap_or_default(),
        quarantined: 0,
        quarantine_files: Vec::new(),
        settled: base.map(|base| base.settled.clone()).unwrap_or_default(),
    }
}

/// Takes the target as it is: its outputs hold what they hold, and the marks stay.
pub(super) async fn adopt(project: &Project, job: &str) -> Result<LoadRecord> {
    let opened = Opened::new(project, job)?;
    let (target, id) = (opened.target()?, opened.id(job));
    let base = target.last_record(&id).await?;
    if base.is_none() {
        for (name, _) in
            opened.document.job.target.outputs.iter().filter(|(_, output)| output.mode == Mode::Append)
        {
            if target.current(&id, name).await?.is_some_and(|current| current.rows > 0) {
                return Err(Error::data(format!("output `{name}` appends, and nobody knows which rows it holds: the next run would append them again"))
                    .hint("Move its rows away and load anew; or use `mode: merge` with a `key`."));
            }
        }
    }
    let mut record = following(&id, base.as_ref());
    for source in record.sources.values_mut() {
        source.origin = None;
    }
    let declared = opened.document.job.target.outputs.keys().filter(|name| !name.contains('*'));
    let names: indexmap::IndexSet<String> = record.outputs.keys().chain(declared).cloned().collect();
    for name in names {
        let Some(current) = target.current(&id, &name).await? else {
            record.outputs.shift_remove(&name);
            continue;
        };
        let known = record.outputs.get(&name).cloned();
        if known.is_none() && current.schema.fields().is_empty() {
            return Err(Error::data(format!("output `{name}` is made of files that no release lists"))
                .note("nobody knows which of them belong together")
                .hint("Move them away and load anew; or give the output another name."));
        }
        let of_files = known.as_ref().is_some_and(|known| !known.files.is_empty());
        let columns = match &known {
            Some(known) if of_files => known.columns.clone(),
            _ => columns_of(&current.schema),
        };
        let spec = opened.document.job.target.outputs.get(&name);
        let adopted = OutputRecord {
            mode: spec
                .map(|spec| spec.mode.to_string())
                .or(known.as_ref().map(|known| known.mode.clone()))
                .unwrap_or_default(),
            rows: 0,
            inserted: 0,
            updated: 0,
            unchanged: current.rows,
            deleted: 0,
            rows_after: current.rows,
            rowhash: String::new(),
            columns,
            key: spec
                .map(|spec| spec.key.clone())
                .or(known.as_ref().map(|known| known.key.clone()))
                .unwrap_or_default(),
            files: known.map(|known| known.files).unwrap_or_default(),
        };
        record.outputs.insert(name, adopted);
    }
    opened.commit(&id, base.as_ref(), record).await
}

/// Forgets how far each source was read: the next run reads everything.
pub(super) async fn reset(project: &Project, job: &str) -> Result<LoadRecord> {
    let opened = Opened::new(project, job)?;
    let appends = opened.document.job.target.outputs.iter().find(|(_, output)| output.mode == Mode::Append);
    if let Some((output, _)) = appends {
        return Err(Error::configuration(format!(
            "output `{output}` appends, and would hold every row twice after the next run"
        ))
        .hint("`floodmark run --full-refresh` loads it anew."));
    }
    let id = opened.id(job);
    let base = opened.target()?.last_record(&id).await?.ok_or_else(|| nothing(job))?;
    let mut record = following(&id, Some(&base));
    for source in record.sources.values_mut() {
        source.mark = None;
    }
    // Their rows come again.
    record.settled = Settled::before(record.seq);
    opened.commit(&id, Some(&base), record).await
}

/// Lets rows of the quarantine go: all that wait, or those of one release. The record, unless none wait.
pub(super) async fn dismiss(
    project: &Project,
    job: &str,
    release: Option<u64>,
) -> Result<Option<LoadRecord>> {
    let opened = Opened::new(project, job)?;
    let id = opened.id(job);
    let base = opened.target()?.last_record(&id).await?.ok_or_else(|| nothing(job))?;
    let lots = opened.waiting(&id, &base).await?;
    let lots: Vec<Lot> =
        lots.into_iter().filter(|lot| release.is_none_or(|release| lot.release == release)).collect();
    if lots.is_empty() {
        return Ok(None);
    }
    let mut record = following(&id, Some(&base));
    record.settled.lots.extend(lots);
    opened.commit(&id, Some(&base), record).await.map(Some)
}

/// Goes on with the history of a job that had another name.
pub(super) async fn rename(project: &Project, old: &str, job: &str) -> Result<LoadRecord> {
    if project.jobs.contains_key(old) {
        return Err(Error::configuration(format!("the project still has a job `{old}`"))
            .hint("Rename the job in its file first."));
    }
    let opened = Opened::new(project, job)?;
    let (target, before, id) = (opened.target()?, opened.id(old), opened.id(job));
    let history = target.last_record(&before).await?.ok_or_else(|| nothing(old))?;
    if let Some(lot) = opened.waiting(&before, &history).await?.first() {
        return Err(Error::data(format!(
            "rows that release {} of job `{old}` set aside still wait, and stay with the old name",
            lot.release
        ))
        .hint("Under its old name replay them, or let them go: `floodmark quarantine replay`, `floodmark quarantine dismiss`."));
    }
    let known = target.last_record(&id).await?;
    let renamed = match known {
        // Interrupted between its two steps.
        Some(known) if known.prev_record_sha256 == Some(history.sha256()) => known,
        Some(_) => {
            return Err(Error::data(format!("the target has a history of job `{job}` already"))
                .hint("Give the job a name that it never had."));
        }
        None => {
            let mut record = following(&id, None);
            record.prev_record_sha256 = Some(history.sha256());
            record.mapping_fp.clone_from(&history.mapping_fp);
            record.sources.clone_from(&history.sources);
            record.outputs.clone_from(&history.outputs);
            opened.commit(&id, None, record).await?
        }
    };
    // The old name has nothing any more, so that readers find each output once.
    let mut retired = following(&before, Some(&history));
    retired.settled = Settled::before(retired.seq);
    retired.sources.clear();
    retired.outputs.clear();
    opened.commit(&before, Some(&history), retired).await?;
    Ok(renamed)
}

fn nothing(job: &str) -> Error {
    Error::data(format!("the target remembers nothing of job `{job}`"))
        .hint("`floodmark state show` lists what it does remember.")
}
