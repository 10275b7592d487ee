//! Errors inside of a stream that goes on: the fields of a status, without one.

use std::time::Duration;

use crate::error::{Error, Outcome, Reason};
use crate::proto;

impl From<&Error> for proto::Failure {
    fn from(error: &Error) -> Self {
        let pushback = error.pushback().as_ref().map_or(0, Duration::as_millis);
        Self {
            reason: error.reason.name().to_owned(),
            outcome: error.outcome.name().to_owned(),
            detail: error.detail.clone(),
            pushback_ms: u32::try_from(pushback).unwrap_or(u32::MAX),
        }
    }
}

impl From<Error> for proto::Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

/// What a peer says went wrong. Every failure is an error: a name that this version doesn't know is kept in the detail, and of an outcome
/// that it doesn't know nothing is known.
impl From<proto::Failure> for Error {
    fn from(failure: proto::Failure) -> Self {
        let proto::Failure { reason, outcome, detail, pushback_ms } = failure;
        let error = match Reason::from_name(&reason) {
            Some(reason) => Self::new(reason, detail),
            None => Self::new(Reason::Foreign, format!("{reason}: {detail}")),
        };
        let error = error.with_outcome(Outcome::from_name(&outcome).unwrap_or(Outcome::Unknown));
        if pushback_ms == 0 { error.without_pushback() } else { error }
    }
}
