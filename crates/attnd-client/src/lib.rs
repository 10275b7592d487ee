//! The Rust client of attnd: connect to a coordinator, send one attention call, keep keys and values in a [`session`], ask how the cluster is.
//!
//! ```no_run
//! # async fn example(q: bytes::Bytes, k: bytes::Bytes, v: bytes::Bytes) -> Result<(), Box<dyn std::error::Error>> {
//! use attnd_client::{AttendOptions, AttnShape, Client, Dims, Dtype, Operands};
//!
//! let client = Client::connect("http://127.0.0.1:7400")?;
//! let dims = Dims { batch: 1, heads: 8, kv_heads: 2, queries: 16, keys: 4096, head_dim: 128, value_dim: 128 };
//! let operands = Operands { shape: AttnShape::new(dims)?, dtype: Dtype::F32, q, k, v };
//! let attended = client.attend(&operands, &AttendOptions::default(), &mut |_progress| {}).await?;
//! assert_eq!(attended.context.len(), 8 * 16 * 128);
//! # Ok(())
//! # }
//! ```
//!
//! Attention is a pure function of its operands, so a call that the cluster says it has not executed (a worker was
//! lost, say) is sent again by the client, at most [`MAX_ATTEMPTS`] times in all and never past the caller's timeout.
//! Dropping the future of a call cancels it everywhere.
#![forbid(unsafe_code)]

mod attempt;
mod client;
mod context;
mod error;
mod ids;
mod inspected;
pub mod layer;
mod local_call;
mod operands;
mod retry;
pub mod session;
mod side;
mod upload;

pub use attnd_kernel::{
    AttnShape, Causal, Dims, Documents, Dtype, EmptyRow, Mask, Normaliser, OutputsParts, PerBatch, Positions,
    Rectangle, Run, ShapeError, Stage, Storage, Window, alibi_slopes,
};
pub use attnd_plan::session::{SessionName, SessionSpec};
pub use attnd_plan::{Element, Projected, Projection, WorkerChoice};
pub use attnd_wire::deadline::MAX_TIMEOUT;
pub use attnd_wire::join::SESSIONS;
pub use attnd_wire::session::SessionDescription;
pub use attnd_wire::{
    ClusterStatus, Outcome, PlanSummary, Reason, SessionCounts, ShareSummary, Timings, WorkerStatus,
};
pub use client::{Attended, Client, Progress};
pub use error::ClientError;
pub use ids::{Numbering, documents_by_id};
pub use inspected::Inspected;
pub use local_call::{LocalAnswer, LocalCall};
pub use operands::{Alibi, AttendOptions, Operands};
pub use retry::{MAX_ATTEMPTS, MAX_SESSION_ATTEMPTS};
pub use side::{DenseTensor, KvSource};
