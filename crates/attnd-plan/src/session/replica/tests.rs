//! What a replica takes, refuses and takes back.

use super::*;

fn append(seq: u64, layer: usize, base_len: usize, tokens: usize) -> Op {
    Op {
        seq,
        digest: (seq as u32 * 31).wrapping_add(tokens as u32),
        change: Change::Append { layer, base_len, tokens },
    }
}

fn other(seq: u64, change: Change) -> Op {
    Op { seq, digest: seq as u32 * 31, change }
}

/// A replica of epoch 7 with 128 tokens of layer 0 and 100 of layer 1, after 3 ops.
fn replica() -> Replica {
    let mut replica = Replica::new(2, 7);
    for op in [append(1, 0, 0, 100), append(2, 1, 0, 100), append(3, 0, 100, 28)] {
        assert_eq!(replica.begin(7, 0, &op), Ok(Verdict::Apply));
        replica.apply(&op, op.digest ^ 1);
    }
    replica
}

fn refused(replica: &Replica, epoch: u64, generation: u64, op: &Op) -> String {
    replica.begin(epoch, generation, op).unwrap_err().to_string()
}

#[test]
fn an_op_is_applied_once() {
    let mut replica = replica();
    let next = append(4, 1, 100, 1);
    assert_eq!(replica.begin(7, 0, &next), Ok(Verdict::Apply));
    replica.apply(&next, 9);
    let state = replica.state();
    assert_eq!((state.op_seq, state.tokens.as_slice(), state.last), (4, &[128, 101][..], Some(next)));
    for again in [append(1, 0, 0, 100), next] {
        assert_eq!(replica.begin(7, 0, &again), Ok(Verdict::Replayed));
    }
    // Also where the session has another generation now.
    replica.apply(&other(5, Change::Truncate { len: 10 }), 0);
    assert_eq!(replica.begin(7, 0, &next), Ok(Verdict::Replayed));
    assert_eq!(replica.state().generation, 1);
}

#[test]
fn what_does_not_follow_is_refused_with_numbers() {
    let replica = replica();
    assert_eq!(refused(&replica, 6, 0, &append(4, 0, 128, 1)), "shard at 7, request 6");
    assert_eq!(refused(&replica, 8, 0, &append(4, 0, 128, 1)), "shard at 7, request 8");
    assert_eq!(refused(&replica, 7, 0, &append(6, 0, 128, 1)), "expected 4, got 6");
    assert_eq!(refused(&replica, 7, 0, &append(3, 0, 100, 27)), "3");
    assert_eq!(refused(&replica, 7, 0, &append(4, 0, 120, 1)), "committed 128, base_len 120");
    assert_eq!(refused(&replica, 7, 3, &append(4, 0, 128, 1)), "session 0, request 3");
    assert_eq!(refused(&replica, 7, 0, &append(4, 2, 0, 1)), "layer 2 of 2");
    assert_eq!(refused(&replica, 7, 0, &append(4, 0, 128, 0)), "tokens");
    assert_eq!(refused(&replica, 7, 0, &append(4, 0, 128, usize::MAX)), "128 + 18446744073709551615");
    assert_eq!(refused(&replica, 7, 0, &other(4, Change::Truncate { len: 200 })), "200 > 128");
    assert_eq!(replica.begin(7, 0, &other(4, Change::Truncate { len: 128 })), Ok(Verdict::Apply));
}

#[test]
fn ops_behind_the_window_are_too_old_to_judge() {
    let mut replica = Replica::new(1, 1);
    for seq in 1..=1977 {
        replica.apply(&append(seq, 0, seq as usize - 1, 1), 0);
    }
    assert_eq!(refused(&replica, 1, 0, &append(3, 0, 2, 1)), "3 < 954");
    assert_eq!(replica.begin(1, 0, &append(954, 0, 953, 1)), Ok(Verdict::Replayed));
    assert_eq!(replica.undo(1, 3, 0).unwrap_err().to_string(), "3 < 954");
}

#[test]
fn a_cut_opens_a_generation_and_a_seal_ends_them() {
    let mut replica = replica();
    replica.apply(&other(4, Change::Truncate { len: 110 }), 0);
    assert_eq!((replica.tokens(), replica.state().generation), (&[110, 100][..], 1));
    assert_eq!(refused(&replica, 7, 0, &append(5, 0, 110, 1)), "session 1, request 0");
    replica.apply(&other(5, Change::Seal), 0);
    for op in [append(6, 0, 110, 1), other(6, Change::Truncate { len: 1 })] {
        assert_eq!(replica.begin(7, 1, &op), Err(ReplicaRefusal::Sealed));
    }
    assert_eq!(replica.begin(7, 1, &other(6, Change::Fork { child: 5 })), Ok(Verdict::Apply));
}

#[test]
fn only_the_last_append_is_taken_back() {
    let before = replica();
    let mut replica = before.clone();
    let op = append(4, 0, 128, 2);
    assert_eq!(replica.undo(7, 4, op.digest), Ok(Undone::NeverArrived));
    assert_eq!(replica.undo(7, 3, 1), Ok(Undone::NeverArrived));
    replica.apply(&op, 5);
    assert_eq!(replica.undo(6, 4, op.digest).unwrap_err().to_string(), "shard at 7, request 6");
    let second = append(2, 1, 0, 100);
    assert_eq!(
        replica.undo(7, 2, second.digest).unwrap_err().to_string(),
        "op 2 can't be taken back, the last is 4"
    );
    assert_eq!(replica.undo(7, 4, op.digest), Ok(Undone::TakenBack { layer: 0, len: 128 }));
    let state = replica.state();
    assert_eq!(
        ReplicaState { last: before.state().last, chain_before: before.chain_before, ..state },
        before.state()
    );
    // The number is free again, for this op or another one, which ends as if the undone one had never come.
    let instead = append(4, 1, 100, 3);
    assert_eq!(replica.begin(7, 0, &op), Ok(Verdict::Apply));
    let mut straight = before;
    for replica in [&mut replica, &mut straight] {
        assert_eq!(replica.begin(7, 0, &instead), Ok(Verdict::Apply));
        replica.apply(&instead, 5);
    }
    assert_eq!(replica, straight);
    // A cut can't be.
    let cut = other(5, Change::Truncate { len: 3 });
    replica.apply(&cut, 0);
    assert!(replica.undo(7, 5, cut.digest).is_err());
}

#[test]
fn epochs_only_grow() {
    let mut replica = replica();
    assert_eq!(replica.fence(6).unwrap_err().to_string(), "shard at 7, request 6");
    assert_eq!((replica.fence(7), replica.fence(9), replica.epoch()), (Ok(()), Ok(()), 9));
    assert_eq!(refused(&replica, 7, 0, &append(4, 0, 128, 1)), "shard at 9, request 7");
    assert_eq!(replica.check_release(8).unwrap_err().to_string(), "shard at 9, request 8");
    assert_eq!((replica.check_release(9), replica.check_release(10)), (Ok(()), Ok(())));
    let mut terms = Terms::default();
    assert_eq!((terms.check(5), terms.check(5)), (Ok(()), Ok(())));
    assert_eq!(terms.check(4).unwrap_err().to_string(), "term 4 < 5");
    assert_eq!(terms.highest(), 5);
}

#[test]
fn reads_name_what_they_look_at() {
    let replica = replica();
    assert_eq!(replica.check_read(7, 0, 0, 128), Ok(()));
    let said = |epoch, generation, layer, at_len| {
        replica.check_read(epoch, generation, layer, at_len).unwrap_err().to_string()
    };
    assert_eq!(said(7, 0, 0, 200), "200 > 128");
    assert_eq!(said(6, 0, 0, 1), "shard at 7, request 6");
    assert_eq!(said(7, 3, 0, 1), "session 0, request 3");
    assert_eq!(said(7, 0, 5, 1), "layer 5 of 2");
}

#[test]
fn the_chain_tells_histories_apart() {
    let (one, mut other) = (replica(), replica());
    assert_eq!(one.state().chain, other.state().chain);
    other.undo(7, 3, append(3, 0, 100, 28).digest).unwrap();
    assert!(one.continues(2, other.state().chain) && !other.continues(3, one.state().chain));
    assert!(one.continues(3, one.state().chain));
    // The same op with other bytes in this shard.
    other.apply(&append(3, 0, 100, 28), 12345);
    assert_ne!(one.state().chain, other.state().chain);
    assert!(!one.continues(3, other.state().chain) && !one.continues(4, 0) && !one.continues(0, 1));
}

#[test]
fn a_child_has_the_tokens_and_none_of_the_past() {
    let mut parent = replica();
    parent.apply(&other(4, Change::Truncate { len: 50 }), 0);
    parent.apply(&other(5, Change::Fork { child: 11 }), 0);
    let mut child = parent.fork();
    let state = child.state();
    assert_eq!((state.epoch, state.generation, state.op_seq, state.sealed), (1, 0, 0, false));
    assert_eq!((state.tokens.as_slice(), state.last), (&[50, 50][..], None));
    let op = append(1, 0, 50, 1);
    assert_eq!(child.begin(1, 0, &op), Ok(Verdict::Apply));
    child.apply(&op, 3);
    assert_eq!((child.tokens(), parent.tokens()), (&[51, 50][..], &[50, 50][..]));
}

#[test]
fn a_replica_moves_with_its_history() {
    let mut replica = replica();
    replica.apply(&other(4, Change::Fork { child: 11 }), 0);
    let snapshot = replica.snapshot();
    let mut moved = Replica::restore(&snapshot).unwrap();
    assert_eq!(moved, replica);
    assert_eq!(moved.begin(7, 0, &append(2, 1, 0, 100)), Ok(Verdict::Replayed));
    moved.apply(&append(5, 0, 128, 1), 0);
    assert!(moved.continues(4, snapshot.state.chain));
    let spoils: [fn(&mut ReplicaSnapshot); 5] = [
        |snapshot| snapshot.records.clear(),
        |snapshot| snapshot.state.op_seq += 1,
        |snapshot| snapshot.state.chain ^= 1,
        |snapshot| snapshot.chains.truncate(3),
        |snapshot| snapshot.records.rotate_left(1),
    ];
    for spoil in spoils {
        let mut spoiled = snapshot.clone();
        spoil(&mut spoiled);
        assert!(Replica::restore(&spoiled).is_err(), "{spoiled:?}");
    }
}

#[test]
fn a_replica_with_a_long_history_can_be_copied_whatever_was_taken_back() {
    let mut replica = Replica::new(1, 7);
    for seq in 1..=1038 {
        replica.apply(&append(seq, 0, seq as usize - 1, 1), seq as u32);
    }
    for _ in 0..3 {
        let op = append(1039, 0, 1038, 5);
        replica.apply(&op, 1);
        // Before it is taken back, and after.
        let copied = Replica::restore(&replica.snapshot()).unwrap();
        assert_eq!(copied, replica);
        assert_eq!(replica.undo(7, 1039, op.digest), Ok(Undone::TakenBack { layer: 0, len: 1038 }));
        let copied = Replica::restore(&replica.snapshot()).unwrap();
        assert_eq!(copied.state(), replica.state());
        assert_eq!(copied.begin(7, 0, &append(15, 0, 14, 1)), Ok(Verdict::Replayed));
        assert_eq!(refused(&copied, 7, 0, &append(14, 0, 13, 1)), "14 < 15");
        replica = copied;
    }
}
