//! Coordinators that are killed and start again: sessions go on where they were, each op applied once.

use std::time::{Duration, Instant};

use attnd_client::session::{OpenOptions, Session};
use attnd_client::{Dtype, Outcome, Reason};
use attnd_plan::session::SessionName;
use attnd_wire::session::{
    Answer as Said, Ask, Change, ChangeKind, Mutation, SessionReply, SessionRequest, Step, StepRows,
};
use attnd_wire::{Error, Link, limits, proto};
use tokio_stream::StreamExt as _;

use super::links::step;
use super::{Sequence, dims};
use crate::support::cases::Answer;
use crate::support::cluster::{Cluster, WorkerSpec};
use crate::support::eventually;

/// Asks once, on a stream of its own; again as long as the session recovers.
async fn ask(url: &str, ask: Ask) -> Result<Said, Error> {
    let begun = Instant::now();
    loop {
        let channel = limits::endpoint(url, Link::Client)?.connect().await.unwrap();
        let request = SessionRequest { request: 1, timeout: Duration::from_secs(20), ask: ask.clone() };
        let requests =
            tokio_stream::iter([proto::SessionRequest::from(request)]).chain(tokio_stream::pending());
        let mut replies = limits::sessions_client(channel).exchange(requests).await?.into_inner();
        let reply = replies.message().await?.expect("an answer");
        match SessionReply::try_from(reply)?.answer {
            Said::Failed(error) if error.reason == Reason::Recovering => {
                assert!(begun.elapsed() < Duration::from_secs(20), "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Said::Failed(error) => return Err(error),
            answer => return Ok(answer),
        }
    }
}

/// The step that appended token `op_seq - 1`, or another one under its number.
fn append(session: &Session, sequence: &Sequence, op_seq: u64, other: bool) -> Ask {
    let token = op_seq as usize - usize::from(!other);
    let [k, v, _] = sequence.rows(token..token + 1);
    let mutation = Mutation { writer_epoch: 1, op_seq };
    let rows = StepRows { base_len: Some(op_seq - 1), ..StepRows::new(mutation, 1, k, v) };
    Ask::Steps(vec![Step { session: session.name().clone(), layer: 0, rows: Some(rows), queries: None }])
}

/// Whether a step was a replay, and how long its layer is said to be.
fn applied(said: Result<Said, Error>) -> (bool, u64) {
    let Ok(Said::Steps(mut results)) = said else { panic!("{said:?}") };
    let result = results.remove(0);
    let applied = result.applied.unwrap_or_else(|| panic!("{:?}", result.failure));
    (applied.replayed, applied.len)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_was_killed_goes_on_with_all_its_sessions() {
    let state = tempfile::tempdir().unwrap();
    let sequence = Sequence::new(31, Dtype::F32, dims(4, 2, 400, 32, 16));
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], Some(state.path())).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let named = |name: &str| OpenOptions { name: Some(name.into()), ..sequence.open(1) };
    let mut parent = sessions.open(named("parent")).await.unwrap();
    let mut twice = named("twice");
    (twice.spec.replicas, twice.spec.acks, twice.spec.allow_same_host) = (2, 2, true);
    let mut twice = sessions.open(twice).await.unwrap();
    for token in 0..30 {
        step(&mut parent, &sequence, token, &options).await;
        step(&mut twice, &sequence, token, &options).await;
    }
    let mut child = parent.fork(Some("child")).await.unwrap();
    let mut nameless = parent.fork(None).await.unwrap();
    let ended = sessions.open(named("ended")).await.unwrap();
    assert!(!ended.close().await.unwrap());
    nameless.seal().await.unwrap();
    for token in 30..40 {
        step(&mut child, &sequence, token, &options).await;
    }
    // In the middle of steps, of which each has its answer in the end, and once.
    let steps = async {
        for token in 30..200 {
            step(&mut twice, &sequence, token, &options).await;
        }
    };
    let kills = async {
        for pause in [120, 400] {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            cluster.kill_coordinator();
            cluster.start_coordinator();
        }
    };
    tokio::join!(steps, kills);
    for token in 40..60 {
        step(&mut child, &sequence, token, &options).await;
    }
    let [_, _, q] = sequence.rows(10..30);
    for session in [&parent, &nameless] {
        let attended = session.attend(0, q.clone(), &options).await.unwrap();
        let answer = Answer { context: attended.context, lse: attended.lse };
        answer.assert_bits_of(&sequence.answer(10..30), session.name().as_str());
    }
    let [k, v, _] = sequence.rows(30..31);
    let sealed = nameless.append(0, k, v).await.unwrap_err();
    assert_eq!((sealed.reason, sealed.outcome), (Reason::Sealed, Outcome::NotExecuted), "{sealed}");
    assert!(sessions.close("ended").await.unwrap(), "it had been closed before");
    // What was applied before is known by its number.
    for op_seq in [1, 17, 30] {
        assert_eq!(
            applied(ask(cluster.url(), append(&parent, &sequence, op_seq, false)).await),
            (true, op_seq)
        );
        let Ok(Said::Steps(results)) = ask(cluster.url(), append(&parent, &sequence, op_seq, true)).await
        else {
            panic!("no results")
        };
        let failure = results[0].failure.as_ref().unwrap();
        assert_eq!(failure.message(), format!("SEQ_REUSED: {op_seq}"));
    }
    for (op_seq, child) in [(31, Some("child")), (32, None)] {
        let kind = ChangeKind::Fork { child: child.map(|name| SessionName::new(name).unwrap()) };
        let mutation = Mutation { writer_epoch: 1, op_seq };
        let change = Change { session: parent.name().clone(), mutation, kind };
        let Ok(Said::Applied(again)) = ask(cluster.url(), Ask::Change(change)).await else {
            panic!("no fork")
        };
        let expected = if op_seq == 31 { child.unwrap() } else { nameless.name().as_str() };
        assert_eq!((again.replayed, again.child.unwrap().as_str()), (true, expected));
    }
    // Whoever becomes the writer now fences who wrote before.
    let mut taken = sessions.attach("twice").await.unwrap();
    let [k, v, _] = sequence.rows(200..201);
    let fenced = twice.append(0, k, v).await.unwrap_err();
    assert_eq!(fenced.reason, Reason::WriterFenced, "{fenced}");
    // In good order, with the streams of clients open.
    cluster.coordinator().signal("TERM");
    let ended = cluster.coordinator().wait_for_end(Duration::from_secs(10)).await;
    assert_eq!(ended.code(), Some(0));
    cluster.start_coordinator();
    for token in 200..210 {
        step(&mut taken, &sequence, token, &options).await;
    }
    for session in [parent, child, nameless, taken] {
        assert!(!session.close().await.unwrap());
    }
    cluster.wait_until_sessions_are_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_whose_disk_is_full_ends_and_the_next_one_has_all_that_was_kept() {
    let state = tempfile::tempdir().unwrap();
    let sequence = Sequence::new(34, Dtype::F32, dims(4, 2, 40, 16, 16));
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], Some(state.path())).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut session = sessions.open(sequence.open(1)).await.unwrap();
    step(&mut session, &sequence, 0, &options).await;
    cluster.kill_coordinator();
    cluster.start_coordinator_on_a_full_disk(192 << 10);
    for token in 1..5 {
        step(&mut session, &sequence, token, &options).await;
    }
    let hasty = cluster.client().sessions().with_timeout(Duration::from_secs(3));
    let mut kept = vec![session.name().clone()];
    let refused = loop {
        let name = format!("kept-{}", kept.len());
        match hasty.open(OpenOptions { name: Some(name), ..sequence.open(1) }).await {
            Ok(opened) => kept.push(opened.name().clone()),
            Err(refused) => break refused,
        }
        assert!(kept.len() < 2000, "the file has room for all of them");
    };
    assert!(kept.len() > 10, "{} sessions before {refused}", kept.len());
    let ended = cluster.coordinator().wait_for_end(Duration::from_secs(10)).await;
    let log = cluster.coordinator().log();
    assert!(ended.code() == Some(70) && log.contains("the store of sessions fails"), "{ended}: {log}");
    // As soon as there is room again.
    cluster.start_coordinator();
    let there = sessions.list().await.unwrap();
    assert!(kept.iter().all(|name| there.contains(name)), "{} of {}", there.len(), kept.len());
    for token in 5..10 {
        step(&mut session, &sequence, token, &options).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_died_with_its_worker_while_nobody_looked_is_lost_and_said_so() {
    let state = tempfile::tempdir().unwrap();
    let sequence = Sequence::new(32, Dtype::F32, dims(4, 2, 40, 16, 16));
    let mut cluster = Cluster::alone(vec![WorkerSpec::default(); 2], Some(state.path())).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut once = sessions.open(sequence.open(1)).await.unwrap();
    let mut open = sequence.open(1);
    (open.spec.replicas, open.spec.acks, open.spec.allow_same_host) = (2, 2, true);
    let mut twice = sessions.open(open).await.unwrap();
    for token in 0..20 {
        step(&mut once, &sequence, token, &options).await;
        step(&mut twice, &sequence, token, &options).await;
    }
    cluster.kill_coordinator();
    cluster.kill_worker(0);
    cluster.start_worker_again(0);
    cluster.start_coordinator();
    let [_, _, q] = sequence.rows(0..20);
    let lost = once.attend(0, q.clone(), &options).await.unwrap_err();
    assert_eq!(lost.reason, Reason::SessionLost, "{lost}");
    assert_eq!(lost.message, "SESSION_LOST: prefix 0 of 20", "one of two shards is left");
    let attended = twice.attend(0, q, &options).await.unwrap();
    let answer = Answer { context: attended.context, lse: attended.lse };
    answer.assert_bits_of(&sequence.answer(0..20), "the other replica has it all");
    assert!(!once.close().await.unwrap() && !twice.close().await.unwrap());
    cluster.wait_until_sessions_are_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_state_sessions_end_with_their_coordinator_and_workers_let_go_of_them() {
    let sequence = Sequence::new(33, Dtype::F32, dims(4, 2, 300, 64, 64));
    let mut cluster = Cluster::start(2).await;
    let sessions = cluster.client().sessions();
    let options = sequence.options();
    let mut session = sessions.open(sequence.open(1)).await.unwrap();
    for token in 0..5 {
        step(&mut session, &sequence, token, &options).await;
    }
    let mut open = Vec::new();
    for _ in 0..40 {
        let mut session = sessions.open(sequence.open(1)).await.unwrap();
        let [k, v, _] = sequence.rows(0..300);
        session.append(0, k, v).await.unwrap();
        open.push(session);
    }
    let used = async |cluster: &Cluster| {
        let status = cluster.status().await;
        status.workers.iter().map(|worker| worker.session_used_bytes).sum::<u64>()
    };
    // Workers say what is used when they next say that they live.
    eventually("the sessions use memory", Duration::from_secs(5), async || {
        (used(&cluster).await > 4 << 20).then_some(())
    })
    .await;
    cluster.kill_coordinator();
    cluster.start_coordinator();
    cluster.wait_until_settled().await;
    let [_, _, q] = sequence.rows(0..5);
    let gone = session.attend(0, q, &options).await.unwrap_err();
    assert_eq!(gone.reason, Reason::Session, "{gone}");
    cluster.wait_until_sessions_are_gone().await;
    let mut again = sessions.open(sequence.open(1)).await.unwrap();
    for token in 0..5 {
        step(&mut again, &sequence, token, &options).await;
    }
}
