//! Golden traces: each file of `testscripts/` is a behaviour, its name says which. Lines that begin with `> ` are
//! commands, the lines after one are everything that came out of it. `ATTND_BLESS=1` writes what comes out now.
//!
//! Words of the language (bytes and keys are numbers, times are milliseconds):
//!
//! ```text
//! shape heads=8 kv_heads=8 queries=4096 keys=4096 dim=128 [batch=1] [value_dim=128]
//! worker NAME gflops=100 [free=BYTES]           plan [at-most=N | exactly=N]
//! mask BATCH HEADS QUERIES KEYS | bias ...       a tensor beside q, k and v, each dimension 1 or the call's
//! begin                                         the first makes the call, another is the client's mistake
//! chunk INDEX TENSOR BYTES | send               one chunk; all the rest, in one chunk per tensor
//! commit [CHUNKS BYTES] | end | gone            the client
//! work NAME [CELLS] | again NAME                a worker's next partials; its last one once more
//! finished NAME | lost NAME | failed NAME WHAT  the end of a worker
//! cluster wire=1..2 kernel=c1-f32               a membership
//! join NAME INC [wire=1] [kernel=c1-f32] | beat NAME INC [draining] | closed NAME INC
//! wait MS [every=MS] [NAME:INC ...]             time passes in ticks of 200; these workers beat before each
//! freeze MS                                     time passes without a tick
//! who                                           members, and who may get work
//! session replicas=2 acks=2 shards=ab,cd        a session of one layer; each letter is a worker
//! append SEQ TOKENS | truncate SEQ LEN | read [at=LEN] | shards
//! work NAME | refuse NAME                       what waits for a worker reaches it, which has no memory for rows; its answers
//! save                                          what is to be saved is saved
//! dead NAME | broken NAME | back SHARD NAME | replace SHARD NAME | drain NAME | restart
//! ```

// A script that can't be run must stop the test; the lint only sees `#[test]` functions.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use attnd_kernel::{AttnShape, Causal, Dims, Dtype, Operator};
use attnd_plan::membership::HEARTBEAT;
use attnd_plan::{
    AnyTensor, Call, CallAction, CallEvent, Capacity, CellId, CostModel, Element, Facts, MemberAction,
    MemberEvent, Membership, PlanRequest, Rules, SideLayout, SideTensor, Sides, Tensor, VerifiedPlan,
    WorkerChoice, WorkerId, cells, filled_nodes, plan,
};

#[path = "golden/session.rs"]
mod session;

/// Every script: one that is lost is a behaviour that nobody watches.
const SCRIPTS: [&str; 49] = [
    "a_broken_stream_costs_no_session",
    "a_call_that_cuts_make_too_large_is_refused",
    "a_call_without_room_is_refused",
    "a_coordinator_that_stood_still_blames_nobody",
    "a_coordinator_that_ticks_slowly_buries_the_silent",
    "a_dead_replica_is_replaced",
    "a_faster_worker_gets_more",
    "a_group_may_be_computed_before_commit",
    "a_name_in_use_is_refused_until_its_owner_is_suspect",
    "a_partial_that_comes_twice_fails_the_worker",
    "a_restarted_coordinator_takes_back_what_few_have",
    "a_session_without_a_replica_is_lost",
    "a_slow_computation_is_not_idle",
    "a_small_call_stays_on_one_worker",
    "a_worker_says_why_it_failed",
    "a_worker_that_fails_after_its_last_partial_is_not_missed",
    "a_worker_that_sent_everything_is_not_missed",
    "a_worker_that_stops_short_fails",
    "an_append_without_room_is_nowhere",
    "an_operand_before_its_mask_is_refused",
    "chunk_gap_is_refused",
    "chunk_repeat_is_refused",
    "chunks_become_rows",
    "client_goes_away",
    "closed_stream_is_death_at_once",
    "commit_before_the_tensors_are_whole_is_refused",
    "commit_of_other_bytes_is_refused",
    "commit_of_other_chunks_is_refused",
    "crash_loop_is_quarantined",
    "drained_worker_may_come_back_often",
    "draining_worker_leaves",
    "empty_chunk_is_refused",
    "end_without_commit_is_refused",
    "flapping_worker_is_quarantined",
    "flaps_far_apart_are_forgiven",
    "frame_after_commit_is_refused",
    "idle_client_loses_its_call",
    "masks_come_first_and_in_parts",
    "one_head_is_cut_by_slots",
    "second_begin_is_refused",
    "slow_worker_becomes_suspect_then_dead",
    "strangers_are_rejected_with_numbers",
    "suspect_worker_comes_back",
    "tensor_overrun_is_refused_at_once",
    "there_are_more_workers_than_pages",
    "three_workers_share_eight_heads",
    "work_moves_to_where_memory_is",
    "worker_dies_after_some_partials",
    "worker_dies_mid_stream",
];

#[test]
fn scripts_print_what_they_did() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts");
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let names: Vec<_> = paths.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
    assert_eq!(names, SCRIPTS, "{} has other scripts", folder.display());
    let mut changed = Vec::new();
    for path in paths {
        let expected = std::fs::read_to_string(&path).unwrap();
        assert!(expected.contains("\n> "), "{} is empty", path.display());
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let printed = run(&name, &expected);
        if printed == expected {
            continue;
        }
        if std::env::var_os("ATTND_BLESS").is_some() {
            std::fs::write(&path, printed).unwrap();
        } else {
            changed.push(format!("=== {name} prints\n{printed}"));
        }
    }
    assert!(changed.is_empty(), "{}\nATTND_BLESS=1 accepts this", changed.join("\n"));
}

/// Runs a script; returns it with the output of today.
fn run(name: &str, script: &str) -> String {
    let mut world = World::default();
    let mut printed = String::new();
    for line in script.lines() {
        if line.is_empty() || line.starts_with('#') {
            writeln!(printed, "{line}").unwrap();
        } else if let Some(command) = line.strip_prefix("> ") {
            writeln!(printed, "{line}").unwrap();
            let words: Vec<&str> = command.split_whitespace().collect();
            let output = world.command(&words).unwrap_or_else(|| panic!("{name}: what is {command:?}?"));
            for line in output {
                writeln!(printed, "{line}").unwrap();
            }
        }
    }
    printed
}

#[derive(Default)]
struct World {
    now: Duration,
    shape: Option<AttnShape>,
    workers: Vec<Capacity>,
    plan: Option<VerifiedPlan>,
    call: Option<Call<()>>,
    sides: Sides,
    sent: BTreeMap<AnyTensor, u64>,
    chunks: u32,
    /// Of each share: cells that it has not sent, last first, and the last that it sent.
    owed: Vec<(Vec<CellId>, Option<CellId>)>,
    members: Option<Membership>,
    session: Option<session::Session>,
}

impl World {
    fn command(&mut self, words: &[&str]) -> Option<Vec<String>> {
        let (verb, rest) = words.split_first()?;
        if let Some(session) = &mut self.session {
            return session.command(words);
        }
        match (*verb, rest) {
            ("shape", _) => {
                let heads = number(rest, "heads")?;
                let head_dim = number(rest, "dim")?;
                let dims = Dims {
                    batch: number(rest, "batch").unwrap_or(1),
                    heads,
                    kv_heads: number(rest, "kv_heads").unwrap_or(heads),
                    queries: number(rest, "queries")?,
                    keys: number(rest, "keys")?,
                    head_dim,
                    value_dim: number(rest, "value_dim").unwrap_or(head_dim),
                };
                self.shape = Some(AttnShape::new(dims).unwrap());
                Some(Vec::new())
            }
            ("worker", [name, ..]) => {
                self.workers.push(Capacity {
                    id: id(name),
                    gflops: number(rest, "gflops")? as f64,
                    free_bytes: number(rest, "free").unwrap_or(1 << 40),
                });
                Some(Vec::new())
            }
            ("mask" | "bias", dims) => {
                let (tensor, element) = match *verb {
                    "mask" => (SideTensor::Mask, Element::Bool),
                    _ => (SideTensor::Bias, Element::Float(Dtype::F32)),
                };
                let dims: Vec<usize> = dims.iter().map(|dim| dim.parse().unwrap()).collect();
                let layout = SideLayout::dense(tensor, element, dims.try_into().ok()?, &self.shape?);
                let layouts = self.sides.iter().copied().chain([layout.unwrap()]);
                self.sides = Sides::new(layouts.collect()).unwrap();
                Some(Vec::new())
            }
            ("plan", _) => Some(self.make_plan(rest)),
            ("begin", []) if self.call.is_none() => {
                self.begin();
                Some(Vec::new())
            }
            ("begin", []) => Some(self.event(CallEvent::Begin)),
            ("chunk", [index, tensor, len]) => {
                Some(self.chunk(index.parse().ok()?, tensor_named(tensor)?, len.parse().ok()?))
            }
            ("send", []) => {
                let shape = self.shape?;
                let mut output = Vec::new();
                let sides: Vec<(AnyTensor, u64)> =
                    self.sides.iter().map(|side| (side.tensor().into(), side.bytes())).collect();
                let operands = Tensor::ALL.map(|tensor| (tensor.into(), tensor.bytes(&shape, 4)));
                for (tensor, need) in sides.into_iter().chain(operands) {
                    let left = need - self.sent.get(&tensor).copied().unwrap_or(0);
                    if left > 0 {
                        output.extend(self.chunk(self.chunks, tensor, left as usize));
                    }
                }
                Some(output)
            }
            ("commit", []) => {
                Some(self.event(CallEvent::Commit { chunks: self.chunks, bytes: self.sent.values().sum() }))
            }
            ("commit", [chunks, bytes]) => Some(
                self.event(CallEvent::Commit { chunks: chunks.parse().ok()?, bytes: bytes.parse().ok()? }),
            ),
            ("end", []) => Some(self.event(CallEvent::StreamEnded)),
            ("gone", []) => Some(self.event(CallEvent::ClientGone)),
            ("work", [name, cells @ ..]) => {
                let share = self.share(name)?;
                let cells = cells.first().map_or(usize::MAX, |cells| cells.parse().unwrap());
                let mut output = Vec::new();
                for _ in 0..cells {
                    let Some(cell) = self.owed[share].0.pop() else { break };
                    self.owed[share].1 = Some(cell);
                    output.extend(self.event(CallEvent::Partial { share, cell, part: () }));
                }
                Some(output)
            }
            ("again", [name]) => {
                let share = self.share(name)?;
                let cell = self.owed[share].1?;
                Some(self.event(CallEvent::Partial { share, cell, part: () }))
            }
            ("finished", [name]) => Some(self.event(CallEvent::Finished { share: self.share(name)? })),
            ("lost", [name]) => Some(self.event(CallEvent::WorkerLost { share: self.share(name)? })),
            ("failed", [name, what @ ..]) => {
                Some(self.event(CallEvent::ShareFailed { share: self.share(name)?, what: what.join(" ") }))
            }
            ("cluster", _) => {
                let (first, last) = text(rest, "wire")?.split_once("..")?;
                let rules = Rules {
                    wire_versions: first.parse().ok()?..=last.parse().ok()?,
                    kernel_id: text(rest, "kernel")?.to_owned(),
                };
                self.members = Some(Membership::new(rules, self.now));
                Some(Vec::new())
            }
            ("join", [name, incarnation, ..]) => Some(self.member(MemberEvent::Joined(Facts {
                id: id(name),
                incarnation: incarnation.parse().ok()?,
                wire_version: number(rest, "wire").unwrap_or(1) as u32,
                kernel_id: text(rest, "kernel").unwrap_or("c1-f32").to_owned(),
            }))),
            ("beat", [name, incarnation, draining @ ..]) => Some(self.member(MemberEvent::Beat {
                id: id(name),
                incarnation: incarnation.parse().ok()?,
                draining: draining == ["draining"],
            })),
            ("closed", [name, incarnation]) => {
                Some(self.member(MemberEvent::StreamClosed {
                    id: id(name),
                    incarnation: incarnation.parse().ok()?,
                }))
            }
            ("wait", [ms, beating @ ..]) => Some(self.wait(ms.parse().ok()?, beating)),
            ("freeze", [ms]) => {
                self.now += Duration::from_millis(ms.parse().ok()?);
                Some(Vec::new())
            }
            ("session", _) => {
                self.session = Some(session::Session::open(rest)?);
                Some(Vec::new())
            }
            ("who", []) => Some(self.who()),
            _ => None,
        }
    }

    fn make_plan(&mut self, words: &[&str]) -> Vec<String> {
        let shape = self.shape.unwrap();
        let workers = match (number(words, "at-most"), number(words, "exactly")) {
            (Some(most), _) => WorkerChoice::AtMost(most as usize),
            (_, Some(exactly)) => WorkerChoice::Exactly(exactly as usize),
            _ => WorkerChoice::Auto,
        };
        let operator = Operator::plain(1.0, Causal::None).into();
        let sides = self.sides.clone();
        let req = PlanRequest { shape, operator, outputs: None, dtype: Dtype::F32, sides, workers };
        let plan = match plan(&req, &self.workers, &CostModel::default()) {
            Ok(plan) => plan,
            Err(error) => return vec![format!("refused: {error}")],
        };
        let plan = plan.verify(&shape).unwrap();
        let mut output = vec![plan.reason.clone()];
        for share in &plan.shares {
            let pieces: Vec<String> = share
                .pieces
                .iter()
                .map(|piece| {
                    let nodes: Vec<String> = filled_nodes(piece.slots.clone(), shape.n_keys())
                        .iter()
                        .map(|(node, keys)| format!("{}/{}={keys}", node.level(), node.index()))
                        .collect();
                    format!("groups {:?} slots {:?} nodes {}", piece.groups, piece.slots, nodes.join(" "))
                })
                .collect();
            let (worker, kv, resident) = (&share.worker, share.kv_bytes, share.resident_bytes);
            output.push(format!("{worker}: {}; kv {kv} resident {resident}", pieces.join("; ")));
        }
        output.push(format!("{} keys once, {} tokens per cell", plan.keys(), plan.tokens_per_cell));
        self.plan = Some(plan);
        output
    }

    fn begin(&mut self) {
        let (plan, shape) = (self.plan.as_ref().unwrap(), self.shape.unwrap());
        self.call = Some(Call::new(plan, 4, &self.sides, None, self.now));
        for share in &plan.shares {
            let mut cells = cells(&share.pieces, &shape, plan.tokens_per_cell);
            cells.reverse();
            self.owed.push((cells, None));
        }
    }

    fn chunk(&mut self, index: u32, tensor: AnyTensor, len: usize) -> Vec<String> {
        *self.sent.entry(tensor).or_default() += len as u64;
        self.chunks += 1;
        self.event(CallEvent::ChunkIn { index, tensor, offset: None, len })
    }

    fn share(&self, name: &str) -> Option<usize> {
        self.plan.as_ref()?.shares.iter().position(|share| share.worker.as_str() == name)
    }

    fn event(&mut self, event: CallEvent<()>) -> Vec<String> {
        let actions = self.call.as_mut().unwrap().handle(event, self.now);
        actions.iter().map(|action| self.describe(action)).collect()
    }

    fn describe(&self, action: &CallAction<()>) -> String {
        match action {
            CallAction::Forward { tensor, runs } => {
                let mut bytes = BTreeMap::<usize, (usize, usize)>::new();
                for run in runs {
                    let (n_runs, n_bytes) = bytes.entry(run.share).or_default();
                    (*n_runs, *n_bytes) = (*n_runs + 1, *n_bytes + run.bytes.len());
                }
                let name = |share: usize| &self.plan.as_ref().unwrap().shares[share].worker;
                let to: Vec<String> = bytes
                    .iter()
                    .map(|(share, (runs, bytes))| format!("{} {bytes} bytes in {runs}", name(*share)))
                    .collect();
                format!("forward {tensor}: {}", to.join(", "))
            }
            CallAction::ForwardSide { tensor, parts } => {
                let to = parts.iter().map(|part| {
                    let name = &self.plan.as_ref().unwrap().shares[part.share].worker;
                    let bytes: usize = part.runs.iter().map(|run| run.len()).sum();
                    let (at, place, runs) = (part.part, part.offset, part.runs.len());
                    format!("{name} {bytes} bytes in {runs} at {place} of part {at}")
                });
                format!("forward {tensor}: {}", to.collect::<Vec<_>>().join(", "))
            }
            CallAction::CommitShares => "commit shares".to_owned(),
            CallAction::Emit(ready) => {
                let parts: Vec<String> = ready
                    .parts
                    .iter()
                    .map(|(node, ())| format!("{}/{}", node.level(), node.index()))
                    .collect();
                format!("emit group {} tokens {:?} from {}", ready.group, ready.tokens, parts.join(" "))
            }
            CallAction::EmitReport(id) => {
                format!("report on group {} tokens from {}", id.group, id.first_token)
            }
            CallAction::CancelShares => "cancel shares".to_owned(),
            CallAction::Fail(error) if error.is_retryable() => format!("fail, retryable: {error}"),
            CallAction::Fail(error) => format!("fail: {error}"),
            CallAction::Complete => "complete".to_owned(),
        }
    }

    fn member(&mut self, event: MemberEvent) -> Vec<String> {
        let describe = |action: MemberAction| match action.change {
            attnd_plan::MemberChange::Reject(why) => {
                format!("{:?} {}:{} reject: {why}", self.now, action.id, action.incarnation)
            }
            change => format!("{:?} {}:{} {change:?}", self.now, action.id, action.incarnation),
        };
        self.members.as_mut().unwrap().handle(event, self.now).into_iter().map(describe).collect()
    }

    fn wait(&mut self, ms: u64, beating: &[&str]) -> Vec<String> {
        let end = self.now + Duration::from_millis(ms);
        let every = number(beating, "every").map_or(HEARTBEAT, Duration::from_millis);
        let mut output = Vec::new();
        while self.now < end {
            self.now = end.min(self.now + every);
            if self.members.is_some() {
                for (name, incarnation) in beating.iter().filter_map(|who| who.split_once(':')) {
                    let incarnation = incarnation.parse().unwrap();
                    output.extend(self.member(MemberEvent::Beat {
                        id: id(name),
                        incarnation,
                        draining: false,
                    }));
                }
                output.extend(self.member(MemberEvent::Tick));
            }
            if self.call.is_some() {
                output.extend(self.event(CallEvent::Tick));
            }
        }
        output
    }

    fn who(&self) -> Vec<String> {
        let members = self.members.as_ref().unwrap();
        let names = ["a", "b", "c"].map(id);
        let state = |id: &WorkerId| {
            let (state, silence) = members.state(id, self.now)?;
            Some(format!("{id} {} silent {silence:?}", state.as_str()))
        };
        let usable: Vec<&str> = members.usable().map(WorkerId::as_str).collect();
        let mut output: Vec<String> = names.iter().filter_map(state).collect();
        output.push(format!("usable: {}", usable.join(" ")).trim_end().to_owned());
        output
    }
}

fn id(name: &str) -> WorkerId {
    WorkerId::new(name).unwrap()
}

fn text<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn number(words: &[&str], name: &str) -> Option<u64> {
    text(words, name)?.parse().ok()
}

fn tensor_named(name: &str) -> Option<AnyTensor> {
    let sides = SideTensor::ALL.map(AnyTensor::from);
    Tensor::ALL.map(AnyTensor::from).into_iter().chain(sides).find(|tensor| tensor.to_string() == name)
}
