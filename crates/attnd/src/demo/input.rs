//! The demo's inputs: two layers of a real model, and a long synthetic sequence.

use anyhow::Context as _;
use attnd_client::Operands;
use attnd_kernel::reference::{ReferenceRow, reference_row};
use attnd_kernel::slot::{N_SLOTS, n_pages};
use attnd_kernel::{AttnShape, Causal, Dims, Dtype, widen};
use safetensors::SafeTensors;

/// Q, K, V, context and lse of layers 1 and 4 of a sentence encoder; origin and licence in `data/README.md`.
const MINILM: &[u8] = include_bytes!("../../data/minilm_layers.safetensors");

/// One call of the demo, with all that is needed to judge its answer.
#[derive(Debug)]
pub struct Case {
    /// Short name: `layer 1`.
    pub name: &'static str,
    /// One line for a person.
    pub description: String,
    /// What is sent.
    pub operands: Operands,
    /// The causal rule.
    pub causal: Causal,
    /// What another program computed, where there is such a thing.
    pub stored: Option<Stored>,
    /// The f64 reference: all rows of a layer, a sample of the long sequence.
    pub reference: Vec<ReferenceAt>,
}

impl Case {
    /// Parts that the call can be cut into, and so workers that can take part in it: a kv group times a slot with keys.
    pub fn cells(&self) -> usize {
        let shape = &self.operands.shape;
        shape.n_groups() * n_pages(shape.n_keys()).min(N_SLOTS)
    }
}

/// The context and lse that the model's own attention produced, in f32.
#[derive(Debug)]
pub struct Stored {
    /// `[heads, queries, value_dim]`.
    pub context: Vec<f32>,
    /// `[heads, queries]`, natural logarithm.
    pub lse: Vec<f32>,
}

/// The f64 reference of one row.
#[derive(Debug)]
pub struct ReferenceAt {
    /// Query head.
    pub head: usize,
    /// Query token.
    pub token: usize,
    /// What the row should be.
    pub row: ReferenceRow,
}

/// The tokens of the paragraph that the layers have read.
///
/// # Errors
/// If the bundled file is not what it was.
pub fn tokens() -> anyhow::Result<Vec<String>> {
    let (_, header) = SafeTensors::read_metadata(MINILM)?;
    let tokens = header.metadata().as_ref().and_then(|entries| entries.get("tokens"));
    Ok(serde_json::from_str(tokens.context("bundled data: no tokens")?)?)
}

/// Layers 1 and 4, each with the reference of every row.
///
/// # Errors
/// If the bundled file is not what it was.
pub fn layers() -> anyhow::Result<[Case; 2]> {
    let file = SafeTensors::deserialize(MINILM)?;
    Ok([layer(&file, "layer 1", "layer1")?, layer(&file, "layer 4", "layer4")?])
}

fn layer(file: &SafeTensors<'_>, name: &'static str, prefix: &str) -> anyhow::Result<Case> {
    let tensor = |part: &str| -> anyhow::Result<(Vec<usize>, Vec<f32>)> {
        let view = file.tensor(&format!("{prefix}.{part}")).context("bundled data")?;
        let mut values = vec![0.0; view.data().len() / Dtype::F32.size()];
        widen(view.data(), Dtype::F32, &mut values);
        Ok((view.shape().to_vec(), values))
    };
    let ((dims, q), (_, k), (_, v)) = (tensor("q")?, tensor("k")?, tensor("v")?);
    let [heads, tokens, dim] = dims[..] else { anyhow::bail!("bundled data: {prefix}.q has shape {dims:?}") };
    let shape = AttnShape::new(Dims {
        batch: 1,
        heads: heads as u64,
        kv_heads: heads as u64,
        queries: tokens as u64,
        keys: tokens as u64,
        head_dim: dim as u64,
        value_dim: dim as u64,
    })?;
    let rows = (0..heads).flat_map(|head| (0..tokens).map(move |token| (head, token)));
    Ok(Case {
        name,
        description: format!(
            "all-MiniLM-L6-v2 on a paragraph of prose: {heads} heads, {tokens} tokens, dim {dim}"
        ),
        causal: Causal::None,
        stored: Some(Stored { context: tensor("context")?.1, lse: tensor("lse")?.1 }),
        reference: reference(&shape, Causal::None, (&q, &k, &v), rows),
        operands: operands(shape, &q, &k, &v),
    })
}

/// The long sequence: 64 queries at the end of 32,768 keys, with the reference of a sample of rows.
///
/// # Errors
/// Never in practice: the shape is within the limits.
pub fn long() -> anyhow::Result<Case> {
    let dims =
        Dims { batch: 1, heads: 8, kv_heads: 2, queries: 64, keys: 32_768, head_dim: 128, value_dim: 128 };
    let shape = AttnShape::new(dims)?;
    let causal = Causal::BottomRight;
    // The gain makes scores of standard deviation 3: some keys matter much more than others, as in a trained model.
    let q = normal(1, 3.0, shape.q_elements());
    let k = normal(2, 1.0, shape.k_elements());
    let v = normal(3, 1.0, shape.v_elements());
    // Every head, the first query, the last one, and two between that differ from head to head.
    let rows =
        (0..shape.n_heads()).flat_map(|head| [0, 7 * head + 3, 60 - 5 * head, 63].map(|token| (head, token)));
    Ok(Case {
        name: "long",
        description: "synthetic: 8 heads on 2 kv heads, dim 128, the last 64 of 32,768 tokens, causal".into(),
        causal,
        stored: None,
        reference: reference(&shape, causal, (&q, &k, &v), rows),
        operands: operands(shape, &q, &k, &v),
    })
}

fn operands(shape: AttnShape, q: &[f32], k: &[f32], v: &[f32]) -> Operands {
    let bytes =
        |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into();
    Operands { shape, dtype: Dtype::F32, q: bytes(q), k: bytes(k), v: bytes(v) }
}

fn reference(
    shape: &AttnShape,
    causal: Causal,
    operands: (&[f32], &[f32], &[f32]),
    rows: impl Iterator<Item = (usize, usize)>,
) -> Vec<ReferenceAt> {
    // The f32 scale that a call without `--scale` uses, exactly.
    let scale = f64::from(1.0 / (shape.head_dim() as f32).sqrt());
    rows.map(|(head, token)| {
        let row = reference_row(shape, scale, causal, operands, head, token);
        ReferenceAt { head, token, row }
    })
    .collect()
}

/// Roughly normal values of standard deviation `gain`: sums of four uniform 16-bit numbers.
///
/// Integers from a generator of four lines, rather than a library's normal distribution, so that the digests which the
/// demo prints are the same on every machine and with every version of every dependency.
fn normal(seed: u64, gain: f32, n: u64) -> Vec<f32> {
    const DEVIATION: f32 = 37_837.227; // 65,536 / sqrt(12) * sqrt(4)
    let mut state = seed;
    (0..n)
        .map(|_| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = state;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bits ^= bits >> 31;
            let sum: i32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as i32).sum();
            (sum - 2 * 65_535) as f32 * (gain / DEVIATION)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_layers_agree_with_the_reference() {
        let tokens = tokens().unwrap();
        for case in layers().unwrap() {
            // Twelve heads over one page: a thirteenth worker has nothing to do.
            assert_eq!(case.cells(), 12);
            let stored = case.stored.unwrap();
            let (n, dv) = (tokens.len(), case.operands.shape.value_dim());
            assert_eq!(case.reference.len(), case.operands.shape.n_heads() * n);
            for ReferenceAt { head, token, row } in &case.reference {
                let at = head * n + token;
                let ratio = row.worst_ratio(&stored.context[at * dv..][..dv], stored.lse[at]);
                assert!(ratio <= 1.0, "{} head {head} token {token}: {ratio}", case.name);
            }
        }
    }

    #[test]
    fn synthetic_values_are_centred_scaled_and_fixed() {
        let values = normal(1, 2.0, 100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let variance = values.iter().map(|x| x * x).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 4.0).abs() < 0.05, "{mean} {variance}");
        assert_eq!(values[..4], normal(1, 2.0, 4)[..]);
        assert_ne!(values[..4], normal(2, 2.0, 4)[..]);
    }
}
