//! Bytes of a file as text: decompressed, decoded, and read in bounded pieces.
//!
//! Compression is told by the first bytes, not by the name. Text is UTF-8 after decoding; bytes that the declared
//! encoding does not know are an error with their place, never a replacement character.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::Arc,
};

use encoding_rs::{DecoderResult, Encoding, UTF_8};

use crate::{
    connector::tap::Tap,
    error::{Error, Result},
};

const BUFFER_BYTES: usize = 256 << 10;

/// Counts compressed bytes as they are read, for the progress.
struct Counted {
    file: Box<dyn Read + Send>,
    tap: Option<Arc<Tap>>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        if let Some(tap) = &self.tap {
            tap.bytes(read as u64);
        }
        Ok(read)
    }
}

/// The decompressed bytes of `file`.
///
/// # Errors
///
/// If its first bytes cannot be read.
pub(super) fn decompressed(
    file: Box<dyn Read + Send>,
    tap: Option<Arc<Tap>>,
) -> io::Result<Box<dyn BufRead + Send>> {
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, Counted { file, tap });
    let start = reader.fill_buf()?;
    Ok(match start {
        [0x1f, 0x8b, ..] => {
            // Several gzip members in one file are one text.
            Box::new(BufReader::with_capacity(BUFFER_BYTES, flate2::bufread::MultiGzDecoder::new(reader)))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(BufReader::with_capacity(
            BUFFER_BYTES,
            zstd::stream::read::Decoder::with_buffer(reader)?,
        )),
        _ => Box::new(reader),
    })
}

/// What to do about bytes that are not UTF-8.
pub(super) const OTHER_ENCODING: &str =
    "if the file is in another encoding, declare it: `format: { encoding: latin1 }`";

/// The encoding of that name.
///
/// # Errors
///
/// If there is none.
pub(super) fn encoding(name: Option<&str>) -> Result<&'static Encoding> {
    let Some(name) = name else { return Ok(UTF_8) };
    Encoding::for_label(name.replace('_', "-").as_bytes())
        .or_else(|| Encoding::for_label(name.as_bytes()))
        .ok_or_else(|| {
            Error::configuration(format!("there is no encoding `{name}`"))
                .hint("Such as `utf-8`, `latin1`, `windows-1252`, `iso-8859-15`, `shift_jis`, `utf-16le`.")
        })
}

/// Text that is read in pieces. `text()` holds what was read and not yet taken.
pub(super) struct TextReader {
    bytes: Box<dyn BufRead + Send>,
    decoder: Option<encoding_rs::Decoder>,
    buffer: Vec<u8>,
    start: usize,
    /// Bytes of decoded text before `buffer[start]`.
    taken: u64,
    /// Bytes of the (decompressed) file that were read.
    read: u64,
    end: bool,
    encoding: &'static str,
}

impl TextReader {
    pub(super) fn new(bytes: Box<dyn BufRead + Send>, encoding: &'static Encoding) -> Self {
        let decoder = (encoding != UTF_8).then(|| encoding.new_decoder());
        Self {
            bytes,
            decoder,
            buffer: Vec::new(),
            start: 0,
            taken: 0,
            read: 0,
            end: false,
            encoding: encoding.name(),
        }
    }

    /// What was read and not yet taken.
    pub(super) fn text(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Whether the file has no more.
    pub(super) fn at_end(&self) -> bool {
        self.end
    }

    /// The offset of `text()`'s first byte in the decoded text.
    pub(super) fn offset(&self) -> u64 {
        self.taken
    }

    /// Drops the first `count` bytes of `text()`.
    pub(super) fn take(&mut self, count: usize) {
        self.start += count;
        self.taken += count as u64;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
    }

    /// Reads a piece more.
    pub(super) fn fill(&mut self) -> Result<(), String> {
        if self.start > 0 && self.start * 2 >= self.buffer.len() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let first = self.read == 0;
        let piece = self.bytes.fill_buf().map_err(|error| format!("cannot be read on: {error}"))?;
        let length = piece.len();
        if let Some(decoder) = &mut self.decoder {
            let mut source = piece;
            loop {
                let need = decoder
                    .max_utf8_buffer_length_without_replacement(source.len())
                    .unwrap_or(source.len() * 3 + 16);
                let old = self.buffer.len();
                self.buffer.resize(old + need, 0);
                let target = self.buffer.get_mut(old..).unwrap_or_default();
                let (result, used, written) =
                    decoder.decode_to_utf8_without_replacement(source, target, length == 0);
                self.buffer.truncate(old + written);
                let consumed = length - source.len() + used;
                source = source.get(used..).unwrap_or_default();
                match result {
                    DecoderResult::InputEmpty => break,
                    DecoderResult::OutputFull => {}
                    DecoderResult::Malformed(..) => {
                        let at = self.read + consumed as u64;
                        return Err(format!("byte {at} is not {}", self.encoding));
                    }
                }
            }
        } else {
            let piece = if first { piece.strip_prefix(b"\xef\xbb\xbf").unwrap_or(piece) } else { piece };
            self.buffer.extend_from_slice(piece);
        }
        self.bytes.consume(length);
        self.read += length as u64;
        self.end = length == 0;
        Ok(())
    }
}
