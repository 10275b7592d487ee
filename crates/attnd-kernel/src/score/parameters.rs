//! What score functions are given, and what is wrong with it.

use std::fmt;
use std::sync::Arc;

/// A dimension by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symbol {
    /// Batch elements.
    Batch,
    /// Query heads.
    Heads,
    /// Kv heads.
    KvHeads,
    /// Query tokens.
    Queries,
    /// Elements of a query as it is sent.
    QueryDim,
    /// Elements of a key as it is sent.
    KeyDim,
    /// Elements of a query and a key, one behind the other.
    BothDims,
    /// Hidden units: as many as the parameters have.
    Units,
    /// Positions that a parameter knows; at least as many as there are keys.
    Positions,
    /// Filters of a convolution: as many as the parameters have.
    Filters,
    /// Taps of such a filter.
    Taps,
    /// 1.
    One,
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Batch => "batch",
            Self::Heads => "num_heads",
            Self::KvHeads => "num_kv_heads",
            Self::Queries => "q_len",
            Self::QueryDim => "query_dim",
            Self::KeyDim => "head_dim",
            Self::BothDims => "query_dim+head_dim",
            Self::Units => "units",
            Self::Positions => "positions",
            Self::Filters => "filters",
            Self::Taps => "taps",
            Self::One => "1",
        })
    }
}

/// A tensor that a function is given.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    /// What it is called in calls and refusals.
    pub name: &'static str,
    /// Shapes that it may have: first the one that all heads share, then those with a leading axis for heads.
    pub shapes: &'static [&'static [Symbol]],
    /// What it is where a call doesn't give it; `None` where it must.
    pub default: Option<f32>,
}

/// A parameter as somebody gave it, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Which parameter.
    pub name: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// As many as the product of the dimensions.
    pub values: Arc<[f32]>,
}

/// Why a score function can't be had. The text names the function, the parameter and both numbers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScoreError {
    /// No function is called so.
    #[error("score={name}: there are {known}")]
    Unknown {
        /// As given.
        name: String,
        /// What there is.
        known: String,
    },
    /// A parameter is missing.
    #[error("score={function} and no parameter {parameter} of {shape}")]
    Missing {
        /// Which function.
        function: &'static str,
        /// Which parameter.
        parameter: &'static str,
        /// What it should look like.
        shape: String,
    },
    /// The function has no such parameter, or it is given twice.
    #[error("score={function} and a parameter {parameter}: it takes one each of {known}")]
    Surplus {
        /// Which function.
        function: &'static str,
        /// As given.
        parameter: String,
        /// What it takes.
        known: String,
    },
    /// A parameter has another shape.
    #[error("score.{parameter} of {function} is {got:?}, not {expected}")]
    Shape {
        /// Which function.
        function: &'static str,
        /// Which parameter.
        parameter: &'static str,
        /// As given.
        got: Vec<usize>,
        /// What it may be, in names and numbers.
        expected: String,
    },
    /// A parameter has more or fewer elements than its shape.
    #[error("score.{parameter} has {got} elements, its shape has {expected}")]
    Length {
        /// Which parameter.
        parameter: &'static str,
        /// How many there are.
        got: usize,
        /// How many there should be.
        expected: usize,
    },
    /// An element of a parameter is out of its range.
    #[error("score.{parameter}[{at}] is {value}, not {expected}")]
    Value {
        /// Which parameter.
        parameter: &'static str,
        /// Which element.
        at: usize,
        /// As given.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// Queries and keys of different lengths, which the function compares element by element.
    #[error("score={function} and query_dim {query_dim}: keys have {key_dim}")]
    Dims {
        /// Which function.
        function: &'static str,
        /// Elements of a query.
        query_dim: usize,
        /// Elements of a key.
        key_dim: usize,
    },
    /// More hidden units, filters or taps than kernels are made for.
    #[error("score={function} has {got} {what} > {limit}")]
    Limit {
        /// Which function.
        function: &'static str,
        /// Of what.
        what: Symbol,
        /// How many there are.
        got: usize,
        /// The most allowed.
        limit: usize,
    },
    /// Fewer positions than keys.
    #[error("score={function} has {got} positions, kv_len is {keys}")]
    Positions {
        /// Which function.
        function: &'static str,
        /// How many there are.
        got: usize,
        /// How many are needed.
        keys: usize,
    },
    /// Projections that take too much memory as kernels read them.
    #[error(
        "score={function}: its projections take {bytes} bytes > {limit}; each has room for 64 outputs at least"
    )]
    Projections {
        /// Which function.
        function: &'static str,
        /// Bytes of those up to the first that is too much.
        bytes: u64,
        /// The most allowed.
        limit: u64,
    },
    /// The system has no memory for a copy of the parameters.
    #[error("no memory for {bytes} bytes of score parameters")]
    OutOfMemory {
        /// What was asked for.
        bytes: u64,
    },
}
