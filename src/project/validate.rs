//! Checks a YAML tree against the JSON Schema of the structs that it will become.
//!
//! `serde` stops at the first mistake and `schemars` knows everything that `serde` will accept; so the tree is
//! walked beside the schema first, and every mistake of a file is told at once, each with its place, the
//! nearest valid spelling and a hint. What passes here deserialises. Editors and `floodmark schema` use the
//! same schemas.
//!
//! Understood is what `schemars` writes for our structs: `type`, `properties`, `required`,
//! `additionalProperties`, `items`, `enum`, `const`, `anyOf`, `oneOf`, `$ref`, `minimum` and `pattern`-free
//! text. A keyword outside that list is ignored here and left to `serde`.

use std::sync::Arc;

use serde_json::Value as Json;

use super::yaml::{Document, Entry, Node, Value};
use crate::{
    error::{Place, Problem, nearest},
    secret,
};

/// All that is wrong with `document` as a `what` ("a job file").
pub fn validate(document: &Document, schema: &schemars::Schema, what: &str) -> Vec<Problem> {
    validate_node(document, &document.root, schema, what)
}

/// The same for one node of a document.
fn validate_node(document: &Document, node: &Node, schema: &schemars::Schema, what: &str) -> Vec<Problem> {
    walk(document, node, schema, what, false)
}

/// The same for a connection's options, where a reference (`${env:NAME}`) may stand for a value of any type.
pub fn validate_options(
    document: &Document,
    node: &Node,
    schema: &schemars::Schema,
    what: &str,
) -> Vec<Problem> {
    walk(document, node, schema, what, true)
}

fn walk(
    document: &Document,
    node: &Node,
    schema: &schemars::Schema,
    what: &str,
    references: bool,
) -> Vec<Problem> {
    let mut walk = Walk { document, root: schema.as_value(), references, problems: Vec::new() };
    walk.node(node, schema.as_value(), what);
    let remedy = |problem: Problem| match problem.hint {
        Some(_) => problem,
        None => problem
            .hint("`floodmark schema job`, `project` or `connections` documents every key and its values."),
    };
    walk.problems.into_iter().map(remedy).collect()
}

/// The key by which a schema says that an option is a secret.
pub const SECRET: &str = "x-secret";

struct Walk<'a> {
    document: &'a Document,
    root: &'a Json,
    /// Whether a reference may stand for a value.
    references: bool,
    problems: Vec<Problem>,
}

impl<'a> Walk<'a> {
    fn problem(&mut self, span: &std::ops::Range<usize>, problem: Problem) {
        let place = Place { file: Arc::clone(&self.document.file), span: span.clone() };
        self.problems.push(problem.at(place));
    }

    fn resolve(&self, schema: &'a Json) -> &'a Json {
        let mut schema = schema;
        while let Some(reference) = schema.get("$ref").and_then(Json::as_str) {
            let Some(target) = reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer))
            else {
                return schema;
            };
            schema = target;
        }
        schema
    }

    fn node(&mut self, node: &Node, schema: &'a Json, what: &str) {
        let schema = self.resolve(schema);
        if self.references && node.text().is_some_and(|text| text.contains("${")) {
            // What it stands for is looked at when the connection is opened.
            return;
        }
        if let Some(branches) = schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Json::as_array) {
            self.branches(node, branches, what);
            return;
        }
        if let Some(allowed) = schema.get("enum").and_then(Json::as_array) {
            self.one_of(node, allowed.iter().filter_map(Json::as_str).collect(), what);
            return;
        }
        if let Some(constant) = schema.get("const").and_then(Json::as_str) {
            self.one_of(node, vec![constant], what);
            return;
        }
        if !fits(node, schema) {
            let wanted = wanted(schema);
            let found = node.value.kind();
            let mut problem = Problem::new(format!("{what} must be {wanted}, and this is {found}"));
            problem.hint = hint(node, schema);
            self.problem(&node.span, problem);
            return;
        }
        match &node.value {
            Value::Map(_) => self.map(node, schema, what),
            Value::List(items) => {
                if let Some(schema) = schema.get("items") {
                    for item in items {
                        self.node(item, schema, &format!("each entry of {what}"));
                    }
                }
            }
            Value::Number(spelled) => {
                let below = schema
                    .get("minimum")
                    .and_then(Json::as_f64)
                    .filter(|minimum| spelled.parse::<f64>().is_ok_and(|number| number < *minimum));
                if let Some(minimum) = below {
                    self.problem(&node.span, Problem::new(format!("{what} must be at least {minimum}")));
                }
            }
            Value::Null | Value::Bool(_) | Value::Text(_) => {}
        }
    }

    fn branches(&mut self, node: &Node, branches: &'a [Json], what: &str) {
        let resolved: Vec<&Json> = branches.iter().map(|branch| self.resolve(branch)).collect();
        let words: Vec<&str> = resolved
            .iter()
            .flat_map(|branch| {
                let words = branch.get("enum").and_then(Json::as_array).into_iter().flatten();
                words.chain(branch.get("const")).filter_map(Json::as_str)
            })
            .collect();
        let choice = resolved.iter().find(|branch| {
            branch.get("const").is_none() && branch.get("enum").is_none() && fits(node, branch)
        });
        match choice {
            Some(branch) => self.node(node, branch, what),
            None if !words.is_empty() && node.text().is_some() => self.one_of(node, words, what),
            None => {
                let wanted: Vec<String> = resolved
                    .iter()
                    .filter(|branch| branch.get("type").and_then(Json::as_str) != Some("null"))
                    .map(|branch| wanted(branch))
                    .collect();
                let wanted = if words.is_empty() { wanted.join(" or ") } else { list(&words) };
                let found = node.value.kind();
                self.problem(
                    &node.span,
                    Problem::new(format!("{what} must be {wanted}, and this is {found}")),
                );
            }
        }
    }

    fn one_of(&mut self, node: &Node, allowed: Vec<&str>, what: &str) {
        let written = match &node.value {
            Value::Text(text) | Value::Number(text) => text.as_str(),
            Value::Bool(true) => "true",
            Value::Bool(false) => "false",
            _ => "",
        };
        if allowed.contains(&written) {
            return;
        }
        let mut problem = Problem::new(format!("{what} must be one of {}", list(&allowed)));
        if let Some(near) = nearest(written, allowed) {
            problem = problem.hint(format!("Did you mean `{near}`?"));
        }
        self.problem(&node.span, problem);
    }

    /// A secret is a reference; one that is written down is told to nobody, not even by showing its line.
    fn secret(&mut self, entry: &Entry) {
        let Some(written) = entry.node.text().filter(|text| !text.contains("${")) else { return };
        secret::remember(written);
        let before = self.document.file.text.get(..entry.key_span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        self.problems.push(
            Problem::new(format!(
                "`{}` in {}, line {line}, is a secret, and stands there as it is",
                entry.key, self.document.file.path
            ))
            .note("who reads the repository reads it; change it where it is valid")
            .hint(format!("Write a reference: `{}: ${{env:NAME}}`, or `${{file:path}}`.", entry.key)),
        );
    }

    fn map(&mut self, node: &Node, schema: &'a Json, what: &str) {
        let none = serde_json::Map::new();
        let properties = schema.get("properties").and_then(Json::as_object);
        let known = properties.unwrap_or(&none);
        for entry in node.entries() {
            if let Some(property) = properties.and_then(|properties| properties.get(&entry.key)) {
                if property.get(SECRET) == Some(&Json::Bool(true)) {
                    self.secret(entry);
                }
                self.node(&entry.node, property, &format!("`{}`", entry.key));
                continue;
            }
            match schema.get("additionalProperties") {
                Some(Json::Bool(false)) => {
                    let mut problem = Problem::new(format!("{what} has no key `{}`", entry.key));
                    let names: Vec<&str> = known.keys().map(String::as_str).collect();
                    problem = match nearest(&entry.key, names.iter().copied()) {
                        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                        None => problem.hint(format!("Known keys: {}.", list(&names))),
                    };
                    self.problem(&entry.key_span, problem);
                }
                Some(schema @ Json::Object(_)) => {
                    self.node(&entry.node, schema, &format!("`{}`", entry.key));
                }
                _ => {}
            }
        }
        for name in
            schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str)
        {
            if node.get(name).is_none() {
                let mut problem = Problem::new(format!("{what} needs a key `{name}`"));
                if let Some(about) = known.get(name).and_then(description) {
                    problem = problem.hint(format!("`{name}`: {about}"));
                }
                let first = node.entries().first().map(|entry| entry.key_span.clone());
                let span = first.unwrap_or_else(|| node.span.clone());
                self.problem(&span, problem);
            }
        }
    }
}

fn description(schema: &Json) -> Option<String> {
    let text = schema.get("description").and_then(Json::as_str)?;
    Some(text.split("\n\n").next().unwrap_or(text).replace('\n', " "))
}

fn types(schema: &Json) -> Vec<&str> {
    match schema.get("type") {
        Some(Json::String(one)) => vec![one],
        Some(Json::Array(several)) => several.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    }
}

fn fits(node: &Node, schema: &Json) -> bool {
    let types = types(schema);
    types.is_empty()
        || types.iter().any(|wanted| match (&node.value, *wanted) {
            (Value::Null, "null")
            | (Value::Bool(_), "boolean")
            | (Value::Number(_), "number")
            | (Value::Text(_), "string")
            | (Value::List(_), "array")
            | (Value::Map(_), "object") => true,
            (Value::Number(spelled), "integer") => spelled.parse::<i64>().is_ok(),
            _ => false,
        })
}

fn wanted(schema: &Json) -> String {
    let names: Vec<&str> = types(schema)
        .into_iter()
        .filter_map(|name| match name {
            "boolean" => Some("true or false"),
            "number" => Some("a number"),
            "integer" => Some("a whole number"),
            "string" => Some("text"),
            "array" => Some("a list"),
            "object" => Some("a mapping"),
            _ => None,
        })
        .collect();
    names.join(" or ")
}

fn hint(node: &Node, schema: &Json) -> Option<String> {
    let types = types(schema);
    match &node.value {
        Value::Number(written) if types.contains(&"string") => {
            Some(format!("Put it in quotes: `\"{written}\"`."))
        }
        Value::Bool(written) if types.contains(&"string") => {
            Some(format!("Put it in quotes: `\"{written}\"`."))
        }
        Value::Text(written) if types.contains(&"array") => Some(format!("Write a list: `[{written}]`.")),
        Value::Null => Some("Write a value after the colon, or remove the key.".to_owned()),
        _ => description(schema),
    }
}

fn list(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}
