//! Tokens that are numbers: rows are made of the number alone, so that a row that is lost, doubled or in the wrong place changes every
//! answer that sees it.

use attnd_client::{Causal, Dims, Dtype, Operands};
use attnd_kernel::{AttnShape, Kernels};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::cases::{Answer, Case, Data};

/// Dimensions of a sequence of tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenShape {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
}

impl TokenShape {
    /// K and V of tokens, `[kv_heads, tokens, dim]`, f32.
    pub(crate) fn rows(&self, tokens: &[u64]) -> [Bytes; 2] {
        [0, 1].map(|tensor| self.of_heads(self.kv_heads, tensor, tokens))
    }

    /// Q of tokens, `[heads, tokens, dim]`, f32.
    pub(crate) fn queries(&self, tokens: &[u64]) -> Bytes {
        self.of_heads(self.heads, 2, tokens)
    }

    fn of_heads(&self, heads: usize, tensor: u64, tokens: &[u64]) -> Bytes {
        let mut floats = Vec::with_capacity(heads * tokens.len() * self.dim);
        for head in 0..heads as u64 {
            for token in tokens {
                let seed = token.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (head << 2 | tensor);
                let mut rng = SmallRng::seed_from_u64(seed);
                floats.extend((0..self.dim).map(|_| rng.random_range(-1.0..1.0_f32)));
            }
        }
        attnd_wire::floats::into_bytes(floats)
    }

    /// What the queries of `asked` see of `tokens`, the last of them at the last one.
    pub(crate) fn answer(&self, tokens: &[u64], asked: &[u64], scale: f32) -> Answer {
        let dims = Dims {
            batch: 1,
            heads: self.heads as u64,
            kv_heads: self.kv_heads as u64,
            queries: asked.len() as u64,
            keys: tokens.len() as u64,
            head_dim: self.dim as u64,
            value_dim: self.dim as u64,
        };
        let shape = AttnShape::new(dims).expect("a shape");
        let [k, v] = self.rows(tokens);
        let operands = Operands { shape, dtype: Dtype::F32, q: self.queries(asked), k, v };
        Case::of(Data::Normal, Causal::BottomRight, scale, operands).compute(Kernels::available()[0])
    }
}
