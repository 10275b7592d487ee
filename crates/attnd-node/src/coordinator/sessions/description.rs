//! What is told of a session: what it is, what it has, and how well its shards are.

use std::sync::Arc;

use attnd_plan::Piece;
use attnd_plan::session::{Ledger, Phase};
use attnd_wire::session::{SessionDescription, ShardDescription, ShardHealth};
use attnd_wire::{Error, Reason};

use super::Sessions;
use super::session::{Session, readers};

impl Session {
    /// How its worst shard is.
    pub(super) fn health(&self) -> ShardHealth {
        let state = self.lock();
        let shards = (0..self.pieces.len()).map(|shard| health(&state.ledger, shard));
        shards.max().unwrap_or(ShardHealth::Open)
    }

    /// What a client is told of it.
    ///
    /// # Errors
    /// [`Reason::Recovering`] as long as nobody knows what it has.
    pub(super) fn describe(&self, sessions: &Sessions, created: bool) -> Result<SessionDescription, Error> {
        let state = self.lock();
        let ledger = &state.ledger;
        if ledger.is_restarting() && !ledger.is_lost() {
            return Err(Error::new(Reason::Recovering, ""));
        }
        let shard = |(shard, pieces): (usize, &Arc<[Piece]>)| ShardDescription {
            pieces: pieces.to_vec(),
            epoch: ledger.epoch(shard),
            health: health(ledger, shard),
            workers: readers(ledger, shard).map(|holder| holder.worker.clone()).collect(),
            bytes: self.bytes_of(ledger, shard),
        };
        let idle = sessions.now().saturating_sub(ledger.idle_since());
        Ok(SessionDescription {
            name: self.name.clone(),
            spec: self.spec.clone(),
            created,
            generation: ledger.generation(),
            sealed: ledger.is_sealed(),
            writer_epoch: ledger.writer_epoch(),
            next_op_seq: ledger.next_seq(),
            tokens: ledger.tokens().iter().map(|tokens| *tokens as u64).collect(),
            shards: self.pieces.iter().enumerate().map(shard).collect(),
            ttl_left: self.spec.ttl.saturating_sub(idle),
        })
    }
}

fn health(ledger: &Ledger<Error>, shard: usize) -> ShardHealth {
    match ledger.phase(shard) {
        Phase::Open if ledger.is_short(shard) => ShardHealth::Repairing,
        Phase::Open => ShardHealth::Open,
        Phase::Recovering => ShardHealth::Recovering,
        Phase::Degraded => ShardHealth::Degraded,
        Phase::Lost => ShardHealth::Lost,
    }
}
