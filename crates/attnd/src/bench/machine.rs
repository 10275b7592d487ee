//! Which machine this is and how busy it is, as far as the system says.

use std::fs;

/// The CPU's name, such as `AMD EPYC 9754`; `unknown` where the system doesn't say.
pub fn cpu_model() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    model_in(&cpuinfo).unwrap_or_else(|| "unknown".into())
}

/// Family, model and stepping make the name one: virtual machines like to shorten it. On aarch64 the part's number is
/// all there is.
fn model_in(cpuinfo: &str) -> Option<String> {
    let value = |key: &str| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
    };
    if let Some(name) = value("model name") {
        let [family, model, stepping] =
            ["cpu family", "model", "stepping"].map(|key| value(key).unwrap_or_else(|| "?".into()));
        return Some(format!("{name} (family {family}, model {model}, stepping {stepping})"));
    }
    Some(format!("implementer {} part {}", value("CPU implementer")?, value("CPU part")?))
}

/// Load averages over 1, 5 and 15 minutes; `None` where the system doesn't say.
pub fn load_average() -> Option<[f64; 3]> {
    load_in(&fs::read_to_string("/proc/loadavg").ok()?)
}

fn load_in(loadavg: &str) -> Option<[f64; 3]> {
    let mut numbers = loadavg.split_whitespace().map_while(|word| word.parse().ok());
    Some([numbers.next()?, numbers.next()?, numbers.next()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_told_apart() {
        let x86 = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nstepping\t: 1\n";
        assert_eq!(model_in(x86).unwrap(), "AMD EPYC (family 26, model 2, stepping 1)");
        let arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n";
        assert_eq!(model_in(arm).unwrap(), "implementer 0x41 part 0xd0c");
        assert_eq!(model_in(""), None);
    }

    #[test]
    fn load_is_three_numbers() {
        assert_eq!(load_in("0.20 0.18 1.5 1/80 11206\n"), Some([0.2, 0.18, 1.5]));
        assert_eq!(load_in("0.20"), None);
    }
}
