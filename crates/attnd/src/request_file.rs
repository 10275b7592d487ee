//! A call written down: a file with options of `attnd attend`, by the names of its flags.
//!
//! Whatever is a flag is an option of the file, and is read as the flag is: the entries become words of the command line, and the parser
//! of the command line says what they mean. What is typed wins.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, Command, CommandFactory as _, FromArgMatches as _};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::de::{DeTable, DeValue};

use crate::args::{Cli, Verb};
use crate::exit::BadInput;

/// More than anybody writes.
const MOST_BYTES: u64 = 1 << 20;
const VERB: &str = "attend";

/// The command line with what its request file adds to it, if it has one. `words` are the ones that `cli` was parsed of.
///
/// # Errors
/// If the file can't be read, isn't what its extension says, or has an entry that is no option or has no value for it; each error names the
/// file, and the line or the option.
pub fn with_request(cli: Cli, words: Vec<OsString>) -> Result<Cli, BadInput> {
    let path = match &cli.verb {
        Verb::Attend(args) => args.request.clone(),
        _ => None,
    };
    let Some(path) = path else { return Ok(cli) };
    let refused = |fault: Fault| BadInput::new(format!("{}: {fault}", path.display()));
    let entries = entries(&path, &read(&path).map_err(refused)?).map_err(refused)?;
    let command = Cli::command();
    let attend = command.find_subcommand(VERB).ok_or_else(|| BadInput::new("there is no attend"))?;
    check(&entries, attend).map_err(refused)?;

    let typed = typed(&words, attend);
    let gives_way =
        |arg: &Arg| typed.iter().any(|other| other == arg || exclude_each_other(attend, other, arg));
    let added = entries.iter().filter_map(|entry| {
        let arg = find(attend, &entry.name).filter(|arg| !gives_way(arg))?;
        Some(entry.words(arg))
    });
    let added = added.flatten();
    let matches = Cli::command().try_get_matches_from(words.into_iter().chain(added.map(OsString::from)));
    matches
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|error| refused(Fault::new(None, what_clap_says(&error))))
}

/// What is wrong with a file, and where.
#[derive(Debug)]
struct Fault {
    /// From 1.
    line: Option<usize>,
    what: String,
}

impl Fault {
    fn new(line: Option<usize>, what: impl Into<String>) -> Self {
        Self { line, what: what.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.what)
    }
}

// === the file ===

/// An option and its value.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    value: Written,
    /// Where it is, from 1; the format may not say.
    line: Option<usize>,
}

#[derive(Debug, PartialEq, Eq)]
enum Written {
    /// As a flag is typed without a value, or not at all.
    Switch(bool),
    /// As it would be typed behind the flag.
    Text(String),
    /// The same for several; a flag that may be given again has each by itself, others have them with commas.
    List(Vec<String>),
    /// Values with names, of a flag that may be given again and takes NAME=VALUE.
    Named(Vec<(String, String)>),
}

impl Entry {
    /// The entry as words of the command line.
    fn words(&self, arg: &Arg) -> Vec<String> {
        let name = &self.name;
        let word = |text: &str| format!("--{name}={text}");
        match &self.value {
            Written::Switch(false) => Vec::new(),
            Written::Switch(true) => vec![format!("--{name}")],
            Written::Text(text) => vec![word(text)],
            Written::List(texts) if matches!(arg.get_action(), ArgAction::Append) => {
                texts.iter().map(|text| word(text)).collect()
            }
            Written::List(texts) => vec![word(&texts.join(","))],
            Written::Named(texts) => texts.iter().map(|(own, text)| word(&format!("{own}={text}"))).collect(),
        }
    }

    /// Whether values have names where the flag takes none.
    fn is_misnamed(&self, arg: &Arg) -> bool {
        let takes_names =
            arg.get_value_names().unwrap_or_default().iter().any(|value| value.as_str().contains('='));
        matches!(self.value, Written::Named(_)) && !takes_names
    }
}

fn read(path: &Path) -> Result<String, Fault> {
    let fault = |error: std::io::Error| Fault::new(None, error.to_string());
    if !std::fs::metadata(path).map_err(fault)?.is_file() {
        return Err(Fault::new(None, "not a regular file"));
    }
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(fault)?;
    file.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(fault)?;
    match text.len() as u64 {
        n if n > MOST_BYTES => Err(Fault::new(None, format!("longer than {MOST_BYTES} bytes"))),
        _ => Ok(text),
    }
}

/// The entries of a file, in the order in which they stand.
fn entries(path: &Path, text: &str) -> Result<Vec<Entry>, Fault> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => of_toml(text),
        Some("json") => of_json(text),
        _ => Err(Fault::new(None, "expected a file that ends in .toml or .json")),
    }
}

fn of_toml(text: &str) -> Result<Vec<Entry>, Fault> {
    let line_of = |span: Range<usize>| text.get(..span.start).map(|before| before.matches('\n').count() + 1);
    let table =
        DeTable::parse(text).map_err(|error| Fault::new(error.span().and_then(line_of), error.message()))?;
    let mut entries = Vec::new();
    for (name, value) in table.get_ref() {
        let (at, line) = (name.span().start, line_of(name.span()));
        let value = toml_value(value.get_ref())
            .map_err(|what| Fault::new(line, format!("{}: {what}", name.get_ref())))?;
        entries.push((at, Entry { name: name.get_ref().to_string(), value, line }));
    }
    entries.sort_by_key(|(at, _)| *at);
    Ok(entries.into_iter().map(|(_, entry)| entry).collect())
}

fn toml_value(value: &DeValue<'_>) -> Result<Written, &'static str> {
    let scalar = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map(|number| number.to_string())
            .map_err(|_error| "a number that large is no value of an option"),
        DeValue::Boolean(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => Err(NO_VALUE),
    };
    match value {
        DeValue::Boolean(on) => Ok(Written::Switch(*on)),
        DeValue::Array(list) => {
            let list: Result<Vec<String>, _> = list.iter().map(|value| scalar(value.get_ref())).collect();
            Ok(Written::List(list?))
        }
        DeValue::Table(table) => {
            let mut named = Vec::with_capacity(table.len());
            for (name, value) in table {
                let text = scalar(value.get_ref())?;
                named.push((name.span().start, (name.get_ref().to_string(), text)));
            }
            named.sort_by_key(|(at, _)| *at);
            Ok(Written::Named(named.into_iter().map(|(_, named)| named).collect()))
        }
        value => scalar(value).map(Written::Text),
    }
}

fn of_json(text: &str) -> Result<Vec<Entry>, Fault> {
    let Members(members) = serde_json::from_str(text).map_err(|error| {
        let what = error.to_string();
        Fault::new(Some(error.line()), what.split(" at line ").next().unwrap_or_default())
    })?;
    let entry = |(name, value): (String, Json)| match json_value(&value) {
        Ok(value) => Ok(Entry { name, value, line: None }),
        Err(what) => Err(Fault::new(None, format!("{name}: {what}"))),
    };
    members.into_iter().map(entry).collect()
}

fn json_value(value: &Json) -> Result<Written, &'static str> {
    use serde_json::Value;
    let scalar = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => Err(NO_VALUE),
    };
    match value {
        Json::Members(Members(members)) => {
            let named = members.iter().map(|(name, value)| match value {
                Json::Other(value) => Ok((name.clone(), scalar(value)?)),
                Json::Members(_) => Err(NO_VALUE),
            });
            named.collect::<Result<_, _>>().map(Written::Named)
        }
        // Its members would have been told apart.
        Json::Other(Value::Object(_)) => Err("an option or a name in it twice"),
        Json::Other(Value::Bool(on)) => Ok(Written::Switch(*on)),
        Json::Other(Value::Array(list)) => {
            list.iter().map(scalar).collect::<Result<_, _>>().map(Written::List)
        }
        Json::Other(value) => scalar(value).map(Written::Text),
    }
}

/// A value of an option.
#[derive(Deserialize)]
#[serde(untagged)]
enum Json {
    Members(Members),
    Other(serde_json::Value),
}

const NO_VALUE: &str = "expected a text, a number, a list of them, true or false";

/// The members of an object in their order; one that comes twice is refused, which maps would not notice.
struct Members(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of options")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members: Vec<(String, Json)> = Vec::new();
                while let Some(member) = map.next_entry::<String, Json>()? {
                    if members.iter().any(|(name, _)| *name == member.0) {
                        return Err(serde::de::Error::custom(format!("{} twice", member.0)));
                    }
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

// === the command line ===

/// The flag that a file may have an entry for.
fn find<'a>(attend: &'a Command, name: &str) -> Option<&'a Arg> {
    attend.get_arguments().find(|arg| arg.get_long() == Some(name)).filter(|arg| arg.get_id() != "request")
}

fn exclude_each_other(attend: &Command, a: &Arg, b: &Arg) -> bool {
    let excludes = |a: &Arg, b: &Arg| attend.get_arg_conflicts_with(a).contains(&b);
    excludes(a, b) || excludes(b, a)
}

/// The flags that somebody typed.
fn typed(words: &[OsString], attend: &Command) -> Vec<Arg> {
    let Ok(matches) = Cli::command().try_get_matches_from(words) else { return Vec::new() };
    let Some(matches) = matches.subcommand_matches(VERB) else { return Vec::new() };
    let is_typed = |arg: &&Arg| matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine);
    attend.get_arguments().filter(is_typed).cloned().collect()
}

/// Refuses entries that are no options, and values that no flag would take.
fn check(entries: &[Entry], attend: &Command) -> Result<(), Fault> {
    // One at a time: clap says of which flag a value is only as it prints it.
    for entry in entries {
        let fault = |what: String| Err(Fault::new(entry.line, format!("{}: {what}", entry.name)));
        let Some(arg) = find(attend, &entry.name) else {
            return fault(format!("no such option{}", similar(&entry.name)));
        };
        if entry.is_misnamed(arg) {
            return fault(NO_VALUE.into());
        }
        let words = ["attnd", VERB, "--request=x"].map(str::to_owned).into_iter().chain(entry.words(arg));
        let Err(error) = Cli::command().try_get_matches_from(words) else {
            continue;
        };
        match error.kind() {
            // What goes together shows when all are together.
            ErrorKind::MissingRequiredArgument | ErrorKind::ArgumentConflict => {}
            _ if entry.value == Written::Switch(true) => return fault("true is no value of it".into()),
            ErrorKind::TooManyValues | ErrorKind::UnknownArgument => {
                return fault("expected true or false".into());
            }
            _ => return fault(what_clap_says(&error)),
        }
    }
    Ok(())
}

/// A name of an option that was perhaps meant.
fn similar(name: &str) -> String {
    let asked = Cli::command().try_get_matches_from(["attnd", VERB, "--request=x", &format!("--{name}")]);
    let suggested = match asked.as_ref().err().and_then(|error| error.get(ContextKind::SuggestedArg)) {
        Some(ContextValue::String(flag)) => flag.strip_prefix("--").filter(|flag| *flag != name),
        _ => None,
    };
    suggested.map_or_else(
        || "; the names are those of the flags of attnd attend".to_owned(),
        |flag| format!("; perhaps {flag}?"),
    )
}

/// The first line of an error of the command line, without what a person at a keyboard is told besides.
fn what_clap_says(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}
