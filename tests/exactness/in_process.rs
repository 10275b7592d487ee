//! Calls that this process computes itself have the bits of a cluster: those of the cases of the other files, which clusters are
//! checked with there.

use attnd_client::{AttendOptions, OutputsParts, Reason, WorkerChoice};
use attnd_kernel::{Compute, FUNCTIONS, Kernels, Outputs, Stage};

use super::outputs::assert_bits;
use super::{dense, operators, outputs, scores, tables, uniform};
use crate::support::cases::{Answer, Case, Data};
use crate::support::in_process;

fn check(case: &Case, parts: OutputsParts, what: &str) {
    let fast = Kernels::available()[0];
    let options = AttendOptions { outputs: parts.clone(), ..case.options(WorkerChoice::Auto) };
    let attended = in_process::attend(&case.operands, &options);
    let attended = attended.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(attended.kernel_id, case.operator().kernel_id(Compute::F32), "{what}");
    if case.data != Data::Poisoned {
        assert_eq!(attended.empty_rows, case.empty_rows(), "{what}");
    }
    let outputs = Outputs::new(parts, case.shape(), &case.operator());
    let outputs = outputs.unwrap_or_else(|error| panic!("{what}: {error}"));
    if !outputs.is_empty() {
        assert_bits(&attended.inspected, &case.inspect(fast, &outputs), what);
    }
    Answer::from(attended).assert_bits_of(&case.compute(fast), what);
}

#[test]
fn operators_and_what_is_told_beside_have_the_bits_of_a_cluster() {
    for seed in 0..60 {
        let case = operators::case(seed);
        check(&case, OutputsParts::default(), &format!("operator {seed}"));
        check(&case, outputs::parts(&case, seed), &format!("operator {seed} with outputs"));
    }
}

#[test]
fn tensors_and_tables_have_the_bits_of_a_cluster() {
    for seed in 0..40 {
        check(&dense::case(seed), OutputsParts::default(), &format!("dense {seed}"));
        let parts = OutputsParts { stages: vec![Stage::Weights], ..OutputsParts::default() };
        check(&tables::case(seed), parts, &format!("tables {seed}"));
    }
}

#[test]
fn score_functions_have_the_bits_of_a_cluster() {
    for (function, seed) in FUNCTIONS.iter().flat_map(|function| (0..4).map(move |seed| (*function, seed))) {
        let parts = OutputsParts { top_k: usize::from(seed == 1) * 3, ..OutputsParts::default() };
        check(&scores::case(function, seed), parts, &format!("{} {seed}", function.name));
    }
}

#[test]
fn what_a_cluster_refuses_is_refused_in_the_same_words() {
    let mut case = uniform::plain(4, attnd_client::Dtype::F32, Data::Normal);
    let refused = |case: &Case, options: &AttendOptions| {
        let error = in_process::attend(&case.operands, options).expect_err("it makes no sense");
        (error.reason, error.message)
    };
    let options = case.options(WorkerChoice::Auto);
    let mut short = case.clone();
    short.operands.v = short.operands.v.slice(4..);
    let (reason, text) = refused(&short, &options);
    assert_eq!(reason, Reason::PayloadLength, "{text}");
    let mut bytes = case.operands.q.to_vec();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    case.operands.q = bytes.into();
    let (reason, text) = refused(&case, &options);
    let shape = case.shape();
    let (head, token, dim) =
        (shape.batch() * shape.n_heads() - 1, shape.n_queries() - 1, shape.query_dim() - 1);
    assert_eq!(reason, Reason::NonFinite);
    assert_eq!(text, format!("NON_FINITE: q[h={head},pos={token},i={dim}] NaN"));
}
