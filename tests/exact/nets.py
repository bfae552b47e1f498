"""One architecture for the tests of the search, so that each of its programs compiles once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (2, 5, 5, 3)


def apply(weights, x):
    """A small ReLU net."""
    *hidden, (w, b) = weights
    for v, c in hidden:
        x = jnp.maximum(x @ v + c, 0)
    return x @ w + b


def random_weights(seed):
    """Layers of `SIZES` in float32."""
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    return [(rng.normal(size=(n, m)).astype("f"), rng.normal(size=m).astype("f")) for n, m in pairs]


def net(weights):
    """The net as a pytree."""
    return jax.tree_util.Partial(apply, jax.tree.map(jnp.asarray, weights))
