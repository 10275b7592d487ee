//! What layers are made of and applied to: the tensors of a state dict, and rows.

use std::path::Path;

use attnd_client::layer::{Rows, StateTensor};

use super::decode::Stored;
use super::{Fault, ReadError, Source, open, read_as, safetensors};

/// Rows in memory, and whether the file gave a batch dimension; rows without one have batch 1.
#[derive(Debug, Clone)]
pub struct RowTensor {
    /// The rows.
    pub rows: Rows,
    /// Whether there were three dimensions.
    pub batched: bool,
}

/// Reads rows, `[tokens, width]` or `[batch, tokens, width]`, in their type, those of f64 as f32.
///
/// # Errors
/// As [`super::read`], for a tensor of other dimensions.
pub fn read_rows(source: &Source) -> Result<RowTensor, ReadError> {
    read_as(source, |stored| {
        let shape = stored.shape.clone();
        let (dtype, bytes) = stored.into_c_order()?;
        let (batched, of_rows) = match *shape {
            [tokens, width] => (false, [1, tokens, width]),
            [batch, tokens, width] => (true, [batch, tokens, width]),
            _ => return Err(Fault::NoRows(shape)),
        };
        let rows = Rows::of_bytes(bytes.into(), dtype, of_rows).map_err(|_empty| Fault::Empty(shape))?;
        Ok(RowTensor { rows, batched })
    })
}

/// Reads all tensors of a `.safetensors` file whose names begin with `prefix` and a point or slash, by the rest of their names; all of
/// them for an empty one.
///
/// # Errors
/// As [`super::read`], naming the tensor; [`Fault::NoSuchName`] if there is none.
pub fn read_state(path: &Path, prefix: &str) -> Result<Vec<(String, StateTensor)>, ReadError> {
    let of_file = |fault| ReadError { origin: path.display().to_string(), fault };
    let (file, len) = open(path).map_err(of_file)?;
    let named = safetensors::read_some(file, len, |name| own_name(name, prefix).is_some());
    let decoded = named.map_err(of_file)?.into_iter().map(|(name, stored)| {
        let of_tensor = |fault| ReadError { origin: format!("{}:{name}", path.display()), fault };
        let (shape, values) = stored.and_then(Stored::into_floats).map_err(of_tensor)?;
        Ok((own_name(&name, prefix).unwrap_or_default().to_owned(), StateTensor { shape, values }))
    });
    let tensors: Vec<_> = decoded.collect::<Result<_, ReadError>>()?;
    if tensors.is_empty() {
        let (file, len) = open(path).map_err(of_file)?;
        let names = safetensors::names(file, len).map_err(of_file)?;
        return Err(of_file(Fault::NoSuchName { name: format!("{prefix}..."), names }));
    }
    Ok(tensors)
}

/// What is left of a name behind a prefix; `None` for one that doesn't have it.
fn own_name<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let rest = name.strip_prefix(prefix)?;
    if prefix.is_empty() || prefix.ends_with(['.', '/']) { Some(rest) } else { rest.strip_prefix(['.', '/']) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_a_name_has_a_point_or_slash() {
        assert_eq!(own_name("layers.1.q.weight", "layers.1"), Some("q.weight"));
        assert_eq!(own_name("layers.1.q.weight", "layers.1."), Some("q.weight"));
        assert_eq!(own_name("mha/query/kernel", "mha"), Some("query/kernel"));
        assert_eq!(own_name("layers.10.q.weight", "layers.1"), None);
        assert_eq!(own_name("in_proj_weight", ""), Some("in_proj_weight"));
    }
}
