"""Mixed-integer programs: against all activation patterns, samples, bounds and values known."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from enumeration import least_row
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import weights
from oracles import in_float64

from jaxcert import AllOf, AnyOf, Box, L1Ball, L2Ball, LinfBall, Reason, Spec, Status, margins
from jaxcert.bounds import crown, hidden_bounds, ibp
from jaxcert.errors import UnsupportedEquation
from jaxcert.exact import milp
from jaxcert.sets import contains, sample

# With intervals for hidden values: crown is compiled anew for each model.
decided = functools.partial(milp.verify, hidden=ibp)
least_values = functools.partial(milp.minimum, hidden=ibp)


def answers(verdict):
    """(status, reason) of each example."""
    pairs = zip(verdict.status.tolist(), verdict.reason.tolist(), strict=True)
    return [(Status(s), Reason(r)) for s, r in pairs]


VERIFIED = (Status.VERIFIED, Reason.NONE)
FALSIFIED = (Status.FALSIFIED, Reason.NONE)
NUMERICS = (Status.UNKNOWN, Reason.NUMERICS)
TIME = (Status.UNKNOWN, Reason.TIME)


# --- Against the enumeration of activation patterns -----------------------------------------------


def mlp(layers, x):
    for w, b in layers[:-1]:
        x = jnp.maximum(x @ w + b, 0)
    return x @ layers[-1][0] + layers[-1][1]


def random_net(seed, sizes=(2, 3, 3, 2)):
    layers = [
        (weights(a, b, seed=seed + i), weights(b, seed=seed + i + 50, scale=0.3))
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return layers, jax.tree_util.Partial(mlp, layers)


@settings(max_examples=4)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.05, 2.0))
def test_least_values_are_those_of_all_activation_patterns(seed, eps):
    layers, f = random_net(seed)
    x = weights(1, 2, seed=seed + 7)
    box = Box(x - jnp.float32(eps), x + jnp.float32(eps))
    matrix = np.asarray(weights(2, 2, seed=seed + 8, scale=1.0), np.float64)
    offset = np.array([0.5, -0.25])
    lower, upper = np.asarray(box.lower)[0], np.asarray(box.upper)[0]
    exact = [least_row(layers, lower, upper, matrix[[i]], offset[[i]]) for i in range(2)]
    found = least_values(f, box, Spec(matrix, offset))
    np.testing.assert_allclose(found.lower[0], exact, atol=1e-6)
    np.testing.assert_allclose(found.upper[0], exact, atol=1e-5)
    assert (found.lower <= found.upper + 1e-6).all()

    # At least one of two rows is positive everywhere: true, and false, by a thousandth.
    both = least_row(layers, lower, upper, matrix, offset)
    parts = [[Spec(matrix[[i]], offset[i] - both + by) for i in range(2)] for by in (1e-3, -1e-3)]
    verdicts = [decided(f, box, AnyOf(tuple(part))) for part in parts]
    assert [answers(v) for v in verdicts] == [[VERIFIED], [FALSIFIED]]


# --- Other functions with kinks -------------------------------------------------------------------


def kinked():
    """Convolution, pooling with padding, leaky relu, abs, relu6, a skip connection, a maximum whose
    operands share inputs, order statistics."""
    kernel, w = weights(2, 2, 1, 1, seed=1), weights(4, 4, seed=2)

    def f(kernel, x):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nnx.max_pool(jax.nn.leaky_relu(x, 0.2), (2, 2), strides=(2, 2), padding="SAME")
        x = jnp.abs(x.reshape(len(x), 4) - 0.2) @ w
        x = x + jax.nn.relu6(x[:, ::-1] + 5.9)
        x = jnp.maximum(x, jnp.minimum(1.2 - x, 5.5))
        return x.max(1, keepdims=True) - 2 * x.min(1, keepdims=True)

    return jax.tree_util.Partial(f, kernel), (4, 4, 1)


@pytest.mark.slow
def test_least_values_lie_between_bounds_and_samples():
    f, shape = kinked()
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *shape)), jnp.float32)
    region = LinfBall(x, jnp.array([0.2, 0.1]), Box(0.0, 1.0))
    spec = Spec(jnp.array([[1.0], [-1.0]]), 0.1)
    found = least_values(f, region, spec)
    outputs = sampled(f, region)
    outputs = np.concatenate([outputs.min(0), -outputs.max(0)], 1) + 0.1
    assert (np.asarray(jax.jit(crown(f))(region, spec).lower) <= found.lower + 1e-5).all()
    assert (found.lower <= outputs + 1e-5).all()
    np.testing.assert_allclose(found.upper, found.lower, atol=1e-5)  # and it is attained


def sampled(f, region):
    """Outputs (n, b, k) at points of each set."""
    points = np.asarray(sample(jax.random.key(0), region, 2000))
    outputs = in_float64(f)(points.reshape(-1, *points.shape[2:]))
    return outputs.reshape(*points.shape[:2], -1)


def test_the_answer_does_not_depend_on_how_hidden_values_are_bounded():
    _, f = random_net(1, (2, 3, 2))
    region = LinfBall(weights(2, 2), jnp.array([0.2, 0.4]))
    boxes = jax.jit(hidden_bounds(f, outward=True))(region)
    found = [milp.minimum(f, region, Spec(jnp.eye(2)), hidden=h) for h in (ibp, boxes)]
    np.testing.assert_allclose(found[0].lower, found[1].lower, atol=1e-6)


def test_casts_to_float32_and_stopped_gradients_are_identities():
    def f(x):
        return jax.lax.stop_gradient(jnp.maximum(x.astype(jnp.float32), 0)) * 2

    with jax.enable_x64(True):
        found = least_values(f, Box(jnp.full((1, 1), 0.25), jnp.ones((1, 1))), Spec(jnp.eye(1)))
    np.testing.assert_allclose(found.lower, 0.5, atol=1e-6)


# --- Sets -----------------------------------------------------------------------------------------


def test_over_an_l1_ball_one_entry_moves_as_far_as_it_may():
    c = np.array([3.0, -1.0, 2.0], np.float32)
    x = jnp.array([[0.5, 0.5, 0.5], [0.25, 0.5, 0.5]])
    # The first entry may fall by 0.5 or 0.25 before it leaves [0, 1]; the third then falls, too.
    region = L1Ball(x, jnp.array([0.5, 0.5]), Box(0.0, 1.0))
    found = least_values(lambda x: (x @ c)[:, None], region, Spec(jnp.eye(1)))
    expected = np.asarray(x) @ c - [3 * 0.5, 3 * 0.25 + 2 * 0.25]
    np.testing.assert_allclose(found.lower[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found.upper[:, 0], expected, atol=1e-6)


def test_over_an_l1_ball_the_least_value_is_attained_and_below_all_others():
    _, f = random_net(2)
    region = L1Ball(weights(2, 2), jnp.array([0.5, 1.0]))
    found = least_values(f, region, Spec(jnp.eye(2)))
    assert (found.lower <= sampled(f, region).min(0) + 1e-5).all()
    np.testing.assert_allclose(found.upper, found.lower, atol=1e-5)


@pytest.mark.parametrize("ball", [LinfBall, L1Ball])
def test_a_planted_counterexample_is_found_in_the_set(ball):
    # Positive but near the corner (1, 1), or for L1 near the tip of the first axis.
    x = jnp.full((3, 2), 0.1)
    eps = jnp.array([0.7, 0.3, 0.7])
    reach = {LinfBall: 2 * 0.8, L1Ball: 0.9}[ball]

    def f(x):
        return (0.01 - jnp.maximum(x.sum(1, keepdims=True) - (reach - 0.02), 0)) * jnp.ones((1, 2))

    region = ball(x, eps)
    verdict = decided(f, region, Spec(jnp.eye(2)))
    assert answers(verdict) == [FALSIFIED, VERIFIED, FALSIFIED]
    point = verdict.counterexample
    assert point.dtype == x.dtype
    assert point.shape == x.shape
    assert (np.asarray(f(point))[[0, 2]] <= 0).all()
    with jax.enable_x64(True):  # in the set as the numbers stand, not only up to rounding
        inside = contains(ball(x.astype(float), eps.astype(float)), point.astype(float))
    assert np.asarray(inside)[[0, 2]].all()


def test_groups_are_decided_clause_by_clause():
    box = Box(jnp.array([[-1.0], [0.5], [-1.0]]), jnp.array([[1.0], [1.0], [-0.5]]))
    up, down = Spec(jnp.array([[1.0]]), 0.25), Spec(jnp.array([[-1.0]]), 0.25)
    verdict = decided(lambda x: x, box, AnyOf((up, down)))  # x > -0.25 or x < 0.25
    assert answers(verdict) == [VERIFIED] * 3
    verdict = decided(lambda x: x, box, AllOf((up, AnyOf((up, down)))))
    assert answers(verdict) == [FALSIFIED, VERIFIED, FALSIFIED]


def test_margins_of_a_batch_agree_with_crown():
    _, f = random_net(3)
    x = weights(4, 2, seed=1)
    label = jnp.argmax(f(x), 1)
    for eps in (0.02, 0.5):
        region = LinfBall(x, eps)
        box = jax.jit(crown(f))(region, margins(label, 2))
        status = np.asarray(decided(f, region, margins(label, 2)).status)
        assert (status != Status.UNKNOWN).all()
        assert (status == Status.VERIFIED)[(np.asarray(box.lower) > 1e-4).all(1)].all()


def test_outputs_that_do_not_depend_on_the_input():
    verdict = decided(
        lambda x: jnp.zeros((x.shape[0], 1)), LinfBall(jnp.ones((2, 1)), 0.5),
        Spec(jnp.ones((1, 1)), jnp.array([[1.0], [-1.0]])),
    )  # fmt: skip
    assert answers(verdict) == [VERIFIED, FALSIFIED]


# --- What is not known is never verified ----------------------------------------------------------


def test_margins_within_the_tolerance_are_numerically_undecided():
    box = Box(jnp.array([[5e-6], [2e-5]]), jnp.ones((2, 1)))
    assert answers(decided(lambda x: jnp.maximum(x, 0), box, Spec(jnp.eye(1)))) == [
        NUMERICS,
        VERIFIED,
    ]


def test_without_time_nothing_is_known():
    _, f = random_net(0)
    region = LinfBall(jnp.zeros((2, 2)), 0.1)
    assert answers(decided(f, region, Spec(jnp.eye(2), 100.0), seconds=0)) == [TIME, TIME]
    found = least_values(f, region, Spec(jnp.eye(2)), seconds=0)
    assert (found.lower == -np.inf).all()
    assert (found.upper == np.inf).all()


@pytest.mark.parametrize(
    ("status", "bound", "expected"),
    [
        (0, 1.0, VERIFIED), (1, 1.0, VERIFIED), (0, 1e-6, NUMERICS), (1, -1.0, TIME),
        (2, 1.0, NUMERICS), (3, 1.0, NUMERICS), (4, 1.0, NUMERICS), (0, np.inf, NUMERICS),
        (0, np.nan, NUMERICS), (0, None, NUMERICS), (1, None, TIME),
    ],
)  # fmt: skip
def test_only_the_dual_bound_of_a_solved_program_verifies(monkeypatch, status, bound, expected):
    found = types.SimpleNamespace(status=status, mip_dual_bound=bound, fun=1.0, x=None)
    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **options: found)
    verdict = decided(lambda x: x, LinfBall(jnp.ones((1, 1)), 0.5), Spec(jnp.eye(1)))
    assert answers(verdict) == [expected]


def test_a_point_that_the_model_does_not_break_is_no_counterexample(monkeypatch):
    found = types.SimpleNamespace(status=0, mip_dual_bound=-1.0, fun=-1.0, x=np.array([1.0, 1, 0]))
    monkeypatch.setattr(scipy.optimize, "milp", lambda *args, **options: found)
    verdict = decided(lambda x: x, LinfBall(jnp.ones((1, 1)), 0.5), Spec(jnp.eye(1)))
    assert answers(verdict) == [NUMERICS]


@pytest.mark.parametrize("weight", [np.inf, np.nan])
def test_weights_that_are_no_numbers_verify_nothing(weight):
    def f(x):
        return jnp.maximum(x * jnp.float32(weight), 0).sum(1, keepdims=True) + 5.0

    box = Box(-jnp.ones((1, 2)), jnp.ones((1, 2)))
    assert answers(decided(f, box, Spec(jnp.eye(1)))) == [NUMERICS]
    assert least_values(f, box, Spec(jnp.eye(1))).lower == -np.inf


# --- What cannot be encoded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (jax.nn.sigmoid, "logistic"),
        (lambda x: x * x[:, ::-1], "mul"),
        (lambda x: x.astype(jnp.float16) * 2, "convert_element_type"),
    ],
)
def test_other_equations_are_named(f, name):
    with pytest.raises(UnsupportedEquation, match=f"mixed-integer.*'{name}'"):
        milp.verify(f, LinfBall(jnp.ones((1, 2)), 0.5), Spec(jnp.eye(2)))


def test_wrong_arguments():
    x, spec = jnp.ones((1, 2)), Spec(jnp.eye(2))
    for call in (milp.verify, milp.minimum):
        with pytest.raises(ValueError, match="L2Ball"):
            call(lambda x: x, L2Ball(x, 0.1), spec)
        with pytest.raises(ValueError, match="seconds"):
            call(lambda x: x, LinfBall(x, 0.1), spec, seconds=float("nan"))
        with pytest.raises(ValueError, match="eps"):
            call(lambda x: x, LinfBall(x, -0.1), spec)
        with pytest.raises(ValueError, match="rows of a spec"):
            call(lambda x: x, LinfBall(x, 0.1), Spec(jnp.eye(3)))
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(functools.partial(call, lambda x: x))(LinfBall(x, 0.1), spec)
    with pytest.raises(TypeError, match="one Spec"):
        milp.minimum(lambda x: x, LinfBall(x, 0.1), AllOf((spec,)))  # type: ignore
