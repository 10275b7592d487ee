//! The simulation of a cluster (`tests/simulation.rs`), for other seeds than those of the suite.

use crate::step::{Step, run_all};

const TEST: &str =
    "test --workspace --profile suite --locked --test attnd simulation::whatever -- --nocapture";

/// Runs the seeds below a number, or one.
pub(crate) fn run(which: &'static str, number: &str) -> Result<(), String> {
    let number: u64 = number.parse().map_err(|_none| format!("{number:?} is no number of seeds"))?;
    run_all(&[Step::cargo(TEST).env(which, number.to_string())])
}
