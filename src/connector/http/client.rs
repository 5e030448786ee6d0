//! One request and its answer: credentials, limits, patience.
//!
//! An answer is whole or is no answer: a body that breaks off is asked for again. What may help later (429, 500, 502, 503, 504, a
//! connection that breaks) is tried again while patience lasts, and a server that says `Retry-After` is obeyed. Redirects stay on
//! the connection's own hosts and never fall back to an unencrypted one; credentials go to the connection's own host only.
//! Addresses of cloud metadata are never asked, however they are spelled.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use reqwest::{
    StatusCode,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{io::AsyncWriteExt, sync::Mutex};
use url::{Host, Url};

use super::{Auth, HttpOptions, KeyIn};
use crate::{
    connector::spec::Method,
    error::{Error, ErrorKind, Result, without_values},
    runtime::{self, Pace},
};

/// How often a redirect is followed.
const HOPS: u32 = 5;

/// The first wait before a request is tried again; each wait is twice the one before.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// No wait is longer, unless the server says so.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A file that takes longer is given up.
const LONGEST_FILE: Duration = Duration::from_secs(24 * 60 * 60);

/// Who asks, and how patiently.
pub(super) struct Api {
    pub(super) name: String,
    pub(super) base: Url,
    client: reqwest::Client,
    headers: HeaderMap,
    options: HttpOptions,
    /// The token that OAuth gave last.
    token: Mutex<Option<SecretString>>,
    pace: Pace,
    allowed: BTreeSet<String>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Option<String>,
    /// Whether it may be asked again when nobody knows whether it was heard.
    pub(super) repeatable: bool,
}

/// What was answered, whole.
#[derive(Debug)]
pub(super) struct Answer {
    /// Where it came from, after redirects.
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Why a try came to nothing.
enum Failure {
    /// It may work later; the server may have said when.
    Later(Error, Option<Duration>),
    /// The credentials are not taken, or no longer.
    Unauthorized(Error),
    /// It will not work.
    Never(Error),
}

/// How long one request is tried again.
struct Patience {
    /// All waits together are no longer.
    most: Duration,
    waited: Duration,
    next: Duration,
}

impl Patience {
    fn of(options: &HttpOptions) -> Self {
        let most = Duration::from_millis(options.retry_timeout_ms.unwrap_or(60_000));
        Self { most, waited: Duration::ZERO, next: FIRST_WAIT }
    }

    /// Waits before another try, as long as the server wants; gives the error back if patience is at its end.
    async fn wait(&mut self, error: Error, asked: Option<Duration>) -> Result<()> {
        let pause = runtime::jittered(self.next).max(asked.unwrap_or_default());
        if self.waited.saturating_add(pause) > self.most {
            return Err(match asked {
                Some(asked) => error.note(format!(
                    "the server wants {} s of patience, and `retry_timeout_ms` is {}",
                    asked.as_secs(),
                    self.most.as_millis()
                )),
                None => error,
            });
        }
        runtime::sleep(pause).await;
        self.waited += pause;
        self.next = (self.next * 2).min(LONGEST_WAIT);
        Ok(())
    }
}

impl Api {
    pub(super) fn new(name: &str, options: HttpOptions, base_folder: &Path) -> Result<Self> {
        let wrong = |what: &str| Error::configuration(format!("connection `{name}`: {what}"));
        let mut base = Url::parse(&options.url).map_err(|error| {
            wrong("`url` is no URL").note(error.to_string()).hint("Such as `https://api.example.com/v1`.")
        })?;
        match base.scheme() {
            "https" => {}
            "http" if options.allow_http => {}
            "http" => {
                return Err(wrong("`url` is not encrypted")
                    .hint("Use `https://`; or set `allow_http: true` where nobody can listen on the way."));
            }
            other => {
                return Err(wrong(&format!("`{other}:` is not spoken here")).hint("Use `https://`."));
            }
        }
        if base.password().is_some() || !base.username().is_empty() {
            return Err(wrong("`url` holds a user or a password")
                .hint("Use `auth: basic` with `user` and `password: ${env:NAME}`."));
        }
        // So that what is joined lands below it.
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        options.complete().map_err(|what| {
            wrong(&what).hint("`floodmark schema connections` lists what each kind of `auth` needs.")
        })?;
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        insert_all(&mut headers, &options.headers).map_err(|what| wrong(&what))?;
        let timeout = Duration::from_millis(options.timeout_ms.unwrap_or(60_000));
        let mut client = reqwest::Client::builder()
            .user_agent(concat!("floodmark/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .https_only(!options.allow_http)
            .connect_timeout(Duration::from_secs(10))
            .timeout(timeout)
            .read_timeout(timeout)
            .dns_resolver(Arc::new(Guarded));
        if let Some(file) = &options.ca_file {
            let read = std::fs::read(base_folder.join(file)).map_err(|error| {
                Error::io("read", file, error)
                    .with_kind(ErrorKind::Configuration)
                    .within(&format!("connection `{name}`"))
            })?;
            for certificate in reqwest::Certificate::from_pem_bundle(&read)
                .map_err(|error| wrong(&format!("`{file}` holds no certificates")).note(error.to_string()))?
            {
                client = client.add_root_certificate(certificate);
            }
        }
        let client = client.build().map_err(|error| wrong("cannot be set up").note(causes(&error)))?;
        let allowed = options.allow_hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        let pace = Pace::new(options.requests_per_second);
        Ok(Self {
            name: name.to_owned(),
            base,
            client,
            headers,
            options,
            token: Mutex::new(None),
            pace,
            allowed,
        })
    }

    /// Whether the connection's own headers say which kinds of answers it takes.
    pub(super) fn says_what_it_accepts(&self) -> bool {
        self.options.headers.keys().any(|name| name.eq_ignore_ascii_case("accept"))
    }

    fn error(&self, kind: ErrorKind, url: &Url, what: &str) -> Error {
        Error::new(kind, format!("connection `{}`: {what} `{}`", self.name, shown(url)))
    }

    /// Asks until there is a whole answer, or patience is at its end.
    pub(super) async fn ask(&self, ask: &Ask) -> Result<Answer> {
        self.patiently(ask, None).await
    }

    /// Asks until there is a whole answer, and writes its body into a file instead of memory.
    pub(super) async fn fetch(&self, ask: &Ask, into: &Path) -> Result<Answer> {
        self.patiently(ask, Some(into)).await
    }

    async fn patiently(&self, ask: &Ask, into: Option<&Path>) -> Result<Answer> {
        let (mut patience, mut renewed) = (Patience::of(&self.options), false);
        loop {
            let token = self.bearer(false).await?;
            match self.attempt(ask, token.as_ref(), into).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Never(error)) => return Err(error),
                Err(Failure::Unauthorized(error)) => {
                    // A token may have run out in the middle of a list: it is renewed once a request.
                    if renewed || self.options.auth != Some(Auth::Oauth2) {
                        return Err(error);
                    }
                    renewed = true;
                    self.bearer(true).await?;
                }
                Err(Failure::Later(error, asked)) => patience.wait(error, asked).await?,
            }
        }
    }

    /// One try, through redirects.
    async fn attempt(
        &self,
        ask: &Ask,
        token: Option<&SecretString>,
        into: Option<&Path>,
    ) -> Result<Answer, Failure> {
        let (mut url, mut method, mut body) = (ask.url.clone(), ask.method, ask.body.clone());
        for _ in 0..=HOPS {
            self.permitted(&url).map_err(Failure::Never)?;
            self.pace.wait().await;
            let request = self.request(method, &url, &ask.headers, body.as_deref(), token);
            let request = request.map_err(Failure::Never)?;
            // A file takes as long as it takes, while something comes.
            let request = if into.is_some() { request.timeout(LONGEST_FILE) } else { request };
            let response = request.send().await.map_err(|error| self.unsent(&url, &error, ask.repeatable))?;
            let status = response.status();
            if !status.is_redirection() {
                return self.answer(&url, response, ask.repeatable, into).await;
            }
            let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok()).ok_or_else(|| {
                Failure::Never(self.error(
                    ErrorKind::Failed,
                    &url,
                    &format!("{status} without a way to go on, from"),
                ))
            })?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(Failure::Never(
                    self.error(ErrorKind::Failed, &url, "an unencrypted redirect is refused, from")
                        .hint("Ask the API's owner; or set `url` to where it is now."),
                ));
            }
            if status == StatusCode::SEE_OTHER {
                (method, body) = (Method::Get, None);
            }
            url = next;
        }
        Err(Failure::Never(
            self.error(ErrorKind::Failed, &ask.url, &format!("more than {HOPS} redirects, from"))
                .hint("Set `url` to where the API is now."),
        ))
    }

    /// A request with what the connection adds to it; credentials only to its own host.
    fn request(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<&str>,
        token: Option<&SecretString>,
    ) -> Result<reqwest::RequestBuilder> {
        let own = same_host(url, &self.base);
        let (mut url, options) = (url.clone(), &self.options);
        let mut all = HeaderMap::new();
        if own {
            all.clone_from(&self.headers);
        }
        all.extend(headers.clone());
        let secret = |value: &str| {
            let mut value = HeaderValue::from_str(value).map_err(|_| {
                Error::configuration(format!(
                    "connection `{}`: a credential has characters that no header can hold",
                    self.name
                ))
            })?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        };
        if own {
            match (options.auth, &options.key) {
                (Some(Auth::ApiKey), Some(key)) => {
                    let name = options.key_name.as_deref().unwrap_or("x-api-key");
                    match options.key_in {
                        KeyIn::Query => {
                            url.query_pairs_mut().append_pair(name, key.expose_secret());
                        }
                        KeyIn::Header => {
                            let name = HeaderName::try_from(name).map_err(|_| {
                                Error::configuration(format!(
                                    "connection `{}`: `key_name` is no header",
                                    self.name
                                ))
                            })?;
                            all.insert(name, secret(key.expose_secret())?);
                        }
                    }
                }
                _ => {
                    if let Some(token) = token {
                        all.insert(
                            header::AUTHORIZATION,
                            secret(&format!("Bearer {}", token.expose_secret()))?,
                        );
                    }
                }
            }
        }
        let method = match method {
            Method::Get => reqwest::Method::GET,
            Method::Post => reqwest::Method::POST,
        };
        let mut request = self.client.request(method, url).headers(all);
        if let (Some(Auth::Basic), true) = (options.auth, own) {
            let password = options.password.as_ref().map(ExposeSecret::expose_secret);
            request = request.basic_auth(options.user.as_deref().unwrap_or_default(), password);
        }
        if let Some(body) = body {
            request = request.header(header::CONTENT_TYPE, "application/json").body(body.to_owned());
        }
        Ok(request)
    }

    /// Refuses hosts that the connection does not name, and addresses that nobody should ask.
    pub(super) fn permitted(&self, url: &Url) -> Result<()> {
        let host = url.host_str().unwrap_or_default().to_ascii_lowercase();
        if !same_host(url, &self.base) && !self.allowed.contains(&host) {
            return Err(self.error(ErrorKind::Failed, url, "the API points to another host:").hint(format!(
                "If that is right, allow it: `allow_hosts: [{host}]`. It gets no credentials."
            )));
        }
        self.no_metadata(url)
    }

    fn no_metadata(&self, url: &Url) -> Result<()> {
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        if address.is_some_and(forbidden) {
            return Err(self
                .error(ErrorKind::Configuration, url, "this address is never asked:")
                .hint("Addresses of cloud metadata give credentials to whoever asks."));
        }
        Ok(())
    }

    /// The answer behind a status.
    async fn answer(
        &self,
        url: &Url,
        mut response: reqwest::Response,
        repeatable: bool,
        into: Option<&Path>,
    ) -> Result<Answer, Failure> {
        let status = response.status();
        if !status.is_success() {
            return Err(self.refused(url, status, response.headers(), repeatable));
        }
        // What is not there yet, or only in part, is no file.
        if into.is_some() && status != StatusCode::OK {
            let error = self
                .error(ErrorKind::Temporary, url, &format!("{status} instead of a whole file, from"))
                .hint("Run again when it is there.");
            return Err(Failure::Later(error, retry_after(response.headers())));
        }
        let headers = response.headers().clone();
        let most = self.options.max_page_bytes.unwrap_or(64 << 20);
        let (mut body, mut written) = (BytesMut::new(), 0_u64);
        let mut file = match into {
            Some(into) => {
                self.is_file(url, &response).map_err(Failure::Never)?;
                Some(tokio::fs::File::create(into).await.map_err(|error| unwritten(into, error))?)
            }
            None => None,
        };
        loop {
            match response.chunk().await {
                Ok(None) => break,
                Ok(Some(chunk)) => match (&mut file, into) {
                    (Some(file), Some(into)) => {
                        written += chunk.len() as u64;
                        file.write_all(&chunk).await.map_err(|error| unwritten(into, error))?;
                    }
                    _ => body.extend_from_slice(&chunk),
                },
                Err(error) => {
                    let error = self
                        .error(ErrorKind::Temporary, url, "the answer broke off, from")
                        .note(causes(&error))
                        .hint("Run again: nothing of this run was published.");
                    return Err(if repeatable { Failure::Later(error, None) } else { Failure::Never(error) });
                }
            }
            let most_of_file = self.options.max_file_bytes.unwrap_or(u64::MAX);
            if written > most_of_file {
                return Err(Failure::Never(
                    self.error(
                        ErrorKind::Data,
                        url,
                        &format!("a file of more than {most_of_file} bytes, from"),
                    )
                    .hint("If that is right, raise `max_file_bytes`."),
                ));
            }
            if body.len() as u64 > most {
                return Err(Failure::Never(
                    self.error(ErrorKind::Data, url, &format!("an answer of more than {most} bytes, from"))
                        .hint("Ask for smaller pages, or raise `max_page_bytes`."),
                ));
            }
        }
        if let (Some(file), Some(into)) = (&mut file, into) {
            file.flush().await.map_err(|error| unwritten(into, error))?;
        }
        Ok(Answer { url: url.clone(), headers, body: body.freeze() })
    }

    /// Refuses what is no file, or one whose end nobody could tell from a cut.
    fn is_file(&self, url: &Url, response: &reqwest::Response) -> Result<()> {
        let header =
            |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if header(header::CONTENT_TYPE).to_ascii_lowercase().starts_with("text/html") {
            return Err(self.error(ErrorKind::Data, url, "a page in HTML instead of a file, from").hint(
                "Often that is a login page, or a proxy's: look at it in a browser, and mend `url` or `auth`.",
            ));
        }
        let chunked = header(header::TRANSFER_ENCODING).to_ascii_lowercase().contains("chunked");
        let ends =
            response.version() >= reqwest::Version::HTTP_2 || chunked || response.content_length().is_some();
        if !ends {
            return Err(self
                .error(ErrorKind::Failed, url, "a file without its length, from")
                .note("a file that is cut short could not be told from a whole one")
                .hint("Let the server say `Content-Length`; or fetch the file by other means, and read it from a folder."));
        }
        Ok(())
    }

    fn refused(&self, url: &Url, status: StatusCode, headers: &HeaderMap, repeatable: bool) -> Failure {
        let of = |kind| self.error(kind, url, &format!("{status} from"));
        match status {
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let error =
                    of(ErrorKind::Temporary).hint("Run again later; `requests_per_second` asks more slowly.");
                // It was refused before anything was done, or it may be asked again.
                let heard =
                    !matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
                if heard && !repeatable {
                    return Failure::Never(error);
                }
                Failure::Later(error, retry_after(headers))
            }
            StatusCode::UNAUTHORIZED => Failure::Unauthorized(
                of(ErrorKind::Configuration).hint("Mend `auth` and its credentials in connections.yaml."),
            ),
            StatusCode::FORBIDDEN => Failure::Never(
                of(ErrorKind::Configuration)
                    .hint("Let the API's owner give these credentials the right to it."),
            ),
            StatusCode::NOT_FOUND | StatusCode::GONE => Failure::Never(
                of(ErrorKind::Configuration)
                    .hint("Mend `url` in connections.yaml, or the path of the file or request."),
            ),
            status if status.is_client_error() => Failure::Never(
                of(ErrorKind::Configuration)
                    .hint("The API does not take this request: mend its `query`, `headers` or `body`."),
            ),
            _ => Failure::Never(of(ErrorKind::Failed).hint("Ask the API's owner.")),
        }
    }

    fn unsent(&self, url: &Url, error: &reqwest::Error, repeatable: bool) -> Failure {
        let cause = causes(error);
        let of = |kind, what: &str| self.error(kind, url, what);
        if cause.contains(FORBIDDEN) {
            return Failure::Never(
                of(ErrorKind::Configuration, "this address is never asked:")
                    .hint("Addresses of cloud metadata give credentials to whoever asks."),
            );
        }
        if cause.contains("certificate") {
            return Failure::Never(of(ErrorKind::Configuration, "the server's certificate is not trusted, at").note(cause).hint(
                "Name the authority that signed it: `ca_file: ca.pem`; and use the name that the certificate has.",
            ));
        }
        let unknown = cause.contains("lookup address") || cause.contains("Name or service not known");
        if unknown && !cause.contains("Temporary failure") {
            return Failure::Never(
                of(ErrorKind::Configuration, "there is no host of that name:")
                    .hint("Mend `url` in connections.yaml."),
            );
        }
        let error = of(ErrorKind::Temporary, "no answer from")
            .note(cause)
            .hint("Is the API up? `floodmark connections test` tries again.");
        if repeatable || error_before_sending(&error) {
            Failure::Later(error, None)
        } else {
            Failure::Never(error)
        }
    }

    /// The token that requests carry.
    async fn bearer(&self, renew: bool) -> Result<Option<SecretString>> {
        match self.options.auth {
            Some(Auth::Bearer) => return Ok(self.options.token.clone()),
            Some(Auth::Oauth2) => {}
            _ => return Ok(None),
        }
        let mut token = self.token.lock().await;
        if let (Some(token), false) = (token.as_ref(), renew) {
            return Ok(Some(token.clone()));
        }
        let fresh = self.fresh_token().await?;
        *token = Some(fresh.clone());
        Ok(Some(fresh))
    }

    /// Asks for a token with the client's own credentials (RFC 6749, 4.4).
    async fn fresh_token(&self) -> Result<SecretString> {
        #[derive(serde::Deserialize)]
        struct Granted {
            access_token: SecretString,
        }
        let wrong = |what: &str| Error::configuration(format!("connection `{}`: {what}", self.name));
        let written = self.options.token_url.as_deref().unwrap_or_default();
        let url = self.base.join(written).map_err(|_| wrong("`token_url` is no URL"))?;
        if url.scheme() != "https" && !self.options.allow_http {
            return Err(wrong("`token_url` is not encrypted").hint("Use `https://`."));
        }
        self.no_metadata(&url)?;
        let mut form = vec![("grant_type", "client_credentials")];
        form.extend(self.options.scope.as_deref().map(|scope| ("scope", scope)));
        let secret = self.options.client_secret.as_ref().map(ExposeSecret::expose_secret);
        let grant = async || -> Result<Granted, Failure> {
            let request = self
                .client
                .post(url.clone())
                .basic_auth(self.options.client_id.as_deref().unwrap_or_default(), secret)
                .form(&form);
            let response = request.send().await.map_err(|error| self.unsent(&url, &error, true))?;
            let status = response.status();
            if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                return Err(self.refused(&url, status, response.headers(), true));
            }
            if !status.is_success() {
                return Err(Failure::Never(
                    self.error(ErrorKind::Configuration, &url, &format!("{status} instead of a token, from"))
                        .hint("Mend `client_id` and `client_secret` in connections.yaml."),
                ));
            }
            let body = response.bytes().await.map_err(|error| {
                let error =
                    self.error(ErrorKind::Temporary, &url, "the answer broke off, from").note(causes(&error));
                Failure::Later(error, None)
            })?;
            serde_json::from_slice(&body).map_err(|error| {
                Failure::Never(
                    self.error(ErrorKind::Failed, &url, "no token in the answer from")
                        .note(without_values(&error.to_string())),
                )
            })
        };
        let mut patience = Patience::of(&self.options);
        let granted = loop {
            match grant().await {
                Ok(granted) => break granted,
                Err(Failure::Never(error) | Failure::Unauthorized(error)) => return Err(error),
                Err(Failure::Later(error, asked)) => patience.wait(error, asked).await?,
            }
        };
        crate::secret::remember(granted.access_token.expose_secret());
        Ok(granted.access_token)
    }

    /// What the server's clock said, if it answers at all.
    pub(super) async fn clock(&self) -> Result<Option<chrono::DateTime<chrono::Utc>>> {
        self.permitted(&self.base)?;
        self.pace.wait().await;
        let sent = self.client.head(self.base.clone()).send().await;
        let response = sent.map_err(|error| match self.unsent(&self.base, &error, true) {
            Failure::Later(error, _) | Failure::Unauthorized(error) | Failure::Never(error) => error,
        })?;
        Ok(date(response.headers()))
    }
}

/// Adds headers as they are written.
pub(super) fn insert_all(
    headers: &mut HeaderMap,
    written: &indexmap::IndexMap<String, String>,
) -> Result<(), String> {
    for (name, value) in written {
        let name =
            HeaderName::try_from(name.as_str()).map_err(|_| format!("`{name}` is no header's name"))?;
        let mut value = HeaderValue::from_str(value)
            .map_err(|_| format!("the header `{name}` has characters that no header can hold"))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(())
}

/// The server's clock, as its answer tells it.
pub(super) fn date(headers: &HeaderMap) -> Option<chrono::DateTime<chrono::Utc>> {
    let text = headers.get(header::DATE)?.to_str().ok()?;
    chrono::DateTime::parse_from_rfc2822(text).ok().map(|date| date.to_utc())
}

/// How long the server wants to be left alone: seconds, or until a date by its own clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let until = chrono::DateTime::parse_from_rfc2822(text).ok()?.to_utc();
    (until - date(headers)?).to_std().ok()
}

/// A URL for people: without its query, which may hold keys.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

fn unwritten(file: &Path, error: std::io::Error) -> Failure {
    let folder = file.parent().unwrap_or(file);
    Failure::Never(Error::io("write a copy into", folder.display(), error))
}

pub(super) fn same_host(a: &Url, b: &Url) -> bool {
    (a.scheme(), a.host_str(), a.port_or_known_default())
        == (b.scheme(), b.host_str(), b.port_or_known_default())
}

/// Whether the request surely never reached the server.
fn error_before_sending(error: &Error) -> bool {
    error.problems().iter().flat_map(|problem| &problem.notes).any(|note| note.contains("tcp connect error"))
}

/// What libraries say, down to the root, without the URL, which may hold keys.
fn causes(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let said = inner.to_string();
        if !text.contains(&said) {
            text = if text.is_empty() { said } else { format!("{text}: {said}") };
        }
        cause = inner.source();
    }
    if text.is_empty() {
        text =
            if error.is_timeout() { "it took too long".to_owned() } else { "the request failed".to_owned() };
    }
    text
}

/// Said by the resolver of an address that nobody should ask.
const FORBIDDEN: &str = "an address of cloud metadata";

/// Looks names up, and leaves out addresses that nobody should ask.
#[derive(Debug)]
struct Guarded;

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let fit: Vec<SocketAddr> =
                found.iter().copied().filter(|address| !forbidden(address.ip())).collect();
            if fit.is_empty() && !found.is_empty() {
                return Err(FORBIDDEN.into());
            }
            Ok(Box::new(fit.into_iter()) as Addrs)
        })
    }
}

/// Link-local addresses and those of cloud metadata, also where an IPv6 address wraps an IPv4 one.
fn forbidden(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local() || address.octets() == [100, 100, 100, 200],
        IpAddr::V6(address) => {
            let segments = address.segments();
            let [.., high, low] = segments;
            let [a, b] = high.to_be_bytes();
            let [c, d] = low.to_be_bytes();
            let wraps = segments.starts_with(&[0, 0, 0, 0, 0]) || segments.starts_with(&[0x64, 0xff9b]);
            let metadata = [[0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254], [0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254]];
            wraps && forbidden(IpAddr::V4([a, b, c, d].into()))
                || address.is_unicast_link_local()
                || metadata.contains(&segments)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_never_asked_however_it_is_spelled() {
        for (address, expected) in [
            ("169.254.169.254", true),
            ("::ffff:169.254.169.254", true),
            ("::169.254.169.254", true),
            ("64:ff9b::a9fe:a9fe", true),
            ("fe80::1", true),
            ("fd00:ec2::254", true),
            ("fd20:ce::254", true),
            ("100.100.100.200", true),
            ("127.0.0.1", false),
            ("10.0.0.7", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(forbidden(address.parse().unwrap()), expected, "{address}");
        }
    }
}
