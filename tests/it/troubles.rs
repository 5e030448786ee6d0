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
    ledger::{Ledger, MODES},
    rivals::{signal, spawn, stands_still},
    services::{Schema, faults, postgres, private_postgres},
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
        let mut ledger = Ledger::at(server, mode, reading, "retries: 5");
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
        let connection = format!(
            "{{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslrootcert: {}, schema: {}, {options} }}",
            server.port, server.authority, schema.name
        );
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
