//! Lists, tables and parameters of a call, cut to one element of its batch and to some of its queries. What isn't of the call's shape is
//! left as it is, for the client to refuse.

use std::collections::HashMap;
use std::ops::Range;

use attnd_client::{AttendOptions, AttnShape, Documents, Run};
use attnd_kernel::{Csr, Parameter, Score, Shift, Swin, Symbol, Tensor};

/// The queries that a call has to have so that it can have `queries` and these see what they saw: from the first of a block on, and with all
/// queries of their documents, from which positions are counted. All of them where windows are about all: what a window adds to scores is
/// said by the places of two tokens in it, and those of some rows can't be said so. Windows are small.
pub fn asked_around(
    options: &AttendOptions,
    batch: usize,
    shape: &AttnShape,
    queries: &Range<usize>,
) -> Range<usize> {
    let all = 0..shape.n_queries();
    let documents = options.mask.documents.as_deref().map(|documents| runs_of(documents.queries(), batch));
    let fits = |csr: &Csr| rows_of(csr) == shape.n_queries().div_ceil(csr.query_block());
    // Lists of another shape are told with the numbers of the whole call.
    if options.swin.is_some() || documents == Some(None) || !options.csr.as_ref().is_none_or(fits) {
        return all;
    }
    let block = options.csr.as_ref().map_or(1, Csr::query_block);
    let mut widening = Widening::new(documents.flatten().unwrap_or_default(), block, queries.clone());
    while widening.step() {}
    widening.asked
}

/// Queries to which those are added that they need, which may need others. Each run is looked at twice: for the queries that its document
/// has in all, and when it is reached.
struct Widening<'a> {
    runs: &'a [Run],
    /// From the first query of each document to its last one.
    whole: HashMap<u32, Range<usize>>,
    /// Queries of a block.
    block: usize,
    asked: Range<usize>,
    /// Runs whose documents are in it.
    taken: Range<usize>,
}

impl<'a> Widening<'a> {
    fn new(runs: &'a [Run], block: usize, asked: Range<usize>) -> Self {
        let mut whole: HashMap<u32, Range<usize>> = HashMap::new();
        for (range, id) in ranges(runs) {
            // Runs come in their order.
            whole.entry(id).and_modify(|all| all.end = range.end).or_insert(range);
        }
        let first = runs.partition_point(|run| run.end <= asked.start);
        Self { runs, whole, block, asked, taken: first..first }
    }

    /// Takes one run more, or goes back to where a block begins; false if nothing is left to be added.
    fn step(&mut self) -> bool {
        let end_of = |run: usize| self.runs.get(run).map_or(0, |run| run.end);
        let (first, next) = (self.taken.start, self.taken.end);
        if next < self.runs.len() && next.checked_sub(1).map_or(0, end_of) < self.asked.end {
            self.taken.end += 1;
            self.take(next);
        } else if let Some(before) = first.checked_sub(1).filter(|before| self.asked.start < end_of(*before))
        {
            self.taken.start = before;
            self.take(before);
        } else if !self.asked.start.is_multiple_of(self.block) {
            self.asked.start -= self.asked.start % self.block;
        } else {
            return false;
        }
        true
    }

    fn take(&mut self, run: usize) {
        if let Some(all) = self.runs.get(run).and_then(|run| self.whole.get(&run.id)) {
            self.asked = self.asked.start.min(all.start)..self.asked.end.max(all.end);
        }
    }
}

/// The runs of an element, of which lists have one for each, or one for all.
fn runs_of(all: &[Vec<Run>], batch: usize) -> Option<&[Run]> {
    all.get(if all.len() == 1 { 0 } else { batch }).map(Vec::as_slice)
}

/// The tokens of each run.
fn ranges(runs: &[Run]) -> impl Iterator<Item = (Range<usize>, u32)> {
    let mut before = 0;
    runs.iter().map(move |run| (std::mem::replace(&mut before, run.end)..run.end, run.id))
}

/// The runs of some queries, counted from the first of them.
fn runs_among(runs: &[Run], queries: &Range<usize>) -> Vec<Run> {
    let clipped = ranges(runs).filter_map(|(range, id)| {
        let (first, end) = (range.start.max(queries.start), range.end.min(queries.end));
        (first < end).then(|| Run { end: end - queries.start, id })
    });
    clipped.collect()
}

/// Rows of blocks of a layout.
fn rows_of(csr: &Csr) -> usize {
    csr.row_ptr().len() / csr.layouts() - 1
}

/// The dimensions of a parameter by their names, if it has as many as one of the shapes that it may have.
fn symbols<'a>(score: &'a Score, tensor: &Tensor) -> Option<&'a [Symbol]> {
    let parameter: &Parameter =
        score.function().parameters.iter().find(|parameter| parameter.name == tensor.name)?;
    parameter.shapes.iter().copied().find(|symbols| symbols.len() == tensor.shape.len())
}

/// Those of `n` equal parts of `all` that element `batch` has.
fn part_of<T>(all: &[T], batch: usize, n: usize) -> Option<&[T]> {
    let size = all.len() / n.max(1);
    all.get(batch.checked_mul(size)?..batch.checked_add(1)?.checked_mul(size)?)
}

/// A score function with the parameters of the element and of some of its queries.
pub fn score_of(whole: &Score, batch: usize, shape: &AttnShape, queries: &Range<usize>) -> Score {
    let n = shape.batch();
    let of_element = |tensor: &Tensor| {
        let is_of_each =
            symbols(whole, tensor).is_some_and(|symbols| symbols.first() == Some(&Symbol::Batch));
        match (part_of(&tensor.values, batch, n), &*tensor.shape) {
            (Some(own), [first, rest @ ..]) if is_of_each && *first == n => {
                Tensor { name: tensor.name.clone(), shape: [&[1], rest].concat(), values: own.into() }
            }
            _ => tensor.clone(),
        }
    };
    let cut = |tensor: &Tensor| {
        let tensor = of_element(tensor);
        let Some(symbols) = symbols(whole, &tensor) else { return tensor };
        match symbols.iter().position(|symbol| *symbol == Symbol::Queries) {
            Some(axis) if tensor.shape.get(axis) == Some(&shape.n_queries()) => {
                let row: usize = tensor.shape.iter().skip(axis + 1).product();
                let of_all = tensor.values.chunks((shape.n_queries() * row).max(1));
                let rows = of_all.filter_map(|rows| rows.get(queries.start * row..queries.end * row));
                let values = rows.collect::<Vec<_>>().concat().into();
                let mut sizes = tensor.shape;
                if let Some(size) = sizes.get_mut(axis) {
                    *size = queries.len();
                }
                Tensor { name: tensor.name, shape: sizes, values }
            }
            _ => tensor,
        }
    };
    let parameters = whole.parameters().iter().map(cut).collect();
    Score::new(whole.function().name, parameters).unwrap_or_else(|_unknown| whole.clone())
}

/// A table of windows with the regions of the one that the element is.
pub fn swin_of(whole: &Swin, batch: usize) -> Swin {
    let tokens = whole.height.saturating_mul(whole.width).max(1);
    let shift = whole.shift.as_ref().map(|Shift { regions, between }| {
        let windows = (regions.len() / tokens).max(1);
        let own = part_of(regions, batch % windows, windows);
        Shift { regions: own.map_or_else(|| regions.clone(), Into::into), between: *between }
    });
    Swin { shift, ..whole.clone() }
}

/// Blocks of the heads of the element, for some of its queries, which begin with a block ([`asked_around`]).
pub fn csr_of(whole: &Csr, batch: usize, shape: &AttnShape, queries: &Range<usize>) -> Csr {
    let (n, heads) = (shape.batch(), shape.n_heads());
    let layouts = if n == 1 || whole.layouts() != n * heads {
        0..whole.layouts()
    } else {
        batch * heads..(batch + 1) * heads
    };
    let rows = queries.start / whole.query_block()..queries.end.div_ceil(whole.query_block());
    cut_rows(whole, &layouts, &rows).unwrap_or_else(|| whole.clone())
}

/// Some rows of blocks of some layouts; `None` where there are no such.
fn cut_rows(whole: &Csr, layouts: &Range<usize>, rows: &Range<usize>) -> Option<Csr> {
    let (mut row_ptr, mut columns, mut first) = (Vec::new(), Vec::new(), 0);
    for (layout, pointers) in whole.row_ptr().chunks_exact(rows_of(whole) + 1).enumerate() {
        let of_layout = first..first + *pointers.last()? as usize;
        first = of_layout.end;
        if layouts.contains(&layout) {
            let pointers = pointers.get(rows.start..rows.end.checked_add(1)?)?;
            let (begin, end) = (*pointers.first()?, *pointers.last()?);
            row_ptr.extend(pointers.iter().map(|pointer| pointer - begin));
            columns.extend_from_slice(whole.columns().get(of_layout)?.get(begin as usize..end as usize)?);
        }
    }
    let block = (whole.query_block(), whole.key_block());
    Csr::new(block, layouts.len(), row_ptr.into(), columns.into()).ok()
}

/// Documents of the element, for some of its queries, which are those of whole documents ([`asked_around`]).
pub fn documents_of(whole: &Documents, batch: usize, queries: &Range<usize>) -> Documents {
    let own = match (runs_of(whole.queries(), batch), runs_of(whole.keys(), batch)) {
        (Some(of_queries), Some(keys)) => {
            Documents::new(&[runs_among(of_queries, queries)], &[keys.to_vec()]).ok()
        }
        _ => None,
    };
    own.unwrap_or_else(|| whole.clone())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use attnd_client::{Dims, Mask};

    use super::*;

    fn shape() -> AttnShape {
        let dims = Dims { batch: 2, heads: 2, kv_heads: 1, queries: 3, keys: 4, head_dim: 1, value_dim: 1 };
        AttnShape::new(dims).unwrap()
    }

    fn score(name: &str, parameter: &str, shape: &[usize]) -> Score {
        let values = (0..shape.iter().product::<usize>()).map(|n| n as f32).collect();
        Score::new(name, vec![Tensor { name: parameter.into(), shape: shape.into(), values }]).unwrap()
    }

    #[test]
    fn parameters_are_those_of_the_element() {
        let beta = score("cosine", "beta", &[2, 2, 3]);
        let own = score_of(&beta, 1, &shape(), &(0..3));
        let tensor = &own.parameters()[0];
        assert_eq!(
            (&tensor.shape[..], &tensor.values[..]),
            (&[1, 2, 3][..], &[6.0, 7.0, 8.0, 9.0, 10.0, 11.0][..])
        );
        for same in [&[2, 3][..], &[2], &[1], &[3, 2, 3]] {
            let beta = score("cosine", "beta", same);
            assert_eq!(score_of(&beta, 1, &shape(), &(0..3)), beta, "{same:?}");
        }
        let some = |score: &Score| {
            let own = score_of(score, 1, &shape(), &(1..3));
            (own.parameters()[0].shape.clone(), own.parameters()[0].values.to_vec())
        };
        assert_eq!(some(&beta), (vec![1, 2, 2], vec![7.0, 8.0, 10.0, 11.0]));
        assert_eq!(some(&score("cosine", "beta", &[2, 3])), (vec![2, 2], vec![1.0, 2.0, 4.0, 5.0]));
        assert_eq!(some(&score("cosine", "beta", &[2])), (vec![2], vec![0.0, 1.0]));
        assert_eq!(some(&score("general", "w", &[1, 1])), (vec![1, 1], vec![0.0]));
    }

    #[test]
    fn blocks_and_documents_are_those_of_the_element() {
        let row_ptr: [u32; 16] = [0, 1, 2, 3, 0, 0, 1, 1, 0, 2, 2, 4, 0, 1, 1, 1];
        let columns: [u32; 9] = [0, 1, 2, 3, 0, 1, 2, 3, 1];
        let csr = Csr::new((1, 1), 4, row_ptr.into(), columns.into()).unwrap();
        let own = csr_of(&csr, 1, &shape(), &(0..3));
        assert_eq!((own.layouts(), own.row_ptr(), own.columns()), (2, &row_ptr[8..], &columns[4..]));
        assert_eq!(csr_of(&csr, 0, &shape(), &(0..3)).columns(), &columns[..4]);
        let for_all = Csr::new((1, 1), 1, row_ptr[..4].into(), columns[..3].into()).unwrap();
        assert_eq!(csr_of(&for_all, 1, &shape(), &(0..3)), for_all);
        let own = csr_of(&csr, 1, &shape(), &(1..3));
        assert_eq!((own.layouts(), own.row_ptr(), own.columns()), (2, &[0, 0, 2, 0, 0, 0][..], &[2, 3][..]));
        // Too few rows for the queries.
        let short = Csr::new((1, 1), 1, [0, 1].into(), [0].into()).unwrap();
        assert_eq!(csr_of(&short, 1, &shape(), &(1..3)), short);

        let runs = |ids: [u32; 2]| vec![Run { end: 1, id: ids[0] }, Run { end: 4, id: ids[1] }];
        let documents = Documents::new(&[runs([0, 1]), runs([2, 3])], &[runs([4, 5]), runs([6, 7])]).unwrap();
        let own = documents_of(&documents, 1, &(0..4));
        assert_eq!((own.queries(), own.keys()), (&[runs([2, 3])][..], &[runs([6, 7])][..]));
        assert_eq!(documents_of(&own, 1, &(0..4)), own, "one for all of the batch");
        let some = documents_of(&documents, 1, &(1..4));
        assert_eq!((some.queries(), some.keys()), (&[vec![Run { end: 3, id: 3 }]][..], own.keys()));
    }

    #[test]
    fn calls_have_the_queries_of_whole_blocks_and_documents() {
        let dims = Dims { batch: 2, heads: 2, kv_heads: 1, queries: 12, keys: 4, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let csr = |rows: usize| Csr::new((5, 2), 1, vec![0; rows + 1].into(), [].into()).ok();
        let runs = |ids: &[(usize, u32)]| ids.iter().map(|(end, id)| Run { end: *end, id: *id }).collect();
        // The first element has documents 7 (0 to 3, 6 and 7), 8 (4 and 5) and 9; the second one another for each query.
        let of_queries: [Vec<Run>; 2] = [
            runs(&[(4, 7), (6, 8), (8, 7), (12, 9)]),
            (0..12).map(|query| Run { end: query + 1, id: query as u32 }).collect(),
        ];
        let of_keys = [runs(&[(4, 7)]), runs(&[(4, 7)])];
        let documents = || Documents::new(&of_queries, &of_keys).ok().map(Arc::new);
        let asked = |csr: Option<Csr>, documents: Option<Arc<Documents>>, batch, queries: Range<usize>| {
            let mask = Mask { documents, ..Mask::default() };
            let options = AttendOptions { csr, mask, ..AttendOptions::default() };
            asked_around(&options, batch, &shape, &queries)
        };
        assert_eq!(asked(None, None, 0, 3..4), 3..4);
        assert_eq!([asked(csr(3), None, 0, 3..6), asked(csr(3), None, 0, 11..12)], [0..6, 10..12]);
        assert_eq!(asked(csr(2), None, 0, 11..12), 0..12, "not of this shape");
        assert_eq!([asked(None, documents(), 0, 5..6), asked(None, documents(), 1, 5..6)], [4..6, 5..6]);
        assert_eq!([asked(None, documents(), 0, 7..8), asked(None, documents(), 0, 11..12)], [0..8, 8..12]);
        // From 8, where the document begins, to 5, where the block does, and to 0, where document 7 does.
        assert_eq!(
            [asked(csr(3), documents(), 0, 10..11), asked(csr(3), documents(), 1, 7..8)],
            [0..12, 5..8]
        );
        let swin = Swin { height: 2, width: 6, table: [0.0; 66].into(), shift: None };
        let options = AttendOptions { swin: Some(swin), ..AttendOptions::default() };
        assert_eq!(asked_around(&options, 0, &shape, &(3..4)), 0..12);
    }

    /// Documents that overlap like shingles need each other one after the other; each of their runs is taken once.
    #[test]
    fn queries_are_widened_in_as_many_steps_as_there_are_runs() {
        const RUNS: usize = 65_536;
        // 0, 1, 0, 2, 1, 3, 2, ..: every second run is of a new document, and each ends behind the next one's beginning.
        let id = |run: usize| if run.is_multiple_of(2) { (run / 2).saturating_sub(1) } else { run / 2 + 1 };
        let id = |run: usize| id(run).min(RUNS / 2 - 1) as u32;
        let runs: Vec<Run> = (0..RUNS).map(|run| Run { end: 3 * (run + 1), id: id(run) }).collect();
        for queries in [0..1, 3 * RUNS - 1..3 * RUNS, 3 * RUNS / 2..3 * RUNS / 2 + 1] {
            let mut widening = Widening::new(&runs, 64, queries.clone());
            let mut steps = 0;
            while widening.step() {
                steps += 1;
            }
            assert_eq!(widening.asked, 0..3 * RUNS, "{queries:?}");
            assert!(steps <= RUNS + 1, "{queries:?}: {steps} steps");
        }
        let mut alone = Widening::new(&runs[..1], 1, 1..2);
        assert_eq!((alone.step(), alone.step(), alone.asked), (true, false, 0..3));
    }

    #[test]
    fn windows_repeat_over_the_batch() {
        let shift = Some(Shift { regions: [0, 0, 1, 0, 2, 2].into(), between: -1.0 });
        let swin = Swin { height: 1, width: 2, table: [0.0; 3].into(), shift };
        let regions = |batch| swin_of(&swin, batch).shift.unwrap().regions.to_vec();
        assert_eq!([0, 1, 2, 3, 5].map(regions), [[0, 0], [1, 0], [2, 2], [0, 0], [2, 2]]);
    }
}
