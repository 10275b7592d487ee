//! From weights to colours, the same in every picture.

/// Colours that weights are quantised to.
pub(super) const LEVELS: usize = 28;

/// Control points of the colour scale: position, red, green, blue. Paper, then sand, coral, plum, ink; lightness falls
/// all the way, so the order survives grey-scale printing.
const STOPS: [(f64, [f64; 3]); 6] = [
    (0.00, [252.0, 250.0, 246.0]),
    (0.15, [252.0, 228.0, 190.0]),
    (0.35, [246.0, 166.0, 112.0]),
    (0.58, [217.0, 84.0, 104.0]),
    (0.80, [124.0, 40.0, 120.0]),
    (1.00, [34.0, 12.0, 62.0]),
];

/// Maps weights to colours. The root spreads the small weights, of which there are most.
#[derive(Debug, Clone, Copy)]
pub(super) struct ColourScale {
    /// The weight that gets the darkest colour.
    pub(super) top: f64,
}

impl ColourScale {
    /// The scale on which the largest of these weights is darkest.
    pub(super) fn over<'a>(weights: impl Iterator<Item = &'a f64>) -> Self {
        let top = weights.copied().fold(0.0, f64::max);
        Self { top: if top > 0.0 { top } else { 1.0 } }
    }

    /// The colour of a weight, below [`LEVELS`].
    pub(super) fn level(&self, weight: f64) -> usize {
        let position = (weight / self.top).clamp(0.0, 1.0).sqrt();
        // NaN becomes level 0 by the cast; checks, not pictures, are where it is reported.
        (position * (LEVELS - 1) as f64).round() as usize
    }

    /// Red, green and blue of a level.
    pub(super) fn rgb(level: usize) -> [u8; 3] {
        let position = level as f64 / (LEVELS - 1) as f64;
        let above = STOPS.iter().position(|stop| stop.0 >= position).unwrap_or(STOPS.len() - 1).max(1);
        let ((p0, c0), (p1, c1)) = (STOPS[above - 1], STOPS[above]);
        let share = (position - p0) / (p1 - p0);
        [0, 1, 2].map(|i| (c0[i] + share * (c1[i] - c0[i])).round() as u8)
    }

    /// A level's colour as SVG writes it.
    pub(super) fn colour(level: usize) -> String {
        let [r, g, b] = Self::rgb(level);
        format!("#{r:02x}{g:02x}{b:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lightness_falls_along_the_scale() {
        let grey = |level| {
            let [r, g, b] = ColourScale::rgb(level).map(f64::from);
            0.2126 * r + 0.7152 * g + 0.0722 * b
        };
        for level in 1..LEVELS {
            assert!(grey(level) < grey(level - 1), "level {level}");
        }
    }

    #[test]
    fn the_largest_weight_is_darkest_and_nothing_is_off_the_scale() {
        let scale = ColourScale::over([0.0, 0.25, 0.5].iter());
        assert_eq!([0.0, 0.125, 0.5, 0.7].map(|w| scale.level(w)), [0, 14, LEVELS - 1, LEVELS - 1]);
        assert_eq!([f64::NAN, -1.0].map(|w| scale.level(w)), [0, 0]);
        assert_eq!(ColourScale::over([].iter()).top, 1.0);
        assert_eq!(ColourScale::colour(0), "#fcfaf6");
    }
}
