//! JSON as it is spelled: an object taken apart once, values kept as their own text until a column's type wants them.
//!
//! So `0.10` and a number of 30 digits arrive as written. Nested values become their JSON text. A key that comes twice in
//! one object is an error.

use std::{borrow::Cow, fmt};

use indexmap::IndexMap;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::columns::{ColumnBuilder, Misfit};

/// A row: its keys and the text of their values.
#[derive(Debug, Default)]
pub struct Object<'a>(pub Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                #[derive(Deserialize)]
                struct Key<'a>(#[serde(borrow)] Cow<'a, str>);
                let mut pairs: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::new();
                while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    if pairs.iter().any(|(known, _)| *known == key) {
                        return Err(serde::de::Error::custom(format!("the key `{key}` comes twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Object(pairs))
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

/// What a value is, as far as a column wants to know.
#[derive(Debug)]
pub enum Scalar<'a> {
    /// Null.
    Null,
    /// Text, unescaped.
    Text(Cow<'a, str>),
    /// A number, as it is spelled.
    Number(&'a str),
    /// `true` or `false`.
    Bool(&'a str),
    /// An object or a list, as its JSON text.
    Nested(&'a str),
}

impl<'a> Scalar<'a> {
    /// The value behind a text.
    ///
    /// # Errors
    ///
    /// If an escape in it is broken.
    pub fn of(value: &'a RawValue) -> Result<Self, String> {
        let text = value.get();
        Ok(match text.as_bytes().first() {
            Some(b'n') => Self::Null,
            Some(b't' | b'f') => Self::Bool(text),
            Some(b'"') => {
                let plain = text.get(1..text.len().saturating_sub(1)).unwrap_or_default();
                if plain.contains('\\') {
                    Self::Text(Cow::Owned(
                        serde_json::from_str(text).map_err(|_| "has a broken escape".to_owned())?,
                    ))
                } else {
                    Self::Text(Cow::Borrowed(plain))
                }
            }
            Some(b'{' | b'[') => Self::Nested(text),
            _ => Self::Number(text),
        })
    }
}

/// Under this key the quarantine keeps the text of a row that has no columns.
pub const UNREADABLE: &str = "_floodmark_text";

/// A row that has no columns, as the quarantine keeps it.
pub fn unreadable(text: &str) -> String {
    serde_json::json!({ UNREADABLE: text }).to_string()
}

/// A row with a value that fits no column, as the quarantine keeps it: every column that was read, as it is spelled.
pub fn kept<'a>(columns: impl Iterator<Item = (&'a str, Option<&'a RawValue>)>) -> String {
    serde_json::to_string(&columns.collect::<IndexMap<_, _>>()).unwrap_or_default()
}

/// Appends a value to its column; returns its bytes.
///
/// # Errors
///
/// A [`Misfit`], and nothing is appended.
pub fn append(builder: &mut ColumnBuilder, raw: &RawValue) -> Result<usize, Misfit> {
    match Scalar::of(raw).map_err(Misfit)? {
        Scalar::Null => builder.null(),
        Scalar::Text(text) => builder.text(&text)?,
        // A number is spelled with a point, whatever mark the source uses in text.
        Scalar::Number(text) => builder.number(text)?,
        Scalar::Bool(text) | Scalar::Nested(text) => builder.text(text)?,
    }
    Ok(raw.get().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_twice_is_an_error() {
        assert!(serde_json::from_str::<Object<'_>>("{\"a\":1,\"\\u0061\":2}").is_err());
        assert_eq!(serde_json::from_str::<Object<'_>>("{\"a\":1,\"b\":{\"a\":2}}").unwrap().0.len(), 2);
    }
}
