//! Whole numbers, and what is written as such: a dictionary of their words, or steps from one to the next.

use std::{cmp::Ordering, ops::Range};

use ::parquet::{
    basic::Encoding,
    errors::{ParquetError, Result},
    file::statistics::{Statistics, ValueStatistics},
};
use arrow::{
    array::{Array, AsArray},
    buffer::{NullBuffer, ScalarBuffer},
    compute::cast,
    datatypes::{ArrowNativeType, DataType, Decimal128Type, ToByteSlice},
};

use super::{
    Bound, Ends, PageValues, Values,
    bits::{put_steps, put_words},
    places::{Places, hash_of},
    signed,
};

/// A type of Parquet's for whole numbers.
pub(super) trait Number: ArrowNativeType + ToByteSlice + Ord + Into<i64> + TryFrom<i128> {
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
    /// How far it is from another to this one, around the end of the type if need be.
    fn step_from(self, other: Self) -> Self;
    fn unsigned(self) -> u64;
    fn statistics(ends: Option<(Self, Self)>, nulls: u64) -> Statistics;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            fn from_bytes(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self::from_le_bytes)
            }

            fn step_from(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }

            fn unsigned(self) -> u64 {
                self.cast_unsigned().into()
            }

            fn statistics(ends: Option<(Self, Self)>, nulls: u64) -> Statistics {
                let (least, greatest) = ends.unzip();
                ValueStatistics::new(least, greatest, None, Some(nulls), false)
                    .with_backwards_compatible_min_max(true)
                    .into()
            }
        }
    };
}

number!(i32);
number!(i64);

/// Whole numbers, and what is written as such.
pub(super) struct Numbers<T: Number> {
    batch: ScalarBuffer<T>,
    dictionary: Option<NumberWords<T>>,
    /// The open page: numbers of words with a dictionary, values without.
    words: Vec<u32>,
    open: Vec<T>,
    ends: Option<(T, T)>,
}

impl<T: Number> Numbers<T> {
    pub(super) fn new(with_dictionary: bool) -> Self {
        Self {
            batch: ScalarBuffer::from(Vec::new()),
            dictionary: with_dictionary.then(NumberWords::new),
            words: Vec::new(),
            open: Vec::new(),
            ends: None,
        }
    }
}

/// How far the least and the greatest word may lie apart for each number between to have a place.
const NEAR: u64 = 1 << 16;

/// The words of a dictionary of whole numbers.
pub(super) struct NumberWords<T> {
    words: Vec<T>,
    places: NumberPlaces,
}

/// Which number has which word.
enum NumberPlaces {
    /// All lie close, as days and codes do: the number of a word and one for each from `first` on, 0 where none is.
    Near {
        first: i64,
        places: Vec<u32>,
    },
    Far(Places),
}

impl<T: Number> NumberWords<T> {
    pub(super) fn new() -> Self {
        Self { words: Vec::new(), places: NumberPlaces::Near { first: 0, places: Vec::new() } }
    }

    pub(super) fn number_of(&mut self, value: T) -> u32 {
        let far: i64 = value.into();
        if let NumberPlaces::Near { first, places } = &self.places {
            let place = usize::try_from(far.wrapping_sub(*first).cast_unsigned()).unwrap_or(usize::MAX);
            return match places.get(place) {
                Some(&word) if word != 0 => word - 1,
                _ => self.add_near(value),
            };
        }
        self.number_of_far(value)
    }

    /// Adds a word while all lie close; or finds that they do no more.
    #[cold]
    fn add_near(&mut self, value: T) -> u32 {
        let number: i64 = value.into();
        let (words, NumberPlaces::Near { first, places }) = (&mut self.words, &mut self.places) else {
            return self.number_of_far(value);
        };
        if words.is_empty() {
            *first = number;
        }
        let last = first.saturating_add(signed(places.len().saturating_sub(1)));
        let (least, greatest) = (number.min(*first), number.max(last));
        if greatest.wrapping_sub(least).cast_unsigned() >= NEAR {
            let count = u32::try_from(words.len()).unwrap_or(u32::MAX);
            self.places = NumberPlaces::Far(Places::of(count, |word| hash_at(words, word)));
            return self.number_of_far(value);
        }
        // Half as many more on the side where one was missing: they come one after the other.
        let spare = signed(places.len() / 2);
        let least = if number < *first { least.saturating_sub(spare) } else { least };
        let greatest = if number > last { greatest.saturating_add(spare) } else { greatest };
        let size = usize::try_from(greatest.wrapping_sub(least)).unwrap_or_default() + 1;
        words.push(value);
        // All of them if the places are others now, or else the new one.
        let mut known = words.len() - 1;
        if (least, size) != (*first, places.len()) {
            (*first, *places, known) = (least, vec![0; size], 0);
        }
        for (number, word) in (1..).zip(words.iter()).skip(known) {
            let place = usize::try_from((*word).into().wrapping_sub(least)).unwrap_or(usize::MAX);
            if let Some(place) = places.get_mut(place) {
                *place = number;
            }
        }
        u32::try_from(words.len() - 1).unwrap_or(u32::MAX)
    }

    fn number_of_far(&mut self, value: T) -> u32 {
        let NumberPlaces::Far(places) = &mut self.places else { return 0 };
        let words = &mut self.words;
        places.find(hash(value), |word| words.get(word as usize) == Some(&value)).unwrap_or_else(|place| {
            words.push(value);
            places.take(place, |word| hash_at(words, word))
        })
    }

    fn held_bytes(&self) -> usize {
        let places = match &self.places {
            NumberPlaces::Near { places, .. } => places.capacity() * size_of::<u32>(),
            NumberPlaces::Far(places) => places.held_bytes(),
        };
        places + self.words.capacity() * size_of::<T>()
    }
}

/// The hash of the word with this number.
fn hash_at<T: Number>(words: &[T], word: u32) -> u64 {
    words.get(word as usize).map_or(0, |word| hash(*word))
}

fn hash<T: Number>(number: T) -> u64 {
    let number: i64 = number.into();
    hash_of(number.cast_unsigned(), 0)
}

impl<T: Number> Values for Numbers<T> {
    fn load(&mut self, array: &dyn Array, nulls: Option<&NullBuffer>) -> Result<()> {
        let of = |array: &dyn Array| {
            let data = array.to_data();
            let buffer = data.buffers().first().cloned().unwrap_or_default();
            ScalarBuffer::new(buffer, data.offset(), data.len())
        };
        self.batch = match array.data_type() {
            DataType::Decimal128(..) => {
                let values = array.as_primitive::<Decimal128Type>().values();
                let mut wide = false;
                let narrow = values.iter().map(|value| {
                    let narrow = T::try_from(*value);
                    wide |= narrow.is_err();
                    narrow.unwrap_or_default()
                });
                let narrow: Vec<T> = narrow.collect();
                // What stands where a value is null may be anything.
                let is_valid = |row: usize| nulls.is_none_or(|nulls| nulls.is_valid(row));
                if wide
                    && values
                        .iter()
                        .enumerate()
                        .any(|(row, value)| T::try_from(*value).is_err() && is_valid(row))
                {
                    return Err(ParquetError::General("a decimal has more digits than its column".into()));
                }
                ScalarBuffer::from(narrow)
            }
            DataType::Int8 | DataType::Int16 => of(&cast(array, &DataType::Int32)?),
            _ => of(array),
        };
        Ok(())
    }

    fn put(&mut self, rows: Range<usize>) {
        let Some(values) = self.batch.get(rows) else { return };
        let Some(first) = values.first() else { return };
        let (least, greatest) = self.ends.unwrap_or((*first, *first));
        self.ends =
            Some(values.iter().fold((least, greatest), |(least, greatest), value| {
                (least.min(*value), greatest.max(*value))
            }));
        match &mut self.dictionary {
            None => self.open.extend_from_slice(values),
            Some(words) => self.words.extend(values.iter().map(|value| words.number_of(*value))),
        }
    }

    fn unload(&mut self) {
        self.batch = ScalarBuffer::from(Vec::new());
    }

    fn page_bytes(&self) -> usize {
        size_of_val(self.open.as_slice())
    }

    fn finish_page(&mut self, page: &mut Vec<u8>) -> PageValues {
        let end = |value: T| Bound { value: value.to_byte_slice().to_vec(), is_exact: true };
        let ends =
            self.ends.take().map(|(least, greatest)| Ends { least: end(least), greatest: end(greatest) });
        let encoding = match &self.dictionary {
            None => {
                put_steps(&self.open, page);
                self.open.clear();
                Encoding::DELTA_BINARY_PACKED
            }
            Some(NumberWords { words, .. }) => {
                put_words(&self.words, words.len(), page);
                self.words.clear();
                Encoding::RLE_DICTIONARY
            }
        };
        PageValues { encoding, ends, text_bytes: None }
    }

    fn dictionary_bytes(&self) -> Option<usize> {
        self.dictionary.as_ref().map(|dictionary| size_of_val(dictionary.words.as_slice()))
    }

    fn word_count(&self) -> usize {
        self.dictionary.as_ref().map_or(0, |dictionary| dictionary.words.len())
    }

    fn take_dictionary(&mut self) -> Option<(Vec<u8>, usize)> {
        let NumberWords { words, .. } = self.dictionary.take()?;
        self.words = Vec::new();
        Some((words.to_byte_slice().to_vec(), words.len()))
    }

    fn compare(&self, one: &[u8], other: &[u8]) -> Ordering {
        T::from_bytes(one).cmp(&T::from_bytes(other))
    }

    fn statistics(&self, ends: Option<&Ends>, nulls: u64) -> Statistics {
        let ends =
            ends.and_then(|ends| T::from_bytes(&ends.least.value).zip(T::from_bytes(&ends.greatest.value)));
        T::statistics(ends, nulls)
    }

    fn held_bytes(&self) -> usize {
        let dictionary = self.dictionary.as_ref().map_or(0, NumberWords::held_bytes);
        dictionary + self.words.capacity() * size_of::<u32>() + self.open.capacity() * size_of::<T>()
    }
}
