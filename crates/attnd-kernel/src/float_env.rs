//! The floating-point environment that the canonical order assumes: round to nearest, subnormals on.
//!
//! Libraries built with `-ffast-math` switch flush-to-zero on for the thread that loads them, and threads inherit it.
//! Results would then differ in bits from those of other workers, silently. So every entry that computes looks at the
//! control register (a few cycles), and puts the default in place where it isn't.

/// The default environment, for as long as it lives; then what was there before.
#[derive(Debug)]
pub(crate) struct FloatEnvironment {
    before: Option<u64>,
}

impl FloatEnvironment {
    /// Makes sure of the default environment on this thread.
    pub(crate) fn standard() -> Self {
        let before = control::read();
        if before & control::MODES == control::STANDARD & control::MODES {
            return Self { before: None };
        }
        control::write((before & !control::MODES) | (control::STANDARD & control::MODES));
        Self { before: Some(before) }
    }
}

impl Drop for FloatEnvironment {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            control::write(before);
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod control {
    use std::arch::asm;

    /// MXCSR: denormals-are-zero, rounding control, flush-to-zero. The exception masks and flags are left alone.
    pub(super) const MODES: u64 = 0x0040 | 0x6000 | 0x8000;
    pub(super) const STANDARD: u64 = 0x1f80;
    #[cfg(test)]
    pub(super) const FLUSHING: u64 = 0x8040;

    pub(super) fn read() -> u64 {
        let mut value = 0_u32;
        // SAFETY: every x86-64 has MXCSR; the instruction stores four bytes where `value` is.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
        value.into()
    }

    pub(super) fn write(value: u64) {
        let value = value as u32;
        // SAFETY: the value is one that was read, with defined mode bits changed, so no reserved bit is set. Only this
        // module calls it: to return to the environment that Rust assumes, or to what the caller came with.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
    }
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
mod control {
    use std::arch::asm;

    /// FPCR: flush-to-zero of half and single precision, rounding mode, default NaN.
    pub(super) const MODES: u64 = (1 << 19) | (0b11 << 22) | (1 << 24) | (1 << 25);
    pub(super) const STANDARD: u64 = 0;
    #[cfg(test)]
    pub(super) const FLUSHING: u64 = 1 << 24;

    pub(super) fn read() -> u64 {
        let value: u64;
        // SAFETY: reads a register that every aarch64 has and user code may read.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }

    pub(super) fn write(value: u64) {
        // SAFETY: a value that was read with mode bits changed; see the x86-64 twin.
        unsafe { asm!("msr fpcr, {}", in(reg) value, options(nostack, preserves_flags)) };
    }
}

#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod control {
    pub(super) const MODES: u64 = 0;
    pub(super) const STANDARD: u64 = 0;

    pub(super) fn read() -> u64 {
        STANDARD
    }

    pub(super) fn write(_value: u64) {}
}

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
mod tests {
    use super::*;
    use crate::{Kernels, PartialRows};

    #[test]
    fn a_thread_that_flushes_to_zero_gets_the_same_bits_and_keeps_its_mode() {
        // Dividing 2e-38 by 4 gives a subnormal.
        let partial = PartialRows { value_dim: 32, m: vec![0.0], l: vec![4.0], o: vec![2e-38; 32] };
        for kernels in Kernels::available() {
            let expected = partial.clone().finish(kernels);
            assert!(expected.context[0] > 0.0);
            let flushing = control::STANDARD | control::FLUSHING;
            control::write(flushing);
            let got = partial.clone().finish(kernels);
            let after = control::read();
            control::write(control::STANDARD);
            assert_eq!(after & control::MODES, flushing & control::MODES);
            assert_eq!(got, expected, "{}", kernels.isa());
        }
    }
}
