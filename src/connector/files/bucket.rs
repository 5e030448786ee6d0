//! Buckets: S3 and what speaks like it, Google Cloud Storage, Azure Blob Storage.
//!
//! Credentials come from the options, from the variables of the provider, or from the machine's own role, in this
//! order. Connections are encrypted unless `allow_http` says otherwise. What is read is read under the condition that
//! it is still the version that was listed; what is published needs a store that keeps to conditional puts.
//!
//! Not done: profiles of `~/.aws/config`. Google Cloud Storage is not tested against a server.

use std::{path::PathBuf, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, prefix::PrefixStore,
};
use schemars::JsonSchema;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::{
    FilesConnection, ROW_GROUP_BYTES, ROW_GROUP_ROWS,
    place::{Bucket, Place},
};
use crate::{
    connector::{Connection, Connector, Options, bucket_of},
    error::{Error, Result},
};

/// A line that [`super::super::CONNECTORS`] holds.
pub static S3: Connector = Connector {
    name: "s3",
    summary: "a bucket of S3, or of a store that speaks like it: the files and outputs of a folder",
    options: || schemars::schema_for!(S3Options),
    schemes: &["s3"],
    variables: &[
        ("AWS_ACCESS_KEY_ID", "access_key_id"),
        ("AWS_SECRET_ACCESS_KEY", "secret_access_key"),
        ("AWS_SESSION_TOKEN", "session_token"),
        ("AWS_REGION", "region"),
        ("AWS_DEFAULT_REGION", "region"),
        ("AWS_ENDPOINT_URL_S3", "endpoint"),
        ("AWS_ENDPOINT_URL", "endpoint"),
    ],
    credentials: &["access_key_id", "secret_access_key", "session_token"],
    from_url: |url| named(url, "bucket"),
    open: |options| {
        let parsed: S3Options = options.parse()?;
        // The machine's own role is asked for only where nobody says who asks.
        let named = parsed.access_key_id.is_some();
        let mut builder = if named { AmazonS3Builder::new() } else { AmazonS3Builder::from_env() }
            .with_bucket_name(&parsed.bucket)
            .with_allow_http(parsed.allow_http)
            .with_client_options(client(parsed.allow_http))
            .with_retry(retry(parsed.retry_timeout_ms));
        if let Some(region) = &parsed.region {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &parsed.endpoint {
            encrypted(&options, endpoint, parsed.allow_http)?;
            // The store takes the host as it is.
            let hosted = match endpoint.split_once("://") {
                Some((scheme, host))
                    if parsed.virtual_hosted_style == Some(true) && !host.starts_with(&parsed.bucket) =>
                {
                    format!("{scheme}://{}.{host}", parsed.bucket)
                }
                _ => endpoint.clone(),
            };
            builder = builder.with_endpoint(hosted);
        }
        let hosted = parsed.virtual_hosted_style.unwrap_or(false);
        builder = builder.with_virtual_hosted_style_request(hosted);
        if let Some(key) = &parsed.access_key_id {
            builder = builder.with_access_key_id(key);
        }
        if let Some(secret) = &parsed.secret_access_key {
            builder = builder.with_secret_access_key(secret.expose_secret());
        }
        if let Some(token) = &parsed.session_token {
            builder = builder.with_token(token.expose_secret());
        }
        if let Some(key) = &parsed.kms_key {
            builder = builder.with_sse_kms_encryption(key);
        }
        let store = builder.build().map_err(|error| unbuilt(&options, error))?;
        let credentials = "Give `access_key_id` and `secret_access_key: ${env:NAME}` in connections.yaml, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or this machine a role; and let a policy allow it to read, write, list and delete in the bucket.";
        Ok(connected(options, store, "s3", &parsed.bucket, parsed.prefix.as_deref(), credentials))
    },
};

/// A line that [`super::super::CONNECTORS`] holds.
pub static GCS: Connector = Connector {
    name: "gcs",
    summary: "a bucket of Google Cloud Storage: the files and outputs of a folder",
    options: || schemars::schema_for!(GcsOptions),
    schemes: &["gs"],
    variables: &[
        ("GOOGLE_APPLICATION_CREDENTIALS", "service_account_file"),
        ("GOOGLE_SERVICE_ACCOUNT_KEY", "service_account_key"),
    ],
    credentials: &["service_account_file", "service_account_key"],
    from_url: |url| named(url, "bucket"),
    open: |options| {
        let parsed: GcsOptions = options.parse()?;
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(&parsed.bucket)
            .with_client_options(client(false))
            .with_retry(retry(parsed.retry_timeout_ms));
        if let Some(key) = &parsed.service_account_key {
            builder = builder.with_service_account_key(key.expose_secret());
        } else if let Some(file) = &parsed.service_account_file {
            let file = options.base.join(file);
            builder = builder.with_application_credentials(file.to_string_lossy());
        }
        let store = builder.build().map_err(|error| unbuilt(&options, error))?;
        let credentials = "Give `service_account_file` in connections.yaml, or GOOGLE_APPLICATION_CREDENTIALS in the environment, or this machine a service account; and let it read, write, list and delete in the bucket.";
        Ok(connected(options, store, "gs", &parsed.bucket, parsed.prefix.as_deref(), credentials))
    },
};

/// A line that [`super::super::CONNECTORS`] holds.
pub static AZURE: Connector = Connector {
    name: "azure",
    summary: "a container of Azure Blob Storage: the files and outputs of a folder",
    options: || schemars::schema_for!(AzureOptions),
    schemes: &["az"],
    variables: &[
        ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ("AZURE_STORAGE_ACCOUNT_KEY", "access_key"),
        ("AZURE_CLIENT_ID", "client_id"),
        ("AZURE_CLIENT_SECRET", "client_secret"),
        ("AZURE_TENANT_ID", "tenant_id"),
    ],
    credentials: &["access_key", "client_id", "client_secret", "tenant_id"],
    from_url: |url| named(url, "container"),
    open: |options| {
        let parsed: AzureOptions = options.parse()?;
        let named = parsed.access_key.is_some() || parsed.client_secret.is_some();
        let mut builder =
            if named { MicrosoftAzureBuilder::new() } else { MicrosoftAzureBuilder::from_env() }
                .with_container_name(&parsed.container)
                .with_allow_http(parsed.allow_http)
                .with_client_options(client(parsed.allow_http))
                .with_retry(retry(parsed.retry_timeout_ms));
        if let Some(account) = &parsed.account {
            builder = builder.with_account(account);
        }
        if let Some(endpoint) = &parsed.endpoint {
            encrypted(&options, endpoint, parsed.allow_http)?;
            builder = builder.with_endpoint(endpoint.clone());
        }
        if let Some(key) = &parsed.access_key {
            builder = builder.with_access_key(key.expose_secret());
        }
        if let (Some(client), Some(secret), Some(tenant)) =
            (&parsed.client_id, &parsed.client_secret, &parsed.tenant_id)
        {
            builder = builder.with_client_secret_authorization(client, secret.expose_secret(), tenant);
        }
        let store = builder.build().map_err(|error| unbuilt(&options, error))?;
        let credentials = "Give `account` and `access_key: ${env:NAME}` in connections.yaml, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in the environment, or this machine an identity; and let it read, write, list and delete in the container.";
        Ok(connected(options, store, "az", &parsed.container, parsed.prefix.as_deref(), credentials))
    },
};

/// A bucket of S3.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct S3Options {
    /// The bucket.
    bucket: String,
    /// What the names of all objects start with. As a target it need not be there.
    prefix: Option<String>,
    /// The region, such as `eu-central-1`. Unless set, `AWS_REGION`, then `us-east-1`.
    region: Option<String>,
    /// The server, where it is not Amazon's: `https://minio.example:9000`.
    endpoint: Option<String>,
    /// The key's name. Unless set, `AWS_ACCESS_KEY_ID`, then this machine's role.
    access_key_id: Option<String>,
    /// The key, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    secret_access_key: Option<SecretString>,
    /// The token of a temporary key, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    session_token: Option<SecretString>,
    /// The key of the key management service that encrypts what is written.
    kms_key: Option<String>,
    /// Whether the bucket is part of the host's name. Unless set, it is part of the path.
    virtual_hosted_style: Option<bool>,
    /// Whether connections may be unencrypted. Unless set, no.
    #[serde(default)]
    allow_http: bool,
    /// How long a request is tried again, in milliseconds. Unless set, 60000.
    retry_timeout_ms: Option<u64>,
}

/// A bucket of Google Cloud Storage.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct GcsOptions {
    /// The bucket.
    bucket: String,
    /// What the names of all objects start with. As a target it need not be there.
    prefix: Option<String>,
    /// The file of a service account's key, relative to the project's folder. Unless set, `GOOGLE_APPLICATION_CREDENTIALS`.
    service_account_file: Option<String>,
    /// The key itself, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    service_account_key: Option<SecretString>,
    /// How long a request is tried again, in milliseconds. Unless set, 60000.
    retry_timeout_ms: Option<u64>,
}

/// A container of Azure Blob Storage.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct AzureOptions {
    /// The storage account. Unless set, `AZURE_STORAGE_ACCOUNT_NAME`.
    account: Option<String>,
    /// The container.
    container: String,
    /// What the names of all objects start with. As a target it need not be there.
    prefix: Option<String>,
    /// The server, where it is not Microsoft's.
    endpoint: Option<String>,
    /// The account's key, as a reference. Unless set, `AZURE_STORAGE_ACCOUNT_KEY`, then this machine's identity.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    access_key: Option<SecretString>,
    /// The application that asks, with `client_secret` and `tenant_id`.
    client_id: Option<String>,
    /// Its secret, as a reference.
    #[schemars(with = "Option<String>", extend("x-secret" = true))]
    client_secret: Option<SecretString>,
    /// Its tenant.
    tenant_id: Option<String>,
    /// Whether connections may be unencrypted. Unless set, no.
    #[serde(default)]
    allow_http: bool,
    /// How long a request is tried again, in milliseconds. Unless set, 60000.
    retry_timeout_ms: Option<u64>,
}

fn named(url: &url::Url, option: &str) -> Result<serde_json::Map<String, serde_json::Value>> {
    let (bucket, prefix) = bucket_of(url)?;
    let prefix = prefix.map(|prefix| ("prefix".to_owned(), prefix.into()));
    Ok([(option.to_owned(), bucket.into())].into_iter().chain(prefix).collect())
}

fn client(allow_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(allow_http)
        .with_connect_timeout(Duration::from_secs(5))
        .with_timeout(Duration::from_secs(300))
}

fn retry(milliseconds: Option<u64>) -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(10),
        base: 2.0,
    };
    RetryConfig {
        backoff,
        max_retries: 10,
        retry_timeout: Duration::from_millis(milliseconds.unwrap_or(60_000)),
    }
}

fn encrypted(options: &Options, endpoint: &str, allow_http: bool) -> Result<()> {
    if endpoint.starts_with("http://") && !allow_http {
        return Err(Error::configuration(format!(
            "connection `{}`: `endpoint` is not encrypted",
            options.name
        ))
        .hint("Use `https://`; or set `allow_http: true` where nobody can listen on the way."));
    }
    Ok(())
}

#[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
fn unbuilt(options: &Options, error: object_store::Error) -> Error {
    Error::configuration(format!("connection `{}`: these options do not make a bucket", options.name))
        .note(error.to_string())
        .hint("`floodmark schema connections` lists them.")
}

fn connected(
    options: Options,
    store: impl ObjectStore,
    scheme: &str,
    bucket: &str,
    prefix: Option<&str>,
    credentials: &'static str,
) -> Arc<dyn Connection> {
    let prefix = prefix.unwrap_or_default().trim_matches('/');
    let spill: PathBuf = options.spill;
    let (shown, store): (String, Arc<dyn ObjectStore>) = if prefix.is_empty() {
        (format!("{scheme}://{bucket}"), Arc::new(store))
    } else {
        (format!("{scheme}://{bucket}/{prefix}"), Arc::new(PrefixStore::new(store, prefix)))
    };
    Arc::new(Arc::new(FilesConnection {
        name: options.name,
        shown: shown.clone(),
        place: Place::Bucket(Bucket::new(store, shown, credentials, spill)),
        row_group_rows: ROW_GROUP_ROWS,
        row_group_bytes: ROW_GROUP_BYTES,
    }))
}
