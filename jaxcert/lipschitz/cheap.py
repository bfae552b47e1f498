"""Proved bounds on spectral norms that cost a few matrix products instead of a decomposition.

For training loops and large layers; under jit and with gradients. `constants.py` is tighter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds.rounding import UNIT
from jaxcert.floats import rounded_up
from jaxcert.lipschitz import parametrise
from jaxcert.lipschitz.constants import require_kernel
from jaxcert.lipschitz.spectral import dot, frobenius
from jaxcert.sets import Array


def gram_bound(kernel: Any, *, steps: int = 6) -> Array:
    """An upper bound on ||W||_2 by Gram iteration, with its rounding counted.

    ||W||^2 = ||G|| for G = W^T W and ||G||^2 = ||G^2||, until the Frobenius norm of a power bounds
    its spectral norm well (Delattre et al., ICML 2023): at most n^(1 / 2^(steps + 1))
    above the norm, n the smaller side.

    Args:
      kernel: float (d_in, d_out).
      steps: products of matrices, at least 1.

    Returns:
      A scalar in the default float type, rounded up; inf where the kernel is not finite.
      Differentiable: the derivative is that of `parametrise.gram_bound`.
    """
    require_kernel(kernel, "(d_in, d_out)", range(2, 3))
    if steps < 1:
        raise ValueError(f"gram_bound takes at least 1 step, got {steps}")
    return _gram(jnp.asarray(kernel), steps)


def gershgorin_bound(kernel: Any) -> Array:
    """An upper bound on the norm of a dense or convolution layer by Gershgorin's circles.

    The square root of max_i sum_j |W^T W|_ij, for a convolution with the correlations of its output
    channels at all offsets (the bound behind AOL, Prach and Lampert, ECCV 2022). It holds for every
    image, every zero or circular padding, stride and dilation.

    Args:
      kernel: float (d_in, d_out), or (*window, c_in, c_out) without groups.

    Returns:
      As `gram_bound`.
    """
    require_kernel(kernel, "(d_in, d_out) or (*window, c_in, c_out)", range(2, 6))
    return _gershgorin(jnp.asarray(kernel))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
@functools.partial(jax.jit, static_argnums=1)
def _gram(kernel: Array, steps: int) -> Array:
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        wide, scale = _scaled(kernel)
        gram = dot(wide.T, wide) if wide.shape[0] >= wide.shape[1] else dot(wide, wide.T)
        gram = (gram + gram.T) / 2  # symmetric to the last bit, as ||X||^2 = ||X^2|| needs
        # A computed product X Y errs by at most gamma ||X||_F ||Y||_F in norm: see `spectral.py`.
        gamma = 8 * (sum(wide.shape) + 4) * UNIT
        errors: list[Any] = [gamma * frobenius(wide) ** 2]
        sizes: list[Array] = []
        for _ in range(steps - 1):
            sizes.append(frobenius(gram) * (1 + wide.size * UNIT) + 1e-300)
            gram = gram / sizes[-1]
            errors.append(gamma + 8 * UNIT)  # of its square, ||gram||_F being at most 1
            gram = dot(gram, gram)
            gram = (gram + gram.T) / 2
        bound = frobenius(gram) * (1 + (gram.size + 8) * UNIT)
        # Backwards: ||X||^2 = ||X^2|| <= ||computed square|| + error.
        for size, error in zip(sizes[::-1], errors[:0:-1], strict=True):
            bound = size * jnp.sqrt(bound + error) * (1 + 8 * UNIT)
        return _result(jnp.sqrt(bound + errors[0]), scale, kernel, dtype)


@_gram.defjvp
def _gram_jvp(steps, primals, tangents):
    smooth = functools.partial(parametrise.gram_bound, steps=steps)
    tangent = jax.jvp(smooth, primals, tangents)[1]
    value = _gram(*primals, steps)
    return value, tangent.astype(value.dtype)


@jax.custom_jvp
@jax.jit
def _gershgorin(kernel: Array) -> Array:
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        wide, scale = _scaled(kernel)
        # Sums of n products of entries err by at most gamma_n times the sum of absolute products.
        gamma = 4 * (wide.size + 8) * UNIT
        total = jnp.max(jnp.sum(parametrise.absolute_gram(wide), axis=0))
        total += gamma * jnp.max(jnp.sum(parametrise.absolute_gram(jnp.abs(wide)), axis=0))
        return _result(jnp.sqrt(total), scale, kernel, dtype)


@_gershgorin.defjvp
def _gershgorin_jvp(primals, tangents):
    def smooth(kernel):
        return jnp.sqrt(jnp.max(jnp.sum(parametrise.absolute_gram(kernel), axis=0)) + 1e-30)

    tangent = jax.jvp(smooth, primals, tangents)[1]
    value = _gershgorin(*primals)
    return value, tangent.astype(value.dtype)


def _scaled(kernel: Array) -> tuple[Array, Array]:
    """The kernel in float64 with entries of at most 1, and the factor taken out."""
    wide = kernel.astype(jnp.float64)
    largest = jnp.max(jnp.abs(wide))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return wide / scale, scale


def _result(bound: Array, scale: Array, kernel: Array, dtype: Any) -> Array:
    # Entries that XLA:CPU reads as 0 are below the least normal number of their type.
    flushed = 2 * kernel.size * (2.0**-1022 if kernel.dtype == jnp.float64 else 2.0**-126)
    bound = bound * scale * (1 + 16 * UNIT) + flushed
    return rounded_up(jnp.where(jnp.isfinite(bound), bound, jnp.inf), dtype)
