"""Pooling and moving pixels with constant 1, and centering that does not look at the example."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from jaxcert import blocks
from jaxcert.sets import Array


def scaled_avg_pool(x: Array, window: Sequence[int]) -> Array:
    """Averages of windows side by side, times the root of their size: constant 1.

    Args:
      x: (b, *spatial, c).
      window: one entry per spatial axis; what is left over at the end is dropped.
    """
    return nnx.avg_pool(x, tuple(window), tuple(window)) * math.sqrt(math.prod(window))


def l2_pool(x: Array, window: Sequence[int]) -> Array:
    """The L2 norm of windows side by side (Boureau et al., 2010): constant 1.

    Args as `scaled_avg_pool`.
    """
    cut = x[:, *(slice(n // k * k) for n, k in zip(x.shape[1:], window, strict=False))]
    apart = pixel_unshuffle(cut, window)
    patches = apart.reshape(*apart.shape[:-1], math.prod(window), x.shape[-1])
    return blocks.root_sum_square(jnp.moveaxis(patches, -2, -1))


def pixel_unshuffle(x: Array, factors: Sequence[int]) -> Array:
    """Blocks of pixels as channels (space to depth): an isometry.

    Args:
      x: (b, *spatial, c).
      factors: size of the blocks along each spatial axis, which they divide.

    Returns:
      (b, *spatial / factors, prod(factors) c), channels ordered by place in the block, then c.
    """
    rank, spatial = len(factors), x.shape[1:-1]
    if len(spatial) != rank or any(n % s for n, s in zip(spatial, factors, strict=True)):
        raise ValueError(f"pixel_unshuffle by {tuple(factors)} does not divide the image {x.shape}")
    split = [n for size, s in zip(spatial, factors, strict=True) for n in (size // s, s)]
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    apart = x.reshape(x.shape[0], *split, x.shape[-1]).transpose(order)
    return apart.reshape(x.shape[0], *split[::2], -1)


def pixel_shuffle(x: Array, factors: Sequence[int]) -> Array:
    """The inverse of `pixel_unshuffle`: channels as blocks of pixels."""
    rank, spatial, size = len(factors), x.shape[1:-1], math.prod(factors)
    if len(spatial) != rank or x.shape[-1] % size:
        raise ValueError(f"pixel_shuffle by {tuple(factors)} does not fit {x.shape}")
    apart = x.reshape(*x.shape[:-1], *factors, x.shape[-1] // size)
    order = [0, *(axis for a in range(rank) for axis in (1 + a, 1 + rank + a)), 2 * rank + 1]
    whole = [n * s for n, s in zip(spatial, factors, strict=True)]
    return apart.transpose(order).reshape(x.shape[0], *whole, -1)


class BatchCentering(nnx.Module):
    """x minus a running mean per channel: a bias at evaluation, so its constant is 1.

    In training mode the mean of the batch is taken off and remembered; certifiers refuse that mode,
    since examples then depend on each other. Call `model.eval()` first.

    Args:
      features: channels, the last axis.
      momentum: share of the old mean that is kept at each step.
    """

    def __init__(self, features: int, *, momentum: float = 0.95):
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.momentum = momentum
        self.use_running_average = False

    def __call__(self, x: Array) -> Array:
        """x, (b, ..., features)."""
        if self.use_running_average:
            return x - self.mean[...]
        mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        return x - mean
