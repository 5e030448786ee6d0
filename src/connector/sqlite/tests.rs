//! The connector's promises, and what only SQLite has: columns that declare nothing, and values that do not fit.

use std::{path::PathBuf, sync::Arc};

use arrow::{array::AsArray, datatypes::Int64Type};
use rusqlite::params;
use serde_json::json;

use crate::{
    connector::{
        CommitOutcome, Connection, Connector, Options,
        contract::{self, Release, Row, World, made_at, orders},
        spec::{CursorSpec, Mode, OnNull, Read, StreamSpec},
        tap::Tap,
    },
    types::describe,
};

fn open(path: &std::path::Path) -> Arc<dyn Connection> {
    let options = Options {
        name: "books".to_owned(),
        base: PathBuf::new(),
        values: json!({ "path": path }),
        spill: std::env::temp_dir(),
    };
    (Connector::named("sqlite").unwrap().open)(options).unwrap()
}

/// A table that grows while it is read, as a ledger does: in WAL mode readers do not stop writers.
struct Ledger {
    folder: tempfile::TempDir,
    name: &'static str,
    read: Read,
    cursor: &'static [&'static str],
}

impl Ledger {
    fn new(name: &'static str, read: Read, cursor: &'static [&'static str]) -> Self {
        let ledger = Self { folder: tempfile::tempdir().unwrap(), name, read, cursor };
        ledger.database().execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE orders (id INTEGER, amount TEXT, note TEXT, made_at TEXT);").unwrap();
        ledger
    }

    fn database(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.path()).unwrap()
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("ledger.db")
    }
}

impl World for Ledger {
    fn name(&self) -> &'static str {
        self.name
    }

    fn connection(&self) -> Arc<dyn Connection> {
        open(&self.path())
    }

    fn stream(&self) -> StreamSpec {
        let mut stream = orders(self.read.clone());
        stream.timezone = Some("UTC".to_owned());
        let columns = self.cursor.iter().map(|&column| column.to_owned()).collect();
        stream.cursor = Some(CursorSpec { columns, overlap: None, on_null: OnNull::Error });
        if self.cursor.contains(&"made_at") {
            stream.columns.insert("made_at".to_owned(), "timestamptz".to_owned());
        }
        stream
    }

    fn add(&self, rows: &[Row]) {
        let mut database = self.database();
        let all = database.transaction().unwrap();
        for row in rows {
            let made = made_at(row.id).to_rfc3339();
            all.execute(
                "INSERT INTO orders VALUES (?1, ?2, ?3, ?4)",
                params![row.id, row.amount, row.note, made],
            )
            .unwrap();
        }
        all.commit().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_keeps_its_promises() {
    let all = "SELECT id, amount, note FROM orders";
    contract::source(|| Box::new(Ledger::new("a query by id", by_query(all), &["id"]))).await;
    let zoned = "SELECT id, amount, note, made_at FROM orders";
    for cursor in [&["made_at"][..], &["made_at", "id"]] {
        contract::source(|| Box::new(Ledger::new("a query by time", by_query(zoned), cursor))).await;
    }
}

#[test]
fn a_target_keeps_its_promises() {
    contract::target("SQLite", || {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("target.db");
        (folder, move || open(&path))
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_without_a_cursor_is_refused_read_again_or_left_out_and_counted() {
    let ledger = Ledger::new("nulls", Read::Table("orders".to_owned()), &["id"]);
    let made = made_at(0).to_rfc3339();
    for id in [Some(1), None, Some(2)] {
        ledger
            .database()
            .execute("INSERT INTO orders VALUES (?1, '1.00', 'n', ?2)", params![id, made])
            .unwrap();
    }
    for (on_null, expected) in [
        (OnNull::Error, None),
        (OnNull::Include, Some((vec![Some(1), None, Some(2)], 0))),
        (OnNull::Exclude, Some((vec![Some(1), Some(2)], 1))),
    ] {
        let mut stream = ledger.stream();
        stream.cursor.as_mut().unwrap().on_null = on_null;
        let tap = Arc::new(Tap::default());
        match (contract::read_all(&ledger, stream, &tap).await, expected) {
            (Ok(batches), Some((ids, filtered))) => {
                let read: Vec<Option<i64>> = batches
                    .iter()
                    .flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().iter().collect::<Vec<_>>())
                    .collect();
                assert_eq!((read, tap.filtered_rows(), tap.extracted()), (ids, filtered, 3), "{on_null:?}");
            }
            (Err(error), None) => assert!(error.to_string().contains("the cursor is null"), "{error}"),
            (outcome, _) => panic!("{on_null:?}: {outcome:?}"),
        }
    }
}

#[tokio::test]
async fn a_column_is_what_it_declares_and_without_a_declaration_what_all_of_its_values_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("types.db");
    rusqlite::Connection::open(&path)
        .unwrap()
        .execute_batch(
            "CREATE TABLE t (a INTEGER, b VARCHAR(9), c DECIMAL(12,3), d NUMERIC, e REAL, f DATE, g TIMESTAMP,
                 h BOOLEAN, i BLOB, j, k, l, m);
             INSERT INTO t VALUES (1, 'x', '1.5', 1, 1.5, '2026-01-01', '2026-01-01 00:00:00', 1, x'00', 1, 1.5, 1, NULL);
             INSERT INTO t VALUES (1, 'x', '1.5', 1, 1.5, '2026-01-01', '2026-01-01 00:00:00', 1, x'00', 2, 2.5, 'x', NULL);",
        )
        .unwrap();
    let stream = StreamSpec { columns: indexmap::IndexMap::new(), ..orders(Read::Table("t".to_owned())) };
    let connection = open(&path);
    let schema = connection.source().unwrap().describe(&stream).await.unwrap();
    let types: Vec<String> = schema
        .fields()
        .iter()
        .map(|field| format!("{} {}", field.name(), describe(field.data_type())))
        .collect();
    assert_eq!(
        types,
        [
            "a int",
            "b string",
            "c decimal(12,3)",
            "d string",
            "e float",
            "f date",
            "g timestamp",
            "h bool",
            "i binary",
            "j int",
            "k float",
            "l string",
            "m string"
        ]
    );
}

fn by_query(sql: &str) -> Read {
    Read::Query { file: "sql/all.sql".to_owned(), sql: sql.to_owned() }
}

/// P26: the table is altered between staging and commit: that is seen inside the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_altered_behind_its_staging_is_seen_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("books.db");
    let (connection, output) = (open(&path), contract::output(Mode::Append));
    let rows = [(1, "a".to_owned(), 1)];
    let mut release = Release::of(connection.as_ref(), contract::job(), None, 1).await.unwrap();
    let staged = release.load.stage(&output, contract::stream(&rows)).await.unwrap();
    let record = release.record(&staged, output.mode);
    assert!(matches!(release.load.commit(&record).await, CommitOutcome::Committed(_)));
    let database = rusqlite::Connection::open(&path).unwrap();
    let column: String = database
        .query_row("SELECT name FROM pragma_table_info('lines') WHERE cid = 1", [], |row| row.get(0))
        .unwrap();
    for alter in [
        format!("ALTER TABLE lines RENAME COLUMN {column} TO other"),
        "ALTER TABLE lines ADD COLUMN more TEXT".to_owned(),
        "ALTER TABLE lines DROP COLUMN more".to_owned(),
        format!("ALTER TABLE lines RENAME COLUMN other TO {column}"),
    ] {
        let Ok(mut release) = Release::of(connection.as_ref(), contract::job(), None, 1).await else {
            panic!()
        };
        // What others did before the staging is the contract's business.
        let Ok(staged) = release.load.stage(&output, contract::stream(&rows)).await else {
            database.execute_batch(&alter).unwrap();
            continue;
        };
        let record = release.record(&staged, output.mode);
        database.execute_batch(&alter).unwrap();
        let outcome = release.load.commit(&record).await;
        let CommitOutcome::Rejected(error) = outcome else { panic!("{alter}: {outcome:?}") };
        assert!(error.to_string().contains("were changed by somebody else"), "{alter}: {error}");
        let count: i64 = database.query_row("SELECT count(*) FROM lines", [], |row| row.get(0)).unwrap();
        assert_eq!(count, 1, "{alter}");
    }
}
