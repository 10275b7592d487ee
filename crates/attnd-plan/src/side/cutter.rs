//! Which bytes of the side tensors go to which share.
//!
//! The answer depends on a byte's place in its tensor only, so any chunking of a stream sends the same bytes to the
//! same places. A part travels as a matrix of its own columns alone, row by row. Of each row a chunk may hold many
//! short runs of them; together they are consecutive in that matrix, and go in one message.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::AttnShape;

use super::{SideLayout, SideTensor, Sides};
use crate::planner::Plan;

/// Bytes of a chunk that are consecutive in a part of a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gathered {
    /// Index into [`Plan::shares`].
    pub share: usize,
    /// Index into what [`SideLayout::parts`] gives for that share.
    pub part: usize,
    /// Where they begin in the part's own matrix, in bytes.
    pub offset: u64,
    /// Where they lie in the chunk, ascending; at least one, none empty, none next to another.
    pub runs: Vec<Range<usize>>,
}

/// Cuts the side tensors of one call.
#[derive(Clone, Debug)]
pub struct Cutter {
    tensors: Vec<TensorCut>,
}

#[derive(Clone, Debug)]
struct TensorCut {
    layout: SideLayout,
    /// Of each plane.
    owners: Vec<Vec<Owner>>,
}

/// A share that needs a part of a plane.
#[derive(Clone, Debug)]
struct Owner {
    share: usize,
    part: usize,
    columns: Arc<Columns>,
}

/// Bytes of a row that a part has.
#[derive(Debug)]
struct Columns {
    runs: Vec<Range<usize>>,
    /// Bytes of the runs before each run; the last entry is all of them.
    before: Vec<usize>,
}

impl Cutter {
    /// A cutter for the shares of `plan`.
    pub fn new(plan: &Plan, shape: &AttnShape, sides: &Sides) -> Self {
        let cut = |layout: &SideLayout| {
            let mut owners = vec![Vec::new(); layout.n_planes()];
            let mut columns_of: BTreeMap<(usize, usize), Arc<Columns>> = BTreeMap::new();
            for (share, of_worker) in plan.shares.iter().enumerate() {
                for (part, needed) in layout.parts(&of_worker.pieces, shape).into_iter().enumerate() {
                    let key = (needed.slots.start, needed.slots.end);
                    let columns = columns_of.entry(key).or_insert_with(|| {
                        let runs = layout.columns_of(&needed.slots);
                        Arc::new(Columns::new(&runs, layout.column_bytes()))
                    });
                    if let Some(owners) = owners.get_mut(needed.plane) {
                        owners.push(Owner { share, part, columns: Arc::clone(columns) });
                    }
                }
            }
            TensorCut { layout: *layout, owners }
        };
        Self { tensors: sides.iter().map(cut).collect() }
    }

    /// Where the `len` bytes from `offset` of the whole tensor go; a byte appears once per share that needs it. Bytes
    /// past the end of the tensor, and of a tensor that the call doesn't have, go nowhere.
    pub fn cut(&self, tensor: SideTensor, offset: u64, len: usize) -> Vec<Gathered> {
        let mut gathered = Vec::new();
        let Some(of) = self.tensors.iter().find(|of| of.layout.tensor() == tensor) else { return gathered };
        let row_bytes = of.layout.row_bytes();
        let plane_bytes = of.layout.rows() as u64 * row_bytes as u64;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let plane = usize::try_from(at / plane_bytes).ok().and_then(|plane| of.owners.get(plane));
            let Some(owners) = plane else { break };
            let in_plane = at % plane_bytes;
            let left = plane_bytes - in_plane;
            let bytes = done..done + usize::try_from(left).map_or(len - done, |left| left.min(len - done));
            let of_owner = |owner: &Owner| {
                let (offset, runs) = owner.columns.cut(row_bytes, in_plane, bytes.clone())?;
                Some(Gathered { share: owner.share, part: owner.part, offset, runs })
            };
            gathered.extend(owners.iter().filter_map(of_owner));
            done = bytes.end;
        }
        gathered
    }
}

impl Columns {
    fn new(columns: &[Range<usize>], column_bytes: usize) -> Self {
        let of_bytes = |run: &Range<usize>| run.start * column_bytes..run.end * column_bytes;
        let runs: Vec<Range<usize>> = columns.iter().map(of_bytes).collect();
        let mut before = vec![0];
        for run in &runs {
            before.push(before.last().unwrap_or(&0) + run.len());
        }
        Self { runs, before }
    }

    fn width(&self) -> usize {
        self.before.last().copied().unwrap_or(0)
    }

    /// Of `bytes` of a chunk, which begin `in_plane` bytes into a plane and end inside of it, those of these columns,
    /// and where they begin in the matrix of these columns; `None` if there are none.
    fn cut(&self, row_bytes: usize, in_plane: u64, bytes: Range<usize>) -> Option<(u64, Vec<Range<usize>>)> {
        if self.width() == row_bytes {
            return Some((in_plane, std::iter::once(bytes).collect()));
        }
        let mut place = None;
        let mut runs: Vec<Range<usize>> = Vec::new();
        let mut at = bytes.start;
        let (mut row, mut in_row) = (in_plane / row_bytes as u64, (in_plane % row_bytes as u64) as usize);
        while at < bytes.end {
            let end_in_row = row_bytes.min(in_row + bytes.end - at);
            let first = self.runs.partition_point(|run| run.end <= in_row);
            for (run, before) in self.runs[first..].iter().zip(&self.before[first..]) {
                if run.start >= end_in_row {
                    break;
                }
                let part = run.start.max(in_row)..run.end.min(end_in_row);
                place.get_or_insert(row * self.width() as u64 + (before + part.start - run.start) as u64);
                let part = at + part.start - in_row..at + part.end - in_row;
                match runs.last_mut() {
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => runs.push(part),
                }
            }
            at += end_in_row - in_row;
            (row, in_row) = (row + 1, 0);
        }
        place.map(|place| (place, runs))
    }
}
