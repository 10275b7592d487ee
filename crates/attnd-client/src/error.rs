//! Why a call of the client failed, under the stable names of the wire.

use attnd_wire::{Error, Outcome, Reason};

/// A failed call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ClientError {
    /// The stable name of what went wrong.
    pub reason: Reason,
    /// What is known about the effect of the call.
    pub outcome: Outcome,
    /// `REASON: detail`, for a person.
    pub message: String,
    /// How often the call was sent; 0 where it never was.
    pub attempts: u32,
}

impl ClientError {
    pub(crate) fn after(attempts: u32, error: &Error) -> Self {
        Self { reason: error.reason, outcome: error.outcome, message: error.message(), attempts }
    }

    /// Whether the same call may be sent again and may then succeed. The client has done so already as often as it
    /// thinks right.
    pub fn is_retryable(&self) -> bool {
        Error::new(self.reason, "").with_outcome(self.outcome).is_retryable()
    }
}

/// A call that was never sent.
impl From<Error> for ClientError {
    fn from(error: Error) -> Self {
        Self::after(0, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_the_wire_said() {
        let error = ClientError::after(3, &Error::new(Reason::WorkerLost, "w2"));
        assert_eq!(error.to_string(), "WORKER_LOST: w2");
        assert!(error.is_retryable());
        assert!(!ClientError::from(Error::new(Reason::Scale, "")).is_retryable());
        let unknown = Error::new(Reason::NoWorkers, "").with_outcome(Outcome::Unknown);
        assert!(!ClientError::from(unknown).is_retryable());
    }
}
