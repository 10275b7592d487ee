//! `attnd scores`: the score functions that there are, as the kernels list them.

use attnd_kernel::{DefaultScale, FUNCTIONS, Function, Parameter, Symbol};
use serde::Serialize;

use crate::args::ScoresArgs;
use crate::{output, table};

/// Runs the verb.
///
/// # Errors
/// If stdout can't be written.
pub fn run(args: &ScoresArgs) -> anyhow::Result<()> {
    let functions: Vec<FunctionReport> = FUNCTIONS.iter().copied().map(FunctionReport::from).collect();
    if args.json { output::json(&functions) } else { output::line(&table_of(&functions)) }
}

/// The `--json` form of one function.
#[derive(Debug, Serialize)]
struct FunctionReport {
    name: &'static str,
    formula: &'static str,
    /// What scores are multiplied by where a call doesn't say.
    default_scale: &'static str,
    parameters: Vec<ParameterReport>,
}

#[derive(Debug, Serialize)]
struct ParameterReport {
    name: &'static str,
    /// Those that it may have; each is a list of names of dimensions.
    shapes: Vec<Vec<String>>,
    /// Nothing where it must be given.
    default: Option<f32>,
}

impl From<&Function> for FunctionReport {
    fn from(function: &Function) -> Self {
        Self {
            name: function.name,
            formula: function.summary,
            default_scale: match function.default_scale {
                DefaultScale::One => "1",
                DefaultScale::InverseSqrtKeyDim => "1/sqrt(head_dim)",
            },
            parameters: function.parameters.iter().map(ParameterReport::from).collect(),
        }
    }
}

impl From<&Parameter> for ParameterReport {
    fn from(parameter: &Parameter) -> Self {
        let dimensions = |symbols: &&[Symbol]| symbols.iter().map(Symbol::to_string).collect();
        Self {
            name: parameter.name,
            shapes: parameter.shapes.iter().map(dimensions).collect(),
            default: parameter.default,
        }
    }
}

/// A row for each parameter; a function without one has a row as well.
fn table_of(functions: &[FunctionReport]) -> String {
    let mut table = table::with_header(["score", "formula", "scale", "parameter", "shape", "default"]);
    for function in functions {
        let mut of_function = [function.name, function.formula, function.default_scale];
        if function.parameters.is_empty() {
            table.add_row(of_function);
        }
        for parameter in &function.parameters {
            let shapes = parameter.shapes.iter().map(|shape| format!("[{}]", shape.join(", ")));
            let default = parameter.default.map_or_else(
                || "needed".to_owned(),
                |value| format!("{value:?}").trim_end_matches(".0").to_owned(),
            );
            let shapes = shapes.collect::<Vec<_>>().join(" or ");
            let row = of_function.map(str::to_owned).into_iter();
            table.add_row(row.chain([parameter.name.to_owned(), shapes, default]));
            of_function = [""; 3];
        }
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_and_parameter_has_a_row() {
        let functions: Vec<FunctionReport> = FUNCTIONS.iter().copied().map(FunctionReport::from).collect();
        let table = table_of(&functions);
        let cells =
            |line: &str| line.split(['│', '┆']).map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let rows: Vec<Vec<String>> = table.lines().map(cells).filter(|cells| cells.len() == 8).collect();
        let parameters: usize = FUNCTIONS.iter().map(|function| function.parameters.len().max(1)).sum();
        assert_eq!(rows.len(), 1 + parameters, "{table}");
        for function in FUNCTIONS {
            let first = rows.iter().position(|row| row[1] == function.name).unwrap();
            assert_eq!(rows[first][2], function.summary);
            for (row, parameter) in rows[first..].iter().zip(function.parameters) {
                assert_eq!(row[4], parameter.name, "{table}");
                assert_eq!(row[6] == "needed", parameter.default.is_none(), "{table}");
            }
        }
        let additive = rows.iter().position(|row| row[1] == "additive").unwrap();
        assert_eq!(rows[additive][3..7], ["1", "v", "[units] or [num_heads, units]", "needed"]);
    }

    #[test]
    fn json_has_what_a_call_needs_to_know() {
        let functions: Vec<FunctionReport> = FUNCTIONS.iter().copied().map(FunctionReport::from).collect();
        let json = serde_json::to_string(&functions).unwrap();
        let scaled = r#"{"name":"scaled_dot","formula":"q . k / sqrt(head_dim) (Vaswani)","default_scale":"1/sqrt(head_dim)","parameters":[]}"#;
        assert!(json.contains(scaled), "{json}");
        let eps = r#"{"name":"eps","shapes":[["1"]],"default":1e-8}"#;
        let w_a = r#"{"name":"w_a","shapes":[["positions","query_dim"],["num_kv_heads","positions","query_dim"]],"default":null}"#;
        assert!(json.contains(eps) && json.contains(w_a), "{json}");
    }
}
