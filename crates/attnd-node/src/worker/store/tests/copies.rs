//! Replicas that are copied from one store to another: the same bits, whatever they are stored as, or nothing at all.

use attnd_wire::hold::{CopyBase, CopyChunk, CopySum, ShardImport, ShardSnapshot, pages_of_chunk};

use super::super::export::Export;
use super::super::import::Import;
use super::*;

/// A copy as it travels.
#[derive(Clone)]
pub(super) struct Travels {
    import: ShardImport,
    chunks: Vec<CopyChunk>,
    sum: CopySum,
}

/// What a store gives of a session to who has `base`, for a replica of this epoch.
pub(super) fn export(store: &Store, session: &Session, base: Option<CopyBase>, epoch: u64) -> Travels {
    let resident = store.resident(key_of(&session.at)).unwrap();
    let (export, snapshot) = Export::new(&resident, base).unwrap();
    read(&export, session, snapshot, epoch)
}

fn read(export: &Export, session: &Session, snapshot: ShardSnapshot, epoch: u64) -> Travels {
    let (spec, pieces) = (session.spec.clone(), session.pieces.clone());
    let n = snapshot.chunks(&spec, &pieces);
    assert_eq!(export.sum().is_ok(), n == 0, "nothing was read yet");
    // They may be asked for in any order.
    let mut chunks: Vec<CopyChunk> = (0..n).rev().map(|index| export.chunk(index).unwrap()).collect();
    chunks.reverse();
    assert!(chunks.iter().all(|chunk| chunk.data.len() as u64 <= export.chunk_bytes()));
    let refused = export.chunk(n).unwrap_err().message();
    assert_eq!(refused, format!("CHUNK_ORDER: chunk {n} of {n}"));
    let at = ShardAt { epoch, ..session.at };
    Travels { import: ShardImport { at, spec, pieces, snapshot }, chunks, sum: export.sum().unwrap() }
}

pub(super) fn take(store: &Store, travels: &Travels) -> Result<ShardState, String> {
    let taken = Import::new(store, travels.import.clone()).and_then(|mut import| {
        travels.chunks.iter().try_for_each(|chunk| import.take(store, chunk))?;
        import.finish(store, travels.sum)
    });
    taken.map_err(|error| error.message())
}

fn state(store: &Store, session: &Session) -> ShardState {
    let resident = store.resident(key_of(&session.at)).unwrap();
    let state = resident.look().state(store, false);
    ShardState { resident_bytes: 0, ..state }
}

/// Fills two layers unequally, with a cut and a fork in between.
fn filled(store: &Store, spec: SessionSpec) -> Session {
    let pieces = vec![piece(0..1, 20..64), piece(1..2, 0..64)];
    let mut session = Session::open(store, 1, spec, pieces);
    session.append(store, 1, &(0..900).collect::<Vec<_>>());
    session.change(store, ShardChangeKind::Truncate { len: 700 }).unwrap();
    session.layers[1].truncate(700);
    session.generation += 1;
    session.append(store, 0, &(5..20).collect::<Vec<_>>());
    session.change(store, ShardChangeKind::Fork { child: 2 }).unwrap();
    session.append(store, 1, &[3, 1, 4]);
    session
}

fn specs() -> [SessionSpec; 5] {
    let prefix = SessionSpec { value_is_key_prefix: true, value_dim: 4, ..spec(Dtype::Bf16, Storage::Bf16) };
    [
        spec(Dtype::F32, Storage::F32),
        spec(Dtype::F16, Storage::F16),
        spec(Dtype::F32, Storage::Int8),
        spec(Dtype::F32, Storage::Int4),
        prefix,
    ]
}

/// Appends the same to both, as a coordinator does, and compares all that is there with what a call computes.
fn go_on(from: &Store, to: &Store, session: &Session, epoch: u64) {
    let mut there = session.clone();
    let mut here = session.clone();
    there.at.epoch = epoch;
    for (store, session) in [(from, &mut here), (to, &mut there)] {
        session.append(store, 1, &(900..1000).collect::<Vec<_>>());
        session.append(store, 0, &[1, 2]);
        for at_len in [1, 300, 700, 803] {
            session.check(store, 1, at_len);
        }
        session.check(store, 0, 17);
    }
    let (mut has, mut got) = (state(from, &here), state(to, &there));
    (has.epoch, got.epoch) = (0, 0);
    assert_eq!(has, got);
}

#[test]
fn a_copy_has_the_bits_of_its_source_and_goes_on_like_it() {
    for spec in specs() {
        let (from, to) = (store(64 * MIB), store(64 * MIB));
        let session = filled(&from, spec);
        let travels = export(&from, &session, None, 7);
        let expected = ShardState { epoch: 7, ..state(&from, &session) };
        assert_eq!(take(&to, &travels).map(|state| ShardState { resident_bytes: 0, ..state }), Ok(expected));
        go_on(&from, &to, &session, 7);
        // An op that comes again is known to the copy too.
        let resident = to.resident((1, 0)).unwrap();
        let change = ShardChange {
            at: ShardAt { epoch: 7, ..session.at },
            op: ShardOp { op_seq: 2, digest: 2 * 77, generation: 0 },
            kind: ShardChangeKind::Truncate { len: 700 },
        };
        assert!(resident.change().apply(&to, &change).unwrap().replayed);
    }
}

#[test]
fn what_is_given_is_what_was_there_when_it_began() {
    let (from, to) = (store(64 * MIB), store(64 * MIB));
    let mut session = filled(&from, spec(Dtype::F32, Storage::Int8));
    let before = session.clone();
    let expected = state(&from, &session);
    let (export, snapshot) = Export::new(&from.resident((1, 0)).unwrap(), None).unwrap();
    // The last pages are written to, then cut, then gone.
    session.append(&from, 1, &(40..50).collect::<Vec<_>>());
    session.change(&from, ShardChangeKind::Truncate { len: 100 }).unwrap();
    from.release(&session.at).unwrap();
    let travels = read(&export, &before, snapshot, 1);
    let got = take(&to, &travels).unwrap();
    assert_eq!(ShardState { resident_bytes: 0, ..got }, expected);
    before.check(&to, 1, 703);
    before.check(&to, 0, 15);
}

#[test]
fn who_has_the_beginning_gets_the_rest() {
    for spec in specs() {
        let (from, to) = (store(64 * MIB), store(64 * MIB));
        let mut session = filled(&from, spec);
        let first = export(&from, &session, None, 1);
        take(&to, &first).unwrap();
        let base = CopyBase::of(&state(&to, &session));
        // Nothing new is nothing to send.
        let nothing = export(&from, &session, Some(base.clone()), 1);
        assert_eq!((nothing.chunks.len(), nothing.sum), (0, CopySum::default()));
        take(&to, &nothing).unwrap();
        session.append(&from, 1, &(60..130).collect::<Vec<_>>());
        let rest = export(&from, &session, Some(base.clone()), 3);
        let pages = rest.import.snapshot.pages(&session.pieces).len();
        assert!(rest.import.snapshot.base.is_some() && (1..=4).contains(&pages), "{pages} pages");
        take(&to, &rest).unwrap();
        let (mut here, mut there) = (session.clone(), session.clone());
        there.at.epoch = 3;
        for (store, session) in [(&from, &mut here), (&to, &mut there)] {
            session.check(store, 1, 773);
            session.append(store, 1, &[8]);
            session.check(store, 1, 774);
        }
        // What isn't a beginning any more is sent whole.
        let base = CopyBase::of(&state(&to, &session));
        for other in [
            CopyBase { chain: base.chain ^ 1, ..base.clone() },
            CopyBase { generation: 0, ..base.clone() },
            CopyBase { tokens: vec![0], ..base.clone() },
            CopyBase { op_seq: base.op_seq + 1, ..base.clone() },
        ] {
            assert!(export(&from, &here, Some(other), 3).import.snapshot.base.is_none());
        }
        // A receiver that has changed meanwhile refuses.
        let rest = export(&from, &here, Some(base), 4);
        there.append(&to, 0, &[9]);
        assert!(take(&to, &rest).unwrap_err().starts_with("SNAPSHOT: "));
        there.check(&to, 0, 16);
    }
}

#[test]
fn a_copy_that_is_not_whole_leaves_nothing_behind() {
    let (from, to) = (store(64 * MIB), store(64 * MIB));
    let spec = SessionSpec { head_dim: 512, value_dim: 512, ..spec(Dtype::F32, Storage::F32) };
    assert_eq!(pages_of_chunk(spec.page_layout().stored_bytes()), 1);
    let session = filled(&from, spec);
    let whole = export(&from, &session, None, 1);
    assert_eq!(whole.chunks.len(), 5);
    let refused = |change: &dyn Fn(&mut Travels)| {
        let mut travels = whole.clone();
        change(&mut travels);
        let error = take(&to, &travels).unwrap_err();
        assert_eq!(to.len(), 0, "{error}");
        // One spare chunk of the arena.
        assert!(to.resident_bytes() <= 6 * MIB, "{error}: {} bytes", to.resident_bytes());
        error
    };
    let bytes = whole.sum.bytes;
    let cut = refused(&|travels| travels.chunks.truncate(4));
    let sent = bytes - whole.chunks[4].data.len() as u64;
    let declared = format!("declared 5 chunks of {bytes} bytes, got 4 of {sent}, 4 of 5 pages");
    assert_eq!(cut, format!("CHUNK_ORDER: {declared}"));
    let agreed = refused(&|travels| {
        travels.chunks.truncate(4);
        travels.sum = CopySum { chunks: 4, bytes: sent, ..travels.sum };
    });
    assert!(agreed.ends_with("4 of 5 pages"), "{agreed}");
    assert_eq!(refused(&|travels| travels.sum.crc32c ^= 1), "CHECKSUM: a copy, nothing applied");
    let swapped = refused(&|travels| {
        travels.chunks.swap(2, 3);
        (travels.chunks[2].index, travels.chunks[3].index) = (2, 3);
    });
    assert_eq!(swapped, "CHECKSUM: a copy, nothing applied");
    assert_eq!(refused(&|travels| travels.chunks.swap(2, 3)), "CHUNK_ORDER: expected 2, got 3");
    let short = refused(&|travels| travels.chunks[1].data.truncate(100));
    assert_eq!(short, format!("PAYLOAD_LENGTH: chunk 1 of 1 pages of {}, got 100", bytes / 5));
    let history = refused(&|travels| travels.import.snapshot.records.truncate(4));
    assert_eq!(history, "SNAPSHOT: 4 records don't end in op 5");
    take(&to, &whole).unwrap();
    session.check(&to, 1, 703);
}

#[test]
fn memory_is_promised_before_the_first_byte_and_comes_back() {
    let (from, to) = (store(64 * MIB), store(4 * MIB));
    let large = SessionSpec { head_dim: 128, value_dim: 128, ..spec(Dtype::F32, Storage::F32) };
    // Two heads of three pages, 256 KiB each.
    let mut session = Session::open(&from, 1, large, vec![piece(0..2, 0..64)]);
    session.append(&from, 0, &(0..700).collect::<Vec<_>>());
    let travels = export(&from, &session, None, 1);
    let layout = session.spec.page_layout();
    let before = to.memory().free(layout);
    let mut begun = Import::new(&to, travels.import.clone()).unwrap();
    assert_eq!((to.memory().free(layout), to.resident_bytes()), (before - 6 * layout.resident_bytes(1), 0));
    begun.take(&to, &travels.chunks[0]).unwrap();
    assert_eq!(to.memory().free(layout), before - 6 * layout.resident_bytes(1));
    let mut others: Vec<Import> = (0..1).map(|_| Import::new(&to, travels.import.clone()).unwrap()).collect();
    let need = format!("KV_BUDGET: need {}, free {}", 6 * (256 << 10), 4 * (256 << 10));
    assert_eq!(Import::new(&to, travels.import.clone()).unwrap_err().message(), need);
    others.clear();
    drop(begun);
    assert_eq!((to.memory().free(layout), to.len()), (before, 0));
    take(&to, &travels).unwrap();
    session.check(&to, 0, 700);
    // Another copy of the same takes the place of the first, which gives its pages back.
    take(&to, &travels).unwrap();
    assert_eq!(to.memory().free(layout), before - 6 * layout.resident_bytes(1));
    session.check(&to, 0, 700);
}

#[test]
fn a_replica_of_a_higher_epoch_or_another_session_stays() {
    let (from, to) = (store(64 * MIB), store(64 * MIB));
    let session = filled(&from, spec(Dtype::F32, Storage::F32));
    let mut other = Session::open(&to, 1, session.spec.clone(), session.pieces.clone());
    other.append(&to, 0, &[7]);
    let resident = to.resident((1, 0)).unwrap();
    resident.change().fence(&to, 5).unwrap();
    let travels = export(&from, &session, None, 4);
    assert_eq!(take(&to, &travels).unwrap_err(), "EPOCH: shard at 5, request 4");
    // Also if it gets it while the copy is on its way.
    let travels = export(&from, &session, None, 5);
    let mut import = Import::new(&to, travels.import.clone()).unwrap();
    travels.chunks.iter().for_each(|chunk| import.take(&to, chunk).unwrap());
    resident.change().fence(&to, 6).unwrap();
    let refused = import.finish(&to, travels.sum).unwrap_err().message();
    assert_eq!(refused, "EPOCH: shard at 6, request 5");
    other.at.epoch = 6;
    other.check(&to, 0, 1);
    let mut strange = export(&from, &session, None, 9);
    strange.import.pieces = vec![piece(0..2, 0..64)];
    assert_eq!(take(&to, &strange).unwrap_err(), "SESSION_EXISTS: parameters differ");
    // Of a higher epoch than the one here, the copy takes its place.
    assert_eq!(take(&to, &export(&from, &session, None, 7)).unwrap().epoch, 7);
    let moved = Session { at: ShardAt { epoch: 7, ..session.at }, ..session.clone() };
    moved.check(&to, 1, 703);
}
