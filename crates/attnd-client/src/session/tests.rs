//! The client against a coordinator that keeps lengths and numbers, and loses what it is told to lose.

use std::sync::atomic::Ordering;
use std::time::Duration;

use attnd_kernel::{Causal, Dtype};
use attnd_plan::session::SessionSpec;
use attnd_wire::{Error, Outcome, Reason};
use bytes::Bytes;

use self::fake::{Fake, Fault};
use super::*;

mod fake;

/// Two kv heads of four elements in keys and two in values, eight heads, three layers.
pub(super) fn spec() -> SessionSpec {
    SessionSpec { value_dim: 2, ..OpenOptions::new(3, 8, 2, 4, Dtype::F32).spec }
}

fn options() -> OpenOptions {
    OpenOptions { name: Some("a".to_owned()), spec: spec() }
}

/// K and V of so many tokens.
fn rows(tokens: usize) -> (Bytes, Bytes) {
    (vec![1; 2 * tokens * 16].into(), vec![2; 2 * tokens * 8].into())
}

/// Queries that tell their place.
fn q(tokens: usize) -> Bytes {
    let place = |i: usize| [i as f32, -(i as f32), 0.5, 0.25];
    (0..8 * tokens).flat_map(place).flat_map(f32::to_le_bytes).collect::<Vec<_>>().into()
}

/// What the fake answers to [`q`].
fn context(tokens: usize) -> Vec<f32> {
    (0..8 * tokens).flat_map(|i| [i as f32, -(i as f32)]).collect()
}

async fn session(fake: &Fake) -> Session {
    fake.sessions().open(options()).await.unwrap()
}

async fn append(session: &mut Session, layer: usize, tokens: usize) -> Result<Appended, ClientError> {
    let (k, v) = rows(tokens);
    session.append(layer, k, v).await
}

async fn step(session: &mut Session, layer: usize, tokens: usize) -> Result<Stepped, ClientError> {
    let (k, v) = rows(tokens);
    session.step(layer, k, v, q(tokens), &QueryOptions::default()).await
}

#[tokio::test]
async fn what_nobody_waits_for_is_given_up() {
    let fake = Fake::start().await;
    let session = session(&fake).await;
    fake.next([Fault::Silent]);
    let options = QueryOptions::default();
    let read = session.attend(0, q(1), &options);
    assert!(tokio::time::timeout(Duration::from_millis(200), read).await.is_err());
    let told = async {
        while fake.given_up().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), told).await.expect("it is told so");
    assert_eq!(fake.given_up(), fake.numbers()[1..]);
    assert!(!session.close().await.unwrap());
    assert_eq!((fake.given_up().len(), fake.streams()), (1, 1), "what is answered isn't given up");
}

#[tokio::test]
async fn a_session_lives_on_one_stream() {
    let fake = Fake::start().await;
    let sessions = fake.sessions();
    let mut session = sessions.open(options()).await.unwrap();
    assert_eq!((session.name().as_str(), session.len(0), session.next_op_seq()), ("a", 0, 1));
    let appended = append(&mut session, 0, 5).await.unwrap();
    assert_eq!(appended, Appended { len: 5, generation: 1, replayed: false, attempts: 1 });
    let stepped = step(&mut session, 0, 2).await.unwrap();
    assert_eq!((stepped.appended.len, stepped.attended.at_len), (7, 7));
    assert_eq!(stepped.attended.context, context(2));
    let at = QueryOptions { at_len: Some(3), ..QueryOptions::default() };
    let attended = session.attend(0, q(3), &at).await.unwrap();
    assert_eq!((attended.at_len, attended.kernel_id.as_str(), attended.attempts), (3, "c1-f32", 1));
    assert_eq!((attended.context, attended.lse), (context(3), vec![3.0; 24]));
    let mut child = session.fork(Some("b")).await.unwrap();
    append(&mut child, 1, 1).await.unwrap();
    session.truncate(4).await.unwrap();
    assert_eq!((session.len(0), session.generation(), session.next_op_seq()), (4, 2, 5));
    session.seal().await.unwrap();
    let names: Vec<_> = sessions.list().await.unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(sessions.describe("b").await.unwrap().tokens, [7, 1, 0]);
    assert!(!session.close().await.unwrap());
    assert!(sessions.close("a").await.unwrap());
    assert_eq!(fake.streams(), 1);
    let numbers = fake.numbers();
    assert!(numbers.is_sorted() && numbers[0] == 1, "{numbers:?}");
}

#[tokio::test]
async fn a_reader_goes_on_behind_a_cut_of_somebody_else() {
    let fake = Fake::start().await;
    let mut writer = session(&fake).await;
    for layer in [0, 1] {
        append(&mut writer, layer, 7).await.unwrap();
    }
    let reader = fake.sessions().read("a").await.unwrap();
    let options = QueryOptions::default();
    assert_eq!(reader.attend(0, q(1), &options).await.unwrap().at_len, 7);
    writer.truncate(4).await.unwrap();
    append(&mut writer, 0, 1).await.unwrap();
    assert_eq!((reader.len(0), reader.generation()), (7, 1), "nobody has told it");
    let attended = reader.attend(0, q(1), &options).await.unwrap();
    assert_eq!((attended.at_len, attended.generation), (5, 2));
    assert_eq!((reader.len(0), reader.generation()), (5, 2));
    // Of the other layer it still knows what was before.
    assert_eq!(reader.len(1), 7);
    assert_eq!(reader.attend(1, q(1), &options).await.unwrap().at_len, 4);
    // And where there is less than it was told of since, that isn't the session it knows.
    fake.cut("a", 3);
    let behind = reader.attend(0, q(1), &options).await.unwrap_err();
    assert_eq!(behind.reason, Reason::AtLen, "{behind}");
}

#[tokio::test]
async fn each_answer_finds_its_question_in_any_order() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    append(&mut session, 0, 9).await.unwrap();
    fake.next([Fault::Late]);
    let (one, two) = (QueryOptions { at_len: Some(1), ..Default::default() }, QueryOptions::default());
    let (first, second) = tokio::join!(session.attend(0, q(1), &one), session.attend(0, q(2), &two));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!((first.at_len, second.at_len), (1, 9));
    assert_eq!((first.context, second.context), (context(1), context(2)));
    assert_eq!(fake.answered(), [1, 2, 4, 3]);
}

#[tokio::test]
async fn an_append_that_is_cut_in_the_middle_is_sent_again_under_its_number() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    fake.next([Fault::CutAtChunk(2), Fault::None]);
    let appended = append(&mut session, 1, 50_000).await.unwrap();
    assert_eq!(appended, Appended { len: 50_000, generation: 1, replayed: false, attempts: 2 });
    assert_eq!((fake.streams(), session.next_op_seq()), (2, 2));
    // Whole, each byte in its place.
    let (k, v) = rows(50_000);
    assert!(fake.last_rows() == (k.to_vec(), v.to_vec()));
}

#[tokio::test]
async fn an_append_whose_answer_got_lost_is_done_once() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    for tokens in [3, 50_000] {
        fake.next([Fault::Lose, Fault::None]);
        let before = session.len(2);
        let appended = append(&mut session, 2, tokens).await.unwrap();
        assert_eq!((appended.len, appended.replayed, appended.attempts), (before + tokens as u64, true, 2));
    }
    fake.next([Fault::Lose, Fault::None]);
    let stepped = step(&mut session, 2, 4).await.unwrap();
    assert_eq!((stepped.appended.len, stepped.appended.replayed), (50_007, true));
    assert_eq!(stepped.attended.context, context(4));
    fake.next([Fault::Lose, Fault::None]);
    session.truncate(10).await.unwrap();
    assert_eq!((session.generation(), session.next_op_seq()), (2, 5));
    assert_eq!(fake.tokens("a"), [0, 0, 10]);
}

#[tokio::test]
async fn refusals_come_as_they_were_said_and_take_no_number() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    for (error, attempts) in [
        (Error::new(Reason::KvBudget, "need 33554432, free 1048576"), 1),
        (Error::new(Reason::WriterFenced, "writer_epoch 3 < 4"), 1),
        (Error::new(Reason::NonFinite, "k[h=2,pos=17,i=5] NaN"), 1),
    ] {
        fake.next([Fault::Fail(error.clone())]);
        let refused = append(&mut session, 0, 1).await.unwrap_err();
        assert_eq!((refused.reason, refused.outcome), (error.reason, Outcome::NotExecuted));
        assert_eq!((refused.message, refused.attempts), (error.message(), attempts));
        fake.next([Fault::Fail(error.clone())]);
        let refused = session.truncate(0).await.unwrap_err();
        assert_eq!(refused.reason, error.reason);
        fake.next([Fault::Fail(error.clone())]);
        assert_eq!(append(&mut session, 0, 50_000).await.unwrap_err().reason, error.reason);
    }
    assert_eq!(session.next_op_seq(), 1);
    // What passes is waited for.
    fake.next([Fault::Fail(Error::new(Reason::Recovering, "")), Fault::None]);
    assert_eq!(append(&mut session, 0, 1).await.unwrap().attempts, 2);
    assert_eq!(fake.sessions().attach("nobody").await.unwrap_err().message, "SESSION");
    let error = fake.sessions().attach("a/b").await.unwrap_err();
    assert_eq!((error.message.as_str(), error.attempts), ("SESSION_ID: 1..64 of [A-Za-z0-9._-]", 0));
    assert_eq!(append(&mut session, 3, 1).await.unwrap_err().message, "SHAPE_LIMIT: layer 3 of 3");
    let mut reader = fake.sessions().read("a").await.unwrap();
    assert_eq!(append(&mut reader, 0, 1).await.unwrap_err().reason, Reason::Combination);
    assert_eq!(reader.attend(0, q(1), &QueryOptions::default()).await.unwrap().at_len, 1);
}

#[tokio::test]
async fn a_refusal_after_a_loss_leaves_open_what_became_of_the_first_attempt() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    fake.next([Fault::Lose, Fault::Fail(Error::new(Reason::Sealed, ""))]);
    let error = append(&mut session, 0, 1).await.unwrap_err();
    assert_eq!((error.reason, error.outcome, error.attempts), (Reason::Sealed, Outcome::Unknown, 2));
    // The next mutation makes sure first.
    assert_eq!(append(&mut session, 0, 1).await.unwrap().len, 2);
    assert_eq!((session.next_op_seq(), fake.writer_epoch("a")), (3, 2));
}

#[tokio::test]
async fn rows_are_appended_where_only_their_queries_failed() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    fake.next([Fault::FailQueries(Error::new(Reason::ScoreOverflow, "head 0 row 3"))]);
    let error = step(&mut session, 0, 5).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::ScoreOverflow, Outcome::Applied));
    assert_eq!((session.len(0), session.next_op_seq()), (5, 2));
    assert_eq!(append(&mut session, 0, 1).await.unwrap().len, 6);
}

#[tokio::test]
async fn a_mutation_whose_time_is_over_may_have_been_done_and_the_next_one_makes_sure() {
    let fake = Fake::start().await;
    for fault in [Fault::Swallow, Fault::Silent] {
        let done = u64::from(matches!(fault, Fault::Silent));
        let sessions = fake.sessions().with_timeout(Duration::from_millis(200));
        let name = Some(format!("time-{done}"));
        let mut session = sessions.open(OpenOptions { name, ..options() }).await.unwrap();
        fake.next([fault]);
        let error = append(&mut session, 0, 1).await.unwrap_err();
        assert_eq!((error.reason, error.outcome), (Reason::Deadline, Outcome::Unknown));
        assert_eq!(append(&mut session, 0, 1).await.unwrap().len, 1 + done);
        assert_eq!(session.next_op_seq(), 2 + done);
        assert_eq!(fake.writer_epoch(session.name().as_str()), 2);
    }
}

#[tokio::test]
async fn a_batch_is_one_message_and_only_what_failed_is_sent_again() {
    let fake = Fake::start().await;
    let sessions = fake.sessions();
    let mut all = Vec::new();
    for at in 0..5 {
        all.push(sessions.open(OpenOptions { name: Some(format!("s{at}")), ..options() }).await.unwrap());
    }
    let of_others = Fake::start().await;
    let mut stranger = session(&of_others).await;
    let attend = QueryOptions::default();
    let before = fake.numbers().len();
    fake.next([Fault::FailStep(3, Error::new(Reason::Recovering, "")), Fault::None]);
    let batch = |session| {
        let (k, v) = rows(2);
        BatchStep { session, layer: 1, k, v, q: q(2), options: &attend }
    };
    let mut steps: Vec<_> = all.iter_mut().map(batch).collect();
    steps.push(batch(&mut stranger));
    steps[1].q = Bytes::from_static(&[0; 3]);
    let results = sessions.step_batch(&mut steps).await;
    let attempts = results.iter().map(|result| result.as_ref().map(|stepped| stepped.appended.attempts));
    let attempts: Vec<_> = attempts.map(|result| result.map_err(|error| error.reason)).collect();
    let (length, elsewhere) = (Err(Reason::PayloadLength), Err(Reason::Combination));
    assert_eq!(attempts, [Ok(1), length, Ok(1), Ok(1), Ok(2), elsewhere]);
    assert_eq!(fake.steps_of_messages(), [4, 1]);
    assert_eq!(fake.numbers().len() - before, 2);
    for (session, len) in all.iter().zip([2, 0, 2, 2, 2]) {
        assert_eq!(session.len(1), len);
    }
}

#[tokio::test]
async fn long_chunks_of_queries_are_cut_and_put_together() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    let tokens = 50_000;
    let (k, v) = rows(tokens);
    let mut attend = QueryOptions::default();
    attend.attend.causal = Causal::BottomRight;
    let stepped = session.step(0, k, v, q(tokens), &attend).await.unwrap();
    assert_eq!((stepped.appended.len, stepped.attended.at_len), (50_000, 50_000));
    assert!(stepped.attended.context == context(tokens) && stepped.attended.lse.len() == 8 * tokens);
    assert_eq!(stepped.attended.kernel_id, "c1-f32");
    // All are over what the first one found, whatever is appended meanwhile.
    fake.next([Fault::Grow(7), Fault::None]);
    let attended = session.attend(0, q(tokens), &attend).await.unwrap();
    assert_eq!(attended.at_len, 50_000);
    assert!(attended.lse.iter().all(|lse| *lse == 50_000.0));
}

#[tokio::test]
async fn a_stream_that_says_impossible_things_is_given_up() {
    let fake = Fake::start().await;
    let sessions = fake.sessions();
    let session = sessions.open(options()).await.unwrap();
    fake.next([Fault::Misnumber]);
    let error = session.attend(0, q(1), &QueryOptions::default()).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::ReplyInvalid, Outcome::Unknown));
    assert_eq!(sessions.list().await.unwrap().len(), 1);
    assert_eq!(fake.streams(), 2);
}

#[tokio::test]
async fn a_coordinator_that_is_not_there_is_an_error_of_the_transport() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let sessions = Client::connect(&url).unwrap().sessions().with_timeout(Duration::from_millis(300));
    let error = sessions.open(options()).await.unwrap_err();
    assert_eq!((error.reason, error.outcome), (Reason::Transport, Outcome::NotExecuted), "{error}");
    assert!(error.attempts >= 2, "{error:?}");
}

#[tokio::test]
async fn a_question_that_nobody_waits_for_leaves_nothing() {
    let fake = Fake::start().await;
    let mut session = session(&fake).await;
    append(&mut session, 0, 1).await.unwrap();
    for _ in 0..100 {
        fake.next([Fault::Silent]);
        let ask = QueryOptions::default();
        let given_up = tokio::time::timeout(Duration::from_millis(10), session.attend(0, q(1), &ask)).await;
        assert!(given_up.is_err());
    }
    assert_eq!(session.attend(0, q(1), &QueryOptions::default()).await.unwrap().at_len, 1);
    assert_eq!(fake.streams.load(Ordering::Relaxed), 1);
}
