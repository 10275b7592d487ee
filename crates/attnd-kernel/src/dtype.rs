//! Element types in messages and files. Arithmetic is f32; widening to it is exact.

use half::{bf16, f16};

/// The type of an element in a message or a file, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Decodes little-endian elements at any alignment into f32, exactly.
///
/// # Panics
/// If `bytes` does not hold exactly `out.len()` elements.
pub fn widen(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * dtype.size(), "{} elements of {dtype}", out.len());
    match dtype {
        Dtype::F32 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(*raw);
            }
        }
        Dtype::F16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(*raw).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (value, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *value = bf16::from_le_bytes(*raw).to_f32();
            }
        }
    }
}

/// Whether none of some elements, little-endian, is NaN or infinite.
pub(crate) fn are_finite(bytes: &[u8], dtype: Dtype) -> bool {
    // Without a branch, so that it vectorises: an exponent of all ones overflows into the sign.
    let unit_of_16_bits = match dtype {
        Dtype::F32 => {
            let over = bytes.as_chunks().0.iter().fold(0, |over, raw| {
                let magnitude = u32::from_le_bytes(*raw) & 0x7fff_ffff;
                over | (magnitude + 0x0080_0000)
            });
            return over >> 31 == 0;
        }
        Dtype::F16 => 0x0400,
        Dtype::Bf16 => 0x0080,
    };
    let over = bytes.as_chunks().0.iter().fold(0, |over, raw| {
        let magnitude = u16::from_le_bytes(*raw) & 0x7fff;
        over | (magnitude + unit_of_16_bits)
    });
    over >> 15 == 0
}

/// The index of the first NaN or infinity.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    // A pass without a branch is what makes the check cheap enough to be on by default: it vectorises.
    let over = values.iter().fold(0, |over, v| over | ((v.to_bits() & 0x7fff_ffff) + 0x0080_0000));
    if over >> 31 == 0 { None } else { values.iter().position(|v| !v.is_finite()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_16_bit_pattern() {
        let all = || (0..=u16::MAX).step_by(if cfg!(miri) { 257 } else { 1 });
        let bytes: Vec<u8> = all().flat_map(u16::to_le_bytes).collect();
        let mut out = vec![0.0; bytes.len() / 2];
        widen(&bytes, Dtype::F16, &mut out);
        for (bits, value) in all().zip(&out) {
            let back = f16::from_f32(*value);
            assert!(back.to_bits() == bits || (back.is_nan() && f16::from_bits(bits).is_nan()), "{bits:#x}");
        }
        widen(&bytes, Dtype::Bf16, &mut out);
        for (bits, value) in all().zip(&out) {
            assert!(value.to_bits() == u32::from(bits) << 16 || value.is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn finite_elements_are_told_from_others_in_every_type() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for bits in (0..=u16::MAX).step_by(if cfg!(miri) { 257 } else { 1 }) {
                let mut value = [0.0];
                widen(&bits.to_le_bytes(), dtype, &mut value);
                let bytes = [[0; 2], bits.to_le_bytes(), [0xff, 0x3b]].concat();
                assert_eq!(are_finite(&bytes, dtype), value[0].is_finite(), "{dtype} {bits:#x}");
            }
        }
        let values =
            [f32::MAX, -f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(1), -0.0];
        for value in values.into_iter().chain([f32::from_bits(0xff80_0001)]) {
            let bytes = [1.0_f32, value, -1.0].map(f32::to_le_bytes).concat();
            assert_eq!(are_finite(&bytes, Dtype::F32), value.is_finite(), "{value}");
        }
    }

    #[test]
    fn the_first_bad_element_is_found() {
        let mut values = vec![1.0; 100];
        assert_eq!(first_non_finite(&values), None);
        values[70] = f32::NEG_INFINITY;
        values[50] = f32::NAN;
        assert_eq!(first_non_finite(&values), Some(50));
        assert_eq!(first_non_finite(&[f32::MAX, f32::MIN_POSITIVE / 8.0, -0.0]), None);
    }
}
