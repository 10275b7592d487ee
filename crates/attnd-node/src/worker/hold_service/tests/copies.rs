//! A replica that goes from one worker to another, through a coordinator that is played by the test.

use attnd_wire::hold::{
    CopyBase, CopyChunk, CopySum, ExportRead, HoldAsk, ShardExport, ShardImport, ShardSnapshot,
};

use super::*;

impl Stream {
    async fn said(&mut self, ask: HoldAsk) -> Result<HoldAnswer, String> {
        let request = self.send(ask).await;
        match self.answer(request).await.remove(0).answer {
            HoldAnswer::Failed(error) => Err(error.message()),
            answer => Ok(answer),
        }
    }

    /// Begins to read a replica; the number of the request that it has.
    async fn export(&mut self, at: ShardAt, base: Option<CopyBase>) -> (u64, ShardSnapshot) {
        let request = self.next;
        match self.said(HoldAsk::Export(ShardExport { at, base })).await {
            Ok(HoldAnswer::Snapshot(snapshot)) => (request, *snapshot),
            other => panic!("{other:?}"),
        }
    }

    async fn read(&mut self, export: u64, index: u32) -> Result<CopyChunk, String> {
        self.said(HoldAsk::Read(ExportRead { export, index })).await.map(|answer| match answer {
            HoldAnswer::Chunk(chunk) => chunk,
            other => panic!("{other:?}"),
        })
    }

    async fn end(&mut self, export: u64) -> Result<CopySum, String> {
        self.said(HoldAsk::End(export)).await.map(|answer| match answer {
            HoldAnswer::Sum(sum) => sum,
            other => panic!("{other:?}"),
        })
    }
}

/// Steps with some rows, so that the session has some chunks.
async fn filled(stream: &mut Stream) -> Session {
    let mut session = unopened(1);
    (session.spec.head_dim, session.spec.value_dim) = (512, 512);
    stream.ask(hold(&session)).await.unwrap();
    for layer in [0, 1] {
        let rows = session.rows(layer, &(0..300).collect::<Vec<_>>());
        session.layers[layer].extend(0..300);
        let work = HoldAsk::Works(vec![session.shard_work(layer, Some(rows), None)]);
        let request = stream.send(work).await;
        assert!(stream.results(request, 0).await.0.is_some());
    }
    session
}

fn import(session: &Session, snapshot: ShardSnapshot) -> HoldAsk {
    let (at, spec, pieces) = (session.at, session.spec.clone(), session.pieces.clone());
    HoldAsk::Import(Box::new(ShardImport { at, spec, pieces, snapshot }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_goes_to_another_worker_in_chunks() {
    let (from, to) = (store(64 * MIB), store(64 * MIB));
    let ((from_url, from_calls), (to_url, to_calls)) = (serve(&from).await, serve(&to).await);
    let mut source = Stream::open(&from_url, 1).await;
    let mut target = Stream::open(&to_url, 1).await;
    let session = filled(&mut source).await;
    let missing = target.ask(HoldAsk::Look(session.at)).await.unwrap_err();
    assert_eq!(missing, "SHARD: session 0000000000000001 shard 0 is not here");
    let has = source.ask(HoldAsk::Look(ShardAt { epoch: 99, ..session.at })).await.unwrap();
    assert_eq!(has.tokens, [300, 300]);

    let (export, snapshot) = source.export(session.at, None).await;
    let chunks = snapshot.chunks(&session.spec, &session.pieces);
    assert_eq!(chunks, 8);
    // A node that drains gives what it has, and takes nothing.
    from_calls.drain();
    let request = target.send(import(&session, snapshot.clone())).await;
    for index in 0..chunks {
        let chunk = source.read(export, index).await.unwrap();
        target.send_as(request, HoldAsk::Copied(chunk)).await;
    }
    assert_eq!(source.read(export, 8).await.unwrap_err(), "CHUNK_ORDER: chunk 8 of 8");
    let sum = source.end(export).await.unwrap();
    assert_eq!(source.end(export).await.unwrap_err(), format!("STREAM_ORDER: request {export} is no export"));
    assert_eq!(to.len(), 0, "not before its end");
    target.send_as(request, HoldAsk::Sum(sum)).await;
    let state = target.state(request).await.unwrap();
    assert_eq!((state.chain, state.tokens), (has.chain, has.tokens));
    session.check(&to, 1, 300);

    // Who has all of it gets nothing.
    let base = CopyBase::of(&target.ask(HoldAsk::Look(session.at)).await.unwrap());
    let (export, snapshot) = source.export(session.at, Some(base.clone())).await;
    assert_eq!((snapshot.base.clone(), snapshot.chunks(&session.spec, &session.pieces)), (Some(base), 0));
    assert_eq!(source.end(export).await, Ok(CopySum::default()));
    let refused = source.ask(import(&session, snapshot)).await.unwrap_err();
    assert_eq!(refused, "DRAINING");
    drop((source, target));
    for calls in [from_calls, to_calls] {
        tokio::time::timeout(SOON, calls.idle()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_breaks_off_leaves_nothing_and_may_come_again() {
    let (from, to) = (store(64 * MIB), store(8 * MIB));
    let ((from_url, _), (to_url, calls)) = (serve(&from).await, serve(&to).await);
    let mut source = Stream::open(&from_url, 1).await;
    let session = filled(&mut source).await;
    let (export, snapshot) = source.export(session.at, None).await;
    assert_eq!(source.end(export).await.unwrap_err(), "CHUNK_ORDER: chunk 0 was not read");
    let (export, _) = source.export(session.at, None).await;
    let chunk = source.read(export, 0).await.unwrap();
    let layout = session.spec.page_layout();
    let before = to.memory().free(layout);
    let is_gone = async || {
        tokio::time::timeout(SOON, calls.idle()).await.unwrap();
        assert_eq!((to.len(), to.memory().free(layout)), (0, before));
    };

    // Given up, broken on its way, and cut off.
    let mut target = Stream::open(&to_url, 1).await;
    let request = target.send(import(&session, snapshot.clone())).await;
    target.send_as(request, HoldAsk::Copied(chunk.clone())).await;
    target.send_as(request, HoldAsk::GiveUp).await;
    let given_up = target.state(request).await.unwrap_err();
    assert_eq!(given_up, "STREAM_TRUNCATED: the copy was given up, nothing applied");
    is_gone().await;
    let request = target.send(import(&session, snapshot.clone())).await;
    let broken = CopyChunk { crc32c: chunk.crc32c ^ 1, ..chunk.clone() };
    target.send_as(request, HoldAsk::Copied(broken)).await;
    // What follows a refusal is dropped.
    target.send_as(request, HoldAsk::Copied(chunk.clone())).await;
    assert_eq!(target.state(request).await.unwrap_err(), "CHECKSUM: chunk 0, nothing applied");
    is_gone().await;
    let request = target.send(import(&session, snapshot.clone())).await;
    target.send_as(request, HoldAsk::Copied(chunk)).await;
    let look = HoldAsk::Look(session.at);
    assert!(target.ask(look).await.unwrap_err().starts_with("SHARD: "));
    assert!(to.memory().free(layout) < before);
    drop(target);
    is_gone().await;
    // It doesn't fit twice.
    let mut target = Stream::open(&to_url, 1).await;
    let first = target.send(import(&session, snapshot.clone())).await;
    let second = target.send(import(&session, snapshot)).await;
    let refused = target.state(second).await.unwrap_err();
    assert!(refused.starts_with("KV_BUDGET: need "), "{refused}");
    target.send_as(first, HoldAsk::GiveUp).await;
    target.state(first).await.unwrap_err();
    is_gone().await;
}
