//! The entries of the general path on the same memory.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::{Case, Memory, bits, poison};
use crate::bias::Ramp;
use crate::block::{RowBlock, RowPartials};
use crate::buffer::Buffer;
use crate::dispatch::{Isa, Kernels};
use crate::dtype::Dtype;
use crate::general::reduce::{Layout, Reducer};
use crate::general::{self, GeneralBlock, RowTerms};
use crate::normaliser::Normaliser;
use crate::pages::padded_columns;
use crate::plane::DensePlane;
use crate::slot::{N_SLOTS, keys_in_page, n_pages};
use crate::storage::Storage;

/// A mask and a bias of a random case, each of them or not.
fn planes(case: &Case, seed: u64, memory: Memory) -> [Option<DensePlane>; 2] {
    let mut rng = SmallRng::seed_from_u64(seed);
    let (n_keys, tokens) = (case.shape.n_keys(), case.shape.n_queries());
    let mut mask = DensePlane::mask(tokens, n_keys, &(0..N_SLOTS)).unwrap();
    let mut bias = memory.allocate(|| DensePlane::bias(tokens, n_keys, &(0..N_SLOTS))).unwrap();
    if memory != Memory::Plain {
        bias.poison(poison(Storage::F32));
    }
    for token in 0..tokens {
        for page in 0..n_pages(n_keys) {
            let n = keys_in_page(page, n_keys);
            let seen: Vec<u8> = (0..n).map(|_| u8::from(rng.random_bool(0.7))).collect();
            mask.write_mask(token, page, &seen);
            let values: Vec<u8> = (0..n)
                .map(|_| if rng.random_bool(0.1) { f32::MIN } else { rng.random_range(-1.0..1.0_f32) })
                .flat_map(f32::to_le_bytes)
                .collect();
            bias.write_bias(token, page, &values, Dtype::F32).unwrap();
        }
    }
    [(seed & 1 == 0).then_some(mask), (seed & 2 == 0).then_some(bias)]
}

/// What the entries leave of the block: `m`, `l`, and `o` without padding and signs of zeros.
fn run(case: &Case, seed: u64, kernels: &Kernels, memory: Memory) -> [Vec<u32>; 3] {
    let (n_rows, d, dv) = (case.n_rows(), case.shape.head_dim(), case.shape.value_dim());
    let group = case.shape.group_size();
    let reducers = [Reducer::Dot, Reducer::Leaky { slope: 0.2 }, Reducer::Distance { width: 2.0 }];
    let layout = Layout::new(reducers[seed as usize / 2 % 3], n_rows, d, 0.3, kernels);
    let rows: Vec<Buffer> = case.data.q.chunks(d).map(|row| memory.copy(row)).collect();
    let rows: Vec<&[f32]> = rows.iter().map(|row| &**row).collect();
    let mut q = memory.buffer(layout.words());
    layout.pack(kernels, &rows, &rows, &mut q);
    let kv = case.resident(memory);
    let [mask, bias] = planes(case, seed, memory);
    let intervals = case.mask.of_batch(0, &case.shape);
    let visible: Vec<_> = (0..n_rows).map(|row| intervals.visible(row / group)).collect();
    let terms: Vec<RowTerms<'_>> = (0..n_rows)
        .map(|row| RowTerms {
            token: row / group,
            mask: mask.as_ref(),
            bias: bias.as_ref(),
            ramp: (seed & 4 == 0).then_some(Ramp { slope: 0.1, origin: row as f32, by_key: seed & 8 == 0 }),
            ..RowTerms::default()
        })
        .collect();
    let pages: Vec<usize> = (0..n_pages(case.shape.n_keys())).collect();
    let normaliser =
        if seed.is_multiple_of(3) { Normaliser::Sigmoid { bias: -1.0 } } else { Normaliser::Softmax };
    let block = GeneralBlock {
        rows: RowBlock { q: &q, visible: &visible, kv: &kv, pages: &pages },
        layout,
        terms: &terms,
        cap: (seed.is_multiple_of(5) || seed % 7 == 1).then_some(4.0),
        normaliser,
    };
    let columns = padded_columns(dv);
    let mut scratch = memory.buffer(general::scratch_floats(n_rows, &kv));
    let (mut m, mut l, mut o) =
        (memory.buffer(n_rows), memory.buffer(n_rows), memory.buffer(n_rows * columns));
    let mut out = RowPartials { m: &mut m, l: &mut l, o: &mut o };
    assert_eq!(general::attend(kernels, &block, &mut scratch, &mut out), None);
    // A page that holds a value that is no number is reduced in runs, from +0.
    let o: Vec<f32> = o.chunks(columns).flat_map(|row| row[..dv].iter().map(|o| o + 0.0)).collect();
    [bits(&m), bits(&l), bits(&o)]
}

#[test]
fn the_general_path_stays_inside_its_operands_and_uses_no_padding() {
    for kernels in Kernels::available() {
        let (cases, products) = match kernels.isa() {
            _ if cfg!(miri) => (12, 2_400),
            // Without the CPU's multiply-add.
            Isa::Portable => (60, 200_000),
            _ => (240, 4_000_000),
        };
        for seed in 0..cases {
            let case = Case::random(seed, products);
            println!("seed {seed}, {}, {case:?}", kernels.isa());
            let expected = run(&case, seed, kernels, Memory::Plain);
            for memory in Memory::HOSTILE {
                let got = run(&case, seed, kernels, *memory);
                for (what, (expected, got)) in ["m", "l", "o"].iter().zip(expected.iter().zip(&got)) {
                    let differ = expected.iter().zip(got).position(|(a, b)| a != b);
                    assert_eq!(differ, None, "{what}, {memory:?}");
                }
            }
        }
    }
}
