//! Parts as the coordinator cuts them become planes; what is no part, or no element, is named.

use attnd_kernel::slot::{self, N_SLOTS};
use attnd_kernel::{
    Bias, Causal, Dims, Dtype, Effective, GroupCall, Kernels, KvHead, Operator, OperatorParts, Selection,
    Side, attend_node,
};
use attnd_plan::{Cutter, Gathered, Plan, Share};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::budget::Budget;

const DIMS: Dims =
    Dims { batch: 2, heads: 4, kv_heads: 2, queries: 5, keys: 1900, head_dim: 3, value_dim: 2 };

fn shape() -> AttnShape {
    AttnShape::new(DIMS).unwrap()
}

fn sides(mask: [usize; 4], bias: [usize; 4], dtype: Dtype) -> Sides {
    Sides::new(vec![
        SideLayout::dense(SideTensor::Mask, Element::Bool, mask, &shape()).unwrap(),
        SideLayout::dense(SideTensor::Bias, Element::Float(dtype), bias, &shape()).unwrap(),
    ])
    .unwrap()
}

/// Two workers: the end of the first group, and the second with the beginning of the third and all of the last.
fn plan() -> Plan {
    let share = |name: &str, pieces: &[(Range<usize>, Range<usize>)]| Share {
        worker: name.parse().unwrap(),
        pieces: pieces.iter().cloned().map(|(groups, slots)| Piece { groups, slots }).collect(),
        kv_bytes: 1,
        resident_bytes: 1,
    };
    let all = 0..N_SLOTS;
    let shares = vec![
        share("a", &[(0..1, 20..64), (1..2, all.clone()), (2..3, 0..11)]),
        share("b", &[(0..1, 0..20), (2..3, 11..64), (3..4, all)]),
    ];
    Plan { shares, tokens_per_cell: 5, reason: String::new(), predicted_seconds: 1.0, sent_bytes: 0 }
}

fn random_bytes(layout: &SideLayout, rng: &mut StdRng) -> Vec<u8> {
    let elements = layout.bytes() as usize / layout.element().size();
    match layout.element() {
        Element::Bool => (0..elements).map(|_| u8::from(rng.random::<bool>())).collect(),
        Element::Float(dtype) => (0..elements)
            .flat_map(|_| {
                let x =
                    if rng.random_range(0..9) == 0 { f32::NEG_INFINITY } else { rng.random_range(-3.0..3.0) };
                match dtype {
                    Dtype::F32 => x.to_le_bytes().to_vec(),
                    // The upper half of an f32 is a bf16.
                    _ => x.to_le_bytes()[2..].to_vec(),
                }
            })
            .collect(),
    }
}

fn assembly(sides: &Sides, pieces: &[Piece], budget: &Arc<Budget>) -> SideAssembly {
    let memory = budget.reserve(bytes_needed(sides, pieces, &shape())).unwrap();
    SideAssembly::new(sides, pieces, shape(), true, memory)
}

/// A plane of the whole tensor, written page by page from where its elements are.
fn whole_plane(layout: &SideLayout, bytes: &[u8], plane: usize) -> DensePlane {
    let slots = 0..N_SLOTS;
    let part = PlanePart { plane, slots };
    let mut written = reserve(layout, &part, &shape()).unwrap();
    let (rows, columns, size) = (layout.rows(), layout.columns(), layout.element().size());
    for row in 0..rows {
        for first in (0..columns).step_by(PAGE_KEYS) {
            let keys = first..columns.min(first + PAGE_KEYS);
            let start = ((plane * rows + row) * columns + keys.start) * size;
            let page = first / PAGE_KEYS;
            store(&mut written, layout, &part, (row, page), &bytes[start..start + keys.len() * size])
                .unwrap();
        }
    }
    match written {
        Plane::Dense(written) => written,
        Plane::Whole(_) | Plane::Matrix(_) => panic!("{} has no slots", layout.tensor()),
    }
}

/// The chain from the client's bytes to partials: what a worker assembles of the parts that the coordinator cuts has
/// the bits of planes that hold everything.
#[test]
fn any_cut_of_the_bytes_gives_the_same_planes() {
    let shape = shape();
    let kernels = Kernels::from_env().unwrap();
    let dense = OperatorParts {
        selection: Some(Selection::Dense),
        biases: vec![Bias::Dense],
        ..OperatorParts::plain(0.5, Causal::None)
    };
    let operator = Operator::new(dense, &shape).unwrap();
    for (seed, mask, bias, dtype) in [
        (1, [2, 4, 5, 1900], [1, 1, 5, 1900], Dtype::F32),
        (2, [1, 1, 1, 1900], [2, 1, 5, 700], Dtype::Bf16),
        (3, [1, 4, 5, 301], [1, 4, 1, 1900], Dtype::F32),
        (4, [2, 1, 1, 1], [2, 4, 5, 1899], Dtype::Bf16),
    ] {
        let mut rng = StdRng::seed_from_u64(seed);
        let sides = sides(mask, bias, dtype);
        let tensors: Vec<Vec<u8>> = sides.iter().map(|layout| random_bytes(layout, &mut rng)).collect();
        let plan = plan();
        let cutter = Cutter::new(&plan, &shape, &sides);
        let budget = Budget::new(1 << 30);
        let mut shares: Vec<SideAssembly> =
            plan.shares.iter().map(|share| assembly(&sides, &share.pieces, &budget)).collect();
        let expected: Vec<u64> = shares.iter().map(SideAssembly::bytes_expected).collect();
        let mut got = vec![0; shares.len()];
        for (layout, bytes) in sides.iter().zip(&tensors) {
            let mut at = 0;
            while at < bytes.len() {
                let len = rng.random_range(1..3000).min(bytes.len() - at);
                for Gathered { share, part, offset, runs } in cutter.cut(layout.tensor(), at as u64, len) {
                    assert!(shares[share].missing().is_some());
                    let data: Vec<u8> = runs.into_iter().flatten().map(|byte| bytes[at + byte]).collect();
                    got[share] += data.len() as u64;
                    shares[share].accept(layout.tensor(), part, offset, &data).unwrap();
                }
                at += len;
            }
        }
        assert_eq!(got, expected);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.0..2.0)).collect() };
        let q = random(2 * 5 * 3);
        let (k, v) = (random(1900 * 3), random(1900 * 2));
        for (share, assembly) in plan.shares.iter().zip(shares) {
            assert_eq!(assembly.missing(), None);
            let planes = assembly.finish().unwrap();
            for piece in &share.pieces {
                for group in piece.groups.clone() {
                    let mut kv = KvHead::new(1900, 3, 2, piece.slots.clone()).unwrap();
                    for page in (0..8).filter(|page| piece.slots.contains(&slot::slot_of_page(*page))) {
                        let keys = page * 256..1900.min((page + 1) * 256);
                        let bytes = |of: &[f32], dim: usize| -> Vec<u8> {
                            let rows = &of[keys.start * dim..keys.end * dim];
                            rows.iter().flat_map(|x| x.to_le_bytes()).collect()
                        };
                        kv.write_k(page, &bytes(&k, 3), Dtype::F32, true).unwrap();
                        kv.write_v(page, &bytes(&v, 2), Dtype::F32, true).unwrap();
                    }
                    let of = |tensor| planes.of_group(tensor, group, &piece.slots, &shape);
                    let (mask, bias) = (of(SideTensor::Mask), of(SideTensor::Bias));
                    let wholes: Vec<Vec<DensePlane>> = sides
                        .iter()
                        .zip(&tensors)
                        .map(|(layout, bytes)| {
                            layout
                                .planes_of(group, &shape)
                                .map(|plane| whole_plane(layout, bytes, plane))
                                .collect()
                        })
                        .collect();
                    let [whole_mask, whole_bias] =
                        [0, 1].map(|at: usize| wholes[at].iter().collect::<Vec<_>>());
                    let attend = |side: Side<'_>| -> Vec<_> {
                        let (operator, compute) = (&operator, Effective::F32);
                        let call = GroupCall { shape, operator, group, q: &q, kv: &kv, side, compute };
                        let nodes = slot::cover(piece.slots.clone()).into_iter();
                        nodes.map(|node| attend_node(kernels, &call, node, 0..5).0).collect()
                    };
                    let here = attend(Side { mask: &mask, bias: &bias, ..Side::default() });
                    let there = attend(Side { mask: &whole_mask, bias: &whole_bias, ..Side::default() });
                    assert_eq!(here, there, "seed {seed} group {group} slots {:?}", piece.slots);
                }
            }
            assert_ne!(budget.reserved(), 0);
            drop(planes);
        }
        assert_eq!(budget.reserved(), 0, "what was reserved is back");
    }
}

/// Weights that rows had before go whole to who has any slot of a group.
#[test]
fn previous_weights_become_planes_of_each_head() {
    let shape = shape();
    let element = Element::Float(Dtype::Bf16);
    for dims in [[2, 4, 5, 1900], [1, 1, 5, 1900], [2, 1, 1, 1900], [1, 4, 1, 1900]] {
        let layout = SideLayout::dense(SideTensor::Previous, element, dims, &shape).unwrap();
        let sides = Sides::new(vec![layout]).unwrap();
        let mut rng = StdRng::seed_from_u64(5);
        let weights: Vec<f32> =
            (0..dims.iter().product()).map(|_| rng.random_range(0..64) as f32 / 64.0).collect();
        // The upper half of an f32 is a bf16, and these numbers have nothing below it.
        let bytes: Vec<u8> = weights.iter().flat_map(|x| x.to_le_bytes().into_iter().skip(2)).collect();
        let plan = plan();
        let cutter = Cutter::new(&plan, &shape, &sides);
        let budget = Budget::new(1 << 30);
        for (at, share) in plan.shares.iter().enumerate() {
            let mut assembly = assembly(&sides, &share.pieces, &budget);
            for first in (0..bytes.len()).step_by(998) {
                let len = (bytes.len() - first).min(998);
                let cut = cutter.cut(SideTensor::Previous, first as u64, len).into_iter();
                for Gathered { part, offset, runs, .. } in cut.filter(|cut| cut.share == at) {
                    let data: Vec<u8> = runs.into_iter().flatten().map(|byte| bytes[first + byte]).collect();
                    assembly.accept(SideTensor::Previous, part, offset, &data).unwrap();
                }
            }
            assert_eq!(assembly.missing(), None);
            let planes = assembly.finish().unwrap();
            for group in share.pieces.iter().flat_map(|piece| piece.groups.clone()) {
                let of_plane = dims[2] * 1900;
                let wanted =
                    layout.planes_of(group, &shape).map(|plane| &weights[plane * of_plane..][..of_plane]);
                assert!(
                    planes.previous_of_group(group, &shape).into_iter().eq(wanted),
                    "{dims:?} group {group}"
                );
                assert!(planes.of_group(SideTensor::Bias, group, &(0..64), &shape).is_empty());
            }
        }
        assert_eq!(budget.reserved(), 0);
    }
    let layout = SideLayout::dense(SideTensor::Previous, Element::Float(Dtype::F32), [1, 1, 1, 1900], &shape);
    let sides = Sides::new(vec![layout.unwrap()]).unwrap();
    let budget = Budget::new(1 << 30);
    let mut bytes = vec![0; 1900 * 4];
    bytes[700 * 4..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let refused = assembly(&sides, &whole(), &budget).accept(SideTensor::Previous, 0, 0, &bytes).unwrap_err();
    assert_eq!(refused.message(), "NON_FINITE: previous[b=0,h=0,pos=0,key=700] +inf");
}

fn whole() -> [Piece; 1] {
    [Piece { groups: 0..4, slots: 0..N_SLOTS }]
}

#[test]
fn parts_out_of_order_are_refused_with_both_offsets() {
    let budget = Budget::new(1 << 30);
    let sides = sides([1, 4, 1, 300], [1, 1, 5, 1900], Dtype::F32);
    let refused = |tensor, part, offset, data: &[u8]| {
        let mut assembly = assembly(&sides, &whole(), &budget);
        assembly.accept(SideTensor::Mask, 1, 0, &[1; 100]).unwrap();
        assembly.accept(tensor, part, offset, data).unwrap_err().message()
    };
    let mask = SideTensor::Mask;
    for offset in [0, 99, 101, u64::MAX] {
        let text = format!("CHUNK_ORDER: mask part 1: expected offset 100, got {offset}");
        assert_eq!(refused(mask, 1, offset, &[1]), text);
    }
    assert_eq!(refused(mask, 1, 100, &[1; 201]), "CHUNK_ORDER: mask part 1: expected offset 100, got 100");
    assert_eq!(refused(mask, 4, 0, &[1]), "PIECES: mask part 4 is not expected here");
    assert_eq!(refused(SideTensor::Bias, 1, 0, &[1]), "PIECES: bias part 1 is not expected here");
    let none = assembly(&Sides::default(), &whole(), &budget);
    assert_eq!((none.missing(), none.bytes_expected()), (None, 0));
    assert_eq!(budget.reserved(), 0);
}

#[test]
fn an_element_that_is_none_is_named_wherever_the_cut_is() {
    let budget = Budget::new(1 << 30);
    let sides = sides([1, 4, 5, 300], [2, 4, 5, 700], Dtype::F32);
    let mut mask = vec![1; 5 * 300];
    mask[3 * 300 + 290] = 2;
    for cut in [1, 300, 1180, 1190, 1191, 1192] {
        let mut assembly = assembly(&sides, &whole(), &budget);
        let first = assembly.accept(SideTensor::Mask, 2, 0, &mask[..cut]);
        let refused = first.and_then(|()| assembly.accept(SideTensor::Mask, 2, cut as u64, &mask[cut..]));
        let text = "DTYPE: mask[b=0,h=2,pos=3,key=290] is 2, a bool is 0 or 1";
        assert_eq!(refused.unwrap_err().message(), text, "cut at {cut}");
    }
    for (value, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "+inf")] {
        let mut bias = vec![0_u8; 5 * 700 * 4];
        bias[(700 + 600) * 4..][..4].copy_from_slice(&value.to_le_bytes());
        let mut assembly = assembly(&sides, &whole(), &budget);
        let refused = assembly.accept(SideTensor::Bias, 6, 0, &bias).unwrap_err();
        assert_eq!(refused.message(), format!("NON_FINITE: bias[b=1,h=2,pos=1,key=600] {name}"));
    }
}
