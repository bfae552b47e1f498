"""The search against enumeration of all activation patterns, and where it must give up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import least_row
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import net, random_weights

from jaxcert import AllOf, AnyOf, Box, L1Ball, L2Ball, LinfBall, Reason, Spec, Status
from jaxcert.exact import Budget, verify

BUDGET = Budget(seconds=600, domains=20_000)
BOX = np.array([-1.0, -0.5], "f"), np.array([0.5, 1.0], "f")


def rows(seed, count=2):
    return np.random.default_rng(seed + 1000).normal(size=(count, 3)).astype("f")


def any_of(matrix, offset):
    return AnyOf(tuple(Spec(row[None], jnp.full(1, offset)) for row in matrix))


@pytest.mark.parametrize("split_inputs", [True, False])
@given(seed=st.integers(0, 10_000), margin=st.sampled_from([-0.3, -1e-2, -1e-4, 1e-4, 1e-2, 0.3]))
@settings(max_examples=12)
def test_decides_what_enumeration_decides(split_inputs, seed, margin):
    weights, matrix = random_weights(seed), rows(seed)
    least = least_row(weights, *BOX, matrix, np.zeros(2))
    region = Box(*[jnp.asarray(end[None]) for end in BOX])
    offset = np.float32(margin - least)
    prop = any_of(matrix, offset)
    verdict = verify(net(weights), region, prop, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.reason[0] == Reason.NONE
    assert verdict.status[0] == (Status.VERIFIED if margin > 0 else Status.FALSIFIED)
    if margin < 0:
        x = np.asarray(verdict.counterexample[0])
        assert np.all((BOX[0] <= x) & (x <= BOX[1]))
        outputs = np.asarray(net(weights)(x[None]), np.float64)
        assert np.all(matrix.astype(np.float64) @ outputs[0] + np.float64(offset) <= 0)


@pytest.mark.parametrize("split_inputs", [True, False])
def test_questions_share_a_search_and_keep_their_own_answers(split_inputs):
    weights, matrix = random_weights(3), rows(3, 1)
    low = np.stack([BOX[0], BOX[0] / 2, BOX[0] / 4])
    high = np.stack([BOX[1], BOX[1] / 2, BOX[1] / 4])
    least = [least_row(weights, a, b, matrix, np.zeros(1)) for a, b in zip(low, high, strict=True)]
    offsets = np.float32([[1e-2 - least[0]], [-1e-2 - least[1]], [1e-2 - least[2]]])
    spec = Spec(jnp.asarray(np.broadcast_to(matrix, (3, 1, 3))), jnp.asarray(offsets))
    region = Box(jnp.asarray(low), jnp.asarray(high))
    verdict = verify(net(weights), region, spec, split_inputs=split_inputs, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED, Status.VERIFIED]


def test_all_rows_must_hold():
    weights, matrix = random_weights(5), rows(5)
    least = [least_row(weights, *BOX, row[None], np.zeros(1)) for row in matrix]
    region = Box(*[jnp.asarray(end[None]) for end in BOX])
    offset = np.float32(1e-2) - np.float32(least)
    holds = AllOf((Spec(matrix[:1], offset[:1]), Spec(matrix[1:], offset[1:])))
    fails = Spec(matrix, offset - np.float32([0, 2e-2]))
    decide = functools.partial(verify, net(weights), region, budget=BUDGET)
    assert decide(holds).status[0] == Status.VERIFIED
    assert decide(fails).status[0] == Status.FALSIFIED


@pytest.mark.parametrize("split_inputs", [True, False])
@pytest.mark.parametrize("ball", [L2Ball, L1Ball, LinfBall])
def test_balls_are_decided_around_their_least_value(ball, split_inputs):
    """f = |x_0| + |x_1| + x_0 over balls around (1, 1)."""
    x = jnp.ones((1, 2))
    least = {L2Ball: 3 - np.sqrt(5) / 2, L1Ball: 2.0, LinfBall: 1.5}[ball]
    spec = functools.partial(Spec, jnp.ones((1, 1)))
    decide = functools.partial(
        verify, _sizes, ball(x, 0.5), split_inputs=split_inputs, budget=BUDGET
    )
    assert decide(spec(1e-3 - least)).status[0] == Status.VERIFIED
    broken = decide(spec(-1e-3 - least))
    assert broken.status[0] == Status.FALSIFIED
    distance = np.linalg.norm(
        np.asarray(broken.counterexample - x, np.float64), ord=ball.norm, axis=1
    )
    assert distance[0] <= 0.5


def _sizes(x):
    return jnp.sum(jnp.abs(x), 1, keepdims=True) + x[:, :1]


def test_one_relu_is_decided_up_to_rounding():
    f = _one_relu
    region = LinfBall(jnp.zeros((3, 1)), 1.0)
    spec = Spec(jnp.ones((1, 1)), jnp.array([[1e-6], [0.0], [-1e-6]]))
    verdict = verify(f, region, spec, split_inputs=False, budget=BUDGET)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED, Status.FALSIFIED]


def _one_relu(x):
    return jnp.maximum(x, 0) - 0.5 * x


def test_a_dip_that_gradients_do_not_see_is_found():
    """The model is flat but for a dip of width 0.002 somewhere in [-1, 1]^2."""
    verdict = verify(
        _dip, LinfBall(jnp.zeros((1, 2)), 1.0), Spec(jnp.ones((1, 1)), -0.5), budget=BUDGET
    )
    assert verdict.status[0] == Status.FALSIFIED
    assert _dip(verdict.counterexample)[0, 0] <= 0.5


def _dip(x):
    distance = jnp.sum(jnp.abs(x - jnp.array([0.3137, -0.7219])), 1, keepdims=True)
    return 1.0 - jnp.maximum(1.0 - 1000.0 * distance, 0)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(seconds=0.0), Reason.TIME),
        (Budget(seconds=600, domains=40), Reason.DOMAINS),
        (Budget(seconds=600, memory=1), Reason.MEMORY),
    ],
)
def test_what_runs_out_is_named(budget, reason):
    """x sin-like zigzag that holds with a hair's margin everywhere needs many boxes."""
    verdict = verify(
        _tight, LinfBall(jnp.zeros((1, 2)), 1.0), Spec(jnp.ones((1, 1)), 1e-7), budget=budget
    )
    assert (verdict.status[0], verdict.reason[0]) == (Status.UNKNOWN, reason)


def _tight(x):
    """|a| + |b| - |a + b| >= 0, with equality on half of the plane."""
    a, b = x[:, :1], x[:, 1:]
    return jnp.abs(a) + jnp.abs(b) - jnp.abs(a + b)


def test_progress_is_reported():
    seen = []
    verify(
        _tight, LinfBall(jnp.zeros((1, 2)), 1.0), Spec(jnp.ones((1, 1)), 1e-7),
        budget=Budget(seconds=600, domains=40), report=seen.append,
    )  # fmt: skip
    assert seen[-1].visited >= 40
    assert seen[-1].unanswered == 1


def test_wrong_properties_are_refused():
    region = LinfBall(jnp.zeros((1, 2)), 1.0)
    with pytest.raises(ValueError, match="rows of a spec must be"):
        verify(_sizes, region, Spec(jnp.ones((1, 2)), 0.0))
    with pytest.raises(ValueError, match="finite"):
        verify(_sizes, region, Spec(jnp.full((1, 1), jnp.nan), 0.0))
    with pytest.raises(TypeError, match="AllOf or an AnyOf"):
        verify(_sizes, region, "safe")  # type: ignore[arg-type]


def test_a_model_that_gives_nan_is_not_verified():
    verdict = verify(
        lambda x: jnp.log(x), LinfBall(jnp.zeros((1, 1)), 1.0), Spec(jnp.ones((1, 1)), 1e3),
        budget=Budget(seconds=600, domains=40), key=jax.random.key(1),
    )  # fmt: skip
    assert verdict.status[0] != Status.VERIFIED
