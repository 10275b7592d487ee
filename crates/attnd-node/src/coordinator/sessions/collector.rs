//! Sends the parts of steps to workers and takes what comes back, until every step has all that it waits for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use attnd_plan::omission::{Omission, omits};
use attnd_wire::hold::{HoldAnswer, HoldAsk, HoldReply, HoldRequest, ShardResult, ShardWork};
use attnd_wire::limits::MAX_ENTRIES;
use attnd_wire::{Error, Reason};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};

use super::Sessions;
use super::steps::{QueriesState, RowsState, Running};
use super::works::{self, bytes_of};
use crate::coordinator::hold_link::{HoldLink, Parts};

/// Bytes of tensors in one message to a worker, unless one part alone has more.
const MESSAGE_BYTES: usize = 4 << 20;

/// How often queries are asked of a replica whose shard's epoch grows meanwhile.
const MAX_AGAIN: u8 = 5;

/// What a part of a message belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) step: usize,
    pub(super) shard: usize,
    /// Of the shard, when it was sent.
    pub(super) epoch: u64,
    /// It has rows.
    pub(super) appends: bool,
    /// It has queries.
    pub(super) computes: bool,
    /// How often its queries were asked of this replica because the shard's epoch had grown.
    pub(super) again: u8,
}

struct Message {
    link: Arc<HoldLink>,
    sent: Vec<Sent>,
    works: Vec<ShardWork>,
    bytes: usize,
}

type Answered = BoxFuture<'static, (Arc<HoldLink>, Vec<Sent>, Result<Parts, Error>)>;

/// Steps under way.
pub(super) struct Collector {
    sessions: Arc<Sessions>,
    pub(super) steps: BTreeMap<usize, Running>,
    unsent: VecDeque<Message>,
    answers: FuturesUnordered<Answered>,
}

impl Collector {
    pub(super) fn new(sessions: Arc<Sessions>) -> Self {
        let (steps, unsent, answers) = (BTreeMap::new(), VecDeque::new(), FuturesUnordered::new());
        Self { sessions, steps, unsent, answers }
    }

    /// Adds a part to the message that goes to this worker.
    pub(super) fn add(&mut self, link: &Arc<HoldLink>, sent: Sent, work: ShardWork) {
        let bytes = bytes_of(&work);
        let fits = |message: &&mut Message| {
            Arc::ptr_eq(&message.link, link)
                && message.works.len() < MAX_ENTRIES
                && message.bytes + bytes <= MESSAGE_BYTES
        };
        match self.unsent.iter_mut().find(fits) {
            Some(message) => {
                message.sent.push(sent);
                message.works.push(work);
                message.bytes += bytes;
            }
            None => self.unsent.push_back(Message {
                link: Arc::clone(link),
                sent: vec![sent],
                works: vec![work],
                bytes,
            }),
        }
    }

    /// Sends what was added.
    pub(super) async fn send(&mut self) {
        while let Some(Message { link, sent, works, .. }) = self.unsent.pop_front() {
            let request = HoldRequest { request: 0, term: self.sessions.term, ask: HoldAsk::Works(works) };
            // The number is the lane's to give.
            let Some(ask) = attnd_wire::proto::HoldRequest::from(request).ask else { continue };
            let term = self.sessions.term;
            // Everything of an op that has begun must get on its way, or its link is lost: both are an answer.
            let asked = Box::pin(async move {
                let answered = match link.control.ask(term, ask).await {
                    Ok(answer) => answer.parts().await,
                    Err(error) => Err(error),
                };
                (link, sent, answered)
            });
            self.answers.push(asked);
        }
    }

    /// Takes answers until there are no more to come; shards whose replica is lost are asked of another one.
    pub(super) async fn finish(&mut self) {
        while let Some((link, sent, answered)) = self.answers.next().await {
            match answered.and_then(|parts| results_of(parts, sent.len())) {
                Ok(results) => {
                    for (sent, results) in sent.into_iter().zip(results) {
                        self.take(&link, sent, results);
                    }
                }
                Err(error) => {
                    tracing::debug!(worker = %link.holder.worker, %error, "a worker that holds shards is lost");
                    for sent in sent {
                        self.lose(&link, sent, &error);
                    }
                }
            }
            self.send().await;
        }
    }

    /// Takes all results of one part.
    fn take(&mut self, link: &Arc<HoldLink>, sent: Sent, results: Vec<ShardResult>) {
        let Some(step) = self.steps.get_mut(&sent.step) else { return };
        let mut failure = None;
        let mut runs = Vec::new();
        let mut applied = None;
        for result in results {
            applied = applied.or(result.applied);
            runs.extend(result.partials);
            failure = failure.or(result.failure);
        }
        let is_refused = sent.appends && applied.is_none();
        if let RowsState::Sent(op, _) = &step.rows
            && sent.appends
        {
            match (applied, &failure) {
                (Some(state), _) => step.session.applied(&self.sessions, sent.shard, &link.holder, op, state),
                (None, Some(error)) => {
                    step.session.refused(&self.sessions, (sent.shard, sent.epoch), &link.holder, op, error)
                }
                (None, None) => {
                    let error = Error::new(Reason::ReplyInvalid, "rows that nothing is said of");
                    step.session.refused(&self.sessions, (sent.shard, sent.epoch), &link.holder, op, &error);
                }
            }
        }
        if !sent.computes {
            return;
        }
        let QueriesState::Asked(asked) = &mut step.queries else { return };
        let view = step.session.view();
        let Some(shard) = view.shards.get(sent.shard) else { return };
        let partials = match failure {
            Some(error) => Err(error),
            None => {
                let cells = asked.queries.cells_of(shard, &asked.call);
                let decoded: Result<Vec<Vec<(CellId, PartialRows)>>, Error> =
                    runs.iter().map(|run| run.decode(&cells, &asked.call)).collect();
                decoded.and_then(|decoded| complete(decoded.into_iter().flatten().collect(), &cells))
            }
        };
        match partials {
            Ok(partials) => {
                asked.attempt.take(sent.shard, &link.holder, partials);
            }
            // The op is taken back everywhere: nobody has what the queries are about.
            Err(error) if is_refused => step.queries = QueriesState::Failed(error),
            // The shard's members changed meanwhile; this one may still be one of them.
            Err(error) if error.reason == Reason::Epoch && sent.again < MAX_AGAIN => {
                self.ask_again(link, sent)
            }
            Err(error) if is_of_the_replica(&error) => self.ask_another(link, sent, &error),
            // The ledger knew of no cut, so one is under way that isn't acknowledged yet.
            Err(error) if error.reason == Reason::Generation => {
                let error = Error::new(Reason::Recovering, "the session is being cut");
                step.queries = QueriesState::Failed(error);
            }
            Err(error) => step.queries = QueriesState::Failed(error),
        }
    }

    /// A part will have no answer.
    fn lose(&mut self, link: &Arc<HoldLink>, sent: Sent, error: &Error) {
        let Some(step) = self.steps.get(&sent.step) else { return };
        step.session.lost(&self.sessions, link);
        if sent.computes {
            self.ask_another(link, sent, error);
        }
    }

    /// Asks the same replica for the partials of a shard, in the epoch that it has now.
    fn ask_again(&mut self, link: &Arc<HoldLink>, sent: Sent) {
        let Some(step) = self.steps.get(&sent.step) else { return };
        let QueriesState::Asked(asked) = &step.queries else { return };
        let view = step.session.view();
        let Some(shard) = view.shards.get(sent.shard) else { return };
        let queries = asked.queries.of_shard(shard, &step.session.spec);
        let work = works::work(shard.at, step.layer, None, Some(queries));
        let sent = Sent { epoch: shard.at.epoch, appends: false, again: sent.again + 1, ..sent };
        self.add(link, sent, work);
    }

    /// Asks another replica for the partials of a shard.
    fn ask_another(&mut self, link: &Arc<HoldLink>, sent: Sent, error: &Error) {
        let Some(step) = self.steps.get_mut(&sent.step) else { return };
        let QueriesState::Asked(asked) = &mut step.queries else { return };
        let view = step.session.view();
        let next = match asked.attempt.fail(sent.shard, &link.holder) {
            Ok(None) => return,
            Ok(Some(next)) => view.shards.get(sent.shard).and_then(|shard| {
                let link = shard.links.iter().find(|link| link.holder == next)?;
                Some((
                    Arc::clone(link),
                    shard.at.epoch,
                    works::work(
                        shard.at,
                        step.layer,
                        None,
                        Some(asked.queries.of_shard(shard, &step.session.spec)),
                    ),
                ))
            }),
            Err(_nobody) => None,
        };
        match next {
            Some((link, epoch, work)) => {
                let sent = Sent { epoch, appends: false, computes: true, again: 0, ..sent };
                self.add(&link, sent, work);
            }
            None => step.queries = QueriesState::Failed(error.clone()),
        }
    }
}

impl Drop for Collector {
    /// Brings to an end what has begun to change sessions.
    fn drop(&mut self) {
        let has_begun = self.steps.values().any(|step| matches!(step.rows, RowsState::Sent(..)));
        if !has_begun || (self.unsent.is_empty() && self.answers.is_empty()) {
            return;
        }
        let mut rest = Self {
            sessions: Arc::clone(&self.sessions),
            steps: std::mem::take(&mut self.steps),
            unsent: std::mem::take(&mut self.unsent),
            answers: std::mem::take(&mut self.answers),
        };
        for step in rest.steps.values_mut() {
            step.queries = QueriesState::None;
        }
        let tasks = self.sessions.tasks.clone();
        tasks.spawn(async move {
            rest.send().await;
            rest.finish().await;
            // It has ended, and mustn't begin again.
            rest.steps.clear();
        });
    }
}

/// The results of each part of a message, of which there were `n`.
fn results_of(parts: Parts, n: usize) -> Result<Vec<Vec<ShardResult>>, Error> {
    let mut results: Vec<Vec<ShardResult>> = (0..n).map(|_| Vec::new()).collect();
    for part in parts {
        match HoldReply::try_from(part)?.answer {
            HoldAnswer::Results(of_part) => {
                for result in of_part {
                    let place = results.get_mut(result.work);
                    let work = result.work;
                    place
                        .ok_or_else(|| {
                            Error::new(Reason::ReplyInvalid, format!("result of work {work} of {n}"))
                        })?
                        .push(result);
                }
            }
            // All of the message is refused: a worker that has no room for it, or takes nothing more, has lost nothing.
            HoldAnswer::Failed(error) => {
                for (work, results) in results.iter_mut().enumerate() {
                    let failure = Some(error.clone());
                    results.push(ShardResult { work, failure, ..ShardResult::default() });
                }
            }
            _other => return Err(Error::new(Reason::ReplyInvalid, "something else in the place of results")),
        }
    }
    Ok(results)
}

/// All cells of a shard, each once.
fn complete(
    mut partials: Vec<(CellId, PartialRows)>,
    cells: &[CellId],
) -> Result<Vec<(CellId, PartialRows)>, Error> {
    // Runs come in order, but nothing says so.
    let place = |cell: &CellId| cells.iter().position(|other| other == cell);
    let in_order = partials.iter().map(|(cell, _)| cell).eq(cells);
    if !in_order {
        partials.sort_by_key(|(cell, _)| place(cell));
    }
    if partials.iter().map(|(cell, _)| cell).eq(cells) || omits(Omission::CoverageCheck) {
        return Ok(partials);
    }
    Err(Error::new(Reason::Coverage, format!("{} cells, the shard has {}", partials.len(), cells.len())))
}

/// Whether another replica may do better.
fn is_of_the_replica(error: &Error) -> bool {
    matches!(
        error.reason,
        Reason::Transport
            | Reason::Internal
            | Reason::Shard
            | Reason::Epoch
            | Reason::KvBudget
            | Reason::Overloaded
            | Reason::Draining
            | Reason::Coverage
            | Reason::PartialInvalid
            | Reason::ReplyInvalid
            | Reason::Checksum
            | Reason::KernelMix
    )
}
