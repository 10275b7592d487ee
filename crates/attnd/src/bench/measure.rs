//! Runs a case and times it.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use attnd_kernel::{Kernels, core_ghz};

use super::case::Case;
use super::limits::Limits;
use super::operands::CaseOperands;
use super::threads::Pools;

/// Fewest runs that have a median worth printing.
const MIN_RUNS: usize = 5;

/// How often a case is run.
#[derive(Debug, Clone, Copy)]
pub enum Effort {
    /// This often.
    Runs(NonZeroUsize),
    /// As often as fits, and at least [`MIN_RUNS`] times.
    Span(Duration),
}

impl Effort {
    fn wants_more(self, runs: usize, since: Instant) -> bool {
        match self {
            Self::Runs(wanted) => runs < wanted.get(),
            Self::Span(span) => runs < MIN_RUNS || since.elapsed() < span,
        }
    }
}

/// Times of repeated runs, in seconds, ascending. Never empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Times(Vec<f64>);

impl Times {
    /// `None` if there are none.
    pub fn new(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_by(f64::total_cmp);
        (!seconds.is_empty()).then_some(Self(seconds))
    }

    /// How many there are.
    pub fn runs(&self) -> usize {
        self.0.len()
    }

    /// The time that a share `q` of the runs, 0 to 1, doesn't exceed.
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.0.len() - 1;
        self.0[(q * last as f64).round() as usize]
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The shortest.
    pub fn best(&self) -> f64 {
        self.0[0]
    }

    /// From the 10th to the 90th percentile, as a share of the median.
    pub fn spread(&self) -> f64 {
        (self.quantile(0.9) - self.quantile(0.1)) / self.median()
    }
}

/// A case, run.
#[derive(Debug, Clone)]
pub struct Measured {
    /// The times of its runs.
    pub times: Times,
    /// Its limit just before and just after, in the unit of its bound.
    pub limit: [f64; 2],
    /// The clock just after its last run, of the core of one of its threads, in GHz.
    pub core_ghz: Option<f64>,
}

/// Times a call, after one that isn't counted: it brings operands into caches and the clock up.
pub fn times(effort: Effort, mut call: impl FnMut()) -> Vec<f64> {
    call();
    let began = Instant::now();
    let mut seconds = Vec::new();
    while effort.wants_more(seconds.len(), began) {
        let start = Instant::now();
        call();
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds
}

/// Measures a case between two measurements of its limit. `None` if it wasn't run at all.
pub fn measure(
    case: &Case,
    operands: &CaseOperands,
    kernels: &Kernels,
    pools: &Pools,
    limits: &mut Limits<'_>,
    effort: Effort,
) -> Option<Measured> {
    let pool = pools.of(case.team);
    // Where the kernels lack a case's dot products it runs in f32, and is held against that.
    let compute = kernels.effective(case.compute, case.storage).ok()?;
    let before = limits.now(case.bound(), kernels, compute.compute(), case.team);
    let operator = case.operator().ok()?;
    let seconds = times(effort, || operands.attend(case, &operator, compute, kernels, pool));
    let core_ghz = pool.install(core_ghz);
    let after = limits.now(case.bound(), kernels, compute.compute(), case.team);
    Some(Measured { times: Times::new(seconds)?, limit: [before, after], core_ghz })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads_ignore_the_order_of_runs() {
        let times = Times::new(vec![3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]).unwrap();
        assert_eq!((times.best(), times.median(), times.runs()), (1.0, 6.0, 11));
        assert_eq!(times.spread(), (10.0 - 2.0) / 6.0);
        assert_eq!(Times::new(vec![2.0]).unwrap().spread(), 0.0);
        assert_eq!(Times::new(Vec::new()), None);
    }

    #[test]
    fn a_number_of_runs_is_kept_to_and_a_short_span_still_has_enough() {
        let count = |effort| {
            let mut calls = 0;
            let timed = times(effort, || calls += 1).len();
            assert_eq!(calls, timed + 1, "one run is not counted");
            timed
        };
        assert_eq!(count(Effort::Runs(NonZeroUsize::new(3).unwrap())), 3);
        assert_eq!(count(Effort::Span(Duration::ZERO)), MIN_RUNS);
    }
}
