//! The numbers in Q, K and V: NaN, infinities, what overflows, what underflows, rows that see nothing.

use attnd_kernel::Dtype;
use attnd_wire::proto;
use tonic::Code;

use super::call::{Draft, dims, encode};
use super::scene::{Refusal, Scene};

/// Heads 4, kv heads 2, queries 6, keys 300 (two pages), head dim 8, value dim 6.
const SHAPE: [u32; 6] = [4, 2, 6, 300, 8, 6];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// Values that depend on the place alone, in [-0.5, 0.5], exact in every dtype.
fn mild(tensor: usize, element: usize) -> f32 {
    ((element * 37 + tensor * 11) % 65) as f32 / 64.0 - 0.5
}

/// Where an element is: tensor, head over the batch, token, dim.
type Place = (usize, usize, usize, usize);

impl Draft {
    fn set(&mut self, (tensor, head, token, dim): Place, value: f32) {
        let shape = self.begin.shape.unwrap();
        let (tokens, dims) = match tensor {
            0 => (shape.queries, shape.head_dim),
            1 => (shape.keys, shape.head_dim),
            _ => (shape.keys, shape.value_dim),
        };
        let bytes = encode(value, self.dtype());
        let element = (head * tokens as usize + token) * dims as usize + dim;
        self.tensors[tensor][element * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// Rows 40 and 41.
#[tokio::test]
async fn values_that_are_not_finite() {
    let mut scene = Scene::open().await;
    let places: [Place; 8] = [
        (0, 0, 0, 0),
        (0, 3, 5, 7),
        (1, 0, 0, 0),
        (1, 1, 17, 5),
        (1, 0, 256, 0),
        (1, 1, 299, 7),
        (2, 0, 3, 1),
        (2, 1, 299, 5),
    ];
    let values =
        [(f32::NAN, "NaN"), (f32::INFINITY, "+inf"), (f32::NEG_INFINITY, "-inf"), (-f32::NAN, "NaN")];
    for (of_dtype, dtype) in DTYPES.into_iter().enumerate() {
        for (at, place) in places.into_iter().enumerate() {
            let (tensor, head, token, dim) = place;
            let (value, shown) = values[(at + of_dtype) % values.len()];
            let mut draft = Draft::of_values(dims(SHAPE), dtype, mild).on_workers(1 + at as u32 % 2);
            draft.set(place, value);
            // Rows and pages are cut by message boundaries.
            draft.chunk_bytes = 1000;
            let name = ["q", "k", "v"][tensor];
            let text = format!("NON_FINITE: {name}[h={head},pos={token},i={dim}] {shown}");
            scene.refuses(&format!("{dtype}: {text}"), draft.frames(), &Refusal::invalid(text.clone())).await;
        }
    }
    scene.close().await;
}

/// Where they are allowed they reach the rows that see them and no others.
#[tokio::test]
async fn values_that_may_be_not_finite() {
    let mut scene = Scene::open().await;
    let draft = |row: Option<Place>| {
        let mut draft = Draft::of_values(dims([4, 2, 6, 6, 8, 6]), Dtype::F32, mild)
            .with(|begin| begin.set_causal(proto::Causal::TopLeft))
            .with(|begin| begin.allow_non_finite = true);
        row.into_iter().for_each(|place| draft.set(place, f32::NAN));
        draft
    };
    let clean = scene.accepts("no NaN", &draft(None)).await;
    // Query 2 of head 1; key 4 and value 4 of kv head 1, which tokens 4 and 5 of heads 2 and 3 see.
    for (place, seen) in [
        ((0, 1, 2, 3), vec![(1, 2)]),
        ((1, 1, 4, 0), vec![(2, 4), (2, 5), (3, 4), (3, 5)]),
        ((2, 1, 4, 2), vec![(2, 4), (2, 5), (3, 4), (3, 5)]),
    ] {
        let row = format!("NaN allowed at {place:?}");
        let answer = scene.answered(&row, &draft(Some(place))).await;
        for head in 0..4 {
            for token in 0..6 {
                let of_row = |context: &[f32]| context[(head * 6 + token) * 6..][..6].to_vec();
                let context = of_row(&answer.context);
                if seen.contains(&(head, token)) {
                    assert!(
                        context.iter().any(|value| value.is_nan()),
                        "{row}: head {head} token {token} is {context:?}"
                    );
                } else {
                    assert_eq!(context, of_row(&clean.context), "{row}: head {head} token {token}");
                    assert_eq!(answer.lse[head * 6 + token], clean.lse[head * 6 + token], "{row}");
                }
            }
        }
        scene.recovers(&row).await;
    }
    scene.close().await;
}

/// Row 42. Both page 0 and page 1 are tried, so that either of two workers meets the overflow.
#[tokio::test]
async fn finite_operands_whose_scores_overflow() {
    let mut scene = Scene::open().await;
    for (dtype, head, token, key, sign, workers) in [
        (Dtype::F32, 0, 3, 0, 1.0, 1),
        (Dtype::F32, 0, 3, 277, 1.0, 2),
        (Dtype::F32, 3, 5, 17, -1.0, 2),
        (Dtype::F32, 2, 0, 299, -1.0, 1),
        (Dtype::Bf16, 1, 4, 260, 1.0, 2),
    ] {
        let mut draft = Draft::of_values(dims(SHAPE), dtype, mild).on_workers(workers);
        draft.set((0, head, token, 2), 1e30);
        draft.set((1, head / 2, key, 2), sign * 1e30);
        let row = format!("{dtype}: head {head} row {token} key {key} overflows, {workers} workers");
        let refusal = Refusal::invalid(format!("SCORE_OVERFLOW: head {head} row {token}"));
        scene.refuses(&row, draft.frames(), &refusal).await;
    }
    // A score that nobody sees is nobody's business: query 3 sees keys 0 to 3.
    let mut hidden = Draft::of_values(dims(SHAPE), Dtype::F32, mild);
    hidden.begin.set_causal(proto::Causal::TopLeft);
    hidden.set((0, 0, 3, 2), 1e30);
    hidden.set((1, 0, 277, 2), 1e30);
    scene.accepts("a masked score overflows", &hidden).await;
    // 1e26 is large, and a number like any other.
    let mut large = Draft::of_values(dims(SHAPE), Dtype::F32, |tensor, i| mild(tensor, i) * 1e-3);
    large.set((0, 0, 3, 2), 1e30);
    scene.accepts("scores of 1e26", &large).await;
    scene.close().await;
}

/// Row 43.
#[tokio::test]
async fn finite_values_whose_sum_overflows() {
    let mut scene = Scene::open().await;
    for (kv_head, workers) in [(0, 1), (1, 1), (0, 2), (1, 2)] {
        // All weights are equal, and row t sees t + 1 keys: four times 1e38 is too much for f32.
        let value = |tensor: usize, i: usize| match tensor {
            2 if i / 36 == kv_head => 1e38,
            2 => mild(2, i),
            _ => 0.0,
        };
        let draft = Draft::of_values(dims([4, 2, 6, 6, 8, 6]), Dtype::F32, value).on_workers(workers);
        let draft = draft.with(|begin| begin.set_causal(proto::Causal::BottomRight));
        let row = format!("values of kv head {kv_head} overflow, {workers} workers");
        let text = format!("OUTPUT_OVERFLOW: head {} row 3", kv_head * 2);
        scene.refuses(&row, draft.frames(), &Refusal::invalid(text)).await;
    }
    // One key, whose score in powers of two is k: its weight is 2 to the distance of k from the next integer. What
    // overflows is the sum before the division, though the context is the value itself.
    let one_key = |k: f32, value: f32| {
        let of_tensor = move |tensor: usize, _: usize| [1.0, k * std::f32::consts::LN_2, value][tensor];
        Draft::of_values(dims([1; 6]), Dtype::F32, of_tensor).on_workers(1)
    };
    let refusal = Refusal::invalid("OUTPUT_OVERFLOW: head 0 row 0");
    scene.refuses("3e38 with a weight of 2^0.4", one_key(0.4, 3e38).frames(), &refusal).await;
    for (k, value) in [(0.4, 2.5e38), (0.0, 3e38), (-0.4, 3e38), (0.5, f32::MAX / 1.4143)] {
        scene.accepts(&format!("{value:e} with a weight of 2^{k}"), &one_key(k, value)).await;
    }
    // Under f32's largest number over the number of keys, with room for weights of up to sqrt(2).
    let most = f32::MAX / (300.0 * 1.5);
    let value = move |tensor: usize, i: usize| if tensor == 2 { most } else { mild(tensor, i) };
    for workers in [1, 2] {
        let draft = Draft::of_values(dims(SHAPE), Dtype::F32, value).on_workers(workers);
        scene.accepts("values of 7e35", &draft).await;
    }
    scene.close().await;
}

/// Row 44.
#[tokio::test]
async fn rows_that_see_no_key() {
    let mut scene = Scene::open().await;
    for (queries, keys, workers) in [(5_u32, 3_u32, 1), (5, 3, 2), (300, 1, 1)] {
        let row = format!("{queries} queries, {keys} keys");
        let blind = (queries - keys) as usize;
        let draft = Draft::of_values(dims([4, 2, queries, keys, 8, 6]), Dtype::F32, mild);
        let draft = if workers == 1 { draft.on_workers(1) } else { draft.on_workers(2) };
        let draft = draft.with(|begin| begin.set_causal(proto::Causal::BottomRight));
        let answer = scene.accepts(&row, &draft).await;
        assert_eq!(answer.empty_rows, 4 * blind as u64, "{row}");
        for head in 0..4 {
            for token in 0..queries as usize {
                let at = head * queries as usize + token;
                let context = &answer.context[at * 6..][..6];
                let is_empty = answer.lse[at] == f32::NEG_INFINITY;
                assert_eq!(is_empty, token < blind, "{row}: lse of head {head} token {token}");
                let is_zero = context.iter().all(|value| value.to_bits() == 0);
                assert_eq!(is_zero, token < blind, "{row}: {context:?} of head {head} token {token}");
            }
        }
        let frames = draft.with(|begin| begin.forbid_empty_rows = true).frames();
        let text = format!("EMPTY_ROW: rows without a key: {}", 4 * blind);
        scene.refuses(&format!("{row}, forbidden"), frames, &Refusal::new(Code::InvalidArgument, text)).await;
    }
    let seeing = Draft::of_values(dims([4, 2, 5, 3, 8, 6]), Dtype::F32, mild)
        .with(|begin| begin.set_causal(proto::Causal::TopLeft))
        .with(|begin| begin.forbid_empty_rows = true);
    assert_eq!(scene.accepts("top-left has no empty rows", &seeing).await.empty_rows, 0);
    scene.close().await;
}

/// Row 45: numbers at the edges of their types are numbers.
#[tokio::test]
async fn numbers_at_the_edge() {
    let mut scene = Scene::open().await;
    for dtype in DTYPES {
        // The smallest number of the type and odd multiples of it.
        let least = match dtype {
            Dtype::F32 => f32::from_bits(1),
            Dtype::F16 => 2.0_f32.powi(-24),
            Dtype::Bf16 => f32::from_bits(1 << 16),
        };
        let denormal = |i: usize| least * (i % 31) as f32 * if i.is_multiple_of(2) { 1.0 } else { -1.0 };
        let draft = Draft::of_values(
            dims(SHAPE),
            dtype,
            |tensor, i| if tensor == 2 { mild(2, i) } else { denormal(i) },
        );
        scene.accepts(&format!("{dtype}: denormal queries and keys"), &draft.on_workers(2)).await;

        let zeros = |tensor: usize, i: usize| if i % 3 == tensor { -0.0 } else { 0.0 };
        let draft = Draft::of_values(dims(SHAPE), dtype, zeros).on_workers(2);
        let answer = scene.accepts(&format!("{dtype}: zeros of both signs"), &draft).await;
        let bits: Vec<u32> = answer.context.iter().map(|value| value.to_bits()).collect();
        assert!(bits.iter().all(|bits| *bits == 0), "{dtype}: a negative zero comes out");
    }
    let f16_most = |tensor: usize, i: usize| if i % 7 == tensor { 65504.0 } else { mild(tensor, i) };
    let draft = Draft::of_values(dims(SHAPE), Dtype::F16, f16_most);
    scene.accepts("f16: 65504 everywhere, 1 worker", &draft.clone().on_workers(1)).await;
    scene.accepts("f16: 65504 everywhere, 2 workers", &draft.on_workers(2)).await;
    let values = |tensor: usize, i: usize| if tensor == 2 { 65504.0 * mild(2, i) } else { mild(tensor, i) };
    let draft = Draft::of_values(dims(SHAPE), Dtype::F16, values);
    scene.accepts("f16: values up to 32752", &draft.on_workers(2)).await;
    let f16_least = |tensor: usize, i: usize| {
        if tensor == 2 { 2.0_f32.powi(-24) * (i % 1024) as f32 } else { mild(tensor, i) }
    };
    let draft = Draft::of_values(dims(SHAPE), Dtype::F16, f16_least);
    scene.accepts("f16: denormal values", &draft.on_workers(2)).await;

    // Equal weights over a power of two of keys: every step is exact even where f32 itself is denormal.
    let least = |tensor: usize, i: usize| if tensor == 2 { f32::from_bits(1 + i as u32 % 6) } else { 0.0 };
    let draft = Draft::of_values(dims([4, 2, 3, 512, 8, 6]), Dtype::F32, least).on_workers(2);
    let answer = scene.accepts("f32: denormal values", &draft).await;
    for (i, value) in answer.context.iter().enumerate() {
        assert_eq!(value.to_bits(), 1 + i as u32 % 6, "denormal values were flushed");
    }
    scene.close().await;
}
