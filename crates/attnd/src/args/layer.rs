//! The flags of `attnd layer`: where the matrices and the rows are, and what the layer does with them.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use attnd_client::layer::{LayerWeights, ProjectOn, Rope, RopeStyle};
use attnd_client::{Causal, Mask};
use clap::{Args, ValueEnum};

use super::mask::MaskArgs;
use super::operator::{CausalAlign, causal_and_mask};
use super::site::SiteArgs;
use super::values::{parse_count, parse_finite};
use crate::tensor_file::{OutputPath, Source};

/// Arguments of `attnd layer`.
#[derive(Debug, Args)]
#[command(after_help = "\
FILE is a .safetensors file with the matrices of one layer, or of a model and then with --prefix. Names and layouts are
those of torch's nn.MultiheadAttention (in_proj_weight, out_proj.weight, bias_k, ..), of models in the manner of Llama and
BERT (q_proj.weight, self.query.weight, c_attn.weight, ..), and of Keras and flax (query/kernel, ..). A tensor behind the
prefix that attnd doesn't know is an error: the result would lack it. DeepSeek-V2's and V3's multi-head latent attention
(kv_a_proj_with_mqa.weight, kv_b_proj.weight, ..) is computed in its absorbed form: one kv head of latents for all heads.
Rotary angles are the unscaled ones. Models whose positions are scaled, as the released DeepSeek-V2 and V3 are (YaRN), need
tables of angles and a scale, which only the Rust library takes (Angles::Table, LatentParts::scale).

SRC is file.npy, file.npz:NAME or file.safetensors:NAME, [tokens, width] or [batch, tokens, width], f32, f16, bf16 or
f64; all are computed in f32. Attention runs on the cluster. Queries, gate and result are projected in this process, on all its
cores; keys and values here or on the workers, whichever is predicted to be faster, with the same bits either way. Workers
don't rotate keys, and have no learnt key (bias_k).

Examples:
  attnd layer --workers 2 --state mha.safetensors --heads 8 --x x.npy --weights -o y.safetensors
  attnd layer --workers 2 --state model.safetensors --prefix model.layers.0.self_attn --heads 32 --kv-heads 8 \\
              --rope --rope-base 500000 --causal --x x.npz:hidden -o y.npy
  attnd layer --endpoint http://10.0.0.1:7400 --state decoder.safetensors --prefix layers.0.multihead_attn --heads 8 \\
              --query decoder.npy --key encoder.npy --key-end 91,120 --json
  attnd layer --workers 2 --state latent.safetensors --prefix layers.0.self_attn --heads 16 \\
              --rope=interleaved --causal --x x.npy -o y.npy")]
pub struct LayerArgs {
    /// The file with the layer's matrices
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,
    /// What the names of the layer's tensors begin with, less the point or slash before their own
    #[arg(long, value_name = "NAME", default_value = "")]
    pub prefix: String,
    /// Query heads
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub heads: NonZeroUsize,
    /// Heads of keys and values [default: as many as query heads]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub kv_heads: Option<NonZeroUsize>,
    /// Rows that queries are made of
    #[arg(long, value_name = "SRC", visible_alias = "query")]
    pub x: Source,
    /// Rows that keys are made of [default: those of queries]
    #[arg(long, value_name = "SRC")]
    pub key: Option<Source>,
    /// Rows that values are made of [default: those of keys]
    #[arg(long, value_name = "SRC")]
    pub value: Option<Source>,
    /// Let every row see a key and a value of zeros beside all others, as torch's add_zero_attn
    #[arg(long)]
    pub add_zero_attn: bool,
    /// Rotate queries and keys by their position: pairs are halves of a row, or neighbours [without a value: half-split]
    #[arg(long, value_enum, value_name = "PAIRS", num_args = 0..=1, require_equals = true, default_missing_value = "half-split")]
    pub rope: Option<RopePairs>,
    /// Base of the angles
    #[arg(long, value_name = "X", default_value = "10000", requires = "rope", value_parser = parse_base)]
    pub rope_base: f64,
    /// How many elements of a head are rotated, from the first on; with latent attention of its rotary part [default: all]
    #[arg(long, value_name = "N", requires = "rope", value_parser = parse_count)]
    pub rope_dims: Option<NonZeroUsize>,
    /// Position of the first query, keys being counted from 0
    #[arg(long, value_name = "N", default_value = "0", requires = "rope")]
    pub rope_position: usize,
    /// What norms of latent attention add to the mean square of a row [default: 0.000001]
    #[arg(long, value_name = "X", value_parser = parse_eps)]
    pub norm_eps: Option<f64>,
    /// Hide later keys: with bottom-right the last query sees every key, with top-left query i sees keys 0 to i,
    /// with offset as --offset says [without a value: bottom-right]
    #[arg(long, value_enum, value_name = "ALIGN", num_args = 0..=1, require_equals = true, default_missing_value = "bottom-right")]
    pub causal: Option<CausalAlign>,
    /// Factor on the scores, of either sign [default: 1 / sqrt(dim of a head)]
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_hyphen_values = true)]
    pub scale: Option<f32>,
    /// Which keys a query sees beside that.
    #[command(flatten)]
    pub mask: MaskArgs,
    /// Tell the weights too: their mean over the heads, or those of each [without a value: averaged]
    #[arg(long, value_enum, value_name = "WHICH", num_args = 0..=1, require_equals = true, default_missing_value = "averaged")]
    pub weights: Option<WeightsArg>,
    /// Where keys and values are projected
    #[arg(long, value_enum, value_name = "PLACE", default_value = "auto")]
    pub project: ProjectArg,
    /// Where the result goes: .npy (output) or .safetensors (output, and weights where they are wanted)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<OutputPath>,
    /// Who computes.
    #[command(flatten)]
    pub site: SiteArgs,
    /// Let NaN and infinities through; they then follow IEEE 754 into the rows that see them
    #[arg(long)]
    pub allow_non_finite: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Which elements of a row are a pair that rotates, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RopePairs {
    /// i and i + half, as GPT-NeoX and Llama in Hugging Face's layout
    HalfSplit,
    /// 2i and 2i + 1, as GPT-J and DeepSeek
    Interleaved,
}

/// Where keys and values are projected, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProjectArg {
    /// Where it is predicted to be faster
    Auto,
    /// In this process
    Client,
    /// On the workers, each what it computes with
    Workers,
}

impl From<ProjectArg> for ProjectOn {
    fn from(typed: ProjectArg) -> Self {
        match typed {
            ProjectArg::Auto => Self::Auto,
            ProjectArg::Client => Self::Client,
            ProjectArg::Workers => Self::Workers,
        }
    }
}

/// Which weights, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsArg {
    /// Their mean over the heads, [batch, queries, keys]
    Averaged,
    /// [batch, heads, queries, keys]
    PerHead,
}

impl From<WeightsArg> for LayerWeights {
    fn from(typed: WeightsArg) -> Self {
        match typed {
            WeightsArg::Averaged => Self::Averaged,
            WeightsArg::PerHead => Self::PerHead,
        }
    }
}

impl LayerArgs {
    /// The causal rule, and the mask beside it; `None` if a rule needs an offset and none was typed.
    pub fn causal_and_mask(&self) -> Option<(Causal, Mask)> {
        causal_and_mask(self.causal, &self.mask)
    }

    /// Rotary positions, where they were asked for.
    pub fn rotary(&self) -> Option<Rope> {
        let style = match self.rope? {
            RopePairs::HalfSplit => RopeStyle::HalfSplit,
            RopePairs::Interleaved => RopeStyle::Interleaved,
        };
        Some(Rope { dims: self.rope_dims.map(Into::into), ..Rope::new(style, self.rope_base) })
    }
}

/// A base of angles: over 1.
fn parse_base(text: &str) -> Result<f64, String> {
    let base: Option<f64> = text.parse().ok();
    base.filter(|base| base.is_finite() && *base > 1.0).ok_or_else(|| "expected a number over 1".into())
}

fn parse_eps(text: &str) -> Result<f64, String> {
    let eps: Option<f64> = text.parse().ok();
    eps.filter(|eps| eps.is_finite() && *eps >= 0.0)
        .ok_or_else(|| "expected a number that isn't below 0".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    fn layer(extra: &[&str]) -> Result<LayerArgs, clap::Error> {
        let base = ["attnd", "layer", "--state", "m.safetensors", "--heads", "8", "--x", "x.npy"];
        match Cli::try_parse_from(base.iter().chain(extra))?.verb {
            Verb::Layer(args) => Ok(*args),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn rotary_positions_have_a_style_a_base_and_a_width() {
        assert_eq!(layer(&[]).unwrap().rotary(), None);
        let plain = layer(&["--rope"]).unwrap().rotary();
        assert_eq!(plain, Some(Rope::new(RopeStyle::HalfSplit, 10_000.0)));
        let typed =
            layer(&["--rope=interleaved", "--rope-base", "5e5", "--rope-dims", "32"]).unwrap().rotary();
        assert_eq!(typed, Some(Rope { dims: Some(32), ..Rope::new(RopeStyle::Interleaved, 5e5) }));
    }

    #[test]
    fn weights_are_averaged_unless_typed_otherwise() {
        assert_eq!(layer(&[]).unwrap().weights, None);
        assert_eq!(layer(&["--weights"]).unwrap().weights, Some(WeightsArg::Averaged));
        assert_eq!(layer(&["--weights=per-head"]).unwrap().weights, Some(WeightsArg::PerHead));
    }

    #[test]
    fn keys_are_projected_wherever_it_is_faster_unless_typed_otherwise() {
        let on = |extra: &[&str]| ProjectOn::from(layer(extra).unwrap().project);
        assert_eq!(on(&[]), ProjectOn::Auto);
        assert_eq!(
            [on(&["--project", "client"]), on(&["--project=workers"])],
            [ProjectOn::Client, ProjectOn::Workers]
        );
    }

    #[test]
    fn wrong_values_are_refused_with_exit_code_2() {
        for wrong in [
            &["--rope-base", "10"][..],
            &["--rope", "--rope-base", "1"],
            &["--rope", "--rope-dims", "0"],
            &["--rope=both"],
            &["--kv-heads", "0"],
            &["--norm-eps", "-1e-6"],
            &["--norm-eps=-1e-6"],
            &["--norm-eps", "inf"],
            &["--weights=all"],
            &["--project=coordinator"],
            &["--query", "y.npy", "--query", "z.npy"],
        ] {
            assert_eq!(layer(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
