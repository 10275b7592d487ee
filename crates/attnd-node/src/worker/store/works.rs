//! The works of one message: rows of each that has some, then partials of all that are asked for.
//!
//! Everything a work refuses is an answer of its own, and costs the others nothing.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::slot::N_SLOTS;
use attnd_kernel::{NonFinite, first_non_finite, widen};
use attnd_plan::Tensor;
use attnd_wire::hold::{ShardQueries, ShardRows, ShardState, ShardWork};
use attnd_wire::surroundings::now;
use attnd_wire::{CallShape, Deadline, Error, Reason, refusal};
use rayon::prelude::*;

use super::attention::{self, Attention, Run};
use super::shard::{Resident, ShardKey, key_of};
use super::turns::Access;
use super::{Store, no_shard};
use crate::compute_pool::is_pool_thread;

/// A step of one shard, which fits it.
#[derive(Debug)]
pub(crate) struct Work {
    resident: Arc<Resident>,
    epoch: u64,
    layer: usize,
    rows: Option<ShardRows>,
    queries: Option<(ShardQueries, CallShape)>,
    /// Of its queries.
    deadline: Option<Deadline>,
}

/// What came of a work.
#[derive(Debug, PartialEq)]
pub(crate) struct WorkDone {
    /// Where there were rows that are there now.
    pub(crate) applied: Option<ShardState>,
    /// Nothing where there were no queries.
    pub(crate) partials: Result<Vec<Run>, Error>,
}

impl Work {
    /// Looks a work's shard up and checks the work against it.
    ///
    /// # Errors
    /// [`Reason::Shard`], and whatever is wrong with the work.
    pub(crate) fn new(store: &Store, work: ShardWork) -> Result<Self, Error> {
        let ShardWork { at, layer, rows, queries } = work;
        let resident = store.resident(key_of(&at))?;
        let (spec, pieces) = (&*resident.spec, &resident.pieces[..]);
        if let Some(rows) = &rows {
            rows.check(layer, spec, pieces)?;
        }
        let queries = match queries {
            Some(queries) => {
                let call = queries.call(layer, spec, pieces)?;
                if call.operator.storage(spec.storage) != spec.storage {
                    let text =
                        format!("{} over {} keys", call.operator.score().function().name, spec.storage);
                    return Err(Error::new(Reason::Operator, text));
                }
                Some((queries, call))
            }
            None => None,
        };
        let timeout = queries.as_ref().and_then(|(queries, _)| queries.timeout);
        let deadline = timeout.map(|timeout| Deadline::after(now(), timeout));
        Ok(Self { resident, epoch: at.epoch, layer, rows, queries, deadline })
    }

    /// Whether it has rows.
    pub(crate) fn appends(&self) -> bool {
        self.rows.is_some()
    }

    /// What it touches, and how.
    pub(crate) fn touches(&self) -> (ShardKey, Access) {
        (self.resident.key, if self.rows.is_some() { Access::Changes } else { Access::Reads })
    }

    /// Bytes that came with it.
    pub(crate) fn payload_bytes(&self) -> usize {
        let rows = self.rows.as_ref().map_or(0, |rows| rows.k.len() + rows.v.len());
        rows + self.queries.as_ref().map_or(0, |(queries, _)| queries.q.len())
    }

    /// About how long one thread takes for it, from above: f32 that it reads at 8 GB/s, or multiplications at 8 of them in a nanosecond,
    /// whatever is longer.
    pub(crate) fn time(&self) -> Duration {
        let spec = &*self.resident.spec;
        let width = (spec.head_dim + spec.value_dim) as u64;
        let written = self.payload_bytes() as u64;
        let Some((queries, call)) = &self.queries else { return Duration::from_nanos(written / 2) };
        let slots: usize =
            self.resident.pieces.iter().map(|piece| piece.groups.len() * piece.slots.len()).sum();
        // Of all kv heads together.
        let keys = (call.shape.n_keys() as u64).saturating_mul(slots as u64) / N_SLOTS as u64;
        let elements = keys.saturating_mul(width);
        let rows = (call.shape.group_size() * queries.tokens) as u64;
        Duration::from_nanos(
            (elements / 2).max(elements.saturating_mul(rows) / 8).saturating_add(written / 2),
        )
    }

    /// Memory that it takes until it is answered, in bytes.
    pub(crate) fn bytes(&self, threads: usize) -> u64 {
        let payload = self.payload_bytes() as u64;
        let Some((queries, call)) = &self.queries else { return payload };
        let elements = (queries.q.len() / queries.dtype.size()) as u64;
        let pieces = self.resident.pieces.iter().map(|piece| (&piece.slots, piece.groups.len()));
        let partials = attention::partial_floats(&call.shape, pieces, queries.tokens_per_cell, threads);
        payload + elements.saturating_add(partials).saturating_mul(4)
    }
}

/// Does the works of a message, on the compute pool. Once nobody has `wanted` partials for a while, or a work's deadline has passed, they
/// are left out, and rows appended all the same.
pub(crate) fn run(store: &Store, works: Vec<Work>, wanted: impl Fn() -> bool + Sync) -> Vec<WorkDone> {
    let mut done: Vec<WorkDone> = append_all(store, &works)
        .into_iter()
        .map(|applied| match applied {
            Ok(applied) => WorkDone { applied, partials: Ok(Vec::new()) },
            Err(error) => WorkDone { applied: None, partials: Err(error) },
        })
        .collect();
    let mut asked = Vec::new();
    let mut attentions = Vec::new();
    for (at, (work, done)) in works.iter().zip(&mut done).enumerate() {
        let Some((queries, call)) = work.queries.as_ref().filter(|_| done.partials.is_ok()) else { continue };
        if !wanted() || attention::in_time(work.deadline).is_err() {
            done.partials = Err(attention::unwanted(work.deadline));
            continue;
        }
        match attention_of(work, queries, call) {
            Ok(attention) => {
                asked.push(at);
                attentions.push(attention);
            }
            Err(error) => done.partials = Err(error),
        }
    }
    if !attentions.is_empty() {
        for (at, partials) in asked.into_iter().zip(attention::attend(store.kernels(), &attentions, wanted)) {
            // What was found out meanwhile counts too.
            let is_damaged = works[at].resident.is_damaged();
            done[at].partials = if is_damaged { Err(no_shard(works[at].resident.key)) } else { partials };
        }
    }
    done
}

/// Does those works of a message that make sense, on the compute pool; errors stay in their places.
pub(crate) fn run_all(
    store: &Store,
    works: Vec<Result<Work, Error>>,
    wanted: impl Fn() -> bool + Sync,
) -> Vec<Result<WorkDone, Error>> {
    let mut errors = Vec::with_capacity(works.len());
    let mut good = Vec::with_capacity(works.len());
    for work in works {
        match work {
            Ok(work) => {
                good.push(work);
                errors.push(None);
            }
            Err(error) => errors.push(Some(error)),
        }
    }
    let mut done = run(store, good, wanted).into_iter();
    let result = |error: Option<Error>| match error {
        Some(error) => Err(error),
        None => done.next().ok_or_else(|| Error::new(Reason::Internal, "a work without a result")),
    };
    errors.into_iter().map(result).collect()
}

/// Appends the rows of all works that have some; those of one shard in order, those of different ones side by side.
fn append_all(store: &Store, works: &[Work]) -> Vec<Result<Option<ShardState>, Error>> {
    let append = |work: &Work| {
        let Some(rows) = &work.rows else { return Ok(None) };
        let appended = catch_unwind(AssertUnwindSafe(|| {
            work.resident.change().append(store, work.epoch, work.layer, rows).map(Some)
        }));
        appended.unwrap_or_else(|panic| {
            let text = crate::compute_pool::text_of(&*panic);
            tracing::error!(panic = text, "an append panicked");
            // What it wrote isn't part of anything.
            work.resident.change().forget(work.layer);
            Err(Error::new(Reason::Internal, "an append panicked"))
        })
    };
    let appends = works.iter().filter(|work| work.rows.is_some()).count();
    if appends < 2 || !is_pool_thread() {
        return works.iter().map(append).collect();
    }
    let mut by_shard: BTreeMap<ShardKey, Vec<usize>> = BTreeMap::new();
    for (at, work) in works.iter().enumerate() {
        by_shard.entry(work.resident.key).or_default().push(at);
    }
    let by_shard: Vec<Vec<usize>> = by_shard.into_values().collect();
    let of_shard = |ats: Vec<usize>| ats.into_iter().map(|at| (at, append(&works[at]))).collect::<Vec<_>>();
    let all: Vec<Vec<_>> = by_shard.into_par_iter().map(of_shard).collect();
    let mut results: Vec<Result<Option<ShardState>, Error>> = works.iter().map(|_| Ok(None)).collect();
    for (at, result) in all.into_iter().flatten() {
        results[at] = result;
    }
    results
}

/// What a work asks for, with what it looks at.
fn attention_of(work: &Work, queries: &ShardQueries, call: &CallShape) -> Result<Attention, Error> {
    let Resident { spec, kv_heads, .. } = &*work.resident;
    let views = work.resident.look().views(work.epoch, queries.generation, work.layer, queries.at_len)?;
    let mut q = vec![0.0; queries.q.len() / queries.dtype.size()];
    widen(&queries.q, queries.dtype, &mut q);
    if let Some(at) = first_non_finite(&q).filter(|_| !queries.allow_non_finite) {
        let (row, dim) = (at / spec.head_dim, at % spec.head_dim);
        let head = kv_heads.start * spec.group_size() + row / queries.tokens;
        let found = NonFinite { token: row % queries.tokens, dim, value: q[at] };
        return Err(refusal::non_finite(Tensor::Q, head, &found));
    }
    Ok(Attention {
        shape: call.shape,
        operator: Arc::clone(&call.operator),
        q,
        first_kv_head: kv_heads.start,
        views,
        allow_non_finite: queries.allow_non_finite,
        tokens_per_cell: queries.tokens_per_cell,
        deadline: work.deadline,
    })
}
