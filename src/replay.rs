//! Rows that were set aside, on their way through the job again.
//!
//! A row comes back to where it was set aside: a source's in the place of what is new there, a model's beside what the model
//! makes of that. From there it goes the way of every row, through models, checks and outputs, and is set aside again if it still
//! does not hold. The release that takes the rows also remembers that they wait no longer, so that none goes in twice.
//!
//! What is read whole on every run is not replayed: its rows come again by themselves. A model's row comes as the model made it: what
//! was joined to it then is not looked up again, except by a check with `references`.
//!
//! A row that could not be read from a database is not replayed either: of it only some columns were asked for, and the database has it still.
//!
//! Not done: rows with lists and structs, which the quarantine keeps as text that cannot be read back.

use std::{collections::HashMap, sync::Arc};

use arrow::{
    array::AsArray,
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
};
use datafusion::{
    common::tree_node::TreeNodeRecursion, logical_expr::LogicalPlan, physical_plan::SendableRecordBatchStream,
};
use futures::StreamExt;
use indexmap::{IndexMap, map::Entry};
use serde_json::value::RawValue;

use crate::{
    check::{Check, lot},
    connector::{
        json::{Object, UNREADABLE, append},
        rows::RowBuilder,
        scan::{POSITION_COLUMN, Scan, with_position},
        spec::{Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, Result, without_values},
    plan::{Output, Plan, Replay, scanned},
    record::Settled,
    session,
    spool::{Scratch, Spool, SpoolWriter},
    types::{ColumnType, describe},
    watermark::Window,
};

/// The rows that wait, by the source or model that they were set aside of.
#[derive(Debug)]
pub struct Waiting {
    rows: IndexMap<String, Spool>,
    /// How many rows wait, also those that still cannot be read.
    pub count: u64,
    /// What waits no longer, once they are through.
    pub settled: Settled,
    /// What a person should know.
    pub warnings: Vec<String>,
}

/// What to do where rows that waited need others.
const READ_AGAIN: &str = "Read both from their sources again: `floodmark backfill`, files under a new name, or `floodmark run --full-refresh`.";

/// Under this key stands a row that the quarantine spelled, and that could not be read when it was replayed.
const PLAIN: &str = "{\"_floodmark_plain\":";

impl Waiting {
    /// Takes the rows that wait from a job's quarantine. Those of a source are counted in its tap, and set aside again where they
    /// still cannot be read. A row that was set aside by several releases, since each read it again, comes once.
    ///
    /// # Errors
    ///
    /// If a row has no place in the job any more, or does not fit its columns.
    pub async fn of(
        mut quarantine: SendableRecordBatchStream,
        plan: &Plan,
        replay: &Replay,
        settled: &Settled,
        taps: &IndexMap<String, Arc<Tap>>,
        scratch: &Scratch,
    ) -> Result<Self> {
        let (mut seats, mut spools) = (IndexMap::new(), IndexMap::new());
        let (mut settles, mut skipped, mut copies) = (settled.clone(), IndexMap::new(), Copies::default());
        let mut count = 0;
        while let Some(batch) = quarantine.next().await {
            let batch = batch?;
            let seqs = batch.column(0).as_primitive::<Int64Type>();
            let text = |column: usize, row| batch.column(column).as_string::<i32>().value(row);
            for row in 0..batch.num_rows() {
                let (release, on) = (seqs.value(row).cast_unsigned(), text(1, row));
                let lot = lot(release, on, text(2, row));
                if settled.holds(&lot) || replay.release.is_some_and(|only| only != release) {
                    continue;
                }
                let (kept, position) = (text(5, row), text(4, row));
                let plain = kept.strip_prefix(PLAIN).and_then(|kept| kept.strip_suffix('}'));
                let raw = lot.unread && plain.is_none();
                if let Some(why) = stays(plan, on, release, raw)? {
                    *skipped.entry((on.to_owned(), why)).or_insert(0_u64) += 1;
                    continue;
                }
                settles.lots.insert(lot);
                if !copies.is_new(release, on, position, kept) {
                    continue;
                }
                count += 1;
                let seat = match seats.entry((on.to_owned(), raw)) {
                    Entry::Occupied(seat) => seat.into_mut(),
                    Entry::Vacant(free) => free.insert(Seat::new(plan, on, raw)?),
                };
                let spool = spools
                    .entry(on.to_owned())
                    .or_insert_with(|| SpoolWriter::new(on, Arc::clone(&seat.schema), scratch));
                let owned = str::to_owned;
                let line = Line {
                    row: owned(plain.unwrap_or(kept)),
                    position: owned(position),
                    reason: owned(text(3, row)),
                };
                seat.row(line, taps.get(on), spool)?;
            }
        }
        for ((on, _), seat) in &mut seats {
            if let Some(spool) = spools.get_mut(on) {
                seat.flush(taps.get(on), spool)?;
            }
        }
        for tap in spools.keys().filter_map(|on| taps.get(on)) {
            tap.start();
            tap.finish();
        }
        let rows = spools.into_iter().map(|(on, spool)| Ok((on, spool.finish()?)));
        let warnings = skipped
            .into_iter()
            .map(|((on, why), rows)| format!("{rows} rows of `{on}` are not replayed, and wait on: {why}"));
        Ok(Self { rows: rows.collect::<Result<_>>()?, count, settled: settles, warnings: warnings.collect() })
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows that wait for a source or model.
    pub fn at(&self, relation: &str) -> Option<&Spool> {
        self.rows.get(relation)
    }

    /// Refuses to put rows that waited over rows that may be newer.
    ///
    /// # Errors
    ///
    /// What the output holds under their keys.
    pub fn refuse_overwriting(&self, plan: &Plan, output: &Output, updated: u64) -> Result<()> {
        if updated == 0 || !self.reaches(plan, &output.from) {
            return Ok(());
        }
        Err(Error::data(format!(
            "the rows that were set aside would change {updated} that output `{}` holds",
            output.spec.name
        ))
        .note("what is there may be newer; the target is as it was")
        .hint("Look with `floodmark quarantine show`; if what was set aside is to win, add `--overwrite`; if it is not needed any more, `floodmark quarantine dismiss`. What a database holds now is read by `floodmark backfill`."))
    }

    /// Refuses checks that look for rows that waited where nothing is read now.
    ///
    /// # Errors
    ///
    /// The first such check.
    pub fn refuse_looking(&self, plan: &Plan) -> Result<()> {
        let looks = |check: &&Check| check.spec.references.is_some() || check.spec.query.is_some();
        for check in plan.checks.iter().filter(looks).filter(|check| self.reaches(plan, &check.on)) {
            if let Some(unread) = check.reads().iter().find(|read| self.is_unread(plan, read)) {
                return Err(Error::data(format!(
                    "check `{}` on `{}` looks into `{unread}`, of which a replay reads nothing",
                    check.words(),
                    check.on
                ))
                .note("the target is as it was")
                .hint(READ_AGAIN));
            }
        }
        Ok(())
    }

    /// Whether a run would read what is new there, and a replay reads nothing.
    fn is_unread(&self, plan: &Plan, relation: &str) -> bool {
        is_partial(plan, relation) == Some(true) && !self.reaches(plan, relation)
    }

    /// Refuses a model in which rows that waited meet a source of which nothing is read now: they would find no partner there.
    ///
    /// # Errors
    ///
    /// The two that meet.
    pub fn refuse_meeting(&self, plan: &Plan, model: &str, logical: &LogicalPlan) -> Result<()> {
        let is_unread = |relation: &String| self.is_unread(plan, relation);
        let mut met = None;
        logical.apply_with_subqueries(|node| {
            let sides = match node {
                LogicalPlan::Join(join) => [scanned(&join.left), scanned(&join.right)],
                node => {
                    let mut inner = Vec::new();
                    node.apply_subqueries(|subquery| {
                        inner.extend(scanned(subquery));
                        Ok(TreeNodeRecursion::Continue)
                    })?;
                    [node.inputs().into_iter().flat_map(scanned).collect(), inner]
                }
            };
            let [left, right] = &sides;
            for (one, other) in [(left, right), (right, left)] {
                let waits = one.iter().find(|relation| self.reaches(plan, relation));
                met = met
                    .take()
                    .or(waits.cloned().zip(other.iter().find(|relation| is_unread(relation)).cloned()));
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        let Some((waits, unread)) = met else { return Ok(()) };
        Err(Error::data(format!(
            "model `{model}` joins rows of `{waits}` that were set aside with `{unread}`, of which a replay reads nothing"
        ))
        .note("they would find no partner there; the target is as it was")
        .hint(READ_AGAIN))
    }

    /// Whether rows that waited go into a source or model.
    pub fn reaches(&self, plan: &Plan, relation: &str) -> bool {
        self.rows.contains_key(relation)
            || plan
                .models
                .get(relation)
                .is_some_and(|model| model.select.reads.iter().any(|read| self.reaches(plan, read)))
    }
}

/// Whether a source or model gives a run what is new only.
fn is_partial(plan: &Plan, on: &str) -> Option<bool> {
    let stream = plan.streams.get(on).map(|stream| stream.partial);
    stream.or_else(|| plan.models.get(on).map(|model| model.partial))
}

/// Why a row is not replayed, if it is not.
fn stays(plan: &Plan, on: &str, release: u64, raw: bool) -> Result<Option<&'static str>> {
    let partial = is_partial(plan, on).ok_or_else(|| {
        Error::configuration(format!(
            "release {release} set rows of `{on}` aside, and job `{}` has no source or model of that name",
            plan.id.job
        ))
        .hint("Call it as it was called then, replay other releases (`--release N`), or let these go: `floodmark quarantine dismiss`.")
    })?;
    let of_database = plan
        .streams
        .get(on)
        .is_some_and(|stream| matches!(stream.spec.read, Read::Table(_) | Read::Query { .. }));
    Ok(if !partial {
        Some("it is read whole on every run, and they come again by themselves")
    } else if raw && of_database {
        Some("they could not be read from their database, which `floodmark backfill` reads again")
    } else {
        None
    })
}

/// Rows that several releases set aside, since each read them again.
#[derive(Default)]
struct Copies(HashMap<blake3::Hash, (u64, u32, u32)>);

impl Copies {
    /// Whether this row is not one that an earlier release had: equal rows of one release are rows of their own.
    fn is_new(&mut self, release: u64, on: &str, position: &str, row: &str) -> bool {
        let mut hash = blake3::Hasher::new();
        for part in [on, position, row] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let (last, nth, known) = self.0.entry(hash.finalize()).or_insert((release, 0, 0));
        if *last != release {
            (*last, *nth) = (release, 0);
        }
        *nth += 1;
        let is_new = *nth > *known;
        *known = (*known).max(*nth);
        is_new
    }
}

/// Where rows of one relation, kept in one spelling, become typed.
struct Seat {
    on: String,
    /// The columns that rows have in the job.
    schema: SchemaRef,
    /// Those that can be read back, and how: as the source spells values, or as the quarantine does.
    scan: Box<Scan>,
    lines: Vec<Line>,
    /// Whether values are spelled as the source does.
    raw: bool,
    is_source: bool,
}

/// A row of the quarantine.
struct Line {
    row: String,
    position: String,
    reason: String,
}

/// How many rows are typed at a time.
const ROWS: usize = 4096;

impl Seat {
    /// The place of `on`; `raw` rows are as the source spelled them, the others as the quarantine spells values.
    fn new(plan: &Plan, on: &str, raw: bool) -> Result<Self> {
        let stream = plan.streams.get(on);
        let schema = match (stream, plan.models.get(on)) {
            // Where rows are looked at once more, they bring their places with them.
            (Some(stream), _)
                if (stream.spool || plan.checks.iter().any(|check| check.on == on))
                    && stream.schema.field_with_name(POSITION_COLUMN).is_err() =>
            {
                with_position(&stream.schema)
            }
            (Some(stream), _) => Arc::clone(&stream.schema),
            (None, Some(model)) => Arc::clone(&model.schema),
            (None, None) => return Err(Error::bug(format!("no relation `{on}`"))),
        };
        let spec = match stream {
            Some(stream) if raw => stream.spec.clone(),
            Some(stream) => plain(stream.spec.clone()),
            None => plain(StreamSpec::whole(on, Read::Table(on.to_owned()))),
        };
        Ok(Self::of(spec, schema, raw, stream.is_some()))
    }

    /// The place of rows of `schema`, spelled as `stream` says.
    fn of(stream: StreamSpec, schema: SchemaRef, raw: bool, is_source: bool) -> Self {
        let fields = schema
            .fields()
            .iter()
            .filter_map(|field| readable(field.data_type()).map(|read| Field::new(field.name(), read, true)));
        let spelled = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        // The rows of many releases come at once.
        let stream = StreamSpec { max_bad_rows: u64::MAX, ..stream };
        let on = stream.name.clone();
        let scan = Box::new(Scan::new(stream, spelled, Window::Whole));
        Self { on, schema, scan, lines: Vec::new(), raw, is_source }
    }

    fn row(&mut self, line: Line, tap: Option<&Arc<Tap>>, spool: &mut SpoolWriter) -> Result<()> {
        self.lines.push(line);
        if self.lines.len() < ROWS { Ok(()) } else { self.flush(tap, spool) }
    }

    /// Types what there is.
    fn flush(&mut self, tap: Option<&Arc<Tap>>, spool: &mut SpoolWriter) -> Result<()> {
        let uncounted = Tap::default();
        let tap = tap.map_or(&uncounted, |tap| tap.as_ref());
        let names: Vec<&str> = self.scan.schema.fields().iter().map(|field| field.name().as_str()).collect();
        let mut batch = RowBuilder::new(&self.scan, |name| names.iter().position(|known| *known == name))?;
        // What a file writes for null, as the quarantine quotes it.
        let nulls = self.scan.stream.format.iter().flat_map(|format| &format.nulls);
        let nulls: Vec<String> =
            nulls.map(|word| serde_json::Value::from(word.as_str()).to_string()).collect();
        for line in std::mem::take(&mut self.lines) {
            let object: Object<'_> = serde_json::from_str(&line.row).map_err(|error| {
                Error::failed(format!("a row in the quarantine of `{}` is damaged", self.on))
                    .note(without_values(&error.to_string()))
            })?;
            let value = |name: &str| object.0.iter().find(|(key, _)| key == name).map(|(_, raw)| *raw);
            let typed = match self.unfit(&value, &line) {
                Some(why) => Err(why),
                None => batch.row(
                    |index, builder| match names.get(index).and_then(|name| value(name)) {
                        Some(raw) if !nulls.iter().any(|null| null == raw.get()) => append(builder, raw),
                        _ => {
                            builder.null();
                            Ok(0)
                        }
                    },
                    || line.position.clone(),
                ),
            };
            let Err(why) = typed else { continue };
            self.take(&mut batch, tap, spool)?;
            if self.is_source {
                let row = if self.raw { line.row } else { format!("{PLAIN}{}}}", line.row) };
                tap.reject(&self.scan.stream, line.position, why, || row)?;
            } else {
                return Err(Error::data(format!("a row of `{}` that was set aside does not fit any more: {}: {why}", self.on, line.position))
                    .hint("Rows of a model come back as the model made them: let it have these columns, or load them from the source again."));
            }
        }
        self.take(&mut batch, tap, spool)
    }

    /// Why a row has not the columns that are wanted, if it has not.
    fn unfit<'a>(&self, value: &impl Fn(&str) -> Option<&'a RawValue>, line: &Line) -> Option<String> {
        if value(UNREADABLE).is_some() {
            return Some(line.reason.clone());
        }
        self.schema.fields().iter().filter(|field| field.name() != POSITION_COLUMN).find_map(|field| {
            let name = field.name();
            match value(name) {
                None => Some(format!("`{name}` was not read when the row was set aside")),
                Some(raw) if readable(field.data_type()).is_none() && raw.get() != "null" => Some(format!(
                    "`{name}` is {}, which the quarantine keeps as text that cannot be read back",
                    describe(field.data_type())
                )),
                Some(_) => None,
            }
        })
    }

    fn take(&self, batch: &mut RowBuilder<'_>, tap: &Tap, spool: &mut SpoolWriter) -> Result<()> {
        let Some(rows) = batch.take(tap)? else { return Ok(()) };
        let rows = session::conformed(&rows, &self.schema).map_err(|error| {
            error.while_doing(format!("rows of `{}` that were set aside do not fit", self.on))
        })?;
        spool.push(&rows)
    }
}

/// A stream that spells values as the quarantine does.
fn plain(stream: StreamSpec) -> StreamSpec {
    StreamSpec { columns: IndexMap::new(), format: None, timezone: Some("UTC".to_owned()), ..stream }
}

/// The type in which text is read, for a column of `of`.
fn readable(of: &DataType) -> Option<DataType> {
    Some(match of {
        of if of.is_integer() && *of != DataType::UInt64 => DataType::Int64,
        DataType::UInt64 => DataType::Decimal128(20, 0),
        DataType::Float32 => DataType::Float64,
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        of => describe(of).parse::<ColumnType>().ok()?.arrow(),
    })
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{
            ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array,
            Int16Array, Int64Array, RecordBatch, StringArray, Time64MicrosecondArray,
            TimestampMicrosecondArray, UInt64Array,
        },
        compute::concat_batches,
    };
    use futures::TryStreamExt;

    use super::*;
    use crate::{check::row_json, runtime::Limits, types::UTC};

    #[tokio::test]
    async fn every_value_comes_back_as_it_was_set_aside() {
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("text", Arc::new(StringArray::from(vec![Some("a \"quoted\"\nline – €"), Some(""), None]))),
            ("int", Arc::new(Int64Array::from(vec![Some(i64::MAX), Some(i64::MIN), None]))),
            ("small", Arc::new(Int16Array::from(vec![Some(i16::MAX), Some(i16::MIN), None]))),
            ("huge", Arc::new(UInt64Array::from(vec![Some(u64::MAX), Some(0), None]))),
            (
                "money",
                Arc::new(
                    Decimal128Array::from(vec![Some(10_i128.pow(38) - 1), Some(-1), None])
                        .with_precision_and_scale(38, 10)
                        .unwrap(),
                ),
            ),
            ("float", Arc::new(Float64Array::from(vec![Some(0.1 + 0.2), Some(5e-324), None]))),
            ("single", Arc::new(Float32Array::from(vec![Some(0.1), Some(f32::MAX), None]))),
            ("bool", Arc::new(BooleanArray::from(vec![Some(true), Some(false), None]))),
            ("day", Arc::new(Date32Array::from(vec![Some(-719_162), Some(2_932_896), None]))),
            (
                "wall",
                Arc::new(TimestampMicrosecondArray::from(vec![
                    Some(-1),
                    Some(253_402_300_799_999_999),
                    None,
                ])),
            ),
            (
                "instant",
                Arc::new(
                    TimestampMicrosecondArray::from(vec![Some(-1), Some(1_761_440_400_000_001), None])
                        .with_timezone(UTC),
                ),
            ),
            ("time", Arc::new(Time64MicrosecondArray::from(vec![Some(0), Some(86_399_999_999), None]))),
            ("bytes", Arc::new(BinaryArray::from(vec![Some(&[0_u8, 255][..]), Some(&[]), None]))),
        ];
        let rows = RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, array)| (name, array, true)),
        )
        .unwrap();
        let stream = plain(StreamSpec::whole("rows", Read::Table("rows".to_owned())));
        let mut seat = Seat::of(stream, rows.schema(), false, false);
        let spill = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 64 << 20, spill: spill.path().to_owned() };
        let mut spool = SpoolWriter::new("rows", rows.schema(), &Scratch::new(&limits).unwrap());
        for row in 0..rows.num_rows() {
            let line = Line {
                row: row_json(&rows, row).unwrap(),
                position: "here".to_owned(),
                reason: String::new(),
            };
            seat.row(line, None, &mut spool).unwrap();
        }
        seat.flush(None, &mut spool).unwrap();
        let back: Vec<RecordBatch> = spool.finish().unwrap().stream().try_collect().await.unwrap();
        assert_eq!(concat_batches(&rows.schema(), &back).unwrap(), rows);
    }
}
