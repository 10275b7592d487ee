//! Dense masks and biases that are wrong: their dimensions, their place in the stream, their bytes.

use attnd_kernel::Dtype;
use attnd_wire::proto;
use tonic::Code;

use super::call::{Draft, Frame, begin, chunk, commit, dims, edit_chunk, encode};
use super::scene::{Refusal, Scene};

const BOOL: i32 = proto::Dtype::Bool as i32;
const F32: i32 = proto::Dtype::F32 as i32;

/// Two batch elements would be too many; 2 heads in 2 groups, 3 queries, 600 keys.
fn small() -> Draft {
    Draft::random(dims([2, 2, 3, 600, 8, 4]), 5).on_workers(2)
}

fn mask(dtype: i32, [batch, heads, queries, keys]: [u32; 4]) -> proto::Operator {
    let dense = Some(proto::Dense { dtype, batch, heads, queries, keys });
    proto::Operator { mask: Some(proto::Mask { dense, ..Default::default() }), ..Default::default() }
}

fn bias(dtype: i32, [batch, heads, queries, keys]: [u32; 4]) -> proto::Bias {
    let dense = proto::Dense { dtype, batch, heads, queries, keys };
    proto::Bias { kind: Some(proto::bias::Kind::Dense(dense)) }
}

/// A call with a mask `[1, 1, 3, 600]` of these bytes in three chunks, and a bias `[1, 2, 1, 500]` in one.
fn with_both(mask_bytes: &[u8], bias_bytes: &[u8]) -> Vec<Frame> {
    let mut operator = mask(BOOL, [1, 1, 3, 600]);
    operator.biases.push(bias(F32, [1, 2, 1, 500]));
    let draft = small().with(|begin| begin.operator = Some(operator));
    let mut frames = vec![begin(draft.begin.clone())];
    for (tensor, bytes) in [(proto::Tensor::Mask, mask_bytes), (proto::Tensor::Bias, bias_bytes)] {
        for data in bytes.chunks(if tensor == proto::Tensor::Mask { 700 } else { 4000 }) {
            frames.push(chunk(frames.len() as u32 - 1, tensor, data));
        }
    }
    for (tensor, bytes) in [proto::Tensor::Q, proto::Tensor::K, proto::Tensor::V].iter().zip(&draft.tensors) {
        frames.push(chunk(frames.len() as u32 - 1, *tensor, bytes));
    }
    let bytes = (mask_bytes.len() + bias_bytes.len()) as u64 + draft.total_bytes();
    frames.push(commit(frames.len() as u32 - 1, bytes));
    frames
}

fn good_mask() -> Vec<u8> {
    (0..1800).map(|i| u8::from(i % 3 != 0)).collect()
}

fn good_bias() -> Vec<u8> {
    (0..1000).flat_map(|i| encode(i as f32 * 0.01 - 5.0, Dtype::F32)).collect()
}

#[tokio::test]
async fn dimensions_and_types_that_make_no_sense() {
    let mut scene = Scene::open().await;
    let two = |second: proto::Bias| {
        let biases = vec![bias(F32, [1, 2, 1, 500]), second];
        proto::Operator { biases, ..Default::default() }
    };
    for (operator, text) in [
        (
            mask(BOOL, [1, 2, 3, 601]),
            "OPERATOR: mask.dense is [1, 2, 3, 601], the call needs [1, 1 or 2, 1 or 3, 1 to 600]",
        ),
        (
            mask(BOOL, [2, 1, 0, u32::MAX]),
            "OPERATOR: mask.dense is [2, 1, 0, 4294967295], the call needs [1, 1 or 2, 1 or 3, 1 to 600]",
        ),
        (mask(F32, [1; 4]), "OPERATOR: mask.dense is f32: a mask is bool, and a mask of numbers is a bias"),
        (mask(0, [1; 4]), "DTYPE: 0"),
        (two(bias(F32, [1; 4])), "COMBINATION: bias.dense twice"),
        (two(proto::Bias { kind: None }), "OPERATOR: biases[1] is of no kind that this node knows"),
    ] {
        let frames = small().with(|begin| begin.operator = Some(operator.clone())).frames();
        scene.refuses(text, frames, &Refusal::invalid(text)).await;
    }
    scene.close().await;
}

#[tokio::test]
async fn chunks_in_the_wrong_place() {
    let mut scene = Scene::open().await;
    let honest = with_both(&good_mask(), &good_bias());
    // Begin; 1 to 3 are the mask, 4 the bias, 5 to 7 the operands.
    assert_eq!(honest.len(), 9);
    let moved = |from: usize, to: usize| {
        let mut frames = honest.clone();
        let frame = frames.remove(from);
        frames.insert(to, frame);
        for (index, frame) in frames[1..8].iter_mut().enumerate() {
            edit_chunk(frame, |chunk| chunk.index = index as u32);
        }
        frames
    };
    let edited = |at: usize, change: &dyn Fn(&mut proto::TensorChunk)| {
        let mut frames = honest.clone();
        edit_chunk(&mut frames[at], change);
        frames
    };
    let placed = |at: usize, offset: u64| edited(at, &|chunk| chunk.offset = Some(offset));
    let renamed = |at: usize, tensor: proto::Tensor| edited(at, &|chunk| chunk.tensor = tensor.into());
    let short = |mask: usize, bias: usize| with_both(&good_mask()[..mask], &good_bias()[..bias]);
    let damaged = edited(2, &|chunk| chunk.crc32c = Some(1));
    let unaligned = edited(4, &|chunk| chunk.data = chunk.data.slice(..3999));
    let rows: Vec<(&str, Vec<Frame>, Refusal)> = vec![
        ("q first", moved(5, 1), Refusal::invalid("CHUNK_ORDER: chunk 0 of q: all of mask comes first")),
        (
            "q before the end",
            moved(5, 3),
            Refusal::invalid("CHUNK_ORDER: chunk 2 of q: all of mask comes first"),
        ),
        (
            "bias first",
            moved(4, 1),
            Refusal::invalid("CHUNK_ORDER: chunk 0 of bias: all of mask comes first"),
        ),
        (
            "q before the bias",
            moved(4, 5),
            Refusal::invalid("CHUNK_ORDER: chunk 3 of q: all of bias comes first"),
        ),
        (
            "a gap",
            placed(2, 701),
            Refusal::invalid("CHUNK_ORDER: chunk 1 of mask begins at byte 701, expected 700"),
        ),
        (
            "again",
            placed(2, 0),
            Refusal::invalid("CHUNK_ORDER: chunk 1 of mask begins at byte 0, expected 700"),
        ),
        (
            "past the end",
            placed(3, 1401),
            Refusal::invalid("PAYLOAD_LENGTH: chunk 2 of mask brings bytes 1401 to 1801 of 1800"),
        ),
        (
            "too long",
            renamed(4, proto::Tensor::Mask),
            Refusal::invalid("PAYLOAD_LENGTH: shape needs 1800, payload 5800 (mask)"),
        ),
        (
            "a short mask",
            short(1799, 4000),
            Refusal::invalid("CHUNK_ORDER: chunk 3 of bias: all of mask comes first"),
        ),
        (
            "a short bias",
            short(1800, 3996),
            Refusal::invalid("CHUNK_ORDER: chunk 4 of q: all of bias comes first"),
        ),
        ("no bias", short(1800, 0), Refusal::invalid("CHUNK_ORDER: chunk 3 of q: all of bias comes first")),
        ("damaged", damaged, Refusal::new(Code::Aborted, "CHECKSUM: chunk 1, nothing applied")),
        ("half an element", unaligned, Refusal::invalid("PAYLOAD_LENGTH: 3999 not a multiple of 4")),
        (
            "cut off",
            honest[..3].to_vec(),
            Refusal::new(Code::Aborted, "STREAM_TRUNCATED: 2 chunks, 1400 of 63592 bytes, nothing applied"),
        ),
        (
            "committed early",
            [&honest[..5], &[commit(4, 5800)]].concat(),
            Refusal::invalid("PAYLOAD_LENGTH: shape needs 192, payload 0 (q)"),
        ),
        (
            "committed before the bias",
            [&honest[..4], &[commit(3, 1800)]].concat(),
            Refusal::invalid("PAYLOAD_LENGTH: shape needs 4000, payload 0 (bias)"),
        ),
    ];
    for (row, frames, refusal) in rows {
        scene.refuses(row, frames, &refusal).await;
        scene.recovers_wholly(row).await;
    }
    // A call without a mask has no bytes of one.
    let mut frames = small().frames();
    frames.insert(1, chunk(0, proto::Tensor::Mask, &[1, 0]));
    scene
        .refuses("nobody's mask", frames, &Refusal::invalid("TENSOR: mask, and Begin has no mask.dense"))
        .await;
    scene.close().await;
}

/// Bytes that are no elements, in pages of either of two workers.
#[tokio::test]
async fn elements_that_are_none() {
    let mut scene = Scene::open().await;
    for (query, key) in [(0, 0), (1, 255), (2, 256), (2, 599)] {
        let mut bytes = good_mask();
        bytes[query * 600 + key] = 7;
        let text = format!("DTYPE: mask[b=0,h=0,pos={query},key={key}] is 7, a bool is 0 or 1");
        scene.refuses(&text, with_both(&bytes, &good_bias()), &Refusal::invalid(text.clone())).await;
    }
    for (head, key, value, shown) in [
        (0, 0, f32::NAN, "NaN"),
        (1, 255, f32::INFINITY, "+inf"),
        (0, 300, -f32::NAN, "NaN"),
        (1, 499, f32::INFINITY, "+inf"),
    ] {
        let mut bytes = good_bias();
        bytes[(head * 500 + key) * 4..][..4].copy_from_slice(&value.to_le_bytes());
        let text = format!("NON_FINITE: bias[b=0,h={head},pos=0,key={key}] {shown}");
        scene.refuses(&text, with_both(&good_mask(), &bytes), &Refusal::invalid(text.clone())).await;
    }
    scene.close().await;
}
