//! A scripted HTTP server: answers what a test says, byte by byte, and closes.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET` or `POST`.
    pub method: String,
    /// Without its query.
    pub path: String,
    /// The query, decoded.
    pub query: BTreeMap<String, String>,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

/// A server on the loopback, gone with the process.
#[derive(Debug)]
pub struct Web {
    /// Where it answers, unencrypted.
    pub url: String,
    /// What it was asked, in order.
    pub asked: Arc<Mutex<Vec<Asked>>>,
}

impl Web {
    /// A server that answers with the bytes that `answer` gives, the status line first.
    pub fn new(answer: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (answer, asked) = (Arc::new(answer), Arc::new(Mutex::new(Vec::new())));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, answer, log) = (stream.unwrap(), Arc::clone(&answer), Arc::clone(&log));
                std::thread::spawn(move || {
                    let Some(asked) = read(&mut BufReader::new(&stream)) else { return };
                    log.lock().unwrap().push(asked.clone());
                    // Who has gone away does not want the answer.
                    let _gone = stream.write_all(&answer(&asked));
                });
            }
        });
        Self { url, asked }
    }

    /// How many requests came.
    pub fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn read(stream: &mut impl BufRead) -> Option<Asked> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let url = url::Url::parse("http://x").unwrap().join(&target).unwrap();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Asked {
        method,
        path: url.path().to_owned(),
        query: url.query_pairs().map(|(name, value)| (name.into_owned(), value.into_owned())).collect(),
        headers,
        body: String::from_utf8(body).unwrap(),
    })
}

/// An answer with a status, headers (`Name: value`, one a line) and a body of known length.
pub fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let headers: String = headers.lines().map(|line| format!("{}\r\n", line.trim())).collect();
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
        .into_bytes()
}

/// A JSON document with status 200.
pub fn json(body: &str) -> Vec<u8> {
    answer("200 OK", "Content-Type: application/json", body)
}

/// A server that speaks TLS with a certificate that nobody signed.
#[derive(Debug)]
pub struct SelfSigned {
    /// Where it answers.
    pub url: String,
    server: std::process::Child,
}

impl SelfSigned {
    /// Starts it.
    pub fn new() -> Self {
        use std::process::{Command, Stdio};
        let folder = tempfile::tempdir().unwrap();
        let (key, certificate) = (folder.path().join("key.pem"), folder.path().join("cert.pem"));
        let made = Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-subj",
                "/CN=localhost",
            ])
            .args(["-addext", "subjectAltName=DNS:localhost", "-days", "30"])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate)
            .output()
            .unwrap();
        assert!(made.status.success());
        let mut server = Command::new("openssl")
            .args(["s_server", "-accept", "127.0.0.1:0", "-www"])
            .arg("-key")
            .arg(&key)
            .arg("-cert")
            .arg(&certificate)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut told = BufReader::new(server.stdout.take().unwrap()).lines();
        let port = told
            .find_map(|line| line.unwrap().strip_prefix("ACCEPT ")?.rsplit(':').next().map(str::to_owned));
        // It goes on telling, and nobody needs to listen.
        std::thread::spawn(move || told.for_each(drop));
        Self { url: format!("https://localhost:{}", port.unwrap()), server }
    }
}

impl Drop for SelfSigned {
    fn drop(&mut self) {
        let _ended = self.server.kill();
        let _waited = self.server.wait();
    }
}
