//! What attempts that died left behind: files that no release lists.
//!
//! A file is garbage if no record of any job here lists it, and no seal that may still be committed, and it is older than the grace period,
//! which is longer than any run. A seal that cannot be read, of a newer floodmark say, is an error, and nothing is removed. Old releases stay:
//! their records list what they are made of. Incomplete uploads of parts are not seen by a listing; a bucket has a rule of its own for them.

use std::{collections::HashSet, sync::Arc};

use chrono::{DateTime, Utc};
use futures::TryStreamExt;

use super::{
    FilesConnection,
    manifest::{job_path, written_by},
    place::{PROBES, Place},
    target::QUARANTINE,
};
use crate::{connector::Orphan, error::Result, names::JobId, runtime};

impl FilesConnection {
    /// Files of a job's outputs that no release lists and that were written before `before`.
    pub(super) async fn garbage(
        self: &Arc<Self>,
        job: &JobId,
        outputs: &[String],
        before: DateTime<Utc>,
    ) -> Result<Vec<Orphan>> {
        if self.place.folder().is_some_and(|root| !root.is_dir()) {
            return Ok(Vec::new());
        }
        let mut folders: Vec<String> = outputs.iter().map(|output| format!("{output}/data")).collect();
        folders.push(format!("{}/{QUARANTINE}", job_path(job)));
        folders.push(format!("{}/staged", job_path(job)));
        // What a death left of trying whether a bucket keeps to conditions.
        folders.push(PROBES.to_owned());
        if !self.place.is_bucket() {
            // A record that was being written has a name of its own until it is whole.
            folders.push(format!("{}/commits", job_path(job)));
        }
        let store = self.store()?;
        let mut found = Vec::new();
        for folder in folders {
            let path = self.path(&folder)?;
            let mut listed = store.list(Some(&path));
            while let Some(object) =
                listed.try_next().await.map_err(|error| self.error("list", &folder, error))?
            {
                let path = object.location.to_string();
                let is_record =
                    path.ends_with(".json") && object.location.parts().any(|part| part.as_ref() == "commits");
                if object.last_modified < before && !is_record {
                    found.push(Orphan { path, bytes: object.size, written_at: object.last_modified });
                }
            }
        }
        // The records are read after the files were listed: a release that landed meanwhile lists its own.
        let this = Arc::clone(self);
        let live = runtime::blocking(move || this.listed_by_records()).await?;
        found.retain(|orphan| !live.contains(&orphan.path));
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }

    /// Every file that a record of any job here lists, or a seal of one that is not overtaken; and these seals.
    fn listed_by_records(&self) -> Result<HashSet<String>> {
        let mut live = HashSet::new();
        for job in self.jobs()? {
            // Seals are read before the records: one that is committed meanwhile is seen as the one or as the other.
            let mut sealed = Vec::new();
            for (path, seq) in self.seals(&job)? {
                sealed.extend(self.seal_at(&path)?.map(|seal| (path, seq, seal)));
            }
            let newest = self.newest(&job)?.map_or(0, |record| record.seq);
            for (path, _, seal) in sealed.into_iter().filter(|(_, seq, _)| *seq > newest) {
                live.extend(written_by(&seal, None).into_iter().map(|file| file.path));
                live.insert(path);
            }
            for seq in 1..=newest {
                let Some(record) = self.committed(&job, seq)? else { continue };
                for (output, written) in &record.outputs {
                    live.extend(written.files.iter().map(|file| format!("{output}/{}", file.path)));
                }
                live.extend(record.quarantine_files);
            }
        }
        Ok(live)
    }

    /// Removes files, and says so of those that could not be.
    pub(super) async fn discard(&self, orphans: &[Orphan]) -> Result<()> {
        let store = self.store()?;
        for orphan in orphans {
            match object_store::ObjectStoreExt::delete(&store, &self.path(&orphan.path)?).await {
                Err(object_store::Error::NotFound { .. }) | Ok(()) => {}
                Err(error) => return Err(self.error("remove", &orphan.path, error)),
            }
        }
        if let Place::Folder(root) = &self.place {
            for folder in
                orphans.iter().filter_map(|orphan| root.join(&orphan.path).parent().map(ToOwned::to_owned))
            {
                // A folder of `partition_by` that holds nothing any more; one that holds something stays.
                drop(std::fs::remove_dir(folder));
            }
        }
        Ok(())
    }
}
