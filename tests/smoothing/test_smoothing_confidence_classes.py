"""Upper bounds, and bounds on all classes at once, by the definition of validity."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy import stats

from jaxcert.smoothing.confidence import (
    class_bounds,
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
)

ALPHA = 0.05


def exact_upper(k, n, alpha):
    return np.where(k == n, 1.0, stats.beta.isf(alpha, k + 1, np.maximum(n - k, 1)))


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("alpha", [1e-12, 1e-3, 0.3])
def test_upper_bound_is_the_beta_quantile_and_never_below(n, alpha):
    k = np.sort(np.concatenate([np.linspace(0, n, 37).astype(int), [min(1, n), n - 1]]))
    exact, bound = exact_upper(k, n, alpha), np.asarray(clopper_pearson_upper(k, n, alpha))
    assert bound.dtype == np.float64
    assert np.all(bound >= exact * (1 - 1e-14))
    np.testing.assert_allclose(bound, exact, atol=1e-7)
    assert bound[-1] == 1.0
    assert bound[0] >= -math.expm1(math.log(alpha) / n)


@pytest.mark.parametrize("n", [1, 7, 50, 400])
def test_upper_bound_is_valid_for_every_p(n):
    k = np.arange(n + 1)
    bounds = np.asarray(clopper_pearson_upper(k, n, ALPHA))
    # P[U(K) < p] jumps where p passes some U(k), and falls with p in between.
    worst = max(
        float(stats.binom.cdf(np.sum(bounds < p) - 1, n, p)) for p in np.nextafter(bounds[:-1], 1)
    )
    assert 0.99 * ALPHA < worst <= ALPHA * (1 + 1e-9)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (2**31 - 1, 10), (0, 0)])
def test_impossible_counts_prove_nothing(k, n):
    assert float(clopper_pearson_upper(k, n, 0.001)) == 1.0


def test_rounding_of_one_minus_the_lower_bound_is_upward():
    with jax.enable_x64(True):
        for k, n in [(3, 10), (999_999, 10**6), (1, 10**6), (5, 1000)]:
            lower = float(clopper_pearson_lower(n - k, n, 1e-3))
            assert math.fsum([float(clopper_pearson_upper(k, n, 1e-3)), lower, -1.0]) > 0


def test_two_sided_interval_has_half_of_alpha_on_each_side():
    k, n = np.array([0, 4, 77, 100]), 100
    lower, upper = map(np.asarray, clopper_pearson(k, n, 0.01))
    np.testing.assert_array_equal(lower, clopper_pearson_lower(k, n, 0.005))
    np.testing.assert_array_equal(upper, clopper_pearson_upper(k, n, 0.005))
    for j, a, b in zip(k, lower, upper, strict=True):
        ci = stats.binomtest(int(j), n).proportion_ci(0.99, method="exact")
        assert (a, b) == pytest.approx((ci.low, ci.high), abs=1e-7)


N, K = 20, 4
COUNTS = np.array([c for c in itertools.product(range(N + 1), repeat=K) if sum(c) <= N])


def probabilities(p):
    """Of every row of COUNTS, for n draws of classes p that abstain with what is missing from 1."""
    rest = max(0.0, 1 - math.fsum(p))
    full = np.column_stack([COUNTS, N - COUNTS.sum(1)])
    return stats.multinomial.pmf(full, N, [*p, rest])


DISTRIBUTIONS = [
    (0.5, 0.5, 0.0, 0.0),
    (0.4, 0.2, 0.2, 0.2),
    (0.7, 0.1, 0.1, 0.1),
    (0.55, 0.35, 0.05, 0.05),
    (0.3, 0.1, 0.1, 0.05),  # abstains as often as not
    (0.25, 0.6, 0.1, 0.05),  # the selection was wrong
    (0.881, 0.119, 0.0, 0.0),
    (0.6, 0.143, 0.143, 0.1),
]


@pytest.fixture(scope="module")
def bounds():
    return [np.asarray(b) for b in class_bounds(COUNTS, np.zeros(len(COUNTS), int), N, ALPHA)]


def error(bounds, p):
    """P[p_A < p_lower or some other p_c > p_upper]."""
    p_lower, p_upper = bounds
    return probabilities(p)[(p_lower > p[0]) | (p_upper < max(p[1:]) - 1e-12)].sum()


@pytest.mark.parametrize("p", DISTRIBUTIONS)
def test_both_bounds_hold_together(bounds, p):
    assert math.fsum(probabilities(p)) == pytest.approx(1)
    assert error(bounds, p) <= ALPHA


def test_the_bounds_are_clopper_pearson_at_half_of_alpha(bounds):
    votes, runner_up = np.arange(N + 1), COUNTS[:, 1:].max(axis=1)

    def at(level):
        lower, upper = map(np.asarray, clopper_pearson(votes, N, level))
        return lower[COUNTS[:, 0]], upper[runner_up]

    for mine, other in zip(bounds, at(ALPHA), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-11)
    assert np.all(bounds[1] <= (1 - bounds[0]) * (1 + 1e-11))
    # At larger levels the check above fails, so it can.
    assert max(error(at(2.5 * ALPHA), p) for p in DISTRIBUTIONS) > ALPHA


def test_the_votes_of_a_class_named_by_other_draws_bound_that_class_alone():
    """The second of the selection, bounded by its own votes, is not always the likeliest other."""
    p = np.array([0.4, 0.34, 0.13, 0.13])
    upper = np.asarray(clopper_pearson_upper(np.arange(N + 1), N, ALPHA / 2))
    weight = probabilities(p)
    # Selection by 10 draws of the same classes: which of the others comes first?
    votes = np.random.default_rng(0).multinomial(10, p, 4000)[:, 1:]
    named = 1 + np.argmax(votes, axis=1)
    misses = [weight[upper[COUNTS[:, c]] < p[1]].sum() for c in range(K)]
    assert np.mean(np.take(misses, named)) > 1.5 * ALPHA
    # The most voted of the others in the same draws needs no union with the rest.
    assert weight[upper[COUNTS[:, 1:].max(axis=1)] < p[1]].sum() <= misses[1] <= ALPHA / 2


def test_a_selection_that_abstained_proves_nothing():
    for top in (-1, 3):
        p_lower, p_upper = class_bounds([90, 5, 5], top, 100, 0.001)
        assert float(p_lower) == 0.0
        assert float(p_upper) > 0.9


def test_class_bounds_are_the_same_under_jit():
    counts, top = np.array([[80, 15, 5], [1, 2, 90]]), np.array([0, 2])
    compiled = jax.jit(lambda c, t: class_bounds(c, t, 100, 0.001))(counts, top)
    for mine, other in zip(class_bounds(counts, top, 100, 0.001), compiled, strict=True):
        assert np.asarray(other).dtype == np.float64
        np.testing.assert_allclose(np.asarray(mine), np.asarray(other), rtol=1e-11)


@pytest.mark.parametrize("counts", [5, [5]])
def test_one_class_is_no_comparison(counts):
    with pytest.raises(ValueError, match="at least 2 classes"):
        class_bounds(counts, 0, 10, 0.001)
