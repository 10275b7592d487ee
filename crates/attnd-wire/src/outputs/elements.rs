//! Elements of the score matrix, as a worker makes them and a client gets them: a coordinator hands them on.

use std::ops::Range;

use attnd_kernel::slot::PAGE_KEYS;
use attnd_kernel::{AttnShape, Outputs};
use bytes::Bytes;

use crate::checksum::checksum;
use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::proto;

/// Most bytes of elements in a message: a kernel makes them of 96 rows by a page at most, and some messages may wait for a slow
/// client.
const MAX_BYTES: u64 = 128 << 10;

/// Elements of one head, of some query tokens and some keys of one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elements {
    /// Index in [`Outputs::rectangles`].
    pub rectangle: usize,
    /// Query head, flattened over the batch.
    pub head: usize,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// Key tokens.
    pub keys: Range<usize>,
    /// `[tokens, keys]`, little-endian f32.
    pub data: Bytes,
}

impl Elements {
    /// Decodes elements that are inside of what is wanted of a call, with exactly the bytes they need and the right checksum.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub fn decode(message: proto::Elements, shape: &AttnShape, outputs: &Outputs) -> Result<Self, Error> {
        let proto::Elements { rectangle, head, first_token, tokens, first_key, keys, crc32c, data } = message;
        let place =
            format!("elements {rectangle} head {head} tokens {first_token}+{tokens} keys {first_key}+{keys}");
        let invalid = |what: &str| Error::new(Reason::ReplyInvalid, format!("{place}: {what}"));
        let (rectangle, head) = (convert::size(rectangle), convert::size(head));
        let wanted = outputs.rectangles().get(rectangle).ok_or_else(|| invalid("not wanted"))?;
        let tokens = convert::range(first_token, tokens, wanted.tokens.end);
        let keys = convert::range(first_key, keys, wanted.keys.end);
        let (Some(tokens), Some(keys)) = (tokens, keys) else { return Err(invalid("not wanted")) };
        let is_head =
            head < shape.batch() * shape.n_heads() && wanted.heads.contains(&(head % shape.n_heads()));
        if !is_head || tokens.start < wanted.tokens.start || keys.start < wanted.keys.start {
            return Err(invalid("not wanted"));
        }
        if keys.start / PAGE_KEYS != (keys.end - 1) / PAGE_KEYS {
            return Err(invalid("over a page's end"));
        }
        let need = (tokens.len() as u64) * (keys.len() * size_of::<f32>()) as u64;
        if need > MAX_BYTES {
            return Err(invalid(&format!("{need} bytes > {MAX_BYTES}")));
        }
        if data.len() as u64 != need {
            return Err(invalid(&format!("needs {need} bytes, got {}", data.len())));
        }
        if checksum(&[&data]) != crc32c {
            return Err(Error::new(Reason::Checksum, place));
        }
        Ok(Self { rectangle, head, tokens, keys, data })
    }
}

impl From<Elements> for proto::Elements {
    fn from(elements: Elements) -> Self {
        let Elements { rectangle, head, tokens, keys, data } = elements;
        Self {
            rectangle: small(rectangle),
            head: small(head),
            first_token: small(tokens.start),
            tokens: small(tokens.len()),
            first_key: small(keys.start),
            keys: small(keys.len()),
            crc32c: checksum(&[&data]),
            data,
        }
    }
}
