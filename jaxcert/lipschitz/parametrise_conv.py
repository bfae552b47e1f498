"""Parametrisations of convolutions: free weights to layers whose spectral norm is at most 1.

As in `parametrise.py`, the norm is at most 1 for all free weights and after any number of steps.

    aol_conv     rescaled channels; any zero or circular padding, stride and dilation
    spectral_conv  divided by a bound on its norm
    rko          an orthogonal matrix of all taps, over the square root of how often they overlap
    bcop         orthogonal up to the border, from projectors (Li et al., NeurIPS 2019)
    aoc          bcop followed by rko, orthogonal with strides as well (Boissin et al., 2025)
    cayley_conv  orthogonal, by frequency, circular (Trockman and Kolter, ICLR 2021)
    bro_conv     a reflection of low rank, by frequency (Lai et al., ICML 2025)

The last two have kernels as large as the image and return what `blocks.frequency_multiplier` and
`blocks.frequency_reflection` take; the others return kernels, (*window, c_in, c_out). For padding
by zeros a layer is a submatrix of the one on an endless image, so its norm is at most that.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.blocks import parametrised
from jaxcert.lipschitz import parametrise
from jaxcert.lipschitz.parametrise import adjoint, normaliser, product
from jaxcert.lipschitz.strides import by_phase, by_tap
from jaxcert.sets import Array


@parametrised
def aol_conv(kernel: Array, *, strides: Sequence[int], groups: int = 1) -> Array:
    """Channels of the kernel times (sum over channels and offsets of |correlations|)^(-1/2).

    AOL (Prach and Lampert, ECCV 2022, Theorem 2) of the stride-1 convolution of phases. Output
    channels are rescaled, or inputs (with their phase) where there are fewer of them.
    """
    window = kernel.shape[:-2]

    def rescaled(part):
        phases = by_phase(part, strides)
        if phases.shape[-1] <= phases.shape[-2]:
            return part * normaliser(parametrise.absolute_gram(phases))
        scale = normaliser(parametrise.absolute_gram(phases.swapaxes(-1, -2)))
        return by_tap(phases * scale[:, None], strides, window)

    return _by_group(rescaled, kernel, groups)


@parametrised
def spectral_conv(kernel: Array, *, strides: Sequence[int], groups: int = 1) -> Array:
    """The kernel over a bound on its norm: the square root of that of |G|, at all offsets.

    ||W||^2 = ||W^T W|| <= || |G| || for every image and padding (`parametrise.absolute_gram`).
    """

    def normalised(part):
        gram = parametrise.absolute_gram(by_phase(part, strides))
        return part * jax.lax.rsqrt(parametrise.gram_bound(gram))

    return _by_group(normalised, kernel, groups)


@parametrised
def rko(kernel: Array, *, strides: Sequence[int], groups: int = 1, steps: int = 15) -> Array:
    """bjorck(all taps as one matrix) / sqrt(prod ceil(k / s)).

    Each input point lies in at most ceil(k / s) windows per axis, so the patches together have at
    most that many times the energy of the image (Serrurier et al., CVPR 2021).
    """
    window = kernel.shape[:-2]
    overlap = math.prod(-(-k // s) for k, s in zip(window, strides, strict=True))

    def orthogonal(part):
        matrix = part.reshape(-1, part.shape[-1])
        return parametrise.bjorck(matrix, steps=steps).reshape(part.shape) / math.sqrt(overlap)

    return _by_group(orthogonal, kernel, groups)


@parametrised
def bcop(matrix: Array, projections: Sequence[Array], *, c_in: int, c_out: int, steps: int = 15):
    """A kernel whose convolution is orthogonal on an endless or circular image.

    A step along an axis is the two-tap kernel (P, I - P) with P = R R^T: at each frequency
    P + (I - P) exp(i t), which has norm at most 1 for every symmetric P with eigenvalues in [0, 1],
    hence for R = bjorck(...) however few its steps; with P a projector it is unitary. The kernel is
    the product of these steps and an orthogonal matrix.

    Args:
      matrix: free (c, c) with c = max(c_in, c_out).
      projections: free (k_a - 1, c, c // 2) for each axis of the window, outermost first.
      c_in, c_out: channels that are kept, a part of an orthogonal layer.
      steps: of `bjorck`.

    Returns:
      (*window, c_in, c_out).
    """
    rank, c = len(projections), matrix.shape[0]
    kernel = parametrise.bjorck(matrix, steps=steps).reshape(*(1,) * rank, c, c)
    for axis, free in enumerate(projections):
        for step in free:
            root = parametrise.bjorck(step, steps=steps)
            projector = product(root, root.T)
            first = product(kernel, projector)
            after = [(0, 0)] * kernel.ndim
            before = [(0, 0)] * kernel.ndim
            after[axis], before[axis] = (0, 1), (1, 0)
            kernel = jnp.pad(first, after) + jnp.pad(kernel - first, before)
    return kernel[..., :c_in, :c_out]


@parametrised
def aoc(
    kernel: Array, matrix: Array, projections: Sequence[Array], *, strides: Sequence[int]
) -> Array:
    """An orthogonal convolution with strides: `bcop`, then `rko` with windows of one stride.

    Args:
      kernel: free (*strides, c_in, c_out), for windows that do not overlap.
      matrix, projections: of `bcop` on c_in channels, with windows k - s + 1.
      strides: one per axis.

    Returns:
      (*k, c_in, c_out), with k - s + 1 + (s - 1) = k taps per axis.
    """
    c_in = kernel.shape[-2]
    smooth = bcop(matrix, projections, c_in=c_in, c_out=c_in)
    apart = rko(kernel, strides=strides)
    return _composed(smooth, apart)


def _composed(first: Array, second: Array) -> Array:
    """The kernel of one convolution after another: sums of products of taps."""
    shape = [a + b - 1 for a, b in zip(first.shape[:-2], second.shape[:-2], strict=True)]
    total = jnp.zeros((*shape, first.shape[-2], second.shape[-1]), first.dtype)
    for tap in np.ndindex(*second.shape[:-2]):
        reach = tuple(slice(t, t + n) for t, n in zip(tap, first.shape[:-2], strict=True))
        total = total.at[reach].add(product(first, second[tap]))
    return total


def _by_group(f, kernel: Array, groups: int) -> Array:
    """f of the kernel of each group, side by side in the output channels."""
    if groups == 1:
        return f(kernel)
    return jnp.concatenate([f(part) for part in jnp.split(kernel, groups, axis=-1)], axis=-1)


# --- by frequency ---------------------------------------------------------------------------------


@parametrised
def cayley_conv(kernel: Array, scale: Array, *, spatial: Sequence[int]) -> Array:
    """The matrices Q(f), (2, *half spectrum, c_in, c_out), of an orthogonal convolution.

    Args:
      kernel: free (*window, c_in, c_out), divided by its norm.
      scale: what it is multiplied with, a scalar.
      spatial: (*spatial) of the image.
    """
    size = jnp.sqrt(jnp.sum(kernel**2) + 1e-12)
    symbols = _spectrum(kernel * (scale / size), spatial)
    if kernel.shape[-2] < kernel.shape[-1]:
        return _parts(adjoint(parametrise.tall_cayley(adjoint(symbols))))
    return _parts(parametrise.tall_cayley(symbols))


@parametrised
def bro_conv(kernel: Array, *, spatial: Sequence[int]) -> Array:
    """P(f), (2, *half spectrum, c, m), of reflections I - 2 P P*, as in `parametrise.bro`.

    Args:
      kernel: free (*window, c, m) with m <= c, whose transform is V.
      spatial: (*spatial) of the image.
    """
    return _parts(parametrise.span(_spectrum(kernel, spatial)))


def _parts(symbols: Array) -> Array:
    """Real and imaginary parts, as blocks take them."""
    return jnp.stack([symbols.real, symbols.imag])


def _spectrum(kernel: Array, spatial: Sequence[int]) -> Array:
    """The half spectrum (*spatial, c_in, c_out) of a kernel whose middle tap is the origin."""
    axes = tuple(range(len(spatial)))
    short = [(0, max(0, n - k)) for n, k in zip(spatial, kernel.shape, strict=False)]
    padded = jnp.pad(kernel, [*short, (0, 0), (0, 0)])
    centred = jnp.roll(padded, [-((k - 1) // 2) for k in kernel.shape[: len(spatial)]], axes)
    return jnp.fft.rfftn(centred, tuple(spatial), axes)
