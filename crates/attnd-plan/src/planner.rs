//! Which worker computes what: kv groups first, slots of the key axis second, as many workers as are worth it.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::N_SLOTS;
use attnd_kernel::{AttnShape, Dtype, Operator, Outputs};

use crate::Tensor;
use crate::cost::{CallCosts, CostModel, Load};
use crate::inspection::tokens_per_report;
use crate::line::{CallFootprint, Hand, Line};
use crate::side::Sides;
use crate::topology::{Capacity, WorkerId};

/// Bytes of `o`, `m` and `l` that a partial message aims at.
const CELL_BYTES: usize = 512 << 10;
/// Vectors hold up to 16 query tokens; a cell of many tokens is a multiple of it.
const TOKEN_STEP: usize = 16;

/// How many workers a call may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerChoice {
    /// As many as the cost model finds fastest.
    #[default]
    Auto,
    /// The same, up to this many.
    AtMost(usize),
    /// This many, even where fewer would be faster; fewer only where there are fewer non-empty slots than that.
    Exactly(usize),
}

/// The call to plan.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRequest {
    /// Its dimensions.
    pub shape: AttnShape,
    /// What it computes; made for that shape.
    pub operator: Arc<Operator>,
    /// What is wanted beside the context; `None` if nothing is.
    pub outputs: Option<Arc<Outputs>>,
    /// The type of Q, K and V on the wire.
    pub dtype: Dtype,
    /// What travels beside Q, K and V; made for that shape.
    pub sides: Sides,
    /// How many workers it may use.
    pub workers: WorkerChoice,
}

/// Who computes what. [`Plan::verify`] proves that it is everything, once.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One per worker that has work, ascending by worker id; none is without keys.
    pub shares: Vec<Share>,
    /// Query tokens in one partial message.
    pub tokens_per_cell: usize,
    /// One sentence for a person: how many workers, cut by what, and why.
    pub reason: String,
    /// Predicted duration of the whole call.
    pub predicted_seconds: f64,
    /// Bytes that go to the workers: operands, what travels beside them, and the operator's tensors.
    pub sent_bytes: u64,
}

/// What one worker computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Who.
    pub worker: WorkerId,
    /// At most three, ascending.
    pub pieces: Vec<Piece>,
    /// Bytes of K and V that it receives, or of what it makes them of.
    pub kv_bytes: u64,
    /// Bytes that it must reserve: K and V in whole pages, Q and two cells of partials in f32, its parts of what travels
    /// beside them, and what a second pass needs.
    pub resident_bytes: u64,
}

/// Some kv groups times some slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Kv groups, flattened over the batch.
    pub groups: Range<usize>,
    /// Slots of the key axis, of each of these groups.
    pub slots: Range<usize>,
}

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nobody to work.
    #[error("no worker is alive")]
    NoWorkers,
    /// A certain number of workers was asked for.
    #[error("{asked} workers asked for, {alive} alive")]
    TooFewWorkers {
        /// Workers asked for.
        asked: usize,
        /// Workers there are.
        alive: usize,
    },
    /// A call needs at least one worker.
    #[error("0 workers asked for")]
    NoneAsked,
    /// The call doesn't fit into the memory of the workers it may use: even all of it would be too little, or it is in
    /// parts that cuts don't meet.
    #[error("need {need} bytes, {free} free")]
    Memory {
        /// More than `free`, always. What the call needs on one worker, if that is more; else `free` and what the
        /// rest of the call needs that finds no place: a cut leaves part of a worker's memory unused, because slots
        /// are not divided, and every worker needs queries and partials of its own.
        need: u64,
        /// Free bytes of all workers that the call may use.
        free: u64,
    },
}

/// Plans a call over `workers`, in any order; equal inputs give equal plans.
pub fn plan(req: &PlanRequest, workers: &[Capacity], costs: &CostModel) -> Result<Plan, PlanError> {
    let mut alive: Vec<&Capacity> = workers.iter().collect();
    alive.sort_by(|a, b| a.id.cmp(&b.id));
    alive.dedup_by(|a, b| a.id == b.id);
    let planner = Planner::new(req, &alive, costs);
    match req.workers {
        _ if alive.is_empty() => Err(PlanError::NoWorkers),
        WorkerChoice::AtMost(0) | WorkerChoice::Exactly(0) => Err(PlanError::NoneAsked),
        WorkerChoice::Exactly(asked) if asked > alive.len() => {
            Err(PlanError::TooFewWorkers { asked, alive: alive.len() })
        }
        WorkerChoice::Exactly(asked) => planner.exactly(asked),
        WorkerChoice::AtMost(most) => planner.cheapest(most.min(alive.len())),
        WorkerChoice::Auto => planner.cheapest(alive.len()),
    }
}

/// Query tokens in one partial message, so that it is about 512 KiB. One token of the largest group has 4 MiB.
pub fn tokens_per_cell(shape: &AttnShape, outputs: Option<&Outputs>) -> usize {
    let row_bytes = shape.group_size() * (shape.value_dim() + 2) * 4;
    let tokens = (CELL_BYTES / row_bytes).max(1);
    let stepped = if tokens > TOKEN_STEP { tokens / TOKEN_STEP * TOKEN_STEP } else { tokens };
    let of_context = stepped.min(shape.n_queries());
    outputs.map_or(of_context, |outputs| tokens_per_report(outputs, of_context))
}

struct Planner<'a> {
    shape: AttnShape,
    dtype: Dtype,
    line: Line<CallFootprint>,
    costs: CallCosts,
    tokens_per_cell: usize,
    alive: usize,
    /// The best first: the fastest, or the ones with the most memory where speed alone doesn't do.
    by_speed: Vec<&'a Capacity>,
    by_memory: Vec<&'a Capacity>,
}

/// A plan without its reason.
struct Draft {
    shares: Vec<Share>,
    seconds: f64,
    sent_bytes: u64,
    splits_groups: bool,
}

impl<'a> Planner<'a> {
    fn new(req: &PlanRequest, alive: &[&'a Capacity], costs: &CostModel) -> Self {
        let tokens_per_cell = tokens_per_cell(&req.shape, req.outputs.as_deref());
        let (mut by_speed, mut by_memory) = (alive.to_vec(), alive.to_vec());
        // Stable sorts: equal workers stay in the order of their ids.
        by_speed.sort_by(|a, b| b.speed().total_cmp(&a.speed()));
        by_memory.sort_by_key(|worker| std::cmp::Reverse(worker.free_bytes));
        Self {
            shape: req.shape,
            dtype: req.dtype,
            line: Line::new(req, tokens_per_cell),
            costs: CallCosts::new(costs, req, tokens_per_cell),
            tokens_per_cell,
            alive: alive.len(),
            by_speed,
            by_memory,
        }
    }

    fn exactly(&self, asked: usize) -> Result<Plan, PlanError> {
        let draft = self
            .draft(asked, true)
            .or_else(|| self.draft(asked, false))
            .ok_or_else(|| self.too_little_memory(asked))?;
        let why = match draft.shares.len() {
            used if used == asked => "as asked".to_owned(),
            used => format!("{asked} were asked for, there is work or memory for {used}"),
        };
        Ok(self.finish(draft, &why))
    }

    fn cheapest(&self, most: usize) -> Result<Plan, PlanError> {
        let least = fewest(most, |n| self.fits(n)).ok_or_else(|| self.too_little_memory(most))?;
        let mut order: Vec<(f64, usize)> = (least..=most).map(|n| (self.guess(n), n)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let best =
            best_draft(&order, |n| self.draft(n, false)).ok_or_else(|| self.too_little_memory(most))?;
        let other = if best.shares.len() == 1 { 2 } else { 1 };
        let why = match self.draft(other.min(most), true) {
            _ if most == 1 && self.alive > 1 => "one is all the call may use".to_owned(),
            _ if most == 1 => "there is one".to_owned(),
            Some(draft) if draft.shares.len() == other => {
                format!("{other} would take {}", duration(draft.seconds))
            }
            Some(_) => "there is no work for more".to_owned(),
            None => format!("{other} would not have the memory"),
        };
        Ok(self.finish(best, &why))
    }

    /// Seconds of `n` workers if any cut were possible.
    fn guess(&self, n: usize) -> f64 {
        let chosen = self.by_speed.get(..n).unwrap_or(&self.by_speed);
        let all: f64 = chosen.iter().map(|worker| worker.speed()).sum();
        let keys = self.line.keys(&(0..self.line.len())) as f64;
        let groups = self.shape.n_groups();
        // Of more workers than groups, hardly anybody has a whole one.
        let cut_pages = if n > groups { self.line.pages(&(0..self.line.len())) } else { 0 };
        let loads: Vec<Load> = chosen
            .iter()
            .map(|worker| Load {
                keys: (keys * worker.speed() / all) as u64,
                groups: (groups / n).max(1),
                nodes: (groups / n).max(1),
                cut_runs: cut_pages / n as u64,
                side_bytes: self.line.side_bytes(&(0..self.line.len().div_ceil(n))),
                gflops: worker.speed(),
            })
            .collect();
        self.costs.predict(&loads)
    }

    /// Cuts the work among the `n` best workers; `None` if their memory doesn't suffice.
    fn draft(&self, n: usize, use_all: bool) -> Option<Draft> {
        self.draft_with(self.by_speed.get(..n)?, use_all)
            .or_else(|| self.draft_with(self.by_memory.get(..n)?, use_all))
    }

    /// Whether there is a draft with `n` workers; if so, there is one with more.
    fn fits(&self, n: usize) -> bool {
        [&self.by_speed, &self.by_memory].into_iter().filter_map(|best| best.get(..n)).any(|chosen| {
            let (_, hands) = in_order(chosen);
            self.line.left_over(&hands).is_empty()
        })
    }

    fn draft_with(&self, chosen: &[&Capacity], use_all: bool) -> Option<Draft> {
        let (chosen, hands) = in_order(chosen);
        let intervals = self.line.cut(&hands, use_all, &self.costs.of_cuts())?;
        let given =
            || chosen.iter().zip(&intervals).filter_map(|(worker, places)| Some((*worker, places.as_ref()?)));
        let dims = [Tensor::K, Tensor::V].map(|tensor| tensor.layout(&self.shape).2);
        let key_bytes = (self.dtype.size() * (dims[0] + dims[1])) as u64;
        let loads: Vec<Load> = given()
            .map(|(worker, places)| Load {
                keys: self.line.keys(places),
                groups: self.line.groups(places),
                nodes: self.line.nodes(places),
                cut_runs: self.line.cut_runs(places),
                side_bytes: self.line.side_bytes(places),
                gflops: worker.speed(),
            })
            .collect();
        Some(Draft {
            seconds: self.costs.predict(&loads),
            sent_bytes: self.costs.bytes_out(&loads) as u64,
            splits_groups: given().any(|(_, places)| places.start % N_SLOTS != 0),
            shares: given()
                .map(|(worker, places)| Share {
                    worker: worker.id.clone(),
                    pieces: self.line.pieces(places),
                    kv_bytes: self.line.keys(places) * key_bytes + self.line.source_bytes(places),
                    resident_bytes: self.line.resident_bytes(places),
                })
                .collect(),
        })
    }

    fn too_little_memory(&self, n: usize) -> PlanError {
        let (chosen, hands) = in_order(self.by_memory.get(..n).unwrap_or(&self.by_memory));
        let free = chosen.iter().fold(0_u64, |sum, worker| sum.saturating_add(worker.free_bytes));
        let need = match self.line.resident_bytes(&(0..self.line.len())) {
            whole if whole > free => whole,
            _ => free.saturating_add(self.line.resident_bytes(&self.line.left_over(&hands))),
        };
        PlanError::Memory { need, free }
    }

    fn finish(&self, draft: Draft, why: &str) -> Plan {
        let cut = cut_by(draft.shares.len(), draft.splits_groups, self.shape.n_groups());
        Plan {
            reason: format!(
                "{} of {} workers, {cut}, predicted {}: {why}",
                draft.shares.len(),
                self.alive,
                duration(draft.seconds)
            ),
            shares: draft.shares,
            tokens_per_cell: self.tokens_per_cell,
            predicted_seconds: draft.seconds,
            sent_bytes: draft.sent_bytes,
        }
    }
}

/// Workers in the order of their ids, which is the order of their intervals.
fn in_order<'a>(chosen: &[&'a Capacity]) -> (Vec<&'a Capacity>, Vec<Hand>) {
    let mut chosen = chosen.to_vec();
    chosen.sort_by(|a, b| a.id.cmp(&b.id));
    let hand = |worker: &&Capacity| Hand { gflops: worker.speed(), free_bytes: worker.free_bytes };
    let hands = chosen.iter().map(hand).collect();
    (chosen, hands)
}

/// The smallest number up to `most` that fits, where all that are larger than one that fits do; by bisection.
fn fewest(most: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    if !fits(most) {
        return None;
    }
    let (mut bad, mut good) = (0, most);
    while good - bad > 1 {
        let middle = bad + (good - bad) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    Some(good)
}

/// The fastest draft among numbers of workers, which are in the order of their guesses. An even cut without any loss
/// is a guess that is cheap to make and seldom beaten, so the first drafts are the best, and where there is memory
/// enough the search ends after one or two. Where memory decides, no draft is near its guess, and neighbours are much
/// the same: the distance between two tries doubles, so that hundreds of workers take ten.
fn best_draft(order: &[(f64, usize)], draft: impl Fn(usize) -> Option<Draft>) -> Option<Draft> {
    let mut best: Option<Draft> = None;
    let places = std::iter::successors(Some(0_usize), |place| Some(place + (*place).max(1)));
    for (guess, n) in places.map_while(|place| order.get(place)) {
        if best.as_ref().is_some_and(|best| best.seconds <= *guess) {
            break;
        }
        let is_better = |draft: &Draft| best.as_ref().is_none_or(|best| draft.seconds < best.seconds);
        best = draft(*n).filter(is_better).or(best);
    }
    best
}

/// By what something is cut into so many parts, for a person.
pub(crate) fn cut_by(parts: usize, splits_groups: bool, n_groups: usize) -> &'static str {
    match (parts, splits_groups) {
        (1, _) => "uncut",
        (_, false) => "cut by heads",
        (_, true) if n_groups == 1 => "cut by slots",
        (_, true) => "cut by heads and slots",
    }
}

/// Seconds for a person.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.2} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

#[cfg(test)]
pub(crate) mod tests;
