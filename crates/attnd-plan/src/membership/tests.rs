//! Random joins, beats, silences and ends.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whatever happens: a dead incarnation never gets work or a welcome again, a name has one life at a time, and
    /// nobody who was silent for 600 ms is given work after a tick.
    #[test]
    fn dead_is_final(steps in proptest::collection::vec((0u8..12, 0usize..3, 1u64..4, 0u64..500), 1..400)) {
        let rules = Rules { wire_versions: 1..=1, kernel_id: "c1-f32".to_owned() };
        let mut members = Membership::new(rules, Duration::ZERO);
        let mut now = Duration::ZERO;
        let mut dead = BTreeSet::new();
        let mut alive = BTreeSet::new();
        for (what, who, incarnation, ms) in steps {
            let id = WorkerId::new(["a", "b", "c"][who]).unwrap();
            let event = match what {
                0 => MemberEvent::Joined(Facts { id, incarnation, wire_version: 1, kernel_id: "c1-f32".to_owned() }),
                1 => MemberEvent::StreamClosed { id, incarnation },
                2..6 => MemberEvent::Beat { id, incarnation, draining: ms == 0 },
                _ => {
                    now += Duration::from_millis(ms);
                    MemberEvent::Tick
                }
            };
            let is_tick = event == MemberEvent::Tick;
            for action in members.handle(event, now) {
                let life = (action.id.clone(), action.incarnation);
                match action.change {
                    MemberChange::Admit => {
                        prop_assert!(!dead.contains(&life));
                        prop_assert!(alive.iter().all(|(id, _)| *id != life.0));
                        alive.insert(life);
                    }
                    MemberChange::Dead(_) | MemberChange::Drained => {
                        prop_assert!(alive.remove(&life));
                        dead.insert(life);
                    }
                    MemberChange::Reject(_) => {}
                    _ => prop_assert!(alive.contains(&life)),
                }
            }
            for id in members.usable() {
                prop_assert!(alive.iter().any(|(alive, _)| alive == id));
                let (_, silence) = members.state(id, now).unwrap();
                prop_assert!(!is_tick || silence < SUSPECT_AFTER);
            }
        }
    }
}

fn cluster() -> Membership {
    Membership::new(Rules { wire_versions: 1..=1, kernel_id: "c1-f32".to_owned() }, Duration::ZERO)
}

fn join(members: &mut Membership, name: &str, incarnation: u64, now: Duration) -> Vec<MemberChange> {
    let id = WorkerId::new(name).unwrap();
    let facts = Facts { id, incarnation, wire_version: 1, kernel_id: "c1-f32".to_owned() };
    members.handle(MemberEvent::Joined(facts), now).into_iter().map(|action| action.change).collect()
}

fn close(members: &mut Membership, name: &str, incarnation: u64, now: Duration) {
    let closed = MemberEvent::StreamClosed { id: WorkerId::new(name).unwrap(), incarnation };
    assert_eq!(members.handle(closed, now).len(), 1);
}

const REFUSED: [MemberChange; 1] = [MemberChange::Reject(Rejection::IncarnationDead)];

#[test]
fn other_deaths_do_not_bring_the_dead_back() {
    let mut members = cluster();
    join(&mut members, "a", 1, Duration::ZERO);
    close(&mut members, "a", 1, Duration::ZERO);
    let others = MAX_REMEMBERED_DEAD as u64 - 1;
    for other in 0..others {
        let now = Duration::from_millis(other);
        join(&mut members, "b", other, now);
        close(&mut members, "b", other, now);
        members.handle(MemberEvent::Tick, now);
    }
    assert_eq!(join(&mut members, "a", 1, REMEMBER_DEAD), REFUSED);
    // One too many, and the oldest is forgotten.
    join(&mut members, "b", others, REMEMBER_DEAD);
    close(&mut members, "b", others, REMEMBER_DEAD);
    assert_eq!(members.gone.len(), MAX_REMEMBERED_DEAD);
    assert_ne!(join(&mut members, "a", 1, REMEMBER_DEAD), REFUSED);
}

#[test]
fn the_dead_are_forgotten_by_age() {
    let mut members = cluster();
    join(&mut members, "a", 1, Duration::ZERO);
    close(&mut members, "a", 1, Duration::from_secs(1));
    let ms = Duration::from_millis(1);
    for (now, is_refused) in [(REMEMBER_DEAD, true), (REMEMBER_DEAD + Duration::from_secs(1) + ms, false)] {
        members.handle(MemberEvent::Tick, now);
        assert_eq!(join(&mut members, "a", 1, now) == REFUSED, is_refused, "{now:?}");
    }
    assert!(members.gone.is_empty());
}

#[test]
fn twenty_crashes_in_ten_seconds_get_no_work() {
    let mut members = cluster();
    let mut usable = 0;
    for life in 0..20 {
        let now = Duration::from_millis(life * 500);
        join(&mut members, "a", life, now);
        usable += members.usable().count();
        close(&mut members, "a", life, now + HEARTBEAT);
        members.handle(MemberEvent::Tick, now + HEARTBEAT);
    }
    // The first life, and two returns.
    assert_eq!(usable, MAX_FLAPS);
}
