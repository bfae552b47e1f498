"""Parametrisations of dense layers: free weights to weights whose spectral norm is at most 1.

Every map below has norm at most 1 in exact arithmetic for ALL free weights and after ANY number of
steps: none divides by an estimate that converges from below, and none keeps state. Results count as
stored weights (`jaxcert.blocks.parametrised`); what is certified is proved anew from the numbers
they come out as, so rounding, too, shows in the constant.

    spectral  W / b with b >= ||W||, a Gram iteration; the other singular values stay as they are
    bjorck    all singular values to 1 (Bjorck and Bowie, 1971)
    cayley    exactly orthogonal (Trockman and Kolter, ICLR 2021; Wang and Manchester, ICML 2023)
    bro       I - 2 P for a projector P of low rank (Lai et al., ICML 2025)
    aol       rescaled rows or columns (Prach and Lampert, ECCV 2022)

and the weights of whole blocks: `sll` and `cpl` (scales of residual blocks), `sandwich`. Kernels
are Flax's, (d_in, d_out); layers are x @ kernel. Convolutions: `parametrise_conv.py`.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision

from jaxcert.blocks import parametrised
from jaxcert.sets import Array

_TINY = 1e-12


@parametrised
def spectral(kernel: Array, *, steps: int = 6) -> Array:
    """W / b, where b >= ||W|| is `gram_bound`; within n^(1 / 2^(steps + 1)) of norm 1.

    Args:
      kernel: (d_in, d_out).
      steps: of the Gram iteration, a product of matrices each.
    """
    return kernel / gram_bound(kernel, steps)


@parametrised
def bjorck(kernel: Array, *, steps: int = 15) -> Array:
    """The nearest orthogonal matrix, by cubic steps (Bjorck and Bowie, 1971).

    A step W <- 1.5 W - 0.5 W W^T W maps each singular value s to 1.5 s - 0.5 s^3, which lies in
    [0, 1] for s in [0, sqrt(3)], and in [s, 1] for s in [0, 1]. W is scaled first by a bound b on
    its norm: up to b = 1, down to b = 1.5, and not at all between them, where a matrix that is
    nearly orthogonal lies, so that the derivative there is the projection on its tangent space.

    Args:
      kernel: (d_in, d_out).
      steps: at least 1; 12 lift a singular value 0.05 to 1.000 and 0.01 to 0.89.
    """
    if steps < 1:
        raise ValueError(f"bjorck takes at least 1 step, which bounds the norm, got {steps}")
    bound = gram_bound(kernel, 3)
    kernel = kernel / jnp.where(bound < 1, bound, jnp.maximum(1.0, bound / 1.5))
    tall = kernel.shape[0] >= kernel.shape[1]
    for _ in range(steps):
        if tall:
            cube = product(kernel, product(kernel.T, kernel))
        else:
            cube = product(product(kernel, kernel.T), kernel)
        kernel = 1.5 * kernel - 0.5 * cube
    return kernel


@parametrised
def cayley(kernel: Array) -> Array:
    """A matrix with orthonormal columns or rows: the Cayley transform of a skew matrix.

    With U the square part of the tall kernel and V the rest, A = U - U^T + V^T V,
    Q = [(I - A) (I + A)^-1; -2 V (I + A)^-1] (Trockman and Kolter, 2021, for U alone; Wang and
    Manchester, 2023). I + A has the symmetric part I + V^T V, so it is never singular.
    """
    if kernel.shape[0] < kernel.shape[1]:
        return tall_cayley(kernel.T).T
    return tall_cayley(kernel)


def tall_cayley(tall: Array) -> Array:
    """`cayley` of real or complex matrices (..., m, n) with m >= n."""
    n = tall.shape[-1]
    square, rest = tall[..., :n, :], tall[..., n:, :]
    skew = square - adjoint(square) + product(adjoint(rest), rest)
    one = jnp.eye(n, dtype=tall.dtype)
    # Q (I + A) = [I - A; -2 V], solved from the right.
    right = jnp.concatenate([one - skew, -2 * rest], axis=-2)
    return adjoint(jnp.linalg.solve(adjoint(one + skew), adjoint(right)))


@parametrised
def bro(free: Array) -> Array:
    """I - 2 V (V^T V + e I)^-1 V^T for V = free (n, m) with m <= n, symmetric (n, n).

    A reflection at the span of V (Lai et al., ICML 2025), whose eigenvalues are
    1 - 2 s^2 / (s^2 + e), in [-1, 1] for every e >= 0; here e is 1e-5 of the sum of s^2.
    """
    basis = span(free)
    return jnp.eye(free.shape[0], dtype=free.dtype) - 2 * product(basis, basis.T)


def span(free: Array) -> Array:
    """P (..., n, m) with P P* = V (V* V + e I)^-1 V* for V = free, real or complex."""
    gram = product(adjoint(free), free)
    trace = jnp.real(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None]
    gram = gram + (1e-5 * trace + _TINY) * jnp.eye(gram.shape[-1], dtype=gram.dtype)
    root = jnp.linalg.cholesky(gram)  # V*V + e I = R R*, so P* = R^-1 V*
    return adjoint(jax.lax.linalg.triangular_solve(root, adjoint(free), left_side=True, lower=True))


@parametrised
def aol(kernel: Array) -> Array:
    """Columns (or rows) w_i of the kernel times (sum_j |<w_i, w_j>|)^(-1/2).

    With D that diagonal, D W^T W D is similar to a matrix whose absolute rows sum to 1 (Prach and
    Lampert, ECCV 2022, Theorem 1). The shorter side of the kernel is rescaled, for which
    orthonormal vectors are a fixed point.
    """
    if kernel.shape[0] < kernel.shape[1]:
        return (kernel.T * normaliser(jnp.abs(product(kernel, kernel.T)))).T
    return kernel * normaliser(jnp.abs(product(kernel.T, kernel)))


@parametrised
def unit_columns(kernel: Array) -> Array:
    """Each column over its norm: the weight rows of a last layer, one per class."""
    return kernel * jax.lax.rsqrt(jnp.sum(kernel**2, axis=0) + _TINY)


@parametrised
def unit_sums(kernel: Array) -> Array:
    """Each column over its L1 norm: weights of a 1-Lipschitz map in Linf."""
    return kernel / (jnp.sum(jnp.abs(kernel), axis=0) + _TINY)


@parametrised
def directions(angle: Array) -> Array:
    """The unit vectors (cos, sin) of angles (d,), stacked to (2, d)."""
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


@parametrised
def exponential(free: Array) -> Array:
    """exp, for positive weights."""
    return jnp.exp(free)


def normaliser(gram: Array) -> Array:
    """(sum_j |G|_ij)^(-1/2)."""
    return jax.lax.rsqrt(jnp.sum(gram, axis=0) + _TINY)


# --- weights of blocks ----------------------------------------------------------------------------
# Residual blocks x - W D relu(W^T x + b) are 1-Lipschitz where D^(1/2) W^T W D^(1/2) <= 2 I. For a
# convolution, W^T W is the convolution with the correlations of the kernel's output channels at all
# offsets; the sums over offsets of their sizes, |G|, bound its rows for every image and padding.


@parametrised
def sll(kernel: Array, log_scale: Array) -> Array:
    """The scales D = 2 / T of an SLL block, (m,), with T_i = sum_j |G|_ij q_j / q_i.

    T - W^T W is diagonally dominant after a similarity with q = exp(log_scale) (Araujo et al., ICLR
    2023).

    Args:
      kernel: W, (d, m), or (*window, c, m) for a convolution.
      log_scale: (m,).
    """
    q = jnp.exp(log_scale)
    return 2 * q / (product(absolute_gram(kernel), q) + _TINY * q)


@parametrised
def cpl(kernel: Array) -> Array:
    """The scales 2 / b^2 of a CPL block, b >= ||W|| (Meunier et al., ICML 2022), (m,).

    For a convolution b^2 bounds the norm of |G|, which bounds that of W^T W at every frequency.
    """
    if kernel.ndim == 2:
        square = gram_bound(kernel, 6) ** 2
    else:
        square = gram_bound(absolute_gram(kernel), 6)
    return jnp.full(kernel.shape[-1], 2 / square)


def absolute_gram(kernel: Array) -> Array:
    """Sums over offsets of |correlations| of the output channels of a kernel, (m, m)."""
    if kernel.ndim == 2:
        return jnp.abs(product(kernel.T, kernel))
    rank = kernel.ndim - 2
    space = "DHW"[3 - rank :]
    # Output channels as images, (m, *window, c), correlated with each other at every overlap.
    images = jnp.moveaxis(kernel, -1, 0)
    correlations = jax.lax.conv_general_dilated(
        images,
        kernel,
        (1,) * rank,
        [(k - 1, k - 1) for k in kernel.shape[:rank]],
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision=Precision.HIGHEST,
    )
    return jnp.sum(jnp.abs(correlations), axis=tuple(range(1, rank + 1)))


@parametrised
def sandwich(free: Array, *, d_out: int) -> tuple[Array, Array]:
    """A (m, d_out) and B (m, d_in) with A A^T + B B^T = I, or A^T A = I, B^T B = I, A^T B = 0.

    Args:
      free: (d_out + d_in, m); the first case is d_out + d_in >= m.
    """
    both = tall_cayley(free).T if free.shape[0] >= free.shape[1] else tall_cayley(free.T)
    return both[:, :d_out], both[:, d_out:]


# --- bounds on the norm that cost a few products --------------------------------------------------


def gram_bound(kernel: Array, steps: int = 6) -> Array:
    """||W|| <= ||(W^T W)^(2^(t - 1))||_F^(2^-t), t = steps (Delattre et al., ICML 2023).

    In the kernel's own float type and differentiable, for training; `lipschitz.gram_bound` is the
    same with its rounding counted. The powers are kept at norm 1 and their logarithm carried. A
    kernel of zeros has the bound 1e-12.
    """
    gram = (
        product(kernel.T, kernel)
        if kernel.shape[0] >= kernel.shape[1]
        else product(kernel, kernel.T)
    )
    logarithm = jnp.zeros((), kernel.dtype)
    for step in range(steps):
        if step:
            gram = product(gram, gram)
        size = jnp.sqrt(jnp.sum(gram**2) + _TINY**2)
        gram, logarithm = gram / size, 2 * logarithm + jnp.log(size)
    return jnp.exp(logarithm / 2**steps)


def product(left: Array, right: Array) -> Array:
    """A product in full precision, on accelerators too."""
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


def adjoint(matrix: Array) -> Array:
    """The conjugate transpose."""
    return jnp.conj(jnp.swapaxes(matrix, -1, -2))
