//! Zeroed f32 memory for KV pages and scratch: 64-byte aligned, in huge pages where it is large.
//!
//! Written by hand because no kept crate gives both properties: decoding from 4 KiB pages costs a third of the
//! memory bandwidth, and the kernels load whole cache lines.

#[cfg(all(test, target_os = "linux", not(miri)))]
pub(crate) mod fence;

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A cache line, and the widest vector.
const LINE: usize = 64;
/// Bytes of the smallest allocation. Under Miri allocations end with what was asked for, so that no access behind it is missed.
const LEAST: usize = if cfg!(miri) { 1 } else { LINE };
/// Buffers of at least this many bytes are aligned to it and advised to use huge pages.
#[cfg(all(target_os = "linux", not(miri)))]
const HUGE_PAGE: usize = 2 << 20;

/// Owned, zero-initialised f32s. The length never changes.
pub(crate) struct Buffer {
    start: NonNull<f32>,
    len: usize,
    origin: Origin,
}

/// Where the memory came from, and so how it goes back.
#[derive(Clone, Copy)]
enum Origin {
    Allocator(Layout),
    #[cfg(all(target_os = "linux", not(miri)))]
    Mapping {
        base: *mut libc::c_void,
        bytes: usize,
    },
}

// SAFETY: a Buffer owns its memory alone, as a Box<[f32]> does.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

/// Memory that the system refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for {bytes} bytes")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: u64,
}

impl Buffer {
    /// Allocates `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Result<Self, OutOfMemory> {
        let refused = OutOfMemory { bytes: (len as u64).saturating_mul(4) };
        let bytes =
            len.checked_mul(size_of::<f32>()).filter(|b| *b <= isize::MAX as usize / 2).ok_or(refused)?;
        #[cfg(all(test, target_os = "linux", not(miri)))]
        if let Some(fenced) = fence::allocate(len) {
            return Ok(fenced);
        }
        #[cfg(all(target_os = "linux", not(miri)))]
        if bytes >= HUGE_PAGE {
            return Self::mapped(len, bytes).ok_or(refused);
        }
        let layout = Layout::from_size_align(bytes.max(LEAST), LINE).map_err(|_too_large| refused)?;
        // SAFETY: the layout's size is at least LEAST, which isn't 0.
        let memory = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(memory.cast::<f32>()).ok_or(refused)?;
        Ok(Self { start, len, origin: Origin::Allocator(layout) })
    }

    /// Allocates `len` zeros, in nothing but huge pages where they fill whole ones; else as [`Self::zeroed`]. For buffers of which there are many. To the system
    /// they are one mapping where they lie side by side, and the number of mappings is limited.
    pub(crate) fn in_huge_pages(len: usize) -> Result<Self, OutOfMemory> {
        #[cfg(all(target_os = "linux", not(miri)))]
        if let Some(bytes) =
            len.checked_mul(size_of::<f32>()).filter(|bytes| *bytes <= isize::MAX as usize / 2)
            && bytes > 0
            && bytes.is_multiple_of(HUGE_PAGE)
            && !Self::are_fenced()
        {
            return Self::packed(len, bytes).ok_or(OutOfMemory { bytes: bytes as u64 });
        }
        Self::zeroed(len)
    }

    /// Whether a test wants this thread's buffers between fences.
    #[cfg(all(target_os = "linux", not(miri)))]
    fn are_fenced() -> bool {
        #[cfg(test)]
        return fence::is_up();
        #[cfg(not(test))]
        false
    }

    /// The first address of a fresh mapping of so many bytes, all zeros.
    #[cfg(all(target_os = "linux", not(miri)))]
    fn map(bytes: usize) -> Option<*mut libc::c_void> {
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (base != libc::MAP_FAILED).then_some(base)
    }

    /// Maps whole huge pages and nothing else.
    #[cfg(all(target_os = "linux", not(miri)))]
    fn packed(len: usize, bytes: usize) -> Option<Self> {
        let base = Self::map(bytes + HUGE_PAGE)?;
        // The last place that is aligned: Linux maps downwards, so that the next one ends where this one begins.
        let memory = base.map_addr(|address| (address + HUGE_PAGE) / HUGE_PAGE * HUGE_PAGE);
        let before = memory.addr() - base.addr();
        for (rest, bytes) in [(base, before), (memory.wrapping_byte_add(bytes), HUGE_PAGE - before)]
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
        {
            // SAFETY: both ranges lie inside the mapping that was just made and outside of what is kept of it; nothing points
            // there. If the system refuses, addresses stay taken that no memory is behind.
            let _refused = unsafe { libc::munmap(rest, bytes) };
        }
        // SAFETY: the range is what is kept of the mapping, and the advice changes no contents. A refusal costs speed.
        let _refused = unsafe { libc::madvise(memory, bytes, libc::MADV_HUGEPAGE) };
        let start = NonNull::new(memory.cast::<f32>())?;
        Some(Self { start, len, origin: Origin::Mapping { base: memory, bytes } })
    }

    /// How many there are. Makes no slice of the buffer to tell.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The first element. Who hands out parts of the buffer makes them of this pointer, and no slice of the whole while
    /// they are in use.
    pub(crate) fn start(&self) -> NonNull<f32> {
        self.start
    }

    /// Maps anonymous memory. The allocator is no use here: it clears aligned memory by writing to it, and the pages
    /// are 4 KiB by then.
    #[cfg(all(target_os = "linux", not(miri)))]
    fn mapped(len: usize, bytes: usize) -> Option<Self> {
        let whole = bytes.next_multiple_of(HUGE_PAGE);
        let mapped = whole + HUGE_PAGE;
        let base = Self::map(mapped)?;
        // Never the first byte: huge pages below would become one mapping with these.
        let memory = base.map_addr(|address| (address + 1).next_multiple_of(HUGE_PAGE));
        // What does not fill a huge page stays in small ones, so that a buffer takes the memory that was asked for: its
        // bytes are what a worker reserves.
        let huge = bytes / HUGE_PAGE * HUGE_PAGE;
        // SAFETY: `memory` is at most HUGE_PAGE bytes past the mapping's first, so both ranges, `whole` bytes from there, lie
        // inside the mapping, and the advice changes no contents. A refusal costs speed or memory and nothing else.
        let _refused = unsafe {
            libc::madvise(memory, huge, libc::MADV_HUGEPAGE)
                | libc::madvise(memory.byte_add(huge), whole - huge, libc::MADV_NOHUGEPAGE)
        };
        let start = NonNull::new(memory.cast::<f32>())?;
        Some(Self { start, len, origin: Origin::Mapping { base, bytes: mapped } })
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: start points at len initialised f32s that live as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in deref, and &mut self makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.origin {
            // SAFETY: the memory came from alloc_zeroed with this layout and is freed once.
            Origin::Allocator(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
            #[cfg(all(target_os = "linux", not(miri)))]
            Origin::Mapping { base, bytes } => {
                // SAFETY: the range is what is kept of a mapping that was made for this buffer alone, and no borrow of it is left.
                let is_refused = unsafe { libc::munmap(base, bytes) } != 0;
                if is_refused {
                    // It lies in the middle of what is one mapping to the system, which has too many to make two of it. Giving
                    // up the memory needs no other mapping; the addresses stay taken.
                    // SAFETY: the same range, which nothing points to any more.
                    let _refused = unsafe { libc::madvise(base, bytes, libc::MADV_DONTNEED) };
                }
            }
        }
    }
}

/// Fills memory by doubling what is filled: an interpreter copies at once, and takes a millisecond for a word of a loop.
#[cfg(test)]
pub(crate) fn fill_by_copies(words: &mut [f32], word: f32) {
    if let Some(first) = words.first_mut() {
        *first = word;
    }
    let mut filled = 1;
    while filled < words.len() {
        let more = filled.min(words.len() - filled);
        words.copy_within(..more, filled);
        filled += more;
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_aligned_and_writable() {
        let large = if cfg!(miri) { 4099 } else { 2 << 20 };
        for len in [0, 1, 1000, large / 4, large / 2 + 3] {
            let mut buffer = Buffer::zeroed(len).unwrap();
            assert_eq!(buffer.as_ptr() as usize % LINE, 0);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|x| x.to_bits() == 0));
            buffer.fill(1.0);
        }
    }

    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    fn buffers_in_huge_pages_are_zero_aligned_and_go_back_alone() {
        let len = HUGE_PAGE / 4;
        let mut buffers: Vec<Buffer> = (1..=6).map(|n| Buffer::in_huge_pages(n * len).unwrap()).collect();
        for (n, buffer) in buffers.iter_mut().enumerate() {
            assert!(buffer.as_ptr().addr().is_multiple_of(HUGE_PAGE) && buffer.len() == (n + 1) * len);
            assert!(buffer.iter().all(|x| x.to_bits() == 0));
            buffer.fill(n as f32);
        }
        // The others stay as they are, on whichever side of it they lie.
        for n in [3, 0, 4] {
            buffers.remove(n.min(buffers.len() - 1));
            for buffer in &buffers {
                let n = (buffer.len() / len - 1) as f32;
                assert!(buffer.iter().all(|x| *x == n));
            }
        }
    }

    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    fn a_buffer_takes_the_memory_that_was_asked_for() {
        // Just over one huge page, which rounding up would make two.
        let mut buffer = Buffer::zeroed((HUGE_PAGE + 8192) / 4).unwrap();
        buffer.fill(1.0);
        let start = buffer.as_ptr() as usize;
        let resident =
            |line: &str| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok();
        let (mut inside, mut total) = (false, 0);
        for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bounds =
                range.map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)));
            if let Some((Ok(from), Ok(to))) = bounds {
                inside = start < to && from < start + HUGE_PAGE + 8192;
            }
            total += resident(line).filter(|_| inside).unwrap_or(0);
        }
        assert!((HUGE_PAGE / 1024 + 8..HUGE_PAGE / 1024 + 256).contains(&total), "{total} kB");
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(Buffer::zeroed(usize::MAX / 8).is_err());
        assert!(Buffer::in_huge_pages(usize::MAX / 8).is_err());
        assert!(Buffer::in_huge_pages(1 << 60).is_err());
    }
}
