//! One call: arrays and options in, context and what was wanted beside it out.

use std::sync::{Mutex, PoisonError};

use attnd_client::{
    AttendOptions, Attended, AttnShape, ClientError, Dims, Dtype, Inspected, LocalCall, OutputsParts,
};
use attnd_kernel::Kernels;
use attnd_node::in_process::{self, Tensors};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Floats, array};
use crate::errors::{Raised, value_error};
use crate::options::Options;
use crate::threads;

/// Q, K and V of a call, `[batch, heads, tokens, dim]`. Without V values are the first so many elements of keys.
#[derive(Debug, FromPyObject)]
pub(crate) struct Arrays<'py>(Floats<'py>, Floats<'py>, Option<Floats<'py>>, Option<usize>);

/// A call as Python hands it over, where its arrays and options make sense together.
#[derive(Debug)]
pub(crate) struct Call<'py> {
    arrays: Arrays<'py>,
    pub(crate) shape: AttnShape,
    pub(crate) options: AttendOptions,
}

impl<'py> Call<'py> {
    /// # Errors
    /// `ValueError` that says what doesn't.
    pub(crate) fn new(arrays: Arrays<'py>, options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let options = Options::of(options)?.into_attend()?;
        let Arrays(q, k, v, value_dim) = &arrays;
        let shape = shape(q, k, v.as_ref(), *value_dim, &options)?;
        Ok(Self { arrays, shape, options })
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.arrays.0.dtype()
    }

    /// The elements of Q, K and V, where they lie.
    ///
    /// # Errors
    /// `ValueError` for an array in another order.
    pub(crate) fn bytes(&self) -> PyResult<[&[u8]; 3]> {
        let Arrays(q, k, v, _) = &self.arrays;
        let v = v.as_ref().map_or(Ok(&[][..]), |v| v.bytes("v"))?;
        Ok([q.bytes("q")?, k.bytes("k")?, v])
    }
}

/// Computes attention in this process. Returns a dict of arrays: `context`, `lse`, and what was wanted beside them; `empty_rows` and
/// `kernel_id`.
#[pyfunction]
pub(crate) fn attend<'py>(
    py: Python<'py>,
    arrays: Arrays<'py>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyDict>> {
    let call = Call::new(arrays, options)?;
    let (shape, dtype, options) = (call.shape, call.dtype(), &call.options);
    let [q, k, v] = call.bytes()?;
    let work = |wanted: &(dyn Fn() -> bool + Sync)| {
        let LocalCall { begin, beside, answer } = LocalCall::new(shape, dtype, options)?;
        let answer = Mutex::new(answer);
        let take = |reply| answer.lock().unwrap_or_else(PoisonError::into_inner).take(reply);
        let kernels = Kernels::from_env()
            .map_err(|error| attnd_wire::Error::new(attnd_wire::Reason::Internal, error.to_string()))?;
        let tensors = Tensors { q, k, v, beside: &beside };
        let done = in_process::attend(kernels, &begin, tensors, wanted, &take)?;
        answer.into_inner().unwrap_or_else(PoisonError::into_inner).finish(done)
    };
    let is_small = options.outputs == OutputsParts::default() && in_process::is_small(&shape);
    let attended =
        if is_small { threads::compute_here(py, || work(&|| true))? } else { threads::compute(py, work)? };
    told(py, attended.map_err(Raised::from)?, &shape, options)
}

/// The dimensions of a call, where those of its arrays agree.
fn shape(
    q: &Floats<'_>,
    k: &Floats<'_>,
    v: Option<&Floats<'_>>,
    value_dim: Option<usize>,
    options: &AttendOptions,
) -> PyResult<AttnShape> {
    let dims = |name: &str, array: &Floats<'_>| match *array.shape() {
        [batch, heads, tokens, dim] => Ok([batch, heads, tokens, dim]),
        _ => {
            let text = format!("{name} has shape {:?}, expected [batch, heads, tokens, dim]", array.shape());
            Err(value_error(text))
        }
    };
    let [batch, heads, queries, query_dim] = dims("q", q)?;
    let [k_batch, kv_heads, keys, head_dim] = dims("k", k)?;
    let mut equal = vec![("batch", "q", batch, "k", k_batch)];
    if options.score.is_scaled_dot() {
        equal.push(("last dimension", "q", query_dim, "k", head_dim));
    }
    let value_dim = match (v, value_dim) {
        (Some(v), _) => {
            let [v_batch, v_heads, v_keys, value_dim] = dims("v", v)?;
            equal.push(("batch", "k", k_batch, "v", v_batch));
            equal.push(("heads", "k", kv_heads, "v", v_heads));
            equal.push(("tokens", "k", keys, "v", v_keys));
            value_dim
        }
        (None, Some(value_dim)) => value_dim,
        (None, None) => return Err(value_error("v is missing, and so is value_dim".to_owned())),
    };
    for (what, one, of_one, other, of_other) in equal {
        if of_one != of_other {
            let text = format!("{what} of {one} is {of_one}, of {other} {of_other}: they must be equal");
            return Err(value_error(text));
        }
    }
    for (name, array) in [("k", Some(k)), ("v", v)] {
        if let Some(other) = array.filter(|array| array.dtype() != q.dtype()) {
            let text = format!("q is {}, {name} is {}: they must be of one type", q.dtype(), other.dtype());
            return Err(value_error(text));
        }
    }
    let wide = |n: usize| n as u64;
    let dims = Dims {
        batch: wide(batch),
        heads: wide(heads),
        kv_heads: wide(kv_heads),
        queries: wide(queries),
        keys: wide(keys),
        head_dim: wide(head_dim),
        value_dim: wide(value_dim),
    };
    let refused = |error: attnd_wire::Error| PyErr::from(Raised::from(ClientError::from(error)));
    let mut shape = attnd_wire::refusal::shape(dims).map_err(refused)?;
    if query_dim != head_dim {
        shape = shape.with_query_dim(wide(query_dim)).map_err(|error| value_error(error.to_string()))?;
    }
    if v.is_none() {
        shape = shape.with_values_from_keys().map_err(|error| value_error(error.to_string()))?;
    }
    Ok(shape)
}

/// The answer as arrays.
pub(crate) fn told<'py>(
    py: Python<'py>,
    attended: Attended,
    shape: &AttnShape,
    options: &AttendOptions,
) -> PyResult<Bound<'py, PyDict>> {
    let (batch, heads, queries) = (shape.batch(), shape.n_heads(), shape.n_queries());
    let told = PyDict::new(py);
    told.set_item("context", array(py, attended.context, &[batch, heads, queries, shape.value_dim()])?)?;
    told.set_item("lse", array(py, attended.lse, &[batch, heads, queries])?)?;
    told.set_item("empty_rows", attended.empty_rows)?;
    told.set_item("kernel_id", attended.kernel_id)?;
    let outputs = &options.outputs;
    let Inspected {
        heads,
        elements,
        top_keys,
        top_weights,
        top_scores,
        mass,
        entropy,
        distance,
        max_score,
        heat,
    } = attended.inspected;
    let rows = [batch, heads.len(), queries];
    let of_rows = |last: usize| [&rows[..], &[last]].concat();
    let whole = outputs.stages.iter().map(|_| [heads.len(), queries, shape.n_keys()]);
    let parts = outputs.rectangles.iter().map(|part| [part.heads.len(), part.tokens.len(), part.keys.len()]);
    let mut matrices = Vec::with_capacity(elements.len());
    for (of_matrix, elements) in whole.chain(parts).zip(elements) {
        matrices.push(array(py, elements, &[&[batch][..], &of_matrix].concat())?);
    }
    told.set_item("elements", matrices)?;
    if outputs.top_k > 0 {
        told.set_item("top_keys", array(py, top_keys, &of_rows(outputs.top_k))?)?;
        told.set_item("top_weights", array(py, top_weights, &of_rows(outputs.top_k))?)?;
        told.set_item("top_scores", array(py, top_scores, &of_rows(outputs.top_k))?)?;
    }
    if let Some(block) = outputs.mass_block {
        told.set_item("mass", array(py, mass, &of_rows(shape.n_keys().div_ceil(block.get())))?)?;
    }
    for (name, is_wanted, numbers) in [
        ("entropy", outputs.entropy, entropy),
        ("distance", outputs.distance, distance),
        ("max_score", outputs.max_score, max_score),
    ] {
        if is_wanted {
            told.set_item(name, array(py, numbers, &rows)?)?;
        }
    }
    if let Some((rows, columns)) = outputs.heatmap {
        told.set_item("heatmap", array(py, heat, &[batch, heads.len(), rows, columns])?)?;
    }
    Ok(told)
}
