//! Queries of a session: checked before they are sent, cut into blocks of tokens where they are many, put together again.

use std::ops::Range;
use std::sync::Arc;

use attnd_kernel::{AttnShape, Bias, Causal, Compute, Dtype, Mask, Operator, PerBatch, Positions};
use attnd_plan::session::SessionSpec;
use attnd_wire::session::{QueryOperator, StepContext, StepQueries, check_operator};
use attnd_wire::{ContextChunk, Error, Reason, refusal};
use bytes::Bytes;

use crate::context::ContextAssembly;
use crate::operands::{AttendOptions, Operands};

/// Bytes of queries in one message, or of their answer.
pub(crate) const MOST_BYTES: usize = 4 << 20;

/// How to attend over a session. The default: over all tokens, queries in the session's element type, and else what [`AttendOptions`] is
/// by default.
#[derive(Clone, Debug, Default)]
pub struct QueryOptions {
    /// What is computed. Sessions have neither dense tensors, nor outputs beside the context, nor score functions that make other keys,
    /// nor uniform empty rows; and the workers are those that hold the keys.
    pub attend: AttendOptions,
    /// Element type of the queries; `None`: that of the session.
    pub dtype: Option<Dtype>,
    /// How many tokens of the layer are looked at; `None`: all, with those that the step appends.
    pub at_len: Option<u64>,
    /// Which generation of the session; `None`: whichever it has.
    pub generation: Option<u64>,
}

/// The answer to queries of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionAttended {
    /// `[heads, tokens, value_dim]`.
    pub context: Vec<f32>,
    /// `[heads, tokens]`, natural logarithm of the sum of exponentials.
    pub lse: Vec<f32>,
    /// How many tokens of the layer were looked at.
    pub at_len: u64,
    /// Of which generation of the session.
    pub generation: u64,
    /// Names the order of arithmetic.
    pub kernel_id: String,
    /// How often the request was sent; of one that was cut into several, the one that took most.
    pub attempts: u32,
}

/// Queries that were checked.
#[derive(Clone, Debug)]
pub(crate) struct Queries<'a> {
    q: Bytes,
    dtype: Dtype,
    tokens: usize,
    options: &'a QueryOptions,
    spec: &'a SessionSpec,
    /// Of all of them, over as many keys as the layer is believed to have.
    operator: Arc<Operator>,
}

impl<'a> Queries<'a> {
    /// Queries of a session, as many tokens as `q` has bytes for, over a layer that is believed to have `len` tokens.
    ///
    /// # Errors
    /// As for a call, and [`Reason::Combination`] for what sessions don't have.
    pub(crate) fn new(
        q: Bytes,
        options: &'a QueryOptions,
        spec: &'a SessionSpec,
        len: u64,
    ) -> Result<Self, Error> {
        let dtype = options.dtype.unwrap_or(spec.dtype);
        let of_token = spec.heads * spec.head_dim * dtype.size();
        if !q.len().is_multiple_of(of_token) {
            let detail = format!("q: {} bytes, a token has {of_token}", q.len());
            return Err(Error::new(Reason::PayloadLength, detail));
        }
        let tokens = q.len() / of_token;
        let operator = operator(&options.attend, spec, tokens, options.at_len.unwrap_or(len))?;
        Ok(Self { q, dtype, tokens, options, spec, operator })
    }

    /// How many.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of a token, in the question or in the answer, whichever has more.
    fn token_bytes(&self) -> usize {
        let answer = self.spec.heads * (self.spec.value_dim + 1) * size_of::<f32>();
        answer.max(self.q.len() / self.tokens.max(1))
    }

    /// Bytes of the question or of the answer, whichever has more.
    pub(crate) fn bytes(&self) -> usize {
        self.token_bytes() * self.tokens
    }

    /// The blocks of tokens that messages have room for, ascending.
    pub(crate) fn blocks(&self) -> Vec<Range<usize>> {
        let at_once = (MOST_BYTES / self.token_bytes().max(1)).max(1);
        let block = |first: usize| first..self.tokens.min(first + at_once);
        (0..self.tokens).step_by(at_once).map(block).collect()
    }

    /// All of them, in one message.
    pub(crate) fn whole(&self) -> Block {
        self.message(self.q.clone(), self.tokens, Arc::clone(&self.operator), self.options.at_len)
    }

    /// Some of them, over the first `at_len` tokens, in each of which they see what they see in the whole: positions are those that they
    /// have there. The last block may be over as many tokens as the layer has when it comes.
    ///
    /// # Errors
    /// [`Reason::Combination`] where an operator has lists or tables by query token.
    pub(crate) fn block(&self, tokens: Range<usize>, at_len: Option<u64>) -> Result<Block, Error> {
        let whole = &self.operator;
        let by_token = [
            ("mask.documents", whole.mask().documents.is_some()),
            ("mask.csr", whole.csr().is_some()),
            ("bias.swin", whole.biases().iter().any(|bias| matches!(bias, Bias::Swin(_)))),
        ];
        if let Some((option, _)) = by_token.iter().find(|(_, is_there)| *is_there) {
            let detail = format!("q of {} bytes, which is sent in blocks, and {option}", self.q.len());
            return Err(Error::new(Reason::Combination, detail));
        }
        let is_last = tokens.end == self.tokens;
        let mask = block_mask(whole.mask(), &tokens, is_last, self.tokens, at_len);
        let attend = AttendOptions { mask, causal: Causal::None, ..self.options.attend.clone() };
        let keys = at_len.unwrap_or(whole_keys(self.options, self.spec));
        let operator = operator(&attend, self.spec, tokens.len(), keys)?;
        Ok(self.message(self.rows(&tokens), tokens.len(), operator, at_len))
    }

    /// The queries of some tokens: those of each head, one behind the other.
    fn rows(&self, tokens: &Range<usize>) -> Bytes {
        let row = self.spec.head_dim * self.dtype.size();
        let head = |head: usize| {
            let first = head * self.tokens;
            &self.q[(first + tokens.start) * row..(first + tokens.end) * row]
        };
        if self.spec.heads == 1 {
            return self.q.slice(tokens.start * row..tokens.end * row);
        }
        (0..self.spec.heads).map(head).collect::<Vec<_>>().concat().into()
    }

    fn message(&self, q: Bytes, tokens: usize, operator: Arc<Operator>, at_len: Option<u64>) -> Block {
        let mut queries = StepQueries::new(tokens, self.dtype, q, QueryOperator::from(&*operator));
        queries.allow_non_finite = self.options.attend.allow_non_finite;
        queries.at_len = at_len;
        queries.generation = self.options.generation;
        Block { queries, kernel_id: operator.kernel_id(Compute::F32) }
    }

    /// Room for the answer.
    ///
    /// # Errors
    /// [`Reason::ShapeLimit`] if this process can't get the memory.
    pub(crate) fn room(&self) -> Result<ContextAssembly, Error> {
        ContextAssembly::new(self.spec.shape(self.tokens, 1)?)
    }

    /// The order of arithmetic of the whole.
    pub(crate) fn kernel_id(&self) -> &'static str {
        self.operator.kernel_id(Compute::F32)
    }
}

/// Queries of one message.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// What is sent.
    pub(crate) queries: StepQueries,
    /// The order of arithmetic that their answer must have.
    pub(crate) kernel_id: &'static str,
}

/// The rows of one message, as they come.
#[derive(Debug)]
pub(crate) struct BlockAnswer {
    rows: ContextAssembly,
    kernel_id: &'static str,
    /// What was looked at: tokens and generation.
    at: Option<(u64, u64)>,
}

impl BlockAnswer {
    /// # Errors
    /// [`Reason::ShapeLimit`] if this process can't get the memory.
    pub(crate) fn new(block: &Block, spec: &SessionSpec) -> Result<Self, Error> {
        let shape = spec.shape(block.queries.tokens, 1)?;
        Ok(Self { rows: ContextAssembly::new(shape)?, kernel_id: block.kernel_id, at: None })
    }

    /// Takes some rows, which are of one view of the layer.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`] and [`Reason::Checksum`].
    pub(crate) fn accept(&mut self, context: StepContext, shape: &AttnShape) -> Result<(), Error> {
        let at = (context.at_len, context.generation);
        if *self.at.get_or_insert(at) != at {
            let detail = format!("rows over {} tokens of generation {}, others over others", at.0, at.1);
            return Err(Error::new(Reason::ReplyInvalid, detail));
        }
        if context.kernel_id != self.kernel_id {
            return Err(refusal::older_coordinator(&context.kernel_id, self.kernel_id));
        }
        self.rows.accept(&context.decode(shape)?)
    }

    /// Context, lse, tokens that were looked at and their generation, if every row is here.
    ///
    /// # Errors
    /// [`Reason::ReplyInvalid`].
    pub(crate) fn finish(self) -> Result<BlockRows, Error> {
        let (context, lse) = self.rows.finish()?;
        let (at_len, generation) = self.at.unwrap_or_default();
        Ok(BlockRows { context, lse, at_len, generation })
    }
}

/// All rows of one message.
#[derive(Debug)]
pub(crate) struct BlockRows {
    pub(crate) context: Vec<f32>,
    pub(crate) lse: Vec<f32>,
    pub(crate) at_len: u64,
    pub(crate) generation: u64,
}

impl BlockRows {
    /// The rows as a part of the whole.
    pub(crate) fn of(self, tokens: Range<usize>, heads: usize) -> ContextChunk {
        ContextChunk { heads: 0..heads, tokens, lse: self.lse, context: self.context }
    }
}

/// How many keys an operator is made for where nobody knows: none of its parts that depend on their number is in a block.
fn whole_keys(options: &QueryOptions, spec: &SessionSpec) -> u64 {
    options.at_len.unwrap_or(spec.max_tokens as u64)
}

/// The mask of some queries of a whole, by itself.
fn block_mask(
    whole: &Mask,
    tokens: &Range<usize>,
    is_last: bool,
    n_queries: usize,
    at_len: Option<u64>,
) -> Mask {
    let first_of = |each: &PerBatch<usize>| match each {
        PerBatch::Same(n) => *n,
        PerBatch::Each(each) => each.first().copied().unwrap_or_default(),
    };
    let query_end = whole.query_end.as_ref().map(first_of);
    let start = tokens.start as i64;
    let offset = |offset: i64| Some(Positions::Offset(PerBatch::Same(offset + start)));
    let positions = match &whole.positions {
        None => None,
        Some(Positions::TopLeft) => offset(0),
        // The last query stands at the last key in the block as in the whole.
        Some(Positions::BottomRight) if is_last && query_end.is_none() => Some(Positions::BottomRight),
        Some(Positions::BottomRight) => {
            let keys =
                whole.key_end.as_ref().map(first_of).map(|keys| keys as u64).or(at_len).unwrap_or_default();
            offset(keys as i64 - query_end.unwrap_or(n_queries) as i64)
        }
        Some(Positions::Offset(PerBatch::Same(by))) => offset(*by),
        Some(Positions::Offset(PerBatch::Each(each))) => offset(each.first().copied().unwrap_or_default()),
    };
    let query_end = query_end.map(|end| PerBatch::Same(end.saturating_sub(tokens.start).min(tokens.len())));
    Mask { positions, query_end, ..whole.clone() }
}

/// The operator of queries of a session over `keys` tokens.
fn operator(
    options: &AttendOptions,
    spec: &SessionSpec,
    tokens: usize,
    keys: u64,
) -> Result<Arc<Operator>, Error> {
    let refused = |option: &str| Error::new(Reason::Combination, format!("session and {option}"));
    let absent = [
        ("mask.dense", options.dense_mask.is_some()),
        ("bias.dense", options.dense_bias.is_some()),
        ("score.previous", options.previous.is_some()),
        ("projection", options.source.is_some()),
        ("forbid_empty_rows", options.forbid_empty_rows),
    ];
    if let Some((option, _)) = absent.iter().find(|(_, is_there)| *is_there) {
        return Err(refused(option));
    }
    let keys = usize::try_from(keys).unwrap_or(usize::MAX).max(1);
    let begin = Operands::begin_of(spec.shape(tokens, keys)?, spec.dtype, options)?;
    if begin.outputs.is_some() {
        return Err(refused("outputs"));
    }
    check_operator(&begin.operator)?;
    Ok(begin.operator)
}

#[cfg(test)]
mod tests {
    use attnd_kernel::Window;

    use super::*;
    use crate::operands::Alibi;
    use crate::session::tests::spec;

    /// 8 heads of 4 elements: 128 bytes a token, 96 in the answer.
    fn bytes(tokens: usize) -> Bytes {
        (0..tokens * 128).map(|i| (i % 249) as u8).collect::<Vec<_>>().into()
    }

    fn intervals(operator: &Operator, shape: &AttnShape) -> Vec<Range<usize>> {
        let mask = operator.mask_of_group(0, shape);
        (0..shape.n_queries()).map(|token| mask.visible(token)).collect()
    }

    #[test]
    fn blocks_see_what_they_see_in_the_whole() {
        let spec = spec();
        let (tokens, keys) = (50_000, 70_000);
        let masks = [
            Mask { causal: true, positions: Some(Positions::BottomRight), ..Mask::default() },
            Mask { causal: true, positions: Some(Positions::TopLeft), ..Mask::default() },
            Mask { causal: true, positions: Some(Positions::Offset(PerBatch::Same(-7))), ..Mask::default() },
            Mask {
                positions: Some(Positions::BottomRight),
                window: Window { left: Some(9), right: Some(2) },
                key_end: Some(PerBatch::Same(60_000)),
                query_end: Some(PerBatch::Same(40_000)),
                ..Mask::default()
            },
            Mask {
                causal: true,
                positions: Some(Positions::Offset(PerBatch::Each([5].into()))),
                prefix: Some(PerBatch::Same(3)),
                chunk: std::num::NonZeroUsize::new(1000),
                ..Mask::default()
            },
        ];
        for mask in masks {
            let attend = AttendOptions { mask: mask.clone(), ..AttendOptions::default() };
            let options = QueryOptions { attend, at_len: Some(keys), ..QueryOptions::default() };
            let queries = Queries::new(bytes(tokens), &options, &spec, 0).unwrap();
            let whole = intervals(&queries.operator, &spec.shape(tokens, keys as usize).unwrap());
            let blocks = queries.blocks();
            assert!(blocks.len() > 1 && blocks[0] == (0..32_768), "{blocks:?}");
            for block in blocks {
                let message = queries.block(block.clone(), Some(keys)).unwrap().queries;
                assert_eq!(message.tokens, block.len());
                let (shape, operator) = message.over(&spec, keys as usize).unwrap();
                assert_eq!(intervals(&operator, &shape), whole[block], "{mask:?}");
            }
        }
    }

    #[test]
    fn the_rows_of_a_block_are_those_of_each_head() {
        let (spec, options) = (spec(), QueryOptions::default());
        let queries = Queries::new(bytes(5), &options, &spec, 9).unwrap();
        let q = bytes(5);
        let block = queries.block(2..4, Some(9)).unwrap().queries;
        for head in 0..8 {
            assert_eq!(block.q[head * 32..][..32], q[(head * 5 + 2) * 16..][..32]);
        }
        assert_eq!(queries.whole().queries.q, q);
        assert_eq!(block.check(0, &spec), Ok(()));
    }

    #[test]
    fn what_sessions_do_not_have_is_refused_before_anything_is_sent() {
        let spec = spec();
        let refused = |attend: AttendOptions, bytes: Bytes| {
            let options = QueryOptions { attend, ..QueryOptions::default() };
            Queries::new(bytes, &options, &spec, 9).unwrap_err().message()
        };
        let none = AttendOptions::default;
        assert_eq!(refused(none(), bytes(1).slice(1..)), "PAYLOAD_LENGTH: q: 127 bytes, a token has 128");
        assert_eq!(refused(none(), Bytes::new()), "SHAPE_ZERO: q_len");
        assert_eq!(
            refused(AttendOptions { forbid_empty_rows: true, ..none() }, bytes(1)),
            "COMBINATION: session and forbid_empty_rows"
        );
        let uniform = AttendOptions { empty_row: attnd_kernel::EmptyRow::Uniform, ..none() };
        assert_eq!(refused(uniform, bytes(1)), "COMBINATION: session and empty_row=uniform");
        let outputs = attnd_kernel::OutputsParts { top_k: 3, ..Default::default() };
        assert_eq!(
            refused(AttendOptions { outputs, ..none() }, bytes(1)),
            "COMBINATION: session and outputs"
        );
    }

    #[test]
    fn a_bias_by_distance_is_cut_and_a_list_by_token_is_not() {
        let spec = spec();
        let alibi = AttendOptions {
            alibi: Some(Alibi::default()),
            causal: Causal::BottomRight,
            ..AttendOptions::default()
        };
        let options = QueryOptions { attend: alibi, ..QueryOptions::default() };
        let queries = Queries::new(bytes(40_000), &options, &spec, 50_000).unwrap();
        assert_eq!(queries.blocks(), [0..32_768, 32_768..40_000]);
        // The last one goes first, over whatever there is then.
        let last = queries.block(32_768..40_000, None).unwrap();
        assert_eq!(last.queries.at_len, None);
        let (_, operator) = last.queries.over(&spec, 60_000).unwrap();
        assert_eq!(operator.mask().positions, Some(Positions::BottomRight));
        let first = queries.block(0..32_768, Some(60_000)).unwrap();
        let (_, operator) = first.queries.over(&spec, 60_000).unwrap();
        assert_eq!(operator.mask().positions, Some(Positions::Offset(PerBatch::Same(20_000))));

        let run = |end| vec![vec![attnd_kernel::Run { end, id: 1 }]];
        let documents = attnd_kernel::Documents::new(&run(40_000), &run(50_000)).unwrap();
        let mask = Mask { documents: Some(Arc::new(documents)), ..Mask::default() };
        let options = QueryOptions {
            attend: AttendOptions { mask, ..AttendOptions::default() },
            at_len: Some(50_000),
            ..QueryOptions::default()
        };
        let queries = Queries::new(bytes(40_000), &options, &spec, 0).unwrap();
        assert_eq!(
            queries.block(0..32_768, Some(50_000)).unwrap_err().message(),
            "COMBINATION: q of 5120000 bytes, which is sent in blocks, and mask.documents"
        );
    }
}
