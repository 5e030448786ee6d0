//! Whole numbers, and what is written as such: a dictionary of their words; without one the steps from one to the next, or of decimals of more than 18 digits
//! each value as it is.

use std::{cmp::Ordering, ops::Range};

use ::parquet::{
    basic::Encoding,
    data_type::FixedLenByteArray,
    errors::{ParquetError, Result},
    file::statistics::{Statistics, ValueStatistics},
};
use arrow::{
    array::{Array, AsArray},
    buffer::{NullBuffer, ScalarBuffer},
    compute::cast,
    datatypes::{ArrowNativeType, DataType, Decimal128Type},
};

use super::{
    Bound, Ends, PageValues, Values,
    bits::{put_steps, put_words},
    places::{Places, hash_of},
    signed,
};

/// A type in which numbers are held until they are written.
pub(super) trait Number: ArrowNativeType + Ord {
    /// A decimal's units, if Parquet's type, of so many bytes, holds them.
    fn of_units(units: i128, width: usize) -> Option<Self>;
    /// What it is, if that has 64 bits.
    fn narrow(self) -> Option<i64>;
    fn hash(self) -> u64;
    /// Appends it as Parquet writes it plainly, in so many bytes.
    fn put(self, width: usize, out: &mut Vec<u8>);
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
    /// Appends the values of a page that has no dictionary: how they are encoded.
    fn put_all(values: &[Self], width: usize, out: &mut Vec<u8>) -> Encoding;
    fn statistics(ends: Option<&Ends>, nulls: u64) -> Statistics;
}

macro_rules! number {
    ($type:ty) => {
        impl Number for $type {
            fn of_units(units: i128, _width: usize) -> Option<Self> {
                units.try_into().ok()
            }

            fn narrow(self) -> Option<i64> {
                Some(self.into())
            }

            fn hash(self) -> u64 {
                hash_of(i64::from(self).cast_unsigned(), 0)
            }

            fn put(self, _width: usize, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn from_bytes(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self::from_le_bytes)
            }

            fn put_all(values: &[Self], _width: usize, out: &mut Vec<u8>) -> Encoding {
                put_steps(values, out);
                Encoding::DELTA_BINARY_PACKED
            }

            fn statistics(ends: Option<&Ends>, nulls: u64) -> Statistics {
                statistics(ends, nulls, Self::from_bytes).into()
            }
        }
    };
}

number!(i32);
number!(i64);

/// The units of decimals that Parquet writes as so many bytes, the upper ones first: each as it is, since it has no steps for them.
impl Number for i128 {
    fn of_units(units: i128, width: usize) -> Option<Self> {
        let spare = Self::BITS.saturating_sub(u8::BITS * u32::try_from(width).unwrap_or(u32::MAX));
        (units << spare >> spare == units).then_some(units)
    }

    fn narrow(self) -> Option<i64> {
        self.try_into().ok()
    }

    fn hash(self) -> u64 {
        let whole = self.cast_unsigned();
        #[expect(clippy::cast_possible_truncation, reason = "its halves are meant")]
        let (low, high) = (whole as u64, (whole >> 64) as u64);
        hash_of(low, high)
    }

    fn put(self, width: usize, out: &mut Vec<u8>) {
        let bytes = self.to_be_bytes();
        out.extend_from_slice(bytes.get(bytes.len() - width..).unwrap_or_default());
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // What stands above the sign is as the sign.
        let first = bytes.first()?.cast_signed().into();
        Some(bytes.iter().skip(1).fold(first, |number: Self, byte| number << 8 | Self::from(*byte)))
    }

    fn put_all(values: &[Self], width: usize, out: &mut Vec<u8>) -> Encoding {
        out.reserve(values.len() * width);
        values.iter().for_each(|value| value.put(width, out));
        Encoding::PLAIN
    }

    fn statistics(ends: Option<&Ends>, nulls: u64) -> Statistics {
        let value = |bytes: &[u8]| Some(FixedLenByteArray::from(bytes.to_vec()));
        Statistics::FixedLenByteArray(statistics(ends, nulls, value))
    }
}

/// What statistics tell of values that `value` makes of their bytes.
fn statistics<T>(ends: Option<&Ends>, nulls: u64, value: impl Fn(&[u8]) -> Option<T>) -> ValueStatistics<T> {
    let (least, greatest) = ends.map(|ends| (&ends.least.value, &ends.greatest.value)).unzip();
    let value = |bytes: Option<&Vec<u8>>| bytes.and_then(|bytes| value(bytes));
    ValueStatistics::new(value(least), value(greatest), None, Some(nulls), false)
        .with_backwards_compatible_min_max(true)
}

/// Whole numbers, and what is written as such.
pub(super) struct Numbers<T: Number> {
    /// Bytes of one, as Parquet writes it.
    width: usize,
    batch: ScalarBuffer<T>,
    dictionary: Option<NumberWords<T>>,
    /// The open page: numbers of words with a dictionary, values without.
    words: Vec<u32>,
    open: Vec<T>,
    ends: Option<(T, T)>,
}

impl<T: Number> Numbers<T> {
    /// Those that Parquet writes in so many bytes.
    pub(super) fn new(width: usize, with_dictionary: bool) -> Self {
        Self {
            width,
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
        if let NumberPlaces::Near { first, places } = &self.places {
            return match places.get(place_of(value, *first)) {
                Some(&word) if word != 0 => word - 1,
                _ => self.add_near(value),
            };
        }
        self.number_of_far(value)
    }

    /// Adds a word while all lie close; or finds that they do no more.
    #[cold]
    fn add_near(&mut self, value: T) -> u32 {
        let (words, NumberPlaces::Near { first, places }) = (&mut self.words, &mut self.places) else {
            return self.number_of_far(value);
        };
        if let (true, Some(number)) = (words.is_empty(), value.narrow()) {
            *first = number;
        }
        let last = first.saturating_add(signed(places.len().saturating_sub(1)));
        let is_near =
            |number: &i64| number.max(&last).wrapping_sub(*number.min(first)).cast_unsigned() < NEAR;
        let Some(number) = value.narrow().filter(is_near) else {
            let count = u32::try_from(words.len()).unwrap_or(u32::MAX);
            self.places = NumberPlaces::Far(Places::of(count, |word| hash_at(words, word)));
            return self.number_of_far(value);
        };
        // Half as many more on the side where one was missing: they come one after the other.
        let spare = signed(places.len() / 2);
        let least = if number < *first { number.saturating_sub(spare) } else { *first };
        let greatest = if number > last { number.saturating_add(spare) } else { last };
        let size = usize::try_from(greatest.wrapping_sub(least)).unwrap_or_default() + 1;
        words.push(value);
        // All of them if the places are others now, or else the new one.
        let mut known = words.len() - 1;
        if (least, size) != (*first, places.len()) {
            (*first, *places, known) = (least, vec![0; size], 0);
        }
        for (number, word) in (1..).zip(words.iter()).skip(known) {
            if let Some(place) = places.get_mut(place_of(*word, least)) {
                *place = number;
            }
        }
        u32::try_from(words.len() - 1).unwrap_or(u32::MAX)
    }

    fn number_of_far(&mut self, value: T) -> u32 {
        let NumberPlaces::Far(places) = &mut self.places else { return 0 };
        let words = &mut self.words;
        places.find(value.hash(), |word| words.get(word as usize) == Some(&value)).unwrap_or_else(|place| {
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
    words.get(word as usize).map_or(0, |word| word.hash())
}

/// Which place a number has, of those from `first` on.
fn place_of<T: Number>(number: T, first: i64) -> usize {
    let place =
        number.narrow().and_then(|number| usize::try_from(number.wrapping_sub(first).cast_unsigned()).ok());
    place.unwrap_or(usize::MAX)
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
                let fitting = values.iter().map(|value| {
                    let fitting = T::of_units(*value, self.width);
                    wide |= fitting.is_none();
                    fitting.unwrap_or_default()
                });
                let fitting: Vec<T> = fitting.collect();
                // What stands where a value is null may be anything.
                let is_valid = |row: usize| nulls.is_none_or(|nulls| nulls.is_valid(row));
                let is_wide = |value: i128| T::of_units(value, self.width).is_none();
                if wide && values.iter().enumerate().any(|(row, value)| is_wide(*value) && is_valid(row)) {
                    return Err(ParquetError::General("a decimal has more digits than its column".into()));
                }
                ScalarBuffer::from(fitting)
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
        self.open.len() * self.width
    }

    fn finish_page(&mut self, page: &mut Vec<u8>) -> PageValues {
        let end = |value: T| {
            let mut bytes = Vec::with_capacity(self.width);
            value.put(self.width, &mut bytes);
            Bound { value: bytes, is_exact: true }
        };
        let ends =
            self.ends.take().map(|(least, greatest)| Ends { least: end(least), greatest: end(greatest) });
        let encoding = match &self.dictionary {
            None => {
                let encoding = T::put_all(&self.open, self.width, page);
                self.open.clear();
                encoding
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
        self.dictionary.as_ref().map(|dictionary| dictionary.words.len() * self.width)
    }

    fn word_count(&self) -> usize {
        self.dictionary.as_ref().map_or(0, |dictionary| dictionary.words.len())
    }

    fn take_dictionary(&mut self) -> Option<(Vec<u8>, usize)> {
        let NumberWords { words, .. } = self.dictionary.take()?;
        self.words = Vec::new();
        let mut plain = Vec::with_capacity(words.len() * self.width);
        words.iter().for_each(|word| word.put(self.width, &mut plain));
        Some((plain, words.len()))
    }

    fn compare(&self, one: &[u8], other: &[u8]) -> Ordering {
        T::from_bytes(one).cmp(&T::from_bytes(other))
    }

    fn statistics(&self, ends: Option<&Ends>, nulls: u64) -> Statistics {
        T::statistics(ends, nulls)
    }

    fn held_bytes(&self) -> usize {
        let dictionary = self.dictionary.as_ref().map_or(0, NumberWords::held_bytes);
        dictionary + self.words.capacity() * size_of::<u32>() + self.open.capacity() * size_of::<T>()
    }
}
