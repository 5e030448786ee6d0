//! `floodmark.yaml` and `connections.yaml` as they are written.

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::Deserialize;

/// The project: its name, its environments, its limits.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectFile {
    /// The project's name. Part of every job's identity.
    pub project: String,
    /// The environment used unless `--env` names another.
    pub default_environment: Option<String>,
    /// What differs between environments.
    #[serde(default)]
    pub environments: IndexMap<String, EnvironmentSpec>,
    /// What a run may use.
    #[serde(default)]
    pub limits: LimitsSpec,
}

/// One environment.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EnvironmentSpec {
    /// Options of connections that are other here, by the connection's name.
    pub connections: IndexMap<String, IndexMap<String, String>>,
    /// Values of parameters here, by name.
    pub params: IndexMap<String, String>,
    /// A fixed `as_of`, for examples and tests.
    pub as_of: Option<String>,
}

/// What a run may use.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSpec {
    /// Memory of the process: `512MiB`, `2GiB`. A quarter, and at most 256 MiB, is left to those who read and write; joins, sorts,
    /// aggregates and spools share the rest. Unless set, 1 GiB.
    pub memory: Option<String>,
    /// The folder for what does not fit. Unless set, `.floodmark/spill`.
    pub spill: Option<String>,
    /// How often a run tries again after what may pass: a lost connection, a deadlock, a server that starts anew. Unless set, 3.
    pub retries: Option<u32>,
    /// How long after its start a run may still try again: `30s`, `10m`. Unless set, `10m`.
    pub retry_within: Option<String>,
    /// How long a run that shows no sign of life keeps others on this machine from its job. Unless set, `1m`.
    pub lease: Option<String>,
}

/// A number of bytes: `512MiB`, `2GiB`, `100MB`.
pub fn bytes(written: &str) -> Option<usize> {
    let written = written.trim();
    let at = written.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = written.split_at(at);
    let unit = match unit.trim() {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(unit)
}
