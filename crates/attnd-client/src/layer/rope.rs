//! Rotary positions: queries and keys turn with their position, so that a score knows the distance.
//!
//! ```text
//! theta_i = base^(-2i/r)                  pair i of r/2, position p:
//! (a, b) -> (a cos(p theta_i) - b sin(p theta_i), b cos(p theta_i) + a sin(p theta_i))
//! ```
//!
//! (Su et al., "RoFormer", eq. 34.) The products are rounded before they are added. The two styles differ in which elements are a
//! pair; weights that were trained with one are useless with the other. Scores depend on differences of positions alone, rounding
//! aside, so where counting begins is a matter of taste, but has to be one for queries and keys.
//!
//! Sines and cosines are computed in f64 and rounded once. Frameworks compute the angle in f32, which at position `p` is off by up to
//! `p * 6e-8`; whoever wants their numbers, or a scaled variant (linear, NTK, YaRN), passes tables.

use std::sync::Arc;

use super::LayerError;
use crate::context::zeros;

/// Which elements of a row are a pair, of `r` that are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `i` and `i + r/2` (GPT-NeoX, Llama in Hugging Face's layout).
    HalfSplit,
    /// `2i` and `2i + 1` (GPT-J, DeepSeek).
    Interleaved,
}

/// What a position turns by.
#[derive(Clone, Debug, PartialEq)]
pub enum Angles {
    /// `theta_i = base^(-2i/r)`; > 1.
    Base(f64),
    /// Cosines and sines of each position from 0, `[positions, r/2]`.
    Table {
        /// Of `p theta_i`, whatever is multiplied in.
        cos: Arc<[f32]>,
        /// The same.
        sin: Arc<[f32]>,
    },
}

/// How rows of a head are rotated.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Which elements are a pair.
    pub style: RopeStyle,
    /// By how much they turn.
    pub angles: Angles,
    /// First element that is rotated; those before pass as they are.
    pub first: usize,
    /// How many elements are, an even number; `None`: all from `first` on.
    pub dims: Option<usize>,
}

/// Cosines and sines of consecutive positions.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    style: RopeStyle,
    first: usize,
    pairs: usize,
    /// `[positions, pairs]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// All elements of rows, by the base that a model was published with: 10,000 with most.
    pub fn new(style: RopeStyle, base: f64) -> Self {
        Self { style, angles: Angles::Base(base), first: 0, dims: None }
    }

    fn pairs(&self, head_dim: usize) -> usize {
        self.dims.unwrap_or_else(|| head_dim.saturating_sub(self.first)) / 2
    }

    /// # Errors
    /// [`LayerError::Rope`] if rows of `head_dim` can't be rotated so.
    pub(super) fn check(&self, head_dim: usize) -> Result<(), LayerError> {
        self.check_rows(head_dim, "rows of a head have")
    }

    fn check_rows(&self, head_dim: usize, rows_have: &str) -> Result<(), LayerError> {
        let refused = |why: String| Err(LayerError::Rope(why));
        let dims = self.dims.unwrap_or_else(|| head_dim.saturating_sub(self.first));
        if dims == 0 || !dims.is_multiple_of(2) {
            return refused(format!("{dims} elements are no pairs"));
        }
        if self.first.checked_add(dims).is_none_or(|end| end > head_dim) {
            return refused(format!("{dims} elements from {} on, {rows_have} {head_dim}", self.first));
        }
        match &self.angles {
            Angles::Base(base) if base.is_finite() && *base > 1.0 => Ok(()),
            Angles::Base(base) => refused(format!("base {base}, expected a number over 1")),
            Angles::Table { cos, sin } if cos.len() == sin.len() && cos.len().is_multiple_of(dims / 2) => {
                Ok(())
            }
            Angles::Table { cos, sin } => refused(format!(
                "tables of {} and {} elements, rows of them have {}",
                cos.len(),
                sin.len(),
                dims / 2
            )),
        }
    }

    /// These positions for rows of `dims`, as positions for rows that have `first` elements more before them.
    ///
    /// # Errors
    /// As [`Self::check`] for rows of `dims`.
    pub(super) fn behind(self, first: usize, dims: usize) -> Result<Self, LayerError> {
        self.check_rows(dims, "the rotary part of a head has")?;
        let rotated = self.dims.unwrap_or_else(|| dims.saturating_sub(self.first));
        Ok(Self { first: first + self.first, dims: Some(rotated), ..self })
    }

    /// The turns of `tokens` positions from `first_position` on, for rows of `head_dim`.
    ///
    /// # Errors
    /// [`LayerError::Rope`] if the tables end before the last, [`LayerError::RowMemory`].
    pub(super) fn turns(
        &self,
        head_dim: usize,
        first_position: usize,
        tokens: usize,
    ) -> Result<Turns, LayerError> {
        let pairs = self.pairs(head_dim);
        let (style, first) = (self.style, self.first);
        let base = match &self.angles {
            Angles::Base(base) => *base,
            Angles::Table { cos, sin } => {
                let end = first_position.saturating_add(tokens);
                let range = first_position.saturating_mul(pairs)..end.saturating_mul(pairs);
                let positions = cos.len() / pairs.max(1);
                let short = || LayerError::Rope(format!("positions to {end}, the tables have {positions}"));
                let of = |table: &[f32]| table.get(range.clone()).map(<[f32]>::to_vec).ok_or_else(short);
                return Ok(Turns { style, first, pairs, cos: of(cos)?, sin: of(sin)? });
            }
        };
        let elements = tokens.saturating_mul(pairs);
        let room =
            || zeros::<f32>(elements).ok_or(LayerError::RowMemory { what: "tables of angles", elements });
        let (mut cos, mut sin) = (room()?, room()?);
        let theta: Vec<f64> = (0..pairs).map(|i| base.powf(-(i as f64) / pairs as f64)).collect();
        let places = cos.chunks_exact_mut(pairs.max(1)).zip(sin.chunks_exact_mut(pairs.max(1)));
        for (token, (cos, sin)) in places.enumerate() {
            let position = first_position.saturating_add(token) as f64;
            for ((cos, sin), theta) in cos.iter_mut().zip(sin).zip(&theta) {
                let (s, c) = (position * theta).sin_cos();
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
        Ok(Turns { style, first, pairs, cos, sin })
    }
}

impl Turns {
    /// Rotates the row of a head at the `token`th of the positions.
    pub(super) fn turn(&self, token: usize, row: &mut [f32]) {
        let at = token * self.pairs..(token + 1) * self.pairs;
        let (Some(cos), Some(sin)) = (self.cos.get(at.clone()), self.sin.get(at)) else { return };
        let Some(row) = row.get_mut(self.first..self.first + 2 * self.pairs) else { return };
        let turned = |a: f32, b: f32, cos: f32, sin: f32| (a * cos - b * sin, b * cos + a * sin);
        match self.style {
            RopeStyle::HalfSplit => {
                let (left, right) = row.split_at_mut(self.pairs);
                for ((a, b), (cos, sin)) in left.iter_mut().zip(right).zip(cos.iter().zip(sin)) {
                    (*a, *b) = turned(*a, *b, *cos, *sin);
                }
            }
            RopeStyle::Interleaved => {
                for ([a, b], (cos, sin)) in row.as_chunks_mut::<2>().0.iter_mut().zip(cos.iter().zip(sin)) {
                    (*a, *b) = turned(*a, *b, *cos, *sin);
                }
            }
        }
    }
}
