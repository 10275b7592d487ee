//! Answers that come late, and ops for which nobody waits any more.

use super::*;

fn refusal(shard: usize, name: &str, seq: u64) -> Event {
    Event::Refused { shard, holder: holder(name), epoch: 1, seq, is_final: false, why: "SEQ_GAP" }
}

fn members(cluster: &Cluster, shard: usize) -> usize {
    cluster.ledger.members(shard).count()
}

#[test]
fn a_late_refusal_costs_only_who_lacks_the_op() {
    let mut cluster = Cluster::new(1, &["ab", "cd"]);
    cluster.append(1, 4).unwrap();
    cluster.append(2, 4).unwrap();
    // Both have both: what they once refused, they have got since, or was taken back.
    for seq in [1, 2, 3] {
        cluster.tell(refusal(0, "b", seq));
        assert_eq!((members(&cluster, 0), cluster.ledger.epoch(0)), (2, 1), "op {seq}");
    }
    // With another op in flight it is no different.
    cluster.silent = vec![holder("b"), holder("c"), holder("d")];
    cluster.append(3, 4).unwrap();
    cluster.tell(refusal(0, "b", 2));
    assert_eq!(members(&cluster, 0), 2);
    cluster.silent = vec![holder("b"), holder("d")];
    let seq = 3;
    let Ok(Begun::Resumed(op)) = cluster.append(seq, 4) else { panic!("it is in flight") };
    assert_eq!((cluster.ledger.in_flight(), op.seq), (None, seq));
    // Who lacks an op that others have can't have what comes behind it.
    cluster.silent.clear();
    cluster.tell(refusal(0, "b", 3));
    assert_eq!((members(&cluster, 0), cluster.ledger.epoch(0)), (1, 2));
    assert_eq!((members(&cluster, 1), cluster.ledger.epoch(1)), (2, 1));
}

#[test]
fn the_refusal_of_the_op_in_flight_drops_the_replica() {
    let mut cluster = Cluster::new(1, &["ab", "cd"]);
    cluster.silent = vec![holder("b"), holder("c"), holder("d")];
    cluster.append(1, 4).unwrap();
    cluster.silent.clear();
    cluster.tell(refusal(0, "b", 1));
    assert_eq!((members(&cluster, 0), cluster.ledger.epoch(0)), (1, 1), "the round waits for the op");
    assert!(cluster.ledger.holders(0).any(|other| *other == holder("b")), "it is released behind the round");
}

#[test]
fn an_op_that_waits_for_replicas_keeps_no_session() {
    let mut cluster = Cluster::new(2, &["ab", "cd"]);
    cluster.ledger.touch(Duration::from_secs(50));
    cluster.silent = vec![holder("d")];
    cluster.append(1, 4).unwrap();
    assert!(!cluster.ledger.is_expired(Duration::from_secs(10_000)), "it is on its way");
    cluster.tell(Event::Lost(holder("d")));
    assert!(cluster.answers.pop().is_some_and(|(_, answer)| answer.is_err()), "nobody waits any more");
    assert!(!cluster.ledger.is_expired(Duration::from_secs(649)));
    assert!(cluster.ledger.is_expired(Duration::from_secs(650)));
}

#[test]
fn who_was_left_out_is_asked_before_a_session_is_lost() {
    // Sent twice, an op is refused by a first, and had the second time.
    let mut cluster = Cluster::new(1, &["ab", "ab"]);
    cluster.append(1, 4).unwrap();
    cluster.append(2, 4).unwrap();
    for shard in [0, 1] {
        cluster.ledger.shards[shard].get_mut(&holder("a")).unwrap().applied = Some(1);
    }
    cluster.saves = false;
    cluster.tell(refusal(1, "a", 2));
    assert_eq!((cluster.ledger.phase(0), cluster.ledger.phase(1)), (Phase::Open, Phase::Recovering));
    cluster.tell(Event::Lost(holder("b")));
    cluster.saves = true;
    let epoch = cluster.ledger.epoch(1);
    cluster.tell(Event::Saved { shard: 1, epoch });
    cluster.tell(Event::Saved { shard: 0, epoch: cluster.ledger.epoch(0) });
    assert_eq!((members(&cluster, 0), members(&cluster, 1)), (1, 1));
    cluster.append(3, 4).unwrap();
    assert_eq!(cluster.answers.pop(), Some((3, Ok(Answer { len: 12, generation: 0, child: None }))));
    // Who lacks something is no help.
    let mut cluster = Cluster::new(1, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("a")];
    cluster.append(2, 4).unwrap();
    cluster.silent.clear();
    cluster.saves = false;
    cluster.tell(refusal(0, "a", 2));
    cluster.tell(Event::Lost(holder("b")));
    assert_eq!(cluster.ledger.phase(0), Phase::Recovering);
    let epoch = cluster.ledger.epoch(0);
    cluster.tell(Event::Saved { shard: 0, epoch });
    assert_eq!(cluster.ledger.phase(0), Phase::Lost);
}

#[test]
fn a_session_that_is_lost_at_a_restart_has_the_layers_that_it_had() {
    let mut cluster = Cluster::new(1, &["a", "b"]);
    cluster.append(1, 4).unwrap();
    cluster.op(2, Ask::Append { layer: 1, base_len: None, tokens: 3 }).unwrap();
    cluster.silent = vec![holder("a")];
    cluster.restart(&[(1, "a"), (1, "b")]);
    cluster.tell(Event::Lost(holder("a")));
    assert!(cluster.ledger.is_lost());
    assert_eq!(cluster.ledger.tokens(), [4, 3]);
}
