"""The patches of an image look at each other, as in a vision transformer: 14 x 14 patches and a class token, 12 heads of 64.

    python examples/python/image_patches.py

The image has three textures. A patch is described by the strengths of the waves in it, which don't depend on where they begin, and each
head sees them through a random projection of its own. Nothing is trained: patches find those of their texture because they are alike.
Prints how much of the attention stays inside a texture, and writes image_patches.png: the weights of one patch, over the image.
"""

import numpy as np

import attnd
import attnd.plot

SIDE, PATCH, HEADS, DIM = 14, 16, 12, 64


def image(rng):
    """Stripes, checks and grain, and which patch has which."""
    y, x = np.mgrid[0 : SIDE * PATCH, 0 : SIDE * PATCH]
    kind = np.where(x + y < 200, 0, np.where((x - 150) ** 2 + (y - 150) ** 2 < 3600, 1, 2))
    textures = [np.sin((x + 2 * y) / 3), np.sign(np.sin(x / 2.5) * np.sin(y / 2.5)), rng.standard_normal(x.shape)]
    pixels = np.choose(kind, textures) + 0.3 * rng.standard_normal(x.shape)
    middle = slice(PATCH // 2, None, PATCH)
    return pixels, kind[middle, middle].ravel()


def main():
    rng = np.random.default_rng(7)
    pixels, kind = image(rng)
    patches = pixels.reshape(SIDE, PATCH, SIDE, PATCH).transpose(0, 2, 1, 3).reshape(-1, PATCH, PATCH)
    waves = np.log1p(np.abs(np.fft.rfft2(patches))).reshape(len(patches), -1)
    waves -= waves.mean(0)
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    # The class token is the mean of all.
    rows = np.concatenate([waves.mean(0, keepdims=True), waves])
    project = rng.standard_normal((HEADS, rows.shape[1], DIM)) / np.sqrt(DIM)
    states = np.ascontiguousarray(rows @ project, np.float32)

    _, weights = attnd.attention(states, states, states, scale=12.0, return_weights=True)
    of_patches = weights.mean(0)[1:, 1:]
    same = kind[:, None] == kind[None]
    for name, number in (("stripes", 0), ("checks", 1), ("grain", 2)):
        rows = kind == number
        inside = (of_patches * same)[rows].sum(1) / of_patches[rows].sum(1)
        print(f"{name}: {rows.sum()} patches of {len(kind)}, {inside.mean():.0%} of their attention is on their own texture")
    middle = SIDE * 9 + 9
    attnd.plot.heatmap(of_patches[middle].reshape(SIDE, SIDE)).save("image_patches.png")
    print(f"wrote image_patches.png: what patch {middle} ({('stripes', 'checks', 'grain')[kind[middle]]}) looks at")


if __name__ == "__main__":
    main()
