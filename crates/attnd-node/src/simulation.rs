//! What simulations hear of a coordinator beside what its clients do.

use std::cell::RefCell;

use attnd_wire::proto;

thread_local! {
    /// Nothing on a thread on which nobody has asked yet: a program that was built with this for tests keeps no requests.
    static SENT: RefCell<Option<Vec<proto::HoldRequest>>> = const { RefCell::new(None) };
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
