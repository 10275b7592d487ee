//! A client of a simulation: seeded requests about sessions of its own and of others, each answer of which is held against the model.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use attnd_client::session::{BatchStep, Session, Sessions, ShardHealth};
use attnd_client::{Client, ClientError, Outcome, Reason};
use attnd_wire::Surroundings;
use attnd_wire::session::SessionDescription;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::cluster::COORDINATOR_URL;
use super::model::{Model, Op, State};
use super::scene::{Known, Scene};
use crate::support::tokens::{RowShape, Token, query_options};

/// Time of a request, all attempts included.
pub(super) const PATIENCE: Duration = Duration::from_secs(4);
/// Time in which everything must work again once nothing is broken any more.
pub(super) const HEALED_WITHIN: Duration = Duration::from_secs(8);
const MOST_SESSIONS: usize = 3;
/// Tokens of a layer beyond which a session isn't appended to.
const MOST_TOKENS: usize = 700;

/// A session that this client writes.
pub(super) struct Held {
    pub(super) name: String,
    pub(super) session: Session,
    pub(super) model: Rc<RefCell<Model>>,
    /// Replicas that have what was acknowledged.
    acks: usize,
    /// What the coordinator has is what the model has.
    pub(super) is_settled: bool,
    /// It is to end, or has: nobody knows.
    is_closing: bool,
    /// It is gone, and may be.
    pub(super) is_lost: bool,
}

impl Held {
    pub(super) fn shape(&self) -> RowShape {
        self.model.borrow().shape
    }
}

/// One client.
pub(super) struct Writer {
    pub(super) scene: Rc<Scene>,
    pub(super) name: String,
    pub(super) surroundings: Surroundings,
    pub(super) sessions: Sessions,
    pub(super) random: SmallRng,
    held: Vec<Held>,
    opened: usize,
}

impl Writer {
    pub(super) fn new(scene: Rc<Scene>, surroundings: Surroundings, number: usize, seed: u64) -> Self {
        let client = Client::connect_in(surroundings.clone(), COORDINATOR_URL).unwrap();
        let random = SmallRng::seed_from_u64(seed ^ ((number as u64 + 1) << 32));
        let (name, sessions) = (format!("c{number}"), client.sessions().with_timeout(PATIENCE));
        Self { scene, name, surroundings, sessions, random, held: Vec::new(), opened: 0 }
    }

    /// Works until nothing is broken any more, and then sees to it that everything is there.
    pub(super) async fn run(mut self) {
        while !self.scene.is_calm() && !self.scene.history.has_violations() {
            self.act().await;
            self.held.retain(|held| !held.is_lost);
        }
        if !self.scene.history.has_violations() {
            self.finish().await;
        }
    }

    pub(super) fn chance(&mut self, percent: u32) -> bool {
        self.random.random_range(0..100) < percent
    }

    async fn act(&mut self) {
        let pause = self.random.random_range(0..80);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if self.held.is_empty() || (self.held.len() < MOST_SESSIONS && self.chance(8)) {
            return self.open().await;
        }
        let at = self.random.random_range(0..self.held.len());
        let mut held = self.held.swap_remove(at);
        if !held.is_settled {
            self.settle(&mut held).await;
        }
        if held.is_settled {
            match self.random.random_range(0..100_u32) {
                0..30 => self.step(&mut held).await,
                30..42 => self.append(&mut held).await,
                42..57 => self.attend(&mut held).await,
                57..64 => self.truncate(&mut held).await,
                64..69 => self.fork(&mut held).await,
                69..70 => self.mutate(&mut held, &Op::Seal).await,
                70..72 => self.close(&mut held).await,
                72..78 => self.look(),
                78..85 => self.send_twice(&mut held).await,
                85..95 => self.append_in_chunks(&mut held).await,
                _ => {
                    self.held.push(held);
                    return self.batch().await;
                }
            }
        }
        self.held.push(held);
    }

    // === what goes wrong, and may ===

    /// Whether an error is one that faults excuse.
    pub(super) fn judge(&self, held: Option<&mut Held>, what: &str, error: &ClientError) {
        let Some(held) = held else { return self.excuse(what, error, true) };
        let who = format!("{} {}", held.name, what);
        self.scene.history.tell(&self.name, format!("{who}: {:?} {error}", error.outcome));
        match error.outcome {
            Outcome::NotExecuted => self.scene.history.count("refused", 1),
            Outcome::Applied | Outcome::Unknown => self.scene.history.count("unknown", 1),
        }
        if error.reason == Reason::SessionLost {
            held.is_lost = true;
            if !held.model.borrow().may_be_lost {
                self.scene.history.violation(&self.name, format!("{who}, {} acks", held.acks));
            }
            self.scene.history.count("sessions lost", 1);
            return;
        }
        if error.reason == Reason::Session && held.is_closing {
            held.is_lost = true;
            return;
        }
        self.excuse(&who, error, false);
    }

    fn excuse(&self, what: &str, error: &ClientError, may_be_gone: bool) {
        let is_excused = match error.reason {
            Reason::Transport
            | Reason::Deadline
            | Reason::Cancelled
            | Reason::WorkerLost
            | Reason::Recovering
            | Reason::UnderReplicated
            | Reason::StreamTruncated
            | Reason::StreamIdle
            | Reason::NoWorkers
            | Reason::Placement
            | Reason::Checksum
            | Reason::Epoch
            | Reason::Draining
            | Reason::Overloaded => true,
            // Of the last replica that could be asked.
            Reason::Coverage => self.scene.repeats,
            Reason::Session | Reason::SessionLost => may_be_gone,
            _ => false,
        };
        if !is_excused {
            self.scene.history.violation(&self.name, format!("{what}: {error}"));
        }
    }

    fn hold(&self, what: &str, verdict: Result<(), String>) {
        if let Err(error) = verdict {
            self.scene.history.violation(&self.name, format!("{what}: {error}"));
        }
    }

    /// Becomes the writer anew, which says what became of what was under way.
    pub(super) async fn settle(&self, held: &mut Held) {
        match self.sessions.attach(&held.name).await {
            Ok(session) => {
                held.session = session;
                match held.session.describe().await {
                    Ok(description) => {
                        self.told(held, &description);
                        held.is_settled = true;
                    }
                    Err(error) => self.judge(Some(held), "describe", &error),
                }
            }
            Err(error) => self.judge(Some(held), "attach", &error),
        }
    }

    fn told(&self, held: &Held, description: &SessionDescription) {
        let tokens = &description.tokens;
        let what = format!("{} has {:?} in generation {}", held.name, tokens, description.generation);
        self.scene.history.tell(&self.name, &what);
        self.hold(&what, held.model.borrow_mut().settled(description));
    }

    /// What became of a mutation.
    pub(super) fn ended(&self, held: &mut Held, what: &str, ended: Result<Option<u64>, ClientError>) {
        let mut model = held.model.borrow_mut();
        match ended {
            Ok(len) => {
                model.applied();
                self.scene.history.count("applied", 1);
                self.scene.history.tell(&self.name, format!("{} {what}", held.name));
                let longest = model.now().longest() as u64;
                if len.is_some_and(|len| len > longest) {
                    self.hold(what, Err(format!("{len:?} tokens, expected {longest} at most")));
                }
            }
            Err(error) => {
                match error.outcome {
                    Outcome::Applied => model.applied(),
                    Outcome::NotExecuted => self.hold(what, model.refused()),
                    Outcome::Unknown => held.is_settled = false,
                }
                drop(model);
                self.judge(Some(held), what, &error);
            }
        }
    }

    // === requests ===

    async fn open(&mut self) {
        let (heads, kv_heads) = [(4, 2), (2, 1), (3, 3)][self.random.random_range(0..3)];
        let shape = RowShape {
            layers: self.random.random_range(1..=2),
            heads,
            kv_heads,
            head_dim: [4, 8][self.random.random_range(0..2)],
            value_dim: [4, 6][self.random.random_range(0..2)],
        };
        let mut open = shape.open();
        let (replicas, acks) = [(2, 2), (2, 2), (2, 1), (3, 2), (1, 1)][self.random.random_range(0..5)];
        // A worker that leaves needs somebody to have what it holds.
        let replicas = self.scene.most_replicas.min(replicas);
        (open.spec.replicas, open.spec.acks) = (replicas, acks);
        self.opened += 1;
        let name = format!("{}-{}", self.name, self.opened);
        open.name = Some(name.clone());
        let losses = self.scene.losses();
        match self.sessions.open(open).await {
            Ok(session) => {
                self.scene.history.count("sessions opened", 1);
                self.scene
                    .history
                    .tell(&self.name, format!("{name} is open, {replicas} replicas, {acks} acks"));
                self.keep(name, session, Model::new(shape, State::empty(shape.layers)), acks, losses);
            }
            Err(error) => self.judge(None, &format!("open {name}"), &error),
        }
    }

    /// Has a session that came about since so many losses.
    fn keep(&mut self, name: String, session: Session, mut model: Model, acks: usize, losses: u64) {
        model.may_be_lost |= acks < 2 && self.scene.may_have_lost_since(losses);
        let model = Rc::new(RefCell::new(model));
        self.scene.open.borrow_mut().push(Known { name: name.clone(), model: Rc::clone(&model), acks });
        let (is_settled, is_closing, is_lost) = (true, false, false);
        self.held.push(Held { name, session, model, acks, is_settled, is_closing, is_lost });
    }

    /// Ends a session.
    async fn close(&mut self, held: &mut Held) {
        held.is_closing = true;
        match self.sessions.close(&held.name).await {
            Ok(already) => {
                self.scene.history.tell(&self.name, format!("{} is closed, already: {already}", held.name));
                self.scene.history.count("sessions closed", 1);
                held.is_lost = true;
            }
            Err(error) => {
                held.is_settled = false;
                self.judge(Some(held), "close", &error);
            }
        }
        if held.is_lost {
            self.scene.open.borrow_mut().retain(|known| known.name != held.name);
        }
    }

    /// A layer, and tokens for it; none where it takes no more.
    pub(super) fn tokens_for(&mut self, held: &Held) -> Option<(usize, Vec<Token>)> {
        let layer = self.random.random_range(0..held.shape().layers);
        let model = held.model.borrow();
        let state = model.now();
        if state.sealed || state.layers[layer].len() > MOST_TOKENS {
            return None;
        }
        let most = if self.chance(5) { 300 } else { 6 };
        let n = self.random.random_range(1..=most);
        Some((layer, self.scene.new_tokens(n)))
    }

    async fn step(&mut self, held: &mut Held) {
        let Some((layer, tokens)) = self.tokens_for(held) else { return self.attend(held).await };
        let shape = held.shape();
        let ([k, v], q) = (shape.keys_and_values(layer, &tokens), shape.queries(layer, &tokens));
        let op = Op::Append { layer, tokens: tokens.clone() };
        held.model.borrow_mut().begin(&op);
        let stepped = held.session.step(layer, k, v, q, &query_options(None)).await;
        let what = format!("step of {} in layer {layer}", tokens.len());
        match stepped {
            Ok(stepped) => {
                self.ended(held, &what, Ok(Some(stepped.appended.len)));
                let mut model = held.model.borrow_mut();
                let floor = model.floor(layer);
                let at_len = Some(stepped.appended.len);
                let verdict = model.attended(layer, &tokens, floor, at_len, &stepped.attended);
                let history = &self.scene.history;
                history.count("attended", 1);
                history.count("sent again", u64::from(stepped.attended.attempts > 1));
                history.count("replayed", u64::from(stepped.appended.replayed));
                self.hold(&format!("{} {what}", held.name), verdict);
            }
            Err(error) => self.ended(held, &what, Err(error)),
        }
    }

    async fn append(&mut self, held: &mut Held) {
        let Some((layer, tokens)) = self.tokens_for(held) else { return };
        self.mutate(held, &Op::Append { layer, tokens }).await;
    }

    async fn truncate(&mut self, held: &mut Held) {
        let longest = held.model.borrow().now().longest();
        if longest == 0 || held.model.borrow().now().sealed {
            return;
        }
        let len = self.random.random_range(longest.saturating_sub(9)..=longest);
        self.mutate(held, &Op::Truncate { len }).await;
    }

    async fn mutate(&mut self, held: &mut Held, op: &Op) {
        held.model.borrow_mut().begin(op);
        let (what, ended) = match op {
            Op::Append { layer, tokens } => {
                let [k, v] = held.shape().keys_and_values(*layer, tokens);
                let appended = held.session.append(*layer, k, v).await;
                let len = appended.map(|appended| Some(appended.len));
                (format!("append of {} to layer {layer}", tokens.len()), len)
            }
            Op::Truncate { len } => {
                (format!("cut to {len}"), held.session.truncate(*len as u64).await.map(|()| None))
            }
            Op::Seal => ("seal".to_owned(), held.session.seal().await.map(|()| None)),
            Op::Fork => unreachable!("forks have children"),
        };
        self.ended(held, &what, ended);
    }

    async fn fork(&mut self, held: &mut Held) {
        if self.held.len() + 1 >= MOST_SESSIONS {
            return;
        }
        self.opened += 1;
        let name = format!("{}-{}", self.name, self.opened);
        held.model.borrow_mut().begin(&Op::Fork);
        let losses = self.scene.losses();
        match held.session.fork(Some(&name)).await {
            Ok(child) => {
                self.ended(held, &format!("fork {name}"), Ok(None));
                self.scene.history.count("sessions forked", 1);
                let mut model = Model::new(held.shape(), held.model.borrow().now().forked());
                model.may_be_lost = held.model.borrow().may_be_lost;
                self.keep(name, child, model, held.acks, losses);
            }
            Err(error) => {
                // Of the child nothing is known, and its parent is as it was.
                let error = ClientError { outcome: Outcome::Unknown, ..error };
                self.ended(held, &format!("fork {name}"), Err(error));
            }
        }
    }

    async fn attend(&mut self, held: &mut Held) {
        let shape = held.shape();
        let layer = self.random.random_range(0..shape.layers);
        let len = held.model.borrow().now().layers[layer].len();
        if len == 0 {
            return;
        }
        let at_len = self.chance(30).then(|| self.random.random_range(1..=len as u64));
        self.attend_over(held, layer, at_len).await;
    }

    /// Whether there was an answer.
    async fn attend_over(&mut self, held: &mut Held, layer: usize, at_len: Option<u64>) -> bool {
        let shape = held.shape();
        let floor = held.model.borrow().floor(layer);
        let most = at_len.map_or(held.model.borrow().now().layers[layer].len(), |len| len as usize);
        let n = self.random.random_range(1..=most.min(3));
        let tokens = self.scene.new_tokens(n);
        let q = shape.queries(layer, &tokens);
        let attended = held.session.attend(layer, q, &query_options(at_len)).await;
        let what = format!("{} attend layer {layer} at {at_len:?}", held.name);
        match attended {
            Ok(answer) => {
                self.scene.history.tell(&self.name, format!("{what}: {}", answer.at_len));
                let verdict = held.model.borrow_mut().attended(layer, &tokens, floor, at_len, &answer);
                self.scene.history.count("attended", 1);
                self.hold(&what, verdict);
                true
            }
            Err(error) => {
                self.judge(Some(held), &what, &error);
                false
            }
        }
    }

    /// One message for all sessions that it has.
    async fn batch(&mut self) {
        let options = query_options(None);
        let mut all = std::mem::take(&mut self.held);
        let mut steps = Vec::new();
        for held in all.iter().map(|held| (held.is_settled, self.tokens_for(held), held.shape())) {
            let (true, Some((layer, tokens)), shape) = held else {
                steps.push(None);
                continue;
            };
            steps.push(Some((layer, tokens, shape)));
        }
        let mut batch = Vec::new();
        for (held, step) in all.iter_mut().zip(&steps) {
            let Some((layer, tokens, shape)) = step else { continue };
            held.model.borrow_mut().begin(&Op::Append { layer: *layer, tokens: tokens.clone() });
            let ([k, v], q) = (shape.keys_and_values(*layer, tokens), shape.queries(*layer, tokens));
            batch.push(BatchStep { session: &mut held.session, layer: *layer, k, v, q, options: &options });
        }
        let stepped = self.sessions.step_batch(&mut batch).await;
        drop(batch);
        let sent = all.iter_mut().zip(&steps).filter_map(|(held, step)| Some((held, step.as_ref()?)));
        for ((held, (layer, tokens, _)), stepped) in sent.zip(stepped) {
            let what = format!("batched step of {} in layer {layer}", tokens.len());
            match stepped {
                Ok(stepped) => {
                    self.ended(held, &what, Ok(Some(stepped.appended.len)));
                    let mut model = held.model.borrow_mut();
                    let floor = model.floor(*layer);
                    let at_len = Some(stepped.appended.len);
                    let verdict = model.attended(*layer, tokens, floor, at_len, &stepped.attended);
                    self.scene.history.count("attended", 1);
                    self.hold(&format!("{} {what}", held.name), verdict);
                }
                Err(error) => self.ended(held, &what, Err(error)),
            }
        }
        self.held = all;
    }

    /// Looks at a session of anybody, which others may change meanwhile.
    fn look(&mut self) {
        // In a task of its own, so that this client goes on.
        let open = self.scene.open.borrow();
        if open.is_empty() {
            return;
        }
        let Known { name, model, .. } = open[self.random.random_range(0..open.len())].clone();
        let (sessions, scene, who) = (self.sessions.clone(), Rc::clone(&self.scene), self.name.clone());
        let layer = self.random.random_range(0..model.borrow().shape.layers);
        tokio::task::spawn_local(async move {
            let (shape, floor) = (model.borrow().shape, model.borrow().floor(layer));
            if model.borrow().now().layers[layer].is_empty() {
                return;
            }
            let Ok(session) = sessions.read(&name).await else { return };
            let asked = model.borrow().now().clone();
            // Of one that is lost nobody knows what it had.
            let is_lost =
                |told: &SessionDescription| told.shards.iter().any(|shard| shard.health == ShardHealth::Lost);
            if let Ok(description) = sessions.describe(&name).await
                && !(is_lost(&description) && model.borrow().may_be_lost)
                && let Err(error) = model.borrow().described(&asked, &description)
            {
                scene.history.violation(&who, format!("looks at {name}: {error}"));
            }
            let tokens = scene.new_tokens(1);
            let q = shape.queries(layer, &tokens);
            if let Ok(answer) = session.attend(layer, q, &query_options(None)).await {
                scene.history.tell(&who, format!("looks at {name}, layer {layer}: {}", answer.at_len));
                scene.history.count("attended", 1);
                let verdict = model.borrow_mut().attended(layer, &tokens, floor, None, &answer);
                if let Err(error) = verdict {
                    scene.history.violation(&who, format!("looks at {name}, layer {layer}: {error}"));
                }
            }
        });
    }

    // === the end ===

    /// Everything that was acknowledged is there and can be attended over.
    async fn finish(&mut self) {
        let begun = self.scene.history.now();
        for mut held in std::mem::take(&mut self.held) {
            let is_late = || self.scene.history.now() > begun + HEALED_WITHIN;
            while !held.is_settled && !held.is_lost && !is_late() {
                self.settle(&mut held).await;
            }
            let layers = held.model.borrow().now().layers.iter().map(Vec::len).collect::<Vec<_>>();
            for (layer, _) in layers.into_iter().enumerate().filter(|(_, len)| *len > 0) {
                while !held.is_lost && !self.attend_over(&mut held, layer, None).await {
                    if self.scene.history.now() > begun + HEALED_WITHIN {
                        self.scene.history.violation(&self.name, format!("{} doesn't heal", held.name));
                        return;
                    }
                }
            }
            if !held.is_lost {
                self.append_at_last(&mut held, begun + HEALED_WITHIN).await;
            }
            let is_whole = held.is_settled && !held.model.borrow().is_open();
            if !is_whole && !held.is_lost {
                self.scene.history.violation(&self.name, format!("{} doesn't settle", held.name));
            }
        }
    }

    /// Appends a token, which must be taken by then.
    async fn append_at_last(&mut self, held: &mut Held, by: Duration) {
        // Not by how much has been appended before: a session that is long takes it too.
        while !held.is_lost && !held.model.borrow().now().sealed {
            if !held.is_settled {
                self.settle(held).await;
            } else {
                let before = self.scene.history.counts().of("applied");
                let op = Op::Append { layer: 0, tokens: self.scene.new_tokens(1) };
                self.mutate(held, &op).await;
                if self.scene.history.counts().of("applied") > before {
                    return;
                }
            }
            if self.scene.history.now() > by {
                self.scene.history.violation(&self.name, format!("{} takes nothing any more", held.name));
                return;
            }
        }
    }
}
