//! The flags of `attnd attend` that ask for more than the context.

use std::num::NonZeroUsize;

use attnd_client::{AttnShape, OutputsParts, Rectangle, Stage};
use clap::{Args, ValueEnum};

use super::span::Span;
use super::values::parse_count;

/// What is told beside the context. Nothing by default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct OutputArgs {
    /// Of each row the N keys with the highest scores, at most 1024: their weights and scores
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub top_k: Option<NonZeroUsize>,
    /// Of each row the sum of its weights over each block of N keys
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub mass_block: Option<NonZeroUsize>,
    /// Of each row the entropy of its weights, in nats
    #[arg(long)]
    pub entropy: bool,
    /// Of each row the mean distance to the keys that it weighs, in tokens
    #[arg(long)]
    pub distance: bool,
    /// Of each row its highest score
    #[arg(long)]
    pub max_score: bool,
    /// Of each head a map of its weights, pooled to R rows and C columns, at most 4096 each
    #[arg(long, value_name = "R,C", value_parser = parse_grid)]
    pub heatmap: Option<Grid>,
    /// The whole matrix of weights, or of the scores that become them; may be given again: it is queries x keys a head
    #[arg(long, value_enum, value_name = "STAGE", value_delimiter = ',')]
    pub stage: Vec<StageArg>,
    /// Part of such a matrix; may be given again. Each of heads, tokens and keys is a number, a range such as 0-7 (both are
    /// in it), last or all: weights:0-3:last:0-99
    #[arg(long, value_name = "STAGE:HEADS:TOKENS:KEYS", value_delimiter = ',')]
    pub rectangle: Vec<RectangleArg>,
    /// Of these query heads only: a number, a range such as 0-7 (both are in it), last or all
    #[arg(long, value_name = "A-B")]
    pub output_heads: Option<Span>,
}

/// Rows and columns of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Rows.
    pub rows: NonZeroUsize,
    /// Columns.
    pub columns: NonZeroUsize,
}

/// What scores are on their way to weights, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StageArg {
    /// What values are multiplied by; 0 where a key is hidden
    Weights,
    /// Scaled products, of hidden keys too
    Raw,
    /// The same after a cap, if there is one
    Capped,
    /// The same with biases; -inf where a key is hidden
    Masked,
}

impl From<StageArg> for Stage {
    fn from(typed: StageArg) -> Self {
        match typed {
            StageArg::Weights => Self::Weights,
            StageArg::Raw => Self::Raw,
            StageArg::Capped => Self::Capped,
            StageArg::Masked => Self::Masked,
        }
    }
}

/// Part of a stage, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RectangleArg {
    stage: StageArg,
    heads: Span,
    tokens: Span,
    keys: Span,
}

impl std::str::FromStr for RectangleArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let [stage, heads, tokens, keys] = parts[..] else {
            return Err("expected STAGE:HEADS:TOKENS:KEYS, such as weights:0-3:last:0-99".into());
        };
        let stage = StageArg::from_str(stage, false)?;
        Ok(Self { stage, heads: heads.parse()?, tokens: tokens.parse()?, keys: keys.parse()? })
    }
}

fn parse_grid(text: &str) -> Result<Grid, String> {
    let expected = || "expected ROWS,COLUMNS, such as 512,512".to_owned();
    let (rows, columns) = text.split_once(',').ok_or_else(expected)?;
    let side = |text: &str| text.trim().parse().map_err(|_error| expected());
    Ok(Grid { rows: side(rows)?, columns: side(columns)? })
}

impl OutputArgs {
    /// Whether nothing is wanted beside the context.
    pub fn is_empty(&self) -> bool {
        *self == Self { output_heads: self.output_heads, ..Self::default() }
    }

    /// What is wanted of a call of that shape. Ranges may reach past its ends; the client refuses those.
    pub fn parts(&self, shape: &AttnShape) -> OutputsParts {
        let heads = self.output_heads.map(|heads| heads.on(shape.n_heads()));
        let mut stages: Vec<Stage> = Vec::new();
        for stage in self.stage.iter().copied().map(Stage::from) {
            // Asked for twice, it is still one array.
            if !stages.contains(&stage) {
                stages.push(stage);
            }
        }
        let of_head = |typed: Span| match (typed, &heads) {
            (Span::All, Some(heads)) => heads.clone(),
            _ => typed.on(shape.n_heads()),
        };
        let rectangles = self.rectangle.iter().map(|typed| Rectangle {
            stage: typed.stage.into(),
            heads: of_head(typed.heads),
            tokens: typed.tokens.on(shape.n_queries()),
            keys: typed.keys.on(shape.n_keys()),
        });
        OutputsParts {
            stages,
            rectangles: rectangles.collect(),
            top_k: self.top_k.map_or(0, NonZeroUsize::get),
            mass_block: self.mass_block,
            entropy: self.entropy,
            distance: self.distance,
            max_score: self.max_score,
            heatmap: self.heatmap.map(|grid| (grid.rows.get(), grid.columns.get())),
            heads,
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::Dims;
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Typed {
        #[command(flatten)]
        outputs: OutputArgs,
    }

    fn typed(words: &[&str]) -> OutputArgs {
        Typed::try_parse_from([&["x"], words].concat()).unwrap().outputs
    }

    fn shape() -> AttnShape {
        let dims = Dims { batch: 2, heads: 6, kv_heads: 2, queries: 5, keys: 9, head_dim: 4, value_dim: 4 };
        AttnShape::new(dims).unwrap()
    }

    #[test]
    fn nothing_is_wanted_unless_asked_for() {
        assert!(typed(&[]).is_empty() && typed(&["--output-heads", "1"]).is_empty());
        assert_eq!(typed(&[]).parts(&shape()), OutputsParts::default());
        for one in [
            &["--top-k", "3"][..],
            &["--mass-block", "4"],
            &["--entropy"],
            &["--distance"],
            &["--max-score"],
            &["--heatmap", "2,3"],
            &["--stage", "raw"],
            &["--rectangle", "raw:0:0:0"],
        ] {
            assert!(!typed(one).is_empty(), "{one:?}");
        }
    }

    #[test]
    fn every_flag_becomes_its_part() {
        let words = "--top-k 3 --mass-block 4 --entropy --distance --max-score --heatmap 2,3 --stage weights,raw \
                     --stage raw --stage masked --rectangle capped:2:last:0-3 --rectangle weights:all:1-2:all \
                     --output-heads 1-3";
        let words: Vec<&str> = words.split_whitespace().collect();
        let rectangle = |stage, heads, tokens, keys| Rectangle { stage, heads, tokens, keys };
        let expected = OutputsParts {
            stages: vec![Stage::Weights, Stage::Raw, Stage::Masked],
            rectangles: vec![
                rectangle(Stage::Capped, 2..3, 4..5, 0..4),
                rectangle(Stage::Weights, 1..4, 1..3, 0..9),
            ],
            top_k: 3,
            mass_block: NonZeroUsize::new(4),
            entropy: true,
            distance: true,
            max_score: true,
            heatmap: Some((2, 3)),
            heads: Some(1..4),
        };
        assert_eq!(typed(&words).parts(&shape()), expected);
    }
}
