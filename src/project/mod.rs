//! The project's folder: read, checked, and told all at once what is wrong with it.
//!
//! This is the only module that reads the environment. Nothing here reaches a system; what is resolved (references,
//! environments) goes into new values and never back into what was parsed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use indexmap::IndexMap;

use crate::{
    connector::{CONNECTORS, Connection, Connector, Options},
    error::{Error, ErrorKind, Place, Problem, Result, SourceText, nearest},
    job::{self, JobFile},
    names::{is_name, is_output_name},
    patience::Patience,
    runtime::Limits,
    secret,
};
use yaml::{Document, Entry};

mod check;
pub mod files;
pub mod validate;
pub mod yaml;

/// A project, parsed and checked.
#[derive(Debug)]
pub struct Project {
    /// Its folder.
    pub root: PathBuf,
    /// Its name.
    pub name: String,
    /// The chosen environment.
    pub environment: String,
    /// What the environment changes.
    pub settings: files::EnvironmentSpec,
    /// Its limits.
    pub limits: Limits,
    /// How often and how long its runs try again.
    pub patience: Patience,
    /// How long a run that shows no sign of life keeps others from its job.
    pub lease: Duration,
    /// Its connections, by name.
    pub connections: IndexMap<String, ConnectionFile>,
    /// Its jobs, by name.
    pub jobs: IndexMap<String, JobDocument>,
}

/// A connection as it is written.
#[derive(Debug)]
pub struct ConnectionFile {
    /// The connector.
    pub connector: &'static Connector,
    /// The options, without `kind`, with references unresolved.
    pub options: serde_json::Value,
    /// Where it stands; nowhere, if a variable of the environment gave it.
    pub place: Option<Place>,
}

/// A job and the document it was read from, for the places of later mistakes.
#[derive(Debug)]
pub struct JobDocument {
    /// The job.
    pub job: JobFile,
    /// Its document.
    pub document: Document,
}

/// The connection that sources without one use: the project's own folder.
pub const PROJECT_CONNECTION: &str = "project";

impl Project {
    /// Reads the project in `root`.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it, as one error.
    pub fn load(root: &Path, environment: Option<&str>) -> Result<Self> {
        Self::load_with(root, environment, &[])
    }

    /// The same, with connections beside those of the project: names and URLs.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn load_with(root: &Path, environment: Option<&str>, given: &[(String, String)]) -> Result<Self> {
        let mut problems = Vec::new();
        if !root.join("floodmark.yaml").is_file() {
            return Err(Error::configuration(format!("there is no project in `{}`", root.display()))
                .note("a project's folder holds a file `floodmark.yaml`")
                .hint("Make one with `floodmark init`, or say where it is: `--project DIR`."));
        }
        let file = read_document(root, "floodmark.yaml", &mut problems).and_then(|document| {
            typed::<files::ProjectFile>(&document, "floodmark.yaml", &mut problems)
                .map(|file| (file, document))
        });
        let mut declared: Vec<String> = Vec::new();
        let mut connections = if root.join("connections.yaml").is_file() {
            read_document(root, "connections.yaml", &mut problems)
                .map(|document| {
                    declared = document.root.entries().iter().map(|entry| entry.key.clone()).collect();
                    read_connections(&document, &mut problems)
                })
                .unwrap_or_default()
        } else {
            IndexMap::new()
        };
        for (name, url) in variables(root, "FLOODMARK_CONN_") {
            let variable = format!("FLOODMARK_CONN_{name}");
            match Connector::of_url(&url) {
                Ok((connector, options)) => {
                    let file = ConnectionFile { connector, options, place: None };
                    connections.insert(name.to_lowercase(), file);
                }
                Err(error) => problems.extend(
                    error
                        .while_doing(format!("the variable `{variable}` gives no connection"))
                        .into_problems(),
                ),
            }
        }
        for (name, url) in given {
            match Connector::of_url(url) {
                Ok((connector, options)) => {
                    connections.insert(name.clone(), ConnectionFile { connector, options, place: None });
                }
                Err(error) => problems.extend(error.into_problems()),
            }
        }
        let mut jobs: IndexMap<String, JobDocument> = IndexMap::new();
        for path in yaml_files(root, "jobs")? {
            let Some(document) = read_document(root, &path, &mut problems) else { continue };
            let Some(job) = typed::<JobFile>(&document, "a job file", &mut problems) else { continue };
            if let Some(other) = jobs.get(&job.job) {
                problems.push(
                    Problem::new(format!("there are two jobs `{}`", job.job))
                        .at(document.place(&["job"]))
                        .note(format!("the other one is in {}", other.document.file.path)),
                );
                continue;
            }
            jobs.insert(job.job.clone(), JobDocument { job, document });
        }
        let Some((file, document)) = file else {
            return Err(Error::of(ErrorKind::Configuration, problems)
                .err()
                .unwrap_or_else(|| Error::bug("no problem")));
        };
        if !is_name(&file.project) {
            problems.push(bad_name("project", &file.project).at(document.place(&["project"])));
        }
        let environment = match environment.or(file.default_environment.as_deref()) {
            Some(name) if file.environments.contains_key(name) => name.to_owned(),
            None => "default".to_owned(),
            Some(name) => {
                let mut problem = Problem::new(format!("there is no environment `{name}`"));
                if environment.is_none() {
                    problem = problem.at(document.place(&["default_environment"]));
                }
                let known: Vec<&str> = file.environments.keys().map(String::as_str).collect();
                problem = match nearest(name, known.iter().copied()) {
                    Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                    None if known.is_empty() => {
                        problem.hint("The project has no environments: declare them in floodmark.yaml under `environments:`.")
                    }
                    None => problem.hint(format!("There are: {}.", known.join(", "))),
                };
                problems.push(problem);
                String::new()
            }
        };
        let settings = file.environments.get(&environment).cloned().unwrap_or_default();
        let memory = file.limits.memory.as_deref().map(files::bytes);
        if memory == Some(None) {
            problems.push(
                Problem::new("`memory` is no number of bytes")
                    .at(document.place(&["limits", "memory"]))
                    .hint("Such as `512MiB` or `2GiB`."),
            );
        }
        let mut span = |key: &str, written: Option<&String>| -> Option<Duration> {
            let micros = job::micros(written?).and_then(|micros| u64::try_from(micros).ok());
            if micros.is_none() {
                problems.push(
                    Problem::new(format!("`{key}` is no span of time"))
                        .at(document.place(&["limits", key]))
                        .hint("Such as `30s`, `10m` or `1h`."),
                );
            }
            micros.map(Duration::from_micros)
        };
        let patience = Patience::default();
        let patience = Patience {
            retries: file.limits.retries.unwrap_or(patience.retries),
            within: span("retry_within", file.limits.retry_within.as_ref()).unwrap_or(patience.within),
        };
        let lease = span("lease", file.limits.lease.as_ref()).unwrap_or(Duration::from_secs(60));
        let project = Self {
            patience,
            lease,
            root: root.to_owned(),
            name: file.project.clone(),
            environment,
            settings,
            limits: Limits {
                memory_bytes: memory.flatten().unwrap_or(1 << 30),
                spill: root.join(file.limits.spill.as_deref().unwrap_or(".floodmark/spill")),
            },
            connections,
            jobs,
        };
        // A connection whose own lines are wrong was told already: those that use it are not.
        let told = problems.len();
        check::check(&project, &document, &mut problems);
        let found = problems.split_off(told);
        let follows = |problem: &Problem| {
            declared.iter().any(|name| problem.message == format!("there is no connection `{name}`"))
        };
        problems.extend(found.into_iter().filter(|problem| !follows(problem)));
        Error::of(ErrorKind::Configuration, problems)?;
        Ok(project)
    }

    /// Opens a connection: resolves its references and checks its options. Reaches nothing.
    ///
    /// # Errors
    ///
    /// A reference that leads nowhere, or an option that does not fit.
    pub fn connection(&self, name: &str) -> Result<Arc<dyn Connection>> {
        if name == PROJECT_CONNECTION && !self.connections.contains_key(name) {
            let connector = Connector::named("files").ok_or_else(|| Error::bug("no connector for files"))?;
            let values = serde_json::json!({ "root": "." });
            return (connector.open)(Options {
                name: name.to_owned(),
                base: self.root.clone(),
                values,
                spill: self.limits.spill.clone(),
            });
        }
        let file = self
            .connections
            .get(name)
            .ok_or_else(|| Error::configuration(format!("there is no connection `{name}`")))?;
        let mut values = file.options.clone();
        let changes = file.place.as_ref().and_then(|_| self.settings.connections.get(name));
        if let (Some(object), Some(changes)) = (values.as_object_mut(), changes) {
            for (key, value) in changes {
                object.insert(key.clone(), value.clone().into());
            }
        }
        let at = |error: Error| match &file.place {
            Some(place) => error.at(place.clone()),
            None => match format!("FLOODMARK_CONN_{}", name.to_uppercase()) {
                set if variable(&self.root, &set).is_some() => {
                    error.note(format!("`{set}` gives this connection"))
                }
                _ => error,
            },
        };
        if file.place.is_some() {
            resolve(&mut values, &self.root)
                .map_err(|error| at(error.while_doing(format!("connection `{name}` cannot be used"))))?;
        }
        let who = file.connector.credentials;
        let said = who.iter().any(|option| file.options.get(option).is_some());
        for (variable_name, option) in file.connector.variables {
            if said && who.contains(option) {
                continue;
            }
            if let (Some(object), None) = (values.as_object_mut(), file.options.get(option))
                && let Some(value) = variable(&self.root, variable_name)
            {
                object.entry(*option).or_insert(value.into());
            }
        }
        let schema = (file.connector.options)().to_value();
        typed_by(&schema, &mut values)
            .map_err(|error| at(error.while_doing(format!("connection `{name}` cannot be used"))))?;
        for (option, about) in
            schema.pointer("/properties").and_then(serde_json::Value::as_object).into_iter().flatten()
        {
            if about.get(validate::SECRET) == Some(&true.into())
                && let Some(value) = values.get(option).and_then(serde_json::Value::as_str)
            {
                secret::remember(value);
            }
        }
        (file.connector.open)(Options {
            name: name.to_owned(),
            base: self.root.clone(),
            values,
            spill: self.limits.spill.clone(),
        })
        .map_err(at)
    }

    /// The environment's fixed `as_of`.
    ///
    /// # Errors
    ///
    /// If it is no point in time.
    pub fn as_of(&self) -> Result<Option<DateTime<Utc>>> {
        self.settings.as_of.as_deref().map(as_of).transpose()
    }

    /// The text of a file of SQL.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn sql(&self, path: &str) -> Result<Arc<SourceText>> {
        let full = self.root.join(path);
        let text = fs::read_to_string(&full)
            .map_err(|error| Error::io("read", path, error).with_kind(ErrorKind::Configuration))?;
        Ok(Arc::new(SourceText { path: path.to_owned(), text }))
    }

    /// The file of a model.
    pub fn model_path(job: &JobFile, model: &str) -> String {
        match job.models.get(model) {
            Some(Some(path)) => path.clone(),
            _ => format!("sql/mappings/{}/{model}.sql", job.job),
        }
    }
}

/// A point in time, as `--as-of` and `as_of:` take it.
///
/// # Errors
///
/// If it is none.
pub fn as_of(written: &str) -> Result<DateTime<Utc>> {
    crate::connector::columns::instant(written, None, Some(chrono_tz::UTC))
        .ok()
        .and_then(DateTime::from_timestamp_micros)
        .ok_or_else(|| {
            Error::configuration(format!("`{written}` is no point in time"))
                .hint("Such as `2026-11-01T01:30:00Z`, or `2026-11-01`.")
        })
}

fn read_document(root: &Path, path: &str, problems: &mut Vec<Problem>) -> Option<Document> {
    let text = match fs::read(root.join(path)) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                problems.push(
                    Problem::new(format!("`{path}` is not UTF-8 at byte {at}")).hint("Save it as UTF-8."),
                );
                return None;
            }
        },
        Err(error) => {
            problems.push(Problem::new(format!("`{path}` cannot be read")).note(error.to_string()));
            return None;
        }
    };
    yaml::parse(Arc::new(SourceText { path: path.to_owned(), text }), problems)
}

fn typed<T: serde::de::DeserializeOwned + schemars::JsonSchema>(
    document: &Document,
    what: &str,
    problems: &mut Vec<Problem>,
) -> Option<T> {
    let found = validate::validate(document, &schemars::schema_for!(T), what);
    if !found.is_empty() {
        problems.extend(found);
        return None;
    }
    match serde_json::from_value(document.root.to_json()) {
        Ok(value) => Some(value),
        Err(error) => {
            problems.push(
                Problem::new(format!("{what} cannot be understood"))
                    .note(error.to_string())
                    .at(document.place(&[])),
            );
            None
        }
    }
}

fn read_connections(document: &Document, problems: &mut Vec<Problem>) -> IndexMap<String, ConnectionFile> {
    let mut connections = IndexMap::new();
    for Entry { key, node, .. } in document.root.entries() {
        if !is_name(key) {
            problems.push(bad_name("connection", key).at(document.key_place(&[key])));
        }
        let kinds: Vec<&str> = CONNECTORS.iter().map(|connector| connector.name).collect();
        let Some(kind) = node.get("kind").and_then(yaml::Node::text) else {
            let problem = Problem::new(format!("connection `{key}` needs a `kind`"));
            problems
                .push(problem.at(document.key_place(&[key])).hint(format!("One of: {}.", kinds.join(", "))));
            continue;
        };
        let Some(connector) = Connector::named(kind) else {
            let mut problem =
                Problem::new(format!("there is no connector `{kind}`")).at(document.place(&[key, "kind"]));
            problem = match nearest(kind, kinds.iter().copied()) {
                Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                None => problem.hint(format!("One of: {}.", kinds.join(", "))),
            };
            problems.push(problem);
            continue;
        };
        let mut options = node.clone();
        if let yaml::Value::Map(entries) = &mut options.value {
            entries.retain(|entry| entry.key != "kind");
        }
        let found = validate::validate_options(
            document,
            &options,
            &(connector.options)(),
            &format!("a `{kind}` connection"),
        );
        if found.is_empty() {
            let place = document.key_place(&[key]);
            let file = ConnectionFile { connector, options: options.to_json(), place: Some(place) };
            connections.insert(key.clone(), file);
        } else {
            problems.extend(found);
        }
    }
    connections
}

fn bad_name(what: &str, name: &str) -> Problem {
    Problem::new(format!("`{name}` cannot name a {what}"))
        .hint("Use lower-case letters, digits and `_`, starting with a letter, so that SQL takes it without quotes.")
}

/// The YAML files of a folder, sorted.
fn yaml_files(root: &Path, folder: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(root.join(folder)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", folder, error)),
    };
    let mut files: Vec<String> = entries
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".yaml") || name.ends_with(".yml"))
        .map(|name| format!("{folder}/{name}"))
        .collect();
    files.sort();
    Ok(files)
}

/// Replaces every `${env:…}` and `${file:…}` in the strings of `value`.
/// Gives options that came as text, from a reference or a variable, the types that they have.
fn typed_by(schema: &serde_json::Value, options: &mut serde_json::Value) -> Result<()> {
    for (name, value) in options.as_object_mut().into_iter().flatten() {
        let types = schema.pointer(&format!("/properties/{name}/type"));
        let is = |wanted: &str| {
            types.is_some_and(|types| {
                types == wanted || types.as_array().is_some_and(|types| types.contains(&wanted.into()))
            })
        };
        let Some(text) = value.as_str().filter(|_| !is("string")) else { continue };
        let typed: Option<serde_json::Value> = if is("integer") {
            text.trim().parse::<u64>().ok().map(Into::into)
        } else if is("boolean") {
            text.trim().parse::<bool>().ok().map(Into::into)
        } else {
            continue;
        };
        let wanted = if is("integer") { "a whole number" } else { "`true` or `false`" };
        *value = typed.ok_or_else(|| {
            Error::configuration(format!("the value behind `{name}` is not {wanted}"))
                .hint("Mend the variable or the file that the reference names.")
        })?;
    }
    Ok(())
}

fn resolve(value: &mut serde_json::Value, root: &Path) -> Result<()> {
    match value {
        serde_json::Value::String(text) => *text = references(text, root)?,
        serde_json::Value::Array(items) => items.iter_mut().try_for_each(|item| resolve(item, root))?,
        serde_json::Value::Object(entries) => {
            entries.values_mut().try_for_each(|entry| resolve(entry, root))?;
        }
        _ => {}
    }
    Ok(())
}

fn references(text: &str, root: &Path) -> Result<String> {
    let mut resolved = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once("${") {
        resolved.push_str(before);
        let (reference, after) = behind.split_once('}').ok_or_else(|| {
            Error::configuration("a reference `${` is not closed")
                .hint("Write `${env:NAME}` or `${file:path}`.")
        })?;
        resolved.push_str(&reference_value(reference, root)?);
        rest = after;
    }
    resolved.push_str(rest);
    Ok(resolved)
}

fn reference_value(reference: &str, root: &Path) -> Result<String> {
    match reference.split_once(':') {
        Some(("env", name)) => {
            let (name, default) = match name.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (name, None),
            };
            let set = variable(root, name).filter(|value| !value.is_empty());
            set.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
                Error::configuration(format!("the variable `{name}` is not set, or is empty"))
                    .hint(format!("Set {name} in the environment or in the project's `.env`; for what is no secret, give a default: `${{env:{name}:-value}}`."))
            })
        }
        Some(("file", path)) => fs::read_to_string(root.join(path))
            .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
            .map_err(|error| {
                Error::io("read the referenced file", path, error).with_kind(ErrorKind::Configuration)
            }),
        _ => Err(Error::configuration(format!("`${{{reference}}}` is no reference"))
            .hint("Write `${env:NAME}` or `${file:path}`.")),
    }
}

/// A variable of the environment, or else of the project's `.env`.
pub fn variable(root: &Path, name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    let set = std::env::var(name).ok();
    set.or_else(|| dotenv(root).remove(name))
}

/// All variables that begin with `prefix`, by what follows it.
fn variables(root: &Path, prefix: &str) -> BTreeMap<String, String> {
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    let set = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let all = dotenv(root).into_iter().chain(set);
    all.filter_map(|(name, value)| Some((name.strip_prefix(prefix)?.to_owned(), value))).collect()
}

/// The variables of the project's `.env`: lines of `NAME=value`, comments with `#`.
fn dotenv(root: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(root.join(".env")).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| {
            let name = name.trim().trim_start_matches("export ").trim();
            (name.to_owned(), value.trim().trim_matches(['"', '\'']).to_owned())
        })
        .collect()
}

pub(crate) fn name_problem(what: &str, name: &str, place: Place) -> Option<Problem> {
    (!is_name(name)).then(|| bad_name(what, name).at(place))
}

pub(crate) fn output_name_problem(name: &str, place: Place) -> Option<Problem> {
    let last = name.rsplit('.').next().unwrap_or_default();
    if ["floodmark_", "fm_"].iter().any(|ours| last.starts_with(ours)) {
        return Some(
            Problem::new(format!("`{name}` cannot name an output"))
                .at(place)
                .hint("Names that start with `floodmark_` or `fm_` are floodmark's own tables."),
        );
    }
    (!is_output_name(name)).then(|| {
        Problem::new(format!("`{name}` cannot name an output"))
            .at(place)
            .hint("Use letters, digits, `_` and `-`, in words joined by dots: `finance.journal`.")
    })
}
