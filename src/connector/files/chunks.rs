//! Text that is parsed piece by piece, on all cores, and handed on in its order.
//!
//! A piece ends behind a line end outside quotes, if quotes come in pairs, as they do in files that keep the rules. Whether it was
//! so is known when the piece has been parsed: what a parser leaves over belongs to a row that goes on, and is parsed once more with the
//! piece behind it. So only speed depends on where pieces end, and no row does.

use std::{collections::VecDeque, sync::Arc};

use super::input::TextReader;
use crate::{
    error::{Error, Result},
    runtime::{self, Computing},
};

/// Longer rows are refused: an unclosed quote would otherwise read the whole file into memory.
pub(super) const MAX_ROW_BYTES: usize = 64 << 20;

/// Why a row is refused that begins on that line.
pub(super) fn too_long(line: u64) -> String {
    format!("line {line}: the row is longer than {} MiB: is a quote not closed?", MAX_ROW_BYTES >> 20)
}

/// What a piece came to.
#[derive(Debug)]
pub(super) struct Parsed<T> {
    /// What was found in it, in its order; lines and bytes are counted from its start.
    pub(super) found: Vec<T>,
    /// Lines that ended in what was taken.
    pub(super) lines: u64,
    /// Bytes that were taken: the rest is of a row that goes on.
    pub(super) taken: usize,
}

/// What is parsed: a text that begins with a row.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub(super) text: Arc<Vec<u8>>,
    /// Bytes before it, of the decoded text.
    bytes: u64,
    /// Whether nothing comes behind it.
    pub(super) is_last: bool,
}

/// Where the rows of a piece stand in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    /// Lines before it.
    pub(super) lines: u64,
    /// Bytes before it, of the decoded text.
    pub(super) bytes: u64,
}

/// A piece that somebody parses.
type Parsing<T> = Computing<Result<Parsed<T>>>;

/// A piece whose turn will come, and who parses it meanwhile.
type Waiting<T> = (Piece, Option<Parsing<T>>);

/// A text, cut into pieces.
struct Pieces {
    input: TextReader,
    quote: Option<u8>,
    size: usize,
    ended: bool,
}

impl Pieces {
    fn next(&mut self) -> Result<Option<Piece>, String> {
        if self.ended {
            return Ok(None);
        }
        let mut wanted = self.size;
        loop {
            while self.input.text().len() < wanted && !self.input.at_end() {
                self.input.fill()?;
            }
            let text = self.input.text();
            let bytes = self.input.offset();
            self.ended = self.input.at_end();
            let length = match self.ended {
                true => text.len(),
                false => match last_end(text, self.quote) {
                    Some(length) => length,
                    // Perhaps a long row. Else it is cut anywhere, and joined again by whoever parses it.
                    None if wanted == self.size => {
                        wanted *= 4;
                        continue;
                    }
                    None => text.len(),
                },
            };
            let text = Arc::new(text.get(..length).unwrap_or_default().to_vec());
            self.input.take(length);
            return Ok(Some(Piece { text, bytes, is_last: self.ended }));
        }
    }
}

/// Bytes up to and with the last line end outside quotes, if quotes come in pairs.
fn last_end(text: &[u8], quote: Option<u8>) -> Option<usize> {
    let Some(quote) = quote else { return memchr::memrchr(b'\n', text).map(|at| at + 1) };
    let quotes = |text: &[u8]| memchr::memchr_iter(quote, text).count();
    let (mut inside, mut end) = (quotes(text) % 2 == 1, text.len());
    while let Some(at) = text.get(..end).and_then(|text| memchr::memrchr(b'\n', text)) {
        inside ^= text.get(at..end).is_some_and(|behind| quotes(behind) % 2 == 1);
        if !inside {
            return Some(at + 1);
        }
        end = at;
    }
    None
}

/// What is known of a text before it is parsed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Lines that were read before it.
    pub(super) lines: u64,
    /// The character that comes in pairs around line ends that end no row.
    pub(super) quote: Option<u8>,
    /// Whether rows want to know their line while they are parsed: then none is parsed ahead.
    pub(super) in_order: bool,
    /// Bytes of a piece, more or less.
    pub(super) piece_bytes: usize,
}

/// Bytes of a piece where a batch is cut at so many: so few that several pieces are there at a time, and that a copied one is still in the processor's
/// cache when it is parsed (C libraries copy past it what is large: measured, 3/4 MiB and more); so many that handing them over costs nothing.
pub(super) fn piece_bytes(batch_bytes: usize) -> usize {
    (batch_bytes / 8).clamp(64 << 10, 640 << 10)
}

/// Parses a text and delivers what there is in it, in order. False once nobody wants more. `parse` is given a piece and the lines before it.
///
/// # Errors
///
/// What reading, parsing and delivering say; `fatal` makes an error of what is wrong with the text.
pub(super) fn read<T: Send + 'static>(
    input: TextReader,
    shape: Shape,
    parse: impl Fn(&Piece, u64) -> Result<Parsed<T>> + Send + Sync + 'static,
    mut deliver: impl FnMut(T, Start) -> Result<bool>,
    fatal: impl Fn(String) -> Error,
) -> Result<bool> {
    let Shape { lines, quote, in_order, piece_bytes } = shape;
    let ahead = if in_order { 1 } else { 2 * runtime::cores() + 2 };
    let parse = Arc::new(parse);
    let mut pieces = Pieces { input, quote, size: piece_bytes, ended: false };
    let mut waiting: VecDeque<Result<Waiting<T>, String>> = VecDeque::new();
    let (mut lines, mut left) = (lines, Vec::new());
    loop {
        while waiting.len() < ahead {
            let piece = match pieces.next() {
                Ok(Some(piece)) => piece,
                Ok(None) => break,
                // Told when its turn comes: what stands before it is still read.
                Err(why) => {
                    pieces.ended = true;
                    waiting.push_back(Err(why));
                    break;
                }
            };
            // Of what is small nothing is gained by handing it to somebody else.
            let alone = in_order || (piece.is_last && waiting.is_empty());
            let (own, parse) = (piece.clone(), Arc::clone(&parse));
            let parsing = (!alone).then(|| runtime::compute(move || parse(&own, 0)));
            waiting.push_back(Ok((piece, parsing)));
        }
        let Some(next) = waiting.pop_front() else { return Ok(true) };
        let (piece, parsing) = next.map_err(&fatal)?;
        let (piece, parsed) = match parsing {
            Some(parsing) if left.is_empty() => (piece, parsing.wait()??),
            _ => {
                let bytes = piece.bytes - left.len() as u64;
                left.extend_from_slice(&piece.text);
                let piece = Piece { text: Arc::new(std::mem::take(&mut left)), bytes, ..piece };
                let parsed = parse(&piece, lines)?;
                (piece, parsed)
            }
        };
        for found in parsed.found {
            if !deliver(found, Start { lines, bytes: piece.bytes })? {
                return Ok(false);
            }
        }
        lines += parsed.lines;
        left.extend_from_slice(piece.text.get(parsed.taken..).unwrap_or_default());
        if left.len() > MAX_ROW_BYTES {
            return Err(fatal(too_long(lines + 1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_ends_behind_a_line_end_outside_quotes() {
        let end = |text: &str| last_end(text.as_bytes(), Some(b'"'));
        assert_eq!(end("a,b\nc"), Some(4));
        assert_eq!(end("a,\"b\nc"), None);
        assert_eq!(end("a\n\"b\nc\"\nd"), Some(8));
        assert_eq!(end("a\n\"b\nc"), Some(2));
        assert_eq!(end("a\n\"b\n\"\"c\nd"), Some(2));
        assert_eq!(end("abc"), None);
        assert_eq!(last_end(b"a\"\nb", None), Some(3));
    }
}
