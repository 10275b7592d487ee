//! Sessions: keys and values that stay on the workers.

use std::time::Duration;

use attnd_client::session::{AppendOptions, BatchStep, OpenOptions, QueryOptions, Session, SessionAttended};
use attnd_client::{ClientError, Dtype, SessionSpec, Storage};
use bytes::Bytes;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use tokio::sync::{Mutex, MutexGuard};

use crate::arrays::{Floats, array};
use crate::errors::{Raised, value_error};
use crate::options::Options;
use crate::threads;

/// What a session is, as `Cluster.session` hands it over.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Spec {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: String,
    storage: Option<String>,
    replicas: usize,
    acks: usize,
    ttl: Option<f64>,
    max_tokens: Option<usize>,
    allow_same_host: bool,
    value_is_key_prefix: bool,
}

impl Spec {
    /// The session to open.
    ///
    /// # Errors
    /// `ValueError` for a type that isn't known.
    pub(crate) fn into_open(self, name: Option<String>) -> PyResult<OpenOptions> {
        let dtype = named("dtype", &self.dtype, &[Dtype::F32, Dtype::F16, Dtype::Bf16])?;
        let storage = match &self.storage {
            None => Storage::from(dtype),
            Some(word) => named("storage", word, &[Storage::from(dtype), Storage::Int8, Storage::Int4])?,
        };
        let open = OpenOptions::new(self.layers, self.heads, self.kv_heads, self.head_dim, dtype);
        let ttl = self.ttl.map(Duration::try_from_secs_f64).transpose();
        let seconds = self.ttl.unwrap_or_default();
        let ttl = ttl.map_err(|error| value_error(format!("ttl is {seconds}: {error}")))?;
        let spec = SessionSpec {
            value_dim: self.value_dim,
            storage,
            replicas: self.replicas,
            acks: self.acks,
            ttl: ttl.unwrap_or(open.spec.ttl),
            max_tokens: self.max_tokens.unwrap_or(open.spec.max_tokens),
            allow_same_host: self.allow_same_host,
            value_is_key_prefix: self.value_is_key_prefix,
            ..open.spec
        };
        Ok(OpenOptions { name, spec })
    }
}

fn named<T: Copy + std::fmt::Display>(what: &str, word: &str, all: &[T]) -> PyResult<T> {
    let found = all.iter().find(|one| one.to_string() == word).copied();
    found.ok_or_else(|| {
        let all: Vec<String> = all.iter().map(ToString::to_string).collect();
        value_error(format!("{what} is {word:?}, expected {}", all.join(", ")))
    })
}

/// A session, of which this process is the writer unless it only looks at it.
#[pyclass(frozen, module = "attnd._attnd")]
#[derive(Debug)]
pub(crate) struct OpenSession {
    /// Its stream has the threads of this one.
    process: u32,
    session: Mutex<Session>,
    spec: SessionSpec,
    #[pyo3(get)]
    name: String,
}

impl OpenSession {
    pub(crate) fn new(session: Session) -> Self {
        let (spec, name) = (session.spec().clone(), session.name().to_string());
        Self { process: std::process::id(), session: Mutex::new(session), spec, name }
    }

    /// The session, of the process that opened it.
    ///
    /// # Errors
    /// `RuntimeError` in another one.
    fn session(&self) -> PyResult<&Mutex<Session>> {
        let (here, there) = (std::process::id(), self.process);
        if here != there {
            let name = &self.name;
            let text = format!(
                "session {name} was opened by process {there}, this is {here}: cluster.attach({name:?})"
            );
            return Err(PyRuntimeError::new_err(text));
        }
        Ok(&self.session)
    }

    /// The bytes of rows `[heads, tokens, dim]`, which have these heads and this dimension, and how many tokens there are.
    fn rows(&self, name: &str, rows: &Floats<'_>, heads: usize, dim: usize) -> PyResult<(Bytes, usize)> {
        let tokens = match *rows.shape() {
            [of_heads, tokens, of_dim] if (of_heads, of_dim) == (heads, dim) => tokens,
            _ => {
                let shape = rows.shape();
                return Err(value_error(format!(
                    "{name} has shape {shape:?}, expected [{heads}, tokens, {dim}]"
                )));
            }
        };
        if rows.dtype() != self.spec.dtype {
            let text = format!("{name} is {}, the session has {}", rows.dtype(), self.spec.dtype);
            return Err(value_error(text));
        }
        Ok((Bytes::copy_from_slice(rows.bytes(name)?), tokens))
    }

    /// K and V of as many tokens. V is missing where values are parts of keys.
    fn keys_and_values(&self, k: &Floats<'_>, v: Option<&Floats<'_>>) -> PyResult<(Bytes, Bytes)> {
        let (k, tokens) = self.rows("k", k, self.spec.kv_heads, self.spec.head_dim)?;
        let v = match (v, self.spec.value_is_key_prefix) {
            (Some(v), false) => {
                let (v, of_values) = self.rows("v", v, self.spec.kv_heads, self.spec.value_dim)?;
                if of_values != tokens {
                    return Err(value_error(format!(
                        "tokens of k is {tokens}, of v {of_values}: they must be equal"
                    )));
                }
                v
            }
            (None, true) => Bytes::new(),
            (Some(_), true) => {
                return Err(value_error("v is given, and values are parts of keys".to_owned()));
            }
            (None, false) => return Err(value_error("v is missing".to_owned())),
        };
        Ok((k, v))
    }

    fn queries(&self, q: &Floats<'_>) -> PyResult<(Bytes, usize)> {
        self.rows("q", q, self.spec.heads, self.spec.head_dim)
    }

    /// The answer as a dict of arrays.
    fn told<'py>(
        &self,
        py: Python<'py>,
        attended: SessionAttended,
        tokens: usize,
    ) -> PyResult<Bound<'py, PyDict>> {
        let told = PyDict::new(py);
        let (heads, value_dim) = (self.spec.heads, self.spec.value_dim);
        told.set_item("context", array(py, attended.context, &[heads, tokens, value_dim])?)?;
        told.set_item("lse", array(py, attended.lse, &[heads, tokens])?)?;
        told.set_item("at_len", attended.at_len)?;
        told.set_item("kernel_id", attended.kernel_id)?;
        Ok(told)
    }
}

fn query_options(options: &Bound<'_, PyDict>, at_len: Option<u64>) -> PyResult<QueryOptions> {
    Ok(QueryOptions { attend: Options::of(options)?.into_attend()?, at_len, ..QueryOptions::default() })
}

#[pymethods]
impl OpenSession {
    /// Query heads.
    #[getter]
    fn heads(&self) -> usize {
        self.spec.heads
    }

    /// Tokens of a layer, as far as this side was told.
    fn tokens(&self, py: Python<'_>, layer: usize) -> PyResult<u64> {
        if layer >= self.spec.layers {
            return Err(value_error(format!("layer is {layer}, the session has {}", self.spec.layers)));
        }
        let session = self.session()?;
        threads::wait(py, async { session.lock().await.len(layer) })
    }

    /// Appends K and V to a layer, all of their tokens or none; how many there are then.
    #[pyo3(signature = (layer, k, v, allow_non_finite=false, timeout=None))]
    fn append(
        &self,
        py: Python<'_>,
        layer: usize,
        k: Floats<'_>,
        v: Option<Floats<'_>>,
        allow_non_finite: bool,
        timeout: Option<f64>,
    ) -> PyResult<u64> {
        let (k, v) = self.keys_and_values(&k, v.as_ref())?;
        let timeout = timeout.map(Duration::try_from_secs_f64).transpose();
        let timeout = timeout.map_err(|error| value_error(format!("timeout: {error}")))?;
        let options = AppendOptions { allow_non_finite, timeout };
        let session = self.session()?;
        let appended =
            threads::wait(py, async { session.lock().await.append_with(layer, k, v, &options).await })?;
        Ok(appended.map_err(Raised::from)?.len)
    }

    /// Attends over a layer.
    #[pyo3(signature = (layer, q, options, at_len=None))]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        q: Floats<'py>,
        options: &Bound<'py, PyDict>,
        at_len: Option<u64>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let options = query_options(options, at_len)?;
        let (q, tokens) = self.queries(&q)?;
        let session = self.session()?;
        let attended = threads::wait(py, async { session.lock().await.attend(layer, q, &options).await })?;
        self.told(py, attended.map_err(Raised::from)?, tokens)
    }

    /// Appends K and V, and attends over all tokens with them.
    fn step<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        k: Floats<'py>,
        v: Option<Floats<'py>>,
        q: Floats<'py>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let options = query_options(options, None)?;
        let ((k, v), (q, tokens)) = (self.keys_and_values(&k, v.as_ref())?, self.queries(&q)?);
        let session = self.session()?;
        let stepped = threads::wait(py, async { session.lock().await.step(layer, k, v, q, &options).await })?;
        self.told(py, stepped.map_err(Raised::from)?.attended, tokens)
    }

    /// Another session with the same tokens, which share their memory until one of them changes.
    #[pyo3(signature = (name=None))]
    fn fork(&self, py: Python<'_>, name: Option<&str>) -> PyResult<Self> {
        let (session, is_named) = (self.session()?, name.is_some());
        let fork = async { session.lock().await.fork(name).await };
        let child = threads::wait_or_undo(py, fork, |child| close_unnamed(child, is_named))?;
        Ok(Self::new(child.map_err(Raised::from)?))
    }

    /// Cuts all layers down to `len` tokens.
    fn truncate(&self, py: Python<'_>, len: u64) -> PyResult<()> {
        let session = self.session()?;
        let cut = threads::wait(py, async { session.lock().await.truncate(len).await })?;
        Ok(cut.map_err(Raised::from)?)
    }

    /// Ends all appends and cuts.
    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        let session = self.session()?;
        let sealed = threads::wait(py, async { session.lock().await.seal().await })?;
        Ok(sealed.map_err(Raised::from)?)
    }

    /// What it is and has.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let session = self.session()?;
        let described = threads::wait(py, async { session.lock().await.describe().await })?;
        let described = described.map_err(Raised::from)?;
        let told = PyDict::new(py);
        told.set_item("name", described.name.to_string())?;
        told.set_item("tokens", described.tokens)?;
        told.set_item("generation", described.generation)?;
        told.set_item("sealed", described.sealed)?;
        told.set_item("ttl_left", described.ttl_left.as_secs_f64())?;
        let spec = &described.spec;
        for (name, number) in [
            ("layers", spec.layers),
            ("heads", spec.heads),
            ("kv_heads", spec.kv_heads),
            ("head_dim", spec.head_dim),
            ("value_dim", spec.value_dim),
            ("replicas", spec.replicas),
            ("acks", spec.acks),
            ("max_tokens", spec.max_tokens),
        ] {
            told.set_item(name, number)?;
        }
        told.set_item("dtype", spec.dtype.to_string())?;
        told.set_item("storage", spec.storage.to_string())?;
        Ok(told)
    }
}

/// Steps of several sessions of one coordinator, in one message where there is room for them: of each session, layer, K, V, Q and
/// options. What became of each is a dict as that of a step, or the exception that it would have raised.
pub(crate) fn step_batch<'py>(
    py: Python<'py>,
    sessions: &attnd_client::session::Sessions,
    steps: Vec<BatchedStep<'py>>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let mut ready = Vec::with_capacity(steps.len());
    for (session, layer, k, v, q, options) in &steps {
        let of = session.get();
        let (k, v) = of.keys_and_values(k, v.as_ref())?;
        let (q, tokens) = of.queries(q)?;
        ready.push((of, of.session()?, *layer, k, v, q, tokens, query_options(options, None)?));
    }
    // In one order, whatever other threads step.
    let address = |at: &usize| std::ptr::from_ref(ready[*at].0).addr();
    let mut order: Vec<usize> = (0..ready.len()).collect();
    order.sort_by_key(address);
    if let Some(pair) = order.windows(2).find(|pair| address(&pair[0]) == address(&pair[1])) {
        let text =
            format!("steps {} and {} are of one session: each of a batch has its own", pair[0], pair[1]);
        return Err(value_error(text));
    }
    let stepped = threads::wait(py, async {
        let mut locked: Vec<(usize, MutexGuard<'_, Session>)> = Vec::with_capacity(ready.len());
        for at in order {
            locked.push((at, ready[at].1.lock().await));
        }
        locked.sort_by_key(|(at, _)| *at);
        let mut batch: Vec<BatchStep<'_>> = locked
            .iter_mut()
            .zip(&ready)
            .map(|((_, session), (_, _, layer, k, v, q, _, options))| BatchStep {
                session,
                layer: *layer,
                k: k.clone(),
                v: v.clone(),
                q: q.clone(),
                options,
            })
            .collect();
        sessions.step_batch(&mut batch).await
    })?;
    let mut told = Vec::with_capacity(stepped.len());
    for ((of, .., tokens, _), stepped) in ready.iter().zip(stepped) {
        told.push(match stepped {
            Ok(stepped) => of.told(py, stepped.attended, *tokens)?.into_any(),
            Err(error) => PyErr::from(Raised::from(error)).into_value(py).into_bound(py).into_any(),
        });
    }
    Ok(told)
}

/// Closes what was opened for somebody who is gone, unless it has a name by which it can be found.
pub(crate) async fn close_unnamed(opened: Result<Session, ClientError>, is_named: bool) {
    if let Ok(session) = opened
        && !is_named
    {
        // Where it isn't closed it ends with its time to live.
        session.close().await.ok();
    }
}

/// Session, layer, K, V, Q, options.
pub(crate) type BatchedStep<'py> =
    (Bound<'py, OpenSession>, usize, Floats<'py>, Option<Floats<'py>>, Floats<'py>, Bound<'py, PyDict>);
