//! `cargo bench -p attnd [-- ARGUMENTS]`: runs `attnd bench kernel` with these arguments. cargo
//! starts it in this crate's folder, so a path after `--compare` is best an absolute one.

use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    // cargo tells a bench target that it is one.
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--bench");
    let status = Command::new(env!("CARGO_BIN_EXE_attnd")).args(["bench", "kernel"]).args(arguments).status();
    match status.map(|status| status.code()) {
        Ok(Some(code)) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        _ => ExitCode::FAILURE,
    }
}
