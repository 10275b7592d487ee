//! The program: parses the command line, runs one verb, turns its outcome into an exit code.

#![allow(unreachable_pub, reason = "a program exports nothing; pub marks what a module offers to the others")]

mod args;
mod bench;
mod call_report;
mod demo;
mod embedded;
mod exit;
mod heatmap;
mod logging;
mod output;
mod progress;
mod table;
mod tensor_file;
mod verbs;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use args::{Cli, Verb};

fn main() -> ExitCode {
    exit::conclude(run(&Cli::parse()))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    logging::init(&cli.log, &cli.verb)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let outcome = runtime.block_on(async {
        match &cli.verb {
            Verb::Demo(args) => verbs::demo::run(args).await,
            Verb::Attend(args) => verbs::attend::run(args).await,
            Verb::Local(args) => verbs::local::run(args).await,
            Verb::Status(args) => verbs::status::run(args).await,
            Verb::Coordinator(args) => verbs::coordinator::run(args).await,
            Verb::Worker(args) => verbs::worker::run(args).await,
            Verb::Bench(args) => verbs::bench::run(args),
            Verb::Completions(args) => verbs::completions::run(args),
        }
    });
    // What was cut is not waited for.
    runtime.shutdown_background();
    outcome
}
