//! The flags that say what relates a query to a key, and what that is given.

use std::ffi::OsStr;

use attnd_kernel::{FUNCTIONS, Function};
use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Args, Command};

use super::values::parse_finite;
use crate::tensor_file::Source;

/// A score function, its parameters, and what it looks at.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct FunctionArgs {
    /// What relates a query to a key; `attnd scores` has formulas and parameters. Queries may have another dim than keys
    /// where the function takes them [default: scaled_dot]
    #[arg(long, value_name = "NAME", value_parser = FunctionName)]
    pub score: Option<String>,
    /// A parameter of it, f32, f16, bf16 or f64, or the number itself where it is one: beta=2.5; given again for each
    #[arg(long, value_name = "NAME=SRC", value_parser = parse_param)]
    pub param: Vec<Param>,
    /// The weights that each row had before, `[batch, heads, queries, keys]` or its last dimensions, each but keys may be 1,
    /// for a function that looks at them, such as location_aware
    #[arg(long, value_name = "SRC")]
    pub previous: Option<Source>,
}

/// A parameter of a score function, as typed.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Which one.
    pub name: String,
    /// What it is.
    pub value: ParamValue,
}

/// What a parameter is, as typed.
#[derive(Debug, Clone, PartialEq)]
pub enum ParamValue {
    /// One number.
    Number(f32),
    /// From a file.
    File(Source),
}

impl FunctionArgs {
    /// The files that it reads, each with its flag.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let params = self.param.iter().filter_map(|param| match &param.value {
            ParamValue::Number(_) => None,
            ParamValue::File(source) => Some(("--param", source)),
        });
        params.chain(self.previous.iter().map(|source| ("--previous", source)))
    }
}

/// Names of score functions, those of the kernels.
#[derive(Debug, Clone, Copy)]
struct FunctionName;

impl TypedValueParser for FunctionName {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, typed: &OsStr) -> Result<String, clap::Error> {
        let known = |name: &str| Function::named(name).map(|function| function.name.to_owned());
        known.parse_ref(command, arg, typed)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(FUNCTIONS.iter().map(|function| PossibleValue::new(function.name))))
    }
}

fn parse_param(text: &str) -> Result<Param, String> {
    const EXPECTED: &str = "expected NAME=SRC or NAME=NUMBER, such as w_q=x.npz:w_q or beta=2.5";
    let (name, value) = text.split_once('=').ok_or(EXPECTED)?;
    if name.is_empty() {
        return Err(EXPECTED.into());
    }
    let value = match (value.parse::<f32>(), value.parse()) {
        (Ok(_), _) => ParamValue::Number(parse_finite(value)?),
        (Err(_), Ok(source)) => ParamValue::File(source),
        (Err(_), Err(expected)) => return Err(format!("expected a number or SRC ({expected})")),
    };
    Ok(Param { name: name.to_owned(), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_numbers_or_in_files() {
        let number = |name: &str, x| Ok(Param { name: name.into(), value: ParamValue::Number(x) });
        assert_eq!(parse_param("beta=2.5"), number("beta", 2.5));
        assert_eq!(parse_param("b=-1e-3"), number("b", -1e-3));
        let file = |name: &str, source: &str| {
            Ok(Param { name: name.into(), value: ParamValue::File(source.parse().unwrap()) })
        };
        assert_eq!(parse_param("w_q=x.npz:w_q"), file("w_q", "x.npz:w_q"));
        assert_eq!(parse_param("v=a=b.npy"), file("v", "a=b.npy"));
        for (wrong, text) in [
            ("beta", "expected NAME=SRC or NAME=NUMBER"),
            ("=2", "expected NAME=SRC or NAME=NUMBER"),
            ("beta=", "expected a number or SRC"),
            ("beta=inf", "must be finite"),
            ("w=x.npz", "which tensor of it?"),
        ] {
            let refusal = parse_param(wrong).unwrap_err();
            assert!(refusal.contains(text), "{wrong}: {refusal}");
        }
    }
}
