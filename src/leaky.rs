//! P14: every row is accounted for. A step between the source and the models loses or doubles one row, at any place, and the run is refused.

use std::{path::Path, sync::Arc};

use arrow::{array::RecordBatch, compute::concat_batches, datatypes::SchemaRef};
use async_trait::async_trait;
use datafusion::physical_plan::{SendableRecordBatchStream, stream::RecordBatchStreamAdapter};
use futures::StreamExt;

use crate::{
    connector::{
        Bounds, CatalogTable, Connection, Identity, Marks, RunTime, Snapshot, Source, Target, scan::Scan,
        spec::StreamSpec, tap::Tap,
    },
    error::{ErrorKind, Result},
    mortal::run_with,
    record::run::Outcome,
    run::Opener,
};

/// What happens to one row.
#[derive(Debug, Clone, Copy)]
enum Leak {
    Loses(usize),
    Doubles(usize),
}

/// A system with something faulty before it.
#[derive(Debug)]
struct Leaky(Arc<dyn Connection>, Leak);

#[async_trait]
impl Connection for Leaky {
    async fn ping(&self) -> Result<Identity> {
        self.0.ping().await
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        self.0.discover().await
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        self.0.target()
    }
}

#[async_trait]
impl Source for Leaky {
    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        self.0.source().unwrap().describe(stream).await
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        self.0.source().unwrap().bounds(streams, since, time).await
    }

    async fn snapshot(&self, streams: &[StreamSpec], bounds: &Bounds) -> Result<Snapshot> {
        self.0.source().unwrap().snapshot(streams, bounds).await
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        let (schema, leak) = (Arc::clone(&scan.schema), self.1);
        let mut before = 0;
        let rows = self.0.source().unwrap().scan(snapshot, scan, tap)?.map(move |batch| {
            let batch: RecordBatch = batch?;
            let (start, count) = (before, batch.num_rows());
            before += count;
            let (Leak::Loses(row) | Leak::Doubles(row)) = leak;
            let Some(at) = row.checked_sub(start).filter(|at| *at < count) else { return Ok(batch) };
            let until = if matches!(leak, Leak::Loses(_)) { at } else { at + 1 };
            let from = if matches!(leak, Leak::Loses(_)) { at + 1 } else { at };
            let parts = [batch.slice(0, until), batch.slice(from, count - from)];
            Ok(concat_batches(&batch.schema(), &parts)?)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }
}

const ROWS: usize = 100;

fn ledger() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..ROWS).map(|id| format!("{id},{}\n", id % 7)).collect();
    for (path, text) in [
        ("floodmark.yaml", "project: leaky\n".to_owned()),
        ("connections.yaml", "data: { kind: files, root: data }\nbooks: { kind: sqlite, path: books.db }\n".to_owned()),
        (
            "jobs/load.yaml",
            "job: load\nsources:\n  lines: { connection: data, file: lines.csv, columns: { id: int, kind: int } }\nmodels:\n  kept: sql/kept.sql\nchecks:\n  kept:\n    - { expression: \"kind < 6\", on_fail: quarantine }\ntarget:\n  connection: books\n  outputs:\n    lines: { from: kept, mode: append }\n".to_owned(),
        ),
        ("sql/kept.sql", "SELECT id, kind FROM lines WHERE kind <> 3\n".to_owned()),
        ("data/lines.csv", format!("id,kind\n{lines}")),
    ] {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    folder
}

async fn run(folder: &Path, leak: Option<Leak>) -> (Outcome, Option<ErrorKind>, String) {
    let opener = Opener(Arc::new(move |project, name| {
        let connection = project.connection(name)?;
        Ok(match leak {
            Some(leak) => Arc::new(Leaky(connection, leak)) as Arc<dyn Connection>,
            None => connection,
        })
    }));
    let (record, error) = run_with(folder, None, opener).await.unwrap().remove(0);
    let told = error.as_ref().map(ToString::to_string).unwrap_or_default();
    (record.outcome, error.map(|error| error.kind()), told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_lost_or_doubled_on_its_way_is_missed() {
    for row in 0..ROWS {
        for leak in [Leak::Loses(row), Leak::Doubles(row)] {
            let folder = ledger();
            let (outcome, kind, told) = run(folder.path(), Some(leak)).await;
            assert_eq!((outcome, kind), (Outcome::Failed, Some(ErrorKind::Bug)), "{leak:?}: {told}");
            assert!(told.contains("rows do not add up"), "{leak:?}: {told}");
            let there: bool = rusqlite::Connection::open(folder.path().join("books.db"))
                .unwrap()
                .query_row("SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'lines')", [], |row| {
                    row.get(0)
                })
                .unwrap();
            assert!(!there, "{leak:?}: nothing was published");
        }
    }
    let folder = ledger();
    assert_eq!(run(folder.path(), None).await.0, Outcome::Published);
}
