//! The cluster that bad input is thrown at, and what must hold after each piece of it.

use std::net::SocketAddr;
use std::time::Duration;

use attnd_kernel::AttnShape;
use attnd_wire::{Link, Status, limits};
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;

use super::call::{Answer, Draft, Frame, attend, dims};
use super::http2::RawRequest;
use crate::support::cluster::Cluster;
use crate::support::eventually;
use crate::support::process::Process;

/// Longer than any exchange here takes; one that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Time for memory to come back and for a heartbeat to say so.
const RETURN: Duration = Duration::from_secs(5);
/// How much more memory than after its first good call a process may have resident at any moment.
const GROWTH_BYTES: u64 = 64 << 20;
const WORKERS: usize = 2;

/// A coordinator with two workers, and a good call whose bits are known.
pub(crate) struct Scene {
    cluster: Cluster,
    channel: Channel,
    good: Draft,
    answer: Answer,
    /// Resident bytes of the coordinator and the workers after the first good calls.
    resident: Vec<u64>,
    /// What the coordinator said it had to give at the beginning.
    free_bytes: u64,
}

impl Scene {
    pub(crate) async fn open() -> Self {
        let cluster = Cluster::start(WORKERS).await;
        let channel = limits::endpoint(cluster.url(), Link::Client).unwrap().connect_lazy();
        let good = Draft::random(dims([4, 2, 5, 600, 16, 12]), 1).on_workers(WORKERS as u32);
        let placeholder = Answer { context: Vec::new(), lse: Vec::new(), empty_rows: 0 };
        let mut scene = Self { cluster, channel, good, answer: placeholder, resident: vec![], free_bytes: 0 };
        scene.answer = scene.answered("the first good call", &scene.good).await;
        scene.good.check(&scene.answer);
        scene.all_idle("the first good call", Instant::now()).await;
        scene.free_bytes = scene.free_bytes_now().await;
        scene.resident = scene.processes(|process| {
            forget_peak(process);
            process.peak_memory()
        });
        scene
    }

    /// Ends the scene: no worker holds memory, and what the coordinator can give is what it was. What leaks is still
    /// missing then, so one look finds what any row has leaked; a look after each row would wait for a heartbeat.
    pub(crate) async fn close(self) {
        self.all_idle("in the end", Instant::now()).await;
        assert_eq!(
            self.free_bytes_now().await,
            self.free_bytes,
            "bytes that the coordinator believes to be free"
        );
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The coordinator's own port.
    pub(crate) fn coordinator(&self) -> SocketAddr {
        address(self.cluster.url())
    }

    /// The first worker's own port.
    pub(crate) async fn worker(&self) -> SocketAddr {
        address(&self.cluster.status().await.workers[0].address)
    }

    /// Calls that ended, well and badly.
    pub(crate) async fn calls_ended(&self) -> (u64, u64) {
        let status = self.cluster.status().await;
        (status.calls_finished, status.calls_failed)
    }

    /// Waits until a call is in flight at the coordinator.
    pub(crate) async fn call_has_begun(&self) {
        eventually("a call begins", PATIENCE, async || {
            (self.cluster.status().await.calls_in_flight > 0).then_some(())
        })
        .await;
    }

    /// Waits until a worker says that a call is in flight.
    pub(crate) async fn worker_has_begun(&self) {
        eventually("a share begins", PATIENCE, async || {
            let status = self.cluster.status().await;
            status.workers.iter().any(|worker| worker.calls_in_flight > 0).then_some(())
        })
        .await;
    }

    /// Sends a call that must be answered.
    pub(crate) async fn answered(&self, row: &str, draft: &Draft) -> Answer {
        let frames = tokio_stream::iter(draft.frames());
        let outcome = within(row, attend(self.channel(), frames, Some(draft.shape()))).await;
        outcome.unwrap_or_else(|status| panic!("{row}: {status:?}"))
    }

    /// Sends a call that must be answered within the bound of the reference; then everything must be as before.
    pub(crate) async fn accepts(&mut self, row: &str, draft: &Draft) -> Answer {
        let answer = self.answered(row, draft).await;
        draft.check(&answer);
        self.recovers(row).await;
        answer
    }

    /// Sends frames and ends the stream; the call must be refused as told, and then everything must be as before.
    pub(crate) async fn refuses(&mut self, row: &str, frames: Vec<Frame>, refusal: &Refusal) {
        self.refuses_any(row, frames, std::slice::from_ref(refusal)).await;
    }

    /// The same where one of several refusals is right: two workers may find different faults first.
    pub(crate) async fn refuses_any(&mut self, row: &str, frames: Vec<Frame>, refusals: &[Refusal]) {
        let call = attend(self.channel(), tokio_stream::iter(frames), None::<AttnShape>);
        match within(row, call).await {
            Ok(_) => unreachable!("an answer without a shape panics"),
            Err(status) if refusals.len() == 1 => refusals[0].check(row, &status),
            Err(status) => {
                let refusal = refusals.iter().find(|refusal| refusal.text.fits(status.message()));
                refusal
                    .unwrap_or_else(|| panic!("{row}: {status:?}, not one of {refusals:?}"))
                    .check(row, &status);
            }
        }
        self.recovers(row).await;
    }

    /// Sends raw bytes to a port; they must be refused as told, and then everything must be as before.
    pub(crate) async fn refuses_raw(
        &mut self,
        row: &str,
        to: SocketAddr,
        request: RawRequest,
        refusal: &Refusal,
    ) {
        let status = within(row, request.status(to)).await;
        refusal.check(row, &status);
        self.recovers(row).await;
    }

    /// A good call gives the right bits, no process has grown on the way, and no call is left.
    pub(crate) async fn recovers(&mut self, row: &str) {
        let answer = self.answered(row, &self.good).await;
        assert!(answer == self.answer, "{row}: the next good call has other bits");
        let peaks = self.processes(|process| {
            let peak = process.peak_memory();
            forget_peak(process);
            peak
        });
        for (place, (peak, resident)) in peaks.iter().zip(&self.resident).enumerate() {
            let growth = peak.saturating_sub(*resident);
            assert!(
                growth < GROWTH_BYTES,
                "{row}: process {place} grew by {growth} bytes (0 is the coordinator)"
            );
        }
        self.no_call_is_left(row).await;
    }

    /// Waits until the coordinator has no call in flight.
    pub(crate) async fn no_call_is_left(&self, row: &str) {
        eventually(&format!("{row}: no call is left"), RETURN, async || {
            (self.cluster.status().await.calls_in_flight == 0).then_some(())
        })
        .await;
    }

    /// [`Self::recovers`], and every worker has its memory back already.
    pub(crate) async fn recovers_wholly(&mut self, row: &str) {
        self.recovers(row).await;
        self.all_idle(row, Instant::now()).await;
    }

    /// Waits for word from every worker, given after `since`, that no call and no memory is left.
    async fn all_idle(&self, row: &str, since: Instant) {
        eventually(&format!("{row}: every worker says that it is idle"), RETURN, async || {
            let status = self.cluster.status().await;
            let idle = status.workers.iter().filter(|worker| {
                worker.since_heartbeat < since.elapsed()
                    && worker.memory_used_bytes == 0
                    && worker.calls_in_flight == 0
            });
            (status.calls_in_flight == 0 && idle.count() == WORKERS).then_some(())
        })
        .await;
    }

    /// What the coordinator has to give, as it says when it refuses a call over 4 TiB.
    async fn free_bytes_now(&self) -> u64 {
        let status = self.too_large().await;
        let (_, free) = status.message().rsplit_once("free ").unwrap_or_else(|| panic!("{status:?}"));
        free.parse().unwrap_or_else(|_| panic!("{status:?}"))
    }

    /// The refusal of the largest shape there is.
    pub(crate) async fn too_large(&self) -> Status {
        let vast = self.good.with_shape(|shape| *shape = dims([1024, 1024, 65_536, 1 << 20, 512, 512]));
        let vast = vast.with(|begin| (begin.max_workers, begin.force_workers) = (0, false));
        let call =
            attend(self.channel(), tokio_stream::iter(vec![super::call::begin(vast.begin.clone())]), None);
        within("a call of 4 TiB", call).await.unwrap_err()
    }

    fn processes<T>(&mut self, look: impl Fn(&Process) -> T) -> Vec<T> {
        let mut seen = vec![look(self.cluster.coordinator())];
        seen.extend((0..WORKERS).map(|worker| look(self.cluster.worker(worker))));
        seen
    }
}

/// Starts a process's peak of resident memory anew, so that a passing peak is seen at the row that makes it.
fn forget_peak(process: &Process) {
    let path = format!("/proc/{}/clear_refs", process.id());
    std::fs::write(&path, "5").unwrap_or_else(|error| panic!("{path}: {error}"));
}

fn address(url: &str) -> SocketAddr {
    url.strip_prefix("http://").unwrap().parse().unwrap()
}

/// Panics where an exchange hangs.
pub(crate) async fn within<T>(row: &str, exchange: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, exchange)
        .await
        .unwrap_or_else(|_| panic!("{row}: no answer in {PATIENCE:?}"))
}

// === what a refusal must say ===

/// A code, a text `REASON: detail`, and the metadata that go with it.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    code: Code,
    text: Text,
}

#[derive(Clone, Debug)]
enum Text {
    Exactly(String),
    /// The words of a library: they begin like this and this is somewhere in them.
    With(String, String),
}

impl Text {
    fn fits(&self, text: &str) -> bool {
        match self {
            Self::Exactly(wanted) => text == wanted,
            Self::With(start, part) => text.starts_with(start) && text.contains(part),
        }
    }

    fn reason(&self) -> &str {
        let (Self::Exactly(text) | Self::With(text, _)) = self;
        text.split_once(':').map_or(text, |(reason, _)| reason)
    }
}

impl Refusal {
    /// This code and exactly this text.
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: Text::Exactly(text.into()) }
    }

    /// This code and a text that begins with `start` and has `part` in it.
    pub(crate) fn with(code: Code, start: &str, part: &str) -> Self {
        Self { code, text: Text::With(start.into(), part.into()) }
    }

    /// [`Self::new`] with the most frequent code.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, text)
    }

    /// Panics unless `status` says this, and that nothing was executed.
    pub(crate) fn check(&self, row: &str, status: &Status) {
        let text = status.message();
        assert_eq!(status.code(), self.code, "{row}: {status:?}");
        assert!(self.text.fits(text), "{row}: {text:?} instead of {:?}", self.text);
        assert!(text.len() <= 256 && !text.contains(char::is_control), "{row}: {text:?}");
        assert!(!text.contains("127.0.0.1"), "{row}: {text:?} gives an address away");
        let metadata = |key: &str| status.metadata().get(key).and_then(|value| value.to_str().ok());
        assert_eq!(metadata("attnd-reason"), Some(self.text.reason()), "{row}: {status:?}");
        assert_eq!(metadata("attnd-outcome"), Some("not_executed"), "{row}: {status:?}");
    }
}
