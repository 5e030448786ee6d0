//! Rows that were set aside and go through the job again, into every target.

use serde_json::{Value, json};

use crate::{
    services::{Schema, postgres},
    support::Folder,
};

const JOB: &str = "job: load
sources:
  orders:
    connection: data
    files: orders_*.csv
    columns: { id: int, amount: \"decimal(18,2)\" }
    bad_rows: quarantine
    FORMAT
  customers: { connection: data, file: customers.csv }
models: { clean: }
checks:
  orders:
    - { expression: \"amount >= LEAST\", on_fail: quarantine }
  clean:
    - { references: { column: customer, in: customers.customer }, on_fail: quarantine }
target:
  connection: lake
  outputs:
    orders: { from: clean, MODE }
";

/// A job over files, and a target of its own.
struct Shop {
    folder: Folder,
    mode: &'static str,
    // Dropped last, with its tables.
    schema: Option<Schema>,
}

impl Shop {
    fn new(target: &str, mode: &'static str) -> Self {
        let schema = (target == "PostgreSQL").then(Schema::new);
        let connection = match &schema {
            Some(schema) => {
                let server = postgres();
                format!(
                    "{{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:ERP_PASSWORD}}\", sslrootcert: {}, schema: {} }}",
                    server.port, server.authority, schema.name
                )
            }
            None => target.to_owned(),
        };
        let folder = Folder::with(&[
            ("connections.yaml", &format!("data: {{ kind: files, root: data }}\nlake: {connection}\n")),
            ("sql/mappings/load/clean.sql", "SELECT id, customer, amount FROM orders\n"),
            ("data/customers.csv", "customer,country\nada,UK\n"),
            (
                "data/orders_1.csv",
                "id,customer,amount\n1,ada,1.50\n2,ada,none\n3,ada,-1.00\n4,grace,4.00\n5,ada\n",
            ),
        ]);
        let shop = Self { folder, mode, schema };
        shop.job("", "0");
        shop
    }

    /// The job, with a format of its files, and the least amount.
    fn job(&self, format: &str, least: &str) {
        let job = JOB.replace("FORMAT", format).replace("LEAST", least).replace("MODE", self.mode);
        self.folder.write("jobs/load.yaml", job.as_bytes());
    }

    fn ask(&self, arguments: &[&str]) -> (i32, Value, String) {
        let mut command = self.folder.command(&[arguments, &["--output", "json"]].concat());
        if self.schema.is_some() {
            command.env("ERP_PASSWORD", &postgres().password);
        }
        let output = command.output().unwrap();
        let (text, told) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        println!("{text}{told}");
        let mut documents = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        let first = documents.next().map_or(Value::Null, Result::unwrap);
        (output.status.code().unwrap(), first, told)
    }

    fn replay(&self, arguments: &[&str]) -> (i32, Value, String) {
        self.ask(&[&["quarantine", "replay", "load"], arguments].concat())
    }

    /// What is counted of a run: rows that are new and changed, that the output holds, and that were set aside.
    fn counts(run: &Value) -> [u64; 4] {
        let output = &run["outputs"]["orders"];
        let of = |name: &str| output[name].as_u64().unwrap();
        [of("inserted"), of("updated"), of("rows_after"), run["quarantined"].as_u64().unwrap()]
    }

    /// How many rows wait in the quarantine, by release.
    fn waiting(&self) -> Vec<(u64, u64)> {
        let (_, list, _) = self.ask(&["quarantine", "list"]);
        let of = |entry: &Value| (entry["release"].as_u64().unwrap(), entry["rows"].as_u64().unwrap());
        let mut waiting: Vec<(u64, u64)> = Vec::new();
        for (release, rows) in
            list["quarantine"].as_array().unwrap().iter().filter(|entry| entry["waiting"] == true).map(of)
        {
            match waiting.iter_mut().find(|(known, _)| *known == release) {
                Some((_, sum)) => *sum += rows,
                None => waiting.push((release, rows)),
            }
        }
        waiting
    }
}

#[test]
fn what_was_set_aside_goes_through_the_job_again_once() {
    for target in ["{ kind: files, root: out }", "{ kind: sqlite, path: out/target.db }", "PostgreSQL"] {
        let shop = Shop::new(target, "mode: append");
        let (code, first, _) = shop.ask(&["run"]);
        assert_eq!((code, Shop::counts(&first)), (0, [1, 0, 1, 4]), "{target}");
        assert_eq!(shop.waiting(), [(1, 4)]);

        // Nothing is mended: the rows wait where they are.
        let (code, again, _) = shop.replay(&[]);
        assert_eq!((code, again["outcome"].as_str()), (0, Some("nothing_new")), "{target}");
        assert!(again["warnings"].to_string().contains("none of the 4 rows"), "{again}");
        assert_eq!(shop.waiting(), [(1, 4)]);

        // The format, the check and the reference are mended; nobody can mend a row that is cut short.
        shop.job("format: { nulls: [none] }", "-5");
        shop.folder.write("data/customers.csv", b"customer,country\nada,UK\ngrace,US\n");
        let (code, mended, _) = shop.replay(&[]);
        assert_eq!((code, Shop::counts(&mended)), (0, [3, 0, 4, 1]), "{target}");
        assert_eq!(
            mended["sources"]["orders"]["counts"],
            json!({ "extracted": 3, "passed": 2, "filtered": 0, "rejected": 1 }),
            "the fourth came back as a row of the model"
        );
        assert_eq!(mended["sources"]["orders"]["window"], "set aside before");
        assert_eq!(shop.waiting(), [(2, 1)]);
        let (_, row, _) = shop.ask(&["quarantine", "show", "load", "--release", "2"]);
        assert_eq!(row["position"], "`orders_1.csv` line 6, byte 66", "where it was: {row}");

        // No row twice, and the watermark is where it was.
        let (code, once, _) = shop.replay(&["--release", "1"]);
        assert_eq!((code, once["outcome"].as_str()), (0, Some("nothing_new")), "{target}");
        assert!(once["warnings"].to_string().contains("no rows wait"), "{once}");
        let (code, next, _) = shop.ask(&["run"]);
        assert_eq!((code, next["outcome"].as_str()), (0, Some("nothing_new")), "{target}");
        shop.folder.write("data/orders_2.csv", b"id,customer,amount\n6,ada,6.00\n");
        let (code, new, _) = shop.ask(&["run"]);
        assert_eq!((code, Shop::counts(&new)), (0, [1, 0, 5, 0]), "{target}");
        assert_eq!(shop.waiting(), [(2, 1)]);

        // Loaded anew, everything was read again: nothing of before waits.
        let (code, anew, _) = shop.ask(&["run", "--full-refresh"]);
        assert_eq!((code, Shop::counts(&anew)[2..].to_vec()), (0, vec![5, 1]), "{target}");
        assert_eq!(shop.waiting(), [(4, 1)]);
    }
}

#[test]
fn an_old_row_does_not_win_over_a_newer_one_unless_it_is_told_to() {
    for target in ["{ kind: files, root: out }", "{ kind: sqlite, path: out/target.db }", "PostgreSQL"] {
        let shop = Shop::new(target, "mode: merge, key: [id]");
        assert_eq!(shop.ask(&["run"]).0, 0);
        shop.folder.write("data/orders_2.csv", b"id,customer,amount\n3,ada,3.00\n");
        assert_eq!(Shop::counts(&shop.ask(&["run"]).1), [1, 0, 2, 0]);
        shop.job("", "-5");
        let (code, _, told) = shop.replay(&[]);
        assert_eq!(code, 3, "{target}: {told}");
        assert!(told.contains("would change 1 that output `orders` holds"), "{told}");
        assert!(told.contains("--overwrite"), "{told}");
        assert_eq!(shop.waiting(), [(1, 4)]);
        // What is not needed any more is let go, and stays to be looked at.
        let (code, _, told) = shop.ask(&["state", "rename", "load", "load"]);
        assert!(code == 2 && told.contains("still has a job"), "{told}");
        let (code, over, _) = shop.replay(&["--overwrite"]);
        assert_eq!((code, Shop::counts(&over)), (0, [0, 1, 2, 3]), "{target}: three still do not hold");
        assert_eq!(shop.waiting(), [(3, 3)]);
        let job = std::fs::read_to_string(shop.folder.path().join("jobs/load.yaml")).unwrap();
        std::fs::remove_file(shop.folder.path().join("jobs/load.yaml")).unwrap();
        shop.folder.write("jobs/other.yaml", job.replace("job: load", "job: other").as_bytes());
        shop.folder.write("sql/mappings/other/clean.sql", b"SELECT id, customer, amount FROM orders\n");
        let (code, _, told) = shop.ask(&["state", "rename", "load", "other"]);
        assert!(code == 3 && told.contains("still wait"), "{target}: {told}");
        std::fs::remove_file(shop.folder.path().join("jobs/other.yaml")).unwrap();
        shop.folder.write("jobs/load.yaml", job.as_bytes());
        assert_eq!(shop.ask(&["quarantine", "dismiss", "load", "--release", "2"]).1["release"], Value::Null);
        assert_eq!(shop.ask(&["quarantine", "dismiss", "load"]).1["release"], 4, "{target}");
        assert_eq!(shop.waiting(), []);
        assert_eq!(shop.ask(&["quarantine", "show", "load"]).0, 0);
        assert_eq!(shop.ask(&["run"]).1["outcome"], "nothing_new", "{target}");
    }
}

#[test]
fn a_row_is_read_in_the_spelling_that_it_was_kept_in() {
    let shop = Shop::new("{ kind: files, root: out }", "mode: append, totals: { sum: [amount] }");
    let cast = b"SELECT id, customer, CAST(amount AS decimal(18,2)) AS amount FROM orders\n";
    shop.folder.write("sql/mappings/load/clean.sql", cast);
    let job = |least: &str, amount: &str| {
        let job = JOB
            .replace("FORMAT", "format: { delimiter: \";\", decimal: \",\", thousands: \".\" }")
            .replace("LEAST", least)
            .replace("MODE", shop.mode)
            .replace("decimal(18,2)", amount);
        shop.folder.write("jobs/load.yaml", job.as_bytes());
    };
    shop.folder.write("data/orders_1.csv", "id;customer;amount\n1;ada;1.234,50\n2;ada;1,50\n".as_bytes());
    job("9999", "decimal(18,2)");
    assert_eq!(shop.ask(&["run"]).1["quarantined"], 2);
    // The first does not fit for a while: it is kept as the quarantine spelled it, not as the file does.
    job("0", "decimal(4,2)");
    assert_eq!(Shop::counts(&shop.replay(&[]).1), [1, 0, 1, 1]);
    job("0", "decimal(18,2)");
    let (_, mended, _) = shop.replay(&[]);
    assert_eq!(Shop::counts(&mended), [1, 0, 2, 0]);
    assert_eq!(mended["outputs"]["orders"]["totals"][0]["sums"][0][1], "1234.50");
}

#[test]
fn rows_that_would_find_no_partner_are_not_replayed() {
    let shop = Shop::new("{ kind: files, root: out }", "mode: append");
    let job = JOB
        .replace("FORMAT", "")
        .replace("MODE", shop.mode)
        .replace("file: customers.csv", "files: \"customers*.csv\"");
    shop.folder.write("jobs/load.yaml", job.replace("LEAST", "0").as_bytes());
    assert_eq!(shop.ask(&["run"]).1["quarantined"], 4);
    let (code, _, told) = shop.replay(&[]);
    assert_eq!(code, 3, "{told}");
    assert!(told.contains("on `clean` looks into `customers`"), "{told}");
    let job = job.replace("references: { column: customer, in: customers.customer }", "not_null: [id]");
    std::fs::remove_dir_all(shop.folder.path().join("out")).unwrap();
    std::fs::remove_dir_all(shop.folder.path().join(".floodmark")).unwrap();
    shop.folder.write("jobs/load.yaml", job.replace("LEAST", "0").as_bytes());
    let joined =
        b"SELECT o.id, o.customer, o.amount FROM orders o JOIN customers c ON c.customer = o.customer\n";
    shop.folder.write("sql/mappings/load/clean.sql", joined);
    let (code, first, _) = shop.ask(&["run"]);
    assert_eq!((code, Shop::counts(&first)), (0, [1, 0, 1, 3]), "a fifth has no partner");
    shop.folder.write("jobs/load.yaml", job.replace("LEAST", "-5").as_bytes());
    let (code, _, told) = shop.replay(&[]);
    assert_eq!(code, 3, "{told}");
    assert!(told.contains("joins rows of `orders` that were set aside with `customers`"), "{told}");
    assert_eq!(shop.waiting(), [(1, 3)]);
    // Beside each other they may stand.
    let union =
        b"SELECT id, customer, amount FROM orders UNION ALL SELECT 99, customer, 0.00 FROM customers\n";
    shop.folder.write("sql/mappings/load/clean.sql", union);
    let (code, mended, told) = shop.replay(&[]);
    assert_eq!((code, Shop::counts(&mended)), (0, [1, 0, 2, 2]), "{told}");
}

#[test]
fn what_cannot_be_replayed_says_why() {
    let shop = Shop::new("{ kind: files, root: out }", "mode: merge, key: [id]");
    let (code, _, told) = shop.replay(&[]);
    assert_eq!(code, 2);
    assert!(told.contains("job `load` has not run yet"), "{told}");
    assert_eq!(shop.ask(&["run"]).0, 0);
    let job = JOB.replace("FORMAT", "").replace("LEAST", "0").replace("MODE", shop.mode);
    shop.folder.write(
        "jobs/load.yaml",
        job.replace("{ clean: }", "{ cleaned: sql/mappings/load/clean.sql }")
            .replace("  clean:", "  cleaned:")
            .replace("from: clean", "from: cleaned")
            .as_bytes(),
    );
    let (code, _, told) = shop.replay(&[]);
    assert_eq!(code, 2);
    assert!(told.contains("release 1 set rows of `clean` aside"), "{told}");
    // What is read whole comes again by itself.
    shop.folder.write("jobs/load.yaml", job.replace("bad_rows", "read: always\n    bad_rows").as_bytes());
    let (code, run, _) = shop.replay(&[]);
    assert_eq!((code, run["outcome"].as_str()), (0, Some("nothing_new")));
    assert!(run["warnings"].to_string().contains("come again by themselves"), "{run}");
    // Rows of a model have the columns that they had.
    shop.folder.write("sql/mappings/load/clean.sql", b"SELECT id, customer, amount, 1 AS one FROM orders\n");
    shop.folder.write("jobs/load.yaml", job.as_bytes());
    let (code, _, told) = shop.replay(&[]);
    assert_eq!(code, 3);
    assert!(told.contains("`one` was not read when the row was set aside"), "{told}");
}
