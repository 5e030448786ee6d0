//! The real binary, with somebody on the wire: connections are cut, torn and reset at any message, and the answer to COMMIT is lost.
//! What such a run comes to is what an undisturbed one comes to, or nothing, and it knows which.

use std::{
    process::{Output, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    ledger::{Ledger, MODES, Rows, next},
    services::{
        Schema, postgres,
        proxy::{At, Fault, Proxy},
        s3,
    },
};

/// The last word of a transaction.
const COMMIT: fn(&str) -> bool = |text| text == "COMMIT";

/// How the answer to it is lost; and whether the run has to be tried again for its rows to be there.
const LOSSES: [(&str, At, Fault, bool); 4] = [
    ("the server had done it, and the answer was cut off", At::Answer(COMMIT), Fault::Cut, false),
    ("the server had not heard it", At::Question(COMMIT), Fault::Cut, true),
    ("the server had only just heard it", At::Question(COMMIT), Fault::Lose, false),
    ("the server was in the middle of it", At::Question(COMMIT), Fault::Freeze, false),
];

/// What a run says that has published something.
fn success(output: &Output, what: &str) -> Value {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{what}: {told}");
    let run: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(run["outcome"], "published", "{what}: {told}");
    run
}

/// Runs, and publishes something.
fn published(ledger: &Ledger, what: &str) -> Value {
    success(&ledger.command(&["run", "--output", "json"]).output().unwrap(), what)
}

/// The same, while the session that heard COMMIT stands still, until a new one of this run waits for it.
fn published_in_spite_of(proxy: &Proxy, ledger: &Ledger, what: &str) -> Value {
    let before = ledger.seen();
    let mut command = ledger.command(&["run", "--output", "json"]);
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let waited_for = |process: i32| -> bool {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks
            WHERE locktype = 'advisory' AND NOT granted AND $1 = ANY (pg_blocking_pids(pid)))";
        postgres().admin("postgres", |client| client.query_one(sql, &[&process]).unwrap().get(0))
    };
    let waits = (0..6000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        proxy.frozen().is_some_and(waited_for) || run.try_wait().unwrap().is_some()
    });
    let went_on = run.try_wait().unwrap().is_none();
    assert_eq!(ledger.seen(), before, "{what}: nothing is there yet");
    proxy.go_on();
    let output = run.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(waits && went_on, "{what}: the run did not wait for the session that may still commit: {told}");
    success(&output, what)
}

/// P2: whatever became of the COMMIT, the run that gave it finds out.
#[test]
fn an_answer_to_commit_that_is_lost_is_settled_and_never_guessed() {
    for (how, at, fault, again) in LOSSES {
        for (mode, reading) in MODES {
            let proxy = Proxy::postgres(postgres().port);
            let mut ledger = Ledger::through(proxy.port, mode, reading, "");
            // The first release also makes the tables.
            for release in ["the first", "the second"] {
                let what = format!("{how}: {release} release of {mode}");
                let releases = ledger.seen().1 + 1;
                let after = ledger.arrive(mode == "append");
                proxy.strike(at, fault);
                let run = match fault {
                    Fault::Freeze => published_in_spite_of(&proxy, &ledger, &what),
                    _ => published(&ledger, &what),
                };
                assert_eq!(proxy.struck(), 1, "{what}");
                assert_eq!(run["seq"], releases, "{what}");
                assert_eq!(run["warnings"].to_string().contains("tried again"), again, "{what}: {run}");
                assert_eq!(ledger.seen(), (after.clone(), releases), "{what}");

                proxy.pass();
                // What has landed is not loaded again; ranges are, and hold the same.
                let repeats = mode.starts_with("replace_range");
                assert_eq!(ledger.run()["outcome"] == "published", repeats, "{what}: once more");
                assert_eq!(ledger.seen(), (after, releases + u64::from(repeats)), "{what}: once more");
            }
        }
    }
}

/// The ends of a connection at which its messages are counted.
/// Makes the place of a fault from a number.
type Nth = fn(usize) -> At;

const SIDES: [(&str, Nth); 2] = [("clients", At::Client), ("the server", At::Server)];

/// A cut, a torn message and a reset, in turn.
fn in_turn(nth: usize) -> Fault {
    [Fault::Cut, Fault::Tear, Fault::Reset][nth % 3]
}

/// P19: the rows of a target are those of an undisturbed run, and the run that was disturbed goes through by itself.
#[test]
fn a_target_that_is_cut_off_at_any_message_loses_and_doubles_nothing() {
    let proxy = Proxy::postgres(postgres().port);
    let mut ledgers =
        MODES.map(|(mode, reading)| (mode, Ledger::through(proxy.port, mode, reading, "retries: 1")));
    for (side, at) in SIDES {
        let (mut nth, mut runs, mut points, mut calm) = (1, 0, 0, 0);
        // The modes take turns; behind the last message of each nothing strikes any more.
        while calm < MODES.len() {
            let (mode, ledger) = &mut ledgers[runs % MODES.len()];
            let fault = in_turn(runs);
            let what = format!("{mode}: {fault:?} at message {nth} of {side}");
            let releases = ledger.seen().1 + 1;
            let after = ledger.arrive(*mode == "append");
            proxy.strike(at(nth), fault);
            let run = published(ledger, &what);
            assert_eq!(run["seq"], releases, "{what}");
            assert_eq!(ledger.seen(), (after, releases), "{what}");
            let struck = proxy.struck();
            points += struck;
            calm = if struck == 0 { calm + 1 } else { 0 };
            (nth, runs) = (next(nth, 40, "append"), runs + 1);
        }
        println!("the target was cut off at {points} messages of {side}");
        assert!(points >= 40, "the target was cut off at {points} messages of {side} only");
    }
    proxy.pass();
    for (mode, ledger) in ledgers {
        let before = ledger.seen();
        ledger.run();
        assert_eq!(ledger.seen().0, before.0, "{mode}: once more");
    }
}

/// A job that replaces a table of SQLite by one of PostgreSQL, which is reached through a proxy.
struct Reading {
    proxy: Proxy,
    schema: Schema,
    ledger: Ledger,
    changes: i64,
}

/// Each is a message of the server.
const ROWS: i64 = 2000;

impl Reading {
    fn new() -> Self {
        let (proxy, schema) = (Proxy::postgres(postgres().port), Schema::new());
        schema.execute(&format!(
            "CREATE TABLE lines (id bigint PRIMARY KEY, period text, amount bigint);
             INSERT INTO lines SELECT n, 'p' || n % 3, 0 FROM generate_series(1, {ROWS}) AS n"
        ));
        let ledger = Ledger::limited("sqlite", "replace", "", "retries: 1", "");
        let connections = format!(
            "erp: {{ kind: postgres, host: 127.0.0.1, port: {}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", schema: {}, sslmode: disable }}\ndw: {{ kind: sqlite, path: out.db }}\n",
            proxy.port, schema.name
        );
        ledger.folder.write("connections.yaml", connections.as_bytes());
        Self { proxy, schema, ledger, changes: 0 }
    }

    /// Changes every row of the source, and runs: all of them have arrived, once.
    fn goes_through(&mut self, what: &str) {
        self.changes += 1;
        self.schema.execute("UPDATE lines SET amount = amount + 1");
        let releases = self.ledger.seen().1 + 1;
        let run = published(&self.ledger, what);
        assert_eq!(run["sources"]["lines"]["counts"]["extracted"], ROWS, "{what}");
        assert_eq!(run["seq"], releases, "{what}");
        let after: Rows = (1..=ROWS).map(|id| (id, vec![self.changes])).collect();
        // Two thousand rows are not for people to read.
        assert!(self.ledger.seen() == (after, releases), "{what}: other rows than the source has");
    }
}

/// B1: what came of a COPY that broke off is never taken for all of it.
#[test]
fn a_source_that_is_cut_off_at_any_message_is_read_whole_or_again() {
    let mut reading = Reading::new();
    reading.proxy.pass();
    reading.goes_through("undisturbed");
    let (asked, answered) = reading.proxy.messages();
    assert!(answered > 2000, "{answered} messages of the server, for {ROWS} rows");
    for ((side, at), total) in SIDES.into_iter().zip([asked, answered]) {
        let mut points = 0;
        // All at both ends, and some of those between.
        let between = (total / 40).max(1);
        let tried = (1..=total).filter(|nth| *nth <= 40 || nth + 40 > total || nth % between == 0);
        for (index, nth) in tried.enumerate() {
            let fault = in_turn(index);
            reading.proxy.strike(at(nth), fault);
            reading.goes_through(&format!("{fault:?} at message {nth} of {side}, of {total}"));
            points += reading.proxy.struck();
        }
        println!("the source was cut off at {points} messages of {side}");
        assert!(points >= 40, "the source was cut off at {points} messages of {side} only");
    }
}

/// The session that holds the snapshot is idle while others read: nobody notices at once that it is gone.
#[test]
fn a_snapshot_whose_session_was_lost_is_taken_anew() {
    let mut reading = Reading::new();
    reading.proxy.strike(At::Question(|text| text.contains("SET TRANSACTION SNAPSHOT")), Fault::CutOthers);
    reading.goes_through("the leading session is cut off before its snapshot is used");
    assert_eq!(reading.proxy.struck(), 1);
}

/// B4: patience ends, and what is told says with whom.
#[test]
fn a_server_that_hangs_up_again_and_again_is_given_up() {
    let proxy = Proxy::postgres(postgres().port);
    let mut ledger = Ledger::through(proxy.port, "append", "incremental: { cursor: id }", "retries: 1");
    ledger.arrive(true);
    published(&ledger, "undisturbed");
    let before = ledger.seen();
    let after = ledger.arrive(true);
    let place = format!("127.0.0.1:{}/postgres", proxy.port);
    for (what, at) in [
        ("nobody is let in", At::Client(1)),
        ("nobody is answered", At::Server(1)),
        ("nothing is committed", At::Question(COMMIT)),
    ] {
        for fault in [Fault::Cut, Fault::Tear, Fault::Reset] {
            proxy.strike_for_ever(at, fault);
            let output = ledger.command(&["run"]).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(75), "{what}, {fault:?}: {told}");
            let clear = ["error: ", "hint: ", place.as_str()].iter().all(|part| told.contains(part));
            assert!(clear, "{what}, {fault:?}: {told}");
            assert_eq!(proxy.struck(), 2, "{what}, {fault:?}: the run is tried twice: {told}");
            assert_eq!(ledger.seen(), before, "{what}, {fault:?}");
        }
    }
    proxy.pass();
    published(&ledger, "undisturbed again");
    assert_eq!(ledger.seen(), (after, before.1 + 1));
}

/// A proxy before the S3 server.
fn before_the_store() -> Proxy {
    Proxy::bytes(s3().endpoint.rsplit(':').next().unwrap().parse().unwrap())
}

/// How many bytes of each side of a run are tried.
const POSITIONS: usize = 20;

/// P19, P4: the release is there or not, and the exit code says which.
#[test]
fn a_bucket_whose_answers_are_cut_anywhere_is_all_or_nothing() {
    let proxy = before_the_store();
    let (mut points, mut failed) = (0, 0);
    for (mode, reading) in [MODES[0], MODES[1]] {
        let mut ledger = Ledger::stored_through(proxy.port, mode, reading, "");
        ledger.arrive(mode == "append");
        published(&ledger, mode);
        for (side, at) in SIDES {
            ledger.arrive(mode == "append");
            proxy.pass();
            published(&ledger, mode);
            let (sent, received) = proxy.messages();
            let total = if side == "clients" { sent } else { received };
            for position in 0..POSITIONS {
                let fault = [Fault::Cut, Fault::Reset][position % 2];
                let nth = total * position / POSITIONS + 1;
                let what = format!("{mode}: {fault:?} at byte {nth} of {side}, of {total}");
                let (before, releases) = ledger.seen();
                let after = ledger.arrive(mode == "append");
                proxy.strike(at(nth), fault);
                let output = ledger.command(&["run"]).output().unwrap();
                let told = String::from_utf8_lossy(&output.stderr);
                let code = output.status.code();
                assert!(matches!(code, Some(0 | 75)), "{what}: {code:?} {told}");
                assert_eq!(proxy.struck(), 1, "{what}");
                points += 1;
                let (rows, count) = ledger.seen();
                let landed = count > releases;
                assert_eq!(rows, if landed { after.clone() } else { before }, "{what}: {told}");
                assert_eq!(code == Some(0), landed, "{what}: {told}");
                assert_eq!(count, releases + u64::from(landed), "{what}: {told}");
                if !landed {
                    failed += 1;
                    assert!(told.contains("error: ") && told.contains("hint: "), "{what}: {told}");
                    published(&ledger, &what);
                    assert_eq!(ledger.seen(), (after, releases + 1), "{what}: run again");
                }
            }
        }
        let before = ledger.seen();
        assert_eq!(ledger.run()["outcome"], "nothing_new", "{mode}: once more");
        assert_eq!(ledger.seen(), before, "{mode}: once more");
    }
    println!("the bucket was cut off at {points} bytes; {failed} runs did not get through");
    assert!(points >= 40);
}

/// Whether a request puts an object whose name has this in it.
fn puts(request: &str, name: &str) -> bool {
    request.starts_with("PUT ") && request.lines().next().is_some_and(|line| line.contains(name))
}

/// Whether a request is one of them.
type Asks = fn(&str) -> bool;

/// What a release puts into a bucket.
const PUTS: [(&str, Asks); 4] = [
    ("the probe of conditional puts", |request| puts(request, "/_floodmark/probe/")),
    ("a file of rows", |request| puts(request, "/lines/")),
    ("the commit", |request| puts(request, "/commits/")),
    ("the hint at the newest release", |request| puts(request, "/latest")),
];

/// P2, P4: a put whose answer is lost was done, and the store refuses it a second time. A run knows its own.
#[test]
fn an_answer_of_a_bucket_that_is_lost_is_settled_and_never_guessed() {
    let proxy = before_the_store();
    for (mode, reading) in MODES {
        let mut ledger = Ledger::stored_through(proxy.port, mode, reading, "");
        for (put, is) in PUTS {
            for fault in [Fault::Cut, Fault::Reset] {
                let what = format!("{mode}: {fault:?} instead of the answer to {put}");
                let releases = ledger.seen().1 + 1;
                let after = ledger.arrive(mode == "append");
                proxy.strike(At::Answer(is), fault);
                let run = published(&ledger, &what);
                assert_eq!(proxy.struck(), 1, "{what}");
                assert_eq!(run["seq"], releases, "{what}");
                assert_eq!(ledger.seen(), (after, releases), "{what}");
            }
        }
    }
}
