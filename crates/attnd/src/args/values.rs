//! Values of flags as typed: each of these functions checks one, by itself, and says what it expected.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::time::Duration;

use attnd_client::MAX_TIMEOUT;
use attnd_kernel::{Dtype, Isa, Storage};

/// Largest number of local worker processes that is still meant seriously.
const MAX_LOCAL_WORKERS: usize = 256;

/// Local worker processes: 1 to [`MAX_LOCAL_WORKERS`].
pub(super) fn parse_workers(text: &str) -> Result<NonZeroUsize, String> {
    match text.trim().parse() {
        Ok(n) if n <= MAX_LOCAL_WORKERS => NonZeroUsize::new(n).ok_or_else(|| "at least 1 is needed".into()),
        _ => Err(format!("expected a number from 1 to {MAX_LOCAL_WORKERS}")),
    }
}

/// A number of threads, workers or runs, at least 1.
pub(super) fn parse_count(text: &str) -> Result<NonZeroUsize, String> {
    text.trim().parse().map_err(|_error| "expected a number, at least 1".into())
}

/// A factor on scores or a term beside them: finite.
pub(super) fn parse_finite(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|x: &f32| x.is_finite()).ok_or_else(|| "must be finite".into())
}

/// A size of scores: finite and over 0.
pub(super) fn parse_positive(text: &str) -> Result<f32, String> {
    parse_finite(text).ok().filter(|x| *x > 0.0).ok_or_else(|| "must be finite and > 0".into())
}

/// A number of rows and one of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sides {
    /// At least 1.
    pub rows: NonZeroUsize,
    /// At least 1.
    pub columns: NonZeroUsize,
}

/// Rows and columns, as 7x7.
pub(super) fn parse_sides(text: &str) -> Result<Sides, String> {
    let sides = text.split_once('x').and_then(|(rows, columns)| {
        Some(Sides { rows: parse_count(rows).ok()?, columns: parse_count(columns).ok()? })
    });
    sides.ok_or_else(|| "expected rows x columns, each at least 1, such as 7x7".into())
}

/// A time in seconds, > 0 and at most [`MAX_TIMEOUT`].
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds =
        text.parse::<f64>().map_err(|_error| "expected a number of seconds, such as 30 or 0.5".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(timeout) if !timeout.is_zero() && timeout <= MAX_TIMEOUT => Ok(timeout),
        _ => Err(format!("must be > 0 and at most {}", MAX_TIMEOUT.as_secs())),
    }
}

/// A time in seconds, from one to a day; 0 for never.
pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
    const RANGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(24 * 3600);
    let seconds =
        text.parse::<f64>().map_err(|_error| "expected a number of seconds, such as 600, or 0".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(interval) if interval.is_zero() || RANGE.contains(&interval) => Ok(interval),
        _ => Err(format!("must be 0, or {} to {}", RANGE.start().as_secs(), RANGE.end().as_secs())),
    }
}

/// A size with a binary unit, in bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kib" | "k" => 10,
        "mib" | "m" => 20,
        "gib" | "g" => 30,
        "tib" | "t" => 40,
        _ => return Err("expected a unit of B, KiB, MiB, GiB or TiB".into()),
    };
    let number: u64 = number.parse().map_err(|_error| "expected a number such as 512MiB".to_owned())?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "must be > 0 and below 16 EiB".into())
}

/// The type of elements as they are sent.
pub(super) fn parse_dtype(text: &str) -> Result<Dtype, String> {
    let all = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let found = all.into_iter().find(|dtype| dtype.to_string() == text.trim());
    found.ok_or_else(|| "expected f32, f16 or bf16".into())
}

/// Integers that keys and values are stored as.
pub(super) fn parse_integers(text: &str) -> Result<Storage, String> {
    let all = [Storage::Int8, Storage::Int4];
    let found = all.into_iter().find(|storage| storage.to_string() == text.trim());
    found.ok_or_else(|| "expected int8 or int4".into())
}

/// An instruction set, by the name that `ATTND_ISA` has for it.
pub(super) fn parse_isa(text: &str) -> Result<Isa, String> {
    let names = || Isa::ALL.map(Isa::name).join(", ");
    text.trim().parse().map_err(|_unknown| format!("expected one of {}", names()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("8 GiB"), Ok(8 << 30));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "GiB", "1.5GiB", "1PB", "0", "99999999999TiB", "-1"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sides_are_rows_and_columns() {
        let sides = |text: &str| parse_sides(text).map(|sides| (sides.rows.get(), sides.columns.get()));
        assert_eq!((sides("7x8"), sides("1 x 64")), (Ok((7, 8)), Ok((1, 64))));
        for wrong in ["", "7", "x7", "7x", "0x7", "7x0", "7x7x7", "7,7", "-1x2"] {
            assert!(sides(wrong).unwrap_err().contains("such as 7x7"), "{wrong}");
        }
    }

    #[test]
    fn types_of_elements_have_their_names() {
        assert_eq!((parse_dtype("bf16"), parse_integers("int4")), (Ok(Dtype::Bf16), Ok(Storage::Int4)));
        assert!(parse_dtype("f64").unwrap_err().contains("f32, f16 or bf16"));
        assert!(parse_integers("f32").unwrap_err().contains("int8 or int4"));
    }

    #[test]
    fn instruction_sets_have_the_names_of_the_variable() {
        assert_eq!(parse_isa("avx2"), Ok(Isa::Avx2));
        assert!(parse_isa("sse9").unwrap_err().contains("avx512, avx2, neon, portable"));
    }
}
