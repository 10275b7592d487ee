"""Frames of speech look at what is near: attention with a window over two minutes of sound.

    python examples/python/speech_window.py

The sound is made here: vowels, hums whose overtones are those of a mouth, one after the other. Frames of 10 ms see a quarter of a second to
either side, so that a sound of two minutes costs what its length costs and not the square. Prints how much of a frame's attention stays in its own
vowel, beside the time that it takes with and without the window, and writes speech_window.png.
"""

import time

import numpy as np

import attnd
import attnd.plot

RATE, HOP, SECONDS = 8000, 80, 120
# Formants in Hz: where a mouth that says these is loud.
VOWELS = {"a": (700, 1200), "i": (280, 2250), "u": (310, 870)}


def sound(rng):
    """A sound, and which vowel each frame is."""
    samples, said = [], []
    while sum(map(len, samples)) < RATE * SECONDS:
        vowel = str(rng.choice(list(VOWELS)))
        t = np.arange(HOP * int(rng.integers(8, 20))) / RATE
        pitch = rng.uniform(90, 160)
        overtones = np.arange(pitch, RATE / 2, pitch)
        loud = sum(np.exp(-(((overtones - f) / 150) ** 2)) for f in VOWELS[vowel])
        samples.append((loud[:, None] * np.sin(2 * np.pi * overtones[:, None] * t)).sum(0) + 0.05 * rng.standard_normal(len(t)))
        said += [vowel] * (len(t) // HOP)
    return np.concatenate(samples), np.array(said)


def main():
    samples, said = sound(np.random.default_rng(3))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(samples, 88), 256)[::HOP][: len(said)]
    spectrum = np.log1p(np.abs(np.fft.rfft(frames * np.hanning(256), axis=1)))
    spectrum -= spectrum.mean(0)
    spectrum /= np.linalg.norm(spectrum, axis=1, keepdims=True)
    heads = np.random.default_rng(4).standard_normal((4, spectrum.shape[1], 64)) / 8
    states = np.ascontiguousarray(spectrum @ heads, np.float32)

    def timed(**options):
        attnd.attention(states, states, states, scale=10.0, **options)
        begun = time.perf_counter()
        context = attnd.attention(states, states, states, scale=10.0, **options)
        return context, time.perf_counter() - begun

    near = {"offset": 0, "window": (25, 25)}
    _, whole_seconds = timed()
    context, seconds = timed(**near)
    print(f"{len(said)} frames; each sees 51: {seconds * 1e3:.1f} ms, and all of them: {whole_seconds * 1e3:.1f} ms")

    places = np.arange(len(said))
    visible = np.abs(places[:, None] - places) <= 25
    by_mask = attnd.attention(states, states, states, scale=10.0, attn_mask=visible)
    print(f"a mask of {visible.size} bools gives the same within {np.abs(by_mask - context).max():.1e}")

    _, told = attnd.attention(states, states, states, scale=10.0, outputs=attnd.Outputs(distance=True), **near)
    first = slice(0, 400)
    _, weights = attnd.attention(states[:, first], states[:, first], states[:, first], scale=10.0, return_weights=True, **near)
    own = (weights.mean(0) * (said[first, None] == said[None, first])).sum(1).mean()
    share = (visible[first, first] * (said[first, None] == said[None, first])).sum() / visible[first, first].sum()
    print(f"{own:.0%} of the attention is on frames of the same vowel, which {share:.0%} of those that are seen are")
    print(f"frames look {told.distance.mean():.1f} frames away in the mean")
    attnd.plot.heatmap(weights.mean(0)).save("speech_window.png")
    print("wrote speech_window.png: the first four seconds")


if __name__ == "__main__":
    main()
