"""Outputs of a model under noise, for statements about other things than the likeliest class.

The draws are those of `sampling.py`: copy number s of the image numbered i comes from
`fold_in(fold_in(key, i), s)`, estimation takes the numbers 0, 1, ..., n - 1, selection counts down
from 2^32 - 1, and the model is only ever run on batches of exactly `plan.chunk` copies.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.floats import rounded_down
from jaxcert.smoothing.certify import confidence
from jaxcert.smoothing.noise import Gaussian, GridGaussian
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.smoothing.sampling import noisy_copies, threefry_key

Array: TypeAlias = jax.Array


def per_image(
    function: Callable[..., Any], key: Array, index: Array, plan: SmoothingPlan, *per: Array
) -> Any:
    """function(image key, *arguments of the image) for one image after the other, stacked."""
    key = threefry_key(key)

    def one(image: tuple[Array, ...]) -> Any:
        number, *arguments = image
        return function(jax.random.fold_in(key, number // jnp.uint32(plan.group)), *arguments)

    return jax.lax.map(one, (index, *per))


def keep(
    function: Callable[[Array], Array],
    key: Array,
    x: Array,
    plan: SmoothingPlan,
    *,
    n: int,
    selection: bool = False,
) -> Array:
    """What a function of noisy copies, (chunk, *input) -> (chunk, *out), gives for n draws.

    Args:
      function: the model, and what is to be kept of its outputs.
      key: of the image, `fold_in(key, i)`.
      x: one image (*input).
      plan: its noise and chunk.
      n: draws.
      selection: whether they are draws of the selection stage.

    Returns:
      (n, *out), which is the memory it takes, next to that of one chunk.
    """

    def batch(c: Array) -> Array:
        return function(noisy_copies(key, x, _numbers(c, plan.chunk, selection), plan.noise))

    batches = jax.lax.map(batch, jnp.arange(_chunks(n, plan.chunk), dtype=jnp.uint32))
    return batches.reshape(-1, *batches.shape[2:])[:n]


def tally(
    events: Callable[[Array], Array],
    key: Array,
    x: Array,
    plan: SmoothingPlan,
    *,
    n: int,
    selection: bool = False,
) -> Array:
    """How often each of several events occurs in n draws: int32 (...).

    Args:
      events: of noisy copies, (chunk, *input) -> bool (chunk, ...).
      key, x, plan, n, selection: as for `keep`; the memory is that of one chunk and the counts.
    """

    def step(c: Array, counts: Array) -> Array:
        occurred = events(noisy_copies(key, x, _numbers(c, plan.chunk, selection), plan.noise))
        row = _numbers(c, plan.chunk, False)
        counted = (row < n).reshape(-1, *(1,) * counts.ndim)
        return counts + jnp.sum(occurred & counted, axis=0, dtype=jnp.int32)

    copies = jax.eval_shape(
        lambda: noisy_copies(key, x, _numbers(0, plan.chunk, False), plan.noise)
    )
    shape = jax.eval_shape(events, copies).shape[1:]
    return jax.lax.fori_loop(0, _chunks(n, plan.chunk), step, jnp.zeros(shape, jnp.int32))


def _chunks(n: int, chunk: int) -> int:
    return -(-n // chunk)


def _numbers(c: Any, chunk: int, selection: bool) -> Array:
    """The draw numbers of chunk c; those beyond n are drawn and not counted."""
    row = jnp.asarray(c, jnp.uint32) * jnp.uint32(chunk) + jnp.arange(chunk, dtype=jnp.uint32)
    return ~row if selection else row  # ~j is 2^32 - 1 - j


def sigma_of(plan: SmoothingPlan, x: Array, *kinds: type) -> float:
    """sigma of Gaussian noise as its norm counts it, rounded down; noise of other kinds raises.

    A step of size eps in the norm is one of at most eps / sigma standard deviations: for norms 1
    and 2 that is the noise's own sigma, and in d dimensions sigma / sqrt(d) for norm inf.
    """
    noise: Any = plan.noise
    if not isinstance(noise, (Gaussian, *kinds)):
        raise TypeError(
            f"this certificate is proved for Gaussian noise, got {plan.noise!r}; type "
            "SmoothingPlan(noise=Gaussian(0.25))"
        )
    # The multiplication in `Gaussian.sample` uses sigma rounded to float32.
    sigma = min(noise.sigma, float(np.float32(noise.sigma)))
    if isinstance(noise, GridGaussian):  # see its radius
        sigma *= 1 - 2.0**-20
    if noise.norm == math.inf:
        sigma = sigma / math.sqrt(x[0].size) * (1 - 2.0**-51)
    return sigma


def total_variation(plan: SmoothingPlan, x: Array) -> float:
    """At most the distance of the law that is drawn from, from a Gaussian (rounded to the grid)."""
    noise = plan.noise
    return noise.total_variation(x[0].size) if isinstance(noise, GridGaussian) else 0.0


def confidence_of(plan: SmoothingPlan, shape: tuple[int, ...]) -> Array:
    """1 - alpha, rounded down, for every image."""
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        rounded = rounded_down(jnp.asarray(confidence(plan.alpha), jnp.float64), dtype)
    return jnp.broadcast_to(rounded, shape)
