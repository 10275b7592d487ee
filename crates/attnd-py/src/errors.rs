//! What goes wrong, as exceptions: `attnd.Error` with the stable name of the reason, and `attnd.InvalidArgument`, which is a
//! `ValueError` too, for what the caller could have known.

use attnd_client::ClientError;
use attnd_wire::{Code, Error, Reason};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The classes, which Python code defines: an exception with two bases can't be made here for every version of Python.
#[derive(Debug)]
pub(crate) struct Raised {
    reason: Reason,
    outcome: &'static str,
    message: String,
}

impl From<ClientError> for Raised {
    fn from(error: ClientError) -> Self {
        Self { reason: error.reason, outcome: error.outcome.name(), message: error.message }
    }
}

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        ClientError::from(error).into()
    }
}

impl From<Raised> for PyErr {
    fn from(raised: Raised) -> Self {
        let Raised { reason, outcome, message } = raised;
        Python::attach(|py| {
            let is_invalid = reason.code() == Code::InvalidArgument;
            let class = if is_invalid { "InvalidArgument" } else { "Error" };
            let class = py.import("attnd._errors").and_then(|module| module.getattr(class));
            match class.and_then(|class| Ok(class.cast_into::<PyType>()?)) {
                Ok(class) => PyErr::from_type(class, (message, reason.name(), outcome)),
                Err(error) => error,
            }
        })
    }
}

/// A `ValueError` about something that never became a call.
pub(crate) fn value_error(message: String) -> PyErr {
    PyValueError::new_err(message)
}
