//! Tensors in files: reads `.npy`, `.npz` and `.safetensors`, writes `.npy` and `.safetensors`.
//!
//! Files are copied into memory, never mapped: a file that somebody truncates while it is mapped kills the process.
//! What a header declares is compared with the length of the file before memory is asked for.

mod arrays;
mod decode;
mod dense;
mod npy;
mod npz;
mod operands;
mod rows;
mod safetensors;
mod source;
mod write;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use attnd_kernel::Dtype;
use bytes::Bytes;

pub use arrays::{Numbers, read_floats, read_integers};
pub use dense::read_dense;
pub use operands::{Inputs, OperandError, QueryDim, Values, assemble};
pub use rows::{read_rows, read_state};
pub use source::{OutputPath, Source};
pub use write::{Array, Elements, Output, WriteError, check, is_file_of, replace, write, write_named};

/// A tensor in memory, `[batch, heads, tokens, dim]` in C order, little-endian.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Batch, heads, tokens, dim; none is zero.
    pub shape: [usize; 4],
    /// Whether the file gave the batch dimension; a tensor without one has batch 1.
    pub batched: bool,
    /// Type of the elements in `bytes`.
    pub dtype: Dtype,
    /// Whether the file held f64, which has been rounded to f32.
    pub rounded_from_f64: bool,
    /// The elements.
    pub bytes: Bytes,
}

impl Tensor {
    /// The same tensor with f32 elements; exact.
    pub fn into_f32(self) -> Self {
        if self.dtype == Dtype::F32 {
            return self;
        }
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size()];
        attnd_kernel::widen(&self.bytes, self.dtype, &mut values);
        Self { dtype: Dtype::F32, bytes: decode::le_bytes(&values).into(), ..self }
    }
}

/// Why a tensor could not be read; one line that begins with the source as typed.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {fault}")]
pub struct ReadError {
    /// The source as typed.
    pub origin: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What can be wrong with a tensor in a file.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file can't be opened or read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A directory, a pipe or a device.
    #[error("not a regular file")]
    NotAFile,
    /// The file does not begin as this format does.
    #[error("not a {format} file: {detail}")]
    WrongFormat {
        /// Expected format.
        format: &'static str,
        /// What was found instead.
        detail: String,
    },
    /// The file's length and what its header declares differ.
    #[error("{what}: the header declares {declared} bytes, the file holds {held}")]
    Length {
        /// Which part of the file.
        what: &'static str,
        /// Bytes that the header asks for.
        declared: u128,
        /// Bytes that are there.
        held: u64,
    },
    /// Elements that are no floats of a kind attnd knows.
    #[error("dtype {got} is not supported; f16, bf16, f32 and f64 are{hint}")]
    Dtype {
        /// As the file spells it.
        got: String,
        /// What to do about it; empty or beginning with `; `.
        hint: &'static str,
    },
    /// Elements that are no integers of a kind attnd knows.
    #[error("dtype {got} is not supported; i32, i64 and u32 are")]
    NoIntegers {
        /// As the file spells it.
        got: String,
    },
    /// The archive has no tensor of that name.
    #[error("no tensor named '{name}'; the file has {}", list(.names))]
    NoSuchName {
        /// What was asked for.
        name: String,
        /// What there is.
        names: Vec<String>,
    },
    /// Neither 3 nor 4 dimensions.
    #[error("shape {0:?}, expected [heads, tokens, dim] or [batch, heads, tokens, dim]")]
    Rank(Vec<usize>),
    /// No or more than 4 dimensions of a mask or a bias.
    #[error("shape {0:?}, expected up to 4 dimensions: [batch, heads, queries, keys]")]
    DenseRank(Vec<usize>),
    /// Not 1 dimension.
    #[error("shape {0:?}, expected [heads]")]
    NoVector(Vec<usize>),
    /// Neither 2 nor 3 dimensions.
    #[error("shape {0:?}, expected [tokens, width] or [batch, tokens, width]")]
    NoRows(Vec<usize>),
    /// A dimension is zero.
    #[error("shape {0:?} has no elements")]
    Empty(Vec<usize>),
    /// A finite f64 that no f32 is near.
    #[error("element {index:?} is {value:e}, over the range of f32, to which f64 is rounded")]
    OverF32 {
        /// Where it is.
        index: Vec<usize>,
        /// What it is.
        value: f64,
    },
    /// The tensor does not fit into memory.
    #[error("{bytes} bytes do not fit into memory")]
    OutOfMemory {
        /// Size of the tensor.
        bytes: u64,
    },
}

/// Reads the tensor that `source` names.
///
/// # Errors
/// If it can't be opened, is not what its extension says, is cut short, holds no floats or one over the range of f32,
/// or is no 3- or 4-dimensional tensor.
pub fn read(source: &Source) -> Result<Tensor, ReadError> {
    read_as(source, decode::Stored::into_tensor)
}

/// Reads one number a head, `[heads]`, from where `source` says.
///
/// # Errors
/// As [`read`], for a tensor that hasn't 1 dimension.
pub fn read_vector(source: &Source) -> Result<Vec<f32>, ReadError> {
    read_as(source, decode::Stored::into_vector)
}

/// What the header of the `.safetensors` file at `path` says under `key` beside its tensors; nothing if it doesn't.
///
/// # Errors
/// If it can't be opened or is no such file.
pub fn read_entry(path: &Path, key: &str) -> Result<Option<String>, ReadError> {
    let entry = open(path).and_then(|(file, len)| safetensors::read_entry(file, len, key));
    entry.map_err(|fault| ReadError { origin: path.display().to_string(), fault })
}

fn read_as<T>(source: &Source, decode: fn(decode::Stored) -> Result<T, Fault>) -> Result<T, ReadError> {
    let stored = open(source.path()).and_then(|(file, len)| match source {
        Source::Npy(_) => npy::read(file, len),
        Source::Npz { name, .. } => npz::read(file, len, name),
        Source::Safetensors { name, .. } => safetensors::read(file, len, name),
    });
    stored.and_then(decode).map_err(|fault| ReadError { origin: source.to_string(), fault })
}

/// Opens a regular file and tells its length. Looks before it opens: opening a pipe would wait for a writer.
fn open(path: &Path) -> Result<(File, u64), Fault> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(Fault::NotAFile);
    }
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

/// Reads exactly `len` bytes and sees the end of the stream behind them, which also makes a zip entry check its CRC.
fn read_all(mut reader: impl Read, len: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    let capacity = usize::try_from(len).ok().filter(|n| bytes.try_reserve_exact(*n).is_ok());
    if capacity.is_none() {
        return Err(Fault::OutOfMemory { bytes: len });
    }
    reader.by_ref().take(len).read_to_end(&mut bytes)?;
    let held = bytes.len() as u64 + io::copy(&mut reader.take(1), &mut io::sink())?;
    if held != len {
        return Err(Fault::Length { what: "data", declared: len.into(), held });
    }
    Ok(bytes)
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 20;
    match names.len() {
        0 => "none".into(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{}, and {} more", names[..SHOWN].join(", "), n - SHOWN),
    }
}

#[cfg(test)]
mod tests;
