//! The kernel crate's unit tests under Miri, which sees undefined behaviour that no fault and no wrong bit shows.
//!
//! Needs rustup and its nightly toolchain with two components:
//!
//! ```text
//! rustup toolchain install nightly --profile minimal --component miri --component rust-src
//! ```
//!
//! **What runs.** Every unit test of the crate, on the portable kernels, which are the only ones that Miri has the CPU for:
//! blocks of both kernel families over f32, f16, bf16, int8 and int4, of one to three pages with ragged ends, under each kind of
//! mask; the general path with cap, biases, dense masks, both normalisers; widening, transposing and writing of pages, planes,
//! merges and division, and the loops of the calibration. Shapes and lists are small (`cfg!(miri)` in the tests), and an
//! allocation has no slack behind it. Borrows are judged by Stacked Borrows, which keep a pointer to the slice that it is from;
//! nothing here needs Tree Borrows, which don't. Numbers keep their addresses to themselves (strict provenance), and
//! alignment counts even where an address has it by accident.
//!
//! **What it can't reach.** `arch/avx2.rs`, `arch/avx512.rs` and `arch/neon.rs`, and the dot products: intrinsics of a CPU, whose
//! entries are the same generic code over other lanes; `cargo xtask test` and `cargo xtask neon` run those between inaccessible
//! pages. Mappings of huge pages and the fences themselves (`mmap`), assembly (the modes of floating point, cycles of a core,
//! sizes of caches). Threads: `attend.rs` has no unsafe code, and rayon's is not this project's.

use std::process::Command;

use crate::step::{Step, run_all};

const TOOLCHAIN: &str = "nightly";
const COMPONENTS: [&str; 2] = ["miri", "rust-src"];
const TEST: &str = "miri test --package attnd-kernel --lib --release --locked";
// Tests compare with functions of the standard library, which Miri makes as inexact as a platform may.
const FLAGS: &str =
    "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check -Zmiri-no-extra-rounding-error";

/// All unit tests of the kernel crate.
pub(crate) fn test() -> Result<(), String> {
    check_components()?;
    run_all(&[Step::cargo(TEST).toolchain(TOOLCHAIN).env("MIRIFLAGS", FLAGS)])
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
