//! How far a source was read: positions, windows and marks. An algebra without I/O.
//!
//! A window is half open, `[lo, hi)`, and the next one starts at exactly `hi`. So rows with equal cursors are
//! never cut apart, and no hashes of boundary rows are kept. A [`Position`] is a tuple; a shorter tuple comes
//! before every longer one that starts with it, which makes `[T, …)` of a composite cursor hold all rows at
//! `T`, whatever their second column.
//!
//! Values are exact and typed: a mark that was an integer never silently compares with a timestamp.

use std::{cmp::Ordering, fmt};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};

/// One component of a position.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CursorValue {
    /// A whole number.
    Int(i64),
    /// A day.
    Date(NaiveDate),
    /// A point in time in UTC, in microseconds since 1970.
    Instant(DateTime<Utc>),
    /// Text in binary order.
    Text(String),
}

impl CursorValue {
    /// A point in time, without what is finer than microseconds.
    pub fn instant(at: DateTime<Utc>) -> Self {
        Self::Instant(chrono::SubsecRound::trunc_subsecs(at, 6))
    }

    /// The word for its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "whole number",
            Self::Date(_) => "date",
            Self::Instant(_) => "timestamp",
            Self::Text(_) => "text",
        }
    }
}

impl fmt::Display for CursorValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => write!(f, "{value}"),
            Self::Date(value) => write!(f, "{value}"),
            Self::Instant(value) => f.write_str(&value.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)),
            Self::Text(value) => write!(f, "{value:?}"),
        }
    }
}

/// A place in the order of a cursor. Compared as a tuple; a prefix comes before what it starts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(pub Vec<CursorValue>);

impl Position {
    /// A position of one value.
    pub fn of(value: CursorValue) -> Self {
        Self(vec![value])
    }

    /// The first position after all rows at `self`.
    ///
    /// Used for bounds that come from the greatest value present: `[lo, successor)` holds it.
    #[must_use]
    pub fn successor(&self) -> Self {
        let mut values = self.0.clone();
        match values.last_mut() {
            Some(CursorValue::Int(value)) => match value.checked_add(1) {
                Some(next) => *value = next,
                None => values.push(CursorValue::Int(i64::MIN)),
            },
            Some(CursorValue::Date(value)) => *value = value.succ_opt().unwrap_or(NaiveDate::MAX),
            Some(CursorValue::Instant(value)) => *value += chrono::TimeDelta::microseconds(1),
            Some(CursorValue::Text(value)) => value.push('\0'),
            None => {}
        }
        Self(values)
    }

    /// Behind everything that a source may hold: of texts nothing is known, and they stay.
    #[must_use]
    pub fn last(&self) -> Self {
        let end = NaiveDate::from_ymd_opt(9999, 12, 31).unwrap_or(NaiveDate::MAX);
        match self.0.first() {
            Some(CursorValue::Int(_)) => Self::of(CursorValue::Int(i64::MAX)),
            Some(CursorValue::Date(_)) => Self::of(CursorValue::Date(end)),
            Some(CursorValue::Instant(_)) => {
                Self::of(CursorValue::Instant(end.and_time(chrono::NaiveTime::MIN).and_utc()))
            }
            Some(CursorValue::Text(_)) | None => self.clone(),
        }
    }

    /// Whether both are points in time, and `self` is the earlier one by five seconds at most.
    pub fn is_shortly_before(&self, other: &Self) -> bool {
        match (self.0.first(), other.0.first()) {
            (Some(CursorValue::Instant(earlier)), Some(CursorValue::Instant(later))) => {
                let between = later.signed_duration_since(*earlier);
                between > chrono::TimeDelta::zero() && between <= chrono::TimeDelta::seconds(5)
            }
            _ => false,
        }
    }

    /// `self` moved back by `overlap`, on its first component. Text does not move.
    #[must_use]
    pub fn back(&self, overlap: Overlap) -> Self {
        let moved = match (self.0.first(), overlap) {
            (Some(CursorValue::Instant(value)), Overlap::Micros(micros)) => {
                value.checked_sub_signed(chrono::TimeDelta::microseconds(micros)).map(CursorValue::Instant)
            }
            (Some(CursorValue::Date(value)), Overlap::Micros(micros)) => {
                let days =
                    micros.div_euclid(86_400_000_000) + i64::from(micros.rem_euclid(86_400_000_000) > 0);
                value.checked_sub_signed(chrono::TimeDelta::days(days)).map(CursorValue::Date)
            }
            (Some(CursorValue::Int(value)), Overlap::Count(count)) => {
                Some(CursorValue::Int(value.saturating_sub(count)))
            }
            _ => None,
        };
        moved.map_or_else(|| self.clone(), Self::of)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, value) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{value}")?;
        }
        Ok(())
    }
}

/// How far behind the mark a run reads again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// For cursors that are times: microseconds.
    Micros(i64),
    /// For cursors that are whole numbers: how many.
    Count(i64),
}

/// A file that was read: by path, size and content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileVersion {
    /// Relative to the connection's root.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Of the bytes as they lie there, in hexadecimal.
    pub sha256: String,
}

/// What a run reads of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Window {
    /// Everything.
    Whole,
    /// Rows with `lo <= cursor < hi`.
    Cursor {
        /// Where the last run ended; `None` before the first.
        lo: Option<Position>,
        /// Where this run reads from: `lo` moved back by the overlap.
        from: Option<Position>,
        /// Where the next run will start.
        hi: Position,
    },
    /// These files, in this order.
    Files {
        /// Read by this run.
        new: Vec<FileVersion>,
        /// Read before, and still remembered.
        seen: Vec<FileVersion>,
        /// When their contents were looked at: a file written later is not the one that was meant.
        at: DateTime<Utc>,
    },
}

/// How far one stream was read, as the target remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mark {
    /// Everything before this position.
    Cursor(Position),
    /// These files.
    Files(Vec<FileVersion>),
}

/// Why a window cannot follow a mark.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatermarkError {
    /// The cursor's type is not what it was.
    #[error("the watermark is a {was} and the cursor column is now a {is}")]
    KindChanged {
        /// What the mark holds.
        was: &'static str,
        /// What the bound holds.
        is: &'static str,
    },
    /// The source ends before the mark: it was restored, or replaced.
    #[error("the source ends at {hi}, before the watermark {lo}: it went back")]
    WentBack {
        /// The mark.
        lo: Position,
        /// The bound.
        hi: Position,
    },
    /// Files became a cursor, or the other way round.
    #[error("the watermark was made from {was} and the source now has {is}")]
    ShapeChanged {
        /// What the mark holds.
        was: &'static str,
        /// What the source has.
        is: &'static str,
    },
}

impl Window {
    /// The window that follows `mark` and ends at `hi`.
    ///
    /// | mark | hi | window |
    /// | --- | --- | --- |
    /// | none | `b` | `(-∞, b)` |
    /// | `a` | `b >= a` | `[a, b)`, read from `a - overlap` |
    /// | `a` | `b < a` | [`WatermarkError::WentBack`] |
    ///
    /// # Errors
    ///
    /// See the table, and [`WatermarkError::KindChanged`].
    pub fn after(
        mark: Option<&Mark>,
        hi: Position,
        overlap: Option<Overlap>,
    ) -> Result<Self, WatermarkError> {
        let lo = match mark {
            None => return Ok(Self::Cursor { lo: None, from: None, hi }),
            Some(Mark::Cursor(lo)) => lo,
            Some(Mark::Files(_)) => {
                return Err(WatermarkError::ShapeChanged { was: "files", is: "a cursor" });
            }
        };
        if let (Some(was), Some(is)) = (lo.0.first(), hi.0.first())
            && std::mem::discriminant(was) != std::mem::discriminant(is)
        {
            return Err(WatermarkError::KindChanged { was: was.kind(), is: is.kind() });
        }
        if hi.cmp(lo) == Ordering::Less {
            return Err(WatermarkError::WentBack { lo: lo.clone(), hi });
        }
        let from = overlap.map_or_else(|| lo.clone(), |overlap| lo.back(overlap));
        Ok(Self::Cursor { lo: Some(lo.clone()), from: Some(from), hi })
    }

    /// The mark after this window was loaded, or `None` where nothing is remembered.
    pub fn mark(&self) -> Option<Mark> {
        match self {
            Self::Whole => None,
            Self::Cursor { hi, .. } => Some(Mark::Cursor(hi.clone())),
            Self::Files { new, seen, .. } => {
                // Of each path the version that was read last: an older one that comes again is new again.
                let kept = seen.iter().filter(|known| !new.iter().any(|file| file.path == known.path));
                let mut files: Vec<FileVersion> = kept.chain(new).cloned().collect();
                files.sort();
                files.dedup();
                Some(Mark::Files(files))
            }
        }
    }

    /// Whether a row at `position` belongs to what is read.
    pub fn holds(&self, position: &Position) -> bool {
        match self {
            Self::Whole | Self::Files { .. } => true,
            Self::Cursor { from, hi, .. } => {
                from.as_ref().is_none_or(|from| position >= from) && position < hi
            }
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("everything"),
            Self::Cursor { lo: None, hi, .. } => write!(f, "up to {hi}"),
            Self::Cursor { lo: Some(lo), from, hi } => {
                write!(f, "[{lo}, {hi})")?;
                match from {
                    Some(from) if from != lo => write!(f, ", again from {from}"),
                    _ => Ok(()),
                }
            }
            Self::Files { new, seen, .. } => {
                let files = |count: usize| if count == 1 { "file" } else { "files" };
                write!(f, "{} new {}", new.len(), files(new.len()))?;
                if seen.is_empty() { Ok(()) } else { write!(f, ", {} read before", seen.len()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(value: i64) -> Position {
        Position::of(CursorValue::Int(value))
    }

    fn time(micros: i64) -> Position {
        Position::of(CursorValue::Instant(DateTime::from_timestamp_micros(micros).unwrap()))
    }

    #[test]
    fn a_window_follows_its_mark_or_says_why_not() {
        let mark = |position: Position| Some(Mark::Cursor(position));
        #[rustfmt::skip]
        let cases = [
            // what                              mark            hi       outcome (lo)
            ("first run",                        None,           at(5),   Ok(None)),
            ("next run",                         mark(at(5)),    at(9),   Ok(Some(at(5)))),
            ("nothing new",                      mark(at(5)),    at(5),   Ok(Some(at(5)))),
            ("source restored from a backup",    mark(at(5)),    at(3),   Err(WatermarkError::WentBack { lo: at(5), hi: at(3) })),
            ("cursor column became a timestamp", mark(at(5)),    time(7), Err(WatermarkError::KindChanged { was: "whole number", is: "timestamp" })),
            ("files became a table",             Some(Mark::Files(vec![])), at(5), Err(WatermarkError::ShapeChanged { was: "files", is: "a cursor" })),
        ];
        for (what, mark, hi, outcome) in cases {
            let window = Window::after(mark.as_ref(), hi, None).map(|window| match window {
                Window::Cursor { lo, .. } => lo,
                _ => unreachable!(),
            });
            assert_eq!(window, outcome, "{what}");
        }
    }

    #[test]
    fn a_prefix_comes_before_what_it_starts() {
        let instant = |micros| CursorValue::Instant(DateTime::from_timestamp_micros(micros).unwrap());
        let window = Window::Cursor { lo: Some(time(5)), from: Some(time(5)), hi: time(9) };
        for (micros, id, inside) in [(4, 9, false), (5, 0, true), (8, i64::MAX, true), (9, i64::MIN, false)] {
            let row = Position(vec![instant(micros), CursorValue::Int(id)]);
            assert_eq!(window.holds(&row), inside, "{row}");
        }
    }

    #[test]
    fn an_overlap_moves_the_first_component_back() {
        let day = |day| Position::of(CursorValue::Date(NaiveDate::from_ymd_opt(2026, 11, day).unwrap()));
        for (position, overlap, expected) in [
            (time(10), Overlap::Micros(3), time(7)),
            (at(10), Overlap::Count(3), at(7)),
            (at(i64::MIN), Overlap::Count(3), at(i64::MIN)),
            (day(10), Overlap::Micros(7_200_000_000), day(9)),
            (at(10), Overlap::Micros(3), at(10)),
        ] {
            assert_eq!(position.back(overlap), expected);
        }
    }

    proptest! {
        #[test]
        fn windows_that_follow_each_other_hold_every_row_once(
            mut bounds in prop::collection::vec(0_i64..50, 1..8),
            rows in prop::collection::vec(0_i64..60, 0..40),
        ) {
            bounds.sort_unstable();
            let mut mark = None;
            let mut held = vec![0; rows.len()];
            for hi in &bounds {
                let window = Window::after(mark.as_ref(), at(*hi), None).unwrap();
                for (row, count) in rows.iter().zip(&mut held) {
                    *count += i32::from(window.holds(&at(*row)));
                }
                mark = window.mark();
            }
            let end = bounds.last().copied().unwrap_or_default();
            for (row, count) in rows.iter().zip(held) {
                prop_assert_eq!(count, i32::from(*row < end));
            }
        }

        #[test]
        fn the_successor_is_the_next_bound(value in any::<i64>()) {
            let bound = at(value).successor();
            prop_assert!(at(value) < bound);
            if value < i64::MAX {
                prop_assert!(at(value + 1) >= bound);
            }
        }
    }
}
