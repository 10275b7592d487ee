//! Sessions: keys and values that stay on the workers, so that a step sends its own rows and queries and nothing else.
//!
//! ```no_run
//! # async fn example(k: bytes::Bytes, v: bytes::Bytes, q: bytes::Bytes) -> Result<(), Box<dyn std::error::Error>> {
//! use attnd_client::{Causal, Client, Dtype};
//! use attnd_client::session::{OpenOptions, QueryOptions};
//!
//! let sessions = Client::connect("http://127.0.0.1:7400")?.sessions();
//! let mut session = sessions.open(OpenOptions::new(32, 32, 8, 128, Dtype::F32)).await?;
//! let mut options = QueryOptions::default();
//! options.attend.causal = Causal::BottomRight;
//! // K and V of some tokens, [8, tokens, 128], and their queries, [32, tokens, 128].
//! let stepped = session.step(0, k, v, q, &options).await?;
//! assert_eq!(stepped.attended.at_len, session.len(0));
//! # Ok(())
//! # }
//! ```
//!
//! All requests of a [`Sessions`] share one stream, which stays open and is opened again when it was lost. A request is sent again, under
//! the number that it had, where its answer got lost: the coordinator then answers as it did, or does what it hadn't done. So an `Ok` was
//! done once, and an error says by its outcome what is known. Whoever opens a session is its writer from then on, and who was before is
//! refused.

use std::sync::Arc;
use std::time::Duration;

use attnd_kernel::shape::MAX_KEYS;
use attnd_kernel::{Dtype, Storage};
use attnd_plan::session::spec::DEFAULT_TTL;
use attnd_plan::session::{SessionName, SessionSpec};
use attnd_wire::deadline::MAX_TIMEOUT;
use attnd_wire::session::{Answer, Ask, DEFAULT_REQUEST_TIMEOUT, Open, SessionDescription};
use attnd_wire::{Error, Reason};
use tokio::time::Instant;

use self::exchange::{Exchange, Request};
use crate::client::Client;
use crate::error::ClientError;

mod exchange;
mod handle;
mod queries;
mod rows;
mod steps;
mod told;

pub use self::handle::{AppendOptions, Appended, Session, Stepped};
pub use self::queries::{QueryOptions, SessionAttended};
pub use self::steps::BatchStep;
pub use attnd_wire::session::{ShardDescription, ShardHealth};

/// The sessions of one coordinator. Clones share one stream.
#[derive(Clone, Debug)]
pub struct Sessions {
    exchange: Arc<Exchange>,
    timeout: Duration,
}

/// A session to open.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Its name, 1 to 64 of `[A-Za-z0-9._-]`; `None`: one that nobody has.
    pub name: Option<String>,
    /// What it is. One of that name that exists must be equal.
    pub spec: SessionSpec,
}

impl OpenOptions {
    /// A session of these dimensions, values as long as keys, stored as it is sent, on one worker each.
    pub fn new(layers: usize, heads: usize, kv_heads: usize, head_dim: usize, dtype: Dtype) -> Self {
        let spec = SessionSpec {
            layers,
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            dtype,
            storage: Storage::from(dtype),
            value_is_key_prefix: false,
            replicas: 1,
            acks: 1,
            ttl: DEFAULT_TTL,
            max_tokens: MAX_KEYS,
            allow_same_host: false,
        };
        Self { name: None, spec }
    }
}

impl Client {
    /// The sessions of this coordinator. Nothing is sent yet.
    pub fn sessions(&self) -> Sessions {
        Sessions {
            exchange: Arc::new(Exchange::new(self.channel(), self.surroundings().clone())),
            timeout: DEFAULT_REQUEST_TIMEOUT,
        }
    }
}

impl Sessions {
    /// The same, each request of which has so much time, all attempts included, at most an hour. 30 s unless it is said.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout: timeout.min(MAX_TIMEOUT), ..self }
    }

    /// Begins a session, or goes on with the one of that name, as its writer.
    ///
    /// # Errors
    /// What makes no sense, what the cluster refused, or what got lost: all by their reason.
    pub async fn open(&self, options: OpenOptions) -> Result<Session, ClientError> {
        let OpenOptions { name, spec } = options;
        spec.check().map_err(Error::from)?;
        let name = match name {
            Some(name) => self::name(&name)?,
            // Made here, so that a request which comes twice makes one session.
            None => self::name(&self.exchange.made_name())?,
        };
        self.open_as(Open { name: Some(name), spec: Some(spec), write: true }).await
    }

    /// Goes on with a session as its writer.
    ///
    /// # Errors
    /// As [`Self::open`]; there is none of that name.
    pub async fn attach(&self, name: &str) -> Result<Session, ClientError> {
        self.open_as(Open { name: Some(self::name(name)?), spec: None, write: true }).await
    }

    /// Looks at a session that somebody else may write.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub async fn read(&self, name: &str) -> Result<Session, ClientError> {
        self.open_as(Open { name: Some(self::name(name)?), spec: None, write: false }).await
    }

    async fn open_as(&self, open: Open) -> Result<Session, ClientError> {
        let write = open.write;
        let description = self.described(Ask::Open(open)).await?;
        Ok(Session::new(self.clone(), &description, write))
    }

    /// What a session is and has.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub async fn describe(&self, name: &str) -> Result<SessionDescription, ClientError> {
        self.described(Ask::Describe(self::name(name)?)).await
    }

    /// The names of all sessions.
    ///
    /// # Errors
    /// What got lost.
    pub async fn list(&self) -> Result<Vec<SessionName>, ClientError> {
        let (answers, attempts) = self.insist(Request::One(Ask::List)).await?;
        let mut names = Vec::new();
        for answer in answers {
            match answer {
                Answer::Names(some) => names.extend(some),
                other => return Err(unexpected(&other, attempts)),
            }
        }
        Ok(names)
    }

    /// Ends a session, and whether it had ended before.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub async fn close(&self, name: &str) -> Result<bool, ClientError> {
        match self.one(Request::One(Ask::Close(self::name(name)?))).await? {
            (Answer::Closed { already }, _) => Ok(already),
            (other, attempts) => Err(unexpected(&other, attempts)),
        }
    }

    async fn described(&self, ask: Ask) -> Result<SessionDescription, ClientError> {
        self.described_by(ask, self.deadline(None)).await
    }

    async fn described_by(&self, ask: Ask, deadline: Instant) -> Result<SessionDescription, ClientError> {
        match self.one_by(Request::One(ask), deadline).await? {
            (Answer::Description(description), _) => Ok(*description),
            (other, attempts) => Err(unexpected(&other, attempts)),
        }
    }

    /// The only answer to a request that may come twice, and how often it did.
    async fn one(&self, request: Request) -> Result<(Answer, u32), ClientError> {
        self.one_by(request, self.deadline(None)).await
    }

    async fn one_by(&self, request: Request, deadline: Instant) -> Result<(Answer, u32), ClientError> {
        let (answers, attempts) = self.exchange.insist(request, deadline).await?;
        match <[Answer; 1]>::try_from(answers) {
            Ok([answer]) => Ok((answer, attempts)),
            Err(answers) => {
                let error =
                    Error::new(Reason::ReplyInvalid, format!("{} answers, expected one", answers.len()));
                Err(ClientError::after(attempts, &error))
            }
        }
    }

    async fn insist(&self, request: Request) -> Result<(Vec<Answer>, u32), ClientError> {
        self.exchange.insist(request, self.deadline(None)).await
    }

    fn deadline(&self, timeout: Option<Duration>) -> Instant {
        Instant::now() + timeout.unwrap_or(self.timeout).min(MAX_TIMEOUT)
    }
}

fn name(text: &str) -> Result<SessionName, ClientError> {
    Ok(SessionName::new(text).map_err(Error::from)?)
}

fn unexpected(answer: &Answer, attempts: u32) -> ClientError {
    let what = match answer {
        Answer::Description(_) => "a description",
        Answer::Steps(_) => "results of steps",
        Answer::Applied(_) => "a mutation",
        Answer::Names(_) => "names",
        Answer::Closed { .. } => "the end of a session",
        Answer::Failed(_) => "a failure",
    };
    ClientError::after(attempts, &Error::new(Reason::ReplyInvalid, format!("{what}, which wasn't asked for")))
}

#[cfg(test)]
mod tests;
