//! A coordinator of the past: it says to workers what the coordinator said when their shards had other epochs. Nobody listens to it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use attnd_node::simulation::take_sent;
use attnd_wire::hold::{HoldAnswer, HoldAsk, HoldReply, HoldRequest, ShardAt};
use attnd_wire::proto::hold_request::Ask;
use attnd_wire::{Link, Surroundings, limits, proto};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio_stream::StreamExt;

use super::client::Scene;
use super::cluster::worker_url;

/// Time for an answer.
const SOON: Duration = Duration::from_millis(500);
/// Appends that it remembers.
const MOST: usize = 400;

/// What it remembers.
#[derive(Default)]
struct Past {
    /// The highest epoch that was ever spoken of, of each shard.
    epochs: BTreeMap<(u64, u32), u64>,
    appends: Vec<(ShardAt, proto::HoldRequest)>,
}

impl Past {
    fn hear(&mut self, frame: proto::HoldRequest) {
        let term = frame.term;
        let ats: Vec<(ShardAt, bool)> = match HoldRequest::decode(frame.clone()).ask {
            Ok(HoldAsk::Works(works)) => {
                works.into_iter().flatten().map(|work| (work.at, work.rows.is_some())).collect()
            }
            Ok(HoldAsk::Fence(at)) => vec![(at, false)],
            Ok(HoldAsk::Hold(hold)) => vec![(hold.at, false)],
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

    fn is_over(&self, at: &ShardAt) -> bool {
        self.epochs.get(&(at.session, at.shard)).is_some_and(|epoch| *epoch > at.epoch)
    }
}

/// Works until the end of the run.
pub(super) async fn run(scene: Rc<Scene>, surroundings: Surroundings, workers: usize, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed ^ 0x7a6f_6d62_6965);
    let mut past = Past::default();
    loop {
        tokio::time::sleep(Duration::from_millis(random.random_range(50..250))).await;
        for frame in take_sent() {
            past.hear(frame);
        }
        let over: Vec<&(ShardAt, proto::HoldRequest)> =
            past.appends.iter().filter(|(at, _)| past.is_over(at)).collect();
        if over.is_empty() {
            continue;
        }
        let (at, frame) = over[random.random_range(0..over.len())].clone();
        let worker = random.random_range(0..workers);
        let Ok(Some(reply)) = tokio::time::timeout(SOON, say(&surroundings, worker, frame)).await else {
            continue;
        };
        let Ok(HoldReply { answer: HoldAnswer::Results(results), .. }) = HoldReply::try_from(reply) else {
            continue;
        };
        for state in results.into_iter().filter_map(|result| result.applied) {
            // Without its number, which is another one in each run.
            let what = format!(
                "shard {} of epoch {} to w{worker}, which has epoch {}",
                at.shard, at.epoch, state.epoch
            );
            scene.history.tell("zombie", &what);
            if state.epoch != at.epoch {
                scene.history.violation("zombie", format!("{what}, and takes it"));
            }
        }
    }
}

async fn say(
    surroundings: &Surroundings,
    worker: usize,
    frame: proto::HoldRequest,
) -> Option<proto::HoldReply> {
    let endpoint = limits::endpoint(&worker_url(worker), Link::Cluster).ok()?;
    let mut stub = limits::shards_client(surroundings.channel(&endpoint));
    let frames = tokio_stream::once(proto::HoldRequest { request: 1, ..frame });
    let mut replies = stub.hold(frames.chain(tokio_stream::pending())).await.ok()?.into_inner();
    replies.message().await.ok().flatten()
}
