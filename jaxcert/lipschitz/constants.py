"""Proved upper bounds on the L2 Lipschitz constant of linear layers.

    dense   the spectral norm of a matrix
    conv    of a convolution with zero or circular padding, strides, groups and dilation

A power iteration converges from below and is never a bound; the norm of a reshaped kernel is not
the norm of the convolution. Here every spectral norm is proved from a float64 singular value
decomposition and its own residual, so nothing is taken on trust from LAPACK or cuSOLVER.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.rounding import UNIT
from jaxcert.errors import UnsupportedEquation
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.lipschitz.spectral import dot, proved_norm
from jaxcert.lipschitz.strides import by_phase, spread
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
    require_kernel(kernel, "(d_in, d_out)", range(2, 3))
    return _rounded_norm(kernel, _Layer())


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
    """An upper bound on the L2 Lipschitz constant of a convolution.

    The keywords are those of Flax's `Conv`. For zero padding the bound covers every amount of it at
    once and is within a few per cent of the exact norm for inputs a few times larger than the
    kernel; for circular padding it is the exact norm, rounded up. A transposed convolution of
    stride s is the one with `input_dilation=s`.

    Args:
      kernel: float (*window, c_in / groups, c_out) with 1, 2 or 3 window axes of any sizes.
      input_shape: (*spatial, c_in), without the batch axis.
      strides: an int or one per axis; with circular padding it must divide the size of the image.
      padding: "SAME", "VALID", "CAUSAL", an int, one int or (low, high) pair per axis, or
        "CIRCULAR".
      input_dilation: spacing of the input's points, where the strides are 1.
      kernel_dilation: spacing of the taps, an int or one per axis.
      feature_group_count: into how many groups, convolved apart, the channels are divided.

    Returns:
      As `dense`. Memory: about 128 c_in c_out bytes per frequency, in chunks of at most 128 MiB
      (one frequency where c_in c_out is above 2^20). Along an axis of stride s there are s times as
      many channels and an s-th of the frequencies.

    Raises:
      UnsupportedEquation: for strides together with input dilation, strides that do not divide a
        circular image, and paddings that are neither of zeros nor circular.
      TypeError, ValueError: for a kernel or an input shape that do not fit each other.
    """
    require_kernel(kernel, "(*window, c_in, c_out)", range(3, 6))
    rank, groups = kernel.ndim - 2, int(feature_group_count)
    _require_shapes(kernel, input_shape, groups)
    circular = _is_circular(padding, rank)
    spatial = tuple(int(n) for n in input_shape[:-1])
    shape = _Layer(
        spatial,
        _per_axis(strides, rank, "strides"),
        _per_axis(input_dilation, rank, "input_dilation"),
        _per_axis(kernel_dilation, rank, "kernel_dilation"),
        circular,
        groups,
    )
    shape.check()
    return _rounded_norm(kernel, shape)


class _Layer(NamedTuple):
    """What a convolution is apart from its kernel. A dense layer has no axes."""

    spatial: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    kernel_dilation: tuple[int, ...] = ()
    circular: bool = False
    groups: int = 1

    def check(self) -> None:
        """Raise for what the theory below does not cover."""
        both = any(s > 1 and i > 1 for s, i in zip(self.strides, self.input_dilation, strict=True))
        if both or (self.circular and max(self.input_dilation) > 1):
            raise UnsupportedEquation(
                f"no proved Lipschitz constant for a convolution with strides={self.strides}, "
                f"input_dilation={self.input_dilation}, circular padding: {self.circular}; use "
                "strides or input dilation, the latter with zero padding"
            )
        if self.circular and any(n % s for n, s in zip(self.spatial, self.strides, strict=True)):
            raise UnsupportedEquation(
                f"no proved Lipschitz constant for circular padding of an image {self.spatial} "
                f"with strides={self.strides}, which do not divide it; use zero padding"
            )

    @property
    def strided(self) -> bool:
        """Whether the phases of input or output are taken apart."""
        return max((*self.strides, *self.input_dilation, 1)) > 1

    def stride_one(self, kernel: Array) -> Array:
        """The kernels (g, *taps, in, out) of the groups with stride 1, see below."""
        if self.strided:
            kernel = spread(kernel, self.kernel_dilation)
        apart = kernel.reshape(*kernel.shape[:-1], self.groups, -1)
        kernels = [apart[..., group, :] for group in range(self.groups)]
        if self.strided:
            kernels = [by_phase(k, self.strides).swapaxes(-1, -2) for k in kernels]
            kernels = [by_phase(k, self.input_dilation).swapaxes(-1, -2) for k in kernels]
        return jnp.stack(kernels)

    def periods(self, taps: Sequence[int]) -> tuple[list[int], list[int]]:
        """The period of each axis for so many taps, and how far apart these are."""
        dilation = [1] * len(taps) if self.strided else list(self.kernel_dilation)
        # An interval of n points meets at most ceil((n - 1) / s) + 1 blocks of s points.
        sizes = [
            n if s == 1 else n // s if self.circular else -(-(n - 1) // s) + 1
            for n, s in zip(self.spatial, self.strides, strict=True)
        ]
        reach = [0 if self.circular else d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
        return [n + r for n, r in zip(sizes, reach, strict=True)], dilation


# --- one layer: a constant in the default float type, with its derivative -------------------------


def _rounded_norm(kernel: Any, layer: _Layer) -> Array:
    if is_traced(kernel):
        return _norm(kernel, layer)
    # A concrete kernel may hold float64 weights, which JAX would truncate outside of this block.
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        return rounded_up(_norm(ieee_float64(jnp.asarray(kernel)), layer), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _norm(kernel: Array, layer: _Layer) -> Array:
    return _norm_and_direction(kernel, layer)[0]


# The derivative stands here by hand: the float64 stretch ends inside of `_norm`, and JAX would
# transpose it outside, in float32. Rounding up has the derivative 1.
@_norm.defjvp
def _norm_jvp(layer, primals, tangents):
    value, direction = _norm_and_direction(primals[0], layer)
    # A product and a sum, not a dot, which names its float64 result and would lose it where JAX
    # transposes this outside of the block.
    with jax.enable_x64(True):
        return value, jnp.sum(direction * tangents[0]).astype(value.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _norm_and_direction(kernel, layer) -> tuple[Array, Array]:
    """The bound in the default float type, and its gradient in the kernel's shape and type."""
    dtype = jnp.result_type(float)
    with jax.enable_x64(True):
        wide = kernel.astype(jnp.float64)
        largest = jnp.max(jnp.abs(wide))
        finite = jnp.isfinite(largest)  # NaN and inf pass through a maximum
        # Entries of at most 1, so that no square below overflows or vanishes.
        scale = jnp.where(finite & (largest > 0), largest, 1.0)
        stacked, back = jax.vjp(layer.stride_one, wide / scale)
        bound, direction = _spectral_norm(stacked, *layer.periods(stacked.shape[1:-2]))
        bound = bound * scale * (1 + 8 * UNIT) + _flushed(kernel)
        bound = jnp.where(finite & jnp.isfinite(bound), bound, jnp.inf)
        return rounded_up(bound, dtype), back(direction)[0].astype(kernel.dtype)


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
# would wrap around and bound another operator.) With circular padding the layer is the circulant of
# period N = n itself. The discrete Fourier transform makes it block diagonal (Sedghi, Gupta and
# Long, ICLR 2019), hence
#
#   ||layer|| <= max over f of || F(f) ||,   F(f) = sum_t K_t prod_a exp(-2 pi i f_a t_a d_a / N_a).
#
# K is real, so F(-f) is the conjugate of F(f): half the frequencies of the last axis suffice.
# (Flax correlates instead of convolving, which flips the taps: F(f) becomes F(-f), up to a phase.)
# A dense layer is the case without axes: one frequency, F = K. Groups of channels are apart: the
# norm is the largest of theirs.
#
# A stride s makes it a stride-1 layer of the phases of its input (`strides.py`); along an axis a
# phase has points in at most as many blocks as the image meets, whatever the padding, so the
# argument above holds with that number for n. With input dilation s the layer is the adjoint of a
# strided one: its output has phases, and each is a stride-1 convolution of the n points.


def _spectral_norm(kernel, periods, dilation) -> tuple[Array, Array]:
    taps = kernel.shape[1:-2]
    phases = [_phases(*axis) for axis in zip(periods, dilation, taps, strict=True)]
    half = [*periods[:-1], *(period // 2 + 1 for period in periods[-1:])]
    places = [kernel.shape[0], *half]  # (group, frequency)
    places = np.indices(places, np.int32).reshape(len(places), math.prod(places)).T
    chunk = max(1, min(len(places), MEMORY // (128 * kernel.shape[-1] * kernel.shape[-2])))

    def norm_at(place):
        return proved_norm(_symbol(kernel[place[0]], phases, place[1:])[0])[0]

    norms = jax.lax.map(norm_at, jnp.asarray(places), batch_size=chunk)
    # The first largest; JAX 0.10 cannot lower a float64 argmax for a caller in float32.
    index = np.arange(len(places), dtype=np.int32)
    first = jnp.min(jnp.where(norms == jnp.max(norms), index, index[-1]))
    worst = jnp.asarray(places)[first]
    direction = _direction(kernel[worst[0]], phases, worst[1:])
    direction = jnp.zeros_like(kernel).at[worst[0]].set(direction)
    return jnp.max(norms) + _transform_error(kernel), direction


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
    real, imaginary = dot(pair, flat.reshape(flat.shape[0], -1)).reshape(2, *flat.shape[1:])
    return jax.lax.complex(real, imaginary), weights


# With u = UNIT: a phase is off by at most 16 u (angle 10 u, cosine and sine 4 u each), a product of
# D of them by at most 24 D u; a sum over T taps adds T u (gamma_T) in the real part and as much in
# the imaginary part, whatever the order of summation. In all, for the Frobenius norm and with the
# second-order terms covered by rounding the factors up,
#
#   || computed F(f) - F(f) || <= (2 T + 32 D) u sum_t || K_t ||_F.


def _transform_error(kernel) -> Array | float:
    axes = kernel.ndim - 3
    if axes == 0:
        return 0.0
    taps = math.prod(kernel.shape[1:-2])
    sizes = jnp.sqrt(jnp.sum(kernel**2, axis=(-2, -1)))
    size = jnp.max(jnp.sum(sizes, axis=tuple(range(1, axes + 1))))
    return (2 * taps + 32 * axes) * UNIT * 2 * size


def _direction(kernel, phases, frequency) -> Array:
    """The gradient of the largest singular value sigma of F(f) in the kernel.

    sigma = Re u* F v and F = sum_t w_t K_t with u, v unit, so d sigma / d K_t = Re w_t conj(u) v^T.
    """
    symbol, weights = _symbol(kernel, phases, frequency)
    _, u, v = proved_norm(symbol)
    return jnp.real(weights[..., None, None] * jnp.conj(u)[:, None] * v[None, :])


# --- checks ---------------------------------------------------------------------------------------


def require_kernel(kernel: Any, wanted: str, ranks: range) -> None:
    """Raise for anything but a floating point array of one of these ranks."""
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


def _require_shapes(kernel: Any, input_shape: Sequence[int], groups: int) -> None:
    rank, c_in, c_out = kernel.ndim - 2, kernel.shape[-2] * groups, kernel.shape[-1]
    if groups < 1 or c_out % groups:
        raise ValueError(
            f"feature_group_count must be at least 1 and divide the {c_out} output channels, got "
            f"{groups}"
        )
    if len(input_shape) != rank + 1 or input_shape[-1] != c_in:
        raise ValueError(
            f"input_shape must be (*spatial, c_in) with {rank} spatial axes and c_in={c_in} for a "
            f"kernel {kernel.shape}, got {tuple(input_shape)}; leave out the batch axis"
        )


def _is_circular(padding: Any, rank: int) -> bool:
    """Whether padding is circular; raise for what is neither that nor of zeros."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID", "CAUSAL", "CIRCULAR"):
            raise UnsupportedEquation(
                f"no proved Lipschitz constant for padding {padding!r}; covered are 'SAME', "
                "'VALID', 'CAUSAL', explicit pairs of zeros and 'CIRCULAR'"
            )
        return padding.upper() == "CIRCULAR"
    if not isinstance(padding, int) and len(padding) != rank:
        raise ValueError(f"padding must be a string, an int or one entry per axis, got {padding}")
    return False
