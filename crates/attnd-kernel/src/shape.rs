//! Shapes of one attention call; the constructor is the only validation.

/// Largest number of query heads, and of batch times query heads.
pub const MAX_HEADS: usize = 1024;
/// Largest head dimension, of keys and of values.
pub const MAX_DIM: usize = 1024;
/// Largest head dimension of dot products of integers, so that no sum leaves 32 bits.
pub const MAX_INT8_DIM: usize = 512;
/// Largest number of query tokens.
pub const MAX_QUERIES: usize = 65_536;
/// Largest number of key tokens.
pub const MAX_KEYS: usize = 1 << 20;

/// The dimensions of `softmax(scale * Q K^T) V`: Q is `[batch, heads, queries, head_dim]`, K is
/// `[batch, kv_heads, keys, head_dim]`, V is `[batch, kv_heads, keys, value_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttnShape {
    batch: usize,
    n_heads: usize,
    n_kv_heads: usize,
    n_queries: usize,
    n_keys: usize,
    query_dim: usize,
    head_dim: usize,
    value_dim: usize,
    value_is_key_prefix: bool,
    kv_is_projected: bool,
}

/// Why a set of dimensions is no attention shape. Fields carry the name of the dimension as the API spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A dimension is zero.
    #[error("{field}")]
    Zero {
        /// Which dimension.
        field: &'static str,
    },
    /// A dimension is over its limit.
    #[error("{field} {got} > {limit}")]
    Limit {
        /// Which dimension.
        field: &'static str,
        /// What was asked for.
        got: u64,
        /// The largest value allowed.
        limit: u64,
    },
    /// Query heads are no multiple of key/value heads.
    #[error("{heads} % {kv_heads} != 0")]
    GqaRatio {
        /// Query heads.
        heads: usize,
        /// Key/value heads.
        kv_heads: usize,
    },
    /// Values that are the first elements of keys, and more of them than these have.
    #[error("value_is_key_prefix and value_dim {value_dim}: keys have {head_dim}")]
    Prefix {
        /// Elements of a value.
        value_dim: usize,
        /// Elements of a key.
        head_dim: usize,
    },
}

/// Dimensions as somebody typed them; [`AttnShape::new`] decides whether they make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Independent problems.
    pub batch: u64,
    /// Query heads `H`.
    pub heads: u64,
    /// Key/value heads `Hk`.
    pub kv_heads: u64,
    /// Query tokens `Tq`.
    pub queries: u64,
    /// Key tokens `Tk`.
    pub keys: u64,
    /// Dimension `d` of queries and keys.
    pub head_dim: u64,
    /// Dimension `dv` of values.
    pub value_dim: u64,
}

impl AttnShape {
    /// Validates dimensions: none is zero, none is over its limit, heads divide evenly into kv heads.
    pub fn new(dims: Dims) -> Result<Self, ShapeError> {
        let check = |field: &'static str, got: u64, limit: usize| match usize::try_from(got) {
            Ok(0) => Err(ShapeError::Zero { field }),
            Ok(n) if n <= limit => Ok(n),
            _ => Err(ShapeError::Limit { field, got, limit: limit as u64 }),
        };
        let shape = Self {
            batch: check("batch", dims.batch, MAX_HEADS)?,
            n_heads: check("num_heads", dims.heads, MAX_HEADS)?,
            n_kv_heads: check("num_kv_heads", dims.kv_heads, MAX_HEADS)?,
            n_queries: check("q_len", dims.queries, MAX_QUERIES)?,
            n_keys: check("kv_len", dims.keys, MAX_KEYS)?,
            query_dim: check("head_dim", dims.head_dim, MAX_DIM)?,
            head_dim: check("head_dim", dims.head_dim, MAX_DIM)?,
            value_dim: check("value_dim", dims.value_dim, MAX_DIM)?,
            value_is_key_prefix: false,
            kv_is_projected: false,
        };
        check("batch * num_heads", dims.batch * dims.heads, MAX_HEADS)?;
        if !shape.n_heads.is_multiple_of(shape.n_kv_heads) {
            return Err(ShapeError::GqaRatio { heads: shape.n_heads, kv_heads: shape.n_kv_heads });
        }
        Ok(shape)
    }

    /// The same with queries of another dimension than keys, for score functions that take them.
    ///
    /// # Errors
    /// If it is zero or over its limit.
    pub fn with_query_dim(self, query_dim: u64) -> Result<Self, ShapeError> {
        let (field, limit) = ("query_dim", MAX_DIM);
        match usize::try_from(query_dim) {
            Ok(0) => Err(ShapeError::Zero { field }),
            Ok(query_dim) if query_dim <= limit => Ok(Self { query_dim, ..self }),
            _ => Err(ShapeError::Limit { field, got: query_dim, limit: limit as u64 }),
        }
    }

    /// The same with values that aren't sent, because each is the first `value_dim` elements of its key: the absorbed form of multi-head
    /// latent attention (DeepSeek-V2, 2024, section 2.1.2 and appendix C), whose one kv head is `[latent, rotary part]` and has the
    /// latent for its values.
    ///
    /// # Errors
    /// If keys are shorter than that.
    pub fn with_values_from_keys(self) -> Result<Self, ShapeError> {
        let Self { head_dim, value_dim, .. } = self;
        if value_dim > head_dim {
            return Err(ShapeError::Prefix { value_dim, head_dim });
        }
        Ok(Self { value_is_key_prefix: true, ..self })
    }

    /// The same with keys and values that aren't sent, because whoever has them resident makes them of rows, by linear layers.
    #[must_use]
    pub fn with_projected_kv(self) -> Self {
        Self { kv_is_projected: true, ..self }
    }

    /// Independent problems.
    pub fn batch(&self) -> usize {
        self.batch
    }
    /// Query heads of one batch element.
    pub fn n_heads(&self) -> usize {
        self.n_heads
    }
    /// Key/value heads of one batch element.
    pub fn n_kv_heads(&self) -> usize {
        self.n_kv_heads
    }
    /// Query tokens.
    pub fn n_queries(&self) -> usize {
        self.n_queries
    }
    /// Key tokens.
    pub fn n_keys(&self) -> usize {
        self.n_keys
    }
    /// Dimension of queries.
    pub fn query_dim(&self) -> usize {
        self.query_dim
    }
    /// Dimension of keys, and of queries unless [`Self::with_query_dim`] said otherwise.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }
    /// Dimension of values.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }
    /// Whether values are the first elements of keys, and aren't sent.
    pub fn value_is_key_prefix(&self) -> bool {
        self.value_is_key_prefix
    }
    /// Whether keys and values are made of rows where they are resident, and aren't sent.
    pub fn kv_is_projected(&self) -> bool {
        self.kv_is_projected
    }
    /// Query heads that share one kv head.
    pub fn group_size(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
    /// Kv groups over the whole batch: `batch * kv_heads`. Group `g` holds query heads
    /// `[g * group_size, (g + 1) * group_size)` of the flattened `batch * heads`.
    pub fn n_groups(&self) -> usize {
        self.batch * self.n_kv_heads
    }
    /// Elements of Q, over the batch.
    pub fn q_elements(&self) -> u64 {
        (self.batch * self.n_heads * self.n_queries) as u64 * self.query_dim as u64
    }
    /// Elements of K, over the batch.
    pub fn k_elements(&self) -> u64 {
        (self.n_groups() * self.n_keys) as u64 * self.head_dim as u64
    }
    /// Elements of V, over the batch.
    pub fn v_elements(&self) -> u64 {
        (self.n_groups() * self.n_keys) as u64 * self.value_dim as u64
    }
}
