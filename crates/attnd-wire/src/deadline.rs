//! When a call must be over, from its `grpc-timeout` header.
//!
//! tonic ignores a malformed header, answers CANCELLED when the time is over and watches only until the response
//! headers are sent. So attnd reads the header itself, strictly, before a handler runs ([`crate::layer`]), and hands
//! the handler a [`Deadline`] to keep. A handler that streams must send its headers at once, or tonic's timer is first.

use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue};

use crate::error::{Error, Reason};

/// The header.
pub const TIMEOUT_HEADER: &str = "grpc-timeout";
/// Time of a call whose caller says nothing.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest time of a call, whatever its caller says.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// Streams that stay open as long as both ends want: each request on them has a time of its own, they have none.
pub const OPEN_ENDED: [&str; 2] = ["/attnd.v1.Sessions/Exchange", "/attnd.v1.Shards/Hold"];
/// What a node keeps of the remaining time when it passes a call on.
pub const HOP_MARGIN: Duration = Duration::from_millis(5);

/// The moment after which nobody waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Instant);

impl Deadline {
    /// `timeout` after `now`, at most [`MAX_TIMEOUT`].
    pub fn after(now: Instant, timeout: Duration) -> Self {
        Self(now + timeout.min(MAX_TIMEOUT))
    }

    /// The deadline of a request for the method at `path` that arrived at `now`: `None` for [`OPEN_ENDED`] streams, unless their
    /// caller asks for one.
    ///
    /// # Errors
    /// As [`Self::from_headers`].
    pub fn of_request(path: &str, headers: &HeaderMap, now: Instant) -> Result<Option<Self>, Error> {
        if OPEN_ENDED.contains(&path) && !headers.contains_key(TIMEOUT_HEADER) {
            return Ok(None);
        }
        Self::from_headers(headers, now).map(Some)
    }

    /// The deadline of a request that arrived at `now`: [`DEFAULT_TIMEOUT`] where the header is absent.
    ///
    /// # Errors
    /// [`Reason::DeadlineFormat`] for a header that isn't one timeout, [`Reason::Deadline`] for a timeout of zero.
    pub fn from_headers(headers: &HeaderMap, now: Instant) -> Result<Self, Error> {
        let mut values = headers.get_all(TIMEOUT_HEADER).iter();
        let timeout = match (values.next(), values.next()) {
            (None, _) => DEFAULT_TIMEOUT,
            (Some(value), None) => parse(value.as_bytes())?,
            (Some(_), Some(_)) => return Err(Error::new(Reason::DeadlineFormat, "more than one")),
        };
        if timeout.is_zero() {
            return Err(Error::new(Reason::Deadline, "expired on arrival"));
        }
        Ok(Self::after(now, timeout))
    }

    /// The moment itself.
    pub fn at(self) -> Instant {
        self.0
    }

    /// Time left at `now`.
    ///
    /// # Errors
    /// [`Reason::Deadline`] if none is left.
    pub fn remaining(self, now: Instant) -> Result<Duration, Error> {
        match self.0.checked_duration_since(now) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(Self::expired()),
        }
    }

    /// The deadline for the next hop: [`HOP_MARGIN`] earlier, so that its answer can still be passed on.
    #[must_use]
    pub fn for_next_hop(self) -> Self {
        Self(self.0.checked_sub(HOP_MARGIN).unwrap_or(self.0))
    }

    /// The error of a call whose time is over.
    pub fn expired() -> Error {
        Error::new(Reason::Deadline, "expired")
    }
}

/// Reads a header value: one to eight digits and a unit.
///
/// # Errors
/// [`Reason::DeadlineFormat`] with the value.
pub fn parse(value: &[u8]) -> Result<Duration, Error> {
    let malformed = || Error::new(Reason::DeadlineFormat, format!("'{}'", String::from_utf8_lossy(value)));
    let (unit, digits) = value.split_last().ok_or_else(malformed)?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(malformed());
    }
    let amount = digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    match unit {
        b'H' => Ok(Duration::from_secs(amount * 3600)),
        b'M' => Ok(Duration::from_secs(amount * 60)),
        b'S' => Ok(Duration::from_secs(amount)),
        b'm' => Ok(Duration::from_millis(amount)),
        b'u' => Ok(Duration::from_micros(amount)),
        b'n' => Ok(Duration::from_nanos(amount)),
        _ => Err(malformed()),
    }
}

/// Writes a timeout as a header value, rounded down to what eight digits hold; [`parse`] reads it back.
pub fn header_value(timeout: Duration) -> HeaderValue {
    const EIGHT_DIGITS: u128 = 100_000_000;
    let micros = timeout.as_micros();
    let (amount, unit) = if micros < EIGHT_DIGITS {
        (micros, "u")
    } else if micros / 1000 < EIGHT_DIGITS {
        (micros / 1000, "m")
    } else {
        ((micros / 1_000_000).min(EIGHT_DIGITS - 1), "S")
    };
    HeaderValue::try_from(format!("{amount}{unit}")).unwrap_or(HeaderValue::from_static("0n"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(values: &[&'static str]) -> HeaderMap {
        values
            .iter()
            .map(|v| (http::HeaderName::from_static(TIMEOUT_HEADER), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn malformed_timeouts_are_named() {
        for bad in ["10X", "-1S", "123456789S", "", "S", "1", "+1S", " 1S", "1 S", "1.5S", "0x1S"] {
            let error = parse(bad.as_bytes()).unwrap_err();
            assert_eq!(error.message(), format!("DEADLINE_FORMAT: '{bad}'"));
        }
        assert_eq!(parse(b"\xff\x01S").unwrap_err().message(), "DEADLINE_FORMAT: '\u{fffd}\\u{1}S'");
        let error = Deadline::from_headers(&headers(&["1S", "2S"]), Instant::now()).unwrap_err();
        assert_eq!(error.message(), "DEADLINE_FORMAT: more than one");
    }

    #[test]
    fn zero_is_expired_on_arrival() {
        for zero in ["0m", "0H", "00000000n"] {
            let error = Deadline::from_headers(&headers(&[zero]), Instant::now()).unwrap_err();
            assert_eq!(error.message(), "DEADLINE: expired on arrival");
            assert_eq!(error.reason.code(), tonic::Code::DeadlineExceeded);
        }
    }

    #[test]
    fn every_unit_is_read() {
        let read = |text: &str| parse(text.as_bytes()).unwrap();
        assert_eq!(read("2H"), Duration::from_secs(7200));
        assert_eq!(read("3M"), Duration::from_secs(180));
        assert_eq!(read("99999999S"), Duration::from_secs(99_999_999));
        assert_eq!(read("5m"), Duration::from_millis(5));
        assert_eq!(read("6u"), Duration::from_micros(6));
        assert_eq!(read("7n"), Duration::from_nanos(7));
    }

    #[test]
    fn silence_gets_the_default_and_eternity_the_cap() {
        let now = Instant::now();
        assert_eq!(Deadline::from_headers(&headers(&[]), now).unwrap().at(), now + DEFAULT_TIMEOUT);
        assert_eq!(Deadline::from_headers(&headers(&["99999999H"]), now).unwrap().at(), now + MAX_TIMEOUT);
    }

    #[test]
    fn streams_that_stay_open_have_no_deadline_unless_asked_for() {
        use crate::proto::{sessions_server, shards_server};
        let now = Instant::now();
        let of = |path: &str, values: &[&'static str]| Deadline::of_request(path, &headers(values), now);
        let names = [
            format!("/{}/Exchange", sessions_server::SERVICE_NAME),
            format!("/{}/Hold", shards_server::SERVICE_NAME),
        ];
        assert_eq!(names.each_ref().map(String::as_str), OPEN_ENDED);
        for path in OPEN_ENDED {
            assert_eq!(of(path, &[]), Ok(None));
            let asked = of(path, &["2S"]).unwrap().unwrap();
            assert_eq!(asked.remaining(now), Ok(Duration::from_secs(2)));
            assert_eq!(of(path, &["0S"]).unwrap_err().message(), "DEADLINE: expired on arrival");
        }
        let other = of("/attnd.v1.Attention/Attend", &[]).unwrap().unwrap();
        assert_eq!(other.at(), now + DEFAULT_TIMEOUT);
    }

    #[test]
    fn time_runs_out() {
        let now = Instant::now();
        let deadline = Deadline::after(now, Duration::from_secs(1));
        assert_eq!(deadline.remaining(now), Ok(Duration::from_secs(1)));
        assert_eq!(deadline.for_next_hop().remaining(now), Ok(Duration::from_millis(995)));
        assert_eq!(deadline.remaining(deadline.at()).unwrap_err().message(), "DEADLINE: expired");
    }

    proptest! {
        #[test]
        fn written_timeouts_are_read_back_and_never_longer(micros in 0..200_000_000_000_000_u64) {
            let timeout = Duration::from_micros(micros);
            let read = parse(header_value(timeout).as_bytes()).unwrap();
            prop_assert!(read <= timeout);
            prop_assert!(read.as_secs_f64() >= timeout.as_secs_f64().min(99_999_999.0) * 0.999 - 1e-9);
        }

        #[test]
        fn no_bytes_panic(value in proptest::collection::vec(any::<u8>(), 0..12)) {
            let _either = parse(&value);
        }
    }
}
