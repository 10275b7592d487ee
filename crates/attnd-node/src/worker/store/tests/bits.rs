//! Partials of shards have the bits of a one-shot call over the same rows, however they came.

use std::sync::atomic::AtomicUsize;

use super::attention::Attention;
use super::*;

/// How 600 tokens come.
fn chunkings() -> Vec<Vec<usize>> {
    let mixed = vec![7, 1, 1, 255, 37, 90, 1, 200, 8];
    vec![vec![600], vec![1; 600], mixed]
}

/// How a shard may be cut; in the last one a head is in two pieces.
fn shards() -> Vec<Vec<Piece>> {
    vec![
        vec![piece(0..2, 0..64)],
        vec![piece(1..2, 0..64)],
        vec![piece(0..2, 32..64)],
        vec![piece(0..1, 0..17), piece(0..1, 31..33), piece(1..2, 5..6)],
    ]
}

#[test]
fn tokens_that_came_in_any_parts_are_those_that_came_at_once() {
    let kinds = [
        (Dtype::F32, Storage::F32),
        (Dtype::F16, Storage::F16),
        (Dtype::Bf16, Storage::Bf16),
        (Dtype::F32, Storage::Int8),
        (Dtype::Bf16, Storage::Int4),
    ];
    let store = store(64 * MIB);
    let mut number = 0;
    for (dtype, storage) in kinds {
        for pieces in shards() {
            let mut chains = BTreeSet::new();
            for parts in chunkings() {
                number += 1;
                let mut session = Session::open(&store, number, spec(dtype, storage), pieces.clone());
                let mut names = 0..600;
                for part in parts {
                    let names: Vec<u64> = names.by_ref().take(part).collect();
                    let state = session.append(&store, 1, &names);
                    if names.len() > 250 {
                        session.check(&store, 1, session.layers[1].len());
                    }
                    chains.insert(state.chain);
                }
                for at_len in [1, 255, 256, 257, 599, 600] {
                    session.check(&store, 1, at_len);
                }
                // The other layer is as empty as it was.
                let nothing = session.work(&store, 0, None, Some(session.queries(1, 1, Causal::None)));
                assert_eq!(nothing.partials.unwrap_err().message(), "AT_LEN: 1 > 0");
                assert!(!store.release(&session.at).unwrap().replayed);
            }
            assert!(chains.len() > 600, "a chain says what came");
        }
    }
    assert_eq!((store.len(), store.memory().resident() <= 2 * MIB), (0, true));
}

#[test]
fn values_that_are_parts_of_keys_are_made_of_them() {
    let store = store(64 * MIB);
    for storage in [Storage::F32, Storage::Int8] {
        let mut latent = spec(Dtype::F32, storage);
        (latent.heads, latent.kv_heads, latent.value_is_key_prefix) = (3, 1, true);
        let at = storage as u64;
        let mut session = Session::open(&store, at, latent, vec![piece(0..1, 0..64)]);
        session.append(&store, 0, &(0..300).collect::<Vec<_>>());
        session.append(&store, 0, &[300]);
        session.check(&store, 0, 301);
    }
}

#[test]
fn a_step_looks_at_what_it_appends() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    for step in 0..300_u64 {
        let rows = session.rows(0, &[step]);
        session.layers[0].push(step);
        let queries = session.queries(1, session.layers[0].len(), Causal::BottomRight);
        let expected = session.expected(0, &queries);
        let done = session.work(&store, 0, Some(rows), Some(queries));
        assert_eq!(done.applied.unwrap().tokens, [step + 1, 0]);
        same_bits(&done.partials.unwrap(), &expected);
    }
}

#[test]
fn works_of_one_message_are_each_by_itself() {
    let store = store(64 * MIB);
    let open =
        |number| Session::open(&store, number, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    let mut sessions: Vec<Session> = (0..6).map(open).collect();
    let mut works = Vec::new();
    let mut expected = Vec::new();
    for (at, session) in sessions.iter_mut().enumerate() {
        let names: Vec<u64> = (0..30 * at as u64 + 3).map(|name| name * 10 + at as u64).collect();
        let rows = session.rows(at % 2, &names);
        session.layers[at % 2].extend(names);
        let queries = session.queries(2, session.layers[at % 2].len(), Causal::BottomRight);
        expected.push(session.expected(at % 2, &queries));
        works.push(session.shard_work(at % 2, Some(rows), Some(queries)));
    }
    // One has a NaN, one is of a shard that isn't here, one of another epoch.
    let mut bad = works[2].rows.clone().unwrap();
    let mut k = bad.k.to_vec();
    k[8 * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    bad.k = k.into();
    works[2].rows = Some(bad);
    works[3].at.session = 77;
    works[4].at.epoch = 9;
    let works = works.into_iter().map(|work| Work::new(&store, work)).collect();
    let done = works::run_all(&store, works, || true);
    let text = |at: usize| match &done[at] {
        Ok(done) => done.partials.as_ref().unwrap_err().message(),
        Err(error) => error.message(),
    };
    assert_eq!(text(2), "NON_FINITE: k[h=0,pos=1,i=0] NaN");
    assert_eq!(text(3), "SHARD: session 000000000000004d shard 0 is not here");
    assert_eq!(text(4), "EPOCH: shard at 1, request 9");
    for at in [0, 1, 5] {
        let done = done[at].as_ref().unwrap();
        assert!(done.applied.is_some());
        same_bits(done.partials.as_ref().unwrap(), &expected[at]);
    }
    // What was refused left nothing, and can come again.
    let again = sessions[2].clone();
    sessions[2].layers[0].clear();
    sessions[2].seq = 0;
    sessions[2].append(&store, 0, &again.layers[0]);
    sessions[2].check(&store, 0, again.layers[0].len());
}

#[test]
fn queries_that_make_no_sense_are_refused() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(1..2, 0..64)]);
    session.append(&store, 0, &[1, 2, 3]);
    let text = |queries: ShardQueries| {
        let work = Work::new(&store, session.shard_work(0, None, Some(queries)));
        match works::run_all(&store, vec![work], || true).remove(0) {
            Ok(done) => done.partials.unwrap_err().message(),
            Err(error) => error.message(),
        }
    };
    let good = session.queries(2, 3, Causal::None);
    let mut q = good.q.to_vec();
    q[(2 * 8 + 8 + 3) * 4..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let bad = ShardQueries { q: q.into(), ..good.clone() };
    assert_eq!(text(bad.clone()), "NON_FINITE: q[h=3,pos=1,i=3] +inf");
    assert_eq!(text(ShardQueries { at_len: 4, ..good.clone() }), "AT_LEN: 4 > 3");
    assert_eq!(text(ShardQueries { generation: 2, ..good.clone() }), "GENERATION: session 0, request 2");
    assert!(text(ShardQueries { q: good.q.slice(4..), ..good.clone() }).starts_with("PAYLOAD_LENGTH"));
    let huge = encode(std::iter::repeat_n(f32::MAX, 2 * 2 * 8), Dtype::F32);
    assert_eq!(text(ShardQueries { q: huge.into(), ..good }), "SCORE_OVERFLOW: head 2 row 0");
    let allowed = ShardQueries { allow_non_finite: true, ..bad };
    assert!(session.work(&store, 0, None, Some(allowed)).partials.is_ok());
}

#[test]
fn what_nobody_waits_for_is_not_computed() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &[1, 2, 3]);
    let work = Work::new(&store, session.shard_work(0, None, Some(session.queries(1, 3, Causal::None))));
    let done = works::run_all(&store, vec![work], || false).remove(0).unwrap();
    assert_eq!(done.partials.unwrap_err().reason, Reason::Cancelled);
}

#[test]
fn rows_of_one_shard_come_in_the_order_of_their_message() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    let mut works = Vec::new();
    let mut expected = Vec::new();
    for (layer, names) in [(0, &[1, 2, 3][..]), (1, &[4]), (0, &[5, 6])] {
        let rows = session.rows(layer, names);
        session.layers[layer].extend(names);
        let queries = session.queries(1, session.layers[layer].len(), Causal::None);
        expected.push(session.expected(layer, &queries));
        works.push(Work::new(&store, session.shard_work(layer, Some(rows), Some(queries))));
    }
    for (done, expected) in works::run_all(&store, works, || true).into_iter().zip(&expected) {
        let done = done.unwrap();
        assert!(done.applied.is_some());
        same_bits(&done.partials.unwrap(), expected);
    }
}

#[test]
fn a_kernel_that_panics_costs_its_work_alone() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &[1, 2, 3]);
    let queries = session.queries(1, 3, Causal::None);
    let call = queries.call(0, &session.spec, &session.pieces).unwrap();
    let mut q = vec![0.0; 4 * 8];
    attnd_kernel::widen(&queries.q, Dtype::F32, &mut q);
    let attention = |q: &[f32]| Attention {
        shape: call.shape,
        operator: Arc::clone(&call.operator),
        q: q.to_vec(),
        first_kv_head: 0,
        views: store.resident((1, 0)).unwrap().look().views(1, 0, 0, 3).unwrap(),
        allow_non_finite: false,
        tokens_per_cell: 1,
        deadline: None,
    };
    // The second one has queries for one head of two.
    let works = [attention(&q), attention(&q[..16])];
    let mut done = attention::attend(store.kernels(), &works, || true);
    let failed = done.remove(1).unwrap_err();
    assert_eq!(failed.message(), "INTERNAL: a kernel panicked");
    same_bits(&done.remove(0).unwrap(), &session.expected(0, &queries));
    drop(works);
    session.append(&store, 0, &[4]);
    session.check(&store, 0, 4);
}

#[test]
fn partials_are_computed_only_as_long_as_somebody_waits_for_them() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &(0..300).collect::<Vec<_>>());
    let asked = |timeout: Option<Duration>, wanted: &(dyn Fn(usize) -> bool + Sync)| {
        let queries = ShardQueries { timeout, ..session.queries(64, 300, Causal::None) };
        let work = Work::new(&store, session.shard_work(0, None, Some(queries)));
        let slices = AtomicUsize::new(0);
        let wanted = || wanted(slices.fetch_add(1, Ordering::SeqCst));
        let done = works::run_all(&store, vec![work], wanted).remove(0).unwrap();
        (done.partials.map_err(|error| error.message()), slices.into_inner())
    };
    let (partials, slices) = asked(Some(Duration::from_secs(3600)), &|_| true);
    assert!(partials.is_ok() && slices >= 64, "{slices} slices, and what comes before them");
    // The time is over in the middle of the fifth.
    let late = |slice| {
        if slice == 5 {
            std::thread::sleep(Duration::from_millis(150));
        }
        true
    };
    let (partials, slices) = asked(Some(Duration::from_millis(100)), &late);
    assert_eq!(partials.unwrap_err(), "DEADLINE: expired");
    assert!(slices <= 6, "{slices} slices");
    let (partials, slices) = asked(Some(Duration::ZERO), &|_| true);
    assert_eq!((partials.unwrap_err().as_str(), slices), ("DEADLINE: expired", 1));
    let (partials, _) = asked(None, &|slice| slice < 5);
    assert_eq!(partials.unwrap_err(), "CANCELLED: nobody waits for the partials");
    // Rows that come with them are there all the same.
    let rows = session.rows(0, &[7]);
    let queries = ShardQueries { timeout: Some(Duration::ZERO), ..session.queries(1, 301, Causal::None) };
    let done = session.work(&store, 0, Some(rows), Some(queries));
    session.layers[0].push(7);
    assert_eq!(done.applied.unwrap().tokens, [301, 0]);
    assert_eq!(done.partials.unwrap_err().message(), "DEADLINE: expired");
    session.check(&store, 0, 301);
}
