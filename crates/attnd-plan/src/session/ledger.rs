//! The coordinator's side of one session: which op is next, which replicas have it, and what becomes of it when some are lost.
//!
//! ```text
//! shard   OPEN(e) --member lost, or one to be added--> RECOVERING(e+1) --saved--> OPEN(e+1) | DEGRADED(e+1): fewer than A
//!            |                                              |
//!            +--nobody left who has what was acknowledged---+--> LOST, with its session
//! ```
//!
//! One op is in flight at a time. Its bytes are the caller's: it sends the op to everyone in [`Ledger::missing`], and again where an
//! action says so, until there is an [`LedgerAction::Answer`]. The op has happened once A members of *every* shard have it.
//!
//! A *round* of a shard gives it another set of members: everyone who shall be one is fenced, so that what it has can't change any
//! more; who lacks acknowledged ops gets them by a copy; and the set is saved before it counts. While there are A members, rounds wait
//! until the op in flight has its end. Reads go on all the time: what they look at never changes.
//!
//! What the caller promises: requests about one shard reach a worker in the order of the actions, or after the answer to what came
//! before; each request is answered at most once; a worker whose stream breaks is reported lost, and only then another one begins.

use std::time::Duration;

pub use self::error::{LedgerError, Outcome};
use super::op::{Answer, Holder, Op, Record};
use super::replica::ReplicaState;
use super::spec::SessionSpec;
use super::window::Window;

mod error;

/// What a writer wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// Rows of one layer.
    Append {
        /// Which layer.
        layer: usize,
        /// Tokens that it must have before; `None`: as many as it has.
        base_len: Option<usize>,
        /// Tokens to come.
        tokens: usize,
    },
    /// See [`Change::Truncate`](super::Change::Truncate).
    Truncate {
        /// Tokens that stay.
        len: usize,
    },
    /// See [`Change::Fork`](super::Change::Fork).
    Fork {
        /// The number of the child, which is not 0. Where the request comes again, the number that it was given first.
        child: u64,
    },
    /// See [`Change::Seal`](super::Change::Seal).
    Seal,
}

/// A request to change the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// Of whoever asks.
    pub writer_epoch: u64,
    /// The number of the op, by its count.
    pub seq: u64,
    /// See [`Ask::digest`].
    pub digest: u32,
    /// What it wants.
    pub ask: Ask,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// It is an op now, and in flight: send it to all of [`Ledger::missing`].
    Started(Op),
    /// It was in flight already: as for [`Begun::Started`]. The answer is for whoever asked last.
    Resumed(Op),
    /// It was applied before: this is what was said of it.
    Replayed(Answer),
}

/// A request to look at the tokens of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadRequest {
    /// Which layer.
    pub layer: usize,
    /// How many of its tokens; `None`: all.
    pub at_len: Option<usize>,
    /// Of the session; `None`: whichever it has.
    pub generation: Option<u64>,
    /// Tokens that the reader knows of.
    pub min_len: usize,
    /// The append of the same step, which is in flight: its tokens are looked at too. Whoever computes reads behind it.
    pub after: Option<Op>,
}

/// What is looked at: a name that means the same tokens for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Of the session.
    pub generation: u64,
    /// The first so many tokens.
    pub at_len: usize,
}

/// How a shard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Ops are taken.
    Open,
    /// Its replicas are being found out, or saved.
    Recovering,
    /// Fewer replicas than have to acknowledge: it can be read.
    Degraded,
    /// No replica has all that was acknowledged.
    Lost,
}

/// What happens to a session. Whatever is about a holder that isn't one of the shard's, or about another epoch, changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LedgerEvent<E = String> {
    /// A replica has an op, now or since before.
    Applied {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Which op.
        seq: u64,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A replica doesn't take an op, or doesn't take it back.
    Refused {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the request that is refused.
        epoch: u64,
        /// Which op.
        seq: u64,
        /// The op can't be had by anybody then: its rows aren't finite, or there is no memory for them. Otherwise the replica is out of
        /// step with the others, and dropped.
        is_final: bool,
        /// Its words.
        why: E,
    },
    /// A replica has taken an op back, or never had it.
    Undone {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Which op.
        seq: u64,
        /// What the replica has.
        state: ReplicaState,
    },
    /// The bytes of the append in flight can't be had any more: take it back.
    Abandoned {
        /// Which op.
        seq: u64,
        /// Why.
        why: E,
    },
    /// A worker is dead, or its stream broke: what it holds doesn't count any more.
    Lost(Holder),
    /// A replica is of the shard's epoch now.
    Fenced {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A replica is of a higher epoch than it shall be fenced to.
    FenceRefused {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the replica.
        epoch: u64,
    },
    /// A replica has what the one that it was copied from had.
    Copied {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// What the replica has.
        state: ReplicaState,
    },
    /// A copy can't be made, or not there.
    CopyFailed {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
    },
    /// A worker is there, or there again, that says it has a replica of the shard.
    Joined {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// A worker has been chosen to get a replica: the answer to [`LedgerAction::NeedReplica`].
    Replacement {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// A worker wants to leave: its replicas are needed until there are others.
    Draining(Holder),
    /// The set of a shard's members is in the durable store.
    Saved {
        /// Of which shard.
        shard: usize,
        /// Its epoch.
        epoch: u64,
    },
    /// The last ops, as a replica remembers them, oldest first.
    Records(Vec<Record>),
}

/// What the caller does next, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LedgerAction<E = String> {
    /// Send the op in flight to this replica, where it may have been before.
    Send {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
        /// Of the session, before the op.
        generation: u64,
        /// The op.
        op: Op,
    },
    /// Have this op taken back, behind all requests to apply it.
    Undo {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
        /// Which op.
        seq: u64,
        /// Its digest.
        digest: u32,
    },
    /// Tell this replica that the shard is of this epoch.
    Fence {
        /// Of which shard.
        shard: usize,
        /// Where to.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
    },
    /// Give `to` what `from` has and it hasn't, whatever it has; its replica is of this epoch then, if it wasn't of a higher one.
    Copy {
        /// Of which shard.
        shard: usize,
        /// Who has it.
        from: Holder,
        /// Who gets it.
        to: Holder,
        /// Of the shard.
        epoch: u64,
    },
    /// Write to the durable store which members a shard has; then [`LedgerEvent::Saved`].
    SaveMembers {
        /// Of which shard.
        shard: usize,
        /// Of the shard.
        epoch: u64,
        /// All of them.
        members: Vec<Holder>,
    },
    /// The end of an op. Nobody may be waiting for it any more.
    Answer {
        /// Which op.
        seq: u64,
        /// What to say of it.
        result: Result<Answer, LedgerError<E>>,
    },
    /// A shard has fewer replicas than it should: choose workers of other failure domains than its holders', then
    /// [`LedgerEvent::Replacement`]. Comes again when the number changes.
    NeedReplica {
        /// Which shard.
        shard: usize,
        /// How many.
        missing: usize,
    },
    /// This replica isn't needed any more: give its memory back.
    Release {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
    },
    /// Ask this replica for its last ops; then [`LedgerEvent::Records`].
    AskRecords {
        /// Of which shard.
        shard: usize,
        /// Where.
        holder: Holder,
        /// Of the shard.
        epoch: u64,
    },
}

/// What the durable store has of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SavedShard {
    /// Its epoch.
    pub epoch: u64,
    /// Its members.
    pub members: Vec<Holder>,
}

/// One session, as its coordinator knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ledger<E = String> {
    spec: SessionSpec,
    writer_epoch: u64,
    generation: u64,
    tokens: Vec<usize>,
    sealed: bool,
    window: Window,
    used: Duration,
    actions: Vec<LedgerAction<E>>,
}

impl<E: Clone> Ledger<E> {
    /// A session that was just opened, at `now`: of each shard the holders, where there is an empty replica of epoch 1, which are saved.
    pub fn new(spec: SessionSpec, shards: Vec<Vec<Holder>>, now: Duration) -> Self;
    /// The child of this session, when the fork has been answered: its shards have the same holders, and epoch 1. The caller saves
    /// it before it tells anybody, or better, before it begins the fork.
    pub fn fork(&self, now: Duration) -> Self;
    /// A session of a coordinator that has just started, with what is in the durable store. It answers `RECOVERING` until all
    /// holders have been fenced, or reported lost.
    pub fn recover(spec: SessionSpec, writer_epoch: u64, shards: Vec<SavedShard>, now: Duration) -> (Self, Vec<LedgerAction<E>>);
    /// Looks at a request without its digest, which is known once all of its bytes are here.
    ///
    /// # Errors
    /// Those of [`Ledger::begin`] that don't depend on it.
    pub fn check(&self, writer_epoch: u64, seq: u64, ask: &Ask) -> Result<(), LedgerError<E>>;
    /// Takes a request. The next one waits until this one is answered.
    ///
    /// # Errors
    /// If it isn't the next op, nor one of the last 1,024, or can't be applied, or not now.
    pub fn begin(&mut self, request: &Request) -> Result<Begun, LedgerError<E>>;
    /// Where the op in flight has to be sent: to every member of every shard that isn't known to have it, with the shard's epoch.
    pub fn missing(&self) -> impl Iterator<Item = (usize, &Holder, u64)> + '_;
    /// Looks at a request to read.
    ///
    /// # Errors
    /// If there are no such tokens, or nobody to read them from now.
    pub fn check_read(&self, request: &ReadRequest) -> Result<Read, LedgerError<E>>;
    /// Makes whoever asks the writer, and fences the one before. The number has to be saved before it is told.
    pub fn take_writer(&mut self) -> (u64, Vec<LedgerAction<E>>);
    /// Takes one event and says what to do about it.
    pub fn handle(&mut self, event: LedgerEvent<E>) -> Vec<LedgerAction<E>>;
    /// Who computes queries over a shard, first choice first: members that have all that was acknowledged.
    pub fn computing(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_;
    /// Who gets ops.
    pub fn members(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_;
    /// Who has something of a shard, or is getting it: where to release when the session is closed.
    pub fn holders(&self, shard: usize) -> impl Iterator<Item = &Holder> + '_;
    /// Of a shard, for every request about it.
    pub fn epoch(&self, shard: usize) -> u64;
    /// How a shard is.
    pub fn phase(&self, shard: usize) -> Phase;
    /// How many shards there are.
    pub fn shards(&self) -> usize;
    /// What can't change.
    pub fn spec(&self) -> &SessionSpec;
    /// Cuts so far.
    pub fn generation(&self) -> u64;
    /// Tokens of each layer that were acknowledged.
    pub fn tokens(&self) -> &[usize];
    /// Nothing can be appended or cut any more.
    pub fn is_sealed(&self) -> bool;
    /// Of whoever writes.
    pub fn writer_epoch(&self) -> u64;
    /// The number of the next op.
    pub fn next_seq(&self) -> u64;
    /// The op in flight.
    pub fn in_flight(&self) -> Option<&Op>;
    /// Takes note that somebody asked for the session.
    pub fn touch(&mut self, now: Duration);
    /// When somebody last asked for it.
    pub fn idle_since(&self) -> Duration;
    /// Whether nobody has asked for it for its whole time.
    pub fn is_expired(&self, now: Duration) -> bool;
}
