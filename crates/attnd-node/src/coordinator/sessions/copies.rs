//! Copies of replicas from one worker to another.
//!
//! The bytes go through here: workers know nobody but their coordinator, and needn't reach each other. A few chunks of a copy are on
//! their way at a time, over the streams for bytes in bulk, so a copy takes a bounded part of memory, and steps don't queue behind it.
//! Checksums are those of the worker that gives, and are checked by the one that takes.

use std::collections::VecDeque;
use std::sync::Arc;

use attnd_plan::Piece;
use attnd_plan::session::{Holder, LedgerEvent, Phase, SessionSpec};
use attnd_wire::hold::{
    CopyBase, ExportRead, HoldAnswer, HoldAsk, HoldReply, ShardAt, ShardExport, ShardImport, ShardState,
};
use attnd_wire::{Error, Reason};

use super::Sessions;
use super::open::release;
use super::session::Session;
use super::upkeep::{ask, encode, state_of};
use crate::coordinator::hold_link::{Answer, HoldLink, Parts};

/// Chunks of one copy that were asked for and have not been passed on.
const WINDOW: usize = 4;

/// Whose fault it is that a copy can't be made.
#[derive(Debug)]
enum Failed {
    /// Of the worker that has the replica.
    Source(Error),
    /// Of the one that was to get it.
    Target(Error),
}

/// What is to be copied where.
#[derive(Debug)]
struct Copy {
    term: u64,
    at: ShardAt,
    spec: SessionSpec,
    pieces: Arc<[Piece]>,
    source: Arc<HoldLink>,
    target: Arc<HoldLink>,
}

impl Sessions {
    /// Has a replica copied, in a task, whose end the ledger hears. Copies wait for each other, but for those that a shard waits for,
    /// which are of what came during another copy.
    pub(super) fn begin_copy(
        self: &Arc<Self>,
        session: &Arc<Session>,
        shard: usize,
        (from, to): (Holder, Holder),
        epoch: u64,
    ) {
        let (links, is_awaited, bytes) = {
            let state = session.lock();
            let link = |holder: &Holder| state.links.get(holder).cloned();
            let is_awaited = state.ledger.phase(shard) == Phase::Recovering;
            (link(&from).zip(link(&to)), is_awaited, session.bytes_of(&state.ledger, shard))
        };
        let (sessions, session) = (Arc::clone(self), Arc::clone(session));
        let copy = links.zip(session.pieces.get(shard)).map(|((source, target), pieces)| Copy {
            term: self.term,
            at: ShardAt { session: session.number, shard: shard as u32, epoch },
            spec: session.spec.clone(),
            pieces: Arc::clone(pieces),
            source,
            target,
        });
        let expected = self.repairs.expect(&to, bytes);
        self.tasks.spawn(async move {
            let _turn = if is_awaited { None } else { sessions.repairs.turn().await };
            if session.lock().closed.is_some() {
                // It was while it waited.
                return;
            }
            let copied = match &copy {
                Some(copy) => copy.run().await,
                None => Err(Failed::Target(Error::new(Reason::Transport, "no stream to one of both"))),
            };
            drop(expected);
            sessions.end_copy(&session, shard, to, copy, copied);
        });
    }

    fn end_copy(
        self: &Arc<Self>,
        session: &Arc<Session>,
        shard: usize,
        to: Holder,
        copy: Option<Copy>,
        copied: Result<ShardState, Failed>,
    ) {
        let name = &session.name;
        let fails = |why: &Error| {
            tracing::info!(session = %name, shard, worker = %to.worker, error = %why, "a replica is not copied");
            self.put_off(session, shard, &to);
        };
        match (copied, copy) {
            (Ok(state), copy) => {
                tracing::info!(session = %name, shard, worker = %to.worker, epoch = state.epoch, "a replica is copied");
                let is_closed = {
                    let mut of_session = session.lock();
                    of_session.repair.succeeded(&to);
                    of_session.closed.is_some()
                };
                session.handle(self, LedgerEvent::Copied { shard, holder: to, state: state.into() });
                // Who closed the session may have looked before the replica was there.
                if let Some(Copy { term, at, target, .. }) = copy.filter(|_| is_closed) {
                    // What the ledger just asked for is of this epoch, and may come first.
                    let epoch = session.lock().ledger.epoch(shard);
                    self.tasks.spawn(release(term, target, ShardAt { epoch, ..at }));
                }
            }
            // The ledger chooses another source.
            (Err(Failed::Source(error)), Some(copy)) if error.reason == Reason::Transport => {
                session.disconnected(self, &copy.source);
            }
            // It is damaged, or gone.
            (Err(Failed::Source(error)), Some(copy))
                if matches!(error.reason, Reason::Checksum | Reason::Shard) =>
            {
                let (holder, epoch) = (copy.source.holder.clone(), copy.at.epoch);
                tracing::warn!(session = %name, shard, worker = %holder.worker, %error, "a replica can't be copied");
                session.handle(self, LedgerEvent::Gone { shard, holder, epoch });
                session.handle(self, LedgerEvent::CopyFailed { shard, holder: to });
            }
            (Err(Failed::Target(error)), Some(copy)) if error.reason == Reason::Transport => {
                fails(&error);
                session.disconnected(self, &copy.target);
            }
            (Err(Failed::Source(error) | Failed::Target(error)), _) => {
                fails(&error);
                session.handle(self, LedgerEvent::CopyFailed { shard, holder: to });
            }
        }
    }
}

impl Copy {
    async fn run(&self) -> Result<ShardState, Failed> {
        let Self { term, at, source, target, .. } = self;
        let base = match ask(*term, Arc::clone(target), HoldAsk::Look(*at)).await {
            Ok(state) => Some(CopyBase::of(&state)),
            Err(error) if error.reason == Reason::Shard => None,
            Err(error) => return Err(Failed::Target(error)),
        };
        let export = encode(HoldAsk::Export(ShardExport { at: *at, base })).map_err(Failed::Source)?;
        let (export, answer) = source.bulk.begin(*term, export).await.map_err(Failed::Source)?;
        let export = export.request();
        let copied = self.pass_on(export, answer).await;
        if copied.is_err()
            && let Ok(end) = encode(HoldAsk::End(export))
        {
            // Nobody needs what it says; a stream that ended has forgotten it.
            source.bulk.ask(*term, end).await.ok();
        }
        copied
    }

    /// Has what is exported imported.
    async fn pass_on(&self, export: u64, begun: Answer) -> Result<ShardState, Failed> {
        let Self { term, at, spec, pieces, source, target } = self;
        let begun = begun.parts().await.and_then(answer_of).map_err(Failed::Source)?;
        let HoldAnswer::Snapshot(snapshot) = begun else { return Err(Failed::Source(other_answer())) };
        snapshot.check(spec).map_err(Failed::Source)?;
        let chunks = snapshot.chunks(spec, pieces);
        let (spec, pieces) = (spec.clone(), pieces.to_vec());
        let import = ShardImport { at: *at, spec, pieces, snapshot: *snapshot };
        let import = encode(HoldAsk::Import(Box::new(import))).map_err(Failed::Target)?;
        let (upload, answer) = target.bulk.begin(*term, import).await.map_err(Failed::Target)?;
        let request = upload.request();
        let sends = async {
            let mut reads: VecDeque<Answer> = VecDeque::new();
            let mut unread = 0..chunks;
            for index in 0..chunks {
                while reads.len() < WINDOW
                    && let Some(next) = unread.next()
                {
                    let read = encode(HoldAsk::Read(ExportRead { export, index: next }));
                    let read = source.bulk.ask(*term, read.map_err(Failed::Source)?).await;
                    reads.push_back(read.map_err(Failed::Source)?);
                }
                let Some(read) = reads.pop_front() else { return Err(Failed::Source(other_answer())) };
                let chunk = match read.parts().await.and_then(answer_of).map_err(Failed::Source)? {
                    HoldAnswer::Chunk(chunk) if chunk.index == index => chunk,
                    _other => return Err(Failed::Source(other_answer())),
                };
                let chunk = encode(HoldAsk::Copied(chunk)).map_err(Failed::Target)?;
                upload.send(chunk).await.map_err(Failed::Target)?;
            }
            let end = encode(HoldAsk::End(export)).map_err(Failed::Source)?;
            let ended = source.bulk.ask(*term, end).await.map_err(Failed::Source)?;
            let ended = ended.parts().await.and_then(answer_of).map_err(Failed::Source)?;
            let HoldAnswer::Sum(sum) = ended else { return Err(Failed::Source(other_answer())) };
            let sum = encode(HoldAsk::Sum(sum)).map_err(Failed::Target)?;
            upload.send(sum).await.map_err(Failed::Target)
        };
        let mut answered = std::pin::pin!(answer.parts());
        let sent = tokio::select! {
            biased;
            // It says why it takes no more.
            answered = &mut answered => return answered.and_then(state_of).map_err(Failed::Target),
            sent = sends => sent,
        };
        match sent {
            Ok(()) => answered.await.and_then(state_of).map_err(Failed::Target),
            Err(error) => {
                target.bulk.give_up(request, *term).await;
                Err(error)
            }
        }
    }
}

/// The answer of one part.
///
/// # Errors
/// What the worker says, and [`Reason::ReplyInvalid`].
fn answer_of(parts: Parts) -> Result<HoldAnswer, Error> {
    let last = parts.into_iter().next_back().map(HoldReply::try_from).transpose()?;
    match last.map(|reply| reply.answer) {
        Some(HoldAnswer::Failed(error)) => Err(error),
        Some(answer) => Ok(answer),
        None => Err(other_answer()),
    }
}

fn other_answer() -> Error {
    Error::new(Reason::ReplyInvalid, "something else than what a copy needs")
}
