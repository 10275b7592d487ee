//! A worker's own port, for peers that are no coordinator or a broken one: `Worker.Compute` with the same garbage.

use attnd_kernel::Dtype;
use attnd_plan::Tensor;
use attnd_wire::proto::{self, compute_reply, compute_request::Part};
use attnd_wire::{Link, SliceChunk, Status, limits};
use prost::Message as _;
use tonic::Code;
use tonic::transport::Channel;

use super::call::{Draft, dims, encode};
use super::http2::{COMPUTE, OpenRequest, honest};
use super::scene::{Refusal, Scene, within};

type Frame = proto::ComputeRequest;

/// The share of a call of 2 kv groups that holds group 0 alone: Q 96 bytes, K 1280, V 640.
fn share() -> proto::ComputeBegin {
    let piece = proto::Piece { group_begin: 0, group_end: 1, slot_begin: 0, slot_end: 64 };
    proto::ComputeBegin {
        call_id: 7,
        shape: Some(dims([2, 2, 3, 40, 8, 4])),
        dtype: proto::Dtype::F32.into(),
        scale: 0.5,
        pieces: vec![piece],
        tokens_per_cell: 3,
        kernel_id: attnd_kernel::KERNEL_ID.into(),
        ..Default::default()
    }
}

fn begin(begin: proto::ComputeBegin) -> Frame {
    Frame { part: Some(Part::Begin(begin)) }
}

/// A run of bytes with the right checksum.
fn run(index: u32, tensor: Tensor, head: usize, offset: u64, data: Vec<u8>) -> Frame {
    let chunk = SliceChunk { index, tensor: tensor.into(), head, offset, data: data.into() };
    Frame { part: Some(Part::Chunk(chunk.into())) }
}

fn commit(chunks: u32, bytes: u64) -> Frame {
    Frame { part: Some(Part::Commit(proto::Commit { chunks, bytes })) }
}

/// The share as a coordinator sends it: 3 chunks, 2016 bytes.
fn share_frames() -> Vec<Frame> {
    let values = |n: usize| (0..n).flat_map(|i| encode((i % 13) as f32 * 0.1, Dtype::F32)).collect();
    vec![
        begin(share()),
        run(0, Tensor::Q, 0, 0, values(24)),
        run(1, Tensor::K, 0, 0, values(320)),
        run(2, Tensor::V, 0, 0, values(160)),
        commit(3, 2016),
    ]
}

/// The share with another Begin.
fn begun(change: impl FnOnce(&mut proto::ComputeBegin)) -> Vec<Frame> {
    let mut changed = share();
    change(&mut changed);
    let mut frames = share_frames();
    frames[0] = begin(changed);
    frames
}

fn edited(at: usize, change: impl FnOnce(&mut proto::SliceChunk)) -> Vec<Frame> {
    let mut frames = share_frames();
    match &mut frames[at].part {
        Some(Part::Chunk(chunk)) => change(chunk),
        other => panic!("no chunk: {other:?}"),
    }
    frames
}

/// Sends frames and ends the stream; returns how many partials the worker says it sent.
async fn compute(channel: Channel, frames: Vec<Frame>) -> Result<u32, Status> {
    let mut replies = limits::worker_client(channel).compute(tokio_stream::iter(frames)).await?.into_inner();
    let mut partials = 0;
    while let Some(reply) = replies.message().await? {
        match reply.part {
            Some(compute_reply::Part::Partial(_)) => partials += 1,
            Some(compute_reply::Part::Finished(finished)) => {
                assert_eq!(finished.partials, partials, "partials that arrived");
                return Ok(partials);
            }
            Some(compute_reply::Part::Report(_) | compute_reply::Part::Elements(_)) => {
                panic!("a second pass that nobody wants")
            }
            None => panic!("an empty reply"),
        }
    }
    panic!("the answer ended without Finished and without an error")
}

/// A channel to the first worker, which can do its share.
async fn worker(scene: &Scene) -> Channel {
    let url = format!("http://{}", scene.worker().await);
    let channel = limits::endpoint(&url, Link::Cluster).unwrap().connect_lazy();
    let partials = within("a good share", compute(channel.clone(), share_frames())).await;
    assert_eq!(partials.unwrap(), 1);
    channel
}

/// Sends each list of frames and demands its refusal.
async fn refuse_all(rows: Vec<(&str, Vec<Frame>, Refusal)>) {
    let mut scene = Scene::open().await;
    let worker = worker(&scene).await;
    for (row, frames, refusal) in rows {
        let status = within(row, compute(worker.clone(), frames)).await.expect_err(row);
        refusal.check(row, &status);
        scene.recovers(row).await;
    }
    assert_eq!(compute(worker, share_frames()).await.unwrap(), 1, "a good share in the end");
    scene.close().await;
}

/// A Begin that asks for what can't be.
#[tokio::test]
async fn shares_that_nobody_can_compute() {
    let piece = |groups: [u32; 2], slots: [u32; 2]| proto::Piece {
        group_begin: groups[0],
        group_end: groups[1],
        slot_begin: slots[0],
        slot_end: slots[1],
    };
    let pieces = |list: Vec<proto::Piece>| begun(|begin| begin.pieces = list);
    let invalid = |text: &str| Refusal::invalid(text);
    let kernel = |text: &str| Refusal::new(Code::FailedPrecondition, text);
    refuse_all(vec![
        (
            "another kernel",
            begun(|begin| begin.kernel_id = "c9-f32".into()),
            kernel("KERNEL_MIX: c9-f32, this node computes c1-f32"),
        ),
        (
            "a kernel with an escape sequence",
            begun(|begin| begin.kernel_id = "\u{1b}[2Jc1".into()),
            kernel("KERNEL_MIX: \\u{1b}[2Jc1, this node computes c1-f32"),
        ),
        ("no shape", begun(|begin| begin.shape = None), invalid("SHAPE_ZERO: batch")),
        ("no keys", begun(|begin| begin.shape.as_mut().unwrap().keys = 0), invalid("SHAPE_ZERO: kv_len")),
        (
            "a head dim over the limit",
            begun(|begin| begin.shape.as_mut().unwrap().head_dim = 1025),
            invalid("SHAPE_LIMIT: head_dim 1025 > 1024"),
        ),
        ("no dtype", begun(|begin| begin.dtype = 0), invalid("DTYPE: 0")),
        (
            "no scale",
            begun(|begin| begin.scale = f32::NAN),
            invalid("SCALE: must be finite and at most 2.35e38 in size"),
        ),
        (
            "an operator under the name of calls without one",
            begun(|begin| {
                begin.operator = Some(proto::Operator { sinks: vec![0.0; 2], ..Default::default() })
            }),
            Refusal::new(Code::FailedPrecondition, "KERNEL_MIX: c1-f32, this node computes c1-f32-op1"),
        ),
        (
            "the name of an operator without it",
            begun(|begin| begin.kernel_id = "c1-f32-op1".into()),
            Refusal::new(Code::FailedPrecondition, "KERNEL_MIX: c1-f32-op1, this node computes c1-f32"),
        ),
        (
            "a cap under the name of operators without one",
            begun(|begin| {
                begin.operator = Some(proto::Operator { softcap: Some(5.0), ..Default::default() });
                begin.kernel_id = "c1-f32-op1".into();
            }),
            Refusal::new(Code::FailedPrecondition, "KERNEL_MIX: c1-f32-op1, this node computes c1-f32-op2"),
        ),
        (
            "a bias of a newer kind",
            begun(|begin| {
                let biases = vec![proto::Bias { kind: None }];
                begin.operator = Some(proto::Operator { biases, ..Default::default() });
                begin.kernel_id = "c1-f32-op2".into();
            }),
            invalid("OPERATOR: biases[0] is of no kind that this node knows"),
        ),
        (
            "a mask for another shape",
            begun(|begin| {
                let mask = proto::Mask { key_end: vec![41], ..Default::default() };
                begin.operator = Some(proto::Operator { mask: Some(mask), ..Default::default() });
            }),
            invalid("OPERATOR: mask.key_end[0] is 41, kv_len is 40"),
        ),
        ("no such mask", begun(|begin| begin.causal = 9), invalid("CAUSAL: 9")),
        ("no pieces", pieces(vec![]), invalid("PIECES: none")),
        (
            "a group that the call doesn't have",
            pieces(vec![piece([1, 3], [0, 64])]),
            invalid("PIECES: 0: groups 1..3 of 2, slots 0..64 of 64"),
        ),
        (
            "a slot too many",
            pieces(vec![piece([0, 1], [0, 65])]),
            invalid("PIECES: 0: groups 0..1 of 2, slots 0..65 of 64"),
        ),
        (
            "slots backwards",
            pieces(vec![piece([0, 1], [64, 0])]),
            invalid("PIECES: 0: groups 0..1 of 2, slots 64..0 of 64"),
        ),
        (
            "the same slot twice",
            pieces(vec![piece([0, 2], [0, 32]), piece([1, 2], [31, 64])]),
            invalid("PIECES: 1 overlaps an earlier one"),
        ),
        (
            "64 KiB of pieces",
            pieces(vec![piece([0, 0], [0, 0]); 32_768]),
            invalid("COUNT: pieces 32768 > 1024"),
        ),
        (
            "as many pieces as a message holds",
            pieces(vec![piece([0, 0], [0, 0]); 1_000_000]),
            invalid("COUNT: pieces 1000000 > 1024"),
        ),
        (
            "no tokens in a cell",
            begun(|begin| begin.tokens_per_cell = 0),
            invalid("PIECES: tokens_per_cell 0 not in 1..3"),
        ),
        (
            "more tokens in a cell than there are",
            begun(|begin| begin.tokens_per_cell = 4),
            invalid("PIECES: tokens_per_cell 4 not in 1..3"),
        ),
        (
            "4 TiB of keys and values",
            begun(|begin| {
                begin.shape = Some(dims([1024, 1024, 1, 1 << 20, 512, 512]));
                begin.pieces = vec![piece([0, 1024], [0, 64])];
                begin.tokens_per_cell = 1;
            }),
            Refusal::with(Code::ResourceExhausted, "KV_BUDGET: need ", ", free "),
        ),
    ])
    .await;
}

/// Chunks that are not the next one, don't fit, aren't whole, or aren't this worker's.
#[tokio::test]
async fn runs_that_do_not_belong() {
    let invalid = |text: &str| Refusal::invalid(text);
    let mut nan = vec![0; 1280];
    nan[(17 * 8 + 5) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    // Pages 0, 1 and 2 of 600 keys lie in slots 0, 32 and 16: the lower half of the slots has pages 0 and 2.
    let lower_half = begin(proto::ComputeBegin {
        shape: Some(dims([2, 2, 3, 600, 8, 4])),
        pieces: vec![proto::Piece { group_begin: 0, group_end: 1, slot_begin: 0, slot_end: 32 }],
        ..share()
    });
    let page = |index: u32, page: u64| run(index, Tensor::K, 0, page * 256 * 32, vec![0; 256 * 32]);
    refuse_all(vec![
        ("chunk 1 says 3", edited(2, |chunk| chunk.index = 3), invalid("CHUNK_ORDER: expected 1, got 3")),
        ("chunk 1 says 0", edited(2, |chunk| chunk.index = 0), invalid("CHUNK_ORDER: expected 1, got 0")),
        (
            "bytes past the end",
            vec![begin(share()), run(0, Tensor::K, 0, 1248, vec![0; 64])],
            invalid("PAYLOAD_LENGTH: k head 0: 64 bytes at 1248 of 1280"),
        ),
        (
            "an offset that overflows",
            vec![begin(share()), run(0, Tensor::K, 0, u64::MAX - 3, vec![0; 64])],
            invalid("PAYLOAD_LENGTH: k head 0: 64 bytes at 18446744073709551612 of 1280"),
        ),
        (
            "an offset inside of an element",
            vec![begin(share()), run(0, Tensor::K, 0, 2, vec![0; 64])],
            invalid("PAYLOAD_LENGTH: k head 0: 64 bytes at 2 of 1280"),
        ),
        (
            "not whole elements",
            vec![begin(share()), run(0, Tensor::K, 0, 0, vec![0; 63])],
            invalid("PAYLOAD_LENGTH: 63 not a multiple of 4"),
        ),
        (
            "no bytes",
            vec![begin(share()), run(0, Tensor::K, 0, 0, vec![])],
            invalid("PAYLOAD_LENGTH: chunk 0 has 0 bytes"),
        ),
        (
            "a gap in a head",
            vec![begin(share()), run(0, Tensor::K, 0, 32, vec![0; 64])],
            invalid("CHUNK_ORDER: k head 0: expected offset 0, got 32"),
        ),
        (
            "a run that comes twice",
            vec![begin(share()), run(0, Tensor::V, 0, 0, vec![0; 64]), run(1, Tensor::V, 0, 0, vec![0; 64])],
            invalid("CHUNK_ORDER: v head 0: expected offset 64, got 0"),
        ),
        (
            "a head of a group outside the share",
            vec![begin(share()), run(0, Tensor::K, 1, 0, vec![0; 64])],
            invalid("PIECES: k head 1 is not in this share"),
        ),
        (
            "a head that no call has",
            edited(1, |chunk| chunk.head = u32::MAX),
            invalid("PIECES: q head 4294967295 is not in this share"),
        ),
        (
            "a page outside the slots",
            vec![lower_half, page(0, 0), page(1, 1)],
            invalid("CHUNK_ORDER: k head 0: expected offset 16384, got 8192"),
        ),
        ("no tensor", edited(1, |chunk| chunk.tensor = 0), invalid("TENSOR: 0")),
        (
            "a wrong checksum",
            edited(2, |chunk| chunk.crc32c ^= 1),
            Refusal::new(Code::Aborted, "CHECKSUM: chunk 1, nothing applied"),
        ),
        (
            "a NaN",
            vec![begin(share()), run(0, Tensor::K, 0, 0, nan)],
            invalid("NON_FINITE: k[h=0,pos=17,i=5] NaN"),
        ),
    ])
    .await;
}

/// Begin, chunks, Commit and the end in wrong places.
#[tokio::test]
async fn shares_out_of_order() {
    let invalid = |text: &str| Refusal::invalid(text);
    let honest = share_frames();
    let with_commit = |chunks: u32, bytes: u64| [&honest[..4], &[commit(chunks, bytes)]].concat();
    let truncated = |chunks: u32, bytes: u32| {
        let text = format!("STREAM_TRUNCATED: {chunks} chunks, {bytes} of 2016 bytes, nothing applied");
        Refusal::new(Code::Aborted, text)
    };
    // Large enough to be still computing when the next frame arrives.
    let large = Draft::random(dims([1, 1, 2048, 4096, 64, 64]), 8);
    let mut late =
        vec![begin(proto::ComputeBegin { shape: large.begin.shape, tokens_per_cell: 512, ..share() })];
    for (tensor, bytes) in Tensor::ALL.into_iter().zip(&large.tensors) {
        for (at, data) in bytes.chunks(512 << 10).enumerate() {
            late.push(run(late.len() as u32 - 1, tensor, 0, at as u64 * (512 << 10), data.to_vec()));
        }
    }
    let chunks = late.len() as u32 - 1;
    late.extend([commit(chunks, large.total_bytes()), commit(chunks, large.total_bytes())]);
    refuse_all(vec![
        ("no frame at all", vec![], invalid("STREAM_ORDER: expected Begin")),
        ("chunk before Begin", honest[1..].to_vec(), invalid("STREAM_ORDER: expected Begin")),
        ("Commit before Begin", honest[4..].to_vec(), invalid("STREAM_ORDER: expected Begin")),
        ("a frame of nothing", vec![Frame { part: None }], invalid("STREAM_ORDER: empty frame")),
        ("second Begin", [&honest[..2], &honest[..1]].concat(), invalid("STREAM_ORDER: duplicate Begin")),
        ("Commit after Commit", late, invalid("STREAM_ORDER: frame after Commit")),
        (
            "Commit of more chunks",
            with_commit(4, 2016),
            invalid("CHUNK_ORDER: commit declares 4 chunks, got 3"),
        ),
        ("Commit of more bytes", with_commit(3, 2020), invalid("PAYLOAD_LENGTH: declared 2020, got 2016")),
        (
            "Commit before the end",
            [&honest[..2], &[commit(1, 96)]].concat(),
            invalid("PAYLOAD_LENGTH: shape needs 2016, payload 96"),
        ),
        ("the end after Begin", honest[..1].to_vec(), truncated(0, 0)),
        ("the end after Q", honest[..2].to_vec(), truncated(1, 96)),
        ("the end after K", honest[..3].to_vec(), truncated(2, 1376)),
        ("the end before Commit", honest[..4].to_vec(), truncated(3, 2016)),
    ])
    .await;
}

/// A coordinator that dies, after any number of frames.
#[tokio::test]
async fn shares_that_break_off() {
    let mut scene = Scene::open().await;
    worker(&scene).await;
    let to = scene.worker().await;
    let frames: Vec<Vec<u8>> = share_frames().iter().map(|frame| honest(&frame.encode_to_vec())).collect();
    for end in 1..frames.len() {
        for reset in [true, false] {
            let row =
                format!("{end} frames, then {}", if reset { "a reset" } else { "the connection is closed" });
            let mut request = OpenRequest::send(to, COMPUTE, &frames[..end].concat()).await;
            request.wait_for(scene.worker_has_begun()).await;
            if reset {
                request.reset().await;
            } else {
                request.hang_up();
            }
            scene.recovers_wholly(&row).await;
        }
    }
    scene.close().await;
}
