//! The test suite: `test`, which every change passes, and `nightly`, which takes its time.

use crate::python;
use crate::step::{Step, run_all, run_beside};

// Both run beside the build, which for minutes has one crate to compile, in a folder of their own: cargo locks the one it builds
// in. They use the same profile, so build scripts and procedural macros are compiled twice and not three times.
const CLIPPY: &str =
    "clippy --workspace --all-targets --profile suite --locked --target-dir target/lints -- -D warnings";
// Private items are documented for those who work on them, so their links are checked too.
const DOC: &str =
    "doc --workspace --no-deps --document-private-items --profile suite --locked --target-dir target/lints";
// Builds the program too, for the tests that start it: `attnd` has integration tests of its own, and all is built before anything
// runs. To build it before by itself would compile the kernels twice, as its features are those of fewer packages.
const BUILD: &str = "test --workspace --profile suite --locked --no-run";
// The tests of processes run one after the other, and mostly wait: all others run beside them. Both have the features of the
// build before, which the tests of processes give those of the others, so nothing is compiled again.
const PROCESS_TESTS: &str = "test --workspace --profile suite --locked --test attnd";
const OTHER_TESTS: &str =
    "test --workspace --exclude attnd-tests --features attnd-node/simulation --profile suite --locked";
// As it is shipped.
const RELEASE_TEST: &str = "test --workspace --release --locked";
// The free order, which only a measurement needs, is compiled nowhere else. It is written for x86-64. Its features are others, so
// both check or compile the kernels once more.
const FREE_ORDER_CLIPPY: &str = "clippy --package attnd-kernel --features free-order --all-targets --profile suite --locked -- -D warnings";
const FREE_ORDER_TEST: &str =
    "test --package attnd-kernel --features free-order --lib --release --locked free_order";

/// Format, clippy, docs, tests, and those of the Python package.
pub(crate) fn test() -> Result<(), String> {
    run_all(&[Step::cargo("fmt --all --check")])?;
    run_beside(
        &[Step::cargo(BUILD)],
        &[
            &[Step::cargo(CLIPPY), Step::cargo(DOC).env("RUSTDOCFLAGS", "-D warnings")],
            &python::environment(),
        ],
    )?;
    run_beside(&[Step::cargo(PROCESS_TESTS)], &[&[Step::cargo(OTHER_TESTS)]])?;
    python::test()
}

/// All tests of a release with `ATTND_NIGHTLY=1`, on which tests extend their lists of cases, and the free order.
pub(crate) fn nightly() -> Result<(), String> {
    let mut steps = vec![Step::cargo(RELEASE_TEST).env("ATTND_NIGHTLY", "1")];
    if cfg!(target_arch = "x86_64") {
        steps.extend([FREE_ORDER_CLIPPY, FREE_ORDER_TEST].map(Step::cargo));
    }
    run_all(&steps)
}
