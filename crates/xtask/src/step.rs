//! Commands, announced and timed: one after the other, where the first failure ends the run, or several lists of them at a time.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Instant;

/// The root of the workspace, where every step runs.
pub(crate) fn root() -> &'static Path {
    let manifest_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest_dir.ancestors().nth(2).unwrap_or(manifest_dir)
}

/// A command, mostly one of cargo.
pub(crate) struct Step {
    program: Program,
    arguments: String,
    environment: Vec<(&'static str, String)>,
}

enum Program {
    /// That of a toolchain of rustup's, or the one that runs this.
    Cargo(Option<&'static str>),
    Other(&'static str),
}

impl Step {
    /// `arguments`: what follows `cargo`, separated by single spaces.
    pub(crate) fn cargo(arguments: impl Into<String>) -> Self {
        Self { program: Program::Cargo(None), arguments: arguments.into(), environment: Vec::new() }
    }

    /// Another program, by its name or its path from the root.
    pub(crate) fn program(program: &'static str, arguments: impl Into<String>) -> Self {
        Self { program: Program::Other(program), arguments: arguments.into(), environment: Vec::new() }
    }

    /// Takes the cargo of another toolchain.
    pub(crate) fn toolchain(mut self, name: &'static str) -> Self {
        self.program = Program::Cargo(Some(name));
        self
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((key, value.into()));
        self
    }

    fn run(&self) -> Result<(), String> {
        let status = self.command().status();
        self.outcome(status.map_err(|error| format!("could not be started, {error}: {self}"))?)
    }

    /// Adds what it writes to either stream to `output`, in the order in which it comes, below a line that names it.
    fn run_quietly(&self, output: &mut Vec<u8>) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("could not be started, {error}: {self}");
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
        let mut command = match self.program {
            Program::Other(program) => Command::new(program),
            Program::Cargo(None) => Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
            // `+name` is for rustup's own cargo, and what `CARGO` names is that of a toolchain.
            Program::Cargo(Some(toolchain)) => {
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
        match self.program {
            Program::Other(program) => f.write_str(program)?,
            Program::Cargo(None) => f.write_str("cargo")?,
            Program::Cargo(Some(toolchain)) => write!(f, "cargo +{toolchain}")?,
        }
        write!(f, " {}", self.arguments)
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

/// Runs lists of steps at the same time, each in its order until one of its steps fails. What those of the lists `beside` write comes
/// when `first` has ended.
pub(crate) fn run_beside(first: &[Step], beside: &[&[Step]]) -> Result<(), String> {
    for step in first {
        println!("== {step}");
    }
    for step in beside.iter().copied().flatten() {
        println!("== beside: {step}");
    }
    let start = Instant::now();
    let (of_first, of_beside) = std::thread::scope(|scope| {
        let run = |steps: &[Step]| {
            let mut output = Vec::new();
            let outcome = steps.iter().try_for_each(|step| step.run_quietly(&mut output));
            if let Err(failure) = &outcome {
                eprintln!("\nxtask: {failure}; what it said comes when the others have ended\n");
            }
            (outcome, output)
        };
        let running: Vec<_> = beside.iter().map(|steps| scope.spawn(move || run(steps))).collect();
        let of_first = first.iter().try_for_each(Step::run);
        if let Err(failure) = &of_first {
            eprintln!("\nxtask: {failure}; the others go on to their end\n");
        }
        (of_first, running.into_iter().map(|running| running.join()).collect::<Vec<_>>())
    });
    let mut outcome = of_first;
    for of_list in of_beside {
        let (of_list, output) =
            of_list.map_err(|_panicked| "the thread of the steps beside panicked".to_owned())?;
        let written = std::io::stdout().write_all(&output).map_err(|error| format!("output: {error}"));
        outcome = outcome.and(of_list).and(written);
    }
    println!("\n{:8.1} s  all of these", start.elapsed().as_secs_f64());
    outcome
}
