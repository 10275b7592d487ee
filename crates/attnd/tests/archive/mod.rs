//! Archives of arrays as numpy writes them, and the program over them.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

/// Numbers from -1 to 1, the same on every machine.
pub(crate) fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A file of one array.
pub(crate) fn npy(descr: &str, shape: &[usize], data: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let dims: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data.flatten());
    bytes
}

/// A file of f32.
pub(crate) fn f32s(shape: &[usize], values: &[f32]) -> Vec<u8> {
    npy("<f4", shape, values.iter().map(|value| value.to_le_bytes().to_vec()))
}

/// A file of i32.
pub(crate) fn i32s(shape: &[usize], values: &[i32]) -> Vec<u8> {
    npy("<i4", shape, values.iter().map(|value| value.to_le_bytes().to_vec()))
}

/// Writes `x.npz` with these files into a folder.
pub(crate) fn write<'a>(folder: &Path, files: impl IntoIterator<Item = &'a (&'a str, Vec<u8>)>) {
    let mut archive = zip::ZipWriter::new(fs::File::create(folder.join("x.npz")).unwrap());
    for (name, bytes) in files {
        archive.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
}

/// The program in a folder, without what the surroundings have set: its exit code, stdout and stderr.
pub(crate) fn run(folder: &Path, words: &str) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attnd"));
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("ATTND_") {
            command.env_remove(key);
        }
    }
    let output = command.current_dir(folder).args(words.split_whitespace()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}
