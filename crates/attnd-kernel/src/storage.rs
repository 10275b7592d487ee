//! How keys and values are stored, and how a kernel sees elements in memory words.
//!
//! A word is 32 bits. Elements that are reduced one after the other share a word (dimensions of a key, keys of a value
//! column), the earlier one in the lower bits; so a vector of words becomes one vector of f32 per step, and narrow
//! elements take less bandwidth and no shuffles. Buffers hold words as f32, whose bits are moved and never computed
//! with.

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::lanes::Lanes;

/// The type of keys and values at rest. Widening to f32 is exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Storage {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// Integers from -127 to 127, times a scale of their own for each key and for each value of a kv head.
    Int8,
    /// Integers from -7 to 7, with scales as [`Self::Int8`] has.
    Int4,
}

impl Storage {
    /// Elements in a word of 32 bits.
    pub const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 => 4,
            Self::Int4 => 8,
        }
    }

    /// Whether keys and values have scales, one f32 each.
    pub const fn has_scales(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }
}

impl From<Dtype> for Storage {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl std::fmt::Display for Storage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// Rounds each value to the nearest float that `storage` holds, ties to even; an infinity where it is over the range.
/// Leaves them to `quantise.rs` where it holds integers.
pub(crate) fn round(values: &mut [f32], storage: Storage) {
    match storage {
        Storage::F32 | Storage::Int8 | Storage::Int4 => {}
        Storage::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        Storage::Bf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
    }
}

/// Puts element `at` of a word in place: rounded to nearest even where the storage is a narrower float; where it is
/// integers, `value` is one of them already.
#[inline(always)]
pub(crate) fn put(word: &mut f32, at: usize, value: f32, storage: Storage) {
    let element = match storage {
        Storage::F32 => {
            *word = value;
            return;
        }
        Storage::F16 => f16::from_f32(value).to_bits().into(),
        Storage::Bf16 => bf16::from_f32(value).to_bits().into(),
        Storage::Int8 | Storage::Int4 => i32::from(value as i8).cast_unsigned(),
    };
    let bits = 32 / storage.per_word();
    let (mask, shift) = ((1_u32 << bits) - 1, bits * at);
    *word = f32::from_bits(word.to_bits() & !(mask << shift) | (element & mask) << shift);
}

/// A storage type as a kernel sees it.
pub(crate) trait Stored: Copy {
    /// Elements in a word.
    const PER_WORD: usize;
    /// Whether elements are to be multiplied by a scale.
    const SCALED: bool = false;

    /// Element `at` of each word, `at < PER_WORD`, without its scale.
    ///
    /// # Safety
    /// The ISA of `L` is enabled.
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V;
}

/// f32: a word is its element.
#[derive(Clone, Copy)]
pub(crate) struct StoredF32;

impl Stored for StoredF32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, _at: usize) -> L::V {
        words
    }
}

/// bf16, two in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredBf16;

impl Stored for StoredBf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { if at == 0 { L::low_bf16(words) } else { L::high_bf16(words) } }
    }
}

/// f16, two in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredF16;

impl Stored for StoredF16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { if at == 0 { L::low_f16(words) } else { L::high_f16(words) } }
    }
}

/// Integers of 8 bits, four in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredInt8;

impl Stored for StoredInt8 {
    const PER_WORD: usize = 4;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::integer::<8>(words, at) }
    }
}

/// Integers of 4 bits, eight in a word.
#[derive(Clone, Copy)]
pub(crate) struct StoredInt4;

impl Stored for StoredInt4 {
    const PER_WORD: usize = 8;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn element<L: Lanes>(words: L::V, at: usize) -> L::V {
        // SAFETY: as the caller vouches.
        unsafe { L::integer::<4>(words, at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_into_a_word_comes_out_and_leaves_its_neighbours() {
        for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4] {
            let values = [-7.0, 7.0, -1.0, 0.0, 3.0, -4.0, 1.0, 6.0];
            let mut word = f32::from_bits(0x5a5a_5a5a);
            for (at, value) in values.into_iter().take(storage.per_word()).enumerate() {
                put(&mut word, at, value, storage);
            }
            let expected = match storage {
                Storage::F32 => (-7.0_f32).to_bits(),
                Storage::F16 => 0x4700_c700,
                Storage::Bf16 => 0x40e0_c0e0,
                Storage::Int8 => 0x00ff_07f9,
                Storage::Int4 => 0x61c3_0f79,
            };
            assert_eq!(word.to_bits(), expected, "{storage}");
        }
        let mut word = f32::from_bits(0xffff_ffff);
        put(&mut word, 2, -127.0, Storage::Int8);
        assert_eq!(word.to_bits(), 0xff81_ffff);
    }
}
