//! The cases of onnx through a cluster of three workers, asked for as any client would.

use std::collections::BTreeMap;
use std::sync::Arc;

use attnd_client::{AttendOptions, Attended, Client, Dims, Operands as Tensors, WorkerChoice};
use attnd_kernel::{AttnShape, Dtype, Mask, PerBatch, Positions};
use bytes::Bytes;
use half::{bf16, f16};

use super::onnx_data::{Case, Elements, cases};
use super::operands::{Matrices, Operands};
use crate::support::cluster::Cluster;

const WORKERS: usize = 3;

/// What of a case a call has no place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Missing {
    /// A matrix that says which keys are seen: the case isn't run.
    DenseMask,
    /// A matrix that is added to scores: the case isn't run.
    DenseBias,
    /// Scores as an output: the other outputs are compared.
    ScoreStages,
}

/// A case as a call.
struct Call {
    tensors: Tensors,
    options: AttendOptions,
}

impl Call {
    fn of(case: &Case) -> Result<Self, Missing> {
        match case.tensor("attn_mask").map(|mask| &mask.elements) {
            None => {}
            Some(Elements::Bools(_)) => return Err(Missing::DenseMask),
            Some(Elements::Floats(..)) => return Err(Missing::DenseBias),
            Some(Elements::Integers(_)) => panic!("{}: a mask of integers", case.name),
        }
        let Operands { q, k, v, offsets, lengths } = Operands::of(case);
        let [batch, heads, queries, head_dim] = q.shape;
        let [_, kv_heads, keys, value_dim] = v.shape;
        let dims = [batch, heads, kv_heads, queries, keys, head_dim, value_dim].map(|n| n as u64);
        let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = dims;
        let dims = Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim };
        let shape = AttnShape::new(dims).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let Elements::Floats(_, dtype) = case.required("Q").elements else {
            panic!("{}: q is no float", case.name)
        };
        let [q, k, v] = [q, k, v].map(|tensor| bytes(&tensor, dtype));
        let is_causal = case.attributes.is_causal;
        let mask = Mask {
            causal: is_causal,
            positions: is_causal.then(|| Positions::Offset(PerBatch::Each(offsets.into()))),
            key_end: lengths.map(|lengths| PerBatch::Each(Arc::from(lengths))),
            ..Mask::default()
        };
        let options = AttendOptions {
            scale: case.attributes.scale.map(|scale| scale as f32),
            softcap: case.attributes.softcap.map(|cap| cap as f32),
            mask,
            workers: WorkerChoice::Exactly(WORKERS),
            ..AttendOptions::default()
        };
        Ok(Self { tensors: Tensors { shape, dtype, q, k, v }, options })
    }

    async fn attend(&self, client: &Client, case: &Case) -> Attended {
        let attended = client.attend(&self.tensors, &self.options, &mut |_| {}).await;
        let attended = attended.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        assert_eq!(attended.plan.shares.len(), WORKERS, "{}", case.name);
        attended
    }
}

/// The elements as they were before they were widened.
fn bytes(tensor: &Matrices, dtype: Dtype) -> Bytes {
    let elements = tensor.elements.iter().copied();
    match dtype {
        Dtype::F32 => elements.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => elements.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => elements.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// The worst error of the context over its tolerance: at most 1 is right.
fn worst_ratio(case: &Case, attended: &Attended) -> f64 {
    let heads = case.attributes.num_heads.map(|(heads, _)| heads);
    let wanted = Matrices::of(case.required("Y"), heads);
    let got: Vec<f64> = attended.context.iter().copied().map(f64::from).collect();
    case.worst_ratio(&got, &wanted.elements)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_agree_with_onnx_wherever_calls_have_a_place_for_the_case() {
    let cluster = Cluster::start(WORKERS).await;
    let client = cluster.client();
    let (mut missing, mut compared) = (BTreeMap::<Missing, usize>::new(), 0);
    for case in cases() {
        if case.tensor("qk_matmul_output").is_some() {
            *missing.entry(Missing::ScoreStages).or_default() += 1;
        }
        match Call::of(&case) {
            Ok(call) => {
                let worst = worst_ratio(&case, &call.attend(&client, &case).await);
                assert!(worst <= 1.0, "{}: {worst:.3} of the tolerance", case.name);
                compared += 1;
            }
            Err(what) => *missing.entry(what).or_default() += 1,
        }
    }
    println!("{compared} cases compared; not compared: {missing:?}");
    // These may become fewer, and must not become more.
    assert_eq!(compared, 54);
    let known = [(Missing::DenseMask, 4), (Missing::DenseBias, 70), (Missing::ScoreStages, 28)];
    assert_eq!(missing, BTreeMap::from(known));
}

/// Whether the cases that are run are of any use: a call without one of their options must be seen to be wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_that_the_cases_have_shows_in_one_of_them() {
    let cluster = Cluster::start(WORKERS).await;
    let client = cluster.client();
    type Change = fn(&mut AttendOptions);
    let changes: [(&str, Change); 4] = [
        ("scale", |options| options.scale = None),
        ("softcap", |options| options.softcap = None),
        ("causal", |options| (options.mask.causal, options.mask.positions) = (false, None)),
        ("another corner", |options| options.mask.positions = Some(Positions::BottomRight)),
    ];
    for (option, change) in changes {
        let mut worst = 0.0_f64;
        for case in cases() {
            let Ok(mut call) = Call::of(&case) else { continue };
            change(&mut call.options);
            worst = worst.max(worst_ratio(&case, &call.attend(&client, &case).await));
        }
        assert!(worst > 2.0, "without {option}: {worst:.3} of the tolerance at most");
    }
}
