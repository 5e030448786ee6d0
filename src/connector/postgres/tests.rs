//! What the connector promises, on a real server.

use std::sync::Arc;

use arrow::{
    array::{AsArray, RecordBatch},
    compute::concat_batches,
    datatypes::{Int32Type, SchemaRef},
    util::display::{ArrayFormatter, FormatOptions, array_value_to_string},
};
use indexmap::IndexMap;

use crate::{
    connector::{
        Bounds, Connection, Connector, Options,
        condition::{Comparison, Condition, Value},
        contract::{self, Row, World, everything, made_at, orders},
        scan::{OpenSource, OpenSources, Order, Scan, ScanTable, with_position},
        spec::{BadRows, CursorSpec, Mode, OnNull, Read, StreamSpec},
        tap::{Reject, Tap},
    },
    error::{Error, ErrorKind, Result},
    runtime::Limits,
    session,
    spool::Scratch,
    types::describe,
    watermark::{CursorValue, Position, Window},
};

use super::late::Role;
use crate::connector::services::{Schema, postgres, proxy::Proxy};

fn open(schema: &str) -> Arc<dyn Connection> {
    open_with(schema, &serde_json::json!({ "sslmode": "disable" }))
}

/// A connection with some options changed.
fn open_with(schema: &str, changes: &serde_json::Value) -> Arc<dyn Connection> {
    let server = postgres();
    let values = serde_json::json!({
        "host": "localhost", "port": server.port, "user": "admin", "password": server.password, "database": "postgres",
        "sslrootcert": server.authority, "schema": schema, "lock_timeout_ms": 3000,
    });
    opened(values, changes)
}

/// A connection with these options, some of them changed.
pub(super) fn opened(mut values: serde_json::Value, changes: &serde_json::Value) -> Arc<dyn Connection> {
    for (option, value) in changes.as_object().unwrap() {
        values[option] = value.clone();
    }
    let options = Options {
        name: "erp".to_owned(),
        base: std::path::PathBuf::new(),
        values,
        spill: std::env::temp_dir(),
    };
    (Connector::named("postgres").unwrap().open)(options).unwrap()
}

/// A table that is read by a cursor.
struct Ledger {
    schema: Schema,
    name: &'static str,
    read: Read,
    cursor: &'static [&'static str],
    zone: Option<&'static str>,
}

impl Ledger {
    fn new(
        name: &'static str,
        read: Read,
        cursor: &'static [&'static str],
        zone: Option<&'static str>,
    ) -> Self {
        let schema = Schema::new();
        schema.execute("CREATE TABLE orders (id bigint, amount numeric(18,4), note text, made_at timestamptz, made_local timestamp)");
        Self { schema, name, read, cursor, zone }
    }
}

impl World for Ledger {
    fn name(&self) -> &'static str {
        self.name
    }

    fn connection(&self) -> Arc<dyn Connection> {
        open(&self.schema.name)
    }

    fn stream(&self) -> StreamSpec {
        let mut stream = orders(self.read.clone());
        stream.timezone = self.zone.map(str::to_owned);
        let columns = self.cursor.iter().map(|&column| column.to_owned()).collect();
        stream.cursor = Some(CursorSpec { columns, overlap: None, on_null: OnNull::Error });
        stream
    }

    fn add(&self, rows: &[Row]) {
        self.schema.with(|client| {
            let mut all = client.transaction().unwrap();
            let insert = all
                .prepare("INSERT INTO orders SELECT $1, $2::text::numeric, $3, $4, $4::timestamptz AT TIME ZONE 'Europe/Berlin'")
                .unwrap();
            for row in rows {
                all.execute(&insert, &[&row.id, &row.amount, &row.note, &made_at(row.id)]).unwrap();
            }
            all.commit().unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_keeps_its_promises() {
    let table = || Read::Table("orders".to_owned());
    for (name, cursor, zone) in [
        ("a table by id", &["id"][..], None),
        ("a table by time", &["made_at"], None),
        ("a table by time and id", &["made_at", "id"], None),
        ("a table by a clock without a zone", &["made_local"], Some("Europe/Berlin")),
    ] {
        contract::source(|| Box::new(Ledger::new(name, table(), cursor, zone))).await;
    }
    let query = || Read::Query {
        file: "sql/orders.sql".to_owned(),
        sql: "SELECT id, amount, note FROM orders -- all of them".to_owned(),
    };
    contract::source(|| Box::new(Ledger::new("a query", query(), &["id"], None))).await;
}

#[test]
fn a_target_keeps_its_promises() {
    contract::target("PostgreSQL", || {
        let schema = Schema::new();
        let name = schema.name.clone();
        (schema, move || open(&name))
    });
}

/// The types of the README's table: a column's type, what it is here, and values that are hard to carry.
#[rustfmt::skip]
const TYPES: &[(&str, &str, &[&str])] = &[
    ("boolean",            "bool",           &["true", "false"]),
    ("smallint",           "Int16",          &["-32768", "32767"]),
    ("integer",            "Int32",          &["-2147483648", "2147483647"]),
    ("bigint",             "int",            &["-9223372036854775808", "9223372036854775807"]),
    ("oid",                "UInt32",         &["0", "4294967295"]),
    ("xid8",               "UInt64",         &["'18446744073709551615'"]),
    ("real",               "Float32",        &["'NaN'", "'Infinity'", "'-Infinity'", "1e-45", "3.4028235e38", "'-0'"]),
    ("double precision",   "float",          &["'NaN'", "'Infinity'", "'-0'", "5e-324", "1.7976931348623157e308", "0.1"]),
    ("numeric(15,2)",      "decimal(15,2)",  &["0", "-0.01", "9999999999999.99", "1000000"]),
    ("numeric(38,0)",      "decimal(38,0)",  &["99999999999999999999999999999999999999", "-1"]),
    ("numeric(38,38)",     "decimal(38,38)", &["0.00000000000000000000000000000000000001"]),
    ("numeric(76,30)",     "Decimal256(76, 30)", &["1234567890123456789012345678901234567890123456.123456789012345678901234567890"]),
    ("numeric(2,-3)",      "decimal(5,0)",   &["99000", "-1000"]),
    ("numeric(3,5)",       "decimal(5,5)",   &["0.00999"]),
    ("numeric",            "string",         &["'NaN'", "'Infinity'", "'-Infinity'", "1e-40", "1e100", "12345678901234567890.00100", "0.000"]),
    ("money",              "decimal(19,2)",  &["'-92233720368547758.08'", "'0.01'"]),
    ("text",               "string",         &["''", "repeat('ä€😀', 100000)", "E'\\n\\\\ \"x\"'"]),
    ("varchar(5)",         "string",         &["'ab'", "'ab   '"]),
    ("character(5)",       "string",         &["'ab'"]),
    ("name",               "string",         &["'pg'"]),
    ("xml",                "string",         &["'<a>1</a>'"]),
    ("\"char\"",          "string",         &["'x'"]),
    ("bytea",              "binary",         &["''", "'\\x00ff'"]),
    ("date",               "date",           &["'0001-01-01'", "'9999-12-31'", "'0044-03-15 BC'", "'4713-01-01 BC'"]),
    ("time",               "time",           &["'00:00'", "'23:59:59.999999'"]),
    ("timetz",             "Struct(\"time\": Time64(µs), \"offset_s\": Int32)", &["'12:00:00.5+05:30'", "'00:00-12:00'"]),
    ("timestamp",          "timestamp",      &["'0001-01-01'", "'9999-12-31 23:59:59.999999'", "'0044-03-15 BC'"]),
    ("timestamp(3)",       "timestamp",      &["'2026-10-25 02:30:00.123'"]),
    ("timestamptz",        "timestamptz",    &["'2026-10-25 02:30:00.123456+02'", "'0001-01-01'"]),
    ("interval",           "Interval(MonthDayNano)", &["'1 year -2 days 03:04:05.000006'", "'-178 years'"]),
    ("uuid",               "string",         &["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"]),
    ("json",               "string",         &["'{\"b\":1,  \"a\":1.10}'"]),
    ("jsonb",              "string",         &["'{\"b\":1,  \"a\":1.10}'", "'null'"]),
    ("mood",               "string",         &["'sad'", "'so \"la la\"'"]),
    ("amount",             "decimal(12,2)",  &["12.30"]),
    ("int[]",              "List(Int32)",    &["'{}'", "'{1,NULL,3}'", "'{NULL}'"]),
    ("numeric(9,2)[]",     "List(Decimal128(9, 2))", &["'{1.50,-2}'"]),
    ("text[]",             "List(Utf8)",     &["ARRAY['a \"b\"', NULL, 'NULL', '', E'\\\\']"]),
    ("timestamptz[]",      "List(Timestamp(µs, \"+00:00\"))", &["ARRAY['2026-01-01 00:00+01'::timestamptz, '0044-03-15 BC']"]),
    ("point2",             "Struct(\"x\": Int32, \"label\": Utf8)", &["ROW(1, 'a, \"b\"')", "ROW(NULL, NULL)"]),
    ("point2[]",           "List(Struct(\"x\": Int32, \"label\": Utf8))", &["ARRAY[ROW(1,'a')::point2, NULL]"]),
    ("int4range",          "Struct(\"lower\": Int32, \"upper\": Int32, \"lower_inc\": Boolean, \"upper_inc\": Boolean, \"empty\": Boolean)",
        &["'[1,5)'", "'empty'", "'(,)'", "'[3,)'"]),
    ("tstzrange",          "Struct(\"lower\": Timestamp(µs, \"+00:00\"), \"upper\": Timestamp(µs, \"+00:00\"), \"lower_inc\": Boolean, \"upper_inc\": Boolean, \"empty\": Boolean)",
        &["'[2026-01-01 00:00+00,2026-02-01 00:00+00)'"]),
    ("int4multirange",     "List(Struct(\"lower\": Int32, \"upper\": Int32, \"lower_inc\": Boolean, \"upper_inc\": Boolean, \"empty\": Boolean))",
        &["'{[1,5),[7,9)}'", "'{}'"]),
    ("inet",               "string",         &["'10.0.0.1'", "'10.0.0.0/8'", "'::ffff:1.2.3.4'", "'2001:db8::1/64'"]),
    ("cidr",               "string",         &["'10.0.0.0/8'", "'1.2.3.4/32'"]),
    ("macaddr",            "string",         &["'08:00:2b:01:02:03'"]),
    ("macaddr8",           "string",         &["'08:00:2b:01:02:03:04:05'"]),
    ("bit(3)",             "string",         &["B'101'"]),
    ("varbit",             "string",         &["B''", "B'101010101'"]),
    ("tsvector",           "string",         &["'a:1 b:2'"]),
    ("point",              "string",         &["'(1.5,-2)'"]),
    ("int4[][]",           "List(Int32)",    &["'{1,2}'"]),
];

/// A schema with the types that a database's users make.
fn with_types() -> Schema {
    let schema = Schema::new();
    schema.execute(
        "CREATE TYPE mood AS ENUM ('sad', 'so \"la la\"'); CREATE DOMAIN amount AS numeric(12,2) CHECK (VALUE > 0);
         CREATE TYPE point2 AS (x int, label text);",
    );
    schema
}

fn table(name: &str) -> StreamSpec {
    StreamSpec { name: name.to_owned(), columns: IndexMap::new(), ..orders(Read::Table(name.to_owned())) }
}

#[test]
fn the_readme_says_of_every_type_what_becomes_of_it() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    for (written, ..) in TYPES {
        // The database's own types stand there by their kind.
        if matches!(*written, "mood" | "amount" | "point2")
            || written.ends_with("[]") && !written.contains("[][]")
        {
            continue;
        }
        let bare = written.split('(').next().unwrap();
        assert!(readme.contains(&format!("`{bare}")), "the README's table lacks {written}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_goes_out_and_comes_back_as_it_was() {
    let schema = with_types();
    let connection = open(&schema.name);
    let mut wrong = Vec::new();
    for (index, (written, expected, values)) in TYPES.iter().enumerate() {
        let name = format!("t{index}");
        let values: Vec<String> =
            values.iter().enumerate().map(|(n, value)| format!("({n}, ({value})::{written})")).collect();
        schema.execute(&format!(
            "CREATE TABLE {name} (n int, v {written}); INSERT INTO {name} VALUES {}, (-1, NULL)",
            values.join(", ")
        ));
        let (found, batches) = everything(&*connection, &table(&name), &Arc::default()).await.unwrap();
        let told = plain(&describe(found.field(1).data_type()));
        if told != plain(expected) {
            wrong.push(format!("{written} is {told}, not {}", plain(expected)));
        }

        // Through Parquet, as a job that publishes files would have it, unless the format cannot hold the type.
        let batches = match through_parquet(&found, &batches) {
            Ok(batches) => batches,
            Err(_) if *written == "interval" => batches,
            Err(error) => panic!("{written}: {error}"),
        };
        // Into a table that is new, and into one that has the source's own types.
        let (new, known) = (format!("c{index}"), format!("d{index}"));
        schema.execute(&format!("CREATE TABLE {known} (LIKE {name})"));
        for copy in [new, known] {
            if let Err(error) =
                contract::publish(&*connection, &copy, Mode::Append, &found, batches.clone()).await
            {
                wrong.push(format!("{written}, {copy}: {error}"));
                continue;
            }
            let differing = format!(
                "SELECT count(*) FROM (SELECT n, v::text FROM {name} EXCEPT ALL SELECT n, v::text FROM {copy}) AS d"
            );
            let (differing, type_of): (i64, String) = schema.with(|client| {
                let kind = format!(
                    "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = '{copy}'::regclass AND attname = 'v'"
                );
                (
                    client.query_one(&differing, &[]).unwrap().get(0),
                    client.query_one(&kind, &[]).unwrap().get(0),
                )
            });
            if differing != 0 {
                wrong.push(format!("{written}: {copy}, a {type_of}, holds other values"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_sessions_read_one_table_as_it_was_when_the_snapshot_was_opened() {
    let in_parts = "PARTITION BY HASH (id); CREATE TABLE one PARTITION OF wide FOR VALUES WITH (MODULUS 3, REMAINDER 0);
         CREATE TABLE other PARTITION OF wide FOR VALUES WITH (MODULUS 3, REMAINDER 1) PARTITION BY RANGE (id);
         CREATE TABLE low PARTITION OF other FOR VALUES FROM (MINVALUE) TO (1000); CREATE TABLE high PARTITION OF other DEFAULT;
         CREATE TABLE third PARTITION OF wide FOR VALUES WITH (MODULUS 3, REMAINDER 2)";
    for parts in ["", in_parts] {
        read_by_several_sessions(parts).await;
    }
}

async fn read_by_several_sessions(parts: &str) {
    let schema = Schema::new();
    // One row to a page, and more pages than one session reads by itself; some are empty.
    schema.execute(&format!(
        "CREATE TABLE wide (id bigint NOT NULL, note text) {parts}; ALTER TABLE wide ALTER COLUMN note SET STORAGE PLAIN;
         INSERT INTO wide SELECT n, rpad(n::text, 7000, 'x') FROM generate_series(1, 4600) AS n; DELETE FROM wide WHERE id % 7 = 0;",
    ));
    let connection = open_with(&schema.name, &serde_json::json!({ "sslmode": "disable", "readers": 3 }));
    let source = connection.source().unwrap();
    for cursor in [None, Some("id")] {
        let columns = cursor.map(|cursor| CursorSpec {
            columns: vec![cursor.to_owned()],
            overlap: None,
            on_null: OnNull::Error,
        });
        let stream = StreamSpec { cursor: columns, ..table("wide") };
        let streams = [stream.clone()];
        let now = chrono::DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let time = crate::connector::RunTime { now, as_of: now };
        let columns = source.describe(&stream).await.unwrap();
        let bounds = source.bounds(&streams, &crate::connector::Marks::new(), time).await.unwrap();
        let snapshot = source.snapshot(&streams, &bounds).await.unwrap();
        schema.execute("BEGIN; UPDATE wide SET note = 'changed'; INSERT INTO wide SELECT n + 10000, 'new' FROM generate_series(1, 500) AS n; COMMIT");
        let scan = Scan::new(stream.clone(), columns, bounds.windows["wide"].clone());
        let scan = Scan { order: Order::Shows, ..scan };
        let tap = Arc::new(Tap::default());
        let rows = source.scan(&snapshot, &scan, Arc::clone(&tap)).unwrap();
        let batches: Vec<RecordBatch> = futures::TryStreamExt::try_collect(rows).await.unwrap();
        let mut found: Vec<(i64, usize)> = Vec::new();
        for batch in &batches {
            let (ids, notes) =
                (batch.column(0).as_primitive::<arrow::datatypes::Int64Type>(), batch.column(1));
            let notes = notes.as_string::<i32>();
            found.extend((0..batch.num_rows()).map(|row| (ids.value(row), notes.value(row).len())));
        }
        found.sort_unstable();
        let expected: Vec<(i64, usize)> = (1..=4600).filter(|id| id % 7 != 0).map(|id| (id, 7000)).collect();
        assert_eq!(found, expected, "{cursor:?}");
        assert_eq!((tap.extracted(), tap.is_complete()), (expected.len() as u64, true));
        schema.execute("DELETE FROM wide WHERE id > 10000; UPDATE wide SET note = rpad(id::text, 7000, 'x')");
    }
}

/// What is left out by a filter or by a mark is read as all is, unless an index serves it: rows are told by their part then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_sessions_read_what_no_index_serves() {
    let schema = Schema::new();
    schema.execute(
        "CREATE TABLE wide (id bigint NOT NULL, note text, amount numeric(9,2)); ALTER TABLE wide ALTER COLUMN note SET STORAGE PLAIN;
         INSERT INTO wide SELECT n, rpad(n::text, 7000, 'x'), CASE n WHEN 4590 THEN 'NaN'::numeric ELSE 1 END FROM generate_series(1, 4600) AS n;
         ALTER TABLE wide SET (parallel_workers = 0); ANALYZE wide",
    );
    let connection = open(&schema.name);
    let source = connection.source().unwrap();
    let at = |id| Position(vec![CursorValue::Int(id)]);
    let behind = |id| Window::Cursor { lo: Some(at(id)), from: Some(at(id)), hi: at(9000) };
    let from = |id| {
        vec![Condition::Compares { column: "id".to_owned(), by: Comparison::AtLeast, value: Value::Int(id) }]
    };
    let cursor = CursorSpec { columns: vec!["id".to_owned()], overlap: None, on_null: OnNull::Error };
    let cursor = StreamSpec { cursor: Some(cursor), ..table("wide") };
    for has_index in [false, true] {
        if has_index {
            schema.execute("CREATE INDEX ON wide (id)");
        }
        for (stream, window, conditions) in [
            (table("wide"), Window::Whole, from(4580)),
            (cursor.clone(), behind(4580), Vec::new()),
            (cursor.clone(), behind(4570), from(4580)),
        ] {
            let columns = source.describe(&stream).await.unwrap();
            let snapshot = source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await.unwrap();
            let mut scan = Scan::new(stream, columns, window);
            (scan.conditions, scan.order) = (conditions, Order::Shows);
            let read = |scan: &Scan| source.scan(&snapshot, scan, Arc::default()).unwrap();
            let read_all = |scan: &Scan| futures::TryStreamExt::try_collect::<Vec<RecordBatch>>(read(scan));
            let error = read_all(&scan).await.unwrap_err().to_string();
            assert!(error.contains("`amount` is NaN"), "{error}");
            assert_eq!(error.contains(" where ctid >= "), !has_index, "{error}");
            scan.stream.unfit_as_null = vec!["amount".to_owned()];
            let rows: usize = read_all(&scan).await.unwrap().iter().map(RecordBatch::num_rows).sum();
            assert_eq!(rows, 21);
        }
    }
}

/// How many rows a table or view has.
async fn rows_of(connection: &Arc<dyn Connection>, name: &str) -> Result<usize> {
    Ok(batches_of(connection, name).await?.iter().map(RecordBatch::num_rows).sum())
}

/// All rows of a table or view.
async fn batches_of(connection: &Arc<dyn Connection>, name: &str) -> Result<Vec<RecordBatch>> {
    let source = connection.source().unwrap();
    let stream = table(name);
    let columns = source.describe(&stream).await?;
    let snapshot = source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await?;
    let scan = Scan::new(stream, columns, Window::Whole);
    let rows = source.scan(&snapshot, &scan, Arc::default())?;
    Ok(futures::TryStreamExt::try_collect(rows).await?)
}

/// A server sends a row in a message; what lies between may make others of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_come_in_pieces_are_the_same_rows() {
    let schema = Schema::new();
    schema.execute("CREATE TABLE pieces AS SELECT n, CASE WHEN n % 5 > 0 THEN repeat('x', n % 90) END AS note FROM generate_series(1, 6000) AS n");
    let proxy = Proxy::recutting(postgres().port);
    let cut = open_with(&schema.name, &serde_json::json!({ "port": proxy.port, "sslmode": "disable" }));
    let (cut, whole) =
        (batches_of(&cut, "pieces").await.unwrap(), batches_of(&open(&schema.name), "pieces").await.unwrap());
    let all = |batches: &[RecordBatch]| concat_batches(&batches[0].schema(), batches).unwrap();
    assert_eq!(all(&whole).num_rows(), 6000);
    assert_eq!(all(&cut), all(&whole));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_in_the_middle_of_the_rows_is_told_and_the_next_ones_come() {
    let schema = Schema::new();
    schema.execute("CREATE VIEW torn AS SELECT n, 1 / (90000 - n) AS x FROM generate_series(1, 100000) AS n; CREATE VIEW sound AS SELECT n FROM generate_series(1, 100000) AS n");
    let connection = open(&schema.name);
    for _ in 0..2 {
        let error = rows_of(&connection, "torn").await.unwrap_err().to_string();
        assert!(error.contains("division by zero"), "{error}");
        assert_eq!(rows_of(&connection, "sound").await.unwrap(), 100_000);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_come_through_a_socket_in_a_folder_too() {
    let schema = Schema::new();
    schema.execute("CREATE TABLE orders (id bigint, note text); INSERT INTO orders SELECT n, repeat('x', n % 3000) FROM generate_series(1, 20000) AS n");
    let folder = std::path::Path::new(&postgres().authority).parent().unwrap();
    let connection = open_with(&schema.name, &serde_json::json!({ "host": folder, "sslmode": "disable" }));
    assert_eq!(rows_of(&connection, "orders").await.unwrap(), 20_000);
}

/// A type's spelling without quotes, blanks and metadata.
fn plain(of: &str) -> String {
    let mut told = of.to_owned();
    while let Some((before, behind)) = told.clone().split_once(", metadata: {") {
        told = format!("{before}{}", behind.split_once('}').map_or("", |(_, rest)| rest));
    }
    told.replace(['"', ' '], "")
}

fn through_parquet(schema: &SchemaRef, batches: &[RecordBatch]) -> Result<Vec<RecordBatch>> {
    let broken = |error: parquet::errors::ParquetError| Error::failed(error.to_string());
    let mut file = Vec::new();
    let mut writer =
        parquet::arrow::ArrowWriter::try_new(&mut file, Arc::clone(schema), None).map_err(broken)?;
    for batch in batches {
        writer.write(batch).map_err(broken)?;
    }
    writer.close().map_err(broken)?;
    let reader =
        parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(file));
    let reader = reader.map_err(broken)?.build().map_err(broken)?;
    Ok(reader.collect::<Result<Vec<_>, _>>()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_carried_is_refused_with_column_and_row() {
    let schema = with_types();
    let connection = open(&schema.name);
    for (index, (written, value, why)) in [
        ("numeric(15,2)", "'NaN'", "is NaN"),
        ("date", "'infinity'", "is infinity"),
        ("timestamp", "'-infinity'", "is infinity"),
        ("timestamptz", "'infinity'", "is infinity"),
        ("timestamp", "'294276-12-31 23:59:59.999999'", "is later than 64 bits"),
        ("time", "'24:00'", "is 24:00:00"),
        ("interval", "'400 years 3000000 hours'", "292 years"),
        ("int[]", "'{{1,2},{3,4}}'", "several dimensions"),
        ("int[]", "'[0:1]={1,2}'", "does not begin at 1"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("t{index}");
        schema.execute(&format!(
            "CREATE TABLE {name} (v {written}); INSERT INTO {name} VALUES (NULL), ({value})"
        ));
        let error = everything(&*connection, &table(&name), &Arc::default()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data, "{written}: {error}");
        let told = error.to_string();
        assert!(told.contains(why) && told.contains("`v`") && told.contains("row 2"), "{written}: {told}");

        // Set aside, the row keeps its place in the table and its value.
        let aside = StreamSpec { bad_rows: BadRows::Quarantine, ..table(&name) };
        let tap = Arc::new(Tap::default());
        let (_, batches) = everything(&*connection, &aside, &tap).await.unwrap();
        assert_eq!((batches.iter().map(RecordBatch::num_rows).sum::<usize>(), tap.rejected_rows()), (1, 1));
        assert!(tap.rejects()[0].position.ends_with("ctid (0,2)"), "{}", tap.rejects()[0].position);

        // As text it is what the server says.
        let mut text = table(&name);
        text.columns.insert("v".to_owned(), "string".to_owned());
        let (_, batches) = everything(&*connection, &text, &Arc::default()).await.unwrap();
        let shown = ArrayFormatter::try_new(batches[0].column(0), &FormatOptions::default())
            .unwrap()
            .value(1)
            .to_string();
        let expected: String = schema.with(|client| {
            client.batch_execute("SET intervalstyle = 'iso_8601'").unwrap();
            client.query_one(&format!("SELECT v::text FROM {name} WHERE v IS NOT NULL"), &[]).unwrap().get(0)
        });
        assert_eq!(shown, expected, "{written}");
    }
}

/// The rows of `facts` as text, those that were set aside, and how many values became null. With places they are taken one by one.
async fn taken(
    connection: &dyn Connection,
    stream: &StreamSpec,
    with_places: bool,
) -> (Vec<String>, Vec<Reject>, u64) {
    let source = connection.source().unwrap();
    let schema = source.describe(stream).await.unwrap();
    let bounds = Bounds { windows: [(stream.name.clone(), Window::Whole)].into(), ..Bounds::default() };
    let snapshot = source.snapshot(std::slice::from_ref(stream), &bounds).await.unwrap();
    let asked = if with_places { with_position(&schema) } else { Arc::clone(&schema) };
    let scan = Scan { batch_bytes: 8 << 10, ..Scan::new(stream.clone(), asked, Window::Whole) };
    let tap = Arc::new(Tap::default());
    let rows = source.scan(&snapshot, &scan, Arc::clone(&tap)).unwrap();
    let batches: Vec<RecordBatch> = futures::TryStreamExt::try_collect(rows).await.unwrap();
    let mut found = Vec::new();
    for batch in &batches {
        let columns = &batch.columns()[..schema.fields().len()];
        let row = |row: usize| {
            columns.iter().map(|column| array_value_to_string(column, row).unwrap() + "|").collect()
        };
        found.extend((0..batch.num_rows()).map(row));
    }
    (found, tap.rejects(), tap.nulled().values().sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_taken_together_are_what_they_are_one_by_one() {
    let schema = with_types();
    // Rows that do not fit: the first and the last, alone, three in a row, in one column and in another.
    schema.execute(
        "CREATE TABLE facts (id int, amount numeric(12,2), day date, name text, pair point2, several int[], active boolean);
         INSERT INTO facts SELECT n, CASE WHEN n IN (1, 4000) OR n % 997 < 3 THEN 'NaN' ELSE n * 1.01 END,
             CASE WHEN n % 701 = 0 THEN 'infinity' ELSE '2026-01-01'::date + n % 365 END, CASE WHEN n % 5 > 0 THEN repeat('ä', n % 40) END,
             CASE WHEN n % 3 > 0 THEN ROW(n, n)::point2 END, CASE WHEN n = 2500 THEN '{{1},{2}}' ELSE ARRAY[n, NULL] END, n % 2 = 0
         FROM generate_series(1, 4000) AS n;
         INSERT INTO facts (id, name) VALUES (4001, repeat('long', 50000)), (4002, NULL)",
    );
    let connection = open(&schema.name);
    let encrypted = open_with(&schema.name, &serde_json::json!({}));
    for unfit_as_null in [vec![], vec!["amount".to_owned()]] {
        let few = unfit_as_null.is_empty();
        let stream = StreamSpec {
            bad_rows: BadRows::Quarantine,
            max_bad_rows: u64::MAX,
            unfit_as_null,
            ..table("facts")
        };
        let found = taken(&*connection, &stream, false).await;
        assert_eq!(found.0.len() + found.1.len(), 4002);
        assert_eq!((found.1.len(), found.2), if few { (21, 0) } else { (6, 15) });
        assert_eq!(found, taken(&*connection, &stream, true).await);
        assert_eq!(found, taken(&*encrypted, &stream, false).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_a_column_of_the_target_would_cut_is_refused() {
    let schema = Schema::new();
    let connection = open(&schema.name);
    for (index, (kept, value)) in [
        ("varchar(3)", "'abcd'::text"),
        ("character(3)", "'abcd'::text"),
        ("timestamp(0)", "'2026-01-01 00:00:00.5'::timestamp"),
        ("integer", "3000000000::bigint"),
        ("numeric(3,0)", "1000::bigint"),
    ]
    .into_iter()
    .enumerate()
    {
        let (from, to) = (format!("f{index}"), format!("t{index}"));
        schema.execute(&format!("CREATE TABLE {from} AS SELECT {value} AS v; CREATE TABLE {to} (v {kept})"));
        let (found, batches) = everything(&*connection, &table(&from), &Arc::default()).await.unwrap();
        let refused = contract::publish(&*connection, &to, Mode::Append, &found, batches).await;
        let error = refused.expect_err(kept);
        assert_eq!(error.kind(), ErrorKind::Data, "{kept}: {error}");
        let left: i64 = schema
            .with(|client| client.query_one(&format!("SELECT count(*) FROM {to}"), &[]).unwrap().get(0));
        assert_eq!(left, 0, "{kept}");
    }
}

/// P36: who cannot be verified is not talked to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_verified_unless_the_project_says_otherwise() {
    let nowhere = serde_json::Value::Null;
    for (what, changes, expected) in [
        ("signed and named", serde_json::json!({}), Ok(())),
        ("another name", serde_json::json!({ "host": "127.0.0.1" }), Err("certificate is not trusted")),
        (
            "signed by nobody we know",
            serde_json::json!({ "sslrootcert": nowhere }),
            Err("certificate is not trusted"),
        ),
        (
            "believed",
            serde_json::json!({ "host": "127.0.0.1", "sslmode": "require", "sslrootcert": nowhere }),
            Ok(()),
        ),
        ("no encryption", serde_json::json!({ "sslmode": "disable" }), Ok(())),
    ] {
        let found = open_with("public", &changes).ping().await;
        match expected {
            Ok(()) => assert!(found.is_ok(), "{what}: {found:?}"),
            Err(why) => {
                let error = found.expect_err(what);
                assert!(error.to_string().contains(why), "{what}: {error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_left_to_the_next_step_and_to_nobody_for_long() {
    let role = Role::new();
    let schema = Schema::new();
    schema.execute(&format!(
        "CREATE TABLE orders (id int); GRANT USAGE ON SCHEMA {} TO {role}; GRANT SELECT ON orders TO {role}",
        schema.name,
        role = role.name
    ));
    let user = serde_json::json!({ "sslmode": "disable", "user": role.name, "password": "for-a-test" });
    let connection = open_with(&schema.name, &user);
    let (source, target) = (connection.source().unwrap(), connection.target().unwrap());
    let sessions = || -> Vec<(i32, String)> {
        let sql = "SELECT pid, state FROM pg_stat_activity WHERE usename = $1 ORDER BY backend_start";
        let rows = schema.with(|client| client.query(sql, &[&role.name]).unwrap());
        rows.iter().map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_default())).collect()
    };
    let idle = |pid: i32| (pid, "idle".to_owned());
    let job = crate::names::JobId { project: "p".to_owned(), job: "j".to_owned() };
    let stream = table("orders");

    source.describe(&stream).await.unwrap();
    let [(first, _)] = sessions()[..] else { panic!("{:?}", sessions()) };
    source.describe(&stream).await.unwrap();
    target.last_record(&job).await.unwrap();
    target.current(&job, "orders").await.unwrap();
    assert_eq!(sessions(), [idle(first)]);

    // One that was lost is not missed.
    schema.execute(&format!("SELECT pg_terminate_backend({first}, 10000)"));
    source.describe(&stream).await.unwrap();
    let [(second, _)] = sessions()[..] else { panic!("{:?}", sessions()) };
    assert_ne!(second, first);

    // Who holds a snapshot keeps it, and what comes next has another.
    let snapshot = source.snapshot(&[], &Bounds::default()).await.unwrap();
    source.describe(&stream).await.unwrap();
    let found = sessions();
    assert_eq!((found.len(), &found[0]), (2, &(second, "idle in transaction".to_owned())));
    drop(snapshot);

    // Nobody comes any more.
    while !sessions().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// The rows of `facts` that a model selects, and how many the server sent for it.
async fn selected(
    connection: &Arc<dyn Connection>,
    stream: StreamSpec,
    filter: &str,
    selective: bool,
) -> (Vec<i32>, u64) {
    let source = connection.source().unwrap();
    let schema = source.describe(&stream).await.unwrap();
    let bounds = Bounds { windows: [("facts".to_owned(), Window::Whole)].into(), ..Bounds::default() };
    let snapshot = source.snapshot(std::slice::from_ref(&stream), &bounds).await.unwrap();
    let tap = Arc::new(Tap::default());
    let open = OpenSource { connection: Arc::clone(connection), snapshot, tap: Arc::clone(&tap) };
    let spill = tempfile::tempdir().unwrap();
    let limits = Limits { memory_bytes: 64 << 20, spill: spill.path().to_owned() };
    let sources = Arc::new(OpenSources([("facts".to_owned(), open)].into()));
    let context = session::for_models(&Scratch::new(&limits).unwrap(), chrono::DateTime::UNIX_EPOCH, sources);
    let scan = Scan::new(stream, schema, Window::Whole);
    context.register_table("facts", Arc::new(ScanTable { scan, selective, rows: None })).unwrap();
    let rows = context.sql(&format!("SELECT id FROM facts {filter}")).await.unwrap().collect().await.unwrap();
    let mut ids: Vec<i32> =
        rows.iter().flat_map(|batch| batch.column(0).as_primitive::<Int32Type>().values().to_vec()).collect();
    ids.sort_unstable();
    (ids, tap.extracted())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_leaves_out_changes_no_result() {
    let schema = with_types();
    schema.execute(
        "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         CREATE TABLE facts (id int, small smallint, amount numeric(18,2), cost amount, share float8, active boolean, day date, at timestamptz, local timestamp,
             name text, folded text COLLATE any_case, short varchar(9), padded char(4), feeling mood, pair point2, doc jsonb);
         INSERT INTO facts SELECT n, n % 7 - 3, n * 1.01 - 20, n, CASE n % 3 WHEN 0 THEN '-0'::float8 WHEN 1 THEN 'NaN' ELSE n END, n % 2 = 0, '2026-01-01'::date + n,
             '2026-01-01T00:00Z'::timestamptz + n * interval '1 hour 1 us', '2026-03-29'::timestamp + n * interval '1 hour',
             (ARRAY['a', 'A', 'ä', 'it''s', E'back\\\\slash', ' a', 'a ', ''])[n % 8 + 1], (ARRAY['a', 'A'])[n % 2 + 1], n, (ARRAY['a', 'ab', ' a'])[n % 3 + 1],
             (ARRAY['sad', 'so \"la la\"']::mood[])[n % 2 + 1], CASE n % 2 WHEN 0 THEN ROW(NULL, NULL)::point2 END, jsonb_build_object('n', n)
         FROM generate_series(1, 40) AS n;
         INSERT INTO facts (id) VALUES (41)",
    );
    let connection = open(&schema.name);
    // What a model asks for, and whether the server can be told.
    for (filter, told) in [
        ("WHERE id = 7", true),
        ("WHERE 7 >= id AND small <> 2", true),
        ("WHERE small IN (1, 2)", true),
        ("WHERE id NOT IN (1, 2)", true),
        ("WHERE id BETWEEN 3 AND 5 OR id IS NULL", true),
        ("WHERE amount > 0.5", true),
        ("WHERE amount = 0.2 OR amount < -18.985", true),
        ("WHERE amount > 0", true),
        ("WHERE cost >= 39.01", true),
        ("WHERE share = 0", false),
        ("WHERE share > 5", false),
        ("WHERE active", true),
        ("WHERE NOT active", true),
        ("WHERE active IS NULL", true),
        ("WHERE day >= DATE '2026-02-01'", true),
        ("WHERE at < CAST('2026-01-01T05:00:00.000005Z' AS TIMESTAMP(6) WITH TIME ZONE)", true),
        ("WHERE local > CAST('2026-03-29 12:00:00' AS TIMESTAMP(6))", true),
        ("WHERE name = 'a'", true),
        ("WHERE name <> 'a'", true),
        ("WHERE name = 'ä'", false),
        ("WHERE name IN ('it''s', 'back\\slash')", true),
        ("WHERE name > 'a'", false),
        ("WHERE name LIKE 'a%'", false),
        ("WHERE folded = 'a'", true),
        ("WHERE folded <> 'a'", true),
        ("WHERE short = '12'", true),
        ("WHERE padded = 'a'", true),
        ("WHERE padded = 'a   '", true),
        ("WHERE padded <> 'a   '", false),
        ("WHERE feeling = 'sad'", true),
        ("WHERE feeling = 'nothing that it knows'", true),
        ("WHERE pair IS NULL", false),
        ("WHERE doc = '{\"n\": 5}'", false),
        ("WHERE name IS NOT NULL AND id + 1 < 9", true),
        ("WHERE id < 0", true),
    ] {
        let (expected, all) = selected(&connection, table("facts"), filter, false).await;
        let (found, sent) = selected(&connection, table("facts"), filter, true).await;
        assert_eq!(found, expected, "{filter}");
        assert_eq!(all, 41, "{filter}");
        assert_eq!(sent < all, told, "{filter}: {sent} of {all} rows were sent");
    }
    // The same where the job declares what is text as text, and where it lets values be null.
    let texts = ["name", "folded", "short", "padded", "feeling", "pair", "doc"];
    let declared = StreamSpec {
        columns: texts.map(|column| (column.to_owned(), "string".to_owned())).into(),
        unfit_as_null: vec!["day".to_owned()],
        ..table("facts")
    };
    schema.execute("UPDATE facts SET day = 'infinity' WHERE id = 3; UPDATE facts SET pair = ROW(1, NULL)::point2 WHERE id = 5");
    for filter in [
        "padded <> 'ab'",
        "padded = 'ab'",
        "padded = 'ab  '",
        "folded <> 'a'",
        "feeling <> 'sad'",
        "feeling NOT IN ('sad', 'nothing that it knows')",
        "feeling = 'nothing that it knows'",
        "doc = '{\"n\": 5}'",
        "doc <> '{\"n\": 5}'",
        "pair IS NOT NULL",
        "pair IS NULL",
        "day IS NULL",
        "day IS NULL OR id = 1",
        "day IS NOT NULL",
        "name BETWEEN 'a' AND 'b'",
    ] {
        let filter = format!("WHERE {filter}");
        let (expected, _) = selected(&connection, declared.clone(), &filter, false).await;
        let (found, _) = selected(&connection, declared.clone(), &filter, true).await;
        assert_eq!(found, expected, "{filter}");
    }
    schema.execute("UPDATE facts SET day = NULL WHERE id = 3");
    assert_eq!(selected(&connection, table("facts"), "LIMIT 3", true).await.1, 3);
    assert_eq!(selected(&connection, table("facts"), "WHERE share > 5 LIMIT 3", true).await.1, 41);
}
