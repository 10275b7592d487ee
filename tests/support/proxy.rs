//! A proxy between a coordinator and a worker, which resets connections and swallows what goes over them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// It ends, with all its connections, with this value.
pub(crate) struct Proxy {
    url: String,
    state: Arc<State>,
    _accepts: JoinSet<()>,
}

/// Which way bytes don't get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swallows {
    /// To what is behind the proxy.
    pub(crate) there: bool,
    /// From there.
    pub(crate) back: bool,
}

struct State {
    swallows: watch::Sender<Swallows>,
    target: watch::Sender<Option<SocketAddr>>,
    /// Counts resets, of everything or, where it says so, of one connection.
    resets: watch::Sender<(u64, Option<usize>)>,
    refuses: AtomicBool,
    accepted: AtomicUsize,
}

impl Proxy {
    /// Listens; connections wait until there is a [target](Self::set_target).
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("a bound socket has an address"));
        let state = Arc::new(State {
            swallows: watch::Sender::default(),
            target: watch::Sender::new(None),
            resets: watch::Sender::new((0, None)),
            refuses: AtomicBool::new(false),
            accepted: AtomicUsize::new(0),
        });
        let mut accepts = JoinSet::new();
        accepts.spawn(accept(listener, Arc::clone(&state)));
        Self { url, state, _accepts: accepts }
    }

    /// Under which what is behind it is reached.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// What is behind it: `http://127.0.0.1:PORT`.
    pub(crate) fn set_target(&self, url: &str) {
        let address = url.trim_start_matches("http://").parse().expect("a URL with an address");
        self.state.target.send_replace(Some(address));
    }

    /// Resets all connections, both ends of each.
    pub(crate) fn reset(&self) {
        self.state.resets.send_modify(|(resets, which)| (*resets, *which) = (*resets + 1, None));
    }

    /// Resets the latest connection but `n`.
    pub(crate) fn reset_one(&self, n: usize) {
        let which = self.accepted().checked_sub(n + 1);
        self.state
            .resets
            .send_modify(|(resets, of)| (*resets, *of) = (*resets + 1, which.or(Some(usize::MAX))));
    }

    /// From now on bytes are lost on these ways, ends of connections too, and all stay open. One that has lost something is reset when its way
    /// is open again.
    pub(crate) fn swallow(&self, swallows: Swallows) {
        self.state.swallows.send_replace(swallows);
    }

    /// Whether new connections are reset at once.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.state.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Connections so far.
    pub(crate) fn accepted(&self) -> usize {
        self.state.accepted.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let number = state.accepted.fetch_add(1, Ordering::SeqCst);
        connections.spawn(forward(stream, number, Arc::clone(&state)));
        while connections.try_join_next().is_some() {}
    }
}

async fn forward(mut near: TcpStream, number: usize, state: Arc<State>) {
    let mut resets = state.resets.subscribe();
    if state.refuses.load(Ordering::SeqCst) {
        near.set_zero_linger().expect("a socket");
        return;
    }
    let mut targets = state.target.subscribe();
    let Ok(target) = targets.wait_for(Option::is_some).await.map(|target| *target) else { return };
    let Some(target) = target else { return };
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    near.set_nodelay(true).expect("a socket");
    far.set_nodelay(true).expect("a socket");
    let is_meant = |(_, which): &(u64, Option<usize>)| which.is_none_or(|which| which == number);
    let reset = async { while resets.changed().await.is_ok() && !is_meant(&resets.borrow_and_update()) {} };
    let is_whole = {
        let ((from_near, to_near), (from_far, to_far)) = (near.split(), far.split());
        let swallows = || state.swallows.subscribe();
        let both = async {
            tokio::try_join!(
                carry(from_near, to_far, swallows(), |swallows| swallows.there),
                carry(from_far, to_near, swallows(), |swallows| swallows.back),
            )
        };
        tokio::select! {
            ended = both => ended.is_ok(),
            () = reset => false,
        }
    };
    if !is_whole {
        // What is under way is lost with it.
        near.set_zero_linger().expect("a socket");
        far.set_zero_linger().expect("a socket");
    }
}

/// A connection broke, or has a hole.
struct Broken;

/// Carries what goes one way until it ends.
async fn carry(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut swallows: watch::Receiver<Swallows>,
    is_swallowed: impl Fn(&Swallows) -> bool,
) -> Result<(), Broken> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let n = from.read(&mut bytes).await.map_err(|_broken| Broken)?;
        if is_swallowed(&swallows.borrow_and_update()) {
            let rest = async { while from.read(&mut bytes).await.is_ok_and(|n| n > 0) {} };
            let is_open = async { swallows.wait_for(|swallows| !is_swallowed(swallows)).await.is_ok() };
            tokio::pin!(is_open);
            tokio::select! {
                _opened = &mut is_open => {}
                () = rest => {
                    is_open.await;
                }
            }
            return Err(Broken);
        }
        if n == 0 {
            return to.shutdown().await.map_err(|_broken| Broken);
        }
        to.write_all(&bytes[..n]).await.map_err(|_broken| Broken)?;
    }
}
