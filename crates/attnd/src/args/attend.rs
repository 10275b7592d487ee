//! The flags of `attnd attend`: where the tensors are, what to compute over them, and who computes it.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use attnd_client::EmptyRow;
use clap::{Args, ValueEnum};

use super::operator::OperatorArgs;
use super::outputs::OutputArgs;
use super::site::SiteArgs;
use super::values::parse_count;
use crate::tensor_file::{OutputPath, Source};

/// Arguments of `attnd attend`.
#[derive(Debug, Args)]
#[command(after_help = "\
SRC is file.npy, file.npz:NAME or file.safetensors:NAME. Tensors are [heads, tokens, dim] or
[batch, heads, tokens, dim], f32, f16, bf16 or f64. Query heads must be a multiple of key/value heads.
f64 is rounded to f32; f16 and bf16 travel as they are when all three inputs agree. Arithmetic is f32.

A request file has texts, numbers, lists and true or false, and paths as flags have them, relative to the directory
where attnd runs:
  q = \"x.npz:q\"
  causal = true
  window = [4096, 0]
  score = \"cosine\"
  param = { beta = 2.5 }

What is told beside the context is exact, costs a second pass over the scores, and is in the .safetensors file. Each
array begins with [heads, queries], or [batch, heads, queries] where q has a batch; heads are those of --output-heads:
  --top-k N                     top_keys [.., N], i64, by falling score, -1 behind the last; top_weights, top_scores
  --mass-block N                mass [.., blocks of N keys]
  --entropy, --distance, --max-score      entropy in nats, distance in tokens, max_score
  --stage STAGE                 weights, raw, capped or masked [.., keys]
  --heatmap R,C                 heat [batch, heads, R, C]; a cell is the mean of its queries' sums over its keys
  --rectangle S:H:T:K           rectangle.0, rectangle.1, ... [batch, heads, tokens, keys], in the order of the flags

Examples:
  attnd attend --workers 2 --q q.npy --k k.npy --v v.npy -o context.npy
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --causal -o out.safetensors
  attnd attend --endpoint http://10.0.0.1:7400 --q a.safetensors:layer0.q --k a.safetensors:layer0.k \\
               --v a.safetensors:layer0.v --scale 0.125 --json
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --causal --window 4096,0 --sinks x.npz:sinks
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --attn-mask mask.npy --bias x.npz:bias
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --causal --softcap 50 --alibi auto
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --score additive --param v=x.npz:v_a \\
               --param w_q=x.npz:w_q --param w_k=x.npz:w_k
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --relative t5.npy --relative-bidirectional
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --csr-row-ptr graph.npz:indptr \\
               --csr-columns graph.npz:indices
  attnd attend --workers 2 --q mla.npz:q --k mla.npz:latent_and_rope --value-prefix 512
  attnd attend --request call.toml --softcap 30 -o out.safetensors
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --top-k 8 --entropy -o out.safetensors
  attnd attend --workers 2 --q x.npz:q --k x.npz:k --v x.npz:v --rectangle weights:0-3:last:0-99 -o out.safetensors
  ATTND_ENDPOINT=http://10.0.0.1:7400 attnd attend --q q.npy --k k.npy --v v.npy")]
pub struct AttendArgs {
    /// Take options from FILE, which ends in .toml or .json and has them by the names of these flags. What is typed wins
    /// over an option of that name, and over those that can't be used with it
    #[arg(long, value_name = "FILE")]
    pub request: Option<PathBuf>,
    /// Queries
    #[arg(long, value_name = "SRC", required_unless_present = "request")]
    pub q: Option<Source>,
    /// Keys
    #[arg(long, value_name = "SRC", required_unless_present = "request")]
    pub k: Option<Source>,
    /// Values
    #[arg(long, value_name = "SRC", required_unless_present_any = ["request", "value_prefix"])]
    pub v: Option<Source>,
    /// Take the first N elements of each key for its value, and send no others: the latent of multi-head latent attention
    /// (MLA), whose one kv head is [latent, rotary part]
    #[arg(long, value_name = "N", conflicts_with = "v", value_parser = parse_count)]
    pub value_prefix: Option<NonZeroUsize>,
    /// What is computed over them.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// Context of rows that see neither a key nor a sink
    #[arg(long, value_enum, value_name = "WHAT", default_value = "zero")]
    pub empty_row: EmptyRowArg,
    /// Where the result goes: .npy (context) or .safetensors (context, lse, and what else is asked for)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<OutputPath>,
    /// What is told beside it.
    #[command(flatten)]
    pub outputs: OutputArgs,
    /// Who computes it.
    #[command(flatten)]
    pub site: SiteArgs,
    /// Let NaN and infinities through; they then follow IEEE 754 into the rows that see them
    #[arg(long)]
    pub allow_non_finite: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// What rows are that see nothing, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmptyRowArg {
    /// Zeros
    Zero,
    /// NaN
    Nan,
    /// The mean of the values over all keys, padding and hidden ones included
    Uniform,
}

impl From<EmptyRowArg> for EmptyRow {
    fn from(typed: EmptyRowArg) -> Self {
        match typed {
            EmptyRowArg::Zero => Self::Zero,
            EmptyRowArg::Nan => Self::Nan,
            EmptyRowArg::Uniform => Self::Uniform,
        }
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::{Causal, Mask};
    use clap::Parser as _;

    use super::super::operator::CausalAlign;
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
        assert_eq!(attend(&[]).unwrap().operator.causal, None);
        assert_eq!(attend(&["--causal"]).unwrap().operator.causal, Some(CausalAlign::BottomRight));
        assert_eq!(attend(&["--causal=top-left"]).unwrap().operator.causal, Some(CausalAlign::TopLeft));
        assert!(attend(&["--causal=left"]).is_err());
    }

    #[test]
    fn masks_compose_with_the_causal_rule() {
        let typed = |extra: &[&str]| attend(extra).unwrap().operator.causal_and_mask();
        assert_eq!(typed(&[]), Some((Causal::None, Mask::default())));
        let (causal, mask) = typed(&["--causal=top-left", "--window", "-1,0", "--key-end", "3,4"]).unwrap();
        assert_eq!((causal, mask.window.right, mask.causal), (Causal::TopLeft, Some(0), false));
        let (causal, mask) = typed(&["--causal=offset", "--offset", "-2"]).unwrap();
        assert_eq!((causal, mask.causal), (Causal::None, true));
        assert_eq!(typed(&["--causal=offset"]), None);
        assert_eq!(attend(&["--scale", "-0.5"]).unwrap().operator.scale, Some(-0.5));
    }

    #[test]
    fn what_scores_meet_may_be_negative() {
        let typed = attend(&["--softcap", "30", "--alibi", "-0.5,1", "--alibi-by-key", "--sigmoid", "-3"]);
        let scores = typed.unwrap().operator.scores;
        assert_eq!((scores.softcap, scores.alibi_by_key, scores.sigmoid), (Some(30.0), true, Some(-3.0)));
        assert_eq!(scores.alibi, Some(super::super::Slopes::Each(vec![-0.5, 1.0])));
        assert_eq!(attend(&[]).unwrap().operator.scores, super::super::ScoreArgs::default());
    }

    #[test]
    fn scores_tables_and_lists_are_known_with_their_files() {
        let typed = attend(&[
            "--score=additive",
            "--param=v=x.npz:v",
            "--param",
            "b=-2",
            "--previous=p.npy",
            "--relative=t5.npy",
            "--swin-between",
            "-1.5",
            "--csr-block=2x64",
            "--documents=d.npy",
        ]);
        let operator = typed.unwrap().operator;
        assert_eq!(operator.function.score.as_deref(), Some("additive"));
        assert_eq!(operator.function.param[1].value, super::super::ParamValue::Number(-2.0));
        assert_eq!(operator.tables.swin_between, Some(-1.5));
        let block = operator.sparse.csr_block.map(|block| (block.rows.get(), block.columns.get()));
        assert_eq!(block, Some((2, 64)));
        let sources: Vec<String> =
            operator.sources().map(|(flag, source)| format!("{flag} {source}")).collect();
        let expected = ["--param x.npz:v", "--previous p.npy", "--documents d.npy", "--relative t5.npy"];
        assert_eq!(sources, expected);
    }

    #[test]
    fn empty_rows_are_one_of_three() {
        let typed = |extra: &[&str]| EmptyRow::from(attend(extra).unwrap().empty_row);
        assert_eq!(typed(&[]), EmptyRow::Zero);
        assert_eq!(typed(&["--empty-row", "nan"]), EmptyRow::Nan);
        assert_eq!(typed(&["--empty-row", "uniform"]), EmptyRow::Uniform);
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
            &["--attn-mask", "mask.npz"],
            &["--bias", "bias.txt"],
            &["--softcap", "0"],
            &["--softcap", "nan"],
            &["--alibi", "x"],
            &["--alibi-by-key"],
            &["--sigmoid", "inf"],
            &["--score", "nothing"],
            &["--param", "beta"],
            &["--param", "beta=nan"],
            &["--previous", "x.npz"],
            &["--relative-max-distance", "-1"],
            &["--swin-window", "7"],
            &["--swin-between", "inf"],
            &["--csr-block", "0x1"],
            &["--documents", "ids.txt"],
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
            &["--top-k", "0"],
            &["--heatmap", "3"],
            &["--heatmap", "0,4"],
            &["--stage", "logits"],
            &["--rectangle", "weights:0:0"],
            &["--output-heads", "3-1"],
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
