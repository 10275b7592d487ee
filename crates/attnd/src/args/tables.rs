//! The flags of biases that are entries of a table, by how far apart query and key are.

use clap::Args;

use super::values::{Sides, parse_finite, parse_sides};
use crate::tensor_file::Source;

/// Tables of biases; all that are typed are added.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct TableArgs {
    /// Add a bias by buckets of the distance (T5), `[buckets, heads]`; in T5's files it is
    /// relative_attention_bias.weight, and its rows are relative_attention_num_buckets (num_buckets)
    #[arg(long, value_name = "SRC")]
    pub relative: Option<Source>,
    /// Distances from here on share its last bucket; T5's relative_attention_max_distance (max_distance) [default: 128]
    #[arg(long, value_name = "N")]
    pub relative_max_distance: Option<u32>,
    /// Give keys behind the query half of the buckets, as T5's encoder (bidirectional); else they count as distance 0
    #[arg(long)]
    pub relative_bidirectional: bool,
    /// Add a bias by the distance in both directions of a window (Swin), `[(2h-1)*(2w-1), heads]`; in Swin's files it is
    /// relative_position_bias_table. Each batch element is a window, row by row
    #[arg(long, value_name = "SRC")]
    pub swin: Option<Source>,
    /// Rows and columns of these windows: 7x7
    #[arg(long, value_name = "HxW", value_parser = parse_sides)]
    pub swin_window: Option<Sides>,
    /// The region of each token of shifted windows, integers, `[windows, h*w]`; batch element b is window b % windows
    #[arg(long, value_name = "SRC")]
    pub swin_regions: Option<Source>,
    /// What is added between tokens of different regions [default: -100]
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_hyphen_values = true)]
    pub swin_between: Option<f32>,
}

impl TableArgs {
    /// The files that it reads, each with its flag.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let Self { relative, swin, swin_regions, .. } = self;
        let all = [("--relative", relative), ("--swin", swin), ("--swin-regions", swin_regions)];
        all.into_iter().filter_map(|(flag, source)| Some((flag, source.as_ref()?)))
    }
}
