//! Steps: one message for any number of them, results in any order, and again for those whose answer got lost.

use std::sync::Arc;

use attnd_plan::session::SessionSpec;
use attnd_wire::limits::MAX_ENTRIES;
use attnd_wire::session::{Answer, Applied, Ask, Step, StepResult};
use attnd_wire::{Error, Outcome, Reason};
use bytes::Bytes;
use tokio::time::Instant;

use crate::error::ClientError;
use crate::retry::pause_before_repeat;
use crate::session::exchange::{Exchange, Request, in_all};
use crate::session::handle::{Session, Stepped};
use crate::session::queries::{Block, BlockAnswer, BlockRows, MOST_BYTES, QueryOptions};
use crate::session::{Sessions, unexpected};

/// One step of a batch: each of another session.
#[derive(Debug)]
pub struct BatchStep<'a> {
    /// Of which session.
    pub session: &'a mut Session,
    /// Of which layer.
    pub layer: usize,
    /// `[kv_heads, tokens, head_dim]`.
    pub k: Bytes,
    /// `[kv_heads, tokens, value_dim]`; empty where values are parts of keys.
    pub v: Bytes,
    /// `[heads, tokens, head_dim]`.
    pub q: Bytes,
    /// How to attend.
    pub options: &'a QueryOptions,
}

/// A step that is ready to be sent.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) step: Step,
    pub(super) spec: Arc<SessionSpec>,
    /// What its queries must be answered with.
    pub(super) block: Option<Block>,
}

/// A step that was done.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) applied: Option<Applied>,
    pub(super) rows: Option<BlockRows>,
    pub(super) attempts: u32,
}

/// A step that wasn't, or not all of it.
#[derive(Debug)]
pub(super) struct Failed {
    /// Its rows are appended all the same.
    pub(super) applied: Option<Applied>,
    pub(super) error: ClientError,
}

impl Outgoing {
    fn bytes(&self) -> usize {
        let rows = self.step.rows.as_ref().map_or(0, |rows| rows.k.len() + rows.v.len());
        rows + self.step.queries.as_ref().map_or(0, |queries| queries.q.len())
    }
}

/// Sends steps until each has its answer or it is no use, and gives what became of each.
pub(super) async fn run(
    exchange: &Exchange,
    steps: &[Outgoing],
    deadline: Instant,
) -> Vec<Result<Done, Failed>> {
    let mut results: Vec<Option<Result<Done, Failed>>> = steps.iter().map(|_| None).collect();
    let mut applied: Vec<Option<Applied>> = vec![None; steps.len()];
    let mut may_be_done = vec![false; steps.len()];
    let mut pending: Vec<usize> = (0..steps.len()).collect();
    let mut attempts = 0;
    while !pending.is_empty() {
        attempts += 1;
        let mut again = Vec::new();
        let mut pause = std::time::Duration::ZERO;
        for message in messages(&pending, steps) {
            for (at, outcome) in message.iter().zip(ask(exchange, message, steps, deadline).await) {
                let (newly, outcome) = outcome;
                if newly.is_some() {
                    applied[*at] = newly;
                }
                let error = match outcome {
                    Ok(rows) => {
                        results[*at] = Some(Ok(Done { applied: applied[*at].take(), rows, attempts }));
                        continue;
                    }
                    Err(error) => in_all(error, &mut may_be_done[*at]),
                };
                let left = deadline.saturating_duration_since(Instant::now());
                let (is_known, jitter) = (exchange.is_known(), exchange.jitter());
                match pause_before_repeat(attempts, &error, is_known, Some(left), jitter) {
                    Some(wait) => {
                        pause = pause.max(wait);
                        again.push(*at);
                    }
                    None => {
                        // What was told before the last attempt holds, whatever became of that.
                        let applied = applied[*at].take();
                        let error =
                            if applied.is_some() { error.with_outcome(Outcome::Applied) } else { error };
                        let error = ClientError::after(attempts, &error);
                        results[*at] = Some(Err(Failed { applied, error }));
                    }
                }
            }
        }
        pending = again;
        if !pending.is_empty() {
            tracing::info!(
                steps = pending.len(),
                attempts,
                pause_ms = pause.as_millis() as u64,
                "steps are sent again"
            );
            tokio::time::sleep(pause).await;
        }
    }
    let never = || {
        let error = ClientError::after(0, &Error::new(Reason::Internal, "a step was forgotten"));
        Err(Failed { applied: None, error })
    };
    results.into_iter().map(|result| result.unwrap_or_else(never)).collect()
}

/// The steps of each message: as many as it has room for.
fn messages<'a>(pending: &'a [usize], steps: &[Outgoing]) -> Vec<&'a [usize]> {
    let mut messages = Vec::new();
    let (mut begin, mut bytes) = (0, 0);
    for (at, step) in pending.iter().enumerate() {
        let of_step = steps.get(*step).map_or(0, Outgoing::bytes);
        if at > begin && (bytes + of_step > MOST_BYTES || at - begin == MAX_ENTRIES) {
            messages.push(&pending[begin..at]);
            (begin, bytes) = (at, 0);
        }
        bytes += of_step;
    }
    messages.push(&pending[begin..]);
    messages
}

type StepOutcome = (Option<Applied>, Result<Option<BlockRows>, Error>);

/// Sends some steps in one message, once.
async fn ask(
    exchange: &Exchange,
    message: &[usize],
    steps: &[Outgoing],
    deadline: Instant,
) -> Vec<StepOutcome> {
    let outgoing: Vec<&Outgoing> = message.iter().filter_map(|at| steps.get(*at)).collect();
    let all = |error: Error| outgoing.iter().map(|_| (None, Err(error.clone()))).collect();
    let mut receipts = Vec::with_capacity(outgoing.len());
    for step in &outgoing {
        match Receipt::new(step) {
            Ok(receipt) => receipts.push(receipt),
            Err(error) => return all(error),
        }
    }
    let steps = outgoing.iter().map(|outgoing| outgoing.step.clone()).collect();
    let answers = match exchange.ask(Request::One(Ask::Steps(steps)), deadline).await {
        Ok(answers) => answers,
        Err(error) => return all(error),
    };
    for answer in answers {
        let Answer::Steps(results) = answer else {
            return all(Error::new(Reason::ReplyInvalid, unexpected(&answer, 1).message));
        };
        for result in results {
            let step = result.step;
            match receipts.get_mut(step).zip(outgoing.get(step)) {
                Some((receipt, outgoing)) => receipt.take(result, outgoing),
                None => return all(Error::new(Reason::ReplyInvalid, format!("a result of step {step}"))),
            }
        }
    }
    receipts.into_iter().zip(outgoing).map(|(receipt, outgoing)| receipt.finish(outgoing)).collect()
}

/// What has come of one step.
#[derive(Debug)]
struct Receipt {
    applied: Option<Applied>,
    rows: Option<BlockAnswer>,
    failure: Option<Error>,
}

impl Receipt {
    fn new(step: &Outgoing) -> Result<Self, Error> {
        let rows = step.block.as_ref().map(|block| BlockAnswer::new(block, &step.spec)).transpose()?;
        Ok(Self { applied: None, rows, failure: None })
    }

    fn take(&mut self, result: StepResult, step: &Outgoing) {
        let StepResult { step: _, applied, context, failure } = result;
        self.applied = self.applied.take().or(applied);
        if let Some(context) = context {
            let accepted = match (&mut self.rows, &step.block) {
                (Some(rows), Some(block)) => {
                    let keys = usize::try_from(context.at_len).unwrap_or(usize::MAX);
                    let shape = step.spec.shape(block.queries.tokens, keys).map_err(Error::from);
                    shape.and_then(|shape| rows.accept(context, &shape))
                }
                _ => Err(Error::new(Reason::ReplyInvalid, "rows of a step without queries")),
            };
            self.failure = self.failure.take().or(accepted.err());
        }
        self.failure = self.failure.take().or(failure);
    }

    fn finish(self, step: &Outgoing) -> StepOutcome {
        if let Some(failure) = self.failure {
            return (self.applied, Err(failure));
        }
        if step.step.rows.is_some() && self.applied.is_none() {
            return (None, Err(Error::new(Reason::ReplyInvalid, "nothing is said of the rows of a step")));
        }
        (self.applied, self.rows.map(BlockAnswer::finish).transpose())
    }
}

impl Sessions {
    /// Steps of several sessions, in one message where there is room for them.
    ///
    /// # Errors
    /// Each step by itself, as [`Session::step`]. [`Reason::Combination`] for a session of another coordinator's.
    pub async fn step_batch(&self, steps: &mut [BatchStep<'_>]) -> Vec<Result<Stepped, ClientError>> {
        let mut results: Vec<Option<Result<Stepped, ClientError>>> = Vec::with_capacity(steps.len());
        let (mut outgoing, mut places) = (Vec::new(), Vec::new());
        let mut deadline = self.deadline(None);
        for (at, step) in steps.iter_mut().enumerate() {
            let BatchStep { session, layer, k, v, q, options } = step;
            let ready = if session.is_of(self) {
                let by = self.deadline(options.attend.timeout);
                session.ready(*layer, k.clone(), v.clone(), q.clone(), options, by).await
            } else {
                let error =
                    Error::new(Reason::Combination, "a session and steps of others, which are elsewhere");
                Err(error.into())
            };
            results.push(match ready {
                Ok(Some(step)) => {
                    deadline = deadline.max(self.deadline(options.attend.timeout));
                    outgoing.push(step);
                    places.push(at);
                    None
                }
                // Too large to travel with others.
                Ok(None) => Some(session.step(*layer, k.clone(), v.clone(), q.clone(), options).await),
                Err(error) => Some(Err(error)),
            });
        }
        let done = run(&self.exchange, &outgoing, deadline).await;
        for ((at, step), done) in places.into_iter().zip(&outgoing).zip(done) {
            if let (Some(of), Some(result)) = (steps.get_mut(at), results.get_mut(at)) {
                *result = Some(of.session.stepped(step, done));
            }
        }
        let never = || Err(Error::new(Reason::Internal, "a step was forgotten").into());
        results.into_iter().map(|result| result.unwrap_or_else(never)).collect()
    }
}
