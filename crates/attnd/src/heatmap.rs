//! Draws attention weights as a standalone SVG: every head as a small panel, a stretch of one of them large, with its words.
//!
//! Pure: numbers and words in, text out. A cell per weight would make half a million elements of twelve heads over 208
//! tokens; instead weights are quantised to [`LEVELS`] colours, runs of equal colour in a row become one stroke, and
//! all strokes of a colour one `<path>`. Only cells that stand out carry a tooltip.

use std::fmt::{self, Write};
use std::ops::Range;

/// Colours that weights are quantised to.
const LEVELS: usize = 28;
/// Panels in a row of the grid.
const COLUMNS: usize = 4;
/// Width of the drawing.
const WIDTH: f64 = 1640.0;
const MARGIN: f64 = 48.0;
const GAP: f64 = 36.0;
/// Room for the words beside and above the large panel.
const LABEL_ROOM: f64 = 122.0;
/// Tooltips are given to at most this many cells, the heaviest first.
const MAX_TOOLTIPS: usize = 4_000;

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
    /// Row-major `[queries, keys]`, both as many as there are tokens; 0 to 1.
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
        let top = self.heads.iter().flat_map(|head| &head.weights).copied().fold(0.0, f64::max);
        let scale = ColourScale { top: if top > 0.0 { top } else { 1.0 } };

        let mut svg = Svg::new(WIDTH, height);
        svg.text(MARGIN, 62.0, "h1", self.title);
        svg.text(MARGIN, 92.0, "sub", self.subtitle);
        draw_legend(&mut svg, &scale, WIDTH - MARGIN - 360.0, 44.0);
        for (i, head) in self.heads.iter().enumerate() {
            let x = MARGIN + (i % COLUMNS) as f64 * (panel + GAP);
            let y = grid_top + (i / COLUMNS) as f64 * row_height;
            svg.text(x, y - 8.0, "h3", &head.title);
            let cells =
                Cells { weights: &head.weights, n, shown: 0..n, square: Square { x, y, side: panel } };
            cells.draw(&mut svg, &scale);
            svg.text(x, y + panel + 18.0, "cap", &head.caption);
        }
        let CloseUp { head, tokens, caption } = &self.close_up;
        if let (Some(head), Some(words)) = (self.heads.get(*head), self.tokens.get(tokens.clone())) {
            svg.text(MARGIN, large_top - 26.0, "h2", &format!("{}, close up", head.title));
            svg.text(MARGIN, large_top - 4.0, "sub", caption);
            let square = Square { x: MARGIN + LABEL_ROOM, y: large_top + LABEL_ROOM, side: large_side };
            draw_words(&mut svg, words, &square);
            let cells = Cells { weights: &head.weights, n, shown: tokens.clone(), square };
            cells.draw(&mut svg, &scale);
            cells.draw_tooltips(&mut svg, self.tokens);
        }
        svg.finish()
    }
}

/// Maps weights to colours. The root spreads the small weights, of which there are most.
struct ColourScale {
    /// The weight that gets the darkest colour.
    top: f64,
}

impl ColourScale {
    fn level(&self, weight: f64) -> usize {
        let position = (weight / self.top).clamp(0.0, 1.0).sqrt();
        // NaN becomes level 0 by the cast; the demo's checks, not its picture, are where it is reported.
        (position * (LEVELS - 1) as f64).round() as usize
    }

    fn colour(level: usize) -> String {
        let position = level as f64 / (LEVELS - 1) as f64;
        let above = STOPS.iter().position(|stop| stop.0 >= position).unwrap_or(STOPS.len() - 1).max(1);
        let ((p0, c0), (p1, c1)) = (STOPS[above - 1], STOPS[above]);
        let share = (position - p0) / (p1 - p0);
        let [r, g, b] = [0, 1, 2].map(|i| (c0[i] + share * (c1[i] - c0[i])).round() as u8);
        format!("#{r:02x}{g:02x}{b:02x}")
    }
}

/// A place on the page.
struct Square {
    x: f64,
    y: f64,
    side: f64,
}

/// A square stretch of a head's weights, and where it goes.
struct Cells<'a> {
    /// Row-major, `n` columns.
    weights: &'a [f64],
    n: usize,
    /// Rows and columns to draw.
    shown: Range<usize>,
    square: Square,
}

impl Cells<'_> {
    /// The shown part of each shown row.
    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        let rows = self.weights.chunks(self.n.max(1)).skip(self.shown.start).take(self.shown.len());
        rows.filter_map(|row| row.get(self.shown.clone()))
    }

    /// Opens a group in whose coordinates a cell is one by one.
    fn open_group(&self, svg: &mut Svg, class: &str) {
        let Square { x, y, side } = self.square;
        let cell = side / self.shown.len().max(1) as f64;
        svg.open(format_args!("g class=\"{class}\" transform=\"translate({x:.2} {y:.2}) scale({cell:.5})\""));
    }

    fn draw(&self, svg: &mut Svg, scale: &ColourScale) {
        let mut paths = vec![String::new(); LEVELS];
        for (row, weights) in self.rows().enumerate() {
            let mut start = 0;
            for run in weights.chunk_by(|a, b| scale.level(*a) == scale.level(*b)) {
                let level = scale.level(run[0]);
                if level > 0 {
                    // A stroke along the middle of the row; writing to a String can't fail.
                    write!(paths[level], "M{start} {row}.5h{}", run.len()).ok();
                }
                start += run.len();
            }
        }
        let (n, Square { x, y, side }) = (self.shown.len(), &self.square);
        self.open_group(svg, "cells");
        svg.element(format_args!("rect width=\"{n}\" height=\"{n}\" fill=\"{}\"", ColourScale::colour(0)));
        for (level, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            svg.element(format_args!("path stroke=\"{}\" d=\"{path}\"", ColourScale::colour(level)));
        }
        svg.close("g");
        svg.element(format_args!(
            "rect class=\"frame\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{side:.2}\" height=\"{side:.2}\""
        ));
    }

    /// Lays transparent cells with a `<title>` over the heaviest weights.
    fn draw_tooltips(&self, svg: &mut Svg, tokens: &[String]) {
        let cells = self.rows().enumerate();
        let cells =
            cells.flat_map(|(row, weights)| weights.iter().enumerate().map(move |(key, p)| (row, key, *p)));
        let mut cells: Vec<_> = cells.collect();
        cells.sort_by(|a, b| b.2.total_cmp(&a.2));
        self.open_group(svg, "tip");
        for (row, column, weight) in cells.into_iter().take(MAX_TOOLTIPS) {
            let (query, key) = (self.shown.start + row, self.shown.start + column);
            let (Some(from), Some(to)) = (tokens.get(query), tokens.get(key)) else { continue };
            svg.open(format_args!("rect x=\"{column}\" y=\"{row}\" width=\"1\" height=\"1\""));
            svg.open(format_args!("title"));
            svg.content(&format!("{from} ({query}) looks at {to} ({key}): {:.1} %", weight * 100.0));
            svg.close("title");
            svg.close("rect");
        }
        svg.close("g");
    }
}

/// Writes the tokens left of and above a panel.
fn draw_words(svg: &mut Svg, tokens: &[String], Square { x, y, side }: &Square) {
    let cell = side / tokens.len().max(1) as f64;
    let size = (cell * 1.02).clamp(3.0, 15.0);
    svg.open(format_args!("g class=\"word\" font-size=\"{size:.2}\""));
    for (i, token) in tokens.iter().enumerate() {
        let middle = (i as f64 + 0.5) * cell;
        let baseline = middle + 0.34 * size;
        svg.open(format_args!("text x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"end\"", x - 5.0, y + baseline));
        svg.content(token);
        svg.close("text");
        svg.open(format_args!(
            "text transform=\"translate({:.2} {:.2}) rotate(-90)\"",
            x + baseline,
            y - 5.0
        ));
        svg.content(token);
        svg.close("text");
    }
    svg.close("g");
}

/// Draws the colour scale with a few weights written below it.
fn draw_legend(svg: &mut Svg, scale: &ColourScale, x: f64, y: f64) {
    const LEGEND_WIDTH: f64 = 360.0;
    let step = LEGEND_WIDTH / LEVELS as f64;
    for level in 0..LEVELS {
        let left = x + level as f64 * step;
        let colour = ColourScale::colour(level);
        // Half a unit of overlap hides the seams that anti-aliasing leaves between neighbours.
        let width = if level + 1 == LEVELS { step } else { step + 0.5 };
        svg.element(format_args!(
            "rect x=\"{left:.2}\" y=\"{y}\" width=\"{width:.2}\" height=\"14\" fill=\"{colour}\""
        ));
    }
    svg.element(format_args!(
        "rect class=\"frame\" x=\"{x}\" y=\"{y}\" width=\"{LEGEND_WIDTH}\" height=\"14\""
    ));
    for share in [0.0, 0.05, 0.25, 0.5, 1.0_f64] {
        let at = x + share.sqrt() * LEGEND_WIDTH;
        svg.open(format_args!("text class=\"tick\" x=\"{at:.2}\" y=\"{:.2}\"", y + 29.0));
        svg.content(&format!("{:.1} %", share * scale.top * 100.0));
        svg.close("text");
    }
    svg.open(format_args!("text class=\"tick\" x=\"{:.2}\" y=\"{:.2}\"", x + LEGEND_WIDTH / 2.0, y - 8.0));
    svg.content("weight of a key in a query's context");
    svg.close("text");
}

/// Text of an SVG file under construction; the one place that escapes.
struct Svg(String);

impl Svg {
    fn new(width: f64, height: f64) -> Self {
        const STYLE: &str = "\
text{font-family:'Inter','Helvetica Neue',Helvetica,Arial,'DejaVu Sans',sans-serif;fill:#2a2433}\
.h1{font-size:32px;font-weight:700}.h2{font-size:22px;font-weight:700}.h3{font-size:15px;font-weight:600}\
.sub{font-size:15px;fill:#6d6478}.cap{font-size:13px;fill:#6d6478}.tick{font-size:12px;fill:#6d6478;text-anchor:middle}\
.word text{fill:#4a4255}path{stroke-width:1.02;fill:none}.frame{fill:none;stroke:#cfc7d6;stroke-width:1}\
.tip rect{fill:#fff;fill-opacity:0}.tip rect:hover{fill:none;stroke:#111;stroke-width:.15}";
        let mut svg = Self(String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"));
        svg.open(format_args!(
            "svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\""
        ));
        svg.open(format_args!("style"));
        svg.content(STYLE);
        svg.close("style");
        svg.element(format_args!("rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#ffffff\""));
        svg
    }

    fn finish(mut self) -> String {
        self.close("svg");
        self.0
    }

    fn text(&mut self, x: f64, y: f64, class: &str, content: &str) {
        self.open(format_args!("text class=\"{class}\" x=\"{x:.2}\" y=\"{y:.2}\""));
        self.content(content);
        self.close("text");
    }

    fn open(&mut self, tag: fmt::Arguments<'_>) {
        write!(self.0, "<{tag}>").ok();
    }

    fn close(&mut self, name: &str) {
        writeln!(self.0, "</{name}>").ok();
    }

    fn element(&mut self, tag: fmt::Arguments<'_>) {
        writeln!(self.0, "<{tag}/>").ok();
    }

    /// Appends character data. Control characters are not XML, whatever way they are written, and become U+FFFD.
    fn content(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn lightness_falls_along_the_scale() {
        let grey = |level| {
            let colour = u32::from_str_radix(&ColourScale::colour(level)[1..], 16).unwrap();
            let [_, r, g, b] = colour.to_be_bytes().map(f64::from);
            0.2126 * r + 0.7152 * g + 0.0722 * b
        };
        for level in 1..LEVELS {
            assert!(grey(level) < grey(level - 1), "level {level}");
        }
    }

    #[test]
    fn degenerate_figures_are_still_documents() {
        for svg in [figure(&[], vec![]), figure(&["a"], vec![f64::NAN]), figure(&["a"], vec![0.0])] {
            assert!(svg.ends_with("</svg>\n"));
        }
    }
}
