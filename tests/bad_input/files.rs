//! Files that `attnd attend` can't use: one line on stderr that names file and problem, exit code 2, nothing on stdout.
//!
//! Every file is made of bytes written here, so none of it depends on the libraries that read them.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::process::{Machine, program};

/// Nothing listens there: an input that is found to be unusable only after a connection would show.
const NOWHERE: &str = "http://127.0.0.1:1";
const QUICK: Duration = Duration::from_secs(1);

/// An npy file of version 1.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = u16::try_from(header.len()).unwrap().to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
}

/// An npy file of f32 zeros.
fn zeros(shape: &[usize]) -> Vec<u8> {
    let text: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    npy("'<f4'", &format!("({text})"), &vec![0; shape.iter().product::<usize>() * 4])
}

/// A zip archive with one stored entry.
fn zip(name: &str, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).unwrap().to_le_bytes();
    let name_length = u16::try_from(name.len()).unwrap().to_le_bytes();
    // Version, flags, method, time, date, checksum, both sizes, length of the name, length of extras.
    let common = [
        &[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..],
        &crc32(data).to_le_bytes(),
        &size,
        &size,
        &name_length,
        &[0, 0],
    ]
    .concat();
    let local = [b"PK\x03\x04", &common[..], name.as_bytes(), data].concat();
    // Length of comment, disk, attributes, offset of the local header.
    let central = [b"PK\x01\x02\x14\x00", &common[..], &[0; 14], name.as_bytes()].concat();
    let (at, length) = (u32::try_from(local.len()).unwrap(), u32::try_from(central.len()).unwrap());
    let end =
        [b"PK\x05\x06", &[0, 0, 0, 0, 1, 0, 1, 0][..], &length.to_le_bytes(), &at.to_le_bytes(), &[0, 0]]
            .concat();
    [local, central, end].concat()
}

fn crc32(data: &[u8]) -> u32 {
    !data.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn attend(directory: &Path, [q, k, v]: [&str; 3], extra: &[&str]) -> Output {
    let mut command = Command::new(program());
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("ATTND_") {
            command.env_remove(key);
        }
    }
    command.current_dir(directory).args(["attend", "--q", q, "--k", k, "--v", v]).args(extra);
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs `attnd attend` and demands one line with all these `words` on stderr.
fn refused(directory: &Path, inputs: [&str; 3], extra: &[&str], words: &[&str]) {
    let begun = Instant::now();
    let Output { status, stdout, stderr } = attend(directory, inputs, extra);
    let elapsed = begun.elapsed();
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{inputs:?}: {said}");
    assert!(stdout.is_empty(), "{inputs:?}: {stdout:?}");
    let lines: Vec<&str> = said.lines().collect();
    let [line] = lines[..] else { panic!("{inputs:?}: {said:?} instead of one line") };
    assert!(said.ends_with('\n') && !line.contains(char::is_control), "{inputs:?}: {said:?}");
    for word in words {
        assert!(line.contains(word), "{inputs:?}: no {word:?} in {line:?}");
    }
    assert!(elapsed < QUICK, "{inputs:?}: took {elapsed:?}");
}

/// Each is tried as Q, as K and as V, beside good files.
#[test]
fn files_that_cannot_be_read() {
    let _machine = Machine::shared();
    let directory = TempDir::new().unwrap();
    let put = |name: &str, bytes: &[u8]| std::fs::write(directory.path().join(name), bytes).unwrap();
    let good = zeros(&[2, 3, 4]);
    put("good.npy", &good);
    std::fs::create_dir(directory.path().join("directory.npy")).unwrap();
    let archive = zip("x.npy", &good);
    let mut damaged = archive.clone();
    // The last element of the array: the entry follows 30 bytes of header and 5 of name.
    damaged[35 + good.len() - 1] ^= 1;
    let tensor = r#"{"x":{"dtype":"F32","shape":[2,3,4],"data_offsets":[0,96]}}"#;
    let integers = r#"{"x":{"dtype":"I64","shape":[1,3,4],"data_offsets":[0,96]}}"#;
    let flat = r#"{"x":{"dtype":"F32","shape":[24],"data_offsets":[0,96]}}"#;
    let outside = r#"{"x":{"dtype":"F32","shape":[2,3,4],"data_offsets":[96,192]}}"#;
    let data = [0; 96];
    let files: &[(&str, Vec<u8>, &[&str])] = &[
        ("empty.npy", vec![], &["npy"]),
        ("text.npy", b"0.1, 0.2, 0.3\n0.4, 0.5, 0.6\n".to_vec(), &["not a npy file"]),
        ("zip.npy", archive.clone(), &["not a npy file"]),
        ("magic.npy", [b"\x93NUMPZ", &good[6..]].concat(), &["not a npy file"]),
        ("version.npy", [b"\x93NUMPY\x09", &good[7..]].concat(), &["version 9"]),
        ("only_magic.npy", good[..6].to_vec(), &["header"]),
        ("half_header.npy", good[..40].to_vec(), &["header", "40"]),
        ("truncated.npy", good[..good.len() - 1].to_vec(), &["declares 96 bytes", "holds 95"]),
        ("no_data.npy", good[..good.len() - 96].to_vec(), &["declares 96 bytes", "holds 0"]),
        ("too_long.npy", [&good[..], &[0]].concat(), &["declares 96 bytes", "holds 97"]),
        (
            "4_tib.npy",
            npy("'<f4'", "(1048576, 1048576, 1)", &data),
            &["declares 4398046511104 bytes", "holds 96"],
        ),
        (
            "overflow.npy",
            npy("'<f4'", "(4294967296, 4294967296, 4294967296)", &data),
            &["declares", "holds 96"],
        ),
        ("negative.npy", npy("'<f4'", "(-2, 3, 4)", &data), &[]),
        ("no_dict.npy", npy("'<f4", "(2, 3, 4)", &data), &["header"]),
        ("int64.npy", npy("'<i8'", "(1, 3, 4)", &data), &["dtype '<i8' is not supported"]),
        ("complex.npy", npy("'<c8'", "(1, 3, 4)", &data), &["dtype '<c8' is not supported"]),
        ("text_dtype.npy", npy("'<U4'", "(1, 3, 2)", &data), &["dtype '<U4' is not supported"]),
        ("fields.npy", npy("[('a', '<f4')]", "(2, 3, 4)", &data), &["not supported"]),
        (
            "over_f32.npy",
            npy(
                "'<f8'",
                "(2, 2, 3)",
                &[[0; 8].repeat(7), 1e300_f64.to_le_bytes().into(), vec![0; 32]].concat(),
            ),
            &["element [1, 0, 1] is 1e300"],
        ),
        ("object.npy", npy("'|O'", "(2, 3, 4)", b"\x80\x04\x95pickled"), &["object array"]),
        ("rank_1.npy", zeros(&[24]), &["shape [24]", "[heads, tokens, dim]"]),
        ("rank_2.npy", zeros(&[6, 4]), &["shape [6, 4]", "[heads, tokens, dim]"]),
        ("rank_5.npy", zeros(&[1, 1, 2, 3, 4]), &["shape [1, 1, 2, 3, 4]", "[heads, tokens, dim]"]),
        ("rank_0.npy", npy("'<f4'", "()", &[0; 4]), &["shape []", "[heads, tokens, dim]"]),
        ("no_tokens.npy", zeros(&[2, 0, 4]), &["shape [2, 0, 4] has no elements"]),
        ("archive.npz:y", archive.clone(), &["no tensor named 'y'", "x"]),
        ("text.npz:x", b"PK\x03\x04 and nothing else".to_vec(), &["not a npz file"]),
        ("truncated.npz:x", archive[..archive.len() / 2].to_vec(), &["not a npz file"]),
        ("damaged.npz:x", damaged, &["checksum"]),
        ("inner.npz:x", zip("x.npy", b"not an array"), &["not a npy file"]),
        ("inner_object.npz:x", zip("x.npy", &npy("'|O'", "(2, 3, 4)", &data)), &["object array"]),
        ("names.safetensors:y", safetensors(tensor, &data), &["no tensor named 'y'", "x"]),
        (
            "text.safetensors:x",
            b"once upon a time, there was no tensor".to_vec(),
            &["not a safetensors file"],
        ),
        ("short.safetensors:x", vec![1, 2, 3], &["header", "holds 3"]),
        ("header.safetensors:x", safetensors(tensor, &[])[..30].to_vec(), &["header", "holds 30"]),
        ("truncated.safetensors:x", safetensors(tensor, &data[..95]), &["declares 96 bytes", "holds 95"]),
        ("json.safetensors:x", safetensors("{\"x\":", &data), &["not a safetensors file"]),
        ("outside.safetensors:x", safetensors(outside, &data), &[]),
        ("integers.safetensors:x", safetensors(integers, &data), &["dtype I64 is not supported"]),
        ("flat.safetensors:x", safetensors(flat, &data), &["shape [24]", "[heads, tokens, dim]"]),
    ];
    let good = "good.npy";
    for (at, (source, bytes, problem)) in files.iter().enumerate() {
        put(source.split(':').next().unwrap(), bytes);
        let words = [&[*source][..], problem].concat();
        let mut inputs = [good; 3];
        inputs[at % 3] = source;
        refused(directory.path(), inputs, &["--endpoint", NOWHERE], &words);
    }
    for (source, problem) in [
        ("missing.npy", "No such file"),
        ("missing.npz:x", "No such file"),
        ("missing.safetensors:x", "No such file"),
        ("missing/q.npy", "No such file"),
        ("directory.npy", "not a regular file"),
    ] {
        for inputs in [[source, good, good], [good, source, good], [good, good, source]] {
            refused(directory.path(), inputs, &["--endpoint", NOWHERE], &[source, problem]);
        }
    }
    // The files themselves are fine: what fails now is the connection, with another code.
    let reached = attend(directory.path(), [good; 3], &["--endpoint", NOWHERE, "--timeout", "1"]);
    assert_eq!(reached.status.code(), Some(1), "{reached:?}");
}

/// Rows 31 and 32, and their kin: each file is readable, together they are no call.
#[test]
fn files_that_do_not_belong_together() {
    let _machine = Machine::shared();
    let directory = TempDir::new().unwrap();
    for (q, k, v, words) in [
        (&[2, 3, 64][..], &[2, 3, 128][..], &[2, 3, 4][..], &["q and k", "64", "128"][..]),
        (&[2, 5, 8], &[2, 10, 8], &[2, 9, 8], &["k and v", "10", "9"]),
        (&[4, 5, 8], &[2, 10, 8], &[1, 10, 8], &["k and v", "heads", "2", "1"]),
        (&[7, 5, 8], &[2, 10, 8], &[2, 10, 8], &["7", "2", "heads"]),
        (&[2, 4, 5, 8], &[1, 2, 10, 8], &[1, 2, 10, 8], &["q and k", "batch", "2", "1"]),
        (&[1, 2, 5, 8], &[1, 2, 10, 8], &[3, 2, 10, 8], &["k and v", "batch", "1", "3"]),
        (&[1, 1, 1100], &[1, 1, 1100], &[1, 1, 8], &["head_dim 1100 > 1024"]),
        (&[1025, 1, 1], &[1025, 1, 1], &[1025, 1, 1], &["num_heads 1025 > 1024"]),
    ] {
        for (name, shape) in [("q.npy", q), ("k.npy", k), ("v.npy", v)] {
            std::fs::write(directory.path().join(name), zeros(shape)).unwrap();
        }
        refused(directory.path(), ["q.npy", "k.npy", "v.npy"], &["--endpoint", NOWHERE], words);
    }
}
