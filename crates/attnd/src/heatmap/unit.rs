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
    /// A weight with so many digits of a percent, or as many of itself.
    pub fn with_digits(self, weight: f64, digits: usize) -> String {
        match self {
            Self::Percent => format!("{:.digits$} %", 100.0 * weight),
            Self::Plain => format!("{weight:.0$}", digits + 2),
        }
    }

    /// A weight for a person. What is too small for two digits is no zero.
    pub fn short(self, weight: f64) -> String {
        match self {
            Self::Percent if weight > 0.0 && weight < 5e-5 => "<0.01 %".into(),
            Self::Plain if weight > 0.0 && weight < 5e-5 => "<0.0001".into(),
            _ => self.with_digits(weight, 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_and_plain_numbers_tell_the_same_digits() {
        let both = |weight| [WeightUnit::Percent, WeightUnit::Plain].map(|unit| unit.short(weight));
        assert_eq!(both(0.50553), ["50.55 %", "0.5055"]);
        assert_eq!(both(2.5), ["250.00 %", "2.5000"]);
        assert_eq!(both(1e-9), ["<0.01 %", "<0.0001"]);
        assert_eq!(both(0.0), ["0.00 %", "0.0000"]);
        assert_eq!(WeightUnit::Percent.with_digits(0.1234, 1), "12.3 %");
        assert_eq!(WeightUnit::Plain.with_digits(0.1234, 1), "0.123");
    }
}
