"""Plans: how to sample, and at which confidence."""

import dataclasses
import math
from collections.abc import Hashable
from numbers import Integral, Real
from typing import Any

from jaxcert.smoothing.noise import Noise


@dataclasses.dataclass(frozen=True)
class SmoothingPlan:
    """How to sample; static, so that a new plan compiles anew.

    Attributes:
      noise: the distribution, e.g. `Gaussian(sigma)`; it determines the norm of the radius.
      n0: draws that select the class to certify (N0 in Cohen et al.).
      n: draws that estimate its probability (N). The radius cannot pass that of
        p = alpha^(1/n): 3.2, 3.8, 4.3 sigma for n = 10^4, 10^5, 10^6 at alpha = 1e-3.
      alpha: probability, per input, of a wrong certificate.
      chunk: noisy copies per forward pass, of one image at a time. Memory is
        chunk (d + activations per row) floats. The default suits CPUs, where larger ones leave
        the cache; take as much as fits on an accelerator. f's logits, and so the certified
        function, may depend on it in the last bit.
      runner_up: bound the probabilities of the other classes too, by U, and take the radius of
        pA and pB instead of that of pA alone, each at alpha / 2. It gains where the rest of the
        votes is spread over many classes, and loses a little where it is not.
      group: how many images in a row share their noise, whose cost they then share: the key folds
        index // group. Each certificate keeps its own confidence, but those of a group are no
        longer independent.
      hardware: draw with the device's own generator (`rng_bit_generator`) instead of threefry. It
        is the faster one on TPUs and a slower one on CPUs; its bits depend on the device, the
        chunk and the version of the compiler, so that nothing is reproducible.

    Raises:
      TypeError: for a noise that is no distribution.
      ValueError: for numbers no plan can have, or an n too small for any certificate at alpha.
    """

    noise: Noise
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    chunk: int = 400
    runner_up: bool = False
    group: int = 1
    hardware: bool = False

    def __post_init__(self):
        require_noise(self.noise)
        require_counts(self, "n0", "n", "chunk", "group")
        require_errors(self, "alpha")
        if self.n + self.n0 >= 2**31:
            raise ValueError(
                f"n + n0 must be below 2^31, got {self.n + self.n0}; take n=1_000_000, the radius "
                "gains next to nothing beyond"
            )
        # n votes of n prove p > alpha^(1/n), which must exceed 1/2: 2^-n < alpha.
        level = self.alpha / 2 if self.runner_up else self.alpha
        needed = math.floor(math.log2(1 / level)) + 1
        if self.n < needed:
            raise ValueError(
                f"n={self.n} draws can certify nothing at alpha={self.alpha}: even if all agree "
                f"the bound {level:g}^(1/n) is at most 1/2; take n >= {needed}"
            )

    @property
    def rows(self) -> int:
        """How many rows the model sees at a time."""
        return self.chunk


def require_noise(noise: Any) -> None:
    """Raise unless it is a distribution, and can be a static argument."""
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be a distribution, got {noise!r}; type noise=Gaussian(0.25)")
    if not (dataclasses.is_dataclass(noise) and isinstance(noise, Hashable)):
        raise TypeError(
            f"{type(noise).__name__} must be a frozen dataclass, so that jit can take it as a "
            "static argument: type @dataclasses.dataclass(frozen=True) above the class"
        )
    if not hasattr(noise, "norm"):
        raise TypeError(
            f"{type(noise).__name__} must say in which norm its radius is: give it a field or an "
            "attribute, norm = 2.0"
        )


def require_counts(plan: Any, *names: str) -> None:
    """Make these fields ints; raise unless they are positive ones."""
    for name in names:
        value = getattr(plan, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value <= 0:
            raise ValueError(
                f"{name} must be a positive int, got {value!r} ({type(value).__name__}); e.g. "
                f"{name}=100"
            )
        object.__setattr__(plan, name, int(value))


def require_errors(plan: Any, *names: str) -> None:
    """Make these fields floats; raise unless they can be the probability of an error."""
    for name in names:
        object.__setattr__(plan, name, as_error(getattr(plan, name), name))


def as_error(value: Any, name: str = "alpha") -> float:
    """A probability of an error as a float, or an error."""
    if not isinstance(value, Real) or not 1e-300 <= float(value) < 1:
        raise ValueError(f"{name} must lie in (0, 1), got {value!r}; type {name}=1e-3")
    return float(value)
