//! Keys and values that workers make: rows and matrices that are missing, in the wrong place, too large, or no numbers.

use attnd_kernel::Dtype;
use attnd_wire::proto;
use tonic::Code;

use super::call::{Draft, Frame, begin, chunk, commit, dims, edit_chunk, encode};
use super::scene::{Refusal, Scene};

/// Elements of a row.
const WIDTH: usize = 5;
const KEYS: usize = 600;

fn projected(dtype: proto::Dtype, width: u32, has_bias: bool) -> Option<proto::Projected> {
    Some(proto::Projected { dtype: dtype.into(), width, has_bias })
}

fn projection() -> proto::Projection {
    let key = projected(proto::Dtype::F32, WIDTH as u32, true);
    proto::Projection { key, value: projected(proto::Dtype::F32, WIDTH as u32, false), same_rows: true }
}

/// 2 heads in 2 groups, 3 queries, 600 keys of 8 and values of 4.
fn draft() -> Draft {
    let draft = Draft::random(dims([2, 2, 3, KEYS as u32, 8, 4]), 5).on_workers(2);
    draft.with(|begin| begin.projection = Some(projection()))
}

/// Bytes of the matrices of keys and values, and of the rows.
fn good() -> [Vec<u8>; 3] {
    let numbers = |n: usize| (0..n).flat_map(|i| encode((i % 17) as f32 * 0.1 - 0.8, Dtype::F32)).collect();
    [numbers(2 * 8 * (WIDTH + 1)), numbers(2 * 4 * WIDTH), numbers(KEYS * WIDTH)]
}

/// Begin, two chunks of each of these and of Q, Commit.
fn frames(draft: &Draft, made_of: &[Vec<u8>; 3]) -> Vec<Frame> {
    let mut frames = vec![begin(draft.begin.clone())];
    let tensors =
        [proto::Tensor::KeyMatrix, proto::Tensor::ValueMatrix, proto::Tensor::Source, proto::Tensor::Q];
    let bytes = || made_of.iter().chain([&draft.tensors[0]]);
    for (tensor, bytes) in tensors.into_iter().zip(bytes()) {
        let half = (bytes.len() / 8 * 4).max(4);
        for data in bytes.chunks(half) {
            frames.push(chunk(frames.len() as u32 - 1, tensor, data));
        }
    }
    frames.push(commit(frames.len() as u32 - 1, bytes().map(|bytes| bytes.len() as u64).sum()));
    frames
}

#[tokio::test]
async fn what_keys_are_made_of_comes_whole_and_in_order() {
    let mut scene = Scene::open().await;
    let honest = frames(&draft(), &good());
    // Begin; 1 and 2 are matrices of keys, 3 and 4 of values, 5 and 6 rows, 7 and 8 queries.
    assert_eq!(honest.len(), 10);
    let moved = |from: usize, to: usize| {
        let mut frames = honest.clone();
        let frame = frames.remove(from);
        frames.insert(to, frame);
        for (index, frame) in frames[1..9].iter_mut().enumerate() {
            edit_chunk(frame, |chunk| chunk.index = index as u32);
        }
        frames
    };
    let edited = |at: usize, change: &dyn Fn(&mut proto::TensorChunk)| {
        let mut frames = honest.clone();
        edit_chunk(&mut frames[at], change);
        frames
    };
    let without = |tensor: usize| {
        let mut made_of = good();
        made_of[tensor].clear();
        frames(&draft(), &made_of)
    };
    let short = |tensor: usize| {
        let mut made_of = good();
        made_of[tensor].truncate(made_of[tensor].len() - 4);
        frames(&draft(), &made_of)
    };
    let rename = |at: usize, tensor: proto::Tensor| edited(at, &|chunk| chunk.tensor = tensor.into());
    let rows: Vec<(&str, Vec<Frame>, Refusal)> = vec![
        ("q first", moved(7, 1), Refusal::invalid("CHUNK_ORDER: chunk 0 of q: all of w_k comes first")),
        (
            "rows first",
            moved(5, 1),
            Refusal::invalid("CHUNK_ORDER: chunk 0 of source: all of w_k comes first"),
        ),
        (
            "values first",
            moved(3, 1),
            Refusal::invalid("CHUNK_ORDER: chunk 0 of w_v: all of w_k comes first"),
        ),
        (
            "q amid the rows",
            moved(7, 6),
            Refusal::invalid("CHUNK_ORDER: chunk 5 of q: all of source comes first"),
        ),
        (
            "no matrix of keys",
            without(0),
            Refusal::invalid("CHUNK_ORDER: chunk 0 of w_v: all of w_k comes first"),
        ),
        (
            "no matrix of values",
            without(1),
            Refusal::invalid("CHUNK_ORDER: chunk 2 of source: all of w_v comes first"),
        ),
        ("no rows", without(2), Refusal::invalid("CHUNK_ORDER: chunk 4 of q: all of source comes first")),
        ("a short row", short(2), Refusal::invalid("CHUNK_ORDER: chunk 7 of q: all of source comes first")),
        (
            "again",
            edited(6, &|chunk| chunk.offset = Some(0)),
            Refusal::invalid("CHUNK_ORDER: chunk 5 of source begins at byte 0, expected 6000"),
        ),
        (
            "damaged",
            edited(5, &|chunk| chunk.crc32c = Some(1)),
            Refusal::new(Code::Aborted, "CHECKSUM: chunk 4, nothing applied"),
        ),
        (
            "half an element",
            edited(5, &|chunk| chunk.data = chunk.data.slice(..5998)),
            Refusal::invalid("PAYLOAD_LENGTH: 5998 not a multiple of 4"),
        ),
        // Keys that are made are not sent, and neither are rows of values that are made of those of keys.
        ("k", rename(7, proto::Tensor::K), Refusal::invalid("PAYLOAD_LENGTH: shape needs 0, payload 96 (k)")),
        ("v", rename(8, proto::Tensor::V), Refusal::invalid("PAYLOAD_LENGTH: shape needs 0, payload 96 (v)")),
        (
            "rows of values",
            rename(6, proto::Tensor::ValueSource),
            Refusal::invalid("TENSOR: value_source, and Begin has no projection.value_source"),
        ),
        (
            "committed early",
            [&honest[..7], &[commit(6, 384 + 160 + 12_000)]].concat(),
            Refusal::invalid("PAYLOAD_LENGTH: shape needs 192, payload 0 (q)"),
        ),
        (
            "cut off",
            honest[..6].to_vec(),
            Refusal::new(Code::Aborted, "STREAM_TRUNCATED: 5 chunks, 6544 of 12736 bytes, nothing applied"),
        ),
    ];
    for (row, frames, refusal) in rows {
        scene.refuses(row, frames, &refusal).await;
        scene.recovers_wholly(row).await;
    }
    // Rows of a call that has none.
    let mut frames = draft().with(|begin| begin.projection = None).frames();
    frames.insert(1, chunk(0, proto::Tensor::Source, &[0; 20]));
    let refusal = Refusal::invalid("TENSOR: source, and Begin has no projection");
    scene.refuses("nobody's rows", frames, &refusal).await;
    scene.close().await;
}

#[tokio::test]
async fn widths_that_make_no_keys_and_rows_that_fit_nowhere() {
    let mut scene = Scene::open().await;
    let with = |change: &dyn Fn(&mut proto::Projection)| {
        let draft = draft().with(|begin| change(begin.projection.as_mut().unwrap()));
        vec![begin(draft.begin)]
    };
    for (frames, text) in [
        (
            with(&|of| of.key = projected(proto::Dtype::F32, u32::MAX, true)),
            "SHAPE_MISMATCH: values are made of the rows of keys, which have one width and one type",
        ),
        (
            with(&|of| (of.same_rows, of.key) = (false, projected(proto::Dtype::F32, u32::MAX, true))),
            "SHAPE_LIMIT: w_k has rows of 4294967295 elements, 1 to 65536 make a key or a value",
        ),
        (with(&|of| (of.same_rows, of.value) = (false, None)), "DTYPE: 0"),
        (with(&|of| of.key = projected(proto::Dtype::Bool, 5, true)), "DTYPE: 4"),
    ] {
        scene.refuses(text, frames, &Refusal::invalid(text)).await;
    }
    let uniform = proto::Operator { empty_row: proto::EmptyRow::Uniform.into(), ..Default::default() };
    let uniform = draft().with(|begin| begin.operator = Some(uniform));
    let text = "COMBINATION: projection and empty_row=uniform";
    scene.refuses(text, vec![begin(uniform.begin)], &Refusal::invalid(text)).await;
    // The largest there are: 2 * 2^48 bytes of rows and as much of nothing else are counted, and not waited for.
    let vast = draft().with_shape(|shape| {
        *shape = proto::Shape { batch: 1024, ..dims([1, 1, 3, 1 << 20, 8, 4]) };
    });
    let vast = vast.with(|begin| {
        let of = projected(proto::Dtype::F32, 65_536, false);
        begin.projection = Some(proto::Projection { key: of, value: of, same_rows: false });
    });
    let refusal = Refusal::with(Code::ResourceExhausted, "KV_BUDGET: need ", "free ");
    scene.refuses("rows of 512 TiB", vec![begin(vast.begin)], &refusal).await;
    scene.close().await;
}

/// Of pages of either of two workers.
#[tokio::test]
async fn rows_that_are_no_numbers() {
    let mut scene = Scene::open().await;
    for (key, element, value, shown) in [
        (0, 0, f32::NAN, "NaN"),
        (255, 4, f32::INFINITY, "+inf"),
        (256, 1, f32::NEG_INFINITY, "-inf"),
        (599, 2, -f32::NAN, "NaN"),
    ] {
        let mut made_of = good();
        made_of[2][(key * WIDTH + element) * 4..][..4].copy_from_slice(&value.to_le_bytes());
        let text = format!("NON_FINITE: source[b=0,pos={key},i={element}] {shown}");
        scene.refuses(&text, frames(&draft(), &made_of), &Refusal::invalid(text.clone())).await;
    }
    // A matrix that is none makes keys that are none.
    let mut made_of = good();
    made_of[0][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let refusal = Refusal::with(Code::InvalidArgument, "NON_FINITE: k[h=0,pos=", "i=0] NaN");
    scene.refuses("a matrix", frames(&draft(), &made_of), &refusal).await;
    scene.close().await;
}
