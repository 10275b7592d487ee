//! Files made by hand, good and bad, through the readers and writers.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use attnd_client::Element;
use half::{bf16, f16};
use ndarray::{Array3, ArrayD};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A directory with files in it.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn read(&self, name: &str) -> Result<Tensor, ReadError> {
        read(&format!("{}/{name}", self.0.path().display()).parse().unwrap())
    }

    fn refusal(&self, name: &str) -> String {
        let text = self.read(name).expect_err(name).to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }
}

fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let order = if fortran { "True" } else { "False" };
    let header = format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

fn read_list(files: &Files, name: &str) -> Result<Numbers<i64>, String> {
    let source = format!("{}/{name}", files.0.path().display());
    read_integers(&source.parse().unwrap()).map_err(|error| error.to_string())
}

fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn npz(entries: &[(&str, Vec<u8>)], method: zip::CompressionMethod) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![f32::NAN; tensor.bytes.len() / tensor.dtype.size()];
    attnd_kernel::widen(&tensor.bytes, tensor.dtype, &mut values);
    values
}

/// 0, 1, ... 11 as [2, 3, 2] in C order.
fn counting() -> Vec<f32> {
    (0..12).map(|i| i as f32).collect()
}

/// The same tensor's elements in the order in which a Fortran file stores them.
fn counting_fortran() -> Vec<f32> {
    let index = |i, j, k| (i * 6 + j * 2 + k) as f32;
    (0..2).flat_map(|k| (0..3).flat_map(move |j| (0..2).map(move |i| index(i, j, k)))).collect()
}

#[test]
fn every_float_type_byte_order_and_index_order_of_npy_is_read() {
    let files = Files::new();
    type Encode = fn(f32) -> Vec<u8>;
    let kinds: [(&str, Dtype, Encode); 6] = [
        ("'<f2'", Dtype::F16, |x| f16::from_f32(x).to_le_bytes().into()),
        ("'>f2'", Dtype::F16, |x| f16::from_f32(x).to_be_bytes().into()),
        ("'<f4'", Dtype::F32, |x| x.to_le_bytes().into()),
        ("'>f4'", Dtype::F32, |x| x.to_be_bytes().into()),
        ("'<f8'", Dtype::F32, |x| f64::from(x).to_le_bytes().into()),
        ("'>f8'", Dtype::F32, |x| f64::from(x).to_be_bytes().into()),
    ];
    for (descr, dtype, encode) in kinds {
        for (fortran, stored) in [(false, counting()), (true, counting_fortran())] {
            let data: Vec<u8> = stored.into_iter().flat_map(encode).collect();
            files.put("a.npy", &npy(descr, fortran, "(2, 3, 2)", &data));
            let tensor = files.read("a.npy").unwrap();
            assert_eq!((tensor.shape, tensor.batched, tensor.dtype), ([1, 2, 3, 2], false, dtype));
            assert_eq!(tensor.rounded_from_f64, descr.contains("f8"));
            assert_eq!(values(&tensor), counting(), "{descr} fortran {fortran}");
            assert_eq!(values(&tensor.into_f32()), counting());
        }
    }
}

#[test]
fn headers_of_version_2_and_a_batch_dimension_are_read() {
    let files = Files::new();
    let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1, 3, 2)}\n";
    let mut bytes = b"\x93NUMPY\x02\x00".to_vec();
    bytes.extend((header.len() as u32).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(decode::le_bytes(&counting()));
    files.put("a.npy", &bytes);
    let tensor = files.read("a.npy").unwrap();
    assert_eq!((tensor.shape, tensor.batched), ([2, 1, 3, 2], true));
    assert_eq!(values(&tensor), counting());
}

#[test]
fn f64_is_rounded_to_nearest() {
    let files = Files::new();
    let put = |fortran, elements: [f64; 4]| {
        let data: Vec<u8> = elements.iter().flat_map(|x| x.to_le_bytes()).collect();
        files.put("a.npy", &npy("'<f8'", fortran, "(1, 2, 2)", &data));
    };
    put(false, [1.0 + 2_f64.powi(-24), 1.0 + 3.0 * 2_f64.powi(-24), f64::NEG_INFINITY, f64::NAN]);
    let rounded = values(&files.read("a.npy").unwrap());
    assert_eq!(rounded[..3], [1.0, 1.0 + 2.0 * f32::EPSILON, f32::NEG_INFINITY]);
    assert!(rounded[3].is_nan());

    // Half a step over f32's largest number there is nothing to round to, whichever index is fastest.
    let most = f64::from(f32::MAX);
    put(false, [most, -most, most * (1.0 + 2_f64.powi(-26)), 0.0]);
    assert_eq!(values(&files.read("a.npy").unwrap())[..3], [f32::MAX, f32::MIN, f32::MAX]);
    put(false, [0.0, -1e300, 0.0, 0.0]);
    assert!(files.refusal("a.npy").contains("element [0, 0, 1] is -1e300, over the range of f32"));
    put(true, [0.0, most * (1.0 + 2_f64.powi(-24)), 0.0, 0.0]);
    assert!(files.refusal("a.npy").contains("element [0, 1, 0] is 3.4028"));
}

#[test]
fn npz_entries_are_found_with_and_without_suffix_stored_and_deflated() {
    let files = Files::new();
    let half: Vec<u8> = counting().iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let entries = [
        ("q.npy", npy("'<f4'", false, "(2, 3, 2)", &decode::le_bytes(&counting()))),
        ("half.npy", npy("'<f2'", false, "(2, 3, 2)", &half)),
    ];
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        files.put("a.npz", &npz(&entries, method));
        for name in ["a.npz:q", "a.npz:q.npy", "a.npz:half"] {
            if name.ends_with(".npy") {
                // Typed like this it is the path of an npy file.
                assert!(files.refusal(name).contains("No such file"));
                continue;
            }
            assert_eq!(values(&files.read(name).unwrap()), counting(), "{name}");
        }
        assert!(files.refusal("a.npz:k").contains("no tensor named 'k'; the file has half, q"));
    }
    // What ndarray-npy itself writes.
    let mut writer =
        ndarray_npy::NpzWriter::new_compressed(fs::File::create(files.0.path().join("b.npz")).unwrap());
    writer.add_array("x", &Array3::from_shape_vec((2, 3, 2), counting()).unwrap()).unwrap();
    writer.finish().unwrap();
    assert_eq!(values(&files.read("b.npz:x").unwrap()), counting());
}

#[test]
fn safetensors_yield_the_named_tensor() {
    let files = Files::new();
    let low: Vec<u8> = counting().iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let high: Vec<u8> = counting().iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect();
    let header = r#"{"l.k":{"dtype":"BF16","shape":[2,3,2],"data_offsets":[0,24]},
        "l.v":{"dtype":"F64","shape":[1,2,3,2],"data_offsets":[24,120]},
        "ids":{"dtype":"I64","shape":[1,1,1],"data_offsets":[120,128]}}"#;
    files.put("m.safetensors", &safetensors_file(header, &[low, high, vec![0; 8]].concat()));
    let k = files.read("m.safetensors:l.k").unwrap();
    assert_eq!((k.shape, k.dtype, values(&k)), ([1, 2, 3, 2], Dtype::Bf16, counting()));
    let v = files.read("m.safetensors:l.v").unwrap();
    assert_eq!((v.batched, v.rounded_from_f64, values(&v)), (true, true, counting()));
    assert!(files.refusal("m.safetensors:ids").contains("dtype I64 is not supported"));
    assert!(files.refusal("m.safetensors:q").contains("no tensor named 'q'; the file has l.k, l.v, ids"));
}

#[test]
fn masks_and_biases_have_bools_or_floats_and_up_to_four_dimensions() {
    let files = Files::new();
    let dense = |name: &str| {
        let source: Source = files.0.path().join(name).to_str().unwrap().parse().unwrap();
        read_dense(&source).map_err(|error| error.to_string())
    };
    // 2 rows of 3: true, false, false and false, true, true.
    let (rows, columns) = ([1, 0, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1]);
    for (descr, fortran, stored) in [("'|b1'", false, rows), ("'|b1'", true, columns)] {
        files.put("m.npy", &npy(descr, fortran, "(2, 3)", &stored));
        let mask = dense("m.npy").unwrap();
        assert_eq!((mask.element, mask.shape, &mask.bytes[..]), (Element::Bool, [1, 1, 2, 3], &rows[..]));
    }
    for (shape, padded) in
        [("(6,)", [1, 1, 1, 6]), ("(2, 1, 3)", [1, 2, 1, 3]), ("(1, 2, 3, 1)", [1, 2, 3, 1])]
    {
        files.put(
            "m.npz",
            &npz(&[("m.npy", npy("'|b1'", false, shape, &rows))], zip::CompressionMethod::Stored),
        );
        assert_eq!(dense("m.npz:m").unwrap().shape, padded);
    }
    let numbers = [0.5, f64::NEG_INFINITY, -1.0, 2.0, 3.0, 4.0];
    let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    files.put("b.npy", &npy("'<f8'", false, "(2, 3)", &data));
    let bias = dense("b.npy").unwrap();
    assert_eq!(bias.element, Element::Float(Dtype::F32));
    assert_eq!(bias.bytes[4..8], f32::NEG_INFINITY.to_le_bytes());
    let header = r#"{"m":{"dtype":"BOOL","shape":[2,3],"data_offsets":[0,6]},
        "b":{"dtype":"BF16","shape":[1,3],"data_offsets":[6,12]}}"#;
    files.put("a.safetensors", &safetensors_file(header, &[&rows[..], &[0; 6]].concat()));
    assert_eq!(dense("a.safetensors:m").unwrap().element, Element::Bool);
    assert_eq!(dense("a.safetensors:b").unwrap().element, Element::Float(Dtype::Bf16));
    assert!(files.refusal("m.npy").contains("shape [2, 3], expected [heads, tokens, dim]"));
    files.put("q.npy", &npy("'|b1'", false, "(1, 2, 3)", &rows));
    assert!(files.refusal("q.npy").contains("dtype bool is not supported"));
    for (name, shape, what) in [
        ("rank.npy", "(1, 1, 1, 2, 3)", "shape [1, 1, 1, 2, 3], expected up to 4 dimensions"),
        ("empty.npy", "(2, 0)", "shape [2, 0] has no elements"),
    ] {
        files.put(name, &npy("'|b1'", false, shape, if name == "rank.npy" { &rows[..] } else { &[] }));
        assert!(dense(name).unwrap_err().contains(what), "{:?}", dense(name));
    }
    files.put("i.npy", &npy("'<i4'", false, "(6,)", &[0; 24]));
    assert!(dense("i.npy").unwrap_err().contains("dtype '<i4' is not supported"));
}

#[test]
fn unreadable_input_is_refused_with_the_reason() {
    let files = Files::new();
    let data = decode::le_bytes(&counting());
    let good = npy("'<f4'", false, "(2, 3, 2)", &data);
    let zipped = npz(&[("q.npy", good.clone())], zip::CompressionMethod::Stored);
    let mut flipped = zipped.clone();
    flipped[150] ^= 1; // inside the array's data
    let lying = r#"{"q":{"dtype":"F32","shape":[2,3,2],"data_offsets":[0,40]}}"#;
    let honest = r#"{"q":{"dtype":"F32","shape":[2,3,2],"data_offsets":[0,48]}}"#;
    fs::create_dir(files.0.path().join("dir.npy")).unwrap();
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty.npy", vec![], "not a npy file"),
        ("text.npy", b"hello, world".to_vec(), "does not begin with the npy magic"),
        ("magic.npy", good[..8].to_vec(), "the header declares 12 bytes, the file holds 8"),
        ("version.npy", b"\x93NUMPY\x09\x00\x10\x00aaaaaaa".to_vec(), "unknown version 9.0"),
        ("header.npy", good[..40].to_vec(), "the file holds 40"),
        ("vast.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(), "declares 4294967307 bytes"),
        ("cut.npy", good[..good.len() - 1].to_vec(), "declares 48 bytes, the file holds 47"),
        ("long.npy", [&good[..], b"!"].concat(), "declares 48 bytes, the file holds 49"),
        ("nest.npy", npy(&"(".repeat(9_000), false, "(1,)", &[]), "damaged header"),
        ("dict.npy", npy("'<f4", false, "(1,)", &[]), "damaged header"),
        ("object.npy", npy("'|O'", false, "(2, 3, 2)", &data), "object array"),
        ("int.npy", npy("'<i8'", false, "(2, 3, 1)", &data), "dtype '<i8' is not supported"),
        ("void.npy", npy("'|V2'", false, "(2, 3, 1)", &data), "save it as safetensors"),
        ("fields.npy", npy("[('a', '<f4')]", false, "(2, 3, 2)", &data), "is not supported"),
        ("blank.npy", npy("''", false, "(2, 3, 2)", &data), "is not supported"),
        ("rank2.npy", npy("'<f4'", false, "(6, 2)", &data), "shape [6, 2], expected [heads"),
        ("rank0.npy", npy("'<f4'", false, "()", &data[..4]), "shape [], expected [heads"),
        ("zero.npy", npy("'<f4'", false, "(2, 0, 2)", &[]), "shape [2, 0, 2] has no elements"),
        (
            "huge.npy",
            npy("'<f4'", false, "(4194304, 1048576, 1048576)", &data),
            "declares 18446744073709551616 bytes",
        ),
        (
            "over.npy",
            npy("'<f8'", true, "(9999999999999, 9999999999999, 9999999999999)", &data),
            "the file holds 48",
        ),
        ("text.npz:q", b"not a zip at all".to_vec(), "not a npz file"),
        ("cut.npz:q", zipped[..zipped.len() / 2].to_vec(), "not a npz file"),
        ("flip.npz:q", flipped, "checksum"),
        ("short.safetensors:q", vec![1, 2, 3], "declares 8 bytes, the file holds 3"),
        ("text.safetensors:q", b"<!doctype html> and so on".to_vec(), "not a safetensors file"),
        ("header.safetensors:q", safetensors_file(honest, &[])[..30].to_vec(), "the file holds 30"),
        ("json.safetensors:q", safetensors_file("{\"q\":", &[]), "not a safetensors file"),
        ("lying.safetensors:q", safetensors_file(lying, &data[..40]), "not a safetensors file"),
        ("cut.safetensors:q", safetensors_file(honest, &data[..47]), "declares 48 bytes, the file holds 47"),
        ("long.safetensors:q", safetensors_file(honest, &[&data[..], b"!"].concat()), "the file holds 49"),
    ];
    for (name, bytes, reason) in cases {
        files.put(name.split_once(':').map_or(*name, |(file, _)| file), bytes);
        let text = files.refusal(name);
        assert!(text.contains(reason), "{name}: {text}");
        assert!(text.contains(name), "{text}");
    }
    assert!(files.refusal("missing.npy").contains("No such file"));
    assert!(files.refusal("dir.npy").contains("not a regular file"));
}

#[test]
fn what_is_written_can_be_read_back() {
    let files = Files::new();
    let (context, lse) = (counting(), vec![0.5, f32::NEG_INFINITY, -1.0, 3.0, 4.0, 5.0]);
    let keys = [3, u32::MAX, 0, 1, 2, 4];
    let arrays = [
        Array { name: "top_keys".into(), shape: vec![2, 3, 1], elements: Elements::Keys(&keys) },
        Array { name: "mass".into(), shape: vec![2, 3, 2], elements: Elements::F32(&context) },
    ];
    let output =
        Output { shape: &[2, 3, 2], context: &context, lse: &lse, kernel_id: "c1-f32", arrays: &arrays };
    for name in ["o.npy", "o.safetensors"] {
        let path: OutputPath = files.0.path().join(name).to_str().unwrap().parse().unwrap();
        path.check().unwrap();
        write(&path, &output).unwrap();
        write(&path, &output).unwrap();
    }
    let npy: ArrayD<f32> = ndarray_npy::read_npy(files.0.path().join("o.npy")).unwrap();
    assert_eq!((npy.shape(), npy.as_slice()), (&[2, 3, 2][..], Some(&context[..])));
    assert_eq!(values(&files.read("o.safetensors:context").unwrap()), context);
    let bytes = fs::read(files.0.path().join("o.safetensors")).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = file.tensor("lse").unwrap();
    assert_eq!((stored.shape(), stored.data()), (&[2, 3][..], &decode::le_bytes(&lse)[..]));
    assert_eq!(values(&files.read("o.safetensors:mass").unwrap()), context);
    let stored = file.tensor("top_keys").unwrap();
    let indices: Vec<u8> = [3, -1, 0, 1, 2, 4_i64].iter().flat_map(|key| key.to_le_bytes()).collect();
    assert_eq!((stored.shape(), stored.dtype()), (&[2, 3, 1][..], ::safetensors::Dtype::I64));
    assert_eq!(stored.data(), indices);
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 2, "a temporary file is left");
}

#[test]
fn a_failed_write_leaves_the_earlier_file_and_nothing_else() {
    let files = Files::new();
    let path = files.put("o.npy", b"earlier");
    let to = OutputPath::Npy(path.clone());
    let wrong =
        Output { shape: &[2, 3, 3], context: &counting(), lse: &[], kernel_id: "c1-f32", arrays: &[] };
    write(&to, &wrong).unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), b"earlier");
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 1);
    let nowhere = OutputPath::Npy(files.0.path().join("no/o.npy"));
    assert!(nowhere.check().unwrap_err().to_string().contains("there is no directory"));
}

#[test]
fn a_destination_is_tried_before_the_call_and_left_as_it_was() {
    let files = Files::new();
    let earlier = files.put("o.npy", b"earlier");
    OutputPath::Npy(earlier.clone()).check().unwrap();
    assert_eq!(fs::read(&earlier).unwrap(), b"earlier");
    assert_eq!(fs::read_dir(files.0.path()).unwrap().count(), 1);

    let refusal = |path: PathBuf| OutputPath::Npy(path).check().unwrap_err().to_string();
    let folder = files.0.path().join("folder.npy");
    fs::create_dir(&folder).unwrap();
    assert!(refusal(folder).contains("exists and is not a regular file"));
    // Longer than any file system's names, and a place where nobody can make files.
    assert!(
        refusal(files.0.path().join(format!("{}.npy", "x".repeat(300)))).contains("no file can be made in")
    );
    #[cfg(target_os = "linux")]
    assert!(refusal("/proc/x.npy".into()).contains("no file can be made in /proc"));
}

#[test]
fn a_link_to_a_destination_stays_a_link() {
    let files = Files::new();
    let at = |name: &str| files.0.path().join(name);
    fs::create_dir(at("store")).unwrap();
    files.put("store/earlier.npy", b"earlier");
    let output =
        Output { shape: &[2, 3, 2], context: &counting(), lse: &[], kernel_id: "c1-f32", arrays: &[] };
    // One to a file, one through another link to what isn't there yet.
    for (link, to) in
        [("a.npy", "store/earlier.npy"), ("b.npy", "store/c.npy"), ("store/c.npy", "../store/new.npy")]
    {
        std::os::unix::fs::symlink(to, at(link)).unwrap();
    }
    for (link, target) in [("a.npy", "store/earlier.npy"), ("b.npy", "store/new.npy")] {
        let path = OutputPath::Npy(at(link));
        path.check().unwrap();
        write(&path, &output).unwrap();
        assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link} was replaced");
        assert!(fs::symlink_metadata(at(target)).unwrap().is_file(), "{target}");
        assert_eq!(values(&files.read(target).unwrap()), counting());
    }
    std::os::unix::fs::symlink("loop.npy", at("loop.npy")).unwrap();
    let refusal = OutputPath::Npy(at("loop.npy")).check().unwrap_err().to_string();
    assert!(refusal.contains("not a regular file"), "{refusal}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// A damaged file is read or refused, never a panic; and what is read has the bytes that its shape needs.
    #[test]
    fn damage_never_panics(kind in 0..3_usize, cut in 0.0..1.2_f64, at in 0.0..1.0_f64, byte: u8) {
        let files = Files::new();
        let array = npy("'<f4'", true, "(2, 3, 2)", &decode::le_bytes(&counting()));
        let header = r#"{"q":{"dtype":"F32","shape":[2,3,2],"data_offsets":[0,48]}}"#;
        let (name, mut bytes) = match kind {
            0 => ("a.npy", array),
            1 => ("a.npz:q", npz(&[("q.npy", array)], zip::CompressionMethod::Deflated)),
            _ => ("a.safetensors:q", safetensors_file(header, &decode::le_bytes(&counting()))),
        };
        let index = (at * bytes.len() as f64) as usize;
        bytes[index] = byte;
        bytes.truncate((cut * bytes.len() as f64) as usize);
        files.put(name.split(':').next().unwrap(), &bytes);
        if let Ok(tensor) = files.read(name) {
            prop_assert_eq!(tensor.shape.iter().product::<usize>() * tensor.dtype.size(), tensor.bytes.len());
        }
    }
}

#[test]
fn integers_of_every_kind_are_read_and_nothing_else_is() {
    let files = Files::new();
    type Encode = fn(i64) -> Vec<u8>;
    let kinds: [(&str, &str, Encode); 5] = [
        ("i4", "'<i4'", |x| (x as i32).to_le_bytes().into()),
        ("I4", "'>i4'", |x| (x as i32).to_be_bytes().into()),
        ("i8", "'<i8'", |x| x.to_le_bytes().into()),
        ("I8", "'>i8'", |x| x.to_be_bytes().into()),
        ("u4", "'<u4'", |x| (x as u32).to_le_bytes().into()),
    ];
    let numbers = [0, 5, 1 << 30, 7, 2, 3];
    for (name, descr, encode) in kinds {
        let data: Vec<u8> = numbers.into_iter().flat_map(encode).collect();
        files.put(&format!("{name}.npy"), &npy(descr, false, "(2, 3)", &data));
        files.put(
            "f.npz",
            &npz(&[("a", npy(descr, true, "(3, 2)", &data))], zip::CompressionMethod::Deflated),
        );
        let wanted = Numbers { shape: vec![2, 3], values: numbers.to_vec() };
        assert_eq!(read_list(&files, &format!("{name}.npy")), Ok(wanted), "{descr}");
        let transposed = Numbers { shape: vec![3, 2], values: vec![0, 7, 5, 2, 1 << 30, 3] };
        assert_eq!(read_list(&files, "f.npz:a"), Ok(transposed), "{descr}");
    }
    let large = [-1_i64, i64::MIN, 3];
    let data: Vec<u8> = large.into_iter().flat_map(i64::to_le_bytes).collect();
    files.put("large.npy", &npy("'<i8'", false, "(3,)", &data));
    assert_eq!(read_list(&files, "large.npy").unwrap().values, large);
    files.put("u.npy", &npy("'<u4'", false, "(1,)", &[255; 4]));
    assert_eq!(read_list(&files, "u.npy").unwrap().values, [i64::from(u32::MAX)]);

    let header = r#"{"i":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},
        "l":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},
        "u":{"dtype":"U32","shape":[],"data_offsets":[16,20]},
        "h":{"dtype":"F16","shape":[2],"data_offsets":[20,24]}}"#;
    let data =
        [&(-7_i32).to_le_bytes()[..], &[9, 0, 0, 0], &(1_i64 << 40).to_le_bytes(), &[4, 0, 0, 0], &[0; 4]];
    files.put("m.safetensors", &safetensors_file(header, &data.concat()));
    let read = |name: &str| read_list(&files, &format!("m.safetensors:{name}"));
    let list = |shape: &[usize], values: &[i64]| Ok(Numbers { shape: shape.into(), values: values.into() });
    assert_eq!(read("i"), list(&[2], &[-7, 9]));
    assert_eq!(read("l"), list(&[1], &[1 << 40]));
    assert_eq!(read("u"), list(&[], &[4]));
    assert!(read("h").unwrap_err().ends_with("dtype F16 is not supported; i32, i64 and u32 are"));
    files.put("f.npy", &npy("'<f4'", false, "(2,)", &[0; 8]));
    assert!(read_list(&files, "f.npy").unwrap_err().contains("dtype '<f4' is not supported; i32, i64"));
    files.put("b.npy", &npy("'|b1'", false, "(2,)", &[0; 2]));
    assert!(read_list(&files, "b.npy").unwrap_err().contains("dtype '|b1' is not supported; i32, i64"));
    files.put("none.npy", &npy("'<i4'", false, "(0,)", &[]));
    assert!(read_list(&files, "none.npy").unwrap_err().contains("shape [0] has no elements"));
}

#[test]
fn floats_of_any_shape_are_read() {
    let files = Files::new();
    files.put("one.npy", &npy("'<f8'", false, "()", &2.5_f64.to_le_bytes()));
    let read = |name: &str| read_floats(&format!("{}/{name}", files.0.path().display()).parse().unwrap());
    assert_eq!(read("one.npy").unwrap(), Numbers { shape: vec![], values: vec![2.5] });
    let half: Vec<u8> = [1.0, -2.0].into_iter().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
    files.put("half.npy", &npy("'<f2'", false, "(1, 2, 1, 1, 1)", &half));
    assert_eq!(read("half.npy").unwrap(), Numbers { shape: vec![1, 2, 1, 1, 1], values: vec![1.0, -2.0] });
    files.put("int.npy", &npy("'<i4'", false, "(1,)", &[0; 4]));
    let refusal = read("int.npy").unwrap_err().to_string();
    assert!(
        refusal.contains("dtype '<i4' is not supported; f16, bf16, f32 and f64 are; convert it"),
        "{refusal}"
    );
}
