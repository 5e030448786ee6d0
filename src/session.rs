//! DataFusion sessions, as floodmark sets them up.
//!
//! One partition where the order of rows may decide about values: a run can be compared with another. Where it decides about nothing
//! ([`is_order_free`]), as many as there are cores. Decimal literals, checked arithmetic, UTC. No DDL, no statements, no file functions: models
//! are SELECTs.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::{RecordBatch, RecordBatchOptions},
    datatypes::{Schema, SchemaRef},
};
use chrono::{DateTime, Utc};
use datafusion::{
    catalog::TableProvider,
    common::{DFSchema, tree_node::TreeNodeRecursion},
    error::DataFusionError,
    execution::{SessionStateBuilder, config::SessionConfig},
    logical_expr::{Distinct, Expr, ExprSchemable, LogicalPlan},
    optimizer::{Analyzer, AnalyzerRule},
    physical_plan::{SendableRecordBatchStream, stream::RecordBatchStreamAdapter},
    prelude::SessionContext,
    sql::parser::Statement,
};
use futures::StreamExt;
use indexmap::IndexMap;

use crate::{
    connector::scan::{OpenSources, ScanTable},
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

/// Whether rows that come in another order give the same rows, in whatever order: no row is chosen by its place, and nothing is
/// added up that rounds.
pub fn is_order_free(plan: &LogicalPlan) -> bool {
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
