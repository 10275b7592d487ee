//! Finds workers for a call: plans it, reserves their memory, opens the shares.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Bias, Compute, EmptyRow, KERNEL_ID, Operator, Path};
use attnd_plan::{Capacity, Plan, PlanError, PlanRequest, VerifiedPlan};
use attnd_wire::join::{GENERAL_PATH, OPERATORS, OUTPUTS, PROJECTIONS, SCORES, WIRE_VERSIONS};
use attnd_wire::{Begin, ComputeBegin, Deadline, Error, Reason};

use super::Hub;
use super::membership_actor::{Candidate, Candidates, Capacities, Unused};
use super::worker_actor::{OpenShare, OpenedShare};

/// Plans that may fail because a worker or its memory went away between the look and the reservation.
const ATTEMPTS: usize = 3;

/// Largest dimension that workers before score functions take.
const OLD_MAX_DIM: usize = 512;

/// A plan whose workers wait for their bytes.
#[derive(Debug)]
pub(crate) struct Placement {
    pub(crate) plan: VerifiedPlan,
    /// One per share of the plan.
    pub(crate) shares: Vec<OpenedShare>,
}

/// Places a call on the workers that may get new work.
///
/// # Errors
/// [`Reason::NoWorkers`], [`Reason::Workers`], [`Reason::KvBudget`]; [`Reason::Overloaded`] if the cluster changes
/// faster than it can be planned for.
pub(crate) async fn place(
    hub: &Hub,
    begin: &Begin,
    call_id: u64,
    deadline: Deadline,
) -> Result<Placement, Error> {
    for _attempt in 0..ATTEMPTS {
        let gone = |_| Error::new(Reason::Internal, "the membership actor is gone");
        let ask = Capacities { least_version: least_version(begin) };
        let Candidates { usable: workers, unused } = hub.cluster.ask(ask).send().await.map_err(gone)?;
        // What workers that get no new work just now have may come back.
        let hopeless_over = (unused == Unused::default()).then(|| total_memory(&workers));
        let plan = plan(hub, begin, &workers, hopeless_over).await;
        let plan = plan.map_err(|error| with_unused(error, unused))?;
        if let Some(shares) = open(&plan, &workers, begin, call_id, deadline).await {
            return Ok(Placement { plan, shares });
        }
    }
    Err(Error::new(
        Reason::Overloaded,
        format!("workers or their memory went away {ATTEMPTS} times while planning"),
    ))
}

/// What workers are told to compute. Rows that see nothing are filled where all partials have merged, which is here, so what they
/// become neither reaches workers nor asks for new ones.
fn of_workers(operator: &Arc<Operator>) -> Arc<Operator> {
    match operator.empty_row() {
        EmptyRow::Zero => Arc::clone(operator),
        EmptyRow::Nan | EmptyRow::Uniform => Arc::new(operator.without_empty_row()),
    }
}

/// The first version of workers that can compute the call.
fn least_version(begin: &Begin) -> u32 {
    let operator = of_workers(&begin.operator);
    match (operator.path(), operator.kernel_id(Compute::F32)) {
        _ if begin.shape.kv_is_projected() => PROJECTIONS,
        _ if is_of_scores_shape(&begin.shape) || is_of_scores(&operator) => SCORES,
        _ if begin.outputs.is_some() => OUTPUTS,
        (Path::Plain, KERNEL_ID) => *WIRE_VERSIONS.start(),
        (Path::Plain, _newer) => OPERATORS,
        (Path::General, _) => GENERAL_PATH,
    }
}

/// Whether a shape is one that came with score functions.
fn is_of_scores_shape(shape: &AttnShape) -> bool {
    let dim = shape.head_dim().max(shape.value_dim());
    dim > OLD_MAX_DIM || shape.value_is_key_prefix()
}

/// Whether an operator has what came with score functions.
fn is_of_scores(operator: &Operator) -> bool {
    let has_table = |bias: &Bias| matches!(bias, Bias::Relative(_) | Bias::Swin(_));
    !operator.score().is_scaled_dot()
        || operator.csr().is_some()
        || operator.biases().iter().any(has_table)
        || operator.mask().documents.iter().any(|documents| documents.is_scattered())
}

/// The same refusal; where workers were missing, it says who is there and may not be used.
fn with_unused(error: Error, unused: Unused) -> Error {
    if error.reason != Reason::NoWorkers || unused == Unused::default() {
        return error;
    }
    Error::new(error.reason, format!("{}; {unused}", error.detail))
}

/// What all workers together could give if no call ran.
fn total_memory(workers: &[Candidate]) -> u64 {
    workers.iter().fold(0, |sum, worker| sum.saturating_add(worker.memory.limit()))
}

/// The refusal of a call that can't be planned. One that needs more than `hopeless_over` needn't come back.
fn refusal(error: PlanError, hopeless_over: Option<u64>) -> Error {
    match error {
        PlanError::Memory { need, .. } if hopeless_over.is_some_and(|total| need > total) => {
            Error::from(error).without_pushback()
        }
        _may_pass => error.into(),
    }
}

/// Plans, and proves that the plan covers every key once. Large plans take milliseconds: too long for this thread.
async fn plan(
    hub: &Hub,
    begin: &Begin,
    workers: &[Candidate],
    hopeless_over: Option<u64>,
) -> Result<VerifiedPlan, Error> {
    let capacities: Vec<Capacity> = workers.iter().map(|worker| worker.capacity.clone()).collect();
    let &Begin { shape, dtype, workers, ref operator, ref outputs, ref sides, .. } = begin;
    let (operator, outputs, sides) = (Arc::clone(operator), outputs.clone(), sides.clone());
    let request = PlanRequest { shape, operator, outputs, dtype, sides, workers };
    let costs = hub.costs;
    let planned = hub.pool.run(move || {
        let plan = attnd_plan::plan(&request, &capacities, &costs);
        let plan = plan.map_err(|error| refusal(error, hopeless_over))?;
        plan.verify(&shape).map_err(|error| Error::new(Reason::Internal, error.to_string()))
    });
    planned.await.map_err(|error| Error::new(Reason::Internal, format!("planning {error}")))?
}

/// Reserves the memory of all shares, then opens them; `None` if a worker or its memory is gone. What was reserved or
/// opened until then is given back.
async fn open(
    plan: &Plan,
    workers: &[Candidate],
    begin: &Begin,
    call_id: u64,
    deadline: Deadline,
) -> Option<Vec<OpenedShare>> {
    let mut reserved = Vec::with_capacity(plan.shares.len());
    for share in &plan.shares {
        let worker = workers.iter().find(|worker| worker.capacity.id == share.worker)?;
        reserved.push((share, worker, worker.memory.reserve(share.resident_bytes).ok()?));
    }
    let operator = of_workers(&begin.operator);
    let mut opened = Vec::with_capacity(reserved.len());
    for (share, worker, memory) in reserved {
        let begin = ComputeBegin {
            call_id,
            shape: begin.shape,
            dtype: begin.dtype,
            operator: Arc::clone(&operator),
            outputs: begin.outputs.clone(),
            sides: begin.sides.clone(),
            allow_non_finite: begin.allow_non_finite,
            pieces: share.pieces.clone(),
            tokens_per_cell: plan.tokens_per_cell,
        };
        tracing::trace!(worker = %share.worker, bytes = share.resident_bytes, "a share begins");
        opened.push(worker.actor.ask(OpenShare { begin, memory, deadline }).send().await.ok()?);
    }
    Some(opened)
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Causal, Csr, Dims, Dtype, OperatorParts, OutputsParts, Relative, Score, Swin};
    use attnd_plan::WorkerChoice;

    use super::*;

    #[test]
    fn old_workers_get_calls_of_old_versions() {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 1, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let of_shape = |shape: AttnShape, parts: OperatorParts, outputs| {
            let operator = Operator::new(parts, &shape).unwrap();
            least_version(&Begin {
                shape,
                dtype: Dtype::F32,
                outputs: attnd_wire::outputs::checked(outputs, &shape, &operator).unwrap(),
                operator: Arc::new(operator),
                sides: attnd_plan::Sides::default(),
                allow_non_finite: false,
                forbid_empty_rows: false,
                workers: WorkerChoice::Auto,
            })
        };
        let with_outputs = |parts, outputs| of_shape(shape, parts, outputs);
        let version = |parts| with_outputs(parts, OutputsParts::default());
        let plain = || OperatorParts::plain(1.0, Causal::TopLeft);
        assert_eq!(with_outputs(plain(), OutputsParts { top_k: 1, ..OutputsParts::default() }), 4);
        assert_eq!(version(plain()), 1);
        assert_eq!(version(OperatorParts { scale: -1.0, ..plain() }), 2);
        assert_eq!(version(OperatorParts { softcap: Some(30.0), ..plain() }), 3);
        assert_eq!(version(OperatorParts { scale: -1.0, softcap: Some(30.0), ..plain() }), 3);
        let score = Score::new("dot", Vec::new()).unwrap();
        assert_eq!(version(OperatorParts { score: score.clone(), ..plain() }), 5);
        assert_eq!(
            with_outputs(
                OperatorParts { score, ..plain() },
                OutputsParts { top_k: 1, ..OutputsParts::default() }
            ),
            5
        );
        // What rows without keys become is nothing to workers.
        for empty_row in [EmptyRow::Nan, EmptyRow::Uniform] {
            assert_eq!(version(OperatorParts { empty_row, ..plain() }), 1);
            assert_eq!(version(OperatorParts { empty_row, softcap: Some(30.0), ..plain() }), 3);
            let operator = Operator::new(OperatorParts { empty_row, ..plain() }, &shape).unwrap();
            assert_eq!(operator.kernel_id(Compute::F32), "c1-f32-op1", "the answer has a name of its own");
            assert_eq!(*of_workers(&Arc::new(operator)), Operator::plain(1.0, Causal::TopLeft));
        }
        let csr = Csr::new((1, 1), 1, [0, 1].into(), [0].into()).unwrap();
        assert_eq!(version(OperatorParts { csr: Some(csr), ..plain() }), 5);
        let large = |dims| of_shape(AttnShape::new(dims).unwrap(), plain(), OutputsParts::default());
        assert_eq!([large(Dims { head_dim: 512, ..dims }), large(Dims { head_dim: 513, ..dims })], [1, 5]);
        assert_eq!(large(Dims { value_dim: 513, ..dims }), 5);
        assert_eq!(of_shape(shape.with_projected_kv(), plain(), OutputsParts::default()), 6);
        let latent = shape.with_values_from_keys().unwrap();
        assert_eq!(of_shape(latent, plain(), OutputsParts::default()), 5);
        let swin = Swin { height: 1, width: 1, table: [0.5].into(), shift: None };
        assert_eq!(version(OperatorParts { biases: vec![Bias::Swin(swin)], ..plain() }), 5);
        let relative = Bias::Relative(Relative::new([0.5; 8].into(), 8, 20, false).unwrap());
        assert_eq!(version(OperatorParts { biases: vec![relative], ..plain() }), 5);
    }

    #[test]
    fn who_needs_more_than_there_is_is_not_asked_to_come_back() {
        let memory = PlanError::Memory { need: 9, free: 4 };
        for (error, hopeless_over, comes_back) in [
            (memory, Some(9), true),
            (memory, Some(8), false),
            (memory, None, true),
            (PlanError::NoWorkers, Some(0), true),
        ] {
            let refused = refusal(error, hopeless_over);
            assert_eq!(refused.pushback().is_some(), comes_back, "{refused}, {hopeless_over:?}");
            assert_eq!(refused.message(), Error::from(error).message());
        }
    }
}
