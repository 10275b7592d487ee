//! A composition and its operands, drawn from a seed.

use std::fmt;
use std::num::NonZeroUsize;

use attnd_kernel::reference::problem::{Dense, Problem};
use attnd_kernel::slot::N_SLOTS;
use attnd_kernel::{
    AttnShape, Bias, Causal, Csr, Dims, Documents, EmptyRow, Mask, Normaliser, Operator, OperatorParts,
    PerBatch, Positions, Relative, Run, Selection, Shift, Swin, Window,
};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// An operator and operands of finite numbers.
#[derive(Clone)]
pub(super) struct Case {
    pub(super) shape: AttnShape,
    pub(super) parts: OperatorParts,
    /// Of [`Selection::Dense`].
    pub(super) mask: Option<Dense<bool>>,
    /// Of [`Bias::Dense`].
    pub(super) bias: Option<Dense<f32>>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
}

/// What a composition may hold.
pub(super) const NAMES: [&str; 23] = [
    "grouped heads",
    "another value dimension",
    "negative scale",
    "scale 0",
    "softcap",
    "causal",
    "offsets",
    "window",
    "chunk",
    "prefix",
    "key_begin",
    "key_end",
    "query_end",
    "documents",
    "scattered documents",
    "dense mask",
    "dense bias",
    "alibi",
    "relative",
    "swin",
    "csr",
    "sinks",
    "sigmoid",
];

/// Names that no operator has both of.
pub(super) fn exclude_each_other(one: &str, other: &str) -> bool {
    let are = |a: &str, b: &[&str]| one == a && b.contains(&other) || other == a && b.contains(&one);
    are("documents", &["offsets", "chunk", "prefix", "key_end", "query_end"])
        || are("scattered documents", &["offsets", "chunk", "prefix", "key_end", "query_end"])
        || are("sigmoid", &["sinks"])
        || are("scale 0", &["negative scale"])
}

fn one_in(rng: &mut SmallRng, n: u32) -> bool {
    rng.random_range(0..n) == 0
}

fn draw(rng: &mut SmallRng, n: usize, to: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-to..to)).collect()
}

/// Between 1 and `most`, small numbers as often as large ones.
fn size(rng: &mut SmallRng, most: usize) -> usize {
    let octaves = (most as f64).log2();
    (rng.random_range(0.0..=octaves).exp2().round() as usize).clamp(1, most)
}

/// Slots at which keys are cut.
pub(super) fn random_cuts(rng: &mut SmallRng) -> Vec<usize> {
    let mut cuts: Vec<usize> = (0..rng.random_range(1..5)).map(|_| rng.random_range(1..N_SLOTS)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

impl Case {
    pub(super) fn random(seed: u64) -> Self {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let batch = rng.random_range(1..=3);
        let kv_heads = rng.random_range(1..=2);
        let heads = kv_heads * rng.random_range(1..=3);
        let window = one_in(rng, 4).then(|| (rng.random_range(1..=4), rng.random_range(1..=6)));
        let (queries, keys) = match window {
            Some((height, width)) => (height * width, height * width),
            None => (size(rng, 24), size(rng, 600)),
        };
        let (d, dv) = (rng.random_range(1..=16), rng.random_range(1..=16));
        let dims = [batch, heads, kv_heads, queries, keys, d, dv].map(|n| n as u64);
        let [batch, heads, kv_heads, queries, keys, head_dim, value_dim] = dims;
        let shape =
            AttnShape::new(Dims { batch, heads, kv_heads, queries, keys, head_dim, value_dim }).unwrap();
        let scale = [1.0, 1.0, -1.0, 0.3, 0.0, 2.0][rng.random_range(0..6)] / (d as f32).sqrt();
        let mut case = Self {
            shape,
            parts: OperatorParts {
                mask: random_mask(rng, &shape),
                ..OperatorParts::plain(scale, Causal::None)
            },
            mask: None,
            bias: None,
            q: draw(rng, shape.q_elements() as usize, 2.5),
            k: draw(rng, shape.k_elements() as usize, 2.5),
            v: draw(rng, shape.v_elements() as usize, 2.5),
        };
        case.draw_parts(rng, window);
        case
    }

    /// Everything but the scale and the intervals.
    fn draw_parts(&mut self, rng: &mut SmallRng, window: Option<(usize, usize)>) {
        let (shape, parts) = (self.shape, &mut self.parts);
        let (heads, batch, keys) = (shape.n_heads(), shape.batch(), shape.n_keys());
        parts.softcap = one_in(rng, 3).then(|| [0.5, 5.0, 50.0][rng.random_range(0..3)]);
        if one_in(rng, 3) {
            parts.selection = Some(Selection::Dense);
            let sizes = dense_shape(rng, &shape);
            let mut elements = Vec::new();
            for _ in 0..sizes[..3].iter().product::<usize>() {
                let share = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
                elements.extend((0..sizes[3]).map(|_| rng.random_bool(share)));
            }
            self.mask = Some(Dense { shape: sizes, elements });
        }
        if one_in(rng, 4) {
            parts.biases.push(Bias::Dense);
            let sizes = dense_shape(rng, &shape);
            let element = |_| match rng.random_range(0..20_u32) {
                0 => f32::NEG_INFINITY,
                1 => f32::MIN,
                2 => -1e4,
                _ => rng.random_range(-3.0..3.0),
            };
            let elements = (0..sizes.iter().product()).map(element).collect();
            self.bias = Some(Dense { shape: sizes, elements });
        }
        if one_in(rng, 4) {
            let n = if rng.random() { heads } else { heads * batch };
            let slopes = (0..n).map(|_| rng.random_range(-0.05..0.5)).collect();
            parts.biases.push(Bias::Alibi { slopes, by_key: rng.random() });
        }
        if one_in(rng, 4) {
            let buckets = rng.random_range(4..40);
            let table = draw(rng, buckets * heads, 3.0).into();
            let relative = Relative::new(table, buckets, rng.random_range(20..200), rng.random());
            parts.biases.push(Bias::Relative(relative.unwrap()));
        }
        if let Some((height, width)) = window {
            let table = draw(rng, (2 * height - 1) * (2 * width - 1) * heads, 3.0).into();
            let windows = if rng.random() { 1 } else { batch };
            let shift = rng.random::<bool>().then(|| Shift {
                regions: (0..windows * keys).map(|_| rng.random_range(0..3)).collect(),
                between: [-100.0, -3.0][rng.random_range(0..2)],
            });
            parts.biases.push(Bias::Swin(Swin { height, width, table, shift }));
        }
        if one_in(rng, 4) {
            let layouts = [1, heads, heads * batch][rng.random_range(0..3)];
            parts.csr = Some(random_csr(rng, layouts, shape.n_queries(), keys));
        }
        if one_in(rng, 4) {
            parts.normaliser = Normaliser::Sigmoid { bias: rng.random_range(-4.0..1.0) };
        } else if one_in(rng, 3) {
            let sink = |_| if one_in(rng, 5) { f32::NEG_INFINITY } else { rng.random_range(-4.0..6.0) };
            parts.sinks = Some((0..heads).map(sink).collect());
        }
        if one_in(rng, 3) {
            let may_be_uniform = parts.normaliser == Normaliser::Softmax && rng.random();
            parts.empty_row = if may_be_uniform { EmptyRow::Uniform } else { EmptyRow::Nan };
        }
    }

    /// Whether the parts make an operator.
    pub(super) fn is_possible(&self) -> bool {
        Operator::new(self.parts.clone(), &self.shape).is_ok()
    }

    pub(super) fn operator(&self) -> Operator {
        Operator::new(self.parts.clone(), &self.shape).unwrap()
    }

    pub(super) fn problem(&self) -> Problem<'_> {
        Problem {
            shape: self.shape,
            parts: &self.parts,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            mask: self.mask.as_ref(),
            bias: self.bias.as_ref(),
        }
    }

    /// What it holds, of [`NAMES`].
    pub(super) fn names(&self) -> Vec<&'static str> {
        let (parts, mask, shape) = (&self.parts, &self.parts.mask, &self.shape);
        let has = |kind: fn(&Bias) -> bool| parts.biases.iter().any(kind);
        let is_scattered = mask.documents.as_ref().map(|documents| documents.is_scattered());
        let is_there = [
            shape.group_size() > 1,
            shape.value_dim() != shape.head_dim(),
            parts.scale < 0.0,
            parts.scale == 0.0,
            parts.softcap.is_some(),
            mask.causal,
            matches!(mask.positions, Some(Positions::Offset(_))),
            mask.window != Window::default(),
            mask.chunk.is_some(),
            mask.prefix.is_some(),
            mask.key_begin.is_some(),
            mask.key_end.is_some(),
            mask.query_end.is_some(),
            is_scattered.is_some(),
            is_scattered == Some(true),
            parts.selection.is_some(),
            has(|bias| matches!(bias, Bias::Dense)),
            has(|bias| matches!(bias, Bias::Alibi { .. })),
            has(|bias| matches!(bias, Bias::Relative(_))),
            has(|bias| matches!(bias, Bias::Swin(_))),
            parts.csr.is_some(),
            parts.sinks.is_some(),
            parts.normaliser != Normaliser::Softmax,
        ];
        NAMES.into_iter().zip(is_there).filter(|(_, is_there)| *is_there).map(|(name, _)| name).collect()
    }
}

/// Short enough to be read: sizes, and of each part what distinguishes it.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OperatorParts { scale, softcap, biases, mask, csr, normaliser, sinks, empty_row, .. } =
            &self.parts;
        write!(
            f,
            "{:?} scale {scale} softcap {softcap:?} {normaliser:?} sinks {sinks:?} {empty_row:?}",
            self.shape
        )?;
        write!(f, "\n{mask:?}")?;
        if let Some(mask) = &self.mask {
            write!(f, "\ndense mask {:?}", mask.shape)?;
        }
        for bias in biases {
            match bias {
                Bias::Dense => write!(f, "\ndense bias {:?}", self.bias.as_ref().map(|bias| bias.shape))?,
                Bias::Alibi { .. } => write!(f, "\n{bias:?}")?,
                Bias::Relative(relative) => {
                    let (buckets, distance) = (relative.buckets(), relative.max_distance());
                    let both = relative.bidirectional();
                    write!(f, "\nrelative: {buckets} buckets up to {distance}, bidirectional: {both}")?;
                }
                Bias::Swin(Swin { height, width, shift, .. }) => {
                    write!(f, "\nswin: {height} * {width}, shift {shift:?}")?;
                }
            }
        }
        if let Some(csr) = csr {
            let blocks = (csr.query_block(), csr.key_block());
            write!(
                f,
                "\ncsr: blocks {blocks:?}, {} layouts, {:?}, {:?}",
                csr.layouts(),
                csr.row_ptr(),
                csr.columns()
            )?;
        }
        Ok(())
    }
}

/// Broadcast along any of the first three, short along the last.
fn dense_shape(rng: &mut SmallRng, shape: &AttnShape) -> [usize; 4] {
    let mut of = |n: usize| if rng.random() { 1 } else { n };
    let first = [of(shape.batch()), of(shape.n_heads()), of(shape.n_queries())];
    let keys = shape.n_keys();
    let keys = if one_in(rng, 4) { rng.random_range(1..=keys) } else { keys };
    [first[0], first[1], first[2], keys]
}

/// Any rules that go together, for queries with positions.
fn random_mask(rng: &mut SmallRng, shape: &AttnShape) -> Mask {
    let (batch, queries, keys) = (shape.batch(), shape.n_queries(), shape.n_keys());
    let lengths = |rng: &mut SmallRng, from: usize, to: usize| match rng.random() {
        true => PerBatch::Same(rng.random_range(from..=to)),
        false => PerBatch::Each((0..batch).map(|_| rng.random_range(from..=to)).collect()),
    };
    let causal = !one_in(rng, 3);
    let documents = one_in(rng, 3).then(|| {
        let elements = if rng.random() { 1 } else { batch };
        let of = |rng: &mut SmallRng, tokens: usize, is_consecutive: bool| -> Vec<Vec<Run>> {
            (0..elements).map(|_| random_runs(rng, tokens, is_consecutive)).collect()
        };
        let is_consecutive = one_in(rng, 3);
        let of_queries = of(rng, queries, false);
        Documents::new(&of_queries, &of(rng, keys, is_consecutive)).unwrap().into()
    });
    let is_whole = documents.is_none();
    let most = keys as i64;
    let positions = match rng.random_range(0..3_u32) {
        0 => Positions::TopLeft,
        1 if is_whole => {
            let offsets = (0..batch).map(|_| rng.random_range(-most / 2 - 2..most + 2)).collect();
            Positions::Offset(PerBatch::Each(offsets))
        }
        _ => Positions::BottomRight,
    };
    let reach = |rng: &mut SmallRng| one_in(rng, 4).then(|| rng.random_range(0..=keys));
    Mask {
        causal,
        positions: Some(positions),
        window: Window { left: reach(rng), right: reach(rng) },
        chunk: (is_whole && one_in(rng, 5)).then(|| NonZeroUsize::new(rng.random_range(1..=keys)).unwrap()),
        prefix: (is_whole && causal && one_in(rng, 4)).then(|| lengths(rng, 0, keys)),
        key_begin: one_in(rng, 5).then(|| lengths(rng, 0, keys / 2)),
        key_end: (is_whole && one_in(rng, 4)).then(|| lengths(rng, keys / 2, keys)),
        query_end: (is_whole && one_in(rng, 5)).then(|| lengths(rng, 0, queries)),
        documents,
    }
}

/// Runs of some documents; those of one may come again unless they are to be consecutive.
fn random_runs(rng: &mut SmallRng, tokens: usize, is_consecutive: bool) -> Vec<Run> {
    let (mut runs, mut end) = (Vec::new(), 0);
    while end < tokens {
        end += rng.random_range(1..=tokens.div_ceil(2)).min(tokens - end);
        let id = if is_consecutive { runs.len() as u32 } else { rng.random_range(0..4) };
        runs.push(Run { end, id });
    }
    runs
}

/// Blocks of any size, from none of a row to all of it.
fn random_csr(rng: &mut SmallRng, layouts: usize, queries: usize, keys: usize) -> Csr {
    let mut block = || [1, 2, 3, 16, 64, 100, 300][rng.random_range(0..7)];
    let (query_block, key_block) = (block(), block());
    let (mut row_ptr, mut columns) = (Vec::new(), Vec::new());
    for _ in 0..layouts {
        let begin = columns.len();
        let row = |_| {
            let share = [0.0, 0.1, 0.5, 0.9, 1.0][rng.random_range(0..5)];
            columns.extend((0..keys.div_ceil(key_block) as u32).filter(|_| rng.random_bool(share)));
            (columns.len() - begin) as u32
        };
        row_ptr.extend([0].into_iter().chain((0..queries.div_ceil(query_block)).map(row)));
    }
    Csr::new((query_block, key_block), layouts, row_ptr.into(), columns.into()).unwrap()
}
