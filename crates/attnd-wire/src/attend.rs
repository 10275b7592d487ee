//! The values of the public call: what a client sends, in `request.rs`, and what it gets back, in `reply.rs`.

pub use self::reply::{AttendReply, ContextChunk, Done, PlanSummary, ShareSummary, Timings};
pub use self::request::{AttendRequest, Begin, Commit, TensorChunk};

mod reply;
mod request;
#[cfg(test)]
pub(crate) mod tests;
