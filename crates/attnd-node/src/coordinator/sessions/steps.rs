//! Steps of any sessions in one message: one message to each worker, one back from each, one to the client.
//!
//! ```text
//! line up --turns--> begin: the ledgers say which op it is --works--> links
//!                    applied, partials <--answers-- links        a shard whose worker is lost is asked of another replica
//! results <-- merge
//! ```
//!
//! Steps whose turns have come go together; those that have to wait for a turn go when it comes, and hold nobody back.
//!
//! A step that has begun to change a session is brought to its end whoever waits for it: what is left of a call that nobody wants
//! any more goes on in a task of its own. Workers are told to leave its partials out.

use std::sync::Arc;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use attnd_plan::session::{Ask, Attempt, Holder, Op, Read, Request};
use attnd_wire::session::{Applied, Mutation, Step, StepContext, StepQueries, StepResult, StepRows};
use attnd_wire::{CallShape, ContextChunk, Deadline, Error, Reason};
use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::oneshot;

use super::Sessions;
use super::collector::{Collector, Sent};
use super::merge::{Rows, merge};
use super::session::{After, Begun, Session, ShardView};
use super::turns::{Place, Turn};
use super::works::{self, Queries};

/// Bytes of partials that are merged where they come in; more of them go to the pool.
const MERGED_HERE: usize = 256 << 10;

/// Steps that have their places.
pub(super) struct StepsCall {
    steps: Vec<Result<Lined, Error>>,
    deadline: Option<Deadline>,
}

/// A step in the line of its session.
struct Lined {
    session: Arc<Session>,
    layer: usize,
    rows: Option<StepRows>,
    queries: Option<StepQueries>,
    /// Where there are rows.
    place: Option<Place>,
}

/// A step that was sent, until it is answered.
pub(super) struct Running {
    pub(super) session: Arc<Session>,
    pub(super) layer: usize,
    /// What became of its rows: there already, to come, or never asked for.
    pub(super) rows: RowsState,
    pub(super) queries: QueriesState,
    /// Nobody else changes the session as long as this is here.
    turn: Option<Turn>,
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
        Self { steps: lined, deadline: None }
    }

    /// Nobody waits for partials longer than that.
    pub(super) fn until(self, deadline: Deadline) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Runs all steps; one result for each, in parts where its rows are many.
    pub(super) async fn run(self, sessions: &Arc<Sessions>) -> Vec<StepResult> {
        let mut collector = Collector::new(Arc::clone(sessions), self.deadline);
        let mut results = Vec::with_capacity(self.steps.len());
        let mut waiting = FuturesUnordered::new();
        // Between the beginning of an op and its messages nothing is awaited: what a ledger has begun is sent.
        let start = |collector: &mut Collector, results: &mut Vec<StepResult>, at, step, turn| {
            if let Err(error) = begin(collector, at, step, turn) {
                results.push(StepResult { step: at, failure: Some(error), ..StepResult::default() });
            }
        };
        for (at, step) in self.steps.into_iter().enumerate() {
            match step {
                Err(error) => {
                    results.push(StepResult { step: at, failure: Some(error), ..StepResult::default() });
                }
                Ok(mut step) => match step.place.take().map(Place::turn_now) {
                    None => start(&mut collector, &mut results, at, step, None),
                    Some(Ok(turn)) => start(&mut collector, &mut results, at, step, Some(turn)),
                    Some(Err(place)) => waiting.push(async move { (at, step, place.turn().await) }),
                },
            }
        }
        collector.send();
        loop {
            for (at, step) in collector.take_done() {
                results.extend(answer(sessions, at, step).await);
            }
            tokio::select! {
                biased;
                Some((at, step, turn)) = waiting.next() => {
                    start(&mut collector, &mut results, at, step, Some(turn));
                    // All that may go by now go together.
                    while let Some(Some((at, step, turn))) = waiting.next().now_or_never() {
                        start(&mut collector, &mut results, at, step, Some(turn));
                    }
                    collector.send();
                }
                goes_on = collector.next(), if !collector.is_empty() => if !goes_on {
                    // An answer is missing that nobody will give.
                    for (at, step) in collector.take_all() {
                        results.extend(answer(sessions, at, step).await);
                    }
                },
                else => break,
            }
        }
        results.sort_by_key(|result| result.step);
        results
    }
}

impl Running {
    /// The ledger says how the op of its rows has ended.
    pub(super) fn settle(&mut self, ended: Result<Applied, Error>) {
        self.rows = RowsState::Settled(ended);
        self.turn = None;
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

fn find(sessions: &Sessions, step: Step) -> Result<Lined, Error> {
    let Step { session, layer, rows, queries } = step;
    let session = sessions.find(&session)?;
    if let Some(rows) = &rows {
        rows.check(layer, &session.spec)?;
    }
    if let Some(queries) = &queries {
        queries.check(layer, &session.spec)?;
    }
    Ok(Lined { session, layer, rows, queries, place: None })
}

/// Begins a step: asks the ledger, and adds what has to be sent.
fn begin(collector: &mut Collector, at: usize, step: Lined, turn: Option<Turn>) -> Result<(), Error> {
    let Lined { session, layer, rows, queries, place: _ } = step;
    // What is wrong with queries is said before rows are appended.
    let begun = match &rows {
        None => None,
        Some(rows) => {
            let base_len = rows.base_len.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            let ask = Ask::Append { layer, base_len, tokens: rows.tokens };
            let digest = ask.digest(rows.crc32c);
            let Mutation { writer_epoch, op_seq: seq } = rows.mutation;
            let request = Request { writer_epoch, seq, digest, ask };
            let check = |at_len| {
                queries.as_ref().map_or(Ok(()), |queries| queries.over(&session.spec, at_len).map(|_| ()))
            };
            Some(session.begin(&request, check)?)
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
    let asked = queries.map(|queries| ask(&session, layer, queries, after, &view)).transpose();
    let queries = match asked {
        Ok(None) => QueriesState::None,
        Ok(Some(asked)) => QueriesState::Asked(Box::new(asked)),
        // Rows that a ledger has begun are sent all the same, and those that are there are told of.
        Err(error) if !matches!(rows_state, RowsState::None) => QueriesState::Failed(error),
        Err(error) => return Err(error),
    };
    for (shard, of_shard) in view.shards.iter().enumerate() {
        let rows = match (&op, &rows) {
            (Some(op), Some(rows)) => {
                Some(works::rows_for(of_shard, op, view.generation, rows, &session.spec))
            }
            _ => None,
        };
        for link in &of_shard.links {
            // A request that came again may find that some have it by now.
            let rows = rows.as_ref().filter(|_| of_shard.lack.contains(&link.holder));
            let computes = match &queries {
                QueriesState::Asked(asked) => asked.attempt.asked(shard) == Some(&link.holder),
                QueriesState::None | QueriesState::Failed(_) => false,
            };
            let queries = match &queries {
                QueriesState::Asked(asked) if computes => {
                    Some(asked.queries.of_shard(of_shard, &session.spec))
                }
                _ => None,
            };
            if rows.is_some() || queries.is_some() {
                let (appends, epoch) = (rows.is_some(), of_shard.at.epoch);
                let sent = Sent { step: at, shard, epoch, appends, computes, again: 0 };
                collector.add(link, sent, works::work(of_shard.at, layer, rows.cloned(), queries));
            }
        }
    }
    // Of one that came again there is nothing to wait for with the turn.
    let turn = turn.filter(|_| op.is_some());
    collector.insert(at, Running { session, layer, rows: rows_state, queries, turn }, ended);
    Ok(())
}

/// What is asked for queries that come behind the rows of their own step, if it has any.
fn ask(
    session: &Session,
    layer: usize,
    queries: StepQueries,
    after: After,
    view: &ShardView,
) -> Result<Asked, Error> {
    let read = session.read(layer, &queries, after)?;
    let (shape, operator) = queries.over(&session.spec, read.at_len)?;
    let call = CallShape { shape, operator, outputs: None, allow_non_finite: queries.allow_non_finite };
    let replicas =
        view.shards.iter().map(|shard| shard.links.iter().map(|link| link.holder.clone()).collect());
    let attempt =
        Attempt::new(replicas).map_err(|nobody| Error::new(Reason::Recovering, nobody.to_string()))?;
    Ok(Asked { queries: Queries::new(queries, &call, &read), call, read, attempt })
}

/// The results of a step whose answers are here.
async fn answer(sessions: &Sessions, at: usize, step: Running) -> Vec<StepResult> {
    let Running { session, rows, queries, .. } = step;
    // It was used until now.
    session.touch(sessions.now());
    let mut first = StepResult { step: at, ..StepResult::default() };
    match rows {
        RowsState::None => {}
        RowsState::Settled(Ok(applied)) => first.applied = Some(applied),
        RowsState::Settled(Err(error)) => first.failure = Some(error),
        RowsState::Sent(_) => {
            first.failure = Some(Error::new(Reason::Internal, "a step ended before its ledger said so"));
        }
    }
    let rows = match queries {
        _ if first.failure.is_some() => return vec![first],
        QueriesState::None => return vec![first],
        QueriesState::Failed(error) => Err(error),
        QueriesState::Asked(asked) => merge_all(sessions, *asked).await,
    };
    match rows {
        Err(error) => {
            first.failure = Some(error);
            vec![first]
        }
        Ok((asked, rows)) => contexts(first, &session, &asked, rows),
    }
}

type Merged = (MergedOf, Rows);

/// What finished rows are of.
pub(super) struct MergedOf {
    call: CallShape,
    read: Read,
    kernel_id: &'static str,
}

async fn merge_all(sessions: &Sessions, asked: Asked) -> Result<Merged, Error> {
    let Asked { call, read, attempt, queries } = asked;
    let Ok(parts) = attempt.finish() else {
        return Err(Error::new(Reason::Internal, "a step ended without all of its shards"));
    };
    let cells: Vec<(CellId, PartialRows)> = parts.into_iter().flatten().collect();
    let bytes: usize = cells.iter().map(|(_, rows)| size_of_val(&rows.o[..])).sum();
    let kernels = sessions.hub.kernels;
    let (shape, operator, allow) = (call.shape, Arc::clone(&call.operator), call.allow_non_finite);
    let work = move || merge(cells, &shape, &operator, allow, kernels);
    let rows = if bytes <= MERGED_HERE {
        work()?
    } else {
        let merged = sessions.hub.pool.run(work).await;
        merged.map_err(|error| Error::new(Reason::Internal, format!("merging {error}")))??
    };
    Ok((MergedOf { call, read, kernel_id: queries.kernel_id() }, rows))
}

/// Finished rows as results of messages: whole heads as long as they are small enough.
fn contexts(first: StepResult, session: &Session, of: &MergedOf, rows: Rows) -> Vec<StepResult> {
    let MergedOf { call, read, kernel_id } = of;
    let (heads, tokens, dim) = (session.spec.heads, call.shape.n_queries(), call.shape.value_dim());
    let context = |rows: ContextChunk| StepContext::new(rows, read.at_len as u64, read.generation, kernel_id);
    works::blocks(heads, tokens, dim)
        .map(|(heads, of_tokens)| {
            let mut chunk = ContextChunk {
                heads: heads.clone(),
                tokens: of_tokens.clone(),
                lse: Vec::new(),
                context: Vec::new(),
            };
            for head in heads {
                let from = head * tokens + of_tokens.start;
                let to = from + of_tokens.len();
                chunk.lse.extend_from_slice(&rows.lse[from..to]);
                chunk.context.extend_from_slice(&rows.context[from * dim..to * dim]);
            }
            context(chunk)
        })
        .enumerate()
        .map(|(at, context)| StepResult {
            step: first.step,
            applied: first.applied.clone().filter(|_| at == 0),
            context: Some(context),
            failure: None,
        })
        .collect()
}
