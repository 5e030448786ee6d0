//! Rows that were set aside, on their way through the job again.
//!
//! A row comes back to where it was set aside: a source's in the place of what is new there, a model's beside what the model
//! makes of that. From there it goes the way of every row, through models, checks and outputs, and is set aside again if it still
//! does not hold. The release that takes the rows also remembers that they wait no longer, so that none goes in twice.
//!
//! What is read whole on every run is not replayed: its rows come again by themselves. A model's row comes as the model made it: what
//! was joined to it then is not looked up again, except by a check with `references`.
//!
//! Not done: rows of lists and structs, which the quarantine keeps as text that cannot be read back.

use std::sync::Arc;

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{DataType, Field, Int64Type, Schema, SchemaRef},
};
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;
use indexmap::IndexMap;

use crate::{
    check::READABLE,
    connector::{
        columns::Misfit,
        json::{Object, UNREADABLE, append},
        rows::RowBuilder,
        scan::{POSITION_COLUMN, Scan, with_position},
        spec::{Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, Result},
    plan::{Output, Plan, Replay},
    record::Settled,
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

impl Waiting {
    /// Takes the rows that wait from a job's quarantine. Those of a source are counted in its tap, and set aside again where they
    /// still cannot be read.
    ///
    /// # Errors
    ///
    /// If a row has no place in the job any more, or does not fit its columns.
    pub async fn of(
        mut quarantine: SendableRecordBatchStream,
        plan: &Plan,
        replay: &Replay,
        settled: &Settled,
        seq: u64,
        taps: &IndexMap<String, Arc<Tap>>,
        scratch: &Scratch,
    ) -> Result<Self> {
        let settles = match replay.release {
            None => Settled::before(seq),
            Some(release) => {
                let mut releases = settled.releases.clone();
                releases.insert(release);
                Settled { before: settled.before, releases }
            }
        };
        let mut seats: IndexMap<(String, bool), Seat> = IndexMap::new();
        let mut spools: IndexMap<String, SpoolWriter> = IndexMap::new();
        let mut again: IndexMap<String, u64> = IndexMap::new();
        let mut count = 0;
        while let Some(batch) = quarantine.next().await {
            let batch = batch?;
            let seqs = batch.column(0).as_primitive::<Int64Type>();
            let text = |column: usize, row| batch.column(column).as_string::<i32>().value(row);
            for row in 0..batch.num_rows() {
                let release = seqs.value(row).cast_unsigned();
                if settled.holds(release) || replay.release.is_some_and(|only| only != release) {
                    continue;
                }
                let (on, raw) = (text(1, row), text(2, row) == READABLE);
                if !is_partial(plan, on, release)? {
                    *again.entry(on.to_owned()).or_default() += 1;
                    continue;
                }
                count += 1;
                let seat = match seats.entry((on.to_owned(), raw)) {
                    indexmap::map::Entry::Occupied(seat) => seat.into_mut(),
                    indexmap::map::Entry::Vacant(free) => free.insert(Seat::new(plan, on, raw)?),
                };
                let tap = taps.get(on);
                let spool = spools
                    .entry(on.to_owned())
                    .or_insert_with(|| SpoolWriter::new(on, Arc::clone(&seat.schema), scratch));
                seat.row(text(5, row), text(4, row), text(3, row), tap, spool)?;
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
        let warnings = again.into_iter().map(|(on, rows)| {
            format!("{rows} rows of `{on}` are not replayed: it is read whole on every run, and they come again by themselves")
        });
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
        // Versions of a history are put in order by their own time.
        let ordered = output.dimension.history && output.dimension.effective.is_some();
        if updated == 0 || ordered || !self.reaches(plan, &output.from) {
            return Ok(());
        }
        Err(Error::data(format!(
            "output `{}` holds {updated} of the rows that were set aside already, with other values",
            output.spec.name
        ))
        .note("what is there may be newer; the target is as it was")
        .hint("Look with `floodmark quarantine show`; if what was set aside is to win, add `--overwrite`. What a database holds now is read by `floodmark backfill`."))
    }

    /// Whether rows that waited go into a source or model.
    fn reaches(&self, plan: &Plan, relation: &str) -> bool {
        self.rows.contains_key(relation)
            || plan
                .models
                .get(relation)
                .is_some_and(|model| model.select.reads.iter().any(|read| self.reaches(plan, read)))
    }
}

/// Whether a source or model gives a run what is new only.
fn is_partial(plan: &Plan, on: &str, release: u64) -> Result<bool> {
    let stream = plan.streams.get(on).map(|stream| stream.partial);
    stream.or_else(|| plan.models.get(on).map(|model| model.partial)).ok_or_else(|| {
        Error::configuration(format!(
            "release {release} set rows of `{on}` aside, and job `{}` has no source or model of that name",
            plan.id.job
        ))
        .hint("Call it as it was called then, or replay other releases: `--release N`.")
    })
}

/// Where rows of one relation, kept in one spelling, become typed.
struct Seat {
    on: String,
    /// The columns that rows have in the job.
    schema: SchemaRef,
    /// How they are read back: as the source spells values, or as the quarantine does.
    scan: Box<Scan>,
    lines: Vec<Line>,
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
            (Some(stream), _) if stream.spool && stream.schema.field_with_name(POSITION_COLUMN).is_err() => {
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
        Self::of(spec, schema, stream.is_some())
    }

    /// The place of rows of `schema`, spelled as `stream` says.
    fn of(stream: StreamSpec, schema: SchemaRef, is_source: bool) -> Result<Self> {
        let on = stream.name.clone();
        let fields = schema.fields().iter().map(|field| {
            let read = readable(field.data_type()).ok_or_else(|| {
                Error::failed(format!(
                    "rows of `{on}` cannot be replayed: `{}` is {}",
                    field.name(),
                    describe(field.data_type())
                ))
                .note("the quarantine keeps such values as text that cannot be read back")
                .hint("Load them from the source again: `floodmark backfill`, or a file under a new name.")
            })?;
            Ok(Field::new(field.name(), read, true))
        });
        let spelled = Schema::new(fields.collect::<Result<Vec<_>>>()?);
        let scan = Scan::new(stream, Arc::new(spelled), Window::Whole);
        Ok(Self { on, schema, scan: Box::new(scan), lines: Vec::new(), is_source })
    }

    fn row(
        &mut self,
        row: &str,
        position: &str,
        reason: &str,
        tap: Option<&Arc<Tap>>,
        spool: &mut SpoolWriter,
    ) -> Result<()> {
        let owned = str::to_owned;
        self.lines.push(Line { row: owned(row), position: owned(position), reason: owned(reason) });
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
                    .note(error.to_string())
            })?;
            let value = |name: &str| object.0.iter().find(|(key, _)| key == name).map(|(_, raw)| *raw);
            let typed = if value(UNREADABLE).is_some() {
                Err(line.reason)
            } else {
                batch.row(
                    |index, builder| {
                        let name = names.get(index).copied().unwrap_or_default();
                        let raw = value(name)
                            .ok_or_else(|| Misfit("was not read when the row was set aside".to_owned()))?;
                        if nulls.iter().any(|null| null == raw.get()) {
                            builder.null();
                            return Ok(0);
                        }
                        append(builder, raw)
                    },
                    || line.position.clone(),
                )
            };
            let Err(why) = typed else { continue };
            self.take(&mut batch, tap, spool)?;
            if self.is_source {
                tap.reject(&self.scan.stream, line.position, why, || line.row)?;
            } else {
                return Err(Error::data(format!("a row of `{}` that was set aside does not fit any more: {}: {why}", self.on, line.position))
                    .hint("Rows of a model come back as the model made them: let it have these columns, or load them from the source again."));
            }
        }
        self.take(&mut batch, tap, spool)
    }

    fn take(&self, batch: &mut RowBuilder<'_>, tap: &Tap, spool: &mut SpoolWriter) -> Result<()> {
        let Some(rows) = batch.take(tap)? else { return Ok(()) };
        let arrays = rows.columns().iter().zip(self.schema.fields()).map(|(array, field)| {
            crate::functions::cast::cast_exactly(array, field.data_type()).map_err(|error| {
                error.while_doing(format!("rows of `{}` that were set aside do not fit", self.on))
            })
        });
        let arrays = arrays.collect::<Result<Vec<_>>>()?;
        spool.push(&RecordBatch::try_new(Arc::clone(&self.schema), arrays)?)
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
            Int16Array, Int64Array, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
            UInt64Array,
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
        let mut seat = Seat::of(stream, rows.schema(), false).unwrap();
        let spill = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 64 << 20, spill: spill.path().to_owned() };
        let mut spool = SpoolWriter::new("rows", rows.schema(), &Scratch::new(limits).unwrap());
        for row in 0..rows.num_rows() {
            seat.row(&row_json(&rows, row).unwrap(), "here", "", None, &mut spool).unwrap();
        }
        seat.flush(None, &mut spool).unwrap();
        let back: Vec<RecordBatch> = spool.finish().unwrap().stream().try_collect().await.unwrap();
        assert_eq!(concat_batches(&rows.schema(), &back).unwrap(), rows);
    }
}
