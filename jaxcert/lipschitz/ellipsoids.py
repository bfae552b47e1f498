"""Ellipsoids that hold the differences of hidden values: the recursion behind tight constants.

A network x_i = g_i(W_i x_{i-1} + c_i), i = 1 .. l - 1, and y = W_l x_{l-1} + c_l, at two points;
dx_i are the differences of its values, dz_i = W_i dx_{i-1}. The slope of the activation of neuron k
lies in [a_k, b_k] between the two points, so with m = (a + b) / 2 and r = (b - a) / 2

    dx_i = m dz_i + w,    |w_k| <= r_k |dz_{i,k}|    (m and r as diagonal matrices).

Claim. If dz dz' <= |dx_0|^2 G (in the order of symmetric matrices), then for every positive
diagonal matrix T with P = T - r G r positive definite

    dx dx' <= |dx_0|^2 X,    X = T + m (G + G r P^{-1} r G) m.

Proof. Let G be invertible (else take G + epsilon I and let epsilon go to 0), and s = |dx_0|^2. Then
dz' G^{-1} dz <= s. The bounds on w give w' T^{-1} w <= dz' r T^{-1} r dz, so

    s >= dz' H^{-1} dz + w' T^{-1} w,    H^{-1} = G^{-1} - r T^{-1} r.

H^{-1} is positive definite exactly if T - r G r is (both are Schur complements of [[G^{-1}, r], [r,
T]]), and its inverse is H = G + G r P^{-1} r G (Woodbury). For every v, by Cauchy and Schwarz,

    (v' dx)^2 = (v' m dz + v' w)^2 <= (v' m H m v + v' T v) (dz' H^{-1} dz + w' T^{-1} w)
             <= v' X v s.

Starting from X_0 = I, with G_i = W_i X_{i-1} W_i', the constant of the net is at most the root of
|| W_l X_{l-1} W_l' ||, and that of a difference c' y of outputs the root of c' W_l X_{l-1} W_l' c.

For relu, m = r = 1/2, and X^{-1} = D - D G D / 4 with D = T^{-1}: these are the matrices M_i of
ECLipsE (Xu and Sivaranjani, NeurIPS 2024), whose best multipliers D give the optimum of
LipSDP-Neuron (Fazlyab et al., NeurIPS 2019). A larger X may stand for X in the next step, as G and
X increase with it: rounding is counted by adding multiples of the identity.

Multipliers here are p > 0 and a share 0 < sigma < 1 for each layer: with q = p sqrt(sigma / || p G
p ||) and T = (r / q)^2, the matrix P = (r / q) (I - q G q) (r / q) is positive definite for all p
and sigma, so that a search over them needs no constraint. ECLipsE-Fast has T = || G || / 2 for
relu; with other slopes T = || G || r max_k (r_k + |m_k|) is a good one: p^2 = r / max_k (r_k +
|m_k|) and sigma = || p G p || / || G ||. (Neurons that are linear on a set, and those that are off,
have r near 0, and should share one T / r: P is then near to T also where both meet in G.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.lipschitz import constants
from jaxcert.lipschitz.slopes import Slopes
from jaxcert.lipschitz.spectral import dot, frobenius
from jaxcert.pytrees import pytree
from jaxcert.sets import Array

Goal: TypeAlias = Callable[[Array], Array]
"""What is to be made small, as a function of W_l X_{l-1} W_l'."""

KRYLOV = 24  # steps of Lanczos' iteration, for larger matrices
MOST = 1 - 2.0**-20  # of a share
FIRST = 0.98  # at most, of a share at the start
# Above what numbers can amount to that are flushed to zero, squares in a norm too.
FLOOR = 2.0**-480


@pytree
@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Free parameters of a bound; any finite values give one.

    Attributes:
      logs: 2 log p for each activation layer, (n_i,); adding a number changes nothing.
      shares: the logit of sigma for each, ().
    """

    logs: tuple[Array, ...]
    shares: tuple[Array, ...]


# --- the recursion in floating point --------------------------------------------------------------


def middle_and_spread(slopes: Slopes) -> tuple[Array, Array]:
    """m and r, so that the slopes lie within m - r and m + r: their rounding is counted."""
    least, greatest = slopes
    m = least / 2 + greatest / 2
    spread = jnp.maximum(greatest - m, m - least)
    unit = float(jnp.finfo(m.dtype).eps)
    least_spread = math.sqrt(unit) / 16  # so that T > 0 for linear neurons, too
    return m, jnp.maximum(spread + 4 * unit * (jnp.abs(m) + spread), least_spread)


def start(matrices: Sequence[Array], slopes: Sequence[Slopes]) -> Multipliers:
    """The multipliers of ECLipsE-Fast."""
    x, logs, shares = None, [], []
    for matrix, pair in zip(matrices[:-1], slopes, strict=True):
        m, r = middle_and_spread(pair)
        g = _congruence(matrix, x)
        squares = r / jnp.max(r + jnp.abs(m))
        p = jnp.sqrt(squares)
        top = _positive(_largest(p[:, None] * g * p))
        share = jnp.clip(top / _positive(_largest(g)), 1 - MOST, FIRST)
        logs.append(jnp.log(squares))
        shares.append(jnp.log(share / (1 - share)))
        x = _image(g, m, r, p * jnp.sqrt(share / top))
    return Multipliers(tuple(logs), tuple(shares))


def recursion(
    matrices: Sequence[Array], slopes: Sequence[Slopes], multipliers: Multipliers
) -> tuple[Array, list[Array]]:
    """W_l X_{l-1} W_l' and the q of each activation layer; differentiable, not a proof."""
    x, scales = None, []
    parts = zip(matrices[:-1], slopes, multipliers.logs, multipliers.shares, strict=True)
    for matrix, pair, log, share in parts:
        m, r = middle_and_spread(pair)
        g = _congruence(matrix, x)
        p = jnp.exp((log - jax.lax.stop_gradient(jnp.max(log))) / 2)
        sigma = jnp.minimum(jax.nn.sigmoid(share), MOST)
        q = p * jnp.sqrt(sigma / _positive(_largest(p[:, None] * g * p)))
        x = _image(g, m, r, q)
        scales.append(q)
    return _congruence(matrices[-1], x), scales


def _positive(value: Array) -> Array:
    return jnp.maximum(value, float(jnp.finfo(value.dtype).tiny) * 2.0**60)


def _congruence(matrix: Array, x: Array | None) -> Array:
    g = dot(matrix, matrix.T) if x is None else dot(dot(matrix, x), matrix.T)
    return (g + g.T) / 2


# With P^{-1} = (q / r) (I - q G q)^{-1} (q / r), the Claim's X is (r / q)^2 + (m / q) ((I - q G
# q)^{-1} - I) (m / q). Where r is tiny this cancels, hence the floor of r.


def _image(g: Array, m: Array, r: Array, q: Array) -> Array:
    """X, from G and T = (r / q)^2."""
    identity, ratio = jnp.eye(len(q), dtype=g.dtype), m / q
    inverse = _inverse(identity - q[:, None] * g * q)
    return jnp.diag((r / q) ** 2) + ratio[:, None] * (inverse - identity) * ratio


@jax.custom_jvp
def _inverse(matrix: Array) -> Array:
    """Of a positive definite matrix."""
    half = _inverse_of_factor(jnp.linalg.cholesky(matrix))
    return dot(half.T, half)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    inverse = _inverse(*primals)
    return inverse, -dot(inverse, dot(tangents[0], inverse))


def _inverse_of_factor(lower: Array) -> Array:
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def _largest(matrix: Array) -> Array:
    """The largest eigenvalue of a symmetric matrix, with the derivative v v'."""
    fixed = jax.lax.stop_gradient(matrix)
    v = _top_vector(fixed) if len(matrix) > KRYLOV else _by_decomposition(fixed)
    return jnp.sum(v * jnp.sum(matrix * v, axis=1))


def _by_decomposition(matrix: Array) -> Array:
    return jnp.linalg.eigh(matrix, symmetrize_input=False)[1][:, -1]


def _top_vector(matrix: Array) -> Array:
    """About the eigenvector of the largest eigenvalue, by Lanczos' iteration."""
    dtype, n = matrix.dtype, len(matrix)
    first = np.random.default_rng(0).normal(size=n)

    def step(carry: Any, _: Any) -> Any:
        now, before, beta = carry
        image = jnp.sum(matrix * now, axis=1)
        alpha = jnp.sum(image * now)
        rest = image - alpha * now - beta * before
        size = jnp.sqrt(jnp.sum(rest * rest))
        following = rest / jnp.where(size > 0, size, 1)
        return (following, now, size), (alpha, size, now)

    start = jnp.asarray(first / np.linalg.norm(first), dtype)
    carry = start, jnp.zeros_like(start), jnp.zeros((), dtype)
    _, (alphas, betas, basis) = jax.lax.scan(step, carry, length=KRYLOV)
    small = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    v = jnp.sum(basis * _by_decomposition(small)[:, None], axis=0)
    return v / jnp.sqrt(jnp.sum(v * v))


def norm_goal(g: Array) -> Array:
    """The logarithm of the Lipschitz constant."""
    return jnp.log(_positive(_largest(g))) / 2


def optimised(
    matrices: Sequence[Array],
    slopes: Sequence[Slopes],
    first: Multipliers,
    goal: Goal,
    steps: int,
    learning_rate: float,
) -> Multipliers:
    """The best multipliers that Adam meets on its way from the first ones."""
    if steps == 0 or len(matrices) < 2:
        return first
    import optax  # here, because it takes longer to load than all the rest

    optimiser: Any = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def value(multipliers: Multipliers) -> Array:
        return goal(recursion(matrices, slopes, multipliers)[0])

    def step(carry: Any, _: Any) -> Any:
        now, state, best, least = carry
        found, gradient = jax.value_and_grad(value)(now)
        better = found < least  # false for NaN
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, best)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        update, state = optimiser.update(gradient, state)
        # Back to the best one from where X lost its definiteness to rounding.
        now = jax.tree.map(
            lambda p, step, old: jnp.where(jnp.isfinite(found), p + step, old), now, update, best
        )
        return (now, state, best, jnp.where(better, found, least)), None

    initial = first, optimiser.init(first), first, jnp.full((), jnp.inf, matrices[0].dtype)
    return jax.lax.scan(step, initial, length=steps)[0][2]


# --- the recursion with rounding counted ----------------------------------------------------------
# As in `constants.py`, a computed product X Y with inner dimension n errs by at most gamma ||X||_F
# ||Y||_F in the Frobenius norm, gamma = 4 (n + 4) u; entrywise arithmetic by less. Every sum of
# error terms below is doubled, which pays for the rounding in its own evaluation and for terms of
# second order, and FLOOR covers underflow: matrices are scaled to the norm 1 before.
#
# A symmetric matrix known up to an error E with ||E||_F <= e lies below it plus e I. Where W itself
# is known up to E, || (W + E) X (W + E)' - W X W' || <= (2 ||W|| + ||E||) ||E|| ||X||.
#
# For P' = I - q G q, of which P = (r / q) P' (r / q) is a congruence, let Z be any matrix, such as
# the computed inverse of a computed Cholesky factor, and rho >= || Z P' Z' - I ||. If rho < 1, Z P'
# Z' >= (1 - rho) I is positive definite, hence so is P', and P'^{-1} <= Z' Z / (1 - rho). So
#
#     X <= T + m G m + B' B / (1 - rho),    B = Z q G m,
#
# with 1 / (1 - rho) <= 1 + 2 rho for rho <= 1/2, whatever LAPACK's Cholesky factorisation did: it
# is only judged by its residual.


@pytree
@dataclasses.dataclass(frozen=True)
class Layer:
    """A matrix with a norm of about 1 and what it was divided by.

    Attributes:
      matrix: (n, d).
      error: at least the Frobenius norm of what the exact one may be off.
      scale: a bound on the spectral norm of the exact one before the division.
    """

    matrix: Array
    error: Array
    scale: Array


def layer(middle: Array, radius: Array) -> Layer:
    """A matrix known up to a radius in each entry, scaled; the scale is inf if it is not finite."""
    norm = constants.dense(middle)  # above 0 even for the matrix 0
    divisor = jnp.where(jnp.isfinite(norm), norm, 1.0)
    matrix = jnp.where(jnp.isfinite(norm), middle, 0.0) / divisor
    error = 2 * (frobenius(radius / divisor) + 2 * UNIT * frobenius(matrix)) + FLOOR
    finite = jnp.isfinite(norm) & jnp.isfinite(error)
    return Layer(matrix, jnp.where(finite, error, jnp.inf), jnp.where(finite, divisor, jnp.inf))


def norm_bound(item: Layer) -> Array:
    """A bound on the spectral norm of the exact matrix, divided by the layer's scale."""
    return (1 + item.error) * (1 + 8 * UNIT)


def congruence_bound(item: Layer, x: Array | None) -> Array:
    """A matrix above W X W', float64 (n, n)."""
    w, gamma = frobenius(item.matrix), gamma_n(*item.matrix.shape)
    if x is None:
        half, size = item.matrix, math.sqrt(item.matrix.shape[1])
    else:
        half, size = dot(item.matrix, x), frobenius(x)
    g = dot(half, item.matrix.T)
    off = gamma * (w * size * w + frobenius(half) * w + frobenius(g))
    off += (2 * w + item.error) * item.error * size
    return _lifted(g, off)


def image_bound(g: Array, m: Array, r: Array, q: Array) -> Array:
    """A matrix above X for the multipliers T = (r / q)^2; NaN if they are not proved to be good.

    Args:
      g: symmetric (n, n), above G.
      m, r: (n,), r > 0.
      q: (n,), positive, any.
    """
    n = len(q)
    identity, gamma = jnp.eye(n), gamma_n(n, n)
    inner = q[:, None] * g * q
    p = identity - inner
    p_off = gamma * (frobenius(inner) + math.sqrt(n))
    z = _inverse_of_factor(jnp.linalg.cholesky(p))
    product, z_size = dot(dot(z, p), z.T), frobenius(z)
    rho = frobenius(product - identity) + z_size**2 * (2 * gamma * frobenius(p) + p_off)
    rho = 2 * (rho + gamma * (frobenius(product) + math.sqrt(n))) + FLOOR
    scaled = q[:, None] * g * m
    b, b_off = dot(z, scaled), 2 * gamma * z_size * frobenius(scaled)
    square, b_size, factor = dot(b.T, b), frobenius(b), 1 + 2 * rho
    t = (r / q) ** 2 * (1 + 8 * UNIT) + FLOOR
    through = m[:, None] * g * m
    off = gamma * (frobenius(t) + frobenius(through) + 2 * factor * b_size**2)
    off += factor * (2 * b_size + b_off) * b_off
    x = _lifted(jnp.diag(t) + through + factor * square, off)
    good = (rho <= 0.5) & jnp.all((q > 0) & jnp.isfinite(q))
    return jnp.where(good & jnp.isfinite(off), x, jnp.nan)


def output_bound(
    layers: Sequence[Layer], slopes: Sequence[Slopes], scales: Sequence[Array]
) -> Array:
    """A matrix above W_l X_{l-1} W_l' for the layers' scaled matrices, NaN where nothing is proved.

    Args:
      layers: l of them.
      slopes: (n_i,) each, of the l - 1 activation layers.
      scales: q for each of these, from `recursion`.
    """
    x = None
    for item, pair, q in zip(layers[:-1], slopes, scales, strict=True):
        m, r = middle_and_spread(pair)
        x = image_bound(congruence_bound(item, x), m, r, q)
    return congruence_bound(layers[-1], x)


def root_norm(g: Array) -> Array:
    """A bound on the root of the norm of a symmetric matrix, inf where it holds NaN."""
    return jnp.sqrt(constants.dense(g)) * (1 + 4 * UNIT)


def pairs(g: Array, chosen: Array) -> Array:
    """(e_y - e_j)' G (e_y - e_j) for all j, (k,), with y as the mask `chosen` (k,)."""
    diagonal, row = jnp.diag(g), jnp.sum(jnp.where(chosen[:, None], g, 0.0), axis=0)
    return jnp.sum(jnp.where(chosen, diagonal, 0.0)) + diagonal - 2 * row


def pair_bounds(g: Array, chosen: Array) -> Array:
    """Bounds (k,) on the roots of `pairs`, inf where g holds NaN."""
    value = pairs(g, chosen) + 32 * UNIT * jnp.max(jnp.abs(g))
    root = jnp.sqrt(jnp.maximum(value, 0.0) + FLOOR) * (1 + 4 * UNIT)
    return jnp.where(jnp.isnan(value), jnp.inf, root)


def product(values: Sequence[Array]) -> Array:
    """A product of bounds >= 0, rounded up; inf where one is not a number."""
    total = functools.reduce(lambda a, b: a * b * (1 + 4 * UNIT) + TINY, values, jnp.ones(()))
    return jnp.where(jnp.isfinite(total), total, jnp.inf)


def _lifted(matrix: Array, off: Array) -> Array:
    """A symmetric matrix above all that lie within `off` of this one, which is nearly symmetric."""
    return (matrix + matrix.T) / 2 + (2 * off + FLOOR) * jnp.eye(len(matrix))


def gamma_n(*sizes: int) -> float:
    """How far a product of such matrices may be off, relative to their Frobenius norms."""
    return 4 * (sum(sizes) + 4) * UNIT
