//! The rows of one query head as they arrive, in any cut.

/// Rows that come one after another; a row cut by a message boundary waits in `staged`.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    pub(super) row_bytes: usize,
    /// Whole rows handed on.
    pub(super) done: usize,
    staged: Vec<u8>,
}

impl Rows {
    pub(super) fn new(row_bytes: usize) -> Self {
        Self { row_bytes, done: 0, staged: Vec::new() }
    }

    /// The next expected byte.
    pub(super) fn position(&self) -> u64 {
        (self.done * self.row_bytes + self.staged.len()) as u64
    }

    /// Hands on whole rows, as many at a time as lie together: `store(index of the first row, bytes)`.
    pub(super) fn take<E>(
        &mut self,
        data: &[u8],
        mut store: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = data;
        if !self.staged.is_empty() {
            let missing = (self.row_bytes - self.staged.len()).min(rest.len());
            self.staged.extend_from_slice(&rest[..missing]);
            rest = &rest[missing..];
            if self.staged.len() < self.row_bytes {
                return Ok(());
            }
            store(self.done, &self.staged)?;
            self.done += 1;
            self.staged = Vec::new();
        }
        let whole = rest.len() / self.row_bytes * self.row_bytes;
        if whole > 0 {
            store(self.done, &rest[..whole])?;
            self.done += whole / self.row_bytes;
        }
        self.staged.extend_from_slice(&rest[whole..]);
        Ok(())
    }
}
