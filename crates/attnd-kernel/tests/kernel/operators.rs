//! What a call computes beside products: the sign of a scale, sinks, rows that see nothing, and what is refused.

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attnd_kernel::{
    AttnShape, Causal, Compute, Dims, Documents, EmptyRow, FinishedRows, Kernels, Mask, MaskError, Operator,
    OperatorError, OperatorParts, PartialRows, PerBatch, Positions, Run, ValueSum, Window,
};

use crate::cases::{Case, Data, differing_bits};

fn parts() -> OperatorParts {
    OperatorParts::plain(0.5, Causal::None)
}

/// Two batch elements of four heads, 3 queries and 5 keys.
fn shape() -> AttnShape {
    AttnShape::new(Dims { batch: 2, heads: 4, kv_heads: 2, queries: 3, keys: 5, head_dim: 2, value_dim: 2 })
        .unwrap()
}

#[test]
fn a_negative_scale_is_that_of_negative_queries() {
    let mut negative = Case::new(1, Data::Normal, Causal::TopLeft, [2, 50, 700, 24, 17]);
    negative.scale = -negative.scale;
    let mut positive = Case::new(1, Data::Normal, Causal::TopLeft, [2, 50, 700, 24, 17]);
    positive.q.iter_mut().for_each(|q| *q = -*q);
    for kernels in Kernels::available() {
        let (a, b) = (negative.attend(kernels, 0..50), positive.attend(kernels, 0..50));
        assert_eq!(differing_bits(&a, &b), None, "{}", kernels.isa());
    }
}

#[test]
fn a_scale_of_zero_is_the_mean() {
    let mut case = Case::new(1, Data::Normal, Causal::None, [1, 1, 512, 24, 1]);
    case.scale = 0.0;
    case.v = (0..512_u16).map(f32::from).collect();
    let result = case.attend(Kernels::available()[0], 0..1);
    assert_eq!(result.context, [255.5]);
    assert!((result.lse[0] - 512.0_f32.ln()).abs() <= 1e-6 * result.lse[0]);
}

/// A case's result with a logit for each head, merged after all keys.
fn with_sinks(case: &Case, partial: PartialRows, sinks: &[f32], empty_row: EmptyRow) -> FinishedRows {
    let plain = OperatorParts::plain(case.scale, Causal::None);
    let parts = OperatorParts { mask: case.mask.clone(), sinks: Some(sinks.into()), empty_row, ..plain };
    let operator = Operator::new(parts, &case.shape).unwrap();
    let mut sum = ValueSum::new(&case.shape);
    sum.add(&case.v);
    let mean = sum.mean().filter(|_| empty_row == EmptyRow::Uniform);
    operator.finish(partial, 0, &case.shape, mean.as_deref(), Kernels::available()[0])
}

#[test]
fn a_sink_has_a_weight_and_no_value() {
    let case = Case::new(3, Data::Normal, Causal::TopLeft, [4, 30, 400, 40, 20]);
    let partial =
        case.partial(Kernels::available()[0], &case.resident(0..64), attnd_kernel::slot::Node::ROOT, 0..30);
    // One far below the scores, one among them, one far above, and none.
    let sinks = [-20.0, 1.5, 90.0, f32::NEG_INFINITY];
    let got = with_sinks(&case, partial.clone(), &sinks, EmptyRow::Zero);
    for row in 0..4 * 30 {
        let (head, token) = (row / 30, row % 30);
        let exact = case.reference(head, token);
        let sink = f64::from(sinks[head]);
        let largest = exact.lse.max(sink);
        let lse = largest + ((exact.lse - largest).exp() + (sink - largest).exp()).ln();
        let keys = (exact.lse - lse).exp();
        assert!((f64::from(got.lse[row]) - lse).abs() <= exact.expected.lse + 1e-6 * lse.abs(), "row {row}");
        for (c, exact_value) in exact.context.iter().enumerate() {
            let (got, want) = (f64::from(got.context[row * 20 + c]), exact_value * keys);
            let bound = 2.0 * exact.expected.context[c] * keys + 1e-6 * want.abs();
            assert!((got - want).abs() <= bound + 1e-37, "row {row} column {c}: {got} for {want}");
        }
    }
    let none = with_sinks(&case, partial.clone(), &[f32::NEG_INFINITY; 4], EmptyRow::Zero);
    assert_eq!(differing_bits(&none, &partial.finish(Kernels::available()[0])), None);
}

#[test]
fn sinks_leave_no_trace_of_who_finishes() {
    let case = Case::new(4, Data::Peaked, Causal::BottomRight, [2, 9, 3000, 16, 24]);
    let partial = |kernels: &Kernels| {
        case.partial(kernels, &case.resident(0..64), attnd_kernel::slot::Node::ROOT, 0..9)
    };
    let sinks = [0.3, 7.0];
    let finished = |kernels: &Kernels| partial(kernels).with_sinks(&sinks, kernels).finish(kernels);
    let expected = finished(Kernels::available()[0]);
    for kernels in Kernels::available() {
        assert_eq!(differing_bits(&expected, &finished(kernels)), None, "{}", kernels.isa());
    }
    assert_eq!(
        differing_bits(
            &expected,
            &with_sinks(&case, partial(Kernels::available()[0]), &sinks, EmptyRow::Nan)
        ),
        None
    );
}

#[test]
fn sinks_are_those_of_the_groups_heads() {
    let sinks: Arc<[f32]> = [0.0, 1.0, 2.0, 3.0].into();
    let operator = Operator::new(OperatorParts { sinks: Some(sinks), ..parts() }, &shape()).unwrap();
    let kernels = Kernels::available()[0];
    // The second kv group of either batch element has heads 2 and 3.
    for (group, expected) in [(0, [0.0, 1.0]), (1, [2.0, 3.0]), (2, [0.0, 1.0]), (3, [2.0, 3.0])] {
        let finished = operator.finish(PartialRows::empty(6, 2), group, &shape(), None, kernels);
        for (row, lse) in finished.lse.iter().enumerate() {
            assert!((lse - expected[row / 3]).abs() < 1e-6, "group {group} row {row}: {lse}");
        }
        assert!(finished.context.iter().all(|x| x.to_bits() == 0));
    }
}

#[test]
fn a_row_that_sees_nothing_is_what_was_asked_for() {
    let case = Case::new(12, Data::Normal, Causal::BottomRight, [2, 60, 10, 8, 8]);
    let kernels = Kernels::available()[0];
    let partial = case.partial(kernels, &case.resident(0..64), attnd_kernel::slot::Node::ROOT, 0..60);
    let zero = partial.clone().finish(kernels);
    let none = [f32::NEG_INFINITY; 2];
    let nan = with_sinks(&case, partial.clone(), &none, EmptyRow::Nan);
    assert_eq!(nan.lse, zero.lse);
    assert_eq!(nan.non_finite_row, None, "these NaNs are no accident");
    for row in 0..120 {
        let (nan, zero) = (&nan.context[row * 8..][..8], &zero.context[row * 8..][..8]);
        if row % 60 < 50 {
            assert!(nan.iter().all(|x| x.to_bits() == 0x7fc0_0000), "row {row}");
        } else {
            assert_eq!(nan, zero, "row {row}");
        }
    }
    // With a sink the row has something to look at, if nothing to take from it.
    let sunk = with_sinks(&case, partial, &[1.0, 1.0], EmptyRow::Nan);
    assert!(sunk.context.iter().all(|x| x.is_finite()) && sunk.lse.iter().all(|lse| lse.is_finite()));
}

/// Rows that see a key, or a sink, are what they were; the others have the mean over all keys, those behind the padding included.
#[test]
fn a_uniform_row_is_the_mean_of_all_values() {
    let mut case = Case::new(13, Data::Normal, Causal::BottomRight, [2, 60, 300, 8, 5]);
    case.mask.key_begin = Some(PerBatch::Same(20));
    case.mask.key_end = Some(PerBatch::Same(35));
    let kernels = Kernels::available()[0];
    let partial = case.partial(kernels, &case.resident(0..64), attnd_kernel::slot::Node::ROOT, 0..60);
    // Queries stand at keys -25 to 34, and those before key 20 see nothing.
    let sinks = [f32::NEG_INFINITY, 0.5];
    let zero = with_sinks(&case, partial.clone(), &sinks, EmptyRow::Zero);
    let uniform = with_sinks(&case, partial, &sinks, EmptyRow::Uniform);
    assert_eq!((&uniform.lse, uniform.non_finite_row), (&zero.lse, None));
    let mean = |column: usize| {
        let of_keys = (0..300).map(|key| f64::from(case.v[key * 5 + column]));
        (of_keys.fold(0.0, |sum, value| sum + value) / 300.0) as f32
    };
    let mean = [0, 1, 2, 3, 4].map(|column| mean(column).to_bits());
    assert!(!mean.contains(&0));
    for row in 0..120 {
        let bits = |rows: &FinishedRows| -> Vec<u32> {
            rows.context[row * 5..][..5].iter().map(|value| value.to_bits()).collect()
        };
        if row < 45 {
            assert_eq!((bits(&zero), uniform.lse[row]), (vec![0; 5], f32::NEG_INFINITY), "row {row}");
            assert_eq!(bits(&uniform), mean, "row {row}");
        } else {
            assert_eq!(bits(&uniform), bits(&zero), "row {row}");
        }
    }
    assert!(zero.context[60 * 5..][..5].iter().all(|value| *value == 0.0), "this row saw its sink");
}

#[test]
fn uniform_rows_are_not_finished_without_their_mean() {
    let parts = OperatorParts { empty_row: EmptyRow::Uniform, ..parts() };
    let operator = Operator::new(parts.clone(), &shape()).unwrap();
    let kernels = Kernels::available()[0];
    let finish = |mean: Option<&[f32]>| {
        let seen = PartialRows { m: vec![0.0; 6], l: vec![1.0; 6], ..PartialRows::empty(6, 2) };
        let finished = AssertUnwindSafe(|| operator.finish(seen, 0, &shape(), mean, kernels));
        catch_unwind(finished).is_ok()
    };
    // Not even where no row needs it: who forgets it learns of it at once.
    assert!(!finish(None));
    assert!(!finish(Some(&[1.0])));
    assert!(finish(Some(&[1.0, 2.0])));
    let zero = operator.without_empty_row();
    assert_eq!(zero, Operator::new(OperatorParts { empty_row: EmptyRow::Zero, ..parts }, &shape()).unwrap());
}

#[test]
fn sums_of_sigmoids_are_not_divided() {
    let rows = |l: [f32; 3], o: [f32; 3]| {
        let m = [0.0, 0.0, f32::NEG_INFINITY];
        PartialRows { value_dim: 1, m: m.into(), l: l.into(), o: o.into() }
    };
    for kernels in Kernels::available() {
        let left = rows([0.75, 0.0, 0.0], [3.0, -0.0, 0.0]);
        let merged = left.merge(&rows([0.5, 0.0, 0.0], [-1.0, 0.0, 0.0]), kernels);
        let finished = merged.finish_sigmoid(kernels);
        assert_eq!(finished.context, [2.0, 0.0, 0.0]);
        assert_eq!(finished.lse[1..], [f32::NEG_INFINITY; 2]);
        assert!((finished.lse[0] - 1.25_f32.ln()).abs() < 1e-7);
        let overflow = rows([1.0, 1.0, 0.0], [1.0, f32::INFINITY, 0.0]).finish_sigmoid(kernels);
        assert_eq!(overflow.non_finite_row, Some(1));
    }
}

#[test]
fn only_what_old_nodes_know_has_their_name() {
    let id = |parts: OperatorParts, compute| Operator::new(parts, &shape()).unwrap().kernel_id(compute);
    for causal in [Causal::None, Causal::BottomRight, Causal::TopLeft] {
        for compute in Compute::ALL {
            assert_eq!(id(OperatorParts::plain(0.5, causal), compute), compute.kernel_id());
        }
    }
    // Where queries stand is nothing to a call without rules about it.
    for positions in [Positions::TopLeft, Positions::BottomRight, Positions::Offset(PerBatch::Same(2))] {
        let mask = Mask { positions: Some(positions), ..Mask::default() };
        for compute in Compute::ALL {
            assert_eq!(id(OperatorParts { mask: mask.clone(), ..parts() }, compute), compute.kernel_id());
        }
    }
    let window = Window { left: Some(2), right: None };
    for new in [
        OperatorParts { scale: -0.5, ..parts() },
        OperatorParts { scale: 0.0, ..parts() },
        OperatorParts { mask: Mask { window, ..Causal::TopLeft.into() }, ..parts() },
        OperatorParts { mask: Mask { key_end: Some(PerBatch::Same(4)), ..Mask::default() }, ..parts() },
        OperatorParts { sinks: Some([0.0; 4].into()), ..parts() },
        OperatorParts { empty_row: EmptyRow::Nan, ..parts() },
        OperatorParts { empty_row: EmptyRow::Uniform, ..parts() },
    ] {
        let ids = Compute::ALL.map(|compute| id(new.clone(), compute));
        assert_eq!(ids, ["c1-f32-op1", "c1-bf16-op1", "c1-int8-op1"], "{new:?}");
    }
}

#[test]
fn numbers_that_make_no_operator_are_named() {
    let refused = |parts: OperatorParts| Operator::new(parts, &shape()).unwrap_err().to_string();
    for (scale, text) in
        [(f32::NAN, "scale is NaN"), (f32::INFINITY, "scale is inf"), (-3e38, "scale is -30000")]
    {
        let text_of_it = refused(OperatorParts { scale, ..parts() });
        assert!(text_of_it.starts_with(text), "{text_of_it}");
    }
    for (sinks, text) in [
        (&[0.0; 3][..], "sinks has 3 logits, num_heads is 4"),
        (&[0.0, f32::NEG_INFINITY, f32::NAN, 0.0], "sinks[2] is NaN"),
        (&[f32::INFINITY, 0.0, 0.0, 0.0], "sinks[0] is inf"),
    ] {
        assert_eq!(refused(OperatorParts { sinks: Some(sinks.into()), ..parts() }), text);
    }
}

#[test]
fn rules_that_make_no_mask_are_named_with_both_numbers() {
    let each = |numbers: &[usize]| Some(PerBatch::Each(numbers.into()));
    let causal = |mask: Mask| Mask { causal: true, positions: Some(Positions::BottomRight), ..mask };
    let plain = Mask::default;
    let run = |end, id| Run { end, id };
    let documents = |queries: usize, keys: usize| {
        let runs = |end| vec![vec![run(1, 1), run(end, 2)]];
        Some(Arc::new(Documents::new(&runs(queries), &runs(keys)).unwrap()))
    };
    let window = Window { left: Some(1), right: None };
    let chunk = NonZeroUsize::new(2);
    let offsets = |offsets: &[i64]| Some(Positions::Offset(PerBatch::Each(offsets.into())));
    for (mask, text) in [
        (Mask { key_end: each(&[5, 6]), ..plain() }, "mask.key_end[1] is 6, kv_len is 5"),
        (Mask { key_end: each(&[5]), ..plain() }, "mask.key_end has 1 entries, batch is 2"),
        (Mask { key_begin: each(&[6, 0]), ..plain() }, "mask.key_begin[0] is 6, kv_len is 5"),
        (Mask { query_end: each(&[3, 4]), ..plain() }, "mask.query_end[1] is 4, q_len is 3"),
        (causal(Mask { prefix: each(&[0, 9]), ..plain() }), "mask.prefix[1] is 9, kv_len is 5"),
        (Mask { positions: offsets(&[1, 2, 3]), ..plain() }, "mask.offsets has 3 entries, batch is 2"),
        (
            Mask { key_begin: each(&[0, 4]), key_end: each(&[0, 3]), ..plain() },
            "mask.key_begin[1] is 4, mask.key_end[1] is 3",
        ),
        (Mask { prefix: Some(PerBatch::Same(2)), ..plain() }, "mask.prefix and causal=none"),
        (
            Mask { window, ..plain() },
            "mask.window and no mask.positions: q_len 3, kv_len 5 can be aligned two ways",
        ),
        (
            Mask { chunk, key_end: each(&[3, 4]), ..plain() },
            "mask.chunk and no mask.positions: q_len 3, kv_len 4 can be aligned two ways",
        ),
        (
            Mask { causal: true, ..plain() },
            "causal and no mask.positions: q_len 3, kv_len 5 can be aligned two ways",
        ),
        (
            Mask { window, documents: documents(3, 5), ..plain() },
            "mask.window and no mask.positions: q_len 2, kv_len 4 can be aligned two ways",
        ),
        (causal(Mask { chunk, documents: documents(3, 5), ..plain() }), "mask.chunk and mask.documents"),
        (
            Mask { positions: offsets(&[1, 2]), documents: documents(3, 5), ..plain() },
            "mask.documents and mask.offsets",
        ),
        (Mask { documents: documents(2, 5), ..plain() }, "mask.documents.queries[0] ends at 2, q_len is 3"),
        (Mask { documents: documents(3, 7), ..plain() }, "mask.documents.keys[0] ends at 7, kv_len is 5"),
    ] {
        let error = Operator::new(OperatorParts { mask: mask.clone(), ..parts() }, &shape()).unwrap_err();
        assert!(matches!(&error, OperatorError::Mask(_)));
        assert_eq!(error.to_string(), text, "{mask:?}");
    }
    // Where both corners are the same, nobody has to choose.
    for mask in [Mask { window, key_end: Some(PerBatch::Same(3)), ..plain() }, plain()] {
        assert!(Operator::new(OperatorParts { mask, ..parts() }, &shape()).is_ok());
    }

    let refused =
        |queries: &[Vec<Run>], keys: &[Vec<Run>]| -> MaskError { Documents::new(queries, keys).unwrap_err() };
    let one = vec![vec![run(3, 1)]];
    for (error, text) in [
        (refused(&one, &[]), "mask.documents.keys has 0 entries, batch is 1"),
        (
            refused(&[one[0].clone(), vec![run(2, 1), run(2, 3)]], &[one[0].clone(), one[0].clone()]),
            "mask.documents.queries[1]: run 1 ends at 2, the one before at 2",
        ),
    ] {
        assert_eq!(error.to_string(), text);
    }
    let three = Documents::new(&[one[0].clone(), one[0].clone(), one[0].clone()], &vec![vec![run(5, 1)]; 3]);
    let mask = Mask { documents: Some(Arc::new(three.unwrap())), ..plain() };
    let error = Operator::new(OperatorParts { mask, ..parts() }, &shape()).unwrap_err();
    assert_eq!(error.to_string(), "mask.documents has 3 entries, batch is 2");
}
