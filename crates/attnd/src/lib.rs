//! The program: parses the command line, runs one verb, turns its outcome into an exit code. A library, because the Python package is
//! the same program: what it starts are processes of itself.

#![allow(unreachable_pub, reason = "a program exports nothing; pub marks what a module offers to the others")]

mod args;
mod bench;
mod call_report;
mod demo;
mod embedded;
mod exit;
mod explain;
mod flags;
mod heatmap;
mod logging;
mod options;
mod output;
mod outputs;
mod progress;
mod request_file;
mod score_numbers;
mod site;
mod table;
mod tensor_file;
mod verbs;

use std::ffi::OsString;

use anyhow::Context as _;
use clap::Parser;

use args::{Cli, Verb};

/// Room for some messages of the wire. See [`keep_message_buffers`].
const KEPT_BYTES: usize = 8 << 20;

/// Has glibc keep the buffers of messages when they are freed, instead of returning each to the system and having the
/// next one cleared again, page by page.
///
/// Its threshold for that is the size of the largest block mapped by itself and freed so far (mallopt(3), "dynamic mmap
/// threshold"), and twice as much free memory is what each of its arenas, eight per core at most, keeps at its end; so
/// one block is allocated here, never touched, and freed.
fn keep_message_buffers() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(KEPT_BYTES)));
}

pub use embedded::started_by;

/// Runs the program with these arguments, the first of which is its name, and gives its exit code. Ends the process where they make no
/// sense, or ask for help.
pub fn main(arguments: Vec<OsString>) -> u8 {
    keep_message_buffers();
    let cli = request_file::with_request(Cli::parse_from(&arguments), arguments);
    exit::conclude(cli.map_err(Into::into).and_then(|cli| run(&cli)))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    logging::init(&cli.log, &cli.verb)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let outcome = runtime.block_on(async {
        match &cli.verb {
            Verb::Demo(args) => verbs::demo::run(args).await,
            Verb::Attend(args) => verbs::attend::run(args).await,
            Verb::Explain(args) => verbs::explain::run(args).await,
            Verb::Scores(args) => verbs::scores::run(args),
            Verb::Layer(args) => verbs::layer::run(args).await,
            Verb::Session(args) => verbs::session::run(args).await,
            Verb::Local(args) => verbs::local::run(args).await,
            Verb::Status(args) => verbs::status::run(args).await,
            Verb::Plan(args) => verbs::plan::run(args).await,
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
