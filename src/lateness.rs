//! How late rows came that an `overlap` found: a guess about a source, turned into a number.
//!
//! What lies within the overlap before a window's end is counted, in sixteen slices. The next run reads these slices again: where it
//! counts more rows than there were, some came late. Rows that were changed since have left their slice; so what is told is
//! the least that came late, and the most that it was late by.

use std::fmt;

use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{DataType, Date32Type, Int16Type, Int32Type, Int64Type, TimeUnit, TimestampMicrosecondType},
};
use chrono::NaiveDate;
use serde::{Deserialize, Serialize};

use crate::watermark::{CursorValue, Overlap, Position, Window};

const SLICES: usize = 16;

/// How many rows lie in each slice of the overlap before a position; the first slice is the earliest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// The position's first value: micros since 1970, or the number itself.
    end: i64,
    /// How far before it the first slice begins.
    span: i64,
    rows: [u64; SLICES],
}

impl Tail {
    fn before(end: i64, span: i64) -> Option<Self> {
        (span > 0).then_some(Self { end, span, rows: [0; SLICES] })
    }

    fn count(&mut self, at: i64) {
        let behind = i128::from(self.end) - i128::from(at);
        if behind > 0 && behind <= i128::from(self.span) {
            // In (0, span]: the nearest to the end is the last slice.
            let back = (behind - 1) * SLICES as i128 / i128::from(self.span);
            let slice = usize::try_from(back).ok().and_then(|back| (SLICES - 1).checked_sub(back));
            if let Some(rows) = slice.and_then(|slice| self.rows.get_mut(slice)) {
                *rows += 1;
            }
        }
    }
}

/// Rows that came late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Late {
    /// So many, at least.
    pub rows: u64,
    /// By so much, at most: micros, or how many numbers.
    pub by: i64,
    /// Of so much that the overlap covers.
    pub of: i64,
}

impl Late {
    /// Whether they used up so much of the overlap that later ones may be missed.
    pub fn is_close(self) -> bool {
        i128::from(self.by) * 2 >= i128::from(self.of)
    }
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = if self.rows == 1 { "row" } else { "rows" };
        write!(f, "at least {} {rows} came late", self.rows)
    }
}

/// What is counted of one stream while it is read.
#[derive(Debug, Clone)]
pub struct Watch {
    column: String,
    /// What is read a second time.
    again: Option<Tail>,
    /// What the next run will read a second time.
    next: Tail,
}

fn place(value: &CursorValue) -> Option<i64> {
    match value {
        CursorValue::Int(value) => Some(*value),
        CursorValue::Instant(at) => Some(at.timestamp_micros()),
        CursorValue::Date(day) => Some(day.signed_duration_since(NaiveDate::default()).num_days() * DAY),
        CursorValue::Text(_) => None,
    }
}

const DAY: i64 = 86_400_000_000;

impl Watch {
    /// For a stream that is read by `column` through `window`, with an overlap that numbers can measure.
    pub fn of(column: &str, overlap: Overlap, window: &Window) -> Option<Self> {
        let Window::Cursor { lo, hi, .. } = window else { return None };
        let (Overlap::Micros(span) | Overlap::Count(span)) = overlap;
        let first = |position: &Position| position.0.first().and_then(place);
        let next = Tail::before(first(hi)?, span)?;
        let again = lo.as_ref().and_then(first).and_then(|lo| Tail::before(lo, span));
        Some(Self { column: column.to_owned(), again, next })
    }

    /// The column that it looks at.
    pub fn column(&self) -> &str {
        &self.column
    }

    /// Counts the rows of `batch`, if it has the column.
    pub fn add(&mut self, batch: &RecordBatch) {
        let Some(array) = batch.column_by_name(&self.column) else { return };
        let mut count = |at: i64| {
            self.next.count(at);
            if let Some(again) = &mut self.again {
                again.count(at);
            }
        };
        match array.data_type() {
            DataType::Int16 => {
                array.as_primitive::<Int16Type>().iter().flatten().for_each(|at| count(at.into()));
            }
            DataType::Int32 => {
                array.as_primitive::<Int32Type>().iter().flatten().for_each(|at| count(at.into()));
            }
            DataType::Int64 => array.as_primitive::<Int64Type>().iter().flatten().for_each(count),
            DataType::Date32 => {
                let days = array.as_primitive::<Date32Type>();
                days.iter().flatten().for_each(|day| count(i64::from(day) * DAY));
            }
            DataType::Timestamp(TimeUnit::Microsecond, _) => {
                array.as_primitive::<TimestampMicrosecondType>().iter().flatten().for_each(count);
            }
            _ => {}
        }
    }

    /// What the next run compares with.
    pub fn tail(&self) -> &Tail {
        &self.next
    }

    /// What came late since `known` was counted.
    pub fn late(&self, known: Option<&Tail>) -> Option<Late> {
        let (again, known) = (self.again.as_ref()?, known?);
        if (again.end, again.span) != (known.end, known.span) {
            // Another overlap than last time, or a mark that was moved by hand.
            return None;
        }
        let more = || again.rows.iter().zip(&known.rows).map(|(now, then)| now.saturating_sub(*then));
        let earliest = more().position(|rows| rows > 0)?;
        let by = i128::from(again.span) * (SLICES - earliest) as i128 / SLICES as i128;
        Some(Late { rows: more().sum(), by: i64::try_from(by).unwrap_or(again.span), of: again.span })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::Int64Array;

    use super::*;

    fn at(value: i64) -> Position {
        Position::of(CursorValue::Int(value))
    }

    fn watch(lo: Option<i64>, hi: i64, ids: &[i64]) -> Watch {
        let lo = lo.map(at);
        let from = lo.as_ref().map(|lo| lo.back(Overlap::Count(160)));
        let window = Window::Cursor { lo, from, hi: at(hi) };
        let mut watch = Watch::of("id", Overlap::Count(160), &window).unwrap();
        let ids = Int64Array::from(ids.to_vec());
        watch.add(&RecordBatch::try_from_iter([("id", Arc::new(ids) as _)]).unwrap());
        watch
    }

    #[test]
    fn what_is_read_again_and_was_not_there_came_late() {
        let first = watch(None, 1000, &[1, 839, 840, 845, 850, 990, 999]);
        assert_eq!(first.tail().rows.iter().sum::<u64>(), 5, "839 and 1 are too far back to be read again");
        assert_eq!(first.late(None), None);
        let same = watch(Some(1000), 1100, &[840, 845, 850, 990, 999, 1000, 1099]);
        assert_eq!(same.late(Some(first.tail())), None);
        // One was changed and has left its slice; two came late, the earlier one into the second slice.
        let late = watch(Some(1000), 1100, &[840, 845, 850, 855, 980, 990, 1000]);
        let found = late.late(Some(first.tail())).unwrap();
        assert_eq!((found.rows, found.by, found.of, found.is_close()), (2, 150, 160, true));
        let short = watch(Some(1000), 1100, &[840, 845, 850, 981, 990, 999]);
        let found = short.late(Some(first.tail())).unwrap();
        assert_eq!((found.rows, found.by, found.is_close()), (1, 20, false));
        assert_eq!(late.late(Some(same.tail())), None, "it is of another end");
    }
}
