//! The flags of `attnd bench` and of what it can measure: kernels and peers.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use attnd_kernel::Isa;
use clap::{Args, Subcommand};

use super::values::{parse_count, parse_isa, parse_seconds};

/// Arguments of `attnd bench`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Examples:
  attnd bench kernel                   every shape, as a fraction of what this machine can do at most
  attnd bench peers                    the same shapes beside torch"
)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub what: Bench,
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The kernels of this machine, as fractions of its multiply-add peak and of its memory bandwidth
    Kernel(BenchKernelArgs),
    /// The same shapes by torch's scaled_dot_product_attention and by attnd, side by side
    Peers(BenchPeersArgs),
}

/// Arguments of `attnd bench kernel`.
#[derive(Debug, Args)]
#[command(after_help = "\
The limits are measured in the same run, before and after each case, because clocks drift: the multiply-add rate of
registers for prefill, the rate of reading memory and doing nothing else for decode. Compare fractions, not times,
and leave the machine alone while it runs: the load averages at the end say whether others were at work. It needs
about 1 GiB of memory.

Examples:
  attnd bench kernel
  attnd bench kernel --isa avx512 --case 'decode' --threads 1
  attnd bench kernel --json > before.json              then change something
  attnd bench kernel --compare before.json")]
pub struct BenchKernelArgs {
    /// Instruction sets to measure: avx512, avx2, neon, portable [default: the one that ATTND_ISA names, or else all
    /// that this CPU has but portable]
    #[arg(long, value_name = "ISA,...", value_delimiter = ',', value_parser = parse_isa)]
    pub isa: Vec<Isa>,
    /// Only the cases whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    pub case: Option<String>,
    /// Threads of the cases that use all of them; 1 leaves those out [default: the cores of this machine]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub threads: Option<NonZeroUsize>,
    /// Run each case exactly this many times, after one run that isn't counted
    #[arg(long, value_name = "N", value_parser = parse_count, conflicts_with = "seconds")]
    pub repeat: Option<NonZeroUsize>,
    /// Run each case for this long, and at least five times
    #[arg(long, value_name = "SECONDS", default_value = "1.5", value_parser = parse_seconds)]
    pub seconds: Duration,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Show how the fractions changed since an earlier run, whose --json output this file holds
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
}

/// Arguments of `attnd bench peers`.
#[derive(Debug, Args)]
#[command(after_help = "\
Needs python3 with its venv module. torch is installed from PyPI on the first use, which can take minutes and some GB; pip's
own settings apply, such as PIP_INDEX_URL=https://download.pytorch.org/whl/cpu for a smaller build.

Examples:
  attnd bench peers
  attnd bench peers --case decode --json")]
pub struct BenchPeersArgs {
    /// Python environment to use; made if missing [default: attnd/peers in the user's cache folder]
    #[arg(long, value_name = "DIR")]
    pub venv: Option<PathBuf>,
    /// Only the cases whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    pub case: Option<String>,
    /// Run each case for this long with each library, and at least ten times
    #[arg(long, value_name = "SECONDS", default_value = "1.5", value_parser = parse_seconds)]
    pub seconds: Duration,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}
