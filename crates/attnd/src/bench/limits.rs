//! What this machine can do at most, measured again around each case, because clocks drift.

use std::time::Duration;

use attnd_kernel::{Compute, Kernels, OutOfMemory, ReadArea};
use serde::{Deserialize, Serialize};

use super::case::{Bound, Team};
use super::threads::Pools;

/// Bytes that a pass of the bandwidth's calibration reads.
const READ_BYTES: usize = 256 << 20;
/// Such passes in one calibration.
const READ_PASSES: usize = 4;
/// Time that one calibration of the multiply-add rate takes.
const FMA_SPAN: Duration = Duration::from_millis(30);

/// One limit: the best that was seen in the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// `fma`, `bf16 dot` or `read`.
    pub what: String,
    /// Whose instructions were used.
    pub isa: String,
    /// Threads that worked at once.
    pub threads: usize,
    /// GFLOP/s or GB/s.
    pub rate: f64,
    /// Of the rate.
    pub unit: String,
}

/// Measures limits and remembers the best of each.
#[derive(Debug)]
pub struct Limits<'p> {
    pools: &'p Pools,
    areas: [ReadArea; 2],
    /// The fastest kernels: how fast memory can be read is a matter of the machine, not of the kernels of a case.
    reader: &'static Kernels,
    best: Vec<Limit>,
}

impl<'p> Limits<'p> {
    /// Reserves what the calibrations need.
    ///
    /// # Errors
    /// If the system refuses the memory.
    pub fn new(pools: &'p Pools) -> Result<Self, OutOfMemory> {
        let areas = [
            ReadArea::new(pools.of(Team::One), READ_BYTES)?,
            ReadArea::new(pools.of(Team::All), READ_BYTES)?,
        ];
        Ok(Self { pools, areas, reader: Kernels::available()[0], best: Vec::new() })
    }

    /// Measures a limit now, for the kernels, the arithmetic and the team of a case: GFLOP/s or GB/s.
    pub fn now(&mut self, bound: Bound, kernels: &Kernels, compute: Compute, team: Team) -> f64 {
        let pool = self.pools.of(team);
        let (what, isa, rate) = match bound {
            Bound::Fma => {
                let what = if compute == Compute::Bf16 { "bf16 dot" } else { "fma" };
                (what, kernels.isa(), kernels.peak_gflops(pool, compute, FMA_SPAN))
            }
            Bound::Read => {
                let area = &self.areas[usize::from(team == Team::All)];
                ("read", self.reader.isa(), self.reader.read_gb_per_second(pool, area, READ_PASSES))
            }
        };
        let threads = pool.current_num_threads();
        let known = |limit: &&mut Limit| {
            (limit.what.as_str(), limit.isa.as_str(), limit.threads) == (what, isa.name(), threads)
        };
        match self.best.iter_mut().find(known) {
            Some(limit) => limit.rate = limit.rate.max(rate),
            None => self.best.push(Limit {
                what: what.into(),
                isa: isa.name().into(),
                threads,
                rate,
                unit: bound.unit().into(),
            }),
        }
        rate
    }

    /// Measures every limit that a run with these kernels is about, whether or not a case needs it.
    pub fn all(&mut self, kernels: &[&Kernels]) {
        for team in [Team::One, Team::All] {
            for kernels in kernels {
                for compute in [Compute::F32, Compute::Bf16] {
                    let there = kernels.effective(compute, compute.storage().unwrap_or_default());
                    if there.is_ok_and(|effective| effective.instead_of().is_none()) {
                        self.now(Bound::Fma, kernels, compute, team);
                    }
                }
            }
            self.now(Bound::Read, self.reader, Compute::F32, team);
        }
    }

    /// The best of each limit, in the order in which they were first measured.
    pub fn best(self) -> Vec<Limit> {
        self.best
    }
}
