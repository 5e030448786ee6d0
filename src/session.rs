//! DataFusion sessions, as floodmark sets them up.
//!
//! One partition where the order of rows may decide about values: a run can be compared with another. Where it decides about nothing
//! ([`order_of`]), as many as there are cores. Decimal literals, checked arithmetic, UTC. No DDL, no statements, no file functions: models
//! are SELECTs.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{RecordBatch, RecordBatchOptions},
    datatypes::{Schema, SchemaRef},
};
use chrono::{DateTime, Utc};
use datafusion::{
    catalog::TableProvider,
    common::{
        DFSchema,
        config::ConfigOptions,
        tree_node::{Transformed, TransformedResult, TreeNode, TreeNodeRecursion},
    },
    error::DataFusionError,
    execution::{SessionStateBuilder, config::SessionConfig},
    logical_expr::{Distinct, Expr, ExprSchemable, LogicalPlan},
    optimizer::{Analyzer, AnalyzerRule},
    physical_optimizer::PhysicalOptimizerRule,
    physical_plan::{
        ExecutionPlan, ExecutionPlanProperties, SendableRecordBatchStream,
        coalesce_partitions::CoalescePartitionsExec, execution_plan::replace_children_if_necessary,
        joins::NestedLoopJoinExec, stream::RecordBatchStreamAdapter,
    },
    prelude::SessionContext,
    sql::parser::Statement,
};
use futures::StreamExt;
use indexmap::IndexMap;

use crate::{
    connector::scan::{OpenSources, Order, ScanTable},
    error::{Error, Result, SourceText},
    functions::{cast::cast_exactly, now, rules, sum::ExactSum},
    runtime::BATCH_ROWS,
    spool::Scratch,
};

/// A session for models and checks.
pub fn for_models(scratch: &Scratch, as_of: DateTime<Utc>, sources: Arc<OpenSources>) -> SessionContext {
    for_joins(scratch, as_of, sources, true, 1)
}

/// The same for joins of many rows, which are sorted rather than hashed unless `hash_joins`; these are made in so many partitions.
pub fn for_joins(
    scratch: &Scratch,
    as_of: DateTime<Utc>,
    sources: Arc<OpenSources>,
    hash_joins: bool,
    partitions: usize,
) -> SessionContext {
    let mut config = partitioned(scratch, hash_joins, partitions);
    config.set_extension(sources);
    let state = SessionStateBuilder::new()
        .with_config(config)
        .with_runtime_env(Arc::clone(&scratch.environment))
        .with_default_features()
        .with_analyzer_rules(rules_for(None))
        .with_physical_optimizer_rule(Arc::new(LoopsOverOne))
        .build();
    let context = SessionContext::new_with_state(state);
    context.register_udaf(ExactSum::sum());
    context.register_udaf(ExactSum::avg());
    for function in now::functions(as_of) {
        context.register_udf(function);
    }
    context
}

/// Relations by their names, and a session that knows them as soon as something is computed: a copy computes nothing.
#[expect(missing_debug_implementations, reason = "a session has none")]
pub struct Tables {
    scratch: Scratch,
    as_of: DateTime<Utc>,
    open: Arc<OpenSources>,
    hash_joins: bool,
    partitions: usize,
    context: Option<SessionContext>,
    /// Those that the session is to know.
    waiting: IndexMap<String, Arc<dyn TableProvider>>,
    /// Those that are sources as they are.
    sources: HashMap<String, Arc<ScanTable>>,
}

impl Tables {
    /// None yet. The session would be that of [`for_models`].
    pub fn for_models(scratch: &Scratch, as_of: DateTime<Utc>, open: Arc<OpenSources>) -> Self {
        Self::for_joins(scratch, as_of, open, true, 1)
    }

    /// None yet. The session would be that of [`for_joins`].
    pub fn for_joins(
        scratch: &Scratch,
        as_of: DateTime<Utc>,
        open: Arc<OpenSources>,
        hash_joins: bool,
        partitions: usize,
    ) -> Self {
        let (scratch, context) = (scratch.clone(), None);
        let (waiting, sources) = (IndexMap::new(), HashMap::new());
        Self { scratch, as_of, open, hash_joins, partitions, context, waiting, sources }
    }

    /// Calls a source `name`.
    ///
    /// # Errors
    ///
    /// DataFusion's.
    pub fn add_source(&mut self, name: &str, source: ScanTable) -> Result<()> {
        let source = Arc::new(source);
        self.add(name, Arc::clone(&source) as Arc<dyn TableProvider>)?;
        self.sources.insert(name.to_owned(), source);
        Ok(())
    }

    /// Calls a relation `name`, in the place of another of that name.
    ///
    /// # Errors
    ///
    /// DataFusion's.
    pub fn add(&mut self, name: &str, table: Arc<dyn TableProvider>) -> Result<()> {
        self.sources.remove(name);
        if let Some(context) = &self.context {
            context.deregister_table(name)?;
            context.register_table(name, table)?;
        } else {
            self.waiting.insert(name.to_owned(), table);
        }
        Ok(())
    }

    /// The rows of a source that stands there as it is, read without a session: at least the columns of `schema`. `None` of other relations.
    ///
    /// # Errors
    ///
    /// If the source cannot be read.
    pub fn read(&self, name: &str, schema: &Schema) -> Result<Option<SendableRecordBatchStream>> {
        let Some(source) = self.sources.get(name) else { return Ok(None) };
        Ok(Some(source.read(schema, &self.open, &self.scratch.environment.memory_pool)?))
    }

    /// The session.
    ///
    /// # Errors
    ///
    /// DataFusion's.
    pub fn context(&mut self) -> Result<SessionContext> {
        if let Some(context) = &self.context {
            return Ok(context.clone());
        }
        let open = Arc::clone(&self.open);
        let context = for_joins(&self.scratch, self.as_of, open, self.hash_joins, self.partitions);
        for (name, table) in self.waiting.drain(..) {
            context.register_table(name, table)?;
        }
        self.context = Some(context.clone());
        Ok(context)
    }
}

/// What holds in every plan of a model; what a value breaks is told at its place in `file`.
fn rules_for(file: Option<&Arc<SourceText>>) -> Vec<Arc<dyn AnalyzerRule + Send + Sync>> {
    let first: Arc<dyn AnalyzerRule + Send + Sync> = Arc::new(rules::Comparable);
    let last: Arc<dyn AnalyzerRule + Send + Sync> = Arc::new(rules::Exact { file: file.map(Arc::clone) });
    [first].into_iter().chain(Analyzer::new().rules).chain([last]).collect()
}

/// The plan of one file's SELECT, with its types and the rules of [`for_models`] applied.
///
/// # Errors
///
/// DataFusion's, with the place as a diagnostic where it knows one.
pub async fn plan_of(
    context: &SessionContext,
    statement: Statement,
    file: &Arc<SourceText>,
) -> Result<LogicalPlan, DataFusionError> {
    let state = context.state();
    let plan = state.statement_to_plan(statement).await?;
    Analyzer::with_rules(rules_for(Some(file))).execute_and_check(plan, state.config_options(), |_, _| {})
}

/// The other side of a nested loop comes in one partition. One that does not fit into the memory looks in each of them by itself which rows of the
/// first side have met one (DataFusion 55): a row that met one in this partition came once more, as one without, from that.
#[derive(Debug)]
struct LoopsOverOne;

impl PhysicalOptimizerRule for LoopsOverOne {
    fn optimize(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        _: &ConfigOptions,
    ) -> Result<Arc<dyn ExecutionPlan>, DataFusionError> {
        let in_one = |plan: Arc<dyn ExecutionPlan>| {
            let Some(join) = plan.downcast_ref::<NestedLoopJoinExec>() else {
                return Ok(Transformed::no(plan));
            };
            if join.right().output_partitioning().partition_count() == 1 {
                return Ok(Transformed::no(plan));
            }
            let (left, right) = (Arc::clone(join.left()), Arc::clone(join.right()));
            let right: Arc<dyn ExecutionPlan> = Arc::new(CoalescePartitionsExec::new(right));
            Ok(Transformed::yes(replace_children_if_necessary(plan, vec![left, right])?))
        };
        plan.transform_up(in_one).data()
    }

    fn name(&self) -> &'static str {
        "loops_over_one"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// A session for connectors' own work, with SQL of ours. Without hash joins tables are sorted and merged, which can spill;
/// DataFusion plans that over two partitions or more, so that rows have no order then.
pub fn internal(scratch: &Scratch, hash_joins: bool) -> SessionContext {
    SessionContext::new_with_config_rt(partitioned(scratch, hash_joins, 1), Arc::clone(&scratch.environment))
}

fn partitioned(scratch: &Scratch, hash_joins: bool, partitions: usize) -> SessionConfig {
    let config = config(scratch, hash_joins).with_target_partitions(if hash_joins { partitions } else { 2 });
    // To part both sides of a join by their keys costs more than it saves where only two could share the work: one side is held whole then.
    config.with_repartition_joins(!hash_joins || partitions > 2)
}

/// What the order of the rows that are read is to those that a plan makes of them.
pub fn order_of(plan: &LogicalPlan) -> Order {
    if !is_order_free(plan) {
        Order::Decides
    } else if loses_order(plan) {
        Order::Unseen
    } else {
        Order::Shows
    }
}

/// Whether rows that come in another order give the same rows, in whatever order: no row is chosen by its place, and nothing is
/// added up that rounds.
fn is_order_free(plan: &LogicalPlan) -> bool {
    let mut free = true;
    // The visitor fails nowhere.
    drop(plan.apply_with_subqueries(|node| {
        free &= match node {
            LogicalPlan::Projection(_)
            | LogicalPlan::Filter(_)
            | LogicalPlan::Join(_)
            | LogicalPlan::TableScan(_)
            | LogicalPlan::SubqueryAlias(_)
            | LogicalPlan::Subquery(_)
            | LogicalPlan::Union(_)
            | LogicalPlan::Values(_)
            | LogicalPlan::EmptyRelation(_)
            | LogicalPlan::Distinct(Distinct::All(_)) => true,
            LogicalPlan::Sort(sort) => sort.fetch.is_none(),
            LogicalPlan::Aggregate(aggregate) => {
                aggregate.aggr_expr.iter().all(|expr| is_order_free_aggregate(expr, aggregate.input.schema()))
            }
            _ => false,
        };
        Ok(if free { TreeNodeRecursion::Continue } else { TreeNodeRecursion::Stop })
    }));
    free
}

/// Whether rows lose the order in which they are read, whatever it is: all of them are joined or grouped.
fn loses_order(plan: &LogicalPlan) -> bool {
    match plan {
        LogicalPlan::Join(_) | LogicalPlan::Aggregate(_) | LogicalPlan::Distinct(_) => true,
        LogicalPlan::Union(union) => union.inputs.iter().all(|input| loses_order(input)),
        plan => plan.inputs().into_iter().any(loses_order),
    }
}

fn is_order_free_aggregate(expr: &Expr, schema: &DFSchema) -> bool {
    match expr {
        Expr::Alias(alias) => is_order_free_aggregate(&alias.expr, schema),
        Expr::AggregateFunction(function) => match function.func.name() {
            "count" | "min" | "max" | "bool_and" | "bool_or" | "bit_and" | "bit_or" | "bit_xor" => true,
            "sum" | "avg" => expr.get_type(schema).is_ok_and(|of| !of.is_floating()),
            _ => false,
        },
        _ => false,
    }
}

/// Rows of a batch. How wide they are is not known: with little memory they are few, so that a few batches of wide ones fit; and fewer
/// where they are sorted because there are many, since sorted files are merged with a batch of each in memory.
fn batch_rows(scratch: &Scratch, hash_joins: bool) -> usize {
    let rows = (scratch.limits.memory_bytes >> 18).clamp(BATCH_ROWS / 8, BATCH_ROWS);
    if hash_joins { rows } else { rows / 4 }
}

fn config(scratch: &Scratch, hash_joins: bool) -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_batch_size(batch_rows(scratch, hash_joins))
        .with_target_partitions(1)
        .with_information_schema(false)
        .with_round_robin_repartition(false);
    let options = config.options_mut();
    options.sql_parser.parse_float_as_decimal = true;
    options.sql_parser.collect_spans = true;
    options.sql_parser.map_string_types_to_utf8view = false;
    options.execution.enable_ansi_mode = true;
    options.execution.time_zone = Some(crate::types::UTC.to_owned());
    options.optimizer.prefer_hash_join = hash_joins;
    // Of a filter of which nothing is known: how many rows pass decides which side of a join is held in memory.
    options.optimizer.default_filter_selectivity = 50;
    // What a sort keeps back for merging what it spilled: there may be a dozen sorts in a plan.
    options.execution.sort_spill_reservation_bytes = scratch.limits.memory_bytes / 64;
    config
}

/// The rows with exactly the columns of `schema`, by name: cast without loss, null where a column is missing.
pub fn conform(rows: SendableRecordBatchStream, schema: SchemaRef) -> SendableRecordBatchStream {
    let columns = Arc::clone(&schema);
    let conformed = rows.map(move |batch| Ok(conformed(&batch?, &columns)?));
    Box::pin(RecordBatchStreamAdapter::new(schema, conformed))
}

/// A batch with exactly the columns of `schema`, as [`conform`] makes them.
///
/// # Errors
///
/// If a value cannot become its column's type without loss, or is null where none may be.
pub fn conformed(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
    let count = batch.num_rows();
    let arrays = schema
        .fields()
        .iter()
        .map(|field| {
            let array = match batch.column_by_name(field.name()) {
                Some(array) if array.data_type() == field.data_type() => Arc::clone(array),
                Some(array) => cast_exactly(array, field.data_type()).map_err(|error| {
                    error.while_doing(format!("column `{}` cannot be converted", field.name()))
                })?,
                None => arrow::array::new_null_array(field.data_type(), count),
            };
            if !field.is_nullable() && array.null_count() > 0 {
                return Err(Error::data(format!("column `{}` must not be null", field.name())));
            }
            Ok(array)
        })
        .collect::<Result<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(count));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), arrays, &options)?)
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use datafusion::{
        catalog::streaming::StreamingTable, execution::TaskContext, physical_plan::streaming::PartitionStream,
    };

    use super::*;
    use crate::runtime::Limits;

    /// Rows of which nobody knows how many they are.
    #[derive(Debug)]
    struct Part(Vec<RecordBatch>, SchemaRef);

    impl PartitionStream for Part {
        fn schema(&self) -> &SchemaRef {
            &self.1
        }

        fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
            let rows = futures::stream::iter(self.0.clone().into_iter().map(Ok));
            Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.1), rows))
        }
    }

    #[tokio::test]
    async fn order_is_seen_where_rows_are_passed_on_and_lost_where_they_are_joined_or_grouped() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 16 << 20, spill: folder.path().to_owned() };
        let scratch = Scratch::new(&limits).unwrap();
        let context = for_models(&scratch, DateTime::UNIX_EPOCH, Arc::default());
        context.sql("CREATE TABLE a AS SELECT 1 AS x, 0.5::double AS y").await.unwrap();
        for (sql, order) in [
            ("SELECT x + 1 FROM a WHERE x > 0", Order::Shows),
            ("SELECT x FROM a UNION ALL SELECT count(*) FROM a", Order::Shows),
            ("SELECT x, count(*) FROM a GROUP BY x", Order::Unseen),
            ("SELECT DISTINCT x FROM a UNION ALL SELECT count(*) FROM a", Order::Unseen),
            ("SELECT a.x FROM a JOIN a AS b ON a.x = b.x WHERE b.y > 0", Order::Unseen),
            ("SELECT x, sum(y) FROM a GROUP BY x", Order::Decides),
            ("SELECT x, row_number() OVER () FROM a", Order::Decides),
            ("SELECT x FROM a LIMIT 1", Order::Decides),
        ] {
            let plan = context.sql(sql).await.unwrap().into_unoptimized_plan();
            assert_eq!(order_of(&plan), order, "{sql}");
        }
    }

    /// A row of the first side that meets one in any partition of the other came once, and not as one without too, also where it spills.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_nested_loop_that_spills_has_each_row_once() {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 16 << 20, spill: folder.path().to_owned() };
        let scratch = Scratch::new(&limits).unwrap();
        let context = for_joins(&scratch, DateTime::UNIX_EPOCH, Arc::default(), true, 2);
        let batch = |columns: Vec<(&str, ArrayRef)>| RecordBatch::try_from_iter(columns).unwrap();
        let numbers = |numbers: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(numbers)) };
        let day = |first: i64| {
            let at = (first..first + 1000).map(|row| row % 100).collect();
            let text = StringArray::from_iter_values((0..1000).map(|row| format!("{row:0200}")));
            vec![batch(vec![("at", numbers(at)), ("text", Arc::new(text))])]
        };
        let rates = |lo: i64| vec![batch(vec![("lo", numbers(vec![lo])), ("hi", numbers(vec![lo + 50]))])];
        let table = |partitions: Vec<Vec<RecordBatch>>| {
            let schema = partitions[0][0].schema();
            let parts = partitions.into_iter().map(|rows| Arc::new(Part(rows, Arc::clone(&schema))) as _);
            Arc::new(StreamingTable::try_new(Arc::clone(&schema), parts.collect()).unwrap())
        };
        let days = (0..100).flat_map(|part| day(part * 1000)).collect();
        context.register_table("days", table(vec![days])).unwrap();
        context.register_table("rates", table(vec![rates(0), rates(50)])).unwrap();
        let join = |kind: &str| {
            format!(
                "SELECT count(*) AS n, max(text) AS m FROM days {kind} JOIN rates ON at >= lo AND at < hi"
            )
        };
        for (kind, expected) in
            [("LEFT", 100_000), ("LEFT ANTI", 0), ("LEFT SEMI", 100_000), ("INNER", 100_000)]
        {
            let found = context.sql(&join(kind)).await.unwrap().collect().await.unwrap();
            let found = found[0].column(0).as_any().downcast_ref::<Int64Array>().unwrap().value(0);
            assert_eq!(found, expected, "{kind}");
        }
    }
}
