"""Writes the Attention node tests of an onnx release as data that tests read without Python.

    python3 tests/conformance/onnx_cases.py [--onnx-version 1.22.0] [--numpy-version 2.4.6] [--venv DIR]

Two files come out, beside this script and named for the release:

* onnx-VERSION.safetensors: the tensors of each case, twice: CASE.frozen.NAME as the release's wheel holds them, and
  CASE.redrawn.NAME. Inputs of the release are uniform in [0, 1), which hides what softmax does to scores of both signs
  and different sizes. So every finite element of a floating-point input is drawn again from N(0, 1.5^2); infinities,
  booleans and integers stay. Outputs for them are computed by onnx's own ReferenceEvaluator.
* onnx-VERSION.json: for each case its operator set, the attributes that are set, the names of the inputs and outputs
  that are present, and the tolerance that the release itself applies: |got - want| <= atol + rtol * |want|.

Nothing here knows what attention is: expected values are the release's, frozen or computed by it. Equal versions give
equal bytes on one machine; another machine's BLAS may round the redrawn outputs otherwise in the last place.

The release's data are under the Apache License 2.0, as this project is. Releases before 1.22.0 hold wrong data (softcap
after the mask, outputs of modes 1 and 2 exchanged); 1.23.2 holds none.
"""

import argparse
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

# The operator's own names, in the order of its slots.
INPUTS = ["Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen"]
OUTPUTS = ["Y", "present_key", "present_value", "qk_matmul_output"]
SEED = 20261128
STANDARD_DEVIATION = 1.5
SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--onnx-version", default="1.22.0", help="release of onnx on PyPI [default: %(default)s]")
    parser.add_argument("--numpy-version", default="2.4.6", help="numpy to compute with [default: %(default)s]")
    environment = "Python environment, made if missing [default: attnd/onnx-VERSION in the user's cache folder]"
    parser.add_argument("--venv", type=pathlib.Path, help=environment)
    return parser.parse_args()


def run_where_onnx_is(args):
    """Returns where the interpreter has the asked versions, else runs this script in an environment that has them."""
    wanted = {"onnx": args.onnx_version, "numpy": args.numpy_version}
    try:
        import numpy
        import onnx

        if {"onnx": onnx.__version__, "numpy": numpy.__version__} == wanted:
            return
    except ImportError:
        pass
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    venv = args.venv or cache / "attnd" / f"onnx-{args.onnx_version}"
    python = venv / "bin" / "python"
    if pathlib.Path(sys.prefix) == venv:
        sys.exit(f"{venv} was given {wanted} and still lacks them; remove it")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    packages = [f"{name}=={version}" for name, version in wanted.items()]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(pip + packages, check=True)
    os.execv(python, [str(python), *sys.argv])


def named(slots, names, values):
    """Values of the present slots, by the operator's own names; values come without the absent ones."""
    present = [name for name, slot in zip(names, slots) if slot]
    if len(present) != len(values):
        sys.exit(f"{len(values)} tensors for {present}")
    return dict(zip(present, values))


def frozen(model_dir, kind, count):
    """The stored tensors of a kind, input or output, in the order of their numbers."""
    import onnx
    from onnx import numpy_helper

    tensors = []
    for index in range(count):
        path = pathlib.Path(model_dir) / "test_data_set_0" / f"{kind}_{index}.pb"
        tensors.append(numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())))
    return tensors


def redrawn(name, inputs):
    """Inputs of the same shapes and types; the generator is the case's own, so cases don't depend on each other."""
    import numpy

    generator = numpy.random.Generator(numpy.random.PCG64([SEED, zlib.crc32(name.encode())]))
    drawn = {}
    for slot, tensor in inputs.items():
        if tensor.dtype.kind in "bi":
            drawn[slot] = tensor
            continue
        fresh = STANDARD_DEVIATION * generator.standard_normal(tensor.shape)
        drawn[slot] = numpy.where(numpy.isfinite(tensor), fresh, tensor).astype(tensor.dtype)
    return drawn


def evaluated(model, node, inputs):
    """What onnx itself computes from the inputs, by the operator's own names."""
    from onnx.reference import ReferenceEvaluator

    slots = dict(zip(INPUTS, node.input))
    feed = {slots[name]: tensor for name, tensor in inputs.items()}
    return named(node.output, OUTPUTS, ReferenceEvaluator(model).run(None, feed))


def cases():
    """Each case's entry in the list, and its tensors."""
    import onnx
    from onnx.backend.test.loader import load_model_tests

    found = [test for test in load_model_tests(kind="node") if test.name.startswith("test_attention_")]
    for test in sorted(found, key=lambda test: test.name):
        # The same case again, written with simpler operators.
        if "expanded" in test.name:
            continue
        model = onnx.load(pathlib.Path(test.model_dir) / "model.onnx")
        (node,) = model.graph.node
        if node.op_type != "Attention" or len(os.listdir(test.model_dir)) != 2:
            sys.exit(f"{test.name}: expected one Attention node and one set of data")
        n_inputs, n_outputs = (sum(bool(slot) for slot in slots) for slots in (node.input, node.output))
        inputs = named(node.input, INPUTS, frozen(test.model_dir, "input", n_inputs))
        outputs = named(node.output, OUTPUTS, frozen(test.model_dir, "output", n_outputs))
        fresh = redrawn(test.name, inputs)
        entry = {
            "name": test.name,
            "opset": model.opset_import[0].version,
            "attributes": {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            "inputs": list(inputs),
            "outputs": list(outputs),
            "rtol": test.rtol,
            "atol": test.atol,
        }
        tensors = {"frozen": inputs | outputs, "redrawn": fresh | evaluated(model, node, fresh)}
        yield entry, {f"{test.name}.{data}.{slot}": t for data, of in tensors.items() for slot, t in of.items()}


def safetensors(tensors):
    """The bytes of a safetensors file: a length, a JSON header, the data without holes."""
    header, data = {}, []
    end = 0
    for name in sorted(tensors):
        # Not ascontiguousarray, which gives scalars a dimension.
        raw = tensors[name].astype(tensors[name].dtype.newbyteorder("<")).tobytes(order="C")
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensors[name].dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [end, end + len(raw)],
        }
        data.append(raw)
        end += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def main():
    args = arguments()
    run_where_onnx_is(args)
    entries, tensors = [], {}
    for entry, of_case in cases():
        entries.append(entry)
        tensors |= of_case
    if not entries:
        sys.exit(f"onnx {args.onnx_version} has no stored Attention cases")
    listing = {
        "onnx": args.onnx_version,
        "numpy": args.numpy_version,
        "seed": SEED,
        "standard_deviation": STANDARD_DEVIATION,
        "cases": entries,
    }
    here = pathlib.Path(__file__).resolve().parent
    for suffix, content in (
        ("json", (json.dumps(listing, indent=1) + "\n").encode()),
        ("safetensors", safetensors(tensors)),
    ):
        path = here / f"onnx-{args.onnx_version}.{suffix}"
        path.write_bytes(content)
        print(f"{path.name}: {len(content)} bytes")
    print(f"{len(entries)} cases, {len(tensors)} tensors")


if __name__ == "__main__":
    main()
