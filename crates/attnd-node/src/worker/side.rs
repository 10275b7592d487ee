//! What travels beside the operands of a share, as it arrives: the parts of masks and biases that its kv groups look at
//! become planes that kernels read, and so do weights that rows had before. Rows and matrices that keys and values are made of are kept
//! as they come, in f32, see [`super::projection`].
//!
//! The bytes of a part come in ascending order, in any cut, parts of a tensor side by side. A part has a matrix of its
//! own, with the keys of its slots alone; of each row, the keys of a page are stored as soon as they are complete.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::PAGE_KEYS;
use attnd_kernel::{AttnShape, DensePlane, OutOfMemory, first_non_finite, widen};
use attnd_plan::{Element, Piece, PlanePart, SideLayout, SideTensor, Sides, Tensor};
use attnd_wire::{Error, Reason, refusal};

use super::projection::HeadMatrix;
use crate::budget::Reservation;

/// Memory that the parts of a share take, in bytes.
pub(crate) fn bytes_needed(sides: &Sides, pieces: &[Piece], shape: &AttnShape) -> u64 {
    let of_tensor = |layout: &SideLayout| -> u64 {
        layout.parts(pieces, shape).iter().map(|part| layout.resident_bytes(part, shape)).sum()
    };
    sides.iter().map(of_tensor).sum()
}

/// The side tensors of a share on their way in.
#[derive(Debug)]
pub(crate) struct SideAssembly {
    shape: AttnShape,
    /// Whether rows that keys and values are made of must be finite; what scores read must be, always.
    check_finite: bool,
    tensors: Vec<TensorAssembly>,
    memory: Reservation,
}

#[derive(Debug)]
struct TensorAssembly {
    layout: SideLayout,
    parts: Vec<PartAssembly>,
}

#[derive(Debug)]
struct PartAssembly {
    part: PlanePart,
    pages: Arc<RowPages>,
    bytes: u64,
    /// Bytes that are here, `staged` included.
    got: u64,
    /// The beginning of a page of a row, where a message ended inside of it.
    staged: Vec<u8>,
    /// Created on the first byte, so that what comes later takes nothing yet.
    plane: Option<Plane>,
}

/// The elements of a part as kernels read them.
#[derive(Debug)]
enum Plane {
    /// Of a mask or a bias, the keys of some slots.
    Dense(DensePlane),
    /// Of previous weights, all, `[rows, keys]`; of what keys and values are made of, the rows of some slots, `[keys, width]`.
    Whole(Vec<f32>),
    /// What makes keys or values of rows.
    Matrix(HeadMatrix),
}

/// Rows of a batch element that keys or values are made of.
#[derive(Debug)]
pub(crate) struct SourceRows<'a> {
    /// `[keys of the slots, width]`.
    pub(crate) rows: &'a [f32],
    pub(crate) width: usize,
    pub(crate) slots: Range<usize>,
}

/// The pages of a row of a part, each with where its keys end in that row, in bytes.
#[derive(Debug)]
struct RowPages(Vec<(usize, usize)>);

/// The parts of one tensor, ascending by plane and then by slot.
type Planes = Vec<(PlanePart, Plane)>;

/// The planes of a share. Their memory goes back with the last group that looks at them.
#[derive(Debug, Default)]
pub(crate) struct SidePlanes {
    tensors: Vec<(SideLayout, Planes)>,
    _memory: Option<Reservation>,
}

impl SideAssembly {
    /// Expects the parts of these pieces; `memory` holds what [`bytes_needed`] says.
    pub(crate) fn new(
        sides: &Sides,
        pieces: &[Piece],
        shape: AttnShape,
        check_finite: bool,
        memory: Reservation,
    ) -> Self {
        let tensors = sides.iter().map(|layout| TensorAssembly::new(*layout, pieces, &shape));
        Self { shape, check_finite, tensors: tensors.collect(), memory }
    }

    /// Bytes that have to arrive, as they are on the wire.
    pub(crate) fn bytes_expected(&self) -> u64 {
        self.parts().map(|(_, part)| part.bytes).sum()
    }

    fn parts(&self) -> impl Iterator<Item = (SideTensor, &PartAssembly)> {
        self.tensors.iter().flat_map(|of| of.parts.iter().map(move |part| (of.layout.tensor(), part)))
    }

    /// The first tensor of which something is missing.
    pub(crate) fn missing(&self) -> Option<SideTensor> {
        self.parts().find(|(_, part)| part.got < part.bytes).map(|(tensor, _)| tensor)
    }

    /// Takes the next bytes of a part: `data` begins `offset` bytes into its matrix.
    ///
    /// # Errors
    /// [`Reason::Pieces`] for a part that isn't the share's, [`Reason::ChunkOrder`] for bytes that aren't the next
    /// ones, [`Reason::NonFinite`] and [`Reason::Dtype`] for an element that is none.
    pub(crate) fn accept(
        &mut self,
        tensor: SideTensor,
        part: usize,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Error> {
        let of = self.tensors.iter_mut().find(|of| of.layout.tensor() == tensor);
        let unexpected = || Error::new(Reason::Pieces, format!("{tensor} part {part} is not expected here"));
        let TensorAssembly { layout, parts } = of.ok_or_else(unexpected)?;
        let at = parts.get_mut(part).ok_or_else(unexpected)?;
        if offset != at.got || data.len() as u64 > at.bytes - at.got {
            let detail = format!("{tensor} part {part}: expected offset {}, got {offset}", at.got);
            return Err(Error::new(Reason::ChunkOrder, detail));
        }
        match tensor {
            SideTensor::Mask | SideTensor::Bias | SideTensor::Previous => at.take(layout, &self.shape, data),
            SideTensor::KeyMatrix | SideTensor::ValueMatrix => at.append(layout, &self.shape, false, data),
            SideTensor::Source | SideTensor::ValueSource => {
                at.append(layout, &self.shape, self.check_finite, data)
            }
        }
    }

    /// The planes, once everything is here.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub(crate) fn finish(self) -> Result<SidePlanes, Error> {
        let shape = self.shape;
        let finish = |TensorAssembly { layout, parts }| -> Result<(SideLayout, Planes), OutOfMemory> {
            let finish = |PartAssembly { part, plane, .. }| -> Result<(PlanePart, Plane), OutOfMemory> {
                // Parts without a key never see a byte.
                let plane = plane.map_or_else(|| reserve(&layout, &part, &shape), Ok)?;
                Ok((part, plane))
            };
            Ok((layout, parts.into_iter().map(finish).collect::<Result<_, _>>()?))
        };
        let tensors = self.tensors.into_iter().map(finish).collect::<Result<_, _>>()?;
        Ok(SidePlanes { tensors, _memory: Some(self.memory) })
    }
}

impl TensorAssembly {
    fn new(layout: SideLayout, pieces: &[Piece], shape: &AttnShape) -> Self {
        // Parts of different planes mostly have the same slots.
        let mut known: Vec<(Range<usize>, Arc<RowPages>)> = Vec::new();
        let assembly = |part: PlanePart| {
            let pages = match known.iter().find(|(slots, _)| *slots == part.slots) {
                Some((_, pages)) => Arc::clone(pages),
                None => {
                    let pages = Arc::new(RowPages::new(&layout, &part.slots));
                    known.push((part.slots.clone(), Arc::clone(&pages)));
                    pages
                }
            };
            let bytes = layout.part_bytes(&part);
            PartAssembly { part, pages, bytes, got: 0, staged: Vec::new(), plane: None }
        };
        Self { layout, parts: layout.parts(pieces, shape).into_iter().map(assembly).collect() }
    }
}

impl RowPages {
    fn new(layout: &SideLayout, slots: &Range<usize>) -> Self {
        let mut pages = Vec::new();
        let mut end = 0;
        for columns in layout.columns_of(slots) {
            for first in columns.clone().step_by(PAGE_KEYS) {
                end += (columns.end - first).min(PAGE_KEYS) * layout.column_bytes();
                pages.push((first / PAGE_KEYS, end));
            }
        }
        Self(pages)
    }

    /// Bytes of a row.
    fn width(&self) -> usize {
        self.0.last().map_or(0, |(_, end)| *end)
    }
}

impl PartAssembly {
    /// Takes the next numbers of a part that is resident as they come, and widened.
    fn append(
        &mut self,
        layout: &SideLayout,
        shape: &AttnShape,
        check_finite: bool,
        data: &[u8],
    ) -> Result<(), Error> {
        let plane = match &mut self.plane {
            Some(plane) => plane,
            None => self.plane.insert(reserve(layout, &self.part, shape)?),
        };
        let (Plane::Whole(elements) | Plane::Matrix(HeadMatrix { elements, .. }), Element::Float(dtype)) =
            (plane, layout.element())
        else {
            return Err(Error::new(Reason::Internal, format!("{} of no numbers", layout.tensor())));
        };
        let begin = elements.len();
        elements.resize(begin + data.len() / dtype.size(), 0.0);
        let new = &mut elements[begin..];
        widen(data, dtype, new);
        self.got += data.len() as u64;
        match first_non_finite(new).filter(|_| check_finite) {
            Some(at) => {
                let (row, i) = ((begin + at) / layout.width(), (begin + at) % layout.width());
                let key = layout.columns_of(&self.part.slots).into_iter().flatten().nth(row);
                let place = [self.part.plane, key.unwrap_or_default(), i];
                Err(refusal::non_finite_source(layout.tensor(), place, new[at]))
            }
            None => Ok(()),
        }
    }

    /// Takes bytes that were checked to be the next ones.
    fn take(&mut self, layout: &SideLayout, shape: &AttnShape, data: &[u8]) -> Result<(), Error> {
        let Self { part, pages, got, staged, plane, .. } = self;
        let width = pages.width() as u64;
        let mut rest = data;
        while !rest.is_empty() {
            let plane = match plane {
                Some(plane) => plane,
                None => plane.insert(reserve(layout, part, shape)?),
            };
            let (row, in_row) = ((*got / width) as usize, (*got % width) as usize);
            let next = pages.0.partition_point(|(_, end)| *end <= in_row);
            let Some((page, end)) = pages.0.get(next).copied() else {
                return Err(Error::new(Reason::Internal, "a part has no such page"));
            };
            let (now, later) = rest.split_at(rest.len().min(end - in_row));
            *got += now.len() as u64;
            rest = later;
            let is_complete = in_row + now.len() == end;
            if is_complete && staged.is_empty() {
                store(plane, layout, part, (row, page), now)?;
                continue;
            }
            staged.extend_from_slice(now);
            if is_complete {
                store(plane, layout, part, (row, page), staged)?;
                staged.clear();
            }
        }
        Ok(())
    }
}

fn reserve(layout: &SideLayout, part: &PlanePart, shape: &AttnShape) -> Result<Plane, OutOfMemory> {
    match layout.tensor() {
        SideTensor::Mask => DensePlane::mask(layout.rows(), shape.n_keys(), &part.slots).map(Plane::Dense),
        SideTensor::Bias => DensePlane::bias(layout.rows(), shape.n_keys(), &part.slots).map(Plane::Dense),
        SideTensor::Previous | SideTensor::Source | SideTensor::ValueSource => {
            room(layout.part_elements(part)).map(Plane::Whole)
        }
        SideTensor::KeyMatrix | SideTensor::ValueMatrix => {
            room(layout.part_elements(part)).map(|elements| Plane::Matrix(HeadMatrix::new(elements)))
        }
    }
}

/// An empty vector that holds so many.
fn room(elements: usize) -> Result<Vec<f32>, OutOfMemory> {
    let mut room = Vec::new();
    room.try_reserve_exact(elements).map_err(|_full| OutOfMemory { bytes: elements as u64 * 4 })?;
    Ok(room)
}

/// Stores the keys of a page of a row.
fn store(
    plane: &mut Plane,
    layout: &SideLayout,
    part: &PlanePart,
    (row, page): (usize, usize),
    keys: &[u8],
) -> Result<(), Error> {
    let [_, heads, ..] = layout.dims();
    let at = |row: usize, key: usize| [part.plane / heads, part.plane % heads, row, key];
    let first = page * PAGE_KEYS;
    match (plane, layout.element()) {
        (Plane::Dense(plane), Element::Bool) => {
            if let Some(key) = keys.iter().position(|byte| *byte > 1) {
                return Err(refusal::not_bool(at(row, first + key), keys[key]));
            }
            plane.write_mask(row, page, keys);
            Ok(())
        }
        (Plane::Dense(plane), Element::Float(dtype)) => plane
            .write_bias(row, page, keys, dtype)
            .map_err(|found| refusal::non_finite_bias(at(found.row, found.key), found.value)),
        (Plane::Whole(weights), Element::Float(dtype)) => {
            // They come in order, and nothing is cleared before it is there.
            let begin = weights.len();
            if begin != row * layout.columns() + first {
                return Err(Error::new(Reason::Internal, "previous weights out of order"));
            }
            weights.resize(begin + keys.len() / dtype.size(), 0.0);
            let weights = &mut weights[begin..];
            widen(keys, dtype, weights);
            match first_non_finite(weights) {
                Some(key) => Err(refusal::non_finite_previous(at(row, first + key), weights[key])),
                None => Ok(()),
            }
        }
        (Plane::Whole(_), Element::Bool) => Err(Error::new(Reason::Internal, "previous weights of bools")),
        (Plane::Matrix(_), _) => Err(Error::new(Reason::Internal, "a matrix has no pages of keys")),
    }
}

impl SidePlanes {
    /// The planes that the heads of a kv group look at, one for all or one for each, with these slots at least.
    pub(crate) fn of_group<'a>(
        &'a self,
        tensor: SideTensor,
        group: usize,
        slots: &Range<usize>,
        shape: &AttnShape,
    ) -> Vec<&'a DensePlane> {
        let of = self.tensors.iter().find(|(layout, _)| layout.tensor() == tensor);
        let Some((layout, parts)) = of else { return Vec::new() };
        let dense = |plane: &'a Plane| match plane {
            Plane::Dense(plane) => Some(plane),
            Plane::Whole(_) | Plane::Matrix(_) => None,
        };
        let plane = |plane: usize| {
            let first = parts.partition_point(|(part, _)| part.plane < plane);
            let of_plane = parts[first..].iter().take_while(|(part, _)| part.plane == plane);
            let has_slots = |part: &PlanePart| part.slots.start <= slots.start && slots.end <= part.slots.end;
            of_plane
                .map(|(part, here)| (part, here))
                .find(|(part, _)| has_slots(part))
                .and_then(|(_, here)| dense(here))
        };
        layout.planes_of(group, shape).filter_map(plane).collect()
    }

    /// The weights that the rows of a kv group had before, for all of its heads or for each.
    pub(crate) fn previous_of_group(&self, group: usize, shape: &AttnShape) -> Vec<&[f32]> {
        let of = self.tensors.iter().find(|(layout, _)| layout.tensor() == SideTensor::Previous);
        let Some((layout, parts)) = of else { return Vec::new() };
        let whole = |plane: usize| {
            let at = parts.binary_search_by_key(&plane, |(part, _)| part.plane).ok()?;
            match &parts[at].1 {
                Plane::Whole(weights) => Some(&weights[..]),
                Plane::Dense(_) | Plane::Matrix(_) => None,
            }
        };
        layout.planes_of(group, shape).filter_map(whole).collect()
    }

    /// The rows that the keys, or the values, of a kv group are made of, those of these slots among them.
    pub(crate) fn source_of_group(
        &self,
        of: Tensor,
        group: usize,
        slots: &Range<usize>,
        shape: &AttnShape,
    ) -> Option<SourceRows<'_>> {
        let source = |tensor| self.tensors.iter().find(|(layout, _)| layout.tensor() == tensor);
        let own = source(SideTensor::ValueSource).filter(|_| of == Tensor::V);
        let (layout, parts) = own.or_else(|| source(SideTensor::Source))?;
        let plane = layout.planes_of(group, shape).start;
        let has_slots = |part: &PlanePart| part.slots.start <= slots.start && slots.end <= part.slots.end;
        let (part, rows) = parts.iter().find(|(part, _)| part.plane == plane && has_slots(part))?;
        match rows {
            Plane::Whole(rows) => Some(SourceRows { rows, width: layout.width(), slots: part.slots.clone() }),
            Plane::Dense(_) | Plane::Matrix(_) => None,
        }
    }

    /// What makes them of rows.
    pub(crate) fn matrix_of_group(
        &self,
        tensor: SideTensor,
        group: usize,
        shape: &AttnShape,
    ) -> Option<&HeadMatrix> {
        let (layout, parts) = self.tensors.iter().find(|(layout, _)| layout.tensor() == tensor)?;
        let plane = layout.planes_of(group, shape).start;
        let at = parts.binary_search_by_key(&plane, |(part, _)| part.plane).ok()?;
        match &parts[at].1 {
            Plane::Matrix(matrix) => Some(matrix),
            Plane::Dense(_) | Plane::Whole(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
