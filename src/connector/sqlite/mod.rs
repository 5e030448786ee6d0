//! SQLite: a database in a file, as source and as target.
//!
//! Promised: windows whose end no writer can slip under, one view for all streams of a run, every value's storage
//! class checked, and rows and record in one transaction. Not done: attaching other databases, virtual tables
//! as targets, pushing a model's filters down.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use rusqlite::{Connection as Sqlite, OpenFlags};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{CatalogTable, Connection, Connector, Identity, Source, Target, path_of};
use crate::{
    error::{Error, ErrorKind, Result},
    runtime,
};

mod source;
mod target;
#[cfg(test)]
mod tests;
mod types;

/// The line that [`super::CONNECTORS`] holds.
pub static CONNECTOR: Connector = Connector {
    name: "sqlite",
    summary: "a SQLite database: tables, views and queries in; tables out",
    options: || schemars::schema_for!(SqliteOptions),
    schemes: &["sqlite"],
    variables: &[],
    credentials: &[],
    from_url: |url| Ok([("path".to_owned(), path_of(url)?.into())].into_iter().collect()),
    open: |options| {
        let parsed: SqliteOptions = options.parse()?;
        let path = options.base.join(&parsed.path);
        let connection = SqliteConnection {
            name: options.name,
            shown: parsed.path,
            path,
            busy_ms: parsed.busy_timeout_ms,
        };
        Ok(Arc::new(Arc::new(connection)))
    },
};

/// A SQLite database.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SqliteOptions {
    /// The file, relative to the project's folder. A target that is not there is created.
    path: String,
    /// How long to wait for another writer, in milliseconds. Unless set, 5000.
    #[serde(default = "five_seconds")]
    busy_timeout_ms: u64,
}

fn five_seconds() -> u64 {
    5000
}

/// One database file.
#[derive(Debug)]
struct SqliteConnection {
    name: String,
    shown: String,
    path: PathBuf,
    busy_ms: u64,
}

impl SqliteConnection {
    fn no_file(&self) -> Error {
        let what = if self.path.is_dir() {
            "is a folder, and no database"
        } else if self.path.exists() {
            "is no file"
        } else {
            "is not there"
        };
        Error::configuration(format!("connection `{}`: `{}` {what}", self.name, self.shown))
            .hint("Mend `path` in connections.yaml, or create the database.")
    }

    /// Opens the file for reading, or says that it is not there.
    fn open_to_read(&self) -> Result<Sqlite> {
        if !self.path.is_file() {
            return Err(self.no_file());
        }
        // Read and write, because fixing a bound takes the write lock for an instant; nothing is written.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let database = Sqlite::open_with_flags(&self.path, flags)
            .or_else(|_| Sqlite::open_with_flags(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY))
            .map_err(|error| self.error("open", &error))?;
        self.prepare(database)
    }

    /// Opens the file for writing; creates it, and its folder, where they are missing.
    fn open_to_write(&self) -> Result<Sqlite> {
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| Error::io("make the folder", folder.display(), error))?;
        }
        let database = Sqlite::open(&self.path).map_err(|error| self.error("open", &error))?;
        let database = self.prepare(database)?;
        database.pragma_update(None, "synchronous", "FULL").map_err(|error| self.error("set up", &error))?;
        Ok(database)
    }

    fn prepare(&self, database: Sqlite) -> Result<Sqlite> {
        database
            .busy_timeout(Duration::from_millis(self.busy_ms))
            .map_err(|error| self.error("set up", &error))?;
        Ok(database)
    }

    /// An error of SQLite as one for people: busy and full have their own words.
    fn error(&self, doing: &str, error: &rusqlite::Error) -> Error {
        use rusqlite::ffi::ErrorCode;
        let this = |kind| {
            Error::new(kind, format!("connection `{}`: cannot {doing} `{}`", self.name, self.shown))
                .note(error.to_string())
        };
        match error.sqlite_error_code() {
            Some(
                ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed,
            ) => this(ErrorKind::Temporary)
                .hint("Another process holds the database. Run again later, or raise `busy_timeout_ms`."),
            Some(ErrorCode::DiskFull) => {
                this(ErrorKind::Failed).hint("Make room on that disk and run again: nothing was published.")
            }
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                this(ErrorKind::Failed).hint("This file is no SQLite database, or is damaged.")
            }
            _ => this(ErrorKind::Failed),
        }
    }
}

#[async_trait]
impl Connection for Arc<SqliteConnection> {
    async fn ping(&self) -> Result<Identity> {
        let this = Self::clone(self);
        runtime::blocking(move || {
            let product = format!("SQLite {}", rusqlite::version());
            let there = this.path.is_file();
            if there {
                let database = this.open_to_read()?;
                database
                    .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))
                    .map_err(|error| this.error("read", &error))?;
            } else if this.path.exists() {
                return Err(this.no_file());
            } else {
                let folder = this.path.parent().filter(|folder| !folder.as_os_str().is_empty());
                if let Some(folder) = folder.filter(|folder| folder.exists() && !folder.is_dir()) {
                    return Err(Error::configuration(format!("`{}` is no folder", folder.display()))
                        .hint("Mend `path` in connections.yaml."));
                }
            }
            let product = if there { product } else { format!("{product}, to be created") };
            Ok(Identity { product, place: this.shown.clone() })
        })
        .await
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        let this = Self::clone(self);
        runtime::blocking(move || source::discover(&this)).await
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        Some(self)
    }
}
