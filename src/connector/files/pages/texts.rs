//! Texts and bytes: a dictionary of their words, or each behind its length.

use std::cmp::Ordering;
use std::ops::Range;

use ::parquet::{
    basic::Encoding,
    data_type::ByteArray,
    errors::Result,
    file::statistics::{Statistics, ValueStatistics},
};
use arrow::{
    array::{Array, AsArray},
    buffer::{Buffer, NullBuffer, OffsetBuffer},
    datatypes::ArrowNativeType,
};
use twox_hash::XxHash3_64;

use super::{
    End, Ends, PAGE_BYTES, PageValues, Values,
    bits::put_words,
    places::{Places, SEED, mixed},
    signed,
};

/// Bytes of a text that statistics hold at most.
pub(super) const STATISTIC_BYTES: usize = 64;

/// Texts and bytes.
pub(super) struct Texts {
    /// Whether they are texts, whose statistics end behind a whole character.
    are_texts: bool,
    batch: (OffsetBuffer<i32>, Buffer),
    dictionary: Option<Words>,
    words: Vec<u32>,
    plain: Vec<u8>,
    text_bytes: usize,
    /// Of the open page, if it is plain.
    range: TextRange,
}

/// The words of a dictionary.
#[derive(Default)]
struct Words {
    places: Places,
    /// As they are written: each behind its length.
    plain: Vec<u8>,
    /// Where each ends.
    ends: Vec<u32>,
    /// The number and one of each word of a single byte, as codes are, or 0.
    codes: Vec<u32>,
}

/// Bytes of the length before a plain text.
const LENGTH_BYTES: usize = size_of::<u32>();

impl Words {
    fn number_of(&mut self, text: &[u8]) -> u32 {
        let Self { places, plain, ends, codes } = self;
        if let [byte] = text
            && let Some(&number) = codes.get(usize::from(*byte))
            && number != 0
        {
            return number - 1;
        }
        let hash = hash_of_text(text);
        let number =
            places.find(hash, |word| is_same(word_at(plain, ends, word), text)).unwrap_or_else(|place| {
                put_text(text, plain);
                // A dictionary of a megabyte takes one batch more, whose offsets have 31 bits.
                ends.push(u32::try_from(plain.len()).unwrap_or(u32::MAX));
                places.take(place, hash, |word| hash_of_text(word_at(plain, ends, word)))
            });
        if let [byte] = text {
            codes.resize(1 << u8::BITS, 0);
            if let Some(code) = codes.get_mut(usize::from(*byte)) {
                *code = number + 1;
            }
        }
        number
    }

    /// The least and the greatest of the words with these numbers.
    fn ends_of(&self, numbers: &[u32]) -> Option<Ends> {
        let mut is_used = vec![false; self.ends.len()];
        for number in numbers {
            if let Some(is_used) = is_used.get_mut(*number as usize) {
                *is_used = true;
            }
        }
        let mut range = TextRange::default();
        for (number, is_used) in (0..).zip(is_used) {
            if is_used {
                range.take(word_at(&self.plain, &self.ends, number));
            }
        }
        range.ends
    }
}

/// A word of a dictionary, whose words are `plain` and end at `ends`.
fn word_at<'a>(plain: &'a [u8], ends: &[u32], number: u32) -> &'a [u8] {
    let number = number as usize;
    let start = number.checked_sub(1).and_then(|before| ends.get(before)).copied().unwrap_or_default();
    let end = ends.get(number).copied().unwrap_or(start);
    plain.get(start as usize + LENGTH_BYTES..end as usize).unwrap_or_default()
}

/// The least and the greatest of texts. Most are told by their first eight bytes.
#[derive(Default)]
struct TextRange {
    ends: Option<Ends>,
    least: u64,
    greatest: u64,
}

impl TextRange {
    fn take(&mut self, text: &[u8]) {
        let head = head(text);
        let Some(Ends { least, greatest }) = &mut self.ends else {
            (self.least, self.greatest) = (head, head);
            self.ends = Some(Ends { least: text.to_vec(), greatest: text.to_vec() });
            return;
        };
        if head < self.least || head == self.least && text < least.as_slice() {
            self.least = head;
            *least = text.to_vec();
        }
        if head > self.greatest || head == self.greatest && text > greatest.as_slice() {
            self.greatest = head;
            *greatest = text.to_vec();
        }
    }
}

/// The first eight bytes of a text as a number of the same order, with zeros behind a shorter one.
fn head(text: &[u8]) -> u64 {
    match text.first_chunk() {
        Some(head) => u64::from_be_bytes(*head),
        None => text
            .iter()
            .zip([56, 48, 40, 32, 24, 16, 8])
            .fold(0, |head, (byte, place)| head | u64::from(*byte) << place),
    }
}

/// Appends a text as Parquet writes it plainly.
fn put_text(text: &[u8], out: &mut Vec<u8>) {
    // It comes from a batch, where lengths have 31 bits.
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(text);
}

fn hash_of_text(text: &[u8]) -> u64 {
    match halves(text) {
        Some((first, last)) => mixed(first ^ *SEED, last ^ 0x9E37_79B9_7F4A_7C15),
        None => XxHash3_64::oneshot_with_seed(*SEED, text),
    }
}

/// The two halves of a text of up to sixteen bytes, which may cover each other: of texts of one length no two have the same.
fn halves(text: &[u8]) -> Option<(u64, u64)> {
    if let (Some(first), Some(last), ..=16) = (text.first_chunk(), text.last_chunk(), text.len()) {
        return Some((u64::from_le_bytes(*first), u64::from_le_bytes(*last)));
    }
    if let (Some(first), Some(last), ..=7) = (text.first_chunk(), text.last_chunk(), text.len()) {
        return Some((u32::from_le_bytes(*first).into(), u32::from_le_bytes(*last).into()));
    }
    let word = text.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    (text.len() <= 3).then_some((word, text.len() as u64))
}

fn is_same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len()
        && match halves(one) {
            Some(found) => halves(other) == Some(found),
            None => one == other,
        }
}

impl Texts {
    pub(super) fn new(are_texts: bool, with_dictionary: bool) -> Self {
        Self {
            are_texts,
            batch: (OffsetBuffer::new_empty(), Buffer::default()),
            dictionary: with_dictionary.then(Default::default),
            words: Vec::new(),
            plain: Vec::new(),
            text_bytes: 0,
            range: TextRange::default(),
        }
    }

    /// The beginning of a long value, up to a whole character.
    fn cut<'a>(&self, value: &'a [u8]) -> &'a [u8] {
        match std::str::from_utf8(value) {
            Ok(text) if self.are_texts => {
                text.get(..text.floor_char_boundary(STATISTIC_BYTES)).map_or(value, str::as_bytes)
            }
            _ => value.get(..STATISTIC_BYTES).unwrap_or(value),
        }
    }
}

/// The least that is greater than all that begin with `value`, and not longer: its last character, or byte, that can be raised is, and what is behind it goes.
fn raised(value: &[u8], is_text: bool) -> Option<Vec<u8>> {
    if is_text && let Ok(text) = std::str::from_utf8(value) {
        return text.char_indices().rev().find_map(|(at, character)| {
            let next = char::from_u32(u32::from(character) + 1)?;
            (next.len_utf8() == character.len_utf8()).then(|| {
                let mut raised = text.get(..at).unwrap_or_default().to_owned();
                raised.push(next);
                raised.into_bytes()
            })
        });
    }
    let last = value.iter().rposition(|byte| *byte < u8::MAX)?;
    let mut raised = value.get(..=last)?.to_vec();
    *raised.last_mut()? += 1;
    Some(raised)
}

impl Values for Texts {
    fn load(&mut self, array: &dyn Array, _nulls: Option<&NullBuffer>) -> Result<()> {
        self.batch = if self.are_texts {
            let texts = array.as_string::<i32>();
            (texts.offsets().clone(), texts.values().clone())
        } else {
            let values = array.as_binary::<i32>();
            (values.offsets().clone(), values.values().clone())
        };
        Ok(())
    }

    fn fit(&self, rows: Range<usize>) -> usize {
        let Some(ends) = self.batch.0.get(rows.start..=rows.end) else { return rows.len() };
        let first = ends.first().copied().unwrap_or_default();
        let most = first.saturating_add(i32::try_from(PAGE_BYTES).unwrap_or(i32::MAX));
        // As many ends as there are rows, and the place where the first begins.
        ends.partition_point(|end| *end <= most).saturating_sub(1).max(1)
    }

    fn put(&mut self, rows: Range<usize>) {
        let (offsets, data) = &self.batch;
        let Some(ends) = offsets.get(rows.start..=rows.end) else { return };
        let (Some(first), Some(last)) = (ends.first(), ends.last()) else { return };
        let places = ends.iter().zip(ends.iter().skip(1));
        let texts = places
            .map(|(start, end)| data.as_slice().get(start.as_usize()..end.as_usize()).unwrap_or_default());
        let bytes = last.as_usize() - first.as_usize();
        self.text_bytes += bytes;
        match &mut self.dictionary {
            None => {
                self.plain.reserve(bytes + rows.len() * LENGTH_BYTES);
                for text in texts {
                    put_text(text, &mut self.plain);
                    self.range.take(text);
                }
            }
            Some(words) => self.words.extend(texts.map(|text| words.number_of(text))),
        }
    }

    fn page_bytes(&self) -> usize {
        self.plain.len()
    }

    fn finish_page(&mut self, page: &mut Vec<u8>) -> PageValues {
        let text_bytes = Some(signed(std::mem::take(&mut self.text_bytes)));
        match &self.dictionary {
            None => {
                page.append(&mut self.plain);
                let ends = std::mem::take(&mut self.range).ends;
                PageValues { encoding: Encoding::PLAIN, ends, text_bytes }
            }
            Some(words) => {
                put_words(&self.words, words.ends.len(), page);
                let ends = words.ends_of(&self.words);
                self.words.clear();
                PageValues { encoding: Encoding::RLE_DICTIONARY, ends, text_bytes }
            }
        }
    }

    fn dictionary_bytes(&self) -> Option<usize> {
        self.dictionary.as_ref().map(|words| words.plain.len())
    }

    fn take_dictionary(&mut self) -> Option<(Vec<u8>, usize)> {
        let words = self.dictionary.take()?;
        self.words = Vec::new();
        Some((words.plain, words.ends.len()))
    }

    fn compare(&self, one: &[u8], other: &[u8]) -> Ordering {
        one.cmp(other)
    }

    fn shown(&self, value: &[u8], end: End) -> (Vec<u8>, bool) {
        let cut = if value.len() > STATISTIC_BYTES { self.cut(value) } else { value };
        match end {
            End::Greatest if cut.len() < value.len() => match raised(cut, self.are_texts) {
                Some(raised) => (raised, false),
                None => (value.to_vec(), true),
            },
            _ => (cut.to_vec(), cut.len() == value.len()),
        }
    }

    fn statistics(&self, ends: Option<&Ends>, nulls: u64) -> Statistics {
        let least = ends.map(|ends| self.shown(&ends.least, End::Least));
        let greatest = ends.map(|ends| self.shown(&ends.greatest, End::Greatest));
        let is_exact =
            |shown: &Option<(Vec<u8>, bool)>| shown.as_ref().is_some_and(|(_, is_exact)| *is_exact);
        let (least_is_exact, greatest_is_exact) = (is_exact(&least), is_exact(&greatest));
        let value = |shown: Option<(Vec<u8>, bool)>| shown.map(|(value, _)| ByteArray::from(value));
        ValueStatistics::new(value(least), value(greatest), None, Some(nulls), false)
            .with_min_is_exact(least_is_exact)
            .with_max_is_exact(greatest_is_exact)
            .into()
    }

    fn held_bytes(&self) -> usize {
        let dictionary = self.dictionary.as_ref().map_or(0, |words| {
            words.places.held_bytes() + words.ends.capacity() * size_of::<u32>() + words.plain.capacity()
        });
        dictionary + self.words.capacity() * size_of::<u32>() + self.plain.capacity()
    }
}
