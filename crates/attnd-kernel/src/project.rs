//! Linear layers of rows by the kernels' own score tile: `y = x W^T + b`.
//!
//! A row of `W` is a key, a row of `x` a query: each output is one dot product, summed as rule 1 sums a score, so the results of
//! all ISAs, block sizes and numbers of threads have the same bits:
//!
//! ```text
//! s = fma(x_i, w_oi, s)     i ascending from +0          y_o = s + b_o
//! ```

use std::sync::Arc;

use rayon::prelude::*;

use crate::block::{BLOCK_ROWS, QueryLayout};
use crate::buffer::{Buffer, OutOfMemory};
use crate::dispatch::Kernels;
use crate::float_env::FloatEnvironment;
use crate::lanes::LANES;
use crate::pages::PANEL_KEYS;
use crate::slot::PAGE_KEYS;

/// A matrix and a bias, ready to be applied to rows. Cheap to clone, but for its bias.
#[derive(Clone, Debug)]
pub struct Linear {
    inputs: usize,
    outputs: usize,
    /// Panels of 64 outputs, `[panel][input][64]`; zeros behind the last output. Layers that differ in their biases share them.
    panels: Arc<Buffer>,
    /// `[outputs]`, or empty.
    bias: Vec<f32>,
}

impl Linear {
    /// A layer with `weight` of `[outputs, inputs]` and `bias` of `[outputs]`.
    ///
    /// # Errors
    /// If the system has no memory for another copy of the weight.
    ///
    /// # Panics
    /// If there are no inputs or outputs, or a slice has another length.
    pub fn new(
        weight: &[f32],
        [outputs, inputs]: [usize; 2],
        bias: Option<&[f32]>,
    ) -> Result<Self, OutOfMemory> {
        assert!(outputs > 0 && inputs > 0, "[{outputs}, {inputs}]");
        assert_eq!(weight.len(), outputs * inputs, "length of the weight");
        assert!(bias.is_none_or(|bias| bias.len() == outputs), "length of the bias");
        let mut panels = Buffer::zeroed(Self::words([outputs, inputs]))?;
        let kernels = Kernels::chosen();
        for (group, rows) in weight.chunks(LANES * inputs).enumerate() {
            let (panel, at) = (group * LANES / PANEL_KEYS, group * LANES % PANEL_KEYS);
            let panel = &mut panels[panel * PANEL_KEYS * inputs..][..PANEL_KEYS * inputs];
            if rows.len() == LANES * inputs {
                kernels.transpose_words(rows, inputs, panel, at);
            } else {
                for (i, row) in rows.chunks_exact(inputs).enumerate() {
                    for (to, weight) in panel[at + i..].iter_mut().step_by(PANEL_KEYS).zip(row) {
                        *to = *weight;
                    }
                }
            }
        }
        Ok(Self { inputs, outputs, panels: Arc::new(panels), bias: bias.unwrap_or_default().to_vec() })
    }

    /// The same matrix with another bias, `[outputs]`.
    ///
    /// # Panics
    /// If the bias has another length.
    pub(crate) fn with_bias(&self, bias: Vec<f32>) -> Self {
        assert_eq!(bias.len(), self.outputs, "length of the bias");
        Self { panels: Arc::clone(&self.panels), bias, ..*self }
    }

    /// f32s that a weight takes.
    pub(crate) fn words([outputs, inputs]: [usize; 2]) -> usize {
        outputs.next_multiple_of(PANEL_KEYS) * inputs
    }

    /// Memory that a weight of `[outputs, inputs]` and a bias take, in bytes.
    pub fn bytes_needed([outputs, inputs]: [usize; 2], has_bias: bool) -> u64 {
        let bias = if has_bias { outputs } else { 0 };
        (Self::words([outputs, inputs]) + bias) as u64 * size_of::<f32>() as u64
    }

    /// Elements of a row that goes in.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Elements of a row that comes out.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Applies the layer to rows `x`, `[rows, inputs]`, on the current rayon pool; `y` is `[rows, outputs]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn apply(&self, kernels: &Kernels, x: &[f32], y: &mut [f32]) {
        assert!(x.len().is_multiple_of(self.inputs), "{} elements in rows of {}", x.len(), self.inputs);
        assert_eq!(y.len(), x.len() / self.inputs * self.outputs, "length of the result");
        let blocks = x.par_chunks(BLOCK_ROWS * self.inputs).zip(y.par_chunks_mut(BLOCK_ROWS * self.outputs));
        if blocks.len() >= rayon::current_num_threads() {
            let memory = || vec![0.0; BLOCK_ROWS * PAGE_KEYS];
            blocks.for_each_init(memory, |s, (x, y)| {
                let (_standard, q) = (FloatEnvironment::standard(), self.pack(kernels, x));
                for page in 0..self.pages() {
                    self.page(kernels, &q, page, s);
                    self.place(page, s, y);
                }
            });
            return;
        }
        // Fewer rows than threads have to do with: the outputs are cut too.
        blocks.for_each(|(x, y)| {
            let (_standard, q) = (FloatEnvironment::standard(), self.pack(kernels, x));
            let of_page = |page: usize| {
                let _standard = FloatEnvironment::standard();
                let mut s = vec![0.0; q.len() / self.inputs * PAGE_KEYS];
                self.page(kernels, &q, page, &mut s);
                s
            };
            let pages: Vec<Vec<f32>> = (0..self.pages()).into_par_iter().map(of_page).collect();
            for (page, s) in pages.iter().enumerate() {
                self.place(page, s, y);
            }
        });
    }

    fn pages(&self) -> usize {
        self.outputs.div_ceil(PAGE_KEYS)
    }

    /// A block's rows as the tile reads them.
    fn pack(&self, kernels: &Kernels, x: &[f32]) -> Vec<f32> {
        let rows: Vec<&[f32]> = x.chunks_exact(self.inputs).collect();
        let layout = QueryLayout::general(rows.len(), self.inputs, kernels);
        let mut q = vec![0.0; layout.words()];
        kernels.pack_queries(layout, &rows, 1.0, &mut q);
        q
    }

    /// Sums of a page of outputs, `s[row * 256 + output]`.
    fn page(&self, kernels: &Kernels, q: &[f32], page: usize, s: &mut [f32]) {
        let outputs = PAGE_KEYS.min(self.outputs - page * PAGE_KEYS);
        let words = Self::words([outputs, self.inputs]);
        let panels = &self.panels[page * PAGE_KEYS * self.inputs..][..words];
        let (rows, d) = (q.len() / self.inputs, self.inputs);
        kernels.general().scores(q, rows, d, panels, 0..outputs.div_ceil(PANEL_KEYS), s);
    }

    /// Puts a page of outputs where they belong, with their biases.
    fn place(&self, page: usize, s: &[f32], y: &mut [f32]) {
        let first = page * PAGE_KEYS;
        for (y, s) in y.chunks_exact_mut(self.outputs).zip(s.chunks_exact(PAGE_KEYS)) {
            let y = &mut y[first..self.outputs.min(first + PAGE_KEYS)];
            if self.bias.is_empty() {
                y.copy_from_slice(&s[..y.len()]);
            } else {
                let sums = s.iter().zip(&self.bias[first..]);
                y.iter_mut().zip(sums).for_each(|(y, (s, bias))| *y = s + bias);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Every ISA, on one thread and on several, gives the bits of the sum as it is written above.
    #[test]
    fn outputs_are_sums_in_ascending_order() {
        let pools = [1, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
        for (seed, [rows, inputs, outputs]) in
            [[1, 1, 1], [3, 5, 17], [7, 64, 64], [100, 33, 65], [97, 20, 256], [2, 9, 700], [400, 6, 270]]
                .into_iter()
                .enumerate()
        {
            let mut rng = SmallRng::seed_from_u64(seed as u64);
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.7..1.7)).collect() };
            let (x, weight, bias) = (random(rows * inputs), random(outputs * inputs), random(outputs));
            for bias in [None, Some(&bias[..])] {
                let layer = Linear::new(&weight, [outputs, inputs], bias).unwrap();
                let output = |row: usize, output: usize| {
                    let products = x[row * inputs..][..inputs].iter().zip(&weight[output * inputs..]);
                    let sum = products.fold(0.0_f32, |sum, (x, w)| x.mul_add(*w, sum));
                    bias.map_or(sum, |bias| sum + bias[output])
                };
                let want: Vec<u32> =
                    (0..rows * outputs).map(|at| output(at / outputs, at % outputs).to_bits()).collect();
                for kernels in Kernels::available() {
                    for pool in &pools {
                        let mut y = vec![f32::NAN; rows * outputs];
                        pool.install(|| layer.apply(kernels, &x, &mut y));
                        let got: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                        assert_eq!(got, want, "{rows} rows, {inputs} to {outputs} on {}", kernels.isa());
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_comes_of_no_rows() {
        let layer = Linear::new(&[1.0, 2.0], [1, 2], None).unwrap();
        layer.apply(Kernels::chosen(), &[], &mut []);
        assert_eq!((layer.inputs(), layer.outputs()), (2, 1));
    }
}
