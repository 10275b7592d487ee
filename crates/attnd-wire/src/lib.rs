//! Bytes to values and errors to statuses: the only crate that sees protobuf.
//!
//! What comes out of here is valid: a decoded [`Begin`] has a shape that can be computed, a decoded [`Partial`] fits
//! its call. What doesn't hold is an [`Error`] with a [`Reason`], which says what was wrong, with numbers.
//!
//! # What is stable
//!
//! The messages of `proto/attnd/v1` (fields are added, never changed), the names of [`Reason`] and [`Outcome`], and
//! the code that each reason travels with. Not stable: the detail of an error, which is for people, and all Rust
//! names of this crate.
//!
//! # Map
//!
//! * [`error`]: the error and its journey as a gRPC status; [`mod@normalise`] turns statuses that the gRPC library made
//!   into it; [`refusal`] holds the wording.
//! * [`limits`]: every limit, and servers, channels and stubs that have them set. [`deadline`] and [`layer`]: what a
//!   server checks before a handler runs; [`codec`]: what is counted before a message is decoded; [`surroundings`]: the network that
//!   channels are of, chance and time.
//! * [`attend`], [`compute`], [`join`], [`status`]: the values of the four calls; [`session`] and [`hold`]: those of sessions, between
//!   clients and coordinator, and between it and workers; [`operator`]: what they compute;
//!   [`outputs`]: what they tell beside the context; [`projection`]: keys and values that workers make;
//!   [`convert`]: the small pieces they share; [`floats`]: f32 slices as bytes; [`checksum`]: CRC32C, and bytes
//!   that carry theirs along.
//!
//! # The seam to the gRPC library
//!
//! [`proto`] holds the generated messages, traits, servers and clients. Only code that opens or serves a stream
//! names them; everything else uses the values. [`Status`] is re-exported for the same code.
#![forbid(unsafe_code)]

pub mod attend;
pub mod checksum;
pub mod codec;
pub mod compute;
pub mod convert;
pub mod deadline;
pub mod error;
pub mod floats;
pub mod hold;
pub mod join;
pub mod layer;
pub mod limits;
pub mod normalise;
pub mod operator;
pub mod outputs;
pub mod projection;
pub mod proto;
pub mod refusal;
pub mod session;
pub mod status;
pub mod surroundings;

pub use attend::{
    AttendReply, AttendRequest, Begin, Commit, ContextChunk, Done, PlanSummary, ShareSummary, TensorChunk,
    Timings,
};
pub use checksum::Checksummed;
pub use compute::{CallShape, ComputeBegin, ComputeReply, ComputeRequest, Finished, Partial, SliceChunk};
pub use deadline::Deadline;
pub use error::{Error, Outcome, Reason};
pub use join::{Heartbeat, Hello, JoinReply, JoinRequest, Welcome};
pub use layer::EdgeLayer;
pub use limits::Link;
pub use normalise::normalise;
pub use outputs::elements::Elements;
pub use outputs::report::{HeatChunk, ReportChunk};
pub use outputs::share::{MergedSums, ShareReport};
pub use status::{ClusterStatus, SessionCounts, WorkerStatus};
pub use surroundings::Surroundings;
pub use tonic::{Code, Status};
