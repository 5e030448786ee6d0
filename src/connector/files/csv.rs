//! CSV, strictly.
//!
//! A record ends at a line end outside quotes: `\n`, `\r\n` or `\r`. A quoted field may hold anything, and must be
//! followed by a delimiter or a line end. What breaks these rules, a quote that is never closed, a record with
//! another number of fields than the header, a byte that is not UTF-8, is an error with line and byte, or a
//! row set aside; it never shifts a column or swallows a file. A row is set aside only if it is known where the next
//! one begins: a stray quote that would join lines is always an error.

use super::{
    chunks::{MAX_ROW_BYTES, too_long},
    input::{OTHER_ENCODING, TextReader},
};
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

    /// The character around fields that hold line ends.
    pub(super) fn quote(&self) -> Option<u8> {
        self.quote
    }

    /// Whether a line is no record.
    fn skips(&self, line: &[u8]) -> bool {
        line.is_empty() || self.comment.is_some_and(|comment| line.first() == Some(&comment))
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
    /// The end of the text.
    End,
}

/// Records of one file.
pub(super) struct Records {
    input: TextReader,
    dialect: Dialect,
    line: u64,
}

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
                return Err(format!("line {}: {NEVER_CLOSED}", record.line));
            };
            let line_end = line_end(self.input.text(), length);
            record.raw.extend_from_slice(self.input.text().get(..length).unwrap_or_default());
            self.input.take(length + line_end);
            self.line += lines;
            if !self.dialect.skips(&record.raw) {
                return read(&self.dialect, record, lines)
                    .map_err(|why| format!("line {}: {why}", record.line));
            }
        }
    }

    /// What comes behind the records that were read, and how many lines came before it.
    pub(super) fn into_rest(self) -> (TextReader, u64) {
        (self.input, self.line - 1)
    }

    /// Bytes up to the line end that ends the record, and how many lines it covers. `None` if the text ends within
    /// quotes, or there is none.
    fn find_end(&mut self) -> Result<Option<(usize, u64)>, String> {
        let mut cut = Cut::default();
        loop {
            let found = cut.end(&self.dialect, self.input.text(), self.input.at_end());
            if found.is_some() || self.input.at_end() {
                return Ok(found);
            }
            if self.input.text().len() > MAX_ROW_BYTES {
                return Err(too_long(self.line));
            }
            self.input.fill()?;
        }
    }
}

/// Bytes of the line end that stands at `at`; none at the end of the text.
fn line_end(text: &[u8], at: usize) -> usize {
    match text.get(at..) {
        Some([b'\r', b'\n', ..]) => 2,
        Some([_, ..]) => 1,
        _ => 0,
    }
}

const NEVER_CLOSED: &str =
    "a quote is opened here and never closed, so that nobody knows where the rows behind it end";

/// The search for the end of a record, as far as there was text.
#[derive(Debug, Default)]
struct Cut {
    at: usize,
    quoted: bool,
    lines: u64,
    /// Whether the field at hand has begun.
    inside: bool,
}

impl Cut {
    /// Bytes up to the line end that ends the record, and how many lines it covers. `None` if it goes on behind the text, or
    /// the text ends within quotes, or there is none.
    fn end(&mut self, dialect: &Dialect, text: &[u8], at_end: bool) -> Option<(usize, u64)> {
        let quote = dialect.quote;
        while let Some(rest) = text.get(self.at..).filter(|rest| !rest.is_empty()) {
            if self.quoted {
                let (quote, escape) = (quote.unwrap_or(b'"'), dialect.escape.or(quote).unwrap_or(b'"'));
                let Some(found) = memchr::memchr3(quote, escape, b'\n', rest) else {
                    self.at = text.len();
                    break;
                };
                let byte = rest.get(found).copied().unwrap_or_default();
                if byte == b'\n' {
                    self.lines += 1;
                } else if found + 1 == rest.len() && !at_end {
                    // What it means shows behind it.
                    self.at += found;
                    break;
                } else if byte == escape && escape != quote
                    || escape == quote && rest.get(found + 1) == Some(&quote)
                {
                    self.at += 1;
                } else {
                    (self.quoted, self.inside) = (false, true);
                }
                self.at += found + 1;
                continue;
            }
            if !self.inside && quote.is_some() && rest.first() == quote.as_ref() {
                self.quoted = true;
                self.at += 1;
                continue;
            }
            if !self.inside && dialect.trim && rest.first() == Some(&b' ') {
                self.at += 1;
                continue;
            }
            let Some(found) = memchr::memchr3(dialect.delimiter, b'\n', b'\r', rest) else {
                self.inside = true;
                self.at = text.len();
                break;
            };
            match rest.get(found) {
                Some(byte) if *byte == dialect.delimiter => {
                    self.inside = false;
                    self.at += found + 1;
                }
                Some(b'\r') if found + 1 == rest.len() && !at_end => {
                    self.inside = self.inside || found > 0;
                    self.at += found;
                    break;
                }
                _ => return Some((self.at + found, self.lines + 1)),
            }
        }
        (at_end && !self.quoted && !text.is_empty()).then_some((text.len(), self.lines + 1))
    }
}

/// What a record's text comes to: its fields, or why it breaks the rules.
///
/// # Errors
///
/// If nobody knows where the rows in it end.
fn read(dialect: &Dialect, record: &mut Record, lines: u64) -> Result<Next, String> {
    match (split(dialect, record), std::str::from_utf8(&record.raw)) {
        (Ok(()), Ok(_)) => Ok(Next::Record),
        (Ok(()), Err(error)) => {
            let at = error.valid_up_to() + 1;
            Ok(Next::Broken(format!("byte {at} of the row is not UTF-8; {OTHER_ENCODING}")))
        }
        (Err(why), _) if lines > 1 => Err(format!(
            "{why}, and the row would cover {lines} lines: nobody knows where the rows in it end"
        )),
        (Err(why), _) => Ok(Next::Broken(why)),
    }
}

/// Records of a text that is there, whose first byte begins one.
///
/// What is plain (no comments, blanks or escapes, line ends as they should be, UTF-8) is read in one pass, without a copy; every record
/// that is not, as [`Records`] reads it.
pub(super) struct Slice<'a> {
    text: &'a [u8],
    dialect: Dialect,
    /// Whether nothing comes behind the text.
    is_last: bool,
    /// The text, if it is plain.
    plain: Option<&'a str>,
    at: usize,
    lines: u64,
    /// The fields of the record at hand, if it was read without a copy; or of a block of records, one after the other.
    spans: Vec<Span>,
    record: Record,
    is_copied: bool,
    /// Where the record at hand begins and ends, and the lines before it.
    place: (usize, usize, u64),
}

/// Where a field stands in its text, and whether it stood in quotes, which are not part of it.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    end: u32,
    is_quoted: bool,
}

/// A place between two records of a [`Slice`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    at: usize,
    lines: u64,
}

impl<'a> Slice<'a> {
    pub(super) fn new(text: &'a [u8], dialect: Dialect, is_last: bool) -> Self {
        let keeps_rules = dialect.comment.is_none()
            && !dialect.trim
            && dialect.escape.is_none_or(|escape| Some(escape) == dialect.quote)
            && memchr::memchr_iter(b'\r', text).all(|at| text.get(at + 1) == Some(&b'\n'));
        let is_short = u32::try_from(text.len()).is_ok();
        let plain = if keeps_rules && is_short { std::str::from_utf8(text).ok() } else { None };
        let record = Record::default();
        Self {
            text,
            dialect,
            is_last,
            plain,
            at: 0,
            lines: 0,
            spans: Vec::new(),
            record,
            is_copied: false,
            place: (0, 0, 0),
        }
    }

    /// Bytes of the records that were read, and the lines that they cover.
    pub(super) fn taken(&self) -> (usize, u64) {
        (self.at, self.lines)
    }

    /// The first byte of the record at hand and the line that it starts on, both from 0.
    pub(super) fn place(&self) -> (u64, u64) {
        (self.place.0 as u64, self.place.2)
    }

    /// The record at hand as it stands in the text.
    pub(super) fn raw(&self) -> &'a [u8] {
        self.text.get(self.place.0..self.place.1).unwrap_or_default()
    }

    /// How many fields the record at hand has.
    pub(super) fn len(&self) -> usize {
        if self.is_copied { self.record.len() } else { self.spans.len() }
    }

    /// A field of the record at hand, and whether it stood in quotes.
    pub(super) fn field(&self, index: usize) -> Option<(&str, bool)> {
        if self.is_copied {
            let (field, quoted) = self.record.field(index)?;
            return Some((std::str::from_utf8(field).ok()?, quoted));
        }
        self.spans.get(index).and_then(|span| self.text_of(*span))
    }

    fn text_of(&self, span: Span) -> Option<(&'a str, bool)> {
        Some((self.plain?.get(span.start as usize..span.end as usize)?, span.is_quoted))
    }

    /// Where the next record begins.
    pub(super) fn mark(&self) -> Mark {
        Mark { at: self.at, lines: self.lines }
    }

    /// Goes back to where a record began.
    pub(super) fn rewind(&mut self, to: Mark) {
        (self.at, self.lines) = (to.at, to.lines);
    }

    /// Reads records of so many fields that need no copy, at most so many of them and, but for the first, so many bytes: how many. It ends before
    /// a record that is none of these, which [`next`](Self::next) reads.
    pub(super) fn block(&mut self, fields: usize, rows: usize, bytes: usize) -> usize {
        self.spans.clear();
        let (begin, mut count) = (self.at, 0);
        while self.plain.is_some() && count < rows && self.at - begin < bytes {
            let (before, mark) = (self.spans.len(), self.mark());
            let is_read = self.next_plain();
            if is_read && self.place.0 == self.place.1 {
                self.spans.truncate(before);
            } else if is_read && self.spans.len() - before == fields {
                count += 1;
            } else {
                self.spans.truncate(before);
                self.rewind(mark);
                break;
            }
        }
        count
    }

    /// One field of each record of the block that was read last, of records of so many fields.
    pub(super) fn column(&self, index: usize, fields: usize) -> impl Iterator<Item = (&'a str, bool)> {
        let spans = self.spans.chunks_exact(fields).filter_map(move |record| record.get(index));
        spans.filter_map(|span| self.text_of(*span))
    }

    /// Reads the next record, and skips empty lines and comments. [`Next::End`] also if the last one goes on behind the text.
    ///
    /// # Errors
    ///
    /// If nobody knows where the rows behind it begin, with the lines before it.
    pub(super) fn next(&mut self) -> Result<Next, (u64, String)> {
        loop {
            self.spans.clear();
            if self.plain.is_some() && self.next_plain() {
                if self.place.0 == self.place.1 {
                    continue;
                }
                self.is_copied = false;
                return Ok(Next::Record);
            }
            let text = self.text.get(self.at..).unwrap_or_default();
            let Some((length, lines)) = Cut::default().end(&self.dialect, text, self.is_last) else {
                return match self.is_last && !text.is_empty() {
                    true => Err((self.lines, NEVER_CLOSED.to_owned())),
                    false => Ok(Next::End),
                };
            };
            let line_end = line_end(text, length);
            self.place = (self.at, self.at + length, self.lines);
            self.at += length + line_end;
            self.lines += lines;
            self.record.clear();
            self.record.raw.extend_from_slice(text.get(..length).unwrap_or_default());
            if !self.dialect.skips(&self.record.raw) {
                self.is_copied = true;
                return read(&self.dialect, &mut self.record, lines).map_err(|why| (self.place.2, why));
            }
        }
    }

    /// Reads a record that needs no copy, and adds its fields; false if it does, or has no end in the text, and then nothing was read.
    fn next_plain(&mut self) -> bool {
        let (text, dialect) = (self.text, &self.dialect);
        let marks = [dialect.delimiter, b'\n', dialect.quote.unwrap_or(b'\n')];
        let (mut at, mut lines) = (self.at, 0);
        // A text that is longer is not plain.
        let short = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        let span = |start, end, is_quoted| Span { start: short(start), end: short(end), is_quoted };
        let end = loop {
            if dialect.quote.is_some() && text.get(at) == dialect.quote.as_ref() {
                let quote = dialect.quote.unwrap_or_default();
                let field = text.get(at + 1..).unwrap_or_default();
                let Some(length) = memchr::memchr(quote, field) else { return false };
                let (start, end) = (at + 1, at + 1 + length);
                lines += memchr::memchr_iter(b'\n', field.get(..length).unwrap_or_default()).count() as u64;
                self.spans.push(span(start, end, true));
                match text.get(end + 1..) {
                    Some([b'\n', ..]) => break (end + 1, 1),
                    Some([b'\r', b'\n', ..]) => break (end + 1, 2),
                    Some([byte, ..]) if *byte == dialect.delimiter => at = end + 2,
                    _ => return false,
                }
                continue;
            }
            let Some(found) = first_of(text, at, marks) else { return false };
            match text.get(found) {
                Some(byte) if *byte == dialect.delimiter => {
                    self.spans.push(span(at, found, false));
                    at = found + 1;
                }
                Some(b'\n') => {
                    let is_two = found > at && text.get(found - 1) == Some(&b'\r');
                    let end = found - usize::from(is_two);
                    self.spans.push(span(at, end, false));
                    break (end, 1 + usize::from(is_two));
                }
                _ => return false,
            }
        };
        self.place = (self.at, end.0, self.lines);
        self.at = end.0 + end.1;
        self.lines += lines + 1;
        true
    }
}

/// Where the first of three bytes stands from `at` on: eight bytes at a time, since fields are short.
fn first_of(text: &[u8], mut at: usize, marks: [u8; 3]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    // The lowest byte that is zero has its highest bit set here, and no byte below it has.
    let zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let [first, second, third] = marks.map(|mark| u64::from(mark) * ONES);
    while let Some(bytes) = text.get(at..at + 8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok()) {
        let word = u64::from_le_bytes(bytes);
        let found = zero(word ^ first) | zero(word ^ second) | zero(word ^ third);
        if found != 0 {
            return Some(at + found.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    let rest = text.get(at..)?;
    rest.iter().position(|byte| marks.contains(byte)).map(|found| at + found)
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

    /// The same, read in pieces side by side; records of two fields in blocks, if so.
    fn in_pieces(
        text: &[u8],
        dialect: Dialect,
        piece_bytes: usize,
        in_blocks: bool,
    ) -> Vec<Result<Vec<String>, String>> {
        use super::super::chunks::{Parsed, Piece, Shape, Start, read};
        let input = TextReader::new(Box::new(Cursor::new(text.to_vec())), encoding_rs::UTF_8);
        let shape = Shape { lines: 0, quote: dialect.quote, in_order: false, piece_bytes };
        let parse = move |piece: &Piece, _| {
            let (mut records, mut found) = (Slice::new(&piece.text, dialect, piece.is_last), Vec::new());
            loop {
                while in_blocks && records.block(2, 3, 20) > 0 {
                    let [first, second] = [0, 1].map(|index| records.column(index, 2));
                    let both =
                        first.zip(second).map(|(first, second)| [first.0, second.0].map(str::to_owned));
                    found.extend(both.map(|fields| Ok(fields.to_vec())));
                }
                let next = records.next();
                let line = records.place().1;
                match next {
                    Ok(Next::Record) => {
                        let fields =
                            (0..records.len()).map(|index| records.field(index).unwrap().0.to_owned());
                        found.push(Ok(fields.collect()));
                    }
                    Ok(Next::Broken(why)) => found.push(Err((line, why, false))),
                    Ok(Next::End) => break,
                    Err((line, why)) => {
                        found.push(Err((line, why, true)));
                        break;
                    }
                }
            }
            let (taken, lines) = records.taken();
            Ok(Parsed { found, lines, taken })
        };
        let mut all = Vec::new();
        let deliver = |found: Result<Vec<String>, (u64, String, bool)>, start: Start| {
            let is_end = matches!(found, Err((_, _, true)));
            all.push(found.map_err(|(line, why, _)| format!("line {}: {why}", start.lines + line + 1)));
            Ok(!is_end)
        };
        read(input, shape, parse, deliver, Error::data).unwrap();
        all
    }

    proptest! {
        #[test]
        fn side_by_side_is_as_one_by_one(
            text in prop::collection::vec(prop::sample::select(b"ab,,\"\"\"\r\n\n\n\xc3\xa4".to_vec()), 0..120), piece in 1_usize..40, odd: bool, in_blocks: bool,
        ) {
            let odd_one = Dialect { escape: Some(b'b'), comment: Some(b'a'), trim: true, ..PLAIN };
            let dialect = if odd { odd_one } else { PLAIN };
            prop_assert_eq!(in_pieces(&text, dialect, piece, in_blocks), records(&text, dialect, 7));
        }

        #[test]
        fn the_first_of_three_bytes_is_found(text in prop::collection::vec(prop::sample::select(b"abcdefgh\x00\x80\xff,;\n".to_vec()), 0..40), at in 0_usize..40) {
            let expected = text.iter().skip(at).position(|byte| b",;\n".contains(byte)).map(|found| at + found);
            prop_assert_eq!(first_of(&text, at, *b",;\n"), expected);
        }

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
