//! Replicas that move because a worker has come that has more room.

use super::*;

fn members(cluster: &Cluster) -> Vec<Holder> {
    cluster.ledger.members(0).cloned().collect()
}

fn moves(from: &str, to: &str) -> Event {
    Event::Move { shard: 0, from: holder(from), to: holder(to) }
}

fn needs_replica(cluster: &Cluster) -> bool {
    cluster.said.iter().any(|action| matches!(action, Action::NeedReplica { .. }))
}

#[test]
fn a_replica_that_moves_is_in_the_place_of_the_one_before() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    assert!(cluster.ledger.is_settled());
    cluster.silent = vec![holder("c")];
    cluster.tell(moves("a", "c"));
    // As long as the copy is on its way both are members, and ops go on.
    assert_eq!((members(&cluster), cluster.ledger.is_short(0)), (vec![holder("a"), holder("b")], false));
    assert!(!cluster.ledger.is_settled() && cluster.ledger.missing_replicas(0) == 0);
    assert_eq!(cluster.ledger.staying(0).collect::<Vec<_>>(), [&holder("c"), &holder("b")]);
    cluster.append(2, 1).unwrap();
    cluster.silent.clear();
    let from = cluster.replicas[&(0, holder("a"))].clone();
    let state = from.state();
    cluster.replicas.insert((0, holder("c")), from);
    cluster.tell(Event::Copied { shard: 0, holder: holder("c"), state });
    assert_eq!((members(&cluster), cluster.ledger.epoch(0)), (vec![holder("c"), holder("b")], 2));
    assert_eq!(cluster.ledger.computing(0).next(), Some(&holder("c")));
    assert!(cluster.said.contains(&Action::Release { shard: 0, holder: holder("a"), epoch: 2 }));
    assert!(cluster.ledger.is_settled() && !needs_replica(&cluster));
}

#[test]
fn a_move_that_fails_leaves_all_as_it_was() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("c")];
    cluster.tell(moves("a", "c"));
    cluster.tell(Event::Stays { shard: 0, holder: holder("a") });
    cluster.tell(Event::CopyFailed { shard: 0, holder: holder("c") });
    assert_eq!(members(&cluster), [holder("a"), holder("b")]);
    assert!(cluster.ledger.is_settled() && !needs_replica(&cluster));
    // Somebody who holds it already, or of whom nothing is known to hold, can't.
    for event in [moves("a", "b"), moves("d", "c")] {
        cluster.tell(event);
        assert!(cluster.ledger.is_settled());
    }
    // If it isn't taken back, another one is looked for.
    cluster.tell(moves("b", "c"));
    cluster.tell(Event::CopyFailed { shard: 0, holder: holder("c") });
    assert!(needs_replica(&cluster));
    cluster.tell(Event::Stays { shard: 0, holder: holder("b") });
    assert!(cluster.ledger.is_settled());
}

#[test]
fn who_leaves_is_released_by_a_session_that_is_lost() {
    for leaves_first in [true, false] {
        let mut cluster = Cluster::new(1, &["a", "b"]);
        cluster.append(1, 4).unwrap();
        let drains = Event::Draining(holder("b"));
        let loses = Event::Lost(holder("a"));
        let [first, second] = if leaves_first { [drains, loses] } else { [loses, drains] };
        cluster.tell(first);
        assert!(!cluster.said.iter().any(|action| matches!(action, Action::Release { .. })));
        cluster.tell(second);
        assert!(cluster.ledger.is_lost());
        assert!(cluster.said.contains(&Action::Release { shard: 1, holder: holder("b"), epoch: 1 }));
        assert_eq!(cluster.ledger.holders(1).count(), 0);
    }
}
