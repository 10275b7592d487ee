//! The keys of a row with the highest scores: an order that no two of them share, so that what is kept depends on nothing else.

use crate::mask::PageBits;
use crate::slot::PAGE_KEYS;

/// A key and its score, as one integer: the more the higher the score is, and among equal scores the lower the key. The default is no
/// key at all, below any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ranked(u64);

impl Ranked {
    /// A key with a score, in log2 units, that is a number or infinite; both zeros are the same score.
    pub(crate) fn new(score: f32, key: usize) -> Self {
        let bits = (score + 0.0).to_bits();
        let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        Self(u64::from(ascending) << 32 | u64::from(!(key as u32)))
    }

    /// The integer, to be sent.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// From [`Self::to_bits`]. What a peer sent is checked by [`super::NodeReport::check`].
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Whether there is a key.
    pub fn is_some(self) -> bool {
        self.0 != 0
    }

    /// The key's absolute position.
    pub fn key(self) -> u32 {
        !(self.0 as u32)
    }

    /// Its score in log2 units.
    pub fn score(self) -> f32 {
        let ascending = (self.0 >> 32) as u32;
        f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
    }
}

/// The best keys of the rows of a block so far.
///
/// A row gathers what is no worse than its k-th best was when it last looked, and looks again when there is no room left. So a key
/// costs a comparison, and one that is gathered a few more, whatever order they come in.
#[derive(Debug)]
pub(super) struct TopRows {
    k: usize,
    /// `[rows, room]`.
    ranked: Vec<Ranked>,
    room: usize,
    filled: Vec<usize>,
    /// Scores below it are none of the best.
    least: Vec<f32>,
}

/// Fewest keys that a row gathers before it looks.
const GATHERED: usize = 32;

impl TopRows {
    pub(super) fn new(rows: usize, k: usize) -> Self {
        let room = k + k.max(GATHERED);
        Self {
            k,
            ranked: vec![Ranked::default(); rows * room],
            room,
            filled: vec![0; rows],
            // Masked keys have -inf.
            least: vec![f32::MIN; rows],
        }
    }

    /// The least score of a row that may be one of the best.
    pub(super) fn least(&self, row: usize) -> f32 {
        self.least[row]
    }

    /// Offers keys of a page to a row.
    pub(super) fn offer(&mut self, row: usize, page: usize, s: &[f32; PAGE_KEYS], keys: &PageBits) {
        let ranked = &mut self.ranked[row * self.room..][..self.room];
        let (filled, least) = (&mut self.filled[row], &mut self.least[row]);
        for key in keys.iter() {
            if s[key] >= *least {
                ranked[*filled] = Ranked::new(s[key], page * PAGE_KEYS + key);
                *filled += 1;
                if *filled == ranked.len() {
                    ranked.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
                    *filled = self.k;
                    *least = ranked[self.k - 1].score();
                }
            }
        }
    }

    /// The best keys of a row, best first.
    pub(super) fn best(&mut self, row: usize) -> &[Ranked] {
        let ranked = &mut self.ranked[row * self.room..][..self.filled[row]];
        ranked.sort_unstable_by(|a, b| b.cmp(a));
        &ranked[..self.k.min(ranked.len())]
    }
}

/// Puts the best of both into `left`, best first; both are in that order, `left` with room for as many as are wanted.
pub(super) fn merge_best(left: &mut [Ranked], right: &[Ranked]) {
    let before = left.to_vec();
    let (mut l, mut r) = (before.into_iter().peekable(), right.iter().copied().peekable());
    for to in left {
        *to = match (l.peek(), r.peek()) {
            (Some(a), Some(b)) if a < b => r.next(),
            (Some(_), _) => l.next(),
            (None, _) => r.next(),
        }
        .unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn rank_is_by_score_and_then_by_key() {
        let scores = [f32::MIN, -2.0, -1e-40, 0.0, 1e-40, 1.5, f32::MAX, f32::INFINITY];
        for (i, a) in scores.iter().enumerate() {
            for (j, b) in scores.iter().enumerate() {
                assert_eq!(Ranked::new(*a, 7).cmp(&Ranked::new(*b, 7)), i.cmp(&j));
            }
            assert!(Ranked::new(*a, 6) > Ranked::new(*a, 7));
            let ranked = Ranked::from_bits(Ranked::new(*a, 123_456).to_bits());
            assert_eq!((ranked.score(), ranked.key()), (*a, 123_456));
            assert!(ranked.is_some() && ranked > Ranked::default());
        }
        assert_eq!(Ranked::new(-0.0, 3), Ranked::new(0.0, 3));
    }

    #[test]
    fn the_best_are_those_of_a_sort() {
        for seed in 0..60 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (k, pages) = (rng.random_range(1..70), rng.random_range(1..6));
            let few = rng.random_bool(0.5);
            let mut score =
                || if few { f32::from(rng.random_range(0..4_u8)) } else { rng.random_range(-9.0..9.0) };
            let scores: Vec<[f32; PAGE_KEYS]> =
                (0..pages).map(|_| std::array::from_fn(|_| score())).collect();
            let mut want: Vec<Ranked> =
                scores.iter().flatten().enumerate().map(|(key, s)| Ranked::new(*s, key)).collect();
            want.sort_unstable_by(|a, b| b.cmp(a));
            want.truncate(k);
            let mut top = TopRows::new(2, k);
            for page in (0..pages).rev() {
                top.offer(1, page, &scores[page], &PageBits::WHOLE);
            }
            assert_eq!(top.best(1), want, "seed {seed}");
            assert!(top.best(0).is_empty());

            // In two halves that merge.
            let half = |parity: usize| {
                let mut top = TopRows::new(1, k);
                for page in (0..pages).filter(|page| page % 2 == parity) {
                    top.offer(0, page, &scores[page], &PageBits::WHOLE);
                }
                let mut best = vec![Ranked::default(); k];
                let found = top.best(0);
                best[..found.len()].copy_from_slice(found);
                best
            };
            want.resize(k, Ranked::default());
            for (left, right) in [(0, 1), (1, 0)] {
                let mut merged = half(left);
                merge_best(&mut merged, &half(right));
                assert_eq!(merged, want, "seed {seed}");
            }
        }
    }
}
