//! The cases of onnx through a cluster of three workers, asked for as any client would.

use std::sync::Arc;

use attnd_client::{
    AttendOptions, Attended, Client, DenseTensor, Dims, Element, Operands as Tensors, OutputsParts, Stage,
    WorkerChoice,
};
use attnd_kernel::slot::n_pages;
use attnd_kernel::{AttnShape, Dtype, Mask, PerBatch, Positions};
use bytes::Bytes;
use half::{bf16, f16};

use super::onnx_data::{Case, Elements, Tensor, cases};
use super::operands::{Matrices, Operands, mask_shape};
use crate::support::cluster::Cluster;

const WORKERS: usize = 3;

/// A case as a call.
struct Call {
    tensors: Tensors,
    options: AttendOptions,
}

impl Call {
    fn of(case: &Case) -> Self {
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
        let stages = [Stage::Raw, Stage::Capped, Stage::Masked, Stage::Weights];
        let stage = stages[case.attributes.qk_matmul_output_mode];
        let outputs = OutputsParts {
            stages: case.tensor("qk_matmul_output").map(|_| stage).into_iter().collect(),
            ..OutputsParts::default()
        };
        let options = AttendOptions {
            // Bools say which keys are seen, numbers are added.
            dense_mask: case.tensor("attn_mask").map(dense),
            outputs,
            scale: case.attributes.scale.map(|scale| scale as f32),
            softcap: case.attributes.softcap.map(|cap| cap as f32),
            mask,
            workers: WorkerChoice::Exactly(WORKERS),
            ..AttendOptions::default()
        };
        Self { tensors: Tensors { shape, dtype, q, k, v }, options }
    }

    async fn attend(&self, client: &Client, case: &Case) -> Attended {
        let attended = client.attend(&self.tensors, &self.options, &mut |_| {}).await;
        let attended = attended.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        // As many as there are heads of keys times pages, where these are fewer.
        let shape = &self.tensors.shape;
        let places = shape.n_groups() * n_pages(shape.n_keys());
        assert_eq!(attended.plan.shares.len(), WORKERS.min(places), "{}", case.name);
        attended
    }
}

/// A mask as it travels.
fn dense(mask: &Tensor) -> DenseTensor {
    let shape = mask_shape(mask);
    let (element, bytes) = match &mask.elements {
        Elements::Bools(sees) => (Element::Bool, sees.iter().map(|sees| u8::from(*sees)).collect()),
        Elements::Floats(values, dtype) => (Element::Float(*dtype), narrowed(values, *dtype)),
        Elements::Integers(_) => panic!("a mask of integers"),
    };
    DenseTensor { element, shape, bytes }
}

fn bytes(tensor: &Matrices, dtype: Dtype) -> Bytes {
    narrowed(&tensor.elements, dtype)
}

/// The elements as they were before they were widened.
fn narrowed(elements: &[f32], dtype: Dtype) -> Bytes {
    let elements = elements.iter().copied();
    match dtype {
        Dtype::F32 => elements.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => elements.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => elements.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// The worst error of the outputs over their tolerance: at most 1 is right.
fn worst_ratio(case: &Case, attended: &Attended) -> f64 {
    let heads = case.attributes.num_heads.map(|(heads, _)| heads);
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<f64>>();
    let wanted = Matrices::of(case.required("Y"), heads);
    let context = case.worst_ratio(&wide(&attended.context), &wanted.elements);
    let scores = case.tensor("qk_matmul_output").map_or(0.0, |wanted| {
        let wanted = Matrices::of(wanted, None);
        case.worst_ratio(&wide(&attended.inspected.elements[0]), &wanted.elements)
    });
    context.max(scores)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_agree_with_onnx_in_every_case() {
    let cluster = Cluster::start(WORKERS).await;
    let client = cluster.client();
    let (mut with_masks, mut with_scores) = (0, 0);
    let cases = cases();
    for case in &cases {
        let attended = Call::of(case).attend(&client, case).await;
        let worst = worst_ratio(case, &attended);
        assert!(worst <= 1.0, "{}: {worst:.3} of the tolerance", case.name);
        with_masks += usize::from(case.tensor("attn_mask").is_some());
        with_scores += usize::from(case.tensor("qk_matmul_output").is_some());
    }
    assert_eq!((cases.len(), with_masks, with_scores), (128, 74, 28));
}

/// Whether the cases that are run are of any use: a call without one of their options must be seen to be wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_that_the_cases_have_shows_in_one_of_them() {
    let cluster = Cluster::start(WORKERS).await;
    let client = cluster.client();
    type Change = fn(&mut AttendOptions);
    let changes: [(&str, Change); 5] = [
        ("mask", |options| options.dense_mask = None),
        ("scale", |options| options.scale = None),
        ("softcap", |options| options.softcap = None),
        ("causal", |options| (options.mask.causal, options.mask.positions) = (false, None)),
        ("another corner", |options| options.mask.positions = Some(Positions::BottomRight)),
    ];
    for (option, change) in changes {
        let mut worst = 0.0_f64;
        for case in cases() {
            let mut call = Call::of(&case);
            change(&mut call.options);
            worst = worst.max(worst_ratio(&case, &call.attend(&client, &case).await));
        }
        assert!(worst > 2.0, "without {option}: {worst:.3} of the tolerance at most");
    }
}
