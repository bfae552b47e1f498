"""Proved upper bounds on the L2 Lipschitz constant of linear layers.

    dense   the spectral norm of a matrix
    conv    of a zero-padded convolution of stride 1, with any number of spatial axes

A power iteration converges from below and is never a bound; the norm of a reshaped kernel is not
the norm of the convolution. Here every spectral norm is proved from a float64 singular value
decomposition and its own residual, so nothing is taken on trust from LAPACK or cuSOLVER.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.rounding import UNIT
from jaxcert.errors import UnsupportedEquation
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.model import is_traced

Array: TypeAlias = jax.Array

MEMORY = 2**27  # bytes that one chunk of frequencies may take


def dense(kernel: Any) -> Array:
    """An upper bound on ||W||_2, the Lipschitz constant of x -> x W (and of x -> W x).

    Args:
      kernel: float (d_in, d_out), or its transpose; concrete or traced.

    Returns:
      A scalar in the default float type, rounded up; about 1e-13 above the true norm in relative
      terms in float64. It is inf where the kernel holds NaN or inf, so that certificates fail
      closed. Differentiable once, forwards and backwards: the derivative is that of the largest
      singular value, u v^T (a subgradient where that value is multiple).

    Raises:
      TypeError, ValueError: for anything but a floating point matrix.
    """
    _require_kernel(kernel, "(d_in, d_out)", range(2, 3))
    return _rounded_norm(kernel, (), ())


def conv(
    kernel: Any,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
) -> Array:
    """An upper bound on the L2 Lipschitz constant of a zero-padded convolution of stride 1.

    The keywords are those of Flax's `Conv`. The bound covers every zero padding at once, and is
    within a few per cent of the exact norm for inputs a few times larger than the kernel.

    Args:
      kernel: float (*window, c_in, c_out) with 1, 2 or 3 window axes of any sizes, even ones too.
      input_shape: (*spatial, c_in), without the batch axis.
      strides: 1.
      padding: "SAME", "VALID", "CAUSAL", an int, or one int or (low, high) pair per axis.
      input_dilation: 1.
      kernel_dilation: spacing of the taps, an int or one per axis.
      feature_group_count: 1.

    Returns:
      As `dense`. Memory: about 128 c_in c_out bytes per frequency, in chunks of at most 128 MiB
      (one frequency where c_in c_out is above 2^20).

    Raises:
      UnsupportedEquation: for strides, groups, input dilation and paddings that are not of zeros.
      TypeError, ValueError: for a kernel or an input shape that do not fit each other.
    """
    _require_kernel(kernel, "(*window, c_in, c_out)", range(3, 6))
    rank, c_in = kernel.ndim - 2, kernel.shape[-2]
    _refuse(strides, _per_axis(strides, rank, "strides") != (1,) * rank, "strides")
    dilated = _per_axis(input_dilation, rank, "input_dilation") != (1,) * rank
    _refuse(input_dilation, dilated, "input_dilation")
    _refuse(feature_group_count, feature_group_count != 1, "feature_group_count")
    _require_zero_padding(padding, rank)
    if len(input_shape) != rank + 1 or input_shape[-1] != c_in:
        raise ValueError(
            f"input_shape must be (*spatial, c_in) with {rank} spatial axes and c_in={c_in} for a "
            f"kernel {kernel.shape}, got {tuple(input_shape)}; leave out the batch axis"
        )
    spatial = tuple(int(n) for n in input_shape[:-1])
    return _rounded_norm(kernel, spatial, _per_axis(kernel_dilation, rank, "kernel_dilation"))


# --- one layer: a constant in the default float type, with its derivative -------------------------


def _rounded_norm(kernel: Any, spatial: tuple[int, ...], dilation: tuple[int, ...]) -> Array:
    if is_traced(kernel):
        return _norm(kernel, spatial, dilation)
    # A concrete kernel may hold float64 weights, which JAX would truncate outside of this block.
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        return rounded_up(_norm(ieee_float64(jnp.asarray(kernel)), spatial, dilation), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _norm(kernel: Array, spatial: tuple[int, ...], dilation: tuple[int, ...]) -> Array:
    return _norm_and_direction(kernel, spatial, dilation)[0]


# The derivative stands here by hand: the float64 stretch ends inside of `_norm`, and JAX would
# transpose it outside, in float32. Rounding up has the derivative 1.
@_norm.defjvp
def _norm_jvp(spatial, dilation, primals, tangents):
    value, direction = _norm_and_direction(primals[0], spatial, dilation)
    # A product and a sum, not a dot, which names its float64 result and would lose it where JAX
    # transposes this outside of the block.
    with jax.enable_x64(True):
        return value, jnp.sum(direction * tangents[0]).astype(value.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _norm_and_direction(kernel, spatial, dilation) -> tuple[Array, Array]:
    """The bound in the default float type, and its gradient in the kernel's shape and type."""
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        wide = kernel.astype(jnp.float64)
        largest = jnp.max(jnp.abs(wide))
        finite = jnp.isfinite(largest)  # NaN and inf pass through a maximum
        # Entries of at most 1, so that no square below overflows or vanishes.
        scale = jnp.where(finite & (largest > 0), largest, 1.0)
        bound, direction = _spectral_norm(wide / scale, spatial, dilation)
        bound = bound * scale * (1 + 8 * UNIT) + _flushed(kernel)
        bound = jnp.where(finite & jnp.isfinite(bound), bound, jnp.inf)
        return rounded_up(bound, dtype), direction.astype(kernel.dtype)


def _flushed(kernel: Array) -> float:
    """What the entries that XLA:CPU reads as 0 (denormals) add to the norm, at the most.

    Each is below the least normal number of the type it is stored in, bfloat16 and float16 being
    read by way of float32. A tap of a convolution acts as its matrix times a partial isometry, so
    the sum of all entries covers both kinds of layer.
    """
    wide = kernel.dtype == jnp.float64
    return 2 * kernel.size * float(np.finfo(np.float64 if wide else np.float32).tiny)


# --- the norm of a convolution, by frequency ------------------------------------------------------
# Along an axis of n points, let K have k taps with spacing d. The full output of the convolution,
# n + d (k - 1) points, equals the circular convolution of period N = n + d (k - 1) applied to the
# input followed by zeros: an output index i and a tap t read the point i - d t, which lies in
# (-N, N), and modulo N it meets the input only where it is in [0, n) itself, since a negative one
# comes back as N + i - d t >= n. Every zero padding selects some of these outputs (others are 0),
# so the layer is a submatrix of the circulant, on each axis in turn: its norm is at most that of
# the circulant, for 'SAME', 'VALID', 'CAUSAL' and explicit padding alike. (A period of n or of k
# would wrap around and bound another operator.) The discrete Fourier transform makes the circulant
# block diagonal (Sedghi, Gupta and Long, ICLR 2019), hence
#
#   ||layer|| <= max over f of || F(f) ||,   F(f) = sum_t K_t prod_a exp(-2 pi i f_a t_a d_a / N_a).
#
# K is real, so F(-f) is the conjugate of F(f): half the frequencies of the last axis suffice.
# (Flax correlates instead of convolving, which flips the taps: F(f) becomes F(-f), up to a phase.)
# A dense layer is the case without axes: one frequency, F = K.


def _spectral_norm(kernel, spatial, dilation) -> tuple[Array, Array]:
    taps = kernel.shape[: len(spatial)]
    periods = [n + d * (k - 1) for n, d, k in zip(spatial, dilation, taps, strict=True)]
    phases = [_phases(*axis) for axis in zip(periods, dilation, taps, strict=True)]
    half = [*periods[:-1], *(period // 2 + 1 for period in periods[-1:])]
    frequencies = (
        np.indices(half, np.int32).reshape(len(half), math.prod(half)).T
    )  # (frequencies, axes)
    chunk = max(1, min(len(frequencies), MEMORY // (128 * kernel.shape[-1] * kernel.shape[-2])))

    def norm_at(frequency):
        return _proved_norm(_symbol(kernel, phases, frequency)[0])[0]

    norms = jax.lax.map(norm_at, jnp.asarray(frequencies), batch_size=chunk)
    # The first largest; JAX 0.10 cannot lower a float64 argmax for a caller in float32.
    index = np.arange(len(frequencies), dtype=np.int32)
    first = jnp.min(jnp.where(norms == jnp.max(norms), index, index[-1]))
    worst = jnp.asarray(frequencies)[first]
    return jnp.max(norms) + _transform_error(kernel), _direction(kernel, phases, worst)


def _phases(period: int, dilation: int, taps: int) -> Array:
    """exp(-2 pi i f t d / N), (N, taps). The integer f t d mod N keeps angles within (-pi, pi]."""
    turns = np.outer(np.arange(period), np.arange(taps) * dilation) % period
    turns = np.where(2 * turns > period, turns - period, turns) / period
    return jnp.asarray(np.exp(-2j * np.pi * turns))


def _symbol(kernel, phases, frequency) -> tuple[Array, Array]:
    """F(f), (c_in, c_out), and the weights of the taps in it, (*window)."""
    weights = jnp.ones(())
    for axis, phase in enumerate(phases):
        weights = weights[..., None] * phase[frequency[axis]]
    if not phases:
        return kernel, weights
    axes = len(phases)
    flat = kernel.reshape(-1, *kernel.shape[axes:])
    pair = jnp.stack([weights.real.ravel(), weights.imag.ravel()])
    real, imaginary = _dot(pair, flat.reshape(flat.shape[0], -1)).reshape(2, *flat.shape[1:])
    return jax.lax.complex(real, imaginary), weights


# With u = UNIT: a phase is off by at most 16 u (angle 10 u, cosine and sine 4 u each), a product of
# D of them by at most 24 D u; a sum over T taps adds T u (gamma_T) in the real part and as much in
# the imaginary part, whatever the order of summation. In all, for the Frobenius norm and with the
# second-order terms covered by rounding the factors up,
#
#   || computed F(f) - F(f) || <= (2 T + 32 D) u sum_t || K_t ||_F.


def _transform_error(kernel) -> Array | float:
    axes = kernel.ndim - 2
    if axes == 0:
        return 0.0
    taps = math.prod(kernel.shape[:axes])
    size = jnp.sum(jnp.sqrt(jnp.sum(kernel**2, axis=(-2, -1))))
    return (2 * taps + 32 * axes) * UNIT * 2 * size


def _direction(kernel, phases, frequency) -> Array:
    """The gradient of the largest singular value sigma of F(f) in the kernel.

    sigma = Re u* F v and F = sum_t w_t K_t with u, v unit, so d sigma / d K_t = Re w_t conj(u) v^T.
    """
    symbol, weights = _symbol(kernel, phases, frequency)
    _, u, v = _proved_norm(symbol)
    return jnp.real(weights[..., None, None] * jnp.conj(u)[:, None] * v[None, :])


# --- the norm of a matrix, proved from its computed decomposition ---------------------------------
# LAPACK's error bound p(m, n) u ||A|| comes with an unspecified p, so it is not used. For ANY
# matrices U, S, V (Rump, BIT 51, 2011, section 3, has the same idea):
#
#   ||A|| <= ||U S V|| + ||A - U S V|| <= ||U|| max|S| ||V|| + ||A - U S V||_F,
#   ||U||^2 = ||U*U|| <= 1 + ||U*U - I||_F,   ||V||^2 = ||V V*|| <= 1 + ||V V* - I||_F.
#
# A good decomposition makes this tight, a bad one makes it large, never wrong. A computed product
# X Y with inner dimension n errs by at most gamma ||X||_F ||Y||_F, gamma = 4 (n + 4) u, real or
# complex, in any order of summation, with or without fused operations. Each slack term is doubled,
# which pays for the rounding in its own evaluation.


def _proved_norm(matrix: Array) -> tuple[Array, Array, Array]:
    """An upper bound on ||A||_2 for entries of moderate size, with the first singular vectors."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    scaled = left * values
    gamma = 4 * (sum(matrix.shape) + 4) * UNIT
    remainder = _frobenius(matrix - _dot(scaled, right))
    remainder += gamma * (_frobenius(scaled) * _frobenius(right) + _frobenius(matrix))
    stretch = _orthogonality(left, gamma) + _orthogonality(jnp.conj(right.T), gamma)
    # sqrt((1 + a) (1 + b)) <= 1 + (a + b) / 2.
    bound = jnp.max(jnp.abs(values)) * (1 + stretch) + 2 * remainder
    return bound * (1 + 8 * UNIT), left[:, 0], jnp.conj(right[0])


def _orthogonality(columns: Array, gamma: float) -> Array:
    """An upper bound on ||Q*Q - I||_F."""
    gram = _dot(jnp.conj(columns.T), columns)
    error = gamma * (_frobenius(columns) ** 2 + gram.shape[0])
    return 2 * (_frobenius(gram - jnp.eye(gram.shape[0])) + error)


def _dot(left: Array, right: Array) -> Array:
    """A product. `jnp.matmul` would name the result type, which vmap reads outside of the block."""
    return jax.lax.dot(left, right, precision=jax.lax.Precision.HIGHEST)


def _frobenius(matrix: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.abs(matrix) ** 2))


# --- checks ---------------------------------------------------------------------------------------


def _require_kernel(kernel: Any, wanted: str, ranks: range) -> None:
    if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
        got = getattr(kernel, "dtype", type(kernel).__name__)
        raise TypeError(f"the kernel must be a floating point array {wanted}, got {got}")
    if kernel.ndim not in ranks or 0 in kernel.shape:
        raise ValueError(f"the kernel must have shape {wanted}, got {kernel.shape}")


def _per_axis(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    values = (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != rank or min(values) < 1:
        raise ValueError(f"{name} must be an int >= 1 or {rank} of them, got {value}")
    return values


def _refuse(value: Any, unsupported: bool, name: str) -> None:
    if unsupported:
        raise UnsupportedEquation(
            f"no proved Lipschitz constant for a convolution with {name}={value}; only 1 is "
            "covered: use a stride-1 convolution without groups"
        )


def _require_zero_padding(padding: Any, rank: int) -> None:
    """Raise for anything but a padding by zeros; the bound holds for every one of them."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID", "CAUSAL"):
            raise UnsupportedEquation(
                f"no proved Lipschitz constant for padding {padding!r}; zero padding is covered: "
                "'SAME', 'VALID', 'CAUSAL' or explicit pairs"
            )
    elif not isinstance(padding, int) and len(padding) != rank:
        raise ValueError(f"padding must be a string, an int or one entry per axis, got {padding}")
