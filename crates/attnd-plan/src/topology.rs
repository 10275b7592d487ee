//! The workers as the planner sees them: a name, a speed and the memory that is free.

use std::fmt;
use std::str::FromStr;

/// Longest worker id, in bytes.
pub const MAX_WORKER_ID: usize = 64;

/// What a worker counts for that reports a speed that can't be, in 10^9 floating-point operations per second.
const VERY_SLOW: f64 = 1e-3;
/// No worker is faster than this, in 10^9 floating-point operations per second; 10^15 per second is thousands of cores.
const MAX_GFLOPS: f64 = 1e6;

/// The name of a worker: 1 to 64 characters of `[A-Za-z0-9._-]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(String);

/// Why a text is no worker id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkerIdError {
    /// Empty, or longer than [`MAX_WORKER_ID`].
    #[error("worker id must have 1..{MAX_WORKER_ID} bytes, got {bytes}")]
    Length {
        /// Bytes of the text.
        bytes: usize,
    },
    /// A character that isn't allowed.
    #[error("worker id must be of [A-Za-z0-9._-], got {found:?} at byte {at}")]
    Character {
        /// The first one.
        found: char,
        /// Where it begins.
        at: usize,
    },
}

impl WorkerId {
    /// Checks a text; see [`WorkerIdError`] for what is refused.
    pub fn new(text: impl Into<String>) -> Result<Self, WorkerIdError> {
        let text = text.into();
        if text.is_empty() || text.len() > MAX_WORKER_ID {
            return Err(WorkerIdError::Length { bytes: text.len() });
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        match text.char_indices().find(|(_, c)| !allowed(*c)) {
            Some((at, found)) => Err(WorkerIdError::Character { found, at }),
            None => Ok(Self(text)),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for WorkerId {
    type Err = WorkerIdError;
    fn from_str(text: &str) -> Result<Self, WorkerIdError> {
        Self::new(text)
    }
}

impl TryFrom<String> for WorkerId {
    type Error = WorkerIdError;
    fn try_from(text: String) -> Result<Self, WorkerIdError> {
        Self::new(text)
    }
}

/// Whether a text can name a failure domain, such as a machine or a rack: 1 to 64 characters of `[A-Za-z0-9._-]`.
pub fn is_host_label(text: &str) -> bool {
    WorkerId::new(text).is_ok()
}

/// What a worker can do at the moment a plan is made.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    /// Who.
    pub id: WorkerId,
    /// Measured speed of all its threads, in 10^9 floating-point operations per second. What is not in
    /// 0.001 to 1,000,000 counts as very slow.
    pub gflops: f64,
    /// Memory that it may still reserve, in bytes.
    pub free_bytes: u64,
}

impl Capacity {
    /// A speed that arithmetic can rely on: a worker that reports nonsense counts as a very slow one.
    pub(crate) fn speed(&self) -> f64 {
        usable_speed(self.gflops)
    }
}

/// A speed that arithmetic can rely on, as [`Capacity::speed`] has it.
pub(crate) fn usable_speed(gflops: f64) -> f64 {
    // A comparison with NaN is false.
    if gflops > VERY_SLOW && gflops <= MAX_GFLOPS { gflops } else { VERY_SLOW }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_short_and_printable() {
        assert_eq!(WorkerId::new("gpu-7.rack_2").unwrap().to_string(), "gpu-7.rack_2");
        assert_eq!(WorkerId::new(""), Err(WorkerIdError::Length { bytes: 0 }));
        assert_eq!(WorkerId::new("x".repeat(65)), Err(WorkerIdError::Length { bytes: 65 }));
        assert!(WorkerId::new("x".repeat(64)).is_ok());
        assert_eq!(WorkerId::new("a\u{1b}b"), Err(WorkerIdError::Character { found: '\u{1b}', at: 1 }));
        assert_eq!("ä".parse::<WorkerId>(), Err(WorkerIdError::Character { found: 'ä', at: 0 }));
    }

    #[test]
    fn nonsense_speeds_are_slow() {
        let id = WorkerId::new("a").unwrap();
        let speed = |gflops| Capacity { id: id.clone(), gflops, free_bytes: 0 }.speed();
        for gflops in
            [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, 1.1e6, f64::MIN_POSITIVE, -5.0, 0.0]
        {
            let speed = speed(gflops);
            assert!(speed > 0.0 && speed <= 1.0, "{gflops} -> {speed}");
        }
        for gflops in [0.01, 230.0, 1e6] {
            assert_eq!(speed(gflops), gflops);
        }
    }
}
