"""Keras' layers and attnd's, with the same weights, on random calls."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import pytest

import attnd.keras

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = 200


def arrays(output):
    output = output if isinstance(output, tuple) else (output,)
    return [keras.ops.convert_to_numpy(one) for one in output]


def assert_same(theirs, ours, *inputs, what, **call):
    """Outputs of a layer of Keras in f64 and of one of attnd in f32. Of rows that see no key Keras' softmax is over scores that are all
    less by 1e9, which in f64 are still different and in f32 are not: these rows are those of its f32."""
    wide, narrow = theirs
    wanted, got = arrays(wide(*inputs, **call)), arrays(ours(*inputs, **call))
    blind = arrays(narrow(*inputs, **call))
    assert len(wanted) == len(got), what
    for one, same_in_f32, other in zip(wanted, blind, got):
        assert one.shape == other.shape, what
        largest = max(1.0, float(np.abs(one).max(initial=0)))
        apart = np.minimum(np.abs(one - other), np.abs(same_in_f32 - other))
        assert (apart <= 1e-5 * largest).all(), (what, apart.max())


def pairs(made, *inputs):
    """The same layer of Keras, in f64 and in f32, and of attnd, with the same random weights."""
    theirs = made(keras.layers, "float64"), made(keras.layers, "float32")
    ours = made(attnd.keras, "float32")
    rng = np.random.default_rng(0)
    for layer in (*theirs, ours):
        layer(*inputs)
    weights = [rng.standard_normal(weight.shape) * 0.7 for weight in ours.get_weights()]
    for layer in (*theirs, ours):
        layer.set_weights(weights)
    return theirs, ours


def test_dots_and_sums():
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        batch, queries, keys, dim = (int(rng.choice(of)) for of in ([1, 3], [1, 5, 40], [1, 7, 60], [1, 4, 33]))
        q, v, k = (rng.standard_normal((batch, n, dim)).astype("float32") for n in (queries, keys, keys))
        inputs = [q, v, k][: int(rng.choice([2, 3]))]
        name = str(rng.choice(["Attention", "AdditiveAttention"]))
        options = {"use_scale": bool(rng.integers(2))}
        if name == "Attention":
            options["score_mode"] = str(rng.choice(["dot", "concat"]))
        theirs, ours = pairs(lambda of, dtype: getattr(of, name)(dtype=dtype, **options), inputs)
        call = {"return_attention_scores": bool(rng.integers(2)), "use_causal_mask": bool(rng.integers(2))}
        if rng.integers(2):
            masks = [rng.random((batch, n)) < 0.7 for n in (queries, keys)]
            masks[1][0] = rng.integers(2)
            call["mask"] = [None if rng.integers(2) else masks[0], masks[1]]
        assert_same(theirs, ours, inputs, what=(seed, name, options, call.keys()), **call)


def test_heads():
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        batch, queries, keys, width = (int(rng.choice(of)) for of in ([1, 3], [1, 5, 40], [1, 7, 60], [4, 12]))
        query, value, key = (rng.standard_normal((batch, n, width)).astype("float32") for n in (queries, keys, keys))
        call = {"return_attention_scores": bool(rng.integers(2)), "use_causal_mask": bool(rng.integers(2))}
        if rng.integers(2):
            call["attention_mask"] = rng.random((batch, queries, keys)) < 0.6
        if rng.integers(2):
            call["value_mask"] = rng.random((batch, keys)) < 0.7
        if rng.integers(2):
            made = {"num_heads": int(rng.choice([1, 3])), "key_dim": int(rng.choice([2, 9])), "use_bias": bool(rng.integers(2))}
            if rng.integers(2):
                made["value_dim"] = 5

            def layer(of, dtype):
                return of.MultiHeadAttention(dtype=dtype, **made)
        else:
            made = {"head_dim": int(rng.choice([2, 9])), "num_query_heads": 6, "num_key_value_heads": int(rng.choice([1, 2, 6]))}

            def layer(of, dtype):
                return of.GroupQueryAttention(dtype=dtype, **made)

        theirs, ours = pairs(layer, query, value)
        assert_same(theirs, ours, query, value, key, what=(seed, made, call.keys()), **call)


@pytest.mark.parametrize("axes", [1, 2, (1, 2), (2, 3)])
def test_axes(axes):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 4, 5, 6)).astype("float32")
    theirs, ours = pairs(lambda of, dtype: of.MultiHeadAttention(2, 3, attention_axes=axes, dtype=dtype), x, x)
    for scores in (False, True):
        assert_same(theirs, ours, x, x, what=axes, return_attention_scores=scores)


def test_models_are_saved_and_training_is_refused(tmp_path, cluster):
    inputs = keras.Input((7, 8))
    layer = attnd.keras.MultiHeadAttention(2, 4, dropout=0.3, name="heads")
    model = keras.Model(inputs, layer(inputs, inputs))
    x = np.random.default_rng(2).standard_normal((2, 7, 8)).astype("float32")
    before = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.get_layer("heads"), attnd.keras.MultiHeadAttention)
    assert np.array_equal(again.predict(x, verbose=0), before)
    again.get_layer("heads").cluster = cluster
    assert np.array_equal(again.predict(x, verbose=0), before)
    with pytest.raises(RuntimeError, match="heads is called for training"):
        model(x, training=True)
