//! Text of an SVG file under construction; the one place that escapes.

use std::fmt::{self, Write};

/// A file under construction.
#[derive(Debug)]
pub(super) struct Svg(String);

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
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

    pub(super) fn finish(mut self) -> String {
        self.close("svg");
        self.0
    }

    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, content: &str) {
        self.open(format_args!("text class=\"{class}\" x=\"{x:.2}\" y=\"{y:.2}\""));
        self.content(content);
        self.close("text");
    }

    pub(super) fn open(&mut self, tag: fmt::Arguments<'_>) {
        write!(self.0, "<{tag}>").ok();
    }

    pub(super) fn close(&mut self, name: &str) {
        writeln!(self.0, "</{name}>").ok();
    }

    pub(super) fn element(&mut self, tag: fmt::Arguments<'_>) {
        writeln!(self.0, "<{tag}/>").ok();
    }

    /// Appends character data. Control characters are not XML, whatever way they are written, and become U+FFFD.
    pub(super) fn content(&mut self, text: &str) {
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
