//! The real coordinator, workers and clients in a simulation: one thread, a network and a time of its own, and all chance out of one
//! seed.

use std::time::Duration;

use attnd_client::session::{OpenOptions, QueryOptions};
use attnd_client::{Causal, Client, Dtype};
use bytes::Bytes;

mod cluster;
mod network;

use network::Chance;

#[test]
fn spike() {
    let begun = std::time::Instant::now();
    let chance = Chance::new(1);
    let mut sim = turmoil::Builder::new()
        .rng_seed(1)
        .simulation_duration(Duration::from_secs(30))
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(3))
        .build();
    cluster::build(&mut sim, &chance, 3);
    let surroundings = chance.surroundings();
    sim.client("client", async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let client = Client::connect_in(surroundings, cluster::COORDINATOR_URL)?;
        println!("{:?}", client.status().await?.workers.len());
        let sessions = client.sessions();
        let mut open = OpenOptions::new(2, 4, 2, 4, Dtype::F32);
        (open.spec.replicas, open.spec.acks) = (2, 2);
        let mut session = sessions.open(open).await?;
        let mut options = QueryOptions::default();
        options.attend.causal = Causal::BottomRight;
        for n in 0..100 {
            let begun = tokio::time::Instant::now();
            let row = |heads: usize| Bytes::from(vec![0; heads * 16]);
            let stepped = session.step(0, row(2), row(2), row(4), &options).await?;
            println!("{n}: {} {:?}", stepped.attended.at_len, begun.elapsed());
        }
        Ok(())
    });
    let ran = sim.run();
    println!("{ran:?} {:?} in {:?}", sim.elapsed(), begun.elapsed());
    ran.unwrap();
}
