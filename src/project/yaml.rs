//! YAML with positions: a tree whose every key and value knows where it stands.
//!
//! The parser is `saphyr-parser`'s event stream; this module makes the tree, resolves anchors, gives plain
//! scalars their YAML 1.2 core type and refuses duplicate keys. `no`, `off` and `yes` are text, as YAML 1.2
//! says. Numbers keep their spelling until a typed field wants them, so nothing passes through a float.

use std::{collections::HashMap, ops::Range, sync::Arc};

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::error::{Place, Problem, SourceText};

/// A value and the bytes it stands in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it says.
    pub value: Value,
    /// Where, in bytes of the file.
    pub span: Range<usize>,
}

/// What a node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A plain scalar that reads as a number, as it is spelled.
    Number(String),
    /// Everything else.
    Text(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<Entry>),
}

/// One line of a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key, always as text.
    pub key: String,
    /// Where the key stands.
    pub key_span: Range<usize>,
    /// What it maps to.
    pub node: Node,
}

impl Value {
    /// What kind of thing it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Bool(_) => "true or false",
            Self::Number(_) => "a number",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

impl Node {
    /// The entries of a mapping; none for anything else.
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| &entry.node)
    }

    /// The text, if it is text.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The node at `path`, or the nearest one above it that exists: a place is always found.
    pub fn nearest(&self, path: &[&str]) -> Range<usize> {
        let Some((first, rest)) = path.split_first() else { return self.span.clone() };
        if let Some(key) = first.strip_suffix('\u{0}') {
            return self.key_span(key).unwrap_or_else(|| self.span.clone());
        }
        match &self.value {
            Value::Map(entries) => match entries.iter().find(|entry| entry.key == *first) {
                Some(entry) if rest.is_empty() => match entry.node.value {
                    Value::List(_) | Value::Map(_) => entry.key_span.clone(),
                    _ => entry.node.span.clone(),
                },
                Some(entry) => entry.node.nearest(rest),
                None => self.span.clone(),
            },
            Value::List(items) => match first.parse::<usize>().ok().and_then(|index| items.get(index)) {
                Some(item) => item.nearest(rest),
                None => self.span.clone(),
            },
            _ => self.span.clone(),
        }
    }

    /// Where the key `key` of this mapping stands.
    pub fn key_span(&self, key: &str) -> Option<Range<usize>> {
        self.entries().iter().find(|entry| entry.key == key).map(|entry| entry.key_span.clone())
    }

    /// The same as JSON, for `serde`. Numbers that JSON cannot spell become text.
    pub fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Number(spelled) => serde_json::from_str::<serde_json::Number>(spelled)
                .map_or_else(|_| spelled.clone().into(), serde_json::Value::Number),
            Value::Text(text) => text.clone().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(entries) => serde_json::Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.node.to_json())).collect(),
            ),
        }
    }
}

/// A file and its tree.
#[derive(Debug, Clone)]
pub struct Document {
    /// The text, shared with every problem that points into it.
    pub file: Arc<SourceText>,
    /// The tree. A file without content is an empty mapping.
    pub root: Node,
}

impl Document {
    /// The place of the value at `path`, or of the nearest thing above it. A last segment that ends in
    /// `\0` means the key itself.
    pub fn place(&self, path: &[&str]) -> Place {
        Place { file: Arc::clone(&self.file), span: self.root.nearest(path) }
    }

    /// The place of the key at the end of `path`.
    pub fn key_place(&self, path: &[&str]) -> Place {
        let span = path.split_last().and_then(|(key, parents)| {
            let parent = parents.iter().try_fold(&self.root, |node, key| node.get(key))?;
            parent.key_span(key)
        });
        Place { file: Arc::clone(&self.file), span: span.unwrap_or_else(|| self.root.nearest(path)) }
    }
}

/// Parses one file. Duplicate keys are told, and the first of each is read on; a syntax error ends the reading.
pub fn parse(file: Arc<SourceText>, problems: &mut Vec<Problem>) -> Option<Document> {
    let mut builder = Builder::new(&file);
    let root = builder.document();
    problems.append(&mut builder.problems);
    match root {
        Ok(root) => Some(Document { file, root }),
        Err(problem) => {
            problems.push(problem);
            None
        }
    }
}

struct Builder<'a> {
    file: &'a Arc<SourceText>,
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// The byte at which each character starts; the parser counts characters.
    bytes: Vec<usize>,
    anchors: HashMap<usize, Node>,
    problems: Vec<Problem>,
    depth: usize,
}

/// Deeper files are refused: nobody writes them by hand.
const MAX_DEPTH: usize = 64;

impl<'a> Builder<'a> {
    fn new(file: &'a Arc<SourceText>) -> Self {
        let text = file.text.strip_prefix('\u{feff}').unwrap_or(&file.text);
        let skipped = file.text.len() - text.len();
        let bytes = text.char_indices().map(|(byte, _)| byte + skipped).chain([file.text.len()]).collect();
        Self {
            file,
            events: Parser::new_from_str(text),
            bytes,
            anchors: HashMap::new(),
            problems: Vec::new(),
            depth: 0,
        }
    }

    fn byte(&self, marker: &saphyr_parser::Marker) -> usize {
        self.bytes.get(marker.index()).copied().unwrap_or(self.file.text.len())
    }

    fn problem(&self, span: Range<usize>, message: impl Into<String>) -> Problem {
        Problem::new(message).at(Place { file: Arc::clone(self.file), span })
    }

    fn next(&mut self) -> Result<(Event<'a>, Range<usize>), Problem> {
        match self.events.next_event() {
            Some(Ok((event, span))) => {
                let range = self.byte(&span.start)..self.byte(&span.end);
                Ok((event, range))
            }
            Some(Err(error)) => {
                let at = self.byte(error.marker());
                let end = (at + 1).min(self.file.text.len());
                Err(self
                    .problem(at.min(end)..end, format!("this is not YAML: {}", error.info()))
                    .hint("Check the indentation and the brackets and quotes just before this place."))
            }
            None => {
                let end = self.file.text.len();
                Err(self.problem(end..end, "the file ends too early"))
            }
        }
    }

    fn document(&mut self) -> Result<Node, Problem> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
                _ if root.is_some() => {
                    return Err(self
                        .problem(span, "a second document in one file")
                        .hint("Put it into a file of its own, and remove the line `---`."));
                }
                event => root = Some(self.node(event, span)?),
            }
        }
        let root = root.unwrap_or(Node { value: Value::Null, span: 0..0 });
        Ok(if root.value == Value::Null {
            Node { value: Value::Map(Vec::new()), span: root.span }
        } else {
            root
        })
    }

    fn node(&mut self, event: Event<'a>, span: Range<usize>) -> Result<Node, Problem> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.problem(span, format!("nested more than {MAX_DEPTH} levels deep")));
        }
        let (node, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => {
                let value = match style {
                    ScalarStyle::Plain => plain(&text),
                    _ => Value::Text(text.into_owned()),
                };
                (Node { value, span }, anchor)
            }
            Event::SequenceStart(anchor, _) => (self.list(span.start)?, anchor),
            Event::MappingStart(anchor, _) => (self.map(span.start)?, anchor),
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => (Node { value: node.value.clone(), span }, 0),
                None => return Err(self.problem(span, "this alias names no anchor above it")),
            },
            _ => return Err(self.problem(span, "unexpected structure")),
        };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        self.depth -= 1;
        Ok(node)
    }

    fn list(&mut self, start: usize) -> Result<Node, Problem> {
        let mut items: Vec<Node> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::SequenceEnd) {
                let end = items.last().map_or(span.end, |last| last.span.end.max(start));
                return Ok(Node { value: Value::List(items), span: start..end.max(start) });
            }
            items.push(self.node(event, span)?);
        }
    }

    fn map(&mut self, start: usize) -> Result<Node, Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                let end = entries.last().map_or(span.end, |last| last.node.span.end.max(last.key_span.end));
                return Ok(Node { value: Value::Map(entries), span: start..end.max(start) });
            }
            let Event::Scalar(key, ..) = event else {
                return Err(self.problem(span, "a key must be plain text"));
            };
            let (event, value_span) = self.next()?;
            let node = self.node(event, value_span)?;
            if entries.iter().any(|entry| entry.key == key) {
                let problem = self
                    .problem(span, format!("the key `{key}` is there twice"))
                    .hint("Keep one of the two: YAML readers differ in which one they take.");
                self.problems.push(problem);
            } else {
                entries.push(Entry { key: key.into_owned(), key_span: span, node });
            }
        }
    }
}

/// The YAML 1.2 core schema for a scalar without quotes.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ if is_number(text) => Value::Number(text.to_owned()),
        _ => Value::Text(text.to_owned()),
    }
}

fn is_number(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.bytes().all(|c| c.is_ascii_digit() || matches!(c, b'.' | b'e' | b'E' | b'+' | b'-'))
        && text.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Result<Document, Vec<Problem>> {
        let (path, mut problems) = ("x.yaml".to_owned(), Vec::new());
        let document = parse(Arc::new(SourceText { path, text: text.to_owned() }), &mut problems);
        document.filter(|_| problems.is_empty()).ok_or(problems)
    }

    #[test]
    fn a_place_is_the_bytes_of_the_value_also_after_wide_characters() {
        let text = "name: Zürich\nsources:\n  us: { table: gl.lines, key: [a, b] }\n";
        let document = document(text).unwrap();
        for (path, expected) in [
            (&["name"][..], "Zürich"),
            (&["sources", "us", "table"], "gl.lines"),
            (&["sources", "us", "key", "1"], "b"),
            (&["sources", "us"], "us"),
            (&["sources", "us", "nothing"], "{ table: gl.lines, key: [a, b"),
        ] {
            assert_eq!(text.get(document.root.nearest(path)), Some(expected), "{path:?}");
        }
        assert_eq!(text.get(document.key_place(&["sources", "us", "key"]).span), Some("key"));
    }

    #[test]
    fn plain_scalars_have_the_types_of_yaml_1_2() {
        for (written, expected) in [
            ("no", Value::Text("no".to_owned())),
            ("true", Value::Bool(true)),
            ("007", Value::Number("007".to_owned())),
            ("1.50", Value::Number("1.50".to_owned())),
            ("2026-10-31", Value::Text("2026-10-31".to_owned())),
            ("10%", Value::Text("10%".to_owned())),
            ("~", Value::Null),
        ] {
            assert_eq!(document(&format!("a: {written}")).unwrap().root.get("a").unwrap().value, expected);
        }
        assert_eq!(document("a: '5'").unwrap().root.get("a").unwrap().text(), Some("5"));
    }

    #[test]
    fn every_duplicate_key_is_told() {
        let problems = document("a: 1\nb: 2\na: 3\nb: 4\n").unwrap_err();
        assert_eq!(problems.len(), 2);
        assert_eq!(problems[0].place.as_ref().unwrap().span, 10..11);
    }

    #[test]
    fn broken_files_are_problems_and_not_panics() {
        for text in
            ["a: [1, 2", "a: {b: 1", "\t- x: 'y", "a: *nothing", "- - - -", "? [a]\n: b", "%", "a: b: c"]
        {
            if let Ok(document) = document(text) {
                drop(document.root.to_json());
            }
        }
        assert!(document(&"[".repeat(1000)).is_err());
    }
}
