//! What can go wrong, for people: what happened, where, why, what to do.
//!
//! An [`Error`] is one or more [`Problem`]s of one [`ErrorKind`]. The kind decides the exit code; a
//! problem that stands in a file of the project carries the file and the place, so that the renderer can
//! underline it. Nothing here prints.
//!
//! No message holds a cell value or a secret: a column, a line and a reason say where to look.

use std::{fmt, ops::Range, sync::Arc};

use datafusion::error::DataFusionError;

/// The result of almost everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose problem it is, and so what a scheduler should do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The project is wrong: a file, a name, a type, an argument. Never retry. Exit code 2.
    Configuration,
    /// The data was refused: a check, a contract, a guard, a row that cannot be read. Exit code 3.
    Data,
    /// Something failed while running: a disk, a query, a permission. Exit code 1.
    Failed,
    /// A query needs more memory than the limit. Exit code 1.
    Memory,
    /// It may work in a moment: a connection was lost, a lock was not to be had. A run tries again. Exit code 75.
    Temporary,
    /// Another run of the job is at work, or was faster. Exit code 75.
    Busy,
    /// The user, or the scheduler, stopped the run. Exit code 130 or 143.
    Interrupted,
    /// A bug in floodmark. Exit code 70.
    Bug,
}

/// One text file of the project, kept so that mistakes in it can be shown.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct SourceText {
    /// The path as the user knows it, relative to the project's folder.
    pub path: String,
    /// What it holds.
    pub text: String,
}

/// A stretch of a [`SourceText`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    /// The file.
    pub file: Arc<SourceText>,
    /// Bytes of its text.
    pub span: Range<usize>,
}

impl Place {
    /// The first line of a file, for problems of the whole file.
    pub fn whole(file: &Arc<SourceText>) -> Self {
        let end = file.text.find('\n').unwrap_or(file.text.len());
        Self { file: Arc::clone(file), span: 0..end }
    }

    /// From a line and column to another, which a parser counts in characters from 1; the whole file if it counted
    /// none.
    pub fn between(file: &Arc<SourceText>, start: (u64, u64), end: (u64, u64)) -> Self {
        match (file.byte_of(start), file.byte_of(end)) {
            (Some(from), Some(to)) if start.0 > 0 => {
                Self { file: Arc::clone(file), span: from..to.max(file.behind(from)) }
            }
            _ => Self::whole(file),
        }
    }

    /// The word that starts at a byte, or the one character if there is none.
    pub fn word(file: &Arc<SourceText>, start: usize) -> Self {
        let rest = file.text.get(start..).unwrap_or_default();
        let length = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        Self { file: Arc::clone(file), span: start..(start + length).max(file.behind(start)) }
    }
}

impl SourceText {
    /// The byte at a line and column, which are counted in characters from 1.
    pub fn byte_of(&self, (line, column): (u64, u64)) -> Option<usize> {
        let line = usize::try_from(line).ok()?.checked_sub(1)?;
        let column = usize::try_from(column).ok()?.saturating_sub(1);
        let before: usize = self.text.split_inclusive('\n').take(line).map(str::len).sum();
        let line = self.text.get(before..)?.split('\n').next().unwrap_or_default();
        Some(before + line.char_indices().nth(column).map_or(line.len(), |(at, _)| at))
    }

    /// The byte behind the character at `start`; at the end of the text, `start` itself.
    fn behind(&self, start: usize) -> usize {
        start + self.text.get(start..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8)
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What happened, as one sentence without a full stop.
    pub message: String,
    /// Where it stands, if it stands in a file of the project.
    pub place: Option<Place>,
    /// Said beside the underlined text.
    pub label: Option<String>,
    /// Why: causes and details, in order.
    pub notes: Vec<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Problem {
    /// A problem that stands nowhere in particular.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), place: None, label: None, notes: Vec::new(), hint: None }
    }

    /// Says where it stands.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// Says something beside the underlined text.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Adds a cause or a detail.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Why something could not be done. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    problems: Vec<Problem>,
}

impl Error {
    /// One problem without a place.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, problems: vec![Problem::new(message)] }
    }

    /// The project is wrong.
    pub fn configuration(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Configuration, message)
    }

    /// The data was refused.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Data, message)
    }

    /// Something failed while running.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    /// It may work in a moment.
    pub fn temporary(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Temporary, message)
    }

    /// Another run of the job is at work, or was faster.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Busy, message)
    }

    /// A bug in floodmark.
    pub fn bug(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Bug, message)
    }

    /// An operation of the operating system failed at `path`. A full disk says so.
    #[expect(clippy::needless_pass_by_value, reason = "made for `map_err`")]
    pub fn io(doing: &str, path: impl fmt::Display, error: std::io::Error) -> Self {
        let error_kind = error.kind();
        let this = Self::failed(format!("cannot {doing} `{path}`")).note(error.to_string());
        match error_kind {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                this.hint("Make room on that disk and run again: nothing was published.")
            }
            std::io::ErrorKind::PermissionDenied => {
                this.hint("Give the user that runs floodmark the right to it.")
            }
            _ => this,
        }
    }

    /// Several problems of one kind, or `Ok` where there is none.
    ///
    /// # Errors
    ///
    /// All of `problems`, as one error.
    pub fn of(kind: ErrorKind, problems: Vec<Problem>) -> Result<()> {
        if problems.is_empty() { Ok(()) } else { Err(Self { kind, problems }) }
    }

    /// Adds a cause or a detail to the first problem.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        if let Some(first) = self.problems.first_mut() {
            first.notes.push(note.into());
        }
        self
    }

    /// Says what to do about the first problem.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Some(first) = self.problems.first_mut() {
            first.hint = Some(hint.into());
        }
        self
    }

    /// Says where the first problem stands, unless it says so itself.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        if let Some(first) = self.problems.first_mut() {
            first.place.get_or_insert(place);
        }
        self
    }

    /// Puts a sentence in front: what was being done when this happened.
    #[must_use]
    pub fn while_doing(mut self, doing: impl Into<String>) -> Self {
        if let Some(first) = self.problems.first_mut() {
            let cause = std::mem::replace(&mut first.message, doing.into());
            first.notes.insert(0, cause);
        }
        self
    }

    /// Says whose it is in front of the first problem's sentence.
    #[must_use]
    pub fn within(mut self, whose: &str) -> Self {
        if let Some(first) = self.problems.first_mut() {
            first.message = format!("{whose}: {}", first.message);
        }
        self
    }

    /// The same problems as another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Whose problem it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What is wrong. At least one.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What is wrong, to keep.
    pub fn into_problems(self) -> Vec<Problem> {
        self.problems
    }
}

impl From<Problem> for Error {
    /// A problem that stands in a file of the project is a mistake in it.
    fn from(problem: Problem) -> Self {
        Self { kind: ErrorKind::Configuration, problems: vec![problem] }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            f.write_str(&problem.message)?;
            for note in &problem.notes {
                write!(f, ": {note}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<Error> for DataFusionError {
    fn from(error: Error) -> Self {
        Self::External(Box::new(error))
    }
}

impl From<DataFusionError> for Error {
    /// An error of ours that travelled through a plan comes out as it went in; memory that ran out and
    /// values that do not fit become errors for people, without the values; what is left is DataFusion's own sentence.
    fn from(error: DataFusionError) -> Self {
        use arrow::error::ArrowError;
        match error.find_root() {
            DataFusionError::External(inner) => {
                if let Some(ours) = inner.downcast_ref::<Self>() {
                    return ours.clone();
                }
            }
            DataFusionError::ArrowError(inner, _) => {
                if let ArrowError::ExternalError(inner) = inner.as_ref()
                    && let Some(ours) = inner.downcast_ref::<Self>()
                {
                    return ours.clone();
                }
                if matches!(
                    inner.as_ref(),
                    ArrowError::CastError(_)
                        | ArrowError::ParseError(_)
                        | ArrowError::ComputeError(_)
                        | ArrowError::InvalidArgumentError(_)
                        | ArrowError::ArithmeticOverflow(_)
                        | ArrowError::DivideByZero
                ) {
                    return Self::data(without_values(strip_prefixes(&inner.to_string())));
                }
            }
            DataFusionError::ExecutionJoin(join) if join.is_panic() => {
                return Self::bug("a step of the query panicked");
            }
            DataFusionError::Execution(what) => return Self::data(without_values(strip_prefixes(what))),
            DataFusionError::ResourcesExhausted(what) => {
                // Who asked, and what there was, stands behind a list of all who hold some.
                let asked = what.lines().rev().find(|line| line.contains(" asked for ")).unwrap_or(what);
                return Self::new(ErrorKind::Memory, "the memory limit is too small")
                    .note(first_line(asked.trim_start_matches("Error: ")))
                    .hint(
                        "Raise `limits: { memory: … }` in floodmark.yaml, or join and sort fewer columns.",
                    );
            }
            _ => {}
        }
        let text = error.strip_backtrace();
        // DataFusion puts the rules that it was applying in front: "rule\ncaused by\nthe error".
        let cause = text.rsplit("caused by\n").next().unwrap_or(&text);
        Self::failed(first_line(strip_prefixes(cause)))
    }
}

impl From<arrow::error::ArrowError> for Error {
    fn from(error: arrow::error::ArrowError) -> Self {
        DataFusionError::from(error).into()
    }
}

/// DataFusion and Arrow put their layers' names in front; a person needs the last one.
fn strip_prefixes(text: &str) -> &str {
    let mut rest = text;
    for prefix in [
        "Arrow error: ",
        "External error: ",
        "Execution error: ",
        "Error during planning: ",
        "Optimizer rule 'simplify_expressions' failed\ncaused by\n",
        "Schema error: ",
        "SQL error: ",
        "type_coercion\ncaused by\n",
        "Error during planning: ",
        "Execution error: ",
        "Arrow error: ",
        "Compute error: ",
        "Cast error: ",
        "Arithmetic overflow: ",
    ] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest
}

/// The first line of a message of a library, with what may be a cell's value replaced by `…`: what stands in quotes, and
/// every number.
pub(crate) fn without_values(text: &str) -> String {
    let line = first_line(text);
    let (mut plain, mut quote, mut word) = (String::new(), None, ' ');
    for c in line.chars() {
        match quote {
            Some(open) if c == open => {
                quote = None;
                plain.push('…');
                plain.push(c);
            }
            Some(_) => {}
            None if matches!(c, '\'' | '"' | '`') && !word.is_alphanumeric() => {
                quote = Some(c);
                plain.push(c);
            }
            None if word == '…' && (c.is_ascii_digit() || matches!(c, '.' | ',' | '-' | ':')) => continue,
            None if c.is_ascii_digit() && !word.is_alphanumeric() && word != '_' => plain.push('…'),
            None => plain.push(c),
        }
        word = plain.chars().next_back().unwrap_or(' ');
    }
    if quote.is_some() {
        plain.push('…');
    }
    plain
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim_end_matches('.').to_owned()
}

/// The name among `candidates` that is most like `written`, if one is near enough to be meant.
pub fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let written = written.to_lowercase();
    candidates
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&written, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= 1 + name.len().min(written.len()) / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_near_and_another_word_is_not() {
        let names = ["connection", "columns", "incremental", "key"];
        for (written, expected) in [
            ("conection", Some("connection")),
            ("Columns", Some("columns")),
            ("colunms", Some("columns")),
            ("keys", Some("key")),
            ("schedule", None),
            ("", None),
        ] {
            assert_eq!(nearest(written, names), expected, "{written}");
        }
    }

    #[test]
    fn a_place_ends_behind_a_whole_character() {
        let file =
            Arc::new(SourceText { path: "q.sql".to_owned(), text: "SELECT – größe_1, €".to_owned() });
        for (start, expected) in [(0, "SELECT"), (7, "–"), (11, "größe_1"), (20, ","), (22, "€"), (25, "")]
        {
            assert_eq!(file.text.get(Place::word(&file, start).span), Some(expected), "{start}");
        }
        for (column, expected) in [(1, "S"), (8, "–"), (19, "€"), (20, "")] {
            let place = Place::between(&file, (1, column), (1, column));
            assert_eq!(file.text.get(place.span), Some(expected), "{column}");
        }
    }

    #[test]
    fn a_message_of_a_library_loses_the_values_in_it() {
        for (told, expected) in [
            (
                "Cannot cast string 'Miller' to value of Int64 type",
                "Cannot cast string '…' to value of Int64 type",
            ),
            (
                "99999.00 is too large to store in a Decimal128 of precision 18. Max is 99.99",
                "… is too large to store in a Decimal128 of precision … Max is …",
            ),
            ("Error parsing 'it's 5", "Error parsing '…'s …"),
            ("can't do it", "can't do it"),
        ] {
            assert_eq!(without_values(told), expected);
        }
    }

    #[test]
    fn an_error_of_ours_survives_the_way_through_a_query() {
        let ours = Error::data("line 17 is ragged").hint("Mend it.");
        let through = DataFusionError::from(ours.clone()).context("scan").context("join");
        assert_eq!(Error::from(through), ours);
    }
}
