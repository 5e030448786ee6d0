//! The one execution plan that we write: a scan of a source, as plain data.
//!
//! A [`Scan`] says what to read and holds no handle and no secret. Where it executes, the connection is looked
//! up by name in [`OpenSources`], which a session carries. So the same plan can be sent to another machine. A source that is copied
//! as it is needs no session: [`ScanTable::read`] gives its rows.
//!
//! Projections reach every source; conditions and limits of models those that apply them. Windows are part of the scan. What a
//! server leaves out was not extracted.

use std::{any::Any, collections::HashMap, fmt, sync::Arc, task::Poll};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::{
    catalog::{Session, TableProvider},
    common::{Statistics, stats::Precision, tree_node::TreeNodeRecursion},
    error::{DataFusionError, Result as DataFusionResult},
    execution::{TaskContext, memory_pool::MemoryPool},
    logical_expr::{Expr, TableProviderFilterPushDown, TableType},
    physical_expr::{EquivalenceProperties, expressions::Column, projection::ProjectionExpr},
    physical_plan::{
        DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PhysicalExpr, PlanProperties,
        SendableRecordBatchStream,
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
    runtime::{BATCH_BYTES, BATCHES_UNDER_WAY},
    watermark::Window,
};

/// The column that a model may name to get a row's place in its source.
pub const POSITION_COLUMN: &str = "_source_position";

/// `schema` with [`POSITION_COLUMN`] behind its columns.
pub fn with_position(schema: &SchemaRef) -> SchemaRef {
    let position = Arc::new(Field::new(POSITION_COLUMN, DataType::Utf8, false));
    Arc::new(Schema::new(schema.fields().iter().cloned().chain([position]).collect::<Vec<_>>()))
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
    /// Whether rows come as the source has them; else in any order.
    pub in_order: bool,
    /// Whether they go on in one stream, which one session fills: others would take the server's time from whoever takes the rows.
    pub in_one_stream: bool,
}

impl Scan {
    /// All rows of `window`.
    pub fn new(stream: StreamSpec, schema: SchemaRef, window: Window) -> Self {
        let (conditions, limit, batch_bytes) = (Vec::new(), None, BATCH_BYTES);
        let (in_order, in_one_stream) = (true, false);
        Self { stream, schema, window, conditions, limit, batch_bytes, in_order, in_one_stream }
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
        let counted = futures::stream::poll_fn(move |waker| {
            let next = rows.poll_next_unpin(waker);
            match &next {
                Poll::Ready(Some(Ok(batch))) => {
                    tap.hand(batch.num_rows() as u64);
                    // As much again for each of the others that are under way, if there is.
                    let bytes = batch.get_array_memory_size();
                    memory.wishes(bytes.saturating_mul(BATCHES_UNDER_WAY - 1));
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
        _: &dyn Session,
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
        if scan.schema.fields().len() == wanted.fields().len() {
            return Ok(Arc::new(ScanExec::new(scan, self.rows)));
        }
        let columns = wanted.fields().iter().enumerate().map(|(at, field)| ProjectionExpr {
            expr: Arc::new(Column::new(field.name(), at)),
            alias: field.name().clone(),
        });
        Ok(Arc::new(ProjectionExec::try_new(columns, Arc::new(ScanExec::new(scan, self.rows)))?))
    }
}

/// Executes a [`Scan`]: one partition, in the source's order.
#[derive(Debug)]
pub struct ScanExec {
    scan: Scan,
    rows: Option<u64>,
    properties: Arc<PlanProperties>,
}

impl ScanExec {
    /// A plan that reads `scan`, of about so many rows if that is known.
    pub fn new(scan: Scan, rows: Option<u64>) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(Arc::clone(&scan.schema)),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        );
        Self { scan, rows, properties: Arc::new(properties) }
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

    fn partition_statistics(&self, _: Option<usize>) -> DataFusionResult<Arc<Statistics>> {
        let rows = self.rows.and_then(|rows| usize::try_from(rows).ok());
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

    fn execute(&self, _: usize, context: Arc<TaskContext>) -> DataFusionResult<SendableRecordBatchStream> {
        let sources = context.session_config().get_extension::<OpenSources>();
        self.scan.open(sources.unwrap_or_default().as_ref(), context.memory_pool())
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
