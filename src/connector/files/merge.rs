//! Which files a release keeps, rewrites and adds.
//!
//! A file is rewritten only if a row in it changes, and then as a stream: one file at a time, beside the staged
//! rows. The staged rows are the join's build side, the first of its tables; when they are many, the join sorts instead of
//! hashing, so that it can spill.

use std::sync::Arc;

use arrow::{
    array::AsArray,
    datatypes::{Int64Type, SchemaRef},
};
use datafusion::{
    catalog::streaming::StreamingTable,
    execution::TaskContext,
    physical_plan::{SendableRecordBatchStream, streaming::PartitionStream},
    prelude::SessionContext,
};

use super::{FilesConnection, parquet};
use crate::{
    connector::{
        Attempt, Staged,
        spec::{GONE, OutputSpec},
    },
    error::{Error, Result},
    names::{quoted, quoted_list},
    record::DataFile,
    session,
    spool::{Scratch, Spool},
};

/// A data file as a table.
#[derive(Debug)]
struct FileTable {
    connection: Arc<FilesConnection>,
    output: String,
    files: Vec<DataFile>,
    schema: SchemaRef,
}

impl PartitionStream for FileTable {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        use futures::StreamExt;
        let streams: Vec<_> = self
            .files
            .iter()
            .map(|file| parquet::data_file(&self.connection, &self.output, file, Arc::clone(&self.schema)))
            .collect();
        let all = futures::stream::iter(streams).flatten();
        Box::pin(datafusion::physical_plan::stream::RecordBatchStreamAdapter::new(
            Arc::clone(&self.schema),
            all,
        ))
    }
}

/// What staging one output works with.
pub(super) struct Staging<'a> {
    pub(super) connection: &'a Arc<FilesConnection>,
    pub(super) attempt: &'a Attempt,
    pub(super) output: &'a OutputSpec,
    /// The columns that the output will have.
    pub(super) schema: SchemaRef,
    /// The live files of the last release.
    pub(super) base: Vec<DataFile>,
    /// Whether the base files have other columns and must be rewritten.
    pub(super) evolved: bool,
    pub(super) parts: usize,
}

impl Staging<'_> {
    /// Writes rows into as many files as their partitions and their size need.
    async fn write(&mut self, rows: SendableRecordBatchStream) -> Result<Vec<DataFile>> {
        let incarnation = self.attempt.incarnation.simple().to_string();
        let attempt = self.attempt.id.simple().to_string();
        let prefix = format!(
            "{}-{:08}-{}",
            incarnation.get(..8).unwrap_or_default(),
            self.attempt.seq,
            attempt.get(attempt.len().saturating_sub(12)..).unwrap_or_default(),
        );
        let partition_by = &self.output.partition_by;
        let rows = if partition_by.is_empty() { rows } else { self.sorted(rows).await? };
        let parts = &mut self.parts;
        let name = || {
            let name = format!("{prefix}-{:04}.parquet", *parts);
            *parts += 1;
            name
        };
        let memory = self.attempt.scratch.of_output(&self.output.name);
        parquet::write_parts(self.connection, &self.output.name, name, rows, partition_by, &memory).await
    }

    /// The rows in the order of their partitions, so that one file is open at a time.
    async fn sorted(&self, rows: SendableRecordBatchStream) -> Result<SendableRecordBatchStream> {
        let schema = rows.schema();
        let spool = Spool::of(&self.output.name, rows, &self.attempt.scratch).await?;
        let context = session::internal(&self.attempt.scratch, true);
        context.register_table("s", spool.table()?)?;
        let columns = quoted_list(self.output.partition_by.iter().map(String::as_str))?;
        let sorted =
            context.sql(&format!("SELECT * FROM s ORDER BY {columns}")).await?.execute_stream().await?;
        Ok(session::conform(sorted, schema))
    }

    fn table(&self, files: &[DataFile]) -> Result<Arc<StreamingTable>> {
        let table: Arc<dyn PartitionStream> = Arc::new(FileTable {
            connection: Arc::clone(self.connection),
            output: self.output.name.clone(),
            files: files.to_vec(),
            schema: Arc::clone(&self.schema),
        });
        Ok(Arc::new(StreamingTable::try_new(Arc::clone(&self.schema), vec![table])?))
    }

    /// Replaces everything.
    pub(super) async fn replace(
        &mut self,
        rows: SendableRecordBatchStream,
    ) -> Result<(Vec<DataFile>, Staged)> {
        let before: u64 = self.base.iter().map(|file| file.rows).sum();
        let files = self.write(rows).await?;
        let after = files.iter().map(|file| file.rows).sum();
        let staged = Staged {
            rows: after,
            inserted: after,
            deleted: before,
            rows_before: before,
            rows_after: after,
            ..Staged::default()
        };
        Ok((files, staged))
    }

    /// Adds rows.
    pub(super) async fn append(
        &mut self,
        rows: SendableRecordBatchStream,
    ) -> Result<(Vec<DataFile>, Staged)> {
        let before: u64 = self.base.iter().map(|file| file.rows).sum();
        let mut files = self.conformed().await?;
        let new = self.write(rows).await?;
        let inserted = new.iter().map(|file| file.rows).sum();
        files.extend(new);
        let staged = Staged {
            rows: inserted,
            inserted,
            rows_before: before,
            rows_after: before + inserted,
            ..Staged::default()
        };
        Ok((files, staged))
    }

    /// The base files, rewritten if they have other columns.
    async fn conformed(&mut self) -> Result<Vec<DataFile>> {
        if !self.evolved {
            return Ok(self.base.clone());
        }
        let mut files = Vec::new();
        for file in self.base.clone() {
            let rows =
                parquet::data_file(self.connection, &self.output.name, &file, Arc::clone(&self.schema));
            files.extend(self.write(rows).await?);
        }
        Ok(files)
    }

    /// Inserts and updates by key.
    pub(super) async fn merge(&mut self, rows: &Spool) -> Result<(Vec<DataFile>, Staged)> {
        let context = context(&self.attempt.scratch, rows)?;
        context.register_table("s", rows.table()?)?;
        refuse_bad_keys(&context, self.output).await?;
        let key = &self.output.key;
        let on = pairs(key, "f", "=", "s")?.join(" AND ");
        let first = quoted(key.first().map(String::as_str).unwrap_or_default())?;
        let schema = Arc::clone(&self.schema);
        let updated: Vec<&str> = schema
            .fields()
            .iter()
            .map(|field| field.name().as_str())
            .filter(|name| !key.iter().any(|column| column == name))
            .filter(|name| {
                self.output.update.is_empty() || self.output.update.iter().any(|column| column == name)
            })
            .filter(|name| rows.schema().field_with_name(name).is_ok())
            .collect();
        let changed = match pairs(&updated, "f", "IS DISTINCT FROM", "s")?.join(" OR ") {
            none if none.is_empty() => "false".to_owned(),
            different => different,
        };
        let stays = self.output.and_stays();
        let before: u64 = self.base.iter().map(|file| file.rows).sum();
        let mut staged = Staged { rows: rows.rows(), rows_before: before, ..Staged::default() };
        let mut files = Vec::new();
        for file in self.base.clone() {
            context.register_table("f", self.table(std::slice::from_ref(&file))?)?;
            let sql = format!(
                "SELECT count(*), count(*) FILTER (WHERE true{stays}), count(*) FILTER (WHERE ({changed}){stays}) FROM s JOIN f ON {on}"
            );
            let [all, matched, different] = counts(&context, &sql).await?;
            staged.updated += different;
            staged.unchanged += matched - different;
            staged.deleted += all - matched;
            if different > 0 || all > matched || self.evolved {
                let columns = self
                    .schema
                    .fields()
                    .iter()
                    .map(|field| {
                        let name = quoted(field.name())?;
                        Ok(if updated.contains(&field.name().as_str()) {
                            format!(
                                "CASE WHEN s.{first} IS NOT NULL THEN s.{name} ELSE f.{name} END AS {name}"
                            )
                        } else {
                            format!("f.{name} AS {name}")
                        })
                    })
                    .collect::<Result<Vec<_>>>()?
                    .join(", ");
                let there = if self.output.marked {
                    format!(" WHERE s.{first} IS NULL OR NOT s.{}", quoted(GONE)?)
                } else {
                    String::new()
                };
                let sql = format!("SELECT {columns} FROM s RIGHT JOIN f ON {on}{there}");
                let merged = session::conform(
                    context.sql(&sql).await?.execute_stream().await?,
                    Arc::clone(&self.schema),
                );
                files.extend(self.write(merged).await?);
            } else {
                files.push(file);
            }
            context.deregister_table("f")?;
        }
        context.register_table("f", self.table(&self.base)?)?;
        let columns = self
            .schema
            .fields()
            .iter()
            .map(|field| {
                let name = quoted(field.name())?;
                Ok(match rows.schema().field_with_name(field.name()) {
                    Ok(_) => format!("s.{name}"),
                    Err(_) => format!("arrow_cast(NULL, '{}') AS {name}", field.data_type()),
                })
            })
            .collect::<Result<Vec<_>>>()?
            .join(", ");
        let sql = format!("SELECT {columns} FROM s LEFT ANTI JOIN f ON {on} WHERE true{stays}");
        let new =
            session::conform(context.sql(&sql).await?.execute_stream().await?, Arc::clone(&self.schema));
        let new = self.write(new).await?;
        staged.inserted = new.iter().map(|file| file.rows).sum();
        files.extend(new);
        staged.rows_after = before + staged.inserted - staged.deleted;
        let [staying] = counts(&context, &format!("SELECT count(*) FROM s WHERE true{stays}")).await?;
        if staged.inserted + staged.updated + staged.unchanged != staying {
            return Err(Error::failed(format!(
                "output `{}`: {} rows were to be merged, and {} found their place",
                self.output.name,
                staged.rows,
                staged.inserted + staged.updated + staged.unchanged
            ))
            .hint("The output holds the same key more than once: load it anew with `--full-refresh`."));
        }
        Ok((files, staged))
    }

    /// Replaces the ranges that the rows have.
    pub(super) async fn replace_range(&mut self, rows: &Spool) -> Result<(Vec<DataFile>, Staged)> {
        let context = context(&self.attempt.scratch, rows)?;
        context.register_table("s", rows.table()?)?;
        let range = &self.output.range;
        let columns = quoted_list(range.iter().map(String::as_str))?;
        let mut ranges = format!("SELECT DISTINCT {columns} FROM s");
        if let Some(column) = range.first().filter(|_| !self.output.named_ranges.is_empty()) {
            let field = self.schema.field_with_name(column)?;
            for value in &self.output.named_ranges {
                let value = value.replace('\'', "''");
                ranges.push_str(&format!(" UNION SELECT arrow_cast('{value}', '{}')", field.data_type()));
            }
        }
        context.register_table("r", context.sql(&ranges).await?.into_view())?;
        let on = pairs(range, "f", "IS NOT DISTINCT FROM", "r")?.join(" AND ");
        let before: u64 = self.base.iter().map(|file| file.rows).sum();
        let mut staged =
            Staged { rows: rows.rows(), inserted: rows.rows(), rows_before: before, ..Staged::default() };
        let mut files = Vec::new();
        for file in self.base.clone() {
            context.register_table("f", self.table(std::slice::from_ref(&file))?)?;
            let [hit] =
                counts(&context, &format!("SELECT count(*) FROM r RIGHT SEMI JOIN f ON {on}")).await?;
            staged.deleted += hit;
            if hit == 0 && !self.evolved {
                files.push(file);
            } else {
                let kept = context
                    .sql(&format!("SELECT * FROM r RIGHT ANTI JOIN f ON {on}"))
                    .await?
                    .execute_stream()
                    .await?;
                files.extend(self.write(session::conform(kept, Arc::clone(&self.schema))).await?);
            }
            context.deregister_table("f")?;
        }
        files.extend(self.write(session::conform(rows.stream(), Arc::clone(&self.schema))).await?);
        staged.rows_after = before - staged.deleted + staged.inserted;
        Ok((files, staged))
    }
}

/// A session for joins with the staged rows.
fn context(scratch: &Scratch, rows: &Spool) -> Result<SessionContext> {
    // A quarter of the memory for a hash table of about a hundred bytes a row; beyond it, sort.
    let many = rows.rows() > (scratch.limits.memory_bytes / 400) as u64;
    Ok(session::internal(scratch, !many))
}

/// Refuses null keys, and keys that come twice.
async fn refuse_bad_keys(context: &SessionContext, output: &OutputSpec) -> Result<()> {
    let columns = quoted_list(output.key.iter().map(String::as_str))?;
    let nulls = output
        .key
        .iter()
        .map(|column| Ok(format!("{} IS NULL", quoted(column)?)))
        .collect::<Result<Vec<_>>>()?;
    let [null_keys] =
        counts(context, &format!("SELECT count(*) FROM s WHERE {}", nulls.join(" OR "))).await?;
    let [double] = counts(
        context,
        &format!("SELECT count(*) FROM (SELECT 1 FROM s GROUP BY {columns} HAVING count(*) > 1)"),
    )
    .await?;
    crate::load::refuse_keys(output, null_keys, double)
}

/// One condition a column: `(left.column operator right.column)`.
fn pairs(columns: &[impl AsRef<str>], left: &str, operator: &str, right: &str) -> Result<Vec<String>> {
    let pair = |column: &str| {
        let name = quoted(column)?;
        Ok(format!("({left}.{name} {operator} {right}.{name})"))
    };
    columns.iter().map(|column| pair(column.as_ref())).collect()
}

/// The one row of counts that `sql` gives.
async fn counts<const N: usize>(context: &SessionContext, sql: &str) -> Result<[u64; N]> {
    let batches = context.sql(sql).await?.collect().await?;
    let mut found = [0; N];
    for batch in batches.iter().filter(|batch| batch.num_rows() > 0) {
        for (slot, column) in found.iter_mut().zip(batch.columns()) {
            *slot = u64::try_from(column.as_primitive::<Int64Type>().value(0)).unwrap_or_default();
        }
    }
    Ok(found)
}
