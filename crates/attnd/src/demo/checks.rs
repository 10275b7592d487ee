//! The demo's verdicts. Each compares an answer with something that did not come from the cluster; a NaN, a missing
//! row or a row too many fails.

use serde::Serialize;

use super::input::{Case, Stored};

/// Context and lse of one call, as the cluster answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// `[heads, queries, value_dim]`.
    pub context: Vec<f32>,
    /// `[heads, queries]`.
    pub lse: Vec<f32>,
}

/// One verdict.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// Whether it holds.
    pub passed: bool,
    /// The numbers.
    pub detail: String,
}

/// Compares every row that has an f64 reference with it, under the bound of the numerics.
pub fn against_reference(case: &Case, answers: &[Answer]) -> Check {
    let shape = &case.operands.shape;
    let (rows, dv) = (shape.n_heads() * shape.n_queries(), shape.value_dim());
    let mut ratios = Vec::new();
    for answer in answers {
        if answer.lse.len() != rows || answer.context.len() != rows * dv {
            ratios.push(f64::INFINITY);
            continue;
        }
        ratios.extend(case.reference.iter().map(|at| {
            let row = at.head * shape.n_queries() + at.token;
            at.row.worst_ratio(&answer.context[row * dv..][..dv], answer.lse[row])
        }));
    }
    // Ordered by `total_cmp`, a NaN is the largest and fails; `f64::max` would swallow it.
    let worst = ratios.into_iter().max_by(f64::total_cmp);
    Check {
        name: format!("{}: f64 reference", case.name),
        passed: worst.is_some_and(|worst| worst <= 1.0),
        detail: match worst {
            Some(worst) if worst.is_finite() => {
                format!("{} rows, largest error {:.1} % of the bound", case.reference.len(), 100.0 * worst)
            }
            _ => "NaN, or not the rows of its shape".into(),
        },
    }
}

/// Compares with what the model's own attention computed in f32. Both are within the bound of the exact result, so they
/// are within two bounds of each other.
pub fn against_stored(case: &Case, stored: &Stored, answers: &[Answer]) -> Check {
    let (mut largest, mut passed) = (0.0_f64, !answers.is_empty());
    for answer in answers {
        passed &= answer.context.len() == stored.context.len() && answer.lse.len() == stored.lse.len();
        let pairs = answer.context.iter().zip(&stored.context).chain(answer.lse.iter().zip(&stored.lse));
        let bounds = case.reference.iter().flat_map(|at| at.row.expected.context.iter());
        let bounds = bounds.chain(case.reference.iter().map(|at| &at.row.expected.lse));
        let mut compared = 0;
        for ((got, want), bound) in pairs.zip(bounds) {
            let difference = (f64::from(*got) - f64::from(*want)).abs();
            passed &= difference <= 2.0 * bound;
            largest = largest.max(difference);
            compared += 1;
        }
        passed &= compared == stored.context.len() + stored.lse.len();
    }
    Check {
        name: format!("{}: the model's own context and lse", case.name),
        passed,
        detail: format!(
            "{} values, largest difference {largest:.1e}",
            stored.context.len() + stored.lse.len()
        ),
    }
}

/// Compares every bit of every answer with the first one's.
pub fn same_bits(case: &Case, workers: &[usize], answers: &[Answer]) -> Check {
    let bits =
        |answer: &Answer| answer.context.iter().chain(&answer.lse).map(|x| x.to_bits()).collect::<Vec<_>>();
    let first = answers.first().map(bits).unwrap_or_default();
    let different: Vec<String> = answers
        .iter()
        .zip(workers)
        .filter(|(answer, _)| bits(answer) != first)
        .map(|(_, workers)| workers.to_string())
        .collect();
    let name = format!("{}: equal bits", case.name);
    if different.is_empty() {
        let detail = format!("{} values, {} runs, 0 bits differ", first.len(), answers.len());
        Check { name, passed: !first.is_empty(), detail }
    } else {
        let detail = format!("differs from the first run with {} workers", different.join(", "));
        Check { name, passed: false, detail }
    }
}

/// A short name for the bits of an answer (64-bit FNV-1a); for people to compare, the check compares all bits.
pub fn digest(answer: &Answer) -> String {
    let bytes = answer.context.iter().chain(&answer.lse).flat_map(|x| x.to_bits().to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::input;

    /// A case and the answer that its file has stored, which is right.
    fn layer() -> (Case, Answer) {
        let [case, _] = input::layers().unwrap();
        let stored = case.stored.as_ref().unwrap();
        let answer = Answer { context: stored.context.clone(), lse: stored.lse.clone() };
        (case, answer)
    }

    fn verdicts(case: &Case, answer: &Answer) -> [bool; 2] {
        let answers = std::slice::from_ref(answer);
        let stored = case.stored.as_ref().unwrap();
        [against_reference(case, answers).passed, against_stored(case, stored, answers).passed]
    }

    #[test]
    fn a_right_answer_passes() {
        let (case, answer) = layer();
        assert_eq!(verdicts(&case, &answer), [true, true]);
    }

    #[test]
    fn every_way_of_being_wrong_fails() {
        let (case, right) = layer();
        let spoil: [fn(&mut Answer); 6] = [
            |a| a.context[70_000] += 1e-3,
            |a| a.context[5] = f32::NAN,
            |a| a.lse[2_000] += 1e-3,
            |a| a.lse[7] = f32::NEG_INFINITY,
            |a| a.context.truncate(a.context.len() - 1),
            |a| a.lse.push(0.0),
        ];
        for (i, spoil) in spoil.into_iter().enumerate() {
            let mut wrong = right.clone();
            spoil(&mut wrong);
            assert_eq!(verdicts(&case, &wrong), [false, false], "case {i}");
        }
        assert!(!against_reference(&case, &[]).passed);
        assert!(!against_stored(&case, case.stored.as_ref().unwrap(), &[]).passed);
    }

    #[test]
    fn one_bit_is_enough_to_differ_and_to_change_the_digest() {
        let (case, right) = layer();
        let mut other = right.clone();
        other.lse[3] = f32::from_bits(other.lse[3].to_bits() ^ 1);
        assert!(same_bits(&case, &[1, 2], &[right.clone(), right.clone()]).passed);
        let check = same_bits(&case, &[1, 2], &[right.clone(), other.clone()]);
        assert!(!check.passed && check.detail.contains("with 2 workers"), "{}", check.detail);
        assert_ne!(digest(&right), digest(&other));
        assert!(!same_bits(&case, &[], &[]).passed);
    }
}
