//! The client: a coordinator's address and the calls it takes.

use std::sync::OnceLock;
use std::time::Duration;

use attnd_wire::deadline::MAX_TIMEOUT;
use attnd_wire::{
    ClusterStatus, Deadline, Error, Link, PlanSummary, Reason, Surroundings, Timings, limits, proto,
};
use tokio::time::Instant;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::attempt::{Assembly, attempt};
use crate::error::ClientError;
use crate::inspected::Inspected;
use crate::operands::{AttendOptions, Operands};
use crate::retry::pause_before_next;
use crate::side;

/// Time for an answer to [`Client::status`].
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of one coordinator. It connects with the first call and again whenever the connection was lost; one client
/// serves any number of calls at a time.
#[derive(Debug)]
pub struct Client {
    endpoint: Endpoint,
    surroundings: Surroundings,
    channel: OnceLock<Channel>,
}

/// How far a call has come.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// The coordinator has decided who computes what. Comes again when the call is sent again.
    Planned(PlanSummary),
    /// Tensor bytes handed to the connection.
    Sent {
        /// So far.
        bytes: u64,
        /// Of the call.
        total: u64,
    },
    /// Rows of the answer that are here.
    Received {
        /// So far.
        rows: u64,
        /// Of the call.
        total: u64,
    },
}

/// The answer to a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Attended {
    /// `[batch, heads, queries, value_dim]`; 0, or what was asked for, where a row sees neither a key nor
    /// a sink.
    pub context: Vec<f32>,
    /// `[batch, heads, queries]`, natural logarithm of the sum of exponentials; -inf where a row
    /// sees neither a key nor a sink.
    pub lse: Vec<f32>,
    /// What was asked for beside the context.
    pub inspected: Inspected,
    /// Who computed what.
    pub plan: PlanSummary,
    /// Rows that see no key.
    pub empty_rows: u64,
    /// Where the time went, of the attempt that succeeded.
    pub timings: Timings,
    /// Names the order of arithmetic: equal inputs and equal ids mean equal bits.
    pub kernel_id: String,
    /// How often the call was sent.
    pub attempts: u32,
    /// Why it was sent again: how each attempt but the last ended.
    pub retried_after: Vec<Reason>,
}

impl Client {
    /// A client of the coordinator at `endpoint`, such as `http://127.0.0.1:7400`. Nothing is sent yet.
    ///
    /// # Errors
    /// If `endpoint` is no such URL.
    pub fn connect(endpoint: &str) -> Result<Self, ClientError> {
        Self::connect_in(Surroundings::default(), endpoint)
    }

    /// The same in other surroundings than this machine's.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_in(surroundings: Surroundings, endpoint: &str) -> Result<Self, ClientError> {
        let endpoint = limits::endpoint(endpoint, Link::Client)?;
        Ok(Self { endpoint, surroundings, channel: OnceLock::new() })
    }

    pub(crate) fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.get_or_init(|| self.surroundings.channel(&self.endpoint)).clone()
    }

    /// Computes attention over `operands` on the cluster. `progress` is called from this future, often, and must be
    /// quick.
    ///
    /// # Errors
    /// By their reason: what is wrong with the operands, what the cluster refused, or what got lost. Dropping the
    /// future cancels the call.
    pub async fn attend(
        &self,
        operands: &Operands,
        options: &AttendOptions,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Attended, ClientError> {
        let begin = operands.begin(options)?;
        let (_, beside) = side::beside(options, &begin.shape)?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout.min(MAX_TIMEOUT));
        let mut attempts = 0;
        let mut retried_after = Vec::new();
        loop {
            let assembly = Assembly::new(&begin).map_err(|error| ClientError::after(attempts, &error))?;
            attempts += 1;
            let stub = limits::attention_client(self.channel());
            let error =
                match attempt(stub, operands, &beside, begin.clone(), assembly, deadline, progress).await {
                    Ok(answer) => {
                        return Ok(Attended {
                            context: answer.context,
                            lse: answer.lse,
                            inspected: answer.inspected,
                            plan: answer.plan,
                            empty_rows: answer.done.empty_rows,
                            timings: answer.done.timings,
                            kernel_id: answer.done.kernel_id,
                            attempts,
                            retried_after,
                        });
                    }
                    Err(error) => error,
                };
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let Some(pause) = pause_before_next(attempts, &error, left, self.surroundings.fraction()) else {
                return Err(ClientError::after(attempts, &error));
            };
            tracing::info!(%error, attempts, pause_ms = pause.as_millis() as u64, "the call is sent again");
            retried_after.push(error.reason);
            tokio::time::sleep(pause).await;
        }
    }

    /// The cluster as its coordinator sees it now.
    ///
    /// # Errors
    /// If the coordinator can't be reached or doesn't answer within five seconds.
    pub async fn status(&self) -> Result<ClusterStatus, ClientError> {
        let mut stub = limits::attention_client(self.channel());
        let mut request = Request::new(proto::StatusRequest {});
        request.set_timeout(STATUS_TIMEOUT);
        let answer = tokio::time::timeout(STATUS_TIMEOUT, stub.status(request)).await;
        let status = match answer {
            Ok(Ok(reply)) => ClusterStatus::try_from(reply.into_inner()),
            Ok(Err(status)) => Err(Error::from(status)),
            Err(_elapsed) => Err(Deadline::expired()),
        };
        status.map_err(|error| ClientError::after(1, &error))
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Dims, Dtype};

    use super::*;
    use crate::operands::tests::operands;

    fn small() -> Operands {
        operands(
            Dims { batch: 1, heads: 1, kv_heads: 1, queries: 1, keys: 1, head_dim: 1, value_dim: 1 },
            Dtype::F32,
        )
    }

    #[test]
    fn a_client_needs_a_url_and_no_runtime() {
        assert!(Client::connect("127.0.0.1:7400").is_err());
        assert!(Client::connect("http://127.0.0.1:7400").is_ok());
    }

    #[tokio::test]
    async fn a_coordinator_that_is_not_there_is_an_error_of_the_transport() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let client = Client::connect(&format!("http://{address}")).unwrap();
        let error = client.attend(&small(), &AttendOptions::default(), &mut |_| {}).await.unwrap_err();
        assert_eq!(error.reason, attnd_wire::Reason::Transport, "{error}");
        assert_eq!(client.status().await.unwrap_err().reason, attnd_wire::Reason::Transport);
    }

    #[tokio::test]
    async fn a_timeout_longer_than_the_cap_is_the_cap() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        for timeout in [Duration::from_secs(1_000_000_000_000), Duration::MAX] {
            let options = AttendOptions { timeout: Some(timeout), ..Default::default() };
            let client = Client::connect(&url).unwrap();
            let error = client.attend(&small(), &options, &mut |_| {}).await.unwrap_err();
            assert_eq!(error.reason, attnd_wire::Reason::Transport, "{error}");
        }
    }

    #[tokio::test]
    async fn a_coordinator_that_says_nothing_costs_the_timeout_and_no_more() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client::connect(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let timeout = Duration::from_millis(200);
        let options = AttendOptions { timeout: Some(timeout), ..Default::default() };
        let begun = Instant::now();
        let error = client.attend(&small(), &options, &mut |_| {}).await.unwrap_err();
        assert_eq!(error.reason, attnd_wire::Reason::Deadline, "{error}");
        assert!(begun.elapsed() >= timeout && begun.elapsed() < timeout + Duration::from_secs(2));
    }
}
