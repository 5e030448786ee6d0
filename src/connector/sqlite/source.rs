//! Reading SQLite.
//!
//! The end of a window is fixed while the write lock is held for an instant, so that no writer is open: below a
//! bound of time no row can appear any more but by a clock that goes wrong, and below a bound of numbers none by
//! a new id. Each stream then has a connection of its own, all pinned to one view before the lock is released.
//!
//! The window is applied to typed values after decoding; only where a column is the rowid does SQLite filter.
//! `extracted` counts what the window holds, not what was looked at.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{
    array::{ArrayRef, RecordBatch, RecordBatchOptions, StringBuilder},
    datatypes::{Field, Schema, SchemaRef},
};
use async_trait::async_trait;
use chrono::DateTime;
use datafusion::physical_plan::SendableRecordBatchStream;
use rusqlite::{Connection as Sqlite, types::ValueRef};

use super::{SqliteConnection, types::declared_type};
use crate::{
    connector::{
        Bounds, CatalogTable, Exactness, Marks, RunTime, Snapshot, Source,
        columns::{
            ColumnBuilder, Misfit, TextRules, arrow_type, effective, last_closed_day, last_closed_instant,
            zone,
        },
        scan::{POSITION_COLUMN, Scan, held},
        spec::{OnNull, Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, Place, Result, SourceText},
    names::quoted,
    runtime::{self, BATCH_ROWS, BatchSender},
    types::ColumnType,
    watermark::{CursorValue, Position, Window},
};

/// Rows younger than this are left to the next run, so that a clock that is a little off loses none.
const MARGIN_MS: i64 = 5_000;

/// One connection per stream, all with the same view, until a scan takes it.
struct Pinned(Mutex<HashMap<String, Sqlite>>);

#[async_trait]
impl Source for Arc<SqliteConnection> {
    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        let (this, stream) = (Self::clone(self), stream.clone());
        runtime::blocking(move || {
            let database = this.open_to_read()?;
            let columns = columns(&this, &database, &stream)?;
            let fields: Vec<Field> = columns
                .iter()
                .map(|(name, column)| Field::new(name, arrow_type(column, &stream), true))
                .collect();
            Ok(Arc::new(Schema::new(fields)))
        })
        .await
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        let (this, streams, since) = (Self::clone(self), streams.to_vec(), since.clone());
        runtime::blocking(move || bounds(&this, &streams, &since, time)).await
    }

    async fn snapshot(&self, streams: &[StreamSpec], _: &Bounds) -> Result<Snapshot> {
        let (this, streams) = (Self::clone(self), streams.to_vec());
        runtime::blocking(move || {
            let lock = this.open_to_read()?;
            // Without the right to write there is no lock to take, and no bound was promised to need it.
            let locked = lock.execute_batch("BEGIN IMMEDIATE").map_or_else(
                |error| match error.sqlite_error_code() {
                    Some(rusqlite::ffi::ErrorCode::ReadOnly) => Ok(false),
                    _ => Err(this.error("lock", &error)),
                },
                |()| Ok(true),
            )?;
            let mut pinned = HashMap::new();
            for stream in &streams {
                let database = this.open_to_read()?;
                database
                    .execute_batch("BEGIN; SELECT count(*) FROM sqlite_schema;")
                    .map_err(|error| this.error("read", &error))?;
                pinned.insert(stream.name.clone(), database);
            }
            if locked {
                lock.execute_batch("ROLLBACK").map_err(|error| this.error("unlock", &error))?;
            }
            Ok(Snapshot {
                token: format!("sqlite:{}", this.shown),
                hold: Arc::new(Pinned(Mutex::new(pinned))),
            })
        })
        .await
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        let pinned: Arc<Pinned> = held(snapshot)?;
        let (this, scan) = (Self::clone(self), scan.clone());
        Ok(runtime::blocking_stream(Arc::clone(&scan.schema), move |out| {
            let views = || pinned.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut database = views().remove(&scan.stream.name);
            for _ in 0..VIEW_TRIES {
                // One that read it before, and was let go early, is about to put it back.
                if database.is_some() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
                database = views().remove(&scan.stream.name);
            }
            let database = database.ok_or_else(|| {
                Error::bug(format!("source `{}` was read twice at once from one view", scan.stream.name))
            })?;
            let done = read(&this, &database, &scan, &tap, out);
            views().insert(scan.stream.name.clone(), database);
            done
        }))
    }
}

/// How often to look for a view that another reader has.
const VIEW_TRIES: u32 = 200;

/// What stands in front of a query of the project.
const BEFORE_QUERY: &str = "SELECT * FROM (";

/// The SELECT behind a stream, without its end.
fn query(stream: &StreamSpec) -> Result<String> {
    match &stream.read {
        Read::Table(table) => {
            // An output's name may have dots; schemas of one file are these two.
            let (schema, name) = match table.split_once('.') {
                Some((schema @ ("main" | "temp"), name)) => (Some(schema), name),
                _ => (None, table.as_str()),
            };
            let schema = schema.map(|schema| format!("{schema}.")).unwrap_or_default();
            Ok(format!("SELECT * FROM {schema}{}", quoted(name)?))
        }
        Read::Query { sql, .. } => Ok(format!("{BEFORE_QUERY}{}\n)", sql.trim_end().trim_end_matches(';'))),
        Read::File(_) | Read::Files { .. } | Read::Request(_) => Err(Error::configuration(format!(
            "source `{}` reads no table, and its connection is a SQLite database",
            stream.name
        ))
        .hint("Use `table:` or `query:`.")),
    }
}

/// The columns of a stream, with the types before its zone is applied.
fn columns(
    this: &SqliteConnection,
    database: &Sqlite,
    stream: &StreamSpec,
) -> Result<Vec<(String, ColumnType)>> {
    if let Read::Table(table) = &stream.read {
        let tables = table_names(this, database)?;
        let bare = table.strip_prefix("main.").unwrap_or(table);
        if !tables.iter().any(|name| name.eq_ignore_ascii_case(bare)) {
            let error = Error::configuration(format!(
                "source `{}`: there is no table `{table}` in `{}`",
                stream.name, this.shown
            ));
            return Err(match crate::error::nearest(table, tables.iter().map(String::as_str)) {
                Some(near) => error.hint(format!("Did you mean `{near}`?")),
                None => error.hint(format!("It has: {}.", tables.join(", "))),
            });
        }
    }
    let sql = query(stream)?;
    let statement = database.prepare(&sql).map_err(|error| refused(this, stream, &error))?;
    let described: Vec<(String, Option<ColumnType>)> = statement
        .columns()
        .map(|column| {
            let name = column.name().to_owned();
            let column =
                stream.declared(&name).or_else(|| declared_type(column.decl_type().unwrap_or_default()));
            (name, column)
        })
        .collect();
    drop(statement);
    described
        .into_iter()
        .map(|(name, column)| match column {
            Some(column) => Ok((name, column)),
            None => {
                let column = observed_type(this, database, &sql, &name)?;
                Ok((name, column))
            }
        })
        .collect()
}

/// SQLite does not take the query of a stream: what it says, at the place in the file.
fn refused(this: &SqliteConnection, stream: &StreamSpec, error: &rusqlite::Error) -> Error {
    let (Read::Query { file, sql }, rusqlite::Error::SqlInputError { msg, offset, .. }) =
        (&stream.read, error)
    else {
        return this.error(&format!("prepare source `{}` in", stream.name), error);
    };
    let file = Arc::new(SourceText { path: file.clone(), text: sql.clone() });
    // SQLite counts bytes, in the text that it was given.
    let start = usize::try_from(*offset)
        .ok()
        .and_then(|offset| offset.checked_sub(BEFORE_QUERY.len()))
        .filter(|at| sql.is_char_boundary(*at) && *at < sql.len());
    let place = start.map_or_else(|| Place::whole(&file), |start| Place::word(&file, start));
    Error::configuration(format!("source `{}`: SQLite does not take this query: {msg}", stream.name))
        .at(place)
        .hint("It is SQLite's own dialect, and runs in the source. `floodmark preview` shows what it gives.")
}

/// A column without a declared type is what all of its values are; text, if they differ.
fn observed_type(this: &SqliteConnection, database: &Sqlite, sql: &str, column: &str) -> Result<ColumnType> {
    let sql = format!(
        "SELECT DISTINCT typeof({column}) FROM ({sql}) WHERE {column} IS NOT NULL",
        column = quoted(column)?
    );
    let mut statement = database.prepare(&sql).map_err(|error| this.error("look into", &error))?;
    let classes: Vec<String> = statement
        .query_map([], |row| row.get(0))
        .and_then(Iterator::collect)
        .map_err(|error| this.error("look into", &error))?;
    Ok(match classes.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["integer"] => ColumnType::Int,
        ["real"] => ColumnType::Float,
        ["blob"] => ColumnType::Binary,
        _ => ColumnType::String,
    })
}

fn table_names(this: &SqliteConnection, database: &Sqlite) -> Result<Vec<String>> {
    let mut statement = database
        .prepare("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT LIKE 'floodmark\\_%' ESCAPE '\\' ORDER BY name")
        .map_err(|error| this.error("read", &error))?;
    let names = statement.query_map([], |row| row.get(0)).and_then(Iterator::collect);
    names.map_err(|error| this.error("read", &error))
}

/// The tables and views of the database.
pub(super) fn discover(this: &SqliteConnection) -> Result<Vec<CatalogTable>> {
    let database = this.open_to_read()?;
    table_names(this, &database)?
        .into_iter()
        .map(|name| {
            let stream = StreamSpec::whole(&name, Read::Table(name.clone()));
            let columns = columns(this, &database, &stream)?;
            let columns = columns.into_iter().map(|(name, column)| (name, column.to_string())).collect();
            let failed = |error: rusqlite::Error| this.error("read", &error);
            let mut key = database
                .prepare("SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk")
                .map_err(failed)?;
            let key = key.query_map([&name], |row| row.get(0)).and_then(Iterator::collect).map_err(failed)?;
            let view = database
                .query_row("SELECT type = 'view' FROM sqlite_schema WHERE name = ?1", [&name], |row| {
                    row.get(0)
                })
                .map_err(failed)?;
            Ok(CatalogTable { name, schema: None, view, columns, key, rows: None })
        })
        .collect()
}

fn bounds(this: &SqliteConnection, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
    let database = this.open_to_read()?;
    let mut bounds = Bounds::default();
    database.execute_batch("BEGIN IMMEDIATE").map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ffi::ErrorCode::ReadOnly) => Error::configuration(format!(
            "connection `{}`: `{}` cannot be written, and an incremental read takes its write lock for an instant",
            this.name, this.shown
        ))
        .hint("Give the user the right to write the file, or read it whole, without `incremental`."),
        _ => this.error("lock", &error),
    }).or_else(|error| if streams.iter().any(|stream| stream.cursor.is_some()) { Err(error) } else { Ok(()) })?;
    for stream in streams {
        let Some(cursor) = &stream.cursor else {
            bounds.windows.insert(stream.name.clone(), Window::Whole);
            continue;
        };
        let columns = columns(this, &database, stream)?;
        let first = cursor.columns.first().map(String::as_str).unwrap_or_default();
        let column = columns.iter().find(|(name, _)| name == first).map(|(_, column)| column);
        let mut latest = (time.now - chrono::TimeDelta::milliseconds(MARGIN_MS)).min(time.as_of);
        if let (Some(ColumnType::Timestamp(_)), Some(zone)) = (column, &stream.timezone) {
            latest = last_closed_instant(latest, self::zone(zone)?, cursor.overlap);
        }
        let (hi, exactness) = match column.map(|column| effective(column.clone(), stream)) {
            Some(ColumnType::TimestampTz(_)) => {
                (Some(Position::of(CursorValue::instant(latest))), Exactness::Margin)
            }
            Some(ColumnType::Date(_)) => {
                (Some(Position::of(CursorValue::Date(last_closed_day(latest, stream)?))), Exactness::Margin)
            }
            Some(ColumnType::Int) => (
                greatest(this, &database, stream, first)?.map(|value| Position::of(value).successor()),
                Exactness::Exact,
            ),
            Some(ColumnType::String) => (
                greatest(this, &database, stream, first)?.map(|value| Position::of(value).successor()),
                Exactness::Exact,
            ),
            // Planning refuses every other cursor.
            _ => {
                return Err(Error::bug(format!(
                    "source `{}`: the cursor `{first}` has no order",
                    stream.name
                )));
            }
        };
        bounds.follow(stream, since.get(&stream.name), hi, exactness)?;
    }
    drop(database);
    Ok(bounds)
}

/// The greatest value of a column, in its own order; for text the binary one.
fn greatest(
    this: &SqliteConnection,
    database: &Sqlite,
    stream: &StreamSpec,
    column: &str,
) -> Result<Option<CursorValue>> {
    let sql = format!(
        "SELECT max({column} COLLATE BINARY) FROM ({sql})",
        column = quoted(column)?,
        sql = query(stream)?
    );
    database
        .query_row(&sql, [], |row| {
            Ok(match row.get_ref(0)? {
                ValueRef::Integer(value) => Some(CursorValue::Int(value)),
                ValueRef::Text(value) => Some(CursorValue::Text(String::from_utf8_lossy(value).into_owned())),
                _ => None,
            })
        })
        .map_err(|error| this.error("find the end of", &error))
}

/// One column of a scan: what it is in the query, and its builder.
struct Reader {
    index: usize,
    name: String,
    builder: ColumnBuilder,
}

fn read(this: &SqliteConnection, database: &Sqlite, scan: &Scan, tap: &Tap, out: &BatchSender) -> Result<()> {
    let failed =
        |error: &rusqlite::Error| this.error(&format!("read source `{}` from", scan.stream.name), error);
    let all = columns(this, database, &scan.stream)?;
    let rules = TextRules::of(&scan.stream)?;
    let with_position = scan.schema.field_with_name(POSITION_COLUMN).is_ok();
    let mut readers = Vec::new();
    for field in scan.schema.fields() {
        if field.name() == POSITION_COLUMN {
            continue;
        }
        let index = all.iter().position(|(name, _)| name == field.name());
        let index = index.ok_or_else(|| {
            Error::data(format!(
                "source `{}`: the column `{}` was dropped while the run went on",
                scan.stream.name,
                field.name()
            ))
        })?;
        let column = all
            .get(index)
            .map(|(_, column)| effective(column.clone(), &scan.stream))
            .unwrap_or(ColumnType::String);
        readers.push(Reader {
            index,
            name: field.name().clone(),
            builder: ColumnBuilder::new(&column, &rules, BATCH_ROWS)?,
        });
    }
    let mut cursor = cursor_readers(scan, &all, &rules)?;
    let mut statement = database.prepare(&query(&scan.stream)?).map_err(|error| failed(&error))?;
    let mut rows = statement.query([]).map_err(|error| failed(&error))?;
    let mut positions = StringBuilder::new();
    let (mut bytes, mut count, mut number) = (0, 0, 0_u64);
    while let Some(row) = rows.next().map_err(|error| failed(&error))? {
        number += 1;
        let position = || format!("{} row {number}", this.shown);
        if let Some(on_null) = cursor.as_mut() {
            match on_null.position(row) {
                Ok(Some(at)) if !scan.window.holds(&at) => continue,
                Ok(Some(_)) => {}
                Ok(None) => match on_null.policy {
                    OnNull::Include => {}
                    OnNull::Exclude => {
                        tap.filtered(1);
                        continue;
                    }
                    OnNull::Error => {
                        return Err(Error::data(format!(
                            "source `{}`: {}: the cursor is null",
                            scan.stream.name,
                            position()
                        ))
                        .hint("Say what to do with such rows: `on_null: include` or `on_null: exclude`."));
                    }
                },
                Err((column, why)) => {
                    // A cursor that cannot be read cannot be placed in a window: never skipped in silence.
                    tap.reject(&scan.stream, position(), format!("`{column}` {why}"), || {
                        row_json(row, &all)
                    })?;
                    continue;
                }
            }
        }
        let (mut bad, mut nulled) = (None, Vec::new());
        for reader in &mut readers {
            let value = row.get_ref(reader.index).map_err(|error| failed(&error))?;
            if bad.is_some() {
                break;
            }
            bytes += size(value);
            if let Err(why) = append(&mut reader.builder, value) {
                if scan.stream.unfit_as_null.contains(&reader.name) {
                    reader.builder.null();
                    nulled.push(reader.name.clone());
                    continue;
                }
                bad = Some(format!("`{}` {why}", reader.name));
            }
        }
        if let Some(reason) = bad {
            // The columns before the bad one have one value too many: start the batch over without this row.
            flush(&mut readers, &mut positions, scan, with_position, count, tap, out)?;
            (bytes, count) = (0, 0);
            tap.reject(&scan.stream, position(), reason, || row_json(row, &all))?;
            continue;
        }
        nulled.iter().for_each(|column| tap.null(column));
        if with_position {
            positions.append_value(position());
        }
        count += 1;
        if (count == BATCH_ROWS || bytes >= scan.batch_bytes)
            && !flush(
                &mut readers,
                &mut positions,
                scan,
                with_position,
                std::mem::take(&mut count),
                tap,
                out,
            )?
        {
            return Ok(());
        }
        if count == 0 {
            tap.bytes(bytes as u64);
            bytes = 0;
        }
    }
    tap.bytes(bytes as u64);
    flush(&mut readers, &mut positions, scan, with_position, count, tap, out)?;
    tap.finish();
    Ok(())
}

/// Sends the first `count` rows of the builders. False once nobody reads any more.
fn flush(
    readers: &mut [Reader],
    positions: &mut StringBuilder,
    scan: &Scan,
    with_position: bool,
    count: usize,
    tap: &Tap,
    out: &BatchSender,
) -> Result<bool> {
    let mut arrays: Vec<ArrayRef> =
        readers.iter_mut().map(|reader| reader.builder.finish()).map(|array| array.slice(0, count)).collect();
    if with_position {
        let at = scan.schema.index_of(POSITION_COLUMN)?;
        arrays.insert(at, Arc::new(positions.finish()));
    }
    if count == 0 {
        return Ok(true);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(count));
    let batch = RecordBatch::try_new_with_options(Arc::clone(&scan.schema), arrays, &options)?;
    tap.rows(&batch)?;
    Ok(out.send(batch))
}

/// Reads a row's cursor, so that the window can be applied to typed values.
struct CursorReader {
    columns: Vec<(usize, String, ColumnType)>,
    rules: TextRules,
    policy: OnNull,
}

fn cursor_readers(
    scan: &Scan,
    all: &[(String, ColumnType)],
    rules: &TextRules,
) -> Result<Option<CursorReader>> {
    let (Some(cursor), Window::Cursor { .. }) = (&scan.stream.cursor, &scan.window) else { return Ok(None) };
    let mut columns = Vec::new();
    for name in &cursor.columns {
        let Some(index) = all.iter().position(|(column, _)| column == name) else {
            return Err(Error::configuration(format!(
                "source `{}`: there is no cursor column `{name}`",
                scan.stream.name
            )));
        };
        let column = all
            .get(index)
            .map(|(_, column)| effective(column.clone(), &scan.stream))
            .unwrap_or(ColumnType::String);
        columns.push((index, name.clone(), column));
    }
    Ok(Some(CursorReader { columns, rules: rules.clone(), policy: cursor.on_null }))
}

impl CursorReader {
    fn position(&mut self, row: &rusqlite::Row<'_>) -> Result<Option<Position>, (String, Misfit)> {
        let mut values = Vec::with_capacity(self.columns.len());
        for (index, name, column) in &self.columns {
            let bad = |why: &str| (name.clone(), Misfit(why.to_owned()));
            let value = row.get_ref(*index).map_err(|error| bad(&error.to_string()))?;
            let value = match (value, column) {
                (ValueRef::Null, _) => return Ok(None),
                (ValueRef::Integer(value), ColumnType::Int) => CursorValue::Int(value),
                (ValueRef::Text(value), ColumnType::String) => {
                    CursorValue::Text(text(value).map_err(|why| (name.clone(), why))?.to_owned())
                }
                (ValueRef::Text(value), ColumnType::TimestampTz(format)) => {
                    let text = text(value).map_err(|why| (name.clone(), why))?;
                    let micros =
                        crate::connector::columns::instant(text, format.as_deref(), self.rules.zone())
                            .map_err(|why| (name.clone(), why))?;
                    CursorValue::Instant(
                        DateTime::from_timestamp_micros(micros).ok_or_else(|| bad("is too far away"))?,
                    )
                }
                (ValueRef::Text(value), ColumnType::Date(format)) => {
                    let text = text(value).map_err(|why| (name.clone(), why))?;
                    let days = crate::connector::columns::date(text, format.as_deref())
                        .map_err(|why| (name.clone(), why))?;
                    let day = chrono::NaiveDate::default() + chrono::TimeDelta::days(i64::from(days));
                    CursorValue::Date(day)
                }
                (_, column) => return Err(bad(&format!("is not the {column} that its column declares"))),
            };
            values.push(value);
        }
        Ok(Some(Position(values)))
    }
}

fn text(value: &[u8]) -> Result<&str, Misfit> {
    std::str::from_utf8(value).map_err(|_| Misfit("is text that is not UTF-8".to_owned()))
}

fn append(builder: &mut ColumnBuilder, value: ValueRef<'_>) -> Result<(), Misfit> {
    match value {
        ValueRef::Null => {
            builder.null();
            Ok(())
        }
        ValueRef::Integer(value) => builder.int(value),
        ValueRef::Real(value) => builder.real(value),
        ValueRef::Text(value) => builder.text(text(value)?),
        ValueRef::Blob(value) => builder.bytes(value),
    }
}

fn size(value: ValueRef<'_>) -> usize {
    match value {
        ValueRef::Text(value) | ValueRef::Blob(value) => value.len(),
        _ => 8,
    }
}

/// A row as JSON, for the quarantine.
fn row_json(row: &rusqlite::Row<'_>, columns: &[(String, ColumnType)]) -> String {
    let object: serde_json::Map<String, serde_json::Value> = columns
        .iter()
        .enumerate()
        .map(|(index, (name, _))| {
            let value = match row.get_ref(index) {
                Ok(ValueRef::Integer(value)) => value.into(),
                Ok(ValueRef::Real(value)) => value.into(),
                Ok(ValueRef::Text(value)) => String::from_utf8_lossy(value).into_owned().into(),
                Ok(ValueRef::Blob(value)) => hex::encode(value).into(),
                Ok(ValueRef::Null) | Err(_) => serde_json::Value::Null,
            };
            (name.clone(), value)
        })
        .collect();
    serde_json::Value::Object(object).to_string()
}
