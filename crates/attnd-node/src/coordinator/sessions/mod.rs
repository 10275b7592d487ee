//! Sessions: keys and values that stay on the workers.

mod merge;
mod turns;
