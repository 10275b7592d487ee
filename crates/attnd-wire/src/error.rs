//! What went wrong, under a stable name, and its journey as a gRPC status.
//!
//! On the wire an error is a status whose text is `REASON: detail`, with the metadata `attnd-reason`,
//! `attnd-outcome` and, where waiting helps, `grpc-retry-pushback-ms`. [`Error::from_status`] reads it back without
//! loss. The reason alone decides the gRPC code, see [`Reason::code`].

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use crate::normalise;

/// Metadata key of [`Reason`].
pub const REASON_KEY: &str = "attnd-reason";
/// Metadata key of [`Outcome`].
pub const OUTCOME_KEY: &str = "attnd-outcome";
/// Metadata key of [`Error::pushback`], in milliseconds.
pub const PUSHBACK_KEY: &str = "grpc-retry-pushback-ms";
/// Longest text of an error, in bytes.
pub const MAX_MESSAGE: usize = 256;

/// Why a call was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The stable name.
    pub reason: Reason,
    /// What became of the call.
    pub outcome: Outcome,
    /// Numbers and names for a person; may be empty. [`Error::new`] escapes and shortens it.
    pub detail: String,
    /// Whether waiting may help, which the reason alone can't say of a call larger than all memory there is.
    may_pass: bool,
}

/// What is known about the effect of a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It had none and never will: sending it again is safe.
    NotExecuted,
    /// It took effect although the answer is an error.
    Applied,
    /// It may or may not have taken effect.
    Unknown,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::NotExecuted, Self::Applied, Self::Unknown];

    /// The stable name, as on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotExecuted => "not_executed",
            Self::Applied => "applied",
            Self::Unknown => "unknown",
        }
    }

    /// The outcome of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == name)
    }
}

/// Declares the reasons once: name on the wire, gRPC code and meaning side by side.
macro_rules! reasons {
    ($($variant:ident $name:literal $code:ident $doc:literal;)*) => {
        /// The stable name of an error. A closed set: an unknown name of a newer peer becomes [`Reason::Foreign`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $(#[doc = $doc] $variant,)*
        }

        impl Reason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name on the wire.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The gRPC code it travels with.
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }
        }
    };
}

reasons! {
    // Streams and messages.
    Method "METHOD" Unimplemented "No such service or method.";
    Encoding "ENCODING" Unimplemented "A message compression that isn't accepted.";
    MessageTooLarge "MESSAGE_TOO_LARGE" ResourceExhausted "A message over the limit.";
    MetadataTooLarge "METADATA_TOO_LARGE" ResourceExhausted "Request headers over the limit.";
    Protocol "PROTOCOL" Internal "Bytes that are no gRPC message.";
    Decode "DECODE" Internal "A message that is no valid protobuf.";
    Count "COUNT" InvalidArgument "A repeated field with too many entries.";
    DeadlineFormat "DEADLINE_FORMAT" InvalidArgument "A timeout that can't be read, or is too long.";
    Deadline "DEADLINE" DeadlineExceeded "The caller's time is over.";
    StreamOrder "STREAM_ORDER" InvalidArgument "A frame where another one belongs.";
    StreamTruncated "STREAM_TRUNCATED" Aborted "The stream ended before Commit.";
    StreamIdle "STREAM_IDLE" DeadlineExceeded "The peer sent nothing, or took nothing, for too long.";
    ChunkOrder "CHUNK_ORDER" InvalidArgument "A chunk is missing, repeated or out of place.";
    PayloadLength "PAYLOAD_LENGTH" InvalidArgument "The bytes don't fit the declared shape.";
    Checksum "CHECKSUM" Aborted "The bytes don't have the declared checksum.";
    // What one call says.
    ShapeZero "SHAPE_ZERO" InvalidArgument "A dimension is zero.";
    ShapeLimit "SHAPE_LIMIT" InvalidArgument "A dimension is over its limit.";
    ShapeOverflow "SHAPE_OVERFLOW" InvalidArgument "A tensor of more than 2^64 bytes.";
    ShapeMismatch "SHAPE_MISMATCH" InvalidArgument "Two tensors disagree about a dimension.";
    GqaRatio "GQA_RATIO" InvalidArgument "Query heads are no multiple of kv heads.";
    Dtype "DTYPE" InvalidArgument "An unknown element type, or a byte that is no element of it.";
    Tensor "TENSOR" InvalidArgument "An unknown tensor.";
    Causal "CAUSAL" InvalidArgument "An unknown causal rule.";
    Scale "SCALE" InvalidArgument "A scale that isn't finite.";
    Operator "OPERATOR" InvalidArgument "A part of the operator that makes no sense, or none for the shape.";
    Outputs "OUTPUTS" InvalidArgument "An output that makes no sense, or none for the shape, or is too large.";
    Combination "COMBINATION" InvalidArgument "Two options that contradict each other, or one that needs another.";
    Workers "WORKERS" InvalidArgument "A number of workers that can't be had.";
    NonFinite "NON_FINITE" InvalidArgument "NaN or an infinity in Q, K or V, NaN or +inf in a bias.";
    ScoreOverflow "SCORE_OVERFLOW" InvalidArgument "A score of finite operands overflows f32.";
    OutputOverflow "OUTPUT_OVERFLOW" InvalidArgument "A context element overflows f32, be it only before its division by the sum of weights.";
    EmptyRow "EMPTY_ROW" InvalidArgument "A row sees no key, and the caller forbade that.";
    // Sessions.
    SessionId "SESSION_ID" InvalidArgument "A text that is no name of a session.";
    Session "SESSION" NotFound "There is no such session.";
    SessionExists "SESSION_EXISTS" AlreadyExists "Another session has this name.";
    SessionExpired "SESSION_EXPIRED" NotFound "The session was closed because nobody asked for it.";
    SessionEmpty "SESSION_EMPTY" FailedPrecondition "The layer has no tokens to attend over.";
    SessionFull "SESSION_FULL" ResourceExhausted "More tokens than a layer of the session may have.";
    SessionLost "SESSION_LOST" DataLoss "Tokens that were acknowledged are on no worker any more.";
    Sealed "SEALED" FailedPrecondition "The session takes no more appends and cuts.";
    Replication "REPLICATION" InvalidArgument "Numbers of replicas and acknowledgements that contradict each other.";
    Placement "PLACEMENT" FailedPrecondition "The workers there are can't hold a session as it was asked for.";
    DtypeMismatch "DTYPE_MISMATCH" FailedPrecondition "Rows of another element type than the session has.";
    Seq "SEQ" InvalidArgument "A number that no mutation has.";
    SeqGap "SEQ_GAP" FailedPrecondition "Mutations before this one are missing.";
    SeqReused "SEQ_REUSED" AlreadyExists "Another mutation has this number.";
    SeqOld "SEQ_OLD" AlreadyExists "A mutation so long ago that nothing is known of it any more.";
    Length "LENGTH" FailedPrecondition "The layer has another number of tokens than the append begins behind.";
    WriterFenced "WRITER_FENCED" FailedPrecondition "Somebody else has become the writer of the session.";
    AtLen "AT_LEN" OutOfRange "More tokens than there are.";
    Generation "GENERATION" FailedPrecondition "The session was cut since.";
    Fork "FORK" InvalidArgument "A child that can't be one.";
    ForkLimit "FORK_LIMIT" ResourceExhausted "Too many forks, or forks of forks.";
    Recovering "RECOVERING" Unavailable "A shard of the session finds out what its replicas have.";
    UnderReplicated "UNDER_REPLICATED" Unavailable "Fewer replicas are there than shall acknowledge.";
    StateStore "STATE_STORE" Unavailable "What a coordinator must know after a restart can't be written.";
    Shard "SHARD" NotFound "This worker holds no such shard.";
    Undo "UNDO" FailedPrecondition "An op that can't be taken back: not the last one, or no append.";
    Snapshot "SNAPSHOT" FailedPrecondition "A history of ops that isn't whole.";
    Fenced "FENCED" FailedPrecondition "Another coordinator has taken over.";
    Epoch "EPOCH" Aborted "The shard has another epoch.";
    // The cluster.
    KvBudget "KV_BUDGET" ResourceExhausted "Keys and values don't fit into the free memory.";
    Overloaded "OVERLOADED" ResourceExhausted "Too many calls run, or their memory is not free yet.";
    NoWorkers "NO_WORKERS" Unavailable "No worker can take the call.";
    WorkerLost "WORKER_LOST" Unavailable "A worker was lost in the middle of the call.";
    Draining "DRAINING" Unavailable "The node is shutting down.";
    Transport "TRANSPORT" Unavailable "The connection failed.";
    Cancelled "CANCELLED" Cancelled "The peer gave up.";
    WorkerId "WORKER_ID" AlreadyExists "A live worker has this id.";
    Unreachable "UNREACHABLE" Unavailable "The coordinator can't connect to the address that a worker gave.";
    Wire "WIRE" FailedPrecondition "A version of the protocol that isn't spoken here.";
    KernelMix "KERNEL_MIX" FailedPrecondition "Another order of arithmetic: results would not have equal bits.";
    IncarnationDead "INCARNATION_DEAD" FailedPrecondition "This life of the worker was declared dead.";
    Hello "HELLO" InvalidArgument "A Hello that makes no sense.";
    Heartbeat "HEARTBEAT" InvalidArgument "A Heartbeat that makes no sense.";
    Pieces "PIECES" InvalidArgument "A share of work that makes no sense.";
    Coverage "COVERAGE" Internal "A partial nobody asked for, or the second of its kind.";
    PartialInvalid "PARTIAL_INVALID" Internal "A partial with impossible contents.";
    ReplyInvalid "REPLY_INVALID" Internal "An answer with impossible contents.";
    Internal "INTERNAL" Internal "A broken promise inside this node.";
    Foreign "FOREIGN" Unknown "A status that attnd didn't make, or a newer one did; the detail holds its code and text.";
}

impl Reason {
    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// What became of a call that ends for this reason, unless whoever makes the error knows better.
    ///
    /// A node answers its own refusals before anything is kept, so they are [`Outcome::NotExecuted`]; where the
    /// answer is missing or not attnd's, nobody knows.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Transport | Self::Cancelled | Self::Internal | Self::Foreign | Self::ReplyInvalid => {
                Outcome::Unknown
            }
            _refused => Outcome::NotExecuted,
        }
    }

    /// How long a caller does well to wait before it tries again, unless the error itself says that it needn't.
    pub fn pushback(self) -> Option<Duration> {
        const PUSHBACK: Duration = Duration::from_millis(200);
        let passes = matches!(
            self,
            Self::Overloaded
                | Self::KvBudget
                | Self::Draining
                | Self::NoWorkers
                | Self::Recovering
                | Self::UnderReplicated
        );
        passes.then_some(PUSHBACK)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Error {
    /// An error with the outcome that [`Reason::outcome`] gives. Control characters of `detail` are escaped, and it
    /// is cut where the text would be longer than [`MAX_MESSAGE`].
    pub fn new(reason: Reason, detail: impl AsRef<str>) -> Self {
        let detail = printable(detail.as_ref(), detail_room(reason)).into_owned();
        Self { reason, outcome: reason.outcome(), detail, may_pass: reason.pushback().is_some() }
    }

    /// The same error with another outcome.
    #[must_use]
    pub fn with_outcome(self, outcome: Outcome) -> Self {
        Self { outcome, ..self }
    }

    /// The same error of a call for which waiting is in vain.
    #[must_use]
    pub fn without_pushback(self) -> Self {
        Self { may_pass: false, ..self }
    }

    /// How long a caller does well to wait before it tries again; `None` where waiting doesn't help.
    pub fn pushback(&self) -> Option<Duration> {
        self.reason.pushback().filter(|_| self.may_pass)
    }

    /// `REASON: detail`, or `REASON` alone: at most [`MAX_MESSAGE`] bytes without control characters.
    pub fn message(&self) -> String {
        let detail = printable(&self.detail, detail_room(self.reason));
        if detail.is_empty() { self.reason.name().into() } else { format!("{}: {detail}", self.reason) }
    }

    /// Whether the same call may be sent again and may then succeed. Everything that retries asks this.
    pub fn is_retryable(&self) -> bool {
        let may_pass = self.reason.code() == Code::Unavailable || self.reason == Reason::Overloaded;
        may_pass && self.outcome == Outcome::NotExecuted
    }

    /// Reads an error back from any status: attnd's own without loss, those of the gRPC library by
    /// [`normalise::classify`].
    pub fn from_status(status: &Status) -> Self {
        let Some(name) = text_of(status.metadata(), REASON_KEY) else {
            return normalise::classify(status);
        };
        let outcome = text_of(status.metadata(), OUTCOME_KEY).and_then(Outcome::from_name);
        let error = match Reason::from_name(name) {
            Some(reason) => {
                let text = status.message();
                let detail =
                    text.strip_prefix(reason.name()).map(|rest| rest.strip_prefix(": ").unwrap_or(rest));
                Self::new(reason, detail.unwrap_or(text))
            }
            None => normalise::foreign(status),
        };
        let may_pass = error.may_pass && status.metadata().get(PUSHBACK_KEY).is_some();
        Self { outcome: outcome.unwrap_or(Outcome::Unknown), may_pass, ..error }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}

impl std::error::Error for Error {}

impl From<&Error> for Status {
    fn from(error: &Error) -> Self {
        let mut metadata = MetadataMap::new();
        metadata.insert(REASON_KEY, MetadataValue::from_static(error.reason.name()));
        metadata.insert(OUTCOME_KEY, MetadataValue::from_static(error.outcome.name()));
        if let Some(pushback) = error.pushback() {
            metadata.insert(PUSHBACK_KEY, MetadataValue::from(pushback.as_millis() as u64));
        }
        Self::with_metadata(error.reason.code(), error.message(), metadata)
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl From<&Status> for Error {
    fn from(status: &Status) -> Self {
        Self::from_status(status)
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        Self::from_status(&status)
    }
}

/// Bytes that the detail of an error may have.
fn detail_room(reason: Reason) -> usize {
    MAX_MESSAGE - reason.name().len() - ": ".len()
}

/// `text` with control characters escaped, cut to at most `room` bytes. Applied twice it changes nothing more.
pub(crate) fn printable(text: &str, room: usize) -> Cow<'_, str> {
    const CUT: &str = "...";
    if text.len() <= room && !text.chars().any(char::is_control) {
        return Cow::Borrowed(text);
    }
    let mut out = String::new();
    // The end of the longest prefix that leaves room for the mark of a cut.
    let mut fits = 0;
    for c in text.chars() {
        if c.is_control() {
            // Writing to a String can't fail.
            let _infallible = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() + CUT.len() <= room {
            fits = out.len();
        }
        if out.len() > room {
            out.truncate(fits);
            out.push_str(CUT);
            break;
        }
    }
    Cow::Owned(out)
}

fn text_of<'a>(metadata: &'a MetadataMap, key: &str) -> Option<&'a str> {
    metadata.get(key)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_unique_and_stable_in_form() {
        let names: BTreeSet<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for reason in Reason::ALL {
            assert!(reason.name().bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{reason}");
            assert_eq!(Reason::from_name(reason.name()), Some(*reason));
            assert_ne!(reason.code(), Code::Ok);
        }
        assert_eq!(Reason::from_name("NO_SUCH"), None);
        for outcome in Outcome::ALL {
            assert_eq!(Outcome::from_name(outcome.name()), Some(outcome));
        }
    }

    #[test]
    fn the_text_is_the_reason_alone_where_there_is_no_detail() {
        assert_eq!(Error::new(Reason::ShapeOverflow, "").to_string(), "SHAPE_OVERFLOW");
        let status = Status::from(Error::new(Reason::EmptyRow, ""));
        assert_eq!(status.message(), "EMPTY_ROW");
        assert_eq!(Error::from_status(&status), Error::new(Reason::EmptyRow, ""));
    }

    #[test]
    fn control_characters_are_escaped_and_long_texts_cut() {
        let error = Error::new(Reason::Dtype, "a\u{1b}[31m\nb\u{7f}");
        assert_eq!(error.message(), "DTYPE: a\\u{1b}[31m\\nb\\u{7f}");
        let long = Error::new(Reason::Dtype, "\u{0}".repeat(300)).message();
        assert!(long.len() <= MAX_MESSAGE && long.ends_with("..."), "{long}");
        let exact = "x".repeat(MAX_MESSAGE - "DTYPE: ".len());
        assert_eq!(Error::new(Reason::Dtype, &exact).detail, exact);
        assert!(Error::new(Reason::Dtype, exact + "x").message().ends_with("x..."));
    }

    #[test]
    fn overload_asks_for_patience() {
        let status = Status::from(Error::new(Reason::Overloaded, "256 running"));
        assert_eq!(status.metadata().get(PUSHBACK_KEY).unwrap().to_str().unwrap(), "200");
        for in_vain in [Error::new(Reason::Scale, ""), Error::new(Reason::KvBudget, "").without_pushback()] {
            assert!(Status::from(in_vain).metadata().get(PUSHBACK_KEY).is_none());
        }
    }

    #[test]
    fn only_what_passes_and_was_not_executed_is_retried() {
        assert!(Error::new(Reason::WorkerLost, "w1").is_retryable());
        assert!(Error::new(Reason::Overloaded, "64 running").is_retryable());
        assert!(!Error::new(Reason::Overloaded, "").with_outcome(Outcome::Unknown).is_retryable());
        assert!(Error::new(Reason::NoWorkers, "").is_retryable());
        assert!(!Error::new(Reason::Transport, "connection lost").is_retryable());
        assert!(!Error::new(Reason::KvBudget, "").is_retryable());
    }

    #[test]
    fn reasons_of_newer_peers_keep_their_text_and_outcome() {
        let mut status = Status::invalid_argument("SHINY: 3");
        status.metadata_mut().insert(REASON_KEY, "SHINY".parse().unwrap());
        status.metadata_mut().insert(OUTCOME_KEY, "not_executed".parse().unwrap());
        let error = Error::from_status(&status);
        assert_eq!((error.reason, error.outcome), (Reason::Foreign, Outcome::NotExecuted));
        assert_eq!(error.detail, "InvalidArgument, SHINY: 3");
    }

    proptest! {
        #[test]
        fn errors_survive_the_wire(
            reason in proptest::sample::select(Reason::ALL),
            outcome in proptest::sample::select(&Outcome::ALL[..]),
            detail in "(?s).{0,300}",
            in_vain: bool,
        ) {
            let error = Error::new(reason, detail).with_outcome(outcome);
            let error = if in_vain { error.without_pushback() } else { error };
            let status = Status::from(&error);
            prop_assert!(status.message().len() <= MAX_MESSAGE);
            prop_assert!(!status.message().chars().any(char::is_control));
            prop_assert_eq!(status.code(), reason.code());
            // Through headers and back, as a peer sees it.
            let mut headers = http::HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let received = Status::from_header_map(&headers).unwrap();
            prop_assert_eq!(Error::from_status(&received), error);
        }

        #[test]
        fn any_status_becomes_a_bounded_error(
            code in 0..20i32,
            text in "(?s).{0,300}",
            reason in proptest::option::of("[ -~]{0,20}"),
        ) {
            let mut status = Status::new(Code::from_i32(code), text);
            if let Some(reason) = reason {
                status.metadata_mut().insert(REASON_KEY, reason.parse().unwrap());
            }
            let once = normalise::normalise(status);
            prop_assert!(once.message().len() <= MAX_MESSAGE);
            prop_assert!(once.metadata().get(REASON_KEY).is_some());
            let twice = normalise::normalise(once.clone());
            prop_assert_eq!(Error::from_status(&once), Error::from_status(&twice));
        }
    }
}
