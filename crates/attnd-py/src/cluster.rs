//! A coordinator, as Python calls it.

use std::sync::{Mutex, PoisonError};

use attnd_client::session::Sessions;
use attnd_client::{Client, Operands};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::Floats;
use crate::attention::{shape, told};
use crate::errors::{Raised, value_error};
use crate::options::Options;
use crate::session::{BatchedStep, OpenSession, Spec, step_batch};
use crate::threads;

/// A connection to a coordinator; it is made with the first call, and again whenever it was lost.
#[pyclass(frozen, module = "attnd._attnd")]
#[derive(Debug)]
pub(crate) struct Coordinator {
    client: Client,
    /// Of the process that made them: their stream has its threads.
    sessions: Mutex<Option<(u32, Sessions)>>,
}

impl Coordinator {
    /// The sessions, which share one stream.
    fn sessions(&self, py: Python<'_>) -> PyResult<Sessions> {
        let process = std::process::id();
        let known = |here: &Option<(u32, Sessions)>| {
            here.as_ref().filter(|(of, _)| *of == process).map(|(_, sessions)| sessions.clone())
        };
        if let Some(sessions) = known(&self.sessions.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(sessions);
        }
        // On the threads of the network, where the stream begins.
        let sessions = threads::wait(py, async { self.client.sessions() })?;
        let mut here = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(known(&here).unwrap_or_else(|| here.insert((process, sessions)).1.clone()))
    }
}

#[pymethods]
impl Coordinator {
    #[new]
    fn new(url: &str) -> PyResult<Self> {
        let refused = |error| value_error(format!("url is {url:?}, expected http://HOST:PORT: {error}"));
        Ok(Self { client: Client::connect(url).map_err(refused)?, sessions: Mutex::new(None) })
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

    /// Opens a session, or goes on with the one of that name, as its writer.
    #[pyo3(signature = (name, spec))]
    fn open(&self, py: Python<'_>, name: Option<String>, spec: Spec) -> PyResult<OpenSession> {
        let (sessions, open) = (self.sessions(py)?, spec.into_open(name)?);
        let session = threads::wait(py, sessions.open(open))?;
        Ok(OpenSession::new(session.map_err(Raised::from)?))
    }

    /// Goes on with a session as its writer, or looks at one that somebody else may write.
    fn attach(&self, py: Python<'_>, name: &str, write: bool) -> PyResult<OpenSession> {
        let sessions = self.sessions(py)?;
        let session = threads::wait(py, async {
            if write { sessions.attach(name).await } else { sessions.read(name).await }
        })?;
        Ok(OpenSession::new(session.map_err(Raised::from)?))
    }

    /// The names of all sessions.
    fn list_sessions(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let names = threads::wait(py, self.sessions(py)?.list())?.map_err(Raised::from)?;
        Ok(names.into_iter().map(|name| name.to_string()).collect())
    }

    /// Ends a session, and whether it had ended before.
    fn close_session(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        Ok(threads::wait(py, self.sessions(py)?.close(name))?.map_err(Raised::from)?)
    }

    /// Steps of several sessions, in one message where there is room for them. Each gives a dict, or the exception that it would raise.
    fn step_batch<'py>(
        &self,
        py: Python<'py>,
        steps: Vec<BatchedStep<'py>>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        step_batch(py, &self.sessions(py)?, steps)
    }
}
