//! A coordinator in this process: it keeps lengths, numbers and names, answers queries with what tells their place, and fails as told.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use attnd_plan::Tensor;
use attnd_plan::session::{self, SessionName, SessionSpec};
use attnd_wire::session::{
    Answer, Append, Applied, Ask, Asked, ChangeKind, Mutation, SessionDescription, SessionReply,
    SessionRequest, Step, StepContext, StepResult, digest,
};
use attnd_wire::{Commit, ContextChunk, Error, Link, Reason, limits, proto, refusal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::client::Client;
use crate::session::Sessions;

/// What becomes of the next request.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// It is answered with this, and not done.
    Fail(Error),
    /// That of its steps is.
    FailStep(usize, Error),
    /// Its rows are appended, its queries are answered with this.
    FailQueries(Error),
    /// It is done, and the stream breaks before the answer.
    Lose,
    /// The stream breaks when this chunk comes.
    CutAtChunk(u32),
    /// It is done, and never answered.
    Silent,
    /// It is neither done nor answered.
    Swallow,
    /// It is answered behind the next one.
    Late,
    /// It is answered, and then layers grow by so many tokens.
    Grow(u64),
    /// It is answered under a number that no request has.
    Misnumber,
}

#[derive(Clone, Debug)]
pub(super) struct Fake {
    pub(super) streams: Arc<AtomicUsize>,
    state: Arc<Mutex<State>>,
    url: String,
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<SessionName, Held>,
    closed: Vec<SessionName>,
    faults: VecDeque<Fault>,
    /// Of all requests but chunks and commits, as they came.
    numbers: Vec<u64>,
    answered: Vec<u64>,
    given_up: Vec<u64>,
    steps: Vec<usize>,
    rows: (Vec<u8>, Vec<u8>),
}

#[derive(Clone, Debug)]
struct Held {
    spec: SessionSpec,
    tokens: Vec<u64>,
    generation: u64,
    writer_epoch: u64,
    /// Digest and answer of each op.
    ops: Vec<(u32, Applied)>,
}

impl Fake {
    pub(super) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let fake = Self { streams: Arc::default(), state: Arc::default(), url };
        let server = limits::server_builder(Link::Client).add_service(limits::sessions_server(fake.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    pub(super) fn sessions(&self) -> Sessions {
        Client::connect(&self.url).unwrap().sessions().with_timeout(Duration::from_secs(20))
    }

    /// A session loses tokens behind everybody's back.
    pub(super) fn cut(&self, name: &str, len: u64) {
        let mut state = self.state();
        let held = state.sessions.get_mut(&SessionName::new(name).unwrap()).unwrap();
        held.tokens.iter_mut().for_each(|tokens| *tokens = len.min(*tokens));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What becomes of the next requests.
    pub(super) fn next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults = faults.into_iter().collect();
    }

    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    pub(super) fn numbers(&self) -> Vec<u64> {
        self.state().numbers.clone()
    }

    pub(super) fn given_up(&self) -> Vec<u64> {
        self.state().given_up.clone()
    }

    pub(super) fn answered(&self) -> Vec<u64> {
        self.state().answered.clone()
    }

    pub(super) fn steps_of_messages(&self) -> Vec<usize> {
        self.state().steps.clone()
    }

    /// K and V of the last append in chunks.
    pub(super) fn last_rows(&self) -> (Vec<u8>, Vec<u8>) {
        self.state().rows.clone()
    }

    fn held<T>(&self, name: &str, of: impl Fn(&Held) -> T) -> T {
        of(&self.state().sessions[&SessionName::new(name).unwrap()])
    }

    pub(super) fn tokens(&self, name: &str) -> Vec<u64> {
        self.held(name, |held| held.tokens.clone())
    }

    pub(super) fn writer_epoch(&self, name: &str) -> u64 {
        self.held(name, |held| held.writer_epoch)
    }
}

type Replies = Pin<Box<dyn Stream<Item = Result<proto::SessionReply, Status>> + Send>>;

#[tonic::async_trait]
impl proto::sessions_server::Sessions for Fake {
    type ExchangeStream = Replies;

    async fn exchange(
        &self,
        request: Request<Streaming<proto::SessionRequest>>,
    ) -> Result<Response<Replies>, Status> {
        assert!(request.extensions().get::<attnd_wire::Deadline>().is_none(), "the stream has a deadline");
        self.streams.fetch_add(1, Ordering::Relaxed);
        let (replies, outgoing) = mpsc::channel(64);
        tokio::spawn(serve(self.clone(), request.into_inner(), replies));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// An append of which not all is here.
#[derive(Debug)]
struct Staged {
    append: Append,
    rows: (Vec<u8>, Vec<u8>),
    sum: digest::RowsChecksum,
    cut_at: Option<u32>,
    fault: Fault,
    commit: Commit,
}

async fn serve(
    fake: Fake,
    mut requests: Streaming<proto::SessionRequest>,
    replies: mpsc::Sender<Result<proto::SessionReply, Status>>,
) {
    let broken = || Err(Status::from(Error::new(Reason::Transport, "connection lost")));
    let mut staged: BTreeMap<u64, Staged> = BTreeMap::new();
    let mut late: Vec<SessionReply> = Vec::new();
    while let Some(Ok(message)) = requests.next().await {
        let Asked { request, ask, timeout } = SessionRequest::decode(message);
        assert!(timeout <= Duration::from_secs(20));
        let mut answers = Vec::new();
        let fault = match ask {
            Ok(Ask::Chunk(chunk)) => {
                let Some(staged) = staged.get_mut(&request) else { continue };
                if staged.cut_at == Some(chunk.index) {
                    replies.send(broken()).await.ok();
                    return;
                }
                assert_eq!(chunk.index, staged.commit.chunks);
                staged.commit.chunks += 1;
                staged.commit.bytes += chunk.data.len() as u64;
                let offset = chunk.offset.unwrap();
                staged.sum.add(chunk.tensor, offset, chunk.data.len() as u64, chunk.data.crc32c());
                let rows = &mut staged.rows;
                let rows = if chunk.tensor == Tensor::V { &mut rows.1 } else { &mut rows.0 };
                rows[offset as usize..][..chunk.data.len()].copy_from_slice(&chunk.data);
                continue;
            }
            Ok(Ask::GiveUp) => {
                fake.state().given_up.push(request);
                continue;
            }
            Ok(Ask::Commit(commit)) => {
                let Some(staged) = staged.remove(&request) else { continue };
                assert_eq!(commit, staged.commit);
                let Staged { append, rows, sum, fault, .. } = staged;
                assert_eq!(append.crc32c, sum.finish());
                let digest = digest_of(append.layer, append.base_len, append.tokens, append.crc32c);
                let mut state = fake.state();
                state.rows = rows;
                let layer = append.layer;
                let applied = state.apply(&append.session, append.mutation, digest, |held| {
                    held.append(layer, append.tokens, append.base_len)
                });
                answers.push(applied.map_or_else(Answer::Failed, Answer::Applied));
                fault
            }
            Ok(Ask::Append(append)) => {
                let mut state = fake.state();
                state.numbers.push(request);
                let fault = state.faults.pop_front().unwrap_or(Fault::None);
                let bytes = append.bytes(&state.sessions[&append.session].spec).unwrap();
                let cut_at = if let Fault::CutAtChunk(index) = fault { Some(index) } else { None };
                match fault {
                    Fault::Fail(error) => answers.push(Answer::Failed(error)),
                    fault => {
                        let rows = (vec![0; bytes.0 as usize], vec![0; bytes.1 as usize]);
                        let (sum, commit) = (Default::default(), Commit { chunks: 0, bytes: 0 });
                        staged.insert(request, Staged { append, rows, sum, cut_at, fault, commit });
                        continue;
                    }
                }
                Fault::None
            }
            Ok(ask) => {
                let mut state = fake.state();
                state.numbers.push(request);
                let fault = state.faults.pop_front().unwrap_or(Fault::None);
                answers = match &fault {
                    Fault::Fail(error) => vec![Answer::Failed(error.clone())],
                    Fault::Swallow => Vec::new(),
                    fault => state.answer(ask, fault),
                };
                fault
            }
            Err(error) => {
                answers.push(Answer::Failed(error));
                Fault::None
            }
        };
        let n = answers.len();
        let number = if matches!(fault, Fault::Misnumber) { request + 100 } else { request };
        let all = answers.into_iter().enumerate();
        let all = all.map(|(at, answer)| SessionReply { request: number, more: at + 1 < n, answer });
        match fault {
            Fault::Lose => {
                replies.send(broken()).await.ok();
                return;
            }
            Fault::Silent | Fault::Swallow => continue,
            Fault::Late => {
                late.extend(all);
                continue;
            }
            _ => {}
        }
        for reply in all.chain(late.drain(..)).collect::<Vec<_>>() {
            if !reply.more {
                fake.state().answered.push(reply.request);
            }
            if replies.send(Ok(reply.into())).await.is_err() {
                return;
            }
        }
    }
}

/// What tells an append from another one with its number.
fn digest_of(layer: usize, base_len: Option<u64>, tokens: u64, crc32c: u32) -> u32 {
    let base_len = base_len.map(|len| len as usize);
    session::Ask::Append { layer, base_len, tokens: tokens as usize }.digest(crc32c)
}

impl Held {
    fn append(&mut self, layer: usize, tokens: u64, base_len: Option<u64>) -> Result<Applied, Error> {
        let len = &mut self.tokens[layer];
        if base_len.is_some_and(|base_len| base_len != *len) {
            return Err(refusal::length(*len, base_len.unwrap_or_default()));
        }
        *len += tokens;
        Ok(Applied { len: *len, generation: self.generation, replayed: false, child: None })
    }
}

impl State {
    /// Does a mutation once.
    fn apply(
        &mut self,
        session: &SessionName,
        mutation: Mutation,
        digest: u32,
        change: impl FnOnce(&mut Held) -> Result<Applied, Error>,
    ) -> Result<Applied, Error> {
        let held = self.sessions.get_mut(session).ok_or_else(refusal::no_session)?;
        if mutation.writer_epoch != held.writer_epoch {
            return Err(refusal::writer_fenced(mutation.writer_epoch, held.writer_epoch));
        }
        let next = held.ops.len() as u64 + 1;
        if let Some((known, applied)) = held.ops.get(mutation.op_seq as usize - 1) {
            let replayed = Applied { replayed: true, ..applied.clone() };
            return if *known == digest { Ok(replayed) } else { Err(refusal::seq_reused(mutation.op_seq)) };
        }
        if mutation.op_seq != next {
            return Err(refusal::seq_gap(next, mutation.op_seq));
        }
        let applied = change(held)?;
        held.ops.push((digest, applied.clone()));
        Ok(applied)
    }

    fn describe(&self, name: &SessionName, created: bool) -> Result<Answer, Error> {
        let held = self.sessions.get(name).ok_or_else(refusal::no_session)?;
        Ok(Answer::Description(Box::new(SessionDescription {
            name: name.clone(),
            spec: held.spec.clone(),
            created,
            generation: held.generation,
            sealed: false,
            writer_epoch: held.writer_epoch,
            next_op_seq: held.ops.len() as u64 + 1,
            tokens: held.tokens.clone(),
            shards: Vec::new(),
            ttl_left: Duration::from_secs(600),
        })))
    }

    fn answer(&mut self, ask: Ask<Result<Step, Error>>, fault: &Fault) -> Vec<Answer> {
        let answered = match ask {
            Ask::Steps(steps) => {
                self.steps.push(steps.len());
                return self.steps(steps, fault);
            }
            Ask::List => {
                // In parts, as a coordinator with many sessions answers.
                return self.sessions.keys().map(|name| Answer::Names(vec![name.clone()])).collect();
            }
            Ask::Open(open) => {
                let name = open.name.unwrap();
                let created = !self.sessions.contains_key(&name);
                if let Some(spec) = open.spec.filter(|_| created) {
                    let tokens = vec![0; spec.layers];
                    let held = Held { spec, tokens, generation: 1, writer_epoch: 0, ops: Vec::new() };
                    self.sessions.insert(name.clone(), held);
                }
                if let Some(held) = self.sessions.get_mut(&name) {
                    held.writer_epoch += u64::from(open.write);
                }
                self.describe(&name, created)
            }
            Ask::Describe(name) => self.describe(&name, false),
            Ask::Close(name) => {
                let already = self.closed.contains(&name);
                self.sessions.remove(&name);
                self.closed.push(name);
                Ok(Answer::Closed { already })
            }
            Ask::Change(change) => {
                let mut child = None;
                let digest = match &change.kind {
                    ChangeKind::Truncate { len } => session::Ask::Truncate { len: *len as usize }.digest(0),
                    ChangeKind::Fork { child } => {
                        session::Ask::Fork { child: 1 }.digest(digest::of_child(child.as_ref()))
                    }
                    ChangeKind::Seal => session::Ask::Seal.digest(0),
                };
                let applied = self.apply(&change.session, change.mutation, digest, |held| {
                    let mut named = None;
                    match change.kind {
                        ChangeKind::Truncate { len } => {
                            held.tokens.iter_mut().for_each(|of_layer| *of_layer = len.min(*of_layer));
                            held.generation += 1;
                        }
                        ChangeKind::Fork { child: name } => {
                            child = Some((name.clone().unwrap(), held.clone()));
                            named = name;
                        }
                        ChangeKind::Seal => {}
                    }
                    let len = held.tokens.iter().copied().max().unwrap_or(0);
                    Ok(Applied { len, generation: held.generation, replayed: false, child: named })
                });
                if let Some((name, parent)) = child {
                    self.sessions.insert(name, Held { ops: Vec::new(), writer_epoch: 0, ..parent });
                }
                applied.map(Answer::Applied)
            }
            Ask::Append(_) | Ask::Chunk(_) | Ask::Commit(_) | Ask::GiveUp => Err(refusal::empty_frame()),
        };
        vec![answered.unwrap_or_else(Answer::Failed)]
    }

    /// Results in another order than that of the steps, and those of queries in two parts.
    fn steps(&mut self, steps: Vec<Result<Step, Error>>, fault: &Fault) -> Vec<Answer> {
        let mut answers = Vec::new();
        for (at, step) in steps.into_iter().enumerate().rev() {
            let mut results = match fault {
                Fault::FailStep(failed, error) if *failed == at => {
                    vec![StepResult { failure: Some(error.clone()), ..StepResult::default() }]
                }
                _ => match step.and_then(|step| self.step(step, fault)) {
                    Ok(results) => results,
                    Err(error) => vec![StepResult { failure: Some(error), ..StepResult::default() }],
                },
            };
            results.iter_mut().for_each(|result| result.step = at);
            answers.extend(results.into_iter().map(|result| Answer::Steps(vec![result])));
        }
        answers
    }

    fn step(&mut self, step: Step, fault: &Fault) -> Result<Vec<StepResult>, Error> {
        let Step { session, layer, rows, queries } = step;
        let spec = self.sessions.get(&session).ok_or_else(refusal::no_session)?.spec.clone();
        let mut results = Vec::new();
        if let Some(rows) = rows {
            rows.check(layer, &spec)?;
            let tokens = rows.tokens as u64;
            let digest = digest_of(layer, rows.base_len, tokens, rows.crc32c);
            let applied = self
                .apply(&session, rows.mutation, digest, |held| held.append(layer, tokens, rows.base_len))?;
            results.push(StepResult { applied: Some(applied), ..StepResult::default() });
        }
        let Some(queries) = queries else { return Ok(results) };
        let held = self.sessions.get_mut(&session).ok_or_else(refusal::no_session)?;
        let len = held.tokens[layer];
        queries.check(layer, &spec)?;
        if queries.min_len > len && queries.min_len_generation == held.generation {
            return Err(refusal::at_len(queries.min_len, len));
        }
        let at_len = queries.at_len.unwrap_or(len);
        let (_, operator) = queries.over(&spec, at_len as usize)?;
        if let Fault::FailQueries(error) = fault {
            results.push(StepResult { failure: Some(error.clone()), ..StepResult::default() });
            return Ok(results);
        }
        if let Fault::Grow(tokens) = fault {
            held.tokens[layer] += tokens;
        }
        let q = attnd_wire::floats::from_bytes(&queries.q);
        let (tokens, heads) = (queries.tokens, spec.heads);
        for part in [heads / 2..heads, 0..heads / 2] {
            let rows = part.start * tokens..part.end * tokens;
            let context = q.chunks(4).skip(rows.start).take(rows.len()).flat_map(|row| [row[0], row[1]]);
            let (context, lse) = (context.collect(), vec![at_len as f32; rows.len()]);
            let rows = ContextChunk { heads: part, tokens: 0..tokens, lse, context };
            let kernel_id = operator.kernel_id(attnd_kernel::Compute::F32);
            let context = Some(StepContext::new(rows, at_len, held.generation, kernel_id));
            results.push(StepResult { context, ..StepResult::default() });
        }
        Ok(results)
    }
}
