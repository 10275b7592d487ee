//! A store in a file, by redb: pages with checksums, copied on write, so a process that ends at any moment leaves the last whole
//! transaction. Each one is on disk (fsync) before it returns. The file is locked as long as it is open, so two coordinators can't
//! have one.
//!
//! Opening checks every page and reads every record: a damaged file is an error when the coordinator starts, and not later.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use attnd_plan::session::Holder;
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::record::{Unreadable, VERSION};
use super::{MetaError, MetaStore, SessionRecord, ShardUpdate, first_number, is_remembered};

/// The file in the state directory.
const FILE: &str = "sessions.redb";
/// Pages that are kept in memory; all records of ten thousand sessions take about as much.
const CACHE_BYTES: usize = 16 << 20;

/// Records by session number.
const SESSIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("sessions");
/// Session numbers by name.
const NAMES: TableDefinition<'_, &str, u64> = TableDefinition::new("names");
/// When names were closed, in seconds since 1970.
const CLOSED: TableDefinition<'_, &str, u64> = TableDefinition::new("closed");
/// What only grows, by name.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
const TERM: &str = "term";
/// The last session number that was given.
const NUMBER: &str = "session";

/// Sessions of all lives of a coordinator.
pub struct RedbStore {
    database: Database,
    path: PathBuf,
}

impl fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl RedbStore {
    /// Opens the store in a directory, which is made if there is none. This blocks.
    ///
    /// # Errors
    /// [`MetaError::InUse`], [`MetaError::Corrupt`], [`MetaError::Version`], [`MetaError::Io`].
    pub fn open(directory: &Path) -> Result<Self, MetaError> {
        let path = directory.join(FILE);
        let io = |error: std::io::Error| MetaError::Io {
            path: path.display().to_string(),
            what: error.to_string(),
        };
        fs::create_dir_all(directory).map_err(io)?;
        let is_new = match fs::metadata(&path) {
            // redb would begin a new one in it.
            Ok(file) if file.len() == 0 => return Err(corrupt(&path, "the file is empty")),
            Ok(_) => false,
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(io(error)),
        };
        // A page whose checksum was made to fit may still lead redb where it panics.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = Database::builder()
                .set_cache_size(CACHE_BYTES)
                .set_check_integrity_on_open(true)
                .create(&path)
                .map_err(|error| translated(&path, error.into()))?;
            let store = Self { database, path: path.clone() };
            // All tables are there from now on.
            store.write(|tables| tables.check())?;
            Ok(store)
        }));
        let store = opened.unwrap_or_else(|_panic| Err(corrupt(&path, "it can't be read")))?;
        if is_new {
            // The file is in its directory after a power cut too.
            File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)?;
        }
        Ok(store)
    }

    /// Runs one transaction; what fails leaves nothing.
    fn write<T>(&self, change: impl FnOnce(&mut Tables<'_>) -> Result<T, Fault>) -> Result<T, MetaError> {
        let run = || {
            let transaction = self.database.begin_write().map_err(redb::Error::from)?;
            let done = change(&mut Tables::open(&transaction)?)?;
            transaction.commit().map_err(redb::Error::from)?;
            Ok(done)
        };
        run().map_err(|fault| self.error(fault))
    }

    fn error(&self, fault: Fault) -> MetaError {
        match fault {
            Fault::Refused(error) => error,
            Fault::Store(error) => translated(&self.path, error),
            Fault::Damaged(what) => corrupt(&self.path, what),
            Fault::Record(session, Unreadable::Corrupt(what)) => {
                corrupt(&self.path, format!("session {session}: {what}"))
            }
            Fault::Record(_, Unreadable::Version(found)) => {
                MetaError::Version { path: self.path.display().to_string(), found, known: VERSION }
            }
        }
    }
}

fn corrupt(path: &Path, what: impl Into<String>) -> MetaError {
    MetaError::Corrupt { path: path.display().to_string(), what: what.into() }
}

fn translated(path: &Path, error: redb::Error) -> MetaError {
    let shown = path.display().to_string();
    match error {
        redb::Error::DatabaseAlreadyOpen => MetaError::InUse { path: shown },
        redb::Error::Corrupted(what) => MetaError::Corrupt { path: shown, what },
        redb::Error::Io(error)
            if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            MetaError::Corrupt { path: shown, what: error.to_string() }
        }
        other @ (redb::Error::UpgradeRequired(_)
        | redb::Error::RepairAborted
        | redb::Error::TableTypeMismatch { .. }
        | redb::Error::TableIsMultimap(_)
        | redb::Error::TypeDefinitionChanged { .. }) => {
            MetaError::Corrupt { path: shown, what: other.to_string() }
        }
        other => MetaError::Io { path: shown, what: other.to_string() },
    }
}

/// Why a transaction ends without effect.
enum Fault {
    Refused(MetaError),
    Store(redb::Error),
    Damaged(String),
    Record(u64, Unreadable),
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Store(error.into())
    }
}

/// The tables within one transaction.
struct Tables<'a> {
    sessions: Table<'a, u64, &'static [u8]>,
    names: Table<'a, &'static str, u64>,
    closed: Table<'a, &'static str, u64>,
    counters: Table<'a, &'static str, u64>,
}

impl<'a> Tables<'a> {
    fn open(transaction: &'a WriteTransaction) -> Result<Self, Fault> {
        Ok(Self {
            sessions: transaction.open_table(SESSIONS)?,
            names: transaction.open_table(NAMES)?,
            closed: transaction.open_table(CLOSED)?,
            counters: transaction.open_table(COUNTERS)?,
        })
    }

    /// That records can be read, and names lead to them.
    fn check(&mut self) -> Result<(), Fault> {
        let mut named = 0;
        let last = self.counter(NUMBER)?;
        for entry in self.sessions.iter()? {
            let (session, bytes) = entry?;
            let session = session.value();
            let record = decoded(session, bytes.value())?;
            let by_name = self.names.get(record.name.as_str())?.map(|number| number.value());
            if by_name != Some(session) || session > last {
                return Err(Fault::Damaged(format!("session {session} of {last} has name {by_name:?}")));
            }
            named += 1;
        }
        let names = self.names.iter()?.count();
        if names != named {
            return Err(Fault::Damaged(format!("{names} names of {named} sessions")));
        }
        Ok(())
    }

    fn counter(&self, name: &str) -> Result<u64, Fault> {
        Ok(self.counters.get(name)?.map_or(0, |value| value.value()))
    }

    fn count(&mut self, name: &str) -> Result<u64, Fault> {
        let next = match self.counter(name)? {
            0 if name == NUMBER => Some(first_number()),
            last => last.checked_add(1),
        };
        let next = next.ok_or_else(|| Fault::Damaged(format!("counter {name} is at its end")))?;
        self.counters.insert(name, next)?;
        Ok(next)
    }

    fn create(&mut self, session: u64, record: &SessionRecord) -> Result<(), Fault> {
        let name = record.name.as_str();
        if let Some(session) = self.names.get(name)?.map(|number| number.value()) {
            return Err(Fault::Refused(MetaError::NameTaken { name: name.to_owned(), session }));
        }
        if session == 0 || session > self.counter(NUMBER)? || self.sessions.get(session)?.is_some() {
            return Err(Fault::Refused(MetaError::Number { session }));
        }
        self.closed.remove(name)?;
        self.names.insert(name, session)?;
        self.put(session, record)
    }

    fn put(&mut self, session: u64, record: &SessionRecord) -> Result<(), Fault> {
        let bytes = record.encode().map_err(|error| Fault::Damaged(error.to_string()))?;
        self.sessions.insert(session, &bytes[..])?;
        Ok(())
    }

    fn change(
        &mut self,
        session: u64,
        change: impl FnOnce(&mut SessionRecord) -> Result<(), MetaError>,
    ) -> Result<(), Fault> {
        let record = self.sessions.get(session)?.map(|bytes| decoded(session, bytes.value()));
        let unknown = Fault::Refused(MetaError::Unknown { session, shard: None });
        let mut record = record.ok_or(unknown)??;
        change(&mut record).map_err(Fault::Refused)?;
        self.put(session, &record)
    }

    fn remove(&mut self, session: u64, now: Duration) -> Result<bool, Fault> {
        self.closed.retain(|_, closed| is_remembered(closed, now))?;
        let Some(record) = self.forget(session)? else { return Ok(false) };
        self.closed.insert(record.name.as_str(), now.as_secs())?;
        Ok(true)
    }

    fn forget(&mut self, session: u64) -> Result<Option<SessionRecord>, Fault> {
        let removed = self.sessions.remove(session)?.map(|bytes| decoded(session, bytes.value()));
        let record = removed.transpose()?;
        if let Some(record) = &record {
            self.names.remove(record.name.as_str())?;
        }
        Ok(record)
    }
}

fn decoded(session: u64, bytes: &[u8]) -> Result<SessionRecord, Fault> {
    SessionRecord::decode(bytes).map_err(|unreadable| Fault::Record(session, unreadable))
}

impl MetaStore for RedbStore {
    fn bump_term(&self) -> Result<u64, MetaError> {
        self.write(|tables| tables.count(TERM))
    }

    fn reserve_number(&self) -> Result<u64, MetaError> {
        self.write(|tables| tables.count(NUMBER))
    }

    fn create(&self, record: &SessionRecord) -> Result<u64, MetaError> {
        self.write(|tables| {
            let session = tables.count(NUMBER)?;
            tables.create(session, record).map(|()| session)
        })
    }

    fn create_as(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.write(|tables| tables.create(session, record))
    }

    fn update_shard(
        &self,
        session: u64,
        shard: usize,
        expected: u64,
        epoch: u64,
        members: &[Holder],
    ) -> Result<(), MetaError> {
        self.write(|tables| {
            tables.change(session, |record| record.replace_members(session, shard, expected, epoch, members))
        })
    }

    fn update_shards(&self, updates: &[ShardUpdate]) -> Result<Vec<Result<(), MetaError>>, MetaError> {
        self.write(|tables| {
            let update = |update: &ShardUpdate| {
                let ShardUpdate { session, shard, expected, epoch, members } = update;
                let changed = tables.change(*session, |record| {
                    record.replace_members(*session, *shard, *expected, *epoch, members)
                });
                match changed {
                    Ok(()) => Ok(Ok(())),
                    Err(Fault::Refused(error)) => Ok(Err(error)),
                    Err(fault) => Err(fault),
                }
            };
            updates.iter().map(update).collect()
        })
    }

    fn settle(&self, session: u64, record: &SessionRecord) -> Result<(), MetaError> {
        self.write(|tables| {
            tables.change(session, |there| {
                there.check_settles(session, record)?;
                *there = record.clone();
                Ok(())
            })
        })
    }

    fn forget(&self, session: u64) -> Result<bool, MetaError> {
        self.write(|tables| Ok(tables.forget(session)?.is_some()))
    }

    fn set_writer_epoch(&self, session: u64, writer_epoch: u64) -> Result<(), MetaError> {
        self.write(|tables| tables.change(session, |record| record.raise_writer_epoch(writer_epoch)))
    }

    fn remove(&self, session: u64, now: Duration) -> Result<bool, MetaError> {
        self.write(|tables| tables.remove(session, now))
    }

    fn was_closed(&self, name: &str, now: Duration) -> Result<bool, MetaError> {
        let run = || {
            let closed =
                self.database.begin_read()?.open_table(CLOSED)?.get(name)?.map(|closed| closed.value());
            Ok(closed.is_some_and(|closed| is_remembered(closed, now)))
        };
        run().map_err(|fault| self.error(fault))
    }

    fn number_of(&self, name: &str) -> Result<Option<u64>, MetaError> {
        let run = || {
            let number = self.database.begin_read()?.open_table(NAMES)?.get(name)?;
            Ok(number.map(|number| number.value()))
        };
        run().map_err(|fault| self.error(fault))
    }

    fn all(&self) -> Result<BTreeMap<u64, SessionRecord>, MetaError> {
        let run = || {
            let sessions = self.database.begin_read()?.open_table(SESSIONS)?;
            let mut all = BTreeMap::new();
            for entry in sessions.iter()? {
                let (session, bytes) = entry?;
                all.insert(session.value(), decoded(session.value(), bytes.value())?);
            }
            Ok(all)
        };
        run().map_err(|fault| self.error(fault))
    }
}
