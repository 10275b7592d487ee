//! Memory for pages that come one by one and go together: frames of one page each, carved out of chunks in huge pages.
//!
//! **Chunks.** A chunk is a multiple of a huge page, 2 MiB, cut into frames of one size: the smallest such multiple that loses at
//! most an eighth behind its last frame. There is one, because a chunk that has room for eight frames loses less than a frame.
//! Two of three layouts need a single huge page, none of up to 1024 elements more than seven. A frame that was given back is taken before one that never
//! was, and the first chunk with a free one before the others, so that the last ones empty. A chunk without a frame in use goes
//! back to the system, but for the latest such one: who grows and shrinks by a page doesn't pay for a mapping each time.
//!
//! **Zeros.** A frame is zero when it is taken, so nothing of a sequence is seen by the next one that gets its memory. It is made so
//! when it is taken, and not when it is given back: a sequence that ends gives whole chunks back, which then needn't be touched at
//! all, and a frame that is cleared when it is taken is in the cache when its first rows are written. What lay in a free frame stays
//! there until then; nothing reads it.
//!
//! One lock holds all lists. It is held for a few steps in them, and for the system calls that make a chunk; clearing frames and
//! giving chunks back happen outside of it.
//!
//! **Limit.** Frames that are free in chunks that aren't, and pages that views and forks hold, are in no account of sequences; an arena
//! knows all of it. So the bound on memory is the arena's: what would exceed it is refused before anything is mapped.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::buffer::{Buffer, OutOfMemory};
use crate::pages::PageLayout;

/// What chunks are multiples of, in bytes: a huge page; for an interpreter, whose memory is slow, a few keys.
const GRANULE: usize = if cfg!(miri) { 4 << 10 } else { 2 << 20 };
/// One part in so many of a chunk may be lost.
const LOST: usize = 8;

/// Where the pages of [`crate::KvCache`]s lie. Clones are handles on the same memory.
#[derive(Clone)]
pub struct Arena(Arc<Shared>);

struct Shared {
    granule: usize,
    /// Of the bytes of all chunks.
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By the number of words in a frame.
    sizes: BTreeMap<usize, Chunks>,
    /// Of all chunks.
    bytes: u64,
    /// The chunk without a frame in use that is kept: of frames of how many words, and which.
    spare: Option<(usize, usize)>,
}

/// The chunks whose frames have one size.
#[derive(Default)]
struct Chunks {
    chunks: Vec<Option<Chunk>>,
    /// Places in `chunks` where there is none.
    vacant: Vec<usize>,
    /// Those that have a free frame.
    with_free: BTreeSet<usize>,
    /// Free frames in all of them.
    free: usize,
}

struct Chunk {
    memory: Buffer,
    /// Frames that were taken and given back; the least is first.
    returned: BinaryHeap<Reverse<usize>>,
    /// Frames from this one on were never taken, and are as the system gave them: zero.
    fresh: usize,
}

/// How frames of one size lie in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Carving {
    chunk_bytes: usize,
    frames: usize,
}

impl Carving {
    /// # Panics
    /// If a frame is empty or has no number of bytes.
    fn new(frame_bytes: usize, granule: usize) -> Self {
        assert!(frame_bytes > 0 && frame_bytes <= isize::MAX as usize / 32, "a frame of {frame_bytes} bytes");
        let mut chunk_bytes = frame_bytes.next_multiple_of(granule);
        while chunk_bytes % frame_bytes > chunk_bytes / LOST {
            chunk_bytes += granule;
        }
        Self { chunk_bytes, frames: chunk_bytes / frame_bytes }
    }

    /// Bytes of a frame with its share of what is lost behind the last one.
    fn frame_share(self) -> u64 {
        self.chunk_bytes.div_ceil(self.frames) as u64
    }
}

/// Bytes of chunks that `n` frames of `words` words take, with their share of what is lost behind the last one.
pub(crate) fn bytes_of_frames(n: usize, words: usize) -> u64 {
    (n as u64).saturating_mul(Carving::new(words * size_of::<f32>(), GRANULE).frame_share())
}

impl Arena {
    /// An arena that has no memory yet, and may take all there is.
    pub fn new() -> Self {
        Self::of_chunks(GRANULE, u64::MAX)
    }

    /// An arena that takes at most so many bytes.
    pub fn with_limit(bytes: u64) -> Self {
        Self::of_chunks(GRANULE, bytes)
    }

    /// The same with chunks that are multiples of another size. Pages are multiples of 1 KiB, so with chunks of that each has one.
    pub(crate) fn of_chunks(granule: usize, limit: u64) -> Self {
        Self(Arc::new(Shared { granule, limit, state: Mutex::default() }))
    }

    /// What the arena takes of the system's memory, in bytes: chunks in use, and one that isn't at most. Beyond
    /// what [`crate::PageLayout::resident_bytes`] says of all pages in use, views' among them, that is frames that are free in chunks that
    /// aren't.
    pub fn bytes(&self) -> u64 {
        self.0.state().bytes
    }

    /// What pages of this layout may still take of the arena, in bytes, as [`PageLayout::resident_bytes`] counts them: frames that are free
    /// in chunks of theirs, and chunks that fit below the limit.
    ///
    /// # Panics
    /// If keys or values have no elements or more than [`crate::shape::MAX_DIM`].
    pub fn free_bytes(&self, layout: PageLayout) -> u64 {
        assert!(layout.is_possible(), "elements of {layout:?}");
        let words = layout.page_words();
        let carving = Carving::new(words * size_of::<f32>(), self.0.granule);
        let state = self.0.state();
        let spare = match state.spare {
            Some((of_words, at)) if of_words != words => state.bytes_of(of_words, at),
            _ => 0,
        };
        let room = self.0.limit.saturating_sub(state.bytes - spare) / carving.chunk_bytes as u64;
        let frames = state.sizes.get(&words).map_or(0, |of_size| of_size.free) as u64;
        let frames = room.saturating_mul(carving.frames as u64).saturating_add(frames);
        frames.saturating_mul(carving.frame_share())
    }

    /// A frame of `words` zeros.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub(crate) fn zeroed(&self, words: usize) -> Result<Frame, OutOfMemory> {
        let (mut frame, is_fresh) = self.take(words)?;
        if !is_fresh {
            frame.fill(0.0);
        }
        Ok(frame)
    }

    /// A frame with the words of another one.
    ///
    /// # Errors
    /// If the system has no such memory.
    pub(crate) fn copy(&self, of: &Frame) -> Result<Frame, OutOfMemory> {
        let (mut frame, _) = self.take(of.len())?;
        frame.copy_from_slice(of);
        Ok(frame)
    }

    /// A frame that holds anything, and whether that is zeros.
    fn take(&self, words: usize) -> Result<(Frame, bool), OutOfMemory> {
        let carving = Carving::new(words * size_of::<f32>(), self.0.granule);
        let mut state = self.0.state();
        let is_new = state.sizes.get(&words).is_none_or(|of_size| of_size.with_free.is_empty());
        if is_new {
            // What nobody uses makes room for what somebody wants.
            let over = |state: &State| state.bytes.saturating_add(carving.chunk_bytes as u64) > self.0.limit;
            let spare = if over(&state) { state.give_up_spare() } else { None };
            if over(&state) {
                return Err(OutOfMemory { bytes: carving.chunk_bytes as u64 });
            }
            drop(spare);
        }
        let State { sizes, bytes, spare } = &mut *state;
        let of_size = sizes.entry(words).or_default();
        let at = match of_size.with_free.first() {
            Some(at) => *at,
            None => {
                let memory = Buffer::in_huge_pages(carving.chunk_bytes / size_of::<f32>())?;
                *bytes += carving.chunk_bytes as u64;
                of_size.free += carving.frames;
                of_size.add(Chunk { memory, returned: BinaryHeap::new(), fresh: 0 })
            }
        };
        if *spare == Some((words, at)) {
            *spare = None;
        }
        of_size.free -= 1;
        let chunk = of_size.chunk(at);
        let (frame, is_fresh) = match chunk.returned.pop() {
            Some(Reverse(frame)) => (frame, false),
            None => {
                chunk.fresh += 1;
                (chunk.fresh - 1, true)
            }
        };
        assert!(frame < carving.frames && (frame + 1) * words <= chunk.memory.len());
        // SAFETY: the frame's words end in the chunk's memory, as was just seen.
        let start = unsafe { chunk.memory.start().add(frame * words) };
        if chunk.returned.is_empty() && chunk.fresh == carving.frames {
            of_size.with_free.remove(&at);
        }
        let (sum, arena) = (AtomicU64::new(0), self.clone());
        Ok((Frame { start, words, chunk: at, frame, sum, arena }, is_fresh))
    }
}

impl Default for Arena {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Shared {
    /// The lists. No step in them panics half way, unless a rule here is broken: then a frame is lost, and no more.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a frame free; returns the memory of a chunk that is not kept.
    fn give_back(&self, words: usize, at: usize, frame: usize) -> Option<Buffer> {
        let mut state = self.state();
        let of_size = state.sizes.get_mut(&words)?;
        let chunk = of_size.chunk(at);
        chunk.returned.push(Reverse(frame));
        let is_in_use = chunk.returned.len() < chunk.fresh;
        of_size.free += 1;
        of_size.with_free.insert(at);
        if is_in_use {
            return None;
        }
        let given_up = state.give_up_spare();
        state.spare = Some((words, at));
        given_up
    }
}

impl State {
    /// Takes the chunk that is kept out of the lists.
    fn give_up_spare(&mut self) -> Option<Buffer> {
        let (words, at) = self.spare.take()?;
        let of_size = self.sizes.get_mut(&words)?;
        let memory = of_size.remove(at)?.memory;
        of_size.free -= memory.len() / words;
        self.bytes -= (memory.len() * size_of::<f32>()) as u64;
        Some(memory)
    }

    /// Bytes of a chunk of frames of `words` words.
    fn bytes_of(&self, words: usize, at: usize) -> u64 {
        let chunk = self.sizes.get(&words).and_then(|of_size| of_size.chunks.get(at)?.as_ref());
        chunk.map_or(0, |chunk| (chunk.memory.len() * size_of::<f32>()) as u64)
    }
}

impl Chunks {
    fn add(&mut self, chunk: Chunk) -> usize {
        let at = self.vacant.pop().unwrap_or(self.chunks.len());
        if at == self.chunks.len() {
            self.chunks.push(None);
        }
        self.chunks[at] = Some(chunk);
        self.with_free.insert(at);
        at
    }

    fn remove(&mut self, at: usize) -> Option<Chunk> {
        self.with_free.remove(&at);
        self.vacant.push(at);
        self.chunks[at].take()
    }

    fn chunk(&mut self, at: usize) -> &mut Chunk {
        match &mut self.chunks[at] {
            Some(chunk) => chunk,
            None => panic!("chunk {at} has frames and isn't there"),
        }
    }
}

/// Memory of one page, owned as a `Box<[f32]>` is, which goes back to its arena.
pub(crate) struct Frame {
    start: NonNull<f32>,
    words: usize,
    /// Which chunk of frames of this size, and which frame of it.
    chunk: usize,
    frame: usize,
    /// See [`Frame::sum`]: 0 for none, else it and the bit above.
    sum: AtomicU64,
    arena: Arena,
}

const HAS_SUM: u64 = 1 << 32;

impl Frame {
    /// What somebody said of the words as they are: nobody has written to them since.
    pub(crate) fn sum(&self) -> Option<u32> {
        let sum = self.sum.load(Ordering::Relaxed);
        (sum & HAS_SUM != 0).then_some(sum as u32)
    }

    /// Says something of the words as they are.
    pub(crate) fn set_sum(&self, sum: u32) {
        self.sum.store(HAS_SUM | u64::from(sum), Ordering::Relaxed);
    }
}

// SAFETY: a Frame alone owns its words, as a Box<[f32]> does: a frame that is taken isn't taken again before it is given back,
// frames of a chunk don't overlap, and the arena itself never reads or writes a chunk. Its handle on the arena is Send.
unsafe impl Send for Frame {}
// SAFETY: shared access only reads words, and what is said of them is an atomic.
unsafe impl Sync for Frame {}

impl Deref for Frame {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: start points at `words` f32s inside a chunk, which was zeroed when it was made and stays as long as one of its
        // frames is in use; nobody else uses them, see above.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl DerefMut for Frame {
    fn deref_mut(&mut self) -> &mut [f32] {
        *self.sum.get_mut() = 0;
        // SAFETY: as in deref, and &mut self makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        drop(self.arena.0.give_back(self.words, self.chunk, self.frame));
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frame").field("words", &self.words).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::buffer::fill_by_copies;
    use crate::storage::Storage;

    const KIB: usize = 1 << 10;

    #[test]
    fn a_limit_is_kept_and_what_nobody_uses_makes_room() {
        let words = KIB / 4;
        let arena = Arena::of_chunks(KIB, 3 * KIB as u64);
        let mut frames: Vec<Frame> = (0..3).map(|_| arena.zeroed(words).unwrap()).collect();
        let refused = arena.zeroed(words).unwrap_err();
        assert_eq!((refused.bytes, arena.bytes()), (KIB as u64, 3 * KIB as u64));
        frames.pop();
        assert_eq!(arena.bytes(), 3 * KIB as u64, "one is kept");
        // Of another size, for which the one that is kept is of no use.
        assert!(arena.zeroed(2 * words).is_err(), "two and two");
        assert_eq!(arena.bytes(), 2 * KIB as u64);
        frames.pop();
        assert!(arena.zeroed(2 * words).is_ok());
    }

    #[test]
    fn what_is_free_counts_holes_and_what_fits_below_the_limit() {
        // Pages of 17 KiB; four in a chunk of 68 KiB and five in one of 85.
        let small = PageLayout { storage: Storage::F32, head_dim: 1, value_dim: 1 };
        let large = PageLayout { storage: Storage::F32, head_dim: 52, value_dim: 16 };
        let [words, of_large] = [small, large].map(|layout| layout.page_words());
        assert_eq!([words, of_large], [17 * KIB / 4, 68 * KIB / 4]);
        let arena = Arena::of_chunks(68 * KIB, 3 * 68 * KIB as u64 + 5);
        let [page, chunk] = [17, 68].map(|kib| kib * KIB as u64);
        assert_eq!([small, large].map(|layout| arena.free_bytes(layout)), [12 * page, 3 * chunk]);
        let mut frames: Vec<Frame> = (0..5).map(|_| arena.zeroed(words).unwrap()).collect();
        assert_eq!([small, large].map(|layout| arena.free_bytes(layout)), [7 * page, chunk]);
        frames.truncate(2);
        assert_eq!(arena.bytes(), 2 * chunk, "one is kept");
        assert_eq!([small, large].map(|layout| arena.free_bytes(layout)), [10 * page, 2 * chunk]);
        // What nobody uses makes room.
        let held: Vec<Frame> = (0..2).map(|_| arena.zeroed(of_large).unwrap()).collect();
        assert_eq!([small, large].map(|layout| arena.free_bytes(layout)), [2 * page, 0]);
        frames.extend((0..2).map(|_| arena.zeroed(words).unwrap()));
        assert_eq!(arena.free_bytes(small), 0);
        assert!(arena.zeroed(words).is_err());
        drop((held, frames));
        assert_eq!([small, large].map(|layout| arena.free_bytes(layout)), [12 * page, 3 * chunk]);
        assert_eq!(Arena::new().free_bytes(small), u64::MAX);
    }

    #[test]
    fn at_most_an_eighth_of_a_chunk_is_lost() {
        let mut largest = 0;
        for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Int8, Storage::Int4] {
            let dims = (1..=1024).step_by(if cfg!(miri) { 93 } else { 1 });
            for (head_dim, value_dim) in dims.flat_map(|d| [(d, d), (d, 1), (1, d), (d, 512), (d, 1024)]) {
                let frame = PageLayout { storage, head_dim, value_dim }.page_words() * 4;
                assert!(frame.is_multiple_of(KIB), "{storage} {head_dim} {value_dim}");
                let Carving { chunk_bytes, frames } = Carving::new(frame, 2048 * KIB);
                assert!(chunk_bytes.is_multiple_of(2048 * KIB));
                assert!(chunk_bytes - frames * frame <= chunk_bytes / 8, "{storage} {head_dim} {value_dim}");
                assert!(frames > 0 && chunk_bytes == 2048 * KIB || frame > 256 * KIB);
                largest = largest.max(chunk_bytes);
            }
        }
        assert!(largest <= 14 << 20, "{largest}");
        let of = |kib: usize| {
            let Carving { chunk_bytes, frames } = Carving::new(kib * KIB, 2048 * KIB);
            (chunk_bytes / KIB, frames)
        };
        assert_eq!(
            [of(256), of(66), of(514), of(1088), of(2048)],
            [(2048, 8), (2048, 31), (4096, 7), (6144, 5), (2048, 1)]
        );
    }

    #[test]
    fn a_chunk_without_frames_in_use_goes_back_but_for_one() {
        let arena = Arena::of_chunks(4 * KIB, u64::MAX);
        // Four in a chunk.
        let words = KIB / 4;
        let mut frames: Vec<Frame> = (0..12).map(|_| arena.zeroed(words).unwrap()).collect();
        assert_eq!(arena.bytes(), 3 * 4096);
        for (n, frame) in frames.iter_mut().enumerate() {
            fill_by_copies(frame, n as f32 + 1.0);
        }
        assert!(frames.iter().enumerate().all(|(n, frame)| frame.iter().all(|x| *x == n as f32 + 1.0)));
        // One frame of each chunk holds it.
        let held = [frames.remove(0), frames.remove(4), frames.remove(9)];
        drop(frames);
        assert_eq!(arena.bytes(), 3 * 4096);
        let [a, b, c] = held;
        drop(b);
        assert_eq!(arena.bytes(), 3 * 4096, "one is kept");
        drop(c);
        assert_eq!(arena.bytes(), 2 * 4096);
        // The first free frames are in the first chunk; what they held is gone.
        let again: Vec<Frame> = (0..3).map(|_| arena.zeroed(words).unwrap()).collect();
        assert_eq!(arena.bytes(), 2 * 4096);
        assert!(again.iter().all(|frame| frame.iter().all(|x| x.to_bits() == 0)));
        // The spare is taken, and no spare any more.
        let more = arena.zeroed(words).unwrap();
        assert!(more.iter().all(|x| x.to_bits() == 0));
        assert_eq!(arena.bytes(), 2 * 4096);
        drop((a, again));
        assert_eq!(arena.bytes(), 2 * 4096);
        drop(more);
        assert_eq!(arena.bytes(), 4096);
        // A spare of another size goes when there is a later one.
        drop(arena.zeroed(2 * words).unwrap());
        assert_eq!(arena.bytes(), 4096);
        assert_eq!(format!("{arena:?}"), "Arena { bytes: 4096, .. }");
    }

    #[test]
    fn frames_are_apart_zero_when_taken_and_copied_whole() {
        let arena = Arena::of_chunks(8 * KIB, u64::MAX);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut live: Vec<(f32, Frame)> = Vec::new();
        for step in 0..if cfg!(miri) { 60 } else { 4000 } {
            if rng.random_range(0..5_u32) < 2 && !live.is_empty() {
                let (value, frame) = live.swap_remove(rng.random_range(0..live.len()));
                assert!(frame.iter().all(|x| *x == value));
                continue;
            }
            let value = step as f32 + 1.0;
            if rng.random_range(0..4_u32) == 0 && !live.is_empty() {
                let (value, of) = &live[rng.random_range(0..live.len())];
                let copy = arena.copy(of).unwrap();
                live.push((*value, copy));
            } else {
                let mut frame = arena.zeroed([256, 512, 768][rng.random_range(0..3)]).unwrap();
                assert!(frame.iter().all(|x| x.to_bits() == 0), "step {step}");
                assert!(frame.as_ptr().addr().is_multiple_of(64));
                fill_by_copies(&mut frame, value);
                live.push((value, frame));
            }
        }
        assert!(live.iter().all(|(value, frame)| frame.iter().all(|x| x == value)));
        let in_use: usize = live.iter().map(|(_, frame)| frame.len() * 4).sum();
        assert!(arena.bytes() >= in_use as u64);
        // Frames outlive the handle that they were taken by.
        let held = arena.clone();
        drop(arena);
        drop(live);
        assert!(held.bytes() <= 16 * KIB as u64, "{} bytes without a frame", held.bytes());
    }

    #[test]
    fn threads_never_share_a_frame() {
        let arena = Arena::of_chunks(16 * KIB, u64::MAX);
        std::thread::scope(|scope| {
            for thread in 0..if cfg!(miri) { 2 } else { 4_u64 } {
                let arena = &arena;
                scope.spawn(move || {
                    let mut rng = SmallRng::seed_from_u64(thread);
                    let mut live: Vec<Frame> = Vec::new();
                    for _ in 0..if cfg!(miri) { 40 } else { 3000 } {
                        if live.len() < 20 && rng.random() {
                            let mut frame = arena.zeroed(256 << rng.random_range(0..2_u32)).unwrap();
                            assert!(frame.iter().all(|x| x.to_bits() == 0));
                            fill_by_copies(&mut frame, thread as f32 + 1.0);
                            live.push(frame);
                        } else if !live.is_empty() {
                            let frame = live.swap_remove(rng.random_range(0..live.len()));
                            assert!(frame.iter().all(|x| *x == thread as f32 + 1.0));
                        }
                    }
                });
            }
        });
        assert!(arena.bytes() <= 16 * KIB as u64, "{} bytes without a frame", arena.bytes());
    }

    #[cfg(not(miri))]
    #[test]
    fn memory_that_the_system_refuses_is_an_error_and_takes_nothing() {
        let arena = Arena::new();
        assert!(arena.zeroed(1 << 55).is_err());
        assert_eq!(arena.bytes(), 0);
    }
}
