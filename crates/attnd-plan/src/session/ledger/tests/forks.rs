//! Children of forks.

use super::*;
use crate::session::replica::ReplicaState;

#[test]
fn a_child_begins_where_its_parent_is() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.op(2, Ask::Fork { child: 7 }).unwrap();
    assert_eq!(cluster.answers.pop(), Some((2, Ok(Answer { len: 4, generation: 0, child: Some(7) }))));
    let mut child = cluster.ledger.fork(Duration::from_secs(3));
    assert_eq!(child.start(), [], "all have said that they forked");
    assert_eq!((child.tokens(), child.next_seq(), child.epoch(0)), (&[4, 0][..], 1, 1));
    cluster.replicas.values_mut().for_each(|replica| *replica = replica.fork());
    cluster.ledger = child;
    cluster.append(1, 2).unwrap();
    assert_eq!(cluster.answers.pop(), Some((1, Ok(Answer { len: 6, generation: 0, child: None }))));
    cluster.op(2, Ask::Seal).unwrap();
    assert_eq!(cluster.append(3, 1), Err(Error::Sealed));
}

/// What a child says first, and its members once those of them are fenced who have it.
fn members_of(mut child: Ledger<&'static str>, have_it: &str) -> (Vec<Action>, Vec<Holder>) {
    let first = child.start();
    let mut actions: VecDeque<Action> = first.clone().into();
    let replica = Replica::new(2, 1);
    while let Some(action) = actions.pop_front() {
        let event = match action {
            Action::Fence { shard, holder, epoch } if have_it.contains(holder.worker.as_str()) => {
                let (tokens, chain) = (child.tokens().to_vec(), child.shards[shard].chain);
                Event::Fenced {
                    shard,
                    holder,
                    state: ReplicaState { epoch, tokens, chain, ..replica.state() },
                }
            }
            Action::Fence { shard, holder, epoch } => Event::Gone { shard, holder, epoch },
            Action::SaveMembers { shard, epoch, .. } => Event::Saved { shard, epoch },
            _ => continue,
        };
        actions.extend(child.handle(event));
    }
    (first, child.members(0).cloned().collect())
}

#[test]
fn who_was_copied_since_the_fork_has_no_child() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.silent = vec![holder("b")];
    cluster.op(2, Ask::Fork { child: 7 }).unwrap();
    cluster.tell(Event::Lost(holder("b")));
    cluster.tell(Event::Replacement { shard: 0, holder: holder("c") });
    // Nobody waits any more, and it has happened all the same.
    cluster.op(2, Ask::Fork { child: 7 }).unwrap();
    assert_eq!(cluster.answers.pop(), Some((2, Ok(Answer { len: 4, generation: 0, child: Some(7) }))));
    let all: Vec<_> = cluster.ledger.members(0).cloned().collect();
    assert_eq!(all, [holder("a"), holder("c")]);
    let fence = |name: &str| Action::Fence { shard: 0, holder: holder(name), epoch: 2 };
    let child = cluster.ledger.fork(Duration::ZERO);
    assert_eq!(members_of(child, "a"), (vec![fence("a"), fence("c")], vec![holder("a")]));
}

#[test]
fn who_forked_under_the_coordinator_before_is_asked_for_the_child() {
    let mut cluster = Cluster::new(2, &["ab"]);
    cluster.append(1, 4).unwrap();
    cluster.op(2, Ask::Fork { child: 7 }).unwrap();
    cluster.restart(&[(1, "ab")]);
    let fence = |name: &str| Action::Fence { shard: 0, holder: holder(name), epoch: 2 };
    let child = cluster.ledger.fork(Duration::ZERO);
    assert_eq!(members_of(child, "ab"), (vec![fence("a"), fence("b")], vec![holder("a"), holder("b")]));
}
