//! Sequences that grew, in frames between inaccessible pages, seen at a length behind which there are rows of NaN.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::{Case, Memory, bits, layouts, poison};
use crate::arena::Arena;
use crate::dispatch::Kernels;
use crate::kv_cache::KvCache;
use crate::pages::{KvView, PageLayout, Part};
use crate::slot::N_SLOTS;

/// Pages are multiples of it, so each frame is a chunk, and fenced.
const PAGE_STEP: usize = 1 << 10;

impl Case {
    /// The keys and values of the case, appended in pieces of any length, and seen at their number; behind them come rows that would
    /// show in every result.
    fn grown(&self, memory: Memory, rng: &mut SmallRng) -> KvView {
        let (n_keys, head_dim, value_dim) =
            (self.shape.n_keys(), self.shape.head_dim(), self.shape.value_dim());
        let layout = PageLayout { storage: self.storage, head_dim, value_dim };
        let mut cache = KvCache::new(&Arena::of_chunks(PAGE_STEP, u64::MAX), layout, 0..N_SLOTS);
        let more = rng.random_range(1..40_usize);
        memory.allocate(|| cache.poison(n_keys + more, poison(self.storage)));
        // No integer stands for NaN; this is in every type's range.
        let worst = if self.storage.has_scales() { 6e4 } else { f32::NAN };
        let mut ends: Vec<usize> =
            (0..rng.random_range(0..6_u32)).map(|_| rng.random_range(0..n_keys)).collect();
        ends.extend([n_keys, n_keys + more]);
        ends.sort_unstable();
        for end in ends {
            let first = cache.len();
            for part in [Part::Keys, Part::Values] {
                let dim = layout.dim(part);
                let values = if part == Part::Keys { &self.data.k } else { &self.data.v };
                let rows = match values.get(first * dim..end * dim) {
                    Some(rows) => self.encoded(rows),
                    None => self.encoded(&vec![worst; (end - first) * dim]),
                };
                let append = if part == Part::Keys { KvCache::append_k } else { KvCache::append_v };
                memory
                    .with_bytes(&rows, |rows| append(&mut cache, first, rows, self.sent_as, false))
                    .unwrap();
            }
            cache.commit(end);
        }
        cache.view(n_keys).unwrap()
    }
}

#[test]
fn a_sequence_that_grew_stays_inside_its_pages_and_ends_where_it_is_said_to() {
    // Each storage type with each mask, in the type that is stored and in f32.
    let (cases, products) = if cfg!(miri) { (5, 2_400) } else { (120, 300_000) };
    for seed in 0..cases {
        let case = Case::random(seed, products);
        let plain = case.resident(Memory::Plain);
        for memory in Memory::HOSTILE {
            let grown = case.grown(*memory, &mut SmallRng::seed_from_u64(seed));
            for kernels in Kernels::available() {
                for layout in layouts(kernels, case.n_rows(), case.shape.head_dim(), case.storage) {
                    println!("seed {seed}, {}, {layout:?}, {memory:?}, {case:?}", kernels.isa());
                    let expected = case.run(kernels, layout, Memory::Plain, &plain);
                    let got = case.run(kernels, layout, *memory, &grown);
                    for (what, (expected, got)) in ["q", "m", "l", "o"].iter().zip(expected.iter().zip(&got))
                    {
                        assert_eq!(expected.iter().zip(got).position(|(a, b)| a != b), None, "{what}");
                    }
                }
            }
        }
    }
}

/// The same words, wherever a visible row has one of its own; neighbours in a word are another matter.
#[test]
fn pages_that_grew_row_by_row_have_the_words_of_pages_that_were_written_whole() {
    for seed in 0..if cfg!(miri) { 5 } else { 40 } {
        let case = Case::random(seed, if cfg!(miri) { 2_400 } else { 300_000 });
        let whole = case.resident(Memory::Plain);
        let grown = case.grown(Memory::Poisoned, &mut SmallRng::seed_from_u64(seed));
        let keys = (case.shape.n_keys() - 1) % 256 + 1;
        let page = (case.shape.n_keys() - 1) / 256;
        let [a, b] = [whole.page(page).unwrap(), grown.page(page).unwrap()];
        for key in 0..keys {
            let words = |k: &[f32]| -> Vec<f32> {
                let panel = k.len() / 4;
                (0..panel / 64).map(|x| k[key / 64 * panel + x * 64 + key % 64]).collect()
            };
            assert_eq!(bits(&words(a.k)), bits(&words(b.k)), "seed {seed} key {key}");
            if case.storage.has_scales() {
                assert_eq!(a.key_scales[key].to_bits(), b.key_scales[key].to_bits(), "seed {seed} {key}");
                assert_eq!(a.value_scales[key].to_bits(), b.value_scales[key].to_bits(), "seed {seed} {key}");
            }
        }
    }
}
