//! The numbered promises of [`Source`](super::Source) and [`Target`](super::Target) as tests that every connector runs.
//!
//! A connector builds a [`World`] of its own kind beside its code and calls [`source`]; for its writing side it calls
//! [`target`] with a way to open it. Nothing here knows what stands behind them.

use std::{collections::BTreeSet, sync::Arc};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{DataType, Decimal128Type, Field, Int64Type, Schema, SchemaRef},
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::{DateTime, TimeDelta, Utc};
use datafusion::physical_plan::{SendableRecordBatchStream, stream::RecordBatchStreamAdapter};
use futures::{StreamExt, TryStreamExt};
use indexmap::IndexMap;
use proptest::{prelude::*, test_runner::TestRunner};
use uuid::Uuid;

use super::{
    Attempt, CommitOutcome, Connection, Held, Load, Marks, RunTime, Snapshot, Staged,
    scan::{POSITION_COLUMN, Scan, with_position},
    spec::{BadRows, Contract, GONE, Mode, OutputSpec, Read, StreamSpec},
    tap::Tap,
};
use crate::{
    error::{ErrorKind, Result},
    names::JobId,
    record::{LoadRecord, OutputRecord, RECORD_VERSION, Settled, columns_of},
    runtime::Limits,
    spool::Scratch,
    watermark::Window,
};

/// One row of a world's stream: `id int, amount decimal(18,2), note string`.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) amount: String,
    pub(crate) note: Option<String>,
}

impl Row {
    fn good(id: i64) -> Self {
        Self { id, amount: format!("{id}.25"), note: (id % 3 != 0).then(|| format!("note {id}")) }
    }

    fn bad(id: i64) -> Self {
        Self { amount: "7.7731".to_owned(), ..Self::good(id) }
    }
}

/// A system that holds one stream, and gets more rows while it is read.
pub(crate) trait World: Send + Sync {
    /// What a failed test calls it.
    fn name(&self) -> &'static str;
    /// The system as a new process opens it.
    fn connection(&self) -> Arc<dyn Connection>;
    /// The stream: it declares its columns and is read incrementally.
    fn stream(&self) -> StreamSpec;
    /// Adds rows, whose ids are greater than all before.
    fn add(&self, rows: &[Row]);
}

/// The stream of a world that reads `read`.
pub(crate) fn orders(read: Read) -> StreamSpec {
    let columns = [("id", "int"), ("amount", "decimal(18,2)"), ("note", "string")];
    StreamSpec {
        name: "orders".to_owned(),
        read,
        columns: columns.map(|(name, written)| (name.to_owned(), written.to_owned())).into(),
        format: None,
        cursor: None,
        timezone: None,
        bad_rows: BadRows::Error,
        max_bad_rows: 10,
        unfit_as_null: Vec::new(),
    }
}

/// When the row with this id was made, for worlds whose cursor is a time.
pub(crate) fn made_at(id: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_790_000_000 + id, 0).unwrap()
}

/// A run at a time when every row up to `id` is old enough for any margin, and the next one is not made yet.
fn after(id: i64) -> RunTime {
    let as_of = made_at(id + 1);
    RunTime { now: as_of + TimeDelta::seconds(5), as_of }
}

/// One run's view of a stream.
struct View {
    connection: Arc<dyn Connection>,
    stream: StreamSpec,
    window: Window,
    snapshot: Snapshot,
}

impl View {
    async fn open(world: &dyn World, stream: StreamSpec, since: &Marks, last: i64) -> Self {
        Self::open_while(world, stream, since, last, &[]).await
    }

    /// Opens a view, while `late` rows come between the bounds and the snapshot.
    async fn open_while(
        world: &dyn World,
        stream: StreamSpec,
        since: &Marks,
        last: i64,
        late: &[Row],
    ) -> Self {
        let connection = world.connection();
        let streams = [stream.clone()];
        let source = connection.source().unwrap();
        let bounds = source.bounds(&streams, since, after(last)).await.unwrap();
        if !late.is_empty() {
            world.add(late);
        }
        let snapshot = source.snapshot(&streams, &bounds).await.unwrap();
        let window = bounds.windows[&stream.name].clone();
        Self { connection, stream, window, snapshot }
    }

    async fn read(&self, schema: SchemaRef, tap: &Arc<Tap>) -> Result<Vec<RecordBatch>> {
        let scan = Scan::new(self.stream.clone(), schema, self.window.clone());
        let rows = self.connection.source().unwrap().scan(&self.snapshot, &scan, Arc::clone(tap))?;
        Ok(rows.try_collect().await?)
    }

    fn marks(&self) -> Marks {
        self.window.mark().map(|mark| (self.stream.name.clone(), mark)).into_iter().collect()
    }
}

/// Everything that a world holds, as a first run reads it.
pub(crate) async fn read_all(
    world: &dyn World,
    stream: StreamSpec,
    tap: &Arc<Tap>,
) -> Result<Vec<RecordBatch>> {
    View::open(world, stream, &Marks::new(), i64::from(u32::MAX)).await.read(full(), tap).await
}

/// Everything that a stream holds.
pub(crate) async fn everything(
    connection: &dyn Connection,
    stream: &StreamSpec,
    tap: &Arc<Tap>,
) -> Result<(SchemaRef, Vec<RecordBatch>)> {
    let source = connection.source().unwrap();
    let schema = source.describe(stream).await?;
    let streams = [stream.clone()];
    let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
    let bounds = source.bounds(&streams, &Marks::new(), RunTime { now, as_of: now }).await?;
    let snapshot = source.snapshot(&streams, &bounds).await?;
    let window = bounds.windows[&stream.name].clone();
    let scan = Scan::new(stream.clone(), Arc::clone(&schema), window);
    let rows = source.scan(&snapshot, &scan, Arc::clone(tap))?;
    Ok((schema, rows.try_collect().await?))
}

fn full() -> SchemaRef {
    let fields = [("id", DataType::Int64), ("amount", DataType::Decimal128(18, 2)), ("note", DataType::Utf8)];
    Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, true)).to_vec()))
}

fn ids(batches: &[RecordBatch]) -> Vec<i64> {
    batches
        .iter()
        .flat_map(|batch| batch.column_by_name("id").unwrap().as_primitive::<Int64Type>().values().to_vec())
        .collect()
}

fn count(batches: &[RecordBatch]) -> usize {
    batches.iter().map(RecordBatch::num_rows).sum()
}

/// What [`Source`](super::Source) promises, by its numbers.
pub(crate) async fn source(make: impl Fn() -> Box<dyn World>) {
    describes_itself(&*make()).await;
    reads_every_row_once(&*make()).await;
    reads_what_is_asked_for(&*make()).await;
    sets_aside_or_refuses(&*make()).await;
    stops_when_nobody_reads(&*make()).await;
}

/// 1. The same names and types until the shape changes.
async fn describes_itself(world: &dyn World) {
    world.add(&[Row::good(1)]);
    for id in [2, 3] {
        let connection = world.connection();
        let schema = connection.source().unwrap().describe(&world.stream()).await.unwrap();
        // A world may have a cursor column of its own behind them.
        assert_eq!(schema.project(&[0, 1, 2]).unwrap(), *full(), "{}", world.name());
        world.add(&[Row::good(id)]);
    }
}

/// 2., 3. and 5. Windows follow each other; a row that comes between bounds and snapshot is in this window or the next,
/// one that comes later is in the next.
async fn reads_every_row_once(world: &dyn World) {
    let (mut marks, mut next, mut seen) = (Marks::new(), 1, Vec::new());
    for size in [1, 5, 0, 40, 2] {
        let rows: Vec<Row> = (next..next + size).map(Row::good).collect();
        if !rows.is_empty() {
            world.add(&rows);
        }
        next += size;
        let late = [Row::good(next)];
        let view = View::open_while(world, world.stream(), &marks, next - 1, &late).await;
        world.add(&[Row::good(next + 1)]);
        next += 2;
        let tap = Arc::new(Tap::default());
        let batches = view.read(full(), &tap).await.unwrap();
        for batch in &batches {
            let amounts = batch.column(1).as_primitive::<Decimal128Type>();
            let notes = batch.column(2).as_string::<i32>();
            for (row, id) in ids(std::slice::from_ref(batch)).into_iter().enumerate() {
                assert_eq!(amounts.value(row), i128::from(id) * 100 + 25, "{}", world.name());
                assert_eq!(notes.iter().nth(row).unwrap().map(str::to_owned), Row::good(id).note);
            }
        }
        let here = ids(&batches);
        assert!(!here.contains(&(next - 1)), "{}: a row that came after the snapshot was seen", world.name());
        seen.extend(here);
        marks = view.marks();
    }
    let last = View::open(world, world.stream(), &marks, next).await;
    seen.extend(ids(&last.read(full(), &Arc::default()).await.unwrap()));
    seen.sort_unstable();
    assert_eq!(seen, (1..next).collect::<Vec<_>>(), "{}: each row once", world.name());
}

/// 4. and 6. Columns in the order asked for; none at all; places of rows; everything counted.
async fn reads_what_is_asked_for(world: &dyn World) {
    world.add(&(1..=20).map(Row::good).collect::<Vec<_>>());
    let whole = full();
    for (columns, rows) in [(vec![2, 0], 20), (vec![1], 20), (vec![], 20)] {
        let schema: SchemaRef = Arc::new(whole.project(&columns).unwrap());
        let view = View::open(world, world.stream(), &Marks::new(), 20).await;
        let tap = Arc::new(Tap::default());
        let batches = view.read(Arc::clone(&schema), &tap).await.unwrap();
        assert_eq!(count(&batches), rows, "{}: {columns:?}", world.name());
        assert!(batches.iter().all(|batch| batch.schema() == schema), "{}: {columns:?}", world.name());
        let counted = (tap.extracted(), tap.filtered_rows(), tap.rejected_rows(), tap.is_complete());
        assert_eq!(counted, (20, 0, 0, true), "{}: {columns:?}", world.name());
    }
    let view = View::open(world, world.stream(), &Marks::new(), 20).await;
    let batches = view.read(with_position(&whole), &Arc::default()).await.unwrap();
    let places: BTreeSet<String> = batches
        .iter()
        .flat_map(|batch| batch.column_by_name(POSITION_COLUMN).unwrap().as_string::<i32>().iter().flatten())
        .map(str::to_owned)
        .collect();
    assert_eq!(places.len(), 20, "{}: every row has a place of its own", world.name());
}

/// 6. and 7. A value that does not fit is told with column and place and without itself; or the job lets its row be set aside, or
///    lets it be a null that is counted.
async fn sets_aside_or_refuses(world: &dyn World) {
    let rows = [Row::good(1), Row::bad(2), Row::good(3), Row::bad(4), Row::good(5)];
    world.add(&rows);
    let view = View::open(world, world.stream(), &Marks::new(), 5).await;
    let error = view.read(full(), &Arc::default()).await.unwrap_err();
    let told = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Data, "{}: {told}", world.name());
    assert!(told.contains("amount") && told.contains("orders"), "{}: {told}", world.name());
    assert!(!format!("{error:?}").contains("7731"), "{}: errors hold no values: {told}", world.name());

    let aside = StreamSpec { bad_rows: BadRows::Quarantine, ..world.stream() };
    let view = View::open(world, aside.clone(), &Marks::new(), 5).await;
    let tap = Arc::new(Tap::default());
    assert_eq!(ids(&view.read(full(), &tap).await.unwrap()), [1, 3, 5], "{}", world.name());
    assert_eq!((tap.extracted(), tap.rejected_rows()), (5, 2), "{}", world.name());
    for reject in tap.rejects() {
        assert!(reject.reason.contains("amount") && !reject.reason.contains("7731"), "{}", reject.reason);
        assert!(reject.row.contains("7.7731"), "{}: the row is kept whole: {}", world.name(), reject.row);
        assert!(!reject.position.is_empty());
    }

    let as_null = StreamSpec { unfit_as_null: vec!["amount".to_owned()], ..world.stream() };
    let view = View::open(world, as_null, &Marks::new(), 5).await;
    let tap = Arc::new(Tap::default());
    let rows = view.read(full(), &tap).await.unwrap();
    assert_eq!(ids(&rows), [1, 2, 3, 4, 5], "{}", world.name());
    let nulls: usize = rows.iter().map(|batch| batch.column(1).null_count()).sum();
    assert_eq!((nulls, tap.rejected_rows()), (2, 0), "{}: where the job allows it", world.name());
    assert_eq!(tap.nulled(), [("amount".to_owned(), 2)].into(), "{}: and counted", world.name());

    let one = StreamSpec { max_bad_rows: 1, ..aside };
    let view = View::open(world, one, &Marks::new(), 5).await;
    let error = view.read(full(), &Arc::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Data, "{}: too many bad rows", world.name());
}

/// A stream that is dropped half read ends the reader, and the source can be opened again at once.
async fn stops_when_nobody_reads(world: &dyn World) {
    world.add(&(1..=60_000).map(Row::good).collect::<Vec<_>>());
    let view = View::open(world, world.stream(), &Marks::new(), 60_000).await;
    let scan = Scan::new(view.stream.clone(), full(), view.window.clone());
    let tap = Arc::new(Tap::default());
    let source = view.connection.source().unwrap();
    let mut rows = source.scan(&view.snapshot, &scan, Arc::clone(&tap)).unwrap();
    assert!(rows.next().await.unwrap().unwrap().num_rows() > 0);
    drop(rows);
    assert!(!tap.is_complete(), "{}: what was not read is not complete", world.name());
    let again = View::open(world, world.stream(), &Marks::new(), 60_000).await;
    assert_eq!(count(&again.read(full(), &Arc::default()).await.unwrap()), 60_000, "{}", world.name());
}

/// How a model's rows look in a target: `id int, period string, amount decimal(18,2)`.
pub(crate) type Line = (i64, String, i128);

/// How one try at a release ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Commit,
    Discard,
    Drop,
    /// After another try on the same base, which committed first.
    Overtaken,
}

/// One try at a release. Targets see no history: here it is a merge with marks, where rows of amount 0 are to be taken out.
#[derive(Debug, Clone)]
struct Try {
    mode: Mode,
    rows: Vec<Line>,
    end: End,
}

fn tries() -> impl Strategy<Value = Vec<Try>> {
    // A row's id decides its period, so that an id stays unique whatever modes follow each other.
    let line = (0_i64..12, 0_i128..4).prop_map(|(id, amount)| (id, format!("p{}", id % 3), amount * 5));
    let rows = prop::collection::vec(line, 0..8).prop_map(|mut rows| {
        rows.sort();
        rows.dedup_by_key(|(id, ..)| *id);
        rows
    });
    let mode = prop_oneof![
        Just(Mode::Merge),
        Just(Mode::Replace),
        Just(Mode::ReplaceRange),
        Just(Mode::Append),
        Just(Mode::History)
    ];
    let end = prop_oneof![
        5 => Just(End::Commit),
        1 => Just(End::Discard),
        1 => Just(End::Drop),
        1 => Just(End::Overtaken),
    ];
    prop::collection::vec((mode, rows, end).prop_map(|(mode, rows, end)| Try { mode, rows, end }), 1..10)
}

/// What [`Target`](super::Target) promises, by its numbers: any sequence of tries does to a target what it does to a list.
///
/// `empty` gives an empty target, which is gone when the first part is dropped, and a way to open it as a new process does.
pub(crate) fn target<Empty, Open: Fn() -> Arc<dyn Connection>>(
    name: &str,
    empty: impl Fn() -> (Empty, Open),
) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&tries(), |tries| {
        let (_empty, open) = empty();
        runtime.block_on(follow(&open, &tries));
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{name}: {error}");
    }
    let (_empty, open) = empty();
    runtime.block_on(refuses(name, &open));
}

async fn follow(open: &impl Fn() -> Arc<dyn Connection>, tries: &[Try]) {
    let (mut lines, mut seq) = (Vec::<Line>::new(), 0);
    for one in tries {
        let keyed = !matches!(one.mode, Mode::Append);
        // A key that comes twice in the target already has no right answer; append is tried on its own ids.
        let rows: Vec<Line> = one
            .rows
            .iter()
            .filter(|(id, ..)| keyed || lines.iter().all(|(known, ..)| known != id))
            .cloned()
            .collect();
        let after = expected(one.mode, &lines, &rows);
        let connection = open();
        // While one publishes, another one has to wait: so of those that are overtaken another output is still to come.
        let outputs = if matches!(one.end, End::Overtaken) { 2 } else { 1 };
        let mut release = Release::begin(&*connection, seq, outputs).await;
        let staged = release.load.stage(&output(one.mode), staged_rows(one.mode, &rows)).await.unwrap();
        assert_eq!(held(open).await, lines, "1: nobody sees what is staged: {one:?}");
        assert_eq!(
            (staged.rows, staged.rows_before, staged.rows_after),
            (rows.len() as u64, lines.len() as u64, after.len() as u64),
            "5: {one:?}"
        );
        assert_eq!(staged.rows_before + staged.inserted - staged.deleted, staged.rows_after, "5: {one:?}");
        if one.mode == Mode::Merge {
            let equal = rows.iter().filter(|row| lines.contains(row)).count() as u64;
            let known =
                rows.iter().filter(|(id, ..)| lines.iter().any(|(found, ..)| found == id)).count() as u64;
            let counts = (staged.inserted, staged.updated, staged.unchanged, staged.deleted);
            assert_eq!(counts, (rows.len() as u64 - known, known - equal, equal, 0), "6: {one:?}");
        }
        match one.end {
            End::Discard => release.load.discard().await.unwrap(),
            End::Drop => drop(release.load),
            End::Overtaken => {
                let mut other = Release::begin(&*connection, seq, 1).await;
                let same = other.load.stage(&output(one.mode), staged_rows(one.mode, &rows)).await.unwrap();
                assert_eq!(same, staged, "4: what one try stages the other does not see: {one:?}");
                let record = other.record(&same, one.mode);
                let outcome = other.load.commit(&record).await;
                assert!(matches!(outcome, CommitOutcome::Committed(None)), "{outcome:?}");
                (lines, seq) = (after, seq + 1);
                let record = release.record(&staged, one.mode);
                let outcome = release.load.commit(&record).await;
                assert!(matches!(outcome, CommitOutcome::Rejected(_)), "3: {outcome:?}");
            }
            End::Commit => {
                let record = release.record(&staged, one.mode);
                let outcome = release.load.commit(&record).await;
                assert!(matches!(outcome, CommitOutcome::Committed(None)), "{outcome:?}");
                (lines, seq) = (after, seq + 1);
                let found = last(open).await.unwrap();
                assert_eq!((found.seq, found.attempt_id), (seq, record.attempt_id), "2");
            }
        }
        assert_eq!(last(open).await.map_or(0, |record| record.seq), seq, "2 and 4: {one:?}");
        assert_eq!(held(open).await, lines, "1, 4 and 7: {one:?}");
    }
}

pub(crate) fn expected(mode: Mode, before: &[Line], rows: &[Line]) -> Vec<Line> {
    let kept = |line: &&Line| match mode {
        Mode::Append => true,
        Mode::Replace => false,
        Mode::Merge | Mode::History => rows.iter().all(|(id, ..)| *id != line.0),
        Mode::ReplaceRange => rows.iter().all(|(_, period, _)| *period != line.1),
    };
    let stays = |line: &&Line| mode != Mode::History || line.2 != 0;
    let mut after: Vec<Line> = before.iter().filter(kept).chain(rows.iter().filter(stays)).cloned().collect();
    after.sort();
    after
}

/// 8. and 9. What the contract and the key refuse is refused while staging, and leaves the target as it was.
async fn refuses(name: &str, open: &impl Fn() -> Arc<dyn Connection>) {
    let first = [(1, "p1".to_owned(), 100), (2, "p2".to_owned(), 200)];
    let connection = open();
    let mut release = Release::begin(&*connection, 0, 1).await;
    let staged = release.load.stage(&output(Mode::Merge), stream(&first)).await.unwrap();
    let record = release.record(&staged, Mode::Merge);
    assert!(matches!(release.load.commit(&record).await, CommitOutcome::Committed(None)));

    let [id, period, amount] = [0, 1, 2].map(|index| lines_schema().field(index).clone());
    let more = Field::new("more", DataType::Utf8, true);
    let retyped = Field::new("amount", DataType::Utf8, true);
    let shapes = [
        ("a new column", vec![id.clone(), period.clone(), amount, more]),
        ("a dropped column", vec![id.clone(), period.clone()]),
        ("a retyped column", vec![id, period, retyped]),
    ];
    for (what, fields) in shapes {
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let rows = RecordBatchStreamAdapter::new(schema, futures::stream::empty());
        refused(name, what, open, &output(Mode::Merge), Box::pin(rows)).await;
    }
    let twice = [(7, "p1".to_owned(), 1), (7, "p1".to_owned(), 2)];
    refused(name, "a key that comes twice", open, &output(Mode::Merge), stream(&twice)).await;
    let nullable = RecordBatch::new_empty(lines_schema());
    let null = RecordBatch::try_new(
        lines_schema(),
        nullable.columns().iter().map(|column| arrow::array::new_null_array(column.data_type(), 1)).collect(),
    );
    let rows = RecordBatchStreamAdapter::new(lines_schema(), futures::stream::iter([Ok(null.unwrap())]));
    refused(name, "a key that is null", open, &output(Mode::Merge), Box::pin(rows)).await;
    assert_eq!(held(open).await, first, "{name}");
}

async fn refused(
    name: &str,
    what: &str,
    open: &impl Fn() -> Arc<dyn Connection>,
    output: &OutputSpec,
    rows: SendableRecordBatchStream,
) {
    let connection = open();
    let mut release = Release::begin(&*connection, 1, 1).await;
    let error = release.load.stage(output, rows).await.expect_err(&format!("{name}: {what}"));
    assert_eq!(error.kind(), ErrorKind::Data, "{name}: {what}: {error}");
    release.load.discard().await.unwrap();
}

/// Publishes rows into an output of its own, as one release of a job of that name.
pub(crate) async fn publish(
    connection: &dyn Connection,
    name: &str,
    mode: Mode,
    schema: &SchemaRef,
    batches: Vec<RecordBatch>,
) -> Result<Staged> {
    let job = JobId { project: "contract".to_owned(), job: name.to_owned() };
    let mut release = Release::of(connection, job, None, 1).await?;
    let output = OutputSpec {
        name: name.to_owned(),
        key: Vec::new(),
        range: Vec::new(),
        partition_by: Vec::new(),
        ..output(mode)
    };
    let rows = futures::stream::iter(batches.into_iter().map(Ok));
    let rows = RecordBatchStreamAdapter::new(Arc::clone(schema), rows);
    let staged = release.load.stage(&output, Box::pin(rows)).await?;
    let mut record = release.record(&staged, mode);
    record.outputs = [(name.to_owned(), record.outputs.swap_remove("lines").unwrap())].into();
    match release.load.commit(&record).await {
        CommitOutcome::Committed(_) => Ok(staged),
        CommitOutcome::Rejected(error) | CommitOutcome::Unknown(error) => Err(error),
    }
}

/// One try, with what its record needs.
pub(crate) struct Release {
    pub(crate) load: Box<dyn Load>,
    attempt: Attempt,
    base: Option<LoadRecord>,
    job: JobId,
    _spill: tempfile::TempDir,
}

impl Release {
    async fn begin(connection: &dyn Connection, seq: u64, outputs: usize) -> Self {
        Self::of(connection, job(), Some(seq), outputs).await.unwrap()
    }

    /// On top of release `seq`; unless given, of the last. Of how many outputs.
    pub(crate) async fn of(
        connection: &dyn Connection,
        job: JobId,
        seq: Option<u64>,
        outputs: usize,
    ) -> Result<Self> {
        let target = connection.target().unwrap();
        let base = target.last_record(&job).await?;
        let seq = seq.unwrap_or_else(|| base.as_ref().map_or(0, |base| base.seq));
        let spill = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 64 << 20, spill: spill.path().to_owned() };
        let attempt = Attempt {
            id: Uuid::now_v7(),
            run_id: Uuid::now_v7(),
            seq: seq + 1,
            incarnation: base.as_ref().map_or_else(Uuid::new_v4, |base| base.incarnation),
            outputs,
            held: Held::unknown(),
            scratch: Scratch::new(&limits).unwrap(),
        };
        let load = target.begin(&job, &attempt, base.as_ref()).await?;
        Ok(Self { load, attempt, base, job, _spill: spill })
    }

    pub(crate) fn record(&self, staged: &Staged, mode: Mode) -> LoadRecord {
        let output = OutputRecord {
            mode: mode.to_string(),
            rows: staged.rows,
            inserted: staged.inserted,
            updated: staged.updated,
            unchanged: staged.unchanged,
            deleted: staged.deleted,
            rows_after: staged.rows_after,
            rowhash: String::new(),
            columns: columns_of(&lines_schema()),
            key: Vec::new(),
            files: Vec::new(),
        };
        LoadRecord {
            v: RECORD_VERSION,
            project: self.job.project.clone(),
            job: self.job.job.clone(),
            incarnation: self.attempt.incarnation,
            seq: self.attempt.seq,
            prev_record_sha256: self.base.as_ref().map(LoadRecord::sha256),
            run_id: self.attempt.run_id,
            attempt_id: self.attempt.id,
            committed_at: "2026-11-01T00:00:00Z".to_owned(),
            as_of: "2026-11-01T00:00:00Z".to_owned(),
            engine: "contract".to_owned(),
            mapping_fp: String::new(),
            sources: IndexMap::new(),
            outputs: [("lines".to_owned(), output)].into(),
            quarantined: 0,
            quarantine_files: Vec::new(),
            settled: Settled::default(),
        }
    }
}

pub(crate) fn job() -> JobId {
    JobId { project: "contract".to_owned(), job: "load".to_owned() }
}

/// The rows as a target is given them.
fn staged_rows(mode: Mode, rows: &[Line]) -> SendableRecordBatchStream {
    if mode != Mode::History {
        return stream(rows);
    }
    let mut fields: Vec<_> = lines_schema().fields().iter().cloned().collect();
    fields.push(Arc::new(Field::new(GONE, DataType::Boolean, false)));
    let schema: SchemaRef = Arc::new(Schema::new(fields));
    let gone: arrow::array::BooleanArray = rows.iter().map(|(.., amount)| Some(*amount == 0)).collect();
    let (of, gone) = (Arc::clone(&schema), Arc::new(gone));
    let marked = stream(rows).map(move |batch| {
        let columns = batch?.columns().iter().cloned().chain([Arc::clone(&gone) as _]).collect();
        Ok(RecordBatch::try_new(Arc::clone(&of), columns)?)
    });
    Box::pin(RecordBatchStreamAdapter::new(schema, marked))
}

pub(crate) fn output(mode: Mode) -> OutputSpec {
    OutputSpec {
        name: "lines".to_owned(),
        mode: if mode == Mode::History { Mode::Merge } else { mode },
        key: vec!["id".to_owned()],
        update: Vec::new(),
        range: vec!["period".to_owned()],
        named_ranges: Vec::new(),
        // Tables take no notice of it.
        partition_by: vec!["period".to_owned()],
        contract: Contract::default(),
        rebuild: false,
        marked: mode == Mode::History,
    }
}

fn lines_schema() -> SchemaRef {
    let fields =
        [("id", DataType::Int64), ("period", DataType::Utf8), ("amount", DataType::Decimal128(18, 2))];
    Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, true)).to_vec()))
}

pub(crate) fn stream(lines: &[Line]) -> SendableRecordBatchStream {
    use arrow::array::{Decimal128Array, Int64Array, StringArray};
    let amounts = Decimal128Array::from_iter_values(lines.iter().map(|(_, _, amount)| *amount));
    let batch = RecordBatch::try_new(
        lines_schema(),
        vec![
            Arc::new(lines.iter().map(|(id, ..)| *id).collect::<Int64Array>()),
            Arc::new(lines.iter().map(|(_, period, _)| Some(period)).collect::<StringArray>()),
            Arc::new(amounts.with_precision_and_scale(18, 2).unwrap()),
        ],
    );
    Box::pin(RecordBatchStreamAdapter::new(lines_schema(), futures::stream::iter([Ok(batch.unwrap())])))
}

async fn last(open: &impl Fn() -> Arc<dyn Connection>) -> Option<LoadRecord> {
    open().target().unwrap().last_record(&job()).await.unwrap()
}

/// What a reader sees who opens the target now, sorted.
async fn held(open: &impl Fn() -> Arc<dyn Connection>) -> Vec<Line> {
    let connection = open();
    if connection.target().unwrap().current(&job(), "lines").await.unwrap().is_none() {
        return Vec::new();
    }
    let source = connection.source().unwrap();
    let table = StreamSpec { columns: IndexMap::new(), ..orders(Read::Table("lines".to_owned())) };
    let schema = source.describe(&table).await.unwrap();
    let streams = [table.clone()];
    let bounds = source.bounds(&streams, &Marks::new(), after(0)).await.unwrap();
    let snapshot = source.snapshot(&streams, &bounds).await.unwrap();
    let scan = Scan::new(table, schema, Window::Whole);
    let batches: Vec<RecordBatch> =
        source.scan(&snapshot, &scan, Arc::default()).unwrap().try_collect().await.unwrap();
    let mut lines = Vec::new();
    for batch in &batches {
        let options = FormatOptions::default();
        let text = |column: usize, row: usize| {
            ArrayFormatter::try_new(batch.column(column), &options).unwrap().value(row).to_string()
        };
        for row in 0..batch.num_rows() {
            let amount = text(2, row).replace('.', "").parse().unwrap();
            lines.push((text(0, row).parse().unwrap(), text(1, row), amount));
        }
    }
    lines.sort();
    lines
}
