//! Requests that the client library never makes: the same mutation twice at once, and appends that are cut.

use std::time::Duration;

use attnd_plan::Tensor;
use attnd_plan::session::SessionName;
use attnd_wire::session::{
    Answer, Append, AppendChunk, Ask, Mutation, RowShape, SessionReply, SessionRequest, Step, StepRows,
    digest,
};
use attnd_wire::{Commit, Error, Link, limits};
use rand::RngExt;
use tokio_stream::StreamExt;

use super::client::{Held, PATIENCE, Writer};
use super::cluster::COORDINATOR_URL;
use super::model::Op;
use crate::support::tokens::Token;

/// Time for answers to frames that may have none.
const SOON: Duration = Duration::from_secs(2);

impl Writer {
    /// Sends frames over a connection of their own, and gives what comes back until all requests but the appends that were cut are
    /// answered.
    async fn exchange(&self, asks: Vec<(u64, Ask)>, answers: usize, ends: bool) -> Vec<SessionReply> {
        let frames: Vec<attnd_wire::proto::SessionRequest> = asks
            .into_iter()
            .map(|(request, ask)| SessionRequest { request, timeout: PATIENCE, ask }.into())
            .collect();
        let endpoint = limits::endpoint(COORDINATOR_URL, Link::Client).unwrap();
        let mut stub = limits::sessions_client(self.surroundings.channel(&endpoint));
        let mut got = Vec::new();
        let reading = async {
            let frames = tokio_stream::iter(frames);
            let opened = match ends {
                true => stub.exchange(frames).await,
                false => stub.exchange(frames.chain(tokio_stream::pending())).await,
            };
            let Ok(opened) = opened else { return };
            let mut replies = opened.into_inner();
            while got.len() < answers
                && let Ok(Some(reply)) = replies.message().await
            {
                match SessionReply::try_from(reply) {
                    Ok(reply) => got.push(reply),
                    Err(error) => self.scene.history.violation(&self.name, error),
                }
            }
        };
        // Whoever waits longer learns nothing more.
        tokio::time::timeout(SOON, reading).await.ok();
        got
    }

    /// The number of the next mutation.
    async fn mutation(&self, held: &mut Held) -> Option<Mutation> {
        match self.sessions.describe(&held.name).await {
            Ok(told) => Some(Mutation { writer_epoch: told.writer_epoch, op_seq: told.next_op_seq }),
            Err(error) => {
                self.judge(Some(held), "describe", &error);
                None
            }
        }
    }

    /// The same step twice, at once, without saying how many tokens are before it: it counts once, and both are told the same.
    pub(super) async fn send_twice(&mut self, held: &mut Held) {
        let Some((layer, tokens)) = self.tokens_for(held) else { return };
        let Some(mutation) = self.mutation(held).await else { return };
        held.model.borrow_mut().begin(&Op::Append { layer, tokens: tokens.clone() });
        held.is_settled = false;
        let [k, v] = held.shape().keys_and_values(layer, &tokens);
        let rows = StepRows::new(mutation, tokens.len(), k, v);
        let session = SessionName::new(&held.name).unwrap();
        let step = Step { session, layer, rows: Some(rows), queries: None };
        let asks = vec![(1, Ask::Steps(vec![step.clone()])), (2, Ask::Steps(vec![step]))];
        let mut applied = Vec::new();
        for reply in self.exchange(asks, 2, false).await {
            match reply.answer {
                Answer::Steps(results) => {
                    applied.extend(results.into_iter().filter_map(|result| result.applied))
                }
                Answer::Failed(error) => self.said(held, &error),
                other => self.scene.history.violation(&self.name, format!("{other:?} of a step")),
            }
        }
        let lens: Vec<u64> = applied.iter().map(|applied| applied.len).collect();
        let replays = applied.iter().filter(|applied| applied.replayed).count();
        self.scene.history.tell(&self.name, format!("{} twice: {lens:?}, {replays} replayed", held.name));
        if !lens.is_empty() {
            held.model.borrow_mut().applied();
            let len = held.model.borrow().now().layers[layer].len() as u64;
            if lens.iter().any(|told| *told != len) || replays + 1 < lens.len() {
                let what = format!("{} twice: told {lens:?}, {replays} replayed, has {len}", held.name);
                self.scene.history.violation(&self.name, what);
            }
            self.scene.history.count("applied", 1);
            self.scene.history.count("replayed", replays as u64);
        }
    }

    /// An append in small chunks, which may be cut before its end: then nothing of it is applied.
    pub(super) async fn append_in_chunks(&mut self, held: &mut Held) {
        let Some((layer, tokens)) = self.tokens_for(held) else { return };
        let Some(mutation) = self.mutation(held).await else { return };
        let mut asks = self.chunks(held, mutation, layer, &tokens);
        let is_cut = self.chance(40);
        if is_cut {
            asks.truncate(self.random.random_range(1..asks.len()));
        }
        held.model.borrow_mut().begin(&Op::Append { layer, tokens: tokens.clone() });
        held.is_settled = false;
        let n = asks.len();
        let ends = is_cut && self.chance(50);
        let asks = asks.into_iter().map(|ask| (1, ask)).collect();
        let replies = self.exchange(asks, usize::from(!is_cut || ends), ends).await;
        let what = format!("{} append of {} in {n} frames, cut: {is_cut}", held.name, tokens.len());
        for reply in replies {
            match reply.answer {
                Answer::Applied(applied) => {
                    held.model.borrow_mut().applied();
                    let len = held.model.borrow().now().layers[layer].len() as u64;
                    self.scene.history.tell(&self.name, format!("{what}: {}", applied.len));
                    if is_cut || applied.len != len {
                        let what = format!("{what}: told {}, expected {len}", applied.len);
                        self.scene.history.violation(&self.name, what);
                    }
                    self.scene.history.count("applied", 1);
                }
                Answer::Failed(error) => self.said(held, &error),
                other => self.scene.history.violation(&self.name, format!("{other:?} of an append")),
            }
        }
        self.scene.history.count("appends cut", u64::from(is_cut));
        if is_cut && held.model.borrow().is_open() {
            let verdict = held.model.borrow_mut().refused();
            self.scene.history.tell(&self.name, &what);
            if let Err(error) = verdict {
                self.scene.history.violation(&self.name, format!("{what}: {error}"));
            }
        }
    }

    fn chunks(&mut self, held: &Held, mutation: Mutation, layer: usize, tokens: &[Token]) -> Vec<Ask> {
        let [k, v] = held.shape().keys_and_values(layer, tokens);
        let append = Append {
            session: SessionName::new(&held.name).unwrap(),
            mutation,
            layer,
            tokens: tokens.len() as u64,
            base_len: None,
            allow_non_finite: false,
            shape: RowShape::default(),
            crc32c: digest::of_rows(&k, &v),
        };
        let mut asks = vec![Ask::Append(append)];
        let mut commit = Commit { chunks: 0, bytes: 0 };
        let at_once = 4 * self.random.random_range(1 + k.len() / 40..=1 + k.len() / 8);
        for (tensor, bytes) in [(Tensor::K, k), (Tensor::V, v)] {
            let mut at = 0;
            while at < bytes.len() {
                let end = bytes.len().min(at + at_once);
                let chunk = AppendChunk::new(commit.chunks, tensor, at as u64, bytes.slice(at..end));
                asks.push(Ask::Chunk(chunk));
                commit = Commit { chunks: commit.chunks + 1, bytes: commit.bytes + (end - at) as u64 };
                at = end;
            }
        }
        asks.push(Ask::Commit(commit));
        asks
    }

    fn said(&self, held: &mut Held, error: &Error) {
        let error = attnd_client::ClientError::from(error.clone());
        self.judge(Some(held), "raw", &error);
    }
}
