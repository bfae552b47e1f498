"""Denoised smoothing: any classifier behind any denoiser is a base classifier for smoothing.

A certificate of randomized smoothing holds for every fixed function f of the noisy image, so also
for classify(denoise(z)), however good or bad the denoiser is: only the radius depends on it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import Model
from jaxcert.pytrees import pytree

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class Denoised:
    """The model z -> classify(denoise(z)), for `certify` and the like.

    Denoised smoothing of Salman, Sun, Yang, Kapoor and Kolter (NeurIPS 2020). Both parts must treat
    rows alone and be fixed functions: no fresh noise inside.

    Attributes:
      denoise: (b, *input) -> (b, *input), trained for the noise of the plan.
      classify: the classifier of clean images, (b, *input) -> (b, k) or whatever outputs are meant.

    Example:
      >>> from jaxcert.smoothing import Gaussian, SmoothingPlan, certify
      >>> sign = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> model = Denoised(jnp.round, sign)
      >>> plan = SmoothingPlan(noise=Gaussian(0.25), n=1000)
      >>> print(certify(jax.random.key(0), model, jnp.array([[1.0]]), plan).prediction)
      [0]
    """

    denoise: Callable[[Array], Array]
    classify: Model

    def __call__(self, z: Array) -> Array:
        """The outputs of the classifier on denoised inputs."""
        return self.classify(self.denoise(z))


# A diffusion model knows noisy images x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e with x_0 in
# [-1, 1], e ~ N(0, I), and predicts e. A smoothing sample z = x + sigma e with x in [0, 1] is
# 2 z - 1 = x_0 + 2 sigma e on that scale, so sqrt(abar_t) (2 z - 1) is distributed as x_t for
# sqrt(abar_t) 2 sigma = sqrt(1 - abar_t): for the t with (1 - abar_t) / abar_t = (2 sigma)^2. One
# step back gives x_0 = (x_t - sqrt(1 - abar_t) e) / sqrt(abar_t).
@pytree
@dataclasses.dataclass(frozen=True)
class OneShotDiffusion:
    """A diffusion model as a denoiser of images in [0, 1], in one step and without randomness.

    Diffusion denoised smoothing of Carlini, Tramer, Dvijotham, Rice, Sun and Kolter (ICLR 2023).
    Built by `one_shot_diffusion`, which finds t.

    Attributes:
      predict_noise: (x_t, t) -> e, of images (b, *input) on the scale [-1, 1] and timesteps int32
        (b,); a model that also predicts variances is wrapped to return e alone.
      t: the timestep; static.
      alpha_bar: abar_t, in (0, 1); static.

    Example:
      >>> clean = jnp.full((2, 3), 0.75)  # a denoiser of one image, 0.75: it knows e exactly
      >>> schedule = linear_alpha_bar()
      >>> abar = schedule[timestep(schedule, 0.25)]
      >>> oracle = lambda x_t, t: (x_t - abar**0.5 * 0.5) / (1 - abar) ** 0.5
      >>> denoise = one_shot_diffusion(oracle, schedule, 0.25)
      >>> print(jnp.allclose(denoise(clean + 0.1), clean, atol=1e-6))
      True
    """

    predict_noise: Callable[[Array, Array], Array]
    t: int = dataclasses.field(metadata={"static": True})
    alpha_bar: float = dataclasses.field(metadata={"static": True})

    def __call__(self, z: Array) -> Array:
        """The denoised images, clipped to [0, 1]."""
        signal, noise = math.sqrt(self.alpha_bar), math.sqrt(1 - self.alpha_bar)
        x_t = signal * (2 * z - 1)
        t = jnp.full(z.shape[:1], self.t, jnp.int32)
        x_0 = (x_t - noise * self.predict_noise(x_t, t)) / signal
        return (jnp.clip(x_0, -1, 1) + 1) / 2


def one_shot_diffusion(
    predict_noise: Callable[[Array, Array], Array], alpha_bar: Any, sigma: float
) -> OneShotDiffusion:
    """The denoiser for noise of standard deviation sigma on images in [0, 1].

    Args:
      predict_noise: the diffusion model, see `OneShotDiffusion`.
      alpha_bar: its schedule, floats (T,) that fall, such as `linear_alpha_bar()`.
      sigma: of the smoothing noise, in the units of [0, 1].

    Raises:
      ValueError: for a schedule or sigma that is none.
    """
    t = timestep(alpha_bar, sigma)
    return OneShotDiffusion(predict_noise, t, float(np.asarray(alpha_bar)[t]))


def timestep(alpha_bar: Any, sigma: float) -> int:
    """The t whose noise level sqrt((1 - abar_t) / abar_t) is nearest to 2 sigma.

    Where it is not met exactly the denoiser sees slightly more or less noise than it says; the
    certificate holds for any t.
    """
    schedule = np.asarray(alpha_bar, np.float64)
    if (
        schedule.ndim != 1
        or not schedule.size
        or not np.all((schedule > 0) & (schedule < 1))
        or np.any(np.diff(schedule) > 0)
    ):
        raise ValueError(
            "alpha_bar must hold the products of (1 - beta), (T,) falling numbers in (0, 1), got "
            f"shape {schedule.shape}; type alpha_bar=linear_alpha_bar(), or jnp.cumprod(1 - beta)"
        )
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a positive number, got {sigma}; type sigma=0.25")
    levels = np.sqrt((1 - schedule) / schedule)
    if 2 * sigma > levels[-1]:
        raise ValueError(
            f"sigma={sigma} is noisier than any step of the schedule, whose last has sigma = "
            f"{levels[-1] / 2:.3g}; take less noise, or a longer schedule"
        )
    return int(np.argmin(np.abs(levels - 2 * sigma)))


def linear_alpha_bar(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """abar_t of Ho, Jain and Abbeel (NeurIPS 2020): beta rises linearly."""
    return np.cumprod(1 - np.linspace(first, last, steps))


def cosine_alpha_bar(steps: int = 1000, offset: float = 0.008) -> np.ndarray:
    """abar_t of Nichol and Dhariwal (ICML 2021): a squared cosine, every beta at most 0.999."""
    progress = np.arange(steps + 1) / steps
    level = np.cos((progress + offset) / (1 + offset) * math.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))
