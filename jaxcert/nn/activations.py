"""Activations that keep gradients' norms: 1-Lipschitz, and isometries almost everywhere."""

import jax.numpy as jnp
from flax import nnx

from jaxcert import blocks
from jaxcert.lipschitz import parametrise
from jaxcert.sets import Array


def maxmin(x: Array) -> Array:
    """max and min of each pair (x_i, x_{i + d/2}) along the last axis (Anil et al., ICML 2019).

    Args:
      x: (..., d) with d even; the maxima come first.
    """
    _require_pairs("maxmin", x.shape[-1])
    return blocks.maxmin(x)


def group_sort(x: Array, size: int) -> Array:
    """Each group of `size` neighbours along the last axis, sorted (Anil et al., ICML 2019)."""
    if size < 1 or x.shape[-1] % size:
        raise ValueError(f"group_sort of size {size} does not divide {x.shape[-1]} features")
    return jnp.sort(x.reshape(*x.shape[:-1], -1, size), axis=-1).reshape(x.shape)


def beta_abs(x: Array, share: float = 0.5) -> Array:
    """|x_i| for the first share of the features, x_i for the others (LipNeXt, ICLR 2026).

    With half of them it is `maxmin` between two rotations, without comparisons.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    d = x.shape[-1]
    return blocks.partial_abs(x, jnp.arange(d) < round(share * d))


class Householder(nnx.Module):
    """Pairs (x_i, x_{i + d/2}), reflected at a learnt line where they lie on its one side.

    (Singla, Singla and Feizi, ICLR 2022.) It begins as `maxmin` does, with the line x = y.
    """

    def __init__(self, features: int):
        _require_pairs("Householder", features)
        self.angle = nnx.Param(jnp.full(features // 2, -jnp.pi / 4))

    def __call__(self, x: Array) -> Array:
        """x, (..., features)."""
        return blocks.householder(x, parametrise.directions(self.angle[...]))


def _require_pairs(name: str, features: int) -> None:
    if features % 2:
        raise ValueError(f"{name} works on pairs and needs an even number of features: {features}")
