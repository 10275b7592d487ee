//! The flags of `attnd attend` that say which keys a query sees.

use std::num::NonZeroUsize;

use attnd_client::{Mask, PerBatch, Positions, Window};
use clap::Args;

use super::values::parse_count;

/// Rules beside the causal one; all that are typed hold at once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct MaskArgs {
    /// How many keys before and behind its position a query sees; -1 or nothing is any number: 4096,0 or 128,
    #[arg(long, value_name = "LEFT,RIGHT", value_parser = parse_window, allow_hyphen_values = true)]
    pub window: Option<WindowArg>,
    /// Show a query the keys of its own chunk only, of N keys each
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub chunk: Option<NonZeroUsize>,
    /// Leading keys that --causal does not hide: one number, or one for each batch element: 3,5
    #[arg(long, value_name = "N[,..]", value_parser = parse_lengths)]
    pub prefix: Option<Lengths>,
    /// First key that is no padding; one number or one for each batch element
    #[arg(long, value_name = "N[,..]", value_parser = parse_lengths)]
    pub key_begin: Option<Lengths>,
    /// Keys before the padding behind them; one number or one for each batch element
    #[arg(long, value_name = "N[,..]", value_parser = parse_lengths)]
    pub key_end: Option<Lengths>,
    /// Queries before the padding behind them, which sees nothing; one number or one for each batch element
    #[arg(long, value_name = "N[,..]", value_parser = parse_lengths)]
    pub query_end: Option<Lengths>,
    /// Query i stands at key i + N; one number or one for each batch element; the causal rule then is --causal=offset
    #[arg(long, value_name = "N[,..]", value_parser = parse_offsets, allow_hyphen_values = true)]
    pub offset: Option<Offsets>,
}

/// A window, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowArg(Window);

/// A length, or one for each batch element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lengths(PerBatch<usize>);

/// A position, or one for each batch element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offsets(PerBatch<i64>);

impl MaskArgs {
    /// The rules as a mask, without the causal one.
    pub fn mask(&self) -> Mask {
        let lengths = |lengths: &Option<Lengths>| lengths.clone().map(|lengths| lengths.0);
        Mask {
            positions: self.offset.clone().map(|offsets| Positions::Offset(offsets.0)),
            window: self.window.map_or_else(Window::default, |window| window.0),
            chunk: self.chunk,
            prefix: lengths(&self.prefix),
            key_begin: lengths(&self.key_begin),
            key_end: lengths(&self.key_end),
            query_end: lengths(&self.query_end),
            ..Mask::default()
        }
    }
}

fn parse_window(text: &str) -> Result<WindowArg, String> {
    let side = |text: &str| match text.trim() {
        "" | "-1" => Ok(None),
        keys => keys.parse().map(Some).map_err(|_error| "expected LEFT,RIGHT, such as 4096,0".to_owned()),
    };
    let (left, right) = text.split_once(',').ok_or("expected LEFT,RIGHT, such as 4096,0")?;
    Ok(WindowArg(Window { left: side(left)?, right: side(right)? }))
}

fn parse_lengths(text: &str) -> Result<Lengths, String> {
    per_batch(text).map(Lengths)
}

fn parse_offsets(text: &str) -> Result<Offsets, String> {
    per_batch(text).map(Offsets)
}

fn per_batch<T: std::str::FromStr + Copy>(text: &str) -> Result<PerBatch<T>, String> {
    let numbers: Result<Vec<T>, T::Err> = text.split(',').map(|number| number.trim().parse()).collect();
    match numbers.as_deref() {
        Ok([same]) => Ok(PerBatch::Same(*same)),
        Ok(each) => Ok(PerBatch::Each(each.into())),
        Err(_) => Err("expected a number, or one for each batch element, such as 3,5".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_two_sides_and_each_may_be_open() {
        let window = |text: &str| parse_window(text).map(|window| (window.0.left, window.0.right));
        assert_eq!(window("4096,0"), Ok((Some(4096), Some(0))));
        for open in ["128,", "128,-1", "128, -1"] {
            assert_eq!(window(open), Ok((Some(128), None)), "{open}");
        }
        assert_eq!(window("-1,3"), Ok((None, Some(3))));
        for wrong in ["", "5", "5,-2", "1,2,3", "a,1"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_are_for_all_or_for_each() {
        assert_eq!(parse_lengths("7"), Ok(Lengths(PerBatch::Same(7))));
        assert_eq!(parse_lengths("7,0"), Ok(Lengths(PerBatch::Each([7, 0].into()))));
        assert_eq!(parse_offsets("-3,5"), Ok(Offsets(PerBatch::Each([-3, 5].into()))));
        for wrong in ["", "1,", "-1", "x"] {
            assert!(parse_lengths(wrong).is_err(), "{wrong}");
        }
    }
}
