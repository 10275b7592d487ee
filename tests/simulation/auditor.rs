//! Who looks whether the cluster is as it should be: now and then that no replica is missing, and at the end that all replicas are the
//! same, and that of sessions that were closed nothing is left anywhere.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use attnd_client::session::{Sessions, ShardHealth};
use attnd_client::{Client, Reason};
use attnd_node::coordinator::meta_store::{MetaStore, SessionRecord, ShardRecord};
use attnd_wire::Surroundings;
use attnd_wire::hold::{HoldAnswer, HoldAsk, HoldRequest, ShardAt, ShardState};

use super::client::{HEALED_WITHIN, PATIENCE};
use super::cluster::COORDINATOR_URL;
use super::scene::Scene;
use super::zombie::say;

const OFTEN: Duration = Duration::from_millis(100);
/// Time until nothing is left of what was closed: workers are asked every five seconds what they hold.
const GONE_WITHIN: Duration = Duration::from_secs(12);

/// How often a worker is asked that doesn't answer.
const TRIES: usize = 5;
/// What a worker without shards may have.
const CHUNK: u64 = 2 << 20;

pub(super) struct Auditor {
    scene: Rc<Scene>,
    surroundings: Surroundings,
    client: Client,
    sessions: Sessions,
    store: Arc<dyn MetaStore>,
    workers: usize,
}

impl Auditor {
    pub(super) fn new(
        scene: Rc<Scene>,
        surroundings: Surroundings,
        store: Arc<dyn MetaStore>,
        workers: usize,
    ) -> Self {
        let client = Client::connect_in(surroundings.clone(), COORDINATOR_URL).unwrap();
        let sessions = client.sessions().with_timeout(PATIENCE);
        Self { scene, surroundings, client, sessions, store, workers }
    }

    /// Works until all clients are done, and then looks at what is there.
    pub(super) async fn run(self) {
        while self.scene.writing.get() > 0 {
            self.is_whole().await;
            tokio::time::sleep(OFTEN).await;
        }
        if !self.scene.history.has_violations() {
            self.audit().await;
        }
    }

    fn violation(&self, what: impl std::fmt::Display) {
        self.scene.history.violation("auditor", what);
    }

    /// Whether no replica of any session is missing.
    async fn is_whole(&self) -> bool {
        let asked = self.scene.history.now();
        let Ok(status) = self.client.status().await else { return false };
        let sessions = status.sessions;
        let is_whole = sessions.repairing + sessions.recovering + sessions.degraded == 0;
        if is_whole {
            self.scene.is_whole(asked);
        }
        is_whole
    }

    async fn audit(&self) {
        let begun = self.scene.history.now();
        while !self.is_whole().await {
            if self.scene.history.now() > begun + HEALED_WITHIN {
                return self.violation("replicas are missing still");
            }
            tokio::time::sleep(OFTEN).await;
        }
        for (number, record) in self.store.all().unwrap() {
            for (shard, kept) in record.shards.iter().enumerate().filter(|_| !record.pending) {
                self.compare(number, &record, shard, kept).await;
            }
        }
        self.close_all(begun + HEALED_WITHIN).await;
        let closed = self.scene.history.now();
        while let Err(what) = self.is_empty().await {
            if self.scene.history.now() > closed + GONE_WITHIN {
                return self.violation(format!("all sessions are closed, and {what}"));
            }
            tokio::time::sleep(OFTEN).await;
        }
    }

    /// Asks a worker what it has.
    async fn ask(&self, worker: usize, ask: HoldAsk) -> Option<HoldAnswer> {
        let request = HoldRequest { request: 1, term: self.scene.term.get(), ask };
        for _ in 0..TRIES {
            if let Some(answer) = say(&self.surroundings, worker, request.clone().into()).await {
                return Some(answer);
            }
            tokio::time::sleep(OFTEN).await;
        }
        None
    }

    /// Enough replicas of a shard have all of it, and two that have as much have the same.
    async fn compare(&self, number: u64, record: &SessionRecord, shard: usize, kept: &ShardRecord) {
        let at = ShardAt { session: number, shard: shard as u32, epoch: kept.epoch };
        let mut states: Vec<ShardState> = Vec::new();
        for member in &kept.members {
            let worker = member.worker.as_str().trim_start_matches('w').parse().unwrap();
            match self.ask(worker, HoldAsk::Look(at)).await {
                Some(HoldAnswer::State(state)) => states.push(state),
                other => self.scene.history.tell("auditor", format!("w{worker} says {other:?} of {at:?}")),
            }
        }
        let most = states.iter().map(|state| state.op_seq).max().unwrap_or(0);
        let have: Vec<&ShardState> = states.iter().filter(|state| state.op_seq == most).collect();
        let what = format!("{} shard {shard}: {kept:?} has {states:?}", record.name);
        // One that is lost may have less, and in epochs that nobody kept.
        if self.is_lost(record).await {
            return;
        }
        if have.len() < record.spec.acks {
            self.violation(format!("I2: {what}"));
        }
        if have.iter().any(|state| state.chain != have[0].chain || state.tokens != have[0].tokens) {
            self.violation(format!("I3: {what}"));
        }
        if states.iter().any(|state| state.epoch > kept.epoch) {
            self.violation(format!("I1: {what}"));
        }
    }

    /// Whether nobody has the session any more, and nobody must.
    async fn is_lost(&self, record: &SessionRecord) -> bool {
        let name = record.name.as_str();
        let is_lost = match self.sessions.describe(name).await {
            Ok(description) => description.shards.iter().any(|shard| shard.health == ShardHealth::Lost),
            Err(error) => error.reason == Reason::SessionLost,
        };
        // Of one that nobody was told of, nobody knows what it may have lost.
        let open = self.scene.open.borrow();
        let known = open.iter().find(|known| known.name == name);
        is_lost && known.is_none_or(|known| known.model.borrow().may_be_lost)
    }

    /// Closes all sessions that there are, those too of which nobody was told.
    async fn close_all(&self, by: Duration) {
        loop {
            let names = self.sessions.list().await;
            match &names {
                Ok(names) if names.is_empty() => return,
                Ok(names) => {
                    for name in names {
                        // What it says is said by the next list.
                        self.sessions.close(name.as_str()).await.ok();
                    }
                }
                Err(_) => {}
            }
            if self.scene.history.now() > by {
                return self.violation(format!("sessions don't close: {names:?}"));
            }
        }
    }

    /// Whether there is nothing anywhere; otherwise, what there is.
    async fn is_empty(&self) -> Result<(), String> {
        let kept = self.store.all().unwrap();
        if !kept.is_empty() {
            return Err(format!("kept are {kept:?}"));
        }
        let status = self.client.status().await.map_err(|error| error.to_string())?;
        for worker in status.workers {
            // It keeps a chunk for what comes next.
            if worker.session_used_bytes > CHUNK || worker.memory_used_bytes > 0 {
                let (of_sessions, of_calls) = (worker.session_used_bytes, worker.memory_used_bytes);
                return Err(format!("{} uses {of_sessions} and {of_calls} bytes", worker.worker));
            }
        }
        for worker in 0..self.workers {
            match self.ask(worker, HoldAsk::List).await {
                Some(HoldAnswer::Shards(shards)) if shards.is_empty() => {}
                answer => return Err(format!("w{worker} says {answer:?}")),
            }
        }
        Ok(())
    }
}
