//! Queries over a session's shards: who computes each of them, and who does when that one is lost or late.
//!
//! A merge is not idempotent, so the partials of a shard are taken once, from whoever comes first. Shards tile heads and slots, so
//! an answer of all of them has every key once.

use std::collections::VecDeque;

/// One shard's part of an attempt.
#[derive(Clone, Debug)]
struct Part<H, P> {
    /// Who is asked now.
    asked: Vec<H>,
    /// Who may be asked, the best first.
    others: VecDeque<H>,
    /// What came first.
    taken: Option<P>,
}

/// One computation over all shards. `H` names a replica, `P` is what it answers.
#[derive(Clone, Debug)]
pub struct Attempt<H, P> {
    parts: Vec<Part<H, P>>,
}

/// Nobody is left who has a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nobody is left who has shard {shard}")]
pub struct Exhausted {
    /// Which.
    pub shard: usize,
}

impl<H: Clone + PartialEq, P> Attempt<H, P> {
    /// An attempt over shards with these replicas, of each the best first: the first one is asked.
    ///
    /// # Errors
    /// If a shard has none.
    pub fn new(replicas: impl IntoIterator<Item = Vec<H>>) -> Result<Self, Exhausted> {
        let part = |(shard, replicas): (usize, Vec<H>)| {
            let mut others = VecDeque::from(replicas);
            let first = others.pop_front().ok_or(Exhausted { shard })?;
            Ok(Part { asked: vec![first], others, taken: None })
        };
        Ok(Self { parts: replicas.into_iter().enumerate().map(part).collect::<Result<_, _>>()? })
    }

    /// Who is asked for a shard at first.
    pub fn asked(&self, shard: usize) -> Option<&H> {
        self.parts.get(shard)?.asked.last()
    }

    /// A replica answered. False if its answer isn't wanted any more, or never was asked for.
    pub fn take(&mut self, shard: usize, from: &H, answer: P) -> bool {
        let Some(part) = self.parts.get_mut(shard) else { return false };
        if part.taken.is_some() || !part.asked.contains(from) {
            return false;
        }
        part.taken = Some(answer);
        true
    }

    /// A replica won't answer for a shard. Says who is to be asked in its place, if somebody has to.
    ///
    /// # Errors
    /// If nobody is left.
    pub fn fail(&mut self, shard: usize, from: &H) -> Result<Option<H>, Exhausted> {
        let Some(part) = self.parts.get_mut(shard) else { return Ok(None) };
        part.others.retain(|other| other != from);
        let was_asked = part.asked.len();
        part.asked.retain(|asked| asked != from);
        if part.taken.is_some() || part.asked.len() == was_asked || !part.asked.is_empty() {
            return Ok(None);
        }
        let next = part.others.pop_front().ok_or(Exhausted { shard })?;
        part.asked.push(next.clone());
        Ok(Some(next))
    }

    /// A shard is late: the best of those who aren't asked for it and who `can` be, to be asked beside whoever is. None if it is there, or
    /// two are asked already.
    pub fn spare(&self, shard: usize, can: impl Fn(&H) -> bool) -> Option<&H> {
        let part = self.parts.get(shard).filter(|part| part.taken.is_none() && part.asked.len() == 1)?;
        part.others.iter().find(|other| can(other))
    }

    /// The [spare](Self::spare) one is asked too. False if it isn't one.
    pub fn hedge(&mut self, shard: usize, spare: &H) -> bool {
        if self.spare(shard, |other| other == spare).is_none() {
            return false;
        }
        let Some(part) = self.parts.get_mut(shard) else { return false };
        part.others.retain(|other| other != spare);
        part.asked.push(spare.clone());
        true
    }

    /// Shards that aren't there, ascending.
    pub fn missing(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().enumerate().filter(|(_, part)| part.taken.is_none()).map(|(shard, _)| shard)
    }

    /// The answers of all shards, in their order; the attempt as it is where one is missing.
    ///
    /// # Errors
    /// The attempt itself.
    pub fn finish(self) -> Result<Vec<P>, Self> {
        if self.parts.iter().any(|part| part.taken.is_none()) {
            return Err(self);
        }
        Ok(self.parts.into_iter().filter_map(|part| part.taken).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_shards() -> Attempt<char, u32> {
        Attempt::new([vec!['a', 'b'], vec!['b', 'c']]).unwrap()
    }

    #[test]
    fn each_shard_is_taken_once_from_who_was_asked() {
        let mut attempt = two_shards();
        assert_eq!((attempt.asked(0), attempt.asked(1), attempt.asked(2)), (Some(&'a'), Some(&'b'), None));
        assert!(!attempt.take(0, &'b', 9), "nobody asked b for it");
        assert!(attempt.take(0, &'a', 1));
        assert!(!attempt.take(0, &'a', 2), "twice");
        assert!(!attempt.take(7, &'a', 2), "no such shard");
        assert_eq!(attempt.missing().collect::<Vec<_>>(), [1]);
        let mut attempt = attempt.finish().unwrap_err();
        assert!(attempt.take(1, &'b', 3));
        assert_eq!(attempt.finish().unwrap(), [1, 3]);
    }

    #[test]
    fn who_is_lost_is_replaced_as_long_as_there_is_another() {
        let mut attempt = two_shards();
        assert_eq!(attempt.fail(0, &'a'), Ok(Some('b')));
        assert_eq!(attempt.fail(1, &'b'), Ok(Some('c')));
        assert_eq!(attempt.fail(0, &'a'), Ok(None), "it isn't asked any more");
        assert_eq!(attempt.fail(0, &'b'), Err(Exhausted { shard: 0 }));
        assert!(!attempt.take(0, &'a', 1), "its answer came after its loss");
        assert!(attempt.take(1, &'c', 2));
        assert_eq!(attempt.fail(1, &'c'), Ok(None), "what it said stays");
    }

    #[test]
    fn a_replica_that_is_lost_before_it_is_asked_never_is() {
        let mut attempt: Attempt<char, u32> = Attempt::new([vec!['a', 'b', 'c']]).unwrap();
        assert_eq!(attempt.fail(0, &'b'), Ok(None));
        assert_eq!(attempt.fail(0, &'a'), Ok(Some('c')));
    }

    #[test]
    fn the_first_of_two_that_are_asked_wins() {
        let mut attempt = two_shards();
        assert_eq!((attempt.spare(0, |_| true), attempt.spare(0, |who| *who != 'b')), (Some(&'b'), None));
        assert!(!attempt.hedge(0, &'c'), "it hasn't got it");
        assert!(attempt.hedge(0, &'b'));
        assert!(!attempt.hedge(0, &'b') && attempt.spare(0, |_| true).is_none(), "two at a time");
        assert_eq!(attempt.fail(0, &'a'), Ok(None), "the other one is asked already");
        assert!(attempt.take(0, &'b', 5));
        assert!(!attempt.take(0, &'a', 6) && !attempt.take(0, &'b', 6));
        assert_eq!(attempt.spare(0, |_| true), None);
        assert!(attempt.hedge(1, &'c') && attempt.take(1, &'b', 7) && !attempt.take(1, &'c', 8));
        assert_eq!(attempt.finish().unwrap(), [5, 7]);
    }

    #[test]
    fn the_best_of_those_who_can_is_asked_beside() {
        let mut attempt: Attempt<char, u32> = Attempt::new([vec!['a', 'b', 'c']]).unwrap();
        assert_eq!(attempt.spare(0, |who| *who == 'c'), Some(&'c'));
        assert!(attempt.hedge(0, &'c'));
        assert_eq!(attempt.fail(0, &'c'), Ok(None));
        assert_eq!(attempt.fail(0, &'a'), Ok(Some('b')), "who was passed over is there still");
    }

    #[test]
    fn a_shard_that_nobody_has_is_an_error_at_once() {
        assert_eq!(Attempt::<char, u32>::new([vec!['a'], vec![]]).unwrap_err(), Exhausted { shard: 1 });
    }
}
