//! Steps: rows that are appended, queries that attend over everything including them.

use std::sync::Arc;

use attnd_kernel::{AttnShape, Dtype, EmptyRow, Operator};
use attnd_plan::session::{SessionName, SessionSpec};
use attnd_plan::{SideTensor, Sides, Tensor};
use bytes::Bytes;

use crate::checksum::{checksum, has_checksum};
use crate::convert::{self, size, small};
use crate::error::{Error, Reason};
use crate::operator::{self, Encoded};
use crate::session::request::Mutation;
use crate::session::spec::{check_layer, name};
use crate::{proto, refusal};

/// One step of one layer: at least one of the two.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Of which session.
    pub session: SessionName,
    /// Of which layer.
    pub layer: usize,
    /// What is appended first.
    pub rows: Option<StepRows>,
    /// What then attends.
    pub queries: Option<StepQueries>,
}

/// Rows in one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRows {
    /// Which mutation of the session.
    pub mutation: Mutation,
    /// How many, at least one.
    pub tokens: usize,
    /// Of k, continued over v, which have it.
    pub crc32c: u32,
    /// `[kv_heads, tokens, head_dim]`.
    pub k: Bytes,
    /// `[kv_heads, tokens, value_dim]`; empty where values are parts of keys.
    pub v: Bytes,
    /// Tokens that the layer must have before.
    pub base_len: Option<u64>,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// What the client takes the rows for.
    pub shape: RowShape,
}

/// What a client takes rows of a session for, as far as it says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowShape {
    /// Element type.
    pub dtype: Option<Dtype>,
    /// Kv heads of K and V, heads of Q.
    pub heads: Option<usize>,
    /// Elements of a row of K or Q.
    pub head_dim: Option<usize>,
    /// Elements of a row of V.
    pub value_dim: Option<usize>,
}

/// Queries of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepQueries {
    /// How many, at least one.
    pub tokens: usize,
    /// Element type of q.
    pub dtype: Dtype,
    /// Of q, which has it.
    pub crc32c: u32,
    /// `[heads, tokens, head_dim]`.
    pub q: Bytes,
    /// What is computed.
    pub operator: QueryOperator,
    /// NaN and infinities pass unexamined.
    pub allow_non_finite: bool,
    /// How many tokens of the layer are looked at; `None`: all.
    pub at_len: Option<u64>,
    /// Which generation of the session; `None`: whichever it has.
    pub generation: Option<u64>,
    /// Tokens that the layer must have at least, unless the session was cut since.
    pub min_len: u64,
    /// Generation in which it had as many.
    pub min_len_generation: u64,
    /// What the client takes the queries for.
    pub shape: RowShape,
}

/// What queries compute, as it is in a message. Whether it makes sense can be said only when it is known over how many keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueryOperator {
    /// `None`: what the score function says.
    pub(crate) scale: Option<f32>,
    pub(crate) causal: i32,
    pub(crate) operator: Option<proto::Operator>,
}

impl From<&Operator> for QueryOperator {
    fn from(operator: &Operator) -> Self {
        let Encoded { scale, causal, operator } = Encoded::from(operator);
        Self { scale: Some(scale), causal, operator }
    }
}

impl QueryOperator {
    /// Decodes the operator of queries of a session, of `shape`.
    ///
    /// # Errors
    /// As for one-shot calls, and [`Reason::Combination`] for what sessions don't have: tensors beside the operands, score functions that
    /// make other keys of those that are resident, and uniform empty rows, for which all values would be summed.
    pub fn decode(&self, shape: &AttnShape) -> Result<Arc<Operator>, Error> {
        let scale = self.scale.unwrap_or_else(|| operator::default_scale(self.operator.as_ref(), shape));
        let encoded = Encoded { scale, causal: self.causal, operator: self.operator.clone() };
        let sides = encoded.sides(shape)?;
        if let Some(side) = SideTensor::ALL.iter().find_map(|tensor| sides.of(*tensor)) {
            return Err(of_a_session(side.tensor().option()));
        }
        let operator = encoded.decode(shape, &Sides::default())?;
        check_operator(&operator)?;
        Ok(operator)
    }
}

/// Refuses operators that sessions don't have; those with tensors beside them aside.
///
/// # Errors
/// [`Reason::Combination`].
pub fn check_operator(operator: &Operator) -> Result<(), Error> {
    if !operator.keeps_keys() {
        return Err(of_a_session(&format!("score={}", operator.score().function().name)));
    }
    if operator.empty_row() == EmptyRow::Uniform {
        return Err(of_a_session("empty_row=uniform"));
    }
    Ok(())
}

/// Refuses what sessions don't have.
pub(crate) fn of_a_session(option: &str) -> Error {
    Error::new(Reason::Combination, format!("session and {option}"))
}

impl RowShape {
    /// # Errors
    /// [`Reason::Dtype`].
    pub(crate) fn decode(message: Option<proto::RowShape>) -> Result<Self, Error> {
        let Some(proto::RowShape { dtype, heads, head_dim, value_dim }) = message else {
            return Ok(Self::default());
        };
        let said = |n: u32| (n != 0).then(|| size(n));
        let dtype = if dtype == 0 { None } else { Some(convert::dtype(dtype)?) };
        Ok(Self { dtype, heads: said(heads), head_dim: said(head_dim), value_dim: said(value_dim) })
    }

    pub(crate) fn encode(&self) -> Option<proto::RowShape> {
        let number = |said: Option<usize>| said.map_or(0, small);
        let message = proto::RowShape {
            dtype: self.dtype.map_or(0, |dtype| proto::Dtype::from(dtype).into()),
            heads: number(self.heads),
            head_dim: number(self.head_dim),
            value_dim: number(self.value_dim),
        };
        (*self != Self::default()).then_some(message)
    }

    /// Refuses rows of K and V that are none of the session's.
    ///
    /// # Errors
    /// [`Reason::DtypeMismatch`] and [`Reason::ShapeMismatch`].
    pub(crate) fn check_rows(&self, spec: &SessionSpec) -> Result<(), Error> {
        if let Some(got) = self.dtype.filter(|dtype| *dtype != spec.dtype) {
            return Err(refusal::dtype_mismatch(spec.dtype, got));
        }
        self.check_sizes("kv_heads", spec.kv_heads, spec)
    }

    fn check_sizes(&self, heads: &'static str, n_heads: usize, spec: &SessionSpec) -> Result<(), Error> {
        let sizes = [
            (heads, self.heads, n_heads),
            ("head_dim", self.head_dim, spec.head_dim),
            ("value_dim", self.value_dim, spec.value_dim),
        ];
        match sizes.into_iter().find(|(_, said, is)| said.is_some_and(|said| said != *is)) {
            Some((field, said, is)) => Err(refusal::session_mismatch(field, is, said.unwrap_or_default())),
            None => Ok(()),
        }
    }
}

impl StepRows {
    /// Rows as they are sent, which get their checksum.
    pub fn new(mutation: Mutation, tokens: usize, k: Bytes, v: Bytes) -> Self {
        let crc32c = checksum(&[&k, &v]);
        let (base_len, allow_non_finite, shape) = (None, false, RowShape::default());
        Self { mutation, tokens, crc32c, k, v, base_len, allow_non_finite, shape }
    }

    /// Checks the rows against the session that they go to.
    ///
    /// # Errors
    /// [`Reason::DtypeMismatch`], [`Reason::ShapeMismatch`], [`Reason::ShapeLimit`] for a layer that isn't there, [`Reason::PayloadLength`].
    pub fn check(&self, layer: usize, spec: &SessionSpec) -> Result<(), Error> {
        check_layer(layer, spec)?;
        self.shape.check_rows(spec)?;
        let (key, value) = spec.row_bytes();
        payload(Tensor::K, [spec.kv_heads, self.tokens, key], &self.k)?;
        payload(Tensor::V, [spec.kv_heads, self.tokens, value], &self.v)
    }
}

impl StepQueries {
    /// Queries as they are sent, which get their checksum; over all tokens.
    pub fn new(tokens: usize, dtype: Dtype, q: Bytes, operator: QueryOperator) -> Self {
        Self {
            tokens,
            dtype,
            crc32c: checksum(&[&q]),
            q,
            operator,
            allow_non_finite: false,
            at_len: None,
            generation: None,
            min_len: 0,
            min_len_generation: 0,
            shape: RowShape::default(),
        }
    }

    /// Checks the queries against the session that they are of, whatever it holds.
    ///
    /// # Errors
    /// [`Reason::ShapeMismatch`], [`Reason::ShapeLimit`], [`Reason::PayloadLength`].
    pub fn check(&self, layer: usize, spec: &SessionSpec) -> Result<(), Error> {
        check_layer(layer, spec)?;
        self.shape.check_sizes("heads", spec.heads, spec)?;
        payload(Tensor::Q, [spec.heads, self.tokens, spec.head_dim * self.dtype.size()], &self.q)
    }

    /// The call that they are over the first `at_len` tokens of a layer.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`], and whatever is wrong with the operator: see [`QueryOperator::decode`].
    pub fn over(&self, spec: &SessionSpec, at_len: usize) -> Result<(AttnShape, Arc<Operator>), Error> {
        let shape = spec.shape(self.tokens, at_len)?;
        Ok((shape, self.operator.decode(&shape)?))
    }
}

/// Checks that a tensor of so many heads, tokens and bytes of a row is as long as it must be.
pub(crate) fn payload(tensor: Tensor, [heads, tokens, row]: [usize; 3], bytes: &Bytes) -> Result<(), Error> {
    // A number of tokens is whatever a peer wrote, below 2^32; heads and rows are those of a spec.
    let need = heads as u128 * tokens as u128 * row as u128;
    if bytes.len() as u128 == need {
        return Ok(());
    }
    Err(refusal::payload_length(tensor, need, bytes.len()))
}

impl TryFrom<proto::Step> for Step {
    type Error = Error;

    fn try_from(message: proto::Step) -> Result<Self, Error> {
        let proto::Step { session, layer, rows, queries } = message;
        let session = name(session)?;
        if rows.is_none() && queries.is_none() {
            return Err(Error::new(Reason::Combination, "step without rows and queries"));
        }
        Ok(Self {
            session,
            layer: size(layer),
            rows: rows.map(|rows| (*rows).try_into()).transpose()?,
            queries: queries.map(|queries| (*queries).try_into()).transpose()?,
        })
    }
}

impl From<Step> for proto::Step {
    fn from(step: Step) -> Self {
        Self {
            session: step.session.to_string(),
            layer: small(step.layer),
            rows: step.rows.map(|rows| Box::new(rows.into())),
            queries: step.queries.map(|queries| Box::new(queries.into())),
        }
    }
}

impl TryFrom<proto::StepRows> for StepRows {
    type Error = Error;

    fn try_from(message: proto::StepRows) -> Result<Self, Error> {
        let proto::StepRows { mutation, tokens, crc32c, k, v, base_len, allow_non_finite, shape } = message;
        let mutation = Mutation::decode(mutation)?;
        let tokens = size(tokens);
        if tokens == 0 {
            return Err(refusal::no_tokens());
        }
        if !has_checksum(&[&k, &v], crc32c) {
            return Err(refusal::rows_checksum("k and v"));
        }
        let shape = RowShape::decode(shape)?;
        Ok(Self { mutation, tokens, crc32c, k, v, base_len, allow_non_finite, shape })
    }
}

impl From<StepRows> for proto::StepRows {
    fn from(rows: StepRows) -> Self {
        Self {
            mutation: Some(rows.mutation.into()),
            tokens: small(rows.tokens),
            crc32c: rows.crc32c,
            k: rows.k,
            v: rows.v,
            base_len: rows.base_len,
            allow_non_finite: rows.allow_non_finite,
            shape: rows.shape.encode(),
        }
    }
}

impl TryFrom<proto::StepQueries> for StepQueries {
    type Error = Error;

    fn try_from(message: proto::StepQueries) -> Result<Self, Error> {
        let proto::StepQueries {
            tokens,
            dtype,
            crc32c,
            q,
            scale,
            causal,
            operator,
            allow_non_finite,
            at_len,
            generation,
            min_len,
            min_len_generation,
            shape,
        } = message;
        let dtype = convert::dtype(dtype)?;
        let tokens = size(tokens);
        if tokens == 0 {
            return Err(Error::new(Reason::ShapeZero, "q_len"));
        }
        if !has_checksum(&[&q], crc32c) {
            return Err(refusal::rows_checksum("q"));
        }
        let operator = QueryOperator { scale, causal, operator };
        let shape = RowShape::decode(shape)?;
        Ok(Self {
            tokens,
            dtype,
            crc32c,
            q,
            operator,
            allow_non_finite,
            at_len,
            generation,
            min_len,
            min_len_generation,
            shape,
        })
    }
}

impl From<StepQueries> for proto::StepQueries {
    fn from(queries: StepQueries) -> Self {
        let QueryOperator { scale, causal, operator } = queries.operator;
        Self {
            tokens: small(queries.tokens),
            dtype: proto::Dtype::from(queries.dtype).into(),
            crc32c: queries.crc32c,
            q: queries.q,
            scale,
            causal,
            operator,
            allow_non_finite: queries.allow_non_finite,
            at_len: queries.at_len,
            generation: queries.generation,
            min_len: queries.min_len,
            min_len_generation: queries.min_len_generation,
            shape: queries.shape.encode(),
        }
    }
}
