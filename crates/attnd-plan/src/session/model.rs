//! What a session is to whoever uses it: tokens by layer, a generation, and the ops that were acknowledged. Nothing of shards, replicas
//! or messages; whatever these do must look like this.

use super::ledger::{Ask, Request};
use super::op::Answer;

/// A token, told apart by the digest of the request that brought it and its place in there.
pub(super) type Token = (u32, usize);

/// What a client knows of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Told {
    pub(super) request: Request,
    pub(super) answer: Answer,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Model {
    layers: Vec<Vec<Token>>,
    generation: u64,
    is_sealed: bool,
    told: Vec<Told>,
    /// A request whose answer isn't known. It may have happened, or happen.
    open: Option<Request>,
}

impl Model {
    pub(super) fn new(layers: usize) -> Self {
        Self { layers: vec![Vec::new(); layers], ..Self::default() }
    }

    /// The tokens of a layer that were acknowledged.
    pub(super) fn tokens(&self, layer: usize) -> &[Token] {
        &self.layers[layer]
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn longest(&self) -> usize {
        self.layers.iter().map(Vec::len).max().unwrap_or(0)
    }

    pub(super) fn told(&self) -> &[Told] {
        &self.told
    }

    pub(super) fn open(&self) -> Option<Request> {
        self.open
    }

    /// A client asks.
    pub(super) fn ask(&mut self, request: Request) {
        assert_eq!(request.seq, self.told.len() as u64 + 1, "ops are numbered in order");
        self.open = Some(request);
    }

    /// What the session must answer to this request, if it happens now.
    pub(super) fn expect(&self, request: &Request) -> Answer {
        let mut after = self.clone();
        after.happen(request)
    }

    fn happen(&mut self, request: &Request) -> Answer {
        let mut child = None;
        let len = match request.ask {
            Ask::Append { layer, tokens, .. } => {
                assert!(!self.is_sealed, "an append after the seal");
                self.layers[layer].extend((0..tokens).map(|index| (request.digest, index)));
                self.layers[layer].len()
            }
            Ask::Truncate { len } => {
                assert!(!self.is_sealed, "a cut after the seal");
                self.layers.iter_mut().for_each(|layer| layer.truncate(len));
                self.generation += 1;
                self.longest()
            }
            Ask::Fork { child: number } => {
                child = Some(number);
                self.longest()
            }
            Ask::Seal => {
                self.is_sealed = true;
                self.longest()
            }
        };
        Answer { len, generation: self.generation, child }
    }

    /// The session says that an op has happened.
    pub(super) fn acknowledge(&mut self, seq: u64, answer: Answer) -> Result<(), String> {
        if let Some(told) = usize::try_from(seq - 1).ok().and_then(|index| self.told.get(index)) {
            return if told.answer == answer {
                Ok(())
            } else {
                Err(format!("op {seq} was answered {:?}, now {answer:?}", told.answer))
            };
        }
        let Some(request) = self.open.filter(|request| request.seq == seq) else {
            return Err(format!("op {seq} was never asked for"));
        };
        let expected = self.happen(&request);
        if expected != answer {
            return Err(format!("op {seq} is answered {answer:?}, not {expected:?}"));
        }
        self.told.push(Told { request, answer });
        self.open = None;
        Ok(())
    }

    /// The session says that an op hasn't happened, and won't.
    pub(super) fn refuse(&mut self, seq: u64) {
        self.open = self.open.filter(|request| request.seq != seq);
    }
}
