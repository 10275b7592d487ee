//! The rules of the house, held by tests: what a reviewer would otherwise have to look for.

mod arrows;
mod command_line;
mod deploy;
mod documents;
mod sources;
mod unsafe_code;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The root of the workspace.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace")
}

/// A text file of the project.
struct TextFile {
    /// From the root, with forward slashes.
    path: String,
    text: String,
}

impl TextFile {
    fn read(path: &str) -> Self {
        let text = std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        Self { path: path.to_owned(), text }
    }

    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    fn has_extension(&self, extensions: &[&str]) -> bool {
        self.name().rsplit_once('.').is_some_and(|(_, extension)| extensions.contains(&extension))
    }
}

/// All text files of the project, by path; build output, git's own files and data are left out.
fn text_files() -> Vec<TextFile> {
    let mut paths = Vec::new();
    for top in ["crates", "tests", "proto", "deploy", ".ci", ".cargo"] {
        collect(&root().join(top), &mut paths);
    }
    for entry in std::fs::read_dir(root()).expect("the root can be listed") {
        let path = entry.expect("the root can be listed").path();
        // In a worktree, .git is a file.
        if path.is_file() && path.file_name().is_none_or(|name| name != "Cargo.lock" && name != ".git") {
            paths.push(path);
        }
    }
    paths.sort();
    let relative = |path: &Path| {
        let path = path.strip_prefix(root()).expect("found below the root");
        path.to_string_lossy().replace('\\', "/")
    };
    let files: Vec<TextFile> = paths
        .iter()
        .filter_map(|path| Some(TextFile { path: relative(path), text: std::fs::read_to_string(path).ok()? }))
        .collect();
    assert!(files.len() > 20, "only {} text files found below {}", files.len(), root().display());
    files
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("a folder of the project can be listed").path();
        if !path.is_dir() {
            into.push(path);
        } else if path.file_name().is_none_or(|name| name != "target" && name != "__pycache__") {
            collect(&path, into);
        }
    }
}

fn rust_files() -> Vec<TextFile> {
    text_files().into_iter().filter(|file| file.has_extension(&["rs"])).collect()
}

/// Fails with every complaint at once.
fn expect_none(rule: &str, complaints: &[String]) {
    assert!(complaints.is_empty(), "{rule}:\n  {}\n", complaints.join("\n  "));
}

/// Runs a program that not every machine has. Where `probe` fails it is missing: `None`, and `unchecked` is reported on
/// stderr past the test harness's capture.
fn optional_tool(unchecked: &str, program: &str, probe: &[&str], arguments: &[&str]) -> Option<Output> {
    let present = Command::new(program).args(probe).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !present.is_ok_and(|status| status.success()) {
        let tool = format!("{program} {}", probe.join(" "));
        let _written = writeln!(std::io::stderr(), "SKIPPED: {unchecked}, because `{tool}` fails here");
        return None;
    }
    Some(Command::new(program).args(arguments).current_dir(root()).output().expect("it ran a moment ago"))
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
