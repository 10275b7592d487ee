//! How weights are written, in pictures and in tables.

/// In what weights are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightUnit {
    /// As percents of a row, which sums to 1.
    #[default]
    Percent,
    /// As they are, where a row sums to anything.
    Plain,
}

impl WeightUnit {
    /// A weight with so many digits behind a percent's point, or two significant ones more: sigmoids may all be tiny.
    pub fn with_digits(self, weight: f64, digits: usize) -> String {
        match self {
            Self::Percent => format!("{:.digits$} %", 100.0 * weight),
            Self::Plain => significant(weight, digits + 2),
        }
    }

    /// A weight for a person. What is too small for two digits of a percent is no zero.
    pub fn short(self, weight: f64) -> String {
        match self {
            Self::Percent if weight > 0.0 && weight < 5e-5 => "<0.01 %".into(),
            _ => self.with_digits(weight, 2),
        }
    }
}

/// A number with so many significant digits, by its power of ten where it is below 1e-4.
fn significant(number: f64, digits: usize) -> String {
    if number == 0.0 || !number.is_finite() {
        return number.to_string();
    }
    let (exponent, behind_first) = (number.abs().log10().floor() as i32, digits.saturating_sub(1));
    if exponent < -4 {
        return format!("{number:.behind_first$e}");
    }
    let decimals = usize::try_from(behind_first as i32 - exponent).unwrap_or(0);
    format!("{number:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_tell_shares_and_plain_numbers_what_they_are() {
        let both = |weight| [WeightUnit::Percent, WeightUnit::Plain].map(|unit| unit.short(weight));
        assert_eq!(both(0.50553), ["50.55 %", "0.5055"]);
        assert_eq!(both(2.5), ["250.00 %", "2.500"]);
        assert_eq!(both(1e-9), ["<0.01 %", "1.000e-9"]);
        assert_eq!(both(0.0), ["0.00 %", "0"]);
        let plain = |weight| WeightUnit::Plain.short(weight);
        assert_eq!([1.25e-5, 1.26e-5, 2.5e-4].map(plain), ["1.250e-5", "1.260e-5", "0.0002500"]);
        assert_eq!([123.456, 98_765.0, f64::NAN].map(plain), ["123.5", "98765", "NaN"]);
        assert_eq!(WeightUnit::Plain.with_digits(0.05 * 2e-5, 1), "1.00e-6");
        assert_eq!(WeightUnit::Percent.with_digits(0.1234, 1), "12.3 %");
        assert_eq!(WeightUnit::Plain.with_digits(0.1234, 1), "0.123");
    }
}
