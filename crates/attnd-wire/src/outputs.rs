//! What is wanted beside the context, in messages; its modules are what then comes back.
//!
//! [`report`] and [`elements`] go to the client; [`share`] is what coordinator and worker exchange for them.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::{AttnShape, Operator, Outputs, OutputsError, OutputsParts, Rectangle, Stage};

use crate::convert::{size, small};
use crate::error::{Error, Reason};
use crate::proto;

pub mod elements;
pub mod report;
pub mod share;

/// Stages there are.
const MAX_STAGES: usize = 4;
/// Most rectangles in a call.
pub const MAX_RECTANGLES: usize = 64;
/// Most bytes of a report on one query token of a kv group. Reports of many tokens aim at less.
pub const MAX_REPORT_BYTES: u64 = 4 << 20;

impl From<Stage> for proto::Stage {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Raw => Self::Raw,
            Stage::Capped => Self::Capped,
            Stage::Masked => Self::Masked,
            Stage::Weights => Self::Weights,
        }
    }
}

fn stage(number: i32) -> Result<Stage, Error> {
    match proto::Stage::try_from(number) {
        Ok(proto::Stage::Raw) => Ok(Stage::Raw),
        Ok(proto::Stage::Capped) => Ok(Stage::Capped),
        Ok(proto::Stage::Masked) => Ok(Stage::Masked),
        Ok(proto::Stage::Weights) => Ok(Stage::Weights),
        Ok(proto::Stage::Unspecified) | Err(_) => {
            Err(Error::new(Reason::Outputs, format!("outputs.stage {number}")))
        }
    }
}

/// Checks outputs, however they were asked for: they make sense for the call, and their messages have a limit.
///
/// # Errors
/// [`Reason::Outputs`], and [`Reason::Combination`] for two options that exclude each other.
pub fn checked(
    parts: OutputsParts,
    shape: &AttnShape,
    operator: &Operator,
) -> Result<Option<Arc<Outputs>>, Error> {
    if parts.stages.len() > MAX_STAGES {
        let detail = format!("outputs.stages {} > {MAX_STAGES}", parts.stages.len());
        return Err(Error::new(Reason::Outputs, detail));
    }
    let wanted = parts.rectangles.len();
    if wanted > MAX_RECTANGLES {
        return Err(Error::new(Reason::Outputs, format!("outputs.rectangles {wanted} > {MAX_RECTANGLES}")));
    }
    let outputs = Outputs::new(parts, shape, operator)?;
    if outputs.is_empty() {
        return Ok(None);
    }
    let largest = (0..shape.n_kv_heads()).map(|group| outputs.report_bytes(group, &(0..1))).max();
    if let Some(bytes) = largest.filter(|bytes| *bytes > MAX_REPORT_BYTES) {
        let detail = format!(
            "a report on one query token of a kv group takes {bytes} bytes > {MAX_REPORT_BYTES}: ask for fewer keys, \
             blocks, columns or heads"
        );
        return Err(Error::new(Reason::Outputs, detail));
    }
    Ok(Some(Arc::new(outputs)))
}

/// Decodes the outputs of a call; `None` where there are none.
///
/// # Errors
/// As [`checked`].
pub(crate) fn decode(
    message: Option<proto::Outputs>,
    shape: &AttnShape,
    operator: &Operator,
) -> Result<Option<Arc<Outputs>>, Error> {
    let Some(message) = message else { return Ok(None) };
    let heatmap = match (size(message.heat_rows), size(message.heat_columns)) {
        (0, 0) => None,
        sides => Some(sides),
    };
    // A range whose end can't be said is none of the call's either.
    let range = |first: u32, len: u32| size(first)..size(first).saturating_add(size(len));
    let heads: Range<usize> = range(message.first_head, message.heads);
    if message.heads == 0 && message.first_head > 0 {
        let detail = format!("outputs.first_head {} and outputs.heads 0", message.first_head);
        return Err(Error::new(Reason::Outputs, detail));
    }
    let rectangle = |message: proto::Rectangle| {
        Ok(Rectangle {
            stage: stage(message.stage)?,
            heads: range(message.first_head, message.heads),
            tokens: range(message.first_token, message.tokens),
            keys: range(message.first_key, message.keys),
        })
    };
    let parts = OutputsParts {
        stages: message.stages.into_iter().map(stage).collect::<Result<_, _>>()?,
        rectangles: message.rectangles.into_iter().map(rectangle).collect::<Result<_, Error>>()?,
        top_k: size(message.top_k),
        mass_block: NonZeroUsize::new(size(message.mass_block)),
        entropy: message.entropy,
        distance: message.distance,
        max_score: message.max_score,
        heatmap,
        heads: (!heads.is_empty()).then_some(heads),
    };
    checked(parts, shape, operator)
}

/// The message of these outputs.
pub(crate) fn encode(outputs: &Outputs) -> proto::Outputs {
    let parts = outputs.parts();
    let (heat_rows, heat_columns) = parts.heatmap.unwrap_or((0, 0));
    let heads = parts.heads.clone().unwrap_or(0..0);
    let rectangle = |rectangle: &Rectangle| proto::Rectangle {
        stage: proto::Stage::from(rectangle.stage).into(),
        first_head: small(rectangle.heads.start),
        heads: small(rectangle.heads.len()),
        first_token: small(rectangle.tokens.start),
        tokens: small(rectangle.tokens.len()),
        first_key: small(rectangle.keys.start),
        keys: small(rectangle.keys.len()),
    };
    proto::Outputs {
        stages: parts.stages.iter().map(|stage| proto::Stage::from(*stage).into()).collect(),
        rectangles: parts.rectangles.iter().map(rectangle).collect(),
        top_k: small(parts.top_k),
        mass_block: small(parts.mass_block.map_or(0, NonZeroUsize::get)),
        entropy: parts.entropy,
        distance: parts.distance,
        max_score: parts.max_score,
        heat_rows: small(heat_rows),
        heat_columns: small(heat_columns),
        first_head: small(heads.start),
        heads: small(heads.len()),
    }
}

impl From<OutputsError> for Error {
    fn from(error: OutputsError) -> Self {
        let reason = match &error {
            OutputsError::Together { .. } | OutputsError::Positions(_) => Reason::Combination,
            OutputsError::Limit { .. } | OutputsError::Outside { .. } => Reason::Outputs,
        };
        Self::new(reason, error.to_string())
    }
}

#[cfg(test)]
mod tests;
