//! Publishing into PostgreSQL: one transaction for rows, tables and record.
//!
//! Rows are staged by binary COPY into temporary tables, which no other session sees. The commit takes the job's lock, compares
//! the sequence number, locks the outputs against other writers, applies the stages set by set, checks that what changed is what was
//! announced, writes the record, and commits. Whatever fails before that leaves the database as it was. When the answer to
//! the COMMIT is lost, another session waits for the job's lock, which the old one holds as long as it lives, and then reads what is
//! true.
//!
//! Rows that are only added, to a table without unique keys whose columns take them as they are or that is still to be made, are copied straight into it:
//! the transaction that publishes then begins with their COPY, and is their stage. The table is locked as every INSERT locks it, so that others go on
//! reading and writing. The job's lock is not taken before the commit even so: who asks for the state of a job does not wait
//! for what it extracts.

use std::{sync::Arc, time::Duration};

use arrow::{
    array::{ArrayRef, Int64Array, RecordBatch, StringArray},
    datatypes::{DataType, Field, Schema, SchemaRef},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::{SinkExt, StreamExt};
use tokio_postgres::{CopyInSink, types::Type};

use super::{
    Parameter, PostgresConnection, Session,
    bounds::text,
    decode::field,
    encode::{As, HEADER, TRAILER, rows as encoded},
    keys::Keys,
    texts,
    types::{Wire, declaration, spelled, stage_type, wire},
};
use crate::{
    connector::{
        Attempt, CommitOutcome, Current, Held, Load, Staged, Target,
        evolve::evolve,
        quarantined_schema,
        spec::{GONE, Guarantee, Mode, OutputSpec},
    },
    error::{Error, ErrorKind, Result},
    load::{as_announced, changed, overtaken, refuse_keys, reshaped},
    names::{JobId, quoted, quoted_list},
    record::{LoadRecord, columns_of},
    runtime,
};

/// Where the newest records, all records and the set-aside rows are.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS floodmark_state (
        project text NOT NULL, job text NOT NULL, incarnation uuid NOT NULL, seq bigint NOT NULL,
        record_json text NOT NULL, committed_at timestamptz NOT NULL, PRIMARY KEY (project, job));
    CREATE TABLE IF NOT EXISTS floodmark_log (
        project text NOT NULL, job text NOT NULL, incarnation uuid NOT NULL, seq bigint NOT NULL,
        record_json text NOT NULL, PRIMARY KEY (project, job, incarnation, seq));
    CREATE TABLE IF NOT EXISTS floodmark_quarantine (
        project text NOT NULL, job text NOT NULL, seq bigint NOT NULL, run_id uuid NOT NULL, \"on\" text NOT NULL,
        \"check\" text NOT NULL, reason text NOT NULL, position text NOT NULL, \"row\" text NOT NULL);";

/// How rows are published: each statement sees what was committed before it.
const PUBLISHING: &str = "ISOLATION LEVEL READ COMMITTED";

/// How often a stage is published before its run gives up.
const REPEATS: u32 = 3;

/// How long to wait before the second time; four times as long before the third.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// Bytes of a COPY that are sent at once.
const CHUNK: usize = 256 << 10;

#[async_trait]
impl Target for Arc<PostgresConnection> {
    fn guarantee(&self, _: &OutputSpec) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    async fn way(&self, output: &OutputSpec, model: &SchemaRef) -> Result<Option<&'static str>> {
        let session = self.transaction("READ ONLY").await?;
        let current = Table::of(self, &session, &output.name).await?;
        let stage = Stage::new(output, current, Arc::clone(model), String::new())?;
        let is_straight = straight(self, &session, &stage).await?.is_some();
        self.rest(session).await;
        Ok(Some(match (is_straight, output.mode) {
            (true, _) if stage.current.is_none() => "copied into a new table",
            (true, _) => "copied straight into the table",
            (false, Mode::Merge | Mode::History) if !output.rebuild && stage.current.is_some() => {
                "staged, then merged"
            }
            (false, _) => "staged, then inserted",
        }))
    }

    async fn last_record(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        // Each statement sees what was committed before it: also what was committed while it waited for the lock.
        let session = self.transaction("ISOLATION LEVEL READ COMMITTED READ ONLY").await?;
        let last = last_record(self, &session, job).await?;
        self.rest(session).await;
        Ok(last)
    }

    async fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        let session = self.transaction("ISOLATION LEVEL READ COMMITTED READ ONLY").await?;
        let Some(last) = last_record(self, &session, job).await? else {
            self.rest(session).await;
            return Ok(None);
        };
        let sql = format!(
            "SELECT record_json FROM floodmark_log WHERE project = $1 AND job = $2 AND seq = $3 AND incarnation = {}::uuid",
            text(&last.incarnation.to_string())
        );
        let seq = seq.cast_signed();
        let row = session.query_typed_opt(&sql, &numbered(job, &seq)).await;
        let row = row.map_err(|error| self.error("read the log in", &error))?;
        self.rest(session).await;
        row.map(|row| LoadRecord::from_json(row.get(0))).transpose()
    }

    async fn current(&self, _: &JobId, output: &str) -> Result<Option<Current>> {
        let session = self.transaction("READ ONLY").await?;
        let Some(table) = Table::of(self, &session, output).await? else {
            self.rest(session).await;
            return Ok(None);
        };
        let name = table_name(output)?;
        // A large one is counted beside what the run does meanwhile, which is to have the other processors.
        let alone = format!(
            "SELECT set_config('max_parallel_workers_per_gather', '0', true)
             WHERE (SELECT sum(pg_relation_size(relid)) FROM pg_partition_tree({})) > {LARGE_BYTES}",
            text(&name)
        );
        session.batch_execute(&alone).await.map_err(|error| self.error("set up", &error))?;
        let rows = count(self, &session, &format!("SELECT count(*) FROM {name}")).await?;
        self.rest(session).await;
        Ok(Some(Current { schema: table.schema(None), rows }))
    }

    async fn quarantined(&self, job: &JobId) -> Result<SendableRecordBatchStream> {
        let (this, job) = (Self::clone(self), job.clone());
        Ok(runtime::stream(quarantined_schema(), |out| async move {
            let failed = |error: tokio_postgres::Error| this.error("read the quarantine in", &error);
            let session = this.transaction("READ ONLY").await?;
            if last_record(&this, &session, &job).await?.is_none() {
                return Ok(());
            }
            let sql = "SELECT seq, \"on\", \"check\", reason, position, \"row\" FROM floodmark_quarantine
                WHERE project = $1 AND job = $2 ORDER BY seq, ctid";
            let rows = session.query_typed_raw(sql, texts([&job.project, &job.job])).await.map_err(failed)?;
            let mut rows = std::pin::pin!(rows.chunks(runtime::BATCH_ROWS));
            while let Some(rows) = rows.next().await {
                let rows = rows.into_iter().collect::<Result<Vec<_>, _>>().map_err(failed)?;
                let seqs: ArrayRef =
                    Arc::new(rows.iter().map(|row| row.get::<_, i64>(0)).collect::<Int64Array>());
                let texts = (1..=5).map(|index| {
                    let texts: StringArray =
                        rows.iter().map(|row| Some(row.get::<_, String>(index))).collect();
                    Arc::new(texts) as ArrayRef
                });
                let batch =
                    RecordBatch::try_new(quarantined_schema(), [seqs].into_iter().chain(texts).collect())?;
                if !out.send(batch).await {
                    break;
                }
            }
            Ok(())
        }))
    }

    async fn begin(&self, job: &JobId, attempt: &Attempt, _: Option<&LoadRecord>) -> Result<Box<dyn Load>> {
        // A pooler may give the next transaction another session: there one transaction is staged in and published, and what is staged goes with it.
        let publishing = self.is_pooled();
        let session = match publishing {
            true => self.transaction(PUBLISHING).await?,
            false => self.after("set up", &self.settings()?.replace("SET LOCAL", "SET")).await?,
        };
        Ok(Box::new(PostgresLoad {
            connection: Self::clone(self),
            job: job.clone(),
            attempt: attempt.clone(),
            session,
            stages: Vec::new(),
            publishing,
            settled: false,
            quarantined: false,
        }))
    }
}

/// The newest record of a job, after whoever is committing one now has ended.
async fn last_record(
    this: &PostgresConnection,
    session: &Session,
    job: &JobId,
) -> Result<Option<LoadRecord>> {
    let failed = |error: tokio_postgres::Error| this.error("read the state in", &error);
    let lock = format!("SELECT pg_advisory_xact_lock_shared({LOCK_KEY})");
    session.query_typed_one(&lock, &texts([&lock_name(job)])).await.map_err(failed)?;
    // A statement of its own: one that waited for the lock looks names up as they were before.
    let there = "SELECT to_regclass('floodmark_state') IS NOT NULL";
    if !session.query_typed_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
        return Ok(None);
    }
    let sql = "SELECT record_json FROM floodmark_state WHERE project = $1 AND job = $2";
    let row = session.query_typed_opt(sql, &texts([&job.project, &job.job])).await.map_err(failed)?;
    row.map(|row| LoadRecord::from_json(row.get(0))).transpose()
}

/// Bytes of a table that is counted within a tenth of a second, by several processes.
const LARGE_BYTES: u64 = 128 << 20;

/// The number under which a job's commits wait for each other: of the job, and of the schema that its state is in.
const LOCK_KEY: &str = "hashtextextended($1 || '/' || coalesce(current_schema(), ''), 0)";

/// A job and one of its releases, as a statement's parameters.
fn numbered<'a>(job: &'a JobId, seq: &'a i64) -> [Parameter<'a>; 3] {
    let [project, job] = texts([&job.project, &job.job]);
    [project, job, (seq, Type::INT8)]
}

fn lock_name(job: &JobId) -> String {
    format!("floodmark/{job}")
}

/// An output's name as SQL takes it: `finance.journal` is the table `journal` of the schema `finance`.
fn table_name(output: &str) -> Result<String> {
    match output.split_once('.') {
        Some((schema, table)) => Ok(format!("{}.{}", quoted(schema)?, quoted(table)?)),
        None => quoted(output),
    }
}

/// The name of another table in the schema of an output.
fn beside(output: &str, table: &str) -> Result<String> {
    match output.split_once('.') {
        Some((schema, _)) => table_name(&format!("{schema}.{table}")),
        None => table_name(table),
    }
}

async fn count(this: &PostgresConnection, session: &Session, sql: &str) -> Result<u64> {
    let row = session.query_typed_one(sql, &[]).await.map_err(|error| this.error("count in", &error))?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or_default())
}

/// A table of the target as it is.
#[derive(Debug, Clone, PartialEq)]
struct Table {
    columns: Vec<TableColumn>,
    /// Whether COPY does what INSERT does: a view, a rule or a policy on rows would make a difference.
    takes_copies: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct TableColumn {
    name: String,
    /// As the catalog spells it.
    type_name: String,
    /// What we read of it.
    field: Field,
    /// Whether it holds numbers without a declared shape.
    unshaped: bool,
    /// Whether its values are compared with those of rows that others are writing, or COPY would put in what INSERT refuses.
    is_guarded: bool,
}

impl Table {
    async fn of(this: &PostgresConnection, session: &Session, output: &str) -> Result<Option<Self>> {
        let failed = |error: tokio_postgres::Error| this.error("look into the catalog of", &error);
        let name = table_name(output)?;
        let sql = "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attgenerated <> '',
                c.relkind IN ('r', 'p') AND NOT c.relhasrules AND NOT row_security_active(c.oid),
                a.attidentity = 'a' OR EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)
                    AND (i.indexprs IS NOT NULL OR a.attnum = ANY (i.indkey)))
            FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
            WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
        let rows = session.query_typed(sql, &texts([&name])).await.map_err(failed)?;
        let Some(takes_copies) = rows.first().map(|row| row.get(3)) else { return Ok(None) };
        // Columns that the server computes are nobody's to write.
        let rows: Vec<_> = rows.into_iter().filter(|row| !row.get::<_, bool>(2)).collect();
        let list = quoted_list(rows.iter().map(|row| row.get::<_, &str>(0)))?;
        let statement = session.prepare(&format!("SELECT {list} FROM {name}")).await.map_err(failed)?;
        let columns = rows
            .iter()
            .zip(statement.columns())
            .map(|(row, column)| {
                let name: String = row.get(0);
                let (read, type_name) =
                    wire(column.type_(), column.type_modifier(), 2).unwrap_or((Wire::Text, None));
                TableColumn {
                    field: field(&name, &read, type_name.as_ref()),
                    unshaped: read == Wire::NumericText,
                    type_name: row.get(1),
                    is_guarded: row.get(4),
                    name,
                }
            })
            .collect();
        Ok(Some(Self { columns, takes_copies }))
    }

    fn column(&self, name: &str) -> Option<&TableColumn> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// The columns, as `model` sees them: a whole number of another width and a number without a shape take what the
    /// model has, and the server refuses a value that does not fit.
    fn schema(&self, model: Option<&Schema>) -> SchemaRef {
        let fields = self.columns.iter().map(|column| {
            let new = model.and_then(|model| model.field_with_name(&column.name).ok());
            let same = |new: &&Field| {
                let (old, new) = (column.field.data_type(), new.data_type());
                old.is_integer() && new.is_integer()
                    || column.unshaped && (new.is_integer() || new.is_decimal())
            };
            match new.filter(same) {
                Some(new) => Field::new(&column.name, new.data_type().clone(), true),
                None => column.field.clone(),
            }
        });
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }
}

/// One staged output.
#[derive(Debug, Clone)]
struct Stage {
    output: OutputSpec,
    /// The table that holds the rows: a temporary one, or what the output will be.
    table: String,
    /// Whether the rows are in the output already.
    is_straight: bool,
    /// Whether it was said what it would change, before it was applied.
    is_announced: bool,
    /// The columns of the model.
    model: SchemaRef,
    /// The output as it was.
    current: Option<Table>,
    /// The columns that the output will have.
    schema: SchemaRef,
    /// What was announced.
    staged: Staged,
}

impl Stage {
    /// A stage of rows of `model` in `table`, for an output that is `current`.
    ///
    /// # Errors
    ///
    /// If the output's contract refuses the columns, or PostgreSQL cannot hold them.
    fn new(output: &OutputSpec, current: Option<Table>, model: SchemaRef, table: String) -> Result<Self> {
        let schema = match &current {
            Some(current) => evolve(output, &current.schema(Some(&model)), &model)?,
            None => {
                for field in model.fields() {
                    declaration(field)?;
                }
                Arc::clone(&model)
            }
        };
        let (output, staged) = (output.clone(), Staged::default());
        Ok(Self { output, table, is_straight: false, is_announced: false, model, current, schema, staged })
    }

    /// How rows are written straight into the output, if nothing but their coming there is to be done.
    fn straight(&self) -> Option<Vec<As>> {
        let output = &self.output;
        let is_added = match &self.current {
            None => !output.marked,
            Some(current) => {
                let widened = self.schema.fields().iter().any(|field| self.kept_as(field.name()).is_none());
                // Nobody is to wait for the end of an extract, to know whether a key of ours is there.
                let mut written = self.model.fields().iter().filter_map(|field| current.column(field.name()));
                let waits = written.any(|column| column.is_guarded);
                output.mode == Mode::Append && !output.rebuild && current.takes_copies && !widened && !waits
            }
        };
        let written = |field: &Arc<Field>| match self.kept_as(field.name()) {
            Some(kept) => As::of(field, kept),
            None => As::of(field, spelled(&declaration(field).ok()?)),
        };
        if is_added { self.model.fields().iter().map(written).collect() } else { None }
    }

    /// Whether its rows are merged into a table that is there and stays as it is.
    fn is_merged_as_it_is(&self) -> bool {
        let stays = |field: &Arc<Field>| self.kept_as(field.name()).is_some();
        self.output.mode == Mode::Merge && !self.output.rebuild && self.schema.fields().iter().all(stays)
    }

    /// What a column is in the output, as the catalog spells it; `None` if it is still to be made.
    fn kept_as(&self, column: &str) -> Option<&str> {
        let current = self.current.as_ref()?.column(column)?;
        let widened = self
            .schema
            .field_with_name(column)
            .is_ok_and(|new| !new.data_type().equals_datatype(self.seen(current).data_type()));
        (!widened).then_some(current.type_name.as_str())
    }

    fn seen(&self, column: &TableColumn) -> Field {
        let table = Table { columns: vec![column.clone()], takes_copies: false };
        table.schema(Some(&self.model)).field(0).clone()
    }

    /// A column of the stage in the output's own type.
    fn value(&self, column: &str) -> Result<String> {
        let name = quoted(column)?;
        let Ok(field) = self.model.field_with_name(column) else { return Ok("NULL".to_owned()) };
        let staged_as = stage_type(field.data_type());
        let wanted = match self.kept_as(column) {
            Some(kept) => kept.to_owned(),
            None => declaration(self.schema.field_with_name(column).unwrap_or(field))?,
        };
        // Numbers convert by assignment, which refuses what does not fit.
        let number = field.data_type().is_integer() || field.data_type().is_decimal();
        Ok(if wanted == "xid8" {
            // Which no number becomes by itself.
            format!("s.{name}::text::xid8")
        } else if staged_as == wanted || number || spelled(&wanted) == staged_as {
            format!("s.{name}")
        } else {
            format!("s.{name}::{wanted}")
        })
    }

    /// Whether keys that differ while they pass differ in the stage as the server compares them there: without a cast.
    fn keys_tell(&self) -> Result<bool> {
        let mut tell = true;
        for column in &self.output.key {
            let may_tell =
                self.model.field_with_name(column).is_ok_and(|field| Keys::may_tell(field.data_type()));
            tell &= may_tell && self.value(column)? == format!("s.{}", quoted(column)?);
        }
        Ok(tell)
    }

    /// A condition that holds where a column of the output's row `t` differs from a value.
    fn differs(&self, column: &str, value: &str) -> Result<String> {
        let name = quoted(column)?;
        if self.current.as_ref().is_none_or(|current| current.column(column).is_none()) {
            // A column that is still to be added is null in every row that is there.
            return Ok(format!("{value} IS NOT NULL"));
        }
        let compares = match self.model.field_with_name(column).map(Field::data_type) {
            Ok(DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => false,
            Ok(of) => !of.is_nested(),
            Err(_) => false,
        };
        Ok(if compares {
            format!("t.{name} IS DISTINCT FROM {value}")
        } else {
            format!("t.{name}::text COLLATE \"C\" IS DISTINCT FROM ({value})::text COLLATE \"C\"")
        })
    }

    fn matches(&self) -> Result<String> {
        let parts = self
            .output
            .key
            .iter()
            .map(|column| Ok(format!("t.{} = {}", quoted(column)?, self.value(column)?)));
        Ok(parts.collect::<Result<Vec<_>>>()?.join(" AND "))
    }

    /// The columns that a match may change.
    fn updatable(&self) -> impl Iterator<Item = &String> {
        let output = &self.output;
        self.model.fields().iter().map(|field| field.name()).filter(|column| {
            !output.key.contains(column) && (output.update.is_empty() || output.update.contains(column))
        })
    }

    /// A condition that holds where a match with the stage's row `s` changes something; `None` if nothing may change.
    fn changes(&self) -> Result<Option<String>> {
        let parts = self.updatable().map(|column| self.differs(column, &self.value(column)?));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        Ok((!parts.is_empty()).then(|| parts.join(" OR ")))
    }

    /// What is done where `INSERT` finds the key, whose row is `excluded` then.
    fn on_conflict(&self) -> Result<String> {
        let (mut set, mut changes) = (Vec::new(), Vec::new());
        for column in self.updatable() {
            let value = format!("excluded.{}", quoted(column)?);
            set.push(format!("{} = {value}", quoted(column)?));
            changes.push(self.differs(column, &value)?);
        }
        Ok(match set.is_empty() {
            true => "NOTHING".to_owned(),
            false => format!("UPDATE SET {} WHERE {}", set.join(", "), changes.join(" OR ")),
        })
    }

    /// A condition on the output's row `t`: its range is one of this run's.
    fn in_ranges(&self) -> Result<String> {
        let parts =
            self.output.range.iter().map(|column| {
                Ok(format!("t.{} IS NOT DISTINCT FROM {}", quoted(column)?, self.value(column)?))
            });
        let same = parts.collect::<Result<Vec<_>>>()?.join(" AND ");
        let mut condition = format!("EXISTS (SELECT 1 FROM {} AS s WHERE {same})", self.table);
        if let Some(column) = self.output.range.first().filter(|_| !self.output.named_ranges.is_empty()) {
            let values: Vec<String> = self.output.named_ranges.iter().map(|value| text(value)).collect();
            condition = format!("({condition} OR t.{}::text IN ({}))", quoted(column)?, values.join(", "));
        }
        Ok(condition)
    }
}

struct PostgresLoad {
    connection: Arc<PostgresConnection>,
    job: JobId,
    attempt: Attempt,
    session: Session,
    stages: Vec<Stage>,
    /// Whether the transaction that publishes has begun: with rows that were copied straight into an output, or from the first moment on.
    publishing: bool,
    /// Whether it has gone as far as the record: all stages are applied.
    settled: bool,
    quarantined: bool,
}

impl PostgresLoad {
    /// Where the rows that checks refuse wait.
    fn quarantine_table(&self) -> String {
        format!("fm_quarantine_{}", self.attempt.id.simple())
    }

    /// Writes rows into a temporary table.
    async fn fill(&self, output: &str, table: &str, rows: SendableRecordBatchStream) -> Result<u64> {
        let failed = |error: tokio_postgres::Error| self.connection.error("stage in", &error);
        let schema = rows.schema();
        let columns = schema
            .fields()
            .iter()
            .map(|field| Ok(format!("{} {}", quoted(field.name())?, stage_type(field.data_type()))))
            .collect::<Result<Vec<_>>>()?;
        // A session that is somebody else's after this transaction is not to keep it.
        let end = if self.publishing { "ON COMMIT DROP" } else { "" };
        let create = format!("CREATE TEMP TABLE {table} ({}) {end}", columns.join(", "));
        self.session.batch_execute(&create).await.map_err(failed)?;
        let written = vec![As::Staged; columns.len()];
        self.copy(output, table, &written, rows).await
    }

    /// Copies rows straight into an output, inside the transaction that publishes: this begins it.
    async fn fill_output(
        &mut self,
        stage: &Stage,
        written: &[As],
        rows: SendableRecordBatchStream,
    ) -> Result<Staged> {
        let (this, session, output) = (&self.connection, &self.session, &stage.output);
        let failed = |error: tokio_postgres::Error| this.error("stage in", &error);
        let execute = async |sql: &str| session.batch_execute(sql).await.map_err(failed);
        if !self.publishing {
            execute(&format!("BEGIN {PUBLISHING}; {}", this.settings()?)).await?;
            self.publishing = true;
        }
        let into = match &stage.current {
            None => {
                create(this, session, stage, &stage.table).await?;
                stage.table.clone()
            }
            Some(current) => {
                let name = table_name(&output.name)?;
                execute(&format!("LOCK TABLE {name} IN ROW EXCLUSIVE MODE")).await?;
                if Table::of(this, session, &output.name).await?.as_ref() != Some(current) {
                    return Err(reshaped(output));
                }
                name
            }
        };
        let columns = quoted_list(stage.model.fields().iter().map(|field| field.name().as_str()))?;
        let inserted = self.copy(&output.name, &format!("{into} ({columns})"), written, rows).await?;
        if stage.current.is_none() && output.mode == Mode::Merge {
            refuse_staged_keys(this, session, stage).await?;
        }
        let rows_before = match &stage.current {
            None => 0,
            Some(_) => match self.attempt.held.of(&output.name).await {
                Some(held) => held,
                None => {
                    let held = count(this, session, &format!("SELECT count(*) FROM {into}")).await?;
                    held.checked_sub(inserted).ok_or_else(|| changed(output))?
                }
            },
        };
        let rows_after = rows_before + inserted;
        Ok(Staged { rows: inserted, inserted, rows_before, rows_after, ..Staged::default() })
    }

    /// Sends rows by COPY, each column as `written` says.
    async fn copy(
        &self,
        output: &str,
        into: &str,
        written: &[As],
        mut rows: SendableRecordBatchStream,
    ) -> Result<u64> {
        let failed = |error: tokio_postgres::Error| self.connection.error("stage in", &error);
        let copy = format!("COPY {into} FROM STDIN (FORMAT binary)");
        let sink: CopyInSink<Bytes> = self.session.copy_in(copy.as_str()).await.map_err(failed)?;
        let mut sink = std::pin::pin!(sink);
        let mut frame = BytesMut::with_capacity(CHUNK * 2);
        frame.extend_from_slice(HEADER);
        let mut count = 0;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            // Row by row of the batch, so that a wide one is not held twice.
            let step = (CHUNK * batch.num_rows() / batch.get_array_memory_size().max(1)).max(1);
            for start in (0..batch.num_rows()).step_by(step) {
                let part = batch.slice(start, step.min(batch.num_rows() - start));
                encoded(output, &part, written, count + 1, &mut frame)?;
                count += part.num_rows() as u64;
                if frame.len() >= CHUNK {
                    sink.send(frame.split().freeze()).await.map_err(failed)?;
                    self.connection.heard();
                }
            }
        }
        frame.extend_from_slice(TRAILER);
        sink.send(frame.freeze()).await.map_err(failed)?;
        let copied = sink.finish().await.map_err(failed)?;
        if copied != count {
            return Err(Error::failed(format!(
                "output `{output}`: {count} rows were sent, and the server has {copied}"
            )));
        }
        Ok(count)
    }
}

#[async_trait]
impl Load for PostgresLoad {
    async fn stage(&mut self, output: &OutputSpec, rows: SendableRecordBatchStream) -> Result<Staged> {
        let model = output.own(&rows.schema());
        let current = Table::of(&self.connection, &self.session, &output.name).await?;
        // Its name is this attempt's own: whatever session it is looked for in, nobody else's rows are found.
        let table = format!("fm_stage_{}_{}", self.attempt.id.simple(), self.stages.len());
        let mut stage = Stage::new(output, current, model, table)?;
        stage.staged = match straight(&self.connection, &self.session, &stage).await? {
            Some(written) => {
                stage.is_straight = true;
                if stage.current.is_none() {
                    // Another run's first release may be under way: neither waits for the other before it publishes.
                    let new = format!("fm_new_{}_{}", self.attempt.id.simple(), self.stages.len());
                    stage.table = beside(&stage.output.name, &new)?;
                }
                self.fill_output(&stage, &written, rows).await?
            }
            None => {
                let is_merged = output.mode == Mode::Merge;
                let (rows, keys) = if is_merged && stage.keys_tell()? {
                    let (keys, rows) = Keys::of(&output.key, rows);
                    (rows, Some(keys))
                } else {
                    (rows, None)
                };
                stage.staged.rows = self.fill(&stage.output.name, &stage.table, rows).await?;
                self.attempt.held.want();
                let keys_may_be_wrong = is_merged && !keys.is_some_and(|keys| keys.are_different());
                // With the last output the release can be published: what changes shows as it is done.
                if self.stages.len() + 1 == self.attempt.outputs
                    && stage.is_merged_as_it_is()
                    && has_key(&self.connection, &self.session, &stage).await?
                {
                    if keys_may_be_wrong {
                        refuse_staged_keys(&self.connection, &self.session, &stage).await?;
                    }
                    fits(&self.connection, &self.session, &stage).await?;
                    self.stages.push(stage);
                    // One whose columns change could not be counted any more.
                    for stage in self.stages.iter().filter(|stage| !stage.is_merged_as_it_is()) {
                        self.attempt.held.of(&stage.output.name).await;
                    }
                    self.settle_stages().await?;
                    return Ok(self.stages.last().map(|stage| stage.staged.clone()).unwrap_or_default());
                }
                // What is joined is planned by what is there.
                let analyze = format!("ANALYZE {}", stage.table);
                let analyzed = self.session.batch_execute(&analyze).await;
                analyzed.map_err(|error| self.connection.error("stage in", &error))?;
                if keys_may_be_wrong {
                    refuse_staged_keys(&self.connection, &self.session, &stage).await?;
                }
                // Others may write there meanwhile: what is counted is counted at one moment.
                let moment = async |sql: &str| {
                    let done = self.session.batch_execute(sql).await;
                    done.map_err(|error| self.connection.error("compare with", &error))
                };
                if !self.publishing {
                    moment("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
                }
                let staged = announce(&self.connection, &self.session, &stage).await?;
                if !self.publishing {
                    moment("END").await?;
                }
                stage.is_announced = true;
                staged
            }
        };
        let staged = stage.staged.clone();
        self.stages.push(stage);
        Ok(staged)
    }

    async fn quarantine(&mut self, rows: SendableRecordBatchStream) -> Result<u64> {
        self.quarantined = true;
        self.fill("quarantine", &self.quarantine_table(), rows).await
    }

    async fn commit(mut self: Box<Self>, record: &LoadRecord) -> CommitOutcome {
        if !self.settled
            && let Err(error) = self.settle_stages().await
        {
            return CommitOutcome::Rejected(error);
        }
        if let Err(error) = self.write_record(record).await {
            return CommitOutcome::Rejected(error);
        }
        let (this, session) = (&self.connection, &self.session);
        match session.batch_execute("COMMIT").await {
            Ok(()) => CommitOutcome::Committed(None),
            // The server's own word on this transaction. One on the connection may be a pooler's, and come after the commit.
            Err(error) if error.code().is_some_and(|code| !is_about_the_connection(code.code())) => {
                CommitOutcome::Rejected(this.error("commit to", &error))
            }
            Err(error) => self.settle(this.error("commit to", &error)).await,
        }
    }

    async fn discard(self: Box<Self>) -> Result<()> {
        // Temporary tables go with the session.
        Ok(())
    }
}

/// Classes of SQLSTATE that say nothing about the transaction: connection exceptions, operator intervention, system errors.
fn is_about_the_connection(code: &str) -> bool {
    ["08", "57", "58", "XX"].iter().any(|class| code.starts_with(class))
}

impl PostgresLoad {
    /// The answer to the COMMIT was lost: what is true is in the target, once the job's lock is free.
    async fn settle(&self, lost: Error) -> CommitOutcome {
        for attempt in 0..5_u32 {
            runtime::sleep(Duration::from_millis(200 * u64::from(attempt))).await;
            match self.connection.record_at(&self.job, self.attempt.seq).await {
                Ok(Some(record)) if record.attempt_id == self.attempt.id => {
                    return CommitOutcome::Committed(None);
                }
                Ok(_) => return CommitOutcome::Rejected(lost.with_kind(ErrorKind::Temporary)),
                Err(_) => {}
            }
        }
        CommitOutcome::Unknown(lost)
    }

    /// Begins to publish: takes the job's lock, and applies all stages. Tries again what may pass.
    async fn settle_stages(&mut self) -> Result<()> {
        let (mut pause, mut left) = (FIRST_PAUSE, REPEATS);
        while let Err(error) = self.publish_stages().await {
            // The transaction never heard COMMIT: it ends here, or with the session. Its stage outlives it: who lost a deadlock, or
            // waited for a lock in vain, publishes it once more; what went straight into an output is gone with it.
            // What we refuse ourselves leaves the transaction as it was, and would be refused again.
            left -= 1;
            let broken = self.session.batch_execute("SELECT").await.is_err();
            let stands = left > 0 && !self.publishing && broken && error.kind() == ErrorKind::Temporary;
            if !(stands && self.session.batch_execute("ROLLBACK").await.is_ok()) {
                return Err(error);
            }
            runtime::sleep(runtime::jittered(pause)).await;
            pause *= 4;
        }
        self.settled = true;
        Ok(())
    }

    async fn publish_stages(&mut self) -> Result<()> {
        let (this, session, job) = (&self.connection, &self.session, &self.job);
        let failed = |error: tokio_postgres::Error| this.error("publish into", &error);
        let begin = if self.publishing { String::new() } else { format!("BEGIN {PUBLISHING};") };
        session.batch_execute(&format!("{begin} {}", this.settings()?)).await.map_err(failed)?;
        let lock = format!("SELECT pg_advisory_xact_lock({LOCK_KEY})");
        session.query_typed_one(&lock, &texts([&lock_name(job)])).await.map_err(failed)?;
        let there = "SELECT num_nulls(to_regclass('floodmark_state'), to_regclass('floodmark_log'), to_regclass('floodmark_quarantine')) = 0";
        if !session.query_typed_one(there, &[]).await.map_err(failed)?.get::<_, bool>(0) {
            // Two jobs' first commits must not make the same tables at once.
            let tables = JobId { project: String::new(), job: "tables".to_owned() };
            session.query_typed_one(&lock, &texts([&lock_name(&tables)])).await.map_err(failed)?;
            session.batch_execute(TABLES).await.map_err(failed)?;
        }
        let last = last_record(this, session, job).await?;
        let next = last.as_ref().map_or(1, |last| last.seq + 1);
        if next != self.attempt.seq
            || last.as_ref().is_some_and(|last| last.incarnation != self.attempt.incarnation)
        {
            return Err(overtaken(job));
        }
        for stage in &mut self.stages {
            apply(this, session, stage, &self.attempt.held).await?;
        }
        Ok(())
    }

    /// Everything of the commit that is left but its last word.
    async fn write_record(&self, record: &LoadRecord) -> Result<()> {
        let (this, session, job) = (&self.connection, &self.session, &self.job);
        let failed = |error: tokio_postgres::Error| this.error("publish into", &error);
        let mut record = record.clone();
        for stage in &self.stages {
            if let Some(output) = record.outputs.get_mut(&stage.output.name) {
                output.columns = columns_of(&stage.schema);
            }
        }
        let seq = i64::try_from(self.attempt.seq).unwrap_or(i64::MAX);
        if self.quarantined {
            let sql = format!(
                "INSERT INTO floodmark_quarantine SELECT $1, $2, $3, {}::uuid, \"on\", \"check\", reason, position, \"row\" FROM {}",
                text(&record.run_id.to_string()),
                self.quarantine_table()
            );
            session.execute_typed(&sql, &numbered(job, &seq)).await.map_err(failed)?;
        }
        let json = record.to_json();
        let incarnation = text(&record.incarnation.to_string());
        let [project, name, number] = numbered(job, &seq);
        let written = [project, name, number, (&json, Type::TEXT)];
        let log = format!("INSERT INTO floodmark_log VALUES ($1, $2, {incarnation}::uuid, $3, $4)");
        session.execute_typed(&log, &written).await.map_err(failed)?;
        let state = format!(
            "INSERT INTO floodmark_state VALUES ($1, $2, {incarnation}::uuid, $3, $4, {}::timestamptz)
             ON CONFLICT (project, job) DO UPDATE SET incarnation = excluded.incarnation, seq = excluded.seq,
                 record_json = excluded.record_json, committed_at = excluded.committed_at
             WHERE floodmark_state.seq = excluded.seq - 1",
            text(&record.committed_at)
        );
        let changed = session.execute_typed(&state, &written).await.map_err(failed)?;
        if changed != 1 {
            return Err(overtaken(job));
        }
        this.take_over(session).await.map_err(failed)
    }
}

/// How rows are written straight into an output, if they can be.
async fn straight(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<Option<Vec<As>>> {
    // A schema is made where it is published: two runs would wait for each other.
    if let (None, Some((schema, _))) = (&stage.current, stage.output.name.split_once('.'))
        && !has_schema(this, session, schema).await?
    {
        return Ok(None);
    }
    Ok(stage.straight())
}

/// What a commit would change, as the database is now.
async fn announce(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<Staged> {
    let (table, staged_rows) = (&stage.table, stage.staged.rows);
    let output = &stage.output;
    let counted = async |sql: String| count(this, session, &sql).await;
    fits(this, session, stage).await?;
    let stays = output.and_stays();
    let staying = counted(format!("SELECT count(*) FROM {table} AS s WHERE true{stays}")).await?;
    if stage.current.is_none() {
        return Ok(Staged { rows: staged_rows, inserted: staying, rows_after: staying, ..Staged::default() });
    }
    let name = table_name(&output.name)?;
    let before = counted(format!("SELECT count(*) FROM {name}")).await?;
    let mut staged = Staged { rows: staged_rows, rows_before: before, ..Staged::default() };
    match output.mode {
        Mode::Append if !output.rebuild => staged.inserted = staged_rows,
        Mode::ReplaceRange if !output.rebuild => {
            staged.deleted =
                counted(format!("SELECT count(*) FROM {name} AS t WHERE {}", stage.in_ranges()?)).await?;
            staged.inserted = staged_rows;
        }
        Mode::Merge if !output.rebuild => {
            let on = stage.matches()?;
            let changed = stage.changes()?.unwrap_or_else(|| "false".to_owned());
            let sql = format!(
                "SELECT count(*) FILTER (WHERE true{stays}), count(*) FILTER (WHERE ({changed}){stays}), count(*)
                     FROM {table} AS s JOIN {name} AS t ON {on}"
            );
            let row = session
                .query_typed_one(&sql, &[])
                .await
                .map_err(|error| this.error("compare with", &error))?;
            let number = |index: usize| u64::try_from(row.get::<_, i64>(index)).unwrap_or_default();
            let matched = number(0);
            staged.updated = number(1);
            staged.unchanged = matched - staged.updated;
            staged.deleted = number(2) - matched;
            staged.inserted = staying.checked_sub(matched).ok_or_else(|| {
                Error::failed(format!("output `{}` holds the same key more than once", output.name))
                    .hint("Load it anew with `--full-refresh`.")
            })?;
        }
        _ => (staged.deleted, staged.inserted) = (before, staying),
    }
    let after = (before + staged.inserted).checked_sub(staged.deleted);
    staged.rows_after = after.ok_or_else(|| changed(output))?;
    Ok(staged)
}

/// Refuses keys that are null or come twice, as the output's own types have them.
async fn refuse_staged_keys(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<()> {
    let (output, table) = (&stage.output, &stage.table);
    let value = |column: &String| match stage.is_straight {
        true => quoted(column),
        false => stage.value(column),
    };
    let key = output.key.iter().map(value).collect::<Result<Vec<_>>>()?;
    let names = (0..key.len()).map(|at| format!("k{at}")).collect::<Vec<_>>();
    let values = key.iter().zip(&names).map(|(value, name)| format!("{value} AS {name}")).collect::<Vec<_>>();
    let nulls = names.iter().map(|name| format!("{name} IS NULL")).collect::<Vec<_>>();
    let sql = format!(
        "SELECT coalesce(sum(n) FILTER (WHERE {}), 0)::bigint, count(*) FILTER (WHERE n > 1)
             FROM (SELECT {}, count(*) AS n FROM {table} AS s GROUP BY {}) AS k",
        nulls.join(" OR "),
        values.join(", "),
        (1..=key.len()).map(|at| at.to_string()).collect::<Vec<_>>().join(", "),
    );
    let row = session.query_typed_one(&sql, &[]).await.map_err(|error| this.error("count in", &error))?;
    let number = |index: usize| u64::try_from(row.get::<_, i64>(index)).unwrap_or_default();
    refuse_keys(output, number(0), number(1))
}

/// Refuses values that the output's own type would cut or round: a cast does that without a word.
async fn fits(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<()> {
    for field in stage.model.fields() {
        let Some(kept) = stage.kept_as(field.name()) else { continue };
        let cuts = ["character", "bit", "numeric(", "timestamp(", "time(", "interval(", "interval ", "real"];
        let staged_as = stage_type(field.data_type());
        if kept == staged_as || !cuts.iter().any(|cut| kept.starts_with(cut)) {
            continue;
        }
        let name = quoted(field.name())?;
        let (before, after) = if let Some((of, shape)) = kept.split_once('(').filter(|_| kept.ends_with("[]"))
        {
            // Two arrays, of which one has no shape: their text may be spelled in two ways.
            let bare = format!("{of}{}", shape.split_once(')').map_or("[]", |(_, behind)| behind));
            (format!("{name}::{bare}"), format!("{name}::{kept}::{bare}"))
        // Blanks behind a `character` are not part of its value.
        } else if kept.starts_with("character(") {
            (format!("rtrim({name}, ' ')"), format!("rtrim({name}::{kept}::{staged_as}, ' ')"))
        } else {
            (name.clone(), format!("{name}::{kept}::{staged_as}"))
        };
        let sql = format!("SELECT count(*) FROM {} WHERE {before} IS DISTINCT FROM {after}", stage.table);
        let cut = count(this, session, &sql).await?;
        if cut > 0 {
            let values = if cut == 1 { "value does" } else { "values do" };
            return Err(Error::data(format!(
                "output `{}`: {cut} {values} not fit `{}`, which is {kept}",
                stage.output.name,
                field.name()
            ))
            .hint("Widen the column there, or cut the values in the model."));
        }
    }
    Ok(())
}

/// Makes a table with the columns that an output will have, and the output's schema. Its key is still to be declared.
async fn create(this: &PostgresConnection, session: &Session, stage: &Stage, name: &str) -> Result<()> {
    let output = &stage.output;
    let failed =
        |error: tokio_postgres::Error| this.error(&format!("write output `{}` to", output.name), &error);
    if let Some((schema, _)) = output.name.split_once('.')
        && !has_schema(this, session, schema).await?
    {
        let create = format!("CREATE SCHEMA IF NOT EXISTS {}", quoted(schema)?);
        session.batch_execute(&create).await.map_err(failed)?;
    }
    let columns = stage.schema.fields().iter();
    let columns = columns.map(|field| Ok(format!("{} {}", quoted(field.name())?, declaration(field)?)));
    let columns = columns.collect::<Result<Vec<_>>>()?.join(", ");
    session.batch_execute(&format!("CREATE TABLE {name} ({columns})")).await.map_err(failed)
}

async fn has_schema(this: &PostgresConnection, session: &Session, schema: &str) -> Result<bool> {
    let sql = "SELECT to_regnamespace(quote_ident($1)) IS NOT NULL";
    let row = session.query_typed_one(sql, &texts([&schema])).await;
    row.map(|row| row.get(0)).map_err(|error| this.error("look into the catalog of", &error))
}

/// Gives the table that an output will be its name and its key.
async fn settle_in(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<()> {
    let output = &stage.output;
    if Table::of(this, session, &output.name).await?.is_some() {
        return Err(reshaped(output));
    }
    let table = output.name.split_once('.').map_or(output.name.as_str(), |(_, table)| table);
    let rename = format!("ALTER TABLE {} RENAME TO {}", stage.table, quoted(table)?);
    let doing = format!("write output `{}` to", output.name);
    session.batch_execute(&rename).await.map_err(|error| this.error(&doing, &error))?;
    declare_key(this, session, output).await
}

/// Declares the key of a table that is new, over the rows that are there: sorted once, instead of one by one.
async fn declare_key(this: &PostgresConnection, session: &Session, output: &OutputSpec) -> Result<()> {
    if output.key.is_empty() {
        return Ok(());
    }
    let key = quoted_list(output.key.iter().map(String::as_str))?;
    let declare = format!("ALTER TABLE {} ADD PRIMARY KEY ({key})", table_name(&output.name)?);
    let doing = format!("declare the key of output `{}` in", output.name);
    session.batch_execute(&declare).await.map_err(|error| this.error(&doing, &error))
}

/// Applies one stage, and checks that it changes what was announced.
async fn apply(this: &PostgresConnection, session: &Session, stage: &mut Stage, held: &Held) -> Result<()> {
    let output = &stage.output;
    let failed =
        |error: tokio_postgres::Error| this.error(&format!("write output `{}` to", output.name), &error);
    let execute = async |sql: String| session.batch_execute(&sql).await.map_err(failed);
    let name = table_name(&output.name)?;
    if stage.is_straight {
        return if stage.current.is_none() { settle_in(this, session, stage).await } else { Ok(()) };
    }
    let there = Table::of(this, session, &output.name).await?;
    if there.is_some() {
        // Readers go on; other writers wait, so that what was counted is what is changed.
        execute(format!("LOCK TABLE {name} IN SHARE ROW EXCLUSIVE MODE")).await?;
    }
    let locked = if there.is_some() { Table::of(this, session, &output.name).await? } else { None };
    if locked != stage.current {
        return Err(reshaped(output));
    }
    match locked {
        None => {
            create(this, session, stage, &name).await?;
        }
        Some(current) => {
            for field in stage.schema.fields() {
                let column = quoted(field.name())?;
                if current.column(field.name()).is_none() {
                    execute(format!("ALTER TABLE {name} ADD COLUMN {column} {}", declaration(field)?))
                        .await?;
                } else if stage.kept_as(field.name()).is_none() {
                    execute(format!("ALTER TABLE {name} ALTER COLUMN {column} TYPE {}", declaration(field)?))
                        .await?;
                }
            }
        }
    }
    let columns = quoted_list(stage.model.fields().iter().map(|field| field.name().as_str()))?;
    let values = stage
        .model
        .fields()
        .iter()
        .map(|field| stage.value(field.name()))
        .collect::<Result<Vec<_>>>()?
        .join(", ");
    let (table, stays) = (&stage.table, output.and_stays());
    let run = async |sql: String| session.execute_typed(&sql, &[]).await.map_err(failed);
    let (mut deleted, mut updated) = (0, 0);
    let inserted = match output.mode {
        Mode::Merge if !output.rebuild => {
            let on = stage.matches()?;
            if output.marked {
                let gone = quoted(GONE)?;
                deleted = run(format!("DELETE FROM {name} AS t USING {table} AS s WHERE {on} AND s.{gone}"))
                    .await?;
            }
            let by_key = has_key(this, session, stage).await?;
            if !by_key && !stage.is_announced {
                return Err(reshaped(output));
            }
            if by_key {
                // One look into the index for each row. A row that was there before was locked by us, and says so.
                let key = quoted_list(output.key.iter().map(String::as_str))?;
                let action = stage.on_conflict()?;
                let sql = format!(
                    "WITH done AS (INSERT INTO {name} AS t ({columns}) SELECT {values} FROM {table} AS s WHERE true{stays}
                         ON CONFLICT ({key}) DO {action} RETURNING (t.xmax = 0) AS is_new)
                     SELECT count(*) FILTER (WHERE is_new), count(*) FILTER (WHERE NOT is_new) FROM done"
                );
                let row = session.query_typed_one(&sql, &[]).await.map_err(failed)?;
                let number = |index: usize| u64::try_from(row.get::<_, i64>(index)).unwrap_or_default();
                updated = number(1);
                number(0)
            } else {
                if let Some(changes) = stage.changes()? {
                    let set = stage.updatable();
                    let set = set.map(|column| Ok(format!("{} = {}", quoted(column)?, stage.value(column)?)));
                    let set = set.collect::<Result<Vec<_>>>()?.join(", ");
                    let update = format!("UPDATE {name} AS t SET {set} FROM {table} AS s");
                    updated = run(format!("{update} WHERE {on} AND ({changes}){stays}")).await?;
                }
                run(format!(
                    "INSERT INTO {name} ({columns}) SELECT {values} FROM {table} AS s WHERE NOT EXISTS (SELECT 1 FROM {name} AS t WHERE {on}){stays}"
                ))
                .await?
            }
        }
        mode => {
            if mode == Mode::ReplaceRange && !output.rebuild {
                deleted = run(format!("DELETE FROM {name} AS t WHERE {}", stage.in_ranges()?)).await?;
            } else if mode != Mode::Append || output.rebuild {
                deleted = run(format!("DELETE FROM {name}")).await?;
            }
            run(format!("INSERT INTO {name} ({columns}) SELECT {values} FROM {table} AS s WHERE true{stays}"))
                .await?
        }
    };
    if stage.is_announced {
        as_announced(output, &stage.staged, (inserted, updated, deleted))?;
    } else {
        let rows = stage.staged.rows;
        let staying = match output.marked {
            true => {
                count(this, session, &format!("SELECT count(*) FROM {table} AS s WHERE true{stays}")).await?
            }
            false => rows,
        };
        // Where rows go, what was counted when the run began is too old.
        let held = if output.marked { None } else { held.of(&output.name).await };
        let rows_after = match held {
            Some(held) => held + inserted,
            None => count(this, session, &format!("SELECT count(*) FROM {name}")).await?,
        };
        let rows_before = (rows_after + deleted).checked_sub(inserted).ok_or_else(|| changed(output))?;
        let unchanged = staying.checked_sub(inserted + updated).ok_or_else(|| changed(output))?;
        stage.staged = Staged { rows, inserted, updated, unchanged, deleted, rows_before, rows_after };
    }
    if stage.current.is_none() {
        declare_key(this, session, &stage.output).await?;
    }
    Ok(())
}

/// Whether `INSERT … ON CONFLICT` does to a merge's table what UPDATE and INSERT do: it has one unique index, of exactly the key, and
/// nothing looks at the row that would be inserted before it is known that its key is there.
async fn has_key(this: &PostgresConnection, session: &Session, stage: &Stage) -> Result<bool> {
    if !stage.current.as_ref().is_some_and(|current| current.takes_copies) {
        return Ok(false);
    }
    let mut key = stage.output.key.clone();
    key.sort_unstable();
    // What a match sets, or has already: of other columns the row that is there may know better.
    let set: Vec<&str> = key.iter().chain(stage.updatable()).map(String::as_str).collect();
    let written: Vec<&str> = stage.model.fields().iter().map(|field| field.name().as_str()).collect();
    // A partitioned table does not say which rows are new; nor may children hold the key; a trigger, a check or a default would see rows that are
    // there as new ones.
    let sql = "SELECT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = to_regclass($1) AND c.relkind = 'r' AND NOT c.relhassubclass
            AND (SELECT amname FROM pg_am AS m WHERE m.oid = c.relam) = 'heap'
            AND NOT EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal)
            AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conrelid = c.oid AND k.contype = 'c')
            AND NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                AND (a.attnotnull AND a.attname <> ALL ($3) OR a.atthasdef AND a.attname <> ALL ($4) OR a.attidentity <> ''))
            AND 1 = (SELECT count(*) FROM pg_index AS i WHERE i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion))
            AND EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
                AND i.indpred IS NULL AND i.indexprs IS NULL
                AND $2 = (SELECT array_agg(a.attname::text ORDER BY a.attname::text COLLATE \"C\") FROM pg_attribute AS a
                    WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))))";
    let row = session
        .query_typed_one(
            sql,
            &[
                (&table_name(&stage.output.name)?, Type::TEXT),
                (&key, Type::TEXT_ARRAY),
                (&set, Type::TEXT_ARRAY),
                (&written, Type::TEXT_ARRAY),
            ],
        )
        .await;
    row.map(|row| row.get(0)).map_err(|error| this.error("look into the catalog of", &error))
}
