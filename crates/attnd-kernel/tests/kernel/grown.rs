//! Sequences that grow, fork and are cut, against the same tokens written at once: no bit tells them apart.

use std::num::NonZeroUsize;
use std::ops::Range;

use attnd_kernel::slot::{N_SLOTS, Node, PAGE_KEYS, cover, keys_in_slots, slot_of_page};
use attnd_kernel::{
    AppendError, Arena, Causal, Compute, Dtype, GroupCall, Kernels, KvCache, KvView, Operator, OperatorParts,
    Outputs, OutputsParts, PageLayout, PartialRows, RowSums, Side, Stage, Storage, attend_node, inspect_node,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::cases::{Case, Data};

const STORAGES: [Storage; 5] = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4];

/// Elements of row `row`, of keys or of values; rows differ in magnitude, so that the scale of another one would show.
fn elements(row: u64, dim: usize, is_key: bool) -> impl Iterator<Item = f32> {
    let mut rng = SmallRng::seed_from_u64(row * 2 + u64::from(is_key));
    let magnitude = 2.0_f32.powi((row % 5) as i32 - 3);
    (0..dim).map(move |_| rng.random_range(-magnitude..magnitude))
}

fn encode(values: impl Iterator<Item = f32>, dtype: Dtype) -> Vec<u8> {
    let element = |x: f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
    };
    values.flat_map(element).collect()
}

/// A sequence, and which row each of its tokens is.
struct Sequence {
    cache: KvCache,
    rows: Vec<u64>,
}

impl Sequence {
    fn new(arena: &Arena, layout: PageLayout, slots: Range<usize>) -> Self {
        Self { cache: KvCache::new(arena, layout, slots), rows: Vec::new() }
    }

    /// The rows of keys or of values that the cache is to be given of tokens `first..`, and the position of the first.
    fn owned(&self, rows: &[u64], is_key: bool, dtype: Dtype) -> (Option<usize>, Vec<u8>) {
        let (layout, slots) = (self.cache.layout(), self.cache.slots());
        let dim = if is_key { layout.head_dim } else { layout.value_dim };
        let first = self.rows.len();
        let is_owned = |at: &usize| slots.contains(&slot_of_page(at / PAGE_KEYS));
        let owned: Vec<usize> = (first..first + rows.len()).filter(is_owned).collect();
        let values = owned.iter().flat_map(|at| elements(rows[at - first], dim, is_key));
        (owned.first().copied(), encode(values, dtype))
    }

    fn append(&mut self, rows: &[u64], dtype: Dtype) {
        for is_key in [true, false] {
            let (first, bytes) = self.owned(rows, is_key, dtype);
            let Some(first) = first else { continue };
            let append = if is_key { KvCache::append_k } else { KvCache::append_v };
            append(&mut self.cache, first, &bytes, dtype, true).unwrap();
        }
        self.rows.extend_from_slice(rows);
        self.cache.commit(self.rows.len());
    }

    /// Appends rows one element of which is no number, which is refused.
    fn append_bad(&mut self, rng: &mut SmallRng, rows: &[u64]) {
        let is_key = rng.random();
        let layout = self.cache.layout();
        let dim = if is_key { layout.head_dim } else { layout.value_dim };
        let (first, mut bytes) = self.owned(rows, is_key, Dtype::F32);
        let Some(first) = first else { return };
        let before = self.cache.bytes();
        if rng.random() {
            // The other operand is good and comes before.
            let (first, bytes) = self.owned(rows, !is_key, Dtype::F32);
            let append = if is_key { KvCache::append_v } else { KvCache::append_k };
            append(&mut self.cache, first.unwrap(), &bytes, Dtype::F32, true).unwrap();
        }
        let bad = rng.random_range(0..bytes.len() / 4);
        bytes[bad * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let is_owned = |at: &usize| self.cache.slots().contains(&slot_of_page(at / PAGE_KEYS));
        let token = (first..).filter(is_owned).nth(bad / dim).unwrap();
        let append = if is_key { KvCache::append_k } else { KvCache::append_v };
        let refused = append(&mut self.cache, first, &bytes, Dtype::F32, true).unwrap_err();
        let AppendError::NonFinite(found) = refused else { panic!("{refused}") };
        assert_eq!((found.token, found.dim), (token, bad % dim));
        assert_eq!((self.cache.bytes(), self.cache.len()), (before, self.rows.len()));
    }

    fn truncate(&mut self, len: usize) {
        self.cache.truncate(len);
        self.rows.truncate(len);
    }

    fn fork(&self) -> Self {
        Self { cache: self.cache.fork(), rows: self.rows.clone() }
    }
}

/// Queries, and how they are computed.
struct Look {
    group: usize,
    queries: usize,
    causal: Causal,
    /// Dot products where these kernels have them.
    dots: bool,
    /// Capped scores, which take the general path.
    capped: bool,
}

impl Look {
    fn random(rng: &mut SmallRng, storage: Storage) -> Self {
        let dots = rng.random() && matches!(storage, Storage::Bf16 | Storage::Int8);
        Self {
            group: [1, 2, 4][rng.random_range(0..3)],
            // Rows broadcast, and lanes of queries.
            queries: [1, 1, 3, 40][rng.random_range(0..4)],
            causal: [Causal::None, Causal::BottomRight][rng.random_range(0..2)],
            dots,
            capped: !dots && rng.random_range(0..3) == 0,
        }
    }

    /// The tokens of these rows as a case, whose keys and values are written at once.
    fn case(&self, layout: PageLayout, dtype: Dtype, rows: &[u64]) -> Case {
        let (d, dv) = (layout.head_dim, layout.value_dim);
        let mut case = Case::new(7, Data::Normal, self.causal, [self.group, self.queries, rows.len(), d, dv]);
        // As they were sent.
        let sent = |x: f32| match dtype {
            Dtype::F32 => x,
            Dtype::F16 => half::f16::from_f32(x).to_f32(),
            Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
        };
        case.k = rows.iter().flat_map(|row| elements(*row, d, true)).map(sent).collect();
        case.v = rows.iter().flat_map(|row| elements(*row, dv, false)).map(sent).collect();
        case.storage = layout.storage;
        case.compute = match layout.storage {
            Storage::Bf16 if self.dots => Compute::Bf16,
            Storage::Int8 if self.dots => Compute::Int8,
            _ => Compute::F32,
        };
        case
    }

    fn operator(&self, case: &Case) -> Operator {
        let softcap = self.capped.then_some(3.0);
        let parts = OperatorParts { softcap, ..OperatorParts::plain(case.scale, self.causal) };
        Operator::new(parts, &case.shape).unwrap()
    }

    /// What `view` gives is what the same rows give that are written at once, on each node of its slots.
    fn check(&self, what: &str, kernels: &Kernels, view: &KvView, dtype: Dtype, rows: &[u64]) {
        if rows.is_empty() {
            return;
        }
        let case = self.case(view.layout(), dtype, rows);
        let operator = self.operator(&case);
        let written = case.resident(view.slots());
        let nodes = cover(view.slots()).into_iter();
        for node in nodes.filter(|node| keys_in_slots(node.slots(), rows.len()) > 0) {
            let of = |kv: &KvView| {
                let call = call(&case, &operator, kv, kernels);
                let (partial, result) = attend_node(kernels, &call, node, 0..self.queries);
                result.unwrap();
                let seen = if self.dots { Vec::new() } else { inspected(kernels, &call, node, &partial) };
                ([partial.m, partial.l, partial.o].map(|x| bits(&x)), seen)
            };
            assert!(of(&written) == of(view), "{what}, {} tokens, {node:?}, {}", rows.len(), kernels.isa());
        }
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn call<'a>(case: &'a Case, operator: &'a Operator, kv: &'a KvView, kernels: &Kernels) -> GroupCall<'a> {
    GroupCall {
        shape: case.shape,
        operator,
        group: 0,
        q: &case.q,
        kv,
        side: Side::default(),
        compute: kernels.effective(case.compute, case.storage).unwrap(),
    }
}

/// Weights and sums of the second pass, as numbers that can be compared.
fn inspected(kernels: &Kernels, call: &GroupCall<'_>, node: Node, partial: &PartialRows) -> Vec<u64> {
    let parts = OutputsParts {
        stages: vec![Stage::Weights],
        top_k: 3,
        mass_block: NonZeroUsize::new(100),
        entropy: true,
        max_score: true,
        ..OutputsParts::default()
    };
    let wanted = Outputs::new(parts, &call.shape, call.operator).unwrap();
    let sums = RowSums { m: &partial.m, l: &partial.l };
    let mut elements = 0_u64;
    let report = inspect_node(kernels, call, sums, &wanted, node, 0..call.shape.n_queries(), &mut |tile| {
        // Tiles come in any order.
        for (at, value) in tile.values.iter().enumerate() {
            let place =
                (tile.head_in_group * 100 + tile.tokens.start) * 1_000_000 + tile.keys.start * 100 + at;
            let mixed = (place as u64 ^ u64::from(value.to_bits()) << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            elements = elements.wrapping_add(mixed ^ mixed >> 29);
        }
    });
    let top = report.top.iter().map(|ranked| ranked.to_bits());
    let sums = report.mass.iter().chain(&report.entropy).map(|sum| sum.cast_unsigned());
    let highest = report.max_score.iter().map(|x| u64::from(x.to_bits()));
    [elements].into_iter().chain(top).chain(sums).chain(highest).collect()
}

/// Pieces that tokens are appended in.
fn pieces(how: usize, tokens: usize) -> Vec<usize> {
    let sizes: &[usize] = [&[1][..], &[1, 7, 256, 1000], &[usize::MAX]][how];
    let mut left = tokens;
    let mut sizes = sizes.iter().cycle();
    let mut pieces = Vec::new();
    while left > 0 {
        let piece = sizes.next().map_or(left, |size| left.min(*size));
        pieces.push(piece);
        left -= piece;
    }
    pieces
}

#[test]
fn tokens_that_were_appended_in_any_pieces_give_the_bits_of_tokens_written_at_once() {
    let dims = [(64, 64), (128, 128), (33, 70), (5, 1), (40, 24), (1, 17)];
    let slots = [0..N_SLOTS, 0..N_SLOTS, 0..16, 5..39];
    let mut seed = 0;
    for storage in STORAGES {
        for (head_dim, value_dim) in dims {
            for how in 0..3 {
                seed += 1;
                let mut rng = SmallRng::seed_from_u64(seed);
                let layout = PageLayout { storage, head_dim, value_dim };
                let slots = slots[rng.random_range(0..slots.len())].clone();
                let dtype = match storage {
                    Storage::F16 if rng.random() => Dtype::F16,
                    Storage::Bf16 if rng.random() => Dtype::Bf16,
                    _ => Dtype::F32,
                };
                let tokens = rng.random_range(1..if slots.len() == N_SLOTS { 1400 } else { 4000 });
                let mut sequence = Sequence::new(&Arena::new(), layout, slots);
                for piece in pieces(how, tokens) {
                    let first = sequence.rows.len() as u64;
                    sequence.append(&(first..first + piece as u64).collect::<Vec<_>>(), dtype);
                }
                for kernels in Kernels::available() {
                    for at in [tokens, rng.random_range(1..=tokens)] {
                        let look = Look::random(&mut rng, storage);
                        let view = sequence.cache.view(at).unwrap();
                        let what = format!("seed {seed} {layout:?} {dtype} in pieces {how}");
                        look.check(&what, kernels, &view, dtype, &sequence.rows[..at]);
                    }
                }
            }
        }
    }
}

/// Any order of appends, refused ones, cuts, forks and views, each of them looked at later.
#[test]
fn whatever_became_of_a_sequence_it_gives_the_bits_of_its_tokens_written_at_once() {
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(3000 + seed);
        let storage = STORAGES[seed as usize % 5];
        let mut dim = || [1, 3, 8, 16, 33, 64][rng.random_range(0..6)];
        let layout = PageLayout { storage, head_dim: dim(), value_dim: dim() };
        let slots = [0..N_SLOTS, 0..N_SLOTS, 0..32][rng.random_range(0..3)].clone();
        let all = Kernels::available();
        let arena = Arena::new();
        let mut sequences = vec![Sequence::new(&arena, layout, slots)];
        let mut views: Vec<(KvView, Vec<u64>)> = Vec::new();
        let mut next_row = 0_u64;
        for step in 0..40 {
            let n_sequences = sequences.len();
            let which = rng.random_range(0..n_sequences);
            let sequence = &mut sequences[which];
            let len = sequence.rows.len();
            let piece = [1, 1, 2, 7, 30, 256, 500][rng.random_range(0..7)];
            let rows: Vec<u64> = (next_row..next_row + piece).collect();
            next_row += piece;
            let what = format!("seed {seed} step {step} {layout:?}");
            match rng.random_range(0..9_u32) {
                0..=3 => sequence.append(&rows, Dtype::F32),
                4 => sequence.append_bad(&mut rng, &rows),
                5 => sequence.truncate(len - rng.random_range(0..=len.min(300))),
                6 if n_sequences < 5 => {
                    let fork = sequence.fork();
                    sequences.push(fork);
                }
                6 => drop(sequences.swap_remove(which)),
                7 if views.len() < 6 => {
                    let at = rng.random_range(0..=len);
                    views.push((sequence.cache.view(at).unwrap(), sequence.rows[..at].to_vec()));
                }
                7 => {
                    let (view, rows) = views.swap_remove(rng.random_range(0..views.len()));
                    let kernels = all[rng.random_range(0..all.len())];
                    Look::random(&mut rng, storage).check(&what, kernels, &view, Dtype::F32, &rows);
                }
                _ => {
                    let at = rng.random_range(0..=len);
                    let view = sequence.cache.view(at).unwrap();
                    let kernels = all[rng.random_range(0..all.len())];
                    let rows = &sequence.rows[..at];
                    Look::random(&mut rng, storage).check(&what, kernels, &view, Dtype::F32, rows);
                }
            }
        }
        let last = sequences.iter().map(|s| (s.cache.view(s.rows.len()).unwrap(), s.rows.clone()));
        for (view, rows) in last.chain(views) {
            let look = Look::random(&mut rng, storage);
            look.check(&format!("seed {seed} at the end"), all[0], &view, Dtype::F32, &rows);
        }
        drop(sequences);
        assert!(arena.bytes() <= 2 << 20, "{} bytes without a page", arena.bytes());
    }
}

/// What a worker reserves for a call's growth is what the arena takes, but for what the last chunk has beyond it.
#[test]
fn growth_takes_what_was_said_before() {
    let layout = PageLayout { storage: Storage::Bf16, head_dim: 64, value_dim: 64 };
    let arena = Arena::new();
    let mut heads: Vec<_> = (0..8).map(|_| Sequence::new(&arena, layout, 0..N_SLOTS)).collect();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut promised = 0;
    while heads[0].rows.len() < 9000 {
        let more = rng.random_range(1..900_u64);
        for head in &mut heads {
            let first = head.rows.len() as u64;
            promised += head.cache.growth_bytes(head.rows.len() + more as usize);
            head.append(&(first..first + more).collect::<Vec<_>>(), Dtype::F32);
        }
        assert_eq!(heads.iter().map(|head| head.cache.bytes()).sum::<u64>(), promised);
        assert!((promised..promised + (2 << 20)).contains(&arena.bytes()), "{promised} {}", arena.bytes());
    }
    drop(heads);
    assert_eq!(arena.bytes(), 2 << 20, "a chunk is kept");
}
