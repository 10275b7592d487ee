//! One process of the program under test.

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tempfile::NamedTempFile;

/// Time for a process to start and say where it listens, on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(20);

/// What processes log, instead of what they log by default. All of it is shown then.
const TEST_LOG: &str = "ATTND_TEST_LOG";

/// The program under test.
///
/// # Panics
/// If it isn't built.
pub(crate) fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("ATTND_BIN") {
        return path.into();
    }
    // target/PROFILE/deps/this-test
    let test = std::env::current_exe().expect("a test knows its executable");
    let built = test.ancestors().nth(2).expect("a test is built below target/PROFILE/deps");
    let program = built.join(format!("attnd{}", std::env::consts::EXE_SUFFIX));
    assert!(
        program.exists(),
        "{} is missing: build it with the same profile first (`cargo build --release -p attnd`), or set ATTND_BIN",
        program.display()
    );
    program
}

/// What a test has of the machine.
pub(crate) struct Machine {
    _of: Of,
}

#[allow(dead_code, reason = "they are held")]
enum Of {
    All(RwLockWriteGuard<'static, ()>),
    Some(RwLockReadGuard<'static, ()>),
}

static MACHINE: RwLock<()> = RwLock::new(());

impl Machine {
    /// Waits until no other test has processes: for whoever measures.
    pub(crate) fn alone() -> Self {
        // A test that failed has left nothing behind that the next one could see.
        Self { _of: Of::All(MACHINE.write().unwrap_or_else(PoisonError::into_inner)) }
    }

    /// Beside the processes of as many tests as run at once.
    pub(crate) fn shared() -> Self {
        Self { _of: Of::Some(MACHINE.read().unwrap_or_else(PoisonError::into_inner)) }
    }
}

/// A running process. It is killed when this is dropped, and ends by itself when this process does.
pub(crate) struct Process {
    name: String,
    child: Child,
    lines: Receiver<String>,
    log: NamedTempFile,
}

impl Process {
    /// Starts the program with `args`, as something that ends with this test even if the test can't end it.
    pub(crate) fn start_bound(name: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program());
        command.args(args).arg("--exit-with-parent");
        Self::spawn(name, command, env)
    }

    /// Starts `command` with an environment free of this project's variables but for `env`.
    pub(crate) fn spawn(name: &str, mut command: Command, env: &[(&str, &str)]) -> Self {
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("ATTND_") {
                command.env_remove(key);
            }
        }
        if let Some(filter) = std::env::var_os(TEST_LOG) {
            command.env("ATTND_LOG", filter);
        }
        let log = NamedTempFile::new().expect("a temporary file");
        let mut child = command
            .envs(env.iter().copied())
            // Stays open for as long as this process lives: its end is how the other one knows.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.reopen().expect("a second handle of the log"))
            .spawn()
            .unwrap_or_else(|error| panic!("start {name}: {error}"));
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (said, lines) = mpsc::channel();
        // Reads on when nobody listens any more, so that the process never waits for a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                said.send(line).ok();
            }
        });
        Self { name: name.to_owned(), child, lines, log }
    }

    /// Process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line of stdout, or `None` if the process said nothing until `limit` or its end.
    pub(crate) fn next_line(&self, limit: Duration) -> Option<String> {
        self.lines.recv_timeout(limit).ok()
    }

    /// The URL in the next line of stdout.
    pub(crate) fn url(&self) -> String {
        let line = self.next_line(START);
        let line = line.unwrap_or_else(|| panic!("{} said nothing on stdout\n{}", self.name, self.log()));
        let url = line.split_whitespace().find(|word| word.starts_with("http://"));
        url.unwrap_or_else(|| panic!("{}: no URL in {line:?}", self.name)).to_owned()
    }

    /// What it wrote to stderr so far, the end of it.
    pub(crate) fn log(&self) -> String {
        let most = if std::env::var_os(TEST_LOG).is_some() { u64::MAX } else { 4000 };
        let mut text = Vec::new();
        let read = self.log.reopen().and_then(|mut log| {
            let len = log.metadata()?.len();
            log.seek(SeekFrom::Start(len.saturating_sub(most)))?;
            log.read_to_end(&mut text)
        });
        match read {
            Ok(_) => format!("--- {}\n{}", self.name, String::from_utf8_lossy(&text)),
            Err(error) => format!("--- {}: {error}", self.name),
        }
    }

    /// Ends it with SIGKILL and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap_or_else(|error| panic!("kill {}: {error}", self.name));
        self.child.wait().unwrap_or_else(|error| panic!("wait for {}: {error}", self.name));
    }

    /// Sends a signal by name, such as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        signal(&self.id().to_string(), name);
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap_or_else(|error| panic!("wait for {}: {error}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it still runs after `limit`.
    pub(crate) async fn wait_for_end(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        super::eventually(&what, limit, async || self.ended()).await
    }

    /// Most memory that it ever had resident, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.id());
        let status = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or_else(|| panic!("no VmHWM in {path}")) << 10
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail where it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            std::io::Write::write_all(&mut std::io::stderr(), self.log().as_bytes()).ok();
        }
    }
}

/// Sends a signal to a process, or to a process group where `target` is `-ID`.
pub(crate) fn signal(target: &str, name: &str) {
    // The shell's own kill is there wherever a shell is.
    let sent = Command::new("sh").arg("-c").arg(format!("kill -s {name} -- {target}")).status();
    assert!(sent.as_ref().is_ok_and(ExitStatus::success), "kill -s {name} -- {target}: {sent:?}");
}

/// A process as `/proc` names it: its id, and the time of its start because ids come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessName {
    pub(crate) id: u32,
    started: u64,
}

struct Stat {
    parent: u32,
    is_zombie: bool,
    started: u64,
}

fn stat(id: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The program's name, in parentheses, may hold anything.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    Some(Stat {
        is_zombie: *fields.first()? == "Z",
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

/// The children of a process, theirs, and so on.
pub(crate) fn descendants(ancestor: u32) -> Vec<ProcessName> {
    let all: Vec<(u32, Stat)> = std::fs::read_dir("/proc")
        .expect("/proc is there")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|id| Some((id, stat(id)?)))
        .collect();
    let mut found: Vec<ProcessName> = Vec::new();
    let mut parents = vec![ancestor];
    while let Some(parent) = parents.pop() {
        for (id, stat) in all.iter().filter(|(_, stat)| stat.parent == parent) {
            found.push(ProcessName { id: *id, started: stat.started });
            parents.push(*id);
        }
    }
    found
}

impl ProcessName {
    /// Whether it runs. One that has ended and waits for its parent to notice doesn't.
    pub(crate) fn runs(self) -> bool {
        stat(self.id).is_some_and(|stat| stat.started == self.started && !stat.is_zombie)
    }
}
