//! What travels beside an operator returns from its messages, and every way to be wrong has its text.

use std::sync::Arc;

use attnd_kernel::slot::Node;
use attnd_kernel::{Causal, Dims, OperatorParts, PartialRows};
use attnd_plan::{CellId, Piece};
use proptest::prelude::*;

use super::*;
use crate::compute::{CallShape, ComputeBegin, ComputeRequest, Partial, SliceChunk};
use crate::operator::Encoded;
use crate::operator::tests::operators;

fn layouts(tensor: SideTensor, shape: AttnShape) -> impl Strategy<Value = SideLayout> {
    let floats = &[Dtype::F32, Dtype::F16, Dtype::Bf16][..];
    (any::<[bool; 3]>(), 1..=shape.n_keys(), proptest::sample::select(floats)).prop_map(
        move |(ones, keys, dtype)| {
            let [batch, heads, queries] =
                [(ones[0], shape.batch()), (ones[1], shape.n_heads()), (ones[2], shape.n_queries())]
                    .map(|(one, all)| if one { 1 } else { all });
            let element = match tensor {
                SideTensor::Mask => Element::Bool,
                _numbers => Element::Float(dtype),
            };
            let keys = if tensor == SideTensor::Previous { shape.n_keys() } else { keys };
            SideLayout::dense(tensor, element, [batch, heads, queries, keys], &shape).unwrap()
        },
    )
}

/// Operators that read tensors beside them, or don't.
pub(crate) fn operators_and_sides() -> impl Strategy<Value = (AttnShape, Arc<Operator>, Sides)> {
    let beside = |(shape, operator): (AttnShape, Arc<Operator>)| {
        let maybe = |tensor| proptest::option::weighted(0.4, layouts(tensor, shape));
        let previous = layouts(SideTensor::Previous, shape);
        (Just(shape), Just(operator), maybe(SideTensor::Mask), maybe(SideTensor::Bias), previous)
    };
    operators().prop_flat_map(beside).prop_map(|(shape, operator, mask, bias, previous)| {
        let mut biases = operator.biases().to_vec();
        biases.extend(bias.map(|_| Bias::Dense));
        let previous = operator.reads_previous().then_some(previous);
        let parts = OperatorParts {
            score: operator.score().clone(),
            csr: operator.csr().cloned(),
            scale: operator.scale(),
            softcap: operator.softcap(),
            biases,
            mask: operator.mask().clone(),
            selection: mask.map(|_| Selection::Dense),
            normaliser: operator.normaliser(),
            sinks: operator.sinks().map(Arc::from),
            empty_row: operator.empty_row(),
        };
        let operator = Arc::new(Operator::new(parts, &shape).unwrap());
        let sides = Sides::new(bias.into_iter().chain(mask).chain(previous).collect()).unwrap();
        (shape, operator, sides)
    })
}

/// Two elements of two heads, 3 queries, 5 keys.
fn shape() -> AttnShape {
    let dims = Dims { batch: 2, heads: 2, kv_heads: 1, queries: 3, keys: 5, head_dim: 1, value_dim: 1 };
    AttnShape::new(dims).unwrap()
}

fn dense(dtype: i32, [batch, heads, queries, keys]: [u32; 4]) -> proto::Dense {
    proto::Dense { dtype, batch, heads, queries, keys }
}

fn with(mask: Option<proto::Dense>, biases: &[proto::Dense]) -> Encoded {
    let bias = |dense: &proto::Dense| proto::Bias { kind: Some(bias::Kind::Dense(*dense)) };
    let operator = proto::Operator {
        mask: mask.map(|dense| proto::Mask { dense: Some(dense), ..Default::default() }),
        biases: biases.iter().map(bias).collect(),
        ..Default::default()
    };
    Encoded { scale: 1.0, causal: 0, operator: Some(operator) }
}

/// A call with a mask of bools for all heads and queries.
fn begin() -> ComputeBegin {
    let parts =
        OperatorParts { selection: Some(Selection::Dense), ..OperatorParts::plain(1.0, Causal::None) };
    let layout = SideLayout::dense(SideTensor::Mask, Element::Bool, [1, 1, 1, 5], &shape()).unwrap();
    ComputeBegin {
        call_id: 1,
        shape: shape(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::new(parts, &shape()).unwrap()),
        outputs: None,
        sides: Sides::new(vec![layout]).unwrap(),
        allow_non_finite: false,
        pieces: vec![Piece { groups: 0..2, slots: 0..64 }],
        tokens_per_cell: 3,
    }
}

#[test]
fn what_makes_no_sense_is_named() {
    let refused = |encoded: Encoded| encoded.sides(&shape()).unwrap_err().message();
    let (f16, bool) = (2, 4);
    assert_eq!(
        refused(with(Some(dense(bool, [3, 1, 1, 5])), &[])),
        "OPERATOR: mask.dense is [3, 1, 1, 5], the call needs [1 or 2, 1 or 2, 1 or 3, 1 to 5]"
    );
    assert_eq!(
        refused(with(None, &[dense(f16, [1, 1, 3, 6])])),
        "OPERATOR: bias.dense is [1, 1, 3, 6], the call needs [1 or 2, 1 or 2, 1 or 3, 1 to 5]"
    );
    assert_eq!(
        refused(with(Some(dense(f16, [1, 1, 1, 5])), &[])),
        "OPERATOR: mask.dense is f16: a mask is bool, and a mask of numbers is a bias"
    );
    assert_eq!(refused(with(None, &[dense(9, [1; 4])])), "DTYPE: 9");
    assert_eq!(refused(with(None, &[dense(f16, [1; 4]); 2])), "COMBINATION: bias.dense twice");
    assert_eq!(refused(with(None, &[dense(f16, [1; 4]); 1025])), "COUNT: biases 1025 > 1024");
    let unknown = proto::Operator { biases: vec![proto::Bias { kind: None }], ..Default::default() };
    let unknown = Encoded { scale: 1.0, causal: 0, operator: Some(unknown) };
    assert_eq!(
        unknown.decode(&shape(), &Sides::default()).unwrap_err().message(),
        "OPERATOR: biases[0] is of no kind that this node knows"
    );
}

#[test]
fn chunks_are_of_tensors_that_the_call_has() {
    let decode = |tensor: SideTensor, offset, data: &'static [u8]| {
        let chunk = SliceChunk {
            index: 0,
            tensor: tensor.into(),
            head: 0,
            offset,
            data: bytes::Bytes::from_static(data).into(),
        };
        let request = ComputeRequest::Chunk(chunk);
        let decoded = ComputeRequest::decode(request.clone().into(), Some(&begin()));
        decoded.map(|decoded| assert_eq!(decoded, request)).map_err(|error| error.message())
    };
    assert_eq!(decode(SideTensor::Mask, 1, &[1, 0, 1]), Ok(()));
    let refused = "TENSOR: bias, and Begin has no bias.dense";
    assert_eq!(decode(SideTensor::Bias, 0, &[0; 4]), Err(refused.to_owned()));
}

#[test]
fn rows_of_a_dense_mask_may_see_fewer_keys_than_their_interval_has() {
    let cell = CellId { group: 0, node: Node::ROOT, first_token: 0, tokens: 3, keys: 5 };
    let decode = |l: f32, call: &CallShape| {
        let m = if l == 0.0 { f32::NEG_INFINITY } else { 0.0 };
        let rows = PartialRows { value_dim: 1, m: vec![m; 6], l: vec![l; 6], o: vec![0.0; 6] };
        Partial::decode(Partial { cell, rows }.into(), call).is_ok()
    };
    let masked = CallShape::from(&begin());
    let plain = CallShape { operator: Arc::new(Operator::plain(1.0, Causal::None)), ..masked.clone() };
    assert_eq!([0.0, 1.0, 5.0, 8.0].map(|l| decode(l, &masked)), [true, true, true, false]);
    assert_eq!([0.0, 1.0, 5.0, 8.0].map(|l| decode(l, &plain)), [false, true, true, false]);
}

#[test]
#[should_panic = "dense tensors that the operator reads"]
fn an_operator_without_its_tensors_is_no_message() {
    Encoded::new(&begin().operator, &Sides::default());
}

proptest! {
    #[test]
    fn operators_return_with_what_is_beside_them((shape, operator, sides) in operators_and_sides()) {
        let encoded = Encoded::new(&operator, &sides);
        prop_assert_eq!(encoded.sides(&shape), Ok(sides));
        prop_assert_eq!(encoded.decode(&shape, &Sides::default()), Ok(operator));
    }

    #[test]
    fn no_dimensions_panic(dims in any::<[u32; 4]>(), tiny in any::<bool>(), dtype in -1..6_i32, is_mask in any::<bool>()) {
        let dense = dense(dtype, dims.map(|dim| if tiny { dim % 7 } else { dim }));
        let encoded = if is_mask { with(Some(dense), &[]) } else { with(None, &[dense]) };
        if let Ok(sides) = encoded.sides(&shape()) {
            prop_assert_eq!(sides.len(), 1);
            prop_assert!(sides.bytes() > 0);
        }
    }
}
