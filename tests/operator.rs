//! The whole operator against its f64 oracle.

mod compositions;
mod mutants;
