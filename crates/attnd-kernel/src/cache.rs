//! Size of the first-level data cache, which decides how many queries a tile takes.

/// Bytes of a core's first-level data cache, where the CPU tells. Miri has none, and no instruction to ask it with.
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) fn first_level_bytes() -> Option<usize> {
    use std::arch::x86_64::__cpuid_count;
    /// Cache topology: Intel's leaf and AMD's; both fill the registers in the same way.
    const LEAVES: [u32; 2] = [0x4, 0x8000_001d];
    for leaf in LEAVES {
        let highest = __cpuid_count(leaf & 0x8000_0000, 0).eax;
        if highest < leaf {
            continue;
        }
        for index in 0..8 {
            let cache = __cpuid_count(leaf, index);
            let (kind, level) = (cache.eax & 0x1f, cache.eax >> 5 & 0x7);
            if kind == 1 && level == 1 {
                let ways = (cache.ebx >> 22) + 1;
                let partitions = (cache.ebx >> 12 & 0x3ff) + 1;
                let line = (cache.ebx & 0xfff) + 1;
                let sets = cache.ecx + 1;
                return [ways, partitions, line, sets].iter().try_fold(1_usize, |product, factor| {
                    product.checked_mul(usize::try_from(*factor).ok()?)
                });
            }
        }
    }
    None
}

#[cfg(all(test, target_arch = "x86_64", not(miri)))]
mod tests {
    #[test]
    fn the_cache_has_a_size_that_caches_have() {
        if let Some(bytes) = super::first_level_bytes() {
            assert!((8 << 10..=1 << 20).contains(&bytes) && bytes % 4096 == 0, "{bytes}");
        } else {
            eprintln!("SKIPPED: this CPU doesn't tell the size of its caches");
        }
    }
}
