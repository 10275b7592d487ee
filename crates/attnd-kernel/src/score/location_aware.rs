//! Chorowski's location-aware score (2015, "Attention-based models for speech recognition", equations 8 and 9):
//! `v . tanh(W_q q + W_k k + U f + b)`, where `f` are the weights that the row had before around the key, by the filters of a
//! convolution: centred, with zeros outside of the sequence.

use std::sync::Arc;

use super::additive::{PARAMETERS, Units};
use super::{Bound, DefaultScale, Function, KeyRows, Parameter, PerHead, QueryRows, ScoreError, ScoreFunction, Symbol};
use crate::dispatch::Kernels;
use crate::general::reduce::{Filters, Reducer};

pub(super) static FUNCTION: Function = Function {
    name: "location_aware",
    summary: "v . tanh(W_q q + W_k k + U conv(previous weights) + b) (Chorowski)",
    parameters: &WITH_FILTERS,
    default_scale: DefaultScale::One,
    bind,
};

const WITH_FILTERS: [Parameter; 6] = {
    let [v, w_q, w_k, b] = *PARAMETERS else { panic!() };
    let u = Parameter {
        name: "u",
        shapes: &[&[Symbol::Units, Symbol::Filters], &[Symbol::Heads, Symbol::Units, Symbol::Filters]],
        default: None,
    };
    let filters = Parameter {
        name: "filters",
        shapes: &[&[Symbol::Filters, Symbol::Taps], &[Symbol::Heads, Symbol::Filters, Symbol::Taps]],
        default: None,
    };
    [v, w_q, w_k, b, u, filters]
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    Ok(Arc::new(Located {
        units: Units::of(bound, Reducer::Located)?,
        u: bound.per_head("u"),
        filters: bound.per_head("filters"),
        n_taps: bound.free(Symbol::Taps).unwrap_or(1),
    }))
}

#[derive(Debug)]
struct Located {
    units: Units,
    /// `[units, filters]`.
    u: PerHead<Vec<f32>>,
    /// `[filters, taps]`.
    filters: PerHead<Vec<f32>>,
    n_taps: usize,
}

impl ScoreFunction for Located {
    fn reducer(&self) -> Reducer {
        Reducer::Located
    }

    fn dim(&self) -> usize {
        self.units.dim()
    }

    fn keeps_queries(&self) -> bool {
        false
    }

    fn keeps_keys(&self) -> bool {
        false
    }

    fn query_rows(&self, kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        self.units.query_rows(kernels, rows, q, out);
    }

    fn key_rows(&self, kernels: &Kernels, rows: KeyRows, k: &[f32], out: &mut [f32]) {
        self.units.key_rows(kernels, rows, k, out);
    }

    fn key_cost(&self) -> usize {
        self.units.key_cost()
    }

    fn weights(&self, head: usize) -> &[f32] {
        self.units.weights(head)
    }

    fn filters(&self, head: usize) -> Option<Filters<'_>> {
        Some(Filters { taps: self.filters.of(head), n_taps: self.n_taps, units: self.u.of(head) })
    }
}
