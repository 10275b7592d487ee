//! Talks to the script that times torch: one line of JSON out for each case, one line back.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context as _;
use attnd_kernel::Causal;
use serde::{Deserialize, Serialize};

use super::case::Case;

/// What python runs.
const SCRIPT: &str = include_str!("../../data/peers_torch.py");

/// A running script.
#[derive(Debug)]
pub struct Torch {
    child: Child,
    /// Taken to end the script.
    requests: Option<ChildStdin>,
    replies: Lines<BufReader<ChildStdout>>,
    /// Of torch.
    pub version: String,
}

/// A case as the script understands it.
#[derive(Debug, Clone, Serialize)]
pub struct Request<'a> {
    heads: u64,
    kv_heads: u64,
    queries: u64,
    keys: u64,
    head_dim: u64,
    value_dim: u64,
    causal: bool,
    /// `f32` or `bf16`.
    pub dtype: &'static str,
    /// Whether the heads of a group are folded into query tokens.
    pub fold: bool,
    threads: usize,
    cores: &'a [usize],
    seconds: f64,
    min_runs: usize,
}

impl<'a> Request<'a> {
    /// A case on some cores, run for `seconds` and at least `min_runs` times. torch's causal rule begins at the first
    /// query, which is the same where there are as many keys.
    pub fn new(case: &Case, threads: usize, cores: &'a [usize], seconds: f64, min_runs: usize) -> Self {
        Self {
            heads: case.heads,
            kv_heads: case.kv_heads,
            queries: case.queries,
            keys: case.keys,
            head_dim: case.head_dim,
            value_dim: case.value_dim,
            causal: case.causal != Causal::None,
            dtype: "f32",
            fold: false,
            threads,
            cores,
            seconds,
            min_runs,
        }
    }
}

#[derive(Debug, Deserialize)]
struct Hello {
    torch: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Reply {
    Seconds(Vec<f64>),
    Error(String),
}

impl Torch {
    /// Starts the script.
    ///
    /// # Errors
    /// If it doesn't start, or says something else than which torch it has.
    pub fn start(python: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            // Of warnings torch has one for every environment without numpy.
            .args(["-W", "ignore", "-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", python.display()))?;
        let requests = child.stdin.take();
        let stdout = child.stdout.take().context("a pipe from python")?;
        let mut torch =
            Self { child, requests, replies: BufReader::new(stdout).lines(), version: String::new() };
        let hello: Hello = serde_json::from_str(&torch.line()?).context("the script's first line")?;
        torch.version = hello.torch;
        Ok(torch)
    }

    /// Seconds of each run of a case.
    ///
    /// # Errors
    /// What torch says, or that the script has ended.
    pub fn time(&mut self, request: &Request<'_>) -> anyhow::Result<Vec<f64>> {
        let line = serde_json::to_string(request)?;
        let requests = self.requests.as_mut().context("a pipe to python")?;
        writeln!(requests, "{line}").and_then(|()| requests.flush()).context("ask the torch script")?;
        match serde_json::from_str(&self.line()?).context("the torch script's answer")? {
            Reply::Seconds(seconds) => Ok(seconds),
            Reply::Error(error) => Err(anyhow::anyhow!("torch: {error}")),
        }
    }

    fn line(&mut self) -> anyhow::Result<String> {
        match self.replies.next() {
            Some(line) => line.context("read from the torch script"),
            // It has closed its stdout, so it is ending.
            None => Err(anyhow::anyhow!(
                "the torch script ended early ({})",
                self.child.wait().context("wait for it")?
            )),
        }
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        // Without requests the script ends by itself; killed, it can't hold anybody up either way.
        drop(self.requests.take());
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::CASES;
    use super::*;

    #[test]
    fn requests_have_every_field_that_the_script_reads() {
        let request = Request::new(&CASES[0], 1, &[3], 0.5, 5);
        let json = serde_json::to_value(&request).unwrap();
        let fields = SCRIPT.split("case[\"").skip(1).map(|rest| rest.split('"').next().unwrap());
        let shape = SCRIPT.split("SHAPE = (").nth(1).unwrap().split(')').next().unwrap();
        let shape = shape.split(", ").map(|field| field.trim_matches('"'));
        let all: Vec<&str> = fields.chain(shape).collect();
        assert!(all.len() > 10, "{all:?}");
        for field in all {
            assert!(json.get(field).is_some(), "no {field} in {json}");
        }
    }

    #[test]
    fn replies_are_times_or_an_error() {
        let reply = |text: &str| serde_json::from_str::<Reply>(text);
        assert!(
            matches!(reply(r#"{"seconds": [0.5, 1]}"#), Ok(Reply::Seconds(times)) if times == [0.5, 1.0])
        );
        assert!(matches!(reply(r#"{"error": "no"}"#), Ok(Reply::Error(_))));
        assert!(reply("{}").is_err());
    }
}
