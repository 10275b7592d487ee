//! `attnd plan` against a cluster of processes, which say on which hosts they are and what sessions may take; and a coordinator's state.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn attnd(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("ATTND_")) {
        command.env_remove(key);
    }
    command.args(args);
    command
}

/// A node that is killed at the end of the test.
struct Node(Child);

impl Node {
    /// Starts it; with its URL.
    fn start(args: &[&str]) -> (Self, String) {
        let mut command = attnd(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        (Self(child), line.trim().strip_prefix("listening on ").unwrap().to_owned())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn complaint(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Workers as `attnd status` has them, once there are so many.
fn workers(url: &str, n: usize) -> Vec<Value> {
    let begun = Instant::now();
    loop {
        let output = attnd(&["status", "--json", "--endpoint", url]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match status["workers"].as_array() {
            Some(workers) if workers.len() == n => return workers.clone(),
            _ => assert!(begun.elapsed() < LIMIT, "{n} workers don't join"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_plan_names_the_workers_and_their_bytes_and_makes_nothing() {
    let (_coordinator, url) = Node::start(&["coordinator", "--listen", "127.0.0.1:0"]);
    let worker = |id: &str, host: &str, memory: &str| {
        let args = ["worker", "--threads", "1", "--memory", "64MiB", "--coordinator", &url, "--id", id];
        Node::start(&[&args[..], &["--host", host, "--session-memory", memory]].concat()).0
    };
    let _workers =
        [worker("a", "rack-1", "64MiB"), worker("b", "rack-2", "64MiB"), worker("c", "rack-2", "48MiB")];
    let seen = workers(&url, 3);
    let shown: Vec<Value> = seen
        .iter()
        .map(|worker| json!([worker["id"], worker["host"], worker["session_memory_bytes"]]))
        .collect();
    assert_eq!(
        shown,
        [
            json!(["a", "rack-1", 64 << 20]),
            json!(["b", "rack-2", 64 << 20]),
            json!(["c", "rack-2", 48 << 20])
        ]
    );
    assert!(seen.iter().all(|worker| worker["session_used_bytes"] == 0));

    let session =
        ["plan", "--layers", "2", "--heads", "8", "--kv-heads", "4", "--head-dim", "64", "--dtype", "f32"];
    let plan = |extra: &[&str]| attnd(&session).args(["--endpoint", &url]).args(extra).output().unwrap();
    let output = plan(&["--tokens", "4096", "--replicas", "2", "--json"]);
    assert!(output.status.success(), "{}", complaint(&output).1);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    // 2 layers of 4 kv heads with 4096 keys and values of 64 f32.
    let copy: u64 = 2 * 4 * 4096 * 2 * 64 * 4;
    let sum = |of: &str| {
        report[of].as_array().unwrap().iter().map(|part| part["bytes"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((sum("shards"), sum("workers")), (copy, 2 * copy));
    assert_eq!((&report["tokens"], &report["tokens_that_fit"]), (&json!(4096), &json!(4096)));
    let mut slots = [[false; 64]; 4];
    for shard in report["shards"].as_array().unwrap() {
        let held = shard["workers"].as_array().unwrap();
        assert!(held.len() == 2 && held.contains(&json!("a")), "b and c are on one host: {shard}");
        for piece in shard["pieces"].as_array().unwrap() {
            let end = |range: &str, i: usize| piece[range][i].as_u64().unwrap() as usize;
            assert_eq!([end("heads", 0), end("heads", 1)], [2 * end("kv_heads", 0), 2 * end("kv_heads", 1)]);
            for head in &mut slots[end("kv_heads", 0)..end("kv_heads", 1)] {
                for slot in &mut head[end("slots", 0)..end("slots", 1)] {
                    assert!(!std::mem::replace(slot, true), "twice: {report}");
                }
            }
        }
    }
    assert!(slots.iter().flatten().all(|slot| *slot), "{report}");

    let output = plan(&["--tokens", "1048576"]);
    let text = printed(&output);
    assert!(output.status.success() && text.contains(" of 1048576 tokens"), "{text}");
    assert!(["would take", "rack-1", "GFLOP/s"].iter().all(|word| text.contains(word)), "{text}");

    let (code, stderr) = complaint(&plan(&["--tokens", "10", "--replicas", "3"]));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("2 domains for R=3: ") && stderr.contains("--allow-same-host"), "{stderr}");
    assert!(plan(&["--tokens", "10", "--replicas", "3", "--allow-same-host"]).status.success());
    let (code, stderr) = complaint(&plan(&["--tokens", "9999999"]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("max_tokens 9999999 > 1048576"), "{stderr}");
}

#[test]
fn a_state_directory_has_one_coordinator_and_is_checked() {
    let folder = TempDir::new().unwrap();
    let state = folder.path().join("made/on/the/way");
    let coordinator = ["coordinator", "--listen", "127.0.0.1:0", "--state", state.to_str().unwrap()];
    let (first, url) = Node::start(&coordinator);
    // It has opened its file once it answers.
    workers(&url, 0);
    let (code, stderr) = complaint(&attnd(&coordinator).output().unwrap());
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("another coordinator uses it"), "{stderr}");
    drop(first);
    let (second, url) = Node::start(&coordinator);
    workers(&url, 0);
    drop(second);
    std::fs::write(state.join("sessions.redb"), b"not a store").unwrap();
    let (code, stderr) = complaint(&attnd(&coordinator).output().unwrap());
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("sessions.redb: ") && stderr.contains("move it away"), "{stderr}");
}
