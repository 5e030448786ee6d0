//! The real binary, killed: before each of its calls that change the world outside, for every kind of target and every
//! mode. After each death a reader sees what was there before or what is there after, and nothing else; then it is run again.
//!
//! A library before the C library counts the calls and kills (`tests/services/faults.c`). What one death leaves behind is what the next
//! run starts from, as it is in life.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    process::{Command, Output},
    sync::Arc,
};

use arrow::{array::AsArray, datatypes::Int64Type};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, local::LocalFileSystem, path::Path};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::{
    services::{S3, Schema, faults, postgres, s3},
    support::Folder,
};

/// The point after `nth`: of the first `many` all are tried, of the others every fifth; all, with `FLOODMARK_TEST_EXHAUSTIVE` set.
fn next(nth: usize, many: usize) -> usize {
    let all = nth < many || std::env::var_os("FLOODMARK_TEST_EXHAUSTIVE").is_some();
    nth + if all { 1 } else { 5 }
}

const MODES: [(&str, &str); 4] = [
    ("append", "incremental: { cursor: id }"),
    ("merge, key: [id]", ""),
    ("replace", ""),
    ("replace_range, range: [period]", ""),
];

/// Rows as a target holds them: id and amount.
type Rows = BTreeMap<i64, Vec<i64>>;

/// One job, its source and its target.
struct Ledger {
    folder: Folder,
    schema: Option<Schema>,
    store: Option<Arc<dyn ObjectStore>>,
    next: i64,
}

impl Ledger {
    fn new(target: &str, mode: &str, reading: &str) -> Self {
        let schema = (target == "postgres").then(Schema::new);
        let prefix = S3::prefix();
        let connection = match target {
            "files" => "{ kind: files, root: out }".to_owned(),
            "sqlite" => "{ kind: sqlite, path: out.db }".to_owned(),
            "s3" => {
                let mut options = s3().options(&prefix);
                options["kind"] = "s3".into();
                options["secret_access_key"] = "${env:STORE_SECRET}".into();
                options.to_string()
            }
            _ => format!(
                "{{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslrootcert: {}, schema: {} }}",
                postgres().port,
                postgres().authority,
                schema.as_ref().unwrap().name
            ),
        };
        let job = format!(
            "job: load\nsources:\n  lines: {{ connection: erp, table: lines, {reading} }}\ntarget:\n  connection: dw\n  outputs:\n    lines: {{ from: lines, mode: {mode} }}\n"
        );
        let folder = Folder::with(&[
            ("connections.yaml", &format!("erp: {{ kind: sqlite, path: erp.db }}\ndw: {connection}\n")),
            ("jobs/load.yaml", &job),
        ]);
        let store: Option<Arc<dyn ObjectStore>> = match target {
            "files" => {
                fs::create_dir_all(folder.path().join("out")).unwrap();
                Some(Arc::new(LocalFileSystem::new_with_prefix(folder.path().join("out")).unwrap()))
            }
            "s3" => Some(s3().store(&prefix)),
            _ => None,
        };
        let this = Self { folder, schema, store, next: 0 };
        this.source("CREATE TABLE lines (id INTEGER PRIMARY KEY, period TEXT, amount INTEGER)");
        this
    }

    fn source(&self, sql: &str) {
        rusqlite::Connection::open(self.folder.path().join("erp.db")).unwrap().execute_batch(sql).unwrap();
    }

    /// Something new in the source: a row, and where the job reads everything also changes.
    fn arrive(&mut self, appends: bool) -> Rows {
        self.next += 1;
        let id = self.next;
        self.source(&format!("INSERT INTO lines VALUES ({id}, 'p{}', {id})", id % 3));
        if !appends {
            self.source("UPDATE lines SET amount = amount + 100 WHERE id % 2 = 0");
        }
        let database = rusqlite::Connection::open(self.folder.path().join("erp.db")).unwrap();
        let mut statement = database.prepare("SELECT id, amount FROM lines").unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, vec![row.get(1)?]))).unwrap();
        rows.map(Result::unwrap).collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.folder.command(arguments);
        command.env("ERP_PASSWORD", password()).env("STORE_SECRET", secret());
        command
    }

    /// Runs with a fault at its `nth` call to the outside.
    fn run_with(&self, fault: &str, nth: usize) -> Output {
        let mut command = self.command(&["run"]);
        command.env("LD_PRELOAD", faults()).env("FAULT", fault).env("FAULT_AT", nth.to_string());
        command.env("FAULT_MARK", self.folder.path().join("mark")).output().unwrap()
    }

    /// Runs on a disk that is full from the `nth` call on; `None` if it is not called so often. The exit code, and what was told.
    fn is_full_at(&self, nth: usize) -> Option<(i32, String)> {
        let mark = self.folder.path().join("mark");
        drop(fs::remove_file(&mark));
        let output = self.run_with("full", nth);
        mark.exists()
            .then(|| (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Runs, to be killed before its `nth` call to the outside. Whether it was.
    fn is_killed_at(&self, nth: usize) -> bool {
        let output = self.run_with("kill", nth);
        let killed = output.status.signal() == Some(9);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(killed || output.status.success(), "{nth}: {:?} {told}", output.status);
        killed
    }

    fn run(&self) -> Value {
        let output = self.command(&["run", "--output", "json"]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a reader sees that knows nothing of floodmark but where it says its releases are; and how many there are.
    fn seen(&self) -> (Rows, u64) {
        let mut rows = Rows::new();
        let mut add = |id: i64, amount: i64| rows.entry(id).or_default().push(amount);
        let numbers: Vec<i64> = if let Some(store) = &self.store {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let commits = Path::from("_floodmark/small/load/commits");
                let listed: Vec<_> = store.list(Some(&commits)).try_collect().await.unwrap();
                let mut names: Vec<Path> = listed.into_iter().map(|object| object.location).collect();
                names.retain(|name| name.extension() == Some("json"));
                names.sort();
                if let Some(last) = names.last() {
                    let bytes = store.get(last).await.unwrap().bytes().await.unwrap();
                    let record: Value = serde_json::from_slice(&bytes).unwrap();
                    for file in record["outputs"]["lines"]["files"].as_array().into_iter().flatten() {
                        let path = Path::from(format!("lines/{}", file["path"].as_str().unwrap()));
                        let bytes = store.get(&path).await.unwrap().bytes().await.unwrap();
                        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes).unwrap().build().unwrap()
                        {
                            let batch = batch.unwrap();
                            let column = |name| {
                                batch.column_by_name(name).unwrap().as_primitive::<Int64Type>().clone()
                            };
                            let (ids, amounts) = (column("id"), column("amount"));
                            (0..batch.num_rows()).for_each(|row| add(ids.value(row), amounts.value(row)));
                        }
                    }
                }
                names
                    .iter()
                    .map(|name| name.filename().unwrap().trim_end_matches(".json").parse().unwrap())
                    .collect()
            })
        } else if let Some(schema) = &self.schema {
            schema.with(|client| {
                let is_there =
                    "SELECT to_regclass('lines') IS NOT NULL AND to_regclass('floodmark_log') IS NOT NULL";
                if !client.query_one(is_there, &[]).unwrap().get::<_, bool>(0) {
                    return Vec::new();
                }
                // Both from one snapshot.
                let mut transaction = client
                    .build_transaction()
                    .isolation_level(::postgres::IsolationLevel::RepeatableRead)
                    .start()
                    .unwrap();
                for row in transaction.query("SELECT id, amount FROM lines", &[]).unwrap() {
                    add(row.get(0), row.get(1));
                }
                let log = transaction.query("SELECT seq FROM floodmark_log ORDER BY seq", &[]).unwrap();
                log.iter().map(|row| row.get(0)).collect()
            })
        } else {
            let database = rusqlite::Connection::open(self.folder.path().join("out.db")).unwrap();
            let is_there: i64 = database
                .query_row(
                    "SELECT count(*) FROM sqlite_master WHERE name IN ('lines', 'floodmark_log')",
                    [],
                    |row| row.get(0),
                )
                .unwrap();
            if is_there < 2 {
                return (rows, 0);
            }
            let mut statement = database.prepare("SELECT id, amount FROM lines").unwrap();
            let found = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
            found.map(Result::unwrap).for_each(|(id, amount)| add(id, amount));
            let mut statement = database.prepare("SELECT seq FROM floodmark_log ORDER BY seq").unwrap();
            statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
        };
        let count = numbers.len() as u64;
        assert!(numbers.iter().copied().eq((1..).take(numbers.len())), "one record a release: {numbers:?}");
        (rows, count)
    }
}

fn password() -> &'static str {
    &postgres().password
}

fn secret() -> &'static str {
    &s3().admin.1
}

/// A target that faults come upon: what it holds, what it should hold after the next release, and how many there were.
struct Tried {
    ledger: Ledger,
    target: &'static str,
    mode: &'static str,
    before: Rows,
    after: Rows,
    releases: u64,
}

impl Tried {
    /// One for each mode.
    fn modes(target: &'static str) -> impl Iterator<Item = Self> {
        MODES.into_iter().map(move |(mode, reading)| {
            let mut ledger = Ledger::new(target, mode, reading);
            let after = ledger.arrive(mode == "append");
            Self { ledger, target, mode, before: Rows::new(), after, releases: 0 }
        })
    }

    /// Whether the release landed in spite of the fault at `nth`. The target holds what was there before or what is there after.
    fn landed(&mut self, nth: usize) -> bool {
        let (rows, count) = self.ledger.seen();
        let landed = count > self.releases;
        let expected = if landed { &self.after } else { &self.before };
        assert_eq!(&rows, expected, "{}, {}: a fault at {nth}, release {count}", self.target, self.mode);
        assert!(count <= self.releases + 1, "{}, {}, {nth}: release {count}", self.target, self.mode);
        landed
    }

    /// Runs again without a fault, to the end; then something new comes. How that run went.
    fn goes_on(&mut self, nth: usize) -> Value {
        let run = self.ledger.run();
        let (rows, count) = self.ledger.seen();
        assert_eq!(rows, self.after, "{}, {}: run again after {nth}", self.target, self.mode);
        (self.before, self.releases) = (rows, count);
        self.after = self.ledger.arrive(self.mode == "append");
        run
    }
}

/// Kills runs into one kind of target, in all modes.
fn killed_everywhere(target: &'static str) {
    let mut points = 0;
    for mut tried in Tried::modes(target) {
        let mode = tried.mode;
        let mut nth = 1;
        while {
            let killed = tried.ledger.is_killed_at(nth);
            let landed = tried.landed(nth);
            assert!(killed || landed, "{target}, {mode}, {nth}");
            if landed {
                // What has landed is not loaded again; ranges are, and hold the same.
                let repeats = mode.starts_with("replace_range");
                assert_eq!(tried.goes_on(nth)["outcome"] == "published", repeats, "{target}, {mode}, {nth}");
            }
            points += usize::from(killed);
            killed
        } {
            nth = next(nth, 40);
        }
        assert_eq!(tried.ledger.run()["outcome"], "published");
        assert_eq!(tried.ledger.seen(), (tried.after, tried.releases + 1), "{target}, {mode}: the last run");
    }
    println!("{target}: killed at {points} points");
    assert!(points >= 100, "{target}: killed at {points} points only");
}

#[test]
fn a_run_into_files_that_is_killed_anywhere_is_all_or_nothing() {
    killed_everywhere("files");
}

#[test]
fn a_run_into_sqlite_that_is_killed_anywhere_is_all_or_nothing() {
    killed_everywhere("sqlite");
}

#[test]
fn a_run_into_postgres_that_is_killed_anywhere_is_all_or_nothing() {
    killed_everywhere("postgres");
}

#[test]
fn a_run_into_a_bucket_that_is_killed_anywhere_is_all_or_nothing() {
    killed_everywhere("s3");
}

/// The disk is full at any write: the run says so and leaves what was there; when there is room again, it goes through.
fn full_everywhere(target: &'static str) {
    let mut points = 0;
    for mut tried in Tried::modes(target) {
        let mode = tried.mode;
        let mut nth = 1;
        while let Some((code, told)) = tried.ledger.is_full_at(nth) {
            points += 1;
            let landed = tried.landed(nth);
            // What comes after the commit is a cache, and a warning.
            assert_eq!(code == 0, landed, "{target}, {mode}, {nth}: {told}");
            if !landed {
                assert!(
                    [1, 75].contains(&code) && told.contains("error"),
                    "{target}, {mode}, {nth}: {code} {told}"
                );
                let why =
                    ["No space left", "disk is full", "disk I/O error"].iter().any(|why| told.contains(why));
                assert!(why, "{target}, {mode}, {nth}: {told}");
            }
            if landed || nth % 5 == 0 {
                let outcome = tried.goes_on(nth)["outcome"].clone();
                assert!(landed || outcome == "published", "{target}, {mode}, {nth}: {outcome}");
            }
            nth = next(nth, 10);
        }
    }
    println!("{target}: full at {points} points");
    assert!(points >= 40, "{target}: full at {points} points only");
}

#[test]
fn a_disk_that_is_full_at_any_write_of_files_is_a_clean_error() {
    full_everywhere("files");
}

#[test]
fn a_disk_that_is_full_at_any_write_of_sqlite_is_a_clean_error() {
    full_everywhere("sqlite");
}

/// P6: the local store is a cache. Gone, cut, flipped or old, it changes nothing: the target decides.
fn forgetful(target: &str) {
    let mut ledger = Ledger::new(target, "append", "incremental: { cursor: id }");
    let folder = ledger.folder.path().join(".floodmark");
    ledger.arrive(true);
    ledger.run();
    let old = fs::read(folder.join("state.db")).unwrap();
    let mut go_on = |what: &str, damaged: Option<&[u8]>| {
        for leftover in ["state.db-wal", "state.db-shm", "state.db-journal"] {
            drop(fs::remove_file(folder.join(leftover)));
        }
        match damaged {
            Some(bytes) => fs::write(folder.join("state.db"), bytes).unwrap(),
            None => fs::remove_dir_all(&folder).unwrap(),
        }
        let expected = ledger.arrive(true);
        assert_eq!(ledger.run()["outcome"], "published", "{target}: {what}");
        assert_eq!(ledger.seen().0, expected, "{target}: {what}");
        fs::read(folder.join("state.db")).unwrap_or_default()
    };
    let mut whole = go_on("as it is", Some(&old));
    for parts in 0..4 {
        let cut = whole.len() * parts / 4;
        let after = go_on(&format!("cut to {cut} bytes"), whole.get(..cut));
        whole = if after.is_empty() { whole } else { after };
    }
    for sample in 0..64 {
        let at = whole.len() * sample / 64;
        let mut flipped = whole.clone();
        flipped[at] ^= 0xff;
        go_on(&format!("byte {at} flipped"), Some(&flipped));
    }
    go_on("an old copy", Some(&old));
    go_on("gone", None);
}

#[test]
fn what_this_machine_remembers_decides_nothing() {
    forgetful("files");
    forgetful("sqlite");
}
