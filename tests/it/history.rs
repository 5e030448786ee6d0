//! Whether a run may follow the last one: what others did to the target or to the job in between.

use serde_json::Value;

use crate::support::Folder;

/// A project that appends what is new in the table `lines` of a database, by its number, to a table of another.
fn ledger(job: &str) -> Folder {
    let folder = Folder::with(&[
        (
            "connections.yaml",
            "erp: { kind: sqlite, path: data/erp.db }\nbooks: { kind: sqlite, path: out/books.db }\nlake: { kind: files, root: out/lake }\n",
        ),
        ("jobs/load.yaml", job),
        ("sql/mappings/load/clean.sql", "SELECT id, amount FROM lines\n"),
    ]);
    sql(
        &folder,
        "data/erp.db",
        "CREATE TABLE lines (id INTEGER PRIMARY KEY, amount TEXT); INSERT INTO lines VALUES (1, 'a'), (2, 'b'); CREATE TABLE other AS SELECT * FROM lines",
    );
    folder
}

const JOB: &str = "job: load\nsources:\n  lines: { connection: erp, table: lines, incremental: { cursor: id } }\nmodels:\n  clean:\ntarget:\n  connection: books\n  outputs:\n    lines: { from: clean, mode: append }\n";

fn sql(folder: &Folder, database: &str, sql: &str) {
    rusqlite::Connection::open(folder.path().join(database)).unwrap().execute_batch(sql).unwrap();
}

fn ids(folder: &Folder) -> Vec<i64> {
    let database = rusqlite::Connection::open(folder.path().join("out/books.db")).unwrap();
    let mut statement = database.prepare("SELECT id FROM lines ORDER BY id").unwrap();
    statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

fn run(folder: &Folder, arguments: &[&str]) -> (i32, Value) {
    let (code, mut runs) = folder.run(arguments);
    (code, runs.pop().unwrap())
}

fn add(folder: &Folder, id: i64) {
    sql(folder, "data/erp.db", &format!("INSERT INTO lines VALUES ({id}, 'x')"));
}

/// The first words of what a refused run says.
fn refused(folder: &Folder) -> String {
    let before = folder.published();
    let (code, told) = run(folder, &[]);
    assert_eq!(code, 3, "{told}");
    assert_eq!(folder.published(), before, "{told}");
    told["errors"][0].as_str().unwrap().to_owned()
}

#[test]
fn rows_that_others_removed_are_missed_and_a_full_refresh_brings_them_back() {
    for harm in ["DELETE FROM lines WHERE id = 1", "DELETE FROM lines", "DROP TABLE lines"] {
        let folder = ledger(JOB);
        assert_eq!(run(&folder, &[]).0, 0);
        sql(&folder, "out/books.db", harm);
        add(&folder, 3);
        assert!(refused(&folder).contains("the last release left 2"), "{harm}");
        assert_eq!(run(&folder, &["--full-refresh"]).0, 0, "{harm}");
        assert_eq!(ids(&folder), [1, 2, 3], "{harm}");
    }
    // What replaces everything anyway is not in need of what was there; and it notices that it is gone.
    let folder =
        ledger(&JOB.replace(", incremental: { cursor: id }", "").replace("mode: append", "mode: replace"));
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(run(&folder, &[]).1["outcome"], "nothing_new");
    sql(&folder, "out/books.db", "DELETE FROM lines");
    assert_eq!(run(&folder, &[]).1["outcome"], "published");
    assert_eq!(ids(&folder), [1, 2]);
}

#[test]
fn rows_of_somebody_else_are_not_taken_over() {
    let folder = ledger(JOB);
    assert_eq!(run(&folder, &[]).0, 0);
    sql(
        &folder,
        "out/books.db",
        "CREATE TABLE more (id INTEGER, amount TEXT); INSERT INTO more VALUES (1, 'theirs')",
    );
    folder.write("jobs/load.yaml", format!("{JOB}    more: {{ from: clean, mode: append }}\n").as_bytes());
    assert!(refused(&folder).contains("`more` holds rows"));
    sql(&folder, "out/books.db", "DROP TABLE more");
    // A new output of a source that was read before would be a part of it only.
    assert!(refused(&folder).contains("only what is new of source `lines`"));
    assert_eq!(run(&folder, &["--full-refresh"]).0, 0);
    assert_eq!(ids(&folder), [1, 2]);
    sql(&folder, "out/books.db", "INSERT INTO lines VALUES (9, 'theirs')");
    let (code, told) = run(&folder, &[]);
    assert_eq!(code, 0);
    assert!(told["warnings"][0].as_str().unwrap().contains("somebody else writes there"), "{told}");
}

#[test]
fn a_mark_belongs_to_what_it_is_of() {
    // Another table under the same name.
    let folder = ledger(JOB);
    assert_eq!(run(&folder, &[]).0, 0);
    folder.write("jobs/load.yaml", JOB.replace("table: lines", "table: other").as_bytes());
    assert!(refused(&folder).contains("its watermark is of table `lines`"));

    // The same table under another name goes on.
    let renamed = JOB.replace("  lines: { connection: erp", "  entries: { connection: erp");
    folder.write("jobs/load.yaml", renamed.as_bytes());
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, amount FROM entries\n");
    add(&folder, 3);
    let (code, told) = run(&folder, &[]);
    assert_eq!(code, 0);
    assert!(told["warnings"][0].as_str().unwrap().contains("goes on where that ended"), "{told}");
    assert_eq!(ids(&folder), [1, 2, 3]);

    // Taken back, it does not go back to where it once was.
    folder.write("jobs/load.yaml", JOB.as_bytes());
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, amount FROM lines\n");
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(ids(&folder), [1, 2, 3]);
    folder.write("jobs/load.yaml", renamed.as_bytes());
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, amount FROM entries\n");
    assert_eq!(run(&folder, &[]).0, 0);

    // A source that is out of the job for a night.
    let other =
        JOB.replace("  lines: { connection: erp, table: lines", "  others: { connection: erp, table: other");
    folder.write("jobs/load.yaml", other.as_bytes());
    folder.write("sql/mappings/load/clean.sql", b"SELECT id + 100 AS id, amount FROM others\n");
    assert_eq!(run(&folder, &[]).0, 0);
    folder.write("jobs/load.yaml", renamed.as_bytes());
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, amount FROM entries\n");
    add(&folder, 4);
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(ids(&folder), [1, 2, 3, 4, 101, 102]);
}

#[test]
fn a_source_that_no_model_asks_for_keeps_its_mark() {
    let two = JOB.replace(
        "models:",
        "  others: { connection: erp, table: other, incremental: { cursor: id } }\nmodels:",
    );
    let folder = ledger(&two);
    assert_eq!(run(&folder, &[]).0, 0);
    folder.write(
        "sql/mappings/load/clean.sql",
        b"SELECT id, amount FROM lines UNION ALL SELECT id + 100 AS id, amount FROM others\n",
    );
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(ids(&folder), [1, 2, 101, 102]);
}

#[test]
fn a_file_that_is_delivered_again_as_it_once_was_is_read_again() {
    let job = "job: load\nsources:\n  lines: { connection: in, files: \"*.csv\" }\nmodels:\n  clean:\ntarget:\n  connection: books\n  outputs:\n    lines: { from: clean, mode: merge, key: [id] }\n";
    let folder = ledger(job);
    folder.write(
        "connections.yaml",
        b"in: { kind: files, root: in }\nbooks: { kind: sqlite, path: out/books.db }\n",
    );
    for (text, expected) in [("1,5", [1, 0]), ("1,6", [0, 1]), ("1,5", [0, 1])] {
        folder.write("in/lines.csv", format!("id,amount\n{text}\n").as_bytes());
        let (code, told) = run(&folder, &[]);
        assert_eq!(code, 0);
        let output = &told["outputs"]["lines"];
        assert_eq!([&output["inserted"], &output["updated"]], [expected[0], expected[1]], "{told}");
    }
}

#[test]
fn sqlite_keeps_no_float_as_null_and_no_number_under_another_type() {
    let folder = ledger(JOB);
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, 1.5::double AS amount FROM lines\n");
    assert_eq!(run(&folder, &[]).0, 0);
    add(&folder, 3);
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, 'NaN'::double AS amount FROM lines\n");
    assert!(refused(&folder).contains("NaN"));
    let widen = JOB.replace("connection: books", "connection: books\n  contract: { type_change: widen }");
    let folder = ledger(&widen);
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, id AS amount FROM lines\n");
    assert_eq!(run(&folder, &[]).0, 0);
    add(&folder, 3);
    folder.write(
        "sql/mappings/load/clean.sql",
        b"SELECT id, cast(id AS decimal(25, 2)) AS amount FROM lines\n",
    );
    assert!(refused(&folder).contains("cannot make `amount` wider"));
}

#[test]
fn a_switch_that_was_cut_off_is_repaired_and_never_goes_back() {
    let folder = ledger(&JOB.replace("connection: books", "connection: lake"));
    assert_eq!(run(&folder, &[]).0, 0);
    let current = folder.path().join("out/lake/lines/current");
    std::fs::remove_file(&current).unwrap();
    let own = folder.path().join("out/lake/_floodmark/small/load/current");
    let first = std::fs::read_link(&own).unwrap();
    add(&folder, 3);
    assert_eq!(run(&folder, &[]).0, 0);
    assert!(current.join(".").exists());
    let second = std::fs::read_link(&own).unwrap();
    assert_ne!(first, second);
    // As a run would leave it that was held up between its commit and its switch.
    std::fs::remove_file(&own).unwrap();
    std::os::unix::fs::symlink(&first, &own).unwrap();
    assert_eq!(run(&folder, &[]).1["outcome"], "nothing_new");
    assert_eq!(std::fs::read_link(&own).unwrap(), second);
}

fn told(folder: &Folder, arguments: &[&str]) -> (i32, String) {
    let output = folder.floodmark(arguments);
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    (output.status.code().unwrap(), text)
}

#[test]
fn a_target_can_be_taken_as_it_is() {
    let folder = ledger(&JOB.replace("mode: append", "mode: merge, key: [id]"));
    assert_eq!(run(&folder, &[]).0, 0);
    sql(&folder, "out/books.db", "DELETE FROM lines WHERE id = 1");
    add(&folder, 3);
    assert!(refused(&folder).contains("the last release left 2"));
    assert_eq!(told(&folder, &["state", "adopt", "load"]).0, 0);
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(ids(&folder), [2, 3], "the watermark stayed");
    // What is read from its start again is merged.
    assert_eq!(told(&folder, &["state", "reset", "load"]).0, 0);
    assert_eq!(run(&folder, &[]).0, 0);
    assert_eq!(ids(&folder), [1, 2, 3]);
    // A table that is gone.
    sql(&folder, "out/books.db", "DROP TABLE lines");
    assert!(refused(&folder).contains("is gone"));
    assert_eq!(told(&folder, &["state", "adopt", "load"]).0, 0);
    assert!(refused(&folder).contains("is new"));
    assert_eq!(run(&folder, &["--full-refresh"]).0, 0);
    // Rows that no record knows.
    sql(&folder, "out/books.db", "DELETE FROM floodmark_state; DELETE FROM floodmark_log");
    std::fs::remove_dir_all(folder.path().join(".floodmark")).unwrap();
    assert!(refused(&folder).contains("no record of job"));
    assert_eq!(told(&folder, &["state", "adopt", "load"]).0, 0);
    let (code, run) = run(&folder, &[]);
    assert_eq!((code, &run["outputs"]["lines"]["unchanged"]), (0, &3.into()));
}

#[test]
fn a_job_with_another_name_goes_on_with_its_history() {
    for (target, name) in [("books", "ledger"), ("lake", "ledger"), ("lake", "a_ledger")] {
        let job = JOB.replace("connection: books", &format!("connection: {target}"));
        let folder = ledger(&job);
        assert_eq!(run(&folder, &[]).0, 0);
        folder.write(
            "jobs/load.yaml",
            job.replace("job: load", &format!("job: {name}"))
                .replace("  clean:", "  clean: sql/mappings/load/clean.sql")
                .as_bytes(),
        );
        add(&folder, 3);
        assert!(refused(&folder).contains("no record of job"), "{target}");
        assert_eq!(told(&folder, &["state", "rename", "load", name]).0, 0, "{target}");
        let (code, run) = run(&folder, &[]);
        let lines = &run["outputs"]["lines"];
        assert_eq!((code, &lines["inserted"], &lines["rows_after"]), (0, &1.into(), &3.into()), "{target}");
        let (code, again) = told(&folder, &["state", "rename", "load", name]);
        assert_eq!(code, 3, "{target}: {again}");
        // Readers find the output of the new name only.
        folder.write("jobs/look.yaml", format!("job: look\nsources: {{ seen: {{ connection: {target}, table: lines }} }}\ntarget:\n  connection: erp\n  outputs: {{ nothing: {{ from: seen, mode: replace }} }}\n").as_bytes());
        let seen = folder.floodmark(&["preview", "look", "--output", "json"]);
        assert_eq!(String::from_utf8(seen.stdout).unwrap().lines().count(), 3, "{target} {name}");
        if target == "lake" {
            assert_eq!(std::fs::read_dir(folder.path().join("out/lake/lines/current")).unwrap().count(), 2);
        }
    }
}

#[test]
fn a_range_is_read_again_and_the_watermark_stays() {
    let job = JOB.replace("mode: append", "mode: merge, key: [id]");
    let folder = ledger(&job);
    for id in 3..=20 {
        add(&folder, id);
    }
    assert_eq!(run(&folder, &[]).0, 0);
    sql(&folder, "data/erp.db", "UPDATE lines SET amount = 'corrected' WHERE id IN (4, 5, 15)");
    let (_, before) = told(&folder, &["state", "show", "load", "--output", "json"]);
    let output = folder.floodmark(&["backfill", "load", "--from", "4", "--to", "10", "--output", "json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let document: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(document["sources"]["lines"]["counts"]["extracted"], 6, "{document}");
    assert_eq!(document["outputs"]["lines"]["updated"], 2, "{document}");
    let (_, after) = told(&folder, &["state", "show", "load", "--output", "json"]);
    let mark =
        |text: &str| text.split("\"mark\"").nth(1).map(|text| text.chars().take(80).collect::<String>());
    assert!(mark(&before).is_some() && mark(&before) == mark(&after), "{before} {after}");
    let database = rusqlite::Connection::open(folder.path().join("out/books.db")).unwrap();
    let mut statement =
        database.prepare("SELECT id FROM lines WHERE amount = 'corrected' ORDER BY id").unwrap();
    let corrected: Vec<i64> =
        statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    assert_eq!(corrected, [4, 5], "what lies outside of the range is as it was");
    assert_eq!(ids(&folder), (1..=20).collect::<Vec<_>>());
    add(&folder, 21);
    let (_, next) = run(&folder, &[]);
    assert_eq!(next["sources"]["lines"]["counts"]["extracted"], 1, "only what is new: {next}");

    for (arguments, expected) in [
        (["backfill", "load", "--from", "x", "--to", "10"], "no value of the cursor"),
        (["backfill", "load", "--from", "10", "--to", "4"], "nothing lies between"),
    ] {
        let (code, text) = told(&folder, &arguments);
        assert!(code == 2 && text.contains(expected), "{text}");
    }
    folder.write("jobs/load.yaml", JOB.as_bytes());
    let (code, text) = told(&folder, &["backfill", "load", "--from", "4", "--to", "10"]);
    assert!(code == 2 && text.contains("appends"), "{text}");
}

#[test]
fn what_a_connection_offers_is_shown() {
    let folder = ledger(JOB);
    sql(
        &folder,
        "data/erp.db",
        "CREATE TABLE docs (kind TEXT, no INTEGER, updated_at TIMESTAMP, PRIMARY KEY (kind, no)); CREATE VIEW seen AS SELECT * FROM docs",
    );
    let (code, text) = told(&folder, &["discover", "erp"]);
    assert_eq!(code, 0);
    for expected in ["docs", "kind, no", "updated_at", "view", "lines"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let (_, text) = told(&folder, &["discover", "erp", "docs"]);
    assert!(text.contains("may be a cursor") && text.contains("key"), "{text}");
    let (code, text) = told(&folder, &["discover", "erp", "dosc"]);
    assert!(code == 2 && text.contains("docs"), "{text}");
}

#[test]
fn a_job_is_made_from_a_connection_and_runs() {
    let folder = ledger(JOB);
    std::fs::remove_file(folder.path().join("jobs/load.yaml")).unwrap();
    sql(
        &folder,
        "data/erp.db",
        "CREATE TABLE \"odd name\" (\"a b\" INTEGER PRIMARY KEY, v TEXT); INSERT INTO \"odd name\" VALUES (1, 'x')",
    );
    assert_eq!(told(&folder, &["init", "--from", "erp"]).0, 0);
    let (code, made) = run(&folder, &[]);
    assert_eq!(
        (code, &made["outputs"]["lines"]["inserted"], &made["outputs"]["odd_name"]["inserted"]),
        (0, &2.into(), &1.into())
    );
    assert_eq!(made["outputs"]["other"]["mode"], "replace", "it has no key");
    let (code, text) = told(&folder, &["init", "--from", "erp"]);
    assert!(code == 2 && text.contains("already"), "{text}");
    let (code, text) = told(&folder, &["init", "--from", "epr"]);
    assert!(code == 2 && text.contains("Did you mean `erp`?"), "{text}");
}

/// P9: what an `overlap` finds is counted, and said where it comes near the end of it.
#[test]
fn rows_that_come_late_are_found_and_counted() {
    // Also where the model does not ask for the cursor.
    for model in [
        "SELECT id, amount FROM lines\n",
        "SELECT CAST(row_number() OVER () AS bigint) AS id, amount FROM lines\n",
    ] {
        late(model);
    }
}

fn reading_again(overlap: u32) -> Folder {
    let again = format!("incremental: {{ cursor: id, overlap: {overlap} }}");
    let job = JOB.replace("incremental: { cursor: id }", &again);
    ledger(&job.replace("mode: append", "mode: merge, key: [id]"))
}

fn late(model: &str) {
    let folder = reading_again(160);
    folder.write("sql/mappings/load/clean.sql", model.as_bytes());
    add(&folder, 1000);
    assert_eq!(run(&folder, &[]).0, 0);
    add(&folder, 999);
    add(&folder, 1001);
    let (code, told) = run(&folder, &[]);
    assert_eq!(code, 0);
    let source = &told["sources"]["lines"];
    assert_eq!(source["late"], serde_json::json!({ "rows": 1, "by": 10, "of": 160 }), "{told}");
    assert_eq!((&source["bound"], &told["warnings"]), (&"exact".into(), &Value::Null), "{told}");
    // What was late is known now.
    add(&folder, 900);
    let (_, told) = run(&folder, &[]);
    assert_eq!(
        told["sources"]["lines"]["late"],
        serde_json::json!({ "rows": 1, "by": 110, "of": 160 }),
        "{told}"
    );
    assert!(told["warnings"].to_string().contains("at least 1 row came late"), "{told}");
    let (_, told) = run(&folder, &[]);
    assert_eq!(told["sources"]["lines"]["late"], Value::Null, "{told}");
}

#[test]
fn a_plan_says_what_a_run_would_read_and_how_sure_its_end_is() {
    let folder = reading_again(1);
    let window = || {
        let plan = folder.floodmark(&["plan", "load", "--output", "json"]);
        let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
        let source = &plan["sources"][0];
        (source["window"].as_str().unwrap().to_owned(), source["bound"].as_str().unwrap().to_owned())
    };
    assert_eq!(window(), ("up to 3".to_owned(), "exact".to_owned()));
    assert_eq!(run(&folder, &[]).0, 0);
    add(&folder, 7);
    assert_eq!(window(), ("[3, 8), again from 2".to_owned(), "exact".to_owned()));
}
