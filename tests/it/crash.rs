//! The real binary, killed: before each of its calls that change the world outside, for every kind of target and every
//! mode. After each death a reader sees what was there before or what is there after, and nothing else; then it is run again.
//!
//! A library before the C library counts the calls and kills (`tests/services/faults.c`). What one death leaves behind is what the next
//! run starts from, as it is in life.

use std::fs;

use serde_json::Value;

use crate::{
    ledger::{Ledger, MODES, Rows, next},
    services::faults,
};

/// A target that faults come upon: what it holds, what it should hold after the next release, and how many there were.
struct Tried {
    ledger: Ledger,
    target: &'static str,
    mode: &'static str,
    before: Rows,
    after: Rows,
    releases: u64,
    /// Whether the last death left something that the next run will commit.
    was_sealed: bool,
}

impl Tried {
    /// One for each mode.
    fn modes(target: &'static str) -> impl Iterator<Item = Self> {
        MODES.into_iter().map(move |(mode, reading)| {
            let mut ledger = Ledger::new(target, mode, reading);
            let after = ledger.arrive(mode == "append");
            Self { ledger, target, mode, before: Rows::new(), after, releases: 0, was_sealed: false }
        })
    }

    /// Whether the release landed in spite of the fault at `nth`. The target holds what was there before or what is there after.
    fn landed(&mut self, nth: usize) -> bool {
        let (rows, count) = self.ledger.seen();
        let landed = count > self.releases;
        let expected = if landed { &self.after } else { &self.before };
        assert_eq!(&rows, expected, "{}, {}: a fault at {nth}, release {count}", self.target, self.mode);
        if self.target == "files" {
            // Behind the commit `current` may be the release before, and is never a part of one.
            let shown = self.ledger.seen_in_current();
            let releases = [&self.before, expected];
            assert!(
                releases.contains(&&shown),
                "files, {}: a fault at {nth}: {shown:?} in `current`",
                self.mode
            );
        }
        // What a death had sealed is a release of its own, before that of the run which finds it.
        let at_most = self.releases + 1 + u64::from(self.was_sealed);
        assert!(count <= at_most, "{}, {}, {nth}: release {count}", self.target, self.mode);
        self.was_sealed =
            !landed && ["files", "s3"].contains(&self.target) && !self.ledger.records_in("staged").is_empty();
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

/// How many calls to the outside a run makes that publishes its target's second release, and a fifth more.
fn calls_of_a_release(target: &str, mode: &str) -> usize {
    let reading = MODES.iter().find(|(name, _)| *name == mode).unwrap().1;
    let mut ledger = Ledger::new(target, mode, reading);
    ledger.arrive(mode == "append");
    ledger.run();
    ledger.arrive(mode == "append");
    ledger.counted() * 6 / 5
}

/// Kills runs into one kind of target, in all modes.
fn killed_everywhere(target: &'static str) {
    let mut points = 0;
    for mut tried in Tried::modes(target) {
        let mode = tried.mode;
        let calls = calls_of_a_release(target, mode);
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
            // A merge into files makes more calls with each release; those that it made of a young target were all tried.
            killed && nth <= calls
        } {
            nth += 1;
        }
        assert_eq!(tried.ledger.run()["outcome"], "published");
        assert_eq!(tried.ledger.seen(), (tried.after, tried.releases + 1), "{target}, {mode}: the last run");
    }
    println!("{target}: killed at {points} points");
    assert!(points >= 200, "{target}: killed at {points} points only");
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
        let calls = calls_of_a_release(target, mode);
        let mut nth = 1;
        // A merge into files writes more with each release; what it wrote of a young target was all tried.
        while nth <= calls
            && let Some((code, told)) = tried.ledger.is_full_at(nth)
        {
            points += 1;
            let was_sealed = tried.was_sealed;
            let landed = tried.landed(nth);
            // What comes after the commit is a cache, and a warning. What an earlier run had sealed may land before the disk is full.
            assert!(landed || code != 0, "{target}, {mode}, {nth}: {told}");
            assert!(!landed || code == 0 || was_sealed, "{target}, {mode}, {nth}: {told}");
            if code != 0 {
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
            nth = next(nth, 10, mode);
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

/// W21: a target that was restored from a backup is filled again from where its own record stands.
#[test]
fn a_target_that_was_set_back_is_filled_again() {
    for target in ["files", "sqlite", "postgres", "s3"] {
        for (mode, reading) in MODES {
            let mut ledger = Ledger::new(target, mode, reading);
            ledger.arrive(mode == "append");
            ledger.run();
            let backup = ledger.backup();
            for _ in 0..2 {
                ledger.arrive(mode == "append");
                ledger.run();
            }
            assert_eq!(ledger.seen().1, 3);
            ledger.restore(&backup);
            assert_eq!(ledger.seen().1, 1, "{target}, {mode}");
            let expected = ledger.arrive(mode == "append");
            let run = ledger.run();
            assert_eq!(ledger.seen(), (expected, 2), "{target}, {mode}");
            assert!(run["warnings"].to_string().contains("it was set back"), "{target}, {mode}: {run}");
        }
    }
}

/// A ledger with a release that a run had sealed when it was killed: behind how many others, and the seal.
fn sealed(target: &'static str, mode: &'static str) -> (Ledger, usize, String) {
    let calls = calls_of_a_release(target, mode);
    let reading = MODES.iter().find(|(name, _)| *name == mode).unwrap().1;
    let mut ledger = Ledger::new(target, mode, reading);
    ledger.arrive(mode == "append");
    ledger.run();
    ledger.arrive(mode == "append");
    let (mut nth, mut releases) = (calls / 6, 1);
    for _ in 0..1000 {
        ledger.is_killed_at(nth);
        let now = ledger.seen().1;
        let seal = ledger
            .records_in("staged")
            .into_iter()
            .find(|seal| serde_json::from_str::<Value>(seal).unwrap()["seq"].as_u64() > Some(now));
        if now > releases {
            // How a run's calls to a bucket come one behind the other is not always the same: it was passed by.
            ledger.arrive(mode == "append");
            ledger.run();
            ledger.arrive(mode == "append");
            (nth, releases) = (nth - 5, ledger.seen().1);
        } else if let Some(seal) = seal {
            return (ledger, usize::try_from(releases).unwrap(), seal);
        } else {
            nth += 1;
        }
    }
    unreachable!("{target}, {mode}: no run was killed between its seal and its commit");
}

fn warns(run: &Value, of: &str) -> bool {
    run["warnings"].as_array().into_iter().flatten().any(|told| told.as_str().unwrap().contains(of))
}

/// What a run had sealed is what the next one commits, byte for byte; then that one goes on.
#[test]
fn what_was_sealed_is_committed_by_the_next_run_and_not_made_again() {
    for target in ["files", "s3"] {
        for (mode, _) in MODES {
            let (mut ledger, releases, seal) = sealed(target, mode);
            let after = ledger.arrive(mode == "append");
            let run = ledger.run();
            let what = format!("{target}, {mode}: {run}");
            assert!(warns(&run, &format!("release {}, which a run had sealed", releases + 1)), "{what}");
            assert_eq!(ledger.records_in("commits")[releases], seal, "{what}");
            assert_eq!(ledger.seen(), (after, releases as u64 + 2), "{what}");
            assert!(ledger.records_in("staged").is_empty(), "{what}");
        }
        // It is published also where nothing else is new.
        let (ledger, releases, seal) = sealed(target, "append");
        let run = ledger.run();
        assert_eq!(
            (&run["outcome"], &run["seq"]),
            (&"published".into(), &(releases + 1).into()),
            "{target}: {run}"
        );
        assert_eq!(ledger.records_in("commits")[releases..], [seal], "{target}");
        assert_eq!(ledger.run()["outcome"], "nothing_new", "{target}");
    }
}

/// What was sealed by a job that is another one now, or is loaded anew, is made again, and is garbage from then on; before it is not.
#[test]
fn what_was_sealed_by_a_job_that_is_another_one_now_is_made_again() {
    for target in ["files", "s3"] {
        for anew in [false, true] {
            let (mut ledger, releases, seal) = sealed(target, "append");
            let clean = || {
                let arguments = ["clean", "--grace", "0s", "--force", "--output", "json"];
                let output = ledger.command(&arguments).output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                String::from_utf8(output.stdout).unwrap()
            };
            let attempt: Value = serde_json::from_str(&seal).unwrap();
            let attempt = attempt["attempt_id"].as_str().unwrap().replace('-', "");
            // Behind a dot are files that have no name yet: they are garbage.
            let own = |told: &str| {
                let seal = format!("-{attempt}.json\"");
                let data = format!("-{}-0000.parquet\"", attempt.get(20..).unwrap());
                (told.contains(&seal), told.contains(&data))
            };
            assert_eq!(own(&clean()), (false, false), "{target}: it may be committed");
            let run = if anew {
                let output = ledger.command(&["run", "--full-refresh", "--output", "json"]).output().unwrap();
                serde_json::from_slice(&output.stdout).unwrap()
            } else {
                let job = fs::read_to_string(ledger.folder.path().join("jobs/load.yaml")).unwrap();
                let job = job.replace("job: load\n", "job: load\ndescription: another one\n");
                ledger.folder.write("jobs/load.yaml", job.as_bytes());
                ledger.run()
            };
            let what = format!("{target}, anew: {anew}: {run}");
            assert_eq!(run["outcome"], "published", "{what}");
            assert_eq!(warns(&run, "is not published: it is made again"), !anew, "{what}");
            assert_ne!(ledger.records_in("commits")[releases], seal, "{what}");
            assert_eq!(own(&clean()), (true, true), "{what}");
            assert!(ledger.records_in("staged").is_empty(), "{what}");
            let after = ledger.arrive(true);
            ledger.run();
            assert_eq!(ledger.seen(), (after, releases as u64 + 2), "{what}");
        }
    }
}

/// A job that is another one now and has nothing new takes the place of what was sealed all the same: it would come back with the old job.
#[test]
fn what_was_sealed_and_refused_never_comes_back() {
    let (ledger, releases, seal) = sealed("files", "replace");
    let before = ledger.seen().0;
    ledger.source("DELETE FROM lines WHERE id = (SELECT max(id) FROM lines); UPDATE lines SET amount = amount - 100 WHERE id % 2 = 0");
    let job = fs::read(ledger.folder.path().join("jobs/load.yaml")).unwrap();
    ledger.folder.write("jobs/load.yaml", &[&job[..], b"# mended\n"].concat());
    let run = ledger.run();
    assert!(warns(&run, "is not published"), "{run}");
    ledger.folder.write("jobs/load.yaml", &job);
    let run = ledger.run();
    assert!(!warns(&run, "sealed"), "{run}");
    assert_eq!(ledger.seen(), (before, releases as u64 + 1), "{run}");
    assert!(!ledger.records_in("commits").contains(&seal), "{run}");
}

/// Orphans: what attempts that died had staged is found, and nothing that any release lists.
#[test]
fn what_dead_attempts_left_behind_is_removed_and_nothing_else() {
    for target in ["files", "s3"] {
        let mut ledger = Ledger::new(target, "merge, key: [id]", "");
        ledger.arrive(false);
        ledger.run();
        ledger.arrive(false);
        let calls = ledger.counted();
        let before = ledger.seen();
        let whole = ledger.paths();
        for part in 5..20 {
            ledger.arrive(false);
            ledger.is_killed_at(calls * part / 20);
            if ledger.seen().1 > before.1 {
                break;
            }
        }
        let (rows, releases) = ledger.seen();
        let left = ledger.paths();
        let clean = |arguments: &[&str]| {
            let output =
                ledger.command(&[&["clean", "--output", "json"], arguments].concat()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        assert_eq!(clean(&[])["files"], serde_json::json!([]), "{target}: they may be of a run that goes on");
        let shown = clean(&["--grace", "0s", "--dry-run"]);
        let found = shown["files"].as_array().unwrap().clone();
        assert!(!found.is_empty() && shown["removed"] == false, "{target}: {shown}");
        assert_eq!(ledger.paths(), left, "{target}: a dry run");
        assert_eq!(clean(&["--grace", "0s", "--force"])["files"], shown["files"], "{target}");
        let gone: Vec<String> = left.iter().filter(|path| !ledger.paths().contains(path)).cloned().collect();
        let told: Vec<&str> = found.iter().map(|file| file["path"].as_str().unwrap()).collect();
        assert_eq!(gone, told, "{target}");
        assert!(whole.iter().all(|path| !gone.contains(path)), "{target}: old releases stay");
        assert_eq!(ledger.seen(), (rows, releases), "{target}");
        ledger.run();
        assert_eq!(clean(&["--grace", "0s", "--force"])["files"], serde_json::json!([]), "{target}");
    }
}

/// P7: the place of a target is taken by another one, with a history of the same job. Nothing is skipped over, and nothing written until
/// somebody says that it is the right one.
#[test]
fn a_target_that_was_swapped_is_refused_until_it_is_adopted() {
    for target in ["files", "sqlite", "postgres", "s3"] {
        let (mut here, mut there) = (
            Ledger::new(target, "append", "incremental: { cursor: id }"),
            Ledger::new(target, "append", "incremental: { cursor: id }"),
        );
        for ledger in [&mut here, &mut there] {
            ledger.arrive(true);
            ledger.run();
        }
        // The other one is a release ahead.
        let both = there.arrive(true);
        there.run();
        here.swap(&there.backup(), &there);
        let (rows, releases) = here.seen();
        assert_eq!((&rows, releases), (&both, 2), "{target}");
        let expected = {
            here.arrive(true);
            here.arrive(true)
        };
        let refused = here.command(&["run"]).output().unwrap();
        let told = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(3), "{target}: {told}");
        assert!(told.contains("its history began anew") && told.contains("state adopt"), "{target}: {told}");
        assert_eq!(here.seen(), (rows, releases), "{target}: nothing was written");
        let adopted = here.command(&["state", "adopt", "load"]).output().unwrap();
        assert!(adopted.status.success(), "{target}: {}", String::from_utf8_lossy(&adopted.stderr));
        here.run();
        assert_eq!(here.seen(), (expected, 4), "{target}");
    }
}

/// A target that was emptied together with its record is filled anew, and that is said.
#[test]
fn a_target_that_was_emptied_is_filled_anew() {
    for target in ["files", "sqlite", "postgres", "s3"] {
        let mut ledger = Ledger::new(target, "append", "incremental: { cursor: id }");
        ledger.arrive(true);
        ledger.run();
        ledger.empty();
        let expected = ledger.arrive(true);
        let run = ledger.run();
        assert_eq!(ledger.seen(), (expected, 1), "{target}");
        assert!(run["warnings"].to_string().contains("it is filled anew"), "{target}: {run}");
    }
}

/// The calls on files of the target that a run makes: what, on what, and to what.
fn calls_of(ledger: &Ledger, fails: Option<usize>) -> (std::process::Output, Vec<[String; 3]>) {
    let log = ledger.folder.path().join("calls");
    drop(fs::remove_file(&log));
    let mut command = ledger.command(&["run"]);
    command.env("LD_PRELOAD", faults()).env("FAULT_LOG", &log);
    if let Some(nth) = fails {
        command.env("FAULT_FSYNC", nth.to_string());
    }
    let output = command.output().unwrap();
    let text = fs::read_to_string(&log).unwrap();
    let calls = text.lines().filter(|line| line.contains("/out/") || line.contains("/out\t")).map(|line| {
        let mut parts = line.split('\t').map(str::to_owned);
        std::array::from_fn(|_| parts.next().unwrap())
    });
    (output, calls.collect())
}

/// P11: a file gets its name once what it holds was flushed, the folder is flushed behind it, and all of it before the manifest that lists it.
#[test]
fn what_has_its_name_was_flushed_before_and_its_folder_after() {
    let mut ledger = Ledger::new("files", "merge, key: [id]", "");
    for _ in 0..3 {
        ledger.arrive(false);
        let (output, calls) = calls_of(&ledger, None);
        assert!(output.status.success());
        let last = |what: &[&str], path: &str, before: usize| {
            calls[..before].iter().rposition(|[call, on, _]| what.contains(&call.as_str()) && on == path)
        };
        // A release's own links, and `current`, are no data: the next run repairs them.
        let is_data = |to: &str| to.contains("/data/") || to.contains("/commits/");
        let named = calls.iter().enumerate().filter(|(_, [call, _, to])| {
            ["rename", "link", "linkat"].contains(&call.as_str()) && is_data(to) && !to.contains("/releases/")
        });
        let mut names = Vec::new();
        for (at, [_, from, to]) in named {
            let written = last(&["write", "writev", "pwrite64"], from, at).unwrap();
            let flushed = last(&["fsync", "fdatasync"], from, at);
            assert!(
                flushed.is_some_and(|flushed| flushed > written),
                "{to} has its name before it is flushed"
            );
            let folder = to.rsplit_once('/').unwrap().0;
            let behind = calls[at..].iter().position(|[call, on, _]| call == "fsync" && on == folder);
            names.push((
                at,
                behind.unwrap_or_else(|| unreachable!("the folder of {to} is not flushed")) + at,
                to,
            ));
        }
        let (commit, _, path) = *names.last().unwrap();
        assert!(path.contains("/commits/") && names.len() >= 2, "{names:?}");
        assert!(names[..names.len() - 1].iter().all(|(_, flushed, _)| *flushed < commit), "{names:?}");
    }
}

/// What failed to be flushed is never flushed again, nor named: the kernel may have forgotten it.
#[test]
fn what_could_not_be_flushed_is_thrown_away() {
    let mut ledger = Ledger::new("files", "replace", "");
    ledger.arrive(false);
    ledger.run();
    let (mut failed, mut landed) = (0, 0);
    for nth in 1..=40 {
        let before = ledger.seen();
        let after = ledger.arrive(false);
        let (output, calls) = calls_of(&ledger, Some(nth));
        let Some(at) = calls.iter().position(|[call, ..]| call == "failed") else {
            // One of the local store, or there are not so many.
            assert!(output.status.success());
            continue;
        };
        failed += 1;
        let path = &calls[at][1];
        let again = calls[at..].iter().skip(1).any(|[call, on, _]| {
            on == path && !fs::metadata(path).is_ok_and(|meta| meta.is_dir()) && call != "unlink"
        });
        assert!(!again, "{path} was used again: {:?}", &calls[at..]);
        let (rows, releases) = ledger.seen();
        assert!(rows == after || (rows == before.0 && releases == before.1), "flush {nth} of {path}");
        assert!(output.status.success() == (releases > before.1), "flush {nth} of {path}");
        landed += u32::from(releases > before.1);
        ledger.run();
        assert_eq!(ledger.seen().0, after, "flush {nth}");
    }
    println!("{failed} flushes failed, {landed} of them behind the commit");
    assert!(failed >= 5, "{failed}");
}
