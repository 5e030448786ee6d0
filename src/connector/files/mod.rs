//! Files, as source and as target: in a folder, or in a bucket ([`bucket`]).
//!
//! In: CSV, JSON lines, JSON arrays and Parquet, one file or many by pattern, with gzip and zstd, each remembered
//! by path, size and content; and the outputs that jobs published here, through their manifests. Out: Parquet by
//! the manifest protocol, in [`target`]. Everything lies beneath one root; no path leaves it.
//!
//! Not done yet: splitting one file over cores.

use std::sync::Arc;

use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem};
use place::{Listed, Place};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{CatalogTable, Connection, Connector, Identity, Source, Target, path_of};
use crate::error::{Error, Result};

pub mod bucket;
mod chunks;
mod csv;
mod durable;
#[cfg(test)]
mod faults;
mod garbage;
mod input;
mod json;
mod manifest;
mod merge;
mod pages;
mod parquet;
mod place;
mod prune;
mod source;
mod target;
#[cfg(test)]
mod tests;

/// The line that [`super::CONNECTORS`] holds.
pub static CONNECTOR: Connector = Connector {
    name: "files",
    summary: "a folder: CSV, JSON and Parquet in; Parquet by manifest out",
    options: || schemars::schema_for!(FilesOptions),
    schemes: &["file"],
    variables: &[],
    credentials: &[],
    from_url: |url| Ok([("root".to_owned(), path_of(url)?.into())].into_iter().collect()),
    open: |options| {
        let parsed: FilesOptions = options.parse()?;
        let root = options.base.join(&parsed.root);
        Ok(Arc::new(Arc::new(FilesConnection {
            name: options.name,
            shown: parsed.root,
            place: Place::Folder(root),
            row_group_rows: parsed.row_group_rows.unwrap_or(ROW_GROUP_ROWS).max(1),
            row_group_bytes: parsed.row_group_bytes.unwrap_or(ROW_GROUP_BYTES).max(1),
        })))
    },
};

/// Rows after which a row group is closed, unless an option says otherwise.
const ROW_GROUP_ROWS: usize = 1 << 18;

/// Encoded bytes after which a row group is closed, unless an option says otherwise.
const ROW_GROUP_BYTES: usize = 48 << 20;

/// Writes rows into one Parquet file, whole or not at all; how many, and its bytes.
///
/// # Errors
///
/// If a type has no place in Parquet, or the disk fails.
pub async fn write_parquet(
    path: &std::path::Path,
    rows: datafusion::physical_plan::SendableRecordBatchStream,
    scratch: &crate::spool::Scratch,
) -> Result<(u64, u64)> {
    let folder = path.parent().map(std::path::Path::to_path_buf).unwrap_or_default();
    let connection = Arc::new(FilesConnection::of_folder("copy", &path.display().to_string(), folder));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let memory = scratch.of_output(&name);
    parquet::write_file(&connection, name, rows, &memory).await
}

/// The reading side of a folder that another connector fills; people know it as `shown`.
pub(super) fn reader(name: &str, shown: &str, folder: std::path::PathBuf) -> Arc<dyn Connection> {
    Arc::new(Arc::new(FilesConnection::of_folder(name, shown, folder)))
}

/// A folder of files.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FilesOptions {
    /// The folder, relative to the project's. As a target it is created.
    root: String,
    /// Rows after which a Parquet row group is closed. Unless set, 262144.
    row_group_rows: Option<usize>,
    /// Encoded bytes after which a Parquet row group is closed. Unless set, 48 MiB.
    row_group_bytes: Option<usize>,
}

/// One folder or bucket.
#[derive(Debug)]
struct FilesConnection {
    name: String,
    /// How people know the place.
    shown: String,
    place: Place,
    row_group_rows: usize,
    row_group_bytes: usize,
}

impl FilesConnection {
    /// Refuses a bucket that cannot fence.
    fn probe(&self) -> Result<()> {
        self.place.probe().map_err(|error| error.within(&format!("connection `{}`", self.name)))
    }

    fn of_folder(name: &str, shown: &str, folder: std::path::PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            shown: shown.to_owned(),
            place: Place::Folder(folder),
            row_group_rows: ROW_GROUP_ROWS,
            row_group_bytes: ROW_GROUP_BYTES,
        }
    }

    /// The place as a store, which no path leaves.
    fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        let root = match &self.place {
            Place::Folder(root) => root,
            Place::Bucket(bucket) => return Ok(bucket.store()),
        };
        if !root.is_dir() {
            let what = if root.exists() { "is no folder" } else { "is not there" };
            return Err(Error::configuration(format!("connection `{}`: `{}` {what}", self.name, self.shown))
                .hint("Mend `root` in connections.yaml, or create the folder."));
        }
        let store = LocalFileSystem::new_with_prefix(root);
        Ok(Arc::new(store.map_err(|error| self.error("open", &self.shown, error))?))
    }

    fn error(&self, doing: &str, path: &str, error: object_store::Error) -> Error {
        let error = match &self.place {
            Place::Folder(_) => Error::failed(format!("cannot {doing} `{path}`")).note(error.to_string()),
            Place::Bucket(bucket) => bucket.error(doing, path, error),
        };
        error.within(&format!("connection `{}`", self.name))
    }

    /// A path within the root, as the store knows it.
    fn path(&self, written: &str) -> Result<object_store::path::Path> {
        let outside = || {
            Error::configuration(format!(
                "connection `{}`: `{written}` is no path within `{}`",
                self.name, self.shown
            ))
            .hint("Paths are relative to the connection's root, and do not leave it.")
        };
        if written.starts_with('/') || written.split('/').any(|part| part == "..") || written.contains('\\') {
            return Err(outside());
        }
        object_store::path::Path::parse(written.trim_start_matches("./")).map_err(|_| outside())
    }

    /// The files that `pattern` matches, in order of their paths.
    async fn matching(&self, pattern: &str) -> Result<Vec<Listed>> {
        let store = self.store()?;
        self.path(&pattern.replace(['*', '?', '[', ']', '{', '}'], "x"))?;
        let glob = globset::GlobBuilder::new(pattern.trim_start_matches("./"))
            .literal_separator(true)
            .build()
            .map_err(|error| {
                Error::configuration(format!("connection `{}`: `{pattern}` is no pattern", self.name))
                    .note(error.to_string())
            })?;
        let glob = glob.compile_matcher();
        // The folders before the first wildcard need not be searched for.
        let fixed: Vec<&str> =
            pattern.split('/').take_while(|part| !part.contains(['*', '?', '[', '{'])).collect();
        let folders = if fixed.len() == pattern.split('/').count() {
            fixed.get(..fixed.len() - 1).unwrap_or_default()
        } else {
            &fixed
        };
        let prefix = self.path(&folders.join("/"))?;
        let listed: Vec<_> = store
            .list(Some(&prefix))
            .try_collect()
            .await
            .map_err(|error| self.error("list", pattern, error))?;
        let mut files: Vec<Listed> = listed
            .into_iter()
            .map(|object| Listed::of(object, self.place.is_bucket()))
            .filter(|file| glob.is_match(&file.path))
            .collect();
        files.sort();
        Ok(files)
    }

    /// One file.
    async fn one(&self, path: &str) -> Result<Listed> {
        let location = self.path(path)?;
        let here = self.place.folder().map(|root| root.join(path));
        match self.store()?.head(&location).await {
            Ok(object) => Ok(Listed::of(object, self.place.is_bucket())),
            Err(object_store::Error::NotFound { .. }) if here.as_ref().is_some_and(|path| path.is_dir()) => {
                Err(Error::configuration(format!("connection `{}`: `{path}` is a folder", self.name))
                    .hint(format!("Read the files in it: `files: \"{}/*\"`.", path.trim_end_matches('/'))))
            }
            Err(object_store::Error::NotFound { .. }) if here.is_some_and(|path| path.is_symlink()) => {
                Err(Error::configuration(format!(
                    "connection `{}`: `{path}` is a link that leads nowhere",
                    self.name
                ))
                .hint("Mend the link, or read the file itself."))
            }
            Err(object_store::Error::NotFound { .. }) => {
                let error = Error::configuration(format!(
                    "connection `{}`: there is no file `{path}` in `{}`",
                    self.name, self.shown
                ));
                let folder =
                    path.rsplit_once('/').map_or("*".to_owned(), |(folder, _)| format!("{folder}/*"));
                let others = self.matching(&folder).await.unwrap_or_default();
                Err(match crate::error::nearest(path, others.iter().map(|file| file.path.as_str())) {
                    Some(near) => error.hint(format!("Did you mean `{near}`?")),
                    None => error,
                })
            }
            Err(error) => Err(self.error("read", path, error)),
        }
    }
}

#[async_trait]
impl Connection for Arc<FilesConnection> {
    async fn ping(&self) -> Result<Identity> {
        let place = self.shown.clone();
        let root = match &self.place {
            Place::Folder(root) => root,
            Place::Bucket(bucket) => {
                let first = bucket.store().list(None).try_next().await;
                first.map_err(|error| self.error("list", "", error))?;
                return Ok(Identity { product: "bucket".to_owned(), place });
            }
        };
        if !root.exists() {
            return Ok(Identity { product: "folder, to be created".to_owned(), place });
        }
        self.store()?;
        std::fs::read_dir(root).map_err(|error| Error::io("list", &self.shown, error))?;
        Ok(Identity { product: "folder".to_owned(), place })
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        let this = Self::clone(self);
        let published = crate::runtime::blocking(move || this.outputs()).await?;
        let plain = |path: &str| {
            !path.starts_with("_floodmark/")
                && !published.iter().any(|table| path.starts_with(&format!("{}/", table.name)))
        };
        let files = self.matching("**").await?;
        let files: Vec<CatalogTable> = files
            .into_iter()
            .filter(|file| plain(&file.path))
            .map(|file| CatalogTable {
                name: file.path,
                schema: None,
                view: true,
                columns: vec![("bytes".to_owned(), file.size.to_string())],
                key: Vec::new(),
                rows: None,
            })
            .collect();
        Ok(published.into_iter().chain(files).collect())
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        Some(self)
    }
}
