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
        (|shape| shape.head_dim = 1025, "SHAPE_LIMIT: head_dim 1025 > 1024"),
        (|shape| shape.value_dim = 1025, "SHAPE_LIMIT: value_dim 1025 > 1024"),
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
        vec![begin(honest.begin.clone()), chunk(0, proto::Tensor::K, &bytes), commit(1, len as u64)]
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
            vec![begin(honest.begin.clone()), commit(0, 0)],
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
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -2.4e38] {
        let frames = small().with(|begin| begin.scale = Some(scale)).frames();
        let refusal = Refusal::invalid("SCALE: must be finite and at most 2.35e38 in size");
        scene.refuses(&format!("scale {scale}"), frames, &refusal).await;
    }
    for causal in [5, -1] {
        let frames = small().with(|begin| begin.causal = causal).frames();
        scene.refuses("causal", frames, &Refusal::invalid(format!("CAUSAL: {causal}"))).await;
    }
    for tensor in [0, 99] {
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

fn alibi(slopes: &[f32]) -> proto::Bias {
    let alibi = proto::Alibi { slopes: slopes.into(), by_key: false };
    proto::Bias { kind: Some(proto::bias::Kind::Alibi(alibi.into())) }
}

fn sigmoid(bias: f32) -> Option<proto::Normaliser> {
    Some(proto::Normaliser { kind: Some(proto::normaliser::Kind::SigmoidBias(bias)) })
}

/// Operators that make no sense, by themselves or for 3 queries and 40 keys of 2 heads: refused at Begin.
#[tokio::test]
async fn operators_that_make_no_sense() {
    use proto::{Causal, Positions, Window};
    type Change = fn(&mut proto::Operator, &mut proto::Mask);
    let runs = |end: Vec<u32>| {
        let id = (0..end.len() as u32).collect();
        Some(proto::Runs { count: vec![end.len() as u32], end, id })
    };
    let rows: &[(Causal, Change, &str)] = &[
        (Causal::Offset, |_, _| {}, "COMBINATION: causal=offset and no mask.offsets"),
        (Causal::TopLeft, |_, m| m.offsets = vec![0], "COMBINATION: mask.offsets and causal=top_left"),
        (
            Causal::TopLeft,
            |_, m| m.set_positions(Positions::BottomRight),
            "COMBINATION: causal=top_left and mask.positions=bottom_right",
        ),
        (
            Causal::Aligned,
            |_, _| {},
            "COMBINATION: causal and no mask.positions: q_len 3, kv_len 40 can be aligned two ways",
        ),
        (
            Causal::None,
            |_, m| m.window = Some(Window { left: 4, right: 0 }),
            "COMBINATION: mask.window and no mask.positions: q_len 3, kv_len 40 can be aligned two ways",
        ),
        (
            Causal::None,
            |_, m| m.chunk = 8,
            "COMBINATION: mask.chunk and no mask.positions: q_len 3, kv_len 40 can be aligned two ways",
        ),
        (Causal::None, |_, m| m.prefix = vec![8], "COMBINATION: mask.prefix and causal=none"),
        (
            Causal::None,
            |_, m| (m.key_begin, m.key_end) = (vec![9], vec![8]),
            "COMBINATION: mask.key_begin[0] is 9, mask.key_end[0] is 8",
        ),
        (Causal::None, |_, m| m.positions = 4, "OPERATOR: mask.positions 4"),
        (
            Causal::None,
            |_, m| m.window = Some(Window { left: -2, right: 0 }),
            "OPERATOR: mask.window.left is -2",
        ),
        (Causal::None, |_, m| m.key_end = vec![1; 3], "OPERATOR: mask.key_end has 3 entries, batch is 1"),
        (Causal::None, |_, m| m.key_end = vec![41], "OPERATOR: mask.key_end[0] is 41, kv_len is 40"),
        (Causal::None, |_, m| m.query_end = vec![4], "OPERATOR: mask.query_end[0] is 4, q_len is 3"),
        (Causal::None, |o, _| o.sinks = vec![0.0], "OPERATOR: sinks has 1 logits, num_heads is 2"),
        (Causal::None, |o, _| o.sinks = vec![0.0, f32::NAN], "OPERATOR: sinks[1] is NaN"),
        (Causal::None, |o, _| o.empty_row = 3, "OPERATOR: empty_row 3"),
        (Causal::None, |o, _| o.empty_row = -1, "OPERATOR: empty_row -1"),
        (Causal::None, |o, _| o.softcap = Some(0.0), "OPERATOR: softcap is 0, scale is 0.35355338"),
        (Causal::None, |o, _| o.softcap = Some(-5.0), "OPERATOR: softcap is -5, scale is 0.35355338"),
        (Causal::None, |o, _| o.softcap = Some(f32::NAN), "OPERATOR: softcap is NaN, scale is 0.35355338"),
        (
            Causal::None,
            |o, _| o.softcap = Some(f32::INFINITY),
            "OPERATOR: softcap is inf, scale is 0.35355338",
        ),
        (
            Causal::TopLeft,
            |o, _| o.biases = vec![alibi(&[1.0; 3])],
            "OPERATOR: bias.alibi has 3 slopes, num_heads is 2, batch is 1",
        ),
        (
            Causal::TopLeft,
            |o, _| o.biases = vec![alibi(&[1.0, f32::NAN])],
            "OPERATOR: bias.alibi.slopes[1] is NaN",
        ),
        (
            Causal::TopLeft,
            |o, _| o.biases = vec![alibi(&[1.0; 2]), alibi(&[1.0; 2])],
            "COMBINATION: bias.alibi twice",
        ),
        (
            Causal::None,
            |o, _| o.biases = vec![alibi(&[1.0; 2])],
            "COMBINATION: bias.alibi and no mask.positions: q_len 3, kv_len 40 can be aligned two ways",
        ),
        (
            Causal::None,
            |o, _| o.biases = vec![proto::Bias { kind: None }],
            "OPERATOR: biases[0] is of no kind that this node knows",
        ),
        (
            Causal::None,
            |o, _| o.normaliser = sigmoid(f32::NEG_INFINITY),
            "OPERATOR: normaliser.sigmoid_bias is -inf",
        ),
        (
            Causal::None,
            |o, _| o.normaliser = Some(proto::Normaliser { kind: None }),
            "OPERATOR: normaliser is of no kind that this node knows",
        ),
        (
            Causal::None,
            |o, _| (o.normaliser, o.sinks) = (sigmoid(0.0), vec![0.0; 2]),
            "COMBINATION: normaliser=sigmoid and sinks",
        ),
        (
            Causal::None,
            |o, _| (o.normaliser, o.empty_row) = (sigmoid(0.0), 2),
            "COMBINATION: normaliser=sigmoid and empty_row=uniform",
        ),
    ];
    let mut scene = Scene::open().await;
    let with = |causal: Causal, operator: proto::Operator| {
        small().with(|begin| {
            begin.set_causal(causal);
            begin.operator = Some(operator);
        })
    };
    for (causal, change, text) in rows {
        let (mut operator, mut mask) = Default::default();
        change(&mut operator, &mut mask);
        operator.mask = Some(mask);
        scene.refuses(text, with(*causal, operator).frames(), &Refusal::invalid(*text)).await;
    }
    for (queries, keys, text) in [
        (vec![2], vec![40], "OPERATOR: mask.documents.queries[0] ends at 2, q_len is 3"),
        (vec![3], vec![9, 9, 40], "OPERATOR: mask.documents.keys[0]: run 1 ends at 9, the one before at 9"),
        (vec![1; 65_537], vec![40], "OPERATOR: mask.documents.queries has 65537 runs, at most 65536"),
    ] {
        let documents = Some(proto::Documents { queries: runs(queries), keys: runs(keys) });
        let mask = Some(proto::Mask { documents, ..Default::default() });
        let draft = with(Causal::None, proto::Operator { mask, ..Default::default() });
        scene.refuses(text, draft.frames(), &Refusal::invalid(text)).await;
    }
    for (empty_row, text) in [
        (1, "COMBINATION: forbid_empty_rows and empty_row=nan"),
        (2, "COMBINATION: forbid_empty_rows and empty_row=uniform"),
    ] {
        let filled = with(Causal::None, proto::Operator { empty_row, ..Default::default() });
        let frames = filled.with(|begin| begin.forbid_empty_rows = true).frames();
        scene.refuses("forbidden rows that are filled", frames, &Refusal::invalid(text)).await;
    }
    // The padding of the queries sees nothing: 1 token of 2 heads.
    let mask = Some(proto::Mask { query_end: vec![2], ..Default::default() });
    let padded = with(Causal::None, proto::Operator { mask, ..Default::default() });
    let frames = padded.with(|begin| begin.forbid_empty_rows = true).frames();
    let refusal = Refusal::invalid("EMPTY_ROW: rows without a key: 2");
    scene.refuses("rows that a mask empties", frames, &refusal).await;
    scene.close().await;
}
