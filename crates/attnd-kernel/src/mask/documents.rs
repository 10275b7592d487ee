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

/// Which tokens are of which document. The keys of one are consecutive; its queries may be in several runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    /// For all of the batch, or for each of its elements: the runs of the queries.
    batches: Vec<Vec<DocumentRun>>,
    /// The runs that they were made of.
    queries: Vec<Vec<Run>>,
    keys: Vec<Vec<Run>>,
}

/// A run of queries, and the keys of its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DocumentRun {
    /// Query tokens.
    queries: Range<usize>,
    /// Queries of the document in earlier runs.
    before: usize,
    /// Queries of the document in all runs.
    of_document: usize,
    /// Keys of the document; empty if it has none.
    pub(super) keys: Range<usize>,
}

impl Documents {
    /// Documents from the runs of queries and keys, `[batch]` of each, or one of each for all of the batch.
    ///
    /// # Errors
    /// [`MaskError`] if a run has no tokens, the keys of a document are in two runs, or there are runs of keys for another
    /// number of batch elements than of queries. Whether the runs end where the tokens do shows with the shape.
    pub fn new(queries: &[Vec<Run>], keys: &[Vec<Run>]) -> Result<Self, MaskError> {
        if queries.len() != keys.len() {
            let (got, batch) = (keys.len(), queries.len());
            return Err(MaskError::Entries { option: "mask.documents.keys", got, batch });
        }
        let mut batches = Vec::with_capacity(queries.len());
        for (batch, (queries, keys)) in queries.iter().zip(keys).enumerate() {
            batches.push(runs_of_batch(batch, queries, keys)?);
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

    pub(super) fn of_batch(&self, batch: usize) -> &[DocumentRun] {
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
        let lengths = self.of_batch(batch).iter().map(|run| (run.of_document, run.keys.len()));
        lengths.into_iter().find(|(queries, keys)| queries != keys && *keys > 0)
    }
}

/// The runs of the queries of one element of the batch, each with the keys of its document.
fn runs_of_batch(batch: usize, queries: &[Run], keys: &[Run]) -> Result<Vec<DocumentRun>, MaskError> {
    let mut of_id: HashMap<u32, Range<usize>> = HashMap::with_capacity(keys.len());
    for (range, id) in ranges("mask.documents.keys", batch, keys)? {
        if let Some(first) = of_id.insert(id, range.clone()) {
            return Err(MaskError::Scattered { batch, id, first: first.end, second: range.end });
        }
    }
    let queries = ranges("mask.documents.queries", batch, queries)?;
    let mut seen: HashMap<u32, usize> = HashMap::new();
    let mut runs = Vec::with_capacity(queries.len());
    for (range, id) in &queries {
        let seen = seen.entry(*id).or_default();
        let keys = of_id.get(id).cloned().unwrap_or(0..0);
        runs.push(DocumentRun { queries: range.clone(), before: *seen, of_document: 0, keys });
        *seen += range.len();
    }
    for (run, (_, id)) in runs.iter_mut().zip(&queries) {
        run.of_document = seen[id];
    }
    Ok(runs)
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

impl DocumentRun {
    /// The run that a query is in.
    ///
    /// # Panics
    /// If it is in none, which [`Documents::check`] excludes.
    pub(super) fn of_token(runs: &[Self], token: usize) -> &Self {
        &runs[runs.partition_point(|run| run.queries.end <= token)]
    }

    /// Where a query of the run stands on the axis of the keys: as far from the first key of its document as from its first
    /// query, or as far from the last ones.
    pub(super) fn position(&self, token: usize, from_the_end: bool) -> i64 {
        let rank = (self.before + token - self.queries.start) as i64;
        let (keys, queries) = (&self.keys, self.of_document as i64);
        if from_the_end { keys.end as i64 - queries + rank } else { keys.start as i64 + rank }
    }
}
