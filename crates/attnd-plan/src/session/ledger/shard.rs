//! One shard: who has it, who shall have it, and how far they are.

use super::Phase;
use crate::session::op::Holder;
use crate::session::replica::ReplicaState;

/// Where a shard is in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// In none.
    Idle,
    /// Everyone who shall be a member is fenced.
    Fencing,
    /// Whoever has too much or too little is brought level.
    Levelling,
    /// The set is being saved.
    Saving,
}

/// How far somebody is on the way to be a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Standing {
    /// It is one.
    Member,
    /// It has been told the epoch, and hasn't said what it has.
    Fencing,
    /// It has said so.
    Fenced(Box<ReplicaState>),
    /// An op that nobody acknowledged is taken back there.
    TakingBack,
    /// It has all that was acknowledged, and is a member once the set is saved.
    Level,
    /// It needs a copy. In the round: the others wait for it.
    Cold { in_round: bool },
    /// It gets one from this holder.
    Copying { from: Holder, in_round: bool },
    /// It is in the next round.
    Warm,
}

/// What a member was asked last about the op in flight, in this epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Asked {
    Nothing,
    Op,
    Undo,
    /// And it has answered that.
    Undone,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Member {
    pub(super) holder: Holder,
    pub(super) standing: Standing,
    /// The last op that it is known to have, if all those before are what was acknowledged.
    pub(super) applied: Option<u64>,
    /// The last of those that it has said it applied: others came with a copy, without what they made elsewhere, as a fork does.
    pub(super) done: Option<u64>,
    pub(super) asked: Asked,
    /// It wants to leave.
    pub(super) is_leaving: bool,
    /// It was copied a moment ago, so the rest is little.
    pub(super) is_fresh: bool,
    /// A copy is on its way there, or was; nobody has looked since.
    pub(super) may_have: bool,
}

impl Member {
    pub(super) fn new(holder: Holder, standing: Standing, applied: Option<u64>) -> Self {
        Self {
            holder,
            standing,
            applied,
            done: None,
            asked: Asked::Nothing,
            is_leaving: false,
            is_fresh: false,
            may_have: false,
        }
    }

    pub(super) fn is_member(&self) -> bool {
        self.standing == Standing::Member
    }

    /// Whether it has the child of a fork of this number, or gets it before anything else of it.
    pub(super) fn has_child(&self, fork: u64) -> bool {
        self.done >= Some(fork) || (self.is_member() && self.applied < Some(fork))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shard {
    pub(super) epoch: u64,
    pub(super) phase: Phase,
    pub(super) step: Step,
    /// Members and whoever may become one.
    pub(super) members: Vec<Member>,
    /// Whose stream broke, and who may have what others haven't.
    pub(super) absent: Vec<Holder>,
    /// Who is released once a set without them is saved.
    pub(super) leavers: Vec<Holder>,
    /// Of its replicas, behind the last op that was acknowledged.
    pub(super) chain: u32,
    /// The same behind the op in flight, once a replica has it.
    pub(super) flight_chain: Option<u32>,
    /// The saved set has somebody who is gone.
    pub(super) is_dirty: bool,
    /// Replicas that the caller was last told are missing.
    pub(super) told_missing: usize,
    /// After a restart: how many must be heard, so that one of them has all that was acknowledged.
    pub(super) quorum: usize,
    /// After a restart: its members, as they were saved. Nobody else can say what was acknowledged.
    pub(super) saved: Vec<Holder>,
}

impl Shard {
    /// A shard whose members have everything.
    pub(super) fn open(epoch: u64, holders: Vec<Holder>, chain: u32) -> Self {
        let member = |holder| Member::new(holder, Standing::Member, Some(0));
        Self {
            epoch,
            phase: Phase::Open,
            step: Step::Idle,
            members: holders.into_iter().map(member).collect(),
            absent: Vec::new(),
            leavers: Vec::new(),
            chain,
            flight_chain: None,
            is_dirty: false,
            told_missing: 0,
            quorum: 1,
            saved: Vec::new(),
        }
    }

    pub(super) fn members(&self) -> impl Iterator<Item = &Member> + '_ {
        self.members.iter().filter(|member| member.is_member())
    }

    pub(super) fn members_mut(&mut self) -> impl Iterator<Item = &mut Member> + '_ {
        self.members.iter_mut().filter(|member| member.is_member())
    }

    pub(super) fn member_count(&self) -> usize {
        self.members().count()
    }

    /// Whether nobody has the op that is being taken back.
    pub(super) fn is_undone(&self) -> bool {
        self.members().all(|member| member.asked == Asked::Undone)
    }

    pub(super) fn get_mut(&mut self, holder: &Holder) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.holder == *holder)
    }

    pub(super) fn holders(&self) -> impl Iterator<Item = &Holder> + '_ {
        let members = self.members.iter().map(|member| &member.holder);
        members.chain(&self.absent).chain(&self.leavers)
    }

    /// Whether somebody is in this standing.
    pub(super) fn has(&self, is_so: impl Fn(&Standing) -> bool) -> bool {
        self.members.iter().any(|member| is_so(&member.standing))
    }

    /// Leaves somebody out of the shard, who is released once a set without it is saved.
    pub(super) fn drop_member(&mut self, holder: &Holder) {
        let before = self.members.len();
        self.members.retain(|member| member.holder != *holder);
        if self.members.len() < before {
            self.is_dirty = true;
            self.leavers.push(holder.clone());
            self.forget_source(holder);
        }
    }

    /// Whoever was copied from this holder needs another source.
    pub(super) fn forget_source(&mut self, holder: &Holder) {
        for member in &mut self.members {
            if let Standing::Copying { from, in_round } = &member.standing
                && from == holder
            {
                member.standing = Standing::Cold { in_round: *in_round };
            }
        }
    }

    /// Replicas that are missing to so many, with those that are on their way or may come back.
    pub(super) fn missing(&self, replicas: usize) -> usize {
        let staying = self.members.iter().filter(|member| !member.is_leaving).count();
        replicas.saturating_sub(staying + self.absent.len())
    }
}
