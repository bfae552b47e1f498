"""Blocks that are 1-Lipschitz as a whole, though no chain of norms shows it.

`lipschitz` finds each of them as one equation with its weights and proves its constant from those.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcert import blocks
from jaxcert.lipschitz import parametrise
from jaxcert.nn.parametrised import with_kernel
from jaxcert.sets import Array

_OPTIONS = {"rngs", "use_bias", "dtype", "param_dtype", "kernel_init", "bias_init"}


class FrozenResidual(nnx.Module):
    """x - W D relu(W^T x + b) with stored weights: `inner` applies W^T and b, `scale` is D."""

    def __init__(self, inner: nnx.Linear | nnx.Conv, scale: Array, circular: bool):
        self.inner = inner
        self.scale = nnx.Param(scale)
        self.circular = circular

    def __call__(self, x: Array) -> Array:
        """x, (b, ..., d), or (b, *spatial, c) with as many axes as the window has."""
        block = blocks.circular_residual if self.circular else blocks.residual
        kernel, bias = self.inner.kernel[...], self.inner.bias
        shift = jnp.zeros(kernel.shape[-1], kernel.dtype) if bias is None else bias[...]
        operands = (x, kernel, self.scale[...], shift)
        return block(*self.inner.promote_dtype(operands, dtype=self.inner.dtype))


class _Residual(nnx.Module):
    """`features` in and out, `hidden` of them inside; dense, or a convolution of a window."""

    free: Any
    circular: bool

    def __init__(
        self,
        features: int,
        kernel_size: Sequence[int] | None = None,
        *,
        hidden: int | None = None,
        padding: str = "SAME",
        **options: Any,
    ):
        if padding not in ("SAME", "CIRCULAR"):
            raise ValueError(
                f"{type(self).__name__} keeps the image's size and takes padding 'SAME' or "
                f"'CIRCULAR', got {padding!r}"
            )
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes no {', '.join(unknown)}: it applies a layer of "
                "stride 1 and its adjoint; put pixel_unshuffle or AOLConv before it"
            )
        hidden = features if hidden is None else hidden
        self.circular = padding == "CIRCULAR"
        if kernel_size is None:
            self.free = nnx.Linear(features, hidden, **options)
        else:
            self.free = nnx.Conv(features, hidden, tuple(kernel_size), **options)

    def scale(self) -> Array:
        """D, (hidden,)."""
        raise NotImplementedError("a residual block defines its scales")

    def frozen(self) -> FrozenResidual:
        """The block with its weights as they are."""
        plain = with_kernel(self.free, self.free.kernel[...])
        return FrozenResidual(plain, self.scale(), self.circular)

    def __call__(self, x: Array) -> Array:
        """x - W D relu(W^T x + b)."""
        return self.frozen()(x)


class SLLBlock(_Residual):
    """x - 2 W T^-1 relu(W^T x + b) with T_i = sum_j |W^T W|_ij q_j / q_i (Araujo et al., 2023).

    Args:
      features: of x.
      kernel_size: one entry per axis of a convolution; a dense block without it.
      hidden: columns of W, `features` by default.
      padding: "SAME" or "CIRCULAR".
      rngs, **options: as in `nnx.Linear` and `nnx.Conv`.
    """

    def __init__(self, features: int, kernel_size: Sequence[int] | None = None, **options: Any):
        super().__init__(features, kernel_size, **options)
        width = self.free.kernel[...].shape[-1]
        self.log_scale = nnx.Param(jnp.zeros(width, self.free.param_dtype))

    def scale(self) -> Array:
        """2 / T."""
        return parametrise.sll(self.free.kernel[...], self.log_scale[...])


class CPLBlock(_Residual):
    """x - 2 / b^2 W relu(W^T x + c) with b >= ||W|| (Meunier et al., ICML 2022).

    Arguments as `SLLBlock`.
    """

    def scale(self) -> Array:
        """2 / b^2 for each column."""
        return parametrise.cpl(self.free.kernel[...])


class FrozenSandwich(nnx.Module):
    """sqrt(2) A^T Psi relu(sqrt(2) Psi^-1 B x + c) with stored weights."""

    def __init__(self, a: Array, b: Array, psi: Array, bias: Array):
        self.a, self.b, self.psi, self.bias = map(nnx.Param, (a, b, psi, bias))

    def __call__(self, x: Array) -> Array:
        """x, (b, d_in)."""
        return blocks.sandwich(x, self.a[...], self.b[...], self.psi[...], self.bias[...])


class SandwichDense(nnx.Module):
    """A dense layer with its activation inside, 1-Lipschitz (Wang and Manchester, ICML 2023).

    Args:
      in_features, out_features: of the layer.
      hidden: rows of A and B, `out_features` by default.
      param_dtype: of the weights.
      rngs: as in Flax.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: int | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = out_features if hidden is None else hidden
        shape = (out_features + in_features, hidden)
        init = jax.nn.initializers.glorot_normal()
        self.free = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.log_psi = nnx.Param(jnp.zeros(hidden, param_dtype))
        self.bias = nnx.Param(jnp.zeros(hidden, param_dtype))
        self.out_features = out_features

    def frozen(self) -> FrozenSandwich:
        """The layer with its weights as they are."""
        a, b = parametrise.sandwich(self.free[...], d_out=self.out_features)
        return FrozenSandwich(a, b, parametrise.exponential(self.log_psi[...]), self.bias[...])

    def __call__(self, x: Array) -> Array:
        """x, (b, d_in), to (b, d_out)."""
        return self.frozen()(x)


class Residual(nnx.Module):
    """t x + (1 - t) f(x) with a learnt t in (0, 1): 1-Lipschitz where f is.

    Args:
      f: a module or function that keeps the shape of x.
      share: the t to begin with.
    """

    def __init__(self, f: Callable[[Array], Array], *, share: float = 0.5):
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, got {share}")
        self.f = f
        self.logit = nnx.Param(jnp.log(share) - jnp.log1p(-share))

    def __call__(self, x: Array) -> Array:
        """t x + (1 - t) f(x)."""
        share = jax.nn.sigmoid(self.logit[...])
        return share * x + (1 - share) * self.f(x)
