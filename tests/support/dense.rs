//! Dense masks and biases of seeded calls, and the planes that they become in this process.

use attnd_client::{DenseTensor, Element};
use attnd_kernel::reference::masks;
use attnd_kernel::reference::operator::At;
use attnd_kernel::slot::{N_SLOTS, PAGE_KEYS};
use attnd_kernel::{AttnShape, Bias, Csr, DensePlane, Documents, Dtype, Run, Selection, widen};
use attnd_plan::{SideLayout, SideTensor, Sides};
use attnd_wire::floats;
use bytes::Bytes;
use half::{bf16, f16};
use rand::RngExt;
use rand::rngs::SmallRng;

use super::cases::Case;

/// The call's dimensions, each of the first three 1 in half of the cases, and in half of them fewer keys.
pub(crate) fn random_shape(shape: &AttnShape, rng: &mut SmallRng) -> [usize; 4] {
    let mut or_one = |size: usize| if rng.random() { 1 } else { size };
    let [batch, heads, queries] = [shape.batch(), shape.n_heads(), shape.n_queries()].map(&mut or_one);
    let keys = if rng.random() { shape.n_keys() } else { rng.random_range(1..=shape.n_keys()) };
    [batch, heads, queries, keys]
}

/// A mask whose rows show from nothing to everything.
pub(crate) fn random_mask(shape: [usize; 4], rng: &mut SmallRng) -> DenseTensor {
    let [batch, heads, queries, keys] = shape;
    let mut bytes = Vec::new();
    for _row in 0..batch * heads * queries {
        let share = [0.0, 0.02, 0.5, 0.98, 1.0][rng.random_range(0..5)];
        bytes.extend((0..keys).map(|_| u8::from(rng.random_bool(share))));
    }
    DenseTensor { element: Element::Bool, shape, bytes: bytes.into() }
}

/// Numbers, of which some hide keys: -inf, or the lowest of the type.
pub(crate) fn random_bias(shape: [usize; 4], dtype: Dtype, rng: &mut SmallRng) -> DenseTensor {
    let n = shape.iter().product::<usize>();
    let mut value = || match rng.random_range(0..20_u32) {
        0 => f32::NEG_INFINITY,
        1 => lowest_of(dtype),
        2 => -1e4,
        _ => rng.random_range(-3.0..3.0_f32),
    };
    let bytes: Bytes = match dtype {
        Dtype::F32 => floats::into_bytes((0..n).map(|_| value()).collect()),
        Dtype::F16 => (0..n).flat_map(|_| f16::from_f32(value()).to_le_bytes()).collect::<Vec<u8>>().into(),
        Dtype::Bf16 => (0..n).flat_map(|_| bf16::from_f32(value()).to_le_bytes()).collect::<Vec<u8>>().into(),
    };
    DenseTensor { element: Element::Float(dtype), shape, bytes }
}

/// The lowest finite number of a bias's type.
pub(super) fn lowest(bias: &DenseTensor) -> f32 {
    let Element::Float(dtype) = bias.element else { panic!("no numbers: {}", bias.element) };
    lowest_of(dtype)
}

fn lowest_of(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::MIN,
        Dtype::F16 => f16::MIN.to_f32(),
        Dtype::Bf16 => bf16::MIN.to_f32(),
    }
}

/// The elements of a bias.
pub(super) fn numbers(tensor: &DenseTensor) -> Vec<f32> {
    let Element::Float(dtype) = tensor.element else { panic!("no numbers: {}", tensor.element) };
    let mut numbers = vec![0.0; tensor.bytes.len() / dtype.size()];
    widen(&tensor.bytes, dtype, &mut numbers);
    numbers
}

impl Case {
    /// The selection and the bias that its dense tensors make.
    pub(super) fn reads(&self) -> (Option<Selection>, Vec<Bias>) {
        (
            self.dense_mask.as_ref().map(|_| Selection::Dense),
            self.dense_bias.iter().map(|_| Bias::Dense).collect(),
        )
    }

    fn tensors(&self) -> impl Iterator<Item = (SideTensor, &DenseTensor)> {
        self.hiding().chain(self.previous.iter().map(|previous| (SideTensor::Previous, previous)))
    }

    /// Those that hide keys.
    fn hiding(&self) -> impl Iterator<Item = (SideTensor, &DenseTensor)> {
        let mask = self.dense_mask.iter().map(|mask| (SideTensor::Mask, mask));
        mask.chain(self.dense_bias.iter().map(|bias| (SideTensor::Bias, bias)))
    }

    /// The weights that the rows of one kv group had before, of each head or of all.
    pub(super) fn previous_of(&self, group: usize) -> Vec<Vec<f32>> {
        let Some(tensor) = &self.previous else { return Vec::new() };
        let ([batch, heads, rows, keys], shape) = (tensor.shape, self.shape());
        let along = |size: usize, at: usize| if size == 1 { 0 } else { at };
        let first_head = group % shape.n_kv_heads() * shape.group_size();
        let of_head = |head: usize| {
            let plane = along(batch, group / shape.n_kv_heads()) * heads + along(heads, first_head + head);
            numbers(tensor)[plane * rows * keys..][..rows * keys].to_vec()
        };
        (0..if heads == 1 { 1 } else { shape.group_size() }).map(of_head).collect()
    }

    /// What travels beside the operands.
    pub(crate) fn sides(&self) -> Sides {
        let layout = |(tensor, of): (SideTensor, &DenseTensor)| {
            SideLayout::dense(tensor, of.element, of.shape, self.shape()).expect("a tensor of the call")
        };
        Sides::new(self.tensors().map(layout).collect()).expect("one of each kind")
    }

    /// The bytes of each of [`Self::sides`].
    pub(crate) fn beside(&self) -> Vec<(SideTensor, Bytes)> {
        self.tensors().map(|(tensor, of)| (tensor, of.bytes.clone())).collect()
    }

    /// The planes of one kv group, all keys, of a mask and of a bias.
    pub(super) fn planes(&self, group: usize) -> [Vec<DensePlane>; 2] {
        let (shape, n_keys) = (self.shape(), self.shape().n_keys());
        let first_head = group % shape.n_kv_heads() * shape.group_size();
        let of_head = |tensor: &DenseTensor, head: usize| {
            let [batch, heads, rows, keys] = tensor.shape;
            let along = |size: usize, at: usize| if size == 1 { 0 } else { at };
            let plane = along(batch, group / shape.n_kv_heads()) * heads + along(heads, first_head + head);
            let all = 0..N_SLOTS;
            let mut here = match tensor.element {
                Element::Bool => DensePlane::mask(rows, n_keys, &all),
                Element::Float(_) => DensePlane::bias(rows, n_keys, &all),
            }
            .expect("memory for a plane");
            for row in 0..rows {
                for first in (0..keys).step_by(PAGE_KEYS) {
                    let start = ((plane * rows + row) * keys + first) * tensor.element.size();
                    let len = (keys - first).min(PAGE_KEYS) * tensor.element.size();
                    let bytes = &tensor.bytes[start..start + len];
                    match tensor.element {
                        Element::Bool => here.write_mask(row, first / PAGE_KEYS, bytes),
                        Element::Float(dtype) => {
                            here.write_bias(row, first / PAGE_KEYS, bytes, dtype).expect("numbers to add");
                        }
                    }
                }
            }
            here
        };
        let of_group = |tensor: &Option<DenseTensor>| -> Vec<DensePlane> {
            let heads = |tensor: &DenseTensor| if tensor.shape[1] == 1 { 1 } else { shape.group_size() };
            let planes = |tensor| (0..heads(tensor)).map(|head| of_head(tensor, head)).collect();
            tensor.as_ref().map_or_else(Vec::new, planes)
        };
        [of_group(&self.dense_mask), of_group(&self.dense_bias)]
    }

    /// Whether dense tensors, blocks and documents let a query see a key: said of one element.
    pub(super) fn shows(&self, at: At) -> bool {
        let At { batch, head, token, key } = at;
        let is_listed = |csr: &Csr| {
            let (blocks, lists) = ((csr.query_block(), csr.key_block()), (csr.row_ptr(), csr.columns()));
            masks::csr(blocks, csr.layouts(), lists, self.shape().n_heads())(at)
        };
        let is_of_document = |documents: &Documents| {
            let id = |batches: &[Vec<Run>], token: usize| {
                let runs = &batches[batch % batches.len()];
                runs.iter().find(|run| token < run.end).map(|run| run.id)
            };
            id(documents.queries(), token) == id(documents.keys(), key)
        };
        let shown = self.csr.as_ref().is_none_or(is_listed)
            && self.mask.documents.as_deref().is_none_or(is_of_document);
        shown
            && self.hiding().all(|(_, DenseTensor { element, shape, bytes })| {
                let along = |size: usize, at: usize| if size == 1 { 0 } else { at };
                let row = (along(shape[0], batch) * shape[1] + along(shape[1], head)) * shape[2];
                if key >= shape[3] {
                    return false;
                }
                let at = ((row + along(shape[2], token)) * shape[3] + key) * element.size();
                match element {
                    Element::Bool => bytes[at] == 1,
                    Element::Float(dtype) => {
                        let mut value = [0.0];
                        widen(&bytes[at..at + element.size()], *dtype, &mut value);
                        value[0] > lowest_of(*dtype)
                    }
                }
            })
    }
}
