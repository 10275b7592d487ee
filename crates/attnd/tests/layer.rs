//! `attnd layer` over layers that torch and transformers computed: from its file to a file, and what it says about tensors that it can't use.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::SafeTensors;
use tempfile::TempDir;

/// The case with 600 keys, of which 598 are no padding, and weights averaged over 6 heads.
const CASE: &str = "64";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/torch_layers.safetensors")
}

fn attnd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("ATTND_")) {
        command.env_remove(key);
    }
    command
}

fn layer(prefix: &str, heads: &str, extra: &[&str]) -> Output {
    let mut command = attnd();
    let file = fixtures();
    let tensor = |name: &str| format!("{}:{CASE}.{name}", file.display());
    command.args(["layer", "--heads", heads, "--state"]).arg(&file).args(["--prefix", prefix]);
    command.args(["--query", &tensor("query"), "--key", &tensor("key"), "--value", &tensor("value")]);
    command.args(extra).output().unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = file.tensor(name).unwrap();
    let values = tensor.data().as_chunks().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
    (tensor.shape().to_vec(), values)
}

#[test]
fn output_and_weights_of_torchs_layer_come_out_of_its_state_dict() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("y.safetensors");
    let extra = ["--workers", "2", "--key-end", "598", "--weights", "--json", "-o", path.to_str().unwrap()];
    let said = layer("64.state", "6", &extra);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(report["weights_shape"], serde_json::json!([1, 3, 600]));
    let text = report["projections"]["text"].as_str().unwrap();
    assert!(
        text.contains("predicted to be faster; on the client: ") && text.contains("; on the workers: "),
        "{text}"
    );

    let (theirs, ours) = (std::fs::read(fixtures()).unwrap(), std::fs::read(path).unwrap());
    assert_near(&ours, &theirs, CASE);
}

/// Sums of some 30 terms of magnitude 10 at most, each rounded to 6e-8 of that; the bound proper is that of tests/layers.rs.
fn assert_near(ours: &[u8], theirs: &[u8], case: &str) {
    let [theirs, ours] = [theirs, ours].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    for (name, tolerance) in [("output", 3e-5), ("weights", 2e-6)] {
        let (shape, got) = floats(&ours, name);
        let (wanted_shape, wanted) = floats(&theirs, &format!("{case}.{name}"));
        assert_eq!(shape, wanted_shape, "{name}");
        for (at, (got, wanted)) in got.iter().zip(&wanted).enumerate() {
            assert!((got - wanted).abs() <= tolerance, "{name}[{at}]: {got}, {wanted} in the file");
        }
    }
}

/// Four queries behind 596 keys, as transformers computed them with a cache.
#[test]
fn latent_attention_comes_out_of_deepseeks_state_dict() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("y.safetensors");
    let file = fixtures().with_file_name("latent_layers.safetensors");
    let (state, path_text) = (file.to_str().unwrap(), path.to_str().unwrap());
    let (query, key) = (format!("{state}:03.query"), format!("{state}:03.key"));
    let words = ["layer", "--state", state, "--prefix", "03.state", "--heads", "3", "--query", &query];
    let key = ["--key", &key];
    let run = |extra: &[&str]| attnd().args(words).args(key).args(extra).output().unwrap();
    let rotary = ["--rope=interleaved", "--rope-position", "596", "--causal"];
    let there = ["--workers", "2", "--weights=per-head", "--json", "-o", path_text];
    let said = run(&[&rotary[..], &there[..]].concat());
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let why = report["projections"]["text"].as_str().unwrap();
    assert!(why.contains("workers can't (rope") && report["projections"]["place"] == "the client", "{why}");
    // 600 keys of one head, of 10 + 4 elements; no values.
    let of_shares = report["plan"]["shares"].as_array().unwrap().iter();
    assert_eq!(of_shares.map(|share| share["kv_bytes"].as_u64().unwrap()).sum::<u64>(), 600 * 14 * 4);
    assert_near(&std::fs::read(path).unwrap(), &std::fs::read(&file).unwrap(), "03");

    let refused = |extra: &[&str], reason: &str| {
        let said = run(&[&["--endpoint", "http://127.0.0.1:9"], extra].concat());
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.code() == Some(2) && text.contains(reason), "{extra:?}: {text}");
    };
    refused(&["--kv-heads", "1"], "latent attention makes keys and values for each of its 3 heads");
    refused(&["--value", &query], "latent attention and rows of values: its values are parts of its keys");
    refused(&["--rope", "--rope-dims", "6"], "6 elements from 0 on, the rotary part of a head has 4");
    let without_prefix = ["layer", "--endpoint", "http://127.0.0.1:9", "--state", state, "--heads", "3"];
    let said = attnd().args(without_prefix).args(["--norm-eps", "1e-6", "--query", &query]).output().unwrap();
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(2) && text.contains("no tensor for queries; looked for"), "{text}");
    let other = layer("64.state", "6", &["--endpoint", "http://127.0.0.1:9", "--norm-eps", "1e-5"]);
    let text = String::from_utf8_lossy(&other.stderr).into_owned();
    assert!(other.status.code() == Some(2) && text.contains("has no latent attention"), "{text}");
}

#[test]
fn keys_have_the_same_bits_wherever_they_are_projected() {
    let folder = TempDir::new().unwrap();
    let said = |project: &str| {
        let path = folder.path().join(format!("{project}.safetensors"));
        let extra =
            ["--workers", "2", "--use-workers", "2", "--weights=per-head", "--json", "--project", project];
        let said = layer("64.state", "6", &[&extra[..], &["-o", path.to_str().unwrap()]].concat());
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        (report["projections"].clone(), std::fs::read(path).unwrap())
    };
    let [client, workers, auto] = ["client", "workers", "auto"].map(said);
    assert!(client.1 == workers.1 && workers.1 == auto.1, "files differ");
    assert_eq!((&client.0["place"], &workers.0["place"]), (&"the client".into(), &"the workers".into()));
    let seconds = |place: &str| auto.0[place]["seconds"].as_f64().unwrap();
    let faster = if seconds("workers") < seconds("client") { "the workers" } else { "the client" };
    assert_eq!(auto.0["place"], faster);
    // Three rows of queries of 24; 600 keys and values of 24, of rows of 4 and 3; matrices of 24 by these, with biases.
    let bytes = |place: &str| auto.0[place]["client_bytes"].as_u64().unwrap();
    let (queries, biases) = (3 * 24 * 4, 2 * 24 * 4);
    assert_eq!(bytes("client"), queries + 2 * 600 * 24 * 4);
    assert_eq!(bytes("workers"), queries + (600 + 24) * 7 * 4 + biases);
}

#[test]
fn what_makes_no_layer_is_refused_by_name_before_anything_starts() {
    let refused_of = |prefix: &str, heads: &str, extra: &[&str]| {
        let said = layer(prefix, heads, extra);
        assert_eq!(said.status.code(), Some(2), "{extra:?}");
        String::from_utf8_lossy(&said.stderr).into_owned()
    };
    let refused = |heads: &str, extra: &[&str]| refused_of("64.state.", heads, extra);
    let somewhere = ["--endpoint", "http://127.0.0.1:9"];
    let file = fixtures();
    let path = file.to_str().unwrap();
    let with = |extra: &[&'static str]| [&somewhere[..], extra].concat();
    let heads = refused("7", &with(&[]));
    assert!(heads.contains("q_proj_weight is [24, 24], expected outputs for 7 heads"), "{heads}");
    let kv_heads = refused("6", &with(&["--kv-heads", "3"]));
    assert!(
        kv_heads.contains("k_proj_weight is [24, 4], expected 12 outputs: 3 kv heads of 4"),
        "{kv_heads}"
    );
    let rope = refused("6", &with(&["--rope", "--rope-dims", "6"]));
    assert!(rope.contains("6 elements from 0 on, rows of a head have 4"), "{rope}");
    let prefix = refused_of("64.stat", "6", &with(&[]));
    assert!(prefix.contains("no tensor named '64.stat...'; the file has"), "{prefix}");
    let whole_case = refused_of(CASE, "6", &with(&[]));
    assert!(whole_case.contains("no tensor for queries; looked for in_proj_weight"), "{whole_case}");
    let project = refused("6", &with(&["--rope", "--project", "workers"]));
    assert!(project.contains("project=workers and rope: keys turn after they are projected"), "{project}");
    let output = refused("6", &[&somewhere[..], &["-o", path]].concat());
    assert!(output.contains("which it would replace"), "{output}");
    assert!(refused("6", &[]).contains("where to compute?"));
}
