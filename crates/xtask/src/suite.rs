//! The test suite: `test`, which every change passes, and `nightly`, which takes its time.

use crate::step::{Step, run_all};

// Clippy and rustdoc use the release profile as well: build scripts and procedural macros are then compiled once.
const CLIPPY: &str = "clippy --workspace --all-targets --release --locked -- -D warnings";
// Private items are documented for those who work on them, so their links are checked too.
const DOC: &str = "doc --workspace --no-deps --document-private-items --release --locked";
// The tests with real processes start this program.
const BUILD: &str = "build --release --package attnd --locked";
const TEST: &str = "test --workspace --release --locked";

/// Format, clippy, docs, build, tests.
pub(crate) fn test() -> Result<(), String> {
    run_all(&[
        Step::cargo("fmt --all --check"),
        Step::cargo(CLIPPY),
        Step::cargo(DOC).env("RUSTDOCFLAGS", "-D warnings"),
        Step::cargo(BUILD),
        Step::cargo(TEST),
    ])
}

/// All tests with `ATTND_NIGHTLY=1`, on which tests extend their lists of cases.
pub(crate) fn nightly() -> Result<(), String> {
    run_all(&[Step::cargo(BUILD), Step::cargo(TEST).env("ATTND_NIGHTLY", "1")])
}
