//! `attnd session open`.

use std::time::Duration;

use attnd_client::SessionSpec;
use attnd_client::session::OpenOptions;

use super::ask;
use super::describe::Report;
use crate::args::OpenArgs;
use crate::output;

/// Begins a session.
pub(super) async fn run(args: &OpenArgs) -> anyhow::Result<()> {
    let options = OpenOptions { name: args.name.clone(), spec: spec(args) };
    let description = ask(&args.cluster, async |sessions| {
        let mut session = sessions.open(options).await?;
        Ok(session.describe().await?)
    })
    .await?;
    if args.cluster.json {
        return output::json(&Report::from(&description));
    }
    output::line(&format!("session {}", description.name))
}

/// What the flags say that it is; whether that makes sense is for the client to say.
fn spec(args: &OpenArgs) -> SessionSpec {
    let dtype = args.dtype.into();
    let (layers, heads, dim) = (args.layers.get(), args.heads.get(), args.dim.get());
    let kv_heads = args.kv_heads.map_or(heads, usize::from);
    SessionSpec {
        value_dim: args.value_dim.or(args.value_prefix).map_or(dim, usize::from),
        storage: args.storage.of(dtype),
        value_is_key_prefix: args.value_prefix.is_some(),
        replicas: args.replicas.get(),
        acks: args.acks.unwrap_or(args.replicas).get(),
        ttl: Duration::from_secs(args.ttl.into()),
        max_tokens: args.max_tokens.get(),
        allow_same_host: args.allow_same_host,
        ..OpenOptions::new(layers, heads, kv_heads, dim, dtype).spec
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::{Dtype, Storage};
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, SessionVerb, Verb};

    fn spec_of(typed: &str) -> SessionSpec {
        let words = "attnd session open chat".split(' ').chain(typed.split(' '));
        let Verb::Session(args) = Cli::try_parse_from(words).unwrap().verb else { panic!("{typed}") };
        let SessionVerb::Open(args) = args.verb else { panic!("{typed}") };
        spec(&args)
    }

    #[test]
    fn flags_say_what_a_session_is() {
        let plain = spec_of("--layers 2 --heads 8 --dim 64");
        assert_eq!((plain.kv_heads, plain.value_dim, plain.replicas, plain.acks), (8, 64, 1, 1));
        let rich = "--layers 2 --heads 8 --kv-heads 2 --dim 576 --value-prefix 512 --dtype bf16 --storage int8 \
                    --replicas 3 --ttl 5 --max-tokens 99 --allow-same-host";
        let rich = spec_of(rich);
        assert_eq!((rich.kv_heads, rich.value_dim, rich.replicas, rich.acks), (2, 512, 3, 3));
        assert_eq!((rich.dtype, rich.storage, rich.max_tokens), (Dtype::Bf16, Storage::Int8, 99));
        assert!(rich.value_is_key_prefix && rich.allow_same_host && rich.ttl == Duration::from_secs(5));
        assert_eq!(plain.check().and(rich.check()), Ok(()));
    }
}
