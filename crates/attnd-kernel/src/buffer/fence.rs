//! Buffers between inaccessible pages, for tests: an access past the fence ends the test run.
//!
//! Only one end can be exact to the byte, because protection counts in pages; tests run once for each.

use std::cell::Cell;
use std::ptr::NonNull;

use super::{Buffer, Origin};

/// Which end of a buffer touches the fence, to the byte. Such a buffer need not be aligned to a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    AtStart,
    AtEnd,
}

thread_local! {
    static FENCE: Cell<Option<Fence>> = const { Cell::new(None) };
}

/// Buffers of this thread are fenced for as long as it lives.
#[derive(Debug)]
pub(crate) struct Fenced(());

impl Fenced {
    pub(crate) fn buffers(at: Fence) -> Self {
        FENCE.set(Some(at));
        Self(())
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        FENCE.set(None);
    }
}

/// Whether buffers of this thread are fenced.
pub(super) fn is_up() -> bool {
    FENCE.get().is_some()
}

/// A fenced buffer of `len` zeros, if buffers of this thread are fenced.
pub(super) fn allocate(len: usize) -> Option<Buffer> {
    let at = FENCE.get()?;
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    assert!(page > 0, "the size of a page: {page}");
    let page = page as usize;
    let bytes = len * size_of::<f32>();
    // Emulators refuse to change the protection of nothing.
    let inner = bytes.max(1).next_multiple_of(page);
    let mapped = page + inner + page;
    // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches no memory in use; the range
    // whose protection is changed lies inside it.
    let base = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let base = libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(base, libc::MAP_FAILED, "a mapping of {mapped} bytes");
        let changed = libc::mprotect(base.byte_add(page), inner, libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(changed, 0, "access to {inner} bytes");
        base
    };
    let first = match at {
        Fence::AtStart => page,
        Fence::AtEnd => page + inner - bytes,
    };
    let start = NonNull::new(base.wrapping_byte_add(first).cast::<f32>())?;
    Some(Buffer { start, len, origin: Origin::Mapping { base, bytes: mapped } })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protection of the page at an address, as the kernel describes it.
    fn protection(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_line = |line: &str| {
            let (range, rest) = line.split_once(' ')?;
            let (from, to) = range.split_once('-')?;
            let range = usize::from_str_radix(from, 16).ok()?..usize::from_str_radix(to, 16).ok()?;
            range.contains(&address).then(|| rest[..4].to_owned())
        };
        maps.lines().find_map(of_line).unwrap()
    }

    #[test]
    fn a_fence_touches_the_first_or_the_last_element() {
        for len in [1, 1000, 1024, 5000] {
            for at in [Fence::AtStart, Fence::AtEnd] {
                let fenced = Fenced::buffers(at);
                let mut buffer = Buffer::zeroed(len).unwrap();
                drop(fenced);
                buffer.fill(1.0);
                let elements = buffer.as_ptr_range();
                let outside = match at {
                    Fence::AtStart => elements.start.addr() - 1,
                    Fence::AtEnd => elements.end.addr(),
                };
                assert_eq!(protection(outside), "---p", "{len} {at:?}");
                assert_eq!(protection(elements.start.addr()), "rw-p");
                assert_eq!(protection(elements.end.addr() - 1), "rw-p");
            }
        }
    }
}
