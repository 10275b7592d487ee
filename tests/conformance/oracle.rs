//! The f64 oracle of the whole operator against onnx: it is what everything else is compared with, so it answers first.

use attnd_kernel::Dtype;
use attnd_kernel::reference::operator::{At, EmptyRow, Formula, Normaliser, OperatorRow, Score};
use attnd_kernel::reference::{biases, masks};
use half::{bf16, f16};

use super::onnx_data::{Case, Elements, Tensor, cases};
use super::operands::{Matrices, Operands, mask_shape};

/// What an implementation may get wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    NoMask,
    NoCausal,
    TopLeft,
    NoLengths,
    NoSoftcap,
    SoftcapAfterBias,
    SoftcapOfOne,
    HeadsTiled,
    ScaleFromValues,
    NoScale,
    MergedByMean,
    ScoresInHalf,
}

impl Fault {
    const ALL: [Self; 12] = [
        Self::NoMask,
        Self::NoCausal,
        Self::TopLeft,
        Self::NoLengths,
        Self::NoSoftcap,
        Self::SoftcapAfterBias,
        Self::SoftcapOfOne,
        Self::HeadsTiled,
        Self::ScaleFromValues,
        Self::NoScale,
        Self::MergedByMean,
        Self::ScoresInHalf,
    ];
}

/// The oracle's formula of a case, or one that is wrong on purpose.
fn formula<'a>(case: &'a Case, operands: &'a Operands, fault: Option<Fault>) -> Formula<'a> {
    let is = move |which: Fault| fault == Some(which);
    let Operands { q, k, v, offsets, lengths } = operands;
    let [_, _, _, head_dim] = q.shape;
    let [_, kv_heads, keys, value_dim] = v.shape;
    let kv_head = move |at: At| match is(Fault::HeadsTiled) {
        false => at.head / operands.group_size(),
        true => at.head % kv_heads,
    };
    let scale = match case.attributes.scale {
        _ if is(Fault::NoScale) => 1.0,
        Some(scale) => scale,
        None if is(Fault::ScaleFromValues) => (value_dim as f64).sqrt().recip(),
        None => (head_dim as f64).sqrt().recip(),
    };
    let score = move |at: At| {
        let (q, k) = (q.row(at.batch, at.head, at.token), k.row(at.batch, kv_head(at), at.key));
        let exact = Score::dot(scale, q, k);
        match is(Fault::ScoresInHalf) {
            false => exact,
            true => Score { value: f64::from(f16::from_f64(exact.value)), ..exact },
        }
    };
    let mut formula = Formula {
        keys,
        value_dim,
        value: Box::new(move |at| v.row(at.batch, kv_head(at), at.key)),
        score: Box::new(score),
        softcap: case.attributes.softcap,
        biases: Vec::new(),
        visible: Vec::new(),
        normaliser: Normaliser::Softmax,
        sink: None,
        empty_row: EmptyRow::Zero,
    };
    if let Some(mask) = case.tensor("attn_mask").filter(|_| !is(Fault::NoMask)) {
        add_mask(&mut formula, mask);
    }
    if case.attributes.is_causal && !is(Fault::NoCausal) {
        let offset = move |at: At| if is(Fault::TopLeft) { 0 } else { offsets[at.batch] };
        formula.visible.push(Box::new(move |at| masks::causal(offset(at))(at)));
    }
    if let Some(lengths) = lengths.as_ref().filter(|_| !is(Fault::NoLengths)) {
        formula.visible.push(Box::new(move |at| masks::keys(0, lengths[at.batch])(at)));
    }
    match formula.softcap {
        Some(_) if is(Fault::NoSoftcap) => formula.softcap = None,
        Some(_) if is(Fault::SoftcapOfOne) => formula.softcap = Some(1.0),
        Some(_) if is(Fault::SoftcapAfterBias) => {
            // The cap takes -inf to -cap: a hidden key is seen again.
            let biases = std::mem::take(&mut formula.biases);
            formula.score = Box::new(move |at| {
                let raw = score(at);
                Score { value: raw.value + biases.iter().map(|bias| bias(at)).sum::<f64>(), ..raw }
            });
        }
        _ => {}
    }
    formula
}

fn add_mask<'a>(formula: &mut Formula<'a>, mask: &'a Tensor) {
    let shape = mask_shape(mask);
    match &mask.elements {
        Elements::Bools(sees) => {
            formula.visible.push(Box::new(masks::dense(shape, sees)));
        }
        Elements::Floats(values, dtype) => {
            let lowest = match dtype {
                Dtype::F32 => f32::MIN,
                Dtype::F16 => f16::MIN.to_f32(),
                Dtype::Bf16 => bf16::MIN.to_f32(),
            };
            formula.biases.push(Box::new(biases::dense(shape, values, lowest)));
        }
        Elements::Integers(_) => panic!("a mask of integers"),
    }
}

/// Row `(batch, head, token)`, as the formula or its fault has it.
fn row(case: &Case, operands: &Operands, fault: Option<Fault>, at: (usize, usize, usize)) -> OperatorRow {
    let whole = || formula(case, operands, fault);
    let (batch, head, token) = at;
    let mut row = whole().row(batch, head, token);
    if fault == Some(Fault::MergedByMean) {
        let [mut left, mut right] = [whole(), whole()];
        let half = left.keys / 2;
        left.visible.push(Box::new(move |at| at.key < half));
        right.visible.push(Box::new(move |at| at.key >= half));
        let [left, right] = [left, right].map(|half| half.row(batch, head, token).context);
        row.context = left.iter().zip(&right).map(|(l, r)| (l + r) / 2.0).collect();
    }
    row
}

/// The worst error of each output over its tolerance: at most 1 is right.
fn worst_ratio(case: &Case, fault: Option<Fault>) -> f64 {
    let operands = Operands::of(case);
    let [batch, heads, tokens, _] = operands.q.shape;
    let rows = |b: usize, h: usize| (0..tokens).map(move |token| (b, h, token));
    let rows = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| rows(b, h)));
    let y = Matrices::of(case.required("Y"), case.attributes.num_heads.map(|(heads, _)| heads));
    let qk = case.tensor("qk_matmul_output").map(|qk| Matrices::of(qk, None));
    assert_eq!(y.shape, [batch, heads, tokens, operands.v.shape[3]], "{}", case.name);
    let mut worst = 0.0_f64;
    let mut compare = |got: &[f64], want: &[f32]| worst = worst.max(case.worst_ratio(got, want));
    for (b, h, token) in rows {
        let row = row(case, &operands, fault, (b, h, token));
        compare(&row.context, y.row(b, h, token));
        if let Some(qk) = &qk {
            let stages = row.stages;
            let by_mode = [stages.raw, stages.capped, stages.masked, stages.weights];
            compare(&by_mode[case.attributes.qk_matmul_output_mode], qk.row(b, h, token));
        }
    }
    worst
}

#[test]
fn the_oracle_agrees_with_onnx_in_every_case() {
    let cases = cases();
    assert_eq!(cases.len(), 128);
    let wrong: Vec<String> = cases
        .iter()
        .map(|case| (worst_ratio(case, None), &case.name))
        .filter(|(worst, _)| *worst > 1.0)
        .map(|(worst, name)| format!("{name}: {worst:.3} of the tolerance"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_present_of_onnx_is_the_past_and_what_came() {
    let mut with_past = 0;
    for case in cases().iter().filter(|case| case.tensor("present_key").is_some()) {
        let Operands { k, v, .. } = Operands::of(case);
        assert_eq!(k, Matrices::of(case.required("present_key"), None), "{}", case.name);
        assert_eq!(v, Matrices::of(case.required("present_value"), None), "{}", case.name);
        with_past += 1;
    }
    assert!(with_past > 20, "{with_past}");
}

/// Whether the cases are of any use: every mistake must show in one of them. Some have no case: that a short mask hides
/// what it lacks (lengths hide the same keys in the only one), sinks, windows, empty rows.
#[test]
fn every_fault_is_far_outside_of_the_tolerance() {
    let cases = cases();
    for fault in Fault::ALL {
        let worst = cases.iter().map(|case| worst_ratio(case, Some(fault))).fold(0.0, f64::max);
        assert!(worst > 2.0, "{fault:?}: {worst:.3} of the tolerance at most");
    }
}
