//! Documents say what is: paths exist, crates are named, commands are real.

use super::command_line::{CommandLine, known_variables, variables};
use super::{TextFile, expect_none, root, text_files};

/// Text between single back-ticks, outside code blocks, with the heading above it.
fn code_spans(text: &str) -> Vec<(&str, &str)> {
    let mut spans = Vec::new();
    let mut heading = "";
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if line.starts_with('#') {
            heading = line;
        }
        if !in_block {
            spans.extend(line.split('`').skip(1).step_by(2).map(|span| (heading, span)));
        }
    }
    spans
}

/// Lines of code blocks, with continued lines joined.
fn block_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for block in text.split("```").skip(1).step_by(2) {
        let joined = block.replace("\\\n", " ");
        lines.extend(
            joined.lines().skip(1).map(|line| line.split(" #").next().unwrap_or("").trim().to_owned()),
        );
    }
    lines
}

fn documents() -> Vec<TextFile> {
    text_files().into_iter().filter(|file| file.has_extension(&["md"])).collect()
}

fn looks_like_a_path(span: &str) -> bool {
    let ends = [".rs", ".md", ".toml", ".proto", ".yaml", ".service", "/"];
    let known_top = ["crates/", "tests/", "proto/", "deploy/", ".ci/", ".cargo/"];
    let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    plain
        && !span.starts_with('/')
        && (ends.iter().any(|e| span.ends_with(e)) || known_top.iter().any(|t| span.starts_with(t)))
}

#[test]
fn every_path_in_a_document_exists() {
    let mut complaints = Vec::new();
    let mut paths = 0;
    for document in documents() {
        let folder = document.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (heading, span) in
            code_spans(&document.text).into_iter().filter(|(_, span)| looks_like_a_path(span))
        {
            paths += 1;
            // Below a heading that names a crate, paths are those of its sources.
            let section =
                heading.split('`').find(|part| part.starts_with("crates/") || *part == "tests").unwrap_or("");
            let bases =
                [root().join(folder), root().into(), root().join(section), root().join(section).join("src")];
            if !bases.iter().any(|base| base.join(span).exists()) {
                complaints.push(format!("{}: {span} (below \"{heading}\")", document.path));
            }
        }
        for link in document.text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let elsewhere = link.is_empty() || link.contains("://");
            if !elsewhere && !root().join(folder).join(link).exists() {
                complaints.push(format!("{}: link to {link}", document.path));
            }
        }
    }
    assert!(paths > 20, "only {paths} paths were recognised in the documents");
    expect_none("documents name what does not exist", &complaints);
}

#[test]
fn the_architecture_names_every_crate() {
    let map = TextFile::read("ARCHITECTURE.md").text;
    let mut complaints = Vec::new();
    for entry in std::fs::read_dir(root().join("crates")).expect("crates/ can be listed") {
        let name = entry.expect("crates/ can be listed").file_name().to_string_lossy().into_owned();
        if !map.contains(&format!("\n### `crates/{name}`")) {
            complaints.push(name);
        }
    }
    expect_none("crates without a section in ARCHITECTURE.md", &complaints);
}

#[test]
fn the_commands_in_documents_are_real() {
    let attnd = CommandLine::declared();
    let xtask = TextFile::read("crates/xtask/src/main.rs").text;
    let known = known_variables();
    let mut complaints = Vec::new();
    for document in documents() {
        let mut complain =
            |line: &str, what: String| complaints.push(format!("{}: {line}: {what}", document.path));
        for line in block_lines(&document.text) {
            for command in line.split(['|', ';', '&']) {
                let words: Vec<&str> = command.split_whitespace().skip_while(|w| w.contains('=')).collect();
                match words[..] {
                    ["cargo", "xtask", verb, ..] if !xtask.contains(&format!("[\"{verb}\"] =>")) => {
                        complain(&line, format!("xtask has no command {verb}"));
                    }
                    ["cargo", "run", "--release", "--", ref rest @ ..]
                    | ["attnd" | "target/release/attnd", ref rest @ ..] => {
                        if let Some(what) = attnd.complaint(rest) {
                            complain(&line, what);
                        }
                    }
                    _ => {}
                }
            }
        }
        for variable in variables(&document.text).into_iter().filter(|v| !known.iter().any(|k| k == v)) {
            complain(variable, "no source reads it".to_owned());
        }
    }
    expect_none("commands and variables that do not exist", &complaints);
}

#[test]
fn the_readme_has_its_two_commands_and_ci_runs_the_second() {
    let readme = TextFile::read("README.md").text;
    let commands = block_lines(&readme);
    let (demo, test) = ("cargo run --release -- demo", "cargo xtask test");
    for command in [demo, test] {
        assert!(
            commands.iter().any(|line| line == command),
            "README.md has no line `{command}` in a code block"
        );
    }
    let ci = TextFile::read(".ci/run").text;
    assert!(
        ci.lines().any(|line| line == format!("exec {test}")),
        ".ci/run does not end in the test command"
    );
}

#[test]
fn the_readme_is_filled_in() {
    let (open, readme) = ("{{", TextFile::read("README.md").text);
    let left: Vec<String> = readme.lines().filter(|l| l.contains(open)).map(str::to_owned).collect();
    expect_none("places in README.md that wait for a measured number or a picture", &left);
}

#[test]
fn the_licence_is_the_one_the_manifests_name() {
    assert!(TextFile::read("Cargo.toml").text.contains("license = \"Apache-2.0\""));
    let licence = TextFile::read("LICENSE").text;
    assert!(licence.contains("Apache License") && licence.contains("END OF TERMS AND CONDITIONS"));
}
