//! What the demo shows: which words each head looks at, the heatmap, tables, and the JSON summary.

use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use super::checks::Check;
use super::input::Case;
use crate::heatmap::{CloseUp, HeadPanel, Heatmap};
use crate::table;

/// Words named per head and column.
const TOP_WORDS: usize = 4;
/// Tokens in the close-up: few enough to be read, and the end of a clause of the bundled text.
const CLOSE_UP: usize = 74;
/// Keys this near to the query are its neighbours.
const NEIGHBOURHOOD: usize = 3;

/// What one head looks at, over all queries.
#[derive(Debug, Clone, Serialize)]
pub struct HeadView {
    /// Query head, from 1.
    pub head: usize,
    /// The tokens with the largest share of the head's attention, largest first; equal tokens are added up.
    pub most: Vec<WordView>,
    /// The words that get the most attention for how often they occur.
    pub favours: Vec<WordView>,
    /// Mean over the queries of the effective number of keys, `exp(entropy of the weights)`.
    pub effective_keys: f64,
}

/// A word and the attention it gets from a head.
#[derive(Debug, Clone, Serialize)]
pub struct WordView {
    /// The token's text.
    pub word: String,
    /// Mean weight over the queries, all occurrences together; 0 to 1.
    pub share: f64,
    /// Mean weight of an occurrence, in multiples of an even share, which is 1 / keys.
    pub times_even: f64,
}

/// One cluster's results.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// Worker processes.
    pub workers: usize,
    /// Their process ids.
    pub worker_pids: Vec<u32>,
    /// Start of the processes to the last worker joined.
    pub startup_seconds: f64,
    /// One for each case.
    pub calls: Vec<CallReport>,
}

/// One call.
#[derive(Debug, Clone, Serialize)]
pub struct CallReport {
    /// The case.
    pub case: &'static str,
    /// As the client saw it, input in memory to result in memory.
    pub seconds: f64,
    /// The coordinator's account.
    pub timings: crate::call_report::TimingsReport,
    /// The plan's own words.
    pub plan: String,
    /// 64-bit name of the result's bits.
    pub digest: String,
}

/// Everything the demo found.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Whether every check passed.
    pub passed: bool,
    /// The verdicts.
    pub checks: Vec<Check>,
    /// One for each cluster.
    pub runs: Vec<Run>,
    /// Layer 1, computed in this process in f64 from q and k.
    pub heads: Vec<HeadView>,
    /// Where the heatmap is.
    pub heatmap: String,
    /// Order of arithmetic.
    pub kernel_id: String,
    /// All of it.
    pub seconds: f64,
}

/// Weights of all heads of a layer, `[heads][queries * keys]`, from the f64 reference.
pub fn weights_by_head(case: &Case) -> Vec<Vec<f64>> {
    let mut heads = vec![Vec::new(); case.operands.shape.n_heads()];
    for at in &case.reference {
        if let Some(weights) = heads.get_mut(at.head) {
            weights.extend_from_slice(&at.row.weights);
        }
    }
    heads
}

/// What each head looks at most.
pub fn head_views(weights: &[Vec<f64>], tokens: &[String]) -> Vec<HeadView> {
    weights.iter().enumerate().map(|(head, weights)| head_view(head + 1, weights, tokens)).collect()
}

fn head_view(head: usize, weights: &[f64], tokens: &[String]) -> HeadView {
    let n_keys = tokens.len().max(1);
    let n_queries = (weights.len() / n_keys).max(1) as f64;
    let mut words: Vec<(WordView, f64)> = Vec::new();
    for (key, token) in tokens.iter().enumerate() {
        let share = weights.iter().skip(key).step_by(n_keys).sum::<f64>() / n_queries;
        match words.iter_mut().find(|(known, _)| known.word == *token) {
            Some((known, count)) => (known.share, *count) = (known.share + share, *count + 1.0),
            None => words.push((WordView { word: token.clone(), share, times_even: 0.0 }, 1.0)),
        }
    }
    let mut words: Vec<WordView> = words
        .into_iter()
        .map(|(word, count)| WordView { times_even: word.share / count * n_keys as f64, ..word })
        .collect();
    // Stable sorts: words with equal numbers stay in the order of the text.
    words.sort_by(|a, b| b.share.total_cmp(&a.share));
    let most = words.iter().take(TOP_WORDS).cloned().collect();
    words.retain(|view| is_word(&view.word));
    words.sort_by(|a, b| b.times_even.total_cmp(&a.times_even));
    words.truncate(TOP_WORDS);
    let effective = |row: &[f64]| row.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum::<f64>().exp();
    let effective_keys = weights.chunks(n_keys).map(effective).sum::<f64>() / n_queries;
    HeadView { head, most, favours: words, effective_keys }
}

/// Neither punctuation nor a marker such as `[CLS]`.
fn is_word(token: &str) -> bool {
    !token.starts_with('[') && token.contains(char::is_alphabetic)
}

/// How sharply a head looks at words that are not neighbours of the query: the sum of their squared weights.
fn reach(weights: &[f64], tokens: &[String]) -> f64 {
    let rows = weights.chunks(tokens.len().max(1)).enumerate();
    let far = |query: usize, key: usize| query.abs_diff(key) > NEIGHBOURHOOD;
    rows.flat_map(|(query, row)| {
        row.iter().zip(tokens).enumerate().map(move |(key, cell)| (query, key, cell))
    })
    .filter(|(query, key, (_, token))| far(*query, *key) && is_word(token))
    .map(|(_, _, (weight, _))| weight * weight)
    .sum()
}

/// The heatmap of a layer.
pub fn heatmap(weights: Vec<Vec<f64>>, views: &[HeadView], tokens: &[String]) -> String {
    let reaches: Vec<f64> = weights.iter().map(|weights| reach(weights, tokens)).collect();
    let head = (0..reaches.len()).max_by(|a, b| reaches[*a].total_cmp(&reaches[*b])).unwrap_or(0);
    let shown = tokens.len().min(CLOSE_UP);
    let heads: Vec<HeadPanel> = views
        .iter()
        .zip(weights)
        .map(|(view, weights)| HeadPanel {
            title: format!("Head {}", view.head),
            caption: format!("favours {}", words_of(&view.favours, 3, " · ", times_even)),
            weights,
        })
        .collect();
    Heatmap {
        title: "What each head looks at",
        subtitle: &format!(
            "all-MiniLM-L6-v2, layer 1: exact softmax weights of {} heads over {} tokens of prose. \
             Rows are queries, columns are keys.",
            heads.len(),
            tokens.len()
        ),
        tokens,
        heads: &heads,
        close_up: CloseUp {
            head,
            tokens: 0..shown,
            caption: &format!(
                "The head that looks most sharply at distant words, over the first {shown} tokens. \
                 Point at a cell for its words and weight."
            ),
        },
    }
    .to_svg()
}

fn words_of(views: &[WordView], n: usize, separator: &str, number: fn(&WordView) -> String) -> String {
    let words = views.iter().take(n).map(|view| format!("{} {}", view.word, number(view)));
    words.collect::<Vec<_>>().join(separator)
}

fn share(view: &WordView) -> String {
    format!("{:.0} %", 100.0 * view.share)
}

fn times_even(view: &WordView) -> String {
    format!("×{:.1}", view.times_even)
}

/// A row for each head.
pub fn head_table(views: &[HeadView]) -> Table {
    let header = ["head", "most of its attention", "words it favours (× an even share)", "effective keys"];
    let mut table = table::with_header(header);
    for view in views {
        let most = words_of(&view.most, 3, "   ", share);
        let favours = words_of(&view.favours, TOP_WORDS, "   ", times_even);
        table.add_row([view.head.to_string(), most, favours, format!("{:.1}", view.effective_keys)]);
    }
    table::align_right(&mut table, &[0, 3]);
    table
}

/// A row for each run: milliseconds.
pub fn time_table(runs: &[Run]) -> Table {
    let names = runs
        .first()
        .map(|run| run.calls.iter().map(|call| call.case).collect::<Vec<_>>())
        .unwrap_or_default();
    let mut header = vec!["workers".to_owned(), "start".to_owned()];
    header.extend(names.iter().map(ToString::to_string));
    header.extend(["scatter", "compute", "gather", "merge"].map(|part| format!("└ {part}")));
    let mut table = table::with_header(header);
    let ms = |seconds: f64| format!("{:.1}", 1e3 * seconds);
    for run in runs {
        let mut row = vec![run.workers.to_string(), ms(run.startup_seconds)];
        row.extend(run.calls.iter().map(|call| ms(call.seconds)));
        if let Some(last) = run.calls.last() {
            let t = &last.timings;
            row.extend([t.scatter, t.compute, t.gather, t.merge].map(ms));
        }
        table.add_row(row);
    }
    let columns: Vec<usize> = (0..table.column_count()).collect();
    table::align_right(&mut table, &columns);
    table
}

/// A row for each run: the digests of its results; the last row says whether each column is of one kind.
pub fn digest_table(runs: &[Run]) -> Table {
    let mut header = vec!["workers".to_owned()];
    let calls = runs.first().map(|run| run.calls.as_slice()).unwrap_or_default();
    header.extend(calls.iter().map(|call| call.case.to_owned()));
    let mut table = table::with_header(header);
    for run in runs {
        let digests = run.calls.iter().map(|call| call.digest.clone());
        table.add_row(std::iter::once(run.workers.to_string()).chain(digests));
    }
    let verdicts = calls.iter().enumerate().map(|(i, first)| {
        let equal = runs.iter().all(|run| run.calls.get(i).is_some_and(|call| call.digest == first.digest));
        if equal { "equal" } else { "DIFFERENT" }.to_owned()
    });
    table.add_row(std::iter::once(String::new()).chain(verdicts));
    if let Some(column) = table.column_mut(0) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A line for a verdict.
pub fn check_line(check: &Check) -> String {
    format!("  {}  {}: {}", if check.passed { "ok  " } else { "FAIL" }, check.name, check.detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_words_add_up_and_favour_is_per_occurrence() {
        let tokens = ["the", "river", "the", "."].map(str::to_owned);
        let even = vec![0.25; 16];
        let mut focused = vec![0.0; 16];
        for query in 0..4 {
            focused[query * 4..][..4].copy_from_slice(&[0.3, 0.4, 0.3, 0.0]);
        }
        let views = head_views(&[even, focused], &tokens);
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got} {want}");
        assert_eq!((views[0].head, views[0].most[0].word.as_str()), (1, "the"));
        close(views[0].most[0].share, 0.5);
        close(views[0].most[0].times_even, 1.0);
        close(views[0].effective_keys, 4.0);
        assert_eq!(views[1].most[0].word, "the");
        assert_eq!(views[1].favours[0].word, "river");
        close(views[1].favours[0].times_even, 1.6);
        assert!(views.iter().all(|view| view.favours.iter().all(|word| word.word != ".")));
    }

    #[test]
    fn the_close_up_shows_the_head_that_reaches_far() {
        let tokens: Vec<String> = (0..8).map(|i| format!("w{i}")).collect();
        let near: Vec<f64> = (0..64).map(|i| if i / 8 == i % 8 { 1.0 } else { 0.0 }).collect();
        let far: Vec<f64> = (0..64).map(|i| if i / 8 == 7 - i % 8 { 1.0 } else { 0.0 }).collect();
        let weights = vec![near, far];
        let svg = heatmap(weights.clone(), &head_views(&weights, &tokens), &tokens);
        assert!(svg.contains("Head 2, close up"));
    }

    #[test]
    fn a_digest_that_differs_is_called_so() {
        let run = |workers, digest: &str| Run {
            workers,
            worker_pids: vec![1],
            startup_seconds: 0.1,
            calls: vec![CallReport {
                case: "long",
                seconds: 1.0,
                timings: Default::default(),
                plan: String::new(),
                digest: digest.into(),
            }],
        };
        assert!(digest_table(&[run(1, "a"), run(2, "a")]).to_string().contains("equal"));
        assert!(digest_table(&[run(1, "a"), run(2, "b")]).to_string().contains("DIFFERENT"));
        assert!(time_table(&[run(1, "a")]).to_string().contains("1000.0"));
    }
}
