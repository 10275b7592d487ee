//! Every value returns from its message; each way to be wrong has its text.

use std::time::Duration;

use attnd_kernel::{Bias, Causal, Dims, Dtype, EmptyRow, Operator, OperatorParts, Storage};
use attnd_plan::session::{SessionName, SessionSpec};
use attnd_plan::{Piece, Tensor, WorkerId};
use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::attend::{Commit, ContextChunk};
use crate::error::{Error, Outcome, Reason};
use crate::proto;

pub(crate) fn spec() -> SessionSpec {
    SessionSpec {
        layers: 3,
        heads: 8,
        kv_heads: 2,
        head_dim: 4,
        value_dim: 2,
        dtype: Dtype::F32,
        storage: Storage::F32,
        value_is_key_prefix: false,
        replicas: 2,
        acks: 2,
        ttl: Duration::from_secs(600),
        max_tokens: 1 << 20,
        allow_same_host: false,
    }
}

fn session() -> SessionName {
    SessionName::new("chat-7").unwrap()
}

fn mutation() -> Mutation {
    Mutation { writer_epoch: 3, op_seq: 9 }
}

fn bytes(len: usize) -> Bytes {
    (0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>().into()
}

fn rows() -> StepRows {
    StepRows { base_len: Some(5), ..StepRows::new(mutation(), 3, bytes(2 * 3 * 16), bytes(2 * 3 * 8)) }
}

fn queries() -> StepQueries {
    let operator = QueryOperator::from(&Operator::plain(0.25, Causal::BottomRight));
    StepQueries {
        at_len: Some(8),
        min_len: 7,
        min_len_generation: 2,
        ..StepQueries::new(3, Dtype::F32, bytes(8 * 3 * 16), operator)
    }
}

fn step() -> Step {
    Step { session: session(), layer: 2, rows: Some(rows()), queries: Some(queries()) }
}

/// Through bytes and back, as a peer sees it.
fn sent<M: prost::Message + Default>(message: M) -> M {
    M::decode(&message.encode_to_vec()[..]).unwrap()
}

fn asked(ask: Ask) -> Asked {
    let request = SessionRequest { request: 4, timeout: Duration::from_millis(1500), ask };
    SessionRequest::decode(sent(request.into()))
}

/// What is wrong with a frame.
fn refused(ask: proto::session_request::Ask) -> String {
    let message = proto::SessionRequest { request: 1, timeout_ms: 0, ask: Some(ask) };
    SessionRequest::decode(message).ask.unwrap_err().message()
}

fn refused_step(change: impl FnOnce(&mut proto::Step)) -> String {
    let mut message = proto::Step::from(step());
    change(&mut message);
    Step::try_from(message).unwrap_err().message()
}

fn refused_spec(change: impl FnOnce(&mut proto::SessionSpec)) -> String {
    let mut message = proto::SessionSpec::from(&spec());
    change(&mut message);
    decode_spec(message).unwrap_err().message()
}

#[test]
fn every_request_returns() {
    let k = AppendChunk::new(2, Tensor::V, 64, bytes(24));
    let whole = Append {
        session: session(),
        mutation: mutation(),
        layer: 1,
        tokens: 5000,
        base_len: None,
        allow_non_finite: true,
        shape: RowShape { dtype: Some(Dtype::Bf16), heads: Some(2), head_dim: None, value_dim: Some(2) },
        crc32c: 77,
    };
    let change = |kind| Ask::Change(Change { session: session(), mutation: mutation(), kind });
    let child = Some(SessionName::new("c").unwrap());
    for ask in [
        Ask::Open(Open { name: None, spec: Some(spec()), write: true }),
        Ask::Open(Open { name: Some(session()), spec: None, write: false }),
        Ask::Append(whole),
        Ask::Chunk(AppendChunk { offset: None, ..k.clone() }),
        Ask::Chunk(k),
        Ask::Commit(Commit { chunks: 3, bytes: 4 }),
        change(ChangeKind::Truncate { len: 0 }),
        change(ChangeKind::Fork { child }),
        change(ChangeKind::Fork { child: None }),
        change(ChangeKind::Seal),
        Ask::Describe(session()),
        Ask::List,
        Ask::GiveUp,
        Ask::Close(session()),
    ] {
        let message = proto::SessionRequest::from(SessionRequest {
            request: 4,
            timeout: Duration::from_millis(1500),
            ask: ask.clone(),
        });
        let again = SessionRequest::decode(sent(message.clone()));
        assert_eq!((again.request, again.timeout), (4, Duration::from_millis(1500)));
        assert!(again.ask.is_ok(), "{ask:?}: {again:?}");
        assert_eq!(format!("{:?}", again.ask.unwrap()), format!("{ask:?}"));
    }
}

#[test]
fn a_step_returns_and_its_tensors_are_slices_of_the_message() {
    let steps = [step(), Step { rows: None, ..step() }, Step { queries: None, ..step() }];
    let again = asked(Ask::Steps(steps.to_vec())).ask.unwrap();
    let Ask::Steps(again) = again else { panic!("{again:?}") };
    assert_eq!(again.into_iter().collect::<Result<Vec<_>, _>>().unwrap(), steps);

    let message = Bytes::from(proto::Step::from(step()).encode_to_vec());
    let decoded = Step::try_from(proto::Step::decode(message.clone()).unwrap()).unwrap();
    let inside = |part: &Bytes| message.as_ptr_range().contains(&part.as_ptr());
    let rows = decoded.rows.unwrap();
    assert!(inside(&rows.k) && inside(&rows.v) && inside(&decoded.queries.unwrap().q));
}

#[test]
fn no_time_is_thirty_seconds_and_none_is_sent_as_none() {
    let decoded = SessionRequest::decode(proto::SessionRequest::default());
    assert_eq!((decoded.timeout, decoded.request), (Duration::from_secs(30), 0));
    assert_eq!(decoded.ask.unwrap_err().message(), "STREAM_ORDER: empty frame");
    let request = SessionRequest { request: 1, timeout: Duration::from_micros(10), ask: Ask::List };
    assert_eq!(proto::SessionRequest::from(request).timeout_ms, 1);
}

#[test]
fn a_wrong_step_is_wrong_by_itself() {
    let mut steps = proto::SessionSteps { steps: vec![proto::Step::from(step()); 3] };
    steps.steps[1].session = "a b".into();
    let message =
        proto::SessionRequest { ask: Some(proto::session_request::Ask::Steps(steps)), ..Default::default() };
    let Ok(Ask::Steps(steps)) = SessionRequest::decode(message).ask else { panic!("no steps") };
    assert_eq!(steps.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
    let steps = |n| {
        proto::session_request::Ask::Steps(proto::SessionSteps { steps: vec![proto::Step::default(); n] })
    };
    assert_eq!(refused(steps(32_768)), "COUNT: steps 32768 > 1024");
    assert_eq!(refused(steps(0)), "COUNT: steps 0");
}

#[test]
fn each_field_of_a_step_is_checked() {
    const ID: &str = "SESSION_ID: 1..64 of [A-Za-z0-9._-]";
    for name in ["", &"x".repeat(65), "a\u{1b}", "a\0"] {
        assert_eq!(refused_step(|step| step.session = name.to_owned()), ID);
    }
    assert_eq!(
        refused_step(|step| (step.rows, step.queries) = (None, None)),
        "COMBINATION: step without rows and queries"
    );
    let rows = |change: fn(&mut proto::StepRows)| refused_step(|step| change(step.rows.as_mut().unwrap()));
    assert_eq!(rows(|rows| rows.mutation = None), "SEQ: must be >= 1");
    assert_eq!(rows(|rows| rows.tokens = 0), "SHAPE_ZERO: tokens");
    assert_eq!(rows(|rows| rows.crc32c ^= 1), "CHECKSUM: k and v, nothing applied");
    assert_eq!(rows(|rows| rows.v = bytes(3)), "CHECKSUM: k and v, nothing applied");
    let shape = proto::RowShape { dtype: 99, ..Default::default() };
    assert_eq!(refused_step(|step| step.rows.as_mut().unwrap().shape = Some(shape)), "DTYPE: 99");
    let queries =
        |change: fn(&mut proto::StepQueries)| refused_step(|step| change(step.queries.as_mut().unwrap()));
    assert_eq!(queries(|queries| queries.tokens = 0), "SHAPE_ZERO: q_len");
    assert_eq!(queries(|queries| queries.dtype = 0), "DTYPE: 0");
    assert_eq!(queries(|queries| queries.crc32c ^= 1), "CHECKSUM: q, nothing applied");
}

#[test]
fn rows_must_be_those_of_the_session() {
    let (spec, layer) = (spec(), 2);
    assert_eq!(rows().check(layer, &spec), Ok(()));
    let refused = |change: &dyn Fn(&mut StepRows)| {
        let mut changed = rows();
        change(&mut changed);
        changed.check(layer, &spec).unwrap_err().message()
    };
    assert_eq!(rows().check(3, &spec).unwrap_err().message(), "SHAPE_LIMIT: layer 3 of 3");
    let said = |shape: RowShape| refused(&|rows| rows.shape = shape);
    let none = RowShape::default();
    assert_eq!(said(RowShape { dtype: Some(Dtype::Bf16), ..none }), "DTYPE_MISMATCH: session f32, got bf16");
    assert_eq!(said(RowShape { heads: Some(8), ..none }), "SHAPE_MISMATCH: session kv_heads 2, got 8");
    assert_eq!(said(RowShape { head_dim: Some(5), ..none }), "SHAPE_MISMATCH: session head_dim 4, got 5");
    assert_eq!(said(RowShape { value_dim: Some(4), ..none }), "SHAPE_MISMATCH: session value_dim 2, got 4");
    assert_eq!(refused(&|rows| rows.tokens = 2), "PAYLOAD_LENGTH: shape needs 64, payload 96 (k)");
    assert_eq!(refused(&|rows| rows.v = Bytes::new()), "PAYLOAD_LENGTH: shape needs 48, payload 0 (v)");
    assert_eq!(
        refused(&|rows| rows.tokens = u32::MAX as usize),
        "PAYLOAD_LENGTH: shape needs 137438953440, payload 96 (k)"
    );
    let latent = SessionSpec { value_is_key_prefix: true, ..spec.clone() };
    let error = rows().check(layer, &latent).unwrap_err();
    assert_eq!(error.message(), "PAYLOAD_LENGTH: shape needs 0, payload 48 (v)");
    assert_eq!(StepRows { v: Bytes::new(), ..rows() }.check(layer, &latent), Ok(()));
}

#[test]
fn queries_must_be_those_of_the_session() {
    let spec = spec();
    assert_eq!(queries().check(0, &spec), Ok(()));
    let shape = RowShape { heads: Some(16), ..RowShape::default() };
    let error = StepQueries { shape, ..queries() }.check(0, &spec).unwrap_err();
    assert_eq!(error.message(), "SHAPE_MISMATCH: session heads 8, got 16");
    let error = StepQueries { q: bytes(7), ..queries() }.check(0, &spec).unwrap_err();
    assert_eq!(error.message(), "PAYLOAD_LENGTH: shape needs 384, payload 7 (q)");
    // Queries have an element type of their own.
    let halves = StepQueries { dtype: Dtype::F16, q: bytes(8 * 3 * 8), ..queries() };
    assert_eq!(halves.check(0, &spec), Ok(()));
    let (shape, operator) = queries().over(&spec, 8).unwrap();
    assert_eq!((shape.n_queries(), shape.n_keys(), shape.n_heads()), (3, 8, 8));
    assert_eq!(*operator, Operator::plain(0.25, Causal::BottomRight));
    assert_eq!(queries().over(&spec, 0).unwrap_err().message(), "SHAPE_ZERO: kv_len");
    let many = StepQueries { tokens: 65_537, ..queries() };
    assert_eq!(many.over(&spec, 8).unwrap_err().message(), "SHAPE_LIMIT: q_len 65537 > 65536");
}

#[test]
fn an_absent_scale_is_that_of_the_score_function() {
    let shape = spec().shape(1, 1).unwrap();
    assert_eq!(QueryOperator::default().decode(&shape).unwrap().scale(), 0.5);
}

#[test]
fn what_sessions_do_not_have_is_refused_with_its_name() {
    let shape = spec().shape(3, 8).unwrap();
    let refused = |message: proto::Operator| {
        let operator = QueryOperator { operator: Some(message), ..QueryOperator::default() };
        operator.decode(&shape).unwrap_err().message()
    };
    let of = |parts: OperatorParts| {
        QueryOperator::from(&Operator::new(parts, &shape).unwrap()).operator.unwrap_or_default()
    };
    let plain = || OperatorParts::plain(1.0, Causal::None);
    let uniform = of(OperatorParts { empty_row: EmptyRow::Uniform, ..plain() });
    assert_eq!(refused(uniform), "COMBINATION: session and empty_row=uniform");
    let cosine = proto::Score { function: "cosine".to_owned(), ..Default::default() };
    assert_eq!(
        refused(proto::Operator { score: Some(cosine), ..Default::default() }),
        "COMBINATION: session and score=cosine"
    );
    let dense =
        |dtype: proto::Dtype| proto::Dense { dtype: dtype.into(), batch: 1, heads: 1, queries: 3, keys: 8 };
    let mask = proto::Mask { dense: Some(dense(proto::Dtype::Bool)), ..Default::default() };
    assert_eq!(
        refused(proto::Operator { mask: Some(mask), ..Default::default() }),
        "COMBINATION: session and mask.dense"
    );
    let bias = proto::Bias { kind: Some(proto::bias::Kind::Dense(dense(proto::Dtype::F32))) };
    assert_eq!(
        refused(proto::Operator { biases: vec![bias], ..Default::default() }),
        "COMBINATION: session and bias.dense"
    );
    let score = proto::Score {
        function: "location_aware".to_owned(),
        previous: Some(dense(proto::Dtype::F32)),
        ..Default::default()
    };
    assert_eq!(
        refused(proto::Operator { score: Some(score), ..Default::default() }),
        "COMBINATION: session and score.previous"
    );
    // What needs nothing beside the operands is there as in any call.
    let alibi = Bias::Alibi { slopes: vec![0.5; 8].into(), by_key: false };
    let rich = OperatorParts {
        biases: vec![alibi],
        softcap: Some(3.0),
        sinks: Some(vec![0.0; 8].into()),
        empty_row: EmptyRow::Nan,
        ..OperatorParts::plain(1.0, Causal::BottomRight)
    };
    let operator = Operator::new(rich, &shape).unwrap();
    assert_eq!(*QueryOperator::from(&operator).decode(&shape).unwrap(), operator);
}

#[test]
fn a_spec_returns_and_has_what_it_leaves_out() {
    let all = SessionSpec {
        dtype: Dtype::Bf16,
        storage: Storage::Int4,
        value_is_key_prefix: true,
        acks: 1,
        ttl: Duration::from_secs(5),
        max_tokens: 99,
        allow_same_host: true,
        ..spec()
    };
    for spec in [spec(), all] {
        assert_eq!(decode_spec(sent(proto::SessionSpec::from(&spec))), Ok(spec));
    }
    let sparse = proto::SessionSpec {
        replicas: 0,
        acks: 0,
        ttl_seconds: 0,
        max_tokens: 0,
        ..proto::SessionSpec::from(&spec())
    };
    let decoded = decode_spec(sparse).unwrap();
    assert_eq!((decoded.replicas, decoded.acks, decoded.max_tokens), (1, 1, 1 << 20));
    assert_eq!(decoded.ttl, Duration::from_secs(600));
    let two = proto::SessionSpec { replicas: 2, ..sparse };
    assert_eq!(decode_spec(two).unwrap().acks, 2);
    let short = SessionSpec { ttl: Duration::from_millis(1), ..spec() };
    assert_eq!(proto::SessionSpec::from(&short).ttl_seconds, 1);
}

#[test]
fn each_field_of_a_spec_is_checked() {
    assert_eq!(refused_spec(|spec| spec.acks = 3), "REPLICATION: ack 3 > replicas 2");
    assert_eq!(refused_spec(|spec| spec.layers = 0), "SHAPE_ZERO: layers");
    assert_eq!(refused_spec(|spec| spec.heads = 0), "SHAPE_ZERO: num_heads");
    assert_eq!(refused_spec(|spec| spec.heads = u32::MAX), "SHAPE_LIMIT: num_heads 4294967295 > 1024");
    assert_eq!(refused_spec(|spec| spec.heads = 7), "GQA_RATIO: 7 % 2 != 0");
    assert_eq!(refused_spec(|spec| spec.dtype = 99), "DTYPE: 99");
    assert_eq!(refused_spec(|spec| spec.storage = 9), "DTYPE: storage 9");
    assert_eq!(refused_spec(|spec| spec.replicas = 17), "SHAPE_LIMIT: replicas 17 > 16");
    assert_eq!(
        refused_spec(|spec| spec.max_tokens = u64::MAX),
        "SHAPE_LIMIT: max_tokens 18446744073709551615 > 1048576"
    );
    assert_eq!(
        refused_spec(|spec| (spec.value_dim, spec.value_is_key_prefix) = (9, true)),
        decode_shape_of_prefix()
    );
}

/// What the shape itself says of values longer than keys.
fn decode_shape_of_prefix() -> String {
    let dims = Dims { batch: 1, heads: 8, kv_heads: 2, queries: 1, keys: 1, head_dim: 4, value_dim: 9 };
    let error = attnd_kernel::AttnShape::new(dims).unwrap().with_values_from_keys().unwrap_err();
    Error::from(error).message()
}

#[test]
fn each_field_of_other_requests_is_checked() {
    use proto::session_request::Ask as Message;
    let append = proto::SessionAppend {
        session: "a".into(),
        mutation: Some(mutation().into()),
        tokens: 5,
        ..Default::default()
    };
    let refused_append = |change: fn(&mut proto::SessionAppend)| {
        let mut append = append.clone();
        change(&mut append);
        refused(Message::Append(append))
    };
    assert_eq!(refused_append(|append| append.tokens = 0), "SHAPE_ZERO: tokens");
    assert_eq!(refused_append(|append| append.mutation = None), "SEQ: must be >= 1");
    assert_eq!(refused_append(|append| append.session.clear()), "SESSION_ID: 1..64 of [A-Za-z0-9._-]");
    let of = |layer, tokens, shape| {
        let append = Append { layer, tokens, shape, ..Append::try_from(append.clone()).unwrap() };
        append.bytes(&spec()).map_err(|error| error.message())
    };
    let none = RowShape::default();
    assert_eq!(of(0, 5, none), Ok((2 * 5 * 16, 2 * 5 * 8)));
    assert_eq!(of(3, 5, none), Err("SHAPE_LIMIT: layer 3 of 3".into()));
    assert_eq!(of(0, u64::MAX, none), Err("SHAPE_OVERFLOW".into()));
    assert_eq!(
        of(0, 5, RowShape { heads: Some(3), ..none }),
        Err("SHAPE_MISMATCH: session kv_heads 2, got 3".into())
    );

    let chunk = |change: fn(&mut proto::TensorChunk)| {
        let mut chunk = AppendChunk::new(2, Tensor::K, 8, bytes(16)).into();
        change(&mut chunk);
        refused(Message::Chunk(chunk))
    };
    assert_eq!(chunk(|chunk| chunk.tensor = 1), "COMBINATION: session and q");
    assert_eq!(chunk(|chunk| chunk.tensor = 77), "TENSOR: 77");
    assert_eq!(chunk(|chunk| chunk.offset = Some(9)), "CHECKSUM: chunk 2, nothing applied");
    assert_eq!(chunk(|chunk| chunk.data = Bytes::new()), "PAYLOAD_LENGTH: chunk 2 has 0 bytes");

    let change = |change| {
        let session = "a".to_owned();
        refused(Message::Change(proto::SessionChange { session, mutation: Some(mutation().into()), change }))
    };
    use proto::session_change::Change;
    let fork = |child: &str| Some(Change::Fork(proto::SessionFork { child: child.into() }));
    assert_eq!(change(fork("a")), "FORK: child equals parent");
    assert_eq!(change(fork("a/b")), "SESSION_ID: 1..64 of [A-Za-z0-9._-]");
    assert_eq!(change(None), "STREAM_ORDER: empty frame");
    let unnamed = proto::SessionDescribe::default();
    assert_eq!(refused(Message::Describe(unnamed)), "SESSION_ID: 1..64 of [A-Za-z0-9._-]");
}

#[test]
fn the_checksum_of_a_chunk_is_of_its_data_alone() {
    let message = proto::TensorChunk::from(AppendChunk::new(0, Tensor::K, 8, bytes(16)));
    let sum = AppendChunk::try_from(message).unwrap().data.crc32c();
    assert_eq!(sum, crc32c::crc32c(&bytes(16)));
    let silent = proto::TensorChunk { tensor: 2, data: bytes(16), ..Default::default() };
    assert_eq!(AppendChunk::try_from(silent).unwrap().data.crc32c(), sum);
}

fn context() -> StepContext {
    let rows = ContextChunk { heads: 2..4, tokens: 0..3, lse: vec![0.5; 6], context: vec![1.5; 12] };
    StepContext::new(rows, 300, 2, "c1-f32")
}

fn description() -> SessionDescription {
    SessionDescription {
        name: session(),
        spec: spec(),
        created: true,
        generation: 2,
        sealed: false,
        writer_epoch: 3,
        next_op_seq: 10,
        tokens: vec![5, 6, 7],
        shards: vec![ShardDescription {
            pieces: vec![Piece { groups: 0..2, slots: 0..32 }],
            epoch: 4,
            health: ShardHealth::Degraded,
            workers: vec![WorkerId::new("w1").unwrap(), WorkerId::new("w2").unwrap()],
            bytes: 4096,
        }],
        ttl_left: Duration::from_secs(77),
    }
}

#[test]
fn every_reply_returns() {
    let applied = Applied { len: 5, generation: 1, replayed: true, child: Some(session()) };
    let failure = Error::new(Reason::SeqGap, "expected 1, got 2");
    let results = vec![
        StepResult { step: 1, applied: Some(applied.clone()), context: Some(context()), failure: None },
        StepResult { step: 0, failure: Some(failure.clone()), ..StepResult::default() },
    ];
    for (answer, more) in [
        (Answer::Description(Box::new(description())), false),
        (Answer::Steps(results), true),
        (Answer::Applied(applied), false),
        (Answer::Names(vec![session()]), true),
        (Answer::Closed { already: true }, false),
        (Answer::Failed(failure), false),
    ] {
        let reply = SessionReply { request: 3, more, answer };
        assert_eq!(SessionReply::try_from(sent(proto::SessionReply::from(reply.clone()))), Ok(reply));
    }
}

#[test]
fn impossible_replies_are_refused() {
    let refused = |change: fn(&mut proto::SessionDescription)| {
        let mut message = description().into();
        change(&mut message);
        SessionDescription::try_from(message).unwrap_err().message()
    };
    assert_eq!(
        refused(|description| description.tokens.push(1)),
        "REPLY_INVALID: tokens of 4 layers, the session has 3"
    );
    assert_eq!(refused(|description| description.spec = None), "REPLY_INVALID: DTYPE: 0");
    assert_eq!(
        refused(|description| description.shards[0].state = "well".into()),
        "REPLY_INVALID: state well"
    );
    assert!(refused(|description| description.name.clear()).starts_with("REPLY_INVALID: session name"));
    let empty = SessionReply::try_from(proto::SessionReply::default()).unwrap_err();
    assert_eq!(empty.message(), "REPLY_INVALID: empty frame");
    // Rows are judged where it is known what was asked for.
    let shape = spec().shape(3, 300).unwrap();
    assert_eq!(context().decode(&shape).unwrap().lse, [0.5; 6]);
    let fewer = spec().shape(2, 300).unwrap();
    assert!(context().decode(&fewer).unwrap_err().message().contains("outside of 8 heads, 2 tokens"));
    let mut message = proto::StepContext::from(context());
    message.crc32c ^= 1;
    let error = StepContext::try_from(message).unwrap().decode(&shape).unwrap_err();
    assert_eq!(error.reason, Reason::Checksum);
}

#[test]
fn failures_of_newer_peers_keep_their_name_and_outcome() {
    let failure = proto::Failure {
        reason: "SHINY".into(),
        outcome: "not_executed".into(),
        detail: "3".into(),
        pushback_ms: 7,
    };
    let error = Error::from(failure);
    assert_eq!((error.message().as_str(), error.outcome), ("FOREIGN: SHINY: 3", Outcome::NotExecuted));
    let silent = Error::from(proto::Failure { reason: "SEQ_GAP".into(), ..Default::default() });
    assert_eq!(silent.outcome, Outcome::Unknown);
}

proptest! {
    #[test]
    fn failures_are_errors_without_loss(
        reason in proptest::sample::select(Reason::ALL),
        outcome in proptest::sample::select(&Outcome::ALL[..]),
        detail in "(?s).{0,300}",
        in_vain: bool,
    ) {
        let error = Error::new(reason, detail).with_outcome(outcome);
        let error = if in_vain { error.without_pushback() } else { error };
        let failure = sent(proto::Failure::from(&error));
        prop_assert_eq!(Error::from(failure), error);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = proto::SessionRequest::decode(&bytes[..]) {
            let _either = SessionRequest::decode(message);
        }
        if let Ok(message) = proto::SessionReply::decode(&bytes[..]) {
            let _either = SessionReply::try_from(message);
        }
        if let Ok(message) = proto::Step::decode(&bytes[..])
            && let Ok(step) = Step::try_from(message)
        {
            let _either = step.rows.map(|rows| rows.check(step.layer, &spec()));
            let _either = step.queries.map(|queries| queries.over(&spec(), 9));
        }
        if let Ok(message) = proto::SessionSpec::decode(&bytes[..]) {
            let _either = decode_spec(message);
        }
    }

    #[test]
    fn no_spec_panics(fields in any::<[u32; 9]>(), flags in any::<[bool; 2]>(), max_tokens: u64, tiny: bool) {
        let [layers, heads, kv_heads, head_dim, value_dim, dtype, replicas, acks, ttl_seconds] =
            fields.map(|field| if tiny { field % 5 } else { field });
        let message = proto::SessionSpec {
            layers, heads, kv_heads, head_dim, value_dim, dtype: dtype as i32, storage: (dtype % 3) as i32,
            value_is_key_prefix: flags[0], replicas, acks, ttl_seconds, max_tokens, allow_same_host: flags[1],
        };
        if let Ok(spec) = decode_spec(message) {
            prop_assert_eq!(decode_spec(proto::SessionSpec::from(&spec)), Ok(spec));
        }
    }
}
