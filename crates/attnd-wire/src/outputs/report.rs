//! Numbers of rows and rows of maps, as the client gets them.

use std::ops::Range;

use attnd_kernel::{AttnShape, FinishedReport, Outputs};
use bytes::Bytes;

use crate::checksum::checksum;
use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::floats;
use crate::proto;

/// Numbers of the rows of some consecutive query heads and query tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportChunk {
    /// Query heads, flattened over the batch; of one batch element, all of them wanted.
    pub heads: Range<usize>,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// Of these rows, `[head, token]`.
    pub numbers: FinishedReport,
}

/// Rows of the maps of some consecutive query heads.
#[derive(Clone, Debug, PartialEq)]
pub struct HeatChunk {
    /// Query heads, flattened over the batch; of one batch element, all of them wanted.
    pub heads: Range<usize>,
    /// Rows of the map.
    pub rows: Range<usize>,
    /// `[heads, rows, columns]`.
    pub cells: Vec<f32>,
}

/// Some heads of which outputs are wanted, all of one batch element.
fn heads_of(first: u32, len: u32, shape: &AttnShape, outputs: &Outputs) -> Result<Range<usize>, String> {
    let n_heads = shape.n_heads();
    let heads = convert::range(first, len, shape.batch() * n_heads).ok_or("there are no such heads")?;
    let wanted = outputs.heads();
    let (from, to) = (heads.start % n_heads, (heads.end - 1) % n_heads + 1);
    if heads.start / n_heads != (heads.end - 1) / n_heads || from < wanted.start || to > wanted.end {
        return Err(format!("not inside heads {wanted:?} of a batch element"));
    }
    Ok(heads)
}

impl ReportChunk {
    /// Decodes numbers of rows of a call: inside of what is wanted, with exactly the bytes they need and the right checksum.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::Report, shape: &AttnShape, outputs: &Outputs) -> Result<Self, Error> {
        let proto::Report { first_head, heads, first_token, tokens, .. } = message;
        let place = format!("report on heads {first_head}+{heads} tokens {first_token}+{tokens}");
        let invalid = |what: String| Error::new(Reason::ReplyInvalid, format!("{place}: {what}"));
        let heads = heads_of(first_head, heads, shape, outputs).map_err(invalid)?;
        let tokens = convert::range(first_token, tokens, shape.n_queries())
            .ok_or_else(|| invalid(format!("there are {} tokens", shape.n_queries())))?;
        let parts = outputs.parts();
        let rows = heads.len() as u64 * tokens.len() as u64 * 4;
        let of = |is_wanted: bool| if is_wanted { rows } else { 0 };
        let lists = [
            ("top_keys", &message.top_keys, rows * parts.top_k as u64),
            ("top_weights", &message.top_weights, rows * parts.top_k as u64),
            ("top_scores", &message.top_scores, rows * parts.top_k as u64),
            ("mass", &message.mass, rows * outputs.mass_blocks() as u64),
            ("entropy", &message.entropy, of(parts.entropy)),
            ("distance", &message.distance, of(parts.distance)),
            ("max_score", &message.max_score, of(parts.max_score)),
        ];
        if let Some((field, got, need)) = lists.iter().find(|(_, got, need)| got.len() as u64 != *need) {
            return Err(invalid(format!("{field} needs {need} bytes, got {}", got.len())));
        }
        if checksum(&lists.map(|(_, bytes, _)| &bytes[..])) != message.crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        let top_keys: Vec<u32> =
            message.top_keys.as_chunks().0.iter().map(|raw| u32::from_le_bytes(*raw)).collect();
        let is_key = |key: u32| key == u32::MAX || convert::size(key) < shape.n_keys();
        if let Some(key) = top_keys.iter().find(|key| !is_key(**key)) {
            return Err(invalid(format!("top key {key}, there are {}", shape.n_keys())));
        }
        let numbers = FinishedReport {
            top_keys,
            top_weights: floats::from_bytes(&message.top_weights),
            top_scores: floats::from_bytes(&message.top_scores),
            mass: floats::from_bytes(&message.mass),
            entropy: floats::from_bytes(&message.entropy),
            distance: floats::from_bytes(&message.distance),
            max_score: floats::from_bytes(&message.max_score),
        };
        Ok(Self { heads, tokens, numbers })
    }
}

impl From<ReportChunk> for proto::Report {
    fn from(chunk: ReportChunk) -> Self {
        let ReportChunk { heads, tokens, numbers } = chunk;
        let FinishedReport { top_keys, top_weights, top_scores, mass, entropy, distance, max_score } =
            numbers;
        let top_keys: Bytes = top_keys.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>().into();
        let [top_weights, top_scores, mass, entropy, distance, max_score] =
            [top_weights, top_scores, mass, entropy, distance, max_score].map(floats::into_bytes);
        let crc32c =
            checksum(&[&top_keys, &top_weights, &top_scores, &mass, &entropy, &distance, &max_score]);
        Self {
            first_head: small(heads.start),
            heads: small(heads.len()),
            first_token: small(tokens.start),
            tokens: small(tokens.len()),
            crc32c,
            top_keys,
            top_weights,
            top_scores,
            mass,
            entropy,
            distance,
            max_score,
        }
    }
}

impl HeatChunk {
    /// Decodes rows of maps of a call: inside of what is wanted, with exactly the bytes they need and the right checksum.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::HeatRows, shape: &AttnShape, outputs: &Outputs) -> Result<Self, Error> {
        let proto::HeatRows { first_head, heads, first_row, rows, crc32c, cells } = message;
        let place = format!("heatmap of heads {first_head}+{heads} rows {first_row}+{rows}");
        let invalid = |what: String| Error::new(Reason::ReplyInvalid, format!("{place}: {what}"));
        let heads = heads_of(first_head, heads, shape, outputs).map_err(invalid)?;
        let (n_rows, columns) = outputs.parts().heatmap.unwrap_or((0, 0));
        let rows = convert::range(first_row, rows, n_rows)
            .ok_or_else(|| invalid(format!("there are {n_rows} rows")))?;
        let need = (heads.len() * rows.len()) as u64 * columns as u64 * 4;
        if cells.len() as u64 != need {
            return Err(invalid(format!("needs {need} bytes, got {}", cells.len())));
        }
        if checksum(&[&cells]) != crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        Ok(Self { heads, rows, cells: floats::from_bytes(&cells) })
    }
}

impl From<HeatChunk> for proto::HeatRows {
    fn from(chunk: HeatChunk) -> Self {
        let cells = floats::into_bytes(chunk.cells);
        Self {
            first_head: small(chunk.heads.start),
            heads: small(chunk.heads.len()),
            first_row: small(chunk.rows.start),
            rows: small(chunk.rows.len()),
            crc32c: checksum(&[&cells]),
            cells,
        }
    }
}
