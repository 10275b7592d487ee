//! Who holds the replicas of a shard beside the one that computes it.

use super::{Keeper, Shard};
use crate::session::SessionSpec;

/// Gives each shard, which has a primary, its other members, as far as there are workers. `keepers` are those that members are
/// indices of.
///
/// The emptiest worker comes first, where empty means how much of its free memory the shards that it has so far would take. Of equal
/// ones it is the next behind the primary, so that equal shards on equal workers go around in a ring, and everybody has as many
/// second copies as first ones.
pub(super) fn copies(shards: &mut [Shard], keepers: &[&Keeper], spec: &SessionSpec) {
    let mut loads = vec![0_u64; keepers.len()];
    for shard in shards.iter() {
        for member in &shard.members {
            loads[*member] = loads[*member].saturating_add(shard.bytes);
        }
    }
    for _copy in 1..spec.replicas {
        for shard in shards.iter_mut() {
            if let Some(next) = emptiest(shard, keepers, &loads, spec) {
                loads[next] = loads[next].saturating_add(shard.bytes);
                shard.members.push(next);
            }
        }
    }
}

fn emptiest(shard: &Shard, keepers: &[&Keeper], loads: &[u64], spec: &SessionSpec) -> Option<usize> {
    let primary = shard.members.first().copied().unwrap_or(0);
    let candidates =
        (1..keepers.len()).map(|step| (step, (primary + step) % keepers.len())).filter_map(|(step, i)| {
            let keeper = keepers[i];
            let is_apart = shard.members.iter().all(|member| keepers[*member].host != keeper.host);
            let may_be = !shard.members.contains(&i) && (is_apart || spec.allow_same_host);
            let load = loads[i].saturating_add(shard.bytes);
            // Replicas on one host are what a session may allow, not what it wants: they come where there is no room elsewhere.
            let key =
                (load > keeper.free_bytes, !is_apart, load as f64 / keeper.free_bytes.max(1) as f64, step);
            may_be.then_some((key, i))
        });
    let best = candidates.min_by(
        |((full, near, part, step), _), ((other_full, other_near, other_part, other_step), _)| {
            let by_place = full.cmp(other_full).then(near.cmp(other_near));
            by_place.then(part.total_cmp(other_part)).then(step.cmp(other_step))
        },
    );
    best.map(|(_, i)| i)
}
