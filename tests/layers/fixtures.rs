//! Layers as torch, Keras and transformers computed them: files that `tests/fixtures/torch_layers.py`, `keras_layers.py` and
//! `latent_layers.py` wrote.

use std::path::Path;

use attnd_client::layer::{Rope, RopeStyle, Rows, StateTensor};
use safetensors::SafeTensors;
use serde_json::Value;

use super::formula::{Affine, Formula};

/// One case of a file.
pub(super) struct Fixture {
    pub(super) name: String,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) zero: bool,
    /// Whose first query sees the keys to its position.
    pub(super) causal: bool,
    /// Of the first query.
    pub(super) position: usize,
    /// Rotary positions, where the layer has them.
    pub(super) rope: Option<Rope>,
    /// Keys before the padding.
    pub(super) lengths: Option<Vec<usize>>,
    pub(super) per_head: bool,
    pub(super) state: Vec<(String, StateTensor)>,
    /// Of queries, keys and values; clones where the layer had the same tensor.
    pub(super) rows: [Rows; 3],
    pub(super) output: Vec<f32>,
    pub(super) weights: Vec<f32>,
}

impl Fixture {
    /// All cases of a file beside its script.
    pub(super) fn all(file: &str) -> Vec<Self> {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(file).with_extension("safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a header");
        let texts = header.metadata().as_ref().expect("metadata");
        let contents: Value = serde_json::from_str(&texts["contents"]).expect("contents are JSON");
        let cases = contents["cases"].as_array().expect("cases");
        cases.iter().enumerate().map(|(at, case)| Self::read(format!("{at:02}"), case, &tensors)).collect()
    }

    fn read(name: String, case: &Value, tensors: &SafeTensors<'_>) -> Self {
        let tensor = |what: &str| {
            let tensor = tensors.tensor(&format!("{name}.{what}")).ok()?;
            Some(StateTensor {
                shape: tensor.shape().to_vec(),
                values: attnd_wire::floats::from_bytes(tensor.data()),
            })
        };
        let rows = |what: &str| {
            let StateTensor { shape, values } = tensor(what)?;
            Some(Rows::new(values, shape.try_into().expect("three dimensions")).expect("rows"))
        };
        let query = rows("query").expect("a query");
        let key = rows("key").unwrap_or_else(|| query.clone());
        let value = rows("value").unwrap_or_else(|| key.clone());
        let state = format!("{name}.state.");
        let names = tensors.names().into_iter().filter_map(|full| Some((full, full.strip_prefix(&state)?)));
        let state = names.map(|(full, own)| {
            let what = full.split_once('.').expect("a case and a name").1;
            (own.to_owned(), tensor(what).expect("it is there"))
        });
        let state = state.collect();
        let size = |what: &str| case[what].as_u64().map(|n| usize::try_from(n).expect("small"));
        let heads = size("heads").expect("heads");
        let lengths = case["lengths"].as_array().map(|lengths| {
            lengths.iter().map(|n| usize::try_from(n.as_u64().expect("a length")).expect("small")).collect()
        });
        Self {
            heads,
            kv_heads: size("kv_heads").unwrap_or(heads),
            zero: case["zero"].as_bool().unwrap_or(false),
            causal: case["causal"].as_bool().expect("causal"),
            position: size("position").unwrap_or(0),
            rope: case["rope"].as_str().map(|pairs| {
                let style = match pairs {
                    "interleaved" => RopeStyle::Interleaved,
                    "half-split" => RopeStyle::HalfSplit,
                    other => panic!("pairs {other}"),
                };
                Rope::new(style, case["base"].as_f64().expect("a base"))
            }),
            lengths,
            per_head: case["per_head"].as_bool().unwrap_or(true),
            state,
            rows: [query, key, value],
            output: tensor("output").expect("an output").values,
            weights: tensor("weights").expect("weights").values,
            name,
        }
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&StateTensor> {
        self.state.iter().find(|(own, _)| own == name).map(|(_, tensor)| tensor)
    }

    fn formula(&self, [query, key, value, output]: [Affine; 4], gate: Option<Affine>) -> Formula {
        let (causal, lengths) = (self.causal, self.lengths.clone());
        let learnt = self.tensor("bias_k").zip(self.tensor("bias_v"));
        Formula {
            heads: self.heads,
            kv_heads: self.kv_heads,
            query,
            key,
            value,
            output,
            gate,
            learnt: learnt.map(|(key, value)| (key.values.clone(), value.values.clone())),
            has_zero: self.zero,
            rope: None,
            query_position: 0,
            visible: Box::new(move |batch, query, key| {
                (!causal || key <= query) && lengths.as_ref().is_none_or(|lengths| key < lengths[batch])
            }),
        }
    }

    /// The formula of torch's layer: `x W^T + b`, three projections in one matrix or apart.
    pub(super) fn torch_formula(&self) -> Formula {
        let width = self.rows[0].width();
        let part = |at: usize, separate: &str| {
            let bias = self.tensor("in_proj_bias").map(|bias| bias.values[at * width..][..width].to_vec());
            match self.tensor("in_proj_weight") {
                Some(all) => {
                    Affine::new(all.values[at * width * width..][..width * width].to_vec(), width, bias)
                }
                None => {
                    let own = self.tensor(separate).unwrap_or_else(|| panic!("{}: {separate}", self.name));
                    Affine::new(own.values.clone(), own.shape[1], bias)
                }
            }
        };
        let output = self.tensor("out_proj.weight").expect("an output projection");
        let bias = self.tensor("out_proj.bias").map(|bias| bias.values.clone());
        let output = Affine::new(output.values.clone(), width, bias);
        self.formula(
            [part(0, "q_proj_weight"), part(1, "k_proj_weight"), part(2, "v_proj_weight"), output],
            None,
        )
    }

    /// The formula of Keras' layers: `x W + b`, whose outputs, or inputs for the last, are heads by elements.
    pub(super) fn keras_formula(&self) -> Formula {
        let part = |name: &str| {
            let kernel = self.tensor(&format!("{name}/kernel"))?;
            let inputs =
                if name == "attention_output" { kernel.shape[0] * kernel.shape[1] } else { kernel.shape[0] };
            let outputs = kernel.values.len() / inputs;
            let at = |index: usize| kernel.values[index % inputs * outputs + index / inputs];
            let bias = self.tensor(&format!("{name}/bias")).map(|bias| bias.values.clone());
            Some(Affine::new((0..kernel.values.len()).map(at).collect(), inputs, bias))
        };
        let required = |name: &str| part(name).unwrap_or_else(|| panic!("{}: {name}", self.name));
        self.formula(["query", "key", "value", "attention_output"].map(required), part("gate"))
    }
}
