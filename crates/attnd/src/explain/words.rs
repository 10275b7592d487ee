//! The words of a text, as somebody cut it into tokens.

use std::fs;
use std::path::Path;

use super::part::Rules;
use crate::exit::BadInput;
use crate::tensor_file;

/// Far more than a million tokens take.
const MOST_BYTES: u64 = 256 << 20;

/// Words of keys and queries, where they are known.
#[derive(Debug, Default)]
pub struct Words {
    /// One for each key, or none at all.
    pub keys: Vec<String>,
    /// One for each query, or none at all.
    pub queries: Vec<String>,
}

impl Words {
    /// Words of keys and of queries; queries without words of their own have those of the keys at which they stand.
    ///
    /// # Errors
    /// If there are not as many as keys, or as queries.
    pub fn new(
        keys: Option<Vec<String>>,
        queries: Option<Vec<String>>,
        rules: &Rules,
    ) -> Result<Self, BadInput> {
        let (n_keys, n_queries) = (rules.shape().n_keys(), rules.shape().n_queries());
        let check = |flag: &str, words: &Option<Vec<String>>, what: &str, n: usize| match words {
            Some(words) if words.len() != n => {
                let text = format!("{flag} has {} tokens, and there are {n} {what}", words.len());
                Err(BadInput::new(text))
            }
            _ => Ok(()),
        };
        check("--tokens", &keys, "keys", n_keys)?;
        check("--query-tokens", &queries, "queries", n_queries)?;
        let keys = keys.unwrap_or_default();
        let of_query = |query: usize| {
            let position = usize::try_from(rules.position(query)?).ok()?;
            keys.get(position).cloned()
        };
        // A text for some of the queries only would be a text for none of them in pictures.
        let queries = queries.or_else(|| (0..n_queries).map(of_query).collect()).unwrap_or_default();
        Ok(Self { keys, queries })
    }
}

/// Reads words: a JSON array of strings, or else one on each line, empty lines included. Lines may begin with a bracket, as
/// `[CLS]` does. A `.safetensors` file has such an array under `tokens` in its header.
///
/// # Errors
/// If the file can't be read, or has no words.
pub fn read(flag: &str, path: &Path) -> Result<Vec<String>, BadInput> {
    let refused = |what: String| BadInput::new(format!("{flag} {}: {what}", path.display()));
    let of_json = |text: &str| {
        serde_json::from_str(text)
            .map_err(|error| refused(format!("expected a JSON array of strings: {error}")))
    };
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => of_json(&text(path).map_err(refused)?),
        Some("safetensors") => {
            let entry =
                tensor_file::read_entry(path, "tokens").map_err(|error| refused(error.fault.to_string()))?;
            of_json(&entry.ok_or_else(|| refused("no tokens in the header's __metadata__".into()))?)
        }
        _ => {
            let text = text(path).map_err(refused)?;
            Ok(serde_json::from_str(&text)
                .unwrap_or_else(|_no_json| text.lines().map(str::to_owned).collect()))
        }
    }
}

fn text(path: &Path) -> Result<String, String> {
    let file = fs::metadata(path).map_err(|error| error.to_string())?;
    if !file.is_file() {
        return Err("not a regular file".into());
    }
    if file.len() > MOST_BYTES {
        return Err(format!("{} bytes, more than {MOST_BYTES}", file.len()));
    }
    fs::read_to_string(path).map_err(|error| error.to_string())
}

/// A word as a terminal can show it: what would move the cursor is written as an escape.
pub fn printable(word: &str) -> String {
    let mut text = String::with_capacity(word.len());
    for c in word.chars() {
        if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
    }
    text
}

#[cfg(test)]
mod tests {
    use attnd_client::{AttnShape, Causal, Dims, Mask};

    use super::*;

    fn rules(queries: u64, keys: u64, causal: Causal) -> Rules {
        let dims = Dims { batch: 1, heads: 1, kv_heads: 1, queries, keys, head_dim: 1, value_dim: 1 };
        Rules::new(causal, Mask::default(), AttnShape::new(dims).unwrap(), 0).unwrap()
    }

    fn words(n: usize) -> Option<Vec<String>> {
        Some((0..n).map(|i| format!("w{i}")).collect())
    }

    #[test]
    fn words_are_lines_or_json() {
        let folder = tempfile::TempDir::new().unwrap();
        let read = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).unwrap();
            super::read("--tokens", &folder.path().join(name)).map_err(|error| error.to_string())
        };
        assert_eq!(read("a.txt", "[CLS]\nthe\n\nriver\r\n").unwrap(), ["[CLS]", "the", "", "river"]);
        assert_eq!(read("a.txt", "[\"a\", \"b\\n\"]").unwrap(), ["a", "b\n"]);
        assert_eq!(read("a.json", "[]").unwrap().len(), 0);
        let refusal = read("a.json", "{\"a\": 1}").unwrap_err();
        assert!(refusal.contains("--tokens") && refusal.contains("expected a JSON array of strings"));
        assert!(
            super::read("--tokens", folder.path()).unwrap_err().to_string().contains("not a regular file")
        );
        assert!(super::read("--tokens", Path::new("no/such")).unwrap_err().to_string().contains("no/such: "));
    }

    #[test]
    fn queries_have_the_words_of_the_keys_where_they_stand() {
        let queries =
            |n_queries, causal| Words::new(words(5), None, &rules(n_queries, 5, causal)).unwrap().queries;
        assert_eq!(queries(2, Causal::BottomRight), ["w3", "w4"]);
        assert_eq!(queries(2, Causal::TopLeft), ["w0", "w1"]);
        assert_eq!(queries(5, Causal::None), ["w0", "w1", "w2", "w3", "w4"]);
        // Nobody knows where they stand, or they stand where no key is.
        assert!(queries(2, Causal::None).is_empty() && queries(7, Causal::TopLeft).is_empty());
        let own = Words::new(words(5), words(2), &rules(2, 5, Causal::None)).unwrap();
        assert_eq!((own.keys.len(), own.queries), (5, words(2).unwrap()));
    }

    #[test]
    fn a_wrong_number_of_words_is_refused_with_both() {
        let refusal =
            |keys, queries| Words::new(keys, queries, &rules(2, 5, Causal::None)).unwrap_err().to_string();
        assert_eq!(refusal(words(4), None), "--tokens has 4 tokens, and there are 5 keys");
        assert_eq!(refusal(words(5), words(5)), "--query-tokens has 5 tokens, and there are 2 queries");
    }

    #[test]
    fn nothing_in_a_word_reaches_the_terminal_as_a_command() {
        assert_eq!(printable("a\n\u{1b}[2J"), "a\\n\\u{1b}[2J");
        assert_eq!(printable("Fluß"), "Fluß");
    }
}
