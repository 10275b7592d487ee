//! Calls that are written down in files: they are what the flags are, and what is wrong with one is said in one line.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// The program without what the surroundings have set, in `folder`.
fn attend(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("ATTND_") {
            command.env_remove(key);
        }
    }
    command.current_dir(folder).arg("attend").args(words).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An f32 npy file of numbers between -1 and 1, others for each `seed`.
fn numbers(path: &Path, shape: &[usize], seed: u32) {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let dims: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({dims}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend((0..shape.iter().product()).flat_map(|_| next().to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

/// Two batch elements of two heads, 5 queries and 300 keys, and a slope and a sink for each head.
fn operands(folder: &Path) {
    for (name, tokens, seed) in [("q", 5, 1), ("k", 300, 2), ("v", 300, 3)] {
        numbers(&folder.join(format!("{name}.npy")), &[2, 2, tokens, 8], seed);
    }
    numbers(&folder.join("slopes.npy"), &[2], 4);
    numbers(&folder.join("sinks.npy"), &[2], 5);
}

const TOML: &str = r#"
# What is computed
q = "q.npy"
k = "k.npy"
v = "v.npy"
causal = "offset"
offset = [295, -10]
window = [200, -1]
key-begin = [0, 1_7]
scale = -0.75
softcap = 2.5
alibi = "slopes.npy"
sinks = "sinks.npy"
empty-row = "nan"

# and how
workers = 2
use-workers = 2
json = true
allow-non-finite = false
output = "toml.safetensors"
"#;

const JSON: &str = r#"{
  "q": "q.npy", "k": "k.npy", "v": "v.npy",
  "causal": "offset", "offset": "295,-10", "window": [200, "-1"], "key-begin": [0, 17],
  "scale": -7.5e-1, "softcap": 2.5, "alibi": "slopes.npy", "sinks": "sinks.npy", "empty-row": "nan",
  "workers": 2, "use-workers": 2, "output": "json.safetensors"
}"#;

const FLAGS: &[&str] = &[
    "--q=q.npy",
    "--k=k.npy",
    "--v=v.npy",
    "--causal=offset",
    "--offset=295,-10",
    "--window=200,-1",
    "--key-begin=0,17",
    "--scale=-0.75",
    "--softcap=2.5",
    "--alibi=slopes.npy",
    "--sinks=sinks.npy",
    "--empty-row=nan",
    "--workers=2",
    "--use-workers=2",
];

#[test]
fn a_file_is_the_flags_that_it_has_the_names_of() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    operands(folder);
    fs::write(folder.join("call.toml"), TOML).unwrap();
    fs::write(folder.join("call.json"), JSON).unwrap();
    let result = |words: &[&str], output: &str| {
        let ended = attend(folder, words);
        assert!(ended.status.success(), "{words:?}: {}", stderr(&ended));
        fs::read(folder.join(output)).unwrap()
    };
    let wanted = result(&[FLAGS, &["-o", "flags.safetensors"]].concat(), "flags.safetensors");
    assert!(wanted == result(&["--request", "call.toml"], "toml.safetensors"));
    assert!(wanted == result(&["--request", "call.json"], "json.safetensors"));
    assert!(wanted != result(&["--request", "call.json", "--softcap=2.4"], "json.safetensors"));

    // What is typed wins, also over what would exclude it.
    let other = TOML.replace("2.5", "0.5").replace("200", "3").replace("\nworkers = 2\n", "\n");
    fs::write(folder.join("other.toml"), format!("{other}\nendpoint = \"http://127.0.0.1:9\"")).unwrap();
    let typed =
        ["--request=other.toml", "--softcap=2.5", "--window=200,", "--workers=2", "-o", "typed.safetensors"];
    assert!(wanted == result(&typed, "typed.safetensors"));
    assert!(attend(folder, &["--request=other.toml"]).status.code() == Some(1), "nobody is at that endpoint");
}

#[test]
fn parameters_have_names_in_a_file() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    operands(folder);
    for (name, shape, seed) in [("w_q", &[6, 8][..], 6), ("w_k", &[6, 8], 7), ("v_a", &[2, 6], 8)] {
        numbers(&folder.join(format!("{name}.npy")), shape, seed);
    }
    let call = "q = 'q.npy'\nk = 'k.npy'\nv = 'v.npy'\nworkers = 2\nuse-workers = 2\n";
    let result = |words: &[&str]| {
        let ended = attend(folder, &[words, &["-o", "out.safetensors"]].concat());
        assert!(ended.status.success(), "{words:?}: {}", stderr(&ended));
        fs::read(folder.join("out.safetensors")).unwrap()
    };
    let of_file = |extra: &str| {
        fs::write(folder.join("call.toml"), format!("{call}{extra}\n")).unwrap();
        result(&["--request", "call.toml"])
    };
    let flags = ["--q=q.npy", "--k=k.npy", "--v=v.npy", "--workers=2", "--use-workers=2", "--score=gatv2"];
    let files = ["--param=v=v_a.npy", "--param=w_q=w_q.npy", "--param=w_k=w_k.npy"];
    let wanted = result(&[&flags[..], &files[..], &["--param", "slope=0.5"]].concat());
    let table = "score = 'gatv2'\n[param]\nv = 'v_a.npy'\nw_q = 'w_q.npy'\nw_k = 'w_k.npy'\nslope = 0.5";
    assert!(wanted != of_file(&table.replace("0.5", "0.25")), "the slope is looked at");
    assert!(wanted == of_file(table));
    let list = "score = 'gatv2'\nparam = ['w_k=w_k.npy', 'slope=0.5', 'v=v_a.npy', 'w_q=w_q.npy']";
    assert!(wanted == of_file(list));
    let json = r#"{ "q": "q.npy", "k": "k.npy", "v": "v.npy", "workers": 2, "use-workers": 2, "score": "gatv2",
        "param": { "v": "v_a.npy", "w_q": "w_q.npy", "w_k": "w_k.npy", "slope": 5e-1 } }"#;
    fs::write(folder.join("call.json"), json).unwrap();
    assert!(wanted == result(&["--request", "call.json"]));

    // Typed parameters stand for all of the file.
    let typed = attend(folder, &["--request", "call.json", "--param=slope=1"]);
    assert_eq!(typed.status.code(), Some(2));
    assert!(stderr(&typed).contains("score=gatv2 and no parameter v"), "{}", stderr(&typed));
}

#[test]
fn what_is_wrong_with_a_file_is_said_in_one_line() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    operands(folder);
    fs::create_dir(folder.join("directory.toml")).unwrap();
    fs::write(folder.join("bytes.toml"), b"q = \"\xff\"").unwrap();
    let refused = |name: &str, text: &str| {
        let ended = attend(folder, &["--request", name]);
        let stderr = stderr(&ended);
        assert_eq!(ended.status.code(), Some(2), "{name}: {stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains(text), "{name}: {stderr}instead of {text}");
    };
    refused("no.toml", "no.toml: ");
    refused("directory.toml", "directory.toml: not a regular file");
    refused("q.npy", "q.npy: ");
    refused("bytes.toml", "bytes.toml: ");
    fs::write(folder.join("call.yaml"), "q: q.npy").unwrap();
    refused("call.yaml", "call.yaml: expected a file that ends in .toml or .json");
    let whole = "q = 'q.npy'\nk = 'k.npy'\nv = 'v.npy'\n";
    for (line, text) in [
        ("windw = [1, 2]", "call.toml: line 4: windw: no such option; perhaps window?"),
        ("key_begin = 3", "call.toml: line 4: key_begin: no such option; perhaps key-begin?"),
        ("help = true", "call.toml: line 4: help: no such option"),
        ("request = 'call.toml'", "call.toml: line 4: request: no such option"),
        ("window = 5", "call.toml: line 4: window: "),
        ("window = 5", "expected LEFT,RIGHT, such as 4096,0"),
        ("softcap = 0", "must be finite and > 0"),
        ("softcap = nan", "must be finite and > 0"),
        ("alibi = []", "expected auto, numbers such as 0.5,0.25, or SRC"),
        ("causal = 'left'", "[possible values: bottom-right, top-left, offset]"),
        ("scale = true", "call.toml: line 4: scale: true is no value of it"),
        ("json = 'yes'", "call.toml: line 4: json: expected true or false"),
        (
            "scale = { x = 1 }",
            "call.toml: line 4: scale: expected a text, a number, a list of them, true or false",
        ),
        ("scale = 2026-01-01", "call.toml: line 4: scale: expected a text"),
        ("param = { beta = [1, 2] }", "call.toml: line 4: param: expected a text, a number, a list of them"),
        ("param = { beta = 'x' }", "call.toml: line 4: param: "),
        ("param = ['beta']", "expected NAME=SRC or NAME=NUMBER, such as w_q=x.npz:w_q or beta=2.5"),
        ("param = { beta = 1, beta = 2 }", "call.toml: line 4: duplicate key"),
        ("param = { beta = 1 }\nworkers = 1", "--param needs --score"),
        ("score = 'cosin'", "call.toml: line 4: score: "),
        ("score = 'cosin'", "score=cosin: there are additive, biaffine"),
        ("swin-window = 7", "expected rows x columns, each at least 1, such as 7x7"),
        ("csr-block = [1, 2]", "call.toml: line 4: csr-block: "),
        ("key-end = [[1], [2]]", "call.toml: line 4: key-end: expected a text"),
        ("q = 'q.npy'", "call.toml: line 4: duplicate key"),
        ("scale = ", "call.toml: line 4: "),
        (
            "workers = 2\nendpoint = 'http://h:1'",
            "call.toml: the argument '--workers <N>' cannot be used with '--endpoint <URL>'",
        ),
        (
            "threads-per-worker = 2",
            "call.toml: the following required arguments were not provided: --workers <N>",
        ),
        ("", "where to compute? --workers N starts N processes here"),
    ] {
        fs::write(folder.join("call.toml"), format!("{whole}{line}\n")).unwrap();
        refused("call.toml", text);
    }
    fs::write(folder.join("call.toml"), "q = 'q.npy'\nv = 'v.npy'\nworkers = 1").unwrap();
    refused("call.toml", "--k is missing: not typed nor in call.toml");
    for (json, text) in [
        ("[]", "call.json: line 1: invalid type: sequence, expected an object of options"),
        ("{\"q\": \"q.npy\",\n \"q\": \"k.npy\"}", "call.json: line 2: q twice"),
        ("{\"param\": {\"beta\": 1,\n \"beta\": 2}}", "call.json: param: an option or a name in it twice"),
        ("{\"param\": {\"beta\": {\"x\": 2}}}", "call.json: param: expected a text, a number"),
        ("{\"scale\": {\"x\": 2}}", "call.json: scale: expected a text, a number"),
        ("{\"scale\": null}", "call.json: scale: expected a text"),
        ("{\"window\": \"5\"}", "expected LEFT,RIGHT, such as 4096,0"),
        ("{\"q\": ", "call.json: line 1: EOF while parsing"),
    ] {
        fs::write(folder.join("call.json"), json).unwrap();
        refused("call.json", text);
    }
}

#[test]
fn a_file_says_what_rows_without_keys_are() {
    let folder = TempDir::new().unwrap();
    let folder = folder.path();
    operands(folder);
    // Queries stand at -3 to 1: the first three of each of four heads see nothing.
    let whole = "q = 'q.npy'\nk = 'k.npy'\nv = 'v.npy'\nworkers = 2\ncausal = 'offset'\noffset = -3\n";
    let result = |empty_row: &str, said: &str| {
        fs::write(folder.join("call.toml"), format!("{whole}empty-row = '{empty_row}'\n")).unwrap();
        let ended = attend(folder, &["--request=call.toml", "-o", "context.npy"]);
        assert!(ended.status.success(), "{empty_row}: {}", stderr(&ended));
        let stdout = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(
            stdout.contains(&format!("12 rows see no key: their context is {said} and their lse -inf")),
            "{stdout}"
        );
        let bytes = fs::read(folder.join("context.npy")).unwrap();
        let values = bytes[bytes.len() - 2 * 2 * 5 * 8 * 4..].as_chunks().0.iter();
        values.map(|value| f32::from_le_bytes(*value)).collect::<Vec<f32>>()
    };
    let zero = result("zero", "0");
    let nan = result("nan", "NaN");
    let uniform = result("uniform", "the mean of the values");
    for (at, ((zero, nan), uniform)) in zero.iter().zip(&nan).zip(&uniform).enumerate() {
        if at / 8 % 5 < 3 {
            // Of 300 numbers between -1 and 1.
            assert!(*zero == 0.0 && nan.is_nan() && *uniform != 0.0 && uniform.abs() < 0.2, "element {at}");
        } else {
            assert_eq!((zero, zero), (nan, uniform), "element {at}");
        }
    }
    fs::write(folder.join("call.toml"), format!("{whole}empty-row = 'uniform'\nsigmoid = 0\n")).unwrap();
    let refused = attend(folder, &["--request=call.toml"]);
    assert!(stderr(&refused).contains("normaliser=sigmoid and empty_row=uniform"), "{}", stderr(&refused));
}
