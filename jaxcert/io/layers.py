"""ONNX operators with weights or windows: products, convolutions, pools, normalisation.

See `operators.py`. Maps have channels first: (b, c, *spatial).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcert.io.operators import Array, along, implements, one_type

# --- Products -------------------------------------------------------------------------------------


@implements("MatMul")
def _matmul(x, y, /):
    return jnp.matmul(x, y)


@implements("Gemm", ignored="broadcast")
def _gemm(x, y, bias=None, /, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    x, y, bias = one_type(x, y, bias)
    contract = (0,) if transA else (1,), (1,) if transB else (0,)
    result = _scaled(lax.dot_general(x, y, (contract, ((), ()))), alpha)
    return result if bias is None else result + _scaled(bias, beta)


def _scaled(x: Array, factor: float) -> Array:
    return x if factor == 1 else x * factor


# --- Windows --------------------------------------------------------------------------------------


def _spread(kernel: int, dilation: int) -> int:
    """How many entries a kernel reaches over."""
    return (kernel - 1) * dilation + 1


def _padding(
    sizes: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """The padding before and behind each spatial axis, from ONNX's two ways of saying it."""
    d = len(sizes)
    if auto_pad == "NOTSET":
        pads = [0] * (2 * d) if pads is None else pads
        return list(zip(pads[:d], pads[d:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * d
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad={auto_pad} is not known")
    pairs = []
    for n, k, s in zip(sizes, reach, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pairs.append(_halves(total, auto_pad == "SAME_UPPER"))
    return pairs


def _halves(total: int, larger_behind: bool) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if larger_behind else (large, small)


@implements("Conv")
def _conv(
    x,
    kernel,
    bias=None,
    /,
    *,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    pads=None,
    strides=None,
):
    x, kernel, bias = one_type(x, kernel, bias)
    taps = _taps(kernel, kernel_shape)
    strides, dilations = (each or (1,) * len(taps) for each in (strides, dilations))
    reach = [_spread(k, d) for k, d in zip(taps, dilations, strict=True)]
    padding = _padding(x.shape[2:], reach, strides, pads, auto_pad)
    result = lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilations, feature_group_count=group
    )
    return result if bias is None else result + _per_channel(bias, result)


def _taps(kernel: Array, kernel_shape: Sequence[int] | None) -> tuple[int, ...]:
    taps = tuple(kernel.shape[2:])
    if kernel_shape is not None and tuple(kernel_shape) != taps:
        raise ValueError(f"kernel_shape {kernel_shape} and a kernel of shape {kernel.shape}")
    return taps


def _per_channel(v: Array, x: Array) -> Array:
    """A vector over the channels of x, in a shape that broadcasts with x."""
    return v.reshape(-1, *(1,) * (x.ndim - 2))


# The transpose of a convolution with strides s is a convolution of stride 1 of the operand spread
# out by s, with the kernel's taps in reverse order and its channels exchanged.
@implements("ConvTranspose")
def _conv_transpose(
    x,
    kernel,
    bias=None,
    /,
    *,
    auto_pad="NOTSET",
    dilations=None,
    group=1,
    kernel_shape=None,
    output_padding=None,
    output_shape=None,
    pads=None,
    strides=None,
):
    x, kernel, bias = one_type(x, kernel, bias)
    taps, d = _taps(kernel, kernel_shape), x.ndim - 2
    strides, dilations = (each or (1,) * d for each in (strides, dilations))
    extra = output_padding or (0,) * d
    reach = [_spread(k, dilation) for k, dilation in zip(taps, dilations, strict=True)]
    full = [(n - 1) * s + k + e
            for n, s, k, e in zip(x.shape[2:], strides, reach, extra, strict=True)]  # fmt: skip
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if output_shape is None:
        cut = _padding(x.shape[2:], reach, strides, pads, auto_pad)
    else:
        totals = [max(m - size, 0) for m, size in zip(full, output_shape, strict=True)]
        cut = [_halves(total, auto_pad == "SAME_UPPER") for total in totals]
    padding = [(k - 1 - low, k - 1 - high + e)
               for k, (low, high), e in zip(reach, cut, extra, strict=True)]  # fmt: skip
    grouped = kernel.reshape(group, -1, *kernel.shape[1:])
    exchanged = jnp.swapaxes(grouped, 1, 2).reshape(-1, kernel.shape[0] // group, *taps)
    result = lax.conv_general_dilated(
        x,
        jnp.flip(exchanged, range(2, 2 + d)),
        (1,) * d,
        padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=group,
    )
    return result if bias is None else result + _per_channel(bias, result)


# --- Pools ----------------------------------------------------------------------------------------


class _Windows(NamedTuple):
    """The windows of a pool, along each spatial axis.

    Attributes:
      taps: entries of a window.
      strides: from window to window.
      dilations: from entry to entry of a window.
      given: the padding that was asked for.
      padding: the padding, with what incomplete last windows need.
    """

    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    given: list[tuple[int, int]]
    padding: list[tuple[int, int]]

    def reduce(self, x: Array, start: float, function: Callable[[Array, Array], Array]) -> Array:
        """Each window's entries as one number."""
        result = lax.reduce_window(
            x,
            np.asarray(start, x.dtype),
            function,
            (1, 1, *self.taps),
            (1, 1, *self.strides),
            [(0, 0), (0, 0), *self.padding],
            window_dilation=(1, 1, *self.dilations),
        )
        if result.size == 0:
            raise ValueError(f"windows of {self.taps} entries do not fit into {x.shape}")
        return result

    def counts(self, sizes: Sequence[int], numbers: Sequence[int], pads: bool) -> list[Any]:
        """How many entries each window has along each axis, padding that was asked for included or
        not."""
        counts = []
        for i, (n, m) in enumerate(zip(sizes, numbers, strict=True)):
            first = np.arange(m) * self.strides[i] - self.padding[i][0]
            entries = first[:, None] + np.arange(self.taps[i]) * self.dilations[i]
            before, behind = self.given[i] if pads else (0, 0)
            counts.append(np.sum((-before <= entries) & (entries < n + behind), 1))
        return counts


def _windows(
    sizes: Sequence[int],
    taps: tuple[int, ...],
    auto_pad: str,
    ceil_mode: int,
    dilations: tuple[int, ...] | None,
    pads: Sequence[int] | None,
    strides: tuple[int, ...] | None,
) -> _Windows:
    strides, dilations = strides or (1,) * len(taps), dilations or (1,) * len(taps)
    reach = [_spread(k, d) for k, d in zip(taps, dilations, strict=True)]
    given = _padding(sizes, reach, strides, pads, auto_pad)
    padding = _ceiled(sizes, reach, strides, given) if ceil_mode else given
    if auto_pad.startswith("SAME") and set(dilations) != {1}:
        raise ValueError(f"auto_pad={auto_pad} with dilations is ambiguous; export it with pads")
    return _Windows(taps, strides, dilations, given, padding)


def _ceiled(
    sizes: Sequence[int],
    reach: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """The padding with as much more behind as the last, incomplete window needs; windows that start
    behind the operand and its padding in front do not count."""
    pairs = []
    for n, k, s, (low, high) in zip(sizes, reach, strides, padding, strict=True):
        count = -(-(n + low + high - k) // s) + 1
        if (count - 1) * s >= n + low:
            count -= 1
        pairs.append((low, max((count - 1) * s + k - n - low, 0)))
    return pairs


@implements("MaxPool", ignored="storage_order")
def _max_pool(
    x,
    /,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    dilations=None,
    pads=None,
    strides=None,
):
    how = auto_pad, ceil_mode, dilations, pads, strides
    return _windows(x.shape[2:], kernel_shape, *how).reduce(x, -math.inf, lax.max)


@implements("AveragePool")
def _average_pool(
    x,
    /,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    count_include_pad=0,
    dilations=None,
    pads=None,
    strides=None,
):
    how = auto_pad, ceil_mode, dilations, pads, strides
    windows = _windows(x.shape[2:], kernel_shape, *how)
    sums = windows.reduce(x, 0.0, lax.add)
    counts = windows.counts(x.shape[2:], sums.shape[2:], bool(count_include_pad))
    if all(np.all(each == each[0]) for each in counts):
        return sums / math.prod(float(each[0]) for each in counts)
    return sums / functools.reduce(np.multiply.outer, counts).astype(x.dtype)


@implements("GlobalAveragePool")
def _global_average_pool(x, /):
    return jnp.mean(x, range(2, x.ndim), keepdims=True)


@implements("GlobalMaxPool")
def _global_max_pool(x, /):
    return jnp.max(x, range(2, x.ndim), keepdims=True)


# --- Normalisation --------------------------------------------------------------------------------


@implements("BatchNormalization", since=7, ignored="momentum")
def _batch_norm(x, scale, bias, mean, variance, /, *, epsilon=1e-5):
    scale = scale / jnp.sqrt(variance + epsilon)
    return x * _per_channel(scale, x) + _per_channel(bias - mean * scale, x)


# The variance as E[x^2] - E[x]^2, cut off at 0, is a function whose exact range the bounds know.
def _normalised(x: Array, axes: Sequence[int], epsilon: float) -> Array:
    axes = tuple(axes)
    square_mean = jnp.mean(jnp.square(x), axes)
    variance = jnp.maximum(0.0, square_mean - jnp.square(jnp.mean(x, axes)))
    scale = jnp.expand_dims(lax.rsqrt(variance + epsilon), axes)
    return (x - jnp.mean(x, axes, keepdims=True)) * scale


@implements("LayerNormalization", ignored="stash_type")
def _layer_norm(x, scale, bias=None, /, *, axis=-1, epsilon=1e-5):
    (axis,) = along(x, [axis])
    result = _normalised(x, range(axis, x.ndim), epsilon) * scale
    return result if bias is None else result + bias


@implements("InstanceNormalization", since=6)
def _instance_norm(x, scale, bias, /, *, epsilon=1e-5):
    result = _normalised(x, range(2, x.ndim), epsilon)
    return result * _per_channel(scale, x) + _per_channel(bias, x)


@implements("GroupNormalization", since=21, ignored="stash_type")
def _group_norm(x, scale, bias, /, *, num_groups, epsilon=1e-5):
    groups = x.reshape(x.shape[0], num_groups, -1)
    result = _normalised(groups, [2], epsilon).reshape(x.shape)
    return result * _per_channel(scale, x) + _per_channel(bias, x)
