//! A coordinator, as Python calls it.

use attnd_client::{Client, Operands};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::Floats;
use crate::attention::{shape, told};
use crate::errors::{Raised, value_error};
use crate::options::Options;
use crate::threads;

/// A connection to a coordinator; it is made with the first call, and again whenever it was lost.
#[pyclass(frozen, module = "attnd._attnd")]
#[derive(Debug)]
pub(crate) struct Coordinator {
    client: Client,
}

#[pymethods]
impl Coordinator {
    #[new]
    fn new(url: &str) -> PyResult<Self> {
        let refused = |error| value_error(format!("url is {url:?}, expected http://HOST:PORT: {error}"));
        Ok(Self { client: Client::connect(url).map_err(refused)? })
    }

    /// As `attend` in this process, on the cluster.
    #[pyo3(signature = (q, k, v, options, value_dim=None))]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        q: Floats<'py>,
        k: Floats<'py>,
        v: Option<Floats<'py>>,
        options: &Bound<'py, PyDict>,
        value_dim: Option<usize>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let options = Options::of(options)?.into_attend()?;
        let shape = shape(&q, &k, v.as_ref(), value_dim, &options)?;
        let (dtype, q, k) = (q.dtype(), q.bytes("q")?, k.bytes("k")?);
        let v = v.as_ref().map_or(Ok(&[][..]), |v| v.bytes("v"))?;
        // Messages outlive this call's borrow of the arrays.
        let [q, k, v] = py.detach(|| [q, k, v].map(Bytes::copy_from_slice));
        let operands = Operands { shape, dtype, q, k, v };
        let attended = threads::wait(py, self.client.attend(&operands, &options, &mut |_progress| {}))?;
        told(py, attended.map_err(Raised::from)?, &shape, &options)
    }

    /// The workers that have joined: of each its id and its state.
    fn workers(&self, py: Python<'_>) -> PyResult<Vec<(String, String)>> {
        let status = threads::wait(py, self.client.status())?.map_err(Raised::from)?;
        Ok(status
            .workers
            .into_iter()
            .map(|worker| (worker.worker.to_string(), worker.state.to_string()))
            .collect())
    }
}
