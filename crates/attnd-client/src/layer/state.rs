//! The names that tensors of a layer have in files: of torch's `nn.MultiheadAttention`, of models in Hugging Face's manner, of Keras
//! and flax.
//!
//! Names are those behind the layer's own prefix. A name that isn't here is an error: what attnd doesn't know, a norm of queries say,
//! would be missing from the result.

use std::collections::BTreeMap;

use super::weights::{Learnt, Matrix, Weights, WeightsError};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct StateTensor {
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements, in C order.
    pub values: Vec<f32>,
}

/// How a matrix lies in its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axes {
    /// `[outputs, inputs]`.
    OutIn,
    /// `[inputs, outputs]`.
    InOut,
    /// `[inputs, heads, dim]`, heads and their dimension being the outputs.
    IntoHeads,
    /// `[heads, dim, outputs]`, heads and their dimension being the inputs.
    FromHeads,
}

/// A part, and how one family of files spells it.
pub(super) struct Spelling {
    part: &'static str,
    weight: &'static str,
    bias: &'static str,
    axes: Axes,
}

impl Spelling {
    /// `[outputs, inputs]`, with a bias unless its name is empty.
    pub(super) const fn linear(part: &'static str, weight: &'static str, bias: &'static str) -> Self {
        spelling(part, weight, bias, Axes::OutIn)
    }

    pub(super) const fn part(&self) -> &'static str {
        self.part
    }

    /// The name of the matrix.
    pub(super) const fn weight(&self) -> &'static str {
        self.weight
    }
}

const fn spelling(part: &'static str, weight: &'static str, bias: &'static str, axes: Axes) -> Spelling {
    Spelling { part, weight, bias, axes }
}

const PACKED: &str = "queries, keys and values in one";
const QUERY: &str = "queries";
const KEY: &str = "keys";
const VALUE: &str = "values";
const OUTPUT: &str = "the result";
const GATE: &str = "the gate";

/// What torch's `q_proj_weight`, `k_proj_weight` and `v_proj_weight` have their biases in.
const PACKED_BIAS: &str = "in_proj_bias";
const LEARNT: [&str; 2] = ["bias_k", "bias_v"];
/// Tables that models store beside their weights and can make again.
const IGNORED: [&str; 1] = ["rotary_emb.inv_freq"];

/// Slashes of names are points here.
static SPELLINGS: [Spelling; 30] = [
    // torch.nn.MultiheadAttention.
    spelling(PACKED, "in_proj_weight", PACKED_BIAS, Axes::OutIn),
    spelling(QUERY, "q_proj_weight", "", Axes::OutIn),
    spelling(KEY, "k_proj_weight", "", Axes::OutIn),
    spelling(VALUE, "v_proj_weight", "", Axes::OutIn),
    spelling(OUTPUT, "out_proj.weight", "out_proj.bias", Axes::OutIn),
    // Llama, Mistral, Qwen2, BART, CLIP; the last two have `out_proj`.
    spelling(QUERY, "q_proj.weight", "q_proj.bias", Axes::OutIn),
    spelling(KEY, "k_proj.weight", "k_proj.bias", Axes::OutIn),
    spelling(VALUE, "v_proj.weight", "v_proj.bias", Axes::OutIn),
    spelling(OUTPUT, "o_proj.weight", "o_proj.bias", Axes::OutIn),
    // Phi-3, ViT of timm, GPT-2 (whose matrices axes the other way).
    spelling(PACKED, "qkv_proj.weight", "qkv_proj.bias", Axes::OutIn),
    spelling(PACKED, "qkv.weight", "qkv.bias", Axes::OutIn),
    spelling(OUTPUT, "proj.weight", "proj.bias", Axes::OutIn),
    spelling(PACKED, "c_attn.weight", "c_attn.bias", Axes::InOut),
    spelling(OUTPUT, "c_proj.weight", "c_proj.bias", Axes::InOut),
    // BERT, by its module or by that of its self-attention; T5.
    spelling(QUERY, "self.query.weight", "self.query.bias", Axes::OutIn),
    spelling(KEY, "self.key.weight", "self.key.bias", Axes::OutIn),
    spelling(VALUE, "self.value.weight", "self.value.bias", Axes::OutIn),
    spelling(OUTPUT, "output.dense.weight", "output.dense.bias", Axes::OutIn),
    spelling(QUERY, "query.weight", "query.bias", Axes::OutIn),
    spelling(KEY, "key.weight", "key.bias", Axes::OutIn),
    spelling(VALUE, "value.weight", "value.bias", Axes::OutIn),
    spelling(OUTPUT, "out.weight", "out.bias", Axes::OutIn),
    // Keras' MultiHeadAttention and GroupedQueryAttention, and flax, which has another name for the last.
    spelling(QUERY, "query.kernel", "query.bias", Axes::IntoHeads),
    spelling(KEY, "key.kernel", "key.bias", Axes::IntoHeads),
    spelling(VALUE, "value.kernel", "value.bias", Axes::IntoHeads),
    spelling(OUTPUT, "attention_output.kernel", "attention_output.bias", Axes::FromHeads),
    spelling(OUTPUT, "out.kernel", "out.bias", Axes::FromHeads),
    spelling(GATE, "gate.kernel", "gate.bias", Axes::IntoHeads),
    spelling(GATE, "gate.weight", "gate.bias", Axes::OutIn),
    spelling(GATE, "gate_proj.weight", "gate_proj.bias", Axes::OutIn),
];

impl Weights {
    /// The matrices of a layer of `heads` query heads over `kv_heads`, of its tensors by their names behind the layer's prefix.
    ///
    /// # Errors
    /// [`WeightsError`]: it names the tensor that is missing, unknown or of another shape than one that fits.
    pub fn from_state(
        tensors: impl IntoIterator<Item = (String, StateTensor)>,
        heads: usize,
        kv_heads: usize,
    ) -> Result<Self, WeightsError> {
        let mut state = State::new(tensors, heads, kv_heads);
        let [query, key, value] = match state.packed()? {
            Some(parts) => parts,
            None => state.separate()?,
        };
        let weights = Self {
            query,
            key,
            value,
            output: state.matrix(OUTPUT, heads)?,
            gate: state.matrix(GATE, heads)?,
            learnt: state.learnt()?,
        };
        state.all_taken(&SPELLINGS, &LEARNT)?;
        weights.dims(heads, kv_heads)?;
        Ok(weights)
    }
}

/// A tensor and its name in the file.
struct Named {
    name: String,
    tensor: StateTensor,
}

impl Named {
    fn misshapen(&self, expected: impl Into<String>) -> WeightsError {
        let shape = self.tensor.shape.clone();
        WeightsError::Shape { name: self.name.clone(), shape, expected: expected.into() }
    }
}

/// The tensors that aren't taken yet.
pub(super) struct State {
    tensors: BTreeMap<String, Named>,
    heads: usize,
    kv_heads: usize,
}

impl State {
    pub(super) fn new(
        tensors: impl IntoIterator<Item = (String, StateTensor)>,
        heads: usize,
        kv_heads: usize,
    ) -> Self {
        let named =
            tensors.into_iter().map(|(name, tensor)| (name.replace('/', "."), Named { name, tensor }));
        let mut tensors: BTreeMap<String, Named> = named.collect();
        IGNORED.iter().for_each(|name| drop(tensors.remove(*name)));
        Self { tensors, heads, kv_heads }
    }

    /// # Errors
    /// [`WeightsError::Unknown`] if a tensor is left; `spellings` and `others` are all that would have been taken.
    pub(super) fn all_taken(
        self,
        spellings: &[Spelling],
        others: &[&'static str],
    ) -> Result<(), WeightsError> {
        let Some(Named { name, tensor }) = self.tensors.into_values().next() else { return Ok(()) };
        let names = spellings.iter().flat_map(|spelling| [spelling.weight, spelling.bias]);
        let mut known: Vec<&str> =
            names.chain(others.iter().copied()).filter(|name| !name.is_empty()).collect();
        known.sort_unstable();
        known.dedup();
        Err(WeightsError::Unknown { name, shape: tensor.shape, known })
    }

    /// A vector by its name, if the file has it.
    pub(super) fn vector(&mut self, name: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(vector) = self.tensors.remove(name) else { return Ok(None) };
        match vector.tensor.shape[..] {
            [elements] if elements == vector.tensor.values.len() => Ok(Some(vector.tensor.values)),
            _ => Err(vector.misshapen("[elements]")),
        }
    }

    /// The spelling of a part that the file has, if any. Where it has several, the others are left and end up as unknown.
    fn spelled(&self, part: &str) -> Option<&'static Spelling> {
        SPELLINGS.iter().find(|spelling| spelling.part == part && self.tensors.contains_key(spelling.weight))
    }

    /// The matrix of a part with `heads` heads, if the file has one.
    fn matrix(&mut self, part: &'static str, heads: usize) -> Result<Option<Matrix>, WeightsError> {
        self.spelled(part).map_or(Ok(None), |spelling| self.spelled_so(spelling, heads))
    }

    /// The matrix of a spelling, with `heads` heads where these are a dimension, if the file has it.
    pub(super) fn spelled_so(
        &mut self,
        Spelling { weight, bias, axes, .. }: &Spelling,
        heads: usize,
    ) -> Result<Option<Matrix>, WeightsError> {
        let Some(weight) = self.tensors.remove(*weight) else { return Ok(None) };
        let elements = weight.tensor.shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim));
        if elements != Some(weight.tensor.values.len()) || elements == Some(0) {
            return Err(
                weight.misshapen(format!("{} elements, which is what it has", weight.tensor.values.len()))
            );
        }
        let [outputs, inputs] = match (axes, &weight.tensor.shape[..]) {
            (Axes::OutIn, [outputs, inputs]) | (Axes::InOut, [inputs, outputs]) => [*outputs, *inputs],
            (Axes::IntoHeads, [inputs, there, dim]) if *there == heads => [there * dim, *inputs],
            (Axes::FromHeads, [there, dim, outputs]) if *there == heads => [*outputs, there * dim],
            (Axes::OutIn, _) => return Err(weight.misshapen("[outputs, inputs]")),
            (Axes::InOut, _) => return Err(weight.misshapen("[inputs, outputs]")),
            (Axes::IntoHeads, _) => {
                return Err(weight.misshapen(format!("[inputs, {heads}, dim], of {heads} heads")));
            }
            (Axes::FromHeads, _) => {
                return Err(weight.misshapen(format!("[{heads}, dim, outputs], of {heads} heads")));
            }
        };
        let bias = match self.tensors.remove(*bias) {
            Some(bias) if bias.tensor.values.len() != outputs => {
                return Err(bias.misshapen(format!("{outputs} elements, as {} has outputs", weight.name)));
            }
            bias => bias.map(|bias| bias.tensor.values),
        };
        let Named { name, tensor: StateTensor { values, .. } } = weight;
        let weight = match axes {
            Axes::OutIn => values,
            _ => transposed(&values, inputs, outputs),
        };
        Ok(Some(Matrix { name, outputs, inputs, weight, bias }))
    }

    /// Queries, keys and values, if they are in one tensor, one behind the other.
    fn packed(&mut self) -> Result<Option<[Matrix; 3]>, WeightsError> {
        let Some(all) = self.matrix(PACKED, self.heads)? else { return Ok(None) };
        let Matrix { name, outputs, inputs, weight, bias } = all;
        // Heads of queries, keys and values, all of one dimension.
        let counts = [self.heads, self.kv_heads, self.kv_heads];
        let heads: usize = counts.iter().sum();
        if heads == 0 || !outputs.is_multiple_of(heads) {
            let expected = format!("rows for {} + {} + {} heads", self.heads, self.kv_heads, self.kv_heads);
            return Err(WeightsError::Shape { name, shape: vec![outputs, inputs], expected });
        }
        let dim = outputs / heads;
        let mut first = 0;
        Ok(Some(counts.map(|count| {
            let rows = first..first + count * dim;
            first = rows.end;
            Matrix {
                name: format!("{name}[{}..{}]", rows.start, rows.end),
                outputs: rows.len(),
                inputs,
                weight: weight[rows.start * inputs..rows.end * inputs].to_vec(),
                bias: bias.as_ref().map(|bias| bias[rows].to_vec()),
            }
        })))
    }

    /// Queries, keys and values from tensors of their own, their biases perhaps in one.
    fn separate(&mut self) -> Result<[Matrix; 3], WeightsError> {
        let (heads, kv_heads) = (self.heads, self.kv_heads);
        let mut of = |part: &'static str, heads: usize| {
            let spellings =
                SPELLINGS.iter().filter(|spelling| spelling.part == part || spelling.part == PACKED);
            let looked_for = spellings.map(|spelling| spelling.weight).collect();
            self.matrix(part, heads)?.ok_or(WeightsError::Missing { part, looked_for })
        };
        let mut parts = [of(QUERY, heads)?, of(KEY, kv_heads)?, of(VALUE, kv_heads)?];
        if let Some(bias) = self.tensors.remove(PACKED_BIAS) {
            let outputs: usize = parts.iter().map(|part| part.outputs).sum();
            if bias.tensor.values.len() != outputs || parts.iter().any(|part| part.bias.is_some()) {
                return Err(bias.misshapen(format!("[{outputs}], and no other biases")));
            }
            let mut rest = &bias.tensor.values[..];
            for part in &mut parts {
                let (own, behind) = rest.split_at(part.outputs);
                (part.bias, rest) = (Some(own.to_vec()), behind);
            }
        }
        Ok(parts)
    }

    fn learnt(&mut self) -> Result<Option<Learnt>, WeightsError> {
        let [key, value] = LEARNT.map(|name| self.tensors.remove(name));
        match (key, value) {
            (Some(key), Some(value)) => {
                Ok(Some(Learnt { key: key.tensor.values, value: value.tensor.values }))
            }
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(WeightsError::Missing { part: "the learnt value", looked_for: vec!["bias_v"] })
            }
            (None, Some(_)) => {
                Err(WeightsError::Missing { part: "the learnt key", looked_for: vec!["bias_k"] })
            }
        }
    }
}

/// `[inputs, outputs]` as `[outputs, inputs]`.
fn transposed(values: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    (0..outputs).flat_map(|output| (0..inputs).map(move |input| values[input * outputs + output])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize]) -> StateTensor {
        let elements = shape.iter().product::<usize>();
        StateTensor { shape: shape.to_vec(), values: (0..elements).map(|i| i as f32).collect() }
    }

    fn read(heads: usize, kv_heads: usize, tensors: &[(&str, &[usize])]) -> Result<Weights, WeightsError> {
        let tensors = tensors.iter().map(|(name, shape)| ((*name).to_owned(), tensor(shape)));
        Weights::from_state(tensors, heads, kv_heads)
    }

    #[test]
    fn torch_packs_queries_keys_and_values_row_by_row() {
        let tensors: [(&str, &[usize]); 4] = [
            ("in_proj_weight", &[12, 4]),
            ("in_proj_bias", &[12]),
            ("out_proj.weight", &[4, 4]),
            ("out_proj.bias", &[4]),
        ];
        let weights = read(2, 2, &tensors).unwrap();
        assert_eq!((weights.key.outputs, weights.key.inputs, weights.key.weight[0]), (4, 4, 16.0));
        assert_eq!(weights.value.bias, Some(vec![8.0, 9.0, 10.0, 11.0]));
        let separate: [(&str, &[usize]); 4] = [
            ("q_proj_weight", &[4, 4]),
            ("k_proj_weight", &[4, 3]),
            ("v_proj_weight", &[4, 5]),
            ("in_proj_bias", &[12]),
        ];
        let weights = read(2, 2, &separate).unwrap();
        assert_eq!((weights.value.inputs, weights.value.bias), (5, Some(vec![8.0, 9.0, 10.0, 11.0])));
        assert_eq!(weights.output, None);
    }

    #[test]
    fn keras_has_heads_as_a_dimension_and_names_with_slashes() {
        let tensors: [(&str, &[usize]); 6] = [
            ("query/kernel", &[5, 2, 3]),
            ("query/bias", &[2, 3]),
            ("key/kernel", &[5, 1, 3]),
            ("value/kernel", &[5, 1, 4]),
            ("attention_output/kernel", &[2, 4, 7]),
            ("gate/kernel", &[5, 2, 4]),
        ];
        let weights = read(2, 1, &tensors).unwrap();
        // Output 4 (head 1, element 1) of input 2.
        assert_eq!((weights.query.outputs, weights.query.weight[4 * 5 + 2]), (6, (2 * 6 + 4) as f32));
        let output = weights.output.unwrap();
        assert_eq!((output.outputs, output.inputs, output.weight[3 * 8 + 5]), (7, 8, (5 * 7 + 3) as f32));
        assert_eq!(weights.gate.unwrap().outputs, 8);
    }

    #[test]
    fn grouped_queries_and_tables_of_frequencies_are_read() {
        let tensors: [(&str, &[usize]); 5] = [
            ("q_proj.weight", &[8, 6]),
            ("k_proj.weight", &[4, 6]),
            ("v_proj.weight", &[4, 6]),
            ("o_proj.weight", &[6, 8]),
            ("rotary_emb.inv_freq", &[1]),
        ];
        let weights = read(4, 2, &tensors).unwrap();
        assert_eq!((weights.query.outputs, weights.key.outputs), (8, 4));
        let packed = read(4, 2, &[("qkv_proj.weight", &[16, 6])]).unwrap();
        assert_eq!((packed.query.outputs, packed.value.weight[0]), (8, 12.0 * 6.0));
        let turned = read(1, 1, &[("c_attn.weight", &[2, 6])]).unwrap();
        assert_eq!(turned.key.weight, [2.0, 8.0, 3.0, 9.0]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_shape_and_what_would_be_right() {
        let llama: [(&str, &[usize]); 3] =
            [("q_proj.weight", &[8, 6]), ("k_proj.weight", &[4, 6]), ("v_proj.weight", &[4, 6])];
        let text =
            |extra: &[(&str, &[usize])]| read(4, 2, &[&llama[..], extra].concat()).unwrap_err().to_string();
        assert!(
            text(&[("q_norm.weight", &[2])]).starts_with("tensor q_norm.weight [2] is no part of a layer")
        );
        let output = text(&[("o_proj.weight", &[6, 9])]);
        assert_eq!(output, "tensor o_proj.weight is [6, 9], expected 8 inputs: 4 heads of 2");
        let bias = text(&[("k_proj.bias", &[5])]);
        assert_eq!(bias, "tensor k_proj.bias is [5], expected 4 elements, as k_proj.weight has outputs");
        let flat = text(&[("o_proj.weight", &[48])]);
        assert_eq!(flat, "tensor o_proj.weight is [48], expected [outputs, inputs]");
        let learnt = text(&[("bias_k", &[1, 1, 5]), ("bias_v", &[1, 1, 4])]);
        assert_eq!(learnt, "tensor bias_k is [5], expected 4 elements");
        assert!(text(&[("bias_k", &[1, 1, 4])]).contains("bias_v"));
        let keys = read(4, 4, &llama).unwrap_err().to_string();
        assert_eq!(keys, "tensor k_proj.weight is [4, 6], expected 8 outputs: 4 kv heads of 2");
        let packed = read(4, 2, &[("in_proj_weight", &[15, 6])]).unwrap_err().to_string();
        assert_eq!(packed, "tensor in_proj_weight is [15, 6], expected rows for 4 + 2 + 2 heads");
        let heads = read(3, 3, &[("query/kernel", &[5, 2, 3])]).unwrap_err().to_string();
        assert_eq!(heads, "tensor query/kernel is [5, 2, 3], expected [inputs, 3, dim], of 3 heads");
        let nothing = read(1, 1, &[("weight", &[2])]).unwrap_err().to_string();
        assert!(
            nothing.starts_with("no tensor for queries; looked for in_proj_weight, q_proj_weight,"),
            "{nothing}"
        );
    }
}
