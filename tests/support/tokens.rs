//! Rows of tokens, and what attention over them is, computed whole in this process.

use attnd_client::session::{OpenOptions, QueryOptions};
use attnd_client::{AttendOptions, Causal, Dims, Dtype, Operands};
use attnd_kernel::{AttnShape, Kernels};
use bytes::Bytes;

use super::cases::{Answer, Case, Data};

/// A token: whatever is the same number has the same rows.
pub(crate) type Token = u64;

/// What rows of a session look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowShape {
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
}

#[derive(Clone, Copy)]
enum What {
    Key,
    Value,
    Query,
}

/// Of both signs, from a half up to one: so bytes of rows are known by every fourth of them, and nothing else is taken for them.
fn number(mut at: u64) -> f32 {
    at = at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    at = (at ^ (at >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    at = (at ^ (at >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    at ^= at >> 31;
    let sign = u32::try_from(at >> 63).unwrap() << 31;
    f32::from_bits(sign | 0x3f00_0000 | u32::try_from(at & 0x7f_ffff).unwrap())
}

/// Whether a byte is the last one of a number of [`number`].
pub(crate) fn is_last_byte(byte: u8) -> bool {
    byte & 0x7f == 0x3f
}

impl RowShape {
    pub(crate) fn open(&self) -> OpenOptions {
        let mut open = OpenOptions::new(self.layers, self.heads, self.kv_heads, self.head_dim, Dtype::F32);
        open.spec.value_dim = self.value_dim;
        open
    }

    fn rows(&self, what: What, layer: usize, tokens: &[Token]) -> Bytes {
        let (heads, dim) = match what {
            What::Key => (self.kv_heads, self.head_dim),
            What::Value => (self.kv_heads, self.value_dim),
            What::Query => (self.heads, self.head_dim),
        };
        let mut bytes = Vec::with_capacity(heads * tokens.len() * dim * 4);
        for head in 0..heads {
            for token in tokens {
                for element in 0..dim {
                    let place = ((what as usize * 16 + layer) * 64 + head) * 64 + element;
                    let at = token.wrapping_mul(1 << 20).wrapping_add(place as u64);
                    bytes.extend_from_slice(&number(at).to_le_bytes());
                }
            }
        }
        bytes.into()
    }

    /// K and V.
    pub(crate) fn keys_and_values(&self, layer: usize, tokens: &[Token]) -> [Bytes; 2] {
        [self.rows(What::Key, layer, tokens), self.rows(What::Value, layer, tokens)]
    }

    pub(crate) fn queries(&self, layer: usize, tokens: &[Token]) -> Bytes {
        self.rows(What::Query, layer, tokens)
    }

    /// What queries of these tokens see of a layer whose tokens those are.
    pub(crate) fn answer(&self, layer: usize, keys: &[Token], queries: &[Token]) -> Answer {
        let dims = Dims {
            batch: 1,
            heads: self.heads as u64,
            kv_heads: self.kv_heads as u64,
            queries: queries.len() as u64,
            keys: keys.len() as u64,
            head_dim: self.head_dim as u64,
            value_dim: self.value_dim as u64,
        };
        let shape = AttnShape::new(dims).unwrap();
        let [k, v] = self.keys_and_values(layer, keys);
        let operands = Operands { shape, dtype: Dtype::F32, q: self.queries(layer, queries), k, v };
        let scale = (self.head_dim as f32).sqrt().recip();
        Case::of(Data::Normal, Causal::BottomRight, scale, operands).compute(Kernels::from_env().unwrap())
    }
}

/// How queries of tokens attend: causal, the last one sees everything.
pub(crate) fn query_options(at_len: Option<u64>) -> QueryOptions {
    let attend = AttendOptions { causal: Causal::BottomRight, ..AttendOptions::default() };
    QueryOptions { attend, at_len, ..QueryOptions::default() }
}
