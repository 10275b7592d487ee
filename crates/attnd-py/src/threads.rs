//! The threads that kernels run on, and how Python waits for them: without its lock, and listening for Ctrl-C.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyInterruptedError, PyRuntimeError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::runtime::Runtime;

use crate::errors::value_error;

/// Most threads that can be asked for: far more than help, and few enough to be started at once.
const MOST_THREADS: usize = 1024;
/// Time between two looks at signals.
const LOOK: Duration = Duration::from_millis(50);
/// How many threads, where nobody says so in the program.
const THREADS_ENV: &str = "ATTND_NUM_THREADS";

static POOL: OfProcess<ThreadPool> = OfProcess::new();
static RUNTIME: OfProcess<Runtime> = OfProcess::new();

/// Threads, which don't survive a fork: a child makes its own.
struct OfProcess<T>(Mutex<Option<(u32, Arc<T>)>>);

impl<T> OfProcess<T> {
    const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Those of this process, which `start` makes where there are none.
    fn get(&self, start: impl FnOnce() -> PyResult<T>) -> PyResult<Arc<T>> {
        let mut here = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*here {
            Some((process, threads)) if *process == std::process::id() => return Ok(Arc::clone(threads)),
            // They are the parent's: to end them would wait for what isn't here.
            Some(_) => std::mem::forget(here.take()),
            None => {}
        }
        let threads = Arc::new(start()?);
        *here = Some((std::process::id(), Arc::clone(&threads)));
        Ok(threads)
    }

    /// Others from now on. Those of before end with their last call.
    fn replace(&self, threads: T) {
        let of_process = Some((std::process::id(), Arc::new(threads)));
        let before =
            std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), of_process);
        if let Some((_, threads)) = before.filter(|(process, _)| *process != std::process::id()) {
            std::mem::forget(threads);
        }
    }
}

fn started(threads: usize) -> PyResult<ThreadPool> {
    let builder = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("attnd-{i}"));
    builder.build().map_err(|error| PyRuntimeError::new_err(format!("threads: {error}")))
}

/// A number of threads that somebody typed.
fn checked(name: &str, threads: Option<usize>, given: &str) -> PyResult<usize> {
    threads
        .filter(|threads| (1..=MOST_THREADS).contains(threads))
        .ok_or_else(|| value_error(format!("{name} is {given}, expected 1 to {MOST_THREADS}")))
}

/// As many as the environment says, or as there are cores.
fn default_threads() -> PyResult<usize> {
    match std::env::var(THREADS_ENV) {
        Ok(text) => checked(THREADS_ENV, text.trim().parse().ok(), &format!("{text:?}")),
        Err(_unset) => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn pool() -> PyResult<Arc<ThreadPool>> {
    POOL.get(|| started(default_threads()?))
}

fn runtime() -> PyResult<Arc<Runtime>> {
    RUNTIME.get(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let built = builder.worker_threads(2).thread_name("attnd-net").enable_all().build();
        built.map_err(|error| PyRuntimeError::new_err(format!("threads: {error}")))
    })
}

/// How many threads compute calls of this process.
#[pyfunction]
pub(crate) fn num_threads() -> PyResult<usize> {
    Ok(pool()?.current_num_threads())
}

/// Has calls of this process computed on so many threads from now on.
#[pyfunction]
pub(crate) fn set_num_threads(py: Python<'_>, threads: usize) -> PyResult<()> {
    let threads = checked("num_threads", Some(threads), &threads.to_string())?;
    POOL.replace(py.detach(|| started(threads))?);
    Ok(())
}

thread_local! {
    /// What the call of this thread is ended by, beside signals.
    static INTERRUPT: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// Ends the calls that another thread makes under it, as Ctrl-C ends those of the main one.
#[pyclass(frozen, module = "attnd._attnd")]
#[derive(Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

#[pymethods]
impl Interrupt {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Ends the call that runs under it, and all that will.
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Calls a function, whose calls it may end with `InterruptedError`.
    fn run<'py>(&self, function: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let before = INTERRUPT.replace(Some(Arc::clone(&self.0)));
        let result = function.call0();
        INTERRUPT.set(before);
        result
    }
}

/// Why a call that is under way should end now.
fn interrupted(interrupt: Option<&Arc<AtomicBool>>) -> PyResult<()> {
    if interrupt.is_some_and(|interrupt| interrupt.load(Ordering::Relaxed)) {
        return Err(PyInterruptedError::new_err("nobody waits for this call any more"));
    }
    Python::attach(|py| py.check_signals())
}

/// Runs `work` on the threads, without Python's lock. `work` is told when nobody wants it any more: after Ctrl-C, which then is the
/// error, once the work has ended.
///
/// # Errors
/// `KeyboardInterrupt`, or whatever else a signal handler raises; `RuntimeError` where the work panics.
pub(crate) fn compute<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&(dyn Fn() -> bool + Sync)) -> T + Send,
) -> PyResult<T> {
    let (pool, interrupt) = (pool()?, INTERRUPT.with_borrow(Clone::clone));
    py.detach(|| {
        let given_up = AtomicBool::new(false);
        let wanted = || !given_up.load(Ordering::Relaxed);
        let (done, outcome) = sync_channel(1);
        let mut why = None;
        let computed = pool.in_place_scope(|scope| {
            scope.spawn(|_| {
                // Whoever waits is still there: it leaves when it has this.
                done.send(caught(|| work(&wanted))).unwrap_or_default();
            });
            loop {
                match outcome.recv_timeout(LOOK) {
                    Ok(computed) => return computed,
                    Err(RecvTimeoutError::Disconnected) => return Err(panicked("")),
                    Err(RecvTimeoutError::Timeout) if why.is_none() => {
                        why = interrupted(interrupt.as_ref()).err();
                        given_up.store(why.is_some(), Ordering::Relaxed);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        });
        match why {
            Some(error) => Err(error),
            None => computed,
        }
    })
}

/// Runs `work`, which is short, on this thread, without Python's lock.
///
/// # Errors
/// `RuntimeError` where it panics.
pub(crate) fn compute_here<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| caught(work))
}

/// A panic is an exception, and no end of the program.
fn caught<T>(work: impl FnOnce() -> T) -> PyResult<T> {
    // What it was about to write is dropped with it.
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        panicked(text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or_default())
    })
}

fn panicked(text: &str) -> PyErr {
    PyRuntimeError::new_err(format!("a kernel panicked, which is a fault of attnd's: {text}"))
}

/// Waits for what the network brings, without Python's lock. After Ctrl-C nobody waits any more, which ends a call everywhere.
///
/// # Errors
/// `KeyboardInterrupt`, or whatever else a signal handler raises.
pub(crate) fn wait<T: Send>(py: Python<'_>, call: impl Future<Output = T> + Send) -> PyResult<T> {
    let (runtime, interrupt) = (runtime()?, INTERRUPT.with_borrow(Clone::clone));
    py.detach(|| {
        runtime.block_on(async {
            let mut call = std::pin::pin!(call);
            loop {
                tokio::select! {
                    done = &mut call => return Ok(done),
                    () = tokio::time::sleep(LOOK) => interrupted(interrupt.as_ref())?,
                }
            }
        })
    })
}

/// The same of a call that makes something which has to be given back: it goes on to its end after Ctrl-C, and what it made goes through
/// `undo`.
///
/// # Errors
/// As [`wait`].
pub(crate) fn wait_or_undo<T: Send, U: Future<Output = ()> + Send>(
    py: Python<'_>,
    call: impl Future<Output = T> + Send,
    undo: impl FnOnce(T) -> U + Send,
) -> PyResult<T> {
    let (runtime, interrupt) = (runtime()?, INTERRUPT.with_borrow(Clone::clone));
    py.detach(|| {
        runtime.block_on(async {
            let mut call = std::pin::pin!(call);
            loop {
                tokio::select! {
                    done = &mut call => return Ok(done),
                    () = tokio::time::sleep(LOOK) => {}
                }
                if let Err(error) = interrupted(interrupt.as_ref()) {
                    undo(call.await).await;
                    return Err(error);
                }
            }
        })
    })
}
