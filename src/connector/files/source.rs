//! Reading a folder: which files, and their rows.
//!
//! `file:` is read whole on every run. `files:` is read once per file: the mark is the set of (path, size, SHA-256).
//! `table:` is an output that a job published here; its manifest says which files are live. Files are hashed
//! before they are read, and a file whose size or time of change moved while it was read fails the run.

use std::{
    io::Read as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arrow::datatypes::{Field, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::physical_plan::SendableRecordBatchStream;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{
    FilesConnection, chunks,
    chunks::{Parsed, Piece, Start, piece_bytes},
    csv, input, json, manifest, parquet,
    place::{Listed, Place, io_error},
};
use crate::{
    connector::{
        Bounds, Exactness, Marks, NOTHING_YET, RunTime, Snapshot, Source,
        columns::{Guess, TextRules, arrow_type, declared_schema},
        json::{Object, Scalar, append, kept, unreadable},
        rows::{Built, RowBuilder},
        scan::{POSITION_COLUMN, Scan, held},
        spec::{BadRows, Format, FormatKind, Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, Result, nearest},
    runtime::{self, BatchSender},
    watermark::{FileVersion, Mark, WatermarkError, Window},
};

/// Rows that are looked at to find types that nobody declared.
const SAMPLE_ROWS: usize = 20_480;

/// The files of each stream, fixed by the snapshot.
struct Fixed(indexmap::IndexMap<String, Vec<Listed>>);

/// A file that was written longer ago than this, when it was looked at, has not changed since if its time of change says so.
const SETTLED: Duration = Duration::from_secs(5);

#[async_trait]
impl Source for Arc<FilesConnection> {
    /// Parquet's row groups say of their values what there may be.
    fn applies_conditions(&self, stream: &StreamSpec) -> bool {
        let format = stream.format.clone().unwrap_or_default();
        match &stream.read {
            Read::Table(_) => true,
            Read::File(path) | Read::Files { pattern: path, .. } => {
                kind(&format, path).is_ok_and(|kind| kind == FormatKind::Parquet)
            }
            Read::Query { .. } | Read::Request(_) => false,
        }
    }

    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        if let Read::Table(output) = &stream.read {
            let published = manifest::published(self, output).await?;
            return published.schema();
        }
        let files = self.candidates(stream).await?;
        let (this, stream) = (Self::clone(self), stream.clone());
        runtime::blocking(move || this.describe_files(&stream, &files)).await
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        let mut bounds = Bounds::default();
        for stream in streams {
            if let Some(cursor) = &stream.cursor {
                return Err(Error::configuration(format!(
                    "source `{}` reads files, and files have no cursor `{}`",
                    stream.name,
                    cursor.columns.join(", ")
                ))
                .hint("Remove `incremental`: with `files:` each file is read once."));
            }
            let window = match &stream.read {
                Read::Files { pattern, once: true } => {
                    let found = self.matching(pattern).await?;
                    let this = Self::clone(self);
                    let versions = runtime::blocking(move || this.hash(&found)).await?;
                    let seen = match since.get(&stream.name) {
                        None => Vec::new(),
                        Some(Mark::Files(files)) => files.clone(),
                        Some(Mark::Cursor(_)) => {
                            let changed = WatermarkError::ShapeChanged { was: "a cursor", is: "files" };
                            return Err(Error::data(format!("source `{}`: {changed}", stream.name))
                                .hint("If that is right, load it anew: `floodmark run --full-refresh`."));
                        }
                    };
                    let new: Vec<FileVersion> =
                        versions.into_iter().filter(|file| !seen.contains(file)).collect();
                    for file in &new {
                        if seen.iter().any(|known| known.path == file.path) {
                            bounds.warnings.push(format!(
                                "source `{}`: `{}` was read before and has changed: it is read again",
                                stream.name, file.path
                            ));
                        } else if let Some(known) = seen.iter().find(|known| known.sha256 == file.sha256) {
                            bounds.warnings.push(format!(
                                "source `{}`: `{}` has the same content as `{}`, which was read before",
                                stream.name, file.path, known.path
                            ));
                        }
                    }
                    bounds.exactness.insert(stream.name.clone(), Exactness::Exact);
                    Window::Files { new, seen, at: time.now }
                }
                _ => Window::Whole,
            };
            bounds.windows.insert(stream.name.clone(), window);
        }
        Ok(bounds)
    }

    async fn snapshot(&self, streams: &[StreamSpec], bounds: &Bounds) -> Result<Snapshot> {
        let mut fixed = indexmap::IndexMap::new();
        for stream in streams {
            let files = match (bounds.windows.get(&stream.name), &stream.read) {
                (Some(Window::Files { new, .. }), _) => new.iter().map(Listed::meant).collect(),
                (_, Read::Table(output)) => manifest::published(self, output).await?.files(output),
                _ => self.candidates(stream).await?,
            };
            fixed.insert(stream.name.clone(), files);
        }
        Ok(Snapshot { token: format!("files:{}", self.shown), hold: Arc::new(Fixed(fixed)) })
    }

    async fn rows(&self, snapshot: &Snapshot, stream: &StreamSpec) -> Result<Option<u64>> {
        let fixed: Arc<Fixed> = held(snapshot)?;
        let files = fixed.0.get(&stream.name).cloned().unwrap_or_default();
        let (this, format) = (Self::clone(self), stream.format.clone().unwrap_or_default());
        let is_table = matches!(stream.read, Read::Table(_));
        runtime::blocking(move || {
            let mut rows = 0;
            for file in &files {
                let is_parquet = is_table || kind(&format, &file.path)? == FormatKind::Parquet;
                rows += match &this.place {
                    Place::Folder(_) if is_parquet => parquet::rows(&this.place.open(file)?, &file.path)?,
                    // A row is short, or is packed.
                    _ => file.size / 64,
                };
            }
            Ok(Some(rows))
        })
        .await
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        let fixed: Arc<Fixed> = held(snapshot)?;
        let files = fixed.0.get(&scan.stream.name).cloned().unwrap_or_default();
        let (this, scan) = (Self::clone(self), scan.clone());
        Ok(runtime::blocking_stream(Arc::clone(&scan.schema), move |out| {
            tap.expect_bytes(files.iter().map(|file| file.size).sum());
            for file in &files {
                if !this.read_file(file, &scan, &tap, out)? {
                    return Ok(());
                }
            }
            tap.finish();
            Ok(())
        }))
    }
}

impl FilesConnection {
    /// The files that a stream may read, in order.
    async fn candidates(&self, stream: &StreamSpec) -> Result<Vec<Listed>> {
        let found = match &stream.read {
            Read::File(path) => Ok(vec![self.one(path).await?]),
            Read::Files { pattern, .. } => self.matching(pattern).await,
            Read::Table(_) => Ok(Vec::new()),
            Read::Query { .. } | Read::Request(_) => {
                Err(Error::configuration("files take no `query:` and no `request:`")
                    .hint("Use `file:`, `files:` or `table:`."))
            }
        };
        found.map_err(|error| error.while_doing(format!("source `{}` cannot be read", stream.name)))
    }

    fn hash(&self, files: &[Listed]) -> Result<Vec<FileVersion>> {
        files.par_iter().map(|file| file.identity().map_or_else(|| self.look_at(&file.path), Ok)).collect()
    }

    /// Reads a file of a folder for its identity.
    fn look_at(&self, path: &str) -> Result<FileVersion> {
        let mut file = self.place.open(&Listed::named(path))?;
        let (mut hash, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 256 << 10]);
        loop {
            let read = file.read(&mut buffer).map_err(|error| Error::io("read", path, error))?;
            if read == 0 {
                break;
            }
            size += read as u64;
            hash.update(buffer.get(..read).unwrap_or_default());
        }
        Ok(FileVersion { path: path.to_owned(), size, sha256: hex::encode(hash.finalize()) })
    }

    /// Whether a file is still what the window means. Its contents are hashed again only if it was written so shortly
    /// before it was looked at that its time of change cannot tell, or later.
    fn is_still(&self, file: &Listed, window: &Window) -> Result<bool> {
        let Window::Files { new, at, .. } = window else { return Ok(true) };
        let Some(meant) = new.iter().find(|meant| meant.path == file.path) else { return Ok(true) };
        if file.identity().is_some_and(|identity| identity == *meant) {
            return Ok(true);
        }
        let (size, modified) = self.place.version(file)?;
        let settled = SystemTime::from(*at).checked_sub(SETTLED);
        Ok(size == meant.size
            && (modified.is_some() && modified < settled || self.look_at(&file.path)? == *meant))
    }

    fn describe_files(&self, stream: &StreamSpec, files: &[Listed]) -> Result<SchemaRef> {
        let format = stream.format.clone().unwrap_or_default();
        let Some(first) = files.first() else {
            if stream.columns.is_empty() {
                return Err(Error::configuration(format!("source `{}`: no file matches, and no columns are declared", stream.name))
                    .hint("Mend the pattern, or declare `columns:` so that the job can be checked before the first file comes."));
            }
            return Ok(nothing_yet(stream));
        };
        match kind(&format, &first.path)? {
            FormatKind::Parquet => {
                let schema = parquet::schema(&self.place.open(first)?, &first.path)?;
                let fields: Vec<Field> = schema
                    .fields()
                    .iter()
                    .map(|field| {
                        let declared =
                            stream.declared(field.name()).map(|column| arrow_type(&column, stream));
                        Field::new(field.name(), declared.unwrap_or_else(|| field.data_type().clone()), true)
                    })
                    .collect();
                Ok(Arc::new(Schema::new(fields)))
            }
            FormatKind::Csv => self.describe_csv(stream, &format, files),
            kind @ (FormatKind::JsonLines | FormatKind::Json) => {
                self.describe_json(stream, &format, kind, files)
            }
        }
    }

    fn records(&self, file: &Listed, format: &Format, tap: Option<Arc<Tap>>) -> Result<csv::Records> {
        Ok(csv::Records::new(self.text(file, format, tap)?, csv::Dialect::of(format, &file.path)?))
    }

    fn text(&self, file: &Listed, format: &Format, tap: Option<Arc<Tap>>) -> Result<input::TextReader> {
        let bytes = input::decompressed(self.place.reader(file)?, tap)
            .map_err(|error| io_error("read", &file.path, error))?;
        Ok(input::TextReader::new(bytes, input::encoding(format.encoding.as_deref())?))
    }

    fn describe_csv(&self, stream: &StreamSpec, format: &Format, files: &[Listed]) -> Result<SchemaRef> {
        let rules = TextRules::of(stream)?;
        let Some(file) = files.first() else { return Ok(nothing_yet(stream)) };
        let first = file.path.as_str();
        let mut record = csv::Record::default();
        let mut records = self.records(file, format, None)?;
        let names = header(stream, format, first, &mut records, &mut record)?;
        for declared in stream.columns.keys() {
            if !names.contains(declared) {
                let error = Error::configuration(format!(
                    "source `{}`: `{first}` has no column `{declared}`",
                    stream.name
                ));
                return Err(match nearest(declared, names.iter().map(String::as_str)) {
                    Some(near) => error.hint(format!("Did you mean `{near}`?")),
                    None => error.hint(format!("It has: {}.", names.join(", "))),
                });
            }
        }
        let mut guesses = vec![Guess::default(); names.len()];
        if names.iter().any(|name| !stream.columns.contains_key(name)) {
            let mut rows = 0;
            'files: for file in files {
                if file.path != first {
                    records = self.records(file, format, None)?;
                    header(stream, format, &file.path, &mut records, &mut record)?;
                }
                // What is broken is told when it is read; here it only teaches nothing.
                while let Ok(next) = records.next(&mut record) {
                    match next {
                        csv::Next::Record => {}
                        csv::Next::Broken(_) => continue,
                        csv::Next::End => break,
                    }
                    for (index, guess) in guesses.iter_mut().enumerate() {
                        let field = record.field(index);
                        let field = field
                            .and_then(|(field, quoted)| Some((std::str::from_utf8(field).ok()?, quoted)));
                        if let Some(text) = field.and_then(|(text, quoted)| value(text, quoted, format)) {
                            guess.see(text, &rules);
                        }
                    }
                    rows += 1;
                    if rows == SAMPLE_ROWS {
                        break 'files;
                    }
                }
            }
        }
        let fields: Vec<Field> = names
            .iter()
            .zip(&guesses)
            .map(|(name, guess)| {
                let column = stream.declared(name).unwrap_or_else(|| guess.column_type());
                Field::new(name, arrow_type(&column, stream), true)
            })
            .collect();
        Ok(Arc::new(Schema::new(fields)))
    }

    fn describe_json(
        &self,
        stream: &StreamSpec,
        format: &Format,
        kind: FormatKind,
        files: &[Listed],
    ) -> Result<SchemaRef> {
        let rules = TextRules::of(stream)?;
        let mut guesses: indexmap::IndexMap<String, Guess> = indexmap::IndexMap::new();
        let mut count = 0;
        'files: for file in files {
            let mut rows = json::Rows::new(self.text(file, format, None)?, kind == FormatKind::Json);
            let mut row = json::Row::default();
            while let Ok(true) = rows.next(&mut row) {
                let Ok(object) = serde_json::from_slice::<Object<'_>>(&row.text) else { continue };
                for (key, raw) in object.0 {
                    let guess = guesses.entry(key.into_owned()).or_default();
                    match Scalar::of(raw) {
                        Ok(Scalar::Number(text) | Scalar::Bool(text)) => guess.see(text, &rules),
                        Ok(Scalar::Text(text)) if text.contains('-') => guess.see(&text, &rules),
                        Ok(Scalar::Text(_) | Scalar::Nested(_)) => guess.see_text(),
                        Ok(Scalar::Null) | Err(_) => {}
                    }
                }
                count += 1;
                if count == SAMPLE_ROWS {
                    break 'files;
                }
            }
        }
        for declared in stream.columns.keys() {
            guesses.entry(declared.clone()).or_default();
        }
        let fields: Vec<Field> = guesses
            .iter()
            .map(|(name, guess)| {
                let column = stream.declared(name).unwrap_or_else(|| guess.column_type());
                Field::new(name, arrow_type(&column, stream), true)
            })
            .collect();
        Ok(Arc::new(Schema::new(fields)))
    }

    /// Sends the rows of one file. False once nobody reads any more.
    fn read_file(&self, file: &Listed, scan: &Scan, tap: &Arc<Tap>, out: &BatchSender) -> Result<bool> {
        let path = file.path.as_str();
        let before = self.place.version(file)?;
        let format = scan.stream.format.clone().unwrap_or_default();
        let more = match if matches!(scan.stream.read, Read::Table(_)) {
            FormatKind::Parquet
        } else {
            kind(&format, path)?
        } {
            FormatKind::Parquet => parquet::read(self.place.open(file)?, path, scan, tap, out)?,
            FormatKind::Csv => self.read_csv(file, &format, scan, tap, out)?,
            kind @ (FormatKind::JsonLines | FormatKind::Json) => {
                self.read_json(file, &format, kind == FormatKind::Json, scan, tap, out)?
            }
        };
        // Whoever stopped reading gets no more rows, and loads none.
        if more && (self.place.version(file)? != before || !self.is_still(file, &scan.window)?) {
            return Err(Error::temporary(format!(
                "source `{}`: `{path}` changed while it was read",
                scan.stream.name
            ))
            .hint("Run again once it has been delivered completely."));
        }
        Ok(more)
    }

    fn read_csv(
        &self,
        file: &Listed,
        format: &Format,
        scan: &Scan,
        tap: &Arc<Tap>,
        out: &BatchSender,
    ) -> Result<bool> {
        let path = file.path.as_str();
        let mut records = self.records(file, format, Some(Arc::clone(tap)))?;
        let mut record = csv::Record::default();
        let names = header(&scan.stream, format, path, &mut records, &mut record)?;
        let dialect = csv::Dialect::of(format, path)?;
        let rows =
            CsvRows { scan: scan.clone(), names, format: format.clone(), dialect, path: path.to_owned() };
        if let Some(missing) = rows.batch()?.missing() {
            return Err(Error::data(format!(
                "source `{}`: `{path}` has no column `{missing}`",
                scan.stream.name
            ))
            .hint("All files of a source have the same columns; read others as a source of their own."));
        }
        let (rest, lines) = records.into_rest();
        let fatal = |why: String| {
            Error::data(format!("source `{}`: `{path}`: {why}", scan.stream.name))
                .hint("Mend the file; or the `format:` of the source, if it is another dialect.")
        };
        let shape = shape(lines, dialect.quote(), scan);
        let deliver = |part, start| deliver(part, start, path, scan, tap, out, fatal);
        chunks::read(rest, shape, move |piece, lines| rows.parse(piece, lines), deliver, fatal)
    }

    fn read_json(
        &self,
        file: &Listed,
        format: &Format,
        array: bool,
        scan: &Scan,
        tap: &Arc<Tap>,
        out: &BatchSender,
    ) -> Result<bool> {
        let path = file.path.as_str();
        let text = self.text(file, format, Some(Arc::clone(tap)))?;
        let rows = JsonRows { scan: scan.clone(), path: path.to_owned() };
        let fatal = |why: String| {
            Error::data(format!("source `{}`: `{path}`: {why}", scan.stream.name))
                .hint("Have the file delivered again; `kind: json_lines` is one object a line, `kind: json` one list.")
        };
        if array {
            let mut rest = json::Rows::new(text, true);
            let mut batch = rows.batch()?;
            let mut row = json::Row::default();
            while rest.next(&mut row).map_err(fatal)? {
                if let Some((reason, kept)) = rows.row(&row, &mut batch) {
                    batch.send(tap, out)?;
                    let place = format!("`{path}` line {}, byte {}", row.line, row.byte);
                    tap.reject(&scan.stream, place, reason, || kept)?;
                } else if batch.is_full() && !batch.send(tap, out)? {
                    return Ok(false);
                }
            }
            return batch.send(tap, out);
        }
        let shape = shape(0, None, scan);
        let deliver = |part, start| deliver(part, start, path, scan, tap, out, fatal);
        chunks::read(text, shape, move |piece, lines| rows.parse(piece, lines), deliver, fatal)
    }
}

/// The rows of one file of JSON.
struct JsonRows {
    scan: Scan,
    path: String,
}

impl JsonRows {
    fn batch(&self) -> Result<RowBuilder<'_>> {
        RowBuilder::new(&self.scan, |name| self.scan.schema.index_of(name).ok())
    }

    /// Appends one row, or says why it cannot be read, and what there is of it.
    fn row(&self, row: &json::Row, batch: &mut RowBuilder<'_>) -> Option<(String, String)> {
        let object = std::str::from_utf8(&row.text)
            .map_err(|_| format!("the row is not UTF-8; {}", input::OTHER_ENCODING))
            .and_then(|text| {
                serde_json::from_str::<Object<'_>>(text)
                    .map_err(|error| format!("the row is no JSON object: {error}"))
            });
        let object = match object {
            Err(why) => return Some((why, unreadable(String::from_utf8_lossy(&row.text).trim()))),
            Ok(object) => object,
        };
        let value = |name: &str| object.0.iter().find(|(key, _)| key == name).map(|(_, raw)| *raw);
        let fields = self.scan.schema.fields();
        let appended = batch.row(
            |index, builder| match fields.get(index).and_then(|field| value(field.name())) {
                Some(raw) => append(builder, raw),
                None => {
                    builder.null();
                    Ok(0)
                }
            },
            || format!("{}:{}", self.path, row.line),
        );
        let why = appended.err()?;
        // Also what no model reads now; what the row lacks is null.
        let own = object.0.iter().map(|(key, raw)| (&**key, Some(*raw)));
        let names = fields.iter().map(|field| field.name()).filter(|name| *name != POSITION_COLUMN);
        let known = names.chain(self.scan.stream.columns.keys());
        let lacking = known.filter(|name| value(name).is_none()).map(|name| (name.as_str(), None));
        Some((why, kept(own.chain(lacking))))
    }

    /// The rows of a piece of lines, before which so many stand.
    fn parse(&self, piece: &Piece, lines: u64) -> Result<Parsed<Part>> {
        let end = memchr::memrchr(b'\n', &piece.text).map_or(0, |at| at + 1);
        let taken = if piece.is_last { piece.text.len() } else { end };
        let text = piece.text.get(..taken).unwrap_or_default();
        let (mut batch, mut found) = (self.batch()?, Vec::new());
        let (mut row, mut at, mut line) = (json::Row::default(), 0, 0);
        while let Some(length) = json::line(text.get(at..).unwrap_or_default()) {
            let start = at;
            row.text.clear();
            row.text.extend_from_slice(text.get(at..at + length).unwrap_or_default());
            (row.line, row.byte) = (lines + line + 1, start as u64);
            (at, line) = (at + length, line + 1);
            if row.text.trim_ascii().is_empty() {
                continue;
            }
            if let Some((reason, kept)) = self.row(&row, &mut batch) {
                found.push(Part::Rows(batch.finish()?));
                found.push(Part::Reject { line: line - 1, byte: start as u64, reason, row: kept });
                if self.scan.stream.bad_rows == BadRows::Error {
                    break;
                }
            } else if batch.is_full() {
                found.push(Part::Rows(batch.finish()?));
            }
        }
        found.push(Part::Rows(batch.finish()?));
        Ok(Parsed { found, lines: line, taken })
    }
}

/// A text of which so many lines were read already, as `scan` wants it read.
fn shape(lines: u64, quote: Option<u8>, scan: &Scan) -> chunks::Shape {
    let in_order = scan.schema.field_with_name(POSITION_COLUMN).is_ok();
    chunks::Shape { lines, quote, in_order, piece_bytes: piece_bytes(scan.batch_bytes) }
}

/// What is found in a piece of a text.
enum Part {
    /// Rows, to be counted and handed on.
    Rows(Built),
    /// A row that could not be read.
    Reject { line: u64, byte: u64, reason: String, row: String },
    /// What reading cannot go on behind.
    Fatal { line: u64, why: String },
}

/// Counts what was found and hands it on. False once nobody reads any more.
fn deliver(
    part: Part,
    start: Start,
    path: &str,
    scan: &Scan,
    tap: &Tap,
    out: &BatchSender,
    fatal: impl Fn(String) -> Error,
) -> Result<bool> {
    match part {
        Part::Rows(rows) => Ok(rows.counted(tap)?.is_none_or(|batch| out.send(batch))),
        Part::Reject { line, byte, reason, row } => {
            let place = format!("`{path}` line {}, byte {}", start.lines + line + 1, start.bytes + byte);
            tap.reject(&scan.stream, place, reason, || row).map(|()| true)
        }
        Part::Fatal { line, why } => Err(fatal(format!("line {}: {why}", start.lines + line + 1))),
    }
}

/// The rows of one CSV file, as they are parsed piece by piece.
struct CsvRows {
    scan: Scan,
    names: Vec<String>,
    format: Format,
    dialect: csv::Dialect,
    path: String,
}

impl CsvRows {
    fn batch(&self) -> Result<RowBuilder<'_>> {
        RowBuilder::new(&self.scan, |name| self.names.iter().position(|known| known == name))
    }

    /// The rows of a piece, before which so many lines stand.
    fn parse(&self, piece: &Piece, lines: u64) -> Result<Parsed<Part>> {
        let mut batch = self.batch()?;
        let mut records = csv::Slice::new(&piece.text, self.dialect, piece.is_last);
        let mut found = Vec::new();
        // Rows are read in blocks, column by column; those of a block in which something does not fit, one by one.
        let (fields, in_blocks, mut singly, mut unfit) =
            (self.names.len(), batch.takes_columns(), 0_usize, 0);
        loop {
            if in_blocks && singly == 0 && unfit < UNFIT_BLOCKS {
                let (rows, bytes) = batch.room();
                let mark = records.mark();
                let count = records.block(fields, rows.min(BLOCK_ROWS), bytes);
                let fit = batch.columns(count, |index, builder| {
                    let texts = records.column(index, fields);
                    builder.texts(texts.map(|(text, quoted)| value(text, quoted, &self.format)))
                });
                if count > 0 && fit {
                    if batch.is_full() {
                        found.push(Part::Rows(batch.finish()?));
                    }
                    continue;
                }
                if !fit {
                    found.push(Part::Rows(batch.finish()?));
                    records.rewind(mark);
                    unfit += 1;
                }
                singly = count.max(1);
            }
            singly = singly.saturating_sub(1);
            let next = records.next();
            let (byte, line) = records.place();
            let field = |index| {
                let (text, quoted) = records.field(index)?;
                value(text, quoted, &self.format)
            };
            let as_read = || unreadable(&String::from_utf8_lossy(records.raw()));
            let as_json = || {
                let fields = self.names.iter().enumerate();
                let fields = fields.map(|(index, name)| (name.clone(), field(index).into()));
                serde_json::Value::Object(fields.collect()).to_string()
            };
            let broken = match next {
                Ok(csv::Next::End) => break,
                Err((line, why)) => {
                    found.extend([Part::Rows(batch.finish()?), Part::Fatal { line, why }]);
                    break;
                }
                Ok(csv::Next::Broken(why)) => Some((why, as_read())),
                Ok(csv::Next::Record) if records.len() != self.names.len() => {
                    let (fields, header) = (records.len(), self.names.len());
                    Some((format!("the row has {fields} fields and the header {header}"), as_read()))
                }
                Ok(csv::Next::Record) => batch
                    .row(
                        |index, builder| match field(index) {
                            Some(text) => builder.text(text).map(|()| text.len()),
                            None => {
                                builder.null();
                                Ok(0)
                            }
                        },
                        || format!("{}:{}", self.path, lines + line + 1),
                    )
                    .err()
                    .map(|why| (why, as_json())),
            };
            if let Some((reason, row)) = broken {
                found.push(Part::Rows(batch.finish()?));
                found.push(Part::Reject { line, byte, reason, row });
                if self.scan.stream.bad_rows == BadRows::Error {
                    break;
                }
            } else if batch.is_full() {
                found.push(Part::Rows(batch.finish()?));
            }
        }
        found.push(Part::Rows(batch.finish()?));
        let (taken, lines) = records.taken();
        Ok(Parsed { found, lines, taken })
    }
}

/// Rows of a block, of which each column is parsed at once: so few that their fields stay where they are quickly found again.
const BLOCK_ROWS: usize = 256;

/// Blocks of a piece that were read in vain before the rest of it is read row by row.
const UNFIT_BLOCKS: usize = 8;

/// The columns of a header line, or the declared ones where a file has none.
fn header(
    stream: &StreamSpec,
    format: &Format,
    path: &str,
    records: &mut csv::Records,
    record: &mut csv::Record,
) -> Result<Vec<String>> {
    let refuse = |why: String| {
        Error::data(format!("source `{}`: `{path}`: {why}", stream.name))
            .hint("Mend the file; or the `format:` of the source, if it is another dialect.")
    };
    if !format.header {
        if stream.columns.is_empty() {
            return Err(Error::configuration(format!(
                "source `{}`: without a header the columns must be declared",
                stream.name
            ))
            .hint("List all of them in order: `columns: { id: int, name: string }`."));
        }
        return Ok(stream.columns.keys().cloned().collect());
    }
    match records.next(record).map_err(refuse)? {
        csv::Next::Record => {}
        csv::Next::Broken(why) => return Err(refuse(format!("line {}: {why}", record.line))),
        csv::Next::End => return Err(refuse("the file is empty, and has not even a header".to_owned())),
    }
    let mut names: Vec<String> = Vec::with_capacity(record.len());
    for index in 0..record.len() {
        let (field, _) = record.field(index).unwrap_or_default();
        let name = String::from_utf8_lossy(field).trim().to_owned();
        if name.is_empty() {
            return Err(refuse(format!("line {}: the name of column {} is empty", record.line, index + 1))
                .hint("Mend the header; or a delimiter other than the file's is set."));
        }
        if names.contains(&name) {
            return Err(refuse(format!("line {}: the column `{name}` is there twice", record.line)));
        }
        names.push(name);
    }
    Ok(names)
}

/// A field's text; `None` for null. A quoted field is never null.
fn value<'a>(text: &'a str, quoted: bool, format: &Format) -> Option<&'a str> {
    let null = !quoted && (text.is_empty() || format.nulls.iter().any(|word| word == text));
    (!null).then_some(text)
}

/// The kind of a file: as declared, or by its name.
fn kind(format: &Format, path: &str) -> Result<FormatKind> {
    if let Some(kind) = format.kind {
        return Ok(kind);
    }
    let plain = path.trim_end_matches(".gz").trim_end_matches(".zst");
    match plain.rsplit('.').next().unwrap_or_default().to_ascii_lowercase().as_str() {
        "csv" | "tsv" | "txt" => Ok(FormatKind::Csv),
        "jsonl" | "ndjson" => Ok(FormatKind::JsonLines),
        "json" => Ok(FormatKind::Json),
        "parquet" => Ok(FormatKind::Parquet),
        _ => Err(Error::configuration(format!("the name of `{path}` does not tell its format"))
            .hint("Say it: `format: { kind: csv }`, or json_lines, json, parquet.")),
    }
}

/// The declared columns of a stream of which there is no file yet.
fn nothing_yet(stream: &StreamSpec) -> SchemaRef {
    let metadata = [(NOTHING_YET.to_owned(), String::new())].into();
    Arc::new(declared_schema(stream).with_metadata(metadata))
}
