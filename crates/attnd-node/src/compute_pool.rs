//! The bridge from async code to the compute threads: one rayon pool, whose work is skipped when nobody waits for it
//! any more, whose panics end one call and not the node, and whose busy time is counted.
//!
//! Work waits outside of the pool, but for a few pieces of it. What waits inside keeps its memory until its turn comes,
//! also when nobody wants it any more, and a thread that waits for others in the middle of one piece of work may take
//! up a whole other one there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attnd_kernel::{Compute, Kernels};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};

use crate::NodeError;

/// Compute threads, apart from the threads that serve connections. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ComputePool {
    threads: Threads,
    /// One for each piece of work that may be in the pool.
    places: Arc<Semaphore>,
    busy: Arc<BusyClock>,
    load: Arc<Mutex<LoadWindow>>,
}

#[derive(Clone, Debug)]
enum Threads {
    Own(Arc<rayon::ThreadPool>),
    /// None: work runs where tasks do, in the order in which it came.
    Tasks {
        gflops: f64,
    },
}

/// Why a piece of work has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// It panicked; the text is the panic's.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The pool dropped it.
    #[error("dropped by the compute pool")]
    Dropped,
}

impl ComputePool {
    /// Starts `threads` threads, at least one, for `at_once` pieces of work at a time, at least one too.
    ///
    /// # Errors
    /// [`NodeError::Threads`] where the system refuses them.
    pub fn new(threads: usize, at_once: usize) -> Result<Self, NodeError> {
        let threads = threads.max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("attnd-compute-{i}"))
            .build()
            .map_err(|source| NodeError::Threads { threads, source })?;
        Ok(Self::on(Threads::Own(Arc::new(pool)), at_once))
    }

    /// One without threads, for simulations: a piece of work runs as a task does, and nothing else meanwhile. `gflops` is what it
    /// says of its speed.
    pub fn in_tasks(gflops: f64, at_once: usize) -> Self {
        Self::on(Threads::Tasks { gflops }, at_once)
    }

    fn on(threads: Threads, at_once: usize) -> Self {
        Self {
            threads,
            places: Arc::new(Semaphore::new(at_once.clamp(1, Semaphore::MAX_PERMITS))),
            busy: Arc::new(BusyClock::default()),
            load: Arc::new(Mutex::new(LoadWindow::new(Instant::now()))),
        }
    }

    /// Compute threads.
    pub fn threads(&self) -> usize {
        match &self.threads {
            Threads::Own(pool) => pool.current_num_threads(),
            Threads::Tasks { .. } => 1,
        }
    }

    /// Hands a job over, behind those that are there.
    fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        match &self.threads {
            Threads::Own(pool) => pool.spawn_fifo(job),
            // A runtime that ends takes the work with it.
            Threads::Tasks { .. } => match Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(async move { job() })),
                Err(_ending) => drop(job),
            },
        }
    }

    /// Peak f32 multiply-add rate of all threads together, in GFLOP/s; takes about `span`.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn peak_gflops(&self, kernels: &'static Kernels, span: Duration) -> Result<f64, WorkError> {
        match &self.threads {
            Threads::Tasks { gflops } => Ok(*gflops),
            Threads::Own(pool) => {
                let pool = Arc::clone(pool);
                self.run(move || kernels.peak_gflops(&pool, Compute::F32, span)).await
            }
        }
    }

    /// Runs `work` on the pool; who asked first comes first. Work whose future is dropped while it waits for its turn is
    /// dropped with it.
    ///
    /// # Errors
    /// [`WorkError::Panicked`] if it panics.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkError> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_closed| WorkError::Dropped)?;
        let (answer, answered) = oneshot::channel();
        let span = tracing::Span::current();
        let busy = Arc::clone(&self.busy);
        self.spawn(move || {
            if answer.is_closed() {
                return;
            }
            let _entered = span.enter();
            let result = {
                let _busy = busy.enter();
                // Nothing that the closure owns outlives it after a panic, so no broken state can be seen.
                catch_unwind(AssertUnwindSafe(work)).map_err(|panic| WorkError::Panicked(text_of(&*panic)))
            };
            drop(place);
            // Nobody waits any more: the result is dropped here, on the pool.
            drop(answer.send(result));
        });
        answered.await.unwrap_or(Err(WorkError::Dropped))
    }

    /// Begins `work` on the pool, behind what is there, and waits for nothing: its result is for `work` itself to hand on, and that not too
    /// much of it is there for its caller to see to. So it is without the two changes of threads and tasks that [`Self::run`] has around
    /// it. A panic ends it and nothing else.
    pub fn begin(&self, work: impl FnOnce() + Send + 'static) {
        let pool = self.clone();
        self.spawn(move || pool.run_here(work));
    }

    /// Runs `work` on this thread, at once, as if it were the pool's: for what takes less time than to wake one of these. It must not
    /// divide itself, see `is_pool_thread`. A panic ends it and nothing else.
    pub fn run_here(&self, work: impl FnOnce()) {
        let _busy = self.busy.enter();
        // What the closure owns doesn't outlive it after a panic; what it shares has to be whole at any moment.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            tracing::error!(panic = text_of(&*panic), "work on the compute pool panicked");
        }
    }

    /// Share of the last second or so in which the pool had work, 0 to 1.
    pub fn load(&self) -> f64 {
        let now = Instant::now();
        lock(&self.load).update(now, self.busy.total(now))
    }
}

/// Whether parallel iterators of rayon have their threads in a pool here. Elsewhere they would begin one for the whole process.
pub(crate) fn is_pool_thread() -> bool {
    rayon::current_thread_index().is_some()
}

pub(crate) fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

/// Adds up the wall time in which at least one holder of [`Busy`] existed.
#[derive(Debug, Default)]
pub struct BusyClock(Mutex<BusyState>);

#[derive(Debug, Default)]
struct BusyState {
    total: Duration,
    holders: usize,
    since: Option<Instant>,
}

/// Something that is running, for as long as it lives.
#[derive(Debug)]
pub struct Busy<'a>(&'a BusyClock);

impl BusyClock {
    /// Runs the clock until the returned value is dropped.
    pub fn enter(&self) -> Busy<'_> {
        let mut state = lock(&self.0);
        state.holders += 1;
        state.since.get_or_insert_with(Instant::now);
        Busy(self)
    }

    /// Busy time up to `now`.
    pub fn total(&self, now: Instant) -> Duration {
        let state = lock(&self.0);
        state.total + state.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        state.holders -= 1;
        if state.holders == 0
            && let Some(since) = state.since.take()
        {
            state.total += since.elapsed();
        }
    }
}

/// Busy time over a sliding second.
#[derive(Debug)]
struct LoadWindow {
    begun: Instant,
    busy_at_begin: Duration,
    load: f64,
}

const WINDOW: Duration = Duration::from_secs(1);

impl LoadWindow {
    fn new(now: Instant) -> Self {
        Self { begun: now, busy_at_begin: Duration::ZERO, load: 0.0 }
    }

    fn update(&mut self, now: Instant, busy: Duration) -> f64 {
        let elapsed = now.saturating_duration_since(self.begun);
        if elapsed >= WINDOW {
            let share = busy.saturating_sub(self.busy_at_begin).as_secs_f64() / elapsed.as_secs_f64();
            *self = Self { begun: now, busy_at_begin: busy, load: share.clamp(0.0, 1.0) };
        }
        self.load
    }
}

/// No critical section of this file can panic half-way, so a poisoned lock still guards a whole value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer_and_the_pool_lives() {
        let pool = ComputePool::new(1, 1).unwrap();
        let failed = pool.run(|| -> u32 { panic!("query of {}", "death") }).await;
        assert_eq!(failed, Err(WorkError::Panicked("query of death".into())));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }

    #[tokio::test]
    async fn work_that_is_begun_tells_itself_what_it_found() {
        let pool = ComputePool::new(1, 1).unwrap();
        let (found, told) = mpsc::channel();
        pool.begin(|| panic!("query of death"));
        pool.begin(move || found.send(std::thread::current().name().map(str::to_owned)).unwrap());
        assert_eq!(told.recv().unwrap().as_deref(), Some("attnd-compute-0"));
    }

    #[tokio::test]
    async fn without_threads_work_runs_where_tasks_do_one_after_the_other() {
        let pool = ComputePool::in_tasks(3.0, 2);
        assert_eq!(
            (pool.threads(), pool.peak_gflops(Kernels::from_env().unwrap(), WINDOW).await),
            (1, Ok(3.0))
        );
        let (found, told) = mpsc::channel();
        for n in 0..3 {
            let found = found.clone();
            pool.begin(move || found.send((n, std::thread::current().id())).unwrap());
        }
        assert!(told.try_recv().is_err(), "not at once");
        let failed = pool.run(|| -> u32 { panic!("query of {}", "death") }).await;
        assert_eq!(failed, Err(WorkError::Panicked("query of death".into())));
        let here = std::thread::current().id();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(0, here), (1, here), (2, here)]);
    }

    #[tokio::test]
    async fn work_that_waits_for_its_turn_goes_with_whoever_wanted_it() {
        let pool = ComputePool::new(1, 2).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        let mut blocking = std::pin::pin!(pool.run(move || gate.recv()));
        assert!(futures::poll!(&mut blocking).is_pending());
        let operands = Arc::new(());
        {
            let mut waiting: Vec<_> = (0..9)
                .map(|_| {
                    let operands = Arc::clone(&operands);
                    Box::pin(pool.run(move || drop(operands)))
                })
                .collect();
            for work in &mut waiting {
                assert!(futures::poll!(work).is_pending());
            }
            assert_eq!(Arc::strong_count(&operands), 10);
        }
        // The thread is still at the first piece of work; the second place in the pool was taken.
        assert_eq!(Arc::strong_count(&operands), 2);
        release.send(()).unwrap();
        assert!(blocking.await.unwrap().is_ok());
        assert_eq!(pool.run(|| 7).await, Ok(7), "the places are free again");
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_skipped() {
        let pool = ComputePool::new(1, 2).unwrap();
        let (release, gate) = mpsc::channel::<()>();
        let ran = Arc::new(AtomicBool::new(false));
        let mut blocking = std::pin::pin!(pool.run(move || gate.recv()));
        assert!(futures::poll!(&mut blocking).is_pending());
        {
            let ran = Arc::clone(&ran);
            let mut unwanted = std::pin::pin!(pool.run(move || ran.store(true, Ordering::SeqCst)));
            assert!(futures::poll!(&mut unwanted).is_pending());
        }
        release.send(()).unwrap();
        assert!(blocking.await.unwrap().is_ok());
        // First in, first out on one thread: when this is done, the unwanted work had its turn.
        pool.run(|| ()).await.unwrap();
        assert!(!ran.load(Ordering::SeqCst));
    }

    #[test]
    fn overlapping_work_counts_once() {
        let clock = BusyClock::default();
        let begun = Instant::now();
        let first = clock.enter();
        let second = clock.enter();
        drop(first);
        std::thread::yield_now();
        drop(second);
        let elapsed = begun.elapsed();
        let total = clock.total(Instant::now());
        assert!(total > Duration::ZERO && total <= elapsed, "{total:?} of {elapsed:?}");
        assert_eq!(clock.total(Instant::now()), total, "the clock stands still when nothing runs");
    }

    #[test]
    fn load_is_the_busy_share_of_the_last_window() {
        let t0 = Instant::now();
        let mut window = LoadWindow::new(t0);
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        assert_eq!(window.update(at(500), Duration::from_millis(500)), 0.0, "too early to say");
        assert_eq!(window.update(at(2000), Duration::from_millis(500)), 0.25);
        assert_eq!(window.update(at(2500), Duration::from_millis(1000)), 0.25);
        assert_eq!(window.update(at(3000), Duration::from_millis(1500)), 1.0);
    }
}
