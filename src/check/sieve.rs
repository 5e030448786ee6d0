//! Checks of rows, made while the rows pass: to the one who reads them, or into a spool.
//!
//! Every row is checked, also those that the reader did not ask for: what is left is read when it has ended. Until then nothing is
//! known of a check, and nothing that was made of the rows may be published. Rows pass once: who asks for them a second time is refused.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use arrow::{array::RecordBatch, datatypes::SchemaRef};
use datafusion::{
    catalog::streaming::StreamingTable,
    execution::TaskContext,
    physical_plan::{
        ExecutionPlan, SendableRecordBatchStream, execute_stream, stream::RecordBatchStreamAdapter,
        streaming::PartitionStream,
    },
    prelude::DataFrame,
};
use futures::{StreamExt, stream::poll_fn};

use super::{Check, Sorter, quarantine_batch};
use crate::{
    error::{Error, ErrorKind, Result},
    record::run::CheckReport,
    session,
    spool::SpoolWriter,
};

/// Rows that checks set aside, of all relations of a run.
pub type Aside = Arc<Mutex<SpoolWriter>>;

/// A relation whose rows are sorted out on their way to its one reader.
#[derive(Clone)]
pub struct Sieve {
    name: Arc<str>,
    schema: SchemaRef,
    passing: Arc<Mutex<Passing>>,
}

struct Passing {
    rows: Rows,
    sorter: Sorter,
    aside: Aside,
    /// How many of them are of this relation.
    set_aside: u64,
    is_read: bool,
    /// Whether its reader has ended, and is given nothing more.
    is_left: bool,
    /// Why rows could not be read or checked: nothing is known of the checks then.
    failed: Option<Error>,
}

/// The rows with their flags.
enum Rows {
    /// Nobody has asked for any.
    Waiting(Arc<dyn ExecutionPlan>, Arc<TaskContext>),
    Coming(SendableRecordBatchStream),
    Ended,
}

impl Sieve {
    /// The relation `name`, of the columns of `schema`, by the rows of its [`row_query`](super::row_query).
    ///
    /// # Errors
    ///
    /// If the query cannot be planned.
    pub async fn new(
        name: &str,
        schema: SchemaRef,
        rows: DataFrame,
        checks: Vec<Check>,
        aside: Aside,
    ) -> Result<Self> {
        let task = Arc::new(rows.task_ctx());
        let rows = Rows::Waiting(rows.create_physical_plan().await?, task);
        let sorter = Sorter::new(checks);
        let passing =
            Passing { rows, sorter, aside, set_aside: 0, is_read: false, is_left: false, failed: None };
        Ok(Self { name: name.into(), schema, passing: Arc::new(Mutex::new(passing)) })
    }

    /// The rows that pass, as a table that can be read once.
    ///
    /// # Errors
    ///
    /// None in practice: the schema is the table's own.
    pub fn table(&self) -> Result<Arc<StreamingTable>> {
        let partition: Arc<dyn PartitionStream> = Arc::new(self.clone());
        Ok(Arc::new(StreamingTable::try_new(Arc::clone(&self.schema), vec![partition])?))
    }

    /// The rows that pass, once; then they are to be [`finish`](Self::finish)ed.
    pub fn rows(&self) -> SendableRecordBatchStream {
        let sieve = self.clone();
        let again = std::mem::replace(&mut self.passing().is_read, true);
        let again = again.then(|| {
            // Where a plan cannot tell, as in a join that does not fit into the memory. The next try writes all down.
            let why = format!("`{}` is read more than once, and was not written down", self.name);
            Err(Error::new(ErrorKind::Memory, why).into())
        });
        let rows = poll_fn(move |waker| {
            let mut passing = sieve.passing();
            if passing.is_left { Poll::Ready(None) } else { passing.poll(&sieve.schema, waker) }
        });
        let rows = rows.map(|batch| Ok(batch?));
        let rows = futures::stream::iter(again).chain(rows);
        Box::pin(RecordBatchStreamAdapter::new(Arc::clone(&self.schema), rows))
    }

    /// The relation.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Checks what is left; then what the checks found, and how many rows were set aside. One that is read by another is finished after it.
    ///
    /// # Errors
    ///
    /// If rows cannot be read or checked, or could not be before.
    pub async fn finish(self) -> Result<(Vec<CheckReport>, u64)> {
        // What a reader has left running would take the wake-ups that are for us.
        self.passing().is_left = true;
        while let Some(batch) = poll_fn(|waker| self.passing().poll(&self.schema, waker)).next().await {
            drop(batch?);
        }
        let passing = self.passing();
        match &passing.failed {
            Some(error) => Err(error.clone()),
            None => Ok((passing.sorter.reports(), passing.set_aside)),
        }
    }

    fn passing(&self) -> MutexGuard<'_, Passing> {
        self.passing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Passing {
    fn poll(&mut self, schema: &SchemaRef, waker: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        let polled = match &mut self.rows {
            Rows::Ended => return Poll::Ready(None),
            Rows::Coming(rows) => rows.poll_next_unpin(waker),
            Rows::Waiting(plan, task) => match execute_stream(Arc::clone(plan), Arc::clone(task)) {
                Ok(rows) => {
                    self.rows = Rows::Coming(rows);
                    return self.poll(schema, waker);
                }
                Err(error) => Poll::Ready(Some(Err(error))),
            },
        };
        polled.map(|batch| {
            let passed = batch.map(|batch| self.sort(&batch?, schema));
            if let Some(Err(error)) = &passed {
                self.failed = Some(error.clone());
            }
            if !matches!(passed, Some(Ok(_))) {
                // Sources are let go as soon as they are read.
                self.rows = Rows::Ended;
            }
            passed
        })
    }

    fn sort(&mut self, batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch> {
        let (kept, set_aside) = self.sorter.sort(batch)?;
        self.set_aside += set_aside.len() as u64;
        if !set_aside.is_empty() {
            let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
            aside.push(&quarantine_batch(set_aside)?)?;
        }
        session::conformed(&kept, schema)
    }
}

impl std::fmt::Debug for Sieve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sieve").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PartitionStream for Sieve {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        self.rows()
    }
}
