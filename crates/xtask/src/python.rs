//! The tests of the Python package, in an environment of their own under `target/python`.
//!
//! The package is put together there by hand: its sources, and the extension as the suite has built it, with everything else. What
//! users install is built by maturin from the same sources, which would compile all of it once more.

use std::fs;
use std::io;
use std::path::Path;

use crate::step::{Step, root, run_all};

const VENV: &str = "target/python/venv";
const PYTHON: &str = "target/python/venv/bin/python";
const PACKAGE: &str = "target/python/package";
const SOURCES: &str = "crates/attnd-py/python/attnd";
/// Where `cargo test` leaves a library that nobody runs.
const EXTENSION: &str = "target/suite/deps/lib_attnd.so";

/// Steps that make the environment, or bring it up to date.
pub(crate) fn environment() -> [Step; 2] {
    [
        Step::program("python3", format!("-m venv {VENV}")),
        Step::program(
            PYTHON,
            "-m pip install --quiet --disable-pip-version-check --requirement crates/attnd-py/requirements-test.txt",
        ),
    ]
}

/// Runs the tests and the doctests of the package as it was built last.
pub(crate) fn test() -> Result<(), String> {
    put_together().map_err(|error| format!("put {PACKAGE} together: {error}"))?;
    // Absolute, for the processes that tests start elsewhere.
    let package = root().join(PACKAGE).display().to_string();
    let pytest = |arguments: &str| {
        let arguments = format!("-m pytest --quiet -p no:cacheprovider --timeout 300 {arguments}");
        Step::program(PYTHON, arguments)
            .env("PYTHONPATH", package.clone())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            // Keras asks for TensorFlow unless it is told.
            .env("KERAS_BACKEND", "torch")
    };
    run_all(&[pytest("crates/attnd-py/tests"), pytest("--doctest-modules --pyargs attnd")])
}

/// The same, after building what it needs.
pub(crate) fn build_and_test() -> Result<(), String> {
    run_all(&environment())?;
    run_all(&[Step::cargo("test --workspace --profile suite --locked --no-run")])?;
    test()
}

/// Builds a wheel of the stable ABI for any Linux with glibc 2.17, in `target/wheels`. Zig's linker, from PyPI, has the symbols of that
/// version, whatever this machine has.
pub(crate) fn wheel() -> Result<(), String> {
    let [venv, _] = environment();
    let tools = "-m pip install --quiet --disable-pip-version-check maturin==1.16.0 ziglang==0.15.2";
    let build = "-m maturin build --release --locked --zig --compatibility manylinux2014 \
                 --manifest-path crates/attnd-py/Cargo.toml --out target/wheels";
    // maturin looks for zig as a program that it can call.
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", root().join(VENV).join("bin").display());
    run_all(&[venv, Step::program(PYTHON, tools), Step::program(PYTHON, build).env("PATH", path)])
}

fn put_together() -> io::Result<()> {
    let package = root().join(PACKAGE);
    if package.exists() {
        fs::remove_dir_all(&package)?;
    }
    let to = package.join("attnd");
    copy(&root().join(SOURCES), &to)?;
    fs::copy(root().join(EXTENSION), to.join("_attnd.abi3.so"))?;
    Ok(())
}

/// A folder with all that is in it, but for what Python leaves there.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if !entry.file_type()?.is_dir() {
            fs::copy(entry.path(), to)?;
        } else if entry.file_name() != "__pycache__" {
            copy(&entry.path(), &to)?;
        }
    }
    Ok(())
}
