//! Keys and values that are made here have the bits of those that a client makes of all rows and for all heads at once.

use std::sync::Arc;

use attnd_kernel::{
    AttnShape, Causal, Dims, Effective, GroupCall, Operator, OperatorParts, PartialRows, Score, Side,
    attend_node, slot,
};
use attnd_plan::{Piece, Projected, Projection, Sides};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::budget::Budget;
use crate::worker::side::{SideAssembly, bytes_needed};

const KEYS: usize = 2000;
const WIDTHS: [usize; 2] = [7, 5];

#[test]
fn batches_are_rows_that_follow_each_other() {
    let batch = |pages: &[usize], rows: Range<usize>| Batch { pages: pages.to_vec(), rows };
    // Slots of pages 0 to 7: 0, 32, 16, 48, 8, 40, 24, 56.
    let all = |slots: Range<usize>, width| batches(&(0..64), &slots, KEYS, most_rows(width, 1));
    assert_eq!(all(0..64, 1), [batch(&[0, 1, 2, 3, 4, 5, 6, 7], 0..2000)]);
    let page = 256 * 1024 * 4;
    assert_eq!(BATCH_BYTES / page, 4);
    assert_eq!(all(0..64, 1024), [batch(&[0, 1, 2, 3], 0..1024), batch(&[4, 5, 6, 7], 1024..2000)]);
    assert_eq!(all(0..64, 60_000).len(), 8, "a page at least");
    assert_eq!([most_rows(8192, 16), most_rows(1, 16)], [16 * 192, 1 << 20], "work for all threads");
    let halves =
        [batch(&[0], 0..256), batch(&[2], 512..768), batch(&[4], 1024..1280), batch(&[6], 1536..1792)];
    assert_eq!(all(0..32, 1), halves);
    // Of a part with fewer slots the same pages lie together.
    assert_eq!(batches(&(0..32), &(0..32), KEYS, 2000), [batch(&[0, 2, 4, 6], 0..1024)]);
    assert_eq!(batches(&(0..32), &(0..16), KEYS, 2000), [batch(&[0], 0..256), batch(&[4], 512..768)]);
    assert_eq!(batches(&(32..64), &(56..60), KEYS, 2000), [batch(&[7], 768..976)]);
    assert!(batches(&(0..64), &(1..2), KEYS, 2000).is_empty());
}

/// A call of two elements of two kv heads, whose values have rows of their own or not.
struct Scene {
    begin: ComputeBegin,
    /// Of each tensor beside the operands, as it travels.
    sent: Vec<Vec<u8>>,
    /// Keys and values of all heads, `[batch, keys, kv_heads * dim]`.
    made: [Vec<f32>; 2],
    q: Vec<f32>,
}

fn to_bytes(values: &[f32], dtype: Dtype) -> Vec<u8> {
    // The upper half of an f32 is a bf16.
    values.iter().flat_map(|x| x.to_le_bytes().into_iter().skip(4 - dtype.size())).collect()
}

fn scene(dtype: Dtype, same_rows: bool, score: Score, pieces: Vec<Piece>) -> Scene {
    let dims =
        Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: KEYS as u64, head_dim: 6, value_dim: 3 };
    let shape = AttnShape::new(dims).unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    let mut random = |n: usize| -> Vec<f32> {
        let number =
            |rng: &mut StdRng| f32::from_bits(rng.random_range(-2.0..2.0_f32).to_bits() & 0xffff_0000);
        (0..n).map(|_| number(&mut rng)).collect()
    };
    let widths = if same_rows { [WIDTHS[0]; 2] } else { WIDTHS };
    let projected = |at: usize, has_bias| Projected { dtype, width: widths[at], has_bias };
    let projection = Projection { key: projected(0, true), value: projected(1, false), same_rows };
    let rows = widths.map(|width| random(2 * KEYS * width));
    let rows = if same_rows { [rows[0].clone(), rows[0].clone()] } else { rows };
    let weights = [random(2 * 6 * widths[0]), random(2 * 3 * widths[1])];
    let bias = random(12);
    let kernels = Kernels::from_env().unwrap();
    let made = [0, 1].map(|at| {
        let outputs = [12, 6][at];
        let bias = (at == 0).then_some(&bias[..]);
        let linear = Linear::new(&weights[at], [outputs, widths[at]], bias).unwrap();
        let mut made = vec![0.0; 2 * KEYS * outputs];
        linear.apply(kernels, &rows[at], &mut made);
        made
    });
    let of_heads: Vec<f32> = (0..2)
        .flat_map(|h| [&weights[0][h * 6 * widths[0]..][..6 * widths[0]], &bias[h * 6..][..6]].concat())
        .collect();
    let mut sent =
        vec![to_bytes(&of_heads, Dtype::F32), to_bytes(&weights[1], Dtype::F32), to_bytes(&rows[0], dtype)];
    if !same_rows {
        sent.push(to_bytes(&rows[1], dtype));
    }
    let parts = OperatorParts { score, ..OperatorParts::plain(0.5, Causal::None) };
    let begin = ComputeBegin {
        call_id: 1,
        shape: shape.with_projected_kv(),
        dtype: Dtype::F32,
        operator: Arc::new(Operator::new(parts, &shape).unwrap()),
        outputs: None,
        sides: Sides::new(projection.layouts(&shape).unwrap()).unwrap(),
        allow_non_finite: false,
        pieces,
        tokens_per_cell: 3,
    };
    Scene { begin, sent, made, q: random(2 * 3 * 6) }
}

impl Scene {
    /// Takes all parts of the share, each in chunks of so many elements.
    fn planes(&self, step: usize) -> Result<SidePlanes, Error> {
        let ComputeBegin { shape, sides, pieces, allow_non_finite, .. } = &self.begin;
        let need = bytes_needed(sides, pieces, shape);
        let memory = Budget::new(need).reserve(need).unwrap();
        let mut assembly = SideAssembly::new(sides, pieces, *shape, !allow_non_finite, memory);
        for (layout, bytes) in sides.iter().zip(&self.sent) {
            let plane_bytes = bytes.len() / layout.n_planes();
            for (at, part) in layout.parts(pieces, shape).iter().enumerate() {
                let of_plane = &bytes[part.plane * plane_bytes..][..plane_bytes];
                let columns = layout.columns_of(&part.slots).into_iter();
                let size = layout.column_bytes();
                let sent: Vec<u8> = match layout.tensor() {
                    SideTensor::KeyMatrix | SideTensor::ValueMatrix => of_plane.to_vec(),
                    _ => {
                        columns.flat_map(|run| of_plane[run.start * size..run.end * size].to_vec()).collect()
                    }
                };
                assert_eq!(sent.len() as u64, layout.part_bytes(part));
                for (i, data) in sent.chunks(step * layout.element().size()).enumerate() {
                    let offset = i * step * layout.element().size();
                    assembly.accept(layout.tensor(), at, offset as u64, data)?;
                }
            }
        }
        assert_eq!(assembly.missing(), None);
        assembly.finish()
    }

    fn empty(&self, slots: Range<usize>) -> KvHead {
        let (shape, operator) = (&self.begin.shape, &self.begin.operator);
        KvHead::new(KEYS, operator.key_dim(shape), shape.value_dim(), slots).unwrap()
    }

    /// A group as a client would have had it sent.
    fn sent_kv(&self, group: usize, slots: Range<usize>) -> KvHead {
        let (shape, kernels) = (&self.begin.shape, Kernels::from_env().unwrap());
        let mut kv = self.empty(slots.clone());
        for page in (0..n_pages(KEYS)).filter(|page| slots.contains(&slot_of_page(*page))) {
            let keys = page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, KEYS);
            let of_page = |at: usize, dim: usize| -> Vec<f32> {
                let (batch, head) = (group / 2, group % 2);
                let row =
                    |key: usize| self.made[at][((batch * KEYS + key) * 2 + head) * dim..][..dim].to_vec();
                keys.clone().flat_map(row).collect()
            };
            let (k, v) = (of_page(0, 6), of_page(1, 3));
            let mut rows = vec![0.0; keys.len() * self.begin.operator.key_dim(shape)];
            self.begin.operator.key_rows(kernels, shape, group, keys.clone(), &k, &mut rows);
            kv.write_k(page, &floats::into_bytes(rows), Dtype::F32, true).unwrap();
            kv.write_v(page, &floats::into_bytes(v), Dtype::F32, true).unwrap();
        }
        kv
    }

    fn partials(&self, group: usize, kv: &KvHead) -> Vec<PartialRows> {
        let (shape, operator) = (self.begin.shape, &*self.begin.operator);
        let (side, compute) = (Side::default(), Effective::F32);
        let call = GroupCall { shape, operator, group, q: &self.q, kv, side, compute };
        let nodes = slot::cover(kv.slots()).into_iter();
        nodes.map(|node| attend_node(Kernels::from_env().unwrap(), &call, node, 0..3).0).collect()
    }
}

/// A cut group, whole ones of two elements, and another cut one.
fn pieces() -> Vec<Piece> {
    vec![
        Piece { groups: 0..1, slots: 20..64 },
        Piece { groups: 1..3, slots: 0..64 },
        Piece { groups: 3..4, slots: 0..40 },
    ]
}

#[test]
fn keys_and_values_are_those_of_the_whole() {
    let kernels = Kernels::from_env().unwrap();
    for (dtype, same_rows) in
        [(Dtype::F32, true), (Dtype::Bf16, true), (Dtype::Bf16, false), (Dtype::F32, false)]
    {
        for name in ["scaled_dot", "cosine"] {
            let scene = scene(dtype, same_rows, Score::new(name, Vec::new()).unwrap(), pieces());
            for step in [1000, 77_777] {
                let planes = scene.planes(step).unwrap();
                for piece in pieces() {
                    for group in piece.groups {
                        let mut kv = scene.empty(piece.slots.clone());
                        project(kernels, &scene.begin, group, &planes, &mut kv, || true).unwrap();
                        let sent = scene.sent_kv(group, piece.slots.clone());
                        let (got, want) = (scene.partials(group, &kv), scene.partials(group, &sent));
                        assert!(
                            !want.is_empty() && got == want,
                            "{dtype}, {same_rows}, {name}, group {group}"
                        );
                    }
                }
            }
        }
    }
}

fn with(scene: &mut Scene, tensor: usize, element: usize, value: f32) {
    scene.sent[tensor][element * 4..][..4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn what_is_not_finite_is_named_as_it_was_sent_or_made() {
    let kernels = Kernels::from_env().unwrap();
    let pieces = || vec![Piece { groups: 3..4, slots: 32..64 }];
    let scene = || scene(Dtype::F32, false, Score::default(), pieces());
    let mut bad = scene();
    // Token 300 of the second element; page 1 is the first one of these slots.
    with(&mut bad, 2, (KEYS + 300) * 7 + 4, f32::INFINITY);
    let said = bad.planes(500).unwrap_err();
    assert_eq!(said.message(), "NON_FINITE: source[b=1,pos=300,i=4] +inf");
    let mut bad = scene();
    with(&mut bad, 3, (KEYS + 1999) * 5 + 2, f32::NAN);
    assert_eq!(bad.planes(500).unwrap_err().message(), "NON_FINITE: value_source[b=1,pos=1999,i=2] NaN");
    // Who allows them gets them.
    bad.begin.allow_non_finite = true;
    let planes = bad.planes(500).unwrap();
    let made = |scene: &Scene, planes: &SidePlanes, wanted: bool| {
        let mut kv = scene.empty(32..64);
        project(kernels, &scene.begin, 3, planes, &mut kv, || wanted).map_err(|error| error.message())
    };
    assert_eq!(made(&bad, &planes, true), Ok(()));
    // Finite rows and a finite matrix of which an element of a key is none.
    let mut bad = scene();
    // Behind the matrix and the bias of the first head.
    with(&mut bad, 0, 6 * 7 + 6 + 2, 4.0);
    with(&mut bad, 2, (KEYS + 300) * 7 + 2, -2e38);
    let planes = bad.planes(500).unwrap();
    assert_eq!(made(&bad, &planes, true), Err("NON_FINITE: k[h=3,pos=300,i=0] -inf".into()));
    let cosine = scene_of(&bad, Score::new("cosine", Vec::new()).unwrap());
    let planes = cosine.planes(500).unwrap();
    assert_eq!(made(&cosine, &planes, true), Err("NON_FINITE: k[h=3,pos=300,i=0] -inf".into()));

    let good = scene();
    let planes = good.planes(500).unwrap();
    assert_eq!(made(&good, &planes, true), Ok(()));
    assert_eq!(made(&good, &planes, false), Err("CANCELLED: nobody waits for the partials".into()));
}

/// The same rows under another score function.
fn scene_of(other: &Scene, score: Score) -> Scene {
    let of_score = scene(Dtype::F32, false, score, other.begin.pieces.clone());
    Scene { sent: other.sent.clone(), ..of_score }
}
