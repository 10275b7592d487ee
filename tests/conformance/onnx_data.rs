//! The Attention node tests of an onnx release, as `onnx_cases.py` wrote them down.

use std::collections::BTreeMap;
use std::path::Path;

use attnd_kernel::{Dtype, widen};
use safetensors::SafeTensors;
use serde_json::Value;

/// The release whose cases are stored here.
const RELEASE: &str = "1.22.0";

/// One case with one set of inputs.
pub(super) struct Case {
    /// As onnx names it, and whose inputs these are.
    pub(super) name: String,
    pub(super) attributes: Attributes,
    /// A result is right where `|got - want| <= atol + rtol |want|`.
    pub(super) rtol: f64,
    pub(super) atol: f64,
    /// Inputs and outputs by the operator's own names.
    tensors: BTreeMap<String, Tensor>,
}

/// The operator's attributes, with its defaults where they are not set.
#[derive(Debug)]
pub(super) struct Attributes {
    pub(super) is_causal: bool,
    /// `None`: by the dimension of keys.
    pub(super) scale: Option<f64>,
    /// `None`: no cap.
    pub(super) softcap: Option<f64>,
    /// 0 to 3: raw, capped, masked, weights.
    pub(super) qk_matmul_output_mode: usize,
    /// Heads of queries and of keys, where tensors don't have a dimension for them.
    pub(super) num_heads: Option<(usize, usize)>,
}

/// An input or output.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) elements: Elements,
}

/// The elements of a tensor.
#[derive(Debug)]
pub(super) enum Elements {
    /// Widened exactly, with the type that they had.
    Floats(Vec<f32>, Dtype),
    Bools(Vec<bool>),
    Integers(Vec<i64>),
}

impl Case {
    /// A tensor that the operator can't do without.
    pub(super) fn required(&self, name: &str) -> &Tensor {
        self.tensor(name).unwrap_or_else(|| panic!("{}: {name} is missing", self.name))
    }

    /// The worst error over its tolerance: at most 1 is right. NaN is right nowhere.
    pub(super) fn worst_ratio(&self, got: &[f64], wanted: &[f32]) -> f64 {
        assert_eq!(got.len(), wanted.len(), "{}", self.name);
        let ratio = |(got, wanted): (&f64, &f32)| {
            let wanted = f64::from(*wanted);
            let ratio = (got - wanted).abs() / (self.atol + self.rtol * wanted.abs());
            match ratio {
                _equal if *got == wanted => 0.0,
                ratio if ratio.is_nan() => f64::INFINITY,
                ratio => ratio,
            }
        };
        got.iter().zip(wanted).map(ratio).fold(0.0, f64::max)
    }

    /// A tensor that may be absent.
    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }
}

impl Tensor {
    pub(super) fn floats(&self) -> &[f32] {
        match &self.elements {
            Elements::Floats(values, _) => values,
            other => panic!("no floats: {other:?}"),
        }
    }
}

impl Attributes {
    /// Reads them; one that is not known here could change what is computed, and is refused.
    fn read(listed: &Value) -> Self {
        let mut attributes =
            Self { is_causal: false, scale: None, softcap: None, qk_matmul_output_mode: 0, num_heads: None };
        let (mut q_num_heads, mut kv_num_heads) = (None, None);
        for (name, value) in listed.as_object().expect("attributes") {
            let integer = || value.as_u64().and_then(|n| usize::try_from(n).ok()).expect(name);
            let float = || value.as_f64().expect(name);
            match name.as_str() {
                "is_causal" => attributes.is_causal = integer() == 1,
                "scale" => attributes.scale = Some(float()),
                "softcap" => attributes.softcap = Some(float()).filter(|cap| *cap > 0.0),
                "qk_matmul_output_mode" => attributes.qk_matmul_output_mode = integer(),
                "q_num_heads" => q_num_heads = Some(integer()),
                "kv_num_heads" => kv_num_heads = Some(integer()),
                _ => panic!("attribute {name} is new"),
            }
        }
        attributes.num_heads = q_num_heads.zip(kv_num_heads);
        attributes
    }
}

/// Every case, with the inputs that the release holds and with those that were drawn again.
pub(super) fn cases() -> Vec<Case> {
    let file = |extension: &str| {
        let name = format!("conformance/onnx-{RELEASE}.{extension}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let listing: Value = serde_json::from_slice(&file("json")).expect("JSON");
    assert_eq!(listing["onnx"], RELEASE);
    let file = file("safetensors");
    let stored = SafeTensors::deserialize(&file).expect("a safetensors file");
    let listed = listing["cases"].as_array().expect("a list of cases");
    listed.iter().flat_map(|case| ["frozen", "redrawn"].map(|data| read(case, data, &stored))).collect()
}

fn read(listed: &Value, data: &str, stored: &SafeTensors<'_>) -> Case {
    let name = format!("{}.{data}", listed["name"].as_str().expect("a name"));
    let slots = ["inputs", "outputs"].map(|side| listed[side].as_array().expect("a list of names"));
    let tensors = slots.into_iter().flatten().map(|slot| {
        let slot = slot.as_str().expect("a name");
        (slot.to_owned(), tensor(stored, &format!("{name}.{slot}")))
    });
    let tolerance = |which: &str| listed[which].as_f64().expect(which);
    Case {
        tensors: tensors.collect(),
        attributes: Attributes::read(&listed["attributes"]),
        rtol: tolerance("rtol"),
        atol: tolerance("atol"),
        name,
    }
}

fn tensor(stored: &SafeTensors<'_>, name: &str) -> Tensor {
    let view = stored.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let floats = |dtype: Dtype| {
        let mut values = vec![0.0; view.data().len() / dtype.size()];
        widen(view.data(), dtype, &mut values);
        Elements::Floats(values, dtype)
    };
    let elements = match view.dtype() {
        safetensors::Dtype::F32 => floats(Dtype::F32),
        safetensors::Dtype::F16 => floats(Dtype::F16),
        safetensors::Dtype::BF16 => floats(Dtype::Bf16),
        safetensors::Dtype::BOOL => Elements::Bools(view.data().iter().map(|byte| *byte != 0).collect()),
        safetensors::Dtype::I64 => {
            Elements::Integers(view.data().as_chunks().0.iter().map(|raw| i64::from_le_bytes(*raw)).collect())
        }
        other => panic!("{name} has elements of {other:?}"),
    };
    Tensor { shape: view.shape().to_vec(), elements }
}
