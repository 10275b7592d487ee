//! Keys and values that are made here, of rows that were sent instead: those of a group once its queries are here too, on the compute
//! pool. The rows came once for all groups of their batch element, and a matrix once for all batch elements.

use std::ops::Range;
use std::sync::OnceLock;

use attnd_kernel::slot::{PAGE_KEYS, keys_in_page, n_pages, slot_of_page};
use attnd_kernel::{Dtype, Kernels, KvHead, Linear, NonFinite, OutOfMemory, first_non_finite};
use attnd_plan::{SideTensor, Tensor};
use attnd_wire::{ComputeBegin, Error, Reason, floats, refusal};

use super::side::SidePlanes;

/// Bytes of rows that are projected at once, or of what they become if that is more: little beside pages, and an answer that nobody
/// wants is noticed soon.
const BATCH_BYTES: usize = 4 << 20;
/// Rows that a thread has of a batch at least, whatever its bytes: two of the blocks that a linear layer gives to threads.
const ROWS_PER_THREAD: usize = 192;

/// A matrix of one kv head, and the linear layer that is made of it where it is first needed.
#[derive(Debug)]
pub(crate) struct HeadMatrix {
    /// `W` of `[dim, width]`, then `b` of `[dim]` if there is one.
    pub(crate) elements: Vec<f32>,
    linear: OnceLock<Linear>,
}

impl HeadMatrix {
    /// A matrix of which these are the first elements.
    pub(crate) fn new(elements: Vec<f32>) -> Self {
        Self { elements, linear: OnceLock::new() }
    }

    /// The layer, of rows of `width` elements that become `dim`.
    fn linear(&self, width: usize, dim: usize) -> Result<&Linear, OutOfMemory> {
        if let Some(linear) = self.linear.get() {
            return Ok(linear);
        }
        let (weight, bias) = self.elements.split_at(width * dim);
        let made = Linear::new(weight, [dim, width], (!bias.is_empty()).then_some(bias))?;
        Ok(self.linear.get_or_init(|| made))
    }
}

/// Writes the keys and values of a group into the pages of `kv`, on the current rayon pool.
///
/// # Errors
/// [`Reason::Cancelled`] once `wanted` says no; [`Reason::NonFinite`] for a key or a value that is NaN or infinite where finite ones
/// were promised, as if it had been sent; [`Reason::KvBudget`] if the system has no memory left.
pub(crate) fn project(
    kernels: &Kernels,
    begin: &ComputeBegin,
    group: usize,
    planes: &SidePlanes,
    kv: &mut KvHead,
    wanted: impl Fn() -> bool,
) -> Result<(), Error> {
    for tensor in [Tensor::K, Tensor::V] {
        let (matrix, dim) = match tensor {
            Tensor::V => (SideTensor::ValueMatrix, begin.shape.value_dim()),
            Tensor::Q | Tensor::K => (SideTensor::KeyMatrix, begin.shape.head_dim()),
        };
        let unknown = || Error::new(Reason::Internal, format!("group {group} has no rows for its {tensor}"));
        let source = planes.source_of_group(tensor, group, &kv.slots(), &begin.shape).ok_or_else(unknown)?;
        let linear = planes.matrix_of_group(matrix, group, &begin.shape).ok_or_else(unknown)?;
        let linear = linear.linear(source.width, dim)?;
        let most = most_rows(source.width.max(dim), rayon::current_num_threads());
        let batches = batches(&source.slots, &kv.slots(), begin.shape.n_keys(), most);
        let elements = batches.iter().map(|batch| batch.rows.len() * dim).max().unwrap_or(0);
        let mut made = Vec::new();
        made.try_reserve_exact(elements).map_err(|_refused| OutOfMemory { bytes: 4 * elements as u64 })?;
        for batch in batches {
            if !wanted() {
                return Err(Error::new(Reason::Cancelled, "nobody waits for the partials"));
            }
            let rows = source.rows.get(batch.rows.start * source.width..batch.rows.end * source.width);
            made.resize(batch.rows.len() * dim, 0.0);
            linear.apply(kernels, rows.ok_or_else(unknown)?, &mut made);
            let mut first = 0;
            for page in batch.pages {
                let of_page = keys_in_page(page, begin.shape.n_keys()) * dim;
                let rows = &made[first..first + of_page];
                first += of_page;
                write(kernels, begin, (tensor, group), page, rows, kv)?;
            }
        }
    }
    Ok(())
}

/// Stores the keys or values of a page.
fn write(
    kernels: &Kernels,
    begin: &ComputeBegin,
    (tensor, group): (Tensor, usize),
    page: usize,
    rows: &[f32],
    kv: &mut KvHead,
) -> Result<(), Error> {
    let (shape, check_finite) = (&begin.shape, !begin.allow_non_finite);
    let bytes = |rows: &[f32]| floats::into_bytes(rows.to_vec());
    let written = match tensor {
        Tensor::V => kv.write_v(page, &bytes(rows), Dtype::F32, check_finite),
        Tensor::Q | Tensor::K if begin.operator.keeps_keys() => {
            kv.write_k(page, &bytes(rows), Dtype::F32, check_finite)
        }
        Tensor::Q | Tensor::K => {
            let dim = shape.head_dim();
            match first_non_finite(rows).filter(|_| check_finite) {
                // What becomes of it may look like a number.
                Some(at) => {
                    let token = page * PAGE_KEYS + at / dim;
                    Err(NonFinite { token, dim: at % dim, value: rows[at] })
                }
                None => {
                    let keys = page * PAGE_KEYS..page * PAGE_KEYS + rows.len() / dim;
                    let mut others = vec![0.0; keys.len() * begin.operator.key_dim(shape)];
                    begin.operator.key_rows(kernels, shape, group, keys, rows, &mut others);
                    kv.write_k(page, &floats::into_bytes(others), Dtype::F32, false)
                }
            }
        }
    };
    written.map_err(|found| refusal::non_finite(tensor, group, &found))
}

/// Pages that are made at once, and where their rows are among those of a part.
#[derive(Debug, PartialEq)]
struct Batch {
    pages: Vec<usize>,
    rows: Range<usize>,
}

/// Rows in a batch: a page at least.
fn most_rows(width: usize, threads: usize) -> usize {
    (BATCH_BYTES / (width * size_of::<f32>())).max(ROWS_PER_THREAD * threads).max(PAGE_KEYS)
}

/// The pages of `slots` in batches of up to `most` rows that follow each other among those of a part of `of_part`, which has these
/// slots.
fn batches(of_part: &Range<usize>, slots: &Range<usize>, n_keys: usize, most: usize) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut row = 0;
    for page in (0..n_pages(n_keys)).filter(|page| of_part.contains(&slot_of_page(*page))) {
        let rows = row..row + keys_in_page(page, n_keys);
        row = rows.end;
        if !slots.contains(&slot_of_page(page)) {
            continue;
        }
        match batches.last_mut() {
            Some(last) if last.rows.end == rows.start && rows.end - last.rows.start <= most => {
                last.pages.push(page);
                last.rows.end = rows.end;
            }
            _ => batches.push(Batch { pages: vec![page], rows }),
        }
    }
    batches
}

#[cfg(test)]
mod tests;
