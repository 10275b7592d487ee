//! Scores, tables and lists that make no sense: what the program says, before anything is sent.

#![allow(clippy::unwrap_used)]

use tempfile::TempDir;

use self::archive::{f32s, i32s, numbers, run};

mod archive;

/// A port that nobody listens on: a call that gets this far fails with code 1.
const NOBODY: &str = "--endpoint http://127.0.0.1:9";

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let operands = |query_dim: usize| {
        let zeros = |shape: &[usize]| f32s(shape, &vec![0.0; shape.iter().product()]);
        vec![
            ("q", zeros(&[1, 2, 4, query_dim])),
            ("k", zeros(&[1, 1, 4, 4])),
            ("v", zeros(&[1, 1, 4, 5])),
            ("va", f32s(&[2, 3], &numbers(1, 6))),
            ("wq", f32s(&[3, query_dim], &numbers(2, 3 * query_dim))),
            ("wk", f32s(&[3, 4], &numbers(3, 12))),
            ("b", f32s(&[3], &numbers(4, 3))),
        ]
    };
    let mut files = operands(4);
    files.extend([
        ("narrow", f32s(&[3, 3], &[0.0; 9])),
        ("table", f32s(&[32, 2], &[0.5; 64])),
        ("flat", f32s(&[64], &[0.5; 64])),
        ("few", f32s(&[1, 2], &[0.5; 2])),
        ("windows", f32s(&[9, 2], &[0.5; 18])),
        ("regions", i32s(&[1, 3], &[0; 3])),
        ("row_ptr", i32s(&[5], &[0, 1, 2, 3, 4])),
        ("columns", i32s(&[4], &[0, 1, 2, 3])),
        ("five", i32s(&[4], &[0, 1, 2, 5])),
        ("negative", i32s(&[4], &[0, 1, -2, 3])),
        ("cube", i32s(&[1, 1, 4], &[0; 4])),
        ("ids", i32s(&[4], &[0, 0, 1, 0])),
        ("three", i32s(&[3], &[0, 0, 1])),
        ("of_two", i32s(&[2, 4], &[0; 8])),
        ("of_three", i32s(&[3, 4], &[0; 12])),
    ]);
    let (folder, wide) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    archive::write(folder.path(), &files);
    archive::write(wide.path(), &operands(6));
    let refused = |folder: &TempDir, words: &str, reason: &str| {
        let (code, _, stderr) =
            run(folder.path(), &format!("attend {NOBODY} --q x.npz:q --k x.npz:k --v x.npz:v {words}"));
        assert_eq!(code, Some(2), "{words}: {stderr}");
        assert!(stderr.contains(reason), "{words}: {stderr} instead of {reason}");
        assert!(stderr.lines().count() == 1 || stderr.starts_with("error: "), "{words}: {stderr}");
    };
    for (words, reason) in [
        ("--score aditive", "score=aditive: there are additive, biaffine, concat, cosine"),
        (
            "--score cosine --param beta=2 --param beta=3",
            "it takes one each of beta, eps (in flags: --score and --param)",
        ),
        (
            "--documents x.npz:of_three --query-documents x.npz:of_two",
            "mask.documents.keys has 3 entries, batch is 2 (in flags: --documents)",
        ),
        (
            "--csr-row-ptr x.npz:ids --csr-columns x.npz:columns",
            "the one before at 1 (in flags: --csr-row-ptr)",
        ),
        ("--score cosine --param beta", "expected NAME=SRC or NAME=NUMBER"),
        ("--param beta=2", "--param needs --score"),
        ("--previous x.npz:table", "--previous needs --score"),
        ("--score dot --param w=x.npz:wq", "score=dot and a parameter w: it takes one each of none"),
        (
            "--score additive --param v=x.npz:va --param w_q=x.npz:wq",
            "score=additive and no parameter w_k of [units 3, head_dim 4]",
        ),
        (
            "--score cosine --param beta=2 --param beta=3",
            "score=cosine and a parameter beta: it takes one each of beta, eps",
        ),
        (
            "--score additive --param v=x.npz:va --param w_q=x.npz:narrow --param w_k=x.npz:wk",
            "score.w_q of additive is [3, 3], not [units 3, query_dim 4] or [num_heads 2, units 3, query_dim 4]",
        ),
        (
            "--score gat --param w=x.npz:wq --param a_q=x.npz:b --param a_k=x.npz:b --param slope=2",
            "score.slope[0] is 2, not from 0 to 1",
        ),
        ("--score cosine --param beta=x.npz:nothing", "x.npz:nothing: no tensor named 'nothing'"),
        ("--score cosine --param beta=x.npz:ids", "dtype '<i4' is not supported; f16, bf16, f32 and f64 are"),
        ("--relative-bidirectional", "--relative-bidirectional needs --relative"),
        ("--relative-max-distance 9", "--relative-max-distance needs --relative"),
        ("--relative x.npz:flat", "--relative x.npz:flat: shape [64], expected [buckets, heads]"),
        ("--relative x.npz:few", "bias.relative has 1 buckets, at least 2 are needed"),
        (
            "--relative x.npz:table --relative-max-distance 16",
            "bias.relative.max_distance is 16, 32 buckets count up to 16 one by one",
        ),
        ("--swin x.npz:windows", "--swin needs --swin-window"),
        ("--swin-window 2x2", "--swin-window needs --swin"),
        ("--swin-regions x.npz:regions", "--swin-regions needs --swin"),
        ("--swin x.npz:windows --swin-window 2x2 --swin-between -1", "--swin-between needs --swin-regions"),
        (
            "--swin x.npz:windows --swin-window 2x3",
            "--swin x.npz:windows: shape [9, 2], --swin-window 2x3 needs [15, heads]",
        ),
        (
            "--swin x.npz:windows --swin-window 2x2 --swin-regions x.npz:regions",
            "--swin-regions x.npz:regions: shape [1, 3], --swin-window 2x2 needs [windows, 4]",
        ),
        ("--csr-row-ptr x.npz:row_ptr", "--csr-row-ptr needs --csr-columns"),
        ("--csr-columns x.npz:columns", "--csr-columns needs --csr-row-ptr"),
        ("--csr-block 2x2", "--csr-block needs --csr-row-ptr"),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:five",
            "mask.csr.columns[3] is 5, 4 keys in blocks of 1 have 4",
        ),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:negative",
            "--csr-columns x.npz:negative: element 2 is -2, not 0 to 4294967295",
        ),
        (
            "--csr-row-ptr x.npz:cube --csr-columns x.npz:columns",
            "--csr-row-ptr x.npz:cube: shape [1, 1, 4], expected [rows+1] or [layouts, rows+1]",
        ),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:cube",
            "--csr-columns x.npz:cube: shape [1, 1, 4], expected [columns]",
        ),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:va",
            "x.npz:va: dtype '<f4' is not supported; i32, i64 and u32 are",
        ),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:columns --csr-block 2x1",
            "mask.csr has 4 rows of blocks, 4 queries in blocks of 2 have 2",
        ),
        ("--query-documents x.npz:ids", "--query-documents needs --documents"),
        ("--documents x.npz:three", "mask.documents.queries[0] ends at 3, q_len is 4"),
        (
            "--documents x.npz:cube",
            "--documents x.npz:cube: shape [1, 1, 4], expected [tokens] or [batch, tokens]",
        ),
        (
            "--documents x.npz:ids --key-end 3",
            "mask.key_end and mask.documents (in flags: --key-end; --documents)",
        ),
        (
            "--window 1,0 --key-end 3",
            "mask.window and no mask.positions: q_len 4, kv_len 3 can be aligned two ways \
             (in flags: --window; --causal or --offset)",
        ),
        ("--prefix 2", "mask.prefix and causal=none (in flags: --prefix; --causal)"),
        (
            "--key-begin 4 --key-end 2",
            "mask.key_begin[0] is 4, mask.key_end[0] is 2 (in flags: --key-begin; --key-end)",
        ),
        ("--key-end 5", "mask.key_end[0] is 5, kv_len is 4 (in flags: --key-end)"),
        ("--causal=offset --offset 1,2", "mask.offsets has 2 entries, batch is 1 (in flags: --offset)"),
        ("--chunk 2 --documents x.npz:ids", "(in flags: --chunk; --documents)"),
        ("--sigmoid 0 --sinks x.npz:b", "normaliser=sigmoid and sinks (in flags: --sigmoid; --sinks)"),
        (
            "--score additive --param v=0.5 --param w_q=x.npz:wq --param w_k=x.npz:wk",
            "--param v=0.5: v of additive is [units 3] or [num_heads 2, units 3], not one number; \
             it comes from a file, as --param v=x.npz:v",
        ),
    ] {
        refused(&folder, words, reason);
    }
    let explain = "explain --endpoint http://127.0.0.1:9 --q x.npz:q --k x.npz:k --window 1,0 --key-end 3";
    let (code, _, stderr) = run(folder.path(), explain);
    assert!(code == Some(2) && stderr.contains("(in flags: --window; --causal or --offset)"), "{stderr}");
    refused(&wide, "", "q and k disagree: dim (6, 4)");
    refused(&wide, "--score dot", "score=dot and query_dim 6: keys have 4");
    let additive =
        "--score additive --param v=x.npz:va --param w_q=x.npz:wq --param w_k=x.npz:wk --param b=0.5";
    for words in [additive, "--score cosine --param beta=2", "--documents x.npz:ids", "--score scaled_dot"] {
        let (code, _, stderr) =
            run(folder.path(), &format!("attend {NOBODY} --q x.npz:q --k x.npz:k --v x.npz:v {words}"));
        assert_eq!(code, Some(1), "{words} is a call, which nobody answers: {stderr}");
    }
    let (code, _, stderr) = run(
        folder.path(),
        "attend --workers 1 --q x.npz:q --k x.npz:k --v x.npz:v --score cosine --param beta=x.npz:b -o x.npy",
    );
    assert!(code == Some(2) && stderr.contains("score.beta of cosine is [3]"), "{stderr}");
}

/// What would fit the queries that are asked about, and not the call that they are part of.
#[test]
fn a_part_of_a_call_is_refused_as_the_call_is() {
    let zeros = |shape: &[usize]| f32s(shape, &vec![0.0; shape.iter().product()]);
    let files = vec![
        ("q", zeros(&[1, 2, 9, 4])),
        ("k", zeros(&[1, 2, 4, 4])),
        ("v", zeros(&[1, 2, 4, 4])),
        ("beta", zeros(&[2, 3])),
        ("bias", zeros(&[1, 1, 3, 4])),
        ("mask", archive::npy("|b1", &[1, 1, 3, 4], std::iter::once(vec![1; 12]))),
        ("table", zeros(&[32, 2])),
        ("row_ptr", i32s(&[4], &[0, 1, 2, 3])),
        ("columns", i32s(&[3], &[0, 1, 2])),
        ("slopes", zeros(&[3])),
    ];
    let folder = TempDir::new().unwrap();
    archive::write(folder.path(), &files);
    let both_ways = "q_len 9, kv_len 4 can be aligned two ways";
    for (words, query, reason) in [
        ("--score cosine --param beta=x.npz:beta", "2-4", "score.beta of cosine is [2, 3], not"),
        (
            "--bias x.npz:bias",
            "2-4",
            "bias.dense is [1, 1, 3, 4], the call needs [1, 1 or 2, 1 or 9, 1 to 4]",
        ),
        ("--attn-mask x.npz:mask", "2-4", "mask.dense is [1, 1, 3, 4], the call needs"),
        (
            "--score location_aware --previous x.npz:bias",
            "2-4",
            "score.previous is [1, 1, 3, 4], the call needs",
        ),
        ("--alibi 1,1", "2-5", both_ways),
        ("--relative x.npz:table", "2-5", both_ways),
        (
            "--csr-row-ptr x.npz:row_ptr --csr-columns x.npz:columns",
            "2-4",
            "mask.csr has 3 rows of blocks, 9 queries",
        ),
        ("--alibi x.npz:slopes --causal", "2-4", "bias.alibi"),
    ] {
        let said = |verb: &str| {
            let (code, _, stderr) =
                run(folder.path(), &format!("{verb} {NOBODY} --q x.npz:q --k x.npz:k {words}"));
            assert!(code == Some(2) && stderr.contains(reason), "{verb} {words}: {code:?}, {stderr}");
            stderr
        };
        let explain = said(&format!("explain --query {query}"));
        // Of a call it is said who refused it.
        let attend = said("attend --v x.npz:v").replace("http://127.0.0.1:9: ", "");
        assert_eq!(explain, attend, "{words}");
    }
}
