//! The two pools of threads that cases run on, each thread pinned to a core of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use core_affinity::CoreId;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::case::Team;

/// A pool of one thread and a pool of all.
#[derive(Debug)]
pub struct Pools {
    one: ThreadPool,
    all: ThreadPool,
    /// Cores that this process may use, by the system's numbers; empty if it doesn't say.
    cores: Vec<usize>,
    /// Whether each thread was kept on its core.
    pub pinned: bool,
}

impl Pools {
    /// Starts the threads. The lone one takes the last core: the first is where a system likes to serve interrupts.
    ///
    /// # Errors
    /// If the system refuses the threads.
    pub fn start(threads: usize) -> anyhow::Result<Self> {
        let ids = core_affinity::get_core_ids().unwrap_or_default();
        let refused = Arc::new(AtomicBool::new(ids.is_empty() || threads > ids.len()));
        let last: Vec<CoreId> = ids.last().copied().into_iter().collect();
        let one = pool(1, last, Arc::clone(&refused))?;
        let cores = ids.iter().map(|core| core.id).collect();
        let all = pool(threads, ids, Arc::clone(&refused))?;
        Ok(Self { one, all, cores, pinned: !refused.load(Ordering::Acquire) })
    }

    /// The pool of a team.
    pub fn of(&self, team: Team) -> &ThreadPool {
        match team {
            Team::One => &self.one,
            Team::All => &self.all,
        }
    }

    /// The cores that a team works on, by the system's numbers; empty where nothing could be pinned.
    pub fn cores_of(&self, team: Team) -> &[usize] {
        match team {
            _ if !self.pinned => &[],
            Team::One => &self.cores[self.cores.len().saturating_sub(1)..],
            Team::All => &self.cores[..self.threads(team)],
        }
    }

    /// Threads of a team.
    pub fn threads(&self, team: Team) -> usize {
        self.of(team).current_num_threads()
    }
}

/// Starts `threads` threads and waits until each has been pinned. Without a core for each nothing is pinned: two threads
/// on one core would measure nothing.
fn pool(threads: usize, cores: Vec<CoreId>, refused: Arc<AtomicBool>) -> anyhow::Result<ThreadPool> {
    let pin = move |index: usize| {
        if threads <= cores.len() && !core_affinity::set_for_current(cores[index]) {
            refused.store(true, Ordering::Release);
        }
    };
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("attnd-bench-{index}"))
        .start_handler(pin)
        .build()
        .with_context(|| format!("start {threads} threads"))?;
    pool.broadcast(|_started| ());
    Ok(pool)
}
