"""Pictures of attention weights that show themselves in a notebook, and are saved as SVG, HTML or PNG. Nothing but numpy is needed.

>>> import numpy as np, attnd, attnd.plot
>>> q = np.random.default_rng(0).standard_normal((1, 2, 4, 8), dtype=np.float32)
>>> _, weights = attnd.attention(q, q, q, return_weights=True)
>>> picture = attnd.plot.heatmap(weights[0, 0], ["the", "cat", "sat", "down"])
>>> picture
attnd.plot.Picture(1 matrix of 4 x 4)
>>> picture.svg().startswith("<svg")
True
"""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path
from typing import Any, Sequence
from xml.sax.saxutils import escape

import numpy as np

__all__ = ["Picture", "heads", "heatmap"]

# From paper over sand, coral and plum to ink, as the program `attnd` draws: lightness falls all the way, so the order survives grey.
_STOPS = np.array([0.0, 0.15, 0.35, 0.58, 0.80, 1.0])
_COLOURS = np.array([[252, 250, 246], [252, 228, 190], [246, 166, 112], [217, 84, 104], [124, 40, 120], [34, 12, 62]])

# Sides of a matrix up to which cells are elements of their own, which say their weight under the pointer.
_CELLS = 48
# Most pixels of a side of a matrix; larger ones are pooled by their means.
_PIXELS = 1024
_FONT = "font-family:Inter,'Helvetica Neue',Helvetica,Arial,'DejaVu Sans',sans-serif"


class Picture:
    """Matrices of weights, side by side, on one scale: the darkest colour is the largest weight of all.

    Shows itself in Jupyter. Made by :func:`heatmap` and :func:`heads`.
    """

    def __init__(self, matrices: np.ndarray, rows: Sequence[str] | None, columns: Sequence[str] | None, titles: Sequence[str], wide: int) -> None:
        self._matrices, self._rows, self._columns, self._titles, self._wide = matrices, rows, columns, titles, wide

    def svg(self) -> str:
        """The picture as an SVG element."""
        count, queries, keys = self._matrices.shape
        side = 22.0 if count == 1 else 12.0
        cell = min(side, 640.0 / max(queries, keys, 1))
        labels = self._rows is not None and cell >= 8
        left, top = (8 + 7.0 * max(map(len, self._rows), default=0), 8 + 6.0 * max(map(len, self._columns), default=0)) if labels else (8.0, 8.0)
        title = 22.0 if any(self._titles) else 0.0
        across, down = left + keys * cell + 12, top + title + queries * cell + 12
        wide = min(self._wide, count)
        width, height = across * wide, down * -(-count // wide)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1f} {height:.1f}" width="{width:.0f}" height="{height:.0f}" '
            f'style="{_FONT};max-width:100%">',
            f'<rect width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
        ]
        for at, matrix in enumerate(self._matrices):
            x, y = across * (at % wide) + left, down * (at // wide) + top + title
            if self._titles[at]:
                parts.append(f'<text x="{x:.1f}" y="{y - top - 6:.1f}" font-size="14" font-weight="600">{_text(self._titles[at])}</text>')
            if labels:
                for i, word in enumerate(self._rows):
                    parts.append(f'<text x="{x - 5:.1f}" y="{y + (i + 0.75) * cell:.1f}" font-size="{min(12, cell):.1f}" text-anchor="end">{_text(word)}</text>')
                for j, word in enumerate(self._columns):
                    place = f"{x + (j + 0.7) * cell:.1f} {y - 4:.1f}"
                    parts.append(f'<text transform="translate({place}) rotate(-60)" font-size="{min(12, cell):.1f}">{_text(word)}</text>')
            parts.append(self._cells(matrix, x, y, cell) if max(queries, keys) <= _CELLS else self._image(matrix, x, y, cell))
        return "".join([*parts, "</svg>"])

    def _cells(self, matrix: np.ndarray, x: float, y: float, cell: float) -> str:
        colours = self._colours(matrix)
        parts = []
        for i, j in np.ndindex(matrix.shape):
            row = self._rows[i] if self._rows is not None else f"query {i}"
            column = self._columns[j] if self._columns is not None else f"key {j}"
            red, green, blue = colours[i, j]
            parts.append(
                f'<rect x="{x + j * cell:.2f}" y="{y + i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
                f'fill="#{red:02x}{green:02x}{blue:02x}"><title>{_text(row)} → {_text(column)}: {matrix[i, j]:.4g}</title></rect>'
            )
        return "".join(parts)

    def _image(self, matrix: np.ndarray, x: float, y: float, cell: float) -> str:
        data = base64.b64encode(_png(self._colours(_pooled(matrix)))).decode("ascii")
        queries, keys = matrix.shape
        return (
            f'<image x="{x:.2f}" y="{y:.2f}" width="{keys * cell:.2f}" height="{queries * cell:.2f}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
        )

    def _colours(self, matrix: np.ndarray) -> np.ndarray:
        """``[rows, columns, 3]`` bytes. The root spreads the small weights, of which there are most."""
        most = float(self._matrices.max(initial=0.0)) or 1.0
        place = np.sqrt(np.clip(matrix / most, 0.0, 1.0))
        return np.stack([np.interp(place, _STOPS, _COLOURS[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)

    def html(self) -> str:
        """The picture as a page."""
        return f'<!doctype html><html><head><meta charset="utf-8"><title>attention</title></head><body>{self.svg()}</body></html>'

    def png(self) -> bytes:
        """The matrices as pixels, without words: a cell has as many as make the largest side 512 at least."""
        count, queries, keys = self._matrices.shape
        matrices = [self._colours(_pooled(matrix)) for matrix in self._matrices]
        height, width, _ = matrices[0].shape
        times = max(1, -(-512 // max(height, width)))
        wide, gap = min(self._wide, count), 4 * times if count > 1 else 0
        high = -(-count // wide)
        canvas = np.full((high * (height * times + gap) - gap, wide * (width * times + gap) - gap, 3), 255, np.uint8)
        for at, matrix in enumerate(matrices):
            top, left = (at // wide) * (height * times + gap), (at % wide) * (width * times + gap)
            canvas[top : top + height * times, left : left + width * times] = matrix.repeat(times, 0).repeat(times, 1)
        return _png(canvas)

    def save(self, path: str | Path) -> None:
        """Writes the picture, by the ending of its name: ``.svg``, ``.html`` or ``.png``."""
        path = Path(path)
        kinds = {".svg": lambda: self.svg().encode(), ".html": lambda: self.html().encode(), ".png": self.png}
        if path.suffix not in kinds:
            raise ValueError(f"path ends in {path.suffix!r}, expected .svg, .html or .png")
        path.write_bytes(kinds[path.suffix]())

    def _repr_html_(self) -> str:
        return self.svg()

    def __repr__(self) -> str:
        count, queries, keys = self._matrices.shape
        return f"attnd.plot.Picture({count} {'matrix' if count == 1 else 'matrices'} of {queries} x {keys})"


def heatmap(weights: Any, tokens: Sequence[str] | None = None, *, keys: Sequence[str] | None = None, title: str = "") -> Picture:
    """One matrix of weights.

    Args:
        weights: ``[queries, keys]``, an array, a tensor, or lists.
        tokens: Words of the queries, and of the keys unless these have their own.
        keys: Words of the keys.
        title: Above it.

    Raises:
        ValueError: Other dimensions, numbers that are no weights, or another number of words.
    """
    matrix = _weights(weights, 2, "[queries, keys]")
    return _picture(matrix[None], tokens, keys, [title], 1)


def heads(
    weights: Any, tokens: Sequence[str] | None = None, *, keys: Sequence[str] | None = None, titles: Sequence[str] | None = None, columns: int = 4
) -> Picture:
    """The matrices of several heads, side by side, on one scale.

    Args:
        weights: ``[heads, queries, keys]``.
        tokens: Words of the queries, and of the keys unless these have their own.
        keys: Words of the keys.
        titles: Above each; its number unless it is said.
        columns: Matrices beside each other.

    Raises:
        ValueError: As :func:`heatmap`, or no column.
    """
    matrices = _weights(weights, 3, "[heads, queries, keys]")
    if columns < 1:
        raise ValueError(f"columns is {columns}, expected 1 at least")
    titles = [f"head {head}" for head in range(len(matrices))] if titles is None else list(titles)
    if len(titles) != len(matrices):
        raise ValueError(f"titles has {len(titles)} words, there are {len(matrices)} heads")
    return _picture(matrices, tokens, keys, titles, columns)


def _picture(matrices, tokens, keys, titles, wide) -> Picture:
    _, queries, n_keys = matrices.shape
    rows = None if tokens is None else [str(word) for word in tokens]
    words = rows if keys is None else [str(word) for word in keys]
    if rows is None and words is not None:
        rows = [str(query) for query in range(queries)]
    for name, of, expected in (("tokens", rows, queries), ("keys", words, n_keys)):
        if of is not None and len(of) != expected:
            raise ValueError(f"{name} has {len(of)} words, the weights have {expected}")
    return Picture(matrices, rows, words, titles, wide)


def _weights(weights: Any, dims: int, shape: str) -> np.ndarray:
    detach = getattr(weights, "detach", None)
    array = np.asarray(weights if detach is None else detach().float().numpy(), np.float64)
    if array.ndim != dims or 0 in array.shape:
        raise ValueError(f"weights has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("weights has numbers that are no weights: negative ones, NaN or infinities")
    return array


def _pooled(matrix: np.ndarray) -> np.ndarray:
    """Means over runs of rows and of columns, where there are more than pixels."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        if size > _PIXELS:
            begins = np.arange(_PIXELS) * size // _PIXELS
            counts = np.diff([*begins, size])
            sums = np.add.reduceat(matrix, begins, axis=axis)
            matrix = sums / (counts[:, None] if axis == 0 else counts[None])
    return matrix


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file (RFC 2083) of ``[rows, columns, 3]`` bytes. By hand, as no notebook should need a library of pictures for this."""
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # Each row begins with its filter: none.
    raw = np.zeros((rows, 1 + columns * 3), np.uint8)
    raw[:, 1:] = pixels.reshape(rows, -1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw.tobytes(), 6)) + chunk(b"IEND", b"")


def _text(words: str) -> str:
    """Words as XML has them; control characters are none."""
    return escape("".join(c if c.isprintable() else "\ufffd" for c in words))
