//! The `.npy` reader.
//!
//! `ndarray-npy` parses the header; the elements are read here, because it knows no 16-bit floats.

use std::io::Read;

use ndarray_npy::npy::header::{Header, ParseHeaderError, ReadHeaderError};

use super::decode::{Element, Stored, check_shape, declared_bytes};
use super::{Fault, read_all};

/// numpy's own bound on a header it is willing to parse.
const MAX_HEADER: u64 = 10_000;
/// A header of floats opens two brackets. The parser recurses into each, so their number bounds its stack.
const MAX_BRACKETS: usize = 64;

/// Reads one array from a stream of `len` bytes that holds nothing else.
pub(super) fn read(mut reader: impl Read, len: u64) -> Result<Stored, Fault> {
    let (header, header_len) = read_header(&mut reader, len)?;
    let (element, spelled, big_endian) = element(&header)?;
    check_shape(&header.shape)?;
    let declared = declared_bytes(&header.shape, element);
    let held = len - header_len;
    if declared != u128::from(held) {
        return Err(Fault::Length { what: "data", declared, held });
    }
    let bytes = read_all(reader, held)?;
    Ok(Stored {
        shape: header.shape,
        element,
        spelled,
        big_endian,
        fortran: header.layout.is_fortran(),
        bytes,
    })
}

/// Reads magic, version, header length and header; returns the header and the number of bytes all of that took.
fn read_header(reader: &mut impl Read, len: u64) -> Result<(Header, u64), Fault> {
    let wrong = |detail: String| Fault::WrongFormat { format: "npy", detail };
    let mut head = Vec::new();
    reader.by_ref().take(12).read_to_end(&mut head)?;
    if !head.starts_with(b"\x93NUMPY") {
        return Err(wrong("it does not begin with the npy magic".into()));
    }
    let header_len = match *head {
        [_, _, _, _, _, _, 1, _, a, b, ..] => 10 + u64::from(u16::from_le_bytes([a, b])),
        [_, _, _, _, _, _, 2 | 3, _, a, b, c, d] => 12 + u64::from(u32::from_le_bytes([a, b, c, d])),
        [_, _, _, _, _, _, major @ (0 | 4..), minor, ..] => {
            return Err(wrong(format!("unknown version {major}.{minor}")));
        }
        _ => return Err(Fault::Length { what: "header", declared: 12, held: len }),
    };
    if header_len > len {
        return Err(Fault::Length { what: "header", declared: header_len.into(), held: len });
    }
    if header_len > MAX_HEADER {
        return Err(wrong(format!("header of {header_len} bytes > {MAX_HEADER}")));
    }
    reader.take(header_len.saturating_sub(head.len() as u64)).read_to_end(&mut head)?;
    if head.iter().filter(|byte| b"([{".contains(byte)).count() > MAX_BRACKETS {
        return Err(wrong("structured dtype, or a damaged header".into()));
    }
    match Header::from_reader(&mut &*head) {
        Ok(header) => Ok((header, header_len)),
        Err(ReadHeaderError::Io(error)) => Err(Fault::Io(error)),
        Err(ReadHeaderError::Parse(ParseHeaderError::DictParse(_))) => Err(wrong("damaged header".into())),
        Err(ReadHeaderError::Parse(error)) => Err(wrong(error.to_string())),
    }
}

/// Element type, how it is spelled and what makes floats of it, and whether it is big-endian.
fn element(header: &Header) -> Result<(Element, (String, &'static str), bool), Fault> {
    const CONVERT: &str = "; convert it with .astype('float32')";
    let Some(descr) = header.type_descriptor.as_string() else {
        return Err(Fault::Dtype { got: header.type_descriptor.to_string(), hint: "" });
    };
    let spelled = format!("'{}'", descr.escape_default());
    let unsupported = |hint| Fault::Dtype { got: spelled.clone(), hint };
    let (order, kind) = descr.split_at_checked(1).ok_or_else(|| unsupported(""))?;
    let big_endian = match order {
        ">" => true,
        "=" => cfg!(target_endian = "big"),
        _ => false,
    };
    let element = match kind {
        "b1" => Element::Bool,
        "f2" => Element::F16,
        "f4" => Element::F32,
        "f8" => Element::F64,
        "i4" => Element::I32,
        "i8" => Element::I64,
        "u4" => Element::U32,
        "O" => return Err(unsupported("; this is an object array, convert it with .astype('float32')")),
        "V2" => return Err(unsupported("; numpy does not record bfloat16, save it as safetensors")),
        _ => return Err(unsupported(CONVERT)),
    };
    Ok((element, (spelled, CONVERT), big_endian))
}
