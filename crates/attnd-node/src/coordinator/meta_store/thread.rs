//! The thread that runs the transactions of a store.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::{MetaError, MetaStore};
use crate::NodeError;
use crate::coordinator::ending::Ending;

/// Transactions that wait; whoever comes with one more waits for a place.
const WAITING: usize = 256;

type Transaction = Box<dyn FnOnce(&dyn MetaStore) + Send>;

/// A store for asynchronous code. Clones are handles on the same thread, which ends with the last one.
#[derive(Clone, Debug)]
pub(crate) struct MetaThread {
    runs: Runs,
    ending: Ending,
}

#[derive(Clone, Debug)]
enum Runs {
    OnThread(mpsc::Sender<Transaction>),
    AtOnce(Arc<dyn MetaStore>),
}

impl MetaThread {
    /// Starts the thread of a store.
    ///
    /// # Errors
    /// If the system has no thread.
    pub(crate) fn start(store: Arc<dyn MetaStore>, ending: Ending) -> Result<Self, NodeError> {
        let (transactions, mut waiting) = mpsc::channel::<Transaction>(WAITING);
        let run = move || {
            while let Some(transaction) = waiting.blocking_recv() {
                transaction(&*store);
            }
        };
        let thread = std::thread::Builder::new().name("attnd-meta".into()).spawn(run);
        // It ends when nobody has a handle any more.
        thread.map(drop).map_err(NodeError::Thread)?;
        Ok(Self { runs: Runs::OnThread(transactions), ending })
    }

    /// A store without a thread, for one that never waits for a disk: whoever asks for a transaction runs it.
    pub(crate) fn at_once(store: Arc<dyn MetaStore>, ending: Ending) -> Self {
        Self { runs: Runs::AtOnce(store), ending }
    }

    /// Runs one transaction and waits for its end. If whoever waits gives up, it happens all the same. A store that fails is of no use
    /// from then on: what is on the disk is known only to whoever opens it anew, so the coordinator ends.
    ///
    /// # Errors
    /// The transaction's, or [`MetaError::Gone`] if the thread is, or the transaction panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        transaction: impl FnOnce(&dyn MetaStore) -> Result<T, MetaError> + Send + 'static,
    ) -> Result<T, MetaError> {
        let done = self.run_on(transaction).await;
        if let Err(error @ (MetaError::Io { .. } | MetaError::Corrupt { .. } | MetaError::Gone)) = &done {
            self.ending.tell(NodeError::StateFailed(error.clone()));
        }
        done
    }

    async fn run_on<T: Send + 'static>(
        &self,
        transaction: impl FnOnce(&dyn MetaStore) -> Result<T, MetaError> + Send + 'static,
    ) -> Result<T, MetaError> {
        let transactions = match &self.runs {
            Runs::OnThread(transactions) => transactions,
            Runs::AtOnce(store) => return transaction(&**store),
        };
        let (answer, answered) = oneshot::channel();
        let job: Transaction = Box::new(move |store| {
            // Who gave up needs no answer.
            answer.send(transaction(store)).ok();
        });
        transactions.send(job).await.map_err(|_ended| MetaError::Gone)?;
        answered.await.unwrap_or(Err(MetaError::Gone))
    }
}
