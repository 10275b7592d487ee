//! Resident sessions: what they are, who holds what of them, and what becomes of an op when messages and workers are lost.
//!
//! A session is cut once, when it is opened, into *shards*: kv groups times slots, of all its layers. Each shard has *replicas* on
//! workers of different failure domains, and an *epoch*, which grows whenever the set of its replicas changes and is enforced by the
//! workers. What changes a session is an *op*: numbered from 1, one in flight at a time, and sent to **every replica of every shard**,
//! also to those that hold none of its tokens. So the length of a shard is the length of the session, an op that was acknowledged is on
//! enough replicas of each shard, and what a shard has beyond the shortest one was acknowledged by nobody.
//!
//! * [`spec`] is what can't change as long as a session lives; [`op`] what changes it, and how ops are told apart.
//! * [`rows`] says which rows of an append go to which shard, [`pages`] which pages a copy of a replica has, [`attempt`] who computes queries, and who does after a loss;
//!   [`hedging`] when a second one is asked.
//! * [`placement`] cuts a session into shards and says who holds their replicas.
//! * [`ledger`] is the coordinator's side of a session: which op is next, who has it, and what becomes of it when replicas are lost.
//! * [`replica`] is one replica of a shard, as the worker that holds it sees it; [`window`] the ops that are remembered, [`closed`] the sessions.

pub mod attempt;
pub mod closed;
pub mod hedging;
pub mod ledger;
pub mod op;
pub mod pages;
pub mod placement;
pub mod replica;
pub mod rows;
pub mod spec;
pub mod window;

#[cfg(test)]
mod explorer;
#[cfg(test)]
mod model;

pub use attempt::{Attempt, Exhausted};
pub use closed::{Closed, ClosedSessions};
pub use hedging::Hedging;
pub use ledger::{
    Ask, Begun, Ledger, LedgerAction, LedgerError, LedgerEvent, Outcome, Phase, Read, ReadRequest, Request,
    SavedShard,
};
pub use op::{Answer, Change, Holder, Op, Record};
pub use pages::{CopyPage, CopyPages};
pub use placement::{
    Keeper, Move, Placement, PlacementError, ShardPlacement, place, rebalance, replacement, shard_bytes,
};
pub use replica::{Replica, ReplicaRefusal, ReplicaSnapshot, ReplicaState, Terms, Undone, Verdict};
pub use spec::{SessionName, SessionNameError, SessionSpec, SpecError};
pub use window::{KEPT, WINDOW, Window};
