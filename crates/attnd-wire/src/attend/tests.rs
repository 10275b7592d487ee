//! Every value returns from its message; nothing a peer sends panics or passes unchecked.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Causal, Dtype, EmptyRow, Operator};
use attnd_plan::{Piece, Plan, Sides, Tensor, WorkerChoice, WorkerId};
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::error::Reason;
use crate::operator::dense::tests::operators_and_sides;
use crate::proto;

pub(crate) fn shapes() -> impl Strategy<Value = AttnShape> {
    (1..3_u64, 1..4_u64, 1..4_u64, 1..20_u64, 1..3000_u64, 1..9_u64, 1..9_u64).prop_map(
        |(batch, kv_heads, group, queries, keys, head_dim, value_dim)| {
            let heads = kv_heads * group;
            let dims = attnd_kernel::Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim };
            AttnShape::new(dims).unwrap()
        },
    )
}

pub(crate) fn dtypes() -> impl Strategy<Value = Dtype> {
    proptest::sample::select(&[Dtype::F32, Dtype::F16, Dtype::Bf16][..])
}

pub(crate) fn tensors() -> impl Strategy<Value = Tensor> {
    proptest::sample::select(&Tensor::ALL[..])
}

fn begins() -> impl Strategy<Value = Begin> {
    let workers = prop_oneof![
        Just(WorkerChoice::Auto),
        (1..5_usize).prop_map(WorkerChoice::AtMost),
        (1..5_usize).prop_map(WorkerChoice::Exactly)
    ];
    (operators_and_sides(), dtypes(), any::<[bool; 2]>(), workers).prop_map(
        |((shape, operator, sides), dtype, [allow_non_finite, forbid], workers)| Begin {
            shape,
            dtype,
            forbid_empty_rows: forbid && operator.empty_row() == EmptyRow::Zero,
            operator,
            outputs: None,
            sides,
            allow_non_finite,
            workers,
        },
    )
}

fn context() -> ContextChunk {
    ContextChunk { heads: 2..4, tokens: 1..4, lse: vec![f32::NEG_INFINITY; 6], context: vec![0.5; 12] }
}

/// 6 heads, 5 tokens, value_dim 2.
fn shape() -> AttnShape {
    let dims = attnd_kernel::Dims {
        batch: 1,
        heads: 6,
        kv_heads: 3,
        queries: 5,
        keys: 300,
        head_dim: 4,
        value_dim: 2,
    };
    AttnShape::new(dims).unwrap()
}

fn begin() -> Begin {
    Begin {
        shape: shape(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::plain(0.5, Causal::None)),
        outputs: None,
        sides: Sides::default(),
        allow_non_finite: false,
        forbid_empty_rows: false,
        workers: WorkerChoice::Auto,
    }
}

fn refused_begin(change: impl FnOnce(&mut proto::AttendBegin)) -> String {
    let mut message = proto::AttendBegin::from(begin());
    change(&mut message);
    Begin::try_from(message).unwrap_err().message()
}

fn refused_context(change: impl FnOnce(&mut proto::ContextChunk)) -> String {
    let mut message = proto::ContextChunk::from(context());
    change(&mut message);
    ContextChunk::decode(message, &shape()).unwrap_err().message()
}

#[test]
fn each_field_of_a_begin_is_checked() {
    assert_eq!(refused_begin(|b| b.shape = None), "SHAPE_ZERO: batch");
    assert_eq!(refused_begin(|b| b.shape.as_mut().unwrap().heads = 7), "GQA_RATIO: 7 % 3 != 0");
    assert_eq!(refused_begin(|b| b.dtype = 99), "DTYPE: 99");
    assert_eq!(
        refused_begin(|b| b.scale = Some(f32::NAN)),
        "SCALE: must be finite and at most 2.35e38 in size"
    );
    assert_eq!(refused_begin(|b| b.causal = 9), "CAUSAL: 9");
    assert_eq!(refused_begin(|b| b.force_workers = true), "WORKERS: 0 workers asked for");
}

#[test]
fn an_absent_scale_is_one_over_the_root_of_the_dimension() {
    let mut message = proto::AttendBegin::from(begin());
    message.scale = None;
    assert_eq!(Begin::try_from(message).unwrap().operator.scale(), 0.5);
}

#[test]
fn asking_for_at_most_no_worker_is_not_auto() {
    let message = proto::AttendBegin::from(Begin { workers: WorkerChoice::AtMost(0), ..begin() });
    assert_eq!(Begin::try_from(message).unwrap_err().message(), "WORKERS: 0 workers asked for");
}

#[test]
fn frames_come_in_order() {
    let chunk = AttendRequest::Chunk(TensorChunk {
        index: 0,
        tensor: Tensor::Q.into(),
        offset: None,
        data: vec![0; 8].into(),
    });
    let commit = AttendRequest::Commit(Commit { chunks: 1, bytes: 8 });
    for request in [&chunk, &commit] {
        let error = AttendRequest::decode(request.clone().into(), None).unwrap_err();
        assert_eq!(error.message(), "STREAM_ORDER: expected Begin");
        assert_eq!(AttendRequest::decode(request.clone().into(), Some(&begin())).as_ref(), Ok(request));
    }
    let again = AttendRequest::decode(AttendRequest::Begin(begin()).into(), Some(&begin())).unwrap_err();
    assert_eq!(again.message(), "STREAM_ORDER: duplicate Begin");
    for begun in [None, Some(&begin())] {
        let error = AttendRequest::decode(proto::AttendRequest { part: None }, begun).unwrap_err();
        assert_eq!(error.message(), "STREAM_ORDER: empty frame");
    }
}

#[test]
fn damaged_chunks_are_found() {
    let decode = |message| TensorChunk::decode(message, Dtype::F32, &Sides::default());
    let chunk =
        TensorChunk { index: 2, tensor: Tensor::V.into(), offset: Some(8192), data: vec![1; 4096].into() };
    let mut message = proto::TensorChunk::from(chunk.clone());
    assert_eq!(decode(message.clone()), Ok(chunk));
    for offset in [Some(4096), None] {
        let moved = proto::TensorChunk { offset, ..message.clone() };
        let error = decode(moved).unwrap_err();
        assert_eq!(error.message(), "CHECKSUM: chunk 2, nothing applied", "the place counts as data does");
    }
    message.data = vec![2; 4096].into();
    let error = decode(message.clone()).unwrap_err();
    assert_eq!(error.message(), "CHECKSUM: chunk 2, nothing applied");
    message.tensor = 99;
    assert_eq!(decode(message.clone()).unwrap_err().message(), "TENSOR: 99");
    message.tensor = proto::Tensor::Mask.into();
    assert_eq!(decode(message).unwrap_err().message(), "TENSOR: mask, and Begin has no mask.dense");
}

#[test]
fn context_fits_the_call() {
    let place = "context of heads 2+2 tokens 1+3";
    assert_eq!(
        refused_context(|c| c.heads = 5),
        "REPLY_INVALID: context of heads 2+5 tokens 1+3: outside of 6 heads, 5 tokens"
    );
    assert_eq!(
        refused_context(|c| c.first_token = u32::MAX),
        "REPLY_INVALID: context of heads 2+2 tokens 4294967295+3: outside of 6 heads, 5 tokens"
    );
    assert_eq!(
        refused_context(|c| c.tokens = 0),
        "REPLY_INVALID: context of heads 2+2 tokens 1+0: outside of 6 heads, 5 tokens"
    );
    assert_eq!(
        refused_context(|c| c.lse = c.lse.slice(4..)),
        format!("REPLY_INVALID: {place}: needs 24 + 48 bytes, got 20 + 48")
    );
    assert_eq!(refused_context(|c| c.crc32c ^= 1), format!("CHECKSUM: {place}"));
}

#[test]
fn replies_must_make_sense() {
    let done = proto::Done {
        timings: Some(proto::Timings { merge: -1.0, ..Default::default() }),
        ..Default::default()
    };
    assert_eq!(Done::try_from(done).unwrap_err().message(), "REPLY_INVALID: timings.merge -1");
    let planned = proto::Planned { predicted_seconds: f64::NAN, ..Default::default() };
    let error = PlanSummary::decode(planned, &shape()).unwrap_err();
    assert_eq!(error.message(), "REPLY_INVALID: predicted_seconds NaN");
    let share = proto::Share { worker_id: "a b".into(), ..Default::default() };
    let planned = proto::Planned { shares: vec![share], ..Default::default() };
    assert_eq!(PlanSummary::decode(planned, &shape()).unwrap_err().reason, Reason::ReplyInvalid);
    let error = AttendReply::decode(proto::AttendReply { part: None }, &shape(), None).unwrap_err();
    assert_eq!(error.message(), "REPLY_INVALID: empty frame");
}

#[test]
fn a_plan_is_summarised() {
    let piece = Piece { groups: 0..3, slots: 0..64 };
    let share = attnd_plan::Share {
        worker: WorkerId::new("w1").unwrap(),
        pieces: vec![piece.clone()],
        kv_bytes: 9,
        resident_bytes: 10,
    };
    let plan = Plan {
        shares: vec![share],
        tokens_per_cell: 5,
        reason: "one\nline".into(),
        predicted_seconds: 0.25,
        sent_bytes: 0,
    };
    let summary = PlanSummary::new(&plan, "c1-f32-op1");
    let decoded = PlanSummary::decode(summary.into(), &shape()).unwrap();
    assert_eq!((decoded.reason.as_str(), decoded.kernel_id.as_str()), ("one\\nline", "c1-f32-op1"));
    assert_eq!(
        decoded.shares,
        [ShareSummary { worker: WorkerId::new("w1").unwrap(), pieces: vec![piece], kv_bytes: 9 }]
    );
}

proptest! {
    #[test]
    fn begins_return(begin in begins()) {
        let request = AttendRequest::Begin(begin);
        prop_assert_eq!(AttendRequest::decode(request.clone().into(), None), Ok(request));
    }

    #[test]
    fn chunks_return(index in any::<u32>(), tensor in tensors(), offset in any::<Option<u64>>(), dtype in dtypes(), data in proptest::collection::vec(any::<[u8; 4]>(), 1..50)) {
        let chunk = TensorChunk { index, tensor: tensor.into(), offset, data: data.concat().into() };
        prop_assert_eq!(TensorChunk::decode(chunk.clone().into(), dtype, &Sides::default()), Ok(chunk));
    }

    #[test]
    fn replies_return(shape in shapes(), seconds in any::<[u32; 7]>(), counts in any::<[u64; 2]>(), words in "[ -~]{0,200}") {
        let [plan, scatter, compute, gather, merge, total, predicted_seconds] = seconds.map(|s| f64::from(s) / 1e3);
        let timings = Timings { plan, scatter, compute, gather, merge, total };
        let [empty_rows, kv_bytes] = counts;
        let piece = Piece { groups: 0..shape.n_groups(), slots: 3..64 };
        let share = ShareSummary { worker: WorkerId::new("w").unwrap(), pieces: vec![piece], kv_bytes };
        let heads = 0..shape.n_heads();
        let tokens = shape.n_queries() - 1..shape.n_queries();
        let rows = heads.len();
        let context = ContextChunk { heads, tokens, lse: vec![1.5; rows], context: vec![-0.0; rows * shape.value_dim()] };
        for reply in [
            AttendReply::Planned(PlanSummary { shares: vec![share], reason: words.clone(), predicted_seconds, kernel_id: words.clone() }),
            AttendReply::Context(context),
            AttendReply::Done(Done { empty_rows, timings, kernel_id: words }),
        ] {
            prop_assert_eq!(AttendReply::decode(reply.clone().into(), &shape, None), Ok(reply));
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), began in any::<bool>()) {
        let begin = begin();
        if let Ok(message) = proto::AttendRequest::decode(&bytes[..]) {
            let _either = AttendRequest::decode(message, began.then_some(&begin));
        }
        if let Ok(message) = proto::AttendReply::decode(&bytes[..]) {
            let _either = AttendReply::decode(message, &begin.shape, None);
        }
    }

    #[test]
    fn no_context_panics(
        first_head in 0..9_u32, heads in any::<u32>(), first_token in 0..9_u32, tokens in 0..9_u32,
        lse in 0..60_usize, context in 0..60_usize,
    ) {
        let heads = if heads % 2 == 0 { heads } else { heads % 9 };
        let message = proto::ContextChunk {
            first_head, heads, first_token, tokens, crc32c: 0, lse: vec![0; lse].into(), context: vec![0; context].into(),
        };
        let _either = ContextChunk::decode(message, &shape());
    }
}
