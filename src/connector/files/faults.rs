//! P4: what a job publishes into a bucket is there whole or not at all, whatever any operation of it does.
//!
//! A second release is loaded on top of a first one, and its nth operation of the store goes wrong, for every
//! n until the load ends before it gets there, in every way in which an operation can. Then a new process
//! looks at what there is, and goes on. All of this module is `#[cfg(test)]`.

use std::{
    fmt,
    io::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use arrow::{
    array::AsArray,
    datatypes::{Decimal128Type, Int64Type},
};
use async_trait::async_trait;
use datafusion::execution::memory_pool::{MemoryPool, UnboundedMemoryPool};
use futures::{
    FutureExt, StreamExt, TryFutureExt, TryStreamExt, future,
    stream::{self, BoxStream},
};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart, memory::InMemory,
    path::Path,
};
use uuid::Uuid;

use super::{
    FilesConnection, ROW_GROUP_BYTES, ROW_GROUP_ROWS,
    manifest::job_path,
    place::{Bucket, Place},
};
use crate::{
    budget::Share,
    connector::{
        CommitOutcome, Connection,
        contract::{self, Line, Release},
        spec::{Mode, OutputSpec, Read, StreamSpec},
    },
    error::{ErrorKind, Result},
    record::LoadRecord,
    runtime,
};

/// What goes wrong with an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// It does not happen: the connection broke.
    Before,
    /// It happens, and its answer is lost.
    After,
    /// It does not happen, and neither does any other.
    BeforeForEver,
    /// It happens, and its answer and all that come later are lost.
    AfterForEver,
    /// A conditional put is refused although nothing has the name, as S3 does with 409 where two meet.
    Conflict,
    /// A conditional put happens and is refused, as by 412 where the client repeated what had happened.
    AfterConflict,
    /// It does not happen: the process died.
    Crash,
    /// It happens, and then the process dies.
    CrashAfter,
}

const FAULTS: [Fault; 8] = [
    Fault::Before,
    Fault::After,
    Fault::BeforeForEver,
    Fault::AfterForEver,
    Fault::Conflict,
    Fault::AfterConflict,
    Fault::Crash,
    Fault::CrashAfter,
];

impl Fault {
    fn happens(self) -> bool {
        matches!(self, Self::After | Self::AfterForEver | Self::AfterConflict | Self::CrashAfter)
    }

    fn lasts(self) -> bool {
        matches!(self, Self::BeforeForEver | Self::AfterForEver)
    }

    fn kills(self) -> bool {
        matches!(self, Self::Crash | Self::CrashAfter)
    }

    fn refuses(self) -> bool {
        matches!(self, Self::Conflict | Self::AfterConflict)
    }
}

/// What a store is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Put,
    /// A put on the condition that nothing has the name.
    Create,
    /// Starts an upload of parts.
    Start,
    Part,
    Complete,
    Abort,
    Get,
    List,
    Delete,
    Copy,
}

/// Which operations count.
type Among = fn(Operation, &Path) -> bool;

fn all(_: Operation, _: &Path) -> bool {
    true
}

fn commits(operation: Operation, path: &Path) -> bool {
    operation == Operation::Create && path.as_ref().contains("/commits/")
}

fn uploads(operation: Operation, _: &Path) -> bool {
    matches!(operation, Operation::Start | Operation::Part | Operation::Complete | Operation::Abort)
}

/// One process's way to a bucket, on which one fault lies in wait.
#[derive(Debug, Clone)]
struct FaultStore {
    bucket: InMemory,
    /// What goes wrong with the nth of the operations that count.
    plan: Option<(Fault, usize, Among)>,
    /// Whether conditions of puts are ignored.
    careless: bool,
    touched: Arc<Mutex<Touched>>,
}

#[derive(Debug, Default)]
struct Touched {
    operations: Vec<(Operation, Path)>,
    counted: usize,
    /// The first operation that went wrong.
    struck: Option<String>,
    dead: bool,
}

/// What becomes of one operation.
enum Fate {
    Happens,
    Unanswered(object_store::Error),
    Refused(object_store::Error),
}

impl FaultStore {
    fn sound(bucket: &InMemory) -> Self {
        Self { bucket: bucket.clone(), plan: None, careless: false, touched: Arc::default() }
    }

    fn faulty(bucket: &InMemory, fault: Fault, nth: usize, among: Among) -> Self {
        Self { plan: Some((fault, nth, among)), ..Self::sound(bucket) }
    }

    /// What the fault came upon, if it did.
    fn struck(&self) -> Option<String> {
        self.touched.lock().unwrap().struck.clone()
    }

    /// The names of everything that somebody wanted to write.
    fn written(&self) -> Vec<String> {
        let writes = [Operation::Put, Operation::Create, Operation::Start, Operation::Copy];
        let touched = self.touched.lock().unwrap();
        let written = touched.operations.iter().filter(|(operation, _)| writes.contains(operation));
        written.map(|(_, path)| path.to_string()).collect()
    }

    fn fate(&self, operation: Operation, path: &Path) -> Fate {
        let broken =
            || object_store::Error::Generic { store: "faults", source: "the connection broke".into() };
        let mut touched = self.touched.lock().unwrap();
        touched.operations.push((operation, path.clone()));
        if touched.dead {
            return Fate::Refused(broken());
        }
        let Some((fault, nth, among)) = self.plan else { return Fate::Happens };
        if !among(operation, path) || fault.refuses() && operation != Operation::Create {
            return Fate::Happens;
        }
        touched.counted += 1;
        if touched.counted < nth || touched.counted > nth && !fault.lasts() {
            return Fate::Happens;
        }
        touched.struck.get_or_insert_with(|| format!("{operation:?} of `{path}`"));
        touched.dead = fault.kills();
        let error = match fault.refuses() {
            true => object_store::Error::AlreadyExists { path: path.to_string(), source: "refused".into() },
            false => broken(),
        };
        if fault.happens() { Fate::Unanswered(error) } else { Fate::Refused(error) }
    }

    async fn touch<T>(
        &self,
        operation: Operation,
        path: &Path,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> object_store::Result<T> {
        match self.fate(operation, path) {
            Fate::Happens => work.await,
            Fate::Unanswered(error) => {
                drop(work.await);
                Err(error)
            }
            Fate::Refused(error) => Err(error),
        }
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a bucket with faults")
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut opts: PutOptions,
    ) -> object_store::Result<PutResult> {
        let operation = if opts.mode == PutMode::Create { Operation::Create } else { Operation::Put };
        if self.careless {
            opts.mode = PutMode::Overwrite;
        }
        self.touch(operation, location, self.bucket.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        let start = self.bucket.put_multipart_opts(location, opts);
        let upload = self.touch(Operation::Start, location, start).await?;
        Ok(Box::new(FaultUpload { upload, store: self.clone(), path: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, mut options: GetOptions) -> object_store::Result<GetResult> {
        // Real stores have their tags in quotes, and this one has not.
        options.if_match = options.if_match.map(|tag| tag.trim_matches('"').to_owned());
        self.touch(Operation::Get, location, self.bucket.get_opts(location, options)).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let this = self.clone();
        let deleted = locations.and_then(move |path| {
            let this = this.clone();
            async move {
                let deleted = this.touch(Operation::Delete, &path, this.bucket.delete(&path)).await;
                deleted.map(|()| path)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned().unwrap_or_default());
        let listed = async move {
            let objects = this.bucket.list(Some(&prefix)).try_collect::<Vec<_>>();
            this.touch(Operation::List, &prefix, objects).await
        };
        listed.map_ok(|objects| stream::iter(objects.into_iter().map(Ok))).try_flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        let path = prefix.cloned().unwrap_or_default();
        self.touch(Operation::List, &path, self.bucket.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.touch(Operation::Copy, to, self.bucket.copy_opts(from, to, options)).await
    }
}

/// An upload of parts, each of which is an operation.
#[derive(Debug)]
struct FaultUpload {
    upload: Box<dyn MultipartUpload>,
    store: FaultStore,
    path: Path,
}

#[async_trait]
impl MultipartUpload for FaultUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        // A part's place is the one in which it was handed over, whenever it arrives.
        match self.store.fate(Operation::Part, &self.path) {
            Fate::Happens => self.upload.put_part(data),
            Fate::Unanswered(error) => self.upload.put_part(data).map(move |_| Err(error)).boxed(),
            Fate::Refused(error) => future::ready(Err(error)).boxed(),
        }
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        self.store.touch(Operation::Complete, &self.path, self.upload.complete()).await
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.store.touch(Operation::Abort, &self.path, self.upload.abort()).await
    }
}

fn place(store: &FaultStore) -> Place {
    let store = Arc::new(store.clone());
    let bucket = Bucket::new(store, "memory://lake".to_owned(), "", std::env::temp_dir());
    Place::Bucket(bucket.with_patience(Duration::from_millis(1)))
}

/// The bucket as a new process opens it.
fn open(store: &FaultStore) -> Arc<dyn Connection> {
    Arc::new(Arc::new(FilesConnection {
        name: "lake".to_owned(),
        shown: "memory://lake".to_owned(),
        place: place(store),
        row_group_rows: ROW_GROUP_ROWS,
        row_group_bytes: ROW_GROUP_BYTES,
    }))
}

/// An attempt at the release behind the newest one.
async fn begun(store: &FaultStore) -> Result<Release> {
    Release::of(open(store).as_ref(), contract::job(), None, 1).await
}

/// The same, with everything staged, and the record that it is to commit.
async fn staged(store: &FaultStore, output: &OutputSpec, rows: &[Line]) -> Result<(Release, LoadRecord)> {
    let mut release = begun(store).await?;
    let staged = release.load.stage(output, contract::stream(rows)).await?;
    let record = release.record(&staged, output.mode);
    Ok((release, record))
}

/// A whole load: which attempt it was and what its commit said, or why it did not get so far.
async fn load(store: &FaultStore, output: &OutputSpec, rows: &[Line]) -> Result<(Uuid, CommitOutcome)> {
    let (release, record) = staged(store, output, rows).await?;
    Ok((record.attempt_id, release.load.commit(&record).await))
}

/// Whether what a commit said is true. One whose answer was lost says nothing.
fn is_true(outcome: &CommitOutcome, landed: bool) -> bool {
    match outcome {
        CommitOutcome::Committed(_) => landed,
        CommitOutcome::Rejected(_) => !landed,
        CommitOutcome::Unknown(_) => true,
    }
}

/// The rows that a reader finds who goes by the manifest, sorted.
async fn published(connection: &dyn Connection) -> Result<Vec<Line>> {
    let table = StreamSpec::whole("lines", Read::Table("lines".to_owned()));
    let (_, batches) = contract::everything(connection, &table, &Arc::default()).await?;
    let mut lines = Vec::new();
    for batch in &batches {
        let ids = batch.column(0).as_primitive::<Int64Type>();
        let periods = batch.column(1).as_string::<i32>();
        let amounts = batch.column(2).as_primitive::<Decimal128Type>();
        let line = |row| (ids.value(row), periods.value(row).to_owned(), amounts.value(row));
        lines.extend((0..batch.num_rows()).map(line));
    }
    lines.sort();
    Ok(lines)
}

async fn objects(bucket: &InMemory) -> Vec<ObjectMeta> {
    bucket.list(None).try_collect().await.unwrap()
}

/// What the names of an attempt's files have in them.
fn mark(attempt: Uuid) -> String {
    attempt.simple().to_string().split_off(20)
}

/// The files of an attempt, whoever lists them; its seal is none of them.
async fn files_of(bucket: &InMemory, attempt: Uuid) -> Vec<String> {
    let paths = objects(bucket).await.into_iter().map(|object| object.location.to_string());
    paths.filter(|path| path.contains(&mark(attempt)) && !path.contains("/staged/")).collect()
}

/// A bucket holds these rows and so many releases: each has one record, which follows the one before, and all
/// of its files.
async fn holds(bucket: &InMemory, rows: &[Line], releases: u64, point: &str) {
    let connection = open(&FaultStore::sound(bucket));
    let found = published(&*connection).await.unwrap_or_else(|error| panic!("{point}: {error}"));
    let known: Vec<_> = found.iter().map(|(id, _, amount)| (id, amount)).collect();
    assert!(found == rows, "{point}: a reader finds {known:?}");

    let commits = Path::from(format!("{}/commits", job_path(&contract::job())));
    let records: Vec<ObjectMeta> = bucket.list(Some(&commits)).try_collect().await.unwrap();
    let names: Vec<_> = records.iter().map(|object| object.location.filename().unwrap()).collect();
    let expected: Vec<_> = (1..=releases).map(|seq| format!("{seq:020}.json")).collect();
    assert_eq!(names, expected, "{point}");
    let mut before = None;
    for seq in 1..=releases {
        let record = connection.target().unwrap().record_at(&contract::job(), seq).await.unwrap().unwrap();
        assert_eq!((record.seq, &record.prev_record_sha256), (seq, &before), "{point}");
        for file in &record.outputs["lines"].files {
            let path = Path::parse(format!("lines/{}", file.path)).unwrap();
            let size = bucket.head(&path).await.map(|object| object.size).ok();
            assert_eq!(size, Some(file.bytes), "{point}: `{path}` of release {seq}");
        }
        before = Some(record.sha256());
    }
}

/// A row whose id decides its period.
fn line(id: i64, amount: i128) -> Line {
    (id, format!("p{}", id % 3), amount)
}

/// A bucket with one release, and a second one that faults come upon.
struct Tried {
    output: OutputSpec,
    bucket: InMemory,
    first: LoadRecord,
    before: Vec<Line>,
    rows: Vec<Line>,
    after: Vec<Line>,
}

impl Tried {
    async fn new(output: OutputSpec, rows: Vec<Line>) -> Self {
        let (bucket, before) = (InMemory::new(), [100, 200, 300, 400]);
        let before: Vec<Line> = (1..).zip(before).map(|(id, amount)| line(id, amount)).collect();
        let sound = FaultStore::sound(&bucket);
        let (_, outcome) = load(&sound, &output, &before).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Committed(None)), "{outcome:?}");
        let first = open(&sound).target().unwrap().last_record(&contract::job()).await.unwrap().unwrap();
        let after = contract::expected(output.mode, &before, &rows);
        Self { output, bucket, first, before, rows, after }
    }

    /// Rows that are new; unless they are added only, also one that is known and one that is another now.
    async fn of(mode: Mode) -> Self {
        let rows = match mode {
            Mode::Append => vec![line(5, 500), line(6, 600)],
            _ => vec![line(2, 250), line(4, 400), line(5, 500)],
        };
        Self::new(contract::output(mode), rows).await
    }

    /// Loads the second release while a fault lies in wait, looks, and goes on without it. False if the fault
    /// was not met.
    async fn meets(&self, fault: Fault, nth: usize, among: Among) -> bool {
        let bucket = self.bucket.fork();
        let store = FaultStore::faulty(&bucket, fault, nth, among);
        let outcome = load(&store, &self.output, &self.rows).await;
        runtime::tidied().await;
        let Some(operation) = store.struck() else {
            assert!(matches!(outcome, Ok((_, CommitOutcome::Committed(None)))), "{outcome:?}");
            holds(&bucket, &self.after, 2, "without a fault").await;
            return false;
        };
        let point = format!("{}: {fault:?} {nth}, {operation}, came to {outcome:?}", self.output.mode);

        let sound = FaultStore::sound(&bucket);
        let (connection, job) = (open(&sound), contract::job());
        let target = connection.target().unwrap();
        let last = target.last_record(&job).await.unwrap().unwrap();
        let landed = last != self.first;
        match &outcome {
            Ok((attempt, outcome)) => {
                assert!(!landed || last.attempt_id == *attempt, "{point}");
                assert!(is_true(outcome, landed), "{point}, and landed: {landed}");
            }
            Err(error) => {
                assert!(!landed, "{point}, and has landed");
                // A run tries these again.
                assert_eq!(error.kind(), ErrorKind::Temporary, "{point}");
            }
        }
        let second = target.record_at(&job, 2).await.unwrap();
        assert_eq!(second, landed.then_some(last), "{point}");
        let rows = if landed { &self.after } else { &self.before };
        holds(&bucket, rows, 1 + u64::from(landed), &point).await;

        if !landed {
            let (_, outcome) = load(&sound, &self.output, &self.rows).await.unwrap();
            assert!(matches!(outcome, CommitOutcome::Committed(None)), "{point}, then {outcome:?}");
            holds(&bucket, &self.after, 2, &point).await;
        }
        true
    }

    /// Meets every fault at every operation that counts. How many there were.
    async fn meets_all(&self, among: Among) -> usize {
        let mut points = 0;
        for fault in FAULTS {
            let mut nth = 1;
            while self.meets(fault, nth, among).await {
                (nth, points) = (nth + 1, points + 1);
            }
        }
        points
    }
}

async fn fails_everywhere(mode: Mode) {
    let points = Tried::of(mode).await.meets_all(all).await;
    println!("{mode} into a bucket: {points} faults");
    assert!(points >= 110, "{mode} into a bucket: {points} faults only");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_into_a_bucket_that_fails_anywhere_is_all_or_nothing() {
    fails_everywhere(Mode::Append).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_into_a_bucket_that_fails_anywhere_is_all_or_nothing() {
    fails_everywhere(Mode::Merge).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replace_in_a_bucket_that_fails_anywhere_is_all_or_nothing() {
    fails_everywhere(Mode::Replace).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replace_of_ranges_in_a_bucket_that_fails_anywhere_is_all_or_nothing() {
    fails_everywhere(Mode::ReplaceRange).await;
}

/// Text that no compression makes much smaller.
fn noise(bytes: usize, state: &mut u64) -> String {
    let next = |_| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let [random, ..] = state.to_be_bytes();
        char::from(random >> 1)
    };
    (0..bytes).map(next).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_several_parts_that_fails_at_any_of_them_is_all_or_nothing() {
    let mut state = 1;
    let rows: Vec<Line> = (1..=20).map(|id| (id, noise(1 << 20, &mut state), 100)).collect();
    let output = OutputSpec { partition_by: Vec::new(), ..contract::output(Mode::Replace) };
    let points = Tried::new(output, rows).await.meets_all(uploads).await;
    println!("parts of a file: {points} faults");
    // A start, two parts and a completion, for each fault but the two that only conditional puts meet.
    assert!(points >= 24, "parts of a file: {points} faults only");
}

/// A process dies before or behind its commit: what it had sealed waits for whoever comes next, until something else has its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_process_had_sealed_can_be_committed_once() {
    let job = contract::job();
    for mode in [Mode::Append, Mode::Merge, Mode::Replace, Mode::ReplaceRange] {
        let tried = Tried::of(mode).await;
        for fault in [Fault::Crash, Fault::CrashAfter] {
            let bucket = tried.bucket.fork();
            let outcome =
                load(&FaultStore::faulty(&bucket, fault, 1, commits), &tried.output, &tried.rows).await;
            let Ok((attempt, CommitOutcome::Unknown(_))) = outcome else { panic!("{mode}: {outcome:?}") };
            let connection = open(&FaultStore::sound(&bucket));
            let target = connection.target().unwrap();
            let last = target.last_record(&job).await.unwrap();
            let found = target.sealed(&job, last.as_ref()).await.unwrap();
            assert_eq!(found.len(), usize::from(fault == Fault::Crash), "{mode}, {fault:?}");
            // On top of another release it is nothing.
            assert!(target.sealed(&job, None).await.unwrap().is_empty(), "{mode}");
            let Some(sealed) = found.into_iter().next() else { continue };
            assert_eq!(sealed.attempt_id, attempt, "{mode}");
            assert_eq!(sealed.prev_record_sha256, Some(tried.first.sha256()), "{mode}");

            // Another one is faster.
            let overtaken = bucket.fork();
            let sound = FaultStore::sound(&overtaken);
            let (_, outcome) = load(&sound, &tried.output, &tried.before).await.unwrap();
            assert!(matches!(outcome, CommitOutcome::Committed(None)), "{mode}: {outcome:?}");
            let rows = contract::expected(mode, &tried.before, &tried.before);
            let outcome = open(&sound).target().unwrap().commit_sealed(&job, &sealed).await;
            assert!(matches!(outcome, CommitOutcome::Rejected(_)), "{mode}: {outcome:?}");
            holds(&overtaken, &rows, 2, "overtaken").await;

            // A file of it is gone.
            let lacking = bucket.fork();
            let file = files_of(&lacking, attempt).await.pop().unwrap();
            lacking.delete(&Path::parse(file).unwrap()).await.unwrap();
            let target = open(&FaultStore::sound(&lacking));
            let found = target.target().unwrap().sealed(&job, last.as_ref()).await.unwrap();
            assert!(found.is_empty(), "{mode}: it is not whole");

            // Two come upon it at once.
            let again = open(&FaultStore::sound(&bucket));
            let (one, two) = future::join(
                connection.target().unwrap().commit_sealed(&job, &sealed),
                again.target().unwrap().commit_sealed(&job, &sealed),
            )
            .await;
            for outcome in [one, two] {
                assert!(matches!(outcome, CommitOutcome::Committed(None)), "{mode}: {outcome:?}");
            }
            runtime::tidied().await;
            holds(&bucket, &tried.after, 2, "sealed").await;
            let last = again.target().unwrap().last_record(&job).await.unwrap();
            assert_eq!(last.as_ref(), Some(&sealed), "{mode}");
            assert!(again.target().unwrap().sealed(&job, last.as_ref()).await.unwrap().is_empty(), "{mode}");
        }
    }
}

/// When the attempt commits that meets the fault.
#[derive(Debug, Clone, Copy)]
enum Turn {
    First,
    Last,
    AtOnce,
}

impl Tried {
    /// Two attempts on the first release, both staged; a fault comes upon the commit of the one that brings
    /// `self.rows`.
    async fn is_contested(&self, others: &[Line], fault: Fault, turn: Turn) {
        let point = format!("{}: {fault:?}, {turn:?}", self.output.mode);
        let bucket = self.bucket.fork();
        let (faulty, sound) = (FaultStore::faulty(&bucket, fault, 1, commits), FaultStore::sound(&bucket));
        let (one, ours) = staged(&faulty, &self.output, &self.rows).await.unwrap();
        let (two, theirs) = staged(&sound, &self.output, others).await.unwrap();
        let files = files_of(&bucket, ours.attempt_id).await;
        assert!(!files.is_empty(), "{point}");
        let (of_faulty, of_sound) = match turn {
            Turn::First => {
                let of_faulty = one.load.commit(&ours).await;
                (of_faulty, two.load.commit(&theirs).await)
            }
            Turn::Last => {
                let of_sound = two.load.commit(&theirs).await;
                (one.load.commit(&ours).await, of_sound)
            }
            Turn::AtOnce => future::join(one.load.commit(&ours), two.load.commit(&theirs)).await,
        };
        runtime::tidied().await;
        assert!(faulty.struck().is_some(), "{point}: the fault was not met");
        let point = format!("{point}, came to {of_faulty:?} and {of_sound:?}");

        let connection = open(&sound);
        let last = connection.target().unwrap().last_record(&contract::job()).await.unwrap().unwrap();
        assert!([ours.attempt_id, theirs.attempt_id].contains(&last.attempt_id), "{point}");
        let won = last.attempt_id == ours.attempt_id;
        assert!(is_true(&of_faulty, won), "{point}, and won: {won}");
        let told = match (turn, fault.lasts() || fault.kills()) {
            (_, true) => matches!(of_faulty, CommitOutcome::Unknown(_)),
            (Turn::First, false) => matches!(of_faulty, CommitOutcome::Committed(None)),
            (Turn::Last, false) => matches!(of_faulty, CommitOutcome::Rejected(_)),
            (Turn::AtOnce, false) => !matches!(of_faulty, CommitOutcome::Unknown(_)),
        };
        assert!(told, "{point}: what could be asked was not settled, or what could not was guessed");
        let told = match won {
            true => matches!(of_sound, CommitOutcome::Rejected(_)),
            false => matches!(of_sound, CommitOutcome::Committed(None)),
        };
        assert!(told, "{point}, and won: {won}");
        if matches!(of_faulty, CommitOutcome::Unknown(_)) {
            assert_eq!(files_of(&bucket, ours.attempt_id).await, files, "{point}: they may be a release");
        }

        let winner = mark(last.attempt_id);
        let known = &self.first.outputs["lines"].files;
        for file in &last.outputs["lines"].files {
            assert!(file.path.contains(&winner) || known.contains(file), "{point}: lists `{}`", file.path);
        }
        let rows: &[Line] = if won { &self.rows } else { others };
        let after = contract::expected(self.output.mode, &self.before, rows);
        holds(&bucket, &after, 2, &point).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_attempts_one_wins_whatever_happens_at_the_commit_of_one() {
    for mode in [Mode::Append, Mode::Merge, Mode::Replace, Mode::ReplaceRange] {
        let tried = Tried::of(mode).await;
        let others = match mode {
            Mode::Append => vec![line(7, 700)],
            _ => vec![line(3, 350), line(7, 700)],
        };
        for fault in FAULTS {
            for turn in [Turn::First, Turn::Last, Turn::AtOnce] {
                tried.is_contested(&others, fault, turn).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_ignores_conditions_is_refused_before_anything_is_written() {
    for bucket in [InMemory::new(), Tried::of(Mode::Append).await.bucket] {
        let before = objects(&bucket).await;
        let store = FaultStore { careless: true, ..FaultStore::sound(&bucket) };
        let error = begun(&store).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        let written = store.written();
        let probes = written.iter().filter(|path| path.starts_with("_floodmark/probe/")).count();
        assert!(probes >= 2 && probes == written.len(), "{written:?}");
        assert_eq!(objects(&bucket).await, before, "the probe is taken away, and nothing else was touched");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_could_not_start_is_an_error_for_whoever_goes_on_writing() {
    let bucket = InMemory::new();
    let place = place(&FaultStore::faulty(&bucket, Fault::Before, 1, uploads));
    let writing = runtime::blocking(move || {
        let pool: Arc<dyn MemoryPool> = Arc::new(UnboundedMemoryPool::default());
        let mut sink = place.new_file("lines/data/large.parquet", &Share::of_output("lines", &pool))?;
        assert!(sink.write_all(&vec![0; 17 << 20]).is_err());
        // A buffer in front of it does so when it is dropped.
        assert!(sink.write_all(b"more").is_err());
        Ok(sink.finish().is_err())
    });
    assert!(writing.await.unwrap(), "what was not written is not whole");
    assert!(objects(&bucket).await.is_empty());
}
