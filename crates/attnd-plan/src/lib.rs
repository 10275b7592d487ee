//! Who computes what, what is still missing, and in which order it merges.
//!
//! Everything here is a pure function or a state machine: events and `now` go in, plans and actions come out. There is
//! no I/O, no task, no clock, no randomness and no hash order, so that equal inputs give equal outputs and the hard
//! parts are tested by golden traces (`testscripts/`).
//!
//! * [`plan`] cuts an attention call into [`Share`]s, one per worker, by kv groups first and by slots second.
//! * [`Router`] says which bytes of Q, K and V go to which share, [`Cutter`] the same of what travels beside them
//!   ([`Sides`]).
//! * [`Gather`] takes partials exactly once, and [`fold()`] merges them along the canonical tree.
//! * [`Call`] is one one-shot call from its first chunk to its last partial.
//! * [`session`] is what stays: keys and values that are resident, and what becomes of them when something is lost.
//! * [`Membership`] is the set of workers: who is alive, suspect, draining, quarantined or dead.
//! * [`mod@omission`] names the checks that simulations show to be needed.

mod arrival;
pub mod call;
pub mod cost;
pub mod cover;
pub mod fold;
pub mod gather;
pub mod inspection;
mod line;
pub mod membership;
pub mod omission;
pub mod planner;
mod report;
mod residency;
pub mod route;
pub mod session;
pub mod side;
pub mod topology;

pub use arrival::Misplaced;
pub use call::{Call, CallAction, CallError, CallEvent};
pub use cost::CostModel;
pub use cover::{CoverError, VerifiedPlan, filled_nodes};
pub use fold::fold;
pub use gather::{CellId, Gather, GatherError, Ready, cells};
pub use inspection::{ELEMENT_BYTES, InspectionBytes, most_report_bytes};
pub use membership::{
    Death, Facts, MemberAction, MemberChange, MemberEvent, MemberState, Membership, Rejection, Rules,
};
pub use planner::{Piece, Plan, PlanError, PlanRequest, Share, WorkerChoice, plan, tokens_per_cell};
pub use report::{ReportError, ReportId};
pub use residency::Residency;
pub use route::{Router, Run};
pub use side::{
    AnyTensor, Cutter, Element, Gathered, MAX_WIDTH, PlanePart, Projected, Projection, SideError, SideLayout,
    SideTensor, Sides,
};
pub use topology::{Capacity, WorkerId, WorkerIdError};

/// One of the three operands of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tensor {
    /// Queries, `[batch, heads, queries, query_dim]`.
    Q,
    /// Keys, `[batch, kv_heads, keys, head_dim]`; nothing where workers make them of rows.
    K,
    /// Values, `[batch, kv_heads, keys, value_dim]`; nothing where they are parts of keys, or workers make them.
    V,
}

impl Tensor {
    /// All three, in the order of the wire.
    pub const ALL: [Self; 3] = [Self::Q, Self::K, Self::V];

    /// Heads over the batch, tokens per head and elements per token of this tensor, as it is sent in a call of `shape`.
    pub fn layout(self, shape: &attnd_kernel::AttnShape) -> (usize, usize, usize) {
        match self {
            Self::Q => (shape.batch() * shape.n_heads(), shape.n_queries(), shape.query_dim()),
            Self::K | Self::V if shape.kv_is_projected() => (shape.n_groups(), shape.n_keys(), 0),
            Self::K => (shape.n_groups(), shape.n_keys(), shape.head_dim()),
            Self::V if shape.value_is_key_prefix() => (shape.n_groups(), shape.n_keys(), 0),
            Self::V => (shape.n_groups(), shape.n_keys(), shape.value_dim()),
        }
    }

    /// Bytes of the whole tensor in elements of `dtype_bytes`.
    pub fn bytes(self, shape: &attnd_kernel::AttnShape, dtype_bytes: usize) -> u64 {
        let (heads, tokens, dim) = self.layout(shape);
        (heads as u64) * (tokens as u64) * (dim as u64) * (dtype_bytes as u64)
    }
}

impl std::fmt::Display for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
        })
    }
}
