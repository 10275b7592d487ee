//! Score functions: what relates a query to a key, one file for each.
//!
//! A function transforms the rows of queries and of keys, each by itself, and a [`Reducer`] makes a score of two transformed rows.
//! Keys are transformed once and are resident so; queries are transformed call by call. What depends on a query and a key
//! together is in the reducer alone, of which there are few. [`FUNCTIONS`] lists the functions with their parameters; a new one
//! is a file and its line in that list, and nothing outside this crate knows one from another.

mod bound;
mod parameters;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

pub(crate) use self::bound::{Bound, PerHead};
pub use self::parameters::{Parameter, ScoreError, Symbol, Tensor};
use crate::buffer::OutOfMemory;
use crate::dispatch::Kernels;
use crate::float_env::FloatEnvironment;
use crate::general::reduce::{Filters, Reducer, flagged_exponentials};
use crate::shape::AttnShape;
use crate::storage::Storage;

/// Declares the files and lists their functions.
macro_rules! functions {
    ($($file:ident),+ $(,)?) => {
        $(mod $file;)+
        /// All score functions, by name.
        pub static FUNCTIONS: &[&Function] = &[$(&$file::FUNCTION),+];
    };
}

functions! {
    additive,
    biaffine,
    concat,
    cosine,
    distance,
    dot,
    gat,
    gatv2,
    general,
    keras_additive,
    keras_concat,
    location,
    location_aware,
    scaled_dot,
}

/// A kind of score.
#[derive(Debug)]
pub struct Function {
    /// What it is called in calls and refusals.
    pub name: &'static str,
    /// Its formula, and whose it is.
    pub summary: &'static str,
    /// What it is given beside queries and keys.
    pub parameters: &'static [Parameter],
    /// What scores are multiplied by where a call doesn't say.
    pub default_scale: DefaultScale,
    bind: fn(&Bound<'_>) -> Result<Arc<dyn ScoreFunction>, ScoreError>,
}

impl Function {
    /// The function called `name`.
    ///
    /// # Errors
    /// [`ScoreError::Unknown`] with the names that there are.
    pub fn named(name: &str) -> Result<&'static Self, ScoreError> {
        let found = FUNCTIONS.iter().find(|function| function.name == name);
        found.copied().ok_or_else(|| ScoreError::Unknown {
            name: name.to_owned(),
            known: FUNCTIONS.iter().map(|function| function.name).collect::<Vec<_>>().join(", "),
        })
    }

    /// What scores of calls of a shape are multiplied by where they don't say.
    pub fn default_scale(&self, shape: &AttnShape) -> f32 {
        match self.default_scale {
            DefaultScale::One => 1.0,
            DefaultScale::InverseSqrtKeyDim => (1.0 / (shape.head_dim() as f64).sqrt()) as f32,
        }
    }
}

/// A scale by its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultScale {
    /// 1.
    One,
    /// `1 / sqrt(head_dim)`, of keys as they are sent.
    InverseSqrtKeyDim,
}

/// A score function and its parameters, as somebody typed them; `Operator::new` decides whether they make sense.
#[derive(Clone, Debug)]
pub struct Score {
    function: &'static Function,
    parameters: Arc<[Tensor]>,
}

impl Score {
    /// The function called `name` with these parameters.
    ///
    /// # Errors
    /// [`ScoreError::Unknown`].
    pub fn new(name: &str, parameters: Vec<Tensor>) -> Result<Self, ScoreError> {
        Ok(Self { function: Function::named(name)?, parameters: parameters.into() })
    }

    /// Which function it is.
    pub fn function(&self) -> &'static Function {
        self.function
    }

    /// What it is given.
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// Whether this is the product that every node knows.
    pub fn is_scaled_dot(&self) -> bool {
        std::ptr::eq(self.function, &scaled_dot::FUNCTION)
    }

    /// Checks the parameters against a shape, and makes them ready.
    ///
    /// # Errors
    /// [`ScoreError`] for the first that makes no sense.
    pub(crate) fn bind(&self, shape: &AttnShape) -> Result<BoundScore, ScoreError> {
        let bound = Bound::new(self.function, &self.parameters, shape)?;
        let function = (self.function.bind)(&bound)?;
        let parameters: usize = self.parameters.iter().map(|parameter| parameter.values.len()).sum();
        // As they were given, and as the function has copied them.
        let bytes = 2 * 4 * parameters as u64 + bound.projection_bytes();
        Ok(BoundScore { function, bytes })
    }
}

impl Default for Score {
    fn default() -> Self {
        Self { function: &scaled_dot::FUNCTION, parameters: Arc::default() }
    }
}

impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.function, other.function) && self.parameters == other.parameters
    }
}

/// The rows of some query tokens of one query head.
#[derive(Clone, Debug)]
pub(crate) struct QueryRows {
    pub(crate) batch: usize,
    /// Query head of that batch element.
    pub(crate) head: usize,
    pub(crate) tokens: Range<usize>,
}

/// The rows of some keys of one kv head.
#[derive(Clone, Debug)]
pub(crate) struct KeyRows {
    /// Of its batch element.
    pub(crate) kv_head: usize,
    /// Positions in the sequence.
    pub(crate) keys: Range<usize>,
}

/// A function with its parameters, for calls of one shape.
pub(crate) trait ScoreFunction: Debug + Send + Sync {
    /// What makes a score of two transformed rows.
    fn reducer(&self) -> Reducer {
        Reducer::Dot
    }

    /// Elements of a transformed row, of queries and keys alike.
    fn dim(&self) -> usize;

    /// Whether transformed queries are queries as they are sent.
    fn keeps_queries(&self) -> bool {
        true
    }

    /// Whether transformed keys are keys as they are sent.
    fn keeps_keys(&self) -> bool {
        true
    }

    /// What transforming a key costs, in multiply-adds. Not asked where the function keeps them.
    fn key_cost(&self) -> usize {
        self.dim()
    }

    /// How transformed keys may be stored, where they are sent as elements of `sent`. Not asked where the function keeps them.
    fn storage(&self, _sent: Storage) -> Storage {
        Storage::F32
    }

    /// Transforms rows of queries, `[tokens, query_dim]` to `[tokens, dim]`. Not called where the function keeps them.
    fn query_rows(&self, _kernels: &Kernels, _rows: QueryRows, q: &[f32], out: &mut [f32]) {
        out.copy_from_slice(q);
    }

    /// Transforms rows of keys, `[keys, head_dim]` to `[keys, dim]`. Not called where the function keeps them.
    fn key_rows(&self, _kernels: &Kernels, _rows: KeyRows, k: &[f32], out: &mut [f32]) {
        out.copy_from_slice(k);
    }

    /// What the elements of a sum are multiplied by, `[dim]`, where the reducer has such weights.
    fn weights(&self, _head: usize) -> &[f32] {
        &[]
    }

    /// What becomes of the weights that a row had before, where the reducer asks for it.
    fn filters(&self, _head: usize) -> Option<Filters<'_>> {
        None
    }
}

/// A score function of an operator. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct BoundScore {
    function: Arc<dyn ScoreFunction>,
    bytes: u64,
}

impl BoundScore {
    /// Bytes of its parameters and projections.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn key_cost(&self) -> usize {
        if self.keeps_keys() { 0 } else { self.function.key_cost() }
    }

    pub(crate) fn reducer(&self) -> Reducer {
        self.function.reducer()
    }

    pub(crate) fn dim(&self) -> usize {
        self.function.dim()
    }

    /// Elements of a resident key.
    pub(crate) fn key_dim(&self) -> usize {
        self.dim() + self.reducer().flags()
    }

    pub(crate) fn keeps_queries(&self) -> bool {
        self.function.keeps_queries()
    }

    pub(crate) fn keeps_keys(&self) -> bool {
        self.function.keeps_keys() && self.reducer().flags() == 0
    }

    pub(crate) fn storage(&self, sent: Storage) -> Storage {
        if self.keeps_keys() { sent } else { self.function.storage(sent) }
    }

    pub(crate) fn weights(&self, head: usize) -> &[f32] {
        self.function.weights(head)
    }

    pub(crate) fn filters(&self, head: usize) -> Option<Filters<'_>> {
        self.function.filters(head)
    }

    /// Rows of queries as the reducer packs them.
    pub(crate) fn query_rows(&self, kernels: &Kernels, rows: QueryRows, q: &[f32], out: &mut [f32]) {
        let _standard = FloatEnvironment::standard();
        self.function.query_rows(kernels, rows, q, out);
    }

    /// Rows of keys as they are resident, `[keys, key_dim]`.
    pub(crate) fn key_rows(&self, kernels: &Kernels, rows: KeyRows, k: &[f32], out: &mut [f32]) {
        let _standard = FloatEnvironment::standard();
        if self.keeps_keys() {
            return out.copy_from_slice(k);
        }
        if self.reducer().flags() == 0 {
            return self.function.key_rows(kernels, rows, k, out);
        }
        if self.function.keeps_keys() {
            return flagged_exponentials(kernels, k, self.dim(), out);
        }
        let mut units = vec![0.0; rows.keys.len() * self.dim()];
        self.function.key_rows(kernels, rows, k, &mut units);
        flagged_exponentials(kernels, &units, self.dim(), out);
    }
}

impl From<OutOfMemory> for ScoreError {
    fn from(OutOfMemory { bytes }: OutOfMemory) -> Self {
        Self::OutOfMemory { bytes }
    }
}
