"""The search against enumeration of all activation patterns, and where it must give up."""

import functools
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import least_row
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net, random_weights

from jaxcert import AllOf, AnyOf, Box, L1Ball, L2Ball, LinfBall, MixedRows, Reason, Spec, Status
from jaxcert.exact import Budget, cost, verify
from jaxcert.exact.beta_crown import Pass
from jaxcert.exact.call import Call
from jaxcert.exact.leaves import Settled
from jaxcert.exact.model import Traceable
from jaxcert.exact.outcome import Clock, Outcome, Stuck
from jaxcert.exact.verify import decide
from jaxcert.model import split
from jaxcert.sets import contains

BUDGET = Budget(seconds=600, domains=20_000)
BOX = np.array([-1.0, -0.5], "f"), np.array([0.5, 1.0], "f")
BOXES = [(BOX[0] / c, BOX[1] / c) for c in (1, 2, 4)]  # always three: each program compiles once
REGION = Box(*[jnp.asarray(np.stack(ends)) for ends in zip(*BOXES, strict=True)])


def rows(seed):
    return np.random.default_rng(seed + 1000).normal(size=(2, 3)).astype("f")


def any_of(matrix, offset):
    """At each point one of the rows is positive; offsets per set."""
    return AnyOf(tuple(Spec(row[None], offset[:, None]) for row in matrix))


@pytest.mark.parametrize("split_inputs", [pytest.param(True, marks=pytest.mark.slow), False])
@given(
    seed=st.integers(0, 10_000),
    margins=st.lists(
        st.sampled_from([-0.3, -1e-2, -1e-3, 1e-3, 1e-2, 0.3]), min_size=3, max_size=3
    ),
)
@settings(max_examples=1)
def test_decides_what_enumeration_decides(split_inputs, seed, margins):
    weights, matrix = random_weights(seed), rows(seed)
    f = net(weights)
    least = [least_row(weights, *ends, matrix, np.zeros(2)) for ends in BOXES]
    offset = np.float32(np.array(margins) - least)
    prop = any_of(matrix, offset)
    verdict = verify(f, REGION, prop, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.reason.tolist() == [Reason.NONE] * 3
    wanted = [Status.VERIFIED if margin > 0 else Status.FALSIFIED for margin in margins]
    assert verdict.status.tolist() == wanted
    for i in np.flatnonzero(np.array(margins) < 0):
        x = np.asarray(verdict.counterexample[i])
        assert np.all((BOXES[i][0] <= x) & (x <= BOXES[i][1]))
        outputs = np.asarray(f(x[None]), np.float64)
        assert np.all(matrix.astype(np.float64) @ outputs[0] + np.float64(offset[i]) <= 0)


def bump(x):
    """Outputs of which the last is below 0 in a small part of the set, which attacks miss."""
    z = x - jnp.array([0.3, -0.2, 0.5, 0.1, -0.4, 0.25])
    near = jnp.maximum(1 - 20 * jnp.sum(jnp.abs(z), 1, keepdims=True), 0)
    return jnp.concatenate([2 + x[:, :1], x[:, 1:2], 0.5 - near], 1)


def test_rows_of_other_clauses_have_no_weight():
    """A clause of one row is filled up with rows of a longer one."""
    with jax.enable_x64(True):
        clauses = jnp.array([[[True, False]], [[True, True]]])
        matrix = jnp.broadcast_to(jnp.array([[1.0, 0.0], [0.0, 1.0]]), (2, 2, 2))
        question = SimpleNamespace(clauses=clauses, matrix=matrix, offset=jnp.ones((2, 2)))
        boxes = {"y": Box(jnp.zeros((2, 2)), jnp.ones((2, 2)))}
        walk = SimpleNamespace(dtype=jnp.float64, output="y", boxes=boxes)
        some: Any = SimpleNamespace(question=question, walk=walk)
        spec = Pass.spec(some, jnp.array([[0.25, 0.75], [0.25, 0.75]]))
    assert spec.matrix.tolist() == [[[0.25, 0.0]], [[0.25, 0.75]]]
    assert np.allclose(spec.offset, [[0.25], [1.0]], rtol=1e-12, atol=0)


@pytest.mark.slow
def test_rows_of_other_clauses_prove_nothing():
    """A clause of one row was filled up with rows of a longer one, which then took part."""
    row = [Spec(jnp.eye(3)[i : i + 1], jnp.zeros(1)) for i in range(3)]
    prop = AllOf((AnyOf((row[0], row[1])), row[2]))
    box = Box(-jnp.ones((1, 6)), jnp.ones((1, 6)))
    budget = Budget(seconds=600, domains=200)
    verdict = verify(bump, box, prop, split_inputs=False, budget=budget)
    assert verdict.status[0] != Status.VERIFIED


@pytest.mark.slow
def test_all_rows_must_hold():
    weights, matrix = random_weights(5), rows(5)
    least = [[least_row(weights, *e, row[None], np.zeros(1)) for row in matrix] for e in BOXES]
    offset = np.float32(1e-2 - np.array(least))
    holds = AllOf(
        (Spec(matrix[:1], jnp.asarray(offset[:, :1])), Spec(matrix[1:], jnp.asarray(offset[:, 1:])))
    )
    fails = Spec(matrix, jnp.asarray(offset - np.float32([[0, 2e-2], [2e-2, 0], [0, 0]])))
    decide = functools.partial(verify, net(weights), REGION, budget=BUDGET)
    assert decide(holds).status.tolist() == [Status.VERIFIED] * 3
    wanted = [Status.FALSIFIED, Status.FALSIFIED, Status.VERIFIED]
    assert decide(fails).status.tolist() == wanted


@pytest.mark.parametrize(
    ("ball", "split_inputs"),
    [
        pytest.param(L2Ball, True, marks=pytest.mark.slow),
        (L2Ball, False),
        pytest.param(L1Ball, True, marks=pytest.mark.slow),
    ],
)
def test_balls_are_decided_around_their_least_value(ball, split_inputs):
    """f = |x_0| + |x_1| + x_0 over balls around (1, 1)."""
    x = jnp.ones((2, 2))
    least = {L2Ball: 3 - np.sqrt(5) / 2, L1Ball: 2.0, LinfBall: 1.5}[ball]
    spec = Spec(jnp.ones((1, 1)), jnp.array([[1e-5 - least], [-1e-5 - least]]))
    verdict = verify(_sizes, ball(x, 0.5), spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED]
    delta = np.asarray(verdict.counterexample[1] - x[1], np.float64)
    assert np.linalg.norm(delta, ord=ball.norm) <= 0.5


@pytest.mark.parametrize("split_inputs", [True, False])
def test_a_property_without_rows_holds(split_inputs):
    spec = Spec(jnp.zeros((0, 1)), jnp.zeros(0))
    region = Box(jnp.zeros((2, 2)), jnp.array([[1.0, 1.0], [jnp.inf, 1.0]]))
    verdict = verify(_sizes, region, spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED] * 2


@pytest.mark.parametrize("ball", [LinfBall, L2Ball, L1Ball])
def test_counterexamples_in_narrow_balls_lie_inside(ball):
    """Rounding to the nearest float32 led out of balls of a few of their steps."""
    region = ball(jnp.ones((2, 2)), jnp.array([0.6, 1.6]) * 2.0**-23)
    f, spec = lambda x: 1 - x[:, :1], Spec(jnp.eye(1), 0.0)
    verdict = verify(f, region, spec, budget=BUDGET)
    assert verdict.status.tolist() == [Status.FALSIFIED] * 2
    assert contains(region, verdict.counterexample).all()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.abs(x) + (0.1 if len(x) > 1 else -0.1),
        lambda x: jnp.abs(x) + jnp.arange(len(x))[:, None],
        lambda x: jnp.abs(x) + (0.1 if len(x) > 40 else -0.1),
    ],
    ids=["alone", "by place", "many"],
)
def test_models_that_look_at_the_batch_are_refused(f):
    """Also where a set has no middle."""
    for end in (0.5, jnp.inf):
        region = Box(jnp.full((1, 1), -0.5), jnp.full((1, 1), end))
        with pytest.raises(MixedRows, match="place in the batch or on the size"):
            verify(f, region, Spec(jnp.eye(1), 0.0), budget=BUDGET)


@pytest.mark.parametrize(("width", "most"), [(4, 32), (1024, 8), (2048, 2)])
def test_fewer_boxes_at_a_time_where_each_costs_more(width, most):
    weights = jnp.zeros((2, width)), jnp.zeros((width, width)), jnp.zeros((width, 1))

    def f(x):
        first, second, last = weights
        return jnp.maximum(jnp.maximum(x @ first, 0) @ second, 0) @ last

    arrays, structure = split(f)
    model = Traceable(structure, (2,), np.dtype("f"), False, ())
    with jax.enable_x64(True):
        row, every = cost.of_rows(model, arrays)
    assert width**2 < row < 2 * width**2 + 100  # the wide matrix and little else
    assert width**3 < every < 2 * width**3 + 10_000
    assert cost.affordable(every, 32) == most


def _sizes(x):
    return jnp.sum(jnp.abs(x), 1, keepdims=True) + x[:, :1]


def test_one_relu_is_decided_up_to_rounding():
    f = _one_relu
    region = LinfBall(jnp.zeros((3, 1)), 1.0)
    spec = Spec(jnp.ones((1, 1)), jnp.array([[1e-6], [0.0], [-1e-6]]))
    verdict = verify(f, region, spec, split_inputs=False, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED, Status.FALSIFIED]


def test_where_the_time_went_is_told():
    region, began = LinfBall(jnp.zeros((3, 1)), 1.0), time.perf_counter()
    spec = Spec(jnp.ones((1, 1)), jnp.array([[1e-6], [0.0], [-1e-6]]))
    outcome = decide(_one_relu, region, spec, split_inputs=False, budget=BUDGET)
    assert {*outcome.spent} >= {"attack", "ranges", "search"}
    assert 0 < sum(outcome.spent.values()) < time.perf_counter() - began


def _one_relu(x):
    return jnp.maximum(x, 0) - 0.5 * x


def test_a_dip_that_gradients_do_not_see_is_found():
    """The model is 1 but for a dip of width 0.002 around c, 1 - relu(1 - 1000 |x - c|_1)."""
    c = np.array([0.0137, -0.0719])
    first = np.zeros((2, 5)), np.array([-c[0], c[0], -c[1], c[1], 0.0])
    first[0][0, :2], first[0][1, 2:4] = (1, -1), (1, -1)
    second = np.zeros((5, 5)), np.array([1.0, 0, 0, 0, 0])
    second[0][:4, 0] = -1000.0
    last = np.zeros((5, 3)), np.array([1.0, 0, 0])
    last[0][0, 0] = -1.0
    f = net([tuple(np.float32(a) for a in layer) for layer in (first, second, last)])
    prop = any_of(np.float32([[1, 0, 0], [1, 0, 0]]), np.float32([-0.5] * 3))
    verdict = verify(f, REGION, prop, split_inputs=True, budget=BUDGET)
    assert verdict.status.tolist() == [Status.FALSIFIED] * 3
    assert np.all(f(verdict.counterexample)[:, 0] <= 0.5)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(seconds=0.0), Reason.TIME),
        (Budget(seconds=600, domains=1), Reason.DOMAINS),
        (Budget(seconds=600, memory=1), Reason.MEMORY),
    ],
)
def test_what_runs_out_is_named(budget, reason):
    seen = []
    f, prop = _many_boxes(1e-7)
    verdict = verify(f, REGION, prop, split_inputs=True, budget=budget, report=seen.append)
    assert verdict.status.tolist() == [Status.UNKNOWN] * 3
    assert verdict.reason.tolist() == [reason] * 3
    assert seen[-1].visited > 0
    assert seen[-1].unanswered == 3


def _many_boxes(margin):
    """|a| + |b| - |a + b| >= 0 with equality on half of the plane: many boxes at small margins."""
    first = np.zeros((2, 5)), np.zeros(5)
    first[0][:, :4] = [[1, -1, 0, 0], [0, 0, 1, -1]]
    second = np.zeros((5, 5)), np.zeros(5)
    second[0][:4, :4] = [[1, 1, -1, 0], [1, -1, 1, 0], [1, 1, -1, 0], [1, -1, 1, 0]]
    last = np.zeros((5, 3)), np.zeros(3)
    last[0][:3, 0] = [1, -1, -1]
    f = net([tuple(np.float32(a) for a in layer) for layer in (first, second, last)])
    return f, any_of(np.float32([[1, 0, 0], [1, 0, 0]]), np.float32([margin] * 3))


@pytest.mark.parametrize(
    ("memory", "status", "reason"),
    [
        (2**31, Status.VERIFIED, Reason.NONE),
        (60_000, Status.VERIFIED, Reason.NONE),
        (1, Status.UNKNOWN, Reason.MEMORY),
    ],
)
def test_what_spills_to_the_host_is_worked_on(memory, status, reason):
    """A property that needs more boxes at a time than the smallest stack holds, `SMALLEST`."""
    (w, b), *others = random_weights(0)
    prop = any_of(rows(0), np.float32([-3.05] * 3))
    seen = []
    verdict = verify(
        net([(3 * w, b), *others]), REGION, prop, split_inputs=True, report=seen.append,
        budget=Budget(seconds=600, memory=memory),
    )  # fmt: skip
    assert (verdict.status == status).any()
    assert set(verdict.reason.tolist()) <= {Reason.NONE, reason}
    assert not (verdict.status == Status.FALSIFIED).any()
    assert (max(progress.waiting for progress in seen) > SMALLEST) == (memory > 1)


SMALLEST = 4 * 32 + 3


def test_a_model_that_closes_over_its_kernel_is_replayed_too():
    """lax.conv takes no float64 images with a float32 kernel."""
    region = LinfBall(jnp.zeros((2, 1, 1, 2)), 1.0)
    spec = Spec(jnp.ones((1, 1)), jnp.array([[2.5], [1.5]]))
    verdict = verify(_convolution, region, spec, split_inputs=True, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED]


KERNEL = jnp.ones((1, 1, 1, 2))


def _convolution(x):
    return jax.lax.conv(x, KERNEL, (1, 1), "VALID").reshape(len(x), 1)


def test_wrong_properties_are_refused():
    region = LinfBall(jnp.zeros((1, 2)), 1.0)
    with pytest.raises(ValueError, match="rows of a spec must be"):
        verify(_sizes, region, Spec(jnp.ones((1, 2)), 0.0))
    with pytest.raises(ValueError, match="finite"):
        verify(_sizes, region, Spec(jnp.full((1, 1), jnp.nan), 0.0))
    with pytest.raises(TypeError, match="AllOf or an AnyOf"):
        verify(_sizes, region, "safe")  # type: ignore[arg-type]


def test_a_model_that_gives_nan_is_not_verified():
    f = net([(w * np.float32(np.nan), b) for w, b in random_weights(0)])
    prop = any_of(np.float32([[1, 0, 0], [1, 0, 0]]), np.float32([1e9] * 3))
    verdict = verify(f, REGION, prop, split_inputs=True, budget=Budget(seconds=600, domains=40))
    assert not np.any(verdict.status == Status.VERIFIED)
    assert not np.any(verdict.status == Status.FALSIFIED)


@pytest.mark.slow
@pytest.mark.parametrize("split_inputs", [True, False])
def test_what_is_unknown_on_part_of_the_set_is_not_verified(split_inputs):
    """Below zero the root is NaN, and so are bounds, while the coefficient of x is known."""
    region, spec = LinfBall(jnp.zeros((1, 1)), 1.0), Spec(jnp.ones((1, 1)), 1e3)
    budget = Budget(seconds=600, domains=40)
    verdict = verify(_half_defined, region, spec, split_inputs=split_inputs, budget=budget)
    assert verdict.status[0] == Status.UNKNOWN


def _half_defined(x):
    return jnp.sqrt(x) + x


def test_leaves_that_time_does_not_reach_are_unproved():
    """Three leaves, each of a set of its own; the clock runs out in the second."""
    outcome = Outcome(np.zeros(3, int), np.full(3, Reason.TIME), np.zeros((3, 1)))
    clock = Clock(Budget(seconds=60.0), None)
    nothing: Any = None
    call, stuck, met = Call(*[nothing] * 3, outcome, clock, nothing), Stuck(3), []

    def settle(leaf, i):
        met.append(leaf)
        clock.start -= 31.0
        return Settled(Reason.NONE if i == 0 else Reason.NUMERICS)

    call.settle_leaves(settle, zip("abc", range(3), strict=True), np.arange(3), stuck)
    call.conclude(np.zeros(3, bool), stuck)
    assert met == ["a", "b"]
    assert outcome.status.tolist() == [Status.VERIFIED, Status.UNKNOWN, Status.UNKNOWN]
    assert outcome.reason.tolist() == [Reason.NONE, Reason.TIME, Reason.TIME]


def test_of_several_reasons_that_which_is_easiest_to_remedy_is_named():
    stuck = Stuck(2)
    for place, reason in [(0, Reason.LOOSE), (0, Reason.NUMERICS), (1, Reason.TIME)]:
        stuck.note(place, 5, reason)
    assert stuck.questions == {5}
    assert stuck.by(Reason.LOOSE).tolist() == [True, False]
    assert stuck.by(Reason.TIME).tolist() == [False, True]
    assert stuck.any.all()
