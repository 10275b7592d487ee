//! The start of a coordinator: sessions that the one before had are there again, and find out what their replicas have as workers come.

use std::collections::BTreeMap;
use std::sync::Arc;

use attnd_plan::session::{Ledger, LedgerAction, SavedShard};
use attnd_wire::Error;

use super::Sessions;
use super::session::{Session, SessionParts};
use crate::NodeError;
use crate::coordinator::meta_store::{SessionRecord, ShardRecord};

impl Sessions {
    /// Takes over all sessions that are in the store.
    ///
    /// # Errors
    /// What the store says.
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), NodeError> {
        let records = self.meta.run(|store| store.all()).await?;
        if records.is_empty() {
            return Ok(());
        }
        let (pending, settled): (BTreeMap<u64, SessionRecord>, BTreeMap<u64, SessionRecord>) =
            records.into_iter().partition(|(_, record)| record.pending);
        let mut begun = Vec::with_capacity(settled.len());
        for (number, record) in settled {
            begun.push(self.begin_again(number, record));
        }
        self.name_children(begun.iter().map(|(session, _)| session));
        for (number, record) in pending {
            let parent = record.parent.and_then(|parent| self.table().by_number.get(&parent).cloned());
            match parent {
                Some(parent) => {
                    {
                        let mut table = self.table();
                        table.reserved.insert(number);
                        table.opening.insert(record.name.clone());
                    }
                    let mut state = parent.lock();
                    state.children.insert(number, record.name.clone());
                    state.forks.insert(number, record.name);
                    state.has_old_forks = true;
                }
                // Nobody was told of it, and nobody will be.
                None => drop(self.meta.run(move |store| store.forget(number)).await?),
            }
        }
        tracing::info!(sessions = begun.len(), "sessions are taken over from the coordinator before");
        for (session, actions) in begun {
            // Nobody is there yet, of which the ledger hears.
            session.perform(self, actions);
        }
        Ok(())
    }

    fn begin_again(&self, number: u64, record: SessionRecord) -> (Arc<Session>, Vec<LedgerAction<Error>>) {
        let SessionRecord { name, spec, writer_epoch, shards, parent, .. } = record;
        let saved = |shard: &ShardRecord| SavedShard { epoch: shard.epoch, members: shard.members.clone() };
        let (ledger, actions) =
            Ledger::recover(&spec, writer_epoch, shards.iter().map(saved).collect(), self.now());
        let saved = shards.iter().map(|shard| shard.epoch).collect();
        let pieces = shards.into_iter().map(|shard| shard.pieces.into()).collect();
        let links = BTreeMap::new();
        let session = Session::new(SessionParts { number, name, spec, ledger, pieces, links, parent });
        session.lock().saved = saved;
        let session = Arc::new(session);
        let mut table = self.table();
        table.by_number.insert(number, Arc::clone(&session));
        table.open.insert(session.name.clone(), Arc::clone(&session));
        (session, actions)
    }

    /// Forks that come again are answered with the names of their children.
    fn name_children<'a>(&self, children: impl Iterator<Item = &'a Arc<Session>>) {
        for child in children {
            let parent = child.parent.and_then(|parent| self.table().by_number.get(&parent).cloned());
            if let Some(parent) = parent {
                parent.lock().children.insert(child.number, child.name.clone());
            }
        }
    }
}
