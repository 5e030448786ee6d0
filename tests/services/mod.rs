//! Real servers for tests: started once by the scripts beside this file, shared by all tests, each in a schema or database of its own.

use std::{
    path::Path,
    process::Command,
    sync::{Arc, OnceLock},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use postgres::{Client, NoTls};

pub mod proxy;
pub mod web;

/// The PostgreSQL server that tests share.
#[derive(Debug)]
pub struct Postgres {
    /// Its port on the loopback.
    pub port: u16,
    /// The password of its administrator, `admin`.
    pub password: String,
    /// The file of the authority that signed its certificate, which names `localhost`.
    pub authority: String,
}

/// What the script `name` prints: the server that it started, or found.
fn service<const N: usize>(name: &str, arguments: &[&str]) -> [String; N] {
    // From where cargo starts tests and benchmarks, not where they were built: several checkouts may share a target folder.
    let script = Path::new("tests/services").join(name);
    let output = Command::new(script).args(arguments).output().unwrap();
    assert!(output.status.success(), "no {name}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect::<Vec<_>>().try_into().unwrap()
}

/// Whether a process stands still; `None` if it is gone.
pub fn is_stopped(process: u32) -> Option<bool> {
    let about = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // Its state stands behind its name, which is in brackets.
    Some(about.rsplit(')').next().is_some_and(|state| state.trim_start().starts_with('T')))
}

/// The library that lets a process die, or its disk be full, at its nth call to the outside: see `faults.c`.
pub fn faults() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, std::path::PathBuf)> = OnceLock::new();
    let (_, library) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("faults.so");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(&library)
            .arg("tests/services/faults.c")
            .arg("-ldl")
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        (folder, library)
    });
    library
}

/// The server, started if it does not run yet.
pub fn postgres() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| {
        let [port, password, authority] = service("postgres", &[]);
        Postgres { port: port.parse().unwrap(), password, authority }
    })
}

/// A server that one test has for itself, by a name of its own.
pub fn private_postgres(name: &str) -> &'static Postgres {
    let [port, password, authority] = service("postgres", &[name]);
    Box::leak(Box::new(Postgres { port: port.parse().unwrap(), password, authority }))
}

/// The port of the PgBouncer before the server that tests share: its database `postgres` is pooled by transactions, `whole` is the same by sessions.
pub fn pgbouncer() -> u16 {
    let [port] = service("pgbouncer", &[]);
    port.parse().unwrap()
}

/// The S3 server that tests share, with its bucket `floodmark`.
#[derive(Debug)]
pub struct S3 {
    /// Where it answers, unencrypted.
    pub endpoint: String,
    /// The administrator's key and secret.
    pub admin: (String, String),
    /// Those of a user who may only read.
    pub reader: (String, String),
}

/// The server, started if it does not run yet.
pub fn s3() -> &'static S3 {
    static SERVER: OnceLock<S3> = OnceLock::new();
    SERVER.get_or_init(|| {
        let [port, key, secret, reader, reader_secret] = service("s3", &[]);
        S3 {
            endpoint: format!("http://127.0.0.1:{port}"),
            admin: (key, secret),
            reader: (reader, reader_secret),
        }
    })
}

impl S3 {
    /// The options of a connection to a prefix of the bucket.
    pub fn options(&self, prefix: &str) -> serde_json::Value {
        let (key, secret) = &self.admin;
        serde_json::json!({
            "bucket": "floodmark", "prefix": prefix, "endpoint": self.endpoint, "allow_http": true, "region": "us-east-1",
            "access_key_id": key, "secret_access_key": secret, "retry_timeout_ms": 2000,
        })
    }

    /// A prefix that nobody else uses.
    pub fn prefix() -> String {
        format!("t-{}", uuid::Uuid::now_v7().simple())
    }

    /// What lies below a prefix, as another program sees it.
    pub fn store(&self, prefix: &str) -> Arc<dyn object_store::ObjectStore> {
        let (key, secret) = &self.admin;
        let store = object_store::aws::AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name("floodmark")
            .with_access_key_id(key)
            .with_secret_access_key(secret)
            .build()
            .unwrap();
        Arc::new(object_store::prefix::PrefixStore::new(store, prefix))
    }

    /// Puts an object below a prefix, as another program would.
    pub fn put(&self, prefix: &str, path: &str, bytes: &[u8]) {
        let (store, bytes) = (self.store(prefix), bytes.to_vec());
        std::thread::scope(|scope| {
            let put = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let path = path.into();
                let put = object_store::ObjectStoreExt::put(&store, &path, bytes.into());
                runtime.block_on(put).unwrap();
            };
            scope.spawn(put).join().unwrap();
        });
    }
}

impl Postgres {
    /// Stops it at once, as if its machine had lost it, and starts it again on the same port.
    pub fn restart(&self) {
        self.control("immediate");
    }

    /// From now on it is a copy of a primary that it has lost: it can be read, and nobody can write to it.
    pub fn become_standby(&self) {
        std::fs::write(self.home().join("data/standby.signal"), "").unwrap();
        self.control("fast");
    }

    /// It is a primary again, if it was not.
    pub fn become_primary(&self) {
        let promote = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_promote() ELSE true END";
        assert!(self.admin("postgres", |client| client.query_one(promote, &[]).unwrap().get::<_, bool>(0)));
    }

    /// Stops all of its processes where they are, until the answer is dropped.
    pub fn stand_still(&self) -> StandingStill<'_> {
        self.signal(Signal::SIGSTOP);
        StandingStill(self)
    }

    fn signal(&self, signal: Signal) {
        let first = std::fs::read_to_string(self.home().join("data/postmaster.pid")).unwrap();
        let first: i32 = first.lines().next().unwrap().parse().unwrap();
        // It first, so that it starts no others meanwhile.
        kill(Pid::from_raw(first), signal).unwrap();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
            // Behind the name come the state and the parent.
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
            if parent == Some(first) {
                let process = process.file_name().to_string_lossy().parse().unwrap();
                let _ended_already = kill(Pid::from_raw(process), signal);
            }
        }
    }

    fn home(&self) -> &Path {
        Path::new(&self.authority).parent().unwrap()
    }

    /// Stops it, in this manner, and starts it again.
    fn control(&self, manner: &str) {
        let (home, data) = (self.home(), self.home().join("data"));
        let bin = std::fs::read_to_string(home.join("bin")).unwrap();
        let program = format!("{}/pg_ctl", bin.trim());
        let mut command = match std::fs::metadata("/proc/self").unwrap() {
            // The server refuses root: it runs as its own user.
            this if std::os::unix::fs::MetadataExt::uid(&this) == 0 => {
                let mut command = Command::new("runuser");
                command.args(["-u", "postgres", "--"]).arg(program);
                command
            }
            _ => Command::new(program),
        };
        command.arg("-D").arg(&data).args(["-w", "-t", "60", "-m", manner, "-l"]);
        let done = command.arg(data.join("server.log")).arg("restart").output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Does something in a session of the administrator, also for a test that is asynchronous itself.
    pub fn admin<T: Send>(&self, database: &str, work: impl FnOnce(&mut Client) -> T + Send) -> T {
        let options = format!(
            "host=127.0.0.1 port={} user=admin password={} dbname={database}",
            self.port, self.password
        );
        std::thread::scope(|scope| {
            scope.spawn(|| work(&mut Client::connect(&options, NoTls).unwrap())).join().unwrap()
        })
    }
}

/// A server that stands still.
#[derive(Debug)]
pub struct StandingStill<'a>(&'a Postgres);

impl Drop for StandingStill<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::SIGCONT);
    }
}

/// A schema of its own, gone when it is dropped.
#[derive(Debug)]
pub struct Schema {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub server: &'static Postgres,
}

impl Schema {
    /// A new, empty one in the database `postgres`.
    pub fn new() -> Self {
        Self::at(postgres())
    }

    /// The same on another server.
    pub fn at(server: &'static Postgres) -> Self {
        let name = format!("t_{}", uuid::Uuid::now_v7().simple());
        let create = format!("CREATE SCHEMA {name}");
        server.admin("postgres", |client| client.batch_execute(&create).unwrap());
        Self { name, server }
    }

    /// Runs statements in it.
    pub fn execute(&self, sql: &str) {
        self.with(|client| client.batch_execute(sql).unwrap());
    }

    /// Does something in a session there.
    pub fn with<T: Send>(&self, work: impl FnOnce(&mut Client) -> T + Send) -> T {
        self.server.admin("postgres", |client| {
            client.batch_execute(&format!("SET search_path = {}, public", self.name)).unwrap();
            work(client)
        })
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        let drop = format!("SET lock_timeout = '2s'; DROP SCHEMA {} CASCADE", self.name);
        // A test that failed may still hold locks there.
        let _left_behind = self.server.admin("postgres", |client| client.batch_execute(&drop));
    }
}
