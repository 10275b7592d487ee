//! What a call may ask for: dimensions, dtype, scale, workers, and payloads that belong to the shape.

use attnd_wire::proto;
use tonic::Code;

use super::call::{Draft, Frame, begin, chunk, commit, dims, edit_chunk};
use super::scene::{Refusal, Scene};

/// Q has 192 bytes, K 2560 and V 1280.
fn small() -> Draft {
    Draft { chunk_bytes: 512, ..Draft::random(dims([2, 2, 3, 40, 8, 4]), 2) }
}

/// Rows 24 to 27 and 30: refused at Begin, before a byte is read.
#[tokio::test]
async fn shapes_that_nobody_can_compute() {
    let mut scene = Scene::open().await;
    let max = u32::MAX;
    type Change = fn(&mut proto::Shape);
    let rows: &[(Change, &str)] = &[
        (|shape| shape.batch = 0, "SHAPE_ZERO: batch"),
        (|shape| shape.heads = 0, "SHAPE_ZERO: num_heads"),
        (|shape| shape.kv_heads = 0, "SHAPE_ZERO: num_kv_heads"),
        (|shape| shape.queries = 0, "SHAPE_ZERO: q_len"),
        (|shape| shape.keys = 0, "SHAPE_ZERO: kv_len"),
        (|shape| shape.head_dim = 0, "SHAPE_ZERO: head_dim"),
        (|shape| shape.value_dim = 0, "SHAPE_ZERO: value_dim"),
        (|shape| shape.batch = 1025, "SHAPE_LIMIT: batch 1025 > 1024"),
        (|shape| shape.heads = u32::MAX, "SHAPE_LIMIT: num_heads 4294967295 > 1024"),
        (|shape| shape.kv_heads = 1026, "SHAPE_LIMIT: num_kv_heads 1026 > 1024"),
        (|shape| shape.queries = 65_537, "SHAPE_LIMIT: q_len 65537 > 65536"),
        (|shape| shape.keys = 1_048_577, "SHAPE_LIMIT: kv_len 1048577 > 1048576"),
        (|shape| shape.head_dim = 513, "SHAPE_LIMIT: head_dim 513 > 512"),
        (|shape| shape.value_dim = 513, "SHAPE_LIMIT: value_dim 513 > 512"),
        (|shape| shape.batch = 600, "SHAPE_LIMIT: batch * num_heads 1200 > 1024"),
        (|shape| shape.heads = 7, "GQA_RATIO: 7 % 2 != 0"),
        (|shape| shape.kv_heads = 4, "GQA_RATIO: 2 % 4 != 0"),
    ];
    for (change, text) in rows {
        let frames = small().with_shape(change).frames();
        scene.refuses(text, frames, &Refusal::invalid(*text)).await;
    }
    for shape in [
        proto::Shape { batch: max, heads: max, queries: max, ..dims([1, 1, 1, 1, 1, 1]) },
        proto::Shape { kv_heads: max, keys: max, value_dim: max, ..dims([1, 1, 1, 1, 1, 1]) },
        proto::Shape { batch: max, kv_heads: max, keys: max, ..dims([max; 6]) },
    ] {
        let frames = small().with_shape(|all| *all = shape).frames();
        scene.refuses("a product over 2^64", frames, &Refusal::invalid("SHAPE_OVERFLOW")).await;
    }
    let frames = small().with(|begin| begin.shape = None).frames();
    scene.refuses("no shape", frames, &Refusal::invalid("SHAPE_ZERO: batch")).await;
    scene.close().await;
}

/// Row 28: what is over every budget is refused at Begin, with the numbers, without memory for it, and for good.
#[tokio::test]
async fn shapes_over_every_budget() {
    let mut scene = Scene::open().await;
    let status = scene.too_large().await;
    Refusal::with(Code::ResourceExhausted, "KV_BUDGET: need ", ", free ").check("4 TiB", &status);
    let numbers: Vec<u64> = status
        .message()
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect();
    let [need, free] = *numbers else { panic!("{status:?}") };
    assert!(need >= 4 << 40 && 0 < free && free < 1 << 40, "{status:?}");
    // More than the workers have even when idle: it would be in vain to come back.
    assert!(status.metadata().get("grpc-retry-pushback-ms").is_none(), "{status:?}");
    scene.recovers("4 TiB").await;
    // The payload is not even looked at.
    let frames = small().with_shape(|shape| *shape = dims([1024, 1024, 1, 1 << 20, 512, 512])).frames();
    let refusal = Refusal::with(Code::ResourceExhausted, "KV_BUDGET: need ", ", free ");
    scene.refuses("4 TiB, with a payload", frames, &refusal).await;
    scene.close().await;
}

/// Rows 28, 29, 31 and 32. On the wire both dims are one number, and so are the tokens of K and V: tensors that
/// disagree show as a payload of the wrong length.
#[tokio::test]
async fn payloads_that_do_not_belong_to_the_shape() {
    let mut scene = Scene::open().await;
    let honest = small();
    let tensor = |which: usize, bytes: Vec<u8>| {
        let mut draft = honest.clone();
        draft.tensors[which] = bytes;
        draft.frames()
    };
    let cut = |which: usize, len: usize| tensor(which, honest.tensors[which][..len].to_vec());
    let uneven = |len: usize| {
        let bytes = vec![0; len];
        vec![begin(honest.begin), chunk(0, proto::Tensor::K, &bytes), commit(1, len as u64)]
    };
    let rows: Vec<(&str, Vec<Frame>, &str)> = vec![
        ("16 bytes of k", cut(1, 16), "PAYLOAD_LENGTH: shape needs 2560, payload 16 (k)"),
        ("no q", tensor(0, vec![]), "PAYLOAD_LENGTH: shape needs 192, payload 0 (q)"),
        ("one element too few in q", cut(0, 188), "PAYLOAD_LENGTH: shape needs 192, payload 188 (q)"),
        (
            "one element too many in q",
            tensor(0, vec![0; 196]),
            "PAYLOAD_LENGTH: shape needs 192, payload 196 (q)",
        ),
        (
            "k of twice the dim of q",
            tensor(1, vec![0; 5120]),
            "PAYLOAD_LENGTH: shape needs 2560, payload 3072 (k)",
        ),
        (
            "v of 39 tokens where k has 40",
            cut(2, 1280 - 32),
            "PAYLOAD_LENGTH: shape needs 1280, payload 1248 (v)",
        ),
        (
            "v of 41 tokens where k has 40",
            tensor(2, vec![0; 1312]),
            "PAYLOAD_LENGTH: shape needs 1280, payload 1312 (v)",
        ),
        ("4097 bytes of f32", uneven(4097), "PAYLOAD_LENGTH: 4097 not a multiple of 4"),
        ("3 bytes of f32", uneven(3), "PAYLOAD_LENGTH: 3 not a multiple of 4"),
        (
            "nothing at all",
            vec![begin(honest.begin), commit(0, 0)],
            "PAYLOAD_LENGTH: shape needs 192, payload 0 (q)",
        ),
    ];
    for (row, frames, text) in rows {
        scene.refuses(row, frames, &Refusal::invalid(text)).await;
    }
    let odd = honest.with(|begin| begin.set_dtype(proto::Dtype::Bf16));
    let mut frames = odd.frames();
    edit_chunk(&mut frames[1], |chunk| chunk.data = vec![0; 7].into());
    scene
        .refuses("7 bytes of bf16", frames, &Refusal::invalid("PAYLOAD_LENGTH: 7 not a multiple of 2"))
        .await;
    scene.close().await;
}

/// Rows 33 and 36, and the other numbers of Begin and of chunks.
#[tokio::test]
async fn numbers_that_mean_nothing() {
    let mut scene = Scene::open().await;
    for dtype in [0, 99, -1] {
        let frames = small().with(|begin| begin.dtype = dtype).frames();
        scene.refuses("dtype", frames, &Refusal::invalid(format!("DTYPE: {dtype}"))).await;
    }
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, -1.0] {
        let frames = small().with(|begin| begin.scale = Some(scale)).frames();
        let refusal = Refusal::invalid("SCALE: must be finite and > 0");
        scene.refuses(&format!("scale {scale}"), frames, &refusal).await;
    }
    for causal in [3, -1] {
        let frames = small().with(|begin| begin.causal = causal).frames();
        scene.refuses("causal", frames, &Refusal::invalid(format!("CAUSAL: {causal}"))).await;
    }
    for tensor in [0, 4] {
        let mut frames = small().frames();
        edit_chunk(&mut frames[2], |chunk| chunk.tensor = tensor);
        scene.refuses("tensor", frames, &Refusal::invalid(format!("TENSOR: {tensor}"))).await;
    }
    let frames = small().on_workers(0).frames();
    scene.refuses("exactly 0 workers", frames, &Refusal::invalid("WORKERS: 0 workers asked for")).await;
    let frames = small().on_workers(3).frames();
    let refusal = Refusal::new(Code::Unavailable, "NO_WORKERS: 3 workers asked for, 2 alive");
    scene.refuses("more workers than there are", frames, &refusal).await;
    let frames = small().on_workers(u32::MAX).frames();
    let refusal = Refusal::new(Code::Unavailable, "NO_WORKERS: 4294967295 workers asked for, 2 alive");
    scene.refuses("very many workers", frames, &refusal).await;
    scene.close().await;
}
