//! What simulations hear of a coordinator beside what its clients do.

use std::cell::RefCell;

use attnd_wire::proto;

thread_local! {
    static SENT: RefCell<Vec<proto::HoldRequest>> = const { RefCell::new(Vec::new()) };
}

/// A coordinator on this thread sends a request to a worker.
pub(crate) fn sent(request: &proto::HoldRequest) {
    SENT.with_borrow_mut(|sent| sent.push(request.clone()));
}

/// The first messages of all requests that coordinators on this thread have sent since this was last asked.
pub fn take_sent() -> Vec<proto::HoldRequest> {
    SENT.take()
}
