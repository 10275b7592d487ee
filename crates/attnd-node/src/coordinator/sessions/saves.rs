//! Members of shards on their way to the store: those that come while others are written go together, as each transaction waits for the
//! disk, and after a restart every shard of every session has other members' epochs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use attnd_plan::session::{Holder, LedgerEvent};
use tokio::sync::Notify;

use super::Sessions;
use super::session::Session;
use crate::coordinator::meta_store::{MetaError, ShardUpdate};

/// Time until what couldn't be written is tried again: a file that fails ends the coordinator before (`ending.rs`), another store may recover.
pub(super) const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Saves {
    waiting: Mutex<Vec<Save>>,
    come: Notify,
}

/// Members of one shard.
#[derive(Clone, Debug)]
struct Save {
    session: Arc<Session>,
    update: ShardUpdate,
}

impl Saves {
    /// Has members written; the ledger is told.
    pub(super) fn add(&self, session: &Arc<Session>, shard: usize, epoch: u64, members: Vec<Holder>) {
        let expected = session.lock().saved.get(shard).copied().unwrap_or(0);
        let update = ShardUpdate { session: session.number, shard, expected, epoch, members };
        self.put([Save { session: Arc::clone(session), update }]);
    }

    fn put(&self, saves: impl IntoIterator<Item = Save>) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).extend(saves);
        self.come.notify_one();
    }

    fn take(&self) -> Vec<Save> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes what comes, for ever.
pub(crate) async fn write_members(sessions: Arc<Sessions>) {
    loop {
        let saves = sessions.saves.take();
        if saves.is_empty() {
            sessions.saves.come.notified().await;
            continue;
        }
        let updates: Vec<ShardUpdate> = saves.iter().map(|save| save.update.clone()).collect();
        match sessions.meta.run(move |store| store.update_shards(&updates)).await {
            Ok(written) => {
                for (save, written) in saves.into_iter().zip(written) {
                    tell(&sessions, save, written);
                }
            }
            Err(error) => {
                tracing::error!(%error, shards = saves.len(), "members of shards can't be kept; their sessions take no appends");
                tokio::time::sleep(TRY_AGAIN).await;
                sessions.saves.put(saves);
            }
        }
    }
}

fn tell(sessions: &Arc<Sessions>, save: Save, written: Result<(), MetaError>) {
    let Save { session, update: ShardUpdate { shard, epoch, .. } } = save;
    match written {
        Ok(()) => {
            if let Some(saved) = session.lock().saved.get_mut(shard) {
                *saved = epoch;
            }
            session.handle(sessions, LedgerEvent::Saved { shard, epoch });
        }
        // It is being closed.
        Err(MetaError::Unknown { .. }) => {}
        Err(error) => {
            tracing::error!(session = %session.name, shard, %error, "members of a shard can't be kept; its session takes no appends");
        }
    }
}
