//! Every value returns from its message; each way to be wrong has its text; partials are judged as those of calls are.

use std::time::Duration;

use attnd_kernel::slot::keys_in_slots;
use attnd_kernel::{Causal, Dtype, Operator, PartialRows};
use attnd_plan::session::{Answer, Change, Op, Record, SessionSpec};
use attnd_plan::{CellId, Piece, Tensor, cells};
use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::attend::Commit;
use crate::compute::{CallShape, SliceChunk};
use crate::error::{Error, Reason};
use crate::proto;
use crate::session::QueryOperator;
use crate::session::tests::spec;

const AT: ShardAt = ShardAt { session: 77, shard: 1, epoch: 5 };
const OP: ShardOp = ShardOp { op_seq: 3, digest: 9, generation: 2 };

/// The second kv head, and the first half of the slots.
fn pieces() -> Vec<Piece> {
    vec![Piece { groups: 1..2, slots: 0..32 }]
}

/// Of 256 tokens behind 256: all of one page, which is in the other half; and 44 more, which are in this one.
fn rows() -> ShardRows {
    ShardRows::new(OP, 256, 300, vec![1; 44 * 16].into(), vec![2; 44 * 8].into())
}

fn queries() -> ShardQueries {
    let q: Bytes = vec![3; 4 * 2 * 16].into();
    ShardQueries {
        generation: 2,
        at_len: 556,
        tokens: 2,
        dtype: Dtype::F32,
        crc32c: crc32c::crc32c(&q),
        q,
        operator: QueryOperator::from(&Operator::plain(0.5, Causal::BottomRight)),
        allow_non_finite: false,
        tokens_per_cell: 2,
        kernel_id: "c1-f32".to_owned(),
        timeout: Some(Duration::from_millis(1500)),
    }
}

fn work() -> ShardWork {
    ShardWork { at: AT, layer: 1, rows: Some(rows()), queries: Some(queries()) }
}

fn append() -> ShardAppend {
    ShardAppend { at: AT, layer: 1, op: OP, base_len: 256, tokens: 300, allow_non_finite: false }
}

fn chunk() -> SliceChunk {
    SliceChunk { index: 0, tensor: Tensor::V.into(), head: 1, offset: 8, data: vec![0; 16].into() }
}

fn base() -> CopyBase {
    CopyBase { op_seq: 1, chain: 3, generation: 2, tokens: vec![0, 256, 0] }
}

/// Two ops after three that are forgotten.
fn snapshot() -> ShardSnapshot {
    let state = ShardState { op_seq: 5, tokens: vec![0, 556, 9], chain: 8, ..ShardState::default() };
    let record = |seq, child| Record { seq, digest: 9, answer: Answer { len: 7, generation: 1, child } };
    let records = vec![record(4, Some(6)), record(5, None)];
    ShardSnapshot { state, records, chains: vec![7, 8], base: Some(base()) }
}

fn import() -> ShardImport {
    ShardImport { at: AT, spec: spec(), pieces: pieces(), snapshot: snapshot() }
}

fn sent<M: prost::Message + Default>(message: M) -> M {
    M::decode(&message.encode_to_vec()[..]).unwrap()
}

fn refused_work(change: impl FnOnce(&mut proto::ShardWork)) -> String {
    let mut message = proto::ShardWork::from(work());
    change(&mut message);
    ShardWork::try_from(message).unwrap_err().message()
}

#[test]
fn time_of_queries_is_whole_milliseconds_and_some() {
    let read = |timeout_ms| {
        let queries = proto::ShardQueries { timeout_ms, ..queries().into() };
        ShardQueries::try_from(queries).unwrap().timeout
    };
    assert_eq!(read(0), None);
    assert_eq!(read(3_600_000), Some(Duration::from_secs(3600)));
    for (timeout, sent) in [
        (Duration::ZERO, 1),
        (Duration::from_micros(20), 1),
        (Duration::from_micros(7999), 7),
        (Duration::MAX, 3_600_000),
    ] {
        assert_eq!(timeout_ms(timeout), sent);
        let message = proto::ShardQueries::from(ShardQueries { timeout: Some(timeout), ..queries() });
        assert_eq!(message.timeout_ms, sent);
    }
}

#[test]
fn every_request_returns() {
    let change = |kind| HoldAsk::Change(ShardChange { at: AT, op: OP, kind });
    for ask in [
        HoldAsk::Hold(HoldShard { at: AT, spec: spec(), pieces: pieces() }),
        HoldAsk::Works(vec![
            work(),
            ShardWork { rows: None, ..work() },
            ShardWork { queries: None, ..work() },
        ]),
        HoldAsk::Append(append()),
        HoldAsk::Chunk(chunk()),
        HoldAsk::Commit(Commit { chunks: 1, bytes: 2 }),
        change(ShardChangeKind::Truncate { len: 4 }),
        change(ShardChangeKind::Fork { child: 78 }),
        change(ShardChangeKind::Seal),
        change(ShardChangeKind::Undo),
        HoldAsk::Fence(AT),
        HoldAsk::Release(AT),
        HoldAsk::GiveUp,
        HoldAsk::Look(AT),
        HoldAsk::Export(ShardExport { at: AT, base: Some(base()) }),
        HoldAsk::Export(ShardExport { at: AT, base: None }),
        HoldAsk::Read(ExportRead { export: 9, index: 3 }),
        HoldAsk::End(9),
        HoldAsk::Import(Box::new(import())),
        HoldAsk::Copied(CopyChunk::new(1, Bytes::from_static(b"abcd"))),
        HoldAsk::Sum(CopySum { chunks: 1, bytes: 4, crc32c: 5 }),
        HoldAsk::Recall(AT),
        HoldAsk::List,
    ] {
        let request = HoldRequest { request: 2, term: 6, ask };
        let again = HoldRequest::decode(sent(request.clone().into()));
        assert_eq!((again.request, again.term), (2, 6));
        let ask = match again.ask.unwrap() {
            HoldAsk::Works(works) => HoldAsk::Works(works.into_iter().collect::<Result<_, _>>().unwrap()),
            HoldAsk::Hold(hold) => HoldAsk::Hold(hold),
            HoldAsk::Append(append) => HoldAsk::Append(append),
            HoldAsk::Chunk(chunk) => HoldAsk::Chunk(chunk),
            HoldAsk::Commit(commit) => HoldAsk::Commit(commit),
            HoldAsk::Change(change) => HoldAsk::Change(change),
            HoldAsk::Fence(at) => HoldAsk::Fence(at),
            HoldAsk::Release(at) => HoldAsk::Release(at),
            HoldAsk::GiveUp => HoldAsk::GiveUp,
            HoldAsk::Look(at) => HoldAsk::Look(at),
            HoldAsk::Export(export) => HoldAsk::Export(export),
            HoldAsk::Read(read) => HoldAsk::Read(read),
            HoldAsk::End(export) => HoldAsk::End(export),
            HoldAsk::Import(import) => HoldAsk::Import(import),
            HoldAsk::Copied(chunk) => HoldAsk::Copied(chunk),
            HoldAsk::Sum(sum) => HoldAsk::Sum(sum),
            HoldAsk::Recall(at) => HoldAsk::Recall(at),
            HoldAsk::List => HoldAsk::List,
        };
        assert_eq!(ask, request.ask);
    }
}

#[test]
fn requests_are_the_ops_of_the_ledger() {
    let appended = Change::Append { layer: 1, base_len: 256, tokens: 300 };
    assert_eq!(rows().op(1), Op { seq: 3, digest: 9, change: appended });
    assert_eq!(append().op(), rows().op(1));
    assert_eq!(ShardChangeKind::Fork { child: 7 }.change(), Some(Change::Fork { child: 7 }));
    assert_eq!(ShardChangeKind::Undo.change(), None);
}

#[test]
fn each_field_of_a_request_is_checked() {
    assert_eq!(refused_work(|work| work.at = None), "SHARD: none said");
    assert_eq!(
        refused_work(|work| (work.rows, work.queries) = (None, None)),
        "COMBINATION: work without rows and queries"
    );
    assert_eq!(refused_work(|work| work.rows.as_mut().unwrap().op = None), "SEQ: must be >= 1");
    assert_eq!(refused_work(|work| work.rows.as_mut().unwrap().tokens = 0), "SHAPE_ZERO: tokens");
    assert_eq!(
        refused_work(|work| work.rows.as_mut().unwrap().crc32c ^= 1),
        "CHECKSUM: k and v, nothing applied"
    );
    assert_eq!(
        refused_work(|work| work.queries.as_mut().unwrap().crc32c ^= 1),
        "CHECKSUM: q, nothing applied"
    );
    assert_eq!(refused_work(|work| work.queries.as_mut().unwrap().dtype = 0), "DTYPE: 0");
    assert_eq!(
        refused_work(|work| work.queries.as_mut().unwrap().timeout_ms = 3_600_001),
        "DEADLINE_FORMAT: queries with 3600001 ms, at most 3600000"
    );

    use proto::hold_request::Ask as Message;
    let refused = |ask: Message| {
        let asked = HoldRequest::decode(proto::HoldRequest { request: 1, term: 1, ask: Some(ask) });
        asked.ask.unwrap_err().message()
    };
    let works = |n| Message::Works(proto::ShardWorks { works: vec![proto::ShardWork::default(); n] });
    assert_eq!(refused(works(1025)), "COUNT: works 1025 > 1024");
    assert_eq!(refused(works(0)), "COUNT: works 0");
    let mut q = proto::SliceChunk::from(chunk());
    q.tensor = 1;
    assert_eq!(refused(Message::Chunk(q)), "TENSOR: q of a session");
    let mut flipped = proto::SliceChunk::from(chunk());
    flipped.crc32c ^= 1;
    assert_eq!(refused(Message::Chunk(flipped)), "CHECKSUM: chunk 0, nothing applied");
    let outside = vec![Piece { groups: 1..3, slots: 0..64 }];
    let hold = HoldShard { at: AT, spec: spec(), pieces: outside };
    assert_eq!(refused(Message::Hold(hold.into())), "PIECES: 0: groups 1..3 of 2, slots 0..64 of 64");
    let empty = HoldRequest::decode(proto::HoldRequest::default()).ask.unwrap_err();
    assert_eq!(empty.message(), "STREAM_ORDER: empty frame");
}

#[test]
fn rows_must_be_those_of_the_shard() {
    let check =
        |rows: ShardRows, spec: &SessionSpec| rows.check(1, spec, &pieces()).map_err(|error| error.message());
    assert_eq!(check(rows(), &spec()), Ok(()));
    let longer = ShardRows { tokens: 301, ..rows() };
    assert_eq!(check(longer, &spec()), Err("PAYLOAD_LENGTH: shape needs 720, payload 704 (k)".into()));
    let elsewhere = ShardRows::new(OP, 256, 5, Bytes::new(), Bytes::new());
    assert_eq!(check(elsewhere, &spec()), Ok(()), "a replica without any of the tokens");
    let small = SessionSpec { max_tokens: 555, ..spec() };
    assert_eq!(check(rows(), &small), Err("SESSION_FULL: 256 + 300".into()));
    let huge = ShardRows { base_len: usize::MAX, ..rows() };
    assert_eq!(check(huge, &spec()), Err(format!("SESSION_FULL: {} + 300", u64::MAX)));
    assert_eq!(rows().check(3, &spec(), &pieces()).unwrap_err().message(), "SHAPE_LIMIT: layer 3 of 3");
    assert_eq!(append().bytes(&spec(), &pieces()), Ok((44 * 16, 44 * 8)));
}

#[test]
fn chunks_must_lie_in_the_heads_of_the_shard() {
    let check = |change: fn(&mut SliceChunk)| {
        let mut changed = chunk();
        change(&mut changed);
        check_chunk(&changed, &append(), &spec(), &pieces()).map_err(|error| error.message())
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert_eq!(check(|chunk| chunk.head = 0), Err("PIECES: v head 0 is not in this shard".into()));
    assert_eq!(
        check(|chunk| chunk.offset = 2400),
        Err("PAYLOAD_LENGTH: v head 1: 16 bytes at 2400 of 2400".into())
    );
    assert_eq!(
        check(|chunk| chunk.offset = 3),
        Err("PAYLOAD_LENGTH: v head 1: 16 bytes at 3 of 2400".into())
    );
    assert!(check(|chunk| chunk.offset = u64::MAX).is_err());
}

#[test]
fn queries_must_be_those_of_the_shard() {
    let call = queries().call(1, &spec(), &pieces()).unwrap();
    assert_eq!((call.shape.n_queries(), call.shape.n_keys(), call.shape.n_heads()), (2, 556, 8));
    assert_eq!(ShardQueries::heads(&spec(), &pieces()), 4..8);
    let refused = |change: fn(&mut ShardQueries)| {
        let mut changed = queries();
        change(&mut changed);
        changed.call(1, &spec(), &pieces()).unwrap_err().message()
    };
    assert_eq!(refused(|queries| queries.tokens = 3), "PAYLOAD_LENGTH: shape needs 192, payload 128 (q)");
    assert_eq!(refused(|queries| queries.at_len = 0), "SHAPE_ZERO: kv_len");
    assert_eq!(
        refused(|queries| queries.kernel_id = "c2".into()),
        "KERNEL_MIX: c2, this node computes c1-f32"
    );
    assert_eq!(refused(|queries| queries.tokens_per_cell = 0), "PIECES: tokens_per_cell 0 not in 1..2");
    assert_eq!(refused(|queries| queries.operator.causal = 9), "CAUSAL: 9");
    assert_eq!(queries().call(3, &spec(), &pieces()).unwrap_err().message(), "SHAPE_LIMIT: layer 3 of 3");
}

/// What a shard owes for some queries, and rows that a kernel may have made.
fn owed() -> (CallShape, Vec<CellId>, Vec<PartialRows>) {
    let call = queries().call(1, &spec(), &pieces()).unwrap();
    let both = [Piece { groups: 0..2, slots: 0..48 }];
    let cells = cells(&both, &call.shape, 1);
    let rows = |(at, cell): (usize, &CellId)| {
        let n = call.shape.group_size() * cell.tokens;
        let values = |from: f32, n: usize| (0..n).map(|i| from + i as f32).collect();
        // Each row sees every key of its node but for the newest ones, so a sum over two keys is possible.
        PartialRows { value_dim: 2, m: values(at as f32, n), l: vec![2.0; n], o: values(-5.0, 2 * n) }
    };
    let partials = cells.iter().enumerate().map(rows).collect();
    (call, cells, partials)
}

#[test]
fn partials_of_many_cells_return_in_one_buffer() {
    let (call, cells, partials) = owed();
    assert!(cells.len() > 4, "{cells:?}");
    let whole = PartialRun::new(0, &partials);
    let again = PartialRun::try_from(sent(proto::PartialRun::from(whole.clone()))).unwrap();
    assert_eq!(again, whole);
    let expected: Vec<_> = cells.iter().copied().zip(partials.clone()).collect();
    assert_eq!(again.decode(&cells, &call).unwrap(), expected);
    let part = PartialRun::new(2, &partials[2..4]);
    assert_eq!(part.decode(&cells, &call).unwrap(), expected[2..4]);
    assert_eq!(part.bytes(), 2 * PartialRun::cell_bytes(&cells[2], &call));
}

#[test]
fn partials_that_no_kernel_can_have_made_are_refused() {
    let (call, cells, partials) = owed();
    let refused = |change: &dyn Fn(&mut PartialRows)| {
        let mut partials = partials.clone();
        change(&mut partials[1]);
        PartialRun::new(0, &partials).decode(&cells, &call).unwrap_err().message()
    };
    let CellId { node, .. } = cells[1];
    let keys = keys_in_slots(node.slots(), 555);
    let place = format!("group 0 node {}/{} tokens 0+1", node.level(), node.index());
    let row = |m: &str, l: &str| format!("PARTIAL_INVALID: {place}: row 2 has m {m}, l {l} over {keys} keys");
    assert_eq!(refused(&|rows| rows.m[2] = f32::INFINITY), row("inf", "2"));
    assert_eq!(refused(&|rows| rows.m[2] = f32::NAN), row("NaN", "2"));
    assert_eq!(refused(&|rows| rows.m[2] = 0.5), row("0.5", "2"));
    assert_eq!(refused(&|rows| rows.l[2] = 0.5), row("3", "0.5"));
    assert_eq!(refused(&|rows| rows.l[2] = 1e9), row("3", "1000000000"));
    assert_eq!(refused(&|rows| rows.o[5] = f32::NAN), format!("PARTIAL_INVALID: {place}: row 2 has o NaN"));
    // NaN passes where it was let in.
    let careless = CallShape { allow_non_finite: true, ..call.clone() };
    let mut poisoned = partials.clone();
    poisoned[0].m[0] = f32::NAN;
    assert!(PartialRun::new(0, &poisoned).decode(&cells, &careless).is_ok());
}

#[test]
fn partials_must_be_those_of_the_cells() {
    let (call, cells, partials) = owed();
    let n = cells.len();
    let error = PartialRun::new(1, &partials).decode(&cells, &call).unwrap_err();
    assert_eq!(error.message(), format!("PARTIAL_INVALID: cells 1+{n}: there are {n}"));
    let far = PartialRun::new(usize::MAX, &partials[..2]).decode(&cells, &call).unwrap_err();
    assert_eq!(far.reason, Reason::PartialInvalid);
    let mut message = proto::PartialRun::from(PartialRun::new(0, &partials[..1]));
    message.cells = 2;
    let one = PartialRun::cell_bytes(&cells[0], &call);
    let error = PartialRun::try_from(message.clone()).unwrap().decode(&cells, &call).unwrap_err();
    assert_eq!(error.message(), format!("PARTIAL_INVALID: cells 0+2: needs {} bytes, got {one}", 2 * one));
    message.cells = 0;
    assert_eq!(PartialRun::try_from(message.clone()).unwrap_err().message(), "PARTIAL_INVALID: cells 0+0");
    message.cells = 1;
    message.crc32c ^= 1;
    assert_eq!(PartialRun::try_from(message).unwrap_err().message(), "CHECKSUM: partials of cells 0+1");
}

#[test]
fn every_reply_returns() {
    let state = ShardState {
        epoch: 5,
        generation: 2,
        op_seq: 3,
        chain: 9,
        tokens: vec![1, 2, 3],
        replayed: true,
        resident_bytes: 1 << 40,
        chain_before: 8,
        last: None,
        sealed: true,
    };
    for change in [
        Change::Append { layer: 1, base_len: 2, tokens: 3 },
        Change::Truncate { len: 4 },
        Change::Fork { child: 5 },
        Change::Seal,
    ] {
        let state = ShardState { last: Some(Op { seq: 3, digest: 7, change }), ..state.clone() };
        assert_eq!(ShardState::try_from(sent(proto::ShardState::from(state.clone()))), Ok(state));
    }
    let (_, _, partials) = owed();
    let failure = Error::new(Reason::KvBudget, "need 2, free 1");
    let results = vec![
        ShardResult {
            work: 1,
            applied: Some(state.clone()),
            partials: Some(PartialRun::new(0, &partials)),
            failure: None,
        },
        ShardResult { work: 0, failure: Some(failure.clone()), ..ShardResult::default() },
    ];
    let record = |seq, child| Record { seq, digest: 9, answer: Answer { len: 7, generation: 1, child } };
    let state_of = |op_seq| ShardState { op_seq, ..state.clone() };
    let records = ShardRecords { state: state_of(12), records: vec![record(11, None), record(12, Some(8))] };
    for answer in [
        HoldAnswer::Results(results),
        HoldAnswer::State(state.clone()),
        HoldAnswer::Records(records.clone()),
        HoldAnswer::Records(ShardRecords { records: Vec::new(), ..records.clone() }),
        HoldAnswer::Shards(vec![AT, ShardAt { shard: 0, ..AT }]),
        HoldAnswer::Failed(failure),
    ] {
        let reply = HoldReply { request: 3, more: true, answer };
        assert_eq!(HoldReply::try_from(sent(proto::HoldReply::from(reply.clone()))), Ok(reply));
    }
    for (op_seq, seqs) in [(12, [10, 11]), (12, [11, 13]), (1, [0, 1]), (12, [12, 12])] {
        let records = seqs.map(|seq| record(seq, None)).to_vec();
        let broken = proto::ShardRecords::from(ShardRecords { state: state_of(op_seq), records });
        let error = ShardRecords::try_from(broken).unwrap_err().message();
        assert!(error.starts_with("REPLY_INVALID: a record of op "), "{seqs:?}: {error}");
    }
    let many = proto::ShardState { tokens: vec![0; 1025], ..Default::default() };
    assert_eq!(ShardState::try_from(many).unwrap_err().message(), "COUNT: tokens 1025 > 1024");
    assert_eq!(
        HoldReply::try_from(proto::HoldReply::default()).unwrap_err().message(),
        "REPLY_INVALID: empty frame"
    );
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(message) = proto::HoldRequest::decode(&bytes[..])
            && let Ok(HoldAsk::Works(works)) = HoldRequest::decode(message).ask
        {
            for work in works.into_iter().flatten() {
                let _either = work.rows.map(|rows| rows.check(work.layer, &spec(), &pieces()));
                let _either = work.queries.map(|queries| queries.call(work.layer, &spec(), &pieces()));
            }
        }
        if let Ok(message) = proto::HoldReply::decode(&bytes[..]) {
            let _either = HoldReply::try_from(message);
        }
        if let Ok(message) = proto::PartialRun::decode(&bytes[..]) {
            let (call, cells, _) = owed();
            let _either = PartialRun::try_from(message).map(|run| run.decode(&cells, &call));
        }
    }
}

#[test]
fn copies_return_and_are_checked() {
    let snapshot = snapshot();
    for answer in [
        HoldAnswer::Snapshot(Box::new(snapshot.clone())),
        HoldAnswer::Chunk(CopyChunk::new(0, Bytes::from_static(b"12345678"))),
        HoldAnswer::Sum(CopySum { chunks: 2, bytes: 12, crc32c: 1 }),
    ] {
        let reply = HoldReply { request: 3, more: false, answer };
        assert_eq!(HoldReply::try_from(sent(proto::HoldReply::from(reply.clone()))), Ok(reply));
    }
    let refused = |change: &dyn Fn(&mut ShardSnapshot)| {
        let mut import = import();
        change(&mut import.snapshot);
        ShardImport::try_from(proto::ShardImport::from(import)).unwrap_err().message()
    };
    assert_eq!(refused(&|copy| copy.state.op_seq = 1), "SNAPSHOT: 2 records don't end in op 1");
    assert_eq!(refused(&|copy| copy.state.tokens.push(1)), "SNAPSHOT: tokens of 4 layers, the session has 3");
    assert_eq!(refused(&|copy| copy.state.tokens[1] = 255), "SNAPSHOT: layer 1 has 255 tokens, its base 256");
    assert_eq!(
        refused(&|copy| copy.base.as_mut().unwrap().tokens = vec![1]),
        "SNAPSHOT: a base of 1 layers for 3"
    );
    let most = spec().max_tokens as u64;
    let too_many = refused(&|copy| copy.state.tokens[0] = most + 1);
    assert_eq!(too_many, format!("SESSION_FULL: {} tokens, the session has at most {most}", most + 1));
    let broken = proto::CopyChunk { index: 4, crc32c: 1, data: Bytes::from_static(b"1234") };
    assert_eq!(CopyChunk::try_from(broken).unwrap_err().message(), "CHECKSUM: chunk 4, nothing applied");
}

#[test]
fn a_sum_is_of_all_chunks_in_order() {
    let chunks = [&b"1234"[..], b"5678", b"90ab"].map(Bytes::from_static);
    let sum_of = |order: [usize; 3]| {
        let mut sum = CopySum::default();
        let in_order = order.iter().enumerate();
        in_order.for_each(|(i, at)| sum.add(&CopyChunk::new(i as u32, chunks[*at].clone())));
        sum
    };
    let sum = sum_of([0, 1, 2]);
    assert_eq!(sum, CopySum { chunks: 3, bytes: 12, crc32c: crc32c::crc32c(b"1234567890ab") });
    assert_ne!(sum_of([1, 0, 2]), sum);
}
