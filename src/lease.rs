//! Keeps two runs of one job on one machine out of each other's way. It saves work and no row: what keeps rows safe is the sequence
//! number in the target.
//!
//! A lease is a lock on a file under `.floodmark/leases`, which ends with the process that holds it, however that ends. Who holds
//! it shows signs of life in the file's time. A holder that shows none for as long as a lease lasts (it was stopped, or
//! its machine slept) is passed by; when it wakes up it loses at the commit.

use std::{
    fs::{self, File, FileTimes, TryLockError},
    io::{Read, Seek, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    project::Project,
    runtime::{self, Clock, TaskGuard},
};

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    run_id: Uuid,
    process: u32,
    since: DateTime<Utc>,
}

/// A lease that is held, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    _file: File,
    _signs_of_life: TaskGuard,
}

/// What came of asking for a lease.
#[derive(Debug)]
pub enum Leased {
    /// It is ours.
    Held(Lease),
    /// Its holder shows no sign of life, and is passed by: what to tell of it.
    Passed(String),
}

impl Lease {
    /// Takes the lease of a job, in the project's environment, for the run `run_id`.
    ///
    /// # Errors
    ///
    /// If a living run holds it, or the folder cannot be written.
    pub fn take(project: &Project, job: &str, run_id: Uuid, clock: &Arc<dyn Clock>) -> Result<Leased> {
        let folder = project.root.join(".floodmark/leases");
        fs::create_dir_all(&folder).map_err(|error| Error::io("make the folder", folder.display(), error))?;
        let environment = project.environment.replace(|c: char| !c.is_alphanumeric(), "_");
        let path = folder.join(format!("{job}.{environment}"));
        let lasting = project.lease;
        let failed = |error| Error::io("use the lease", path.display(), error);
        let mut file = File::options().create(true).read(true).append(true).open(&path).map_err(failed)?;
        let now = clock.now();
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // A holder that has only just come has not written its name yet.
                drop(file.rewind().and_then(|()| file.read_to_string(&mut text)));
                let who = match serde_json::from_str::<Holder>(&text) {
                    Ok(holder) => format!(
                        "run {}, process {}, since {}",
                        holder.run_id,
                        holder.process,
                        holder.since.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
                    ),
                    Err(_) => "another run".to_owned(),
                };
                let life = file.metadata().and_then(|meta| meta.modified()).map_err(failed)?;
                let silent = SystemTime::from(now).duration_since(life).unwrap_or(Duration::ZERO);
                if silent <= lasting {
                    return Err(Error::busy(format!("job `{job}` is being run already"))
                        .note(format!("by {who}"))
                        .hint("Let it end, or stop it; then run again."));
                }
                return Ok(Leased::Passed(format!(
                    "{who}, holds this job and has shown no sign of life for {} s: passed by",
                    silent.as_secs()
                )));
            }
        }
        let holder = Holder { run_id, process: std::process::id(), since: now };
        let text = serde_json::to_string(&holder).unwrap_or_default();
        file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).map_err(failed)?;
        let (sign, clock) = (file.try_clone().map_err(failed)?, Arc::clone(clock));
        let signs_of_life = runtime::spawn(async move {
            loop {
                // A sign that fails is a missing one.
                drop(sign.set_times(FileTimes::new().set_modified(clock.now().into())));
                runtime::sleep((lasting / 4).max(Duration::from_millis(1))).await;
            }
        });
        Ok(Leased::Held(Self { _file: file, _signs_of_life: signs_of_life }))
    }
}
