//! The two roles of a cluster: actors and gRPC services around the pure decisions of `attnd-plan` and the kernels of
//! `attnd-kernel`.
//!
//! * [`coordinator`] takes calls from clients, plans them, forwards their bytes to workers and merges what comes back.
//! * [`worker`] keeps the keys and values of its share in memory and computes partials where they lie.
//!
//! Either role is `run(listener, config, shutdown)`: the caller owns the socket and the end. `run_on` is the same on another
//! [`Platform`] than this machine, which is how simulations have them.

mod budget;
pub mod compute_pool;
pub mod coordinator;
pub mod error;
pub mod in_process;
pub mod listen;
pub mod platform;
pub mod shutdown;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod worker;

pub use error::NodeError;
pub use platform::{Computing, Platform};
