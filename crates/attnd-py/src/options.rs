//! The keyword arguments of a call, as `python/attnd/_options.py` hands them over, as the client takes them.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use attnd_client::{
    Alibi, AttendOptions, Causal, DenseTensor, EmptyRow, Mask, Normaliser, Numbering, OutputsParts, PerBatch,
    Positions, Rectangle, Stage, Window, WorkerChoice, documents_by_id,
};
use attnd_kernel::{Csr, Relative, Score, Shift, Swin, Tensor};
use bytes::Bytes;
use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::Dense;
use crate::errors::value_error;

/// What is there differs from the default; names are those of `attnd.attention`.
#[derive(Debug, Default, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options<'py> {
    #[pyo3(default)]
    scale: Option<f32>,
    #[pyo3(default)]
    causal: Option<String>,
    #[pyo3(default)]
    attn_mask: Option<Dense<'py>>,
    #[pyo3(default)]
    bias: Option<Dense<'py>>,
    /// Keys before and behind; none is any number.
    #[pyo3(default)]
    window: Option<(Option<usize>, Option<usize>)>,
    #[pyo3(default)]
    chunk: Option<NonZeroUsize>,
    #[pyo3(default)]
    prefix: Option<Lengths>,
    #[pyo3(default)]
    key_begin: Option<Lengths>,
    #[pyo3(default)]
    key_end: Option<Lengths>,
    #[pyo3(default)]
    query_end: Option<Lengths>,
    #[pyo3(default)]
    offset: Option<Offsets>,
    /// Of keys, and of queries where they have others: `[tokens]` or `[batch, tokens]`.
    #[pyo3(default)]
    documents: Option<(Integers<'py>, Option<Integers<'py>>)>,
    /// `indptr`, `indices`, `(queries, keys)` of a block.
    #[pyo3(default)]
    csr: Option<(Integers<'py>, Integers<'py>, (usize, usize))>,
    #[pyo3(default)]
    softcap: Option<f32>,
    /// Slopes, unless they are those that were published, and whether the bias counts from the first key.
    #[pyo3(default)]
    alibi: Option<(Option<Vec<f32>>, bool)>,
    /// Table, greatest distance, and whether keys behind a query have buckets of their own.
    #[pyo3(default)]
    relative: Option<(Numbers<'py>, u32, bool)>,
    /// Table, window, and regions with what is added between them.
    #[pyo3(default)]
    swin: Option<(Numbers<'py>, (usize, usize), Option<Regions<'py>>)>,
    #[pyo3(default)]
    score: Option<(String, Vec<(String, Numbers<'py>)>)>,
    #[pyo3(default)]
    previous: Option<Dense<'py>>,
    #[pyo3(default)]
    sigmoid_bias: Option<f32>,
    #[pyo3(default)]
    sinks: Option<Vec<f32>>,
    #[pyo3(default)]
    empty_row: Option<String>,
    /// Always there: a struct of defaults alone can't be derived.
    allow_non_finite: bool,
    #[pyo3(default)]
    forbid_empty_rows: bool,
    #[pyo3(default)]
    outputs: Option<Wanted>,
    #[pyo3(default)]
    workers: Option<usize>,
    /// Seconds.
    #[pyo3(default)]
    timeout: Option<f64>,
}

type Integers<'py> = PyReadonlyArrayDyn<'py, i64>;
type Numbers<'py> = PyReadonlyArrayDyn<'py, f32>;
/// Of each token, and what is added between tokens of different ones.
type Regions<'py> = (Integers<'py>, f32);
/// Where something begins and ends.
type Span = (usize, usize);

/// The value that a word stands for.
fn word<T: Copy>(name: &str, text: &str, words: &[(&str, T)]) -> PyResult<T> {
    words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        value_error(format!("{name} is {text:?}, expected {}", known.join(", ")))
    })
}

fn stage(text: &str) -> PyResult<Stage> {
    let words = [
        ("weights", Stage::Weights),
        ("raw", Stage::Raw),
        ("capped", Stage::Capped),
        ("masked", Stage::Masked),
    ];
    word("stage", text, &words)
}

/// A number for all of the batch, or one for each of its elements.
#[derive(Debug, FromPyObject)]
enum Lengths {
    Same(usize),
    Each(Vec<usize>),
}

#[derive(Debug, FromPyObject)]
enum Offsets {
    Same(i64),
    Each(Vec<i64>),
}

impl From<Lengths> for PerBatch<usize> {
    fn from(lengths: Lengths) -> Self {
        match lengths {
            Lengths::Same(length) => Self::Same(length),
            Lengths::Each(lengths) => Self::Each(lengths.into()),
        }
    }
}

impl From<Offsets> for PerBatch<i64> {
    fn from(offsets: Offsets) -> Self {
        match offsets {
            Offsets::Same(offset) => Self::Same(offset),
            Offsets::Each(offsets) => Self::Each(offsets.into()),
        }
    }
}

/// What is told beside the context.
#[derive(Debug, Default, FromPyObject)]
#[pyo3(from_item_all)]
struct Wanted {
    #[pyo3(default)]
    stages: Vec<String>,
    /// Stage, and begin and end of heads, queries and keys.
    #[pyo3(default)]
    rectangles: Vec<(String, Span, Span, Span)>,
    /// Always there, as above.
    top_k: usize,
    #[pyo3(default)]
    mass_block: Option<NonZeroUsize>,
    #[pyo3(default)]
    entropy: bool,
    #[pyo3(default)]
    distance: bool,
    #[pyo3(default)]
    max_score: bool,
    #[pyo3(default)]
    heatmap: Option<(usize, usize)>,
    #[pyo3(default)]
    heads: Option<Span>,
}

impl Wanted {
    fn into_parts(self) -> PyResult<OutputsParts> {
        let Self { stages, rectangles, top_k, mass_block, entropy, distance, max_score, heatmap, heads } =
            self;
        let rectangle = |(of, heads, tokens, keys): (String, _, _, _)| -> PyResult<Rectangle> {
            let range = |(begin, end): Span| begin..end;
            let stage = stage(&of)?;
            Ok(Rectangle { stage, heads: range(heads), tokens: range(tokens), keys: range(keys) })
        };
        Ok(OutputsParts {
            stages: stages.iter().map(|of| stage(of)).collect::<PyResult<_>>()?,
            rectangles: rectangles.into_iter().map(rectangle).collect::<PyResult<_>>()?,
            top_k,
            mass_block,
            entropy,
            distance,
            max_score,
            heatmap,
            heads: heads.map(|(begin, end)| begin..end),
        })
    }
}

impl<'py> Options<'py> {
    /// Those of a dict.
    ///
    /// # Errors
    /// `ValueError` that names the option which can't be what it is.
    pub(crate) fn of(options: &Bound<'py, PyDict>) -> PyResult<Self> {
        options.extract().map_err(|error: PyErr| {
            let py = options.py();
            let text = error.value(py).to_string();
            let option = text.rsplit('.').next().unwrap_or_default().to_owned();
            let mut why = error;
            while let Some(cause) = why.cause(py) {
                why = cause;
            }
            value_error(format!("{option}: {}", why.value(py)))
        })
    }

    /// What is to be computed.
    ///
    /// # Errors
    /// `ValueError` for tables and lists that make no sense by themselves. What makes none for the operands shows with these.
    pub(crate) fn into_attend(self) -> PyResult<AttendOptions> {
        let refused = |error: &dyn std::fmt::Display| value_error(error.to_string());
        let alignments = [("top-left", Causal::TopLeft), ("bottom-right", Causal::BottomRight)];
        let causal = self.causal.map(|align| word("is_causal", &align, &alignments)).transpose()?;
        let causal = causal.unwrap_or(Causal::None);
        let rows = [("zero", EmptyRow::Zero), ("nan", EmptyRow::Nan), ("uniform", EmptyRow::Uniform)];
        let empty_row = self.empty_row.map(|row| word("empty_row", &row, &rows)).transpose()?;
        let window = self.window.map(|(left, right)| Window { left, right });
        let documents =
            self.documents.map(|(keys, queries)| documents(&keys, queries.as_ref())).transpose()?;
        let mask = Mask {
            positions: self.offset.map(|offset| Positions::Offset(offset.into())),
            window: window.unwrap_or_default(),
            chunk: self.chunk,
            prefix: self.prefix.map(Into::into),
            key_begin: self.key_begin.map(Into::into),
            key_end: self.key_end.map(Into::into),
            query_end: self.query_end.map(Into::into),
            documents: documents.map(Arc::new),
            ..Mask::default()
        };
        // With an offset, that is where queries stand.
        let (causal, mask) = match mask.positions {
            Some(_) => (Causal::None, Mask { causal: causal != Causal::None, ..mask }),
            None => (causal, mask),
        };
        let score = match self.score {
            None => Score::default(),
            Some((name, parameters)) => {
                let parameters =
                    parameters.iter().map(|(name, array)| parameter(name, array)).collect::<PyResult<_>>()?;
                Score::new(&name, parameters).map_err(|error| refused(&error))?
            }
        };
        let relative = self.relative.map(|(table, max_distance, bidirectional)| {
            let buckets = *table.shape().first().unwrap_or(&0);
            let relative = Relative::new(elements("relative", &table)?, buckets, max_distance, bidirectional);
            relative.map_err(|error| refused(&error))
        });
        let timeout = self.timeout.map(|seconds| {
            Duration::try_from_secs_f64(seconds)
                .map_err(|error| value_error(format!("timeout is {seconds}: {error}")))
        });
        Ok(AttendOptions {
            score,
            previous: self.previous.map(|previous| dense("previous", &previous)).transpose()?,
            scale: self.scale,
            softcap: self.softcap,
            alibi: self.alibi.map(|(slopes, by_key)| Alibi { slopes: slopes.map(Into::into), by_key }),
            relative: relative.transpose()?,
            swin: self.swin.map(|(table, window, shift)| swin(&table, window, shift)).transpose()?,
            causal,
            mask,
            dense_mask: self.attn_mask.map(|mask| dense("attn_mask", &mask)).transpose()?,
            csr: self.csr.map(|(row_ptr, columns, block)| csr(&row_ptr, &columns, block)).transpose()?,
            dense_bias: self.bias.map(|bias| dense("bias", &bias)).transpose()?,
            normaliser: self.sigmoid_bias.map_or(Normaliser::Softmax, |bias| Normaliser::Sigmoid { bias }),
            sinks: self.sinks.map(Into::into),
            empty_row: empty_row.unwrap_or(EmptyRow::Zero),
            outputs: self.outputs.map(Wanted::into_parts).transpose()?.unwrap_or_default(),
            allow_non_finite: self.allow_non_finite,
            forbid_empty_rows: self.forbid_empty_rows,
            source: None,
            workers: self.workers.map_or(WorkerChoice::Auto, WorkerChoice::Exactly),
            timeout: timeout.transpose()?,
        })
    }
}

fn elements(name: &str, array: &Numbers<'_>) -> PyResult<Arc<[f32]>> {
    array.as_slice().map(Into::into).map_err(|_strided| value_error(format!("{name} is not contiguous")))
}

fn integers<'a>(name: &str, array: &'a Integers<'_>) -> PyResult<&'a [i64]> {
    array.as_slice().map_err(|_strided| value_error(format!("{name} is not contiguous")))
}

fn parameter(name: &str, array: &Numbers<'_>) -> PyResult<Tensor> {
    // numpy has numbers without dimensions, score functions don't.
    let shape = if array.shape().is_empty() { vec![1] } else { array.shape().to_vec() };
    Ok(Tensor { name: name.to_owned(), shape, values: elements(name, array)? })
}

/// `[batch, heads, queries, keys]`, of which leading dimensions may be absent.
fn dense(name: &str, array: &Dense<'_>) -> PyResult<DenseTensor> {
    let given = array.shape();
    let mut shape = [1; 4];
    let Some(absent) = shape.len().checked_sub(given.len()).filter(|_| !given.is_empty()) else {
        return Err(value_error(format!(
            "{name} has shape {given:?}, expected [batch, heads, queries, keys]"
        )));
    };
    shape[absent..].copy_from_slice(given);
    Ok(DenseTensor { element: array.element(), shape, bytes: Bytes::copy_from_slice(array.bytes(name)?) })
}

/// Tokens of `[tokens]` or `[batch, tokens]`.
fn tokens(name: &str, array: &Integers<'_>) -> PyResult<usize> {
    match array.shape() {
        [tokens] | [_, tokens] => Ok(*tokens),
        shape => {
            Err(value_error(format!("{name} has shape {shape:?}, expected [tokens] or [batch, tokens]")))
        }
    }
}

fn documents(keys: &Integers<'_>, queries: Option<&Integers<'_>>) -> PyResult<attnd_client::Documents> {
    let ids = |name, array| -> PyResult<_> { Ok((integers(name, array)?, tokens(name, array)?)) };
    let keys = ids("documents", keys)?;
    let queries = queries.map(|queries| ids("query_documents", queries)).transpose()?;
    documents_by_id(keys, queries).map_err(|error| value_error(error.to_string()))
}

fn csr(row_ptr: &Integers<'_>, columns: &Integers<'_>, block: (usize, usize)) -> PyResult<Csr> {
    let unsigned = |name: &str, values: &[i64]| -> PyResult<Arc<[u32]>> {
        let number = |(at, value): (usize, &i64)| {
            let text = || format!("{name}[{at}] is {value}, not 0 to {}", u32::MAX);
            u32::try_from(*value).map_err(|_error| value_error(text()))
        };
        values.iter().enumerate().map(number).collect()
    };
    let layouts = match row_ptr.shape() {
        [_] => 1,
        [layouts, _] => *layouts,
        shape => {
            let text = format!("csr indptr has shape {shape:?}, expected [rows+1] or [layouts, rows+1]");
            return Err(value_error(text));
        }
    };
    let (row_ptr, columns) = (integers("csr indptr", row_ptr)?, integers("csr indices", columns)?);
    let csr = Csr::new(block, layouts, unsigned("csr indptr", row_ptr)?, unsigned("csr indices", columns)?);
    csr.map_err(|error| value_error(error.to_string()))
}

fn swin(table: &Numbers<'_>, (height, width): (usize, usize), shift: Option<Regions<'_>>) -> PyResult<Swin> {
    let shift = match shift {
        None => None,
        Some((regions, between)) => {
            let regions = Numbering::default().of(integers("swin regions", &regions)?);
            Some(Shift { regions: regions.into(), between })
        }
    };
    Ok(Swin { height, width, table: elements("swin", table)?, shift })
}
