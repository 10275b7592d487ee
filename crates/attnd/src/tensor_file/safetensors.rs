//! The `.safetensors` reader: reads the header and then only the tensor that was asked for.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use safetensors::tensor::{Dtype, Metadata};

use super::decode::{Element, Stored, check_shape};
use super::{Fault, read_all};

/// The format's own bound on a header.
const MAX_HEADER: u64 = 100_000_000;

/// Reads the tensor `name` of a file of `len` bytes.
pub(super) fn read(mut file: File, len: u64, name: &str) -> Result<Stored, Fault> {
    let (metadata, data_start) = read_header(&mut file, len)?;
    read_tensor(&mut file, &metadata, data_start, name)
}

/// A tensor's name, and the tensor or what is wrong with it.
pub(super) type NamedResult = (String, Result<Stored, Fault>);

/// Reads the tensors of a file of `len` bytes whose names are wanted, in the order in which they lie there.
pub(super) fn read_some(
    mut file: File,
    len: u64,
    is_wanted: impl Fn(&str) -> bool,
) -> Result<Vec<NamedResult>, Fault> {
    let (metadata, data_start) = read_header(&mut file, len)?;
    let names = metadata.offset_keys().into_iter().filter(|name| is_wanted(name));
    let read = names.map(|name| {
        let stored = read_tensor(&mut file, &metadata, data_start, &name);
        (name, stored)
    });
    Ok(read.collect())
}

/// The names of all tensors of a file of `len` bytes.
pub(super) fn names(mut file: File, len: u64) -> Result<Vec<String>, Fault> {
    read_header(&mut file, len).map(|(metadata, _)| metadata.offset_keys())
}

fn read_tensor(file: &mut File, metadata: &Metadata, data_start: u64, name: &str) -> Result<Stored, Fault> {
    let Some(info) = metadata.info(name) else {
        return Err(Fault::NoSuchName { name: name.into(), names: metadata.offset_keys() });
    };
    let element = match info.dtype {
        Dtype::BOOL => Element::Bool,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::F32 => Element::F32,
        Dtype::F64 => Element::F64,
        Dtype::I32 => Element::I32,
        Dtype::I64 => Element::I64,
        Dtype::U32 => Element::U32,
        other => return Err(Fault::Dtype { got: format!("{other:?}"), hint: "" }),
    };
    check_shape(&info.shape)?;
    // The header has been checked against itself (offsets tile the data, sizes are shape times dtype) and the file.
    let (begin, end) = info.data_offsets;
    file.seek(SeekFrom::Start(data_start + begin as u64))?;
    let size = (end - begin) as u64;
    let bytes = read_all(file.take(size), size)?;
    let spelled = (format!("{:?}", info.dtype), "");
    Ok(Stored { shape: info.shape.clone(), element, spelled, big_endian: false, fortran: false, bytes })
}

/// What the header of a file of `len` bytes says under `key` beside its tensors; nothing if it doesn't.
pub(super) fn read_entry(mut file: File, len: u64, key: &str) -> Result<Option<String>, Fault> {
    let (metadata, _) = read_header(&mut file, len)?;
    Ok(metadata.metadata().as_ref().and_then(|entries| entries.get(key)).cloned())
}

/// Reads the header; returns it and where the data begins.
fn read_header(file: &mut File, len: u64) -> Result<(Metadata, u64), Fault> {
    let wrong = |detail: String| Fault::WrongFormat { format: "safetensors", detail };
    let mut raw = [0; 8];
    if len < 8 {
        return Err(Fault::Length { what: "header", declared: 8, held: len });
    }
    file.read_exact(&mut raw)?;
    let header_len = u64::from_le_bytes(raw);
    if header_len > MAX_HEADER {
        return Err(wrong(format!("header of {header_len} bytes > {MAX_HEADER}")));
    }
    let data_start = 8 + header_len;
    if data_start > len {
        return Err(Fault::Length { what: "header", declared: data_start.into(), held: len });
    }
    let header = read_all(file.take(header_len), header_len)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| wrong(format!("header: {error}")))?;
    let (declared, held) = (metadata.data_len() as u64, len - data_start);
    if declared != held {
        return Err(Fault::Length { what: "data", declared: declared.into(), held });
    }
    Ok((metadata, data_start))
}
