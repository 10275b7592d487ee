//! The project's own commands: `cargo xtask VERB`. Uses nothing but std, so it builds in a second.

// It is a command line program: its output is its purpose.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod miri;
mod neon;
mod python;
mod simulation;
mod step;
mod suite;

use std::process::ExitCode;

const HELP: &str = "\
usage: cargo xtask VERB

  test      everything a change must pass: format, clippy, docs, all tests, those of the Python package too
  python    those of the Python package alone
  wheel     a wheel of the Python package for Linux, in target/wheels
  nightly   all tests with their long lists (ATTND_NIGHTLY=1): big shapes, more kills
  neon      the kernel crate's tests for aarch64 under qemu; says which Debian packages it needs
  sim       a cluster in a simulation: the seeds below 1000, below another number (--seeds N), or one of them (--seed N)
  miri      the kernel crate's unit tests under Miri; says which toolchain it needs
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => suite::test(),
        ["python"] => python::build_and_test(),
        ["wheel"] => python::wheel(),
        ["nightly"] => suite::nightly(),
        ["neon"] => neon::test(),
        ["miri"] => miri::test(),
        ["sim"] => simulation::run("ATTND_SIM_SEEDS", "1000"),
        ["sim", "--seeds", number] => simulation::run("ATTND_SIM_SEEDS", number),
        ["sim", "--seed", number] => simulation::run("ATTND_SIM_SEED", number),
        [] | ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("xtask: no such command: {}\n\n{HELP}", arguments.join(" "));
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}
