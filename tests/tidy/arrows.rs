//! Which crate may depend on which: `py -> attnd -> client, node -> wire -> plan -> kernel`, and who may see what from outside.

use std::process::Command;

use serde_json::Value;

use super::{TextFile, expect_none, root};

/// Each crate and the crates of the project that it may use.
const ARROWS: &[(&str, &[&str])] = &[
    ("attnd-kernel", &[]),
    ("attnd-plan", &["attnd-kernel"]),
    ("attnd-wire", &["attnd-plan", "attnd-kernel"]),
    ("attnd-node", &["attnd-wire", "attnd-plan", "attnd-kernel"]),
    ("attnd-client", &["attnd-wire", "attnd-plan", "attnd-kernel"]),
    ("attnd", &["attnd-client", "attnd-node", "attnd-wire", "attnd-plan", "attnd-kernel"]),
    ("attnd-py", &["attnd", "attnd-client", "attnd-node", "attnd-wire", "attnd-plan", "attnd-kernel"]),
    ("attnd-tests", &["attnd-client", "attnd-node", "attnd-wire", "attnd-plan", "attnd-kernel"]),
    ("xtask", &[]),
];

/// Outside crates, by the beginning of their name, and who may use them. The test crate may use anything.
const OUTSIDE: &[(&str, &[&str])] = &[
    ("tonic-prost", &["attnd-wire"]),
    ("tonic", &["attnd-wire", "attnd-node", "attnd-client"]),
    ("prost", &["attnd-wire"]),
    ("protox", &["attnd-wire"]),
    ("tokio", &["attnd-wire", "attnd-node", "attnd-client", "attnd", "attnd-py"]),
    ("futures", &["attnd-wire", "attnd-node", "attnd-client", "attnd"]),
    ("kameo", &["attnd-node"]),
    ("redb", &["attnd-node"]),
    ("rayon", &["attnd-kernel", "attnd-node", "attnd", "attnd-py"]),
    ("pyo3", &["attnd-py"]),
    ("numpy", &["attnd-py"]),
    ("core_affinity", &["attnd"]),
    ("tracing", &["attnd-wire", "attnd-node", "attnd-client", "attnd"]),
    ("clap", &["attnd"]),
    ("anyhow", &["attnd"]),
];

struct Package {
    name: String,
    folder: String,
    dependencies: Vec<String>,
}

fn packages() -> Vec<Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--no-deps", "--offline", "--locked", "--format-version", "1"];
    let output = Command::new(cargo).args(arguments).current_dir(root()).output().expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let package = |package: &Value| {
        let manifest = text(&package["manifest_path"]).replace('\\', "/");
        Package {
            name: text(&package["name"]),
            folder: manifest.rsplit('/').nth(1).expect("a manifest lies in a folder").to_owned(),
            // Development and build dependencies count too: what a test may reach is soon reached.
            dependencies: package["dependencies"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|d| text(&d["name"]))
                .collect(),
        }
    };
    metadata["packages"].as_array().expect("a list").iter().map(package).collect()
}

#[test]
fn crates_depend_along_the_arrows_only() {
    let packages = packages();
    let ours: Vec<&str> = packages.iter().map(|p| p.name.as_str()).collect();
    let mut complaints = Vec::new();
    for package in &packages {
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
            complaints.push(format!("{} has no line in tests/tidy/arrows.rs", package.name));
            continue;
        };
        let used = package.dependencies.iter().filter(|d| ours.contains(&d.as_str()));
        let forbidden = used.filter(|d| !allowed.contains(&d.as_str()));
        complaints.extend(forbidden.map(|d| format!("{} -> {d}", package.name)));
    }
    complaints.extend(
        ARROWS.iter().filter(|(name, _)| !ours.contains(name)).map(|(name, _)| format!("{name} is gone")),
    );
    expect_none("dependencies against the arrows", &complaints);
}

#[test]
fn outside_crates_are_seen_only_where_they_belong() {
    let mut complaints = Vec::new();
    for package in packages().iter().filter(|p| p.name != "attnd-tests") {
        for dependency in &package.dependencies {
            let belongs =
                |prefix: &str| dependency == prefix || dependency.starts_with(&format!("{prefix}-"));
            let rule = OUTSIDE.iter().find(|(prefix, _)| belongs(prefix));
            if rule.is_some_and(|(_, allowed)| !allowed.contains(&package.name.as_str())) {
                complaints.push(format!("{} -> {dependency}", package.name));
            }
        }
    }
    expect_none("outside crates where they don't belong", &complaints);
}

#[test]
fn crates_are_where_their_names_say_and_share_the_lints() {
    for Package { name, folder, .. } in packages() {
        let path = if name == "attnd-tests" { "tests".to_owned() } else { format!("crates/{name}") };
        assert_eq!(path.rsplit('/').next(), Some(folder.as_str()), "folder of {name}");
        let manifest = TextFile::read(&format!("{path}/Cargo.toml")).text;
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{path} does not share the workspace's lints"
        );
    }
}
