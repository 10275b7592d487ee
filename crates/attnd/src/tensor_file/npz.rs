//! The `.npz` reader: one entry of the zip archive is one npy stream.
//!
//! Opens the archive with the zip crate that `ndarray-npy` builds on, whose own reader yields only element types it
//! knows, and it knows no 16-bit floats.

use std::fs::File;
use std::io::BufReader;

use zip::ZipArchive;
use zip::result::ZipError;

use super::decode::Stored;
use super::{Fault, npy};

/// Deflate can't expand a byte to more than this many.
const MAX_RATIO: u64 = 1032;

/// Reads the array `name` (with or without `.npy`) of an archive of `len` bytes.
pub(super) fn read(file: File, len: u64, name: &str) -> Result<Stored, Fault> {
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(wrong)?;
    let with_suffix = format!("{name}.npy");
    let Some(index) = archive.index_for_name(&with_suffix).or_else(|| archive.index_for_name(name)) else {
        let mut names: Vec<_> =
            archive.file_names().map(|name| name.strip_suffix(".npy").unwrap_or(name).to_owned()).collect();
        names.sort();
        return Err(Fault::NoSuchName { name: name.into(), names });
    };
    let entry = archive.by_index(index).map_err(wrong)?;
    let size = entry.size();
    if size > len.saturating_mul(MAX_RATIO) {
        return Err(Fault::Length { what: "archive entry", declared: size.into(), held: len });
    }
    npy::read(entry, size)
}

fn wrong(error: ZipError) -> Fault {
    match error {
        ZipError::Io(error) => Fault::Io(error),
        other => Fault::WrongFormat { format: "npz", detail: other.to_string() },
    }
}
