//! What servers do to runs that go on: they start anew in the middle, they choose one who waits as the victim of a deadlock, they let
//! somebody else hold a lock for too long.

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use ::postgres::{Client, NoTls};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    ledger::{Ledger, MODES, to_postgres, trusted},
    rivals::{signal, spawn, stands_still},
    services::{Schema, faults, pgbouncer, postgres, private_postgres},
    support::Folder,
};

fn document(output: &Output, what: &str) -> Value {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{what}: {told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn is_tried_again(run: &Value) -> bool {
    let warnings = run["warnings"].as_array();
    warnings.into_iter().flatten().any(|said| said.as_str().unwrap().contains("tried again"))
}

/// P31: the server is stopped at once, and started again, while a run stands still at one of its calls to the outside.
#[test]
fn a_server_that_starts_anew_in_the_middle_of_a_run_loses_and_doubles_nothing() {
    let server = private_postgres("restarted");
    let (mut points, mut again) = (0, 0);
    for (mode, reading) in MODES {
        let mut ledger = Ledger::at(server, mode, reading, "retries: 5", "");
        ledger.arrive(mode == "append");
        ledger.run();
        ledger.arrive(mode == "append");
        let calls = ledger.counted();
        let mut releases = ledger.seen().1;
        for part in 1..=6 {
            let after = ledger.arrive(mode == "append");
            let mut command = ledger.command(&["run", "--output", "json"]);
            command.env("LD_PRELOAD", faults()).env("FAULT", "stop");
            let mut run = spawn(command.env("FAULT_AT", (calls * part / 7).to_string()));
            if stands_still(&mut run) {
                points += 1;
                server.restart();
                signal(&run, Signal::SIGCONT);
            }
            let what = format!("{mode}, restarted at {part} of 7");
            again += u32::from(is_tried_again(&document(&run.wait_with_output().unwrap(), &what)));
            let (rows, now) = ledger.seen();
            assert_eq!((rows, now), (after, releases + 1), "{what}");
            releases = now;
        }
    }
    println!("restarted at {points} points, after which {again} runs tried again");
    assert!(points >= 20 && again >= 8, "{points} {again}");
}

/// A job with two outputs, and somebody else who locks them.
struct Shared {
    folder: Folder,
    schema: Schema,
    other: Client,
}

impl Shared {
    fn new(options: &str) -> Self {
        let schema = Schema::new();
        let server = postgres();
        let more = format!("{}, {options}", trusted());
        let connection = to_postgres(&schema.name, "localhost", server.port, &more);
        let folder = Folder::with(&[
            ("connections.yaml", &format!("data: {{ kind: files, root: data }}\ndw: {connection}\n")),
            (
                "jobs/load.yaml",
                "job: load\nsources:\n  orders: { connection: data, file: orders.csv }\nmodels:\n  clean:\ntarget:\n  connection: dw\n  outputs:\n    first: { from: clean, mode: merge, key: [id] }\n    second: { from: clean, mode: replace }\n",
            ),
        ]);
        let login = format!(
            "host=127.0.0.1 port={} user=admin password={} dbname=postgres application_name=other options='-c search_path={}'",
            server.port, server.password, schema.name
        );
        let other = Client::connect(&login, NoTls).unwrap();
        let this = Self { folder, schema, other };
        document(&this.command().output().unwrap(), "the first release");
        this.folder.write("data/orders.csv", b"id,customer,amount\n1,ada,7.50\n3,edsger,1\n");
        this
    }

    fn command(&self) -> Command {
        let mut command = self.folder.command(&["run", "--output", "json"]);
        command.env("ERP_PASSWORD", &postgres().password);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn asks(&mut self, sql: &str) -> bool {
        self.other.query_one(sql, &[]).unwrap().get(0)
    }

    /// Waits until somebody waits for this session's locks, or nobody does any more.
    fn until_waited_for(&mut self, waited_for: bool) {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid)))";
        let found = (0..6000).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            self.asks(sql) == waited_for
        });
        assert!(found, "nobody came, or went");
    }

    fn holds(&self, table: &str) -> i64 {
        self.schema
            .with(|client| client.query_one(&format!("SELECT count(*) FROM {table}"), &[]).unwrap().get(0))
    }
}

#[test]
fn who_waited_for_a_lock_in_vain_publishes_its_stage_once_more() {
    let mut shared = Shared::new("lock_timeout_ms: 400");
    shared.other.batch_execute("BEGIN; LOCK TABLE second IN EXCLUSIVE MODE").unwrap();
    let run = spawn(&mut shared.command());
    shared.until_waited_for(true);
    shared.until_waited_for(false);
    shared.other.batch_execute("ROLLBACK").unwrap();
    let run = document(&run.wait_with_output().unwrap(), "a lock was held for too long");
    assert_eq!((run["outcome"].as_str(), is_tried_again(&run)), (Some("published"), false), "{run}");
    assert_eq!((shared.holds("first"), shared.holds("second")), (3, 2));
}

/// A server that stands still with all of its processes holds its connections, and the kernel takes new ones for it: it is given up. One that
/// answers others is waited for, however long it works on a query.
#[test]
fn a_server_that_answers_nobody_any_more_is_given_up_and_one_that_works_is_waited_for() {
    let server = private_postgres("silent");
    let options = "lock_timeout_ms: 600000, silence_ms: 50, connect_timeout_ms: 5000";
    let mut ledger = Ledger::at(server, "append", "incremental: { cursor: id }", "retries: 0", options);
    ledger.arrive(true);
    ledger.run();
    let login = format!(
        "host=127.0.0.1 port={} user=admin password={} dbname=postgres",
        server.port, server.password
    );
    let mut other = Client::connect(&login, NoTls).unwrap();
    let lock = format!("BEGIN; LOCK TABLE {}.lines", ledger.schema.as_ref().unwrap().name);
    for stands_still in [false, true] {
        let after = ledger.arrive(true);
        other.batch_execute(&lock).unwrap();
        let mut command = ledger.command(&["run"]);
        let run = spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        // Both of its sessions, so that none is about to be opened: of that one it would be told that nobody answers.
        let waits = "SELECT count(DISTINCT pid) = 2 FROM pg_locks WHERE NOT granted";
        while !other.query_one(waits, &[]).unwrap().get::<_, bool>(0) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if stands_still {
            let still = server.stand_still();
            let output = run.wait_with_output().unwrap();
            drop(still);
            other.batch_execute("ROLLBACK").unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(75), "{told}");
            assert!(told.contains("the server answers nobody any more, and was given up"), "{told}");
            assert_eq!(ledger.run()["outcome"], "published");
        } else {
            // Long enough to be looked after many times.
            std::thread::sleep(Duration::from_millis(1500));
            other.batch_execute("ROLLBACK").unwrap();
            let output = run.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert_eq!(ledger.seen().0, after);
    }
}

#[test]
fn the_victim_of_a_deadlock_publishes_its_stage_once_more() {
    // The run looks for deadlocks after a while, and the other one never: so the run is the victim.
    let mut shared = Shared::new("lock_timeout_ms: 60000");
    shared
        .other
        .batch_execute("SET deadlock_timeout = '1h'; BEGIN; LOCK TABLE second IN EXCLUSIVE MODE")
        .unwrap();
    let run = spawn(&mut shared.command());
    shared.until_waited_for(true);
    // Held by the run until it is chosen.
    shared.other.batch_execute("LOCK TABLE first IN EXCLUSIVE MODE; ROLLBACK").unwrap();
    let run = document(&run.wait_with_output().unwrap(), "a deadlock");
    assert_eq!((run["outcome"].as_str(), is_tried_again(&run)), (Some("published"), false), "{run}");
    assert_eq!((shared.holds("first"), shared.holds("second")), (3, 2));
}

/// P26: somebody alters the output's table while the run stands still behind its staging: it is seen inside the transaction.
#[test]
fn a_table_that_is_altered_in_the_middle_of_a_run_is_seen_before_anything_is_written() {
    // SQLite has no call between the two: its test is beside its code.
    for target in ["postgres"] {
        let mut seen = 0;
        for alter in
            ["ALTER TABLE lines DROP COLUMN period", "ALTER TABLE lines RENAME COLUMN period TO month"]
        {
            let mut ledger = Ledger::limited(
                target,
                "merge, key: [id]",
                "incremental: { cursor: id }",
                "retries: 0",
                &trusted(),
            );
            ledger.arrive(true);
            ledger.run();
            ledger.arrive(true);
            let calls = ledger.counted();
            for part in 1..20 {
                let before = ledger.seen();
                ledger.arrive(true);
                let mut command = ledger.command(&["run"]);
                command.env("LD_PRELOAD", faults()).env("FAULT", "stop");
                let mut run = spawn(command.env("FAULT_AT", (calls * part / 20).to_string()));
                let altered = stands_still(&mut run) && ledger.try_target(alter);
                if run.try_wait().unwrap().is_none() {
                    signal(&run, Signal::SIGCONT);
                }
                let output = run.wait_with_output().unwrap();
                let told = String::from_utf8_lossy(&output.stderr);
                if !altered {
                    assert!(output.status.success(), "{target}: {told}");
                    continue;
                }
                // Before it was looked at it is a change of the contract, and refused; behind the commit it is the next run's.
                let (code, after) = (output.status.code(), ledger.count());
                let landed = after.1 > before.1;
                assert_eq!(code == Some(0), landed, "{target}, {part} of 20: {told}");
                seen += u32::from(code == Some(75) && told.contains("were changed by somebody else"));
                assert!(
                    landed || matches!(code, Some(1..=3 | 75)),
                    "{target}, {part} of 20: {code:?} {told}"
                );
                assert_eq!(after.0, before.0.len() as u64 + u64::from(landed), "{target}, {part} of 20");
                let mended = ledger.try_target("ALTER TABLE lines RENAME COLUMN month TO period")
                    || ledger.try_target("ALTER TABLE lines ADD COLUMN period TEXT");
                assert!(mended, "{target}, {part} of 20");
                ledger.run();
            }
        }
        assert!(seen >= 1, "{target}: nothing was altered between staging and commit");
    }
}

/// A standby knows nothing of what is being written on its primary: it is refused without an overlap, and said with one.
#[test]
fn a_standby_is_read_again_as_far_as_the_overlap_reaches_or_not_at_all() {
    let server = private_postgres("standby");
    server.become_primary();
    let schema = Schema::at(server);
    schema.execute(
        "CREATE TABLE orders (id bigint PRIMARY KEY, changed_at timestamptz NOT NULL);
         INSERT INTO orders VALUES (1, '2026-01-01T08:00Z'), (2, '2026-01-01T09:00Z')",
    );
    let name = schema.name.clone();
    server.become_standby();
    let floodmark = |folder: &Folder, cursor: &str, arguments: &[&str]| {
        folder.write(
            "jobs/load.yaml",
            format!("job: load\nsources:\n  orders: {{ connection: erp, table: orders, incremental: {{ cursor: {cursor} }} }}\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: {{ from: clean, mode: merge, key: [id] }}\n").as_bytes(),
        );
        folder.write("sql/mappings/load/clean.sql", b"SELECT id FROM orders\n");
        folder.command(arguments).env("ERP_PASSWORD", &server.password).output().unwrap()
    };
    for (cursor, overlap) in [("changed_at", "1h"), ("id", "10")] {
        let folder = Folder::with(&[(
            "connections.yaml",
            &format!(
                "erp: {{ kind: postgres, host: 127.0.0.1, port: {}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslmode: disable, schema: {name} }}\nlake: {{ kind: files, root: out }}\n",
                server.port
            ),
        )]);
        let refused = floodmark(&folder, cursor, &["run"]);
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{cursor}: {told}");
        assert!(told.contains("is a standby") && told.contains("overlap: 1h"), "{cursor}: {told}");
        let again = format!("{cursor}, overlap: {overlap}");
        let plan = floodmark(&folder, &again, &["plan", "load", "--output", "json"]);
        let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
        assert_eq!(plan["sources"][0]["bound"], "lookback", "{plan}");
        assert!(plan["warnings"].to_string().contains("as far as `overlap` reaches"), "{plan}");
        let run = document(&floodmark(&folder, &again, &["run", "--output", "json"]), cursor);
        assert_eq!(run["outputs"]["orders"]["rows_after"], 2, "{run}");
    }
    server.become_primary();
}

/// A pooler that gives each transaction another session of the server: what others have left in its sessions is in nobody's way, and nothing of ours is left there.
/// A pool of whole sessions is a server as any other.
#[test]
fn through_a_pooler_is_read_and_written_and_nothing_is_left_in_its_sessions() {
    let (server, port) = (postgres(), pgbouncer());
    let schema = Schema::new();
    let name = &schema.name;
    schema.execute(
        "CREATE TYPE state AS ENUM ('open', 'paid'); CREATE DOMAIN cents AS numeric(12, 2);
         CREATE TABLE orders (id bigint PRIMARY KEY, state state, amount cents, tags state[]);
         INSERT INTO orders SELECT n, 'paid', n / 4.0, '{open,paid}' FROM generate_series(1, 5000) AS n",
    );
    let connection = |port: u16, database: &str| {
        format!(
            "{{ kind: postgres, host: 127.0.0.1, port: {port}, database: {database}, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslmode: disable, schema: {name} }}"
        )
    };
    let job = |target: &str| {
        format!(
            "job: to_{target}\nsources:\n  orders: {{ connection: pooled, table: orders, incremental: {{ cursor: id }} }}\ntarget:\n  connection: {target}\n  outputs: {{ {target}_orders: {{ from: orders, mode: merge, key: [id] }} }}\n"
        )
    };
    let folder = Folder::with(&[
        (
            "connections.yaml",
            &format!(
                "pooled: {}\nwhole: {}\nlake: {{ kind: files, root: out }}\n",
                connection(port, "postgres"),
                connection(port, "whole")
            ),
        ),
        ("jobs/load.yaml", &job("lake")),
        ("jobs/to_whole.yaml", &job("whole")),
        ("jobs/to_pooled.yaml", &job("pooled")),
    ]);
    let floodmark = |arguments: &[&str]| {
        folder.command(arguments).env("ERP_PASSWORD", &server.password).output().unwrap()
    };
    let reached = floodmark(&["connections", "test"]);
    assert_eq!(reached.status.code(), Some(0), "{}", String::from_utf8_lossy(&reached.stderr));

    // Others use the pool too: one of a kind without care leaves statements under the names that ours have, another has its own.
    let client = || {
        let options =
            format!("host=127.0.0.1 port={port} user=admin password={} dbname=postgres", server.password);
        Client::connect(&options, NoTls).unwrap()
    };
    let mut clients: Vec<Client> = (0..8).map(|_| client()).collect();
    let statements: String = (0..40).map(|at| format!("PREPARE s{at} AS SELECT 1;")).collect();
    // As many as the pool has sessions, and all at once, so that each has another one.
    let mut all = |sql: &str| -> Vec<String> {
        clients.iter_mut().for_each(|client| client.batch_execute("BEGIN").unwrap());
        let asked = clients.iter_mut().map(|client| client.simple_query(sql).unwrap());
        let told = asked
            .flatten()
            .filter_map(|message| match message {
                ::postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
            .collect();
        clients.iter_mut().for_each(|client| client.batch_execute("COMMIT").unwrap());
        told
    };
    let ours = "SELECT count(*) FROM (SELECT name FROM pg_prepared_statements WHERE name ~ '^s[0-9]+$'
        UNION ALL SELECT relname FROM pg_class WHERE relname LIKE 'fm\\_%' AND relnamespace = pg_my_temp_schema()) AS left_there";
    let succeeds = |arguments: &[&str]| {
        let output = floodmark(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    };
    all("DEALLOCATE ALL");
    for job in ["to_lake", "to_pooled"] {
        succeeds(&["plan", job]);
        assert_eq!(all(ours), ["0"; 8], "{job}");
    }
    all(&format!("DEALLOCATE ALL; PREPARE theirs AS SELECT 2; {statements}"));
    succeeds(&["plan", "to_lake"]);
    assert_eq!(all("SELECT count(*) FROM pg_prepared_statements WHERE name = 'theirs'"), ["1"; 8]);
    for round in 0..3 {
        schema.execute(&format!(
            "INSERT INTO orders VALUES ({}, 'open', 1.25, '{{}}'); UPDATE orders SET amount = {round} WHERE id = 7",
            10_000 + round
        ));
        for target in ["lake", "pooled", "whole"] {
            let job = format!("to_{target}");
            let run = document(&floodmark(&["run", &job, "--output", "json"]), &job);
            assert_eq!(run["outputs"][format!("{target}_orders")]["rows_after"], 5001 + round, "{run}");
        }
        all("DEALLOCATE ALL");
        succeeds(&["run", "to_pooled", "--full-refresh"]);
        assert_eq!(all(ours), ["0"; 8]);
    }
    assert_eq!(all("SHOW client_connection_check_interval"), ["0"; 8]);
    assert!(all("SHOW search_path").iter().all(|path| !path.contains(name.as_str())));
    let differs =
        "(TABLE orders EXCEPT TABLE pooled_orders) UNION ALL (TABLE pooled_orders EXCEPT TABLE orders)";
    assert_eq!(schema.with(|client| client.query(differs, &[]).unwrap().len()), 0);
}
