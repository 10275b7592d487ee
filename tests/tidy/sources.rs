//! Source files: sizes, names, and words that must not be left behind.

use super::{TextFile, expect_none, rust_files, text_files};

const MAX_LINES: usize = 500;
const MAX_LINES_WITH_TESTS: usize = 600;

fn is_test_file(file: &TextFile) -> bool {
    file.path.starts_with("tests/") || file.path.contains("/tests/") || file.name() == "tests.rs"
}

#[test]
fn files_are_short_enough_to_read_in_one_sitting() {
    let mut complaints = Vec::new();
    for file in text_files().iter().filter(|file| file.has_extension(&["rs", "py", "proto"])) {
        let all = file.text.lines().count();
        let without_tests = match file.text.lines().position(|line| line.trim() == "#[cfg(test)]") {
            _ if is_test_file(file) => 0,
            Some(tests_begin) => tests_begin,
            None => all,
        };
        if without_tests > MAX_LINES || all > MAX_LINES_WITH_TESTS {
            complaints.push(format!("{}: {without_tests} lines, {all} with tests", file.path));
        }
    }
    let rule = format!("at most {MAX_LINES} lines, {MAX_LINES_WITH_TESTS} with tests");
    expect_none(&rule, &complaints);
}

#[test]
fn names_say_what_the_file_holds() {
    let says_nothing = ["util", "utils", "common", "manager", "helper", "helpers", "misc", "stuff"];
    let mut complaints = Vec::new();
    for file in text_files() {
        let words = file.path.split(['/', '.', '_', '-']);
        complaints.extend(words.filter(|w| says_nothing.contains(w)).map(|w| format!("{}: {w}", file.path)));
    }
    expect_none("no file or folder is named for a drawer", &complaints);
}

#[test]
fn modules_begin_with_what_they_are() {
    let complaints: Vec<String> =
        rust_files().iter().filter(|f| !f.text.starts_with("//! ")).map(|f| f.path.clone()).collect();
    expect_none("the first line of a module says what it is (`//! ...`)", &complaints);
}

#[test]
fn nothing_is_left_for_later() {
    // Written in pieces, so that this file passes.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
    ];
    expect_none("no marks for later work", &lines_with(&words));
}

#[test]
fn no_path_of_a_developers_machine() {
    let places = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/Us", "ers/"),
        concat!("C:", "\\Users"),
        concat!("/wo", "rk/"),
        concat!("../sha", "red"),
    ];
    expect_none("no absolute path of one machine", &lines_with(&places));
}

fn lines_with(words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for file in text_files().iter().filter(|file| file.name() != "LICENSE") {
        for (index, line) in file.text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{}: {}", file.path, index + 1, line.trim()));
            }
        }
    }
    found
}

#[test]
fn no_test_is_switched_off() {
    let ignored = concat!("#[ig", "nore");
    expect_none("long tests ask for ATTND_NIGHTLY, none is ignored", &lines_with(&[ignored]));
}

#[test]
fn every_rpc_says_what_it_does() {
    let mut complaints = Vec::new();
    for file in text_files().iter().filter(|file| file.has_extension(&["proto"])) {
        assert!(file.text.starts_with("// "), "{} does not begin with what it is", file.path);
        let mut above = "";
        for (index, line) in file.text.lines().enumerate() {
            if line.trim_start().starts_with("rpc ") && !above.trim_start().starts_with("//") {
                complaints.push(format!("{}:{}: {}", file.path, index + 1, line.trim()));
            }
            above = line;
        }
    }
    expect_none("a comment above each rpc", &complaints);
}
