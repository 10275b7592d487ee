//! Interval masks: which keys a row sees against the rules written out key by key, and kernels under any mix of them.

use std::num::NonZeroUsize;
use std::sync::Arc;

use attnd_kernel::slot::{Node, slot_of_page};
use attnd_kernel::{
    AttnShape, Causal, Dims, Documents, Effective, GroupCall, Isa, Kernels, KvHead, Mask, Operator,
    OperatorParts, PartialRows, PerBatch, Positions, Run, ScoreOverflow, Side, Storage, Window, attend_node,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::accuracy::worst_ratios;
use crate::bits::{check, check_storage, portable, random_sizes};
use crate::cases::{Case, Data};

/// Where queries stand.
#[derive(Clone, Debug, PartialEq)]
enum Alignment {
    TopLeft,
    BottomRight,
    Offsets(Vec<i64>),
}

/// The rules as somebody would say them: a number for each batch element, a document for each token.
#[derive(Clone, Debug)]
struct Rules {
    queries: usize,
    keys: usize,
    causal: bool,
    alignment: Alignment,
    left: Option<i64>,
    right: Option<i64>,
    chunk: Option<i64>,
    prefix: Option<Vec<i64>>,
    key_begin: Option<Vec<i64>>,
    key_end: Option<Vec<i64>>,
    query_end: Option<Vec<i64>>,
    /// Documents of the queries and of the keys.
    documents: Option<Vec<(Vec<u32>, Vec<u32>)>>,
}

/// Ways to get the rules wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    CausalOffByOne,
    WrongCorner,
    LengthsForgottenInTheCorner,
    LeftOffByOne,
    RightOffByOne,
    ChunksFromZero,
    PrefixForgotten,
    PaddingForgotten,
    QueriesForgotten,
    DocumentsForgotten,
    PositionsOfTheWhole,
}

impl Fault {
    const ALL: [Self; 11] = [
        Self::CausalOffByOne,
        Self::WrongCorner,
        Self::LengthsForgottenInTheCorner,
        Self::LeftOffByOne,
        Self::RightOffByOne,
        Self::ChunksFromZero,
        Self::PrefixForgotten,
        Self::PaddingForgotten,
        Self::QueriesForgotten,
        Self::DocumentsForgotten,
        Self::PositionsOfTheWhole,
    ];
}

impl Rules {
    fn random(rng: &mut SmallRng, batch: usize, queries: usize, keys: usize) -> Self {
        let most = keys as i64;
        let one_in = |rng: &mut SmallRng, n: u32| rng.random_range(0..n) == 0;
        let lengths = |rng: &mut SmallRng, from: i64, to: i64| -> Vec<i64> {
            (0..batch).map(|_| rng.random_range(from..=to)).collect()
        };
        let causal = !one_in(rng, 3);
        let documents = one_in(rng, 4).then(|| {
            let of_batch = |rng: &mut SmallRng| documents(rng, queries, keys);
            (0..batch).map(|_| of_batch(rng)).collect::<Vec<_>>()
        });
        let alignment = match rng.random_range(0..3_u32) {
            0 => Alignment::TopLeft,
            1 if documents.is_none() => Alignment::Offsets(lengths(rng, -most / 2 - 2, most + 2)),
            _ => Alignment::BottomRight,
        };
        let reach = |rng: &mut SmallRng| one_in(rng, 3).then(|| rng.random_range(0..=most.min(700)));
        let (left, right) = (reach(rng), reach(rng));
        let chunk = (documents.is_none() && one_in(rng, 4)).then(|| rng.random_range(1..=most));
        let is_whole = documents.is_none();
        let prefix = (is_whole && causal && one_in(rng, 4)).then(|| lengths(rng, 0, most));
        let key_begin = one_in(rng, 4).then(|| lengths(rng, 0, most / 2));
        let key_end = (is_whole && one_in(rng, 3)).then(|| lengths(rng, most / 2, most));
        let query_end = (is_whole && one_in(rng, 4)).then(|| lengths(rng, 0, queries as i64));
        Self {
            queries,
            keys,
            causal,
            alignment,
            left,
            right,
            chunk,
            prefix,
            key_begin,
            key_end,
            query_end,
            documents,
        }
    }

    fn mask(&self) -> Mask {
        let each = |lengths: &Option<Vec<i64>>| {
            let lengths = lengths.as_ref()?;
            Some(PerBatch::Each(lengths.iter().map(|n| *n as usize).collect()))
        };
        let documents = self.documents.as_ref().map(|documents| {
            let (queries, keys): (Vec<_>, Vec<_>) =
                documents.iter().map(|(queries, keys)| (runs(queries), runs(keys))).unzip();
            Arc::new(Documents::new(&queries, &keys).unwrap())
        });
        Mask {
            causal: self.causal,
            positions: Some(match &self.alignment {
                Alignment::TopLeft => Positions::TopLeft,
                Alignment::BottomRight => Positions::BottomRight,
                Alignment::Offsets(offsets) => {
                    Positions::Offset(PerBatch::Each(offsets.iter().copied().collect()))
                }
            }),
            window: Window {
                left: self.left.map(|keys| keys as usize),
                right: self.right.map(|keys| keys as usize),
            },
            chunk: self.chunk.and_then(|keys| NonZeroUsize::new(keys as usize)),
            prefix: each(&self.prefix),
            key_begin: each(&self.key_begin),
            key_end: each(&self.key_end),
            query_end: each(&self.query_end),
            documents,
        }
    }

    /// The position of query `i` on the axis of the keys.
    fn position(&self, b: usize, i: usize, fault: Option<Fault>) -> i64 {
        let is = |other| fault == Some(other);
        let from_the_end = (self.alignment == Alignment::BottomRight) != is(Fault::WrongCorner);
        if let Some(documents) = self.documents.as_ref().filter(|_| !is(Fault::PositionsOfTheWhole)) {
            let (queries, keys) = &documents[b];
            let of_document = |tokens: &[u32]| tokens.iter().filter(|id| **id == queries[i]).count() as i64;
            let first_key = keys.iter().position(|id| *id == queries[i]).unwrap_or(0) as i64;
            let rank = of_document(&queries[..i]);
            return first_key
                + rank
                + if from_the_end { of_document(keys) - of_document(queries) } else { 0 };
        }
        let end = |lengths: &Option<Vec<i64>>, all: usize| match lengths {
            Some(lengths) if !is(Fault::LengthsForgottenInTheCorner) => lengths[b],
            _ => all as i64,
        };
        let i = i as i64;
        match &self.alignment {
            Alignment::Offsets(offsets) => i + offsets[b],
            _ if from_the_end => i + end(&self.key_end, self.keys) - end(&self.query_end, self.queries),
            _ => i,
        }
    }

    /// Whether query `i` of batch element `b` sees key `j`.
    fn sees(&self, b: usize, i: usize, j: usize, fault: Option<Fault>) -> bool {
        let is = |other| fault == Some(other);
        let p = self.position(b, i, fault);
        let key = j as i64;
        let of = |lengths: &Option<Vec<i64>>| lengths.as_ref().map(|lengths| lengths[b]);
        let before_causal_end = key <= p - i64::from(is(Fault::CausalOffByOne));
        let in_prefix = of(&self.prefix).is_some_and(|prefix| key < prefix) && !is(Fault::PrefixForgotten);
        let causal = !self.causal || before_causal_end || in_prefix;
        let left = self.left.is_none_or(|left| p - key <= left - i64::from(is(Fault::LeftOffByOne)));
        let right = self.right.is_none_or(|right| key - p <= right + i64::from(is(Fault::RightOffByOne)));
        let chunk = self.chunk.is_none_or(|size| {
            let begin = if is(Fault::ChunksFromZero) { 0 } else { of(&self.key_begin).unwrap_or(0) };
            let chunk_of = |at: i64| ((at - begin) as f64 / size as f64).floor();
            chunk_of(key) == chunk_of(p)
        });
        let no_padding = of(&self.key_begin).is_none_or(|begin| key >= begin)
            && of(&self.key_end).is_none_or(|end| key < end)
            || is(Fault::PaddingForgotten);
        let query = of(&self.query_end).is_none_or(|end| (i as i64) < end) || is(Fault::QueriesForgotten);
        let document = self.documents.as_ref().is_none_or(|documents| documents[b].0[i] == documents[b].1[j])
            || is(Fault::DocumentsForgotten);
        causal && left && right && chunk && no_padding && query && document
    }

    /// The keys that a query sees.
    fn visible(&self, b: usize, i: usize, fault: Option<Fault>) -> Vec<usize> {
        (0..self.keys).filter(|j| self.sees(b, i, *j, fault)).collect()
    }
}

/// Documents of some tokens: the keys of each in one run, the queries in any. Some have no queries, some no keys.
fn documents(rng: &mut SmallRng, queries: usize, keys: usize) -> (Vec<u32>, Vec<u32>) {
    let mut of_keys: Vec<u32> = Vec::new();
    let mut id = 10;
    while of_keys.len() < keys {
        let tokens = rng.random_range(1..=keys).min(keys - of_keys.len());
        of_keys.extend(std::iter::repeat_n(id, tokens));
        id += rng.random_range(1..3_u32);
    }
    let mut of_queries = Vec::new();
    while of_queries.len() < queries {
        let tokens = rng.random_range(1..=queries).min(queries - of_queries.len());
        of_queries.extend(std::iter::repeat_n(rng.random_range(10..=id), tokens));
    }
    (of_queries, of_keys)
}

/// Tokens' documents as runs.
pub(crate) fn runs(ids: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (at, id) in ids.iter().copied().enumerate() {
        match runs.last_mut() {
            Some(run) if run.id == id => run.end = at + 1,
            _ => runs.push(Run { end: at + 1, id }),
        }
    }
    runs
}

/// A causal rule, or any mix of rules, for that many queries and keys.
pub(crate) fn mask_for(seed: u64, queries: usize, keys: usize) -> Mask {
    match seed % 6 {
        0 => Causal::None.into(),
        1 => Causal::BottomRight.into(),
        2 => Causal::TopLeft.into(),
        _ => Rules::random(&mut SmallRng::seed_from_u64(seed), 1, queries, keys).mask(),
    }
}

fn shape(batch: usize, queries: usize, keys: usize) -> AttnShape {
    let [batch, queries, keys] = [batch, queries, keys].map(|n| n as u64);
    AttnShape::new(Dims { batch, heads: 2, kv_heads: 2, queries, keys, head_dim: 4, value_dim: 4 }).unwrap()
}

/// Random rules of small shapes.
fn small_rules(seed: u64) -> (AttnShape, Rules) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let (batch, queries, keys) =
        (rng.random_range(1..=3), rng.random_range(1..=24), rng.random_range(1..=40));
    (shape(batch, queries, keys), Rules::random(&mut rng, batch, queries, keys))
}

#[test]
fn a_row_sees_the_keys_that_all_rules_let_through() {
    let (mut rows, mut empty) = (0, 0);
    for seed in 0..4000 {
        let (shape, rules) = small_rules(seed);
        let mask = rules.mask();
        for batch in 0..shape.batch() {
            let mask = mask.of_batch(batch, &shape);
            for token in 0..shape.n_queries() {
                let what = || format!("seed {seed} batch {batch} token {token} {rules:?}");
                let visible = mask.visible(token);
                let expected = rules.visible(batch, token, None);
                assert_eq!(visible.clone().collect::<Vec<_>>(), expected, "{}", what());
                assert_eq!(mask.position(token), rules.position(batch, token, None), "{}", what());
                assert!(!visible.is_empty() || visible == (0..0), "{}", what());
                rows += 1;
                empty += usize::from(visible.is_empty());
            }
        }
    }
    assert!(empty * 10 > rows && empty * 2 < rows, "{empty} of {rows} rows see nothing");
}

#[test]
fn every_way_to_get_the_rules_wrong_shows_in_many_masks() {
    for fault in Fault::ALL {
        let shows = |seed: &u64| {
            let (shape, rules) = small_rules(*seed);
            let mask = rules.mask();
            (0..shape.batch()).any(|batch| {
                let mask = mask.of_batch(batch, &shape);
                let differs =
                    |i: usize| rules.visible(batch, i, Some(fault)) != mask.visible(i).collect::<Vec<_>>();
                (0..shape.n_queries()).any(differs)
            })
        };
        let found = (0..1000).filter(shows).count();
        assert!(found > 20, "{fault:?} shows in {found} of 1000 masks");
    }
}

#[test]
fn numbers_beyond_every_token_are_as_good_as_no_limit() {
    let shape = shape(1, 5, 9);
    let at = |offset| Some(Positions::Offset(PerBatch::Same(offset)));
    // Far from all keys a position is in another chunk, however large that is.
    for (offset, causal, chunked) in
        [(i64::MIN, 0..0, 0..0), (-1, 0..3, 0..9), (7, 0..9, 0..9), (i64::MAX, 0..9, 0..0)]
    {
        let rule = Mask { causal: true, positions: at(offset), ..Mask::default() };
        assert_eq!(rule.of_batch(0, &shape).visible(3), causal, "{offset}");
        let rule = Mask { chunk: NonZeroUsize::new(usize::MAX), positions: at(offset), ..Mask::default() };
        assert_eq!(rule.of_batch(0, &shape).visible(3), chunked, "{offset}");
        let window = Window { left: Some(usize::MAX), right: Some(usize::MAX) };
        let rule = Mask { window, positions: at(offset), ..Mask::default() };
        assert_eq!(rule.of_batch(0, &shape).visible(3), 0..9, "{offset}");
    }
}

/// A case under any mix of rules.
fn masked(seed: u64, data: Data, [group, tq, tk, d, dv]: [usize; 5]) -> (Case, Rules) {
    let rules = Rules::random(&mut SmallRng::seed_from_u64(seed), 1, tq, tk);
    (Case::new(seed, data, rules.mask(), [group, tq, tk, d, dv]), rules)
}

#[test]
fn every_isa_and_storage_gives_the_same_bits_under_any_mask() {
    for seed in 0..100 {
        let mut rng = SmallRng::seed_from_u64(3000 + seed);
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let (mut case, rules) = masked(3000 + seed, data, random_sizes(&mut rng));
        case.scale *= [1.0, -1.0, 1.0, 0.0][seed as usize / 8 % 4];
        let all = 0..case.shape.n_queries();
        let expected = case.attend(portable(), all.clone());
        for kernels in Kernels::available() {
            let what = format!("seed {seed} {data:?} {:?} {rules:?} {}", case.shape, kernels.isa());
            check(&what, &expected, &case.attend(kernels, all.clone()));
        }
        check_storage(case, Storage::Bf16, &format!("seed {seed} {data:?}"));
    }
}

#[test]
fn cuts_batches_and_threads_leave_no_trace_under_any_mask() {
    let all = Kernels::available();
    for seed in 0..40 {
        let mut rng = SmallRng::seed_from_u64(4000 + seed);
        let [group, tq, _, d, dv] = random_sizes(&mut rng);
        let (tq, tk) = (tq.min(40), rng.random_range(1..9000_usize));
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let (case, rules) = masked(4000 + seed, data, [group, tq, tk, d, dv]);
        let what = format!("seed {seed} {data:?} {rules:?}");
        let expected = case.attend(all[0], 0..tq);
        let mut cuts: Vec<usize> = (0..seed % 6).map(|_| rng.random_range(0..=64)).collect();
        cuts.sort_unstable();
        let fast: Vec<&Kernels> = all.iter().copied().filter(|k| k.isa() != Isa::Portable).collect();
        let kernels = if fast.is_empty() { &all } else { &fast };
        check(&format!("{what} cuts {cuts:?}"), &expected, &case.attend_cut(kernels, &cuts));

        let pool = rayon::ThreadPoolBuilder::new().num_threads(7).build().unwrap();
        check(&what, &expected, &pool.install(|| case.attend(all[0], 0..tq)));

        for token in [0, tq / 2, tq - 1] {
            let alone = case.attend(all[0], token..token + 1);
            for head in 0..group {
                let of_batch = &expected.context[(head * tq + token) * dv..][..dv];
                let of_one = &alone.context[head * dv..][..dv];
                let same = of_batch.iter().zip(of_one).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what} token {token} head {head}");
            }
        }
    }
}

#[test]
fn rows_are_inside_the_bound_under_any_mask_and_scale() {
    for seed in 0..120 {
        let mut rng = SmallRng::seed_from_u64(5000 + seed);
        let tk = rng.random_range(1..3000_usize);
        let data = Data::BENIGN[seed as usize % Data::BENIGN.len()];
        let sizes =
            [rng.random_range(1..=4), rng.random_range(1..=8), tk, [3, 64, 80][seed as usize % 3], 20];
        let (mut case, rules) = masked(5000 + seed, data, sizes);
        case.scale *= [1.0, -1.0, -0.3, 0.0][seed as usize / 5 % 4];
        for token in 0..sizes[1] {
            let keys = case.mask.of_batch(0, &case.shape).visible(token).collect::<Vec<_>>();
            assert_eq!(keys, rules.visible(0, token, None), "{rules:?}");
        }
        let (worst, _) = worst_ratios(&case);
        assert!(worst <= 1.0, "{worst} times the bound: seed {seed} {data:?} {rules:?}");
    }
}

/// NaN, infinities and what overflows in a key reach the rows that see it and no others, wherever rows begin and end.
#[test]
fn keys_that_a_row_does_not_see_may_hold_anything() {
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(6000 + seed);
        let [group, tq, tk, d, dv] = random_sizes(&mut rng);
        let (mut case, rules) = masked(6000 + seed, Data::Normal, [group, tq, tk, d, dv]);
        let sees: Vec<Vec<usize>> = (0..tq).map(|i| rules.visible(0, i, None)).collect();
        let clean = case.attend(portable(), 0..tq);
        // What nobody sees, and some key beside a row's own.
        let mut bad: Vec<usize> = (0..tk).filter(|j| !sees.iter().any(|keys| keys.contains(j))).collect();
        let row = &sees[rng.random_range(0..tq)];
        let beside = [row.first().and_then(|j| j.checked_sub(1)), row.last().map(|j| j + 1)];
        bad.extend(beside.into_iter().flatten().filter(|j| *j < tk));
        for j in &bad {
            case.k[j * d..][..d].fill([f32::NAN, f32::INFINITY, 3e38, f32::NEG_INFINITY][j % 4]);
            case.v[j * dv..][..dv].fill([f32::NAN, f32::NEG_INFINITY, f32::INFINITY][j % 3]);
        }
        for kernels in Kernels::available() {
            let kv = case.resident(0..64);
            let (rows, overflow) = attend_call(&case, kernels, &kv);
            let first = (0..tq).find(|i| sees[*i].iter().any(|j| bad.contains(j)));
            let reported = overflow.map_err(|at| at.token);
            match (first, reported) {
                (None, reported) => assert_eq!(reported, Ok(()), "seed {seed}"),
                (Some(first), Err(at)) => assert!(at >= first, "seed {seed}: {at} before {first}"),
                // A score with 3e38 may be a number, others are none.
                (Some(_), Ok(())) => {
                    let is_number = |j: &usize| !bad.contains(j) || j % 4 == 2;
                    assert!(sees.iter().flatten().all(is_number), "seed {seed}: nothing reported");
                }
            }
            let got = rows.finish(kernels);
            for (row, (got, clean)) in got.context.chunks(dv).zip(clean.context.chunks(dv)).enumerate() {
                if !sees[row % tq].iter().any(|j| bad.contains(j)) {
                    let same = got.iter().zip(clean).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "seed {seed} row {row} {} {rules:?} bad {bad:?}", kernels.isa());
                }
            }
        }
    }
}

type Outcome = (PartialRows, Result<(), ScoreOverflow>);

fn attend_call(case: &Case, kernels: &Kernels, kv: &KvHead) -> Outcome {
    let call = GroupCall {
        shape: case.shape,
        operator: &case.operator(),
        group: 0,
        q: &case.q,
        kv,
        side: Side::default(),
        compute: Effective::F32,
    };
    attend_node(kernels, &call, Node::ROOT, 0..case.shape.n_queries())
}

/// Pages that no row sees are not looked at: there is nothing resident but the one that is seen.
#[test]
fn a_window_costs_the_pages_that_it_sees() {
    for (queries, first) in
        [(1, 20 * 256 + 255), (3, 20 * 256 + 100), (96, 20 * 256 + 150), (250, 20 * 256 + 6)]
    {
        let mask = Mask {
            causal: true,
            positions: Some(Positions::Offset(PerBatch::Same(first as i64))),
            chunk: NonZeroUsize::new(256),
            ..Mask::default()
        };
        let case = Case::new(1, Data::Normal, mask, [2, queries, 40_000, 16, 16]);
        let slot = slot_of_page(20);
        let one_slot = case.resident(slot..slot + 1);
        let all = case.resident(0..64);
        for kernels in Kernels::available() {
            let seen = attend_call(&case, kernels, &one_slot);
            assert_eq!(seen, attend_call(&case, kernels, &all), "{queries} {}", kernels.isa());
            assert!(seen.0.l.iter().all(|l| *l > 0.0));
        }
    }
}

/// Elements of the batch have masks of their own, and a group is of one of them.
#[test]
fn a_group_has_the_mask_of_its_batch_element() {
    let (batch, tq, tk) = (3, 5, 300);
    let ends: [usize; 3] = [300, 17, 270];
    let key_end = Some(PerBatch::Each(ends.into()));
    let mask = Mask { key_end, ..Causal::BottomRight.into() };
    let operator = Operator::new(
        OperatorParts { mask, ..OperatorParts::plain(0.5, Causal::None) },
        &shape(batch, tq, tk),
    )
    .unwrap();
    let kernels = Kernels::available()[0];
    for group in 0..6 {
        let alone = Mask { key_end: Some(PerBatch::Same(ends[group / 2])), ..Causal::BottomRight.into() };
        let mut case = Case::new(group as u64, Data::Normal, alone, [1, tq, tk, 4, 4]);
        case.scale = 0.5;
        let kv = case.resident(0..64);
        let call = GroupCall {
            shape: shape(batch, tq, tk),
            operator: &operator,
            group,
            q: &case.q,
            kv: &kv,
            side: Side::default(),
            compute: Effective::F32,
        };
        let of_batch = attend_node(kernels, &call, Node::ROOT, 0..tq);
        assert_eq!(of_batch, attend_call(&case, kernels, &kv), "group {group}");
    }
}
