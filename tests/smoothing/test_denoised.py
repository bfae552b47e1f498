"""Denoisers as part of the model: the timestep by its formula, and certificates through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert.smoothing import Gaussian, SmoothingPlan, certify
from jaxcert.smoothing.denoised import (
    Denoised,
    OneShotDiffusion,
    cosine_alpha_bar,
    linear_alpha_bar,
    one_shot_diffusion,
    timestep,
)

KEY = jax.random.key(9)
PLAN = SmoothingPlan(noise=Gaussian(0.25), n0=20, n=500, chunk=64)
SCHEDULES = [linear_alpha_bar(), cosine_alpha_bar()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine"])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0])
def test_the_timestep_has_the_noise_of_sigma(schedule, sigma):
    t = timestep(schedule, sigma)
    levels = [((1 - a) / a) ** 0.5 for a in schedule]
    assert t == min(range(len(schedule)), key=lambda i: abs(levels[i] - 2 * sigma))
    assert abs(levels[t] - 2 * sigma) < 0.02 * sigma
    assert timestep(schedule, 2 * sigma) > t


def test_schedules_are_the_published_ones():
    linear, cosine = SCHEDULES
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + t / 999 * (0.02 - 1e-4))
    assert np.isclose(linear[-1], product, rtol=1e-10)
    assert np.isclose(product, 4.04e-5, rtol=1e-2)  # what Ho et al. leave of the signal

    def f(t):
        return np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2

    assert np.allclose(cosine[:900], [f(t) / f(0) for t in range(1, 901)], rtol=1e-9)
    assert np.isclose(cosine[-1] / cosine[-2], 1 - 0.999)
    assert all(np.all(np.diff(s) < 0) for s in SCHEDULES)


def test_the_diffusion_model_sees_the_noise_it_was_trained_for():
    """What it is given is sqrt(abar) x_0 plus noise of variance 1 - abar, x_0 in [-1, 1]."""
    seen = []

    def model(x_t, t):
        seen.append((np.asarray(x_t), np.asarray(t)))
        return jnp.zeros_like(x_t)

    sigma, schedule = 0.5, SCHEDULES[0]
    denoise = one_shot_diffusion(model, schedule, sigma)
    noise = sigma * np.random.default_rng(0).normal(size=(50, 1000)).astype(np.float32)
    denoise(0.9 + noise)
    (x_t, t) = seen[0]
    assert t.dtype == np.int32
    assert t.tolist() == [timestep(schedule, sigma)] * 50
    abar = schedule[t[0]]
    assert np.isclose(x_t.mean(), np.sqrt(abar) * 0.8, atol=0.02)
    assert np.isclose(x_t.var(), 1 - abar, rtol=0.02)
    assert np.isclose((1 - abar) / abar, (2 * sigma) ** 2, rtol=0.02)


def test_a_model_that_knows_the_noise_recovers_the_image():
    clean = np.random.default_rng(1).uniform(size=(3, 4)).astype(np.float32)
    noisy = clean + np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    base = one_shot_diffusion(lambda x_t, t: x_t, SCHEDULES[1], 0.5)
    abar = base.alpha_bar

    def oracle(x_t, t):
        return (x_t - np.sqrt(abar) * (2 * clean - 1)) / np.sqrt(1 - abar)

    denoised = OneShotDiffusion(oracle, base.t, abar)(jnp.asarray(noisy))
    assert np.allclose(denoised, clean, atol=1e-5)
    blind = OneShotDiffusion(lambda x_t, t: jnp.zeros_like(x_t), base.t, abar)(noisy)
    assert np.allclose(blind, np.clip(noisy, 0, 1), atol=1e-6)


def logits(weights, z):
    return z @ weights


def shrink(factor, x_t, t):
    """Predicts noise in part of what it sees, more for later times."""
    return factor * x_t * (1 + t[:, None] / 1000)


def test_certificates_hold_through_a_diffusion_model():
    weights = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
    x = np.random.default_rng(4).uniform(size=(3, 6)).astype(np.float32)
    classify = jax.tree_util.Partial(logits, jnp.asarray(weights))
    predict_noise = jax.tree_util.Partial(shrink, jnp.asarray(0.5))
    denoise = one_shot_diffusion(predict_noise, SCHEDULES[0], PLAN.noise.sigma)
    model = Denoised(denoise, classify)
    assert len(jax.tree.leaves(model)) == 2  # the arrays of both parts, for jit
    certificate = certify(KEY, model, jnp.asarray(x), PLAN)
    abar, t = SCHEDULES[0][denoise.t], denoise.t

    def by_hand(z):
        x_t = np.sqrt(abar) * (2 * z - 1)
        x_0 = (x_t - np.sqrt(1 - abar) * 0.5 * x_t * (1 + t / 1000)) / np.sqrt(abar)
        return (jnp.clip(x_0, -1, 1) / 2 + 0.5) @ weights

    expected = certify(KEY, by_hand, jnp.asarray(x), PLAN)
    assert np.array_equal(certificate.prediction, expected.prediction)
    assert np.allclose(certificate.radius, expected.radius, rtol=1e-3)
    assert np.any(certificate.radius > 0)


@pytest.mark.parametrize(
    ("schedule", "sigma", "words"),
    [
        ([0.5, 0.9], 0.25, "falling"),
        ([1.0, 0.5], 0.25, "falling"),
        ([], 0.25, "linear_alpha_bar"),
        ([0.9, 0.5], -1.0, "sigma=0.25"),
        ([0.9, np.nan], 0.25, "falling"),
    ],
)
def test_bad_schedules_say_what_to_type(schedule, sigma, words):
    with pytest.raises(ValueError, match=words):
        timestep(np.array(schedule), sigma)
