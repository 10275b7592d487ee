//! Score functions, tables of biases, blocks and documents by real processes through the program, against contexts and weights computed
//! here in f64.

#![allow(clippy::unwrap_used)]

use std::fs;

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use self::archive::{f32s, i32s, npy, numbers, run};

mod archive;

/// A port that nobody listens on: a call that gets this far fails with code 1.
const NOBODY: &str = "--endpoint http://127.0.0.1:9";
/// Far above what f32 loses here, far below what any mistake would make.
const TOLERANCE: f64 = 2e-5;

fn f64s(shape: &[usize], values: &[f32]) -> Vec<u8> {
    npy("<f8", shape, values.iter().map(|value| f64::from(*value).to_le_bytes().to_vec()))
}

fn i64s(shape: &[usize], values: &[i64]) -> Vec<u8> {
    npy("<i8", shape, values.iter().map(|value| value.to_le_bytes().to_vec()))
}

/// The operands of a call, and a folder with an archive of them and of what else is needed.
struct Case {
    folder: TempDir,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    query_dim: usize,
    key_dim: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Where a score stands: of which batch element, query head, query and key.
#[derive(Clone, Copy)]
struct At {
    batch: usize,
    head: usize,
    query: usize,
    key: usize,
}

const VALUE_DIM: usize = 5;

impl Case {
    fn new(
        [batch, heads, kv_heads, queries, keys, query_dim, key_dim]: [usize; 7],
        more: &[(&str, Vec<u8>)],
    ) -> Self {
        let q = numbers(1, batch * heads * queries * query_dim);
        let k = numbers(2, batch * kv_heads * keys * key_dim);
        let v = numbers(3, batch * kv_heads * keys * VALUE_DIM);
        let folder = TempDir::new().unwrap();
        let operands = [
            ("q", f32s(&[batch, heads, queries, query_dim], &q)),
            ("k", f32s(&[batch, kv_heads, keys, key_dim], &k)),
            ("v", f32s(&[batch, kv_heads, keys, VALUE_DIM], &v)),
        ];
        archive::write(folder.path(), operands.iter().chain(more));
        Self { folder, batch, heads, kv_heads, queries, keys, query_dim, key_dim, q, k, v }
    }

    fn query(&self, At { batch, head, query, .. }: At) -> &[f32] {
        &self.q[((batch * self.heads + head) * self.queries + query) * self.query_dim..][..self.query_dim]
    }

    fn kv_head(&self, at: At) -> usize {
        at.batch * self.kv_heads + at.head / (self.heads / self.kv_heads)
    }

    fn key(&self, at: At) -> &[f32] {
        &self.k[(self.kv_head(at) * self.keys + at.key) * self.key_dim..][..self.key_dim]
    }

    /// `q . k / sqrt(dim)`.
    fn scaled_dot(&self, at: At) -> f64 {
        dot(self.query(at), self.key(at)) / (self.key_dim as f64).sqrt()
    }

    /// Weights of a row by scores, of which a hidden key has none.
    fn weights(
        &self,
        batch: usize,
        head: usize,
        query: usize,
        score: &dyn Fn(At) -> Option<f64>,
    ) -> Vec<f64> {
        let scores: Vec<Option<f64>> =
            (0..self.keys).map(|key| score(At { batch, head, query, key })).collect();
        let most = scores.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
        let exps: Vec<f64> = scores.iter().map(|score| score.map_or(0.0, |s| (s - most).exp())).collect();
        let sum: f64 = exps.iter().sum();
        exps.into_iter().map(|exp| if sum > 0.0 { exp / sum } else { 0.0 }).collect()
    }

    /// Context of all rows, `[batch, heads, queries, value_dim]`.
    fn context(&self, score: &dyn Fn(At) -> Option<f64>) -> Vec<f64> {
        let mut context = Vec::new();
        for batch in 0..self.batch {
            for head in 0..self.heads {
                for query in 0..self.queries {
                    let weights = self.weights(batch, head, query, score);
                    let values =
                        &self.v[self.kv_head(At { batch, head, query, key: 0 }) * self.keys * VALUE_DIM..];
                    for x in 0..VALUE_DIM {
                        let terms = weights.iter().enumerate();
                        context.push(terms.map(|(key, p)| p * f64::from(values[key * VALUE_DIM + x])).sum());
                    }
                }
            }
        }
        context
    }

    /// The program in this folder, without what the surroundings have set.
    fn run(&self, words: &str) -> (Option<i32>, String, String) {
        run(self.folder.path(), words)
    }

    /// The bytes of what `attend` with these flags writes.
    fn attend(&self, words: &str) -> Vec<u8> {
        let call = "--q x.npz:q --k x.npz:k --v x.npz:v -o out.safetensors";
        let (code, _, stderr) = self.run(&format!("attend {call} {words}"));
        assert_eq!(code, Some(0), "{words}: {stderr}");
        fs::read(self.folder.path().join("out.safetensors")).unwrap()
    }

    /// Holds a context by one worker, and by two, against scores.
    fn check(&self, words: &str, score: &dyn Fn(At) -> Option<f64>) {
        let two = self.attend(&format!("--workers 2 --use-workers 2 {words}"));
        let file = SafeTensors::deserialize(&two).unwrap();
        let view = file.tensor("context").unwrap();
        let context = view.data().as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
        let wanted = self.context(score);
        assert_eq!(context.len(), wanted.len());
        for (i, (got, want)) in context.zip(wanted).enumerate() {
            assert!((got - want).abs() <= TOLERANCE, "{words}, element {i}: {got}, not {want}");
        }
        assert!(two == self.attend(&format!("--workers 1 {words}")), "{words}: other bits by one worker");
    }

    /// Holds what `explain` lists of all heads, for queries of batch element 1, against scores.
    fn check_explained(&self, words: &str, query: usize, score: &dyn Fn(At) -> Option<f64>) {
        let flags =
            "--workers 2 --q x.npz:q --k x.npz:k --batch 1 --head all --top-k 3 --json --heatmap map.svg";
        let (code, stdout, stderr) = self.run(&format!("explain {flags} --query {query} {words}"));
        assert_eq!(code, Some(0), "{words}: {stderr}");
        let view: Value = serde_json::from_str(&stdout).unwrap();
        let attention = view["attention"].as_array().unwrap();
        assert_eq!(attention.len(), self.heads, "{words}");
        for (head, of_head) in attention.iter().enumerate() {
            let weights = self.weights(1, head, query, score);
            let mut ranked: Vec<usize> = (0..self.keys).filter(|key| weights[*key] > 0.0).collect();
            ranked.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
            let queries = of_head["queries"].as_array().unwrap();
            assert_eq!((queries.len(), &queries[0]["query"]), (1, &query.into()), "{words}");
            let keys = queries[0]["keys"].as_array().unwrap();
            assert_eq!(keys.len(), ranked.len().min(3), "{words}, head {head}");
            for (got, key) in keys.iter().zip(ranked) {
                assert_eq!(got["key"], key, "{words}, head {head}");
                let (got, want) = (got["weight"].as_f64().unwrap(), weights[key]);
                assert!(
                    (got - want).abs() <= TOLERANCE,
                    "{words}, head {head}, key {key}: {got}, not {want}"
                );
            }
            let entropy: f64 = weights.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            let got = view["heads"][head]["entropy"].as_f64().unwrap_or(f64::NAN);
            assert!((got - entropy).abs() <= TOLERANCE, "{words}, head {head}: entropy {got}, not {entropy}");
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Parameters of an additive score with units and vectors of each head.
struct Additive {
    units: usize,
    v: Vec<f32>,
    w_q: Vec<f32>,
    w_k: Vec<f32>,
    b: Vec<f32>,
}

impl Additive {
    fn new(heads: usize, units: usize, query_dim: usize, key_dim: usize) -> Self {
        let (v, b) = (numbers(4, heads * units), numbers(7, units));
        Self { units, v, w_q: numbers(5, units * query_dim), w_k: numbers(6, units * key_dim), b }
    }

    /// `v . tanh(W_q q + W_k k + b + beside)`.
    fn score(&self, case: &Case, at: At, beside: impl Fn(usize) -> f64) -> f64 {
        let of_unit = |unit: usize| {
            let q = dot(&self.w_q[unit * case.query_dim..][..case.query_dim], case.query(at));
            let k = dot(&self.w_k[unit * case.key_dim..][..case.key_dim], case.key(at));
            let sum = q + k + f64::from(self.b[unit]) + beside(unit);
            f64::from(self.v[at.head * self.units + unit]) * sum.tanh()
        };
        (0..self.units).map(of_unit).sum()
    }

    fn files(&self, heads: usize, query_dim: usize, key_dim: usize) -> [(&'static str, Vec<u8>); 4] {
        [
            ("va", f32s(&[heads, self.units], &self.v)),
            ("wq", f64s(&[self.units, query_dim], &self.w_q)),
            ("wk", f32s(&[self.units, key_dim], &self.w_k)),
            ("b", f64s(&[self.units], &self.b)),
        ]
    }
}

const ADDITIVE: &str = "--param v=x.npz:va --param w_q=x.npz:wq --param w_k=x.npz:wk --param b=x.npz:b";

#[test]
fn additive_scores_of_an_archive_with_queries_of_another_dim() {
    let additive = Additive::new(4, 7, 6, 8);
    let case = Case::new([2, 4, 2, 9, 300, 6, 8], &additive.files(4, 6, 8));
    let score = |at: At| (at.key <= 291 + at.query).then(|| additive.score(&case, at, |_| 0.0));
    let words = format!("--score additive {ADDITIVE} --causal");
    case.check(&words, &score);
    case.check_explained(&words, 4, &score);

    // One number in all places of the bias.
    let additive = Additive { b: vec![0.5; 7], ..additive };
    let score = |at: At| (at.key <= 291 + at.query).then(|| additive.score(&case, at, |_| 0.0));
    let words = words.replace("b=x.npz:b", "b=0.5");
    case.check(&words, &score);
    case.check_explained(&words, 4, &score);
}

#[test]
fn a_score_of_each_query_and_one_of_the_weights_before() {
    let additive = Additive::new(2, 3, 4, 4);
    let (u, filters, beta) = (numbers(8, 3 * 2), numbers(9, 2 * 5), numbers(10, 2 * 2 * 4));
    let previous: Vec<f32> = numbers(11, 2 * 4 * 280).into_iter().map(f32::abs).collect();
    let mut files = additive.files(2, 4, 4).to_vec();
    files.extend([
        ("u", f32s(&[3, 2], &u)),
        ("filters", f32s(&[2, 5], &filters)),
        ("beta", f32s(&[2, 2, 4], &beta)),
        ("previous", f32s(&[2, 1, 4, 280], &previous)),
    ]);
    let case = Case::new([2, 2, 1, 4, 280, 4, 4], &files);
    let cosine = |at: At| {
        let (q, k) = (case.query(at), case.key(at));
        let norms = dot(q, q).sqrt() * dot(k, k).sqrt();
        Some(f64::from(beta[(at.batch * 2 + at.head) * 4 + at.query]) * dot(q, k) / norms)
    };
    case.check("--score cosine --param beta=x.npz:beta", &cosine);
    case.check_explained("--score cosine --param beta=x.npz:beta", 2, &cosine);
    case.check_explained("--score cosine --param beta=x.npz:beta", 0, &cosine);
    let sharp = |at: At| {
        cosine(at).map(|score| 2.5 * score / f64::from(beta[(at.batch * 2 + at.head) * 4 + at.query]))
    };
    case.check("--score cosine --param beta=2.5", &sharp);

    // Filters of five taps, around the key.
    let located = |at: At| {
        let row = &previous[(at.batch * 4 + at.query) * 280..][..280];
        let response = |filter: usize| {
            let tap = |t: usize| {
                let weight = (at.key + t).checked_sub(2).and_then(|key| row.get(key));
                f64::from(filters[filter * 5 + t]) * weight.map_or(0.0, |weight| f64::from(*weight))
            };
            (0..5).map(tap).sum::<f64>()
        };
        let beside =
            |unit: usize| (0..2).map(|filter| f64::from(u[unit * 2 + filter]) * response(filter)).sum();
        Some(additive.score(&case, at, beside))
    };
    let words = format!(
        "--score location_aware {ADDITIVE} --param u=x.npz:u --param filters=x.npz:filters --previous x.npz:previous"
    );
    case.check(&words, &located);
    case.check_explained(&words, 1, &located);
}

/// T5's bucket of a key that is `ahead` of the query, by integers: of 8 buckets that share distances the last with
/// `(distance / 8)^8 >= (most / 8)^bucket`.
fn bucket(ahead: i64, most: u128, both: bool) -> usize {
    let (first, distance) = match ahead {
        1.. if both => (16, ahead.unsigned_abs()),
        1.. => (0, 0),
        _ => (0, ahead.unsigned_abs()),
    };
    let distance = u128::from(distance);
    if distance < 8 {
        return first + usize::try_from(distance).unwrap();
    }
    let shared =
        (0..8).filter(|bucket| distance.pow(8) * 8_u128.pow(*bucket) >= most.pow(*bucket) * 8_u128.pow(8));
    first + 8 + usize::try_from(shared.max().unwrap()).unwrap()
}

#[test]
fn a_table_by_distance_is_that_of_t5() {
    let (both, past) = (numbers(4, 32 * 4), numbers(5, 16 * 4));
    let files = [("both", f32s(&[32, 4], &both)), ("past", f64s(&[16, 4], &past))];
    let case = Case::new([2, 4, 2, 9, 300, 8, 8], &files);
    let ahead = |at: At| at.key as i64 - (291 + at.query as i64);
    let of_both = |at: At| {
        let bias = both[bucket(ahead(at), 100, true) * 4 + at.head];
        Some(case.scaled_dot(at) + f64::from(bias))
    };
    let words = "--relative x.npz:both --relative-bidirectional --relative-max-distance 100 --offset 291";
    case.check(words, &of_both);
    case.check_explained(words, 3, &of_both);
    let of_past = |at: At| {
        let bias = past[bucket(ahead(at), 128, false) * 4 + at.head];
        (ahead(at) <= 0).then(|| case.scaled_dot(at) + f64::from(bias))
    };
    case.check("--relative x.npz:past --causal", &of_past);
    case.check_explained("--relative x.npz:past --causal", 8, &of_past);
}

#[test]
fn a_table_of_windows_is_that_of_swin() {
    let (table, regions) =
        (numbers(4, 5 * 7 * 2), [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, -9, -9, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4]);
    let files = [("table", f32s(&[35, 2], &table)), ("regions", i64s(&[2, 12], &regions))];
    let case = Case::new([4, 2, 2, 12, 12, 4, 4], &files);
    let bias = |at: At| {
        let (down, across) = (at.query / 4 + 2 - at.key / 4, at.query % 4 + 3 - at.key % 4);
        f64::from(table[(down * 7 + across) * 2 + at.head])
    };
    case.check("--swin x.npz:table --swin-window 3x4", &|at| Some(case.scaled_dot(at) + bias(at)));
    let between = |apart: f64| {
        let case = &case;
        move |at: At| {
            let own = &regions[at.batch % 2 * 12..][..12];
            let apart = if own[at.query] == own[at.key] { 0.0 } else { apart };
            Some(case.scaled_dot(at) + bias(at) + apart)
        }
    };
    let words = "--swin x.npz:table --swin-window 3x4 --swin-regions x.npz:regions";
    case.check(words, &between(-100.0));
    let words = format!("{words} --swin-between -1.5");
    case.check(&words, &between(-1.5));
    case.check_explained(&words, 11, &between(-1.5));
}

#[test]
fn blocks_of_a_sparse_matrix_are_all_that_is_seen() {
    // A graph: keys of a query by its number; query 3 has no edge.
    let is_edge = |query: usize, key: usize| query != 3 && (query * 37 + key * 11) % 13 < 2;
    let graph = |queries: usize, keys: usize, is_there: &dyn Fn(usize, usize) -> bool| {
        let (mut row_ptr, mut columns) = (vec![0], Vec::new());
        for query in 0..queries {
            columns.extend((0..keys).filter(|key| is_there(query, *key)).map(|key| key as i32));
            row_ptr.push(columns.len() as i64);
        }
        (row_ptr, columns)
    };
    let (indptr, indices) = graph(9, 300, &is_edge);
    // Blocks of 2 queries and 64 keys, others for each head of each batch element.
    let is_block = |layout: usize, row: usize, column: usize| (layout * 5 + row * 3 + column * 7) % 4 < 2;
    let (mut row_ptr, mut columns) = (Vec::new(), Vec::new());
    for layout in 0..8 {
        let (of_layout, its) = graph(5, 5, &|row, column| is_block(layout, row, column));
        row_ptr.extend(of_layout);
        columns.extend(its);
    }
    let files = [
        ("indptr", i64s(&[10], &indptr)),
        ("indices", i32s(&[indices.len()], &indices)),
        ("row_ptr", i64s(&[8, 6], &row_ptr)),
        ("columns", i32s(&[columns.len()], &columns)),
    ];
    let case = Case::new([2, 4, 2, 9, 300, 8, 8], &files);
    let of_graph = |at: At| is_edge(at.query, at.key).then(|| case.scaled_dot(at));
    let words = "--csr-row-ptr x.npz:indptr --csr-columns x.npz:indices";
    case.check(words, &of_graph);
    case.check_explained(words, 7, &of_graph);
    let of_blocks = |at: At| {
        let is_seen = is_block(at.batch * 4 + at.head, at.query / 2, at.key / 64) && at.key <= 291 + at.query;
        is_seen.then(|| case.scaled_dot(at))
    };
    let words = "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:columns --csr-block 2x64 --causal";
    case.check(words, &of_blocks);
    case.check_explained(words, 5, &of_blocks);
}

#[test]
fn documents_may_be_scattered() {
    // Others in each batch element; -1 is padding, a document as well.
    let ids: Vec<i64> =
        (0..2 * 300).map(|token| [7, 3, -1, 7, 1 << 40][token / 40 % 5] + (token / 300) as i64).collect();
    let of_queries = [7_i32, 8, 3, 0, 4, 99];
    let files = [
        ("ids", i64s(&[2, 300], &ids)),
        ("queries", i32s(&[6], &of_queries)),
        ("own", i64s(&[300], &ids[..300])),
    ];
    let case = Case::new([2, 2, 1, 6, 300, 4, 4], &files);
    let score = |at: At| {
        (i64::from(of_queries[at.query]) == ids[at.batch * 300 + at.key]).then(|| case.scaled_dot(at))
    };
    let words = "--documents x.npz:ids --query-documents x.npz:queries";
    case.check(words, &score);
    case.check_explained(words, 1, &score);
    let (code, _, stderr) =
        case.run(&format!("attend {NOBODY} --q x.npz:q --k x.npz:k --v x.npz:v --documents x.npz:ids"));
    let wanted = "--documents says whose the 300 keys are, and there are 6 queries: --query-documents says whose they are";
    assert!(code == Some(2) && stderr.contains(wanted), "{stderr}");

    // Packed sequences, each causal by itself.
    let case = Case::new([2, 2, 1, 300, 300, 4, 4], &files);
    let score = |at: At| (ids[at.query] == ids[at.key] && at.key <= at.query).then(|| case.scaled_dot(at));
    case.check("--documents x.npz:own --causal", &score);
    case.check_explained("--documents x.npz:own --causal", 250, &score);
}

#[test]
fn score_functions_are_listed() {
    let folder = TempDir::new().unwrap();
    let (code, stdout, stderr) = run(folder.path(), "scores --json");
    assert_eq!(code, Some(0), "{stderr}");
    let listed: Vec<Value> = serde_json::from_str(&stdout).unwrap();
    assert_eq!(listed.len(), attnd_kernel::FUNCTIONS.len());
    for (function, listed) in attnd_kernel::FUNCTIONS.iter().zip(&listed) {
        assert_eq!((&listed["name"], &listed["formula"]), (&function.name.into(), &function.summary.into()));
        let names = listed["parameters"].as_array().unwrap().iter().map(|parameter| &parameter["name"]);
        assert!(names.eq(function.parameters.iter().map(|parameter| parameter.name)), "{}", function.name);
    }
    let (code, stdout, _) = run(folder.path(), "scores");
    assert_eq!(code, Some(0));
    for function in attnd_kernel::FUNCTIONS {
        assert!(stdout.contains(function.name) && stdout.contains(function.summary), "{stdout}");
    }
}

/// The latent of multi-head latent attention is the value and a part of the key: it is sent once, and the context is the same.
#[test]
fn values_are_the_first_elements_of_keys() {
    let latent: Vec<f32> = numbers(2, 300 * 6).chunks(6).flat_map(|key| key[..4].to_vec()).collect();
    let case = Case::new([1, 4, 1, 3, 300, 6, 6], &[("latent", f32s(&[1, 1, 300, 4], &latent))]);
    let context = |values: &str, file: &str| {
        let call = format!("attend --workers 2 --q x.npz:q --k x.npz:k {values} --causal -o {file}");
        let (code, _, said) = run(case.folder.path(), &call);
        assert_eq!(code, Some(0), "{said}");
        fs::read(case.folder.path().join(file)).unwrap()
    };
    assert_eq!(context("--value-prefix 4", "prefix.npy"), context("--v x.npz:latent", "sent.npy"));
    let (code, _, said) =
        run(case.folder.path(), &format!("attend {NOBODY} --q x.npz:q --k x.npz:k --value-prefix 7"));
    assert_eq!(code, Some(2));
    assert!(said.contains("values are the first 7 elements of keys, which have 6"), "{said}");
}
