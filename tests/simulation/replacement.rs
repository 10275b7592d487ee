//! How soon steps go on once a worker has come that can have the replica they lack, in the time of the simulation, in which no other program
//! of this machine takes part.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use attnd_client::session::{OpenOptions, QueryOptions};
use attnd_client::{AttendOptions, Causal, Client, Dtype};
use bytes::Bytes;
use tokio::time::Instant;

use super::cluster::{COORDINATOR_URL, build, worker_name};
use super::network::Chance;
use super::{LONGEST, WARM_UP, compute_on_this_thread};

/// Messages take 1 ms here, and are seen at most 1 ms later: what is waited for is not the network.
const MOMENT: Duration = Duration::from_millis(1);
/// How long the worker is away.
const AWAY: Duration = Duration::from_millis(20);
/// What the longest step may take beyond that.
const MOST: Duration = Duration::from_millis(100);

/// The longest of the steps of a session with two replicas, of two workers one of which crashes so long after they are there, and starts
/// again at once.
fn longest_step(after: Duration) -> Duration {
    compute_on_this_thread();
    let chance = Chance::new(7);
    let mut sim = turmoil::Builder::new()
        .rng_seed(7)
        .simulation_duration(LONGEST)
        .tick_duration(MOMENT)
        .min_message_latency(MOMENT)
        .max_message_latency(MOMENT)
        .tcp_capacity(4096)
        .build();
    build(&mut sim, &chance, 2);
    let (longest, surroundings) = (Rc::new(Cell::new(Duration::ZERO)), chance.surroundings());
    let found = Rc::clone(&longest);
    sim.client("client", async move {
        tokio::time::sleep(WARM_UP).await;
        let sessions = Client::connect_in(surroundings, COORDINATOR_URL)?.sessions();
        let mut open = OpenOptions::new(1, 4, 2, 8, Dtype::F32);
        (open.spec.replicas, open.spec.acks) = (2, 2);
        let mut session = sessions.open(open).await?;
        let rows = |heads: usize| Bytes::from(vec![0; heads * 8 * size_of::<f32>()]);
        let attend = AttendOptions { causal: Causal::BottomRight, ..AttendOptions::default() };
        let options = QueryOptions { attend, ..QueryOptions::default() };
        let begun = Instant::now();
        while begun.elapsed() < after + Duration::from_secs(1) {
            let sent = Instant::now();
            session.step(0, rows(2), rows(2), rows(4), &options).await?;
            found.set(found.get().max(sent.elapsed()));
        }
        Ok(())
    });
    while sim.elapsed() < WARM_UP + after {
        sim.step().unwrap();
    }
    sim.crash(worker_name(1));
    while sim.elapsed() < WARM_UP + after + AWAY {
        sim.step().unwrap();
    }
    sim.bounce(worker_name(1));
    sim.run().unwrap();
    longest.get()
}

#[test]
fn whoever_comes_gets_what_is_missing_without_waiting_for_a_round() {
    // Rounds come every 200 ms.
    for phase in 0..4 {
        let after = Duration::from_millis(300 + 50 * phase);
        let longest = longest_step(after);
        println!("a worker crashes after {after:?}, for {AWAY:?}: longest step {longest:?}");
        assert!(longest > AWAY, "nobody had to wait for it");
        assert!(longest < AWAY + MOST, "away for {AWAY:?} after {after:?}: longest step {longest:?}");
    }
}
