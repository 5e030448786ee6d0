//! JSONPath into an answer, on the text itself, so that numbers stay as they are spelled.
//!
//! Understood are names (`.name`, `['odd name']`), indexes (`[0]`, `[-1]`) and all (`[*]`, `.*`) of RFC 9535; filters, slices and
//! descent (`..`) are not: what an answer is searched for has one place, or is a list of lists.

use std::{borrow::Cow, str::FromStr};

use serde_json::value::RawValue;

use crate::connector::json::Object;

/// A path from the root of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonPath(Vec<Step>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Name(String),
    Index(i64),
    All,
}

impl FromStr for JsonPath {
    type Err = String;

    fn from_str(written: &str) -> Result<Self, String> {
        let mut rest = written.trim().strip_prefix('$').ok_or("it starts with `$`")?;
        let mut steps = Vec::new();
        while let Some(first) = rest.chars().next() {
            let (step, behind) = match first {
                '.' => {
                    let name = rest.get(1..).unwrap_or_default();
                    if name.starts_with('.') {
                        return Err("`..` is not understood here".to_owned());
                    }
                    if let Some(behind) = name.strip_prefix('*') {
                        (Step::All, behind)
                    } else {
                        let end = name.find(['.', '[']).unwrap_or(name.len());
                        let (name, behind) = name.split_at(end);
                        if name.is_empty() || name.contains(|c: char| c.is_whitespace()) {
                            return Err(
                                "a name behind `.` has letters, digits and `_`; others stand in `['…']`"
                                    .to_owned(),
                            );
                        }
                        (Step::Name(name.to_owned()), behind)
                    }
                }
                '[' => {
                    let inner = rest.get(1..).unwrap_or_default();
                    let quote = inner.chars().next().filter(|c| matches!(c, '\'' | '"'));
                    if let Some(quote) = quote {
                        let name = inner.get(1..).unwrap_or_default();
                        let end = name.find(quote).ok_or("a quote is not closed")?;
                        let (name, behind) = name.split_at(end);
                        let behind = behind.get(1..).and_then(|behind| behind.strip_prefix(']'));
                        (Step::Name(name.to_owned()), behind.ok_or("a bracket is not closed")?)
                    } else {
                        let (index, behind) = inner.split_once(']').ok_or("a bracket is not closed")?;
                        let step =
                            match index.trim() {
                                "*" => Step::All,
                                index => Step::Index(index.parse().map_err(|_| {
                                    format!("`[{index}]` is no index, and no name in quotes")
                                })?),
                            };
                        (step, behind)
                    }
                }
                _ => return Err(format!("`{first}` is not understood here")),
            };
            steps.push(step);
            rest = behind;
        }
        Ok(Self(steps))
    }
}

impl JsonPath {
    /// The path of a name at the root.
    pub fn name(name: &str) -> Self {
        Self(vec![Step::Name(name.to_owned())])
    }

    /// The path to what holds the last step; the root, if there is none.
    pub(super) fn parent(&self) -> Self {
        Self(self.0.split_last().map(|(_, before)| before.to_vec()).unwrap_or_default())
    }

    /// Whether the path ends with all elements of a list.
    pub(super) fn ends_with_all(&self) -> bool {
        self.0.last() == Some(&Step::All)
    }

    /// The values at the path, in order. None is no error: the caller knows whether one must be there.
    ///
    /// # Errors
    ///
    /// If an object on the way has a key twice, or is no JSON.
    pub fn find<'a>(&self, root: &'a RawValue) -> Result<Vec<&'a RawValue>, String> {
        let mut found = vec![root];
        for step in &self.0 {
            let mut next = Vec::new();
            for value in found {
                match (step, value.get().bytes().next()) {
                    (Step::Name(name), Some(b'{')) => {
                        let object = object(value)?;
                        next.extend(object.0.iter().find(|(key, _)| key == name).map(|(_, value)| *value));
                    }
                    (Step::All, Some(b'{')) => {
                        next.extend(object(value)?.0.into_iter().map(|(_, value)| value));
                    }
                    (Step::All, Some(b'[')) => next.extend(list(value)?),
                    (Step::Index(index), Some(b'[')) => {
                        let list = list(value)?;
                        let at = usize::try_from(*index)
                            .ok()
                            .or_else(|| list.len().checked_sub(usize::try_from(index.unsigned_abs()).ok()?));
                        next.extend(at.and_then(|at| list.get(at).copied()));
                    }
                    _ => {}
                }
            }
            found = next;
        }
        Ok(found)
    }
}

fn object(value: &RawValue) -> Result<Object<'_>, String> {
    serde_json::from_str(value.get()).map_err(|error| crate::error::without_values(&error.to_string()))
}

/// The elements of a list.
///
/// # Errors
///
/// If it is none.
pub fn list(value: &RawValue) -> Result<Vec<&RawValue>, String> {
    serde_json::from_str(value.get()).map_err(|_| "a list is expected there".to_owned())
}

/// The text of a token that says how to go on: text or number; `None` where there is no more.
///
/// # Errors
///
/// If it is anything else.
pub(super) fn token(value: &RawValue) -> Result<Option<Cow<'_, str>>, String> {
    use crate::connector::json::Scalar;
    match Scalar::of(value)? {
        Scalar::Text(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        Scalar::Number(text) => Ok(Some(Cow::Borrowed(text))),
        Scalar::Null => Ok(None),
        Scalar::Bool(_) | Scalar::Nested(_) => Err("is neither text nor number".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_finds_what_it_names_as_it_is_spelled() {
        let document = r#"{"data": {"odd name": [{"x": 1.10}, {"x": 2}]}, "next": null}"#;
        let root: &RawValue = serde_json::from_str(document).unwrap();
        for (path, expected) in [
            ("$", vec![document]),
            ("$.data['odd name'][0].x", vec!["1.10"]),
            ("$.data['odd name'][*].x", vec!["1.10", "2"]),
            ("$.data[\"odd name\"][-1].x", vec!["2"]),
            ("$.data['odd name'][7]", vec![]),
            ("$.next", vec!["null"]),
            ("$.nothing.there", vec![]),
        ] {
            let found = path.parse::<JsonPath>().unwrap().find(root).unwrap();
            assert_eq!(found.iter().map(|value| value.get()).collect::<Vec<_>>(), expected, "{path}");
        }
    }

    #[test]
    fn what_is_no_path_says_why() {
        for path in ["data", "$..x", "$.", "$['x", "$[x]", "$[1", "$ .x", "$.a b"] {
            assert!(path.parse::<JsonPath>().is_err(), "{path}");
        }
    }
}
