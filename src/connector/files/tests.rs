//! The connector's promises, for each kind of file, and what only files have: they change while they are read.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    datatypes::{DataType, Field, Int64Type, Schema, TimeUnit, TimestampMicrosecondType},
    util::display::array_value_to_string,
};
use datafusion::physical_plan::{ExecutionPlan, stream::RecordBatchStreamAdapter};
use futures::StreamExt;
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::json;

use crate::{
    connector::{
        Bounds, Connection, Connector, Marks, Options, RunTime, Source,
        condition::{Comparison, Condition, Value},
        contract::{self, Row, World, made_at, orders},
        scan::{OpenSource, OpenSources, Order, Scan, ScanExec, with_position},
        services,
        spec::{BadRows, Format, Read, StreamSpec},
        tap::{Reject, Tap},
    },
    error::ErrorKind,
    runtime::Limits,
    session,
    spool::Scratch,
    watermark::Window,
};

fn bucket(prefix: &str) -> Arc<dyn Connection> {
    let values = services::s3().options(prefix);
    let options =
        Options { name: "lake".to_owned(), base: PathBuf::new(), values, spill: std::env::temp_dir() };
    (Connector::named("s3").unwrap().open)(options).unwrap()
}

fn open(root: &Path) -> Arc<dyn Connection> {
    let values = json!({ "root": root, "row_group_rows": 3 });
    let options =
        Options { name: "lake".to_owned(), base: PathBuf::new(), values, spill: std::env::temp_dir() };
    (Connector::named("files").unwrap().open)(options).unwrap()
}

/// A folder into which one file comes after the other.
struct Inbox {
    folder: tempfile::TempDir,
    ending: &'static str,
    files: AtomicUsize,
}

impl Inbox {
    fn of(ending: &'static str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), ending, files: AtomicUsize::new(0) }
    }

    fn next(&self) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::SeqCst);
        self.folder.path().join(format!("orders-{number:04}.{}", self.ending))
    }
}

impl World for Inbox {
    fn name(&self) -> &'static str {
        self.ending
    }

    fn connection(&self) -> Arc<dyn Connection> {
        open(self.folder.path())
    }

    fn stream(&self) -> StreamSpec {
        orders(Read::Files { pattern: format!("orders-*.{}", self.ending), once: true })
    }

    fn add(&self, rows: &[Row]) {
        self.write(&self.next(), rows);
    }
}

impl Inbox {
    fn write(&self, path: &Path, rows: &[Row]) {
        match self.ending {
            "csv" => fs::write(path, csv(rows)).unwrap(),
            "csv.gz" => {
                let mut file =
                    flate2::write::GzEncoder::new(fs::File::create(path).unwrap(), Default::default());
                file.write_all(csv(rows).as_bytes()).unwrap();
                file.finish().unwrap();
            }
            "jsonl" => fs::write(path, objects(rows).join("\n")).unwrap(),
            "json" => fs::write(path, format!("[{}]", objects(rows).join(",\n"))).unwrap(),
            "jsonl.zst" => {
                let text = objects(rows).join("\n");
                fs::write(path, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
            }
            _ => parquet(path, rows),
        }
    }
}

/// The same, in a bucket.
struct Stored {
    inbox: Inbox,
    prefix: String,
}

impl World for Stored {
    fn name(&self) -> &'static str {
        self.inbox.ending
    }

    fn connection(&self) -> Arc<dyn Connection> {
        bucket(&self.prefix)
    }

    fn stream(&self) -> StreamSpec {
        self.inbox.stream()
    }

    fn add(&self, rows: &[Row]) {
        let path = self.inbox.next();
        self.inbox.write(&path, rows);
        let name = path.file_name().unwrap().to_str().unwrap();
        services::s3().put(&self.prefix, name, &fs::read(&path).unwrap());
    }
}

fn csv(rows: &[Row]) -> String {
    let line = |row: &Row| format!("{},{},{}\n", row.id, row.amount, row.note.as_deref().unwrap_or_default());
    format!("id,amount,note\n{}", rows.iter().map(line).collect::<String>())
}

fn objects(rows: &[Row]) -> Vec<String> {
    let object =
        |row: &Row| format!(r#"{{"id": {}, "amount": {}, "note": {}}}"#, row.id, row.amount, json!(row.note));
    rows.iter().map(object).collect()
}

/// With amounts as text, as tools write them that know no decimals.
fn parquet(path: &Path, rows: &[Row]) {
    let fields = [("id", DataType::Int64), ("amount", DataType::Utf8), ("note", DataType::Utf8)];
    let schema = Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, true)).to_vec()));
    let batch = RecordBatch::try_new(
        Arc::clone(&schema),
        vec![
            Arc::new(rows.iter().map(|row| row.id).collect::<Int64Array>()),
            Arc::new(rows.iter().map(|row| Some(row.amount.as_str())).collect::<StringArray>()),
            Arc::new(rows.iter().map(|row| row.note.as_deref()).collect::<StringArray>()),
        ],
    );
    let file = fs::File::create(path).unwrap();
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(file, schema, None).unwrap();
    writer.write(&batch.unwrap()).unwrap();
    writer.close().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_keeps_its_promises() {
    for ending in ["csv", "csv.gz", "jsonl", "jsonl.zst", "json", "parquet"] {
        contract::source(|| Box::new(Inbox::of(ending))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_as_a_source_keeps_its_promises() {
    for ending in ["csv.gz", "jsonl", "parquet"] {
        let stored = || Stored { inbox: Inbox::of(ending), prefix: services::S3::prefix() };
        contract::source(|| Box::new(stored())).await;
    }
}

#[test]
fn a_bucket_as_a_target_keeps_its_promises() {
    contract::target("a bucket", || {
        let prefix = services::S3::prefix();
        ((), move || bucket(&prefix))
    });
}

#[test]
fn a_target_keeps_its_promises() {
    contract::target("a folder", || {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        (folder, move || open(&root))
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changes_after_it_was_looked_at_is_not_loaded_under_its_old_name() {
    for ending in ["csv", "parquet"] {
        let world = Inbox::of(ending);
        let rows: Vec<Row> = (1..=3).map(|id| Row { id, amount: "1.10".to_owned(), note: None }).collect();
        world.add(&rows);
        let (connection, streams) = (world.connection(), [world.stream()]);
        let source = connection.source().unwrap();
        let time = RunTime { now: made_at(9), as_of: made_at(9) };
        let bounds = source.bounds(&streams, &Marks::new(), time).await.unwrap();
        // The same length, other content.
        let other: Vec<Row> = rows.into_iter().map(|row| Row { amount: "9.90".to_owned(), ..row }).collect();
        world.files.store(0, Ordering::SeqCst);
        world.add(&other);
        let snapshot = source.snapshot(&streams, &bounds).await;
        let error = match snapshot {
            Err(error) => error,
            Ok(snapshot) => {
                let schema = source.describe(&streams[0]).await.unwrap();
                let window = bounds.windows["orders"].clone();
                let scan = Scan::new(streams[0].clone(), schema, window);
                let rows = source.scan(&snapshot, &scan, Arc::default()).unwrap();
                let read: Result<Vec<_>, _> = futures::TryStreamExt::try_collect(rows).await;
                read.expect_err(ending).into()
            }
        };
        assert_eq!(error.kind(), ErrorKind::Temporary, "{ending}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_group_is_closed_when_there_is_no_more_memory_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wide.parquet");
    let schema = Arc::new(Schema::new(vec![Field::new("wide", DataType::Utf8, false)]));
    let mut number = 1_u64;
    // 32 MiB that nothing makes smaller by more than a half.
    let batches: Vec<_> = (0..32)
        .map(|_| {
            let mut text = || {
                number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                format!("{number:016x}")
            };
            let texts = (0..1024).map(|_| Some((0..64).map(|_| text()).collect::<String>()));
            let column: ArrayRef = Arc::new(texts.collect::<StringArray>());
            Ok(RecordBatch::try_new(Arc::clone(&schema), vec![column]).unwrap())
        })
        .collect();
    for (memory_bytes, groups) in [(1 << 30, 1..=1), (8 << 20, 4..=16)] {
        let limits = Limits { memory_bytes, spill: folder.path().join("spill") };
        let scratch = Scratch::new(&limits).unwrap();
        let rows =
            futures::stream::iter(batches.clone().into_iter().map(|batch: Result<_, String>| {
                batch.map_err(datafusion::error::DataFusionError::Execution)
            }));
        let rows = Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&schema), rows));
        let (count, _) = super::write_parquet(&path, rows, &scratch).await.unwrap();
        let file = fs::File::open(&path).unwrap();
        let reader = ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        let found = reader.metadata().num_row_groups();
        assert!(groups.contains(&found), "{found} row groups in {memory_bytes} bytes of memory");
        let read: usize = reader.build().unwrap().map(|batch| batch.unwrap().num_rows()).sum();
        assert_eq!((count, read), (32 * 1024, 32 * 1024));
        assert_eq!(scratch.environment.memory_pool.reserved(), 0);
    }
}

/// What a CSV file holds: its rows as text, what could not be read, and how many values became null. With places it is read row by row.
async fn read_csv(
    source: &dyn Source,
    stream: &StreamSpec,
    with_places: bool,
) -> (Vec<String>, Vec<Reject>, u64) {
    let schema = source.describe(stream).await.unwrap();
    let snapshot = source.snapshot(std::slice::from_ref(stream), &Bounds::default()).await.unwrap();
    let asked = if with_places { with_position(&schema) } else { Arc::clone(&schema) };
    // Batches of some hundred rows.
    let scan = Scan { batch_bytes: 8 << 10, ..Scan::new(stream.clone(), asked, Window::Whole) };
    let tap = Arc::new(Tap::default());
    let mut rows = source.scan(&snapshot, &scan, Arc::clone(&tap)).unwrap();
    let mut found = Vec::new();
    while let Some(batch) = rows.next().await {
        let batch = batch.unwrap();
        for row in 0..batch.num_rows() {
            let values = batch.columns().iter().take(schema.fields().len());
            let values = values
                .map(|values| array_value_to_string(values, row).unwrap() + &values.is_null(row).to_string());
            found.push(values.collect::<Vec<_>>().join("|"));
        }
    }
    (found, tap.rejects(), tap.nulled().values().sum())
}

/// Where nobody sees their order, row groups are read side by side: the same rows of them, from the same places.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_groups_are_read_side_by_side_as_one_behind_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let fields = [("id", DataType::Int64), ("amount", DataType::Utf8)];
    let schema = Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, true)).to_vec()));
    let file = fs::File::create(folder.path().join("lines.parquet")).unwrap();
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(file, Arc::clone(&schema), None).unwrap();
    let amount = |id: i64| if id % 97 == 0 { "none".to_owned() } else { format!("{id}.50") };
    for group in 0..40 {
        let ids = (0..25).map(|row| group * 25 + row);
        let amounts: StringArray = ids.clone().map(|id| Some(amount(id))).collect();
        let columns: Vec<ArrayRef> = vec![Arc::new(ids.collect::<Int64Array>()), Arc::new(amounts)];
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let connection = open(folder.path());
    let source = connection.source().unwrap();
    let mut stream = orders(Read::File("lines.parquet".to_owned()));
    stream.columns.shift_remove("note");
    let mut found = Vec::new();
    for order in [Order::Decides, Order::Unseen] {
        let (columns, snapshot) = (
            with_position(&source.describe(&stream).await.unwrap()),
            source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await.unwrap(),
        );
        let from = |id| Condition::Compares {
            column: "id".to_owned(),
            by: Comparison::AtLeast,
            value: Value::Int(id),
        };
        let mut scan = Scan::new(stream.clone(), columns, Window::Whole);
        (scan.order, scan.conditions) = (order, vec![from(290)]);
        let read = |scan: &Scan, tap: &Arc<Tap>| {
            source.scan(&snapshot, scan, Arc::clone(tap)).unwrap().collect::<Vec<_>>()
        };
        // One that does not fit ends all.
        let refused = read(&scan, &Arc::default()).await;
        assert!(refused.into_iter().any(|batch| batch.is_err()));
        scan.stream.bad_rows = BadRows::Quarantine;
        let tap = Arc::new(Tap::default());
        let mut rows = Vec::new();
        for batch in read(&scan, &tap).await {
            let batch = batch.unwrap();
            let value = |column: &ArrayRef, row| array_value_to_string(column, row).unwrap();
            rows.extend((0..batch.num_rows()).map(|row| {
                batch.columns().iter().map(|column| value(column, row)).collect::<Vec<_>>().join("|")
            }));
        }
        let mut rejects: Vec<String> = tap.rejects().into_iter().map(|reject| reject.position).collect();
        assert_eq!((rows.len(), rejects.len(), tap.filtered_rows()), (1000 - 275 - 8, 8, 275));
        assert!(tap.is_complete());
        if order == Order::Unseen {
            rows.sort_unstable_by_key(|row| row.split('|').next().unwrap().parse::<u64>().unwrap());
            rejects.sort_unstable_by_key(|place| place.rsplit(' ').next().unwrap().parse::<u64>().unwrap());
        }
        assert_eq!(rejects[0], "`lines.parquet` row 292");
        found.push((rows, rejects, tap.extracted()));
    }
    assert_eq!(found[0], found[1]);
}

/// Where nobody sees their order, rows go to whoever asks first; each once, also when they are asked for anew, and when one who asks goes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_shared_out_come_once() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..50_000).map(|id| format!("{id}\n")).collect();
    fs::write(folder.path().join("lines.csv"), format!("id\n{lines}")).unwrap();
    let connection = open(folder.path());
    let source = connection.source().unwrap();
    let mut stream = orders(Read::File("lines.csv".to_owned()));
    stream.columns.retain(|name, _| name == "id");
    let columns = source.describe(&stream).await.unwrap();
    let snapshot = source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await.unwrap();
    let opened = OpenSource { connection: Arc::clone(&connection), snapshot, tap: Arc::default() };
    let sources = OpenSources([(stream.name.clone(), opened)].into_iter().collect());
    let limits = Limits { memory_bytes: 64 << 20, spill: folder.path().join("spill") };
    let scratch = Scratch::new(&limits).unwrap();
    let context = session::for_joins(&scratch, chrono::DateTime::UNIX_EPOCH, Arc::new(sources), true, 3);
    let mut scan = Scan::new(stream, columns, Window::Whole);
    scan.order = Order::Unseen;
    let plan = ScanExec::new(scan, None, 3);
    for leaves in [false, true] {
        let takers = (0..3).map(|taker| {
            let mut rows = plan.execute(taker, context.task_ctx()).unwrap();
            async move {
                let (mut ids, has_left) = (Vec::new(), leaves && taker == 1);
                while (!has_left || ids.is_empty())
                    && let Some(batch) = rows.next().await
                {
                    ids.extend(batch.unwrap().column(0).as_primitive::<Int64Type>().values());
                    tokio::task::yield_now().await;
                }
                ids
            }
        });
        let takers: tokio::task::JoinSet<Vec<i64>> = takers.collect();
        let mut found = takers.join_all().await.concat();
        found.sort_unstable();
        assert_eq!(found, (0..50_000).collect::<Vec<_>>());
    }
}

/// Column by column or row by row: the same rows, the same refusals, at the same places.
#[test]
fn a_block_of_rows_is_read_as_its_rows_are() {
    let folder = tempfile::tempdir().unwrap();
    let connection = open(folder.path());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let number = prop_oneof![20 => "-?[0-9]{1,9}", 1 => "[0-9]{18,20}", 1 => "", 1 => "x"];
    let amount =
        prop_oneof![20 => "-?[0-9]{1,6}\\.[0-9]{0,2}", 1 => "1e3|\\+7|[0-9]\\.[0-9]{3}|n/a", 1 => ""];
    let day = prop_oneof![20 => "20[0-9]{2}-0[1-9]-[0-2][1-8]", 1 => "2026-02-30|1\\.2\\.2026", 1 => ""];
    let text = prop_oneof![20 => "[a-zä ]{0,12}", 2 => "\"[a-z,\n]{0,8}\"", 1 => "\"a\"\"b\"", 1 => "\"\"", 1 => "n/a", 1 => "a,b"];
    let flag = prop_oneof![10 => "true|false|yes", 1 => ""];
    let line = (number, amount, day, text, flag).prop_map(|(a, b, c, d, e)| format!("{a},{b},{c},{d},{e}\n"));
    // Mostly long stretches in which everything fits.
    let plain = (0_i64..1 << 40).prop_map(|n| format!("{n},{}.50,2026-10-31,of {n},true\n", n % 1000));
    let line = prop_oneof![60 => plain, 1 => line];
    let columns =
        [("id", "int"), ("amount", "decimal(12,2)"), ("day", "date"), ("text", "string"), ("flag", "bool")];
    let mut config = ProptestConfig::with_cases(48);
    config.failure_persistence = None;
    let outcome = TestRunner::new(config).run(
        &(proptest::collection::vec(line, 0..1500), any::<bool>()),
        |(lines, nulls)| {
            fs::write(folder.path().join("rows.csv"), format!("id,amount,day,text,flag\n{}", lines.concat()))
                .unwrap();
            let mut stream = StreamSpec::whole("rows", Read::File("rows.csv".to_owned()));
            stream.columns =
                columns.map(|(name, kind)| (name.to_owned(), kind.to_owned())).into_iter().collect();
            stream.format = Some(Format { nulls: vec!["n/a".to_owned()], ..Format::default() });
            (stream.bad_rows, stream.max_bad_rows) = (BadRows::Quarantine, u64::MAX);
            if nulls {
                stream.unfit_as_null = vec!["amount".to_owned()];
            }
            let source = connection.source().unwrap();
            let (together, one_by_one) = runtime.block_on(async {
                (read_csv(source, &stream, false).await, read_csv(source, &stream, true).await)
            });
            prop_assert_eq!(together.0.len() + together.1.len(), lines.len());
            prop_assert_eq!(together, one_by_one);
            Ok(())
        },
    );
    outcome.unwrap();
}

/// A column that a dictionary does not help is written without one: where it rises at once, else from the second row group on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dictionary_that_was_outgrown_is_not_tried_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lines.parquet");
    let schema = Arc::new(Schema::new(vec![
        Field::new("code", DataType::Int64, false),
        Field::new("kind", DataType::Utf8, false),
        Field::new("id", DataType::Int64, false),
        Field::new("at", DataType::Timestamp(TimeUnit::Microsecond, None), true),
        Field::new("batch", DataType::Int64, false),
    ]));
    let rows = i64::try_from(super::ROW_GROUP_ROWS).unwrap() * 3;
    // As many codes as rows, in no order.
    let code = |id: i64| id * 486_041 % rows;
    let batch = |start: i64| {
        let ids = start..(start + 100_000).min(rows);
        let kinds = ids.clone().map(|id| Some(if id % 3 == 0 { "new" } else { "paid" }));
        let times = ids.clone().map(|id| (id % 10 > 0).then_some(id / 4 * 1_000_000));
        let columns: Vec<ArrayRef> = vec![
            Arc::new(ids.clone().map(code).collect::<Int64Array>()),
            Arc::new(kinds.collect::<StringArray>()),
            Arc::new(ids.clone().collect::<Int64Array>()),
            Arc::new(times.collect::<TimestampMicrosecondArray>()),
            Arc::new(ids.map(|id| id / 1000).collect::<Int64Array>()),
        ];
        Ok(RecordBatch::try_new(Arc::clone(&schema), columns).unwrap())
    };
    let batches: Vec<_> = (0..rows).step_by(100_000).map(batch).collect();
    let limits = Limits { memory_bytes: 1 << 30, spill: folder.path().join("spill") };
    let stream = RecordBatchStreamAdapter::new(Arc::clone(&schema), futures::stream::iter(batches));
    super::write_parquet(&path, Box::pin(stream), &Scratch::new(&limits).unwrap()).await.unwrap();
    let reader = ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(
        fs::File::open(&path).unwrap(),
    );
    let reader = reader.unwrap();
    let has_dictionary = |group: usize, column: usize| {
        reader.metadata().row_group(group).column(column).dictionary_page_offset().is_some()
    };
    assert_eq!(reader.metadata().num_row_groups(), 3);
    for (column, expected) in
        [[true, false, false], [true; 3], [false; 3], [false; 3], [true; 3]].iter().enumerate()
    {
        assert_eq!([0, 1, 2].map(|group| has_dictionary(group, column)), *expected, "column {column}");
    }
    let mut next = 0;
    for batch in reader.build().unwrap() {
        let batch = batch.unwrap();
        let number = |column: usize| batch.column(column).as_primitive::<Int64Type>();
        let times = batch.column(3).as_primitive::<TimestampMicrosecondType>();
        for row in 0..batch.num_rows() {
            assert_eq!(
                (number(0).value(row), number(2).value(row), number(4).value(row)),
                (code(next), next, next / 1000)
            );
            assert_eq!(
                times.is_valid(row).then(|| times.value(row)),
                (next % 10 > 0).then_some(next / 4 * 1_000_000)
            );
            next += 1;
        }
    }
    assert_eq!(next, rows);
}
