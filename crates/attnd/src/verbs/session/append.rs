//! `attnd session append`, and the rows that it and steps take from files.

use attnd_client::session::{AppendOptions, Appended, Session};
use attnd_client::{Dtype, SessionSpec};
use bytes::Bytes;
use serde::Serialize;

use super::ask;
use crate::args::{AppendArgs, RowsArgs};
use crate::exit::BadInput;
use crate::output;
use crate::tensor_file::{self, Source, Tensor};

/// Appends rows to a layer.
pub(super) async fn run(args: &AppendArgs) -> anyhow::Result<()> {
    let rows = Rows::read(&args.rows)?;
    let (appended, session) = ask(&args.cluster, async |sessions| {
        let mut session = sessions.attach(&args.to.name).await?;
        let (k, v) = rows.of(session.spec())?;
        let options = AppendOptions { allow_non_finite: args.allow_non_finite, timeout: None };
        Ok((session.append_with(args.to.layer, k, v, &options).await?, session))
    })
    .await?;
    let report = AppendReport::new(&session, args.to.layer, &appended);
    if args.cluster.json { output::json(&report) } else { output::line(&report.line()) }
}

/// K and V as they are in files.
#[derive(Debug)]
pub(super) struct Rows {
    k: (Source, Tensor),
    v: Option<(Source, Tensor)>,
}

impl Rows {
    /// # Errors
    /// Those of reading.
    pub(super) fn read(args: &RowsArgs) -> anyhow::Result<Self> {
        let read = |source: &Source| Ok::<_, anyhow::Error>((source.clone(), tensor_file::read(source)?));
        Ok(Self { k: read(&args.k)?, v: args.v.as_ref().map(read).transpose()? })
    }

    /// The bytes of both, as a session takes them.
    ///
    /// # Errors
    /// [`BadInput`] where they are none of its rows.
    pub(super) fn of(&self, spec: &SessionSpec) -> Result<(Bytes, Bytes), BadInput> {
        let (source, k) = &self.k;
        let k = in_session(("--k", source), k, [spec.kv_heads, spec.head_dim], spec.dtype)?;
        let v = match (&self.v, spec.value_is_key_prefix) {
            (None, true) => return Ok((k.bytes, Bytes::new())),
            (Some((source, v)), false) => {
                in_session(("--v", source), v, [spec.kv_heads, spec.value_dim], spec.dtype)?
            }
            (None, false) => {
                return Err(BadInput::new("--v is missing: the session has values of their own"));
            }
            (Some(_), true) => {
                return Err(BadInput::new("--v: values of this session are parts of its keys"));
            }
        };
        if k.shape[2] != v.shape[2] {
            let text = format!("k and v disagree: tokens {:?}", (k.shape[2], v.shape[2]));
            return Err(BadInput::new(text));
        }
        Ok((k.bytes, v.bytes))
    }
}

/// A tensor with the heads and elements that a session has, in its element type.
fn in_session(
    (flag, source): (&str, &Source),
    tensor: &Tensor,
    [heads, dim]: [usize; 2],
    dtype: Dtype,
) -> Result<Tensor, BadInput> {
    check_shape((flag, source), tensor, [heads, dim])?;
    let tensor = if dtype == Dtype::F32 { tensor.clone().into_f32() } else { tensor.clone() };
    if tensor.dtype != dtype {
        let text = format!("{flag} {source} is {}, the session takes {dtype}", tensor.dtype);
        return Err(BadInput::new(text));
    }
    Ok(tensor)
}

/// Refuses a tensor with other heads or elements than a session has.
pub(super) fn check_shape(
    (flag, source): (&str, &Source),
    tensor: &Tensor,
    [heads, dim]: [usize; 2],
) -> Result<(), BadInput> {
    let [batch, got_heads, _tokens, got_dim] = tensor.shape;
    if (batch, got_heads, got_dim) == (1, heads, dim) {
        return Ok(());
    }
    let shape = &tensor.shape[usize::from(!tensor.batched)..];
    Err(BadInput::new(format!(
        "{flag} {source}: shape {shape:?}, the session takes [{heads}, tokens, {dim}]"
    )))
}

/// The `--json` form.
#[derive(Debug, Serialize)]
pub(super) struct AppendReport {
    session: String,
    layer: usize,
    len: u64,
    generation: u64,
    replayed: bool,
    attempts: u32,
}

impl AppendReport {
    pub(super) fn new(session: &Session, layer: usize, appended: &Appended) -> Self {
        let Appended { len, generation, replayed, attempts } = *appended;
        Self { session: session.name().to_string(), layer, len, generation, replayed, attempts }
    }

    pub(super) fn line(&self) -> String {
        format!("{}: layer {} has {} tokens", self.session, self.layer, self.len)
    }
}

#[cfg(test)]
mod tests {
    use attnd_client::session::OpenOptions;

    use super::*;

    fn tensor(shape: [usize; 4], dtype: Dtype) -> (Source, Tensor) {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.size()].into();
        let tensor = Tensor { shape, batched: false, dtype, rounded_from_f64: false, bytes };
        ("x.npz:t".parse().unwrap(), tensor)
    }

    fn of(k: (Source, Tensor), v: Option<(Source, Tensor)>, spec: &SessionSpec) -> Result<usize, String> {
        let bytes = Rows { k, v }.of(spec);
        bytes.map(|(k, v)| k.len() + v.len()).map_err(|error| error.to_string())
    }

    #[test]
    fn rows_are_those_of_the_session() {
        let f32s = OpenOptions::new(1, 8, 2, 4, Dtype::F32).spec;
        let halves = OpenOptions::new(1, 8, 2, 4, Dtype::Bf16).spec;
        let (k, v) = (tensor([1, 2, 3, 4], Dtype::F32), tensor([1, 2, 3, 4], Dtype::F32));
        assert_eq!(of(k.clone(), Some(v.clone()), &f32s), Ok(192));
        assert_eq!(of(tensor([1, 2, 3, 4], Dtype::Bf16), Some(v.clone()), &f32s), Ok(192), "widened");
        let refused = |k, v, spec| of(k, v, spec).unwrap_err();
        assert_eq!(
            refused(k.clone(), Some(v.clone()), &halves),
            "--k x.npz:t is f32, the session takes bf16"
        );
        assert_eq!(
            refused(tensor([1, 8, 3, 4], Dtype::F32), None, &f32s),
            "--k x.npz:t: shape [8, 3, 4], the session takes [2, tokens, 4]"
        );
        assert_eq!(
            refused(tensor([2, 2, 3, 4], Dtype::F32), None, &f32s),
            "--k x.npz:t: shape [2, 3, 4], the session takes [2, tokens, 4]"
        );
        assert_eq!(
            refused(k.clone(), Some(tensor([1, 2, 5, 4], Dtype::F32)), &f32s),
            "k and v disagree: tokens (3, 5)"
        );
        assert_eq!(refused(k.clone(), None, &f32s), "--v is missing: the session has values of their own");
        let latent = SessionSpec { value_is_key_prefix: true, ..f32s };
        assert_eq!(of(k.clone(), None, &latent), Ok(96));
        assert_eq!(refused(k, Some(v), &latent), "--v: values of this session are parts of its keys");
    }
}
