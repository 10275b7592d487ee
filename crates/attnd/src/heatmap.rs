//! Draws attention weights. [`Heatmap`] is a standalone SVG about a layer: every head as a small panel, a stretch of one of
//! them large, with its words. [`Maps`] are heads over any number of tokens, pooled, as SVG or PNG.
//!
//! Pure: numbers and words in, text or pixels out. A cell per weight would make half a million elements of twelve heads over
//! 208 tokens; instead weights are quantised to [`scale::LEVELS`] colours, runs of equal colour in a row become one stroke, and
//! all strokes of a colour one `<path>`. Only cells that stand out carry a tooltip.

mod cells;
mod maps;
mod raster;
mod scale;
mod svg;
mod unit;

use std::ops::Range;

use cells::{Cells, Frame, draw_legend, draw_words};
pub use maps::Maps;
use scale::ColourScale;
use svg::Svg;
pub use unit::WeightUnit;

/// Panels in a row of the grid.
const COLUMNS: usize = 4;
/// Width of the drawing.
const WIDTH: f64 = 1640.0;
const MARGIN: f64 = 48.0;
const GAP: f64 = 36.0;
/// Room for the words beside and above the large panel.
const LABEL_ROOM: f64 = 122.0;

/// A figure about one layer.
#[derive(Debug, Clone)]
pub struct Heatmap<'a> {
    /// Headline.
    pub title: &'a str,
    /// Second line: what the data is and how it was made.
    pub subtitle: &'a str,
    /// The tokens, which are both queries (rows) and keys (columns).
    pub tokens: &'a [String],
    /// One panel per head.
    pub heads: &'a [HeadPanel],
    /// What is drawn large.
    pub close_up: CloseUp<'a>,
}

/// A square of one head, large enough to read.
#[derive(Debug, Clone)]
pub struct CloseUp<'a> {
    /// Index of the head.
    pub head: usize,
    /// Tokens, both as queries and as keys.
    pub tokens: Range<usize>,
    /// Below the heading: why this head.
    pub caption: &'a str,
}

/// The weights of one head.
#[derive(Debug, Clone)]
pub struct HeadPanel {
    /// Above the panel.
    pub title: String,
    /// Below the panel.
    pub caption: String,
    /// Row-major `[queries, keys]`, or as many rows and columns as they were pooled to; 0 or more.
    pub weights: Vec<f64>,
}

impl Heatmap<'_> {
    /// The figure as the text of an SVG file.
    pub fn to_svg(&self) -> String {
        let n = self.tokens.len();
        let panel = (WIDTH - 2.0 * MARGIN - (COLUMNS - 1) as f64 * GAP) / COLUMNS as f64;
        let row_height = panel + 64.0;
        let grid_top = 150.0;
        let large_top = grid_top + self.heads.len().div_ceil(COLUMNS) as f64 * row_height + 70.0;
        let large_side = WIDTH - 2.0 * MARGIN - LABEL_ROOM;
        let height = large_top + LABEL_ROOM + large_side + MARGIN;
        let scale = ColourScale::over(self.heads.iter().flat_map(|head| &head.weights));

        let mut svg = Svg::new(WIDTH, height);
        svg.text(MARGIN, 62.0, "h1", self.title);
        svg.text(MARGIN, 92.0, "sub", self.subtitle);
        draw_legend(&mut svg, &scale, WeightUnit::Percent, WIDTH - MARGIN - 360.0, 44.0);
        for (i, head) in self.heads.iter().enumerate() {
            let x = MARGIN + (i % COLUMNS) as f64 * (panel + GAP);
            let y = grid_top + (i / COLUMNS) as f64 * row_height;
            svg.text(x, y - 8.0, "h3", &head.title);
            let frame = Frame { x, y, width: panel, height: panel };
            let cells = Cells { weights: &head.weights, n, rows: 0..n, columns: 0..n, frame };
            cells.draw(&mut svg, &scale);
            svg.text(x, y + panel + 18.0, "cap", &head.caption);
        }
        let CloseUp { head, tokens, caption } = &self.close_up;
        if let (Some(head), Some(words)) = (self.heads.get(*head), self.tokens.get(tokens.clone())) {
            svg.text(MARGIN, large_top - 26.0, "h2", &format!("{}, close up", head.title));
            svg.text(MARGIN, large_top - 4.0, "sub", caption);
            let (x, y) = (MARGIN + LABEL_ROOM, large_top + LABEL_ROOM);
            let frame = Frame { x, y, width: large_side, height: large_side };
            draw_words(&mut svg, words, words, &frame);
            let (rows, columns) = (tokens.clone(), tokens.clone());
            let cells = Cells { weights: &head.weights, n, rows, columns, frame };
            cells.draw(&mut svg, &scale);
            let word = |i: usize| self.tokens.get(i).map_or(i.to_string(), |word| format!("{word} ({i})"));
            cells.draw_tooltips(&mut svg, WeightUnit::Percent, word, word);
        }
        svg.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::cells::MAX_TOOLTIPS;
    use super::scale::LEVELS;
    use super::*;

    fn figure(tokens: &[&str], weights: Vec<f64>) -> String {
        let tokens: Vec<String> = tokens.iter().map(ToString::to_string).collect();
        let heads = [HeadPanel { title: "head 1".into(), caption: "a < b".into(), weights }];
        let close_up = CloseUp { head: 0, tokens: 0..tokens.len(), caption: "c" };
        Heatmap { title: "T & <t>", subtitle: "s", tokens: &tokens, heads: &heads, close_up }.to_svg()
    }

    #[test]
    fn text_is_escaped() {
        let svg = figure(&["</text>", "&\u{1b}"], vec![1.0, 0.0, 0.5, 0.5]);
        assert!(svg.contains("T &amp; &lt;t&gt;") && svg.contains("a &lt; b"));
        assert!(svg.contains("&lt;/text&gt;") && svg.contains("&amp;\u{fffd}"));
        assert!(!svg.contains('\u{1b}'));
    }

    #[test]
    fn every_opened_element_is_closed() {
        let svg = figure(&["a", "b", "c"], vec![0.1; 9]);
        for name in ["svg", "g", "text", "title", "style"] {
            let opened =
                svg.matches(&format!("<{name}>")).count() + svg.matches(&format!("<{name} ")).count();
            assert!(opened > 0, "{name}");
            assert_eq!(opened, svg.matches(&format!("</{name}>")).count(), "{name}");
        }
    }

    #[test]
    fn equal_neighbours_become_one_stroke_and_empty_cells_none() {
        let svg = figure(&["a", "b", "c"], vec![0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
        let darkest = ColourScale::colour(LEVELS - 1);
        let path = format!("<path stroke=\"{darkest}\" d=\"M1 0.5h2M0 2.5h1M2 2.5h1\"/>");
        assert_eq!(svg.matches(&path).count(), 2, "once small, once large\n{svg}");
        assert_eq!(svg.matches("<path").count(), 2);
    }

    #[test]
    fn tooltips_name_words_and_weight_and_are_bounded() {
        let svg = figure(&["river", "the"], vec![0.25, 0.75, 1.0, 0.0]);
        assert!(svg.contains("<title>river (0) looks at the (1): 75.0 %</title>"));
        let n = 100;
        let tokens = vec!["x"; n];
        let svg = figure(&tokens, vec![0.01; n * n]);
        assert_eq!(svg.matches("<title>").count(), MAX_TOOLTIPS);
    }

    #[test]
    fn degenerate_figures_are_still_documents() {
        for svg in [figure(&[], vec![]), figure(&["a"], vec![f64::NAN]), figure(&["a"], vec![0.0])] {
            assert!(svg.ends_with("</svg>\n"));
        }
    }
}
