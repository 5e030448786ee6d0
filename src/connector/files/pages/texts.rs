//! Texts and bytes: a dictionary of their words, or each behind its length.

use std::{cmp::Ordering, ops::Range};

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

use super::{
    Bound, End, Ends, PAGE_BYTES, PageValues, Values,
    bits::put_words,
    places::{Places, hash_of, hash_of_bytes},
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
                // A dictionary of a megabyte takes one step more, of texts whose places have 31 bits.
                ends.push(u32::try_from(plain.len()).unwrap_or(u32::MAX));
                places.take(place, |word| hash_of_text(word_at(plain, ends, word)))
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
    fn range_of(&self, numbers: &[u32]) -> TextRange {
        let mut is_used = vec![false; self.ends.len()];
        for number in numbers {
            if let Some(is_used) = is_used.get_mut(*number as usize) {
                *is_used = true;
            }
        }
        let mut range = TextRange::default();
        for (number, is_used) in (0..).zip(is_used) {
            if is_used {
                range.take(&self.plain, place_of(&self.ends, number));
            }
        }
        range
    }
}

/// Where a word of a dictionary stands, whose words end at `ends`.
fn place_of(ends: &[u32], number: u32) -> Range<usize> {
    let number = number as usize;
    let start = number.checked_sub(1).and_then(|before| ends.get(before)).copied().unwrap_or_default();
    let end = ends.get(number).copied().unwrap_or(start);
    start as usize + LENGTH_BYTES..end as usize
}

/// A word of a dictionary, whose words are `plain` and end at `ends`.
fn word_at<'a>(plain: &'a [u8], ends: &[u32], number: u32) -> &'a [u8] {
    plain.get(place_of(ends, number)).unwrap_or_default()
}

/// Where the least and the greatest of some texts stand. Most are told by their first eight bytes.
#[derive(Default)]
struct TextRange {
    /// The place of each, and its first eight bytes.
    ends: Option<[(Range<usize>, u64); 2]>,
}

impl TextRange {
    /// Takes a text that stands in `plain`, as all before it do.
    fn take(&mut self, plain: &[u8], place: Range<usize>) {
        let at = |place: &Range<usize>| plain.get(place.clone()).unwrap_or_default();
        let (text, first) = (at(&place), head(at(&place)));
        let Some([least, greatest]) = &mut self.ends else {
            self.ends = Some([(place.clone(), first), (place, first)]);
            return;
        };
        if first < least.1 || first == least.1 && text < at(&least.0) {
            *least = (place.clone(), first);
        }
        if first > greatest.1 || first == greatest.1 && text > at(&greatest.0) {
            *greatest = (place, first);
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
        Some((first, last)) => hash_of(first, last),
        None => hash_of_bytes(text),
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

    /// A value as statistics tell it: of a long one the beginning, such that it is still an end.
    pub(super) fn told(&self, value: &[u8], end: End) -> Bound {
        let cut = if value.len() > STATISTIC_BYTES { self.cut(value) } else { value };
        match end {
            _ if cut.len() == value.len() => Bound { value: value.to_vec(), is_exact: true },
            End::Least => Bound { value: cut.to_vec(), is_exact: false },
            End::Greatest => match raised(cut, self.are_texts) {
                Some(value) => Bound { value, is_exact: false },
                None => Bound { value: value.to_vec(), is_exact: true },
            },
        }
    }

    /// The ends of texts that stand in `plain`.
    fn ends(&self, range: &TextRange, plain: &[u8]) -> Option<Ends> {
        let [least, greatest] = range.ends.as_ref()?;
        let told = |place: &Range<usize>, end| self.told(plain.get(place.clone()).unwrap_or_default(), end);
        Some(Ends { least: told(&least.0, End::Least), greatest: told(&greatest.0, End::Greatest) })
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
        let room = PAGE_BYTES.saturating_sub(self.plain.len());
        let most = first.saturating_add(i32::try_from(room).unwrap_or(i32::MAX));
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
                    let end = self.plain.len();
                    self.range.take(&self.plain, end - text.len()..end);
                }
            }
            Some(words) => self.words.extend(texts.map(|text| words.number_of(text))),
        }
    }

    fn unload(&mut self) {
        self.batch = (OffsetBuffer::new_empty(), Buffer::default());
    }

    fn page_bytes(&self) -> usize {
        self.plain.len()
    }

    fn finish_page(&mut self, page: &mut Vec<u8>) -> PageValues {
        let text_bytes = Some(signed(std::mem::take(&mut self.text_bytes)));
        match &self.dictionary {
            None => {
                let range = std::mem::take(&mut self.range);
                let ends = self.ends(&range, &self.plain);
                page.append(&mut self.plain);
                self.plain.shrink_to(2 * PAGE_BYTES);
                PageValues { encoding: Encoding::PLAIN, ends, text_bytes }
            }
            Some(words) => {
                put_words(&self.words, words.ends.len(), page);
                let ends = self.ends(&words.range_of(&self.words), &words.plain);
                self.words.clear();
                PageValues { encoding: Encoding::RLE_DICTIONARY, ends, text_bytes }
            }
        }
    }

    fn dictionary_bytes(&self) -> Option<usize> {
        self.dictionary.as_ref().map(|words| words.plain.len())
    }

    fn word_count(&self) -> usize {
        self.dictionary.as_ref().map_or(0, |words| words.ends.len())
    }

    fn take_dictionary(&mut self) -> Option<(Vec<u8>, usize)> {
        let words = self.dictionary.take()?;
        self.words = Vec::new();
        Some((words.plain, words.ends.len()))
    }

    fn compare(&self, one: &[u8], other: &[u8]) -> Ordering {
        one.cmp(other)
    }

    fn statistics(&self, ends: Option<&Ends>, nulls: u64) -> Statistics {
        let value = |end: &Bound| ByteArray::from(end.value.clone());
        let (least, greatest) = (ends.map(|ends| &ends.least), ends.map(|ends| &ends.greatest));
        ValueStatistics::new(least.map(value), greatest.map(value), None, Some(nulls), false)
            .with_min_is_exact(least.is_some_and(|end| end.is_exact))
            .with_max_is_exact(greatest.is_some_and(|end| end.is_exact))
            .into()
    }

    fn held_bytes(&self) -> usize {
        let dictionary = self.dictionary.as_ref().map_or(0, |words| {
            words.places.held_bytes() + words.ends.capacity() * size_of::<u32>() + words.plain.capacity()
        });
        dictionary + self.words.capacity() * size_of::<u32>() + self.plain.capacity()
    }
}
