//! One job that brings rows from a database into one kind of target, and a reader of that target who knows nothing of floodmark: what
//! tests do their worst to.

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
use parquet::{arrow::arrow_reader::ParquetRecordBatchReaderBuilder, file::reader::ChunkReader};
use serde_json::Value;

use crate::{
    services::{Postgres, S3, Schema, faults, postgres, s3},
    support::Folder,
};

/// The point after `nth` where not all are tried: of the first `many` all are tried, of the others every fifth, each mode others than the last one; all, with
/// `FLOODMARK_TEST_EXHAUSTIVE` set.
pub(crate) fn next(nth: usize, many: usize, mode: &str) -> usize {
    if nth < many || std::env::var_os("FLOODMARK_TEST_EXHAUSTIVE").is_some() {
        return nth + 1;
    }
    let offset = MODES.iter().position(|(name, _)| *name == mode).unwrap_or_default();
    (nth + 1..).find(|next| next % 5 == offset).unwrap()
}

pub(crate) const MODES: [(&str, &str); 4] = [
    ("append", "incremental: { cursor: id }"),
    ("merge, key: [id]", ""),
    ("replace", ""),
    ("replace_range, range: [period]", ""),
];

/// Rows as a target holds them: id and amount.
pub(crate) type Rows = BTreeMap<i64, Vec<i64>>;

/// Adds the rows of a Parquet file.
fn add_rows(rows: &mut Rows, file: impl ChunkReader + 'static) {
    for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
        let batch = batch.unwrap();
        let column = |name| batch.column_by_name(name).unwrap().as_primitive::<Int64Type>().clone();
        let (ids, amounts) = (column("id"), column("amount"));
        (0..batch.num_rows())
            .for_each(|row| rows.entry(ids.value(row)).or_default().push(amounts.value(row)));
    }
}

/// What a target held.
pub(crate) enum Backup {
    Objects(Vec<(Path, bytes::Bytes)>),
    Tables([&'static str; 3]),
    File(Vec<u8>),
}

/// One job, its source and its target.
pub(crate) struct Ledger {
    pub(crate) folder: Folder,
    pub(crate) schema: Option<Schema>,
    store: Option<Arc<dyn ObjectStore>>,
    next: i64,
}

/// A connection to a prefix of the bucket.
fn to_s3(prefix: &str, endpoint: &str) -> String {
    let mut options = s3().options(prefix);
    options["kind"] = "s3".into();
    options["endpoint"] = endpoint.into();
    options["secret_access_key"] = "${env:STORE_SECRET}".into();
    options.to_string()
}

/// The option that says whom the shared server's certificate is signed by.
pub(crate) fn trusted() -> String {
    format!("sslrootcert: {}", postgres().authority)
}

/// A connection to a PostgreSQL schema.
pub(crate) fn to_postgres(schema: &str, host: &str, port: u16, more: &str) -> String {
    format!(
        "{{ kind: postgres, host: {host}, port: {port}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", schema: {schema}, {more} }}"
    )
}

impl Ledger {
    pub(crate) fn new(target: &str, mode: &str, reading: &str) -> Self {
        let more = if target == "postgres" { trusted() } else { String::new() };
        Self::limited(target, mode, reading, "", &more)
    }

    /// The same under limits of its own; `more` are options of a connection to PostgreSQL or SQLite.
    pub(crate) fn limited(target: &str, mode: &str, reading: &str, limits: &str, more: &str) -> Self {
        let schema = (target == "postgres").then(Schema::new);
        let prefix = S3::prefix();
        let connection = match target {
            "files" => "{ kind: files, root: out }".to_owned(),
            "sqlite" => format!("{{ kind: sqlite, path: out.db, {more} }}"),
            "s3" => to_s3(&prefix, &s3().endpoint),
            _ => to_postgres(&schema.as_ref().unwrap().name, "localhost", postgres().port, more),
        };
        let store: Option<Arc<dyn ObjectStore>> = (target == "s3").then(|| s3().store(&prefix));
        let this = Self::made(&connection, schema, store, mode, reading, limits);
        if target == "files" {
            let root = this.folder.path().join("out");
            fs::create_dir_all(&root).unwrap();
            let store = Some(Arc::new(LocalFileSystem::new_with_prefix(root).unwrap()) as _);
            return Self { store, ..this };
        }
        this
    }

    /// One whose target is reached through `port`, where somebody stands between.
    pub(crate) fn through(port: u16, mode: &str, reading: &str, limits: &str) -> Self {
        let schema = Schema::new();
        let connection = to_postgres(&schema.name, "127.0.0.1", port, "sslmode: disable");
        Self::made(&connection, Some(schema), None, mode, reading, limits)
    }

    /// One whose target is a server of its own; `more` are options of the connection to it.
    pub(crate) fn at(server: &'static Postgres, mode: &str, reading: &str, limits: &str, more: &str) -> Self {
        let schema = Schema::at(server);
        let connection =
            to_postgres(&schema.name, "127.0.0.1", server.port, &format!("sslmode: disable, {more}"));
        Self::made(&connection, Some(schema), None, mode, reading, limits)
    }

    /// One whose target is a bucket that is reached through `port`.
    pub(crate) fn stored_through(port: u16, mode: &str, reading: &str, limits: &str) -> Self {
        let prefix = S3::prefix();
        let connection = to_s3(&prefix, &format!("http://127.0.0.1:{port}"));
        Self::made(&connection, None, Some(s3().store(&prefix)), mode, reading, limits)
    }

    fn made(
        connection: &str,
        schema: Option<Schema>,
        store: Option<Arc<dyn ObjectStore>>,
        mode: &str,
        reading: &str,
        limits: &str,
    ) -> Self {
        let job = format!(
            "job: load\nsources:\n  lines: {{ connection: erp, table: lines, {reading} }}\ntarget:\n  connection: dw\n  outputs:\n    lines: {{ from: lines, mode: {mode} }}\n"
        );
        let folder = Folder::with(&[
            ("floodmark.yaml", &format!("project: small\nlimits: {{ {limits} }}\n")),
            ("connections.yaml", &format!("erp: {{ kind: sqlite, path: erp.db }}\ndw: {connection}\n")),
            ("jobs/load.yaml", &job),
        ]);
        let this = Self { folder, schema, store, next: 0 };
        this.source("CREATE TABLE lines (id INTEGER PRIMARY KEY, period TEXT, amount INTEGER)");
        this
    }

    pub(crate) fn source(&self, sql: &str) {
        rusqlite::Connection::open(self.folder.path().join("erp.db")).unwrap().execute_batch(sql).unwrap();
    }

    /// Something new in the source: a row, and where the job reads everything also changes.
    pub(crate) fn arrive(&mut self, appends: bool) -> Rows {
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

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.folder.command(arguments);
        let server = self.schema.as_ref().map_or_else(postgres, |schema| schema.server);
        command.env("ERP_PASSWORD", &server.password).env("STORE_SECRET", secret());
        command
    }

    /// Runs with a fault at its `nth` call to the outside.
    pub(crate) fn run_with(&self, fault: &str, nth: usize) -> Output {
        let mut command = self.command(&["run"]);
        command.env("LD_PRELOAD", faults()).env("FAULT", fault).env("FAULT_AT", nth.to_string());
        command.env("FAULT_MARK", self.folder.path().join("mark")).output().unwrap()
    }

    /// Runs, and counts its calls to the outside.
    pub(crate) fn counted(&self) -> usize {
        let output = self.run_with("count", usize::MAX >> 1);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read_to_string(self.folder.path().join("mark")).unwrap().parse().unwrap()
    }

    /// Runs on a disk that is full from the `nth` call on; `None` if it is not called so often. The exit code, and what was told.
    pub(crate) fn is_full_at(&self, nth: usize) -> Option<(i32, String)> {
        let mark = self.folder.path().join("mark");
        drop(fs::remove_file(&mark));
        let output = self.run_with("full", nth);
        mark.exists()
            .then(|| (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Runs, to be killed before its `nth` call to the outside. Whether it was.
    pub(crate) fn is_killed_at(&self, nth: usize) -> bool {
        let output = self.run_with("kill", nth);
        let killed = output.status.signal() == Some(9);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(killed || output.status.success(), "{nth}: {:?} {told}", output.status);
        killed
    }

    pub(crate) fn run(&self) -> Value {
        let output = self.command(&["run", "--output", "json"]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        let document = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{}: {told}{document}", output.status);
        serde_json::from_str(&document).unwrap()
    }

    /// Which run made each release.
    pub(crate) fn runs(&self) -> BTreeMap<u64, String> {
        let records: Vec<String> = if self.store.is_some() {
            self.records_in("commits")
        } else if let Some(schema) = &self.schema {
            let sql = "SELECT record_json FROM floodmark_log";
            schema.with(|client| client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect())
        } else {
            let database = rusqlite::Connection::open(self.folder.path().join("out.db")).unwrap();
            let mut statement = database.prepare("SELECT record_json FROM floodmark_log").unwrap();
            statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
        };
        let records = records.iter().map(|record| serde_json::from_str::<Value>(record).unwrap());
        let told = records
            .map(|record| (record["seq"].as_u64().unwrap(), record["run_id"].as_str().unwrap().to_owned()));
        told.collect()
    }

    /// The records in a folder of the job's own, of a target of files.
    pub(crate) fn records_in(&self, folder: &str) -> Vec<String> {
        let store = self.store.as_ref().unwrap();
        self.wait(async {
            let folder = Path::from(format!("_floodmark/small/load/{folder}"));
            let mut listed: Vec<_> = store.list(Some(&folder)).try_collect().await.unwrap();
            listed.sort_by(|a, b| a.location.cmp(&b.location));
            let mut records = Vec::new();
            for object in listed.into_iter().filter(|object| object.location.extension() == Some("json")) {
                let bytes = store.get(&object.location).await.unwrap().bytes().await.unwrap();
                records.push(String::from_utf8(bytes.to_vec()).unwrap());
            }
            records
        })
    }

    /// What a reader sees that knows folders only, and follows the link once.
    pub(crate) fn seen_in_current(&self) -> Rows {
        let mut rows = Rows::new();
        let Ok(release) = fs::canonicalize(self.folder.path().join("out/lines/current")) else { return rows };
        for entry in fs::read_dir(release).unwrap() {
            add_rows(&mut rows, fs::File::open(entry.unwrap().path()).unwrap());
        }
        rows
    }

    /// The files of the target's data and records, in order.
    pub(crate) fn paths(&self) -> Vec<String> {
        let store = self.store.as_ref().unwrap();
        let listed: Vec<_> = self.wait(async { store.list(None).try_collect().await.unwrap() });
        let paths = listed.into_iter().map(|object| object.location.to_string());
        let mut paths: Vec<String> = paths
            .filter(|path| {
                ["/data/", "/commits/", "/staged/", "/probe/"].iter().any(|part| path.contains(part))
            })
            .collect();
        paths.sort();
        paths
    }

    /// All that the target holds, by an administrator who knows nothing of floodmark.
    pub(crate) fn backup(&self) -> Backup {
        if let Some(store) = &self.store {
            let all = self.wait(async {
                let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
                let mut all = Vec::new();
                for object in listed {
                    let bytes = store.get(&object.location).await.unwrap().bytes().await.unwrap();
                    all.push((object.location, bytes));
                }
                all
            });
            return Backup::Objects(all);
        }
        if let Some(schema) = &self.schema {
            let tables = ["lines", "floodmark_state", "floodmark_log"];
            for table in tables {
                schema.execute(&format!("CREATE TABLE {table}_backup AS TABLE {table}"));
            }
            return Backup::Tables(tables);
        }
        Backup::File(fs::read(self.folder.path().join("out.db")).unwrap())
    }

    /// Puts back what was there then, and nothing else.
    pub(crate) fn restore(&self, backup: &Backup) {
        match (backup, &self.store, &self.schema) {
            (Backup::Objects(all), Some(store), _) => self.wait(async {
                let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
                for object in listed {
                    // A link to a file that is gone already is listed too.
                    drop(store.delete(&object.location).await);
                }
                for (path, bytes) in all {
                    store.put(path, bytes.clone().into()).await.unwrap();
                }
            }),
            (Backup::Tables(tables), _, Some(schema)) => {
                for table in tables {
                    schema.execute(&format!("TRUNCATE {table}; INSERT INTO {table} TABLE {table}_backup"));
                }
            }
            (Backup::File(bytes), ..) => fs::write(self.folder.path().join("out.db"), bytes).unwrap(),
            _ => unreachable!(),
        }
    }

    /// Puts in the place of the target what the target of `other` held.
    pub(crate) fn swap(&self, backup: &Backup, other: &Self) {
        match (backup, &self.schema, &other.schema) {
            (Backup::Tables(tables), Some(here), Some(there)) => {
                for table in tables {
                    here.execute(&format!(
                        "TRUNCATE {table}; INSERT INTO {table} TABLE {}.{table}",
                        there.name
                    ));
                }
            }
            _ => self.restore(backup),
        }
    }

    /// Takes away everything that the target holds, its record included.
    pub(crate) fn empty(&self) {
        match &self.schema {
            Some(schema) => schema.execute("DROP TABLE lines, floodmark_state, floodmark_log"),
            None if self.store.is_some() => self.restore(&Backup::Objects(Vec::new())),
            None => fs::remove_file(self.folder.path().join("out.db")).unwrap(),
        }
    }

    /// Does something to a target that is a database, as others would; false if it does not let them, or not at the moment.
    pub(crate) fn try_target(&self, sql: &str) -> bool {
        match &self.schema {
            Some(schema) => schema
                .with(|client| client.batch_execute(&format!("SET lock_timeout = '200ms'; {sql}")).is_ok()),
            None => {
                let database = rusqlite::Connection::open(self.folder.path().join("out.db")).unwrap();
                database.busy_timeout(std::time::Duration::from_millis(200)).unwrap();
                database.execute_batch(sql).is_ok()
            }
        }
    }

    /// How many rows and releases a target that is a database holds, whatever columns it has.
    pub(crate) fn count(&self) -> (u64, u64) {
        let number = |sql: &str| -> u64 {
            let count: i64 = match &self.schema {
                Some(schema) => schema.with(|client| client.query_one(sql, &[]).unwrap().get(0)),
                None => rusqlite::Connection::open(self.folder.path().join("out.db"))
                    .unwrap()
                    .query_row(sql, [], |row| row.get(0))
                    .unwrap(),
            };
            count.unsigned_abs()
        };
        (number("SELECT count(*) FROM lines"), number("SELECT count(*) FROM floodmark_log"))
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    /// What a reader sees that knows nothing of floodmark but where it says its releases are; and how many there are.
    pub(crate) fn seen(&self) -> (Rows, u64) {
        let mut rows = Rows::new();
        let numbers: Vec<i64> = if let Some(store) = &self.store {
            self.wait(async {
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
                        add_rows(&mut rows, bytes);
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
                    rows.entry(row.get(0)).or_default().push(row.get(1));
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
            found
                .map(Result::unwrap)
                .for_each(|(id, amount): (i64, i64)| rows.entry(id).or_default().push(amount));
            let mut statement = database.prepare("SELECT seq FROM floodmark_log ORDER BY seq").unwrap();
            statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
        };
        let count = numbers.len() as u64;
        assert!(numbers.iter().copied().eq((1..).take(numbers.len())), "one record a release: {numbers:?}");
        (rows, count)
    }
}

fn secret() -> &'static str {
    &s3().admin.1
}
