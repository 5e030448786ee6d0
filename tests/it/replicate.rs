//! A whole schema, replicated by a job of ten lines: into another database, into Parquet in a bucket, and back.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    services::{S3, Schema, postgres, s3},
    support::Folder,
};

const JOB: &str = "job: NAME
sources:
  shop:
    connection: FROM
    tables: \"*\"
    except: [audit_log]
target:
  connection: TO
  outputs:
    \"*\": { from: shop, mode: merge, deletes: key_compare }
";

const TABLES: [&str; 10] = [
    "addresses",
    "categories",
    "customers",
    "employees",
    "empty_table",
    "order_lines",
    "orders",
    "payments",
    "products",
    "stock",
];

struct Shop {
    folder: Folder,
    from: Schema,
    to: Schema,
    back: Schema,
}

impl Shop {
    fn new() -> Self {
        let (server, store) = (postgres(), s3());
        let (from, to, back) = (Schema::new(), Schema::new(), Schema::new());
        from.execute(include_str!("shop.sql"));
        let database = |name: &str, schema: &Schema| {
            format!(
                "{name}: {{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:PASSWORD}}\", sslrootcert: {}, schema: {} }}\n",
                server.port, server.authority, schema.name
            )
        };
        let lake = format!(
            "lake: {{ kind: s3, bucket: floodmark, prefix: {}, endpoint: \"{}\", allow_http: true, access_key_id: {}, secret_access_key: \"${{env:SECRET}}\" }}\n",
            S3::prefix(),
            store.endpoint,
            store.admin.0
        );
        let connections =
            [database("shop", &from), database("copy", &to), database("again", &back), lake].concat();
        let job = |name: &str, from: &str, to: &str| {
            JOB.replace("NAME", name).replace("FROM", from).replace("TO", to)
        };
        let folder = Folder::with(&[
            ("connections.yaml", &connections),
            ("jobs/load.yaml", &job("to_database", "shop", "copy")),
            ("jobs/lake.yaml", &job("to_bucket", "shop", "lake")),
            ("jobs/back.yaml", &job("from_bucket", "lake", "again").replace("    except: [audit_log]\n", "")),
        ]);
        Self { folder, from, to, back }
    }

    /// Runs the three jobs, in the order that they follow from, and gives their documents by name.
    fn run(&self) -> BTreeMap<String, Value> {
        let mut command = self.folder.command(&["run", "--output", "json"]);
        let output =
            command.env("PASSWORD", &postgres().password).env("SECRET", &s3().admin.1).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(0));
        let runs = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        runs.map(|run| (run["job"].as_str().unwrap().to_owned(), run)).collect()
    }

    /// Count and hash of every row of every table, as the server spells them.
    fn rows(schema: &Schema) -> Vec<String> {
        schema.with(|client| {
            let of = |table: &&str| {
                let sql = format!("SELECT concat_ws(' ', '{table}', count(*), md5(string_agg(t::text, E'\\n' ORDER BY t::text COLLATE \"C\"))) FROM {table} AS t");
                client.query_one(&sql, &[]).unwrap().get(0)
            };
            TABLES.iter().map(of).collect()
        })
    }
}

fn moved(run: &Value, table: &str) -> [u64; 3] {
    ["inserted", "updated", "deleted"].map(|count| run["outputs"][table][count].as_u64().unwrap())
}

#[test]
fn a_schema_is_replicated_by_ten_lines_and_then_only_what_changed_moves() {
    let shop = Shop::new();
    assert_eq!(JOB.lines().count(), 10);
    let first = shop.run();
    assert_eq!(moved(&first["to_database"], "order_lines"), [20_000, 0, 0]);
    let expected = Shop::rows(&shop.from);
    assert_eq!(Shop::rows(&shop.to), expected);
    assert_eq!(Shop::rows(&shop.back), expected, "through Parquet and back");

    for run in shop.run().values() {
        assert_eq!(run["outcome"], "nothing_new");
    }

    shop.from.execute(
        "UPDATE orders SET note = 'changed', total = total + 0.01 WHERE order_id % 1000 = 0;
         INSERT INTO customers (customer_id, name) VALUES (5001, 'new'), (5002, 'newer');
         DELETE FROM stock WHERE warehouse = 'NYC' AND pieces = 7;
         UPDATE products SET tags = NULL WHERE sku = 'SKU-00042'",
    );
    let second = shop.run();
    let gone = shop.from.with(|client| {
        client.query_one("SELECT 500 * 3 - count(*) FROM stock", &[]).unwrap().get::<_, i64>(0)
    });
    for job in ["to_database", "to_bucket", "from_bucket"] {
        let run = &second[job];
        assert_eq!(moved(run, "orders"), [0, 5, 0], "{job}");
        assert_eq!(moved(run, "customers"), [2, 0, 0], "{job}");
        assert_eq!(moved(run, "products"), [0, 1, 0], "{job}");
        assert_eq!(moved(run, "stock"), [0, 0, gone.unsigned_abs()], "{job}");
        for table in ["addresses", "categories", "employees", "order_lines", "payments"] {
            assert_eq!(moved(run, table), [0, 0, 0], "{job} {table}");
        }
    }
    let expected = Shop::rows(&shop.from);
    assert_eq!(Shop::rows(&shop.to), expected);
    assert_eq!(Shop::rows(&shop.back), expected);
}

#[test]
fn tables_that_would_collide_or_leave_the_folder_are_refused() {
    let folder = Folder::with(&[
        ("connections.yaml", "erp: { kind: sqlite, path: erp.db }\nlake: { kind: files, root: out }\n"),
        ("jobs/load.yaml", &JOB.replace("NAME", "load").replace("FROM", "erp").replace("TO", "lake")),
    ]);
    let database = rusqlite::Connection::open(folder.path().join("erp.db")).unwrap();
    let refused = |table: &str, more: &str, expected: &str| {
        database.execute_batch(&format!("CREATE TABLE \"{table}\" (id INTEGER PRIMARY KEY)")).unwrap();
        let job = JOB.replace("NAME", "load").replace("FROM", "erp").replace("TO", "lake");
        folder.write("jobs/load.yaml", format!("{job}{more}").as_bytes());
        let output = folder.floodmark(&["run"]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && told.contains(expected), "{told}");
        database.execute_batch(&format!("DROP TABLE \"{table}\"")).unwrap();
    };
    refused("/srv/x", "", "cannot name an output");
    refused("fm_stage_0", "", "cannot name an output");
}
