//! What a call told beside its context, as arrays with names.

use attnd_client::{AttnShape, Inspected, OutputsParts, Stage};

use crate::tensor_file::{Array, Elements};

/// The arrays of what `parts` asked for. They have a batch dimension where `batched`.
pub fn arrays<'a>(
    inspected: &'a Inspected,
    parts: &OutputsParts,
    shape: &AttnShape,
    batched: bool,
) -> Vec<Array<'a>> {
    let dims = |rest: &[usize]| {
        let batch = batched.then_some(shape.batch());
        batch.into_iter().chain(rest.iter().copied()).collect::<Vec<_>>()
    };
    let (heads, queries) = (inspected.heads.len(), shape.n_queries());
    let of_rows = |width: usize| dims(&[heads, queries, width]);
    let mut arrays = Vec::new();
    let mut add = |name: &str, shape, elements| arrays.push(Array { name: name.into(), shape, elements });
    if parts.top_k > 0 {
        add("top_keys", of_rows(parts.top_k), Elements::Keys(&inspected.top_keys));
        add("top_weights", of_rows(parts.top_k), Elements::F32(&inspected.top_weights));
        add("top_scores", of_rows(parts.top_k), Elements::F32(&inspected.top_scores));
    }
    if let Some(block) = parts.mass_block {
        add("mass", of_rows(shape.n_keys().div_ceil(block.get())), Elements::F32(&inspected.mass));
    }
    let numbers = [
        (parts.entropy, "entropy", &inspected.entropy),
        (parts.distance, "distance", &inspected.distance),
        (parts.max_score, "max_score", &inspected.max_score),
    ];
    for (_, name, values) in numbers.into_iter().filter(|(is_wanted, ..)| *is_wanted) {
        add(name, dims(&[heads, queries]), Elements::F32(values));
    }
    if let Some((rows, columns)) = parts.heatmap {
        add("heat", dims(&[heads, rows, columns]), Elements::F32(&inspected.heat));
    }
    let stages = parts.stages.iter().map(|stage| (stage_name(*stage).to_owned(), of_rows(shape.n_keys())));
    let rectangles = parts.rectangles.iter().enumerate().map(|(i, rectangle)| {
        let sides = [rectangle.heads.len(), rectangle.tokens.len(), rectangle.keys.len()];
        (format!("rectangle.{i}"), dims(&sides))
    });
    for ((name, shape), values) in stages.chain(rectangles).zip(&inspected.elements) {
        add(&name, shape, Elements::F32(values));
    }
    arrays
}

fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Raw => "raw",
        Stage::Capped => "capped",
        Stage::Masked => "masked",
        Stage::Weights => "weights",
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::{Dims, Rectangle};

    use super::*;

    #[test]
    fn each_array_has_as_many_elements_as_its_shape() {
        let dims = Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 7, head_dim: 1, value_dim: 1 };
        let shape = AttnShape::new(dims).unwrap();
        let parts = OutputsParts {
            stages: vec![Stage::Masked],
            rectangles: vec![Rectangle { stage: Stage::Weights, heads: 1..2, tokens: 0..2, keys: 3..7 }],
            top_k: 2,
            mass_block: std::num::NonZeroUsize::new(3),
            entropy: true,
            max_score: true,
            heatmap: Some((2, 5)),
            heads: Some(1..4),
            ..OutputsParts::default()
        };
        let rows = 2 * 3 * 3;
        let inspected = Inspected {
            heads: 1..4,
            elements: vec![vec![0.0; rows * 7], vec![0.0; 2 * 2 * 4]],
            top_keys: vec![0; rows * 2],
            top_weights: vec![0.0; rows * 2],
            top_scores: vec![0.0; rows * 2],
            mass: vec![0.0; rows * 3],
            entropy: vec![0.0; rows],
            distance: Vec::new(),
            max_score: vec![0.0; rows],
            heat: vec![0.0; 2 * 3 * 2 * 5],
        };
        let arrays = arrays(&inspected, &parts, &shape, true);
        let names: Vec<&str> = arrays.iter().map(|array| array.name.as_str()).collect();
        let expected = "top_keys top_weights top_scores mass entropy max_score heat masked rectangle.0";
        assert_eq!(names.join(" "), expected);
        for Array { name, shape, elements } in &arrays {
            let held = match elements {
                Elements::F32(values) => values.len(),
                Elements::Keys(keys) => keys.len(),
            };
            assert_eq!(shape.iter().product::<usize>(), held, "{name}");
            assert_eq!(shape[0], 2, "{name}");
        }
        let single = super::arrays(&inspected, &parts, &shape, false);
        assert_eq!((&single[0].shape[..], &single[8].shape[..]), (&[3, 3, 2][..], &[1, 2, 4][..]));
    }
}
