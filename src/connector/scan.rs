//! The one execution plan that we write: a scan of a source, as plain data.
//!
//! A [`Scan`] says what to read and holds no handle and no secret. Where it executes, the connection is looked
//! up by name in [`OpenSources`], which a session carries. So the same plan can be sent to another machine. A source that is copied
//! as it is needs no session: [`ScanTable::read`] gives its rows.
//!
//! Projections reach every source; conditions and limits of models those that apply them. Windows are part of the scan. What a
//! server leaves out was not extracted.

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use arrow::{
    array::RecordBatch,
    datatypes::{DataType, Field, Schema, SchemaRef},
};
use async_trait::async_trait;
use datafusion::{
    catalog::{Session, TableProvider},
    common::{Statistics, stats::Precision, tree_node::TreeNodeRecursion},
    error::{DataFusionError, Result as DataFusionResult},
    execution::{TaskContext, memory_pool::MemoryPool},
    logical_expr::{Expr, TableProviderFilterPushDown, TableType},
    physical_expr::{EquivalenceProperties, expressions::Column, projection::ProjectionExpr},
    physical_plan::{
        DisplayAs, DisplayFormatType, EmptyRecordBatchStream, ExecutionPlan, Partitioning, PhysicalExpr,
        PlanProperties, SendableRecordBatchStream,
        execution_plan::{Boundedness, EmissionType},
        projection::ProjectionExec,
        stream::RecordBatchStreamAdapter,
    },
};

use futures::StreamExt;

use super::{
    Bounds, Connection, Snapshot,
    condition::Condition,
    spec::{BadRows, Read, StreamSpec},
    tap::Tap,
};
use crate::{
    budget::{self, Share},
    error::Error,
    runtime::{self, BATCH_BYTES, BATCHES_UNDER_WAY},
    watermark::Window,
};

/// The column that a model may name to get a row's place in its source.
pub const POSITION_COLUMN: &str = "_source_position";

/// `schema` with [`POSITION_COLUMN`] behind its columns.
pub fn with_position(schema: &SchemaRef) -> SchemaRef {
    let position = Arc::new(Field::new(POSITION_COLUMN, DataType::Utf8, false));
    Arc::new(Schema::new(schema.fields().iter().cloned().chain([position]).collect::<Vec<_>>()))
}

/// Threads that read one source side by side, at most.
const MOST_READERS: usize = 4;

/// What the order of rows is to whoever reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Values depend on it: rows come as the source has them.
    Decides,
    /// They are passed on in it: of a source that has one, as a file does, they come so.
    Shows,
    /// They are joined or grouped: it is lost, and they come in any.
    Unseen,
}

/// What to read: plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// The stream.
    pub stream: StreamSpec,
    /// The columns to give, in order: the projection is applied to the stream's own.
    pub schema: SchemaRef,
    /// Which rows.
    pub window: Window,
    /// Rows that do not meet all of these need not come.
    pub conditions: Vec<Condition>,
    /// More rows than these need not come.
    pub limit: Option<usize>,
    /// Bytes at which a batch is cut, however few rows it has. A single row may be larger.
    pub batch_bytes: usize,
    /// What their order is to whoever reads them.
    pub order: Order,
    /// Whether they go on in one stream, which one session fills: others would take the server's time from whoever takes the rows.
    pub in_one_stream: bool,
}

impl Scan {
    /// All rows of `window`.
    pub fn new(stream: StreamSpec, schema: SchemaRef, window: Window) -> Self {
        let (conditions, limit, batch_bytes) = (Vec::new(), None, BATCH_BYTES);
        let (order, in_one_stream) = (Order::Decides, false);
        Self { stream, schema, window, conditions, limit, batch_bytes, order, in_one_stream }
    }

    /// How many threads read it side by side, where they can: each holds what it decodes.
    pub fn readers(&self) -> usize {
        self.takers().min(MOST_READERS)
    }

    /// How many partitions share its rows.
    fn takers(&self) -> usize {
        if self.order == Order::Unseen { runtime::cores() } else { 1 }
    }

    /// The rows, of which the one at hand, and if there is room others under way, are taken from `pool`.
    fn open(
        &self,
        sources: &OpenSources,
        pool: &Arc<dyn MemoryPool>,
    ) -> DataFusionResult<SendableRecordBatchStream> {
        let name = &self.stream.name;
        let refused = |what: &str| DataFusionError::from(Error::bug(format!("source `{name}` {what}")));
        let open = sources.0.get(name).cloned().ok_or_else(|| refused("is not open"))?;
        let source = open.connection.source().ok_or_else(|| refused("cannot be read"))?;
        open.tap.start();
        let scan = Self { batch_bytes: budget::batch_bytes(pool.as_ref()), ..self.clone() };
        let mut rows = source.scan(&open.snapshot, &scan, Arc::clone(&open.tap))?;
        let (tap, memory) = (open.tap, Share::of_source(name, pool));
        // Of each reader and of each taker more than one there is one more.
        let others = BATCHES_UNDER_WAY - 1 + scan.readers() - 1 + scan.takers() - 1;
        let counted = futures::stream::poll_fn(move |waker| {
            let next = rows.poll_next_unpin(waker);
            match &next {
                Poll::Ready(Some(Ok(batch))) => {
                    tap.hand(batch.num_rows() as u64);
                    // As much again for each of the others that are under way, if there is.
                    let bytes = batch.get_array_memory_size();
                    memory.wishes(bytes.saturating_mul(others));
                    if let Err(error) = memory.needs(bytes) {
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                Poll::Ready(None) => {
                    tap.drain();
                    memory.free();
                }
                Poll::Ready(Some(Err(_))) | Poll::Pending => {}
            }
            next
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), counted)))
    }
}

/// A stream that a run has opened.
#[derive(Debug, Clone)]
pub struct OpenSource {
    /// The connection.
    pub connection: Arc<dyn Connection>,
    /// The view that it reads from.
    pub snapshot: Snapshot,
    /// Where it counts.
    pub tap: Arc<Tap>,
}

/// The streams that a run has opened, by the source's name. Carried by the session, where there is one.
#[derive(Debug, Default)]
pub struct OpenSources(pub HashMap<String, OpenSource>);

impl OpenSources {
    /// About how many rows a stream has, where that is quickly known.
    ///
    /// # Errors
    ///
    /// If its source cannot be asked.
    pub async fn rows(&self, stream: &StreamSpec) -> crate::error::Result<Option<u64>> {
        let open = self.0.get(&stream.name);
        match open.and_then(|open| Some((open.connection.source()?, &open.snapshot))) {
            Some((source, snapshot)) => source.rows(snapshot, stream).await,
            None => Ok(None),
        }
    }
}

/// A stream as a table: what models select from.
#[derive(Debug)]
pub struct ScanTable {
    /// What to read, all of it.
    pub scan: Scan,
    /// Whether the source may leave out what a model does not want.
    pub selective: bool,
    /// About how many rows it has: only speed depends on it.
    pub rows: Option<u64>,
}

impl ScanTable {
    /// All that an output holds, read back from its target; and the view that it is read from, for the session.
    ///
    /// # Errors
    ///
    /// If the target cannot be read, or the output is not there.
    pub async fn of_output(
        target: &Arc<dyn Connection>,
        output: &str,
    ) -> crate::error::Result<(Self, OpenSources)> {
        let name = "_held";
        let stream = StreamSpec::whole(name, Read::Table(output.to_owned()));
        let source = target.source().ok_or_else(|| {
            Error::configuration(format!("output `{output}`: its connection cannot be read, and has to be"))
        })?;
        let schema = source.describe(&stream).await?;
        let snapshot = source.snapshot(std::slice::from_ref(&stream), &Bounds::default()).await?;
        let open = OpenSource { connection: Arc::clone(target), snapshot, tap: Arc::default() };
        let sources = OpenSources([(name.to_owned(), open)].into_iter().collect());
        let scan = Scan::new(stream, schema, Window::Whole);
        Ok((Self { scan, selective: false, rows: None }, sources))
    }

    /// The scan of so many of its columns, and these; the scan may give one more behind them.
    fn projected(&self, columns: &[usize]) -> DataFusionResult<(Scan, SchemaRef)> {
        let scan = self.scan.clone();
        let wanted: SchemaRef = Arc::new(scan.schema.project(columns)?);
        // What may come late is counted by the cursor, also where nobody asks for it.
        let unasked = scan.stream.cursor.as_ref().filter(|cursor| cursor.overlap.is_some());
        let unasked = unasked.and_then(|cursor| cursor.columns.first());
        let unasked = unasked.filter(|column| wanted.field_with_name(column).is_err());
        let schema = match unasked.and_then(|column| scan.schema.index_of(column).ok()) {
            Some(cursor) => {
                let all: Vec<usize> = columns.iter().copied().chain([cursor]).collect();
                Arc::new(scan.schema.project(&all)?)
            }
            None => Arc::clone(&wanted),
        };
        Ok((Scan { schema, ..scan }, wanted))
    }

    /// The rows, without a session: at least the columns of `schema`, which has names of its own.
    ///
    /// # Errors
    ///
    /// If a column is not there, or the source is not open or cannot be read.
    pub fn read(
        &self,
        schema: &Schema,
        sources: &OpenSources,
        pool: &Arc<dyn MemoryPool>,
    ) -> DataFusionResult<SendableRecordBatchStream> {
        let columns = schema.fields().iter().map(|field| self.scan.schema.index_of(field.name()));
        let (scan, _) = self.projected(&columns.collect::<Result<Vec<_>, _>>()?)?;
        scan.open(sources, pool)
    }
}

#[async_trait]
impl TableProvider for ScanTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.scan.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(
        &self,
        filters: &[&Expr],
    ) -> DataFusionResult<Vec<TableProviderFilterPushDown>> {
        let support = |filter: &&Expr| match Condition::of(filter, &self.scan.schema) {
            Some(_) if self.selective => TableProviderFilterPushDown::Inexact,
            _ => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(support).collect())
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        let (mut scan, wanted) = match projection {
            Some(columns) => self.projected(columns)?,
            None => (self.scan.clone(), Arc::clone(&self.scan.schema)),
        };
        if self.selective {
            scan.conditions =
                filters.iter().filter_map(|filter| Condition::of(filter, &self.scan.schema)).collect();
            // A window must be read to its end, or what is left of it would be lost; rows that are set aside are not among the
            // wanted ones.
            let all_come = scan.window == Window::Whole && scan.stream.bad_rows == BadRows::Error;
            scan.limit = limit.filter(|_| filters.is_empty() && all_come);
        }
        // Where their order is lost, whoever is free takes the next rows.
        let takers = scan.takers().min(session.config().target_partitions());
        let exec = ScanExec::new(scan, self.rows, takers);
        if exec.scan.schema.fields().len() == wanted.fields().len() {
            return Ok(Arc::new(exec));
        }
        let columns = wanted.fields().iter().enumerate().map(|(at, field)| ProjectionExpr {
            expr: Arc::new(Column::new(field.name(), at)),
            alias: field.name().clone(),
        });
        Ok(Arc::new(ProjectionExec::try_new(columns, Arc::new(exec))?))
    }
}

/// Executes a [`Scan`], once for all of its partitions: each batch goes to one of them.
#[derive(Debug)]
pub struct ScanExec {
    scan: Scan,
    rows: Option<u64>,
    properties: Arc<PlanProperties>,
    /// The rows that another partition has asked for, for each that has not.
    waiting: Mutex<Vec<Option<Begun>>>,
}

/// Rows of which each taker has some: the next ones go to whoever asks first.
struct Shared {
    rows: SendableRecordBatchStream,
    asking: Arc<Asking>,
    has_ended: Arc<AtomicBool>,
}

/// Rows that somebody takes already, for who comes later: gone with the last taker.
#[derive(Debug, Clone)]
struct Begun {
    shared: Weak<Mutex<Shared>>,
    has_ended: Arc<AtomicBool>,
}

/// Who waits for rows: of each taker how to wake it.
#[derive(Default)]
struct Asking(Mutex<Vec<Option<Waker>>>);

impl Asking {
    fn list(&self) -> MutexGuard<'_, Vec<Option<Waker>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Asking {
    fn wake(self: Arc<Self>) {
        let asking: Vec<Waker> = self.list().iter_mut().filter_map(Option::take).collect();
        asking.into_iter().for_each(Waker::wake);
    }
}

impl Shared {
    fn poll(
        &mut self,
        taker: usize,
        context: &mut Context<'_>,
    ) -> Poll<Option<DataFusionResult<RecordBatch>>> {
        if self.has_ended.load(Ordering::Relaxed) {
            return Poll::Ready(None);
        }
        let put = |waker| {
            if let Some(place) = self.asking.list().get_mut(taker) {
                *place = waker;
            }
        };
        // In the list before it is looked whether there are any: they may come in between.
        put(Some(context.waker().clone()));
        let waker = Waker::from(Arc::clone(&self.asking));
        let next = self.rows.poll_next_unpin(&mut Context::from_waker(&waker));
        if next.is_ready() {
            // Others look for themselves: what would have told them of more rows has been used up.
            put(None);
            Arc::clone(&self.asking).wake();
        }
        self.has_ended.store(matches!(next, Poll::Ready(None)), Ordering::Relaxed);
        next
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl ScanExec {
    /// A plan that reads `scan`, of about so many rows if that is known, in as many partitions as there are `takers`: one has all rows in their order.
    pub fn new(scan: Scan, rows: Option<u64>, takers: usize) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&scan.schema)),
            Partitioning::UnknownPartitioning(takers),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        let waiting = Mutex::new(vec![None; takers]);
        Self { scan, rows, properties: Arc::new(properties), waiting }
    }

    fn takers(&self) -> usize {
        self.properties.output_partitioning().partition_count()
    }

    /// The rows that a taker shares with the others: those that they have begun, or from the first one on.
    fn shared(
        &self,
        taker: usize,
        open: impl FnOnce() -> DataFusionResult<SendableRecordBatchStream>,
    ) -> DataFusionResult<Option<Arc<Mutex<Shared>>>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = waiting.get_mut(taker).and_then(Option::take);
        if let Some(shared) = begun.as_ref().and_then(|begun| begun.shared.upgrade()) {
            return Ok(Some(shared));
        }
        // The others have had them all; or went away before, and all is asked for anew.
        if begun.is_some_and(|begun| begun.has_ended.load(Ordering::Relaxed)) {
            return Ok(None);
        }
        let asking = Arc::new(Asking(Mutex::new(vec![None; waiting.len()])));
        let has_ended = Arc::new(AtomicBool::new(false));
        let shared = Shared { rows: open()?, asking, has_ended: Arc::clone(&has_ended) };
        let shared = Arc::new(Mutex::new(shared));
        for (_, other) in waiting.iter_mut().enumerate().filter(|(other, _)| *other != taker) {
            *other = Some(Begun { shared: Arc::downgrade(&shared), has_ended: Arc::clone(&has_ended) });
        }
        Ok(Some(shared))
    }
}

impl DisplayAs for ScanExec {
    fn fmt_as(&self, _: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<&str> =
            self.scan.schema.fields().iter().map(|field| field.name().as_str()).collect();
        write!(
            f,
            "ScanExec: source={}, window={}, columns=[{}]",
            self.scan.stream.name,
            self.scan.window,
            columns.join(", ")
        )
    }
}

impl ExecutionPlan for ScanExec {
    fn name(&self) -> &'static str {
        "ScanExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        Vec::new()
    }

    fn partition_statistics(&self, partition: Option<usize>) -> DataFusionResult<Arc<Statistics>> {
        let rows = self.rows.and_then(|rows| usize::try_from(rows).ok());
        let rows = rows.map(|rows| if partition.is_some() { rows / self.takers() } else { rows });
        let num_rows = rows.map_or(Precision::Absent, Precision::Inexact);
        Ok(Arc::new(Statistics { num_rows, ..Statistics::new_unknown(&self.scan.schema) }))
    }

    fn apply_expressions(
        &self,
        _: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> DataFusionResult<TreeNodeRecursion>,
    ) -> DataFusionResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(
        self: Arc<Self>,
        _: Vec<Arc<dyn ExecutionPlan>>,
    ) -> DataFusionResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(
        &self,
        partition: usize,
        context: Arc<TaskContext>,
    ) -> DataFusionResult<SendableRecordBatchStream> {
        let open = || {
            let sources = context.session_config().get_extension::<OpenSources>();
            self.scan.open(sources.unwrap_or_default().as_ref(), context.memory_pool())
        };
        if self.takers() == 1 {
            return open();
        }
        let Some(shared) = self.shared(partition, open)? else {
            return Ok(Box::pin(EmptyRecordBatchStream::new(Arc::clone(&self.scan.schema))));
        };
        let taken = futures::stream::poll_fn(move |context| {
            shared.lock().unwrap_or_else(PoisonError::into_inner).poll(partition, context)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.scan.schema), taken)))
    }
}

/// The value that a snapshot holds, if it is a `T`.
///
/// # Errors
///
/// If the snapshot is of another connection.
pub fn held<T: Any + Send + Sync>(snapshot: &Snapshot) -> crate::error::Result<Arc<T>> {
    Arc::clone(&snapshot.hold)
        .downcast::<T>()
        .map_err(|_| Error::bug(format!("the snapshot `{}` is of another connection", snapshot.token)))
}
