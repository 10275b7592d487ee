//! The values of sessions: what a client asks for on its stream, and what it gets back.
//!
//! Requests are decoded in two steps, because what rows and queries must look like is known only to whoever has looked up their
//! session: a frame by itself first (names, numbers, checksums), then what is in it against a [`SessionSpec`]. A stream carries many requests,
//! so one that is refused is answered and costs the others nothing.
//!
//! Tensors stay slices of the message that brought them.
//!
//! [`SessionSpec`]: attnd_plan::session::SessionSpec

pub mod digest;
mod failure;
mod reply;
mod request;
mod spec;
mod step;

pub use self::reply::{
    Answer, Applied, SessionDescription, SessionReply, ShardDescription, ShardHealth, StepContext, StepResult,
};
pub use self::request::{
    Append, AppendChunk, Ask, Asked, Change, ChangeKind, DEFAULT_REQUEST_TIMEOUT, Mutation, Open,
    SessionRequest,
};
pub use self::spec::check_layer;
pub(crate) use self::spec::decode as decode_spec;
pub(crate) use self::step::payload;
pub use self::step::{QueryOperator, RowShape, Step, StepQueries, StepRows, check_operator};

#[cfg(test)]
pub(crate) mod tests;
