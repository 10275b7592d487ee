//! Unsafe code: in the kernel crate only, with duties and proofs written down.
//!
//! That each unsafe block has its `SAFETY:` comment is clippy's `undocumented_unsafe_blocks`; what clippy leaves open
//! is checked here: private unsafe functions, where that lint is switched off, and code that is not compiled on this
//! machine.

use super::{TextFile, expect_none, rust_files};

/// The source with comments, strings and character literals blanked, line by line.
fn code_lines(source: &str) -> Vec<String> {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let blanked = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if first == '"' {
            string_length(rest)
        } else if rest.starts_with("r\"") || rest.starts_with("r#") {
            raw_string_length(rest).unwrap_or(0)
        } else if first == '\'' {
            character_length(rest).unwrap_or(0)
        } else {
            0
        };
        if blanked == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..blanked].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[blanked..];
        }
    }
    code.lines().map(str::to_owned).collect()
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return at + 1,
            _ => escaped = false,
        }
    }
    text.len()
}

fn raw_string_length(text: &str) -> Option<usize> {
    let hashes = text[1..].chars().take_while(|c| *c == '#').count();
    let body = text[1 + hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(body.find(&end).map_or(text.len(), |at| 1 + hashes + 1 + at + end.len()))
}

/// `None` for a lifetime.
fn character_length(text: &str) -> Option<usize> {
    let body = &text[1..];
    if body.starts_with('\\') {
        return body[2..].find('\'').map(|at| 1 + 2 + at + 1);
    }
    let first = body.chars().next()?;
    body[first.len_utf8()..].starts_with('\'').then(|| 1 + first.len_utf8() + 1)
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
}

/// Comments and attributes directly above a line.
fn above<'a>(lines: &[&'a str], index: usize) -> Vec<&'a str> {
    let attached = |line: &&&str| line.trim_start().starts_with("//") || line.trim_start().starts_with("#[");
    lines[..index].iter().rev().take_while(attached).copied().collect()
}

fn kernel_files() -> Vec<TextFile> {
    rust_files().into_iter().filter(|file| file.path.starts_with("crates/attnd-kernel/")).collect()
}

#[test]
fn only_the_kernel_crate_has_unsafe_code() {
    let mut complaints = Vec::new();
    for file in rust_files().iter().filter(|file| !file.path.starts_with("crates/attnd-kernel/")) {
        for (index, line) in code_lines(&file.text).iter().enumerate() {
            if has_word(line, "unsafe") || line.contains("allow(unsafe_code)") {
                complaints.push(format!("{}:{}", file.path, index + 1));
            }
        }
    }
    expect_none("unsafe outside crates/attnd-kernel", &complaints);
}

#[test]
fn every_unsafe_function_states_its_duties() {
    let mut complaints = Vec::new();
    let mut functions = 0;
    for file in kernel_files() {
        let lines: Vec<&str> = file.text.lines().collect();
        let code = code_lines(&file.text);
        for (index, line) in code.iter().enumerate() {
            let Some((before, _)) = line.split_once("unsafe fn ") else { continue };
            if !before.chars().all(|c| c.is_alphanumeric() || " _()".contains(c)) {
                continue; // the type of a pointer
            }
            functions += 1;
            // A method may leave its duties to the trait, a macro states them once; both begin at the margin.
            let outer = (0..index).rev().find(|i| line.starts_with(' ') && starts_item(&code[*i]));
            let by_outer = outer.is_some_and(|i| {
                let implements = has_word(&code[i], "impl") && has_word(&code[i], "for");
                implements || above(&lines, i).iter().any(|l| l.contains("# Safety"))
            });
            if !by_outer && !above(&lines, index).iter().any(|l| l.contains("# Safety")) {
                complaints.push(format!("{}:{}: {}", file.path, index + 1, line.trim()));
            }
        }
    }
    assert!(functions > 0, "no unsafe function was found, so this test sees nothing");
    expect_none("`# Safety` above each unsafe function, its trait or its macro", &complaints);
}

fn starts_item(code_line: &str) -> bool {
    !code_line.starts_with([' ', '}', ')', '#']) && !code_line.is_empty()
}

#[test]
fn every_unsafe_block_has_its_proof_on_every_architecture() {
    /// Lines of a statement before the one with its block, at most.
    const STATEMENT: usize = 3;
    let mut complaints = Vec::new();
    let mut blocks = 0;
    for file in kernel_files() {
        let lines: Vec<&str> = file.text.lines().collect();
        let mut lint_is_off = false;
        for (index, line) in code_lines(&file.text).iter().enumerate() {
            if starts_item(line) {
                lint_is_off = above(&lines, index).iter().any(|l| l.contains("undocumented_unsafe_blocks"));
            }
            if lint_is_off || !line.contains("unsafe {") {
                continue;
            }
            blocks += 1;
            let comments = (0..STATEMENT.min(index)).map(|before| above(&lines, index - before));
            let nearest = comments.into_iter().find(|comments| !comments.is_empty());
            if !nearest.is_some_and(|comments| comments.iter().any(|l| l.contains("SAFETY:"))) {
                complaints.push(format!("{}:{}: {}", file.path, index + 1, line.trim()));
            }
        }
    }
    assert!(blocks > 20, "only {blocks} unsafe blocks were recognised");
    expect_none("`SAFETY:` above each unsafe block", &complaints);
}

#[test]
fn where_the_lint_is_off_one_proof_covers_all() {
    let mut complaints = Vec::new();
    for file in kernel_files() {
        let lines: Vec<&str> = file.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let switched_off = line.contains("allow(") && line.contains("undocumented_unsafe_blocks");
            if switched_off && !above(&lines, index).iter().any(|l| l.contains("SAFETY:")) {
                complaints.push(format!("{}:{}", file.path, index + 1));
            }
        }
    }
    expect_none("`SAFETY:` above each allow of undocumented_unsafe_blocks", &complaints);
    let workspace = TextFile::read("Cargo.toml").text;
    assert!(workspace.contains("\nundocumented_unsafe_blocks = "), "the workspace lints lack it");
    assert!(workspace.contains("\nunsafe_code = \"deny\""), "the workspace lints lack it");
}

#[test]
fn blanking_leaves_code_and_nothing_else() {
    let source = "let a = \"unsafe \\\" x\"; // unsafe\nlet b = 'u'; fn f<'a>() {} r#\"unsafe \"\"# /* unsafe\n*/ unsafe {}";
    let code = code_lines(source);
    assert_eq!(code.len(), 3);
    assert!(!has_word(&code[0], "unsafe") && code[0].contains("let a"));
    assert!(!has_word(&code[1], "unsafe") && code[1].contains("fn f<'a>() {}"));
    assert!(has_word(&code[2], "unsafe"));
}
