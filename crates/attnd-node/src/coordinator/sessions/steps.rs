//! Steps of any sessions in one message: one message to each worker, one back from each, one to the client.
//!
//! ```text
//! line up --turns--> begin: the ledgers say which op it is --works--> links
//!                    applied, partials <--answers-- links        a shard whose worker is lost is asked of another replica
//! results <-- merge
//! ```
//!
//! Steps whose turns have come go together; those that have to wait for a turn go when it comes, and hold nobody back. What a session that has
//! just lost a replica refuses begins anew once the session is whole, if that is soon (`patience.rs`).
//!
//! A message's steps have one timer: it goes off where a replica is late whose queries another one can compute, and at their deadline.
//!
//! A step that has begun to change a session is brought to its end whoever waits for it: what is left of a call that nobody wants
//! any more goes on in a task of its own. Workers are told to leave its partials out.

use std::sync::Arc;
use std::time::Instant;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use attnd_plan::session::{Ask, Attempt, Holder, LedgerEvent, Op, Read, Request};
use attnd_wire::session::{Applied, Mutation, Step, StepQueries, StepResult, StepRows};
use attnd_wire::surroundings::now;
use attnd_wire::{CallShape, Deadline, Error, Outcome, Reason};
use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::oneshot;

use super::Sessions;
use super::collector::{Collector, Sent};
use super::cuts;
use super::patience::{MAX_TRIES, Patience, may_pass};
use super::results::answer;
use super::session::{After, Begun, Session, ShardView};
use super::turns::{Place, Turn};
use super::works::{self, Queries};
use crate::budget::Reservation;

/// Steps that have their places.
pub(super) struct StepsCall {
    steps: Vec<Result<Lined, Error>>,
}

/// A step in the line of its session.
pub(super) struct Lined {
    pub(super) session: Arc<Session>,
    pub(super) layer: usize,
    rows: Option<StepRows>,
    queries: Option<Arc<StepQueries>>,
    /// Where there are rows.
    place: Option<Place>,
    /// Its rows are there, since it was begun before.
    applied: Option<Applied>,
    /// It was begun before, and nobody knows what became of it.
    may_be_done: bool,
    /// How often it was.
    tries: u8,
    /// The session doesn't expire as long as this is here.
    _in_use: Arc<()>,
    /// Memory for it.
    room: Arc<Reservation>,
}

/// A step that was sent, until it is answered.
pub(super) struct Running {
    pub(super) of: Lined,
    /// What became of its rows: there already, to come, or never asked for.
    pub(super) rows: RowsState,
    pub(super) queries: QueriesState,
    /// Nobody else changes the session as long as this is here.
    turn: Option<Turn>,
}

/// A step that its session refuses now.
struct Refused {
    at: usize,
    of: Lined,
    turn: Option<Turn>,
    error: Error,
}

/// How the op of a step's rows ends.
pub(super) type Ended = oneshot::Receiver<Result<Applied, Error>>;

/// What becomes of the rows of a step.
pub(super) enum RowsState {
    /// There are none.
    None,
    /// The ledger will say.
    Sent(Op),
    /// It said.
    Settled(Result<Applied, Error>),
}

/// What becomes of the queries of a step.
pub(super) enum QueriesState {
    /// There are none, or none any more.
    None,
    /// Shards are missing.
    Asked(Box<Asked>),
    /// Why there is no answer.
    Failed(Error),
}

/// Queries that wait for partials.
pub(super) struct Asked {
    pub(super) queries: Queries,
    pub(super) call: CallShape,
    pub(super) read: Read,
    pub(super) attempt: Attempt<Holder, Vec<(CellId, PartialRows)>>,
}

impl StepsCall {
    /// Looks sessions up, and takes a place in the line of each that a step changes: all at once, so that calls which change the same
    /// sessions never wait for each other.
    pub(super) fn line_up(sessions: &Sessions, steps: Vec<Result<Step, Error>>) -> Self {
        let mut lined: Vec<Result<Lined, Error>> =
            steps.into_iter().map(|step| find(sessions, step?)).collect();
        let _all_at_once = sessions.line_up();
        let mut changed: Vec<u64> = Vec::new();
        for step in &mut lined {
            let Ok(of_step) = step else { continue };
            if of_step.rows.is_none() {
                continue;
            }
            let number = of_step.session.number;
            let place = if changed.contains(&number) {
                let detail = format!("two steps of one message append to session {}", of_step.session.name);
                Err(Error::new(Reason::Combination, detail))
            } else {
                changed.push(number);
                of_step.session.turns.line_up()
            };
            match place {
                Ok(place) => of_step.place = Some(place),
                Err(error) => *step = Err(error),
            }
        }
        Self { steps: lined }
    }

    /// Memory of all steps: for whoever has the results, until these are sent.
    pub(super) fn rooms(&self) -> Vec<Arc<Reservation>> {
        self.steps.iter().flatten().map(|step| Arc::clone(&step.room)).collect()
    }

    /// Runs all steps; one result for each, in parts where its rows are many.
    ///
    /// # Errors
    /// [`Reason::Deadline`] if the time is over before all of them are answered; what has begun goes on.
    pub(super) async fn run(
        self,
        sessions: &Arc<Sessions>,
        mut patience: Patience,
    ) -> Result<Vec<StepResult>, Error> {
        let mut collector = Collector::new(Arc::clone(sessions), patience.deadline);
        let mut results = Vec::with_capacity(self.steps.len());
        let mut refused: Vec<Box<Refused>> = Vec::new();
        let (mut waiting, mut delayed) = (FuturesUnordered::new(), FuturesUnordered::new());
        let deadline = patience.deadline.at();
        let mut alarm = std::pin::pin!(tokio::time::sleep_until(deadline.into()));
        // Between the beginning of an op and its messages nothing is awaited: what a ledger has begun is sent.
        for (at, step) in self.steps.into_iter().enumerate() {
            match step {
                Err(error) => {
                    results.push(StepResult { step: at, failure: Some(error), ..StepResult::default() });
                }
                Ok(mut step) => match step.place.take().map(Place::turn_now) {
                    None => refused.extend(begin(&mut collector, at, step, None)),
                    Some(Ok(turn)) => refused.extend(begin(&mut collector, at, step, Some(turn))),
                    Some(Err(place)) => waiting.push(async move { (at, step, place.turn().await) }),
                },
            }
        }
        collector.send();
        loop {
            for (at, step) in collector.take_done() {
                match step.refusal().cloned() {
                    Some(error) => refused.push(step.refused(at, error)),
                    None => results.extend(answer(sessions, at, step).await),
                }
            }
            for step in refused.drain(..) {
                match step.until(sessions, &mut patience) {
                    Some(until) => delayed.push(step.wait(until)),
                    None => results.push(step.result()),
                }
            }
            if collector.is_empty() && waiting.is_empty() && delayed.is_empty() {
                break;
            }
            let due: tokio::time::Instant = collector.due().map_or(deadline, |due| due.min(deadline)).into();
            // Set anew as rarely as can be: it may go off for nothing.
            if due < alarm.deadline() || alarm.is_elapsed() {
                alarm.as_mut().reset(due);
            }
            tokio::select! {
                biased;
                Some((at, step, turn)) = waiting.next() => {
                    refused.extend(begin(&mut collector, at, step, Some(turn)));
                    // All that may go by now go together.
                    while let Some(Some((at, step, turn))) = waiting.next().now_or_never() {
                        refused.extend(begin(&mut collector, at, step, Some(turn)));
                    }
                    collector.send();
                }
                Some((step, is_due)) = delayed.next() => match is_due {
                    true => {
                        refused.extend(step.begin_again(&mut collector));
                        collector.send();
                    }
                    false => results.push(step.result()),
                },
                goes_on = collector.next(), if !collector.is_empty() => if !goes_on {
                    // An answer is missing that nobody will give.
                    for (at, step) in collector.take_all() {
                        results.extend(answer(sessions, at, step).await);
                    }
                },
                () = &mut alarm => {
                    if now() >= deadline {
                        return Err(Deadline::expired().with_outcome(Outcome::Unknown));
                    }
                    collector.hedge();
                }
            }
        }
        results.sort_by_key(|result| result.step);
        Ok(results)
    }
}

impl Running {
    /// The ledger says how the op of its rows has ended. What may begin anew keeps its turn.
    pub(super) fn settle(&mut self, ended: Result<Applied, Error>) {
        if !ended.as_ref().is_err_and(may_pass) {
            self.turn = None;
        }
        self.rows = RowsState::Settled(ended);
    }

    /// Whether a part was sent for what it asks now, and not before it began anew.
    pub(super) fn is_of(&self, sent: &Sent) -> bool {
        self.of.tries == sent.attempt
    }

    /// Nobody wants its answer any more, nor that it begins anew.
    pub(super) fn give_up(&mut self) {
        self.queries = QueriesState::None;
        if !matches!(self.rows, RowsState::Sent(_)) {
            self.turn = None;
        }
    }

    /// What its session refuses, if that may pass.
    fn refusal(&self) -> Option<&Error> {
        let refusal = match (&self.rows, &self.queries) {
            (RowsState::Settled(Err(error)), _) => error,
            (RowsState::None | RowsState::Settled(Ok(_)), QueriesState::Failed(error)) => error,
            _ => return None,
        };
        Some(refusal).filter(|error| may_pass(error))
    }

    /// The step, to begin anew: with its rows, unless these are there.
    fn refused(self, at: usize, error: Error) -> Box<Refused> {
        let Self { mut of, rows, turn, .. } = self;
        if let RowsState::Settled(Ok(applied)) = rows {
            of.applied = Some(applied);
        }
        Box::new(Refused { at, of, turn, error })
    }

    /// Whether it waits for nothing more.
    pub(super) fn is_done(&self) -> bool {
        match (&self.rows, &self.queries) {
            (RowsState::Sent(_), _) => false,
            (RowsState::Settled(Err(_)), _) => true,
            (_, QueriesState::Asked(asked)) => asked.attempt.missing().next().is_none(),
            (_, QueriesState::None | QueriesState::Failed(_)) => true,
        }
    }
}

impl Refused {
    /// Until when to wait for its session; `None`: it is answered as it is.
    fn until(&self, sessions: &Sessions, patience: &mut Patience) -> Option<Instant> {
        if !may_pass(&self.error) || self.of.tries >= MAX_TRIES {
            return None;
        }
        patience.until(&self.of.session, sessions.patience)
    }

    /// Waits until it can begin anew; false if it can't in time.
    async fn wait(self: Box<Self>, until: Instant) -> (Box<Self>, bool) {
        let Lined { session, layer, rows, applied, .. } = &self.of;
        tracing::debug!(session = %session.name, error = %self.error, "a step waits for its session");
        let is_due = match rows {
            Some(rows) if applied.is_none() => {
                let Request { writer_epoch, seq, ask, .. } = request(*layer, rows);
                session.becomes_writable(writer_epoch, seq, &ask, until).await
            }
            _ => session.becomes_readable(until).await,
        };
        (self, is_due)
    }

    fn begin_again(self: Box<Self>, collector: &mut Collector) -> Option<Box<Self>> {
        let Self { at, mut of, turn, error } = *self;
        of.tries += 1;
        of.may_be_done |= error.outcome == Outcome::Unknown;
        begin(collector, at, of, turn)
    }

    fn result(self: Box<Self>) -> StepResult {
        let Self { at, of, error, .. } = *self;
        // A refusal says nothing of what was begun before.
        let is_unknown = of.may_be_done && of.applied.is_none() && error.outcome == Outcome::NotExecuted;
        let error = if is_unknown { error.with_outcome(Outcome::Unknown) } else { error };
        StepResult { step: at, applied: of.applied, failure: Some(error), ..StepResult::default() }
    }
}

fn find(sessions: &Sessions, step: Step) -> Result<Lined, Error> {
    let Step { session, layer, rows, queries } = step;
    let session = sessions.find(&session)?;
    if let Some(rows) = &rows {
        rows.check(layer, &session.spec)?;
    }
    if let Some(queries) = &queries {
        queries.check(layer, &session.spec)?;
    }
    let room =
        sessions.room_for(works::step_bytes(rows.as_ref(), queries.as_ref(), &session.spec, &session.pieces));
    let (room, queries) = (room?, queries.map(Arc::new));
    let (place, applied, may_be_done, tries) = (None, None, false, 0);
    let _in_use = Arc::clone(&session.in_use);
    Ok(Lined { session, layer, rows, queries, place, applied, may_be_done, tries, _in_use, room })
}

/// What a ledger is asked for the rows of a step.
fn request(layer: usize, rows: &StepRows) -> Request {
    let base_len = rows.base_len.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let ask = Ask::Append { layer, base_len, tokens: rows.tokens };
    let digest = ask.digest(rows.crc32c);
    let Mutation { writer_epoch, op_seq: seq } = rows.mutation;
    Request { writer_epoch, seq, digest, ask }
}

/// Begins a step; gives it back if its session refuses it.
fn begin(collector: &mut Collector, at: usize, of: Lined, turn: Option<Turn>) -> Option<Box<Refused>> {
    match add(collector, at, &of) {
        Ok((rows, queries, ended)) => {
            // Of one that came again there is nothing to wait for with the turn.
            let turn = turn.filter(|_| ended.is_some());
            collector.insert(at, Running { of, rows, queries, turn }, ended);
            None
        }
        Err(error) => Some(Box::new(Refused { at, of, turn, error })),
    }
}

/// Asks the ledger, and adds what has to be sent.
fn add(
    collector: &mut Collector,
    at: usize,
    of: &Lined,
) -> Result<(RowsState, QueriesState, Option<Ended>), Error> {
    let Lined { session, layer, rows, queries, applied, .. } = of;
    // What is wrong with queries is said before rows are appended.
    let begun = match (rows, applied) {
        (None, _) => None,
        (Some(_), Some(applied)) => Some(Begun::Replayed(applied.clone())),
        (Some(rows), None) => {
            let check = |at_len| {
                queries.as_ref().map_or(Ok(()), |queries| queries.over(&session.spec, at_len).map(|_| ()))
            };
            Some(session.begin(&request(*layer, rows), check)?)
        }
    };
    let (rows_state, op, ended) = match begun {
        None => (RowsState::None, None, None),
        Some(Begun::Replayed(applied)) => (RowsState::Settled(Ok(applied)), None, None),
        Some(Begun::Started(op, ended)) => (RowsState::Sent(op), Some(op), Some(ended)),
    };
    let after = match &rows_state {
        RowsState::None | RowsState::Settled(Err(_)) => After::Nothing,
        RowsState::Settled(Ok(applied)) => {
            After::Replayed { len: applied.len, generation: applied.generation }
        }
        RowsState::Sent(op) => After::Op(*op),
    };
    let view = session.view();
    let cut = match (&op, rows) {
        (Some(op), Some(rows)) => {
            let shards = view.shards.iter().map(|shard| &shard.pieces);
            Some(cuts::rows_of_shards(shards, op, view.generation, rows, &session.spec))
        }
        _ => None,
    };
    let mut cut = match cut.transpose() {
        Ok(cut) => cut.unwrap_or_default().into_iter(),
        Err(why) => {
            // What a ledger has begun has an end: it is taken back.
            let seq = op.map_or(0, |op| op.seq);
            session.handle(&collector.sessions, LedgerEvent::Abandoned { seq, why });
            return Ok((rows_state, QueriesState::None, ended));
        }
    };
    let asked =
        queries.as_ref().map(|queries| ask(collector, session, *layer, queries, after, &view)).transpose();
    let queries = match asked {
        Ok(None) => QueriesState::None,
        Ok(Some(asked)) => QueriesState::Asked(Box::new(asked)),
        // Rows that a ledger has begun are sent all the same, and those that are there are told of.
        Err(error) if !matches!(rows_state, RowsState::None) => QueriesState::Failed(error),
        Err(error) => return Err(error),
    };
    for (shard, of_shard) in view.shards.iter().enumerate() {
        let rows = cut.next();
        for link in &of_shard.links {
            // A request that came again may find that some have it by now.
            let rows = rows.as_ref().filter(|_| of_shard.lack.contains(&link.holder));
            let asked = match &queries {
                QueriesState::Asked(asked) if asked.attempt.asked(shard) == Some(&link.holder) => Some(asked),
                _ => None,
            };
            let (appends, computes) = (rows.is_some(), asked.is_some());
            if appends || computes {
                let work = asked.map_or(0, |asked| asked.queries.work(of_shard, &session.spec));
                let epoch = of_shard.at.epoch;
                let (step, attempt, again, is_hedge) = (at, of.tries, 0, false);
                let sent = Sent { step, attempt, shard, epoch, appends, computes, work, again, is_hedge };
                let queries = asked.map(|asked| asked.queries.of_shard(of_shard, &session.spec));
                collector.add(link, sent, works::work(of_shard.at, *layer, rows.cloned(), queries));
            }
        }
    }
    Ok((rows_state, queries, ended))
}

/// What is asked for queries that come behind the rows of their own step, if it has any.
fn ask(
    collector: &Collector,
    session: &Session,
    layer: usize,
    queries: &Arc<StepQueries>,
    after: After,
    view: &ShardView,
) -> Result<Asked, Error> {
    let read = session.read(layer, queries, after)?;
    let (shape, operator) = queries.over(&session.spec, read.at_len)?;
    let call = CallShape { shape, operator, outputs: None, allow_non_finite: queries.allow_non_finite };
    let replicas = view.shards.iter().map(|shard| collector.in_order(shard));
    let attempt =
        Attempt::new(replicas).map_err(|nobody| Error::new(Reason::Recovering, nobody.to_string()))?;
    let queries = Queries::new(Arc::clone(queries), &call, &read, &view.shards, &session.spec)?;
    Ok(Asked { queries, call, read, attempt })
}
