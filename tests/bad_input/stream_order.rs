//! The order of frames: Begin, chunks, Commit, the end. And streams that break off anywhere.

use std::time::Duration;

use attnd_wire::{Status, limits, proto};
use prost::Message as _;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tonic::Code;

use super::call::{Draft, Frame, attend, begin, chunk, commit, dims, edit_chunk};
use super::http2::{ATTEND, OpenRequest, honest};
use super::scene::{Refusal, Scene, within};

/// 4032 bytes in 9 chunks: Q in one, K in five, V in three.
fn small() -> Draft {
    Draft { chunk_bytes: 512, ..Draft::random(dims([2, 2, 3, 40, 8, 4]), 3) }
}

/// Rows 16, 17 and 19 to 21 and 23: frames in the wrong place.
#[tokio::test]
async fn frames_out_of_order() {
    let mut scene = Scene::open().await;
    let honest = small().frames();
    let commit_at = honest.len() - 1;
    let edited = |at: usize, change: fn(&mut proto::TensorChunk)| {
        let mut frames = honest.clone();
        edit_chunk(&mut frames[at], change);
        frames
    };
    let committed = |chunks: u32, bytes: u64| {
        let mut frames = honest.clone();
        frames[commit_at] = commit(chunks, bytes);
        frames
    };
    let again = |at: usize, frame: usize| {
        let mut frames = honest.clone();
        frames.insert(at, honest[frame].clone());
        frames
    };
    let rows: Vec<(&str, Vec<Frame>, &str)> = vec![
        ("no frame at all", vec![], "STREAM_ORDER: expected Begin"),
        ("chunk before Begin", honest[1..].to_vec(), "STREAM_ORDER: expected Begin"),
        ("Commit before Begin", honest[commit_at..].to_vec(), "STREAM_ORDER: expected Begin"),
        ("a frame of nothing first", vec![Frame { part: None }], "STREAM_ORDER: empty frame"),
        (
            "a frame of nothing later",
            vec![honest[0].clone(), Frame { part: None }],
            "STREAM_ORDER: empty frame",
        ),
        ("second Begin at once", again(1, 0), "STREAM_ORDER: duplicate Begin"),
        ("second Begin after 3 chunks", again(4, 0), "STREAM_ORDER: duplicate Begin"),
        ("first chunk is 1", edited(1, |chunk| chunk.index = 1), "CHUNK_ORDER: expected 0, got 1"),
        ("chunk 4 says 6", edited(5, |chunk| chunk.index = 6), "CHUNK_ORDER: expected 4, got 6"),
        ("chunk 4 says 3", edited(5, |chunk| chunk.index = 3), "CHUNK_ORDER: expected 4, got 3"),
        (
            "chunk 4 says the largest",
            edited(5, |chunk| chunk.index = u32::MAX),
            "CHUNK_ORDER: expected 4, got 4294967295",
        ),
        ("chunk 3 comes twice", again(5, 4), "CHUNK_ORDER: expected 4, got 3"),
        (
            "chunk 2 leaves a gap",
            edited(3, |chunk| chunk.offset = Some(516)),
            "CHUNK_ORDER: chunk 2 of k begins at byte 516, expected 512, the next one of a kv group that has begun",
        ),
        (
            "chunk 1 begins in the middle",
            edited(2, |chunk| chunk.offset = Some(4)),
            "CHUNK_ORDER: chunk 1 of k begins at byte 4, inside of a kv group (1280 bytes each) that has not begun",
        ),
        (
            "K comes in another order than Q",
            edited(2, |chunk| chunk.offset = Some(1280)),
            "CHUNK_ORDER: chunk 1 of k begins kv group 1, expected 0: the groups come in one order in all tensors",
        ),
        (
            "chunk 2 ends behind the tensor",
            edited(3, |chunk| chunk.offset = Some(2560)),
            "PAYLOAD_LENGTH: chunk 2 of k brings bytes 2560 to 3072 of 2560",
        ),
        (
            "chunk 2 has no bytes",
            edited(3, |chunk| chunk.data.clear()),
            "PAYLOAD_LENGTH: chunk 2 has 0 bytes",
        ),
        ("Commit of more bytes", committed(9, 4096), "PAYLOAD_LENGTH: declared 4096, got 4032"),
        ("Commit of fewer bytes", committed(9, 4028), "PAYLOAD_LENGTH: declared 4028, got 4032"),
        ("Commit of more chunks", committed(10, 4032), "CHUNK_ORDER: commit declares 10 chunks, got 9"),
        ("Commit of fewer chunks", committed(8, 4032), "CHUNK_ORDER: commit declares 8 chunks, got 9"),
    ];
    for (row, frames, text) in rows {
        scene.refuses(row, frames, &Refusal::invalid(text)).await;
    }
    for at in [0, 2, 8] {
        let mut frames = honest.clone();
        edit_chunk(&mut frames[at + 1], |chunk| chunk.crc32c = Some(0xdead_beef));
        let refusal = Refusal::new(Code::Aborted, format!("CHECKSUM: chunk {at}, nothing applied"));
        scene.refuses("wrong checksum", frames, &refusal).await;
    }
    // Large enough to be still computing when the frame arrives.
    let large = Draft { chunk_bytes: 512 << 10, ..Draft::random(dims([2, 2, 4096, 4096, 64, 64]), 4) };
    let frames = large.frames();
    let chunks = frames.len() as u32 - 2;
    for (row, late) in [
        ("chunk after Commit", chunk(chunks, proto::Tensor::V, &[0; 4])),
        ("Commit after Commit", commit(chunks, large.total_bytes())),
    ] {
        let frames = [frames.clone(), vec![late]].concat();
        scene.refuses(row, frames, &Refusal::invalid("STREAM_ORDER: frame after Commit")).await;
    }
    scene.close().await;
}

/// Row 18: the stream ends after any number of chunks, but without Commit.
#[tokio::test]
async fn streams_that_end_without_commit() {
    let mut scene = Scene::open().await;
    let frames = small().frames();
    let mut bytes = 0;
    for end in 1..frames.len() {
        let sent = frames[..end].to_vec();
        if let Some(proto::attend_request::Part::Chunk(chunk)) = &sent[end - 1].part {
            bytes += chunk.data.len();
        }
        let chunks = end - 1;
        let text = format!("STREAM_TRUNCATED: {chunks} chunks, {bytes} of 4032 bytes, nothing applied");
        scene.refuses(&text, sent, &Refusal::new(Code::Aborted, text.clone())).await;
    }
    scene.close().await;
}

/// Row 18, harder: the stream is reset, or its connection closed, after any number of frames. Nobody is left to hear
/// the error, and nothing may count as a finished call.
#[tokio::test]
async fn streams_that_break_off() {
    let mut scene = Scene::open().await;
    let frames: Vec<Vec<u8>> = small().frames().iter().map(|frame| honest(&frame.encode_to_vec())).collect();
    for end in 1..frames.len() {
        for reset in [true, false] {
            let row =
                format!("{end} frames, then {}", if reset { "a reset" } else { "the connection is closed" });
            let (finished, failed) = scene.calls_ended().await;
            let mut request = OpenRequest::send(scene.coordinator(), ATTEND, &frames[..end].concat()).await;
            request.wait_for(scene.call_has_begun()).await;
            if reset {
                request.reset().await;
            } else {
                request.hang_up();
            }
            scene.recovers_wholly(&row).await;
            // One good call more.
            assert_eq!(scene.calls_ended().await, (finished + 1, failed + 1), "{row}: calls that ended");
        }
    }
    scene.close().await;
}

/// Row 22: ten seconds of silence, at once before Begin, after Begin and after a chunk, at either port.
#[tokio::test]
async fn streams_that_fall_silent() {
    let mut scene = Scene::open().await;
    let frames = small().frames();
    let silent = |sent: &[Frame]| tokio_stream::iter(sent.to_vec()).chain(tokio_stream::pending());
    let worker = format!("http://{}", scene.worker().await);
    let worker = limits::endpoint(&worker, limits::Link::Cluster).unwrap().connect_lazy();
    let compute = async {
        let silent = tokio_stream::pending::<proto::ComputeRequest>();
        let mut replies = limits::worker_client(worker).compute(silent).await?.into_inner();
        replies.message().await.map(drop)
    };
    let calls = async {
        tokio::join!(
            attend(scene.channel(), silent(&[]), None),
            attend(scene.channel(), silent(&frames[..1]), None),
            attend(scene.channel(), silent(&frames[..3]), None),
            compute,
        )
    };
    let begun = Instant::now();
    let (none, begin_only, two_chunks, of_worker) = within("silence", calls).await;
    let waited = begun.elapsed();
    let refusal = Refusal::new(Code::DeadlineExceeded, "STREAM_IDLE: 10000 ms");
    let statuses: [(&str, Result<_, Status>); 4] = [
        ("before Begin", none.map(drop)),
        ("after Begin", begin_only.map(drop)),
        ("after 2 chunks", two_chunks.map(drop)),
        ("before Begin, at a worker", of_worker),
    ];
    for (row, status) in statuses {
        refusal.check(row, &status.unwrap_err());
    }
    assert!(waited >= Duration::from_secs(10) && waited < Duration::from_secs(13), "waited {waited:?}");
    scene.recovers_wholly("silence").await;
    scene.close().await;
}

/// Frames may come in any order of tensors, and one byte-wise smallest chunk at a time.
#[tokio::test]
async fn orders_that_are_allowed() {
    let mut scene = Scene::open().await;
    let draft = small();
    let whole = scene.accepts("nine chunks", &draft).await;
    let smallest = Draft { chunk_bytes: 4, ..draft.clone() };
    let single = scene.accepts("one element at a time", &smallest).await;
    assert!(single == whole, "the cut of the chunks shows in the bits");
    let mut index = 0..;
    let mut reversed = vec![begin(draft.begin.clone())];
    for (tensor, bytes) in
        [proto::Tensor::V, proto::Tensor::K, proto::Tensor::Q].into_iter().zip(draft.tensors.iter().rev())
    {
        reversed.extend(bytes.chunks(100 * 4).map(|data| chunk(index.next().unwrap(), tensor, data)));
    }
    reversed.push(commit(index.next().unwrap(), draft.total_bytes()));
    let call = attend(scene.channel(), tokio_stream::iter(reversed), Some(draft.shape()));
    let reversed = within("v, k, q", call).await.unwrap();
    assert!(reversed == whole, "the order of the tensors shows in the bits");
    scene.recovers("v, k, q").await;
    scene.close().await;
}
