//! Cargo commands, announced and timed: one after the other, where the first failure ends the run, or two lists of them at a time.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Instant;

/// The root of the workspace, where every step runs.
pub(crate) fn root() -> &'static Path {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.ancestors().nth(2).unwrap_or(manifest_dir)
}

/// A cargo command.
pub(crate) struct Step {
    /// rustup's, where it isn't the one that runs this.
    toolchain: Option<&'static str>,
    arguments: String,
    environment: Vec<(&'static str, String)>,
}

impl Step {
    /// `arguments`: what follows `cargo`, separated by single spaces.
    pub(crate) fn cargo(arguments: impl Into<String>) -> Self {
        Self { toolchain: None, arguments: arguments.into(), environment: Vec::new() }
    }

    /// Takes the cargo of another toolchain.
    pub(crate) fn toolchain(mut self, name: &'static str) -> Self {
        self.toolchain = Some(name);
        self
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((key, value.into()));
        self
    }

    fn run(&self) -> Result<(), String> {
        let status = self.command().status();
        self.outcome(status.map_err(|error| format!("cargo could not be started: {error}"))?)
    }

    /// Adds what it writes to either stream to `output`, in the order in which it comes, below a line that names it.
    fn run_quietly(&self, output: &mut Vec<u8>) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("cargo could not be started: {error}");
        output.extend(format!("\n== {self}\n").bytes());
        let (mut reader, writer) = std::io::pipe().map_err(failed)?;
        let mut command = self.command();
        command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
        let mut child = command.spawn().map_err(failed)?;
        // It holds the other end of the pipe.
        drop(command);
        reader.read_to_end(output).map_err(failed)?;
        self.outcome(child.wait().map_err(failed)?)
    }

    fn outcome(&self, status: ExitStatus) -> Result<(), String> {
        if status.success() { Ok(()) } else { Err(format!("failed, {status}: {self}")) }
    }

    fn command(&self) -> Command {
        let mut command = match self.toolchain {
            None => Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
            // `+name` is for rustup's own cargo, and what `CARGO` names is that of a toolchain.
            Some(toolchain) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", toolchain, "cargo"]);
                rustup
            }
        };
        command
            .args(self.arguments.split(' '))
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(root());
        command
    }
}

impl std::fmt::Display for Step {
    /// As one would type it in a shell.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (key, value) in &self.environment {
            if value.contains(' ') {
                write!(f, "{key}='{value}' ")?;
            } else {
                write!(f, "{key}={value} ")?;
            }
        }
        f.write_str("cargo ")?;
        if let Some(toolchain) = self.toolchain {
            write!(f, "+{toolchain} ")?;
        }
        f.write_str(&self.arguments)
    }
}

/// Runs the steps in order, and prints how long each took.
pub(crate) fn run_all(steps: &[Step]) -> Result<(), String> {
    let mut table = String::new();
    for (index, step) in steps.iter().enumerate() {
        println!("== {}/{} {step}", index + 1, steps.len());
        let start = Instant::now();
        step.run()?;
        table += &format!("{:8.1} s  {step}\n", start.elapsed().as_secs_f64());
    }
    println!("\n{table}");
    Ok(())
}

/// Runs two lists of steps at the same time, each in its order until one of its steps fails. What those of `beside` write comes
/// when `first` has ended.
pub(crate) fn run_beside(first: &[Step], beside: &[Step]) -> Result<(), String> {
    for step in first {
        println!("== {step}");
    }
    for step in beside {
        println!("== beside: {step}");
    }
    let start = Instant::now();
    let (of_first, of_beside) = std::thread::scope(|scope| {
        let beside = scope.spawn(|| {
            let mut output = Vec::new();
            let outcome = beside.iter().try_for_each(|step| step.run_quietly(&mut output));
            if let Err(failure) = &outcome {
                eprintln!("\nxtask: {failure}; what it said comes when the others have ended\n");
            }
            (outcome, output)
        });
        let of_first = first.iter().try_for_each(Step::run);
        if let Err(failure) = &of_first {
            eprintln!("\nxtask: {failure}; the others go on to their end\n");
        }
        (of_first, beside.join())
    });
    let (outcome, output) =
        of_beside.map_err(|_panicked| "the thread of the steps beside panicked".to_owned())?;
    let written = std::io::stdout().write_all(&output).map_err(|error| format!("output: {error}"));
    println!("\n{:8.1} s  all of these", start.elapsed().as_secs_f64());
    of_first.and(outcome).and(written)
}
