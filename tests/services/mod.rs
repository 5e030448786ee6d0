//! Real servers for tests: started once by the scripts beside this file, shared by all tests, each in a schema or database of its own.

use std::{path::Path, process::Command, sync::OnceLock};

use postgres::{Client, NoTls};

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

/// The server, started if it does not run yet.
pub fn postgres() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/services/postgres");
        let output = Command::new(script).output().unwrap();
        assert!(output.status.success(), "no PostgreSQL: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines();
        Postgres {
            port: lines.next().unwrap().parse().unwrap(),
            password: lines.next().unwrap().to_owned(),
            authority: lines.next().unwrap().to_owned(),
        }
    })
}

impl Postgres {
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

/// A schema of its own, gone when it is dropped.
#[derive(Debug)]
pub struct Schema {
    /// Its name.
    pub name: String,
}

impl Schema {
    /// A new, empty one in the database `postgres`.
    pub fn new() -> Self {
        let name = format!("t_{}", uuid::Uuid::now_v7().simple());
        let create = format!("CREATE SCHEMA {name}");
        postgres().admin("postgres", |client| client.batch_execute(&create).unwrap());
        Self { name }
    }

    /// Runs statements in it.
    pub fn execute(&self, sql: &str) {
        self.with(|client| client.batch_execute(sql).unwrap());
    }

    /// Does something in a session there.
    pub fn with<T: Send>(&self, work: impl FnOnce(&mut Client) -> T + Send) -> T {
        postgres().admin("postgres", |client| {
            client.batch_execute(&format!("SET search_path = {}, public", self.name)).unwrap();
            work(client)
        })
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        let drop = format!("SET lock_timeout = '2s'; DROP SCHEMA {} CASCADE", self.name);
        // A test that failed may still hold locks there.
        let _left_behind = postgres().admin("postgres", |client| client.batch_execute(&drop));
    }
}
