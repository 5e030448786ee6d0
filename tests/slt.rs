//! sqllogictest files over the SQL semantics and the example's models.
//!
//! `@job/name` is replaced by that model's or check's file as a subquery; `now()` is 2026-11-01T01:30:00Z, and
//! `$reporting_currency` is `EUR`.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{fs, path::Path, sync::Arc};

use arrow::{
    array::Array,
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::DateTime;
use datafusion::prelude::SessionContext;
use floodmark::{connector::scan::OpenSources, error::Error, runtime::Limits, session, spool::Scratch};
use libtest_mimic::{Arguments, Trial};
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};

struct Session {
    context: SessionContext,
    _spill: tempfile::TempDir,
}

impl Session {
    fn new() -> Self {
        let spill = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 256 << 20, spill: spill.path().to_owned() };
        let as_of = DateTime::parse_from_rfc3339("2026-11-01T01:30:00Z").unwrap().to_utc();
        let context =
            session::for_models(&Scratch::new(&limits).unwrap(), as_of, Arc::new(OpenSources::default()));
        Self { context, _spill: spill }
    }

    async fn rows(&self, sql: &str) -> Result<Vec<Vec<String>>, Error> {
        let batches = self.context.sql(&with_models(sql)).await?.collect().await?;
        let options = FormatOptions::default().with_null("NULL");
        let mut rows = Vec::new();
        for batch in &batches {
            for row in 0..batch.num_rows() {
                let cells = batch.columns().iter().map(|column: &Arc<dyn Array>| {
                    let text =
                        ArrayFormatter::try_new(column.as_ref(), &options).unwrap().value(row).to_string();
                    if text.is_empty() { "(empty)".to_owned() } else { text }
                });
                rows.push(cells.collect());
            }
        }
        Ok(rows)
    }
}

/// Replaces every `@job/name` by its file, with the parameter bound.
fn with_models(sql: &str) -> String {
    let mut text = String::new();
    let mut rest = sql;
    while let Some((before, behind)) = rest.split_once('@') {
        let end =
            behind.find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '/'))).unwrap_or(behind.len());
        let (name, after) = behind.split_at(end);
        let file = ["mappings", "checks"]
            .iter()
            .find_map(|of| fs::read_to_string(format!("sql/{of}/{name}.sql")).ok());
        let query = file.expect("a model or a check of that name");
        text.push_str(&format!("{before}({})", query.replace("$reporting_currency", "'EUR'")));
        rest = after;
    }
    text + rest
}

#[async_trait::async_trait]
impl AsyncDB for Session {
    type Error = Error;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, sql: &str) -> Result<DBOutput<DefaultColumnType>, Error> {
        let rows = self.rows(sql).await?;
        if rows.is_empty() && !sql.trim_start().to_lowercase().starts_with("select") {
            return Ok(DBOutput::StatementComplete(0));
        }
        let columns = rows.first().map_or(0, Vec::len);
        Ok(DBOutput::Rows { types: vec![DefaultColumnType::Any; columns], rows })
    }

    async fn shutdown(&mut self) {}
}

fn main() {
    let mut files = Vec::new();
    find(Path::new("tests/slt"), &mut files);
    files.sort();
    let trials = files.into_iter().map(|path| {
        Trial::test(path.clone(), move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async {
                let mut runner = Runner::new(|| async { Ok(Session::new()) });
                runner.run_file_async(&path).await.map_err(|error| error.to_string().into())
            })
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit();
}

fn find(folder: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, files);
        } else {
            files.push(path.display().to_string());
        }
    }
}
