//! Nights on which clocks change (P30): rows come all the time, a job runs every half hour, and its mark goes on as time does,
//! whatever clocks show, and whatever zone the machine and the server's sessions are in.

use std::{collections::BTreeSet, fs};

use chrono::{DateTime, NaiveDateTime, Offset, TimeDelta, Utc};
use chrono_tz::Tz;
use rusqlite::Connection;
use serde_json::Value;

use crate::{services::postgres, support::Folder};

const SYSTEMS: [&str; 2] = ["postgres", "sqlite"];

/// A zone that no clock of these nights is set to.
const ELSEWHERE: &str = "Asia/Kathmandu";

/// A night on which the clocks of a zone change: when, and how many minutes forward.
#[derive(Debug, Clone, Copy)]
struct Night {
    zone: Tz,
    change: DateTime<Utc>,
    forward: i64,
}

/// Both nights of 2026: clocks of a whole hour, also off the full hours of UTC, and clocks of half an hour.
fn nights() -> [Night; 6] {
    [
        ("America/St_Johns", "2026-03-08T05:30:00Z", 60),
        ("America/St_Johns", "2026-11-01T04:30:00Z", -60),
        ("Europe/Berlin", "2026-03-29T01:00:00Z", 60),
        ("Europe/Berlin", "2026-10-25T01:00:00Z", -60),
        ("Australia/Lord_Howe", "2026-10-03T15:30:00Z", 30),
        ("Australia/Lord_Howe", "2026-04-04T15:00:00Z", -30),
    ]
    .map(|(zone, change, forward)| {
        let zone: Tz = zone.parse().unwrap();
        let change = DateTime::parse_from_rfc3339(change).unwrap().to_utc();
        let offset = |at: DateTime<Utc>| at.with_timezone(&zone).offset().fix().local_minus_utc();
        let change_by = offset(change) - offset(change - TimeDelta::seconds(1));
        assert_eq!(i64::from(change_by), forward * 60, "{zone}, {change}");
        Night { zone, change, forward }
    })
}

impl Night {
    /// So many minutes after the clocks change.
    fn at(&self, minutes: i64) -> DateTime<Utc> {
        self.change + TimeDelta::minutes(minutes)
    }

    /// What a clock there shows.
    fn clock(&self, at: DateTime<Utc>) -> NaiveDateTime {
        at.with_timezone(&self.zone).naive_local()
    }

    /// What that is taken for: of two times at which a clock shows the same, the first.
    fn read(&self, at: DateTime<Utc>) -> DateTime<Utc> {
        let back = TimeDelta::minutes(-self.forward);
        if (self.change..self.change + back).contains(&at) { at - back } else { at }
    }

    /// The earliest that clocks are taken for from `at` on: before it nothing can come any more.
    fn closed(&self, at: DateTime<Utc>) -> DateTime<Utc> {
        (0..12).map(|step| self.read(at + TimeDelta::minutes(10 * step))).min().unwrap()
    }
}

/// How a table says when a row came, and how a job goes by it.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// The table, the job and its output.
    table: &'static str,
    /// Whether it is what a clock without a zone showed.
    local: bool,
    /// Whether the job reads again what is as old as the clocks go back, and merges; the others append, and a row that is read twice
    /// is there twice.
    again: bool,
}

const INSTANTS: Kind = Kind { table: "instants", local: false, again: false };
const CLOCKS: Kind = Kind { table: "clocks", local: true, again: true };
const ONCE: Kind = Kind { table: "once", local: true, again: false };

impl Kind {
    /// What a row of that time is taken for.
    fn read(self, night: Night, at: DateTime<Utc>) -> DateTime<Utc> {
        if self.local { night.read(at) } else { at }
    }

    /// How far behind its mark a job reads.
    fn overlap(self, night: Night) -> TimeDelta {
        TimeDelta::minutes(if self.again { night.forward.abs() } else { 0 })
    }

    /// Where a run's mark has to be: as late as may be, and no later than what is still to come and is not read again.
    fn mark(self, night: Night, as_of: DateTime<Utc>) -> DateTime<Utc> {
        let closed = if self.local { night.closed(as_of) } else { as_of };
        as_of.min(closed + self.overlap(night))
    }
}

/// A database of its own whose sessions begin elsewhere, gone when it is dropped.
struct Database(String);

impl Database {
    fn new() -> Self {
        let this = Self(format!("d_{}", uuid::Uuid::now_v7().simple()));
        // Of the template that nobody can be connected to.
        for sql in [
            format!("CREATE DATABASE {} TEMPLATE template0", this.0),
            format!("ALTER DATABASE {} SET timezone = '{ELSEWHERE}'", this.0),
        ] {
            postgres().admin("postgres", |client| client.batch_execute(&sql).unwrap());
        }
        let show = "SELECT current_setting('timezone')";
        let zone: String = postgres().admin(&this.0, |client| client.query_one(show, &[]).unwrap().get(0));
        assert_eq!(zone, ELSEWHERE);
        this
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.0);
        let _left_behind = postgres().admin("postgres", |client| client.batch_execute(&drop));
    }
}

/// A source in one system, and jobs that bring what is new into a SQLite file.
struct Site {
    folder: Folder,
    database: Option<Database>,
    night: Night,
}

impl Site {
    fn new(system: &str, night: Night, kinds: &[Kind]) -> Self {
        let database = (system == "postgres").then(Database::new);
        let erp = match &database {
            Some(Database(name)) => format!(
                "{{ kind: postgres, host: localhost, port: {}, database: {name}, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslrootcert: {}, bound_margin_ms: 0 }}",
                postgres().port,
                postgres().authority
            ),
            None => "{ kind: sqlite, path: erp.db }".to_owned(),
        };
        let connections = format!("erp: {erp}\ndw: {{ kind: sqlite, path: out.db }}\n");
        let folder = Folder::with(&[("connections.yaml", &connections)]);
        fs::remove_file(folder.path().join("jobs/load.yaml")).unwrap();
        let this = Self { folder, database, night };
        kinds.iter().for_each(|kind| this.add(*kind));
        this
    }

    /// A table, and the job that reads it.
    fn add(&self, kind: Kind) {
        let Kind { table, local, again } = kind;
        let typed = if local { "timestamp" } else { "timestamptz" };
        // SQLite has text, of which the job says what it is.
        let (column, columns) = match self.database {
            Some(_) => (typed, String::new()),
            None => ("text", format!("columns: {{ changed: {typed} }}, ")),
        };
        let zone = if local { format!("timezone: {}, ", self.night.zone) } else { String::new() };
        let overlap = format!(", overlap: {}m", kind.overlap(self.night).num_minutes());
        let (overlap, mode) = if again { (overlap.as_str(), "merge, key: [id]") } else { ("", "append") };
        self.source(&format!("CREATE TABLE {table} (id bigint NOT NULL, changed {column} NOT NULL)"));
        let job = format!(
            "job: {table}\nsources:\n  arrivals: {{ connection: erp, table: {table}, {columns}{zone}incremental: {{ cursor: changed{overlap} }} }}\ntarget:\n  connection: dw\n  outputs:\n    {table}: {{ from: arrivals, mode: {mode} }}\n"
        );
        self.folder.write(&format!("jobs/{table}.yaml"), job.as_bytes());
    }

    /// Does something in the source.
    fn source(&self, sql: &str) {
        match &self.database {
            Some(Database(name)) => postgres().admin(name, |client| client.batch_execute(sql).unwrap()),
            None => Connection::open(self.folder.path().join("erp.db")).unwrap().execute_batch(sql).unwrap(),
        }
    }

    /// Rows come, with what their clocks show.
    fn arrive(&self, kind: Kind, rows: &[(i64, DateTime<Utc>)]) {
        let shown = |at: DateTime<Utc>| {
            if kind.local {
                self.night.clock(at).to_string()
            } else {
                at.with_timezone(&self.night.zone).to_rfc3339()
            }
        };
        let rows: Vec<String> = rows.iter().map(|(id, at)| format!("({id}, '{}')", shown(*at))).collect();
        self.source(&format!("INSERT INTO {} VALUES {}", kind.table, rows.join(", ")));
    }

    /// Runs on a machine in that zone. The exit code, and what is told.
    fn run(&self, as_of: &str, zone: &str) -> (i32, String) {
        let mut command = self.folder.command(&["run", "--as-of", as_of]);
        command.env("TZ", zone);
        if self.database.is_some() {
            command.env("ERP_PASSWORD", &postgres().password);
        }
        let output = command.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn target(&self) -> Connection {
        Connection::open(self.folder.path().join("out.db")).unwrap()
    }

    /// The mark of the job's newest record.
    fn mark(&self, kind: Kind) -> DateTime<Utc> {
        let sql = "SELECT record_json FROM floodmark_state WHERE job = ?1";
        let record: String = self.target().query_row(sql, [kind.table], |row| row.get(0)).unwrap();
        let record: Value = serde_json::from_str(&record).unwrap();
        let mark = &record["sources"]["arrivals"]["mark"]["cursor"][0]["instant"];
        DateTime::parse_from_rfc3339(mark.as_str().unwrap()).unwrap().to_utc()
    }

    /// All rows of the job's output, as they are stored.
    fn holds(&self, kind: Kind) -> Vec<(i64, String)> {
        let target = self.target();
        let sql = format!("SELECT id, changed FROM {} ORDER BY id, changed", kind.table);
        let mut statement = target.prepare(&sql).unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.map(Result::unwrap).collect()
    }
}

/// Goes through a night, from two hours before the clocks change to two hours after: a row comes every ten minutes. After each run the
/// target holds what came and is taken for a time below the mark, each once.
fn goes_through(system: &str, night: Night, kinds: &[Kind]) {
    let site = Site::new(system, night, kinds);
    let rows: Vec<(i64, DateTime<Utc>)> = (0..=24).map(|id| (id, night.at(10 * id - 120))).collect();
    let clocks: BTreeSet<NaiveDateTime> = rows.iter().map(|(_, at)| night.clock(*at)).collect();
    let twice = usize::try_from(-night.forward / 10).unwrap_or(0);
    assert_eq!(clocks.len(), rows.len() - twice, "{night:?}: what clocks show twice");
    let mut arrived = 0;
    for half_hour in -3..=5 {
        let as_of = night.at(30 * half_hour);
        // What comes at the very end of a window does not belong to it, and is there before the run or after it, by turns.
        let odd = half_hour % 2 != 0;
        let until = rows.partition_point(|(_, at)| *at < as_of || odd && *at == as_of);
        kinds.iter().for_each(|kind| site.arrive(*kind, &rows[arrived..until]));
        arrived = until;
        let (code, told) = if odd {
            site.run(&as_of.to_rfc3339(), ELSEWHERE)
        } else {
            site.run(&as_of.with_timezone(&night.zone).to_rfc3339(), night.zone.name())
        };
        let here = format!("{system}, {}, {}, as of {as_of}", night.zone, night.forward);
        assert_eq!(code, 0, "{here}: {told}");
        for kind in kinds {
            let (mark, here) = (kind.mark(night, as_of), format!("{here}, {}", kind.table));
            assert_eq!(site.mark(*kind), mark, "{here}: the mark");
            let below = rows[..arrived]
                .iter()
                .map(|(id, at)| (*id, kind.read(night, *at)))
                .filter(|(_, at)| *at < mark);
            let expected: Vec<(i64, String)> =
                below.map(|(id, at)| (id, at.format("%Y-%m-%dT%H:%M:%S%.6fZ").to_string())).collect();
            assert_eq!(site.holds(*kind), expected, "{here}: the rows below {mark}");
        }
    }
    for kind in kinds {
        let ids: Vec<i64> = site.holds(*kind).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, (0..=24).collect::<Vec<i64>>(), "{system}, {night:?}, {}", kind.table);
    }
}

#[test]
fn a_mark_goes_through_the_nights_on_which_clocks_change() {
    let kinds = [INSTANTS, CLOCKS];
    let mut combinations = 0;
    for night in nights() {
        for system in SYSTEMS {
            goes_through(system, night, &kinds);
            combinations += kinds.len();
        }
    }
    println!("{combinations} combinations of zone, night, system and cursor");
    assert_eq!(combinations, 3 * 2 * 2 * kinds.len());
}

#[test]
fn without_an_overlap_a_mark_waits_until_no_clock_can_show_an_earlier_time_again() {
    let mut combinations = 0;
    for night in nights().into_iter().filter(|night| night.forward < 0) {
        for system in SYSTEMS {
            goes_through(system, night, &[ONCE]);
            combinations += 1;
        }
    }
    assert_eq!(combinations, 3 * 2);
}

#[test]
fn a_time_that_clocks_skipped_is_refused_and_the_mark_stays() {
    let mut combinations = 0;
    for night in nights().into_iter().filter(|night| night.forward > 0) {
        for system in SYSTEMS {
            let site = Site::new(system, night, &[CLOCKS]);
            let run = |minutes: i64| site.run(&night.at(minutes).to_rfc3339(), night.zone.name());
            let state = || (site.mark(CLOCKS), site.holds(CLOCKS));
            site.arrive(CLOCKS, &[(1, night.at(-30))]);
            let (code, told) = run(-20);
            assert_eq!(code, 0, "{system}, {night:?}: {told}");
            let before = state();
            assert_eq!((before.0, before.1.len()), (night.at(-20), 1), "{system}, {night:?}");

            let never = (night.clock(night.at(-10)) + TimeDelta::minutes(20)).to_string();
            site.source(&format!("INSERT INTO {} VALUES (2, '{never}')", CLOCKS.table));
            let (code, told) = run(60);
            assert_eq!(code, 3, "{system}, {night:?}: {told}");
            let why = format!("`changed` is a time that {} skips when clocks go forward", night.zone);
            assert!(told.contains(&why) && !told.contains(&never), "{system}, {night:?}: {told}");
            assert_eq!(state(), before, "{system}, {night:?}");

            // Once it is put right, it is loaded: the mark has not gone on without it.
            let right = night.clock(night.at(10));
            site.source(&format!("UPDATE {} SET changed = '{right}' WHERE id = 2", CLOCKS.table));
            let (code, told) = run(60);
            assert_eq!(code, 0, "{system}, {night:?}: {told}");
            let (mark, rows) = state();
            assert_eq!((mark, rows.len()), (night.at(60), 2), "{system}, {night:?}");
            combinations += 1;
        }
    }
    assert_eq!(combinations, 3 * 2);
}
