//! Sessions in scripts: a ledger, and workers that answer when they are told to.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use attnd_kernel::{Dtype, Storage};
use attnd_plan::WorkerId;
use attnd_plan::session::{
    Ask, Begun, Holder, Ledger, LedgerAction, LedgerEvent, ReadRequest, Replica, ReplicaRefusal, Request,
    SavedShard, SessionSpec, Verdict,
};

use super::number;

type Action = LedgerAction<&'static str>;
type Event = LedgerEvent<&'static str>;

/// A session of one layer, and what waits for each worker.
pub(super) struct Session {
    spec: SessionSpec,
    ledger: Ledger<&'static str>,
    replicas: BTreeMap<(usize, Holder), Replica>,
    waiting: BTreeMap<Holder, VecDeque<Action>>,
    saving: VecDeque<(usize, SavedShard)>,
    store: Vec<SavedShard>,
}

fn holder(name: &str) -> Holder {
    Holder { worker: WorkerId::new(name).unwrap(), incarnation: 1 }
}

impl Session {
    /// `session replicas=2 acks=2 shards=ab,cd`
    pub(super) fn open(words: &[&str]) -> Option<Self> {
        let shards = super::text(words, "shards")?.split(',');
        let shards: Vec<Vec<Holder>> =
            shards.map(|names| names.chars().map(|name| holder(&name.to_string())).collect()).collect();
        let spec = SessionSpec {
            layers: 1,
            heads: 8,
            kv_heads: 8,
            head_dim: 128,
            value_dim: 128,
            dtype: Dtype::F32,
            storage: Storage::F32,
            value_is_key_prefix: false,
            replicas: number(words, "replicas")? as usize,
            acks: number(words, "acks")? as usize,
            ttl: Duration::from_secs(600),
            max_tokens: 1000,
            allow_same_host: false,
        };
        let each = shards
            .iter()
            .enumerate()
            .flat_map(|(shard, all)| all.iter().map(move |one| (shard, one.clone())));
        let replicas = each.map(|at| (at, Replica::new(1, 1))).collect();
        let store = shards.iter().map(|members| SavedShard { epoch: 1, members: members.clone() }).collect();
        let ledger = Ledger::new(&spec, shards, Duration::ZERO);
        Some(Self { spec, ledger, replicas, waiting: BTreeMap::new(), saving: VecDeque::new(), store })
    }

    pub(super) fn command(&mut self, words: &[&str]) -> Option<Vec<String>> {
        match words {
            ["append", seq, tokens] => {
                let ask = Ask::Append { layer: 0, base_len: None, tokens: tokens.parse().ok()? };
                Some(self.begin(seq.parse().ok()?, ask))
            }
            ["truncate", seq, len] => {
                Some(self.begin(seq.parse().ok()?, Ask::Truncate { len: len.parse().ok()? }))
            }
            ["read", words @ ..] => {
                let at_len = number(words, "at").map(|at_len| at_len as usize);
                Some(vec![match self.ledger.check_read(&ReadRequest { at_len, ..ReadRequest::default() }) {
                    Ok(read) => format!("{} tokens of generation {}", read.at_len, read.generation),
                    Err(error) => format!("refused: {error} ({error:?})"),
                }])
            }
            ["work", name] => Some(self.work(&holder(name), false)),
            ["refuse", name] => Some(self.work(&holder(name), true)),
            ["save"] => {
                let (shard, saved) = self.saving.pop_front()?;
                let epoch = saved.epoch;
                self.store[shard] = saved;
                Some(self.tell(Event::Saved { shard, epoch }))
            }
            ["dead", name] => {
                self.replicas.retain(|(_, at), _| *at != holder(name));
                self.waiting.remove(&holder(name));
                Some(self.tell(Event::Lost(holder(name))))
            }
            ["broken", name] => {
                self.waiting.remove(&holder(name));
                Some(self.tell(Event::Disconnected(holder(name))))
            }
            ["back", shard, name] => {
                Some(self.tell(Event::Joined { shard: shard.parse().ok()?, holder: holder(name) }))
            }
            ["replace", shard, name] => {
                Some(self.tell(Event::Replacement { shard: shard.parse().ok()?, holder: holder(name) }))
            }
            ["drain", name] => Some(self.tell(Event::Draining(holder(name)))),
            ["restart"] => {
                self.waiting.clear();
                self.saving.clear();
                let writer_epoch = self.ledger.writer_epoch();
                let (ledger, actions) =
                    Ledger::recover(&self.spec, writer_epoch, self.store.clone(), Duration::ZERO);
                self.ledger = ledger;
                Some(self.act(actions))
            }
            ["shards"] => Some(
                (0..self.ledger.shards())
                    .map(|shard| {
                        let members: Vec<&str> =
                            self.ledger.members(shard).map(|one| one.worker.as_str()).collect();
                        let (phase, epoch) = (self.ledger.phase(shard), self.ledger.epoch(shard));
                        format!("shard {shard} {phase:?} epoch {epoch} members {}", members.join(" "))
                    })
                    .collect(),
            ),
            _ => None,
        }
    }

    fn begin(&mut self, seq: u64, ask: Ask) -> Vec<String> {
        let request = Request { writer_epoch: self.ledger.writer_epoch(), seq, digest: ask.digest(0), ask };
        let op = match self.ledger.begin(&request) {
            Ok(Begun::Started(op) | Begun::Resumed(op)) => op,
            Ok(Begun::Replayed(answer)) => return vec![format!("replayed: {} tokens", answer.len)],
            Err(error) => return vec![format!("refused, {:?}: {error} ({error:?})", error.outcome())],
        };
        let generation = self.ledger.generation();
        let to: Vec<_> = self.ledger.missing().map(|(shard, to, epoch)| (shard, to.clone(), epoch)).collect();
        let send = |(shard, holder, epoch)| Action::Send { shard, holder, epoch, generation, op };
        self.act(to.into_iter().map(send).collect())
    }

    /// All that waits for a worker reaches it, and its answers are heard.
    fn work(&mut self, name: &Holder, refuses: bool) -> Vec<String> {
        let mut output = Vec::new();
        for action in self.waiting.remove(name).unwrap_or_default() {
            let event = self.answer(action, refuses);
            output.extend(event.into_iter().flat_map(|event| self.tell(event)));
        }
        output
    }

    fn answer(&mut self, action: Action, refuses: bool) -> Option<Event> {
        let refused = |shard, holder, epoch, seq, _why: ReplicaRefusal| Event::Refused {
            shard,
            holder,
            epoch,
            seq,
            is_final: false,
            why: "out of step",
        };
        match action {
            Action::Send { shard, holder, epoch, generation, op } => {
                let Some(replica) = self.replicas.get_mut(&(shard, holder.clone())) else {
                    return Some(Event::Gone { shard, holder, epoch });
                };
                match replica.begin(epoch, generation, &op) {
                    Ok(Verdict::Apply) if refuses => {
                        let why = "KV_BUDGET: need 33554432, free 1048576";
                        return Some(Event::Refused {
                            shard,
                            holder,
                            epoch,
                            seq: op.seq,
                            is_final: true,
                            why,
                        });
                    }
                    Ok(Verdict::Apply) => replica.apply(&op, shard as u32),
                    Ok(Verdict::Replayed) => {}
                    Err(why) => return Some(refused(shard, holder, epoch, op.seq, why)),
                }
                Some(Event::Applied { shard, holder, seq: op.seq, state: replica.state() })
            }
            Action::Undo { shard, holder, epoch, seq, digest } => {
                let replica = self.replicas.get_mut(&(shard, holder.clone()))?;
                Some(match replica.undo(epoch, seq, digest) {
                    Ok(_) => Event::Undone { shard, holder, seq, state: replica.state() },
                    Err(why) => refused(shard, holder, epoch, seq, why),
                })
            }
            Action::Fence { shard, holder, epoch } => {
                let Some(replica) = self.replicas.get_mut(&(shard, holder.clone())) else {
                    return Some(Event::Gone { shard, holder, epoch });
                };
                Some(match replica.fence(epoch) {
                    Ok(()) => Event::Fenced { shard, holder, state: replica.state() },
                    Err(_) => Event::FenceRefused { shard, holder, epoch: replica.epoch() },
                })
            }
            Action::Copy { shard, from, to, .. } => {
                let replica = self.replicas.get(&(shard, from))?.clone();
                let state = replica.state();
                self.replicas.insert((shard, to.clone()), replica);
                Some(Event::Copied { shard, holder: to, state })
            }
            Action::Release { shard, holder, epoch } => {
                let at = (shard, holder);
                if self.replicas.get(&at).is_some_and(|replica| replica.check_release(epoch).is_ok()) {
                    self.replicas.remove(&at);
                }
                None
            }
            Action::AskRecords { shard, holder, .. } => {
                let records = self.replicas.get(&(shard, holder))?.records().collect();
                Some(Event::Records(records))
            }
            _ => None,
        }
    }

    fn tell(&mut self, event: Event) -> Vec<String> {
        let actions = self.ledger.handle(event);
        self.act(actions)
    }

    /// Says what is to be done, and has it wait for whoever does it.
    fn act(&mut self, actions: Vec<Action>) -> Vec<String> {
        let mut output = Vec::new();
        for action in actions {
            let (line, to) = match &action {
                Action::Send { shard, holder, epoch, op, .. } => (
                    format!("send op {} to {} shard {shard} epoch {epoch}", op.seq, holder.worker),
                    Some(holder),
                ),
                Action::Undo { shard, holder, epoch, seq, .. } => {
                    (format!("undo op {seq} on {} shard {shard} epoch {epoch}", holder.worker), Some(holder))
                }
                Action::Fence { shard, holder, epoch } => {
                    (format!("fence {} shard {shard} epoch {epoch}", holder.worker), Some(holder))
                }
                Action::Copy { shard, from, to, .. } => {
                    (format!("copy shard {shard} from {} to {}", from.worker, to.worker), Some(to))
                }
                Action::SaveMembers { shard, epoch, members } => {
                    let saved = SavedShard { epoch: *epoch, members: members.clone() };
                    self.saving.push_back((*shard, saved));
                    let names: Vec<&str> = members.iter().map(|one| one.worker.as_str()).collect();
                    (format!("save shard {shard} epoch {epoch} members {}", names.join(" ")), None)
                }
                Action::Answer { seq, result: Ok(answer) } => (
                    format!("answer op {seq}: {} tokens of generation {}", answer.len, answer.generation),
                    None,
                ),
                Action::Answer { seq, result: Err(error) } => {
                    (format!("answer op {seq}, {:?}: {error}", error.outcome()), None)
                }
                Action::NeedReplica { shard, missing } => (format!("shard {shard} needs {missing}"), None),
                Action::Release { shard, holder, epoch } => {
                    (format!("release {} shard {shard} epoch {epoch}", holder.worker), Some(holder))
                }
                Action::AskRecords { shard, holder, .. } => {
                    (format!("ask {} for the ops of shard {shard}", holder.worker), Some(holder))
                }
            };
            output.push(line);
            if let Some(to) = to.cloned() {
                self.waiting.entry(to).or_default().push_back(action);
            }
        }
        output
    }
}
