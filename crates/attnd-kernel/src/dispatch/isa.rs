//! Names of instruction sets, and why one can't be had.

/// The environment variable that overrides the choice.
pub const ISA_VARIABLE: &str = "ATTND_ISA";

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// x86-64 with AVX-512 F and DQ.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// aarch64.
    Neon,
    /// Any CPU.
    Portable,
}

impl Isa {
    /// All of them, fastest first.
    pub const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Portable];

    /// Its name as `ATTND_ISA` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Isa {
    type Err = IsaError;
    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| IsaError::Unknown { name: name.chars().take(40).collect() })
    }
}

/// Why no kernels can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// No such instruction set.
    #[error("ATTND_ISA={name:?} is none of avx512, avx2, neon, portable; unset it to choose the fastest")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// This CPU lacks it.
    #[error(
        "{isa} needs instructions that this CPU lacks; it has {available}. ATTND_ISA chooses among these"
    )]
    Unsupported {
        /// What was asked for.
        isa: Isa,
        /// What there is, comma-separated.
        available: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_nonsense_is_refused() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        let error = "avx9".parse::<Isa>().unwrap_err();
        assert!(error.to_string().contains("avx512, avx2, neon, portable"), "{error}");
    }
}
