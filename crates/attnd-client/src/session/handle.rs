//! One session, as whoever opened it sees it.

use std::sync::Arc;
use std::time::Duration;

use attnd_plan::session::{SessionName, SessionSpec};
use attnd_wire::session::{
    Answer, Append, Applied, Ask, Change, ChangeKind, Mutation, Open, RowShape, SessionDescription, Step,
    StepRows, check_layer,
};
use attnd_wire::{Error, Outcome, Reason};
use bytes::Bytes;
use tokio::time::Instant;

use crate::error::ClientError;
use crate::operands::AttendOptions;
use crate::session::exchange::Request;
use crate::session::queries::{Block, BlockRows, MOST_BYTES, Queries, QueryOptions, SessionAttended};
use crate::session::rows::Rows;
use crate::session::steps::{Done, Failed, Outgoing, run};
use crate::session::told::{Told, ToldOfLayer};
use crate::session::{Sessions, unexpected};

/// Rows up to so many bytes travel in one message.
const ONE_MESSAGE: usize = 1 << 20;

/// A session that was opened.
///
/// What changes it takes `&mut self`: mutations of a session come one after the other. A mutation whose future is dropped, or that fails
/// with an unknown outcome, may have been applied: the next one then makes sure of what there is, by becoming the writer anew, so that
/// nothing of before can still come.
#[derive(Debug)]
pub struct Session {
    sessions: Sessions,
    name: SessionName,
    spec: Arc<SessionSpec>,
    /// `None`: somebody else writes.
    writer_epoch: Option<u64>,
    next_op_seq: u64,
    /// A mutation was sent of which nobody knows what became of it.
    unsettled: bool,
    told: Told,
}

/// How to append. The default: finite rows only, in the time of all requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AppendOptions {
    /// Lets NaN and infinities through; they follow IEEE 754 into the rows that see them.
    pub allow_non_finite: bool,
    /// Time for it, all attempts included.
    pub timeout: Option<Duration>,
}

/// Rows that were appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Tokens of the layer since.
    pub len: u64,
    /// Of the session.
    pub generation: u64,
    /// It had been applied by an attempt whose answer got lost.
    pub replayed: bool,
    /// How often it was sent.
    pub attempts: u32,
}

/// A step that was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Stepped {
    /// Its rows.
    pub appended: Appended,
    /// Its queries.
    pub attended: SessionAttended,
}

impl Session {
    pub(super) fn new(sessions: Sessions, description: &SessionDescription, write: bool) -> Self {
        let mut session = Self {
            sessions,
            name: description.name.clone(),
            spec: Arc::new(description.spec.clone()),
            writer_epoch: None,
            next_op_seq: 1,
            unsettled: false,
            told: Told::of(description),
        };
        session.settle(description, write);
        session
    }

    /// Takes over what there is.
    fn settle(&mut self, description: &SessionDescription, write: bool) {
        self.writer_epoch = write.then_some(description.writer_epoch);
        self.next_op_seq = description.next_op_seq;
        self.told = Told::of(description);
        self.unsettled = false;
    }

    /// Its name.
    pub fn name(&self) -> &SessionName {
        &self.name
    }

    /// What it is.
    pub fn spec(&self) -> &SessionSpec {
        &self.spec
    }

    /// Tokens of a layer, as far as this side was told; none of a layer that isn't there.
    pub fn len(&self, layer: usize) -> u64 {
        self.told.layer(layer).len
    }

    /// Grows whenever the session is cut; the latest that this side was told of.
    pub fn generation(&self) -> u64 {
        self.told.generation()
    }

    /// The number of the next mutation.
    pub fn next_op_seq(&self) -> u64 {
        self.next_op_seq
    }

    pub(super) fn is_of(&self, sessions: &Sessions) -> bool {
        Arc::ptr_eq(&self.sessions.exchange, &sessions.exchange)
    }

    /// Appends K `[kv_heads, tokens, head_dim]` and V `[kv_heads, tokens, value_dim]` to a layer, all of them or none; V is empty where
    /// values are parts of keys.
    ///
    /// # Errors
    /// What is wrong with the rows, what the cluster refused, or what got lost: all by their reason.
    pub async fn append(&mut self, layer: usize, k: Bytes, v: Bytes) -> Result<Appended, ClientError> {
        self.append_with(layer, k, v, &AppendOptions::default()).await
    }

    /// The same with other options than the default.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn append_with(
        &mut self,
        layer: usize,
        k: Bytes,
        v: Bytes,
        options: &AppendOptions,
    ) -> Result<Appended, ClientError> {
        let AppendOptions { allow_non_finite, timeout } = *options;
        check_layer(layer, &self.spec)?;
        let rows = Rows::new(k, v, &self.spec)?;
        let deadline = self.sessions.deadline(timeout);
        let mutation = self.begin_mutation(deadline).await?;
        if rows.bytes() <= ONE_MESSAGE {
            let rows = self.step_rows(layer, rows, mutation, allow_non_finite);
            let step = Step { session: self.name.clone(), layer, rows: Some(rows), queries: None };
            let outgoing = Outgoing { step, spec: Arc::clone(&self.spec), block: None };
            let done = self.run_one(&outgoing, deadline).await;
            return self.ended(layer, done).map(|(appended, _rows)| appended);
        }
        let (chunks, crc32c) = rows.chunks();
        let append = Append {
            session: self.name.clone(),
            mutation,
            layer,
            tokens: rows.tokens as u64,
            base_len: Some(self.len(layer)),
            allow_non_finite,
            shape: RowShape::default(),
            crc32c,
        };
        let (applied, attempts) = self.applied(Request::Chunked(append, chunks), deadline).await?;
        Ok(self.appended(layer, &applied, attempts))
    }

    /// Attends over a layer: `q` is `[heads, tokens, head_dim]`. Several calls may run at once.
    ///
    /// # Errors
    /// As [`Self::append`], and [`Reason::Combination`] for what sessions don't have.
    pub async fn attend(
        &self,
        layer: usize,
        q: Bytes,
        options: &QueryOptions,
    ) -> Result<SessionAttended, ClientError> {
        check_layer(layer, &self.spec)?;
        let queries = Queries::new(q, options, &self.spec, self.len(layer))?;
        let deadline = self.sessions.deadline(options.attend.timeout);
        self.attend_over(layer, &queries, options.at_len, deadline).await
    }

    async fn attend_over(
        &self,
        layer: usize,
        queries: &Queries<'_>,
        at_len: Option<u64>,
        deadline: Instant,
    ) -> Result<SessionAttended, ClientError> {
        let kernel_id = queries.kernel_id().to_owned();
        if queries.bytes() <= MOST_BYTES {
            let mut block = queries.whole();
            block.queries.at_len = at_len;
            let (rows, attempts) = self.ask(layer, block, deadline).await?;
            let BlockRows { context, lse, at_len, generation } = rows;
            return Ok(SessionAttended { context, lse, at_len, generation, kernel_id, attempts });
        }
        // The last block goes first: it tells over how many tokens the others are.
        let (mut view, mut most) = (at_len.map(|len| (len, None)), 0);
        let mut whole = queries.room()?;
        for tokens in queries.blocks().into_iter().rev() {
            let mut block = queries.block(tokens.clone(), view.map(|(len, _)| len))?;
            if let Some((_, Some(generation))) = view {
                block.queries.generation = Some(generation);
            }
            let (rows, attempts) = self.ask(layer, block, deadline).await?;
            view = Some((rows.at_len, Some(rows.generation)));
            most = most.max(attempts);
            whole.accept(&rows.of(tokens, self.spec.heads))?;
        }
        let (context, lse) = whole.finish()?;
        let (at_len, generation) = view.unwrap_or_default();
        let generation = generation.unwrap_or_default();
        Ok(SessionAttended { context, lse, at_len, generation, kernel_id, attempts: most })
    }

    /// Queries see what this side was told of, unless the session was cut since.
    fn expect(&self, layer: usize, block: &mut Block) {
        let ToldOfLayer { generation, len } = self.told.layer(layer);
        (block.queries.min_len, block.queries.min_len_generation) = (len, generation);
    }

    /// One message of queries.
    async fn ask(
        &self,
        layer: usize,
        mut block: Block,
        deadline: Instant,
    ) -> Result<(BlockRows, u32), ClientError> {
        self.expect(layer, &mut block);
        let queries = Some(block.queries.clone());
        let step = Step { session: self.name.clone(), layer, rows: None, queries };
        let outgoing = Outgoing { step, spec: Arc::clone(&self.spec), block: Some(block) };
        match self.run_one(&outgoing, deadline).await {
            Ok(Done { rows: Some(rows), attempts, .. }) => {
                self.told.saw(layer, rows.at_len, rows.generation);
                Ok((rows, attempts))
            }
            Ok(Done { attempts, .. }) => {
                Err(ClientError::after(attempts, &Error::new(Reason::ReplyInvalid, "no rows")))
            }
            Err(Failed { error, .. }) => Err(error),
        }
    }

    /// Appends rows and attends over everything including them: one message each way where they have room in one.
    ///
    /// # Errors
    /// As [`Self::append`] and [`Self::attend`]. With the outcome [`Outcome::Applied`] the rows are appended and only their queries have no
    /// answer.
    pub async fn step(
        &mut self,
        layer: usize,
        k: Bytes,
        v: Bytes,
        q: Bytes,
        options: &QueryOptions,
    ) -> Result<Stepped, ClientError> {
        let deadline = self.sessions.deadline(options.attend.timeout);
        if let Some(outgoing) = self.ready(layer, k.clone(), v.clone(), q.clone(), options, deadline).await? {
            let done = self.run_one(&outgoing, deadline).await;
            return self.stepped(&outgoing, done);
        }
        let spec = Arc::clone(&self.spec);
        // What is wrong with the queries is said before anything is appended.
        let tokens = Rows::new(k.clone(), v.clone(), &spec)?.tokens as u64;
        let queries = Queries::new(q, options, &spec, self.len(layer) + tokens)?;
        if queries.bytes() > MOST_BYTES {
            queries.block(0..1.min(queries.tokens()), Some(self.len(layer) + tokens))?;
        }
        let AttendOptions { allow_non_finite, timeout, .. } = options.attend;
        let appended = self.append_with(layer, k, v, &AppendOptions { allow_non_finite, timeout }).await?;
        let at_len = options.at_len.or(Some(appended.len));
        let attended = self.attend_over(layer, &queries, at_len, deadline).await;
        let applied = |error: ClientError| ClientError { outcome: Outcome::Applied, ..error };
        Ok(Stepped { appended, attended: attended.map_err(applied)? })
    }

    /// A step in one message, if it has room there; its mutation has begun.
    pub(super) async fn ready(
        &mut self,
        layer: usize,
        k: Bytes,
        v: Bytes,
        q: Bytes,
        options: &QueryOptions,
        deadline: Instant,
    ) -> Result<Option<Outgoing>, ClientError> {
        check_layer(layer, &self.spec)?;
        let spec = Arc::clone(&self.spec);
        let rows = Rows::new(k, v, &spec)?;
        let queries = Queries::new(q, options, &spec, self.len(layer) + rows.tokens as u64)?;
        if rows.bytes() > ONE_MESSAGE || queries.bytes() > MOST_BYTES {
            return Ok(None);
        }
        let mut block = queries.whole();
        self.expect(layer, &mut block);
        let mutation = self.begin_mutation(deadline).await?;
        let rows = self.step_rows(layer, rows, mutation, options.attend.allow_non_finite);
        let queries = Some(block.queries.clone());
        let step = Step { session: self.name.clone(), layer, rows: Some(rows), queries };
        Ok(Some(Outgoing { step, spec, block: Some(block) }))
    }

    /// What became of a step that was [`Self::ready`].
    pub(super) fn stepped(
        &mut self,
        step: &Outgoing,
        done: Result<Done, Failed>,
    ) -> Result<Stepped, ClientError> {
        let (appended, rows) = self.ended(step.step.layer, done)?;
        let kernel_id = step.block.as_ref().map_or("", |block| block.kernel_id).to_owned();
        let attempts = appended.attempts;
        let Some(BlockRows { context, lse, at_len, generation }) = rows else {
            return Err(ClientError::after(attempts, &Error::new(Reason::ReplyInvalid, "no rows")));
        };
        let attended = SessionAttended { context, lse, at_len, generation, kernel_id, attempts };
        Ok(Stepped { appended, attended })
    }

    /// Another session with the same tokens, which shares their memory until either changes; the caller is its writer.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn fork(&mut self, child: Option<&str>) -> Result<Self, ClientError> {
        let child = child.map(super::name).transpose()?;
        let (applied, attempts) = self.change(ChangeKind::Fork { child }).await?;
        let Some(child) = applied.child else {
            let error = Error::new(Reason::ReplyInvalid, "a fork without a child");
            return Err(ClientError::after(attempts, &error));
        };
        self.sessions.open_as(Open { name: Some(child), spec: None, write: true }).await
    }

    /// Cuts every layer that has more tokens to `len`.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn truncate(&mut self, len: u64) -> Result<(), ClientError> {
        let (applied, _) = self.change(ChangeKind::Truncate { len }).await?;
        self.told.cut(len, applied.generation);
        Ok(())
    }

    /// Ends all appends and cuts.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub async fn seal(&mut self) -> Result<(), ClientError> {
        self.change(ChangeKind::Seal).await.map(|_applied| ())
    }

    /// What it is and has, which this side knows from then on.
    ///
    /// # Errors
    /// What got lost.
    pub async fn describe(&mut self) -> Result<SessionDescription, ClientError> {
        let description = self.sessions.described(Ask::Describe(self.name.clone())).await?;
        self.told = Told::of(&description);
        Ok(description)
    }

    /// Ends it, and whether it had ended before.
    ///
    /// # Errors
    /// What got lost.
    pub async fn close(self) -> Result<bool, ClientError> {
        self.sessions.close(self.name.as_str()).await
    }

    // === mutations ===

    /// The number of the next mutation. From here on nobody knows what becomes of it, until it is known.
    async fn begin_mutation(&mut self, deadline: Instant) -> Result<Mutation, ClientError> {
        if self.writer_epoch.is_some() && self.unsettled {
            let open = Open { name: Some(self.name.clone()), spec: None, write: true };
            let description = self.sessions.described_by(Ask::Open(open), deadline).await?;
            self.settle(&description, true);
        }
        let Some(writer_epoch) = self.writer_epoch else {
            return Err(Error::new(
                Reason::Combination,
                "a session that was opened for reading, and a change",
            )
            .into());
        };
        self.unsettled = true;
        Ok(Mutation { writer_epoch, op_seq: self.next_op_seq })
    }

    /// A mutation was answered.
    fn end_mutation(&mut self) {
        self.next_op_seq += 1;
        self.unsettled = false;
    }

    /// A mutation was not.
    fn fail_mutation(&mut self, error: &ClientError) {
        match error.outcome {
            Outcome::NotExecuted => self.unsettled = false,
            Outcome::Applied => self.end_mutation(),
            Outcome::Unknown => {}
        }
    }

    async fn change(&mut self, kind: ChangeKind) -> Result<(Applied, u32), ClientError> {
        let deadline = self.sessions.deadline(None);
        let mutation = self.begin_mutation(deadline).await?;
        let change = Change { session: self.name.clone(), mutation, kind };
        self.applied(Request::One(Ask::Change(change)), deadline).await
    }

    /// The answer to a mutation that isn't a step, of which it has the number already.
    async fn applied(&mut self, request: Request, deadline: Instant) -> Result<(Applied, u32), ClientError> {
        let answered = self.sessions.exchange.insist(request, deadline).await;
        let outcome = answered.and_then(|(answers, attempts)| match <[Answer; 1]>::try_from(answers) {
            Ok([Answer::Applied(applied)]) => Ok((applied, attempts)),
            Ok([other]) => Err(unexpected(&other, attempts)),
            Err(_many) => {
                Err(ClientError::after(attempts, &Error::new(Reason::ReplyInvalid, "several answers")))
            }
        });
        match &outcome {
            Ok(_) => self.end_mutation(),
            Err(error) => self.fail_mutation(error),
        }
        outcome
    }

    async fn run_one(&self, outgoing: &Outgoing, deadline: Instant) -> Result<Done, Failed> {
        let done = run(&self.sessions.exchange, std::slice::from_ref(outgoing), deadline).await;
        done.into_iter().next().unwrap_or_else(|| {
            let error = Error::new(Reason::Internal, "a step was forgotten").into();
            Err(Failed { applied: None, error })
        })
    }

    fn step_rows(&self, layer: usize, rows: Rows, mutation: Mutation, allow_non_finite: bool) -> StepRows {
        let Rows { k, v, tokens, .. } = rows;
        StepRows {
            base_len: Some(self.len(layer)),
            allow_non_finite,
            ..StepRows::new(mutation, tokens, k, v)
        }
    }

    /// What became of a step with rows.
    fn ended(
        &mut self,
        layer: usize,
        done: Result<Done, Failed>,
    ) -> Result<(Appended, Option<BlockRows>), ClientError> {
        match done {
            Ok(Done { applied, rows, attempts }) => {
                self.end_mutation();
                Ok((self.appended(layer, &applied.unwrap_or_default(), attempts), rows))
            }
            Err(Failed { applied, error }) => {
                self.fail_mutation(&error);
                if let Some(applied) = applied {
                    self.appended(layer, &applied, error.attempts);
                }
                Err(error)
            }
        }
    }

    fn appended(&mut self, layer: usize, applied: &Applied, attempts: u32) -> Appended {
        let Applied { len, generation, replayed, .. } = *applied;
        self.told.saw(layer, len, generation);
        Appended { len, generation, replayed, attempts }
    }
}
