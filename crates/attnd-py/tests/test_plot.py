"""Pictures: what is in them, and what they are saved as."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
import torch

import attnd.plot

SVG = "{http://www.w3.org/2000/svg}"


def pixels_of(png: bytes) -> np.ndarray:
    """Reads what a PNG of plain rows has, and checks its sums."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, size = 8, b"", None
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(size[1], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(size[1], size[0], 3)


def test_cells_say_their_words_and_weights():
    weights = np.array([[0.75, 0.25, 0.0], [0.1, 0.2, 0.7]])
    picture = attnd.plot.heatmap(weights, ["a<b", "\x00"], keys=["x", "y", "z"], title="what & why")
    svg = ElementTree.fromstring(picture.svg())
    cells = [rect for rect in svg.iter(f"{SVG}rect") if len(rect)]
    told = [rect[0].text for rect in cells]
    assert told == ["a<b → x: 0.75", "a<b → y: 0.25", "a<b → z: 0", "\ufffd → x: 0.1", "\ufffd → y: 0.2", "\ufffd → z: 0.7"]
    words = [text.text for text in svg.iter(f"{SVG}text")]
    assert words == ["what & why", "a<b", "\ufffd", "x", "y", "z"]
    # The largest weight is darkest, none is paper, and colours fall with weights.
    light = [sum(int(rect.get("fill")[i : i + 2], 16) for i in (1, 3, 5)) for rect in cells]
    assert cells[0].get("fill") == "#220c3e" and cells[2].get("fill") == "#fcfaf6"
    assert [light[i] for i in np.argsort(weights.ravel())] == sorted(light, reverse=True)
    assert picture._repr_html_() == picture.svg() and repr(picture) == "attnd.plot.Picture(1 matrix of 2 x 3)"


def test_large_matrices_are_images_of_means():
    rng = np.random.default_rng(0)
    weights = rng.random((3000, 100))
    picture = attnd.plot.heatmap(weights)
    svg = ElementTree.fromstring(picture.svg())
    (image,) = svg.iter(f"{SVG}image")
    import base64

    pixels = pixels_of(base64.b64decode(image.get("href").split(",")[1]))
    assert pixels.shape == (1024, 100, 3)
    assert len(picture.svg()) < 600_000


def test_heads_are_side_by_side_on_one_scale():
    weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.25, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    picture = attnd.plot.heads(weights, ["a", "b"], columns=2)
    svg = ElementTree.fromstring(picture.svg())
    titles = [text.text for text in svg.iter(f"{SVG}text") if re.match("head", text.text)]
    assert titles == ["head 0", "head 1", "head 2"]
    pixels = pixels_of(picture.png())
    side, gap = 512, 4 * 256
    assert pixels.shape == (2 * side + gap, 2 * side + gap, 3)
    of = lambda row, column: tuple(pixels[row, column])
    assert of(0, 0) == of(side + gap + side - 1, side - 1) == (34, 12, 62)
    assert of(0, side + gap) not in (of(0, 0), (252, 250, 246))


@pytest.mark.parametrize("ending", [".svg", ".html", ".png"])
def test_files(tmp_path, ending):
    picture = attnd.plot.heatmap([[1.0]], ["word"])
    picture.save(tmp_path / f"picture{ending}")
    data = (tmp_path / f"picture{ending}").read_bytes()
    if ending == ".png":
        assert pixels_of(data).shape == (512, 512, 3)
    else:
        assert data.decode() == (picture.svg() if ending == ".svg" else picture.html())
        assert b"word" in data
    with pytest.raises(ValueError, match="path ends in '.bmp'"):
        picture.save(tmp_path / "picture.bmp")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: attnd.plot.heatmap(np.ones((2, 2, 2))), r"weights has shape \(2, 2, 2\), expected \[queries, keys\]"),
        (lambda: attnd.plot.heatmap(np.ones((0, 2))), "weights has shape"),
        (lambda: attnd.plot.heatmap([[np.nan]]), "no weights"),
        (lambda: attnd.plot.heatmap([[-1.0]]), "no weights"),
        (lambda: attnd.plot.heatmap([[1.0]], ["a", "b"]), "tokens has 2 words, the weights have 1"),
        (lambda: attnd.plot.heatmap([[1.0, 0.0]], ["a"]), "keys has 1 words, the weights have 2"),
        (lambda: attnd.plot.heads(np.ones((2, 1, 1)), titles=["a"]), "titles has 1 words, there are 2 heads"),
        (lambda: attnd.plot.heads(np.ones((2, 1, 1)), columns=0), "columns is 0"),
    ],
)
def test_what_is_no_picture_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
