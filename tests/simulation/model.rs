//! What a session is to whoever uses it: tokens by layer, a generation, a seal. Nothing of shards, replicas or messages; whatever
//! these go through must look like this.

use std::collections::BTreeMap;

use attnd_client::session::SessionAttended;
use attnd_wire::session::SessionDescription;

use crate::support::cases::Answer;
use crate::support::tokens::{RowShape, Token};

/// A mutation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Append {
        layer: usize,
        tokens: Vec<Token>,
    },
    Truncate {
        len: usize,
    },
    Seal,
    /// Changes nothing of its parent.
    Fork,
}

/// What there is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) generation: u64,
    pub(super) layers: Vec<Vec<Token>>,
    pub(super) sealed: bool,
}

impl State {
    pub(super) fn empty(layers: usize) -> Self {
        Self { layers: vec![Vec::new(); layers], ..Self::default() }
    }

    /// What a fork of it begins with.
    pub(super) fn forked(&self) -> Self {
        Self { layers: self.layers.clone(), ..Self::default() }
    }

    pub(super) fn longest(&self) -> usize {
        self.layers.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn after(&self, op: &Op) -> Self {
        let mut after = self.clone();
        match op {
            Op::Append { layer, tokens } => after.layers[*layer].extend(tokens),
            Op::Truncate { len } => {
                after.layers.iter_mut().for_each(|layer| layer.truncate(*len));
                after.generation += 1;
            }
            Op::Seal => after.sealed = true,
            Op::Fork => {}
        }
        after
    }

    fn is_described_by(&self, description: &SessionDescription) -> bool {
        let lens = self.layers.iter().map(|layer| layer.len() as u64);
        self.generation == description.generation
            && self.sealed == description.sealed
            && lens.eq(description.tokens.iter().copied())
    }
}

/// What is known of a session at a moment before a read, which must not see less.
#[derive(Clone, Copy, Debug)]
pub(super) struct Floor {
    generation: u64,
    len: usize,
}

/// A session.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) shape: RowShape,
    /// So many workers have lost what they had, at once, that nobody may have it.
    pub(super) may_be_lost: bool,
    now: State,
    /// What there is if the mutation that is under way, or of which nobody knows what became of it, is applied.
    open: Option<State>,
    /// Somebody has seen that it is.
    seen: bool,
    /// The last state of each generation before.
    before: BTreeMap<u64, State>,
}

impl Model {
    pub(super) fn new(shape: RowShape, now: State) -> Self {
        Self { shape, may_be_lost: false, now, open: None, seen: false, before: BTreeMap::new() }
    }

    pub(super) fn now(&self) -> &State {
        &self.now
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// A mutation is sent.
    pub(super) fn begin(&mut self, op: &Op) {
        assert!(self.open.is_none(), "one mutation at a time");
        self.open = Some(self.now.after(op));
        self.seen = false;
    }

    /// It was applied.
    pub(super) fn applied(&mut self) {
        let Some(after) = self.open.take() else { return };
        let before = std::mem::replace(&mut self.now, after);
        if before.generation != self.now.generation {
            self.before.insert(before.generation, before);
        }
        self.seen = false;
    }

    /// It wasn't, and won't be.
    pub(super) fn refused(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.seen) {
            return Err(format!("refused, and was seen before: {:?}", self.open));
        }
        self.open = None;
        Ok(())
    }

    /// Whoever is the writer since is told this: it says what became of a mutation.
    pub(super) fn settled(&mut self, description: &SessionDescription) -> Result<(), String> {
        if let Some(open) = &self.open
            && open.is_described_by(description)
        {
            self.applied();
            return Ok(());
        }
        if !self.now.is_described_by(description) {
            return Err(self.contradiction(description));
        }
        self.refused()
    }

    /// Somebody who asked when it was like that is told this, while mutations may be under way.
    pub(super) fn described(&self, asked: &State, description: &SessionDescription) -> Result<(), String> {
        let states = [Some(asked), Some(&self.now), self.open.as_ref()];
        let fits = states.into_iter().flatten().any(|state| state.is_described_by(description));
        // One that raced with others.
        let is_between = || {
            let mut lens = self.now.layers.iter().zip(&asked.layers).zip(&description.tokens);
            let is_long = |((now, asked), len): ((&Vec<Token>, &Vec<Token>), &u64)| {
                (asked.len() as u64..=now.len() as u64).contains(len)
            };
            [self.now.generation, asked.generation] == [description.generation; 2] && lens.all(is_long)
        };
        let early = self.before.contains_key(&description.generation);
        if fits || early || is_between() { Ok(()) } else { Err(self.contradiction(description)) }
    }

    fn contradiction(&self, description: &SessionDescription) -> String {
        let lens = |state: &State| state.layers.iter().map(Vec::len).collect::<Vec<_>>();
        let of = |state: &State| (state.generation, state.sealed, lens(state));
        format!(
            "described as {:?}, expected {:?} or {:?}",
            (description.generation, description.sealed, &description.tokens),
            of(&self.now),
            self.open.as_ref().map(of)
        )
    }

    /// What a read that begins now must not fall behind.
    pub(super) fn floor(&self, layer: usize) -> Floor {
        Floor { generation: self.now.generation, len: self.now.layers[layer].len() }
    }

    /// Compares an answer, bit by bit, with that of one whole call over the tokens that it says it is of.
    pub(super) fn attended(
        &mut self,
        layer: usize,
        queries: &[Token],
        floor: Floor,
        at_len: Option<u64>,
        answer: &SessionAttended,
    ) -> Result<(), String> {
        let (generation, len) = (answer.generation, usize::try_from(answer.at_len).unwrap());
        let what = format!("layer {layer}, generation {generation}, {len} tokens");
        let is_behind = at_len.is_none() && generation == floor.generation && len < floor.len;
        if generation < floor.generation || is_behind || at_len.is_some_and(|asked| asked != answer.at_len) {
            return Err(format!("{what}: asked for {at_len:?} at {floor:?}"));
        }
        let has = |state: &&State| state.generation == generation && state.layers[layer].len() >= len;
        let state = [Some(&self.now), self.before.get(&generation)].into_iter().flatten().find(has);
        let state = match (state, &self.open) {
            (Some(state), _) => state,
            (None, Some(open)) if has(&open) => {
                self.seen = true;
                open
            }
            _ => return Err(format!("{what}: nobody appended that")),
        };
        let expected = self.shape.answer(layer, &state.layers[layer][..len], queries);
        let got = Answer { context: answer.context.clone(), lse: answer.lse.clone() };
        got.difference(&expected).map_or(Ok(()), |difference| Err(format!("{what}: {difference}")))
    }
}
