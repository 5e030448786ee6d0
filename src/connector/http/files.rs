//! Files from a web server: fetched whole into the spill folder, then read as files of a folder are.
//!
//! A file is fetched once and read as it was then, however often a run looks at it. It is whole, or the run fails: a file cut short is
//! asked for again, one whose length the server does not tell is refused.
//!
//! Not done: lists of files, which a web server does not have; going on with a file where it was cut.

use std::{collections::HashMap, path::Path, sync::Arc};

use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, HeaderValue};
use tokio::sync::Mutex;

use super::{
    HttpConnection,
    client::{Answer, Ask, shown},
    source::first_of,
};
use crate::{
    connector::{
        Connection, Source, folder,
        spec::{ApiRequest, FormatKind, Read, StreamSpec},
    },
    error::{Error, Result},
};

/// Files that were fetched, by what was asked for.
#[derive(Debug, Default)]
pub(super) struct Files(Mutex<HashMap<blake3::Hash, Arc<Fetched>>>);

/// A file that was fetched. Gone when this is dropped.
#[derive(Debug)]
pub(super) struct Fetched {
    name: String,
    connection: Arc<dyn Connection>,
    _folder: tempfile::TempDir,
}

impl Fetched {
    /// Who reads it.
    pub(super) fn source(&self) -> Result<&dyn Source> {
        self.connection.source().ok_or_else(|| Error::bug("a folder cannot be read"))
    }

    /// The stream as a stream of that folder.
    pub(super) fn stream(&self, stream: &StreamSpec) -> StreamSpec {
        StreamSpec { read: Read::File(self.name.clone()), ..stream.clone() }
    }
}

/// The request for a file, if a stream is one: named by `file:`, or an answer whose format has a kind.
pub(super) fn request_for(stream: &StreamSpec) -> Result<Option<ApiRequest>> {
    let request = match &stream.read {
        // A dollar sign and a hash in it stand for themselves.
        Read::File(path) => {
            ApiRequest { path: path.replace('$', "$$").replace('#', "%23"), ..ApiRequest::default() }
        }
        Read::Request(request) if stream.format.as_ref().is_some_and(|format| format.kind.is_some()) => {
            request.as_ref().clone()
        }
        Read::Files { .. } => {
            return Err(Error::configuration(format!(
                "source `{}` reads files by a pattern, and a web server does not list what it has",
                stream.name
            ))
            .hint("Name one: `file: rates.csv`."));
        }
        _ => return Ok(None),
    };
    if stream.cursor.is_some() {
        return Err(Error::configuration(format!(
            "source `{}` reads a file, and a file is read whole",
            stream.name
        ))
        .hint("Remove `incremental`; a list in JSON can have a window, without `format: { kind: … }`."));
    }
    Ok(Some(request))
}

impl HttpConnection {
    /// The file that a stream is, fetched now or before.
    pub(super) async fn file(&self, stream: &StreamSpec, request: &ApiRequest) -> Result<Arc<Fetched>> {
        let mut ask = first_of(&self.api, stream, request, &(None, None))?;
        // As it is: what is unpacked on the way has no length any more.
        if !self.api.says_what_it_accepts() {
            ask.headers.entry(ACCEPT).or_insert(HeaderValue::from_static("*/*"));
        }
        ask.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let asked = fingerprint(&ask);
        // Who wants the same file waits, and reads the same copy.
        let mut files = self.files.0.lock().await;
        if let Some(known) = files.get(&asked) {
            return Ok(Arc::clone(known));
        }
        let fetched = Arc::new(self.fetched(&ask, stream).await?);
        files.insert(asked, Arc::clone(&fetched));
        Ok(fetched)
    }

    async fn fetched(&self, ask: &Ask, stream: &StreamSpec) -> Result<Fetched> {
        let spill = &self.limits.spill;
        let made = std::fs::create_dir_all(spill).and_then(|()| tempfile::tempdir_in(spill));
        let copies = made.map_err(|error| Error::io("write a copy into", spill.display(), error))?;
        let arriving = copies.path().join("arriving");
        let answer = self.api.fetch(ask, &arriving).await?;
        let declared = stream.format.as_ref().and_then(|format| format.kind);
        let name = name_of(ask, &answer, declared);
        let file = copies.path().join(&name);
        std::fs::rename(&arriving, &file).map_err(|error| Error::io("name", file.display(), error))?;
        let connection = folder(&self.api.name, &shown(&answer.url), copies.path().to_owned());
        Ok(Fetched { name, connection, _folder: copies })
    }
}

/// Tells requests apart by all that is asked, and holds none of it.
fn fingerprint(ask: &Ask) -> blake3::Hash {
    let mut hash = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(format!("{:?}", ask.method).as_bytes());
    part(ask.url.as_str().as_bytes());
    part(ask.body.as_deref().unwrap_or_default().as_bytes());
    for (name, value) in &ask.headers {
        part(name.as_str().as_bytes());
        part(value.as_bytes());
    }
    hash.finalize()
}

/// What the file is called: as in its URL, with an ending that tells its format if the server does.
fn name_of(ask: &Ask, answer: &Answer, declared: Option<FormatKind>) -> String {
    let last = ask.url.path_segments().and_then(|mut segments| segments.next_back()).unwrap_or_default();
    let last = percent_encoding::percent_decode_str(last).decode_utf8_lossy();
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ' ');
    let name: String = last.chars().filter(|c| plain(*c)).collect();
    let name = name.trim_matches(['.', ' ']);
    let name = if name.is_empty() { "answer" } else { name };
    if declared.is_some() || Path::new(name).extension().is_some() {
        return name.to_owned();
    }
    let kind = answer.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let ending = match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "text/csv" | "application/csv" => ".csv",
        "text/tab-separated-values" => ".tsv",
        "application/json" => ".json",
        "application/x-ndjson" | "application/jsonl" | "application/x-jsonlines" => ".jsonl",
        "application/vnd.apache.parquet" => ".parquet",
        _ => "",
    };
    format!("{name}{ending}")
}
