//! The manifest: which files are a release.
//!
//! ```text
//! <root>/_floodmark/<project>/<job>/commits/<seq>.json   the load record: the commit itself
//! <root>/_floodmark/<project>/<job>/staged/<seq>-<attempt>.json  a seal: the record that the attempt is about to commit
//! <root>/_floodmark/<project>/<job>/releases/<seq>/…     hard links to one release's files
//! <root>/_floodmark/<project>/<job>/current              a link to the newest of them
//! <root>/<output>/data/*.parquet                         files, live or not; named per attempt
//! <root>/<output>/current                                a link through the job's `current`
//! ```
//!
//! A release is visible when its commit file has its name, which only one attempt can give it. Readers that know
//! manifests take the files that the newest one lists. Readers that know only folders take `<output>/current`: all
//! outputs of a job switch by one rename, after the commit; a switch that was cut off is repaired by the next run.
//!
//! A seal is written when everything that its record lists is there and audited, and is taken away when it is known how the commit
//! ended. Who finds one on top of the newest release may commit it: its process died, or its answer was lost. Until then nobody
//! removes what it lists, also not its own attempt, since somebody may be committing it.
//!
//! A bucket has no `releases` and no `current`: its readers take the file list. It has `latest` instead, a hint at the
//! newest sequence number, from which readers walk on: so that finding the newest record costs three requests and no listing.

use std::{
    fs::{self, TryLockError},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use arrow::datatypes::SchemaRef;

use super::{
    FilesConnection, durable,
    place::{Listed, Place},
};
use crate::{
    connector::CatalogTable,
    error::{Error, Result},
    names::JobId,
    record::{DataFile, LoadRecord, OutputRecord},
    runtime,
};

/// How many old releases stay readable through `releases/`.
const KEPT_RELEASES: usize = 2;

/// How long one run waits while another one switches `current`, which takes a moment.
const SWITCHING: Duration = Duration::from_secs(2);

/// How long to wait between two looks at the lock.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl FilesConnection {
    /// The newest record of a job.
    pub(super) fn newest(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        if self.place.is_bucket()
            && let Some(hint) = self.place.read(&latest_path(job))?
            && let Some(mut seq) = hint.trim().parse::<u64>().ok()
            && let Some(mut newest) = self.committed(job, seq)?
        {
            while let Some(next) = self.committed(job, seq + 1)? {
                (newest, seq) = (next, seq + 1);
            }
            return Ok(Some(newest));
        }
        let (names, _) = self.place.names(&format!("{}/commits", job_path(job)))?;
        match sequence_numbers(&names).max() {
            Some(seq) => self.committed(job, seq),
            None => Ok(None),
        }
    }

    /// Commits `record`: gives its file the name of its sequence number. False if another has it.
    pub(super) fn commit_record(&self, job: &JobId, record: &LoadRecord) -> Result<bool> {
        self.place.create(&commit_path(job, record.seq), &record.to_json())
    }

    /// Writes down that everything that `record` lists is there.
    pub(super) fn seal(&self, job: &JobId, record: &LoadRecord) -> Result<()> {
        let path = seal_path(job, record);
        match self.place.create(&path, &record.to_json())? {
            true => Ok(()),
            false => Err(Error::bug(format!("another attempt has sealed `{path}`"))),
        }
    }

    /// Whether the seal of `record` is there, or may come to be.
    pub(super) fn may_be_sealed(&self, job: &JobId, record: &LoadRecord) -> bool {
        self.place.is_bucket() || !matches!(self.place.read(&seal_path(job, record)), Ok(None))
    }

    /// Takes the seal away: it is known how the commit of `record` ended.
    pub(super) fn unseal(&self, job: &JobId, record: &LoadRecord) {
        self.place.remove(vec![seal_path(job, record)]);
    }

    /// The seals of a job: their paths and their sequence numbers.
    pub(super) fn seals(&self, job: &JobId) -> Result<Vec<(String, u64)>> {
        let folder = staged_path(job);
        let (names, _) = self.place.names(&folder)?;
        let seal = |name: &String| {
            let (seq, _) = name.strip_suffix(".json")?.split_once('-')?;
            Some((format!("{folder}/{name}"), seq.parse().ok()?))
        };
        Ok(names.iter().filter_map(seal).collect())
    }

    /// What a seal says; `None` if it was taken away.
    pub(super) fn seal_at(&self, path: &str) -> Result<Option<LoadRecord>> {
        let Some(text) = self.place.read(path)? else { return Ok(None) };
        LoadRecord::from_json(&text).map(Some).map_err(|error| error.note(path))
    }

    /// What was sealed on top of `base` and is there. Seals whose sequence number is taken are taken away.
    pub(super) fn sealed(&self, job: &JobId, base: Option<&LoadRecord>) -> Result<Vec<LoadRecord>> {
        let (next, before) = (base.map_or(1, |base| base.seq + 1), base.map(LoadRecord::sha256));
        let mut found = Vec::new();
        for (path, seq) in self.seals(job)? {
            if seq < next {
                self.place.remove(vec![path]);
            } else if seq == next
                && let Some(record) = self.seal_at(&path)?
                && record.prev_record_sha256 == before
                && self.are_there(&written_by(&record, base))?
            {
                found.push(record);
            }
        }
        Ok(found)
    }

    /// Whether all of these are there.
    fn are_there(&self, files: &[Listed]) -> Result<bool> {
        for file in files {
            if !self.place.is_there(file)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The record that has the sequence number `seq`.
    pub(super) fn committed(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        let path = commit_path(job, seq);
        let Some(text) = self.place.read(&path)? else { return Ok(None) };
        LoadRecord::from_json(&text).map(Some).map_err(|error| error.note(path))
    }

    /// Shows readers the newest release: a folder's `current`, a bucket's `latest`. Does nothing if they do already.
    ///
    /// The newest is looked up under a lock, so that a run that was held up never shows an older one again.
    pub(super) fn show(&self, job: &JobId) -> Result<()> {
        let root = match &self.place {
            Place::Folder(root) => root,
            Place::Bucket(bucket) => {
                let newest = self.newest(job)?;
                return newest
                    .map_or(Ok(()), |newest| bucket.overwrite(&latest_path(job), &newest.seq.to_string()));
            }
        };
        let path = root.join(job_path(job)).join("lock");
        let failed = |error| Error::io("lock", path.display(), error);
        let lock = fs::File::options().create(true).append(true).open(&path).map_err(failed)?;
        let mut waited = Duration::ZERO;
        while let Err(error) = lock.try_lock() {
            match error {
                TryLockError::Error(error) => return Err(failed(error)),
                TryLockError::WouldBlock if waited >= SWITCHING => {
                    return Err(Error::busy(format!(
                        "another run holds `{}`, and stands still",
                        path.display()
                    ))
                    .hint("Let it go on, or stop it."));
                }
                TryLockError::WouldBlock => std::thread::sleep(LOOK_AGAIN),
            }
            waited += LOOK_AGAIN;
        }
        match self.newest(job)? {
            Some(newest) => switch_current(root, job, &newest),
            None => Ok(()),
        }
    }

    /// The outputs that jobs published here.
    pub(super) fn outputs(&self) -> Result<Vec<CatalogTable>> {
        let mut tables = Vec::new();
        for job in self.jobs()? {
            for (name, output) in self.newest(&job)?.into_iter().flat_map(|record| record.outputs) {
                let columns =
                    output.columns.iter().map(|column| (column.name.clone(), column.r#type.clone()));
                tables.push(CatalogTable {
                    name,
                    schema: None,
                    view: false,
                    columns: columns.collect(),
                    key: output.key,
                    rows: Some(output.rows_after),
                });
            }
        }
        Ok(tables)
    }

    /// The jobs that published into this place.
    pub(super) fn jobs(&self) -> Result<Vec<JobId>> {
        let mut jobs = Vec::new();
        for project in self.place.names("_floodmark")?.1 {
            for job in self.place.names(&format!("_floodmark/{project}"))?.1 {
                jobs.push(JobId { project: project.clone(), job });
            }
        }
        Ok(jobs)
    }
}

/// The folder of a job's own files, relative to the root.
pub(super) fn job_path(job: &JobId) -> String {
    format!("_floodmark/{}/{}", job.project, job.job)
}

fn commit_path(job: &JobId, seq: u64) -> String {
    format!("{}/commits/{seq:020}.json", job_path(job))
}

fn staged_path(job: &JobId) -> String {
    format!("{}/staged", job_path(job))
}

fn seal_path(job: &JobId, record: &LoadRecord) -> String {
    format!("{}/{:020}-{}.json", staged_path(job), record.seq, record.attempt_id.simple())
}

/// The files that an attempt wrote itself: those that the release before it does not list.
pub(super) fn written_by(record: &LoadRecord, base: Option<&LoadRecord>) -> Vec<Listed> {
    let mut written: Vec<Listed> = record.quarantine_files.iter().map(|path| Listed::named(path)).collect();
    for (name, output) in &record.outputs {
        let before = base.and_then(|base| base.outputs.get(name)).map(|before| &before.files);
        let new = output.files.iter().filter(|file| before.is_none_or(|before| !before.contains(file)));
        written.extend(new.map(|file| listed(name, file)));
    }
    written
}

fn latest_path(job: &JobId) -> String {
    format!("{}/latest", job_path(job))
}

/// Makes `current` show the release of `record`, which is the newest: whoever calls holds the job's lock. Does nothing if it does
/// already.
fn switch_current(root: &Path, job: &JobId, record: &LoadRecord) -> Result<()> {
    let folder = root.join(job_path(job));
    let name = format!("{:020}-{}", record.seq, record.attempt_id.simple());
    let release = PathBuf::from("releases").join(&name);
    let full = folder.join(&release);
    let current = folder.join("current");
    if !fs::read_link(&current).is_ok_and(|target| target == release) {
        durable::make_folder(&full)?;
        for (output, written) in &record.outputs {
            let links = full.join(output);
            durable::make_folder(&links)?;
            for file in &written.files {
                let data = root.join(output).join(&file.path);
                let link = links.join(file.path.strip_prefix("data/").unwrap_or(&file.path));
                if let Some(folder) = link.parent() {
                    durable::make_folder(folder)?;
                }
                match fs::hard_link(&data, &link) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(Error::io("link", link.display(), error));
                    }
                    _ => {}
                }
            }
            durable::sync_folder(&links.join("x"))?;
        }
        switch(&current, &release)?;
    }
    for output in record.outputs.keys() {
        let link = root.join(output).join("current");
        let target = PathBuf::from("..").join(job_path(job)).join("current").join(output);
        if fs::read_link(&link).is_ok_and(|known| known == target) {
            continue;
        }
        switch(&link, &target)?;
    }
    drop_old_releases(&folder.join("releases"), &name)
}

fn drop_old_releases(releases: &Path, shown: &str) -> Result<()> {
    // Names sort by their sequence number.
    let (_, names) = Place::Folder(releases.to_owned()).names("")?;
    for old in names.iter().rev().filter(|name| *name != shown).skip(KEPT_RELEASES - 1) {
        let folder = releases.join(old);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", folder.display(), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// An output that a job published.
pub(super) struct Published(OutputRecord);

impl Published {
    pub(super) fn schema(&self) -> Result<SchemaRef> {
        self.0.schema()
    }

    /// The live files.
    pub(super) fn files(&self, output: &str) -> Vec<Listed> {
        self.0.files.iter().map(|file| listed(output, file)).collect()
    }
}

/// The newest release of `output` in the folder of `connection`.
pub(super) async fn published(
    connection: &std::sync::Arc<FilesConnection>,
    output: &str,
) -> Result<Published> {
    let (this, output) = (std::sync::Arc::clone(connection), output.to_owned());
    runtime::blocking(move || {
        let mut known = Vec::new();
        for job in this.jobs()? {
            let Some(mut record) = this.newest(&job)? else { continue };
            if let Some(found) = record.outputs.shift_remove(&output) {
                return Ok(Published(found));
            }
            known.extend(record.outputs.into_keys());
        }
        let error = Error::configuration(format!(
            "connection `{}`: no job has published `{output}` in `{}`",
            this.name, this.shown
        ));
        Err(match crate::error::nearest(&output, known.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("Did you mean `{near}`?")),
            None => {
                error.hint("Run the job that publishes it first; or use `file:` or `files:` for plain files.")
            }
        })
    })
    .await
}

/// A data file of an output. Its name is one attempt's alone: it needs no version.
pub(super) fn listed(output: &str, file: &DataFile) -> Listed {
    Listed { path: format!("{output}/{}", file.path), size: file.bytes, version: None }
}

/// Makes `link` point to `target`, by rename.
fn switch(link: &Path, target: &Path) -> Result<()> {
    if let Some(folder) = link.parent() {
        durable::make_folder(folder)?;
    }
    let temporary = link.with_file_name(format!(".current.{}.tmp", uuid::Uuid::new_v4().simple()));
    std::os::unix::fs::symlink(target, &temporary)
        .and_then(|()| fs::rename(&temporary, link))
        .map_err(|error| Error::io("switch", link.display(), error))?;
    durable::sync_folder(link)
}

fn sequence_numbers(names: &[String]) -> impl Iterator<Item = u64> {
    names.iter().filter_map(|name| name.trim_end_matches(".json").parse().ok())
}
