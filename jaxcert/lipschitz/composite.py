"""Constants of blocks (`jaxcert.blocks`), proved from the weights that their equations carry.

Imported for its effect on the rules of `chain.py`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Value, lower, upper
from jaxcert.bounds.rounding import UNIT
from jaxcert.graph import Equation
from jaxcert.lipschitz import constants
from jaxcert.lipschitz.chain import centre, define, proved
from jaxcert.lipschitz.spectral import dot, proved_norm
from jaxcert.sets import Array, Box

# --- activations and pooling ----------------------------------------------------------------------
# maxmin sorts pairs: on each of two half-planes a permutation, hence an isometry, and continuous
# where they meet. householder is the identity or z - 2 v v^T z, continuous where <v, z> = 0; the
# latter has the norm max(1, |1 - 2 |v|^2|), and |v| = 1 only up to rounding. partial_abs changes
# signs. The L2 norm is 1-Lipschitz by the triangle inequality, and root_sum_square is that of x
# with one entry more.


def _one(eqn, place, operands):
    return 1.0


def _circular_conv(eqn, place, operands):
    shape = _image_shape(eqn)
    return proved(lambda k: constants.conv(k, shape, padding="CIRCULAR"), operands[1])


def _image_shape(eqn: Equation) -> tuple[int, ...]:
    """(*spatial, c) of x, whatever axes of examples come first."""
    return eqn.inputs[0].shape[1 - len(eqn.inputs[1].shape) :]


def _householder(eqn, place, operands):
    steepest = jnp.maximum(jnp.abs(lower(operands[1])), jnp.abs(upper(operands[1])))
    square = jnp.max(jnp.sum(steepest**2, axis=0)) * (1 + 8 * UNIT)
    return jnp.maximum(1.0, 2 * square - 1) * (1 + 8 * UNIT)


def _root_of_entries(eqn, place, operands):
    return math.sqrt(eqn.inputs[0].shape[-1]) * (1 + 2 * UNIT)


# --- residual blocks ------------------------------------------------------------------------------
# y = x - B^T D relu(B x + b) with a diagonal D >= 0. Let d be the change of x and e that of the
# relu. Its slopes lie in [0, 1], entry by entry, so e_i^2 <= e_i (B d)_i, hence e'De <= e'DBd and
#
#   |d - B'De|^2 = |d|^2 - 2 e'DBd + |B'De|^2 <= |d|^2 + (nu^2 - 2) e'De,   nu = ||D^(1/2) B||,
#
# which is at most |d|^2 where nu^2 <= 2: the condition of the CPL block (Meunier et al., ICML 2022,
# D = 2 / ||W||^2) and of the SLL block (Araujo et al., ICLR 2023, D = 2 T^-1). Whatever
# nu is, e'De <= |D^(1/2) B d|^2 <= nu^2 |d|^2, and the constant is at most
# sqrt(1 + max(0, nu^2 - 2) nu^2). So nu is all there is to prove.


def _residual(eqn, place, operands):
    _, kernel, scale, _ = operands
    circular = eqn.name == "jaxcert_circular_residual"
    shape = _image_shape(eqn)

    def norm(scaled):
        if scaled.ndim == 2:
            return constants.dense(scaled)
        return constants.conv(scaled, shape, padding="CIRCULAR" if circular else "SAME")

    negative = ~jnp.all(lower(scale) >= 0)
    nu = proved(norm, _times_root(kernel, scale)) * (1 + 4 * UNIT)
    excess = jnp.maximum(0.0, nu**2 * (1 + 4 * UNIT) - 2) * nu**2
    return jnp.where(negative, jnp.inf, jnp.sqrt(1 + excess * (1 + 8 * UNIT)) * (1 + 4 * UNIT))


def _times_root(kernel: Value, scale: Value) -> Box:
    """kernel * sqrt(scale), as an interval."""
    low = jnp.sqrt(jnp.maximum(lower(scale), 0.0)) * (1 - 8 * UNIT)
    high = jnp.sqrt(jnp.maximum(upper(scale), 0.0)) * (1 + 8 * UNIT)
    ends = [end * root for end in (lower(kernel), upper(kernel)) for root in (low, high)]
    least, most = jax.tree.reduce(jnp.minimum, ends), jax.tree.reduce(jnp.maximum, ends)
    slack = 4 * UNIT * jnp.maximum(jnp.abs(least), jnp.abs(most)) + 2.0**-1000
    return Box(least - slack, most + slack)


# --- sandwich layers ------------------------------------------------------------------------------
# y = sqrt(2) A' Psi relu(sqrt(2) Psi^-1 B x + c), d the change of x, e that of the relu (Wang and
# Manchester, ICML 2023). Let rho = max(0, ||[A B]||^2 - 1): A A' + B B' <= (1 + rho) I
# holds. From e_i^2 <= e_i (sqrt(2) Psi^-1 B d)_i follow |Psi e|^2 <= sqrt(2) <B' Psi e, d> and
# |Psi e| <= sqrt(2) ||B|| |d|. With v = B' Psi e,
#
#   |change of y|^2 = 2 |A' Psi e|^2 <= 2 (1 + rho) |Psi e|^2 - 2 |v|^2
#                   <= 2 sqrt(2) <v, d> - 2 |v|^2 + 2 rho |Psi e|^2 <= (1 + 4 rho ||B||^2) |d|^2,
#
# since 2 sqrt(2) <v, d> - 2 |v|^2 is at most |d|^2, its value at v = d / sqrt(2).


def _sandwich(eqn, place, operands):
    _, a, b, psi, _ = operands
    both = Box(*[jnp.concatenate([end(a), end(b)], axis=1) for end in (lower, upper)])
    rho = jnp.maximum(0.0, proved(constants.dense, both) ** 2 * (1 + 4 * UNIT) - 1)
    square = 1 + 4 * rho * proved(constants.dense, b) ** 2 * (1 + 16 * UNIT)
    zero = ~jnp.all((lower(psi) > 0) | (upper(psi) < 0))
    return jnp.where(zero, jnp.inf, jnp.sqrt(square) * (1 + 8 * UNIT))


# --- layers in the frequency domain ---------------------------------------------------------------
# x is real. By Parseval's theorem its half spectrum carries |x|^2, if frequencies without a twin in
# the other half count once. The inverse transform returns the real image whose half spectrum is
# that of the product, but for the part that no real image has (among frequencies whose mirror image
# is in the same half), which it drops: an orthogonal projection. So the norm is at most the largest
# of the matrices'. The transforms are products with stored cosines and sines: rounded by a unit u,
# those of n points change a transform by at most sqrt(n) u in relative terms. With the u of float32
# and four times as much, the constant also holds for what a forward pass in float32 measures.


def _multiplier(eqn, place, operands):
    def norm(symbol, radius):
        return proved_norm(symbol)[0] + radius

    return _over_frequencies(norm, eqn, operands[1])


def _reflection(eqn, place, operands):
    def norm(basis, radius):
        # A change E of P changes 2 P P* by 2 (P E* + E P* + E E*). The product P P* errs by at most
        # gamma_n ||P||_F^2, as in `spectral.py`.
        change = 2 * radius * (2 * proved_norm(basis)[0] + radius)
        off = 16 * (sum(basis.shape) + 4) * UNIT * jnp.sum(jnp.abs(basis) ** 2)
        reflection = jnp.eye(len(basis)) - 2 * dot(basis, jnp.conj(basis.T))
        return proved_norm(reflection)[0] + off + change

    return _over_frequencies(norm, eqn, operands[1])


def _over_frequencies(norm: Callable[..., Array], eqn: Equation, symbols: Value) -> Array:
    """The largest norm(symbol, ||change||_F), with four times the rounding of the transforms."""

    def at(parts):
        (real, imaginary), change = parts
        size = jnp.sqrt(jnp.sum(change**2)) * (1 + (change.size + 4) * UNIT)
        return norm(jax.lax.complex(real, imaginary), size)

    flat = [part.reshape(2, -1, *part.shape[-2:]) for part in centre(symbols)]
    norms = jax.lax.map(at, [jnp.moveaxis(part, 0, 1) for part in flat])
    spatial = eqn.inputs[0].shape[2 - len(eqn.inputs[1].shape) : -1]
    rounding = 16 * 2.0**-24 * sum(math.sqrt(n) for n in spatial)
    return jnp.max(norms) * (1 + rounding)


define("jaxcert_maxmin jaxcert_partial_abs", _one)
define("jaxcert_root_sum_square", _one, 2)
define("jaxcert_root_sum_square", _root_of_entries, math.inf)
define("jaxcert_circular_conv", _circular_conv, 2)
define("jaxcert_householder", _householder, 2)
define("jaxcert_residual jaxcert_circular_residual", _residual, 2)
define("jaxcert_sandwich", _sandwich, 2)
define("jaxcert_frequency_multiplier", _multiplier, 2)
define("jaxcert_frequency_reflection", _reflection, 2)
