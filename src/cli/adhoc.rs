//! `sql` and `copy`: work without a project. A project of one job is made in a folder that is gone afterwards, and runs like any other.
//!
//! A place is a URL (`postgres://…`, `sqlite:erp.db`, `s3://bucket/prefix/x.csv`) or the path of a file; tables of a SELECT may be
//! places in quotes.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use indexmap::IndexMap;
use sqlparser::ast::{
    Ident, ObjectName, ObjectNamePart, Query, Statement, Visit as _, Visitor, visit_relations_mut,
};

use crate::{
    connector::spec::Mode,
    error::{Error, Result, SourceText},
    project::Project,
};

/// The job's name, and its folder's.
pub(super) const JOB: &str = "adhoc";

/// What the query is called in messages.
const QUERY: &str = "query.sql";

/// What stands before a number in the names of connections that nobody named.
const PLACE: &str = "place_";

/// A project that is gone when this is dropped.
pub(super) struct Adhoc {
    folder: tempfile::TempDir,
    connections: IndexMap<String, String>,
}

/// Where something is: a connection, and what to read there.
struct Found {
    connection: String,
    /// What a source reads there, if the place is a file or a pattern.
    file: Option<String>,
}

/// What `copy` is asked for.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) table: Option<String>,
    pub(super) query: Option<String>,
    pub(super) to_table: Option<String>,
    pub(super) mode: Mode,
    pub(super) key: Vec<String>,
}

impl Adhoc {
    pub(super) fn new() -> Result<Self> {
        let folder = tempfile::tempdir()
            .map_err(|error| Error::io("make a folder in", std::env::temp_dir().display(), error))?;
        Ok(Self { folder, connections: IndexMap::new() })
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let full = self.folder.path().join(path);
        let failed = |error| Error::io("write", full.display(), error);
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        fs::write(&full, text).map_err(failed)
    }

    /// The connection of a URL; one of a bucket or a folder may end with a file.
    fn place(&mut self, written: &str) -> Result<Found> {
        let scheme = written
            .split_once(':')
            .map(|(scheme, _)| scheme)
            .filter(|scheme| scheme.len() > 1 && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        let absolute = absolute(written);
        let written = absolute.as_str();
        let (url, file) = match scheme {
            Some("s3" | "gs" | "az" | "file") => {
                let (plain, options) =
                    written.split_once('?').map_or((written, ""), |(plain, options)| (plain, options));
                let (folder, last) = plain.rsplit_once('/').unwrap_or((plain, ""));
                let is_file = last.contains(['.', '*']) && !folder.ends_with('/') && !folder.ends_with(':');
                let question = if options.is_empty() { "" } else { "?" };
                if is_file {
                    (format!("{folder}{question}{options}"), Some(read_file(last)))
                } else {
                    (written.to_owned(), None)
                }
            }
            // What is behind `?` belongs to the file; who writes `http` on a command line means it.
            Some("http" | "https") => {
                let (plain, query) = written.split_once('?').unwrap_or((written, ""));
                // What is so long may be a signature.
                let values = query.split('&').filter_map(|pair| Some(pair.split_once('=')?.1));
                values.filter(|value| value.len() >= 20).for_each(crate::secret::remember);
                let (folder, last) = plain.rsplit_once('/').unwrap_or((plain, ""));
                let file = if query.is_empty() { last.to_owned() } else { format!("{last}?{query}") };
                let plainly = if written.starts_with("http:") { "?allow_http=true" } else { "" };
                (format!("{folder}/{plainly}"), Some(format!("file: {}", quoted(&file))))
            }
            Some(_) => (written.to_owned(), None),
            None => {
                let path = std::env::current_dir().unwrap_or_default().join(written);
                let wild = |part: &std::path::Component<'_>| {
                    part.as_os_str().to_string_lossy().contains(['*', '?', '[', '{'])
                };
                let fixed: PathBuf = path.components().take_while(|part| !wild(part)).collect();
                let fixed = if fixed == path {
                    path.parent().map(Path::to_path_buf).unwrap_or_default()
                } else {
                    fixed
                };
                let file = path.strip_prefix(&fixed).unwrap_or(&path).to_string_lossy().into_owned();
                (format!("file://{}", fixed.display()), Some(read_file(&file)))
            }
        };
        Ok(Found { connection: self.connection(url), file })
    }

    /// The connection of a whole place: a folder, a bucket, a database.
    fn whole(&mut self, written: &str) -> String {
        self.connection(absolute(written))
    }

    fn connection(&mut self, url: String) -> String {
        let known = self.connections.iter().find(|(_, known)| **known == url).map(|(name, _)| name.clone());
        let name = known.unwrap_or_else(|| format!("{PLACE}{}", self.connections.len() + 1));
        self.connections.insert(name.clone(), url);
        name
    }

    /// The project of a SELECT whose tables are places.
    pub(super) fn of_query(&mut self, sql: &str) -> Result<()> {
        let file = Arc::new(SourceText { path: QUERY.to_owned(), text: sql.to_owned() });
        let mut statement = crate::plan::sql::parse(&file, &IndexMap::new())?.statement;
        let Statement::Query(query) = &mut statement else { return Err(Error::bug("a SELECT that is none")) };
        let sources = self.name_places(query)?;
        self.write(QUERY, &statement.to_string())?;
        self.project(&format!(
            "job: {JOB}\nsources: {{{sources} }}\nmodels: {{ answer: {QUERY} }}\ntarget:\n  connection: project\n  outputs: {{ answer: {{ from: answer, mode: replace }} }}\n"
        ))
    }

    /// Gives each place in a SELECT a name; the sources of these names, as YAML.
    fn name_places(&mut self, query: &mut Query) -> Result<String> {
        let mut places: IndexMap<String, String> = IndexMap::new();
        let own = ctes(query);
        let walk: std::ops::ControlFlow<()> = visit_relations_mut(query, |relation: &mut ObjectName| {
            let written =
                relation.0.iter().filter_map(ObjectNamePart::as_ident).map(|part| part.value.clone());
            let written = written.collect::<Vec<_>>().join(".");
            if !own.contains(&written) {
                let next = format!("_{PLACE}{}", places.len() + 1);
                let name = places.entry(written).or_insert(next).clone();
                *relation = ObjectName(vec![ObjectNamePart::Identifier(Ident::new(name))]);
            }
            std::ops::ControlFlow::Continue(())
        });
        debug_assert!(walk.is_continue());
        let mut sources = String::new();
        for (written, name) in places {
            let (place, table) = match written.split_once('#') {
                Some((place, table)) => (place.to_owned(), Some(table.to_owned())),
                None => (written.clone(), None),
            };
            let found = self.place(&place)?;
            let what = match (table, found.file) {
                (Some(table), _) => format!("table: {}", quoted(&table)),
                (None, Some(file)) => file,
                (None, None) => {
                    return Err(Error::configuration(format!(
                        "`{}` is a database, and names no table",
                        hidden(&place)
                    ))
                    .hint("Put its table behind a `#`: `from 'sqlite:erp.db#orders'`."));
                }
            };
            sources.push_str(&format!(" {name}: {{ connection: {}, {what} }},", found.connection));
        }
        Ok(sources)
    }

    /// The project of a copy. The Parquet file that is to be made, if it is one.
    pub(super) fn of_copy(&mut self, copy: &Copy) -> Result<Option<PathBuf>> {
        let from = self.place(&copy.from)?;
        let what = match (&copy.table, &copy.query, from.file) {
            (Some(table), ..) => format!("table: {}", quoted(table)),
            (None, Some(query), _) => {
                self.write(QUERY, query)?;
                format!("query: {QUERY}")
            }
            (None, None, Some(file)) => file,
            (None, None, None) => {
                return Err(Error::configuration(format!(
                    "nothing says what to copy from `{}`",
                    hidden(&copy.from)
                ))
                .hint("Add `--table NAME`, or `--query 'select …'` in the source's own dialect."));
            }
        };
        let stem = |path: &str| {
            let last = path.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
            last.split('.').next().unwrap_or_default().to_owned()
        };
        let is_url = copy.to.split_once(':').is_some_and(|(scheme, _)| scheme.len() > 1);
        if !is_url && !copy.to.ends_with(".parquet") {
            return Err(Error::configuration(format!("`{}` is no place to copy to", copy.to))
                .hint("A file `….parquet`, or a URL: `sqlite:out.db`, `postgres://…`, `s3://bucket/prefix`, `file:folder`."));
        }
        let source = format!("job: {JOB}\nsources:\n  data: {{ connection: {}, {what} }}\n", from.connection);
        if !is_url {
            self.project(&format!("{source}target:\n  connection: project\n  outputs: {{ data: {{ from: data, mode: replace }} }}\n"))?;
            return Ok(Some(std::env::current_dir().unwrap_or_default().join(&copy.to)));
        }
        let name = match (&copy.to_table, &copy.table) {
            (Some(name), _) => name.clone(),
            (None, Some(table)) => table.clone(),
            (None, None) => stem(&copy.from),
        };
        let last = copy.to.rsplit('/').next().unwrap_or_default().split('?').next().unwrap_or_default();
        let is_file = [".parquet", ".csv", ".json", ".jsonl", ".gz", ".zst"]
            .iter()
            .any(|ending| last.ends_with(ending));
        if is_file && !copy.to.starts_with("sqlite:") {
            return Err(Error::configuration(
                "a copy into a folder or a bucket is an output with a manifest, and no single file",
            )
            .hint("Name the folder, and the output with `--to-table`; or a local file `….parquet`."));
        }
        let to = self.whole(&copy.to);
        let job = source.replacen(
            JOB,
            &format!("copy_{}", name.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")),
            1,
        );
        let key: Vec<String> = copy.key.iter().map(|column| quoted(column)).collect();
        self.project(&format!(
            "{job}target:\n  connection: {}\n  outputs:\n    {}: {{ from: data, mode: {}, key: [{}] }}\n",
            to,
            quoted(&name),
            copy.mode,
            key.join(", ")
        ))?;
        Ok(None)
    }

    fn project(&self, job: &str) -> Result<()> {
        self.write("floodmark.yaml", &format!("project: {JOB}\n"))?;
        self.write(&format!("jobs/{JOB}.yaml"), job)
    }

    /// The project, once it is written.
    pub(super) fn load(&self) -> Result<Project> {
        let given: Vec<(String, String)> =
            self.connections.iter().map(|(name, url)| (name.clone(), url.clone())).collect();
        Project::load_with(self.folder.path(), None, &given).map_err(plain)
    }
}

/// Errors without the places and names that nobody wrote.
pub(super) fn plain(error: Error) -> Error {
    let kind = error.kind();
    let unnamed = |text: &mut String| {
        let before = format!("connection `{PLACE}");
        if let Some(behind) = text.strip_prefix(&before).and_then(|rest| rest.split_once(": ")) {
            *text = behind.1.to_owned();
        }
    };
    let problems = error.into_problems().into_iter().map(|mut problem| {
        if problem.place.as_ref().is_some_and(|place| place.file.path != QUERY) {
            problem.place = None;
        }
        unnamed(&mut problem.message);
        problem.notes.iter_mut().for_each(unnamed);
        if problem.hint.as_deref() == Some(crate::plan::sql::LOOK_UP) {
            problem.hint = Some("Without a column's name (`SELECT *`) all of them are shown.".to_owned());
        }
        problem
    });
    match Error::of(kind, problems.collect()) {
        Err(error) => error,
        Ok(()) => Error::bug("an error without a problem"),
    }
}

fn read_file(file: &str) -> String {
    let key = if file.contains(['*', '?', '[', '{']) { "read: always, files" } else { "file" };
    format!("{key}: {}", quoted(file))
}

/// A text as YAML and JSON take it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A URL of a file-like system with its relative path made absolute: the project lies elsewhere.
fn absolute(url: &str) -> String {
    match url.split_once(':') {
        Some((scheme @ ("sqlite" | "file"), path)) if !path.starts_with('/') => {
            let full = std::env::current_dir().unwrap_or_default().join(path);
            format!("{scheme}://{}", full.display())
        }
        _ => url.to_owned(),
    }
}

/// A place without what may be a secret.
fn hidden(place: &str) -> String {
    let scheme = place.split_once("://").map(|(scheme, _)| scheme);
    scheme.map_or_else(|| place.to_owned(), |scheme| format!("{scheme}://…"))
}

/// A name as SQL compares it.
fn folded(name: &Ident) -> String {
    if name.quote_style.is_some() { name.value.clone() } else { name.value.to_lowercase() }
}

/// The names that a SELECT gives to parts of itself, wherever they stand.
fn ctes(query: &Query) -> Vec<String> {
    struct Names(Vec<String>);

    impl Visitor for Names {
        type Break = ();

        fn pre_visit_query(&mut self, query: &Query) -> std::ops::ControlFlow<()> {
            let tables = query.with.iter().flat_map(|with| &with.cte_tables);
            self.0.extend(tables.map(|table| folded(&table.alias.name)));
            std::ops::ControlFlow::Continue(())
        }
    }

    let mut names = Names(Vec::new());
    let walk = query.visit(&mut names);
    debug_assert!(walk.is_continue());
    names.0
}
