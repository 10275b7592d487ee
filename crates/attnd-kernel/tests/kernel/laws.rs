//! Laws that hold without an oracle.

use attnd_kernel::{Causal, FinishedRows, Kernels};

use crate::cases::{Case, Data, differing_bits};

fn attend(case: &Case) -> FinishedRows {
    case.attend(Kernels::available()[0], 0..case.shape.n_queries())
}

/// Asserts that two results agree as well as two results of one formula must: within the sum of their bounds.
fn assert_close(case: &Case, a: &FinishedRows, b: &FinishedRows) {
    let (tq, dv) = (case.shape.n_queries(), case.shape.value_dim());
    for row in 0..case.shape.group_size() * tq {
        let bound = case.reference(row / tq, row % tq);
        for c in 0..dv {
            let (x, y) = (f64::from(a.context[row * dv + c]), f64::from(b.context[row * dv + c]));
            assert!((x - y).abs() <= 2.0 * bound.expected.context[c], "row {row} column {c}: {x} and {y}");
        }
    }
}

#[test]
fn one_key_gives_its_value_to_the_last_place() {
    let case = Case::new(5, Data::Normal, Causal::None, [3, 7, 1, 19, 33]);
    let result = attend(&case);
    for row in result.context.chunks(33) {
        // p isn't 1, because m is an integer: (p * v) / p rounds twice.
        for (got, want) in row.iter().zip(&case.v) {
            assert!((got - want).abs() <= want.abs() * 1.2e-7, "{got} for {want}");
        }
    }
}

#[test]
fn equal_values_come_back() {
    let mut case = Case::new(6, Data::Normal, Causal::BottomRight, [2, 40, 1000, 32, 20]);
    let row: Vec<f32> = case.v[..20].to_vec();
    case.v = row.iter().copied().cycle().take(1000 * 20).collect();
    for result in attend(&case).context.chunks(20) {
        for (got, want) in result.iter().zip(&row) {
            assert!((got - want).abs() <= want.abs() * 40.0 * f32::EPSILON, "{got} for {want}");
        }
    }
}

#[test]
fn the_order_of_keys_matters_only_to_rounding() {
    let case = Case::new(7, Data::Normal, Causal::None, [1, 5, 1500, 24, 24]);
    let mut reversed = Case::new(7, Data::Normal, Causal::None, [1, 5, 1500, 24, 24]);
    let reverse = |x: &[f32]| -> Vec<f32> { x.chunks(24).rev().flatten().copied().collect() };
    reversed.k = reverse(&case.k);
    reversed.v = reverse(&case.v);
    assert_close(&case, &attend(&case), &attend(&reversed));
}

#[test]
fn every_key_twice_gives_the_same_context_and_ln2_more_lse() {
    let case = Case::new(8, Data::Normal, Causal::None, [1, 5, 700, 24, 24]);
    let mut twice = Case::new(8, Data::Normal, Causal::None, [1, 5, 1400, 24, 24]);
    twice.q.clone_from(&case.q);
    twice.k = [case.k.clone(), case.k.clone()].concat();
    twice.v = [case.v.clone(), case.v.clone()].concat();
    let (once, two) = (attend(&case), attend(&twice));
    assert_close(&case, &once, &two);
    for (a, b) in once.lse.iter().zip(&two.lse) {
        assert!((b - a - std::f32::consts::LN_2).abs() < 1e-5, "{a} and {b}");
    }
}

#[test]
fn context_lies_between_the_smallest_and_largest_value() {
    let case = Case::new(9, Data::Normal, Causal::None, [1, 30, 3000, 16, 16]);
    for row in attend(&case).context.chunks(16) {
        for (c, got) in row.iter().enumerate() {
            let column = || case.v.iter().skip(c).step_by(16);
            let (low, high) =
                (column().fold(f32::MAX, |a, b| a.min(*b)), column().fold(f32::MIN, |a, b| a.max(*b)));
            assert!(low - 1e-5 <= *got && *got <= high + 1e-5, "{got} outside {low}..{high}");
        }
    }
}

#[test]
fn scaling_values_by_a_power_of_two_scales_the_bits() {
    let case = Case::new(10, Data::Normal, Causal::TopLeft, [2, 9, 600, 16, 16]);
    let mut scaled = Case::new(10, Data::Normal, Causal::TopLeft, [2, 9, 600, 16, 16]);
    scaled.v.iter_mut().for_each(|v| *v *= 1024.0);
    let mut expected = attend(&case);
    expected.context.iter_mut().for_each(|x| *x *= 1024.0);
    assert_eq!(differing_bits(&expected, &attend(&scaled)), None);
}

#[test]
fn what_no_row_sees_may_hold_anything() {
    // Top-left causal with more keys than queries: the keys past the last query are seen by nobody.
    let case = Case::new(11, Data::Normal, Causal::TopLeft, [2, 70, 400, 17, 18]);
    let mut poisoned = Case::new(11, Data::Normal, Causal::TopLeft, [2, 70, 400, 17, 18]);
    for (j, x) in poisoned.k.iter_mut().enumerate().filter(|(j, _)| j / 17 >= 70) {
        *x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38][j % 4];
    }
    for x in poisoned.v.iter_mut().skip(70 * 18) {
        *x = f32::NAN;
    }
    assert_eq!(differing_bits(&attend(&case), &attend(&poisoned)), None);

    // A NaN in the key that only the last row sees must reach that row and no other.
    let mut last = Case::new(11, Data::Normal, Causal::TopLeft, [1, 70, 70, 17, 18]);
    let clean = attend(&last);
    last.v[69 * 18] = f32::NAN;
    let seen = attend(&last);
    assert_eq!(clean.context[..69 * 18], seen.context[..69 * 18]);
    assert_eq!(seen.context[69 * 18].to_bits(), 0x7fc0_0000);

    // Lanes side by side, some of which see it.
    for (bad, value) in [(40, f32::NAN), (41, f32::INFINITY), (0, f32::NAN), (95, f32::NEG_INFINITY)] {
        let mut case = Case::new(11, Data::Normal, Causal::TopLeft, [1, 96, 300, 17, 18]);
        for kernels in Kernels::available() {
            let clean = case.attend(kernels, 0..96);
            let kept = std::mem::replace(&mut case.v[bad * 18 + 5], value);
            let got = case.attend(kernels, 0..96);
            case.v[bad * 18 + 5] = kept;
            for (at, (clean, got)) in clean.context.iter().zip(&got.context).enumerate() {
                let sees_it = at / 18 >= bad && at % 18 == 5;
                assert!(
                    clean.to_bits() == got.to_bits() || sees_it && !got.is_finite(),
                    "{} {bad} {at}",
                    kernels.isa()
                );
                assert!(!sees_it || !got.is_finite(), "{} {bad} {at}", kernels.isa());
            }
        }
    }
}

#[test]
fn rows_that_see_nothing_are_zero_with_lse_minus_infinity() {
    let case = Case::new(12, Data::Normal, Causal::BottomRight, [2, 60, 10, 8, 8]);
    let result = attend(&case);
    for head in 0..2 {
        for token in 0..50 {
            assert_eq!(result.lse[head * 60 + token], f32::NEG_INFINITY);
            assert!(result.context[(head * 60 + token) * 8..][..8].iter().all(|x| x.to_bits() == 0));
        }
    }
}

#[test]
fn extreme_logits_pick_their_key_and_no_sentinel_leaks() {
    // One key at -1e30 is still the only key; among others it has weight 0.
    for (logits, want) in [
        (vec![-1e30_f32], 1.0_f32),
        (vec![-1e30, -1e30 * 1.1], 1.0),
        (vec![1e20, 0.0, -1e20], 1.0),
        (vec![-1e5, -1e5 + 100.0], 2.0),
    ] {
        let mut case = Case::new(13, Data::Normal, Causal::None, [1, 1, logits.len(), 1, 1]);
        case.scale = 1.0;
        case.q = vec![1.0];
        case.v = (1..=logits.len()).map(|i| i as f32).collect();
        case.k = logits.clone();
        let result = attend(&case);
        assert_eq!(result.context, [want], "{logits:?}");
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        assert!((result.lse[0] - max).abs() <= max.abs() * 1e-6, "{logits:?}: lse {}", result.lse[0]);
    }
}

#[test]
fn scores_that_leave_f32_are_reported() {
    use attnd_kernel::slot::Node;
    use attnd_kernel::{Compute, GroupCall, Operator, Side, Storage, attend_node};
    for compute in Compute::ALL {
        for sign in [1.0, -1.0] {
            let mut case = Case::new(14, Data::Normal, Causal::None, [2, 20, 600, 4, 4]);
            (case.compute, case.storage) = (compute, compute.storage().unwrap_or(Storage::F32));
            case.q[(20 + 3) * 4] = 1e20;
            case.k[500 * 4] = sign * 1e20;
            let kv = case.resident(0..64);
            for kernels in Kernels::available() {
                let call = GroupCall {
                    shape: case.shape,
                    operator: &Operator::plain(1.0, Causal::None),
                    group: 0,
                    q: &case.q,
                    kv: &kv,
                    side: Side::default(),
                    compute: kernels.effective(compute, case.storage).unwrap(),
                };
                let overflow = attend_node(kernels, &call, Node::ROOT, 0..20).1.unwrap_err();
                let found = (overflow.head_in_group, overflow.token);
                assert_eq!(found, (1, 3), "{sign} {compute} {}", kernels.isa());
            }
        }
    }
}
