//! Honest runs with mistakes and losses thrown in.

use proptest::prelude::*;

use super::*;
use crate::gather::cells;
use crate::planner::tests::{any_call, planned};
use crate::report::tests::{all_reports, any_outputs, elements_of};
use crate::side::SideTensor;
use crate::side::tests::{any_side, layout};

#[derive(Clone, Copy, Debug)]
enum Step {
    Honest,
    Repeat,
    Begin,
    Chunk(u32, AnyTensor, Option<u64>, usize),
    Commit(u32, u64),
    End,
    Finished(usize),
    Lost(usize),
    Failed(usize),
    Tick(u64),
    Gone,
}

fn any_step() -> impl Strategy<Value = Step> {
    let tensor = prop_oneof![
        Just(Tensor::Q.into()),
        Just(Tensor::K.into()),
        Just(Tensor::V.into()),
        Just(SideTensor::Mask.into()),
    ];
    prop_oneof![
        200 => Just(Step::Honest),
        1 => Just(Step::Repeat),
        1 => Just(Step::Begin),
        1 => (0u32..9, tensor, any::<Option<u8>>(), 0usize..9)
            .prop_map(|(index, tensor, offset, len)| Step::Chunk(index, tensor, offset.map(u64::from), len)),
        1 => (0u32..9, 0u64..9).prop_map(|(chunks, bytes)| Step::Commit(chunks, bytes)),
        1 => Just(Step::End),
        1 => (0usize..9).prop_map(Step::Finished),
        1 => (0usize..9).prop_map(Step::Lost),
        1 => (0usize..9).prop_map(Step::Failed),
        3 => (0u64..9000).prop_map(Step::Tick),
        1 => Just(Step::Gone),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// An honest run with mistakes and losses thrown in ends once, and is complete only when everything was sent.
    #[test]
    fn a_call_ends_once(
        call in any_call(), reported in any::<bool>(), mask in proptest::option::of(any_side()),
        steps in proptest::collection::vec(any_step(), 0..300),
    ) {
        let Some((shape, plan)) = planned(&call, 1 << 13) else { return Ok(()) };
        let plan = plan.verify(&shape).unwrap();
        let n_shares = plan.shares.len();
        let mut honest = std::collections::VecDeque::new();
        let mut bytes = 0;
        let layouts = mask.iter().map(|mask| layout(SideTensor::Mask, mask, &shape));
        let sides = Sides::new(layouts.collect()).unwrap();
        let masks = sides.iter().map(|side| (side.tensor().into(), side.bytes()));
        let operands = Tensor::ALL.map(|tensor| (AnyTensor::from(tensor), tensor.bytes(&shape, 4)));
        for (index, (tensor, len)) in (0..).zip(masks.chain(operands)) {
            let len = len as usize;
            bytes += len as u64;
            honest.push_back(CallEvent::ChunkIn { index, tensor, offset: None, len });
        }
        honest.push_back(CallEvent::Commit { chunks: 3 + sides.len() as u32, bytes });
        for (share, of_worker) in plan.shares.iter().enumerate() {
            for cell in cells(&of_worker.pieces, &shape, plan.tokens_per_cell) {
                honest.push_back(CallEvent::Partial { share, cell, part: () });
            }
            if !reported {
                honest.push_back(CallEvent::Finished { share });
            }
        }
        if reported {
            for (share, id) in all_reports(&plan) {
                let elements = elements_of(&plan, share, id);
                honest.push_back(CallEvent::Elements { share, id, elements });
                honest.push_back(CallEvent::Report { share, id });
            }
            honest.extend((0..n_shares).map(|share| CallEvent::Finished { share }));
        }
        let steps = steps.into_iter().chain(vec![Step::Honest; honest.len()]);

        let outputs = reported.then(|| any_outputs(&shape));
        let mut call = Call::new(&plan, 4, &sides, outputs, Duration::ZERO);
        let mut now = Duration::ZERO;
        let (mut ends, mut emitted, mut told, mut last) = (0, 0, 0, CallEvent::Tick);
        for step in steps {
            let event: CallEvent<(), String> = match step {
                Step::Honest => match honest.pop_front() {
                    Some(event) => event,
                    None => continue,
                },
                Step::Repeat => last.clone(),
                Step::Begin => CallEvent::Begin,
                Step::Chunk(index, tensor, offset, len) => {
                    CallEvent::ChunkIn { index, tensor, offset, len }
                },
                Step::Commit(chunks, bytes) => CallEvent::Commit { chunks, bytes },
                Step::End => CallEvent::StreamEnded,
                Step::Finished(share) => CallEvent::Finished { share },
                Step::Lost(share) => CallEvent::WorkerLost { share },
                Step::Failed(share) => CallEvent::ShareFailed { share, what: "sorry".to_owned() },
                Step::Tick(ms) => {
                    now += Duration::from_millis(ms);
                    CallEvent::Tick
                }
                Step::Gone => CallEvent::ClientGone,
            };
            last = event.clone();
            let had_ended = call.has_ended();
            let actions = call.handle(event, now);
            prop_assert!(!had_ended || actions.is_empty());
            for (i, action) in actions.iter().enumerate() {
                match action {
                    CallAction::Emit(ready) => emitted += ready.tokens.len(),
                    CallAction::EmitReport(id) => told += id.tokens,
                    CallAction::Complete => {
                        ends += 1;
                        prop_assert_eq!(emitted, shape.n_groups() * shape.n_queries());
                        prop_assert_eq!(told, if reported { emitted } else { 0 });
                    }
                    CallAction::Fail(error) => {
                        ends += 1;
                        let culprit = error.culprit().map(|worker| plan.shares.iter().any(|share| share.worker == *worker));
                        prop_assert!(culprit != Some(false));
                    }
                    _ => continue,
                }
                let is_end = !matches!(action, CallAction::Emit(_) | CallAction::EmitReport(_));
                prop_assert!(!is_end || (call.has_ended() && i == actions.len() - 1));
            }
        }
        prop_assert!(ends <= 1);
        prop_assert!(call.has_ended(), "{n_shares} shares");
    }
}
