//! Jobs between a database, a bucket and an API, on real servers; and what goes wrong there.

use std::{process::Command, sync::Mutex};

use crate::{
    mistakes::answered,
    services::{
        S3, Schema, postgres, s3,
        web::{SelfSigned, Web, answer, json},
    },
    support::Folder,
};

/// `examples/platform` with servers of its own.
struct Platform {
    folder: Folder,
    erp: Schema,
    dw: Schema,
    drop: String,
    bank: Web,
}

impl Platform {
    fn new() -> Self {
        let rates = [
            ("USD", "2026-10-01", "0.90000000"),
            ("USD", "2026-10-02", "0.91000000"),
            ("JPY", "2026-10-01", "0.00610000"),
        ];
        let busy = Mutex::new(true);
        let bank = Web::new(move |asked| {
            assert_eq!((asked.path.as_str(), asked.query["since"].as_str()), ("/v1/rates", "2026-10-01"));
            assert_eq!(asked.headers["authorization"], "Bearer bank-canary");
            // The first request of all is one too many.
            if std::mem::take(&mut *busy.lock().unwrap()) {
                return answer("429 Too Many Requests", "Retry-After: 0", "");
            }
            let page: usize = asked.query.get("cursor").map_or(0, |page| page.parse().unwrap());
            let (currency, day, rate) = rates[page];
            let next = if page + 1 < rates.len() { format!("\"{}\"", page + 1) } else { "null".to_owned() };
            json(&format!(
                r#"{{"data":{{"rates":[{{"currency":"{currency}","day":"{day}","value":{{"eur":{rate}}}}}]}},"next":{next}}}"#
            ))
        });
        let this = Self {
            folder: Folder::platform(),
            erp: Schema::new(),
            dw: Schema::new(),
            drop: S3::prefix(),
            bank,
        };
        this.erp.execute(
            "CREATE TABLE orders (order_id bigint PRIMARY KEY, ordered_on date, currency text, amount numeric(18,2), changed_at timestamptz);
             INSERT INTO orders VALUES (1, '2026-10-01', 'EUR', 100.10, '2026-10-01T08:00Z'),
                 (2, '2026-10-01', 'USD', 200.20, '2026-10-01T08:00Z'), (3, '2026-10-01', 'JPY', 30000, '2026-10-01T09:00Z')",
        );
        this.returns("first", "return_id;order_id;returned_on;currency;amount\nR-1;1;02.10.2026;EUR;10,10\n007;2;02.10.2026;USD;20,20\n");
        this
    }

    fn returns(&self, name: &str, csv: &str) {
        s3().put(&self.drop, &format!("returns/{name}.csv"), csv.as_bytes());
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let (server, store) = (postgres(), s3());
        let mut command = self.folder.command(arguments);
        for side in ["ERP", "DW"] {
            let schema = if side == "ERP" { &self.erp.name } else { &self.dw.name };
            command
                .env(format!("{side}_PORT"), server.port.to_string())
                .env(format!("{side}_DATABASE"), "postgres")
                .env(format!("{side}_USER"), "admin")
                .env(format!("{side}_PASSWORD"), &server.password)
                .env(format!("{side}_CA"), &server.authority)
                .env(format!("{side}_SCHEMA"), schema);
        }
        command
            .env("DROP_BUCKET", "floodmark")
            .env("DROP_PREFIX", &self.drop)
            .env("DROP_ENDPOINT", &store.endpoint)
            .env("DROP_ALLOW_HTTP", "true")
            .env("DROP_KEY", &store.admin.0)
            .env("DROP_SECRET", &store.admin.1)
            .env("BANK_URL", format!("{}/v1", self.bank.url))
            .env("BANK_ALLOW_HTTP", "true")
            .env("BANK_TOKEN", "bank-canary");
        command
    }

    /// Runs as of a day of which everything is there.
    fn run(&self, as_of: &str) -> serde_json::Value {
        let output = self.command(&["run", "--output", "json", "-vv", "--as-of", as_of]).output().unwrap();
        let (text, told) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
        println!("{text}{told}");
        for secret in [postgres().password.as_str(), s3().admin.1.as_str(), "bank-canary"] {
            assert!(!text.contains(secret) && !told.contains(secret), "P18");
        }
        assert_eq!(output.status.code(), Some(0));
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    }

    fn holds(&self) -> Vec<String> {
        let sql = "SELECT concat_ws(' ', kind, id, amount, amount_eur) FROM sales ORDER BY kind, id";
        self.dw.with(|client| client.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect())
    }
}

#[test]
fn a_platform_of_a_database_a_bucket_and_an_api_is_consolidated_over_two_days() {
    let platform = Platform::new();
    let first = platform.run("2026-10-02");
    assert_eq!(first["outcome"], "published");
    assert_eq!(
        platform.holds(),
        [
            "order 1 100.10 100.10",
            "order 2 200.20 180.18",
            "order 3 30000.00 183.00",
            "return 007 -20.20 -18.38",
            "return R-1 -10.10 -10.10"
        ]
    );
    // Totals tie: what was read, what was published.
    assert_eq!(first["sources"]["orders"]["counts"]["passed"], 3);
    assert_eq!(first["sources"]["orders"]["totals"][0]["sums"][0][1], "100.10");
    let published = &first["outputs"]["sales"]["totals"];
    assert_eq!(
        (&published[0]["sums"][0][1], &published[1]["sums"][0][1]),
        (&"463.28".into(), &"-28.48".into())
    );

    let again = platform.run("2026-10-02");
    assert_eq!(again["outcome"], "nothing_new");
    assert_eq!(platform.holds().len(), 5);

    // The next day: a correction, a late order, a new file; the old file is not read again.
    platform.erp.execute(
        "UPDATE orders SET amount = 201.20, changed_at = '2026-10-02T08:00Z' WHERE order_id = 2;
         INSERT INTO orders VALUES (4, '2026-10-02', 'USD', 50, '2026-10-02T08:00Z')",
    );
    platform
        .returns("second", "return_id;order_id;returned_on;currency;amount\nR-3;3;01.10.2026;JPY;1000,00\n");
    let second = platform.run("2026-10-03");
    let sales = &second["outputs"]["sales"];
    assert_eq!((&sales["inserted"], &sales["updated"]), (&2.into(), &1.into()), "{second}");
    assert_eq!(second["sources"]["returns"]["counts"]["extracted"], 1);
    assert_eq!(
        platform.holds(),
        [
            "order 1 100.10 100.10",
            "order 2 201.20 181.08",
            "order 3 30000.00 183.00",
            "order 4 50.00 45.50",
            "return 007 -20.20 -18.38",
            "return R-1 -10.10 -10.10",
            "return R-3 -1000.00 -6.10"
        ]
    );
    assert_eq!(platform.run("2026-10-03")["outcome"], "nothing_new");
}

const LOAD: &str = "job: load\nsources:\n  orders: { connection: data, files: \"orders*.csv\", columns: { id: int } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: append }\n";

/// A project that reads a bucket and publishes into one; `options` stand in both connections.
fn buckets(prefix: &str, options: &str) -> Folder {
    let store = s3();
    let connection = |name: &str| {
        format!(
            "{name}:\n  kind: s3\n  bucket: floodmark\n  prefix: {prefix}\n  endpoint: {}\n  allow_http: true\n  access_key_id: {}\n  secret_access_key: ${{env:STORE_SECRET}}\n  retry_timeout_ms: 300\n",
            store.endpoint, store.admin.0
        )
    };
    let mut text = format!("{}{}", connection("data"), connection("lake"));
    for change in options.lines() {
        let (key, value) = change.split_once(": ").unwrap();
        let lines = text.lines().map(|line| {
            let indent = line.trim_start().starts_with(&format!("{key}:"));
            if indent { format!("  {key}: {value}") } else { line.to_owned() }
        });
        text = lines.collect::<Vec<_>>().join("\n") + "\n";
    }
    Folder::with(&[
        ("connections.yaml", &text),
        ("jobs/load.yaml", LOAD),
        ("sql/mappings/load/clean.sql", "SELECT id FROM orders\n"),
    ])
}

#[test]
fn mistakes_with_buckets() {
    let store = s3();
    let (reader, reader_secret) = (&store.reader.0, store.reader.1.as_str());
    let prefix = S3::prefix();
    store.put(&prefix, "orders.csv", b"id\n1\n");
    // Answers every put with success, whatever its condition says.
    let careless = Web::new(|asked| match asked.method.as_str() {
        "PUT" => answer("200 OK", "ETag: \"x\"", ""),
        "HEAD" => answer("404 Not Found", "", ""),
        "GET" if asked.query.contains_key("list-type") => {
            let list = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>";
            answer("200 OK", "Content-Type: application/xml", list)
        }
        _ => answer("404 Not Found", "", ""),
    });
    let read_only = format!("access_key_id: {reader}");
    let (nowhere, careless) =
        ("endpoint: http://127.0.0.1:1".to_owned(), format!("endpoint: {}", careless.url));
    for (name, options, secret) in [
        ("bucket_that_is_not_there", "bucket: nowhere", store.admin.1.as_str()),
        ("bucket_with_a_wrong_secret", "", "wrong"),
        ("bucket_with_an_unknown_key", "access_key_id: nobody", store.admin.1.as_str()),
        ("bucket_that_may_only_be_read", read_only.as_str(), reader_secret),
        ("bucket_without_encryption", "allow_http: false", store.admin.1.as_str()),
        ("bucket_that_does_not_answer", nowhere.as_str(), store.admin.1.as_str()),
        ("bucket_of_no_host", "endpoint: http://no-such-host.invalid", store.admin.1.as_str()),
        ("bucket_without_conditional_puts", careless.as_str(), store.admin.1.as_str()),
        ("bucket_without_a_secret", "", ""),
    ] {
        let folder = buckets(&prefix, options);
        let mut command = folder.command(&["run"]);
        command.env("STORE_SECRET", secret);
        let careless = careless.trim_start_matches("endpoint: ");
        let hidden =
            [(prefix.as_str(), "[prefix]"), (store.endpoint.as_str(), "[store]"), (careless, "[careless]")];
        let told = answered(&mut command, &folder, name, &hidden);
        assert!(secret.len() < 6 || !told.contains(secret), "P18: {told}");
    }
    for (name, from, to) in [
        ("bucket_without_a_matching_file", "files: \"orders*.csv\"", "files: \"ordres*.csv\""),
        ("bucket_without_the_file", "files: \"orders*.csv\"", "file: ordres.csv"),
        ("bucket_asked_for_a_query", "files: \"orders*.csv\"", "query: sql/mappings/load/clean.sql"),
    ] {
        let folder = buckets(&prefix, "");
        folder
            .write("jobs/load.yaml", LOAD.replace(from, to).replace(", columns: { id: int }", "").as_bytes());
        let mut command = folder.command(&["run"]);
        command.env("STORE_SECRET", &store.admin.1);
        answered(&mut command, &folder, name, &[(prefix.as_str(), "[prefix]")]);
    }
}

#[test]
fn mistakes_with_apis() {
    let project = |web: &str, source: &str, options: &str| {
        let connections = format!(
            "bank: {{ kind: http, url: \"{web}\", allow_http: true, retry_timeout_ms: 300{options} }}\nlake: {{ kind: files, root: out }}\n"
        );
        let job = format!(
            "job: load\nsources:\n  rates: {{ connection: bank, {source} }}\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    rates: {{ from: clean, mode: append }}\n"
        );
        Folder::with(&[
            ("connections.yaml", &connections),
            ("jobs/load.yaml", &job),
            ("sql/mappings/load/clean.sql", "SELECT * FROM rates\n"),
        ])
    };
    let request =
        "request: { path: rates, records: $.rates }, columns: { day: date, rate: \"decimal(18,8)\" }";
    let page = |body: &'static str| Web::new(move |_| json(body));
    #[rustfmt::skip]
    let cases = [
        ("api_that_wants_a_login", Web::new(|_| answer("401 Unauthorized", "", "")), request.to_owned(), ""),
        ("api_that_forbids", Web::new(|_| answer("403 Forbidden", "", "")), request.to_owned(), ""),
        ("api_without_that_path", Web::new(|_| answer("404 Not Found", "", "")), request.to_owned(), ""),
        ("api_that_does_not_understand", Web::new(|_| answer("400 Bad Request", "", "")), request.to_owned(), ""),
        ("api_that_is_broken", Web::new(|_| answer("500 Internal Server Error", "", "")), request.to_owned(), ""),
        ("api_behind_a_login_page", Web::new(|_| answer("200 OK", "Content-Type: text/html", "<html>")), request.to_owned(), ""),
        ("api_that_answers_something_else", page("{\"error\": \"secret-canary\"}"), request.to_owned(), ""),
        ("api_that_answers_half", page("{\"rates\": [{\"day\": \"2026-10-01\""), request.to_owned(), ""),
        ("api_with_a_wrong_value", page("{\"rates\": [{\"day\": \"secret-canary\", \"rate\": 1}]}"), request.to_owned(), ""),
        ("api_that_leads_elsewhere", Web::new(|_| answer("302 Found", "Location: https://example.com/", "")), request.to_owned(), ""),
        ("api_without_columns", page("{}"), "request: { path: rates }".to_owned(), ""),
        ("api_with_a_broken_path", page("{}"), request.replace("$.rates", "'rates[*]'"), ""),
        ("api_with_an_unknown_parameter", page("{}"), request.replace("path: rates", "path: rates, query: { to: $period }"), ""),
        ("api_with_a_window_and_no_cursor", page("{}"), request.replace("path: rates", "path: rates, query: { since: $from }"), ""),
        ("api_with_a_cursor_of_numbers", page("{}"), request.replace("day: date", "day: int") + ", incremental: { cursor: day }", ""),
        ("api_without_a_way_to_go_on", page("{}"), request.replace("path: rates", "path: rates, pages: { kind: cursor }"), ""),
        ("api_without_its_token", page("{}"), request.to_owned(), ", auth: bearer"),
        ("api_with_a_table", page("{}"), "table: rates".to_owned(), ""),
        ("api_as_a_target", page("{}"), request.to_owned(), ""),
        ("web_file_behind_a_login_page", Web::new(|_| answer("200 OK", "Content-Type: text/html", "<html>")), "file: rates.csv".to_owned(), ""),
        ("web_file_that_is_not_there", Web::new(|_| answer("404 Not Found", "", "")), "file: rates.csv".to_owned(), ""),
        ("web_file_of_an_unknown_kind", Web::new(|_| answer("200 OK", "", "a,b\n")), "file: rates".to_owned(), ""),
        ("web_file_without_a_column", Web::new(|_| answer("200 OK", "", "a,b\n1,2\n")), "file: rates.csv, columns: { c: int }".to_owned(), ""),
        ("web_file_with_a_cursor", page("{}"), "file: rates.csv, incremental: { cursor: day }".to_owned(), ""),
        ("web_file_with_pages", page("{}"), "request: { path: rates, records: $.x, pages: { kind: link } }, format: { kind: csv }".to_owned(), ""),
        ("web_files_by_a_pattern", page("{}"), "files: \"*.csv\"".to_owned(), ""),
    ];
    for (name, web, source, options) in cases {
        let folder = project(&web.url, &source, options);
        if name == "api_as_a_target" {
            let job = std::fs::read_to_string(folder.path().join("jobs/load.yaml")).unwrap();
            folder.write("jobs/load.yaml", job.replace("connection: lake", "connection: bank").as_bytes());
        }
        let told =
            answered(&mut folder.command(&["run"]), &folder, name, &[(web.url.as_str(), "http://[api]")]);
        assert!(!told.contains("canary"), "{name}: an answer's text is nobody's to tell: {told}");
    }
    let folder = project("http://no-such-host.invalid", request, "");
    answered(&mut folder.command(&["run"]), &folder, "api_of_no_host", &[]);
    let folder = project("http://127.0.0.1:1", request, "");
    answered(&mut folder.command(&["run"]), &folder, "api_that_does_not_answer", &[]);
    // A real server whose certificate nobody here signed.
    let server = SelfSigned::new();
    let folder = project(&server.url, request, "");
    let hidden = [(server.url.as_str(), "https://[api]")];
    answered(&mut folder.command(&["run"]), &folder, "api_with_an_untrusted_certificate", &hidden);
}
