//! Statuses that the gRPC library made, turned into errors of ours.
//!
//! The library has codes of its own (OUT_OF_RANGE for a message over the limit, CANCELLED for an expired timeout) and
//! texts with transport details. A status without `attnd-reason` is classified here by its code and its text, as tonic
//! 0.14.9 writes it; the tests in `tests/library` provoke each one in the real library, so an upgrade that
//! changes a text fails there. Whatever isn't recognised becomes [`Reason::Foreign`].
//!
//! Transport errors get fixed words instead of the library's, because those may name addresses.

use std::error::Error as _;

use tonic::{Code, ConnectError, Status, TimeoutExpired};

use crate::error::{Error, Outcome, Reason};

/// Any status as one that attnd could have made: with reason, outcome, the reason's code and a bounded text.
pub fn normalise(status: Status) -> Status {
    Error::from_status(&status).into()
}

/// What a status without `attnd-reason` means.
pub fn classify(status: &Status) -> Error {
    from_source(status).or_else(|| from_text(status)).unwrap_or_else(|| foreign(status))
}

/// An error that keeps the code and the text of a status nobody here understands.
pub fn foreign(status: &Status) -> Error {
    Error::new(Reason::Foreign, format!("{:?}, {}", status.code(), status.message()))
}

/// Reads the chain of causes, which statuses made in this process have.
fn from_source(status: &Status) -> Option<Error> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return Some(Error::new(Reason::Transport, "connect failed").with_outcome(Outcome::NotExecuted));
        }
        if error.is::<TimeoutExpired>() {
            return Some(expired());
        }
        cause = error.source();
    }
    None
}

fn expired() -> Error {
    Error::new(Reason::Deadline, "expired").with_outcome(Outcome::Unknown)
}

fn from_text(status: &Status) -> Option<Error> {
    let text = status.message();
    match status.code() {
        // Decoder and encoder; newer versions may give the code that the gRPC specification asks for.
        Code::OutOfRange | Code::ResourceExhausted if text.contains("message length too large") => {
            let (found, limit) = (number_after(text, "found ")?, number_after(text, "the limit is: ")?);
            Some(Error::new(Reason::MessageTooLarge, format!("{found} > {limit}")))
        }
        Code::ResourceExhausted if text.contains("exceeded while decompressing") => {
            let limit = number_after(text, "size limit, of ")?;
            Some(Error::new(Reason::MessageTooLarge, format!("decompressed > {limit}")))
        }
        Code::ResourceExhausted if text.starts_with("Too many active requests") => {
            Some(Error::new(Reason::Overloaded, "too many calls on this connection"))
        }
        Code::Unimplemented => Some(unimplemented(text)),
        Code::Internal if text.starts_with("failed to decode Protobuf") => {
            Some(Error::new(Reason::Decode, text))
        }
        Code::Internal if is_framing(text) => Some(Error::new(Reason::Protocol, text)),
        Code::DeadlineExceeded => Some(expired()),
        Code::Cancelled if text == "Timeout expired" => Some(expired()),
        _ => transport(status.code(), text),
    }
}

fn unimplemented(text: &str) -> Error {
    let encoding = text.strip_prefix("Content is compressed with `").and_then(|rest| rest.split_once('`'));
    match encoding {
        Some((name, _)) => Error::new(Reason::Encoding, format!("'{name}' not accepted")),
        None if text.is_empty() => Error::new(Reason::Method, "no such service or method"),
        None => Error::new(Reason::Method, text),
    }
}

/// Bytes that are no gRPC message.
fn is_framing(text: &str) -> bool {
    text.starts_with("protocol error: received message")
        || text.starts_with("Unexpected EOF decoding stream")
        || text.starts_with("Missing re") // "request message." at a server, "response message." at a client
}

/// Statuses for a connection or a stream that broke, in the words of tonic, hyper and h2.
fn transport(code: Code, text: &str) -> Option<Error> {
    if let Some(http) = number_after(text, "mapped from HTTP status code ") {
        return Some(match http {
            "431" => Error::new(Reason::MetadataTooLarge, "request headers refused")
                .with_outcome(Outcome::NotExecuted),
            _ => Error::new(Reason::Transport, format!("HTTP status {http} without a gRPC status")),
        });
    }
    let lost = |detail| Some(Error::new(Reason::Transport, detail));
    let never_sent = |detail| lost(detail).map(|error| error.with_outcome(Outcome::NotExecuted));
    if text.starts_with("Service was not ready") {
        // The channel refused before it took the request.
        never_sent("not connected")
    } else if text.starts_with("h2 protocol error") && code == Code::Unavailable {
        // REFUSED_STREAM is the only HTTP/2 error with this code: no handler saw the request.
        never_sent("stream refused")
    } else if text.contains("missing grpc-status trailer") {
        lost("stream ended without a status")
    } else if text.starts_with("h2 protocol error") || text.contains("transport error") {
        lost("connection lost")
    } else if matches!(code, Code::Unavailable) {
        // With this code, "http2 error" is hyper's word for pings without an answer; anything else is a proxy's.
        lost(if text.starts_with("http2 error") { "no answer to pings" } else { "unavailable" })
    } else if matches!(code, Code::Cancelled) {
        // "operation was canceled" is hyper's word for a connection that went away.
        if text.starts_with("operation was canceled") {
            lost("connection lost")
        } else {
            Some(Error::new(Reason::Cancelled, text))
        }
    } else if matches!(code, Code::Unknown) && is_io(text) {
        lost("connection lost")
    } else {
        None
    }
}

fn is_io(text: &str) -> bool {
    ["error reading a body", "connection closed", "connection error", "broken pipe", "connection reset"]
        .iter()
        .any(|words| text.contains(words))
}

/// The decimal digits that follow `words`.
fn number_after<'a>(text: &'a str, words: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(words)?;
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest.get(..end).filter(|digits| !digits.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(code: Code, text: &str) -> String {
        Error::from_status(&Status::new(code, text)).message()
    }

    #[test]
    fn our_own_statuses_pass_unchanged() {
        let error = Error::new(Reason::Checksum, "chunk 2, nothing applied");
        let status = normalise(Status::from(&error));
        assert_eq!((status.code(), status.message()), (Code::Aborted, "CHECKSUM: chunk 2, nothing applied"));
        assert_eq!(Error::from_status(&status), error);
    }

    #[test]
    fn a_decompression_bomb_is_a_message_too_large() {
        let text = "Error decompressing: size limit, of 8388608 bytes, exceeded while decompressing message";
        assert_eq!(message(Code::ResourceExhausted, text), "MESSAGE_TOO_LARGE: decompressed > 8388608");
    }

    #[test]
    fn unknown_statuses_keep_code_and_text() {
        assert_eq!(message(Code::PermissionDenied, "go\naway"), "FOREIGN: PermissionDenied, go\\naway");
        assert_eq!(
            message(Code::OutOfRange, "message length too large"),
            "FOREIGN: OutOfRange, message length too large"
        );
    }

    #[test]
    fn proxies_that_answer_in_http_are_transport_errors() {
        let text = "grpc-status header missing, mapped from HTTP status code 502";
        assert_eq!(message(Code::Unavailable, text), "TRANSPORT: HTTP status 502 without a gRPC status");
    }

    #[test]
    fn no_address_gets_through() {
        for code in [Code::Unavailable, Code::Unknown] {
            let text = message(code, "transport error: tcp connect error 10.0.0.7:4711");
            assert_eq!(text, "TRANSPORT: connection lost");
        }
    }
}
