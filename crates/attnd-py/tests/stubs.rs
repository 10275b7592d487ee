//! The stubs of the compiled half say what it exports, and the options that it takes are those that `_options.py` hands over.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What follows `before` on the lines that begin with it, up to the first character that is no part of a name.
fn names(text: &str, before: &str) -> BTreeSet<String> {
    let name =
        |rest: &str| rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().map(str::to_owned);
    text.lines().filter_map(|line| line.strip_prefix(before)).filter_map(name).collect()
}

#[test]
fn the_stubs_have_what_the_module_exports() {
    let stubs = read("python/attnd/_attnd.pyi");
    let of_stubs: BTreeSet<String> = names(&stubs, "def ").union(&names(&stubs, "class ")).cloned().collect();
    let module = read("src/lib.rs");
    let exported: BTreeSet<String> = module
        .lines()
        .filter_map(|line| line.trim().strip_prefix("use crate::")?.strip_suffix(';')?.split_once("::"))
        .flat_map(|(_, names)| {
            names.trim_matches(['{', '}']).split(", ").map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    assert!(exported.len() >= 5, "{exported:?}");
    assert_eq!(of_stubs, exported);
}

#[test]
fn every_option_is_handed_over() {
    let options = read("src/options.rs");
    let begin = options.find("struct Options").expect("the options");
    let end = options[begin..].find("\n}").expect("their end");
    let taken = names(&options[begin..begin + end], "    ");
    let taken: Vec<&String> = taken.iter().filter(|name| !name.is_empty()).collect();
    assert!(taken.len() >= 25, "{taken:?}");
    let python = read("python/attnd/_options.py");
    for option in taken {
        assert!(python.contains(&format!("\"{option}\"")), "{option} isn't handed over by _options.py");
    }
}
