//! Every byte goes exactly where it is used, in any chunking, and what the planner counts is what there is.

use std::collections::BTreeMap;

use attnd_kernel::Dims;
use proptest::prelude::*;

use super::arrival::SideMisplaced;
use super::*;
use crate::arrival::Misplaced::{Jump, PastTheEnd};
use crate::line::Line;
use crate::planner::tests::{AnyCall, any_call, planned, request};
use crate::planner::{Plan, PlanRequest, WorkerChoice};

/// What of `[batch, heads, queries]` is 1, how short of keys it is, and which element type.
pub(crate) type AnySide = ([bool; 3], f64, usize);

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

pub(crate) fn any_side() -> impl Strategy<Value = AnySide> {
    (any::<[bool; 3]>(), prop_oneof![Just(1.0), 0.0..1.0_f64], 0usize..3)
}

pub(crate) fn layout(tensor: SideTensor, (ones, short, dtype): &AnySide, shape: &AttnShape) -> SideLayout {
    let full = [shape.batch(), shape.n_heads(), shape.n_queries()];
    let size = |i: usize| if ones[i] { 1 } else { full[i] };
    let short = if tensor.may_lack_keys() { *short } else { 1.0 };
    let keys = ((shape.n_keys() as f64 * short).ceil() as usize).clamp(1, shape.n_keys());
    let element = match tensor {
        SideTensor::Mask => Element::Bool,
        _numbers => Element::Float(DTYPES[*dtype]),
    };
    SideLayout::dense(tensor, element, [size(0), size(1), size(2), keys], shape).unwrap()
}

/// The last one is like the mask.
fn sides(mask: &AnySide, bias: &AnySide, shape: &AttnShape) -> Sides {
    let tensors = [(SideTensor::Bias, bias), (SideTensor::Previous, mask), (SideTensor::Mask, mask)];
    Sides::new(tensors.map(|(tensor, any)| layout(tensor, any, shape)).to_vec()).unwrap()
}

/// Widths of rows, which biases there are, and which types rows have.
pub(crate) type AnyProjection = ([usize; 2], [bool; 3], [usize; 2]);

fn any_projection() -> impl Strategy<Value = AnyProjection> {
    ([1usize..40, 1usize..40], any::<[bool; 3]>(), [0usize..3, 0usize..3])
}

fn projection((widths, has, dtypes): &AnyProjection) -> Projection {
    let [key, value] =
        [0, 1].map(|at| Projected { dtype: DTYPES[dtypes[at]], width: widths[at], has_bias: has[at] });
    let value = if has[2] { Projected { has_bias: has[1], ..key } } else { value };
    Projection { key, value, same_rows: has[2] }
}

/// A plan, and what travels beside its operands: not more than 2^20 bytes, because each is looked at.
fn drawn(call: &AnyCall, mask: &AnySide, bias: &AnySide) -> Option<(AttnShape, Plan, Sides)> {
    let (shape, plan) = planned(call, 1 << 15)?;
    let sides = sides(mask, bias, &shape);
    (sides.bytes() <= 1 << 20).then_some((shape, plan, sides))
}

/// Whether a share computes with the element of a plane at a key: said of elements, not of pieces.
fn needs(shape: &AttnShape, pieces: &[Piece], layout: &SideLayout, plane: usize, key: usize) -> bool {
    let [batch, heads, ..] = layout.dims();
    let (of_batch, of_head) = (plane / heads, plane % heads);
    let slot = slot::slot_of_page(key / PAGE_KEYS);
    (0..shape.batch() * shape.n_heads()).any(|head| {
        let (b, h) = (head / shape.n_heads(), head % shape.n_heads());
        let looks = (batch == 1 || b == of_batch) && (heads == 1 || h == of_head);
        let group = head / shape.group_size();
        let has_key = |piece: &Piece| !layout.tensor().is_along_keys() || piece.slots.contains(&slot);
        looks && pieces.iter().any(|piece| piece.groups.contains(&group) && has_key(piece))
    })
}

proptest! {
    #[test]
    fn every_byte_goes_where_it_is_used(call in any_call(), mask in any_side(), bias in any_side()) {
        let Some((shape, plan, sides)) = drawn(&call, &mask, &bias) else { return Ok(()) };
        let cutter = Cutter::new(&plan, &shape, &sides);
        for layout in sides.iter() {
            let (size, [_, _, rows, columns]) = (layout.element().size(), layout.dims());
            let total = layout.bytes() as usize;
            // Of each share and part, its matrix: which byte of the tensor lies at each place.
            let mut matrices: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
            for Gathered { share, part, offset, runs } in cutter.cut(layout.tensor(), 0, total) {
                let matrix = matrices.entry((share, part)).or_default();
                prop_assert_eq!(matrix.len() as u64, offset, "parts come front to back");
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "runs are apart");
                prop_assert!(runs.iter().all(|run| !run.is_empty()) && !runs.is_empty());
                matrix.extend(runs.into_iter().flatten());
            }
            for (share, of_worker) in plan.shares.iter().enumerate() {
                let parts = layout.parts(&of_worker.pieces, &shape);
                let mut got = 0;
                for (at, part) in parts.iter().enumerate() {
                    let matrix = matrices.remove(&(share, at)).unwrap_or_default();
                    got += matrix.len();
                    prop_assert_eq!(matrix.len() as u64, layout.part_bytes(part));
                    let wanted = (0..rows).flat_map(|row| {
                        let of_part = |key: &usize| part.slots.contains(&slot::slot_of_page(key / PAGE_KEYS));
                        (0..columns).filter(of_part).flat_map(move |key| {
                            let element = (part.plane * rows + row) * columns + key;
                            element * size..(element + 1) * size
                        })
                    });
                    prop_assert!(matrix.into_iter().eq(wanted), "share {} part {:?}", share, part);
                }
                // Nothing that isn't looked at, nothing twice, nothing missing.
                let mut needed = 0;
                for plane in 0..layout.n_planes() {
                    let of_page = |key: &usize| needs(&shape, &of_worker.pieces, layout, plane, *key);
                    let keys = (0..columns).step_by(PAGE_KEYS).filter(of_page);
                    needed += keys.map(|key| slot::keys_in_page(key / PAGE_KEYS, columns)).sum::<usize>();
                }
                prop_assert_eq!(got, needed * rows * size);
                // Who computes a piece finds all of its slots in one part.
                for piece in &of_worker.pieces {
                    for group in piece.groups.clone() {
                        for plane in layout.planes_of(group, &shape) {
                            let holds = |part: &&PlanePart| part.plane == plane
                                && part.slots.start <= piece.slots.start && piece.slots.end <= part.slots.end;
                            prop_assert_eq!(parts.iter().filter(holds).count(), 1);
                        }
                    }
                }
            }
            prop_assert!(matrices.is_empty(), "{:?} are parts of nobody", matrices.keys());
        }
    }

    #[test]
    fn chunking_changes_nothing(
        call in any_call(),
        mask in any_side(),
        bias in any_side(),
        sizes in proptest::collection::vec(1usize..9000, 1..20),
    ) {
        let Some((shape, plan, sides)) = drawn(&call, &mask, &bias) else { return Ok(()) };
        let cutter = Cutter::new(&plan, &shape, &sides);
        for layout in sides.iter() {
            let (tensor, total) = (layout.tensor(), layout.bytes() as usize);
            let put = |matrices: &mut BTreeMap<_, Vec<usize>>, at: usize, gathered: Vec<Gathered>| {
                for Gathered { share, part, offset, runs } in gathered {
                    let matrix = matrices.entry((share, part)).or_default();
                    assert_eq!(matrix.len() as u64, offset);
                    matrix.extend(runs.into_iter().flatten().map(|byte| at + byte));
                }
            };
            let mut whole = BTreeMap::new();
            put(&mut whole, 0, cutter.cut(tensor, 0, total));
            let (mut pieces, mut at) = (BTreeMap::new(), 0);
            for size in sizes.iter().cycle() {
                let len = (*size).min(total - at);
                put(&mut pieces, at, cutter.cut(tensor, at as u64, len));
                at += len;
                if at == total { break }
            }
            prop_assert_eq!(&pieces, &whole);
            prop_assert!(cutter.cut(tensor, total as u64, 10).is_empty());
            prop_assert!(cutter.cut(tensor, u64::MAX - 20, 10).is_empty());
        }
    }

    /// The planner's shortcuts against a sum over all parts, for any interval of its line.
    #[test]
    fn what_an_interval_costs_is_the_sum_of_its_parts(
        call in any_call(),
        mask in any_side(),
        bias in any_side(),
        cuts in any::<[prop::sample::Index; 2]>(),
    ) {
        let shape = AttnShape::new(call.0).unwrap();
        let sides = sides(&mask, &bias, &shape);
        let bare = request(shape, WorkerChoice::Auto);
        let line = Line::new(&PlanRequest { sides: sides.clone(), ..bare.clone() }, 1);
        let bare = Line::new(&bare, 1);
        let [a, b] = cuts.map(|cut| cut.index(line.len() + 1));
        let places = a.min(b)..a.max(b);
        let pieces = line.pieces(&places);
        let (mut sent, mut resident) = (0, 0);
        for layout in sides.iter() {
            for part in layout.parts(&pieces, &shape) {
                sent += layout.part_bytes(&part);
                resident += layout.resident_bytes(&part, &shape);
                let allocated = match layout.tensor() {
                    SideTensor::Previous => {
                        (layout.rows() * shape.n_keys().next_multiple_of(PAGE_KEYS) * 4) as u64
                    }
                    tensor => {
                        let is_bias = tensor == SideTensor::Bias;
                        DensePlane::bytes_needed(layout.rows(), shape.n_keys(), &part.slots, is_bias)
                    }
                };
                prop_assert_eq!(layout.resident_bytes(&part, &shape), allocated, "what a worker allocates");
            }
        }
        prop_assert_eq!(line.side_bytes(&places), sent);
        prop_assert_eq!(line.resident_bytes(&places) - bare.resident_bytes(&places), resident);
    }
}

proptest! {
    /// A row of the source goes to each share that has a key of it in any head, once; a matrix to each share of its head, once.
    #[test]
    fn rows_and_matrices_go_where_keys_are_made_of_them(
        call in any_call(),
        any in any_projection(),
        sizes in proptest::collection::vec(1usize..9000, 1..20),
    ) {
        let Some((shape, plan)) = planned(&call, 1 << 14) else { return Ok(()) };
        let projection = projection(&any);
        let sides = Sides::new(projection.layouts(&shape).unwrap()).unwrap();
        prop_assert_eq!(Projection::of(&sides), Some(projection));
        if sides.bytes() > 1 << 21 { return Ok(()) }
        let cutter = Cutter::new(&plan, &shape, &sides);
        for layout in sides.iter() {
            let (total, size) = (layout.bytes() as usize, layout.column_bytes());
            let (mut got, mut at) = (BTreeMap::<(usize, usize), Vec<usize>>::new(), 0);
            for chunk in sizes.iter().cycle() {
                let len = (*chunk).min(total - at);
                for Gathered { share, part, offset, runs } in cutter.cut(layout.tensor(), at as u64, len) {
                    let matrix = got.entry((share, part)).or_default();
                    prop_assert_eq!(matrix.len() as u64, offset, "parts come front to back");
                    matrix.extend(runs.into_iter().flatten().map(|byte| at + byte));
                }
                at += len;
                if at == total { break }
            }
            for (share, of_worker) in plan.shares.iter().enumerate() {
                let has = |group: usize, slot: usize| of_worker.pieces.iter()
                    .any(|piece| piece.groups.contains(&group) && piece.slots.contains(&slot));
                let mut came: Vec<usize> = Vec::new();
                let parts = layout.parts(&of_worker.pieces, &shape);
                for (at, part) in parts.iter().enumerate() {
                    let matrix = got.remove(&(share, at)).unwrap_or_default();
                    prop_assert_eq!(matrix.len() as u64, layout.part_bytes(part));
                    prop_assert_eq!(matrix.len(), layout.part_elements(part) * layout.element().size());
                    came.extend(matrix);
                }
                came.sort_unstable();
                let wanted: Vec<usize> = match layout.tensor() {
                    SideTensor::KeyMatrix | SideTensor::ValueMatrix => {
                        let bytes = total / shape.n_kv_heads();
                        let heads = (0..shape.n_kv_heads()).filter(|head| {
                            (0..shape.batch()).any(|batch| (0..N_SLOTS).any(|slot| has(batch * shape.n_kv_heads() + head, slot)))
                        });
                        heads.flat_map(|head| head * bytes..(head + 1) * bytes).collect()
                    }
                    _ => (0..shape.batch() * shape.n_keys()).filter(|row| {
                        let (batch, slot) = (row / shape.n_keys(), slot::slot_of_page(row % shape.n_keys() / PAGE_KEYS));
                        (0..shape.n_kv_heads()).any(|head| has(batch * shape.n_kv_heads() + head, slot))
                    }).flat_map(|row| row * size..(row + 1) * size).collect(),
                };
                prop_assert!(came == wanted, "{} of share {share}", layout.tensor());
            }
            prop_assert!(got.is_empty(), "{:?} are parts of nobody", got.keys());
        }
    }

    /// As for masks and biases.
    #[test]
    fn what_an_interval_makes_keys_of_is_the_sum_of_its_parts(
        call in any_call(),
        any in any_projection(),
        cuts in any::<[prop::sample::Index; 2]>(),
    ) {
        let shape = AttnShape::new(call.0).unwrap();
        let sides = Sides::new(projection(&any).layouts(&shape).unwrap()).unwrap();
        let bare = PlanRequest { shape: shape.with_projected_kv(), ..request(shape, WorkerChoice::Auto) };
        let line = Line::new(&PlanRequest { sides: sides.clone(), ..bare.clone() }, 1);
        let bare = Line::new(&bare, 1);
        let [a, b] = cuts.map(|cut| cut.index(line.len() + 1));
        let places = a.min(b)..a.max(b);
        let pieces = line.pieces(&places);
        let parts = |layout: &SideLayout| -> Vec<(u64, u64)> {
            let parts = layout.parts(&pieces, &shape);
            parts.iter().map(|part| (layout.part_bytes(part), layout.resident_bytes(part, &shape))).collect()
        };
        let of_parts: Vec<(u64, u64)> = sides.iter().flat_map(parts).collect();
        let sent = of_parts.iter().map(|(sent, _)| sent).sum::<u64>();
        prop_assert_eq!((line.side_bytes(&places), line.source_bytes(&places)), (sent, sent));
        let resident = of_parts.iter().map(|(_, resident)| resident).sum::<u64>();
        prop_assert_eq!(line.resident_bytes(&places) - bare.resident_bytes(&places), resident);
    }
}

#[test]
fn widths_that_make_no_keys_are_refused() {
    let of = |width| Projected { dtype: Dtype::F32, width, has_bias: false };
    let refused = |key, value, same_rows| {
        Projection { key, value, same_rows }.layouts(&shape()).unwrap_err().to_string()
    };
    assert_eq!(refused(of(0), of(3), false), "w_k has rows of 0 elements, 1 to 65536 make a key or a value");
    assert_eq!(
        refused(of(1), of(65_537), false),
        "w_v has rows of 65537 elements, 1 to 65536 make a key or a value"
    );
    let rows = "values are made of the rows of keys, which have one width and one type";
    assert_eq!(refused(of(1), of(2), true), rows);
    assert_eq!(refused(of(1), Projected { dtype: Dtype::F16, ..of(1) }, true), rows);
    // A plan of f16 rows: half as much travels, and as much is resident.
    let sides = |dtype| {
        let of = Projected { dtype, width: 8, has_bias: true };
        Sides::new(Projection { key: of, value: of, same_rows: true }.layouts(&shape()).unwrap()).unwrap()
    };
    let matrices = 2 * 2 * (8 + 1) * 4;
    assert_eq!(sides(Dtype::F32).bytes(), matrices + 2 * 600 * 8 * 4);
    assert_eq!(sides(Dtype::F16).bytes(), matrices + 2 * 600 * 8 * 2);
}

fn shape() -> AttnShape {
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 600, head_dim: 1, value_dim: 1 };
    AttnShape::new(dims).unwrap()
}

#[test]
fn dimensions_that_are_not_the_calls_are_refused_with_all_numbers() {
    let dense = |tensor, element, dims| SideLayout::dense(tensor, element, dims, &shape());
    let (mask, bias, f16) = (SideTensor::Mask, SideTensor::Bias, Element::Float(Dtype::F16));
    for dims in [[1, 1, 1, 1], [2, 4, 3, 600], [1, 4, 3, 599], [2, 1, 1, 600]] {
        assert_eq!(dense(mask, Element::Bool, dims).unwrap().dims(), dims);
        assert_eq!(dense(bias, f16, dims).unwrap().dims(), dims);
    }
    for dims in [[0, 1, 1, 1], [3, 4, 3, 600], [1, 2, 3, 600], [1, 1, 2, 600], [1, 1, 1, 601], [1, 1, 1, 0]] {
        let text = format!("mask.dense is {dims:?}, the call needs [1 or 2, 1 or 4, 1 or 3, 1 to 600]");
        assert_eq!(dense(mask, Element::Bool, dims).unwrap_err().to_string(), text);
    }
    let previous = dense(SideTensor::Previous, f16, [1, 1, 1, 599]).unwrap_err();
    assert_eq!(
        previous.to_string(),
        "score.previous is [1, 1, 1, 599], the call needs [1 or 2, 1 or 4, 1 or 3, 600]"
    );
    let text = |error: SideError| error.to_string();
    assert_eq!(
        text(dense(mask, f16, [1; 4]).unwrap_err()),
        "mask.dense is f16: a mask is bool, and a mask of numbers is a bias"
    );
    assert!(dense(bias, Element::Bool, [1; 4]).is_err());
    let twice = [[1; 4], [2, 1, 1, 5]].map(|dims| dense(mask, Element::Bool, dims).unwrap());
    assert_eq!(text(Sides::new(twice.to_vec()).unwrap_err()), "mask.dense twice");
}

#[test]
fn tensors_come_in_one_order_and_front_to_back() {
    let layouts = vec![
        SideLayout::dense(SideTensor::Bias, Element::Float(Dtype::F32), [1, 1, 3, 600], &shape()).unwrap(),
        SideLayout::dense(SideTensor::Mask, Element::Bool, [1, 1, 1, 600], &shape()).unwrap(),
    ];
    let sides = Sides::new(layouts).unwrap();
    assert_eq!(sides.bytes(), 600 + 7200);
    let mut arrivals = SideArrivals::new(&sides);
    let (mask, bias) = (SideTensor::Mask, SideTensor::Bias);
    assert_eq!(arrivals.check_operand(), Err(SideMisplaced::Before(mask)));
    assert_eq!(arrivals.take(bias, None, 4), Err(SideMisplaced::Before(mask)));
    assert_eq!(arrivals.take(mask, None, 100), Ok(0));
    let place = |why| Err(SideMisplaced::Place(why));
    assert_eq!(arrivals.take(mask, Some(99), 1), place(Jump { start: 99, expected: 100 }));
    assert_eq!(arrivals.take(mask, Some(101), 1), place(Jump { start: 101, expected: 100 }));
    assert_eq!(arrivals.take(mask, None, 501), place(PastTheEnd { bytes: 100..601, need: 600 }));
    assert_eq!(arrivals.take(mask, Some(100), 500), Ok(100));
    assert_eq!(arrivals.check_operand(), Err(SideMisplaced::Before(bias)));
    assert_eq!(arrivals.take(mask, None, 1), place(PastTheEnd { bytes: 600..601, need: 600 }));
    assert_eq!(arrivals.take(bias, None, 7200), Ok(0));
    assert_eq!(arrivals.check_operand(), Ok(()));
    assert_eq!(arrivals.tensors().iter().map(|arrival| arrival.got).sum::<u64>(), sides.bytes());
    let mut none = SideArrivals::new(&Sides::default());
    assert_eq!(none.check_operand(), Ok(()));
    assert_eq!(none.take(mask, None, 5), place(PastTheEnd { bytes: 0..5, need: 0 }));
}
