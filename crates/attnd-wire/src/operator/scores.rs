//! What scores meet between the product and the weights, in messages.

use attnd_kernel::{Bias, Normaliser, OperatorError, Relative, Shift, Swin};

use super::function::numbers;
use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::limits::MAX_BUCKETS;
use crate::proto::bias::Kind as BiasKind;
use crate::proto::normaliser::Kind as NormaliserKind;
use crate::{floats, proto};

/// Biases but the dense one, whose dimensions [`super::dense`] has.
pub(super) fn encode_biases(biases: &[Bias]) -> Vec<proto::Bias> {
    let encode = |bias: &Bias| match bias {
        Bias::Dense => None,
        Bias::Relative(relative) => Some(BiasKind::Relative(
            proto::Relative {
                table: floats::into_bytes(relative.table().to_vec()),
                buckets: small(relative.buckets()),
                max_distance: relative.max_distance(),
                bidirectional: relative.bidirectional(),
            }
            .into(),
        )),
        Bias::Swin(swin) => Some(BiasKind::Swin(encode_swin(swin).into())),
        Bias::Alibi { slopes, by_key } => {
            Some(BiasKind::Alibi(proto::Alibi { slopes: slopes.to_vec(), by_key: *by_key }.into()))
        }
    };
    biases.iter().filter_map(encode).map(|kind| proto::Bias { kind: Some(kind) }).collect()
}

/// Decodes biases; whether they make sense together and for a shape is for the operator to check.
pub(super) fn decode_biases(biases: Vec<proto::Bias>) -> Result<Vec<Bias>, Error> {
    convert::count("biases", biases.len())?;
    let decode = |(at, bias): (usize, proto::Bias)| match bias.kind {
        Some(BiasKind::Dense(_)) => Ok(Bias::Dense),
        Some(BiasKind::Alibi(alibi)) => {
            let proto::Alibi { slopes, by_key } = *alibi;
            Ok(Bias::Alibi { slopes: slopes.into(), by_key })
        }
        Some(BiasKind::Relative(relative)) => {
            let proto::Relative { table, buckets, max_distance, bidirectional } = *relative;
            let got = convert::size(buckets);
            if got > MAX_BUCKETS {
                let text = format!("bias.relative has {got} buckets, at most {MAX_BUCKETS}");
                return Err(Error::new(Reason::Operator, text));
            }
            let table = numbers("bias.relative.table", &table)?.into();
            let relative = Relative::new(table, convert::size(buckets), max_distance, bidirectional);
            Ok(Bias::Relative(relative.map_err(OperatorError::from)?))
        }
        Some(BiasKind::Swin(swin)) => decode_swin(*swin).map(Bias::Swin),
        None => Err(unknown_kind(&format!("biases[{at}]"))),
    };
    biases.into_iter().enumerate().map(decode).collect()
}

fn encode_swin(swin: &Swin) -> proto::Swin {
    let Swin { height, width, table, shift } = swin;
    let (regions, between) = match shift {
        None => (Vec::new(), 0.0),
        Some(Shift { regions, between }) => (regions.to_vec(), *between),
    };
    let table = floats::into_bytes(table.to_vec());
    proto::Swin { height: small(*height), width: small(*width), table, regions, between }
}

fn decode_swin(message: proto::Swin) -> Result<Swin, Error> {
    let proto::Swin { height, width, table, regions, between } = message;
    if regions.is_empty() && between != 0.0 {
        let text = format!("bias.swin.between {between} and no bias.swin.regions");
        return Err(Error::new(Reason::Combination, text));
    }
    let shift = (!regions.is_empty()).then(|| Shift { regions: regions.into(), between });
    let table = numbers("bias.swin.table", &table)?.into();
    Ok(Swin { height: convert::size(height), width: convert::size(width), table, shift })
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
