//! From the answers of a step's shards to its results: rows are merged, and cut into parts that messages have room for.

use std::sync::Arc;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use attnd_plan::session::Read;
use attnd_wire::session::{StepContext, StepResult};
use attnd_wire::{CallShape, ContextChunk, Error, Reason};

use super::Sessions;
use super::merge::{Rows, merge};
use super::session::Session;
use super::steps::{Asked, QueriesState, RowsState, Running};
use super::works;

/// Bytes of partials that are merged where they come in; more of them go to the pool.
const MERGED_HERE: usize = 256 << 10;

/// The results of a step whose answers are here.
pub(super) async fn answer(sessions: &Sessions, at: usize, step: Running) -> Vec<StepResult> {
    let Running { of, rows, queries, .. } = step;
    let session = of.session;
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
struct MergedOf {
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
