"""The binomial bounds are exact: against SciPy, and against the definition of validity itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert.smoothing.confidence import clopper_pearson_lower, leader_is_certain, upper_tail


def reference(k, n, alpha):
    return np.where(k == 0, 0.0, stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1))


def worst_miscoverage(bounds, n):
    """max over p of P[L(K) > p] for K ~ Binomial(n, p), given L(0), ..., L(n).

    P[L(K) > p] = sum_k pmf(k; n, p) [L(k) > p] jumps where p passes some L(k), and between jumps
    is a sum of upper tails, so it is looked at just below every L(k), and on a fine grid.
    """
    grid = np.concatenate([np.linspace(0, 1, 501), np.nextafter(bounds, 0)])
    grid = np.unique(grid[(grid >= 0) & (grid <= 1)])
    k = np.arange(n + 1)
    return max(float(stats.binom.pmf(k, n, p)[bounds > p].sum()) for p in grid)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("alpha", [1e-12, 1e-3, 0.05, 0.3])
def test_lower_bound_is_the_beta_quantile_and_never_above(n, alpha):
    k = np.unique(np.concatenate([np.linspace(0, n, 41), [1, 2, 3, n - 2, n - 1]]).astype(int))
    k = k[(k >= 0) & (k <= n)]
    exact = reference(k, n, alpha)
    bound = np.asarray(clopper_pearson_lower(k, n, alpha))
    assert bound.dtype == np.float64
    assert np.all(bound <= exact * (1 + 1e-14))
    many = 2 * k > n
    np.testing.assert_allclose(bound[many], exact[many], rtol=1e-10)
    np.testing.assert_allclose(bound, exact, rtol=1e-7)


@pytest.mark.parametrize("n", [10**7, 10**9, 2**31 - 1])
def test_lower_bound_holds_up_to_the_largest_n(n):
    k = np.array([1, n // 10, n // 2, n // 2 + 40_000, int(0.9 * n), n - 1, n])
    for alpha in (1e-3, 0.45):  # near the median the fraction does not settle: looser, not wrong
        exact = reference(k, n, alpha)
        bound = np.asarray(clopper_pearson_lower(k, n, alpha))
        assert np.all(bound <= exact * (1 + 1e-12))
        deviations = (exact - bound) / np.sqrt(exact * (1 - exact) / n)
        assert np.all(deviations < (1e-3 if alpha == 1e-3 else 2.0))


def test_lower_bound_at_the_ends():
    for n, alpha in [(1, 0.05), (100, 1e-3), (100_000, 1e-3)]:
        none, every = np.asarray(clopper_pearson_lower(np.array([0, n]), n, alpha))
        assert none == 0.0
        assert every <= alpha ** (1 / n)
        assert every == pytest.approx(alpha ** (1 / n), rel=1e-12)


def test_an_alpha_that_no_float_resolves_proves_nothing():
    assert float(clopper_pearson_lower(10, 10, 1e-305)) == 0.0
    assert float(clopper_pearson_lower(10, 10, 1e-299)) > 0.0


@pytest.mark.parametrize("k", [-1, 11, 2**31 - 1])
def test_impossible_counts_prove_nothing(k):
    assert float(clopper_pearson_lower(k, 10, 0.001)) == 0.0


@pytest.mark.parametrize("n", [1, 7, 50, 400, 2000])
@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_bound_is_valid_for_every_p(n, alpha):
    k = np.arange(n + 1)
    worst = worst_miscoverage(np.asarray(clopper_pearson_lower(k, n, alpha)), n)
    assert worst <= alpha
    assert worst > 0.99 * alpha  # attained just below a bound, so the check can see a violation


def test_the_fraction_of_votes_is_not_a_bound():
    """p_A = counts / n, as if there were no sampling error, is wrong half of the time or more."""
    for n in (50, 400, 2000):
        assert worst_miscoverage(np.arange(n + 1) / n, n) > 0.5


def test_a_bound_for_twice_alpha_fails_the_check():
    n, alpha = 400, 0.001
    loose = np.asarray(clopper_pearson_lower(np.arange(n + 1), n, 2 * alpha))
    assert worst_miscoverage(loose, n) > alpha


def test_jit_vmap_and_scan_agree_with_the_eager_bound():
    k = jnp.array([0, 3, 500, 990, 1000])
    eager = np.asarray(clopper_pearson_lower(k, 1000, 1e-3))

    def one(v):
        return clopper_pearson_lower(v, 1000, 1e-3)

    for transformed in (jax.jit(one), jax.vmap(one), lambda v: jax.lax.map(one, v)):
        bound = np.asarray(transformed(k))
        assert bound.dtype == np.float64
        np.testing.assert_allclose(bound, eager, rtol=1e-11)
        assert np.all(bound <= reference(np.asarray(k), 1000, 1e-3))


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_upper_tail_is_never_below_the_tail(n, fraction, position):
    k = max(1, round(fraction * n))
    p = position * k / n
    with jax.enable_x64(True):
        tail = float(upper_tail(k, n, p))
    exact = stats.binom.sf(k - 1, n, p)
    assert tail >= exact
    if p < k / n:
        assert tail <= exact * (1 + 1e-9) + 2e-300


@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_leader_test_is_the_two_sided_binomial_test(alpha):
    rng = np.random.default_rng(0)
    m = rng.integers(1, 3000, 200)
    first = np.ceil(m / 2 + np.minimum(rng.uniform(0, 3, 200) * np.sqrt(m), m / 2)).astype(int)
    first = np.minimum(first, m)
    expected = [
        stats.binomtest(int(a), int(b), 0.5).pvalue <= alpha for a, b in zip(first, m, strict=True)
    ]
    answer = np.asarray(leader_is_certain(first, m - first, alpha))
    assert 20 < np.sum(expected) < 180
    assert np.array_equal(answer, expected)


def test_no_leader_without_votes_or_with_a_tie():
    first, second = np.array([0, 7, 10**9]), np.array([0, 7, 10**9 - 1])
    assert not np.any(leader_is_certain(first, second, 0.9))


def test_no_confidence_proves_nothing():
    assert np.asarray(clopper_pearson_lower(np.array([0, 50, 100]), 100, 1.0)).tolist() == [0] * 3
