//! The flags of `attnd attend`: where the tensors are, what to compute over them, and who computes it.

use attnd_client::{Causal, EmptyRow, Mask};
use clap::{Args, ValueEnum};

use super::mask::MaskArgs;
use super::site::SiteArgs;
use super::values::parse_scale;
use crate::tensor_file::{OutputPath, Source};

/// Arguments of `attnd attend`.
#[derive(Debug, Args)]
#[command(after_help = "\
SRC is file.npy, file.npz:NAME or file.safetensors:NAME. Tensors are [heads, tokens, dim] or
[batch, heads, tokens, dim], f32, f16, bf16 or f64. Query heads must be a multiple of key/value heads.
f64 is rounded to f32; f16 and bf16 travel as they are when all three inputs agree. Arithmetic is f32.

Examples:
  attnd attend --workers 2 --q q.npy --k k.npy --v v.npy -o context.npy
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --causal -o out.safetensors
  attnd attend --endpoint http://10.0.0.1:7400 --q a.safetensors:layer0.q --k a.safetensors:layer0.k \\
               --v a.safetensors:layer0.v --scale 0.125 --json
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --causal --window 4096,0 --sinks x.npz:sinks
  ATTND_ENDPOINT=http://10.0.0.1:7400 attnd attend --q q.npy --k k.npy --v v.npy")]
pub struct AttendArgs {
    /// Queries
    #[arg(long, value_name = "SRC")]
    pub q: Source,
    /// Keys
    #[arg(long, value_name = "SRC")]
    pub k: Source,
    /// Values
    #[arg(long, value_name = "SRC")]
    pub v: Source,
    /// Hide later keys: with bottom-right the last query sees every key, with top-left query i sees keys 0 to i,
    /// with offset as --offset says [without a value: bottom-right]
    #[arg(long, value_enum, value_name = "ALIGN", num_args = 0..=1, require_equals = true, default_missing_value = "bottom-right")]
    pub causal: Option<CausalAlign>,
    /// Factor on the scores, of either sign [default: 1 / sqrt(dim)]
    #[arg(long, value_name = "X", value_parser = parse_scale, allow_hyphen_values = true)]
    pub scale: Option<f32>,
    /// Which keys a query sees beside that.
    #[command(flatten)]
    pub mask: MaskArgs,
    /// A logit for each query head, `[heads]`, that joins the sum of exponentials of each of its rows
    #[arg(long, value_name = "SRC")]
    pub sinks: Option<Source>,
    /// Context of rows that see neither a key nor a sink
    #[arg(long, value_enum, value_name = "WHAT", default_value = "zero")]
    pub empty_row: EmptyRowArg,
    /// Where the result goes: .npy (context) or .safetensors (context and lse)
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

/// What rows are that see nothing, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmptyRowArg {
    /// Zeros
    Zero,
    /// NaN
    Nan,
}

impl From<EmptyRowArg> for EmptyRow {
    fn from(typed: EmptyRowArg) -> Self {
        match typed {
            EmptyRowArg::Zero => Self::Zero,
            EmptyRowArg::Nan => Self::Nan,
        }
    }
}

impl AttendArgs {
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

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    fn attend(extra: &[&str]) -> Result<AttendArgs, clap::Error> {
        let base = ["attnd", "attend", "--q", "q.npy", "--k", "x.npz:k", "--v", "a:b.safetensors:l.v"];
        match Cli::try_parse_from(base.iter().chain(extra))?.verb {
            Verb::Attend(args) => Ok(*args),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn causal_takes_an_optional_value() {
        assert_eq!(attend(&[]).unwrap().causal, None);
        assert_eq!(attend(&["--causal"]).unwrap().causal, Some(CausalAlign::BottomRight));
        assert_eq!(attend(&["--causal=top-left"]).unwrap().causal, Some(CausalAlign::TopLeft));
        assert!(attend(&["--causal=left"]).is_err());
    }

    #[test]
    fn masks_compose_with_the_causal_rule() {
        let typed = |extra: &[&str]| attend(extra).unwrap().causal_and_mask();
        assert_eq!(typed(&[]), Some((Causal::None, Mask::default())));
        let (causal, mask) = typed(&["--causal=top-left", "--window", "-1,0", "--key-end", "3,4"]).unwrap();
        assert_eq!((causal, mask.window.right, mask.causal), (Causal::TopLeft, Some(0), false));
        let (causal, mask) = typed(&["--causal=offset", "--offset", "-2"]).unwrap();
        assert_eq!((causal, mask.causal), (Causal::None, true));
        assert_eq!(typed(&["--causal=offset"]), None);
        assert_eq!(attend(&["--scale", "-0.5"]).unwrap().scale, Some(-0.5));
    }

    #[test]
    fn wrong_values_are_refused_with_exit_code_2() {
        for wrong in [
            &["--scale", "inf"][..],
            &["--scale", "nan"],
            &["--window", "5"],
            &["--chunk", "0"],
            &["--key-end", "-1"],
            &["--empty-row", "one"],
            &["--timeout=-1"],
            &["--timeout", "0"],
            &["--timeout", "1e12"],
            &["--timeout", "3600.1"],
            &["--timeout", "nan"],
            &["--timeout", "inf"],
            &["--timeout", "5m"],
            &["--workers", "0"],
            &["--workers", "2", "--endpoint", "http://h:1"],
            &["--threads-per-worker", "2"],
            &["-o", "out.txt"],
        ] {
            assert_eq!(attend(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn a_timeout_is_seconds_up_to_an_hour() {
        let seconds = |extra: &[&str]| attend(extra).unwrap().site.timeout.as_secs_f64();
        assert_eq!(seconds(&[]), 300.0);
        assert_eq!(seconds(&["--timeout", "3600"]), 3600.0);
        assert_eq!(seconds(&["--timeout", "0.5"]), 0.5);
        let error = attend(&["--timeout", "1e12"]).unwrap_err().to_string();
        assert!(error.contains("must be > 0 and at most 3600"), "{error}");
    }
}
