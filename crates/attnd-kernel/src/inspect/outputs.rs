//! What a second pass is asked for, and the one check of it.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::bins::Bins;
use crate::compute::Compute;
use crate::mask::{MaskError, Positions};
use crate::normaliser::Normaliser;
use crate::operator::Operator;
use crate::shape::AttnShape;
use crate::slot::{Node, PAGE_KEYS, keys_in_page, pages_of_slot};

/// Most keys of a row that can be asked for.
pub(crate) const MAX_TOP_K: usize = 1024;
/// Most rows or columns of a heatmap.
pub(crate) const MAX_HEAT_SIDE: usize = 4096;

/// What scores are on their way to weights. All in natural units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// `scale * q . k`, or what else the score function gives; of masked keys too.
    Raw,
    /// After the cap; of masked keys too. The same as [`Stage::Raw`] where there is none.
    Capped,
    /// With biases; -inf where a key is masked.
    Masked,
    /// What values are multiplied by; 0 where a key is masked.
    Weights,
}

/// One stage of some heads, queries and keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rectangle {
    /// What of it.
    pub stage: Stage,
    /// Query heads of each batch element.
    pub heads: Range<usize>,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// Key tokens.
    pub keys: Range<usize>,
}

/// Outputs as somebody typed them; [`Outputs::new`] decides whether they make sense.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputsParts {
    /// Stages that are wanted whole, for all queries and keys of the heads.
    pub stages: Vec<Stage>,
    /// Parts of stages.
    pub rectangles: Vec<Rectangle>,
    /// How many keys of each row, those with the highest scores; 0 for none. At most 1024.
    pub top_k: usize,
    /// Sums of weights over blocks of that many keys.
    pub mass_block: Option<NonZeroUsize>,
    /// `- sum_j w_j ln w_j` of each row.
    pub entropy: bool,
    /// `sum_j w_j |p_i - j|` of each row, over the sum of weights where these are sigmoids.
    pub distance: bool,
    /// The highest score of each row.
    pub max_score: bool,
    /// Rows and columns of a pooled map of weights, each at most 4096 and no more than there are queries or keys.
    pub heatmap: Option<(usize, usize)>,
    /// Query heads of each batch element; all where there are none.
    pub heads: Option<Range<usize>>,
}

/// Why parts are no outputs. The text names the options and both numbers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OutputsError {
    /// A number over its limit, or 0.
    #[error("{option} is {got}, not 1 to {limit}")]
    Limit {
        /// Which option.
        option: &'static str,
        /// What was asked for.
        got: usize,
        /// The largest value allowed.
        limit: usize,
    },
    /// A range that is empty or reaches past the end.
    #[error("{option} is {}..{}, not inside {}..{}", got.start, got.end, limit.start, limit.end)]
    Outside {
        /// Which option.
        option: &'static str,
        /// What was asked for.
        got: Range<usize>,
        /// What there is.
        limit: Range<usize>,
    },
    /// Two options that exclude each other.
    #[error("{one} and {other}")]
    Together {
        /// One of them.
        one: &'static str,
        /// The other one.
        other: &'static str,
    },
    /// Distances, and no positions to count them from.
    #[error(transparent)]
    Positions(#[from] MaskError),
}

/// What a second pass is to give, checked against a shape and its operator. Who computes and who merges must have equal ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outputs {
    parts: OutputsParts,
    /// Whole stages, then the others.
    rectangles: Vec<Rectangle>,
    heads: Range<usize>,
    shape: AttnShape,
    pub(super) units: Units,
}

/// Sums over pages are integers times `2^-unit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    pub(super) mass: i32,
    pub(super) heat: i32,
    pub(super) distance: i32,
}

/// Of entropies: a page's share of one is below `2^5 + 2^5`, as a sum of weights is at most 1 and `-w ln w` summed over 256 of
/// them at most `ln 256` more, and is clamped to `2^14`; there are `2^12` pages at most, so sums stay below `2^62`.
pub(super) const ENTROPY_UNIT: i32 = 36;

/// The largest magnitude of a page's share of an entropy, in its unit.
pub(super) const ENTROPY_SHARE: f64 = (1_u64 << (14 + ENTROPY_UNIT)) as f64;

impl Units {
    /// Finest units at which no sum of what can be asked for leaves an i64, which a sum of at most `n` in units of `2^-u` does not
    /// while `log2 n + u <= 62`. Weights of a row sum to 1, give or take rounding, for which there is the factor 2.
    ///
    /// | sum | at most |
    /// |---|---|
    /// | mass | 1, or a block's keys where weights are sigmoids |
    /// | heat | a cell's queries, times its keys where weights are sigmoids |
    /// | distance | the largest one, as it is a mean |
    fn new(parts: &OutputsParts, shape: &AttnShape, operator: &Operator) -> Self {
        let unit = |finest: i32, largest: u64| {
            let bits = 64 - largest.saturating_sub(1).leading_zeros();
            finest.min(61 - bits as i32)
        };
        let is_sigmoid = matches!(operator.normaliser(), Normaliser::Sigmoid { .. });
        let of_keys = |keys: usize| if is_sigmoid { keys as u64 } else { 1 };
        let block = parts.mass_block.map_or(1, |block| block.get().min(shape.n_keys()));
        let (rows, columns) = parts.heatmap.unwrap_or((1, 1));
        let (tokens, keys) = (shape.n_queries().div_ceil(rows), shape.n_keys().div_ceil(columns));
        let offset = match &operator.mask().positions {
            Some(Positions::Offset(offsets)) => {
                (0..shape.batch()).map(|batch| offsets.of(batch).unsigned_abs()).max().unwrap_or(0)
            }
            None | Some(Positions::TopLeft | Positions::BottomRight) => 0,
        };
        let farthest = offset.saturating_add((shape.n_queries() + shape.n_keys()) as u64);
        Self {
            mass: unit(44, of_keys(block)),
            heat: unit(44, tokens as u64 * of_keys(keys)),
            distance: unit(36, farthest),
        }
    }
}

impl Outputs {
    /// The outputs of these parts, for calls of that shape with that operator.
    ///
    /// # Errors
    /// [`OutputsError`] for the first part that makes no sense.
    pub fn new(parts: OutputsParts, shape: &AttnShape, operator: &Operator) -> Result<Self, OutputsError> {
        let inside = |option, got: &Range<usize>, limit: Range<usize>| {
            if got.is_empty() || got.start < limit.start || got.end > limit.end {
                return Err(OutputsError::Outside { option, got: got.clone(), limit });
            }
            Ok(())
        };
        let limit = |option, got: usize, limit: usize| {
            if (1..=limit).contains(&got) { Ok(()) } else { Err(OutputsError::Limit { option, got, limit }) }
        };
        let heads = parts.heads.clone().unwrap_or(0..shape.n_heads());
        inside("outputs.heads", &heads, 0..shape.n_heads())?;
        for rectangle in &parts.rectangles {
            inside("outputs.rectangles.heads", &rectangle.heads, heads.clone())?;
            inside("outputs.rectangles.tokens", &rectangle.tokens, 0..shape.n_queries())?;
            inside("outputs.rectangles.keys", &rectangle.keys, 0..shape.n_keys())?;
        }
        if parts.top_k > 0 {
            limit("outputs.top_k", parts.top_k, MAX_TOP_K)?;
        }
        if let Some((rows, columns)) = parts.heatmap {
            limit("outputs.heat_rows", rows, MAX_HEAT_SIDE.min(shape.n_queries()))?;
            limit("outputs.heat_columns", columns, MAX_HEAT_SIDE.min(shape.n_keys()))?;
        }
        if parts.entropy && matches!(operator.normaliser(), Normaliser::Sigmoid { .. }) {
            return Err(OutputsError::Together { one: "outputs.entropy", other: "normaliser=sigmoid" });
        }
        if parts.distance {
            operator.mask().check_positions("outputs.distance", shape)?;
        }
        let whole = parts.stages.iter().map(|stage| Rectangle {
            stage: *stage,
            heads: heads.clone(),
            tokens: 0..shape.n_queries(),
            keys: 0..shape.n_keys(),
        });
        let rectangles = whole.chain(parts.rectangles.iter().cloned()).collect();
        let units = Units::new(&parts, shape, operator);
        Ok(Self { parts, rectangles, heads, shape: *shape, units })
    }

    /// Refuses dot products of narrow elements: scores are computed again, and must have the bits that they had.
    ///
    /// # Errors
    /// [`OutputsError::Together`] for any arithmetic but that of f32.
    pub fn check_compute(&self, compute: Compute) -> Result<(), OutputsError> {
        let other = match compute {
            Compute::F32 => return Ok(()),
            Compute::Bf16 => "compute=bf16",
            Compute::Int8 => "compute=int8",
        };
        Err(OutputsError::Together { one: "outputs", other })
    }

    /// Whether nothing is wanted, so that no second pass is needed.
    pub fn is_empty(&self) -> bool {
        self.rectangles.is_empty() && !self.has_report()
    }

    /// Whether reports have anything in them, and not only elements are wanted.
    pub fn has_report(&self) -> bool {
        let OutputsParts { top_k, mass_block, entropy, distance, max_score, heatmap, .. } = &self.parts;
        *top_k > 0 || mass_block.is_some() || *entropy || *distance || *max_score || heatmap.is_some()
    }

    /// As asked for.
    pub fn parts(&self) -> &OutputsParts {
        &self.parts
    }

    /// The shape of the calls that they are for.
    pub fn shape(&self) -> &AttnShape {
        &self.shape
    }

    /// All elements that are wanted: first whole stages, then the rectangles that were asked for. [`super::ElementTile`] has the
    /// index of one of them.
    pub fn rectangles(&self) -> &[Rectangle] {
        &self.rectangles
    }

    /// The query heads of each batch element of which anything is wanted.
    pub fn heads(&self) -> Range<usize> {
        self.heads.clone()
    }

    /// Which heads of a kv group are wanted, counted from the group's first; empty if none is.
    pub fn heads_of_group(&self, group: usize) -> Range<usize> {
        self.in_group(group, &self.heads)
    }

    /// Heads of a batch element as heads of a group.
    pub(super) fn in_group(&self, group: usize, heads: &Range<usize>) -> Range<usize> {
        let size = self.shape.group_size();
        let first = group % self.shape.n_kv_heads() * size;
        let of = |head: usize| head.saturating_sub(first).min(size);
        of(heads.start)..of(heads.end)
    }

    /// Key blocks of which a row has a mass; 0 if none is wanted.
    pub fn mass_blocks(&self) -> usize {
        self.mass_bins().map_or(0, |bins| bins.len())
    }

    pub(super) fn mass_bins(&self) -> Option<Bins> {
        self.parts.mass_block.map(|width| Bins::of_width(width, self.shape.n_keys()))
    }

    pub(super) fn heat_columns(&self) -> Option<Bins> {
        self.parts.heatmap.map(|(_, columns)| Bins::evenly(columns, self.shape.n_keys()))
    }

    pub(super) fn heat_rows(&self) -> Option<Bins> {
        self.parts.heatmap.map(|(rows, _)| Bins::evenly(rows, self.shape.n_queries()))
    }

    /// The heatmap's rows that have some of `tokens`; empty if none is wanted.
    pub fn heat_rows_of(&self, tokens: &Range<usize>) -> Range<usize> {
        match self.heat_rows() {
            Some(bins) if !tokens.is_empty() => bins.of(tokens.start)..bins.of(tokens.end - 1) + 1,
            _ => 0..0,
        }
    }

    /// Memory that the report of a group's tokens takes, in bytes.
    pub fn report_bytes(&self, group: usize, tokens: &Range<usize>) -> u64 {
        let OutputsParts { top_k, entropy, distance, max_score, heatmap, .. } = &self.parts;
        let n_heads = self.heads_of_group(group).len() as u64;
        let of_row = 8
            * (*top_k + self.mass_blocks() + usize::from(*entropy) + usize::from(*distance)) as u64
            + 4 * u64::from(*max_score);
        let columns = heatmap.map_or(0, |(_, columns)| columns as u64);
        n_heads * (tokens.len() as u64 * of_row + 8 * columns * self.heat_rows_of(tokens).len() as u64)
    }

    /// How many elements a second pass over a node emits for a group's tokens, all rectangles together: each exactly once.
    pub fn elements_of(&self, group: usize, node: Node, tokens: &Range<usize>) -> u64 {
        let n_keys = self.shape.n_keys();
        let pages = || node.slots().flat_map(|slot| pages_of_slot(slot, n_keys));
        let of_rectangle = |rectangle: &Rectangle| {
            let heads = self.in_group(group, &rectangle.heads).len();
            let keys: usize =
                pages().map(|page| overlap(&rectangle.keys, &keys_of_page(page, n_keys)).len()).sum();
            (heads * overlap(&rectangle.tokens, tokens).len()) as u64 * keys as u64
        };
        self.rectangles.iter().map(of_rectangle).sum()
    }
}

/// What is in both.
pub(super) fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// The keys of a page.
pub(super) fn keys_of_page(page: usize, n_keys: usize) -> Range<usize> {
    let first = page * PAGE_KEYS;
    first..first + keys_in_page(page, n_keys)
}
