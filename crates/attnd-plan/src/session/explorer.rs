//! Ledger and replicas together, in clusters where everything happens in every order: messages late, twice or not at all, workers and
//! coordinators dead, streams broken, memory refused. After each step the cluster is held against the model.
//!
//! Walks are random, and each is its seed: what fails is printed with it. Every walk ends without faults, and then everything must be
//! well again.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use self::choice::{Budget, Choice, Omission, Setting};
use self::world::World;

mod choice;
mod invariants;
mod worker;
mod world;

/// SplitMix64.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) % limit as u64) as usize
    }
}

/// Walks from the beginning; returns what went wrong, and adds the states that it was in.
fn walk(setting: Setting, seed: u64, steps: usize, seen: &mut HashSet<u64>) -> Result<(), String> {
    let mut random = Seeded(seed);
    let mut world = World::new(setting);
    let mut path = Vec::new();
    for _ in 0..steps {
        let mut choices = world.choices();
        let is_rare = |choice: &Choice| choice.is_rare() || world.is_late(choice);
        if random.below(6) > 0 && choices.iter().any(|choice| !is_rare(choice)) {
            choices.retain(|choice| !is_rare(choice));
        }
        if choices.is_empty() {
            break;
        }
        let choice = choices[random.below(choices.len())];
        path.push(choice);
        world
            .choose(choice)
            .map_err(|error| format!("seed {seed}: {error}\nafter {path:?}\nin {world:#?}"))?;
        let mut hasher = DefaultHasher::new();
        world.hash(&mut hasher);
        seen.insert(hasher.finish());
    }
    world.heal().map_err(|error| format!("seed {seed}, healing: {error}\nafter {path:?}"))
}

fn setting(replicas: usize, acks: usize, workers: usize) -> Setting {
    let budget = Budget {
        ops: 6,
        retries: 2,
        refusals: 2,
        crashes: 2,
        breaks: 2,
        restarts: 2,
        writers: 1,
        drains: 1,
        moves: 2,
    };
    Setting { replicas, acks, workers, budget, omission: None }
}

const STEPS: usize = 150;

#[test]
fn nothing_acknowledged_is_lost_or_doubled() {
    let walks = if std::env::var_os("ATTND_NIGHTLY").is_some() { 20_000 } else { 400 };
    let mut seen = HashSet::new();
    for seed in 0..walks {
        for (replicas, acks, workers) in [(2, 2, 3), (2, 1, 3), (3, 2, 4), (1, 1, 2)] {
            if let Err(error) = walk(setting(replicas, acks, workers), seed, STEPS, &mut seen) {
                panic!("{acks} of {replicas} replicas on {workers} workers: {error}");
            }
        }
    }
    println!("{} distinct states", seen.len());
    assert!(seen.len() > 100_000, "only {} states", seen.len());
}

#[test]
fn whatever_is_left_out_is_missed() {
    let omissions = [
        (Omission::EpochCheck, 2, 2),
        (Omission::Dedup, 2, 2),
        (Omission::Undo, 2, 2),
        (Omission::FenceBeforeCopy, 2, 1),
        (Omission::Coverage, 2, 2),
    ];
    for (omission, replicas, acks) in omissions {
        let setting = Setting { omission: Some(omission), ..setting(replicas, acks, 3) };
        let found = (0..2000).find_map(|seed| {
            walk(setting, seed, STEPS, &mut HashSet::new()).err().map(|error| (seed, error))
        });
        let Some((seed, error)) = found else { panic!("{omission:?} isn't seen") };
        println!("{omission:?}: {}, seed {seed}", error.lines().next().unwrap_or_default());
    }
}
