//! Reading PostgreSQL.
//!
//! All streams of a run read one snapshot, which a leading session exports and holds; each scan has sessions of its own
//! and is a binary COPY of a SELECT. The server applies the projection, and as much of the window and of what
//! models ask for as surely means the same there; the rest of the window is applied here, to typed values.
//!
//! A large table that is read from end to end is read by several sessions at once, each taking the next range of its pages from
//! one queue, and of the pages of each of its partitions; their rows come in no order. So the table's files are read once, however many there are. Of a window behind a mark, and of
//! what a model filters, the server's planner says whether it would read the table so; what an index serves better is left to one session.

use std::{
    borrow::Cow,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use arrow::{
    array::{ArrayRef, RecordBatch, RecordBatchOptions, StringBuilder},
    datatypes::{Field, Schema, SchemaRef},
};
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate};
use chrono_tz::Tz;
use datafusion::physical_plan::SendableRecordBatchStream;
use futures::StreamExt;
use tokio::sync::watch;
use tokio_postgres::{
    CopyOutStream, SimpleQueryMessage,
    error::SqlState,
    types::{Kind, Type},
};
use tracing::info;

use super::{
    PostgresConnection, Session,
    bounds::{self, condition, text},
    decode::{Bytes, Column, field, shown},
    filter,
    frames::{self, Block, Blocks, HEAD, Next, without_heads},
    texts,
    types::{Reading, Wire, declared, wire},
};
use crate::{
    connector::{
        Bounds, CatalogTable, Marks, RunTime, Snapshot, Source,
        columns::{ColumnBuilder, Misfit, TextRules, effective, zone},
        scan::{Order, POSITION_COLUMN, Scan, held},
        spec::{OnNull, Read, StreamSpec},
        tap::Tap,
    },
    error::{Error, ErrorKind, Place, Result, SourceText, nearest},
    names::quoted,
    runtime::{self, AsyncSender, BATCH_ROWS},
    types::ColumnType,
    watermark::{CursorValue, Position, Window},
};

/// The session that exported the snapshot. While it lives, the snapshot does.
struct Lead {
    session: Session,
    /// What `SET TRANSACTION SNAPSHOT` takes.
    id: String,
    /// When the server was started: another one may know the same id.
    server: String,
}

/// Tells one server from another.
const SERVER: &str = "pg_postmaster_start_time()::text";

#[async_trait]
impl Source for Arc<PostgresConnection> {
    fn applies_conditions(&self, _: &StreamSpec) -> bool {
        true
    }

    async fn describe(&self, stream: &StreamSpec) -> Result<SchemaRef> {
        let session = self.transaction("READ ONLY").await?;
        let shape = Shape::of(self, &session, stream).await?;
        self.rest(session).await;
        Ok(Arc::new(Schema::new(shape.columns.iter().map(ColumnShape::field).collect::<Vec<_>>())))
    }

    async fn origin(&self) -> Result<Option<String>> {
        let session = self.transaction("READ ONLY").await?;
        let sql =
            "SELECT s.system_identifier::text || '/' || d.oid FROM pg_control_system() AS s, pg_database AS d
            WHERE d.datname = current_database()";
        match session.query_typed_opt(sql, &[]).await {
            Ok(row) => {
                self.rest(session).await;
                Ok(row.map(|row| row.get(0)))
            }
            // Some providers do not tell; then nobody can know.
            Err(error)
                if error.code().is_some_and(|code| {
                    [SqlState::INSUFFICIENT_PRIVILEGE, SqlState::UNDEFINED_FUNCTION].contains(code)
                }) =>
            {
                Ok(None)
            }
            Err(error) => Err(self.error("ask for the identity of", &error)),
        }
    }

    async fn bounds(&self, streams: &[StreamSpec], since: &Marks, time: RunTime) -> Result<Bounds> {
        bounds::bounds(self, streams, since, time).await
    }

    async fn snapshot(&self, _: &[StreamSpec], _: &Bounds) -> Result<Snapshot> {
        let session = self.transaction("ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        let row = session
            .query_typed_one(&format!("SELECT pg_export_snapshot(), {SERVER}"), &[])
            .await
            .map_err(|error| self.error("export a snapshot of", &error))?;
        let (id, server): (String, String) = (row.get(0), row.get(1));
        Ok(Snapshot { token: id.clone(), hold: Arc::new(Lead { session, id, server }) })
    }

    async fn rows(&self, snapshot: &Snapshot, stream: &StreamSpec) -> Result<Option<u64>> {
        let Read::Table(_) = &stream.read else { return Ok(None) };
        let lead: Arc<Lead> = held(snapshot)?;
        let sql = "SELECT reltuples::int8 FROM pg_class WHERE oid = to_regclass($1) AND reltuples >= 0";
        let row = lead.session.query_typed_opt(sql, &texts([&from(stream)?])).await;
        let row = row.map_err(|error| self.error("look into the catalog of", &error))?;
        Ok(row.and_then(|row| u64::try_from(row.get::<_, i64>(0)).ok()))
    }

    fn scan(&self, snapshot: &Snapshot, scan: &Scan, tap: Arc<Tap>) -> Result<SendableRecordBatchStream> {
        let lead: Arc<Lead> = held(snapshot)?;
        let (this, scan) = (Self::clone(self), scan.clone());
        let readers = readers(self, &scan);
        let told = watch::Sender::new(None);
        let hear = told.subscribe();
        let mut first = Some(told);
        Ok(runtime::streams(Arc::clone(&scan.schema), |out| {
            (0..readers).map(move |_| {
                let (this, lead, scan, tap) =
                    (Self::clone(&this), Arc::clone(&lead), scan.clone(), Arc::clone(&tap));
                let (told, hear, out) = (first.take(), hear.clone(), out.clone());
                async move { Box::pin(read(&this, &lead, &scan, &tap, told, hear, &out)).await }
            })
        }))
    }
}

/// What a stream has: its columns, and where they come from.
pub(super) struct Shape {
    pub(super) columns: Vec<ColumnShape>,
    from: String,
    /// Whether each row has a place in a table's file.
    is_table: bool,
    /// How many pages its file has, where they can be read range by range; of a partitioned table the largest one's.
    pages: u64,
    /// How many there are in all its files.
    all_pages: u64,
}

/// One column of a stream.
pub(super) struct ColumnShape {
    name: String,
    /// How it is read.
    pub(super) read: ReadAs,
    /// What it is in the server, where Arrow does not say it.
    type_name: Option<String>,
    /// What it is in the server, whatever it is read as; of a domain what it is made of.
    pub(super) of: Type,
    /// Whether it may be null as far as the server knows.
    pub(super) may_be_null: bool,
}

pub(super) enum ReadAs {
    /// In the server's binary form, after a cast if there is one.
    Wire(Wire, Option<&'static str>),
    /// As the server's text, into a type of ours.
    Text(ColumnType),
}

impl Shape {
    /// Asks the server what a stream has.
    pub(super) async fn of(
        this: &Arc<PostgresConnection>,
        session: &Session,
        stream: &StreamSpec,
    ) -> Result<Self> {
        let from = from(stream)?;
        let sql = format!("SELECT * FROM {from}");
        let statement = match session.prepare(&sql).await {
            Ok(statement) => statement,
            Err(error) => return Err(refused(this, stream, &error).await),
        };
        let failed = |error: tokio_postgres::Error| this.error("look into the catalog of", &error);
        let is_money = |of: &Type| *of == Type::MONEY || *of == Type::MONEY_ARRAY;
        let mut money_scale = 2;
        if statement.columns().iter().any(|column| is_money(column.type_())) {
            let row =
                session.query_typed_one("SELECT scale(1::money::numeric)", &[]).await.map_err(failed)?;
            money_scale = i8::try_from(row.get::<_, i32>(0)).unwrap_or(2);
        }
        let mut never_null = Vec::new();
        let (mut is_table, mut pages, mut all_pages) = (false, 0, 0);
        if let (Read::Table(_), Some(table)) =
            (&stream.read, statement.columns().iter().find_map(tokio_postgres::Column::table_oid))
        {
            // Rows of each partition have places of their own; a range of them is a range in each. Before version 14 it would read all of a file.
            let sql = "SELECT c.relkind IN ('r', 'm') AND is_it,
                   CASE WHEN c.relkind IN ('r', 'p') THEN array(SELECT attnum FROM pg_attribute WHERE attrelid = c.oid AND attnotnull) ELSE '{}' END,
                   CASE WHEN ranged THEN largest / block END, CASE WHEN ranged THEN total / block END
                FROM pg_class AS c,
                   LATERAL (SELECT c.relpersistence <> 't' AND c.oid = to_regclass($2) AS is_it, current_setting('block_size')::int8 AS block) AS i,
                   LATERAL (SELECT max(pg_relation_size(f.oid)) AS largest, sum(pg_relation_size(f.oid))::int8 AS total,
                           is_it AND bool_and(f.relkind IN ('r', 'm') AND m.amname = 'heap') AND current_setting('server_version_num')::int >= 140000 AS ranged
                       FROM (SELECT c.oid WHERE c.relkind <> 'p' UNION ALL
                               SELECT relid FROM pg_partition_tree(CASE c.relkind WHEN 'p' THEN c.oid END) WHERE isleaf) AS l (oid)
                           JOIN pg_class AS f USING (oid) LEFT JOIN pg_am AS m ON m.oid = f.relam) AS files
                WHERE c.oid = $1";
            if let Some(row) = session
                .query_typed_opt(sql, &[(&table, Type::OID), (&from, Type::TEXT)])
                .await
                .map_err(failed)?
            {
                is_table = row.get::<_, Option<bool>>(0).unwrap_or_default();
                never_null = row.get::<_, Vec<i16>>(1);
                let number =
                    |index| row.get::<_, Option<i64>>(index).and_then(|pages| u64::try_from(pages).ok());
                (pages, all_pages) = (number(2).unwrap_or_default(), number(3).unwrap_or_default());
            }
        }
        let zone = stream.timezone.as_deref().map(zone).transpose()?;
        let columns = statement
            .columns()
            .iter()
            .map(|column| {
                let may_be_null = column.column_id().is_none_or(|id| !never_null.contains(&id));
                ColumnShape::of(stream, column, money_scale, zone, may_be_null)
            })
            .collect();
        Ok(Self { columns, from, is_table, pages, all_pages })
    }

    /// What stands behind FROM.
    pub(super) fn from(&self) -> &str {
        &self.from
    }

    /// Whether more than one session pays.
    fn is_large(&self) -> bool {
        self.all_pages >= FEW_PAGES
    }

    /// The column of that name.
    pub(super) fn column(&self, name: &str) -> Option<&ColumnShape> {
        self.columns.iter().find(|column| column.name == name)
    }
}

impl ColumnShape {
    fn of(
        stream: &StreamSpec,
        column: &tokio_postgres::Column,
        money_scale: i8,
        zone: Option<Tz>,
        may_be_null: bool,
    ) -> Self {
        let (native, type_name) = match wire(column.type_(), column.type_modifier(), money_scale) {
            Some((wire, type_name)) => (Some(wire), type_name),
            None => (None, Some(column.type_().name().to_owned())),
        };
        let (read, type_name) = match (stream.declared(column.name()), native) {
            (Some(declared_type), native) => match declared(&declared_type, native.as_ref()) {
                // Of a declared type the job knows best what it is.
                Reading::Native(wire) => (ReadAs::Wire(wire, None), None),
                Reading::Cast(cast, wire) => (ReadAs::Wire(wire, Some(cast)), None),
                Reading::Text => (ReadAs::Text(declared_type), None),
            },
            (None, Some(wire)) => (ReadAs::Wire(wire, None), type_name),
            (None, None) => (ReadAs::Wire(Wire::Text, Some("text")), type_name),
        };
        let read = match (read, zone) {
            (ReadAs::Wire(Wire::Timestamp, cast), Some(zone)) => ReadAs::Wire(Wire::TimestampIn(zone), cast),
            (ReadAs::Text(column), Some(_)) => ReadAs::Text(effective(column, stream)),
            (read, _) => read,
        };
        let mut of = column.type_().clone();
        while let Kind::Domain(base) = of.kind() {
            of = base.clone();
        }
        Self { name: column.name().to_owned(), read, type_name, of, may_be_null }
    }

    fn field(&self) -> Field {
        match &self.read {
            ReadAs::Wire(wire, _) => field(&self.name, wire, self.type_name.as_ref()),
            ReadAs::Text(column) => Field::new(&self.name, column.arrow(), true),
        }
    }

    /// The column as it is selected.
    pub(super) fn sql(&self) -> Result<String> {
        let name = quoted(&self.name)?;
        Ok(match &self.read {
            ReadAs::Wire(_, None) => name,
            ReadAs::Wire(_, Some(cast)) => format!("{name}::{cast}"),
            ReadAs::Text(_) => format!("{name}::text"),
        })
    }

    /// Its type as a cursor; `None` if it has no order that both sides agree on.
    pub(super) fn cursor_type(&self) -> Option<ColumnType> {
        match &self.read {
            ReadAs::Wire(Wire::Int2 | Wire::Int4 | Wire::Int8, _) => Some(ColumnType::Int),
            ReadAs::Wire(Wire::Date, _) => Some(ColumnType::Date(None)),
            ReadAs::Wire(Wire::TimestampTz | Wire::TimestampIn(_), _) => Some(ColumnType::TimestampTz(None)),
            ReadAs::Wire(wire, _) if wire.arrow() == arrow::datatypes::DataType::Utf8 => {
                Some(ColumnType::String)
            }
            ReadAs::Text(ColumnType::String) => Some(ColumnType::String),
            _ => None,
        }
    }

    /// Whether it is what a clock without a zone showed.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.read, ReadAs::Wire(Wire::TimestampIn(_), _))
    }

    fn builder(&self, rules: &TextRules) -> Result<Column> {
        Ok(match &self.read {
            ReadAs::Wire(wire, _) => Column::new(wire.clone(), BATCH_ROWS),
            ReadAs::Text(column) => Column::parsed(ColumnBuilder::new(column, rules, BATCH_ROWS)?),
        })
    }

    /// A value as text, for rows that are set aside.
    fn show(&self, value: &[u8]) -> String {
        let text = match &self.read {
            ReadAs::Wire(wire, _) => shown(wire, value).ok(),
            ReadAs::Text(_) => std::str::from_utf8(value).ok().map(str::to_owned),
        };
        text.unwrap_or_else(|| hex::encode(value))
    }

    /// A value as a place in the order of the cursor.
    fn cursor_value(&self, value: &[u8]) -> Result<CursorValue, Misfit> {
        let torn = || Misfit("cannot be read as a cursor".to_owned());
        let ReadAs::Wire(wire, _) = &self.read else {
            return std::str::from_utf8(value)
                .map(|text| CursorValue::Text(text.to_owned()))
                .map_err(|_| torn());
        };
        let mut one = Column::new(wire.clone(), 1);
        one.append(Some(value))?;
        let array = one.finish().map_err(|_| torn())?;
        use arrow::{array::AsArray, datatypes as t};
        Ok(match wire {
            Wire::Int2 => CursorValue::Int(array.as_primitive::<t::Int16Type>().value(0).into()),
            Wire::Int4 => CursorValue::Int(array.as_primitive::<t::Int32Type>().value(0).into()),
            Wire::Int8 => CursorValue::Int(array.as_primitive::<t::Int64Type>().value(0)),
            Wire::Date => {
                let days = array.as_primitive::<t::Date32Type>().value(0);
                let day = NaiveDate::default().checked_add_signed(chrono::TimeDelta::days(days.into()));
                CursorValue::Date(day.ok_or_else(|| Misfit("is too far away".to_owned()))?)
            }
            Wire::TimestampTz | Wire::TimestampIn(_) => {
                let micros = array.as_primitive::<t::TimestampMicrosecondType>().value(0);
                let at = DateTime::from_timestamp_micros(micros);
                CursorValue::Instant(at.ok_or_else(|| Misfit("is too far away".to_owned()))?)
            }
            _ => CursorValue::Text(array.as_string::<i32>().value(0).to_owned()),
        })
    }
}

/// What stands in front of a query of the project, in the statement that is prepared.
const BEFORE_QUERY: &str = "SELECT * FROM (\n";

/// What stands behind FROM for a stream.
fn from(stream: &StreamSpec) -> Result<String> {
    match &stream.read {
        Read::Table(table) => Ok(table.split('.').map(quoted).collect::<Result<Vec<_>>>()?.join(".")),
        Read::Query { sql, .. } => Ok(format!("(\n{}\n) AS query", sql.trim_end().trim_end_matches(';'))),
        Read::File(_) | Read::Files { .. } | Read::Request(_) => Err(Error::configuration(format!(
            "source `{}` reads no table, and its connection is a PostgreSQL database",
            stream.name
        ))
        .hint("Use `table:` or `query:`.")),
    }
}

/// The server does not take a stream: what it says, at the place in the file; or which table was meant.
async fn refused(
    this: &Arc<PostgresConnection>,
    stream: &StreamSpec,
    error: &tokio_postgres::Error,
) -> Error {
    let doing = format!("read source `{}` from", stream.name);
    let told = this.error(&doing, error);
    match (&stream.read, error.as_db_error()) {
        (Read::Query { file, sql }, Some(server)) => {
            let file = Arc::new(SourceText { path: file.clone(), text: sql.clone() });
            // The server counts characters, from 1, in the text that it was given.
            let before = BEFORE_QUERY.chars().count();
            let at = match server.position() {
                Some(tokio_postgres::error::ErrorPosition::Original(at)) => usize::try_from(*at).ok(),
                _ => None,
            };
            let start = at
                .and_then(|at| at.checked_sub(before + 1))
                .and_then(|at| sql.char_indices().nth(at))
                .map(|(start, _)| start);
            let place = start.map_or_else(|| Place::whole(&file), |start| Place::word(&file, start));
            Error::configuration(format!(
                "source `{}`: PostgreSQL does not take this query: {}",
                stream.name,
                server.message()
            ))
            .at(place)
            .hint(server.hint().map_or_else(
                || "It is PostgreSQL's own dialect, and runs in the source.".to_owned(),
                str::to_owned,
            ))
        }
        (Read::Table(table), Some(server)) if matches!(server.code().code(), "42P01" | "3F000") => {
            let error = Error::configuration(format!(
                "source `{}`: there is no table `{table}` in `{}`",
                stream.name,
                this.place()
            ));
            let tables = discover(this).await.unwrap_or_default();
            let names = tables.iter().map(|table| table.name.as_str());
            match nearest(table, names.clone()) {
                Some(near) => error.hint(format!("Did you mean `{near}`?")),
                None => {
                    let some: Vec<&str> = names.take(12).collect();
                    error.hint(format!("It has: {}.", some.join(", ")))
                }
            }
        }
        _ => told,
    }
}

/// The tables and views of the database, with their columns, keys and the planner's idea of their size.
pub(super) async fn discover(this: &Arc<PostgresConnection>) -> Result<Vec<CatalogTable>> {
    let session = this.transaction("READ ONLY").await?;
    let sql = "
        SELECT CASE WHEN n.nspname = current_schema() THEN c.relname ELSE n.nspname || '.' || c.relname END, n.nspname::text,
               c.relkind IN ('v', 'm'), c.reltuples::int8, a.attname::text, format_type(a.atttypid, a.atttypmod),
               array_position(i.indkey::int2[], a.attnum)
        FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisprimary
        WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition AND n.nspname !~ '^pg_'
          AND n.nspname <> 'information_schema' AND c.relname !~ '^floodmark_(state|log|quarantine)$'
          AND has_schema_privilege(n.oid, 'USAGE')
        ORDER BY n.nspname, c.relname, a.attnum";
    let rows =
        session.query_typed(sql, &[]).await.map_err(|error| this.error("list the tables of", &error))?;
    let mut tables: Vec<(CatalogTable, Vec<(i32, String)>)> = Vec::new();
    for row in rows {
        let name: String = row.get(0);
        if tables.last().is_none_or(|(last, _)| last.name != name) {
            let table = CatalogTable {
                name,
                schema: Some(row.get(1)),
                view: row.get(2),
                columns: Vec::new(),
                key: Vec::new(),
                rows: u64::try_from(row.get::<_, i64>(3)).ok(),
            };
            tables.push((table, Vec::new()));
        }
        if let (Some((table, key)), Some(column)) = (tables.last_mut(), row.get::<_, Option<String>>(4)) {
            if let Some(at) = row.get::<_, Option<i32>>(6) {
                key.push((at, column.clone()));
            }
            table.columns.push((column, row.get(5)));
        }
    }
    let ordered = |(mut table, mut key): (CatalogTable, Vec<(i32, String)>)| {
        key.sort_unstable();
        table.key = key.into_iter().map(|(_, column)| column).collect();
        table
    };
    Ok(tables.into_iter().map(ordered).collect())
}

/// What is asked for of a scan.
struct Selection<'a> {
    scan: &'a Scan,
    shape: &'a Shape,
    /// The columns that are given, as they are selected.
    given: Vec<&'a ColumnShape>,
    /// The cursor's columns and where they are selected; empty if the server applies the window.
    cursor: Vec<(usize, &'a ColumnShape)>,
    /// Where the row's place in the table is selected.
    place: Option<usize>,
    /// What of the window the server applies.
    window: String,
}

/// One scan: the columns that are built, and what is counted.
struct Reader<'a> {
    tap: &'a Tap,
    selection: Selection<'a>,
    columns: Vec<Column>,
    positions: Option<StringBuilder>,
    count: usize,
    bytes: usize,
    /// Whether the columns before one that did not fit hold a value more.
    uneven: bool,
    number: u64,
    /// The part of the table that is read: the condition for it.
    part: &'a str,
    /// How many fields a row has.
    width: usize,
    /// The fields of the row at hand, and of the rows behind it that are taken with it.
    fields: Vec<Span>,
    /// Whether rows may be taken together: nobody asks where one of them stands.
    in_blocks: bool,
    /// How many rows are taken one by one, because one of them does not fit.
    singly: usize,
}

/// The first bytes of a binary COPY.
const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";

/// Pages of a table below which one session reads it.
const FEW_PAGES: u64 = 4096;

/// Pages of a range: so few that no reader is left with the last one for long, and so many that asking for them costs nothing.
const RANGE_PAGES: std::ops::RangeInclusive<u64> = 256..=16_384;

/// How many sessions may read a scan: several only in any order.
fn readers(this: &PostgresConnection, scan: &Scan) -> usize {
    let may_be_parted = scan.order != Order::Decides && scan.limit.is_none();
    let unless_set = if scan.in_one_stream { 1 } else { 2 };
    if may_be_parted { this.options.readers.unwrap_or(unless_set).max(1).into() } else { 1 }
}

/// Whether the server reads all of a table for a scan, by itself, and nothing else. It is asked where the scan is not for all rows: an index may serve it
/// better, and of few rows it may look for them with several processes.
async fn reads_all(this: &PostgresConnection, session: &Session, shape: &Shape, scan: &Scan) -> Result<bool> {
    let from_the_start = match &scan.window {
        Window::Whole => true,
        Window::Cursor { from, .. } => from.is_none(),
        Window::Files { .. } => false,
    };
    if from_the_start && scan.conditions.is_empty() {
        return Ok(true);
    }
    let sql = format!("EXPLAIN (FORMAT JSON) {}", Selection::of(scan, shape)?.sql("")?);
    let doing = || format!("plan source `{}` in", scan.stream.name);
    let told = session.simple_query(&sql).await.map_err(|error| this.error(&doing(), &error))?;
    let plan = told.iter().find_map(|told| match told {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    let plan: serde_json::Value = plan.and_then(|plan| serde_json::from_str(plan).ok()).unwrap_or_default();
    Ok(plan.get(0).and_then(|plan| plan.get("Plan")).is_some_and(scans_only))
}

/// Whether tables are read from end to end, by one process, and nothing else is, in a plan of the server's.
fn scans_only(node: &serde_json::Value) -> bool {
    let below = node.get("Plans").and_then(serde_json::Value::as_array);
    let kind = node.get("Node Type").and_then(serde_json::Value::as_str);
    matches!((kind, below), (Some("Seq Scan"), None) | (Some("Append"), Some(_)))
        && below.into_iter().flatten().all(scans_only)
}

/// What the readers of one scan share.
struct Shared {
    shape: Shape,
    /// The rows of the scan, in parts: each a condition on their place, or none.
    parts: Vec<String>,
    /// The part that nobody has taken yet.
    next: AtomicUsize,
    /// How many parts were read to their end.
    done: AtomicUsize,
}

impl Shared {
    fn new(shape: Shape, readers: usize) -> Self {
        let mut parts = vec![String::new()];
        if readers > 1 {
            let each = shape.pages / (8 * readers as u64);
            let each = each.clamp(*RANGE_PAGES.start(), *RANGE_PAGES.end());
            let starts: Vec<u64> =
                (0..shape.pages).step_by(usize::try_from(each).unwrap_or(usize::MAX)).collect();
            // The last one has no end, and the first no beginning: a table's parts are all of it, whatever its size was.
            parts = (0..starts.len())
                .map(|at| {
                    let from = starts.get(at).filter(|_| at > 0).map(|page| format!("ctid >= '({page},0)'"));
                    let to = starts.get(at + 1).map(|page| format!("ctid < '({page},0)'"));
                    from.into_iter().chain(to).collect::<Vec<_>>().join(" AND ")
                })
                .collect();
        }
        Self { shape, parts, next: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    fn take(&self) -> Option<&String> {
        self.parts.get(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// A session that sees the run's snapshot.
async fn follow(this: &Arc<PostgresConnection>, lead: &Lead, stream: &StreamSpec) -> Result<Session> {
    let doing = format!("read source `{}` from", stream.name);
    let failed = |error: &tokio_postgres::Error| this.error(&doing, error);
    let begin = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {}", this.settings()?);
    let session = this.after(&doing, &begin).await?;
    let import = format!("SET TRANSACTION SNAPSHOT {}", text(&lead.id));
    session.batch_execute(&import).await.map_err(|error| {
        let told = failed(&error);
        if error.as_db_error().is_none() {
            return told;
        }
        told.with_kind(ErrorKind::Temporary)
            .note("the session that held the run's snapshot was lost")
            .hint("Run again: nothing of this run was published.")
    })?;
    let row =
        session.query_typed_one(&format!("SELECT {SERVER}"), &[]).await.map_err(|error| failed(&error))?;
    this.take_over(&session).await.map_err(|error| failed(&error))?;
    if row.get::<_, String>(0) != lead.server {
        return Err(Error::temporary(format!(
            "connection `{}` leads to several servers, and this one has not the run's snapshot",
            this.name
        ))
        .hint("Name one server as `host`, not a balancer. Run again: nothing of this run was published."));
    }
    Ok(session)
}

/// A session that sees the snapshot, and holds the table as it is before it takes a part: while it waited for its turn with somebody who
/// rewrites the table, the first reader could end, and pages be others.
async fn help(
    this: &Arc<PostgresConnection>,
    lead: &Lead,
    stream: &StreamSpec,
    shape: &Shape,
) -> Result<Session> {
    let session = follow(this, lead, stream).await?;
    let lock = format!("LOCK TABLE {} IN ACCESS SHARE MODE NOWAIT", shape.from());
    let doing = format!("read source `{}` from", stream.name);
    session.batch_execute(&lock).await.map_err(|error| this.error(&doing, &error))?;
    Ok(session)
}

/// One reader of a scan. The first one looks what there is and tells the others, who help where there is work for them.
async fn read(
    this: &Arc<PostgresConnection>,
    lead: &Lead,
    scan: &Scan,
    tap: &Tap,
    told: Option<watch::Sender<Option<Arc<Shared>>>>,
    mut hear: watch::Receiver<Option<Arc<Shared>>>,
    out: &AsyncSender,
) -> Result<()> {
    let stream = &scan.stream;
    let (session, shared) = if let Some(told) = told {
        let session = follow(this, lead, stream).await?;
        let shape = Shape::of(this, &session, stream).await?;
        let readers = readers(this, scan);
        let is_parted = readers > 1 && shape.is_large() && reads_all(this, &session, &shape, scan).await?;
        let shared = Arc::new(Shared::new(shape, if is_parted { readers } else { 1 }));
        told.send_replace(Some(Arc::clone(&shared)));
        (session, shared)
    } else {
        // Without the first one there is nothing to be told: it says itself what went wrong.
        let Ok(shared) = hear.wait_for(Option::is_some).await.map(|shared| shared.clone()) else {
            return Ok(());
        };
        let Some(shared) = shared.filter(|shared| shared.parts.len() > 1) else { return Ok(()) };
        let all_taken = async {
            while shared.next.load(Ordering::Relaxed) < shared.parts.len() {
                runtime::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        let session = tokio::select! {
            session = help(this, lead, stream, &shared.shape) => session,
            () = all_taken => return Ok(()),
        };
        match session {
            Ok(session) => (session, shared),
            Err(error) => {
                // The others do its work.
                info!(source = stream.name, "one reader less: {error}");
                return Ok(());
            }
        }
    };
    let (mut session, mut parts) = (session, 0);
    let mut reader = Reader::new(scan, &shared.shape, tap)?;
    while let Some(part) = shared.take() {
        session = match read_part(this, session, &mut reader, part, out).await? {
            Some(session) => session,
            None => return Ok(()),
        };
        parts += 1;
    }
    // A batch goes on from one part to the next: who filters rows gathers small ones anew, and all that come behind them.
    if let Some(batch) = reader.flush()?
        && !out.send(batch).await
    {
        return Ok(());
    }
    if shared.done.fetch_add(parts, Ordering::Relaxed) + parts == shared.parts.len() {
        tap.finish();
    }
    Ok(())
}

/// Sends the rows of one part, of which the last ones stay with the reader, and gives the session back; none once nobody reads any more.
async fn read_part<'a>(
    this: &Arc<PostgresConnection>,
    session: Session,
    reader: &mut Reader<'a>,
    part: &'a str,
    out: &AsyncSender,
) -> Result<Option<Session>> {
    let (stream, tap) = (&reader.selection.scan.stream, reader.tap);
    let failed =
        |error: &tokio_postgres::Error| this.error(&format!("read source `{}` from", stream.name), error);
    (reader.part, reader.number) = (part, 0);
    let sql = format!("COPY ({}) TO STDOUT (FORMAT binary)", reader.selection.sql(part)?);
    let mut copy = Copy::begin(session, &sql).await.map_err(|error| failed(&error))?;
    // What is left of a frame that ended in the middle of a row: servers send whole rows, what stands between may not.
    let mut left: Vec<u8> = Vec::new();
    let (mut begun, mut ended) = (false, false);
    while let Some(frame) = copy.next().await.map_err(|error| failed(&error))? {
        this.heard();
        let (bytes, came, mut head) = match frame {
            Frame::Block(block) => (block.row_bytes(), block.messages, HEAD),
            Frame::Row(row) => (row.len(), row, 0),
        };
        tap.bytes(bytes as u64);
        let mut whole = Cow::Borrowed(&came[..]);
        // What begins elsewhere goes on here: that there are messages means nothing.
        if head > 0 && (!begun || !left.is_empty()) {
            (whole, head) = (Cow::Owned(without_heads(&came)), 0);
        }
        if !left.is_empty() {
            left.extend_from_slice(&whole);
            whole = Cow::Owned(std::mem::take(&mut left));
        }
        let mut at = 0;
        if !begun {
            let mut start = Bytes(&whole);
            if let (Some(signature), Some(_), Some(more)) =
                (start.take(SIGNATURE.len()), start.i32(), start.i32())
            {
                if signature != SIGNATURE {
                    return Err(Error::failed(format!(
                        "connection `{}` does not answer as PostgreSQL does",
                        this.name
                    )));
                }
                if start.take(usize::try_from(more).unwrap_or_default()).is_some() {
                    (at, begun) = (whole.len() - start.0.len(), true);
                }
            }
        }
        while begun && !ended {
            match reader.take(this, &whole, at, head)? {
                Step::More => break,
                Step::End => ended = true,
                Step::Torn => {
                    let rest = without_heads(whole.get(at..).unwrap_or_default());
                    (whole, at, head) = (Cow::Owned(rest), 0, 0);
                }
                Step::Rows { end } => {
                    at = end;
                    if reader.is_full()
                        && let Some(batch) = reader.flush()?
                        && !out.send(batch).await
                    {
                        return Ok(None);
                    }
                }
            }
        }
        left = match whole {
            Cow::Owned(mut rest) => {
                drop(rest.drain(..at));
                rest
            }
            Cow::Borrowed(rest) => rest.get(at..).unwrap_or_default().to_vec(),
        };
    }
    if !ended {
        return Err(Error::temporary(format!("connection `{}`: the answer ended too early", this.name))
            .hint("Run again: nothing of this run was published."));
    }
    Ok(Some(copy.session))
}

/// A COPY under way. It has its session, which another one gets only once this one has been read to its end.
struct Copy {
    session: Session,
    /// Its rows, if they go around the library.
    blocks: Option<Blocks>,
    /// The library's answer: how it ended, and rows that go through it.
    answer: Pin<Box<CopyOutStream>>,
}

impl Copy {
    async fn begin(session: Session, sql: &str) -> Result<Self, tokio_postgres::Error> {
        let blocks = session.next_rows.as_ref().map(Next::blocks);
        let answer = Box::pin(session.copy_out(sql).await?);
        Ok(Self { session, blocks, answer })
    }

    /// What comes next: whole rows, and where something between the server and us cut them, parts of rows.
    async fn next(&mut self) -> Result<Option<Frame>, tokio_postgres::Error> {
        if let Some(blocks) = &mut self.blocks
            && let Some(block) = blocks.next().await
        {
            return Ok(Some(Frame::Block(block)));
        }
        Ok(self.answer.next().await.transpose()?.map(Frame::Row))
    }
}

/// What comes of a COPY at a time.
enum Frame {
    /// Messages, each of which holds a row.
    Block(Block),
    /// What the library took out of one.
    Row(bytes::Bytes),
}

/// What stands at a place of a frame.
enum Step {
    /// One row or more, and where they end.
    Rows { end: usize },
    /// A row whose rest is in the next frame.
    More,
    /// A message that does not hold one row.
    Torn,
    /// The end of all rows.
    End,
}

/// Where a value stands in a frame, as the wire has it: a null has the length -1.
#[derive(Clone, Copy)]
struct Span {
    start: u32,
    length: i32,
}

impl Span {
    fn of<'b>(&self, frame: &'b [u8]) -> Option<&'b [u8]> {
        let (start, length) = (usize::try_from(self.start).ok()?, usize::try_from(self.length).ok()?);
        frame.get(start..)?.get(..length)
    }
}

impl<'a> Selection<'a> {
    fn of(scan: &'a Scan, shape: &'a Shape) -> Result<Self> {
        let stream = &scan.stream;
        let (window, exact) = condition(shape, stream, &scan.window)?;
        let with_position = scan.schema.field_with_name(POSITION_COLUMN).is_ok();
        let mut given = Vec::new();
        for wanted in scan.schema.fields().iter().filter(|field| field.name() != POSITION_COLUMN) {
            let changed = |what: &str| {
                Error::data(format!(
                    "source `{}`: the column `{}` was {what} while the run went on",
                    stream.name,
                    wanted.name()
                ))
                .hint("Run again: it is planned with the table as it is now.")
            };
            let column = shape.column(wanted.name()).ok_or_else(|| changed("dropped"))?;
            if column.field().data_type() != wanted.data_type() {
                return Err(changed("retyped"));
            }
            given.push(column);
        }
        let mut cursor = Vec::new();
        if let (Some(spec), Window::Cursor { .. }) = (&stream.cursor, &scan.window) {
            let may_be_null = |name: &String| shape.column(name).is_none_or(|column| column.may_be_null);
            if !exact || spec.columns.iter().any(may_be_null) {
                for name in &spec.columns {
                    let column = shape.column(name).ok_or_else(|| {
                        Error::configuration(format!(
                            "source `{}`: there is no cursor column `{name}`",
                            stream.name
                        ))
                    })?;
                    cursor.push((given.len() + cursor.len(), column));
                }
            }
        }
        let wants_place = with_position || stream.bad_rows == crate::connector::spec::BadRows::Quarantine;
        let place = (shape.is_table && wants_place).then_some(given.len() + cursor.len());
        Ok(Self { scan, shape, given, cursor, place, window })
    }

    /// How many fields a row has.
    fn width(&self) -> usize {
        self.given.len() + self.cursor.len() + usize::from(self.place.is_some())
    }

    /// The SELECT of a part, or of all if that is empty.
    fn sql(&self, part: &str) -> Result<String> {
        let columns = self.given.iter().copied().chain(self.cursor.iter().map(|(_, column)| *column));
        let mut selected = columns.map(ColumnShape::sql).collect::<Result<Vec<_>>>()?;
        selected.extend(self.place.map(|_| "ctid".to_owned()));
        let mut wanted = vec![self.window.clone(), part.to_owned()];
        wanted.retain(|condition| !condition.is_empty());
        for condition in &self.scan.conditions {
            wanted.extend(filter::sql(condition, self.shape, &self.scan.stream.unfit_as_null)?);
        }
        let filter =
            if wanted.is_empty() { String::new() } else { format!(" WHERE {}", wanted.join(" AND ")) };
        let limit = self.scan.limit.map(|rows| format!(" LIMIT {rows}")).unwrap_or_default();
        Ok(format!("SELECT {} FROM {}{filter}{limit}", selected.join(", "), self.shape.from()))
    }
}

impl<'a> Reader<'a> {
    fn new(scan: &'a Scan, shape: &'a Shape, tap: &'a Tap) -> Result<Self> {
        let selection = Selection::of(scan, shape)?;
        let rules = TextRules::of(&scan.stream)?;
        let columns = selection.given.iter().map(|column| column.builder(&rules));
        let columns = columns.collect::<Result<Vec<_>>>()?;
        let with_position = scan.schema.field_with_name(POSITION_COLUMN).is_ok();
        let in_blocks =
            selection.cursor.is_empty() && !with_position && columns.iter().all(Column::takes_blocks);
        Ok(Self {
            tap,
            columns,
            positions: with_position.then(StringBuilder::new),
            count: 0,
            bytes: 0,
            uneven: false,
            number: 0,
            part: "",
            width: selection.width(),
            selection,
            fields: Vec::new(),
            in_blocks,
            singly: 0,
        })
    }

    /// Takes the rows that begin at `at`, each behind so many bytes of its message's head: all that are whole, column by column, or if one of them does not
    /// fit the first.
    fn take(&mut self, this: &PostgresConnection, frame: &[u8], at: usize, head: usize) -> Result<Step> {
        self.fields.clear();
        let first = match self.split(frame, at, head)? {
            Step::Rows { end } => end,
            other => return Ok(other),
        };
        if self.in_blocks && self.singly == 0 {
            let (mut rows, mut last) = (1, first);
            while self.count + rows < BATCH_ROWS
                && let Step::Rows { end } = self.split(frame, last, head)?
            {
                (rows, last) = (rows + 1, end);
            }
            if self.block(frame, rows) {
                return Ok(Step::Rows { end: last });
            }
            self.singly = rows;
        }
        self.singly = self.singly.saturating_sub(1);
        self.row(this, frame)?;
        Ok(Step::Rows { end: first })
    }

    /// Finds the fields of the row that begins at `at`, behind so many bytes of its message's head.
    fn split(&mut self, frame: &[u8], at: usize, head: usize) -> Result<Step> {
        let rest = frame.get(at..).unwrap_or_default();
        // A row that is behind a head lies in its message, and is all of it.
        let message = frames::head(rest).filter(|_| head > 0).map(|(_, length)| length);
        let end = at + message.unwrap_or(rest.len());
        let mut bytes = Bytes(frame.get(at + head..end).unwrap_or_default());
        let more = if head > 0 && !rest.is_empty() { Step::Torn } else { Step::More };
        let Some(count) = bytes.i16() else { return Ok(more) };
        if count == -1 {
            return Ok(Step::End);
        }
        if usize::try_from(count) != Ok(self.width) {
            return Err(Error::failed(format!(
                "source `{}`: the server sent a row of {count} fields, and {} were asked for",
                self.selection.scan.stream.name, self.width
            )));
        }
        for _ in 0..count {
            let Some(length) = bytes.i32() else { return Ok(more) };
            let start = end - bytes.0.len();
            if length != -1 && usize::try_from(length).ok().and_then(|length| bytes.take(length)).is_none() {
                return Ok(more);
            }
            let start = u32::try_from(start).map_err(|_| {
                let source = &self.selection.scan.stream.name;
                Error::data(format!("source `{source}`: the server sent a row of more than 4 GiB"))
            })?;
            self.fields.push(Span { start, length });
        }
        if head > 0 && !bytes.0.is_empty() {
            return Ok(Step::Torn);
        }
        Ok(Step::Rows { end: end - bytes.0.len() })
    }

    /// Takes so many rows, column by column; false if one of them does not fit, and then none is taken.
    fn block(&mut self, frame: &[u8], rows: usize) -> bool {
        let mut bytes = 0;
        for (index, column) in self.columns.iter_mut().enumerate() {
            let fields = self.fields.get(index..rows * self.width).unwrap_or_default();
            match column.append_all(fields.iter().step_by(self.width).map(|field| field.of(frame))) {
                Ok(more) => bytes += more,
                Err(_) => {
                    self.columns.iter_mut().for_each(|column| column.truncate(self.count));
                    return false;
                }
            }
        }
        self.count += rows;
        self.number += rows as u64;
        self.bytes += bytes;
        true
    }

    fn field<'b>(&self, frame: &'b [u8], index: usize) -> Option<&'b [u8]> {
        self.fields.get(index)?.of(frame)
    }

    /// Where the row stands.
    fn position(&self, this: &PostgresConnection, frame: &[u8]) -> String {
        let name = match &self.selection.scan.stream.read {
            Read::Table(table) => format!("{} {table}", this.name),
            _ => format!("{} {}", this.name, self.selection.scan.stream.name),
        };
        let place = self
            .selection
            .place
            .and_then(|index| self.field(frame, index))
            .and_then(|tid| tid.split_at_checked(4));
        match place {
            Some(([a, b, c, d], [e, f])) => {
                format!(
                    "{name} ctid ({},{})",
                    u32::from_be_bytes([*a, *b, *c, *d]),
                    u16::from_be_bytes([*e, *f])
                )
            }
            _ if self.part.is_empty() => format!("{name} row {}", self.number),
            _ => format!("{name} row {} where {}", self.number, self.part),
        }
    }

    /// Takes the row at hand, or leaves it out.
    fn row(&mut self, this: &PostgresConnection, frame: &[u8]) -> Result<()> {
        self.number += 1;
        let stream = &self.selection.scan.stream;
        if !self.selection.cursor.is_empty() {
            match self.cursor_position(frame) {
                Ok(Some(at)) if !self.selection.scan.window.holds(&at) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) => match stream.cursor.as_ref().map(|cursor| cursor.on_null).unwrap_or_default() {
                    OnNull::Include => {}
                    OnNull::Exclude => {
                        self.tap.filtered(1);
                        return Ok(());
                    }
                    OnNull::Error => {
                        return Err(Error::data(format!(
                            "source `{}`: {}: the cursor is null",
                            stream.name,
                            self.position(this, frame)
                        ))
                        .hint("Say what to do with such rows: `on_null: include` or `on_null: exclude`."));
                    }
                },
                Err((column, why)) => {
                    // A cursor that cannot be read cannot be placed in a window: never skipped in silence.
                    let position = self.position(this, frame);
                    return self
                        .tap
                        .reject(stream, position, format!("`{column}` {why}"), || self.json(frame));
                }
            }
        }
        let (mut bad, mut nulled) = (None, Vec::new());
        let mut bytes = 0;
        for (index, column) in self.columns.iter_mut().enumerate() {
            let value = self.fields.get(index).and_then(|field| field.of(frame));
            bytes += value.map_or(0, <[u8]>::len);
            let Err(why) = column.append(value) else { continue };
            let unfit =
                self.selection.given.get(index).filter(|given| stream.unfit_as_null.contains(&given.name));
            if let (Some(given), Ok(())) = (unfit, column.append(None)) {
                nulled.push(given.name.as_str());
            } else {
                bad = Some((index, why));
                break;
            }
        }
        if let Some((index, why)) = bad {
            // The columns before it have one value too many, which the flush leaves out.
            self.uneven = true;
            let name = self.selection.given.get(index).map(|column| column.name.as_str()).unwrap_or_default();
            let position = self.position(this, frame);
            return self.tap.reject(stream, position, format!("`{name}` {why}"), || self.json(frame));
        }
        nulled.into_iter().for_each(|column| self.tap.null(column));
        if self.positions.is_some() {
            let position = self.position(this, frame);
            if let Some(positions) = &mut self.positions {
                positions.append_value(position);
            }
        }
        self.count += 1;
        self.bytes += bytes;
        Ok(())
    }

    fn cursor_position(&self, frame: &[u8]) -> Result<Option<Position>, (String, Misfit)> {
        let mut values = Vec::with_capacity(self.selection.cursor.len());
        for (index, column) in &self.selection.cursor {
            let Some(value) = self.field(frame, *index) else { return Ok(None) };
            values.push(column.cursor_value(value).map_err(|why| (column.name.clone(), why))?);
        }
        Ok(Some(Position(values)))
    }

    /// The row as JSON, for the quarantine.
    fn json(&self, frame: &[u8]) -> String {
        let object: serde_json::Map<String, serde_json::Value> = self
            .selection
            .given
            .iter()
            .enumerate()
            .map(|(index, column)| {
                let value = self.field(frame, index).map(|value| column.show(value));
                (column.name.clone(), value.into())
            })
            .collect();
        serde_json::Value::Object(object).to_string()
    }

    fn is_full(&self) -> bool {
        self.count == BATCH_ROWS || self.bytes >= self.selection.scan.batch_bytes || self.uneven
    }

    /// The rows so far.
    fn flush(&mut self) -> Result<Option<RecordBatch>> {
        let count = std::mem::take(&mut self.count);
        (self.bytes, self.uneven) = (0, false);
        let finished = self.columns.iter_mut().map(|column| Ok(column.finish()?.slice(0, count)));
        let mut arrays: Vec<ArrayRef> = finished.collect::<Result<Vec<_>>>().map_err(|error: Error| {
            error.while_doing(format!("source `{}` cannot be read", self.selection.scan.stream.name))
        })?;
        if let Some(positions) = &mut self.positions {
            arrays
                .insert(self.selection.scan.schema.index_of(POSITION_COLUMN)?, Arc::new(positions.finish()));
        }
        if count == 0 {
            return Ok(None);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(count));
        let batch =
            RecordBatch::try_new_with_options(Arc::clone(&self.selection.scan.schema), arrays, &options)?;
        self.tap.rows(&batch)?;
        Ok(Some(batch))
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn the_parts_of_a_table_are_all_of_it() {
        let shape = |pages| Shape {
            columns: Vec::new(),
            from: String::new(),
            is_table: true,
            pages,
            all_pages: pages,
        };
        let parts = |pages, readers| Shared::new(shape(pages), readers).parts;
        assert_eq!([4095, 4096].map(|pages| shape(pages).is_large()), [false, true]);
        assert_eq!(parts(4096, 1), [""]);
        let some = parts(4200, 2);
        assert_eq!(some.len(), 17, "{some:?}");
        assert_eq!(some[0], "ctid < '(262,0)'");
        assert_eq!(some[1], "ctid >= '(262,0)' AND ctid < '(524,0)'");
        assert_eq!(some[16], "ctid >= '(4192,0)'");
        assert_eq!(parts(1 << 20, 2).len(), 64);
    }
}
