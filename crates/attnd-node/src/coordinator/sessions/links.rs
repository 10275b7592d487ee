//! The links to workers: one to each that is a member, opened again whenever it breaks, and what sessions are told of that.
//!
//! A link that breaks says nothing of the worker: what it holds is still there, and counts again once there is another link. Only the
//! membership knows that a worker is gone. In the first seconds of a coordinator it doesn't know that yet of workers that the one
//! before knew: these may be on their way.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use attnd_plan::session::{Holder, LedgerAction, LedgerEvent};
use attnd_wire::hold::{HoldAnswer, HoldAsk, HoldReply, ShardAt};
use attnd_wire::surroundings::now;
use attnd_wire::{Error, Reason};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use kameo::actor::ActorRef;
use tokio::sync::watch;

use super::Sessions;
use super::session::{Session, State};
use super::stock::ExpectedReplica;
use super::upkeep::{encode, link_to};
use crate::NodeError;
use crate::coordinator::hold_link::HoldLink;
use crate::coordinator::membership_actor::Roll;
use crate::coordinator::worker_actor::WorkerActor;

/// How long after its start a coordinator waits for workers that another one knew. They come within a second of hearing of it.
const RETURN: Duration = Duration::from_secs(10);
/// How long whoever needs a link to a member waits for it.
const LINK_WAIT: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Failures one after the other of which the log tells.
const TOLD: u32 = 5;
/// How often a worker is asked what it holds.
const STOCK: Duration = Duration::from_secs(5);
/// A link that lived as long was a good one.
const GOOD_LINK: Duration = Duration::from_secs(1);

/// Which workers are there, and how they are reached.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// Grows with every change.
    version: u64,
    members: BTreeMap<Holder, Option<Arc<HoldLink>>>,
    /// Who was a member, and is gone, as long as others may be on their way; then `None`.
    gone: Option<BTreeSet<Holder>>,
}

/// How a holder is reached.
#[derive(Clone, Debug)]
pub(super) enum Standing {
    Linked(Arc<HoldLink>),
    /// Not now.
    Away,
    /// What it held is gone with it.
    Gone,
}

impl Default for View {
    fn default() -> Self {
        Self { version: 1, members: BTreeMap::new(), gone: Some(BTreeSet::new()) }
    }
}

impl View {
    fn standing(&self, holder: &Holder) -> Standing {
        match self.members.get(holder) {
            Some(Some(link)) if !link.is_lost() => Standing::Linked(Arc::clone(link)),
            Some(_) => Standing::Away,
            None if self.may_return(holder) => Standing::Away,
            None => Standing::Gone,
        }
    }

    fn may_return(&self, holder: &Holder) -> bool {
        let first = Holder { worker: holder.worker.clone(), incarnation: 0 };
        let another =
            self.members.range(first..).next().is_some_and(|(other, _)| other.worker == holder.worker);
        !another && self.gone.as_ref().is_some_and(|gone| !gone.contains(holder))
    }

    fn link(&self, holder: &Holder) -> Option<Arc<HoldLink>> {
        self.members.get(holder).and_then(Option::as_ref).filter(|link| !link.is_lost()).cloned()
    }

    pub(super) fn remove(&mut self, holder: &Holder) {
        self.version += 1;
        self.members.remove(holder);
        if let Some(gone) = &mut self.gone {
            gone.insert(holder.clone());
        }
    }

    pub(super) fn set(&mut self, holder: Holder, link: Option<Arc<HoldLink>>) {
        self.version += 1;
        self.members.insert(holder, link);
    }
}

/// A member that holds shards.
struct Kept {
    actor: ActorRef<WorkerActor>,
    /// Links that broke or weren't had, one after the other.
    failures: u32,
    opened: Instant,
    /// It has taken this coordinator for its own.
    is_ours: bool,
    /// It was said that it is another coordinator's.
    is_fenced: bool,
}

/// What happens to the link of a member.
enum Happened {
    /// It is there, and these are the shards at its other end.
    Opened(Arc<HoldLink>, Vec<ShardAt>),
    Failed(Error),
    /// It is there still; which replicas should have been there, and the shards that are.
    Listed(Arc<HoldLink>, Vec<ExpectedReplica>, Vec<ShardAt>),
    /// It is there still, and nothing is known of shards.
    Lives(Arc<HoldLink>),
    Broke,
    /// Another coordinator has taken the worker over.
    Fenced(Error),
}

type Next = BoxFuture<'static, (Holder, Happened)>;

/// Keeps a link to each member, for ever.
pub(crate) async fn keep_links(sessions: Arc<Sessions>, mut roll: watch::Receiver<Arc<Roll>>) {
    let mut kept: BTreeMap<Holder, Kept> = BTreeMap::new();
    let mut next: FuturesUnordered<Next> = FuturesUnordered::new();
    let all_are_back = tokio::time::sleep(RETURN);
    tokio::pin!(all_are_back);
    let mut is_young = true;
    loop {
        tokio::select! {
            biased;
            changed = roll.changed() => {
                if changed.is_err() {
                    return;
                }
                let members = Arc::clone(&roll.borrow_and_update());
                let gone: Vec<Holder> =
                    kept.keys().filter(|holder| !members.contains_key(*holder)).cloned().collect();
                for holder in gone {
                    kept.remove(&holder);
                    sessions.links.send_modify(|view| Arc::make_mut(view).remove(&holder));
                    sessions.hedging().forget(&holder);
                }
                for (holder, actor) in &*members {
                    if kept.contains_key(holder) {
                        continue;
                    }
                    sessions.links.send_modify(|view| Arc::make_mut(view).set(holder.clone(), None));
                    let member = Kept {
                        actor: actor.clone(),
                        failures: 0,
                        opened: now(),
                        is_ours: false,
                        is_fenced: false,
                    };
                    next.push(open(&sessions, holder.clone(), &member));
                    kept.insert(holder.clone(), member);
                }
                sessions.reconcile();
            }
            Some((holder, happened)) = next.next() => {
                // Of who is gone nothing counts any more.
                if let Some(member) = kept.get_mut(&holder) {
                    next.push(follow(&sessions, holder, member, happened));
                }
            }
            () = &mut all_are_back, if is_young => {
                is_young = false;
                sessions.links.send_modify(|view| {
                    let view = Arc::make_mut(view);
                    (view.version, view.gone) = (view.version + 1, None);
                });
                sessions.reconcile();
            }
        }
    }
}

/// Does what is due about a member's link; returns what happens next to it.
fn follow(sessions: &Arc<Sessions>, holder: Holder, member: &mut Kept, happened: Happened) -> Next {
    match happened {
        Happened::Opened(link, shards) => {
            (member.opened, member.is_ours) = (now(), true);
            sessions
                .links
                .send_modify(|view| Arc::make_mut(view).set(holder.clone(), Some(Arc::clone(&link))));
            sessions.linked.notify_waiters();
            sessions.reconcile();
            sessions.take_stock(&link, &shards);
            // Behind that: what it has already is not copied to it.
            sessions.begin_repairs();
            follow_link(sessions, holder, link)
        }
        Happened::Listed(link, expected, shards) => {
            sessions.release_unknown(&link, &shards);
            sessions.miss(&holder, expected, &shards);
            follow_link(sessions, holder, link)
        }
        Happened::Lives(link) => follow_link(sessions, holder, link),
        Happened::Broke => {
            // Most often the worker ends, and the membership hears of it next.
            tracing::debug!(worker = %holder.worker, "the streams to a worker that holds sessions broke");
            if now().saturating_duration_since(member.opened) >= GOOD_LINK {
                member.failures = 0;
            }
            sessions.links.send_modify(|view| Arc::make_mut(view).set(holder.clone(), None));
            sessions.reconcile();
            let opened = open(sessions, holder, member);
            member.failures = member.failures.saturating_add(1);
            opened
        }
        Happened::Fenced(why) => end(sessions, holder, &why),
        // It was replaced while the link was broken.
        Happened::Failed(error) if error.reason == Reason::Fenced && member.is_ours => {
            end(sessions, holder, &error)
        }
        Happened::Failed(error) => {
            // This one may be new, and know nothing of the sessions there: it serves what it has.
            if error.reason == Reason::Fenced && !std::mem::replace(&mut member.is_fenced, true) {
                tracing::error!(worker = %holder.worker, %error, "another coordinator has taken over a worker's sessions");
            }
            member.failures = member.failures.saturating_add(1);
            if member.failures == TOLD {
                tracing::warn!(worker = %holder.worker, %error, "a member can't be reached for sessions, and is tried again");
            }
            open(sessions, holder, member)
        }
    }
}

/// This coordinator is one of the past (one whose workers have left it before it could hear that from them isn't told: it finds nobody
/// there, as after any other loss): another one has a worker that was its own, and all its sessions. Nothing happens to the link
/// any more.
fn end(sessions: &Sessions, holder: Holder, why: &Error) -> Next {
    tracing::error!(worker = %holder.worker, %why, "another coordinator has taken over a worker's sessions");
    sessions.hub.ending.tell(NodeError::Replaced { worker: holder.worker, why: why.to_string() });
    Box::pin(std::future::pending())
}

/// Waits until a link breaks, and asks now and then what is at its other end: what was on its way over the link before may come to the
/// worker after this one was opened.
fn follow_link(sessions: &Arc<Sessions>, holder: Holder, link: Arc<HoldLink>) -> Next {
    let sessions = Arc::clone(sessions);
    Box::pin(async move {
        tokio::select! {
            biased;
            () = link.ended() => return (holder, link.fenced().map_or(Happened::Broke, Happened::Fenced)),
            () = tokio::time::sleep(STOCK) => {}
        }
        let expected = sessions.expected_at(&holder);
        // What isn't said now is said the next time.
        let happened = match list(sessions.term, &link).await {
            Ok(shards) => Happened::Listed(link, expected, shards),
            Err(_later) => Happened::Lives(link),
        };
        (holder, happened)
    })
}

/// Opens a link, after a pause that grows with failures, and asks what is at its other end.
fn open(sessions: &Sessions, holder: Holder, member: &Kept) -> Next {
    let (actor, term) = (member.actor.clone(), sessions.term);
    let pause = pause_after(member.failures, sessions.hub.surroundings.fraction());
    Box::pin(async move {
        tokio::time::sleep(pause).await;
        let opened = async {
            let link = link_to(&actor).await?;
            let shards = list(term, &link).await?;
            Ok((link, shards))
        };
        match opened.await {
            Ok((link, shards)) => (holder, Happened::Opened(link, shards)),
            Err(error) => (holder, Happened::Failed(error)),
        }
    })
}

/// The pause after so many failures, scaled by `jitter` (0 to 1) to between half and all of it.
fn pause_after(failures: u32, jitter: f64) -> Duration {
    match failures {
        0 => Duration::ZERO,
        n => {
            let doubled = FIRST_PAUSE.saturating_mul(1 << (n - 1).min(10)).min(LONGEST_PAUSE);
            doubled.mul_f64(0.5 + 0.5 * jitter)
        }
    }
}

/// All shards that a worker holds.
async fn list(term: u64, link: &HoldLink) -> Result<Vec<ShardAt>, Error> {
    let parts = link.control.ask(term, encode(HoldAsk::List)?).await?.parts().await?;
    let mut shards = Vec::new();
    for part in parts {
        match HoldReply::try_from(part)?.answer {
            HoldAnswer::Shards(some) => shards.extend(some),
            HoldAnswer::Failed(error) => return Err(error),
            _other => return Err(Error::new(Reason::ReplyInvalid, "no list of shards")),
        }
    }
    Ok(shards)
}

impl Sessions {
    /// The link to a member, which may be about to be opened.
    ///
    /// # Errors
    /// [`Reason::WorkerLost`] if there is none soon.
    pub(super) async fn link_of(&self, holder: &Holder) -> Result<Arc<HoldLink>, Error> {
        let linked = async {
            loop {
                // From before it looks, so that none is missed. Whoever waits is told in turn; those of a `watch` are in any order,
                // which isn't that of the same simulation another time.
                let mut more = pin!(self.linked.notified());
                more.as_mut().enable();
                let link = self.links.borrow().link(holder);
                if let Some(link) = link {
                    return link;
                }
                more.await;
            }
        };
        let link = tokio::time::timeout(LINK_WAIT, linked).await.ok();
        link.ok_or_else(|| Error::new(Reason::WorkerLost, format!("no stream to {}", holder.worker)))
    }

    /// Tells all sessions what has changed.
    pub(super) fn reconcile(self: &Arc<Self>) {
        for session in self.open_sessions() {
            session.reconcile(self);
        }
    }
}

impl Session {
    /// Learns who can be reached now, and who is gone.
    pub(super) fn reconcile(self: &Arc<Self>, sessions: &Arc<Sessions>) {
        let actions = {
            let mut state = self.lock();
            // Under the lock, so that no session goes back to an earlier view.
            let view = Arc::clone(&sessions.links.borrow());
            state.reconcile(&view)
        };
        self.perform(sessions, actions);
    }

    /// Offers a replica to the ledger, unless it knows of it; `false` if nobody wants it.
    pub(super) fn takes_in(
        self: &Arc<Self>,
        sessions: &Arc<Sessions>,
        link: &Arc<HoldLink>,
        at: &ShardAt,
    ) -> bool {
        let shard = at.shard as usize;
        let (actions, is_wanted) = {
            let mut state = self.lock();
            let knows = |state: &State| state.ledger.holders(shard).any(|holder| *holder == link.holder);
            if shard >= state.ledger.shards() {
                return false;
            }
            // Of a link that is broken already the next one says what is there; and who is closing the session may fail. What is nobody's
            // then is found later.
            if state.closed.is_some() || link.is_lost() || knows(&state) {
                return true;
            }
            let holder = link.holder.clone();
            state.links.entry(holder.clone()).or_insert_with(|| Arc::clone(link));
            let actions = state.handle(LedgerEvent::Joined { shard, holder });
            (actions, knows(&state))
        };
        self.perform(sessions, actions);
        is_wanted
    }
}

impl State {
    fn reconcile(&mut self, view: &View) -> Vec<LedgerAction<Error>> {
        if self.seen == view.version && !self.links.values().any(|link| link.is_lost()) {
            return Vec::new();
        }
        self.seen = view.version;
        let shards = 0..self.ledger.shards();
        let holders: BTreeSet<Holder> = shards
            .clone()
            .flat_map(|shard| self.ledger.holders(shard))
            .chain(self.links.keys())
            .cloned()
            .collect();
        let mut actions = Vec::new();
        for holder in holders {
            match (view.standing(&holder), self.links.get(&holder)) {
                (Standing::Linked(link), Some(own)) if Arc::ptr_eq(&link, own) => {}
                (Standing::Linked(link), own) => {
                    if own.is_some() {
                        actions.extend(self.handle(LedgerEvent::Disconnected(holder.clone())));
                    }
                    self.links.insert(holder.clone(), link);
                    for shard in shards.clone() {
                        if self.ledger.holders(shard).any(|known| *known == holder) {
                            let holder = holder.clone();
                            actions.extend(self.handle(LedgerEvent::Joined { shard, holder }));
                        }
                    }
                }
                (Standing::Away, Some(_)) => {
                    self.links.remove(&holder);
                    actions.extend(self.handle(LedgerEvent::Disconnected(holder)));
                }
                (Standing::Away, None) => {}
                (Standing::Gone, _) => {
                    self.links.remove(&holder);
                    actions.extend(self.handle(LedgerEvent::Lost(holder)));
                }
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(worker: &str, incarnation: u64) -> Holder {
        Holder { worker: worker.parse().unwrap(), incarnation }
    }

    fn standing(view: &View, worker: &str, incarnation: u64) -> &'static str {
        match view.standing(&holder(worker, incarnation)) {
            Standing::Linked(_) => "linked",
            Standing::Away => "away",
            Standing::Gone => "gone",
        }
    }

    #[test]
    fn at_first_who_isnt_there_may_come_unless_another_life_of_it_has() {
        let mut view = View::default();
        assert_eq!(standing(&view, "w1", 7), "away");
        view.set(holder("w1", 7), None);
        assert_eq!((standing(&view, "w1", 7), standing(&view, "w1", 6)), ("away", "gone"));
        let (link, _tasks) = HoldLink::new(holder("w1", 7));
        view.set(holder("w1", 7), Some(Arc::new(link)));
        assert_eq!((standing(&view, "w1", 7), standing(&view, "w1", 8)), ("linked", "gone"));
        // Another worker, whose name is its neighbour's.
        assert_eq!((standing(&view, "w0", 1), standing(&view, "w10", 1)), ("away", "away"));
        view.remove(&holder("w1", 7));
        assert_eq!((standing(&view, "w1", 7), standing(&view, "w1", 6)), ("gone", "away"));
        view.gone = None;
        assert_eq!((standing(&view, "w1", 6), standing(&view, "w0", 1)), ("gone", "gone"));
    }

    #[test]
    fn a_link_that_broke_is_none() {
        let mut view = View::default();
        let (link, tasks) = HoldLink::new(holder("w1", 7));
        view.set(holder("w1", 7), Some(Arc::new(link)));
        assert!(view.link(&holder("w1", 7)).is_some());
        drop(tasks);
        assert!(view.link(&holder("w1", 7)).is_none());
        assert_eq!(standing(&view, "w1", 7), "away");
    }

    #[test]
    fn pauses_begin_with_none_and_grow_to_a_second() {
        assert_eq!(pause_after(0, 1.0), Duration::ZERO);
        for (failures, most) in [(1, 20), (2, 40), (3, 80), (30, 1000), (u32::MAX, 1000)] {
            let most = Duration::from_millis(most);
            assert_eq!(
                (pause_after(failures, 0.0), pause_after(failures, 1.0)),
                (most / 2, most),
                "{failures}"
            );
        }
    }
}
