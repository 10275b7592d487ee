//! The program's command line as its source declares it, and whether documents and deployments keep to it.

use super::{TextFile, rust_files};

/// What `attnd` understands.
pub(super) struct CommandLine {
    verbs: Vec<String>,
    flags: Vec<String>,
    /// Where the coordinator listens by default.
    pub(super) coordinator_port: u16,
}

impl CommandLine {
    /// Reads `args.rs` and its modules, where every verb and flag is declared.
    pub(super) fn declared() -> Self {
        let is_of_args = |file: &TextFile| {
            let module = file.path.strip_prefix("crates/attnd/src/args");
            module.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
        };
        let source: String = rust_files().into_iter().filter(is_of_args).map(|file| file.text).collect();
        let verbs = body_after(&source, "enum Verb {")
            .lines()
            .filter_map(|line| line.trim().split_once('('))
            .filter(|(name, _)| name.chars().all(char::is_alphabetic))
            .map(|(name, _)| name.to_lowercase())
            .collect();
        let fields = source.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(':'));
        let flags =
            fields.map(|(name, _)| name.replace('_', "-")).chain(["help".into(), "version".into()]).collect();
        let default =
            body_after(&source, "struct CoordinatorArgs {").split_once("default_value = \"").map(|d| d.1);
        let address =
            default.and_then(|text| text.split('"').next()).expect("the coordinator has a default address");
        let port = address.rsplit(':').next().and_then(|port| port.parse().ok());
        let declared = Self { verbs, flags, coordinator_port: port.expect("an address has a port") };
        assert!(declared.verbs.iter().any(|v| v == "worker"), "verbs found: {:?}", declared.verbs);
        for (flag, file) in [("listen", "args.rs"), ("use-workers", "args/site.rs"), ("isa", "args/bench.rs")]
        {
            let found = declared.flags.iter().any(|f| f == flag);
            assert!(found, "{flag} of {file} is not among the flags found: {:?}", declared.flags);
        }
        declared
    }

    /// What is wrong with the words after `attnd`, if anything.
    pub(super) fn complaint(&self, words: &[&str]) -> Option<String> {
        let verb = words.iter().find(|word| !word.starts_with('-'))?;
        if !self.verbs.iter().any(|v| v == verb) {
            return Some(format!("attnd has no verb {verb}"));
        }
        let flags = words.iter().filter_map(|word| word.strip_prefix("--"));
        let names = flags.map(|flag| flag.split('=').next().unwrap_or(flag)).filter(|name| !name.is_empty());
        let unknown: Vec<&str> = names.filter(|name| !self.flags.iter().any(|f| f == name)).collect();
        (!unknown.is_empty()).then(|| format!("attnd has no flag {unknown:?}"))
    }
}

/// The lines between an opening that ends in a brace and the closing brace at the margin.
fn body_after<'a>(source: &'a str, opening: &str) -> &'a str {
    let (_, rest) =
        source.split_once(opening).unwrap_or_else(|| panic!("{opening} is not in args.rs or its modules"));
    rest.split("\n}").next().unwrap_or(rest)
}

/// Names of environment variables that begin with `ATTND_`, in the order of appearance.
pub(super) fn variables(text: &str) -> Vec<&str> {
    let words = text.split(|c: char| !c.is_ascii_uppercase() && c != '_');
    words.filter(|word| word.strip_prefix("ATTND_").is_some_and(|rest| !rest.is_empty())).collect()
}

/// The variables that the program or its tests read.
pub(super) fn known_variables() -> Vec<String> {
    let mut known = Vec::new();
    for file in rust_files().iter().filter(|file| !file.path.starts_with("tests/tidy")) {
        known.extend(variables(&file.text).into_iter().map(str::to_owned));
    }
    known.sort_unstable();
    known.dedup();
    known
}

#[test]
fn the_check_of_command_lines_can_fail() {
    let attnd = CommandLine::declared();
    assert_eq!(attnd.complaint(&["worker", "--listen=0.0.0.0:1"]), None);
    assert!(attnd.complaint(&["wroker"]).is_some());
    assert!(attnd.complaint(&["worker", "--lisen", "0.0.0.0:1"]).is_some());
    assert_eq!(variables("ATTND_ISA=avx2 ${ATTND_LISTEN} ATTND_"), ["ATTND_ISA", "ATTND_LISTEN"]);
}
