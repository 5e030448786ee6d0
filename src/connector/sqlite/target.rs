//! Publishing into SQLite: one transaction for rows, tables and record.
//!
//! Rows are staged in temporary tables, which no other connection sees and which take no lock. The commit takes the
//! write lock, compares the sequence number, applies the stages set by set, checks that what changed is what was
//! announced, writes the record, and commits. Whatever fails before that leaves the database as it was.

use std::sync::{Arc, Mutex, PoisonError};

use arrow::{
    array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray},
    datatypes::{
        DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type,
        Int64Type, Schema, SchemaRef, Time64MicrosecondType, TimeUnit, TimestampMicrosecondType, UInt8Type,
        UInt16Type, UInt32Type,
    },
    temporal_conversions::{date32_to_datetime, time64us_to_time, timestamp_us_to_datetime},
};
use async_trait::async_trait;
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;
use rusqlite::{Connection as Sqlite, OptionalExtension, types::Value};

use super::{
    SqliteConnection,
    types::{declaration, declared_type},
};
use crate::{
    connector::{
        Attempt, CommitOutcome, Current, Load, Staged, Target,
        evolve::evolve,
        quarantined_schema,
        spec::{GONE, Guarantee, Mode, OutputSpec},
    },
    error::{Error, Result},
    load::{as_announced, overtaken, refuse_keys, reshaped},
    names::{JobId, quoted, quoted_list},
    record::{LoadRecord, columns_of, schema_of},
    runtime,
};

/// The table of newest records: one row per job.
const STATE: &str = "floodmark_state";
/// The table of all records.
const LOG: &str = "floodmark_log";
/// The table of set-aside rows.
const QUARANTINE: &str = "floodmark_quarantine";

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS floodmark_state (
        project TEXT NOT NULL, job TEXT NOT NULL, incarnation TEXT NOT NULL, seq INTEGER NOT NULL,
        record_json TEXT NOT NULL, committed_at TEXT NOT NULL, PRIMARY KEY (project, job)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS floodmark_log (
        project TEXT NOT NULL, job TEXT NOT NULL, incarnation TEXT NOT NULL, seq INTEGER NOT NULL,
        record_json TEXT NOT NULL, PRIMARY KEY (project, job, incarnation, seq)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS floodmark_quarantine (
        project TEXT NOT NULL, job TEXT NOT NULL, seq INTEGER NOT NULL, run_id TEXT NOT NULL, \"on\" TEXT NOT NULL,
        \"check\" TEXT NOT NULL, reason TEXT NOT NULL, position TEXT NOT NULL, row TEXT NOT NULL
    );";

#[async_trait]
impl Target for Arc<SqliteConnection> {
    fn guarantee(&self, _: &OutputSpec) -> Guarantee {
        Guarantee::ExactlyOnce
    }

    async fn last_record(&self, job: &JobId) -> Result<Option<LoadRecord>> {
        let (this, job) = (Self::clone(self), job.clone());
        runtime::blocking(move || {
            if !this.path.is_file() {
                return Ok(None);
            }
            let database = this.open_to_read()?;
            last_record(&this, &database, &job)
        })
        .await
    }

    async fn record_at(&self, job: &JobId, seq: u64) -> Result<Option<LoadRecord>> {
        let (this, job) = (Self::clone(self), job.clone());
        runtime::blocking(move || {
            if !this.path.is_file() {
                return Ok(None);
            }
            let database = this.open_to_read()?;
            let Some(last) = last_record(&this, &database, &job)? else { return Ok(None) };
            let sql = format!("SELECT record_json FROM {LOG} WHERE project = ?1 AND job = ?2 AND incarnation = ?3 AND seq = ?4");
            let of = rusqlite::params![job.project, job.job, last.incarnation.to_string(), seq.cast_signed()];
            let text: Option<String> = database
                .query_row(&sql, of, |row| row.get(0))
                .optional()
                .map_err(|error| this.error("read the log in", &error))?;
            text.map(|text| LoadRecord::from_json(&text)).transpose()
        })
        .await
    }

    async fn current(&self, job: &JobId, output: &str) -> Result<Option<Current>> {
        let (this, job, output) = (Self::clone(self), job.clone(), output.to_owned());
        runtime::blocking(move || {
            if !this.path.is_file() {
                return Ok(None);
            }
            let database = this.open_to_read()?;
            let Some(schema) = table_schema(&this, &database, &job, &output)? else { return Ok(None) };
            let rows = count(&this, &database, &format!("SELECT count(*) FROM {}", quoted(&output)?))?;
            Ok(Some(Current { schema, rows }))
        })
        .await
    }

    async fn quarantined(&self, job: &JobId) -> Result<SendableRecordBatchStream> {
        let (this, job) = (Self::clone(self), job.clone());
        Ok(runtime::blocking_stream(quarantined_schema(), move |out| {
            if !this.path.is_file() || last_record(&this, &this.open_to_read()?, &job)?.is_none() {
                return Ok(());
            }
            let database = this.open_to_read()?;
            let failed = |error: rusqlite::Error| this.error("read the quarantine in", &error);
            let sql = format!(
                "SELECT seq, \"on\", \"check\", reason, position, row FROM {QUARANTINE} WHERE project = ?1 AND job = ?2 ORDER BY seq, rowid"
            );
            let mut statement = database.prepare(&sql).map_err(failed)?;
            let mut rows = statement.query([&job.project, &job.job]).map_err(failed)?;
            loop {
                let (mut seqs, mut texts): (Vec<i64>, [Vec<String>; 5]) = Default::default();
                while let Some(row) = rows.next().map_err(failed)? {
                    seqs.push(row.get(0).map_err(failed)?);
                    for (index, column) in texts.iter_mut().enumerate() {
                        column.push(row.get(index + 1).map_err(failed)?);
                    }
                    if seqs.len() == runtime::BATCH_ROWS {
                        break;
                    }
                }
                if seqs.is_empty() {
                    return Ok(());
                }
                let seqs: ArrayRef = Arc::new(Int64Array::from(seqs));
                let texts = texts.into_iter().map(|column| Arc::new(StringArray::from(column)) as ArrayRef);
                let batch =
                    RecordBatch::try_new(quarantined_schema(), [seqs].into_iter().chain(texts).collect())?;
                if !out.send(batch) {
                    return Ok(());
                }
            }
        }))
    }

    async fn begin(&self, job: &JobId, attempt: &Attempt, _: Option<&LoadRecord>) -> Result<Box<dyn Load>> {
        let this = Self::clone(self);
        let database = runtime::blocking(move || this.open_to_write()).await?;
        Ok(Box::new(SqliteLoad {
            connection: Self::clone(self),
            job: job.clone(),
            attempt: attempt.clone(),
            database: Arc::new(Mutex::new(database)),
            stages: Vec::new(),
            quarantined: false,
        }))
    }
}

fn last_record(this: &SqliteConnection, database: &Sqlite, job: &JobId) -> Result<Option<LoadRecord>> {
    let failed = |error: rusqlite::Error| this.error("read the state in", &error);
    let known = database
        .query_row("SELECT 1 FROM sqlite_schema WHERE name = ?1", [STATE], |_| Ok(()))
        .optional()
        .map_err(failed)?;
    if known.is_none() {
        return Ok(None);
    }
    let text: Option<String> = database
        .query_row(
            &format!("SELECT record_json FROM {STATE} WHERE project = ?1 AND job = ?2"),
            [&job.project, &job.job],
            |row| row.get(0),
        )
        .optional()
        .map_err(failed)?;
    text.map(|text| LoadRecord::from_json(&text)).transpose()
}

/// The columns of a table: as the job's record knows them, or as they are declared.
fn table_schema(
    this: &SqliteConnection,
    database: &Sqlite,
    job: &JobId,
    table: &str,
) -> Result<Option<SchemaRef>> {
    let failed = |error: rusqlite::Error| this.error("read the tables of", &error);
    let mut statement = database.prepare("SELECT name, type FROM pragma_table_info(?1)").map_err(failed)?;
    let declared: Vec<(String, String)> = statement
        .query_map([table], |row| Ok((row.get(0)?, row.get(1)?)))
        .and_then(Iterator::collect)
        .map_err(failed)?;
    if declared.is_empty() {
        return Ok(None);
    }
    let recorded = last_record(this, database, job)?
        .and_then(|record| record.outputs.get(table).map(|output| output.columns.clone()))
        .filter(|columns| {
            columns.iter().map(|column| &column.name).eq(declared.iter().map(|(name, _)| name))
        });
    if let Some(columns) = recorded {
        return schema_of(&columns).map(Some);
    }
    let fields: Vec<_> = declared
        .iter()
        .map(|(name, declared)| {
            let column = declared_type(declared).unwrap_or(crate::types::ColumnType::String);
            arrow::datatypes::Field::new(name, column.arrow(), true)
        })
        .collect();
    Ok(Some(Arc::new(Schema::new(fields))))
}

fn count(this: &SqliteConnection, database: &Sqlite, sql: &str) -> Result<u64> {
    database
        .query_row(sql, [], |row| row.get::<_, i64>(0))
        .map(|count| u64::try_from(count).unwrap_or_default())
        .map_err(|error| this.error("count in", &error))
}

/// One staged output.
#[derive(Debug, Clone)]
struct Stage {
    output: OutputSpec,
    /// The temporary table.
    table: String,
    /// The columns of the stage.
    columns: Vec<String>,
    /// The columns that the output has, if it is there.
    current: Option<SchemaRef>,
    /// The columns that the output will have.
    schema: SchemaRef,
    /// What was announced.
    staged: Staged,
}

struct SqliteLoad {
    connection: Arc<SqliteConnection>,
    job: JobId,
    attempt: Attempt,
    database: Arc<Mutex<Sqlite>>,
    stages: Vec<Stage>,
    quarantined: bool,
}

impl SqliteLoad {
    /// Works on the database where it may block.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&SqliteConnection, &mut Sqlite) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (connection, database) = (Arc::clone(&self.connection), Arc::clone(&self.database));
        runtime::blocking(move || {
            let mut database = database.lock().unwrap_or_else(PoisonError::into_inner);
            work(&connection, &mut database)
        })
        .await
    }

    /// Writes rows into a temporary table.
    async fn fill(&self, table: &str, mut rows: SendableRecordBatchStream) -> Result<u64> {
        let schema = rows.schema();
        let columns = schema
            .fields()
            .iter()
            .map(|field| {
                Ok(format!("{} {}", quoted(field.name())?, declaration(field.name(), field.data_type())?))
            })
            .collect::<Result<Vec<_>>>()?;
        let create = format!("CREATE TEMP TABLE {table} ({})", columns.join(", "));
        self.with(move |this, database| {
            database.execute_batch(&create).map_err(|error| this.error("stage in", &error))
        })
        .await?;
        let marks = vec!["?"; schema.fields().len()].join(", ");
        let insert = format!("INSERT INTO {table} VALUES ({marks})");
        let mut count = 0;
        while let Some(batch) = rows.next().await {
            let batch = batch?;
            count += batch.num_rows() as u64;
            let insert = insert.clone();
            self.with(move |this, database| {
                let failed = |error: rusqlite::Error| this.error("stage in", &error);
                let transaction = database.transaction().map_err(failed)?;
                {
                    let mut statement = transaction.prepare_cached(&insert).map_err(failed)?;
                    for row in 0..batch.num_rows() {
                        let values = row_values(&batch, row)?;
                        statement.execute(rusqlite::params_from_iter(values)).map_err(failed)?;
                    }
                }
                transaction.commit().map_err(failed)
            })
            .await?;
        }
        Ok(count)
    }
}

#[async_trait]
impl Load for SqliteLoad {
    async fn stage(&mut self, output: &OutputSpec, rows: SendableRecordBatchStream) -> Result<Staged> {
        let model = output.own(&rows.schema());
        let (job, name) = (self.job.clone(), output.name.clone());
        let current = self.with(move |this, database| table_schema(this, database, &job, &name)).await?;
        let schema = match &current {
            Some(current) => evolve(output, current, &model)?,
            None => Arc::clone(&model),
        };
        refuse_retyped(output, current.as_deref(), &schema)?;
        let table = format!("fm_stage_{}", self.stages.len());
        let count = self.fill(&table, rows).await?;
        let columns = model.fields().iter().map(|field| field.name().clone()).collect();
        let stage = Stage {
            output: output.clone(),
            table,
            columns,
            current,
            schema,
            staged: Staged { rows: count, ..Staged::default() },
        };
        let announced = stage.clone();
        let staged = self.with(move |this, database| announce(this, database, &announced)).await?;
        self.stages.push(Stage { staged: staged.clone(), ..stage });
        Ok(staged)
    }

    async fn quarantine(&mut self, rows: SendableRecordBatchStream) -> Result<u64> {
        self.quarantined = true;
        self.fill("fm_quarantine", rows).await
    }

    async fn commit(self: Box<Self>, record: &LoadRecord) -> CommitOutcome {
        let (record, stages, job, quarantined) =
            (record.clone(), self.stages.clone(), self.job.clone(), self.quarantined);
        let seq = self.attempt.seq;
        let outcome = self
            .with(move |this, database| Ok(publish(this, database, &job, seq, record, &stages, quarantined)))
            .await;
        outcome.unwrap_or_else(CommitOutcome::Unknown)
    }

    async fn discard(self: Box<Self>) -> Result<()> {
        // Temporary tables go with the connection.
        Ok(())
    }
}

/// SQLite cannot give a column another type, and what it holds would mean something else under the new one.
fn refuse_retyped(output: &OutputSpec, current: Option<&Schema>, schema: &Schema) -> Result<()> {
    let retyped = schema.fields().iter().find(|field| {
        current
            .and_then(|current| current.field_with_name(field.name()).ok())
            .is_some_and(|old| !old.data_type().equals_datatype(field.data_type()))
    });
    match retyped {
        Some(field) => Err(Error::data(format!(
            "output `{}`: SQLite cannot make `{}` wider: its values are kept as they were written",
            output.name,
            field.name()
        ))
        .hint("Cast it to the old type in the model; or give the output another name and load it there.")),
        None => Ok(()),
    }
}

/// What a commit would change, as the database is now.
fn announce(this: &SqliteConnection, database: &Sqlite, stage: &Stage) -> Result<Staged> {
    let (table, staged_rows) = (&stage.table, stage.staged.rows);
    let output = &stage.output;
    if output.mode == Mode::Merge {
        let key = quoted_list(output.key.iter().map(String::as_str))?;
        let nulls = output
            .key
            .iter()
            .map(|column| Ok(format!("{} IS NULL", quoted(column)?)))
            .collect::<Result<Vec<_>>>()?;
        let null_keys =
            count(this, database, &format!("SELECT count(*) FROM {table} WHERE {}", nulls.join(" OR ")))?;
        let twice = count(
            this,
            database,
            &format!("SELECT count(*) FROM (SELECT 1 FROM {table} GROUP BY {key} HAVING count(*) > 1)"),
        )?;
        refuse_keys(output, null_keys, twice)?;
    }
    let stays = output.and_stays();
    if stage.current.is_none() {
        let inserted =
            count(this, database, &format!("SELECT count(*) FROM {table} AS s WHERE true{stays}"))?;
        return Ok(Staged { rows: staged_rows, inserted, rows_after: inserted, ..Staged::default() });
    }
    let name = quoted(&output.name)?;
    let before = count(this, database, &format!("SELECT count(*) FROM {name}"))?;
    let mut staged = Staged { rows: staged_rows, rows_before: before, ..Staged::default() };
    match output.mode {
        Mode::Append if !output.rebuild => staged.inserted = staged_rows,
        Mode::ReplaceRange if !output.rebuild => {
            staged.deleted = count(
                this,
                database,
                &format!("SELECT count(*) FROM {name} AS t WHERE {}", in_ranges(stage)?),
            )?;
            staged.inserted = staged_rows;
        }
        Mode::Merge if !output.rebuild => {
            let on = matches(stage)?;
            let all = count(
                this,
                database,
                &format!("SELECT count(*) FROM {table} AS s JOIN {name} AS t ON {on}"),
            )?;
            let (staying, matched) = if output.marked {
                let staying =
                    count(this, database, &format!("SELECT count(*) FROM {table} AS s WHERE true{stays}"))?;
                let matched =
                    format!("SELECT count(*) FROM {table} AS s JOIN {name} AS t ON {on} WHERE true{stays}");
                (staying, count(this, database, &matched)?)
            } else {
                (staged_rows, all)
            };
            staged.deleted = all - matched;
            staged.updated = match differs(stage)? {
                Some(differs) => count(
                    this,
                    database,
                    &format!(
                        "SELECT count(*) FROM {table} AS s JOIN {name} AS t ON {on} WHERE ({differs}){stays}"
                    ),
                )?,
                None => 0,
            };
            staged.unchanged = matched - staged.updated;
            staged.inserted = staying.checked_sub(matched).ok_or_else(|| {
                Error::failed(format!("output `{}` holds the same key more than once", output.name))
                    .hint("Load it anew with `--full-refresh`.")
            })?;
        }
        _ => {
            let inserted = format!("SELECT count(*) FROM {table} AS s WHERE true{stays}");
            (staged.deleted, staged.inserted) = (before, count(this, database, &inserted)?);
        }
    }
    staged.rows_after = before - staged.deleted + staged.inserted;
    Ok(staged)
}

fn matches(stage: &Stage) -> Result<String> {
    let parts = stage.output.key.iter().map(|column| {
        let column = quoted(column)?;
        Ok(format!("t.{column} = s.{column}"))
    });
    Ok(parts.collect::<Result<Vec<_>>>()?.join(" AND "))
}

/// The columns that a match may change.
fn updatable(stage: &Stage) -> Vec<&String> {
    let output = &stage.output;
    let may = |column: &&String| {
        !output.key.contains(column) && (output.update.is_empty() || output.update.contains(column))
    };
    stage.columns.iter().filter(may).collect()
}

fn differs(stage: &Stage) -> Result<Option<String>> {
    let parts = updatable(stage)
        .into_iter()
        .map(|column| {
            let added =
                stage.current.as_ref().is_some_and(|current| current.field_with_name(column).is_err());
            let column = quoted(column)?;
            // A column that is still to be added is null in every row that is there.
            Ok(if added {
                format!("s.{column} IS NOT NULL")
            } else {
                format!("t.{column} IS NOT s.{column}")
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((!parts.is_empty()).then(|| parts.join(" OR ")))
}

fn in_ranges(stage: &Stage) -> Result<String> {
    let parts = stage.output.range.iter().map(|column| {
        let column = quoted(column)?;
        Ok(format!("t.{column} IS s.{column}"))
    });
    let same = parts.collect::<Result<Vec<_>>>()?.join(" AND ");
    let mut condition = format!("EXISTS (SELECT 1 FROM {} AS s WHERE {same})", stage.table);
    if let Some(column) = stage.output.range.first().filter(|_| !stage.output.named_ranges.is_empty()) {
        let values: Vec<String> = stage
            .output
            .named_ranges
            .iter()
            .map(|value| format!("'{}'", value.replace('\'', "''")))
            .collect();
        condition = format!("({condition} OR t.{} IN ({}))", quoted(column)?, values.join(", "));
    }
    Ok(condition)
}

/// The commit: everything in one transaction.
fn publish(
    this: &SqliteConnection,
    database: &mut Sqlite,
    job: &JobId,
    seq: u64,
    mut record: LoadRecord,
    stages: &[Stage],
    quarantined: bool,
) -> CommitOutcome {
    let attempt = (|| -> Result<()> {
        let failed = |error: rusqlite::Error| this.error("publish into", &error);
        database.execute_batch("BEGIN IMMEDIATE").map_err(failed)?;
        database.execute_batch(TABLES).map_err(failed)?;
        let last = last_record(this, database, job)?;
        let next = last.as_ref().map_or(1, |last| last.seq + 1);
        if next != seq || last.as_ref().is_some_and(|last| last.incarnation != record.incarnation) {
            return Err(overtaken(job));
        }
        for stage in stages {
            apply(this, database, job, stage)?;
            if let Some(output) = record.outputs.get_mut(&stage.output.name) {
                output.columns = columns_of(&stage.schema);
            }
        }
        if quarantined {
            let sql = format!(
                "INSERT INTO {QUARANTINE} SELECT ?1, ?2, ?3, ?4, \"on\", \"check\", reason, position, row FROM fm_quarantine"
            );
            let run = record.run_id.to_string();
            database
                .execute(&sql, rusqlite::params![job.project, job.job, seq.cast_signed(), run])
                .map_err(failed)?;
        }
        let text = record.to_json();
        let incarnation = record.incarnation.to_string();
        database
            .execute(
                &format!("INSERT INTO {LOG} VALUES (?1, ?2, ?3, ?4, ?5)"),
                rusqlite::params![job.project, job.job, incarnation, seq.cast_signed(), text],
            )
            .map_err(failed)?;
        database
            .execute(
                &format!("INSERT OR REPLACE INTO {STATE} VALUES (?1, ?2, ?3, ?4, ?5, ?6)"),
                rusqlite::params![
                    job.project,
                    job.job,
                    incarnation,
                    seq.cast_signed(),
                    text,
                    record.committed_at
                ],
            )
            .map_err(failed)?;
        Ok(())
    })();
    if let Err(error) = attempt {
        drop(database.execute_batch("ROLLBACK"));
        return CommitOutcome::Rejected(error);
    }
    match database.execute_batch("COMMIT") {
        Ok(()) => CommitOutcome::Committed(None),
        Err(error) => {
            let error = this.error("commit to", &error);
            if database.is_autocommit() {
                // The transaction has ended one way or the other.
                CommitOutcome::Unknown(error)
            } else {
                drop(database.execute_batch("ROLLBACK"));
                CommitOutcome::Rejected(error)
            }
        }
    }
}

/// Applies one stage, and checks that it changes what was announced.
fn apply(this: &SqliteConnection, database: &Sqlite, job: &JobId, stage: &Stage) -> Result<()> {
    let failed =
        |error: rusqlite::Error| this.error(&format!("write output `{}` to", stage.output.name), &error);
    let output = &stage.output;
    let name = quoted(&output.name)?;
    let there = table_schema(this, database, job, &output.name)?;
    if there != stage.current {
        return Err(reshaped(output));
    }
    match there {
        None => {
            let mut parts = stage
                .schema
                .fields()
                .iter()
                .map(|field| {
                    Ok(format!("{} {}", quoted(field.name())?, declaration(field.name(), field.data_type())?))
                })
                .collect::<Result<Vec<_>>>()?;
            if !output.key.is_empty() {
                parts.push(format!("PRIMARY KEY ({})", quoted_list(output.key.iter().map(String::as_str))?));
            }
            database.execute_batch(&format!("CREATE TABLE {name} ({})", parts.join(", "))).map_err(failed)?;
        }
        Some(current) => {
            for field in stage.schema.fields() {
                if current.field_with_name(field.name()).is_err() {
                    let column = format!(
                        "{} {}",
                        quoted(field.name())?,
                        declaration(field.name(), field.data_type())?
                    );
                    database
                        .execute_batch(&format!("ALTER TABLE {name} ADD COLUMN {column}"))
                        .map_err(failed)?;
                }
            }
        }
    }
    let columns = quoted_list(stage.columns.iter().map(String::as_str))?;
    let (table, stays) = (&stage.table, output.and_stays());
    let run = |sql: &str| database.execute(sql, []).map(|changed| changed as u64).map_err(failed);
    let (mut deleted, mut updated) = (0, 0);
    let inserted = match output.mode {
        Mode::Merge if !output.rebuild => {
            let on = matches(stage)?;
            if output.marked {
                let gone = quoted(GONE)?;
                deleted = run(&format!(
                    "DELETE FROM {name} AS t WHERE EXISTS (SELECT 1 FROM {table} AS s WHERE {on} AND s.{gone})"
                ))?;
            }
            if let Some(differs) = differs(stage)? {
                let set = updatable(stage)
                    .into_iter()
                    .map(|column| {
                        let column = quoted(column)?;
                        Ok(format!("{column} = s.{column}"))
                    })
                    .collect::<Result<Vec<_>>>()?
                    .join(", ");
                updated = run(&format!(
                    "UPDATE {name} AS t SET {set} FROM {table} AS s WHERE {on} AND ({differs}){stays}"
                ))?;
            }
            run(&format!(
                "INSERT INTO {name} ({columns}) SELECT {columns} FROM {table} AS s WHERE NOT EXISTS (SELECT 1 FROM {name} AS t WHERE {on}){stays}"
            ))?
        }
        mode => {
            if mode == Mode::ReplaceRange && !output.rebuild {
                deleted = run(&format!("DELETE FROM {name} AS t WHERE {}", in_ranges(stage)?))?;
            } else if mode != Mode::Append || output.rebuild {
                deleted = run(&format!("DELETE FROM {name}"))?;
            }
            run(&format!(
                "INSERT INTO {name} ({columns}) SELECT {columns} FROM {table} AS s WHERE true{stays}"
            ))?
        }
    };
    as_announced(output, &stage.staged, (inserted, updated, deleted))
}

/// One row as SQLite's values.
fn row_values(batch: &RecordBatch, row: usize) -> Result<Vec<Value>> {
    let named = |(field, array): (&Arc<arrow::datatypes::Field>, &ArrayRef)| {
        value(array, row).map_err(|error| error.within(&format!("column `{}`", field.name())))
    };
    batch.schema_ref().fields().iter().zip(batch.columns()).map(named).collect()
}

/// SQLite takes what is no number for null.
fn real(value: f64) -> Result<Value> {
    if value.is_nan() {
        return Err(Error::data("a float is NaN, and SQLite would keep it as null")
            .hint("Decide in the model what it is to be: `nullif(x, 'NaN'::float)`, or a number."));
    }
    Ok(Value::Real(value))
}

fn value(array: &dyn Array, row: usize) -> Result<Value> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    let far = || Error::data("a date is too far away to be written");
    Ok(match array.data_type() {
        DataType::Utf8 => Value::Text(array.as_string::<i32>().value(row).to_owned()),
        DataType::Binary => Value::Blob(array.as_binary::<i32>().value(row).to_vec()),
        DataType::Boolean => Value::Integer(array.as_boolean().value(row).into()),
        DataType::Int8 => Value::Integer(array.as_primitive::<Int8Type>().value(row).into()),
        DataType::Int16 => Value::Integer(array.as_primitive::<Int16Type>().value(row).into()),
        DataType::Int32 => Value::Integer(array.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => Value::Integer(array.as_primitive::<Int64Type>().value(row)),
        DataType::UInt8 => Value::Integer(array.as_primitive::<UInt8Type>().value(row).into()),
        DataType::UInt16 => Value::Integer(array.as_primitive::<UInt16Type>().value(row).into()),
        DataType::UInt32 => Value::Integer(array.as_primitive::<UInt32Type>().value(row).into()),
        DataType::Float32 => real(array.as_primitive::<Float32Type>().value(row).into())?,
        DataType::Float64 => real(array.as_primitive::<Float64Type>().value(row))?,
        DataType::Decimal128(..) => Value::Text(array.as_primitive::<Decimal128Type>().value_as_string(row)),
        DataType::Date32 => {
            let day = date32_to_datetime(array.as_primitive::<Date32Type>().value(row)).ok_or_else(far)?;
            Value::Text(day.format("%Y-%m-%d").to_string())
        }
        DataType::Timestamp(TimeUnit::Microsecond, zone) => {
            let micros = array.as_primitive::<TimestampMicrosecondType>().value(row);
            let at = timestamp_us_to_datetime(micros).ok_or_else(far)?;
            let text = at.format("%Y-%m-%dT%H:%M:%S%.6f").to_string();
            Value::Text(if zone.is_some() { text + "Z" } else { text })
        }
        DataType::Time64(TimeUnit::Microsecond) => {
            let time =
                time64us_to_time(array.as_primitive::<Time64MicrosecondType>().value(row)).ok_or_else(far)?;
            Value::Text(time.format("%H:%M:%S%.6f").to_string())
        }
        other => return Err(Error::bug(format!("SQLite was given a value of type {other}"))),
    })
}
