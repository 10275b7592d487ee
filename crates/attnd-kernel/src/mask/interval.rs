//! The rules that leave each row one interval of keys. What several intervals have in common is one too, so any of them compose and
//! no kernel knows which there are. Only documents may be scattered: then the interval reaches from the first key to the last one.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use super::Causal;
use super::documents::{BatchDocuments, Documents};
use super::runs::KeyRuns;
use crate::shape::AttnShape;

/// Which keys the rows of a call see: those that every rule here lets through. The default lets all through.
///
/// Query `i` has a position `p` on the axis of the keys, see [`Positions`]. It sees key `j` if
///
/// * `causal`: `j <= p`, or `j < prefix` where there is one;
/// * `window`: `p - left <= j <= p + right`;
/// * `chunk` of `C` keys, counted from `key_begin`: `j` and `p` are in the same;
/// * `key_begin <= j < key_end` and `i < query_end`;
/// * `documents`: `j` is in the document of `i`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mask {
    /// Whether keys behind a query's position are hidden.
    pub causal: bool,
    /// Where queries stand on the axis of the keys; needed by `causal`, `window` and `chunk`, and by biases of the distance.
    pub positions: Option<Positions>,
    /// How far from its position a query sees.
    pub window: Window,
    /// Keys of a chunk.
    pub chunk: Option<NonZeroUsize>,
    /// Leading keys, padding on the left included, that the causal rule doesn't hide: those of a prefix that sees itself whole.
    pub prefix: Option<PerBatch<usize>>,
    /// First key that is none of the padding on the left.
    pub key_begin: Option<PerBatch<usize>>,
    /// Keys before the padding on the right.
    pub key_end: Option<PerBatch<usize>>,
    /// Queries before the padding on the right; those behind see nothing.
    pub query_end: Option<PerBatch<usize>>,
    /// Sequences packed into one. One whose keys are in several runs makes this the only rule that leaves no interval. They go with none of `chunk`, `prefix`, `key_end`, `query_end` and offsets: padding is a document,
    /// too.
    pub documents: Option<Arc<Documents>>,
}

/// The position `p` of query `i` on the axis of the keys. Where there are documents it is counted in that of the query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Positions {
    /// `p = i`; the first query stands at the first key.
    TopLeft,
    /// `p = i + key_end - query_end`; the last query stands at the last key. Both are lengths where none are given.
    BottomRight,
    /// `p = i + offset`.
    Offset(PerBatch<i64>),
}

/// How many keys before and behind its position a query sees, beside the one at it; `None` is any number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// Keys before.
    pub left: Option<usize>,
    /// Keys behind.
    pub right: Option<usize>,
}

/// A number for all of the batch, or one for each of its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PerBatch<T> {
    /// The same for all.
    Same(T),
    /// `[batch]`.
    Each(Arc<[T]>),
}

impl<T: Copy> PerBatch<T> {
    /// The number of one element.
    ///
    /// # Panics
    /// If there is none.
    pub fn of(&self, batch: usize) -> T {
        match self {
            Self::Same(value) => *value,
            Self::Each(values) => values[batch],
        }
    }
}

/// Why rules make no mask. The text names the options and both numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// Numbers for another batch.
    #[error("{option} has {got} entries, batch is {batch}")]
    Entries {
        /// Which option.
        option: &'static str,
        /// How many there are.
        got: usize,
        /// How many there should be.
        batch: usize,
    },
    /// A length reaches past the last token.
    #[error("{option}[{batch}] is {got}, {dimension} is {limit}")]
    Beyond {
        /// Which option.
        option: &'static str,
        /// Of which element of the batch.
        batch: usize,
        /// The length.
        got: usize,
        /// What limits it, as the API spells it.
        dimension: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Keys end before they begin.
    #[error("mask.key_begin[{batch}] is {begin}, mask.key_end[{batch}] is {end}")]
    Crossed {
        /// Of which element of the batch.
        batch: usize,
        /// Where they begin.
        begin: usize,
        /// Where they end.
        end: usize,
    },
    /// Queries have no positions where rules need them.
    #[error("{option} and no mask.positions: q_len {queries}, kv_len {keys} can be aligned two ways")]
    Unaligned {
        /// What needs them.
        option: &'static str,
        /// Queries, without padding.
        queries: usize,
        /// Keys, without padding on the right.
        keys: usize,
    },
    /// Two options that contradict each other.
    #[error("{one} and {other}")]
    Together {
        /// One of them.
        one: &'static str,
        /// The other one.
        other: &'static str,
    },
    /// Runs for other tokens than there are.
    #[error("{option}[{batch}] ends at {got}, {dimension} is {limit}")]
    Runs {
        /// Which option.
        option: &'static str,
        /// Of which element of the batch.
        batch: usize,
        /// Where the runs end.
        got: usize,
        /// Where they should, as the API spells it.
        dimension: &'static str,
        /// Where they should.
        limit: usize,
    },
    /// A run without tokens.
    #[error("{option}[{batch}]: run {run} ends at {end}, the one before at {before}")]
    EmptyRun {
        /// Which option.
        option: &'static str,
        /// Of which element of the batch.
        batch: usize,
        /// Which run.
        run: usize,
        /// Where it ends.
        end: usize,
        /// Where it begins.
        before: usize,
    },
}

impl Mask {
    /// The causal rule that this mask is, if it is no other.
    pub fn as_causal(&self) -> Option<Causal> {
        [Causal::None, Causal::BottomRight, Causal::TopLeft]
            .into_iter()
            .find(|rule| Self::from(*rule) == *self)
    }

    /// Whether what a row sees is an interval: always, but for documents whose keys are in several runs.
    pub(crate) fn leaves_intervals(&self) -> bool {
        !self.documents.as_ref().is_some_and(|documents| documents.is_scattered())
    }

    /// The mask of one element of the batch.
    ///
    /// # Panics
    /// If an option has no number for that element, which [`crate::Operator::new`] excludes.
    pub fn of_batch(&self, batch: usize, shape: &AttnShape) -> BatchMask<'_> {
        let (queries, keys) = self.lengths(batch, shape);
        let offset = match &self.positions {
            None | Some(Positions::TopLeft) => 0,
            Some(Positions::BottomRight) => signed(keys) - signed(queries),
            Some(Positions::Offset(offsets)) => offsets.of(batch),
        };
        BatchMask {
            causal: self.causal,
            offset,
            from_the_end: matches!(self.positions, Some(Positions::BottomRight)),
            left: self.window.left.and_then(|keys| i64::try_from(keys).ok()),
            right: self.window.right.and_then(|keys| i64::try_from(keys).ok()),
            chunk: self.chunk.map(|keys| signed(keys.get())),
            prefix: self.prefix.as_ref().map_or(0, |prefix| signed(prefix.of(batch))),
            key_begin: self.key_begin.as_ref().map_or(0, |begin| signed(begin.of(batch))),
            key_end: signed(keys.min(shape.n_keys())),
            query_end: queries,
            documents: self.documents.as_deref().map(|documents| documents.of_batch(batch)),
        }
    }

    /// Queries and keys of an element of the batch, without padding on the right.
    fn lengths(&self, batch: usize, shape: &AttnShape) -> (usize, usize) {
        let of = |lengths: &Option<PerBatch<usize>>, all| lengths.as_ref().map_or(all, |ends| ends.of(batch));
        (of(&self.query_end, shape.n_queries()), of(&self.key_end, shape.n_keys()))
    }

    /// Whether the rules make sense together and for a shape.
    pub(crate) fn check(&self, shape: &AttnShape) -> Result<(), MaskError> {
        let (q_len, kv_len) = (("q_len", shape.n_queries()), ("kv_len", shape.n_keys()));
        check_lengths("mask.prefix", self.prefix.as_ref(), kv_len, shape)?;
        check_lengths("mask.key_begin", self.key_begin.as_ref(), kv_len, shape)?;
        check_lengths("mask.key_end", self.key_end.as_ref(), kv_len, shape)?;
        check_lengths("mask.query_end", self.query_end.as_ref(), q_len, shape)?;
        if let Some(Positions::Offset(offsets)) = &self.positions {
            check_entries("mask.offsets", offsets, shape)?;
        }
        if let Some(begins) = &self.key_begin {
            for batch in 0..shape.batch() {
                let (begin, (_, end)) = (begins.of(batch), self.lengths(batch, shape));
                if begin > end {
                    return Err(MaskError::Crossed { batch, begin, end });
                }
            }
        }
        if self.prefix.is_some() && !self.causal {
            return Err(MaskError::Together { one: "mask.prefix", other: "causal=none" });
        }
        if let Some(documents) = &self.documents {
            documents.check(shape)?;
            // Padding is a document like any other; whose prefix it would be, or which tokens of a document count, nobody said.
            let others = [
                (self.chunk.is_some(), "mask.chunk"),
                (self.prefix.is_some(), "mask.prefix"),
                (self.key_end.is_some(), "mask.key_end"),
                (self.query_end.is_some(), "mask.query_end"),
            ];
            if let Some((_, one)) = others.into_iter().find(|(is_there, _)| *is_there) {
                return Err(MaskError::Together { one, other: "mask.documents" });
            }
            if matches!(self.positions, Some(Positions::Offset(_))) {
                return Err(MaskError::Together { one: "mask.documents", other: "mask.offsets" });
            }
        }
        self.check_alignment(shape)
    }

    /// Whether some rule is about where queries stand.
    pub(crate) fn uses_positions(&self) -> bool {
        self.causal || self.window != Window::default() || self.chunk.is_some()
    }

    /// Refuses rules about positions where nobody said which and it matters.
    fn check_alignment(&self, shape: &AttnShape) -> Result<(), MaskError> {
        if self.causal {
            self.check_positions("causal", shape)
        } else if self.window != Window::default() {
            self.check_positions("mask.window", shape)
        } else if self.chunk.is_some() {
            self.check_positions("mask.chunk", shape)
        } else {
            Ok(())
        }
    }

    /// Refuses `option`, which is about positions, where nobody said which and it matters.
    pub(crate) fn check_positions(&self, option: &'static str, shape: &AttnShape) -> Result<(), MaskError> {
        if self.positions.is_some() {
            return Ok(());
        }
        for batch in 0..shape.batch() {
            let lengths = match &self.documents {
                Some(documents) => documents.unequal_lengths(batch),
                None => Some(self.lengths(batch, shape)).filter(|(queries, keys)| queries != keys),
            };
            if let Some((queries, keys)) = lengths {
                return Err(MaskError::Unaligned { option, queries, keys });
            }
        }
        Ok(())
    }
}

fn check_entries<T>(option: &'static str, numbers: &PerBatch<T>, shape: &AttnShape) -> Result<(), MaskError> {
    match numbers {
        PerBatch::Each(each) if each.len() != shape.batch() => {
            Err(MaskError::Entries { option, got: each.len(), batch: shape.batch() })
        }
        _ => Ok(()),
    }
}

fn check_lengths(
    option: &'static str,
    lengths: Option<&PerBatch<usize>>,
    (dimension, limit): (&'static str, usize),
    shape: &AttnShape,
) -> Result<(), MaskError> {
    let Some(lengths) = lengths else { return Ok(()) };
    check_entries(option, lengths, shape)?;
    match (0..shape.batch()).find(|batch| lengths.of(*batch) > limit) {
        Some(batch) => Err(MaskError::Beyond { option, batch, got: lengths.of(batch), dimension, limit }),
        None => Ok(()),
    }
}

/// A position or a distance; more than the axis has room for is as good as the most that there is.
fn signed(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The mask of one element of the batch. Cheap to copy.
#[derive(Clone, Copy, Debug)]
pub struct BatchMask<'a> {
    causal: bool,
    /// The position of the first query, where there are no documents.
    offset: i64,
    /// Whether positions in documents are counted from their last tokens.
    from_the_end: bool,
    left: Option<i64>,
    right: Option<i64>,
    chunk: Option<i64>,
    prefix: i64,
    key_begin: i64,
    key_end: i64,
    query_end: usize,
    documents: Option<&'a BatchDocuments>,
}

impl<'a> BatchMask<'a> {
    /// Where a query stands on the axis of the keys; before its beginning or behind its end where it has no key at all there.
    pub fn position(&self, token: usize) -> i64 {
        match self.documents {
            Some(documents) => documents.position(token, self.from_the_end),
            None => self.offset.saturating_add(signed(token)),
        }
    }

    /// The first key that is no padding, of the document of a query where there are documents; whether or not the query sees it.
    pub fn first_key(&self, token: usize) -> i64 {
        let of_document = self.documents.map(|documents| signed(documents.hull(token).start));
        self.key_begin.max(of_document.unwrap_or(0))
    }

    /// Which keys of its interval a query token sees, where its document has keys in several runs.
    pub(crate) fn scattered(&self, token: usize) -> Option<KeyRuns<'a>> {
        self.documents?.scattered(token).map(KeyRuns::Ranges)
    }

    /// The interval of keys that a query token sees, `0..0` if there are none. Of a document that has keys in several runs it sees no
    /// others in that interval.
    pub fn visible(&self, token: usize) -> Range<usize> {
        if token >= self.query_end {
            return 0..0;
        }
        let (mut begin, mut end) = (self.key_begin, self.key_end);
        if let Some(documents) = self.documents {
            let keys = documents.hull(token);
            (begin, end) = (begin.max(signed(keys.start)), end.min(signed(keys.end)));
        }
        let p = self.position(token);
        if self.causal {
            end = end.min(p.saturating_add(1).max(self.prefix));
        }
        if let Some(left) = self.left {
            begin = begin.max(p.saturating_sub(left));
        }
        if let Some(right) = self.right {
            end = end.min(p.saturating_add(right).saturating_add(1));
        }
        if let Some(chunk) = self.chunk {
            let chunks = p.saturating_sub(self.key_begin).div_euclid(chunk);
            let first = chunks.saturating_mul(chunk).saturating_add(self.key_begin);
            (begin, end) = (begin.max(first), end.min(first.saturating_add(chunk)));
        }
        // key_begin is no less than 0 and key_end no more than the keys, so both fit.
        match (usize::try_from(begin), usize::try_from(end)) {
            (Ok(begin), Ok(end)) if begin < end => begin..end,
            _ => 0..0,
        }
    }
}
