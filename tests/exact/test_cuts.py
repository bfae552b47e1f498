"""Sets cut by linear inequalities: against enumeration, exact rationals and known answers."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import least_row
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net, random_weights

from jaxcert import AnyOf, Box, Polytope, Spec, Status, exact
from jaxcert.bounds import ibp
from jaxcert.exact import Budget, milp, verify
from jaxcert.exact.question import Cuts, cuts_of

BUDGET = Budget(seconds=600, domains=20_000)
LOWER, UPPER = (np.float32([end] * 3) for end in ([-1.0, -0.5], [0.5, 1.0]))
MODES = pytest.mark.parametrize("split_inputs", [True, False])
MODES_OF_WHICH_ONE_IS_SLOW = pytest.mark.parametrize(
    "split_inputs", [True, pytest.param(False, marks=pytest.mark.slow)]
)


def any_of(matrix, offset):
    """At each point one of the rows is positive; offsets per set."""
    return AnyOf(tuple(Spec(row[None], offset[:, None]) for row in matrix))


def sum_of_inputs():
    """(x_0 + x_1, 0, 0) on the box, in real arithmetic and as a net of the one architecture."""
    first = np.zeros((2, 5)), np.array([2.0, 2.0, 1, 1, 1])  # nothing has an unsure sign
    first[0][[0, 1], [0, 1]] = 1
    second = np.eye(5), np.zeros(5)
    last = np.zeros((5, 3)), np.array([-4.0, 0, 0])
    last[0][:2, 0] = 1
    return net([tuple(np.float32(a) for a in layer) for layer in (first, second, last)])


def satisfies(x, matrix, offset):
    """Whether matrix x + offset <= 0, in rationals."""
    rows = zip(np.float64(matrix).tolist(), np.float64(offset).tolist(), strict=True)
    x = [Fraction(v) for v in np.float64(x).tolist()]
    return all(
        sum((Fraction(a) * v for a, v in zip(row, x, strict=True)), Fraction(b)) <= 0
        for row, b in rows
    )


# --- Decisions ------------------------------------------------------------------------------------


@functools.cache
def drawn(seed):
    """A net, rows of a clause, cuts for three sets, and the least value on each."""
    rng, weights = np.random.default_rng(seed), random_weights(seed)
    rows, matrix = np.float32(rng.normal(size=(2, 3))), np.float32(rng.normal(size=(3, 2, 2)))
    level = np.float32(rng.uniform(-0.4, 0.4, size=(3, 2)))
    least = np.array([
        least_row(weights, LOWER[0], UPPER[0], rows, np.zeros(2), cuts)
        for cuts in zip(matrix, level, strict=True)
    ])  # fmt: skip
    return weights, rows, matrix, level, least


@MODES_OF_WHICH_ONE_IS_SLOW
@given(
    seed=st.integers(0, 10_000),
    margins=st.lists(st.sampled_from([-0.3, -1e-2, -1e-3, 1e-3, 0.3]), min_size=3, max_size=3),
)
@settings(max_examples=1)
def test_decides_what_enumeration_decides(split_inputs, seed, margins):
    weights, rows, matrix, level, least = drawn(seed)
    empty = np.isinf(least)
    offset = np.float32(np.array(margins) - np.where(empty, 0, least))
    f, region = net(weights), Polytope(jnp.asarray(LOWER), jnp.asarray(UPPER), matrix, level)
    verdict = verify(f, region, any_of(rows, offset), split_inputs=split_inputs, budget=BUDGET)
    holds = empty | (np.array(margins) > 0)
    assert verdict.status.tolist() == np.where(holds, Status.VERIFIED, Status.FALSIFIED).tolist()
    for i in np.flatnonzero(~holds):
        x = np.asarray(verdict.counterexample[i])
        assert np.all((LOWER[i] <= x) & (x <= UPPER[i]))
        assert satisfies(x, matrix[i], level[i])
        outputs = np.asarray(f(x[None]), np.float64)
        assert np.all(rows.astype(np.float64) @ outputs[0] + np.float64(offset[i]) <= 0)
    if split_inputs:
        programs = milp.verify(f, region, any_of(rows, offset), hidden=ibp)
        assert programs.status.tolist() == verdict.status.tolist()


@MODES_OF_WHICH_ONE_IS_SLOW
def test_cuts_decide(split_inputs):
    """x_0 + x_1 > 0.25 where x_0 + x_1 >= 0.3, but neither on the box nor where it is >= 0.2."""
    level, spec = np.array([[0.3], [0.2], [-2.0]]), Spec(jnp.eye(3)[:1], -0.25)
    region = Polytope(jnp.asarray(LOWER), jnp.asarray(UPPER), -np.ones((1, 2)), level)
    verdict = verify(sum_of_inputs(), region, spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED, Status.FALSIFIED]
    assert 0.2 <= np.sum(np.asarray(verdict.counterexample[1], np.float64)) <= 0.25
    whole = Box(region.lower, region.upper)
    verdict = verify(sum_of_inputs(), whole, spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.FALSIFIED] * 3


@MODES_OF_WHICH_ONE_IS_SLOW
def test_a_cut_within_rounding_of_the_boundary_proves_nothing_false(split_inputs):
    """x_0 + x_1 > t fails where x_0 + x_1 >= t, if only at equality, and one unit below it."""
    t = float(np.float32(0.3))
    level = np.array([[t], [np.nextafter(t, 0.0)], [t + 1e-3]])
    region = Polytope(jnp.asarray(LOWER), jnp.asarray(UPPER), -np.ones((1, 2)), level)
    spec = Spec(jnp.eye(3)[:1], -t)
    budget = Budget(seconds=600, domains=200)
    verdict = verify(sum_of_inputs(), region, spec, split_inputs=split_inputs, budget=budget)
    assert verdict.status[2] == Status.VERIFIED
    assert not np.any(verdict.status[:2] == Status.VERIFIED)
    for i in np.flatnonzero(verdict.status[:2] == Status.FALSIFIED):
        assert satisfies(verdict.counterexample[i], -np.ones((1, 2)), level[i])


@MODES
def test_on_an_empty_set_every_property_holds(split_inputs):
    """x_0 + x_1 at most 0 and at least 0.01; at least 3, which no corner reaches; and at least 0,
    which leaves a line."""
    matrix = np.array([[1.0, 1.0], [-1.0, -1.0]])
    level = np.array([[0.0, 0.01], [0.0, 3.0], [0.0, 0.0]])
    region = Polytope(jnp.asarray(LOWER), jnp.asarray(UPPER), matrix, level)
    spec = Spec(jnp.zeros((1, 3)), -1.0)
    verdict = verify(sum_of_inputs(), region, spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.VERIFIED, Status.FALSIFIED]
    assert satisfies(verdict.counterexample[2], matrix, level[2])
    programs = milp.verify(sum_of_inputs(), region, spec, hidden=ibp)
    assert programs.status.tolist()[:2] == [Status.VERIFIED] * 2


@pytest.mark.slow
def test_inputs_that_do_not_vary_count_in_cuts():
    """x_2 = 1/2 and x_0 + x_1 + x_2 >= 3/2: then x_0 + x_1 >= 1."""
    lower = jnp.full((2, 20), 0.5).at[:, :2].set(0.0)
    upper = lower.at[:, :2].set(1.0)
    region = Polytope(lower, upper, -jnp.zeros((1, 20)).at[0, :3].set(1.0), 1.5)
    spec = Spec(jnp.ones((1, 1)), jnp.array([[-0.99], [-1.01]]))
    verdict = verify(_sum_of_two, region, spec, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED]


def _sum_of_two(x):
    return jnp.abs(x[:, :1]) + jnp.abs(x[:, 1:2])


def test_balls_alone_have_certificates():
    region = Polytope(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), 0.0)
    with pytest.raises(TypeError, match="about a ball, not a Polytope"):
        exact.certify(sum_of_inputs(), region)  # type: ignore[arg-type]


# --- Cuts -----------------------------------------------------------------------------------------

numbers = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3) | st.integers(-64, 64).map(lambda i: i / 16)


@given(values=st.lists(numbers, min_size=8, max_size=8), offset=numbers)
@settings(max_examples=60)
def test_what_surely_holds_holds(values, offset):
    """In rationals; the last coefficient is chosen so that sums are close to 0."""
    matrix, x = np.array(values[:4]), np.array(values[4:])
    if abs(x[3]) > 1e-3:
        matrix[3] = -(matrix[:3] @ x[:3] + offset) / x[3]
    box = Box(x[None], x[None])
    with jax.enable_x64(True):
        cuts = cuts_of(Polytope(box.lower, box.upper, matrix[None], np.array([offset])), 1, 4)
        found, sure = cuts.at(jnp.asarray(x[None])), cuts.surely_hold(jnp.asarray(x[None]))
        lower, upper, sure = float(found.lower[0, 0]), float(found.upper[0, 0]), bool(sure[0])
    row = [Fraction(v) for v in cuts.matrix[0, 0].tolist()]
    terms = [a * Fraction(v) for a, v in zip(row, x.tolist(), strict=True)]
    value = sum(terms, Fraction(float(cuts.offset[0, 0])))
    assert lower <= value <= upper
    assert not sure or value <= 0
    assert satisfies(x, matrix[None], np.array([offset])) == (value <= 0) or not matrix.any()


def test_points_on_a_boundary_surely_hold_where_sums_are_exact():
    with jax.enable_x64(True):
        rows, levels = jnp.array([[[1.0, -1.0]]] * 3), jnp.array([[0.0], [-0.25], [0.0]])
        cuts = Cuts(rows, levels, jnp.zeros((3, 2)))
        x = jnp.array([[0.1, 0.1], [0.5, 0.25], [0.1 + 2.0**-56, 0.1]])
        assert cuts.surely_hold(x).tolist() == [True, True, False]


def test_numbers_far_apart_are_refused():
    ends = np.zeros((1, 2)), np.ones((1, 2))
    for matrix, offset in (([1.0, 1e-200], 0.0), ([1.0, 1.0], 1e-200), ([5e-324, 1e300], 0.0)):
        with pytest.raises(ValueError, match="within a factor"):
            cuts_of(Polytope(*ends, np.array([matrix]), np.array([offset])), 1, 2)
    with pytest.raises(ValueError, match="within 2\\^400 of 0"):
        cuts_of(Polytope(ends[0], np.full((1, 2), np.inf), np.ones((1, 2)), np.ones(1)), 1, 2)
    constant = cuts_of(Polytope(*ends, np.zeros((2, 2)), np.array([1e-300, -1e-300])), 1, 2)
    assert constant.offset.tolist() == [[1.0, -1.0]]
