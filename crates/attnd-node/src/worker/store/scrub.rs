//! Looks at all full pages again and again, whether they still have the checksums that they got when they were full. A replica with a page
//! that doesn't is given up as a whole: it answers nothing any more, and its coordinator finds it missing and makes another one. So are
//! forks with the same page. Its frame goes back to the arena with the others: memory that is broken for good breaks the next page in it,
//! which is found in the same way.
//!
//! A pass over everything shall take half of the interval. It goes in pieces of about a MiB, which wait for their turn as all work on shards
//! does, with pauses between them as long as it is ahead of its time. How much there is to look at is what the pass before looked at: pages
//! that forks share are looked at with each of them. A page that is cut and written to again gets another checksum, and nobody looks before.

use std::sync::Arc;
use std::time::Duration;

use attnd_wire::surroundings::now;
use tokio::sync::oneshot;

use super::Store;
use super::pages::{PageAt, Scrubbed};
use super::shard::{Resident, ShardKey};
use super::turns::Access;

/// Bytes of pages that are looked at in one piece, about.
const PIECE: u64 = 1 << 20;

impl Store {
    /// Completes never; looks at each full page about once in every `interval`, if that is more than nothing.
    pub(crate) async fn scrub(&self, interval: Duration) {
        let pass = interval / 2;
        if pass.is_zero() {
            return std::future::pending().await;
        }
        let mut before = 0;
        loop {
            let (begun, total) = (now(), self.resident_bytes().max(before));
            let mut done = 0;
            for key in self.keys() {
                let mut next = Some(PageAt::default());
                while let Some(from) = next {
                    let Some(piece) = self.scrub_piece(key, from).await else { break };
                    (done, next) = (done + piece.bytes, piece.next);
                    let ahead = due(done, total, pass).saturating_sub(since(begun));
                    tokio::time::sleep(ahead).await;
                }
            }
            let took = since(begun);
            if took > interval {
                tracing::warn!(
                    ?took,
                    ?interval,
                    bytes = done,
                    "pages are looked at more rarely than they shall be"
                );
            }
            tokio::time::sleep(pass.saturating_sub(took)).await;
            before = done;
        }
    }

    /// Looks at some pages of a shard, from one on, in its turn; `None` if it isn't here, or not any more.
    pub(crate) async fn scrub_piece(&self, key: ShardKey, from: PageAt) -> Option<Scrubbed> {
        let (found, answer) = oneshot::channel();
        let store = self.clone();
        let look = move || {
            let Ok(resident) = store.resident(key) else { return };
            // Not longer than it looks.
            let scrubbed = resident.look().scrub(from, PIECE);
            match scrubbed {
                Some(Ok(scrubbed)) => drop(found.send(scrubbed)),
                Some(Err(at)) => store.found_damaged(&resident, at),
                None => {}
            }
        };
        self.submit(vec![(key, Access::Reads)], Box::new(look));
        answer.await.ok()
    }

    /// Looks at one page of a replica, in its turn.
    pub(crate) fn look_again(&self, resident: &Arc<Resident>, at: PageAt) {
        let (store, resident) = (self.clone(), Arc::clone(resident));
        let key = resident.key;
        let look = move || {
            let is_sound = resident.look().is_sound(at);
            if is_sound == Some(false) {
                store.give_up_damaged(&resident, at);
            }
        };
        self.submit(vec![(key, Access::Reads)], Box::new(look));
    }

    /// A page has changed by itself. Forks share pages at the same place, in shards of the same number.
    fn found_damaged(&self, resident: &Arc<Resident>, at: PageAt) {
        self.give_up_damaged(resident, at);
        let alike = self.keys().into_iter().filter(|key| key.1 == resident.key.1);
        for other in alike.filter_map(|key| self.resident(key).ok()) {
            self.look_again(&other, at);
        }
    }

    /// Gives up a replica one of whose pages has changed by itself. Nothing is answered from it any more, not even what is computed now, and
    /// nothing is taken.
    fn give_up_damaged(&self, resident: &Arc<Resident>, at: PageAt) {
        if !resident.mark_damaged() {
            return;
        }
        self.remove_only(resident);
        let (session, shard) = resident.key;
        let PageAt { layer, head, page } = at;
        let (session, head) = (format!("{session:016x}"), resident.kv_head(head));
        tracing::error!(
            session,
            shard,
            layer,
            kv_head = head,
            page,
            "a page has another checksum than when it was written: the replica is given up"
        );
        // Its memory goes back once it is nobody's turn, and nobody shares it.
        let of = Arc::clone(resident);
        self.submit(vec![(resident.key, Access::Changes)], Box::new(move || of.release()));
    }
}

/// When so many bytes of all shall have been looked at, from the beginning of a pass that takes so long.
fn due(done: u64, total: u64, pass: Duration) -> Duration {
    pass.mul_f64((done as f64 / total.max(1) as f64).min(1.0))
}

fn since(begun: std::time::Instant) -> Duration {
    now().saturating_duration_since(begun)
}
