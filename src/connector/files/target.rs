//! Publishing into a folder: one attempt, one manifest, one rename.
//!
//! Staging writes Parquet files under names that no other attempt uses; nobody lists them, so nobody sees them.
//! The commit gives the record its name, `commits/<seq>.json`, which only one attempt can have: it is the fence, and
//! the rows and the watermark become true in that one act. Two runs at once may both stage; one commits.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use datafusion::physical_plan::SendableRecordBatchStream;
use indexmap::IndexMap;

use super::{
    FilesConnection,
    manifest::{job_path, listed},
    merge::Staging,
    parquet,
    place::Listed,
};
use crate::{
    connector::{
        Attempt, CommitOutcome, Current, Load, Orphan, Staged, Target,
        evolve::evolve,
        quarantined_schema,
        spec::{Guarantee, Mode, OutputSpec},
    },
    error::{Error, ErrorKind, Result},
    load::overtaken,
    names::JobId,
    record::{DataFile, LoadRecord, columns_of},
    runtime, session,
    spool::Spool,
};

#[async_trait]
impl Target for Arc<FilesConnection> {
    fn guarantee(&self, _: &OutputSpec) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    fn has_folders(&self) -> bool {
        true
    }

    async fn last_record(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        let (this, job) = (Self::clone(self), job.clone());
        runtime::blocking(move || this.newest(&job)).await
    }

    async fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        let (this, job) = (Self::clone(self), job.clone());
        runtime::blocking(move || this.committed(&job, seq)).await
    }

    async fn current(&self, job: &JobId, output: &str) -> Result<Option<Current>> {
        let Some(record) = self.last_record(job).await? else {
            // Files that no record of this job names: somebody else's, or a state that was deleted.
            let (this, data) = (Self::clone(self), format!("{output}/data"));
            let (files, _) = runtime::blocking(move || this.place.names(&data)).await?;
            let foreign = files.iter().any(|name| name.ends_with(".parquet"));
            let published = super::manifest::published(self, output).await.is_ok();
            return Ok((foreign && published)
                .then(|| Current { schema: arrow::datatypes::Schema::empty().into(), rows: 1 }));
        };
        match record.outputs.get(output) {
            Some(found) => Ok(Some(Current { schema: found.schema()?, rows: found.rows_after })),
            None => Ok(None),
        }
    }

    async fn quarantined(&self, job: &JobId) -> Result<SendableRecordBatchStream> {
        let (this, job) = (Self::clone(self), job.clone());
        Ok(runtime::blocking_stream(quarantined_schema(), move |out| {
            let newest = this.newest(&job)?.map_or(0, |record| record.seq);
            for seq in 1..=newest {
                let Some(record) = this.committed(&job, seq)? else { continue };
                for file in &record.quarantine_files {
                    if !parquet::read_quarantined(this.place.open(&Listed::named(file))?, file, seq, out)? {
                        return Ok(());
                    }
                }
            }
            Ok(())
        }))
    }

    async fn orphans(&self, job: &JobId, outputs: &[String], before: DateTime<Utc>) -> Result<Vec<Orphan>> {
        self.garbage(job, outputs, before).await
    }

    async fn remove(&self, orphans: &[Orphan]) -> Result<()> {
        self.discard(orphans).await
    }

    async fn sealed(&self, job: &JobId, base: Option<&LoadRecord>) -> Result<Vec<LoadRecord>> {
        let (this, job, base) = (Self::clone(self), job.clone(), base.cloned());
        runtime::blocking(move || FilesConnection::sealed(&this, &job, base.as_ref())).await
    }

    async fn commit_sealed(&self, job: &JobId, record: &LoadRecord) -> CommitOutcome {
        let this = Self::clone(self);
        match runtime::blocking(move || this.probe()).await {
            Ok(()) => publish(self, job, record.clone()).await,
            Err(error) => CommitOutcome::Rejected(error),
        }
    }

    async fn begin(
        &self,
        job: &JobId,
        attempt: &Attempt,
        base: Option<&LoadRecord>,
    ) -> Result<Box<dyn Load>> {
        let (this, id, known) = (Self::clone(self), job.clone(), base.is_some());
        runtime::blocking(move || {
            this.probe()?;
            if !known {
                return Ok(());
            }
            // A run that died between its commit and the switch left `current` behind. One that stands still there is passed by.
            match this.show(&id) {
                Err(error) if error.kind() == ErrorKind::Busy => Ok(()),
                shown => shown,
            }
        })
        .await?;
        Ok(Box::new(FilesLoad {
            connection: Self::clone(self),
            job: job.clone(),
            attempt: attempt.clone(),
            base: base.cloned(),
            staged: IndexMap::new(),
            quarantine: None,
            keep: false,
        }))
    }
}

/// Commits a record that is sealed, or that an attempt seals: its own, or one that it left behind.
async fn publish(connection: &Arc<FilesConnection>, job: &JobId, record: LoadRecord) -> CommitOutcome {
    let (connection, job, overtaken) = (Arc::clone(connection), job.clone(), overtaken(job));
    let outcome = runtime::blocking(move || {
        let landed = connection.commit_record(&job, &record)?
            || connection
                .committed(&job, record.seq)?
                .is_some_and(|landed| landed.attempt_id == record.attempt_id);
        let shown = if landed { connection.show(&job) } else { Ok(()) };
        // It is known how it ended.
        connection.unseal(&job, &record);
        Ok((landed, shown))
    })
    .await;
    match outcome {
        Ok((true, Ok(()))) => CommitOutcome::Committed(None),
        // The release is visible to manifest readers; what others look at is repaired by the next run.
        Ok((true, Err(error))) => CommitOutcome::Committed(Some(format!(
            "the release is published, and readers without manifests do not see it yet; the next run shows it to them: {error}"
        ))),
        Ok((false, _)) => CommitOutcome::Rejected(overtaken),
        Err(error) => CommitOutcome::Unknown(error),
    }
}

/// One attempt.
struct FilesLoad {
    connection: Arc<FilesConnection>,
    job: JobId,
    attempt: Attempt,
    base: Option<LoadRecord>,
    staged: IndexMap<String, (arrow::datatypes::SchemaRef, Vec<DataFile>)>,
    quarantine: Option<DataFile>,
    /// Whether the files are part of a release, or may be.
    keep: bool,
}

/// The folder of set-aside rows, as an output's name.
pub(super) const QUARANTINE: &str = "_quarantine";

impl FilesLoad {
    fn base_files(&self, output: &str) -> Vec<DataFile> {
        self.base
            .as_ref()
            .and_then(|record| record.outputs.get(output))
            .map(|found| found.files.clone())
            .unwrap_or_default()
    }

    /// Removes what this attempt wrote.
    fn remove_staged(&mut self) {
        let quarantine = self.quarantine.take().map(|file| (self.quarantine_folder(), file));
        let staged: Vec<(String, DataFile)> = std::mem::take(&mut self.staged)
            .into_iter()
            .flat_map(|(output, (_, files))| {
                let base = self.base_files(&output);
                files
                    .into_iter()
                    .filter(move |file| !base.contains(file))
                    .map(move |file| (output.clone(), file))
                    .collect::<Vec<_>>()
            })
            .collect();
        let paths = staged.into_iter().chain(quarantine);
        self.connection.place.remove(paths.map(|(output, file)| format!("{output}/{}", file.path)).collect());
    }

    fn quarantine_folder(&self) -> String {
        format!("{}/{QUARANTINE}", job_path(&self.job))
    }
}

impl Drop for FilesLoad {
    fn drop(&mut self) {
        if !self.keep {
            self.remove_staged();
        }
    }
}

#[async_trait]
impl Load for FilesLoad {
    async fn stage(&mut self, output: &OutputSpec, rows: SendableRecordBatchStream) -> Result<Staged> {
        let base = self.base_files(&output.name);
        let current = self
            .base
            .as_ref()
            .and_then(|record| record.outputs.get(&output.name))
            .map(crate::record::OutputRecord::schema)
            .transpose()?;
        let model = output.own(&rows.schema());
        let schema = match &current {
            Some(current) if !output.rebuild => evolve(output, current, &model)?,
            _ => Arc::clone(&model),
        };
        let evolved =
            current.is_some_and(|current| columns_of(&current) != columns_of(&schema)) && !output.rebuild;
        let (attempt, connection) = (self.attempt.clone(), Arc::clone(&self.connection));
        let mut staging = Staging {
            connection: &connection,
            attempt: &attempt,
            output,
            schema: Arc::clone(&schema),
            base,
            evolved,
            parts: 0,
        };
        let (files, staged) = match output.mode {
            Mode::Append if !output.rebuild => {
                staging.append(session::conform(rows, Arc::clone(&schema))).await?
            }
            Mode::Replace | Mode::Append => {
                staging.replace(session::conform(rows, Arc::clone(&schema))).await?
            }
            Mode::Merge | Mode::History => {
                let spool = Spool::of(&output.name, rows, &attempt.scratch).await?;
                if output.rebuild {
                    // Against nothing: keys are checked, and every row is new.
                    let before = std::mem::take(&mut staging.base).iter().map(|file| file.rows).sum();
                    let (files, staged) = staging.merge(&spool).await?;
                    (files, Staged { rows_before: before, deleted: before, ..staged })
                } else {
                    staging.merge(&spool).await?
                }
            }
            Mode::ReplaceRange => {
                let spool = Spool::of(&output.name, rows, &attempt.scratch).await?;
                if output.rebuild {
                    staging.replace(session::conform(spool.stream(), Arc::clone(&schema))).await?
                } else {
                    staging.replace_range(&spool).await?
                }
            }
        };
        self.staged.insert(output.name.clone(), (schema, files));
        Ok(staged)
    }

    async fn quarantine(&mut self, rows: SendableRecordBatchStream) -> Result<u64> {
        let name = format!("{:08}-{}.parquet", self.attempt.seq, self.attempt.id.simple());
        let memory = self.attempt.scratch.of_output(QUARANTINE);
        self.quarantine =
            parquet::write(&self.connection, &self.quarantine_folder(), &name, rows, &memory).await?;
        Ok(self.quarantine.as_ref().map_or(0, |file| file.rows))
    }

    async fn commit(mut self: Box<Self>, record: &LoadRecord) -> CommitOutcome {
        let mut record = record.clone();
        for (output, (schema, files)) in &self.staged {
            if let Some(written) = record.outputs.get_mut(output) {
                written.columns = columns_of(schema);
                written.files.clone_from(files);
            }
        }
        let folder = self.quarantine_folder();
        record.quarantine_files =
            self.quarantine.iter().map(|file| format!("{folder}/{}", file.path)).collect();
        let mut own: Vec<Listed> = record.quarantine_files.iter().map(|path| Listed::named(path)).collect();
        for (output, (_, files)) in &self.staged {
            let base = self.base_files(output);
            own.extend(files.iter().filter(|file| !base.contains(file)).map(|file| listed(output, file)));
        }
        // From the seal on the files may be part of a release: they are removed only when it is certain that they are not.
        self.keep = true;
        let (connection, job, sealing) = (Arc::clone(&self.connection), self.job.clone(), record.clone());
        let sealed = runtime::blocking(move || {
            for file in &own {
                if !connection.place.is_there(file)? {
                    let gone = format!("`{}`, which this run had written, is gone", file.path);
                    let hint = "Was it taken for garbage? Run again: nothing of this run was published.";
                    return Err(Error::temporary(gone).hint(hint));
                }
            }
            let sealed = connection.seal(&job, &sealing);
            Ok(sealed.map_err(|error| (error, connection.may_be_sealed(&job, &sealing))))
        })
        .await;
        let refused = match sealed {
            Ok(Ok(())) => None,
            // Whoever finds it may commit it.
            Ok(Err((error, true))) => return CommitOutcome::Unknown(error),
            Ok(Err((error, false))) | Err(error) => Some(error),
        };
        if let Some(error) = refused {
            self.keep = false;
            return CommitOutcome::Rejected(error);
        }
        let outcome = publish(&self.connection, &self.job, record).await;
        self.keep = !matches!(outcome, CommitOutcome::Rejected(_));
        outcome
    }

    async fn discard(mut self: Box<Self>) -> Result<()> {
        self.remove_staged();
        Ok(())
    }
}
