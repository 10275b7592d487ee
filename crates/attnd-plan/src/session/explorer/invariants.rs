//! What must hold in every state of the explorer's cluster.

use super::choice::{Budget, Choice, Omission, Setting};
use super::world::{LAYERS, SHARDS, World};
use crate::session::ledger::{Begun, LedgerError, Outcome, Phase, Request};
use crate::session::model::Model;
use crate::session::op::Answer;

use super::worker::{Held, Worker};

impl Setting {
    /// How many acknowledgements the ledger waits for.
    pub(super) fn ledger_acks(&self) -> usize {
        if self.omission == Some(Omission::Coverage) { 1 } else { self.acks }
    }
}

impl World {
    /// The session says how an op ended.
    pub(super) fn answer(&mut self, seq: u64, result: Result<Answer, LedgerError<()>>) -> Result<(), String> {
        self.is_waiting = false;
        match result {
            Ok(answer) => {
                let digest = self.model.open().map(|request| request.digest);
                self.model.acknowledge(seq, answer)?;
                for shard in 0..SHARDS {
                    // Those count too of whose death the coordinator can't know.
                    let has_it = |worker: &&Worker| {
                        let held = worker.shards[shard].as_ref();
                        self.unburied.contains(&worker.holder)
                            || held.is_some_and(|held| held.log.iter().any(|op| Some(op.1) == digest))
                    };
                    let members = self.store[shard].members.iter();
                    let members = members.filter_map(|holder| self.index_of(holder));
                    let have = members.map(|index| &self.workers[index]).filter(has_it).count();
                    if have < self.setting.acks {
                        return Err(format!(
                            "I2: op {seq} is acknowledged, {have} members of shard {shard} have it"
                        ));
                    }
                }
            }
            Err(LedgerError::SessionLost { .. }) => {}
            Err(error) if error.outcome() == Outcome::NotExecuted => {
                self.model.refuse(seq);
                for shard in 0..SHARDS {
                    for holder in self.ledger.members(shard) {
                        let held = self.held(shard, holder);
                        if held.is_some_and(|held| held.log.len() as u64 >= seq) {
                            return Err(format!(
                                "op {seq} was taken back, {holder:?} has it in shard {shard}"
                            ));
                        }
                    }
                }
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn held(&self, shard: usize, holder: &crate::session::op::Holder) -> Option<&Held> {
        self.index_of(holder).and_then(|index| self.workers[index].shards[shard].as_ref())
    }

    fn is_lost(&self) -> bool {
        (0..SHARDS).any(|shard| self.ledger.phase(shard) == Phase::Lost)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        for worker in &self.workers {
            for held in worker.shards.iter().flatten() {
                let numbers = held.log.iter().map(|op| op.0);
                if !numbers.eq(1..=held.log.len() as u64) {
                    return Err(format!("I8: {:?} applied {:?}", worker.holder, held.log));
                }
            }
        }
        if self.is_lost() {
            return self.check_lost();
        }
        let Some(model) = self.expected()? else { return Ok(()) };
        for shard in 0..SHARDS {
            if self.ledger.epoch(shard) < self.store[shard].epoch {
                return Err(format!("I1: epoch {} after {:?}", self.ledger.epoch(shard), self.store[shard]));
            }
            self.check_replicas(shard, &model)?;
        }
        let tokens: Vec<usize> = (0..LAYERS).map(|layer| model.tokens(layer).len()).collect();
        if self.ledger.tokens() != tokens || self.ledger.generation() != model.generation() {
            return Err(format!("the session has {:?} tokens, not {tokens:?}", self.ledger.tokens()));
        }
        self.check_replay(&model)
    }

    /// The model as the session must be: with the op that nobody was told of, if it has happened. `None` while that isn't known.
    fn expected(&self) -> Result<Option<Model>, String> {
        let (has, told) = (self.ledger.next_seq() - 1, self.model.told().len() as u64);
        if self.ledger.is_restarting() {
            return Ok(None);
        }
        let mut model = self.model.clone();
        match self.model.open() {
            _ if has == told => {}
            Some(request) if has == told + 1 => {
                let answer = model.expect(&request);
                model.acknowledge(request.seq, answer)?;
            }
            _ => return Err(format!("the session has {has} ops, {told} were acknowledged")),
        }
        Ok(Some(model))
    }

    fn check_replicas(&self, shard: usize, model: &Model) -> Result<(), String> {
        let mut chains = Vec::new();
        for holder in self.ledger.members(shard) {
            let Some(held) =
                self.held(shard, holder).filter(|held| held.replica.epoch() == self.ledger.epoch(shard))
            else {
                continue;
            };
            let state = held.replica.state();
            chains.push((state.op_seq, state.chain));
            // Nothing beyond what was acknowledged, but what may still be.
            let open = self.model.open().map(|request| request.digest);
            let mut beyond = held.log.iter().skip(model.told().len());
            if beyond.any(|op| Some(op.1) != open) {
                return Err(format!("{holder:?} has what nobody wants in shard {shard}: {:?}", held.log));
            }
        }
        for (seq, chain) in &chains {
            if chains.iter().any(|(other, differs)| other == seq && differs != chain) {
                return Err(format!("I3: shard {shard} has {chains:?}"));
            }
        }
        for holder in self.ledger.computing(shard) {
            let Some(held) = self.held(shard, holder) else { continue };
            let told = model.told().iter().map(|told| (told.request.seq, told.request.digest));
            if held.log.len() < model.told().len()
                || !told.eq(held.log.iter().copied().take(model.told().len()))
            {
                return Err(format!("{holder:?} computes shard {shard} and has {:?}", held.log));
            }
            if held.replica.state().generation != model.generation() {
                continue;
            }
            for layer in 0..LAYERS {
                if !held.rows[layer].starts_with(model.tokens(layer)) {
                    return Err(format!("{holder:?} has other rows in layer {layer} of shard {shard}"));
                }
            }
        }
        Ok(())
    }

    /// An op that was answered is answered so again.
    fn check_replay(&self, model: &Model) -> Result<(), String> {
        for told in model.told() {
            let request = Request { writer_epoch: self.writer_epoch, ..told.request };
            match self.ledger.clone().begin(&request) {
                Ok(Begun::Replayed(answer)) if answer == told.answer => {}
                // Until somebody who remembers it has been asked.
                Err(LedgerError::Recovering { .. }) => {}
                // A new coordinator can't know that anybody was told of the last one.
                Err(LedgerError::UnderReplicated { is_in_flight: true, .. })
                    if request.seq + 1 == self.ledger.next_seq() => {}
                other => return Err(format!("op {} comes again and is answered {other:?}", request.seq)),
            }
        }
        Ok(())
    }

    /// A session is lost only where nobody is left who has all that was acknowledged.
    fn check_lost(&self) -> Result<(), String> {
        let told = self.model.told().len();
        let survives = |shard: usize| {
            self.store[shard].members.iter().any(|holder| {
                let lives = self.index_of(holder).is_some_and(|index| self.workers[index].is_alive);
                lives && self.held(shard, holder).is_some_and(|held| held.log.len() >= told)
            })
        };
        // With fewer acknowledgements than replicas, a new coordinator can't know that nobody had more.
        let can_know =
            self.setting.acks == self.setting.replicas || self.left.restarts == self.setting.budget.restarts;
        if can_know && (0..SHARDS).all(survives) {
            return Err("the session is lost, and each shard has a replica".to_owned());
        }
        Ok(())
    }

    /// Without further faults, the session gets its replicas back and the client its answer.
    pub(super) fn heal(&mut self) -> Result<(), String> {
        self.left = Budget::default();
        for _ in 0..2000 {
            let choices = self.choices();
            let is_request = |choice: &&Choice| matches!(choice, Choice::Request { .. });
            let next = choices.iter().find(|choice| !is_request(choice)).or(choices.first());
            match next.copied() {
                Some(choice) => self.choose(choice)?,
                None if self.is_lost() => return Ok(()),
                None => break,
            }
            if self.is_lost() {
                return Ok(());
            }
        }
        let open = (0..SHARDS).all(|shard| self.ledger.phase(shard) == Phase::Open);
        let whole = (0..SHARDS).all(|shard| self.ledger.members(shard).count() >= self.setting.replicas);
        if open && whole && self.model.open().is_none() {
            Ok(())
        } else {
            Err(format!("it doesn't heal: {self:#?}"))
        }
    }
}
