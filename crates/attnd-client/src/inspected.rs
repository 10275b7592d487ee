//! What a call tells beside the context, and how it is put together: each element, row and row of a map exactly once, in
//! whatever order they come.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::slot::PAGE_KEYS;
use attnd_kernel::{AttnShape, Outputs, Rectangle};
use attnd_wire::{Elements, Error, HeatChunk, Reason, ReportChunk, floats};

use crate::context::zeros;

/// What was asked for in [`crate::AttendOptions::outputs`]. What wasn't is empty. `heads` are those that outputs were wanted of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inspected {
    /// Query heads of each batch element.
    pub heads: Range<usize>,
    /// Of each stage that was wanted whole, then of each rectangle: `[batch, heads, queries, keys]` of it.
    pub elements: Vec<Vec<f32>>,
    /// `[batch, heads, queries, top_k]`: keys by falling score; `u32::MAX` behind the last.
    pub top_keys: Vec<u32>,
    /// Their weights; 0 behind the last.
    pub top_weights: Vec<f32>,
    /// Their scores, biases included; -inf behind the last.
    pub top_scores: Vec<f32>,
    /// `[batch, heads, queries, blocks]`: sums of the weights of blocks of keys.
    pub mass: Vec<f32>,
    /// `[batch, heads, queries]`, in nats.
    pub entropy: Vec<f32>,
    /// `[batch, heads, queries]`: mean distance between a query's position and the keys it weighs.
    pub distance: Vec<f32>,
    /// `[batch, heads, queries]`; -inf for a row that sees no key.
    pub max_score: Vec<f32>,
    /// `[batch, heads, rows, columns]`: the pooled map of weights.
    pub heat: Vec<f32>,
}

/// One bit for each thing that comes once.
#[derive(Debug, Default)]
struct Seen {
    bits: Vec<u64>,
    left: usize,
}

impl Seen {
    fn new(n: usize) -> Option<Self> {
        Some(Self { bits: zeros(n.div_ceil(64))?, left: n })
    }

    /// Whether it is new.
    fn take(&mut self, at: usize) -> bool {
        match self.bits.get_mut(at / 64) {
            Some(word) if *word >> (at % 64) & 1 == 0 => {
                *word |= 1 << (at % 64);
                self.left = self.left.saturating_sub(1);
                true
            }
            _ => false,
        }
    }
}

/// The outputs of a call as far as they are here.
#[derive(Debug)]
pub(crate) struct OutputsAssembly {
    shape: AttnShape,
    outputs: Arc<Outputs>,
    inspected: Inspected,
    rows: Seen,
    heat_rows: Seen,
    /// Of each rectangle: (batch, head, token, page).
    elements: Vec<Seen>,
}

/// Pages that have some of these keys.
fn pages(keys: &Range<usize>) -> Range<usize> {
    keys.start / PAGE_KEYS..keys.end.div_ceil(PAGE_KEYS)
}

impl OutputsAssembly {
    /// Room for everything that is wanted.
    ///
    /// # Errors
    /// [`Reason::Outputs`] if this process can't get the memory; worth knowing before anything is sent.
    pub(crate) fn new(shape: AttnShape, outputs: Arc<Outputs>) -> Result<Self, Error> {
        Self::room(shape, outputs).ok_or_else(|| {
            let detail = "what is wanted takes more memory than the client can get; ask for rectangles, top_k or a heatmap";
            Error::new(Reason::Outputs, detail)
        })
    }

    fn room(shape: AttnShape, outputs: Arc<Outputs>) -> Option<Self> {
        let (parts, heads) = (outputs.parts(), outputs.heads());
        let all_heads = shape.batch().checked_mul(heads.len())?;
        let rows = all_heads.checked_mul(shape.n_queries())?;
        let of = |is_wanted: bool| if is_wanted { rows } else { 0 };
        let (heat_rows, columns) = parts.heatmap.unwrap_or((0, 0));
        let size = |rectangle: &Rectangle| {
            let rows =
                shape.batch().checked_mul(rectangle.heads.len())?.checked_mul(rectangle.tokens.len())?;
            Some((rows.checked_mul(rectangle.keys.len())?, rows.checked_mul(pages(&rectangle.keys).len())?))
        };
        let mut elements = Vec::with_capacity(outputs.rectangles().len());
        let mut seen = Vec::with_capacity(outputs.rectangles().len());
        for rectangle in outputs.rectangles() {
            let (n, runs) = size(rectangle)?;
            elements.push(zeros(n)?);
            seen.push(Seen::new(runs)?);
        }
        let top = rows.checked_mul(parts.top_k)?;
        let inspected = Inspected {
            heads,
            elements,
            top_keys: zeros(top)?,
            top_weights: zeros(top)?,
            top_scores: zeros(top)?,
            mass: zeros(rows.checked_mul(outputs.mass_blocks())?)?,
            entropy: zeros(of(parts.entropy))?,
            distance: zeros(of(parts.distance))?,
            max_score: zeros(of(parts.max_score))?,
            heat: zeros(all_heads.checked_mul(heat_rows)?.checked_mul(columns)?)?,
        };
        let has_numbers = parts.top_k > 0
            || parts.mass_block.is_some()
            || parts.entropy
            || parts.distance
            || parts.max_score;
        Some(Self {
            rows: Seen::new(of(has_numbers))?,
            heat_rows: Seen::new(all_heads * heat_rows)?,
            elements: seen,
            inspected,
            shape,
            outputs,
        })
    }

    /// Where a query head, flattened over the batch, lies among those that are wanted.
    fn place(&self, head: usize, wanted: &Range<usize>) -> Option<usize> {
        let (batch, head) = (head / self.shape.n_heads(), head % self.shape.n_heads());
        wanted.contains(&head).then(|| batch * wanted.len() + head - wanted.start)
    }

    /// Takes some elements. After an error the answer is of no use.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for elements that came before or that nobody wanted.
    pub(crate) fn accept_elements(&mut self, chunk: &Elements) -> Result<(), Error> {
        let Elements { rectangle, head, tokens, keys, data } = chunk;
        let unwanted = || invalid(format!("elements {rectangle} of head {head} are not wanted"));
        let wanted = self.outputs.rectangles().get(*rectangle).ok_or_else(unwanted)?;
        let head_place = self.place(*head, &wanted.heads).ok_or_else(unwanted)?;
        let (width, n_pages) = (wanted.keys.len(), pages(&wanted.keys).len());
        let first_key = keys.start.checked_sub(wanted.keys.start).ok_or_else(unwanted)?;
        let page = keys.start / PAGE_KEYS - wanted.keys.start / PAGE_KEYS;
        // Those of a page come together, or a bit for each page would not do.
        let in_page = (keys.start.max(wanted.keys.start), (keys.start / PAGE_KEYS + 1) * PAGE_KEYS);
        if keys.end != in_page.1.min(wanted.keys.end)
            || (keys.start != wanted.keys.start && !keys.start.is_multiple_of(PAGE_KEYS))
        {
            return Err(invalid(format!("elements {rectangle} of keys {keys:?} are no whole page")));
        }
        let values = floats::from_bytes(data);
        let both = self.inspected.elements.get_mut(*rectangle).zip(self.elements.get_mut(*rectangle));
        let Some((elements, seen)) = both else { return Err(unwanted()) };
        for (token, values) in tokens.clone().zip(values.chunks_exact(keys.len().max(1))) {
            let token_place = token.checked_sub(wanted.tokens.start).ok_or_else(unwanted)?;
            let row = head_place * wanted.tokens.len() + token_place;
            if !seen.take(row * n_pages + page) {
                let what =
                    format!("elements {rectangle} of head {head} token {token} keys {keys:?} came twice");
                return Err(invalid(what));
            }
            let first = row * width + first_key;
            let place = elements.get_mut(first..first + values.len()).ok_or_else(unwanted)?;
            place.copy_from_slice(values);
        }
        Ok(())
    }

    /// Takes numbers of some rows. After an error the answer is of no use.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for a row that came before or that nobody wanted.
    pub(crate) fn accept_report(&mut self, chunk: &ReportChunk) -> Result<(), Error> {
        let ReportChunk { heads, tokens, numbers } = chunk;
        let wanted = self.outputs.heads();
        let (n_queries, k, blocks) =
            (self.shape.n_queries(), self.outputs.parts().top_k, self.outputs.mass_blocks());
        for (i, head) in heads.clone().enumerate() {
            let unwanted = || invalid(format!("a report on head {head} tokens {tokens:?} is not wanted"));
            let place = self.place(head, &wanted).ok_or_else(unwanted)?;
            let first = place * n_queries + tokens.start;
            if !(first..first + tokens.len()).all(|row| self.rows.take(row)) {
                return Err(invalid(format!(
                    "numbers of head {head} tokens {tokens:?} came twice, or nobody wants them"
                )));
            }
            let (to, from) = (first..first + tokens.len(), i * tokens.len()..(i + 1) * tokens.len());
            let inspected = &mut self.inspected;
            copy(&mut inspected.top_keys, &to, &numbers.top_keys, &from, k).ok_or_else(unwanted)?;
            let lists = [
                (&mut inspected.top_weights, &numbers.top_weights, k),
                (&mut inspected.top_scores, &numbers.top_scores, k),
                (&mut inspected.mass, &numbers.mass, blocks),
                (&mut inspected.entropy, &numbers.entropy, 1),
                (&mut inspected.distance, &numbers.distance, 1),
                (&mut inspected.max_score, &numbers.max_score, 1),
            ];
            for (place, numbers, of_row) in lists {
                copy(place, &to, numbers, &from, of_row).ok_or_else(unwanted)?;
            }
        }
        Ok(())
    }

    /// Takes rows of some maps. After an error the answer is of no use.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] for a row that came before or that nobody wanted.
    pub(crate) fn accept_heat(&mut self, chunk: &HeatChunk) -> Result<(), Error> {
        let HeatChunk { heads, rows, cells } = chunk;
        let (wanted, (n_rows, columns)) =
            (self.outputs.heads(), self.outputs.parts().heatmap.unwrap_or((0, 0)));
        for (i, head) in heads.clone().enumerate() {
            let unwanted = || invalid(format!("a map of head {head} rows {rows:?} is not wanted"));
            let place = self.place(head, &wanted).ok_or_else(unwanted)?;
            let first = place * n_rows + rows.start;
            if !(first..first + rows.len()).all(|row| self.heat_rows.take(row)) {
                return Err(invalid(format!(
                    "a map's rows {rows:?} of head {head} came twice, or nobody wants them"
                )));
            }
            let (to, from) = (first..first + rows.len(), i * rows.len()..(i + 1) * rows.len());
            copy(&mut self.inspected.heat, &to, cells, &from, columns).ok_or_else(unwanted)?;
        }
        Ok(())
    }

    /// All outputs, if everything is here.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] with what is missing.
    pub(crate) fn finish(self) -> Result<Inspected, Error> {
        let elements: usize = self.elements.iter().map(|seen| seen.left).sum();
        match (self.rows.left, self.heat_rows.left, elements) {
            (0, 0, 0) => Ok(self.inspected),
            (rows, heat_rows, elements) => Err(invalid(format!(
                "outputs are missing, an older coordinator knows none: {rows} rows, {heat_rows} rows of maps, \
                 {elements} runs of elements"
            ))),
        }
    }
}

/// Copies rows of `of_row` numbers; nothing where none are wanted. `None` where the lists are too short.
fn copy<T: Copy>(
    to: &mut [T],
    rows: &Range<usize>,
    from: &[T],
    from_rows: &Range<usize>,
    of_row: usize,
) -> Option<()> {
    if to.is_empty() {
        return Some(());
    }
    let place = to.get_mut(rows.start * of_row..rows.end * of_row)?;
    place.copy_from_slice(from.get(from_rows.start * of_row..from_rows.end * of_row)?);
    Some(())
}

fn invalid(detail: String) -> Error {
    Error::new(Reason::ReplyInvalid, detail)
}

#[cfg(test)]
mod tests {
    use attnd_kernel::{Causal, Dims, FinishedReport, Operator, OutputsParts, Stage};

    use super::*;

    fn assembly() -> OutputsAssembly {
        let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 6, keys: 600, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let parts = OutputsParts {
            rectangles: vec![Rectangle { stage: Stage::Weights, heads: 2..3, tokens: 1..4, keys: 200..530 }],
            top_k: 2,
            heatmap: Some((3, 2)),
            heads: Some(1..3),
            ..OutputsParts::default()
        };
        let outputs = Outputs::new(parts, &shape, &Operator::plain(1.0, Causal::None)).unwrap();
        OutputsAssembly::new(shape, Arc::new(outputs)).unwrap()
    }

    /// The element of head `head`, token `token`, key `key` is a number of its own.
    fn value(head: usize, token: usize, key: usize) -> f32 {
        (head * 10_000 + token * 1000 + key) as f32
    }

    fn elements(head: usize, tokens: Range<usize>, keys: Range<usize>) -> Elements {
        let values = tokens.clone().flat_map(|token| keys.clone().map(move |key| value(head, token, key)));
        let data = floats::into_bytes(values.collect());
        Elements { rectangle: 0, head, tokens, keys, data }
    }

    fn report(heads: Range<usize>, tokens: Range<usize>) -> ReportChunk {
        let rows = heads.clone().flat_map(|head| tokens.clone().map(move |token| (head, token)));
        let of = |f: &dyn Fn(usize, usize, usize) -> f32| -> Vec<f32> {
            rows.clone().flat_map(|(head, token)| [f(head, token, 0), f(head, token, 1)]).collect()
        };
        let weights = of(&value);
        let numbers = FinishedReport {
            top_keys: weights.iter().map(|weight| *weight as u32 % 600).collect(),
            top_scores: weights.iter().map(|weight| -weight).collect(),
            top_weights: weights,
            ..FinishedReport::default()
        };
        ReportChunk { heads, tokens, numbers }
    }

    fn heat(heads: Range<usize>, rows: Range<usize>) -> HeatChunk {
        let cells = heads
            .clone()
            .flat_map(|head| rows.clone().flat_map(move |row| [value(head, row, 0), value(head, row, 1)]));
        HeatChunk { cells: cells.collect(), heads, rows }
    }

    #[test]
    fn everything_comes_to_its_place_in_any_order() {
        let mut assembly = assembly();
        for batch in [1, 0] {
            let head = 4 * batch;
            for keys in [512..530, 200..256, 256..512] {
                assembly.accept_elements(&elements(head + 2, 2..4, keys.clone())).unwrap();
                assembly.accept_elements(&elements(head + 2, 1..2, keys)).unwrap();
            }
            assembly.accept_report(&report(head + 1..head + 3, 4..6)).unwrap();
            assembly.accept_report(&report(head + 2..head + 3, 0..4)).unwrap();
            assembly.accept_report(&report(head + 1..head + 2, 0..4)).unwrap();
            assembly.accept_heat(&heat(head + 1..head + 3, 1..3)).unwrap();
            assembly.accept_heat(&heat(head + 1..head + 3, 0..1)).unwrap();
        }
        let got = assembly.finish().unwrap();
        let of = |heads: &[usize], rows: usize, keys: Range<usize>, first: usize| -> Vec<f32> {
            let rows = (first..first + rows).flat_map(|row| keys.clone().map(move |key| (row, key)));
            heads.iter().flat_map(|head| rows.clone().map(|(row, key)| value(*head, row, key))).collect()
        };
        assert_eq!(got.heads, 1..3);
        assert_eq!(got.elements, [of(&[2, 6], 3, 200..530, 1)]);
        let weights = of(&[1, 2, 5, 6], 6, 0..2, 0);
        assert_eq!(got.top_keys, weights.iter().map(|weight| *weight as u32 % 600).collect::<Vec<_>>());
        assert_eq!(got.top_scores, weights.iter().map(|weight| -weight).collect::<Vec<_>>());
        assert_eq!(got.top_weights, weights);
        assert_eq!(got.heat, of(&[1, 2, 5, 6], 3, 0..2, 0));
        assert!(got.mass.is_empty() && got.entropy.is_empty());
    }

    #[test]
    fn what_comes_twice_or_is_not_wanted_is_refused() {
        let mut assembly = assembly();
        assembly.accept_elements(&elements(2, 1..3, 256..512)).unwrap();
        let text = |result: Result<(), Error>| result.unwrap_err().message();
        let twice = text(assembly.accept_elements(&elements(2, 2..4, 256..512)));
        assert_eq!(twice, "REPLY_INVALID: elements 0 of head 2 token 2 keys 256..512 came twice");
        assert!(text(assembly.accept_elements(&elements(1, 1..2, 256..512))).contains("not wanted"));
        assert!(text(assembly.accept_elements(&elements(2, 1..2, 260..512))).contains("no whole page"));
        assert!(text(assembly.accept_elements(&elements(2, 1..2, 512..520))).contains("no whole page"));
        assembly.accept_report(&report(1..3, 0..2)).unwrap();
        assert!(text(assembly.accept_report(&report(2..3, 1..3))).contains("came twice"));
        assert!(text(assembly.accept_report(&report(3..4, 0..1))).contains("not wanted"));
        assembly.accept_heat(&heat(5..7, 0..2)).unwrap();
        assert!(text(assembly.accept_heat(&heat(6..7, 1..2))).contains("came twice"));
        let missing = assembly.finish().unwrap_err().message();
        assert!(missing.ends_with("20 rows, 8 rows of maps, 16 runs of elements"), "{missing}");
    }
}
