//! What a reader may see of a session now.

use std::cmp::Ordering;

use super::{Ledger, LedgerError, Read, ReadRequest};
use crate::session::op::Change;

impl<E: Clone> Ledger<E> {
    /// Looks at a request to read.
    ///
    /// # Errors
    /// If there are no such tokens, or nobody to read them from now.
    pub fn check_read(&self, request: &ReadRequest) -> Result<Read, LedgerError<E>> {
        self.check_lost()?;
        let ReadRequest { layer, at_len, generation, min_len, min_len_generation, after } = *request;
        let has_reader = |shard: usize| self.computing(shard).next().is_some();
        if self.is_restarting || !(0..self.shards.len()).all(has_reader) {
            return Err(LedgerError::Recovering { is_in_flight: false });
        }
        let committed = match after.map(|op| op.change) {
            Some(Change::Append { layer: grown, base_len, tokens }) if grown == layer => {
                self.tokens_of(layer)?.max(base_len + tokens)
            }
            _ => self.tokens_of(layer)?,
        };
        let committed = match self.unseen().map(|op| op.change) {
            Some(Change::Append { layer: grown, base_len, .. }) if grown == layer => base_len,
            Some(Change::Truncate { .. }) => return Err(LedgerError::Recovering { is_in_flight: false }),
            _ => committed,
        };
        if let Some(request) = generation.filter(|generation| *generation != self.generation) {
            return Err(LedgerError::Generation { session: self.generation, request });
        }
        let min_len = match min_len_generation.cmp(&self.generation) {
            // Another session of this name, or what can't be.
            Ordering::Greater => {
                return Err(LedgerError::Generation {
                    session: self.generation,
                    request: min_len_generation,
                });
            }
            Ordering::Equal => min_len,
            Ordering::Less => 0,
        };
        // Tokens that are there, which nobody may see yet: soon.
        let unconfirmed = committed + 1..=self.tokens_of(layer)?;
        if unconfirmed.contains(&min_len) || at_len.is_some_and(|at_len| unconfirmed.contains(&at_len)) {
            return Err(LedgerError::Recovering { is_in_flight: false });
        }
        if committed < min_len {
            return Err(LedgerError::Behind { committed, min_len });
        }
        let at_len = at_len.unwrap_or(committed);
        if at_len > committed {
            return Err(LedgerError::AtLen { at_len, committed });
        }
        if at_len == 0 {
            return Err(LedgerError::Empty);
        }
        Ok(Read { generation: self.generation, at_len })
    }
}
