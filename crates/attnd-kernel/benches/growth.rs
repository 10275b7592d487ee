//! What growing costs: decoding over sequences that grew against sequences written at once, and appending.
//!
//! ```text
//! cargo bench -p attnd-kernel --bench growth
//! cargo bench -p attnd-kernel --bench growth -- decode bf16
//! ```
//!
//! Decode: H 32/8, d=128, one query token, 32768 keys, on one thread and on all; the eight heads of the cache grew token by token, so
//! that their pages alternate in memory. A ratio is that of the two times of one round, cache over head, and both go first in
//! every other round. Appending one token: to eight heads that hold up to 4096 tokens; the shortest rounds are within caches. Appending
//! many: 100000 tokens of one head in fresh memory, against `write_k` and `write_v` of all its pages in fresh memory.
//! Arguments choose the cases whose names contain all of them.

// A report is what this program is for; the operands are its own.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::Instant;

use attnd_kernel::slot::{N_SLOTS, Node, PAGE_KEYS, keys_in_page, n_pages};
use attnd_kernel::{
    Arena, AttnShape, Causal, Dims, Dtype, Effective, GroupCall, Kernels, KvCache, KvHead, KvView, Operator,
    PageLayout, Side, Storage, attend_node,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const DECODE_KEYS: usize = 32_768;
const MANY: usize = 100_000;
/// Rounds of each measurement.
const ROUNDS: usize = 25;

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.iter().all(|part| name.contains(part.as_str()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for storage in [Storage::F32, Storage::Bf16] {
        for kernels in Kernels::available() {
            if kernels.isa() == attnd_kernel::Isa::Portable {
                continue;
            }
            let names =
                [1, threads].map(|threads| format!("decode {storage} {} threads={threads}", kernels.isa()));
            if names.iter().any(|name| is_wanted(name)) {
                decode(kernels, storage, &names.map(|name| is_wanted(&name).then_some(name)), threads);
            }
        }
        for (name, run) in [("append one", append_one as fn(&str, Storage)), ("append many", append_many)] {
            let name = format!("{name} {storage}");
            if is_wanted(&name) {
                run(&name, storage);
            }
        }
    }
}

fn layout(storage: Storage) -> PageLayout {
    PageLayout { storage, head_dim: DIM, value_dim: DIM }
}

/// As it is sent for `storage`.
fn sent(storage: Storage) -> Dtype {
    if storage == Storage::Bf16 { Dtype::Bf16 } else { Dtype::F32 }
}

/// Rows of finite elements.
fn rows(random: &mut StdRng, n: usize, storage: Storage) -> Vec<u8> {
    let of_f32 = |x: f32| x.to_le_bytes();
    (0..n * DIM)
        .map(|_| random.random_range(-1.7..1.7_f32))
        // The upper half of an f32 is a bf16.
        .flat_map(|x| of_f32(x).into_iter().skip(4 - sent(storage).size()))
        .collect()
}

fn write(k: &[u8], v: &[u8], n_keys: usize, storage: Storage) -> KvHead {
    let mut head = KvHead::with_storage(n_keys, DIM, DIM, 0..N_SLOTS, storage).unwrap();
    let row = DIM * sent(storage).size();
    for page in 0..n_pages(n_keys) {
        let bytes = page * PAGE_KEYS * row..(page * PAGE_KEYS + keys_in_page(page, n_keys)) * row;
        head.write_k(page, &k[bytes.clone()], sent(storage), true).unwrap();
        head.write_v(page, &v[bytes], sent(storage), true).unwrap();
    }
    head
}

fn append(cache: &mut KvCache, k: &[u8], v: &[u8]) {
    let (first, dtype) = (cache.len(), sent(cache.layout().storage));
    cache.append_k(first, k, dtype, true).unwrap();
    cache.append_v(first, v, dtype, true).unwrap();
    cache.commit(first + k.len() / (DIM * dtype.size()));
}

fn decode(kernels: &Kernels, storage: Storage, names: &[Option<String>; 2], threads: usize) {
    let mut random = StdRng::seed_from_u64(7);
    let operands: Vec<[Vec<u8>; 2]> = (0..HEADS)
        .map(|_| [rows(&mut random, DECODE_KEYS, storage), rows(&mut random, DECODE_KEYS, storage)])
        .collect();
    let heads: Vec<KvHead> = operands.iter().map(|[k, v]| write(k, v, DECODE_KEYS, storage)).collect();
    let arena = Arena::new();
    let mut caches: Vec<KvCache> =
        (0..HEADS).map(|_| KvCache::new(&arena, layout(storage), 0..N_SLOTS)).collect();
    let row = DIM * sent(storage).size();
    for token in 0..DECODE_KEYS {
        let bytes = token * row..(token + 1) * row;
        for (cache, [k, v]) in caches.iter_mut().zip(&operands) {
            append(cache, &k[bytes.clone()], &v[bytes.clone()]);
        }
    }
    drop(operands);
    let q: Vec<f32> = (0..GROUP * DIM).map(|_| random.random_range(-1.7..1.7_f32)).collect();
    let dims = Dims {
        batch: 1,
        heads: GROUP as u64,
        kv_heads: 1,
        queries: 1,
        keys: DECODE_KEYS as u64,
        head_dim: DIM as u64,
        value_dim: DIM as u64,
    };
    let shape = AttnShape::new(dims).unwrap();
    let operator = Operator::plain(1.0 / (DIM as f32).sqrt(), Causal::None);
    let attend = |kv: &KvView| {
        let side = Side::default();
        let call =
            GroupCall { shape, operator: &operator, group: 0, q: &q, kv, side, compute: Effective::F32 };
        let (partial, result) = attend_node(kernels, &call, Node::ROOT, 0..1);
        result.unwrap();
        partial
    };
    let views: Vec<KvView> = caches.iter().map(|cache| cache.view(DECODE_KEYS).unwrap()).collect();
    assert!(heads.iter().zip(&views).all(|(head, view)| attend(head) == attend(view)), "other results");
    let over_heads = || heads.iter().map(|head| attend(head)).for_each(|partial| drop(black_box(partial)));
    // As a worker does: a view for each call.
    let over_caches = || {
        for cache in &caches {
            drop(black_box(attend(&cache.view(DECODE_KEYS).unwrap())));
        }
    };
    for (name, threads) in names.iter().zip([1, threads]) {
        let Some(name) = name else { continue };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| compare(name, over_heads, over_caches));
    }
}

/// Times two works in turns; prints the second one's time over the first one's.
fn compare(name: &str, first: impl Fn(), second: impl Fn()) {
    let (mut times, mut ratios) = (Vec::new(), Vec::new());
    for round in 0..2 * ROUNDS + 1 {
        let mut of_round = [0.0; 2];
        for which in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let start = Instant::now();
            if which == 0 {
                first()
            } else {
                second()
            }
            of_round[which] = start.elapsed().as_secs_f64();
        }
        if round > 0 {
            times.push(of_round);
            ratios.push(of_round[1] / of_round[0]);
        }
    }
    ratios.sort_by(f64::total_cmp);
    let shortest = [0, 1].map(|which| times.iter().map(|of| of[which]).fold(f64::INFINITY, f64::min));
    let n = ratios.len();
    println!(
        "{name:<34} ratio {:.3} (quartiles {:.3} to {:.3}); shortest {:.2} and {:.2} ms, {:.3}",
        ratios[n / 2],
        ratios[n / 4],
        ratios[3 * n / 4],
        1e3 * shortest[0],
        1e3 * shortest[1],
        shortest[1] / shortest[0],
    );
}

/// Appends one token to each of eight heads, again and again.
fn append_one(name: &str, storage: Storage) {
    const TOKENS: usize = 4096;
    let mut random = StdRng::seed_from_u64(8);
    let (k, v) = (rows(&mut random, 64, storage), rows(&mut random, 64, storage));
    let row = DIM * sent(storage).size();
    let mut of_round = Vec::new();
    let mut longest = Vec::new();
    for _ in 0..ROUNDS {
        let arena = Arena::new();
        let mut caches: Vec<KvCache> =
            (0..HEADS).map(|_| KvCache::new(&arena, layout(storage), 0..N_SLOTS)).collect();
        let mut times: Vec<f64> = (0..TOKENS)
            .map(|token| {
                let bytes = token % 64 * row..(token % 64 + 1) * row;
                let start = Instant::now();
                caches.iter_mut().for_each(|cache| append(cache, &k[bytes.clone()], &v[bytes.clone()]));
                start.elapsed().as_secs_f64()
            })
            .collect();
        of_round.push(times.iter().sum::<f64>() / TOKENS as f64);
        times.sort_by(f64::total_cmp);
        longest.push([times[TOKENS / 2], times[TOKENS * 99 / 100], times[TOKENS - 1]]);
    }
    of_round.sort_by(f64::total_cmp);
    longest.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let [median, late, longest] = longest[ROUNDS / 2].map(|seconds| 1e6 * seconds);
    println!(
        "{name:<34} to {HEADS} heads: mean {:.2} us (median of rounds), least {:.2} us; a round's median {median:.2}, 99th \
         {late:.1}, longest {longest:.0} us",
        1e6 * of_round[ROUNDS / 2],
        1e6 * of_round[0],
    );
}

/// Appends many tokens to one head, at once and in pieces.
fn append_many(name: &str, storage: Storage) {
    let mut random = StdRng::seed_from_u64(9);
    let (k, v) = (rows(&mut random, MANY, storage), rows(&mut random, MANY, storage));
    let row = DIM * sent(storage).size();
    let whole = || drop(black_box(write(&k, &v, MANY, storage)));
    for tokens in [MANY, 1000, 16, 1] {
        let in_pieces = || {
            let mut cache = KvCache::new(&Arena::new(), layout(storage), 0..N_SLOTS);
            for (k, v) in k.chunks(tokens * row).zip(v.chunks(tokens * row)) {
                append(&mut cache, k, v);
            }
            drop(black_box(cache));
        };
        compare(&format!("{name} by {tokens}"), whole, in_pieces);
    }
}
