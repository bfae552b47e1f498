"""Functions of an input and of weights that stand in a model's graph as one equation.

Two kinds, both ordinary jitted functions for JAX:

parametrised  marks a function of weights alone (an orthogonalisation, say). Its result counts as a
              stored weight: the number that the model computes in its own float type, which
              `jaxcert.nn.freeze` would store. Certifiers take the number and prove things of it.
block         a layer whose Lipschitz constant no product of norms shows. `lipschitz` finds it
              whole, with its weights, and proves its constant from them; other certifiers see its
              inside.

A name proves nothing: a block counts as one only if what was traced under its name is what its
definition here gives at the same shapes (`graph.py` compares). No block has options besides the
shapes of its operands, so one definition is all there is to compare with; it raises for shapes that
it does not name, under which it would broadcast and be another function.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

WEIGHTS = "jaxcert_weights"
REFERENCES: dict[str, Callable[..., Array]] = {}
"""The definition of each block, by the name that its equation has in a trace."""


def parametrised(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of weights, with options by keyword, whose result counts as a stored weight."""

    @functools.lru_cache(maxsize=256)
    def jitted(options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        def weights(*arrays):
            return f(*arrays, **dict(options))

        weights.__name__ = WEIGHTS
        return jax.jit(weights)

    @functools.wraps(f)
    def wrapped(*arrays, **options):
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return jitted(tuple(sorted(options.items())))(*arrays)

    return wrapped


def block(f: Callable[..., Array]) -> Callable[..., Array]:
    """A function that keeps its place in graphs; its name is that of its equation."""
    name = f"jaxcert_{f.__name__}"

    @functools.wraps(f)
    def named(*arrays):
        return f(*arrays)

    named.__name__ = name
    REFERENCES[name] = named
    return jax.jit(named)


# --- Activations and pooling ----------------------------------------------------------------------


@block
def maxmin(x: Array) -> Array:
    """The larger and the smaller of each pair (x_i, x_{i + d/2}) along the last axis."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


@block
def householder(x: Array, normal: Array) -> Array:
    """Each pair z = (x_i, x_{i + d/2}), reflected at v = `normal[:, i]` where <v, z> < 0."""
    _require(normal.shape == (2, x.shape[-1] // 2), "normal", "(2, d / 2)", normal)
    first, second = jnp.split(x, 2, axis=-1)
    along = jnp.minimum(normal[0] * first + normal[1] * second, 0)
    return jnp.concatenate([first - 2 * along * normal[0], second - 2 * along * normal[1]], axis=-1)


@block
def partial_abs(x: Array, chosen: Array) -> Array:
    """|x_i| for the entries of the last axis that are chosen (d,), x_i for the others."""
    _require(chosen.shape == x.shape[-1:], "chosen", "(d,)", chosen)
    return jnp.where(chosen, jnp.abs(x), x)


@block
def root_sum_square(x: Array) -> Array:
    """The L2 norm along the last axis."""
    # The norm of (x, 1e-6): differentiable at 0, and no steeper than that of x.
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + 1e-12)


# --- Layers ---------------------------------------------------------------------------------------
# Kernels are Flax's: (d_in, d_out), or (*window, c_in, c_out), channels last. Convolutions have
# stride 1 and keep the size of the image: they pad by (k - 1) // 2 in front and k // 2 behind.


@block
def circular_conv(x: Array, kernel: Array) -> Array:
    """A convolution on an image whose opposite edges touch."""
    _require(x.ndim == kernel.ndim > 2, "kernel", "(*window, c_in, c_out)", kernel)
    return _correlate(_wrap(x, _same(kernel)), kernel, [(0, 0)] * (kernel.ndim - 2))


@block
def residual(x: Array, kernel: Array, scale: Array, bias: Array) -> Array:
    """x - W D relu(W^T x + b) for W^T the dense layer or zero-padded convolution of a kernel."""
    _require_residual(x, kernel, scale, bias)
    if kernel.ndim == 2:
        return x - (scale * jax.nn.relu(x @ kernel + bias)) @ kernel.T
    pads = _same(kernel)
    hidden = scale * jax.nn.relu(_correlate(x, kernel, pads) + bias)
    return x - _correlate(hidden, _adjoint(kernel), _swapped(pads))


@block
def circular_residual(x: Array, kernel: Array, scale: Array, bias: Array) -> Array:
    """`residual` with a convolution on an image whose opposite edges touch."""
    _require_residual(x, kernel, scale, bias)
    pads, none = _same(kernel), [(0, 0)] * (kernel.ndim - 2)
    hidden = scale * jax.nn.relu(_correlate(_wrap(x, pads), kernel, none) + bias)
    return x - _correlate(_wrap(hidden, _swapped(pads)), _adjoint(kernel), none)


@block
def sandwich(x: Array, a: Array, b: Array, psi: Array, bias: Array) -> Array:
    """sqrt(2) A^T Psi relu(sqrt(2) Psi^-1 B x + c) for a (m, d_out), b (m, d_in), psi (m,) > 0."""
    _require(a.ndim == 2 and x.ndim == 2, "a and x", "matrices", a)
    _require(b.shape == (len(a), x.shape[1]), "b", "(m, d_in)", b)
    _require(psi.shape == bias.shape == (len(a),), "psi and bias", "(m,)", psi)
    hidden = jax.nn.relu(math.sqrt(2) * (x @ b.T) / psi + bias)
    return math.sqrt(2) * ((psi * hidden) @ a)


@block
def frequency_multiplier(x: Array, symbols: Array) -> Array:
    """A circular convolution by its matrices at each frequency of half the spectrum.

    Args:
      x: (b, *spatial, c_in).
      symbols: real and imaginary parts, (2, *half, c_in, c_out).
    """
    _require_spectrum(x, symbols)
    product = jnp.matmul(_spectrum(x), _as_real(symbols))
    return _image(product, x.shape[1:-1])


@block
def frequency_reflection(x: Array, basis: Array) -> Array:
    """x - 2 P P* x at each frequency, for real and imaginary parts of P, (2, *half, c, m)."""
    _require_spectrum(x, basis)
    matrix = _as_real(basis)
    inside = jnp.matmul(_spectrum(x), matrix)
    return x - 2 * _image(jnp.matmul(inside, jnp.swapaxes(matrix, -1, -2)), x.shape[1:-1])


# --- Fourier transforms as products of real matrices ----------------------------------------------
# For images of some tens of pixels a side, and with a matrix product after it at each frequency,
# dense transforms are faster than fast ones: on a CPU three times so, since complex products are
# slow there, and accelerators are made for them. A complex number is a pair along a leading axis.


def _turns(n: int, columns: int) -> np.ndarray:
    """cos and sin of 2 pi j k / n, (2, n, columns)."""
    turn = np.outer(np.arange(n), np.arange(columns)) % n
    angles = 2 * np.pi * turn / n
    return np.stack([np.cos(angles), np.sin(angles)]).round(16)


def _spectrum(x: Array) -> Array:
    """The half spectrum of (b, *spatial, c), as (*half, b, 2 c): real parts, then imaginary."""
    spatial, rank = x.shape[1:-1], x.ndim - 2
    cos, sin = _turns(spatial[-1], spatial[-1] // 2 + 1)
    z = _contract(np.stack([cos, -sin]), x, [1], [rank])  # (2, h, b, *others, c)
    for n in reversed(spatial[:-1]):
        cos, sin = _turns(n, n)
        matrix = np.array([[cos, sin], [-sin, cos]])  # (2 out, 2 in, n in, n out), exp(-i)
        z = _contract(matrix, z, [1, 2], [0, z.ndim - 2])
    z = jnp.moveaxis(z, 0, -2)
    return z.reshape(*z.shape[:-2], -1)


def _image(z: Array, spatial: tuple[int, ...]) -> Array:
    """The real image (b, *spatial, c) of a half spectrum (*half, b, 2 c)."""
    rank = len(spatial)
    z = jnp.moveaxis(z.reshape(*z.shape[:-1], 2, -1), -2, 0)  # (2, *half, b, c)
    for axis, n in enumerate(spatial[:-1]):
        cos, sin = _turns(n, n) / n
        matrix = np.array([[cos, -sin], [sin, cos]])  # exp(+i)
        z = jnp.moveaxis(_contract(matrix, z, [1, 2], [0, axis + 1]), 1, axis + 1)
    n = spatial[-1]
    cos, sin = _turns(n, n // 2 + 1) / n
    twins = np.where(np.arange(n // 2 + 1) * 2 % n == 0, 1.0, 2.0)
    image = _contract(np.stack([cos, -sin]) * twins, z, [0, 2], [0, rank])  # (n, *others, b, c)
    return jnp.moveaxis(jnp.moveaxis(image, 0, rank - 1), -2, 0)


def _contract(matrix: np.ndarray, z: Array, axes: list[int], others: list[int]) -> Array:
    weights = matrix.astype(z.dtype)
    return jnp.tensordot(weights, z, axes=(axes, others), precision=jax.lax.Precision.HIGHEST)


def _as_real(symbols: Array) -> Array:
    """Complex matrices as real ones on pairs, (2, *half, m, n) to (*half, 2 m, 2 n)."""
    real, imaginary = symbols
    first = jnp.concatenate([real, imaginary], axis=-1)
    second = jnp.concatenate([-imaginary, real], axis=-1)
    return jnp.concatenate([first, second], axis=-2)


# --- Convolutions ---------------------------------------------------------------------------------


def _same(kernel: Array) -> list[tuple[int, int]]:
    return [((size - 1) // 2, size // 2) for size in kernel.shape[:-2]]


def _swapped(pads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(high, low) for low, high in pads]


def _adjoint(kernel: Array) -> Array:
    """The kernel of the adjoint: taps reversed, channels exchanged."""
    return jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)


def _wrap(x: Array, pads: list[tuple[int, int]]) -> Array:
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="wrap")


def _correlate(x: Array, kernel: Array, pads: list[tuple[int, int]]) -> Array:
    space = "DHW"[3 - (kernel.ndim - 2) :]
    dims = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(x, kernel, (1,) * len(space), pads, dimension_numbers=dims)


# --- checks ---------------------------------------------------------------------------------------


def _require(fits: bool, name: str, wanted: str, got: Array) -> None:
    if not fits:
        raise ValueError(f"a block takes {name} of shape {wanted}, got {got.shape}")


def _require_residual(x: Array, kernel: Array, scale: Array, bias: Array) -> None:
    conv = kernel.ndim > 2
    _require(kernel.ndim >= 2, "kernel", "(d, m) or (*window, c, m)", kernel)
    _require(x.ndim == kernel.ndim if conv else x.ndim >= 2, "x", "that fits the kernel", x)
    _require(scale.shape == bias.shape == kernel.shape[-1:], "scale and bias", "(m,)", scale)


def _require_spectrum(x: Array, symbols: Array) -> None:
    spatial = x.shape[1:-1]
    half = (2, *spatial[:-1], spatial[-1] // 2 + 1, x.shape[-1])
    _require(symbols.shape[:-1] == half, "matrices", f"{half} and one axis more", symbols)
