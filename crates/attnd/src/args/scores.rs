//! The flags of `attnd attend` that say what scores meet between the products and the values.

use clap::Args;

use super::values::{parse_finite, parse_positive};
use crate::tensor_file::Source;

/// Caps, biases and weights; all that are typed hold at once.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct ScoreArgs {
    /// Cap scores smoothly at this size, before biases and masks: X * tanh(score / X)
    #[arg(long, value_name = "X", value_parser = parse_positive)]
    pub softcap: Option<f32>,
    /// Add a bias that falls with the distance between query and key (ALiBi) by a slope of each head: auto is those that
    /// it was published with; numbers, such as 0.5,0.25; or SRC, `[heads]` or `[batch * heads]`
    #[arg(long, value_name = "SLOPES", value_parser = parse_slopes, allow_hyphen_values = true)]
    pub alibi: Option<Slopes>,
    /// Let that bias grow from the first key on that is no padding, whatever the query (BLOOM, MPT)
    #[arg(long, requires = "alibi")]
    pub alibi_by_key: bool,
    /// Weigh each key by itself, by 1 / (1 + exp(-(score + B))), instead of by softmax
    #[arg(long, value_name = "B", value_parser = parse_finite, allow_hyphen_values = true)]
    pub sigmoid: Option<f32>,
}

/// Slopes of a linear bias, as typed.
#[derive(Debug, Clone, PartialEq)]
pub enum Slopes {
    /// Those that it was published with.
    Published,
    /// Of each head.
    Each(Vec<f32>),
    /// From a file.
    File(Source),
}

impl Slopes {
    /// The file that they are in, if they are.
    pub fn source(&self) -> Option<&Source> {
        match self {
            Self::Published | Self::Each(_) => None,
            Self::File(source) => Some(source),
        }
    }
}

fn parse_slopes(text: &str) -> Result<Slopes, String> {
    if text == "auto" {
        return Ok(Slopes::Published);
    }
    let numbers: Result<Vec<f32>, String> =
        text.split(',').map(|number| parse_finite(number.trim())).collect();
    match (numbers, text.parse()) {
        (Ok(each), _) => Ok(Slopes::Each(each)),
        (Err(_), Ok(source)) => Ok(Slopes::File(source)),
        (Err(_), Err(expected)) => {
            Err(format!("expected auto, numbers such as 0.5,0.25, or SRC ({expected})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_published_typed_or_in_a_file() {
        assert_eq!(parse_slopes("auto"), Ok(Slopes::Published));
        assert_eq!(parse_slopes("0.5, -2e-1"), Ok(Slopes::Each(vec![0.5, -0.2])));
        assert_eq!(parse_slopes("3"), Ok(Slopes::Each(vec![3.0])));
        assert_eq!(parse_slopes("x.npz:slopes"), Ok(Slopes::File("x.npz:slopes".parse().unwrap())));
        assert_eq!(parse_slopes("1,2.npy"), Ok(Slopes::File("1,2.npy".parse().unwrap())));
        for wrong in ["", "Auto", "0.5,", "0.5,nan", "inf", "x.npz"] {
            assert!(parse_slopes(wrong).unwrap_err().starts_with("expected auto, numbers"), "{wrong}");
        }
    }
}
