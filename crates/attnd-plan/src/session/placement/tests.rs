//! Properties of placements, over random sessions and clusters.

use std::collections::BTreeMap;
use std::time::Duration;

use attnd_kernel::{Dtype, Storage};
use proptest::prelude::*;

use super::*;

fn spec(kv_heads: usize, replicas: usize, max_tokens: usize) -> SessionSpec {
    SessionSpec {
        layers: 2,
        heads: 4 * kv_heads,
        kv_heads,
        head_dim: 128,
        value_dim: 128,
        dtype: Dtype::F32,
        storage: Storage::F32,
        value_is_key_prefix: false,
        replicas,
        acks: 1,
        ttl: Duration::from_secs(600),
        max_tokens,
        allow_same_host: false,
    }
}

fn keeper(i: usize, host: usize, gflops: f64, free_bytes: u64) -> Keeper {
    let holder = Holder { worker: format!("w{i:02}").parse().unwrap(), incarnation: i as u64 };
    Keeper { holder, host: format!("h{host}"), gflops, free_bytes }
}

/// As many equal workers, each on a host of its own, with memory for anything.
fn equal(n: usize) -> Vec<Keeper> {
    (0..n).map(|i| keeper(i, i, 100.0, 1 << 50)).collect()
}

fn any_keepers() -> impl Strategy<Value = Vec<Keeper>> {
    let memory = prop_oneof![Just(0_u64), 0..1_u64 << 24, 0..1_u64 << 32, Just(1_u64 << 50)];
    let speed = prop_oneof![Just(f64::NAN), Just(0.0), 0.1f64..1000.0, 100.0f64..200.0];
    proptest::collection::vec((0usize..8, speed, memory), 0..20).prop_map(|workers| {
        workers.into_iter().enumerate().map(|(i, (host, speed, free))| keeper(i, host, speed, free)).collect()
    })
}

fn any_spec() -> impl Strategy<Value = SessionSpec> {
    let tokens = prop_oneof![1usize..2000, 1usize..=1 << 20, Just(1usize << 20)];
    (1usize..12, 1usize..6, tokens, any::<bool>(), 1usize..5).prop_map(
        |(kv_heads, replicas, max_tokens, allow_same_host, layers)| SessionSpec {
            allow_same_host,
            layers,
            ..spec(kv_heads, replicas, max_tokens)
        },
    )
}

fn places(shard: &ShardPlacement) -> usize {
    shard.pieces.iter().map(|piece| piece.groups.len() * piece.slots.len()).sum()
}

/// Bytes that each worker would hold, by name.
fn loads(shards: &[ShardPlacement]) -> BTreeMap<String, u64> {
    let mut loads = BTreeMap::new();
    for shard in shards {
        for member in &shard.members {
            *loads.entry(member.worker.to_string()).or_insert(0) += shard.bytes;
        }
    }
    loads
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn shards_tile_the_session_and_replicas_are_apart(spec in any_spec(), keepers in any_keepers()) {
        let Ok(placement) = place(&spec, &keepers) else { return Ok(()) };
        let mut owners = vec![0; spec.kv_heads * N_SLOTS];
        for shard in &placement.shards {
            prop_assert!((1..=3).contains(&shard.pieces.len()));
            for piece in &shard.pieces {
                for group in piece.groups.clone() {
                    piece.slots.clone().for_each(|slot| owners[group * N_SLOTS + slot] += 1);
                }
            }
            prop_assert_eq!(shard.bytes, shard_bytes(&spec, &shard.pieces, spec.max_tokens));
            prop_assert_eq!(shard.members.len(), spec.replicas);
            let mut workers: Vec<_> = shard.members.iter().map(|member| &member.worker).collect();
            workers.sort();
            workers.dedup();
            prop_assert_eq!(workers.len(), spec.replicas);
            let host = |member: &Holder| &keepers.iter().find(|keeper| keeper.holder == *member).unwrap().host;
            let mut hosts: Vec<_> = shard.members.iter().map(host).collect();
            hosts.sort();
            hosts.dedup();
            prop_assert!(spec.allow_same_host || hosts.len() == spec.replicas);
        }
        prop_assert!(owners.iter().all(|owners| *owners == 1));
        let mut primaries: Vec<_> = placement.shards.iter().map(|shard| &shard.members[0].worker).collect();
        primaries.dedup();
        prop_assert_eq!(primaries.len(), placement.shards.len(), "a worker is primary once");
        let mut shuffled = keepers;
        shuffled.reverse();
        let len = shuffled.len();
        shuffled.rotate_left(len / 3);
        prop_assert_eq!(place(&spec, &shuffled).unwrap(), placement);
    }

    #[test]
    fn what_is_said_to_fit_fits_and_no_token_more(spec in any_spec(), keepers in any_keepers()) {
        let Ok(placement) = place(&spec, &keepers) else { return Ok(()) };
        let fits = |tokens: usize| {
            let shards = placement.shards.iter().map(|shard| ShardPlacement {
                bytes: shard_bytes(&spec, &shard.pieces, tokens),
                ..shard.clone()
            });
            let shards: Vec<ShardPlacement> = shards.collect();
            loads(&shards).iter().all(|(name, load)| {
                *load <= keepers.iter().find(|keeper| keeper.holder.worker.as_str() == name).unwrap().free_bytes
            })
        };
        prop_assert!(fits(placement.tokens));
        prop_assert!(placement.tokens == spec.max_tokens || !fits(placement.tokens + 1));
    }

    #[test]
    fn more_workers_never_make_it_fail(spec in any_spec(), keepers in any_keepers(), more in any_keepers()) {
        let fewer = place(&spec, &keepers);
        let start = keepers.len();
        let more = more.into_iter().enumerate().map(|(i, other)| keeper(start + i, i % 9, other.gflops, other.free_bytes));
        let all: Vec<Keeper> = keepers.into_iter().chain(more).collect();
        prop_assert!(fewer.is_err() || place(&spec, &all).is_ok());
    }

    #[test]
    fn primaries_have_work_by_their_speed(
        kv_heads in 1usize..20,
        speeds in proptest::collection::vec(50.0f64..500.0, 1..12),
    ) {
        let keepers: Vec<Keeper> =
            speeds.iter().enumerate().map(|(i, speed)| keeper(i, i, *speed, 1 << 50)).collect();
        let placement = place(&spec(kv_heads, 1, 1 << 20), &keepers).unwrap();
        let speed = |shard: &ShardPlacement| {
            keepers.iter().find(|keeper| keeper.holder == shard.members[0]).unwrap().gflops
        };
        let all: f64 = placement.shards.iter().map(speed).sum();
        for shard in &placement.shards {
            let (got, fair) = (places(shard), (kv_heads * N_SLOTS) as f64 * speed(shard) / all);
            prop_assert!(got as f64 <= fair * 1.04 + 2.0, "{got} places for {fair}");
        }
    }

    #[test]
    fn equal_workers_hold_equal_parts(kv_heads in 1usize..20, (n, replicas) in (1usize..12).prop_flat_map(|n| (Just(n), 1..=n.min(5)))) {
        let placement = place(&spec(kv_heads, replicas, 1 << 20), &equal(n)).unwrap();
        let all: u64 = placement.shards.iter().map(|shard| shard.bytes).sum();
        let of_place = all as f64 / (kv_heads * N_SLOTS) as f64;
        let loads = loads(&placement.shards);
        // Of 64 slots of one head 9 workers would have 7 or 8, which is no faster than 8 with 8 each.
        let fair = all as f64 * replicas as f64 / loads.len() as f64;
        prop_assert!(loads.len() == n || kv_heads * N_SLOTS < 8 * n);
        for (name, load) in loads {
            let most = fair * 1.04 + 2.0 * replicas as f64 * of_place;
            prop_assert!(load as f64 <= most, "{name} has {load}, fair is {fair}: {}", placement.reason);
        }
    }

    #[test]
    fn memory_is_used_where_it_is(
        kv_heads in 1usize..10,
        replicas in 1usize..4,
        free in proptest::collection::vec(1_u64 << 30..1_u64 << 34, 4..12),
    ) {
        let keepers: Vec<Keeper> = free.iter().enumerate().map(|(i, free)| keeper(i, i, 100.0, *free)).collect();
        let spec = spec(kv_heads, replicas, 1 << 20);
        let placement = place(&spec, &keepers).unwrap();
        // A copy of everything can't be larger than what is left beside the k largest workers, for each k, divided by the copies that
        // these can't have.
        let mut free = free;
        free.sort_unstable();
        let bound = |k: usize| free[..free.len() - k].iter().sum::<u64>() / (replicas - k) as u64;
        let best = (0..replicas).map(bound).min().unwrap();
        let whole = [Piece { groups: 0..kv_heads, slots: 0..N_SLOTS }];
        let copy = shard_bytes(&spec, &whole, placement.tokens);
        let is_whole = placement.tokens == spec.max_tokens;
        prop_assert!(is_whole || 4 * copy >= best, "{copy} of {best}: {}", placement.reason);
        prop_assert!(copy <= best);
    }

    #[test]
    fn moves_to_who_joined_are_allowed_and_help(
        spec in any_spec(), keepers in any_keepers(), most in 0usize..6, host in 0usize..9,
    ) {
        let Ok(placement) = place(&spec, &keepers) else { return Ok(()) };
        let joined = keeper(keepers.len(), host, 100.0, 1 << 50);
        let all: Vec<Keeper> = keepers.iter().cloned().chain([joined.clone()]).collect();
        let moves = rebalance(&spec, &placement.shards, &all, &joined.holder, most);
        prop_assert!(moves.len() <= most);
        let mut shards = placement.shards.clone();
        for step in &moves {
            prop_assert_eq!(&step.to, &joined.holder);
            let members = &mut shards[step.shard].members;
            let place = members.iter().position(|member| *member == step.from).unwrap();
            prop_assert!(!members.contains(&step.to));
            members[place] = step.to.clone();
            let mut hosts: Vec<&String> =
                members.iter().map(|member| &all.iter().find(|keeper| keeper.holder == *member).unwrap().host).collect();
            hosts.sort();
            hosts.dedup();
            prop_assert!(spec.allow_same_host || hosts.len() == spec.replicas);
        }
        prop_assert!(loads(&shards).values().sum::<u64>() == loads(&placement.shards).values().sum::<u64>());
    }
}

#[test]
fn heads_stay_whole_where_workers_divide_them_and_replicas_go_around() {
    let placement = place(&spec(8, 2, 1 << 17), &equal(4)).unwrap();
    let seen: Vec<(Vec<Piece>, Vec<&str>)> = placement
        .shards
        .iter()
        .map(|shard| {
            (shard.pieces.clone(), shard.members.iter().map(|member| member.worker.as_str()).collect())
        })
        .collect();
    let shard = |first: usize, members: [&'static str; 2]| {
        (vec![Piece { groups: first..first + 2, slots: 0..N_SLOTS }], members.to_vec())
    };
    let expected = [
        shard(0, ["w00", "w01"]),
        shard(2, ["w01", "w02"]),
        shard(4, ["w02", "w03"]),
        shard(6, ["w03", "w00"]),
    ];
    assert_eq!(seen, expected);
    assert_eq!(placement.tokens, 1 << 17);
    // 512 pages of 256 keys and values of 128 f32 in 2 heads and 2 layers, with what an arena loses of a chunk: nothing.
    assert_eq!(placement.shards[0].bytes, 512 * 256 * 256 * 4 * 4);
}

#[test]
fn a_reason_is_a_sentence_with_its_numbers() {
    let reason = |spec: &SessionSpec, keepers: &[Keeper]| place(spec, keepers).unwrap().reason;
    let words = reason(&spec(8, 2, 1 << 17), &equal(4));
    assert!(
        words.starts_with(
            "4 shards on 4 of 4 workers and 4 hosts, cut by heads, 2 replicas, a step of one layer of 131072 tokens predicted "
        ),
        "{words}"
    );
    assert!(words.contains(": 2 would take "), "{words}");
    let small = reason(&spec(1, 1, 10), &equal(3));
    assert!(small.starts_with("1 shard on 1 of 3 workers and 1 host, uncut, 1 replica, "), "{small}");
    assert!(small.contains(": 2 would take "), "{small}");
    let full: Vec<Keeper> = (0..3).map(|i| keeper(i, i, 100.0, 1 << 28)).collect();
    let words = reason(&spec(1, 1, 1 << 20), &full);
    assert!(words.ends_with("there is memory for 380928 of 1048576 tokens"), "{words}");
}

#[test]
fn too_few_hosts_or_workers_are_refused_with_the_numbers() {
    let two_hosts: Vec<Keeper> = (0..4).map(|i| keeper(i, i % 2, 100.0, 1 << 30)).collect();
    let refused = |spec: &SessionSpec, keepers: &[Keeper]| place(spec, keepers).unwrap_err().to_string();
    assert_eq!(refused(&spec(4, 3, 1000), &two_hosts), "2 domains for R=3");
    assert_eq!(refused(&spec(4, 3, 1000), &[]), "no worker is alive");
    let near = SessionSpec { allow_same_host: true, ..spec(4, 3, 1000) };
    assert!(place(&near, &two_hosts).is_ok());
    assert_eq!(refused(&near, &two_hosts[..2]), "2 workers for R=3");
    assert_eq!(refused(&SessionSpec { layers: 0, ..near }, &two_hosts), "layers");
    let twice = [two_hosts[0].clone(), two_hosts[0].clone()];
    assert_eq!(refused(&spec(4, 2, 1000), &twice), "1 domains for R=2");
}

#[test]
fn replicas_that_may_be_on_one_host_are_there_only_where_they_must() {
    let spec = SessionSpec { allow_same_host: true, ..spec(8, 2, 1 << 17) };
    let mut keepers: Vec<Keeper> = (0..4).map(|i| keeper(i, i / 2, 100.0, 1 << 40)).collect();
    let host = |keepers: &[Keeper], member: &Holder| {
        keepers.iter().find(|keeper| keeper.holder == *member).unwrap().host.clone()
    };
    for shard in place(&spec, &keepers).unwrap().shards {
        assert_ne!(host(&keepers, &shard.members[0]), host(&keepers, &shard.members[1]));
    }
    for keeper in &mut keepers {
        keeper.host = "h0".into();
    }
    assert_eq!(place(&spec, &keepers).unwrap().shards.len(), 4);
}

#[test]
fn a_lost_replica_is_replaced_by_who_has_the_most_memory_on_another_host() {
    let keepers: Vec<Keeper> = (0..5).map(|i| keeper(i, i / 2, 100.0, 100 * (i as u64 + 1))).collect();
    let chosen = |spec: &SessionSpec, members: &[Keeper], bytes| {
        replacement(spec, members, bytes, &keepers).map(|holder| holder.worker.to_string())
    };
    let apart = spec(4, 2, 1000);
    assert_eq!(chosen(&apart, &keepers[..1], 50).as_deref(), Some("w04"));
    assert_eq!(chosen(&apart, &keepers[4..], 50).as_deref(), Some("w03"));
    assert_eq!(chosen(&apart, &keepers[4..], 401), None, "nobody has room");
    assert_eq!(chosen(&apart, &[keepers[0].clone(), keepers[2].clone(), keepers[4].clone()], 0), None);
    let near = SessionSpec { allow_same_host: true, ..apart };
    assert_eq!(chosen(&near, &keepers[2..3], 0).as_deref(), Some("w04"), "another host comes first");
    assert_eq!(
        chosen(&near, &[keepers[0].clone(), keepers[2].clone(), keepers[4].clone()], 0).as_deref(),
        Some("w03")
    );
}

#[test]
fn who_joins_gets_a_part_and_something_to_compute() {
    let spec = spec(8, 2, 1 << 17);
    let shards = place(&spec, &equal(4)).unwrap().shards;
    // What they hold has been taken of their memory.
    let size = 8 * shards[0].bytes;
    let mut keepers = equal(5);
    for keeper in &mut keepers {
        let held = loads(&shards).get(keeper.holder.worker.as_str()).copied().unwrap_or(0);
        keeper.free_bytes = size - held;
    }
    let moves = rebalance(&spec, &shards, &keepers, &keepers[4].holder, 10);
    let expected = Move { shard: 0, from: keepers[1].holder.clone(), to: keepers[4].holder.clone() };
    assert_eq!(moves, [expected], "one second copy: a move more would leave the one it comes from with less");
    assert_eq!(rebalance(&spec, &shards, &keepers, &keepers[4].holder, 0), []);
    let stranger = Holder { worker: "w99".parse().unwrap(), incarnation: 1 };
    assert_eq!(rebalance(&spec, &shards, &keepers, &stranger, 10), []);
    // Two shards of one primary: the one that joins gets one of them to compute.
    let doubled: Vec<ShardPlacement> = shards
        .iter()
        .map(|shard| ShardPlacement {
            members: vec![keepers[0].holder.clone(), keepers[1].holder.clone()],
            ..shard.clone()
        })
        .collect();
    let first = rebalance(&spec, &doubled, &keepers, &keepers[4].holder, 1).remove(0);
    assert_eq!(first.from, keepers[0].holder);
}
