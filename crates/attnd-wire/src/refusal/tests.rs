//! Every refusal has its exact text, code and outcome.

use attnd_kernel::slot::Node;
use attnd_plan::ReportError;
use tonic::Code;

use super::*;

const GOOD: Dims = Dims { batch: 1, heads: 8, kv_heads: 2, queries: 3, keys: 4, head_dim: 5, value_dim: 6 };

fn worker() -> WorkerId {
    WorkerId::new("w1").unwrap()
}

fn call(error: CallError<Error>) -> Error {
    error.into()
}

#[test]
fn shapes_are_refused_with_field_and_numbers() {
    let refused = |dims| shape(dims).unwrap_err().message();
    let max = u64::from(u32::MAX);
    for (dims, text) in [
        (Dims { batch: 0, ..GOOD }, "SHAPE_ZERO: batch"),
        (Dims { heads: 0, ..GOOD }, "SHAPE_ZERO: num_heads"),
        (Dims { kv_heads: 0, ..GOOD }, "SHAPE_ZERO: num_kv_heads"),
        (Dims { queries: 0, ..GOOD }, "SHAPE_ZERO: q_len"),
        (Dims { keys: 0, ..GOOD }, "SHAPE_ZERO: kv_len"),
        (Dims { head_dim: 0, ..GOOD }, "SHAPE_ZERO: head_dim"),
        (Dims { value_dim: 0, ..GOOD }, "SHAPE_ZERO: value_dim"),
        (Dims { heads: max, ..GOOD }, "SHAPE_LIMIT: num_heads 4294967295 > 1024"),
        (Dims { head_dim: 1025, ..GOOD }, "SHAPE_LIMIT: head_dim 1025 > 1024"),
        (Dims { batch: 129, ..GOOD }, "SHAPE_LIMIT: batch * num_heads 1032 > 1024"),
        (Dims { heads: 7, ..GOOD }, "GQA_RATIO: 7 % 2 != 0"),
        (Dims { batch: max, heads: max, queries: max, ..GOOD }, "SHAPE_OVERFLOW"),
        (Dims { kv_heads: max, keys: max, value_dim: max, ..GOOD }, "SHAPE_OVERFLOW"),
    ] {
        assert_eq!(refused(dims), text);
    }
    assert!(shape(GOOD).is_ok());
}

#[test]
fn refusals_have_their_exact_text_and_code() {
    let non_finite =
        |tensor, head, token, dim, value| non_finite(tensor, head, &NonFinite { token, dim, value });
    for (error, code, text) in [
        (expected_begin(), Code::InvalidArgument, "STREAM_ORDER: expected Begin"),
        (duplicate_begin(), Code::InvalidArgument, "STREAM_ORDER: duplicate Begin"),
        (
            stream_truncated(3, 3000, 8000),
            Code::Aborted,
            "STREAM_TRUNCATED: 3 chunks, 3000 of 8000 bytes, nothing applied",
        ),
        (stream_idle(Duration::from_secs(10)), Code::DeadlineExceeded, "STREAM_IDLE: 10000 ms"),
        (
            stalled(Duration::from_secs(10)),
            Code::DeadlineExceeded,
            "STREAM_IDLE: no reply taken for 10000 ms",
        ),
        (checksum(2), Code::Aborted, "CHECKSUM: chunk 2, nothing applied"),
        (shape_mismatch("q.d", 64, "k.d", 128), Code::InvalidArgument, "SHAPE_MISMATCH: q.d 64, k.d 128"),
        (scale(), Code::InvalidArgument, "SCALE: must be finite and at most 2.35e38 in size"),
        (
            non_finite(Tensor::K, 2, 17, 5, f32::NAN),
            Code::InvalidArgument,
            "NON_FINITE: k[h=2,pos=17,i=5] NaN",
        ),
        (
            non_finite(Tensor::V, 0, 3, 1, f32::INFINITY),
            Code::InvalidArgument,
            "NON_FINITE: v[h=0,pos=3,i=1] +inf",
        ),
        (
            non_finite(Tensor::Q, 1, 0, 0, f32::NEG_INFINITY),
            Code::InvalidArgument,
            "NON_FINITE: q[h=1,pos=0,i=0] -inf",
        ),
        (
            score_overflow(8, &ScoreOverflow { head_in_group: 1, token: 3 }),
            Code::InvalidArgument,
            "SCORE_OVERFLOW: head 9 row 3",
        ),
        (
            non_finite_bias([1, 0, 3, 700], f32::INFINITY),
            Code::InvalidArgument,
            "NON_FINITE: bias[b=1,h=0,pos=3,key=700] +inf",
        ),
        (
            not_bool([0, 2, 0, 9], 255),
            Code::InvalidArgument,
            "DTYPE: mask[b=0,h=2,pos=0,key=9] is 255, a bool is 0 or 1",
        ),
        (empty_row_at(5, 3), Code::InvalidArgument, "EMPTY_ROW: head 5 row 3 sees no key"),
        (output_overflow(0, 3), Code::InvalidArgument, "OUTPUT_OVERFLOW: head 0 row 3"),
        (empty_row(2), Code::InvalidArgument, "EMPTY_ROW: rows without a key: 2"),
        (kv_budget(33_554_432, 1_048_576), Code::ResourceExhausted, "KV_BUDGET: need 33554432, free 1048576"),
        (OutOfMemory { bytes: 7 }.into(), Code::ResourceExhausted, "KV_BUDGET: no memory for 7 bytes"),
        (overloaded(256), Code::ResourceExhausted, "OVERLOADED: 256 running"),
        (worker_lost(&worker(), "silent for 2 s"), Code::Unavailable, "WORKER_LOST: w1: silent for 2 s"),
        (
            older_coordinator("c1-f32", "c1-f32-op1"),
            Code::Internal,
            "REPLY_INVALID: the coordinator is older: it computes c1-f32, asked c1-f32-op1",
        ),
        (kernel_mix("c2", "c1-f32"), Code::FailedPrecondition, "KERNEL_MIX: c2, this node computes c1-f32"),
        (wire(8), Code::FailedPrecondition, "WIRE: 8 not in 1..7"),
    ] {
        assert_eq!((error.message().as_str(), error.reason.code()), (text, code));
    }
}

#[test]
fn errors_of_the_plan_are_translated() {
    let node = Node::ROOT;
    for (error, code, text) in [
        (PlanError::NoWorkers.into(), Code::Unavailable, "NO_WORKERS: no worker is alive"),
        (
            PlanError::TooFewWorkers { asked: 3, alive: 2 }.into(),
            Code::Unavailable,
            "NO_WORKERS: 3 workers asked for, 2 alive",
        ),
        (PlanError::NoneAsked.into(), Code::InvalidArgument, "WORKERS: 0 workers asked for"),
        (PlanError::Memory { need: 9, free: 4 }.into(), Code::ResourceExhausted, "KV_BUDGET: need 9, free 4"),
        (
            GatherError::UnknownCell { group: 1, node }.into(),
            Code::Internal,
            "COVERAGE: group 1 node 6/0 is in no share",
        ),
        (
            Rejection::Wire { got: 3, supported: 1..=2 }.into(),
            Code::FailedPrecondition,
            "WIRE: 3 not in 1..2",
        ),
        (Rejection::IdInUse.into(), Code::AlreadyExists, "WORKER_ID: in use"),
        (
            Rejection::IncarnationDead.into(),
            Code::FailedPrecondition,
            "INCARNATION_DEAD: rejoin with a new incarnation",
        ),
    ] {
        let error: Error = error;
        assert_eq!((error.message().as_str(), error.reason.code()), (text, code));
    }
    let kernel = Error::from(Rejection::Kernel { got: "c2".into(), expected: "c1".into() });
    assert_eq!((kernel.reason, kernel.reason.code()), (Reason::KernelMix, Code::FailedPrecondition));
}

#[test]
fn errors_of_a_call_are_translated() {
    for (error, code, text) in [
        (CallError::ExpectedBegin, Code::InvalidArgument, "STREAM_ORDER: expected Begin"),
        (CallError::DuplicateBegin, Code::InvalidArgument, "STREAM_ORDER: duplicate Begin"),
        (CallError::FrameAfterCommit, Code::InvalidArgument, "STREAM_ORDER: frame after Commit"),
        (
            CallError::StreamTruncated { chunks: 3, bytes: 3000, need: 8000 },
            Code::Aborted,
            "STREAM_TRUNCATED: 3 chunks, 3000 of 8000 bytes, nothing applied",
        ),
        (
            CallError::ChunkOrder { expected: 4, got: 6 },
            Code::InvalidArgument,
            "CHUNK_ORDER: expected 4, got 6",
        ),
        (
            CallError::ChunkPlace {
                index: 3,
                tensor: Tensor::K.into(),
                why: Misplaced::InsideOfGroup { start: 4100, group_bytes: 4096 },
            },
            Code::InvalidArgument,
            "CHUNK_ORDER: chunk 3 of k begins at byte 4100, inside of a kv group (4096 bytes each) that has not begun",
        ),
        (
            CallError::ChunkPlace {
                index: 3,
                tensor: Tensor::V.into(),
                why: Misplaced::PastTheEnd { bytes: 8192..9000, need: 8200 },
            },
            Code::InvalidArgument,
            "PAYLOAD_LENGTH: chunk 3 of v brings bytes 8192 to 9000 of 8200",
        ),
        (
            CallError::ChunkPlace {
                index: 2,
                tensor: SideTensor::Mask.into(),
                why: Misplaced::Jump { start: 9, expected: 8 },
            },
            Code::InvalidArgument,
            "CHUNK_ORDER: chunk 2 of mask begins at byte 9, expected 8",
        ),
        (
            CallError::SideFirst { index: 2, tensor: Tensor::Q.into(), first: SideTensor::Bias },
            Code::InvalidArgument,
            "CHUNK_ORDER: chunk 2 of q: all of bias comes first",
        ),
        (CallError::EmptyChunk { index: 5 }, Code::InvalidArgument, "PAYLOAD_LENGTH: chunk 5 has 0 bytes"),
        (
            CallError::PayloadLength { tensor: Tensor::K.into(), need: 4_398_046_511_104, got: 16 },
            Code::InvalidArgument,
            "PAYLOAD_LENGTH: shape needs 4398046511104, payload 16 (k)",
        ),
        (
            CallError::CommitLength { declared: 4096, got: 4000 },
            Code::InvalidArgument,
            "PAYLOAD_LENGTH: declared 4096, got 4000",
        ),
        (
            CallError::CommitChunks { declared: 8, got: 6 },
            Code::InvalidArgument,
            "CHUNK_ORDER: commit declares 8 chunks, got 6",
        ),
        (CallError::StreamIdle { idle_ms: 10_000 }, Code::DeadlineExceeded, "STREAM_IDLE: 10000 ms"),
    ] {
        let error = call(error);
        assert_eq!((error.message().as_str(), error.reason.code()), (text, code));
        assert!(!error.is_retryable(), "{error}");
    }
}

#[test]
fn a_failing_worker_is_lost_unless_the_data_are_to_blame() {
    let why = GatherError::Duplicate { group: 1, node: Node::ROOT, first_token: 16 };
    for (error, text) in [
        (CallError::WorkerLost { worker: worker() }, "WORKER_LOST: w1: lost"),
        (
            CallError::ShareIncomplete { worker: worker(), missing: 2 },
            "WORKER_LOST: w1: finished with 2 partials and reports missing",
        ),
        (
            CallError::PartialRefused { worker: worker(), why },
            "WORKER_LOST: w1: COVERAGE: group 1 node 6/0 tokens from 16 came twice",
        ),
        (
            CallError::ReportRefused {
                worker: worker(),
                why: ReportError::Early { group: 1, first_token: 16 },
            },
            "WORKER_LOST: w1: COVERAGE: group 1 tokens from 16 have not merged yet",
        ),
        (
            CallError::ReportUnasked { worker: worker() },
            "WORKER_LOST: w1: sent a report, the call has no outputs",
        ),
        (
            CallError::ShareFailed { worker: worker(), what: Error::new(Reason::Draining, "") },
            "WORKER_LOST: w1: DRAINING",
        ),
        (
            CallError::ShareFailed {
                worker: worker(),
                what: Error::new(Reason::ChunkOrder, "expected 4, got 6"),
            },
            "WORKER_LOST: w1: CHUNK_ORDER: expected 4, got 6",
        ),
        (
            CallError::ShareFailed { worker: worker(), what: kv_budget(9, 4) },
            "OVERLOADED: w1: KV_BUDGET: need 9, free 4",
        ),
    ] {
        let error = call(error);
        assert_eq!(error.message(), text);
        assert!(error.is_retryable(), "{error}");
    }
    for what in [output_overflow(0, 3), not_bool([0; 4], 2), non_finite_bias([0; 4], f32::NAN)] {
        assert_eq!(call(CallError::ShareFailed { worker: worker(), what: what.clone() }), what);
    }
}

#[test]
fn what_sessions_refuse_has_its_exact_text_and_code() {
    use attnd_kernel::Dtype;
    use attnd_plan::session::{ReplicaRefusal, SessionName};
    for (error, code, text) in [
        (
            SessionName::new("").unwrap_err().into(),
            Code::InvalidArgument,
            "SESSION_ID: 1..64 of [A-Za-z0-9._-]",
        ),
        (no_session(), Code::NotFound, "SESSION"),
        (session_differs(), Code::AlreadyExists, "SESSION_EXISTS: parameters differ"),
        (placement(2, 3), Code::FailedPrecondition, "PLACEMENT: 2 domains for R=3"),
        (seq_zero(), Code::InvalidArgument, "SEQ: must be >= 1"),
        (seq_gap(18, 20), Code::FailedPrecondition, "SEQ_GAP: expected 18, got 20"),
        (seq_reused(17), Code::AlreadyExists, "SEQ_REUSED: 17"),
        (seq_old(3, 954), Code::AlreadyExists, "SEQ_OLD: 3 < 954"),
        (length(128, 120), Code::FailedPrecondition, "LENGTH: committed 128, base_len 120"),
        (writer_fenced(3, 4), Code::FailedPrecondition, "WRITER_FENCED: writer_epoch 3 < 4"),
        (session_full(1_048_576, 1), Code::ResourceExhausted, "SESSION_FULL: 1048576 + 1"),
        (session_empty(), Code::FailedPrecondition, "SESSION_EMPTY"),
        (at_len(200, 128), Code::OutOfRange, "AT_LEN: 200 > 128"),
        (generation(4, 3), Code::FailedPrecondition, "GENERATION: session 4, request 3"),
        (fork_of_itself(), Code::InvalidArgument, "FORK: child equals parent"),
        (session_exists(), Code::AlreadyExists, "SESSION_EXISTS"),
        (fork_depth(64), Code::ResourceExhausted, "FORK_LIMIT: depth 64"),
        (fork_count(10_000), Code::ResourceExhausted, "FORK_LIMIT: 10000"),
        (session_expired(), Code::NotFound, "SESSION_EXPIRED"),
        (recovering(), Code::Unavailable, "RECOVERING"),
        (under_replicated(1, 2), Code::Unavailable, "UNDER_REPLICATED: 1 of 2"),
        (session_lost(96, 128), Code::DataLoss, "SESSION_LOST: prefix 96 of 128"),
        (sealed(), Code::FailedPrecondition, "SEALED"),
        (fenced(4, 5), Code::FailedPrecondition, "FENCED: term 4 < 5"),
        (epoch(7, 6), Code::Aborted, "EPOCH: shard at 7, request 6"),
        (no_shard(9, 2), Code::NotFound, "SHARD: 2 of session 9"),
        (
            dtype_mismatch(Dtype::Bf16, Dtype::F32),
            Code::FailedPrecondition,
            "DTYPE_MISMATCH: session bf16, got f32",
        ),
        (
            session_mismatch("heads", 32, 16),
            Code::InvalidArgument,
            "SHAPE_MISMATCH: session heads 32, got 16",
        ),
        (no_tokens(), Code::InvalidArgument, "SHAPE_ZERO: tokens"),
        (
            payload_length(Tensor::K, 1 << 42, 16),
            Code::InvalidArgument,
            "PAYLOAD_LENGTH: shape needs 4398046511104, payload 16 (k)",
        ),
        (rows_checksum("q"), Code::Aborted, "CHECKSUM: q, nothing applied"),
    ] {
        assert_eq!((error.message().as_str(), error.reason.code()), (text, code));
        assert_eq!(error.outcome, crate::Outcome::NotExecuted, "{text}");
    }
    // A replica's words are the same.
    for (of_replica, ours) in [
        (ReplicaRefusal::Fenced { term: 4, highest: 5 }, fenced(4, 5)),
        (ReplicaRefusal::Epoch { shard: 7, request: 6 }, epoch(7, 6)),
        (ReplicaRefusal::Generation { session: 4, request: 3 }, generation(4, 3)),
        (ReplicaRefusal::SeqGap { expected: 18, got: 20 }, seq_gap(18, 20)),
        (ReplicaRefusal::SeqReused { seq: 17 }, seq_reused(17)),
        (ReplicaRefusal::SeqOld { seq: 3, oldest: 954 }, seq_old(3, 954)),
        (ReplicaRefusal::Length { committed: 128, base_len: 120 }, length(128, 120)),
        (ReplicaRefusal::Full { committed: 1_048_576, tokens: 1 }, session_full(1_048_576, 1)),
        (ReplicaRefusal::AtLen { at_len: 200, len: 128 }, at_len(200, 128)),
        (ReplicaRefusal::NoTokens, no_tokens()),
    ] {
        assert_eq!(Error::from(of_replica), ours);
    }
    for passes in [recovering(), under_replicated(1, 2)] {
        assert_eq!(passes.pushback(), Some(Duration::from_millis(200)));
        assert!(passes.is_retryable());
    }
}
