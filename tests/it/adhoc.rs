//! `sql` and `copy`: the same engine without a project.

use std::process::Output;

use crate::{
    services::{
        Schema, postgres,
        web::{Web, answer},
    },
    support::Folder,
};

fn said(output: &Output) -> (i32, String) {
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    (output.status.code().unwrap(), text)
}

/// A folder with data, and nothing that makes it a project.
fn folder() -> Folder {
    let folder =
        Folder::with(&[("a.csv", "id,amount\n1,0.10\n2,0.20\n"), ("more/b.csv", "id,name\n2,grace\n")]);
    std::fs::remove_file(folder.path().join("floodmark.yaml")).unwrap();
    rusqlite::Connection::open(folder.path().join("erp.db"))
        .unwrap()
        .execute_batch("CREATE TABLE lines (id INTEGER PRIMARY KEY, amount DECIMAL(18,2)); INSERT INTO lines VALUES (1, '7.07'), (3, '0.03')")
        .unwrap();
    folder
}

#[test]
fn sql_asks_files_and_databases_by_their_places() {
    let folder = folder();
    let ask = |sql: &str| said(&folder.floodmark(&["sql", sql, "--output", "json"]));
    assert_eq!(ask("SELECT sum(amount) AS s FROM 'a.csv'"), (0, "{\"s\":\"0.30\"}\n".to_owned()));
    let joined = "WITH x AS (SELECT id FROM 'more/*.csv') SELECT a.id, l.amount FROM 'a.csv' AS a JOIN 'sqlite:erp.db#lines' AS l ON l.id = a.id WHERE a.id NOT IN (SELECT id FROM x)";
    assert_eq!(ask(joined), (0, "{\"id\":\"1\",\"amount\":\"7.07\"}\n".to_owned()));
    let named = "WITH T1 AS (SELECT 9 AS id) SELECT a.id FROM 'a.csv' AS a WHERE a.id IN (WITH x AS (SELECT 1 AS id) SELECT id FROM x UNION ALL SELECT id FROM t1)";
    assert_eq!(ask(named), (0, "{\"id\":\"1\"}\n".to_owned()));
    for (sql, expected) in [
        ("SELECT * FROM 'b.csv'", "there is no file `b.csv`"),
        ("SELECT nothing FROM 'a.csv'", "column 'nothing' not found"),
        ("SELECT * FROM 'sqlite:erp.db'", "names no table"),
        ("DROP TABLE x", "is no SELECT"),
        ("SELECT id, FROM, WHERE", "this is not SQL"),
    ] {
        let (code, text) = ask(sql);
        assert!(code == 2 && text.contains(expected), "{sql}: {text}");
        assert!(!text.contains("jobs/") && !text.contains("place_"), "nobody wrote that: {text}");
    }
}

#[test]
fn files_of_a_web_server_are_files() {
    let web = Web::new(|asked| match (asked.path.as_str(), asked.query.get("day").map(String::as_str)) {
        ("/d/rates.csv", None) => answer("200 OK", "", "currency,rate\nUSD,1.08\nJPY,163.20\n"),
        ("/d/export", Some("2026-11-01")) => answer("200 OK", "Content-Type: text/csv", "id\n1\n2\n"),
        _ => answer("404 Not Found", "", ""),
    });
    let folder = folder();
    let ask = |arguments: &[&str]| said(&folder.floodmark(arguments));
    let sql = format!("SELECT sum(rate) AS s FROM '{}/d/rates.csv'", web.url);
    assert_eq!(ask(&["sql", &sql, "--output", "json"]), (0, "{\"s\":\"164.28\"}\n".to_owned()));
    assert_eq!(web.count(), 1, "planned and read from one copy");
    let export = format!("{}/d/export?day=2026-11-01", web.url);
    let (code, text) = ask(&["copy", &export, "out.parquet"]);
    assert!(code == 0 && text.contains("out.parquet: 2 rows"), "{text}");
    let (code, text) = ask(&["copy", &format!("{}/d/none.csv", web.url), "out.parquet"]);
    assert!(code == 2 && text.contains("404") && !text.contains("place_"), "{text}");
}

#[test]
fn copy_carries_a_table_to_a_file_a_folder_and_a_database() {
    let folder = folder();
    let copy = |arguments: &[&str]| {
        let output =
            folder.command(&[&["copy"], arguments].concat()).env("PGPASSWORD", &postgres().password).output();
        said(&output.unwrap())
    };
    let (code, text) = copy(&["sqlite:erp.db", "out.parquet", "--table", "lines"]);
    assert!(code == 0 && text.contains("out.parquet: 2 rows"), "{text}");
    let (_, back) = said(&folder.floodmark(&[
        "sql",
        "SELECT count(*) AS n, sum(amount) AS s FROM 'out.parquet'",
        "--output",
        "json",
    ]));
    assert_eq!(back, "{\"n\":\"2\",\"s\":\"7.10\"}\n");

    assert_eq!(copy(&["a.csv", "sqlite:books.db", "--to-table", "amounts"]).0, 0);
    let again = copy(&["a.csv", "sqlite:books.db", "--to-table", "amounts"]);
    assert!(again.0 == 0 && again.1.contains("nothing new"), "{}", again.1);

    assert_eq!(copy(&["out.parquet", "file:lake", "--to-table", "lines"]).0, 0);
    let (_, back) = said(&folder.floodmark(&[
        "sql",
        "SELECT count(*) AS n FROM 'lake/lines/current/*.parquet'",
        "--output",
        "json",
    ]));
    assert_eq!(back, "{\"n\":\"2\"}\n");

    let (server, schema) = (postgres(), Schema::new());
    let url = format!(
        "postgres://admin@localhost:{}/postgres?schema={}&sslrootcert={}",
        server.port, schema.name, server.authority
    );
    let (code, text) = copy(&["more/b.csv", &url, "--mode", "merge", "--key", "id", "--to-table", "names"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(
        schema.with(|client| client.query_one("SELECT name FROM names", &[]).unwrap().get::<_, String>(0)),
        "grace"
    );
    let query = "SELECT id, upper(name) AS name FROM names";
    let (code, text) = copy(&[&url, "names.parquet", "--query", query]);
    assert!(code == 0 && text.contains("1 rows"), "{text}");

    for (arguments, expected) in [
        (&["sqlite:erp.db", "out.parquet"][..], "nothing says what to copy"),
        (&["a.csv", "out.txt"], "is no place to copy to"),
        (&["a.csv", "file:lake/out.parquet"], "no single file"),
        (&["sqlite:erp.db", "out.parquet", "--table", "linse"], "Did you mean `lines`?"),
        (&["a.csv", "sqlite:erp.db", "--to-table", "lines"], "holds rows, and no record"),
    ] {
        let (code, text) = copy(arguments);
        assert!(code > 0 && text.contains(expected) && !text.contains("jobs/"), "{arguments:?}: {text}");
    }
}
