//! Parameters of a score function that were typed as one number and are more: `--param b=0.5` where `b` is a vector.
//!
//! A parameter whose default is one number may be another number as well, which then stands in all of its places. Others
//! can't: a vector without a default has a meaning in each place.

use attnd_client::AttnShape;
use attnd_kernel::{Parameter, Score, Symbol, Tensor};

use crate::args::{FunctionArgs, ParamValue};
use crate::exit::BadInput;

/// The score with each typed number in all places of the shape that all heads share, where it isn't a parameter as it is.
///
/// # Errors
/// [`BadInput`] for a number that is a vector or matrix without a default; the text has its shape.
pub fn spread(score: Score, args: &FunctionArgs, shape: &AttnShape) -> Result<Score, BadInput> {
    let is_number = |name: &str| {
        args.param.iter().any(|param| param.name == name && matches!(param.value, ParamValue::Number(_)))
    };
    let numbers: Vec<&str> =
        score.parameters().iter().map(|tensor| &*tensor.name).filter(|name| is_number(name)).collect();
    let sizes = Sizes { score: &score, shape, numbers: &numbers };
    let spread: Vec<Tensor> =
        score.parameters().iter().map(|tensor| sizes.spread(tensor)).collect::<Result<_, _>>()?;
    Ok(Score::new(score.function().name, spread).unwrap_or_else(|_unknown| score.clone()))
}

/// What dimensions are: those of the call, and those that parameters say which weren't typed as numbers.
struct Sizes<'a> {
    score: &'a Score,
    shape: &'a AttnShape,
    numbers: &'a [&'a str],
}

impl Sizes<'_> {
    fn spread(&self, tensor: &Tensor) -> Result<Tensor, BadInput> {
        let number = match (&*tensor.values, self.parameter(&tensor.name)) {
            ([number], Some(parameter)) if self.numbers.contains(&&*tensor.name) => (*number, parameter),
            _ => return Ok(tensor.clone()),
        };
        let (number, parameter) = number;
        // What a size isn't known of may be one number.
        let is_one = |symbols: &&[Symbol]| {
            symbols.len() == 1 && symbols.iter().all(|symbol| self.of(*symbol).unwrap_or(1) == 1)
        };
        if parameter.shapes.iter().any(is_one) {
            return Ok(tensor.clone());
        }
        let of_all = parameter.shapes.first().copied().unwrap_or_default();
        let sizes: Option<Vec<usize>> = of_all.iter().map(|symbol| self.of(*symbol)).collect();
        match sizes {
            Some(sizes) if parameter.default.is_some() => {
                let values = vec![number; sizes.iter().product()].into();
                Ok(Tensor { name: tensor.name.clone(), shape: sizes, values })
            }
            _ => Err(self.refused(parameter, number)),
        }
    }

    fn parameter(&self, name: &str) -> Option<&'static Parameter> {
        self.score.function().parameters.iter().find(|parameter| parameter.name == name)
    }

    /// The size of a dimension, if it is known.
    fn of(&self, symbol: Symbol) -> Option<usize> {
        let shape = self.shape;
        match symbol {
            Symbol::Batch => Some(shape.batch()),
            Symbol::Heads => Some(shape.n_heads()),
            Symbol::KvHeads => Some(shape.n_kv_heads()),
            Symbol::Queries => Some(shape.n_queries()),
            Symbol::QueryDim => Some(shape.query_dim()),
            Symbol::KeyDim => Some(shape.head_dim()),
            Symbol::BothDims => Some(shape.query_dim() + shape.head_dim()),
            Symbol::One => Some(1),
            Symbol::Units | Symbol::Positions | Symbol::Filters | Symbol::Taps => self.of_parameters(symbol),
        }
    }

    /// What the parameters that came from files say of a dimension.
    fn of_parameters(&self, symbol: Symbol) -> Option<usize> {
        let whole = self.score.parameters().iter().filter(|tensor| !self.numbers.contains(&&*tensor.name));
        whole
            .flat_map(|tensor| {
                let parameter = self.parameter(&tensor.name)?;
                let symbols = parameter.shapes.iter().find(|symbols| symbols.len() == tensor.shape.len())?;
                let at = symbols.iter().position(|known| *known == symbol)?;
                tensor.shape.get(at).copied()
            })
            .next()
    }

    fn refused(&self, parameter: &Parameter, number: f32) -> BadInput {
        let of_symbol = |symbol: &Symbol| match self.of(*symbol) {
            Some(size) if *symbol != Symbol::One => format!("{symbol} {size}"),
            _ => symbol.to_string(),
        };
        let of_shape = |symbols: &&[Symbol]| {
            format!("[{}]", symbols.iter().map(of_symbol).collect::<Vec<_>>().join(", "))
        };
        let shapes: Vec<String> = parameter.shapes.iter().map(of_shape).collect();
        let (function, name, shapes) = (self.score.function().name, parameter.name, shapes.join(" or "));
        BadInput::new(format!(
            "--param {name}={number}: {name} of {function} is {shapes}, not one number; \
             it comes from a file, as --param {name}=x.npz:{name}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::Dims;
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Verb};

    fn shape(heads: u64) -> AttnShape {
        let dims = Dims { batch: 1, heads, kv_heads: 1, queries: 4, keys: 9, head_dim: 5, value_dim: 1 };
        AttnShape::new(dims).unwrap().with_query_dim(6).unwrap()
    }

    /// A score with some parameters of a shape, and numbers beside them.
    fn spread_of(name: &str, files: &[(&str, &[usize])], numbers: &[(&str, f32)]) -> Result<Score, BadInput> {
        let of_file = |(name, shape): &(&str, &[usize])| Tensor {
            name: (*name).into(),
            shape: shape.to_vec(),
            values: vec![0.25; shape.iter().product()].into(),
        };
        let of_number =
            |(name, x): &(&str, f32)| Tensor { name: (*name).into(), shape: vec![1], values: [*x].into() };
        let parameters = files.iter().map(of_file).chain(numbers.iter().map(of_number)).collect();
        let typed = numbers.iter().map(|(name, x)| format!("--param={name}={x}"));
        let words = ["attnd", "attend", "--q", "q.npy", "--k", "k.npy", "--v", "v.npy"].map(str::to_owned);
        let Verb::Attend(args) = Cli::try_parse_from(words.into_iter().chain(typed)).unwrap().verb else {
            panic!("another verb");
        };
        spread(Score::new(name, parameters).unwrap(), &args.operator.function, &shape(2))
    }

    fn last(score: &Score) -> (Vec<usize>, Vec<f32>) {
        let tensor = score.parameters().last().unwrap();
        (tensor.shape.clone(), tensor.values.to_vec())
    }

    const ADDITIVE: [(&str, &[usize]); 3] = [("v", &[2, 3]), ("w_q", &[3, 6]), ("w_k", &[3, 5])];

    #[test]
    fn a_number_stands_in_all_places_of_a_vector_with_a_default() {
        let additive = spread_of("additive", &ADDITIVE, &[("b", 0.5)]).unwrap();
        assert_eq!(last(&additive), (vec![3], vec![0.5; 3]));
        let biaffine = spread_of("biaffine", &[("w", &[6, 5])], &[("v", 2.0), ("u", -1.0)]).unwrap();
        assert_eq!(last(&biaffine), (vec![6], vec![-1.0; 6]));
        assert_eq!(&biaffine.parameters()[1].values[..], [2.0; 5]);
        let keras = spread_of("keras_additive", &[], &[("v", 0.125)]).unwrap();
        assert_eq!(last(&keras), (vec![5], vec![0.125; 5]));
    }

    #[test]
    fn what_one_number_is_stays_one_number() {
        for (name, parameter) in
            [("cosine", "beta"), ("cosine", "eps"), ("keras_concat", "c"), ("distance", "width")]
        {
            assert_eq!(last(&spread_of(name, &[], &[(parameter, 2.0)]).unwrap()), (vec![1], vec![2.0]));
        }
        let of_file = spread_of("additive", &[&ADDITIVE[..], &[("b", &[1])]].concat(), &[]).unwrap();
        assert_eq!(last(&of_file), (vec![1], vec![0.25]), "of a file, which is refused later");
        let one_unit: [(&str, &[usize]); 2] = [("w_q", &[1, 6]), ("w_k", &[1, 5])];
        assert_eq!(last(&spread_of("additive", &one_unit, &[("v", 2.0)]).unwrap()), (vec![1], vec![2.0]));
    }

    #[test]
    fn a_number_without_a_default_is_refused_with_its_shape() {
        let refused = |name: &str, files: &[(&str, &[usize])], parameter: &str| {
            spread_of(name, files, &[(parameter, 0.5)]).unwrap_err().to_string()
        };
        assert_eq!(
            refused("additive", &ADDITIVE[1..], "v"),
            "--param v=0.5: v of additive is [units 3] or [num_heads 2, units 3], not one number; \
             it comes from a file, as --param v=x.npz:v"
        );
        let text = refused("general", &[], "w");
        assert!(text.contains("w of general is [query_dim 6, head_dim 5] or "), "{text}");
        let text = refused("additive", &[], "w_q");
        assert!(text.contains("w_q of additive is [units, query_dim 6] or "), "{text}");
    }
}
