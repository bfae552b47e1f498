"""Strided convolutions as stride-1 convolutions of the phases of their input, and back.

Along an axis, tap t = s q + p of a convolution of stride s only ever meets the points of phase p,
so the layer is a stride-1 convolution (taps q) of the image whose channels are the phases: moving
pixels into channels is an isometry (space-to-depth).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxcert.sets import Array


def by_phase(kernel: Array, strides: Sequence[int]) -> Array:
    """The stride-1 kernel (*ceil(k / s), prod(s) c_in, c_out) of a kernel (*k, c_in, c_out)."""
    rank = len(strides)
    window = kernel.shape[:rank]
    short = [(0, -k % s) for k, s in zip(window, strides, strict=True)]
    split = [n for k, s in zip(window, strides, strict=True) for n in (-(-k // s), s)]
    c_in, c_out = kernel.shape[rank:]
    padded = jnp.pad(kernel, [*short, (0, 0), (0, 0)]).reshape(*split, c_in, c_out)
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank, 2 * rank + 1]
    return padded.transpose(order).reshape(*split[::2], math.prod(strides) * c_in, c_out)


def by_tap(kernel: Array, strides: Sequence[int], window: Sequence[int]) -> Array:
    """The inverse of `by_phase`, for a window (*k)."""
    rank = len(strides)
    taps, c_out = kernel.shape[:rank], kernel.shape[-1]
    apart = kernel.reshape(*taps, *strides, -1, c_out)
    order = [axis for a in range(rank) for axis in (a, rank + a)]
    whole = [q * s for q, s in zip(taps, strides, strict=True)]
    joined = apart.transpose(*order, 2 * rank, 2 * rank + 1).reshape(*whole, -1, c_out)
    return joined[tuple(slice(k) for k in window)]


def spread(kernel: Array, dilation: Sequence[int]) -> Array:
    """The kernel with its taps `dilation` apart and zeros between them."""
    for axis, d in enumerate(dilation):
        apart = [(0, 0)] * (kernel.ndim + 1)
        apart[axis + 1] = (0, d - 1)
        shape = list(kernel.shape)
        stretched = jnp.pad(jnp.expand_dims(kernel, axis + 1), apart)
        shape[axis] *= d
        kernel = stretched.reshape(shape)
        end = shape[axis] - d + 1
        kernel = kernel[(slice(None),) * axis + (slice(end),)]
    return kernel
