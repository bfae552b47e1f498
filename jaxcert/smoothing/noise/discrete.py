"""Noise that does not add: splitting for L1, ablation for L0, bit flips for binary features."""

import dataclasses
import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.sets import Box
from jaxcert.smoothing.noise.base import (
    Noise,
    bounded,
    input_shape,
    no_contraction,
    proved,
    require_scale,
)

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class Splitting(Noise):
    """Each pixel of [0, 1] is told apart by one random threshold only, for L1.

    With s uniform on [0, 2 width], the model sees (min(s, 1) + 1[x > s]) / 2: the threshold, and on
    which side the pixel lies. Levine and Feizi (ICML 2021).
    As for `Gaussian`, the theorem is about real numbers: thresholds here take 2^23 values.
    `jaxcert.smoothing.certify_splitting`, without randomness, covers the program that runs.

    Attributes:
      width: half the thresholds' range, at least 1/2.
    """

    width: float
    norm: float = dataclasses.field(default=1.0, init=False)
    inputs = "pixels in [0, 1]; let the model do all normalisation"

    def __post_init__(self):
        require_scale(self, "width", "Splitting(2.0)")
        if self.width < 0.5:
            raise ValueError(f"width must be at least 0.5, got {self.width}: pixels reach 1")

    @property
    def within(self) -> Box:  # pyright: ignore[reportIncompatibleVariableOverride]
        """[0, 1]."""
        return Box(0.0, 1.0)

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """A threshold for each pixel, in at least float32."""
        with jax.threefry_partitionable(False):
            uniform = jax.random.uniform(key, shape, jnp.promote_types(dtype, jnp.float32))
        return no_contraction(2 * self.width * uniform)

    def apply(self, x: Array, drawn: Array) -> Array:
        """What is seen of each pixel."""
        return ((jnp.minimum(drawn, 1.0) + (x > drawn)) / 2).astype(x.dtype)

    def usable(self, x: Array) -> Array:
        """Whether all pixels lie in [0, 1]."""
        return jnp.all((x >= 0) & (x <= 1), axis=tuple(range(1, x.ndim)))

    # The model sees the same of x and of x + delta unless a threshold falls between x_i and
    # x_i + delta_i, which has probability |delta|_1 / 2 width at most: R = width (pA - pB).
    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            width = min(self.width, float(np.float32(2 * self.width)) / 2)  # as `sample` rounds it
            return proved(width * (p_lower - p_upper), p_lower, p_upper)


def value_and_complement(x: Array, kept: Array) -> Array:
    """x and 1 - x as channels, both 0 where a pixel is not kept (Levine and Feizi, AAAI 2020)."""
    return jnp.concatenate([jnp.where(kept, x, 0), jnp.where(kept, 1 - x, 0)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Ablation(Noise):
    """The model sees `keep` pixels, chosen at random, and not the others; for L0.

    A pixel is a place of the image with all its channels: x is (*places, channels). The radius is
    the number of pixels that may be changed to anything. Levine and Feizi (AAAI 2020).

    Attributes:
      keep: how many pixels are seen.
      encode: a pure `(x, kept) -> array`, what the model receives, of kept bool (*places, 1);
        default the channels x and 1 - x, so that a pixel that is not kept differs from a black one.
        It must not depend on x where kept is False.
    """

    keep: int
    encode: Callable[[Array, Array], Array] = value_and_complement
    norm: float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self):
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"keep must be a positive int, got {self.keep!r}; e.g. Ablation(45)")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Which pixels are kept, bool (*places, 1)."""
        places = self._places(shape)
        with jax.threefry_partitionable(False):
            high, low = jax.random.bits(key, (2, places), jnp.uint32)
        # The first of a random order; ties of 64 bits have probability places^2 / 2^64.
        order = jax.lax.sort((high, low, jnp.arange(places)), num_keys=2)[2]
        kept = jnp.zeros(places, bool).at[order[: self.keep]].set(True)
        return kept.reshape(*shape[:-1], 1)

    def apply(self, x: Array, drawn: Array) -> Array:
        """x with all but the kept pixels hidden."""
        return self.encode(x, drawn).astype(x.dtype)

    # Changing rho of d pixels is seen only if one of them is kept, which has probability
    # Delta = 1 - C(d - rho, k) / C(d, k) = 1 - prod_{i < rho} (1 - k / (d - i)). The class leads
    # while pA - Delta > pB + Delta.
    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """See `Noise`; needs x for the number of pixels."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            places = self._places(input_shape(self, x, p_lower))
            seen = jnp.asarray(_changes_seen(places, self.keep), jnp.float64)
            gap = p_lower - p_upper - places**2 * 2.0**-62  # ties, at x and x', of both classes
            pixels = jnp.sum(gap[..., None] > 2 * seen, axis=-1)
            return jnp.where((p_lower < 1) & (p_upper > 0), pixels.astype(jnp.float64), 0.0)

    def _places(self, shape: tuple[int, ...]) -> int:
        places = math.prod(shape[:-1])
        if len(shape) < 2 or places <= self.keep:
            raise ValueError(
                f"Ablation({self.keep}) needs inputs (*places, channels) of more than {self.keep} "
                f"places, got shape {shape}"
            )
        return places


@functools.cache
def _changes_seen(places: int, keep: int) -> np.ndarray:
    """The probability that one of rho changed pixels is kept, for rho = 1, 2, ...; not below."""
    unseen = np.cumprod(1 - keep / np.arange(places, keep, -1.0))
    return 1 - unseen * (1 - 4 * places * 2.0**-53)


@dataclasses.dataclass(frozen=True)
class BitFlip(Noise):
    """Binary features, each flipped with a probability of its own kind; for L0.

    0 becomes 1 with probability `add`, 1 becomes 0 with probability `delete`. The radius is the
    number of features that may be flipped, in whichever direction. Bojchevski, Klicpera and
    Guennemann (ICML 2020) with the exact regions of constant likelihood.

    Attributes:
      add: probability of 0 -> 1.
      delete: probability of 1 -> 0.
      most: radii up to this many flips are looked for.
    """

    add: float
    delete: float
    most: int = 64
    norm: float = dataclasses.field(default=0.0, init=False)
    inputs = "features that are 0.0 or 1.0, such as (x > 0.5).astype(jnp.float32)"

    def __post_init__(self):
        for name in ("add", "delete"):
            value = getattr(self, name)
            if not (isinstance(value, Real) and 0 < float(value) < 1):
                raise ValueError(f"{name} must be a float in (0, 1), got {value!r}; e.g. 0.1")
            object.__setattr__(self, name, float(value))
        if self.add + self.delete >= 1:
            raise ValueError("add + delete must be below 1, or the noise says more than the input")
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most must be a positive int, got {self.most!r}")

    def sample(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """32 bits for each feature."""
        with jax.threefry_partitionable(False):
            return jax.random.bits(key, shape, jnp.uint32)

    def apply(self, x: Array, drawn: Array) -> Array:
        """The features, some of them flipped."""
        add, delete = (np.uint32(p * 2.0**32) for p in self._drawn())
        return jnp.where(x > 0.5, drawn >= delete, drawn < add).astype(x.dtype)

    def usable(self, x: Array) -> Array:
        """Whether all features are 0 or 1."""
        return jnp.all((x == 0) | (x == 1), axis=tuple(range(1, x.ndim)))

    def radius(self, p_lower: Any, p_upper: Any = None, x: Any = None) -> Array:
        """The number of flips, at most `most`; see `Noise`. p_upper is not made use of."""
        with jax.enable_x64(True):
            p_lower, p_upper = bounded(p_lower, p_upper)
            needed = jnp.asarray(_needed(*self._drawn(), self.most), jnp.float64)
            flips = jnp.sum(p_lower[..., None] > needed, axis=-1)
            return jnp.where((p_lower < 1) & (p_upper > 0), flips.astype(jnp.float64), 0.0)

    def _drawn(self) -> tuple[float, float]:
        """The probabilities as 32 bits draw them, exactly."""
        add, delete = (math.floor(p * 2.0**32) / 2.0**32 for p in (self.add, self.delete))
        return add, delete


@functools.cache
def _needed(add: float, delete: float, most: int) -> np.ndarray:
    """Which p_lower, at least, certifies 1, 2, ..., `most` flips: increasing."""
    pairs = [
        max(_needed_for(add, delete, added, flips - added) for added in range(flips + 1))
        for flips in range(1, most + 1)
    ]
    return np.maximum.accumulate(pairs)


# Let x' have `added` ones and `deleted` zeros more than x. Of what the model sees, only those
# features tell x and x' apart, and only the numbers i of ones and j of zeros among them matter:
#   P(i, j) = Bin(i; added, add) Bin(j; deleted, delete) at x,
#   P'(i, j) = Bin(i; added, 1 - delete) Bin(j; deleted, 1 - add) at x'.
# By Neyman and Pearson, the set of probability p at x that has the least at x' takes the (i, j) in
# the order of P' / P. The answer is the p for which that least probability is 1/2.
def _needed_for(add: float, delete: float, added: int, deleted: int) -> float:
    here = np.outer(_binomial(added, add), _binomial(deleted, delete)).ravel()
    there = np.outer(_binomial(added, 1 - delete), _binomial(deleted, 1 - add)).ravel()
    # P' / P is a constant times ((1 - add)(1 - delete) / (add delete))^(i + j), which grows with
    # i + j, as add + delete < 1.
    i, j = np.indices((added + 1, deleted + 1))
    order = np.argsort((i + j).ravel(), kind="stable")
    here, there = np.cumsum(here[order]), np.cumsum(there[order])
    # Between two of the sums, a set takes a part of the region in between.
    return float(np.interp(0.5, np.append(0, there), np.append(0, here))) + 1e-12


def _binomial(n: int, p: float) -> np.ndarray:
    return np.array([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])
