//! Single elements of the stages: tiles of some tokens by the keys of a page, which are emitted and never joined.

use std::ops::Range;

use super::outputs::{Outputs, Stage, keys_of_page, overlap};
use crate::canonical::CANONICAL_NAN;
use crate::slot::PAGE_KEYS;

/// Elements of a rectangle that one page and one head have. Each element of a rectangle is in exactly one tile of one node; how a node's
/// tokens are cut is no part of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct ElementTile<'a> {
    /// Index in [`Outputs::rectangles`].
    pub rectangle: usize,
    /// Head of the kv group.
    pub head_in_group: usize,
    /// Query tokens.
    pub tokens: Range<usize>,
    /// Key tokens, inside one page.
    pub keys: Range<usize>,
    /// `[tokens, keys]`; any NaN is the one quiet NaN `0x7fc00000`.
    pub values: &'a [f32],
}

/// What one page and one block of rows have of a rectangle.
#[derive(Debug)]
struct Tile {
    rectangle: usize,
    stage: Stage,
    heads: Range<usize>,
    tokens: Range<usize>,
    keys: Range<usize>,
    /// `[heads, tokens, keys]`.
    values: Vec<f32>,
}

/// The tiles of one page and one block of rows, of all rectangles that have any.
#[derive(Debug, Default)]
pub(super) struct Tiles {
    first_key: usize,
    tiles: Vec<Tile>,
}

impl Tiles {
    /// Room for the elements that some heads of a group and some tokens have in a page.
    pub(super) fn of_page(
        wanted: &Outputs,
        group: usize,
        (heads, tokens): (&Range<usize>, &Range<usize>),
        page: usize,
    ) -> Self {
        let in_page = keys_of_page(page, wanted.shape().n_keys());
        let tile = |(index, rectangle): (usize, &super::Rectangle)| {
            let heads = overlap(&wanted.in_group(group, &rectangle.heads), heads);
            let (tokens, keys) = (overlap(&rectangle.tokens, tokens), overlap(&rectangle.keys, &in_page));
            let n = heads.len() * tokens.len() * keys.len();
            let values = vec![0.0; n];
            (n > 0).then_some(Tile { rectangle: index, stage: rectangle.stage, heads, tokens, keys, values })
        };
        let tiles = wanted.rectangles().iter().enumerate().filter_map(tile).collect();
        Self { first_key: in_page.start, tiles }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tiles.is_empty()
    }

    /// Whether some elements are of that stage.
    pub(super) fn have(&self, stage: Stage) -> bool {
        self.tiles.iter().any(|tile| tile.stage == stage)
    }

    /// Puts a row's elements of a stage into all tiles that have them: of key `j` of the page `value(s[j])`.
    pub(super) fn put(
        &mut self,
        stage: Stage,
        (head, token): (usize, usize),
        s: &[f32; PAGE_KEYS],
        value: impl Fn(f32) -> f32,
    ) {
        let first_key = self.first_key;
        let has_row = |tile: &&mut Tile| {
            tile.stage == stage && tile.heads.contains(&head) && tile.tokens.contains(&token)
        };
        for tile in self.tiles.iter_mut().filter(has_row) {
            let row = (head - tile.heads.start) * tile.tokens.len() + token - tile.tokens.start;
            let (n, first) = (tile.keys.len(), tile.keys.start - first_key);
            for (to, s) in tile.values[row * n..][..n].iter_mut().zip(&s[first..][..n]) {
                let value = value(*s);
                *to = if value.is_nan() { CANONICAL_NAN } else { value };
            }
        }
    }

    /// Hands all tiles out, head by head.
    pub(super) fn emit(&self, emit: &mut dyn FnMut(ElementTile<'_>)) {
        for tile in &self.tiles {
            for (head, values) in
                tile.heads.clone().zip(tile.values.chunks(tile.tokens.len() * tile.keys.len()))
            {
                emit(ElementTile {
                    rectangle: tile.rectangle,
                    head_in_group: head,
                    tokens: tile.tokens.clone(),
                    keys: tile.keys.clone(),
                    values,
                });
            }
        }
    }
}
