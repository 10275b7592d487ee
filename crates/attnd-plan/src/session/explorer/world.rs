//! A cluster in one value: a coordinator, its store, workers, streams with what is on its way, and a client. Everything that can happen
//! next is a [`Choice`]; what must hold is checked after each.

use std::collections::VecDeque;
use std::time::Duration;

use super::choice::{Budget, Choice, Omission, Setting};
use super::worker::{Ask as WorkerAsk, Held, Reply, Worker};
use crate::WorkerId;
use crate::session::ledger::{
    Ask, Begun, Ledger, LedgerAction, LedgerError, LedgerEvent, Request, SavedShard,
};
use crate::session::model::Model;
use crate::session::op::{Holder, Op};
use crate::session::replica::Replica;
use crate::session::spec::{DEFAULT_TTL, SessionSpec};

pub(super) const LAYERS: usize = 2;
pub(super) const SHARDS: usize = 2;

/// One stream to a worker, with what is on its way: in order, but nothing is said of others.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    pub(super) worker: usize,
    pub(super) incarnation: u64,
    pub(super) term: u64,
    /// Whether the coordinator still listens.
    pub(super) is_open: bool,
    pub(super) asks: VecDeque<WorkerAsk>,
    pub(super) replies: VecDeque<Reply>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) setting: Setting,
    pub(super) left: Budget,
    pub(super) ledger: Ledger<()>,
    pub(super) term: u64,
    pub(super) store: Vec<SavedShard>,
    pub(super) writer_epoch: u64,
    pub(super) saves: VecDeque<(usize, SavedShard)>,
    pub(super) copies: VecDeque<(usize, Holder, u64, Option<Held>)>,
    pub(super) workers: Vec<Worker>,
    /// Dead, and the coordinator hasn't heard of it.
    pub(super) unburied: Vec<Holder>,
    pub(super) links: Vec<Link>,
    pub(super) model: Model,
    /// The client waits for an answer.
    pub(super) is_waiting: bool,
    pub(super) next_content: u32,
}

pub(super) fn holder(worker: usize, incarnation: u64) -> Holder {
    Holder { worker: WorkerId::new(["a", "b", "c", "d", "e"][worker]).unwrap(), incarnation }
}

pub(super) fn spec(replicas: usize, acks: usize) -> SessionSpec {
    SessionSpec {
        layers: LAYERS,
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
        max_tokens: 1000,
        allow_same_host: false,
    }
}

impl World {
    pub(super) fn new(setting: Setting) -> Self {
        let holders: Vec<Holder> = (0..setting.replicas).map(|worker| holder(worker, 1)).collect();
        let held = |worker: usize| (worker < setting.replicas).then(|| Held::new(LAYERS));
        let workers = (0..setting.workers).map(|worker| Worker {
            holder: holder(worker, 1),
            is_alive: true,
            is_connected: true,
            terms: 0,
            shards: vec![held(worker); SHARDS],
        });
        let spec = spec(setting.replicas, setting.ledger_acks());
        let mut ledger = Ledger::new(&spec, vec![holders.clone(); SHARDS], Duration::ZERO);
        ledger.skips_fences = setting.omission == Some(Omission::FenceBeforeCopy);
        let mut world = Self {
            setting,
            left: setting.budget,
            ledger,
            term: 1,
            store: vec![SavedShard { epoch: 1, members: holders }; SHARDS],
            writer_epoch: 1,
            saves: VecDeque::new(),
            copies: VecDeque::new(),
            workers: workers.collect(),
            unburied: Vec::new(),
            links: Vec::new(),
            model: Model::new(LAYERS),
            is_waiting: false,
            next_content: 1,
        };
        (0..setting.workers).for_each(|worker| world.connect(worker));
        world
    }

    /// Streams of their own for rows and for all else.
    fn connect(&mut self, worker: usize) {
        let incarnation = self.workers[worker].holder.incarnation;
        for _ in 0..2 {
            self.links.push(Link {
                worker,
                incarnation,
                term: self.term,
                is_open: true,
                asks: VecDeque::new(),
                replies: VecDeque::new(),
            });
        }
        self.workers[worker].is_connected = true;
    }

    fn disconnect(&mut self, worker: usize) {
        self.links.iter_mut().filter(|link| link.worker == worker).for_each(|link| link.is_open = false);
        self.workers[worker].is_connected = false;
    }

    fn forget_empty_links(&mut self) {
        self.links.retain(|link| link.is_open || !link.asks.is_empty() || !link.replies.is_empty());
    }

    pub(super) fn index_of(&self, holder: &Holder) -> Option<usize> {
        self.workers.iter().position(|worker| worker.holder == *holder)
    }

    fn send(&mut self, to: &Holder, ask: WorkerAsk) {
        let Some(worker) = self.index_of(to) else { return };
        let bulk = usize::from(!matches!(ask, WorkerAsk::Op { .. } | WorkerAsk::Undo { .. }));
        let mut open = self.links.iter_mut().filter(|link| link.worker == worker && link.is_open);
        if let Some(link) = open.nth(bulk) {
            link.asks.push_back(ask);
        }
    }

    /// Does it; returns what is wrong then.
    pub(super) fn choose(&mut self, choice: Choice) -> Result<(), String> {
        match choice {
            Choice::Deliver { link, refuses } => {
                let (index, term) = (self.links[link].worker, self.links[link].term);
                let ask = self.links[link].asks.pop_front().ok_or("nothing to deliver")?;
                self.left.refusals -= usize::from(refuses);
                let reply = self.workers[index].answer(term, &ask, refuses, self.setting.omission);
                self.links[link].replies.extend(reply);
            }
            Choice::Hear { link } => {
                let holder = holder(self.links[link].worker, self.links[link].incarnation);
                let reply = self.links[link].replies.pop_front().ok_or("nothing to hear")?;
                self.tell(match reply {
                    Reply::Applied { shard, seq, state } => {
                        LedgerEvent::Applied { shard, holder, seq, state }
                    }
                    Reply::Refused { shard, epoch, seq, is_final } => {
                        LedgerEvent::Refused { shard, holder, epoch, seq, is_final, why: () }
                    }
                    Reply::Undone { shard, seq, state } => LedgerEvent::Undone { shard, holder, seq, state },
                    Reply::Fenced { shard, state } => LedgerEvent::Fenced { shard, holder, state },
                    Reply::FenceRefused { shard, epoch } => {
                        LedgerEvent::FenceRefused { shard, holder, epoch }
                    }
                    Reply::Gone { shard, epoch } => LedgerEvent::Gone { shard, holder, epoch },
                    Reply::Copied { shard, state } => LedgerEvent::Copied { shard, holder, state },
                })?;
            }
            Choice::Save => {
                let (shard, saved) = self.saves.pop_front().ok_or("nothing to save")?;
                let epoch = saved.epoch;
                self.save(shard, saved)?;
                self.tell(LedgerEvent::Saved { shard, epoch })?;
            }
            Choice::Copy => self.copy()?,
            Choice::Request { again } => self.request(again)?,
            Choice::Abandon => {
                self.left.refusals -= 1;
                let seq = self.ledger.next_seq();
                self.tell(LedgerEvent::Abandoned { seq, why: () })?;
            }
            Choice::TakeWriter => {
                self.left.writers -= 1;
                let (writer_epoch, actions) = self.ledger.take_writer();
                self.writer_epoch = writer_epoch;
                self.is_waiting = false;
                self.act(actions)?;
            }
            Choice::Replace { shard, worker } => {
                let holder = self.workers[worker].holder.clone();
                self.tell(LedgerEvent::Replacement { shard, holder })?;
            }
            Choice::Crash { worker } => {
                self.left.crashes -= 1;
                let dead = &mut self.workers[worker];
                dead.is_alive = false;
                dead.shards = vec![None; SHARDS];
                self.unburied.push(dead.holder.clone());
            }
            Choice::Bury { worker } => {
                let holder = self.workers[worker].holder.clone();
                self.unburied.retain(|dead| *dead != holder);
                self.disconnect(worker);
                self.tell(LedgerEvent::Lost(holder))?;
            }
            Choice::Revive { worker } => {
                let dead = &mut self.workers[worker];
                dead.holder.incarnation += 1;
                dead.is_alive = true;
                dead.terms = 0;
                self.connect(worker);
            }
            Choice::Break { worker } => {
                self.left.breaks -= 1;
                self.disconnect(worker);
                self.tell(LedgerEvent::Disconnected(self.workers[worker].holder.clone()))?;
            }
            Choice::Reconnect { worker } => {
                self.connect(worker);
                for shard in 0..SHARDS {
                    let holder = self.workers[worker].holder.clone();
                    let is_known = self.ledger.holders(shard).any(|known| *known == holder);
                    if is_known || self.workers[worker].shards[shard].is_some() {
                        self.tell(LedgerEvent::Joined { shard, holder })?;
                    }
                }
            }
            Choice::Drain { worker } => {
                self.left.drains -= 1;
                self.tell(LedgerEvent::Draining(self.workers[worker].holder.clone()))?;
            }
            Choice::Move { shard, from, to } => {
                self.left.moves -= 1;
                let [from, to] = [from, to].map(|worker| self.workers[worker].holder.clone());
                self.tell(LedgerEvent::Move { shard, from, to })?;
            }
            Choice::Stay { shard, worker } => {
                let holder = self.workers[worker].holder.clone();
                self.tell(LedgerEvent::Stays { shard, holder })?;
            }
            Choice::Restart { landed } => self.restart(landed)?,
        }
        self.forget_empty_links();
        self.check()
    }

    fn save(&mut self, shard: usize, saved: SavedShard) -> Result<(), String> {
        if saved.epoch <= self.store[shard].epoch {
            return Err(format!("I1: epoch {} is saved over {:?}", saved.epoch, self.store[shard]));
        }
        self.store[shard] = saved;
        Ok(())
    }

    /// What `from` has now, which is on its way to `to`; nothing, if it is gone.
    fn begin_copy(&mut self, shard: usize, from: &Holder, to: Holder, epoch: u64) {
        let source = self.index_of(from).map(|from| &self.workers[from]);
        let held = source.filter(|from| from.is_alive && from.is_connected);
        let held = held.and_then(|from| from.shards[shard].clone());
        self.copies.push_back((shard, to, epoch, held));
    }

    /// A copy reaches its worker, unless that is gone, or of a higher epoch by now.
    fn copy(&mut self) -> Result<(), String> {
        let (shard, to, epoch, held) = self.copies.pop_front().ok_or("nothing to copy")?;
        let reaches = |to: &usize| self.workers[*to].is_alive && self.workers[*to].is_connected;
        let (Some(mut held), Some(target)) = (held, self.index_of(&to).filter(reaches)) else {
            return self.tell(LedgerEvent::CopyFailed { shard, holder: to });
        };
        let has = self.workers[target].shards[shard].as_ref().map_or(0, |held| held.replica.epoch());
        let mut replica = Replica::restore(&held.replica.snapshot()).map_err(|error| error.to_string())?;
        if has > epoch || replica.fence(epoch).is_err() {
            return self.tell(LedgerEvent::CopyFailed { shard, holder: to });
        }
        held.replica = replica;
        let state = held.replica.state();
        self.workers[target].shards[shard] = Some(held);
        let control = self.links.iter_mut().filter(|link| link.worker == target && link.is_open).nth(1);
        control.ok_or("no stream")?.replies.push_back(Reply::Copied { shard, state });
        Ok(())
    }

    pub(super) fn request(&mut self, again: bool) -> Result<(), String> {
        let mut request = match self.model.open() {
            Some(request) if again => {
                self.left.retries -= usize::from(self.is_waiting);
                request
            }
            _ => {
                self.left.ops -= 1;
                let seq = self.model.told().len() as u64 + 1;
                let append = |layer| Ask::Append { layer, base_len: None, tokens: 1 + layer };
                let ask = match seq % 5 {
                    3 => Ask::Truncate { len: 1.min(self.model.longest()) },
                    4 => Ask::Fork { child: seq },
                    seq => append(usize::from(seq == 2)),
                };
                self.next_content += 1;
                Request { writer_epoch: 0, seq, digest: ask.digest(self.next_content), ask }
            }
        };
        if !again {
            self.model.ask(request);
        }
        request.writer_epoch = self.writer_epoch;
        self.is_waiting = true;
        match self.ledger.begin(&request) {
            Ok(Begun::Started(op) | Begun::Resumed(op)) => self.send_all(op),
            Ok(Begun::Replayed(answer)) => {
                self.is_waiting = false;
                self.model.acknowledge(request.seq, answer)?;
            }
            // Nothing of a request that may be in flight is known by its refusal.
            Err(
                LedgerError::SessionLost { .. }
                | LedgerError::Recovering { .. }
                | LedgerError::UnderReplicated { .. },
            ) => {
                self.is_waiting = false;
            }
            Err(error) => return Err(format!("{request:?} is refused: {error:?}")),
        }
        Ok(())
    }

    fn send_all(&mut self, op: Op) {
        let to: Vec<(usize, Holder, u64)> =
            self.ledger.missing().map(|(shard, holder, epoch)| (shard, holder.clone(), epoch)).collect();
        let generation = self.ledger.generation();
        for (shard, holder, epoch) in to {
            self.send(&holder, WorkerAsk::Op { shard, epoch, generation, op });
        }
    }

    fn restart(&mut self, landed: bool) -> Result<(), String> {
        self.left.restarts -= 1;
        if landed {
            let (shard, saved) = self.saves.pop_front().ok_or("nothing to save")?;
            self.save(shard, saved)?;
        }
        self.saves.clear();
        self.copies.clear();
        self.is_waiting = false;
        self.term += 1;
        (0..self.workers.len()).for_each(|worker| self.disconnect(worker));
        self.links.iter_mut().for_each(|link| link.replies.clear());
        let spec = spec(self.setting.replicas, self.setting.ledger_acks());
        let (mut ledger, actions) =
            Ledger::recover(&spec, self.writer_epoch, self.store.clone(), Duration::ZERO);
        ledger.skips_fences = self.setting.omission == Some(Omission::FenceBeforeCopy);
        self.ledger = ledger;
        for worker in 0..self.workers.len() {
            if self.workers[worker].is_alive || self.unburied.contains(&self.workers[worker].holder) {
                self.connect(worker);
            }
        }
        self.act(actions)?;
        // Lives that are over, of which the new coordinator hears at once.
        let members: Vec<Holder> = self.store.iter().flat_map(|shard| shard.members.clone()).collect();
        for gone in members {
            if self.index_of(&gone).is_none_or(|index| !self.workers[index].is_alive)
                && !self.unburied.contains(&gone)
            {
                self.tell(LedgerEvent::Lost(gone))?;
            }
        }
        Ok(())
    }

    fn tell(&mut self, event: LedgerEvent<()>) -> Result<(), String> {
        let actions = self.ledger.handle(event);
        self.act(actions)
    }

    fn act(&mut self, actions: Vec<LedgerAction<()>>) -> Result<(), String> {
        for action in actions {
            match action {
                LedgerAction::Send { shard, holder, epoch, generation, op } => {
                    self.send(&holder, WorkerAsk::Op { shard, epoch, generation, op });
                }
                LedgerAction::Undo { shard, holder, epoch, seq, digest } => {
                    self.send(&holder, WorkerAsk::Undo { shard, epoch, seq, digest });
                }
                LedgerAction::Fence { shard, holder, epoch } => {
                    self.send(&holder, WorkerAsk::Fence { shard, epoch });
                }
                LedgerAction::Copy { shard, from, to, epoch } => {
                    self.begin_copy(shard, &from, to, epoch);
                }
                LedgerAction::SaveMembers { shard, epoch, members } => {
                    self.saves.push_back((shard, SavedShard { epoch, members }));
                }
                LedgerAction::Answer { seq, result } => self.answer(seq, result)?,
                LedgerAction::NeedReplica { .. } => {}
                LedgerAction::Release { shard, holder, epoch } => {
                    self.send(&holder, WorkerAsk::Release { shard, epoch });
                }
                LedgerAction::AskRecords { shard, holder, .. } => {
                    let held =
                        self.index_of(&holder).and_then(|worker| self.workers[worker].shards[shard].as_ref());
                    let Some(records) = held.map(|held| held.replica.records().collect()) else { continue };
                    let actions = self.ledger.handle(LedgerEvent::Records(records));
                    self.act(actions)?;
                }
            }
        }
        Ok(())
    }
}
