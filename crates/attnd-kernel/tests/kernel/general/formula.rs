//! Results against the oracle, which works out positions and who sees what by itself, and faults that its formula can be given.

use std::rc::Rc;

use attnd_kernel::reference::biases;
use attnd_kernel::reference::operator::{At, Formula, Score};
use attnd_kernel::reference::problem::{Dense, Problem};
use attnd_kernel::{Bias, FinishedRows, Normaliser, Relative, Swin};

use super::request::Request;

/// A formula that is wrong in one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NoCap,
    CapAfterBias,
    NoBias,
    NoMask,
    BiasMaskIsData,
    AlibiByOtherEnd,
    NoAlibi,
    OtherDirection,
    RelativeByOtherEnd,
    SwinTransposed,
    NoRegions,
    NoBlocks,
    BlocksOfOtherKeys,
    NoDocuments,
    AlibiFromPadding,
    SoftmaxForSigmoid,
    NoSigmoidBias,
}

impl Fault {
    pub(super) const ALL: [Self; 17] = [
        Self::NoCap,
        Self::CapAfterBias,
        Self::NoBias,
        Self::NoMask,
        Self::BiasMaskIsData,
        Self::AlibiByOtherEnd,
        Self::NoAlibi,
        Self::OtherDirection,
        Self::RelativeByOtherEnd,
        Self::SwinTransposed,
        Self::NoRegions,
        Self::NoBlocks,
        Self::BlocksOfOtherKeys,
        Self::NoDocuments,
        Self::AlibiFromPadding,
        Self::SoftmaxForSigmoid,
        Self::NoSigmoidBias,
    ];

    /// A request that means the wrong formula, where parts can say it.
    fn of(self, right: &Request) -> Request {
        let mut request = right.clone();
        let parts = &mut request.parts;
        let is_masked = |bias: f32| bias <= f32::MIN;
        match self {
            Self::NoCap => parts.softcap = None,
            Self::NoBias => {
                let all = request.bias.iter_mut().flatten().filter(|bias| !is_masked(**bias));
                all.for_each(|bias| *bias = 0.0);
            }
            Self::NoMask => request.mask.clear(),
            Self::BiasMaskIsData => {
                let all = request.bias.iter_mut().flatten().filter(|bias| is_masked(**bias));
                all.for_each(|bias| *bias = 0.0);
            }
            Self::NoAlibi => parts.biases.retain(|bias| !matches!(bias, Bias::Alibi { .. })),
            Self::OtherDirection => {
                for bias in &mut parts.biases {
                    if let Bias::Relative(right) = bias {
                        let (table, buckets) = (right.table().into(), right.buckets());
                        let distance = right.max_distance();
                        *right = Relative::new(table, buckets, distance, !right.bidirectional()).unwrap();
                    }
                }
            }
            Self::SwinTransposed | Self::NoRegions => {
                for bias in &mut parts.biases {
                    if let Bias::Swin(Swin { height, width, shift, .. }) = bias {
                        if self == Self::NoRegions {
                            *shift = None;
                        } else {
                            std::mem::swap(height, width);
                        }
                    }
                }
            }
            Self::NoBlocks => parts.csr = None,
            Self::NoDocuments => parts.mask.documents = None,
            Self::SoftmaxForSigmoid => parts.normaliser = Normaliser::Softmax,
            Self::NoSigmoidBias => {
                if let Normaliser::Sigmoid { bias } = &mut parts.normaliser {
                    *bias = 0.0;
                }
            }
            Self::CapAfterBias
            | Self::AlibiByOtherEnd
            | Self::AlibiFromPadding
            | Self::RelativeByOtherEnd
            | Self::BlocksOfOtherKeys => {}
        }
        request
    }

    /// What only a formula can say.
    fn edit(self, request: &Request, formula: &mut Formula<'_>) {
        let is_by_distance = |bias: &Bias| match self {
            Self::AlibiByOtherEnd => matches!(bias, Bias::Alibi { by_key: false, .. }),
            Self::RelativeByOtherEnd => matches!(bias, Bias::Relative(_)),
            _ => false,
        };
        if let Some(nth) = request.parts.biases.iter().position(is_by_distance) {
            let right = formula.biases.remove(nth);
            let wrong = move |at: At| right(At { token: at.token + 1, ..at });
            formula.biases.insert(nth, Box::new(wrong));
        }
        for (nth, bias) in request.parts.biases.iter().enumerate() {
            if let (Self::AlibiFromPadding, Bias::Alibi { slopes, by_key: true }) = (self, bias) {
                let slopes = slopes.clone();
                formula.biases[nth] = Box::new(move |at| biases::alibi_by_key(0, &slopes)(at));
            }
        }
        // Blocks are the last rule of a formula.
        if self == Self::BlocksOfOtherKeys && request.parts.csr.is_some() {
            let right = formula.visible.pop().unwrap();
            formula.visible.push(Box::new(move |at| right(At { key: at.key + 1, ..at })));
        }
        if self == Self::CapAfterBias && formula.softcap.is_some() {
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
    }
}

/// A dense tensor as the oracle takes it.
pub(super) fn dense<T: Copy>(planes: &[Vec<T>], n_keys: usize) -> Option<Dense<T>> {
    let rows = planes.first()?.len() / n_keys;
    Some(Dense { shape: [1, planes.len(), rows, n_keys], elements: planes.concat() })
}

/// A request in the oracle's words.
pub(super) fn problem<'a>(
    request: &'a Request,
    mask: Option<&'a Dense<bool>>,
    bias: Option<&'a Dense<f32>>,
) -> Problem<'a> {
    let case = &request.case;
    Problem { shape: case.shape, parts: &request.parts, q: &case.q, k: &case.k, v: &case.v, mask, bias }
}

/// The worst error of a result over the bound; at most 1 is right.
pub(super) fn worst_ratio(request: &Request, got: &FinishedRows) -> f64 {
    worst_ratio_with(request, got, None)
}

pub(super) fn worst_ratio_with(request: &Request, got: &FinishedRows, fault: Option<Fault>) -> f64 {
    let request = &fault.map_or_else(|| request.clone(), |fault| fault.of(request));
    let dv = request.case.shape.value_dim();
    let mask = dense(&request.mask, request.n_keys());
    let bias = dense(&request.bias, request.n_keys());
    let problem = problem(request, mask.as_ref(), bias.as_ref());
    let mut worst: f64 = 0.0;
    for token in 0..request.n_queries() {
        let mut formula = problem.formula(0, token);
        if let Some(fault) = fault {
            fault.edit(request, &mut formula);
        }
        for head in 0..request.group() {
            let row = head * request.n_queries() + token;
            let context = &got.context[row * dv..][..dv];
            worst = worst.max(formula.row(0, head, token).worst_ratio(context, got.lse[row]));
        }
    }
    worst
}
