//! Sends the parts of steps to workers and takes what comes back, until every step has all that it waits for: the partials of each shard,
//! and the ledger's word on its rows. A replica that others don't wait for may answer later; it is heard all the same.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use attnd_plan::omission::{Omission, omits};
use attnd_plan::session::Op;
use attnd_wire::hold::{HoldAnswer, HoldReply, ShardResult, timeout_ms};
use attnd_wire::limits::{HOLD_REQUEST_BYTES, MAX_ENTRIES, entry_bytes};
use attnd_wire::proto::{self, hold_request::Ask};
use attnd_wire::session::Applied;
use attnd_wire::surroundings::now;
use attnd_wire::{Deadline, Error, Reason};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio_util::sync::CancellationToken;

use super::Sessions;
use super::session::Session;
use super::steps::{Ended, QueriesState, RowsState, Running};
use super::works;
use crate::coordinator::hold_link::{HoldLink, Parts};

/// Bytes of one message to a worker, unless one part alone has more. What a client says in one message is never too much for one.
const MESSAGE_BYTES: usize = 4 << 20;
const _: () = assert!(MESSAGE_BYTES < HOLD_REQUEST_BYTES);

/// How often queries are asked of a replica whose shard's epoch grows meanwhile.
const MAX_AGAIN: u8 = 5;

/// What a part of a message belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) step: usize,
    /// Which attempt of the step: what comes of an earlier one may be over other tokens.
    pub(super) attempt: u8,
    pub(super) shard: usize,
    /// Of the shard, when it was sent.
    pub(super) epoch: u64,
    /// It has rows.
    pub(super) appends: bool,
    /// It has queries.
    pub(super) computes: bool,
    /// How much its queries are to do.
    pub(super) work: u64,
    /// How often its queries were asked of this replica because the shard's epoch had grown.
    pub(super) again: u8,
    /// Another replica is asked too, which is late.
    pub(super) is_hedge: bool,
}

struct Message {
    link: Arc<HoldLink>,
    sent: Vec<Sent>,
    works: Vec<proto::ShardWork>,
    bytes: usize,
    is_hedge: bool,
}

/// A message that isn't answered yet.
pub(super) struct Flying {
    pub(super) link: Arc<HoldLink>,
    pub(super) sent: Vec<Sent>,
    /// How much all of its queries are to do.
    pub(super) work: u64,
    pub(super) since: Instant,
    /// When others may be asked for what isn't here; `None`: never, or not any more.
    pub(super) due: Option<Instant>,
    pub(super) is_hedge: bool,
    /// Another replica was asked too, and was first.
    pub(super) is_overtaken: bool,
}

/// What becomes of the partials of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// There are none, or none that count.
    Nothing,
    /// They are the first of their shard.
    First,
    /// Another replica's are there.
    Late,
}

type Answered = BoxFuture<'static, (u64, Result<Parts, Error>)>;
type Settled = BoxFuture<'static, (usize, Result<Applied, Error>)>;

/// Steps under way.
pub(super) struct Collector {
    pub(super) sessions: Arc<Sessions>,
    pub(super) steps: BTreeMap<usize, Running>,
    /// The appends of steps, which have begun. They are told of whoever answers, as long as somebody may.
    ops: BTreeMap<usize, (Arc<Session>, Op)>,
    unsent: VecDeque<Message>,
    /// Messages sent so far.
    last: u64,
    pub(super) flying: BTreeMap<u64, Flying>,
    answers: FuturesUnordered<Answered>,
    /// What ledgers will say.
    settled: FuturesUnordered<Settled>,
    /// After that nobody waits for partials.
    deadline: Deadline,
    /// Nobody waits for any partials that are still to come.
    unwanted: CancellationToken,
    /// It is what is left of another one, of which nobody wants an answer.
    is_rest: bool,
}

impl Collector {
    pub(super) fn new(sessions: Arc<Sessions>, deadline: Deadline) -> Self {
        Self {
            sessions,
            deadline,
            unwanted: CancellationToken::new(),
            steps: BTreeMap::new(),
            ops: BTreeMap::new(),
            unsent: VecDeque::new(),
            last: 0,
            flying: BTreeMap::new(),
            answers: FuturesUnordered::new(),
            settled: FuturesUnordered::new(),
            is_rest: false,
        }
    }

    /// Takes a step up, whose parts are added; where its rows are an op that a ledger has begun, how that will end.
    pub(super) fn insert(&mut self, at: usize, step: Running, ended: Option<Ended>) {
        if let RowsState::Sent(op) = step.rows
            && let Some(ended) = ended
        {
            self.ops.insert(at, (Arc::clone(&step.of.session), op));
            self.settled.push(Box::pin(async move {
                let silent = || Err(Error::new(Reason::Internal, "a ledger that says nothing"));
                (at, ended.await.unwrap_or_else(|_gone| silent()))
            }));
        }
        self.steps.insert(at, step);
    }

    /// Adds a part to the message that goes to this worker.
    pub(super) fn add(&mut self, link: &Arc<HoldLink>, sent: Sent, work: proto::ShardWork) {
        let bytes = entry_bytes(&work);
        let fits = |message: &&mut Message| {
            Arc::ptr_eq(&message.link, link)
                && message.is_hedge == sent.is_hedge
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
                is_hedge: sent.is_hedge,
            }),
        }
    }

    /// Sends what was added, as soon as anybody waits for what comes next.
    pub(super) fn send(&mut self) {
        while let Some(Message { link, sent, mut works, is_hedge, .. }) = self.unsent.pop_front() {
            let (number, since) = (self.last, now());
            self.last += 1;
            let left = self.deadline.for_next_hop().remaining(since).unwrap_or_default();
            for queries in works.iter_mut().filter_map(|work| work.queries.as_mut()) {
                queries.timeout_ms = timeout_ms(left);
            }
            let computes = sent.iter().any(|sent| sent.computes);
            let (term, ask) = (self.sessions.term, Ask::Works(proto::ShardWorks { works }));
            let work = sent.iter().map(|sent| sent.work).fold(0, u64::saturating_add);
            let may_be_late = work > 0 && !is_hedge && !self.is_rest;
            let after = if may_be_late { self.sessions.hedging().ask(work) } else { None };
            let (due, to) = (after.and_then(|after| since.checked_add(after)), Arc::clone(&link));
            let flying = Flying { link, sent, work, since, due, is_hedge, is_overtaken: false };
            self.flying.insert(number, flying);
            let unwanted = self.unwanted.clone();
            // Everything of an op that has begun must get on its way, or its link is lost: both are an answer.
            let asked =
                Box::pin(async move { (number, exchange(&to, term, ask, computes, &unwanted).await) });
            self.answers.push(asked);
        }
    }

    /// Takes the next thing that comes; shards whose replica is lost are asked of another one. False if nothing more comes.
    pub(super) async fn next(&mut self) -> bool {
        tokio::select! {
            biased;
            Some((number, answered)) = self.answers.next() => self.take_answer(number, answered),
            Some((at, ended)) = self.settled.next() => {
                if let Some(step) = self.steps.get_mut(&at) {
                    step.settle(ended);
                    if self.is_rest {
                        step.give_up();
                    }
                }
            }
            else => return false,
        }
        self.send();
        true
    }

    /// Steps that wait for nothing more, with their numbers.
    pub(super) fn take_done(&mut self) -> Vec<(usize, Running)> {
        let done: Vec<usize> =
            self.steps.iter().filter(|(_, step)| step.is_done()).map(|(at, _)| *at).collect();
        done.into_iter().filter_map(|at| Some((at, self.steps.remove(&at)?))).collect()
    }

    /// All steps, whether they are done or not.
    pub(super) fn take_all(&mut self) -> Vec<(usize, Running)> {
        std::mem::take(&mut self.steps).into_iter().collect()
    }

    /// Whether no step is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn take_answer(&mut self, number: u64, answered: Result<Parts, Error>) {
        let Some(flying) = self.flying.remove(&number) else { return };
        let link = &flying.link;
        match answered.and_then(|parts| results_of(parts, flying.sent.len())) {
            Ok(results) => {
                let (mut has_any, mut is_first) = (false, false);
                for (sent, results) in flying.sent.iter().zip(results) {
                    let came = self.take(link, *sent, results);
                    has_any |= came != Came::Nothing;
                    is_first |= came == Came::First;
                }
                if has_any {
                    self.note(&flying, is_first);
                }
            }
            Err(error) => {
                tracing::debug!(worker = %link.holder.worker, %error, "a worker that holds shards is lost");
                for sent in &flying.sent {
                    self.lose(link, *sent, &error);
                }
            }
        }
    }

    /// Takes all results of one part.
    fn take(&mut self, link: &Arc<HoldLink>, sent: Sent, results: Vec<ShardResult>) -> Came {
        let mut failure = None;
        let mut runs = Vec::new();
        let mut applied = None;
        for result in results {
            applied = applied.or(result.applied);
            runs.extend(result.partials);
            failure = failure.or(result.failure);
        }
        let is_refused = sent.appends && applied.is_none();
        if let Some((session, op)) = self.ops.get(&sent.step).filter(|_| sent.appends) {
            match (applied, &failure) {
                (Some(state), _) => session.applied(&self.sessions, sent.shard, &link.holder, op, state),
                (None, Some(error)) => {
                    session.refused(&self.sessions, (sent.shard, sent.epoch), &link.holder, op, error);
                }
                (None, None) => {
                    let error = Error::new(Reason::ReplyInvalid, "rows that nothing is said of");
                    session.refused(&self.sessions, (sent.shard, sent.epoch), &link.holder, op, &error);
                }
            }
        }
        let Some(step) = self.steps.get_mut(&sent.step).filter(|step| sent.computes && step.is_of(&sent))
        else {
            return Came::Nothing;
        };
        let QueriesState::Asked(asked) = &mut step.queries else { return Came::Nothing };
        let view = step.of.session.view();
        let Some(shard) = view.shards.get(sent.shard) else { return Came::Nothing };
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
            // What it has may be something else than what the others have.
            Ok(_) if !step.of.session.is_computing(sent.shard, &link.holder) => {
                let error = Error::new(Reason::Shard, "the replica is none any more");
                self.ask_another(link, sent, &error);
            }
            // Once of each shard, whoever else was asked for it.
            Ok(partials) => {
                let is_first = asked.attempt.take(sent.shard, &link.holder, partials);
                return if is_first { Came::First } else { Came::Late };
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
        Came::Nothing
    }

    /// A part will have no answer.
    fn lose(&mut self, link: &Arc<HoldLink>, sent: Sent, error: &Error) {
        let of_step = self.steps.get(&sent.step).map(|step| &step.of.session);
        let Some(session) = of_step.or(self.ops.get(&sent.step).map(|(session, _)| session)) else { return };
        session.disconnected(&self.sessions, link);
        if sent.computes && self.steps.get(&sent.step).is_some_and(|step| step.is_of(&sent)) {
            self.ask_another(link, sent, error);
        }
    }

    /// Asks the same replica for the partials of a shard, in the epoch that it has now.
    fn ask_again(&mut self, link: &Arc<HoldLink>, sent: Sent) {
        self.ask_for(link, Sent { again: sent.again + 1, ..sent });
    }

    /// Asks a replica for the partials of a shard.
    pub(super) fn ask_for(&mut self, link: &Arc<HoldLink>, sent: Sent) {
        let Some(Running { of, queries: QueriesState::Asked(asked), .. }) = self.steps.get(&sent.step) else {
            return;
        };
        let view = of.session.view();
        let Some(shard) = view.shards.get(sent.shard) else { return };
        let queries = asked.queries.of_shard(shard, &of.session.spec);
        let work = works::work(shard.at, of.layer, None, Some(queries));
        self.add(link, Sent { epoch: shard.at.epoch, appends: false, computes: true, ..sent }, work);
    }

    /// Asks another replica for the partials of a shard.
    fn ask_another(&mut self, link: &Arc<HoldLink>, sent: Sent, error: &Error) {
        let Some(step) = self.steps.get_mut(&sent.step) else { return };
        let QueriesState::Asked(asked) = &mut step.queries else { return };
        let view = step.of.session.view();
        let mut failed = link.holder.clone();
        let next = loop {
            match asked.attempt.fail(sent.shard, &failed) {
                Ok(None) => return,
                Ok(Some(next)) => {
                    let shard = view.shards.get(sent.shard);
                    let found =
                        shard.and_then(|shard| shard.links.iter().find(|link| link.holder == next).cloned());
                    match found {
                        Some(found) => break Some(found),
                        // It has gone since the step began.
                        None => failed = next,
                    }
                }
                Err(_nobody) => break None,
            }
        };
        match next {
            Some(link) => self.ask_for(&link, Sent { again: 0, is_hedge: false, ..sent }),
            None => step.queries = QueriesState::Failed(step.of.session.unreadable(error)),
        }
    }
}

impl Drop for Collector {
    /// Brings to an end what has begun to change sessions: whoever is late is heard, and turns are kept until ledgers have said how it ended.
    /// Workers are told that nobody waits for partials any more.
    fn drop(&mut self) {
        if self.ops.is_empty() {
            self.unsent.clear();
        }
        let nothing_comes = self.unsent.is_empty() && self.answers.is_empty() && self.settled.is_empty();
        // What is left is dropped only with its runtime.
        if self.is_rest || nothing_comes {
            return;
        }
        self.unwanted.cancel();
        let mut rest = Self {
            sessions: Arc::clone(&self.sessions),
            deadline: self.deadline,
            unwanted: self.unwanted.clone(),
            steps: std::mem::take(&mut self.steps),
            ops: std::mem::take(&mut self.ops),
            unsent: std::mem::take(&mut self.unsent),
            last: self.last,
            flying: std::mem::take(&mut self.flying),
            answers: std::mem::take(&mut self.answers),
            settled: std::mem::take(&mut self.settled),
            is_rest: true,
        };
        rest.steps.values_mut().for_each(Running::give_up);
        self.sessions.tasks.spawn(async move {
            rest.send();
            while rest.next().await {}
        });
    }
}

/// Sends works and waits for their answer. Their partials, if it `computes` any, are given up once they are `unwanted`; there is an answer
/// all the same.
async fn exchange(
    link: &HoldLink,
    term: u64,
    ask: Ask,
    computes: bool,
    unwanted: &CancellationToken,
) -> Result<Parts, Error> {
    let (upload, answer) = link.control.begin(term, ask).await?;
    let mut parts = std::pin::pin!(answer.parts());
    tokio::select! {
        biased;
        parts = &mut parts => return parts,
        () = unwanted.cancelled(), if computes => {}
    }
    // A stream that has ended gives everything up.
    upload.send(Ask::GiveUp(proto::ShardGiveUp {})).await.ok();
    parts.await
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
