//! What a node stands on: the machine that it runs on, or what a simulation has in its place.

use std::sync::Arc;

use attnd_wire::Surroundings;

use crate::NodeError;
use crate::compute_pool::ComputePool;
use crate::coordinator::meta_store::MetaStore;

/// What a node stands on. The default is the machine.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// Network and chance.
    pub surroundings: Surroundings,
    /// Where it computes.
    pub computing: Computing,
    /// What a coordinator keeps its state in, where it is told of no directory; used from its runtime's threads.
    pub meta: Option<Arc<dyn MetaStore>>,
}

/// Where a node computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Computing {
    /// On threads of its own.
    #[default]
    Threads,
    /// Where its tasks run, which wait meanwhile: for a simulation, whose time stands still.
    Tasks {
        /// What it says of its speed, in GFLOP/s.
        gflops: f64,
    },
}

impl Platform {
    /// A pool of `threads` threads for `at_once` pieces of work at a time.
    pub(crate) fn pool(&self, threads: usize, at_once: usize) -> Result<ComputePool, NodeError> {
        match self.computing {
            Computing::Threads => ComputePool::new(threads, at_once),
            Computing::Tasks { gflops } => Ok(ComputePool::in_tasks(gflops, at_once)),
        }
    }
}
