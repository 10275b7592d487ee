//! Names of tensors and results as a person types them: `SRC` and `OUT`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a tensor is read from: `file.npy`, `file.npz:NAME` or `file.safetensors:NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The only array of a `.npy` file.
    Npy(PathBuf),
    /// A named array of a `.npz` archive.
    Npz {
        /// The archive.
        path: PathBuf,
        /// The array, with or without its `.npy`.
        name: String,
    },
    /// A named tensor of a `.safetensors` file.
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
}

impl Source {
    /// The file that holds the tensor.
    pub fn path(&self) -> &Path {
        match self {
            Self::Npy(path) | Self::Npz { path, .. } | Self::Safetensors { path, .. } => path,
        }
    }
}

impl FromStr for Source {
    type Err = String;

    /// Looks at the text only. A path may hold colons: what counts is the last `.npz:` or `.safetensors:`, and a text
    /// that ends in `.npy` is always a path.
    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected file.npy, file.npz:NAME or file.safetensors:NAME";
        if text.ends_with(".npy") {
            return Ok(Self::Npy(text.into()));
        }
        for suffix in [".npz", ".safetensors"] {
            if text.ends_with(suffix) {
                return Err(format!("which tensor of it? write {text}:NAME"));
            }
        }
        let named = |suffix: &str| {
            let (stem, name) = text.rsplit_once(&format!("{suffix}:"))?;
            (!name.is_empty()).then(|| (PathBuf::from(format!("{stem}{suffix}")), name.to_owned()))
        };
        if let Some((path, name)) = named(".npz") {
            Ok(Self::Npz { path, name })
        } else if let Some((path, name)) = named(".safetensors") {
            Ok(Self::Safetensors { path, name })
        } else {
            Err(EXPECTED.into())
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Npy(path) => write!(f, "{}", path.display()),
            Self::Npz { path, name } | Self::Safetensors { path, name } => {
                write!(f, "{}:{name}", path.display())
            }
        }
    }
}

/// Where a result is written; the extension chooses the format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputPath {
    /// `.npy`: the context only.
    Npy(PathBuf),
    /// `.safetensors`: `context` and `lse`.
    Safetensors(PathBuf),
}

impl OutputPath {
    /// The file to write.
    pub fn path(&self) -> &Path {
        match self {
            Self::Npy(path) | Self::Safetensors(path) => path,
        }
    }
}

impl FromStr for OutputPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npy") => Ok(Self::Npy(path)),
            Some("safetensors") => Ok(Self::Safetensors(path)),
            _ => {
                Err("expected a file name that ends in .npy (context) or .safetensors (context and lse)"
                    .into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_apart_even_where_paths_hold_colons() {
        let npz = |path: &str, name: &str| Source::Npz { path: path.into(), name: name.into() };
        let safetensors =
            |path: &str, name: &str| Source::Safetensors { path: path.into(), name: name.into() };
        for (text, source) in [
            ("q.npy", Source::Npy("q.npy".into())),
            ("/a:b/q.npy", Source::Npy("/a:b/q.npy".into())),
            ("x.npz:q", npz("x.npz", "q")),
            ("C:/a:b/x.npz:a/q", npz("C:/a:b/x.npz", "a/q")),
            ("old.npz:dir/x.npz:q", npz("old.npz:dir/x.npz", "q")),
            ("m.safetensors:layer1.q", safetensors("m.safetensors", "layer1.q")),
            ("m.safetensors:a:b", safetensors("m.safetensors", "a:b")),
        ] {
            assert_eq!(text.parse(), Ok(source.clone()), "{text}");
            assert_eq!(source.to_string(), text);
        }
    }

    #[test]
    fn what_names_no_tensor_says_what_is_expected() {
        assert!("x.npz".parse::<Source>().unwrap_err().contains("x.npz:NAME"));
        for text in ["", "q", "q.txt", "q.txt:a", "x.npz:", "npz:q"] {
            assert!(text.parse::<Source>().unwrap_err().contains("expected file.npy"), "{text}");
        }
    }

    #[test]
    fn the_extension_chooses_the_output_format() {
        assert_eq!("a.b/o.npy".parse(), Ok(OutputPath::Npy("a.b/o.npy".into())));
        assert_eq!("o.safetensors".parse(), Ok(OutputPath::Safetensors("o.safetensors".into())));
        for text in ["o", "o.npz", ".npy", ""] {
            assert!(text.parse::<OutputPath>().is_err(), "{text}");
        }
    }
}
