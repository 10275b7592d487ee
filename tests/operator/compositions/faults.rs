//! Compositions with a part less, and implementations that are wrong in one way: the kernels with other parts where parts can say what is wrong,
//! the oracle with another formula where they can't.

use std::rc::Rc;

use attnd_kernel::reference::operator::{At, EmptyRow as Empty, Formula, Score};
use attnd_kernel::{
    AttnShape, Bias, Causal, Dims, EmptyRow, Kernels, Mask, Normaliser, OperatorParts, Positions, Relative,
    Swin, Window,
};
use half::f16;

use super::case::Case;
use super::compute::{Rows, attend};

/// Takes a part out of a case; whether there was one.
type Removal = fn(&mut Case) -> bool;

/// Every part that a case may do without.
pub(super) const REMOVALS: [Removal; 20] = [
    |case| case.parts.softcap.take().is_some(),
    |case| {
        case.mask = None;
        case.parts.selection.take().is_some()
    },
    |case| {
        case.bias = None;
        remove_bias(case, |bias| matches!(bias, Bias::Dense))
    },
    |case| remove_bias(case, |bias| matches!(bias, Bias::Alibi { .. })),
    |case| remove_bias(case, |bias| matches!(bias, Bias::Relative(_))),
    |case| remove_bias(case, |bias| matches!(bias, Bias::Swin(_))),
    |case| edit_swin(case, |swin| swin.shift = None),
    |case| case.parts.csr.take().is_some(),
    |case| case.parts.sinks.take().is_some(),
    |case| replace(&mut case.parts.normaliser, Normaliser::Softmax),
    |case| replace(&mut case.parts.empty_row, EmptyRow::Zero),
    |case| case.parts.mask.documents.take().is_some(),
    |case| case.parts.mask.prefix.take().is_some(),
    |case| replace(&mut case.parts.mask.causal, false),
    |case| replace(&mut case.parts.mask.window, Window::default()),
    |case| case.parts.mask.chunk.take().is_some(),
    |case| case.parts.mask.key_begin.take().is_some(),
    |case| case.parts.mask.key_end.take().is_some(),
    |case| case.parts.mask.query_end.take().is_some(),
    |case| replace(&mut case.parts.mask.positions, Some(Positions::TopLeft)),
];

fn replace<T: PartialEq>(part: &mut T, other: T) -> bool {
    let differs = *part != other;
    *part = other;
    differs
}

fn remove_bias(case: &mut Case, is_it: fn(&Bias) -> bool) -> bool {
    let before = case.parts.biases.len();
    case.parts.biases.retain(|bias| !is_it(bias));
    case.parts.biases.len() < before
}

/// Edits the bias of windows; whether that changed it.
fn edit_swin(case: &mut Case, edit: impl Fn(&mut Swin)) -> bool {
    let swin = case.parts.biases.iter_mut().find_map(|bias| match bias {
        Bias::Swin(swin) => Some(swin),
        _ => None,
    });
    swin.is_some_and(|swin| {
        let before = swin.clone();
        edit(swin);
        *swin != before
    })
}

/// What a wrong implementation makes of a case; nothing where it has nothing to get wrong.
type Fault = fn(&Case) -> Option<Rows>;

/// By what they do; those that real implementations had, and one or more for each part that they haven't.
pub(super) const FAULTS: [(&str, Fault); 35] = [
    ("no mask", |case| of_parts(case, REMOVALS[1])),
    ("no causal rule", |case| of_mask(case, |mask| (mask.prefix, mask.causal) = (None, false))),
    ("the other corner", |case| {
        of_mask(case, |mask| {
            mask.positions = match mask.positions {
                Some(Positions::TopLeft) => Some(Positions::BottomRight),
                Some(Positions::BottomRight) => Some(Positions::TopLeft),
                _ => return,
            }
        })
    }),
    ("no lengths", |case| of_parts(case, REMOVALS[17])),
    ("no sinks", |case| of_parts(case, REMOVALS[8])),
    ("no cap", |case| of_parts(case, REMOVALS[0])),
    ("cap after bias", |case| {
        let is_there = case.parts.softcap.is_some() && !case.parts.biases.is_empty();
        is_there.then(|| of_formula(case, cap_after_bias))
    }),
    ("NaN in empty rows", |case| {
        (case.parts.empty_row == EmptyRow::Zero)
            .then(|| of_formula(case, |formula| formula.empty_row = Empty::Nan))
    }),
    ("uniform empty rows", |case| {
        (case.parts.empty_row != EmptyRow::Uniform)
            .then(|| of_formula(case, |formula| formula.empty_row = Empty::Uniform))
    }),
    ("window one too wide", |case| {
        of_mask(case, |mask| mask.window.left = mask.window.left.map(|left| left + 1))
    }),
    ("window one too narrow", |case| {
        of_mask(case, |mask| mask.window.right = mask.window.right.map(|right| right.saturating_sub(1)))
    }),
    ("heads tiled instead of grouped", tiled),
    ("scale from the dimension of values", |case| {
        let [d, dv] = [case.shape.head_dim(), case.shape.value_dim()].map(|dim| dim as f32);
        of_parts(case, |case| {
            case.parts.scale *= (d / dv).sqrt();
            d != dv && case.parts.scale != 0.0
        })
    }),
    ("merged by mean", merged_by_mean),
    ("accumulated in f16", |case| Some(of_formula(case, in_f16(case)))),
    ("the scale's sign lost", |case| {
        of_parts(case, |case| {
            let scale = case.parts.scale.abs();
            replace(&mut case.parts.scale, scale)
        })
    }),
    ("prefix hidden", |case| of_parts(case, REMOVALS[12])),
    ("no chunks", |case| of_parts(case, REMOVALS[15])),
    ("padding on the left seen", |case| of_parts(case, REMOVALS[16])),
    ("queries of the padding answered", |case| of_parts(case, REMOVALS[18])),
    ("documents mixed", |case| of_parts(case, REMOVALS[11])),
    ("documents of the next key", |case| {
        let is_there = case.parts.mask.documents.is_some();
        // The last of the rules of intervals; a dense mask and blocks come behind it.
        let behind = usize::from(case.mask.is_some()) + usize::from(case.parts.csr.is_some());
        is_there.then(|| of_formula(case, |formula| next_key(formula, formula.visible.len() - 1 - behind)))
    }),
    ("no dense bias", |case| of_parts(case, REMOVALS[2])),
    ("no linear bias", |case| of_parts(case, REMOVALS[3])),
    ("linear bias by the other rule", |case| {
        of_parts(case, |case| {
            let slopes = case.parts.biases.iter_mut().find_map(|bias| match bias {
                Bias::Alibi { by_key, .. } => Some(by_key),
                _ => None,
            });
            slopes.map(|by_key| *by_key = !*by_key).is_some()
        })
    }),
    ("no relative bias", |case| of_parts(case, REMOVALS[4])),
    ("relative bias of one direction", |case| {
        of_parts(case, |case| {
            let relative = case.parts.biases.iter_mut().find_map(|bias| match bias {
                Bias::Relative(relative) => Some(relative),
                _ => None,
            });
            let other = |relative: &mut Relative| {
                let (table, buckets) = (relative.table().into(), relative.buckets());
                let (distance, both) = (relative.max_distance(), relative.bidirectional());
                *relative = Relative::new(table, buckets, distance, !both).unwrap();
            };
            relative.map(other).is_some()
        })
    }),
    ("no bias of windows", |case| of_parts(case, REMOVALS[5])),
    ("windows transposed", |case| {
        of_parts(case, |case| edit_swin(case, |Swin { height, width, .. }| std::mem::swap(height, width)))
    }),
    ("regions of shifted windows mixed", |case| of_parts(case, REMOVALS[6])),
    ("regions of the first window", |case| {
        of_parts(case, |case| {
            let tokens = case.shape.n_queries();
            edit_swin(case, |swin| {
                if let Some(shift) = &mut swin.shift {
                    shift.regions = shift.regions[..tokens].into();
                }
            })
        })
    }),
    ("no blocks", |case| of_parts(case, REMOVALS[7])),
    ("blocks of the next key", |case| {
        let last = |formula: &mut Formula<'_>| next_key(formula, formula.visible.len() - 1);
        case.parts.csr.is_some().then(|| of_formula(case, last))
    }),
    ("softmax for sigmoid", |case| of_parts(case, REMOVALS[9])),
    ("no bias of the sigmoid", |case| {
        of_parts(case, |case| match &mut case.parts.normaliser {
            Normaliser::Softmax => false,
            Normaliser::Sigmoid { bias } => replace(bias, 0.0),
        })
    }),
];

/// The kernels with other parts.
fn of_parts(case: &Case, edit: impl Fn(&mut Case) -> bool) -> Option<Rows> {
    let mut case = case.clone();
    let has_changed = edit(&mut case) && case.is_possible();
    has_changed.then(|| attend(&case, Kernels::available()[0]).unwrap())
}

fn of_mask(case: &Case, edit: impl Fn(&mut Mask)) -> Option<Rows> {
    of_parts(case, |case| {
        let before = case.parts.mask.clone();
        edit(&mut case.parts.mask);
        case.parts.mask != before
    })
}

/// The oracle with another formula, rounded.
fn of_formula(case: &Case, edit: impl Fn(&mut Formula<'_>)) -> Rows {
    let (shape, problem) = (case.shape, case.problem());
    let mut all = Rows::default();
    for row in 0..shape.batch() * shape.n_heads() * shape.n_queries() {
        let (head, token) = (row / shape.n_queries(), row % shape.n_queries());
        let (batch, head) = (head / shape.n_heads(), head % shape.n_heads());
        let mut formula = problem.formula(batch, token);
        edit(&mut formula);
        let row = formula.row(batch, head, token);
        all.context.extend(row.context.iter().map(|x| *x as f32));
        all.lse.push(row.lse as f32);
    }
    all
}

/// One rule looks at the key behind the one that it is asked for.
fn next_key(formula: &mut Formula<'_>, rule: usize) {
    let right = formula.visible.remove(rule);
    // The last key has none behind it.
    let last = formula.keys - 1;
    formula.visible.push(Box::new(move |at| right(At { key: (at.key + 1).min(last), ..at })));
}

fn cap_after_bias(formula: &mut Formula<'_>) {
    let biases = Rc::new(std::mem::take(&mut formula.biases));
    let right = std::mem::replace(&mut formula.score, Box::new(|at| panic!("{at:?}")));
    let added = biases.clone();
    formula.score = Box::new(move |at| {
        let score = right(at);
        let added = added.iter().map(|bias| bias(at)).filter(|bias| bias.is_finite());
        Score { value: score.value + added.sum::<f64>(), ..score }
    });
    formula.visible.push(Box::new(move |at| biases.iter().all(|bias| bias(at).is_finite())));
}

/// Products summed in f16.
fn in_f16(case: &Case) -> impl Fn(&mut Formula<'_>) {
    let (shape, scale, q, k) = (case.shape, f64::from(case.parts.scale), case.q.clone(), case.k.clone());
    let operands = Rc::new((q, k));
    move |formula| {
        let operands = operands.clone();
        formula.score = Box::new(move |at| {
            let (q, k) = &*operands;
            let d = shape.head_dim();
            let row = (at.batch * shape.n_heads() + at.head) * shape.n_queries() + at.token;
            let group = at.batch * shape.n_kv_heads() + at.head / shape.group_size();
            let (q, k) = (&q[row * d..][..d], &k[(group * shape.n_keys() + at.key) * d..][..d]);
            let sum = q.iter().zip(k).fold(f16::ZERO, |sum, (q, k)| f16::from_f32(sum.to_f32() + q * k));
            Score { value: scale * sum.to_f64(), ..Score::dot(scale, q, k) }
        });
    }
}

/// Query head `h` with kv head `h % kv_heads`.
fn tiled(case: &Case) -> Option<Rows> {
    let shape = case.shape;
    let [batch, heads, kv_heads] = [shape.batch(), shape.n_heads(), shape.n_kv_heads()];
    if kv_heads == 1 || kv_heads == heads {
        return None;
    }
    let of_heads = |x: &[f32], dim: usize| -> Vec<f32> {
        let size = shape.n_keys() * dim;
        let heads = (0..batch * heads).map(|head| head / heads * kv_heads + head % heads % kv_heads);
        heads.flat_map(|head| &x[head * size..][..size]).copied().collect()
    };
    let dims = [batch, heads, heads, shape.n_queries(), shape.n_keys(), shape.head_dim(), shape.value_dim()];
    let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = dims.map(|n| n as u64);
    let tiled = Case {
        shape: AttnShape::new(Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim }).unwrap(),
        k: of_heads(&case.k, shape.head_dim()),
        v: of_heads(&case.v, shape.value_dim()),
        ..case.clone()
    };
    Some(attend(&tiled, Kernels::available()[0]).unwrap())
}

/// Both halves of the keys by themselves, and the mean of what they give.
fn merged_by_mean(case: &Case) -> Option<Rows> {
    let half = case.shape.n_keys() / 2;
    let of_half = |is_left: bool| {
        of_formula(case, |formula| formula.visible.push(Box::new(move |at| (at.key < half) == is_left)))
    };
    let (left, right) = (of_half(true), of_half(false));
    let context = left.context.iter().zip(&right.context).map(|(left, right)| (left + right) / 2.0).collect();
    (half > 0).then_some(Rows { context, lse: left.lse })
}

#[test]
fn a_case_without_its_parts_is_plain() {
    for seed in 0..200 {
        let mut case = Case::random(seed);
        for remove in REMOVALS {
            remove(&mut case);
        }
        case.parts.scale = 0.5;
        let plain = OperatorParts::plain(0.5, Causal::None);
        let mask = Mask { positions: Some(Positions::TopLeft), ..plain.mask.clone() };
        assert_eq!(case.parts, OperatorParts { mask, ..plain });
    }
}
