//! Score functions against numbers of the libraries that have them: torch 2.15 and keras 3.15, in f64.

use super::*;

const Q: [f32; 3] = [0.5, -1.25, 2.0];
/// Of another dimension than the query.
const K: [f32; 2] = [1.5, 0.75];
/// Of the query's dimension.
const K3: [f32; 3] = [1.5, 0.75, -0.5];
/// `[query_dim, key_dim]`.
const BETWEEN: [f32; 6] = [0.25, -0.5, 1.0, 0.75, -0.125, 0.5];
const PARAMETERS: Additive<'_> = Additive {
    v: &[1.5, -2.0],
    w_q: &[0.5, -0.25, 0.125, 1.0, 0.5, -0.75],
    w_k: &[0.75, -1.0, 0.25, 0.5],
    bias: &[0.125, -0.25],
};

/// Holds value and magnitude to be what they are, and the magnitude no smaller than the value.
fn assert_score(score: Score, want: f64) {
    assert!((score.value - want).abs() <= 1e-12 * want.abs(), "{score:?}, not {want}");
    assert!(score.magnitude >= score.value.abs(), "{score:?}");
}

#[test]
fn bilinear_functions_are_those_of_torch() {
    assert_score(general(1.0, &BETWEEN, &Q, &K), -2.203125);
    assert_score(general(-2.0, &BETWEEN, &Q, &K), 4.40625);
    // Twice the products of absolute values.
    assert_eq!(general(-2.0, &BETWEEN, &Q, &K).magnitude, 2.0 * 2.0 * (0.375 + 2.578125 + 1.125));
    let linear = (&[0.5, 0.25, -1.0][..], &[-0.75, 2.0][..], 0.375);
    assert_score(biaffine(1.0, &BETWEEN, linear, &Q, &K), -3.515625);
    assert_score(location(1.0, PARAMETERS.w_q, &Q, 1), -1.625);
}

#[test]
fn additive_functions_are_those_of_torch_and_keras() {
    assert_score(additive(1.0, PARAMETERS, &Q, &K), 2.915962066984675);
    assert_score(additive(0.5, PARAMETERS, &Q, &K), 2.915962066984675 / 2.0);
    let side_by_side = [0.5, -0.25, 0.125, 0.75, -1.0, 1.0, 0.5, -0.75, 0.25, 0.5];
    assert_score(concat(1.0, PARAMETERS.v, &side_by_side, &Q, &K), 2.652514072852181);
    assert_score(additive(1.0, Additive { bias: &[], ..PARAMETERS }, &Q, &K), 2.652514072852181);
    let close = |score: Score, want: f64| (score.value - want).abs() <= 1e-8;
    assert!(close(keras_additive(1.0, &[0.5, -1.0, 2.0], &Q, &K3), 2.75442745));
    assert!(close(keras_concat(1.0, (1.75, 0.5), &Q, &K3), 2.01569278));
}

#[test]
fn location_aware_adds_what_was_looked_at_around_the_key() {
    let previous = [0.1, 0.5, 0.25, 0.15];
    let near = |got: &[f64], want: &[f64]| {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-7), "{got:?}, not {want:?}");
    };
    let by_key: Vec<f64> = (0..4).flat_map(|key| convolved(&previous, &[0.5, -1.0, 2.0], 3, key)).collect();
    near(&by_key, &[0.9, 0.05, 0.3, -0.025]);
    // Two filters of five.
    let filters = [1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 1.0, 0.0, 0.0];
    near(&convolved(&previous, &filters, 5, 0), &[3.55, 0.1]);
    near(&convolved(&previous, &filters, 5, 3), &[1.45, 0.15]);
    let score = location_aware(1.0, PARAMETERS, (&[0.5, -1.0], &[0.05]), &Q, &K);
    assert_score(score, 2.958342612726146);
}

#[test]
fn cosine_is_that_of_torch_and_holds_each_norm() {
    assert_score(cosine(1.0, 1.0, 1e-8, &Q, &K3), -0.28145831714111547);
    assert_score(cosine(1.0, -4.0, 1e-8, &Q, &K3), 4.0 * 0.28145831714111547);
    assert_eq!(cosine(1.0, 1.0, 1e-8, &[0.0; 3], &K3).value, 0.0);
    // The norm of the query is below eps: 0.5e-8 / 1e-8.
    let small = cosine(1.0, 1.0, 1e-8, &[0.5e-8, 0.0, 0.0], &[2.0, 0.0, 0.0]);
    assert!((small.value - 0.5).abs() < 1e-7, "{small:?}");
}

#[test]
fn graph_attentions_are_those_of_torch() {
    let (a_q, a_k) = (&[1.0, -0.5][..], &[0.25, 2.0][..]);
    assert_score(gat(1.0, 0.2, (a_q, a_k, PARAMETERS.w_q), &Q, &K3), 6.25);
    // Negative: the slope counts.
    assert_score(gat(1.0, 0.2, (a_q, a_k, PARAMETERS.w_q), &K3, &Q), -0.734375);
    assert_score(gatv2(1.0, 0.2, Additive { bias: &[], ..PARAMETERS }, &Q, &K), 2.13125);
}

#[test]
fn distance_is_that_of_torch() {
    assert_score(distance(1.0, 1.5, &Q, &K3), -2.5);
}
