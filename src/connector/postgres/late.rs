//! No row is lost, whenever its transaction ends: P8, P9 and P10, with sessions of a real server.
//!
//! Other tests use the server meanwhile. Their transactions make a window end earlier; nothing that is asserted here depends on
//! them, and what they could hold up is tried until it is done.

use std::{
    collections::BTreeMap,
    slice,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ::postgres::{Client, NoTls};
use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{DataType, Field, Int64Type, Schema},
};
use chrono::{DateTime, TimeDelta, Utc};
use futures::TryStreamExt;
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use super::tests::opened;
use crate::{
    connector::{
        Bounds, Connection, Exactness, Marks, RunTime, Snapshot,
        scan::Scan,
        services::postgres,
        spec::{CursorSpec, OnNull, Read, StreamSpec},
    },
    error::{ErrorKind, Result},
    watermark::{CursorValue, Mark, Overlap, Position, Window},
};

/// What `find` finds, as soon as it does: others may hold it up for a while.
fn at_last<T>(mut find: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(180), "nothing came of it in three minutes");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A database of its own with an empty table, gone when it is dropped: who reads by a number waits for all who write in the same
/// database, and other tests do.
struct Database {
    name: String,
}

impl Database {
    fn new() -> Self {
        // What a test that was killed had prepared outlives the server, and whoever waits for everybody would wait for it.
        take_back("prepared < now() - interval '10 minutes'");
        let this = Self { name: format!("d_{}", uuid::Uuid::now_v7().simple()) };
        // Of the template that nobody can be connected to.
        let create = format!("CREATE DATABASE {} TEMPLATE template0", this.name);
        postgres().admin("postgres", |client| client.batch_execute(&create).unwrap());
        let table =
            "CREATE TABLE orders (id bigserial, made_at timestamptz NOT NULL DEFAULT now(), made_on date)";
        this.session().batch_execute(table).unwrap();
        this
    }

    fn session(&self) -> Client {
        let server = postgres();
        let options = format!(
            "host=127.0.0.1 port={} user=admin password={} dbname={}",
            server.port, server.password, self.name
        );
        Client::connect(&options, NoTls).unwrap()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        take_back(&format!("database = '{}'", self.name));
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        let _left_behind = postgres().admin("postgres", |client| client.batch_execute(&drop));
    }
}

/// Rolls back what is still prepared, of those that meet a condition.
fn take_back(which: &str) {
    let find = format!("SELECT database::text, gid FROM pg_prepared_xacts WHERE {which}");
    let found = postgres().admin("postgres", |client| {
        let rows = client.query(&find, &[]).unwrap_or_default();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(String, String)>>()
    });
    for (database, gid) in found {
        let rollback = format!("ROLLBACK PREPARED '{gid}'");
        let _gone_already = postgres().admin(&database, |client| client.batch_execute(&rollback));
    }
}

/// The ids that the table holds.
fn ids(client: &mut Client) -> Vec<i64> {
    let rows = client.query("SELECT id FROM orders ORDER BY id", &[]).unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The greatest value of a column, as `client` sees it.
fn greatest(client: &mut Client, column: &str) -> Position {
    let row = client.query_one(&format!("SELECT max({column}) FROM orders"), &[]).unwrap();
    Position::of(match column {
        "id" => CursorValue::Int(row.get(0)),
        _ => CursorValue::Instant(row.get(0)),
    })
}

/// Where a run may be when something happens that it does not know of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gap {
    BeforeBounds,
    /// While the bounds are being found: most likely while they wait for somebody.
    BesideBounds,
    BeforeSnapshot,
    BeforeScan,
    AfterScan,
}

/// Who reads the table by a cursor, one run after the other, as a job does.
struct Reader {
    runtime: Runtime,
    connection: Arc<dyn Connection>,
    stream: StreamSpec,
    /// The first column of the cursor.
    column: String,
    as_of: DateTime<Utc>,
    marks: Marks,
    /// The ids that came, in all windows.
    seen: Vec<i64>,
    /// How sure the end of the last window was.
    exactness: Option<Exactness>,
}

impl Reader {
    fn new(database: &Database, cursor: &[&str], changes: &Value) -> Self {
        let server = postgres();
        let values = json!({
            "host": "localhost", "port": server.port, "user": "admin", "password": server.password, "database": database.name,
            "sslmode": "disable", "bound_margin_ms": 0, "lock_timeout_ms": 50,
        });
        let columns: Vec<String> = cursor.iter().map(|&column| column.to_owned()).collect();
        Self {
            runtime: Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap(),
            connection: opened(values, changes),
            column: columns[0].clone(),
            stream: StreamSpec {
                cursor: Some(CursorSpec { columns, overlap: None, on_null: OnNull::Error }),
                timezone: Some("UTC".to_owned()),
                ..StreamSpec::whole("orders", Read::Table("orders".to_owned()))
            },
            as_of: DateTime::from_timestamp(4_000_000_000, 0).unwrap(),
            marks: Marks::new(),
            seen: Vec::new(),
            exactness: None,
        }
    }

    fn bounds(&self) -> Result<Bounds> {
        let time = RunTime { now: self.as_of, as_of: self.as_of };
        let source = self.connection.source().unwrap();
        self.runtime.block_on(source.bounds(slice::from_ref(&self.stream), &self.marks, time))
    }

    fn snapshot(&self, bounds: &Bounds) -> Snapshot {
        let source = self.connection.source().unwrap();
        self.runtime.block_on(source.snapshot(slice::from_ref(&self.stream), bounds)).unwrap()
    }

    /// Reads the window, and goes on behind it the next time.
    fn read(&mut self, bounds: &Bounds, snapshot: &Snapshot) -> Vec<i64> {
        let window = bounds.windows[&self.stream.name].clone();
        let mark = window.mark().unwrap();
        let schema = Schema::new(vec![Field::new("id", DataType::Int64, true)]);
        let scan = Scan::new(self.stream.clone(), Arc::new(schema), window);
        let source = self.connection.source().unwrap();
        let batches: Vec<RecordBatch> = self.runtime.block_on(async {
            source.scan(snapshot, &scan, Arc::default()).unwrap().try_collect().await.unwrap()
        });
        let found: Vec<i64> = batches
            .iter()
            .flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec())
            .collect();
        self.marks.insert(self.stream.name.clone(), mark);
        self.exactness = bounds.exactness.get(&self.stream.name).copied();
        self.seen.extend(&found);
        found
    }

    /// One run with `step` in a gap of it; behind it, if the run does not happen.
    fn run(&mut self, gap: Gap, step: impl FnOnce() + Send) -> Result<Vec<i64>> {
        let mut step = Some(step);
        let found = thread::scope(|scope| -> Result<Vec<i64>> {
            if gap == Gap::BesideBounds
                && let Some(step) = step.take()
            {
                scope.spawn(move || {
                    // Whenever it really is, no row may be lost.
                    thread::sleep(Duration::from_millis(25));
                    step();
                });
            }
            let mut now = |here: Gap| {
                if here == gap
                    && let Some(step) = step.take()
                {
                    step();
                }
            };
            now(Gap::BeforeBounds);
            let bounds = self.bounds()?;
            now(Gap::BeforeSnapshot);
            let snapshot = self.snapshot(&bounds);
            now(Gap::BeforeScan);
            Ok(self.read(&bounds, &snapshot))
        });
        if let Some(step) = step {
            step();
        }
        found
    }

    /// Whether everything up to `last` has had its turn.
    fn is_behind(&self, last: &Position) -> bool {
        matches!(&self.marks[&self.stream.name], Mark::Cursor(mark) if mark > last)
    }

    /// Runs until a window ends behind the last row. What has not come then is lost.
    fn drain(&mut self, client: &mut Client) {
        let last = greatest(client, &self.column);
        at_last(|| match self.run(Gap::AfterScan, || ()) {
            Ok(_) => self.is_behind(&last).then_some(()),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Temporary, "{error}");
                None
            }
        });
    }

    /// The ids that came, each as often as it came.
    fn ids(&self) -> Vec<i64> {
        let mut ids = self.seen.clone();
        ids.sort_unstable();
        ids
    }
}

/// A transaction with one row, which goes on.
const BEGIN: &str = "BEGIN; INSERT INTO orders DEFAULT VALUES";

/// What four transactions do, step by step. Each brings one row.
const STEPS: [&[&str]; 4] = [
    &[BEGIN, "COMMIT"],
    &[BEGIN, "COMMIT"],
    // Its row is of the time when it began, long before anybody could see that it writes.
    &["BEGIN", "INSERT INTO orders DEFAULT VALUES; COMMIT"],
    &[BEGIN, "PREPARE TRANSACTION '$gid'", "COMMIT PREPARED '$gid'"],
];

/// The one that is prepared.
const PREPARED: usize = 3;

/// Every order in which they can take their steps. The first two are alike, and begin one after the other.
fn schedules() -> Vec<Vec<usize>> {
    fn extend(schedule: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
        let taken = |who: usize| schedule.iter().filter(|&&one| one == who).count();
        let next: Vec<usize> =
            (0..4).filter(|&who| taken(who) < STEPS[who].len() && (who != 1 || taken(0) > 0)).collect();
        if next.is_empty() {
            all.push(schedule.clone());
        }
        for who in next {
            schedule.push(who);
            extend(schedule, all);
            schedule.pop();
        }
    }
    let mut all = Vec::new();
    extend(&mut Vec::new(), &mut all);
    all
}

/// Who ends, from the last to the first.
fn ends(schedule: &[usize]) -> Vec<usize> {
    let mut ends = Vec::new();
    for who in schedule.iter().rev() {
        if !ends.contains(who) {
            ends.push(*who);
        }
    }
    ends
}

/// P9, W3: two schedules for every order of commits, with a run around each step, which falls into another gap every time.
#[test]
fn of_three_writers_and_a_prepared_transaction_no_row_is_lost_whatever_order_they_commit_in() {
    let mut by_ends: BTreeMap<Vec<usize>, Vec<Vec<usize>>> = BTreeMap::new();
    for schedule in schedules() {
        by_ends.entry(ends(&schedule)).or_default().push(schedule);
    }
    assert_eq!(by_ends.len(), 24);
    let some: Vec<Vec<usize>> = by_ends
        .values()
        .enumerate()
        .flat_map(|(number, alike)| {
            alike.iter().cycle().skip(7 * number).step_by(alike.len() / 2).take(2).cloned()
        })
        .collect();
    thread::scope(|scope| {
        for cursor in ["made_at", "id"] {
            let some = &some;
            scope.spawn(move || no_row_is_lost(cursor, some));
        }
    });
}

/// One reader goes through all schedules, and its marks with it.
fn no_row_is_lost(cursor: &str, schedules: &[Vec<usize>]) {
    let database = Database::new();
    let mut sessions: Vec<Client> = (0..5).map(|_| database.session()).collect();
    let mut reader = Reader::new(&database, &[cursor], &json!({}));
    for (number, schedule) in schedules.iter().enumerate() {
        let mut taken = [0; 4];
        for (at, &who) in schedule.iter().enumerate() {
            let sql = STEPS[who][taken[who]].replace("$gid", &database.name);
            // What one session has prepared another commits.
            let session = &mut sessions[if taken[PREPARED] == 2 && who == PREPARED { 4 } else { who }];
            let gap = match (number + at) % 4 {
                // Who begins while others look is what `bound_margin_ms` is for, and there is none here.
                0 if taken[who] > 0 => Gap::BesideBounds,
                0 | 1 => Gap::BeforeSnapshot,
                2 => Gap::BeforeScan,
                _ => Gap::AfterScan,
            };
            // By a number a run waits for all who have written, by a time only for what is prepared: nobody tells when that began.
            let waits = match cursor {
                "id" => taken[0] == 1 || taken[1] == 1 || matches!(taken[PREPARED], 1 | 2),
                _ => taken[PREPARED] == 2,
            };
            let found = reader.run(gap, || session.batch_execute(&sql).unwrap());
            if let Err(error) = &found {
                assert_eq!(error.kind(), ErrorKind::Temporary, "{cursor}: {schedule:?}: {error}");
            }
            if gap != Gap::BesideBounds {
                assert_eq!(found.is_err(), waits, "{cursor}: {schedule:?}: before step {at}: {found:?}");
            }
            taken[who] += 1;
        }
        reader.drain(&mut sessions[0]);
        assert_eq!(reader.ids(), ids(&mut sessions[0]), "{cursor}: {schedule:?}: each row once");
    }
    assert_eq!(reader.seen.len(), 4 * schedules.len());
}

/// A vacuum locks indexes as a writer does, and may take an hour: who reads by a number does not wait for it. For who fills a table that nobody sees yet he does:
/// it may become a part of what he reads.
#[test]
fn a_vacuum_is_no_writer() {
    let database = Database::new();
    let mut session = database.session();
    session.batch_execute("INSERT INTO orders SELECT FROM generate_series(1, 20000); ALTER TABLE orders ADD PRIMARY KEY (id)").unwrap();
    let mut vacuum = database.session();
    let stop = vacuum.cancel_token();
    thread::scope(|scope| {
        let vacuuming = scope.spawn(move || {
            vacuum.batch_execute("SET vacuum_cost_delay = 100; SET vacuum_cost_limit = 1").unwrap();
            vacuum.batch_execute("VACUUM orders")
        });
        let locked =
            "SELECT FROM pg_locks WHERE relation = 'orders_pkey'::regclass AND mode = 'RowExclusiveLock'";
        at_last(|| session.query_opt(locked, &[]).unwrap());
        let mut reader = Reader::new(&database, &["id"], &json!({}));
        let mut writer = database.session();
        writer
            .batch_execute(
                "BEGIN; CREATE TABLE part (LIKE orders); INSERT INTO part (id, made_at) VALUES (1, now())",
            )
            .unwrap();
        let waited = reader.run(Gap::AfterScan, || ());
        writer.batch_execute("ROLLBACK").unwrap();
        let found = reader.run(Gap::AfterScan, || ());
        stop.cancel_query(NoTls).unwrap();
        let ended = vacuuming.join().unwrap();
        assert!(ended.is_err(), "it had ended before anybody could wait for it");
        assert_eq!(waited.unwrap_err().kind(), ErrorKind::Temporary);
        assert_eq!(found.unwrap().len(), 20_000);
    });
}

/// P10, W4: with the snapshot before the bounds a row is lost, with the bounds before the snapshot none, wherever its writer commits.
#[test]
fn a_bound_that_is_newer_than_its_snapshot_loses_a_row() {
    for cursor in ["made_at", "id"] {
        let database = Database::new();
        let mut writer = database.session();

        // The wrong order: the row is behind the snapshot and before the bound.
        let mut wrong = Reader::new(&database, &[cursor], &json!({}));
        writer.batch_execute(BEGIN).unwrap();
        let snapshot = wrong.snapshot(&Bounds::default());
        writer.batch_execute("COMMIT").unwrap();
        let row = greatest(&mut writer, cursor);
        let bounds = at_last(|| {
            let bounds = wrong.bounds().unwrap();
            let Window::Cursor { hi, .. } = &bounds.windows["orders"] else { panic!("{bounds:?}") };
            (*hi > row).then_some(bounds)
        });
        assert!(wrong.read(&bounds, &snapshot).is_empty(), "{cursor}");
        drop(snapshot);
        writer.batch_execute("INSERT INTO orders DEFAULT VALUES").unwrap();
        wrong.drain(&mut writer);
        assert_eq!(ids(&mut writer), [1, 2], "{cursor}");
        assert_eq!(wrong.ids(), [2], "{cursor}: the first row is lost, and this test can see that");

        // The right one.
        let mut reader = Reader::new(&database, &[cursor], &json!({}));
        reader.drain(&mut writer);
        for gap in [Gap::BeforeBounds, Gap::BeforeSnapshot, Gap::BeforeScan, Gap::AfterScan] {
            for is_open in [true, false] {
                let sql = if is_open {
                    writer.batch_execute(BEGIN).unwrap();
                    "COMMIT"
                } else {
                    "BEGIN; INSERT INTO orders DEFAULT VALUES; COMMIT"
                };
                let found = reader.run(gap, || writer.batch_execute(sql).unwrap());
                let waits = cursor == "id" && is_open && gap != Gap::BeforeBounds;
                assert_eq!(found.is_err(), waits, "{cursor}: {gap:?}: {found:?}");
                reader.drain(&mut writer);
                assert_eq!(reader.ids(), ids(&mut writer), "{cursor}: {gap:?}, open before: {is_open}");
            }
        }
        assert_eq!(reader.seen.len(), 10, "{cursor}");
    }
}

/// A day for cursors that are cut by `as_of`: long before anything that is open.
fn day(number: i32) -> DateTime<Utc> {
    DateTime::from_timestamp(1_577_836_800, 0).unwrap() + TimeDelta::days(number.into())
}

/// P8, W1: rows with equal cursors are in one window, and those that come later at its very end are in the next.
#[test]
fn ties_at_the_boundary_come_once() {
    let database = Database::new();
    // For each run: how many days behind the end of the last window the new rows are, and how far the window goes.
    let runs = prop::collection::vec((prop::collection::vec(0..4_i32, 0..8), 0..4_i32), 1..6);
    let config = ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&runs, |runs| {
        let mut session = database.session();
        session.batch_execute("TRUNCATE orders").unwrap();
        let mut readers = [&["made_at"][..], &["made_on"], &["made_at", "id"]]
            .map(|cursor| Reader::new(&database, cursor, &json!({})));
        let (mut rows, mut id, mut end) = (Vec::<(i64, i32)>::new(), 0, 0);
        // The last window holds all that is left.
        for (offsets, length) in runs.into_iter().chain([(Vec::new(), 9)]) {
            let before = rows.len();
            for offset in offsets {
                id += 1;
                rows.push((id, end + offset));
            }
            let (new, days): (Vec<i64>, Vec<i32>) = rows[before..].iter().copied().unzip();
            let insert = "INSERT INTO orders
                SELECT id, timestamptz '2020-01-01 00:00+00' + number * interval '24 hours', date '2020-01-01' + number
                FROM unnest($1::int8[], $2::int4[]) AS added (id, number)";
            session.execute(insert, &[&new, &days]).unwrap();
            let window = end..end + length;
            let inside = rows.iter().filter(|(_, made)| window.contains(made));
            let expected: Vec<i64> = inside.map(|(id, _)| *id).collect();
            for reader in &mut readers {
                reader.as_of = day(window.end);
                let mut found = reader.run(Gap::AfterScan, || ()).unwrap();
                found.sort_unstable();
                assert_eq!(found, expected, "{:?}: days {window:?}", reader.stream.cursor);
            }
            end = window.end;
        }
        for reader in &readers {
            assert_eq!(reader.ids(), (1..=id).collect::<Vec<_>>(), "{:?}", reader.stream.cursor);
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// A user of the server without rights, gone when it is dropped.
pub(super) struct Role {
    pub(super) name: String,
}

impl Role {
    pub(super) fn new() -> Self {
        let this = Self { name: format!("r_{}", uuid::Uuid::now_v7().simple()) };
        let create = format!("CREATE ROLE {} LOGIN PASSWORD 'for-a-test'", this.name);
        postgres().admin("postgres", |client| client.batch_execute(&create).unwrap());
        this
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let drop = format!("DROP ROLE {}", self.name);
        let _left_behind = postgres().admin("postgres", |client| client.batch_execute(&drop));
    }
}

/// P9: who does not know when others began waits until they have ended, and pretends nothing; the right to see them is enough.
#[test]
fn who_may_not_see_others_waits_and_says_how_sure_it_is() {
    // What it may do goes with the database, and must be gone before it.
    let role = Role::new();
    let database = Database::new();
    let mut writer = database.session();
    let grant = format!("GRANT USAGE ON SCHEMA public TO {0}; GRANT SELECT ON orders TO {0}", role.name);
    writer.batch_execute(&grant).unwrap();
    let reader = |cursor: &str, patience: u32| {
        let user = json!({ "user": role.name, "password": "for-a-test", "lock_timeout_ms": patience });
        Reader::new(&database, &[cursor], &user)
    };

    writer.batch_execute(BEGIN).unwrap();
    for cursor in ["made_at", "id"] {
        let began = Instant::now();
        let error = reader(cursor, 200).bounds().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Temporary, "{cursor}: {error}");
        assert!(error.to_string().contains("could still write below the end"), "{cursor}: {error}");
        assert!(began.elapsed() >= Duration::from_millis(200), "{cursor}: it did not wait");
    }
    // A job that reads again does not wait, and says what its bound is worth.
    let mut again = reader("made_at", 200);
    again.stream.cursor.as_mut().unwrap().overlap = Some(Overlap::Micros(3_600_000_000));
    let found = again.bounds().unwrap();
    assert_eq!(found.exactness["orders"], Exactness::Lookback);
    assert!(found.warnings[0].contains("as far as `overlap` reaches"), "{:?}", found.warnings);
    writer.batch_execute("COMMIT").unwrap();
    for (cursor, sure) in [("made_at", Exactness::Margin), ("id", Exactness::Exact)] {
        // Without the right it waits for the transactions of other tests, too.
        let mut patient = reader(cursor, 30_000);
        patient.drain(&mut writer);
        assert_eq!((patient.ids(), patient.exactness), (vec![1], Some(sure)), "{cursor}");
    }

    writer.batch_execute(&format!("GRANT pg_read_all_stats TO {}", role.name)).unwrap();
    writer.batch_execute(BEGIN).unwrap();
    let row = greatest(&mut writer, "made_at");
    let mut sees = reader("made_at", 200);
    let found = sees.run(Gap::AfterScan, || ()).unwrap();
    assert!(!found.contains(&2) && !sees.is_behind(&row), "the window ends before what is open: {found:?}");
    assert_eq!(sees.exactness, Some(Exactness::Margin));
    writer.batch_execute("COMMIT").unwrap();
    sees.drain(&mut writer);
    assert_eq!(sees.ids(), [1, 2]);
}
