//! `floodmark quarantine`: rows that were set aside, asked of the targets that keep them.

use std::collections::BTreeMap;

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::Int64Type,
};
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;
use serde::Serialize;

use crate::{
    check::lot,
    error::{Error, Result},
    names::JobId,
    project::Project,
    record::Settled,
};

/// A job's quarantine, and which of it waits no longer.
async fn stream(project: &Project, job: &str) -> Result<(SendableRecordBatchStream, Settled)> {
    let document = project.jobs.get(job).ok_or_else(|| Error::bug("no such job"))?;
    let connection = project.connection(&document.job.target.connection)?;
    let target = connection.target().ok_or_else(|| Error::bug("the target cannot be written"))?;
    let id = JobId { project: project.name.clone(), job: job.to_owned() };
    let settled = target.last_record(&id).await?.map(|record| record.settled).unwrap_or_default();
    Ok((target.quarantined(&id).await?, settled))
}

/// Rows of one job, release, source or model, and check.
#[derive(Debug, Serialize)]
pub(super) struct Counted {
    pub(super) job: String,
    pub(super) release: u64,
    pub(super) on: String,
    pub(super) check: String,
    pub(super) rows: u64,
    /// Whether they may still be replayed.
    pub(super) waiting: bool,
}

/// How many rows there are.
pub(super) async fn count(project: &Project, jobs: &[String]) -> Result<Vec<Counted>> {
    let mut counted = Vec::new();
    for job in jobs {
        let (mut rows, settled) = stream(project, job).await?;
        let mut counts: BTreeMap<(u64, String, String), u64> = BTreeMap::new();
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let seqs = batch.column(0).as_primitive::<Int64Type>();
            let (on, check) = (batch.column(1).as_string::<i32>(), batch.column(2).as_string::<i32>());
            for row in 0..batch.num_rows() {
                let key =
                    (seqs.value(row).cast_unsigned(), on.value(row).to_owned(), check.value(row).to_owned());
                *counts.entry(key).or_default() += 1;
            }
        }
        counted.extend(counts.into_iter().map(|((release, on, check), rows)| {
            let waiting = !settled.holds(&lot(release, &on, &check));
            Counted { job: job.clone(), release, on, check, rows, waiting }
        }));
    }
    Ok(counted)
}

/// The first `limit` rows of a job, or of one of its releases.
pub(super) async fn rows(
    project: &Project,
    job: &str,
    release: Option<u64>,
    limit: usize,
) -> Result<Vec<RecordBatch>> {
    let (mut stream, _) = stream(project, job).await?;
    let (mut batches, mut left) = (Vec::new(), limit);
    while let Some(batch) = stream.next().await {
        let batch = batch?;
        let seqs = batch.column(0).as_primitive::<Int64Type>();
        let wanted = seqs
            .iter()
            .map(|seq| release.is_none_or(|release| seq == Some(release.cast_signed())))
            .collect::<Vec<_>>();
        let batch = arrow::compute::filter_record_batch(&batch, &wanted.into())?;
        let batch = batch.slice(0, batch.num_rows().min(left));
        left -= batch.num_rows();
        batches.push(batch);
        if left == 0 {
            break;
        }
    }
    Ok(batches)
}
