//! One kv group as it arrives: runs of bytes of its query heads, its keys and its values, in any cut, become Q in f32
//! and resident pages of the type that was sent, which kernels widen exactly. Keys of which a score function makes others
//! wait as they were sent, see [`super::keys`].
//!
//! The runs of a head come in ascending order. Of K and V only the pages of the group's slots come, so the next
//! expected byte is known at every moment and a run that starts anywhere else is refused. Whole pages are packed
//! straight from the message; only a page (or a query row) that is cut by a message boundary is staged.

use std::ops::Range;

use attnd_kernel::slot::keys_in_slots;
use attnd_kernel::{AttnShape, Dtype, KvHead, NonFinite, OutOfMemory, first_non_finite, widen};
use attnd_plan::{Residency, Tensor};
use attnd_wire::ComputeBegin;

use self::pages::{Pages, Refusal};
use self::rows::Rows;
use super::keys::SentKeys;

mod pages;
mod rows;

/// What every group of a call has in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Layout {
    pub(crate) shape: AttnShape,
    pub(crate) dtype: Dtype,
    pub(crate) check_finite: bool,
    pub(crate) residency: Residency,
}

impl Layout {
    /// That of a call.
    pub(crate) fn new(begin: &ComputeBegin) -> Self {
        let &ComputeBegin { shape, dtype, allow_non_finite, ref operator, .. } = begin;
        let residency = Residency::new(shape, dtype, operator);
        Self { shape, dtype, check_finite: !allow_non_finite, residency }
    }

    /// Reserves the pages of one group's slots.
    fn pages(&self, slots: Range<usize>) -> Result<KvHead, OutOfMemory> {
        let (n_keys, value_dim) = (self.shape.n_keys(), self.shape.value_dim());
        KvHead::with_storage(n_keys, self.residency.key_dim(), value_dim, slots, self.residency.storage())
    }
}

/// Why a run of bytes is refused. The group can't be completed any more.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub(crate) enum AssemblyError {
    /// The head is not one of this group.
    #[error("{tensor} head {head} is not expected here")]
    Head { tensor: Tensor, head: usize },
    /// The run starts elsewhere than the one before it ended, or goes on after the last expected byte.
    #[error("{tensor} head {head}: expected offset {expected}, got {got}")]
    Offset { tensor: Tensor, head: usize, expected: u64, got: u64 },
    /// A NaN or an infinity where finite values were promised.
    #[error("{tensor} head {head} {found}")]
    NonFinite { tensor: Tensor, head: usize, found: NonFinite },
    /// The system has no memory left for this group.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// A kv group whose operands are all here.
#[derive(Debug)]
pub(crate) struct Operands {
    /// `[group_size, n_queries, query_dim]`.
    pub(crate) q: Vec<f32>,
    /// Without keys where `sent_keys` has them, and without any where they and values are to be made of rows.
    pub(crate) kv: KvHead,
    /// Keys that become others.
    pub(crate) sent_keys: Option<SentKeys>,
}

/// The keys and values of a kv group as they become resident, page by page.
#[derive(Debug)]
pub(crate) struct ResidentKv {
    layout: Layout,
    group: usize,
    slots: Range<usize>,
    /// Without keys where `sent_keys` has them.
    pub(crate) pages: KvHead,
    /// Keys that become others, once all are here.
    pub(crate) sent_keys: Option<SentKeys>,
}

impl ResidentKv {
    /// Room for the pages of these slots.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub(crate) fn new(layout: Layout, group: usize, slots: Range<usize>) -> Result<Self, OutOfMemory> {
        let pages = layout.pages(slots.clone())?;
        let sent_keys = layout.residency.transforms_keys().then(|| SentKeys::new(&layout));
        Ok(Self { layout, group, slots, pages, sent_keys })
    }

    /// Writes the rows of a page, whole, as they were sent. Keys come in ascending order.
    ///
    /// # Errors
    /// [`AssemblyError::NonFinite`] where finite numbers were promised, and [`AssemblyError::OutOfMemory`].
    pub(crate) fn write(&mut self, tensor: Tensor, page: usize, rows: &[u8]) -> Result<(), AssemblyError> {
        let Layout { shape, dtype, check_finite, .. } = self.layout;
        let (head, kv) = (self.group, &mut self.pages);
        let non_finite = |found| AssemblyError::NonFinite { tensor, head, found };
        if shape.value_is_key_prefix() && tensor == Tensor::K {
            let (row_bytes, bytes) = (shape.head_dim() * dtype.size(), shape.value_dim() * dtype.size());
            let mut values = Vec::with_capacity(rows.len() / row_bytes * bytes);
            rows.chunks(row_bytes).for_each(|row| values.extend_from_slice(&row[..bytes]));
            // It is the key's number, too.
            kv.write_v(page, &values, dtype, check_finite).map_err(non_finite)?;
        }
        match (tensor, &mut self.sent_keys) {
            (Tensor::K, Some(sent)) => sent.take(head, page, rows, &self.slots),
            (Tensor::K, None) => kv.write_k(page, rows, dtype, check_finite).map_err(non_finite),
            (Tensor::Q | Tensor::V, _) => kv.write_v(page, rows, dtype, check_finite).map_err(non_finite),
        }
    }
}

/// A kv group on its way in.
#[derive(Debug)]
pub(crate) struct GroupAssembly {
    layout: Layout,
    group: usize,
    slots: Range<usize>,
    /// Reserved on the first byte of Q, so that groups whose turn is later take nothing yet.
    q: Vec<f32>,
    q_heads: Vec<Rows>,
    /// Created on the first byte of K or V.
    kv: Option<ResidentKv>,
    /// Of keys, and of values, that are sent.
    k: Option<Pages>,
    v: Option<Pages>,
}

impl GroupAssembly {
    pub(crate) fn new(layout: Layout, group: usize, slots: Range<usize>) -> Self {
        let shape = &layout.shape;
        let element = layout.dtype.size();
        let pages = |dim: usize| Pages::new(shape.n_keys(), slots.clone(), dim * element);
        let rows = Rows::new(shape.query_dim() * element);
        Self {
            layout,
            group,
            q: Vec::new(),
            q_heads: vec![rows; shape.group_size()],
            kv: None,
            k: (!shape.kv_is_projected()).then(|| pages(shape.head_dim())),
            v: (!shape.value_is_key_prefix() && !shape.kv_is_projected()).then(|| pages(shape.value_dim())),
            slots,
        }
    }

    /// Memory that a group takes until it is computed, in bytes. Staging is left out: it is at most a page per tensor,
    /// of the one group whose bytes arrive.
    pub(crate) fn bytes_needed(layout: &Layout, slots: &Range<usize>) -> u64 {
        layout.residency.group_bytes(slots)
    }

    /// Bytes that have to arrive for a group, as they are on the wire.
    pub(crate) fn bytes_expected(layout: &Layout, slots: &Range<usize>) -> u64 {
        let shape = &layout.shape;
        let keys = keys_in_slots(slots.clone(), shape.n_keys()) as u64;
        let q = (shape.group_size() * shape.n_queries()) as u64 * shape.query_dim() as u64;
        let sent = Tensor::K.layout(shape).2 + Tensor::V.layout(shape).2;
        (q + keys * sent as u64) * layout.dtype.size() as u64
    }

    /// Takes the next run of one head: `data` starts `offset` bytes into the head's `[tokens, dim]` matrix.
    pub(crate) fn accept(
        &mut self,
        tensor: Tensor,
        head: usize,
        offset: u64,
        data: &[u8],
    ) -> Result<(), AssemblyError> {
        match tensor {
            Tensor::Q => self.accept_q(head, offset, data),
            Tensor::K | Tensor::V if head != self.group => Err(AssemblyError::Head { tensor, head }),
            Tensor::K | Tensor::V => self.accept_kv(tensor, offset, data),
        }
    }

    fn accept_q(&mut self, head: usize, offset: u64, data: &[u8]) -> Result<(), AssemblyError> {
        let tensor = Tensor::Q;
        let Layout { shape, dtype, check_finite, .. } = self.layout;
        let (group_size, n_queries, dim) = (shape.group_size(), shape.n_queries(), shape.query_dim());
        let in_group = head.checked_sub(self.group * group_size).filter(|h| *h < group_size);
        let in_group = in_group.ok_or(AssemblyError::Head { tensor, head })?;
        if self.q.is_empty() {
            let floats = group_size * n_queries * dim;
            let refused = |_full| OutOfMemory { bytes: floats as u64 * 4 };
            self.q.try_reserve_exact(floats).map_err(refused)?;
            self.q.resize(floats, 0.0);
        }
        let out = &mut self.q[in_group * n_queries * dim..][..n_queries * dim];
        let rows = &mut self.q_heads[in_group];
        let expected = rows.position();
        let end = (n_queries * rows.row_bytes) as u64;
        if offset != expected || data.len() as u64 > end - expected {
            return Err(AssemblyError::Offset { tensor, head, expected, got: offset });
        }
        rows.take(data, |first_row, bytes| {
            let values = &mut out[first_row * dim..][..bytes.len() / dtype.size()];
            widen(bytes, dtype, values);
            match first_non_finite(values).filter(|_| check_finite) {
                Some(at) => {
                    let found = NonFinite { token: first_row + at / dim, dim: at % dim, value: values[at] };
                    Err(AssemblyError::NonFinite { tensor, head, found })
                }
                None => Ok(()),
            }
        })
    }

    fn accept_kv(&mut self, tensor: Tensor, offset: u64, data: &[u8]) -> Result<(), AssemblyError> {
        let head = self.group;
        let kv = match &mut self.kv {
            Some(kv) => kv,
            None => self.kv.insert(ResidentKv::new(self.layout, head, self.slots.clone())?),
        };
        let pages = match tensor {
            Tensor::V => &mut self.v,
            Tensor::Q | Tensor::K => &mut self.k,
        };
        let pages = match pages {
            Some(pages) => pages,
            None if data.is_empty() => return Ok(()),
            None => return Err(AssemblyError::Offset { tensor, head, expected: 0, got: offset }),
        };
        pages.take(offset, data, |page, rows| kv.write(tensor, page, rows)).map_err(|error| match error {
            Refusal::Offset { expected, got } => AssemblyError::Offset { tensor, head, expected, got },
            Refusal::Page(error) => error,
        })
    }

    /// Whether every byte is here.
    pub(crate) fn is_complete(&self) -> bool {
        let n_queries = self.layout.shape.n_queries();
        let sent = [&self.k, &self.v].into_iter().flatten();
        sent.into_iter().all(Pages::is_complete) && self.q_heads.iter().all(|rows| rows.done == n_queries)
    }

    /// The operands, once complete.
    ///
    /// # Errors
    /// If the system has no memory for keys and values of which no byte came: those that are made here, or of slots without a key.
    pub(crate) fn finish(self) -> Option<Result<Operands, OutOfMemory>> {
        self.is_complete().then_some(())?;
        let kv = self.kv.map_or_else(|| ResidentKv::new(self.layout, self.group, self.slots), Ok);
        Some(kv.map(|kv| Operands { q: self.q, kv: kv.pages, sent_keys: kv.sent_keys }))
    }
}

#[cfg(test)]
mod tests {
    use attnd_kernel::slot::{PAGE_KEYS, n_pages, slot_of_page};
    use attnd_kernel::{Causal, Dims, Effective, GroupCall, Kernels, Operator, Side, attend_node, slot};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn layout(dtype: Dtype) -> Layout {
        let dims =
            Dims { batch: 1, heads: 4, kv_heads: 2, queries: 5, keys: 1900, head_dim: 3, value_dim: 2 };
        let shape = AttnShape::new(dims).unwrap();
        let residency = Residency::new(shape, dtype, &Operator::plain(1.0, Causal::None));
        Layout { shape, dtype, check_finite: true, residency }
    }

    /// Bytes of one head; every element tells where it is.
    fn matrix(tokens: usize, dim: usize, salt: f32) -> Vec<u8> {
        (0..tokens * dim).flat_map(|i| ((i % 251) as f32 * 0.01 - salt).to_le_bytes()).collect()
    }

    /// The runs of a head's pages in `slots`.
    fn runs(bytes: &[u8], row: usize, n_keys: usize, slots: &Range<usize>) -> Vec<Range<usize>> {
        (0..n_pages(n_keys))
            .filter(|page| slots.contains(&slot_of_page(*page)))
            .map(|page| page * PAGE_KEYS * row..((page + 1) * PAGE_KEYS * row).min(bytes.len()))
            .collect()
    }

    fn feed(
        assembly: &mut GroupAssembly,
        tensor: Tensor,
        head: usize,
        bytes: &[u8],
        run: Range<usize>,
        rng: &mut StdRng,
    ) {
        let mut at = run.start;
        while at < run.end {
            let end = (at + rng.random_range(1..5000)).min(run.end);
            assembly.accept(tensor, head, at as u64, &bytes[at..end]).unwrap();
            at = end;
        }
    }

    #[test]
    fn any_cut_of_the_bytes_gives_the_same_operands() {
        let layout = layout(Dtype::F32);
        let (slots, group) = (8..48, 1);
        let q: Vec<Vec<u8>> = (0..4).map(|head| matrix(5, 3, head as f32)).collect();
        let (k, v) = (matrix(1900, 3, 0.5), matrix(1900, 2, 0.25));
        let kernels = Kernels::available()[0];
        let assemble = |seed: u64| {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut assembly = GroupAssembly::new(layout, group, slots.clone());
            for (tensor, head, bytes, row) in [
                (Tensor::V, 1, &v, 8),
                (Tensor::Q, 3, &q[3], 12),
                (Tensor::K, 1, &k, 12),
                (Tensor::Q, 2, &q[2], 12),
            ] {
                assert!(!assembly.is_complete());
                // A head of Q is one run, as if one page held all of it.
                let whole = std::iter::once(0..bytes.len()).collect();
                let runs = if tensor == Tensor::Q { whole } else { runs(bytes, row, 1900, &slots) };
                for run in runs {
                    feed(&mut assembly, tensor, head, bytes, run, &mut rng);
                }
            }
            let operands = assembly.finish().unwrap().unwrap();
            let call = GroupCall {
                shape: layout.shape,
                operator: &Operator::plain(1.0, Causal::None),
                group: 1,
                q: &operands.q,
                kv: &operands.kv,
                side: Side::default(),
                compute: Effective::F32,
            };
            let nodes = slot::cover(slots.clone()).into_iter();
            let partials: Vec<_> = nodes.map(|node| attend_node(kernels, &call, node, 0..5).0).collect();
            (operands.q.clone(), partials)
        };
        let first = assemble(1);
        assert_eq!(first.0[0].to_bits(), (-2.0_f32).to_bits(), "query heads 2 and 3 in order");
        assert_eq!(first.0[15].to_bits(), (-3.0_f32).to_bits());
        for seed in 2..8 {
            assert_eq!(assemble(seed), first, "seed {seed}");
        }
    }

    #[test]
    fn runs_out_of_order_are_refused_with_both_offsets() {
        let layout = layout(Dtype::F16);
        let mut assembly = GroupAssembly::new(layout, 0, 0..64);
        assembly.accept(Tensor::K, 0, 0, &[0; 100]).unwrap();
        for got in [0, 99, 101, u64::MAX] {
            let refused = assembly.accept(Tensor::K, 0, got, &[0; 2]).unwrap_err();
            assert_eq!(refused, AssemblyError::Offset { tensor: Tensor::K, head: 0, expected: 100, got });
        }
        let too_long = vec![0; 5 * 6 + 1];
        assert!(matches!(assembly.accept(Tensor::Q, 0, 0, &too_long), Err(AssemblyError::Offset { .. })));
        assert!(matches!(
            assembly.accept(Tensor::Q, 2, 0, &[0; 2]),
            Err(AssemblyError::Head { head: 2, .. })
        ));
        assert!(matches!(
            assembly.accept(Tensor::V, 1, 0, &[0; 2]),
            Err(AssemblyError::Head { head: 1, .. })
        ));
    }

    #[test]
    fn bytes_past_the_end_are_refused() {
        let mut assembly = GroupAssembly::new(layout(Dtype::F32), 0, 0..64);
        let v = matrix(1900, 2, 0.0);
        assembly.accept(Tensor::V, 0, 0, &v).unwrap();
        let end = v.len() as u64;
        let refused = assembly.accept(Tensor::V, 0, end, &[0; 4]).unwrap_err();
        assert_eq!(refused, AssemblyError::Offset { tensor: Tensor::V, head: 0, expected: end, got: end });
        assert!(assembly.finish().is_none(), "k and q are missing");
    }

    #[test]
    fn a_non_finite_element_is_named_wherever_the_cut_is() {
        let layout = layout(Dtype::F32);
        let mut bytes = matrix(5, 3, 0.0);
        bytes[(4 * 3 + 2) * 4..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
        for cut in [1, 17, 48, 57, 58, 59] {
            let mut assembly = GroupAssembly::new(layout, 1, 0..64);
            assembly.accept(Tensor::Q, 3, 0, &bytes[..cut]).unwrap_or(());
            let refused = assembly.accept(Tensor::Q, 3, cut as u64, &bytes[cut..]).unwrap_err();
            let found = NonFinite { token: 4, dim: 2, value: f32::NEG_INFINITY };
            assert_eq!(
                refused,
                AssemblyError::NonFinite { tensor: Tensor::Q, head: 3, found },
                "cut at {cut}"
            );
        }
        let mut k = matrix(1900, 3, 0.0);
        k[(700 * 3 + 1) * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let mut assembly = GroupAssembly::new(layout, 1, 0..64);
        let refused = assembly.accept(Tensor::K, 1, 0, &k).unwrap_err();
        let AssemblyError::NonFinite { tensor: Tensor::K, head: 1, found } = refused else {
            panic!("{refused}")
        };
        assert_eq!((found.token, found.dim), (700, 1));
        assert!(found.value.is_nan());
    }

    #[test]
    fn values_that_are_the_first_of_keys_are_there_with_them() {
        let of_prefix = |layout: Layout| {
            let shape = layout.shape.with_values_from_keys().unwrap();
            let residency = Residency::new(shape, layout.dtype, &Operator::plain(1.0, Causal::None));
            Layout { shape, residency, ..layout }
        };
        let layout = layout(Dtype::F32);
        let k = matrix(1900, 3, 0.5);
        let v: Vec<u8> = k.chunks(12).flat_map(|row| &row[..8]).copied().collect();
        let q = matrix(5, 3, 2.0);
        let kernels = Kernels::available()[0];
        let partials = |layout: Layout, sends_values: bool| {
            let mut rng = StdRng::seed_from_u64(3);
            let mut assembly = GroupAssembly::new(layout, 0, 0..64);
            for head in 0..2 {
                assembly.accept(Tensor::Q, head, 0, &q).unwrap();
            }
            if sends_values {
                feed(&mut assembly, Tensor::V, 0, &v, 0..v.len(), &mut rng);
            } else {
                let refused = assembly.accept(Tensor::V, 0, 0, &v[..8]).unwrap_err();
                assert_eq!(refused.to_string(), "v head 0: expected offset 0, got 0");
            }
            assert!(!assembly.is_complete());
            feed(&mut assembly, Tensor::K, 0, &k, 0..k.len(), &mut rng);
            let Operands { q, kv, .. } = assembly.finish().unwrap().unwrap();
            let (operator, side) = (&Operator::plain(1.0, Causal::None), Side::default());
            let (shape, compute) = (layout.shape, Effective::F32);
            let call = GroupCall { shape, operator, group: 0, q: &q, kv: &kv, side, compute };
            attend_node(kernels, &call, slot::Node::ROOT, 0..5).0
        };
        assert_eq!(partials(of_prefix(layout), false), partials(layout, true));
        let bytes =
            [layout, of_prefix(layout)].map(|layout| GroupAssembly::bytes_expected(&layout, &(0..64)));
        assert_eq!(bytes[0] - bytes[1], 1900 * 2 * 4);
    }

    #[test]
    fn needs_are_known_before_a_byte_is_read() {
        let layout = layout(Dtype::F16);
        let all = GroupAssembly::bytes_expected(&layout, &(0..64));
        assert_eq!(all, (2 * 5 * 3 + 1900 * 5) * 2);
        // Eight pages, of which the three dimensions of a key take two words, and two keys share a row of 16 words.
        let kv = 8 * (256 * 2 + 128 * 16) * 4;
        assert_eq!(GroupAssembly::bytes_needed(&layout, &(0..64)), kv + 2 * 5 * 3 * 4);
    }
}
