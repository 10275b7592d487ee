//! Appends in chunks: all of it or nothing.

use super::staged::BulkId;
use super::*;

const ID: BulkId = (1, 1);

/// An append of these names, and its chunks of at most so many bytes, as a coordinator cuts them.
fn bulk(session: &mut Session, layer: usize, names: &[u64], most: usize) -> (ShardAppend, Vec<SliceChunk>) {
    let base_len = session.layers[layer].len();
    let op = session.next_op();
    let (at, tokens) = (session.at, names.len());
    let append = ShardAppend { at, layer, op, base_len, tokens, allow_non_finite: false };
    let heads: BTreeSet<usize> = session.pieces.iter().flat_map(|piece| piece.groups.clone()).collect();
    let mut chunks = Vec::new();
    for tensor in [Tensor::V, Tensor::K] {
        for head in heads.iter().rev() {
            // Runs of rows that are here, in the matrix of all rows.
            let mut runs: Vec<(usize, Vec<u8>)> = Vec::new();
            let mut is_open = false;
            for (i, name) in names.iter().enumerate() {
                let slot = slot_of_page((base_len + i) / PAGE_KEYS);
                let is_here = session
                    .pieces
                    .iter()
                    .any(|piece| piece.groups.contains(head) && piece.slots.contains(&slot));
                let row = session.row(tensor, layer, *head, *name);
                match runs.last_mut() {
                    Some((_, bytes)) if is_here && is_open => bytes.extend(row),
                    _ if is_here => runs.push((i * row.len(), row)),
                    _ => {}
                }
                is_open = is_here;
            }
            for (first, bytes) in runs.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
                for (i, data) in bytes.chunks(most).enumerate() {
                    chunks.push(SliceChunk {
                        index: chunks.len() as u32,
                        tensor: AnyTensor::Operand(tensor),
                        head: *head,
                        offset: (first + i * most) as u64,
                        data: data.to_vec().into(),
                    });
                }
            }
        }
    }
    (append, chunks)
}

fn commit_of(chunks: &[SliceChunk]) -> Commit {
    Commit { chunks: chunks.len() as u32, bytes: chunks.iter().map(|chunk| chunk.data.len() as u64).sum() }
}

/// Sends an append, all of it.
fn send(
    store: &Store,
    append: &ShardAppend,
    chunks: &[SliceChunk],
    commit: Commit,
) -> Result<ShardState, Error> {
    let resident = store.resident(key_of(&append.at))?;
    if let Some(replayed) = resident.change().begin_bulk(store, ID, append)? {
        return Ok(replayed);
    }
    for chunk in chunks {
        resident.change().chunk(store, ID, chunk)?;
    }
    resident.change().commit_bulk(store, ID, commit)
}

#[test]
fn chunks_of_any_size_are_the_rows_of_one_step() {
    let store = store(64 * MIB);
    let shards = [
        vec![piece(0..2, 0..64)],
        vec![piece(0..2, 31..33)],
        vec![piece(0..1, 0..17), piece(0..1, 31..33), piece(1..2, 5..6)],
    ];
    for (dtype, storage) in [(Dtype::F32, Storage::F32), (Dtype::Bf16, Storage::Int8)] {
        for (number, pieces) in shards.iter().enumerate() {
            let open =
                |number: usize| Session::open(&store, number as u64, spec(dtype, storage), pieces.clone());
            let mut steps = open(100 + number);
            let names: Vec<u64> = (0..900).collect();
            let parts = [&names[..300], &names[300..]];
            let states = parts.map(|part| steps.append(&store, 1, part));
            steps.check(&store, 1, 900);
            for most in [4, 36, 4096, 1 << 20] {
                let mut chunked = open(number);
                for (part, state) in parts.iter().zip(&states) {
                    let (append, chunks) = bulk(&mut chunked, 1, part, most);
                    let applied = send(&store, &append, &chunks, commit_of(&chunks)).unwrap();
                    assert_eq!((applied.chain, applied.op_seq), (state.chain, state.op_seq), "{most}");
                    chunked.layers[1].extend(*part);
                    let again = send(&store, &append, &chunks, commit_of(&chunks)).unwrap();
                    assert!(again.replayed && again.chain == state.chain);
                }
                chunked.check(&store, 1, 900);
                store.release(&chunked.at).unwrap();
            }
            store.release(&steps.at).unwrap();
        }
    }
    assert!(store.resident_bytes() <= 2 * MIB);
}

#[test]
fn what_does_not_come_whole_leaves_nothing() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &(0..250).collect::<Vec<_>>());
    let names: Vec<u64> = (250..600).collect();
    let (append, chunks) = bulk(&mut session, 0, &names, 1000);
    let commit = commit_of(&chunks);
    let state = store.resident((1, 0)).unwrap().look().state(&store, false);
    let bytes = store.resident_bytes();
    let refuses = |what: &str, chunks: &[SliceChunk], commit: Commit| {
        let refused = send(&store, &append, chunks, commit).unwrap_err();
        assert_eq!(refused.message(), what);
        let resident = store.resident((1, 0)).unwrap();
        assert_eq!(resident.look().state(&store, false), state, "{what}");
        assert_eq!(store.resident_bytes(), bytes, "{what}");
        session.check(&store, 0, 250);
        let gone = resident.change().commit_bulk(&store, ID, commit).unwrap_err();
        assert_eq!(gone.message(), "STREAM_ORDER: the append was given up");
    };
    let (n, all) = (commit.chunks, commit.bytes);
    let few = &chunks[..chunks.len() - 1];
    let some = commit_of(few);
    refuses(&format!("CHUNK_ORDER: commit declares {n} chunks, got {}", n - 1), few, commit);
    refuses(&format!("PAYLOAD_LENGTH: shape needs {all}, payload {}", some.bytes), few, some);
    let less = Commit { bytes: all - 4, ..commit };
    refuses(&format!("PAYLOAD_LENGTH: declared {}, got {all}", all - 4), &chunks, less);
    let mut swapped = chunks.clone();
    swapped.swap(4, 5);
    refuses("CHUNK_ORDER: expected 4, got 5", &swapped, commit);
    let mut elsewhere = chunks.clone();
    elsewhere[3].offset += 4;
    refuses("CHUNK_ORDER: v head 1: expected offset 3000, got 3004", &elsewhere, commit);
    let mut twice = chunks.clone();
    twice[1] = SliceChunk { index: 1, ..twice[0].clone() };
    refuses("CHUNK_ORDER: v head 1: expected offset 1000, got 0", &twice, commit);
    let mut bad = chunks.clone();
    let last = bad.len() - 1;
    let mut data = bad[last].data.to_vec();
    let end = data.len();
    data[end - 4..].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    bad[last].data = data.into();
    refuses("NON_FINITE: k[h=0,pos=599,i=7] -inf", &bad, commit);

    send(&store, &append, &chunks, commit).unwrap();
    session.layers[0].extend(&names);
    session.check(&store, 0, 600);
}

#[test]
fn nothing_of_an_append_is_seen_before_its_commit_and_another_op_ends_it() {
    let store = store(64 * MIB);
    let mut session = Session::open(&store, 1, spec(Dtype::F32, Storage::F32), vec![piece(0..2, 0..64)]);
    session.append(&store, 0, &(0..300).collect::<Vec<_>>());
    let (append, chunks) = bulk(&mut session, 0, &(300..700).collect::<Vec<_>>(), 5000);
    let resident = store.resident((1, 0)).unwrap();
    assert!(resident.change().begin_bulk(&store, ID, &append).unwrap().is_none());
    for chunk in &chunks {
        resident.change().chunk(&store, ID, chunk).unwrap();
        session.check(&store, 0, 300);
    }
    // Another stream's append of that number isn't this one.
    let other = resident.change().commit_bulk(&store, (2, 1), commit_of(&chunks)).unwrap_err();
    assert_eq!(other.message(), "STREAM_ORDER: the append was given up");
    session.seq -= 1;
    session.append(&store, 0, &(900..905).collect::<Vec<_>>());
    session.check(&store, 0, 305);
    assert!(resident.change().commit_bulk(&store, ID, commit_of(&chunks)).is_err());
    assert!(resident.change().chunk(&store, ID, &chunks[0]).is_err());
    // So does a new epoch.
    let (append, chunks) = bulk(&mut session, 0, &(300..700).collect::<Vec<_>>(), 5000);
    assert!(resident.change().begin_bulk(&store, ID, &append).unwrap().is_none());
    resident.change().chunk(&store, ID, &chunks[0]).unwrap();
    resident.change().fence(&store, 2).unwrap();
    assert!(resident.change().chunk(&store, ID, &chunks[1]).is_err());
    session.at.epoch = 2;
    session.check(&store, 0, 305);
}
