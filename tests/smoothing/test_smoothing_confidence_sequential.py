"""Tests that stop early are valid, by exact recursion over (t, k), and decide what they say."""

import dataclasses
import math

import jax
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert.smoothing.confidence import (
    NEVER,
    Betting,
    FixedSize,
    Hybrid,
    SequentialTest,
    Spending,
    StagedClopperPearson,
    UnionBound,
    betting_lower,
    clopper_pearson_lower,
)
from jaxcert.smoothing.confidence.betting import log_wealth
from jaxcert.smoothing.confidence.boundaries import betting_count, clopper_pearson_count

TESTS = [
    FixedSize(),
    FixedSize(curtailed=True),
    StagedClopperPearson((100, 500)),
    UnionBound(),
    Betting(),
    Hybrid(),
]
NULLS = np.array([0.3, 0.5, 0.6914624612740131, 0.8413447460685429, 0.9772498680518208, 0.9986])


def outcome(up, down, p, peek):
    """P[a count reaches `up` first], P[falls to `down` first] for ints (T,), exactly."""
    step = stats.binom.pmf(np.arange(peek + 1), peek, p)
    alive, reached, fell = np.ones(1), 0.0, 0.0
    for high, low in zip(up, down, strict=True):
        alive = np.convolve(alive, step)
        reached += alive[high:].sum()
        fell += alive[: low + 1].sum()
        alive = alive[:high].copy()
        alive[: low + 1] = 0.0
    return reached, fell


def ever_certifies(up, p, peek):
    return outcome(up, np.full(len(up), -1), p, peek)[0]


@pytest.mark.parametrize("test", TESTS, ids=str)
@pytest.mark.parametrize(("n_max", "peek"), [(300, 1), (2000, 20)])
@pytest.mark.parametrize("alpha", [1e-3, 0.05])
def test_false_certificates_are_as_rare_as_promised(test, n_max, peek, alpha):
    tables = test.boundaries(NULLS, n_max=n_max, alpha=alpha, peek=peek)
    errors = [ever_certifies(up, p0, peek) for up, p0 in zip(tables.certify.T, NULLS, strict=True)]
    assert max(errors) <= alpha * (1 + 1e-9)
    assert max(errors) > 0.1 * alpha
    assert ever_certifies(tables.certify[:, 3], NULLS[3] - 0.01, peek) < errors[3]


@pytest.mark.parametrize("p0", [0.5, 0.8413447460685429])
def test_a_fixed_size_bound_looked_at_again_and_again_fails_the_check(p0):
    n = np.arange(20, 2001, 20)
    for alpha in (1e-3, 0.05):
        often = clopper_pearson_count(n, p0, alpha)
        assert ever_certifies(np.minimum(often, n + 1), p0, 20) > 2.5 * alpha


def test_a_threshold_of_half_the_inverse_of_alpha_fails_the_check():
    """log(1/alpha/2) is log(1/(2 alpha)): each side at 2 alpha. Each needs alpha / 2."""
    alpha, p0, n = 0.02, 0.5, np.arange(1, 2001)

    def error(level):
        up = np.minimum(betting_count(n, p0, level), n + 1)
        down = n - np.minimum(betting_count(n, 1 - p0, level), n + 1)
        return sum(outcome(up, down, p0, 1))

    assert error(2 * alpha) > alpha
    assert error(alpha / 2) <= alpha


@pytest.mark.parametrize("test", TESTS, ids=str)
def test_giving_up_costs_no_more_power_than_beta(test):
    alpha, beta, peek = 1e-3, 0.01, 20
    tables = test.boundaries(NULLS, n_max=2000, alpha=alpha, peek=peek, beta=beta)
    lost = []
    for p0, up, down in zip(NULLS, tables.certify.T, tables.give_up.T, strict=True):
        for p in (p0, (p0 + 1) / 2):
            reached, fell = outcome(up, down, p, peek)
            assert reached + fell == pytest.approx(1)  # the last row decides
            lost.append(ever_certifies(up, p, peek) - reached)
    assert -1e-12 < max(lost) <= beta
    assert np.all(tables.give_up < tables.certify)


def test_most_runs_far_from_p0_are_short():
    tables = Hybrid().boundaries([0.6914624612740131], n_max=10_000, alpha=1e-3, peek=100)
    up, down = tables.certify[:5, 0], tables.give_up[:5, 0]
    assert outcome(up, down, 0.95, 100)[0] > 0.999
    assert outcome(up, down, 0.4, 100)[1] > 0.999


def test_curtailing_changes_no_decision():
    rng = np.random.default_rng(0)
    p0 = np.array([0.5, 0.9, 0.99])
    whole, early = (
        FixedSize(c).boundaries(p0, n_max=500, alpha=0.01, peek=10) for c in (False, True)
    )
    paths = np.cumsum(rng.binomial(10, rng.beta(5, 1, (300, 1)), (300, 50)), axis=1)[..., None]
    expected = paths[:, -1] >= whole.certify[-1]
    decided_up, decided_down = paths >= early.certify, paths <= early.give_up
    assert not np.any(decided_up & decided_down)
    assert np.array_equal(decided_up.any(1), expected)
    assert np.array_equal(decided_down.any(1), ~expected)
    assert 0.2 < expected.mean() < 0.8
    assert (decided_up | decided_down)[:, 24].mean() > 0.3
    # And not before it is sure: one block earlier, the opposite was possible.
    assert np.all(whole.certify[:-1] == NEVER)
    assert np.all(whole.give_up[:-1] == -1)


@pytest.mark.parametrize("test", TESTS, ids=str)
def test_tables_of_several_probabilities_are_nested(test):
    rng = np.random.default_rng(1)
    p0 = np.concatenate([1 - 10 ** rng.uniform(-6, -0.3, 12), rng.uniform(0, 1, 12), [1.0]])
    p0 = np.concatenate([p0, np.nextafter(p0[:12], 0), np.nextafter(p0[:12], 1)])
    options = {"n_max": 5000, "alpha": 1e-3, "peek": 50}
    tables = test.boundaries(p0, **options)
    order = np.argsort(p0)
    assert np.all(np.diff(tables.certify[:, order].astype(np.int64), axis=1) >= 0)
    assert np.all(np.diff(tables.give_up[:, order], axis=1) >= 0)
    assert tables.certify.dtype == tables.give_up.dtype == np.int32
    # Nothing was raised to make them so.
    for r in (0, 5, 20):
        alone = test.boundaries(p0[r : r + 1], **options)
        np.testing.assert_array_equal(alone.certify[:, 0], tables.certify[:, r])
        np.testing.assert_array_equal(alone.give_up[:, 0], tables.give_up[:, r])


def test_runs_decide_nested_sets():
    rng = np.random.default_rng(2)
    p0 = np.sort(rng.uniform(0.5, 0.999, 6))
    tables = Hybrid().boundaries(p0, n_max=2000, alpha=0.2, beta=0.3, peek=10)
    paths = np.cumsum(rng.binomial(10, rng.uniform(0.5, 1, (200, 1)), (200, 200)), axis=1)[
        ..., None
    ]
    up, down = paths >= tables.certify, paths <= tables.give_up
    first_up = np.where(up.any(1), up.argmax(1), 1000)
    first_down = np.where(down.any(1), down.argmax(1), 1000)
    certified = first_up < first_down
    assert np.all(np.diff(certified.astype(int), axis=1) <= 0)
    assert 1 < certified.sum(1).mean() < 5


@pytest.mark.parametrize("alpha", [1e-12, 1e-3, 0.3])
@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
def test_clopper_pearson_counts_are_the_least_ones(n, alpha):
    p0 = np.array([1e-9, 0.1, 0.5, 0.9, 0.999, 0.99977, 1 - 2**-30])
    count = clopper_pearson_count(n, p0, alpha)
    for k, p in zip(count, p0, strict=True):
        if k == NEVER:
            assert stats.binom.sf(n - 1, n, p) > alpha
        else:
            assert stats.binom.sf(k - 1, n, p) <= alpha < stats.binom.sf(k - 2, n, p)
    # And the bounds that are computed in graph, by other means, agree.
    possible = np.minimum(count, n)
    proved = np.asarray(clopper_pearson_lower(possible, n, alpha)) >= p0 * (1 - 1e-7)
    np.testing.assert_array_equal(proved, count <= n)
    assert not np.any(np.asarray(clopper_pearson_lower(possible - 1, n, alpha)) >= p0)


def exact_wealth(k, t, p0):
    """The integral that defines W, by quadrature."""
    with mpmath.workdps(30):
        k, t, p0 = mpmath.mpf(int(k)), mpmath.mpf(int(t)), mpmath.mpf(float(p0))

        def density(u):  # q = sin(u)^2 takes the singularity of Beta(1/2, 1/2) at 1 away
            q = mpmath.sin(u) ** 2
            return (q / p0) ** k * ((1 - q) / (1 - p0)) ** (t - k)

        low, high = mpmath.asin(mpmath.sqrt(p0)), mpmath.pi / 2
        peak = mpmath.asin(mpmath.sqrt(k / t))
        points = sorted({low, min(max(peak, low), high), high})
        return mpmath.quad(density, points, maxdegree=8) / (high - low)


@pytest.mark.parametrize(
    ("t", "p0"), [(1, 0.02), (10, 0.5), (100, 0.9), (500, 0.99), (1000, 0.7), (5000, 0.999)]
)
def test_wealth_is_its_integral_and_counts_are_the_least_ones(t, p0):
    for alpha in (1e-3, 0.3):
        k = int(betting_count(np.array([t]), p0, alpha)[0])
        if k == NEVER:
            assert exact_wealth(t, t, p0) < 1 / alpha
            continue
        assert exact_wealth(k, t, p0) >= 1 / alpha
        assert k == 1 or exact_wealth(k - 1, t, p0) < 1 / alpha
        bound = float(log_wealth(np.float64(k), np.float64(t), p0))
        exact = float(mpmath.log(exact_wealth(k, t, p0)))
        assert bound == pytest.approx(exact, abs=1e-9)
        assert bound <= exact


@pytest.mark.parametrize(("k", "t"), [(1, 1), (50, 100), (99, 100), (100, 100), (990, 1000)])
def test_betting_lower_rejects_what_lies_below_and_not_above(k, t):
    for alpha in (1e-6, 1e-3, 0.3):
        bound = float(betting_lower(k, t, alpha))
        assert 0 < bound < k / t
        assert exact_wealth(k, t, bound) >= 1 / alpha
        assert exact_wealth(k, t, bound * (1 + 1e-9)) < 1 / alpha


def test_betting_lower_holds_at_all_times_at_once():
    alpha, t, k = 0.02, np.arange(4, 201, 4)[:, None], np.arange(201)
    inside = k <= t
    anytime = np.where(inside, 0.0, np.nan)
    anytime[inside] = betting_lower(*(part[inside] for part in np.broadcast_arrays(k, t)), alpha)
    # What one may not do is to take the fixed size bound whenever it looks best.
    fixed = stats.beta.ppf(alpha, np.maximum(k, 1), np.maximum(t - k, 0) + 1)
    for p in (0.3, 0.5, 0.9):
        for bounds, holds in ((anytime, True), (fixed, False)):
            too_high = (bounds > p) & inside & (k > 0)
            up = np.where(too_high.any(1), too_high.argmax(1), NEVER)
            error = ever_certifies(up, p, 4)
            assert error > 0.1 * alpha
            assert (error <= alpha) == holds


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-6, 0.9))
def test_betting_lower_and_the_tables_are_the_same_test(t, position, alpha):
    p0 = 0.01 + 0.98 * position
    k = int(betting_count(np.array([t]), p0, alpha)[0])
    if k != NEVER:
        assert betting_lower(k, t, alpha) >= p0 * (1 - 1e-12)
        assert betting_lower(k - 1, t, alpha) < p0
    assert np.all(np.diff(betting_lower(np.arange(0, t + 1, 1 + t // 20), t, alpha)) >= 0)


def test_numbers_that_mean_nothing_prove_nothing():
    k, t = np.array([-1, 11, 0, np.nan, 5, 0]), np.array([10, 10, 10, 10, np.nan, 0])
    np.testing.assert_array_equal(betting_lower(k, t, 0.001), 0.0)
    np.testing.assert_array_equal(betting_lower(5, 10, [0.0, -1.0, np.nan]), 0.0)
    assert betting_lower(10, 10, 1e-305) < betting_lower(10, 10, 1e-3)
    assert clopper_pearson_count(10_000, 0.5, 1e-305) == NEVER


def test_what_cannot_be_certified_costs_no_draws():
    p0 = [1.0, 0.9999]  # 0.001^(1/1000) = 0.9931
    for test in TESTS[1:]:
        tables = test.boundaries(p0, n_max=1000, alpha=1e-3)
        assert np.all(tables.give_up[0] == 100)
    with_all = Hybrid().boundaries([0.99, 1.0], n_max=1000, alpha=1e-3).certify[-1]
    assert with_all[0] <= 1000
    assert with_all[1] > 1000


def test_stages_and_times_are_whole_blocks():
    draws = np.arange(100, 20_001, 100)
    looks = StagedClopperPearson((150, 1000, 20_000, 10**9)).spending(draws).looks
    assert dict(zip(draws[looks > 0], looks[looks > 0], strict=True)) == {
        200: 1 / 3,
        1000: 1 / 3,
        20_000: 1 / 3,
    }
    looks = UnionBound(1.5).spending(draws).looks
    times = draws[looks > 0]
    np.testing.assert_array_equal(times[:6], [100, 200, 300, 500, 800, 1200])
    assert math.fsum(looks) == pytest.approx(1)
    np.testing.assert_allclose(looks[looks > 0][:2], [5 / 30, 5 / 42])
    for test in TESTS:  # a run of a single look, whatever the test
        one = test.boundaries([0.5], n_max=100, alpha=1e-3)
        assert one.give_up[0, 0] == one.certify[0, 0] - 1


def test_tables_enter_jit_as_a_pytree():
    tables = Hybrid().boundaries([0.5, 0.9], n_max=400, alpha=1e-3)
    certified = jax.jit(lambda tables, k: k >= tables.certify[1])(tables, 195)
    np.testing.assert_array_equal(certified, [True, False])
    assert len({hash(test) for test in TESTS}) == len(TESTS)


@dataclasses.dataclass(frozen=True)
class TwiceTheBudget(SequentialTest):
    def spending(self, draws):
        return Spending(1.0, np.full(len(draws), 1 / len(draws)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p0": 0.5}, "p0 must be probabilities"),
        ({"p0": [0.5, np.nan]}, "p0 must be probabilities"),
        ({"p0": [0.0]}, "p0 must be probabilities"),
        ({"n_max": 1050}, "take n_max=1100"),
        ({"n_max": 1e3}, "n_max must be an int"),
        ({"peek": 0}, "peek must be an int"),
        ({"alpha": 0.0}, "alpha must lie in"),
        ({"beta": 1.0}, "beta must lie in"),
    ],
)
def test_bad_input_is_explained(change, message):
    with pytest.raises(ValueError, match=message):
        Hybrid().boundaries(**{"p0": [0.5], "n_max": 1000, "alpha": 1e-3, **change})


def test_bad_tests_are_explained():
    with pytest.raises(ValueError, match="spends 2 times alpha"):
        TwiceTheBudget().boundaries([0.5], n_max=1000, alpha=1e-3)
    with pytest.raises(ValueError, match="share of alpha"):
        Hybrid(1.5)
    with pytest.raises(ValueError, match="ratio must exceed 1"):
        UnionBound(1.0)
    with pytest.raises(ValueError, match="looks must be a tuple"):
        StagedClopperPearson((0,))
    with pytest.raises(ValueError, match="looks must be a tuple"):
        StagedClopperPearson([100])
