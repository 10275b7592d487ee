//! The test suite: `test`, which every change passes, and `nightly`, which takes its time.

use crate::step::{Step, run_all};

// Clippy and rustdoc use the release profile as well: build scripts and procedural macros are then compiled once.
const CLIPPY: &str = "clippy --workspace --all-targets --release --locked -- -D warnings";
// Private items are documented for those who work on them, so their links are checked too.
const DOC: &str = "doc --workspace --no-deps --document-private-items --release --locked";
// The tests with real processes start this program.
const BUILD: &str = "build --release --package attnd --locked";
const TEST: &str = "test --workspace --release --locked";
// The free order, which only a measurement needs, is compiled nowhere else. It is written for x86-64.
const FREE_ORDER: &[&str] = &[
    "clippy --package attnd-kernel --features free-order --all-targets --release --locked -- -D warnings",
    "test --package attnd-kernel --features free-order --lib --release --locked free_order",
];

/// Format, clippy, docs, build, the free order, tests.
pub(crate) fn test() -> Result<(), String> {
    let free_order = if cfg!(target_arch = "x86_64") { FREE_ORDER } else { &[] };
    let mut steps = vec![
        Step::cargo("fmt --all --check"),
        Step::cargo(CLIPPY),
        Step::cargo(DOC).env("RUSTDOCFLAGS", "-D warnings"),
        Step::cargo(BUILD),
    ];
    steps.extend(free_order.iter().map(|arguments| Step::cargo(*arguments)));
    steps.push(Step::cargo(TEST));
    run_all(&steps)
}

/// All tests with `ATTND_NIGHTLY=1`, on which tests extend their lists of cases.
pub(crate) fn nightly() -> Result<(), String> {
    run_all(&[Step::cargo(BUILD), Step::cargo(TEST).env("ATTND_NIGHTLY", "1")])
}
