//! Whether outputs hold what their sources say: `floodmark reconcile`.
//!
//! The sources are read up to their watermarks, go through the job's models and row checks as in a run, and what comes of them is
//! compared with what the output holds. Rows are told apart by a key. Keys are cut into ranges; of each range both sides
//! count the rows and add up their hashes; ranges that differ are cut again, until their rows are few enough to be compared one by
//! one. Two sides that agree are read once; the memory grows with the keys that wait for the next run, and not with the tables.
//!
//! Rows that wait for the next run are left out: of a merge, the keys that were written behind a watermark. Not compared are earlier
//! versions of a history, and rows that the quarantine holds.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, RecordBatch, UInt64Array},
    compute::{concat_batches, take_record_batch},
    datatypes::{DataType, Schema, SchemaRef},
    row::{OwnedRow, RowConverter, SortField},
    util::display::{ArrayFormatter, FormatOptions},
};
use datafusion::{
    common::ScalarValue,
    logical_expr::{Expr, ident, lit},
    physical_plan::SendableRecordBatchStream,
    prelude::SessionContext,
};
use futures::StreamExt;
use indexmap::IndexMap;
use serde::Serialize;
use tracing::info;

use crate::{
    connector::{Connection, scan::ScanTable},
    error::{Error, ErrorKind, Result, nearest},
    extract::{Extract, Joins, Reading},
    history,
    names::quoted_list,
    plan::{self, Output, Plan, Promised, Request},
    record::{
        run::RunRecord,
        totals::{Totals, TotalsSpec},
    },
    run::{Conductor, Connections},
    session,
};

/// Keys that are sampled in one reading: the ranges that it may lead to.
const RANGES: usize = 1024;

/// Rows of both sides that are compared one by one, at most.
const FEW_ROWS: u64 = 200_000;

/// Readings after which ranges are cut no further: then their keys are all alike.
const READINGS: usize = 6;

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Question {
    /// Only this output.
    pub output: Option<String>,
    /// The columns that tell rows apart, in place of the output's own key.
    pub key: Vec<String>,
    /// How many differences to list, for each output.
    pub limit: usize,
}

/// A job's outputs, compared with its sources.
#[derive(Debug, Serialize)]
pub struct Reconciled {
    /// The job.
    pub job: String,
    /// The release that it was about.
    pub release: u64,
    /// Whether nothing differs.
    pub agrees: bool,
    /// Each output.
    pub outputs: Vec<Comparison>,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// One output.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Its name.
    pub output: String,
    /// The columns that tell its rows apart.
    pub key: Vec<String>,
    /// What the sources say.
    pub source: Side,
    /// What the output holds.
    pub target: Side,
    /// Keys that wait for the next run.
    pub waiting: u64,
    /// Into how many ranges the keys were cut.
    pub ranges: usize,
    /// How many keys differ; of those that were looked at, where not `complete`.
    pub differences: u64,
    /// Whether every range that differs was looked at.
    pub complete: bool,
    /// The first of them.
    pub differing: Vec<Difference>,
}

impl Comparison {
    /// Whether nothing differs.
    pub fn agrees(&self) -> bool {
        self.differences == 0 && self.complete
    }
}

/// All rows of one side together.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Side {
    /// How many.
    pub rows: u64,
    /// The sum of their hashes.
    pub hash: String,
    /// The exact sum of each column of numbers.
    pub totals: IndexMap<String, String>,
}

/// How a key differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The sources have it, and the output lacks it.
    Missing,
    /// The output has it, and the sources do not.
    Extra,
    /// Both have it, with other values.
    Changed,
    /// Both have it, and not equally often.
    Repeated,
}

/// One key that differs.
#[derive(Debug, Serialize)]
pub struct Difference {
    /// How.
    pub kind: Kind,
    /// Its values, by column; none is null.
    pub key: IndexMap<String, Option<String>>,
    /// How many rows the sources have of it.
    pub source_rows: usize,
    /// How many rows the output has of it.
    pub target_rows: usize,
    /// Of one row on each side: the columns that differ, in the sources and in the output.
    pub columns: IndexMap<String, [Option<String>; 2]>,
}

/// Compares the outputs of a job with its sources; once more, with joins that sort and spill, where a hash join does not fit.
///
/// # Errors
///
/// If the job has not run yet, something cannot be read, or the question fits no output.
pub async fn reconcile(
    conductor: &Conductor,
    job: &str,
    question: &Question,
    request: &Request,
) -> Result<Reconciled> {
    match Box::pin(with(Joins::Hashed, conductor, job, question, request)).await {
        Err(error) if error.kind() == ErrorKind::Memory => {
            Box::pin(with(Joins::Sorted, conductor, job, question, request)).await
        }
        compared => compared,
    }
}

async fn with(
    joins: Joins,
    conductor: &Conductor,
    job: &str,
    question: &Question,
    request: &Request,
) -> Result<Reconciled> {
    let document = conductor.project.jobs.get(job).ok_or_else(|| Error::bug("no such job"))?;
    let connections = conductor.connections(document)?;
    let promised = Promised::new();
    let mut plan =
        plan::plan(&conductor.project, document, request, &promised, &connections, &conductor.scratch)
            .await?;
    for stream in plan.streams.values_mut() {
        // They were set aside when they came; all of them together may be more than one run may have.
        stream.spec.max_bad_rows = u64::MAX;
    }
    let target = connections.get(&plan.target).ok_or_else(|| Error::bug("the target is not open"))?;
    let records = target.target().ok_or_else(|| Error::bug("the target cannot be written"))?;
    let base = records.last_record(&plan.id).await?.ok_or_else(|| {
        Error::configuration(format!("job `{job}` has not run yet"))
            .hint("Run it first: there is nothing to compare.")
    })?;
    let outputs = selected(&plan, question)?;
    let mut record = conductor.blank(document, request);
    let mut extract = Extract {
        plan: &plan,
        base: Some(&base),
        scratch: &conductor.scratch,
        conductor,
        request,
        joins,
        reading: Reading::Loaded,
    };
    let loaded = open(&extract, &connections, &mut record).await?;
    let partial = |output: &&Output| {
        let sources = plan.upstream(&output.from);
        output.spec.mode.needs_key()
            && sources.iter().any(|source| plan.streams.get(*source).is_some_and(|stream| stream.partial))
    };
    let behind = if outputs.iter().copied().any(|output| partial(&output)) {
        extract.reading = Reading::Waiting;
        Some(open(&extract, &connections, &mut record).await?)
    } else {
        None
    };
    let mut compared = Vec::new();
    for output in outputs {
        let shape = Shape::of(output, &question.key)?;
        let held = held(conductor, request, output, target).await?;
        let behind = behind.as_ref().filter(|_| partial(&output));
        compared.push(shape.compare(output, &loaded, behind, &held, question.limit).await?);
    }
    let now = records.last_record(&plan.id).await?;
    if now.is_none_or(|now| now.seq != base.seq) {
        return Err(Error::busy(format!("job `{job}` published while it was compared"))
            .hint("Ask again when no run goes on."));
    }
    let agrees = compared.iter().all(Comparison::agrees);
    Ok(Reconciled {
        job: job.to_owned(),
        release: base.seq,
        agrees,
        outputs: compared,
        warnings: record.warnings,
    })
}

/// The outputs that are meant.
fn selected<'a>(plan: &'a Plan, question: &Question) -> Result<Vec<&'a Output>> {
    let Some(wanted) = &question.output else { return Ok(plan.outputs.iter().collect()) };
    if let Some(output) = plan.outputs.iter().find(|output| output.spec.name == *wanted) {
        return Ok(vec![output]);
    }
    let error = Error::configuration(format!("job `{}` has no output `{wanted}`", plan.id.job));
    let names: Vec<&str> = plan.outputs.iter().map(|output| output.spec.name.as_str()).collect();
    Err(match nearest(wanted, names.iter().copied()) {
        Some(near) => error.hint(format!("Did you mean `{near}`?")),
        None => error.hint(format!("There are: {}.", names.join(", "))),
    })
}

/// The job's relations in a session.
async fn open(
    extract: &Extract<'_>,
    connections: &Connections,
    record: &mut RunRecord,
) -> Result<SessionContext> {
    let marks = history::marks(extract.plan, extract.base, &mut record.warnings)?;
    let relations = extract.relations(connections, &marks, record).await?;
    let mut relations = relations.ok_or_else(|| Error::bug("nothing was opened"))?;
    relations.tables.context()
}

/// What an output holds, as the table `t` of a session.
async fn held(
    conductor: &Conductor,
    request: &Request,
    output: &Output,
    target: &Arc<dyn Connection>,
) -> Result<SessionContext> {
    let (mut table, sources) = ScanTable::of_output(target, &output.spec.name).await?;
    table.selective = target.source().is_some_and(|source| source.applies_conditions(&table.scan.stream));
    let context = session::for_models(&conductor.scratch, request.as_of, Arc::new(sources));
    context.register_table("t", Arc::new(table))?;
    Ok(context)
}

/// What is compared of an output.
struct Shape {
    /// Its columns, those that a run keeps up to date.
    schema: SchemaRef,
    /// The columns that tell rows apart, by name and by place.
    key: Vec<String>,
    places: Vec<usize>,
    keys: RowConverter,
    rows: RowConverter,
}

/// A sum of hashes modulo 2^256: least significant limb first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct HashSum([u64; 4]);

impl HashSum {
    /// Adds the BLAKE3 of one row.
    fn add(&mut self, hash: &blake3::Hash) {
        let mut carry = false;
        for (limb, bytes) in self.0.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
            let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
            let (sum, over) = limb.overflowing_add(value);
            let (sum, over_again) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = over || over_again;
        }
    }
}

impl std::fmt::Display for HashSum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{d:016x}{c:016x}{b:016x}{a:016x}")
    }
}

/// One range of keys, on one side.
#[derive(Debug, Clone, Default)]
struct Range {
    rows: u64,
    hash: HashSum,
    /// A few of its keys, those whose rows have the smallest hashes: as good as drawn by lot.
    sample: BTreeMap<[u8; 8], OwnedRow>,
}

/// All keys, cut into ranges, some of which are looked at.
struct Cuts {
    /// Where one range ends and the next one begins.
    at: Vec<OwnedRow>,
    /// Whether each is looked at: one more than there are cuts.
    open: Vec<bool>,
}

impl Cuts {
    fn range_of(&self, key: &OwnedRow) -> Option<usize> {
        let range = self.at.partition_point(|cut| cut <= key);
        self.open.get(range).copied().unwrap_or_default().then_some(range)
    }
}

/// How often each key occurs, and the hashes of its rows: in the sources and in the output.
type Found = BTreeMap<OwnedRow, [Vec<[u8; 32]>; 2]>;

impl Shape {
    fn of(output: &Output, wanted: &[String]) -> Result<Self> {
        let spec = &output.spec;
        let kept = |name: &String| {
            let upheld = spec.update.is_empty() || spec.key.contains(name) || spec.update.contains(name);
            upheld && output.dimension.effective.as_ref() != Some(name)
        };
        let fields: Vec<_> =
            output.schema.fields().iter().filter(|field| kept(field.name())).cloned().collect();
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let key: Vec<String> = match (wanted, spec.key.as_slice()) {
            ([], []) => schema.fields().iter().map(|field| field.name().clone()).collect(),
            ([], own) => own.to_vec(),
            (wanted, _) => wanted.to_vec(),
        };
        let places = key
            .iter()
            .map(|name| {
                schema.index_of(name).map_err(|_| {
                    let error =
                        Error::configuration(format!("output `{}` has no column `{name}`", spec.name));
                    let known = schema.fields().iter().map(|field| field.name().as_str());
                    match nearest(name, known) {
                        Some(near) => error.hint(format!("Did you mean `{near}`?")),
                        None => error.hint("`--key` takes columns of the output."),
                    }
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let sorted = |places: &[usize]| -> Vec<SortField> {
            places.iter().map(|place| SortField::new(schema.field(*place).data_type().clone())).collect()
        };
        let all: Vec<usize> = (0..schema.fields().len()).collect();
        let (keys, rows) = (RowConverter::new(sorted(&places))?, RowConverter::new(sorted(&all))?);
        Ok(Self { keys, rows, schema, key, places })
    }

    /// The sources' side and the output's: their rows, with the columns that are compared.
    async fn rows_of(
        &self,
        context: &SessionContext,
        sql: &str,
        only: Option<&Expr>,
    ) -> Result<SendableRecordBatchStream> {
        let columns = quoted_list(self.schema.fields().iter().map(|field| field.name().as_str()))?;
        let mut rows = context.sql(&format!("SELECT {columns} FROM ({sql})")).await?;
        if let Some(only) = only {
            rows = rows.filter(only.clone())?;
        }
        Ok(session::conform(rows.execute_stream().await?, Arc::clone(&self.schema)))
    }

    async fn compare(
        &self,
        output: &Output,
        loaded: &SessionContext,
        behind: Option<&SessionContext>,
        held: &SessionContext,
        limit: usize,
    ) -> Result<Comparison> {
        let sql = match &output.dimension.effective {
            Some(effective) => self.latest(output, effective)?,
            None => output.sql()?,
        };
        let standing = output.dimension.standing();
        let sides = [(loaded, sql.as_str()), (held, standing.as_str())];
        let mut waiting = HashSet::new();
        if let Some(behind) = behind {
            let mut rows = self.rows_of(behind, &output.sql()?, None).await?;
            while let Some(batch) = rows.next().await {
                let keys = self.keys_of(&batch?)?;
                waiting.extend(keys.iter().map(|key| *blake3::hash(key.as_ref()).as_bytes()));
            }
        }
        let mut cuts = Cuts { at: Vec::new(), open: vec![true] };
        let (mut whole, mut only) = (None, None);
        let mut complete = true;
        for reading in 0.. {
            let mut counted = Vec::new();
            for (context, sql) in sides {
                let rows = self.rows_of(context, sql, only.as_ref()).await?;
                counted.push(self.count(rows, &cuts, &waiting, reading == 0).await?);
            }
            let [(source, source_totals), (target, target_totals)] =
                <[_; 2]>::try_from(counted).map_err(|_| Error::bug("two sides"))?;
            if whole.is_none() {
                let side = |ranges: &[Range], totals| Side {
                    rows: ranges.iter().map(|range| range.rows).sum(),
                    hash: ranges.first().map(|range| range.hash.to_string()).unwrap_or_default(),
                    totals,
                };
                whole = Some((side(&source, source_totals), side(&target, target_totals)));
            }
            let differs: Vec<bool> = source
                .iter()
                .zip(&target)
                .map(|(source, target)| (source.rows, source.hash) != (target.rows, target.hash))
                .collect();
            let both = || source.iter().zip(&target).zip(&differs).filter(|(_, differs)| **differs);
            let rows: u64 = both().map(|((source, target), _)| source.rows + target.rows).sum();
            info!(output = output.spec.name, reading, ranges = differs.len(), rows, "compared");
            let many = differs.iter().filter(|differs| **differs).count() > RANGES;
            if reading >= READINGS || rows <= FEW_ROWS || many {
                let mut room = FEW_ROWS;
                cuts.open = differs
                    .iter()
                    .zip(source.iter().zip(&target))
                    .map(|(differs, (source, target))| {
                        let fits = room >= source.rows + target.rows;
                        complete &= !*differs || fits;
                        let taken = *differs && fits;
                        room -= if taken { source.rows + target.rows } else { 0 };
                        taken
                    })
                    .collect();
                only = self.only(&cuts)?;
                break;
            }
            cuts = self.cut(&cuts, &differs, &source, &target);
            only = self.only(&cuts)?;
        }
        let mut found = Found::new();
        if cuts.open.contains(&true) {
            for (side, (context, sql)) in sides.into_iter().enumerate() {
                let mut rows = self.rows_of(context, sql, only.as_ref()).await?;
                while let Some(batch) = rows.next().await {
                    self.collect(&batch?, side, &cuts, &waiting, &mut found)?;
                }
            }
        }
        for sides in found.values_mut() {
            sides.iter_mut().for_each(|hashes| hashes.sort_unstable());
        }
        found.retain(|_, [source, target]| source != target);
        let differences = found.len() as u64;
        let listed: Found = found.into_iter().take(limit).collect();
        let mut rows = [Vec::new(), Vec::new()];
        if !listed.is_empty() {
            for ((context, sql), kept) in sides.into_iter().zip(&mut rows) {
                let mut stream = self.rows_of(context, sql, only.as_ref()).await?;
                while let Some(batch) = stream.next().await {
                    let batch = batch?;
                    let keys = self.keys_of(&batch)?;
                    let wanted = keys.iter().zip(0_u64..).filter(|(key, _)| listed.contains_key(key));
                    let wanted: UInt64Array = wanted.map(|(_, row)| row).collect::<Vec<_>>().into();
                    if !wanted.is_empty() {
                        kept.push(take_record_batch(&batch, &wanted)?);
                    }
                }
            }
        }
        let (source, target) = whole.unwrap_or_default();
        Ok(Comparison {
            output: output.spec.name.clone(),
            key: self.key.clone(),
            source,
            target,
            waiting: waiting.len() as u64,
            ranges: cuts.open.len(),
            differences,
            complete,
            differing: self.told(&listed, &rows)?,
        })
    }

    /// The last version that a history should have of each key.
    fn latest(&self, output: &Output, effective: &str) -> Result<String> {
        let key = quoted_list(output.spec.key.iter().map(String::as_str))?;
        let effective = crate::names::quoted(effective)?;
        Ok(format!(
            "SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY {effective} DESC) AS _last FROM ({})) WHERE _last = 1",
            output.sql()?
        ))
    }

    fn keys_of(&self, batch: &RecordBatch) -> Result<Vec<OwnedRow>> {
        let columns: Vec<ArrayRef> =
            self.places.iter().map(|place| Arc::clone(batch.column(*place))).collect();
        let keys = self.keys.convert_columns(&columns)?;
        Ok(keys.iter().map(|key| key.owned()).collect())
    }

    /// Counts the rows of each range that is looked at, adds up their hashes, and samples their keys; and adds up the columns
    /// of numbers, if that is wanted.
    async fn count(
        &self,
        mut rows: SendableRecordBatchStream,
        cuts: &Cuts,
        waiting: &HashSet<[u8; 32]>,
        total: bool,
    ) -> Result<(Vec<Range>, IndexMap<String, String>)> {
        let looked_at = cuts.open.iter().filter(|open| **open).count().max(1);
        let sampled = (RANGES / looked_at).max(8);
        let numbers =
            self.schema.fields().iter().filter(|field| {
                total && matches!(field.data_type(), DataType::Int64 | DataType::Decimal128(..))
            });
        let sum: Vec<String> = numbers.map(|field| field.name().clone()).collect();
        let mut totals = Totals::new(TotalsSpec { sum, by: Vec::new() });
        let mut ranges = vec![Range::default(); cuts.open.len()];
        while let Some(batch) = rows.next().await {
            let mut batch = batch?;
            let mut keys = self.keys_of(&batch)?;
            if !waiting.is_empty() {
                let stays: Vec<bool> =
                    keys.iter().map(|key| !waiting.contains(blake3::hash(key.as_ref()).as_bytes())).collect();
                batch = arrow::compute::filter_record_batch(&batch, &stays.clone().into())?;
                let mut stays = stays.into_iter();
                keys.retain(|_| stays.next().unwrap_or_default());
            }
            totals.add(&batch)?;
            let rows = self.rows.convert_columns(batch.columns())?;
            for (row, key) in rows.iter().zip(keys) {
                let Some(range) = cuts.range_of(&key).and_then(|range| ranges.get_mut(range)) else {
                    continue;
                };
                let hash = blake3::hash(row.as_ref());
                range.rows += 1;
                range.hash.add(&hash);
                let [a, b, c, d, e, f, g, h, ..] = *hash.as_bytes();
                let lot = [a, b, c, d, e, f, g, h];
                let full = range.sample.len() >= sampled;
                if !full || range.sample.last_key_value().is_some_and(|(last, _)| lot < *last) {
                    range.sample.insert(lot, key);
                    if full {
                        range.sample.pop_last();
                    }
                }
            }
        }
        let sums = totals.finish().into_iter().flat_map(|total| total.sums).collect();
        Ok((ranges, sums))
    }

    /// Cuts the ranges that differ at the keys that were sampled in them.
    fn cut(&self, cuts: &Cuts, differs: &[bool], source: &[Range], target: &[Range]) -> Cuts {
        let mut finer = Cuts { at: Vec::new(), open: Vec::new() };
        for (range, differs) in differs.iter().enumerate() {
            if *differs {
                let samples = [source.get(range), target.get(range)].into_iter().flatten();
                let mut keys: Vec<&OwnedRow> = samples.flat_map(|range| range.sample.values()).collect();
                keys.sort_unstable();
                keys.dedup();
                // The range's own start is a cut already.
                let start = range.checked_sub(1).and_then(|before| cuts.at.get(before));
                for key in keys.into_iter().filter(|key| Some(*key) != start) {
                    finer.at.push(key.clone());
                    finer.open.push(true);
                }
            }
            finer.open.push(*differs);
            finer.at.extend(cuts.at.get(range).cloned());
        }
        finer
    }

    /// What sources may leave out while a few ranges are looked at: rows beyond them, by the first column of the key.
    fn only(&self, cuts: &Cuts) -> Result<Option<Expr>> {
        let (Some(first), Some(last)) =
            (cuts.open.iter().position(|open| *open), cuts.open.iter().rposition(|open| *open))
        else {
            return Ok(None);
        };
        let Some(column) = self.key.first() else { return Ok(None) };
        let value = |cut: Option<&OwnedRow>| -> Result<Option<ScalarValue>> {
            let Some(cut) = cut else { return Ok(None) };
            let columns = self.keys.convert_rows([cut.row()])?;
            let first = columns.first().filter(|column| column.is_valid(0));
            Ok(first.map(|column| ScalarValue::try_from_array(column, 0)).transpose()?)
        };
        let low = value(first.checked_sub(1).and_then(|before| cuts.at.get(before)))?;
        let high = value(cuts.at.get(last))?;
        let bounds =
            [low.map(|low| ident(column).gt_eq(lit(low))), high.map(|high| ident(column).lt_eq(lit(high)))];
        let within = bounds.into_iter().flatten().reduce(Expr::and);
        // Nulls come first.
        Ok(within.map(|within| within.or(ident(column).is_null())))
    }

    /// Notes the rows of the ranges that are looked at, by key.
    fn collect(
        &self,
        batch: &RecordBatch,
        side: usize,
        cuts: &Cuts,
        waiting: &HashSet<[u8; 32]>,
        found: &mut Found,
    ) -> Result<()> {
        let rows = self.rows.convert_columns(batch.columns())?;
        for (row, key) in rows.iter().zip(self.keys_of(batch)?) {
            let waits = || waiting.contains(blake3::hash(key.as_ref()).as_bytes());
            if cuts.range_of(&key).is_none() || waits() {
                continue;
            }
            if let Some(hashes) = found.entry(key).or_default().get_mut(side) {
                hashes.push(*blake3::hash(row.as_ref()).as_bytes());
            }
        }
        Ok(())
    }

    /// The differences, for people.
    fn told(&self, listed: &Found, rows: &[Vec<RecordBatch>; 2]) -> Result<Vec<Difference>> {
        let [source, target] = rows;
        let (source, target) = (concat_batches(&self.schema, source)?, concat_batches(&self.schema, target)?);
        let (source_keys, target_keys) = (self.keys_of(&source)?, self.keys_of(&target)?);
        let options = FormatOptions::default();
        let shown = |array: &ArrayRef, row: usize| -> Result<Option<String>> {
            let shown = ArrayFormatter::try_new(array.as_ref(), &options)?.value(row).to_string();
            Ok(array.is_valid(row).then_some(shown))
        };
        let mut told = Vec::new();
        for (key, [in_source, in_target]) in listed {
            let at = |keys: &[OwnedRow]| keys.iter().position(|known| known == key);
            let (in_source_at, in_target_at) = (at(&source_keys), at(&target_keys));
            let kind = match (in_source.len(), in_target.len()) {
                (_, 0) => Kind::Missing,
                (0, _) => Kind::Extra,
                (a, b) if a == b => Kind::Changed,
                _ => Kind::Repeated,
            };
            let mut difference = Difference {
                kind,
                key: IndexMap::new(),
                source_rows: in_source.len(),
                target_rows: in_target.len(),
                columns: IndexMap::new(),
            };
            let (batch, row) = match (in_source_at, in_target_at) {
                (Some(row), _) => (&source, row),
                (None, Some(row)) => (&target, row),
                (None, None) => continue,
            };
            for (name, place) in self.key.iter().zip(&self.places) {
                difference.key.insert(name.clone(), shown(batch.column(*place), row)?);
            }
            if let (Kind::Changed, 1, Some(left), Some(right)) =
                (kind, in_source.len(), in_source_at, in_target_at)
            {
                for (place, field) in self.schema.fields().iter().enumerate() {
                    let values = [shown(source.column(place), left)?, shown(target.column(place), right)?];
                    if values[0] != values[1] {
                        difference.columns.insert(field.name().clone(), values);
                    }
                }
            }
            told.push(difference);
        }
        Ok(told)
    }
}
