"""Percentile smoothing against exact binomial sums, draws made by hand, and functions whose
percentiles are known everywhere."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert.sets import Grid
from jaxcert.smoothing import Gaussian, GridGaussian, Laplace, SmoothingPlan
from jaxcert.smoothing.outputs import sigma_of
from jaxcert.smoothing.percentile import (
    PercentileBounds,
    certify,
    iou_lower,
    needed,
    order_statistic,
    shifted,
)

KEY = jax.random.key(3)
SIGMA = 0.5
PLAN = SmoothingPlan(noise=Gaussian(SIGMA), n=1000, chunk=64)
WEIGHTS = np.array([[1.0, -2.0], [0.5, 0.0], [0.25, 1.0]], np.float32)
X = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)


def linear(z):
    return z @ WEIGHTS


def draws_by_hand(image, n, key=KEY):
    """The documented derivation of the noisy copies of an image."""
    own = jax.random.fold_in(key, np.uint32(image))

    def draw(s):
        return PLAN.noise.sample(jax.random.fold_in(own, s), X[image].shape, jnp.float32)

    return X[image] + np.asarray(jax.vmap(draw)(jnp.arange(n, dtype=jnp.uint32)))


@pytest.fixture(scope="module")
def bounds():
    return certify(KEY, linear, jnp.asarray(X), PLAN, 0.25)


def exact_rank(n, p, level):
    q = np.arange(1, n + 2)
    return q[np.argmax(np.append(stats.binom.sf(q[:-1] - 1, n, p) <= level, True))]


@pytest.mark.parametrize(("n", "level"), [(1, 0.4), (60, 5e-4), (1000, 1e-6), (20_000, 0.025)])
def test_order_statistics_have_exact_binomial_tails(n, level):
    p = np.array([1e-9, 1e-3, 0.05, 0.3, 0.5, 0.61, 0.9, 0.995, 0.9999, 1.0])
    with jax.enable_x64(True):
        ranks = np.asarray(order_statistic(n, jnp.asarray(p), level))
    assert ranks.tolist() == [exact_rank(n, each, level) for each in p]


def test_no_order_statistic_of_few_draws_is_enough():
    with jax.enable_x64(True):
        assert order_statistic(10, jnp.asarray(0.9), 1e-3) == 11
        assert order_statistic(66, jnp.asarray(0.9), 1e-3) == 66  # 0.9^66 < 1e-3 < 0.9^65
        assert order_statistic(65, jnp.asarray(0.9), 1e-3) == 66


def test_order_statistics_cover_as_often_as_they_say():
    n, p, level = 80, 0.7, 0.05
    with jax.enable_x64(True):
        rank = int(order_statistic(n, jnp.asarray(p), level))
    uniform = np.sort(np.random.default_rng(0).uniform(size=(20_000, n)), axis=1)
    too_small = np.mean(uniform[:, rank - 1] <= p)
    assert 0.02 < too_small < level + 3 * np.sqrt(level / 20_000)
    assert np.mean(uniform[:, rank - 2] <= p) > level


@pytest.mark.parametrize(("p", "eps"), [(0.5, 0.0), (0.5, 0.3), (0.01, 0.1), (0.97, 2.0)])
def test_shifted_probabilities_are_rounded_up(p, eps):
    def phi(t):
        return (1 + mpmath.erf(t / mpmath.sqrt(2))) / 2

    with mpmath.workdps(40), jax.enable_x64(True):
        quantile = stats.norm.ppf(p)
        ours = float(shifted(jnp.asarray(quantile), eps, SIGMA))
        exact = phi(mpmath.mpf(quantile) + mpmath.mpf(eps) / SIGMA)
        assert exact < ours < exact + 1e-11


def test_bounds_are_order_statistics_of_the_documented_draws(bounds):
    level = PLAN.alpha / (2 * 2)  # two sides, two coordinates
    for i in range(3):
        y = np.sort(np.asarray(linear(draws_by_hand(i, PLAN.n))), axis=0)
        p_up = stats.norm.cdf(0.25 / SIGMA)
        upper = exact_rank(PLAN.n, p_up, level)
        assert np.allclose(bounds.upper[i], y[upper - 1], atol=1e-5)
        assert np.allclose(bounds.lower[i], y[PLAN.n - upper], atol=1e-5)
        assert np.allclose(bounds.value[i], y[499], atol=1e-5)
        # What np.quantile interpolates at the bare probability is no bound at this confidence.
        assert np.all(bounds.upper[i] > np.quantile(y, p_up, axis=0))


def test_bounds_hold_the_exact_medians_of_a_linear_function(bounds):
    reach = 0.25 * np.linalg.norm(WEIGHTS, axis=0)
    middle = np.asarray(linear(X))
    slack = 0.3 * SIGMA * np.linalg.norm(WEIGHTS, axis=0)
    assert np.all(bounds.lower <= middle - reach)
    assert np.all(bounds.upper >= middle + reach)
    assert np.all(bounds.lower > middle - reach - slack)
    assert np.all(bounds.upper < middle + reach + slack)
    assert np.all((bounds.lower <= bounds.value) & (bounds.value <= bounds.upper))
    assert isinstance(bounds, PercentileBounds)
    assert np.all(bounds.radius >= np.float32(0.25))
    assert np.all(np.asarray(bounds.confidence, np.float64) <= 1 - PLAN.alpha)
    assert (bounds.p, bounds.norm) == (0.5, 2)


def test_bounds_fail_as_rarely_as_they_say():
    """The same image a thousand times over, at a low confidence: all bounds hold together."""
    plan = SmoothingPlan(noise=PLAN.noise, n=100, alpha=0.2, chunk=50)
    bounds = certify(KEY, linear, jnp.tile(X[:1], (1000, 1)), plan, 0.0, p=0.8)
    norms = np.linalg.norm(WEIGHTS, axis=0)
    exact = X[0] @ WEIGHTS + SIGMA * norms * stats.norm.ppf(0.8)
    outside = np.any((bounds.lower > exact) | (bounds.upper < exact), axis=1)
    assert 0.05 < outside.mean() < 0.2 + 3 * np.sqrt(0.2 / 1000)
    assert np.all(np.abs(np.mean(bounds.lower, axis=0) - exact) < 0.5 * SIGMA * norms)
    assert np.all(np.abs(np.mean(bounds.upper, axis=0) - exact) < 0.5 * SIGMA * norms)


def test_chunk_order_batch_and_jit_change_no_bound_but_eps_does(bounds):
    order, eps = np.array([2, 0, 1]), np.array([0.25, 0.0, 0.5], np.float32)
    plan = SmoothingPlan(noise=PLAN.noise, n=PLAN.n, chunk=333)
    call = jax.jit(lambda k, e: certify(k, linear, jnp.asarray(X[order]), plan, e, index=order))
    again = call(KEY, eps)
    for name in ("value", "lower", "upper"):
        assert np.allclose(getattr(again, name)[0], getattr(bounds, name)[2], atol=1e-6)
    width, reference = again.upper - again.lower, (bounds.upper - bounds.lower)[order]
    assert np.all(width[1] < reference[1])
    assert np.all(width[2] > reference[2])
    assert not np.allclose(call(jax.random.key(4), eps).upper[0], bounds.upper[2], atol=1e-4)


def awkward(z):
    """Coordinates that are NaN in a third of the draws at 0, always, and never; infinities; steps.

    Steps in one direction are the worst case of the theorem.
    """
    first = z[:, :1]
    sometimes = jnp.where(first > 0.43 * SIGMA, jnp.nan, first)
    infinite = jnp.where(first > 0, jnp.inf, -jnp.inf)
    steps = jnp.round(4 * (first + 0.3))
    return jnp.concatenate([sometimes, jnp.nan * first, first, infinite, steps], axis=1)


def test_nan_infinity_and_steps():
    x = jnp.zeros((2, 3)).at[1, 1].set(jnp.nan)
    bounds = certify(KEY, awkward, x, PLAN, 0.5)
    lower, upper = np.asarray(bounds.lower), np.asarray(bounds.upper)
    # A median one sigma away needs Phi(1) = 84% of numbers on either side; a third are NaN.
    assert np.all(np.isneginf(lower[0, :2]))
    assert np.all(np.isposinf(upper[0, :2]))
    assert np.all(np.isfinite([lower[0, 2], upper[0, 2]]))
    assert (lower[0, 3], upper[0, 3]) == (-np.inf, np.inf)
    # The median of a monotone function is that of its argument, which moves from -0.2 to 0.8.
    assert -2 <= lower[0, 4] <= -1
    assert 3 <= upper[0, 4] <= 4
    assert np.all(np.isneginf(lower[1]) & np.isposinf(upper[1]))
    assert np.all(np.isnan(bounds.value[1]))


least_overlap = jax.jit(iou_lower)


def box(draw):
    left, top = draw(0, 5), draw(0, 5)
    return [left, top, left + draw(0.1, 5), top + draw(0.1, 5)]


@given(st.randoms(use_true_random=False))
def test_no_box_between_the_bounds_overlaps_less(random):
    given_box, centre = (np.array(box(random.uniform)) for _ in range(2))
    lower = centre - [random.uniform(0, 1) for _ in range(4)]
    upper = centre + [random.uniform(0, 1) for _ in range(4)]

    def as_bounds(low, high):
        low, high = (jnp.asarray(v, jnp.float32)[None] for v in (low, high))
        return PercentileBounds(low, low, high, jnp.ones(1), jnp.ones(1), 0.5, 2.0)

    def iou(a, b):
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        common = np.prod(np.maximum(sides, 0))
        return common / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)

    least = least_overlap(as_bounds(lower, upper), jnp.asarray(given_box, jnp.float32)[None])[0]
    weights = np.array([[random.choice([0, 1, random.random()]) for _ in range(4)] for _ in "ab"])
    for weight in weights:
        some = lower + weight * (upper - lower)
        if np.all(some[2:] > some[:2]):
            assert least <= iou(some, given_box) + 1e-5
    exact = least_overlap(as_bounds(centre, centre), jnp.asarray(given_box, jnp.float32)[None])[0]
    assert np.isclose(exact, iou(centre, given_box), atol=1e-5)


def test_unbounded_boxes_overlap_with_nothing_surely():
    low, high = -jnp.full((1, 4), jnp.inf), jnp.full((1, 4), jnp.inf)
    bounds = PercentileBounds(low, low, high, jnp.ones(1), jnp.ones(1), 0.5, 2.0)
    assert iou_lower(bounds, jnp.array([[0.0, 0.0, 1.0, 1.0]])) == 0
    with pytest.raises(ValueError, match="one shape"):
        iou_lower(bounds, jnp.zeros((2, 4)))


def test_noise_on_the_grid_bounds_percentiles_between_its_points():
    """The 0.8-quantile of a pixel under round(255 sigma N) / 255 moves along with the pixel."""
    plan = SmoothingPlan(noise=GridGaussian(0.1), n=2000, chunk=100)
    x = jnp.full((1, 1), 100 / 255)
    bounds = certify(KEY, lambda z: 255 * z, x, plan, 10 / 255, p=0.8)
    assert bounds.within == Grid(255)
    quantile = np.ceil(stats.norm.ppf(0.8) * 25.5 - 0.5)
    low, high = float(bounds.lower[0, 0]), float(bounds.upper[0, 0])
    assert 85 + quantile < low <= 90 + quantile + 1e-3
    assert 110 + quantile - 1e-3 <= high < 115 + quantile
    with pytest.raises(ValueError, match="round pixels to their grid"):
        certify(KEY, lambda z: z, x + 0.001, plan, 0.1)


def test_what_the_law_lacks_is_added_at_both_ends():
    with jax.enable_x64(True):
        for side in (-1, 1):
            exact, less = (float(needed(0.8, 0.1, SIGMA, v, side)) for v in (0.0, 0.01))
            at_x = stats.norm.cdf(stats.norm.ppf(0.8 if side == 1 else 0.2) + 0.2)
            assert at_x <= exact < at_x + 1e-9
            end = (0.8 if side == 1 else 0.2) + 0.01
            assert less == pytest.approx(stats.norm.cdf(stats.norm.ppf(end) + 0.2) + 0.01, abs=1e-9)
        assert needed(0.999, 0.0, SIGMA, 0.01) == needed(0.001, 0.0, SIGMA, 0.01, -1) == 1


@pytest.mark.parametrize(("norm", "size"), [(1, 1), (2, 1), (np.inf, np.sqrt(12))])
def test_sigma_is_counted_in_the_norm_of_the_noise(norm, size):
    """A step of eps in every coordinate is one of sqrt(d) eps in L2."""
    plan = SmoothingPlan(noise=Gaussian(0.3, norm=norm), n=100)
    sigma = sigma_of(plan, jnp.zeros((2, 3, 4)))
    assert 0.3 / size * (1 - 1e-7) < sigma <= 0.3 / size


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"p": 1.0}, ValueError, "p=0.5"),
        ({"eps": -0.1}, ValueError, "eps=0.25"),
        ({"eps": np.ones(2)}, ValueError, "one per image"),
        ({"plan": SmoothingPlan(noise=Laplace(0.5), n=100)}, TypeError, "Gaussian"),
        ({"plan": 0.5}, TypeError, "SmoothingPlan"),
        ({"key": jax.random.PRNGKey(0)}, TypeError, "key"),
        ({"x": np.ones((2, 3), int)}, TypeError, "astype"),
        ({"x": X[0]}, ValueError, "batch axis"),
        ({"index": np.arange(2)}, ValueError, "one number per image"),
        ({"f": lambda z: (z, z)}, TypeError, "one floating point array"),
        ({"f": lambda z: z.sum(0)}, ValueError, "to a batch"),
    ],
)
def test_bad_arguments_say_what_to_type(change, error, words):
    good = {"key": KEY, "f": linear, "x": X, "plan": PLAN, "eps": 0.25, "p": 0.5, "index": None}
    with pytest.raises(error, match=words):
        certify(**{**good, **change})
