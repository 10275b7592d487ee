//! Random compositions of everything that an operator can hold, in process: each against the oracle, which reads the parts in its own way; many
//! cut among nodes, and by every instruction set that there is.

mod case;
mod compute;
mod faults;

use attnd_kernel::reference::operator::OperatorRow;
use attnd_kernel::{EmptyRow, Kernels};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use self::case::Case;
use self::compute::{Rows, attend, attend_cut, differing_bits};

const COMPOSITIONS: u64 = 5000;

/// What each row should be, ordered `[batch, head, token]`.
fn oracle(case: &Case) -> Vec<OperatorRow> {
    let (shape, problem) = (case.shape, case.problem());
    let mut rows: Vec<Option<OperatorRow>> = vec![None; shape.batch() * shape.n_heads() * shape.n_queries()];
    for batch in 0..shape.batch() {
        for token in 0..shape.n_queries() {
            let formula = problem.formula(batch, token);
            for head in 0..shape.n_heads() {
                let at = (batch * shape.n_heads() + head) * shape.n_queries() + token;
                rows[at] = Some(formula.row(batch, head, token));
            }
        }
    }
    rows.into_iter().flatten().collect()
}

/// The worst error over the bound, with the row that has it.
fn worst_ratio(wanted: &[OperatorRow], got: &Rows, value_dim: usize) -> (f64, usize) {
    assert_eq!(wanted.len(), got.lse.len());
    let rows = wanted.iter().zip(got.context.chunks_exact(value_dim)).zip(&got.lse).enumerate();
    let ratios = rows.map(|(row, ((wanted, context), lse))| (wanted.worst_ratio(context, *lse), row));
    ratios.fold((0.0, 0), |worst, ratio| if ratio.0 > worst.0 { ratio } else { worst })
}

/// Fills the keys that no row sees with what must not be felt.
fn poisoned(case: &Case, wanted: &[OperatorRow]) -> Case {
    let (shape, mut case) = (case.shape, case.clone());
    let rows_of_group = shape.group_size() * shape.n_queries();
    for (group, rows) in wanted.chunks_exact(rows_of_group).enumerate() {
        for key in 0..shape.n_keys() {
            if rows.iter().all(|row| row.stages.masked[key] == f64::NEG_INFINITY) {
                let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38][key % 4];
                let at = group * shape.n_keys() + key;
                case.k[at * shape.head_dim()..][..shape.head_dim()].fill(bad);
                // The mean of uniform rows is that of all values.
                if case.parts.empty_row != EmptyRow::Uniform {
                    case.v[at * shape.value_dim()..][..shape.value_dim()].fill(bad);
                }
            }
        }
    }
    case
}

/// What is wrong with a composition, if anything is.
fn complaint(case: &Case, seed: u64) -> Option<String> {
    let wanted = oracle(case);
    let case = &poisoned(case, &wanted);
    let all = Kernels::available();
    let kernels = all[seed as usize % all.len()];
    let got = match attend(case, kernels) {
        Ok(rows) => rows,
        Err(overflow) => return Some(format!("{}: {overflow}", kernels.isa())),
    };
    let (worst, row) = worst_ratio(&wanted, &got, case.shape.value_dim());
    // False for NaN.
    let is_inside = worst <= 1.0;
    if !is_inside {
        let dv = case.shape.value_dim();
        let (context, lse) = (&got.context[row * dv..][..dv], got.lse[row]);
        let (want, want_lse) = (&wanted[row].context, wanted[row].lse);
        return Some(format!(
            "{}: row {row} is {worst} times the bound off: {context:?} lse {lse}, not {want:?} lse {want_lse}",
            kernels.isa()
        ));
    }
    if seed.is_multiple_of(50) {
        let cuts = case::random_cuts(&mut SmallRng::seed_from_u64(seed));
        if let Some(difference) = differing_bits(&got, &attend_cut(case, &all, &cuts)) {
            return Some(format!("cut at slots {cuts:?}: {difference}"));
        }
    }
    if seed.is_multiple_of(20) {
        for other in all {
            let difference = attend(case, other).map(|rows| differing_bits(&got, &rows));
            if difference != Ok(None) {
                return Some(format!("{} and {}: {difference:?}", kernels.isa(), other.isa()));
            }
        }
    }
    None
}

/// The composition without the parts that a complaint doesn't need.
fn minimal(case: &Case, seed: u64) -> Case {
    let mut case = case.clone();
    for remove in faults::REMOVALS {
        let mut without = case.clone();
        if remove(&mut without) && without.is_possible() && complaint(&without, seed).is_some() {
            case = without;
        }
    }
    case
}

#[test]
fn compositions_are_their_formulas() {
    let wrong = (0..COMPOSITIONS).into_par_iter().find_map_first(|seed| {
        let case = Case::random(seed);
        complaint(&case, seed).map(|what| {
            let least = minimal(&case, seed);
            let of_least = complaint(&least, seed).unwrap_or_default();
            format!("seed {seed}: {what}\nof {case}\nleast: {of_least}\nof {least}")
        })
    });
    assert_eq!(wrong, None, "{}", wrong.as_deref().unwrap_or_default());
}

/// The draw must reach what it is there for: every part alone in many cases, and pairs of them.
#[test]
fn compositions_hold_everything_there_is() {
    let cases: Vec<Vec<&str>> = (0..COMPOSITIONS).map(|seed| Case::random(seed).names()).collect();
    let (mut missing, mut all) = (Vec::new(), Vec::new());
    for name in cases.iter().flatten() {
        if !all.contains(name) {
            all.push(*name);
        }
    }
    for (nth, one) in all.iter().enumerate() {
        for other in &all[nth..] {
            let both = cases.iter().filter(|names| names.contains(one) && names.contains(other)).count();
            if both < 10 && !case::exclude_each_other(one, other) {
                missing.push(format!("{one} with {other}: {both} times"));
            }
        }
    }
    assert_eq!(all.len(), case::NAMES.len(), "{all:?}");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Implementations that are wrong in one way are outside of the bound on many compositions.
#[test]
fn compositions_tell_every_wrong_implementation() {
    for (what, fault) in faults::FAULTS {
        let mut rng = SmallRng::seed_from_u64(7);
        let (mut tried, mut seen) = (0, 0);
        while seen < 8 && tried < 3000 {
            tried += 1;
            let case = Case::random(rng.random_range(0..COMPOSITIONS));
            let Some(got) = fault(&case) else { continue };
            let (worst, _) = worst_ratio(&oracle(&case), &got, case.shape.value_dim());
            seen += usize::from(worst > 10.0);
        }
        assert_eq!(seen, 8, "{what}: outside of the bound on {seen} of {tried} compositions");
    }
}
