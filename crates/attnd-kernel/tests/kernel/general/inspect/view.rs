//! A request looked at: how it is cut, and what comes back, put together.

use std::ops::Range;

use attnd_kernel::slot::{N_SLOTS, Node, cover, keys_in_slots};
use attnd_kernel::{
    FinishedReport, Heat, Kernels, NodeReport, Outputs, OutputsParts, PartialRows, RowSums, inspect_node,
};

use super::super::request::Request;

/// Everything of a request that is wanted.
#[derive(Debug, PartialEq)]
pub(super) struct View {
    pub(super) report: NodeReport,
    /// Of each rectangle `[heads, tokens, keys]`.
    pub(super) elements: Vec<Vec<u32>>,
}

impl View {
    pub(super) fn element(&self, rectangle: usize, at: usize) -> f32 {
        f32::from_bits(self.elements[rectangle][at])
    }
}

pub(super) fn outputs(request: &Request, parts: &OutputsParts) -> Outputs {
    Outputs::new(parts.clone(), &request.case.shape, &request.operator()).unwrap()
}

/// What the first pass tells the second.
pub(super) fn sums(request: &Request, kernels: &Kernels) -> PartialRows {
    let partial = request.partial(kernels, &(0..N_SLOTS), Node::ROOT, 0..request.n_queries());
    request.operator().join_sinks(partial, 0, &request.case.shape, kernels)
}

pub(super) fn finish(request: &Request, wanted: &Outputs, sums: &PartialRows, view: &View) -> FinishedReport {
    view.report.finish(RowSums { m: &sums.m, l: &sums.l }, wanted, &request.operator())
}

/// Elements as they come, each of which must come once.
struct Elements<'a> {
    wanted: &'a Outputs,
    elements: Vec<Vec<Option<u32>>>,
    count: u64,
}

impl<'a> Elements<'a> {
    fn new(wanted: &'a Outputs) -> Self {
        let sizes = wanted.rectangles().iter().map(|r| r.heads.len() * r.tokens.len() * r.keys.len());
        Self { wanted, elements: sizes.map(|n| vec![None; n]).collect(), count: 0 }
    }

    fn take(&mut self, tile: &attnd_kernel::ElementTile<'_>) {
        let rectangle = &self.wanted.rectangles()[tile.rectangle];
        assert_eq!(tile.values.len(), tile.tokens.len() * tile.keys.len());
        assert_eq!(tile.keys.start / 256, (tile.keys.end - 1) / 256, "keys of one page");
        self.count += tile.values.len() as u64;
        for (token, values) in tile.tokens.clone().zip(tile.values.chunks(tile.keys.len())) {
            for (key, value) in tile.keys.clone().zip(values) {
                let row = (tile.head_in_group - rectangle.heads.start) * rectangle.tokens.len() + token
                    - rectangle.tokens.start;
                let at = row * rectangle.keys.len() + key - rectangle.keys.start;
                let before = self.elements[tile.rectangle][at].replace(value.to_bits());
                assert_eq!(before, None, "{rectangle:?} has [{token}, {key}] twice");
            }
        }
    }
}

/// How a request is computed.
pub(super) struct Cut<'a> {
    /// Part `i` of the slots is computed by `kernels[i % len]`.
    pub(super) kernels: &'a [&'a Kernels],
    /// Where the slots are cut.
    pub(super) slots: &'a [usize],
    /// Where the tokens are cut.
    pub(super) tokens: &'a [usize],
    /// Whether reports join from the last to the first.
    pub(super) backwards: bool,
}

fn pieces(cuts: &[usize], end: usize) -> Vec<Range<usize>> {
    [&[0], cuts, &[end]]
        .concat()
        .windows(2)
        .map(|edge| edge[0]..edge[1])
        .filter(|piece| !piece.is_empty())
        .collect()
}

/// Looks at a request, cut in any way.
pub(super) fn look(request: &Request, wanted: &Outputs, sums: &PartialRows, cut: &Cut<'_>) -> View {
    let (n_queries, n_keys, group) = (request.n_queries(), request.n_keys(), request.group());
    let mut elements = Elements::new(wanted);
    let token_pieces = pieces(cut.tokens, n_queries);
    let mut of_tokens: Vec<Vec<NodeReport>> = token_pieces.iter().map(|_| Vec::new()).collect();
    for (i, slots) in pieces(cut.slots, N_SLOTS).into_iter().enumerate() {
        let kernels = cut.kernels[i % cut.kernels.len()];
        request.with_call(&slots, |call| {
            for node in
                cover(slots.clone()).into_iter().filter(|node| keys_in_slots(node.slots(), n_keys) > 0)
            {
                for (tokens, reports) in token_pieces.iter().zip(&mut of_tokens) {
                    let of_rows = |sums: &[f32]| -> Vec<f32> {
                        sums.chunks(n_queries).flat_map(|row| row[tokens.clone()].to_vec()).collect()
                    };
                    let (m, l) = (of_rows(&sums.m), of_rows(&sums.l));
                    assert_eq!(m.len(), group * tokens.len());
                    let before = elements.count;
                    let report = inspect_node(
                        kernels,
                        call,
                        RowSums { m: &m, l: &l },
                        wanted,
                        node,
                        tokens.clone(),
                        &mut |tile| elements.take(&tile),
                    );
                    assert_eq!(elements.count - before, wanted.elements_of(0, node, tokens));
                    assert_eq!(report.check(wanted, 0, tokens), Ok(()));
                    reports.push(report);
                }
            }
        });
    }
    let reports = of_tokens.into_iter().map(|mut reports| {
        if cut.backwards {
            reports.reverse();
        }
        reports.into_iter().reduce(|mut left, right| {
            left.merge(&right);
            left
        })
    });
    let report = concatenate(wanted, n_queries, reports.map(|report| report.expect("some key")).collect());
    let elements = elements.elements.into_iter();
    let elements =
        elements.map(|elements| elements.into_iter().map(|bits| bits.expect("each")).collect()).collect();
    View { report, elements }
}

/// The reports of ranges of tokens as that of all of them.
fn concatenate(wanted: &Outputs, n_queries: usize, reports: Vec<NodeReport>) -> NodeReport {
    let mut whole = NodeReport::empty(wanted, 0, 0..n_queries);
    let heads = whole.heads.clone();
    for part in &reports {
        for head in 0..heads.len() {
            let rows = |n_tokens: usize, first: usize| {
                head * n_tokens + first..head * n_tokens + first + part.tokens.len()
            };
            let (to, from) = (rows(n_queries, part.tokens.start), rows(part.tokens.len(), 0));
            copy(&mut whole.top, &part.top, &to, &from, wanted.parts().top_k);
            copy(&mut whole.mass, &part.mass, &to, &from, wanted.mass_blocks());
            copy(&mut whole.entropy, &part.entropy, &to, &from, part.entropy.len().min(1));
            copy(&mut whole.distance, &part.distance, &to, &from, part.distance.len().min(1));
            copy(&mut whole.max_score, &part.max_score, &to, &from, part.max_score.len().min(1));
        }
    }
    let mut heat = Heat::empty(wanted, 0, &(0..n_queries));
    reports.iter().for_each(|part| heat.merge(&part.heat));
    whole.heat = heat;
    whole.overflow =
        reports.iter().filter_map(|part| part.overflow).min_by_key(|row| (row.token, row.head_in_group));
    whole
}

fn copy<T: Copy>(to: &mut [T], from: &[T], to_rows: &Range<usize>, from_rows: &Range<usize>, width: usize) {
    let of = |rows: &Range<usize>| rows.start * width..rows.end * width;
    to[of(to_rows)].copy_from_slice(&from[of(from_rows)]);
}

/// Looks at a request on one machine.
pub(super) fn look_whole(request: &Request, wanted: &Outputs, sums: &PartialRows, kernels: &Kernels) -> View {
    look(request, wanted, sums, &Cut { kernels: &[kernels], slots: &[], tokens: &[], backwards: false })
}
