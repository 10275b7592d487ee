//! The matrices of multi-head latent attention, by the names that DeepSeek-V2's and V3's files have for them.

use attnd_kernel::shape::MAX_DIM;

use super::super::state::{Spelling, State, StateTensor};
use super::super::weights::{Matrix, WeightsError};

/// RMS norm of a row: `y_i = w_i x_i / sqrt(mean_j(x_j^2) + eps)` (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// What errors call it: the name of its tensor.
    pub name: String,
    /// `w`, one for each element of a row.
    pub weight: Vec<f32>,
    /// Finite and not below 0; DeepSeek's is 1e-6.
    pub eps: f64,
}

/// The matrices of a layer of multi-head latent attention (DeepSeek-V2, 2024, section 2.1 and appendix C).
///
/// In their shapes `rank` are the elements of a latent, `nope` and `rope` those of a head's query without and with rotary positions, and
/// `value` those of its value; the shapes tell them all.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentWeights {
    /// `W^DQ`, `[query rank, width]`, and the norm of what it makes; `None` where queries are made of rows directly.
    pub query_down: Option<(Matrix, Norm)>,
    /// `W^UQ` and `W^QR`, `[heads * (nope + rope), query rank or width]`; of each head first `nope`, then `rope`.
    pub query: Matrix,
    /// `W^DKV` and `W^KR`, `[rank + rope, width]`.
    pub latent: Matrix,
    /// The norm of the latent, `rank` elements; what has rotary positions isn't normalised.
    pub norm: Norm,
    /// `W^UK` and `W^UV`, `[heads * (nope + value), rank]`, of each head first `nope`, then `value`; without a bias, which can't be
    /// absorbed.
    pub up: Matrix,
    /// `W^O`, `[output width, heads * value]`.
    pub output: Matrix,
}

/// What the shapes of the matrices say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LatentDims {
    pub(super) heads: usize,
    /// Elements of a head's query that `W^UK` absorbs.
    pub(super) nope: usize,
    /// Elements of a head's query and of a key that may turn.
    pub(super) rope: usize,
    /// Elements of a latent.
    pub(super) rank: usize,
    /// Elements of a head's value.
    pub(super) value: usize,
}

const QUERY_DOWN: Spelling = Spelling::linear("compressed queries", "q_a_proj.weight", "q_a_proj.bias");
const QUERY_UP: Spelling = Spelling::linear("queries", "q_b_proj.weight", "q_b_proj.bias");
const QUERY: Spelling = Spelling::linear("queries", "q_proj.weight", "q_proj.bias");
const LATENT: Spelling = Spelling::linear("latents", "kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias");
const UP: Spelling = Spelling::linear("keys and values of latents", "kv_b_proj.weight", "");
const OUTPUT: Spelling = Spelling::linear("the result", "o_proj.weight", "o_proj.bias");
const QUERY_NORM: &str = "q_a_layernorm.weight";
const LATENT_NORM: &str = "kv_a_layernorm.weight";

impl LatentWeights {
    /// Whether a file's names, behind the layer's prefix, are those of latent attention: it has some that no other layer has.
    pub fn are_named<'a>(names: impl IntoIterator<Item = &'a str>) -> bool {
        let own = [LATENT.weight(), UP.weight(), LATENT_NORM];
        names.into_iter().any(|name| own.contains(&&*name.replace('/', ".")))
    }

    /// The matrices of a layer of `heads` heads, of its tensors by their names behind the layer's prefix; norms have this `eps`, which
    /// no file has.
    ///
    /// # Errors
    /// [`WeightsError`]: it names the tensor that is missing, unknown or of another shape than one that fits.
    pub fn from_state(
        tensors: impl IntoIterator<Item = (String, StateTensor)>,
        heads: usize,
        eps: f64,
    ) -> Result<Self, WeightsError> {
        let mut state = State::new(tensors, heads, heads);
        let query_down = match state.spelled_so(&QUERY_DOWN, heads)? {
            Some(down) => Some((down, norm(&mut state, "the norm of compressed queries", QUERY_NORM, eps)?)),
            None => None,
        };
        let query = if query_down.is_some() { &QUERY_UP } else { &QUERY };
        let mut matrix = |spelling: &Spelling| {
            let looked_for = vec![spelling.weight()];
            let missing = WeightsError::Missing { part: spelling.part(), looked_for };
            state.spelled_so(spelling, heads)?.ok_or(missing)
        };
        let (query, latent, up, output) = (matrix(query)?, matrix(&LATENT)?, matrix(&UP)?, matrix(&OUTPUT)?);
        let norm = norm(&mut state, "the norm of latents", LATENT_NORM, eps)?;
        let known = [QUERY_DOWN, QUERY_UP, QUERY, LATENT, UP, OUTPUT];
        state.all_taken(&known, &[QUERY_NORM, LATENT_NORM])?;
        let weights = Self { query_down, query, latent, norm, up, output };
        weights.dims(heads)?;
        Ok(weights)
    }

    /// The dimensions of a layer of these matrices.
    ///
    /// # Errors
    /// [`WeightsError::Heads`] for none, [`WeightsError::Shape`], [`WeightsError::NonFinite`], [`WeightsError::Eps`].
    pub(super) fn dims(&self, heads: usize) -> Result<LatentDims, WeightsError> {
        if heads == 0 {
            return Err(WeightsError::Heads { heads, kv_heads: heads });
        }
        for matrix in self.matrices() {
            matrix.check()?;
        }
        let Self { query_down, query, latent, norm, up, output } = self;
        let rank = norm.weight.len();
        norm.check()?;
        latent.expect(latent.outputs >= rank && rank > 0, || {
            format!("at least {rank} outputs, as {} has elements", norm.name)
        })?;
        latent.expect(latent.outputs <= MAX_DIM, || format!("at most {MAX_DIM} outputs, which keys have"))?;
        let rope = latent.outputs - rank;
        if let Some((down, norm)) = query_down {
            norm.check()?;
            down.expect(down.outputs == norm.weight.len(), || {
                format!("{} outputs, as {} has elements", norm.weight.len(), norm.name)
            })?;
            query.expect(query.inputs == down.outputs, || {
                format!("{} inputs, as {} has outputs", down.outputs, down.name)
            })?;
        }
        // What queries and keys have of a head begins where that of rotary positions ends.
        let of_head = query.outputs / heads;
        query.expect(query.outputs.is_multiple_of(heads) && of_head > rope, || {
            format!("outputs for {heads} heads of more than {rope}, which are the rotary ones")
        })?;
        let nope = of_head - rope;
        let of_head = up.outputs / heads;
        up.expect(up.inputs == rank && up.outputs.is_multiple_of(heads) && of_head > nope, || {
            format!("[outputs, {rank}], outputs for {heads} heads of more than {nope}, which are the keys'")
        })?;
        if up.bias.is_some() {
            let (name, shape) = (up.name.clone(), vec![up.outputs, up.inputs]);
            return Err(WeightsError::Shape { name, shape, expected: "no bias".into() });
        }
        if let Some((at, value)) = up.weight.iter().copied().enumerate().find(|(_, x)| !x.is_finite()) {
            return Err(WeightsError::NonFinite { name: up.name.clone(), at, value });
        }
        let value = of_head - nope;
        output.expect(output.inputs == heads * value, || {
            format!("{} inputs: {heads} heads of {value}", heads * value)
        })?;
        Ok(LatentDims { heads, nope, rope, rank, value })
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let down = self.query_down.as_ref().map(|(down, _)| down);
        down.into_iter().chain([&self.query, &self.latent, &self.up, &self.output])
    }
}

impl Norm {
    fn check(&self) -> Result<(), WeightsError> {
        if self.eps.is_finite() && self.eps >= 0.0 {
            return Ok(());
        }
        Err(WeightsError::Eps { name: self.name.clone(), eps: self.eps })
    }

    /// Normalises a row. Squares are added up in f64, in their order, so it has the same bits wherever it runs.
    pub(super) fn apply(&self, row: &mut [f32]) {
        let squares = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        let factor = 1.0 / (squares / row.len().max(1) as f64 + self.eps).sqrt();
        for (x, weight) in row.iter_mut().zip(&self.weight) {
            *x = (f64::from(*x) * factor) as f32 * weight;
        }
    }
}

fn norm(state: &mut State, part: &'static str, name: &'static str, eps: f64) -> Result<Norm, WeightsError> {
    let missing = WeightsError::Missing { part, looked_for: vec![name] };
    let weight = state.vector(name)?.ok_or(missing)?;
    Ok(Norm { name: name.into(), weight, eps })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 heads of 4 + 2 for queries and of 5 for values, over latents of 7.
    const STATE: [(&str, &[usize]); 8] = [
        ("q_a_proj.weight", &[9, 11]),
        ("q_a_layernorm.weight", &[9]),
        ("q_b_proj.weight", &[18, 9]),
        ("kv_a_proj_with_mqa.weight", &[9, 11]),
        ("kv_a_proj_with_mqa.bias", &[9]),
        ("kv_a_layernorm.weight", &[7]),
        ("kv_b_proj.weight", &[27, 7]),
        ("o_proj.weight", &[11, 15]),
    ];

    fn read(
        heads: usize,
        change: impl Fn(&str, &[usize]) -> Vec<usize>,
    ) -> Result<LatentWeights, WeightsError> {
        let tensors = STATE.iter().map(|(name, shape)| {
            let shape = change(name, shape);
            let values = vec![0.5; shape.iter().product()];
            ((*name).to_owned(), StateTensor { shape, values })
        });
        LatentWeights::from_state(tensors, heads, 1e-6)
    }

    #[test]
    fn shapes_tell_all_dimensions() {
        let weights = read(3, |_, shape| shape.to_vec()).unwrap();
        let dims = LatentDims { heads: 3, nope: 4, rope: 2, rank: 7, value: 5 };
        assert_eq!(weights.dims(3).unwrap(), dims);
        assert!(LatentWeights::are_named(STATE.iter().map(|(name, _)| *name)));
        for one in ["kv_a_proj_with_mqa.weight", "kv_b_proj/weight", "kv_a_layernorm.weight"] {
            assert!(LatentWeights::are_named(["q_proj.weight", one]), "{one}");
        }
        assert!(!LatentWeights::are_named(["q_proj.weight", "k_proj.weight", "o_proj.weight"]));
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_would() {
        let refused = |tensor: &str, shape: &[usize]| {
            let changed = read(3, |name, own| if name == tensor { shape.to_vec() } else { own.to_vec() });
            changed.unwrap_err().to_string()
        };
        for (tensor, shape, reason) in [
            (
                "kv_a_layernorm.weight",
                &[10][..],
                "expected at least 10 outputs, as kv_a_layernorm.weight has",
            ),
            ("kv_a_layernorm.weight", &[7, 1], "tensor kv_a_layernorm.weight is [7, 1], expected [elements]"),
            ("q_a_layernorm.weight", &[8], "tensor q_a_proj.weight is [9, 11], expected 8 outputs"),
            ("q_b_proj.weight", &[18, 8], "expected 9 inputs, as q_a_proj.weight has outputs"),
            ("q_b_proj.weight", &[6, 9], "outputs for 3 heads of more than 2, which are the rotary ones"),
            ("kv_b_proj.weight", &[12, 7], "outputs for 3 heads of more than 4, which are the keys'"),
            ("kv_b_proj.weight", &[27, 6], "tensor kv_b_proj.weight is [27, 6], expected [outputs, 7]"),
            ("o_proj.weight", &[11, 16], "expected 15 inputs: 3 heads of 5"),
            ("kv_a_proj_with_mqa.bias", &[8], "expected 9 elements"),
        ] {
            let text = refused(tensor, shape);
            assert!(text.contains(reason), "{tensor}: {text}");
        }
        assert_eq!(read(0, |_, shape| shape.to_vec()).unwrap_err().to_string(), "0 heads over 0 kv heads");
    }

    #[test]
    fn what_contexts_go_through_is_finite_and_keys_are_no_wider_than_kernels_take() {
        let mut weights = read(3, |_, shape| shape.to_vec()).unwrap();
        for value in [f32::NAN, f32::NEG_INFINITY] {
            weights.up.weight[30] = value;
            let text = weights.dims(3).unwrap_err().to_string();
            assert_eq!(text, format!("tensor kv_b_proj.weight has {value} at 30, expected finite numbers"));
        }
        let with_outputs = |outputs: usize| {
            read(3, |name, shape| match name {
                "kv_a_proj_with_mqa.weight" => vec![outputs, 11],
                "kv_a_proj_with_mqa.bias" => vec![outputs],
                "kv_a_layernorm.weight" => vec![outputs - 2],
                "kv_b_proj.weight" => vec![27, outputs - 2],
                _ => shape.to_vec(),
            })
        };
        assert_eq!(with_outputs(1024).unwrap().dims(3).unwrap().rank, 1022);
        let text = with_outputs(1025).unwrap_err().to_string();
        assert!(text.ends_with("[1025, 11], expected at most 1024 outputs, which keys have"), "{text}");
    }

    #[test]
    fn no_tensor_is_ignored_and_none_is_missing() {
        let of = |names: &[&str]| {
            let tensors = names.iter().map(|name| {
                let shape =
                    STATE.iter().find(|(known, _)| known == name).map_or(&[27][..], |(_, shape)| shape);
                let values = vec![0.5; shape.iter().product()];
                ((*name).to_owned(), StateTensor { shape: shape.to_vec(), values })
            });
            LatentWeights::from_state(tensors, 3, 1e-6).unwrap_err().to_string()
        };
        let all: Vec<&str> = STATE.iter().map(|(name, _)| *name).collect();
        for more in ["kv_b_proj.bias", "q_proj.weight", "kv_b_proj.weight_scale_inv"] {
            let text = of(&[&all[..], &[more]].concat());
            assert!(text.starts_with(&format!("tensor {more} [27] is no part of a layer")), "{text}");
            assert!(text.contains("kv_a_layernorm.weight, kv_a_proj_with_mqa.bias, "), "{text}");
        }
        for (at, part) in
            [(1, "the norm of compressed queries"), (2, "queries"), (6, "keys and values of latents")]
        {
            let mut names = all.clone();
            let name = names.remove(at);
            assert_eq!(of(&names), format!("no tensor for {part}; looked for {name}"));
        }
    }

    #[test]
    fn norms_have_an_eps_that_is_a_number() {
        let mut weights = read(3, |_, shape| shape.to_vec()).unwrap();
        for eps in [f64::NAN, -1e-6, f64::INFINITY] {
            weights.norm.eps = eps;
            let text = weights.dims(3).unwrap_err().to_string();
            assert!(text.starts_with("kv_a_layernorm.weight: eps "), "{text}");
        }
        let norm = Norm { name: "n".into(), weight: vec![2.0, 1.0], eps: 0.5 };
        let mut row = [3.0, 4.0];
        norm.apply(&mut row);
        // The mean square is 12.5.
        let wanted = [6.0, 4.0].map(|x| x / 13.0_f64.sqrt());
        assert!(row.iter().zip(wanted).all(|(got, want)| (f64::from(*got) - want).abs() < 3e-7), "{row:?}");
    }
}
