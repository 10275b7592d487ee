//! Looks at all pages again and again, whether they still have the checksums that they got when they were full. A replica with a page that
//! doesn't is given up as a whole: it answers nothing any more, and its coordinator finds it missing and makes another one.
//!
//! A pass over everything takes half of the interval, in pieces of about a MiB that wait for their turn as all work on shards does, with
//! pauses between them as long as what is resident allows. So a page is looked at once in each interval, and scrubbing takes the bandwidth of
//! what is resident over half of the interval, and never the pool for more than a fraction of a millisecond.

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
    /// Completes never; looks at each page at least once in every `interval`, if that is more than nothing.
    pub(crate) async fn scrub(&self, interval: Duration) {
        let pass = interval / 2;
        if pass.is_zero() {
            return std::future::pending().await;
        }
        loop {
            let begun = now();
            for key in self.keys() {
                let mut next = Some(PageAt::default());
                while let Some(from) = next {
                    let piece_begun = now();
                    let Some(done) = self.scrub_piece(key, from).await else { break };
                    next = done.next;
                    let pause = pause_after(done.bytes, self.resident_bytes(), pass);
                    tokio::time::sleep(pause.saturating_sub(now().saturating_duration_since(piece_begun)))
                        .await;
                }
            }
            tokio::time::sleep(pass.saturating_sub(now().saturating_duration_since(begun))).await;
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
                Some(Err(at)) => store.give_up_damaged(&resident, at),
                None => {}
            }
        };
        self.submit(vec![(key, Access::Reads)], Box::new(look));
        answer.await.ok()
    }

    /// Gives up a replica one of whose pages has changed by itself. Nothing is answered from it any more, not even what is computed now.
    pub(crate) fn give_up_damaged(&self, resident: &Arc<Resident>, at: PageAt) {
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
        resident.mark_damaged();
        self.remove_only(resident);
        // Its memory goes back once it is nobody's turn.
        let of = Arc::clone(resident);
        self.submit(vec![(resident.key, Access::Changes)], Box::new(move || of.release()));
    }
}

/// How long a piece of so many bytes may take, so that all that is resident takes `pass`.
fn pause_after(bytes: u64, resident: u64, pass: Duration) -> Duration {
    pass.mul_f64((bytes as f64 / resident.max(1) as f64).min(1.0))
}
