//! JSON lines and JSON arrays: one object a row, cut out of the file in bounded memory.

use super::{chunks::MAX_ROW_BYTES, input::TextReader};

/// Rows of one file, as their JSON text.
pub(super) struct Rows {
    input: TextReader,
    array: bool,
    opened: bool,
    line: u64,
    number: u64,
}

/// Bytes of the first line of a text, with its end; `None` of an empty one.
pub(super) fn line(text: &[u8]) -> Option<usize> {
    let end = memchr::memchr(b'\n', text).map(|at| at + 1);
    end.or((!text.is_empty()).then_some(text.len()))
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
}
