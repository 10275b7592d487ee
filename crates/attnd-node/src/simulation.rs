//! What simulations hear of nodes beside what clients and peers do.

use std::cell::RefCell;
use std::collections::BTreeMap;

use attnd_plan::WorkerId;
use attnd_wire::proto;

thread_local! {
    /// Nothing on a thread on which nobody has asked yet: a program that was built with this for tests keeps no requests.
    static SENT: RefCell<Option<Vec<proto::HoldRequest>>> = const { RefCell::new(None) };
    static LEFT: RefCell<BTreeMap<WorkerId, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// A coordinator on this thread sends a request to a worker.
pub(crate) fn sent(request: &proto::HoldRequest) {
    SENT.with_borrow_mut(|sent| {
        if let Some(sent) = sent {
            sent.push(request.clone());
        }
    });
}

/// The first messages of all requests that coordinators on this thread have sent since this was last asked; none the first time, before
/// which nobody listens.
pub fn take_sent() -> Vec<proto::HoldRequest> {
    SENT.replace(Some(Vec::new())).unwrap_or_default()
}

/// A worker on this thread has handed over what it can, and still has so many shards.
pub(crate) fn left(worker: &WorkerId, shards: usize) {
    LEFT.with_borrow_mut(|left| left.insert(worker.clone(), shards));
}

/// How many shards a worker of this thread had that it didn't hand over before it ended, since this was last asked.
pub fn take_left(worker: &WorkerId) -> usize {
    LEFT.with_borrow_mut(|left| left.remove(worker)).unwrap_or(0)
}
