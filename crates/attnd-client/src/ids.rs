//! Integers that tell things apart, documents and regions, as the kernels count them.

use std::collections::HashMap;

use attnd_kernel::{Documents, MaskError, Run};

/// Numbers of things that are told apart by any integers.
#[derive(Debug, Default)]
pub struct Numbering(HashMap<i64, u32>);

impl Numbering {
    /// The same number for the same thing, from 0 in the order in which they come.
    pub fn of(&mut self, things: &[i64]) -> Vec<u32> {
        let number = |thing: &i64| {
            let next = self.0.len() as u32;
            *self.0.entry(*thing).or_insert(next)
        };
        things.iter().map(number).collect()
    }
}

/// Documents by the id of each key, of `keys` tokens for each element of the batch or for all of it, and by that of each query, which
/// are those of keys where none are given.
///
/// # Errors
/// [`MaskError`] as [`Documents::new`].
pub fn documents_by_id(
    (key_ids, keys): (&[i64], usize),
    queries: Option<(&[i64], usize)>,
) -> Result<Documents, MaskError> {
    let mut numbering = Numbering::default();
    let mut runs = |ids: &[i64], tokens: usize| -> Vec<Vec<Run>> {
        numbering.of(ids).chunks(tokens.max(1)).map(runs_of).collect()
    };
    let keys = runs(key_ids, keys);
    let queries = queries.map_or_else(|| keys.clone(), |(ids, tokens)| runs(ids, tokens));
    // Those of all the batch are those of each of its elements.
    let batch = keys.len().max(queries.len());
    let each = |runs: Vec<Vec<Run>>| if runs.len() == 1 { vec![runs.concat(); batch] } else { runs };
    Documents::new(&each(queries), &each(keys))
}

/// Tokens of one document that follow each other.
fn runs_of(documents: &[u32]) -> Vec<Run> {
    let mut end = 0;
    let run = |tokens: &[u32]| {
        end += tokens.len();
        Some(Run { end, id: *tokens.first()? })
    };
    documents.chunk_by(|a, b| a == b).filter_map(run).collect()
}
