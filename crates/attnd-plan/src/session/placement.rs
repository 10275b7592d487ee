//! Which workers hold which shards of a session.

use super::Holder;

/// A worker that may hold shards.
#[derive(Clone, Debug, PartialEq)]
pub struct Keeper {
    /// Which life of which worker.
    pub holder: Holder,
    /// Its failure domain.
    pub host: String,
    /// Measured speed of all its threads, in 10^9 floating-point operations per second.
    pub gflops: f64,
    /// Memory that sessions may still take, in bytes.
    pub free_bytes: u64,
}
