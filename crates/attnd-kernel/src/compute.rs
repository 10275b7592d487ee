//! In what arithmetic scores and contexts are computed: f32, or the CPU's dot products of what is stored.

use crate::canonical::KERNEL_ID;
use crate::storage::Storage;

/// The arithmetic of a call. Each has its own order and its own `kernel_id`; results have equal bits where that is equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compute {
    /// f32 products of stored elements, widened exactly. For any storage, on any CPU.
    #[default]
    F32,
    /// Products of bf16 pairs, added up in f32: twice as fast, with queries and weights rounded to bf16. For bf16 storage.
    ///
    /// Of operands from N(0, 1), 2048 keys of 64 or 128 dimensions, a context is off by at most 0.9 % of its root mean square
    /// against an exact computation over what is stored.
    Bf16,
    /// Products of stored 8-bit integers with queries and weights of 16 bits, added up exactly. For int8 storage.
    ///
    /// The same error is at most 0.04 %; what storing as int8 has taken before is 18 times that.
    Int8,
}

impl Compute {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Int8];

    /// Names the order of arithmetic. See [`KERNEL_ID`], which is that of f32.
    pub fn kernel_id(self) -> &'static str {
        match self {
            Self::F32 => KERNEL_ID,
            Self::Bf16 => "c1-bf16",
            Self::Int8 => "c1-int8",
        }
    }

    /// The storage that it is for; `None` for any.
    pub fn storage(self) -> Option<Storage> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(Storage::Bf16),
            Self::Int8 => Some(Storage::Int8),
        }
    }
}

impl std::fmt::Display for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

/// An arithmetic that isn't for the storage at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "compute={compute} needs keys and values stored as {needed}, these are {storage}; store them so, or use compute=f32"
)]
pub struct StorageMismatch {
    /// What was asked for.
    pub compute: Compute,
    /// What it needs.
    pub needed: Storage,
    /// What there is.
    pub storage: Storage,
}

/// The arithmetic that a call runs in: f32, or what [`crate::Kernels::effective`] answered. Partials merge only with those
/// of the same [`Self::kernel_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effective {
    pub(crate) compute: Compute,
    pub(crate) instead_of: Option<Compute>,
}

impl Effective {
    /// f32 because f32 is wanted: for any storage, on any CPU.
    pub const F32: Self = Self { compute: Compute::F32, instead_of: None };

    /// The arithmetic.
    pub fn compute(self) -> Compute {
        self.compute
    }

    /// What was asked for, if this CPU, or the kernels chosen for it, have no instructions for that.
    pub fn instead_of(self) -> Option<Compute> {
        self.instead_of
    }

    /// Names the order of arithmetic that runs, which is not the one of [`Self::instead_of`].
    pub fn kernel_id(self) -> &'static str {
        self.compute.kernel_id()
    }
}

impl std::fmt::Display for Effective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.instead_of {
            None => self.compute.fmt(f),
            Some(wanted) => write!(f, "{} (no {wanted} dot products here)", self.compute),
        }
    }
}
