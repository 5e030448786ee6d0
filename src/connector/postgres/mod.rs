//! PostgreSQL 13 and later: tables, views and queries in; tables out.
//!
//! Promised: one exported snapshot for all streams of a run, every type decoded exactly or refused, windows whose end no open
//! transaction can slip under, and rows and record in one transaction; also through a pooler that gives each transaction another session.
//! Not done: replication slots, large objects, GSSAPI, servers without binary COPY.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::{
    FutureExt,
    future::{BoxFuture, pending},
};
use schemars::JsonSchema;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio_postgres::{
    Client, Config, NoTls,
    config::{SslMode, SslNegotiation},
    error::SqlState,
    types::{ToSql, Type},
};
use url::Url;

use self::frames::{Diverting, Next, Plain};
use super::{CatalogTable, Connection, Connector, Identity, Source, Target};
use crate::{
    error::{Error, ErrorKind, Result, without_values},
    runtime::{self, TaskGuard},
};

mod bounds;
mod decode;
mod encode;
mod filter;
mod frames;
mod keys;
#[cfg(test)]
mod late;
mod source;
mod target;
#[cfg(test)]
mod tests;
mod tls;
mod types;

/// The line that [`super::CONNECTORS`] holds.
pub static CONNECTOR: Connector = Connector {
    name: "postgres",
    summary: "a PostgreSQL database: tables, views and queries in; tables out",
    options: || schemars::schema_for!(PostgresOptions),
    credentials: &[],
    schemes: &["postgres", "postgresql"],
    variables: &[
        ("PGHOST", "host"),
        ("PGPORT", "port"),
        ("PGDATABASE", "database"),
        ("PGUSER", "user"),
        ("PGPASSWORD", "password"),
        ("PGSSLMODE", "sslmode"),
        ("PGSSLROOTCERT", "sslrootcert"),
    ],
    from_url,
    open: |options| {
        let parsed: PostgresOptions = options.parse()?;
        let connection = PostgresConnection {
            name: options.name,
            base: options.base,
            options: parsed,
            is_silent: AtomicBool::new(false),
            is_pooled: AtomicBool::new(false),
            heard: AtomicU64::new(0),
            look: tokio::sync::Mutex::default(),
            idle: Mutex::default(),
        };
        connection.config()?;
        Ok(Arc::new(Arc::new(connection)))
    },
};

/// A PostgreSQL database. What is not set is taken from libpq's variables (`PGHOST`, `PGPORT`, `PGDATABASE`, `PGUSER`,
/// `PGPASSWORD`, `PGSSLMODE`, `PGSSLROOTCERT`).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PostgresOptions {
    /// The server's name or address, or the folder of its socket. Unless set, `localhost`.
    host: Option<String>,
    /// Its port. Unless set, 5432.
    port: Option<u16>,
    /// The database. Unless set, the user's name.
    database: Option<String>,
    /// The user.
    user: Option<String>,
    /// The password, as a reference: `${env:ERP_PASSWORD}`.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    password: Option<SecretString>,
    /// How the server is trusted. Unless set, `verify-full`; on a socket, `disable`.
    sslmode: Option<TlsMode>,
    /// A PEM file of certificate authorities to trust instead of the system's, relative to the project's folder.
    sslrootcert: Option<String>,
    /// The schema of tables that are named without one. Unless set, the user's own search path decides.
    schema: Option<String>,
    /// How long to wait for a lock that others hold, in milliseconds. Unless set, 30000.
    lock_timeout_ms: Option<u32>,
    /// How long to wait for the server to answer a connection, in milliseconds. Unless set, 10000.
    connect_timeout_ms: Option<u32>,
    /// After how long in which nothing came it is looked, again and again, whether the server answers anybody, in milliseconds, of which 10 are the least.
    /// Unless set, 60000. One that does not three times in a row is given up; a query may take as long as it likes.
    silence_ms: Option<u32>,
    /// How far behind the server's clock the end of a window stays, in milliseconds. Unless set, 5000.
    bound_margin_ms: Option<u32>,
    /// How many sessions read a table of 32 MiB or more, all in one snapshot, when the server reads all of it; their rows come in no order.
    /// Unless set, 2; and 1 where the rows are copied into a database, which takes them in one stream.
    readers: Option<u8>,
}

/// How the server is trusted, in libpq's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum TlsMode {
    /// Encrypted; the certificate is signed by a trusted authority and names this host.
    VerifyFull,
    /// Encrypted; whoever answers is believed.
    Require,
    /// Not encrypted.
    Disable,
}

/// The options that `postgres://user:password@host:port/database` stands for.
fn from_url(url: &Url) -> Result<serde_json::Map<String, serde_json::Value>> {
    let mut options = serde_json::Map::new();
    let decoded = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8()
            .map(std::borrow::Cow::into_owned)
            .map_err(|_| Error::configuration("a part of this URL is not UTF-8"))
    };
    let mut set = |name: &str, value: serde_json::Value| options.insert(name.to_owned(), value);
    if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
        set("host", decoded(host)?.trim_matches(['[', ']']).into());
    }
    if let Some(port) = url.port() {
        set("port", port.into());
    }
    if !url.username().is_empty() {
        set("user", decoded(url.username())?.into());
    }
    if let Some(password) = url.password() {
        set("password", decoded(password)?.into());
    }
    let database = decoded(url.path().trim_start_matches('/'))?;
    if !database.is_empty() {
        set("database", database.into());
    }
    Ok(options)
}

/// One database.
struct PostgresConnection {
    name: String,
    base: PathBuf,
    options: PostgresOptions,
    /// Whether a session was given up because the server answered nobody any more.
    is_silent: AtomicBool,
    /// Whether a pooler is at the other end of its newest session, and not the server itself.
    is_pooled: AtomicBool,
    /// Counts what came to sessions, and what was taken from them.
    heard: AtomicU64,
    /// When it was last looked whether the server answers, and whether it did.
    look: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// A session that has nothing to do: the next step takes it instead of a new one.
    idle: Mutex<Option<Idle>>,
}

impl fmt::Debug for PostgresConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConnection").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A session with the server. Dropping it closes the connection, and what the server still does for it ends.
struct Session {
    client: Client,
    /// Where the rows of its next COPY go; none where the library opened the connection.
    next_rows: Option<Next>,
    _driver: TaskGuard,
}

/// A session that has nothing to do.
struct Idle {
    session: Session,
    /// Ends it before long.
    _end: TaskGuard,
}

impl std::ops::Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// A connection, what drives it, and where its rows go.
type Opened = (Client, BoxFuture<'static, ()>, Option<Next>);

/// Why there is none.
enum Unopened {
    /// Nobody said anything in time.
    NoAnswer,
    /// The server, the network or the library refused.
    Failed(tokio_postgres::Error),
}

/// What a statement is given, and of which type: nothing is prepared, so that it is asked and answered at once, and a pooler keeps nothing of it for others.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Texts as a statement's parameters.
fn texts<T: ToSql + Sync, const N: usize>(texts: [&T; N]) -> [Parameter<'_>; N] {
    texts.map(|text| -> Parameter<'_> { (text, Type::TEXT) })
}

/// How long a session waits for the next step: a server has few.
const IDLE: Duration = Duration::from_secs(5);

/// What every transaction sets: values as our decoder knows them, and no time-out but our own; a machine of ours that has vanished
/// holds its locks for a minute and no longer.
const SETTINGS: &str = "SET LOCAL datestyle = 'ISO'; SET LOCAL intervalstyle = 'iso_8601'; SET LOCAL timezone = 'UTC';
    SET LOCAL extra_float_digits = 3; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0;
    SET LOCAL jit = off; SET LOCAL bytea_output = 'hex'; SET LOCAL standard_conforming_strings = on;
    SET LOCAL tcp_keepalives_idle = 30; SET LOCAL tcp_keepalives_interval = 10; SET LOCAL tcp_keepalives_count = 3;";

impl PostgresConnection {
    fn host(&self) -> &str {
        self.options.host.as_deref().unwrap_or("localhost")
    }

    fn is_socket(&self) -> bool {
        self.host().starts_with('/')
    }

    fn tls(&self) -> TlsMode {
        let default = if self.is_socket() { TlsMode::Disable } else { TlsMode::VerifyFull };
        self.options.sslmode.unwrap_or(default)
    }

    /// Whether the library opens the connection without asking us: then its rows go through the library.
    fn is_bare(&self) -> bool {
        self.is_socket() && self.tls() == TlsMode::Disable
    }

    /// Where it is, without secrets.
    fn place(&self) -> String {
        let database = self.options.database.as_deref().or(self.options.user.as_deref()).unwrap_or_default();
        format!("{}:{}/{database}", self.host(), self.options.port.unwrap_or(5432))
    }

    fn config(&self) -> Result<Config> {
        let options = &self.options;
        let user = options.user.as_deref().ok_or_else(|| {
            Error::configuration(format!("connection `{}` needs a `user`", self.name))
                .hint("Set `user` in connections.yaml, or PGUSER in the environment.")
        })?;
        let mut config = Config::new();
        config
            .host(self.host())
            .port(options.port.unwrap_or(5432))
            .user(user)
            .dbname(options.database.as_deref().unwrap_or(user))
            .application_name("floodmark")
            .connect_timeout(self.patience())
            .keepalives_idle(Duration::from_secs(30))
            .tcp_user_timeout(Duration::from_secs(60))
            .ssl_mode(if self.is_bare() { SslMode::Disable } else { SslMode::Require });
        if self.tls() == TlsMode::Disable {
            // Nothing is negotiated: the socket is taken as it is.
            config.ssl_negotiation(SslNegotiation::Direct);
        }
        if let Some(password) = &options.password {
            config.password(password.expose_secret());
        }
        Ok(config)
    }

    /// Opens a connection, which whoever keeps the client drives.
    async fn open(&self) -> Result<std::result::Result<Opened, Unopened>> {
        let config = self.config()?;
        let next = Next::default();
        match self.tls() {
            TlsMode::Disable if self.is_bare() => Ok(self.in_time(config.connect(NoTls), None).await),
            TlsMode::Disable => {
                let plain = Plain(next.clone());
                Ok(self.in_time(config.connect(plain), Some(next)).await)
            }
            mode => {
                let roots = self.options.sslrootcert.as_ref().map(|path| self.base.join(path));
                let tls = tls::connector(mode == TlsMode::VerifyFull, roots.as_deref()).map_err(|error| {
                    error.while_doing(format!("connection `{}`: cannot prepare TLS", self.name))
                })?;
                let diverting = Diverting(tls, next.clone());
                Ok(self.in_time(config.connect(diverting), Some(next)).await)
            }
        }
    }

    /// Waits until the server answers nobody any more: nothing came to any session, and three new ones in a row had no answer.
    async fn until_silent(this: Weak<Self>, every: Duration) {
        let (mut unanswered, mut heard) = (0, 0);
        loop {
            runtime::sleep(every).await;
            // Whoever has no connection any more waits for nothing.
            let Some(this) = this.upgrade() else { return pending().await };
            let by_now = this.heard.load(Ordering::Relaxed);
            let answered = by_now != heard || this.answers(every).await;
            (unanswered, heard) = (if answered { 0 } else { unanswered + 1 }, by_now);
            if unanswered == 3 {
                return this.is_silent.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether the server answers anybody. All sessions share one look in that time.
    async fn answers(&self, every: Duration) -> bool {
        let mut look = self.look.lock().await;
        if let Some((when, answered)) = *look
            && when.elapsed() < every / 2
        {
            return answered;
        }
        let answered = match self.open().await {
            Ok(Err(Unopened::NoAnswer)) => false,
            // Who is sent away has been answered.
            Ok(Err(Unopened::Failed(error))) => !is_unanswered(&error),
            Ok(Ok(_)) | Err(_) => true,
        };
        *look = Some((Instant::now(), answered));
        answered
    }

    /// Says that something came, or was taken.
    fn heard(&self) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }

    /// A new session. It ends when the server is found to answer nobody any more: what waits for it is told that the connection is lost.
    async fn connect(self: &Arc<Self>) -> Result<Session> {
        let (client, driver, next_rows) = self.open().await?.map_err(|why| self.unreachable(&why))?;
        self.is_silent.store(false, Ordering::Relaxed);
        let every = Duration::from_millis(self.options.silence_ms.unwrap_or(60_000).max(10).into());
        let silent = Self::until_silent(Arc::downgrade(self), every);
        let driver = runtime::spawn(async move {
            tokio::select! {
                () = driver => {}
                () = silent => {}
            }
        });
        // A server that learns of it within a second does not go on working for nobody. Newer ones also end transactions that take long. What a pooler has is not
        // ours alone: there each transaction says so.
        let told = match &next_rows {
            Some(next) => next.process().to_string(),
            None => "pg_backend_pid()".to_owned(),
        };
        let watch = format!(
            "SELECT pg_backend_pid() = {told},
                CASE WHEN pg_backend_pid() = {told} AND version >= 140000 THEN set_config('client_connection_check_interval', '1s', false) END,
                CASE WHEN pg_backend_pid() = {told} AND version >= 170000 THEN set_config('transaction_timeout', '0', false) END
             FROM CAST(current_setting('server_version_num') AS int) AS version"
        );
        let session = Session { client, next_rows, _driver: driver };
        let row = session.query_typed_one(&watch, &[]).await.map_err(|error| self.error("set up", &error))?;
        self.is_pooled.store(!row.get::<_, bool>(0), Ordering::Relaxed);
        Ok(session)
    }

    /// What connecting comes to: a server that takes a connection and then says nothing is not waited for.
    async fn in_time<S, T>(
        &self,
        connecting: impl Future<
            Output = std::result::Result<(Client, tokio_postgres::Connection<S, T>), tokio_postgres::Error>,
        >,
        next_rows: Option<Next>,
    ) -> std::result::Result<Opened, Unopened>
    where
        tokio_postgres::Connection<S, T>: Future + Send + 'static,
    {
        // Each address of the host has its own time; and the server is to say who it is, too.
        match runtime::within(self.patience() * 2, connecting).await {
            Some(Ok((client, driver))) => Ok((client, driver.map(drop).boxed(), next_rows)),
            Some(Err(error)) => Err(Unopened::Failed(error)),
            None => Err(Unopened::NoAnswer),
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.options.connect_timeout_ms.unwrap_or(10_000).into())
    }

    /// A session inside a transaction, set up to read or to write.
    async fn transaction(self: &Arc<Self>, how: &str) -> Result<Session> {
        let doing = "begin a transaction in";
        let session = self.after(doing, &format!("BEGIN {how}; {}", self.settings()?)).await?;
        self.take_over(&session).await.map_err(|error| self.error(doing, &error))?;
        Ok(session)
    }

    /// Makes a pooler's session ours for this transaction, or leaves nothing of ours to the next one: what was prepared there under the names that the library gives
    /// in every process is let go. A pooler that looks after what its clients prepare has names of its own, which stay.
    async fn take_over(&self, session: &Session) -> std::result::Result<(), tokio_postgres::Error> {
        if !self.is_pooled() {
            return Ok(());
        }
        let sql = "SELECT (SELECT string_agg('DEALLOCATE ' || quote_ident(name), ';') FROM pg_prepared_statements WHERE name ~ '^s[0-9]+$'),
                CASE WHEN version >= 140000 THEN set_config('client_connection_check_interval', '1s', true) END,
                CASE WHEN version >= 170000 THEN set_config('transaction_timeout', '0', true) END
             FROM CAST(current_setting('server_version_num') AS int) AS version";
        let row = session.query_typed_one(sql, &[]).await?;
        match row.get::<_, Option<&str>>(0) {
            Some(others) => session.batch_execute(others).await,
            None => Ok(()),
        }
    }

    fn is_pooled(&self) -> bool {
        self.is_pooled.load(Ordering::Relaxed)
    }

    /// A session in which `begin` was said, to do something: the idle one, or where there is none, or it is not well any more, a new one.
    async fn after(self: &Arc<Self>, doing: &str, begin: &str) -> Result<Session> {
        let idle = self.idle().take();
        if let Some(Idle { session, _end }) = idle
            && let Some(Ok(())) = runtime::within(self.patience(), session.batch_execute(begin)).await
        {
            return Ok(session);
        }
        let session = self.connect().await?;
        session.batch_execute(begin).await.map_err(|error| self.error(doing, &error))?;
        Ok(session)
    }

    /// Ends what a session has read, and leaves it to the next step.
    async fn rest(self: &Arc<Self>, session: Session) {
        // Nothing of ours stays in a pooler's session; and what the library remembers of it is not true of the next one.
        let is_clean = self.take_over(&session).await.is_ok();
        let is_over = is_clean && session.batch_execute("ROLLBACK").await.is_ok();
        if !is_over || self.is_pooled() {
            return;
        }
        let this = Arc::downgrade(self);
        let end = runtime::spawn(async move {
            runtime::sleep(IDLE).await;
            if let Some(this) = this.upgrade() {
                this.idle().take();
            }
        });
        *self.idle() = Some(Idle { session, _end: end });
    }

    fn idle(&self) -> MutexGuard<'_, Option<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What every transaction sets.
    fn settings(&self) -> Result<String> {
        let wait = self.options.lock_timeout_ms.unwrap_or(30_000);
        let path = match &self.options.schema {
            Some(schema) => format!("SET LOCAL search_path = {};", crate::names::quoted(schema)?),
            None => String::new(),
        };
        Ok(format!("{SETTINGS} SET LOCAL lock_timeout = {wait}; {path}"))
    }

    /// Why no session came about.
    fn unreachable(&self, why: &Unopened) -> Error {
        let Unopened::Failed(error) = why else {
            return Error::temporary(format!(
                "connection `{}`: `{}` takes connections and says nothing",
                self.name,
                self.place()
            ))
            .hint("Is it a PostgreSQL server, and well? `connect_timeout_ms` says how long to wait.");
        };
        if error.as_db_error().is_some() {
            return self.error("connect to", error);
        }
        let this = |kind, what: &str| {
            Error::new(kind, format!("connection `{}`: {what} `{}`", self.name, self.place()))
        };
        let cause = causes(error);
        if cause.contains("password missing") || cause.contains("invalid configuration") {
            return this(ErrorKind::Configuration, "the server wants a password, at")
                .hint("Set `password: ${env:NAME}` in connections.yaml, or PGPASSWORD in the environment.");
        }
        if cause.contains("certificate") {
            return this(ErrorKind::Configuration, "the server's certificate is not trusted, at").note(cause).hint(
                "Name the authority that signed it (`sslrootcert: ca.pem`) and the host as the certificate does. `sslmode: require` believes whoever answers.",
            );
        }
        if cause.contains("server does not support TLS") {
            return this(ErrorKind::Configuration, "the server does not speak TLS, at")
                .hint("Turn it on there; or set `sslmode: disable` where nobody can listen on the way.");
        }
        if cause.contains("lookup address") || cause.contains("Name or service not known") {
            return this(ErrorKind::Configuration, "there is no host of that name:")
                .note(cause)
                .hint("Mend `host` in connections.yaml.");
        }
        this(ErrorKind::Temporary, "no answer from").note(cause).hint(
            "Is the server up, and are `host` and `port` right? `floodmark connections test` tries again.",
        )
    }

    /// An error of the server as one for people. What it says of values is left out.
    fn error(&self, doing: &str, error: &tokio_postgres::Error) -> Error {
        let this =
            |kind| Error::new(kind, format!("connection `{}`: cannot {doing} `{}`", self.name, self.place()));
        let Some(server) = error.as_db_error() else {
            let why = match self.is_silent.load(Ordering::Relaxed) {
                true => "the server answers nobody any more, and was given up".to_owned(),
                false => causes(error),
            };
            return this(ErrorKind::Temporary)
                .note(why)
                .hint("The connection was lost. Run again: nothing of this run was published.");
        };
        let code = server.code();
        // Messages of these classes name objects and users, never what is in a row.
        let names = ["3D", "28", "42", "55", "57", "53", "25", "0A", "26", "34", "3F"];
        let said = if names.iter().any(|class| code.code().starts_with(class)) {
            server.message().to_owned()
        } else {
            without_values(server.message())
        };
        let this = |kind| this(kind).note(format!("PostgreSQL says: {said} ({})", code.code()));
        match code.code().get(..2).unwrap_or_default() {
            "28" => this(ErrorKind::Configuration)
                .hint("Mend `user` and `password` in connections.yaml; the server's pg_hba.conf says who may come from where."),
            "3D" => this(ErrorKind::Configuration).hint("Mend `database` in connections.yaml."),
            "42" if *code == SqlState::INSUFFICIENT_PRIVILEGE => this(ErrorKind::Failed)
                .hint(format!("Let an administrator GRANT it to `{}`.", self.options.user.as_deref().unwrap_or_default())),
            "42" | "3F" => this(ErrorKind::Configuration),
            "55" => this(ErrorKind::Temporary)
                .hint("Somebody else holds a lock on it. Run again later, or raise `lock_timeout_ms`."),
            "40" => this(ErrorKind::Temporary).hint("Run again: nothing of this run was published."),
            "53" if *code == SqlState::DISK_FULL => {
                this(ErrorKind::Failed).hint("Make room on the server's disk and run again: nothing was published.")
            }
            "57" if *code == SqlState::QUERY_CANCELED => {
                this(ErrorKind::Failed).hint("An administrator cancelled it, or the server's `statement_timeout` did. Nothing was published.")
            }
            "53" | "57" | "08" => this(ErrorKind::Temporary).hint("Run again when the server is itself again."),
            "22" | "23" => this(ErrorKind::Data),
            _ => this(ErrorKind::Failed),
        }
    }
}

/// Whether nobody answered, as the network has it.
fn is_unanswered(error: &tokio_postgres::Error) -> bool {
    use std::io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return matches!(io.kind(), HostUnreachable | NetworkUnreachable | TimedOut);
        }
        cause = inner.source();
    }
    false
}

/// What libraries say, down to the root.
fn causes(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = inner.source();
    }
    text
}

#[async_trait]
impl Connection for Arc<PostgresConnection> {
    async fn ping(&self) -> Result<Identity> {
        let session = self.connect().await?;
        let row = session
            .query_typed_one("SELECT current_setting('server_version')", &[])
            .await
            .map_err(|error| self.error("ask", &error))?;
        let version: String = row.get(0);
        let version = version.split(' ').next().unwrap_or_default();
        Ok(Identity { product: format!("PostgreSQL {version}"), place: self.place() })
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        source::discover(self).await
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        Some(self)
    }
}
