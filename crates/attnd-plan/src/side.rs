//! Tensors beside Q, K and V: what they look like, and which part of them a share needs.
//!
//! A side tensor is a stack of *planes*, one for each batch element and head or one for all of them, and a plane is a
//! matrix of rows and columns. Where the columns are keys, a share needs those of its slots alone; [`Cutter`] cuts them
//! out of the stream. A plane that several kv groups of a share look at goes there once.
//!
//! Another kind of tensor is another [`SideTensor`], with its row in each of that type's methods, and a constructor of
//! its [`SideLayout`]; everything else here and in the nodes' transport asks these.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::sync::Arc;

use attnd_kernel::slot::{self, N_SLOTS, PAGE_KEYS};
use attnd_kernel::{AttnShape, DensePlane, Dtype};

pub use self::cutter::{Cutter, Gathered};
pub use self::projection::{MAX_WIDTH, Projected, Projection};
use crate::Tensor;
use crate::planner::Piece;

mod arrival;
mod cutter;
mod load;
mod projection;

pub(crate) use self::arrival::SideArrivals;
pub(crate) use self::load::SideLoad;

/// What travels beside Q, K and V, in the order in which it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SideTensor {
    /// Which keys a query may see, `[batch, heads, queries, keys]`.
    Mask,
    /// What is added to scores, `[batch, heads, queries, keys]`.
    Bias,
    /// The weights that rows had before, `[batch, heads, queries, keys]`.
    Previous,
    /// What makes a key of a row, for each kv head, see [`Projection`].
    KeyMatrix,
    /// What makes a value of a row.
    ValueMatrix,
    /// The rows that keys are made of, and values unless they have their own.
    Source,
    /// The rows that values are made of, if they are others.
    ValueSource,
}

impl SideTensor {
    /// All of them, in the order in which they come.
    pub const ALL: [Self; 7] = [
        Self::Mask,
        Self::Bias,
        Self::Previous,
        Self::KeyMatrix,
        Self::ValueMatrix,
        Self::Source,
        Self::ValueSource,
    ];
    /// Those of the scores, which an operator reads.
    pub const OF_SCORES: [Self; 3] = [Self::Mask, Self::Bias, Self::Previous];

    /// Whether a share gets the columns of its slots alone, of planes whose columns are keys.
    fn is_along_keys(self) -> bool {
        match self {
            Self::Mask | Self::Bias | Self::Source | Self::ValueSource => true,
            // What is around a key may be in any slot.
            Self::Previous => false,
            Self::KeyMatrix | Self::ValueMatrix => false,
        }
    }

    /// Whether it has a plane for each kv head, and not one for each query head.
    fn is_of_kv_heads(self) -> bool {
        matches!(self, Self::KeyMatrix | Self::ValueMatrix)
    }

    /// What its elements are.
    fn element_rule(self) -> &'static str {
        match self {
            Self::Mask | Self::Bias => "a mask is bool, and a mask of numbers is a bias",
            Self::Previous => "weights are numbers",
            Self::KeyMatrix | Self::ValueMatrix | Self::Source | Self::ValueSource => {
                "what keys and values are made of are numbers"
            }
        }
    }

    /// Whether it may have fewer keys than the call.
    fn may_lack_keys(self) -> bool {
        self != Self::Previous
    }

    /// What the call's option is called.
    pub fn option(self) -> &'static str {
        match self {
            Self::Mask => "mask.dense",
            Self::Bias => "bias.dense",
            Self::Previous => "score.previous",
            Self::KeyMatrix | Self::ValueMatrix | Self::Source => "projection",
            Self::ValueSource => "projection.value_source",
        }
    }
}

impl std::fmt::Display for SideTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Mask => "mask",
            Self::Bias => "bias",
            Self::Previous => "previous",
            Self::KeyMatrix => "w_k",
            Self::ValueMatrix => "w_v",
            Self::Source => "source",
            Self::ValueSource => "value_source",
        })
    }
}

/// One of the operands, or what travels beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AnyTensor {
    /// Q, K or V.
    Operand(Tensor),
    /// Beside them.
    Side(SideTensor),
}

impl From<Tensor> for AnyTensor {
    fn from(tensor: Tensor) -> Self {
        Self::Operand(tensor)
    }
}

impl From<SideTensor> for AnyTensor {
    fn from(tensor: SideTensor) -> Self {
        Self::Side(tensor)
    }
}

impl std::fmt::Display for AnyTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Operand(tensor) => tensor.fmt(f),
            Self::Side(tensor) => tensor.fmt(f),
        }
    }
}

/// The type of an element of a side tensor, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// A byte, 0 or 1.
    Bool,
    /// A number.
    Float(Dtype),
}

impl Element {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Bool => 1,
            Self::Float(dtype) => dtype.size(),
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool => f.write_str("bool"),
            Self::Float(dtype) => dtype.fmt(f),
        }
    }
}

/// Why a side tensor makes no sense for a call. Fields carry the name of the option as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SideError {
    /// Its dimensions are not those of the call.
    #[error(
        "{} is {got:?}, the call needs [{}, {}, {}, {}]",
        .tensor.option(), one_or(*.batch), one_or(*.heads), one_or(*.queries), keys_of(*.tensor, *.keys)
    )]
    Shape {
        /// Which one.
        tensor: SideTensor,
        /// `[batch, heads, queries, keys]` as given.
        got: [usize; 4],
        /// Batch elements of the call.
        batch: usize,
        /// Query heads.
        heads: usize,
        /// Query tokens.
        queries: usize,
        /// Key tokens.
        keys: usize,
    },
    /// A mask of numbers, or a bias of truths.
    #[error("{} is {element}: {}", .tensor.option(), .tensor.element_rule())]
    Element {
        /// Which one.
        tensor: SideTensor,
        /// The type of its elements.
        element: Element,
    },
    /// Rows of no elements, or of too many.
    #[error("{tensor} has rows of {width} elements, 1 to {MAX_WIDTH} make a key or a value")]
    Width {
        /// What is or takes such rows.
        tensor: SideTensor,
        /// Elements of a row.
        width: usize,
    },
    /// Rows that are said to be the same, and have other widths or types.
    #[error("values are made of the rows of keys, which have one width and one type")]
    Rows,
    /// Two tensors of a kind.
    #[error("{} twice", .tensor.option())]
    Twice {
        /// Which one.
        tensor: SideTensor,
    },
}

fn one_or(size: usize) -> String {
    if size == 1 { "1".to_owned() } else { format!("1 or {size}") }
}

fn keys_of(tensor: SideTensor, keys: usize) -> String {
    if tensor.may_lack_keys() { format!("1 to {keys}") } else { keys.to_string() }
}

/// Dimensions of a side tensor of a call; only constructors that check them make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SideLayout {
    tensor: SideTensor,
    element: Element,
    /// 1 for all, or the call's.
    batch: usize,
    /// 1 for all, or the call's query heads.
    heads: usize,
    rows: usize,
    columns: usize,
    /// Elements of a column in a row: 1, unless the columns are rows of numbers themselves.
    width: usize,
}

impl SideLayout {
    /// A tensor `[batch, heads, queries, keys]`. Each of the first three may be 1, for all; keys that a mask or a bias lacks
    /// are masked.
    ///
    /// # Errors
    /// [`SideError`] where it doesn't fit the call, or has elements of another kind than it should.
    pub fn dense(
        tensor: SideTensor,
        element: Element,
        dims: [usize; 4],
        shape: &AttnShape,
    ) -> Result<Self, SideError> {
        if (tensor == SideTensor::Mask) != (element == Element::Bool) {
            return Err(SideError::Element { tensor, element });
        }
        let [batch, heads, rows, columns] = dims;
        let fits = [1, shape.batch()].contains(&batch)
            && [1, shape.n_heads()].contains(&heads)
            && [1, shape.n_queries()].contains(&rows)
            && (1..=shape.n_keys()).contains(&columns)
            && (tensor.may_lack_keys() || columns == shape.n_keys());
        if !fits {
            return Err(SideError::Shape {
                tensor,
                got: dims,
                batch: shape.batch(),
                heads: shape.n_heads(),
                queries: shape.n_queries(),
                keys: shape.n_keys(),
            });
        }
        Ok(Self { tensor, element, batch, heads, rows, columns, width: 1 })
    }

    /// Which one.
    pub fn tensor(&self) -> SideTensor {
        self.tensor
    }

    /// The type of its elements.
    pub fn element(&self) -> Element {
        self.element
    }

    /// `[batch, heads, rows, columns]`.
    pub fn dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.rows, self.columns]
    }

    /// Planes, in the order in which they come.
    pub fn n_planes(&self) -> usize {
        self.batch * self.heads
    }

    /// Rows of a plane.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of a plane.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of all of it, as it travels from the client.
    pub fn bytes(&self) -> u64 {
        self.n_planes() as u64 * self.rows as u64 * self.row_bytes() as u64
    }

    /// Bytes of a column in a row of a plane.
    pub fn column_bytes(&self) -> usize {
        self.width * self.element.size()
    }

    /// Bytes of a row of a plane.
    fn row_bytes(&self) -> usize {
        self.columns * self.column_bytes()
    }

    /// The planes that the heads of a kv group look at: one for all of them, or one for each.
    pub fn planes_of(&self, group: usize, shape: &AttnShape) -> Range<usize> {
        let (batch, kv_head) = (group / shape.n_kv_heads(), group % shape.n_kv_heads());
        let before = if self.batch == 1 { 0 } else { batch * self.heads };
        let in_group = self.planes_per_group(shape);
        let first = before + if self.heads == 1 { 0 } else { kv_head * in_group };
        first..first + in_group
    }

    fn planes_per_group(&self, shape: &AttnShape) -> usize {
        if self.heads == 1 || self.tensor.is_of_kv_heads() { 1 } else { shape.group_size() }
    }

    /// What a share of these pieces needs, ascending by plane and then by slot. Each piece's slots are in one part of
    /// each plane that its groups look at. Coordinator and worker both use this, so they can't disagree.
    pub fn parts(&self, pieces: &[Piece], shape: &AttnShape) -> Vec<PlanePart> {
        // By the first plane that a group looks at: groups that share one share all of theirs.
        let mut needed: BTreeMap<usize, (Range<usize>, Vec<Range<usize>>)> = BTreeMap::new();
        for piece in pieces {
            for group in piece.groups.clone() {
                let planes = self.planes_of(group, shape);
                let (_, slots) = needed.entry(planes.start).or_insert_with(|| (planes, Vec::new()));
                if slots.last() != Some(&piece.slots) {
                    slots.push(piece.slots.clone());
                }
            }
        }
        let mut parts = Vec::new();
        for (planes, slots) in needed.into_values() {
            let whole = 0..N_SLOTS;
            let runs = if self.tensor.is_along_keys() { joined(slots) } else { vec![whole] };
            let of_plane = |plane| runs.iter().map(move |slots| PlanePart { plane, slots: slots.clone() });
            parts.extend(planes.flat_map(of_plane));
        }
        parts
    }

    /// The columns of these slots, as runs of consecutive ones, ascending.
    pub fn columns_of(&self, slots: &Range<usize>) -> Vec<Range<usize>> {
        if !self.tensor.is_along_keys() || *slots == (0..N_SLOTS) {
            return std::iter::once(0..self.columns).collect();
        }
        let mut runs: Vec<Range<usize>> = Vec::new();
        for page in 0..slot::n_pages(self.columns) {
            if !slots.contains(&slot::slot_of_page(page)) {
                continue;
            }
            let keys = page * PAGE_KEYS..page * PAGE_KEYS + slot::keys_in_page(page, self.columns);
            match runs.last_mut() {
                Some(last) if last.end == keys.start => last.end = keys.end,
                _ => runs.push(keys),
            }
        }
        runs
    }

    /// How many columns these slots have.
    fn n_columns(&self, slots: &Range<usize>) -> usize {
        if self.tensor.is_along_keys() {
            slot::keys_in_slots(slots.clone(), self.columns)
        } else {
            self.columns
        }
    }

    /// Elements of a part.
    pub fn part_elements(&self, part: &PlanePart) -> usize {
        self.rows * self.n_columns(&part.slots) * self.width
    }

    /// Bytes of a part, as it travels to its worker.
    pub fn part_bytes(&self, part: &PlanePart) -> u64 {
        self.sent_bytes(&part.slots)
    }

    /// The same of a part of these slots of any plane.
    fn sent_bytes(&self, slots: &Range<usize>) -> u64 {
        self.rows as u64 * self.n_columns(slots) as u64 * self.column_bytes() as u64
    }

    /// Bytes that a part takes on its worker.
    pub fn resident_bytes(&self, part: &PlanePart, shape: &AttnShape) -> u64 {
        self.resident_in_slots(&part.slots, shape)
    }

    /// The same of a part of these slots of any plane.
    fn resident_in_slots(&self, slots: &Range<usize>, shape: &AttnShape) -> u64 {
        let pages =
            || -> usize { slots.clone().map(|slot| slot::pages_of_slot(slot, shape.n_keys()).count()).sum() };
        let f32s = |elements: usize| elements as u64 * size_of::<f32>() as u64;
        match self.tensor {
            SideTensor::Mask | SideTensor::Bias => {
                let is_bias = self.tensor == SideTensor::Bias;
                let page_row = DensePlane::bytes_needed(1, PAGE_KEYS, &(0..N_SLOTS), is_bias);
                self.rows as u64 * pages() as u64 * page_row
            }
            SideTensor::Previous => self.rows as u64 * f32s(pages() * PAGE_KEYS),
            SideTensor::KeyMatrix | SideTensor::ValueMatrix => self.matrix_bytes(),
            SideTensor::Source | SideTensor::ValueSource => f32s(self.n_columns(slots) * self.width),
        }
    }
}

/// Ranges as the fewest that cover the same, ascending.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The columns of some slots, of one plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanePart {
    /// Which plane.
    pub plane: usize,
    /// Slots of the key axis.
    pub slots: Range<usize>,
}

/// The side tensors of a call, at most one of each kind, in the order in which they come. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sides(Arc<[SideLayout]>);

impl Sides {
    /// These, in any order.
    ///
    /// # Errors
    /// [`SideError::Twice`].
    pub fn new(mut layouts: Vec<SideLayout>) -> Result<Self, SideError> {
        layouts.sort_by_key(SideLayout::tensor);
        match layouts.windows(2).find(|pair| pair[0].tensor == pair[1].tensor) {
            Some(pair) => Err(SideError::Twice { tensor: pair[0].tensor }),
            None => Ok(Self(layouts.into())),
        }
    }

    /// The one of that kind.
    pub fn of(&self, tensor: SideTensor) -> Option<&SideLayout> {
        self.0.iter().find(|layout| layout.tensor == tensor)
    }

    /// Bytes of all of them, as they travel from the client.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(SideLayout::bytes).sum()
    }
}

impl Deref for Sides {
    type Target = [SideLayout];

    fn deref(&self) -> &[SideLayout] {
        &self.0
    }
}

#[cfg(test)]
pub(crate) mod tests;
