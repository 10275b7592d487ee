//! What an interval of a call's line takes: operands and what travels beside them.

use std::ops::Range;

use super::{Footprint, Line};
use crate::inspection::InspectionBytes;
use crate::planner::PlanRequest;
use crate::residency::Residency;
use crate::side::SideLoad;

/// The bytes of one call.
#[derive(Debug)]
pub(crate) struct CallFootprint {
    residency: Residency,
    /// Of the cells that are there at once.
    cell_bytes: u64,
    inspection: InspectionBytes,
    sides: Vec<SideLoad>,
}

impl Footprint for CallFootprint {
    /// What a worker must reserve: its operands, two cells of partials, one being computed and one being sent, its parts of the side
    /// tensors, and what a second pass needs.
    fn bytes(&self, line: &Line<Self>, places: &Range<usize>) -> u64 {
        let sides = match &self.sides[..] {
            [] => 0,
            sides => {
                let pieces = line.pieces(places);
                sides.iter().map(|side| side.resident(&pieces)).sum()
            }
        };
        line.pages(places) * self.residency.page_bytes()
            + line.groups(places) as u64 * (self.residency.query_bytes() + self.inspection.of_group)
            + self.residency.of_share()
            + self.cell_bytes
            + self.inspection.of_share
            + sides
    }
}

impl Line<CallFootprint> {
    pub(crate) fn new(req: &PlanRequest, tokens_per_cell: usize) -> Self {
        let PlanRequest { shape, operator, dtype, sides, outputs, .. } = req;
        let residency = Residency::new(*shape, *dtype, operator);
        let inspected = if outputs.is_some() { residency.inspected_bytes(tokens_per_cell) } else { 0 };
        let footprint = CallFootprint {
            residency,
            cell_bytes: 2 * residency.cell_bytes(tokens_per_cell) + inspected,
            inspection: InspectionBytes::new(outputs.as_deref(), shape, tokens_per_cell),
            sides: sides.iter().map(|layout| SideLoad::new(layout, shape)).collect(),
        };
        Self::of(shape.n_groups(), shape.n_keys(), footprint)
    }

    /// Bytes of what travels beside Q, K and V that the worker of an interval gets.
    pub(crate) fn side_bytes(&self, places: &Range<usize>) -> u64 {
        let pieces = self.pieces(places);
        self.footprint().sides.iter().map(|side| side.sent(&pieces)).sum()
    }

    /// The same of what keys and values are made of.
    pub(crate) fn source_bytes(&self, places: &Range<usize>) -> u64 {
        let pieces = self.pieces(places);
        let sides = self.footprint().sides.iter().filter(|side| side.is_of_projection());
        sides.map(|side| side.sent(&pieces)).sum()
    }
}
