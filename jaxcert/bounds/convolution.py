"""The transpose of a convolution on many rows, written out for speed.

JAX's own transpose convolves the strided (dilated) rows with the reversed kernel. On CPU that
leaves the fast path, and inside of a loop, where hidden bounds are computed, it is 6 to 18 times
slower than outside. With stride s, write each kernel tap as s q + r: the taps with one q act on the
rows like a convolution of stride 1, and r only says which of the s^d neighbouring entries of the
result they are for. So the transpose is one convolution of stride 1 with s^d times the channels,
or for small maps one matrix product and an overlapping sum, and then a shuffle of axes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxcert.graph import Equation
from jaxcert.sets import Array

_EXACT = lax.Precision.HIGHEST
_SMALL = 2**19  # products up to which, in the cache, a matrix product is faster


def has_fast_transpose(eqn: Equation) -> bool:
    """Whether the rule below applies: no groups, no dilation."""
    if eqn.name != "conv_general_dilated":
        return False
    p = eqn.params
    ones = {1}
    return (
        p["feature_group_count"] == 1
        and p["batch_group_count"] == 1
        and {*p["rhs_dilation"], *p["lhs_dilation"], 1} == ones
    )


def transposed(
    eqn: Equation,
    kernel: Array,
    rows: Array,
    shape: Sequence[int],
    before: Sequence[int],
    reverse_only: bool = False,
) -> Array:
    """Rows on a convolution's result as rows on its operand.

    Args:
      eqn: the convolution.
      kernel: its kernel.
      rows: (r, *out), any batch and spatial sizes.
      shape: of one row on the operand.
      before: how much padding precedes the operand along each spatial axis.
      reverse_only: be fast in reverse-mode differentiation, and fail in forward mode.
    """
    spec, strides = eqn.params["dimension_numbers"], eqn.params["window_strides"]
    r, (batch, features, *spatial) = len(rows), spec.out_spec
    batches = rows.shape[1 + batch]
    rows = jnp.moveaxis(rows, [1 + batch, *(1 + i for i in spatial), 1 + features],
                        range(1, rows.ndim))  # fmt: skip
    rows = rows.reshape(r * batches, *rows.shape[2:])
    out_features, in_features, *taps = spec.rhs_spec
    kernel = kernel.transpose(*taps, in_features, out_features)
    sizes = [shape[i] for i in spec.lhs_spec[2:]]
    full = _reverse_only_full if reverse_only else _full
    result = _on_channels_last(full, rows, kernel, strides, sizes, before)
    result = result.reshape(r, batches, *result.shape[1:])
    batch, features, *spatial = spec.lhs_spec
    return jnp.moveaxis(result, range(1, result.ndim),
                        [1 + batch, *(1 + i for i in spatial), 1 + features])  # fmt: skip


def _on_channels_last(
    full: Callable[[Array, Array], Array],
    rows: Array,
    kernel: Array,
    strides: Sequence[int],
    sizes: Sequence[int],
    before: Sequence[int],
) -> Array:
    """(n, *out, co) and a kernel (*taps, ci, co) to (n, *sizes, ci)."""
    d = len(strides)
    ci, co = kernel.shape[-2:]
    q = [-(-k // s) for k, s in zip(kernel.shape, strides, strict=False)]
    extra = [n * s - k for n, s, k in zip(q, strides, kernel.shape, strict=False)]
    kernel = jnp.pad(kernel, [(0, e) for e in extra] + [(0, 0), (0, 0)])
    split = [n for pair in zip(q, strides, strict=True) for n in pair]
    kernel = kernel.reshape(*split, ci, co)  # (q1, s1, q2, s2, ..., ci, co)
    qs, ss = range(0, 2 * d, 2), range(1, 2 * d, 2)
    if math.prod(rows.shape[:-1]) * math.prod(split) * ci <= _SMALL:
        weight = kernel.transpose(2 * d + 1, *qs, *ss, 2 * d).reshape(co, -1)
        flat = lax.dot_general(rows.reshape(-1, co), weight, (((1,), (0,)), ((), ())), _EXACT)
        flat = flat.reshape(*rows.shape[:-1], *q, -1)
        result = _overlapping_sum(flat, q)
    else:
        weight = kernel.transpose(*qs, 2 * d + 1, *ss, 2 * d).reshape(*q, co, -1)
        result = full(rows, weight)
    covered = result.shape[1:-1]
    result = result.reshape(-1, *covered, *strides, ci)
    shuffled = [0, *(1 + i + j for i in range(d) for j in (0, d)), 2 * d + 1]
    result = result.transpose(shuffled).reshape(
        -1, *(m * s for m, s in zip(covered, strides, strict=True)), ci
    )
    cut = [
        (-low, size + low - m, 0)
        for low, size, m in zip(before, sizes, result.shape[1:-1], strict=True)
    ]
    zero = jnp.zeros((), result.dtype)
    return lax.pad(result, zero, [(0, 0, 0), *cut, (0, 0, 0)])


def _overlapping_sum(parts: Array, q: Sequence[int]) -> Array:
    """(n, *out, *q, c) to (n, *(out + q - 1), c): tap j of entry i belongs to entry i + j."""
    d = len(q)
    total = 0.0
    for tap in itertools.product(*(range(n) for n in q)):
        part = parts[(slice(None),) * (1 + d) + tap]
        pads = [(t, n - 1 - t) for t, n in zip(tap, q, strict=True)]
        total = total + jnp.pad(part, [(0, 0), *pads, (0, 0)])
    return total  # type: ignore[return-value]


def _full(rows: Array, weight: Array) -> Array:
    """The full convolution of rows (n, *out, co) with taps (*q, co, c): (n, *(out + q - 1), c)."""
    pads = [(n - 1, n - 1) for n in weight.shape[:-2]]
    return _correlated(rows, jnp.flip(weight, range(len(pads))), pads)


# JAX's own derivative by the rows would exchange the kernel's last axes in the convolution's
# parameters, which is slow inside of a loop as well: here they are exchanged in the kernel.


def _full_forward(rows: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _full(rows, weight), (rows, weight)


def _full_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    rows, weight = saved
    pads = [(0, 0)] * (weight.ndim - 2)
    by_rows = _correlated(cotangent, jnp.swapaxes(weight, -1, -2), pads)
    (by_weight,) = jax.vjp(functools.partial(_full, rows), weight)[1](cotangent)
    return by_rows, by_weight


_reverse_only_full = jax.custom_vjp(_full)
_reverse_only_full.defvjp(_full_forward, _full_backward)


def _correlated(x: Array, kernel: Array, pads: Sequence[tuple[int, int]]) -> Array:
    """A convolution of stride 1 as networks use it, channels last."""
    axes = "".join(chr(ord("a") + i) for i in range(len(pads)))
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        x, kernel, (1,) * len(pads), pads, dimension_numbers=numbers,
        precision=_EXACT,
    )  # fmt: skip
