//! Dot products (Luong et al. 2015, equation 8): `q . k`. All that tells them from scaled ones is the scale of a call that gives none.

use std::sync::Arc;

use super::scaled_dot::Product;
use super::{DefaultScale, Function};

pub(super) static FUNCTION: Function = Function {
    name: "dot",
    summary: "q . k (Luong)",
    parameters: &[],
    default_scale: DefaultScale::One,
    bind: |bound| Ok(Arc::new(Product { dim: bound.same_dim()? })),
};
