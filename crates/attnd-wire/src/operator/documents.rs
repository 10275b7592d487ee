//! Runs of documents in messages. They are flat lists: a message of many small messages would take many times its bytes
//! in memory.

use attnd_kernel::{AttnShape, Documents, OperatorError, Run};

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::limits::MAX_RUNS;
use crate::proto;

pub(super) fn encode(documents: &Documents) -> proto::Documents {
    let runs = |batches: &[Vec<Run>]| proto::Runs {
        end: batches.iter().flatten().map(|run| small(run.end)).collect(),
        id: batches.iter().flatten().map(|run| run.id).collect(),
        count: batches.iter().map(|runs| small(runs.len())).collect(),
    };
    proto::Documents { queries: Some(runs(documents.queries())), keys: Some(runs(documents.keys())) }
}

/// Decodes documents; that their runs end where the tokens do is for the operator to check.
pub(super) fn decode(message: proto::Documents, shape: &AttnShape) -> Result<Documents, Error> {
    let queries = batches("mask.documents.queries", message.queries.unwrap_or_default(), shape)?;
    let keys = batches("mask.documents.keys", message.keys.unwrap_or_default(), shape)?;
    Ok(Documents::new(&queries, &keys).map_err(OperatorError::from)?)
}

fn batches(option: &str, runs: proto::Runs, shape: &AttnShape) -> Result<Vec<Vec<Run>>, Error> {
    let proto::Runs { end, id, count } = runs;
    let refused = |what: String| Err(Error::new(Reason::Operator, format!("{option} {what}")));
    if end.len() > MAX_RUNS {
        return refused(format!("has {} runs, at most {MAX_RUNS}", end.len()));
    }
    if end.len() != id.len() {
        return refused(format!("has {} ends, {} ids", end.len(), id.len()));
    }
    if count.len() != 1 && count.len() != shape.batch() {
        return refused(format!("has {} entries, batch is {}", count.len(), shape.batch()));
    }
    let counted: u64 = count.iter().copied().map(u64::from).sum();
    if counted != end.len() as u64 {
        return refused(format!("has {} runs, counts for {counted}", end.len()));
    }
    let mut runs = end.into_iter().zip(id).map(|(end, id)| Run { end: convert::size(end), id });
    Ok(count.into_iter().map(|n| runs.by_ref().take(convert::size(n)).collect()).collect())
}
