//! `floodmark quarantine`: rows that were set aside, asked of the targets that keep them.

use std::collections::BTreeMap;

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::Int64Type,
};
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;

use crate::{
    error::{Error, Result},
    names::JobId,
    project::Project,
};

async fn stream(project: &Project, job: &str) -> Result<SendableRecordBatchStream> {
    let document = project.jobs.get(job).ok_or_else(|| Error::bug("no such job"))?;
    let connection = project.connection(&document.job.target.connection)?;
    let target = connection.target().ok_or_else(|| Error::bug("the target cannot be written"))?;
    target.quarantined(&JobId { project: project.name.clone(), job: job.to_owned() }).await
}

/// Rows by job, release, source or model, and check.
pub(super) async fn count(
    project: &Project,
    jobs: &[String],
) -> Result<BTreeMap<(String, i64, String, String), u64>> {
    let mut counts = BTreeMap::new();
    for job in jobs {
        let mut rows = stream(project, job).await?;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            let seqs = batch.column(0).as_primitive::<Int64Type>();
            let (on, check) = (batch.column(1).as_string::<i32>(), batch.column(2).as_string::<i32>());
            for row in 0..batch.num_rows() {
                let key =
                    (job.clone(), seqs.value(row), on.value(row).to_owned(), check.value(row).to_owned());
                *counts.entry(key).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

/// The first `limit` rows of a job, or of one of its releases.
pub(super) async fn rows(
    project: &Project,
    job: &str,
    release: Option<u64>,
    limit: usize,
) -> Result<Vec<RecordBatch>> {
    let mut stream = stream(project, job).await?;
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
