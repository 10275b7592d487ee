//! Lists, tables and parameters of a call, cut to one element of its batch. What isn't of the call's shape is left as it is, for the
//! client to refuse.

use attnd_client::{AttendOptions, AttnShape, Documents};
use attnd_kernel::{Csr, Parameter, Score, Shift, Swin, Symbol, Tensor};

/// Whether some of its queries can't be asked alone: where lists, windows or parameters are about all of them.
pub fn is_about_all(options: &AttendOptions) -> bool {
    let has_queries = |tensor: &Tensor| {
        symbols(&options.score, tensor).is_some_and(|symbols| symbols.contains(&Symbol::Queries))
    };
    options.csr.is_some()
        || options.swin.is_some()
        || options.mask.documents.is_some()
        || options.score.parameters().iter().any(has_queries)
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

/// A score function with the parameters of the element.
pub fn score_of(whole: &Score, batch: usize, shape: &AttnShape) -> Score {
    let n = shape.batch();
    let cut = |tensor: &Tensor| {
        let is_of_each =
            symbols(whole, tensor).is_some_and(|symbols| symbols.first() == Some(&Symbol::Batch));
        match (part_of(&tensor.values, batch, n), &*tensor.shape) {
            (Some(own), [first, rest @ ..]) if is_of_each && *first == n => {
                Tensor { name: tensor.name.clone(), shape: [&[1], rest].concat(), values: own.into() }
            }
            _ => tensor.clone(),
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

/// Blocks of the heads of the element.
pub fn csr_of(whole: &Csr, batch: usize, shape: &AttnShape) -> Csr {
    let (n, heads) = (shape.batch(), shape.n_heads());
    if n == 1 || whole.layouts() != n * heads {
        return whole.clone();
    }
    let columns = |pointers: &[u32]| {
        let of_layouts = pointers.chunks_exact(whole.row_ptr().len() / whole.layouts());
        of_layouts.filter_map(|layout| layout.last()).map(|end| *end as usize).sum::<usize>()
    };
    let own = part_of(whole.row_ptr(), batch, n).and_then(|row_ptr| {
        let before = columns(whole.row_ptr().get(..batch * row_ptr.len())?);
        let columns = whole.columns().get(before..before + columns(row_ptr))?;
        let block = (whole.query_block(), whole.key_block());
        Csr::new(block, heads, row_ptr.into(), columns.into()).ok()
    });
    own.unwrap_or_else(|| whole.clone())
}

/// Documents of the element.
pub fn documents_of(whole: &Documents, batch: usize) -> Documents {
    let own = match (whole.queries().get(batch), whole.keys().get(batch)) {
        (Some(queries), Some(keys)) => {
            Documents::new(std::slice::from_ref(queries), std::slice::from_ref(keys)).ok()
        }
        _ => None,
    };
    own.unwrap_or_else(|| whole.clone())
}

#[cfg(test)]
mod tests {
    use attnd_client::{Dims, Run};

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
        let own = score_of(&beta, 1, &shape());
        let tensor = &own.parameters()[0];
        assert_eq!(
            (&tensor.shape[..], &tensor.values[..]),
            (&[1, 2, 3][..], &[6.0, 7.0, 8.0, 9.0, 10.0, 11.0][..])
        );
        for same in [&[2, 3][..], &[2], &[1], &[3, 2, 3]] {
            let beta = score("cosine", "beta", same);
            assert_eq!(score_of(&beta, 1, &shape()), beta, "{same:?}");
        }
        let of = |score| is_about_all(&AttendOptions { score, ..AttendOptions::default() });
        assert_eq!(
            [of(beta), of(score("cosine", "beta", &[2, 3])), of(score("cosine", "beta", &[2]))],
            [true, true, false]
        );
        assert!(!of(Score::default()) && !of(score("general", "w", &[1, 1])));
    }

    #[test]
    fn blocks_and_documents_are_those_of_the_element() {
        let row_ptr: [u32; 16] = [0, 1, 2, 3, 0, 0, 1, 1, 0, 2, 2, 4, 0, 1, 1, 1];
        let columns: [u32; 9] = [0, 1, 2, 3, 0, 1, 2, 3, 1];
        let csr = Csr::new((1, 1), 4, row_ptr.into(), columns.into()).unwrap();
        let own = csr_of(&csr, 1, &shape());
        assert_eq!((own.layouts(), own.row_ptr(), own.columns()), (2, &row_ptr[8..], &columns[4..]));
        assert_eq!(csr_of(&csr, 0, &shape()).columns(), &columns[..4]);
        let for_all = Csr::new((1, 1), 1, row_ptr[..4].into(), columns[..3].into()).unwrap();
        assert_eq!(csr_of(&for_all, 1, &shape()), for_all);

        let runs = |ids: [u32; 2]| vec![Run { end: 1, id: ids[0] }, Run { end: 4, id: ids[1] }];
        let documents = Documents::new(&[runs([0, 1]), runs([2, 3])], &[runs([4, 5]), runs([6, 7])]).unwrap();
        let own = documents_of(&documents, 1);
        assert_eq!((own.queries(), own.keys()), (&[runs([2, 3])][..], &[runs([6, 7])][..]));
        assert_eq!(documents_of(&own, 1), own);
    }

    #[test]
    fn windows_repeat_over_the_batch() {
        let shift = Some(Shift { regions: [0, 0, 1, 0, 2, 2].into(), between: -1.0 });
        let swin = Swin { height: 1, width: 2, table: [0.0; 3].into(), shift };
        let regions = |batch| swin_of(&swin, batch).shift.unwrap().regions.to_vec();
        assert_eq!([0, 1, 2, 3, 5].map(regions), [[0, 0], [1, 0], [2, 2], [0, 0], [2, 2]]);
    }
}
