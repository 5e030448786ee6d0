//! The manifest: which files are a release.
//!
//! ```text
//! <root>/_floodmark/<project>/<job>/commits/<seq>.json   the load record: the commit itself
//! <root>/_floodmark/<project>/<job>/releases/<seq>/…     hard links to one release's files
//! <root>/_floodmark/<project>/<job>/current              a link to the newest of them
//! <root>/<output>/data/*.parquet                         files, live or not; named per attempt
//! <root>/<output>/current                                a link through the job's `current`
//! ```
//!
//! A release is visible when its commit file has its name, which only one attempt can give it. Readers that know
//! manifests take the files that the newest one lists. Readers that know only folders take `<output>/current`: all
//! outputs of a job switch by one rename, after the commit; a switch that was cut off is repaired by the next run.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use arrow::datatypes::SchemaRef;

use super::{FilesConnection, durable};
use crate::{
    error::{Error, Result},
    names::JobId,
    record::{LoadRecord, OutputRecord},
    runtime,
};

/// How many old releases stay readable through `releases/`.
const KEPT_RELEASES: usize = 2;

impl FilesConnection {
    pub(super) fn job_folder(&self, job: &JobId) -> PathBuf {
        self.root.join("_floodmark").join(&job.project).join(&job.job)
    }

    fn commit_path(&self, job: &JobId, seq: u64) -> PathBuf {
        self.job_folder(job).join("commits").join(format!("{seq:020}.json"))
    }

    /// The newest record of a job.
    pub(super) fn newest(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        let folder = self.job_folder(job).join("commits");
        let Some(seq) = sequence_numbers(&folder)?.into_iter().max() else { return Ok(None) };
        let path = self.commit_path(job, seq);
        let text = fs::read_to_string(&path).map_err(|error| Error::io("read", path.display(), error))?;
        let record = LoadRecord::from_json(&text).map_err(|error| error.note(path.display().to_string()))?;
        Ok(Some(record))
    }

    /// Commits `record`: gives its file the name of its sequence number. False if another has it.
    pub(super) fn commit_record(&self, job: &JobId, record: &LoadRecord) -> Result<bool> {
        durable::write_new(&self.commit_path(job, record.seq), record.to_json().as_bytes())
    }

    /// The record that has the sequence number `seq`.
    pub(super) fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        match fs::read_to_string(self.commit_path(job, seq)) {
            Ok(text) => LoadRecord::from_json(&text).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", self.commit_path(job, seq).display(), error)),
        }
    }

    /// Makes `current` show the release of `record`. Does nothing if it does already.
    pub(super) fn switch_current(&self, job: &JobId, record: &LoadRecord) -> Result<()> {
        let folder = self.job_folder(job);
        let release = PathBuf::from("releases").join(format!("{:020}", record.seq));
        let current = folder.join("current");
        if fs::read_link(&current).is_ok_and(|target| target == release) {
            return Ok(());
        }
        let full = folder.join(&release);
        for (output, written) in &record.outputs {
            let links = full.join(output);
            durable::make_folder(&links)?;
            for file in &written.files {
                let data = self.root.join(output).join(&file.path);
                let link = links.join(Path::new(&file.path).file_name().unwrap_or_default());
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
        for output in record.outputs.keys() {
            let link = self.root.join(output).join("current");
            let target = PathBuf::from("..")
                .join("_floodmark")
                .join(&job.project)
                .join(&job.job)
                .join("current")
                .join(output);
            if fs::read_link(&link).is_ok_and(|known| known == target) {
                continue;
            }
            switch(&link, &target)?;
        }
        self.drop_old_releases(&folder.join("releases"))
    }

    fn drop_old_releases(&self, releases: &Path) -> Result<()> {
        let mut numbers = sequence_numbers(releases)?;
        numbers.sort_unstable();
        for old in numbers.iter().rev().skip(KEPT_RELEASES) {
            let folder = releases.join(format!("{old:020}"));
            fs::remove_dir_all(&folder).map_err(|error| Error::io("remove", folder.display(), error))?;
        }
        Ok(())
    }

    /// The jobs that published into this folder.
    fn jobs(&self) -> Result<Vec<JobId>> {
        let mut jobs = Vec::new();
        for project in folders(&self.root.join("_floodmark"))? {
            for job in folders(&self.root.join("_floodmark").join(&project))? {
                jobs.push(JobId { project: project.clone(), job });
            }
        }
        Ok(jobs)
    }
}

/// An output that a job published.
pub(super) struct Published(OutputRecord);

impl Published {
    pub(super) fn schema(&self) -> Result<SchemaRef> {
        self.0.schema()
    }

    /// The live files, relative to the root.
    pub(super) fn paths(&self, output: &str) -> Vec<String> {
        self.0.files.iter().map(|file| format!("{output}/{}", file.path)).collect()
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

fn sequence_numbers(folder: &Path) -> Result<Vec<u64>> {
    let names = entries(folder)?;
    Ok(names.iter().filter_map(|name| name.trim_end_matches(".json").parse().ok()).collect())
}

fn folders(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> =
        entries(folder)?.into_iter().filter(|name| folder.join(name).is_dir()).collect();
    names.sort();
    Ok(names)
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let listed = match fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", folder.display(), error)),
    };
    listed
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .map_err(|error| Error::io("list", folder.display(), error))
}
