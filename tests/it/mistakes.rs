//! Seeded mistakes: what the user sees, with the exit code, and that nothing is written.
//!
//! The answers lie in `tests/it/snapshots/`; after a deliberate change, `INSTA_UPDATE=always cargo test` writes them anew.

use std::{process::Command, sync::Arc};

use arrow::array::{ArrayRef, Int64Array, RecordBatch};
use parquet::arrow::ArrowWriter;

use crate::support::Folder;

/// Answers longer than this do not fit a screen.
const SCREEN_LINES: usize = 30;

fn answer(name: &str, arguments: &[&str], files: &[(&str, &str)]) {
    let folder = Folder::with(files);
    answer_in(&folder, name, arguments);
}

fn answer_in(folder: &Folder, name: &str, arguments: &[&str]) {
    answered(&mut folder.command(arguments), folder, name, &[]);
}

/// What `command` tells, compared with its snapshot after replacing what differs from run to run.
pub(crate) fn answered(
    command: &mut Command,
    folder: &Folder,
    name: &str,
    hidden: &[(&str, &str)],
) -> String {
    let before = folder.published();
    let output = command.output().unwrap();
    let mut stderr =
        String::from_utf8(output.stderr).unwrap().replace(folder.path().to_str().unwrap(), "[folder]");
    for (varies, shown) in hidden {
        stderr = stderr.replace(varies, shown);
    }
    assert!(stderr.lines().count() <= SCREEN_LINES, "{name} does not fit a screen:\n{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("bug in floodmark"), "{name}: {stderr}");
    assert!(stderr.contains("hint"), "{name} has no remedy:\n{stderr}");
    assert_eq!(folder.published(), before, "{name}: something was written");
    let text = format!("exit code: {}\n{stderr}", output.status.code().unwrap());
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
    text
}

const JOB: &str = "job: load\nsources:\n  orders: { connection: data, file: orders.csv, columns: { amount: \"decimal(18,2)\" } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id] }\n";

fn job(from: &str, to: &str) -> String {
    assert!(JOB.contains(from), "{from}");
    JOB.replace(from, to)
}

#[test]
fn mistakes_in_job_files() {
    #[rustfmt::skip]
    let cases = [
        ("misspelt_key", "connection: data", "conection: data"),
        ("misspelt_section", "models:", "modles:"),
        ("unknown_connection", "connection: data", "connection: dta"),
        ("unknown_target_connection", "connection: lake", "connection: lak"),
        ("wrong_type_of_a_key", "key: [id]", "key: id"),
        ("unknown_mode", "mode: merge", "mode: upsert"),
        ("merge_without_key", ", key: [id]", ""),
        ("unknown_model_in_output", "from: clean", "from: claen"),
        ("unknown_column_type", "decimal(18,2)", "decmal(18,2)"),
        ("impossible_decimal", "decimal(18,2)", "decimal(50,2)"),
        ("undeclared_column", "columns: { amount:", "columns: { amuont:"),
        ("key_that_is_no_column", "key: [id]", "key: [order_id]"),
        ("nothing_to_read", "file: orders.csv, ", ""),
        ("two_things_to_read", "file: orders.csv", "file: orders.csv, files: \"*.csv\""),
        ("missing_file", "orders.csv", "ordres.csv"),
        ("path_out_of_the_root", "orders.csv", "../floodmark.yaml"),
        ("duplicate_key_in_yaml", "models:", "job: load\nmodels:"),
        ("broken_yaml", "key: [id] }", "key: [id"),
        ("missing_target", "target:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id] }\n", ""),
        ("bad_source_name", "  orders: { connection: data", "  Orders: { connection: data"),
        ("number_where_text_belongs", "job: load", "job: 17"),
        ("missing_model_file", "  clean:", "  clean: sql/nowhere.sql"),
        ("unknown_time_zone", "file: orders.csv", "file: orders.csv, timezone: Europe/Berln"),
        ("partial_model_replaced", "file: orders.csv, columns: { amount: \"decimal(18,2)\" } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id] }", "files: \"*.csv\" }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: replace }"),
        ("cursor_on_files", "file: orders.csv", "file: orders.csv, incremental: { cursor: id }"),
        ("read_without_files", "file: orders.csv", "file: orders.csv, read: always"),
        ("unknown_column_as_null", "file: orders.csv", "file: orders.csv, unfit_as_null: [amuont]"),
        ("key_as_null", "file: orders.csv", "file: orders.csv, key: [id], unfit_as_null: [id]"),
        ("check_without_kind", "target:\n", "checks: { clean: [ { on_fail: warn } ] }\ntarget:\n"),
        ("check_of_unknown_model", "target:\n", "checks: { claen: [ { not_null: [id] } ] }\ntarget:\n"),
        ("check_of_unknown_column", "target:\n", "checks: { clean: [ { not_null: [ident] } ] }\ntarget:\n"),
        ("quarantine_of_all_rows", "target:\n", "checks: { clean: [ { unique: [id], on_fail: quarantine } ] }\ntarget:\n"),
        ("wrong_ratio", "target:\n", "checks: { clean: [ { not_null: [id], max_ratio: lots } ] }\ntarget:\n"),
        ("check_without_rows", "target:\n", "checks: { clean: [ { row_count: { min: 9, max: 3 } } ] }\ntarget:\n"),
        ("check_of_every_value", "target:\n", "checks: { clean: [ { range: { column: amount } } ] }\ntarget:\n"),
        ("check_of_a_broken_pattern", "target:\n", "checks: { clean: [ { matches: { column: customer, pattern: 'a(b' } } ] }\ntarget:\n"),
        ("check_of_a_bound_of_another_type", "target:\n", "checks: { clean: [ { range: { column: amount, min: lots } } ] }\ntarget:\n"),
        ("check_of_values_of_another_type", "target:\n", "checks: { clean: [ { accepted: { column: id, values: [\"1\", one] } } ] }\ntarget:\n"),
        ("check_of_the_age_of_a_text", "target:\n", "checks: { clean: [ { freshness: { column: customer, max_age: 2d } } ] }\ntarget:\n"),
        ("check_of_the_sum_of_a_text", "target:\n", "checks: { clean: [ { balanced: { sum: customer } } ] }\ntarget:\n"),
        ("check_in_an_unknown_column", "target:\n", "checks: { clean: [ { references: { column: id, in: orders.ident } } ] }\ntarget:\n"),
        ("expression_of_an_unknown_column", "target:\n", "checks: { clean: [ { expression: \"amunt > 0\" } ] }\ntarget:\n"),
        ("expression_that_is_broken", "target:\n", "checks: { clean: [ { expression: \"amount >\" } ] }\ntarget:\n"),
        ("expression_that_is_no_condition", "target:\n", "checks: { clean: [ { expression: amount + 1 } ] }\ntarget:\n"),
        ("history_without_key", "mode: merge, key: [id]", "mode: history"),
        ("deletes_of_an_append", "mode: merge, key: [id]", "mode: append, deletes: soft"),
        ("deletes_of_a_part", "file: orders.csv, columns: { amount: \"decimal(18,2)\" } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id] }", "files: \"*.csv\" }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id], deletes: key_compare }"),
        ("history_since_no_time", "mode: merge, key: [id]", "mode: history, key: [id], effective: customer"),
        ("output_named_as_ours", "    orders: { from: clean", "    floodmark_log: { from: clean"),
        ("key_listed_twice", "key: [id]", "key: [id, id]"),
        ("param_without_value", "sources:\n", "params: { day: { type: date } }\nsources:\n"),
        ("no_file_matches_yet", "file: orders.csv", "files: \"ordres*.csv\""),
        ("param_of_wrong_type", "sources:\n", "params: { day: { type: date, default: soon } }\nsources:\n"),
    ];
    for (name, from, to) in cases {
        answer(name, &["run"], &[("jobs/load.yaml", &job(from, to))]);
    }
    answer(
        "several_mistakes_at_once",
        &["check"],
        &[("jobs/load.yaml", &job("mode: merge", "mode: upsert").replace("conn", "con"))],
    );
}

#[test]
fn two_columns_of_one_name_are_refused_where_they_would_be_copied() {
    let copy = "job: load\nsources:\n  orders: { connection: data, file: orders.parquet }\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: orders, mode: replace }\n";
    let folder = Folder::with(&[("jobs/load.yaml", copy)]);
    let [one, other] = [[1_i64], [2]].map(|of| Arc::new(Int64Array::from(of.to_vec())) as ArrayRef);
    let rows = RecordBatch::try_from_iter([("id", one), ("id", other)]).unwrap();
    let file = std::fs::File::create(folder.path().join("data/orders.parquet")).unwrap();
    let mut writer = ArrowWriter::try_new(file, rows.schema(), None).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
    answer_in(&folder, "two_columns_of_one_name", &["run"]);
}

#[test]
fn mistakes_in_sql() {
    for (name, sql) in [
        ("unknown_column_in_sql", "SELECT id, custmer, amount FROM orders\n"),
        ("unknown_table_in_sql", "SELECT id, customer, amount\nFROM ordres\n"),
        ("broken_sql", "SELECT id, FROM orders WHERE\n"),
        ("not_a_select", "DELETE FROM orders\n"),
        ("two_statements", "SELECT 1 AS id; SELECT 2 AS id\n"),
        ("unknown_parameter", "SELECT id, customer, amount FROM orders WHERE amount > $least\n"),
        (
            "wrong_types_in_sql",
            "SELECT id, customer, amount FROM orders WHERE customer + amount > interval '1 day'\n",
        ),
        ("zones_compared", "SELECT id FROM orders WHERE cast('2026-10-01' AS timestamp) < now()\n"),
        (
            "date_compared_with_a_number",
            "SELECT id, customer, amount FROM orders WHERE cast('2026-10-01' AS date) = id\n",
        ),
        ("number_compared_with_a_word", "SELECT id, customer, amount FROM orders WHERE amount > 'lots'\n"),
        ("word_in_a_list_of_numbers", "SELECT id, customer, amount FROM orders WHERE id IN (1, 'two')\n"),
        (
            "same_name_in_a_subquery_of_all",
            "SELECT id, customer, amount FROM orders WHERE amount >= ALL (SELECT amount FROM orders WHERE id < 10)\n",
        ),
        ("untyped_null", "SELECT id, NULL AS customer, amount FROM orders\n"),
    ] {
        answer(name, &["run"], &[("sql/mappings/load/clean.sql", sql)]);
    }
}

#[test]
fn mistakes_in_data() {
    for (name, csv) in [
        ("ragged_line", "id,customer,amount\n1,ada,1.50\n2,grace\n"),
        ("unclosed_quote", "id,customer,amount\n1,\"ada,1.50\n2,grace,2.25\n"),
        ("no_number", "id,customer,amount\n1,ada,1.50\n2,grace,a lot\n"),
        ("too_many_decimals", "id,customer,amount\n1,ada,1.505\n"),
        ("duplicate_key_in_merge", "id,customer,amount\n1,ada,1.50\n1,ada,2.50\n"),
        ("null_key_in_merge", "id,customer,amount\n1,ada,1.50\n,grace,2.25\n"),
        ("empty_file", ""),
        ("doubled_header", "id,id,amount\n1,2,3\n"),
    ] {
        answer(name, &["run"], &[("data/orders.csv", csv)]);
    }
    let folder = Folder::with(&[]);
    folder.write("data/orders.csv", b"id,customer,amount\n1,ada,1.50\n2,gr\xfcn,2.25\n");
    answer_in(&folder, "invalid_utf8", &["run"]);
    answer(
        "unclosed_quote_where_rows_are_set_aside",
        &["run"],
        &[
            ("data/orders.csv", "id,customer,amount\n1,\"ada,1.50\n2,\"grace\",2.25\n"),
            ("jobs/load.yaml", &job("file: orders.csv", "file: orders.csv, bad_rows: quarantine")),
        ],
    );
    answer(
        "file_is_a_folder",
        &["run"],
        &[
            ("data/orders/part.csv", "id\n1\n"),
            ("jobs/load.yaml", &job("file: orders.csv", "file: orders, format: { kind: csv }")),
        ],
    );
    answer(
        "overflow",
        &["run"],
        &[(
            "sql/mappings/load/clean.sql",
            "SELECT id, customer, id * 9223372036854775807 AS amount FROM orders\n",
        )],
    );
    answer(
        "lossy_cast",
        &["run"],
        &[(
            "sql/mappings/load/clean.sql",
            "SELECT id, customer, cast(amount AS decimal(18, 1)) AS amount FROM orders\n",
        )],
    );
    answer(
        "division_by_zero",
        &["run"],
        &[("sql/mappings/load/clean.sql", "SELECT id, customer, amount / (id - id) AS amount FROM orders\n")],
    );
    let folder = Folder::with(&[]);
    assert_eq!(folder.run(&[]).0, 0);
    folder.write("sql/mappings/load/clean.sql", b"SELECT id, customer, amount, 1 AS more FROM orders\n");
    answer_in(&folder, "new_column_against_the_contract", &["run"]);
}

/// A project whose source is a SQLite database that `sql` made.
fn erp(sql: &str, source: &str) -> Folder {
    let folder = Folder::with(&[
        ("connections.yaml", "erp: { kind: sqlite, path: data/erp.db }\nlake: { kind: files, root: out }\n"),
        (
            "jobs/load.yaml",
            &format!(
                "job: load\nsources:\n  orders: {{ connection: erp, {source} }}\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: {{ from: clean, mode: append }}\n"
            ),
        ),
        ("sql/mappings/load/clean.sql", "SELECT * FROM orders\n"),
    ]);
    rusqlite::Connection::open(folder.path().join("data/erp.db")).unwrap().execute_batch(sql).unwrap();
    folder
}

#[test]
fn mistakes_in_databases() {
    const ORDERS: &str = "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, amount DECIMAL(18,2), changed TIMESTAMP);
        INSERT INTO orders VALUES (1, 'ada', '1.50', '2026-10-01T08:00:00'), (2, 'grace', '2.25', '2026-10-02T08:00:00');";
    #[rustfmt::skip]
    let cases = [
        ("sqlite_unknown_table", "table: ordres"),
        ("sqlite_broken_query", "query: sql/sources/orders.sql"),
        ("sqlite_reads_no_files", "files: \"*.csv\""),
        ("sqlite_cursor_without_zone", "table: orders, incremental: { cursor: changed }"),
        ("sqlite_unknown_cursor", "table: orders, incremental: { cursor: chnged }"),
        ("sqlite_cursor_of_wrong_type", "table: orders, incremental: { cursor: amount }"),
        ("sqlite_undeclared_column", "table: orders, columns: { amuont: \"decimal(18,2)\" }"),
        ("nulls_appended_every_night", "table: orders, incremental: { cursor: id, on_null: include }"),
        ("overlap_read_twice", "table: orders, incremental: { cursor: id, overlap: 2h }"),
    ];
    for (name, source) in cases {
        let folder = erp(ORDERS, source);
        folder.write("sql/sources/orders.sql", b"SELECT id, custmer FROM orders\n");
        answer_in(&folder, name, &["run"]);
    }
    for (name, incremental) in [
        ("overlap_of_time_on_numbers", "cursor: id, overlap: 2h"),
        ("overlap_of_numbers_on_time", "cursor: changed, overlap: 1000"),
        ("overlap_on_text", "cursor: customer, overlap: 1000"),
    ] {
        let folder = erp(ORDERS, &format!("table: orders, timezone: UTC, incremental: {{ {incremental} }}"));
        let job = std::fs::read_to_string(folder.path().join("jobs/load.yaml")).unwrap();
        folder.write("jobs/load.yaml", job.replace("mode: append", "mode: merge, key: [id]").as_bytes());
        answer_in(&folder, name, &["run"]);
    }
    for (name, insert) in [
        ("sqlite_text_in_a_number", "INSERT INTO orders VALUES (3, 'alan', 'a lot', '2026-10-03T08:00:00')"),
        ("sqlite_too_many_decimals", "INSERT INTO orders VALUES (3, 'alan', '1.505', '2026-10-03T08:00:00')"),
        ("sqlite_no_timestamp", "INSERT INTO orders VALUES (3, 'alan', '1.50', 'yesterday')"),
        ("sqlite_text_is_not_utf8", "INSERT INTO orders VALUES (3, CAST(x'6772fc6e' AS TEXT), '1.50', NULL)"),
    ] {
        let folder = erp(&format!("{ORDERS}{insert}"), "table: orders");
        answer_in(&folder, name, &["run"]);
    }
    let folder = erp(
        &format!("{ORDERS}UPDATE orders SET changed = NULL WHERE id = 2"),
        "table: orders, timezone: UTC, incremental: { cursor: changed, on_null: error }",
    );
    answer_in(&folder, "sqlite_null_in_the_cursor", &["run"]);
    let folder = erp(ORDERS, "table: orders");
    folder.write("data/erp.db", b"this was never a database, however long it may be read");
    answer_in(&folder, "sqlite_no_database", &["run"]);
    std::fs::remove_file(folder.path().join("data/erp.db")).unwrap();
    answer_in(&folder, "sqlite_missing_file", &["run"]);
    let folder = erp(ORDERS, "table: orders");
    let other = rusqlite::Connection::open(folder.path().join("data/erp.db")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    folder.write(
        "connections.yaml",
        b"erp: { kind: sqlite, path: data/erp.db, busy_timeout_ms: 1 }\nlake: { kind: files, root: out }\n",
    );
    answer_in(&folder, "sqlite_locked", &["run"]);
}

#[test]
fn a_relative_path_in_a_url_stays_in_the_project() {
    let folder = Folder::with(&[]);
    let mut run = folder.command(&["run"]);
    assert!(run.env("FLOODMARK_CONN_LAKE", "file:out/elsewhere").status().unwrap().success());
    assert!(folder.path().join("out/elsewhere/orders").exists());
}

#[test]
fn a_result_that_cannot_be_written_is_no_success() {
    let folder = Folder::with(&[]);
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = folder.command(&["check"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("could not be written"));
}

#[test]
fn an_accepted_number_is_accepted_however_it_is_written() {
    let checks = "checks: { clean: [ { accepted: { column: amount, values: [\"1.5\", \"2.250\"] } }, { expression: \"clean.amount < $least\" } ] }\ntarget:\n";
    let with_checks = job("target:\n", checks)
        .replace("sources:\n", "params: { least: { type: int, default: \"9\" } }\nsources:\n");
    let folder = Folder::with(&[("jobs/load.yaml", &with_checks)]);
    assert_eq!(folder.run(&[]).0, 0);
}

#[test]
fn mistakes_on_the_command_line() {
    answer("unknown_job", &["run", "laod"], &[]);
    answer("unknown_tag", &["run", "--select", "tag:nightly"], &[]);
    answer("unknown_environment", &["run", "--env", "prod"], &[]);
    answer("no_point_in_time", &["run", "--as-of", "yesterday"], &[]);
    answer("param_without_equals", &["run", "--param", "x"], &[]);
    let with_param = job("sources:\n", "params: { least: { type: int } }\nsources:\n");
    let sql = "SELECT id, customer, amount FROM orders WHERE amount > $least\n";
    let files = [("jobs/load.yaml", with_param.as_str()), ("sql/mappings/load/clean.sql", sql)];
    answer("param_of_wrong_type_given", &["run", "--param", "least=lots"], &files);
    answer("param_too_large", &["run", "--param", "least=99999999999999999999"], &files);
    answer("param_given_twice", &["run", "--param", "least=1", "--param", "least=2"], &files);
    answer("range_without_an_output", &["run", "--range", "2026-10"], &[]);
    answer(
        "missing_variable",
        &["run"],
        &[(
            "connections.yaml",
            "data: { kind: files, root: \"${env:NOWHERE_SET}\" }\nlake: { kind: files, root: out }\n",
        )],
    );
    answer(
        "unknown_connector",
        &["run"],
        &[("connections.yaml", "data: { kind: fiels, root: data }\nlake: { kind: files, root: out }\n")],
    );
    answer(
        "misspelt_option",
        &["run"],
        &[("connections.yaml", "data: { kind: files, rot: data }\nlake: { kind: files, root: out }\n")],
    );
    answer("no_project", &["run", "--project", "data"], &[]);
    for (name, variable, url) in [
        ("url_of_no_connector", "FLOODMARK_CONN_LAKE", "sqllite:///data/secret.db"),
        ("no_url", "FLOODMARK_CONN_LAKE", "out/secret"),
        ("url_with_a_host", "FLOODMARK_CONN_LAKE", "file://user:secret@host/out"),
        ("url_with_unknown_option", "FLOODMARK_CONN_LAKE", "sqlite:out/x.db?bsy_timeout_ms=secret"),
        ("url_with_wrong_option", "FLOODMARK_CONN_LAKE", "sqlite:out/x.db?busy_timeout_ms=secret"),
    ] {
        let folder = Folder::with(&[]);
        let told = answered(folder.command(&["run"]).env(variable, url), &folder, name, &[]);
        assert!(!told.contains("secret"), "{told}");
    }
}

/// Rows are checked while they are read, and all of them are, also those that their reader leaves: of more batches than one, and where one
/// checked relation reads another.
#[test]
fn checks_of_rows_look_at_rows_that_nobody_wants() {
    const ROWS: i64 = 40_000;
    let lines: String = (1..=ROWS).map(|id| format!("{id},ada,{}.00\n", id % 1000)).collect();
    let folder = Folder::with(&[("data/orders.csv", &format!("id,customer,amount\n{lines}"))]);
    for (sql, rows) in [
        ("SELECT id, customer, amount FROM orders LIMIT 3\n", 3),
        ("SELECT id, customer, amount FROM orders WHERE 1 = 0\n", 0),
        ("SELECT a.id, a.customer, b.amount FROM orders AS a JOIN orders AS b ON a.id = b.id\n", ROWS - 40),
        ("SELECT id, customer, amount FROM orders ORDER BY id\n", ROWS - 40),
    ] {
        folder.write("sql/mappings/load/clean.sql", sql.as_bytes());
        for of_both in [false, true] {
            // Of the second one a row in a thousand that is left is set aside, too, as far as the model has any.
            let (mut checks, kept) = (
                "checks:\n  orders:\n    - { expression: \"amount > 0\", on_fail: quarantine }\n".to_owned(),
                rows,
            );
            let mut kept = kept;
            let mut aside = [ROWS / 1000, 0];
            if of_both {
                checks +=
                    "  clean:\n    - { range: { column: amount, max: \"998\" }, on_fail: quarantine }\n";
                aside[1] = if rows > 3 { ROWS / 1000 } else { 0 };
                kept -= aside[1];
            }
            folder.write("jobs/load.yaml", job("target:\n", &(checks + "target:\n")).as_bytes());
            let (code, documents) = folder.run(&["--full-refresh"]);
            // An empty result is refused by its guard, and a refused run says what its checks found.
            assert_eq!(code, if rows == 0 { 3 } else { 0 }, "{sql}");
            let run = &documents[0];
            let found = |check: usize| run["checks"][check]["found"].as_i64();
            assert_eq!(found(0), Some(aside[0]), "{sql}: {run}");
            assert_eq!(found(1), of_both.then_some(aside[1]), "{sql}: {run}");
            assert_eq!(run["outputs"]["orders"]["rows"].as_i64(), (rows > 0).then_some(kept), "{sql}: {run}");
            if rows > 0 {
                assert_eq!(run["sources"]["orders"]["counts"]["extracted"], ROWS, "{sql}: {run}");
                assert_eq!(run["sources"]["orders"]["counts"]["rejected"], aside[0], "{sql}: {run}");
                assert_eq!(run["quarantined"], aside[0] + aside[1], "{sql}: {run}");
            }
        }
    }
}

/// A relation that its one reader looks at more than once, in ways that only show when it is read, is written down after all.
#[test]
fn a_checked_relation_may_be_read_more_than_once() {
    let lines: String = (1..=20).map(|id| format!("{id},ada,{id}.00\n")).collect();
    let checks = "checks:\n  orders: [ { not_null: id }, { range: { column: amount, max: \"18\" }, on_fail: quarantine } ]\n";
    for (sql, more, rows) in [
        (
            "SELECT id, customer, amount FROM orders WHERE amount >= ALL (SELECT o.amount FROM orders AS o WHERE o.id < 10)\n",
            "",
            10,
        ),
        (
            "WITH RECURSIVE up AS (SELECT 1 AS id UNION ALL SELECT orders.id FROM orders JOIN up ON orders.id = up.id + 1) SELECT id, 'x' AS customer, cast(1 AS decimal(18, 2)) AS amount FROM up\n",
            "",
            18,
        ),
        (
            "SELECT id, customer, amount FROM orders\n",
            "  clean: [ { references: { column: id, in: clean.id } } ]\n",
            18,
        ),
        (
            "SELECT id, customer, amount FROM orders\n",
            "  clean: [ { expression: \"id <= (SELECT max(id) FROM clean)\" } ]\n",
            18,
        ),
    ] {
        let folder = Folder::with(&[
            ("data/orders.csv", &format!("id,customer,amount\n{lines}")),
            ("sql/mappings/load/clean.sql", sql),
            ("jobs/load.yaml", &job("target:\n", &format!("{checks}{more}target:\n"))),
        ]);
        let (code, documents) = folder.run(&[]);
        assert_eq!(code, 0, "{sql}{more}");
        assert_eq!(documents[0]["outputs"]["orders"]["rows"], rows, "{sql}{more}: {}", documents[0]);
        assert_eq!(documents[0]["quarantined"], 2, "{sql}{more}: {}", documents[0]);
    }
}

/// What checks find says more than what an output makes of the same rows; and one refusal tells of all.
#[test]
fn a_failed_check_is_told_rather_than_what_came_of_it() {
    let csv = "id,customer,amount\n1,ada,1.50\n,grace,-2.25\n,alan,3.00\n";
    let checked = |more: &str| {
        job(
            "target:\n",
            &format!(
                "checks:\n  clean:\n    - {{ not_null: id }}\n    - {{ range: {{ column: amount, min: \"0\" }} }}\n{more}target:\n"
            ),
        )
    };
    answer(
        "null_key_that_is_checked",
        &["run"],
        &[("data/orders.csv", csv), ("jobs/load.yaml", &checked(""))],
    );
    let together = "  orders:\n    - { row_count: { min: 4 } }\n";
    answer(
        "checks_of_rows_and_of_all_together",
        &["run"],
        &[("data/orders.csv", csv), ("jobs/load.yaml", &checked(together))],
    );
}
