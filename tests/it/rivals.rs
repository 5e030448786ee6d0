//! Two runs of one job at once. One of them stands still at some call to the outside for longer than its lease lasts, while the other
//! goes through; then it wakes up. Whatever either had done by then, no sequence number is given twice, no row is lost or doubled,
//! and who comes too late says so and ends with 75.

use std::{
    fs,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    ledger::{Ledger, MODES},
    services::{faults, postgres},
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
        // Its state stands behind its name, which is in brackets.
        let about = fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap_or_default();
        if about.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T')) {
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
    stopped: u32,
    lost: u32,
    refused: u32,
}

fn fifty_rounds(target: &str) {
    let more = match target {
        "postgres" => format!("sslrootcert: {}, lock_timeout_ms: 300", postgres().authority),
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
            let mut first = spawn(
                ledger
                    .command(&["run"])
                    .env("LD_PRELOAD", faults())
                    .env("FAULT", "stop")
                    .env("FAULT_AT", nth.to_string()),
            );
            let still = stands_still(&mut first);
            fights.stopped += u32::from(still);
            // Kept out until the lease has run out.
            let second = loop {
                let second = ledger.command(&["run"]).output().unwrap();
                if !told(&second).contains("is being run already") {
                    break second;
                }
                assert_eq!(second.status.code(), Some(75));
                fights.refused += 1;
            };
            if still {
                signal(&first, Signal::SIGCONT);
            }
            let first = first.wait_with_output().unwrap();
            let what = format!("{target}, {mode}, stopped at {nth}");
            for run in [&first, &second] {
                let (code, told) = (run.status.code(), told(run));
                assert!(matches!(code, Some(0 | 75)), "{what}: {code:?} {told}");
                fights.lost += u32::from(code == Some(75));
            }
            assert!(
                first.status.success() || second.status.success(),
                "{what}: {}{}",
                told(&first),
                told(&second)
            );
            let (rows, releases) = ledger.seen();
            assert_eq!(rows, after, "{what}");
            let most = if mode.starts_with("replace_range") { 2 } else { 1 };
            assert!(
                releases > before.1 && releases <= before.1 + most,
                "{what}: {releases} after {}",
                before.1
            );
            before = (rows, releases);
        }
        ledger.run();
        assert_eq!(ledger.seen().0, before.0, "{target}, {mode}: once more");
    }
    println!("{target}: {fights:?}");
    assert!(fights.rounds >= 50 && fights.stopped >= 40 && fights.lost >= 5, "{target}: {fights:?}");
}

#[test]
fn two_runs_into_files_never_commit_the_same_release() {
    fifty_rounds("files");
}

#[test]
fn two_runs_into_sqlite_never_commit_the_same_release() {
    fifty_rounds("sqlite");
}

#[test]
fn two_runs_into_postgres_never_commit_the_same_release() {
    fifty_rounds("postgres");
}

#[test]
fn two_runs_into_a_bucket_never_commit_the_same_release() {
    fifty_rounds("s3");
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
