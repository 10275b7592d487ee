//! One cargo command after the other, announced and timed; the first failure ends the run.

use std::path::Path;
use std::process::Command;
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
        let mut command = match self.toolchain {
            None => Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
            // `+name` is for rustup's own cargo, and what `CARGO` names is that of a toolchain.
            Some(toolchain) => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", toolchain, "cargo"]);
                rustup
            }
        };
        let status = command
            .args(self.arguments.split(' '))
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .current_dir(root())
            .status()
            .map_err(|error| format!("cargo could not be started: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("failed, {status}: {self}")) }
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

/// Runs the steps in order. How long each took is printed before the last one starts, so that the output ends with
/// the last step's own: for the suite, that of `cargo test`.
pub(crate) fn run_all(steps: &[Step]) -> Result<(), String> {
    let mut table = String::new();
    for (index, step) in steps.iter().enumerate() {
        let number = index + 1;
        if number == steps.len() && number > 1 {
            println!("\n{table}");
        }
        println!("== {number}/{} {step}", steps.len());
        let start = Instant::now();
        step.run()?;
        table += &format!("{:8.1} s  {step}\n", start.elapsed().as_secs_f64());
    }
    Ok(())
}
