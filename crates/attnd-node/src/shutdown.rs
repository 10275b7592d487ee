//! How a node ends: it stops taking calls, finishes those in flight under a deadline, and says which of the two
//! happened. Calls that the deadline cuts are told, so that they are sent again elsewhere.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::NodeError;

/// How long calls in flight may go on after the request to stop.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long connections may take to flush their last answers after the last call has ended.
const FLUSH: Duration = Duration::from_millis(500);

/// Counts the calls in flight and knows whether new ones are welcome. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Calls {
    state: Arc<watch::Sender<State>>,
    cut: CancellationToken,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    in_flight: usize,
    draining: bool,
}

/// One call in flight, for as long as it lives.
#[derive(Debug)]
pub struct InFlight {
    state: Arc<watch::Sender<State>>,
}

impl Calls {
    /// No calls yet, and open for them.
    pub fn new() -> Self {
        Self { state: Arc::new(watch::Sender::new(State::default())), cut: CancellationToken::new() }
    }

    /// Enters a call; `None` once the node is draining.
    pub fn enter(&self) -> Option<InFlight> {
        let entered = self.state.send_if_modified(|state| {
            state.in_flight += usize::from(!state.draining);
            !state.draining
        });
        entered.then(|| InFlight { state: Arc::clone(&self.state) })
    }

    /// The same for what has to go on while the node drains, because it is about what only this node has; `None` once calls are cut.
    pub fn enter_until_cut(&self) -> Option<InFlight> {
        if self.cut.is_cancelled() {
            return None;
        }
        self.state.send_modify(|state| state.in_flight += 1);
        Some(InFlight { state: Arc::clone(&self.state) })
    }

    /// Calls in flight now.
    pub fn in_flight(&self) -> usize {
        self.state.borrow().in_flight
    }

    /// Whether new calls are refused.
    pub fn is_draining(&self) -> bool {
        self.state.borrow().draining
    }

    /// Refuses new calls from now on.
    pub fn drain(&self) {
        self.state.send_modify(|state| state.draining = true);
    }

    /// Ends those in flight: [`Self::is_cut`] completes.
    fn cut(&self) {
        self.cut.cancel();
    }

    /// Completes when calls in flight must end at once.
    pub async fn is_cut(&self) {
        self.cut.cancelled().await;
    }

    /// Completes when the node drains and no call is in flight: then none will be.
    pub async fn drained(&self) {
        let is_drained = |state: &State| state.draining && state.in_flight == 0;
        let _closed = self.state.subscribe().wait_for(is_drained).await.is_err();
    }

    /// Completes when no call is in flight.
    pub async fn idle(&self) {
        // The sender lives in self, so waiting can't fail.
        let _closed = self.state.subscribe().wait_for(|state| state.in_flight == 0).await.is_err();
    }
}

impl Default for Calls {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.send_modify(|state| state.in_flight = state.in_flight.saturating_sub(1));
    }
}

/// Serves until `shutdown`, then drains: `on_drain` runs (readiness off, peers told), new calls are refused, those in
/// flight get `deadline` and are then cut. `serve` makes the server future from the signal that stops it gracefully.
///
/// # Errors
/// The server's own failure, or [`NodeError::DrainDeadline`] where calls had to be cut.
pub async fn serve_until<S>(
    shutdown: impl Future<Output = ()>,
    calls: &Calls,
    deadline: Duration,
    serve: impl FnOnce(WaitForCancellationFutureOwned) -> S,
    on_drain: impl Future<Output = ()>,
) -> Result<(), NodeError>
where
    S: Future<Output = Result<(), tonic::transport::Error>>,
{
    let stop = CancellationToken::new();
    let mut server = std::pin::pin!(serve(stop.clone().cancelled_owned()));
    tokio::select! {
        biased;
        ended = &mut server => return ended.map_err(NodeError::from),
        () = shutdown => {}
    }
    tracing::info!(in_flight = calls.in_flight(), "draining");
    calls.drain();
    // Connections must be served while peers are told and calls end; a server alone can't end while a peer keeps an
    // idle connection, so the last flush is bounded too.
    let drained = async {
        let drained = tokio::time::timeout(deadline, async {
            on_drain.await;
            stop.cancel();
            calls.idle().await;
        });
        let drained = drained.await.is_ok();
        stop.cancel();
        drained
    };
    let drained = tokio::select! {
        biased;
        ended = &mut server => {
            ended?;
            tracing::info!("drained");
            return Ok(());
        }
        drained = drained => drained,
    };
    let left = calls.in_flight();
    if !drained {
        calls.cut();
    }
    if tokio::time::timeout(FLUSH, server).await.is_err() {
        tracing::debug!("connections were still open after the last call and are closed");
    }
    if !drained {
        return Err(NodeError::DrainDeadline { calls: left, deadline });
    }
    tracing::info!("drained");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_refuses_new_calls_and_waits_for_old_ones() {
        let calls = Calls::new();
        let call = calls.enter().unwrap();
        let mut idle = std::pin::pin!(calls.idle());
        assert!(futures::poll!(&mut idle).is_pending());
        calls.drain();
        assert!(calls.enter().is_none());
        assert_eq!(calls.in_flight(), 1);
        // What only this node can do goes on.
        let needed = calls.enter_until_cut();
        drop(call);
        assert!(futures::poll!(&mut idle).is_pending());
        drop(needed);
        tokio::time::timeout(Duration::from_secs(5), idle).await.unwrap();
        assert_eq!(calls.in_flight(), 0);
        calls.cut();
        assert!(calls.enter_until_cut().is_none());
    }

    async fn never_ending_server(
        stop: WaitForCancellationFutureOwned,
    ) -> Result<(), tonic::transport::Error> {
        stop.await;
        std::future::pending().await
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_with_an_idle_connection_ends_soon_after_the_last_call() {
        let calls = Calls::new();
        let call = calls.enter().unwrap();
        let leave = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(call);
        };
        let begun = tokio::time::Instant::now();
        let served = serve_until(async {}, &calls, DRAIN_DEADLINE, never_ending_server, async {});
        let (ended, ()) = tokio::join!(served, leave);
        assert!(ended.is_ok());
        assert!(begun.elapsed() < Duration::from_secs(4));
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_is_drained_once_it_takes_nothing_and_has_nothing() {
        let calls = Calls::new();
        let is_drained = async || tokio::time::timeout(Duration::from_secs(1), calls.drained()).await.is_ok();
        assert!(!is_drained().await, "more may come");
        let call = calls.enter().unwrap();
        calls.drain();
        assert!(!is_drained().await, "one is there");
        drop(call);
        assert!(is_drained().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_never_ends_is_cut_at_the_deadline_and_may_say_so() {
        let calls = Calls::new();
        let _call = calls.enter().unwrap();
        let begun = tokio::time::Instant::now();
        let cut = async {
            calls.is_cut().await;
            begun.elapsed()
        };
        let served = serve_until(async {}, &calls, DRAIN_DEADLINE, never_ending_server, async {});
        let (ended, cut_after) = tokio::join!(served, cut);
        assert!(matches!(ended, Err(NodeError::DrainDeadline { calls: 1, .. })));
        assert!(cut_after >= DRAIN_DEADLINE && begun.elapsed() >= cut_after + FLUSH, "{cut_after:?}");
    }
}
