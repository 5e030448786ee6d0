//! The promise of [`crate::run`], for every place where a run can die.
//!
//! The worked example's first night dies at its nth touch of the world outside, for every n until it survives. A dead
//! process does nothing ever again: it answers no call, removes no file, closes nothing. Then the next night comes, and
//! goes through; and what is published must be what it would be without the death.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::physical_plan::SendableRecordBatchStream;
use tokio_util::sync::CancellationToken;

use crate::{
    connector::{
        Attempt, Bounds, CatalogTable, CommitOutcome, Connection, Current, Identity, Load, Marks, RunTime,
        Snapshot, Source, Staged, Target,
        scan::Scan,
        spec::{Guarantee, OutputSpec, StreamSpec},
        tap::Tap,
    },
    error::{Error, ErrorKind, Result},
    names::JobId,
    plan::Request,
    project::Project,
    record::{LoadRecord, run::RunRecord},
    run::{Conductor, Opener, Progress},
    runtime::SystemClock,
    spool::Scratch,
};

/// How many more touches the process lives for.
#[derive(Debug)]
struct Life(AtomicU32);

impl Life {
    fn touch(&self) -> Result<()> {
        self.0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .map(drop)
            .map_err(|_| Error::new(ErrorKind::Failed, "the process is dead"))
    }
}

/// Something outside the process, reached by a process that may die before or after each call.
#[derive(Debug)]
struct Mortal(Arc<dyn Connection>, Arc<Life>);

impl Mortal {
    async fn call<T>(&self, call: impl Future<Output = Result<T>> + Send) -> Result<T> {
        self.1.touch()?;
        let answer = call.await;
        self.1.touch()?;
        answer
    }

    fn inner_source(&self) -> Result<&dyn Source> {
        self.0.source().ok_or_else(|| Error::bug("no source"))
    }

    fn inner_target(&self) -> Result<&dyn Target> {
        self.0.target().ok_or_else(|| Error::bug("no target"))
    }
}

#[async_trait]
impl Connection for Mortal {
    async fn ping(&self) -> Result<Identity> {
        self.call(self.0.ping()).await
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        self.call(self.0.discover()).await
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        Some(self)
    }
}

#[async_trait]
impl Source for Mortal {
    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        self.call(self.inner_source()?.describe(stream)).await
    }

    async fn origin(&self) -> Result<Option<String>> {
        self.call(self.inner_source()?.origin()).await
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        self.call(self.inner_source()?.bounds(streams, since, time)).await
    }

    async fn snapshot(&self, streams: &[StreamSpec], bounds: &Bounds) -> Result<Snapshot> {
        self.call(self.inner_source()?.snapshot(streams, bounds)).await
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        self.1.touch()?;
        self.inner_source()?.scan(snapshot, scan, tap)
    }
}

#[async_trait]
impl Target for Mortal {
    fn guarantee(&self, output: &OutputSpec) -> Guarantee {
        self.0.target().map_or(Guarantee::AtLeastOnce, |target| target.guarantee(output))
    }

    fn has_folders(&self) -> bool {
        self.0.target().is_some_and(Target::has_folders)
    }

    async fn last_record(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        self.call(self.inner_target()?.last_record(job)).await
    }

    async fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        self.call(self.inner_target()?.record_at(job, seq)).await
    }

    async fn current(&self, job: &JobId, output: &str) -> Result<Option<Current>> {
        self.call(self.inner_target()?.current(job, output)).await
    }

    async fn quarantined(&self, job: &JobId) -> Result<SendableRecordBatchStream> {
        self.call(self.inner_target()?.quarantined(job)).await
    }

    async fn sealed(&self, job: &JobId, base: Option<&LoadRecord>) -> Result<Vec<LoadRecord>> {
        self.call(self.inner_target()?.sealed(job, base)).await
    }

    async fn commit_sealed(&self, job: &JobId, record: &LoadRecord) -> CommitOutcome {
        let Ok(target) = self.1.touch().and_then(|()| self.inner_target()) else {
            return CommitOutcome::Rejected(Error::failed("the process is dead"));
        };
        let outcome = target.commit_sealed(job, record).await;
        match self.1.touch() {
            Ok(()) => outcome,
            Err(dead) => CommitOutcome::Unknown(dead),
        }
    }

    async fn begin(
        &self,
        job: &JobId,
        attempt: &Attempt,
        base: Option<&LoadRecord>,
    ) -> Result<Box<dyn Load>> {
        let load = self.call(self.inner_target()?.begin(job, attempt, base)).await?;
        Ok(Box::new(MortalLoad(Some(load), Arc::clone(&self.1))))
    }
}

/// An attempt of a process that may die. What the dead leave is not cleaned up: it is forgotten.
struct MortalLoad(Option<Box<dyn Load>>, Arc<Life>);

impl MortalLoad {
    fn touch(&mut self) -> Result<()> {
        let alive = self.1.touch();
        if alive.is_err() {
            std::mem::forget(self.0.take());
        }
        alive
    }

    fn inner(&mut self) -> Result<&mut Box<dyn Load>> {
        self.0.as_mut().ok_or_else(|| Error::failed("the process is dead"))
    }
}

#[async_trait]
impl Load for MortalLoad {
    async fn stage(&mut self, output: &OutputSpec, rows: SendableRecordBatchStream) -> Result<Staged> {
        self.touch()?;
        let answer = self.inner()?.stage(output, rows).await;
        self.touch()?;
        answer
    }

    async fn quarantine(&mut self, rows: SendableRecordBatchStream) -> Result<u64> {
        self.touch()?;
        let answer = self.inner()?.quarantine(rows).await;
        self.touch()?;
        answer
    }

    async fn commit(mut self: Box<Self>, record: &LoadRecord) -> CommitOutcome {
        if let Err(dead) = self.touch() {
            return CommitOutcome::Rejected(dead);
        }
        let Some(load) = self.0.take() else {
            return CommitOutcome::Rejected(Error::failed("the process is dead"));
        };
        let outcome = load.commit(record).await;
        match self.1.touch() {
            Ok(()) => outcome,
            Err(dead) => CommitOutcome::Unknown(dead),
        }
    }

    async fn discard(mut self: Box<Self>) -> Result<()> {
        self.touch()?;
        match self.0.take() {
            Some(load) => load.discard().await,
            None => Ok(()),
        }
    }
}

impl Drop for MortalLoad {
    fn drop(&mut self) {
        if self.1.0.load(Ordering::SeqCst) == 0 {
            std::mem::forget(self.0.take());
        }
    }
}

/// One night of the example in `folder`, lived for `touches`.
async fn night(folder: &Path, environment: Option<&str>, touches: u32) -> Result<Vec<RunRecord>> {
    let life = Arc::new(Life(AtomicU32::new(touches)));
    let opener = Opener(Arc::new(move |project, name| {
        let connection = project.connection(name)?;
        Ok(Arc::new(Mortal(connection, Arc::clone(&life))) as Arc<dyn Connection>)
    }));
    let done = run_with(folder, environment, opener).await?;
    done.into_iter()
        .map(|(record, error)| match error {
            Some(error) => Err(error),
            None => Ok(record),
        })
        .collect()
}

/// Runs all jobs of a project, with something around its connections.
pub(crate) async fn run_with(
    folder: &Path,
    environment: Option<&str>,
    opener: Opener,
) -> Result<Vec<(RunRecord, Option<Error>)>> {
    let project = Project::load(folder, environment)?;
    let as_of = project.as_of()?.unwrap_or_else(|| crate::runtime::Clock::now(&SystemClock));
    let scratch = Scratch::new(&project.limits)?;
    let conductor = Conductor {
        project,
        clock: Arc::new(SystemClock),
        scratch,
        progress: Progress::default(),
        stop: CancellationToken::new(),
        opener,
        opened: Mutex::default(),
    };
    let jobs: Vec<String> = conductor.project.jobs.keys().cloned().collect();
    let request = Request {
        as_of,
        params: Default::default(),
        full_refresh: false,
        ranges: Vec::new(),
        backfill: None,
        replay: None,
    };
    conductor.run_all(&conductor.waves(&jobs)?, &request).await
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        std::fs::copy(from, to).unwrap();
    }
}

fn example() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for part in ["floodmark.yaml", "connections.yaml", "jobs", "sql", "fixtures"] {
        copy(Path::new(part), &folder.path().join(part));
    }
    folder
}

/// What is published after the second night: the balances by period, and how many rows each output holds.
fn published(nights: &[RunRecord]) -> Vec<(u64, String)> {
    nights
        .iter()
        .flat_map(|night| night.outputs.values())
        .map(|output| {
            (
                output.rows_after,
                format!("{:?}", if output.mode == "replace" { &output.totals[..] } else { &[] }),
            )
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_dies_anywhere_loses_no_row_and_doubles_none() {
    let folder = example();
    night(folder.path(), Some("day1"), u32::MAX).await.unwrap();
    let expected = published(&night(folder.path(), Some("day2"), u32::MAX).await.unwrap());
    assert_eq!(expected.iter().map(|(rows, _)| *rows).collect::<Vec<_>>(), [24, 9]);

    for touches in 0.. {
        let folder = example();
        let died = night(folder.path(), Some("day1"), touches).await.is_err();
        let second = night(folder.path(), Some("day2"), u32::MAX).await;
        let second = second.unwrap_or_else(|error| panic!("after death at touch {touches}: {error}"));
        assert_eq!(published(&second), expected, "after death at touch {touches}");
        if !died {
            assert!(touches > 60, "the example touches the world at least sixty times");
            return;
        }
    }
}

/// Two jobs that append, where a row that comes twice stays: one into files, one into a database.
fn appending() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let job = |name: &str| {
        format!(
            "job: {name}\nsources:\n  lines: {{ connection: erp, table: lines, incremental: {{ cursor: id }} }}\n  more: {{ files: \"in/*.csv\", columns: {{ id: int }} }}\nmodels:\n  all_lines: sql/all_lines.sql\ntarget:\n  connection: {name}\n  outputs:\n    lines: {{ from: all_lines, mode: append }}\n"
        )
    };
    for (path, text) in [
        ("floodmark.yaml", "project: appending\n".to_owned()),
        (
            "connections.yaml",
            "erp: { kind: sqlite, path: erp.db }\nlake: { kind: files, root: lake }\nbooks: { kind: sqlite, path: books.db }\n".to_owned(),
        ),
        ("jobs/lake.yaml", job("lake")),
        ("jobs/books.yaml", job("books")),
        ("sql/all_lines.sql", "SELECT id FROM lines UNION ALL SELECT id FROM more\n".to_owned()),
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    arrive(folder.path(), 0);
    folder
}

/// What comes before night `night`: three rows in the database, and a file of two.
fn arrive(folder: &Path, night: i64) {
    let database = rusqlite::Connection::open(folder.join("erp.db")).unwrap();
    database.execute_batch("CREATE TABLE IF NOT EXISTS lines (id INTEGER PRIMARY KEY)").unwrap();
    for id in night * 10..night * 10 + 3 {
        database.execute("INSERT INTO lines VALUES (?1)", [id]).unwrap();
    }
    std::fs::create_dir_all(folder.join("in")).unwrap();
    let text = format!("id\n{}\n{}\n", night * 10 + 7, night * 10 + 8);
    std::fs::write(folder.join(format!("in/{night}.csv")), text).unwrap();
}

/// The ids that readers of the two targets see, without floodmark.
fn seen(folder: &Path) -> [Vec<i64>; 2] {
    use arrow::{array::AsArray, datatypes::Int64Type};
    let mut files = Vec::new();
    for file in std::fs::read_dir(folder.join("lake/lines/current")).unwrap() {
        let file = std::fs::File::open(file.unwrap().path()).unwrap();
        let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        for batch in reader.build().unwrap() {
            files.extend(batch.unwrap().column(0).as_primitive::<Int64Type>().values());
        }
    }
    let database = rusqlite::Connection::open(folder.join("books.db")).unwrap();
    let mut statement = database.prepare("SELECT id FROM lines").unwrap();
    let mut rows: Vec<i64> = statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    files.sort_unstable();
    rows.sort_unstable();
    [files, rows]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_append_hold_every_row_once_wherever_a_run_dies() {
    let expected = vec![0, 1, 2, 7, 8, 10, 11, 12, 17, 18];
    for touches in 0.. {
        let folder = appending();
        let died = night(folder.path(), None, touches).await.is_err();
        arrive(folder.path(), 1);
        // The job that was hit, and the one that was not.
        for _ in 0..2 {
            let after = night(folder.path(), None, u32::MAX).await;
            after.unwrap_or_else(|error| panic!("after death at touch {touches}: {error}"));
            assert_eq!(seen(folder.path()), [expected.clone(), expected.clone()], "touch {touches}");
        }
        if !died {
            assert!(touches > 30, "two jobs touch the world at least thirty times");
            return;
        }
    }
}
