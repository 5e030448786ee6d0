//! Two runs of one job at once. One of them stands still at some call to the outside for longer than its lease lasts, while the other
//! goes through; then it wakes up. Whatever either had done by then, no sequence number is given twice, no row is lost or doubled,
//! and who comes too late says so and ends with 75.

use std::{
    collections::BTreeSet,
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use serde_json::Value;

use crate::{
    ledger::{Ledger, MODES, Rows, trusted},
    services::{faults, is_stopped},
    support::Folder,
};

/// What comes of runs while one of them stands still.
const IMPATIENT: &str = "retries: 0, lease: 20ms";

pub(crate) fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether a process stands still; it may also have ended.
pub(crate) fn stands_still(process: &mut Child) -> bool {
    loop {
        if process.try_wait().unwrap().is_some() {
            return false;
        }
        if is_stopped(process.id()) == Some(true) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn signal(process: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(process.id()).unwrap()), signal).unwrap();
}

/// How rounds went, for one kind of target.
#[derive(Debug, Default)]
struct Fights {
    rounds: u32,
    stopped: AtomicU32,
    lost: u32,
    refused: AtomicU32,
    /// How often somebody looked meanwhile.
    polled: AtomicU32,
}

/// One run that stands still at its nth call, and one that goes through meanwhile.
fn fight(ledger: &Ledger, nth: usize, fights: &Fights) -> [Output; 2] {
    let arguments = ["run", "--output", "json"];
    let mut command = ledger.command(&arguments);
    command.env("LD_PRELOAD", faults()).env("FAULT", "stop").env("FAULT_AT", nth.to_string());
    let mut first = spawn(&mut command);
    let still = stands_still(&mut first);
    fights.stopped.fetch_add(u32::from(still), SeqCst);
    // Kept out until the lease has run out.
    let second = loop {
        let second = ledger.command(&arguments).output().unwrap();
        if !told(&second).contains("is being run already") {
            break second;
        }
        assert_eq!(second.status.code(), Some(75));
        fights.refused.fetch_add(1, SeqCst);
    };
    if still {
        signal(&first, Signal::SIGCONT);
    }
    [first.wait_with_output().unwrap(), second]
}

/// Whoever looks sees a release or the one after, and no part of one. SQLite lets nobody look while it commits.
fn seen_whole(ledger: &Ledger, target: &str, before: &Rows, after: &Rows, what: &str) {
    if target != "sqlite" {
        let (rows, _) = ledger.seen();
        assert!([before, after].contains(&&rows), "{what}: {rows:?} is no release");
    }
    if target == "files" {
        let rows = ledger.seen_in_current();
        assert!([before, after].contains(&&rows), "{what}: {rows:?} is no release, in `current`");
    }
    std::thread::sleep(Duration::from_millis(5));
}

fn fifty_two_rounds(target: &str) {
    let more = match target {
        "postgres" => format!("{}, lock_timeout_ms: 300", trusted()),
        _ => "busy_timeout_ms: 300".to_owned(),
    };
    let mut fights = Fights::default();
    for (mode, reading) in MODES {
        let mut ledger = Ledger::limited(target, mode, reading, IMPATIENT, &more);
        ledger.arrive(mode == "append");
        ledger.run();
        ledger.arrive(mode == "append");
        let calls = ledger.counted();
        let mut before = ledger.seen();
        for round in 0..13 {
            fights.rounds += 1;
            let after = ledger.arrive(mode == "append");
            let nth = calls * (round + 1) / 14 + 1;
            let what = format!("{target}, {mode}, stopped at {nth}");
            let done = AtomicBool::new(false);
            let runs = std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(SeqCst) {
                        fights.polled.fetch_add(1, SeqCst);
                        seen_whole(&ledger, target, &before.0, &after, &what);
                    }
                });
                let runs = fight(&ledger, nth, &fights);
                done.store(true, SeqCst);
                runs
            });
            let made = ledger.runs();
            let mut published = BTreeSet::new();
            for run in &runs {
                let (code, told) = (run.status.code(), told(run));
                let document: Value = serde_json::from_slice(&run.stdout).unwrap_or_default();
                match (code, document["outcome"].as_str()) {
                    (Some(0), Some("published")) => {
                        let seq = document["seq"].as_u64().unwrap();
                        // One that stands still behind its seal is published by the other one, and finds that when it goes on.
                        let own = made.get(&seq).map(String::as_str) == document["run_id"].as_str();
                        let sealed = document["warnings"].to_string().contains("which a run had sealed");
                        assert!(own || sealed, "{what}: {document}");
                        published.insert(seq);
                    }
                    (Some(0), Some("nothing_new")) => {}
                    (Some(75), _) => fights.lost += 1,
                    other => assert_eq!(other, (Some(0), Some("published")), "{what}: {told}"),
                }
            }
            let [first, second] = &runs;
            assert!(
                first.status.success() || second.status.success(),
                "{what}: {}{}",
                told(first),
                told(second)
            );
            let (rows, releases) = ledger.seen();
            assert_eq!(rows, after, "{what}");
            // Ranges are loaded again, and hold the same.
            let most = if mode.starts_with("replace_range") { 2 } else { 1 };
            let new: BTreeSet<u64> = (before.1 + 1..=releases).collect();
            assert!(!new.is_empty() && new.len() <= most, "{what}: {releases} after {}", before.1);
            assert_eq!(published, new, "{what}: each release is one run's");
            before = (rows, releases);
        }
        ledger.run();
        assert_eq!(ledger.seen().0, before.0, "{target}, {mode}: once more");
    }
    println!("{target}: {fights:?}");
    let (stopped, polled) = (fights.stopped.load(SeqCst), fights.polled.load(SeqCst));
    assert!(
        fights.rounds >= 50 && stopped >= 40 && fights.lost >= 5 && polled >= 100,
        "{target}: {fights:?}"
    );
}

#[test]
fn two_runs_into_files_never_commit_the_same_release() {
    fifty_two_rounds("files");
}

#[test]
fn two_runs_into_sqlite_never_commit_the_same_release() {
    fifty_two_rounds("sqlite");
}

#[test]
fn two_runs_into_postgres_never_commit_the_same_release() {
    fifty_two_rounds("postgres");
}

#[test]
fn two_runs_into_a_bucket_never_commit_the_same_release() {
    fifty_two_rounds("s3");
}

#[test]
fn a_second_run_is_kept_out_and_told_by_whom() {
    let folder = Folder::with(&[]);
    let mut first = spawn(
        folder.command(&["run"]).env("LD_PRELOAD", faults()).env("FAULT", "stop").env("FAULT_AT", "12"),
    );
    assert!(stands_still(&mut first));
    let second = folder.floodmark(&["run"]);
    let said = told(&second);
    assert_eq!(second.status.code(), Some(75), "{said}");
    assert!(said.contains("job `load` is being run already"), "{said}");
    assert!(said.contains(&format!("process {}", first.id())) && said.contains("hint: "), "{said}");
    // Who is killed keeps nobody out.
    signal(&first, Signal::SIGKILL);
    first.wait().unwrap();
    let third = folder.floodmark(&["run"]);
    assert!(third.status.success(), "{}", told(&third));
}

/// What a stopped run has staged may still be committed: it is nobody's garbage.
#[test]
fn what_a_stopped_run_has_staged_is_not_cleaned_up() {
    let mut ledger = Ledger::limited("files", "append", "incremental: { cursor: id }", IMPATIENT, "");
    ledger.arrive(true);
    ledger.run();
    ledger.arrive(true);
    let calls = ledger.counted();
    let mut refused = 0;
    for part in 1..20 {
        let after = ledger.arrive(true);
        let mut command = ledger.command(&["run"]);
        command.env("LD_PRELOAD", faults()).env("FAULT", "stop");
        let mut run = spawn(command.env("FAULT_AT", (calls * part / 20).to_string()));
        let still = stands_still(&mut run);
        let commits = still && ledger.seen().0 != after;
        let clean = ledger.command(&["clean", "--grace", "0s", "--force"]).output().unwrap();
        // Before it has its lease it has staged nothing.
        assert!(matches!(clean.status.code(), Some(0 | 75)), "{part} of 20: {}", told(&clean));
        refused += u32::from(commits && clean.status.code() == Some(75));
        if still {
            signal(&run, Signal::SIGCONT);
        }
        let run = run.wait_with_output().unwrap();
        assert!(run.status.success(), "{part} of 20: {}", told(&run));
        assert_eq!(ledger.seen().0, after, "{part} of 20");
    }
    assert!(refused >= 3, "{refused}");
}

/// P29: a range is read again while a run goes through: nothing is lost or doubled, and what the run marked stays marked.
#[test]
fn a_backfill_beside_a_run_loses_and_doubles_nothing() {
    let mut ledger = Ledger::limited(
        "sqlite",
        "merge, key: [id]",
        "incremental: { cursor: id }",
        IMPATIENT,
        "busy_timeout_ms: 300",
    );
    for _ in 0..4 {
        ledger.arrive(true);
    }
    ledger.run();
    let (mut lost, mut both) = (0, 0);
    for nth in (4..100).step_by(8) {
        // What was corrected behind the watermark only a backfill sees.
        ledger.source("UPDATE lines SET amount = amount + 100 WHERE id < 4");
        let after = ledger.arrive(true);
        let backfill = ["backfill", "load", "--from", "1", "--to", "4", "--output", "json"];
        let mut command = ledger.command(&backfill);
        command.env("LD_PRELOAD", faults()).env("FAULT", "stop").env("FAULT_AT", nth.to_string());
        let mut first = spawn(&mut command);
        let still = stands_still(&mut first);
        let second = loop {
            let second = ledger.command(&["run"]).output().unwrap();
            if !told(&second).contains("is being run already") {
                break second;
            }
        };
        if still {
            signal(&first, Signal::SIGCONT);
        }
        let first = first.wait_with_output().unwrap();
        for run in [&first, &second] {
            assert!(matches!(run.status.code(), Some(0 | 75)), "{nth}: {}", told(run));
            lost += u32::from(run.status.code() == Some(75));
        }
        both += u32::from(first.status.success() && second.status.success());
        let again = ledger.command(&backfill).output().unwrap();
        assert!(again.status.success(), "{nth}: {}", told(&again));
        ledger.run();
        assert_eq!(ledger.seen().0, after, "{nth}");
        let nothing = ledger.run();
        assert_eq!(nothing["sources"]["lines"]["counts"]["extracted"], 0, "{nth}: the watermark stays");
    }
    assert!(lost >= 1 && both >= 1, "{lost} lost, {both} went through side by side");
}
