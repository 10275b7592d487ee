//! What a session is: the numbers that are fixed when it is opened.

use std::fmt;
use std::time::Duration;

use attnd_kernel::shape::MAX_KEYS;
use attnd_kernel::{AttnShape, Dims, Dtype, PageLayout, ShapeError, Storage};

/// Longest name of a session, in bytes.
pub const MAX_SESSION_NAME: usize = 64;
/// Most layers of a session.
pub const MAX_LAYERS: usize = 1024;
/// Most replicas of a shard.
pub const MAX_REPLICAS: usize = 16;
/// Time without a request after which a session is closed, unless it says another one.
pub const DEFAULT_TTL: Duration = Duration::from_secs(600);
/// Longest such time.
pub const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 3600);

/// The name of a session: 1 to 64 characters of `[A-Za-z0-9._-]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionName(String);

/// A text that is no name of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("1..{MAX_SESSION_NAME} of [A-Za-z0-9._-]")]
pub struct SessionNameError;

impl SessionName {
    /// Checks a text.
    ///
    /// # Errors
    /// If it is empty, too long, or has another character.
    pub fn new(text: impl Into<String>) -> Result<Self, SessionNameError> {
        let text = text.into();
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > MAX_SESSION_NAME || !text.bytes().all(is_allowed) {
            return Err(SessionNameError);
        }
        Ok(Self(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What can't change as long as a session lives. [`SessionSpec::check`] says whether it makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSpec {
    /// Layers, each with keys and values of its own.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Of K and V as they are sent.
    pub dtype: Dtype,
    /// Of K and V as they are resident: that of `dtype`, or integers.
    pub storage: Storage,
    /// Values are the first elements of keys, and aren't sent.
    pub value_is_key_prefix: bool,
    /// Workers that hold each shard.
    pub replicas: usize,
    /// How many of them have an op when it is acknowledged.
    pub acks: usize,
    /// Time without a request after which the session is closed.
    pub ttl: Duration,
    /// Most tokens of a layer.
    pub max_tokens: usize,
    /// Replicas of a shard may be on one host.
    pub allow_same_host: bool,
}

/// Why a spec makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A number that must not be zero.
    #[error("{field}")]
    Zero {
        /// Which.
        field: &'static str,
    },
    /// A number over its limit.
    #[error("{field} {got} > {most}")]
    Limit {
        /// Which.
        field: &'static str,
        /// What it is.
        got: u64,
        /// What it may be.
        most: u64,
    },
    /// The dimensions are none of attention.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// More replicas shall acknowledge than there are.
    #[error("ack {acks} > replicas {replicas}")]
    Acks {
        /// That shall acknowledge.
        acks: usize,
        /// That there are.
        replicas: usize,
    },
    /// Storage that isn't made of such elements.
    #[error("storage {storage} of {dtype}")]
    Storage {
        /// As they are resident.
        storage: Storage,
        /// As they are sent.
        dtype: Dtype,
    },
}

impl SessionSpec {
    /// Checks that every number is one.
    ///
    /// # Errors
    /// The first that isn't.
    pub fn check(&self) -> Result<(), SpecError> {
        let counted = [
            ("layers", self.layers, MAX_LAYERS),
            ("replicas", self.replicas, MAX_REPLICAS),
            ("acks", self.acks, usize::MAX),
            ("max_tokens", self.max_tokens, MAX_KEYS),
        ];
        for (field, got, most) in counted {
            if got == 0 {
                return Err(SpecError::Zero { field });
            }
            if got > most {
                return Err(SpecError::Limit { field, got: got as u64, most: most as u64 });
            }
        }
        if self.acks > self.replicas {
            return Err(SpecError::Acks { acks: self.acks, replicas: self.replicas });
        }
        if self.ttl.is_zero() {
            return Err(SpecError::Zero { field: "ttl_seconds" });
        }
        if self.ttl > MAX_TTL {
            let (got, most) = (self.ttl.as_secs(), MAX_TTL.as_secs());
            return Err(SpecError::Limit { field: "ttl_seconds", got, most });
        }
        let (storage, dtype) = (self.storage, self.dtype);
        if !storage.has_scales() && storage != Storage::from(dtype) {
            return Err(SpecError::Storage { storage, dtype });
        }
        self.shape(1, 1).map(|_shape| ()).map_err(Into::into)
    }

    /// The shape of a call of `queries` tokens over the first `keys` of a layer.
    ///
    /// # Errors
    /// If there is none: a dimension is zero or over its limit.
    pub fn shape(&self, queries: usize, keys: usize) -> Result<AttnShape, ShapeError> {
        let shape = AttnShape::new(Dims {
            batch: 1,
            heads: self.heads as u64,
            kv_heads: self.kv_heads as u64,
            queries: queries as u64,
            keys: keys as u64,
            head_dim: self.head_dim as u64,
            value_dim: self.value_dim as u64,
        })?;
        if self.value_is_key_prefix { shape.with_values_from_keys() } else { Ok(shape) }
    }

    /// Query heads of a kv head.
    pub fn group_size(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// How pages of keys and values are made.
    pub fn page_layout(&self) -> PageLayout {
        PageLayout { storage: self.storage, head_dim: self.head_dim, value_dim: self.value_dim }
    }

    /// Bytes of a row of K, and of one of V, of one head as they are sent.
    pub fn row_bytes(&self) -> (usize, usize) {
        let value_dim = if self.value_is_key_prefix { 0 } else { self.value_dim };
        (self.head_dim * self.dtype.size(), value_dim * self.dtype.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> SessionSpec {
        SessionSpec {
            layers: 2,
            heads: 8,
            kv_heads: 2,
            head_dim: 16,
            value_dim: 8,
            dtype: Dtype::F32,
            storage: Storage::F32,
            value_is_key_prefix: false,
            replicas: 2,
            acks: 1,
            ttl: DEFAULT_TTL,
            max_tokens: 1000,
            allow_same_host: false,
        }
    }

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "A-b_c.9", &"x".repeat(64)] {
            assert_eq!(SessionName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "ä", "a/b", "\u{1b}[1m", "a\0", &"x".repeat(65)] {
            assert_eq!(SessionName::new(bad), Err(SessionNameError), "{bad:?}");
        }
    }

    #[test]
    fn each_number_is_checked_and_named() {
        assert_eq!(spec().check(), Ok(()));
        let said = |change: &dyn Fn(&mut SessionSpec)| {
            let mut changed = spec();
            change(&mut changed);
            changed.check().unwrap_err().to_string()
        };
        assert_eq!(said(&|spec| spec.layers = 0), "layers");
        assert_eq!(said(&|spec| spec.layers = 1025), "layers 1025 > 1024");
        assert_eq!(said(&|spec| spec.replicas = 0), "replicas");
        assert_eq!(said(&|spec| spec.acks = 0), "acks");
        assert_eq!(said(&|spec| spec.acks = 3), "ack 3 > replicas 2");
        assert_eq!(said(&|spec| spec.max_tokens = MAX_KEYS + 1), "max_tokens 1048577 > 1048576");
        assert_eq!(said(&|spec| spec.ttl = Duration::ZERO), "ttl_seconds");
        assert_eq!(said(&|spec| spec.ttl = Duration::MAX), format!("ttl_seconds {} > 2592000", u64::MAX));
        assert_eq!(said(&|spec| spec.storage = Storage::Bf16), "storage bf16 of f32");
        assert!(said(&|spec| spec.heads = 7).contains('7'));
        assert!(said(&|spec| spec.value_dim = 0).contains("value_dim"));
        let mut integers = spec();
        integers.storage = Storage::Int8;
        assert_eq!(integers.check(), Ok(()));
    }

    #[test]
    fn values_that_are_parts_of_keys_are_not_sent() {
        let mut latent = spec();
        assert_eq!(latent.row_bytes(), (64, 32));
        latent.value_is_key_prefix = true;
        assert_eq!((latent.row_bytes(), latent.shape(1, 5).unwrap().value_is_key_prefix()), ((64, 0), true));
    }
}
