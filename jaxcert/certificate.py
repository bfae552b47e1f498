"""What a certifier hands back: certificates (a radius) and verdicts (yes, no, unknown and why)."""

import dataclasses
import enum
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.floats import rounded_down
from jaxcert.pytrees import pytree
from jaxcert.sets import Box, Grid

Array: TypeAlias = jax.Array

ABSTAIN = -1
"""The prediction of a certifier that predicts nothing: smoothing's abstention, or NaN logits."""


@pytree
@dataclasses.dataclass(frozen=True)
class Certificate:
    """For every x' in `within` with |x' - x|_norm <= radius, the certified function predicts
    `prediction`.

    The certified function is the model over the reals for deterministic certifiers, the smoothed
    model for randomized smoothing.

    Attributes:
      prediction: int (b,), or `ABSTAIN`.
      radius: float (b,), rounded down so that `<=` holds; 0 where nothing is proved.
      confidence: float (b,): 1 for a proof, 1 - alpha per input for smoothing.
      norm: the threat's norm as numpy's `ord` (inf, 2, 1, 0), or a threat that no norm names, such
        as an `Ellipsoid`; static.
      within: the `Box` or `Grid` x' must lie in, or None for no restriction.
    """

    prediction: Array
    radius: Array
    confidence: Array
    norm: Any = dataclasses.field(metadata={"static": True})
    within: Box | Grid | None = None


def issue(
    prediction: Array,
    radius: Array,
    *,
    norm: Any,
    within: Box | Grid | None = None,
    confidence: Any = 1.0,
) -> Certificate:
    """The one place certificates are made, so that every certifier fails closed the same way.

    A radius that is NaN, infinite or negative and any radius of an abstention becomes 0. Radius and
    confidence are rounded down to the default float type.
    """
    prediction = jnp.asarray(prediction, jnp.int32)
    dtype = jnp.result_type(float)
    # A radius decided in float64 reaches a float32 caller: JAX truncates, to nearest, whatever
    # touches it outside of this block.
    with jax.enable_x64(True):
        sound = jnp.isfinite(radius) & (radius > 0) & (prediction != ABSTAIN)
        radius = rounded_down(jnp.where(sound, radius, jnp.zeros_like(radius)), dtype)
        confidence = rounded_down(jnp.asarray(confidence, jnp.float64), dtype)
    confidence = jnp.broadcast_to(confidence, prediction.shape)
    return Certificate(prediction, radius, confidence, norm, within)


def predicted_class(logits: Array) -> Array:
    """The first largest of each row of (..., k) logits, `ABSTAIN` where any logit is not finite.

    In one reduction that reads each logit once. Compared with their maximum in a second step, the
    logits may be computed a second time, by instructions that round in another way, so that none
    of them equals it. (`argmax` would do, but cannot be lowered for float64 logits of a caller in
    float32.)
    """
    logits = jax.lax.stop_gradient(logits)
    position = jnp.broadcast_to(np.arange(logits.shape[-1], dtype=np.int32), logits.shape)
    start = np.array(-np.inf, logits.dtype), np.int32(ABSTAIN)
    _, first = jax.lax.reduce((logits, position), start, _larger, (logits.ndim - 1,))
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), first, np.int32(ABSTAIN))


def _larger(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """The larger of two numbers with their positions, the first of two that are equal."""
    (x, i), (y, j) = one, other
    takes = (x > y) | ((x == y) & (i < j))
    return jnp.where(takes, x, y), jnp.where(takes, i, j)


class Status(enum.IntEnum):
    """The codes of a `Verdict`'s status."""

    UNKNOWN = 0
    VERIFIED = 1
    FALSIFIED = 2


class Reason(enum.IntEnum):
    """Why a verdict is UNKNOWN; `MESSAGES` says each in words."""

    NONE = 0
    LOOSE = 1
    TIME = 2
    DOMAINS = 3
    MEMORY = 4
    NUMERICS = 5
    UNSUPPORTED = 6


MESSAGES = {
    Reason.NONE: "decided",
    Reason.LOOSE: "the bound is too loose to decide; use a tighter method or a smaller set",
    Reason.TIME: "the time budget ran out",
    Reason.DOMAINS: "the budget of sub-domains ran out",
    Reason.MEMORY: "the memory budget ran out",
    Reason.NUMERICS: "numerically undecided: the margin is within rounding of zero, or NaN",
    Reason.UNSUPPORTED: "the model holds an operation the method has no rule for",
}


@pytree
@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to "does the property hold on the whole set?", as codes that survive jit.

    Attributes:
      status: int (b,), a `Status`: VERIFIED is a proof, FALSIFIED comes with a counterexample.
      reason: int (b,), a `Reason`, NONE where decided.
      counterexample: (b, *input) points that break the property where FALSIFIED, or None.
    """

    status: Array
    reason: Array
    counterexample: Array | None = None


def explain(verdict: Verdict) -> list[str]:
    """One line of words per example of a `Verdict`. Host side: needs concrete values."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"expected a Verdict, got {type(verdict).__name__}")
    pairs = zip(verdict.status.tolist(), verdict.reason.tolist(), strict=True)
    return [f"{Status(s).name}: {MESSAGES[Reason(r)]}" for s, r in pairs]
