//! Queries that are late: who else is asked, how often, and which answer counts.

use attnd_plan::session::hedging::BURST;

use super::*;

/// Requests after which it is known how long they take; they pay for three that are sent twice.
const ENOUGH: usize = 70;

/// Looks at a session until it is known how long that takes; gives what is seen.
async fn usual(cluster: &Cluster, session: &Session) -> Vec<StepResult> {
    let mut results = Vec::new();
    for _ in 0..ENOUGH {
        results = cluster.run(vec![looking(session)]).await;
    }
    assert!(results[0].context.is_some(), "{results:?}");
    results
}

fn hedges(cluster: &Cluster) -> (u64, u64) {
    let counts = cluster.sessions.counts();
    (counts.hedges_sent, counts.hedges_won)
}

/// Messages with parts of steps that came to a worker.
fn works(node: &Node) -> usize {
    node.arrived(CONTROL).iter().filter(|sent| matches!(sent, Sent::Works(_))).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_late_comes_from_another_replica_with_the_same_bits() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let usual = usual(&cluster, &session).await;
    let (slow, other) = (&cluster.nodes[0], &cluster.nodes[1]);
    until("both have the rows", || session.is_computing(0, &other.link.holder)).await;
    let (before, of_slow) = (hedges(&cluster), works(slow));
    slow.answers[CONTROL].send_replace(false);
    assert_eq!(cluster.run(vec![looking(&session)]).await, usual);
    assert_eq!(works(slow), of_slow + 1, "it was asked first");
    // An append that the other one acknowledges, and computes behind as well.
    let stepped = cluster.run(vec![step(&session, 2, 1)]).await;
    assert_eq!(applied(&stepped), (4, false));
    let (sent, won) = hedges(&cluster);
    assert_eq!((sent - before.0, won - before.1), (2, 2));
    slow.answers[CONTROL].send_replace(true);
    until("the slow one is level", || session.is_computing(0, &slow.link.holder)).await;
    assert_eq!(cluster.run(vec![looking(&session)]).await[0].context, stepped[0].context);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_comes_late_is_not_merged_again() {
    let cluster = Cluster::start(3).await;
    let [left, right] = halves().map(|slots| piece(0..2, slots));
    let session = cluster.open("s", 1, &[(left, &[0, 1]), (right, &[2])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 600)]).await), (600, false));
    let usual = usual(&cluster, &session).await;
    let [slow, other, alone] = [0, 1, 2].map(|at| &cluster.nodes[at]);
    until("both have the rows", || session.is_computing(0, &other.link.holder)).await;
    let (before, of_other) = (hedges(&cluster).0, works(other));
    slow.answers[CONTROL].send_replace(false);
    alone.answers[CONTROL].send_replace(false);
    let mut look = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut look).await.is_err());
    // Of the half that nobody else has, nobody was asked.
    assert_eq!((hedges(&cluster).0 - before, works(other)), (1, of_other + 1));
    slow.answers[CONTROL].send_replace(true);
    assert!(tokio::time::timeout(A_WHILE, &mut look).await.is_err());
    alone.answers[CONTROL].send_replace(true);
    assert_eq!(look.await, usual);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_requests_that_are_all_late_few_are_sent_twice() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let usual = usual(&cluster, &session).await;
    // Also what was sent twice already has come then.
    tokio::time::sleep(A_WHILE).await;
    let all_works = || cluster.nodes.iter().map(works).sum::<usize>() as u64;
    let (before, works_before) = (hedges(&cluster), all_works());
    cluster.nodes[0].answers[CONTROL].send_replace(false);
    let looks: Vec<_> = (0..100).map(|_| tokio::spawn(cluster.run(vec![looking(&session)]))).collect();
    until("some are sent twice", || hedges(&cluster).0 > before.0).await;
    tokio::time::sleep(A_WHILE).await;
    cluster.nodes[0].answers[CONTROL].send_replace(true);
    for look in looks {
        assert_eq!(look.await.unwrap(), usual);
    }
    let sent = hedges(&cluster).0 - before.0;
    assert!((1..=100 / 20 + u64::from(BURST)).contains(&sent), "{sent} of 100");
    // Whoever is late again and again is asked last: some may have been asked of the other one in the first place.
    until("all are sent", || all_works() >= works_before + 100 + sent).await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(all_works(), works_before + 100 + sent, "nothing else is");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_behind_is_not_asked() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 1, &[(cluster.all(), &[0, 1])]).await;
    let (slow, behind) = (&cluster.nodes[0], &cluster.nodes[1]);
    behind.asks[CONTROL].send_replace(Gate::Shut);
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let usual = usual(&cluster, &session).await;
    let before = hedges(&cluster);
    slow.answers[CONTROL].send_replace(false);
    let mut look = Box::pin(cluster.run(vec![looking(&session)]));
    assert!(tokio::time::timeout(A_WHILE, &mut look).await.is_err());
    assert_eq!(hedges(&cluster), before);
    slow.answers[CONTROL].send_replace(true);
    assert_eq!(look.await, usual);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_late_again_and_again_is_asked_last() {
    let cluster = Cluster::start(2).await;
    let session = cluster.open("s", 2, &[(cluster.all(), &[0, 1])]).await;
    assert_eq!(applied(&cluster.run(vec![step(&session, 1, 3)]).await), (3, false));
    let slow = &cluster.nodes[0];
    let is_slow = || cluster.sessions.hedging().is_slow(&slow.link.holder, cluster.sessions.now());
    let mut looks = 0;
    // On a busy machine the other one is late too, and may use hedges up: then it begins anew.
    let begun = std::time::Instant::now();
    let usual = 'known: loop {
        assert!(begun.elapsed() < SOON * 4, "{looks} looks, and it isn't known to be slow");
        slow.answers[CONTROL].send_replace(true);
        let usual = usual(&cluster, &session).await;
        slow.answers[CONTROL].send_replace(false);
        for _ in 0..BURST {
            let Ok(answer) = tokio::time::timeout(A_WHILE, cluster.run(vec![looking(&session)])).await else {
                break;
            };
            assert_eq!(answer, usual);
            looks += 1;
            if is_slow() {
                break 'known usual;
            }
        }
    };
    assert!(looks >= 3, "{looks} were enough");
    let (sent, of_slow) = (hedges(&cluster).0, works(slow));
    for _ in 0..10 {
        assert_eq!(cluster.run(vec![looking(&session)]).await, usual);
    }
    let not_hedged = works(slow) as u64 - of_slow as u64 - (hedges(&cluster).0 - sent);
    assert_eq!(not_hedged, 0, "it isn't asked any more in the first place");
}
