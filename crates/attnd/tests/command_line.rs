//! The program as somebody at a keyboard meets it: odd arguments, odd surroundings, and impatience.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A port that nobody listens on: a call that gets this far fails with code 1.
const NOBODY: &str = "http://127.0.0.1:9";
/// Longer than anything here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// The program without what the surroundings have set.
fn attnd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("ATTND_") {
            command.env_remove(key);
        }
    }
    command
}

fn code_and_stderr(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// An f32 npy file of zeros; they take no room on the disk.
fn zeros(folder: &Path, name: &str, shape: [u64; 3]) -> String {
    let [a, b, c] = shape;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({a}, {b}, {c}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    let path = folder.join(name);
    fs::write(&path, &bytes).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(bytes.len() as u64 + 4 * a * b * c).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The arguments of an `attend` over zeros.
fn attend(folder: &Path, q: [u64; 3], k: [u64; 3], value_dim: u64) -> Vec<String> {
    let v = [k[0], k[1], value_dim];
    let sources = [("q", q), ("k", k), ("v", v)];
    let flags =
        sources.map(|(name, shape)| [format!("--{name}"), zeros(folder, &format!("{name}.npy"), shape)]);
    std::iter::once("attend".to_owned()).chain(flags.into_iter().flatten()).collect()
}

fn small(folder: &Path) -> Vec<String> {
    attend(folder, [2, 3, 4], [1, 5, 4], 4)
}

#[test]
fn what_cannot_work_is_refused_before_the_call() {
    let folder = TempDir::new().unwrap();
    let call = small(folder.path());
    let directory = folder.path().join("directory.npy");
    fs::create_dir(&directory).unwrap();
    let directory = directory.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["--endpoint", NOBODY, "--timeout", "1e12"], "must be > 0 and at most 3600"),
        (&["--endpoint", NOBODY, "-o", directory], "exists and is not a regular file"),
        #[cfg(target_os = "linux")]
        (&["--endpoint", NOBODY, "-o", "/proc/x.npy"], "no file can be made in /proc"),
        (&["--workers", "2", "--use-workers", "3"], "needs more workers than --workers 2 starts"),
        (&["--workers", "2", "--use-workers", "0"], "expected a number, at least 1"),
        (&[], "where to compute?"),
    ];
    for (extra, reason) in cases {
        let (code, stderr) = code_and_stderr(&attnd().args(&call).args(*extra).output().unwrap());
        assert_eq!(code, Some(2), "{extra:?}: {stderr}");
        assert!(stderr.contains(reason), "{extra:?}: {stderr}");
    }
    let (code, stderr) = code_and_stderr(&attnd().args(&call).args(["--endpoint", NOBODY]).output().unwrap());
    assert_eq!(code, Some(1), "nothing is wrong with the call itself: {stderr}");
}

#[test]
fn a_benchmark_that_cannot_work_is_refused_before_it_runs() {
    let folder = TempDir::new().unwrap();
    let other = folder.path().join("other.json");
    fs::write(&other, r#"{"cases": 1}"#).unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["--compare", "no/such.json"], "--compare no/such.json: "),
        (&["--compare", other.to_str().unwrap()], "expected what `attnd bench kernel --json` prints"),
        (&["--case", "abacus"], "there are: prefill T=2048"),
        (&["--isa", "abacus"], "expected one of avx512, avx2, neon, portable"),
        (&["--repeat", "3", "--seconds", "1"], "cannot be used with"),
    ];
    for (extra, reason) in cases {
        let output = attnd().args(["bench", "kernel"]).args(*extra).output().unwrap();
        let (code, stderr) = code_and_stderr(&output);
        assert_eq!(code, Some(2), "{extra:?}: {stderr}");
        assert!(stderr.contains(reason), "{extra:?}: {stderr}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn peers_without_python_are_a_failure_of_one_line() {
    let folder = TempDir::new().unwrap();
    let venv = folder.path().join("venv");
    let mut command = attnd();
    command.env("PATH", folder.path()).args(["bench", "peers", "--venv"]).arg(&venv);
    let (code, stderr) = code_and_stderr(&command.output().unwrap());
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("install Python 3") && stderr.lines().count() == 1, "{stderr}");
}

#[test]
fn an_input_is_never_replaced_by_the_result() {
    let folder = TempDir::new().unwrap();
    let call = small(folder.path());
    let v = folder.path().join("v.npy");
    let before = fs::read(&v).unwrap();
    std::os::unix::fs::symlink("v.npy", folder.path().join("link.npy")).unwrap();
    fs::hard_link(&v, folder.path().join("second.npy")).unwrap();
    for output in ["v.npy", "./v.npy", "link.npy", "second.npy"] {
        let output = folder.path().join(output);
        let extra = ["--endpoint", NOBODY, "-o", output.to_str().unwrap()];
        let (code, stderr) = code_and_stderr(&attnd().args(&call).args(extra).output().unwrap());
        assert_eq!(code, Some(2), "{output:?}: {stderr}");
        let both = format!("--output {} is the file of --v {}", output.display(), v.display());
        assert!(stderr.contains(&both) && stderr.lines().count() == 1, "{stderr}");
    }
    assert_eq!(fs::read(&v).unwrap(), before);
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_larger_than_memory_is_refused_before_the_call() {
    let folder = TempDir::new().unwrap();
    // Inputs of 16 MiB, a context of 8 GiB, and 4 GB of addresses.
    let call = attend(folder.path(), [64, 65_536, 1], [1, 1, 1], 512);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -v 4000000 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_attnd")]);
    let (code, stderr) = code_and_stderr(&shell.args(call).args(["--endpoint", NOBODY]).output().unwrap());
    assert_eq!(code, Some(2), "{stderr}");
    for part in ["SHAPE_LIMIT", "2147483648 context elements and 4194304 lse", "8606711808 bytes"] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_after_a_report() {
    let folder = TempDir::new().unwrap();
    let call = small(folder.path());
    let files = || fs::read_dir(folder.path()).unwrap().count();
    let before = files();
    let output = folder.path().join("o.npy");
    for (extra, shown) in [(None, "plan: "), (Some("--json"), "\"output\": null")] {
        // Not a byte may be written to a file, as on a full disk; a file may still be made.
        let mut shell = Command::new("sh");
        let script = "trap '' XFSZ && ulimit -f 0 && exec \"$0\" \"$@\"";
        shell.args(["-c", script, env!("CARGO_BIN_EXE_attnd")]).args(&call);
        shell.args(["--workers", "1", "-o", output.to_str().unwrap()]).args(extra);
        let ended = shell.output().unwrap();
        let (code, stderr) = code_and_stderr(&ended);
        let stdout = String::from_utf8(ended.stdout).unwrap();
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains("o.npy: ") && stderr.lines().count() == 1, "{stderr}");
        assert!(stdout.contains(shown) && !stdout.contains("wrote"), "{stdout}");
        assert!(stdout.contains("compute"), "no timings in {stdout}");
        assert_eq!(files(), before, "something is left");
    }
}

#[test]
fn variables_meant_for_some_other_node_do_not_reach_local_processes() {
    let folder = TempDir::new().unwrap();
    let call = small(folder.path());
    let local = |variables: &[(&str, &str)]| {
        let variables = variables.iter().copied();
        code_and_stderr(&attnd().args(&call).args(["--workers", "1"]).envs(variables).output().unwrap())
    };
    let (code, stderr) = local(&[
        ("ATTND_ADVERTISE", "http://192.0.2.1:1"),
        ("ATTND_COORDINATOR", NOBODY),
        ("ATTND_HOST", "not a host"),
        ("ATTND_LISTEN", "nowhere"),
        ("ATTND_MEMORY", "much"),
        ("ATTND_SESSION_MEMORY", "much"),
        ("ATTND_STATE", "/dev/null"),
        ("ATTND_THREADS", "0"),
        ("ATTND_WORKER_ID", "not an id"),
    ]);
    assert_eq!(code, Some(0), "{stderr}");
    // This one is for all of them.
    let (code, stderr) = local(&[("ATTND_ISA", "abacus")]);
    assert_ne!(code, Some(0));
    assert!(stderr.contains("ATTND_ISA=\"abacus\""), "{stderr}");
}

/// A process that is killed at the end of the test.
struct Running(Child);

impl Running {
    /// Starts it; with its URL if it prints where it listens.
    fn start(command: &mut Command) -> (Self, Option<String>) {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        if !command.get_args().any(|arg| arg == "attend") {
            BufReader::new(stdout).read_line(&mut line).unwrap();
        }
        (Self(child), line.trim().strip_prefix("listening on ").map(str::to_owned))
    }

    fn terminate(&self) {
        Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Asks until there is an answer.
fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begun.elapsed() < LIMIT, "{what} takes longer than {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_node_that_waits_for_its_calls_ends_when_it_is_asked_again() {
    let folder = TempDir::new().unwrap();
    let (mut coordinator, url) =
        Running::start(attnd().args(["coordinator", "--listen", "127.0.0.1:0"]).stderr(Stdio::null()));
    let url = url.expect("the coordinator listens");
    let worker = ["worker", "--threads", "1", "--memory", "1GiB", "--coordinator", &url];
    let (_worker, _) =
        Running::start(attnd().args(worker).env("ATTND_ISA", "portable").stderr(Stdio::null()));
    let status = |member: &str| {
        let output = attnd().args(["status", "--json", "--endpoint", &url]).output().unwrap();
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        status[member].clone()
    };
    eventually("joining", || status("workers").as_array().filter(|workers| !workers.is_empty()).map(drop));

    // Minutes of work.
    let call = attend(folder.path(), [8, 65_536, 8], [1, 65_536, 8], 1);
    let (_call, _) = Running::start(attnd().args(call).args(["--endpoint", &url]).stderr(Stdio::null()));
    eventually("beginning a call", || (status("calls_in_flight") == 1).then_some(()));

    let begun = Instant::now();
    coordinator.terminate();
    let ended = eventually("ending", || {
        let ended = coordinator.0.try_wait().unwrap();
        // Signals that come at once are one request, so it is asked until it hears.
        if ended.is_none() && begun.elapsed() > Duration::from_millis(100) {
            coordinator.terminate();
        }
        ended
    });
    assert_eq!(ended.code(), Some(75));
    // Asked once only, it waits for half a minute.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
