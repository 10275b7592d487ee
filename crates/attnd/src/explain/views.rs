//! What heads and queries attend to, in numbers: the answer of a call, put in order. This is also the JSON of the verb.

use std::ops::Range;

use attnd_client::Inspected;
use serde::Serialize;

use super::part::Rules;
use super::words::Words;

/// Everything that was found.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// Element of the batch.
    pub batch: usize,
    /// Queries of the call.
    pub n_queries: usize,
    /// Keys of the call.
    pub n_keys: usize,
    /// How scores become weights: `softmax` or `sigmoid`.
    pub normaliser: &'static str,
    /// Queries that `heads` and `attention` are about: the first, and the one behind the last.
    pub queries: [usize; 2],
    /// How many of them see no key, counted for each head.
    pub empty_rows: usize,
    /// One for each head, or for the one that was asked for.
    pub heads: Vec<HeadView>,
    /// One for each head, for the one that was asked for, or for the mean; empty where there are too many queries.
    pub attention: Vec<AttentionView>,
    /// The picture, if one was drawn.
    pub heatmap: Option<HeatmapView>,
    /// Order of arithmetic.
    pub kernel_id: String,
    /// All calls, input in memory to result in memory.
    pub seconds: f64,
}

/// One head, over the queries that see a key; nothing but its number where none does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadView {
    /// Query head, from 0.
    pub head: usize,
    /// Mean entropy of the weights, in nats.
    pub entropy: Option<f64>,
    /// Mean of `exp(entropy)`, the effective number of keys.
    pub effective_keys: Option<f64>,
    /// Mean sum of a query's weights, where these are sigmoids; then there is no entropy. Of softmax it is 1, less what a sink takes.
    pub weight_sum: Option<f64>,
    /// Mean distance to the keys, each counted by its weight, over the queries that weigh any; nothing where nobody said where queries stand.
    pub distance: Option<f64>,
    /// Mean weight of the first key that is no padding.
    pub first_key: Option<f64>,
    /// The highest score.
    pub max_score: Option<f64>,
}

/// What queries attend to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionView {
    /// Query head, from 0; nothing for the mean over heads.
    pub head: Option<usize>,
    /// One for each query.
    pub queries: Vec<QueryView>,
}

/// What one query attends to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryView {
    /// Its place among the queries, from 0.
    pub query: usize,
    /// Where it stands on the axis of the keys, if anybody said so.
    pub position: Option<i64>,
    /// Its word, if it has one.
    pub token: Option<String>,
    /// Whether it sees a key, in some of the heads that this is about. If so and there are no keys here, all weigh 0, as sigmoids may.
    pub sees_key: bool,
    /// Keys by falling weight, equal ones by their place.
    pub keys: Vec<KeyView>,
}

/// A key and what it weighs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeyView {
    /// Its place among the keys, from 0.
    pub key: usize,
    /// Its word, if it has one.
    pub token: Option<String>,
    /// Its weight, or the mean of its weights.
    pub weight: f64,
    /// Its score, of a single head.
    pub score: Option<f64>,
    /// Where weights are means: the head in which this key weighs most, and what it weighs there.
    pub strongest: Option<Strongest>,
}

/// The head in which a key weighs most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Strongest {
    /// Query head, from 0; the first of equal ones.
    pub head: usize,
    /// The key's weight in it.
    pub weight: f64,
}

/// A picture that was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeatmapView {
    /// Where it is.
    pub path: String,
    /// Rows of each map.
    pub rows: usize,
    /// Columns of each map.
    pub columns: usize,
    /// Heads drawn; empty for the mean over all.
    pub heads: Vec<usize>,
    /// The largest mean weight of a cell, which has the darkest colour.
    pub largest: f64,
}

/// The answer about some queries, and what is known of these.
#[derive(Debug)]
pub struct Answer<'a> {
    /// Outputs of the call, which had these queries only.
    pub inspected: &'a Inspected,
    /// The queries, by their places in the whole call.
    pub queries: Range<usize>,
    /// The whole call's rules.
    pub rules: &'a Rules,
    /// Words, where they are known.
    pub words: &'a Words,
}

impl Answer<'_> {
    /// Heads of `range`. `first_key` has the weight of the first key, `[heads, queries]`.
    pub fn heads(&self, range: Range<usize>, first_key: &[f32]) -> Vec<HeadView> {
        let n = self.queries.len();
        let inspected = self.inspected;
        let view = |head: usize| {
            let rows = head * n..(head + 1) * n;
            let seeing: Vec<usize> = rows.filter(|row| self.sees(*row)).collect();
            // Where all weights are 0 there is nothing to be far from.
            let weighs = |row: &usize| inspected.mass.get(*row).is_none_or(|sum| *sum > 0.0);
            let weighing: Vec<usize> = seeing.iter().copied().filter(weighs).collect();
            let mean_over = |rows: &[usize], values: &[f32], of: fn(f64) -> f64| {
                let values =
                    rows.iter().filter_map(|row| values.get(*row)).map(|value| of(f64::from(*value)));
                let (sum, n) = values.fold((0.0, 0_usize), |(sum, n), value| (sum + value, n + 1));
                (n > 0).then(|| sum / n as f64)
            };
            let mean = |values: &[f32], of: fn(f64) -> f64| mean_over(&seeing, values, of);
            let scores = seeing.iter().filter_map(|row| inspected.max_score.get(*row));
            HeadView {
                head,
                entropy: mean(&inspected.entropy, |nats| nats),
                effective_keys: mean(&inspected.entropy, f64::exp),
                // Asked for as the mass of one block, which has all keys.
                weight_sum: mean(&inspected.mass, |weight| weight),
                distance: mean_over(&weighing, &inspected.distance, |tokens| tokens),
                first_key: mean(first_key, |weight| weight),
                max_score: scores.copied().map(f64::from).max_by(f64::total_cmp),
            }
        };
        range.map(view).collect()
    }

    /// Rows, over all heads, that see no key.
    pub fn empty_rows(&self) -> usize {
        (0..self.inspected.max_score.len()).filter(|row| !self.sees(*row)).count()
    }

    /// Whether a row sees a key: if none, its highest score is that of nothing.
    fn sees(&self, row: usize) -> bool {
        self.inspected.max_score.get(row).is_some_and(|score| *score > f32::NEG_INFINITY)
    }

    /// What the queries attend to in one head: the keys with the highest scores, `k` for each query.
    pub fn attention_of_head(&self, head: usize, k: usize) -> AttentionView {
        let keys_of = |place: usize| {
            let row = (head * self.queries.len() + place) * k;
            let Inspected { top_keys, top_weights, top_scores, .. } = self.inspected;
            let entries = top_keys.iter().zip(top_weights.iter().zip(top_scores)).skip(row).take(k);
            let keys = entries.filter(|(key, _)| **key != u32::MAX).map(|(key, (weight, score))| KeyView {
                score: Some(f64::from(*score)),
                ..self.key(*key as usize, f64::from(*weight))
            });
            keys.collect()
        };
        AttentionView { head: Some(head), queries: self.each_query(head..head + 1, keys_of) }
    }

    /// What the queries attend to in the mean over heads: the `k` keys of the largest mean weights. `weights` are all of
    /// them, `[heads, queries, keys]`: which keys lead in the mean can't be told from those that lead in each head.
    pub fn attention_of_mean(&self, weights: &[f32], k: usize) -> AttentionView {
        let (n_keys, n_queries) = (self.rules.shape().n_keys(), self.queries.len());
        let n_heads = self.inspected.heads.len();
        let keys_of = |place: usize| {
            let rows = weights.chunks_exact(n_keys).skip(place).step_by(n_queries).take(n_heads);
            let mut sums = vec![0.0; n_keys];
            let mut strongest = vec![Strongest { head: 0, weight: 0.0 }; n_keys];
            for (head, row) in rows.enumerate() {
                for ((sum, strongest), weight) in sums.iter_mut().zip(&mut strongest).zip(row) {
                    let weight = f64::from(*weight);
                    *sum += weight;
                    if weight > strongest.weight {
                        *strongest = Strongest { head, weight };
                    }
                }
            }
            let leaders = leaders(&sums, k).into_iter().map(|key| KeyView {
                strongest: strongest.get(key).copied(),
                ..self.key(key, sums.get(key).map_or(0.0, |sum| sum / n_heads as f64))
            });
            leaders.collect()
        };
        AttentionView { head: None, queries: self.each_query(0..n_heads, keys_of) }
    }

    fn key(&self, key: usize, weight: f64) -> KeyView {
        KeyView { key, token: self.words.keys.get(key).cloned(), weight, score: None, strongest: None }
    }

    fn each_query(&self, heads: Range<usize>, keys_of: impl Fn(usize) -> Vec<KeyView>) -> Vec<QueryView> {
        let n = self.queries.len();
        let view = |(place, query): (usize, usize)| QueryView {
            query,
            position: self.rules.position(query),
            token: self.words.queries.get(query).cloned(),
            sees_key: heads.clone().any(|head| self.sees(head * n + place)),
            keys: keys_of(place),
        };
        self.queries.clone().enumerate().map(view).collect()
    }
}

/// Places of the `k` largest of some sums, those of nothing left out; the earlier of equal ones first.
fn leaders(sums: &[f64], k: usize) -> Vec<usize> {
    let mut places: Vec<(usize, f64)> =
        sums.iter().copied().enumerate().filter(|(_, sum)| *sum > 0.0).collect();
    let before = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if places.len() > k {
        places.select_nth_unstable_by(k, before);
        places.truncate(k);
    }
    places.sort_by(before);
    places.into_iter().map(|(place, _)| place).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use attnd_client::{AttnShape, Causal, Dims, Mask};

    use super::*;

    pub(crate) fn rules(queries: u64, keys: u64) -> Rules {
        let dims = Dims { batch: 1, heads: 2, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
        Rules::new(Causal::BottomRight, Mask::default(), AttnShape::new(dims).unwrap(), 0).unwrap()
    }

    #[test]
    fn means_are_over_the_rows_that_see_a_key() {
        let (rules, words) = (rules(5, 9), Words::default());
        let inspected = Inspected {
            heads: 0..2,
            entropy: vec![1.0, 0.0, 3.0, 0.0, 0.0, 0.0],
            distance: vec![2.0, 0.0, 4.0, 0.0, 0.0, 0.0],
            max_score: vec![
                5.0,
                f32::NEG_INFINITY,
                -7.0,
                f32::NEG_INFINITY,
                f32::NEG_INFINITY,
                f32::NEG_INFINITY,
            ],
            ..Inspected::default()
        };
        let answer = Answer { inspected: &inspected, queries: 2..5, rules: &rules, words: &words };
        let heads = answer.heads(0..2, &[0.5, 0.0, 0.25, 0.0, 0.0, 0.0]);
        let effective = f64::midpoint(1.0_f64.exp(), 3.0_f64.exp());
        let first = HeadView {
            head: 0,
            entropy: Some(2.0),
            effective_keys: Some(effective),
            weight_sum: None,
            distance: Some(3.0),
            first_key: Some(0.375),
            max_score: Some(5.0),
        };
        let nothing = HeadView {
            head: 1,
            entropy: None,
            effective_keys: None,
            weight_sum: None,
            distance: None,
            first_key: None,
            max_score: None,
        };
        assert_eq!(heads, [first, nothing]);
        assert_eq!(answer.empty_rows(), 4);
        let mass = vec![40.0, 0.0, 24.0, 0.0, 0.0, 0.0];
        let sigmoids = Inspected { entropy: Vec::new(), mass, ..inspected.clone() };
        let answer = Answer { inspected: &sigmoids, ..answer };
        let view = &answer.heads(0..2, &[])[0];
        assert_eq!((view.weight_sum, view.entropy, view.effective_keys), (Some(32.0), None, None));
        assert_eq!(answer.heads(1..2, &[])[0].head, 1);
        // The last row sees keys and weighs none.
        let mass = vec![40.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let faint = Inspected { mass, distance: vec![2.0, 0.0, 0.0, 0.0, 0.0, 0.0], ..sigmoids.clone() };
        let answer = Answer { inspected: &faint, ..answer };
        let view = &answer.heads(0..2, &[])[0];
        assert_eq!((view.weight_sum, view.distance), (Some(20.0), Some(2.0)));
        let none = Inspected { mass: vec![0.0; 6], ..faint.clone() };
        let answer = Answer { inspected: &none, ..answer };
        assert_eq!(answer.heads(0..1, &[])[0].distance, None);
        let queries = answer.attention_of_mean(&[0.0; 54], 3).queries;
        let sees: Vec<_> = queries.iter().map(|query| (query.sees_key, query.keys.len())).collect();
        assert_eq!(sees, [(true, 0), (false, 0), (true, 0)]);
        assert!(!answer.attention_of_head(1, 0).queries[0].sees_key);
    }

    #[test]
    fn keys_of_a_head_are_those_of_its_rows() {
        let rules = rules(5, 9);
        let words = Words { keys: (0..9).map(|i| format!("w{i}")).collect(), queries: Vec::new() };
        let none = u32::MAX;
        let inspected = Inspected {
            heads: 0..2,
            top_keys: vec![0, 1, 2, 3, 4, 5, 7, none],
            top_weights: vec![0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 0.0],
            top_scores: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, f32::NEG_INFINITY],
            ..Inspected::default()
        };
        let answer = Answer { inspected: &inspected, queries: 3..5, rules: &rules, words: &words };
        let view = answer.attention_of_head(1, 2);
        assert_eq!((view.head, view.queries.len()), (Some(1), 2));
        assert_eq!((view.queries[1].query, view.queries[1].position), (4, Some(8)));
        let keys: Vec<_> = view.queries[1].keys.iter().map(|key| (key.key, key.weight, key.score)).collect();
        assert_eq!(keys, [(7, 1.0, Some(7.0))]);
        assert_eq!(view.queries[0].keys[1].token.as_deref(), Some("w5"));
    }

    #[test]
    fn a_key_may_lead_in_the_mean_and_in_no_head() {
        let (rules, words) = (rules(1, 3), Words::default());
        let inspected = Inspected { heads: 0..2, ..Inspected::default() };
        let answer = Answer { inspected: &inspected, queries: 0..1, rules: &rules, words: &words };
        let weights = [0.5, 0.5, 0.0, 0.0, 0.375, 0.625];
        let view = answer.attention_of_mean(&weights, 2);
        let keys: Vec<_> = view.queries[0].keys.iter().map(|key| (key.key, key.weight)).collect();
        assert_eq!(keys, [(1, 0.4375), (2, 0.3125)]);
        let strongest = view.queries[0].keys[1].strongest;
        assert_eq!(strongest, Some(Strongest { head: 1, weight: 0.625 }));
    }

    #[test]
    fn the_mean_is_of_each_query_by_itself() {
        let (rules, words) = (rules(2, 2), Words::default());
        let inspected = Inspected { heads: 0..2, ..Inspected::default() };
        let answer = Answer { inspected: &inspected, queries: 0..2, rules: &rules, words: &words };
        // Heads by queries by keys.
        let view = answer.attention_of_mean(&[1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 0.0, 1.0], 5);
        let of = |query: usize| {
            view.queries[query].keys.iter().map(|key| (key.key, key.weight)).collect::<Vec<_>>()
        };
        assert_eq!((of(0), of(1)), (vec![(0, 1.0)], vec![(1, 0.75), (0, 0.25)]));
    }

    #[test]
    fn equal_sums_stand_in_the_order_of_the_text() {
        assert_eq!(leaders(&[0.25, 0.0, 0.5, 0.25, 0.25], 3), [2, 0, 3]);
        assert_eq!(leaders(&[0.25, f64::NAN, 0.0], 3), [0]);
        assert!(leaders(&[], 3).is_empty());
    }
}
