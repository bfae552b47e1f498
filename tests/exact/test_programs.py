"""Solvers of convex programs against samples and weak duality."""

import numpy as np
import pytest

from jaxcert.exact.programs import Program, solved


def program(seed, norm, cut):
    """A random one that has solutions, with a constraint that holds strictly at the centre."""
    rng = np.random.default_rng(seed)
    d, r, h = 4, 1 + seed % 2, seed % 4
    centre, eps = rng.normal(size=d), float(rng.uniform(0.1, 2))
    held = rng.normal(size=(h, d))
    room = held @ centre + rng.uniform(0.01, 0.3, h) * eps
    low, high = centre - eps, centre + eps
    if cut:
        low = np.maximum(low, centre - 0.3 * eps)
    slopes = rng.normal(size=(r, d)) * 10.0 ** rng.uniform(-3, 3)
    return Program(slopes, rng.normal(size=r), held, room, low, high, centre, eps, norm)


def least_over_ball(p, slope):
    """The least of slope (x - centre) over the ball, cut by the box, by bisection for |x| = eps."""
    low, high = p.low - p.centre, p.high - p.centre

    def nearest(t):
        return np.clip(-slope / t, low, high)

    ends = 1e-9, 1e9
    for _ in range(200):
        t = np.sqrt(ends[0] * ends[1])
        outside = np.linalg.norm(nearest(t)) > p.eps
        ends = (t, ends[1]) if outside else (ends[0], t)
    return slope @ nearest(ends[1])


@pytest.mark.parametrize("cut", [False, True])
def test_over_l2_balls_value_and_bound_meet(cut):
    for seed in range(12):
        p = program(seed, 2.0, cut)
        found = solved(p, 60.0)
        assert found is not None
        assert np.linalg.norm(found.x - p.centre) <= p.eps
        assert np.all((p.low <= found.x) & (found.x <= p.high))
        value = np.max(p.slopes @ found.x + p.levels)
        weights, m = found.weights / found.weights.sum(), found.multipliers
        slope = weights @ p.slopes + m @ p.held
        bound = weights @ p.levels - m @ p.room + slope @ p.centre + least_over_ball(p, slope)
        unit = np.linalg.norm(p.slopes, axis=1).max() * p.eps
        assert np.all(m >= 0)
        assert abs(value - bound) <= 1e-4 * unit
        assert np.all(p.held @ found.x <= p.room + 1e-4 * p.eps)


def test_numbers_that_are_not_finite_and_no_time_have_no_solution():
    p = program(3, 2.0, False)
    assert solved(p, 0.0) is None
    nan = Program(p.slopes, p.levels, p.held * np.nan, p.room, p.low, p.high, p.centre, p.eps, 2.0)
    assert solved(nan, 60.0) is None
