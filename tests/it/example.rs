//! The worked example: two nights, nothing twice, totals tied, and every way to be refused leaves the target alone.

use serde_json::{Value, json};

use crate::support::Folder;

fn job<'a>(runs: &'a [Value], name: &str) -> &'a Value {
    runs.iter().find(|run| run["job"] == name).unwrap()
}

fn sum(total: &Value) -> &str {
    total["sums"][0][1].as_str().unwrap()
}

/// Sums of a relation's totals as they stand in the fixtures.
fn totals(part: &Value) -> Vec<(String, &str)> {
    part["totals"]
        .as_array()
        .unwrap()
        .iter()
        .map(|total| {
            (
                total["group"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|value| value.as_str().unwrap())
                    .collect::<Vec<_>>()
                    .join("/"),
                sum(total),
            )
        })
        .collect()
}

#[test]
fn the_first_night_publishes_everything_and_the_totals_tie_to_the_fixtures() {
    let folder = Folder::example();
    let (code, runs) = folder.run(&[]);
    assert_eq!(code, 0);
    let consolidated = job(&runs, "consolidate_ledgers");
    assert_eq!(consolidated["outcome"], "published");
    assert_eq!(consolidated["quarantined"], 1);
    assert_eq!(
        consolidated["sources"]["de_lines"]["counts"],
        json!({ "extracted": 7, "passed": 6, "filtered": 0, "rejected": 1 })
    );
    // Added up by hand from fixtures/day1.
    let us = [("1000", "1156051"), ("1100", "770001"), ("4000", "-1970051"), ("6100", "43999")];
    assert_eq!(
        totals(&consolidated["sources"]["us_lines"]),
        us.map(|(account, sum)| (account.to_owned(), sum))
    );
    let published = totals(&consolidated["outputs"]["finance.journal"]);
    for (group, expected) in [
        ("US/1000", "11560.51"),
        ("US/4000", "-19700.51"),
        ("DE/1200", "8249.25"),
        ("DE/8400", "-11900.00"),
        ("JP/411", "-1500000.00"),
        ("JP/611", "88001.00"),
    ] {
        assert!(published.contains(&(group.to_owned(), expected)), "{group} is {expected} in {published:?}");
    }
    let shown = folder.floodmark(&["quarantine", "show", "consolidate_ledgers", "--output", "json"]);
    let aside: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(aside["position"], "`gl_2026-10.csv` line 6, byte 223");
    assert_eq!(aside["reason"], "the row has 3 fields and the header 6");
    let balance = &job(&runs, "trial_balance")["outputs"]["trial_balance"]["totals"][0]["sums"];
    assert_eq!(balance[0][1], balance[1][1], "debits are credits");
}

#[test]
fn the_second_run_publishes_nothing_and_the_second_night_only_what_is_new_or_changed() {
    let folder = Folder::example();
    folder.run(&[]);
    let before = folder.published();
    let (code, runs) = folder.run(&[]);
    assert_eq!(code, 0);
    for run in &runs {
        assert_eq!(run["outcome"], "nothing_new", "{}", run["job"]);
    }
    let data = |files: &[(std::path::PathBuf, Vec<u8>)]| -> Vec<_> {
        files
            .iter()
            .filter(|(path, _)| path.extension().is_some_and(|ending| ending == "parquet"))
            .map(|(path, _)| path.clone())
            .collect()
    };
    assert_eq!(data(&folder.published()), data(&before), "no file is written again");

    let (code, runs) = folder.run(&["--env", "day2"]);
    assert_eq!(code, 0);
    let output = &job(&runs, "consolidate_ledgers")["outputs"]["finance.journal"];
    // Two late and two new lines in the US, two in Germany, two in Japan; one correction; the delivery that came twice
    // and the line that the overlap read again are unchanged.
    assert_eq!(
        (&output["inserted"], &output["updated"], &output["deleted"], &output["rows_after"]),
        (&json!(8), &json!(1), &json!(0), &json!(24))
    );
    assert!(job(&runs, "consolidate_ledgers")["warnings"].to_string().contains("gl_2026-10_again.csv"));
    assert_eq!(job(&runs, "trial_balance")["outcome"], "published");
    let (code, runs) = folder.run(&["--env", "day2"]);
    assert_eq!(code, 0);
    assert!(runs.iter().all(|run| run["outcome"] == "nothing_new"), "{runs:?}");
    let (code, _) = folder.run(&["--env", "day2", "--skip-code", "99"]);
    assert_eq!(code, 99);
}

#[test]
fn a_full_refresh_comes_to_the_same_rows() {
    let folder = Folder::example();
    folder.run(&[]);
    folder.run(&["--env", "day2"]);
    let (code, runs) = folder.run(&["--env", "day2", "--full-refresh"]);
    assert_eq!(code, 0);
    assert_eq!(job(&runs, "consolidate_ledgers")["outputs"]["finance.journal"]["rows_after"], 24);
}

#[test]
fn current_holds_hard_links_to_the_files_of_one_release() {
    let folder = Folder::example();
    for environment in ["day1", "day2"] {
        folder.run(&["--env", environment]);
        let commits = folder.path().join("out/lake/_floodmark/example/consolidate_ledgers/commits");
        let newest = std::fs::read_dir(commits).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
        let record: Value = serde_json::from_str(&std::fs::read_to_string(newest).unwrap()).unwrap();
        let mut listed: Vec<String> = record["outputs"]["finance.journal"]["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| file["path"].as_str().unwrap().trim_start_matches("data/").to_owned())
            .collect();
        let current = folder.path().join("out/lake/finance.journal/current");
        let mut shown: Vec<String> = std::fs::read_dir(current)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        listed.sort();
        shown.sort();
        assert_eq!(shown, listed);
    }
}

#[test]
fn a_failed_check_and_a_guard_leave_the_target_as_it_was() {
    let folder = Folder::example();
    folder.run(&[]);
    let before = folder.published();
    // A rate goes missing: the check refuses.
    folder.write("fixtures/reference/fx_rates.csv", b"currency,period,rate\nEUR,2026-10,1\n");
    let (code, runs) = folder.run(&["--env", "day2"]);
    assert_eq!(code, 3);
    assert_eq!(job(&runs, "consolidate_ledgers")["outcome"], "refused");
    assert_eq!(job(&runs, "trial_balance")["outcome"], "skipped");
    assert_eq!(folder.published(), before);
    // The whole ledger is gone: the guard refuses.
    let folder = Folder::with(&[(
        "jobs/load.yaml",
        "job: load\nsources:\n  orders: { connection: data, file: orders.csv, columns: { id: int, amount: \"decimal(18,2)\" } }\nmodels: { clean: }\ntarget:\n  connection: lake\n  outputs: { orders: { from: clean, mode: replace } }\n  guard: { max_shrink: 10% }\n",
    )]);
    assert_eq!(folder.run(&[]).0, 0);
    let before = folder.published();
    for text in ["id,customer,amount\n", "id,customer,amount\n1,ada,1.50\n"] {
        folder.write("data/orders.csv", text.as_bytes());
        assert_eq!(folder.run(&[]).0, 3);
        assert_eq!(folder.published(), before);
    }
}

#[test]
fn the_verbs_that_only_look_write_nothing() {
    let folder = Folder::example();
    for arguments in [
        &["check"][..],
        &["plan", "consolidate_ledgers"],
        &["plan", "trial_balance", "--output", "json"],
        &["preview", "consolidate_ledgers", "--model", "stg_us"],
        &["state", "show"],
        &["connections", "list"],
        &["connections", "test"],
        &["schema", "job"],
        &["schema", "connections"],
        &["completions", "bash"],
        &["runs"],
        &["quarantine", "list"],
        &["quarantine", "show", "consolidate_ledgers"],
    ] {
        let output = folder.floodmark(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!output.stdout.is_empty(), "{arguments:?} prints its result to stdout");
    }
    assert!(folder.published().is_empty());
}

#[test]
fn a_new_project_runs_at_once() {
    let folder = Folder::with(&[]);
    let made = folder.floodmark(&["init", "fresh"]);
    assert!(made.status.success());
    let output = folder.floodmark(&["run", "--project", "fresh"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        folder.floodmark(&["init", "fresh"]).status.code(),
        Some(2),
        "it does not overwrite a project"
    );
}

#[test]
fn the_environment_gives_parameters_connections_and_flags_and_a_flag_beats_it() {
    let folder = Folder::example();
    let elsewhere = folder.path().join("else where").join("lake");
    let url = format!("file://{}", elsewhere.to_str().unwrap().replace(' ', "%20"));
    folder
        .write(".env", b"# the shell wins\nFLOODMARK_PARAM_REPORTING_CURRENCY=JPY\nFLOODMARK_OUTPUT=text\n");
    let run = |arguments: &[&str], variables: &[(&str, &str)]| {
        let output = folder.command(arguments).envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code().unwrap(), text)
    };
    let variables = [
        ("FLOODMARK_CONN_LAKE", url.as_str()),
        ("FLOODMARK_PARAM_REPORTING_CURRENCY", "EUR"),
        ("FLOODMARK_SKIP_CODE", "99"),
        ("FLOODMARK_OUTPUT", "json"),
        ("FLOODMARK_SELECT", "tag:nightly"),
    ];
    assert_eq!(run(&["run"], &variables).0, 0);
    assert!(elsewhere.join("finance.journal/current").exists(), "the URL's folder is the target");
    assert!(!folder.path().join("out/lake").exists());
    let (code, text) = run(&["run", "consolidate_ledgers"], &variables);
    assert_eq!(code, 99);
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{text}");
    let (code, text) =
        run(&["run", "consolidate_ledgers", "--output", "text", "--skip-code", "98"], &variables);
    assert_eq!(code, 98);
    assert!(text.starts_with("consolidate_ledgers: nothing new"), "{text}");
}

#[test]
fn the_log_is_one_document_a_line() {
    let folder = Folder::example();
    let output = folder.floodmark(&["run", "--log-format", "json"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told = |message: &str, job: &str| {
        lines.iter().find(|line| line["message"] == message && line["span"]["job"] == job).unwrap()
    };
    assert_eq!(told("committed", "trial_balance")["release"], 1);
    assert_eq!(told("ended", "consolidate_ledgers")["outcome"], "published");
    // A mistake, too.
    let output = folder.floodmark(&["run", "nowhere", "--log-format", "json"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{text}");
}
