//! The local store: run history and what was last seen of each target. A cache, never the truth.
//!
//! It lies in `.floodmark/state.db`. If it is lost or damaged nothing is: the next run makes a new one, and the target says how
//! far each source was read. What it alone can tell is that a target is not the one of last time.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection as Sqlite, OptionalExtension};
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    names::JobId,
    record::{LoadRecord, run::RunRecord},
};

/// What was last seen of a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its incarnation.
    pub incarnation: Uuid,
    /// Its newest release.
    pub seq: u64,
}

/// The local store of a project.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    database: Sqlite,
}

/// How long to wait for another run that writes here: what is only a cache holds nobody up. A write-ahead log would, by a
/// patience of its own.
const PATIENCE: Duration = Duration::from_millis(500);

const TABLES: &str = "
    PRAGMA journal_mode = DELETE; PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS runs (run_id TEXT PRIMARY KEY, job TEXT NOT NULL, started_at TEXT NOT NULL, document TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS targets (job TEXT NOT NULL, target TEXT NOT NULL, incarnation TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (job, target)) WITHOUT ROWID;";

impl Store {
    /// Opens the store of the project in `root`; makes a new one where there is none or a damaged one.
    ///
    /// # Errors
    ///
    /// If the folder cannot be written.
    pub fn open(root: &Path) -> Result<Self> {
        let folder = root.join(".floodmark");
        fs::create_dir_all(folder.join("runs"))
            .map_err(|error| Error::io("make the folder", folder.display(), error))?;
        let path = folder.join("state.db");
        let open = || -> rusqlite::Result<Sqlite> {
            let database = Sqlite::open(&path)?;
            database.busy_timeout(PATIENCE)?;
            database.execute_batch(TABLES)?;
            Ok(database)
        };
        let database = match open() {
            Err(error)
                if matches!(
                    error.sqlite_error_code(),
                    Some(rusqlite::ffi::ErrorCode::NotADatabase | rusqlite::ffi::ErrorCode::DatabaseCorrupt)
                ) =>
            {
                for ending in ["", "-wal", "-shm"] {
                    drop(fs::rename(
                        format!("{}{ending}", path.display()),
                        format!("{}{ending}.damaged", path.display()),
                    ));
                }
                open()
            }
            other => other,
        };
        let database = database.map_err(|error| failed(&error))?;
        Ok(Self { folder, database })
    }

    /// Keeps what a run came to, here and as a document under `runs/`.
    ///
    /// # Errors
    ///
    /// If it cannot be written; the run is what it is all the same.
    pub fn keep_run(&self, run: &RunRecord) -> Result<()> {
        let document = serde_json::to_string_pretty(run).unwrap_or_default();
        let path = self.folder.join("runs").join(format!("{}.json", run.run_id));
        fs::write(&path, &document).map_err(|error| Error::io("write", path.display(), error))?;
        self.database
            .execute(
                "INSERT OR REPLACE INTO runs VALUES (?1, ?2, ?3, ?4)",
                rusqlite::params![run.run_id.to_string(), run.job, run.started_at, document],
            )
            .map(drop)
            .map_err(|error| failed(&error))
    }

    /// The newest runs, newest first.
    ///
    /// # Errors
    ///
    /// If the store cannot be read.
    pub fn runs(&self, limit: u32) -> Result<Vec<RunRecord>> {
        let mut statement = self
            .database
            .prepare("SELECT document FROM runs ORDER BY started_at DESC, run_id DESC LIMIT ?1")
            .map_err(|error| failed(&error))?;
        let documents: Vec<String> = statement
            .query_map([limit], |row| row.get(0))
            .and_then(Iterator::collect)
            .map_err(|error| failed(&error))?;
        Ok(documents.iter().filter_map(|document| serde_json::from_str(document).ok()).collect())
    }

    /// What was last seen of the job's target: its incarnation, and its newest release.
    ///
    /// # Errors
    ///
    /// If the store cannot be read.
    pub fn last_seen(&self, job: &JobId, target: &str) -> Result<Option<Seen>> {
        let known: Option<(String, String)> = self
            .database
            .query_row(
                "SELECT incarnation, record FROM targets WHERE job = ?1 AND target = ?2",
                [&job.to_string(), target],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()
            .map_err(|error| failed(&error))?;
        Ok(known.and_then(|(incarnation, record)| {
            let seq = LoadRecord::from_json(&record).map_or(0, |record| record.seq);
            Some(Seen { incarnation: incarnation.parse().ok()?, seq })
        }))
    }

    /// Remembers what the target said.
    ///
    /// # Errors
    ///
    /// If the store cannot be written.
    pub fn remember(&self, job: &JobId, target: &str, record: &LoadRecord) -> Result<()> {
        self.database
            .execute(
                "INSERT OR REPLACE INTO targets VALUES (?1, ?2, ?3, ?4)",
                rusqlite::params![job.to_string(), target, record.incarnation.to_string(), record.to_json()],
            )
            .map(drop)
            .map_err(|error| failed(&error))
    }
}

fn failed(error: &rusqlite::Error) -> Error {
    Error::failed("cannot use the local store `.floodmark/state.db`")
        .note(error.to_string())
        .hint("It is only a cache: if it is damaged, delete it.")
}
