//! Maps as pixels. No words: a picture of pixels would need a font, and a map that is worth one has too many tokens for them.

use std::io::{self, Write};

use super::Maps;
use super::scale::{ColourScale, LEVELS};

/// Pixels that the longer side of a panel has at least; cells are enlarged until it has, by whole numbers.
const PANEL: usize = 512;
/// Pixels between panels, and around them.
const SPACE: usize = 16;
/// Height of the strip that shows the scale, from no weight to the largest.
const STRIP: usize = 12;
/// Index of white in the palette, behind the colours of the scale.
const WHITE: u8 = LEVELS as u8;

/// Where everything is, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Panels in a row.
    in_row: usize,
    /// Rows of panels.
    bands: usize,
    /// Width and height of a cell.
    cell: (usize, usize),
    /// Width and height of a panel.
    panel: (usize, usize),
}

impl Layout {
    fn of(maps: &Maps<'_>) -> Self {
        let in_row = maps.panels_in_row();
        let bands = maps.panels.len().div_ceil(in_row);
        // Each side by itself: 64 queries over 4096 keys would be a line.
        let enlarged = |cells: usize| (PANEL / cells.max(1)).max(1);
        let cell = (enlarged(maps.columns), enlarged(maps.rows));
        Self { in_row, bands, cell, panel: (maps.columns * cell.0, maps.rows * cell.1) }
    }

    fn width(&self) -> usize {
        SPACE + self.in_row * (self.panel.0 + SPACE)
    }

    fn height(&self) -> usize {
        SPACE + self.bands * (self.panel.1 + SPACE) + STRIP + SPACE
    }
}

impl Maps<'_> {
    /// Writes the maps as a PNG: panels in reading order, and below them the scale. Takes the memory of a row of pixels.
    ///
    /// # Errors
    /// Those of `to`; [`io::ErrorKind::Other`] if the picture has more pixels than the format has room for.
    pub fn write_png(&self, to: impl Write) -> io::Result<()> {
        let layout = Layout::of(self);
        let side = |pixels: usize| u32::try_from(pixels).map_err(io::Error::other);
        let mut encoder = png::Encoder::new(to, side(layout.width())?, side(layout.height())?);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_depth(png::BitDepth::Eight);
        let colours = (0..LEVELS).flat_map(ColourScale::rgb);
        encoder.set_palette(colours.chain([u8::MAX; 3]).collect::<Vec<u8>>());
        // Neighbours on a palette have nothing to do with each other.
        encoder.set_filter(png::Filter::NoFilter);
        let scale = self.scale();
        let darkest = self.unit.with_digits(scale.top, 3);
        let darkest = format!("{} The darkest colour is a weight of {darkest}.", self.subtitle);
        encoder.add_itxt_chunk("Title".into(), self.title.into())?;
        encoder.add_itxt_chunk("Description".into(), darkest)?;
        let mut writer = encoder.write_header()?;
        let mut pixels = writer.stream_writer()?;
        let mut row = vec![WHITE; layout.width()];
        for y in 0..layout.height() {
            self.fill(&layout, &scale, y, &mut row);
            pixels.write_all(&row)?;
        }
        pixels.finish()?;
        Ok(writer.finish()?)
    }

    /// The row of pixels at `y`, as places on the palette.
    fn fill(&self, layout: &Layout, scale: &ColourScale, y: usize, row: &mut [u8]) {
        row.fill(WHITE);
        let band_height = layout.panel.1 + SPACE;
        let Some(y) = y.checked_sub(SPACE) else { return };
        let (band, inside) = (y / band_height, y % band_height);
        if band < layout.bands {
            if inside < layout.panel.1 {
                let panels = self.panels.iter().skip(band * layout.in_row).take(layout.in_row);
                for (i, panel) in panels.enumerate() {
                    let first = inside / layout.cell.1 * self.columns;
                    let weights = panel.weights.get(first..first + self.columns).unwrap_or_default();
                    let pixels = row.iter_mut().skip(SPACE + i * (layout.panel.0 + SPACE));
                    let weights =
                        weights.iter().flat_map(|weight| std::iter::repeat_n(weight, layout.cell.0));
                    pixels.zip(weights).for_each(|(pixel, weight)| *pixel = scale.level(*weight) as u8);
                }
            }
        } else if y - layout.bands * band_height < STRIP {
            let width = layout.width() - 2 * SPACE;
            let pixels = row.iter_mut().skip(SPACE).take(width);
            pixels.enumerate().for_each(|(x, pixel)| *pixel = (x * LEVELS / width) as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::{HeadPanel, WeightUnit};
    use super::*;

    /// Width, height and colours of the pixels of a file.
    fn decoded(bytes: &[u8]) -> (usize, usize, Vec<[u8; 3]>) {
        let mut decoder = png::Decoder::new(Cursor::new(bytes));
        decoder.set_transformations(png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut buffer = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut buffer).unwrap();
        let pixels = buffer[..frame.buffer_size()].as_chunks().0.to_vec();
        assert_eq!(frame.color_type, png::ColorType::Rgb);
        (frame.width as usize, frame.height as usize, pixels)
    }

    fn drawn(panels: &[HeadPanel], rows: usize, columns: usize) -> Vec<u8> {
        let (queries, keys) = (10 * rows, 10 * columns);
        let (title, subtitle, query_words, key_words) = ("Tïtle", "s.", &[][..], &[][..]);
        let unit = WeightUnit::Percent;
        let maps =
            Maps { title, subtitle, queries, keys, rows, columns, query_words, key_words, unit, panels };
        let mut bytes = Vec::new();
        maps.write_png(&mut bytes).unwrap();
        bytes
    }

    fn panel(weights: Vec<f64>) -> HeadPanel {
        HeadPanel { title: String::new(), caption: String::new(), weights }
    }

    #[test]
    fn every_pixel_has_the_colour_of_its_weight() {
        let weights = [vec![0.0, 0.1, 0.4, 0.2, 0.3, 0.05], vec![0.4, 0.0, 0.0, 0.0, 0.0, 0.1]];
        let panels: Vec<HeadPanel> = weights.iter().cloned().map(panel).collect();
        let (width, height, pixels) = decoded(&drawn(&panels, 2, 3));
        // 512 / 3 = 170 and 512 / 2 = 256 pixels a cell.
        assert_eq!((width, height), (16 + 2 * (510 + 16), 16 + 512 + 16 + 12 + 16));
        let scale = ColourScale { top: 0.4 };
        for y in 0..512 {
            for x in 0..510 {
                for (i, weights) in weights.iter().enumerate() {
                    let expected = ColourScale::rgb(scale.level(weights[y / 256 * 3 + x / 170]));
                    let at = (16 + y) * width + 16 + i * 526 + x;
                    assert_eq!(pixels[at], expected, "panel {i} at {x},{y}");
                }
            }
        }
        for (x, y) in [(0, 0), (15, 100), (530, 100), (width - 1, 30), (40, 15), (40, 530), (40, height - 1)]
        {
            assert_eq!(pixels[y * width + x], [255; 3], "{x},{y}");
        }
        let strip = |x: usize| pixels[(16 + 528 + 5) * width + x];
        assert_eq!(strip(16), ColourScale::rgb(0));
        assert_eq!(strip(width - 17), ColourScale::rgb(LEVELS - 1));
    }

    #[test]
    fn long_sequences_have_a_pixel_for_each_cell() {
        let mut weights = vec![0.0; 600 * 700];
        weights[599 * 700 + 13] = 1.0;
        let (width, _, pixels) = decoded(&drawn(&[panel(weights)], 600, 700));
        assert_eq!(width, 700 + 32);
        let dark = |pixel: &&[u8; 3]| **pixel == ColourScale::rgb(LEVELS - 1);
        assert_eq!(pixels[(16 + 599) * width + 16 + 13], ColourScale::rgb(LEVELS - 1));
        assert_eq!(pixels[..(16 + 600) * width].iter().filter(dark).count(), 1);
    }

    #[test]
    fn the_file_says_what_it_shows() {
        let bytes = drawn(&[panel(vec![0.5; 4])], 2, 2);
        let reader = png::Decoder::new(Cursor::new(&bytes)).read_info().unwrap();
        let texts: Vec<String> =
            reader.info().utf8_text.iter().map(|chunk| chunk.get_text().unwrap()).collect();
        assert_eq!(texts, ["Tïtle", "s. The darkest colour is a weight of 50.000 %."]);
        assert!(!drawn(&[], 2, 2).is_empty());
    }
}
