//! The compiled half of the Python package `attnd`: calls over numpy arrays, computed in this process or on a cluster.
//!
//! `python/attnd/` is what users see: names, defaults, documentation. Here arrays become bytes without a copy, options become those of
//! `attnd-client`, and Python runs on while kernels or the network work.

mod arrays;
mod attention;
mod cluster;
mod errors;
mod options;
mod program;
mod session;
mod threads;

use pyo3::prelude::*;

#[pymodule]
mod _attnd {
    #[pymodule_export]
    use crate::attention::attend;
    #[pymodule_export]
    use crate::cluster::Coordinator;
    #[pymodule_export]
    use crate::program::run_program;
    #[pymodule_export]
    use crate::session::OpenSession;
    #[pymodule_export]
    use crate::threads::{Interrupt, num_threads, set_num_threads};
}
