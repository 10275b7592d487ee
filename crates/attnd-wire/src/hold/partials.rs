//! Partials of many cells in one message: their numbers one behind the other, under one checksum.

use std::collections::BTreeMap;
use std::ops::Range;

use attnd_kernel::PartialRows;
use attnd_plan::CellId;
use bytes::Bytes;

use crate::checksum::checksum;
use crate::compute::CallShape;
use crate::compute::rows::{RowBytes, keys_seen};
use crate::convert::{size, small};
use crate::error::{Error, Reason};
use crate::floats;
use crate::proto;

/// Partials of consecutive cells of a shard, as they are in a message. Which cells those are is known to whoever asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartialRun {
    /// The first one, in the order of [`attnd_plan::cells`].
    pub first_cell: usize,
    /// How many, at least one.
    pub cells: usize,
    /// Of each cell m, l and o, as f32; the checksum was right.
    data: Bytes,
    crc32c: u32,
}

impl PartialRun {
    /// The partials of consecutive cells, of which the first one is `first_cell`.
    pub fn new<'a>(first_cell: usize, partials: impl IntoIterator<Item = &'a PartialRows> + Clone) -> Self {
        let bytes = |rows: &PartialRows| (rows.m.len() + rows.l.len() + rows.o.len()) * size_of::<f32>();
        let mut data = Vec::with_capacity(partials.clone().into_iter().map(bytes).sum());
        let mut cells = 0;
        for rows in partials {
            for values in [&rows.m, &rows.l, &rows.o] {
                floats::extend_bytes(&mut data, values);
            }
            cells += 1;
        }
        let crc32c = checksum(&[&data]);
        Self { first_cell, cells, data: data.into(), crc32c }
    }

    /// Bytes of the partials of a cell.
    pub fn cell_bytes(cell: &CellId, call: &CallShape) -> usize {
        call.shape.group_size() * cell.tokens * (2 + call.shape.value_dim()) * size_of::<f32>()
    }

    /// Bytes of all of its partials.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The partials, of which a shard owes those of `cells`, all of it: cells that there are, exactly the bytes that they need, and
    /// rows that a kernel can have made. Whether they come twice is for the gather to say.
    ///
    /// # Errors
    /// [`Reason::PartialInvalid`].
    pub fn decode(&self, cells: &[CellId], call: &CallShape) -> Result<Vec<(CellId, PartialRows)>, Error> {
        let range: Range<usize> = self.first_cell..self.first_cell.saturating_add(self.cells);
        let place = || format!("cells {}+{}", self.first_cell, self.cells);
        let invalid = |what: String| Error::new(Reason::PartialInvalid, what);
        let asked =
            cells.get(range).ok_or_else(|| invalid(format!("{}: there are {}", place(), cells.len())))?;
        let need: usize = asked.iter().map(|cell| Self::cell_bytes(cell, call)).sum();
        if self.data.len() != need {
            return Err(invalid(format!("{}: needs {need} bytes, got {}", place(), self.data.len())));
        }
        // Cells of other kv heads see what these do: a session is a batch of one.
        let mut seen = BTreeMap::new();
        let mut rest = &self.data[..];
        let partial = |cell: &CellId| {
            let rows = call.shape.group_size() * cell.tokens * size_of::<f32>();
            let (m, behind) = rest.split_at_checked(rows).unwrap_or_default();
            let (l, behind) = behind.split_at_checked(rows).unwrap_or_default();
            let (o, behind) = behind.split_at_checked(rows * call.shape.value_dim()).unwrap_or_default();
            rest = behind;
            let seen = seen.entry((cell.node, cell.first_token)).or_insert_with(|| keys_seen(cell, call));
            let rows = RowBytes { m, l, o }.decode(seen, call).map_err(|what| {
                let CellId { group, node, first_token, tokens, .. } = cell;
                let (level, index) = (node.level(), node.index());
                invalid(format!("group {group} node {level}/{index} tokens {first_token}+{tokens}: {what}"))
            })?;
            Ok((*cell, rows))
        };
        asked.iter().map(partial).collect()
    }
}

impl TryFrom<proto::PartialRun> for PartialRun {
    type Error = Error;

    fn try_from(message: proto::PartialRun) -> Result<Self, Error> {
        let proto::PartialRun { first_cell, cells, crc32c, data } = message;
        let (first_cell, cells) = (size(first_cell), size(cells));
        if cells == 0 {
            return Err(Error::new(Reason::PartialInvalid, format!("cells {first_cell}+0")));
        }
        if checksum(&[&data]) != crc32c {
            return Err(Error::new(Reason::Checksum, format!("partials of cells {first_cell}+{cells}")));
        }
        Ok(Self { first_cell, cells, data, crc32c })
    }
}

impl From<PartialRun> for proto::PartialRun {
    fn from(run: PartialRun) -> Self {
        let PartialRun { first_cell, cells, data, crc32c } = run;
        Self { first_cell: small(first_cell), cells: small(cells), crc32c, data }
    }
}
