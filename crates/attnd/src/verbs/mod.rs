//! One file per verb.

pub mod attend;
pub mod bench;
pub mod completions;
pub mod coordinator;
pub mod demo;
pub mod explain;
pub mod layer;
pub mod local;
pub mod plan;
pub mod scores;
pub mod session;
pub mod status;
pub mod worker;
