//! What is told beside the context, by real processes through the program, against weights computed here in f64.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const QUERIES: usize = 6;
/// More than a page.
const KEYS: usize = 300;
const DIM: usize = 8;
/// Far above what f32 loses here, far below what any mistake would make.
const TOLERANCE: f64 = 2e-5;

/// Queries, keys and what follows from them.
struct Case {
    folder: TempDir,
    q: Vec<f32>,
    k: Vec<f32>,
}

/// Numbers from -2 to 2, the same on every machine.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..n).map(|_| next()).collect()
}

fn write_npy(path: &Path, shape: [usize; 3], values: &[f32]) {
    let [a, b, c] = shape;
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({a}, {b}, {c}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    fs::write(path, bytes).unwrap();
}

impl Case {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let (q, k) = (numbers(1, HEADS * QUERIES * DIM), numbers(2, KV_HEADS * KEYS * DIM));
        let v = numbers(3, KV_HEADS * KEYS * DIM);
        write_npy(&folder.path().join("q.npy"), [HEADS, QUERIES, DIM], &q);
        write_npy(&folder.path().join("k.npy"), [KV_HEADS, KEYS, DIM], &k);
        write_npy(&folder.path().join("v.npy"), [KV_HEADS, KEYS, DIM], &v);
        let words: String = (0..KEYS).map(|key| format!("w{key}\n")).collect();
        fs::write(folder.path().join("words.txt"), words).unwrap();
        Self { folder, q, k }
    }

    /// The program over these files, without what the surroundings have set.
    fn run(&self, words: &str) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("ATTND_") {
                command.env_remove(key);
            }
        }
        let output = command.current_dir(self.folder.path()).args(words.split_whitespace()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    fn json(&self, words: &str) -> Value {
        let (code, stdout, stderr) = self.run(words);
        assert_eq!(code, Some(0), "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    }

    /// Scores of a row, in f64.
    fn scores(&self, head: usize, query: usize) -> Vec<f64> {
        let q = &self.q[(head * QUERIES + query) * DIM..][..DIM];
        let group = head / (HEADS / KV_HEADS);
        let keys = self.k[group * KEYS * DIM..][..KEYS * DIM].chunks(DIM);
        let dot = |k: &[f32]| q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        keys.map(|k| dot(k) / (DIM as f64).sqrt()).collect()
    }

    /// Weights of a row over the keys that it sees, in f64.
    fn weights(&self, head: usize, query: usize, visible: Range<usize>) -> Vec<f64> {
        let scores = self.scores(head, query);
        let largest = scores[visible.clone()].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exp = |key: usize| if visible.contains(&key) { (scores[key] - largest).exp() } else { 0.0 };
        let exps: Vec<f64> = (0..KEYS).map(exp).collect();
        let sum: f64 = exps.iter().sum();
        exps.into_iter().map(|exp| exp / sum).collect()
    }
}

/// What a query sees under the causal rule: all keys up to its own.
fn causal(query: usize) -> Range<usize> {
    0..KEYS - QUERIES + query + 1
}

fn entropy(weights: &[f64]) -> f64 {
    weights.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum()
}

fn distance(weights: &[f64], query: usize) -> f64 {
    let position = KEYS - QUERIES + query;
    weights.iter().enumerate().map(|(key, p)| p * position.abs_diff(key) as f64).sum()
}

/// Keys by falling weight.
fn ranked(weights: &[f64]) -> Vec<usize> {
    let mut keys: Vec<usize> = (0..weights.len()).collect();
    keys.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    keys
}

fn close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= TOLERANCE * want.abs().max(1.0), "{what}: {got}, not {want}");
}

/// An f32 array of a file: its shape and values.
fn array(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f64>) {
    let view = file.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view.data().as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
    (view.shape().to_vec(), values.collect())
}

#[test]
fn every_output_is_in_the_file_and_is_what_f64_says() {
    let case = Case::new();
    let report = case.json(
        "attend --workers 2 --use-workers 2 --q q.npy --k k.npy --v v.npy --causal --top-k 5 --mass-block 100 \
         --entropy --distance --max-score --heatmap 3,4 --stage weights --stage masked \
         --rectangle raw:1-2:last:250-299 --output-heads 1-3 -o out.safetensors --json",
    );
    let bytes = fs::read(case.folder.path().join("out.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let expected = "context distance entropy heat lse masked mass max_score rectangle.0 top_keys top_scores top_weights weights";
    assert_eq!(names, expected.split(' ').collect::<Vec<_>>());
    let listed = report["outputs"].as_array().unwrap();
    assert_eq!(listed.len(), 11);
    assert_eq!(listed[0], serde_json::json!({ "name": "top_keys", "shape": [3, 6, 5], "dtype": "i64" }));

    let shapes = [
        ("top_weights", vec![3, 6, 5]),
        ("mass", vec![3, 6, 3]),
        ("entropy", vec![3, 6]),
        ("heat", vec![3, 3, 4]),
        ("weights", vec![3, 6, 300]),
        ("rectangle.0", vec![2, 1, 50]),
    ];
    for (name, shape) in shapes {
        assert_eq!(array(&file, name).0, shape, "{name}");
    }
    let of = |name| array(&file, name).1;
    let (top_weights, top_scores) = (of("top_weights"), of("top_scores"));
    let (mass, entropies, distances, max_scores) =
        (of("mass"), of("entropy"), of("distance"), of("max_score"));
    let (weights, masked, raw, heat) = (of("weights"), of("masked"), of("rectangle.0"), of("heat"));
    let top_keys = file.tensor("top_keys").unwrap();
    assert_eq!(top_keys.dtype(), Dtype::I64);
    let top_keys: Vec<i64> =
        top_keys.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let mut map = vec![0.0; 3 * 3 * 4];
    for head in 1..4 {
        for query in 0..QUERIES {
            let row = (head - 1) * QUERIES + query;
            let what = format!("head {head} query {query}");
            let (p, s) = (case.weights(head, query, causal(query)), case.scores(head, query));
            for (i, key) in ranked(&p).into_iter().take(5).enumerate() {
                assert_eq!(top_keys[row * 5 + i], key as i64, "{what}, place {i}");
                close(top_weights[row * 5 + i], p[key], &what);
                close(top_scores[row * 5 + i], s[key], &what);
            }
            for (block, got) in mass[row * 3..][..3].iter().enumerate() {
                close(*got, p[block * 100..][..100].iter().sum(), &what);
            }
            close(entropies[row], entropy(&p), &what);
            close(distances[row], distance(&p, query), &what);
            close(max_scores[row], s[ranked(&p)[0]], &what);
            for key in 0..KEYS {
                close(weights[row * KEYS + key], p[key], &what);
                let score = masked[row * KEYS + key];
                if causal(query).contains(&key) {
                    close(score, s[key], &what);
                } else {
                    assert_eq!(score, f64::NEG_INFINITY, "{what} key {key}");
                }
                map[((head - 1) * 3 + query / 2) * 4 + key / 75] += p[key] / 2.0;
            }
            if head < 3 && query == QUERIES - 1 {
                for (i, got) in raw[(head - 1) * 50..][..50].iter().enumerate() {
                    close(*got, s[250 + i], &what);
                }
            }
        }
    }
    for (i, (got, want)) in heat.iter().zip(map).enumerate() {
        close(*got, want, &format!("cell {i}"));
    }
}

/// A key of the answer: its place, word and weight.
fn key(value: &Value) -> (usize, &str, f64) {
    let place = usize::try_from(value["key"].as_u64().unwrap()).unwrap();
    (place, value["token"].as_str().unwrap(), value["weight"].as_f64().unwrap())
}

#[test]
fn explain_tells_what_chosen_queries_attend_to_and_draws_all() {
    let case = Case::new();
    let view = case.json(
        "explain --workers 2 --q q.npy --k k.npy --causal --tokens words.txt --query 3-4 --head 2 --top-k 7 \
         --heatmap map.png --heatmap-size 100 --json",
    );
    assert_eq!(
        (&view["n_queries"], &view["n_keys"], &view["queries"]),
        (&6.into(), &300.into(), &[3, 5][..].into())
    );
    let attention = view["attention"].as_array().unwrap();
    assert_eq!((attention.len(), &attention[0]["head"]), (1, &2.into()));
    let queries = attention[0]["queries"].as_array().unwrap();
    assert_eq!(queries.len(), 2);
    let mut entropies = Vec::new();
    let (mut distances, mut firsts, mut largest) = (0.0, 0.0, f64::NEG_INFINITY);
    for (answer, query) in queries.iter().zip([3, 4]) {
        assert_eq!((&answer["query"], &answer["position"]), (&query.into(), &(294 + query).into()));
        assert_eq!(answer["token"], format!("w{}", 294 + query));
        let p = case.weights(2, query, causal(query));
        let keys = answer["keys"].as_array().unwrap();
        assert_eq!(keys.len(), 7);
        for (got, expected) in keys.iter().zip(ranked(&p)) {
            let (place, word, weight) = key(got);
            assert_eq!((place, word), (expected, format!("w{expected}").as_str()), "query {query}");
            close(weight, p[expected], "weight");
            close(got["score"].as_f64().unwrap(), case.scores(2, query)[expected], "score");
        }
        entropies.push(entropy(&p));
        distances += distance(&p, query) / 2.0;
        firsts += p[0] / 2.0;
        largest = largest.max(case.scores(2, query)[ranked(&p)[0]]);
    }
    let heads = view["heads"].as_array().unwrap();
    assert_eq!((heads.len(), &heads[0]["head"]), (1, &2.into()));
    let number = |name: &str| heads[0][name].as_f64().unwrap();
    close(number("entropy"), entropies.iter().sum::<f64>() / 2.0, "entropy");
    close(number("effective_keys"), entropies.iter().map(|nats| nats.exp()).sum::<f64>() / 2.0, "keys");
    close(number("distance"), distances, "distance");
    close(number("first_key"), firsts, "first key");
    close(number("max_score"), largest, "max score");

    // The map is of all queries: 6 rows of 85 pixels, and 100 columns of 3 keys and 5 pixels.
    let cell = |row: usize, column: usize| -> f64 {
        case.weights(2, row, causal(row))[3 * column..][..3].iter().sum()
    };
    let cells = || (0..6).flat_map(|row| (0..100).map(move |column| (row, column)));
    let heaviest = cells().max_by(|a, b| cell(a.0, a.1).total_cmp(&cell(b.0, b.1))).unwrap();
    let heatmap = &view["heatmap"];
    assert_eq!((&heatmap["rows"], &heatmap["columns"]), (&6.into(), &100.into()));
    close(heatmap["largest"].as_f64().unwrap(), cell(heaviest.0, heaviest.1), "largest");
    let bytes = fs::read(case.folder.path().join("map.png")).unwrap();
    let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::EXPAND);
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height), (500 + 32, 510 + 60));
    let grey = |(row, column): (usize, usize)| {
        let at = ((16 + row * 85 + 40) * 532 + 16 + column * 5 + 2) * 3;
        pixels[at..at + 3].iter().map(|channel| u32::from(*channel)).sum::<u32>()
    };
    // The more a cell weighs, the darker it is; cells that weigh almost the same may have one colour.
    let mut by_weight: Vec<_> = cells().map(|at| (cell(at.0, at.1), grey(at))).collect();
    by_weight.sort_by(|a, b| a.0.total_cmp(&b.0));
    for pair in by_weight.windows(2) {
        assert!(pair[0].1 >= pair[1].1 || pair[1].0 - pair[0].0 < 1e-6, "{pair:?}");
    }
    let colours = by_weight.chunk_by(|a, b| a.1 == b.1).count();
    assert!(colours > 10 && grey(heaviest) < 300, "{colours} colours");
}

#[test]
fn explain_takes_means_over_heads_and_minds_padding() {
    let case = Case::new();
    // The last query, keys 20 to 279, and nobody says where queries stand.
    let view =
        case.json("explain --workers 2 --q q.npy --k k.npy --key-begin 20 --key-end 280 --top-k 4 --json");
    let visible = 20..280;
    let rows: Vec<Vec<f64>> = (0..HEADS).map(|head| case.weights(head, 5, visible.clone())).collect();
    let mean: Vec<f64> =
        (0..KEYS).map(|key| rows.iter().map(|row| row[key]).sum::<f64>() / HEADS as f64).collect();
    let attention = &view["attention"][0];
    assert!(attention["head"].is_null() && attention["queries"][0]["position"].is_null());
    let keys = attention["queries"][0]["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 4);
    for (got, expected) in keys.iter().zip(ranked(&mean)) {
        assert_eq!(got["key"], expected);
        close(got["weight"].as_f64().unwrap(), mean[expected], "mean weight");
        let by_head: Vec<f64> = rows.iter().map(|row| row[expected]).collect();
        assert_eq!(got["strongest"]["head"], ranked(&by_head)[0]);
    }
    assert_eq!(view["normaliser"], "softmax");
    let heads = view["heads"].as_array().unwrap();
    assert_eq!(heads.len(), HEADS);
    for (head, row) in heads.iter().zip(&rows) {
        close(head["first_key"].as_f64().unwrap(), row[20], "first key");
        close(head["entropy"].as_f64().unwrap(), entropy(row), "entropy");
        assert!(head["distance"].is_null());
    }

    // A table for a person has the same: the heaviest key first.
    let (code, stdout, stderr) = case.run(
        "explain --workers 2 --q q.npy --k k.npy --causal --tokens words.txt --query all --head all --top-k 1 \
         --heatmap maps.svg",
    );
    assert_eq!(code, Some(0), "{stderr}");
    for head in 0..HEADS {
        let title = format!("What all 6 queries attend to among 300 keys, head {head}:");
        let table = stdout.split(&title).nth(1).unwrap_or_else(|| panic!("no {title} in {stdout}"));
        let first = ranked(&case.weights(head, 0, causal(0)))[0];
        let row = table.lines().nth(4).unwrap();
        assert!(row.contains("0 w294") && row.contains(&format!("w{first} ")), "{row} and not w{first}");
    }
    assert!(
        stdout.contains("Heads, over all 6 queries:") && stdout.contains("wrote maps.svg: 6 x 300 cells")
    );
    let svg = fs::read_to_string(case.folder.path().join("maps.svg")).unwrap();
    assert_eq!(svg.matches("<g class=\"cells\"").count(), HEADS);
}

#[test]
fn explain_tells_sums_instead_of_entropies_of_sigmoids() {
    let case = Case::new();
    let sigmoid = |score: f64| 1.0 / (1.0 + (1.5 - score).exp());
    let weights = |head: usize, query: usize| -> Vec<f64> {
        let seen =
            |(key, score): (usize, &f64)| if causal(query).contains(&key) { sigmoid(*score) } else { 0.0 };
        case.scores(head, query).iter().enumerate().map(seen).collect()
    };
    let words =
        "explain --workers 2 --q q.npy --k k.npy --causal --sigmoid -1.5 --query 3-4 --tokens words.txt";
    let view = case.json(&format!("{words} --head 2 --top-k 7 --heatmap map.svg --heatmap-size 100 --json"));
    assert_eq!(view["normaliser"], "sigmoid");
    let rows: Vec<Vec<f64>> = [3, 4].iter().map(|query| weights(2, *query)).collect();
    for (answer, row) in view["attention"][0]["queries"].as_array().unwrap().iter().zip(&rows) {
        let keys = answer["keys"].as_array().unwrap();
        assert_eq!(keys.len(), 7);
        for (got, expected) in keys.iter().zip(ranked(row)) {
            assert_eq!(got["key"], expected);
            close(got["weight"].as_f64().unwrap(), row[expected], "weight");
        }
    }
    let head = &view["heads"][0];
    let sums: Vec<f64> = rows.iter().map(|row| row.iter().sum()).collect();
    // Nothing that a share would be taken for.
    assert!(sums.iter().all(|sum| *sum > 20.0), "{sums:?}");
    close(head["weight_sum"].as_f64().unwrap(), f64::midpoint(sums[0], sums[1]), "weight sum");
    assert!(head["entropy"].is_null() && head["effective_keys"].is_null());
    let means: Vec<f64> =
        rows.iter().zip([3, 4]).zip(&sums).map(|((row, query), sum)| distance(row, query) / sum).collect();
    close(head["distance"].as_f64().unwrap(), f64::midpoint(means[0], means[1]), "distance");
    close(head["first_key"].as_f64().unwrap(), f64::midpoint(rows[0][0], rows[1][0]), "first key");
    let cell = |row: usize, column: usize| weights(2, row)[3 * column..][..3].iter().sum::<f64>();
    let cells = (0..6).flat_map(|row| (0..100).map(move |column| (row, column)));
    let largest = cells.map(|(row, column)| cell(row, column)).fold(0.0, f64::max);
    // Of three keys, whose weights are shares of nothing.
    assert!(largest > 1.0, "{largest}");
    close(view["heatmap"]["largest"].as_f64().unwrap(), largest, "largest");
    let svg = fs::read_to_string(case.folder.path().join("map.svg")).unwrap();
    assert!(svg.contains(&format!("at most {largest:.3}<")) && !svg.contains(" %<"), "{largest}");

    let (code, stdout, stderr) = case.run(&format!("{words} --head mean"));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stdout.contains("weight sum") && !stdout.contains("entropy ") && !stdout.contains('%'),
        "{stdout}"
    );
    assert!(
        stdout.contains("a row of them sums to its weight sum, not to 1, and has no entropy"),
        "{stdout}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_code_2() {
    let case = Case::new();
    fs::write(case.folder.path().join("two.txt"), "a\nb\n").unwrap();
    let attend = "attend --workers 1 --q q.npy --k k.npy --v v.npy";
    let explain = "explain --workers 1 --q q.npy --k k.npy";
    for (words, reason) in [
        (format!("{attend} --top-k 3 -o out.npy"), ".npy holds the context only"),
        (format!("{attend} --heatmap 7,3"), "outputs.heat_rows is 7, not 1 to 6"),
        (format!("{attend} --distance"), "q_len 6, kv_len 300 can be aligned two ways"),
        (
            format!("{attend} --rectangle weights:0-4:0:0"),
            "outputs.rectangles.heads is 0..5, not inside 0..4",
        ),
        (format!("{explain} --query 4-6"), "--query 4..7: there are 6 queries"),
        (format!("{explain} --head 4"), "--head 4..5: there are 4 heads"),
        (format!("{explain} --batch 1"), "--batch 1..2: there are 1 elements of the batch"),
        (format!("{explain} --tokens two.txt"), "--tokens has 2 tokens, and there are 300 keys"),
        (format!("{explain} --tokens no.txt"), "--tokens no.txt: "),
        (format!("{explain} --causal --offset 3"), "write --causal=offset"),
        (format!("{explain} --heatmap no/such.png"), "there is no directory no"),
    ] {
        let (code, _, stderr) = case.run(&words);
        assert_eq!(code, Some(2), "{words}: {stderr}");
        assert!(stderr.contains(reason) && stderr.lines().count() == 1, "{words}: {stderr}");
    }
    assert!(!case.folder.path().join("out.npy").exists());
}
