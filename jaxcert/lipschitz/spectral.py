"""The spectral norm of one matrix, proved from its computed singular value decomposition."""

import jax
import jax.numpy as jnp

from jaxcert.bounds.rounding import UNIT
from jaxcert.sets import Array

# LAPACK's error bound p(m, n) u ||A|| comes with an unspecified p, so it is not used. For ANY
# matrices U, S, V (Rump, BIT 51, 2011, section 3, has the same idea):
#
#   ||A|| <= ||U S V|| + ||A - U S V|| <= ||U|| max|S| ||V|| + ||A - U S V||_F,
#   ||U||^2 = ||U*U|| <= 1 + ||U*U - I||_F,   ||V||^2 = ||V V*|| <= 1 + ||V V* - I||_F.
#
# A good decomposition makes this tight, a bad one makes it large, never wrong. A computed product
# X Y with inner dimension n errs by at most gamma ||X||_F ||Y||_F, gamma = 4 (n + 4) u, real or
# complex, in any order of summation, with or without fused operations. Each slack term is doubled,
# which pays for the rounding in its own evaluation.


def proved_norm(matrix: Array) -> tuple[Array, Array, Array]:
    """An upper bound on ||A||_2 for entries of moderate size, with the first singular vectors."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    scaled = left * values
    gamma = 4 * (sum(matrix.shape) + 4) * UNIT
    remainder = frobenius(matrix - dot(scaled, right))
    remainder += gamma * (frobenius(scaled) * frobenius(right) + frobenius(matrix))
    stretch = _orthogonality(left, gamma) + _orthogonality(jnp.conj(right.T), gamma)
    # sqrt((1 + a) (1 + b)) <= 1 + (a + b) / 2.
    bound = jnp.max(jnp.abs(values)) * (1 + stretch) + 2 * remainder
    return bound * (1 + 8 * UNIT), left[:, 0], jnp.conj(right[0])


def _orthogonality(columns: Array, gamma: float) -> Array:
    """An upper bound on ||Q*Q - I||_F."""
    gram = dot(jnp.conj(columns.T), columns)
    error = gamma * (frobenius(columns) ** 2 + gram.shape[0])
    return 2 * (frobenius(gram - jnp.eye(gram.shape[0])) + error)


def dot(left: Array, right: Array) -> Array:
    """A product. `jnp.matmul` would name the result type, which vmap reads outside of the block."""
    return jax.lax.dot(left, right, precision=jax.lax.Precision.HIGHEST)


def frobenius(matrix: Array) -> Array:
    """||A||_F, up to rounding."""
    return jnp.sqrt(jnp.sum(jnp.abs(matrix) ** 2))
