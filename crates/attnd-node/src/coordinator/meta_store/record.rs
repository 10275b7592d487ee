//! One session as a store has it, and as bytes: JSON with a version, so that a person can read it and an older program refuses it.

use std::time::Duration;

use attnd_kernel::{Dtype, Storage};
use attnd_plan::session::{Holder, SessionName, SessionSpec};
use attnd_plan::{Piece, WorkerId};
use serde::{Deserialize, Serialize};

use super::MetaError;

/// The version that is written.
pub(super) const VERSION: u64 = 1;

/// What must be known of a session after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRecord {
    /// Its name.
    pub name: SessionName,
    /// What it is.
    pub spec: SessionSpec,
    /// Of whoever may write.
    pub writer_epoch: u64,
    /// Who holds what.
    pub shards: Vec<ShardRecord>,
    /// The session that it was forked from.
    pub parent: Option<u64>,
    /// A fork that makes it has begun, and nobody has been told that it was done.
    pub pending: bool,
    /// When it was made, as the time since 1970: for people.
    pub created: Duration,
}

/// Who holds a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRecord {
    /// Kv groups times slots.
    pub pieces: Vec<Piece>,
    /// Of this set of members.
    pub epoch: u64,
    /// The first one computes.
    pub members: Vec<Holder>,
}

/// Why bytes are no record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Of a later program.
    Version(u64),
    /// Not what was written.
    Corrupt(String),
}

impl SessionRecord {
    /// Gives a shard other members; see [`super::MetaStore::update_shard`].
    pub(super) fn replace_members(
        &mut self,
        session: u64,
        shard: usize,
        expected: u64,
        epoch: u64,
        members: &[Holder],
    ) -> Result<(), MetaError> {
        let unknown = MetaError::Unknown { session, shard: Some(shard) };
        let record = self.shards.get_mut(shard).ok_or(unknown)?;
        if record.epoch == epoch && record.members == members {
            return Ok(());
        }
        if record.epoch != expected {
            return Err(MetaError::Epoch { session, shard, expected, found: record.epoch });
        }
        if epoch <= expected {
            return Err(MetaError::Backwards { old: expected, new: epoch });
        }
        record.epoch = epoch;
        record.members = members.to_vec();
        Ok(())
    }

    /// See [`super::MetaStore::settle`].
    pub(super) fn check_settles(&self, session: u64, record: &Self) -> Result<(), MetaError> {
        if self.pending && self.name == record.name {
            return Ok(());
        }
        Err(MetaError::Unknown { session, shard: None })
    }

    /// See [`super::MetaStore::set_writer_epoch`].
    pub(super) fn raise_writer_epoch(&mut self, writer_epoch: u64) -> Result<(), MetaError> {
        if writer_epoch <= self.writer_epoch {
            return Err(MetaError::Backwards { old: self.writer_epoch, new: writer_epoch });
        }
        self.writer_epoch = writer_epoch;
        Ok(())
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(&Written::from(self))
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let corrupt = |error: serde_json::Error| Unreadable::Corrupt(error.to_string());
        let Versioned { version } = serde_json::from_slice(bytes).map_err(corrupt)?;
        if version != VERSION {
            return Err(Unreadable::Version(version));
        }
        let written: Written = serde_json::from_slice(bytes).map_err(corrupt)?;
        written.read().map_err(Unreadable::Corrupt)
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u64,
    name: String,
    spec: WrittenSpec,
    writer_epoch: u64,
    shards: Vec<WrittenShard>,
    parent: Option<u64>,
    pending: bool,
    created_unix_seconds: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSpec {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: String,
    storage: String,
    value_is_key_prefix: bool,
    replicas: usize,
    acks: usize,
    ttl_seconds: u64,
    max_tokens: usize,
    allow_same_host: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenShard {
    /// Kv groups from and to, slots from and to.
    pieces: Vec<[usize; 4]>,
    epoch: u64,
    members: Vec<WrittenHolder>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenHolder {
    worker: String,
    incarnation: u64,
}

impl From<&SessionRecord> for Written {
    fn from(record: &SessionRecord) -> Self {
        let spec = &record.spec;
        let holder = |holder: &Holder| WrittenHolder {
            worker: holder.worker.to_string(),
            incarnation: holder.incarnation,
        };
        let ends = |piece: &Piece| [piece.groups.start, piece.groups.end, piece.slots.start, piece.slots.end];
        let shards = record.shards.iter().map(|shard| WrittenShard {
            pieces: shard.pieces.iter().map(ends).collect(),
            epoch: shard.epoch,
            members: shard.members.iter().map(holder).collect(),
        });
        Self {
            version: VERSION,
            name: record.name.to_string(),
            spec: WrittenSpec {
                layers: spec.layers,
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                value_dim: spec.value_dim,
                dtype: spec.dtype.to_string(),
                storage: spec.storage.to_string(),
                value_is_key_prefix: spec.value_is_key_prefix,
                replicas: spec.replicas,
                acks: spec.acks,
                ttl_seconds: spec.ttl.as_secs(),
                max_tokens: spec.max_tokens,
                allow_same_host: spec.allow_same_host,
            },
            writer_epoch: record.writer_epoch,
            shards: shards.collect(),
            parent: record.parent,
            pending: record.pending,
            created_unix_seconds: record.created.as_secs(),
        }
    }
}

impl Written {
    fn read(self) -> Result<SessionRecord, String> {
        let spec = self.spec.read()?;
        let shards =
            self.shards.into_iter().map(|shard| shard.read(spec.kv_heads)).collect::<Result<_, _>>()?;
        Ok(SessionRecord {
            name: SessionName::new(self.name).map_err(|error| format!("a name that isn't {error}"))?,
            spec,
            writer_epoch: self.writer_epoch,
            shards,
            parent: self.parent,
            pending: self.pending,
            created: Duration::from_secs(self.created_unix_seconds),
        })
    }
}

impl WrittenSpec {
    fn read(self) -> Result<SessionSpec, String> {
        let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
        let storages = [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4];
        let dtype = dtypes.into_iter().find(|dtype| dtype.to_string() == self.dtype);
        let storage = storages.into_iter().find(|storage| storage.to_string() == self.storage);
        let spec = SessionSpec {
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            dtype: dtype.ok_or_else(|| format!("dtype {:?}", self.dtype))?,
            storage: storage.ok_or_else(|| format!("storage {:?}", self.storage))?,
            value_is_key_prefix: self.value_is_key_prefix,
            replicas: self.replicas,
            acks: self.acks,
            ttl: Duration::from_secs(self.ttl_seconds),
            max_tokens: self.max_tokens,
            allow_same_host: self.allow_same_host,
        };
        spec.check().map_err(|error| format!("a spec with {error}"))?;
        Ok(spec)
    }
}

impl WrittenShard {
    fn read(self, n_groups: usize) -> Result<ShardRecord, String> {
        let piece = |[group, group_end, slot, slot_end]: [usize; 4]| {
            let is_one = group < group_end && group_end <= n_groups && slot < slot_end && slot_end <= 64;
            let piece = Piece { groups: group..group_end, slots: slot..slot_end };
            is_one.then_some(piece).ok_or_else(|| {
                format!("a shard of kv heads {group}..{group_end} of {n_groups} and slots {slot}..{slot_end}")
            })
        };
        let holder = |holder: WrittenHolder| {
            let worker = WorkerId::new(holder.worker).map_err(|error| error.to_string())?;
            Ok(Holder { worker, incarnation: holder.incarnation })
        };
        Ok(ShardRecord {
            pieces: self.pieces.into_iter().map(piece).collect::<Result<_, String>>()?,
            epoch: self.epoch,
            members: self.members.into_iter().map(holder).collect::<Result<_, String>>()?,
        })
    }
}
