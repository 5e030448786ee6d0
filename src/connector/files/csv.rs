//! CSV, strictly.
//!
//! A record ends at a line end outside quotes: `\n`, `\r\n` or `\r`. A quoted field may hold anything, and must be
//! followed by a delimiter or a line end. What breaks these rules, a quote that is never closed, a record with
//! another number of fields than the header, a byte that is not UTF-8, is an error with line and byte, or a
//! row set aside; it never shifts a column or swallows a file. A row is set aside only if it is known where the next
//! one begins: a stray quote that would join lines is always an error.

use super::input::{OTHER_ENCODING, TextReader};
use crate::{
    connector::{columns::single, spec::Format},
    error::{Error, Result},
};

/// The characters of a dialect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dialect {
    delimiter: u8,
    quote: Option<u8>,
    escape: Option<u8>,
    comment: Option<u8>,
    trim: bool,
}

impl Dialect {
    pub(super) fn of(format: &Format, path: &str) -> Result<Self> {
        let tabs = path.contains(".tsv").then_some(b'\t');
        let delimiter = single("delimiter", format.delimiter.as_deref())?.or(tabs).unwrap_or(b',');
        let quote = match format.quote.as_deref() {
            Some("none") => None,
            written => Some(single("quote", written)?.unwrap_or(b'"')),
        };
        let escape = single("escape", format.escape.as_deref())?;
        let comment = single("comment", format.comment.as_deref())?;
        if Some(delimiter) == quote {
            return Err(Error::configuration("`delimiter` and `quote` are the same character"));
        }
        Ok(Self { delimiter, quote, escape, comment, trim: format.trim })
    }
}

/// One record: its fields in one buffer.
#[derive(Debug, Default)]
pub(super) struct Record {
    text: Vec<u8>,
    /// End of each field in `text`, and whether it stood in quotes.
    ends: Vec<(usize, bool)>,
    /// The line it starts on, from 1.
    pub(super) line: u64,
    /// The byte of the decoded text it starts at, from 0.
    pub(super) byte: u64,
    /// The record as it stands in the file.
    pub(super) raw: Vec<u8>,
}

impl Record {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The field, and whether it stood in quotes.
    pub(super) fn field(&self, index: usize) -> Option<(&[u8], bool)> {
        let (end, quoted) = *self.ends.get(index)?;
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).map_or(0, |(end, _)| *end);
        Some((self.text.get(start..end)?, quoted))
    }

    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
        self.raw.clear();
    }
}

/// What reading on came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A record.
    Record,
    /// A record that breaks the rules; reading can go on behind it.
    Broken(String),
    /// The end of the file.
    End,
}

/// Records of one file.
pub(super) struct Records {
    input: TextReader,
    dialect: Dialect,
    line: u64,
}

/// Longer records are refused: an unclosed quote would otherwise read the whole file into memory.
const MAX_RECORD_BYTES: usize = 64 << 20;

impl Records {
    pub(super) fn new(input: TextReader, dialect: Dialect) -> Self {
        Self { input, dialect, line: 1 }
    }

    /// Reads the next record, and skips empty lines and comments.
    ///
    /// # Errors
    ///
    /// Only what reading cannot go on behind: a broken disk or encoding, an endless record, a quote that leaves open
    /// where rows begin. With its reason.
    pub(super) fn next(&mut self, record: &mut Record) -> Result<Next, String> {
        loop {
            record.clear();
            (record.line, record.byte) = (self.line, self.input.offset());
            let Some((length, lines)) = self.find_end()? else {
                if self.input.text().is_empty() {
                    return Ok(Next::End);
                }
                return Err(format!(
                    "line {}: a quote is opened here and never closed, so that nobody knows where the rows behind it end",
                    record.line
                ));
            };
            let line_end = match self.input.text().get(length..) {
                Some([b'\r', b'\n', ..]) => 2,
                Some([_, ..]) => 1,
                _ => 0,
            };
            record.raw.extend_from_slice(self.input.text().get(..length).unwrap_or_default());
            self.input.take(length + line_end);
            self.line += lines;
            let comment = self.dialect.comment.is_some_and(|comment| record.raw.first() == Some(&comment));
            if record.raw.is_empty() || comment {
                continue;
            }
            return match (split(&self.dialect, record), std::str::from_utf8(&record.raw)) {
                (Ok(()), Ok(_)) => Ok(Next::Record),
                (Ok(()), Err(error)) => {
                    let at = error.valid_up_to() + 1;
                    Ok(Next::Broken(format!("byte {at} of the row is not UTF-8; {OTHER_ENCODING}")))
                }
                (Err(why), _) if lines > 1 => Err(format!(
                    "line {}: {why}, and the row would cover {lines} lines: nobody knows where the rows in it end",
                    record.line
                )),
                (Err(why), _) => Ok(Next::Broken(why)),
            };
        }
    }

    /// Bytes up to the line end that ends the record, and how many lines it covers. `None` if the text ends within
    /// quotes, or there is none.
    fn find_end(&mut self) -> Result<Option<(usize, u64)>, String> {
        let (mut at, mut quoted, mut lines) = (0, false, 0_u64);
        let mut field_start = true;
        loop {
            let text = self.input.text();
            while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
                let quote = self.dialect.quote;
                if quoted {
                    let (quote, escape) =
                        (quote.unwrap_or(b'"'), self.dialect.escape.unwrap_or(quote.unwrap_or(b'"')));
                    let Some(found) = memchr::memchr3(quote, escape, b'\n', rest) else {
                        at = text.len();
                        break;
                    };
                    let byte = rest.get(found).copied().unwrap_or_default();
                    if byte == b'\n' {
                        lines += 1;
                    } else if byte == escape && escape != quote {
                        if found + 1 == rest.len() && !self.input.at_end() {
                            at += found;
                            break;
                        }
                        at += 1;
                    } else {
                        if found + 1 == rest.len() && !self.input.at_end() {
                            at += found;
                            break;
                        }
                        if escape == quote && rest.get(found + 1) == Some(&quote) {
                            at += 1;
                        } else {
                            quoted = false;
                            field_start = false;
                        }
                    }
                    at += found + 1;
                    continue;
                }
                if field_start && quote.is_some() && rest.first() == quote.as_ref() {
                    quoted = true;
                    at += 1;
                    continue;
                }
                if field_start && self.dialect.trim && rest.first() == Some(&b' ') {
                    at += 1;
                    continue;
                }
                let Some(found) = memchr::memchr3(self.dialect.delimiter, b'\n', b'\r', rest) else {
                    field_start = false;
                    at = text.len();
                    break;
                };
                match rest.get(found) {
                    Some(byte) if *byte == self.dialect.delimiter => {
                        field_start = true;
                        at += found + 1;
                    }
                    Some(b'\r') if found + 1 == rest.len() && !self.input.at_end() => {
                        field_start = field_start && found == 0;
                        at += found;
                        break;
                    }
                    _ => return Ok(Some((at + found, lines + 1))),
                }
            }
            if self.input.at_end() {
                let length = self.input.text().len();
                return Ok((!quoted && length > 0).then_some((length, lines + 1)));
            }
            if self.input.text().len() > MAX_RECORD_BYTES {
                return Err(format!(
                    "line {}: the row is longer than {} MiB: is a quote not closed?",
                    self.line,
                    MAX_RECORD_BYTES >> 20
                ));
            }
            self.input.fill()?;
        }
    }
}

/// Splits `record.raw` into fields.
fn split(dialect: &Dialect, record: &mut Record) -> Result<(), String> {
    let raw = record.raw.as_slice();
    let mut at = 0;
    loop {
        let mut start = at;
        if dialect.trim {
            while raw.get(start) == Some(&b' ') {
                start += 1;
            }
        }
        let opened = dialect.quote.filter(|quote| raw.get(start) == Some(quote));
        if let Some(quote) = opened {
            let escape = dialect.escape.unwrap_or(quote);
            at = start + 1;
            loop {
                match raw.get(at) {
                    None => return Err("a quote is opened and never closed".to_owned()),
                    Some(byte) if *byte == escape && escape != quote => {
                        record.text.extend(raw.get(at + 1));
                        at += 2;
                    }
                    Some(byte) if *byte == quote => {
                        if escape == quote && raw.get(at + 1) == Some(&quote) {
                            record.text.push(quote);
                            at += 2;
                        } else {
                            at += 1;
                            break;
                        }
                    }
                    Some(byte) => {
                        record.text.push(*byte);
                        at += 1;
                    }
                }
            }
            if dialect.trim {
                while raw.get(at) == Some(&b' ') {
                    at += 1;
                }
            }
            if raw.get(at).is_some_and(|byte| *byte != dialect.delimiter) {
                return Err(format!("field {} goes on after its closing quote", record.ends.len() + 1));
            }
        } else {
            let rest = raw.get(start..).unwrap_or_default();
            let length = memchr::memchr(dialect.delimiter, rest).unwrap_or(rest.len());
            let field = rest.get(..length).unwrap_or_default();
            if dialect.quote.is_some_and(|quote| memchr::memchr(quote, field).is_some()) {
                return Err(format!(
                    "field {} has a quote inside, and does not start with one",
                    record.ends.len() + 1
                ));
            }
            record.text.extend_from_slice(if dialect.trim { field.trim_ascii_end() } else { field });
            at = start + length;
        }
        record.ends.push((record.text.len(), opened.is_some()));
        match raw.get(at) {
            Some(_) => at += 1,
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::input::TextReader, *};
    use proptest::prelude::*;
    use std::io::{BufReader, Cursor};

    fn records(text: &[u8], dialect: Dialect, piece: usize) -> Vec<Result<Vec<String>, String>> {
        let bytes = BufReader::with_capacity(piece, Cursor::new(text.to_vec()));
        let input = TextReader::new(Box::new(bytes), encoding_rs::UTF_8);
        let (mut records, mut record, mut all) =
            (Records::new(input, dialect), Record::default(), Vec::new());
        loop {
            match records.next(&mut record) {
                Ok(Next::Record) => all.push(Ok((0..record.len())
                    .map(|index| String::from_utf8(record.field(index).unwrap().0.to_vec()).unwrap())
                    .collect())),
                Ok(Next::Broken(why)) => all.push(Err(format!("line {}: {why}", record.line))),
                Ok(Next::End) => return all,
                Err(why) => {
                    all.push(Err(why));
                    return all;
                }
            }
        }
    }

    const PLAIN: Dialect =
        Dialect { delimiter: b',', quote: Some(b'"'), escape: None, comment: None, trim: false };

    #[test]
    fn records_are_cut_at_line_ends_outside_quotes_wherever_the_pieces_end() {
        let text = b"a,b\r\n\"x\ny\",\"q\"\"q\"\n\n1,\r,2\r\n\"\",z";
        let expected =
            vec![vec!["a", "b"], vec!["x\ny", "q\"q"], vec!["1", ""], vec!["", "2"], vec!["", "z"]];
        for piece in 1..text.len() + 2 {
            let found: Vec<_> = records(text, PLAIN, piece).into_iter().map(Result::unwrap).collect();
            assert_eq!(found, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn what_breaks_the_rules_says_where() {
        for (text, expected) in [
            (
                &b"a,b\n\"x,y\n1,2\n"[..],
                "line 2: a quote is opened here and never closed, so that nobody knows where the rows behind it end",
            ),
            (
                b"a,b\n\"x,y\n1,\"2\n",
                "line 2: field 1 goes on after its closing quote, and the row would cover 2 lines: nobody knows where the rows in it end",
            ),
            (b"a\n\"x\"y,2\n", "line 2: field 1 goes on after its closing quote"),
            (b"a\nx\"y,2\n", "line 2: field 1 has a quote inside, and does not start with one"),
            (
                b"a\n\"x\n\n\",1\n\xff,2\n",
                "line 5: byte 1 of the row is not UTF-8; if the file is in another encoding, declare it: `format: { encoding: latin1 }`",
            ),
        ] {
            let broken: Vec<_> = records(text, PLAIN, 7).into_iter().filter_map(Result::err).collect();
            assert_eq!(broken, [expected]);
        }
    }

    #[test]
    fn escapes_comments_and_blanks_follow_the_dialect() {
        let dialect = Dialect {
            delimiter: b';',
            quote: Some(b'\''),
            escape: Some(b'\\'),
            comment: Some(b'#'),
            trim: true,
        };
        let found = records(b"# no\n a ; 'it\\'s; ' ;b \n", dialect, 3);
        assert_eq!(found, [Ok(vec!["a".to_owned(), "it's; ".to_owned(), "b".to_owned()])]);
    }

    proptest! {
        #[test]
        fn what_a_writer_quotes_a_reader_reads(
            rows in prop::collection::vec(prop::collection::vec("[a,\"\r\n ]{0,6}", 2..4), 1..6), piece in 1_usize..16,
        ) {
            let text: String = rows.iter().map(|row| {
                row.iter().map(|field| format!("\"{}\"", field.replace('"', "\"\""))).collect::<Vec<_>>().join(",") + "\n"
            }).collect();
            let found: Vec<_> = records(text.as_bytes(), PLAIN, piece).into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(found, rows);
        }

        #[test]
        fn no_bytes_make_it_panic_or_hang(text in prop::collection::vec(prop::sample::select(b"ab,\"\r\n\xff\xc3".to_vec()), 0..60), piece in 1_usize..9) {
            prop_assert!(records(&text, PLAIN, piece).len() <= text.len() + 1);
        }
    }
}
