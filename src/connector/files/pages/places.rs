//! Where the words of a dictionary are found.

use std::{
    hash::{BuildHasher, RandomState},
    sync::LazyLock,
};

use twox_hash::XxHash3_64;

/// Makes hashes of values such that nobody can choose values whose hashes are alike. It does not show in what is written.
static SEEDS: LazyLock<[u64; 2]> = LazyLock::new(|| [0, 1].map(|number| RandomState::new().hash_one(number)));

/// A hash whose upper bits are good, of up to sixteen bytes.
pub(super) fn hash_of(one: u64, other: u64) -> u64 {
    let [first, second] = *SEEDS;
    let product = u128::from(one ^ first) * u128::from(other ^ second);
    #[expect(clippy::cast_possible_truncation, reason = "its halves are meant")]
    let (low, high) = (product as u64, (product >> 64) as u64);
    low ^ high
}

/// The same of any number of bytes.
pub(super) fn hash_of_bytes(bytes: &[u8]) -> u64 {
    let [seed, _] = *SEEDS;
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

/// Which values a dictionary has, by their hashes: the numbers of words, each at the first free place from where its hash points.
#[derive(Default)]
pub(super) struct Places {
    /// The number of a word and one; 0 where none is. Half of them at most are taken.
    places: Vec<u32>,
    taken: usize,
}

impl Places {
    fn first(&self, hash: u64) -> usize {
        // The upper bits: those of a product are the better ones.
        let bits = self.places.len().trailing_zeros();
        usize::try_from(hash.checked_shr(64 - bits).unwrap_or_default()).unwrap_or_default()
    }

    /// The number of the word that `is` says is the one, or else where a new one goes.
    pub(super) fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Result<u32, usize> {
        let mut place = self.first(hash);
        loop {
            match self.places.get(place) {
                Some(0) => return Err(place),
                Some(&word) if is(word - 1) => return Ok(word - 1),
                Some(_) => place += 1,
                None if self.places.is_empty() => return Err(0),
                None => place = 0,
            }
        }
    }

    /// Of so many words, whose hashes `hash_of` tells.
    pub(super) fn of(words: u32, hash_of: impl Fn(u32) -> u64) -> Self {
        let size = (2 * words as usize).next_power_of_two();
        let mut this = Self { places: vec![0; size.max(128) * 2], taken: words as usize };
        for word in 0..words {
            if let Err(place) = this.find(hash_of(word), |_| false) {
                this.put(place, word);
            }
        }
        this
    }

    /// Takes a place that was found free for the next word, whose number it is; `hash_of` tells the hashes of all, also of this one.
    pub(super) fn take(&mut self, place: usize, hash_of: impl Fn(u32) -> u64) -> u32 {
        let number = u32::try_from(self.taken).unwrap_or(u32::MAX);
        self.taken += 1;
        if self.taken * 2 > self.places.len() {
            *self = Self::of(number + 1, hash_of);
        } else {
            self.put(place, number);
        }
        number
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.places.capacity() * size_of::<u32>()
    }

    fn put(&mut self, place: usize, word: u32) {
        if let Some(free) = self.places.get_mut(place) {
            *free = word + 1;
        }
    }
}
