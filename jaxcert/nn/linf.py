"""Layers that are 1-Lipschitz in Linf: for `lipschitz.certify(f, x, norm=jnp.inf)`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcert.lipschitz import parametrise
from jaxcert.sets import Array


class LinfDistDense(nnx.Module):
    """u_j = max_i |x_i - w_ij| + b_j, distances to learnt points (Zhang et al., ICML 2021).

    The neuron is its own nonlinearity. In training the distance may be an Lp norm with p growing
    from 8 to 1000, whose gradient is not sparse; only p = inf is 1-Lipschitz in Linf.

    Args:
      in_features, out_features: of the layer.
      param_dtype: of the weights.
      rngs: as in Flax.
    """

    def __init__(
        self, in_features: int, out_features: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        shape = (in_features, out_features)
        self.points = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

    def __call__(self, x: Array, p: Any = None) -> Array:
        """x, (b, d_in), to (b, d_out). Memory: b d_in d_out floats.

        Args:
          x: the input.
          p: order of the norm, a scalar that may be traced; the maximum where it is None.
        """
        apart = jnp.abs(x[:, :, None] - self.points[...])
        largest = jnp.max(apart, axis=1)
        if p is None:
            return largest + self.bias[...]
        # In units of the largest term, so that no power overflows.
        scale = jax.lax.stop_gradient(largest) + 1e-12
        total = jnp.sum((apart / scale[:, None]) ** p, axis=1)
        return scale * total ** (1 / p) + self.bias[...]


class SortDense(nnx.Module):
    """u_j = sum_i w_ij s_i for s = |x + b_j| sorted from the largest on, sum_i |w_ij| <= 1.

    (Zhang et al., NeurIPS 2022, SortNet.) Weights begin geometric, (1 - decay) decay^i; the first
    alone would make it an Linf distance.

    Args:
      in_features, out_features: of the layer.
      decay: of the first weights.
      learn: whether the weights are learnt; the shifts always are.
      param_dtype: of the weights.
      rngs: as in Flax.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        decay: float = 0.3,
        learn: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self.shift = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))
        weights = (1 - decay) * decay ** jnp.arange(in_features, dtype=param_dtype)
        weights = jnp.broadcast_to(weights[:, None], shape)
        self.weights = nnx.Param(weights) if learn else nnx.Variable(weights)

    def __call__(self, x: Array) -> Array:
        """x, (b, d_in), to (b, d_out). Memory: b d_in d_out floats, sorted."""
        sizes = -jnp.sort(-jnp.abs(x[:, :, None] + self.shift[...]), axis=1)
        return jnp.einsum("bio,io->bo", sizes, parametrise.unit_sums(self.weights[...]))
