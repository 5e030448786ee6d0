//! How numbers are packed: runs, bits, steps, lengths.

/// How many times a word comes before it is written as a run instead of bits.
const LEAST_RUN: usize = 32;

/// Appends the numbers of words of a dictionary of `count`, as Parquet's hybrid of runs and of bits in groups of eight.
pub(super) fn put_words(numbers: &[u32], count: usize, out: &mut Vec<u8>) {
    let width = usize::BITS - count.saturating_sub(1).leading_zeros();
    out.push(u8::try_from(width).unwrap_or(u8::MAX));
    let (mut packed, mut rest) = (0, numbers);
    let put_packed = |numbers: &[u32], out: &mut Vec<u8>| {
        if !numbers.is_empty() {
            put_varint((numbers.len().div_ceil(GROUP) << 1 | 1) as u64, out);
            let count = numbers.len().next_multiple_of(GROUP);
            put_bits(numbers.iter().map(|number| u64::from(*number)), count, width, out);
        }
    };
    // What is packed begins `packed` numbers before the rest.
    while let Some((first, group)) = rest.first().zip(rest.get(..GROUP)) {
        let run = match group.iter().all(|number| number == first) {
            true => rest.iter().take_while(|number| *number == first).count(),
            false => 0,
        };
        if run < LEAST_RUN {
            packed += GROUP;
            rest = rest.get(GROUP..).unwrap_or_default();
            continue;
        }
        let before = numbers.len() - rest.len();
        put_packed(numbers.get(before - packed..before).unwrap_or_default(), out);
        put_varint((run << 1) as u64, out);
        out.extend_from_slice(first.to_le_bytes().get(..width.div_ceil(8) as usize).unwrap_or_default());
        (packed, rest) = (0, rest.get(run..).unwrap_or_default());
    }
    put_packed(numbers.get(numbers.len() - rest.len() - packed..).unwrap_or_default(), out);
}

/// How many numbers of words are packed together.
const GROUP: usize = 8;

/// How many steps have their least one in common, and how many of them one width.
const BLOCK: usize = 128;
const PART: usize = 32;

/// A whole number that is told by its step from another one.
pub(super) trait Step: Copy + Default + Ord + Into<i64> {
    /// How far it is from another to this one, around the end of the type if need be.
    fn step_from(self, other: Self) -> Self;
    fn unsigned(self) -> u64;
}

macro_rules! step {
    ($type:ty) => {
        impl Step for $type {
            fn step_from(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }

            fn unsigned(self) -> u64 {
                self.cast_unsigned().into()
            }
        }
    };
}

step!(i32);
step!(i64);

/// Appends whole numbers by the steps from one to the next, as Parquet's `DELTA_BINARY_PACKED`.
pub(super) fn put_steps<T: Step>(numbers: &[T], out: &mut Vec<u8>) {
    for count in [BLOCK, BLOCK / PART, numbers.len()] {
        put_varint(count as u64, out);
    }
    put_signed(numbers.first().copied().unwrap_or_default().into(), out);
    let mut steps = [T::default(); BLOCK];
    let mut before = numbers;
    for block in numbers.get(1..).unwrap_or_default().chunks(BLOCK) {
        steps.iter_mut().zip(block.iter().zip(before)).for_each(|(step, (number, before))| {
            *step = number.step_from(*before);
        });
        before = before.get(block.len()..).unwrap_or_default();
        let steps = steps.get(..block.len()).unwrap_or_default();
        let least = steps.iter().copied().min().unwrap_or_default();
        put_signed(least.into(), out);
        let above = |step: &T| step.step_from(least).unsigned();
        let width =
            |part: &[T]| u64::BITS - part.iter().fold(0, |all, step| all | above(step)).leading_zeros();
        let widths = out.len();
        out.resize(widths + BLOCK / PART, 0);
        for (at, part) in steps.chunks(PART).enumerate() {
            let width = width(part);
            if let Some(told) = out.get_mut(widths + at) {
                *told = u8::try_from(width).unwrap_or(u8::MAX);
            }
            put_bits(part.iter().map(above), PART, width, out);
        }
    }
}

/// Appends up to `count` numbers of `width` bits each, the first in the lowest bits, and zeros for those that are missing.
pub(super) fn put_bits(numbers: impl Iterator<Item = u64>, count: usize, width: u32, out: &mut Vec<u8>) {
    let end = out.len() + count * width as usize / 8;
    out.reserve(end - out.len() + size_of::<u64>());
    let (mut bits, mut filled) = (0, 0);
    for number in numbers {
        bits |= number << filled;
        filled += width;
        if filled >= u64::BITS {
            out.extend_from_slice(&bits.to_le_bytes());
            filled -= u64::BITS;
            bits = number.checked_shr(width - filled).unwrap_or_default();
        }
    }
    out.extend_from_slice(&bits.to_le_bytes());
    out.resize(end, 0);
}

/// Bytes of the length before validity.
const LEVELS_BYTES: usize = size_of::<u32>();

/// Appends which rows have a value: `valid` has a bit for each, of which `nulls` are not set.
pub(super) fn put_levels(valid: &[u8], rows: usize, nulls: usize, out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&[0; LEVELS_BYTES]);
    if nulls == 0 || nulls == rows {
        put_varint((rows << 1) as u64, out);
        out.push(u8::from(nulls == 0));
    } else {
        let groups = rows.div_ceil(GROUP);
        put_varint((groups << 1 | 1) as u64, out);
        out.extend_from_slice(valid.get(..groups).unwrap_or_default());
    }
    let length = u32::try_from(out.len() - start - LEVELS_BYTES).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(start..start + LEVELS_BYTES) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

/// Appends a number by seven bits a byte, the lowest first.
fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number > 0x7f {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

/// Appends a number that may be negative: small ones of both signs are short.
fn put_signed(number: i64, out: &mut Vec<u8>) {
    put_varint((number << 1 ^ number >> 63).cast_unsigned(), out);
}
