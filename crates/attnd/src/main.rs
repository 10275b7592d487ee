//! The program `attnd`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(attnd::main(std::env::args_os().collect()))
}
