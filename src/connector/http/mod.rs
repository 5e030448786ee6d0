//! HTTP APIs that answer in JSON, and files of web servers, as a source, by configuration alone.
//!
//! A list is read over all its pages, or the run fails: what breaks off, loops, or is a login page in HTML is never taken for the
//! list's end. Pages that are asked for by number shift when rows come and go; such a list is read until two readings are equal.
//! With a cursor the window ends a margin before the server's own clock, and the mark moves only when the window was read to its
//! end. Numbers are taken as they are spelled.
//!
//! Not done: pages in other formats than JSON, writing.

use std::sync::Arc;

use async_trait::async_trait;
use indexmap::IndexMap;
use schemars::JsonSchema;
use secrecy::SecretString;
use serde::Deserialize;

use super::{CatalogTable, Connection, Connector, Identity, Source, Target};
use crate::error::{Error, Result};

mod client;
mod files;
pub mod path;
mod source;
#[cfg(test)]
mod tests;

/// The line that [`super::CONNECTORS`] holds.
pub static CONNECTOR: Connector = Connector {
    name: "http",
    summary: "an HTTP API that answers in JSON, or files of a web server",
    options: || schemars::schema_for!(HttpOptions),
    schemes: &["http", "https"],
    variables: &[],
    credentials: &[],
    from_url: |url| {
        // The scheme was made one that URLs know nothing of, so that paths stay as written.
        let mut plain = url.as_str().trim_start_matches("x-").to_owned();
        if let Some(query) = plain.find('?') {
            plain.truncate(query);
        }
        Ok([("url".to_owned(), plain.into())].into_iter().collect())
    },
    open: |options| {
        let parsed: HttpOptions = options.parse()?;
        let margin_ms = parsed.bound_margin_ms.unwrap_or(60_000);
        let limits =
            Limits { pages: parsed.max_pages.unwrap_or(100_000), margin_ms, spill: options.spill.clone() };
        let api = client::Api::new(&options.name, parsed, &options.base)?;
        Ok(Arc::new(Arc::new(HttpConnection { api, limits, files: files::Files::default() })))
    },
};

/// An HTTP API.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HttpOptions {
    /// Where it is: `https://api.example.com/v1`.
    url: String,
    /// Headers of every request. Credentials belong into `token`, `key` or `password`.
    #[serde(default)]
    headers: IndexMap<String, String>,
    /// How requests say who asks. Unless set, they do not.
    auth: Option<Auth>,
    /// `auth: api_key`: the key, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    key: Option<SecretString>,
    /// `auth: api_key`: the header or query parameter that carries it. Unless set, `x-api-key`.
    key_name: Option<String>,
    /// `auth: api_key`: `header` or `query`. Unless set, `header`.
    #[serde(default)]
    key_in: KeyIn,
    /// `auth: basic`: the user.
    user: Option<String>,
    /// `auth: basic`: the password, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    password: Option<SecretString>,
    /// `auth: bearer`: the token, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    token: Option<SecretString>,
    /// `auth: oauth2`: where tokens are given.
    token_url: Option<String>,
    /// `auth: oauth2`: the client.
    client_id: Option<String>,
    /// `auth: oauth2`: its secret, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    client_secret: Option<SecretString>,
    /// `auth: oauth2`: what the token is to be good for.
    scope: Option<String>,
    /// Other hosts that redirects and links may lead to. They get no credentials.
    #[serde(default)]
    allow_hosts: Vec<String>,
    /// A file of certificates to trust beside those of this machine, relative to the project's folder.
    ca_file: Option<String>,
    /// Whether connections may be unencrypted. Unless set, no.
    #[serde(default)]
    allow_http: bool,
    /// How often the API is asked at most.
    requests_per_second: Option<u32>,
    /// How long one answer may take, in milliseconds. Unless set, 60000.
    timeout_ms: Option<u64>,
    /// How long a request is tried again, waits counted, in milliseconds. Unless set, 60000.
    retry_timeout_ms: Option<u64>,
    /// Bytes of one answer at most, decompressed. Unless set, 64 MiB.
    max_page_bytes: Option<u64>,
    /// Bytes of one file at most. Unless set, as many as the disk takes.
    max_file_bytes: Option<u64>,
    /// Pages of one list at most. Unless set, 100000.
    max_pages: Option<u64>,
    /// How far behind the server's clock a window ends, in milliseconds. Unless set, 60000.
    bound_margin_ms: Option<u32>,
}

/// How requests say who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Auth {
    /// A key in a header or in the query.
    ApiKey,
    /// User and password.
    Basic,
    /// A token.
    Bearer,
    /// A token that is got with client credentials, and renewed when it has run out.
    Oauth2,
}

/// Where a key is carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum KeyIn {
    /// In a header.
    #[default]
    Header,
    /// In the query.
    Query,
}

impl HttpOptions {
    /// Says what the kind of `auth` lacks.
    fn complete(&self) -> Result<(), String> {
        let needed: &[(&str, bool)] = match self.auth {
            None => &[],
            Some(Auth::ApiKey) => &[("key", self.key.is_some())],
            Some(Auth::Basic) => &[("user", self.user.is_some()), ("password", self.password.is_some())],
            Some(Auth::Bearer) => &[("token", self.token.is_some())],
            Some(Auth::Oauth2) => &[
                ("token_url", self.token_url.is_some()),
                ("client_id", self.client_id.is_some()),
                ("client_secret", self.client_secret.is_some()),
            ],
        };
        match needed.iter().find(|(_, given)| !given) {
            Some((missing, _)) => Err(format!("this kind of `auth` needs `{missing}`")),
            None => Ok(()),
        }
    }
}

/// What one list may cost.
#[derive(Debug)]
struct Limits {
    pages: u64,
    margin_ms: u32,
    /// Where a list is kept that is read twice, and a file that was fetched.
    spill: std::path::PathBuf,
}

/// One API.
#[derive(Debug)]
struct HttpConnection {
    api: client::Api,
    limits: Limits,
    files: files::Files,
}

#[async_trait]
impl Connection for Arc<HttpConnection> {
    async fn ping(&self) -> Result<Identity> {
        self.api.clock().await?;
        Ok(Identity { product: "HTTP API".to_owned(), place: client::shown(&self.api.base) })
    }

    async fn discover(&self) -> Result<Vec<CatalogTable>> {
        Err(Error::configuration(format!("connection `{}`: an API does not list what it has", self.api.name))
            .hint("Read its documentation, and try a request with `floodmark preview`."))
    }

    fn source(&self) -> Option<&dyn Source> {
        Some(self)
    }

    fn target(&self) -> Option<&dyn Target> {
        None
    }
}
