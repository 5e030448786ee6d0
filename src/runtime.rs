//! Where work runs: tokio waits, blocking threads read, rayon computes. Nothing else spawns.
//!
//! Also the limits that a run keeps: memory for DataFusion and spools, a folder for what does not fit, and the
//! clock.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use chrono::{DateTime, Utc};
use datafusion::{
    execution::{
        disk_manager::{DiskManagerBuilder, DiskManagerMode},
        memory_pool::TrackConsumersPool,
        runtime_env::{RuntimeEnv, RuntimeEnvBuilder},
    },
    physical_plan::{SendableRecordBatchStream, stream::RecordBatchReceiverStreamBuilder},
};
use futures::{FutureExt, future::BoxFuture};
use tokio::sync::mpsc::{Receiver, Sender, channel, error::TryRecvError};

use crate::{
    budget::Budget,
    error::{Error, Result},
};

/// Rows in a batch, everywhere.
pub const BATCH_ROWS: usize = 8192;

/// Bytes of one batch at which a source cuts it, however few rows it has.
pub const BATCH_BYTES: usize = 8 << 20;

/// Batches that wait between a blocking reader and its consumer.
const CHANNEL_BATCHES: usize = 2;

/// Batches of one reader that are there at a time: those that wait for models and for an output, the one that is being made, and those that
/// are being written.
pub const BATCHES_UNDER_WAY: usize = 2 * CHANNEL_BATCHES + 2;

/// Tells the time, so that a test can hold it still.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// The time now.
    fn now(&self) -> DateTime<Utc>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}

/// A clock that stands still.
#[derive(Debug, Clone, Copy)]
pub struct FixedClock(pub DateTime<Utc>);

impl Clock for FixedClock {
    fn now(&self) -> DateTime<Utc> {
        self.0
    }
}

/// What a run may use.
#[derive(Debug, Clone)]
pub struct Limits {
    /// What the process may use, in bytes. A part of it is kept for sources and outputs ([`Budget`]); joins, sorts,
    /// aggregates and spools share the rest.
    pub memory_bytes: usize,
    /// Where what does not fit is written. Each call has a folder of its own there, which ends with it; the next call takes away
    /// what one that was killed has left.
    pub spill: PathBuf,
}

impl Limits {
    /// DataFusion's side of the limits.
    ///
    /// # Errors
    ///
    /// If the spill folder cannot be used.
    pub fn environment(&self) -> Result<Arc<RuntimeEnv>> {
        let ten = std::num::NonZeroUsize::new(5).unwrap_or(std::num::NonZeroUsize::MIN);
        let pool = TrackConsumersPool::new(Budget::within(self.memory_bytes), ten);
        let disk =
            DiskManagerBuilder::default().with_mode(DiskManagerMode::Directories(vec![self.spill.clone()]));
        let environment = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(pool))
            .with_disk_manager_builder(disk)
            .build()?;
        Ok(Arc::new(environment))
    }
}

/// The other end of [`blocking_stream`]: takes batches until nobody wants more.
#[derive(Debug)]
pub struct BatchSender {
    sender: Sender<datafusion::error::Result<RecordBatch>>,
}

impl BatchSender {
    /// Hands over one batch, and waits while the consumer is behind. False once nobody reads any more.
    #[must_use]
    pub fn send(&self, batch: RecordBatch) -> bool {
        self.sender.blocking_send(Ok(batch)).is_ok()
    }
}

/// A stream of what `read` sends from a thread of its own. The channel is short, so a slow consumer stops the
/// reader. An error ends the stream.
pub fn blocking_stream(
    schema: SchemaRef,
    read: impl FnOnce(&BatchSender) -> Result<()> + Send + 'static,
) -> SendableRecordBatchStream {
    let mut builder = RecordBatchReceiverStreamBuilder::new(schema, CHANNEL_BATCHES);
    let sender = BatchSender { sender: builder.tx() };
    builder.spawn_blocking(move || read(&sender).map_err(Into::into));
    builder.build()
}

/// Runs blocking work on a thread where it may block, and waits for it.
///
/// # Errors
///
/// What `work` says; a panic there is a bug of ours.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    begun(work).await
}

/// Begins blocking work on a thread where it may block; the future waits for it.
fn begun<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    #[expect(clippy::disallowed_methods, reason = "this is the place that spawns")]
    let task = tokio::task::spawn_blocking(work);
    async {
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(Error::new(crate::error::ErrorKind::Interrupted, "interrupted")),
        }
    }
}

/// Does work for each of `parts`, on so many threads at most, this one among them, where it may block; until one says that nothing more is wanted, with false.
/// Work looks now and then whether it is over: for that, or since another part failed.
///
/// # Errors
///
/// What a part that fails says.
pub fn side_by_side<Part: Sync>(
    threads: usize,
    parts: &[Part],
    work: impl Fn(&Part, &AtomicBool) -> Result<bool> + Sync,
) -> Result<bool> {
    /// Says that it is over unless the part was done, also where that panics.
    struct Turn<'a>(&'a AtomicBool, bool);
    impl Drop for Turn<'_> {
        fn drop(&mut self) {
            self.0.fetch_or(!self.1, Ordering::Relaxed);
        }
    }
    let (next, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let take_turns = || {
        while !is_over.load(Ordering::Relaxed)
            && let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let mut turn = Turn(&is_over, false);
            turn.1 = work(part, &is_over)?;
        }
        Ok(!is_over.load(Ordering::Relaxed))
    };
    std::thread::scope(|scope| {
        let other = |_| std::thread::Builder::new().spawn_scoped(scope, take_turns).ok();
        // Where the system has no more threads, there are fewer.
        let others: Vec<_> = (1..threads.min(parts.len())).filter_map(other).collect();
        let all = take_turns();
        others.into_iter().fold(all, |all, other| {
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // A part that was left since another failed only says that it is over.
            Ok(all? & other?)
        })
    })
}

/// How many threads compute at once.
pub fn cores() -> usize {
    rayon::current_num_threads()
}

/// Begins work on the threads that compute.
pub fn compute<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Computing<T> {
    let (sender, done) = std::sync::mpsc::sync_channel(1);
    rayon::spawn(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        // Perhaps nobody wants it any more.
        drop(sender.send(result));
    });
    Computing(done)
}

/// Work that was begun by [`compute`].
#[derive(Debug)]
pub struct Computing<T>(std::sync::mpsc::Receiver<std::thread::Result<T>>);

impl<T> Computing<T> {
    /// Waits for the result, on a thread where that may be done. A panic there is one here.
    ///
    /// # Errors
    ///
    /// If it was never begun, which is a bug.
    pub fn wait(self) -> Result<T> {
        match self.0.recv() {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::bug("work that was begun has not ended")),
        }
    }
}

/// A thread that takes batches while whoever made them makes more, and comes to something when it has all of them.
#[expect(missing_debug_implementations, reason = "a future has none")]
pub struct Consumer<T> {
    sender: Sender<Option<RecordBatch>>,
    done: BoxFuture<'static, Result<T>>,
}

impl<T: Send + 'static> Consumer<T> {
    /// Begins `consume` on a thread of its own.
    pub fn new(consume: impl FnOnce(&mut Batches) -> Result<T> + Send + 'static) -> Self {
        let (sender, receiver) = channel(CHANNEL_BATCHES);
        // Also when nobody waits for it any more, it takes away what it has begun: the process ends behind it.
        let under_way = TIDYING.token();
        let done = begun(move || {
            let result = consume(&mut Batches { receiver, ended: false });
            drop(under_way);
            result
        });
        Self { sender, done: done.boxed() }
    }

    /// Hands over one batch, and waits while the thread is behind.
    ///
    /// # Errors
    ///
    /// Why the thread takes no more.
    pub async fn take(&mut self, batch: RecordBatch) -> Result<()> {
        if self.sender.send(Some(batch)).await.is_ok() {
            return Ok(());
        }
        // It has ended before the end: it says why.
        (&mut self.done).await.and_then(|_| Err(Error::bug("a thread ended before its work did")))
    }

    /// What all batches together came to.
    ///
    /// # Errors
    ///
    /// What the thread says.
    pub async fn finish(self) -> Result<T> {
        // If nobody listens any more, the thread says why.
        drop(self.sender.send(None).await);
        self.done.await
    }
}

/// The batches that a [`Consumer`] is given.
#[derive(Debug)]
pub struct Batches {
    receiver: Receiver<Option<RecordBatch>>,
    ended: bool,
}

impl Batches {
    /// Waits for the next batches: those that are there, and one at least. `None` when it has had all of them.
    ///
    /// # Errors
    ///
    /// If whoever made them has gone away: what was consumed is not all.
    pub fn more(&mut self) -> Result<Option<Vec<RecordBatch>>> {
        let mut batches = Vec::new();
        while !self.ended && batches.len() <= CHANNEL_BATCHES {
            let next = match batches.is_empty() {
                true => self.receiver.blocking_recv(),
                false => match self.receiver.try_recv() {
                    Err(TryRecvError::Empty) => break,
                    next => next.ok(),
                },
            };
            match next {
                Some(Some(batch)) => batches.push(batch),
                Some(None) => self.ended = true,
                None => return Err(Error::new(crate::error::ErrorKind::Interrupted, "interrupted")),
            }
        }
        Ok((!batches.is_empty()).then_some(batches))
    }
}

/// A stream of what `read` sends from a task of its own, as [`blocking_stream`] does for readers that block.
pub fn stream<Reading: Future<Output = Result<()>> + Send + 'static>(
    schema: SchemaRef,
    read: impl FnOnce(AsyncSender) -> Reading,
) -> SendableRecordBatchStream {
    streams(schema, |out| [read(out)])
}

/// The same of several readers, each a task of its own, whose batches come as they are ready.
pub fn streams<
    Reading: Future<Output = Result<()>> + Send + 'static,
    Readers: IntoIterator<Item = Reading>,
>(
    schema: SchemaRef,
    readers: impl FnOnce(AsyncSender) -> Readers,
) -> SendableRecordBatchStream {
    let mut builder = RecordBatchReceiverStreamBuilder::new(schema, CHANNEL_BATCHES);
    for reading in readers(AsyncSender { sender: builder.tx() }) {
        builder.spawn(async move { reading.await.map_err(Into::into) });
    }
    builder.build()
}

/// The other end of [`stream`].
#[derive(Debug, Clone)]
pub struct AsyncSender {
    sender: Sender<datafusion::error::Result<RecordBatch>>,
}

impl AsyncSender {
    /// Hands over one batch, and waits while the consumer is behind. False once nobody reads any more.
    pub async fn send(&self, batch: RecordBatch) -> bool {
        self.sender.send(Ok(batch)).await.is_ok()
    }
}

/// Waits.
pub async fn sleep(duration: std::time::Duration) {
    tokio::time::sleep(duration).await;
}

/// What `work` comes to, if it does within that time.
pub async fn within<T>(time: std::time::Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(time, work).await.ok()
}

/// Between half of a wait and all of it, so that those who failed together do not come back together.
pub fn jittered(wait: std::time::Duration) -> std::time::Duration {
    let [random, ..] = *uuid::Uuid::new_v4().as_bytes();
    wait / 2 + wait.mul_f64(f64::from(random) / 512.0)
}

/// Spaces out what should not happen too often.
#[derive(Debug)]
pub struct Pace {
    interval: std::time::Duration,
    next: tokio::sync::Mutex<Option<tokio::time::Instant>>,
}

impl Pace {
    /// So many times a second; as often as one likes where nobody says.
    pub fn new(per_second: Option<u32>) -> Self {
        let interval = per_second.map(|rate| std::time::Duration::from_secs(1) / rate.max(1));
        Self { interval: interval.unwrap_or_default(), next: tokio::sync::Mutex::default() }
    }

    /// Waits for its turn.
    pub async fn wait(&self) {
        if self.interval.is_zero() {
            return;
        }
        let mut next = self.next.lock().await;
        let now = tokio::time::Instant::now();
        let turn = next.map_or(now, |turn| turn.max(now));
        *next = Some(turn + self.interval);
        drop(next);
        tokio::time::sleep_until(turn).await;
    }
}

/// Ends the process at once, without waiting for anything.
#[expect(clippy::exit, reason = "a user who asks twice does not want to wait")]
pub fn exit(code: u8) -> ! {
    std::process::exit(code.into())
}

/// Starts a task that is aborted when the handle is dropped.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> TaskGuard {
    #[expect(clippy::disallowed_methods, reason = "this is the place that spawns")]
    let task = tokio::task::spawn(work);
    TaskGuard(task)
}

/// Tidying up that is under way.
static TIDYING: std::sync::LazyLock<tokio_util::task::TaskTracker> =
    std::sync::LazyLock::new(tokio_util::task::TaskTracker::new);

/// Starts a task that nobody waits for: tidying up. Does nothing where there is no runtime.
pub fn detached(work: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        drop(TIDYING.spawn_on(work, &runtime));
    }
}

/// Waits until everything is tidied up, but not for long.
pub async fn tidied() {
    TIDYING.close();
    drop(tokio::time::timeout(std::time::Duration::from_secs(5), TIDYING.wait()).await);
}

/// A running task; dropping it aborts the task.
#[derive(Debug)]
pub struct TaskGuard(tokio::task::JoinHandle<()>);

impl Drop for TaskGuard {
    fn drop(&mut self) {
        self.0.abort();
    }
}
