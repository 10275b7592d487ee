//! The gRPC service of a worker: reads Begin, decides whether the call fits, and hands the stream to a shard actor.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use attnd_kernel::Kernels;
use attnd_plan::InspectionBytes;
use attnd_plan::call::STREAM_IDLE;
use attnd_wire::proto::{self, worker_server};
use attnd_wire::surroundings::now;
use attnd_wire::{ComputeBegin, ComputeRequest, Deadline, Error, Reason, Status, refusal};
use kameo::actor::{ActorRef, Spawn};
use kameo::mailbox;
use tokio::sync::mpsc;
use tonic::{Request, Response, Streaming};

use super::Gauges;
use super::assembly::Layout;
use super::cells::{Call, QUEUE};
use super::intake::{self, Intake};
use super::second_pass::SumsDue;
use super::shard::{MAILBOX, Replies, Shard, ShardArgs};
use super::supervisor::Supervisor;
use crate::compute_pool::BusyClock;

/// The service.
#[derive(Debug)]
pub(crate) struct WorkerService {
    pub(crate) kernels: &'static Kernels,
    pub(crate) gauges: Gauges,
    pub(crate) supervisor: ActorRef<Supervisor>,
}

impl WorkerService {
    #[tracing::instrument(level = "debug", skip_all, fields(call_id))]
    async fn start(
        &self,
        mut inbound: Streaming<proto::ComputeRequest>,
        deadline: Deadline,
    ) -> Result<Replies, Error> {
        let in_flight = self.gauges.calls.enter().ok_or_else(|| Error::new(Reason::Draining, ""))?;
        let begin = read_begin(&mut inbound, deadline).await?;
        tracing::Span::current().record("call_id", begin.call_id);
        let layout = Layout::new(&begin);
        let groups_need = intake::bytes_needed(&layout, &begin.sides, &begin.pieces)?;
        let cells_need = cell_bytes(&layout, &begin).saturating_add(inspection_bytes(&begin));
        let sums = match &begin.outputs {
            Some(_) => SumsDue::new(&begin.shape, &begin.pieces, begin.tokens_per_cell),
            None => SumsDue::default(),
        };
        let mut memory = self
            .gauges
            .budget
            .reserve(groups_need.saturating_add(cells_need))
            .map_err(|over| refusal::kv_budget(over.need, over.free))?;
        let n_sums = sums.left();
        let intake = Intake::new(layout, &begin.sides, &begin.pieces, sums, &mut memory);
        let groups = begin.pieces.iter().map(|piece| piece.groups.len()).sum();

        let call = Arc::new(Call {
            begin,
            kernels: self.kernels,
            pool: self.gauges.pool.clone(),
            cancelled: AtomicBool::new(false),
            busy: BusyClock::default(),
            memory,
        });
        tracing::debug!(groups, bytes = groups_need, "a call begins");
        let (replies, queue) = mpsc::channel(QUEUE);
        let args =
            ShardArgs { intake, groups, sums: n_sums, call: Arc::clone(&call), inbound, replies, deadline };
        let shard = Shard::spawn_link_with_mailbox(&self.supervisor, args, mailbox::bounded(MAILBOX)).await;
        Ok(Replies::new(queue, shard, call, in_flight))
    }
}

/// Waits for Begin. No headers are sent until it is here, so the deadline has to pass here a little earlier than in the
/// library, which would answer in its own words.
async fn read_begin(
    inbound: &mut Streaming<proto::ComputeRequest>,
    deadline: Deadline,
) -> Result<ComputeBegin, Error> {
    let left = deadline.for_next_hop().remaining(now())?;
    let first = tokio::time::timeout(left.min(STREAM_IDLE), inbound.message());
    let late = |_elapsed| {
        if left < STREAM_IDLE { Deadline::expired() } else { refusal::stream_idle(STREAM_IDLE) }
    };
    match first.await.map_err(late)??.map(|frame| ComputeRequest::decode(frame, None)).transpose()? {
        Some(ComputeRequest::Begin(begin)) => Ok(begin),
        _ => Err(refusal::expected_begin()),
    }
}

/// Memory of the cells that are there at once; Begin was refused if a partial doesn't fit into a message.
fn cell_bytes(layout: &Layout, begin: &ComputeBegin) -> u64 {
    let (residency, tokens) = (&layout.residency, begin.tokens_per_cell);
    let inspected = if begin.outputs.is_some() { residency.inspected_bytes(tokens) } else { 0 };
    (QUEUE as u64 * residency.cell_bytes(tokens)).saturating_add(inspected)
}

/// Memory of the second pass, beside operands.
fn inspection_bytes(begin: &ComputeBegin) -> u64 {
    let needs = InspectionBytes::new(begin.outputs.as_deref(), &begin.shape, begin.tokens_per_cell);
    let groups: usize = begin.pieces.iter().map(|piece| piece.groups.len()).sum();
    needs.of_share.saturating_add(needs.of_group.saturating_mul(groups as u64))
}

#[tonic::async_trait]
impl worker_server::Worker for WorkerService {
    type ComputeStream = Replies;

    async fn compute(
        &self,
        request: Request<Streaming<proto::ComputeRequest>>,
    ) -> Result<Response<Replies>, Status> {
        // The layer in front of every service puts it there.
        let deadline = request.extensions().get::<Deadline>().copied();
        let deadline =
            deadline.ok_or_else(|| Error::new(Reason::Internal, "a request without a deadline"))?;
        let replies = self.start(request.into_inner(), deadline).await?;
        Ok(Response::new(replies))
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{
        AttnShape, Causal, Dims, Dtype, Operator, OperatorParts, Outputs, OutputsParts, Score, Stage, Tensor,
    };
    use attnd_plan::{
        Capacity, CostModel, Element, PlanRequest, Projected, Projection, SideLayout, SideTensor, Sides,
        WorkerChoice, WorkerId, plan,
    };

    use super::*;

    #[test]
    fn what_a_plan_counts_is_what_a_worker_reserves() {
        let workers: Vec<Capacity> = ["a", "b", "c"]
            .into_iter()
            .map(|id| Capacity { id: WorkerId::new(id).unwrap(), gflops: 100.0, free_bytes: 1 << 40 })
            .collect();
        let dims =
            Dims { batch: 2, heads: 4, kv_heads: 2, queries: 50, keys: 3000, head_dim: 65, value_dim: 33 };
        let shape = AttnShape::new(dims).unwrap();
        let operator = Arc::new(Operator::plain(1.0, Causal::None));
        let wanted = OutputsParts {
            stages: vec![Stage::Weights],
            top_k: 900,
            heatmap: Some((40, 3000)),
            heads: Some(1..4),
            ..OutputsParts::default()
        };
        let wanted = Arc::new(Outputs::new(wanted, &shape, &operator).unwrap());
        let float = Element::Float(Dtype::F16);
        let dense = |tensor, element, dims| SideLayout::dense(tensor, element, dims, &shape).unwrap();
        let beside = [
            Sides::default(),
            Sides::new(vec![dense(SideTensor::Mask, Element::Bool, [1, 1, 50, 3000])]).unwrap(),
            Sides::new(vec![
                dense(SideTensor::Mask, Element::Bool, [2, 4, 1, 999]),
                dense(SideTensor::Bias, float, [1, 4, 50, 2000]),
            ])
            .unwrap(),
            Sides::new(vec![dense(SideTensor::Previous, float, [2, 4, 50, 3000])]).unwrap(),
        ];
        // Keys become others, which takes them twice.
        let ones = |name: &str, shape: &[usize]| Tensor {
            name: name.into(),
            shape: shape.into(),
            values: vec![1.0; shape.iter().product()].into(),
        };
        let parameters = [
            ("v", [3].as_slice()),
            ("w_q", &[3, 65]),
            ("w_k", &[3, 65]),
            ("u", &[3, 1]),
            ("filters", &[1, 5]),
        ];
        let score =
            Score::new("location_aware", parameters.map(|(name, shape)| ones(name, shape)).into()).unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        let aware = Arc::new(Operator::new(parts, &shape).unwrap());
        // Keys and values that are made of rows, of which others are made then.
        let score = Score::new("cosine", Vec::new()).unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        let cosine = Arc::new(Operator::new(parts, &shape).unwrap());
        let projected = |dtype, width, has_bias| Projected { dtype, width, has_bias };
        let (key, value) = (projected(Dtype::F16, 100, true), projected(Dtype::F32, 30, false));
        let sources = [(key, Projected { has_bias: false, ..key }, true), (key, value, false)];
        let made = sources.map(|(key, value, same_rows)| {
            let projection = Projection { key, value, same_rows };
            let mask = dense(SideTensor::Mask, Element::Bool, [1, 1, 50, 3000]);
            Sides::new(projection.layouts(&shape).unwrap().into_iter().chain([mask]).collect()).unwrap()
        });
        let beside = beside.into_iter().chain(made);
        let operators = [&operator, &operator, &operator, &aware, &operator, &cosine];
        let outputs = [None, None, Some(wanted), None, None, None];
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F32];
        let calls = dtypes.into_iter().zip(operators).zip(beside).zip(outputs);
        for (((dtype, operator), sides), outputs) in calls {
            let shape = match Projection::of(&sides) {
                Some(_) => shape.with_projected_kv(),
                None => shape,
            };
            for n in 1..=3 {
                let req = PlanRequest {
                    shape,
                    operator: Arc::clone(operator),
                    outputs: outputs.clone(),
                    dtype,
                    sides: sides.clone(),
                    workers: WorkerChoice::Exactly(n),
                };
                let plan = plan(&req, &workers, &CostModel::default()).unwrap();
                for share in plan.shares {
                    let begin = ComputeBegin {
                        call_id: 1,
                        shape,
                        dtype,
                        operator: Arc::clone(operator),
                        outputs: outputs.clone(),
                        sides: sides.clone(),
                        allow_non_finite: false,
                        pieces: share.pieces,
                        tokens_per_cell: plan.tokens_per_cell,
                    };
                    let layout = Layout::new(&begin);
                    let groups = intake::bytes_needed(&layout, &begin.sides, &begin.pieces).unwrap();
                    let all = groups + cell_bytes(&layout, &begin) + inspection_bytes(&begin);
                    assert_eq!(all, share.resident_bytes, "{dtype}, {n} workers, {outputs:?}");
                }
            }
        }
    }
}
