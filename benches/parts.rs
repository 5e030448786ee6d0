//! The parts of a run, each by itself: `cargo bench --bench parts`, or `-- NAME` for some of them.
//!
//! What is read or written goes through the connectors as runs use them: two hundred thousand lines of orders. With
//! `--scan FOLDER CONNECTION TABLE` it reads a table into Arrow once and says what it read: what `benches/peers` measures of reading alone.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a benchmark prints, and may panic"
)]

use std::{
    collections::BTreeMap, fmt::Write as _, fs, hint::black_box, path::Path, process::Command, sync::Arc,
    time::Duration,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, Date32Array, Decimal128Array, Int64Array, RecordBatch, StringArray},
    datatypes::{DataType, Int32Type, Int64Type},
    util::display::array_value_to_string,
};
use criterion::{Criterion, Throughput};
use datafusion::{
    datasource::MemTable,
    physical_plan::stream::RecordBatchStreamAdapter,
    prelude::{SessionConfig, SessionContext},
};
use floodmark::{
    connector::{
        Attempt, Bounds, Connection, Held,
        scan::{Order, Scan},
        spec::{Contract, Mode, OutputSpec, Read, StreamSpec},
        tap::Tap,
    },
    functions::sum::ExactSum,
    names::JobId,
    project::Project,
    record::rowhash::RowHash,
    runtime::Limits,
    spool::Scratch,
    watermark::Window,
};
use futures::StreamExt;
use tokio::runtime::Runtime;

#[path = "../tests/services/mod.rs"]
#[expect(unreachable_pub, dead_code, reason = "shared with the tests, which use the rest")]
mod services;

/// As the binary has it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const ROWS: i64 = 200_000;

/// Rows as lines of orders have them: numbers, money, dates, few and many different texts.
fn lines() -> RecordBatch {
    let number = |row: i64| row * 7919 % 100_003;
    let money = |factor: i64| {
        let cents: Decimal128Array = (0..ROWS).map(|row| Some(i128::from(number(row) * factor))).collect();
        Arc::new(cents.with_precision_and_scale(15, 2).unwrap()) as ArrayRef
    };
    let text = |of: fn(i64) -> String| {
        Arc::new((0..ROWS).map(|row| Some(of(row))).collect::<StringArray>()) as ArrayRef
    };
    let days: Date32Array = (0..ROWS).map(|row| i32::try_from(8_000 + row % 2_500).ok()).collect();
    RecordBatch::try_from_iter([
        ("id", Arc::new((0..ROWS).collect::<Int64Array>()) as ArrayRef),
        ("part", Arc::new((0..ROWS).map(number).collect::<Int64Array>())),
        ("price", money(97)),
        ("tax", money(1)),
        ("posted", Arc::new(days)),
        ("mode", text(|row| ["AIR", "MAIL", "RAIL", "SHIP"][usize::try_from(row % 4).unwrap()].to_owned())),
        ("note", text(|row| format!("note {} of the {row}th line", row * 31 % 9973))),
    ])
    .unwrap()
}

const COLUMNS: &str = "id: int, part: int, price: \"decimal(15,2)\", tax: \"decimal(15,2)\", posted: date, mode: string, note: string";

/// The same rows as CSV, JSON lines, Parquet and a table, in a project of their own.
struct Shop {
    folder: tempfile::TempDir,
    project: Project,
    lines: RecordBatch,
    runtime: Runtime,
    // Dropped last, with its tables.
    _schema: services::Schema,
}

impl Shop {
    fn new() -> Self {
        let (folder, lines, schema) = (tempfile::tempdir().unwrap(), lines(), services::Schema::new());
        let server = services::postgres();
        let (mut csv, mut json) = ("id,part,price,tax,posted,mode,note\n".to_owned(), String::new());
        for row in 0..lines.num_rows() {
            for (at, (field, array)) in lines.schema().fields().iter().zip(lines.columns()).enumerate() {
                let quoted = matches!(field.data_type(), DataType::Utf8 | DataType::Date32);
                let text = array_value_to_string(array, row).unwrap();
                let text = if quoted { format!("\"{text}\"") } else { text };
                write!(csv, "{}{text}", if at > 0 { "," } else { "" }).unwrap();
                write!(json, "{}\"{}\":{text}", if at > 0 { "," } else { "{" }, field.name()).unwrap();
            }
            csv.push('\n');
            json.push_str("}\n");
        }
        let connections = format!(
            "data: {{ kind: files, root: data }}\nlake: {{ kind: files, root: out }}\nerp: {{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"{}\", sslmode: disable, schema: {} }}\n",
            server.port, server.password, schema.name
        );
        let job = |file: &str, target: &str| {
            format!(
                "job: {target}\nsources:\n  lines: {{ connection: data, file: {file}, columns: {{ {COLUMNS} }} }}\ntarget:\n  connection: {target}\n  outputs: {{ lines: {{ from: lines, mode: replace }} }}\n"
            )
        };
        for (path, text) in [
            ("floodmark.yaml", "project: parts\n"),
            ("connections.yaml", &connections),
            ("data/lines.csv", &csv),
            ("data/lines.jsonl", &json),
            ("jobs/lake.yaml", &job("lines.csv", "lake")),
            ("jobs/erp.yaml", &job("lines.jsonl", "erp")),
        ] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_floodmark"));
        let done = command.args(["run", "--project"]).arg(folder.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let parquet = fs::read_dir(folder.path().join("out/lines/current")).unwrap().next().unwrap();
        fs::copy(parquet.unwrap().path(), folder.path().join("data/lines.parquet")).unwrap();
        let project = Project::load(folder.path(), None).unwrap();
        Self { folder, project, lines, runtime: Runtime::new().unwrap(), _schema: schema }
    }

    /// Reads all of a stream.
    fn read(&self, connection: &str, read: Read) {
        let connection = self.project.connection(connection).unwrap();
        let rows = self.runtime.block_on(scanned(&connection, read, |batch| {
            black_box(batch);
        }));
        assert_eq!(rows, ROWS.unsigned_abs());
    }

    /// Stages rows in an output, and lets them go.
    fn stage(&self, connection: &str) {
        let connection = self.project.connection(connection).unwrap();
        let limits = Limits { memory_bytes: 1 << 30, spill: self.folder.path().join("spill") };
        let attempt = Attempt {
            id: uuid::Uuid::now_v7(),
            run_id: uuid::Uuid::now_v7(),
            seq: 1,
            incarnation: uuid::Uuid::new_v4(),
            outputs: 1,
            held: Held::unknown(),
            scratch: Scratch::new(&limits).unwrap(),
        };
        let output = OutputSpec {
            name: "staged".to_owned(),
            mode: Mode::Append,
            key: Vec::new(),
            update: Vec::new(),
            range: Vec::new(),
            named_ranges: Vec::new(),
            partition_by: Vec::new(),
            contract: Contract::default(),
            rebuild: false,
            marked: false,
        };
        let parts = (0..self.lines.num_rows()).step_by(8192);
        let parts = parts.map(|at| Ok(self.lines.slice(at, 8192.min(self.lines.num_rows() - at))));
        let rows = futures::stream::iter(parts.collect::<Vec<_>>());
        let rows = Box::pin(RecordBatchStreamAdapter::new(self.lines.schema(), rows));
        self.runtime.block_on(async {
            let target = connection.target().unwrap();
            let job = JobId { project: "parts".to_owned(), job: "staged".to_owned() };
            let mut load = target.begin(&job, &attempt, None).await.unwrap();
            assert_eq!(load.stage(&output, rows).await.unwrap().rows, ROWS.unsigned_abs());
            load.discard().await.unwrap();
        });
    }
}

/// Reads all of a stream; how many rows there were.
async fn scanned(connection: &Arc<dyn Connection>, read: Read, mut take: impl FnMut(&RecordBatch)) -> u64 {
    let source = connection.source().unwrap();
    let mut stream = StreamSpec::whole("lines", read);
    if matches!(stream.read, Read::File(_)) {
        let columns = COLUMNS.split(", ").map(|column| column.split_once(": ").unwrap());
        let columns = columns.map(|(name, kind)| (name.to_owned(), kind.trim_matches('"').to_owned()));
        stream.columns = columns.collect();
    }
    let schema = source.describe(&stream).await.unwrap();
    let snapshot = source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await.unwrap();
    let scan = Scan { order: Order::Shows, ..Scan::new(stream, schema, Window::Whole) };
    let mut rows = source.scan(&snapshot, &scan, Arc::new(Tap::default())).unwrap();
    let mut count = 0;
    while let Some(batch) = rows.next().await {
        let batch = batch.unwrap();
        count += batch.num_rows() as u64;
        take(&batch);
    }
    count
}

/// Reads a table into Arrow, and says how many rows there are and what their whole numbers add up to.
fn scan(folder: &str, connection: &str, table: &str) {
    let connection = Project::load(Path::new(folder), None).unwrap().connection(connection).unwrap();
    let mut sums: BTreeMap<String, i128> = BTreeMap::new();
    let rows = scanned(&connection, Read::Table(table.to_owned()), |batch| {
        for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
            let sum: i128 = match array.data_type() {
                DataType::Int32 => array.as_primitive::<Int32Type>().iter().flatten().map(i128::from).sum(),
                DataType::Int64 => array.as_primitive::<Int64Type>().iter().flatten().map(i128::from).sum(),
                _ => continue,
            };
            *sums.entry(field.name().clone()).or_default() += sum;
        }
    });
    let rows = Runtime::new().unwrap().block_on(rows);
    println!("{rows} {}", sums.values().map(i128::to_string).collect::<Vec<_>>().join(" "));
}

fn grouped(runtime: &Runtime, lines: &RecordBatch) {
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(1));
    context.register_udaf(ExactSum::sum());
    let table = MemTable::try_new(lines.schema(), vec![vec![lines.clone()]]).unwrap();
    context.register_table("lines", Arc::new(table)).unwrap();
    let sql = "SELECT part, sum(price), sum(tax) FROM lines GROUP BY part";
    let groups = runtime.block_on(async { context.sql(sql).await.unwrap().count().await.unwrap() });
    assert_eq!(groups, 100_003);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["--scan", folder, connection, table] = arguments.as_slice() {
        return scan(folder, connection, table);
    }
    let shop = Shop::new();
    let criterion = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5));
    let mut criterion = criterion.configure_from_args();
    let mut group = criterion.benchmark_group("parts");
    group.throughput(Throughput::Elements(ROWS.unsigned_abs()));
    let file = |name: &str| Read::File(format!("lines.{name}"));
    group.bench_function("read CSV", |bencher| bencher.iter(|| shop.read("data", file("csv"))));
    group.bench_function("read JSON lines", |bencher| bencher.iter(|| shop.read("data", file("jsonl"))));
    group.bench_function("read Parquet", |bencher| bencher.iter(|| shop.read("data", file("parquet"))));
    group.bench_function("read PostgreSQL", |bencher| {
        bencher.iter(|| shop.read("erp", Read::Table("lines".to_owned())));
    });
    group.bench_function("stage Parquet", |bencher| bencher.iter(|| shop.stage("lake")));
    group.bench_function("stage in PostgreSQL", |bencher| bencher.iter(|| shop.stage("erp")));
    group.bench_function("hash of rows", |bencher| {
        bencher.iter(|| {
            let mut hash = RowHash::new(&shop.lines.schema()).unwrap();
            hash.add(&shop.lines).unwrap();
            hash.finish()
        });
    });
    group.bench_function("exact sums of groups", |bencher| {
        bencher.iter(|| grouped(&shop.runtime, &shop.lines));
    });
    group.finish();
    criterion.final_summary();
}
