//! JSON lines and JSON arrays: one object a row, numbers as they are spelled.
//!
//! An object is taken apart once; a value is kept as its own text until its column's type wants it, so that
//! `0.10` and a number of 30 digits arrive as written. Nested values become their JSON text. A key that comes
//! twice in one object is an error.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::input::TextReader;

/// A row: its keys and the text of their values.
#[derive(Debug, Default)]
pub(super) struct Object<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

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
pub(super) enum Scalar<'a> {
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
    pub(super) fn of(value: &'a RawValue) -> Result<Self, String> {
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

/// Longer rows are refused.
const MAX_ROW_BYTES: usize = 64 << 20;

/// Rows of one file, as their JSON text.
pub(super) struct Rows {
    input: TextReader,
    array: bool,
    opened: bool,
    line: u64,
    number: u64,
}

/// One row's text and place.
#[derive(Debug, Default)]
pub(super) struct Row {
    pub(super) text: Vec<u8>,
    pub(super) line: u64,
    pub(super) byte: u64,
}

impl Rows {
    pub(super) fn new(input: TextReader, array: bool) -> Self {
        Self { input, array, opened: false, line: 1, number: 0 }
    }

    /// Reads the next row's text. False at the end.
    ///
    /// # Errors
    ///
    /// What reading cannot go on behind, with its reason.
    pub(super) fn next(&mut self, row: &mut Row) -> Result<bool, String> {
        if self.array { self.next_element(row) } else { self.next_line(row) }
    }

    fn take(&mut self, row: &mut Row, length: usize) {
        row.text.clear();
        row.text.extend_from_slice(self.input.text().get(..length).unwrap_or_default());
        (row.line, row.byte) = (self.line, self.input.offset());
        self.line += memchr::memchr_iter(b'\n', &row.text).count() as u64;
        self.input.take(length);
    }

    fn next_line(&mut self, row: &mut Row) -> Result<bool, String> {
        let mut searched = 0;
        loop {
            let text = self.input.text();
            if let Some(found) = memchr::memchr(b'\n', text.get(searched..).unwrap_or_default()) {
                self.take(row, searched + found + 1);
            } else if !self.input.at_end() {
                searched = text.len();
                if searched > MAX_ROW_BYTES {
                    return Err(format!("line {} is longer than {} MiB", self.line, MAX_ROW_BYTES >> 20));
                }
                self.input.fill()?;
                continue;
            } else if text.is_empty() {
                return Ok(false);
            } else {
                self.take(row, text.len());
            }
            searched = 0;
            if !row.text.trim_ascii().is_empty() {
                return Ok(true);
            }
        }
    }

    /// Skips blanks and gives the next byte.
    fn peek(&mut self) -> Result<Option<u8>, String> {
        loop {
            let blanks = self.input.text().iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let lines =
                memchr::memchr_iter(b'\n', self.input.text().get(..blanks).unwrap_or_default()).count();
            self.line += lines as u64;
            self.input.take(blanks);
            match self.input.text().first() {
                Some(byte) => return Ok(Some(*byte)),
                None if self.input.at_end() => return Ok(None),
                None => self.input.fill()?,
            }
        }
    }

    fn next_element(&mut self, row: &mut Row) -> Result<bool, String> {
        let place = |this: &Self| format!("line {}, byte {}", this.line, this.input.offset());
        if !self.opened {
            match self.peek()? {
                Some(b'[') => self.input.take(1),
                Some(_) => {
                    return Err(format!(
                        "{}: the file must be one list, and does not start with `[`",
                        place(self)
                    ));
                }
                None => return Err("the file is empty, and must be one list".to_owned()),
            }
            self.opened = true;
        }
        match self.peek()? {
            Some(b']') => {
                self.input.take(1);
                return match self.peek()? {
                    None => Ok(false),
                    Some(_) => Err(format!("{}: the list has ended, and the file goes on", place(self))),
                };
            }
            Some(b',') if self.number > 0 => {
                self.input.take(1);
                self.peek()?;
            }
            Some(_) if self.number == 0 => {}
            Some(_) => return Err(format!("{}: a comma is missing", place(self))),
            None => return Err(format!("{}: the list is never closed: the file was cut short", place(self))),
        }
        self.number += 1;
        let (mut at, mut depth, mut quoted) = (0_usize, 0_i64, false);
        loop {
            while let Some(byte) = self.input.text().get(at).copied() {
                match byte {
                    b'\\' if quoted => at += 1,
                    b'"' => quoted = !quoted,
                    b'{' | b'[' if !quoted => depth += 1,
                    b'}' | b']' if !quoted && depth > 0 => {
                        depth -= 1;
                        if depth == 0 {
                            self.take(row, at + 1);
                            return Ok(true);
                        }
                    }
                    b',' | b']' if !quoted && depth == 0 => {
                        self.take(row, at);
                        return Ok(true);
                    }
                    _ => {}
                }
                at += 1;
            }
            if self.input.at_end() {
                return Err(format!("{}: the list is never closed: the file was cut short", place(self)));
            }
            if at > MAX_ROW_BYTES {
                return Err(format!("{}: the row is longer than {} MiB", place(self), MAX_ROW_BYTES >> 20));
            }
            self.input.fill()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor};

    use super::*;

    fn rows(text: &str, array: bool, piece: usize) -> Result<Vec<String>, String> {
        let bytes = BufReader::with_capacity(piece, Cursor::new(text.as_bytes().to_vec()));
        let mut rows = Rows::new(TextReader::new(Box::new(bytes), encoding_rs::UTF_8), array);
        let (mut row, mut all) = (Row::default(), Vec::new());
        while rows.next(&mut row)? {
            all.push(String::from_utf8(row.text.trim_ascii().to_vec()).unwrap());
        }
        Ok(all)
    }

    #[test]
    fn elements_are_cut_wherever_the_pieces_end() {
        let text = " [ {\"a\": \"}],\\\"\"} ,\n {\"b\": [1, {\"c\": 2}]}, 7 ]\n";
        for piece in 1..text.len() + 2 {
            let found = rows(text, true, piece).unwrap();
            assert_eq!(found, ["{\"a\": \"}],\\\"\"}", "{\"b\": [1, {\"c\": 2}]}", "7"]);
            assert_eq!(rows("{\"a\":1}\n\n{\"a\":2}", false, piece).unwrap(), ["{\"a\":1}", "{\"a\":2}"]);
        }
    }

    #[test]
    fn a_list_that_is_cut_short_is_never_taken_for_whole() {
        let whole = "[{\"a\":1},{\"a\":2}]";
        for cut in 0..whole.len() {
            assert!(rows(whole.get(..cut).unwrap(), true, 4).is_err(), "cut at {cut}");
        }
        assert_eq!(rows(whole, true, 4).unwrap().len(), 2);
        assert!(rows("[{\"a\":1} {\"a\":2}]", true, 4).is_err());
        assert!(rows("[1] [2]", true, 4).is_err());
    }

    #[test]
    fn a_key_that_comes_twice_is_an_error() {
        assert!(serde_json::from_str::<Object<'_>>("{\"a\":1,\"\\u0061\":2}").is_err());
        assert_eq!(serde_json::from_str::<Object<'_>>("{\"a\":1,\"b\":{\"a\":2}}").unwrap().0.len(), 2);
    }
}
