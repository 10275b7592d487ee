//! The flags of `attnd session`: which session, what is appended to it, what is asked of it.

use std::num::NonZeroUsize;
use std::time::Duration;

use attnd_client::{Dtype, EmptyRow, Storage};
use clap::{Args, Subcommand, ValueEnum};

use super::operator::OperatorArgs;
use super::values::{parse_count, parse_seconds};
use crate::tensor_file::{OutputPath, Source};

/// Arguments of `attnd session`.
#[derive(Debug, Args)]
#[command(
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "\
A session is keys and values of one sequence, for each of its layers, which stay on the workers of a cluster: what is appended
once is attended over as often as one likes. Whoever appends, cuts or forks becomes its writer; who was before is refused.

Examples:
  attnd session open chat --layers 1 --heads 32 --kv-heads 8 --dim 128
  attnd session append chat --k prompt.npz:k --v prompt.npz:v
  attnd session step chat --k x.npz:k --v x.npz:v --q x.npz:q --causal -o context.npy
  attnd session close chat"
)]
pub struct SessionArgs {
    /// What to do with it.
    #[command(subcommand)]
    pub verb: SessionVerb,
}

/// What can be done with sessions.
#[derive(Debug, Subcommand)]
pub enum SessionVerb {
    /// Begin a session, or see that it is as it should be
    Open(OpenArgs),
    /// Append keys and values to a layer
    Append(AppendArgs),
    /// Attend over a layer
    Attend(Box<SessionAttendArgs>),
    /// Append keys and values and attend over everything including them
    Step(Box<StepArgs>),
    /// Make another session with the same tokens, in the same memory until either changes
    Fork(ForkArgs),
    /// Cut all layers to a number of tokens
    Truncate(TruncateArgs),
    /// End all appends and cuts
    Seal(SealArgs),
    /// Show what a session is, what it has, and who holds it
    Describe(DescribeArgs),
    /// List the names of all sessions
    List(ListArgs),
    /// End a session and give its memory back
    Close(CloseArgs),
}

/// Where sessions are.
#[derive(Debug, Clone, Args)]
pub struct ClusterArgs {
    /// Coordinator of a running cluster, such as http://127.0.0.1:7400 [env: ATTND_ENDPOINT]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Give up after this many seconds, at most 3600, sending again included
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = parse_seconds)]
    pub timeout: Duration,
    /// Print one JSON object instead of a line or a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `attnd session open`.
#[derive(Debug, Args)]
#[command(after_help = "\
A session of this name that exists must have been opened with the same flags.

Examples:
  attnd session open chat --layers 32 --heads 32 --kv-heads 8 --dim 128 --dtype bf16
  attnd session open chat --layers 32 --heads 32 --kv-heads 8 --dim 128 --replicas 2 --acks 1 --ttl 86400
  attnd session open mla --layers 61 --heads 128 --kv-heads 1 --dim 576 --value-prefix 512 --dtype bf16")]
pub struct OpenArgs {
    /// Its name, 1 to 64 of A-Z a-z 0-9 . _ - [default: one that nobody has]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Layers, each with keys and values of its own
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub layers: NonZeroUsize,
    /// Query heads
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub heads: NonZeroUsize,
    /// Key/value heads [default: as many as query heads]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub kv_heads: Option<NonZeroUsize>,
    /// Elements of a query and of a key
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub dim: NonZeroUsize,
    /// Elements of a value [default: those of a key]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub value_dim: Option<NonZeroUsize>,
    /// Take the first N elements of each key for its value, and send no others
    #[arg(long, value_name = "N", conflicts_with = "value_dim", value_parser = parse_count)]
    pub value_prefix: Option<NonZeroUsize>,
    /// Elements of keys and values as they are sent
    #[arg(long, value_enum, value_name = "DTYPE", default_value = "f32")]
    pub dtype: DtypeArg,
    /// What workers keep of them: what is sent, or integers with a scale for each key and value
    #[arg(long, value_enum, value_name = "WHAT", default_value = "as-sent")]
    pub storage: StorageArg,
    /// Workers that hold each part of it, on as many hosts
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_count)]
    pub replicas: NonZeroUsize,
    /// How many of them must have what is appended before it counts [default: all]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub acks: Option<NonZeroUsize>,
    /// Seconds without a request after which it is closed
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub ttl: u32,
    /// Most tokens of a layer
    #[arg(long, value_name = "N", default_value = "1048576", value_parser = parse_count)]
    pub max_tokens: NonZeroUsize,
    /// Let replicas be on one host, with which they are lost
    #[arg(long)]
    pub allow_same_host: bool,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Element types, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// IEEE 754 binary32
    F32,
    /// IEEE 754 binary16
    F16,
    /// The upper half of a binary32
    Bf16,
}

impl From<DtypeArg> for Dtype {
    fn from(typed: DtypeArg) -> Self {
        match typed {
            DtypeArg::F32 => Self::F32,
            DtypeArg::F16 => Self::F16,
            DtypeArg::Bf16 => Self::Bf16,
        }
    }
}

/// What workers keep, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StorageArg {
    /// What is sent
    AsSent,
    /// Integers of 8 bits
    Int8,
    /// Integers of 4 bits
    Int4,
}

impl StorageArg {
    /// What is kept of elements that are sent as `dtype`.
    pub fn of(self, dtype: Dtype) -> Storage {
        match self {
            Self::AsSent => dtype.into(),
            Self::Int8 => Storage::Int8,
            Self::Int4 => Storage::Int4,
        }
    }
}

/// Which layer.
#[derive(Debug, Clone, Args)]
pub struct LayerOf {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Which of its layers, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub layer: usize,
}

/// What is appended.
#[derive(Debug, Clone, Args)]
pub struct RowsArgs {
    /// Keys, `[kv_heads, tokens, dim]`
    #[arg(long, value_name = "SRC")]
    pub k: Source,
    /// Values, likewise; not where values are parts of keys
    #[arg(long, value_name = "SRC")]
    pub v: Option<Source>,
}

/// Arguments of `attnd session append`.
#[derive(Debug, Args)]
#[command(after_help = "\
SRC is file.npy, file.npz:NAME or file.safetensors:NAME, of the element type that the session was opened with; a session of f32
takes others too, which is exact, and f64, which is rounded. All tokens are appended or none.

Examples:
  attnd session append chat --k prompt.npz:k --v prompt.npz:v
  attnd session append chat --layer 3 --k kv.safetensors:layers.3.k --v kv.safetensors:layers.3.v --json")]
pub struct AppendArgs {
    /// To which layer.
    #[command(flatten)]
    pub to: LayerOf,
    /// What is appended.
    #[command(flatten)]
    pub rows: RowsArgs,
    /// Let NaN and infinities through; they then follow IEEE 754 into the rows that see them
    #[arg(long)]
    pub allow_non_finite: bool,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// What is asked.
#[derive(Debug, Clone, Args)]
pub struct QueryArgs {
    /// Queries, `[heads, tokens, dim]`, of any element type
    #[arg(long, value_name = "SRC")]
    pub q: Source,
    /// What is computed over them.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// Look at the first N tokens of the layer [default: at all of them]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub at_len: Option<NonZeroUsize>,
    /// Refuse to answer where the session was cut since it had this generation
    #[arg(long, value_name = "N")]
    pub generation: Option<u64>,
    /// Context of rows that see neither a key nor a sink
    #[arg(long, value_enum, value_name = "WHAT", default_value = "zero")]
    pub empty_row: SessionEmptyRow,
    /// Let NaN and infinities through; they then follow IEEE 754 into the rows that see them
    #[arg(long)]
    pub allow_non_finite: bool,
    /// Where the result goes: .npy (context) or .safetensors (context, lse)
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<OutputPath>,
}

/// What rows of a session are that see nothing, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SessionEmptyRow {
    /// Zeros
    Zero,
    /// NaN
    Nan,
}

impl From<SessionEmptyRow> for EmptyRow {
    fn from(typed: SessionEmptyRow) -> Self {
        match typed {
            SessionEmptyRow::Zero => Self::Zero,
            SessionEmptyRow::Nan => Self::Nan,
        }
    }
}

/// Arguments of `attnd session attend`.
#[derive(Debug, Args)]
#[command(after_help = "\
Flags are those of `attnd attend`. Keys and values of a session have no dense masks or biases, no weights of before, and no
score functions that make other keys of them (attnd scores lists those).

Examples:
  attnd session attend chat --q x.npz:q -o context.npy
  attnd session attend chat --layer 3 --q q.npy --causal --window 4096,0 --at-len 8192 -o out.safetensors
  ATTND_ENDPOINT=http://10.0.0.1:7400 attnd session attend chat --q q.npy --softcap 50 --alibi auto --json")]
pub struct SessionAttendArgs {
    /// Over which layer.
    #[command(flatten)]
    pub over: LayerOf,
    /// What is asked.
    #[command(flatten)]
    pub query: QueryArgs,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session step`.
#[derive(Debug, Args)]
#[command(after_help = "\
With --causal the last query sees all tokens, those of this step included, and each one before it one less: what a decoder
wants, for one token as for a whole prompt. Without it each query sees all of them.

Examples:
  attnd session step chat --k x.npz:k --v x.npz:v --q x.npz:q --causal -o context.npy
  attnd session step chat --layer 3 --k k.npy --v v.npy --q q.npy --causal --window 4096,0 --sinks s.npy -o out.safetensors")]
pub struct StepArgs {
    /// To and over which layer.
    #[command(flatten)]
    pub of: LayerOf,
    /// What is appended.
    #[command(flatten)]
    pub rows: RowsArgs,
    /// What is asked.
    #[command(flatten)]
    pub query: QueryArgs,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session fork`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  attnd session fork chat chat-b")]
pub struct ForkArgs {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Name of the other one [default: one that nobody has]
    #[arg(value_name = "CHILD")]
    pub child: Option<String>,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session truncate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Begins a new generation of the session.

Example:
  attnd session truncate chat --len 4096")]
pub struct TruncateArgs {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Tokens that stay
    #[arg(long, value_name = "N")]
    pub len: u64,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session seal`.
#[derive(Debug, Args)]
#[command(after_help = "\
It can still be attended over and forked.

Example:
  attnd session seal chat")]
pub struct SealArgs {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session describe`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  attnd session describe chat
  attnd session describe chat --json | jq '.tokens[0], .shards[].workers'")]
pub struct DescribeArgs {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  attnd session list --endpoint http://10.0.0.1:7400")]
pub struct ListArgs {
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `attnd session close`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  attnd session close chat")]
pub struct CloseArgs {
    /// The session
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Where.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    fn session(typed: &[&str]) -> Result<SessionVerb, clap::Error> {
        match Cli::try_parse_from(["attnd", "session"].iter().chain(typed))?.verb {
            Verb::Session(args) => Ok(args.verb),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn a_session_has_its_dimensions_and_defaults() {
        let base = ["open", "--layers", "2", "--heads", "8", "--dim", "64"];
        let SessionVerb::Open(args) = session(&base).unwrap() else { panic!("not open") };
        assert_eq!((args.name, args.kv_heads, args.acks, args.ttl), (None, None, None, 600));
        assert_eq!(args.storage.of(args.dtype.into()), Storage::F32);
        assert_eq!((args.cluster.timeout, args.max_tokens.get()), (Duration::from_secs(30), 1 << 20));
        assert_eq!(StorageArg::Int4.of(Dtype::F16), Storage::Int4);
        for wrong in [
            &["--layers", "0"][..],
            &["--dtype", "f64"],
            &["--storage", "int2"],
            &["--value-dim", "3", "--value-prefix", "3"],
            &["--ttl=-1"],
            &["--timeout", "0"],
        ] {
            let typed: Vec<_> = base.iter().chain(wrong).copied().collect();
            assert_eq!(session(&typed).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn a_step_has_rows_queries_and_the_flags_of_attend() {
        let typed =
            ["step", "chat", "--layer", "3", "--k", "x.npz:k", "--v", "x.npz:v", "--q", "q.npy", "--causal"];
        let more = ["--window", "9,0", "--at-len", "7", "--empty-row", "nan"];
        let typed: Vec<_> = typed.iter().chain(&more).copied().collect();
        let SessionVerb::Step(args) = session(&typed).unwrap() else { panic!("not step") };
        assert_eq!((args.of.name.as_str(), args.of.layer), ("chat", 3));
        let (causal, mask) = args.query.operator.causal_and_mask().unwrap();
        assert_eq!((causal, mask.window.left), (attnd_client::Causal::BottomRight, Some(9)));
        assert_eq!(args.query.at_len.map(NonZeroUsize::get), Some(7));
        assert!(session(&["step", "chat", "--k", "k.npy", "--v", "v.npy"]).is_err());
        assert!(session(&["attend", "chat", "--q", "q.npy", "--empty-row", "uniform"]).is_err());
        assert!(session(&["truncate", "chat"]).is_err());
    }
}
