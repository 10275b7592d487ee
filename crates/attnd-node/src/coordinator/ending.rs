//! What ends a coordinator that nobody has asked to stop: it finds out that it can't keep its promises any more.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::NodeError;

/// The end of this coordinator, as soon as there is a reason for it; the first one counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    why: Mutex<Option<NodeError>>,
    told: Notify,
}

impl Ending {
    /// There is a reason.
    pub(crate) fn tell(&self, why: NodeError) {
        self.0.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.0.told.notify_one();
    }

    /// Completes once there is one.
    pub(crate) async fn reason(&self) -> NodeError {
        loop {
            let why = self.0.why.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(why) = why {
                return why;
            }
            self.0.told.notified().await;
        }
    }
}
