//! The source's promises over every style of paging, and what goes wrong between a client and a server: the list is whole, or the
//! error is clear.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use arrow::array::RecordBatch;
use serde_json::json;

use crate::{
    connector::{
        Connection, Connector, Options,
        contract::{self, Row, World, everything, made_at, orders, read_all},
        services::web::{Asked, Web, answer, json},
        spec::{ApiRequest, CursorSpec, OnNull, PageStyle, Pages, Read, StreamSpec},
    },
    error::{Error, ErrorKind},
};

fn open(url: &str, more: &serde_json::Value) -> Arc<dyn Connection> {
    let mut values = json!({
        "url": url, "allow_http": true, "retry_timeout_ms": 1500, "bound_margin_ms": 1, "timeout_ms": 5000,
    });
    values.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let options = Options { name: "api".to_owned(), base: "".into(), values, spill: std::env::temp_dir() };
    (Connector::named("http").unwrap().open)(options).unwrap()
}

fn pages(kind: PageStyle, next: Option<&str>) -> Pages {
    let next = next.map(str::to_owned);
    Pages {
        kind,
        next,
        param: None,
        size: None,
        size_param: None,
        first: None,
        lenient: false,
        stable: false,
    }
}

fn request(pages: Option<Pages>) -> ApiRequest {
    ApiRequest {
        path: "orders".to_owned(),
        records: Some("$.data.items".to_owned()),
        pages,
        ..Default::default()
    }
}

/// How a world's server pages.
const STYLES: [(&str, PageStyle, Option<&str>); 6] = [
    ("offset", PageStyle::Offset, None),
    ("page", PageStyle::Page, None),
    ("cursor", PageStyle::Cursor, Some("$.next")),
    ("link", PageStyle::Link, None),
    ("next url", PageStyle::NextUrl, Some("$.next_url")),
    ("header", PageStyle::Header, Some("X-Next")),
];

/// Rows of a page.
const PAGE: usize = 2000;

fn document(rows: &[Row], more: &str) -> String {
    let rows: Vec<String> = rows
        .iter()
        .map(|row| {
            let made_at = made_at(row.id).to_rfc3339();
            format!(
                r#"{{"id":{},"money":{{"amount":{}}},"note":{},"made_at":"{made_at}"}}"#,
                row.id,
                row.amount,
                json!(row.note)
            )
        })
        .collect();
    format!(r#"{{"data":{{"items":[{}]}}{more}}}"#, rows.join(","))
}

/// An API whose list grows.
struct Api {
    name: &'static str,
    pages: Pages,
    rows: Arc<Mutex<Vec<Row>>>,
    web: Web,
}

impl Api {
    fn new(name: &'static str, kind: PageStyle, next: Option<&str>) -> Self {
        let rows: Arc<Mutex<Vec<Row>>> = Arc::default();
        let listed = Arc::clone(&rows);
        let web = Web::new(move |asked| page(kind, &listed.lock().unwrap(), asked));
        Self { name, pages: pages(kind, next), rows, web }
    }
}

fn page(kind: PageStyle, rows: &[Row], asked: &Asked) -> Vec<u8> {
    if asked.method == "HEAD" {
        return answer("200 OK", "", "");
    }
    let number = |name: &str| asked.query.get(name).map_or(0, |text| text.parse::<usize>().unwrap());
    let start = match kind {
        PageStyle::Offset => number("offset"),
        PageStyle::Page => (number("page") - 1) * PAGE,
        _ => number("cursor"),
    };
    let end = (start + PAGE).min(rows.len());
    let here = rows.get(start..end).unwrap_or_default();
    let more = end < rows.len();
    let url = format!("/orders?cursor={end}");
    match kind {
        PageStyle::Cursor if more => json(&document(here, &format!(r#","next":{end}"#))),
        PageStyle::Cursor => json(&document(here, r#","next":null"#)),
        PageStyle::NextUrl if more => json(&document(here, &format!(r#","next_url":"{url}""#))),
        PageStyle::Link if more => {
            let headers = format!("Content-Type: application/json\nLink: <{url}>; rel=\"next\"");
            answer("200 OK", &headers, &document(here, ""))
        }
        PageStyle::Header if more => {
            answer("200 OK", &format!("Content-Type: application/json\nX-Next: {end}"), &document(here, ""))
        }
        _ => json(&document(here, "")),
    }
}

impl World for Api {
    fn name(&self) -> &'static str {
        self.name
    }

    fn connection(&self) -> Arc<dyn Connection> {
        open(&self.web.url, &json!({}))
    }

    fn stream(&self) -> StreamSpec {
        let mut request = request(Some(self.pages.clone()));
        request.fields.insert("amount".to_owned(), "$.money.amount".to_owned());
        request.query.insert("since".to_owned(), "$from".to_owned());
        let mut stream = orders(Read::Request(Box::new(request)));
        stream.columns.insert("made_at".to_owned(), "timestamptz".to_owned());
        let columns = vec!["made_at".to_owned()];
        stream.cursor = Some(CursorSpec { columns, overlap: None, on_null: OnNull::Error });
        stream
    }

    fn add(&self, rows: &[Row]) {
        self.rows.lock().unwrap().extend(rows.iter().cloned());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_keeps_its_promises_in_every_style_of_paging() {
    for (name, kind, next) in STYLES {
        contract::source(|| Box::new(Api::new(name, kind, next))).await;
    }
}

/// A list that a test scripts, read whole.
struct Script {
    web: Web,
    request: ApiRequest,
    options: serde_json::Value,
}

impl World for Script {
    fn name(&self) -> &'static str {
        "a script"
    }

    fn connection(&self) -> Arc<dyn Connection> {
        open(&self.web.url, &self.options)
    }

    fn stream(&self) -> StreamSpec {
        orders(Read::Request(Box::new(self.request.clone())))
    }

    fn add(&self, _: &[Row]) {}
}

impl Script {
    fn new(request: ApiRequest, answer: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self { web: Web::new(answer), request, options: json!({}) }
    }

    async fn read(&self) -> Result<usize, Error> {
        let batches = read_all(self, self.stream(), &Arc::default()).await?;
        Ok(batches.iter().map(RecordBatch::num_rows).sum())
    }
}

/// One answer, the list of one row, or of as many as `ids`.
fn items(ids: impl IntoIterator<Item = i64>, more: &str) -> String {
    let items: Vec<String> =
        ids.into_iter().map(|id| format!(r#"{{"id":{id},"amount":{id}.25,"note":"n"}}"#)).collect();
    format!(r#"{{"data":{{"items":[{}]}}{more}}}"#, items.join(","))
}

fn every(number: usize, counter: &AtomicUsize) -> bool {
    counter.fetch_add(1, Ordering::SeqCst).is_multiple_of(number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_help_later_is_asked_again() {
    for status in
        ["429 Too Many Requests", "500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable"]
    {
        let counter = AtomicUsize::new(0);
        let script = Script::new(request(None), move |_| {
            if every(2, &counter) {
                answer(status, "Retry-After: 0", "busy")
            } else {
                json(&items(1..=3, ""))
            }
        });
        assert_eq!(script.read().await.unwrap(), 3, "{status}");
        assert_eq!(script.web.count(), 2, "{status}");
    }
    // Patience has an end, and what the server wants is said.
    let script = Script::new(request(None), |_| answer("429 Too Many Requests", "Retry-After: 3600", ""));
    let error = script.read().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Temporary);
    assert!(error.to_string().contains("3600"), "{error}");
    // A server that says "at once" for ever is not asked for ever.
    let script = Script::new(request(None), |_| answer("429 Too Many Requests", "Retry-After: 0", ""));
    assert_eq!(script.read().await.unwrap_err().kind(), ErrorKind::Temporary);
    assert!(script.web.count() < 30);
    let script = Script::new(request(None), |_| {
        answer("503 Service Unavailable", "Retry-After: 18446744073709551615", "")
    });
    assert_eq!(script.read().await.unwrap_err().kind(), ErrorKind::Temporary);
    // By a date of its own clock.
    let headers = "Date: Tue, 24 Nov 2026 08:00:00 GMT\nRetry-After: Tue, 24 Nov 2026 08:30:00 GMT";
    let script = Script::new(request(None), move |_| answer("503 Service Unavailable", headers, ""));
    assert!(script.read().await.unwrap_err().to_string().contains("1800"));
    // A POST that may have been heard is not sent twice.
    let post = ApiRequest {
        method: crate::connector::spec::Method::Post,
        body: Some("{}".to_owned()),
        ..request(None)
    };
    let script = Script::new(post, |_| answer("500 Internal Server Error", "", ""));
    assert!(script.read().await.is_err());
    assert_eq!(script.web.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_cut_short_is_never_taken_for_whole() {
    let whole = items(1..=40, "");
    for cut in (0..whole.len()).step_by(whole.len() / 50) {
        for kind in ["length", "chunked", "close"] {
            let part = whole.get(..cut).unwrap().to_owned();
            let full = whole.clone();
            let counter = AtomicUsize::new(0);
            let script = Script::new(request(None), move |_| {
                if !every(2, &counter) {
                    return json(&full);
                }
                let length = full.len();
                let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n";
                match kind {
                    "length" => format!("{head}Content-Length: {length}\r\n\r\n{part}"),
                    "chunked" => format!("{head}Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{part}"),
                    _ => format!("{head}\r\n{part}"),
                }
                .into_bytes()
            });
            match (kind, script.read().await) {
                // What the protocol shows to be cut is asked again.
                ("length" | "chunked", outcome) => assert_eq!(outcome.unwrap(), 40, "{kind} {cut}"),
                // What only the document shows is refused.
                (_, outcome) => {
                    let error = outcome.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Data, "{kind} {cut}: {error}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_list_is_no_end_of_the_list() {
    let login = "<html><body>Please log in</body></html>";
    for (name, bytes) in [
        ("a login page", answer("200 OK", "Content-Type: text/html", login)),
        ("a page without a type", answer("200 OK", "", login)),
        ("an error in disguise", json(r#"{"error": "no such tenant"}"#)),
        ("nothing", json("")),
        ("an error beside a null", json(r#"{"data":{"items":null},"errors":[{"message":"no"}]}"#)),
        ("a list of numbers", json(r#"{"data":{"items":[1,2]}}"#)),
        ("a key twice", json(r#"{"data":{"items":[{"id":1,"amount":1,"note":"a","note":"b"}]}}"#)),
        (
            "deep nesting",
            json(&format!(r#"{{"data":{{"items":[{}1{}]}}}}"#, "[".repeat(500), "]".repeat(500))),
        ),
        (
            "not UTF-8",
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\n\"\xff\xfe\"".to_vec(),
        ),
    ] {
        let script = Script::new(request(None), move |_| bytes.clone());
        let error = script.read().await.expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Data, "{name}: {error}");
    }
    for (records, body) in [
        ("$.data.items", r#"{"data":{"items":[]}}"#),
        ("$.data.items", r#"{"data":{"items":null},"errors":[]}"#),
        ("$.data.items[*]", r#"{"data":{"items":[]}}"#),
    ] {
        let request = ApiRequest { records: Some(records.to_owned()), ..request(None) };
        let script = Script::new(request, move |_| json(body));
        assert_eq!(script.read().await.unwrap(), 0, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_next_page_that_was_read_before_or_is_elsewhere_is_refused() {
    let links = Some(pages(PageStyle::NextUrl, Some("$.next")));
    let script = Script::new(request(links.clone()), |asked| {
        let to = if asked.query.contains_key("b") { "/orders?a=1" } else { "/orders?b=1" };
        json(&items(1..=2, &format!(r#","next":"{to}""#)))
    });
    let error = script.read().await.unwrap_err();
    assert!(error.to_string().contains("read before"), "{error}");
    assert!(script.web.count() <= 4);

    let script =
        Script::new(request(links.clone()), |_| json(&items([1], r#","next":"http://localhost:9/x""#)));
    let error = script.read().await.unwrap_err();
    assert!(error.to_string().contains("another host"), "{error}");

    let script =
        Script::new(request(None), |_| answer("302 Found", "Location: http://169.254.169.254/latest", ""));
    let error = script.read().await.unwrap_err();
    assert!(error.to_string().contains("another host"), "{error}");

    let script = Script::new(request(None), |_| answer("302 Found", "Location: /orders", ""));
    let error = script.read().await.unwrap_err();
    assert!(error.to_string().contains("redirects"), "{error}");

    // A redirect on the same host is followed.
    let script = Script::new(request(None), |asked| match asked.path.as_str() {
        "/orders" => answer("307 Temporary Redirect", "Location: /moved", ""),
        _ => json(&items(1..=2, "")),
    });
    assert_eq!(script.read().await.unwrap(), 2);

    // Where the way to the next page is not what it should be, the list does not just end.
    for (next, more, ends) in [
        ("$.links.next", r#","links":{"next":{"href":"/orders?b=1"}}"#, false),
        ("$.links.next", r#","links":{"next":true}"#, false),
        ("$.lniks.next", r#","links":{"next":"/orders?b=1"}"#, false),
        ("$.links.next", r#","links":{}"#, true),
        ("$.links.next", r#","links":{"next":null}"#, true),
        ("$.links.next", r#","links":{"next":""}"#, true),
    ] {
        let script = Script::new(request(Some(pages(PageStyle::NextUrl, Some(next)))), move |_| {
            json(&items([1], more))
        });
        assert_eq!(script.read().await.is_ok(), ends, "{next} {more}");
    }
    let lenient = Pages { lenient: true, ..pages(PageStyle::NextUrl, Some("$.links.next")) };
    let script = Script::new(request(Some(lenient)), |_| json(&items([1], "")));
    assert_eq!(script.read().await.unwrap(), 1);

    // An endless list ends with the limit.
    let mut script = Script::new(request(Some(pages(PageStyle::Cursor, Some("$.next")))), |asked| {
        let page: u32 = asked.query.get("cursor").map_or(0, |page| page.parse().unwrap());
        json(&items([i64::from(page)], &format!(r#","next":"{}""#, page + 1)))
    });
    script.options = json!({ "max_pages": 20 });
    let error = script.read().await.unwrap_err();
    assert!(error.to_string().contains("more than 20 pages"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_go_to_their_own_host_and_a_token_is_renewed_once() {
    // Another host, which the connection allows.
    let other = Web::new(|_| json(&items([7], "")));
    let port = other.url.rsplit(':').next().unwrap().to_owned();
    let elsewhere = format!("http://localhost:{port}/more");
    let links = Some(pages(PageStyle::NextUrl, Some("$.next")));
    let mut script =
        Script::new(request(links), move |_| json(&items([1], &format!(r#","next":"{elsewhere}""#))));
    script.options = json!({ "allow_hosts": ["localhost"], "auth": "bearer", "token": "hush", "headers": { "X-Tenant": "hush" } });
    assert_eq!(script.read().await.unwrap(), 2);
    assert_eq!(script.web.asked.lock().unwrap()[0].headers["authorization"], "Bearer hush");
    let asked = other.asked.lock().unwrap().clone();
    assert!(!asked[0].headers.values().any(|value| value.contains("hush")), "{:?}", asked[0]);

    // A token that runs out in the middle.
    let granted = AtomicUsize::new(0);
    let cursor = Some(pages(PageStyle::Cursor, Some("$.next")));
    let served = AtomicUsize::new(0);
    let mut script = Script::new(request(cursor), move |asked| {
        if asked.path == "/token" {
            assert!(asked.body.contains("client_credentials") && asked.headers.contains_key("authorization"));
            let token = granted.fetch_add(1, Ordering::SeqCst);
            return json(&format!(r#"{{"access_token":"t{token}","token_type":"bearer","expires_in":1}}"#));
        }
        // Every token is good for two requests.
        let token = format!("Bearer t{}", served.load(Ordering::SeqCst) / 2);
        if asked.headers["authorization"] != token {
            return answer("401 Unauthorized", "", "");
        }
        let page = served.fetch_add(1, Ordering::SeqCst);
        let next = if page < 6 { format!(r#","next":"{}""#, page + 1) } else { String::new() };
        json(&items([i64::try_from(page).unwrap()], &next))
    });
    script.options =
        json!({ "auth": "oauth2", "token_url": "/token", "client_id": "me", "client_secret": "hush" });
    assert_eq!(script.read().await.unwrap(), 7);

    // One that is never good ends the run.
    let mut script = Script::new(request(None), |asked| match asked.path.as_str() {
        "/token" => json(r#"{"access_token":"stale"}"#),
        _ => answer("401 Unauthorized", "", ""),
    });
    script.options =
        json!({ "auth": "oauth2", "token_url": "/token", "client_id": "me", "client_secret": "hush" });
    let error = script.read().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert_eq!(script.web.count(), 4);

    for (options, header, expected) in [
        (json!({ "auth": "api_key", "key": "hush" }), "x-api-key", "hush"),
        (json!({ "auth": "basic", "user": "me", "password": "hush" }), "authorization", "Basic bWU6aHVzaA=="),
    ] {
        let mut script = Script::new(request(None), |_| json(&items([1], "")));
        script.options = options;
        assert_eq!(script.read().await.unwrap(), 1);
        assert_eq!(script.web.asked.lock().unwrap()[0].headers[header], expected);
    }
    let mut script = Script::new(request(None), |_| json(&items([1], "")));
    script.options = json!({ "auth": "api_key", "key": "hush", "key_in": "query", "key_name": "k" });
    assert_eq!(script.read().await.unwrap(), 1);
    assert_eq!(script.web.asked.lock().unwrap()[0].query["k"], "hush");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_shifts_between_its_pages_is_read_until_it_keeps_still() {
    for kind in [PageStyle::Offset, PageStyle::Page] {
        // Rows are put in front and taken away while the first pages are read.
        let (list, calls) = (Mutex::new((1..=10_i64).collect::<Vec<_>>()), AtomicUsize::new(0));
        let script = Script::new(request(Some(pages(kind, None))), move |asked| {
            let mut list = list.lock().unwrap();
            match calls.fetch_add(1, Ordering::SeqCst) {
                1 => list.insert(0, 11),
                3 => drop(list.remove(2)),
                _ => {}
            }
            let start = match kind {
                PageStyle::Offset => asked.query["offset"].parse::<usize>().unwrap(),
                _ => (asked.query["page"].parse::<usize>().unwrap() - 1) * 3,
            };
            json(&items(list.iter().copied().skip(start).take(3), ""))
        });
        // The final list: 11 and 1 to 10 without the third.
        assert_eq!(script.read().await.unwrap(), 10, "{kind:?}");

        let counter = AtomicUsize::new(0);
        let script = Script::new(request(Some(pages(kind, None))), move |asked| {
            let at = asked.query.get("offset").or_else(|| asked.query.get("page")).unwrap();
            let id = i64::try_from(counter.fetch_add(1, Ordering::SeqCst)).unwrap();
            json(&items((at == "0" || at == "1").then_some(id), ""))
        });
        let error = script.read().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Temporary, "{kind:?}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_nobody_should_ask_is_not_asked() {
    for url in ["http://169.254.169.254/", "http://[::ffff:169.254.169.254]/", "http://[fd00:ec2::254]/"] {
        let error = open(url, &json!({})).ping().await.unwrap_err();
        assert!(error.to_string().contains("never asked"), "{url}: {error}");
    }
    let values = json!({ "url": "http://example.com" });
    let options = Options { name: "api".to_owned(), base: "".into(), values, spill: std::env::temp_dir() };
    let error = (Connector::named("http").unwrap().open)(options).unwrap_err();
    assert!(error.to_string().contains("not encrypted"), "{error}");
}

/// A stream that is a file of the server.
fn file(path: &str) -> StreamSpec {
    StreamSpec {
        columns: indexmap::IndexMap::new(),
        ..StreamSpec::whole("rates", Read::File(path.to_owned()))
    }
}

const RATES: &str = "currency,rate\nUSD,1.0834\nJPY,163.20\n";

/// What a stream holds, row by row, as text.
async fn texts(connection: &Arc<dyn Connection>, stream: &StreamSpec) -> Result<Vec<String>, Error> {
    let options = arrow::util::display::FormatOptions::default();
    let mut rows = Vec::new();
    let (_, batches) = everything(connection.as_ref(), stream, &Arc::default()).await?;
    for batch in batches {
        for row in 0..batch.num_rows() {
            let cell = |array| {
                arrow::util::display::ArrayFormatter::try_new(array, &options).unwrap().value(row).to_string()
            };
            rows.push(batch.columns().iter().map(|array| cell(array.as_ref())).collect::<Vec<_>>().join(" "));
        }
    }
    Ok(rows)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_a_web_server_are_read_whole_and_fetched_once() {
    let web = Web::new(|asked| match asked.path.as_str() {
        "/v1/rates.csv" => answer("200 OK", "Content-Type: text/csv", RATES),
        "/v1/moved.csv" => answer("302 Found", "Location: /v1/rates.csv", ""),
        "/v1/export" if asked.query["day"] == "2026-11-01" => {
            assert_eq!(asked.headers["accept-encoding"], "identity");
            answer("200 OK", "Content-Type: text/csv; charset=utf-8", &RATES.replace(',', ";"))
        }
        "/v1/tenant.csv" => answer("200 OK", "", &format!("tenant\n{}\n", asked.headers["x-tenant"])),
        "/v1/later.csv" => answer("202 Accepted", "", "{}"),
        // The server tells what it is.
        "/v1/list" => answer("200 OK", "Content-Type: text/csv; header=present", RATES),
        "/v1/rates.jsonl" => answer(
            "200 OK",
            "",
            "{\"currency\":\"USD\",\"rate\":1.0834}\n{\"currency\":\"JPY\",\"rate\":163.20}\n",
        ),
        _ => answer("404 Not Found", "", ""),
    });
    let expected = ["USD 1.0834", "JPY 163.2000"].map(str::to_owned);
    let api = open(&format!("{}/v1", web.url), &json!({}));
    assert_eq!(texts(&api, &file("rates.csv")).await.unwrap(), expected);
    assert_eq!(texts(&api, &file("rates.csv")).await.unwrap(), expected);
    assert_eq!(web.count(), 1, "described and read twice, fetched once");
    assert_eq!(texts(&api, &file("moved.csv")).await.unwrap(), expected);
    assert_eq!(texts(&api, &file("list")).await.unwrap(), expected);
    assert_eq!(texts(&api, &file("rates.jsonl")).await.unwrap().len(), 2);
    let asked = ApiRequest {
        path: "/export".to_owned(),
        query: [("day".to_owned(), "2026-11-01".to_owned())].into(),
        ..ApiRequest::default()
    };
    let kind = Some(crate::connector::spec::FormatKind::Csv);
    let delimiter = Some(";".to_owned());
    let format = crate::connector::spec::Format { kind, delimiter, ..Default::default() };
    let export = StreamSpec { read: Read::Request(Box::new(asked)), format: Some(format), ..file("") };
    assert_eq!(texts(&api, &export).await.unwrap(), expected);
    // Who asks otherwise gets another file.
    for tenant in ["a", "b"] {
        let asked = ApiRequest {
            path: "tenant.csv".to_owned(),
            headers: [("X-Tenant".to_owned(), tenant.to_owned())].into(),
            ..ApiRequest::default()
        };
        let format = crate::connector::spec::Format { kind, ..Default::default() };
        let of = StreamSpec { read: Read::Request(Box::new(asked)), format: Some(format), ..file("") };
        assert_eq!(texts(&api, &of).await.unwrap(), [tenant]);
    }
    let hasty = open(&format!("{}/v1", web.url), &json!({ "retry_timeout_ms": 0 }));
    let later = texts(&hasty, &file("later.csv")).await.unwrap_err();
    assert!(later.to_string().contains("202 Accepted instead of a whole file"), "{later}");
    let small = open(&format!("{}/v1", web.url), &json!({ "max_file_bytes": 10 }));
    let large = texts(&small, &file("rates.csv")).await.unwrap_err();
    assert!(large.to_string().contains("more than 10 bytes"), "{large}");
    assert_eq!(
        api.source().unwrap().describe(&file("none.csv")).await.unwrap_err().kind(),
        ErrorKind::Configuration
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_cut_short_or_is_none_is_never_taken_as_whole() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let web = Web::new(move |asked| {
        let cut = |length: usize| {
            format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{RATES}")
                .into_bytes()
        };
        match asked.path.as_str() {
            // Cut short twice, whole the third time.
            "/mends.csv" if counted.fetch_add(1, Ordering::Relaxed) < 2 => cut(RATES.len() + 20),
            "/mends.csv" => answer("200 OK", "", RATES),
            "/cut.csv" => cut(RATES.len() + 20),
            "/endless.csv" => format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{RATES}").into_bytes(),
            "/chunked.csv" => format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{RATES}\r\n",
                RATES.len()
            )
            .into_bytes(),
            "/login.csv" => answer("200 OK", "Content-Type: text/html", "<html>Please log in</html>"),
            "/away.csv" => answer("302 Found", "Location: http://elsewhere.example/rates.csv", ""),
            _ => answer("503 Service Unavailable", "", ""),
        }
    });
    let api = open(&web.url, &json!({}));
    assert_eq!(texts(&api, &file("mends.csv")).await.unwrap().len(), 2);
    assert_eq!(tries.load(Ordering::Relaxed), 3);
    for (path, kind, told) in [
        ("cut.csv", ErrorKind::Temporary, "the answer broke off"),
        ("chunked.csv", ErrorKind::Temporary, "the answer broke off"),
        ("endless.csv", ErrorKind::Failed, "a file without its length"),
        ("login.csv", ErrorKind::Data, "a page in HTML instead of a file"),
        ("away.csv", ErrorKind::Failed, "points to another host"),
        ("busy.csv", ErrorKind::Temporary, "503"),
    ] {
        let error = texts(&api, &file(path)).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{path}: {error:?}");
        assert!(error.to_string().contains(told), "{path}: {error}");
    }
    let pattern = StreamSpec { read: Read::Files { pattern: "*.csv".to_owned(), once: true }, ..file("") };
    let error = api.source().unwrap().describe(&pattern).await.unwrap_err();
    assert!(error.to_string().contains("does not list what it has"), "{error}");
}

/// P20, for files: cut anywhere, in any framing, it is an error or the whole file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_cut_anywhere_is_never_taken_as_whole() {
    use std::io::Write;
    let text: String = (0..500).map(|n| format!("{n},{}.25\n", n * 7)).collect();
    let plain = format!("id,amount\n{text}").into_bytes();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(&plain).unwrap();
    let bodies = [("orders.csv", plain), ("orders.csv.gz", packed.finish().unwrap())];
    // What is asked for as `/length/12/orders.csv` is cut after twelve fiftieths.
    let served = bodies.clone();
    let web = Web::new(move |asked| {
        let parts: Vec<&str> = asked.path.split('/').collect();
        let [_, framing, fiftieths, name] = parts[..] else { return answer("404 Not Found", "", "") };
        let (_, body) = served.iter().find(|(known, _)| *known == name).unwrap();
        let cut = body.len() * fiftieths.parse::<usize>().unwrap() / 50;
        let (head, end) = match framing {
            "length" => (format!("Content-Length: {}\r\n\r\n", body.len()), ""),
            "chunked" => {
                let end = if cut == body.len() { "\r\n0\r\n\r\n" } else { "" };
                (format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", body.len()), end)
            }
            _ => ("\r\n".to_owned(), ""),
        };
        let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n{head}");
        [head.as_bytes(), &body[..cut], end.as_bytes()].concat()
    });
    let mut whole = 0;
    for (name, _) in &bodies {
        for framing in ["length", "chunked", "close"] {
            for fiftieths in 0..=50 {
                let api = open(&web.url, &json!({ "retry_timeout_ms": 0 }));
                let found = texts(&api, &file(&format!("{framing}/{fiftieths}/{name}"))).await;
                assert_eq!(
                    found.is_ok(),
                    fiftieths == 50 && framing != "close",
                    "{framing} {fiftieths} {name}: {found:?}"
                );
                whole += found.map_or(0, |rows| rows.len());
            }
        }
    }
    assert_eq!(whole, 4 * 500);
}
