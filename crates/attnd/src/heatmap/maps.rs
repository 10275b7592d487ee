//! Maps of heads, pooled where there are many tokens, beside each other.

use super::cells::{Cells, Frame, draw_legend, draw_words};
use super::scale::ColourScale;
use super::svg::Svg;
use super::{COLUMNS, GAP, HeadPanel, LABEL_ROOM, MARGIN, WIDTH, WeightUnit};

/// Most words along a side of a panel that can be read.
const MAX_WORDS: usize = 160;
/// Height of a panel in widths, at least and at most: a few queries over many keys would be a line.
const ASPECT: (f64, f64) = (0.25, 1.5);

/// Maps that have queries as rows and keys as columns, and one scale.
#[derive(Debug, Clone)]
pub struct Maps<'a> {
    /// Headline.
    pub title: &'a str,
    /// Second line: what the data is and how it was made.
    pub subtitle: &'a str,
    /// Queries that the rows stand for.
    pub queries: usize,
    /// Keys that the columns stand for.
    pub keys: usize,
    /// Rows of each map, as many as queries or fewer.
    pub rows: usize,
    /// Columns of each map, as many as keys or fewer.
    pub columns: usize,
    /// Words of the queries; empty if they have none.
    pub query_words: &'a [String],
    /// Words of the keys; empty if they have none.
    pub key_words: &'a [String],
    /// In what weights are written.
    pub unit: WeightUnit,
    /// The maps.
    pub panels: &'a [HeadPanel],
}

impl Maps<'_> {
    /// The scale of all panels.
    pub(super) fn scale(&self) -> ColourScale {
        ColourScale::over(self.panels.iter().flat_map(|panel| &panel.weights))
    }

    /// Panels in a row.
    pub(super) fn panels_in_row(&self) -> usize {
        self.panels.len().clamp(1, COLUMNS)
    }

    /// The maps as the text of an SVG file.
    pub fn to_svg(&self) -> String {
        let in_row = self.panels_in_row();
        let words = self.words();
        let left = MARGIN + if words.is_some() { LABEL_ROOM } else { 0.0 };
        let room = WIDTH - left - MARGIN - (in_row - 1) as f64 * GAP;
        let width = room / in_row as f64;
        let aspect = self.queries as f64 / self.keys.max(1) as f64;
        let height = width * aspect.clamp(ASPECT.0, ASPECT.1);
        let top = 150.0 + if words.is_some() { LABEL_ROOM } else { 0.0 };
        let row_height = height + 64.0;
        let rows = self.panels.len().div_ceil(in_row) as f64;

        let scale = self.scale();
        let mut svg = Svg::new(WIDTH, top + rows * row_height + MARGIN);
        svg.text(MARGIN, 62.0, "h1", self.title);
        svg.text(MARGIN, 92.0, "sub", self.subtitle);
        draw_legend(&mut svg, &scale, self.unit, WIDTH - MARGIN - 360.0, 44.0);
        for (i, panel) in self.panels.iter().enumerate() {
            let x = left + (i % in_row) as f64 * (width + GAP);
            let y = top + (i / in_row) as f64 * row_height;
            let frame = Frame { x, y, width, height };
            let title = y - 8.0 - if words.is_some() { LABEL_ROOM } else { 0.0 };
            svg.text(x, title, "h3", &panel.title);
            if let Some((queries, keys)) = words {
                draw_words(&mut svg, queries, keys, &frame);
            }
            let (rows, columns) = (0..self.rows, 0..self.columns);
            let cells = Cells { weights: &panel.weights, n: self.columns, rows, columns, frame };
            cells.draw(&mut svg, &scale);
            svg.text(x, y + height + 18.0, "cap", &panel.caption);
            if self.panels.len() == 1 {
                cells.draw_tooltips(
                    &mut svg,
                    self.unit,
                    |row| name("query", "queries", row, self.rows, self.queries, self.query_words),
                    |column| name("key", "keys", column, self.columns, self.keys, self.key_words),
                );
            }
        }
        svg.finish()
    }

    /// The words to write along the one panel, if each has a row or a column of its own and can be read.
    fn words(&self) -> Option<(&[String], &[String])> {
        let readable = |words: &[String], cells: usize| words.len() == cells && cells <= MAX_WORDS;
        let all = readable(self.query_words, self.rows) && readable(self.key_words, self.columns);
        (all && self.panels.len() == 1).then_some((self.query_words, self.key_words))
    }
}

/// What the tokens of a cell are called. Cell `c` of `n` has the tokens from `c * tokens / n` to before the next cell's.
fn name(one: &str, many: &str, cell: usize, n: usize, tokens: usize, words: &[String]) -> String {
    let first = |cell: usize| (cell as u128 * tokens as u128 / n.max(1) as u128) as usize;
    let (first, last) = (first(cell), first(cell + 1).saturating_sub(1));
    match words.get(first) {
        Some(word) if first == last => format!("{word} ({first})"),
        _ if first == last => format!("{one} {first}"),
        _ => format!("{many} {first} to {last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn panel(weights: Vec<f64>) -> HeadPanel {
        HeadPanel { title: "Head 3".into(), caption: "c".into(), weights }
    }

    fn maps<'a>(panels: &'a [HeadPanel], words: &'a [String]) -> Maps<'a> {
        let (queries, keys, rows, columns) = (2, words.len().max(3), 2, 3);
        let query_words = words.get(..queries).unwrap_or_default();
        let (title, subtitle, key_words, unit) = ("T", "s", words, WeightUnit::Percent);
        Maps { title, subtitle, queries, keys, rows, columns, query_words, key_words, unit, panels }
    }

    #[test]
    fn one_map_has_words_and_tooltips_and_rows_of_its_own_height() {
        let words = ["a", "b", "c"].map(str::to_owned);
        let panels = [panel(vec![0.0, 0.5, 0.5, 1.0, 0.0, 0.0])];
        let svg = maps(&panels, &words).to_svg();
        assert!(svg.contains("<title>b (1) looks at a (0): 100.0 %</title>"), "{svg}");
        assert!(svg.contains("<title>a (0) looks at c (2): 50.0 %</title>"));
        let darkest = ColourScale::colour(super::super::scale::LEVELS - 1);
        assert!(svg.contains(&format!("<path stroke=\"{darkest}\" d=\"M0 1.5h1\"/>")), "{svg}");
        assert!(svg.contains("<rect width=\"3\" height=\"2\""));
        assert_eq!(svg.matches(">c</text>").count(), 2, "once a word, once the caption");
        let svg = Maps { unit: WeightUnit::Plain, ..maps(&panels, &words) }.to_svg();
        assert!(svg.contains("<title>a (0) looks at c (2): 0.500</title>") && !svg.contains(" %<"), "{svg}");
    }

    #[test]
    fn pooled_cells_name_their_ranges() {
        let words: Vec<String> = (0..7).map(|i| format!("w{i}")).collect();
        let panels = [panel(vec![0.0, 1.0, 0.0, 0.0, 0.0, 1.0])];
        let svg = maps(&panels, &words).to_svg();
        assert!(svg.contains("<title>w0 (0) looks at keys 2 to 3: 100.0 %</title>"), "{svg}");
        assert!(svg.contains("<title>w1 (1) looks at keys 4 to 6: 100.0 %</title>"));
        assert!(!svg.contains("class=\"word\""), "columns are not words");
        assert_eq!(name("key", "keys", 2, 3, 65_536, &[]), "keys 43690 to 65535");
        assert_eq!(name("key", "keys", 2, 3, 3, &[]), "key 2");
    }

    #[test]
    fn several_maps_share_a_scale_and_lie_in_a_grid() {
        let panels: Vec<_> = (1..=5).map(|i| panel(vec![f64::from(i) / 5.0; 6])).collect();
        let svg = maps(&panels, &[]).to_svg();
        assert_eq!(svg.matches("Head 3").count(), 5);
        let darkest = ColourScale::colour(super::super::scale::LEVELS - 1);
        assert_eq!(svg.matches(&format!("<path stroke=\"{darkest}\"")).count(), 1);
        assert!(!svg.contains("<title>"));
        let none = maps(&[], &[]).to_svg();
        assert!(none.ends_with("</svg>\n"));
    }
}
