"""The deterministic certificate against all inputs of a small grid."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert.sets import Grid
from jaxcert.smoothing import certify_splitting

KEY = jax.random.key(4)
LEVELS, STEPS = 4, 7
ALL = np.array(list(itertools.product(range(LEVELS + 1), repeat=3)))
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)


def arbitrary(z):
    """Any function of what is seen: logits looked up by a hash of the values."""
    place = jnp.round(8 * LEVELS * z).astype(jnp.int32) @ jnp.array([1, 5, 23]) % 64
    return TABLE[place]


def smooth(z):
    return jnp.stack([z[:, 0] - 0.5, z[:, 1] - 0.5, z[:, 2] - 0.45], axis=1)


@pytest.mark.parametrize("f", [arbitrary, smooth])
def test_no_input_within_the_radius_is_predicted_differently(f):
    x = jnp.asarray(ALL / LEVELS, jnp.float32)
    found = certify_splitting(KEY, f, x, steps=STEPS, levels=LEVELS, chunk=3)
    prediction, radius = np.asarray(found.prediction), np.asarray(found.radius)
    distance = np.abs(ALL[:, None] - ALL[None]).sum(-1)
    reach = np.round(radius * LEVELS)[:, None]
    assert (prediction[:, None] == prediction[None])[distance <= reach].all()
    assert (radius > 0).any()
    assert len(np.unique(prediction)) == 3
    assert np.array_equal(found.confidence, np.ones(len(x)))
    assert found.norm == 1
    assert found.within == Grid(LEVELS)


def test_votes_are_those_of_the_published_formula():
    """By hand, with the same v_i: s_i = ((v_i + j) mod steps + 1/2) / levels."""
    with jax.threefry_partitionable(False):
        v = np.asarray(jax.random.randint(KEY, (3,), 0, STEPS))
    x = np.array([[1, 4, 2], [0, 3, 3]]) / LEVELS
    found = certify_splitting(KEY, smooth, jnp.asarray(x, jnp.float32), steps=STEPS, levels=LEVELS)
    for i in range(2):
        counts = np.zeros(3, int)
        for j in range(STEPS):
            s = ((v + j) % STEPS + 0.5) / LEVELS
            z = (np.minimum(s, 1) + (x[i] > s)) / 2
            counts[np.argmax([z[0] - 0.5, z[1] - 0.5, z[2] - 0.45])] += 1
        a = int(np.argmax(counts))
        gaps = [counts[a] - counts[b] - (b < a) for b in range(3) if b != a]
        assert found.prediction[i] == a
        assert found.radius[i] == pytest.approx(max(0, min(gaps) // 2) / LEVELS, rel=1e-6)


def test_the_certified_function_is_the_same_in_float64_mode():
    x = jnp.linspace(0, 1, LEVELS + 1, dtype=jnp.float32)[:, None] * jnp.ones((1, 3), jnp.float32)
    here = certify_splitting(KEY, smooth, x, steps=STEPS, levels=LEVELS)
    with jax.enable_x64(True):
        there = certify_splitting(KEY, smooth, x, steps=STEPS, levels=LEVELS)
    assert np.array_equal(here.prediction, there.prediction)
    np.testing.assert_allclose(here.radius, there.radius, rtol=1e-6)


def test_what_cannot_be_certified_abstains_or_raises():
    def nan(z):
        return jnp.full((len(z), 2), jnp.nan)

    x = jnp.full((1, 3), 0.5)
    assert certify_splitting(KEY, nan, x, steps=STEPS, levels=LEVELS).prediction[0] == -1
    with pytest.raises(ValueError, match="round pixels to their grid"):
        certify_splitting(KEY, smooth, x + 0.01, steps=STEPS, levels=LEVELS)
    traced = jax.jit(lambda x: certify_splitting(KEY, smooth, x, steps=STEPS, levels=LEVELS))
    assert traced(x + 0.01).prediction[0] == -1
    with pytest.raises(ValueError, match="steps must be an int of at least 255"):
        certify_splitting(KEY, smooth, x, steps=100)
    with pytest.raises(TypeError, match="typed key"):
        certify_splitting(jnp.zeros(2, jnp.uint32), smooth, x, steps=300)
