"""Losses at adversaries of the smoothed model.

smooth_adv   cross-entropy there (SmoothAdv)
smooth_mix   less confidence on the way there (SmoothMix)
cat_rs       the worst noise, for what is right under all of the noise (CAT-RS)

What they share with each other and with those of `smoothing.py` is written there. How far
an adversary goes is an `Ascent`; each of its steps calls f once and differentiates it in its input.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from jaxcert.model import Model
from jaxcert.sets import per_example
from jaxcert.training.losses.checks import checked, require_distributions, scalar
from jaxcert.training.losses.noisy import (
    cross_entropies,
    divergence,
    draws,
    log_mean_softmax,
    mean_cross_entropy,
    stacked_logits,
    streams,
)
from jaxcert.training.losses.smoothing_attack import (
    Ascent,
    adversary_of,
    ascend,
    require_ascent,
    without_updates,
)

Array: TypeAlias = jax.Array


def smooth_adv(
    key: Array, f: Model, x: Any, y: Any, *, noise: Any, ascent: Ascent, n: int = 4
) -> Array:
    """Cross-entropy of noisy copies of an adversary, which knows their noise (SmoothAdv).

    1/n sum_i CE(f(x' + delta_i), y) with x' = `smoothed_adversary(...)` of the same draws (Salman
    et al., NeurIPS 2019, with PGD; in the experiments on MNIST eps = 1, 10 steps and n = 4, eps
    growing from 0 over the first 10 epochs).

    Args:
      key, f, x, y, noise, n: see `smoothing.py`; each step of the ascent, too, takes n b rows.
      ascent: `Ascent(eps, steps, valid=Box(0.0, 1.0))`.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y, ascent = jnp.array([[1.0]]), jnp.array([0]), Ascent(eps=0.5, steps=2)
      >>> loss = jax.jit(
      ...     lambda key: smooth_adv(key, f, x, y, noise=Gaussian(0.01), ascent=ascent)
      ... )
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))  # the cross-entropy at 0.5
      [0.3]
    """
    noise_key, _ = streams(key)
    delta = draws(noise_key, x, noise, n)
    worst = adversary_of(f, x, y, delta, ascent)
    return mean_cross_entropy(stacked_logits(f, worst + delta), y)


def smooth_mix(
    key: Array,
    f: Model,
    x: Any,
    y: Any,
    *,
    noise: Any,
    ascent: Ascent,
    n: int = 2,
    weight: Any = 5.0,
) -> Array:
    """Cross-entropy of noisy copies, and less confidence the nearer an adversary is (SmoothMix).

    With the average softmax p of the copies, x' = `smoothed_adversary(...)` of the same draws and a
    share s, uniform in (0, 1/2), the loss is 1/n sum_i CE(f(x + delta_i), y) and, where p is right,
    weight 1/n sum_i KL((1 - s) p + s / k || softmax(f((1 - s) x + s x' + delta_i))) (Jeong et al.,
    NeurIPS 2021). Gradients go through p, as in the authors' code. Its ascent has steps of length
    alpha and no ball: `Ascent(eps=4 * alpha, steps=4, size=alpha, valid=Box(0.0, 1.0))`, with a
    weight that grows to 5 over the first 10 epochs.

    Their variant with a one-step adversary passes `smoothed_adversary(key, ..., ascent=Ascent(
    eps=alpha, steps=1, size=alpha, ...))` in place of x, with the same key, and one step less here.

    Args:
      key, f, x, y, noise, n: see `smoothing.py`; after the ascent f sees 2 n b rows.
      ascent: an `Ascent`.
      weight: eta, a scalar, 0 or more.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y = jnp.array([[0.5]]), jnp.array([1])
      >>> ascent = Ascent(eps=1.0, steps=2, size=0.5)
      >>> loss = jax.jit(
      ...     lambda key: smooth_mix(key, f, x, y, noise=Gaussian(0.01), ascent=ascent)
      ... )
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))  # misclassified: cross-entropy alone
      [1.3]
    """
    noise_key, mix_key = streams(key)
    delta = draws(noise_key, x, noise, n)
    worst = adversary_of(f, x, y, delta, ascent)
    # A share of 0 would leave classes of probability 0, whose logarithm has no gradient.
    least = jnp.finfo(x.dtype).eps
    share = jax.random.uniform(mix_key, x.shape[:1], x.dtype, minval=least, maxval=0.5)
    mixed = x + per_example(share, x) * (worst - x)
    logits = stacked_logits(f, jnp.concatenate([x + delta, mixed + delta]))
    weight = scalar(weight, "weight", logits)
    average, own = checked(log_mean_softmax(logits[:n]), y)
    share, k = share[:, None].astype(logits.dtype), logits.shape[-1]
    target = jnp.log((1 - share) * jnp.exp(average) + share / k)
    mixing = jnp.mean(divergence(target, jax.nn.log_softmax(logits[n:])), axis=0)
    right = jnp.any(own & (average == jnp.max(average, axis=-1, keepdims=True)), axis=-1)
    return mean_cross_entropy(logits[:n], y) + weight * jnp.where(right, mixing, 0)


def cat_rs(
    key: Array,
    f: Model,
    x: Any,
    y: Any,
    *,
    targets: Any,
    noise: Any,
    ascent: Ascent,
    n: int = 4,
    weight: Any = 1.0,
) -> Array:
    """Cross-entropy of the easiest copies, as many as are right, and the worst one if all are.

    Confidence-aware training (Jeong, Kim and Shin, AAAI 2023). K is drawn from the binomial
    distribution of n draws whose probability is the share of copies that f classifies as y. The
    loss is 1/n times the sum of the max(K, 1) smallest CE(f(x + delta_i), y) and, if K = n,
    weight max_i KL(targets || softmax(f(x + delta'_i))), where each delta'_i is an ascent of that
    divergence from delta_i that afterwards has the mean and the standard deviation of delta_i
    again, and so may end a little outside of the ball.

    Deviation: the authors' code scales by the root of the mean square around 0, which keeps neither
    exactly.

    Args:
      key, f, x, y, noise: see `smoothing.py`; f is called with n b rows before the ascent and again
        after it, and is called and differentiated in its input in each step, with n b rows.
      targets: probabilities (b, k), constants: in the paper what a model trained by
        `noisy_cross_entropy` predicts on average under noise.
      ascent: an `Ascent` without `valid`, since noise has no valid range; eps = 1 and 4 steps in
        the paper.
      n: noisy copies.
      weight: lambda, a scalar, 0 or more.

    Returns:
      Losses (b,), at least 0 up to rounding.

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> f = lambda x: jnp.stack([x.sum(1), -x.sum(1)], axis=1)
      >>> x, y, targets = jnp.array([[0.5, 0.5]]), jnp.array([1]), jnp.array([[0.9, 0.1]])
      >>> settings = {"noise": Gaussian(0.01), "ascent": Ascent(eps=0.1, steps=2)}
      >>> loss = jax.jit(lambda key: cat_rs(key, f, x, y, targets=targets, **settings))
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))  # K = 0: the smallest of four losses, 2.1, over 4
      [0.5]
    """
    _require_noise_ascent(ascent, x)
    noise_key, accept_key = streams(key)
    delta = draws(noise_key, x, noise, n)
    logits = stacked_logits(f, x + delta)
    weight = scalar(weight, "weight", logits)
    targets = require_distributions(targets, "targets", logits[0])
    _, own = checked(logits[0], y)
    right = jnp.any(own & (logits == jnp.max(logits, axis=-1, keepdims=True)), axis=-1)
    accepted = jax.random.uniform(accept_key, right.shape) < jnp.mean(right, axis=0)
    kept = jnp.sum(accepted, axis=0)
    losses = jnp.sort(cross_entropies(logits, y), axis=0)
    easiest = jnp.arange(n)[:, None] < jnp.maximum(kept, 1)
    low = jnp.sum(jnp.where(easiest, losses, 0), axis=0) / n
    delta = _standardised_ascent(f, x, delta, targets, ascent)
    high = jnp.max(_distance(stacked_logits(f, x + delta), targets), axis=0)
    return low + weight * jnp.where(kept == n, high, 0)


def _distance(logits: Array, targets: Array) -> Array:
    """KL(targets || softmax(logits)), (n, b, k) -> (n, b)."""
    return jnp.sum(xlogy(targets, targets) - targets * jax.nn.log_softmax(logits), axis=-1)


def _standardised_ascent(f: Model, x: Array, delta: Array, targets: Array, ascent: Ascent) -> Array:
    """Every draw moved away from the targets, with its mean and standard deviation kept."""
    axes = tuple(range(2, delta.ndim))

    def moments(noise: Array) -> tuple[Array, Array]:
        return jnp.mean(noise, axes, keepdims=True), jnp.std(noise, axes, keepdims=True)

    mean, deviation = moments(delta)

    def standardise(rows: Array) -> Array:
        noise = rows.reshape(delta.shape)
        centre, scale = moments(noise)
        unit = jnp.where(scale > 0, (noise - centre) / jnp.where(scale > 0, scale, 1), 0)
        return (mean + deviation * unit).reshape(rows.shape)

    f = without_updates(f)

    def objective(rows: Array) -> Array:
        return _distance(stacked_logits(f, x + rows.reshape(delta.shape)), targets).ravel()

    rows = delta.reshape(-1, *delta.shape[2:])
    return ascend(objective, rows, _for_copies(ascent, len(delta)), standardise).reshape(
        delta.shape
    )


def _for_copies(ascent: Ascent, n: int) -> Ascent:
    """An ascent of b examples for the n b rows of their copies."""

    def tiled(value: Any) -> Any:
        return jnp.tile(jnp.asarray(value), n) if jnp.ndim(value) else value

    size = None if ascent.size is None else tiled(ascent.size)
    return Ascent(tiled(ascent.eps), ascent.steps, size)


def _require_noise_ascent(ascent: Any, x: Any) -> None:
    require_ascent(ascent, x)
    if ascent.valid is not None:
        raise ValueError(
            "cat_rs moves the noise, which has no valid range; type Ascent(eps, steps)"
        )
