//! What `attnd demo` sends, how it judges the answers, and how it shows them; the verb itself is `verbs/demo.rs`.

pub mod checks;
pub mod input;
pub mod report;
