//! Block-sparse masks: which blocks of keys a block of queries sees, as compressed sparse rows.
//!
//! A layout is a sparse matrix of `[ceil(Tq / query_block), ceil(Tk / key_block)]` blocks in the form that scipy and torch call CSR and
//! ORT's SparseAttention takes: `row_ptr` says where the columns of each row lie, `columns` which they are. Blocks of one query and
//! one key make it the adjacency of a graph.

use std::ops::Range;
use std::sync::Arc;

use super::runs::KeyRuns;
use crate::shape::AttnShape;

/// Layouts of blocks for all heads, for each head, or for each head of each batch element. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    query_block: usize,
    key_block: usize,
    layouts: usize,
    row_ptr: Arc<[u32]>,
    columns: Arc<[u32]>,
    /// Where the columns of each layout begin.
    begins: Arc<[usize]>,
    /// The largest column, with its place.
    largest: Option<(usize, u32)>,
}

/// Why lists of blocks are no block mask. The text names the list, the place and both numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// A block of no tokens, or no layouts.
    #[error("mask.csr.{option} is 0")]
    Zero {
        /// Which number.
        option: &'static str,
    },
    /// Layouts don't share the row pointers evenly.
    #[error("mask.csr.row_ptr has {got} numbers, for {layouts} layouts")]
    RowPointers {
        /// How many there are.
        got: usize,
        /// Layouts that they are for.
        layouts: usize,
    },
    /// A layout whose first pointer isn't 0.
    #[error("mask.csr.row_ptr[{layout}] begins at {got}, not at 0")]
    Begin {
        /// Of which layout.
        layout: usize,
        /// Where it begins.
        got: u32,
    },
    /// A pointer below the one before it.
    #[error("mask.csr.row_ptr[{layout}]: row {row} ends at {end}, the one before at {before}")]
    Descending {
        /// Of which layout.
        layout: usize,
        /// Which row of blocks.
        row: usize,
        /// Where it ends.
        end: u32,
        /// Where it begins.
        before: u32,
    },
    /// Pointers to another number of columns than there are.
    #[error("mask.csr.columns has {got} numbers, row_ptr points to {counted}")]
    Columns {
        /// How many there are.
        got: usize,
        /// How many the layouts have by their pointers.
        counted: usize,
    },
    /// Columns of a row that don't ascend.
    #[error("mask.csr.columns[{at}] is {got} behind {before} in the same row")]
    Unsorted {
        /// Which column.
        at: usize,
        /// What it is.
        got: u32,
        /// The one before it.
        before: u32,
    },
    /// Another number of layouts than heads.
    #[error("mask.csr has {got} layouts, num_heads is {heads}, batch is {batch}")]
    Layouts {
        /// How many there are.
        got: usize,
        /// Heads of a batch element.
        heads: usize,
        /// Batch elements.
        batch: usize,
    },
    /// Another number of rows than blocks of queries.
    #[error("mask.csr has {got} rows of blocks, {queries} queries in blocks of {block} have {need}")]
    Rows {
        /// Rows of a layout.
        got: usize,
        /// Query tokens.
        queries: usize,
        /// Query tokens of a block.
        block: usize,
        /// Rows that there should be.
        need: usize,
    },
    /// A block behind the last key.
    #[error("mask.csr.columns[{at}] is {got}, {keys} keys in blocks of {block} have {limit}")]
    Beyond {
        /// Which column.
        at: usize,
        /// What it is.
        got: u32,
        /// Key tokens.
        keys: usize,
        /// Key tokens of a block.
        block: usize,
        /// Blocks that there are.
        limit: usize,
    },
}

impl Csr {
    /// Blocks of `query_block` times `key_block` tokens. `row_ptr` is `[layouts, rows of blocks + 1]`; each layout is a matrix of its own,
    /// whose pointers begin at 0 in its own part of `columns`, where layouts lie one after the other. The last block of either axis may
    /// reach past its end.
    ///
    /// # Errors
    /// [`CsrError`] if the lists contradict each other or themselves, or the columns of a row don't ascend. Whether there are as
    /// many layouts, rows and blocks as there should be shows with the shape.
    pub fn new(
        (query_block, key_block): (usize, usize),
        layouts: usize,
        row_ptr: Arc<[u32]>,
        columns: Arc<[u32]>,
    ) -> Result<Self, CsrError> {
        for (option, number) in [("query_block", query_block), ("key_block", key_block), ("layouts", layouts)]
        {
            if number == 0 {
                return Err(CsrError::Zero { option });
            }
        }
        if row_ptr.is_empty() || !row_ptr.len().is_multiple_of(layouts) {
            return Err(CsrError::RowPointers { got: row_ptr.len(), layouts });
        }
        let mut begins = Vec::new();
        let mut counted = 0_usize;
        for (layout, pointers) in row_ptr.chunks_exact(row_ptr.len() / layouts).enumerate() {
            if pointers[0] != 0 {
                return Err(CsrError::Begin { layout, got: pointers[0] });
            }
            if let Some(row) = pointers.windows(2).position(|pair| pair[1] < pair[0]) {
                let (end, before) = (pointers[row + 1], pointers[row]);
                return Err(CsrError::Descending { layout, row, end, before });
            }
            begins.push(counted);
            counted = counted.saturating_add(pointers.last().map_or(0, |end| *end as usize));
        }
        if counted != columns.len() {
            return Err(CsrError::Columns { got: columns.len(), counted });
        }
        let largest = columns.iter().copied().enumerate().max_by_key(|(_, column)| *column);
        let csr = Self { query_block, key_block, layouts, row_ptr, columns, begins: begins.into(), largest };
        for layout in 0..layouts {
            for row in 0..csr.rows() {
                let range = csr.range(layout, row);
                let pairs = csr.columns[range.clone()].windows(2);
                if let Some(at) = pairs.into_iter().position(|pair| pair[1] <= pair[0]) {
                    let at = range.start + at + 1;
                    let (got, before) = (csr.columns[at], csr.columns[at - 1]);
                    return Err(CsrError::Unsorted { at, got, before });
                }
            }
        }
        Ok(csr)
    }

    /// Query tokens of a block.
    pub fn query_block(&self) -> usize {
        self.query_block
    }

    /// Key tokens of a block.
    pub fn key_block(&self) -> usize {
        self.key_block
    }

    /// How many layouts there are: 1 for all heads, one for each head, or one for each head of each batch element.
    pub fn layouts(&self) -> usize {
        self.layouts
    }

    /// Where the columns of each row begin and end in those of its layout, `[layouts, rows of blocks + 1]`.
    pub fn row_ptr(&self) -> &[u32] {
        &self.row_ptr
    }

    /// The blocks of keys of each row, ascending; layouts one after the other.
    pub fn columns(&self) -> &[u32] {
        &self.columns
    }

    /// Rows of a layout.
    fn rows(&self) -> usize {
        self.row_ptr.len() / self.layouts - 1
    }

    /// Where the columns of a row lie.
    fn range(&self, layout: usize, row: usize) -> Range<usize> {
        let pointers = &self.row_ptr[layout * (self.rows() + 1) + row..][..2];
        let begin = self.begins[layout];
        begin + pointers[0] as usize..begin + pointers[1] as usize
    }

    /// Whether the lists are those of a shape's heads and tokens.
    pub(crate) fn check(&self, shape: &AttnShape) -> Result<(), CsrError> {
        let (heads, batch) = (shape.n_heads(), shape.batch());
        if ![1, heads, heads * batch].contains(&self.layouts) {
            return Err(CsrError::Layouts { got: self.layouts, heads, batch });
        }
        let (queries, block) = (shape.n_queries(), self.query_block);
        let need = queries.div_ceil(block);
        if self.rows() != need {
            return Err(CsrError::Rows { got: self.rows(), queries, block, need });
        }
        let (keys, block) = (shape.n_keys(), self.key_block);
        let limit = keys.div_ceil(block);
        match self.largest {
            Some((at, got)) if got as usize >= limit => Err(CsrError::Beyond { at, got, keys, block, limit }),
            _ => Ok(()),
        }
    }

    /// The keys of the row of query token `token` of head `head`, flattened over the batch.
    pub(crate) fn of_row(&self, head: usize, token: usize) -> KeyRuns<'_> {
        let range = self.range(head % self.layouts, token / self.query_block);
        KeyRuns::Blocks { numbers: &self.columns[range], keys: self.key_block }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn csr(layouts: usize, row_ptr: &[u32], columns: &[u32]) -> Result<Csr, CsrError> {
        Csr::new((2, 3), layouts, row_ptr.into(), columns.into())
    }

    #[test]
    fn rows_have_the_blocks_of_their_layout() {
        let csr = csr(2, &[0, 2, 3, 0, 0, 1], &[0, 4, 2, 1]).unwrap();
        let row = |head, token| match csr.of_row(head, token) {
            KeyRuns::Blocks { numbers, keys: 3 } => numbers.to_vec(),
            runs => panic!("{runs:?}"),
        };
        assert_eq!([row(0, 0), row(0, 1), row(0, 2), row(0, 3)], [vec![0, 4], vec![0, 4], vec![2], vec![2]]);
        // Heads of the second batch element have the layouts of the first.
        assert_eq!([row(3, 0), row(3, 2), row(2, 0)], [vec![], vec![1], vec![0, 4]]);
    }

    #[test]
    fn lists_that_contradict_themselves_are_refused() {
        for (refused, text) in [
            (csr(0, &[0], &[]), "mask.csr.layouts is 0"),
            (Csr::new((0, 1), 1, [0].into(), [].into()), "mask.csr.query_block is 0"),
            (Csr::new((1, 0), 1, [0].into(), [].into()), "mask.csr.key_block is 0"),
            (csr(2, &[0, 1, 1], &[0]), "mask.csr.row_ptr has 3 numbers, for 2 layouts"),
            (csr(1, &[], &[]), "mask.csr.row_ptr has 0 numbers, for 1 layouts"),
            (csr(2, &[0, 1, 1, 2], &[0, 0]), "mask.csr.row_ptr[1] begins at 1, not at 0"),
            (csr(1, &[0, 2, 1], &[0]), "mask.csr.row_ptr[0]: row 1 ends at 1, the one before at 2"),
            (csr(2, &[0, 1, 0, 2], &[0, 0]), "mask.csr.columns has 2 numbers, row_ptr points to 3"),
            (csr(1, &[0, 1, 3], &[5, 2, 2]), "mask.csr.columns[2] is 2 behind 2 in the same row"),
            (csr(1, &[0, 2], &[1, 0]), "mask.csr.columns[1] is 0 behind 1 in the same row"),
        ] {
            assert_eq!(refused.unwrap_err().to_string(), text);
        }
    }
}
