//! What is computed over the tensors: the flags that every verb has which computes attention.

use attnd_client::{Causal, Mask};
use clap::{Args, ValueEnum};

use super::mask::MaskArgs;
use super::score_function::FunctionArgs;
use super::scores::{ScoreArgs, Slopes};
use super::sparse::SparseArgs;
use super::tables::TableArgs;
use super::values::parse_finite;
use crate::tensor_file::Source;

/// Scores, and which keys a query sees.
#[derive(Debug, Clone, Args)]
pub struct OperatorArgs {
    /// What relates a query to a key.
    #[command(flatten)]
    pub function: FunctionArgs,
    /// Hide later keys: with bottom-right the last query sees every key, with top-left query i sees keys 0 to i,
    /// with offset as --offset says [without a value: bottom-right]
    #[arg(long, value_enum, value_name = "ALIGN", num_args = 0..=1, require_equals = true, default_missing_value = "bottom-right")]
    pub causal: Option<CausalAlign>,
    /// Factor on the scores, of either sign [default: that of --score; without one 1 / sqrt(dim)]
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_hyphen_values = true)]
    pub scale: Option<f32>,
    /// Which keys a query sees beside that.
    #[command(flatten)]
    pub mask: MaskArgs,
    /// Lists of keys.
    #[command(flatten)]
    pub sparse: SparseArgs,
    /// Which keys a query sees of those that other rules leave: bools, `[batch, heads, queries, keys]` or its last
    /// dimensions, each but keys may be 1; keys that are missing are not seen. Numbers are added to scores instead
    #[arg(long, value_name = "SRC")]
    pub attn_mask: Option<Source>,
    /// Numbers to add to scores, of the same dimensions; -inf hides a key
    #[arg(long, value_name = "SRC")]
    pub bias: Option<Source>,
    /// What scores meet between the products and the values.
    #[command(flatten)]
    pub scores: ScoreArgs,
    /// Biases from tables.
    #[command(flatten)]
    pub tables: TableArgs,
    /// A logit for each query head, `[heads]`, that joins the sum of exponentials of each of its rows
    #[arg(long, value_name = "SRC")]
    pub sinks: Option<Source>,
}

/// Alignments of the causal rule, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CausalAlign {
    /// Query i sees keys j <= i + (keys - queries), as for a cache that was just appended to
    BottomRight,
    /// Query i sees keys j <= i, as torch's is_causal
    TopLeft,
    /// Query i sees keys j <= i + N of --offset
    Offset,
}

impl OperatorArgs {
    /// The files that it reads, each with its flag.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let tensors = [("--sinks", &self.sinks), ("--attn-mask", &self.attn_mask), ("--bias", &self.bias)];
        let slopes = self.scores.alibi.iter().filter_map(Slopes::source).map(|source| ("--alibi", source));
        let tensors = tensors.into_iter().filter_map(|(flag, source)| Some((flag, source.as_ref()?)));
        let lists = self.sparse.sources().chain(self.tables.sources());
        tensors.chain(slopes).chain(self.function.sources()).chain(lists)
    }

    /// The causal rule, and the mask beside it; `None` if a rule needs an offset and none was typed.
    pub fn causal_and_mask(&self) -> Option<(Causal, Mask)> {
        causal_and_mask(self.causal, &self.mask)
    }
}

/// The causal rule as typed, and the mask beside it; `None` if it needs an offset and none was typed.
pub(super) fn causal_and_mask(causal: Option<CausalAlign>, mask: &MaskArgs) -> Option<(Causal, Mask)> {
    let mask = mask.mask();
    match causal {
        None => Some((Causal::None, mask)),
        Some(CausalAlign::BottomRight) => Some((Causal::BottomRight, mask)),
        Some(CausalAlign::TopLeft) => Some((Causal::TopLeft, mask)),
        Some(CausalAlign::Offset) => {
            mask.positions.is_some().then_some((Causal::None, Mask { causal: true, ..mask }))
        }
    }
}
