//! The general path as its users see it: the bits of the plain path where it has nothing to do, masks that hide all of a key, and
//! formulas in f64.

mod formula;
mod inspect;
mod request;
mod selections;

use attnd_kernel::slot::{N_SLOTS, Node};
use attnd_kernel::{
    AttnShape, Bias, Causal, Compute, Dims, Effective, EmptyRow, FinishedRows, GroupCall, Kernels, Mask,
    Normaliser, Operator, OperatorError, OperatorParts, Path, Positions, Selection, Side, Storage, Window,
    attend_node,
};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use self::request::{Request, random_cuts};
use crate::bits::random_sizes;
use crate::cases::{Case, Data, differing_bits};

fn check(what: &str, expected: &FinishedRows, got: &FinishedRows) {
    if let Some(difference) = differing_bits(expected, got) {
        panic!("{what}: {difference}");
    }
}

/// Interval masks of every kind.
fn masks() -> [Mask; 7] {
    let positions = Some(Positions::BottomRight);
    let (left, right) = (Some(300), Some(5));
    [
        Mask::default(),
        Causal::BottomRight.into(),
        Causal::TopLeft.into(),
        Mask { positions: positions.clone(), window: Window { left, right }, ..Mask::default() },
        Mask {
            causal: true,
            positions: positions.clone(),
            window: Window { left: Some(20), right: None },
            ..Mask::default()
        },
        Mask { positions, chunk: std::num::NonZeroUsize::new(100), ..Mask::default() },
        Mask { key_begin: Some(attnd_kernel::PerBatch::Same(1)), ..Mask::default() },
    ]
}

/// Where nothing is capped, added or masked, bits are those of the plain path: on every ISA, cut anywhere, whatever is stored.
#[test]
fn a_neutral_pipeline_has_the_bits_of_the_plain_path() {
    let storages = [Storage::F32, Storage::F32, Storage::Bf16, Storage::F16, Storage::Int8, Storage::Int4];
    for seed in 0..140_u64 {
        let mut rng = SmallRng::seed_from_u64(4000 + seed);
        let sizes = random_sizes(&mut rng);
        // Drawn, not counted, so that each meets each.
        let storage = storages[rng.random_range(0..storages.len())];
        let data = match Data::ALL[rng.random_range(0..Data::ALL.len())] {
            // No integer stands for NaN.
            Data::Poisoned if storage.has_scales() => Data::Normal,
            data => data,
        };
        let mut case = Case::new(seed, data, Causal::None, sizes);
        case.storage = storage;
        let mask = masks()[rng.random_range(0..7)].clone();
        let plain = Request::new(case, OperatorParts { mask, ..OperatorParts::plain(0.3, Causal::None) });
        let mut general = plain.clone();
        general.parts.selection = Some(Selection::Dense);
        match rng.random_range(0..3) {
            // All true, for all queries and heads at once or for each.
            0 => general.mask = vec![vec![true; general.n_keys()]],
            1 => general.mask = vec![vec![true; general.n_keys() * general.n_queries()]; general.group()],
            // The intervals, key by key.
            _ => {
                general.mask = vec![plain.intervals()];
                general.parts.mask = Mask::default();
            }
        }
        assert_eq!((plain.operator().path(), general.operator().path()), (Path::Plain, Path::General));
        let what = format!("seed {seed} {data:?} {storage} {sizes:?} {:?}", plain.parts.mask);
        let expected = plain.attend(Kernels::available()[0]);
        for kernels in Kernels::available() {
            check(&format!("{what} {}", kernels.isa()), &expected, &general.attend(kernels));
        }
        let cuts = random_cuts(&mut rng);
        check(&format!("{what} {cuts:?}"), &expected, &general.attend_cut(&Kernels::available(), &cuts));
    }
}

/// Any pipeline: the same bits from every ISA, from any cut, from a few tokens alone.
#[test]
fn every_isa_and_every_cut_gives_the_same_bits() {
    for seed in 0..100 {
        let mut rng = SmallRng::seed_from_u64(6000 + seed);
        let sizes = random_sizes(&mut rng);
        let data = Data::ALL[seed as usize % Data::ALL.len()];
        let request = Request::random(Case::new(seed, data, Causal::None, sizes), &mut rng);
        let what = format!("seed {seed} {data:?} {sizes:?} {:?}", request.parts);
        let expected = request.attend(Kernels::available()[0]);
        for kernels in Kernels::available() {
            check(&format!("{what} {}", kernels.isa()), &expected, &request.attend(kernels));
        }
        for _ in 0..2 {
            let cuts = random_cuts(&mut rng);
            check(&format!("{what} {cuts:?}"), &expected, &request.attend_cut(&Kernels::available(), &cuts));
        }
        let token = rng.random_range(0..request.n_queries());
        let alone = request.attend_tokens(Kernels::available()[0], token..token + 1);
        let dv = request.case.shape.value_dim();
        for head in 0..request.group() {
            let row = head * request.n_queries() + token;
            assert_eq!(expected.lse[row].to_bits(), alone.lse[head].to_bits(), "{what}");
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&expected.context[row * dv..][..dv]), bits(&alone.context[head * dv..][..dv]));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    /// Caps, biases, masks and sigmoids in any combination against their formulas.
    #[test]
    fn pipelines_stay_inside_the_bound(
        seed in any::<u64>(),
        group in 1..=3_usize,
        tq in 1..=20_usize,
        tk in 1..=600_usize,
        d in 1..=24_usize,
        dv in 1..=24_usize,
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let request = Request::random(Case::new(seed, Data::Normal, Causal::None, [group, tq, tk, d, dv]), &mut rng);
        let kernels = Kernels::available();
        let worst = formula::worst_ratio(&request, &request.attend(kernels[seed as usize % kernels.len()]));
        prop_assert!(worst <= 1.0, "{worst} times the bound, {:?}", request.parts);
    }
}

/// A formula that is wrong in one part must be seen to be.
#[test]
fn the_bound_is_broken_by_each_wrong_formula() {
    for fault in formula::Fault::ALL {
        let mut worst: f64 = 0.0;
        for seed in 0..80 {
            let mut rng = SmallRng::seed_from_u64(8000 + seed);
            // As many queries as keys may be a window.
            let tokens = if seed % 2 == 0 { [5, 40] } else { [12, 12] };
            let case = Case::new(seed, Data::Normal, Causal::None, [2, tokens[0], tokens[1], 8, 8]);
            let request = Request::random(case, &mut rng);
            let got = request.attend(Kernels::available()[0]);
            worst = worst.max(formula::worst_ratio_with(&request, &got, Some(fault)));
        }
        assert!(worst > 100.0, "{fault:?} is only {worst} times the bound off");
    }
}

/// Keys that no row sees may hold anything; those that some rows see reach these and no other.
#[test]
fn masked_keys_have_no_influence() {
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(7000 + seed);
        let mut sizes = random_sizes(&mut rng);
        // At least two keys, one of which is masked.
        sizes[2] = sizes[2].max(2);
        let mut request = Request::random(Case::new(seed, Data::Normal, Causal::None, sizes), &mut rng);
        let (n_keys, n_queries) = (request.n_keys(), request.n_queries());
        request.parts.selection = Some(Selection::Dense);
        let bad: Vec<usize> = (0..3).map(|_| rng.random_range(0..n_keys)).collect();
        // Half of the queries don't see the bad keys.
        request.mask = vec![
            (0..n_queries * n_keys).map(|at| !bad.contains(&(at % n_keys)) || at / n_keys % 2 == 1).collect(),
        ];
        let clean: Vec<FinishedRows> = Kernels::available().iter().map(|k| request.attend(k)).collect();
        let (d, dv) = (request.case.shape.head_dim(), request.case.shape.value_dim());
        for (i, j) in bad.iter().enumerate() {
            request.case.k[j * d..][..d].fill([f32::NAN, f32::INFINITY, 3e38][(i + seed as usize) % 3]);
            request.case.v[j * dv..][..dv].fill([f32::INFINITY, f32::NAN, f32::NEG_INFINITY][i]);
        }
        for (kernels, clean) in Kernels::available().iter().zip(&clean) {
            let got = request.attend(kernels);
            for row in (0..got.lse.len()).filter(|row| row % n_queries % 2 == 0) {
                let what = format!("seed {seed} {sizes:?} row {row} {} {:?}", kernels.isa(), request.parts);
                assert_eq!(got.lse[row].to_bits(), clean.lse[row].to_bits(), "{what}");
                for c in row * dv..(row + 1) * dv {
                    assert_eq!(got.context[c].to_bits(), clean.context[c].to_bits(), "{what}");
                }
            }
        }
    }
}

#[test]
fn rows_and_pages_that_are_masked_whole_give_the_identity() {
    let case = Case::new(3, Data::Normal, Causal::None, [2, 20, 900, 9, 10]);
    for normaliser in [Normaliser::Softmax, Normaliser::Sigmoid { bias: 0.5 }] {
        let selection = Some(Selection::Dense);
        let parts = OperatorParts { selection, normaliser, ..OperatorParts::plain(0.3, Causal::None) };
        let mut request = Request::new(case.clone(), parts);
        // Even queries see nothing, and nobody sees the second page.
        request.mask = vec![(0..20 * 900).map(|at| at / 900 % 2 == 1 && at % 900 / 256 != 1).collect()];
        for kernels in Kernels::available() {
            let partial = request.partial(kernels, &(0..N_SLOTS), Node::ROOT, 0..20);
            for row in (0..40).filter(|row| row % 20 % 2 == 0) {
                assert_eq!((partial.m[row], partial.l[row]), (f32::NEG_INFINITY, 0.0));
                assert!(partial.o[row * 10..][..10].iter().all(|o| *o == 0.0));
            }
            // The second page is slot 32, by itself.
            let partial = request.partial(kernels, &(32..33), Node::new(0, 32).unwrap(), 0..20);
            assert!(partial.m.iter().all(|m| *m == f32::NEG_INFINITY) && partial.l.iter().all(|l| *l == 0.0));
            let finished = request.attend(kernels);
            for row in 0..40 {
                let is_empty = row % 20 % 2 == 0;
                assert_eq!(finished.lse[row] == f32::NEG_INFINITY, is_empty);
                assert_eq!(finished.context[row * 10..][..10].iter().all(|x| x.to_bits() == 0), is_empty);
            }
        }
    }
}

#[test]
fn lowest_and_infinite_biases_mask_and_any_other_is_data() {
    let case = Case::new(4, Data::Normal, Causal::None, [1, 3, 700, 5, 1]);
    let mean = case.v.iter().map(|v| f64::from(*v)).sum::<f64>() / 700.0;
    for kernels in Kernels::available() {
        for (bias, is_masked) in [
            (f32::NEG_INFINITY, true),
            (f32::MIN, true),
            (-1e30, false),
            (-3e37, false),
            (-0.7 * f32::MAX, false),
        ] {
            let parts =
                OperatorParts { biases: vec![Bias::Dense], ..OperatorParts::plain(0.3, Causal::None) };
            let mut request = Request::new(case.clone(), parts);
            request.bias = vec![vec![bias; 700]];
            let all = request.attend(kernels);
            // Beside such a bias scores vanish, so all keys weigh the same.
            for (lse, context) in all.lse.iter().zip(&all.context) {
                assert_eq!(*lse == f32::NEG_INFINITY, is_masked, "{bias}");
                let want = if is_masked { 0.0 } else { mean };
                assert!((f64::from(*context) - want).abs() < 1e-6, "{bias}: {context} for {want}");
            }
            // Beside a key without a bias, a key with one weighs nothing, but is seen.
            request.bias[0][5] = 0.0;
            for context in request.attend(kernels).context {
                assert!((context - case.v[5]).abs() <= case.v[5].abs() * 1.2e-7, "{bias}");
            }
        }
    }
}

#[test]
fn scores_that_leave_f32_are_reported_where_they_are_seen() {
    for cap in [None, Some(30.0)] {
        for sign in [1.0, -1.0] {
            let parts = OperatorParts {
                softcap: cap,
                selection: Some(Selection::Dense),
                ..OperatorParts::plain(1.0, Causal::None)
            };
            let mut request =
                Request::new(Case::new(14, Data::Normal, Causal::None, [2, 20, 600, 4, 4]), parts);
            request.case.q[(20 + 3) * 4] = 1e20;
            // Too much for f32 divided by the cap, too.
            request.case.k[500 * 4] = sign * 1e21;
            for is_seen in [true, false] {
                request.mask = vec![(0..20 * 600).map(|at| is_seen || at % 600 != 500).collect()];
                for kernels in Kernels::available() {
                    let found = request.overflow(kernels);
                    assert_eq!(found, is_seen.then_some((1, 3)), "{cap:?} {sign} {}", kernels.isa());
                }
            }
        }
    }
    // A bias that leaves it in units of the binary logarithm.
    let biases = vec![Bias::Alibi { slopes: [2.5e36].into(), by_key: true }];
    let parts = OperatorParts { biases, ..OperatorParts::plain(1.0, Causal::TopLeft) };
    let request = Request::new(Case::new(15, Data::Normal, Causal::None, [1, 200, 300, 4, 4]), parts);
    for kernels in Kernels::available() {
        // log2 e * 2.5e36 * 95 is the first that is too much.
        assert_eq!(request.overflow(kernels), Some((0, 95)));
    }
}

/// Slopes are those of the group's heads, and of its element of the batch where there are as many.
#[test]
fn slopes_are_those_of_the_groups_heads() {
    let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 300, head_dim: 4, value_dim: 5 };
    let shape = AttnShape::new(dims).unwrap();
    let case = Case::new(21, Data::Normal, Causal::None, [2, 3, 300, 4, 5]);
    let (kv, kernels) = (case.resident(0..N_SLOTS), Kernels::available()[0]);
    let parts = |slopes: &[f32]| {
        let biases = vec![Bias::Alibi { slopes: slopes.into(), by_key: true }];
        OperatorParts { biases, ..OperatorParts::plain(0.4, Causal::None) }
    };
    let all: Vec<f32> = (1..=8_u8).map(|i| f32::from(i) / 100.0).collect();
    for group in 0..4 {
        for slopes in [&all[..4], &all[..]] {
            let operator = &Operator::new(parts(slopes), &shape).unwrap();
            let (q, kv, side, compute) = (&case.q[..], &kv, Side::default(), Effective::F32);
            let call = GroupCall { shape, operator, group, q, kv, side, compute };
            let got = attend_node(kernels, &call, Node::ROOT, 0..3).0;
            let alone = Request::new(case.clone(), parts(&slopes[2 * group % slopes.len()..][..2]));
            assert_eq!(got, alone.partial(kernels, &(0..N_SLOTS), Node::ROOT, 0..3), "{group} {slopes:?}");
        }
    }
}

#[test]
fn parts_that_make_no_operator_are_refused() {
    let shape = Case::new(1, Data::Normal, Causal::None, [4, 3, 5, 2, 2]).shape;
    let plain = || OperatorParts::plain(1.0, Causal::None);
    let alibi = |slopes: &[f32], by_key| Bias::Alibi { slopes: slopes.into(), by_key };
    let refused = |parts: OperatorParts| Operator::new(parts, &shape).unwrap_err().to_string();
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY, 3e38, 1e-45] {
        let text = refused(OperatorParts { softcap: Some(cap), ..plain() });
        assert_eq!(text, format!("softcap is {cap}, scale is 1"));
    }
    for (biases, text) in [
        (vec![Bias::Dense, Bias::Dense], "bias.dense twice"),
        (vec![alibi(&[1.0; 3], true)], "bias.alibi has 3 slopes, num_heads is 4, batch is 1"),
        (vec![alibi(&[1.0, 2.0, f32::NAN, 4.0], true)], "bias.alibi.slopes[2] is NaN"),
        (
            vec![alibi(&[1.0; 4], false)],
            "bias.alibi and no mask.positions: q_len 3, kv_len 5 can be aligned two ways",
        ),
    ] {
        assert_eq!(refused(OperatorParts { biases, ..plain() }), text);
    }
    let sigmoid = |bias| OperatorParts { normaliser: Normaliser::Sigmoid { bias }, ..plain() };
    assert_eq!(refused(sigmoid(f32::NAN)), "normaliser.sigmoid_bias is NaN");
    let text = refused(OperatorParts { sinks: Some(vec![0.0; 4].into()), ..sigmoid(0.0) });
    assert_eq!(text, "normaliser=sigmoid and sinks");
    let text = refused(OperatorParts { empty_row: EmptyRow::Uniform, ..sigmoid(0.0) });
    assert_eq!(text, "normaliser=sigmoid and empty_row=uniform");

    for (parts, option) in [
        (OperatorParts { softcap: Some(30.0), ..plain() }, "softcap"),
        (OperatorParts { biases: vec![alibi(&[1.0; 4], true)], ..plain() }, "bias.alibi"),
        (OperatorParts { selection: Some(Selection::Dense), ..plain() }, "mask.dense"),
        (sigmoid(0.0), "normaliser=sigmoid"),
    ] {
        let operator = Operator::new(parts, &shape).unwrap();
        assert_eq!(operator.kernel_id(Compute::F32), "c1-f32-op2");
        assert_eq!(operator.check_compute(Compute::F32), Ok(()));
        let refused: OperatorError = operator.check_compute(Compute::Bf16).unwrap_err();
        assert_eq!(refused.to_string(), format!("compute=bf16 and {option}"));
    }
    let plain = Operator::new(plain(), &shape).unwrap();
    assert_eq!((plain.path(), plain.check_compute(Compute::Int8)), (Path::Plain, Ok(())));
}
