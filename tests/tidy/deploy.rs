//! Deployment files agree with the program and with each other. Docker, Kubernetes and systemd themselves are asked
//! where they can answer offline; where they are missing, that is said aloud.

use serde_json::Value;

use super::command_line::{CommandLine, known_variables, variables};
use super::{TextFile, errors, expect_none, optional_tool, text_files};

const COMPOSE: &str = "deploy/compose.yaml";
const KUBERNETES: &str = "deploy/k8s/attnd.yaml";
const UNITS: [&str; 2] = ["attnd-coordinator.service", "attnd-worker.service"];

/// The documents of a YAML file, through Python, as Rust has no YAML here.
fn yaml(path: &str) -> Option<Vec<Value>> {
    let script = "import json, sys, yaml; json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let output = optional_tool(
        &format!("the structure of {path}"),
        "python3",
        &["-c", "import yaml"],
        &["-c", script, path],
    )?;
    assert!(output.status.success(), "{path}: {}", errors(&output));
    Some(serde_json::from_slice(&output.stdout).expect("json.dump writes JSON"))
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().map(|list| list.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

/// Ports of four digits that follow a colon, a `port:` or stand in EXPOSE, outside comments.
fn ports(text: &str) -> Vec<u16> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let numbers = code.flat_map(|line| line.split(|c: char| !c.is_ascii_digit()));
    numbers
        .filter(|digits| digits.len() == 4 && digits.starts_with("7"))
        .filter_map(|n| n.parse().ok())
        .collect()
}

#[test]
fn ports_are_the_programs_everywhere() {
    let coordinator = CommandLine::declared().coordinator_port;
    let worker = coordinator + 1;
    for file in text_files()
        .iter()
        .filter(|file| file.path.starts_with("deploy/") && file.name() != "Dockerfile.dockerignore")
    {
        let found = ports(&file.text);
        let role = |port| found.contains(&port);
        assert!(
            role(coordinator),
            "{} lacks the coordinator's default port {coordinator}: {found:?}",
            file.path
        );
        assert!(role(worker) || file.name() == UNITS[0], "{} lacks {worker}: {found:?}", file.path);
        let strangers: Vec<_> = found.iter().filter(|port| ![coordinator, worker].contains(port)).collect();
        assert!(strangers.is_empty(), "{} names other ports: {strangers:?}", file.path);
    }
}

#[test]
fn the_image_has_one_name_and_the_version_of_the_workspace() {
    let workspace = TextFile::read("Cargo.toml").text;
    let version =
        workspace.lines().find_map(|l| l.strip_prefix("version = ")).expect("a version").trim_matches('"');
    let image = format!("image: attnd:{version}");
    for path in [COMPOSE, KUBERNETES] {
        let file = TextFile::read(path);
        let others: Vec<String> = file
            .text
            .lines()
            .map(str::trim)
            .filter(|l| l.contains("image:") && *l != image)
            .map(str::to_owned)
            .collect();
        assert!(file.text.contains(&image), "{path} has no `{image}`");
        expect_none(&format!("{path}: other images than `{image}`"), &others);
    }
    assert!(TextFile::read("deploy/Dockerfile").text.contains(&format!("-t attnd:{version} ")));
}

#[test]
fn variables_are_ones_that_the_program_reads() {
    let known = known_variables();
    for file in text_files().iter().filter(|file| file.path.starts_with("deploy/")) {
        let code: String = file.text.lines().filter(|l| !l.contains("ATTND_COORDINATOR_...")).collect();
        for variable in variables(&code) {
            assert!(known.iter().any(|k| k == variable), "{}: nothing reads {variable}", file.path);
        }
    }
}

#[test]
fn the_image_runs_as_nobody_and_builds_what_is_locked() {
    let dockerfile = TextFile::read("deploy/Dockerfile").text;
    let user = dockerfile.lines().rfind(|line| line.starts_with("USER ")).expect("a user");
    assert!(user["USER ".len()..].split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)), "{user}");
    assert!(dockerfile.contains("cargo build --release --locked --package attnd"));
    let toolchain = TextFile::read("Cargo.toml").text;
    let rust = toolchain.lines().find_map(|l| l.strip_prefix("rust-version = ")).expect("a rust-version");
    assert!(
        dockerfile.contains(&format!("FROM rust:{}-", rust.trim_matches('"'))),
        "not the rust-version {rust}"
    );
}

#[test]
fn compose_runs_one_coordinator_and_three_workers() {
    let Some(documents) = yaml(COMPOSE) else { return };
    let attnd = CommandLine::declared();
    let services = documents[0]["services"].as_object().expect("services");
    let mut verbs = Vec::new();
    for (name, service) in services {
        let command = strings(&service["command"]);
        assert_eq!(attnd.complaint(&command), None, "{name}: {command:?}");
        verbs.extend(command.first().copied());
        assert!(service["healthcheck"]["test"].is_array(), "{name} has no health check");
        assert!(service["mem_limit"].is_string(), "{name} has no memory limit");
        if command.first() == Some(&"worker") {
            let own_url = format!("http://{name}:{}", attnd.coordinator_port + 1);
            assert!(command.contains(&own_url.as_str()), "{name} does not advertise {own_url}");
            // Each would take all cores of the one machine that they share.
            assert!(service["environment"]["ATTND_THREADS"].is_string(), "{name} has no number of threads");
        } else {
            let host_ports = strings(&service["ports"]);
            assert!(
                host_ports.iter().all(|p| p.starts_with("127.0.0.1:")),
                "open to the world: {host_ports:?}"
            );
        }
    }
    verbs.sort_unstable();
    assert_eq!(verbs, ["coordinator", "worker", "worker", "worker"]);
    let arguments = ["compose", "-f", COMPOSE, "config", "--quiet"];
    if let Some(output) =
        optional_tool("what docker says of the compose file", "docker", &["compose", "version"], &arguments)
    {
        assert!(output.status.success(), "docker compose config: {}", errors(&output));
    }
}

#[test]
fn kubernetes_parts_fit_together() {
    let Some(documents) = yaml(KUBERNETES) else { return };
    let attnd = CommandLine::declared();
    let of_kind = |kind: &str| documents.iter().filter(|d| d["kind"] == kind).collect::<Vec<_>>();
    let services = of_kind("Service");
    for (kind, verb, replicas) in [("Deployment", "coordinator", 1), ("StatefulSet", "worker", 3)] {
        let [workload] = of_kind(kind)[..] else { panic!("one {kind}") };
        let spec = &workload["spec"];
        let template = &spec["template"];
        let labels = &template["metadata"]["labels"];
        assert_eq!(spec["replicas"], replicas, "{kind}");
        assert_eq!(&spec["selector"]["matchLabels"], labels, "{kind} does not select its own pods");
        let service =
            services.iter().find(|s| &s["spec"]["selector"] == labels).expect("a service selects the pods");
        let container = &template["spec"]["containers"][0];
        let arguments = strings(&container["args"]);
        assert_eq!(arguments.first(), Some(&verb));
        assert_eq!(attnd.complaint(&arguments), None);
        let port = &container["ports"][0]["containerPort"];
        assert_eq!(&service["spec"]["ports"][0]["port"], port, "{kind}: service and container");
        assert_eq!(service["spec"]["ports"][0]["targetPort"], container["ports"][0]["name"]);
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            assert_eq!(&container[probe]["grpc"]["port"], port, "{kind}: {probe}");
        }
        assert_eq!(template["spec"]["securityContext"]["runAsNonRoot"], true);
        assert!(container["resources"]["limits"]["memory"].is_string(), "{kind} has no memory limit");
        if kind == "StatefulSet" {
            assert_eq!(spec["serviceName"], service["metadata"]["name"]);
            assert_eq!(service["spec"]["clusterIP"], "None", "the workers' service is headless");
            let host = format!(
                "--advertise=http://$(POD_NAME).{}:{port}",
                service["metadata"]["name"].as_str().expect("a name")
            );
            assert!(arguments.contains(&host.as_str()), "{arguments:?} lacks {host}");
        }
    }
}

#[test]
fn systemd_accepts_the_units() {
    let attnd = CommandLine::declared();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut paths = Vec::new();
    for name in UNITS {
        let unit = TextFile::read(&format!("deploy/systemd/{name}")).text;
        let start = unit
            .lines()
            .find_map(|l| l.strip_prefix("ExecStart=/usr/local/bin/attnd "))
            .expect("starts attnd");
        let words: Vec<&str> = start.split(' ').collect();
        assert_eq!(attnd.complaint(&words), None, "{name}");
        assert_eq!(words.first().map(|verb| format!("attnd-{verb}.service")).as_deref(), Some(name));
        for line in ["DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=always"] {
            assert!(unit.lines().any(|l| l == line), "{name} lacks {line}");
        }
        // With a limit, Restart=always gives up after five failures. Elsewhere than in [Unit] the line says nothing.
        let section = unit.split("\n[").next().unwrap_or_default();
        assert!(
            section.starts_with("[Unit]") && section.lines().any(|l| l == "StartLimitIntervalSec=0"),
            "{name} gives up when it has failed a few times"
        );
        // The program needn't be installed for its unit to be checked.
        let path = folder.path().join(name);
        std::fs::write(&path, unit.replace("=/usr/local/bin/attnd ", "=/bin/true "))
            .expect("the folder is writable");
        paths.push(path.to_string_lossy().into_owned());
    }
    let units = [paths[0].as_str(), paths[1].as_str()];
    let verify = [&["verify", "--man=no"][..], &units].concat();
    if let Some(output) =
        optional_tool("what systemd says of the units", "systemd-analyze", &["--version"], &verify)
    {
        // A value that systemd can't read is only warned of, so any word about these units is a complaint.
        let said = errors(&output);
        let complaints: Vec<String> = said
            .lines()
            .filter(|line| UNITS.iter().any(|unit| line.contains(unit)))
            .map(str::to_owned)
            .collect();
        expect_none("systemd-analyze verify", &complaints);
        assert!(output.status.success(), "systemd-analyze verify: {said}");
    }
}
