//! Puts the rows of the answer in their places: each exactly once, in whatever order they come.

use attnd_kernel::AttnShape;
use attnd_wire::{ContextChunk, Error, Reason};

/// The answer as far as it is here.
#[derive(Debug)]
pub(crate) struct ContextAssembly {
    shape: AttnShape,
    /// `[batch, heads, queries, value_dim]`.
    context: Vec<f32>,
    /// `[batch, heads, queries]`.
    lse: Vec<f32>,
    /// One bit per row.
    seen: Vec<u64>,
    rows: u64,
}

impl ContextAssembly {
    /// Room for the whole answer.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] if this process can't get the memory; worth knowing before anything is sent.
    pub(crate) fn new(shape: AttnShape) -> Result<Self, Error> {
        let rows = shape.batch() * shape.n_heads() * shape.n_queries();
        let elements = rows * shape.value_dim();
        let room = || Some((zeros(elements)?, zeros(rows)?, zeros(rows.div_ceil(64))?));
        let (context, lse, seen) = room().ok_or_else(|| {
            let bytes = (elements + rows) * size_of::<f32>();
            let detail = format!(
                "the result, {elements} context elements and {rows} lse, takes {bytes} bytes, more than the client \
                 can get; split the call by heads or queries"
            );
            Error::new(Reason::ShapeLimit, detail)
        })?;
        Ok(Self { shape, context, lse, seen, rows: 0 })
    }

    /// Rows that are here.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Rows of the whole answer.
    pub(crate) fn total_rows(&self) -> u64 {
        self.lse.len() as u64
    }

    /// Takes some rows. After an error the answer is of no use.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for a row that came before or that the call doesn't have.
    pub(crate) fn accept(&mut self, chunk: &ContextChunk) -> Result<(), Error> {
        let n_queries = self.shape.n_queries();
        let dim = self.shape.value_dim();
        let n_tokens = chunk.tokens.len();
        let of_heads =
            chunk.lse.chunks_exact(n_tokens.max(1)).zip(chunk.context.chunks_exact((n_tokens * dim).max(1)));
        if of_heads.len() != chunk.heads.len() || chunk.tokens.end > n_queries {
            return Err(invalid(format!(
                "heads {:?} tokens {:?} have other lengths",
                chunk.heads, chunk.tokens
            )));
        }
        for (head, (lse, context)) in chunk.heads.clone().zip(of_heads) {
            let first = head * n_queries + chunk.tokens.start;
            for row in first..first + n_tokens {
                let bit = 1 << (row % 64);
                match self.seen.get_mut(row / 64) {
                    Some(word) if *word & bit == 0 => *word |= bit,
                    Some(_) => {
                        return Err(invalid(format!("head {head} token {} came twice", row % n_queries)));
                    }
                    None => return Err(invalid(format!("there is no head {head}"))),
                }
            }
            let places = (
                self.lse.get_mut(first..first + n_tokens),
                self.context.get_mut(first * dim..(first + n_tokens) * dim),
            );
            let (Some(lse_place), Some(context_place)) = places else {
                return Err(invalid(format!("there is no head {head}")));
            };
            lse_place.copy_from_slice(lse);
            context_place.copy_from_slice(context);
            self.rows += n_tokens as u64;
        }
        Ok(())
    }

    /// Context and lse, if every row is here.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] with the number of rows that are missing.
    pub(crate) fn finish(self) -> Result<(Vec<f32>, Vec<f32>), Error> {
        match self.total_rows() - self.rows {
            0 => Ok((self.context, self.lse)),
            missing => Err(invalid(format!("{missing} of {} rows are missing", self.total_rows()))),
        }
    }
}

/// `len` zeros, or `None` where `vec!` would abort the process.
pub(crate) fn zeros<T: Clone + Default>(len: usize) -> Option<Vec<T>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(len).ok()?;
    zeros.resize(len, T::default());
    Some(zeros)
}

fn invalid(detail: String) -> Error {
    Error::new(Reason::ReplyInvalid, detail)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use attnd_kernel::Dims;

    use super::*;

    fn assembly() -> ContextAssembly {
        let dims = Dims { batch: 1, heads: 5, kv_heads: 1, queries: 30, keys: 1, head_dim: 1, value_dim: 2 };
        ContextAssembly::new(AttnShape::new(dims).unwrap()).unwrap()
    }

    /// Rows that tell where they belong.
    fn chunk(heads: Range<usize>, tokens: Range<usize>) -> ContextChunk {
        let row = |head: usize, token: usize| (head * 100 + token) as f32;
        let rows: Vec<f32> =
            heads.clone().flat_map(|head| tokens.clone().map(move |token| row(head, token))).collect();
        let context = rows.iter().flat_map(|row| [*row, -row]).collect();
        ContextChunk { heads, tokens, lse: rows, context }
    }

    #[test]
    fn memory_that_no_machine_has_is_refused_and_not_an_abort() {
        assert_eq!(zeros::<f32>(usize::MAX / 8), None);
        assert_eq!(zeros::<f32>(3), Some(vec![0.0; 3]));
    }

    #[test]
    fn rows_find_their_places_in_any_order() {
        let mut assembly = assembly();
        for (heads, tokens) in [(3..5, 7..30), (0..3, 0..30), (3..5, 0..7)] {
            assembly.accept(&chunk(heads, tokens)).unwrap();
        }
        assert_eq!(assembly.rows(), assembly.total_rows());
        let (context, lse) = assembly.finish().unwrap();
        for (at, value) in lse.iter().enumerate() {
            assert_eq!(*value, ((at / 30) * 100 + at % 30) as f32);
            assert_eq!(context[2 * at..2 * at + 2], [*value, -value]);
        }
    }

    #[test]
    fn a_row_that_comes_twice_is_refused() {
        let mut assembly = assembly();
        assembly.accept(&chunk(0..1, 0..10)).unwrap();
        let error = assembly.accept(&chunk(0..2, 9..12)).unwrap_err();
        assert_eq!(error.message(), "REPLY_INVALID: head 0 token 9 came twice");
    }

    #[test]
    fn a_missing_row_is_no_answer() {
        let mut assembly = assembly();
        assembly.accept(&chunk(0..5, 0..29)).unwrap();
        assert_eq!(assembly.finish().unwrap_err().message(), "REPLY_INVALID: 5 of 150 rows are missing");
    }

    #[test]
    fn impossible_rows_are_refused() {
        assert!(assembly().accept(&chunk(5..6, 20..30)).is_err());
        assert!(assembly().accept(&chunk(0..1, 29..31)).is_err());
        let short = ContextChunk { lse: vec![0.0; 9], ..chunk(0..1, 0..10) };
        assert!(assembly().accept(&short).is_err());
    }
}
