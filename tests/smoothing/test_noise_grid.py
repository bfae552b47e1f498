"""Noise on the grid of the inputs: its law, and the attack on float noise that it stops."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import stats

from jaxcert import smoothing
from jaxcert.sets import Grid
from jaxcert.smoothing import AffineFirst, Gaussian, GridGaussian, SmoothingPlan
from jaxcert.smoothing.noise.grid import MOST, _guess, integers, on_grid, thresholds


def exact_law(scale, reach):
    """P(round(scale N) = k) for k = -reach ... reach, with 40 digits."""
    with mpmath.workdps(40):
        ends = [mpmath.ncdf((mpmath.mpf(k) - 0.5) / scale) for k in range(-reach, reach + 2)]
        return np.array([float(b - a) for a, b in itertools.pairwise(ends)])


@pytest.mark.parametrize("scale", [0.3, 5.0, 63.75])
def test_thresholds_are_the_tails_of_a_rounded_gaussian(scale):
    words, variation = thresholds(scale)
    found = [int(h) * 2**32 + int(low) for h, low in words.T]
    assert found == sorted(found, reverse=True)
    with mpmath.workdps(40):
        root = mpmath.mpf(scale) * mpmath.sqrt(2)
        exact = [mpmath.erfc((m - mpmath.mpf(0.5)) / root) for m in range(1, len(found))]
        wrong = sum(abs(f / mpmath.mpf(2) ** 63 - e) for f, e in zip(found[1:], exact, strict=True))
    assert found[0] == 2**63
    assert wrong <= variation
    assert variation < 1e-12


@pytest.mark.parametrize("scale", [0.3, 63.75, float(MOST)])
def test_guesses_are_within_half_a_step(scale):
    """At each threshold m the quantile is m, so that in between it is in between."""
    words, _ = thresholds(scale)
    last = words.shape[1] - 1
    for below in (0, 1):
        value = np.array([int(h) * 2**32 + int(low) - below for h, low in words[:, 1:last].T])
        high, low = (value >> 32).astype(np.uint32), (value & 0xFFFFFFFF).astype(np.uint32)
        guess = np.asarray(_guess(jnp.asarray(high), jnp.asarray(low), scale))
        assert np.abs(guess - np.arange(1, last)).max() < 0.4


def test_draws_follow_the_law_of_a_rounded_gaussian_and_no_other():
    """On a coarse grid, too, where the discrete Gaussian exp(-k^2 / 2 s^2) is another law."""
    draw = jax.jit(integers, static_argnums=(1, 2))
    for scale, reach in ((0.3, 1), (5.0, 14)):
        law = exact_law(scale, reach)
        k = np.asarray(draw(jax.random.key(0), (400_000,), scale))
        counts = np.bincount(np.clip(k, -reach, reach) + reach, minlength=2 * reach + 1)
        law[0], law[-1] = law[0] + (1 - law.sum()) / 2, law[-1] + (1 - law.sum()) / 2
        assert stats.chisquare(counts, law / law.sum() * len(k)).pvalue > 1e-3
    other = np.exp(-(np.arange(-14, 15) ** 2) / 2 / 0.3**2)
    assert abs(other[14] / other.sum() - exact_law(0.3, 14)[14]) > 0.08


def test_the_discrete_gaussian_would_break_the_radius_on_a_coarse_grid():
    """Under it a half-line loses more by one step than under the rounded Gaussian."""
    s, k = 0.5, np.arange(-60, 61)
    discrete = np.exp(-(k**2) / (2 * s**2))
    discrete /= discrete.sum()
    p = discrete[k <= 0].sum()
    moved = discrete[k <= -1].sum()
    bound = stats.norm.cdf(stats.norm.ppf(p) - 1 / s)  # what the theorem promises at distance 1
    assert moved < bound
    law = exact_law(s, 60)
    p, moved = law[k <= 0].sum(), law[k <= -1].sum()
    assert moved >= stats.norm.cdf(stats.norm.ppf(p) - 1 / s) - 1e-12


def test_copies_lie_on_the_grid_and_depend_on_the_integers_alone():
    noise = GridGaussian(0.25)
    k = jnp.arange(256)
    exact, off = k.astype(jnp.float32) / 255, jnp.nextafter(k.astype(jnp.float32) / 255, 2.0)
    copies = [np.asarray(jax.jit(noise.perturb)(jax.random.key(3), x)) for x in (exact, off)]
    assert np.array_equal(*copies)
    steps = copies[0].astype(float) * 255
    assert np.abs(steps - np.round(steps)).max() < 1e-4
    found = np.round(steps).astype(int) - np.asarray(k)
    assert np.array_equal(found, integers(jax.random.key(3), (256,), 63.75))
    assert noise.within == Grid(255)


def test_the_radius_is_just_below_that_of_the_gaussian():
    p, q, x = np.array([0.6, 0.99, 0.9999]), np.array([0.3, 0.005, 0.0001]), np.zeros((3, 3072))
    found, most = GridGaussian(0.5).radius(p, q, x), Gaussian(0.5).radius(p, q, x)
    assert (np.asarray(found) < np.asarray(most)).all()
    np.testing.assert_allclose(found, most, rtol=5e-6)
    known = np.asarray(GridGaussian(0.5, norm=np.inf).radius(p, q, x))
    np.testing.assert_allclose(known, np.asarray(most) / np.sqrt(3072), rtol=5e-6)


D = 784
PLAIN = SmoothingPlan(noise=Gaussian(0.25), n=1000)
ON_GRID = SmoothingPlan(noise=GridGaussian(0.25), n=1000)


def sees_last_bits(z):
    """Class 1 iff some coordinate is no multiple of 2^-29, as sums with 0 are, and with 8/255 not.

    The published attack on float noise: jax.random.normal gives multiples of tiny steps around 0,
    and adding a larger number rounds them away.
    """
    scaled = z * 2.0**29
    odd = jnp.any(scaled != jnp.round(scaled), axis=1)
    return jnp.stack([~odd, odd], axis=1).astype(jnp.float32)


def test_float_noise_lets_a_net_break_its_certificate_and_grid_noise_does_not():
    x = jnp.zeros((2, D), jnp.float32).at[1].set(8 / 255)
    distance = float(np.linalg.norm(np.asarray(x[1], float)))
    broken = smoothing.certify(jax.random.key(0), sees_last_bits, x, PLAIN)
    # What smoothing says of real arithmetic is false of the float program: two points, nearer than
    # the radius, with different predictions at confidence 1 - 1e-3.
    assert broken.prediction[0] != broken.prediction[1]
    larger = SmoothingPlan(noise=Gaussian(0.5), n=1000)
    assert float(broken.radius[0]) > 0.6
    wide = smoothing.certify(jax.random.key(0), sees_last_bits, x, larger)
    assert float(wide.radius.max()) > distance
    assert wide.prediction[0] != wide.prediction[1]
    sound = smoothing.certify(jax.random.key(0), sees_last_bits, x, ON_GRID)
    assert sound.prediction[0] == sound.prediction[1]
    assert sound.within == Grid(255)


def test_inputs_off_the_grid_are_refused_or_abstain():
    x = jnp.full((2, 4), 0.5).at[1].set(128 / 255)

    def sign(z):
        return jnp.stack([z.sum(1), -z.sum(1)], 1)

    with pytest.raises(ValueError, match="round pixels to their grid"):
        smoothing.certify(jax.random.key(0), sign, x, ON_GRID)
    traced = jax.jit(lambda x: smoothing.certify(jax.random.key(0), sign, x, ON_GRID))(x)
    assert traced.prediction.tolist() == [-1, 0]
    assert traced.radius[0] == 0 < traced.radius[1]


def test_noise_behind_the_first_layer_is_refused():
    model = AffineFirst(lambda z: z, lambda z: jnp.concatenate([z, -z], 1))
    with pytest.raises(ValueError, match="not noise that is added"):
        smoothing.certify(jax.random.key(0), model, jnp.zeros((1, 2)), ON_GRID)


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match="levels must be an int"):
        GridGaussian(0.5, levels=0)
    with pytest.raises(ValueError, match="more than 4096 steps"):
        GridGaussian(100.0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_numbers_between_grid_points_are_off_the_grid_in_every_type(dtype):
    """With a tolerance that grew with the type's rounding, half floats all passed."""
    k = jnp.arange(256, dtype=jnp.float32)
    exact = (k / 255).astype(dtype)
    between = ((k[100:250] + 0.4) / 255).astype(dtype)
    off = between[(between != exact[100:250]) & (between != exact[101:251])]
    assert on_grid(exact[:, None], 255).all()
    assert not on_grid(off[:, None], 255).any()
    assert off.size > 0
    if dtype != jnp.float32:  # too few digits to tell the points apart
        fine = (jnp.arange(8000, 8190, dtype=jnp.float32) / 8191).astype(dtype)
        assert not on_grid(fine[:, None], 8191).any()
    large = jnp.array([[1e30], [jnp.inf], [jnp.nan]], jnp.float32)
    assert not on_grid(large, 255).any()
