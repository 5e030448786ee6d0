//! Jobs on a real PostgreSQL: the binary as users meet it.

use std::process::{Command, Stdio};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    mistakes::answered,
    services::{Schema, postgres},
    support::Folder,
};

/// A project that merges what changed in `orders` of one schema into `dw.orders` of another, and into Parquet.
struct Shop {
    folder: Folder,
    from: Schema,
    to: Schema,
}

const CONNECTIONS: &str = "erp:
  kind: postgres
  host: localhost
  port: PORT
  database: postgres
  user: admin
  password: ${env:ERP_PASSWORD}
  sslrootcert: CA
  schema: FROM
  bound_margin_ms: 0
  lock_timeout_ms: 500
dw:
  kind: postgres
  host: localhost
  port: PORT
  database: postgres
  user: admin
  password: ${env:ERP_PASSWORD}
  sslrootcert: CA
  schema: TO
  lock_timeout_ms: 500
lake: { kind: files, root: out }
";

const JOB: &str = "job: load
sources:
  orders: { connection: erp, table: orders, incremental: { cursor: changed_at }, totals: { sum: [amount] } }
models:
  clean:
checks:
  clean:
    - not_null: [customer]
    - { expression: \"amount >= 0\", on_fail: quarantine }
target:
  connection: dw
  outputs:
    orders: { from: clean, mode: merge, key: [id] }
";

impl Shop {
    fn new() -> Self {
        let (from, to) = (Schema::new(), Schema::new());
        from.execute(
            "CREATE TABLE orders (id bigint PRIMARY KEY, customer text, amount numeric(18,2), tags text[], changed_at timestamptz NOT NULL DEFAULT '2026-01-01T08:00Z');
             INSERT INTO orders VALUES (1, 'ada', 1.50, '{a,b}'), (2, 'grace', 2.25, NULL), (3, 'edsger', -1, '{}')",
        );
        let folder = Folder::with(&[
            ("jobs/load.yaml", JOB),
            ("sql/mappings/load/clean.sql", "SELECT id, customer, amount, tags FROM orders\n"),
        ]);
        let shop = Self { folder, from, to };
        shop.connect(CONNECTIONS);
        shop
    }

    fn connect(&self, connections: &str) {
        let server = postgres();
        let text = connections
            .replace("PORT", &server.port.to_string())
            .replace("CA", &server.authority)
            .replace("FROM", &self.from.name)
            .replace("TO", &self.to.name);
        self.folder.write("connections.yaml", text.as_bytes());
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.folder.command(arguments);
        command.env("ERP_PASSWORD", &postgres().password);
        command
    }

    /// Runs, and gives the exit code and the job's document.
    fn run(&self, arguments: &[&str]) -> (i32, serde_json::Value) {
        let output = self.command(&[&["run", "--output", "json"], arguments].concat()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!text.contains(&postgres().password) && !told.contains(&postgres().password), "P18");
        println!("{text}{told}");
        (output.status.code().unwrap(), serde_json::from_str(text.lines().next().unwrap_or("null")).unwrap())
    }

    /// One value of the target.
    fn holds(&self, sql: &str) -> String {
        self.to.with(|client| client.query_one(&format!("SELECT ({sql})::text"), &[]).unwrap().get(0))
    }

    /// What a mistake is told as, without what differs from run to run.
    fn mistake(&self, command: &mut Command, name: &str) -> String {
        let server = postgres();
        let port = server.port.to_string();
        let hidden = [
            (port.as_str(), "[port]"),
            (self.from.name.as_str(), "[from]"),
            (self.to.name.as_str(), "[to]"),
            (server.authority.as_str(), "[ca.pem]"),
        ];
        let told = answered(command, &self.folder, name, &hidden);
        assert!(!told.contains(&server.password), "P18: {told}");
        told
    }
}

/// Days of which all rows are there: what other tests have open at the same time cannot hold a bound back.
const FIRST: [&str; 2] = ["--as-of", "2026-01-02"];
const SECOND: [&str; 2] = ["--as-of", "2026-01-03"];

#[test]
fn only_what_changed_moves_and_nothing_twice() {
    let shop = Shop::new();
    let (code, first) = shop.run(&FIRST);
    assert_eq!(code, 0);
    assert_eq!(first["outputs"]["orders"]["inserted"], 2);
    assert_eq!(first["quarantined"], 1);
    assert_eq!(first["sources"]["orders"]["counts"]["extracted"], 3);
    assert_eq!(shop.holds("SELECT sum(amount) FROM orders"), "3.75");
    assert_eq!(shop.holds("SELECT string_agg(tags::text, ';' ORDER BY id) FROM orders"), "{a,b}");

    let (code, again) = shop.run(&FIRST);
    assert_eq!((code, again["outcome"].as_str()), (0, Some("nothing_new")));
    assert_eq!(again["sources"]["orders"]["counts"]["extracted"], 0);

    shop.from.execute(
        "UPDATE orders SET amount = 2.50, changed_at = '2026-01-02T08:00Z' WHERE id = 2;
         UPDATE orders SET changed_at = '2026-01-02T08:00Z' WHERE id = 1;
         INSERT INTO orders VALUES (4, 'barbara', 4, NULL, '2026-01-02T08:00Z')",
    );
    let (code, changed) = shop.run(&SECOND);
    assert_eq!(code, 0);
    let counts =
        ["inserted", "updated", "unchanged"].map(|count| changed["outputs"]["orders"][count].clone());
    assert_eq!(counts, [1, 1, 1]);
    assert_eq!(shop.holds("SELECT sum(amount) FROM orders"), "8.00");
    assert_eq!(shop.holds("SELECT max(seq) FROM floodmark_log"), changed["seq"].to_string());

    // The local store is a cache: the target remembers.
    std::fs::remove_dir_all(shop.folder.path().join(".floodmark")).unwrap();
    let (code, again) = shop.run(&SECOND);
    assert_eq!((code, again["outcome"].as_str()), (0, Some("nothing_new")));
    let listed = shop.command(&["quarantine", "list", "--output", "json"]).output().unwrap();
    assert!(String::from_utf8(listed.stdout).unwrap().contains("amount"));
}

#[test]
fn the_server_sends_what_the_model_asks_for_and_all_rows_where_they_are_added_up() {
    let shop = Shop::new();
    shop.folder.write(
        "sql/mappings/load/clean.sql",
        b"SELECT id, customer, amount, tags FROM orders WHERE amount > 2 AND customer LIKE '%c%'\n",
    );
    let asked = |shop: &Shop| {
        let plan = shop.command(&["plan", "load", "--output", "json"]).output().unwrap();
        let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
        plan["sources"][0]["asks_for"].clone()
    };
    assert_eq!(asked(&shop), serde_json::json!([]));
    assert_eq!(shop.run(&FIRST).1["sources"]["orders"]["counts"]["extracted"], 3);
    let shop = Shop { to: Schema::new(), ..shop };
    shop.connect(CONNECTIONS);
    std::fs::remove_dir_all(shop.folder.path().join(".floodmark")).unwrap();
    shop.folder.write("jobs/load.yaml", JOB.replace(", totals: { sum: [amount] }", "").as_bytes());
    assert_eq!(asked(&shop), serde_json::json!(["amount > 2.00"]));
    let (code, run) = shop.run(&FIRST);
    assert_eq!((code, &run["sources"]["orders"]["counts"]["extracted"]), (0, &serde_json::json!(1)));
    assert_eq!(shop.holds("SELECT string_agg(customer, ' ') FROM orders"), "grace");
}

#[test]
fn rows_that_are_only_added_go_straight_into_their_table_and_the_plan_says_so() {
    let shop = Shop::new();
    let holds = |sql: &str| shop.holds(sql);
    let job = "job: load\nsources:\n  facts: { connection: data, file: facts.csv, columns: { id: int, code: string, amount: \"decimal(18,2)\" } }\ntarget:\n  connection: dw\n  outputs: { facts: { from: facts, mode: append } }\n";
    shop.folder.write("jobs/load.yaml", job.as_bytes());
    shop.connect(&format!("{CONNECTIONS}data: {{ kind: files, root: data }}\n"));
    shop.folder.write("data/facts.csv", b"id,code,amount\n1,ab,1.50\n2,abc,2.25\n");
    let way = || {
        let plan = shop.command(&["plan", "load", "--output", "json"]).output().unwrap();
        let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
        plan["outputs"][0]["way"].as_str().unwrap().to_owned()
    };
    let counts = |run: &serde_json::Value| {
        let output = &run["outputs"]["facts"];
        ["inserted", "rows_after"].map(|count| output[count].as_u64().unwrap())
    };
    assert_eq!(way(), "copied into a new table");
    let (code, first) = shop.run(&[]);
    assert_eq!((code, counts(&first)), (0, [2, 2]));
    assert_eq!(way(), "copied straight into the table");
    let (code, second) = shop.run(&[]);
    assert_eq!((code, counts(&second)), (0, [2, 4]));
    assert_eq!(holds("SELECT sum(amount) FROM facts"), "7.50");

    // What the table would cut is refused, and of what was copied before it nothing is there.
    shop.to.execute("ALTER TABLE facts ALTER code TYPE varchar(3)");
    assert_eq!(way(), "copied straight into the table");
    shop.folder.write("data/facts.csv", b"id,code,amount\n3,abc,1\n4,abcd,1\n");
    let (code, refused) = shop.run(&[]);
    assert_eq!(code, 3, "{refused}");
    assert!(refused["errors"][0].as_str().unwrap().contains("row 2 of the model: `code`"), "{refused}");
    assert_eq!(holds("SELECT count(*) || '/' || max(seq) FROM facts, floodmark_state"), "4/2");
    shop.folder.write("data/facts.csv", b"id,code,amount\n3,abc,1\n");

    // Keys that others may be writing, and what INSERT does and COPY does not, make a stage.
    shop.to.execute("CREATE UNIQUE INDEX u ON facts (id) WHERE id > 100");
    assert_eq!(way(), "staged, then inserted");
    shop.to.execute("DROP INDEX u");
    assert_eq!(way(), "copied straight into the table");
    shop.to.execute("CREATE RULE r AS ON INSERT TO facts WHERE new.id < 0 DO INSTEAD NOTHING");
    assert_eq!(way(), "staged, then inserted");
    let (code, third) = shop.run(&[]);
    assert_eq!((code, counts(&third)), (0, [1, 5]));
    assert_eq!(
        holds("SELECT count(*) FROM pg_class WHERE relname LIKE 'fm\\_%' AND relpersistence <> 't'"),
        "0"
    );
}

#[test]
fn a_merge_by_its_key_sees_what_the_table_does_with_rows() {
    let shop = Shop::new();
    shop.folder.write("jobs/load.yaml", JOB.replace(", totals: { sum: [amount] }", "").as_bytes());
    assert_eq!(shop.run(&FIRST).0, 0);
    let next = |id: u32, day: u32| {
        shop.from.execute(&format!(
            "UPDATE orders SET amount = amount + 1, changed_at = '2026-01-0{day}T08:00Z' WHERE id = 1;
             INSERT INTO orders VALUES ({id}, 'x', {id}, NULL, '2026-01-0{day}T08:00Z')"
        ));
        ["--as-of", ["2026-01-03", "2026-01-04", "2026-01-05"][day as usize - 2]]
    };
    let counts = |run: &serde_json::Value| {
        ["inserted", "updated", "unchanged", "rows_after"]
            .map(|count| run["outputs"]["orders"][count].as_u64().unwrap_or(99))
    };
    // One pass over the key.
    let (code, run) = shop.run(&next(11, 2));
    assert_eq!((code, counts(&run)), (0, [1, 1, 0, 3]));

    // A column that no model knows, and must not be null: rows that are there have it.
    shop.to.execute("ALTER TABLE orders ADD CONSTRAINT c CHECK (amount < 1000)");
    let (code, run) = shop.run(&next(12, 3));
    assert_eq!((code, counts(&run)), (0, [1, 1, 0, 4]));

    // A trigger that keeps rows out: they would be lost, and the mark would move.
    shop.to.execute(
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER t BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION nothing()",
    );
    let fourth = next(13, 4);
    let (code, refused) = shop.run(&fourth);
    assert_eq!(code, 75, "{refused}");
    assert_eq!(shop.holds("SELECT count(*) || '/' || max(s.seq) FROM orders, floodmark_state AS s"), "4/3");
    shop.to.execute("DROP TRIGGER t ON orders");
    let (code, run) = shop.run(&fourth);
    assert_eq!((code, counts(&run)), (0, [1, 1, 0, 5]));
}

#[test]
fn a_refused_run_leaves_the_target_as_it_was() {
    let shop = Shop::new();
    assert_eq!(shop.run(&FIRST).0, 0);
    let before = shop.holds("SELECT json_agg(o ORDER BY id) FROM orders AS o");
    shop.from.execute(
        "INSERT INTO orders VALUES (5, NULL, 5, NULL, '2026-01-02T08:00Z'), (6, 'x', 6, NULL, '2026-01-02T08:00Z')",
    );
    assert_eq!(shop.run(&SECOND).0, 3);
    assert_eq!(shop.holds("SELECT json_agg(o ORDER BY id) FROM orders AS o"), before);
    shop.from.execute("UPDATE orders SET customer = 'mended' WHERE id = 5");
    let (code, mended) = shop.run(&SECOND);
    assert_eq!((code, &mended["outputs"]["orders"]["inserted"]), (0, &serde_json::json!(2)));
}

#[test]
fn a_table_becomes_parquet_and_comes_back() {
    let shop = Shop::new();
    let copy = JOB.replace("connection: dw", "connection: lake");
    shop.folder.write("jobs/load.yaml", copy.as_bytes());
    assert_eq!(shop.run(&[]).0, 0);
    shop.folder.write(
        "jobs/load.yaml",
        JOB.replace(
            "connection: erp, table: orders, incremental: { cursor: changed_at }",
            "connection: lake, table: orders",
        )
        .as_bytes(),
    );
    let (code, back) = shop.run(&[]);
    assert_eq!((code, &back["outputs"]["orders"]["inserted"]), (0, &serde_json::json!(2)));
    assert_eq!(shop.holds("SELECT sum(amount) FROM orders"), "3.75");
}

#[test]
fn history_and_deletes_in_a_table() {
    let shop = Shop::new();
    let write = |output: &str| {
        let job = JOB
            .replace(", incremental: { cursor: changed_at }", "")
            .replace("mode: merge, key: [id]", output);
        shop.folder.write("jobs/load.yaml", job.as_bytes());
    };
    shop.from.execute("UPDATE orders SET amount = 3 WHERE id = 3");
    write("mode: history, key: [id], deletes: key_compare");
    assert_eq!(shop.run(&["--as-of", "2026-10-01"]).0, 0);
    shop.from.execute("UPDATE orders SET tags = '{c}' WHERE id = 1; DELETE FROM orders WHERE id = 2");
    let (code, second) = shop.run(&["--as-of", "2026-10-02"]);
    assert_eq!((code, &second["outputs"]["orders"]["inserted"]), (0, &serde_json::json!(1)));
    assert_eq!(shop.run(&["--as-of", "2026-10-03"]).1["outcome"], "nothing_new");
    let versions = "SELECT string_agg(concat_ws(' ', id, tags, valid_from::date, valid_to::date), ';' ORDER BY id, valid_from) FROM orders";
    assert_eq!(
        shop.holds(versions),
        "1 {a,b} 2026-10-01 2026-10-02;1 {c} 2026-10-02;2 2026-10-01 2026-10-02;3 {} 2026-10-01"
    );

    let shop = Shop { to: Schema::new(), ..shop };
    shop.connect(CONNECTIONS);
    std::fs::remove_dir_all(shop.folder.path().join(".floodmark")).unwrap();
    let job = JOB
        .replace(", incremental: { cursor: changed_at }", "")
        .replace("mode: merge, key: [id]", "mode: merge, key: [id], deletes: soft");
    shop.folder.write("jobs/load.yaml", job.as_bytes());
    assert_eq!(shop.run(&["--as-of", "2026-10-01"]).0, 0);
    shop.from.execute("DELETE FROM orders WHERE id = 1");
    assert_eq!(shop.run(&["--as-of", "2026-10-02"]).0, 0);
    assert_eq!(
        shop.holds("SELECT string_agg(concat_ws(' ', id, deleted_at::date), ';' ORDER BY id) FROM orders"),
        "1 2026-10-02;3"
    );
}

#[test]
fn an_interrupted_run_ends_its_query_on_the_server() {
    let shop = Shop::new();
    let job = JOB.replace(
        "table: orders, incremental: { cursor: changed_at }, totals: { sum: [amount] }",
        "query: sql/slow.sql",
    );
    shop.folder.write("jobs/load.yaml", job.as_bytes());
    // The name of the schema tells this query from those of other tests.
    let slow =
        format!("SELECT id, customer, amount, tags, pg_sleep(300)::text AS {} FROM orders", shop.from.name);
    shop.folder.write("sql/slow.sql", slow.as_bytes());
    let active = || -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%' || $1 || '%'";
        shop.from.with(|client| client.query_one(sql, &[&shop.from.name]).unwrap().get(0))
    };
    let until = |expected: i64| {
        for _ in 0..600 {
            if active() == expected {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("the server never had {expected} such queries");
    };
    let mut running = shop.command(&["run"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until(1);
    kill(Pid::from_raw(running.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(running.wait().unwrap().code(), Some(130));
    until(0);
}

#[test]
fn mistakes_with_a_server() {
    let shop = Shop::new();
    let run = || shop.command(&["run"]);
    shop.mistake(run().env("ERP_PASSWORD", "wrong-password"), "postgres_wrong_password");
    let changed = |from: &str, to: &str| {
        assert!(CONNECTIONS.contains(from));
        shop.connect(&CONNECTIONS.replace(from, to));
    };
    for (name, from, to) in [
        ("postgres_unknown_host", "host: localhost", "host: nowhere.invalid"),
        ("postgres_nobody_answers", "port: PORT", "port: 1"),
        ("postgres_untrusted", "  sslrootcert: CA\n", ""),
        ("postgres_another_name", "host: localhost", "host: 127.0.0.1"),
        ("postgres_unknown_database", "database: postgres", "database: erp"),
        ("postgres_no_certificates", "sslrootcert: CA", "sslrootcert: floodmark.yaml"),
        ("postgres_unknown_sslmode", "host: localhost", "host: localhost\n  sslmode: verify-ful"),
        ("postgres_without_user", "  user: admin\n", ""),
        ("postgres_without_password", "  password: ${env:ERP_PASSWORD}\n", ""),
        ("postgres_literal_password", "${env:ERP_PASSWORD}", "hunter2-hunter2"),
    ] {
        changed(from, to);
        let told = shop.mistake(&mut run(), name);
        assert!(!told.contains("hunter2"), "{told}");
    }
    shop.connect(CONNECTIONS);
    for (name, from, to) in [
        ("postgres_unknown_table", "table: orders", "table: order"),
        ("postgres_unknown_cursor", "cursor: changed_at", "cursor: updated_at"),
        ("postgres_files_of_a_database", "table: orders", "file: orders.csv"),
        ("postgres_mistake_in_query", "table: orders", "query: sql/orders.sql"),
    ] {
        shop.folder.write("jobs/load.yaml", JOB.replace(from, to).as_bytes());
        shop.folder.write(
            "sql/orders.sql",
            b"SELECT id, customer, amount, tags,\n       changd_at AS changed_at\nFROM orders\n",
        );
        shop.mistake(&mut run(), name);
    }
    shop.folder.write("jobs/load.yaml", JOB.as_bytes());

    // What happens on the server.
    shop.from.execute("UPDATE orders SET amount = 'NaN' WHERE id = 2");
    shop.mistake(&mut run(), "postgres_not_a_number");
    shop.from.execute("UPDATE orders SET amount = 2 WHERE id = 2");
    assert_eq!(shop.run(&FIRST).0, 0);
    shop.from.execute("INSERT INTO orders VALUES (9, 'late', 9, NULL, '2026-01-02T08:00Z')");
    std::thread::scope(|scope| {
        let (held, holds) = std::sync::mpsc::channel::<()>();
        let (done, ends) = std::sync::mpsc::channel::<()>();
        let to = &shop.to;
        scope.spawn(move || {
            to.with(move |client| {
                let mut lock = client.transaction().unwrap();
                lock.batch_execute("LOCK TABLE orders IN ROW EXCLUSIVE MODE").unwrap();
                held.send(()).unwrap();
                ends.recv().unwrap();
                lock.rollback().unwrap();
            });
        });
        holds.recv().unwrap();
        shop.mistake(&mut run(), "postgres_locked");
        done.send(()).unwrap();
    });
    shop.to.execute("ALTER TABLE orders ALTER COLUMN customer TYPE varchar(3) USING left(customer, 3)");
    shop.mistake(&mut run(), "postgres_too_narrow");
    shop.to.execute(
        "ALTER TABLE orders ALTER COLUMN customer TYPE text; ALTER TABLE orders ADD COLUMN note text",
    );
    shop.mistake(&mut run(), "postgres_new_column_there");
    shop.to.execute("ALTER TABLE orders DROP COLUMN note; ALTER TABLE orders ALTER COLUMN amount TYPE text");
    shop.mistake(&mut run(), "postgres_retyped_column_there");
    shop.to.execute("DROP TABLE floodmark_state, floodmark_log; ALTER TABLE orders ALTER COLUMN amount TYPE numeric(18,2) USING amount::numeric");
    shop.mistake(&mut run(), "postgres_rows_without_record");
}

#[test]
fn a_user_without_rights_is_told_which() {
    let shop = Shop::new();
    let role = format!("r_{}", shop.from.name);
    let create = format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'for-a-test'; GRANT USAGE ON SCHEMA {} TO {role}",
        shop.from.name
    );
    shop.from.execute(&create);
    shop.connect(&CONNECTIONS.replacen("user: admin", &format!("user: {role}"), 1).replacen(
        "ERP_PASSWORD",
        "ROLE_PASSWORD",
        1,
    ));
    let mut command = shop.command(&["run"]);
    let told = shop.mistake(command.env("ROLE_PASSWORD", "for-a-test"), "postgres_no_permission");
    assert!(!told.contains("for-a-test"));
    shop.from.execute(&format!("REVOKE ALL ON SCHEMA {} FROM {role}; DROP ROLE {role}", shop.from.name));
}

/// W22: a watermark is of one database, and not of another one that has its place.
#[test]
fn a_source_that_is_another_database_is_refused_until_it_is_adopted() {
    let shop = Shop::new();
    assert_eq!(shop.run(&FIRST).0, 0);
    let name = format!("d_{}", uuid::Uuid::now_v7().simple());
    postgres().admin("postgres", |client| client.batch_execute(&format!("CREATE DATABASE {name}")).unwrap());
    postgres().admin(&name, |client| {
        client
            .batch_execute(&format!(
                "CREATE SCHEMA {0}; CREATE TABLE {0}.orders (id bigint PRIMARY KEY, customer text, amount numeric(18,2), tags text[], changed_at timestamptz NOT NULL);
                 INSERT INTO {0}.orders VALUES (4, 'alan', 4, NULL, '2026-01-02T08:00Z')",
                shop.from.name
            ))
            .unwrap();
    });
    let (erp, dw) = CONNECTIONS.split_once("dw:").unwrap();
    shop.connect(&format!("{}dw:{dw}", erp.replace("database: postgres", &format!("database: {name}"))));
    let (code, run) = shop.run(&SECOND);
    assert_eq!((code, &run["outcome"]), (3, &"refused".into()), "{run}");
    assert!(run["errors"].to_string().contains("leads to another database than last time"), "{run}");
    let adopted = shop.command(&["state", "adopt", "load"]).output().unwrap();
    assert!(adopted.status.success(), "{}", String::from_utf8_lossy(&adopted.stderr));
    assert_eq!(shop.run(&SECOND).0, 0);
    assert_eq!(shop.holds("SELECT count(*) FROM orders"), "3");
    // And from then on it is this one.
    shop.connect(CONNECTIONS);
    assert_eq!(shop.run(&SECOND).0, 3);
    postgres().admin("postgres", |client| {
        client.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
    });
}

/// A merge is applied before it is known what checks of rows find, and what the table held: neither is published if one of them refuses.
#[test]
fn a_merge_that_is_applied_early_is_taken_back_whatever_refuses_it() {
    let shop = Shop::new();
    shop.from.execute("INSERT INTO orders SELECT i, 'hedy', 1, NULL, '2026-01-01T09:00Z' FROM generate_series(10, 20000) AS i");
    assert_eq!(shop.run(&FIRST).0, 0);
    let before = shop.holds("SELECT (count(*), sum(amount)) FROM orders");
    let change = "INSERT INTO orders VALUES (50000, NULL, 5, NULL, '2026-01-02T08:00Z'); UPDATE orders SET amount = 9, changed_at = '2026-01-02T08:00Z' WHERE id < 100";
    shop.from.execute(change);
    // A check that must hold.
    let (code, told) = shop.run(&SECOND);
    assert_eq!(code, 3, "{told}");
    assert!(told["errors"][0].as_str().unwrap().contains("not_null customer"), "{told}");
    assert_eq!(told["outputs"], serde_json::json!({}), "nothing of it is there: {told}");
    assert_eq!(shop.holds("SELECT (count(*), sum(amount)) FROM orders"), before);
    shop.from.execute("UPDATE orders SET customer = 'joan' WHERE id = 50000");
    // Rows that somebody removed: told at once, and as what it is.
    shop.to.execute("DELETE FROM orders WHERE id = 15000");
    let before = shop.holds("SELECT (count(*), sum(amount)) FROM orders");
    let (code, told) = shop.run(&SECOND);
    assert_eq!(code, 3, "{told}");
    assert!(told["errors"][0].as_str().unwrap().contains("and the last release left"), "{told}");
    assert_eq!(shop.holds("SELECT (count(*), sum(amount)) FROM orders"), before);
    shop.to.execute("INSERT INTO orders VALUES (15000, 'hedy', 1, NULL)");
    let (code, told) = shop.run(&SECOND);
    assert_eq!((code, &told["outputs"]["orders"]["inserted"]), (0, &serde_json::json!(2)), "{told}");
}
