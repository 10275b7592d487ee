//! The kernel crate's tests on aarch64, under qemu's user mode emulation, with a compiler from Debian's packages.
//!
//! rustup's toolchain stays as it is: Debian's rustc is called by its path, and builds go to `target/neon`.

use std::path::Path;
use std::process::Command;

use crate::step::{Step, run_all};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const RUSTC: &str = "/usr/bin/rustc";
const LINKER: &str = "aarch64-linux-gnu-gcc";
// No `-L /usr/aarch64-linux-gnu`: the loader found there would take the C library from /lib/aarch64-linux-gnu, another
// build, and the first thread to be started would spin for ever.
const QEMU: &str = "qemu-aarch64-static";
// The default model has everything qemu can emulate; this one has base NEON and nothing else.
const PLAIN_CPU: &str = "qemu-aarch64-static -cpu cortex-a72";

/// Tests on a CPU with every extension and on one with none.
pub(crate) fn test() -> Result<(), String> {
    check_prerequisites()?;
    run_all(&[tests_under(QEMU), tests_under(PLAIN_CPU)])
}

fn tests_under(runner: &str) -> Step {
    Step::cargo(format!("test --package attnd-kernel --lib --tests --release --locked --target {TARGET}"))
        .env("RUSTC", RUSTC)
        .env("CARGO_TARGET_DIR", "target/neon")
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", runner)
}

/// Something that must be installed, and the Debian package that has it.
struct Prerequisite {
    what: &'static str,
    package: &'static str,
    present: bool,
}

fn check_prerequisites() -> Result<(), String> {
    let prerequisites = [
        Prerequisite { what: RUSTC, package: "rustc-web", present: runs(RUSTC, &["--version"]) },
        Prerequisite {
            what: "Rust's standard library for aarch64",
            package: "libstd-rust-web-dev:arm64",
            present: target_libdir().is_some_and(|dir| Path::new(&dir).is_dir()),
        },
        Prerequisite {
            what: "the C library for aarch64",
            package: "libc6:arm64",
            present: Path::new("/lib/ld-linux-aarch64.so.1").exists(),
        },
        Prerequisite {
            what: LINKER,
            package: "gcc-aarch64-linux-gnu",
            present: runs(LINKER, &["--version"]),
        },
        Prerequisite {
            what: "the C start files for aarch64",
            package: "libc6-dev-arm64-cross",
            present: Path::new("/usr/aarch64-linux-gnu/lib/crt1.o").exists(),
        },
        Prerequisite { what: QEMU, package: "qemu-user-static", present: runs(QEMU, &["--version"]) },
    ];
    let missing: Vec<&Prerequisite> = prerequisites.iter().filter(|p| !p.present).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list: String =
        missing.iter().map(|p| format!("\n  {}, from package {}", p.what, p.package)).collect();
    let packages: Vec<&str> = missing.iter().map(|p| p.package).collect();
    Err(format!(
        "the NEON tests lack:{list}\non Debian 12, as root:\n  dpkg --add-architecture arm64 && apt-get update\n  \
         apt-get install --no-install-recommends {}",
        packages.join(" ")
    ))
}

fn runs(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

fn target_libdir() -> Option<String> {
    let output = Command::new(RUSTC).args(["--print", "target-libdir", "--target", TARGET]).output().ok()?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
