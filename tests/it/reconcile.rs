//! `floodmark reconcile`: what an output holds, beside what its sources say, down to the keys that differ.

use std::process::Output;

use serde_json::Value;

use crate::{
    ledger::{Ledger, to_postgres, trusted},
    services::{Schema, postgres},
    support::Folder,
};

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn document(output: &Output) -> Value {
    let document = serde_json::from_slice(&output.stdout);
    assert!(document.is_ok(), "{}", text(output));
    document.unwrap()
}

/// P15: two copies too many, which an exclusive or of hashes would not see, a lost row and a changed one, in a million.
#[test]
fn a_doubled_a_lost_and_a_changed_row_in_a_million_are_found_by_their_keys() {
    let (from, to) = (Schema::new(), Schema::new());
    from.execute(
        "CREATE TABLE lines (id bigint PRIMARY KEY, account text NOT NULL, amount numeric(18,2));
         INSERT INTO lines SELECT i, 'A' || i % 1000, i / 100.0 FROM generate_series(1, 1000000) AS i",
    );
    let connection = |schema: &Schema| to_postgres(&schema.name, "localhost", postgres().port, &trusted());
    let folder = Folder::with(&[
        ("connections.yaml", &format!("erp: {}\ndw: {}\n", connection(&from), connection(&to))),
        (
            "jobs/load.yaml",
            "job: load\nsources:\n  lines: { connection: erp, table: lines, incremental: { cursor: id } }\ntarget:\n  connection: dw\n  outputs:\n    ledger: { from: lines, mode: append }\n",
        ),
    ]);
    let floodmark = |arguments: &[&str]| {
        folder.command(arguments).env("ERP_PASSWORD", &postgres().password).output().unwrap()
    };
    let run = floodmark(&["run"]);
    assert!(run.status.success(), "{}", text(&run));
    let agrees = floodmark(&["reconcile", "load", "--key", "id", "--output", "json"]);
    assert_eq!(agrees.status.code(), Some(0), "{}", text(&agrees));
    let compared = &document(&agrees)["outputs"][0];
    assert_eq!(compared["source"]["rows"], 1_000_000);
    assert_eq!(compared["source"], compared["target"]);
    assert_eq!(compared["source"]["totals"]["amount"], "5000005000.00");
    to.execute(
        "INSERT INTO ledger SELECT * FROM ledger WHERE id = 123456;
         INSERT INTO ledger SELECT DISTINCT * FROM ledger WHERE id = 123456;
         DELETE FROM ledger WHERE id = 500000;
         UPDATE ledger SET amount = amount + 0.01 WHERE id = 777777",
    );
    let differs = floodmark(&["reconcile", "load", "--key", "id", "--output", "json"]);
    assert_eq!(differs.status.code(), Some(3), "{}", text(&differs));
    let compared = &document(&differs)["outputs"][0];
    assert_eq!(compared["target"]["rows"], 1_000_001);
    assert_eq!(compared["target"]["totals"]["amount"], "5000002469.13");
    let found: Vec<Value> = compared["differing"]
        .as_array()
        .unwrap()
        .iter()
        .map(|found| {
            serde_json::json!([
                found["key"]["id"],
                found["kind"],
                found["source_rows"],
                found["target_rows"],
                found["columns"]
            ])
        })
        .collect();
    let expected = serde_json::json!([
        ["123456", "repeated", 1, 3, {}],
        ["500000", "missing", 1, 0, {}],
        ["777777", "changed", 1, 1, { "amount": ["7777.77", "7777.78"] }],
    ]);
    assert_eq!(Value::from(found), expected);
    assert_eq!((&compared["differences"], &compared["complete"]), (&3.into(), &true.into()));
    assert!(compared["ranges"].as_u64().unwrap() > 100, "the keys were cut into ranges: {compared}");
    // Without a key rows are told apart by all that they hold.
    let by_all = document(&floodmark(&["reconcile", "load", "--output", "json"]));
    assert_eq!(by_all["outputs"][0]["differences"], 4);
}

#[test]
fn what_waits_for_the_next_run_is_not_missed() {
    for target in ["sqlite", "files"] {
        let mut ledger = Ledger::new(target, "merge, key: [id]", "incremental: { cursor: id, overlap: 3 }");
        for _ in 0..5 {
            ledger.arrive(true);
        }
        ledger.run();
        ledger.arrive(true);
        ledger.arrive(true);
        let ask = || ledger.command(&["reconcile", "load", "--output", "json"]).output().unwrap();
        let compared = document(&ask());
        assert_eq!(compared["agrees"], true, "{target}: {compared}");
        let output = &compared["outputs"][0];
        assert_eq!((&output["waiting"], &output["target"]["rows"]), (&2.into(), &5.into()), "{target}");
        ledger.run();
        let compared = document(&ask());
        let output = &compared["outputs"][0];
        assert_eq!((&output["waiting"], &output["target"]["rows"]), (&0.into(), &7.into()), "{target}");
        assert_eq!(compared["agrees"], true, "{target}: {compared}");
    }
}

/// A project with a model, a quarantine and every kind of key, into one kind of target.
fn orders(target: &str, output: &str) -> Folder {
    let folder = Folder::with(&[
        ("connections.yaml", &format!("data: {{ kind: files, root: data }}\nlake: {target}\n")),
        (
            "jobs/load.yaml",
            &format!(
                "job: load\nsources:\n  orders: {{ connection: data, file: orders.csv, columns: {{ id: int, amount: \"decimal(18,2)\", since: date }} }}\nmodels:\n  clean:\nchecks:\n  clean:\n    - {{ expression: \"amount < 100\", on_fail: quarantine }}\ntarget:\n  connection: lake\n  outputs:\n    orders: {{ from: clean, {output} }}\n"
            ),
        ),
        ("sql/mappings/load/clean.sql", "SELECT customer, id, amount, since FROM orders\n"),
    ]);
    deliver(
        &folder,
        "ada,1,1.50,2026-01-01\nada,2,2.25,2026-01-01\n,1,3.00,2026-01-01\nbob,9,100,2026-01-01\n",
    );
    folder
}

fn deliver(folder: &Folder, rows: &str) {
    folder.write("data/orders.csv", format!("customer,id,amount,since\n{rows}").as_bytes());
}

#[test]
fn outputs_of_every_mode_agree_after_a_run_and_later_changes_of_a_source_show() {
    for target in ["{ kind: files, root: out }", "{ kind: sqlite, path: out.db }"] {
        for output in [
            "mode: append",
            "mode: replace",
            "mode: replace_range, range: [since]",
            "mode: merge, key: [id], latest_by: amount",
            "mode: merge, key: [id], latest_by: amount, deletes: soft",
            "mode: history, key: [id], latest_by: amount",
            "mode: history, key: [id], latest_by: amount, effective: since, deletes: key_compare",
        ] {
            let what = format!("{target} {output}");
            let folder = orders(target, output);
            let run = folder.floodmark(&["run"]);
            assert!(run.status.success(), "{what}: {}", text(&run));
            let ask = || folder.floodmark(&["reconcile", "load", "--output", "json"]);
            let agrees = ask();
            assert_eq!(agrees.status.code(), Some(0), "{what}: {}", text(&agrees));
            let keyed = output.contains("key");
            let rows = document(&agrees)["outputs"][0]["target"]["rows"].as_u64();
            assert_eq!(rows, Some(if keyed { 2 } else { 3 }), "{what}");
            deliver(&folder, "ada,1,7.00,2026-01-01\nada,2,2.25,2026-01-01\n,1,3.00,2026-01-01\n");
            let differs = ask();
            assert_eq!(differs.status.code(), Some(3), "{what}");
            let found = &document(&differs)["outputs"][0]["differing"];
            let kinds: Vec<&str> =
                found.as_array().unwrap().iter().map(|found| found["kind"].as_str().unwrap()).collect();
            assert_eq!(kinds, if keyed { vec!["changed"] } else { vec!["extra", "missing"] }, "{what}");
            let run = folder.floodmark(&["run"]);
            if output.contains("append") || output.contains("effective") {
                continue;
            }
            assert!(run.status.success(), "{what}: {}", text(&run));
            assert_eq!(ask().status.code(), Some(0), "{what}: {}", text(&ask()));
        }
    }
}

#[test]
fn what_differs_is_shown() {
    let folder = orders("{ kind: sqlite, path: out.db }", "mode: replace");
    assert!(folder.floodmark(&["run"]).status.success());
    let database = rusqlite::Connection::open(folder.path().join("out.db")).unwrap();
    database
        .execute_batch(
            "INSERT INTO orders SELECT * FROM orders WHERE id = 2;
             UPDATE orders SET amount = '3.01' WHERE customer IS NULL;
             DELETE FROM orders WHERE amount = '1.50';
             INSERT INTO orders VALUES ('eve', 7, '1234567.80', '2026-01-02')",
        )
        .unwrap();
    let asked = folder.floodmark(&["reconcile", "load", "--key", "customer,id"]);
    assert_eq!(asked.status.code(), Some(3));
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("reconcile", text(&asked));
    });
    let few = folder.floodmark(&["reconcile", "load", "--key", "customer,id", "--limit", "1"]);
    assert!(text(&few).contains("and 3 more"), "{}", text(&few));
}

#[test]
fn a_question_that_fits_nothing_is_told_why() {
    let folder = orders("{ kind: files, root: out }", "mode: replace");
    let told = |arguments: &[&str]| {
        let asked = folder.floodmark(&[&["reconcile"], arguments].concat());
        assert_eq!(asked.status.code(), Some(2), "{}", text(&asked));
        text(&asked)
    };
    assert!(told(&["load"]).contains("has not run yet"));
    assert!(folder.floodmark(&["run"]).status.success());
    assert!(told(&["load", "ordres"]).contains("Did you mean `orders`?"));
    assert!(told(&["load", "--key", "idd"]).contains("Did you mean `id`?"));
}
