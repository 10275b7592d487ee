//! What a session answers, row by row of what may be asked of it wrongly, and what becomes of its ops when replicas are lost.

use std::collections::{BTreeMap, VecDeque};

use super::*;
use crate::WorkerId;
use crate::session::op::{Answer, Record};
use crate::session::replica::{Replica, Verdict};
use crate::session::spec::{DEFAULT_TTL, SessionSpec};

type Event = LedgerEvent<&'static str>;
type Action = LedgerAction<&'static str>;
type Error = LedgerError<&'static str>;

fn holder(name: &str) -> Holder {
    Holder { worker: WorkerId::new(name).unwrap(), incarnation: 1 }
}

fn spec(replicas: usize, acks: usize) -> SessionSpec {
    SessionSpec {
        layers: 2,
        heads: 2,
        kv_heads: 2,
        head_dim: 4,
        value_dim: 4,
        dtype: attnd_kernel::Dtype::F32,
        storage: attnd_kernel::Storage::F32,
        value_is_key_prefix: false,
        replicas,
        acks,
        ttl: DEFAULT_TTL,
        max_tokens: 1_048_576,
        allow_same_host: false,
    }
}

/// A session on workers that answer at once, unless they are silent.
struct Cluster {
    ledger: Ledger<&'static str>,
    replicas: BTreeMap<(usize, Holder), Replica>,
    silent: Vec<Holder>,
    refusing: Vec<Holder>,
    saves: bool,
    /// What is to be done, in order; what comes of it is done behind it.
    queue: VecDeque<Action>,
    is_busy: bool,
    said: Vec<Action>,
    answers: Vec<(u64, Result<Answer, Error>)>,
}

impl Cluster {
    /// Shards of these holders, as in `&["ab", "cd"]`.
    fn new(acks: usize, shards: &[&str]) -> Self {
        let holders = |shard: &&str| shard.chars().map(|name| holder(&name.to_string())).collect();
        let shards: Vec<Vec<Holder>> = shards.iter().map(holders).collect();
        let replica = |(shard, holder): (usize, &Holder)| ((shard, holder.clone()), Replica::new(2, 1));
        let each = shards.iter().enumerate().flat_map(|(shard, all)| all.iter().map(move |one| (shard, one)));
        Self {
            replicas: each.map(replica).collect(),
            ledger: Ledger::new(&spec(shards[0].len(), acks), shards, Duration::ZERO),
            silent: Vec::new(),
            refusing: Vec::new(),
            saves: true,
            queue: VecDeque::new(),
            is_busy: false,
            said: Vec::new(),
            answers: Vec::new(),
        }
    }

    fn request(&self, seq: u64, ask: Ask) -> Request {
        Request { writer_epoch: self.ledger.writer_epoch(), seq, digest: ask.digest(seq as u32), ask }
    }

    fn op(&mut self, seq: u64, ask: Ask) -> Result<Begun, Error> {
        let begun = self.ledger.begin(&self.request(seq, ask))?;
        if let Begun::Started(op) | Begun::Resumed(op) = begun {
            let generation = self.ledger.generation();
            let missing: Vec<_> =
                self.ledger.missing().map(|(shard, to, epoch)| (shard, to.clone(), epoch)).collect();
            let send = |(shard, holder, epoch)| Action::Send { shard, holder, epoch, generation, op };
            self.run(missing.into_iter().map(send).collect());
        }
        Ok(begun)
    }

    fn append(&mut self, seq: u64, tokens: usize) -> Result<Begun, Error> {
        self.op(seq, Ask::Append { layer: 0, base_len: None, tokens })
    }

    fn refused(&mut self, seq: u64, ask: Ask) -> String {
        let error = self.op(seq, ask).unwrap_err();
        assert_eq!(error.outcome(), Outcome::NotExecuted);
        error.to_string()
    }

    fn tell(&mut self, event: Event) {
        let actions = self.ledger.handle(event);
        self.run(actions);
    }

    fn run(&mut self, actions: Vec<Action>) {
        self.queue.extend(actions);
        if std::mem::replace(&mut self.is_busy, true) {
            return;
        }
        while let Some(action) = self.queue.pop_front() {
            self.act(action);
        }
        self.is_busy = false;
    }

    fn act(&mut self, action: Action) {
        self.said.push(action.clone());
        let replica = |replicas: &mut BTreeMap<_, Replica>, shard: usize, holder: &Holder| {
            replicas.entry((shard, holder.clone())).or_insert_with(|| Replica::new(2, 1)).clone()
        };
        match action {
            Action::Send { shard, holder, epoch, generation, op } if !self.silent.contains(&holder) => {
                let mut held = replica(&mut self.replicas, shard, &holder);
                let seq = op.seq;
                if self.refusing.contains(&holder) {
                    return self.tell(Event::Refused {
                        shard,
                        holder,
                        epoch,
                        seq,
                        is_final: true,
                        why: "KV_BUDGET",
                    });
                }
                if held.begin(epoch, generation, &op).unwrap() == Verdict::Apply {
                    held.apply(&op, shard as u32);
                }
                let state = held.state();
                self.replicas.insert((shard, holder.clone()), held);
                self.tell(Event::Applied { shard, holder, seq, state });
            }
            Action::Undo { shard, holder, epoch, seq, digest } if !self.silent.contains(&holder) => {
                let mut held = replica(&mut self.replicas, shard, &holder);
                held.undo(epoch, seq, digest).unwrap();
                let state = held.state();
                self.replicas.insert((shard, holder.clone()), held);
                self.tell(Event::Undone { shard, holder, seq, state });
            }
            Action::Fence { shard, holder, epoch } if !self.silent.contains(&holder) => {
                let mut held = replica(&mut self.replicas, shard, &holder);
                held.fence(epoch).unwrap();
                let state = held.state();
                self.replicas.insert((shard, holder.clone()), held);
                self.tell(Event::Fenced { shard, holder, state });
            }
            Action::Copy { shard, from, to, .. } if !self.silent.contains(&to) => {
                let held = replica(&mut self.replicas, shard, &from);
                let state = held.state();
                self.replicas.insert((shard, to.clone()), held);
                self.tell(Event::Copied { shard, holder: to, state });
            }
            Action::SaveMembers { shard, epoch, .. } if self.saves => {
                self.tell(Event::Saved { shard, epoch })
            }
            Action::Answer { seq, result } => self.answers.push((seq, result)),
            Action::AskRecords { shard, holder, .. } => {
                let records: Vec<Record> = self.replicas[&(shard, holder)].records().collect();
                self.tell(Event::Records(records));
            }
            _ => {}
        }
    }

    /// The same cluster under a coordinator that has just started.
    fn restart(&mut self, shards: &[(u64, &str)]) {
        let saved = shards.iter().map(|(epoch, names)| SavedShard {
            epoch: *epoch,
            members: names.chars().map(|name| holder(&name.to_string())).collect(),
        });
        let replicas = self.ledger.replicas;
        let (ledger, actions) = Ledger::recover(
            &spec(replicas, self.ledger.acks),
            self.ledger.writer_epoch,
            saved.collect(),
            Duration::ZERO,
        );
        self.ledger = ledger;
        self.run(actions);
    }
}

const TRUNCATE: Ask = Ask::Truncate { len: 10 };

mod forks;
mod late;
mod moves;
mod reads;

#[test]
fn rows_51_to_58_ops_that_can_not_be() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    for seq in 1..=17 {
        cluster.append(seq, 8).unwrap();
    }
    assert_eq!(cluster.answers.len(), 17);
    let append = |base_len| Ask::Append { layer: 0, base_len, tokens: 1 };
    assert_eq!(cluster.refused(0, append(None)), "must be >= 1");
    assert_eq!(cluster.refused(20, append(None)), "expected 18, got 20");
    let answer = Answer { len: 136, generation: 0, child: None };
    assert_eq!(cluster.append(17, 8), Ok(Begun::Replayed(answer)));
    assert_eq!(cluster.refused(17, append(None)), "17");
    assert_eq!(cluster.refused(18, append(Some(120))), "committed 136, base_len 120");
    let beyond = Ask::Append { layer: 2, base_len: None, tokens: 1 };
    assert_eq!(cluster.refused(18, beyond), "layer 2 of 2");
    assert_eq!(cluster.refused(18, Ask::Append { layer: 0, base_len: None, tokens: 0 }), "tokens");
    assert_eq!(
        cluster.refused(18, Ask::Append { layer: 1, base_len: None, tokens: 1_048_577 }),
        "0 + 1048577"
    );
    assert_eq!(cluster.refused(18, Ask::Truncate { len: 200 }), "200 > 136");
    let (second, third) = (cluster.ledger.take_writer().0, cluster.ledger.take_writer().0);
    assert_eq!((second, third), (2, 3));
    cluster.ledger.take_writer();
    let stale = Request { writer_epoch: 3, ..cluster.request(18, append(None)) };
    assert_eq!(cluster.ledger.begin(&stale).unwrap_err().to_string(), "writer_epoch 3 < 4");
    let unknown = Request { writer_epoch: 5, ..stale };
    assert_eq!(cluster.ledger.begin(&unknown).unwrap_err().to_string(), "writer_epoch 5 > 4");
    // What is refused for what it is, is refused before its bytes are here.
    assert_eq!(
        cluster.ledger.check(4, 18, &append(Some(120))).unwrap_err().to_string(),
        "committed 136, base_len 120"
    );
    assert_eq!(cluster.ledger.check(4, 18, &append(None)), Ok(()));
    assert_eq!(cluster.ledger.check(4, 17, &append(None)), Ok(()));
}

#[test]
fn row_55_an_op_older_than_all_that_are_remembered() {
    let mut cluster = Cluster::new(1, &["a"]);
    for seq in 1..=1977 {
        cluster.append(seq, 1).unwrap();
    }
    assert_eq!(cluster.refused(3, Ask::Append { layer: 0, base_len: None, tokens: 1 }), "3 < 954");
}

#[test]
fn row_67_a_shard_that_recovers_takes_no_ops_and_is_read() {
    let mut cluster = Cluster::new(2, &["abc", "abc"]);
    cluster.append(1, 4).unwrap();
    cluster.saves = false;
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!((cluster.ledger.phase(0), cluster.ledger.epoch(0)), (Phase::Recovering, 2));
    assert_eq!(cluster.append(2, 1), Err(Error::Recovering { is_in_flight: false }));
    assert_eq!(cluster.ledger.check_read(&ReadRequest::default()), Ok(Read { generation: 0, at_len: 4 }));
    assert_eq!(cluster.ledger.computing(0).next(), Some(&holder("b")));
    for shard in 0..2 {
        cluster.tell(Event::Saved { shard, epoch: 2 });
    }
    assert_eq!(cluster.ledger.phase(0), Phase::Open);
    assert!(matches!(cluster.append(2, 1), Ok(Begun::Started(_))));
    assert_eq!(cluster.answers.len(), 2);
}

#[test]
fn row_68_too_few_replicas_to_acknowledge() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.append(1, 4).unwrap();
    cluster.tell(Event::Lost(holder("d")));
    assert_eq!((cluster.ledger.phase(0), cluster.ledger.phase(1)), (Phase::Open, Phase::Degraded));
    assert!(cluster.said.contains(&Action::NeedReplica { shard: 1, missing: 1 }));
    let ask = Ask::Append { layer: 0, base_len: None, tokens: 1 };
    assert_eq!(cluster.refused(2, ask), "1 of 2");
    assert!(cluster.ledger.check_read(&ReadRequest::default()).is_ok());
    cluster.tell(Event::Replacement { shard: 1, holder: holder("e") });
    assert_eq!((cluster.ledger.phase(1), cluster.ledger.epoch(1)), (Phase::Open, 3));
    cluster.append(2, 1).unwrap();
    assert_eq!(cluster.replicas[&(1, holder("e"))].tokens(), [5, 0]);
}

#[test]
fn row_68_an_op_in_flight_is_finished_by_its_retry() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.silent = vec![holder("d")];
    cluster.append(1, 4).unwrap();
    assert!(cluster.answers.is_empty());
    cluster.tell(Event::Lost(holder("d")));
    let error = Error::UnderReplicated { have: 1, need: 2, is_in_flight: true };
    assert_eq!((cluster.answers.pop(), error.outcome()), (Some((1, Err(error.clone()))), Outcome::Unknown));
    assert_eq!(cluster.append(1, 4), Err(error));
    // Another op can't have its number.
    assert_eq!(cluster.append(1, 3), Err(Error::SeqReused { seq: 1 }));
    // The replica that it is copied from has it, so it has happened by now.
    cluster.tell(Event::Replacement { shard: 1, holder: holder("e") });
    let answer = Answer { len: 4, generation: 0, child: None };
    assert_eq!(cluster.answers, [(1, Ok(answer))]);
    assert_eq!(cluster.append(1, 4), Ok(Begun::Replayed(answer)));
}

#[test]
fn another_writer_takes_back_what_is_unfinished() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.silent = vec![holder("d")];
    cluster.append(1, 4).unwrap();
    cluster.tell(Event::Lost(holder("d")));
    let (_, actions) = cluster.ledger.take_writer();
    cluster.run(actions);
    assert_eq!(cluster.replicas[&(0, holder("a"))].tokens(), [0, 0]);
    cluster.tell(Event::Replacement { shard: 1, holder: holder("e") });
    cluster.append(1, 3).unwrap();
    assert_eq!(cluster.answers.pop(), Some((1, Ok(Answer { len: 3, generation: 0, child: None }))));
}

#[test]
fn a_writer_waits_for_a_cut_that_cannot_be_taken_back() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.append(1, 40).unwrap();
    assert_eq!(cluster.ledger.check_settled(), Ok(()));
    cluster.silent = vec![holder("d")];
    cluster.op(2, TRUNCATE).unwrap();
    cluster.tell(Event::Lost(holder("d")));
    let (_, actions) = cluster.ledger.take_writer();
    cluster.run(actions);
    let under = Error::UnderReplicated { have: 1, need: 2, is_in_flight: false };
    assert_eq!(cluster.ledger.check_settled(), Err(under));
    cluster.tell(Event::Replacement { shard: 1, holder: holder("e") });
    assert_eq!((cluster.ledger.check_settled(), cluster.ledger.generation()), (Ok(()), 1));
}

#[test]
fn row_69_a_session_without_all_of_its_tokens_is_lost() {
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.append(1, 96).unwrap();
    cluster.silent = vec![holder("b")];
    cluster.append(2, 32).unwrap();
    cluster.silent.clear();
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!(cluster.ledger.phase(0), Phase::Lost);
    let ask = Ask::Append { layer: 0, base_len: None, tokens: 1 };
    assert_eq!(cluster.refused(3, ask), "prefix 96 of 128");
    let error = cluster.ledger.check_read(&ReadRequest::default()).unwrap_err();
    assert_eq!(error.to_string(), "prefix 96 of 128");
}

#[test]
fn a_broken_stream_is_no_lost_session() {
    let mut cluster = Cluster::new(1, &["a"]);
    cluster.append(1, 96).unwrap();
    cluster.tell(Event::Disconnected(holder("a")));
    assert_eq!(cluster.append(2, 1), Err(Error::Recovering { is_in_flight: false }));
    cluster.tell(Event::Joined { shard: 0, holder: holder("a") });
    cluster.append(2, 1).unwrap();
    assert_eq!(cluster.answers.len(), 2);
    cluster.tell(Event::Disconnected(holder("a")));
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!(cluster.append(3, 1).unwrap_err().to_string(), "prefix 0 of 97");
}

#[test]
fn whoever_is_away_is_so_however_often_that_is_said() {
    let mut cluster = Cluster::new(1, &["a"]);
    cluster.append(1, 96).unwrap();
    cluster.tell(Event::Disconnected(holder("a")));
    cluster.tell(Event::Disconnected(holder("a")));
    cluster.tell(Event::Joined { shard: 0, holder: holder("a") });
    cluster.append(2, 1).unwrap();
    assert_eq!(cluster.answers.len(), 2);
}

#[test]
fn a_session_that_is_lost_with_one_shard_is_as_long_as_the_others_say() {
    let mut cluster = Cluster::new(1, &["a", "b"]);
    cluster.append(1, 96).unwrap();
    cluster.silent = vec![holder("a"), holder("b")];
    cluster.restart(&[(1, "a"), (1, "b")]);
    cluster.tell(Event::Disconnected(holder("b")));
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!(cluster.append(2, 1), Err(Error::Recovering { is_in_flight: false }));
    cluster.silent = Vec::new();
    cluster.tell(Event::Joined { shard: 1, holder: holder("b") });
    assert_eq!(cluster.append(2, 1).unwrap_err().to_string(), "prefix 0 of 96");
}

#[test]
fn an_append_that_one_refuses_is_nowhere() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.append(1, 4).unwrap();
    cluster.refusing = vec![holder("c")];
    cluster.append(2, 1000).unwrap();
    assert_eq!(cluster.answers.pop(), Some((2, Err(Error::Refused { why: "KV_BUDGET" }))));
    for ((_, holder), replica) in &cluster.replicas {
        assert_eq!((replica.tokens(), replica.state().op_seq), (&[4, 0][..], 1), "{holder:?}");
    }
    // The number is free, for this op or another one.
    cluster.refusing.clear();
    cluster.append(2, 1).unwrap();
    assert_eq!(cluster.answers.pop(), Some((2, Ok(Answer { len: 5, generation: 0, child: None }))));
}

#[test]
fn bytes_that_can_not_be_had_any_more_are_taken_back() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.silent = vec![holder("b")];
    cluster.append(1, 4).unwrap();
    cluster.silent.clear();
    cluster.tell(Event::Abandoned { seq: 1, why: "STREAM_TRUNCATED" });
    assert_eq!(cluster.answers, [(1, Err(Error::Refused { why: "STREAM_TRUNCATED" }))]);
    assert_eq!(cluster.replicas[&(0, holder("a"))].tokens(), [0, 0]);
}

#[test]
fn a_restart_takes_back_what_only_some_shards_have() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("c"), holder("d")];
    cluster.append(2, 3).unwrap();
    cluster.silent.clear();
    cluster.restart(&[(1, "ab"), (1, "cd")]);
    assert_eq!((cluster.ledger.tokens(), cluster.ledger.next_seq()), (&[4, 0][..], 2));
    assert_eq!(cluster.replicas[&(0, holder("a"))].tokens(), [4, 0]);
    let answer = Answer { len: 4, generation: 0, child: None };
    assert_eq!(cluster.append(1, 4), Ok(Begun::Replayed(answer)));
    cluster.append(2, 3).unwrap();
    assert_eq!(cluster.answers.pop(), Some((2, Ok(Answer { len: 7, generation: 0, child: None }))));
}

#[test]
fn a_restart_finishes_what_has_no_bytes() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.append(1, 40).unwrap();
    cluster.silent = vec![holder("b"), holder("c"), holder("d")];
    cluster.op(2, TRUNCATE).unwrap();
    cluster.silent.clear();
    cluster.restart(&[(1, "ab"), (1, "cd")]);
    assert_eq!((cluster.ledger.tokens(), cluster.ledger.generation()), (&[10, 0][..], 1));
    assert_eq!(cluster.replicas[&(1, holder("d"))].tokens(), [10, 0]);
    assert_eq!(cluster.op(2, TRUNCATE), Ok(Begun::Replayed(Answer { len: 10, generation: 1, child: None })));
}

#[test]
fn a_restart_waits_for_enough_to_know_what_was_acknowledged() {
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("a")];
    cluster.restart(&[(1, "ab")]);
    assert_eq!(cluster.append(2, 1), Err(Error::Recovering { is_in_flight: false }));
    assert_eq!(
        cluster.ledger.check_read(&ReadRequest::default()),
        Err(Error::Recovering { is_in_flight: false })
    );
    // What only `a` may have had is gone with it.
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!(cluster.append(2, 1).unwrap_err().to_string(), "prefix 4 of 4");
}

#[test]
fn who_drains_is_replaced_first() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.tell(Event::Draining(holder("a")));
    assert!(cluster.said.contains(&Action::NeedReplica { shard: 0, missing: 1 }));
    cluster.append(2, 1).unwrap();
    cluster.tell(Event::Replacement { shard: 0, holder: holder("c") });
    let members: Vec<_> = cluster.ledger.members(0).cloned().collect();
    assert_eq!((members, cluster.ledger.phase(0)), (vec![holder("b"), holder("c")], Phase::Open));
    assert!(cluster.said.contains(&Action::Release { shard: 0, holder: holder("a"), epoch: 2 }));
}

#[test]
fn a_straggler_a_window_behind_is_left_out() {
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.silent = vec![holder("b")];
    for seq in 1..=1024 {
        cluster.append(seq, 1).unwrap();
    }
    assert_eq!((cluster.ledger.epoch(0), cluster.ledger.phase(0)), (2, Phase::Open));
    assert!(cluster.said.contains(&Action::NeedReplica { shard: 0, missing: 1 }));
}

#[test]
fn time_runs_out_for_who_is_not_asked_for() {
    let mut cluster = Cluster::new(1, &["a"]);
    cluster.ledger.touch(Duration::from_secs(50));
    assert_eq!(cluster.ledger.idle_since(), Duration::from_secs(50));
    assert!(!cluster.ledger.is_expired(Duration::from_secs(649)));
    assert!(cluster.ledger.is_expired(Duration::from_secs(650)));
    cluster.silent = vec![holder("a")];
    cluster.append(1, 1).unwrap();
    assert!(!cluster.ledger.is_expired(Duration::from_secs(10_000)));
}

#[test]
fn a_worker_that_has_forgotten_its_replica_is_replaced() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.tell(Event::Gone { shard: 0, holder: holder("b"), epoch: 0 });
    assert_eq!(cluster.ledger.phase(0), Phase::Open);
    cluster.tell(Event::Gone { shard: 0, holder: holder("b"), epoch: 1 });
    assert_eq!(cluster.ledger.phase(0), Phase::Degraded);
    cluster.tell(Event::Replacement { shard: 0, holder: holder("b") });
    assert_eq!((cluster.ledger.phase(0), cluster.ledger.epoch(0)), (Phase::Open, 3));
}

#[test]
fn what_a_restart_finds_is_confirmed_before_anybody_is_told() {
    let mut cluster = Cluster::new(2, &["ab", "ab"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("b")];
    cluster.append(2, 3).unwrap();
    // Only `a` has it, and it may die like `b`: whoever had been told would have been told wrong.
    cluster.restart(&[(1, "ab"), (1, "ab")]);
    cluster.tell(Event::Disconnected(holder("b")));
    assert_eq!(cluster.ledger.phase(0), Phase::Degraded);
    assert_eq!(cluster.append(2, 3), Err(Error::UnderReplicated { have: 1, need: 2, is_in_flight: true }));
    let read = |cluster: &Cluster| cluster.ledger.check_read(&ReadRequest::default()).unwrap().at_len;
    assert_eq!(read(&cluster), 4);
    let all = ReadRequest::default();
    for request in [ReadRequest { min_len: 7, ..all }, ReadRequest { at_len: Some(5), ..all }] {
        assert_eq!(cluster.ledger.check_read(&request), Err(Error::Recovering { is_in_flight: false }));
    }
    // From now on it is there, or nothing is.
    cluster.tell(Event::Lost(holder("b")));
    assert_eq!(read(&cluster), 7);
    assert_eq!(cluster.append(2, 3), Err(Error::UnderReplicated { have: 1, need: 2, is_in_flight: true }));
    for shard in 0..2 {
        cluster.tell(Event::Replacement { shard, holder: holder("c") });
    }
    let answer = Answer { len: 7, generation: 0, child: None };
    assert_eq!((cluster.append(2, 3), read(&cluster)), (Ok(Begun::Replayed(answer)), 7));
}

#[test]
fn an_op_is_not_called_undone_while_a_saved_member_may_have_it() {
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.silent = vec![holder("b")];
    cluster.refusing = vec![holder("a")];
    cluster.saves = false;
    cluster.append(1, 4).unwrap();
    assert!(cluster.answers.is_empty());
    // It is gone with what it may have, and the store still has it.
    cluster.tell(Event::Disconnected(holder("b")));
    assert!(cluster.answers.is_empty());
    cluster.tell(Event::Saved { shard: 0, epoch: 2 });
    assert_eq!(cluster.answers, [(1, Err(Error::Refused { why: "KV_BUDGET" }))]);
}

#[test]
fn only_who_was_saved_says_what_was_acknowledged() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 96).unwrap();
    // A copy that was never made a member, of which more was acknowledged since.
    let early = cluster.replicas[&(0, holder("a"))].clone();
    cluster.replicas.insert((0, holder("c")), early);
    cluster.append(2, 32).unwrap();
    cluster.silent = vec![holder("a"), holder("b")];
    cluster.restart(&[(1, "ab")]);
    cluster.tell(Event::Lost(holder("a")));
    cluster.tell(Event::Joined { shard: 0, holder: holder("c") });
    assert_eq!(cluster.append(3, 1), Err(Error::Recovering { is_in_flight: false }));
    cluster.tell(Event::Lost(holder("b")));
    assert_eq!(cluster.ledger.phase(0), Phase::Lost);
}

#[test]
fn a_copy_that_is_whole_survives_its_source() {
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.tell(Event::Lost(holder("b")));
    // The copy gets there, and its source dies before the worker has said so.
    let source = cluster.replicas[&(0, holder("a"))].clone();
    let copy = cluster.ledger.handle(Event::Replacement { shard: 0, holder: holder("c") });
    assert!(matches!(copy[..], [Action::Copy { .. }]));
    cluster.replicas.insert((0, holder("c")), source);
    cluster.tell(Event::Lost(holder("a")));
    assert_eq!((cluster.ledger.phase(0), cluster.ledger.epoch(0)), (Phase::Open, 3));
    cluster.append(2, 1).unwrap();
    assert_eq!(cluster.answers.len(), 2);
}
