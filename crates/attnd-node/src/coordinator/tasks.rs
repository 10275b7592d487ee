//! The tasks of a coordinator that are no actors: one per call and one per join stream. They end with the node.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::{JoinError, JoinSet};

/// A set of tasks. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    /// Starts a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // A runtime that ends drops a task where it is spawned, and what a task drops may want another one: not under this lock.
        let task = Arc::new(Mutex::new(Some(Box::pin(task))));
        let taken = Arc::clone(&task);
        let run = async move {
            let task = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(task) = task {
                task.await;
            }
        };
        let mut set = self.lock();
        while let Some(ended) = set.try_join_next() {
            report(ended);
        }
        set.spawn(run);
        drop(set);
        drop(task);
    }

    /// Ends all of them at their next await.
    pub(crate) fn abort_all(&self) {
        self.lock().abort_all();
    }

    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        // No critical section of this file leaves the set half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a task panicked; whoever waited for it has an error already.
pub(crate) fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a task panicked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wants another task when it is dropped.
    struct Wants(Tasks);

    impl Drop for Wants {
        fn drop(&mut self) {
            self.0.spawn(async {});
        }
    }

    #[test]
    fn tasks_that_end_with_their_runtime_may_want_others() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let tasks = Tasks::default();
        let _entered = runtime.enter();
        for _ in 0..3 {
            let wants = (Wants(tasks.clone()), Wants(tasks.clone()));
            tasks.spawn(async move {
                std::future::pending::<()>().await;
                drop(wants);
            });
        }
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let _entered = handle.enter();
        let wants = Wants(tasks.clone());
        tasks.spawn(async move { drop(wants) });
    }
}
