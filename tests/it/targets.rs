//! What every target promises, through the binary: the same steps for a folder and for SQLite.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::support::Folder;

const TARGETS: [(&str, &str); 2] =
    [("a folder", "{ kind: files, root: out }"), ("SQLite", "{ kind: sqlite, path: out/target.db }")];

fn project(target: &str, output: &str, more: &str) -> Folder {
    let connections = format!("data: {{ kind: files, root: data }}\nlake: {target}\n");
    let job = format!(
        "job: load\nsources:\n  orders:\n    connection: data\n    file: orders.csv\n    columns: {{ id: int, period: string, amount: \"decimal(18,2)\" }}\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: {{ from: clean, {output} }}\n{more}"
    );
    Folder::with(&[
        ("connections.yaml", &connections),
        ("jobs/load.yaml", &job),
        ("sql/mappings/load/clean.sql", "SELECT * FROM orders\n"),
    ])
}

fn load(folder: &Folder, rows: &str, arguments: &[&str]) -> (i32, Value) {
    folder.write("data/orders.csv", format!("id,period,amount\n{rows}").as_bytes());
    let (code, mut runs) = folder.run(arguments);
    (code, runs.remove(0))
}

fn counts(run: &Value) -> [u64; 5] {
    let output = &run["outputs"]["orders"];
    ["inserted", "updated", "unchanged", "deleted", "rows_after"].map(|key| output[key].as_u64().unwrap())
}

/// Every row that a reader sees, as text, sorted.
fn rows(folder: &Folder) -> Vec<String> {
    folder.write(
        "jobs/look.yaml",
        b"job: look\nsources:\n  seen: { connection: lake, table: orders }\nmodels: { all: sql/all.sql }\ntarget:\n  connection: data\n  outputs: { nothing: { from: all, mode: replace } }\n",
    );
    folder.write("sql/all.sql", b"SELECT * FROM seen\n");
    let output = folder.floodmark(&["preview", "look", "--output", "json", "--limit", "100"]);
    std::fs::remove_file(folder.path().join("jobs/look.yaml")).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let mut rows: Vec<String> = text
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            row.as_object()
                .unwrap()
                .values()
                .map(|value| value.as_str().unwrap_or("null").to_owned())
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    rows.sort();
    rows
}

#[test]
fn merge_updates_what_its_key_finds_and_touches_nothing_that_is_equal() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: merge, key: [id]", "");
        assert_eq!(
            counts(&load(&folder, "1,a,1.10\n2,a,2.20\n3,b,3.30\n", &[]).1),
            [3, 0, 0, 0, 3],
            "{name}"
        );
        let (_, run) = load(&folder, "2,a,2.25\n3,b,3.30\n4,b,4.40\n", &[]);
        assert_eq!(counts(&run), [1, 1, 1, 0, 4], "{name}");
        assert_eq!(rows(&folder), ["1 a 1.10", "2 a 2.25", "3 b 3.30", "4 b 4.40"], "{name}");
        let (code, run) = load(&folder, "2,a,2.25\n", &[]);
        assert_eq!((code, &run["outcome"]), (0, &json!("nothing_new")), "{name}");
        let (code, _) = load(&folder, "5,a,1.00\n5,a,2.00\n", &[]);
        assert_eq!(code, 3, "{name}: a key that comes twice");
        assert_eq!(rows(&folder).len(), 4, "{name}");
    }
}

#[test]
fn merge_changes_only_the_listed_columns() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: merge, key: [id], update: [amount]", "");
        load(&folder, "1,a,1.10\n", &[]);
        assert_eq!(
            counts(&load(&folder, "1,z,1.10\n", &[]).1)[1],
            0,
            "{name}: the period is not to be changed"
        );
        load(&folder, "1,z,1.20\n", &[]);
        assert_eq!(rows(&folder), ["1 a 1.20"], "{name}");
    }
}

#[test]
fn append_adds_and_replace_leaves_exactly_the_new_rows() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: append", "");
        load(&folder, "1,a,1.10\n", &[]);
        assert_eq!(counts(&load(&folder, "1,a,1.10\n", &[]).1), [1, 0, 0, 0, 2], "{name}");
        assert_eq!(rows(&folder), ["1 a 1.10", "1 a 1.10"], "{name}");
        let folder = project(target, "mode: replace", "");
        load(&folder, "1,a,1.10\n2,a,2.20\n", &[]);
        load(&folder, "3,a,3.30\n", &[]);
        assert_eq!(rows(&folder), ["3 a 3.30"], "{name}");
        let (code, run) = load(&folder, "3,a,3.30\n", &[]);
        assert_eq!((code, &run["outcome"]), (0, &json!("nothing_new")), "{name}: the same rows");
    }
}

#[test]
fn replace_range_replaces_the_ranges_that_the_run_produced_and_those_that_were_named() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: replace_range, range: [period]", "");
        load(&folder, "1,a,1.10\n2,a,2.20\n3,b,3.30\n4,c,4.40\n", &[]);
        let (_, run) = load(&folder, "5,a,5.50\n", &[]);
        assert_eq!(counts(&run), [1, 0, 0, 2, 3], "{name}");
        assert_eq!(rows(&folder), ["3 b 3.30", "4 c 4.40", "5 a 5.50"], "{name}");
        load(&folder, "5,a,5.55\n", &["--range", "b"]);
        assert_eq!(rows(&folder), ["4 c 4.40", "5 a 5.55"], "{name}");
    }
}

#[test]
fn a_new_column_is_refused_or_added_as_the_contract_says() {
    for (name, target) in TARGETS {
        for (contract, expected) in [("", 3), ("  contract: { new_column: add }\n", 0)] {
            let folder = project(target, "mode: merge, key: [id]", contract);
            load(&folder, "1,a,1.10\n2,a,2.20\n", &[]);
            folder.write("sql/mappings/load/clean.sql", b"SELECT *, 'x' AS more FROM orders\n");
            let (code, _) = load(&folder, "2,a,2.25\n3,a,3.30\n", &[]);
            assert_eq!(code, expected, "{name}");
            let seen = if expected == 3 {
                vec!["1 a 1.10", "2 a 2.20"]
            } else {
                vec!["1 a 1.10 null", "2 a 2.25 x", "3 a 3.30 x"]
            };
            assert_eq!(rows(&folder), seen, "{name}");
        }
    }
}

#[test]
fn a_target_whose_history_is_not_ours_is_refused() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: append", "");
        load(&folder, "1,a,1.10\n", &[]);
        let before = folder.published();
        // The local store is only a cache: without it the target still knows.
        std::fs::remove_dir_all(folder.path().join(".floodmark")).unwrap();
        assert_eq!(load(&folder, "2,a,2.20\n", &[]).0, 0, "{name}");
        // Another job's rows are not ours to continue.
        let text = std::fs::read_to_string(folder.path().join("jobs/load.yaml")).unwrap();
        folder.write("jobs/load.yaml", text.replace("job: load", "job: other").as_bytes());
        folder.write("sql/mappings/other/clean.sql", b"SELECT * FROM orders\n");
        let after = folder.published();
        assert_ne!(before, after);
        assert_eq!(load(&folder, "3,a,3.30\n", &[]).0, 3, "{name}");
        assert_eq!(folder.published(), after, "{name}");
    }
}

/// What the target holds and remembers.
fn state(folder: &Folder) -> (Vec<String>, Value) {
    let output = folder.floodmark(&["state", "show", "--output", "json"]);
    (rows(folder), serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_full_disk_at_any_write_leaves_the_target_as_it_was() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: merge, key: [id]", "");
        load(&folder, "1,2026-10,1.50\n2,2026-10,2.25\n", &[]);
        let before = state(&folder);
        let more: String = (1..=5000).map(|id| format!("{id},2026-11,{id}.75\n")).collect();
        folder.write("data/orders.csv", format!("id,period,amount\n{more}").as_bytes());
        // No file may grow beyond the limit, which fails writes as a full disk does: the first one, then later and
        // later ones, until the run fits.
        let (mut limit, mut full) = (1_u64, 0);
        loop {
            let run = format!(
                "trap '' XFSZ; ulimit -f {limit}; exec '{}' run --output json",
                env!("CARGO_BIN_EXE_floodmark")
            );
            let output = Command::new("bash").args(["-c", &run]).current_dir(folder.path()).output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.code() == Some(0) {
                break;
            }
            assert_eq!(output.status.code(), Some(1), "{name}, {limit} KiB: {told}");
            assert_eq!(state(&folder), before, "{name}, {limit} KiB");
            full += 1;
            limit += limit.div_ceil(2);
        }
        assert!(full > 3, "{name}: only {full} runs failed");
        assert_eq!(rows(&folder).len(), 100, "{name}: the most that the preview shows");
        assert_eq!(counts(&folder.run(&[]).1[0])[4], 5000, "{name}");
    }
}

#[test]
fn a_signal_ends_a_run_and_leaves_the_target_as_it_was() {
    for ((name, target), (signal, code)) in
        TARGETS.into_iter().zip([(Signal::SIGINT, 130), (Signal::SIGTERM, 143)])
    {
        let folder = project(target, "mode: merge, key: [id]", "");
        let lines: String = (1..=5000).map(|id| format!("{id},2026-11,{id}.75\n")).collect();
        load(&folder, &lines, &[]);
        let before = state(&folder);
        // 10^14 pairs of pairs, none of which is right: it would run for years.
        folder.write(
            "sql/mappings/load/clean.sql",
            b"SELECT a.* FROM orders a, orders b, orders c, orders d WHERE a.amount + b.amount + c.amount + d.amount < 0\n",
        );
        let mut run = folder.command(&["run", "-v"]).stderr(Stdio::piped()).spawn().unwrap();
        let mut told = BufReader::new(run.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("the window is fixed") {
            line.clear();
            assert_ne!(told.read_line(&mut line).unwrap(), 0, "{name}: the run ended");
        }
        kill(Pid::from_raw(run.id().try_into().unwrap()), signal).unwrap();
        let mut rest = String::new();
        told.read_to_string(&mut rest).unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(code), "{name}: {rest}");
        assert!(rest.contains("interrupted; nothing was published"), "{name}: {rest}");
        folder.write("sql/mappings/load/clean.sql", b"SELECT * FROM orders\n");
        assert_eq!(state(&folder), before, "{name}");
        assert_eq!(folder.run(&[]).1[0]["outcome"], "nothing_new", "{name}");
    }
}

/// What history makes of four nights, with versions that begin at the run's own time.
fn history(folder: &Folder) {
    let night = |day: &str, rows: &str| load(folder, rows, &["--as-of", day]);
    let (code, first) = night("2026-10-01", "1,a,1.10\n2,a,2.20\n");
    assert_eq!((code, counts(&first)), (0, [2, 0, 0, 0, 2]));
    let (_, same) = night("2026-10-02", "1,a,1.10\n2,a,2.20\n");
    assert_eq!(same["outcome"], "nothing_new");
    // One changes, one is gone, one is new.
    let (_, second) = night("2026-10-03", "1,a,1.15\n3,b,3.30\n");
    assert_eq!(counts(&second), [2, 2, 0, 0, 4]);
    // The one that was gone is back.
    let (_, third) = night("2026-10-04", "1,a,1.15\n2,a,2.20\n3,b,3.30\n");
    assert_eq!(counts(&third)[0], 1);
    // Too many are gone at once: a source that was read in part.
    let (code, refused) = night("2026-10-05", "1,a,1.15\n");
    assert_eq!(code, 3, "{refused}");
    let day = |day: u32| format!("2026-10-{day:02}T00:00:00Z");
    let expected = [
        format!("1 a 1.10 {} {}", day(1), day(3)),
        format!("1 a 1.15 {} null", day(3)),
        format!("2 a 2.20 {} {}", day(1), day(3)),
        format!("2 a 2.20 {} null", day(4)),
        format!("3 b 3.30 {} null", day(3)),
    ];
    assert_eq!(rows(folder), expected);
    assert_eq!(folder.run(&["--full-refresh"]).0, 2, "what no source has any more is not forgotten");
}

#[test]
fn history_keeps_every_version_of_a_row() {
    for (name, target) in TARGETS {
        println!("{name}");
        history(&project(target, "mode: history, key: [id], deletes: key_compare", ""));
    }
}

#[test]
fn history_goes_by_the_column_that_says_since_when() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: history, key: [id], effective: since", "");
        folder.write(
            "sql/mappings/load/clean.sql",
            b"SELECT id, amount, cast(period AS date) AS since FROM orders\n",
        );
        assert_eq!(load(&folder, "1,2026-10-01,1.10\n1,2026-10-05,1.50\n", &[]).0, 0, "{name}");
        // Late: it lies between the two, and the first one's amount is corrected.
        let (_, late) = load(&folder, "1,2026-10-03,1.30\n1,2026-10-01,1.15\n", &[]);
        assert_eq!(counts(&late), [1, 1, 1, 0, 3], "{name}");
        assert_eq!(
            rows(&folder),
            ["1 1.15 2026-10-01 2026-10-03", "1 1.30 2026-10-03 2026-10-05", "1 1.50 2026-10-05 null"],
            "{name}"
        );
        // What equals the version before it is none any more.
        let (_, back) = load(&folder, "1,2026-10-03,1.15\n", &[]);
        assert_eq!(counts(&back), [0, 1, 1, 1, 2], "{name}");
        assert_eq!(rows(&folder), ["1 1.15 2026-10-01 2026-10-05", "1 1.50 2026-10-05 null"], "{name}");
        assert_eq!(load(&folder, "1,2026-10-03,1.15\n", &["--full-refresh"]).0, 0, "{name}");
        assert_eq!(rows(&folder), ["1 1.15 2026-10-03 null"], "{name}");
    }
}

#[test]
fn rows_that_are_gone_are_deleted_or_marked() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: merge, key: [id], deletes: key_compare", "");
        load(&folder, "1,a,1.10\n2,a,2.20\n3,b,3.30\n", &[]);
        let (_, run) = load(&folder, "1,a,1.15\n3,b,3.30\n", &[]);
        assert_eq!(counts(&run), [0, 1, 1, 1, 2], "{name}");
        assert_eq!(rows(&folder), ["1 a 1.15", "3 b 3.30"], "{name}");
        let (code, refused) = load(&folder, "", &[]);
        assert_eq!(code, 3, "{name}: {refused}");

        let folder = project(target, "mode: merge, key: [id], deletes: soft", "");
        load(&folder, "1,a,1.10\n2,a,2.20\n", &["--as-of", "2026-10-01"]);
        let (_, run) = load(&folder, "1,a,1.10\n", &["--as-of", "2026-10-02"]);
        assert_eq!(counts(&run), [0, 1, 1, 0, 2], "{name}");
        assert_eq!(rows(&folder), ["1 a 1.10 null", "2 a 2.20 2026-10-02T00:00:00Z"], "{name}");
        // It stays gone since then, and is there again when it comes back.
        assert_eq!(
            load(&folder, "1,a,1.10\n", &["--as-of", "2026-10-03"]).1["outcome"],
            "nothing_new",
            "{name}"
        );
        load(&folder, "1,a,1.10\n2,a,2.50\n", &["--as-of", "2026-10-04"]);
        assert_eq!(rows(&folder), ["1 a 1.10 null", "2 a 2.50 null"], "{name}");
    }
}

#[test]
fn files_are_laid_into_folders_by_the_values_of_columns() {
    let folder = project(TARGETS[0].1, "mode: merge, key: [id], partition_by: [period]", "");
    let laid = || -> Vec<String> {
        let current = folder.path().join("out/orders/current/");
        let mut found: Vec<String> = std::fs::read_dir(current)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                format!(
                    "{} {}",
                    entry.file_name().to_str().unwrap(),
                    std::fs::read_dir(entry.path()).unwrap().count()
                )
            })
            .collect();
        found.sort();
        found
    };
    assert_eq!(
        load(&folder, "1,2026-10,1.10\n2,2026-11,2.20\n3,a/../b,3.30\n4,,4.40\n5,2026-10,5.50\n", &[]).0,
        0
    );
    assert_eq!(
        laid(),
        [
            "period=2026-10 1",
            "period=2026-11 1",
            "period=__HIVE_DEFAULT_PARTITION__ 1",
            "period=a%2F..%2Fb 1"
        ]
    );
    // A row moves to another folder, and nothing is left of it where it was.
    let (_, run) = load(&folder, "2,2026-10,2.20\n6,2026-12,6.60\n", &[]);
    assert_eq!(counts(&run), [1, 1, 0, 0, 6]);
    assert_eq!(
        laid(),
        [
            "period=2026-10 2",
            "period=2026-12 1",
            "period=__HIVE_DEFAULT_PARTITION__ 1",
            "period=a%2F..%2Fb 1"
        ]
    );
    assert_eq!(
        rows(&folder),
        [
            "1 2026-10 1.10",
            "2 2026-10 2.20",
            "3 a/../b 3.30",
            "4 null 4.40",
            "5 2026-10 5.50",
            "6 2026-12 6.60"
        ]
    );
    let folder = project(TARGETS[1].1, "mode: append, partition_by: [period]", "");
    folder.write("data/orders.csv", b"id,period,amount\n1,a,1\n");
    assert_eq!(folder.run(&[]).0, 2);
}

#[test]
fn history_takes_odd_columns_and_refuses_two_versions_that_begin_at_once() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: history, key: [id]", "");
        folder.write(
            "sql/mappings/load/clean.sql",
            b"SELECT id, period AS ended, amount AS pass, 1 AS nth FROM orders\n",
        );
        assert_eq!(load(&folder, "1,a,1.10\n", &["--as-of", "2026-10-01"]).0, 0, "{name}");
        let (code, run) = load(&folder, "1,b,1.10\n", &["--as-of", "2026-10-02"]);
        assert_eq!((code, counts(&run)), (0, [1, 1, 0, 0, 2]), "{name}");
        let (code, refused) = load(&folder, "1,b,1.10\n1,c,1.10\n", &["--as-of", "2026-10-03"]);
        assert!(
            code == 3 && refused["errors"][0].as_str().unwrap().contains("more than once"),
            "{name}: {refused}"
        );
        assert_eq!(folder.run(&["--full-refresh"]).0, 2, "{name}");
    }
    // What was marked as gone is marked though only some columns may change.
    let folder = project(TARGETS[1].1, "mode: merge, key: [id], deletes: soft, update: [amount]", "");
    load(&folder, "1,a,1.10\n2,a,2.20\n", &[]);
    assert_eq!(counts(&load(&folder, "1,a,1.10\n", &[]).1), [0, 1, 1, 0, 2]);
    assert_eq!(folder.run(&["--full-refresh"]).0, 2);
}

/// P27: what would be left without rows is refused where nobody allowed it, whatever else the guard says.
#[test]
fn no_rows_pass_only_where_the_job_allows_it() {
    for (name, target) in TARGETS {
        let folder = project(target, "mode: replace", "");
        assert_eq!(load(&folder, "1,a,1.10\n2,a,2.20\n", &[]).0, 0, "{name}");
        let before = folder.published();
        let (code, run) = load(&folder, "", &[]);
        assert_eq!(code, 3, "{name}");
        assert!(run["errors"].to_string().contains("would be left without rows"), "{name}: {run}");
        assert_eq!(folder.published(), before, "{name}");
        let job = std::fs::read_to_string(folder.path().join("jobs/load.yaml")).unwrap();
        folder.write("jobs/load.yaml", format!("{job}  guard: {{ allow_empty: true }}\n").as_bytes());
        let (code, run) = load(&folder, "", &[]);
        assert_eq!((code, counts(&run)[4]), (0, 0), "{name}: {run}");
        assert!(rows(&folder).is_empty(), "{name}");
    }
}
