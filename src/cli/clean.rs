//! `floodmark clean`: what attempts that died left behind in the targets.

use std::sync::Arc;

use chrono::{SecondsFormat, TimeDelta};
use serde::Serialize;

use crate::{
    connector::Orphan,
    error::{Error, Result},
    job::micros,
    lease::{Lease, Leased},
    names::JobId,
    project::Project,
    runtime::{Clock, SystemClock},
};

/// A file that no release lists.
#[derive(Debug, Serialize)]
pub(super) struct Found {
    pub(super) job: String,
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) written_at: String,
}

/// Finds such files of these jobs that are older than `grace`, and removes them unless it is a dry run.
pub(super) async fn clean(
    project: &Project,
    jobs: &[String],
    grace: &str,
    dry_run: bool,
    force: bool,
) -> Result<Vec<Found>> {
    let span = micros(grace).filter(|micros| *micros >= 0).map(TimeDelta::microseconds).ok_or_else(|| {
        Error::configuration(format!("`--grace {grace}` is no span of time"))
            .hint("Such as `7d` or `36h`; it must be longer than the longest run.")
    })?;
    if span < TimeDelta::days(1) && !dry_run && !force {
        return Err(Error::configuration(format!("`--grace {grace}` is shorter than a day"))
            .note("a run that goes on elsewhere may have staged what looks like garbage, and would publish without it")
            .hint("Wait for a day; or, if no run of these jobs goes on anywhere, add `--force`."));
    }
    let before = SystemClock.now() - span;
    let mut found = Vec::new();
    for job in jobs {
        let document = project.jobs.get(job).ok_or_else(|| Error::bug("no such job"))?;
        let connection = project.connection(&document.job.target.connection)?;
        let Some(target) = connection.target() else { continue };
        let id = JobId { project: project.name.clone(), job: job.clone() };
        let known = target.last_record(&id).await?;
        let mut outputs: Vec<String> =
            document.job.target.outputs.keys().filter(|name| !name.contains('*')).cloned().collect();
        outputs.extend(known.into_iter().flat_map(|record| record.outputs.into_keys()));
        outputs.sort();
        outputs.dedup();
        // A run that goes on here has files that no release lists yet.
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let _lease = match Lease::take(project, job, uuid::Uuid::now_v7(), &clock)? {
            Leased::Held(lease) => lease,
            Leased::Passed(whom) => {
                return Err(Error::busy(format!("job `{job}` is being run"))
                    .note(whom)
                    .hint("It may still commit what it staged: let it go on, or end it; then clean up."));
            }
        };
        let orphans = target.orphans(&id, &outputs, before).await?;
        if !dry_run {
            target.remove(&orphans).await?;
        }
        found.extend(orphans.into_iter().map(|Orphan { path, bytes, written_at }| Found {
            job: job.clone(),
            path,
            bytes,
            written_at: written_at.to_rfc3339_opts(SecondsFormat::Secs, true),
        }));
    }
    Ok(found)
}
