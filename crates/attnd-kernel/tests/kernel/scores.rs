//! Score functions: one row of a table for each, held against its formula in f64 with everything that may be composed with it.

mod problem;

use attnd_kernel::reference::operator::Score;
use attnd_kernel::reference::scores::{self, Additive};
use attnd_kernel::{
    AttnShape, Causal, Compute, DefaultScale, FUNCTIONS, Function, Kernels, Operator, OperatorParts, Path,
    Score as Asked, ScoreError, Storage, Tensor,
};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use self::problem::{Given, Problem};
use crate::cases::differing_bits;

/// A formula: of a scale, what the function is given, a query, and a key at a position.
type OfPair = fn(f64, &Given<'_>, &[f32], (usize, &[f32])) -> Score;

/// A score function and its formula.
struct Row {
    name: &'static str,
    formula: OfPair,
}

const TABLE: &[Row] = &[
    Row { name: "scaled_dot", formula: |scale, _, q, (_, k)| Score::dot(scale, q, k) },
    Row { name: "dot", formula: |scale, _, q, (_, k)| Score::dot(scale, q, k) },
    Row { name: "general", formula: |scale, given, q, (_, k)| scores::general(scale, &given.of("w"), q, k) },
    Row {
        name: "biaffine",
        formula: |scale, given, q, (_, k)| {
            let (u, v) = (given.spread("u", q.len()), given.spread("v", k.len()));
            scores::biaffine(scale, &given.of("w"), (&u, &v, given.one("b")), q, k)
        },
    },
    Row {
        name: "cosine",
        formula: |scale, given, q, (_, k)| {
            scores::cosine(scale, given.one("beta").into(), given.one("eps").into(), q, k)
        },
    },
    Row {
        name: "location",
        formula: |scale, given, q, (key, _)| scores::location(scale, &given.of("w_a"), q, key),
    },
    Row {
        name: "additive",
        formula: |scale, given, q, (_, k)| {
            let (v, w_q, w_k) = (given.of("v"), given.of("w_q"), given.of("w_k"));
            let bias = given.spread("b", v.len());
            scores::additive(scale, Additive { v: &v, w_q: &w_q, w_k: &w_k, bias: &bias }, q, k)
        },
    },
    Row {
        name: "location_aware",
        formula: |scale, given, q, (key, k)| {
            let (v, w_q, w_k, u) = (given.of("v"), given.of("w_q"), given.of("w_k"), given.of("u"));
            let bias = given.spread("b", v.len());
            let parameters = Additive { v: &v, w_q: &w_q, w_k: &w_k, bias: &bias };
            let filters = given.of("filters");
            let features =
                scores::convolved(given.previous, &filters, filters.len() * v.len() / u.len(), key);
            scores::location_aware(scale, parameters, (&u, &features), q, k)
        },
    },
    Row {
        name: "concat",
        formula: |scale, given, q, (_, k)| scores::concat(scale, &given.of("v"), &given.of("w"), q, k),
    },
    Row {
        name: "keras_additive",
        formula: |scale, given, q, (_, k)| scores::keras_additive(scale, &given.spread("v", k.len()), q, k),
    },
    Row {
        name: "keras_concat",
        formula: |scale, given, q, (_, k)| {
            scores::keras_concat(scale, (given.one("c"), given.one("s")), q, k)
        },
    },
    Row {
        name: "gat",
        formula: |scale, given, q, (_, k)| {
            let (a_q, a_k, w) = (given.of("a_q"), given.of("a_k"), given.of("w"));
            scores::gat(scale, given.one("slope").into(), (&a_q, &a_k, &w), q, k)
        },
    },
    Row {
        name: "gatv2",
        formula: |scale, given, q, (_, k)| {
            let (v, w_q, w_k) = (given.of("v"), given.of("w_q"), given.of("w_k"));
            let bias = given.spread("b", v.len());
            let parameters = Additive { v: &v, w_q: &w_q, w_k: &w_k, bias: &bias };
            scores::gatv2(scale, given.one("slope").into(), parameters, q, k)
        },
    },
    Row {
        name: "distance",
        formula: |scale, given, q, (_, k)| scores::distance(scale, given.one("width").into(), q, k),
    },
];

/// What is made of small parameters may be large: that is refused before it is made.
#[test]
fn parameters_that_become_too_much_are_refused() {
    let tensor = |name: &str, shape: &[usize]| Tensor {
        name: name.into(),
        shape: shape.into(),
        values: vec![1.0; shape.iter().product()].into(),
    };
    let refused = |name: &str, shape: &AttnShape, tensors: Vec<Tensor>| {
        let score = Asked::new(name, tensors).unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        Operator::new(parts, shape).unwrap_err().to_string()
    };
    let many = problem::shape([1, 1024, 1024, 1, 1, 1024, 1]);
    let gat = vec![tensor("w", &[1, 1024]), tensor("a_q", &[1024, 1]), tensor("a_k", &[1])];
    assert_eq!(
        refused("gat", &many, gat),
        "score=gat: its projections take 17039360 bytes > 16777216; each has room for 64 outputs at least"
    );
    let one = problem::shape([1, 1, 1, 1, 1, 1, 1]);
    let aware = |filters: usize, taps: usize, units: usize| {
        vec![
            tensor("v", &[units]),
            tensor("w_q", &[units, 1]),
            tensor("w_k", &[units, 1]),
            tensor("u", &[units, filters]),
            tensor("filters", &[filters, taps]),
        ]
    };
    let limit = |filters, taps, units| refused("location_aware", &one, aware(filters, taps, units));
    assert_eq!(limit(1025, 1, 1), "score=location_aware has 1025 filters > 1024");
    assert_eq!(limit(1, 4097, 1), "score=location_aware has 4097 taps > 4096");
    assert_eq!(limit(1, 1, 1025), "score=location_aware has 1025 units > 1024");
}

/// A bias for each head needs no matrix for each: what they share they have once.
#[test]
fn heads_share_what_is_the_same() {
    let shape = problem::shape([1, 1024, 1, 1, 1, 64, 1]);
    let tensor = |name: &str, shape: &[usize]| Tensor {
        name: name.into(),
        shape: shape.into(),
        values: vec![0.5; shape.iter().product()].into(),
    };
    let parameters = vec![
        tensor("v", &[512]),
        tensor("w_q", &[512, 64]),
        tensor("w_k", &[512, 64]),
        tensor("b", &[1024, 512]),
    ];
    let given: usize = parameters.iter().map(|parameter| parameter.values.len()).sum();
    let score = Asked::new("additive", parameters).unwrap();
    let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
    let operator = Operator::new(parts, &shape).unwrap();
    assert_eq!(operator.score_bytes(), (2 * given + 2 * 512 * 64) as u64 * 4);
}

#[test]
fn the_table_has_every_function_once() {
    let listed: Vec<&str> = FUNCTIONS.iter().map(|function| function.name).collect();
    let mut tested: Vec<&str> = TABLE.iter().map(|row| row.name).collect();
    tested.sort_unstable();
    assert_eq!(listed, tested);
}

/// Random shapes, parameters, masks, caps and normalisers; every ISA, every way of sending keys, cut anywhere.
#[test]
fn every_function_is_its_formula_and_has_the_same_bits_everywhere() {
    for row in TABLE {
        let mut worst: f64 = 0.0;
        for seed in 0..36 {
            let mut rng = SmallRng::seed_from_u64(11_000 + seed);
            let problem = Problem::random(row.name, &mut rng);
            let available = Kernels::available();
            for group in 0..problem.shape.n_groups() {
                let expected = problem.attend(group, &available[..1], &[]);
                for kernels in &available {
                    let got = problem.attend(group, std::slice::from_ref(kernels), &[]);
                    let difference = differing_bits(&expected, &got);
                    assert_eq!(difference, None, "{problem:?} group {group} on {}", kernels.isa());
                }
                let got = problem.attend(group, &available, &problem.cuts);
                assert_eq!(differing_bits(&expected, &got), None, "{problem:?} group {group} cut");
                let ratio = problem.worst_ratio(group, &expected, row.formula);
                assert!(ratio <= 1.0, "seed {seed}, group {group}: {ratio} times the bound, {problem:?}");
                worst = worst.max(ratio);
            }
        }
        println!("{}: {worst:.3} of the bound at worst", row.name);
        assert!(worst > 1e-4, "{} was never off by anything: {worst}", row.name);
    }
}

/// A formula that is off by a hundredth must be seen to be.
#[test]
fn the_bound_is_broken_by_each_formula_that_is_off() {
    for row in TABLE {
        let ratio = |seed: u64| {
            let problem = Problem::random(row.name, &mut SmallRng::seed_from_u64(12_000 + seed));
            let got = problem.attend(0, &Kernels::available()[..1], &[]);
            problem.worst_ratio(0, &got, |scale, given, q, k| (row.formula)(1.01 * scale, given, q, k))
        };
        let worst = (0..10).map(ratio).fold(0.0_f64, f64::max);
        assert!(worst > 100.0, "{} is only {worst} times the bound off", row.name);
    }
}

/// Keys that some rows don't see may hold anything, and are felt by the others alone.
#[test]
fn masked_keys_have_no_influence() {
    for row in TABLE {
        for seed in 0..8 {
            let mut rng = SmallRng::seed_from_u64(13_000 + seed);
            let mut problem = Problem::random(row.name, &mut rng);
            problem.sent = Storage::F32;
            let n_keys = problem.shape.n_keys();
            let bad = [seed as usize % n_keys, n_keys / 2, n_keys - 1];
            problem.hide(|token, key| token % 2 == 0 && bad.contains(&key));
            let clean = problem.attend(0, &Kernels::available()[..1], &[]);
            problem.spoil(&bad);
            for kernels in Kernels::available() {
                let got = problem.attend(0, &[kernels], &[]);
                let (n_queries, dv) = (problem.shape.n_queries(), problem.shape.value_dim());
                for row in (0..got.lse.len()).filter(|row| row % n_queries % 2 == 0) {
                    assert_eq!(got.lse[row].to_bits(), clean.lse[row].to_bits(), "{problem:?} row {row}");
                    for c in row * dv..(row + 1) * dv {
                        assert_eq!(
                            got.context[c].to_bits(),
                            clean.context[c].to_bits(),
                            "{problem:?} row {row}"
                        );
                    }
                }
            }
        }
    }
}

fn shape() -> AttnShape {
    problem::shape([2, 4, 2, 3, 5, 4, 6]).with_query_dim(3).unwrap()
}

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let values = vec![0.5; shape.iter().product()].into();
    Tensor { name: name.to_owned(), shape: shape.to_vec(), values }
}

#[test]
fn parameters_that_make_no_sense_are_refused() {
    let refused = |name: &str, tensors: Vec<Tensor>| {
        let score = attnd_kernel::Score::new(name, tensors).unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        Operator::new(parts, &shape()).unwrap_err().to_string()
    };
    let unknown = attnd_kernel::Score::new("euclid", Vec::new()).unwrap_err();
    assert!(unknown.to_string().starts_with("score=euclid: there are additive, biaffine, "), "{unknown}");
    for (name, tensors, text) in [
        ("dot", vec![], "score=dot and query_dim 3: keys have 4"),
        ("dot", vec![tensor("w", &[1])], "score=dot and a parameter w: it takes one each of none"),
        (
            "general",
            vec![],
            "score=general and no parameter w of [query_dim 3, head_dim 4] or [num_heads 4, query_dim 3, head_dim 4]",
        ),
        (
            "general",
            vec![tensor("w", &[4, 3])],
            "score.w of general is [4, 3], not [query_dim 3, head_dim 4] or [num_heads 4, query_dim 3, head_dim 4]",
        ),
        (
            "general",
            vec![tensor("w", &[3, 4]), tensor("w", &[3, 4])],
            "score=general and a parameter w: it takes one each of w",
        ),
        (
            "general",
            vec![Tensor { shape: vec![3, 4], ..tensor("w", &[11]) }],
            "score.w has 11 elements, its shape has 12",
        ),
        (
            "additive",
            vec![tensor("v", &[7]), tensor("w_q", &[6, 3]), tensor("w_k", &[7, 4])],
            "score.w_q of additive is [6, 3], not [units 7, query_dim 3] or [num_heads 4, units 7, query_dim 3]",
        ),
        (
            "additive",
            vec![tensor("v", &[1025]), tensor("w_q", &[1025, 3]), tensor("w_k", &[1025, 4])],
            "score=additive has 1025 units > 1024",
        ),
        ("location", vec![tensor("w_a", &[4, 3])], "score=location has 4 positions, kv_len is 5"),
        (
            "general",
            vec![Tensor { values: [f32::NAN; 12].into(), ..tensor("w", &[3, 4]) }],
            "score.w[0] is NaN, not a finite number",
        ),
        (
            "gatv2",
            vec![
                tensor("v", &[7]),
                tensor("w_q", &[7, 3]),
                tensor("w_k", &[7, 4]),
                Tensor { values: [1.5].into(), ..tensor("slope", &[1]) },
            ],
            "score.slope[0] is 1.5, not from 0 to 1",
        ),
    ] {
        assert_eq!(refused(name, tensors), text);
    }
}

/// What old nodes would ignore has a name that they refuse; keys of another width are known by the operator.
#[test]
fn scores_have_kernel_ids_and_widths_of_their_own() {
    let operator = |name: &str, tensors| {
        let score = attnd_kernel::Score::new(name, tensors).unwrap();
        Operator::new(OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) }, &shape()).unwrap()
    };
    let additive =
        operator("additive", vec![tensor("v", &[7]), tensor("w_q", &[7, 3]), tensor("w_k", &[7, 4])]);
    assert_eq!((additive.key_dim(&shape()), additive.packed_dim(&shape())), (8, 7));
    assert_eq!((additive.path(), additive.kernel_id(Compute::F32)), (Path::General, "c1-f32-op3"));
    assert_eq!(additive.storage(Storage::Bf16), Storage::F32);
    let refused = additive.check_compute(Compute::Bf16).unwrap_err();
    assert_eq!(refused.to_string(), "compute=bf16 and score=additive");

    let biaffine = operator("biaffine", vec![tensor("w", &[3, 4])]);
    assert_eq!((biaffine.key_dim(&shape()), biaffine.packed_dim(&shape())), (5, 5));
    assert_eq!((biaffine.path(), biaffine.kernel_id(Compute::F32)), (Path::Plain, "c1-f32-op3"));
    assert_eq!([Storage::Bf16, Storage::Int8].map(|s| biaffine.storage(s)), [Storage::Bf16, Storage::F32]);

    let general = operator("general", vec![tensor("w", &[3, 4])]);
    assert_eq!((general.key_dim(&shape()), general.storage(Storage::Int4)), (4, Storage::Int4));
    assert!(general.keeps_keys() && !biaffine.keeps_keys());

    let old = OperatorParts::plain(0.5, Causal::None);
    assert_eq!(
        Operator::new(old, &problem::shape([1, 1, 1, 3, 5, 4, 6])).unwrap().kernel_id(Compute::F32),
        "c1-f32"
    );
}

#[test]
fn scales_that_nobody_gave_are_those_of_the_function() {
    for function in FUNCTIONS {
        let by_rule = match function.default_scale {
            DefaultScale::One => 1.0,
            DefaultScale::InverseSqrtKeyDim => 0.5,
        };
        assert_eq!(function.default_scale(&shape()), by_rule);
        assert_eq!(by_rule == 0.5, function.name == "scaled_dot", "{}", function.name);
    }
    let error = Function::named("").unwrap_err();
    assert!(matches!(error, ScoreError::Unknown { .. }), "{error}");
}
