"""Splitting noise without randomness: an L1 certificate that is a proof."""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.certificate import ABSTAIN, Certificate, issue, predicted_class
from jaxcert.model import Model, Structure, split
from jaxcert.sets import Grid
from jaxcert.smoothing.arguments import require_all, require_images, require_key
from jaxcert.smoothing.noise.grid import grid_inputs, nearest_level, on_grid
from jaxcert.smoothing.sampling import number_of_classes, require_apart, rows_apart, threefry_key

Array: TypeAlias = jax.Array


def certify_splitting(
    key: Array, f: Model, x: Any, *, steps: int, levels: int = 255, chunk: int = 400
) -> Certificate:
    """The L1 radius within which the vote over all thresholds keeps its winner: a proof.

    Levine and Feizi (ICML 2021), the deterministic form of `Splitting` with
    width = steps / (2 levels). With integers v_i drawn once from the key, for all inputs alike,
    pixel i has the thresholds s_i = ((v_i + j) mod steps + 1/2) / levels for j = 0, ..., steps - 1,
    and the model sees (min(s_i, 1) + 1[x_i > s_i]) / 2. Every j votes; the certified function
    predicts the class of most votes, the first of them where there are several. Nothing is
    sampled, and the float program is covered: what the model sees depends on integers alone.

    Args:
      key: decides the v_i; another key is another certified function.
      f: the model, (b, *input) -> (b, k).
      x: images (b, *input) on the grid k / levels, in [0, 1].
      steps: thresholds per pixel, at least `levels`. The more there are, the larger the radii, and
        the less the model sees.
      levels: grid points per unit.
      chunk: rows per forward pass. The float logits, and so the certified function, may depend on
        it in the last bit.

    Returns:
      A `Certificate` with norm 1, within the grid, of confidence 1. A traced image that is off the
      grid abstains.

    Raises:
      TypeError, ValueError: for arguments that do not fit, known images off the grid.
      MixedRows, StatefulModel: as for `certify`.

    Example:
      >>> half = lambda z: jnp.stack([z.sum(1), 0.9 - z.sum(1)], axis=1)
      >>> x = jnp.array([[255.0, 255.0], [0.0, 51.0]]) / 255
      >>> certificate = certify_splitting(jax.random.key(0), half, x, steps=510)
      >>> print(certificate.prediction, certificate.confidence)
      [0 0] [1. 1.]
    """
    require_key(key)
    x = require_images(x)
    for name, value, least in (
        ("levels", levels, 1),
        ("steps", steps, levels),
        ("chunk", chunk, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    usable = on_grid(x, levels)
    require_all(usable, x, "certify_splitting", grid_inputs(levels))
    batch = jax.ShapeDtypeStruct((chunk, *x.shape[1:]), x.dtype)
    arrays, structure = split(f, batch)
    require_apart(structure, arrays, x, chunk)
    votes = _votes(arrays, key, x, structure=structure, steps=steps, levels=levels, chunk=chunk)
    return _decided(votes, usable, levels)


@functools.partial(jax.jit, static_argnames=("structure", "steps", "levels", "chunk"))
def _votes(
    arrays: list,
    key: Array,
    x: Array,
    *,
    structure: Structure,
    steps: int,
    levels: int,
    chunk: int,
) -> Array:
    """How many of the thresholds vote for each class, int32 (b, k)."""
    key = threefry_key(key)
    k = number_of_classes(
        structure.build(arrays), jax.ShapeDtypeStruct((chunk, *x.shape[1:]), x.dtype)
    )
    with jax.threefry_partitionable(False):
        first = jax.random.randint(key, x.shape[1:], 0, steps, jnp.int32)

    def seen(level: Array, j: Array) -> Array:
        s = (first + j) % steps
        shown = jnp.minimum(2 * s + 1, 2 * levels) + 2 * levels * (level > s)
        return (shown.astype(x.dtype) / (4 * levels)).astype(x.dtype)

    def count_image(level: Array) -> Array:
        def count_chunk(c: Array, counts: Array) -> Array:
            j = c * chunk + jnp.arange(chunk)
            classes = predicted_class(
                structure.build(arrays)(jax.vmap(lambda i: seen(level, i))(j))
            )
            counted = (j < steps) & (classes != ABSTAIN)
            return counts.at[jnp.where(counted, classes, k)].add(1, mode="drop")

        return jax.lax.fori_loop(0, -(-steps // chunk), count_chunk, jnp.zeros(k, jnp.int32))

    votes = jax.lax.map(count_image, nearest_level(x, levels))
    return jnp.where(rows_apart(structure, arrays, x, chunk), votes, 0)


# As j runs through all its values, so does each s_i, once: moving pixel i by m levels changes what
# is seen for m values of j at most, and moving all of them by M levels in sum for M values. Then A
# keeps at least n_A - M votes, any B has at most n_B + M, and A wins if n_A - M >= n_B + M where
# A < B in the order of classes, or > where B < A:
#   M <= (n_A - n_B - 1[B < A]) / 2.
@functools.partial(jax.jit, static_argnames="levels")
def _decided(votes: Array, usable: Array, levels: int) -> Certificate:
    top = jnp.argmax(votes, axis=1)[:, None]
    classes = jnp.arange(votes.shape[1])
    leads = jnp.take_along_axis(votes, top, axis=1) - votes - (classes < top)
    moves = jnp.min(jnp.where(classes == top, np.iinfo(np.int32).max, leads), axis=1) // 2
    predicts = usable & jnp.any(votes > 0, axis=1)
    with jax.enable_x64(True):
        radius = jnp.maximum(moves, 0).astype(jnp.float64) / levels
    return issue(jnp.where(predicts, top[:, 0], ABSTAIN), radius, norm=1.0, within=Grid(levels))
