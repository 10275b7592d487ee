//! Measurements of the kernels on this machine: which cases, how they are run and timed, what limits they are held
//! against, and how the result looks.

pub mod case;
pub mod compare;
pub mod limits;
pub mod machine;
pub mod measure;
pub mod operands;
pub mod peers;
pub mod report;
pub mod threads;
pub mod torch;
pub mod venv;
