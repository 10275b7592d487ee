//! The flags of `attnd plan`: what a session would be, and which cluster would hold it.

use std::num::NonZeroUsize;

use attnd_kernel::{Dtype, Storage};
use clap::Args;

use super::values::{parse_count, parse_dtype, parse_integers};

/// Arguments of `attnd plan`.
#[derive(Debug, Args)]
#[command(after_help = "\
Nothing is made or reserved: it asks the coordinator which workers there are, and places a session on them as it would itself.
A session is cut once, for all its layers, by heads and by slots of the key axis, so that who computes has work by its speed
and everybody has room. If the memory doesn't suffice for so many tokens, it says for how many it does.

Examples:
  attnd plan --layers 32 --heads 32 --kv-heads 8 --head-dim 128 --tokens 131072 --replicas 2 --endpoint http://10.0.0.1:7400
  attnd plan --layers 60 --heads 128 --kv-heads 1 --head-dim 576 --value-dim 512 --storage int8 --tokens 1048576 --json
  attnd plan --layers 2 --heads 8 --head-dim 64 --dtype f32 --tokens 1000 --replicas 2 --allow-same-host --json | jq .workers")]
pub struct PlanArgs {
    /// Layers of the model
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub layers: NonZeroUsize,
    /// Query heads
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub heads: NonZeroUsize,
    /// Key/value heads, of which query heads must be a multiple [default: as many as query heads]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub kv_heads: Option<NonZeroUsize>,
    /// Elements of a query and of a key
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub head_dim: NonZeroUsize,
    /// Elements of a value [default: as many as of a key]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub value_dim: Option<NonZeroUsize>,
    /// Type of keys and values as they are sent, and stored unless --storage says otherwise: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = parse_dtype)]
    pub dtype: Dtype,
    /// Store them as integers with a scale for each key and each value: int8 or int4 [default: as they are sent]
    #[arg(long, value_name = "TYPE", value_parser = parse_integers)]
    pub storage: Option<Storage>,
    /// Tokens of each layer
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub tokens: NonZeroUsize,
    /// Workers that hold each part, on as many hosts
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_count)]
    pub replicas: NonZeroUsize,
    /// Let replicas be on one host, where they don't survive its loss
    #[arg(long)]
    pub allow_same_host: bool,
    /// Coordinator of a running cluster, such as http://127.0.0.1:7400 [env: ATTND_ENDPOINT]
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    fn plan(extra: &[&str]) -> Result<PlanArgs, clap::Error> {
        let base = ["attnd", "plan", "--layers", "2", "--heads", "8", "--head-dim", "64", "--tokens", "1000"];
        match Cli::try_parse_from(base.iter().chain(extra))?.verb {
            Verb::Plan(args) => Ok(args),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn a_session_has_bf16_and_one_replica_unless_it_is_said() {
        let args = plan(&[]).unwrap();
        assert_eq!(
            (args.dtype, args.storage, args.replicas.get(), args.kv_heads),
            (Dtype::Bf16, None, 1, None)
        );
        let args =
            plan(&["--dtype", "f32", "--storage", "int8", "--replicas", "3", "--allow-same-host"]).unwrap();
        assert_eq!((args.dtype, args.storage, args.replicas.get()), (Dtype::F32, Some(Storage::Int8), 3));
        assert!(args.allow_same_host);
    }

    #[test]
    fn wrong_values_are_refused_with_exit_code_2() {
        for wrong in
            [&["--replicas", "0"][..], &["--dtype", "int8"], &["--storage", "f32"], &["--kv-heads", "0"]]
        {
            assert_eq!(plan(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
