//! What a worker needs for its second pass over some rows, and what it knows of them then.

use std::ops::Range;

use attnd_kernel::slot::keys_in_slots;
use attnd_kernel::{Heat, NodeReport, Outputs, Ranked};
use bytes::Bytes;

use crate::checksum::checksum;
use crate::compute::{CallShape, ComputeBegin};
use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::floats;
use crate::proto;

/// What the weights of some rows are divided by.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedSums {
    /// Kv group, flattened over the batch.
    pub group: usize,
    /// Query tokens: those of one cell.
    pub tokens: Range<usize>,
    /// `[head in group, token]`, log2 units.
    pub m: Vec<f32>,
    /// `[head in group, token]`.
    pub l: Vec<f32>,
}

/// What is known of some rows from all keys of a share.
#[derive(Clone, Debug, PartialEq)]
pub struct ShareReport {
    /// Kv group, flattened over the batch.
    pub group: usize,
    /// Query tokens: those of one cell.
    pub tokens: Range<usize>,
    /// It fits the outputs of the call.
    pub report: NodeReport,
}

impl MergedSums {
    /// Decodes the sums of a cell of the share that `begun` describes.
    ///
    /// # Errors
    /// [`Reason::StreamOrder`] where no outputs are wanted, [`Reason::Pieces`], [`Reason::PayloadLength`], [`Reason::Checksum`], and
    /// [`Reason::PartialInvalid`] for sums that no rows have.
    pub fn decode(message: proto::RowSums, begun: &ComputeBegin) -> Result<Self, Error> {
        let proto::RowSums { group, first_token, tokens, crc32c, m, l } = message;
        let place = format!("sums of group {group} tokens {first_token}+{tokens}");
        if begun.outputs.is_none() {
            return Err(Error::new(Reason::StreamOrder, format!("{place}: no outputs are wanted")));
        }
        let group = convert::size(group);
        let n_keys = begun.shape.n_keys();
        let mut of_group = begun.pieces.iter().filter(|piece| piece.groups.contains(&group));
        if !of_group.any(|piece| keys_in_slots(piece.slots.clone(), n_keys) > 0) {
            return Err(Error::new(Reason::Pieces, format!("{place}: no keys of it are in this share")));
        }
        let n_queries = begun.shape.n_queries();
        let range = convert::range(first_token, tokens, n_queries).filter(|range| {
            let is_first = range.start.is_multiple_of(begun.tokens_per_cell);
            is_first && range.end == n_queries.min(range.start + begun.tokens_per_cell)
        });
        let Some(tokens) = range else {
            let detail = format!("{place}: {} tokens in cells of {}", n_queries, begun.tokens_per_cell);
            return Err(Error::new(Reason::Pieces, detail));
        };
        let need = begun.shape.group_size() * tokens.len() * size_of::<f32>();
        if (m.len(), l.len()) != (need, need) {
            let detail = format!("{place}: needs {need} + {need} bytes, got {} + {}", m.len(), l.len());
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        if checksum(&[&m, &l]) != crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        let (m, l) = (floats::from_bytes(&m), floats::from_bytes(&l));
        let is_sum = |(m, l): (&f32, &f32)| match begun.allow_non_finite {
            false => *m < f32::INFINITY && *l >= 0.0 && *l < f32::INFINITY,
            true => m.is_nan() || l.is_nan() || *l >= 0.0,
        };
        if let Some(row) = m.iter().zip(&l).position(|sums| !is_sum(sums)) {
            let detail = format!("{place}: row {row} has m {}, l {}", m[row], l[row]);
            return Err(Error::new(Reason::PartialInvalid, detail));
        }
        Ok(Self { group, tokens, m, l })
    }
}

impl From<MergedSums> for proto::RowSums {
    fn from(sums: MergedSums) -> Self {
        let (m, l) = (floats::into_bytes(sums.m), floats::into_bytes(sums.l));
        Self {
            group: small(sums.group),
            first_token: small(sums.tokens.start),
            tokens: small(sums.tokens.len()),
            crc32c: checksum(&[&m, &l]),
            m,
            l,
        }
    }
}

fn integers(values: Vec<i64>) -> Bytes {
    values.into_iter().flat_map(i64::to_le_bytes).collect::<Vec<u8>>().into()
}

fn from_integers(bytes: &[u8]) -> Vec<i64> {
    bytes.as_chunks().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect()
}

impl ShareReport {
    /// Decodes a report that some keys of `call` can have given. Whether it was asked for is for the call's state machine to say.
    ///
    /// # Errors
    /// [`Reason::PartialInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::NodeReport, call: &CallShape) -> Result<Self, Error> {
        let proto::NodeReport { group, first_token, tokens, crc32c, .. } = message;
        let place = format!("report on group {group} tokens {first_token}+{tokens}");
        let invalid = |what: String| Error::new(Reason::PartialInvalid, format!("{place}: {what}"));
        let outputs = call.outputs.as_deref().ok_or_else(|| invalid("no outputs are wanted".to_owned()))?;
        let group = convert::size(group);
        if group >= call.shape.n_groups() {
            return Err(invalid(format!("there are {} groups", call.shape.n_groups())));
        }
        let tokens = convert::range(first_token, tokens, call.shape.n_queries())
            .ok_or_else(|| invalid(format!("there are {} tokens", call.shape.n_queries())))?;
        let lists = [
            &message.top,
            &message.mass,
            &message.entropy,
            &message.distance,
            &message.max_score,
            &message.heat,
        ];
        if checksum(&lists.map(|bytes| &bytes[..])) != crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        let report = report_of(&message, outputs, group, &tokens);
        report.check(outputs, group, &tokens).map_err(|error| invalid(error.to_string()))?;
        Ok(Self { group, tokens, report })
    }
}

fn report_of(
    message: &proto::NodeReport,
    outputs: &Outputs,
    group: usize,
    tokens: &Range<usize>,
) -> NodeReport {
    let heat = match outputs.parts().heatmap {
        None => Heat { cells: from_integers(&message.heat), ..Heat::default() },
        Some((_, columns)) => Heat {
            heads: outputs.heads_of_group(group),
            rows: outputs.heat_rows_of(tokens),
            columns,
            cells: from_integers(&message.heat),
        },
    };
    let ranked = message.top.as_chunks().0.iter().map(|raw| Ranked::from_bits(u64::from_le_bytes(*raw)));
    NodeReport {
        heads: outputs.heads_of_group(group),
        tokens: tokens.clone(),
        top: ranked.collect(),
        mass: from_integers(&message.mass),
        entropy: from_integers(&message.entropy),
        distance: from_integers(&message.distance),
        max_score: floats::from_bytes(&message.max_score),
        heat,
        // Who computed the rows has said so before.
        overflow: None,
    }
}

impl From<ShareReport> for proto::NodeReport {
    fn from(share: ShareReport) -> Self {
        let NodeReport { top, mass, entropy, distance, max_score, heat, .. } = share.report;
        let top: Bytes =
            top.into_iter().flat_map(|ranked| ranked.to_bits().to_le_bytes()).collect::<Vec<u8>>().into();
        let [mass, entropy, distance, heat] = [mass, entropy, distance, heat.cells].map(integers);
        let max_score = floats::into_bytes(max_score);
        Self {
            group: small(share.group),
            first_token: small(share.tokens.start),
            tokens: small(share.tokens.len()),
            crc32c: checksum(&[&top, &mass, &entropy, &distance, &max_score, &heat]),
            top,
            mass,
            entropy,
            distance,
            max_score,
            heat,
        }
    }
}
