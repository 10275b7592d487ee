//! Masks by name, each as the predicate of one element that defines it.
//!
//! `p = offset + i` is where query token `i` stands among the keys: 0 is top-left, `Tk - Tq` bottom-right, and the
//! length of the cache before it was appended to, for a call that follows one.

use super::operator::At;

/// Where a query token stands among the keys.
fn position(at: At, offset: i64) -> i64 {
    offset + at.token as i64
}

/// No later key: `j <= p`.
pub fn causal(offset: i64) -> impl Fn(At) -> bool {
    move |at| at.key as i64 <= position(at, offset)
}

/// Keys near the token: `p - left <= j <= p + right`; `None` is no limit.
pub fn window(offset: i64, left: Option<u64>, right: Option<u64>) -> impl Fn(At) -> bool {
    move |at| {
        // Positive where the key comes after the token.
        let ahead = i128::from(at.key as i64) - i128::from(position(at, offset));
        left.is_none_or(|left| -ahead <= i128::from(left))
            && right.is_none_or(|right| ahead <= i128::from(right))
    }
}

/// Keys of the token's own chunk, of `size` keys each, counted from key `begin`.
pub fn chunk(offset: i64, size: u64, begin: i64) -> impl Fn(At) -> bool {
    move |at| {
        let chunk_of = |place: i64| (place - begin).div_euclid(size as i64);
        chunk_of(at.key as i64) == chunk_of(position(at, offset))
    }
}

/// The first `prefix` keys, for every token, and no later key beyond them.
pub fn prefix(offset: i64, prefix: usize) -> impl Fn(At) -> bool {
    move |at| at.key < prefix || at.key as i64 <= position(at, offset)
}

/// Keys that are no padding: `begin <= j < end`.
pub fn keys(begin: usize, end: usize) -> impl Fn(At) -> bool {
    move |at| (begin..end).contains(&at.key)
}

/// Tokens that are no padding: `i < end`. The others see nothing.
pub fn queries(end: usize) -> impl Fn(At) -> bool {
    move |at| at.token < end
}

/// Keys of the token's own document: the same id.
pub fn documents(of_tokens: &[u32], of_keys: &[u32]) -> impl Fn(At) -> bool {
    move |at| of_tokens[at.token] == of_keys[at.key]
}

/// Blocks of `query_block` times `key_block` elements that are seen, as sparse matrices in the form of CSR: one for all heads, one for each head,
/// or one for each head of each batch element. Each has its own row pointers, from 0 on; their columns follow each other.
pub fn csr<'a>(
    (query_block, key_block): (usize, usize),
    layouts: usize,
    (row_ptr, columns): (&'a [u32], &'a [u32]),
    heads: usize,
) -> impl Fn(At) -> bool + 'a {
    let matrices: Vec<&[u32]> = row_ptr.chunks(row_ptr.len() / layouts).collect();
    move |at| {
        let layout = match layouts {
            1 => 0,
            n if n == heads => at.head,
            _ => at.batch * heads + at.head,
        };
        let before: u32 = matrices[..layout].iter().map(|pointers| pointers[pointers.len() - 1]).sum();
        let row = at.token / query_block;
        let [from, to] = [row, row + 1].map(|row| (before + matrices[layout][row]) as usize);
        columns[from..to].contains(&((at.key / key_block) as u32))
    }
}

/// A matrix of `[batch, heads, tokens, keys]`, of which the first three may be 1, for all, and the last may be short:
/// what it lacks is not seen.
///
/// # Panics
/// If `sees` doesn't have the shape's length.
pub fn dense(shape: [usize; 4], sees: &[bool]) -> impl Fn(At) -> bool {
    assert_eq!(sees.len(), shape.iter().product::<usize>(), "length of a mask of {shape:?}");
    move |at| element(shape, at).is_some_and(|index| sees[index])
}

/// Where the element of a broadcast matrix lies; `None` past its last key.
pub(super) fn element([batch, heads, tokens, keys]: [usize; 4], at: At) -> Option<usize> {
    let along = |size: usize, index: usize| if size == 1 { 0 } else { index };
    let row = (along(batch, at.batch) * heads + along(heads, at.head)) * tokens + along(tokens, at.token);
    (at.key < keys).then_some(row * keys + at.key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seen keys of each token, as digits.
    fn seen(tokens: usize, keys: usize, mask: impl Fn(At) -> bool) -> Vec<String> {
        let at = |token, key| At { batch: 0, head: 0, token, key };
        (0..tokens)
            .map(|token| (0..keys).filter(|key| mask(at(token, *key))).map(|key| key.to_string()).collect())
            .collect()
    }

    #[test]
    fn masks_see_what_their_definitions_say() {
        assert_eq!(seen(3, 5, causal(0)), ["0", "01", "012"]);
        assert_eq!(seen(3, 5, causal(2)), ["012", "0123", "01234"]);
        assert_eq!(seen(3, 2, causal(-1)), ["", "0", "01"]);
        assert_eq!(seen(3, 5, window(1, Some(1), Some(0))), ["01", "12", "23"]);
        assert_eq!(seen(3, 5, window(0, None, Some(1))), ["01", "012", "0123"]);
        assert_eq!(seen(2, 5, window(0, Some(0), None)), ["01234", "1234"]);
        assert_eq!(seen(4, 6, chunk(1, 3, 0)), ["012", "012", "345", "345"]);
        // The chunk before the first one is padding's.
        assert_eq!(seen(4, 6, chunk(0, 2, 1)), ["0", "12", "12", "34"]);
        assert_eq!(seen(4, 5, prefix(0, 2)), ["01", "01", "012", "0123"]);
        assert_eq!(seen(1, 5, keys(1, 3)), ["12"]);
        assert_eq!(seen(2, 2, queries(1)), ["01", ""]);
        assert_eq!(seen(3, 4, documents(&[7, 8, 9], &[8, 7, 7, 8])), ["12", "03", ""]);
    }

    #[test]
    fn block_masks_see_the_blocks_that_their_rows_list() {
        let one = csr((2, 3), 1, (&[0, 1, 3], &[1, 0, 1]), 2);
        assert_eq!(seen(3, 5, one), ["34", "34", "01234"]);
        let two = csr((1, 1), 2, (&[0, 1, 0, 2], &[3, 0, 1]), 2);
        let row = |at: At| (0..4).filter(|key| two(At { key: *key, ..at })).collect::<Vec<_>>();
        let at = At { batch: 1, head: 0, token: 0, key: 0 };
        assert_eq!([row(at), row(At { head: 1, ..at })], [vec![3], vec![0, 1]]);
        let four = csr((1, 1), 4, (&[0, 0, 0, 1, 0, 1, 0, 1], &[3, 0, 2]), 2);
        assert!(four(At { batch: 1, head: 1, token: 0, key: 2 }) && !four(At { key: 2, ..at }));
        assert!(four(At { key: 0, ..at }));
    }

    #[test]
    fn dense_masks_repeat_along_sizes_of_one_and_end_early() {
        let per_head = dense([1, 2, 1, 3], &[true, false, true, false, true, false]);
        let at = |head, key| At { batch: 4, head, token: 9, key };
        let row = |head| (0..4).map(|key| per_head(at(head, key))).collect::<Vec<_>>();
        assert_eq!(row(0), [true, false, true, false]);
        assert_eq!(row(1), [false, true, false, false]);
    }
}
