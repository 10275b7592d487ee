//! Brody's graph attention (2022, "How attentive are graph attention networks?", equation 7): `v . LeakyReLU(W_q q + W_k k + b)`.

use std::sync::Arc;

use super::additive::{PARAMETERS, Units};
use super::gat::{SLOPE, slope};
use super::{DefaultScale, Function, Parameter};
use crate::general::reduce::Reducer;

pub(super) static FUNCTION: Function = Function {
    name: "gatv2",
    summary: "v . LeakyReLU(W_q q + W_k k + b) (Brody)",
    parameters: &WITH_SLOPE,
    default_scale: DefaultScale::One,
    bind: |bound| Ok(Arc::new(Units::of(bound, Reducer::Leaky { slope: slope(bound)? })?)),
};

const WITH_SLOPE: [Parameter; 5] = {
    let [v, w_q, w_k, b] = PARAMETERS else { panic!() };
    [*v, *w_q, *w_k, *b, SLOPE]
};
