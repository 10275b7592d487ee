//! The values of the status call: the cluster as the coordinator sees it.

use std::time::Duration;

use attnd_plan::WorkerId;
use attnd_plan::topology::is_host_label;

use crate::convert::{count, quantity, small, text};
use crate::error::{Error, Reason};
use crate::proto;

/// The cluster now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterStatus {
    /// Its workers.
    pub workers: Vec<WorkerStatus>,
    /// Version of the coordinator.
    pub version: String,
    /// Time since the coordinator started.
    pub uptime: Duration,
    /// Calls that run.
    pub calls_in_flight: u64,
    /// Calls that ended well.
    pub calls_finished: u64,
    /// Calls that ended with an error.
    pub calls_failed: u64,
    /// Sessions that are open; none from an old coordinator.
    pub sessions: SessionCounts,
}

/// Sessions by their worst shard, see [`crate::session::ShardHealth`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionCounts {
    /// All is well.
    pub open: u64,
    /// Replicas are missing.
    pub repairing: u64,
    /// What replicas have is being found out.
    pub recovering: u64,
    /// Too few replicas are left for appends.
    pub degraded: u64,
    /// Tokens are on no worker any more.
    pub lost: u64,
    /// Requests for queries that a replica was late with, and that were sent to another one too, since the coordinator began.
    pub hedges_sent: u64,
    /// How many of them had the first answer.
    pub hedges_won: u64,
}

/// One worker now.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Its name.
    pub worker: WorkerId,
    /// Where its bulk service is.
    pub address: String,
    /// Alive, suspect, draining, ...
    pub state: String,
    /// Its instruction set.
    pub isa: String,
    /// Its order of arithmetic.
    pub kernel_id: String,
    /// Compute threads.
    pub threads: usize,
    /// Measured speed of all its threads.
    pub gflops: f64,
    /// Memory for keys, values and partials of calls.
    pub memory_budget_bytes: u64,
    /// Memory reserved by calls.
    pub memory_used_bytes: u64,
    /// Calls that it works on.
    pub calls_in_flight: u32,
    /// Share of compute threads that were busy over the last second, 0 to 1.
    pub load: f64,
    /// Time since it was last heard of.
    pub since_heartbeat: Duration,
    /// Its version.
    pub version: String,
    /// Version of the protocol between nodes that it speaks, see [`crate::join::WIRE_VERSIONS`]; 0 from an old coordinator.
    pub wire_version: u32,
    /// Its failure domain; empty from an old coordinator.
    pub host: String,
    /// Memory for keys and values of sessions.
    pub session_memory_bytes: u64,
    /// What sessions take of it.
    pub session_used_bytes: u64,
}

const INVALID: Reason = Reason::ReplyInvalid;

fn duration(field: &str, seconds: f64) -> Result<Duration, Error> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|error| Error::new(INVALID, format!("{field} {seconds}: {error}")))
}

/// A failure domain, or none.
fn host(label: String) -> Result<String, Error> {
    if label.is_empty() || is_host_label(&label) {
        return Ok(label);
    }
    Err(Error::new(INVALID, "host: 1..64 of [A-Za-z0-9._-]"))
}

impl TryFrom<proto::StatusReply> for ClusterStatus {
    type Error = Error;

    fn try_from(message: proto::StatusReply) -> Result<Self, Error> {
        count("workers", message.workers.len())?;
        Ok(Self {
            workers: message.workers.into_iter().map(TryInto::try_into).collect::<Result<_, Error>>()?,
            version: text(INVALID, "version", message.version)?,
            uptime: duration("uptime_seconds", message.uptime_seconds)?,
            calls_in_flight: message.calls_in_flight,
            calls_finished: message.calls_finished,
            calls_failed: message.calls_failed,
            sessions: message.sessions.map(SessionCounts::from).unwrap_or_default(),
        })
    }
}

impl From<ClusterStatus> for proto::StatusReply {
    fn from(status: ClusterStatus) -> Self {
        Self {
            workers: status.workers.into_iter().map(Into::into).collect(),
            version: status.version,
            uptime_seconds: status.uptime.as_secs_f64(),
            calls_in_flight: status.calls_in_flight,
            calls_finished: status.calls_finished,
            calls_failed: status.calls_failed,
            sessions: Some(status.sessions.into()),
        }
    }
}

impl From<proto::SessionCounts> for SessionCounts {
    fn from(message: proto::SessionCounts) -> Self {
        let proto::SessionCounts { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won } =
            message;
        Self { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won }
    }
}

impl From<SessionCounts> for proto::SessionCounts {
    fn from(counts: SessionCounts) -> Self {
        let SessionCounts { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won } = counts;
        Self { open, repairing, recovering, degraded, lost, hedges_sent, hedges_won }
    }
}

impl TryFrom<proto::WorkerStatus> for WorkerStatus {
    type Error = Error;

    fn try_from(message: proto::WorkerStatus) -> Result<Self, Error> {
        let worker =
            WorkerId::new(message.worker_id).map_err(|error| Error::new(INVALID, error.to_string()))?;
        Ok(Self {
            worker,
            address: text(INVALID, "address", message.address)?,
            state: text(INVALID, "state", message.state)?,
            isa: text(INVALID, "isa", message.isa)?,
            kernel_id: text(INVALID, "kernel_id", message.kernel_id)?,
            threads: crate::convert::size(message.threads),
            gflops: quantity(INVALID, "gflops", message.gflops)?,
            memory_budget_bytes: message.memory_budget_bytes,
            memory_used_bytes: message.memory_used_bytes,
            calls_in_flight: message.calls_in_flight,
            load: quantity(INVALID, "load", message.load)?,
            since_heartbeat: duration("seconds_since_heartbeat", message.seconds_since_heartbeat)?,
            version: text(INVALID, "version", message.version)?,
            wire_version: message.wire_version,
            host: host(message.host)?,
            session_memory_bytes: message.session_memory_bytes,
            session_used_bytes: message.session_used_bytes,
        })
    }
}

impl From<WorkerStatus> for proto::WorkerStatus {
    fn from(status: WorkerStatus) -> Self {
        Self {
            worker_id: status.worker.to_string(),
            address: status.address,
            state: status.state,
            isa: status.isa,
            kernel_id: status.kernel_id,
            threads: small(status.threads),
            gflops: status.gflops,
            memory_budget_bytes: status.memory_budget_bytes,
            memory_used_bytes: status.memory_used_bytes,
            calls_in_flight: status.calls_in_flight,
            load: status.load,
            seconds_since_heartbeat: status.since_heartbeat.as_secs_f64(),
            version: status.version,
            wire_version: status.wire_version,
            host: status.host,
            session_memory_bytes: status.session_memory_bytes,
            session_used_bytes: status.session_used_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn status() -> ClusterStatus {
        let worker = WorkerStatus {
            worker: WorkerId::new("w1").unwrap(),
            address: "http://127.0.0.1:7001".into(),
            state: "alive".into(),
            isa: "avx2".into(),
            kernel_id: "c1-f32".into(),
            threads: 2,
            gflops: 100.0,
            memory_budget_bytes: 10,
            memory_used_bytes: 3,
            calls_in_flight: 1,
            load: 0.25,
            since_heartbeat: Duration::from_millis(125),
            version: "0.1.0".into(),
            wire_version: 7,
            host: "rack-7".into(),
            session_memory_bytes: 20,
            session_used_bytes: 4,
        };
        ClusterStatus {
            workers: vec![worker],
            version: "0.1.0".into(),
            uptime: Duration::from_millis(1500),
            calls_in_flight: 1,
            calls_finished: 2,
            calls_failed: 3,
            sessions: SessionCounts {
                open: 4,
                repairing: 3,
                recovering: 2,
                degraded: 1,
                lost: 5,
                hedges_sent: 9,
                hedges_won: 8,
            },
        }
    }

    #[test]
    fn a_status_returns() {
        assert_eq!(ClusterStatus::try_from(proto::StatusReply::from(status())), Ok(status()));
        let old = proto::StatusReply { sessions: None, ..status().into() };
        assert_eq!(ClusterStatus::try_from(old).map(|status| status.sessions), Ok(SessionCounts::default()));
    }

    #[test]
    fn impossible_answers_are_named() {
        let refused = |change: fn(&mut proto::StatusReply)| {
            let mut message = proto::StatusReply::from(status());
            change(&mut message);
            ClusterStatus::try_from(message).unwrap_err().message()
        };
        assert!(refused(|m| m.uptime_seconds = f64::NAN).starts_with("REPLY_INVALID: uptime_seconds NaN: "));
        assert!(
            refused(|m| m.workers[0].seconds_since_heartbeat = -1.0)
                .starts_with("REPLY_INVALID: seconds_since")
        );
        assert_eq!(refused(|m| m.workers[0].load = f64::INFINITY), "REPLY_INVALID: load inf");
        assert_eq!(
            refused(|m| m.workers[0].state = "\u{7}".into()),
            "REPLY_INVALID: state has control characters: \\u{7}"
        );
        assert_eq!(
            refused(|m| m.workers[0].host = "a b".into()),
            "REPLY_INVALID: host: 1..64 of [A-Za-z0-9._-]"
        );
        assert_eq!(refused(|m| m.workers = vec![m.workers[0].clone(); 1025]), "COUNT: workers 1025 > 1024");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = proto::StatusReply::decode(&bytes[..]) {
                let _either = ClusterStatus::try_from(message);
            }
            if let Ok(message) = proto::WorkerStatus::decode(&bytes[..]) {
                let _either = WorkerStatus::try_from(message);
            }
        }
    }
}
