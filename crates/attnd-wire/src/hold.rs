//! The values between coordinator and worker about shards of sessions.
//!
//! Requests are decoded in two steps, as in [`crate::session`]: a frame by itself first, then what is in it against the spec and the
//! pieces of the shard that it is about. Replies likewise: partials can be read only by whoever knows which cells were asked for.

mod copy;
mod partials;
mod reply;
mod request;
mod work;

pub use self::copy::{
    CopyBase, CopyChunk, CopySum, ExportRead, ShardExport, ShardImport, ShardSnapshot, pages_of_chunk,
};
pub use self::partials::PartialRun;
pub use self::reply::{HoldAnswer, HoldReply, ShardRecords, ShardResult, ShardState};
pub use self::request::{
    HoldAsk, HoldAsked, HoldRequest, HoldShard, ShardAppend, ShardAt, ShardChange, ShardChangeKind, ShardOp,
    check_chunk,
};
pub use self::work::{ShardQueries, ShardRows, ShardWork, timeout_ms};

#[cfg(test)]
mod tests;
