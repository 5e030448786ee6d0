//! Where the files of a connection lie: a folder, or a bucket. The few things that are done there, alike for both.
//!
//! Everything here blocks and is called on a thread where it may. What is written is whole and durable when `finish`
//! or `create` has returned, or is not there. A small file that is created has its name for itself: of two that try,
//! one wins; in a bucket that is a conditional put, and a store without them is refused before anything is published.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use object_store::{
    GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    buffered::BufWriter,
};
use tokio::runtime::Handle;
use tokio_util::io::SyncIoBridge;

use super::durable::{self, NewFile};
use crate::{
    budget::Share,
    error::{Error, ErrorKind, Result},
    runtime,
    watermark::FileVersion,
};

/// A file as a listing told it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Listed {
    /// Relative to the connection's root.
    pub(super) path: String,
    /// In bytes; 0 where nobody told.
    pub(super) size: u64,
    /// What the store calls this content; `None` in a folder.
    pub(super) version: Option<String>,
}

/// Starts a [`FileVersion`]'s fingerprint that is the store's own.
const OF_THE_STORE: &str = "version:";

impl Listed {
    pub(super) fn of(object: ObjectMeta, in_bucket: bool) -> Self {
        // Some listings leave the quotes out that belong to an ETag.
        let tag = object.e_tag.map(|tag| if tag.contains('"') { tag } else { format!("\"{tag}\"") });
        let version = tag.or(object.version).unwrap_or_else(|| object.last_modified.to_rfc3339());
        Self { path: object.location.to_string(), size: object.size, version: in_bucket.then_some(version) }
    }

    /// A file of which only the name is known.
    pub(super) fn named(path: &str) -> Self {
        Self { path: path.to_owned(), size: 0, version: None }
    }

    /// Whether this many bytes cannot be the file.
    fn is_not(&self, bytes: u64) -> bool {
        self.size > 0 && self.size != bytes
    }

    /// The file that a window means.
    pub(super) fn meant(file: &FileVersion) -> Self {
        let version = file.sha256.strip_prefix(OF_THE_STORE).map(str::to_owned);
        Self { path: file.path.clone(), size: file.size, version }
    }

    /// Its identity, if that is known without reading it.
    pub(super) fn identity(&self) -> Option<FileVersion> {
        let sha256 = format!("{OF_THE_STORE}{}", self.version.as_ref()?);
        Some(FileVersion { path: self.path.clone(), size: self.size, sha256 })
    }
}

/// A folder or a bucket.
#[derive(Debug)]
pub(super) enum Place {
    Folder(PathBuf),
    Bucket(Bucket),
}

/// Objects below one prefix of a bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    store: Arc<dyn ObjectStore>,
    /// How people know it.
    shown: String,
    /// What to look at where access is refused.
    credentials: &'static str,
    /// Whether conditional puts were seen to work.
    probed: AtomicBool,
    /// How long to wait before a commit whose answer was lost is put again; each time twice as long.
    patience: Duration,
    /// Copies of objects that are read out of order.
    copies: Copies,
}

/// Local copies of objects, gone with the connection.
#[derive(Debug)]
struct Copies {
    spill: PathBuf,
    folder: OnceLock<tempfile::TempDir>,
    files: Mutex<std::collections::HashMap<Listed, PathBuf>>,
}

impl std::hash::Hash for Listed {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.path.hash(state);
    }
}

/// Where a bucket is tried.
pub(super) const PROBES: &str = "_floodmark/probe";

/// Bytes of one piece of an object that is read.
const PIECE_BYTES: usize = 16 << 20;

/// Bytes of one part of an upload, and how many parts are under way at a time: the first of these for which there is memory.
const UPLOADS: [(usize, usize); 3] = [(16 << 20, 4), (16 << 20, 2), (8 << 20, 2)];

/// The same where there is little memory: no part of S3 but the last one is smaller.
const LEAST_UPLOAD: (usize, usize) = (5 << 20, 1);

/// Bytes that an upload cannot do without.
const SMALL_UPLOAD: usize = LEAST_UPLOAD.0 * (LEAST_UPLOAD.1 + 1);

/// How often a commit whose answer was lost is put again, each time after a longer wait: for twelve seconds in all. What is staged
/// stays, and is not made again for a store that is busy.
const TRIES: u32 = 8;

impl Bucket {
    pub(super) fn new(
        store: Arc<dyn ObjectStore>,
        shown: String,
        credentials: &'static str,
        spill: PathBuf,
    ) -> Self {
        let copies = Copies { spill, folder: OnceLock::new(), files: Mutex::default() };
        let patience = Duration::from_millis(100);
        Self { store, shown, credentials, probed: AtomicBool::new(false), patience, copies }
    }

    /// The same, with another first wait.
    #[cfg(test)]
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    pub(super) fn store(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.store)
    }

    /// An error of the store as one for people.
    #[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
    pub(super) fn error(&self, doing: &str, path: &str, error: object_store::Error) -> Error {
        use object_store::Error as Store;
        let root = root_cause(&error);
        let said = format!("{error}: {root}");
        let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
        let what = format!("cannot {doing} `{path}` in `{}`", self.shown);
        let of = |kind| Error::new(kind, what.clone());
        if has(&["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"]) {
            return Error::configuration(format!("there is no bucket `{}`", self.shown))
                .hint("Mend `bucket` in connections.yaml, or create it.");
        }
        if matches!(error, Store::PermissionDenied { .. } | Store::Unauthenticated { .. })
            || has(&[
                "<Code>SignatureDoesNotMatch",
                "<Code>InvalidAccessKeyId",
                "<Code>AccessDenied",
                "<Code>ExpiredToken",
                "<Code>InvalidToken",
            ])
        {
            return of(ErrorKind::Configuration)
                .note(format!("access is refused{}", code_of(&said)))
                .hint(self.credentials);
        }
        if has(&["instance metadata", "169.254.169.254", "metadata.google.internal"]) {
            return of(ErrorKind::Configuration).note("no credentials are configured").hint(self.credentials);
        }
        let at_root = |words: &[&str]| words.iter().any(|word| root.contains(word));
        if at_root(&["Received redirect without LOCATION", "AuthorizationHeaderMalformed"])
            || has(&["<Code>AuthorizationHeaderMalformed", "redirect without LOCATION"])
        {
            return of(ErrorKind::Configuration)
                .note("the bucket is in another region")
                .hint("Set `region` in connections.yaml to the bucket's own.");
        }
        if at_root(&["dns error", "failed to lookup address"]) && !at_root(&["Temporary failure"]) {
            return of(ErrorKind::Configuration)
                .note("there is no host of that name")
                .hint("Mend `endpoint` or `region` in connections.yaml.");
        }
        if at_root(&["certificate", "UnknownIssuer"]) {
            return of(ErrorKind::Configuration).note("the server's certificate is not trusted").hint(
                "Use the name that the certificate has, and install the authority that signed it on this machine.",
            );
        }
        match error {
            Store::Precondition { .. } | Store::NotModified { .. } => {
                Error::temporary(format!("`{path}` changed while it was read"))
                    .hint("Run again once it has been delivered completely.")
            }
            Store::NotFound { .. } => {
                Error::configuration(format!("there is no `{path}` in `{}`", self.shown))
            }
            _ => of(ErrorKind::Temporary).note(crate::error::without_values(&root)).hint(
                "Is the store up, and is `endpoint` right? Run again: nothing of this run was published.",
            ),
        }
    }

    /// Sees that a conditional put is kept to: some stores accept the condition and ignore it.
    fn probe(&self) -> Result<()> {
        if self.probed.load(Ordering::Relaxed) {
            return Ok(());
        }
        let path = format!("{PROBES}/{}", uuid::Uuid::new_v4().simple());
        let failed = |error| self.error("write", PROBES, error);
        // One may be refused although nothing was there: the store was busy, or its library put again what it had no answer to.
        let mut accepted = 0;
        for content in [b"probe", b"again", b"third"] {
            accepted += u32::from(self.put_new(&path, content).map_err(failed)?);
        }
        wait(async { drop(self.store.delete(&object(&path)).await) });
        if accepted > 1 {
            return Err(Error::configuration(format!(
                "the store of `{}` ignores conditional puts, and two runs could publish the same release",
                self.shown
            ))
            .note("an object was put twice under `If-None-Match: *`, and both puts were answered with success")
            .hint("Use a store that keeps to conditional puts, such as S3 itself, or publish to another target."));
        }
        self.probed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Puts a small object, whatever has its name.
    pub(super) fn overwrite(&self, path: &str, content: &str) -> Result<()> {
        let payload = PutPayload::from(content.as_bytes().to_vec());
        wait(self.store.put(&object(path), payload))
            .map(drop)
            .map_err(|error| self.error("write", path, error))
    }

    /// Puts an object whose name nothing has. False if something has it.
    fn put_new(&self, path: &str, content: &[u8]) -> Result<bool, object_store::Error> {
        let options = PutOptions { mode: PutMode::Create, ..Default::default() };
        let payload = PutPayload::from(content.to_vec());
        match wait(self.store.put_opts(&object(path), payload, options)) {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// A copy of an object on this machine, made once.
    fn copy(&self, file: &Listed) -> Result<File> {
        let known = self.copies.files.lock().unwrap_or_else(PoisonError::into_inner).get(file).cloned();
        if let Some(path) = known {
            return File::open(&path).map_err(|error| Error::io("open", path.display(), error));
        }
        let spill = &self.copies.spill;
        let failed = |error| Error::io("write a copy into", spill.display(), error);
        if self.copies.folder.get().is_none() {
            fs::create_dir_all(spill).map_err(failed)?;
            let made = tempfile::Builder::new().prefix("objects-").tempdir_in(spill).map_err(failed)?;
            drop(self.copies.folder.set(made));
        }
        let folder = self.copies.folder.get().ok_or_else(|| Error::bug("no folder for copies"))?;
        let path = folder.path().join(uuid::Uuid::new_v4().simple().to_string());
        let mut copy = File::create_new(&path).map_err(failed)?;
        let mut object = self.read_from(file)?;
        let copied = io::copy(&mut object, &mut copy).map_err(|error| self.broken(file, &error))?;
        if file.is_not(copied) {
            return Err(Error::temporary(format!(
                "`{}` in `{}` has {} bytes, and {copied} came",
                file.path, self.shown, file.size
            ))
            .hint("Run again: nothing of this run was published."));
        }
        self.copies.files.lock().unwrap_or_else(PoisonError::into_inner).insert(file.clone(), path.clone());
        File::open(&path).map_err(failed)
    }

    fn broken(&self, file: &Listed, error: &io::Error) -> Error {
        Error::temporary(format!("`{}` in `{}` broke off", file.path, self.shown))
            .note(crate::error::without_values(&error.to_string()))
            .hint("Run again: nothing of this run was published.")
    }

    /// The bytes of an object, exactly of the listed version.
    fn read_from(&self, file: &Listed) -> Result<Box<dyn Read + Send>> {
        let path = object(&file.path);
        let failed = |error| self.error("read", &file.path, error);
        let there = wait(self.store.head(&path)).map_err(failed)?;
        let tag = Listed::of(there.clone(), true).version;
        if file.is_not(there.size) || file.version.is_some() && file.version != tag {
            return Err(Error::temporary(format!("`{}` changed while it was read", file.path))
                .hint("Run again once it has been delivered completely."));
        }
        Ok(Box::new(Ranges {
            store: self.store(),
            path,
            tag: tag.filter(|tag| tag.starts_with('"')),
            at: 0,
            size: there.size,
            piece: Bytes::new(),
        }))
    }
}

/// An object read in pieces: each is a request of its own, which is tried again by itself, however slowly the pieces are used.
struct Ranges {
    store: Arc<dyn ObjectStore>,
    path: object_store::path::Path,
    /// The version that every piece must be of.
    tag: Option<String>,
    at: u64,
    size: u64,
    piece: Bytes,
}

impl Read for Ranges {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() && self.at < self.size {
            let end = (self.at + PIECE_BYTES as u64).min(self.size);
            let options = GetOptions {
                range: Some(GetRange::Bounded(self.at..end)),
                if_match: self.tag.clone(),
                ..Default::default()
            };
            let get = async { self.store.get_opts(&self.path, options).await?.bytes().await };
            self.piece = wait(get).map_err(io::Error::other)?;
            if self.piece.len() as u64 != end - self.at {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "a piece of the object is shorter than asked for",
                ));
            }
            self.at = end;
        }
        let length = buffer.len().min(self.piece.len());
        let read = self.piece.split_to(length);
        if let Some(target) = buffer.get_mut(..length) {
            target.copy_from_slice(&read);
        }
        Ok(length)
    }
}

/// An error of reading or writing as one for people: underneath it may be a store's.
pub(super) fn io_error(doing: &str, path: &str, error: io::Error) -> Error {
    let Some(store) = error.get_ref().and_then(|inner| inner.downcast_ref::<object_store::Error>()) else {
        return Error::io(doing, path, error);
    };
    let kind = match store {
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            ErrorKind::Configuration
        }
        _ => ErrorKind::Temporary,
    };
    Error::new(kind, format!("cannot {doing} `{path}`"))
        .note(crate::error::without_values(&root_cause(store)))
        .hint("`floodmark connections test` tries the store. Run again: nothing of this run was published.")
}

/// What went wrong at the bottom: the layers above only repeat the request.
fn root_cause(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let said = cause.to_string();
    said.rsplit_once("HTTP error: ").map_or(said.clone(), |(_, last)| last.to_owned())
}

/// A path as the store takes it: names are kept as they are written where they can be.
fn object(path: &str) -> object_store::path::Path {
    object_store::path::Path::parse(path).unwrap_or_else(|_| path.into())
}

/// The code that a store's answer names, such as `NoSuchKey`.
fn code_of(said: &str) -> String {
    let code = said.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    code.map(|(code, _)| format!(": {code}")).unwrap_or_default()
}

/// Waits for what is asynchronous, on a thread that may block.
fn wait<T>(work: impl Future<Output = T>) -> T {
    Handle::current().block_on(work)
}

impl Place {
    /// Whether it is a bucket.
    pub(super) fn is_bucket(&self) -> bool {
        matches!(self, Self::Bucket(_))
    }

    /// Refuses a bucket that cannot fence.
    pub(super) fn probe(&self) -> Result<()> {
        match self {
            Self::Folder(_) => Ok(()),
            Self::Bucket(bucket) => bucket.probe(),
        }
    }

    /// Opens a file to read it from its start to its end.
    pub(super) fn reader(&self, file: &Listed) -> Result<Box<dyn Read + Send>> {
        match self {
            Self::Folder(_) => Ok(Box::new(self.open(file)?)),
            Self::Bucket(bucket) => bucket.read_from(file),
        }
    }

    /// Opens a file to read it out of order.
    pub(super) fn open(&self, file: &Listed) -> Result<File> {
        match self {
            Self::Folder(root) => {
                File::open(root.join(&file.path)).map_err(|error| Error::io("open", &file.path, error))
            }
            Self::Bucket(bucket) => bucket.copy(file),
        }
    }

    /// Size and time of the last change, as far as they could move while a file is read.
    pub(super) fn version(&self, file: &Listed) -> Result<(u64, Option<SystemTime>)> {
        match self {
            Self::Folder(root) => {
                let meta = root
                    .join(&file.path)
                    .metadata()
                    .map_err(|error| Error::io("look at", &file.path, error))?;
                Ok((meta.len(), meta.modified().ok()))
            }
            // Read under the condition that it is this one.
            Self::Bucket(_) => Ok((file.size, None)),
        }
    }

    /// A small file's content; `None` if it is not there.
    pub(super) fn read(&self, path: &str) -> Result<Option<String>> {
        match self {
            Self::Folder(root) => match fs::read_to_string(root.join(path)) {
                Ok(text) => Ok(Some(text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io("read", path, error)),
            },
            Self::Bucket(bucket) => {
                let read = wait(async { bucket.store.get(&object(path)).await?.bytes().await });
                match read {
                    Ok(bytes) => String::from_utf8(bytes.to_vec())
                        .map(Some)
                        .map_err(|_| Error::failed(format!("`{path}` is not UTF-8"))),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(bucket.error("read", path, error)),
                }
            }
        }
    }

    /// Whether a file that was written is still there, whole: nobody has taken it for garbage.
    pub(super) fn is_there(&self, file: &Listed) -> Result<bool> {
        let found = match self {
            Self::Folder(root) => match root.join(&file.path).metadata() {
                Ok(meta) => Some(meta.len()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(Error::io("look at", &file.path, error)),
            },
            Self::Bucket(bucket) => match wait(bucket.store.head(&object(&file.path))) {
                Ok(object) => Some(object.size),
                Err(object_store::Error::NotFound { .. }) => None,
                Err(error) => return Err(bucket.error("look at", &file.path, error)),
            },
        };
        Ok(found.is_some_and(|size| !file.is_not(size)))
    }

    /// Writes a small file, whole, only if nothing has its name. False if something else has.
    pub(super) fn create(&self, path: &str, content: &str) -> Result<bool> {
        let bucket = match self {
            Self::Folder(root) => return durable::write_new(&root.join(path), content.as_bytes()),
            Self::Bucket(bucket) => bucket,
        };
        let mut last = None;
        for again in 0..TRIES {
            match bucket.put_new(path, content.as_bytes()) {
                Ok(true) => return Ok(true),
                // The answer to an earlier try may have been lost; or the store was busy with another's put.
                Ok(false) => match self.read(path)? {
                    Some(there) => return Ok(there == content),
                    None => last = None,
                },
                Err(error @ object_store::Error::PermissionDenied { .. })
                | Err(error @ object_store::Error::Unauthenticated { .. }) => {
                    return Err(bucket.error("write", path, error));
                }
                Err(error) => last = Some(error),
            }
            if again + 1 < TRIES {
                std::thread::sleep(bucket.patience * 2_u32.pow(again));
            }
        }
        Err(match last {
            Some(error) => bucket.error("write", path, error),
            None => Error::busy(format!("`{path}` is being written by another run")).hint("Run again."),
        })
    }

    /// The names directly below a folder: of files and of folders, sorted.
    pub(super) fn names(&self, folder: &str) -> Result<(Vec<String>, Vec<String>)> {
        let (mut files, mut folders) = (Vec::new(), Vec::new());
        match self {
            Self::Folder(root) => {
                let listed = match fs::read_dir(root.join(folder)) {
                    Ok(listed) => listed,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((files, folders)),
                    Err(error) => return Err(Error::io("list", folder, error)),
                };
                for entry in listed {
                    let entry = entry.map_err(|error| Error::io("list", folder, error))?;
                    let name = entry.file_name().to_string_lossy().into_owned();
                    if entry.path().is_dir() { folders.push(name) } else { files.push(name) }
                }
            }
            Self::Bucket(bucket) => {
                let listed = wait(bucket.store.list_with_delimiter(Some(&object(folder))))
                    .map_err(|error| bucket.error("list", folder, error))?;
                let name = |path: &object_store::path::Path| path.filename().unwrap_or_default().to_owned();
                files.extend(listed.objects.iter().map(|object| name(&object.location)));
                folders.extend(listed.common_prefixes.iter().map(name));
            }
        }
        files.sort();
        folders.sort();
        Ok((files, folders))
    }

    /// Removes files that nobody lists. Best effort, also from where nothing may block: what stays is garbage.
    pub(super) fn remove(&self, paths: Vec<String>) {
        match self {
            Self::Folder(root) => {
                for path in paths {
                    drop(fs::remove_file(root.join(path)));
                }
            }
            Self::Bucket(bucket) => {
                let store = bucket.store();
                runtime::detached(async move {
                    for path in paths {
                        drop(store.delete(&object(&path)).await);
                    }
                });
            }
        }
    }

    /// Starts a large file. Nobody may have its name. What waits to be sent to a bucket is taken from the memory of `output`.
    pub(super) fn new_file(&self, path: &str, output: &Share) -> Result<Sink> {
        match self {
            Self::Folder(root) => NewFile::create(&root.join(path)).map(Sink::File),
            Self::Bucket(bucket) => {
                let memory = output.another();
                // One part is filled while the others are under way.
                let fits =
                    |(bytes, parts): &(usize, usize)| memory.wishes(bytes * (parts + 1) - SMALL_UPLOAD);
                let (bytes, parts) = UPLOADS.into_iter().find(fits).unwrap_or(LEAST_UPLOAD);
                let writer =
                    BufWriter::with_capacity(bucket.store(), object(path), bytes).with_max_concurrency(parts);
                Ok(Sink::Object(Box::new(Upload {
                    memory,
                    bridge: Some(SyncIoBridge::new(writer)),
                    written: 0,
                    store: bucket.store(),
                    path: path.to_owned(),
                })))
            }
        }
    }

    /// The folder itself, if it is one.
    pub(super) fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder(root) => Some(root),
            Self::Bucket(_) => None,
        }
    }
}

/// A large file under construction. Dropped before `finish`, it is not there.
pub(super) enum Sink {
    File(NewFile),
    Object(Box<Upload>),
}

/// An object under construction: one put if it is small, parts if it is not.
pub(super) struct Upload {
    memory: Share,
    bridge: Option<SyncIoBridge<BufWriter>>,
    written: u64,
    store: Arc<dyn ObjectStore>,
    path: String,
}

impl Sink {
    /// Makes the file whole, durable and named; returns its bytes.
    pub(super) fn finish(self) -> Result<u64> {
        match self {
            Self::File(file) => file.finish(),
            Self::Object(mut upload) => {
                // Once it was asked to end there is nothing left to abort.
                if let Some(mut bridge) = upload.bridge.take() {
                    bridge.shutdown().map_err(|error| io_error("write", &upload.path, error))?;
                }
                let there = wait(upload.store.head(&object(&upload.path)))
                    .map_err(|error| io_error("look at", &upload.path, io::Error::other(error)))?;
                if there.size != upload.written {
                    return Err(Error::failed(format!(
                        "`{}` has {} bytes in the store, and {} were written",
                        upload.path, there.size, upload.written
                    )));
                }
                Ok(upload.written)
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(buffer),
            Self::Object(upload) => {
                let bridge =
                    upload.bridge.as_mut().ok_or_else(|| io::Error::other("the object is finished"))?;
                match bridge.write(buffer) {
                    Ok(written) => {
                        upload.written += written as u64;
                        let buffered = usize::try_from(upload.written).unwrap_or(usize::MAX);
                        upload.memory.uses(buffered.min(SMALL_UPLOAD));
                        Ok(written)
                    }
                    Err(error) => {
                        // It cannot be asked again.
                        upload.abort();
                        Err(error)
                    }
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // What matters is made durable by `finish`.
        Ok(())
    }
}

impl Upload {
    /// Lets go of what was uploaded.
    fn abort(&mut self) {
        if let Some(bridge) = self.bridge.take() {
            let mut writer = bridge.into_inner();
            runtime::detached(async move { drop(writer.abort().await) });
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.abort();
    }
}
