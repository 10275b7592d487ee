//! The cases, as data: shapes that say something about the kernels, and how much work each of them is.

use attnd_kernel::{
    AttnShape, Causal, Compute, Dims, Mask, Operator, OperatorParts, ShapeError, Storage, Window,
};

use crate::exit::BadInput;

/// How many threads a case runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Team {
    /// One, pinned to its core.
    One,
    /// All that the run may use.
    All,
}

/// What the hardware runs out of first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Multiply-adds: prefill. Rates are GFLOP/s.
    Fma,
    /// Memory bandwidth: decode. Rates are GB/s of keys and values.
    Read,
}

impl Bound {
    /// The unit of its rates.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Fma => "GFLOP/s",
            Self::Read => "GB/s",
        }
    }
}

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Case {
    /// For people, `--case` and `--compare`; with `team` it names one case.
    pub name: &'static str,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads.
    pub kv_heads: u64,
    /// Query tokens.
    pub queries: u64,
    /// Key tokens.
    pub keys: u64,
    /// Dimension of queries and keys.
    pub head_dim: u64,
    /// Dimension of values.
    pub value_dim: u64,
    /// Which keys a query sees.
    pub causal: Causal,
    /// How many keys before its position a query sees beside the one at it, if not all.
    pub window: Option<usize>,
    /// How keys and values are stored.
    pub storage: Storage,
    /// In what arithmetic, where the kernels have it.
    pub compute: Compute,
    /// Threads.
    pub team: Team,
}

/// All cases. Neighbours of one shape share their operands; those of decode hold 256 MiB of keys and values, more than
/// any cache of a core. (A last-level cache of that size holds the calibration's buffer as well.)
pub const CASES: &[Case] = &[
    prefill("prefill T=2048 d=128", 1, 1, 2048, 128, Causal::None, Team::One),
    prefill("prefill T=2048 d=64", 1, 1, 2048, 64, Causal::None, Team::One),
    prefill("prefill T=2048 d=256", 1, 1, 2048, 256, Causal::None, Team::One),
    prefill("causal T=4096 d=128 H=8/2", 8, 2, 4096, 128, Causal::BottomRight, Team::One),
    prefill("causal T=4096 d=128 H=8/2", 8, 2, 4096, 128, Causal::BottomRight, Team::All),
    prefill("causal T=65536 d=128, window 4096", 1, 1, 65_536, 128, Causal::BottomRight, Team::One)
        .windowed(4096),
    prefill("prefill T=2048 d=128 H=8", 8, 8, 2048, 128, Causal::None, Team::One),
    prefill("prefill T=2048 d=128 H=8", 8, 8, 2048, 128, Causal::None, Team::All),
    decode("decode T=32768 d=128 H=8", 8, 8, 32_768, 128, Team::One),
    decode("decode T=32768 d=128 H=8", 8, 8, 32_768, 128, Team::All),
    decode("decode T=32768 d=128 H=32/8", 32, 8, 32_768, 128, Team::One),
    decode("decode T=32768 d=128 H=32/8", 32, 8, 32_768, 128, Team::All),
    decode("decode T=65536 d=64 H=32/8", 32, 8, 65_536, 64, Team::One),
    decode("decode T=65536 d=64 H=32/8", 32, 8, 65_536, 64, Team::All),
    prefill("prefill T=2048 d=128 bf16", 1, 1, 2048, 128, Causal::None, Team::One).stored(Storage::Bf16),
    prefill("prefill T=2048 d=128 bf16 dots", 1, 1, 2048, 128, Causal::None, Team::One).in_bf16(),
    prefill("prefill T=2048 d=64 bf16 dots", 1, 1, 2048, 64, Causal::None, Team::One).in_bf16(),
    prefill("causal T=4096 d=128 H=8/2 bf16 dots", 8, 2, 4096, 128, Causal::BottomRight, Team::One).in_bf16(),
    decode("decode T=65536 d=128 H=8 bf16", 8, 8, 65_536, 128, Team::One).stored(Storage::Bf16),
    decode("decode T=65536 d=128 H=32/8 bf16", 32, 8, 65_536, 128, Team::One).stored(Storage::Bf16),
    decode("decode T=65536 d=128 H=32/8 bf16", 32, 8, 65_536, 128, Team::All).stored(Storage::Bf16),
    decode("decode T=65536 d=128 H=8 bf16 dots", 8, 8, 65_536, 128, Team::One).in_bf16(),
    decode("decode T=65536 d=128 H=32/8 bf16 dots", 32, 8, 65_536, 128, Team::One).in_bf16(),
    decode("decode T=65536 d=128 H=32/8 bf16 dots", 32, 8, 65_536, 128, Team::All).in_bf16(),
    decode("decode T=65536 d=128 H=8 f16", 8, 8, 65_536, 128, Team::One).stored(Storage::F16),
    decode("decode T=65536 d=128 H=32/8 f16", 32, 8, 65_536, 128, Team::One).stored(Storage::F16),
    decode("decode T=131072 d=128 H=8 int8", 8, 8, 131_072, 128, Team::One).stored(Storage::Int8),
    decode("decode T=131072 d=128 H=32/8 int8", 32, 8, 131_072, 128, Team::One).stored(Storage::Int8),
    decode("decode T=131072 d=128 H=8 int8 dots", 8, 8, 131_072, 128, Team::One).in_int8(),
    decode("decode T=131072 d=128 H=32/8 int8 dots", 32, 8, 131_072, 128, Team::One).in_int8(),
    decode("decode T=131072 d=128 H=32/8 int8 dots", 32, 8, 131_072, 128, Team::All).in_int8(),
    decode("decode T=262144 d=128 H=32/8 int4", 32, 8, 262_144, 128, Team::One).stored(Storage::Int4),
];

const fn prefill(
    name: &'static str,
    heads: u64,
    kv_heads: u64,
    tokens: u64,
    dim: u64,
    causal: Causal,
    team: Team,
) -> Case {
    Case {
        name,
        heads,
        kv_heads,
        queries: tokens,
        keys: tokens,
        head_dim: dim,
        value_dim: dim,
        causal,
        window: None,
        storage: Storage::F32,
        compute: Compute::F32,
        team,
    }
}

const fn decode(name: &'static str, heads: u64, kv_heads: u64, keys: u64, dim: u64, team: Team) -> Case {
    let causal = Causal::None;
    Case {
        name,
        heads,
        kv_heads,
        queries: 1,
        keys,
        head_dim: dim,
        value_dim: dim,
        causal,
        window: None,
        storage: Storage::F32,
        compute: Compute::F32,
        team,
    }
}

impl Case {
    /// The same where a query sees its own key and `keys` before it, at most.
    const fn windowed(self, keys: usize) -> Self {
        Self { window: Some(keys), ..self }
    }

    /// The same with keys and values stored otherwise.
    const fn stored(self, storage: Storage) -> Self {
        Self { storage, ..self }
    }

    /// The same stored as bf16 and computed by its dot products.
    pub const fn in_bf16(self) -> Self {
        Self { storage: Storage::Bf16, compute: Compute::Bf16, ..self }
    }

    /// The same stored as int8 and computed by its dot products.
    const fn in_int8(self) -> Self {
        Self { storage: Storage::Int8, compute: Compute::Int8, ..self }
    }

    /// Its dimensions, validated.
    ///
    /// # Errors
    /// If they are no attention shape.
    pub fn shape(&self) -> Result<AttnShape, ShapeError> {
        AttnShape::new(Dims {
            batch: 1,
            heads: self.heads,
            kv_heads: self.kv_heads,
            queries: self.queries,
            keys: self.keys,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
        })
    }

    /// Which keys a query sees.
    pub fn mask(&self) -> Mask {
        Mask { window: Window { left: self.window, right: None }, ..self.causal.into() }
    }

    /// What the kernels are asked for.
    ///
    /// # Errors
    /// If its dimensions are no attention shape, or its window has no positions.
    pub fn operator(&self) -> anyhow::Result<Operator> {
        let scale = (self.head_dim as f32).sqrt().recip();
        let parts = OperatorParts { mask: self.mask(), ..OperatorParts::plain(scale, Causal::None) };
        Ok(Operator::new(parts, &self.shape()?)?)
    }

    /// What limits it: one query token reads each key for one group of rows, many compute.
    pub fn bound(&self) -> Bound {
        if self.queries == 1 { Bound::Read } else { Bound::Fma }
    }

    /// Useful floating-point operations: a multiply and an add per dimension for each score and each weighed value
    /// of a key that is visible. What a kernel computes beside the diagonal and throws away doesn't count, nor does
    /// softmax.
    ///
    /// # Errors
    /// As [`Self::shape`].
    pub fn flops(&self) -> Result<f64, ShapeError> {
        let shape = self.shape()?;
        let mask = self.mask();
        let mask = mask.of_batch(0, &shape);
        let visible: usize = (0..shape.n_queries()).map(|token| mask.visible(token).len()).sum();
        Ok(2.0 * self.heads as f64 * visible as f64 * (self.head_dim + self.value_dim) as f64)
    }

    /// Bytes of keys and values as stored, scales included, each of which a call has to read at least once.
    pub fn kv_bytes(&self) -> u64 {
        let bits = (self.head_dim + self.value_dim) * (32 / self.storage.per_word() as u64);
        let scales = if self.storage.has_scales() { 2 * size_of::<f32>() as u64 } else { 0 };
        self.kv_heads * self.keys * (bits / 8 + scales)
    }

    /// The work that its bound is about: floating-point operations, or bytes.
    ///
    /// # Errors
    /// As [`Self::shape`].
    pub fn work(&self) -> Result<f64, ShapeError> {
        match self.bound() {
            Bound::Fma => self.flops(),
            Bound::Read => Ok(self.kv_bytes() as f64),
        }
    }

    /// Whether two cases have the same operands.
    pub fn same_operands(&self, other: &Self) -> bool {
        let Self { name, team, causal, window, compute, .. } = *self;
        Self { name, team, causal, window, compute, ..*other } == *self
    }
}

/// The cases whose name contains `part`, without those for several threads where there is only one.
///
/// # Errors
/// [`BadInput`] if there are none.
pub fn chosen(part: Option<&str>, threads: usize) -> Result<Vec<Case>, BadInput> {
    let part = part.unwrap_or_default();
    let named: Vec<Case> = CASES.iter().filter(|case| case.name.contains(part)).copied().collect();
    if named.is_empty() {
        let mut names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        names.dedup();
        return Err(BadInput::new(format!("--case '{part}' is in no name; there are: {}", names.join(", "))));
    }
    Ok(named.into_iter().filter(|case| case.team == Team::One || threads > 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_visible_keys_are_useful_work() {
        let full = prefill("", 8, 2, 4, 16, Causal::None, Team::One);
        // 8 heads, 4 x 4 scores, 16 multiply-adds for the score and 16 for the value.
        assert_eq!(full.flops().unwrap(), f64::from(8 * 16 * 2 * (16 + 16)));
        let causal = Case { causal: Causal::BottomRight, ..full };
        assert_eq!(causal.flops().unwrap(), f64::from(8 * (1 + 2 + 3 + 4) * 2 * (16 + 16)));
        assert_eq!(causal.windowed(1).flops().unwrap(), f64::from(8 * (1 + 2 + 2 + 2) * 2 * (16 + 16)));
        assert_eq!(full.bound(), Bound::Fma);
        assert_eq!(full.work().unwrap(), full.flops().unwrap());
    }

    #[test]
    fn decode_reads_keys_and_values_of_each_kv_head_once() {
        let case = decode("", 32, 8, 1000, 64, Team::One);
        assert_eq!(case.kv_bytes(), 8 * 1000 * (64 + 64) * 4);
        assert_eq!(case.work().unwrap(), case.kv_bytes() as f64);
        let narrow = Case { value_dim: 32, ..case };
        assert_eq!(narrow.kv_bytes(), 8 * 1000 * (64 + 32) * 4);
        assert_eq!(narrow.stored(Storage::Bf16).kv_bytes(), 8 * 1000 * (64 + 32) * 2);
        assert_eq!(narrow.stored(Storage::Int8).kv_bytes(), 8 * 1000 * (64 + 32 + 8));
        assert_eq!(narrow.stored(Storage::Int4).kv_bytes(), 8 * 1000 * (32 + 16 + 8));
        assert_eq!(narrow.flops().unwrap(), f64::from(32 * 1000 * 2 * (64 + 32)));
    }

    #[test]
    fn the_table_is_sound() {
        for (i, case) in CASES.iter().enumerate() {
            assert!(case.operator().is_ok(), "{}", case.name);
            let needed = case.compute.storage().unwrap_or(case.storage);
            assert_eq!(needed, case.storage, "{}", case.name);
            assert!(case.bound() == Bound::Fma || case.kv_bytes() >= 256 << 20, "{} is too small", case.name);
            let others = &CASES[..i];
            assert!(
                !others.iter().any(|o| (o.name, o.team) == (case.name, case.team)),
                "{} twice",
                case.name
            );
            let same = others.iter().filter(|other| other.name == case.name);
            assert!(same.clone().all(|other| other.same_operands(case) && other.mask() == case.mask()));
        }
    }

    #[test]
    fn cases_are_chosen_by_a_part_of_their_name() {
        assert_eq!(chosen(None, 2).unwrap(), CASES);
        assert!(chosen(None, 1).unwrap().iter().all(|case| case.team == Team::One));
        let gqa = chosen(Some("H=32/8"), 2).unwrap();
        assert!(!gqa.is_empty() && gqa.iter().all(|case| case.heads == 32));
        let error = chosen(Some("Prefill"), 2).unwrap_err().to_string();
        assert!(error.contains("there are: prefill T=2048 d=128, "), "{error}");
    }
}
