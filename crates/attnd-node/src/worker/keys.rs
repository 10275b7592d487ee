//! Keys of which a score function makes others: they wait as they were sent until all of their group are here, and are transformed then,
//! on the compute pool.

use std::ops::Range;

use attnd_kernel::slot::{PAGE_KEYS, keys_in_page, keys_in_slots};
use attnd_kernel::{Dtype, Kernels, KvHead, NonFinite, OutOfMemory, first_non_finite, widen};
use attnd_plan::Tensor;
use attnd_wire::{ComputeBegin, Error, Reason, floats};

use super::assembly::{AssemblyError, Layout};

/// Bytes of rows that are transformed at once, so that they are in a cache, and an answer that nobody wants is noticed soon.
const BATCH_BYTES: usize = 1 << 20;

/// The keys of a group as they were sent.
#[derive(Debug)]
pub(crate) struct SentKeys {
    layout: Layout,
    /// Which pages are here, ascending.
    pages: Vec<usize>,
    /// Their rows, one after the other.
    rows: Vec<u8>,
}

impl SentKeys {
    /// Nothing yet.
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { layout: *layout, pages: Vec::new(), rows: Vec::new() }
    }

    /// Takes the keys of the next page of these slots.
    ///
    /// # Errors
    /// [`AssemblyError::OutOfMemory`]; [`AssemblyError::NonFinite`] where finite numbers were promised, which is to be seen now: what
    /// becomes of others may look like a number.
    pub(crate) fn take(
        &mut self,
        head: usize,
        page: usize,
        rows: &[u8],
        slots: &Range<usize>,
    ) -> Result<(), AssemblyError> {
        let Layout { shape, dtype, check_finite, .. } = self.layout;
        let dim = shape.head_dim();
        if check_finite {
            let mut values = vec![0.0; rows.len() / dtype.size()];
            widen(rows, dtype, &mut values);
            if let Some(at) = first_non_finite(&values) {
                let token = page * PAGE_KEYS + at / dim;
                let found = NonFinite { token, dim: at % dim, value: values[at] };
                return Err(AssemblyError::NonFinite { tensor: Tensor::K, head, found });
            }
        }
        if self.rows.is_empty() {
            let bytes = keys_in_slots(slots.clone(), shape.n_keys()) * dim * dtype.size();
            let refused = |_full| OutOfMemory { bytes: bytes as u64 };
            self.rows.try_reserve_exact(bytes).map_err(refused)?;
        }
        self.rows.extend_from_slice(rows);
        self.pages.push(page);
        Ok(())
    }

    /// Writes what the operator makes of the keys into the pages of `kv`, on the current rayon pool.
    ///
    /// # Errors
    /// [`Reason::Cancelled`] once `wanted` says no.
    pub(crate) fn transform(
        self,
        kernels: &Kernels,
        begin: &ComputeBegin,
        group: usize,
        kv: &mut KvHead,
        wanted: impl Fn() -> bool,
    ) -> Result<(), Error> {
        let Layout { shape, dtype, residency, .. } = self.layout;
        let (dim, key_dim) = (shape.head_dim(), residency.key_dim());
        let page_bytes = PAGE_KEYS * (dim + key_dim) * size_of::<f32>();
        let at_once = (BATCH_BYTES / page_bytes).max(1);
        let (mut sent, mut rows) = (Vec::new(), Vec::new());
        let mut left = &self.rows[..];
        for pages in batches(&self.pages, at_once) {
            if !wanted() {
                return Err(Error::new(Reason::Cancelled, "nobody waits for the partials"));
            }
            let first = pages.start * PAGE_KEYS;
            let keys = first..shape.n_keys().min(pages.end * PAGE_KEYS);
            let bytes;
            (bytes, left) = left.split_at(keys.len() * dim * dtype.size());
            sent.resize(keys.len() * dim, 0.0);
            rows.resize(keys.len() * key_dim, 0.0);
            widen(bytes, dtype, &mut sent);
            begin.operator.key_rows(kernels, &shape, group, keys, &sent, &mut rows);
            for page in pages {
                let n = keys_in_page(page, shape.n_keys());
                let of_page = &rows[(page * PAGE_KEYS - first) * key_dim..][..n * key_dim];
                let written = kv.write_k(page, &floats::into_bytes(of_page.to_vec()), Dtype::F32, false);
                written
                    .map_err(|found| Error::new(Reason::Internal, format!("a transformed key {found}")))?;
            }
        }
        Ok(())
    }
}

/// Ascending pages as runs of consecutive ones, of `most` at most.
fn batches(pages: &[usize], most: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    for page in pages {
        match batches.last_mut() {
            Some(last) if last.end == *page && last.len() < most => last.end += 1,
            _ => batches.push(*page..page + 1),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use attnd_kernel::slot::{n_pages, slot_of_page};
    use attnd_kernel::{
        AttnShape, Causal, Dims, Effective, GroupCall, Operator, OperatorParts, Score, Side, attend_node,
        slot,
    };
    use attnd_plan::Sides;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn pages_come_in_runs_of_some() {
        assert_eq!(batches(&[0, 1, 2, 4, 5, 9], 2), [0..2, 2..3, 4..6, 9..10]);
        assert_eq!(batches(&[0, 1, 2], 4), batches(&[0, 1, 2], 3), "all in one");
        assert_eq!(batches(&[0, 1, 2], 3).len(), 1);
        assert!(batches(&[], 8).is_empty());
    }

    fn begin(dtype: Dtype) -> ComputeBegin {
        let dims =
            Dims { batch: 1, heads: 2, kv_heads: 2, queries: 3, keys: 2000, head_dim: 5, value_dim: 2 };
        let shape = AttnShape::new(dims).unwrap();
        let mut rng = StdRng::seed_from_u64(8);
        let mut tensor = |name: &str, shape: &[usize]| {
            let values = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
            attnd_kernel::Tensor { name: name.into(), shape: shape.into(), values }
        };
        let (w_q, w_k, v) = (tensor("w_q", &[7, 5]), tensor("w_k", &[2, 7, 5]), tensor("v", &[7]));
        let score = Score::new("additive", vec![v, w_q, w_k]).unwrap();
        let parts = OperatorParts { score, ..OperatorParts::plain(1.0, Causal::None) };
        ComputeBegin {
            call_id: 1,
            shape,
            dtype,
            operator: Arc::new(Operator::new(parts, &shape).unwrap()),
            outputs: None,
            sides: Sides::default(),
            allow_non_finite: false,
            pieces: Vec::new(),
            tokens_per_cell: 3,
        }
    }

    /// Whatever the slots and the batches are, a node has the bits that it has of keys that were transformed all at once.
    #[test]
    fn transformed_keys_are_those_of_the_whole() {
        let kernels = Kernels::from_env().unwrap();
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let begin = begin(dtype);
            let (shape, layout, group) = (begin.shape, Layout::new(&begin), 1);
            let mut rng = StdRng::seed_from_u64(9);
            let mut random = |n: usize| (0..n).map(|_| rng.random_range(-2.0..2.0_f32)).collect::<Vec<_>>();
            let (k, v, q) = (random(2000 * 5), random(2000 * 2), random(3 * 5));
            // The upper half of an f32 is a bf16.
            let skip = 4 - dtype.size();
            let bytes = |values: &[f32]| -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes().into_iter().skip(skip)).collect()
            };
            let mut widened = vec![0.0; k.len()];
            widen(&bytes(&k), dtype, &mut widened);
            let (key_dim, storage) = (layout.residency.key_dim(), layout.residency.storage());
            let resident = |slots: Range<usize>, whole: bool| {
                let mut kv = KvHead::with_storage(2000, key_dim, 2, slots.clone(), storage).unwrap();
                let mut sent = SentKeys::new(&layout);
                for page in (0..n_pages(2000)).filter(|page| slots.contains(&slot_of_page(*page))) {
                    let keys = page * PAGE_KEYS..page * PAGE_KEYS + keys_in_page(page, 2000);
                    let of_page = |x: &[f32], dim: usize| bytes(&x[keys.start * dim..keys.end * dim]);
                    kv.write_v(page, &of_page(&v, 2), dtype, true).unwrap();
                    sent.take(group, page, &of_page(&k, 5), &slots).unwrap();
                    if whole {
                        let mut rows = vec![0.0; 2000 * key_dim];
                        begin.operator.key_rows(kernels, &shape, group, 0..2000, &widened, &mut rows);
                        let of_page = rows[keys.start * key_dim..keys.end * key_dim].to_vec();
                        kv.write_k(page, &floats::into_bytes(of_page), Dtype::F32, true).unwrap();
                    }
                }
                if !whole {
                    sent.transform(kernels, &begin, group, &mut kv, || true).unwrap();
                }
                kv
            };
            for slots in [0..64, 0..32, 10..50] {
                let partials = |kv: &KvHead| {
                    let operator = &begin.operator;
                    let (side, compute) = (Side::default(), Effective::F32);
                    let call = GroupCall { shape, operator, group, q: &q, kv, side, compute };
                    let nodes = slot::cover(slots.clone()).into_iter();
                    nodes.map(|node| attend_node(kernels, &call, node, 0..3).0).collect::<Vec<_>>()
                };
                let [whole, cut] = [true, false].map(|whole| partials(&resident(slots.clone(), whole)));
                assert!(whole == cut, "{dtype}, slots {slots:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_named_and_nothing_is_computed_that_nobody_wants() {
        let begin = begin(Dtype::F32);
        let layout = Layout::new(&begin);
        let mut rows = vec![0; 256 * 5 * 4];
        rows[(7 * 5 + 3) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut sent = SentKeys::new(&layout);
        let refused = sent.take(1, 2, &rows, &(0..64)).unwrap_err();
        assert_eq!(refused.to_string(), "k head 1 [pos=519,i=3] NaN");
        let mut lenient = SentKeys::new(&Layout { check_finite: false, ..layout });
        lenient.take(1, 2, &rows, &(0..64)).unwrap();
        let mut kv =
            KvHead::with_storage(2000, layout.residency.key_dim(), 2, 0..64, layout.residency.storage())
                .unwrap();
        let refused = lenient.transform(Kernels::from_env().unwrap(), &begin, 1, &mut kv, || false);
        assert_eq!(refused.unwrap_err().reason, Reason::Cancelled);
    }
}
