//! Exit codes: 0 success, 1 failure, 2 unusable input or command line; a node that ends abnormally has the code of its
//! [`NodeError`], such as 75 for a drain that ran out of time, which is also the code of [`Insisted`].

use std::error::Error;

use attnd_client::{Client, ClientError, Reason};
use attnd_node::NodeError;

use crate::flags;
use crate::output;
use crate::tensor_file::{OperandError, ReadError};

/// Something the person at the keyboard can fix: a bad argument or unusable input. Ends the process with code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadInput(String);

impl BadInput {
    /// `message`: one line, lower case, that says what is wrong and what was expected.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Somebody asked a process twice to stop, and it stopped without waiting for its calls. Ends it with code 75.
#[derive(Debug, thiserror::Error)]
#[error("asked twice to stop: calls in flight, if any, were cut")]
pub struct Insisted;

/// A client of the coordinator at `endpoint`, which somebody typed.
///
/// # Errors
/// [`BadInput`] if it is no URL.
pub fn connect(endpoint: &str) -> Result<Client, BadInput> {
    Client::connect(endpoint)
        .map_err(|error| BadInput::new(format!("endpoint '{endpoint}', expected http://HOST:PORT: {error}")))
}

/// Turns the outcome of a verb into an exit code and prints an error, once, on one line of stderr.
pub fn conclude(outcome: anyhow::Result<()>) -> u8 {
    let Err(error) = outcome else { return 0 };
    // `attnd status | head -1` is no failure of attnd.
    if error.chain().any(is_broken_pipe) {
        return 0;
    }
    output::error(&one_line(&error));
    code_of(&error)
}

fn code_of(error: &anyhow::Error) -> u8 {
    if error.chain().any(is_bad_input) {
        return 2;
    }
    if error.is::<Insisted>() {
        return 75;
    }
    error.chain().find_map(|cause| cause.downcast_ref::<NodeError>()).map_or(1, NodeError::exit_code)
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<output::Closed>().is_some()
}

fn is_bad_input(error: &(dyn Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return is_about_the_input(error.reason);
    }
    error.is::<BadInput>() || error.is::<ReadError>() || error.is::<OperandError>()
}

/// Whether a call was refused for what was asked, rather than for the state of the cluster.
fn is_about_the_input(reason: Reason) -> bool {
    use Reason::*;
    matches!(
        reason,
        ShapeZero
            | ShapeLimit
            | ShapeOverflow
            | ShapeMismatch
            | GqaRatio
            | PayloadLength
            | Scale
            | Operator
            | Outputs
            | Combination
            | NonFinite
            | ScoreOverflow
            | OutputOverflow
            | EmptyRow
            | Workers
            | SessionId
            | Replication
            | DtypeMismatch
            | Fork
            | AtLen
    )
}

/// The chain of causes, joined with colons; a cause whose text its parent already quotes is left out.
fn one_line(error: &anyhow::Error) -> String {
    let text = |cause: &(dyn Error + 'static)| {
        let of_call = cause.downcast_ref::<ClientError>().and_then(flags::of_call);
        of_call.unwrap_or_else(|| cause.to_string())
    };
    let mut line = String::new();
    for cause in error.chain().map(text) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_person_can_fix_is_told_apart_from_what_the_cluster_did() {
        assert_eq!(code_of(&anyhow::Error::new(BadInput::new("x")).context("attend")), 2);
        assert_eq!(code_of(&anyhow::anyhow!("x")), 1);
        assert_eq!(code_of(&Insisted.into()), 75);
        assert!(is_about_the_input(Reason::NonFinite) && !is_about_the_input(Reason::WorkerLost));
        assert!(connect("127.0.0.1:7400").unwrap_err().to_string().contains("expected http://HOST:PORT"));
    }

    #[test]
    fn an_error_is_one_line_that_says_each_thing_once() {
        let inner = anyhow::Error::new(BadInput::new("inner\nline"));
        assert_eq!(one_line(&inner.context("outer")), "outer: inner line");
        let quoted = anyhow::Error::new(BadInput::new("why")).context("what: why");
        assert_eq!(one_line(&quoted), "what: why");
    }
}
