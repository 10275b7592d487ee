//! The values of the control channel: a worker introduces itself, then beats.

use std::ops::RangeInclusive;
use std::time::Duration;

use attnd_plan::WorkerId;
use attnd_plan::topology::is_host_label;

use crate::convert::{quantity, small, text};
use crate::error::{Error, Reason};
use crate::limits::{self, Link};
use crate::{proto, refusal};

/// Versions of the protocol between nodes that this binary speaks. A worker of version 1 computes a scale and a causal
/// rule, one of version 2 what the plain path computes, one of version 3 caps, dense masks and biases; these refuse calls with
/// more than that, but the third would leave outputs out. One of version 4 gives these, and has no score functions; one of version 5 has
/// these, and would wait for keys and values that a worker of version 6 makes itself; one of version 6 holds no shards of sessions.
pub const WIRE_VERSIONS: RangeInclusive<u32> = 1..=SESSIONS;
/// The first version with operators: masks of intervals, sinks, empty rows.
pub const OPERATORS: u32 = 2;
/// The first version with what touches single scores: caps, biases, other normalisers.
pub const GENERAL_PATH: u32 = 3;
/// The first version with a second pass.
pub const OUTPUTS: u32 = 4;
/// The first version with score functions, tables of biases, masks of blocks, and documents whose keys are scattered.
pub const SCORES: u32 = 5;
/// The first version that makes keys and values of rows.
pub const PROJECTIONS: u32 = 6;
/// The first version that holds shards of sessions, and says on which host it is.
pub const SESSIONS: u32 = 7;
/// Longest time between two beats.
pub const MAX_HEARTBEAT: Duration = Duration::from_secs(60);

/// One frame from a worker.
#[derive(Clone, Debug, PartialEq)]
pub enum JoinRequest {
    /// The first one.
    Hello(Hello),
    /// All others.
    Heartbeat(Heartbeat),
}

/// Who joins, and what it can do. Decoded only from a worker that speaks one of [`WIRE_VERSIONS`]; whether its order
/// of arithmetic is the cluster's is for the membership to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Its name.
    pub worker: WorkerId,
    /// One life of its process.
    pub incarnation: u64,
    /// Where its bulk service is, as a URL that [`limits::endpoint`] takes.
    pub address: String,
    /// Version of the protocol between nodes that it speaks.
    pub wire_version: u32,
    /// Its order of arithmetic.
    pub kernel_id: String,
    /// Its instruction set, for people.
    pub isa: String,
    /// Compute threads, at least 1.
    pub threads: usize,
    /// Measured speed of all its threads, positive.
    pub gflops: f64,
    /// Memory for keys, values and partials of calls.
    pub memory_budget_bytes: u64,
    /// Its version, for people.
    pub version: String,
    /// Its failure domain, see [`is_host_label`]. A worker of a version below [`SESSIONS`] says none, and has its name here: it holds
    /// no shards, of which replicas would have to be apart.
    pub host: String,
    /// Memory for keys and values of sessions; 0 below [`SESSIONS`].
    pub session_memory_bytes: u64,
}

/// How a worker is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Heartbeat {
    /// Memory reserved by calls.
    pub memory_used_bytes: u64,
    /// Calls that it works on.
    pub calls_in_flight: u32,
    /// Share of compute threads that were busy over the last second, 0 to 1.
    pub load: f64,
    /// It is shutting down: give it nothing new.
    pub draining: bool,
    /// Memory that sessions take.
    pub session_used_bytes: u64,
}

/// One frame to a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinReply {
    /// The first one.
    Welcome(Welcome),
}

/// The worker is a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Time between two beats, 1 ms to [`MAX_HEARTBEAT`].
    pub heartbeat: Duration,
}

impl TryFrom<proto::JoinRequest> for JoinRequest {
    type Error = Error;

    fn try_from(message: proto::JoinRequest) -> Result<Self, Error> {
        use proto::join_request::Part;
        match message.part {
            Some(Part::Hello(hello)) => hello.try_into().map(Self::Hello),
            Some(Part::Heartbeat(heartbeat)) => heartbeat.try_into().map(Self::Heartbeat),
            None => Err(refusal::empty_frame()),
        }
    }
}

impl From<JoinRequest> for proto::JoinRequest {
    fn from(request: JoinRequest) -> Self {
        use proto::join_request::Part;
        let part = match request {
            JoinRequest::Hello(hello) => Part::Hello(hello.into()),
            JoinRequest::Heartbeat(heartbeat) => Part::Heartbeat(heartbeat.into()),
        };
        Self { part: Some(part) }
    }
}

impl TryFrom<proto::Hello> for Hello {
    type Error = Error;

    fn try_from(message: proto::Hello) -> Result<Self, Error> {
        // First what explains everything else that may be strange about it.
        if !WIRE_VERSIONS.contains(&message.wire_version) {
            return Err(refusal::wire(message.wire_version));
        }
        let invalid = |what: &str| Error::new(Reason::Hello, what);
        let worker = WorkerId::new(message.worker_id)
            .map_err(|_one_text_for_all| invalid("worker_id: 1..64 of [A-Za-z0-9._-]"))?;
        let address = text(Reason::Hello, "address", message.address)?;
        if limits::endpoint(&address, Link::Cluster).is_err() {
            return Err(invalid("address: must look like http://host:port"));
        }
        let host = if message.host.is_empty() && message.wire_version < SESSIONS {
            worker.to_string()
        } else if is_host_label(&message.host) {
            message.host
        } else {
            return Err(invalid("host: 1..64 of [A-Za-z0-9._-]"));
        };
        let threads = usize::try_from(message.threads).unwrap_or(0);
        if threads == 0 {
            return Err(invalid("threads 0"));
        }
        let gflops = quantity(Reason::Hello, "gflops", message.gflops)?;
        if gflops == 0.0 {
            return Err(invalid("gflops 0"));
        }
        Ok(Self {
            worker,
            incarnation: message.incarnation,
            address,
            wire_version: message.wire_version,
            kernel_id: text(Reason::Hello, "kernel_id", message.kernel_id)?,
            isa: text(Reason::Hello, "isa", message.isa)?,
            threads,
            gflops,
            memory_budget_bytes: message.memory_budget_bytes,
            version: text(Reason::Hello, "version", message.version)?,
            host,
            session_memory_bytes: message.session_memory_bytes,
        })
    }
}

impl From<Hello> for proto::Hello {
    fn from(hello: Hello) -> Self {
        Self {
            worker_id: hello.worker.to_string(),
            incarnation: hello.incarnation,
            address: hello.address,
            wire_version: hello.wire_version,
            kernel_id: hello.kernel_id,
            isa: hello.isa,
            threads: small(hello.threads),
            gflops: hello.gflops,
            memory_budget_bytes: hello.memory_budget_bytes,
            version: hello.version,
            host: hello.host,
            session_memory_bytes: hello.session_memory_bytes,
        }
    }
}

impl TryFrom<proto::Heartbeat> for Heartbeat {
    type Error = Error;

    fn try_from(message: proto::Heartbeat) -> Result<Self, Error> {
        let proto::Heartbeat { memory_used_bytes, calls_in_flight, load, draining, session_used_bytes } =
            message;
        if !(0.0..=1.0).contains(&load) {
            return Err(Error::new(Reason::Heartbeat, format!("load {load} not in 0..1")));
        }
        Ok(Self { memory_used_bytes, calls_in_flight, load, draining, session_used_bytes })
    }
}

impl From<Heartbeat> for proto::Heartbeat {
    fn from(heartbeat: Heartbeat) -> Self {
        let Heartbeat { memory_used_bytes, calls_in_flight, load, draining, session_used_bytes } = heartbeat;
        Self { memory_used_bytes, calls_in_flight, load, draining, session_used_bytes }
    }
}

impl TryFrom<proto::JoinReply> for JoinReply {
    type Error = Error;

    fn try_from(message: proto::JoinReply) -> Result<Self, Error> {
        use proto::join_reply::Part;
        match message.part {
            Some(Part::Welcome(welcome)) => welcome.try_into().map(Self::Welcome),
            None => Err(Error::new(Reason::ReplyInvalid, "empty frame")),
        }
    }
}

impl From<JoinReply> for proto::JoinReply {
    fn from(reply: JoinReply) -> Self {
        let JoinReply::Welcome(welcome) = reply;
        Self { part: Some(proto::join_reply::Part::Welcome(welcome.into())) }
    }
}

impl TryFrom<proto::Welcome> for Welcome {
    type Error = Error;

    fn try_from(message: proto::Welcome) -> Result<Self, Error> {
        let heartbeat = Duration::from_millis(message.heartbeat_ms.into());
        if heartbeat.is_zero() || heartbeat > MAX_HEARTBEAT {
            return Err(Error::new(Reason::ReplyInvalid, format!("heartbeat_ms {}", message.heartbeat_ms)));
        }
        Ok(Self { heartbeat })
    }
}

impl From<Welcome> for proto::Welcome {
    fn from(welcome: Welcome) -> Self {
        let millis = welcome.heartbeat.min(MAX_HEARTBEAT).as_millis().max(1);
        Self { heartbeat_ms: u32::try_from(millis).unwrap_or(u32::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn hello() -> Hello {
        Hello {
            worker: WorkerId::new("w1").unwrap(),
            incarnation: u64::MAX,
            address: "http://127.0.0.1:7001".into(),
            wire_version: SESSIONS,
            kernel_id: "c1-f32".into(),
            isa: "avx512".into(),
            threads: 8,
            gflops: 230.5,
            memory_budget_bytes: 1 << 40,
            version: "0.1.0".into(),
            host: "rack-7.example".into(),
            session_memory_bytes: 1 << 39,
        }
    }

    fn refused(change: impl FnOnce(&mut proto::Hello)) -> String {
        let mut message = proto::Hello::from(hello());
        change(&mut message);
        Hello::try_from(message).unwrap_err().message()
    }

    #[test]
    fn frames_return() {
        let heartbeat = Heartbeat {
            memory_used_bytes: 5,
            calls_in_flight: 2,
            load: 0.5,
            draining: true,
            session_used_bytes: 7,
        };
        for request in [JoinRequest::Hello(hello()), JoinRequest::Heartbeat(heartbeat)] {
            assert_eq!(JoinRequest::try_from(proto::JoinRequest::from(request.clone())), Ok(request));
        }
        let welcome = JoinReply::Welcome(Welcome { heartbeat: Duration::from_millis(200) });
        assert_eq!(JoinReply::try_from(proto::JoinReply::from(welcome)), Ok(welcome));
    }

    #[test]
    fn each_field_of_a_hello_is_checked() {
        assert_eq!(refused(|h| h.wire_version = 8), "WIRE: 8 not in 1..7");
        for id in ["", "a\u{1b}", &"x".repeat(65)] {
            assert_eq!(refused(|h| h.worker_id = id.into()), "HELLO: worker_id: 1..64 of [A-Za-z0-9._-]");
        }
        assert_eq!(
            refused(|h| h.address = "10.0.0.1:1".into()),
            "HELLO: address: must look like http://host:port"
        );
        assert_eq!(refused(|h| h.threads = 0), "HELLO: threads 0");
        assert_eq!(refused(|h| h.gflops = 0.0), "HELLO: gflops 0");
        assert_eq!(refused(|h| h.gflops = f64::NAN), "HELLO: gflops NaN");
        assert_eq!(refused(|h| h.isa = "a\n".into()), "HELLO: isa has control characters: a\\n");
        assert_eq!(refused(|h| h.version = "v".repeat(300)), "HELLO: version has 300 bytes, at most 256");
    }

    #[test]
    fn only_workers_without_sessions_may_leave_their_host_out() {
        let mut old = proto::Hello { host: String::new(), session_memory_bytes: 0, ..hello().into() };
        old.wire_version = PROJECTIONS;
        assert_eq!(Hello::try_from(old).unwrap().host, "w1");
        for host in ["", "a b", "a/b", "ä", "a\u{1b}", &"x".repeat(65)] {
            assert_eq!(refused(|h| h.host = host.into()), "HELLO: host: 1..64 of [A-Za-z0-9._-]", "{host:?}");
        }
    }

    #[test]
    fn loads_lie_between_0_and_1() {
        for (load, text) in [(f64::NAN, "NaN"), (-0.1, "-0.1"), (1.5, "1.5"), (f64::INFINITY, "inf")] {
            let error = Heartbeat::try_from(proto::Heartbeat { load, ..Default::default() }).unwrap_err();
            assert_eq!(error.message(), format!("HEARTBEAT: load {text} not in 0..1"));
        }
    }

    #[test]
    fn heartbeats_are_neither_instant_nor_rare() {
        for heartbeat_ms in [0, 60_001, u32::MAX] {
            let error = Welcome::try_from(proto::Welcome { heartbeat_ms }).unwrap_err();
            assert_eq!(error.message(), format!("REPLY_INVALID: heartbeat_ms {heartbeat_ms}"));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = proto::JoinRequest::decode(&bytes[..]) {
                let _either = JoinRequest::try_from(message);
            }
            if let Ok(message) = proto::Hello::decode(&bytes[..]) {
                let _either = Hello::try_from(message);
            }
            if let Ok(message) = proto::JoinReply::decode(&bytes[..]) {
                let _either = JoinReply::try_from(message);
            }
        }

        #[test]
        fn no_hello_panics(
            worker_id in ".{0,70}", address in ".{0,40}", gflops in any::<f64>(), threads in any::<u32>(), host in ".{0,70}",
        ) {
            let message = proto::Hello { worker_id, address, gflops, threads, host, ..hello().into() };
            let _either = Hello::try_from(message);
        }
    }
}
