"""Orthogonal convolutions by frequency, as large as their image, for stride 1.

They have no small kernel: `freeze` keeps the matrices of their frequencies instead of the layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcert import blocks
from jaxcert.lipschitz import parametrise_conv
from jaxcert.sets import Array


class CayleyConv(nnx.Module):
    """Orthogonal at every frequency, by the Cayley transform; the image's opposite edges touch.

    (Trockman and Kolter, ICLR 2021.) For strides put `pixel_unshuffle` before it.

    Args:
      in_features, out_features: channels; orthonormal columns or rows where they differ.
      kernel_size: of the free kernel, one entry per axis.
      use_bias: whether there is a bias.
      param_dtype: of the weights.
      rngs: as in Flax.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_features, out_features)
        self.kernel = nnx.Param(
            jax.nn.initializers.lecun_normal()(rngs.params(), shape, param_dtype)
        )
        size = jnp.sqrt(jnp.sum(self.kernel[...] ** 2))
        self.scale = nnx.Param(size)
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """x, (b, *spatial, c_in)."""
        _require_image(type(self), x, self.kernel[...].shape)
        symbols = parametrise_conv.cayley_conv(
            self.kernel[...], self.scale[...], spatial=x.shape[1:-1]
        )
        y = blocks.frequency_multiplier(x, symbols)
        return y if self.bias is None else y + self.bias[...]


class BROConv(nnx.Module):
    """A reflection of low rank at every frequency (Lai et al., ICML 2025).

    Args:
      features: channels, in and out.
      kernel_size: of the free kernel, one entry per axis.
      rank: number of free channels, a quarter of the features by default.
      padding: "SAME" surrounds the image with k // 2 zeros and cuts the result (1-Lipschitz, not
        orthogonal at the border), "CIRCULAR" does not.
      use_bias: whether there is a bias.
      param_dtype: of the weights.
      rngs: as in Flax.
    """

    def __init__(
        self,
        features: int,
        kernel_size: Sequence[int],
        *,
        rank: int | None = None,
        padding: str = "SAME",
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        rank = max(1, features // 4) if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank must be between 1 and features={features}, got {rank}")
        if padding not in ("SAME", "CIRCULAR"):
            raise ValueError(f"BROConv takes padding 'SAME' or 'CIRCULAR', got {padding!r}")
        shape = (*kernel_size, features, rank)
        self.kernel = nnx.Param(
            jax.nn.initializers.lecun_normal()(rngs.params(), shape, param_dtype)
        )
        self.padding = padding
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """x, (b, *spatial, c)."""
        kernel = self.kernel[...]
        _require_image(type(self), x, kernel.shape)
        margin = [k // 2 if self.padding == "SAME" else 0 for k in kernel.shape[:-2]]
        wide = jnp.pad(x, [(0, 0), *((m, m) for m in margin), (0, 0)])
        basis = parametrise_conv.bro_conv(kernel, spatial=wide.shape[1:-1])
        y = blocks.frequency_reflection(wide, basis)
        y = y[:, *(slice(m, n - m) for m, n in zip(margin, wide.shape[1:], strict=False))]
        return y if self.bias is None else y + self.bias[...]


def _require_image(kind: type, x: Array, kernel: Sequence[int]) -> None:
    if x.ndim != len(kernel) or x.shape[-1] != kernel[-2]:
        raise ValueError(
            f"{kind.__name__} takes images (b, *spatial, {kernel[-2]}) with {len(kernel) - 2} "
            f"spatial axes, got {x.shape}"
        )
