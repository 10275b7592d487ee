//! One call as frames that can be bent, and its answer put together.

use attnd_kernel::reference::reference_row;
use attnd_kernel::{AttnShape, Causal, Dims, Dtype, widen};
use attnd_wire::proto::{self, attend_reply, attend_request};
use attnd_wire::{AttendReply, Status};
use bytes::Bytes;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_stream::Stream;
use tonic::transport::Channel;

pub(crate) type Frame = proto::AttendRequest;

/// A call before it is cut into frames. Everything can be changed.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) begin: proto::AttendBegin,
    /// Bytes of Q, K and V.
    pub(crate) tensors: [Vec<u8>; 3],
    /// Tensor bytes in one frame.
    pub(crate) chunk_bytes: usize,
}

/// A finished answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    /// `[heads over the batch, queries, value_dim]`.
    pub(crate) context: Vec<f32>,
    /// `[heads over the batch, queries]`.
    pub(crate) lse: Vec<f32>,
    pub(crate) empty_rows: u64,
}

/// Dimensions of one batch element: query heads, kv heads, queries, keys, head dim, value dim.
pub(crate) fn dims([heads, kv_heads, queries, keys, head_dim, value_dim]: [u32; 6]) -> proto::Shape {
    proto::Shape { batch: 1, heads, kv_heads, queries, keys, head_dim, value_dim, query_dim: 0 }
}

impl Draft {
    /// A call of f32 tensors with values in [-1, 1) that depend on `seed` alone.
    pub(crate) fn random(shape: proto::Shape, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut draft = Self::of_values(shape, Dtype::F32, |_, _| 0.0);
        for tensor in &mut draft.tensors {
            for element in tensor.as_chunks_mut().0 {
                *element = random.random_range(-1.0..1.0_f32).to_le_bytes();
            }
        }
        draft
    }

    /// A call whose element `i` of tensor `t` (0 is Q, 1 is K, 2 is V) is `value(t, i)`, rounded to `dtype`.
    pub(crate) fn of_values(shape: proto::Shape, dtype: Dtype, value: impl Fn(usize, usize) -> f32) -> Self {
        let n = |sizes: [u32; 4]| sizes.into_iter().map(|size| size as usize).product::<usize>();
        let proto::Shape { batch, heads, kv_heads, queries, keys, head_dim, value_dim, query_dim: _ } = shape;
        let elements = [
            n([batch, heads, queries, head_dim]),
            n([batch, kv_heads, keys, head_dim]),
            n([batch, kv_heads, keys, value_dim]),
        ];
        let begin = proto::AttendBegin {
            shape: Some(shape),
            dtype: proto::Dtype::from(dtype).into(),
            ..Default::default()
        };
        let bytes =
            |tensor: usize| (0..elements[tensor]).flat_map(|i| encode(value(tensor, i), dtype)).collect();
        Self { begin, tensors: [bytes(0), bytes(1), bytes(2)], chunk_bytes: 64 << 10 }
    }

    /// Asks for exactly this many workers.
    pub(crate) fn on_workers(mut self, n: u32) -> Self {
        (self.begin.max_workers, self.begin.force_workers) = (n, true);
        self
    }

    /// The same call with another Begin.
    pub(crate) fn with(&self, change: impl FnOnce(&mut proto::AttendBegin)) -> Self {
        let mut draft = self.clone();
        change(&mut draft.begin);
        draft
    }

    /// The same call with another shape in its Begin and the old tensors.
    pub(crate) fn with_shape(&self, change: impl FnOnce(&mut proto::Shape)) -> Self {
        self.with(|begin| change(begin.shape.as_mut().unwrap()))
    }

    pub(crate) fn shape(&self) -> AttnShape {
        let shape = self.begin.shape.unwrap();
        AttnShape::new(Dims {
            batch: shape.batch.into(),
            heads: shape.heads.into(),
            kv_heads: shape.kv_heads.into(),
            queries: shape.queries.into(),
            keys: shape.keys.into(),
            head_dim: shape.head_dim.into(),
            value_dim: shape.value_dim.into(),
        })
        .unwrap()
    }

    pub(crate) fn dtype(&self) -> Dtype {
        match self.begin.dtype() {
            proto::Dtype::F32 => Dtype::F32,
            proto::Dtype::F16 => Dtype::F16,
            proto::Dtype::Bf16 => Dtype::Bf16,
            proto::Dtype::Bool | proto::Dtype::Unspecified => panic!("operands have no such dtype"),
        }
    }

    /// Bytes of all three tensors.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.len() as u64).sum()
    }

    /// Begin, the chunks of Q, K and V one after the other, Commit.
    pub(crate) fn frames(&self) -> Vec<Frame> {
        let mut frames = vec![begin(self.begin.clone())];
        for (tensor, bytes) in
            [proto::Tensor::Q, proto::Tensor::K, proto::Tensor::V].iter().zip(&self.tensors)
        {
            for data in bytes.chunks(self.chunk_bytes) {
                frames.push(chunk(frames.len() as u32 - 1, *tensor, data));
            }
        }
        let chunks = frames.len() as u32 - 1;
        frames.push(commit(chunks, self.total_bytes()));
        frames
    }

    /// Panics unless every row of `answer` is within its bound of the f64 reference.
    pub(crate) fn check(&self, answer: &Answer) {
        let shape = self.shape();
        assert_eq!(self.begin.operator, None, "operators are not drafted");
        let causal = match self.begin.causal() {
            proto::Causal::None => Causal::None,
            proto::Causal::BottomRight => Causal::BottomRight,
            proto::Causal::TopLeft => Causal::TopLeft,
            rule @ (proto::Causal::Offset | proto::Causal::Aligned) => panic!("{rule:?} is not drafted"),
        };
        let scale = self.begin.scale.unwrap_or((1.0 / (shape.head_dim() as f64).sqrt()) as f32);
        let [q, k, v] = self.tensors.each_ref().map(|bytes| {
            let mut values = vec![f32::NAN; bytes.len() / self.dtype().size()];
            widen(bytes, self.dtype(), &mut values);
            values
        });
        for head in 0..shape.batch() * shape.n_heads() {
            for token in 0..shape.n_queries() {
                let row = head * shape.n_queries() + token;
                let context = &answer.context[row * shape.value_dim()..][..shape.value_dim()];
                let reference = reference_row(&shape, scale.into(), causal, (&q, &k, &v), head, token);
                let ratio = reference.worst_ratio(context, answer.lse[row]);
                assert!(ratio <= 1.0, "head {head} token {token} is off by {ratio} of its bound");
            }
        }
    }
}

/// Little-endian bytes of a value, rounded to `dtype`.
pub(crate) fn encode(value: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => value.to_le_bytes().into(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().into(),
        Dtype::Bf16 => bf16::from_f32(value).to_le_bytes().into(),
    }
}

pub(crate) fn begin(begin: proto::AttendBegin) -> Frame {
    Frame { part: Some(attend_request::Part::Begin(begin)) }
}

pub(crate) fn chunk(index: u32, tensor: proto::Tensor, data: &[u8]) -> Frame {
    let data = Bytes::copy_from_slice(data);
    let chunk = proto::TensorChunk { index, tensor: tensor.into(), crc32c: None, offset: None, data };
    Frame { part: Some(attend_request::Part::Chunk(chunk)) }
}

pub(crate) fn commit(chunks: u32, bytes: u64) -> Frame {
    Frame { part: Some(attend_request::Part::Commit(proto::Commit { chunks, bytes })) }
}

/// Changes the chunk in a frame.
pub(crate) fn edit_chunk(frame: &mut Frame, change: impl FnOnce(&mut proto::TensorChunk)) {
    match &mut frame.part {
        Some(attend_request::Part::Chunk(chunk)) => change(chunk),
        other => panic!("no chunk: {other:?}"),
    }
}

/// Sends frames and reads the answer to its end; `shape` is that of the answer, if there may be one.
pub(crate) async fn attend(
    channel: Channel,
    frames: impl Stream<Item = Frame> + Send + 'static,
    shape: Option<AttnShape>,
) -> Result<Answer, Status> {
    let mut replies = attnd_wire::limits::attention_client(channel).attend(frames).await?.into_inner();
    let (mut context, mut lse) = (Vec::new(), Vec::new());
    let mut seen = 0;
    if let Some(shape) = &shape {
        lse = vec![f32::NAN; shape.batch() * shape.n_heads() * shape.n_queries()];
        context = vec![f32::NAN; lse.len() * shape.value_dim()];
    }
    while let Some(reply) = replies.message().await? {
        let done = matches!(reply.part, Some(attend_reply::Part::Done(_)));
        let Some(shape) = &shape else {
            assert!(!done, "a call that must fail was answered");
            continue;
        };
        match AttendReply::decode(reply, shape, None).unwrap() {
            AttendReply::Planned(_) => {}
            unasked @ (AttendReply::Elements(_) | AttendReply::Report(_) | AttendReply::Heat(_)) => {
                panic!("nobody asked for {unasked:?}")
            }
            AttendReply::Context(rows) => {
                let (tokens, value_dim) = (rows.tokens.len(), shape.value_dim());
                for (at, head) in rows.heads.enumerate() {
                    let to = head * shape.n_queries() + rows.tokens.start;
                    lse[to..][..tokens].copy_from_slice(&rows.lse[at * tokens..][..tokens]);
                    context[to * value_dim..][..tokens * value_dim]
                        .copy_from_slice(&rows.context[at * tokens * value_dim..][..tokens * value_dim]);
                    seen += tokens;
                }
            }
            AttendReply::Done(done) => {
                assert_eq!(seen, lse.len(), "rows in the answer");
                return Ok(Answer { context, lse, empty_rows: done.empty_rows });
            }
        }
    }
    panic!("the answer ended without Done and without an error")
}
