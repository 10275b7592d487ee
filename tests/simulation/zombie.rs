//! A coordinator of the past: it says to workers what coordinators said when their shards had other epochs, or before another one took
//! over. Nobody listens to it. It hears all that coordinators say, and so finds out too what they mustn't.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use attnd_node::coordinator::meta_store::MetaStore;
use attnd_node::simulation::take_sent;
use attnd_wire::hold::{HoldAnswer, HoldAsk, HoldReply, HoldRequest, ShardAt};
use attnd_wire::proto::hold_request::Ask;
use attnd_wire::{Link, Surroundings, limits, proto};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::cluster::worker_url;
use super::scene::Scene;

/// Time for an answer.
pub(super) const SOON: Duration = Duration::from_millis(500);
/// Appends that it remembers.
const MOST: usize = 400;

/// The coordinator of the past.
pub(super) struct Zombie {
    scene: Rc<Scene>,
    surroundings: Surroundings,
    store: Arc<dyn MetaStore>,
    workers: usize,
    random: SmallRng,
    /// The highest epoch that was ever spoken of, of each shard.
    epochs: BTreeMap<(u64, u32), u64>,
    appends: Vec<(ShardAt, proto::HoldRequest)>,
}

impl Zombie {
    pub(super) fn new(
        scene: Rc<Scene>,
        surroundings: Surroundings,
        store: Arc<dyn MetaStore>,
        workers: usize,
        seed: u64,
    ) -> Self {
        let random = SmallRng::seed_from_u64(seed ^ 0x7a6f_6d62_6965);
        Self { scene, surroundings, store, workers, random, epochs: BTreeMap::new(), appends: Vec::new() }
    }

    /// Works until the end of the run.
    pub(super) async fn run(mut self) {
        loop {
            tokio::time::sleep(Duration::from_millis(self.random.random_range(50..250))).await;
            for frame in take_sent() {
                self.hear(frame);
            }
            self.check_epochs();
            let term = self.scene.term.get();
            let is_over = |(at, frame): &&(ShardAt, proto::HoldRequest)| {
                frame.term < term
                    || self.epochs.get(&(at.session, at.shard)).is_some_and(|epoch| *epoch > at.epoch)
            };
            let over: Vec<_> = self.appends.iter().filter(is_over).collect();
            if over.is_empty() {
                continue;
            }
            let (at, frame) = over[self.random.random_range(0..over.len())].clone();
            let worker = self.random.random_range(0..self.workers);
            if frame.term < term && !self.introduce(worker, term).await {
                continue;
            }
            self.repeat(worker, at, frame).await;
        }
    }

    /// One frame of a coordinator to a worker.
    fn hear(&mut self, frame: proto::HoldRequest) {
        let (term, history) = (frame.term, &self.scene.history);
        let before = self.scene.term.replace(term.max(self.scene.term.get()));
        if term < before {
            history.violation("I1", format!("a coordinator speaks in term {term} after {before}"));
        }
        history.count("terms", u64::from(term > before));
        let ats: Vec<(ShardAt, bool)> = match HoldRequest::decode(frame.clone()).ask {
            Ok(HoldAsk::Works(works)) => {
                works.into_iter().flatten().map(|work| (work.at, work.rows.is_some())).collect()
            }
            Ok(HoldAsk::Fence(at)) => vec![(at, false)],
            Ok(HoldAsk::Hold(hold)) => vec![(hold.at, false)],
            Ok(HoldAsk::Import(import)) => {
                history.count("copies", 1);
                vec![(import.at, false)]
            }
            _ => Vec::new(),
        };
        for (at, _) in &ats {
            let epoch = self.epochs.entry((at.session, at.shard)).or_default();
            *epoch = (*epoch).max(at.epoch);
        }
        // Each by itself.
        if let Some(Ask::Works(works)) = frame.ask
            && works.works.len() == ats.len()
        {
            for ((at, appends), work) in ats.iter().zip(works.works) {
                let ask = Some(Ask::Works(proto::ShardWorks { works: vec![work] }));
                if *appends {
                    self.appends.push((*at, proto::HoldRequest { request: 1, term, ask }));
                }
            }
        }
        let too_many = self.appends.len().saturating_sub(MOST);
        self.appends.drain(..too_many);
    }

    /// Nothing is appended in an epoch whose members aren't in the store.
    fn check_epochs(&self) {
        let kept = self.store.all().unwrap_or_default();
        for (at, _) in &self.appends {
            let Some(record) = kept.get(&at.session).filter(|record| !record.pending) else { continue };
            let kept = record.shards.get(at.shard as usize).map(|shard| shard.epoch);
            if kept.is_some_and(|kept| kept < at.epoch) {
                let what = format!(
                    "{} shard {}: appended in epoch {}, kept {kept:?}",
                    record.name, at.shard, at.epoch
                );
                self.scene.history.violation("I1", what);
            }
        }
    }

    /// Makes sure that a worker has heard of the last coordinator.
    async fn introduce(&self, worker: usize, term: u64) -> bool {
        let list = HoldRequest { request: 1, term, ask: HoldAsk::List };
        matches!(say(&self.surroundings, worker, list.into()).await, Some(HoldAnswer::Shards(_)))
    }

    /// Says to a worker what was said once.
    async fn repeat(&self, worker: usize, at: ShardAt, frame: proto::HoldRequest) {
        let (said, term) = (frame.term, self.scene.term.get());
        let Some(HoldAnswer::Results(results)) = say(&self.surroundings, worker, frame).await else { return };
        let kind = if said < term { "repeated of another term" } else { "repeated of another epoch" };
        self.scene.history.count(kind, 1);
        for state in results.into_iter().filter_map(|result| result.applied) {
            let what = format!(
                "shard {} of epoch {} and term {said} to w{worker}, which has epoch {}, in term {term}",
                at.shard, at.epoch, state.epoch
            );
            self.scene.history.tell("zombie", &what);
            if state.epoch != at.epoch || said < term {
                self.scene.history.violation("zombie", format!("{what}, and takes it"));
            }
        }
    }
}

/// Says one thing to a worker over a connection of its own, and hears the first answer.
pub(super) async fn say(
    surroundings: &Surroundings,
    worker: usize,
    frame: proto::HoldRequest,
) -> Option<HoldAnswer> {
    // Dropped at the end, and the stream with it: one that waits for more to say would stay open.
    let (frames, requests) = mpsc::channel(1);
    frames.try_send(proto::HoldRequest { request: 1, ..frame }).ok();
    let exchange = async {
        let endpoint = limits::endpoint(&worker_url(worker), Link::Cluster).ok()?;
        let mut stub = limits::shards_client(surroundings.channel(&endpoint));
        let mut replies = stub.hold(ReceiverStream::new(requests)).await.ok()?.into_inner();
        HoldReply::try_from(replies.message().await.ok().flatten()?).ok()
    };
    let reply = tokio::time::timeout(SOON, exchange).await.ok().flatten();
    drop(frames);
    reply.map(|reply| reply.answer)
}
