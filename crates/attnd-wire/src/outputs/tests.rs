//! What is sent returns, and what doesn't fit is refused.

use attnd_kernel::{Causal, Dims, FinishedReport, Heat, NodeReport, Normaliser, OperatorParts, Ranked};
use bytes::Bytes;

use super::elements::Elements;
use super::report::{HeatChunk, ReportChunk};
use super::share::{MergedSums, ShareReport};
use super::*;
use crate::{CallShape, ComputeBegin};

fn shape() -> AttnShape {
    let dims = Dims { batch: 2, heads: 6, kv_heads: 2, queries: 10, keys: 700, head_dim: 4, value_dim: 4 };
    AttnShape::new(dims).unwrap()
}

fn plain() -> Operator {
    Operator::plain(1.0, Causal::None)
}

/// One of everything, of heads 1 to 4 of each batch element.
fn parts() -> OutputsParts {
    let corner = Rectangle { stage: Stage::Raw, heads: 2..4, tokens: 3..7, keys: 250..600 };
    OutputsParts {
        stages: vec![Stage::Weights, Stage::Masked],
        rectangles: vec![corner],
        top_k: 3,
        mass_block: NonZeroUsize::new(100),
        entropy: true,
        distance: false,
        max_score: true,
        heatmap: Some((5, 7)),
        heads: Some(1..5),
    }
}

fn outputs() -> Arc<Outputs> {
    checked(parts(), &shape(), &plain()).unwrap().unwrap()
}

fn refused(parts: OutputsParts) -> String {
    checked(parts, &shape(), &plain()).unwrap_err().message()
}

#[test]
fn outputs_return() {
    for parts in [
        parts(),
        OutputsParts { heads: None, ..parts() },
        OutputsParts { top_k: 1, ..OutputsParts::default() },
        OutputsParts { distance: true, heatmap: Some((1, 1)), ..OutputsParts::default() },
    ] {
        // Distances need positions.
        let operator = Operator::plain(1.0, Causal::BottomRight);
        let sent = checked(parts, &shape(), &operator).unwrap();
        let message = encode(sent.as_deref().unwrap());
        assert_eq!(decode(Some(message), &shape(), &operator).unwrap(), sent);
    }
    assert_eq!(decode(None, &shape(), &plain()).unwrap(), None);
    assert_eq!(decode(Some(proto::Outputs::default()), &shape(), &plain()).unwrap(), None);
}

#[test]
fn outputs_that_make_no_sense_are_refused() {
    let none = OutputsParts::default;
    let many = vec![Rectangle { stage: Stage::Raw, heads: 0..1, tokens: 0..1, keys: 0..1 }; 65];
    assert_eq!(refused(OutputsParts { rectangles: many, ..none() }), "OUTPUTS: outputs.rectangles 65 > 64");
    assert_eq!(
        refused(OutputsParts { top_k: 1025, ..none() }),
        "OUTPUTS: outputs.top_k is 1025, not 1 to 1024"
    );
    assert_eq!(
        refused(OutputsParts { distance: true, ..none() }).split(':').next(),
        Some("COMBINATION"),
        "as many keys as queries, or positions"
    );
    let sigmoid = OperatorParts {
        normaliser: Normaliser::Sigmoid { bias: 0.0 },
        ..OperatorParts::plain(1.0, Causal::None)
    };
    let sigmoid = Operator::new(sigmoid, &shape()).unwrap();
    let error = checked(OutputsParts { entropy: true, ..none() }, &shape(), &sigmoid).unwrap_err();
    assert_eq!(error.message(), "COMBINATION: outputs.entropy and normaliser=sigmoid");
    for (message, text) in [
        (proto::Outputs { stages: vec![9], ..Default::default() }, "OUTPUTS: outputs.stage 9"),
        (
            proto::Outputs { first_head: 1, ..Default::default() },
            "OUTPUTS: outputs.first_head 1 and outputs.heads 0",
        ),
        (
            proto::Outputs { heat_rows: 3, ..Default::default() },
            "OUTPUTS: outputs.heat_columns is 0, not 1 to 700",
        ),
    ] {
        assert_eq!(decode(Some(message), &shape(), &plain()).unwrap_err().message(), text);
    }
    let dims =
        Dims { batch: 1, heads: 64, kv_heads: 1, queries: 1, keys: 1 << 20, head_dim: 1, value_dim: 1 };
    let wide = AttnShape::new(dims).unwrap();
    let parts = OutputsParts { mass_block: NonZeroUsize::new(1), ..none() };
    let text = checked(parts, &wide, &plain()).unwrap_err().message();
    assert!(
        text.starts_with("OUTPUTS: a report on one query token of a kv group takes 536870912 bytes"),
        "{text}"
    );
}

fn elements() -> Elements {
    let data = Bytes::from(vec![1; 2 * 100 * 4]);
    Elements { rectangle: 2, head: 6 + 3, tokens: 4..6, keys: 256..356, data }
}

#[test]
fn elements_return_or_are_refused() {
    let decode = |message| Elements::decode(message, &shape(), &outputs());
    assert_eq!(decode(elements().into()).unwrap(), elements());
    let good = || proto::Elements::from(elements());
    for (bad, text) in [
        (proto::Elements { rectangle: 3, ..good() }, "not wanted"),
        (proto::Elements { head: 4, ..good() }, "not wanted"),
        (proto::Elements { head: 14, ..good() }, "not wanted"),
        (proto::Elements { first_token: 2, ..good() }, "not wanted"),
        (proto::Elements { first_token: 6, ..good() }, "not wanted"),
        (proto::Elements { first_key: 249, ..good() }, "not wanted"),
        (proto::Elements { first_key: 501, ..good() }, "not wanted"),
        (proto::Elements { first_key: 255, ..good() }, "over a page's end"),
        (proto::Elements { keys: 99, ..good() }, "needs 792 bytes, got 800"),
        (proto::Elements { crc32c: 1, ..good() }, "CHECKSUM"),
    ] {
        let message = decode(bad).unwrap_err().message();
        assert!(message.contains(text), "{message}, not {text}");
    }
}

fn numbers(rows: usize) -> FinishedReport {
    let floats = |n: usize| (0..n).map(|i| i as f32).collect::<Vec<_>>();
    FinishedReport {
        top_keys: (0..rows * 3).map(|i| if i % 3 == 2 { u32::MAX } else { i as u32 }).collect(),
        top_weights: floats(rows * 3),
        top_scores: floats(rows * 3),
        mass: floats(rows * 7),
        entropy: floats(rows),
        distance: Vec::new(),
        max_score: floats(rows),
    }
}

#[test]
fn reports_return_or_are_refused() {
    let chunk = ReportChunk { heads: 7..9, tokens: 2..5, numbers: numbers(6) };
    let decode = |message| ReportChunk::decode(message, &shape(), &outputs());
    assert_eq!(decode(chunk.clone().into()).unwrap(), chunk);
    let good = || proto::Report::from(chunk.clone());
    for (bad, text) in [
        (proto::Report { first_head: 6, ..good() }, "not inside heads 1..5 of a batch element"),
        (proto::Report { first_head: 4, heads: 4, ..good() }, "not inside heads 1..5"),
        (proto::Report { first_head: 12, ..good() }, "no such heads"),
        (proto::Report { first_token: 8, ..good() }, "there are 10 tokens"),
        (proto::Report { tokens: 2, ..good() }, "top_keys needs 48 bytes, got 72"),
        (
            proto::Report { distance: Bytes::from_static(&[0; 24]), ..good() },
            "distance needs 0 bytes, got 24",
        ),
        (proto::Report { crc32c: 1, ..good() }, "CHECKSUM"),
    ] {
        let message = decode(bad).unwrap_err().message();
        assert!(message.contains(text), "{message}, not {text}");
    }
    let mut numbers = numbers(6);
    numbers.top_keys[4] = 700;
    let message = decode(ReportChunk { numbers, ..chunk }.into()).unwrap_err().message();
    assert!(message.ends_with("top key 700, there are 700"), "{message}");
}

#[test]
fn rows_of_maps_return_or_are_refused() {
    let chunk = HeatChunk { heads: 1..3, rows: 2..5, cells: (0..2 * 3 * 7).map(|i| i as f32).collect() };
    let decode = |message| HeatChunk::decode(message, &shape(), &outputs());
    assert_eq!(decode(chunk.clone().into()).unwrap(), chunk);
    let good = || proto::HeatRows::from(chunk.clone());
    for (bad, text) in [
        (proto::HeatRows { first_head: 0, ..good() }, "not inside heads 1..5"),
        (proto::HeatRows { first_row: 3, ..good() }, "there are 5 rows"),
        (proto::HeatRows { rows: 2, ..good() }, "needs 112 bytes, got 168"),
        (proto::HeatRows { crc32c: 1, ..good() }, "CHECKSUM"),
    ] {
        let message = decode(bad).unwrap_err().message();
        assert!(message.contains(text), "{message}, not {text}");
    }
}

fn begin(outputs: Option<Arc<Outputs>>) -> ComputeBegin {
    ComputeBegin {
        call_id: 1,
        shape: shape(),
        dtype: attnd_kernel::Dtype::F32,
        operator: Arc::new(plain()),
        outputs,
        sides: attnd_plan::Sides::default(),
        allow_non_finite: false,
        pieces: vec![
            attnd_plan::Piece { groups: 1..3, slots: 0..40 },
            attnd_plan::Piece { groups: 3..4, slots: 1..2 },
        ],
        tokens_per_cell: 4,
    }
}

#[test]
fn sums_return_or_are_refused() {
    let sums = MergedSums { group: 2, tokens: 8..10, m: vec![3.0; 6], l: vec![1.5; 6] };
    let begun = begin(Some(outputs()));
    let decode = |message| MergedSums::decode(message, &begun);
    assert_eq!(decode(sums.clone().into()).unwrap(), sums);
    let unseen = MergedSums { m: vec![f32::NEG_INFINITY; 6], l: vec![0.0; 6], ..sums.clone() };
    assert_eq!(decode(unseen.clone().into()).unwrap(), unseen);
    let good = || proto::RowSums::from(sums.clone());
    for (bad, text) in [
        (proto::RowSums { group: 0, ..good() }, "PIECES"),
        (proto::RowSums { group: 3, ..good() }, "no keys of it are in this share"),
        (proto::RowSums { first_token: 6, tokens: 4, ..good() }, "10 tokens in cells of 4"),
        (proto::RowSums { tokens: 1, ..good() }, "10 tokens in cells of 4"),
        (proto::RowSums { m: Bytes::from_static(&[0; 20]), ..good() }, "needs 24 + 24 bytes, got 20 + 24"),
        (proto::RowSums { crc32c: 1, ..good() }, "CHECKSUM"),
        (MergedSums { m: vec![f32::INFINITY; 6], ..sums.clone() }.into(), "row 0 has m inf, l 1.5"),
        (MergedSums { l: vec![f32::NAN; 6], ..sums.clone() }.into(), "row 0 has m 3, l NaN"),
    ] {
        let message = decode(bad).unwrap_err().message();
        assert!(message.contains(text), "{message}, not {text}");
    }
    let error = MergedSums::decode(good(), &begin(None)).unwrap_err();
    assert_eq!(error.reason, Reason::StreamOrder);
}

#[test]
fn reports_of_shares_return_or_are_refused() {
    let outputs = outputs();
    // Heads 3 to 5 are the second group; 3 and 4 are wanted.
    let mut report = NodeReport::empty(&outputs, 1, 2..5);
    assert_eq!((report.heads.clone(), report.heat.rows.clone()), (0..2, 1..3));
    report.mass[3] = 77;
    report.entropy[0] = -5;
    report.max_score[5] = 2.5;
    report.heat.cells[20] = 9;
    // Key 1 with score 1.5.
    report.top[0] = Ranked::from_bits(u64::from(1.5_f32.to_bits() | 1 << 31) << 32 | u64::from(!1_u32));
    assert_eq!((report.top[0].key(), report.top[0].score()), (1, 1.5));
    let share = ShareReport { group: 1, tokens: 2..5, report };
    let call = CallShape::from(&begin(Some(Arc::clone(&outputs))));
    let decode = |message| ShareReport::decode(message, &call);
    let good = || proto::NodeReport::from(share.clone());
    assert_eq!(decode(good()).unwrap(), share);
    for (bad, text) in [
        (proto::NodeReport { group: 4, ..good() }, "there are 4 groups"),
        (proto::NodeReport { first_token: 9, ..good() }, "there are 10 tokens"),
        (proto::NodeReport { crc32c: 1, ..good() }, "CHECKSUM"),
    ] {
        let message = decode(bad).unwrap_err().message();
        assert!(message.contains(text), "{message}, not {text}");
    }
    let mut short = share.clone();
    short.report.heat = Heat { cells: vec![0; 27], ..short.report.heat };
    let message = decode(short.into()).unwrap_err().message();
    assert!(message.contains("report.heat.cells has 27 elements, not 28"), "{message}");
    let none = CallShape::from(&begin(None));
    assert!(ShareReport::decode(good(), &none).unwrap_err().message().contains("no outputs are wanted"));
}
