"""What the words of a text look at in one layer of a real encoder (MiniLM, whose tensors are in this repository).

    python examples/python/encoder_sentence.py [WORD]

prints where each head looks from that word, and writes encoder_sentence.html.
"""

import json
import sys
from pathlib import Path

import numpy as np

import attnd
import attnd.plot

FILE = Path(__file__).parents[2] / "crates/attnd/data/minilm_layers.safetensors"


def tensors(path):
    """A safetensors file: the length of a JSON header, the header, the elements. Read by hand, so that numpy is all this needs."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    texts = header.pop("__metadata__")

    def tensor(place):
        begin, stop = (end + offset for offset in place["data_offsets"])
        return np.frombuffer(data[begin:stop], np.float32).reshape(place["shape"])

    return {name: tensor(place) for name, place in header.items() if place["dtype"] == "F32"}, texts


def main():
    arrays, texts = tensors(FILE)
    tokens = json.loads(texts["tokens"])
    q, k, v = (arrays[f"layer1.{name}"] for name in "qkv")
    context, weights = attnd.attention(q, k, v, return_weights=True)

    word = sys.argv[1] if len(sys.argv) > 1 else "rope"
    if word not in tokens:
        sys.exit(f"{word!r} is no token of the text, which begins: {' '.join(tokens[:20])}")
    at = tokens.index(word)
    print(f"{len(tokens)} tokens, {len(weights)} heads; from {word!r}, token {at}, each head looks most at:")
    for head, row in enumerate(weights[:, at]):
        best = row.argsort()[::-1][:3]
        print(f"  head {head:2}: " + ", ".join(f"{tokens[key]} {row[key]:.0%}" for key in best))
    print(f"the encoder's own context is within {np.abs(context - arrays['layer1.context']).max():.1e}")

    some = slice(0, 40)
    picture = attnd.plot.heads(weights[:, some, some], tokens[some])
    picture.save("encoder_sentence.html")
    print("wrote encoder_sentence.html: the first 40 tokens, all heads")


if __name__ == "__main__":
    main()
