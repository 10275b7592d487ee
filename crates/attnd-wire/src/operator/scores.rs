//! What scores meet between the product and the weights, in messages.

use attnd_kernel::{Bias, Normaliser};

use crate::convert;
use crate::error::{Error, Reason};
use crate::proto;
use crate::proto::bias::Kind as BiasKind;
use crate::proto::normaliser::Kind as NormaliserKind;

/// Biases but the dense one, whose dimensions [`super::dense`] has.
///
/// # Panics
/// If a bias has a table, for which no message has a place.
pub(super) fn encode_biases(biases: &[Bias]) -> Vec<proto::Bias> {
    let encode = |bias: &Bias| match bias {
        Bias::Dense => None,
        Bias::Relative(_) | Bias::Swin(_) => panic!("tables of biases don't travel"),
        Bias::Alibi { slopes, by_key } => {
            Some(BiasKind::Alibi(proto::Alibi { slopes: slopes.to_vec(), by_key: *by_key }))
        }
    };
    biases.iter().filter_map(encode).map(|kind| proto::Bias { kind: Some(kind) }).collect()
}

/// Decodes biases; whether they make sense together and for a shape is for the operator to check.
pub(super) fn decode_biases(biases: Vec<proto::Bias>) -> Result<Vec<Bias>, Error> {
    convert::count("biases", biases.len())?;
    let decode = |(at, bias): (usize, proto::Bias)| match bias.kind {
        Some(BiasKind::Dense(_)) => Ok(Bias::Dense),
        Some(BiasKind::Alibi(proto::Alibi { slopes, by_key })) => {
            Ok(Bias::Alibi { slopes: slopes.into(), by_key })
        }
        None => Err(unknown_kind(&format!("biases[{at}]"))),
    };
    biases.into_iter().enumerate().map(decode).collect()
}

pub(super) fn encode_normaliser(normaliser: Normaliser) -> Option<proto::Normaliser> {
    match normaliser {
        Normaliser::Softmax => None,
        Normaliser::Sigmoid { bias } => {
            Some(proto::Normaliser { kind: Some(NormaliserKind::SigmoidBias(bias)) })
        }
    }
}

pub(super) fn decode_normaliser(normaliser: Option<proto::Normaliser>) -> Result<Normaliser, Error> {
    match normaliser.map(|normaliser| normaliser.kind) {
        None => Ok(Normaliser::Softmax),
        Some(Some(NormaliserKind::SigmoidBias(bias))) => Ok(Normaliser::Sigmoid { bias }),
        Some(None) => Err(unknown_kind("normaliser")),
    }
}

/// Of a message that is there for the sake of its kind, which a newer peer may have and this node drops.
fn unknown_kind(field: &str) -> Error {
    Error::new(Reason::Operator, format!("{field} is of no kind that this node knows"))
}
