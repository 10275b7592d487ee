//! The kernel crate's unit tests under Miri, which sees undefined behaviour that no fault and no wrong bit shows.
//!
//! Needs rustup and its nightly toolchain with two components:
//!
//! ```text
//! rustup toolchain install nightly --profile minimal --component miri --component rust-src
//! ```
//!
//! **What runs.** The crate's unit tests on the portable kernels, which are the only ones that Miri has a CPU for. Their cases
//! are few and small there (`cfg!(miri)`): blocks of rows in both kernel families, over f32, f16, bf16, int8 and int4, of one or
//! two pages with ragged ends, under each kind of mask; the general path with cap, biases, dense masks and both normalisers;
//! widening, transposing and writing of pages; sequences that grow, fork and are cut, and the frames that their pages lie in; planes; merges and division; the loops of the calibration. No allocation has
//! slack behind it, and what must not be used holds NaN. Borrows are stacked, so that a pointer reaches no further than the slice
//! that it is from. An integer is no address (strict provenance), and memory is aligned by its type or not at all.
//!
//! **What is left out.** Tests of code that has nothing unsafe in or under it, or that reaches with whole pages what others reach
//! with a few keys, or that runs on rayon's threads: see [`LEFT_OUT`].
//!
//! **What it can't reach.** `arch/avx2.rs`, `arch/avx512.rs`, `arch/neon.rs` and the dot products, which are intrinsics of a CPU;
//! their entries are the same generic code over other lanes, which the suite and `cargo xtask neon` run between inaccessible
//! pages. Mappings of huge pages, and those fences (`mmap`). Assembly: the modes of floating point, a core's cycles and caches.
//! Threads: `attend.rs` has nothing unsafe in it, and what rayon has is rayon's.

use std::process::Command;

use crate::step::{Step, run_all};

const TOOLCHAIN: &str = "nightly";
const COMPONENTS: [&str; 2] = ["miri", "rust-src"];
const TEST: &str = "miri test --package attnd-kernel --lib --release --locked --";
/// Tests that aren't run, by the beginnings of their names.
const LEFT_OUT: [&str; 14] = [
    // Nothing unsafe.
    "bias::",
    "fold::",
    "inspect::bins::",
    "inspect::top::",
    "mask::",
    "quantise::",
    "reference::",
    "slot::",
    "value_sum::",
    // Rayon, whose lists keep pointers in integers; nothing unsafe of its own.
    "project::",
    // Whole pages.
    "pages::tests::elements_are_where_the_layout_says",
    "pages::tests::two_elements_of_sixteen_bits",
    "pages::tests::four_or_eight_integers",
    "pages::tests::the_first_non_finite_value",
];
const FLAGS: &str = concat!(
    "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check",
    // One test has a second thread: that of the arena, whose lists are behind a lock. It has passed with the detector.
    " -Zmiri-disable-data-race-detector",
    // Tests compare with functions of the standard library, which Miri makes as inexact as a platform may.
    " -Zmiri-no-extra-rounding-error",
);

/// Unit tests of the kernel crate.
pub(crate) fn test() -> Result<(), String> {
    check_components()?;
    let skipped: String = LEFT_OUT.iter().map(|name| format!(" --skip {name}")).collect();
    run_all(&[Step::cargo(format!("{TEST}{skipped}")).toolchain(TOOLCHAIN).env("MIRIFLAGS", FLAGS)])
}

fn check_components() -> Result<(), String> {
    let list = ["component", "list", "--installed", "--toolchain", TOOLCHAIN];
    let installed = match Command::new("rustup").args(list).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        // No such toolchain, or no rustup.
        Ok(_) | Err(_) => String::new(),
    };
    // A component of a target has its name behind it.
    let has = |component: &str| installed.lines().any(|line| line.starts_with(component));
    let missing: Vec<&str> = COMPONENTS.into_iter().filter(|component| !has(component)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "rustup's toolchain {TOOLCHAIN} lacks: {}\n  rustup toolchain install {TOOLCHAIN} --profile minimal --component {}",
        missing.join(", "),
        COMPONENTS.join(" --component ")
    ))
}
