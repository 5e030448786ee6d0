//! Names: of jobs, of runs, and of things in other people's SQL.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A job's identity: its name and its project's. Moving a file does not change it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId {
    /// The project's name.
    pub project: String,
    /// The job's name.
    pub job: String,
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.job)
    }
}

/// Whether `name` may name a project, job, source, model, connection or parameter: a lower-case word that SQL
/// takes without quotes.
pub fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_lowercase() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        && name.len() <= 63
}

/// Whether `name` may name an output: words of letters, digits, `_` and `-`, joined by dots. So it is a safe
/// folder name and a plain table name.
pub fn is_output_name(name: &str) -> bool {
    name.len() <= 128
        && name.split('.').all(|word| {
            !word.is_empty()
                && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
        })
}

/// An identifier, quoted for SQL with double quotes.
///
/// # Errors
///
/// If it is empty, or holds a NUL or another control character.
pub fn quoted(name: &str) -> Result<String> {
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(Error::configuration("an identifier is empty or holds a control character"));
    }
    Ok(format!("\"{}\"", name.replace('"', "\"\"")))
}

/// Several identifiers, quoted, with commas.
///
/// # Errors
///
/// As [`quoted`].
pub fn quoted_list<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<String> {
    Ok(names.into_iter().map(quoted).collect::<Result<Vec<_>>>()?.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_cannot_end_their_quotes() {
        assert_eq!(quoted("a\"b").unwrap(), "\"a\"\"b\"");
        assert!(quoted("a\0b").is_err());
        assert!(quoted("").is_err());
    }

    #[test]
    fn output_names_are_safe_folder_names() {
        for (name, safe) in [
            ("finance.journal", true),
            ("a-b_c", true),
            ("..", false),
            ("a/b", false),
            ("", false),
            ("a.", false),
        ] {
            assert_eq!(is_output_name(name), safe, "{name}");
        }
    }
}
