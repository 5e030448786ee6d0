//! Lists of an API as rows.

use std::{
    collections::{BTreeMap, HashSet},
    io::{BufReader, BufWriter, Read as _, Seek as _, Write as _},
    sync::Arc,
};

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, TimeDelta, Utc};
use chrono_tz::Tz;
use datafusion::physical_plan::SendableRecordBatchStream;
use reqwest::header::{self, HeaderMap};
use serde_json::value::RawValue;
use url::Url;

use super::{
    HttpConnection,
    client::{Answer, Api, Ask, insert_all, shown},
    files::{Fetched, request_for},
    path::{JsonPath, list, token},
};
use crate::{
    connector::{
        Bounds, Exactness, Marks, RunTime, Snapshot, Source,
        columns::{self, Misfit, TextRules, declared_schema, effective, last_closed_day},
        json::{Object, Scalar, append, kept, unreadable},
        rows::RowBuilder,
        scan::{Scan, held},
        spec::{ApiRequest, CursorSpec, Method, OnNull, PageStyle, Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, ErrorKind, Result, without_values},
    runtime::{self, AsyncSender},
    types::ColumnType,
    watermark::{CursorValue, Mark, Position, Window},
};

/// A list that shifts is read so often at most, until two readings are equal.
const READINGS: usize = 5;

/// The files of a run. Nothing is held open between the pages of an API.
#[derive(Default)]
struct Opened(BTreeMap<String, (Arc<Fetched>, Snapshot)>);

#[async_trait]
impl Source for Arc<HttpConnection> {
    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        if let Some(request) = request_for(stream)? {
            let file = self.file(stream, &request).await?;
            return file.source()?.describe(&file.stream(stream)).await;
        }
        request_of(stream)?;
        if let Some(cursor) = &stream.cursor {
            cursor_type(stream, cursor)?;
            told(DateTime::<Utc>::default(), request_of(stream)?.time_format.as_deref(), stream)?;
        }
        Ok(Arc::new(declared_schema(stream)))
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        let mut bounds = Bounds::default();
        let mut clock = None;
        for stream in streams {
            let Some(cursor) = &stream.cursor else {
                bounds.windows.insert(stream.name.clone(), Window::Whole);
                continue;
            };
            let now = match clock {
                Some(now) => now,
                None => *clock.insert(self.api.clock().await?.unwrap_or(time.now)),
            };
            let margin = TimeDelta::milliseconds(self.limits.margin_ms.into());
            let latest = (now - margin).min(time.as_of);
            let shown = cursor.columns.first().and_then(|column| stream.declared(column));
            let latest = match (shown, &stream.timezone) {
                (Some(ColumnType::Timestamp(_)), Some(zone)) => {
                    columns::last_closed_instant(latest, columns::zone(zone)?, cursor.overlap)
                }
                _ => latest,
            };
            let latest = told(latest, request_of(stream)?.time_format.as_deref(), stream)?;
            let hi = match cursor_type(stream, cursor)? {
                ColumnType::Date(_) => CursorValue::Date(last_closed_day(latest, stream)?),
                _ => CursorValue::instant(latest),
            };
            // A clock that is behind the one that answered last time has nothing new yet.
            let hi = match since.get(&stream.name) {
                Some(Mark::Cursor(lo))
                    if lo.0.first().is_some_and(|lo| lo.kind() == hi.kind() && *lo > hi) =>
                {
                    lo.0.first().cloned().unwrap_or(hi)
                }
                _ => hi,
            };
            bounds.follow(stream, since.get(&stream.name), Some(Position::of(hi)), Exactness::Margin)?;
        }
        Ok(bounds)
    }

    async fn snapshot(&self, streams: &[StreamSpec], bounds: &Bounds) -> Result<Snapshot> {
        let mut opened = Opened::default();
        for stream in streams {
            if let Some(request) = request_for(stream)? {
                let file = self.file(stream, &request).await?;
                let snapshot = file.source()?.snapshot(&[file.stream(stream)], bounds).await?;
                opened.0.insert(stream.name.clone(), (file, snapshot));
            }
        }
        Ok(Snapshot { token: format!("http:{}", shown(&self.api.base)), hold: Arc::new(opened) })
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        let opened: Arc<Opened> = held(snapshot)?;
        if let Some((file, snapshot)) = opened.0.get(&scan.stream.name) {
            let of_folder = Scan { stream: file.stream(&scan.stream), ..scan.clone() };
            return file.source()?.scan(snapshot, &of_folder, tap);
        }
        let (this, scan) = (Self::clone(self), scan.clone());
        Ok(runtime::stream(Arc::clone(&scan.schema), move |out| async move {
            Reading::new(&this, &scan, &tap, &out)?.run().await
        }))
    }
}

fn request_of(stream: &StreamSpec) -> Result<&ApiRequest> {
    match &stream.read {
        Read::Request(request) => Ok(request),
        _ => Err(Error::configuration(format!("source `{}` asks nothing of an API", stream.name))
            .hint("Use `request: { path: … }`.")),
    }
}

/// Where a column is in a row, if the job says it in a way that can be followed.
fn path_of(request: &ApiRequest, column: &str) -> Option<JsonPath> {
    match request.fields.get(column) {
        Some(written) => written.parse().ok(),
        None => Some(JsonPath::name(column)),
    }
}

/// The first request of a list, with the window's ends in it.
pub(super) fn first_of(
    api: &Api,
    stream: &StreamSpec,
    request: &ApiRequest,
    ends: &(Option<String>, Option<String>),
) -> Result<Ask> {
    let wrong = |what: String| Error::configuration(format!("source `{}`: {what}", stream.name));
    let bound = |text: &str| -> Option<String> {
        let mut missing = false;
        let bound = crate::connector::spec::with_values(text, |name| {
            let end = if name == "from" { &ends.0 } else { &ends.1 };
            end.clone().unwrap_or_else(|| {
                missing = true;
                String::new()
            })
        });
        (!missing).then_some(bound)
    };
    let path = bound(&request.path)
        .ok_or_else(|| wrong("`path` needs `$from`, and there is none before the first run".to_owned()))?;
    let mut url = api
        .base
        .join(path.trim_start_matches('/'))
        .map_err(|error| wrong(format!("`path` is none: {error}")))?;
    if !url.path().starts_with(api.base.path()) {
        return Err(
            wrong("`path` leaves the connection's `url`".to_owned()).hint("Mend `url` in connections.yaml.")
        );
    }
    for (name, value) in &request.query {
        if let Some(value) = bound(value) {
            url.query_pairs_mut().append_pair(name, &value);
        }
    }
    let body = match &request.body {
        Some(body) => Some(bound(body).ok_or_else(|| {
            wrong("`body` needs `$from`, and there is none before the first run".to_owned())
        })?),
        None => None,
    };
    let mut headers = HeaderMap::new();
    let written = request.headers.iter().filter_map(|(name, value)| Some((name.clone(), bound(value)?)));
    insert_all(&mut headers, &written.collect()).map_err(wrong)?;
    if let Some(pages) = &request.pages {
        if let Some(size) = pages.size {
            let param = pages.size_param.as_deref().unwrap_or("limit");
            set(&mut url, param, &size.to_string());
        }
        match pages.kind {
            PageStyle::Offset => set(&mut url, pages.param.as_deref().unwrap_or("offset"), "0"),
            PageStyle::Page => {
                let first = pages.first.unwrap_or(1).to_string();
                set(&mut url, pages.param.as_deref().unwrap_or("page"), &first);
            }
            _ => {}
        }
    }
    let repeatable = request.method == Method::Get || request.repeatable;
    Ok(Ask { method: request.method, url, headers, body, repeatable })
}

/// The type of a cursor: an API's windows are of time.
fn cursor_type(stream: &StreamSpec, cursor: &CursorSpec) -> Result<ColumnType> {
    let declared = match cursor.columns.as_slice() {
        [one] => stream.declared(one).map(|column| effective(column, stream)),
        _ => None,
    };
    match declared {
        Some(column @ (ColumnType::TimestampTz(_) | ColumnType::Date(_))) => Ok(column),
        _ => Err(Error::configuration(format!(
            "source `{}`: the cursor of an API is one column, a date or a timestamp with a zone",
            stream.name
        ))
        .hint("An API cannot be asked for its greatest number before it is read.")),
    }
}

/// The latest instant, not after `at`, that can be told to the API: what a format cannot express is not asked for, and must not
/// count as read.
fn told(at: DateTime<Utc>, format: Option<&str>, stream: &StreamSpec) -> Result<DateTime<Utc>> {
    let rounded = match format {
        None | Some("rfc3339") => return Ok(at),
        Some("unix") => DateTime::from_timestamp(at.timestamp(), 0),
        Some("unix_ms") => DateTime::from_timestamp_millis(at.timestamp_millis()),
        Some(format) => {
            let zone = zone_of(stream)?;
            // A format with an offset tells the two passes of a repeated hour apart.
            let offset = |at: DateTime<Utc>| at.with_timezone(&zone).format(format).to_string();
            let told_apart = DateTime::parse_from_str(&offset(at), format).is_ok();
            let at = if told_apart { at } else { columns::last_closed_instant(at, zone, None) };
            let text = at.with_timezone(&zone).format(format).to_string();
            let local = NaiveDateTime::parse_from_str(&text, format).or_else(|_| {
                NaiveDate::parse_from_str(&text, format).map(|day| day.and_time(NaiveTime::MIN))
            });
            let wall = local.ok().and_then(|local| columns::in_zone(&local, zone).ok());
            let wall = wall.and_then(DateTime::from_timestamp_micros);
            DateTime::parse_from_str(&text, format).ok().map(|at| at.to_utc()).or(wall)
        }
    };
    rounded.filter(|rounded| *rounded <= at).ok_or_else(|| {
        let format = format.unwrap_or_default();
        Error::configuration(format!(
            "source `{}`: `time_format: {format}` does not say a time that can be read back",
            stream.name
        ))
        .hint("Write at least the year, the month and the day: `%Y-%m-%d`, `%Y-%m-%dT%H:%M:%S%z`.")
    })
}

/// The zone in which an API's times without one are meant.
fn zone_of(stream: &StreamSpec) -> Result<Tz> {
    Ok(stream.timezone.as_deref().map(columns::zone).transpose()?.unwrap_or(Tz::UTC))
}

/// One list, being read.
struct Reading<'a> {
    this: &'a HttpConnection,
    scan: &'a Scan,
    tap: &'a Tap,
    out: &'a AsyncSender,
    request: &'a ApiRequest,
    records: Option<JsonPath>,
    /// Where each column of the scan is in a row.
    fields: Vec<(String, JsonPath)>,
    cursor: Option<(JsonPath, ColumnType, OnNull)>,
    rules: TextRules,
    batch: RowBuilder<'a>,
    page: u64,
    /// Nobody reads any more.
    done: bool,
}

/// Where a page's rows go.
enum Sink<'s> {
    /// On their way to the models.
    Rows,
    /// Into a file, and into a sum that tells one reading from another.
    Copy(&'s mut Copied),
}

/// A reading of a list that may have shifted.
struct Copied {
    file: BufWriter<std::fs::File>,
    rows: u64,
    sum: u128,
}

impl<'a> Reading<'a> {
    fn new(this: &'a HttpConnection, scan: &'a Scan, tap: &'a Tap, out: &'a AsyncSender) -> Result<Self> {
        let stream = &scan.stream;
        let request = request_of(stream)?;
        let path = |written: &str| {
            written.parse::<JsonPath>().map_err(|why| {
                Error::configuration(format!(
                    "source `{}`: `{written}` is no path into an answer: {why}",
                    stream.name
                ))
            })
        };
        let field = |column: &str| match request.fields.get(column) {
            Some(written) => path(written),
            None => Ok(JsonPath::name(column)),
        };
        let fields = scan
            .schema
            .fields()
            .iter()
            .map(|column| Ok((column.name().clone(), field(column.name())?)))
            .collect::<Result<Vec<_>>>()?;
        let cursor = match &stream.cursor {
            Some(cursor) => {
                let column = cursor.columns.first().map(String::as_str).unwrap_or_default();
                Some((field(column)?, cursor_type(stream, cursor)?, cursor.on_null))
            }
            None => None,
        };
        let names: Vec<String> = fields.iter().map(|(name, _)| name.clone()).collect();
        let batch = RowBuilder::new(scan, |name| names.iter().position(|known| known == name))?;
        Ok(Self {
            this,
            scan,
            tap,
            out,
            request,
            records: request.records.as_deref().map(path).transpose()?,
            fields,
            cursor,
            rules: TextRules::of(stream)?,
            batch,
            page: 0,
            done: false,
        })
    }

    async fn run(mut self) -> Result<()> {
        let shifts = self.request.pages.as_ref().is_some_and(|pages| pages.kind.shifts() && !pages.stable);
        if shifts {
            self.settled().await?;
        } else {
            self.all_pages(&mut Sink::Rows).await?;
        }
        if let Some(batch) = self.batch.take(self.tap)?
            && !self.out.send(batch).await
        {
            return Ok(());
        }
        if !self.done {
            self.tap.finish();
        }
        Ok(())
    }

    fn data(&self, what: &str) -> Error {
        Error::data(format!("source `{}`: {what}", self.scan.stream.name))
    }

    /// Reads a list that may shift until two readings are equal, then hands that one over.
    async fn settled(&mut self) -> Result<()> {
        let mut before: Option<(u64, u128)> = None;
        for _ in 0..READINGS {
            let spill = &self.this.limits.spill;
            let made = std::fs::create_dir_all(spill).and_then(|()| tempfile::tempfile_in(spill));
            let file = made.map_err(|error| Error::io("write a copy into", spill.display(), error))?;
            let mut copied = Copied { file: BufWriter::new(file), rows: 0, sum: 0 };
            self.page = 0;
            self.all_pages(&mut Sink::Copy(&mut copied)).await?;
            let found = (copied.rows, copied.sum);
            if before == Some(found) {
                return self.replay(copied).await;
            }
            before = Some(found);
        }
        Err(Error::temporary(format!(
            "source `{}`: the list changed during each of {READINGS} readings, so that no page can be trusted",
            self.scan.stream.name
        ))
        .hint("Run when it keeps still; or use pages that do not shift (`kind: cursor`, `link`), or a window of time."))
    }

    async fn replay(&mut self, copied: Copied) -> Result<()> {
        let failed = |error| Error::io("read a copy of", &self.scan.stream.name, error);
        let mut file = copied.file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        let mut reader = BufReader::new(file);
        for number in 1..=copied.rows {
            let mut length = [0; 8];
            reader.read_exact(&mut length).map_err(failed)?;
            let mut text = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap_or_default()];
            reader.read_exact(&mut text).map_err(failed)?;
            let text = String::from_utf8(text).map_err(|_| Error::bug("a copied row is not UTF-8"))?;
            let raw: &RawValue =
                serde_json::from_str(&text).map_err(|_| Error::bug("a copied row is no JSON"))?;
            self.row(raw, &format!("record {number}")).await?;
            if self.done {
                break;
            }
        }
        Ok(())
    }

    /// Reads the list from its first page to its end.
    async fn all_pages(&mut self, sink: &mut Sink<'_>) -> Result<()> {
        let mut ask = self.first()?;
        let mut seen = HashSet::new();
        let mut offset = 0;
        while !self.done {
            self.page += 1;
            if self.page > self.this.limits.pages {
                return Err(self
                    .data(&format!("the list has more than {} pages", self.this.limits.pages))
                    .hint("If that is right, raise `max_pages`."));
            }
            let answer = self.this.api.ask(&ask).await?;
            self.tap.bytes(answer.body.len() as u64);
            let rows = self.take_page(&answer, sink).await?;
            offset += rows;
            let Some(next) = self.next(&ask, &answer, rows, offset)? else { return Ok(()) };
            // A page that shows the way to one that was read before would go on for ever.
            let fingerprint = (next.url.to_string(), next.body.clone());
            if !seen.insert(fingerprint) {
                return Err(self
                    .data(&format!("page {} leads back to a page that was read before", self.page))
                    .hint("The API's paging goes in a circle: ask its owner, or mend `pages`."));
            }
            ask = next;
        }
        Ok(())
    }

    /// The first request, with the window's ends in it.
    fn first(&self) -> Result<Ask> {
        first_of(&self.this.api, &self.scan.stream, self.request, &self.ends())
    }

    /// `$from` and `$until`, as the API wants them.
    fn ends(&self) -> (Option<String>, Option<String>) {
        let Window::Cursor { from, hi, .. } = &self.scan.window else { return (None, None) };
        let format = self.request.time_format.as_deref();
        // Times of the rows without a zone are read in the stream's own, and so it is asked for them.
        let zone = self.rules.zone().unwrap_or(Tz::UTC);
        let written = |position: &Position| match position.0.first() {
            Some(CursorValue::Date(day)) => Some(match format {
                None | Some("rfc3339") => day.to_string(),
                Some("unix") => midnight(*day).timestamp().to_string(),
                Some("unix_ms") => midnight(*day).timestamp_millis().to_string(),
                Some(format) => day.format(format).to_string(),
            }),
            Some(CursorValue::Instant(at)) => Some(match format {
                None | Some("rfc3339") => at.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true),
                Some("unix") => at.timestamp().to_string(),
                Some("unix_ms") => at.timestamp_millis().to_string(),
                Some(format) => at.with_timezone(&zone).format(format).to_string(),
            }),
            _ => None,
        };
        (from.as_ref().and_then(written), written(hi))
    }

    /// The rows of one page. Returns how many the page has.
    async fn take_page(&mut self, answer: &Answer, sink: &mut Sink<'_>) -> Result<u64> {
        let place = format!("page {} of `{}`", self.page, shown(&answer.url));
        let kind = answer
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if !kind.is_empty() && kind != "application/json" && kind != "text/json" && !kind.ends_with("+json") {
            return Err(self
                .data(&format!("{place} is `{kind}`, and no JSON"))
                .hint(if kind == "text/csv" { "Read it as a file: `format: { kind: csv }`." } else { "Often that is a login page, or a proxy's: look at it in a browser, and mend `url` or `auth`." }));
        }
        let text =
            std::str::from_utf8(&answer.body).map_err(|_| self.data(&format!("{place} is not UTF-8")))?;
        let root: &RawValue = serde_json::from_str(text).map_err(|error| {
            self.data(&format!("{place} is no JSON document, or breaks off"))
                .note(without_values(&error.to_string()))
                .hint("Ask the API's owner; nothing of this run was published.")
        })?;
        let broken = |why: String| self.data(&format!("{place}: {why}"));
        let found = match &self.records {
            Some(path) => path.find(root).map_err(broken)?,
            None => vec![root],
        };
        let empty_list = match &self.records {
            Some(path) if found.is_empty() && path.ends_with_all() => {
                !path.parent().find(root).map_err(broken)?.is_empty()
            }
            _ => false,
        };
        if found.is_empty() && !empty_list {
            let path = self.request.records.as_deref().unwrap_or("$");
            return Err(self
                .data(&format!("{place} has nothing at `{path}`"))
                .hint("Mend `records:`; an answer with nothing there may be an error message in disguise."));
        }
        let mut rows = Vec::new();
        for value in found {
            match value.get().bytes().next() {
                Some(b'[') => rows.extend(list(value).map_err(broken)?),
                Some(b'{') => rows.push(value),
                // An empty list, as some write it; beside an error it is the error's.
                Some(b'n') if !says_error(root) => {}
                _ => {
                    return Err(self.data(&format!(
                        "{place} has no list of objects at `{}`",
                        self.request.records.as_deref().unwrap_or("$")
                    )));
                }
            }
        }
        for (index, raw) in rows.iter().enumerate() {
            match sink {
                Sink::Rows => {
                    self.row(raw, &format!("page {} record {}", self.page, index + 1)).await?;
                    if self.done {
                        break;
                    }
                }
                Sink::Copy(copied) => copied.add(raw.get()).map_err(|error| {
                    Error::io("write a copy into", self.this.limits.spill.display(), error)
                })?,
            }
        }
        Ok(rows.len() as u64)
    }

    /// One row: into the batch, filtered, or set aside.
    async fn row(&mut self, raw: &RawValue, place: &str) -> Result<()> {
        let stream = &self.scan.stream;
        let (fields, request) = (&self.fields, self.request);
        let reject = |reason: String| {
            let value = |path: &JsonPath| path.find(raw).ok().and_then(|found| found.first().copied());
            // Also those that no model reads now.
            let paths: Vec<_> =
                stream.columns.keys().filter_map(|name| Some((name, path_of(request, name)?))).collect();
            (reason, kept(paths.iter().map(|(name, path)| (name.as_str(), value(path)))))
        };
        let broken = match serde_json::from_str::<Object<'_>>(raw.get()) {
            Err(error) => {
                let why = format!("the record is no JSON object: {}", without_values(&error.to_string()));
                Some((why, unreadable(raw.get())))
            }
            Ok(_) => match self.is_meant(raw) {
                Err(why) => Some(reject(why)),
                Ok(Some(false)) => {
                    self.tap.filtered(1);
                    return Ok(());
                }
                Ok(None) => {
                    return Err(Error::data(format!(
                        "source `{}`: {place}: the cursor is null",
                        stream.name
                    ))
                    .hint("Say what to do with such rows: `on_null: include` or `on_null: exclude`."));
                }
                Ok(Some(true)) => {
                    let appended = self.batch.row(
                        |index, builder| {
                            let Some((_, path)) = fields.get(index) else {
                                builder.null();
                                return Ok(0);
                            };
                            match path.find(raw).map_err(Misfit)?.as_slice() {
                                [] => {
                                    builder.null();
                                    Ok(0)
                                }
                                [one] => append(builder, one),
                                _ => Err(Misfit("is there more than once".to_owned())),
                            }
                        },
                        || place.to_owned(),
                    );
                    appended.err().map(reject)
                }
            },
        };
        if let Some((reason, row)) = broken {
            self.send().await?;
            self.tap.reject(stream, place.to_owned(), reason, || row)?;
        } else if self.batch.is_full() {
            self.send().await?;
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<()> {
        if let Some(batch) = self.batch.take(self.tap)?
            && !self.out.send(batch).await
        {
            self.done = true;
        }
        Ok(())
    }

    /// Whether a row lies in the window; `None` if its cursor is null and that is an error. The API's own filter may be wider.
    fn is_meant(&self, raw: &RawValue) -> Result<Option<bool>, String> {
        let Some((path, column, on_null)) = &self.cursor else { return Ok(Some(true)) };
        let found = path.find(raw)?;
        let value = match found.first() {
            Some(value) => Scalar::of(value)?,
            None => Scalar::Null,
        };
        let text = match &value {
            Scalar::Null => {
                return Ok(match on_null {
                    OnNull::Error => None,
                    OnNull::Include => Some(true),
                    OnNull::Exclude => Some(false),
                });
            }
            Scalar::Text(text) => text.as_ref(),
            Scalar::Number(text) | Scalar::Bool(text) | Scalar::Nested(text) => text,
        };
        let of = |why: Misfit| format!("the cursor {why}");
        let at = match column {
            ColumnType::Date(format) => {
                let days = columns::date(text, format.as_deref()).map_err(of)?;
                let day = NaiveDate::from_epoch_days(days).ok_or("the cursor is no day")?;
                CursorValue::Date(day)
            }
            ColumnType::TimestampTz(format) => {
                let micros = columns::instant(text, format.as_deref(), self.rules.zone()).map_err(of)?;
                let at = DateTime::from_timestamp_micros(micros).ok_or("the cursor is no time")?;
                CursorValue::instant(at)
            }
            _ => return Err("the cursor has no order".to_owned()),
        };
        Ok(Some(self.scan.window.holds(&Position::of(at))))
    }

    /// The request for the page behind this one; `None` at the end of the list.
    fn next(&self, ask: &Ask, answer: &Answer, rows: u64, offset: u64) -> Result<Option<Ask>> {
        let Some(pages) = &self.request.pages else { return Ok(None) };
        let mut next = ask.clone();
        let path =
            || pages.next.as_deref().unwrap_or_default().parse::<JsonPath>().map_err(|why| self.data(&why));
        let in_body = || -> Result<Option<String>> {
            let root: &RawValue = serde_json::from_slice(&answer.body)
                .map_err(|_| Error::bug("a page was read and is no JSON"))?;
            let (path, written) = (path()?, pages.next.as_deref().unwrap_or_default());
            let broken = |why: String| self.data(&format!("page {}: `{written}` {why}", self.page));
            let found = path.find(root).map_err(broken)?;
            let Some(value) = found.first() else {
                if !pages.lenient && path.parent().find(root).map_err(broken)?.is_empty() {
                    return Err(broken("leads to nothing, so that nobody knows whether the list goes on".to_owned())
                        .hint("Mend `next:`; if the last page has not even its place, set `lenient: true` beside it."));
                }
                return Ok(None);
            };
            let token = token(value)
                .map_err(|why| broken(why).hint("Point to the text itself, such as `$.links.next.href`."))?;
            Ok(token.map(std::borrow::Cow::into_owned))
        };
        let param = |name: &'static str| pages.param.as_deref().unwrap_or(name);
        match pages.kind {
            PageStyle::Offset | PageStyle::Page if rows == 0 => return Ok(None),
            PageStyle::Offset => set(&mut next.url, param("offset"), &offset.to_string()),
            PageStyle::Page => {
                let number = pages.first.unwrap_or(1) + self.page;
                set(&mut next.url, param("page"), &number.to_string());
            }
            PageStyle::Cursor => match in_body()? {
                Some(token) => self.ask_for(&mut next, param("cursor"), &token)?,
                None => return Ok(None),
            },
            PageStyle::Header => {
                let name = pages.next.as_deref().unwrap_or_default();
                let token = answer.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
                match token.filter(|token| !token.is_empty()) {
                    Some(token) => self.ask_for(&mut next, param("cursor"), &token)?,
                    None => return Ok(None),
                }
            }
            PageStyle::NextUrl => match in_body()? {
                Some(url) => next.url = self.follow(answer, &url)?,
                None => return Ok(None),
            },
            PageStyle::Link => match next_link(&answer.headers) {
                Some(url) => next.url = self.follow(answer, &url)?,
                None => return Ok(None),
            },
        }
        Ok(Some(next))
    }

    /// Puts a token where the next request carries it: in the query, or in the body of a POST.
    fn ask_for(&self, ask: &mut Ask, param: &str, token: &str) -> Result<()> {
        let Some(body) = &ask.body else {
            set(&mut ask.url, param, token);
            return Ok(());
        };
        let mut document: serde_json::Map<String, serde_json::Value> = serde_json::from_str(body)
            .map_err(|_| self.data("`body` is no JSON object, and cannot carry the next page's token"))?;
        document.insert(param.to_owned(), token.into());
        ask.body = Some(serde_json::Value::Object(document).to_string());
        Ok(())
    }

    fn follow(&self, answer: &Answer, url: &str) -> Result<Url> {
        let next = answer.url.join(url).map_err(|_| {
            Error::new(
                ErrorKind::Data,
                format!("source `{}`: page {} leads to no URL", self.scan.stream.name, self.page),
            )
        })?;
        if answer.url.scheme() == "https" && next.scheme() != "https" {
            return Err(self
                .data(&format!("page {} leads to an unencrypted one", self.page))
                .hint("Ask the API's owner."));
        }
        self.this.api.permitted(&next)?;
        Ok(next)
    }
}

impl Copied {
    fn add(&mut self, text: &str) -> std::io::Result<()> {
        self.file.write_all(&(text.len() as u64).to_le_bytes())?;
        self.file.write_all(text.as_bytes())?;
        self.rows += 1;
        let [half @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] =
            *blake3::hash(text.as_bytes()).as_bytes();
        // Rows in another order are the same list.
        self.sum = self.sum.wrapping_add(u128::from_le_bytes(half));
        Ok(())
    }
}

/// Whether a document has an error at its root.
fn says_error(root: &RawValue) -> bool {
    let Ok(object) = serde_json::from_str::<Object<'_>>(root.get()) else { return false };
    let nothing = |value: &RawValue| matches!(value.get(), "null" | "false" | "[]" | "{}" | "\"\"");
    object.0.iter().any(|(key, value)| matches!(key.as_ref(), "error" | "errors") && !nothing(value))
}

fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

/// Sets a query parameter, in the place of one of that name.
fn set(url: &mut Url, name: &str, value: &str) {
    let others: Vec<(String, String)> = url
        .query_pairs()
        .filter(|(known, _)| known != name)
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect();
    url.query_pairs_mut().clear().extend_pairs(others).append_pair(name, value);
}

/// The target of `Link: <…>; rel="next"` (RFC 8288).
fn next_link(headers: &HeaderMap) -> Option<String> {
    headers.get_all(header::LINK).iter().find_map(|value| {
        let value = String::from_utf8_lossy(value.as_bytes());
        let mut rest = value.as_ref();
        while let Some(start) = rest.find('<') {
            let (target, behind) = rest.get(start + 1..)?.split_once('>')?;
            let end = behind.find('<').unwrap_or(behind.len());
            let next = behind.get(..end)?.split(';').any(|part| {
                let part = part.trim().trim_end_matches(',').trim();
                part.split_once('=').is_some_and(|(name, rel)| {
                    name.trim().eq_ignore_ascii_case("rel")
                        && rel
                            .trim()
                            .trim_matches('"')
                            .split_whitespace()
                            .any(|rel| rel.eq_ignore_ascii_case("next"))
                })
            });
            if next {
                return Some(target.to_owned());
            }
            rest = behind.get(end..)?;
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_link_is_found_among_others() {
        for (header, expected) in [
            (r#"<https://a/x?page=2>; rel="next""#, Some("https://a/x?page=2")),
            (r#"<https://a/p>; rel="prev", <https://a/n,1;2>; title="x"; rel=next"#, Some("https://a/n,1;2")),
            (r#"<https://a/l>; rel="last next""#, Some("https://a/l")),
            (r#"<https://a/l>; REL = "Next""#, Some("https://a/l")),
            (r#"<https://a/l>; rel="last""#, None),
            ("nonsense", None),
        ] {
            let headers = [(header::LINK, header.parse().unwrap())].into_iter().collect();
            assert_eq!(next_link(&headers).as_deref(), expected, "{header}");
        }
    }

    #[test]
    fn a_window_ends_where_the_api_can_be_told_that_it_does() {
        let at = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().to_utc();
        let stream = |zone: Option<&str>| StreamSpec {
            timezone: zone.map(str::to_owned),
            ..StreamSpec::whole("rates", Read::Table("rates".to_owned()))
        };
        for (format, zone, expected) in [
            (None, None, Some("2026-11-24T02:30:00.700900Z")),
            (Some("unix"), None, Some("2026-11-24T02:30:00Z")),
            (Some("unix_ms"), None, Some("2026-11-24T02:30:00.700Z")),
            (Some("%Y-%m-%d %H:%M"), None, Some("2026-11-24T02:30:00Z")),
            (Some("%Y-%m-%d"), None, Some("2026-11-24T00:00:00Z")),
            // In New York it is still the day before.
            (Some("%Y-%m-%d"), Some("America/New_York"), Some("2026-11-23T05:00:00Z")),
            (Some("%Y-%m-%d %H:%M:%S"), Some("America/New_York"), Some("2026-11-24T02:30:00Z")),
            (Some("%Y-%m-%dT%H:%M:%S%z"), Some("Asia/Tokyo"), Some("2026-11-24T02:30:00Z")),
            (Some("%H:%M"), None, None),
        ] {
            let found = told(at("2026-11-24T02:30:00.700900Z"), format, &stream(zone)).ok();
            assert_eq!(found, expected.map(at), "{format:?} {zone:?}");
        }
    }
}
