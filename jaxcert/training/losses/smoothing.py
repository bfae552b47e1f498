"""Losses that make a model's predictions hold under noise, for `smoothing.certify`.

noisy_cross_entropy   cross-entropy of noisy copies (Gaussian augmentation)
stability             clean cross-entropy, and noisy predictions like the clean one
consistency           noisy predictions like their average, which is confident
macer                 the certified radius itself, by a hinge (MACER)

`smoothing_adversarial.py` has those that also attack the model: smooth_adv, smooth_mix, cat_rs.

All are pure, `loss(key, f, x, y, *, noise, n, ...)`, and return one loss per example (b,), in the
logits' float type; the caller takes the mean. They go through `jit`, `vmap` and `grad`, with finite
gradients wherever the logits are finite. The formulas are those of the papers and of their authors'
code; where they differ from either, it is said. They train, and prove nothing.

What they share:

  key    a scalar `jax.random.key`, a new one for each step. The same key gives the same noise in
         all of these losses.
  f      the model, (rows, *input) -> (rows, k), rows independent. Close over the parameters to be
         trained: `lambda z: model.apply(params, z)`, or an NNX module.
  x      floats (b, *input).
  y      int (b,), the labels. One outside of 0, ..., k - 1 is an error where its value is known,
         and a loss of NaN where it is traced.
  noise  a distribution that is added (`smoothing.noise.Additive`), such as
         `smoothing.Gaussian(0.5)`: the one to certify with. Draws are constants for gradients.
  n      noisy copies of each example. f sees them in one batch of n b rows, so that the memory is
         n b (d + the activations of a row) floats. Where a loss calls f more often, it says so.

  All raise TypeError or ValueError for arguments of other types, shapes or ranges.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from jaxcert.model import Model
from jaxcert.smoothing import Gaussian
from jaxcert.training.losses.checks import checked, scalar
from jaxcert.training.losses.noisy import (
    divergence,
    draws,
    log_mean_softmax,
    mean_cross_entropy,
    of_label,
    stacked_logits,
    streams,
)

Array: TypeAlias = jax.Array


def noisy_cross_entropy(key: Array, f: Model, x: Any, y: Any, *, noise: Any, n: int = 1) -> Array:
    """Cross-entropy of noisy copies, averaged: training with noise as augmentation.

    1/n sum_i CE(f(x + delta_i), y), after Cohen, Rosenfeld and Kolter (ICML 2019) with n = 1.

    Args:
      key, f, x, y, noise, n: see the module.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y = jnp.array([[1.0], [1.0]]), jnp.array([0, 1])
      >>> loss = jax.jit(lambda key: noisy_cross_entropy(key, f, x, y, noise=Gaussian(0.01)))
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))
      [0.1 2.1]
    """
    noise_key, _ = streams(key)
    return mean_cross_entropy(stacked_logits(f, x + draws(noise_key, x, noise, n)), y)


def stability(
    key: Array, f: Model, x: Any, y: Any, *, noise: Any, n: int = 1, weight: Any = 2.0
) -> Array:
    """Cross-entropy of the clean example, and noisy predictions that stay with the clean one.

    CE(f(x), y) + weight 1/n sum_i H(p(x), p(x + delta_i)) with p = softmax(f) and the cross-entropy
    H(p, q) = -sum p log q (Li, Chen, Wang and Carin, NeurIPS 2019). Gradients go through both
    arguments of H, as in the code of Jeong and Shin (NeurIPS 2020), whose weight is 2 on MNIST.

    Args:
      key, f, x, y, noise, n: see the module; f sees (n + 1) b rows.
      weight: of the second term, a scalar, 0 or more.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y = jnp.array([[1.0]]), jnp.array([0])
      >>> loss = jax.jit(lambda key: stability(key, f, x, y, noise=Gaussian(0.01)))
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))  # 0.13 + 2 * 0.37
      [0.9]
    """
    noise_key, _ = streams(key)
    delta = draws(noise_key, x, noise, n)
    logits = stacked_logits(f, jnp.concatenate([x[None], x + delta]))
    weight = scalar(weight, "weight", logits)
    clean, noisy = jax.nn.softmax(logits[0]), jax.nn.log_softmax(logits[1:])
    stays = -jnp.mean(jnp.sum(clean * noisy, axis=-1), axis=0)
    return mean_cross_entropy(logits[:1], y) + weight * stays


def consistency(
    key: Array,
    f: Model,
    x: Any,
    y: Any,
    *,
    noise: Any,
    n: int = 2,
    weight: Any = 10.0,
    entropy: Any = 0.5,
) -> Array:
    """Cross-entropy of noisy copies whose predictions agree with their average, a confident one.

    With p_i = softmax(f(x + delta_i)) and their average p, the loss is
    1/n sum_i CE_i + weight 1/n sum_i KL(p || p_i) + entropy H(p) (Jeong and Shin, NeurIPS 2020; on
    MNIST weight 10 for sigma 0.25 and 5 for more, n = 2). Gradients go through the average.

    Args:
      key, f, x, y, noise: see the module.
      n: noisy copies, 2 or more.
      weight: lambda, a scalar, 0 or more.
      entropy: eta, a scalar, 0 or more.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y = jnp.array([[1.0]]), jnp.array([0])
      >>> loss = jax.jit(lambda key: consistency(key, f, x, y, noise=Gaussian(0.01)))
      >>> with jnp.printoptions(precision=1):
      ...     print(loss(jax.random.key(0)))  # 0.13 + 0.5 * 0.37
      [0.3]
    """
    _require_copies(n, 2, "an average that differs from each of them")
    noise_key, _ = streams(key)
    logits = stacked_logits(f, x + draws(noise_key, x, noise, n))
    weight, entropy = scalar(weight, "weight", logits), scalar(entropy, "entropy", logits)
    average = log_mean_softmax(logits)
    disagreement = jnp.mean(divergence(average, jax.nn.log_softmax(logits)), axis=0)
    uncertainty = -jnp.sum(jnp.exp(average) * average, axis=-1)
    return mean_cross_entropy(logits, y) + weight * disagreement + entropy * uncertainty


# MACER's radius is sigma / 2 xi with xi = Phi^-1(p_y) - Phi^-1(max over j != y of p_j), where
# p = 1/n sum_i softmax(beta f(x + delta_i)), and its loss, for what p classifies correctly,
# sigma / 2 (gamma - xi)_+. With q = 1 - p_y as the sum of the other p_j, Phi^-1(p_y) = -Phi^-1(q)
# keeps its precision where p_y rounds to 1. A p_j that rounds to 0 has a large xi and no loss.


def macer(
    key: Array,
    f: Model,
    x: Any,
    y: Any,
    *,
    noise: Gaussian,
    n: int = 16,
    weight: Any = 16.0,
    margin: Any = 8.0,
    beta: Any = 16.0,
) -> Array:
    """Cross-entropy of the soft smoothed model, plus a hinge on its certified radius (MACER).

    -log 1/n sum_i softmax(f(x + delta_i))_y, plus weight sigma / 2 (margin - xi)_+ for examples
    that are classified correctly, where sigma / 2 xi is the radius of Cohen et al. for the average
    softmax of beta f (Zhai et al., ICLR 2020; the defaults are those for MNIST, where the second
    term starts a third into the training).

    Deviation: for the logarithm the authors' code adds 1e-10 to the probability, and where p_y
    rounds to 1 it drops the example; here logarithms are taken of sums, and nothing is dropped.

    Args:
      key, f, x, y, n: see the module.
      noise: a `smoothing.Gaussian`, whose radius it is.
      weight: lambda, a scalar, 0 or more.
      margin: gamma, in units of sigma / 2, a scalar above 0.
      beta: inverse temperature, a scalar above 0.

    Returns:
      Losses (b,), at least 0.

    Example:
      >>> f = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x, y = jnp.array([[0.1], [10.0], [-10.0]]), jnp.array([0, 0, 0])
      >>> loss = jax.jit(lambda key: macer(key, f, x, y, noise=Gaussian(0.01), beta=1.0))
      >>> with jnp.printoptions(precision=0, suppress=True):
      ...     print(loss(jax.random.key(0)))
      [ 1.  0. 20.]
    """
    if not isinstance(noise, Gaussian):
        raise TypeError(
            f"macer maximises the radius of Gaussian noise, got {type(noise).__name__}; type "
            "noise=smoothing.Gaussian(0.25), or take a loss for any noise such as consistency"
        )
    noise_key, _ = streams(key)
    logits = stacked_logits(f, x + draws(noise_key, x, noise, n))
    weight, margin = scalar(weight, "weight", logits), scalar(margin, "margin", logits, above=True)
    beta = scalar(beta, "beta", logits, above=True)
    average, own = checked(log_mean_softmax(logits), y)
    lacking = jax.nn.relu(margin - _quantile_gap(log_mean_softmax(beta * logits), own))
    return -of_label(average, own) + weight * noise.sigma / 2 * lacking


def _quantile_gap(log_p: Array, own: Array) -> Array:
    """xi, (b,); infinite, with gradient 0, for what is misclassified or beyond float range."""
    rival = jnp.max(jnp.where(own, -jnp.inf, log_p), axis=-1)
    others = jax.nn.logsumexp(log_p, axis=-1, where=~own)
    smallest = jnp.log(jnp.finfo(log_p.dtype).tiny)
    counts = (of_label(log_p, own) > rival) & (rival > smallest)
    q, second = (jnp.exp(jnp.where(counts, value, -2.0)) for value in (others, rival))
    return jnp.where(counts, -ndtri(q) - ndtri(second), jnp.inf)


def _require_copies(n: Any, least: int, purpose: str) -> None:
    if isinstance(n, int) and 0 < n < least:
        raise ValueError(f"n must be at least {least}, for {purpose}; got {n}")
