//! Every value returns from its message; nothing a peer sends panics or passes unchecked.

use attnd_kernel::{Causal, Normaliser, OperatorParts};
use bytes::Bytes;
use proptest::prelude::*;
use prost::Message as _;

use super::rows::is_possible;
use super::*;
use crate::attend::tests::{dtypes, shapes, tensors};
use crate::operator::dense::tests::operators_and_sides;
use crate::operator::tests::operators;

/// 4 groups of 2 heads, 5 tokens, 300 keys, d = 4, dv = 2.
fn begin() -> ComputeBegin {
    let dims = attnd_kernel::Dims {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        queries: 5,
        keys: 300,
        head_dim: 4,
        value_dim: 2,
    };
    ComputeBegin {
        call_id: 7,
        shape: AttnShape::new(dims).unwrap(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::plain(0.5, Causal::None)),
        outputs: None,
        sides: Sides::default(),
        allow_non_finite: false,
        pieces: vec![Piece { groups: 1..3, slots: 0..64 }],
        tokens_per_cell: 5,
    }
}

fn call() -> CallShape {
    CallShape::from(&begin())
}

/// Group 1, all keys, tokens 1..4.
fn partial() -> Partial {
    let cell = CellId { group: 1, node: Node::ROOT, first_token: 1, tokens: 3, keys: 300 };
    let rows = PartialRows { value_dim: 2, m: vec![3.0; 6], l: vec![300.0; 6], o: vec![0.25; 12] };
    Partial { cell, rows }
}

fn refused_partial(change: impl FnOnce(&mut proto::Partial)) -> String {
    let mut message = proto::Partial::from(partial());
    change(&mut message);
    Partial::decode(message, &call()).unwrap_err().message()
}

/// The partial with `m` and `l` in its row 2, as the coordinator takes it.
fn with_row(m: f32, l: f32, allow_non_finite: bool) -> Result<Partial, Error> {
    let mut partial = partial();
    partial.rows.m[2] = m;
    partial.rows.l[2] = l;
    Partial::decode(partial.into(), &CallShape { allow_non_finite, ..call() })
}

fn refused_begin(change: impl FnOnce(&mut proto::ComputeBegin)) -> String {
    let mut message = proto::ComputeBegin::from(begin());
    change(&mut message);
    ComputeBegin::try_from(message).unwrap_err().message()
}

fn refused_slice(change: impl FnOnce(&mut SliceChunk)) -> String {
    let mut chunk =
        SliceChunk { index: 0, tensor: Tensor::K.into(), head: 1, offset: 16, data: vec![0; 32].into() };
    assert_eq!(SliceChunk::decode(chunk.clone().into(), &begin()), Ok(chunk.clone()));
    change(&mut chunk);
    SliceChunk::decode(chunk.into(), &begin()).unwrap_err().message()
}

#[test]
fn each_field_of_a_begin_is_checked() {
    assert_eq!(refused_begin(|b| b.kernel_id = "c2".into()), "KERNEL_MIX: c2, this node computes c1-f32");
    assert_eq!(refused_begin(|b| b.shape = None), "SHAPE_ZERO: batch");
    assert_eq!(refused_begin(|b| b.dtype = 0), "DTYPE: 0");
    assert_eq!(
        refused_begin(|b| b.scale = f32::INFINITY),
        "SCALE: must be finite and at most 2.35e38 in size"
    );
    assert_eq!(refused_begin(|b| b.causal = -1), "CAUSAL: -1");
    assert_eq!(refused_begin(|b| b.pieces.clear()), "PIECES: none");
    assert_eq!(refused_begin(|b| b.tokens_per_cell = 0), "PIECES: tokens_per_cell 0 not in 1..5");
    assert_eq!(refused_begin(|b| b.tokens_per_cell = 6), "PIECES: tokens_per_cell 6 not in 1..5");
}

#[test]
fn an_operator_and_its_name_travel_together() {
    // As a newer coordinator would say it to a worker that drops what it doesn't know, and as a broken one would.
    assert_eq!(
        refused_begin(|b| b.kernel_id = "c1-f32-op1".into()),
        "KERNEL_MIX: c1-f32-op1, this node computes c1-f32"
    );
    assert_eq!(refused_begin(|b| b.scale = -1.0), "KERNEL_MIX: c1-f32, this node computes c1-f32-op1");
    // A cap that would be ignored under the name of operators without one.
    let capped = |b: &mut proto::ComputeBegin| {
        b.operator = Some(proto::Operator { softcap: Some(5.0), ..Default::default() });
        b.kernel_id = "c1-f32-op1".into();
    };
    assert_eq!(refused_begin(capped), "KERNEL_MIX: c1-f32-op1, this node computes c1-f32-op2");
    let message = proto::ComputeBegin::from(begin());
    assert_eq!(
        (message.kernel_id.as_str(), message.operator),
        ("c1-f32", None),
        "as it was before operators"
    );
}

#[test]
fn a_partial_message_stays_under_the_limit() {
    let dims = attnd_kernel::Dims {
        batch: 1,
        heads: 1024,
        kv_heads: 1,
        queries: 9,
        keys: 1,
        head_dim: 1,
        value_dim: 512,
    };
    let shape = AttnShape::new(dims).unwrap();
    assert_eq!(cell_tokens(3, &shape, None), Ok(3));
    assert_eq!(cell_tokens(4, &shape, None).unwrap_err().message(), "PIECES: tokens_per_cell 4 not in 1..3");
}

#[test]
fn slices_lie_inside_their_head_and_share() {
    assert_eq!(refused_slice(|c| c.head = 3), "PIECES: k head 3 is not in this share");
    assert_eq!(refused_slice(|c| c.head = 0), "PIECES: k head 0 is not in this share");
    assert_eq!(refused_slice(|c| c.offset = 4800), "PAYLOAD_LENGTH: k head 1: 32 bytes at 4800 of 4800");
    assert_eq!(refused_slice(|c| c.offset = 4772), "PAYLOAD_LENGTH: k head 1: 32 bytes at 4772 of 4800");
    assert_eq!(refused_slice(|c| c.offset = 18), "PAYLOAD_LENGTH: k head 1: 32 bytes at 18 of 4800");
    assert_eq!(
        refused_slice(|c| c.offset = u64::MAX - 3),
        "PAYLOAD_LENGTH: k head 1: 32 bytes at 18446744073709551612 of 4800"
    );
    assert_eq!(refused_slice(|c| c.data = vec![0; 4097].into()), "PAYLOAD_LENGTH: 4097 not a multiple of 4");
    assert_eq!(refused_slice(|c| c.data = Bytes::new().into()), "PAYLOAD_LENGTH: chunk 0 has 0 bytes");
    // Query heads 2..6 are those of groups 1 and 2.
    assert_eq!(
        refused_slice(|c| (c.tensor, c.head) = (Tensor::Q.into(), 6)),
        "PIECES: q head 6 is not in this share"
    );
    let chunk =
        SliceChunk { index: 0, tensor: Tensor::Q.into(), head: 5, offset: 48, data: vec![0; 32].into() };
    assert!(SliceChunk::decode(chunk.into(), &begin()).is_ok());
}

#[test]
fn frames_come_in_order() {
    let commit = ComputeRequest::Commit(Commit { chunks: 1, bytes: 8 });
    let error = ComputeRequest::decode(commit.clone().into(), None).unwrap_err();
    assert_eq!(error.message(), "STREAM_ORDER: expected Begin");
    assert_eq!(ComputeRequest::decode(commit.clone().into(), Some(&begin())), Ok(commit));
    let again = ComputeRequest::decode(ComputeRequest::Begin(begin()).into(), Some(&begin())).unwrap_err();
    assert_eq!(again.message(), "STREAM_ORDER: duplicate Begin");
    let error = ComputeRequest::decode(proto::ComputeRequest { part: None }, None).unwrap_err();
    assert_eq!(error.message(), "STREAM_ORDER: empty frame");
    let error = ComputeReply::decode(proto::ComputeReply { part: None }, &call()).unwrap_err();
    assert_eq!(error.message(), "REPLY_INVALID: empty frame");
}

#[test]
fn partials_fit_their_call() {
    let place = "group 1 node 6/0 tokens 1+3";
    assert_eq!(
        refused_partial(|p| p.group = 4),
        "PARTIAL_INVALID: group 4 node 6/0 tokens 1+3: there are 4 groups"
    );
    assert_eq!(
        refused_partial(|p| p.node_level = 7),
        "PARTIAL_INVALID: group 1 node 7/0 tokens 1+3: there is no such node"
    );
    assert_eq!(
        refused_partial(|p| p.node_index = 1),
        "PARTIAL_INVALID: group 1 node 6/1 tokens 1+3: there is no such node"
    );
    assert_eq!(
        refused_partial(|p| p.tokens = 5),
        "PARTIAL_INVALID: group 1 node 6/0 tokens 1+5: there are 5 tokens"
    );
    assert_eq!(
        refused_partial(|p| p.keys = 299),
        format!("PARTIAL_INVALID: {place}: the node holds 300 keys, got 299")
    );
    // 300 keys are pages 0 and 1, in slots 0 and 32: slot 1 is empty.
    assert_eq!(
        refused_partial(|p| (p.node_level, p.node_index, p.keys) = (0, 1, 0)),
        "PARTIAL_INVALID: group 1 node 0/1 tokens 1+3: the node holds 0 keys, got 0"
    );
    assert_eq!(
        refused_partial(|p| p.m = p.m.slice(1..)),
        format!("PARTIAL_INVALID: {place}: m needs 24 bytes, got 23")
    );
    assert_eq!(
        refused_partial(|p| p.l = Bytes::new()),
        format!("PARTIAL_INVALID: {place}: l needs 24 bytes, got 0")
    );
    assert_eq!(
        refused_partial(|p| p.o = vec![0; 52].into()),
        format!("PARTIAL_INVALID: {place}: o needs 48 bytes, got 52")
    );
    assert_eq!(refused_partial(|p| p.o = vec![0; 48].into()), format!("CHECKSUM: {place}"));
}

#[test]
fn impossible_rows_are_refused() {
    const INF: f32 = f32::INFINITY;
    let never = [
        (3.0, 0.69),
        (3.0, 427.0),
        (3.0, -1.0),
        (3.0, 0.0),
        (3.5, 1.0),
        (-INF, 1.0),
        (-INF, f32::MIN_POSITIVE),
    ];
    for (m, l) in never {
        for allow in [false, true] {
            assert!(with_row(m, l, allow).is_err(), "m {m}, l {l}, allow {allow}");
        }
    }
    for (m, l) in
        [(f32::NAN, 1.0), (INF, 1.0), (3.0, f32::NAN), (3.0, INF), (-INF, f32::NAN), (INF, f32::NAN)]
    {
        assert!(with_row(m, l, false).is_err(), "m {m}, l {l}");
        assert!(with_row(m, l, true).is_ok(), "m {m}, l {l}");
    }
    for (m, l) in [(3.0, 0.7072), (-1e30, 1.0), (0.0, 424.0)] {
        assert!(with_row(m, l, false).is_ok(), "m {m}, l {l}");
    }
    // Scores of -inf come of infinite operands alone.
    assert!(with_row(-INF, 0.0, true).is_ok());
    assert_eq!(
        with_row(-INF, 0.0, false).unwrap_err().message(),
        "PARTIAL_INVALID: group 1 node 6/0 tokens 1+3: row 2 has m -inf, l 0 over 300 keys"
    );
    assert_eq!(
        with_row(INF, 1.0, false).unwrap_err().message(),
        "PARTIAL_INVALID: group 1 node 6/0 tokens 1+3: row 2 has m inf, l 1 over 300 keys"
    );
}

#[test]
fn a_row_is_empty_if_and_only_if_it_sees_no_key() {
    // Five tokens, 300 keys: with TopLeft token t sees t + 1 keys, all of them in page 0, which is in slot 0.
    let call = CallShape { operator: Arc::new(Operator::plain(0.5, Causal::TopLeft)), ..call() };
    let decode = |change: fn(&mut Partial)| {
        let mut partial = partial();
        partial.rows.l = vec![2.0, 3.0, 4.0, 2.0, 3.0, 4.0];
        change(&mut partial);
        Partial::decode(partial.into(), &call).map_err(|error| error.message())
    };
    let place = "PARTIAL_INVALID: group 1 node 6/0 tokens 1+3";
    assert!(decode(|_| {}).is_ok());
    assert_eq!(
        decode(|p| p.rows.l[3] = 2.9).unwrap_err(),
        format!("{place}: row 3 has m 3, l 2.9 over 2 keys")
    );
    let blinded = decode(|p| (p.rows.m[4], p.rows.l[4]) = (f32::NEG_INFINITY, 0.0)).unwrap_err();
    assert_eq!(blinded, format!("{place}: row 4 has m -inf, l 0 over 3 keys"));
    // Page 1 is in slot 32: nobody sees it yet.
    let blind = |p: &mut Partial| {
        (p.cell.node, p.cell.keys) = (Node::new(0, 32).unwrap(), 44);
        (p.rows.m, p.rows.l) = (vec![f32::NEG_INFINITY; 6], vec![0.0; 6]);
    };
    assert!(decode(blind).is_ok());
    let invented = decode(|p| (p.cell.node, p.cell.keys) = (Node::new(0, 32).unwrap(), 44)).unwrap_err();
    assert!(invented.ends_with("row 0 has m 3, l 2 over 0 keys"), "{invented}");
}

#[test]
fn a_worker_is_to_blame_for_nan_and_the_client_for_overflow() {
    let with_o = |o: f32, allow_non_finite: bool| {
        let mut partial = partial();
        partial.rows.o[7] = o;
        Partial::decode(partial.into(), &CallShape { allow_non_finite, ..call() })
    };
    assert_eq!(
        with_o(f32::NAN, false).unwrap_err().message(),
        "PARTIAL_INVALID: group 1 node 6/0 tokens 1+3: row 3 has o NaN"
    );
    for (o, allow) in [(f32::INFINITY, false), (f32::NEG_INFINITY, false), (f32::NAN, true)] {
        assert!(with_o(o, allow).is_ok(), "{o}, allow {allow}");
    }
}

#[test]
fn sums_of_sigmoids_are_between_none_and_all() {
    let normaliser = Normaliser::Sigmoid { bias: 0.0 };
    let sigmoid = OperatorParts { normaliser, ..OperatorParts::plain(0.5, Causal::None) };
    let operator = Arc::new(Operator::new(sigmoid, &call().shape).unwrap());
    let row = |m: f32, l: f32, allow_non_finite: bool| {
        is_possible(m, l, 300, &CallShape { operator: Arc::clone(&operator), allow_non_finite, ..call() })
    };
    for l in [0.0, f32::MIN_POSITIVE, 1.0, 300.0] {
        assert!(row(0.0, l, false), "l {l}");
    }
    for (m, l) in [(0.0, 304.0), (0.0, -1.0), (1.0, 1.0), (f32::NEG_INFINITY, 1.0)] {
        assert!(!row(m, l, false) && !row(m, l, true), "m {m}, l {l}");
    }
    assert!(!row(f32::NEG_INFINITY, 0.0, false), "keys are seen");
    for (m, l) in [(0.0, f32::NAN), (f32::NEG_INFINITY, 0.0)] {
        assert!(row(m, l, true), "m {m}, l {l}");
    }
}

#[test]
fn what_kernels_make_is_possible() {
    // One key whose score is just under a half above an integer, and 256 of them.
    for keys in [1_usize, 256, 1 << 20] {
        for score in [0.5_f32, -0.5, 0.49, 100.25] {
            let m = score.round_ties_even();
            let l = (score - m).exp2() * keys as f32;
            assert!(is_possible(m, l, keys, &call()), "{keys} keys of score {score}");
        }
    }
}

proptest! {
    #[test]
    fn requests_return(
        (shape, operator, sides) in operators_and_sides(), dtype in dtypes(),
        call_id in any::<u64>(), allow_non_finite in any::<bool>(), slots in 0..64_usize,
    ) {
        let pieces = vec![Piece { groups: 0..shape.n_groups(), slots: slots..64 }];
        let tokens_per_cell = shape.n_queries();
        let begin = ComputeBegin { call_id, shape, dtype, operator, outputs: None, sides, allow_non_finite, pieces, tokens_per_cell };
        let request = ComputeRequest::Begin(begin);
        prop_assert_eq!(ComputeRequest::decode(request.clone().into(), None), Ok(request));
    }

    #[test]
    fn slices_return(index in any::<u32>(), tensor in tensors(), at in 0..15_u64, data in proptest::collection::vec(any::<[u8; 4]>(), 1..6)) {
        let head = if tensor == Tensor::Q { 4 } else { 2 };
        let request = ComputeRequest::Chunk(SliceChunk { index, tensor: tensor.into(), head, offset: at * 4, data: data.concat().into() });
        prop_assert_eq!(ComputeRequest::decode(request.clone().into(), Some(&begin())), Ok(request));
    }

    #[test]
    fn partials_return(shape in shapes(), group in any::<usize>(), m in -100..100_i8, l in 0.71_f32..1.41, o in any::<f32>(), seconds in 0..1_000_000_u32) {
        let tokens = shape.n_queries();
        let rows = tokens * shape.group_size();
        let node = Node::new(0, 0).unwrap();
        let keys = keys_in_slots(node.slots(), shape.n_keys());
        let cell = CellId { group: group % shape.n_groups(), node, first_token: 0, tokens, keys };
        let value_dim = shape.value_dim();
        let o = if o.is_nan() { 0.0 } else { o };
        let rows = PartialRows { value_dim, m: vec![m.into(); rows], l: vec![l; rows], o: vec![o; rows * value_dim] };
        let operator = Arc::new(Operator::plain(1.0, Causal::None));
        let call = CallShape { shape, operator, outputs: None, allow_non_finite: false };
        for reply in [
            ComputeReply::Partial(Partial { cell, rows }),
            ComputeReply::Finished(Finished { compute_seconds: seconds.into(), partials: seconds }),
        ] {
            prop_assert_eq!(ComputeReply::decode(reply.clone().into(), &call), Ok(reply));
        }
    }

    #[test]
    fn keys_seen_are_those_of_the_node_that_the_mask_shows(
        (shape, operator) in operators(), group in any::<usize>(), level in 0..7_u32, index in any::<u32>(), first in any::<usize>(),
    ) {
        let node = Node::new(level, index % (64 >> level)).unwrap();
        let first_token = first % shape.n_queries();
        let tokens = shape.n_queries() - first_token;
        let group = group % shape.n_groups();
        let cell = CellId { group, node, first_token, tokens, keys: keys_in_slots(node.slots(), shape.n_keys()) };
        let seen = keys_seen(&cell, &CallShape { shape, operator: Arc::clone(&operator), outputs: None, allow_non_finite: false });
        prop_assert_eq!(seen.len(), tokens);
        for (token, seen) in (first_token..).zip(seen) {
            let visible = operator.mask_of_group(group, &shape).visible(token);
            let up_to = |end: usize| keys_in_slots(node.slots(), end);
            prop_assert_eq!(seen, up_to(visible.end) - up_to(visible.start), "token {}", token);
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), began in any::<bool>()) {
        let begin = begin();
        if let Ok(message) = proto::ComputeRequest::decode(&bytes[..]) {
            let _either = ComputeRequest::decode(message, began.then_some(&begin));
        }
        if let Ok(message) = proto::ComputeReply::decode(&bytes[..]) {
            let _either = ComputeReply::decode(message, &call());
        }
    }

    #[test]
    fn no_damaged_message_panics(at in any::<proptest::sample::Index>(), byte in any::<u8>(), cut in any::<proptest::sample::Index>()) {
        let reply = proto::ComputeReply::from(ComputeReply::Partial(partial()));
        let request = proto::ComputeRequest::from(ComputeRequest::Begin(begin()));
        for mut bytes in [reply.encode_to_vec(), request.encode_to_vec()] {
            let place = at.index(bytes.len());
            bytes[place] = byte;
            bytes.truncate(cut.index(bytes.len() + 1).max(place));
            if let Ok(message) = proto::ComputeReply::decode(&bytes[..]) {
                let _either = ComputeReply::decode(message, &call());
            }
            if let Ok(message) = proto::ComputeRequest::decode(&bytes[..]) {
                let _either = ComputeRequest::decode(message, None);
            }
        }
    }

    #[test]
    fn no_cell_panics(numbers in any::<[u32; 6]>(), tiny in any::<bool>(), bytes in 0..60_usize) {
        let [group, node_level, node_index, first_token, tokens, keys] = numbers.map(|n| if tiny { n % 7 } else { n });
        let data = Bytes::from(vec![0; bytes]);
        let message = proto::Partial {
            group, node_level, node_index, first_token, tokens, keys, crc32c: 0, m: data.clone(), l: data.clone(), o: data,
        };
        let _either = Partial::decode(message, &call());
    }
}
