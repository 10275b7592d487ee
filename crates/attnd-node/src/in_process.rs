//! One call on the threads of this process: no cluster, no messages, and the bits that a cluster would give.
//!
//! It is what a worker and a coordinator do, one after the other, with one share that has all keys: pages become resident, kernels
//! compute, rows merge and are divided, and a second pass tells what is wanted beside them. Whoever calls it has checked the call
//! (`attnd-client` does) and puts the answer together, which comes in the values of the wire.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use attnd_kernel::slot::{N_SLOTS, PAGE_KEYS, keys_in_page, n_pages};
use attnd_kernel::{
    AttnShape, Compute, ElementTile, EmptyRow, GroupCall, Kernels, KvHead, NodeReport, NonFinite, Outputs,
    RowSums, first_non_finite, inspect_node, widen,
};
use attnd_plan::{Piece, Ready, SideLayout, Tensor, filled_nodes};
use attnd_wire::{
    AttendReply, Begin, ComputeBegin, ContextChunk, Done, Error, MergedSums, Reason, operator, refusal,
};
use bytes::Bytes;
use rayon::prelude::*;

use crate::budget::Budget;
use crate::coordinator::attend_call::empty_rows;
use crate::coordinator::finish::{Checks, Merged, merge};
use crate::coordinator::heat_rows::HeatRows;
use crate::coordinator::second_pass::told;
use crate::coordinator::value_means::ValueMeans;
use crate::worker::assembly::{Layout, ResidentKv};
use crate::worker::cells::{checked, make_resident, with_call};
use crate::worker::second_pass::{elements_of, parts};
use crate::worker::side::{SideAssembly, SidePlanes, bytes_needed};
use crate::worker::slices::Slicer;

/// Rows and keys of a group that kernels take as one piece, whatever threads there are.
const SMALL_ROWS: usize = 48;
const SMALL_KEYS: usize = 1024;
/// Multiply-adds in some ten microseconds.
const SMALL_WORK: usize = 1 << 20;

/// What a call reads, little-endian elements in C order.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<'a> {
    /// `[batch, heads, queries, query_dim]`.
    pub q: &'a [u8],
    /// `[batch, kv_heads, keys, head_dim]`; empty where keys and values are made of rows.
    pub k: &'a [u8],
    /// `[batch, kv_heads, keys, value_dim]`; empty there too, and where values are the first elements of keys.
    pub v: &'a [u8],
    /// The elements of each of [`Begin::sides`], in that order.
    pub beside: &'a [Bytes],
}

impl<'a> Tensors<'a> {
    fn of(&self, tensor: Tensor) -> &'a [u8] {
        match tensor {
            Tensor::Q => self.q,
            Tensor::K => self.k,
            Tensor::V => self.v,
        }
    }
}

/// Where an answer goes, part by part, from any thread: all but plans and the end.
pub type Taker<'a> = dyn Fn(AttendReply) -> Result<(), Error> + Sync + 'a;

/// Whether a call is so small that another thread would take longer to hear of it: outside of a rayon pool the calling thread computes it
/// by itself. Then no kv group has more rows and keys than kernels take as one piece.
pub fn is_small(shape: &AttnShape) -> bool {
    let rows = shape.group_size().saturating_mul(shape.n_queries());
    let of_pair = shape.head_dim() + shape.value_dim();
    let work = shape.n_groups().saturating_mul(rows).saturating_mul(shape.n_keys()).saturating_mul(of_pair);
    rows <= SMALL_ROWS && shape.n_keys() <= SMALL_KEYS && work <= SMALL_WORK
}

/// Computes a call on the current rayon pool, kv groups side by side; where there is none, one after the other. `wanted` is asked before
/// each some ten milliseconds of work.
///
/// # Errors
/// As a cluster would say it: [`Reason::PayloadLength`], [`Reason::NonFinite`], [`Reason::EmptyRow`], [`Reason::ScoreOverflow`],
/// [`Reason::OutputOverflow`]; [`Reason::KvBudget`] where the system has no memory left, [`Reason::Cancelled`] once `wanted` says no,
/// and what `take` says.
pub fn attend(
    kernels: &Kernels,
    begin: &Begin,
    tensors: Tensors<'_>,
    wanted: &(dyn Fn() -> bool + Sync),
    take: &Taker<'_>,
) -> Result<Done, Error> {
    let shape = begin.shape;
    for tensor in Tensor::ALL {
        let (need, payload) = (tensor.bytes(&shape, begin.dtype.size()), tensors.of(tensor).len());
        if payload as u64 != need {
            return Err(refusal::tensor_length(tensor, need, payload));
        }
    }
    let blind = empty_rows(begin.operator.mask(), &shape);
    if begin.forbid_empty_rows && blind > 0 {
        return Err(refusal::empty_row(blind));
    }
    let compute = ComputeBegin {
        call_id: 0,
        shape,
        dtype: begin.dtype,
        operator: Arc::clone(&begin.operator),
        outputs: begin.outputs.clone(),
        sides: begin.sides.clone(),
        allow_non_finite: begin.allow_non_finite,
        pieces: vec![Piece { groups: 0..shape.n_groups(), slots: 0..N_SLOTS }],
        tokens_per_cell: shape.n_queries().max(1),
    };
    let call = Call {
        layout: Layout::new(&compute),
        planes: planes(&compute, tensors.beside)?,
        heat: Mutex::default(),
        failed: AtomicBool::new(false),
        begin: compute,
        forbid_empty_rows: begin.forbid_empty_rows,
        kernels,
        tensors,
        wanted,
        take,
    };
    let groups = 0..shape.n_groups();
    let unseen: Vec<Result<u64, Error>> = match rayon::current_thread_index() {
        Some(_) => groups.into_par_iter().map(|group| call.group_or_stop(group)).collect(),
        None => groups.map(|group| call.group_or_stop(group)).collect(),
    };
    // Groups that were given up because of another one say so, and are not why.
    let is_why = |error: &&Error| error.reason != Reason::Cancelled;
    let errors = || unseen.iter().filter_map(|rows| rows.as_ref().err());
    if let Some(error) = errors().find(is_why).or_else(|| errors().next()) {
        return Err(error.clone());
    }
    // Where tensors hide keys too, rows are counted as they end.
    let seen_to_end = unseen.into_iter().filter_map(Result::ok).sum();
    let empty_rows = if operator::hides_single_keys(&begin.operator) { seen_to_end } else { blind };
    let kernel_id = begin.operator.kernel_id(Compute::F32).to_owned();
    Ok(Done { kernel_id, empty_rows, ..Done::default() })
}

/// The tensors beside the operands, as kernels read them.
fn planes(begin: &ComputeBegin, beside: &[Bytes]) -> Result<SidePlanes, Error> {
    let (sides, pieces, shape) = (&begin.sides, &begin.pieces, begin.shape);
    let need = bytes_needed(sides, pieces, &shape);
    let memory = Budget::new(need).reserve(need).map_err(|full| refusal::kv_budget(full.need, full.free))?;
    let mut assembly = SideAssembly::new(sides, pieces, shape, !begin.allow_non_finite, memory);
    for (layout, bytes) in sides.iter().zip(beside) {
        for (i, part) in layout.parts(pieces, &shape).into_iter().enumerate() {
            let plane = part_of(layout, part.plane, layout.part_bytes(&part), bytes)?;
            assembly.accept(layout.tensor(), i, 0, plane)?;
        }
    }
    match assembly.missing() {
        Some(tensor) => Err(Error::new(Reason::PayloadLength, format!("{tensor} is missing"))),
        None => assembly.finish(),
    }
}

/// The bytes of a plane: with all slots, it is a run of its tensor.
fn part_of<'a>(layout: &SideLayout, plane: usize, of_plane: u64, bytes: &'a [u8]) -> Result<&'a [u8], Error> {
    let bytes_of = || {
        let of_plane = usize::try_from(of_plane).ok()?;
        let first = plane.checked_mul(of_plane)?;
        bytes.get(first..first.checked_add(of_plane)?)
    };
    bytes_of().ok_or_else(|| refusal::tensor_length(layout.tensor(), layout.bytes(), bytes.len()))
}

/// What all groups of a call share.
struct Call<'a> {
    begin: ComputeBegin,
    forbid_empty_rows: bool,
    layout: Layout,
    kernels: &'a Kernels,
    tensors: Tensors<'a>,
    planes: SidePlanes,
    heat: Mutex<HeatRows>,
    /// Another group has failed, so nobody wants this one.
    failed: AtomicBool,
    wanted: &'a (dyn Fn() -> bool + Sync),
    take: &'a Taker<'a>,
}

impl Call<'_> {
    /// How many rows of a group see no key.
    fn group_or_stop(&self, group: usize) -> Result<u64, Error> {
        let computed = self.group(group);
        if computed.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        computed
    }

    fn is_wanted(&self) -> bool {
        !self.failed.load(Ordering::Relaxed) && (self.wanted)()
    }

    fn group(&self, group: usize) -> Result<u64, Error> {
        if !self.is_wanted() {
            return Err(cancelled());
        }
        let &ComputeBegin { shape, allow_non_finite, ref operator, .. } = &self.begin;
        let (q, kv) = (self.queries(group)?, self.resident(group)?);
        let tokens = 0..shape.n_queries();
        with_call(&self.begin, group, &q, &kv, &self.planes, |of_group| {
            let slicer = Slicer::new(self.kernels, of_group, || self.is_wanted());
            let mut parts = Vec::new();
            for (node, _keys) in filled_nodes(0..N_SLOTS, shape.n_keys()) {
                let computed = slicer.attend(node, tokens.clone()).ok_or_else(cancelled)?;
                parts.push((node, checked(&self.begin, group, &tokens, computed)?));
            }
            let mean = self.mean(group);
            let checks = Checks { mean, allow_non_finite, keep_sums: self.begin.outputs.is_some() };
            let ready = Ready { group, tokens: tokens.clone(), parts };
            let Merged { rows, sums, unseen, first_unseen } =
                merge(ready, &shape, operator, checks, self.kernels)?;
            if let Some((head, token)) = first_unseen.filter(|_| self.forbid_empty_rows) {
                return Err(refusal::empty_row_at(head, token));
            }
            let first_head = group * shape.group_size();
            let heads = first_head..first_head + shape.group_size();
            let chunk = ContextChunk { heads, tokens, lse: rows.lse, context: rows.context };
            (self.take)(AttendReply::Context(chunk))?;
            if let Some((outputs, sums)) = self.begin.outputs.as_deref().zip(sums) {
                self.second_pass(&of_group, outputs, sums)?;
            }
            Ok(unseen)
        })
    }

    /// `[group_size, n_queries, query_dim]` in f32: as they are, where they are.
    fn queries(&self, group: usize) -> Result<Cow<'_, [f32]>, Error> {
        let &ComputeBegin { shape, dtype, allow_non_finite, .. } = &self.begin;
        let of_head = shape.n_queries() * shape.query_dim();
        let elements = shape.group_size() * of_head;
        let bytes = elements * dtype.size();
        let bytes = &self.tensors.q[group * bytes..][..bytes];
        let q = match bytemuck::try_cast_slice(bytes) {
            Ok(floats) if dtype == attnd_kernel::Dtype::F32 && cfg!(target_endian = "little") => {
                Cow::Borrowed(floats)
            }
            _ => {
                let mut floats = vec![0.0; elements];
                widen(bytes, dtype, &mut floats);
                Cow::Owned(floats)
            }
        };
        match first_non_finite(&q).filter(|_| !allow_non_finite) {
            Some(at) => {
                let (token, dim) = (at % of_head / shape.query_dim(), at % shape.query_dim());
                let head = group * shape.group_size() + at / of_head;
                Err(refusal::non_finite(Tensor::Q, head, &NonFinite { token, dim, value: q[at] }))
            }
            None => Ok(q),
        }
    }

    fn resident(&self, group: usize) -> Result<KvHead, Error> {
        let shape = &self.begin.shape;
        let mut kv = ResidentKv::new(self.layout, group, 0..N_SLOTS)?;
        for tensor in [Tensor::K, Tensor::V] {
            let bytes = self.tensors.of(tensor);
            let of_group = bytes.len() / shape.n_groups();
            let row = of_group / shape.n_keys().max(1);
            if row == 0 {
                continue;
            }
            let rows = &bytes[group * of_group..][..of_group];
            for page in 0..n_pages(shape.n_keys()) {
                let of_page = keys_in_page(page, shape.n_keys()) * row;
                kv.write(tensor, page, &rows[page * PAGE_KEYS * row..][..of_page])?;
            }
        }
        let ResidentKv { mut pages, sent_keys, .. } = kv;
        let wanted = || self.is_wanted();
        make_resident(self.kernels, &self.begin, group, (&mut pages, sent_keys), &self.planes, wanted)?;
        Ok(pages)
    }

    /// What rows of the group are that see no key, where that is the mean of its values.
    fn mean(&self, group: usize) -> Option<Arc<[f32]>> {
        let &ComputeBegin { shape, dtype, ref operator, .. } = &self.begin;
        if operator.empty_row() != EmptyRow::Uniform {
            return None;
        }
        let tensor = if shape.value_is_key_prefix() { Tensor::K } else { Tensor::V };
        let bytes = self.tensors.of(tensor);
        let of_group = bytes.len() / shape.n_groups();
        let mut means = ValueMeans::new(&shape, dtype);
        means.add(group, 0, &bytes[group * of_group..][..of_group]);
        means.of(group)
    }

    fn second_pass(
        &self,
        of_group: &GroupCall<'_>,
        outputs: &Outputs,
        sums: MergedSums,
    ) -> Result<(), Error> {
        let (shape, group, tokens) = (&self.begin.shape, sums.group, sums.tokens.clone());
        let first_head = group * shape.group_size();
        let mut report = NodeReport::empty(outputs, group, tokens.clone());
        for node in self.nodes(outputs, group, &tokens) {
            if !self.is_wanted() {
                return Err(cancelled());
            }
            let mut taken = Ok(());
            let mut emit = |tile: ElementTile<'_>| {
                if taken.is_ok() {
                    taken = (self.take)(AttendReply::Elements(elements_of(tile, first_head)));
                }
            };
            let of_rows = RowSums { m: &sums.m, l: &sums.l };
            let part =
                inspect_node(self.kernels, of_group, of_rows, outputs, node, tokens.clone(), &mut emit);
            taken?;
            report.merge(&part);
        }
        if !outputs.has_report() || report.heads.is_empty() {
            return Ok(());
        }
        let told = told(&report, sums, outputs, &self.heat, shape, &self.begin.operator);
        told.into_iter().try_for_each(|reply| (self.take)(reply))
    }

    fn nodes(&self, outputs: &Outputs, group: usize, tokens: &Range<usize>) -> Vec<attnd_kernel::slot::Node> {
        parts(&self.begin, rayon::current_num_threads(), outputs, (group, 0..N_SLOTS), tokens)
    }
}

fn cancelled() -> Error {
    Error::new(Reason::Cancelled, "nobody waits for the answer")
}
