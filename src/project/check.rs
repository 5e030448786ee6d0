//! What a schema cannot say: names that must exist, keys that need each other.
//!
//! Every mistake of the project is collected; nothing is reached and no SQL is read.

use std::collections::HashMap;

use super::{JobDocument, PROJECT_CONNECTION, Project, name_problem, output_name_problem, yaml::Document};
use crate::{
    connector::{
        http::path::JsonPath,
        spec::{ApiRequest, Deletes, Method, Mode, OnNull, PageStyle},
    },
    error::{Problem, nearest},
    job::{CheckSpec, JobFile, OnFail, SourceSpec, micros, parts_per_million},
    types::{ColumnType, TYPE_NAMES},
};

/// Adds everything that is wrong with `project` to `problems`.
pub(super) fn check(project: &Project, document: &Document, problems: &mut Vec<Problem>) {
    for (environment, spec) in &project_environments(document) {
        for connection in spec {
            if !project.connections.contains_key(connection) {
                let place = document.key_place(&["environments", environment, "connections", connection]);
                problems.push(unknown("connection", connection, project.connections.keys(), place));
            }
        }
    }
    let mut owners: HashMap<(String, String), String> = HashMap::new();
    for (name, JobDocument { job, document }) in &project.jobs {
        problems.extend(name_problem("job", name, document.place(&["job"])));
        Job { project, job, document, problems }.check();
        for output in job.target.outputs.keys() {
            let owner = owners.insert((job.target.connection.clone(), output.clone()), name.clone());
            if let Some(owner) = owner {
                problems.push(
                    Problem::new(format!("output `{output}` belongs to job `{owner}` already"))
                        .at(document.key_place(&["target", "outputs", output]))
                        .hint(
                            "An output has one job: its record is its history. Give this one another name.",
                        ),
                );
            }
        }
    }
}

fn project_environments(document: &Document) -> Vec<(String, Vec<String>)> {
    let environments = document.root.get("environments").map(super::yaml::Node::entries).unwrap_or_default();
    environments
        .iter()
        .map(|environment| {
            let connections =
                environment.node.get("connections").map(super::yaml::Node::entries).unwrap_or_default();
            (environment.key.clone(), connections.iter().map(|entry| entry.key.clone()).collect())
        })
        .collect()
}

fn unknown<'a>(
    what: &str,
    name: &str,
    known: impl Iterator<Item = &'a String>,
    place: crate::error::Place,
) -> Problem {
    let known: Vec<&str> = known.map(String::as_str).collect();
    let problem = Problem::new(format!("there is no {what} `{name}`")).at(place);
    match nearest(name, known.iter().copied()) {
        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
        None if known.is_empty() => problem,
        None => problem.hint(format!("There are: {}.", known.join(", "))),
    }
}

struct Job<'a> {
    project: &'a Project,
    job: &'a JobFile,
    document: &'a Document,
    problems: &'a mut Vec<Problem>,
}

impl Job<'_> {
    fn say(&mut self, path: &[&str], message: impl Into<String>, hint: impl Into<String>) {
        self.problems.push(Problem::new(message).at(self.document.place(path)).hint(hint));
    }

    /// A list of columns names each once.
    fn once(&mut self, columns: &[String], path: &[&str]) {
        let twice = columns
            .iter()
            .enumerate()
            .find(|(at, column)| columns.iter().take(*at).any(|other| other == *column));
        if let Some((_, column)) = twice {
            self.say(path, format!("`{column}` is listed twice"), "Keep one of them.");
        }
    }

    fn relations(&self) -> Vec<&String> {
        self.job.sources.keys().chain(self.job.models.keys()).collect()
    }

    fn check(&mut self) {
        for (name, source) in &self.job.sources {
            self.source(name, source);
        }
        for (name, path) in &self.job.models {
            self.problems.extend(name_problem("model", name, self.document.key_place(&["models", name])));
            if self.job.sources.contains_key(name) {
                self.say(
                    &["models", name],
                    format!("`{name}` is a source already"),
                    "Sources and models share their names in SQL: rename one.",
                );
            }
            let file = Project::model_path(self.job, name);
            if !self.project.root.join(&file).is_file() {
                let message = format!("model `{name}`: there is no file `{file}`");
                let hint = if path.is_some() {
                    "Mend the path; it is relative to the project's folder."
                } else {
                    "Write the SELECT there, or give its path."
                };
                self.say(&["models", name], message, hint);
            }
        }
        for (name, param) in &self.job.params {
            self.problems.extend(name_problem("parameter", name, self.document.key_place(&["params", name])));
            if param.r#type.parse::<ColumnType>().is_err() {
                self.say(
                    &["params", name, "type"],
                    format!("there is no type `{}`", param.r#type),
                    "Such as `string`, `int`, `decimal(18,2)`, `date`.",
                );
            }
        }
        self.checks();
        self.target();
    }

    fn source(&mut self, name: &str, source: &SourceSpec) {
        self.problems.extend(name_problem("source", name, self.document.key_place(&["sources", name])));
        let at = ["sources", name];
        let given = [
            ("table", &source.table),
            ("tables", &source.tables),
            ("query", &source.query),
            ("file", &source.file),
            ("files", &source.files),
        ];
        let request = source.request.as_ref().map(|_| "request");
        let given: Vec<&str> =
            given.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| *key).chain(request).collect();
        match given.as_slice() {
            [_] => {}
            [] => self.say(
                &at,
                format!("source `{name}` says nothing about what to read"),
                "Add one of `table`, `tables`, `query`, `file`, `files`, `request`.",
            ),
            [_, second, ..] => {
                self.say(
                    &["sources", name, second],
                    format!("source `{name}` has both {}", given.join(" and ")),
                    "Keep one of them.",
                );
            }
        }
        match &source.connection {
            Some(connection) if !self.project.connections.contains_key(connection) => {
                let place = self.document.place(&["sources", name, "connection"]);
                self.problems.push(unknown("connection", connection, self.project.connections.keys(), place));
            }
            None if source.table.is_some()
                || source.tables.is_some()
                || source.query.is_some()
                || source.request.is_some() =>
            {
                self.say(
                    &at,
                    format!("source `{name}` has no connection"),
                    "Add `connection:` with a name of connections.yaml.",
                );
            }
            _ => {}
        }
        if let Some(query) = &source.query
            && !self.project.root.join(query).is_file()
        {
            self.say(
                &["sources", name, "query"],
                format!("source `{name}`: there is no file `{query}`"),
                "Mend the path; it is relative to the project's folder.",
            );
        }
        if let Some(request) = &source.request {
            self.request(name, source, request);
        }
        self.once(&source.key, &["sources", name, "key"]);
        if let Some(incremental) = &source.incremental {
            self.once(&incremental.cursor.to_vec(), &["sources", name, "incremental", "cursor"]);
        }
        if source.tables.is_none() && (!source.except.is_empty() || !source.each.is_empty()) {
            let key = if source.except.is_empty() { "each" } else { "except" };
            self.say(&["sources", name, key], format!("`{key}` goes with `tables`"), "Remove it.");
        }
        if source.read.is_some() && source.files.is_none() {
            self.say(
                &["sources", name, "read"],
                "`read` goes with `files`",
                "A `file` is read whole on every run; use `files` to read each file once.",
            );
        }
        self.once(&source.unfit_as_null, &["sources", name, "unfit_as_null"]);
        let places = source.incremental.iter().flat_map(|incremental| incremental.cursor.to_vec());
        for column in source.key.iter().cloned().chain(places).filter(|c| source.unfit_as_null.contains(c)) {
            self.say(
                &["sources", name, "unfit_as_null"],
                format!("`{column}` says which row it is, and cannot be null"),
                "Remove it here; such rows can be set aside: `bad_rows: quarantine`.",
            );
        }
        for (column, written) in &source.columns {
            if let Err(error) = written.parse::<ColumnType>() {
                let word = written.split('(').next().unwrap_or_default().trim();
                let near =
                    nearest(word, TYPE_NAMES.iter().map(|name| name.split('(').next().unwrap_or_default()));
                let hint = match near {
                    Some(near) if near != word => format!("Did you mean `{near}`?"),
                    _ => format!("Types: {}.", TYPE_NAMES.join(", ")),
                };
                self.say(&["sources", name, "columns", column], error.to_string(), hint);
            }
        }
        if let Some(zone) = &source.timezone
            && let Err(error) = crate::connector::columns::zone(zone)
        {
            for problem in error.into_problems() {
                self.problems.push(problem.at(self.document.place(&["sources", name, "timezone"])));
            }
        }
        if let Some(incremental) = &source.incremental {
            if incremental.cursor.to_vec().is_empty() {
                self.say(
                    &["sources", name, "incremental", "cursor"],
                    "the cursor has no column",
                    "Name a column that grows, such as `updated_at`.",
                );
            }
            let append = self.job.target.outputs.iter().find(|(_, output)| output.mode == Mode::Append);
            if let (OnNull::Include, Some((output, _))) = (incremental.on_null, append) {
                self.say(
                    &["sources", name, "incremental", "on_null"],
                    format!("rows without a cursor are read on every run, and output `{output}` would hold them again each time"),
                    "Use `mode: merge` with a `key`, or `on_null: exclude`.",
                );
            }
            if let Some(overlap) = &incremental.overlap {
                let path = ["sources", name, "incremental", "overlap"];
                if overlap.get().is_none() {
                    self.say(
                        &path,
                        "this is no overlap",
                        "Write a span of time such as `2h` or `3d`, or a count for whole numbers.",
                    );
                }
                if let Some((output, _)) = append {
                    self.say(
                        &path,
                        format!("an overlap reads rows again, and output `{output}` would hold them twice"),
                        "Use `mode: merge` with a `key`, or remove the overlap.",
                    );
                }
            }
        }
    }

    fn request(&mut self, name: &str, source: &SourceSpec, request: &ApiRequest) {
        let at = ["sources", name, "request"];
        // An answer whose format has a kind is a file.
        let is_file = source.format.as_ref().is_some_and(|format| format.kind.is_some());
        let of_lists = [
            ("records", request.records.is_some()),
            ("fields", !request.fields.is_empty()),
            ("pages", request.pages.is_some()),
        ];
        for (key, _) in of_lists.iter().filter(|(_, given)| *given && is_file) {
            self.say(
                &["sources", name, "request", key],
                format!(
                    "`{key}` is for lists in JSON, and the `kind` of `format` says that the answer is a file"
                ),
                "Remove one of them.",
            );
        }
        if source.columns.is_empty() && !is_file {
            self.say(
                &at,
                format!("source `{name}` declares no columns, and an API tells no types"),
                "List those that the job needs: `columns: { id: int, amount: \"decimal(18,2)\" }`.",
            );
        }
        for column in request.fields.keys() {
            if !source.columns.contains_key(column) {
                let place = self.document.key_place(&["sources", name, "request", "fields", column]);
                self.problems.push(unknown("column", column, source.columns.keys(), place));
            }
        }
        if request.body.is_some() && request.method == Method::Get {
            self.say(&["sources", name, "request", "body"], "a `get` has no body", "Add `method: post`.");
        }
        if let Some(body) = &request.body
            && serde_json::from_str::<serde_json::Value>(body).is_err()
        {
            self.say(
                &["sources", name, "request", "body"],
                "this is no JSON document",
                "Such as `body: '{ \"since\": \"$from\" }'`.",
            );
        }
        let next =
            request.pages.as_ref().and_then(|pages| pages.next.as_ref().map(|next| (pages.kind, next)));
        let next = next.filter(|(kind, _)| *kind != PageStyle::Header).map(|(_, next)| next);
        let paths = [
            (&["sources", name, "request", "records"][..], request.records.as_ref()),
            (&["sources", name, "request", "pages", "next"], next),
        ];
        let fields: Vec<([&str; 5], &String)> = request
            .fields
            .iter()
            .map(|(column, path)| (["sources", name, "request", "fields", column.as_str()], path))
            .collect();
        let fields = fields.iter().map(|(at, path)| (&at[..], Some(*path)));
        for (at, path) in paths.into_iter().chain(fields) {
            if let Some(Err(why)) = path.map(|path| path.parse::<JsonPath>()) {
                self.say(
                    at,
                    format!("this is no path into an answer: {why}"),
                    "Such as `$.data.items`, `$['odd name'][0]`, `$.groups[*].rows`.",
                );
            }
        }
        if let Some(pages) = &request.pages {
            let needs = matches!(pages.kind, PageStyle::Cursor | PageStyle::NextUrl | PageStyle::Header);
            if needs && pages.next.is_none() {
                self.say(
                    &["sources", name, "request", "pages"],
                    "nothing says where the answer tells how to go on",
                    "Add `next:`, such as `next: $.next`; for `kind: header` the header's name.",
                );
            }
            if pages.kind == PageStyle::Offset && request.method == Method::Post {
                self.say(
                    &["sources", name, "request", "pages", "kind"],
                    "pages are asked for in the query, and a `post` has its question in the body",
                    "Use `kind: link` or `kind: next_url`, or a `get`.",
                );
            }
        }
    }

    fn checks(&mut self) {
        for (on, checks) in &self.job.checks {
            if !self.relations().contains(&on) {
                let place = self.document.key_place(&["checks", on]);
                let relations = self.relations();
                self.problems.push(unknown("source or model", on, relations.into_iter(), place));
            }
            for (index, check) in checks.iter().enumerate() {
                self.one_check(on, &index.to_string(), check);
            }
        }
    }

    fn one_check(&mut self, on: &str, index: &str, check: &CheckSpec) {
        let at = ["checks", on, index];
        let kinds = kinds(check);
        if kinds.len() != 1 {
            let message = if kinds.is_empty() {
                "this check checks nothing".to_owned()
            } else {
                format!("this check has both {}", kinds.join(" and "))
            };
            self.say(
                &at,
                message,
                "A check has exactly one kind, such as `not_null`, `unique` or `expression`.",
            );
        }
        let of_rows = ["not_null", "accepted", "range", "matches", "references", "expression"];
        if check.on_fail == OnFail::Quarantine && !kinds.iter().all(|kind| of_rows.contains(kind)) {
            self.say(&["checks", on, index, "on_fail"], format!("`{}` looks at all rows together, and cannot set single ones aside", kinds.join(", ")), "Use `fail` or `warn`; rows are set aside by `not_null`, `accepted`, `range`, `matches`, `references` and `expression`.");
        }
        if let Some(ratio) = &check.max_ratio
            && parts_per_million(ratio).is_none()
        {
            self.say(
                &["checks", on, index, "max_ratio"],
                format!("`{ratio}` is no part of a whole"),
                "Write it as `0.5%`.",
            );
        }
        if let Some(file) = &check.query
            && !self.project.root.join(file).is_file()
        {
            self.say(
                &["checks", on, index, "query"],
                format!("there is no file `{file}`"),
                "Mend the path; it is relative to the project's folder.",
            );
        }
        if let Some(freshness) = &check.freshness
            && micros(&freshness.max_age).is_none()
        {
            self.say(
                &["checks", on, index, "freshness", "max_age"],
                format!("`{}` is no span of time", freshness.max_age),
                "Write it as `36h` or `3d`.",
            );
        }
        let others = check.same_total.iter().flat_map(|same| same.of.iter()).chain(&check.joined_once);
        let referenced = check
            .references
            .as_ref()
            .and_then(|references| references.r#in.split_once('.'))
            .map(|(relation, _)| relation.to_owned());
        for other in others.cloned().chain(referenced) {
            if !self.relations().contains(&&other) {
                let place = self.document.place(&at);
                let relations = self.relations();
                self.problems.push(unknown("source or model", &other, relations.into_iter(), place));
            }
        }
        if let Some(references) = &check.references
            && !references.r#in.contains('.')
        {
            self.say(
                &["checks", on, index, "references", "in"],
                format!("`{}` names no column", references.r#in),
                "Write `source.column`, such as `accounts.account`.",
            );
        }
    }

    fn target(&mut self) {
        let target = &self.job.target;
        if !self.project.connections.contains_key(&target.connection)
            && target.connection != PROJECT_CONNECTION
        {
            let place = self.document.place(&["target", "connection"]);
            self.problems.push(unknown(
                "connection",
                &target.connection,
                self.project.connections.keys(),
                place,
            ));
        }
        if let Some(shrink) = &target.guard.max_shrink
            && parts_per_million(shrink).is_none()
        {
            self.say(
                &["target", "guard", "max_shrink"],
                format!("`{shrink}` is no part of a whole"),
                "Write it as `10%`.",
            );
        }
        if let Some(most) = &target.guard.max_deleted
            && parts_per_million(most).is_none()
        {
            self.say(
                &["target", "guard", "max_deleted"],
                format!("`{most}` is no part of a whole"),
                "Write it as `10%`.",
            );
        }
        if target.outputs.is_empty() {
            self.say(&["target", "outputs"], "the job has no output", "Name a table or folder and what it holds: `outputs: { journal: { from: journal, mode: merge, key: [id] } }`.");
        }
        for (name, output) in &target.outputs {
            let place = self.document.key_place(&["target", "outputs", name]);
            let of_tables = self.job.sources.get(&output.from).is_some_and(|source| source.tables.is_some());
            if of_tables && name.matches('*').count() != 1 {
                self.problems.push(
                    Problem::new(format!(
                        "output `{name}` is made from several tables, and its name says not where theirs go"
                    ))
                    .at(place.clone())
                    .hint("Write one `*` for the table's name: `\"*\"`, or `\"copy.*\"`."),
                );
            }
            let named = if of_tables { name.replacen('*', "x", 1) } else { name.clone() };
            self.problems.extend(output_name_problem(&named, place));
            if !self.relations().contains(&&output.from) {
                let place = self.document.place(&["target", "outputs", name, "from"]);
                let relations = self.relations();
                self.problems.push(unknown("source or model", &output.from, relations.into_iter(), place));
            }
            for (columns, key) in [
                (&output.key, "key"),
                (&output.range, "range"),
                (&output.update, "update"),
                (&output.partition_by, "partition_by"),
            ] {
                self.once(columns, &["target", "outputs", name, key]);
            }
            if output.mode == Mode::Merge && output.key.is_empty() && !of_tables {
                self.say(
                    &["target", "outputs", name, "mode"],
                    format!("output `{name}` merges rows, and names no `key` to merge them by"),
                    "Add `key: [id]`, or use `mode: append`.",
                );
            }
            let at = |key: &'static str| ["target", "outputs", name.as_str(), key];
            if output.mode == Mode::History && output.key.is_empty() && !of_tables {
                self.say(
                    &at("mode"),
                    format!("output `{name}` keeps versions of rows, and names no `key` to tell rows by"),
                    "Add `key: [id]`.",
                );
            }
            if output.effective.is_some() && output.mode != Mode::History {
                self.say(&at("effective"), "`effective` goes with `mode: history`", "Remove it.");
            }
            if output.deletes != Deletes::Ignore && !matches!(output.mode, Mode::Merge | Mode::History) {
                self.say(
                    &at("deletes"),
                    "`deletes` goes with `mode: merge` or `mode: history`",
                    "Remove it: the other modes keep nothing that the model has not, or everything.",
                );
            }
            if output.deletes == Deletes::Soft && output.mode == Mode::History {
                self.say(
                    &at("deletes"),
                    "history says itself until when a row was there",
                    "Use `deletes: key_compare`: it ends the last version.",
                );
            }
            if output.mode == Mode::ReplaceRange && output.range.is_empty() {
                self.say(
                    &["target", "outputs", name, "mode"],
                    format!("output `{name}` replaces ranges, and names no `range`"),
                    "Add `range: [period]`: the columns whose values make a range.",
                );
            }
            if !output.update.is_empty() && output.mode != Mode::Merge {
                self.say(
                    &["target", "outputs", name, "update"],
                    "`update` goes with `mode: merge`",
                    "Remove it.",
                );
            }
            if output.latest_by.is_some() && output.key.is_empty() {
                self.say(
                    &["target", "outputs", name, "latest_by"],
                    "`latest_by` decides between rows with one key, and there is no `key`",
                    "Add `key: [id]`.",
                );
            }
        }
    }
}

/// The kinds that a check names.
pub(crate) fn kinds(check: &CheckSpec) -> Vec<&'static str> {
    [
        ("not_null", check.not_null.is_some()),
        ("unique", check.unique.is_some()),
        ("accepted", check.accepted.is_some()),
        ("range", check.range.is_some()),
        ("matches", check.matches.is_some()),
        ("references", check.references.is_some()),
        ("row_count", check.row_count.is_some()),
        ("freshness", check.freshness.is_some()),
        ("expression", check.expression.is_some()),
        ("query", check.query.is_some()),
        ("same_total", check.same_total.is_some()),
        ("balanced", check.balanced.is_some()),
        ("joined_once", check.joined_once.is_some()),
    ]
    .into_iter()
    .filter_map(|(kind, given)| given.then_some(kind))
    .collect()
}
