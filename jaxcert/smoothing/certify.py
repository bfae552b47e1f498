"""Randomized smoothing: certify and predict with the smoothed model g.

g(x) is the class that f most likely returns on x + noise. It cannot be evaluated, only sampled, so
that every statement here holds with probability 1 - alpha over the key, per input.
"""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.certificate import ABSTAIN, Certificate, issue
from jaxcert.model import Model, Structure, is_traced, split
from jaxcert.smoothing.confidence import clopper_pearson_lower, leader_is_certain
from jaxcert.smoothing.noise import Noise
from jaxcert.smoothing.sampling import count_votes, rows_apart

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class SmoothingPlan:
    """How to sample; static, so that a new plan compiles anew.

    Attributes:
      noise: the distribution, `Gaussian(sigma)`.
      n0: draws that select the class to certify (N0 in Cohen et al.).
      n: draws that estimate its probability (N). The radius cannot pass that of
        p = alpha^(1/n): 3.2, 3.8, 4.3 sigma for n = 10^4, 10^5, 10^6 at alpha = 1e-3.
      alpha: probability, per input, of a wrong certificate.
      chunk: noisy copies per forward pass, of one image at a time. Memory is
        chunk (d + activations per row) floats. The default suits CPUs, where larger ones leave
        the cache; take as much as fits on an accelerator. f's logits, and so the certified
        function, may depend on it in the last bit.

    Raises:
      TypeError: for a noise that is no distribution.
      ValueError: for numbers no plan can have, or an n too small for any certificate at alpha.
    """

    noise: Noise
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    chunk: int = 400

    def __post_init__(self):
        if not isinstance(self.noise, Noise):
            raise TypeError(
                f"noise must be a distribution, got {self.noise!r}; type noise=Gaussian(0.25)"
            )
        for name in ("n0", "n", "chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} must be a positive int, got {value!r}; e.g. {name}=100")
        if not 1e-300 <= self.alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {self.alpha}; type alpha=1e-3")
        if self.n + self.n0 >= 2**31:
            raise ValueError(
                f"n + n0 must be below 2^31, got {self.n + self.n0}; take n=1_000_000, the radius "
                "gains next to nothing beyond"
            )
        # n votes of n prove p > alpha^(1/n), which must exceed 1/2: 2^-n < alpha.
        needed = math.floor(math.log2(1 / self.alpha)) + 1
        if self.n < needed:
            raise ValueError(
                f"n={self.n} draws can certify nothing at alpha={self.alpha}: even if all agree "
                f"the bound alpha^(1/n) is at most 1/2; take n >= {needed}"
            )


def certify(key: Array, f: Model, x: Any, plan: SmoothingPlan, *, index: Any = None) -> Certificate:
    """The radius within which the smoothed model g predicts what it predicts at x.

    CERTIFY of Cohen, Rosenfeld and Kolter (ICML 2019): select the class c by n0 votes, bound its
    probability from below by n fresh ones (Clopper-Pearson), R = sigma Phi^-1(p_lower), abstain
    where p_lower <= 1/2. Every image keeps its own confidence 1 - alpha; the probability that some
    certificate of m is wrong is at most alpha m.

    Args:
      key: a scalar `jax.random.key`. One key gives one result: the votes of image i depend on
        key, index[i] and x[i] alone, not on the batch it comes in.
      f: the model, (b, *input) -> (b, k), in eval mode. A pytree model's arrays are arguments of
        the compiled function: a second net of the same shapes compiles nothing.
      x: floats (b, *input). An image that is not finite gets `ABSTAIN`.
      plan: a `SmoothingPlan`.
      index: ints (b,), the numbers of the images in their data set; default arange(b).

    Returns:
      A `Certificate` about g with norm `plan.noise.norm` and confidence 1 - alpha.

    Raises:
      TypeError, ValueError: for integer images, a missing batch axis, a raw uint32 key, an index
        of another shape, a model that returns anything but float logits (b, k) with k >= 2.
      MixedRows: an example's output depends on other examples, so that the votes of a chunk would
        not be independent (batch normalisation in training mode).
      StatefulModel: each call of the model is another function (active dropout).

    Example:
      >>> from jaxcert.smoothing import Gaussian
      >>> plan = SmoothingPlan(noise=Gaussian(0.5), n=2000)
      >>> sign = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> x = jnp.array([[1.0], [0.0]])  # the exact radius is |x|
      >>> certificate = certify(jax.random.key(0), sign, x, plan)
      >>> print(certificate.prediction, 0.8 < certificate.radius[0] < 1)
      [ 0 -1] True
    """
    x, index = _checked(key, x, plan, index)
    arrays, structure = split(f, x)
    return _certify(arrays, key, x, index, structure=structure, plan=plan)


def predict(key: Array, f: Model, x: Any, plan: SmoothingPlan, *, index: Any = None) -> Array:
    """The class g predicts, or `ABSTAIN`; wrong with probability at most alpha per input.

    PREDICT of Cohen, Rosenfeld and Kolter (ICML 2019), with the two-sided test of Hung and Fithian
    (Annals of Statistics 2019) between the two leading classes of plan.n votes. Arguments and
    errors as for `certify`; with the same key it sees the same draws, so that a check of one by
    the other needs a second key.

    Returns:
      int32 (b,).
    """
    x, index = _checked(key, x, plan, index)
    arrays, structure = split(f, x)
    return _predict(arrays, key, x, index, structure=structure, plan=plan)


@functools.partial(jax.jit, static_argnames=("structure", "plan"))
def _certify(
    arrays: list, key: Array, x: Array, index: Array, *, structure: Structure, plan: SmoothingPlan
) -> Certificate:
    estimation, selection = _votes(arrays, key, x, index, structure, plan, plan.n0)
    top = jnp.argmax(selection, axis=1)
    successes = jnp.take_along_axis(estimation, top[:, None], axis=1)[:, 0]
    with jax.enable_x64(True):
        p_lower = clopper_pearson_lower(successes, plan.n, plan.alpha)
        radius = plan.noise.radius(p_lower)
        prediction = jnp.where(radius > 0, top, ABSTAIN)
    # 1 is kept for proofs, however small alpha is.
    confidence = min(1 - plan.alpha, math.nextafter(1, 0))
    return issue(prediction, radius, norm=plan.noise.norm, confidence=confidence)


@functools.partial(jax.jit, static_argnames=("structure", "plan"))
def _predict(
    arrays: list, key: Array, x: Array, index: Array, *, structure: Structure, plan: SmoothingPlan
) -> Array:
    counts, _ = _votes(arrays, key, x, index, structure, plan, 0)
    (first, second), (top, _) = (part.T for part in jax.lax.top_k(counts, 2))
    certain = leader_is_certain(first, second, plan.alpha)
    return jnp.where(certain, top, ABSTAIN).astype(jnp.int32)


def _votes(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    structure: Structure,
    plan: SmoothingPlan,
    n0: int,
) -> tuple[Array, Array]:
    """`count_votes`, with no votes at all where they would mean nothing, so that it abstains."""

    def f(z):  # rebuilt inside of the loop, so that a module may update its own state there
        return structure.build(arrays)(z)

    votes = count_votes(key, f, x, index, noise=plan.noise, n=plan.n, n0=n0, chunk=plan.chunk)
    usable = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    usable &= rows_apart(structure, arrays, x, plan.chunk)
    estimation, selection = (jnp.where(usable[:, None], part, 0) for part in votes)
    return estimation, selection


def _checked(key: Array, x: Any, plan: SmoothingPlan, index: Any) -> tuple[Array, Array]:
    """x and the image numbers as arrays; whatever is wrong with the arguments raises here."""
    if not isinstance(plan, SmoothingPlan):
        raise TypeError(
            f"plan must be a SmoothingPlan, got {type(plan).__name__}; "
            "type SmoothingPlan(noise=Gaussian(0.25))"
        )
    if not jnp.issubdtype(getattr(key, "dtype", bool), jax.dtypes.prng_key) or jnp.ndim(key):
        raise TypeError(
            "key must be one typed key and comes first: certify(jax.random.key(0), ...)"
        )
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be a floating point array, got {getattr(x, 'dtype', type(x).__name__)}; scale "
            "it the way the model expects, e.g. x.astype(jnp.float32) / 255"
        )
    if x.ndim < 2:
        raise ValueError(
            f"x must have a batch axis first, (b, *input); got shape {x.shape}: "
            "write x[None] for one image"
        )
    return jnp.asarray(x), _checked_index(index, x.shape[0])


def _checked_index(index: Any, b: int) -> Array:
    if index is None:
        return jnp.arange(b, dtype=jnp.uint32)
    if not is_traced(index):
        index = np.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"index must hold integers, got {index.dtype}; type jnp.arange({b})")
    if index.shape != (b,):
        raise ValueError(f"index must have one number per image, ({b},), got shape {index.shape}")
    if not is_traced(index) and index.size and not 0 <= index.min() <= index.max() < 2**32:
        raise ValueError("index must lie in [0, 2^32): pass the places of the images in their set")
    return index.astype(jnp.uint32) if is_traced(index) else jnp.asarray(index.astype(np.uint32))
