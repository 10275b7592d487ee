//! Which workers hold which shards of a session: decided once, when it is opened, for all its layers.
//!
//! A shard is an interval of the line of kv groups and slots, cut where a call of one query would be cut: by speed, as
//! the primary of each shard computes it, where heads end if that costs little. A worker is the primary of one shard at most. Then
//! the other replicas go, shard by shard and one after the other, to whoever has the most room for them on another host.
//!
//! **Speed and memory.** All of it is for the most tokens that the session may have, if the memory that is free now holds as many,
//! or else for half as many, and so on: what fits decides first, and then speed, within the room that is left. Nothing is
//! reserved; appends do that, so the number says how far a session gets if nobody else comes.
//!
//! **How many.** A worker more makes a step's arithmetic shorter, and costs the coordinator a message there and back. Every replica
//! hears of every op, so there are never fewer workers than replicas, and those that must hear of a step compute too.

use std::ops::Range;

use attnd_kernel::slot::N_SLOTS;

use self::copies::copies;
use super::spec::SpecError;
use super::{Holder, SessionSpec};
use crate::cost::CostModel;
use crate::line::{CutCosts, Footprint, Hand, Line};
use crate::planner::{Piece, cut_by, duration};
use crate::topology::usable_speed;

mod copies;
mod moves;

pub use self::moves::{Move, rebalance, replacement};

/// A worker that may hold shards.
#[derive(Clone, Debug, PartialEq)]
pub struct Keeper {
    /// Which life of which worker.
    pub holder: Holder,
    /// Its failure domain.
    pub host: String,
    /// Measured speed of all its threads, in 10^9 floating-point operations per second. What is not in 0.001 to 1,000,000 counts as
    /// very slow.
    pub gflops: f64,
    /// Memory that sessions may still take, in bytes.
    pub free_bytes: u64,
}

/// Who holds what of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// They tile (kv groups x 64 slots), in this order.
    pub shards: Vec<ShardPlacement>,
    /// Tokens of each layer for which the memory suffices that is free now, at most those that the session may have.
    pub tokens: usize,
    /// One sentence for a person: how many shards and workers, cut by what, and why.
    pub reason: String,
}

/// Who holds one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlacement {
    /// At most three, ascending: the end of one kv group, whole ones, the beginning of another.
    pub pieces: Vec<Piece>,
    /// As many as the session has replicas, each on another host if it doesn't allow less. The first one computes.
    pub members: Vec<Holder>,
    /// What one replica takes, all layers together; in a new placement, with as many tokens as the session may have.
    pub bytes: u64,
}

/// Why a session can't be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// It makes no sense anywhere.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Nobody to hold it.
    #[error("no worker is alive")]
    NoWorkers,
    /// Replicas would share a host, and may not.
    #[error("{domains} domains for R={replicas}")]
    Domains {
        /// Hosts that workers are on.
        domains: usize,
        /// Replicas of each shard.
        replicas: usize,
    },
    /// Replicas would share a worker.
    #[error("{workers} workers for R={replicas}")]
    Workers {
        /// That are alive.
        workers: usize,
        /// Replicas of each shard.
        replicas: usize,
    },
}

/// Places a session on `keepers`, in any order; equal inputs give equal placements. More keepers never make it fail.
///
/// # Errors
/// If the spec makes no sense, or there are fewer hosts, or workers, than replicas.
pub fn place(spec: &SessionSpec, keepers: &[Keeper]) -> Result<Placement, PlacementError> {
    spec.check()?;
    let mut alive: Vec<&Keeper> = keepers.iter().collect();
    alive.sort_by(|a, b| {
        let numbers = a.gflops.total_cmp(&b.gflops).then(a.free_bytes.cmp(&b.free_bytes));
        a.holder.cmp(&b.holder).then_with(|| a.host.cmp(&b.host)).then(numbers)
    });
    alive.dedup_by(|a, b| a.holder.worker == b.holder.worker);
    let (workers, domains, replicas) = (alive.len(), count_hosts(&alive), spec.replicas);
    if workers == 0 {
        return Err(PlacementError::NoWorkers);
    }
    if !spec.allow_same_host && domains < replicas {
        return Err(PlacementError::Domains { domains, replicas });
    }
    if workers < replicas {
        return Err(PlacementError::Workers { workers, replicas });
    }
    let placer = Placer { spec, costs: StepCosts::new(spec), preferred: by_preference(spec, alive) };
    Ok(placer.place())
}

/// Bytes of a shard with these pieces and so many tokens in each layer, all layers together.
pub fn shard_bytes(spec: &SessionSpec, pieces: &[Piece], tokens: usize) -> u64 {
    if tokens == 0 {
        return 0;
    }
    let line = line_of(spec, tokens);
    let places = |piece: &Piece| {
        let of_group = |group: usize| group * N_SLOTS + piece.slots.start..group * N_SLOTS + piece.slots.end;
        piece.groups.clone().map(|group| line.resident_bytes(&of_group(group))).sum::<u64>()
    };
    pieces.iter().map(places).sum()
}

fn count_hosts(keepers: &[&Keeper]) -> usize {
    let mut hosts: Vec<&str> = keepers.iter().map(|keeper| keeper.host.as_str()).collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts.len()
}

/// The order in which workers are taken: those first that have memory at all, then the fastest, but the first ones are on as many
/// hosts as there must be.
fn by_preference<'a>(spec: &SessionSpec, mut keepers: Vec<&'a Keeper>) -> Vec<&'a Keeper> {
    let page_bytes = ShardFootprint::of(spec).page_bytes;
    let is_full = |keeper: &Keeper| keeper.free_bytes < page_bytes;
    keepers.sort_by(|a, b| {
        let speed = usable_speed(b.gflops).total_cmp(&usable_speed(a.gflops));
        is_full(a).cmp(&is_full(b)).then(speed)
    });
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for keeper in keepers {
        let is_new = first.iter().all(|taken: &&Keeper| taken.host != keeper.host);
        if is_new && first.len() < spec.replicas { first.push(keeper) } else { others.push(keeper) }
    }
    first.append(&mut others);
    first
}

/// Bytes of an interval of a session's line: its pages, in all layers.
#[derive(Clone, Copy, Debug)]
struct ShardFootprint {
    page_bytes: u64,
}

impl ShardFootprint {
    fn of(spec: &SessionSpec) -> Self {
        Self { page_bytes: spec.page_layout().resident_bytes(1).saturating_mul(spec.layers as u64) }
    }
}

impl Footprint for ShardFootprint {
    fn bytes(&self, line: &Line<Self>, places: &Range<usize>) -> u64 {
        line.pages(places).saturating_mul(self.page_bytes)
    }
}

fn line_of(spec: &SessionSpec, tokens: usize) -> Line<ShardFootprint> {
    Line::of(spec.kv_heads, tokens, ShardFootprint::of(spec))
}

/// What a step of one token costs in one layer.
#[derive(Clone, Copy, Debug)]
struct StepCosts {
    cut: CutCosts,
    /// Of a message to a worker, and of its answer.
    worker_seconds: f64,
}

impl StepCosts {
    fn new(spec: &SessionSpec) -> Self {
        let CostModel { link_bytes_per_second, message_seconds, kernel_efficiency, flops_per_byte, .. } =
            CostModel::default();
        let (d, dv, group) = (spec.head_dim as f64, spec.value_dim as f64, spec.group_size() as f64);
        // One page of 256 keys, without what an arena loses.
        let bytes_per_key = spec.page_layout().resident_bytes(1) as f64 / 256.0;
        let flops_per_key = (2.0 * (d + dv) * group).max(bytes_per_key * flops_per_byte);
        let cut = CutCosts {
            key_seconds: flops_per_key / (1e9 * kernel_efficiency),
            // Partials and queries of all groups travel in one message, and rows of an append in no more than they would.
            node_seconds: group * (dv + 2.0) * 4.0 / link_bytes_per_second,
            query_seconds: group * d * 4.0 / link_bytes_per_second,
            run_seconds: 0.0,
        };
        Self { cut, worker_seconds: 2.0 * message_seconds }
    }
}

struct Placer<'a> {
    spec: &'a SessionSpec,
    costs: StepCosts,
    /// The best first.
    preferred: Vec<&'a Keeper>,
}

/// An interval, and who is to have it.
#[derive(Clone, Debug)]
struct Shard {
    places: Range<usize>,
    bytes: u64,
    /// Indices of keepers, ascending by id; the primary is first.
    members: Vec<usize>,
}

/// A placement on the first `workers` of those that are preferred.
struct Draft<'a> {
    keepers: Vec<&'a Keeper>,
    shards: Vec<Shard>,
    /// A step of one layer.
    seconds: f64,
}

impl<'a> Placer<'a> {
    fn place(&self) -> Placement {
        let most = self.spec.max_tokens;
        let lengths =
            std::iter::successors(Some(most), |tokens| Some(tokens / 2)).take_while(|tokens| *tokens > 0);
        let fitting = lengths.filter_map(|tokens| Some((self.fitting(tokens)?, tokens))).next();
        let (draft, tokens) = fitting.unwrap_or_else(|| {
            // Not even a page fits everywhere: the first append will say so.
            (self.draft(self.fewest_seconds(most), most, false), most)
        });
        self.finish(&draft, tokens)
    }

    /// The draft for so many tokens that has the fastest step, or else the memory.
    fn fitting(&self, tokens: usize) -> Option<Draft<'a>> {
        let all = self.preferred.len();
        let sizes =
            std::iter::successors(Some(self.fewest_seconds(tokens)), |n| (*n < all).then(|| all.min(n * 2)));
        sizes.map(|n| self.draft(n, tokens, true)).find(|draft| draft.fits())
    }

    /// With how many workers a step is fastest, if any cut were possible.
    fn fewest_seconds(&self, tokens: usize) -> usize {
        let line = line_of(self.spec, tokens);
        let key_seconds = line.keys(&(0..line.len())) as f64 * self.costs.cut.key_seconds;
        let mut all_gflops = 0.0;
        let mut best = (f64::INFINITY, self.preferred.len());
        for (i, keeper) in self.preferred.iter().enumerate() {
            all_gflops += usable_speed(keeper.gflops);
            let seconds = key_seconds / all_gflops + (i + 1) as f64 * self.costs.worker_seconds;
            if i + 1 >= self.spec.replicas && seconds < best.0 {
                best = (seconds, i + 1);
            }
        }
        best.1
    }

    /// A placement on the best `n` workers. Where memory isn't to be minded, or nothing fits, it is cut by speed alone.
    fn draft(&self, n: usize, tokens: usize, minds_memory: bool) -> Draft<'a> {
        let mut keepers = self.preferred.get(..n).unwrap_or(&self.preferred).to_vec();
        keepers.sort_by(|a, b| a.holder.cmp(&b.holder));
        let hands = |minds_memory: bool| -> Vec<Hand> {
            let free = |keeper: &Keeper| if minds_memory { keeper.free_bytes } else { u64::MAX };
            let hand =
                |keeper: &&Keeper| Hand { gflops: usable_speed(keeper.gflops), free_bytes: free(keeper) };
            keepers.iter().map(hand).collect()
        };
        let line = line_of(self.spec, tokens);
        let cut = |minds_memory: bool| line.cut(&hands(minds_memory), false, &self.costs.cut);
        let intervals = minds_memory.then(|| cut(true)).flatten().or_else(|| cut(false)).unwrap_or_default();
        let with_places = intervals.into_iter().enumerate().filter_map(|(i, places)| Some((i, places?)));
        let mut shards: Vec<Shard> = with_places
            .map(|(i, places)| Shard { bytes: line.resident_bytes(&places), members: vec![i], places })
            .collect();
        let slowest = shards.iter().filter_map(|shard| {
            let primary = keepers.get(*shard.members.first()?)?;
            Some(line.keys(&shard.places) as f64 * self.costs.cut.key_seconds / usable_speed(primary.gflops))
        });
        let slowest = slowest.fold(0.0, |a: f64, b| a.max(b));
        let nodes: usize = shards.iter().map(|shard| line.nodes(&shard.places)).sum();
        let seconds = slowest
            + n as f64 * self.costs.worker_seconds
            + nodes as f64 * (self.costs.cut.node_seconds + self.costs.cut.query_seconds);
        copies(&mut shards, &keepers, self.spec);
        Draft { keepers, shards, seconds }
    }

    fn finish(&self, draft: &Draft<'_>, tokens: usize) -> Placement {
        let most = self.spec.max_tokens;
        let room = self.room(draft);
        let line = line_of(self.spec, most);
        let shards: Vec<ShardPlacement> = draft
            .shards
            .iter()
            .map(|shard| ShardPlacement {
                pieces: line.pieces(&shard.places),
                members: shard.members.iter().map(|i| draft.keepers[*i].holder.clone()).collect(),
                bytes: line.resident_bytes(&shard.places),
            })
            .collect();
        Placement { reason: self.reason(draft, tokens, room), shards, tokens: room }
    }

    /// The most tokens for which the memory suffices.
    fn room(&self, draft: &Draft<'_>) -> usize {
        let fits = |tokens: usize| {
            let line = line_of(self.spec, tokens);
            draft.fits_with(|shard| line.resident_bytes(&shard.places))
        };
        let (mut good, mut bad) = (0, self.spec.max_tokens + 1);
        while bad - good > 1 {
            let middle = good.midpoint(bad);
            if fits(middle) { good = middle } else { bad = middle }
        }
        good
    }

    fn reason(&self, draft: &Draft<'_>, tokens: usize, room: usize) -> String {
        let SessionSpec { replicas, kv_heads, max_tokens, .. } = *self.spec;
        let mut used: Vec<usize> =
            draft.shards.iter().flat_map(|shard| shard.members.iter().copied()).collect();
        used.sort_unstable();
        used.dedup();
        let used: Vec<&Keeper> = used.into_iter().filter_map(|i| draft.keepers.get(i).copied()).collect();
        let all = self.preferred.len();
        let splits = draft.shards.iter().any(|shard| shard.places.start % N_SLOTS != 0);
        let cut = cut_by(draft.shards.len(), splits, kv_heads);
        let why = match draft.keepers.len() {
            _ if room < max_tokens => format!("there is memory for {room} of {max_tokens} tokens"),
            n if n > replicas => format!("{replicas} would take {}", self.step_of(replicas, tokens)),
            n if n < all => format!("{} would take {}", n + 1, self.step_of(n + 1, tokens)),
            1 => "there is one".to_owned(),
            _ => "each replica is on another worker".to_owned(),
        };
        format!(
            "{} on {} of {} and {}, {cut}, {}, a step of one layer of {tokens} tokens predicted {}: {why}",
            counted(draft.shards.len(), "shard"),
            used.len(),
            counted(all, "worker"),
            counted(count_hosts(&used), "host"),
            counted(replicas, "replica"),
            duration(draft.seconds)
        )
    }

    fn step_of(&self, n: usize, tokens: usize) -> String {
        duration(self.draft(n, tokens, false).seconds)
    }
}

impl Draft<'_> {
    /// Whether everybody has room for what it is to hold.
    fn fits(&self) -> bool {
        self.fits_with(|shard| shard.bytes)
    }

    fn fits_with(&self, bytes: impl Fn(&Shard) -> u64) -> bool {
        let mut loads = vec![0_u64; self.keepers.len()];
        for shard in &self.shards {
            let bytes = bytes(shard);
            for member in &shard.members {
                loads[*member] = loads[*member].saturating_add(bytes);
            }
        }
        loads.iter().zip(&self.keepers).all(|(load, keeper)| *load <= keeper.free_bytes)
    }
}

/// A number of things, for a person.
fn counted(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

#[cfg(test)]
mod tests;
