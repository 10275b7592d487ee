//! One test binary: the rules of the house here, clusters of real processes beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its verdict")]

mod bad_input;
mod conformance;
mod exactness;
mod layers;
mod lifecycle;
mod loss;
mod memory;
mod operator;
mod real_layers;
mod sessions;
mod simulation;
mod support;
mod tidy;
