//! Writes a result beside its destination and renames it there, so that a reader sees the old file or the whole new one.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ndarray::{ArrayView, IxDyn};
use ndarray_npy::{WriteNpyError, WriteNpyExt};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView};

use super::decode::le_bytes;
use super::{OutputPath, Source};

/// Links that are followed to a destination, as many as Linux follows.
const MAX_LINKS: usize = 40;

/// A finished call, as it goes into a file.
#[derive(Debug, Clone, Copy)]
pub struct Output<'a> {
    /// `[heads, queries, value_dim]` or `[batch, heads, queries, value_dim]`.
    pub shape: &'a [usize],
    /// Context, C order.
    pub context: &'a [f32],
    /// Natural-log lse, shaped as the context without its last dimension.
    pub lse: &'a [f32],
    /// Order of arithmetic that made it.
    pub kernel_id: &'a str,
}

/// A tensor that goes into a file: its name, its shape, its elements in C order.
pub type Named<'a> = (&'a str, &'a [usize], &'a [f32]);

/// Why a result could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct WriteError {
    /// The destination.
    pub path: PathBuf,
    /// What went wrong.
    #[source]
    pub fault: WriteFault,
}

/// What can go wrong when a result is written.
#[derive(Debug, thiserror::Error)]
pub enum WriteFault {
    /// The file system refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The context is not of its shape.
    #[error("{0}")]
    Shape(#[from] ndarray::ShapeError),
    /// The npy writer refuses.
    #[error("{0}")]
    Npy(#[from] WriteNpyError),
    /// The safetensors writer refuses.
    #[error("{0}")]
    Safetensors(#[from] SafeTensorError),
    /// The directory does not exist.
    #[error("there is no directory {}", .0.display())]
    NoDirectory(PathBuf),
    /// The destination is a directory, a pipe, a device, or links that lead in a circle.
    #[error("exists and is not a regular file")]
    NotAFile,
    /// No file can be made beside the destination.
    #[error("no file can be made in {}: {source}", directory.display())]
    NotWritable {
        /// The directory.
        directory: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

impl OutputPath {
    /// Refuses a destination that [`write()`] can't write; worth asking before hours of computing. Makes the temporary
    /// file and removes it again, so that a process that is killed meanwhile leaves none behind.
    ///
    /// # Errors
    /// [`WriteFault::NoDirectory`], [`WriteFault::NotAFile`], [`WriteFault::NotWritable`].
    pub fn check(&self) -> Result<(), WriteError> {
        self.probe().map_err(|fault| WriteError { path: self.path().into(), fault })
    }

    fn probe(&self) -> Result<(), WriteFault> {
        let target = self.target();
        let directory = directory_of(&target);
        if !directory.is_dir() {
            return Err(WriteFault::NoDirectory(directory.into()));
        }
        // The target itself is a link only where the links never end.
        if fs::symlink_metadata(&target).is_ok_and(|existing| !existing.is_file()) {
            return Err(WriteFault::NotAFile);
        }
        let temporary = temporary_beside(&target);
        let made = File::create(&temporary).and_then(|_empty| fs::remove_file(&temporary));
        made.map_err(|source| WriteFault::NotWritable { directory: directory.into(), source })
    }

    /// Whether the destination exists and is the very file that `source` is read from, under whatever names. It would
    /// be replaced by the result.
    pub fn is_file_of(&self, source: &Source) -> bool {
        let identity = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        identity(self.path()).is_some_and(|file| Some(file) == identity(source.path()))
    }

    /// What a rename has to replace: the path, or what it names in the end where it is a link, so that links stay.
    fn target(&self) -> PathBuf {
        let mut target = self.path().to_path_buf();
        for _ in 0..MAX_LINKS {
            let Ok(link) = fs::read_link(&target) else { break };
            target = directory_of(&target).join(link);
        }
        target
    }
}

/// Writes `output` in the format that the extension names. A link stays one: what it names is written.
///
/// # Errors
/// If the file system refuses; nothing is left behind then, and an earlier file of that name is untouched.
pub fn write(to: &OutputPath, output: &Output<'_>) -> Result<(), WriteError> {
    let rows = output.shape.split_last().map_or(output.shape, |(_, rows)| rows);
    write_named(to, &[("context", output.shape, output.context), ("lse", rows, output.lse)], output.kernel_id)
}

/// Writes tensors, each a name, a shape and elements in C order, as [`write()`]: all of them into `.safetensors`, the first alone into
/// `.npy`.
///
/// # Errors
/// As [`write()`].
pub fn write_named(to: &OutputPath, tensors: &[Named<'_>], kernel_id: &str) -> Result<(), WriteError> {
    let target = to.target();
    let temporary = temporary_beside(&target);
    let written = match to {
        OutputPath::Npy(_) => write_npy(&temporary, tensors),
        OutputPath::Safetensors(_) => write_safetensors(&temporary, tensors, kernel_id),
    };
    let renamed = written.and_then(|()| Ok(fs::rename(&temporary, &target)?));
    renamed.map_err(|fault| {
        // The first error is the one to report; the temporary file may not even exist.
        fs::remove_file(&temporary).ok();
        WriteError { path: to.path().into(), fault }
    })
}

/// Where a result is written before it is renamed.
fn temporary_beside(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    directory_of(target).join(format!(".{name}.{}.tmp", std::process::id()))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn write_npy(path: &Path, tensors: &[Named<'_>]) -> Result<(), WriteFault> {
    let mut file = BufWriter::new(File::create(path)?);
    if let Some((_, shape, elements)) = tensors.first() {
        ArrayView::from_shape(IxDyn(shape), elements)?.write_npy(&mut file)?;
    }
    file.flush()?;
    Ok(file.get_ref().sync_all()?)
}

fn write_safetensors(path: &Path, tensors: &[Named<'_>], kernel_id: &str) -> Result<(), WriteFault> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, elements)| le_bytes(elements)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, SafeTensorError>>()?;
    // One entry only: the map has no order, and equal results are to make equal files.
    let metadata = HashMap::from([("kernel_id".to_owned(), kernel_id.to_owned())]);
    // Not `serialize_to_file`: that makes a file which only its owner may read, whatever the umask says.
    let bytes = safetensors::serialize(views, Some(metadata))?;
    let mut file = File::create(path)?;
    file.write_all(&bytes)?;
    Ok(file.sync_all()?)
}
