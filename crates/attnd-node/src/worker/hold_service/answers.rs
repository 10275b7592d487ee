//! Answers to the frames of a stream, and their way back.

use std::collections::VecDeque;

use attnd_plan::omission::repeat_some;
use attnd_wire::hold::{HoldAnswer, HoldReply, ShardAt, ShardRecords, ShardState};
use attnd_wire::limits::MAX_ENTRIES;
use attnd_wire::proto::{self, hold_reply};
use attnd_wire::{Error, Reason, floats, limits};
use tokio::sync::mpsc::OwnedPermit;

use crate::budget::Reservation;
use crate::shutdown::InFlight;
use crate::worker::store::attention::{RUN_BYTES, Run};
use crate::worker::store::works::WorkDone;

/// Results in one frame, at most.
const MAX_RESULTS: usize = 1024;

/// All frames of one answer, and what is held until they have left.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) frames: VecDeque<proto::HoldReply>,
    /// Of what they carry.
    pub(crate) _memory: Option<Reservation>,
    pub(crate) _in_flight: Option<InFlight>,
}

/// A request that is owed an answer. It gets one in any case.
#[derive(Debug)]
pub(crate) struct Asked {
    request: u64,
    /// Its place in the queue of the stream.
    place: Option<OwnedPermit<Answer>>,
    in_flight: Option<InFlight>,
}

impl Asked {
    pub(crate) fn new(request: u64, place: OwnedPermit<Answer>, in_flight: Option<InFlight>) -> Self {
        Self { request, place: Some(place), in_flight }
    }

    /// Answers with the state of a shard, or why there is none.
    pub(crate) fn state(self, state: Result<ShardState, Error>) {
        let answer = match state {
            Ok(state) => hold_reply::Answer::State(state.into()),
            Err(error) => failed(error),
        };
        let frame = frame(self.request, answer);
        self.send([frame].into(), None);
    }

    /// Answers with something else, or why there is nothing; `memory` is that of its bytes.
    pub(crate) fn answer(self, answer: Result<HoldAnswer, Error>, memory: Option<Reservation>) {
        let answer = answer.unwrap_or_else(HoldAnswer::Failed);
        let reply = HoldReply { request: self.request, more: false, answer };
        self.send([reply.into()].into(), memory);
    }

    /// Answers with the ops that a shard remembers, or why there are none.
    pub(crate) fn records(self, records: Result<ShardRecords, Error>) {
        let answer = match records {
            Ok(records) => hold_reply::Answer::Records(records.into()),
            Err(error) => failed(error),
        };
        let frame = frame(self.request, answer);
        self.send([frame].into(), None);
    }

    /// Answers with shards.
    pub(crate) fn shards(self, shards: &[ShardAt]) {
        let list = |shards: &[ShardAt]| {
            let shards = shards.iter().map(|at| (*at).into()).collect();
            frame(self.request, hold_reply::Answer::Shards(proto::ShardList { shards }))
        };
        let mut frames: VecDeque<proto::HoldReply> = shards.chunks(MAX_ENTRIES).map(list).collect();
        if frames.is_empty() {
            frames.push_back(list(&[]));
        }
        let last = frames.len() - 1;
        frames.iter_mut().take(last).for_each(|frame| frame.more = true);
        self.send(frames, None);
    }

    /// Answers with what became of works.
    pub(crate) fn works(self, works: Vec<Result<WorkDone, Error>>, memory: Option<Reservation>) {
        let frames = frames_of(self.request, works);
        self.send(frames, memory);
    }

    fn send(mut self, frames: VecDeque<proto::HoldReply>, memory: Option<Reservation>) {
        let in_flight = self.in_flight.take();
        if let Some(place) = self.place.take() {
            drop(place.send(Answer { frames, _memory: memory, _in_flight: in_flight }));
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            let answer = failed(Error::new(Reason::Internal, "the work died"));
            let frames = [frame(self.request, answer)].into();
            drop(place.send(Answer { frames, _memory: None, _in_flight: self.in_flight.take() }));
        }
    }
}

fn failed(error: Error) -> hold_reply::Answer {
    hold_reply::Answer::Failure(error.into())
}

fn frame(request: u64, answer: hold_reply::Answer) -> proto::HoldReply {
    proto::HoldReply { request, more: false, answer: Some(answer) }
}

/// The frames of an answer to works: as few as there can be of about two MiB.
fn frames_of(request: u64, works: Vec<Result<WorkDone, Error>>) -> VecDeque<proto::HoldReply> {
    let mut frames = VecDeque::new();
    let (mut results, mut bytes) = (Vec::new(), 0);
    for result in works.into_iter().enumerate().flat_map(|(work, done)| results_of(work, done)) {
        let more = limits::entry_bytes(&result);
        if !results.is_empty() && (bytes + more > RUN_BYTES || results.len() == MAX_RESULTS) {
            let full = proto::ShardResults { results: std::mem::take(&mut results) };
            let answer = Some(hold_reply::Answer::Results(full));
            frames.push_back(proto::HoldReply { request, more: true, answer });
            bytes = 0;
        }
        bytes += more;
        results.push(result);
    }
    frames.push_back(frame(request, hold_reply::Answer::Results(proto::ShardResults { results })));
    frames
}

/// What became of work number `work`.
fn results_of(work: usize, done: Result<WorkDone, Error>) -> Vec<proto::ShardResult> {
    let work = u32::try_from(work).unwrap_or(u32::MAX);
    let empty = proto::ShardResult { work, applied: None, partials: None, failure: None };
    let (applied, partials) = match done {
        Ok(WorkDone { applied, partials }) => (applied, partials),
        Err(error) => (None, Err(error)),
    };
    let mut results: Vec<proto::ShardResult> = match partials {
        Ok(runs) => runs
            .into_iter()
            .map(|run| proto::ShardResult { partials: Some(partials_of(run)), ..empty.clone() })
            .collect(),
        Err(error) => vec![proto::ShardResult { failure: Some(error.into()), ..empty.clone() }],
    };
    if results.is_empty() {
        results.push(empty);
    }
    if let Some(first) = results.first_mut() {
        first.applied = applied.map(Into::into);
    }
    repeat_some(&mut results);
    results
}

fn partials_of(run: Run) -> proto::PartialRun {
    let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let data = floats::into_bytes(run.data);
    let crc32c = crc32c::crc32c(&data);
    proto::PartialRun { first_cell: small(run.first_cell), cells: small(run.cells), crc32c, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A result of each shard of a message, whose states are as large as they can be.
    #[test]
    fn an_answer_is_cut_into_messages_by_all_that_is_in_it() {
        let applied = ShardState { tokens: vec![1 << 20; 1024], ..ShardState::default() };
        let run = |first_cell| Run { first_cell, cells: 1, data: vec![1.0; 100_000] };
        let works: Vec<_> = (0..1024)
            .map(|work| match work % 8 {
                0 => Ok(WorkDone { applied: Some(applied.clone()), partials: Ok(vec![run(0), run(1)]) }),
                1 => Err(Error::new(Reason::KvBudget, "x".repeat(200))),
                _ => Ok(WorkDone { applied: Some(applied.clone()), partials: Ok(Vec::new()) }),
            })
            .collect();
        let frames = frames_of(7, works);
        let mut seen = vec![0; 1024];
        for (at, frame) in frames.iter().enumerate() {
            assert!(limits::entry_bytes(frame) <= RUN_BYTES + (1 << 20), "{}", limits::entry_bytes(frame));
            assert_eq!((frame.request, frame.more), (7, at + 1 < frames.len()));
            let Some(hold_reply::Answer::Results(results)) = &frame.answer else { panic!("{frame:?}") };
            for result in &results.results {
                seen[result.work as usize] += 1;
            }
        }
        let expected: Vec<i32> = (0..1024).map(|work| if work % 8 == 0 { 2 } else { 1 }).collect();
        assert_eq!(seen, expected);
    }
}
