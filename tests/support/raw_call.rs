//! A call made with the generated client, frame by frame: what the client library would never send.

use std::sync::Arc;
use std::time::Duration;

use attnd_client::WorkerChoice;
use attnd_plan::Tensor;
use attnd_wire::{AttendReply, AttendRequest, Begin, Commit, Error, Link, TensorChunk, limits, proto};
use bytes::Bytes;
use rand::RngExt;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use tonic::Request;
use tonic::transport::Channel;

use super::cases::{Answer, Case};

/// A channel to a coordinator, opened with the first call.
pub(crate) fn channel(url: &str) -> Channel {
    limits::endpoint(url, Link::Client).expect("a URL").connect_lazy()
}

/// The first frame of a call.
pub(crate) fn begin(case: &Case, workers: WorkerChoice) -> Begin {
    let options = case.options(workers);
    Begin {
        shape: *case.shape(),
        dtype: case.operands.dtype,
        operator: Arc::new(case.operator()),
        outputs: None,
        sides: case.sides(),
        allow_non_finite: options.allow_non_finite,
        forbid_empty_rows: options.forbid_empty_rows,
        workers,
    }
}

/// The frames of a call: chunks of random sizes, from one element to `largest` elements, the three tensors interleaved
/// at random, after what travels beside them. In every second call the kv groups come in random order, and a chunk ends
/// with its group.
pub(crate) fn interleaved(
    case: &Case,
    workers: WorkerChoice,
    largest: usize,
    rng: &mut SmallRng,
) -> Vec<AttendRequest> {
    let size = case.operands.dtype.size();
    let operands = &case.operands;
    let shuffled = rng.random();
    let mut groups: Vec<usize> = (0..if shuffled { case.shape().n_groups() } else { 1 }).collect();
    groups.shuffle(rng);
    let mut left = Vec::new();
    for (tensor, bytes) in [(Tensor::Q, &operands.q), (Tensor::K, &operands.k), (Tensor::V, &operands.v)] {
        let run = bytes.len() / groups.len();
        // The last one is sent first.
        let runs: Vec<(usize, Bytes)> =
            groups.iter().map(|group| (group * run, bytes.slice(group * run..(group + 1) * run))).collect();
        left.push((tensor, runs));
    }
    let mut frames = vec![AttendRequest::Begin(begin(case, workers))];
    let mut commit = Commit { chunks: 0, bytes: 0 };
    // Mostly large chunks and a few very small ones: sizes are even over their logarithm.
    let elements = |rng: &mut SmallRng| {
        let of_largest = f64::from(rng.random_range(0.0..1.0_f32)) * (largest as f64).ln();
        (of_largest.exp() as usize).max(1)
    };
    for ((tensor, mut bytes), layout) in case.beside().into_iter().zip(case.sides().iter()) {
        while !bytes.is_empty() {
            let data = bytes.split_to((elements(rng) * layout.element().size()).min(bytes.len()));
            commit.bytes += data.len() as u64;
            let (index, tensor) = (commit.chunks, tensor.into());
            frames.push(AttendRequest::Chunk(TensorChunk { index, tensor, offset: None, data }));
            commit.chunks += 1;
        }
    }
    while !left.is_empty() {
        let which = rng.random_range(0..left.len());
        let (tensor, runs) = &mut left[which];
        let Some((offset, bytes)) = runs.last_mut() else {
            unreachable!("a tensor without a run is not left")
        };
        let data = bytes.split_to((elements(rng) * size).min(bytes.len()));
        let (tensor, start) = (*tensor, *offset);
        *offset += data.len();
        if bytes.is_empty() {
            runs.pop();
        }
        if runs.is_empty() {
            left.remove(which);
        }
        let offset = shuffled.then_some(start as u64);
        commit.bytes += data.len() as u64;
        frames.push(AttendRequest::Chunk(TensorChunk {
            index: commit.chunks,
            tensor: tensor.into(),
            offset,
            data,
        }));
        commit.chunks += 1;
    }
    frames.push(AttendRequest::Commit(commit));
    frames
}

/// Sends these frames and puts the answer together.
pub(crate) async fn send(channel: Channel, case: &Case, frames: Vec<AttendRequest>) -> Result<Answer, Error> {
    let exchange = async {
        let mut stub = limits::attention_client(channel);
        let frames = tokio_stream::iter(frames.into_iter().map(proto::AttendRequest::from));
        let mut replies = stub.attend(Request::new(frames)).await?.into_inner();
        let shape = case.shape();
        let (tokens, dim) = (shape.n_queries(), shape.value_dim());
        let rows = shape.batch() * shape.n_heads() * tokens;
        let mut answer = Answer { context: vec![f32::NAN; rows * dim], lse: vec![f32::NAN; rows] };
        let (mut planned, mut seen) = (0, 0);
        while let Some(reply) = replies.message().await? {
            match AttendReply::decode(reply, shape, None)? {
                AttendReply::Planned(_) => planned += 1,
                unasked @ (AttendReply::Elements(_) | AttendReply::Report(_) | AttendReply::Heat(_)) => {
                    panic!("nobody asked for {unasked:?}")
                }
                AttendReply::Context(chunk) => {
                    let n = chunk.tokens.len();
                    for (i, head) in chunk.heads.clone().enumerate() {
                        let row = head * tokens + chunk.tokens.start;
                        answer.lse[row..row + n].copy_from_slice(&chunk.lse[i * n..][..n]);
                        answer.context[row * dim..(row + n) * dim]
                            .copy_from_slice(&chunk.context[i * n * dim..][..n * dim]);
                        seen += n;
                    }
                }
                AttendReply::Done(done) => {
                    assert_eq!((planned, seen), (1, rows), "plans and rows before Done");
                    assert_eq!(done.empty_rows, case.empty_rows());
                    return Ok(answer);
                }
            }
        }
        panic!("the answer ends before Done");
    };
    tokio::time::timeout(Duration::from_secs(60), exchange).await.expect("an answer within a minute")
}
