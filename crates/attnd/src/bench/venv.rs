//! A Python environment of attnd's own with torch in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::Context as _;

use crate::exit::BadInput;
use crate::output;

/// The Python of the environment in `folder`, which is made, and given torch, if it lacks either.
///
/// # Errors
/// If there is no python3, or the environment or torch can't be installed.
pub fn python_with_torch(folder: &Path) -> anyhow::Result<PathBuf> {
    let python = folder.join("bin").join("python");
    if !python.exists() {
        let mut make = Command::new("python3");
        let made = run(make.args(["-m", "venv"]).arg(folder))
            .context("python3 can't be started; install Python 3 with its venv module")?;
        succeeded(&made)
            .with_context(|| format!("python3 can't make an environment in {}", folder.display()))?;
    }
    let import = run(Command::new(&python).args(["-c", "import torch"]))
        .with_context(|| format!("{} can't be started; remove {}", python.display(), folder.display()))?;
    if !import.status.success() {
        output::note(&format!("installing torch into {}, once; this takes minutes", folder.display()));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "torch"];
        succeeded(&run(Command::new(&python).args(pip))?)
            .with_context(|| format!("torch can't be installed into {}", folder.display()))?;
        succeeded(&run(Command::new(&python).args(["-c", "import torch"]))?)
            .with_context(|| format!("the torch in {} can't be imported", folder.display()))?;
    }
    Ok(python)
}

/// Where the environment is when nobody says: in the user's cache folder.
///
/// # Errors
/// [`BadInput`] if there is no such folder.
pub fn default_folder(env: impl Fn(&str) -> Option<String>) -> Result<PathBuf, BadInput> {
    let named = |key: &str| env(key).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let cache = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
    match cache {
        Some(cache) => Ok(cache.join("attnd").join("peers")),
        None => Err(BadInput::new("where to? neither XDG_CACHE_HOME nor HOME is set; --venv names a folder")),
    }
}

fn run(command: &mut Command) -> std::io::Result<Output> {
    command.stdin(Stdio::null()).output()
}

fn succeeded(output: &Output) -> anyhow::Result<()> {
    anyhow::ensure!(output.status.success(), "{}: {}", output.status, last_words(output));
    Ok(())
}

/// What a program said last, on stderr or else on stdout; that is where pip and venv put the reason.
fn last_words(output: &Output) -> String {
    let last = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
    };
    last(&output.stderr).or_else(|| last(&output.stdout)).unwrap_or_else(|| "it said nothing".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_folder_is_the_users() {
        fn folder(pairs: &[(&str, &str)]) -> Result<PathBuf, BadInput> {
            default_folder(|key| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned()))
        }
        let home = ("HOME", "/h");
        assert_eq!(folder(&[("XDG_CACHE_HOME", "/c"), home]).unwrap(), Path::new("/c/attnd/peers"));
        // As the specification of these folders says, a relative one counts as unset.
        assert_eq!(folder(&[("XDG_CACHE_HOME", "c"), home]).unwrap(), Path::new("/h/.cache/attnd/peers"));
        assert_eq!(folder(&[home]).unwrap(), Path::new("/h/.cache/attnd/peers"));
        assert!(folder(&[]).unwrap_err().to_string().contains("--venv"));
    }

    #[cfg(unix)]
    #[test]
    fn a_program_that_fails_is_quoted() {
        let failed =
            run(Command::new("sh").args(["-c", "echo one; echo two >&2; echo >&2; exit 3"])).unwrap();
        let error = succeeded(&failed).unwrap_err().to_string();
        assert!(error.contains('3') && error.ends_with(": two"), "{error}");
    }
}
