//! What a coordinator must still know after a restart: which sessions there are, who holds their shards, and its own term. What the
//! sessions have is not here; lengths and digests are with the workers.
//!
//! [`MetaStore`] is the contract: each function is one transaction, which has happened, and stays, once it returns. There are two:
//! [`InMemory`] forgets all of it with the process, [`RedbStore`] has a file.
//!
//! `MetaThread` (`thread.rs`) is how asynchronous code uses one. A thread of its own runs the transactions, one after the other, in the order in
//! which they were asked for: a store writes one at a time anyway, so with a pool of threads a disk that takes its time would have
//! as many of them waiting as there are requests. Whoever finds too many before it waits too, on the runtime, which goes on.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use attnd_plan::session::Holder;

mod in_memory;
mod record;
mod redb;
#[cfg(test)]
mod tests;
mod thread;

pub use self::in_memory::InMemory;
pub use self::record::{SessionRecord, ShardRecord};
pub use self::redb::RedbStore;
pub(crate) use self::thread::MetaThread;

/// Other members for a shard; see [`MetaStore::update_shard`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardUpdate {
    /// Of which session.
    pub session: u64,
    /// Which shard of it.
    pub shard: usize,
    /// The epoch that is to be replaced.
    pub expected: u64,
    /// Of the new members.
    pub epoch: u64,
    /// All of them.
    pub members: Vec<Holder>,
}

/// How long the name of a session that was closed is remembered, unless another one gets it.
pub const REMEMBER_CLOSED: Duration = Duration::from_secs(600);

/// Why a transaction didn't happen; nothing of it has.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MetaError {
    /// Another session has this name.
    #[error("session {session} is named {name}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        session: u64,
    },
    /// Another session has this number, or none may have it yet.
    #[error("session number {session} isn't a reserved one")]
    Number {
        /// Which.
        session: u64,
    },
    /// There is no such session, or shard of it.
    #[error("session {session} has no shard {shard:?}, or isn't there")]
    Unknown {
        /// Which session.
        session: u64,
        /// Which shard of it; `None` for the session itself.
        shard: Option<usize>,
    },
    /// The shard has another epoch than the one that was to be replaced: somebody else did.
    #[error("shard {shard} of session {session} has epoch {found}, not {expected}")]
    Epoch {
        /// Which session.
        session: u64,
        /// Which shard.
        shard: usize,
        /// That was to be replaced.
        expected: u64,
        /// That it has.
        found: u64,
    },
    /// An epoch, of a shard or a writer, that isn't higher than the one before.
    #[error("epoch {new} does not follow {old}")]
    Backwards {
        /// That there is.
        old: u64,
        /// That was to come.
        new: u64,
    },
    /// Another process has the file open.
    #[error("{path}: another coordinator uses it; each needs a state directory of its own")]
    InUse {
        /// Which file.
        path: String,
    },
    /// The file isn't one of this program, or has been damaged.
    #[error("{path}: {what}; restore it from a copy, or move it away to begin without any session")]
    Corrupt {
        /// Which file.
        path: String,
        /// What was found.
        what: String,
    },
    /// The file is of a later program.
    #[error(
        "{path}: has records of version {found}, and this program knows up to {known}; use the program that wrote it"
    )]
    Version {
        /// Which file.
        path: String,
        /// Of the records.
        found: u64,
        /// The latest that is known.
        known: u64,
    },
    /// The system failed.
    #[error("{path}: {what}")]
    Io {
        /// Which file.
        path: String,
        /// What it said.
        what: String,
    },
    /// The thread that runs transactions is gone.
    #[error("the store of sessions is gone")]
    Gone,
}

/// A durable map of sessions. All functions block: the coordinator has a thread for them.
pub trait MetaStore: fmt::Debug + Send + Sync + 'static {
    /// The next term, higher than any before: for a coordinator that starts.
    ///
    /// # Errors
    /// If it can't be kept.
    fn bump_term(&self) -> Result<u64, MetaError>;

    /// A number that no session ever had, of this store or, but for one chance in 2^40 or so, of another one whose shards workers may
    /// still hold; nor will one have it unless [`MetaStore::create_as`] says so.
    ///
    /// # Errors
    /// If it can't be kept.
    fn reserve_number(&self) -> Result<u64, MetaError>;

    /// Adds a session under a new number, which it returns. Its name isn't closed any more.
    ///
    /// # Errors
    /// [`MetaError::NameTaken`], or if it can't be kept.
    fn create(&self, record: &SessionRecord) -> Result<u64, MetaError>;

    /// Adds a session under a number that was reserved.
    ///
    /// # Errors
    /// [`MetaError::NameTaken`], [`MetaError::Number`], or if it can't be kept.
    fn create_as(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError>;

    /// Gives a shard that has epoch `expected` other members and the epoch `epoch`, which is higher. If it has exactly these already,
    /// nothing is to be done.
    ///
    /// # Errors
    /// [`MetaError::Unknown`], [`MetaError::Epoch`], [`MetaError::Backwards`], or if it can't be kept.
    fn update_shard(
        &self,
        session: u64,
        shard: usize,
        expected: u64,
        epoch: u64,
        members: &[Holder],
    ) -> Result<(), MetaError>;

    /// The same for many shards, in one transaction. One that is refused changes nothing, and says nothing of the others.
    ///
    /// # Errors
    /// If they can't be kept; then none of them is.
    fn update_shards(&self, updates: &[ShardUpdate]) -> Result<Vec<Result<(), MetaError>>, MetaError> {
        let update = |update: &ShardUpdate| {
            let ShardUpdate { session, shard, expected, epoch, members } = update;
            self.update_shard(*session, *shard, *expected, *epoch, members)
        };
        Ok(updates.iter().map(update).collect())
    }

    /// Writes a session's record anew, under the same name: of one that was pending, as long as nobody has been told of it.
    ///
    /// # Errors
    /// [`MetaError::Unknown`] if there is no pending session of this number and name, or if it can't be kept.
    fn settle(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError>;

    /// Removes a session that never came about; false if there is none. Its name doesn't count as closed.
    ///
    /// # Errors
    /// If it can't be kept.
    fn forget(&self, session: u64) -> Result<bool, MetaError>;

    /// Raises the epoch of a session's writer.
    ///
    /// # Errors
    /// [`MetaError::Unknown`], [`MetaError::Backwards`], or if it can't be kept.
    fn set_writer_epoch(&self, session: u64, writer_epoch: u64) -> Result<(), MetaError>;

    /// Removes a session; false if there is none. Its name counts as closed from `now`, the time since 1970, and those that were
    /// [`REMEMBER_CLOSED`] ago are forgotten.
    ///
    /// # Errors
    /// If it can't be kept.
    fn remove(&self, session: u64, now: Duration) -> Result<bool, MetaError>;

    /// Whether a session of this name was closed not longer than [`REMEMBER_CLOSED`] before `now`, and no other one has it.
    ///
    /// # Errors
    /// If it can't be read.
    fn was_closed(&self, name: &str, now: Duration) -> Result<bool, MetaError>;

    /// The number of the session of this name.
    ///
    /// # Errors
    /// If it can't be read.
    fn number_of(&self, name: &str) -> Result<Option<u64>, MetaError>;

    /// All sessions by their numbers.
    ///
    /// # Errors
    /// If one can't be read.
    fn all(&self) -> Result<BTreeMap<u64, SessionRecord>, MetaError>;
}

/// What a new store counts session numbers from: there may be workers that hold sessions of another store.
fn first_number() -> u64 {
    rand::random_range(1..=1 << 62)
}

/// Whether a closing is still remembered. One that is in the future, because a clock was set back, is.
fn is_remembered(closed: u64, now: Duration) -> bool {
    now.as_secs().saturating_sub(closed) <= REMEMBER_CLOSED.as_secs()
}
