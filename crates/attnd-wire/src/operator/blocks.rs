//! Masks of blocks in messages.

use attnd_kernel::{Csr, OperatorError};

use crate::convert::{self, small};
use crate::error::{Error, Reason};
use crate::limits::MAX_BLOCKS;
use crate::proto;

pub(super) fn encode(csr: &Csr) -> proto::Csr {
    proto::Csr {
        query_block: small(csr.query_block()),
        key_block: small(csr.key_block()),
        layouts: small(csr.layouts()),
        row_ptr: csr.row_ptr().to_vec(),
        columns: csr.columns().to_vec(),
    }
}

/// Decodes a mask of blocks; whether it is one for a shape is for the operator to check.
pub(super) fn decode(message: proto::Csr) -> Result<Csr, Error> {
    let proto::Csr { query_block, key_block, layouts, row_ptr, columns } = message;
    for (option, got) in [("row_ptr", row_ptr.len()), ("columns", columns.len())] {
        if got > MAX_BLOCKS {
            let text = format!("mask.csr.{option} has {got} numbers, at most {MAX_BLOCKS}");
            return Err(Error::new(Reason::Operator, text));
        }
    }
    let block = (convert::size(query_block), convert::size(key_block));
    let csr = Csr::new(block, convert::size(layouts), row_ptr.into(), columns.into());
    Ok(csr.map_err(OperatorError::from)?)
}
