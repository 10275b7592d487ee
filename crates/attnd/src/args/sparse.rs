//! The flags of masks that are lists of integers: blocks of keys, and documents.

use clap::Args;

use super::values::{Sides, parse_sides};
use crate::tensor_file::Source;

/// Lists of the keys that a query sees; all that are typed hold at once.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct SparseArgs {
    /// Blocks of keys that blocks of queries see, as compressed sparse rows: where the columns of each row of blocks begin
    /// and end (scipy's indptr), integers, `[rows+1]`, or `[layouts, rows+1]` for each head or each head of each batch element
    #[arg(long, value_name = "SRC")]
    pub csr_row_ptr: Option<Source>,
    /// These columns (scipy's indices), integers, `[columns]`, ascending in each row; layouts one after the other
    #[arg(long, value_name = "SRC")]
    pub csr_columns: Option<Source>,
    /// Queries and keys of a block; 1x1 is the adjacency of a graph (CSR), more are scipy's BSR [default: 1x1]
    #[arg(long, value_name = "QxK", value_parser = parse_sides)]
    pub csr_block: Option<Sides>,
    /// The document of each key, integers, `[keys]` or `[batch, keys]`: a query sees the keys of its own. Documents may be in
    /// several runs, and positions are counted inside of them; padding is a document as well
    #[arg(long, value_name = "SRC")]
    pub documents: Option<Source>,
    /// The document of each query, `[queries]` or `[batch, queries]` [default: those of keys]
    #[arg(long, value_name = "SRC")]
    pub query_documents: Option<Source>,
}

impl SparseArgs {
    /// The files that it reads, each with its flag.
    pub fn sources(&self) -> impl Iterator<Item = (&'static str, &Source)> {
        let Self { csr_row_ptr, csr_columns, documents, query_documents, .. } = self;
        let all = [
            ("--csr-row-ptr", csr_row_ptr),
            ("--csr-columns", csr_columns),
            ("--documents", documents),
            ("--query-documents", query_documents),
        ];
        all.into_iter().filter_map(|(flag, source)| Some((flag, source.as_ref()?)))
    }
}
