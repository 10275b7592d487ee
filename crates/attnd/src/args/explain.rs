//! The flags of `attnd explain`: whose attention, with which words, and where the picture goes.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::operator::OperatorArgs;
use super::site::SiteArgs;
use super::span::Span;
use super::values::parse_count;
use crate::tensor_file::Source;

/// Arguments of `attnd explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
SRC is file.npy, file.npz:NAME or file.safetensors:NAME, as for `attnd attend`. Weights don't depend on values, so none
are asked for. All numbers are exact, and memory grows with what is shown, not with queries times keys.

Tables are about the queries of --query; the picture is about all of them.
  weight          what the key's value is multiplied by; a row of weights sums to 1, less what a sink takes, or with
                  --sigmoid to anything: then weights are no percents
  entropy         of a query's weights, in nats; mean over the queries; with --sigmoid there is none
  keys            effective number of keys, exp(entropy); mean over the queries; with --sigmoid there is none
  weight sum      of a query's weights, with --sigmoid; mean over the queries
  distance        how far from the query the keys are that it weighs, in tokens; mean over the queries
  first key       weight of the first key that is no padding; mean over the queries
  max score       the highest score of all the queries

Examples:
  attnd explain --workers 2 --q x.npz:q --k x.npz:k --causal --tokens words.txt
  attnd explain --workers 2 --q x.npz:q --k x.npz:k --causal --tokens words.json --query 17 --head 3 --top-k 20
  attnd explain --workers 2 --q x.npz:q --k x.npz:k --causal --query all --head all --heatmap heads.svg
  attnd explain --endpoint http://10.0.0.1:7400 --q a.safetensors:l0.q --k a.safetensors:l0.k --json | jq .heads")]
pub struct ExplainArgs {
    /// Queries
    #[arg(long, value_name = "SRC")]
    pub q: Source,
    /// Keys
    #[arg(long, value_name = "SRC")]
    pub k: Source,
    /// What weights are made of them.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// Words of the keys, and of the queries by where they stand: one on each line, or a JSON array of strings, which a
    /// .safetensors file has under `tokens` in its header
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
    /// Words of the queries, where they are another text than the keys
    #[arg(long, value_name = "FILE")]
    pub query_tokens: Option<PathBuf>,
    /// Which queries, from 0: N, A-B (both are in it), last or all; keys are listed for up to 64 of them
    #[arg(long, value_name = "WHICH", default_value = "last")]
    pub query: Span,
    /// Which query head, from 0: H, mean (of the weights of all heads) or all (a table and a map for each)
    #[arg(long, value_name = "WHICH", default_value = "mean")]
    pub head: HeadChoice,
    /// Which element of the batch, from 0
    #[arg(long, value_name = "N", default_value = "0")]
    pub batch: usize,
    /// How many keys to list for each query, at most 1024
    #[arg(long, value_name = "N", default_value = "8", value_parser = parse_count)]
    pub top_k: NonZeroUsize,
    /// Draw who attends to what, over all queries and keys, into a .png or .svg file
    #[arg(long, value_name = "FILE")]
    pub heatmap: Option<PicturePath>,
    /// Rows and columns that the picture has at most, up to 4096; longer sequences are pooled
    #[arg(long, value_name = "N", default_value = "512", value_parser = parse_side)]
    pub heatmap_size: NonZeroUsize,
    /// Who computes it.
    #[command(flatten)]
    pub site: SiteArgs,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Heads to show, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadChoice {
    /// One of them.
    One(usize),
    /// The mean of their weights.
    Mean,
    /// Each.
    All,
}

impl FromStr for HeadChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "mean" => Ok(Self::Mean),
            "all" => Ok(Self::All),
            number => number.parse().map(Self::One).map_err(|_error| "expected a number, mean or all".into()),
        }
    }
}

/// Where a picture is written; the extension chooses the format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PicturePath {
    /// Pixels.
    Png(PathBuf),
    /// Text.
    Svg(PathBuf),
}

impl PicturePath {
    /// The file to write.
    pub fn path(&self) -> &Path {
        match self {
            Self::Png(path) | Self::Svg(path) => path,
        }
    }
}

impl FromStr for PicturePath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("png") => Ok(Self::Png(path)),
            Some("svg") => Ok(Self::Svg(path)),
            _ => Err("expected a file name that ends in .png or .svg".into()),
        }
    }
}

fn parse_side(text: &str) -> Result<NonZeroUsize, String> {
    const MOST: usize = 4096;
    match parse_count(text) {
        Ok(side) if side.get() <= MOST => Ok(side),
        _ => Err(format!("expected a number from 1 to {MOST}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    fn explain(extra: &[&str]) -> Result<ExplainArgs, clap::Error> {
        let base = ["attnd", "explain", "--q", "q.npy", "--k", "k.npy"];
        match Cli::try_parse_from(base.iter().chain(extra))?.verb {
            Verb::Explain(args) => Ok(*args),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn the_last_query_and_the_mean_head_are_shown_by_default() {
        let args = explain(&[]).unwrap();
        assert_eq!((args.query, args.head, args.top_k.get()), (Span::Last, HeadChoice::Mean, 8));
        assert_eq!((args.batch, args.heatmap_size.get(), args.heatmap), (0, 512, None));
        let args = explain(&["--query", "3-5", "--head", "2", "--heatmap", "a.b/m.svg", "--causal"]).unwrap();
        assert_eq!((args.query, args.head), (Span::Between(3, 5), HeadChoice::One(2)));
        assert_eq!(args.heatmap, Some(PicturePath::Svg("a.b/m.svg".into())));
        assert_eq!(explain(&["--head", "all"]).unwrap().head, HeadChoice::All);
    }

    #[test]
    fn wrong_values_are_refused_with_exit_code_2() {
        for wrong in [
            &["--query", "5-3"][..],
            &["--query", "first"],
            &["--head", "-1"],
            &["--head", "median"],
            &["--heatmap", "m.jpg"],
            &["--heatmap", "png"],
            &["--heatmap-size", "0"],
            &["--heatmap-size", "4097"],
            &["--top-k", "0"],
            &["--v", "v.npy"],
            &["--workers", "2", "--endpoint", "http://h:1"],
        ] {
            assert_eq!(explain(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
