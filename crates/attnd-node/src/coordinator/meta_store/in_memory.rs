//! A store that forgets everything with its process.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use attnd_plan::session::Holder;

use super::{MetaError, MetaStore, SessionRecord, first_number, is_remembered};

/// Sessions of one life of a coordinator.
#[derive(Debug)]
pub struct InMemory {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    term: u64,
    /// The last number that was given.
    number: u64,
    sessions: BTreeMap<u64, SessionRecord>,
    /// Names, and when they were closed.
    closed: BTreeMap<String, u64>,
}

impl InMemory {
    /// A store without sessions.
    pub fn new() -> Self {
        Self::counting_from(first_number())
    }

    /// A store without sessions whose first one has the number after this one. For whoever needs the same numbers again.
    pub fn counting_from(number: u64) -> Self {
        let (sessions, closed) = (BTreeMap::new(), BTreeMap::new());
        Self { state: Mutex::new(State { term: 0, number, sessions, closed }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A transaction checks everything before it changes anything, so a panic leaves no half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for InMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn number_of(&self, name: &str) -> Option<u64> {
        self.sessions.iter().find(|(_, record)| record.name.as_str() == name).map(|(number, _)| *number)
    }

    fn check_name(&self, record: &SessionRecord) -> Result<(), MetaError> {
        let name = record.name.as_str();
        let taken = |session| MetaError::NameTaken { name: name.to_owned(), session };
        self.number_of(name).map_or(Ok(()), |session| Err(taken(session)))
    }

    fn create(&mut self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.check_name(record)?;
        if session == 0 || session > self.number || self.sessions.contains_key(&session) {
            return Err(MetaError::Number { session });
        }
        self.closed.remove(record.name.as_str());
        self.sessions.insert(session, record.clone());
        Ok(())
    }

    fn session(&mut self, session: u64) -> Result<&mut SessionRecord, MetaError> {
        self.sessions.get_mut(&session).ok_or(MetaError::Unknown { session, shard: None })
    }
}

impl MetaStore for InMemory {
    fn bump_term(&self) -> Result<u64, MetaError> {
        let mut state = self.state();
        state.term += 1;
        Ok(state.term)
    }

    fn reserve_number(&self) -> Result<u64, MetaError> {
        let mut state = self.state();
        state.number += 1;
        Ok(state.number)
    }

    fn create(&self, record: &SessionRecord) -> Result<u64, MetaError> {
        let mut state = self.state();
        let session = state.number + 1;
        state.check_name(record)?;
        state.number = session;
        state.create(session, record).map(|()| session)
    }

    fn create_as(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.state().create(session, record)
    }

    fn update_shard(
        &self,
        session: u64,
        shard: usize,
        expected: u64,
        epoch: u64,
        members: &[Holder],
    ) -> Result<(), MetaError> {
        self.state().session(session)?.replace_members(session, shard, expected, epoch, members)
    }

    fn settle(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        let mut state = self.state();
        let there = state.session(session)?;
        there.check_settles(session, record)?;
        *there = record.clone();
        Ok(())
    }

    fn forget(&self, session: u64) -> Result<bool, MetaError> {
        Ok(self.state().sessions.remove(&session).is_some())
    }

    fn set_writer_epoch(&self, session: u64, writer_epoch: u64) -> Result<(), MetaError> {
        self.state().session(session)?.raise_writer_epoch(writer_epoch)
    }

    fn remove(&self, session: u64, now: Duration) -> Result<bool, MetaError> {
        let mut state = self.state();
        state.closed.retain(|_, closed| is_remembered(*closed, now));
        let Some(record) = state.sessions.remove(&session) else { return Ok(false) };
        state.closed.insert(record.name.as_str().to_owned(), now.as_secs());
        Ok(true)
    }

    fn was_closed(&self, name: &str, now: Duration) -> Result<bool, MetaError> {
        Ok(self.state().closed.get(name).is_some_and(|closed| is_remembered(*closed, now)))
    }

    fn number_of(&self, name: &str) -> Result<Option<u64>, MetaError> {
        Ok(self.state().number_of(name))
    }

    fn all(&self) -> Result<BTreeMap<u64, SessionRecord>, MetaError> {
        Ok(self.state().sessions.clone())
    }
}
