"""The slow, obviously right way: models in float64, extreme points, corners, exact rationals."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import as_float64, split
from jaxcert.sets import Box, bounding_box, project, sample


def in_float64(f):
    """f with float64 weights and inputs, compiled; takes and gives numpy arrays."""
    with jax.enable_x64(True):
        arrays, structure = split(f)
        wide = as_float64(arrays)
        run = jax.jit(lambda arrays, x: structure.build(arrays)(x))

    def evaluate(x):
        with jax.enable_x64(True):
            return np.asarray(run(wide, jnp.asarray(np.asarray(x, np.float64))))

    return evaluate


def output_size(f, x):
    """k of the logits (b, k)."""
    arrays, structure = split(f)
    return jax.eval_shape(lambda a: structure.build(arrays)(a), x).shape[1]


def points_of(f, region, n=16, steps=2, seed=0):
    """Points of each example's set, (m, b, *input) in float64: random ones, ends and gradient ends.

    For a box the gradient steps go to the corner that is extreme for the linearised output, each
    output's least and most; for a ball they are projected steps.
    """
    with jax.enable_x64(True):
        arrays, structure = split(f)
        arrays, region = as_float64((arrays, region))

        def wide(x):  # rebuilt under each trace, where Flax lets a module touch its state
            return structure.build(arrays)(x)

        box = bounding_box(region)
        start = sample(jax.random.key(seed), region, n)
        k = jax.eval_shape(wide, box.lower).shape[1]
        signs = jnp.repeat(jnp.array([1.0, -1.0]), k)
        columns = jnp.tile(jnp.arange(k), 2)

        @jax.jit
        def climb(x):
            def one(x, column, sign):
                slope = jax.grad(lambda a: sign * wide(a)[:, column].sum())(x)
                length = jnp.max(box.upper - box.lower)
                return project(region, x + 3 * length * jnp.sign(slope))

            return jax.vmap(one)(x, columns, signs)

        x = jnp.broadcast_to((box.lower + box.upper) / 2, (2 * k, *box.lower.shape))
        ends = [start, jnp.stack([box.lower, box.upper])] if isinstance(region, Box) else [start]
        for _ in range(steps):
            x = climb(x)
            ends.append(x)
        return np.concatenate([np.asarray(e) for e in ends])


def corners(lower, upper):
    """All corners of boxes (b, d), as (2^d, b, d); for d <= 8."""
    picks = np.array(list(itertools.product([0, 1], repeat=lower.shape[1])))
    return np.where(picks[:, None, :] == 1, upper, lower)


def exact(array):
    """A float array as exact rationals."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, np.float64))


def exact_interval_mlp(layers, lower, upper):
    """Interval bounds of a ReLU MLP [(w, b), ...] in exact rational arithmetic, per example."""
    l, u = exact(lower), exact(upper)
    for i, (w, b) in enumerate(layers):
        w, b = exact(w), exact(b)
        pos, neg = np.where(w > 0, w, 0), np.where(w < 0, w, 0)
        l, u = l @ pos + u @ neg + b, u @ pos + l @ neg + b
        if i < len(layers) - 1:
            l, u = np.where(l > 0, l, 0), np.where(u > 0, u, 0)
    return l, u
