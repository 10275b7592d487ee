//! Refusals name the fields of calls, as every client has them; here are the flags that say these, which are also the names in a
//! request file.

use attnd_client::{ClientError, Reason};

/// Fields, and the flags that say them. A field that isn't here is said as the one that it is a part of, if that is.
const FLAGS: [(&str, &str); 42] = [
    ("bias.alibi", "--alibi"),
    ("bias.dense", "--bias"),
    ("bias.relative", "--relative"),
    ("bias.relative.max_distance", "--relative-max-distance"),
    ("bias.swin", "--swin"),
    ("bias.swin.between", "--swin-between"),
    ("bias.swin.regions", "--swin-regions"),
    ("causal", "--causal"),
    ("empty_row", "--empty-row"),
    ("mask.chunk", "--chunk"),
    ("mask.csr", "--csr-row-ptr"),
    ("mask.csr.columns", "--csr-columns"),
    ("mask.csr.key_block", "--csr-block"),
    ("mask.csr.query_block", "--csr-block"),
    ("mask.dense", "--attn-mask"),
    ("mask.documents", "--documents"),
    ("mask.documents.keys", "--documents"),
    ("mask.documents.queries", "--query-documents or --documents"),
    ("mask.key_begin", "--key-begin"),
    ("mask.key_end", "--key-end"),
    ("mask.offsets", "--offset"),
    ("mask.positions", "--causal or --offset"),
    ("mask.prefix", "--prefix"),
    ("mask.query_end", "--query-end"),
    ("mask.window", "--window"),
    ("normaliser", "--sigmoid"),
    ("outputs.distance", "--distance"),
    ("outputs.entropy", "--entropy"),
    ("outputs.first_head", "--output-heads"),
    ("outputs.heads", "--output-heads"),
    ("outputs.heat_columns", "--heatmap"),
    ("outputs.heat_rows", "--heatmap"),
    ("outputs.mass_block", "--mass-block"),
    ("outputs.rectangles", "--rectangle"),
    ("outputs.stage", "--stage"),
    ("outputs.stages", "--stage"),
    ("outputs.top_k", "--top-k"),
    ("scale", "--scale"),
    ("score", "--score and --param"),
    ("score.previous", "--previous"),
    ("sinks", "--sinks"),
    ("softcap", "--softcap"),
];

/// A refusal with the flags behind it that say what it names.
pub fn with_flags(refusal: &str) -> String {
    let mut flags: Vec<&str> = Vec::new();
    for flag in words(refusal).filter_map(flag_of) {
        if !flags.contains(&flag) {
            flags.push(flag);
        }
    }
    if flags.is_empty() { refusal.to_owned() } else { format!("{refusal} (in flags: {})", flags.join("; ")) }
}

/// The same for a call that was refused for what its fields say, and only for that.
pub fn of_call(error: &ClientError) -> Option<String> {
    let is_of_fields =
        matches!(error.reason, Reason::Combination | Reason::Operator | Reason::Outputs | Reason::Scale);
    is_of_fields.then(|| with_flags(&error.to_string()))
}

/// Words as fields are: without what stands behind a `=` or an index.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split([' ', ',', ':', ';', '=', '[', ']', '(', ')']).filter(|word| !word.is_empty())
}

fn flag_of(field: &str) -> Option<&'static str> {
    let known = |name: &str| FLAGS.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
    known(field).or_else(|| flag_of(field.rsplit_once('.')?.0))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_flag_is_one_of_attend() {
        let cli = Cli::command();
        let attend = cli.find_subcommand("attend").unwrap();
        let known: Vec<String> = attend
            .get_arguments()
            .filter_map(|argument| argument.get_long().map(|long| format!("--{long}")))
            .collect();
        for (field, flags) in FLAGS {
            for flag in flags.split(" or ").flat_map(|flags| flags.split(" and ")) {
                assert!(known.iter().any(|known| known == flag), "{field}: {flag}");
            }
        }
    }

    #[test]
    fn flags_stand_behind_the_fields_that_they_say() {
        for (refusal, flags) in [
            ("mask.window and no mask.positions: q_len 6", "--window; --causal or --offset"),
            ("mask.key_begin[1] is 7, mask.key_end[1] is 3", "--key-begin; --key-end"),
            ("mask.prefix and causal=none", "--prefix; --causal"),
            ("bias.relative.table has 3 numbers", "--relative"),
            ("mask.csr.row_ptr[0] begins at 1, not at 0", "--csr-row-ptr"),
            ("score.beta of cosine is [3], not [1]", "--score and --param"),
            ("normaliser=sigmoid and sinks", "--sigmoid; --sinks"),
            ("score.previous is [1, 1, 3, 4], the call needs", "--previous"),
            ("outputs.mass_block is 0", "--mass-block"),
            ("outputs.stages 9 > 4", "--stage"),
            ("mask.documents.keys[0] ends at 3, kv_len is 4", "--documents"),
            ("mask.documents.queries[0] ends at 3", "--query-documents or --documents"),
        ] {
            assert_eq!(with_flags(refusal), format!("{refusal} (in flags: {flags})"));
        }
        for plain in ["q and k disagree: dim (6, 4)", "head_dim is 2048 > 1024", "mask"] {
            assert_eq!(with_flags(plain), plain);
        }
    }
}
