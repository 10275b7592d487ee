//! Two attention layers of a real encoder, against what the encoder itself computed.

use std::path::Path;

use attnd_client::{AttnShape, Operands, WorkerChoice};
use attnd_kernel::{Causal, Dims, Dtype};
use safetensors::SafeTensors;

use crate::support::cases::{Answer, Case, Data};
use crate::support::cluster::Cluster;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_layers_match_the_encoders_own_results() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/attnd/data/minilm_layers.safetensors");
    let file = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tensors = SafeTensors::deserialize(&file).expect("a safetensors file");
    let (_, header) = SafeTensors::read_metadata(&file).expect("a header");
    let scale =
        header.metadata().as_ref().and_then(|texts| texts.get("scale")).expect("scale in the metadata");
    let scale: f32 = scale.parse().expect("a number");
    assert_eq!(scale.to_bits(), 32.0_f32.sqrt().recip().to_bits());

    let cluster = Cluster::start(3).await;
    let client = cluster.client();
    for layer in ["layer1", "layer4"] {
        let tensor = |name: &str| {
            let name = format!("{layer}.{name}");
            tensors.tensor(&name).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let [heads, tokens, dim] = *tensor("q").shape() else { panic!("{:?}", tensor("q").shape()) };
        assert_eq!((heads, tokens, dim), (12, 208, 32));
        let bytes = |name: &str| bytes::Bytes::copy_from_slice(tensor(name).data());
        let dims = Dims {
            batch: 1,
            heads: heads as u64,
            kv_heads: heads as u64,
            queries: tokens as u64,
            keys: tokens as u64,
            head_dim: dim as u64,
            value_dim: dim as u64,
        };
        let shape = AttnShape::new(dims).expect("a shape");
        let operands = Operands { shape, dtype: Dtype::F32, q: bytes("q"), k: bytes("k"), v: bytes("v") };
        let case = Case::of(Data::Normal, Causal::None, scale, operands);

        let stored = Answer { context: floats(tensor("context").data()), lse: floats(tensor("lse").data()) };
        let rows: Vec<(usize, usize)> =
            (0..heads).flat_map(|head| (0..tokens).map(move |token| (head, token))).collect();
        let wanted = case.reference(&rows);
        // So that the comparison below means something.
        stored.assert_within(&shape, &wanted, &format!("{layer}, the encoder's result"));

        for workers in
            [WorkerChoice::Exactly(1), WorkerChoice::Exactly(2), WorkerChoice::Exactly(3), WorkerChoice::Auto]
        {
            let what = format!("{layer}, {workers:?}");
            let attended = client.attend(&case.operands, &case.options(workers), &mut |_| {}).await;
            let answer = Answer::from(attended.unwrap_or_else(|error| panic!("{what}: {error}")));
            answer.assert_within(&shape, &wanted, &what);
            for (at, wanted) in &wanted {
                let (ours, theirs) = (answer.row(&shape, *at), stored.row(&shape, *at));
                let close = |a: f32, b: f32, bound: f64| (f64::from(a) - f64::from(b)).abs() <= bound;
                let context = ours.context.iter().zip(&theirs.context).zip(&wanted.expected.context);
                assert!(
                    context.into_iter().all(|((a, b), bound)| close(*a, *b, *bound))
                        && close(ours.lse[0], theirs.lse[0], wanted.expected.lse),
                    "{what}: row {at:?} is further from the stored one than the bound"
                );
            }
        }
    }
}
