"""Noisy copies of a batch, and what a model makes of them: what losses for smoothing share."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.model import Model
from jaxcert.smoothing.noise import Additive
from jaxcert.training.losses.checks import checked, described, is_array_of
from jaxcert.training.losses.lipschitz import offset_cross_entropy

Array: TypeAlias = jax.Array


def streams(key: Array) -> tuple[Array, Array]:
    """One key for the noise, the same in every loss, and one for all other draws of a loss."""
    if not is_array_of(jax.dtypes.prng_key, key) or jnp.ndim(key):
        raise TypeError(
            "key must be one typed key and comes first: loss(jax.random.key(0), f, x, y, ...)"
        )
    noise_key, other_key = jax.random.split(key)
    return noise_key, other_key


def draws(key: Array, x: Any, noise: Any, n: int) -> Array:
    """n draws of noise for each example, (n, b, *input): constants for gradients."""
    if not isinstance(noise, Additive):
        raise TypeError(
            f"noise must be a distribution that is added to inputs, got {noise!r}; type "
            "noise=smoothing.Gaussian(0.25), also to certify with GridGaussian(0.25)"
        )
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be a positive int, the number of noisy copies; got {n!r}")
    if not is_array_of(jnp.floating, x):
        raise TypeError(
            f"x must be a floating point array (b, *input), got {described(x)}; scale it the way "
            "the model expects, e.g. x.astype(jnp.float32) / 255"
        )
    if jnp.ndim(x) < 2:
        raise ValueError(
            f"x must have a batch axis first, (b, *input); got shape {jnp.shape(x)}: write x[None] "
            "and y[None] for one example"
        )

    def draw(key: Array) -> Array:
        return noise.sample(key, x.shape[1:], x.dtype).astype(x.dtype)

    keys = jax.random.split(key, (n, x.shape[0]))
    return jax.lax.stop_gradient(jax.vmap(jax.vmap(draw))(keys))


def stacked_logits(f: Model, copies: Array) -> Array:
    """f on all copies (n, b, *input) in one call of n b rows: logits (n, b, k)."""
    n, b = copies.shape[:2]
    logits = f(copies.reshape(n * b, *copies.shape[2:]))
    if not is_array_of(jnp.floating, logits) or logits.ndim != 2 or len(logits) != n * b:
        raise TypeError(
            f"the model must map {(n * b, *copies.shape[2:])} to floating point logits "
            f"({n * b}, k), got {described(logits)}"
        )
    return logits.reshape(n, b, -1)


# With the logits z_i of copy i, the soft smoothed model is p = 1/n sum_i softmax(z_i). Its
# logarithm is a sum of exponentials of logarithms, so that it and its gradient stay finite and
# precise where a softmax rounds to 0 or 1.


def log_mean_softmax(logits: Array) -> Array:
    """log p of logits (n, b, k), as (b, k)."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(jnp.asarray(len(logits), logits.dtype))


def of_label(values: Array, own: Array) -> Array:
    """The entry of each example's label, (b, k) -> (b,); NaN where the label is no class."""
    value = jnp.sum(jnp.where(own, values, 0), axis=-1)
    return jnp.where(jnp.any(own, axis=-1), value, jnp.nan)


def divergence(log_target: Array, log_p: Array) -> Array:
    """KL(target || p) of distributions given by their logarithms, along the last axis."""
    return jnp.sum(jnp.exp(log_target) * (log_target - log_p), axis=-1)


def cross_entropies(logits: Array, labels: Any) -> Array:
    """CE of every copy, (n, b, k) and (b,) -> (n, b)."""
    checked(logits[0], labels)  # whose messages speak of b labels
    n, b, k = logits.shape
    losses = offset_cross_entropy(
        logits.reshape(n * b, k), jnp.tile(jnp.asarray(labels), n), offset=0.0, temperature=1.0
    )
    return losses.reshape(n, b)


def mean_cross_entropy(logits: Array, labels: Any) -> Array:
    """The average over the copies, (b,)."""
    return jnp.mean(cross_entropies(logits, labels), axis=0)
