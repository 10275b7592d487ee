//! Names and specs of sessions in messages.

use std::time::Duration;

use attnd_kernel::Storage;
use attnd_kernel::shape::MAX_KEYS;
use attnd_plan::session::spec::DEFAULT_TTL;
use attnd_plan::session::{SessionName, SessionNameError, SessionSpec, SpecError};

use crate::convert::{self, size, small};
use crate::error::{Error, Reason};
use crate::proto;

/// Decodes the name of a session.
pub(crate) fn name(text: String) -> Result<SessionName, Error> {
    Ok(SessionName::new(text)?)
}

/// Decodes a spec, with what it leaves out put in.
///
/// # Errors
/// [`Reason::Dtype`], [`Reason::ShapeZero`], [`Reason::ShapeLimit`], [`Reason::GqaRatio`], [`Reason::Combination`],
/// [`Reason::Replication`].
pub(crate) fn decode(message: proto::SessionSpec) -> Result<SessionSpec, Error> {
    let dtype = convert::dtype(message.dtype)?;
    let storage = match proto::Storage::try_from(message.storage) {
        Ok(proto::Storage::AsSent) => Storage::from(dtype),
        Ok(proto::Storage::Int8) => Storage::Int8,
        Ok(proto::Storage::Int4) => Storage::Int4,
        Err(_) => return Err(Error::new(Reason::Dtype, format!("storage {}", message.storage))),
    };
    let or = |said: usize, default: usize| if said == 0 { default } else { said };
    let replicas = or(size(message.replicas), 1);
    let ttl = Duration::from_secs(message.ttl_seconds.into());
    let max_tokens = usize::try_from(message.max_tokens).unwrap_or(usize::MAX);
    let spec = SessionSpec {
        layers: size(message.layers),
        heads: size(message.heads),
        kv_heads: size(message.kv_heads),
        head_dim: size(message.head_dim),
        value_dim: size(message.value_dim),
        dtype,
        storage,
        value_is_key_prefix: message.value_is_key_prefix,
        replicas,
        acks: or(size(message.acks), replicas),
        ttl: if ttl.is_zero() { DEFAULT_TTL } else { ttl },
        max_tokens: or(max_tokens, MAX_KEYS),
        allow_same_host: message.allow_same_host,
    };
    spec.check()?;
    Ok(spec)
}

impl From<&SessionSpec> for proto::SessionSpec {
    fn from(spec: &SessionSpec) -> Self {
        let storage = match spec.storage {
            Storage::F32 | Storage::F16 | Storage::Bf16 => proto::Storage::AsSent,
            Storage::Int8 => proto::Storage::Int8,
            Storage::Int4 => proto::Storage::Int4,
        };
        // Rounded up, so that no time is none.
        let ttl_seconds = spec.ttl.as_secs() + u64::from(spec.ttl.subsec_nanos() > 0);
        Self {
            layers: small(spec.layers),
            heads: small(spec.heads),
            kv_heads: small(spec.kv_heads),
            head_dim: small(spec.head_dim),
            value_dim: small(spec.value_dim),
            dtype: proto::Dtype::from(spec.dtype).into(),
            storage: storage.into(),
            value_is_key_prefix: spec.value_is_key_prefix,
            replicas: small(spec.replicas),
            acks: small(spec.acks),
            ttl_seconds: u32::try_from(ttl_seconds).unwrap_or(u32::MAX),
            max_tokens: spec.max_tokens as u64,
            allow_same_host: spec.allow_same_host,
        }
    }
}

/// Refuses a layer that a session doesn't have.
///
/// # Errors
/// [`Reason::ShapeLimit`].
pub fn check_layer(layer: usize, spec: &SessionSpec) -> Result<(), Error> {
    if layer < spec.layers {
        return Ok(());
    }
    Err(Error::new(Reason::ShapeLimit, format!("layer {layer} of {}", spec.layers)))
}

impl From<SessionNameError> for Error {
    fn from(error: SessionNameError) -> Self {
        Self::new(Reason::SessionId, error.to_string())
    }
}

impl From<SpecError> for Error {
    fn from(error: SpecError) -> Self {
        let reason = match error {
            SpecError::Zero { .. } => Reason::ShapeZero,
            SpecError::Limit { .. } => Reason::ShapeLimit,
            SpecError::Shape(shape) => return shape.into(),
            SpecError::Acks { .. } => Reason::Replication,
            SpecError::Storage { .. } => Reason::Combination,
        };
        Self::new(reason, error.to_string())
    }
}
