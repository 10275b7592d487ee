//! What workers make keys and values of returns from its messages, and every way to be wrong has its text.

use std::sync::Arc;

use attnd_kernel::{Causal, Dims, OperatorParts, Score};
use attnd_plan::{AnyTensor, Element, Piece, SideLayout, SideTensor, WorkerChoice};
use proptest::prelude::*;

use super::*;
use crate::attend::{AttendRequest, Begin, TensorChunk};
use crate::compute::{ComputeBegin, ComputeRequest, SliceChunk};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// 2 elements of 4 heads over 2 kv heads, 300 keys of 3 and values of 2.
fn shape() -> AttnShape {
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 5, keys: 300, head_dim: 3, value_dim: 2 };
    AttnShape::new(dims).unwrap()
}

fn projected(dtype: Dtype, width: usize, has_bias: bool) -> Projected {
    Projected { dtype, width, has_bias }
}

fn same_rows() -> Projection {
    let (key, value) = (projected(Dtype::F16, 7, true), projected(Dtype::F16, 7, false));
    Projection { key, value, same_rows: true }
}

fn begin(projection: &Projection, masked: bool) -> Begin {
    let mut layouts = projection.layouts(&shape()).unwrap();
    let mut parts = OperatorParts::plain(0.5, Causal::BottomRight);
    if masked {
        parts.selection = Some(attnd_kernel::Selection::Dense);
        let dims = [1, 1, 5, 300];
        layouts.push(SideLayout::dense(SideTensor::Mask, Element::Bool, dims, &shape()).unwrap());
    }
    Begin {
        shape: shape().with_projected_kv(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::new(parts, &shape()).unwrap()),
        outputs: None,
        sides: Sides::new(layouts).unwrap(),
        allow_non_finite: false,
        forbid_empty_rows: false,
        workers: WorkerChoice::Auto,
    }
}

fn compute_begin(projection: &Projection, masked: bool) -> ComputeBegin {
    let Begin { shape, dtype, operator, sides, .. } = begin(projection, masked);
    ComputeBegin {
        call_id: 3,
        shape,
        dtype,
        operator,
        outputs: None,
        sides,
        allow_non_finite: false,
        pieces: vec![Piece { groups: 1..2, slots: 0..64 }],
        tokens_per_cell: 5,
    }
}

fn any_projection() -> impl Strategy<Value = Projection> {
    let of = || {
        (proptest::sample::select(&DTYPES[..]), 1..=MAX_WIDTH_DRAWN, any::<bool>())
            .prop_map(|(dtype, width, has_bias)| projected(dtype, width, has_bias))
    };
    (of(), of(), any::<bool>()).prop_map(|(key, other, same_rows)| {
        let value = if same_rows { Projected { has_bias: other.has_bias, ..key } } else { other };
        Projection { key, value, same_rows }
    })
}

const MAX_WIDTH_DRAWN: usize = attnd_plan::MAX_WIDTH;

proptest! {
    #[test]
    fn what_keys_are_made_of_returns(projection in any_projection(), masked in any::<bool>()) {
        let (of_client, of_worker) = (begin(&projection, masked), compute_begin(&projection, masked));
        prop_assert_eq!(Projection::of(&of_client.sides), Some(projection));
        let message = proto::AttendBegin::from(of_client.clone());
        let returned = Begin::try_from(message);
        prop_assert_eq!(returned.as_ref(), Ok(&of_client));
        let returned = ComputeBegin::try_from(proto::ComputeBegin::from(of_worker.clone()));
        prop_assert_eq!(returned.as_ref(), Ok(&of_worker));
    }
}

#[test]
fn who_sends_keys_says_nothing_of_projections() {
    let sides = Sides::default();
    assert_eq!(encode(&sides), None);
    assert_eq!(decode(None, shape(), sides.clone()), Ok((shape(), sides)));
}

fn refused(change: impl FnOnce(&mut proto::AttendBegin)) -> String {
    let mut message = proto::AttendBegin::from(begin(&same_rows(), false));
    change(&mut message);
    Begin::try_from(message).unwrap_err().message()
}

#[test]
fn what_makes_no_keys_is_refused_with_its_numbers() {
    let of = |message: &mut proto::AttendBegin| message.projection.as_mut().unwrap().key.unwrap();
    let with = |key: &dyn Fn(proto::Projected) -> proto::Projected| {
        refused(|message| {
            let changed = key(of(message));
            message.projection.as_mut().unwrap().key = Some(changed);
        })
    };
    assert_eq!(
        with(&|key| proto::Projected { width: 0, ..key }),
        "SHAPE_MISMATCH: values are made of the rows of keys, which have one width and one type"
    );
    assert_eq!(with(&|key| proto::Projected { dtype: 4, ..key }), "DTYPE: 4");
    let other = refused(|message| {
        let projection = message.projection.as_mut().unwrap();
        (projection.same_rows, projection.key) =
            (false, Some(proto::Projected { width: u32::MAX, ..projection.key.unwrap() }));
    });
    assert_eq!(other, "SHAPE_LIMIT: w_k has rows of 4294967295 elements, 1 to 65536 make a key or a value");
    let other = refused(|message| {
        let projection = message.projection.as_mut().unwrap();
        (projection.same_rows, projection.value) =
            (false, Some(proto::Projected { width: 0, ..projection.value.unwrap() }));
    });
    assert_eq!(other, "SHAPE_LIMIT: w_v has rows of 0 elements, 1 to 65536 make a key or a value");
    assert_eq!(refused(|message| message.projection = Some(proto::Projection::default())), "DTYPE: 0");
    assert_eq!(refused(|message| message.dtype = 2), "COMBINATION: projection and dtype=f16");
    let latent = |message: &mut proto::AttendBegin| {
        message.shape.as_mut().unwrap().value_is_key_prefix = true;
    };
    assert_eq!(refused(latent), "COMBINATION: projection and value_is_key_prefix");
    let uniform = |message: &mut proto::AttendBegin| {
        let empty_row = proto::EmptyRow::Uniform.into();
        message.operator = Some(proto::Operator { empty_row, ..Default::default() });
    };
    assert_eq!(refused(uniform), "COMBINATION: projection and empty_row=uniform");
    let mut to_worker = proto::ComputeBegin::from(compute_begin(&same_rows(), false));
    to_worker.dtype = 3;
    let error = ComputeBegin::try_from(to_worker).unwrap_err();
    assert_eq!(error.message(), "COMBINATION: projection and dtype=bf16");
}

/// The largest call that can be said has sizes that 64 bits hold.
#[test]
fn no_size_overflows() {
    let dims = Dims {
        batch: 1024,
        heads: 1,
        kv_heads: 1,
        queries: 65_536,
        keys: 1 << 20,
        head_dim: 1024,
        value_dim: 1024,
    };
    let shape = AttnShape::new(dims).unwrap();
    let key = projected(Dtype::F32, attnd_plan::MAX_WIDTH, true);
    let projection = Projection { key, value: key, same_rows: false };
    let sides = Sides::new(projection.layouts(&shape).unwrap()).unwrap();
    let matrix = (65_536 + 1) * 1024 * 4;
    assert_eq!(sides.bytes(), 2 * ((1_u64 << (10 + 20 + 16 + 2)) + matrix));
    let pieces = [Piece { groups: 0..1024, slots: 0..64 }];
    let parts = sides.iter().flat_map(|layout| {
        let parts = layout.parts(&pieces, &shape);
        parts.into_iter().map(|part| layout.resident_bytes(&part, &shape)).collect::<Vec<u64>>()
    });
    assert_eq!(parts.sum::<u64>(), 2 * ((1_u64 << 48) + 2 * matrix));
}

#[test]
fn keys_that_are_made_are_not_sent() {
    let begun = begin(&same_rows(), false);
    let chunk = |tensor: AnyTensor, len: usize| {
        let chunk = TensorChunk { index: 0, tensor, offset: None, data: vec![0; len].into() };
        AttendRequest::decode(AttendRequest::Chunk(chunk).into(), Some(&begun)).map_err(|e| e.message())
    };
    for tensor in [SideTensor::KeyMatrix, SideTensor::ValueMatrix, SideTensor::Source] {
        assert!(chunk(tensor.into(), 28).is_ok(), "{tensor}");
    }
    assert_eq!(
        chunk(SideTensor::ValueSource.into(), 28),
        Err("TENSOR: value_source, and Begin has no projection.value_source".into())
    );
    assert_eq!(chunk(SideTensor::Source.into(), 27), Err("PAYLOAD_LENGTH: 27 not a multiple of 2".into()));
    assert_eq!(chunk(SideTensor::KeyMatrix.into(), 6), Err("PAYLOAD_LENGTH: 6 not a multiple of 4".into()));
    // Whether K is expected is for the state machine of the call to say; a worker sees it here.
    let begun = compute_begin(&same_rows(), false);
    let slice = |tensor: AnyTensor, offset: u64| {
        let chunk = SliceChunk { index: 0, tensor, head: 1, offset, data: vec![0; 8].into() };
        ComputeRequest::decode(ComputeRequest::Chunk(chunk).into(), Some(&begun)).map_err(|e| e.message())
    };
    let k = attnd_plan::Tensor::K;
    assert_eq!(slice(k.into(), 0), Err("PAYLOAD_LENGTH: k head 1: 8 bytes at 0 of 0".into()));
    assert!(slice(SideTensor::Source.into(), 14).is_ok());
    assert_eq!(
        slice(SideTensor::Source.into(), 3),
        Err("PAYLOAD_LENGTH: source part 1: 8 bytes at 3".into())
    );
    // A call that sends keys has none of it.
    let sent = Begin { shape: shape(), sides: Sides::default(), ..begin(&same_rows(), false) };
    let chunk =
        TensorChunk { index: 0, tensor: SideTensor::Source.into(), offset: None, data: vec![0; 4].into() };
    let error = AttendRequest::decode(AttendRequest::Chunk(chunk).into(), Some(&sent)).unwrap_err();
    assert_eq!(error.message(), "TENSOR: source, and Begin has no projection");
}

/// Score functions have their own key rows, which are made of those that are made.
#[test]
fn functions_that_make_other_keys_are_allowed() {
    let score = Score::new("cosine", Vec::new()).unwrap();
    let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
    let operator = Operator::new(parts, &shape()).unwrap();
    assert_eq!(check(&shape().with_projected_kv(), Dtype::F32, &operator), Ok(()));
    assert_eq!(check(&shape(), Dtype::F16, &operator), Ok(()), "nothing is made");
}
