"""The Gaussian: its moments, no dependence on configuration, and its radius against 50 digits."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import stats

from jaxcert.smoothing import Gaussian
from jaxcert.smoothing.noise import Noise


def exact_radius(p, sigma):
    """sigma Phi^-1(p) with 50 digits."""
    with mpmath.workdps(50):
        quantile = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(float(p)) - 1)
        return mpmath.mpf(sigma) * quantile


@pytest.mark.parametrize("sigma", [0.1, 0.25, 1.0, 1 / 3])
def test_radius_is_below_the_exact_one_and_close(sigma):
    p = np.concatenate([0.5 + np.logspace(-15, -0.31, 60), 1 - np.logspace(-15, -1, 60)])
    radius = np.asarray(Gaussian(sigma).radius(p))
    exact = [exact_radius(v, sigma) for v in p]
    assert radius.dtype == np.float64
    assert all(mpmath.mpf(float(r)) < e for r, e in zip(radius, exact, strict=True))
    np.testing.assert_allclose(radius, np.array(exact, float), rtol=1e-7)


def test_radius_in_exact_binary_sigma_loses_nothing_visible():
    p = np.linspace(0.51, 0.999999, 50)
    radius = np.asarray(Gaussian(0.25).radius(p))
    np.testing.assert_allclose(radius, 0.25 * stats.norm.ppf(p), rtol=1e-14)


def test_radius_proves_nothing_at_half_or_without_a_probability():
    p = np.array([0.0, 0.3, 0.5, np.nan, 1.0, 1.5, -1.0])
    assert np.array_equal(Gaussian(0.5).radius(p), np.zeros(7))


def test_samples_of_successive_keys_are_normal_and_independent():
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(0), s))(jnp.arange(300))
    draws = jax.vmap(lambda key: Gaussian(0.5).sample(key, (200,), jnp.float32))(keys)
    draws = np.asarray(draws, np.float64) / 0.5
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(draws.mean(1) * np.sqrt(200), "norm").pvalue > 1e-3
    assert stats.kstest((draws[:-1] * draws[1:]).sum(1) / np.sqrt(200), "norm").pvalue > 1e-3


def test_sample_does_not_depend_on_the_users_configuration():
    def draw():
        return np.asarray(Gaussian(1.0).sample(jax.random.key(3), (64,), jnp.float32))

    with jax.threefry_partitionable(True):
        one = draw()
        compiled = np.asarray(
            jax.jit(lambda k: Gaussian(1.0).sample(k, (64,), jnp.float32))(jax.random.key(3))
        )
    with jax.threefry_partitionable(False):
        other = draw()
    assert np.array_equal(one, other)
    assert np.array_equal(one, compiled)


def test_half_precision_is_drawn_in_single():
    assert Gaussian(1.0).sample(jax.random.key(0), (2,), jnp.bfloat16).dtype == jnp.float32


@pytest.mark.parametrize("sigma", [0.0, -0.25, float("nan"), float("inf")])
def test_bad_sigma_says_what_to_type(sigma):
    with pytest.raises(ValueError, match=r"Gaussian\(0\.25\)"):
        Gaussian(sigma)


def test_gaussian_is_a_hashable_noise():
    assert isinstance(Gaussian(0.25), Noise)
    assert hash(Gaussian(0.25)) == hash(Gaussian(0.25))
    assert Gaussian(0.25).norm == 2.0
