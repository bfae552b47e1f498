"""Convolutions in a form that XLA:CPU computes faster: the same function but for rounding."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# (b, h, w, c) and (r, s, c, o) to (b, h - r + 1, w - s + 1, o).
Valid = Callable[[jax.Array, jax.Array], jax.Array]


def rewritten(x, kernel, strides, padding, *, dimension_numbers, **options):
    """`lax.conv_general_dilated`, for `nn.Conv(..., conv_general_dilated=rewritten)`.

    Without strides and dilation, by column pairs where there are few channels, and by Winograd's
    products where there are enough.
    """
    dilations = (*options["lhs_dilation"], *options["rhs_dilation"])
    if {*strides, *dilations, options["feature_group_count"]} != {1}:
        options["dimension_numbers"] = dimension_numbers
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return by_pairs(by_winograd(plain))(x, kernel)


def plain(x, kernel):
    """XLA's own."""
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=axes)


# --- column pairs ---------------------------------------------------------------------------------
#
# XLA:CPU computes a float32 convolution by its fast library only where one side has more than 16
# channels, which 3 -> 16 and 16 -> 16 have not. Two neighbouring columns can be one of twice as
# many channels, on both sides, by a kernel that holds the given one shifted by d = 0, 1 columns:
#   wide[:, j, :, (d, o)] = kernel[:, j - d, :, o], zero elsewhere.
# Its width must be even, and so must be the number of columns. The same products are added, and
# zeros.
def by_pairs(convolution: Valid) -> Valid:
    """The convolution of column pairs, where that is for it."""

    def paired(x, kernel):
        _, width, _, after = kernel.shape
        if after > 16 or width == 1 or width % 2 == 0 or x.shape[2] % 2:
            return convolution(x, kernel)
        shifted = [jnp.pad(kernel, ((0, 0), (d, 1 - d), (0, 0), (0, 0))) for d in (0, 1)]
        wide = jnp.concatenate(shifted, axis=3)
        wide = wide.reshape(len(wide), (width + 1) // 2, -1, 2 * after)
        out = convolution(x.reshape(*x.shape[:2], x.shape[2] // 2, -1), wide)
        return out.reshape(*out.shape[:2], 2 * out.shape[2], after)

    return paired


# --- Winograd -------------------------------------------------------------------------------------
#
# m rows of a convolution with r rows of kernel are m + r - 1 products of sums, instead of m r
# (Winograd 1980; Lavin and Gray, CVPR 2016; in one dimension here). A polynomial of degree below
# n = m + r - 1 is known by its values at n points, one of which may be infinity. So with V_k, which
# evaluates k coefficients there, V_n^-1 ((V_m a) * (V_r g)) multiplies polynomials a and g, and its
# transpose in a is y_i = sum_j g_j d_(i + j) for i < m:
#   y = V_m^T ((V_r g) * (V_n^-T d)).
ROWS = 4  # m
POINTS = (0, 1, -1, 2, -2, 1 / 2, -1 / 2)  # for r <= 5


def by_winograd(convolution: Valid) -> Valid:
    """The convolution by products of `ROWS` rows, where that is for it."""

    def multiplied(x, kernel):
        m, r = ROWS, kernel.shape[0]
        rows = x.shape[1] - r + 1
        if rows % m or not 1 < r <= 5 or kernel.shape[2] < 16:
            return convolution(x, kernel)
        of_output, of_kernel, of_data = transforms(m, r)
        data = combined(of_data, [x[:, i : i + rows - m + 1 : m] for i in range(m + r - 1)])
        kernels = combined(of_kernel, kernel)
        products = [convolution(d, g[None]) for d, g in zip(data, kernels, strict=True)]
        out = jnp.stack(combined(of_output, products), axis=2)
        return out.reshape(len(x), rows, *out.shape[3:])

    return multiplied


@functools.cache
def transforms(m: int, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V_m^T (m, n), V_r (n, r) and V_n^-T (n, n), each row of which is scaled to whole numbers."""
    n = m + r - 1
    of_data, of_output, of_kernel = (
        np.vstack([np.vander(POINTS[: n - 1], k, increasing=True), np.eye(k)[-1:]])
        for k in (n, m, r)
    )
    of_data = np.linalg.inv(of_data).T
    scale = np.array([[np.min(np.abs(row[~_is_zero(row)]))] for row in of_data])
    return of_output.T, of_kernel * scale, of_data / scale


def combined(matrix: np.ndarray, parts: Iterable[jax.Array]) -> list[jax.Array]:
    """The matrix times a vector of arrays; entries of zero cost nothing."""
    parts = list(parts)
    return [
        functools.reduce(
            jnp.add, (float(row[i]) * parts[i] for i in np.flatnonzero(~_is_zero(row)))
        )
        for row in matrix
    ]


def _is_zero(row: np.ndarray) -> Any:
    return np.abs(row) < 1e-9
