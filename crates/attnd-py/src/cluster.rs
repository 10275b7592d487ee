//! A coordinator, as Python calls it.

use std::sync::{Arc, Mutex, PoisonError};

use attnd_client::session::Sessions;
use attnd_client::{Client, Operands};
use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::attention::{Arrays, Call, told};
use crate::errors::{Raised, value_error};
use crate::session::{BatchedStep, OpenSession, Spec, close_unnamed, step_batch};
use crate::threads;

/// A coordinator at some URL. What connects to it is made with the first call, and again whenever it was lost.
#[pyclass(frozen, module = "attnd._attnd")]
#[derive(Debug)]
pub(crate) struct Coordinator {
    url: String,
    connection: Mutex<Connection>,
}

/// What connects, on the threads of one process: a forked child makes its own.
#[derive(Debug)]
struct Connection {
    process: u32,
    client: Arc<Client>,
    /// They share one stream, which begins with the first of them.
    sessions: Option<Sessions>,
}

impl Connection {
    fn new(url: &str) -> PyResult<Self> {
        let refused = |error| value_error(format!("url is {url:?}, expected http://HOST:PORT: {error}"));
        let client = Arc::new(Client::connect(url).map_err(refused)?);
        Ok(Self { process: std::process::id(), client, sessions: None })
    }
}

impl Coordinator {
    /// Lends the connection of this process.
    fn connected<T>(&self, lend: impl FnOnce(&mut Connection) -> T) -> PyResult<T> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.process != std::process::id() {
            // The parent's threads, which aren't here, would be asked to end it.
            std::mem::forget(std::mem::replace(&mut *connection, Connection::new(&self.url)?));
        }
        Ok(lend(&mut connection))
    }

    fn client(&self) -> PyResult<Arc<Client>> {
        self.connected(|connection| Arc::clone(&connection.client))
    }

    fn sessions(&self, py: Python<'_>) -> PyResult<Sessions> {
        if let Some(sessions) = self.connected(|connection| connection.sessions.clone())? {
            return Ok(sessions);
        }
        let client = self.client()?;
        // On the threads of the network, where the stream begins.
        let sessions = threads::wait(py, async { client.sessions() })?;
        self.connected(|connection| connection.sessions.get_or_insert(sessions).clone())
    }
}

#[pymethods]
impl Coordinator {
    #[new]
    fn new(url: String) -> PyResult<Self> {
        let connection = Mutex::new(Connection::new(&url)?);
        Ok(Self { url, connection })
    }

    /// As `attend` in this process, on the cluster.
    fn attend<'py>(
        &self,
        py: Python<'py>,
        arrays: Arrays<'py>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let call = Call::new(arrays, options)?;
        let (shape, dtype) = (call.shape, call.dtype());
        let bytes = call.bytes()?;
        // Messages outlive this call's borrow of the arrays.
        let [q, k, v] = py.detach(|| bytes.map(Bytes::copy_from_slice));
        let (client, operands) = (self.client()?, Operands { shape, dtype, q, k, v });
        let attended = threads::wait(py, client.attend(&operands, &call.options, &mut |_progress| {}))?;
        told(py, attended.map_err(Raised::from)?, &shape, &call.options)
    }

    /// The workers that have joined: of each its id and its state.
    fn workers(&self, py: Python<'_>) -> PyResult<Vec<(String, String)>> {
        let status = threads::wait(py, self.client()?.status())?.map_err(Raised::from)?;
        Ok(status
            .workers
            .into_iter()
            .map(|worker| (worker.worker.to_string(), worker.state.to_string()))
            .collect())
    }

    /// Opens a session, or goes on with the one of that name, as its writer.
    #[pyo3(signature = (name, spec))]
    fn open(&self, py: Python<'_>, name: Option<String>, spec: Spec) -> PyResult<OpenSession> {
        let is_named = name.is_some();
        let (sessions, open) = (self.sessions(py)?, spec.into_open(name)?);
        // One that nobody has the name of would stay until its time is over.
        let undo = |opened| close_unnamed(opened, is_named);
        let session = threads::wait_or_undo(py, sessions.open(open), undo)?;
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
