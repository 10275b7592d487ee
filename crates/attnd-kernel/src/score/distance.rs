//! A Gaussian kernel's exponent (kernel regression: Nadaraya 1964, Watson 1964): `-|q - k|^2 / (2 width^2)`.

use std::sync::Arc;

use super::{Bound, DefaultScale, Function, Parameter, ScoreError, ScoreFunction, Symbol};
use crate::general::reduce::Reducer;

pub(super) static FUNCTION: Function = Function {
    name: "distance",
    summary: "-|q - k|^2 / (2 width^2) (a Gaussian kernel's exponent)",
    parameters: &[Parameter { name: "width", shapes: &[&[Symbol::One]], default: Some(1.0) }],
    default_scale: DefaultScale::One,
    bind,
};

fn bind(bound: &Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError> {
    let width = bound.per_head("width").of(0)[0];
    // Squares of other widths are no factor in f32.
    if !(1e-15..=1e15).contains(&width) {
        let expected = "from 1e-15 to 1e15";
        return Err(ScoreError::Value { parameter: "width", at: 0, value: width, expected });
    }
    Ok(Arc::new(Gaussian { dim: bound.same_dim()?, width }))
}

#[derive(Debug)]
struct Gaussian {
    dim: usize,
    width: f32,
}

impl ScoreFunction for Gaussian {
    fn reducer(&self) -> Reducer {
        Reducer::Distance { width: self.width }
    }

    fn dim(&self) -> usize {
        self.dim
    }
}
