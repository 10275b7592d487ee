//! Some of the heads, queries or keys, as typed: `3`, `0-7`, `last` or `all`.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// Neighbours on an axis whose length is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Every one.
    All,
    /// The one at the end.
    Last,
    /// From one to another, which is one of them.
    Between(usize, usize),
}

impl Span {
    /// The half-open range on an axis of `len` places. It may reach past the end, which whoever takes it refuses with both
    /// numbers.
    pub fn on(self, len: usize) -> Range<usize> {
        match self {
            Self::All => 0..len,
            Self::Last => len.saturating_sub(1)..len,
            Self::Between(first, last) => first..last.saturating_add(1),
        }
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || format!("'{text}': expected a number, a range such as 0-7 (both are in it), last or all");
        let number = |text: &str| text.trim().parse().map_err(|_error| expected());
        match text.trim() {
            "all" => Ok(Self::All),
            "last" => Ok(Self::Last),
            text => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let (first, last) = (number(first)?, number(last)?);
                if first <= last { Ok(Self::Between(first, last)) } else { Err(expected()) }
            }
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Last => f.write_str("last"),
            Self::Between(first, last) if first == last => write!(f, "{first}"),
            Self::Between(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_of_a_range_are_in_it() {
        let on = |text: &str, len| text.parse::<Span>().map(|span| span.on(len));
        assert_eq!(on("all", 5), Ok(0..5));
        assert_eq!(on("last", 5), Ok(4..5));
        assert_eq!(on("3", 5), Ok(3..4));
        assert_eq!(on("0-7", 5), Ok(0..8));
        assert_eq!(on(" 2 - 2 ", 5), Ok(2..3));
        assert_eq!(on(&format!("0-{}", usize::MAX), 5), Ok(0..usize::MAX));
        for wrong in ["", "-", "3-1", "-1", "a", "1-", "1..2", "last-1"] {
            assert!(wrong.parse::<Span>().unwrap_err().contains("0-7"), "{wrong}");
        }
    }

    #[test]
    fn what_is_printed_is_what_was_typed() {
        for text in ["all", "last", "3", "0-7"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
    }
}
