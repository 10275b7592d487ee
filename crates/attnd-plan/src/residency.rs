//! What a call's operands take in the memory of workers: the one account of it, by which the planner counts, and workers reserve.

use std::ops::Range;

use attnd_kernel::slot::{self, N_SLOTS, PAGE_KEYS};
use attnd_kernel::{AttnShape, Bias, Dtype, KvHead, Operator, Storage};

/// How keys, values and queries of a call are resident. Cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    shape: AttnShape,
    /// Elements of a key.
    key_dim: usize,
    /// In which type keys and values are.
    storage: Storage,
    /// Bytes of an element of a key as it is sent, where such keys are transformed once all of a group are here.
    sent_bytes: Option<usize>,
    /// Elements of a query that is made of one that was sent.
    made_queries: usize,
    /// Bytes of the operator's own tensors, as they are sent.
    operator_bytes: u64,
    /// The same as they are sent and as kernels read them.
    of_share: u64,
}

impl Residency {
    /// That of a call of `shape` whose operands are sent as `dtype`, with an operator that was made for the shape.
    pub fn new(shape: AttnShape, dtype: Dtype, operator: &Operator) -> Self {
        let lists = operator.csr().map_or(0, |csr| csr.row_ptr().len() + csr.columns().len());
        let tables = operator.biases().iter().map(|bias| match bias {
            Bias::Dense | Bias::Alibi { .. } => 0,
            Bias::Relative(relative) => relative.table().len(),
            Bias::Swin(swin) => swin.table.len() + swin.shift.as_ref().map_or(0, |shift| shift.regions.len()),
        });
        let elements = lists + tables.sum::<usize>();
        let parameters: usize =
            operator.score().parameters().iter().map(|parameter| parameter.values.len()).sum();
        Self {
            shape,
            key_dim: operator.key_dim(&shape),
            storage: operator.storage(dtype.into()),
            sent_bytes: (!operator.keeps_keys() && !shape.kv_is_projected()).then_some(dtype.size()),
            made_queries: if operator.keeps_queries() { 0 } else { operator.packed_dim(&shape) },
            operator_bytes: 4 * (elements + parameters) as u64,
            of_share: operator.score_bytes() + 4 * elements as u64,
        }
    }

    /// Elements of a resident key.
    pub fn key_dim(&self) -> usize {
        self.key_dim
    }

    /// In which type keys and values are resident.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Whether keys wait, as they are sent, until all of a group are here, and become others then.
    pub fn transforms_keys(&self) -> bool {
        self.sent_bytes.is_some()
    }

    /// Bytes of a page of keys and values, and of its keys as they are sent where both are there at once.
    pub(crate) fn page_bytes(&self) -> u64 {
        let (key_dim, value_dim) = (self.key_dim, self.shape.value_dim());
        let resident = KvHead::bytes_needed(PAGE_KEYS, key_dim, value_dim, &(0..N_SLOTS), self.storage);
        let sent = self.sent_bytes.map_or(0, |bytes| PAGE_KEYS * self.shape.head_dim() * bytes);
        resident + sent as u64
    }

    /// Bytes of the queries of a kv group, which are f32.
    pub(crate) fn query_bytes(&self) -> u64 {
        (self.shape.group_size() * self.shape.n_queries()) as u64 * self.shape.query_dim() as u64 * 4
    }

    /// Bytes of the operands of a kv group of which these slots are there.
    pub fn group_bytes(&self, slots: &Range<usize>) -> u64 {
        let pages: usize =
            slots.clone().map(|slot| slot::pages_of_slot(slot, self.shape.n_keys()).count()).sum();
        pages as u64 * self.page_bytes() + self.query_bytes()
    }

    /// Bytes of a cell of so many tokens: its partial, and the queries that are made for it.
    pub fn cell_bytes(&self, tokens: usize) -> u64 {
        let rows = (self.shape.group_size() * tokens) as u64;
        rows * (self.shape.value_dim() + 2 + self.made_queries) as u64 * 4
    }

    /// Bytes of the queries that are made for a cell while the second pass looks at it.
    pub fn inspected_bytes(&self, tokens: usize) -> u64 {
        (self.shape.group_size() * tokens) as u64 * self.made_queries as u64 * 4
    }

    /// Bytes of the operator's own tensors on the way to each worker.
    pub(crate) fn operator_bytes(&self) -> u64 {
        self.operator_bytes
    }

    /// Bytes that a worker takes once, however many groups it has.
    pub fn of_share(&self) -> u64 {
        self.of_share
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Causal, Dims, OperatorParts, Score, Tensor};

    use super::*;

    #[test]
    fn keys_that_become_others_are_there_twice() {
        let dims =
            Dims { batch: 1, heads: 2, kv_heads: 1, queries: 3, keys: 300, head_dim: 8, value_dim: 16 };
        let shape = AttnShape::new(dims).unwrap();
        let plain = Residency::new(shape, Dtype::F16, &Operator::plain(1.0, Causal::None));
        let queries = 2 * 3 * 8 * 4;
        assert!(!plain.transforms_keys());
        assert_eq!(plain.group_bytes(&(0..N_SLOTS)), 2 * 256 * (8 + 16) * 2 + queries);
        let w = |name: &str| Tensor { name: name.into(), shape: vec![32, 8], values: [0.5; 256].into() };
        let v = Tensor { name: "v".into(), shape: vec![32], values: [0.5; 32].into() };
        let score = Score::new("gatv2", vec![w("w_q"), w("w_k"), v]);
        let score = score.unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        let operator = Operator::new(parts, &shape).unwrap();
        let gatv2 = Residency::new(shape, Dtype::F16, &operator);
        assert!(gatv2.transforms_keys());
        assert_eq!((gatv2.key_dim(), gatv2.storage()), (32, Storage::F32));
        assert_eq!(gatv2.group_bytes(&(0..N_SLOTS)), 2 * 256 * ((32 + 16) * 4 + 8 * 2) + queries);
        // Both projections have room for 64 outputs.
        assert_eq!(gatv2.of_share(), 2 * (256 + 256 + 32) * 4 + 2 * 64 * 8 * 4);
        assert_eq!((plain.operator_bytes(), gatv2.operator_bytes()), (0, (256 + 256 + 32) * 4));
        assert_eq!(gatv2.cell_bytes(3), 2 * 3 * (16 + 2 + 32) * 4);
        assert_eq!((plain.cell_bytes(3), plain.inspected_bytes(3)), (2 * 3 * (16 + 2) * 4, 0));
        // The second page is in slot 32.
        assert_eq!(gatv2.group_bytes(&(0..32)), 256 * ((32 + 16) * 4 + 8 * 2) + queries);
        assert_eq!(gatv2.group_bytes(&(1..2)), queries);
    }
}
