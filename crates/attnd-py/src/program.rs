//! The program `attnd`, run by Python: `python -m attnd`, and the processes of a local cluster.

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::prelude::*;

/// Runs the program with these arguments, without its name, and gives its exit code. Processes that it starts are
/// `interpreter -m attnd`.
#[pyfunction]
pub(crate) fn run_program(py: Python<'_>, interpreter: PathBuf, arguments: Vec<OsString>) -> u8 {
    py.detach(|| {
        attnd::started_by(interpreter, vec!["-m".into(), "attnd".into()]);
        attnd::main(std::iter::once("attnd".into()).chain(arguments).collect())
    })
}
