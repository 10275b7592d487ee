//! Whether the bound of the oracle can fail: implementations that are wrong on purpose, each in one way that real ones
//! were, must be outside of it on a case where everything is on at once.

use attnd_kernel::reference::operator::{At, EmptyRow, Formula, Normaliser, OperatorRow, Score};
use attnd_kernel::reference::{biases, masks};
use half::f16;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

const BATCH: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const TOKENS: usize = 12;
const KEYS: usize = 10;
const HEAD_DIM: usize = 16;
const VALUE_DIM: usize = 8;
/// Bottom-right: the first two tokens see nothing.
const OFFSET: i64 = -2;
/// Keys of the second problem that are no padding.
const LENGTH: usize = 9;

/// What is computed, and how.
#[derive(Clone, Copy, Debug)]
struct Choices {
    scale_dim: usize,
    softcap: Option<f64>,
    cap_sees_bias: bool,
    dense: bool,
    causal: Option<i64>,
    window: u64,
    lengths: bool,
    sinks: bool,
    empty_row: EmptyRow,
    tiled: bool,
    merged_by_mean: bool,
    half: bool,
}

const RIGHT: Choices = Choices {
    scale_dim: HEAD_DIM,
    softcap: Some(2.0),
    cap_sees_bias: false,
    dense: true,
    causal: Some(OFFSET),
    window: 4,
    lengths: true,
    sinks: true,
    empty_row: EmptyRow::Zero,
    tiled: false,
    merged_by_mean: false,
    half: false,
};

const MUTANTS: [(&str, Choices); 15] = [
    ("no mask", Choices { dense: false, ..RIGHT }),
    ("no causal rule", Choices { causal: None, ..RIGHT }),
    ("top-left instead of bottom-right", Choices { causal: Some(0), ..RIGHT }),
    ("no lengths", Choices { lengths: false, ..RIGHT }),
    ("no sinks", Choices { sinks: false, ..RIGHT }),
    ("no cap", Choices { softcap: None, ..RIGHT }),
    ("cap after bias", Choices { cap_sees_bias: true, ..RIGHT }),
    ("NaN in empty rows", Choices { empty_row: EmptyRow::Nan, ..RIGHT }),
    ("uniform empty rows", Choices { empty_row: EmptyRow::Uniform, ..RIGHT }),
    ("window one too wide", Choices { window: RIGHT.window + 1, ..RIGHT }),
    ("window one too narrow", Choices { window: RIGHT.window - 1, ..RIGHT }),
    ("heads tiled instead of grouped", Choices { tiled: true, ..RIGHT }),
    ("scale from the dimension of values", Choices { scale_dim: VALUE_DIM, ..RIGHT }),
    ("merged by mean", Choices { merged_by_mean: true, ..RIGHT }),
    ("accumulated in f16", Choices { half: true, ..RIGHT }),
];

/// The operands, all of them.
struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// `[batch, heads, tokens, keys]`
    sees: Vec<bool>,
    /// `[1, heads, tokens, keys]`
    bias: Vec<f32>,
    /// `[heads]`; the last head has none.
    sinks: Vec<f64>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-2.5..2.5)).collect() };
        let (q, k) = (draw(BATCH * HEADS * TOKENS * HEAD_DIM), draw(BATCH * KV_HEADS * KEYS * HEAD_DIM));
        let (v, bias) = (draw(BATCH * KV_HEADS * KEYS * VALUE_DIM), draw(HEADS * TOKENS * KEYS));
        let sees = (0..BATCH * HEADS * TOKENS * KEYS).map(|_| rng.random_bool(0.9)).collect();
        Self { q, k, v, sees, bias, sinks: vec![0.5, -1.0, 2.0, f64::NEG_INFINITY] }
    }

    fn score(&self, choices: Choices, at: At) -> Score {
        let q = &self.q[((at.batch * HEADS + at.head) * TOKENS + at.token) * HEAD_DIM..][..HEAD_DIM];
        let k = &self.k[(kv_head(choices, at) * KEYS + at.key) * HEAD_DIM..][..HEAD_DIM];
        let scale = (choices.scale_dim as f64).sqrt().recip();
        let exact = Score::dot(scale, q, k);
        if !choices.half {
            return exact;
        }
        let sum = q.iter().zip(k).fold(f16::ZERO, |sum, (q, k)| f16::from_f32(sum.to_f32() + q * k));
        Score { value: scale * sum.to_f64(), ..exact }
    }

    fn formula(&self, choices: Choices) -> Formula<'_> {
        let value = move |at: At| &self.v[(kv_head(choices, at) * KEYS + at.key) * VALUE_DIM..][..VALUE_DIM];
        let bias = biases::dense([1, HEADS, TOKENS, KEYS], &self.bias, f32::MIN);
        let mut formula = Formula {
            keys: KEYS,
            value_dim: VALUE_DIM,
            value: Box::new(value),
            score: Box::new(move |at| self.score(choices, at)),
            softcap: choices.softcap,
            biases: Vec::new(),
            visible: vec![Box::new(masks::window(OFFSET, Some(choices.window), None))],
            normaliser: Normaliser::Softmax,
            sink: choices
                .sinks
                .then(|| Box::new(|head: usize| self.sinks[head]) as Box<dyn Fn(usize) -> f64>),
            empty_row: choices.empty_row,
        };
        if choices.cap_sees_bias {
            formula.score = Box::new(move |at| {
                let score = self.score(choices, at);
                Score { value: score.value + bias(at), ..score }
            });
        } else {
            formula.biases.push(Box::new(bias));
        }
        if choices.dense {
            formula.visible.push(Box::new(masks::dense([BATCH, HEADS, TOKENS, KEYS], &self.sees)));
        }
        if let Some(offset) = choices.causal {
            formula.visible.push(Box::new(masks::causal(offset)));
        }
        if choices.lengths {
            formula.visible.push(Box::new(|at| masks::keys(0, [KEYS, LENGTH][at.batch])(at)));
        }
        formula
    }

    fn row(&self, choices: Choices, (batch, head, token): (usize, usize, usize)) -> OperatorRow {
        let mut row = self.formula(choices).row(batch, head, token);
        if choices.merged_by_mean {
            let half = |keys: std::ops::Range<usize>| {
                let mut formula = self.formula(choices);
                formula.visible.push(Box::new(masks::keys(keys.start, keys.end)));
                formula.row(batch, head, token).context
            };
            let halves = half(0..KEYS / 2).into_iter().zip(half(KEYS / 2..KEYS));
            row.context = halves.map(|(left, right)| (left + right) / 2.0).collect();
        }
        row
    }

    /// The worst error of such an implementation, were it exact otherwise, over the oracle's bound.
    fn worst_ratio(&self, choices: Choices) -> f64 {
        let rows = (0..BATCH * HEADS * TOKENS).map(|n| (n / TOKENS / HEADS, n / TOKENS % HEADS, n % TOKENS));
        let ratios = rows.map(|at| {
            let got = self.row(choices, at);
            let context: Vec<f32> = got.context.iter().map(|c| *c as f32).collect();
            self.row(RIGHT, at).worst_ratio(&context, got.lse as f32)
        });
        ratios.fold(0.0, f64::max)
    }
}

fn kv_head(choices: Choices, at: At) -> usize {
    let of_batch = if choices.tiled { at.head % KV_HEADS } else { at.head / (HEADS / KV_HEADS) };
    at.batch * KV_HEADS + of_batch
}

#[test]
fn what_is_right_is_inside_of_the_bound_and_every_mutant_outside() {
    for seed in 0..4 {
        let case = Case::new(seed);
        let right = case.worst_ratio(RIGHT);
        // Rounded once, where a computation in f32 rounds at every step.
        assert!(right > 0.0 && right < 0.1, "seed {seed}: {right}");
        for (what, choices) in MUTANTS {
            let worst = case.worst_ratio(choices);
            assert!(worst > 10.0, "seed {seed}: {what} is within {worst} of the bound");
        }
    }
}
