//! Sequences packed into one: a query sees the keys of its own document.

use std::collections::HashMap;
use std::ops::Range;

use super::interval::MaskError;
use crate::shape::AttnShape;

/// Consecutive tokens of one document, from where the run before ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// Behind the last token of the run.
    pub end: usize,
    /// Which document.
    pub id: u32,
}

/// Which tokens are of which document. The tokens of one may be in several runs, of queries and of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// For all of the batch, or for each of its elements.
    batches: Vec<BatchDocuments>,
    /// The runs that they were made of.
    queries: Vec<Vec<Run>>,
    keys: Vec<Vec<Run>>,
}

/// The documents of one element of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BatchDocuments {
    queries: Vec<QueryRun>,
    /// Runs of keys, those of a document one after the other, ascending; neighbours are one run.
    keys: Vec<Range<usize>>,
    /// Of each run of keys, those of its document in earlier runs.
    before: Vec<usize>,
}

/// A run of queries, and the keys of its document.
#[derive(Clone, Debug, PartialEq, Eq)]
struct QueryRun {
    /// Query tokens.
    queries: Range<usize>,
    /// Queries of the document in earlier runs.
    before: usize,
    /// Queries of the document in all runs.
    of_document: usize,
    /// Which runs of keys are the document's; none if it has no keys.
    keys: Range<usize>,
}

impl Documents {
    /// Documents from the runs of queries and keys, `[batch]` of each, or one of each for all of the batch.
    ///
    /// # Errors
    /// [`MaskError`] if a run has no tokens, or there are runs of keys for another number of batch elements than of queries.
    /// Whether the runs end where the tokens do shows with the shape.
    pub fn new(queries: &[Vec<Run>], keys: &[Vec<Run>]) -> Result<Self, MaskError> {
        if queries.len() != keys.len() {
            let (got, batch) = (keys.len(), queries.len());
            return Err(MaskError::Entries { option: "mask.documents.keys", got, batch });
        }
        let mut batches = Vec::with_capacity(queries.len());
        for (batch, (queries, keys)) in queries.iter().zip(keys).enumerate() {
            let keys = ranges("mask.documents.keys", batch, keys)?;
            let queries = ranges("mask.documents.queries", batch, queries)?;
            batches.push(BatchDocuments::new(&queries, keys));
        }
        Ok(Self { batches, queries: queries.to_vec(), keys: keys.to_vec() })
    }

    /// The runs of queries that [`Self::new`] was given.
    pub fn queries(&self) -> &[Vec<Run>] {
        &self.queries
    }

    /// The runs of keys that [`Self::new`] was given.
    pub fn keys(&self) -> &[Vec<Run>] {
        &self.keys
    }

    /// Whether some query sees a document whose keys are in several runs, so that what it sees is no interval.
    pub fn is_scattered(&self) -> bool {
        self.batches.iter().any(|batch| batch.queries.iter().any(|run| run.keys.len() > 1))
    }

    pub(super) fn of_batch(&self, batch: usize) -> &BatchDocuments {
        if self.batches.len() == 1 { &self.batches[0] } else { &self.batches[batch] }
    }

    /// Whether the runs are those of a shape's tokens.
    pub(super) fn check(&self, shape: &AttnShape) -> Result<(), MaskError> {
        if self.batches.len() != 1 && self.batches.len() != shape.batch() {
            let (got, batch) = (self.batches.len(), shape.batch());
            return Err(MaskError::Entries { option: "mask.documents", got, batch });
        }
        let end_of = |runs: &[Run]| runs.last().map_or(0, |run| run.end);
        for (batch, (queries, keys)) in self.queries.iter().zip(&self.keys).enumerate() {
            for (option, got, dimension, limit) in [
                ("mask.documents.queries", end_of(queries), "q_len", shape.n_queries()),
                ("mask.documents.keys", end_of(keys), "kv_len", shape.n_keys()),
            ] {
                if got != limit {
                    return Err(MaskError::Runs { option, batch, got, dimension, limit });
                }
            }
        }
        Ok(())
    }

    /// Queries and keys of a document that has more of one than of the other, if there is one.
    pub(super) fn unequal_lengths(&self, batch: usize) -> Option<(usize, usize)> {
        let batch = self.of_batch(batch);
        let lengths = batch.queries.iter().map(|run| (run.of_document, batch.keys_of(run)));
        lengths.into_iter().find(|(queries, keys)| queries != keys && *keys > 0)
    }
}

impl BatchDocuments {
    /// From the tokens of each run, with its document.
    fn new(queries: &[(Range<usize>, u32)], mut of_keys: Vec<(Range<usize>, u32)>) -> Self {
        // Stable: runs of a document stay in their order.
        of_keys.sort_by_key(|(_, id)| *id);
        let mut of_id: HashMap<u32, Range<usize>> = HashMap::with_capacity(of_keys.len());
        let (mut keys, mut before) = (Vec::<Range<usize>>::with_capacity(of_keys.len()), Vec::new());
        for (range, id) in of_keys {
            let runs = of_id.entry(id).or_insert(keys.len()..keys.len());
            let is_first = runs.start == runs.end;
            match keys.last_mut() {
                Some(last) if !is_first && last.end == range.start => last.end = range.end,
                last => {
                    let earlier = match (last, before.last()) {
                        (Some(last), Some(before)) if !is_first => before + last.len(),
                        _ => 0,
                    };
                    before.push(earlier);
                    keys.push(range);
                    runs.end = keys.len();
                }
            }
        }
        let mut seen: HashMap<u32, usize> = HashMap::new();
        let mut runs = Vec::with_capacity(queries.len());
        for (range, id) in queries {
            let seen = seen.entry(*id).or_default();
            let keys = of_id.get(id).cloned().unwrap_or(0..0);
            runs.push(QueryRun { queries: range.clone(), before: *seen, of_document: 0, keys });
            *seen += range.len();
        }
        for (run, (_, id)) in runs.iter_mut().zip(queries) {
            run.of_document = seen[id];
        }
        Self { queries: runs, keys, before }
    }

    /// The run that a query is in.
    ///
    /// # Panics
    /// If it is in none, which [`Documents::check`] excludes.
    fn run_of(&self, token: usize) -> &QueryRun {
        &self.queries[self.queries.partition_point(|run| run.queries.end <= token)]
    }

    /// How many keys the document of a run has.
    fn keys_of(&self, run: &QueryRun) -> usize {
        let last = run.keys.clone().next_back();
        last.map_or(0, |last| self.before[last] + self.keys[last].len())
    }

    /// From the first key of the document of a query to the last one; `0..0` if it has none.
    pub(super) fn hull(&self, token: usize) -> Range<usize> {
        let runs = &self.keys[self.run_of(token).keys.clone()];
        match (runs.first(), runs.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => 0..0,
        }
    }

    /// The keys of the document of a query, where they are no interval.
    pub(super) fn scattered(&self, token: usize) -> Option<&[Range<usize>]> {
        let runs = self.run_of(token).keys.clone();
        (runs.len() > 1).then(|| &self.keys[runs])
    }

    /// Where a query stands on the axis of the keys: at the key of its document that has the same number there as it has among the queries,
    /// counted from the first of both or from the last. Before the first key or behind the last one where there is no such key, as far from it
    /// as numbers differ.
    pub(super) fn position(&self, token: usize, from_the_end: bool) -> i64 {
        let run = self.run_of(token);
        let keys = self.keys_of(run) as i64;
        let rank = (run.before + token - run.queries.start) as i64
            + if from_the_end { keys - run.of_document as i64 } else { 0 };
        let hull = self.hull(token);
        if rank >= keys {
            return hull.end as i64 + (rank - keys);
        }
        match usize::try_from(rank) {
            Err(_) => hull.start as i64 + rank,
            Ok(rank) => {
                let of_document = &self.before[run.keys.clone()];
                // The first run has none before it, so there is always one.
                let at = run.keys.start + of_document.partition_point(|before| *before <= rank) - 1;
                (self.keys[at].start + rank - self.before[at]) as i64
            }
        }
    }
}

/// The tokens of each run, with its document.
fn ranges(option: &'static str, batch: usize, runs: &[Run]) -> Result<Vec<(Range<usize>, u32)>, MaskError> {
    let mut before = 0;
    let mut ranges = Vec::with_capacity(runs.len());
    for (at, Run { end, id }) in runs.iter().copied().enumerate() {
        if end <= before {
            return Err(MaskError::EmptyRun { option, batch, run: at, end, before });
        }
        ranges.push((before..end, id));
        before = end;
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(runs: &[(usize, u32)]) -> Vec<Run> {
        runs.iter().map(|(end, id)| Run { end: *end, id: *id }).collect()
    }

    #[test]
    fn documents_in_several_runs_are_found_again() {
        let keys = runs(&[(2, 1), (5, 2), (6, 1), (8, 9), (9, 1)]);
        let queries = runs(&[(1, 3), (3, 1), (4, 2), (6, 1)]);
        let documents = Documents::new(&[queries], &[keys]).unwrap();
        assert!(documents.is_scattered());
        let batch = documents.of_batch(0);
        assert_eq!([0, 1, 3, 5].map(|token| batch.hull(token)), [0..0, 0..9, 2..5, 0..9]);
        assert_eq!(batch.scattered(2), Some(&[0..2, 5..6, 8..9][..]));
        assert_eq!([0, 3].map(|token| batch.scattered(token)), [None, None]);
        // Four keys and four queries of document 1, one of document 2.
        assert_eq!([0, 1, 2, 3, 4, 5].map(|token| batch.position(token, false)), [0, 0, 1, 2, 5, 8]);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|token| batch.position(token, true)), [-1, 0, 1, 4, 5, 8]);
        assert_eq!(documents.unequal_lengths(0), Some((1, 3)));
    }

    #[test]
    fn queries_without_a_key_of_their_number_stand_beyond_them() {
        let documents = |keys: &[(usize, u32)]| Documents::new(&[runs(&[(5, 1)])], &[runs(keys)]).unwrap();
        let scattered = documents(&[(1, 1), (2, 2), (3, 1)]);
        let batch = scattered.of_batch(0);
        assert_eq!([0, 1, 2, 3, 4].map(|token| batch.position(token, false)), [0, 2, 3, 4, 5]);
        assert_eq!([0, 1, 2, 3, 4].map(|token| batch.position(token, true)), [-3, -2, -1, 0, 2]);
        // Neighbours are one run.
        let whole = documents(&[(1, 1), (3, 1), (4, 2)]);
        assert!(!whole.is_scattered());
        assert_eq!(whole.of_batch(0).hull(4), 0..3);
        assert_eq!([0, 4].map(|token| whole.of_batch(0).position(token, false)), [0, 4]);
    }
}
