//! What a picture of weights is made of: cells, words beside them, and the legend.

use std::fmt::Write as _;
use std::ops::Range;

use super::scale::{ColourScale, LEVELS};
use super::svg::Svg;
use super::unit::WeightUnit;

/// Tooltips are given to at most this many cells, the heaviest first.
pub(super) const MAX_TOOLTIPS: usize = 4_000;

/// A place on the page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

/// Some of a head's weights, and where they go.
#[derive(Debug)]
pub(super) struct Cells<'a> {
    /// Row-major.
    pub(super) weights: &'a [f64],
    /// Weights in a row.
    pub(super) n: usize,
    /// Rows to draw.
    pub(super) rows: Range<usize>,
    /// Columns to draw.
    pub(super) columns: Range<usize>,
    pub(super) frame: Frame,
}

impl Cells<'_> {
    /// The shown part of each shown row.
    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        let rows = self.weights.chunks(self.n.max(1)).skip(self.rows.start).take(self.rows.len());
        rows.filter_map(|row| row.get(self.columns.clone()))
    }

    /// Opens a group in whose coordinates a cell is one by one.
    fn open_group(&self, svg: &mut Svg, class: &str) {
        let Frame { x, y, width, height } = self.frame;
        let cell = |side: f64, n: usize| side / n.max(1) as f64;
        let (wide, high) = (cell(width, self.columns.len()), cell(height, self.rows.len()));
        svg.open(format_args!(
            "g class=\"{class}\" transform=\"translate({x:.2} {y:.2}) scale({wide:.5} {high:.5})\""
        ));
    }

    /// Draws the weights, their ground and their frame.
    pub(super) fn draw(&self, svg: &mut Svg, scale: &ColourScale) {
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
        let (columns, rows) = (self.columns.len(), self.rows.len());
        let Frame { x, y, width, height } = self.frame;
        self.open_group(svg, "cells");
        svg.element(format_args!(
            "rect width=\"{columns}\" height=\"{rows}\" fill=\"{}\"",
            ColourScale::colour(0)
        ));
        for (level, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
            svg.element(format_args!("path stroke=\"{}\" d=\"{path}\"", ColourScale::colour(level)));
        }
        svg.close("g");
        svg.element(format_args!(
            "rect class=\"frame\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\""
        ));
    }

    /// Lays transparent cells with a `<title>` over the heaviest weights; rows and columns are called as the two say.
    pub(super) fn draw_tooltips(
        &self,
        svg: &mut Svg,
        unit: WeightUnit,
        row: impl Fn(usize) -> String,
        column: impl Fn(usize) -> String,
    ) {
        let cells = self
            .rows()
            .enumerate()
            .flat_map(|(y, weights)| weights.iter().enumerate().map(move |(x, weight)| (x, y, *weight)));
        let mut cells: Vec<_> = cells.filter(|(.., weight)| *weight > 0.0).collect();
        let heavier = |a: &(usize, usize, f64), b: &(usize, usize, f64)| b.2.total_cmp(&a.2);
        if cells.len() > MAX_TOOLTIPS {
            cells.select_nth_unstable_by(MAX_TOOLTIPS, heavier);
            cells.truncate(MAX_TOOLTIPS);
        }
        cells.sort_by(heavier);
        self.open_group(svg, "tip");
        for (x, y, weight) in cells {
            let (from, to) = (row(self.rows.start + y), column(self.columns.start + x));
            svg.open(format_args!("rect x=\"{x}\" y=\"{y}\" width=\"1\" height=\"1\""));
            svg.open(format_args!("title"));
            svg.content(&format!("{from} looks at {to}: {}", unit.with_digits(weight, 1)));
            svg.close("title");
            svg.close("rect");
        }
        svg.close("g");
    }
}

/// Writes words left of a panel's rows and above its columns.
pub(super) fn draw_words(svg: &mut Svg, rows: &[String], columns: &[String], frame: &Frame) {
    let Frame { x, y, width, height } = frame;
    let size_of = |cell: f64| (cell * 1.02).clamp(3.0, 15.0);
    let (high, wide) = (height / rows.len().max(1) as f64, width / columns.len().max(1) as f64);
    let baseline = |i: usize, cell: f64| (i as f64 + 0.5) * cell + 0.34 * size_of(cell);
    svg.open(format_args!("g class=\"word\" font-size=\"{:.2}\"", size_of(high)));
    for (i, word) in rows.iter().enumerate() {
        let (x, y) = (x - 5.0, y + baseline(i, high));
        svg.open(format_args!("text x=\"{x:.2}\" y=\"{y:.2}\" text-anchor=\"end\""));
        svg.content(word);
        svg.close("text");
    }
    svg.close("g");
    svg.open(format_args!("g class=\"word\" font-size=\"{:.2}\"", size_of(wide)));
    for (i, word) in columns.iter().enumerate() {
        let (x, y) = (x + baseline(i, wide), y - 5.0);
        svg.open(format_args!("text transform=\"translate({x:.2} {y:.2}) rotate(-90)\""));
        svg.content(word);
        svg.close("text");
    }
    svg.close("g");
}

/// Draws the colour scale with a few weights written below it.
pub(super) fn draw_legend(svg: &mut Svg, scale: &ColourScale, unit: WeightUnit, x: f64, y: f64) {
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
        svg.content(&unit.with_digits(share * scale.top, 1));
        svg.close("text");
    }
    svg.open(format_args!("text class=\"tick\" x=\"{:.2}\" y=\"{:.2}\"", x + LEGEND_WIDTH / 2.0, y - 8.0));
    svg.content("weight of a key in a query's context");
    svg.close("text");
}
