//! Who holds the replicas of a shard beside the one that computes it.

use super::{Keeper, Shard};
use crate::session::SessionSpec;

/// Gives each shard, which has a primary, its other members, as far as there are workers. `keepers` are those that members are
/// indices of.
///
/// The emptiest worker comes first, where empty means how much of its free memory the shards that it has so far would take. Of equal
/// ones it is the next behind the primary, so that equal shards on equal workers go around in a ring, and everybody has as many
/// second copies as first ones. Who comes last may find nobody empty whose hosts it hasn't got, so in the end replicas move away from the
/// fullest, as long as that makes it less full than it was and nobody else as full.
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
    // Each move makes the fullest emptier, so this ends by itself; the bound is for the time that it takes.
    for _move in 0..shards.len() * spec.replicas {
        let Some((shard, place, to)) = best_move(shards, keepers, &loads, spec) else { break };
        let Shard { bytes, members, .. } = &mut shards[shard];
        loads[members[place]] = loads[members[place]].saturating_sub(*bytes);
        loads[to] = loads[to].saturating_add(*bytes);
        members[place] = to;
    }
}

/// Which part of its free memory a worker would need.
fn part(load: u64, keeper: &Keeper) -> f64 {
    load as f64 / keeper.free_bytes.max(1) as f64
}

/// Of the fullest worker's replicas that aren't primary the one, and the place for it, that leave the fuller of both workers the
/// emptiest: the shard, which of its members, and who is to have it.
fn best_move(
    shards: &[Shard],
    keepers: &[&Keeper],
    loads: &[u64],
    spec: &SessionSpec,
) -> Option<(usize, usize, usize)> {
    let parts: Vec<f64> = loads.iter().zip(keepers).map(|(load, keeper)| part(*load, keeper)).collect();
    let fullest = (0..parts.len()).max_by(|a, b| parts[*a].total_cmp(&parts[*b]))?;
    let mut best: Option<(f64, (usize, usize, usize))> = None;
    for (at, shard) in shards.iter().enumerate() {
        let Some(place) = shard.members.iter().skip(1).position(|member| *member == fullest) else {
            continue;
        };
        let place = place + 1;
        let stay = || shard.members.iter().filter(|member| **member != fullest);
        let was_apart = stay().all(|member| keepers[*member].host != keepers[fullest].host);
        for (to, keeper) in keepers.iter().enumerate() {
            let is_apart = stay().all(|member| keepers[*member].host != keeper.host);
            if shard.members.contains(&to) || (was_apart || !spec.allow_same_host) && !is_apart {
                continue;
            }
            let left = part(loads[fullest].saturating_sub(shard.bytes), keepers[fullest]);
            let fuller = left.max(part(loads[to].saturating_add(shard.bytes), keeper));
            if fuller < best.map_or(parts[fullest], |(fuller, _)| fuller) {
                best = Some((fuller, (at, place, to)));
            }
        }
    }
    best.map(|(_, chosen)| chosen)
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
            let key = (load > keeper.free_bytes, !is_apart, part(load, keeper), step);
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
