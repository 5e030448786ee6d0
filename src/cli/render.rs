//! The only place that prints. Results go to stdout, everything else to stderr.

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    panic::PanicHookInfo,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::Ordering},
    time::Duration,
};

use annotate_snippets::{AnnotationKind, Group, Level, Renderer as Snippets, Snippet};
use arrow::array::RecordBatch;
use indexmap::IndexMap;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer as _, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use super::{clean::Found, quarantine::Counted};
use crate::{
    connector::{CatalogTable, Exactness, Identity, condition::Condition},
    error::{Error, Problem, Result, without_values},
    plan::Plan,
    project::Project,
    reconcile::{Kind, Reconciled},
    record::{LoadRecord, run::RunRecord},
    run::{Counter, Progress},
    runtime,
    watermark::Window,
};

/// Prints a line to stdout.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        if let Err(error) = writeln!(std::io::stdout(), $($text)*) {
            remember_unwritten(&error);
        }
    }};
}

/// Why a result could not be printed.
static UNWRITTEN: OnceLock<String> = OnceLock::new();

/// A reader that has gone away, such as `head`, is no error.
fn remember_unwritten(error: &std::io::Error) {
    if error.kind() != std::io::ErrorKind::BrokenPipe {
        UNWRITTEN.get_or_init(|| error.to_string());
    }
}

/// What to tell if results did not reach stdout.
pub(super) fn unwritten() -> Option<Error> {
    use std::io::Write as _;
    if let Err(error) = std::io::stdout().flush() {
        remember_unwritten(&error);
    }
    UNWRITTEN.get().map(|why| {
        Error::failed("the result could not be written to stdout")
            .note(why)
            .hint("What ran has run: `floodmark runs` shows it. Give the output a place and ask again.")
    })
}

/// Prints a line to stderr, without secrets.
macro_rules! tell {
    ($($text:tt)*) => { eprintln!("{}", crate::secret::scrubbed(&format!($($text)*))) };
}

/// Stderr without secrets, for what is logged.
struct Scrubbed;

impl std::io::Write for Scrubbed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = crate::secret::scrubbed(&String::from_utf8_lossy(bytes));
        std::io::stderr().write_all(text.as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// Prints for a person or for a machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renderer {
    /// Results are JSON.
    json: bool,
    /// So is what stderr says.
    log_json: bool,
    /// Runs tell what they do, line by line, instead of in bars.
    logs: bool,
    colour: bool,
}

impl Renderer {
    /// `verbose` is how much of what runs do is told: nothing, what a person wants to know, every step.
    pub(super) fn new(json: bool, log_json: bool, verbose: u8) -> Self {
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let level = match verbose {
            0 => LevelFilter::OFF,
            1 => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        };
        if level != LevelFilter::OFF {
            // Libraries are left out: they may tell addresses and values.
            let ours = Targets::new().with_target("floodmark", level);
            let lines = tracing_subscriber::fmt::layer().with_writer(|| Scrubbed).with_target(false);
            let lines = if log_json {
                lines.json().flatten_event(true).with_span_list(false).boxed()
            } else {
                lines.with_ansi(colour).compact().boxed()
            };
            tracing_subscriber::registry().with(lines.with_filter(ours)).init();
        }
        Self { json, log_json: json || log_json, logs: level != LevelFilter::OFF, colour }
    }

    /// The first signal has come.
    pub(super) fn stopping(self) {
        if self.log_json {
            tell!("{}", json!({ "message": "stopping" }));
        } else {
            tell!(
                "stopping; nothing is published unless it was already being committed (again to stop at once)"
            );
        }
    }

    /// An error: every problem with its place, then why, then what to do.
    pub(super) fn error(&self, error: &Error) {
        if self.log_json {
            let problems: Vec<_> = error.problems().iter().map(problem_json).collect();
            tell!("{}", json!({ "errors": problems }));
            return;
        }
        for problem in error.problems() {
            tell!("{}", self.problem(problem, &Level::ERROR));
        }
    }

    fn problem(&self, problem: &Problem, level: &Level<'static>) -> String {
        let renderer = if self.colour { Snippets::styled() } else { Snippets::plain() };
        let title = level.clone().primary_title(&problem.message);
        let mut group = match &problem.place {
            Some(place) => {
                let mut annotation = AnnotationKind::Primary.span(place.span.clone());
                if let Some(label) = &problem.label {
                    annotation = annotation.label(label.as_str());
                }
                title.element(Snippet::source(&place.file.text).path(&place.file.path).annotation(annotation))
            }
            None => Group::with_title(title),
        };
        for note in &problem.notes {
            group = group.element(Level::NOTE.message(note.as_str()));
        }
        if let Some(hint) = &problem.hint {
            group = group.element(Level::HELP.with_name("hint").message(hint.as_str()));
        }
        renderer.render(&[group])
    }

    fn warning(&self, problem: &Problem) {
        tell!("{}", self.problem(problem, &Level::WARNING));
    }

    pub(super) fn json(&self, value: &serde_json::Value) {
        say!("{}", serde_json::to_string_pretty(value).unwrap_or_default());
    }

    pub(super) fn raw(&self, text: &str) {
        say!("{}", text.trim_end());
    }

    pub(super) fn created(&self, files: &[String]) {
        if self.json {
            return self.json(&json!({ "created": files }));
        }
        for file in files {
            say!("created {file}");
        }
        say!("\nRun it: floodmark run");
    }

    pub(super) fn checked(&self, plans: &IndexMap<String, Plan>) {
        if self.json {
            let jobs: Vec<_> = plans.iter().map(|(name, plan)| json!({ "job": name, "sources": plan.streams.len(), "models": plan.models.len(), "checks": plan.checks.len(), "outputs": plan.outputs.len() })).collect();
            return self.json(&json!({ "jobs": jobs }));
        }
        for (name, plan) in plans {
            for warning in &plan.warnings {
                self.warning(warning);
            }
            say!(
                "{name}: ok ({}, {}, {}, {})",
                count(plan.streams.len(), "source"),
                count(plan.models.len(), "model"),
                count(plan.checks.len(), "check"),
                count(plan.outputs.len(), "output")
            );
        }
    }

    /// A plan, what is asked of each of its sources, and what a run would read of them now.
    pub(super) fn plan(
        &self,
        plan: &Plan,
        asked: &IndexMap<&str, Vec<Condition>>,
        windows: &IndexMap<String, (Window, Option<Exactness>)>,
        ways: &IndexMap<String, &'static str>,
        warnings: &[String],
    ) {
        let way = |output: &str| ways.get(output).copied();
        let window = |source: &str| windows.get(source).map(|(window, _)| window.to_string());
        let bound = |source: &str| {
            windows.get(source).and_then(|(_, exactness)| *exactness).map(|exactness| exactness.to_string())
        };
        let asks_for = |source: &str| -> Vec<String> {
            asked.get(source).into_iter().flatten().map(ToString::to_string).collect()
        };
        if self.json {
            let sources: Vec<_> = plan.streams.iter().map(|(name, stream)| json!({ "source": name, "connection": stream.connection, "reads": if stream.partial { "what is new" } else { "everything" }, "written_down": stream.spool, "window": window(name), "bound": bound(name), "asks_for": asks_for(name), "columns": columns(&stream.schema) })).collect();
            let models: Vec<_> = plan.models.iter().map(|(name, model)| json!({ "model": name, "file": model.select.file.path, "sees": if model.partial { "partial" } else { "whole" }, "written_down": model.spool, "reads": model.select.reads, "columns": columns(&model.schema) })).collect();
            let checks: Vec<_> =
                plan.checks.iter().map(|check| json!({ "on": check.on, "check": check.words() })).collect();
            let outputs: Vec<_> = plan.outputs.iter().map(|output| json!({ "output": output.spec.name, "from": output.from, "mode": output.spec.mode, "key": output.spec.key, "guarantee": output.guarantee.to_string(), "way": way(&output.spec.name) })).collect();
            return self.json(&json!({ "job": plan.id.job, "as_of": plan.as_of, "sources": sources, "models": models, "checks": checks, "target": plan.target, "outputs": outputs, "warnings": warnings }));
        }
        for warning in &plan.warnings {
            self.warning(warning);
        }
        for warning in warnings {
            self.warning(&Problem::new(warning));
        }
        say!("{}  as of {}\n", plan.id, plan.as_of.to_rfc3339_opts(chrono::SecondsFormat::Secs, true));
        let asks = asked.values().any(|conditions| !conditions.is_empty());
        let mut table = Table::new(&[
            "source",
            "connection",
            "reads",
            "columns",
            "window",
            "bound",
            if asks { "asks for" } else { "" },
        ]);
        for (name, stream) in &plan.streams {
            table.row([
                name.clone(),
                stream.connection.clone(),
                sees(stream.partial, stream.spool),
                stream.schema.fields().len().to_string(),
                window(name).unwrap_or_default(),
                bound(name).unwrap_or_default(),
                asks_for(name).join(" and "),
            ]);
        }
        table.print();
        if !plan.models.is_empty() {
            let mut table = Table::new(&["model", "reads", "sees", "file"]);
            for (name, model) in &plan.models {
                let reads: Vec<&str> = model.select.reads.iter().map(String::as_str).collect();
                table.row([
                    name.clone(),
                    reads.join(", "),
                    sees(model.partial, model.spool),
                    model.select.file.path.clone(),
                ]);
            }
            table.print();
        }
        if !plan.checks.is_empty() {
            let mut table = Table::new(&["check", "on"]);
            for check in &plan.checks {
                table.row([check.words(), check.on.clone()]);
            }
            table.print();
        }
        let how = if ways.is_empty() { "" } else { "how" };
        let mut table = Table::new(&["output", "from", "mode", "key", "guarantee", how]);
        for output in &plan.outputs {
            table.row([
                format!("{}:{}", plan.target, output.spec.name),
                output.from.clone(),
                output.spec.mode.to_string(),
                output.spec.key.join(", "),
                output.guarantee.to_string(),
                way(&output.spec.name).unwrap_or_default().to_owned(),
            ]);
        }
        table.print();
    }

    pub(super) fn rows(&self, batches: &[RecordBatch]) -> Result<()> {
        if self.json {
            for batch in batches {
                let options = arrow::util::display::FormatOptions::default();
                for row in 0..batch.num_rows() {
                    let mut object = serde_json::Map::new();
                    for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
                        let value = if array.is_null(row) {
                            serde_json::Value::Null
                        } else {
                            arrow::util::display::ArrayFormatter::try_new(array.as_ref(), &options)?
                                .value(row)
                                .to_string()
                                .into()
                        };
                        object.insert(field.name().clone(), value);
                    }
                    say!("{}", serde_json::Value::Object(object));
                }
            }
            return Ok(());
        }
        say!("{}", arrow::util::pretty::pretty_format_batches(batches)?);
        Ok(())
    }

    pub(super) fn history(&self, runs: &[RunRecord]) {
        if self.json {
            return self.json(&json!({ "runs": runs }));
        }
        let mut table = Table::new(&["run", "job", "started", "outcome", "written", "time"]);
        for run in runs {
            let written: u64 = run.outputs.values().map(|output| output.inserted + output.updated).sum();
            table.row([
                run.run_id.to_string(),
                run.job.clone(),
                run.started_at.clone(),
                run.outcome.words().to_owned(),
                thousands(written),
                seconds(run.duration_ms),
            ]);
        }
        table.print();
    }

    /// The summary of one run.
    pub(super) fn run(&self, run: &RunRecord) {
        if self.json {
            say!("{}", serde_json::to_string(run).unwrap_or_default());
            return;
        }
        let release = run.seq.map(|seq| format!(", release {seq}")).unwrap_or_default();
        say!("{}: {}{release}, {}", run.job, run.outcome.words(), seconds(run.duration_ms));
        for warning in &run.warnings {
            say!("  warning: {warning}");
        }
        if !run.sources.is_empty() {
            say!("");
            let mut table = Table::new(&["source", "extracted", "passed", "filtered", "rejected", "window"]);
            for (name, source) in &run.sources {
                let counts = source.counts;
                table.row([
                    name.clone(),
                    thousands(counts.extracted),
                    thousands(counts.passed),
                    thousands(counts.filtered),
                    thousands(counts.rejected),
                    source.window.clone(),
                ]);
            }
            table.print();
        }
        if !run.outputs.is_empty() {
            let mut table = Table::new(&[
                "output",
                "mode",
                "rows",
                "inserted",
                "updated",
                "unchanged",
                "deleted",
                "holds",
            ]);
            for (name, output) in &run.outputs {
                table.row([
                    name.clone(),
                    output.mode.clone(),
                    thousands(output.rows),
                    thousands(output.inserted),
                    thousands(output.updated),
                    thousands(output.unchanged),
                    thousands(output.deleted),
                    thousands(output.rows_after),
                ]);
            }
            table.print();
        }
        let sources = run.sources.iter().map(|(name, source)| (name, &source.totals));
        let totals: Vec<_> = sources
            .chain(run.outputs.iter().map(|(name, output)| (name, &output.totals)))
            .filter(|(_, totals)| !totals.is_empty())
            .collect();
        if !totals.is_empty() {
            let mut table = Table::new(&["total of", "group", "rows", "sum"]);
            for (name, totals) in totals {
                for total in totals {
                    let sums: Vec<String> =
                        total.sums.iter().map(|(column, sum)| format!("{column} {}", grouped(sum))).collect();
                    table.row([name.clone(), total.group.join(", "), thousands(total.rows), sums.join(", ")]);
                }
            }
            table.print();
        }
        if !run.checks.is_empty() {
            let mut table = Table::new(&["check", "on", "found", "verdict", ""]);
            for check in &run.checks {
                table.row([
                    check.check.clone(),
                    check.on.clone(),
                    thousands(check.found),
                    check.verdict.words().to_owned(),
                    details(&check.details),
                ]);
            }
            table.print();
        }
        if run.quarantined > 0 {
            say!(
                "  {} set aside, kept with the release in its quarantine\n",
                count(usize::try_from(run.quarantined).unwrap_or(usize::MAX), "row")
            );
        }
    }

    /// How many rows were set aside.
    pub(super) fn quarantine(&self, counts: &[Counted]) {
        if self.json {
            return self.json(&json!({ "quarantine": counts }));
        }
        if counts.is_empty() {
            say!("no rows are set aside");
            return;
        }
        let mut table = Table::new(&["job", "release", "on", "check", "rows", ""]);
        for of in counts {
            let state = if of.waiting { "waiting" } else { "settled" };
            table.row([
                of.job.clone(),
                of.release.to_string(),
                of.on.clone(),
                of.check.clone(),
                thousands(of.rows),
                state.to_owned(),
            ]);
        }
        table.print();
    }

    /// What became of rows that were let go.
    pub(super) fn dismissed(&self, job: &str, record: Option<&LoadRecord>) {
        if self.json {
            return self.json(&json!({ "job": job, "release": record.map(|record| record.seq) }));
        }
        match record {
            Some(record) => say!(
                "{job}: let go by release {}; `floodmark quarantine show {job}` still has them",
                record.seq
            ),
            None => say!("{job}: no rows wait"),
        }
    }

    pub(super) fn state(&self, records: &[(String, Option<LoadRecord>)]) {
        if self.json {
            let records: BTreeMap<_, _> = records.iter().cloned().collect();
            return self.json(&json!(records));
        }
        for (job, record) in records {
            let Some(record) = record else {
                say!("{job}: nothing published yet\n");
                continue;
            };
            say!(
                "{job}: release {} of {}, committed {}\n",
                record.seq,
                record.incarnation,
                record.committed_at
            );
            let mut table = Table::new(&["source", "read up to"]);
            for (name, source) in &record.sources {
                let mark = match &source.mark {
                    None => "read whole".to_owned(),
                    Some(crate::watermark::Mark::Cursor(position)) => position.to_string(),
                    Some(crate::watermark::Mark::Files(files)) => count(files.len(), "file"),
                };
                table.row([name.clone(), mark]);
            }
            table.print();
        }
    }

    pub(super) fn connections(&self, project: &Project) {
        if self.json {
            let list: Vec<_> = project
                .connections
                .iter()
                .map(|(name, connection)| json!({ "connection": name, "kind": connection.connector.name }))
                .collect();
            return self.json(&json!({ "connections": list }));
        }
        let mut table = Table::new(&["connection", "kind", "what"]);
        for (name, connection) in &project.connections {
            table.row([
                name.clone(),
                connection.connector.name.to_owned(),
                connection.connector.summary.to_owned(),
            ]);
        }
        table.print();
    }

    /// A file that was made.
    pub(super) fn copied(&self, file: &str, rows: u64, bytes: u64) {
        if self.json {
            return self.json(&json!({ "file": file, "rows": rows, "bytes": bytes }));
        }
        say!("{file}: {} rows, {} bytes", thousands(rows), thousands(bytes));
    }

    /// What a connection offers; of a single table, its columns.
    pub(super) fn tables(&self, tables: &[CatalogTable]) {
        if self.json {
            let list: Vec<_> = tables
                .iter()
                .map(|table| {
                    let columns: Vec<_> =
                        table.columns.iter().map(|(name, of)| json!({ "column": name, "type": of })).collect();
                    json!({ "table": table.name, "schema": table.schema, "view": table.view, "rows": table.rows, "key": table.key, "cursors": table.cursors(), "columns": columns })
                })
                .collect();
            return self.json(&json!({ "tables": list }));
        }
        if let [table] = tables {
            let mut listed = Table::new(&["column", "type", ""]);
            let cursors = table.cursors();
            for (name, of) in &table.columns {
                let mut notes = Vec::new();
                notes.extend(table.key.contains(name).then_some("key"));
                notes.extend(cursors.contains(&name.as_str()).then_some("may be a cursor"));
                listed.row([name.clone(), of.clone(), notes.join(", ")]);
            }
            listed.print();
            return;
        }
        let mut listed = Table::new(&["table", "kind", "rows, about", "key", "may be a cursor", "columns"]);
        for table in tables {
            listed.row([
                table.name.clone(),
                if table.view { "view" } else { "table" }.to_owned(),
                table.rows.map(thousands).unwrap_or_default(),
                table.key.join(", "),
                table.cursors().join(", "),
                table.columns.len().to_string(),
            ]);
        }
        listed.print();
    }

    /// Files that no release lists, removed or only shown.
    pub(super) fn cleaned(&self, found: &[Found], dry_run: bool) {
        if self.json {
            return self.json(&json!({ "removed": !dry_run, "files": found }));
        }
        let bytes: u64 = found.iter().map(|file| file.bytes).sum();
        let (would, files) =
            (if dry_run { "would be removed" } else { "removed" }, count(found.len(), "file"));
        if found.is_empty() {
            say!("nothing to remove");
            return;
        }
        let mut table = Table::new(&["job", "file", "bytes", "written"]);
        for file in found {
            table.row([file.job.clone(), file.path.clone(), thousands(file.bytes), file.written_at.clone()]);
        }
        table.print();
        say!("{files} {would}, {} bytes", thousands(bytes));
    }

    /// What outputs hold, beside what their sources say.
    pub(super) fn reconciled(&self, reconciled: &Reconciled) {
        if self.json {
            return self.json(&json!(reconciled));
        }
        for warning in &reconciled.warnings {
            self.warning(&Problem::new(warning));
        }
        for compared in &reconciled.outputs {
            let what = match (compared.agrees(), compared.complete) {
                (true, _) => "agrees with its sources".to_owned(),
                (false, true) if compared.differences == 1 => "1 key differs".to_owned(),
                (false, true) => format!("{} keys differ", thousands(compared.differences)),
                (false, false) => format!("more than {} keys differ", thousands(compared.differences)),
            };
            say!("{}: {what} (release {} of `{}`)", compared.output, reconciled.release, reconciled.job);
            if compared.waiting > 0 {
                say!(
                    "  {} not compared: the next run writes {}",
                    count(usize::try_from(compared.waiting).unwrap_or(usize::MAX), "key"),
                    if compared.waiting == 1 { "it" } else { "them" }
                );
            }
            say!("");
            let (source, target) = (&compared.source, &compared.target);
            let mut table = Table::new(&["", "sources", "output", ""]);
            let equal = |same: bool| if same { "" } else { "differs" }.to_owned();
            table.row([
                "rows".to_owned(),
                thousands(source.rows),
                thousands(target.rows),
                equal(source.rows == target.rows),
            ]);
            for (column, sum) in &source.totals {
                let held = target.totals.get(column).cloned().unwrap_or_default();
                table.row([format!("sum of {column}"), grouped(sum), grouped(&held), equal(*sum == held)]);
            }
            let short = |hash: &str| hash.get(..16).unwrap_or(hash).to_owned();
            table.row([
                "row hash".to_owned(),
                short(&source.hash),
                short(&target.hash),
                equal(source.hash == target.hash),
            ]);
            table.print();
            if compared.differing.is_empty() {
                continue;
            }
            let mut head: Vec<&str> = compared.key.iter().map(String::as_str).collect();
            head.extend(["is", "in"]);
            let mut table = Table::new(&head);
            for difference in &compared.differing {
                let key = difference.key.values().map(|value| value.clone().unwrap_or("null".to_owned()));
                let is = match difference.kind {
                    Kind::Missing if difference.source_rows == 1 => "missing".to_owned(),
                    Kind::Missing => format!("missing {} times", difference.source_rows),
                    Kind::Extra => "in the output only".to_owned(),
                    Kind::Changed => "changed".to_owned(),
                    Kind::Repeated => format!(
                        "there {}, not {}",
                        times(difference.target_rows),
                        times(difference.source_rows)
                    ),
                };
                let null = |value: &Option<String>| value.clone().unwrap_or("null".to_owned());
                let columns = difference.columns.iter();
                let columns = columns.map(|(column, [source, target])| {
                    format!("{column}: {} -> {}", null(source), null(target))
                });
                table.row(key.chain([is, columns.collect::<Vec<_>>().join(", ")]));
            }
            table.print();
            let left = compared.differences - compared.differing.len() as u64;
            if left > 0 {
                say!("  and {} more; `--limit` lists them\n", thousands(left));
            }
        }
    }

    pub(super) fn reached(&self, name: &str, answer: &Result<Identity>) {
        match answer {
            Ok(identity) if self.json => {
                say!("{}", json!({ "connection": name, "reached": true, "identity": identity }));
            }
            Ok(identity) => say!("{name}: reached ({}, {})", identity.product, identity.place),
            Err(error) => {
                if self.json {
                    say!("{}", json!({ "connection": name, "reached": false }));
                } else {
                    say!("{name}: not reached");
                }
                self.error(error);
            }
        }
    }

    /// Bars on a terminal while runs go on; nothing elsewhere.
    pub(super) fn progress(&self, progress: Progress) -> Option<(runtime::TaskGuard, Cleared)> {
        if self.log_json || self.logs || !std::io::stderr().is_terminal() {
            return None;
        }
        let bars = Arc::new(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        let shown = Arc::clone(&bars);
        let known: Arc<Mutex<Vec<ProgressBar>>> = Arc::default();
        let task = runtime::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
                for (index, watched) in progress.watched().iter().enumerate() {
                    if index == known.len() {
                        let bar = shown.add(ProgressBar::new(0));
                        bar.set_prefix(watched.name.clone());
                        known.push(bar);
                    }
                    if let Some(bar) = known.get(index) {
                        show(bar, &watched.counter);
                    }
                }
            }
        });
        Some((task, Cleared(bars)))
    }
}

/// One line of progress, within 80 columns: what, rows, bytes, bytes in a second, and an estimate where the end is known.
fn show(bar: &ProgressBar, counter: &Counter) {
    let (rows, template) = match counter {
        Counter::Read(tap) => {
            let (read, total) = tap.progress();
            bar.set_position(read);
            if let Some(total) = total {
                bar.set_length(total);
            }
            let template = match total {
                _ if tap.is_complete() => "  {prefix:24.24} {msg:>18} {bytes:>11}          read",
                Some(_) => "  {prefix:24.24} {msg:>18} {bytes:>11} {bytes_per_sec:>13} {eta:>4}",
                None => "  {prefix:24.24} {msg:>18} {bytes:>11} {bytes_per_sec:>13}",
            };
            (tap.extracted(), template)
        }
        Counter::Staged(rows) => {
            (rows.load(Ordering::Relaxed), "  {prefix:24.24} {msg:>18}                    staged")
        }
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(format!("{} rows", thousands(rows)));
}

/// Clears the bars when the runs have ended.
#[derive(Debug)]
pub(super) struct Cleared(Arc<MultiProgress>);

impl Drop for Cleared {
    fn drop(&mut self) {
        drop(self.0.clear());
    }
}

fn problem_json(problem: &Problem) -> serde_json::Value {
    let place = problem.place.as_ref().map(|place| {
        let before = place.file.text.get(..place.span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        json!({ "file": place.file.path, "line": line, "column": column })
    });
    json!({ "message": problem.message, "place": place, "notes": problem.notes, "hint": problem.hint })
}

/// A panic is a bug of ours: said as one, with a file that says where, for whoever mends it.
pub(super) fn panic_hook(info: &PanicHookInfo<'_>) {
    let place = info.location().map(ToString::to_string).unwrap_or_default();
    tell!("error: this is a bug in floodmark, at {place}");
    tell!("  = note: releases are published whole or not at all: `floodmark state show` tells which were");
    match report(&place, info.payload_as_str().unwrap_or_default()) {
        Ok(path) => tell!("  = hint: Report it with the file {}, which holds no data.", path.display()),
        Err(error) => tell!("  = hint: Report it. No file about it could be written: {error}"),
    }
}

/// Writes down where a panic was, and says in which file.
fn report(place: &str, message: &str) -> std::io::Result<PathBuf> {
    use std::io::Write as _;
    let mut file = tempfile::Builder::new().prefix("floodmark-bug-").suffix(".txt").tempfile()?;
    writeln!(file, "floodmark {} at {place}", env!("CARGO_PKG_VERSION"))?;
    // A message may quote a value.
    writeln!(file, "{}\n", crate::secret::scrubbed(&without_values(message)))?;
    write!(file, "{}", std::backtrace::Backtrace::force_capture())?;
    let (_, path) = file.keep()?;
    Ok(path)
}

/// The first details of a check, and how many more there are; all of them are in the run's document.
fn details(all: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
    if all.len() > SHOWN { format!("{shown}; and {} more", all.len() - SHOWN) } else { shown }
}

fn sees(partial: bool, spool: bool) -> String {
    let what = if partial { "what is new" } else { "everything" };
    if spool { format!("{what}, written down once") } else { what.to_owned() }
}

fn columns(schema: &arrow::datatypes::Schema) -> serde_json::Value {
    schema
        .fields()
        .iter()
        .map(|field| json!({ "name": field.name(), "type": crate::types::describe(field.data_type()) }))
        .collect()
}

/// How often something is there.
fn times(number: usize) -> String {
    match number {
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        _ => format!("{} times", thousands(number as u64)),
    }
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{} {what}s", thousands(number as u64)) }
}

fn thousands(number: u64) -> String {
    grouped(&number.to_string())
}

/// A number with commas between thousands.
fn grouped(number: &str) -> String {
    let (sign, digits) = number.strip_prefix('-').map_or(("", number), |digits| ("-", digits));
    let (whole, fraction) =
        digits.split_once('.').map_or((digits, None), |(whole, fraction)| (whole, Some(fraction)));
    let mut text = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    match fraction {
        Some(fraction) => format!("{sign}{text}.{fraction}"),
        None => format!("{sign}{text}"),
    }
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{:02} s", milliseconds / 1000, milliseconds % 1000 / 10)
}

/// Columns that stand under each other: numbers to the right, text to the left.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&word| word.to_owned()).collect()] }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    fn print(&self) {
        let columns = self.rows.first().map_or(0, Vec::len);
        let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0))
            .collect();
        let numeric: Vec<bool> = (0..columns)
            .map(|column| {
                let mut cells = self
                    .rows
                    .iter()
                    .skip(1)
                    .map(|row| cell(row, column))
                    .filter(|text| !text.is_empty())
                    .peekable();
                cells.peek().is_some()
                    && cells.all(|text| {
                        text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b',' | b'.' | b'-'))
                    })
            })
            .collect();
        for row in &self.rows {
            let mut line = String::from(" ");
            for (column, (width, right)) in widths.iter().zip(&numeric).enumerate() {
                let text = cell(row, column);
                let padding = " ".repeat(width - text.chars().count());
                line.push(' ');
                line.push_str(&if *right { format!("{padding}{text}") } else { format!("{text}{padding}") });
                line.push(' ');
            }
            say!("{}", line.trim_end());
        }
        say!("");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_a_bug_says_where_and_holds_no_value() {
        let path = report("src/run.rs:1:2", "index 17 out of range for 'Ada Lovelace'").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(text.contains("src/run.rs:1:2") && text.contains("render"), "{text}");
        assert!(!text.contains("17 out") && !text.contains("Lovelace"), "{text}");
    }
}
