//! The kernels as their users see them: bits, accuracy, and laws that need no oracle.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod accuracy;
mod bits;
mod cases;
mod dots;
mod fallback;
mod general;
mod grown;
mod laws;
mod machine_code;
mod masks;
mod operators;
mod scores;
