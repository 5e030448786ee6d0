//! Where a window ends: below the bound, no transaction that is open can still put a row.
//!
//! | cursor | bound | what makes it stable |
//! | --- | --- | --- |
//! | a time that the database sets | the start of the oldest open transaction, or now, less the margin | who writes at a time set it when its transaction began |
//! | a number, a text | behind the greatest that is visible | everybody who was writing then has ended before the snapshot opens |
//!
//! Who may not see others' transactions waits until all that are open have ended, and so does everybody while one is prepared
//! (nobody tells when such a one began); a job that reads times again (`overlap`) does not wait, and finds what comes late there.
//! Who sees a standby sees none of the primary's transactions, and is refused unless the job reads again; its window ends at what the
//! standby has replayed.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    PostgresConnection, Session,
    source::{ReadAs, Shape},
    types::Wire,
};
use crate::{
    connector::{
        Bounds, Exactness, Marks, RunTime,
        columns::{last_closed_day, last_closed_instant},
        spec::{CursorSpec, StreamSpec},
    },
    error::{Error, Result},
    names::quoted,
    runtime,
    types::ColumnType,
    watermark::{CursorValue, Position, Window},
};

/// How long to wait between two looks at who still writes.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What the server says about the transactions of others.
struct Activity {
    /// When we began to look.
    now: DateTime<Utc>,
    /// When the oldest began that is still open.
    oldest: DateTime<Utc>,
    /// Whether some cannot be seen.
    hidden: bool,
    /// Whether this is a copy, whose primary has transactions of its own.
    standby: bool,
}

const ACTIVITY: &str = "
    SELECT now(),
           least(now(), CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp() END,
                 (SELECT min(xact_start) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
                   AND backend_type NOT IN ('autovacuum worker', 'walsender'))),
           EXISTS (SELECT 1 FROM pg_stat_activity WHERE query = '<insufficient privilege>' AND usesysid IS NOT NULL)
               OR EXISTS (SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()),
           pg_is_in_recovery()";

/// The transactions that users have open, by the name under which each holds a lock: everybody may see these.
const OPEN: &str = "SELECT DISTINCT l.virtualtransaction FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
    WHERE l.locktype IN ('virtualxid', 'transactionid') AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
    AND (l.pid IS NULL OR a.usesysid IS NOT NULL)";

/// Those that have written to a table of this database; a writer locks the table before it takes a number for its row. Who vacuums a table locks its
/// indexes as a writer does, for as long as that takes, and writes no row.
const WRITING: &str =
    "SELECT DISTINCT virtualtransaction FROM pg_locks AS l WHERE locktype = 'relation' AND granted
    AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND relation >= 16384
    AND pid IS DISTINCT FROM pg_backend_pid()
    AND NOT EXISTS (SELECT 1 FROM pg_class WHERE oid = l.relation AND relkind IN ('i', 'I'))";

pub(super) async fn bounds(
    this: &Arc<PostgresConnection>,
    streams: &[StreamSpec],
    since: &Marks,
    time: RunTime,
) -> Result<Bounds> {
    let mut bounds = Bounds::default();
    let mut opened = None;
    for stream in streams {
        let Some(cursor) = &stream.cursor else {
            bounds.windows.insert(stream.name.clone(), Window::Whole);
            continue;
        };
        if opened.is_none() {
            opened = Some(look(this).await?);
        }
        let Some((session, activity)) = &opened else { continue };
        let (hi, exactness) = end(this, session, activity, stream, cursor, time).await?;
        if exactness == Exactness::Lookback {
            let why = if activity.standby {
                "is a standby, which does not know what is still being written on its primary"
            } else {
                "does not show this user the transactions of others, or has prepared ones"
            };
            bounds.warnings.push(format!(
                "source `{}`: connection `{}` {why}: rows that are committed late are found as far as `overlap` reaches",
                stream.name, this.name
            ));
        }
        bounds.follow(stream, since.get(&stream.name), hi, exactness)?;
    }
    if let Some((session, _)) = opened {
        this.rest(session).await;
    }
    Ok(bounds)
}

/// Who is there, once for all streams: the server remembers its first answer for the whole transaction.
async fn look(this: &Arc<PostgresConnection>) -> Result<(Session, Activity)> {
    let session = this.transaction("ISOLATION LEVEL READ COMMITTED READ ONLY").await?;
    let row = session
        .query_typed_one(ACTIVITY, &[])
        .await
        .map_err(|error| this.error("look at the transactions of", &error))?;
    let activity = Activity { now: row.get(0), oldest: row.get(1), hidden: row.get(2), standby: row.get(3) };
    Ok((session, activity))
}

async fn end(
    this: &Arc<PostgresConnection>,
    session: &Session,
    activity: &Activity,
    stream: &StreamSpec,
    cursor: &CursorSpec,
    time: RunTime,
) -> Result<(Option<Position>, Exactness)> {
    let failed = |error: tokio_postgres::Error| this.error("find the end of a window in", &error);
    let first = cursor.columns.first().map(String::as_str).unwrap_or_default();
    let shape = Shape::of(this, session, stream).await?;
    let column = shape.column(first).ok_or_else(|| {
        Error::configuration(format!("source `{}`: there is no cursor column `{first}`", stream.name))
    })?;
    let kind = column
        .cursor_type()
        .ok_or_else(|| Error::bug(format!("source `{}`: the cursor `{first}` has no order", stream.name)))?;
    if activity.standby && cursor.overlap.is_none() {
        return Err(Error::configuration(format!(
            "source `{}`: connection `{}` is a standby, which does not know what is still being written on its primary",
            stream.name, this.name
        ))
        .hint("Read the primary; or read again what may come late: `incremental: { cursor: …, overlap: 1h }` with `mode: merge`."));
    }
    if matches!(kind, ColumnType::TimestampTz(_) | ColumnType::Date(_)) {
        let mut oldest = activity.oldest;
        let mut exactness = Exactness::Margin;
        if activity.standby || activity.hidden && cursor.overlap.is_some() {
            exactness = Exactness::Lookback;
        } else if activity.hidden {
            // What we may not see began before now; once it has ended, nothing of it can come any more.
            settled(this, session, stream, OPEN).await?;
            oldest = activity.now;
        }
        let margin = TimeDelta::milliseconds(this.options.bound_margin_ms.unwrap_or(5000).into());
        let mut latest = (oldest - margin).min(time.as_of);
        if let ReadAs::Wire(Wire::TimestampIn(zone), _) = &column.read {
            latest = last_closed_instant(latest, *zone, cursor.overlap);
        }
        let value = match kind {
            ColumnType::Date(_) => CursorValue::Date(last_closed_day(latest, stream)?),
            _ => CursorValue::instant(latest),
        };
        return Ok((Some(Position::of(value)), exactness));
    }
    let of = column.sql()?;
    let (greatest, like) = match kind {
        ColumnType::Int => (format!("max(({of})::int8)"), CursorValue::Int(0)),
        _ => (format!("max(({of})::text COLLATE \"C\")"), CursorValue::Text(String::new())),
    };
    let from = shape.from();
    let row =
        session.query_typed_one(&format!("SELECT {greatest} FROM {from}"), &[]).await.map_err(failed)?;
    let greatest = match like {
        CursorValue::Int(_) => row.get::<_, Option<i64>>(0).map(CursorValue::Int),
        _ => row.get::<_, Option<String>>(0).map(CursorValue::Text),
    };
    let exactness = if activity.standby {
        Exactness::Lookback
    } else {
        settled(this, session, stream, WRITING).await?;
        Exactness::Exact
    };
    Ok((greatest.map(|value| Position::of(value).successor()), exactness))
}

/// Waits until everybody whom `who` names now has ended.
async fn settled(this: &PostgresConnection, session: &Session, stream: &StreamSpec, who: &str) -> Result<()> {
    let failed = |error: tokio_postgres::Error| this.error("look at the transactions of", &error);
    let list = async || -> Result<Vec<String>> {
        let rows = session.query_typed(who, &[]).await.map_err(failed)?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    let mut left = list().await?;
    let patience = Duration::from_millis(this.options.lock_timeout_ms.unwrap_or(30_000).into());
    let mut waited = Duration::ZERO;
    while !left.is_empty() {
        // As to the server, nothing means for ever.
        if waited >= patience && !patience.is_zero() {
            let count = left.len();
            let transactions = if count == 1 { "transaction has" } else { "transactions have" };
            return Err(Error::temporary(format!(
                "source `{}`: {count} {transactions} been open for longer than {} ms, and could still write below the end of this window",
                stream.name,
                patience.as_millis()
            ))
            .hint("End them (`SELECT * FROM pg_stat_activity ORDER BY xact_start`) or run later; `lock_timeout_ms` says how long to wait. For a cursor of time, the right to see them is enough: `GRANT pg_read_all_stats`."));
        }
        runtime::sleep(LOOK_AGAIN).await;
        waited += LOOK_AGAIN;
        let now = list().await?;
        left.retain(|transaction| now.contains(transaction));
    }
    Ok(())
}

/// The part of a window that the server applies, and whether that is all of it.
///
/// Rows whose cursor is null pass, for `on_null` to judge.
///
/// # Errors
///
/// If the cursor cannot be named.
pub(super) fn condition(shape: &Shape, stream: &StreamSpec, window: &Window) -> Result<(String, bool)> {
    let (Some(cursor), Window::Cursor { from, hi, .. }) = (&stream.cursor, window) else {
        return Ok((String::new(), true));
    };
    let first = cursor.columns.first().map(String::as_str).unwrap_or_default();
    let Some(column) = shape.column(first) else { return Ok((String::new(), false)) };
    let mut exact = cursor.columns.len() == 1;
    let of = match column.cursor_type() {
        Some(ColumnType::String) => format!("({})::text COLLATE \"C\"", column.sql()?),
        Some(_) => column.sql()?,
        None => return Ok((String::new(), false)),
    };
    // A clock without a zone is not in the order of time twice a year: the server looks a day further on both sides, and our own
    // filter decides.
    let wide = if column.is_local() { TimeDelta::days(1) } else { TimeDelta::zero() };
    exact &= !column.is_local();
    let mut parts = Vec::new();
    if let Some(value) = from.as_ref().and_then(|from| from.0.first()) {
        parts.push(format!("{of} >= {}", literal(value, -wide)));
    }
    match hi.0.as_slice() {
        // Nothing was there: our own filter reads nothing.
        [] => exact = false,
        [value] => parts.push(format!("{of} < {}", literal(value, wide))),
        [value, ..] => {
            exact = false;
            parts.push(format!("{of} <= {}", literal(value, wide)));
        }
    }
    if parts.is_empty() {
        return Ok((String::new(), exact));
    }
    let window = parts.join(" AND ");
    let name = quoted(first)?;
    Ok((if column.may_be_null { format!("(({window}) OR {name} IS NULL)") } else { window }, exact))
}

/// A bound as a literal; one of a clock without a zone moved by `wide`.
pub(super) fn literal(value: &CursorValue, wide: TimeDelta) -> String {
    match value {
        CursorValue::Int(value) => format!("({value})::int8"),
        CursorValue::Date(value) => format!("{}::date", text(&value.format("%Y-%m-%d").to_string())),
        CursorValue::Instant(at) if wide.is_zero() => {
            format!("{}::timestamptz", text(&at.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string()))
        }
        CursorValue::Instant(at) => {
            let at = at.checked_add_signed(wide).unwrap_or(*at);
            format!("{}::timestamp", text(&at.format("%Y-%m-%d %H:%M:%S%.6f").to_string()))
        }
        CursorValue::Text(value) => format!("{} COLLATE \"C\"", text(value)),
    }
}

/// A text as a literal that ends where it should, whatever the server's settings are.
pub(super) fn text(value: &str) -> String {
    format!("E'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}
