//! Three tensors become the operands of one call: dimensions that agree, one element type.

use attnd_client::Operands;
use attnd_kernel::{AttnShape, Dims, Dtype, ShapeError};

use super::Tensor;

/// Why three tensors are no attention call.
#[derive(Debug, thiserror::Error)]
pub enum OperandError {
    /// Two tensors disagree about a dimension that they share.
    #[error("{first} and {second} disagree: {what} {got:?}")]
    Mismatch {
        /// One tensor.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// The dimension.
        what: &'static str,
        /// Its size in each.
        got: (usize, usize),
    },
    /// Query heads are no multiple of kv heads.
    #[error("q has {heads} heads, which is no multiple of the {kv_heads} heads of k and v")]
    GqaRatio {
        /// Heads of q.
        heads: usize,
        /// Heads of k and v.
        kv_heads: usize,
    },
    /// Values that are more elements of keys than these have.
    #[error("values are the first {value_dim} elements of keys, which have {head_dim}")]
    Prefix {
        /// Elements of a value.
        value_dim: usize,
        /// Elements of a key.
        head_dim: usize,
    },
    /// A dimension is over its limit.
    #[error("over the limit: {0}")]
    Shape(ShapeError),
}

/// Operands, ready to send.
#[derive(Debug)]
pub struct Inputs {
    /// What is sent.
    pub operands: Operands,
    /// Whether the result has a batch dimension: it has one if q has.
    pub batched: bool,
    /// Remarks that the person at the keyboard should see.
    pub notes: Vec<String>,
}

/// Which last dimension queries may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryDim {
    /// That of keys.
    OfKeys,
    /// Any: a score function says what it takes.
    Any,
}

/// Where values are.
#[derive(Debug)]
pub enum Values {
    /// In a tensor of their own.
    Sent(Tensor),
    /// So many first elements of each key, which aren't sent again.
    OfKeys(usize),
}

/// Puts q, k and v together. Equal element types travel as they are, others as f32, which is exact.
///
/// # Errors
/// If the dimensions don't fit together or are over a limit.
pub fn assemble(q: Tensor, k: Tensor, v: Values, allowed: QueryDim) -> Result<Inputs, OperandError> {
    let same = |first, second, what, a: usize, b: usize| {
        if a == b { Ok(()) } else { Err(OperandError::Mismatch { first, second, what, got: (a, b) }) }
    };
    let [batch, heads, queries, query_dim] = q.shape;
    let [k_batch, kv_heads, keys, head_dim] = k.shape;
    let [v_batch, v_heads, v_keys, value_dim] = match &v {
        Values::Sent(v) => v.shape,
        Values::OfKeys(value_dim) => [k_batch, kv_heads, keys, *value_dim],
    };
    same("q", "k", "batch", batch, k_batch)?;
    if allowed == QueryDim::OfKeys {
        same("q", "k", "dim", query_dim, head_dim)?;
    }
    same("k", "v", "batch", k_batch, v_batch)?;
    same("k", "v", "heads", kv_heads, v_heads)?;
    same("k", "v", "tokens", keys, v_keys)?;
    let dims = [batch, heads, kv_heads, queries, keys, head_dim, value_dim].map(|n| n as u64);
    let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = dims;
    let shape = AttnShape::new(Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim });
    let shape = shape.and_then(|shape| shape.with_query_dim(query_dim as u64));
    let shape = match &v {
        Values::Sent(_) => shape,
        Values::OfKeys(_) => shape.and_then(AttnShape::with_values_from_keys),
    };
    let shape = shape.map_err(|error| match error {
        ShapeError::GqaRatio { heads, kv_heads } => OperandError::GqaRatio { heads, kv_heads },
        ShapeError::Prefix { value_dim, head_dim } => OperandError::Prefix { value_dim, head_dim },
        other => OperandError::Shape(other),
    })?;

    let (batched, mut dtype) = (q.batched, q.dtype);
    let mut notes = Vec::new();
    let mut sent = vec![("q", q), ("k", k)];
    if let Values::Sent(v) = v {
        sent.push(("v", v));
    }
    for (name, tensor) in &sent {
        if tensor.rounded_from_f64 {
            notes.push(format!("{name} is f64 and was rounded to f32"));
        }
    }
    if sent.iter().any(|(_, tensor)| tensor.dtype != dtype) {
        let list =
            |of: &dyn Fn(&(&str, Tensor)) -> String| sent.iter().map(of).collect::<Vec<_>>().join(", ");
        let (names, types) = (list(&|(name, _)| (*name).to_owned()), list(&|(_, of)| of.dtype.to_string()));
        notes.push(format!("{names} are {types}; all travel as f32"));
        sent = sent.into_iter().map(|(name, tensor)| (name, tensor.into_f32())).collect();
        dtype = Dtype::F32;
    }
    let mut bytes = sent.into_iter().map(|(_, tensor)| tensor.bytes);
    let mut next = || bytes.next().unwrap_or_default();
    let operands = Operands { shape, dtype, q: next(), k: next(), v: next() };
    Ok(Inputs { operands, batched, notes })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn tensor(shape: [usize; 4], dtype: Dtype) -> Tensor {
        let bytes = Bytes::from(vec![0; shape.iter().product::<usize>() * dtype.size()]);
        Tensor { shape, batched: false, dtype, rounded_from_f64: false, bytes }
    }

    fn refusal(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> String {
        let [q, k, v] = [q, k, v].map(|shape| tensor(shape, Dtype::F32));
        assemble(q, k, Values::Sent(v), QueryDim::OfKeys).unwrap_err().to_string()
    }

    #[test]
    fn equal_types_travel_as_they_are_and_mixed_ones_as_f32() {
        let [q, k, v] = [[1, 4, 3, 8], [1, 2, 5, 8], [1, 2, 5, 6]];
        let assemble = |q, k, v| assemble(q, k, Values::Sent(v), QueryDim::OfKeys);
        let half = assemble(tensor(q, Dtype::F16), tensor(k, Dtype::F16), tensor(v, Dtype::F16)).unwrap();
        assert_eq!(
            (half.operands.dtype, half.operands.q.len(), half.notes.len()),
            (Dtype::F16, 4 * 3 * 8 * 2, 0)
        );
        let mixed = assemble(tensor(q, Dtype::F16), tensor(k, Dtype::Bf16), tensor(v, Dtype::F32)).unwrap();
        assert_eq!((mixed.operands.dtype, mixed.operands.k.len()), (Dtype::F32, 2 * 5 * 8 * 4));
        assert_eq!(mixed.notes, ["q, k, v are f16, bf16, f32; all travel as f32"]);
        let shape = mixed.operands.shape;
        assert_eq!((shape.n_heads(), shape.n_kv_heads(), shape.n_keys(), shape.value_dim()), (4, 2, 5, 6));
    }

    #[test]
    fn rounding_is_not_silent() {
        let mut k = tensor([1, 1, 1, 1], Dtype::F32);
        k.rounded_from_f64 = true;
        let one = || tensor([1, 1, 1, 1], Dtype::F32);
        let inputs = assemble(one(), k, Values::Sent(one()), QueryDim::OfKeys).unwrap();
        assert_eq!(inputs.notes, ["k is f64 and was rounded to f32"]);
    }

    #[test]
    fn queries_may_be_wider_where_a_score_function_takes_them() {
        let [q, k, v] = [[1, 4, 3, 9], [1, 2, 5, 8], [1, 2, 5, 6]].map(|shape| tensor(shape, Dtype::F32));
        let shape = assemble(q, k, Values::Sent(v), QueryDim::Any).unwrap().operands.shape;
        assert_eq!((shape.query_dim(), shape.head_dim(), shape.value_dim()), (9, 8, 6));
        let wide = [[1, 1, 1, 1025], [1, 1, 1, 8], [1, 1, 1, 8]].map(|shape| tensor(shape, Dtype::F32));
        let [q, k, v] = wide;
        let refusal = assemble(q, k, Values::Sent(v), QueryDim::Any).unwrap_err().to_string();
        assert_eq!(refusal, "over the limit: query_dim 1025 > 1024");
    }

    #[test]
    fn disagreements_name_both_tensors_and_the_numbers() {
        let (q, k, v) = ([1, 4, 3, 8], [1, 2, 5, 8], [1, 2, 5, 6]);
        assert_eq!(refusal([2, 4, 3, 8], k, v), "q and k disagree: batch (2, 1)");
        assert_eq!(refusal([1, 4, 3, 9], k, v), "q and k disagree: dim (9, 8)");
        assert_eq!(refusal(q, k, [1, 2, 4, 6]), "k and v disagree: tokens (5, 4)");
        assert_eq!(refusal(q, k, [1, 1, 5, 6]), "k and v disagree: heads (2, 1)");
        assert!(refusal([1, 5, 3, 8], k, v).contains("q has 5 heads, which is no multiple of the 2"));
        assert!(refusal([1, 4, 3, 1100], [1, 2, 5, 1100], v).contains("head_dim 1100 > 1024"));
    }

    #[test]
    fn values_may_be_the_first_elements_of_keys() {
        let tensors = || (tensor([1, 4, 3, 9], Dtype::F16), tensor([1, 1, 5, 9], Dtype::F16));
        let of_keys = |value_dim| {
            let (q, k) = tensors();
            assemble(q, k, Values::OfKeys(value_dim), QueryDim::OfKeys)
        };
        let Operands { shape, dtype, v, .. } = of_keys(8).unwrap().operands;
        assert_eq!(
            (shape.value_dim(), shape.value_is_key_prefix(), dtype, v.len()),
            (8, true, Dtype::F16, 0)
        );
        let refusal = of_keys(10).unwrap_err().to_string();
        assert_eq!(refusal, "values are the first 10 elements of keys, which have 9");
    }
}
