//! One canonical order: the same bits from any ISA, any cut of the keys, a row alone or in a batch, any thread count.

use attnd_kernel::{Causal, Isa, Kernels, Storage};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::cases::{Case, Data, differing_bits};

pub(crate) fn portable() -> &'static Kernels {
    Kernels::for_isa(Isa::Portable).unwrap()
}

pub(crate) fn check(what: &str, a: &attnd_kernel::FinishedRows, b: &attnd_kernel::FinishedRows) {
    if let Some(difference) = differing_bits(a, b) {
        panic!("{what}: {difference}");
    }
}

/// Small shapes around every edge: tiles of 1 to 6 rows, groups of 16 to 48 lanes, blocks of 96, panels of 64, pages of
/// 256, odd dimensions.
pub(crate) fn random_sizes(rng: &mut SmallRng) -> [usize; 5] {
    let group = *[1, 1, 1, 2, 3, 8].get(rng.random_range(0..6)).unwrap_or(&1);
    let queries = [1, 2, 5, 6, 7, 16, 31, 32, 33, 47, 48, 64, 80, 95, 96, 97, 150];
    let tq = queries[rng.random_range(0..queries.len())];
    let pages = rng.random_range(0..6_usize);
    let tk = (pages * 256 + rng.random_range(0..300_usize)).max(1);
    let dim = |rng: &mut SmallRng| match rng.random_range(0..3_u32) {
        0 => rng.random_range(1..=20),
        1 => rng.random_range(1..=130_usize),
        _ => *[16, 32, 64, 80, 128].get(rng.random_range(0..5)).unwrap_or(&64),
    };
    let (d, dv) = (dim(rng), dim(rng));
    // Keep the portable path affordable: it is an order of magnitude slower.
    let budget = 3_000_000 / (tk * (d + dv));
    [group, tq.min(budget.max(1)), tk, d, dv]
}

#[test]
fn every_isa_gives_the_bits_of_the_portable_path() {
    for seed in 0..120 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let sizes = random_sizes(&mut rng);
        let causal = [Causal::None, Causal::BottomRight, Causal::TopLeft][seed as usize % 3];
        let data = Data::ALL[seed as usize / 3 % Data::ALL.len()];
        let case = Case::new(seed, data, causal, sizes);
        let expected = case.attend(portable(), 0..case.shape.n_queries());
        for kernels in Kernels::available() {
            let got = case.attend(kernels, 0..case.shape.n_queries());
            check(&format!("seed {seed} {data:?} {causal:?} {sizes:?} {}", kernels.isa()), &expected, &got);
        }
    }
}

const NARROW: [Storage; 4] = [Storage::Bf16, Storage::F16, Storage::Int8, Storage::Int4];

/// Every storage type is widened exactly: the bits are those of f32 storage of the values that it holds, on every path.
#[test]
fn stored_values_give_the_bits_of_what_they_stand_for() {
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(500 + seed);
        let sizes = random_sizes(&mut rng);
        let causal = [Causal::None, Causal::BottomRight, Causal::TopLeft][seed as usize % 3];
        let data = Data::ALL[seed as usize / 3 % Data::ALL.len()];
        for storage in NARROW {
            if storage.has_scales() && matches!(data, Data::Poisoned) {
                // No integer stands for NaN.
                continue;
            }
            check_storage(Case::new(seed, data, causal, sizes), storage, &format!("seed {seed} {data:?}"));
        }
    }
}

/// Compares a case stored as `storage` with f32 storage of what that holds, on every ISA.
pub(crate) fn check_storage(mut case: Case, storage: Storage, what: &str) {
    let all = 0..case.shape.n_queries();
    case.storage = storage;
    let results: Vec<_> = Kernels::available()
        .into_iter()
        .map(|kernels| (kernels, case.attend(kernels, all.clone())))
        .collect();
    case.storage = Storage::F32;
    let case = case.rounded_to(storage);
    let expected = case.attend(Kernels::available()[0], all);
    for (kernels, result) in results {
        let (mask, shape) = (&case.mask, case.shape);
        check(&format!("{what} {mask:?} {shape:?} {storage} {}", kernels.isa()), &expected, &result);
    }
}

/// Rows of a scale that is 0, subnormal or huge, beside rows of any other, for few rows of queries and for many.
#[test]
fn integers_of_any_scale_give_the_bits_of_what_they_stand_for() {
    for seed in 0..24 {
        let mut rng = SmallRng::seed_from_u64(700 + seed);
        let tq = [1, 3, 40][seed as usize % 3];
        let (d, dv) = (rng.random_range(1..70_usize), rng.random_range(1..70_usize));
        let mut case = Case::new(seed, Data::Normal, Causal::BottomRight, [2, tq, 700, d, dv]);
        let mut of_any_scale = |rows: &mut Vec<f32>, dim: usize, huge: f32| {
            for row in rows.chunks_mut(dim) {
                match rng.random_range(0..7_u32) {
                    0 => row.fill(0.0),
                    1 => row.fill(-0.0),
                    // One element beside which all others vanish.
                    2 => row[rng.random_range(0..dim)] = -huge,
                    3 => row.iter_mut().for_each(|x| *x *= 1e-38),
                    4 => row.iter_mut().for_each(|x| *x *= 1e-43),
                    5 => row.iter_mut().for_each(|x| *x = f32::from_bits(u32::from(*x > 0.0))),
                    _ => {}
                }
            }
        };
        // A key of 1e37 would give scores that overflow, which is another matter.
        of_any_scale(&mut case.k, d, 1e3);
        of_any_scale(&mut case.v, dv, 1e37);
        for storage in [Storage::Int8, Storage::Int4] {
            let (k, v, q) = (case.k.clone(), case.v.clone(), case.q.clone());
            let mask = case.mask.clone();
            check_storage(Case { mask, k, v, q, ..case }, storage, &format!("seed {seed}"));
        }
    }
}

/// A NaN must not lead its neighbours in a vector on a path that assumes something of their scores.
#[test]
fn rows_beside_a_row_of_nan_keep_their_bits() {
    for lane in 0..32 {
        let mut case = Case::new(lane, Data::Peaked, Causal::None, [1, 32, 512, 16, 16]);
        let row = lane as usize * 16;
        case.q[row..row + 16].fill(f32::NAN);
        let expected = case.attend(portable(), 0..32);
        for kernels in Kernels::available() {
            check(&format!("lane {lane}, {}", kernels.isa()), &expected, &case.attend(kernels, 0..32));
        }
    }
}

#[test]
fn any_cut_of_the_slots_gives_the_bits_of_one_worker() {
    let all = Kernels::available();
    for seed in 0..40 {
        let mut rng = SmallRng::seed_from_u64(1000 + seed);
        let [group, tq, _, d, dv] = random_sizes(&mut rng);
        let tk = rng.random_range(1..9000_usize);
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let case = Case::new(seed, data, Causal::BottomRight, [group, tq.min(12), tk, d, dv]);
        let expected = case.attend(all[0], 0..case.shape.n_queries());
        for workers in [2_usize, 3, 5, 8] {
            let mut cuts: Vec<usize> = (1..workers).map(|_| rng.random_range(0..=64)).collect();
            cuts.sort_unstable();
            // Each part is computed by another ISA.
            let fast: Vec<&Kernels> = all.iter().copied().filter(|k| k.isa() != Isa::Portable).collect();
            let kernels = if fast.is_empty() { &all } else { &fast };
            check(&format!("seed {seed} cuts {cuts:?}"), &expected, &case.attend_cut(kernels, &cuts));
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_in_a_batch() {
    for seed in 0..12 {
        let causal = [Causal::None, Causal::BottomRight][seed as usize % 2];
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let case = Case::new(seed, data, causal, [2, 120, 5000 + seed as usize * 37, 40, 24]);
        let kernels = Kernels::available()[0];
        let batch = case.attend(kernels, 0..120);
        for token in [0, 1, 47, 48, 96, 119] {
            let alone = case.attend(kernels, token..token + 1);
            for head in 0..2 {
                let in_batch = &batch.context[(head * 120 + token) * 24..][..24];
                let in_alone = &alone.context[head * 24..][..24];
                assert!(
                    in_batch.iter().zip(in_alone).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "seed {seed} token {token} head {head}"
                );
                assert_eq!(batch.lse[head * 120 + token].to_bits(), alone.lse[head].to_bits());
            }
        }
    }
}

#[test]
fn the_number_of_threads_leaves_no_trace() {
    let case = Case::new(3, Data::Normal, Causal::None, [4, 3, 40_000, 64, 64]);
    let kernels = Kernels::available()[0];
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.attend(kernels, 0..3))
    };
    let one = on(1);
    for threads in [2, 3, 7, 16] {
        check(&format!("{threads} threads"), &one, &on(threads));
    }
}

/// Ties one machine to all others: a change of this number is a change of the order, and needs another `KERNEL_ID`.
#[test]
fn the_bits_are_those_of_every_other_machine() {
    const DIGEST: u64 = 0x76e8_2f77_73f4_e4f4;
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for (seed, data) in Data::ALL.into_iter().enumerate() {
        let causal = [Causal::None, Causal::BottomRight, Causal::TopLeft][seed % 3];
        let case = Case::new(seed as u64, data, causal, [2, 70, 1111, 40, 37]);
        let result = case.attend(Kernels::available()[0], 0..70);
        for x in result.context.iter().chain(&result.lse) {
            // FNV-1a.
            for byte in x.to_bits().to_le_bytes() {
                digest = (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
    }
    assert_eq!(attnd_kernel::KERNEL_ID, "c1-f32");
    assert_eq!(digest, DIGEST, "{digest:#x}");
}
