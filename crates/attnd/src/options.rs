//! What is to be computed, from flags and the files that they name, as the client takes it.

use std::sync::Arc;

use attnd_client::{
    Alibi, AttendOptions, AttnShape, Documents, Mask, Normaliser, Numbering, documents_by_id,
};
use attnd_kernel::{Csr, Relative, Score, Shift, Swin, Tensor};

use crate::args::{
    FunctionArgs, OperatorArgs, ParamValue, ScoreArgs, Sides, SiteArgs, Slopes, SparseArgs, TableArgs,
};
use crate::exit::BadInput;
use crate::flags::with_flags;
use crate::site::worker_choice;
use crate::tensor_file::{self, Numbers, QueryDim, Source};

/// Distances that T5 tells apart.
const T5_MAX_DISTANCE: u32 = 128;
/// What Swin adds between regions.
const SWIN_BETWEEN: f32 = -100.0;

/// What is to be computed, by whom, and for how long at most. Reads the files that the flags name.
///
/// # Errors
/// [`BadInput`] for flags that make no sense without others, and lists and tables that make none by themselves; errors of reading
/// files. What makes no sense for the operands shows when they are there.
pub fn of_flags(args: &OperatorArgs, site: &SiteArgs) -> anyhow::Result<AttendOptions> {
    check_pairs(args)?;
    let missing = || BadInput::new("--causal=offset needs --offset");
    let (causal, mask) = args.causal_and_mask().ok_or_else(missing)?;
    let sinks = args.sinks.as_ref().map(tensor_file::read_vector).transpose()?;
    let dense = |source: &Option<Source>| source.as_ref().map(tensor_file::read_dense).transpose();
    let normaliser = args.scores.sigmoid.map_or(Normaliser::Softmax, |bias| Normaliser::Sigmoid { bias });
    Ok(AttendOptions {
        score: score(&args.function)?,
        previous: dense(&args.function.previous)?,
        scale: args.scale,
        softcap: args.scores.softcap,
        alibi: alibi(&args.scores)?,
        relative: relative(&args.tables)?,
        swin: swin(&args.tables)?,
        causal,
        mask: Mask { documents: documents(&args.sparse)?.map(Arc::new), ..mask },
        dense_mask: dense(&args.attn_mask)?,
        csr: csr(&args.sparse)?,
        dense_bias: dense(&args.bias)?,
        normaliser,
        sinks: sinks.map(Into::into),
        workers: worker_choice(site),
        timeout: Some(site.timeout),
        ..AttendOptions::default()
    })
}

/// Which last dimension queries may have.
pub fn query_dim(args: &OperatorArgs) -> QueryDim {
    if args.function.score.is_some() { QueryDim::Any } else { QueryDim::OfKeys }
}

/// Refuses documents that were given of keys alone where there are other queries.
///
/// # Errors
/// [`BadInput`] with both numbers.
pub fn check_documents(args: &OperatorArgs, shape: &AttnShape) -> Result<(), BadInput> {
    let (queries, keys) = (shape.n_queries(), shape.n_keys());
    if args.sparse.documents.is_none() || args.sparse.query_documents.is_some() || queries == keys {
        return Ok(());
    }
    let text = format!(
        "--documents says whose the {keys} keys are, and there are {queries} queries: --query-documents says whose they are"
    );
    Err(BadInput::new(text))
}

/// Refuses flags that say nothing without others.
fn check_pairs(args: &OperatorArgs) -> Result<(), BadInput> {
    let OperatorArgs { function, tables, sparse, .. } = args;
    let score = ("--score", function.score.is_some());
    let relative = ("--relative", tables.relative.is_some());
    let (swin, window) = (("--swin", tables.swin.is_some()), ("--swin-window", tables.swin_window.is_some()));
    let regions = ("--swin-regions", tables.swin_regions.is_some());
    let row_ptr = ("--csr-row-ptr", sparse.csr_row_ptr.is_some());
    let columns = ("--csr-columns", sparse.csr_columns.is_some());
    for ((flag, is_typed), (needed, is_there)) in [
        (("--param", !function.param.is_empty()), score),
        (("--previous", function.previous.is_some()), score),
        (("--relative-max-distance", tables.relative_max_distance.is_some()), relative),
        (("--relative-bidirectional", tables.relative_bidirectional), relative),
        (swin, window),
        (window, swin),
        (regions, swin),
        (("--swin-between", tables.swin_between.is_some()), regions),
        (row_ptr, columns),
        (columns, row_ptr),
        (("--csr-block", sparse.csr_block.is_some()), row_ptr),
        (
            ("--query-documents", sparse.query_documents.is_some()),
            ("--documents", sparse.documents.is_some()),
        ),
    ] {
        if is_typed && !is_there {
            return Err(BadInput::new(format!("{flag} needs {needed}")));
        }
    }
    Ok(())
}

fn score(args: &FunctionArgs) -> anyhow::Result<Score> {
    let Some(name) = &args.score else { return Ok(Score::default()) };
    let mut parameters = Vec::with_capacity(args.param.len());
    for param in &args.param {
        let name = param.name.clone();
        parameters.push(match &param.value {
            ParamValue::Number(number) => Tensor { name, shape: vec![1], values: [*number].into() },
            ParamValue::File(source) => {
                let Numbers { shape, values } = tensor_file::read_floats(source)?;
                // numpy has numbers without dimensions, score functions don't.
                let shape = if shape.is_empty() { vec![1] } else { shape };
                Tensor { name, shape, values: values.into() }
            }
        });
    }
    Ok(Score::new(name, parameters).map_err(|error| of_fields(&error))?)
}

fn alibi(scores: &ScoreArgs) -> anyhow::Result<Option<Alibi>> {
    let slopes = match &scores.alibi {
        None => return Ok(None),
        Some(Slopes::Published) => None,
        Some(Slopes::Each(slopes)) => Some(slopes.as_slice().into()),
        Some(Slopes::File(source)) => Some(tensor_file::read_vector(source)?.into()),
    };
    Ok(Some(Alibi { slopes, by_key: scores.alibi_by_key }))
}

/// A refusal in the words of fields, with the flags that say them.
fn of_fields(error: &impl std::fmt::Display) -> BadInput {
    BadInput::new(with_flags(&error.to_string()))
}

/// A flag's value that is not what was expected.
fn refused(flag: &str, source: &Source, what: impl std::fmt::Display) -> BadInput {
    BadInput::new(format!("{flag} {source}: {what}"))
}

fn relative(args: &TableArgs) -> anyhow::Result<Option<Relative>> {
    let Some(source) = &args.relative else { return Ok(None) };
    let refused = |what: String| refused("--relative", source, what);
    let Numbers { shape, values } = tensor_file::read_floats(source)?;
    let [buckets, _heads] = *shape else {
        return Err(refused(format!("shape {shape:?}, expected [buckets, heads]")).into());
    };
    let max_distance = args.relative_max_distance.unwrap_or(T5_MAX_DISTANCE);
    let relative = Relative::new(values.into(), buckets, max_distance, args.relative_bidirectional);
    Ok(Some(relative.map_err(|error| refused(error.to_string()))?))
}

fn swin(args: &TableArgs) -> anyhow::Result<Option<Swin>> {
    let (Some(source), Some(Sides { rows, columns })) = (&args.swin, args.swin_window) else {
        return Ok(None);
    };
    let (height, width) = (rows.get(), columns.get());
    let tokens = height.saturating_mul(width);
    let entries = height.saturating_mul(2).saturating_sub(1).saturating_mul(width.saturating_mul(2) - 1);
    let Numbers { shape, values } = tensor_file::read_floats(source)?;
    if shape.len() != 2 || shape.first() != Some(&entries) {
        let what = format!("shape {shape:?}, --swin-window {height}x{width} needs [{entries}, heads]");
        return Err(refused("--swin", source, what).into());
    }
    let shift = match &args.swin_regions {
        None => None,
        Some(source) => {
            let Numbers { shape, values } = tensor_file::read_integers(source)?;
            if shape.len() != 2 || shape.get(1) != Some(&tokens) {
                let what =
                    format!("shape {shape:?}, --swin-window {height}x{width} needs [windows, {tokens}]");
                return Err(refused("--swin-regions", source, what).into());
            }
            let regions = Numbering::default().of(&values);
            Some(Shift { regions: regions.into(), between: args.swin_between.unwrap_or(SWIN_BETWEEN) })
        }
    };
    Ok(Some(Swin { height, width, table: values.into(), shift }))
}

fn csr(args: &SparseArgs) -> anyhow::Result<Option<Csr>> {
    let (Some(of_rows), Some(of_columns)) = (&args.csr_row_ptr, &args.csr_columns) else { return Ok(None) };
    let unsigned = |flag: &str, source: &Source, values: &[i64]| {
        let number = |(at, value): (usize, &i64)| {
            u32::try_from(*value).map_err(|_error| {
                refused(flag, source, format!("element {at} is {value}, not 0 to {}", u32::MAX))
            })
        };
        values.iter().enumerate().map(number).collect::<Result<Arc<[u32]>, BadInput>>()
    };
    let Numbers { shape, values } = tensor_file::read_integers(of_rows)?;
    let layouts = match *shape {
        [_] => 1,
        [layouts, _] => layouts,
        _ => {
            let what = format!("shape {shape:?}, expected [rows+1] or [layouts, rows+1]");
            return Err(refused("--csr-row-ptr", of_rows, what).into());
        }
    };
    let row_ptr = unsigned("--csr-row-ptr", of_rows, &values)?;
    let Numbers { shape, values } = tensor_file::read_integers(of_columns)?;
    if shape.len() != 1 {
        let what = format!("shape {shape:?}, expected [columns]");
        return Err(refused("--csr-columns", of_columns, what).into());
    }
    let columns = unsigned("--csr-columns", of_columns, &values)?;
    let block = args.csr_block.map_or((1, 1), |block| (block.rows.get(), block.columns.get()));
    let csr = Csr::new(block, layouts, row_ptr, columns);
    Ok(Some(csr.map_err(|error| of_fields(&error))?))
}

fn documents(args: &SparseArgs) -> anyhow::Result<Option<Documents>> {
    let Some(of_keys) = &args.documents else { return Ok(None) };
    let keys = ids("--documents", of_keys)?;
    let queries = args.query_documents.as_ref().map(|source| ids("--query-documents", source)).transpose()?;
    let (keys, tokens) = (&keys.0[..], keys.1);
    let queries = queries.as_ref().map(|(ids, tokens)| (&ids[..], *tokens));
    let documents = documents_by_id((keys, tokens), queries);
    Ok(Some(documents.map_err(|error| of_fields(&error))?))
}

/// The document of each token, and how many tokens there are of each element of the batch.
fn ids(flag: &str, source: &Source) -> anyhow::Result<(Vec<i64>, usize)> {
    let Numbers { shape, values } = tensor_file::read_integers(source)?;
    match *shape {
        [tokens] | [_, tokens] => Ok((values, tokens)),
        _ => {
            let what = format!("shape {shape:?}, expected [tokens] or [batch, tokens]");
            Err(refused(flag, source, what).into())
        }
    }
}
