//! Against the f64 oracle, inside the bound that `attnd_kernel::reference` states.

use attnd_kernel::{Causal, Kernels, Storage};
use proptest::prelude::*;

use crate::cases::{Case, Data};

/// The worst error of all rows over the expected bound, and over the proven one.
pub(crate) fn worst_ratios(case: &Case) -> (f64, f64) {
    let kernels = Kernels::available()[0];
    let (group, tq, dv) = (case.shape.group_size(), case.shape.n_queries(), case.shape.value_dim());
    let result = case.attend(kernels, 0..tq);
    let (mut expected, mut proven) = (0.0_f64, 0.0_f64);
    for row in 0..group * tq {
        let want = case.reference(row / tq, row % tq);
        let context = &result.context[row * dv..][..dv];
        expected = expected.max(want.worst_ratio(context, result.lse[row]));
        proven = proven.max(want.worst_proven_ratio(context, result.lse[row]));
    }
    assert!(proven <= 1.0, "{proven} times the bound that nothing exceeds");
    (expected, proven)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn results_are_inside_the_bound(
        seed in any::<u64>(),
        data in prop::sample::select(Data::BENIGN.to_vec()),
        causal in prop::sample::select(vec![Causal::None, Causal::BottomRight, Causal::TopLeft]),
        group in 1..=8_usize,
        tq in 1..=6_usize,
        tk in 1..=4097_usize,
        d in prop::sample::select(vec![1_usize, 3, 64, 80, 128, 256, 512]),
        dv in prop::sample::select(vec![1_usize, 5, 64, 128]),
    ) {
        let case = Case::new(seed, data, causal, [group, tq, tk, d, dv]);
        let (worst, _) = worst_ratios(&case);
        prop_assert!(worst <= 1.0, "{worst} times the bound");
    }

    #[test]
    fn nothing_leaves_the_proven_bound(
        seed in any::<u64>(),
        data in prop::sample::select(vec![Data::Constant, Data::Tiny]),
        tk in 1..=600_usize,
        d in prop::sample::select(vec![1_usize, 3, 64, 80, 128, 256, 512]),
        dv in 1..=20_usize,
    ) {
        worst_ratios(&Case::new(seed, data, Causal::None, [2, 2, tk, d, dv]));
    }

    #[test]
    fn gain_from_a_thousandth_to_a_thousand_stays_inside_the_bound(
        seed in any::<u64>(),
        gain in prop::sample::select(vec![1e-3_f32, 1e-1, 1.0, 1e1, 1e2, 1e3]),
        value in prop::sample::select(vec![1e-30_f32, 1.0, 1e4, 1e30]),
        tk in 1..=2000_usize,
    ) {
        let mut case = Case::new(seed, Data::Normal, Causal::None, [2, 3, tk, 64, 32]);
        case.q.iter_mut().for_each(|q| *q *= gain);
        case.v.iter_mut().for_each(|v| *v *= value);
        let (worst, _) = worst_ratios(&case);
        prop_assert!(worst <= 1.0, "{worst} times the bound");
    }
}

#[test]
fn a_benign_case_is_far_inside_the_bound() {
    let (worst, _) = worst_ratios(&Case::new(1, Data::Normal, Causal::None, [1, 48, 4096, 128, 128]));
    assert!(worst < 0.1, "{worst} times the bound: some rule of the order has gone wrong");
}

#[test]
fn equal_elements_break_the_expected_bound_and_not_the_proven_one() {
    // q = 1, two keys of constant rows, values +1 and -1: all roundings of a score go one way.
    let mut case = Case::new(1, Data::Normal, Causal::None, [1, 1, 2, 512, 1]);
    case.q.fill(1.0);
    case.k[..512].fill(0.9709);
    case.k[512..].fill(0.7687);
    case.v = vec![1.0, -1.0];
    let (expected, proven) = worst_ratios(&case);
    assert!(expected > 1.0, "{expected}: then the proven bound is needed no more");
    assert!(proven > 0.01, "{proven}: the proven bound says nothing");
}

#[test]
fn underflow_stays_inside_the_proven_bound() {
    for (scale, q, k, v) in [
        (1e-22_f32, 1e-20_f32, 1e38_f32, 1.0_f32),
        (1e-40, 1e30, 1e10, 1.0),
        (1e-45, 1e30, 1e15, 1.0),
        (1.0, 1.0, 1.0, 1e-44),
        (1.0, 1.0, 1.0, 2e-38),
    ] {
        let mut case = Case::new(2, Data::Normal, Causal::None, [1, 3, 300, 64, 8]);
        case.scale = scale;
        case.q.iter_mut().for_each(|x| *x *= q);
        case.k.iter_mut().for_each(|x| *x *= k);
        case.v.iter_mut().for_each(|x| *x *= v);
        worst_ratios(&case);
    }
}

#[test]
fn flushed_weights_stay_inside_the_proven_bound() {
    let mut case = Case::new(3, Data::Normal, Causal::None, [1, 1, 64, 1, 1]);
    case.scale = std::f32::consts::LN_2;
    case.q = vec![1.0];
    case.k = std::iter::once(-0.499_9).chain(std::iter::repeat_n(-125.500_1, 63)).collect();
    case.v = std::iter::once(0.0).chain(std::iter::repeat_n(1e38, 63)).collect();
    worst_ratios(&case);
}

/// What integer storage costs: `|got - exact| / |exact|` over the contexts of all rows, `exact` from the operands as they
/// were before they were stored.
fn error_of_storage(storage: Storage, d: usize) -> f64 {
    let mut case = Case::new(17, Data::Normal, Causal::None, [4, 2, 2000, d, d]);
    case.storage = storage;
    let result = case.attend(Kernels::available()[0], 0..2);
    let (mut off, mut size) = (0.0, 0.0);
    for row in 0..8 {
        let want = case.reference(row / 2, row % 2);
        for (got, want) in result.context[row * d..].iter().zip(&want.context) {
            off += (f64::from(*got) - want).powi(2);
            size += want.powi(2);
        }
    }
    (off / size).sqrt()
}

/// The bits are fixed, so the figures are; they are held to a thousandth.
#[test]
fn integers_cost_as_much_accuracy_as_they_did() {
    for (storage, d, measured) in [
        (Storage::Int8, 64, 6.707e-3),
        (Storage::Int8, 128, 7.339e-3),
        (Storage::Int4, 64, 0.125_34),
        (Storage::Int4, 128, 0.133_94),
    ] {
        let error = error_of_storage(storage, d);
        assert!((error / measured - 1.0).abs() < 1e-3, "{storage} d={d}: {error}, where it was {measured}");
    }
    // What is left without integers says that the rest is theirs.
    assert!(error_of_storage(Storage::F32, 64) < 1e-6);
}
