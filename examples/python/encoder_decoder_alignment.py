"""How a decoder learns where to look: it writes a sequence backwards, and finds out by itself which input each output comes from.

    python examples/python/encoder_decoder_alignment.py

The score of an output step and an input step is q^T W k (Luong's "general"), over features of their positions from either end; W is
fitted to short sequences by gradient descent on the probability of the right input, and then tried on longer ones. Prints how
often the largest weight is at the right place, and writes encoder_decoder_alignment.svg.
"""

import numpy as np

import attnd
import attnd.plot

WAVES = 2 * np.pi / np.geomspace(4, 400, 12)


def features(places):
    """Sines and cosines of places, in f32."""
    angles = places[:, None] * WAVES
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def steps(length):
    """The input step knows how far it is from the end, the output step how many were written."""
    return features(np.arange(length)), features(length - 1.0 - np.arange(length))


def fit(lengths, rounds=400, rate=0.5):
    """W, by gradients of the mean log of the weight that the right input gets."""
    w = np.zeros((2 * len(WAVES), 2 * len(WAVES)), np.float32)
    for _ in range(rounds):
        gradient = np.zeros_like(w)
        for length in lengths:
            q, k = steps(length)
            values = np.eye(length, dtype=np.float32)
            # With one-hot values the context of a row is its weights.
            weights = attnd.attention(q[None], k[None], values[None], score="general", params={"w": w})[0]
            right = np.eye(length)[::-1]
            gradient += (q.T @ (right - weights) @ k / length).astype(np.float32)
        w += rate * gradient / len(lengths)
    return w


def main():
    w = fit(lengths=range(4, 13, 2))
    words = "every good attention finds the word that it is about to write and then goes back for the one before it".split()
    q, k = steps(len(words))
    context, weights = attnd.attention(
        q[None], k[None], np.eye(len(words), dtype=np.float32)[None], score="general", params={"w": w}, return_weights=True
    )
    written = [words[at] for at in weights[0].argmax(1)]
    print("read:   ", " ".join(words))
    print("written:", " ".join(written))
    right = np.mean([a == b for a, b in zip(written, words[::-1])])
    print(f"trained on 4 to 12 steps; of these {len(words)} the right input has the largest weight for {right:.0%}")
    for length in (20, 40):
        q, k = steps(length)
        _, of = attnd.attention(q[None], k[None], k[None], score="general", params={"w": w}, return_weights=True)
        hits = np.mean(of[0].argmax(1) == np.arange(length)[::-1])
        print(f"of {length} steps: {hits:.0%}")
    attnd.plot.heatmap(weights[0], written, keys=words, title="what each written word looks at").save("encoder_decoder_alignment.svg")
    print("wrote encoder_decoder_alignment.svg")


if __name__ == "__main__":
    main()
