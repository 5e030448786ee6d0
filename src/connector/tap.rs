//! What is counted while rows leave a source.
//!
//! One [`Tap`] belongs to one stream of one run. Scans count into it, the renderer reads it while the run goes
//! on, and the accounting takes it at the end.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arrow::record_batch::RecordBatch;

use super::spec::{BadRows, StreamSpec};
use crate::{
    error::{Error, Result},
    lateness::Watch,
    record::totals::{Total, Totals, TotalsSpec},
};

/// A row that could not be read, set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// Where it stands in the source.
    pub position: String,
    /// Why it could not be read.
    pub reason: String,
    /// The row as it was found.
    pub row: String,
}

/// The counters of one stream.
#[derive(Debug, Default)]
pub struct Tap {
    extracted: AtomicU64,
    handed: AtomicU64,
    drained: AtomicBool,
    filtered: AtomicU64,
    bytes: AtomicU64,
    total_bytes: AtomicU64,
    finished: AtomicBool,
    started: AtomicBool,
    rejects: Mutex<Vec<Reject>>,
    nulled: Mutex<BTreeMap<String, u64>>,
    totals: Mutex<Option<Totals>>,
    watch: Mutex<Option<Watch>>,
}

impl Tap {
    /// A tap that also adds up `totals`, and counts what may come late.
    pub fn counting(totals: Option<TotalsSpec>, watch: Option<Watch>) -> Self {
        Self { totals: Mutex::new(totals.map(Totals::new)), watch: Mutex::new(watch), ..Self::default() }
    }

    /// Counts rows that are handed on.
    ///
    /// # Errors
    ///
    /// If the totals cannot be added up.
    pub fn rows(&self, batch: &RecordBatch) -> Result<()> {
        self.extracted.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
        if let Some(watch) = self.watch.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            watch.add(batch);
        }
        match self.totals.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(totals) => totals.add(batch),
            None => Ok(()),
        }
    }

    /// Counts rows where they reach the models: by another count than where they left the source.
    pub fn hand(&self, rows: u64) {
        self.handed.fetch_add(rows, Ordering::Relaxed);
    }

    /// Says that whoever reads has come to the end.
    pub fn drain(&self) {
        self.drained.store(true, Ordering::Relaxed);
    }

    /// Rows that reached the models, once all of them have.
    pub fn handed(&self) -> Option<u64> {
        self.drained.load(Ordering::Relaxed).then(|| self.handed.load(Ordering::Relaxed))
    }

    /// Counts rows that a filter of the job dropped.
    pub fn filtered(&self, rows: u64) {
        self.extracted.fetch_add(rows, Ordering::Relaxed);
        self.filtered.fetch_add(rows, Ordering::Relaxed);
    }

    /// Counts bytes read.
    pub fn bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Says how many bytes there are in all, for the estimate.
    pub fn expect_bytes(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Says that a scan began.
    pub fn start(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Says that everything was read.
    pub fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
    }

    /// Whether a scan began and everything was read.
    pub fn is_complete(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    /// Whether a scan began.
    pub fn is_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    /// Sets a row aside, or says why the run must stop.
    ///
    /// # Errors
    ///
    /// If the stream refuses bad rows, or had enough of them.
    pub fn reject(
        &self,
        stream: &StreamSpec,
        position: String,
        reason: String,
        row: impl FnOnce() -> String,
    ) -> Result<()> {
        match stream.bad_rows {
            BadRows::Error => Err(Error::data(format!("source `{}`: {position}: {reason}", stream.name))
                .hint(format!(
                    "Mend the row, or set such rows aside: `bad_rows: quarantine` on source `{}`.",
                    stream.name
                ))),
            BadRows::Quarantine => {
                let mut rejects = self.rejects.lock().unwrap_or_else(PoisonError::into_inner);
                if rejects.len() as u64 >= stream.max_bad_rows {
                    return Err(Error::data(format!(
                        "source `{}`: more than {} rows cannot be read; the last at {position}: {reason}",
                        stream.name, stream.max_bad_rows
                    ))
                    .hint("Look at the format and the types first; `max_bad_rows` is the limit."));
                }
                self.extracted.fetch_add(1, Ordering::Relaxed);
                rejects.push(Reject { position, reason, row: row() });
                Ok(())
            }
        }
    }

    /// Counts a value that did not fit `column`, and is null there.
    pub fn null(&self, column: &str) {
        let mut nulled = self.nulled.lock().unwrap_or_else(PoisonError::into_inner);
        match nulled.get_mut(column) {
            Some(count) => *count += 1,
            None => {
                nulled.insert(column.to_owned(), 1);
            }
        }
    }

    /// How many values of each column did not fit, and are null.
    pub fn nulled(&self) -> BTreeMap<String, u64> {
        self.nulled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Rows that came from the window, so far.
    pub fn extracted(&self) -> u64 {
        self.extracted.load(Ordering::Relaxed)
    }

    /// Rows that a filter of the job dropped, so far.
    pub fn filtered_rows(&self) -> u64 {
        self.filtered.load(Ordering::Relaxed)
    }

    /// Bytes read so far, and in all if that is known.
    pub fn progress(&self) -> (u64, Option<u64>) {
        let total = self.total_bytes.load(Ordering::Relaxed);
        (self.bytes.load(Ordering::Relaxed), (total > 0).then_some(total))
    }

    /// How many rows were set aside.
    pub fn rejected_rows(&self) -> u64 {
        self.rejects.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// The rows set aside.
    pub fn rejects(&self) -> Vec<Reject> {
        self.rejects.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was counted of rows that may come late.
    pub fn watch(&self) -> Option<Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The totals.
    pub fn totals(&self) -> Vec<Total> {
        self.totals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(Totals::finish)
            .unwrap_or_default()
    }
}
