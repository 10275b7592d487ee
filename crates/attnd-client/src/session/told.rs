//! What one side was told of a session that others may change too.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use attnd_wire::session::SessionDescription;

/// What this side was told of a session.
#[derive(Debug)]
pub(super) struct Told {
    generation: AtomicU64,
    layers: Vec<Mutex<ToldOfLayer>>,
}

/// The most tokens of a layer that this side was told of, in the latest generation in which it was told of any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ToldOfLayer {
    pub(super) generation: u64,
    pub(super) len: u64,
}

impl Told {
    /// All that a description says.
    pub(super) fn of(description: &SessionDescription) -> Self {
        let generation = description.generation;
        let layer = |len: &u64| Mutex::new(ToldOfLayer { generation, len: *len });
        let layers = description.tokens.iter().map(layer).collect();
        Self { generation: AtomicU64::new(generation), layers }
    }

    /// The latest generation.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Of a layer; no token of one that isn't there.
    pub(super) fn layer(&self, layer: usize) -> ToldOfLayer {
        let none = ToldOfLayer { generation: 0, len: 0 };
        // No critical section leaves it half-changed.
        self.layers.get(layer).map_or(none, |told| *told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A layer has at least so many tokens, in this generation.
    pub(super) fn saw(&self, layer: usize, len: u64, generation: u64) {
        self.generation.fetch_max(generation, Ordering::Relaxed);
        let Some(told) = self.layers.get(layer) else { return };
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        match generation.cmp(&told.generation) {
            // An answer that was overtaken by a cut.
            Less => {}
            Equal => told.len = told.len.max(len),
            Greater => *told = ToldOfLayer { generation, len },
        }
    }

    /// This side has cut every layer that had more tokens to `len`.
    pub(super) fn cut(&self, len: u64, generation: u64) {
        for layer in 0..self.layers.len() {
            self.saw(layer, self.layer(layer).len.min(len), generation);
        }
    }
}
