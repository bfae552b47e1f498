"""Leaves: where nothing is left to split, convex programs decide, or say why they cannot."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import net
from planar import least_value

from jaxcert import Box, L1Ball, L2Ball, Reason, Spec
from jaxcert.exact import leaves, ranges
from jaxcert.exact.domains import Candidates, Domains, Multipliers
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import one_by_one, question
from jaxcert.model import split
from jaxcert.sets import sample

SIZES = 2, 3, 3, 2
VALID = np.float32([-0.5, 0.6])
SIGNS = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
SIDES = np.concatenate([np.eye(2), -np.eye(2)])


def random_case(seed):
    """Weights, a row of outputs, and the centre and the radius of a ball."""
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    weights = [
        (rng.normal(size=(n, m)).astype("f"), rng.normal(size=m).astype("f")) for n, m in pairs
    ]
    row, centre = rng.normal(size=2).astype("f"), rng.uniform(-0.5, 0.5, 2).astype("f")
    return weights, row, centre, np.float32(rng.uniform(0.3, 1.0))


def least_on(ball, valid, weights, row, centre, eps):
    """The least value of a row on an L1 or L2 ball, maybe cut by a box."""
    row, centre, eps = np.float64(row), np.float64(centre), float(eps)
    normals, ends = np.zeros((0, 2)), np.zeros(0)
    if ball is L1Ball:
        normals, ends = SIGNS, SIGNS @ centre + eps
    if valid:
        normals = np.concatenate([normals, SIDES])
        ends = np.concatenate([ends, np.float64(VALID)[[1, 1, 0, 0]] * [1, 1, -1, -1]])
    disc = (centre, eps) if ball is L2Ball else None
    return least_value(weights, row, (normals, ends), disc)


def patterns(weights, region):
    """Signs of all hidden values at points of a set."""
    x = np.float64(sample(jax.random.key(0), region, 4000))[:, 0]
    signs = []
    for w, b in weights[:-1]:
        signs.append(np.where(x @ w + b > 0, 1, -1))
        x = np.maximum(x @ w + b, 0)
    return np.unique(np.concatenate(signs, 1), axis=0)


def leaf(signs, layout):
    """The sub-domain where the hidden values, all within 100, have given signs; 0 is any."""
    signs = np.array(signs, np.int8)[None]
    lower, upper = np.where(signs > 0, 0, -100), np.where(signs < 0, 0, 100)
    n, none = signs.shape[1], np.zeros((1, 0), "f")
    multipliers = Multipliers(np.zeros((1, n), "f"), np.zeros((1, n), "f"), np.ones((1, 1)), none)
    side = np.int8([2, 0, 1])[signs + 1]
    nothing = Candidates(none, none, none)
    ends = np.float32(lower), np.float32(upper)
    return Domains(*ends, side, multipliers, np.zeros(1), nothing, layout)


def layout_of(model, arrays):
    """The layout of a model's hidden values."""
    box = Box(jnp.zeros((1, 2)), jnp.ones((1, 2)))
    return jax.jit(lambda a: ranges.ranges(model, a, box, 1))(arrays).layout


def asked_about(f, region, row, offset):
    """A model and a question about it, as the search has them. Only inside `enable_x64`."""
    arrays, structure = split(f)
    model = Traceable(structure, (2,), np.dtype("f"), False, ())
    return (
        model,
        arrays,
        question(one_by_one(region), Spec(row, np.array([offset])), 1, len(row[0])),
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ball", "valid"),
    [
        pytest.param(L2Ball, False, marks=SLOW),
        (L2Ball, True),
        pytest.param(L1Ball, False, marks=SLOW),
        pytest.param(L1Ball, True, marks=SLOW),
    ],
)
def test_leaves_of_balls_are_settled_close_to_their_least_value(ball, valid):
    """With an offset that makes the least value over the ball a little more than 0, a net is proved
    on the leaf of each pattern of signs; a little less, and one of the leaves has an example."""
    box = Box(*jnp.asarray(VALID)) if valid else None
    for seed in range(3):
        weights, row, centre, eps = random_case(seed)
        least = least_on(ball, valid, weights, row, centre, eps)
        region = ball(jnp.asarray(centre[None]), jnp.asarray(eps), box)
        for margin in (2e-5, -2e-5):
            with jax.enable_x64(True):
                asked = asked_about(net(weights), region, np.float64(row[None]), margin - least)
                known = layout_of(*asked[:2])
                found = [
                    leaves.settle(*asked, leaf(signs, known), 60.0)
                    for signs in patterns(weights, region)
                ]
            examples = [done.example for done in found if done.example is not None]
            assert all(done.reason == Reason.NONE for done in found) or margin < 0
            assert bool(examples) == (margin < 0)
            for x in examples:
                assert np.linalg.norm(x - centre, ord=ball.norm) <= eps
                assert not valid or np.all((VALID[0] <= x) & (x <= VALID[1]))


def one_hidden(function, x):
    return function(x[:, :1] + x[:, 1:]) - 0.5


@pytest.mark.parametrize(
    ("function", "signs", "reason"),
    [
        (jax.nn.relu, [1], Reason.NUMERICS),
        (jax.nn.sigmoid, [0], Reason.LOOSE),
    ],
)
def test_the_reason_is_numerical_only_where_the_model_is_affine(function, signs, reason):
    """relu(z) - 1/2 and sigmoid(z) - 1/2 for z = x_0 + x_1 have zeros on the leaf; with these
    offsets no margin is left, and points near zeros are not far enough below 0 to be examples."""
    region = L1Ball(jnp.full((1, 2), 0.25), 0.125)
    with jax.enable_x64(True):
        f = jax.tree_util.Partial(one_hidden, function)
        least = float(function(np.float64(0.375))) - 0.5
        asked = asked_about(f, region, np.ones((1, 1)), -least)
        domain = leaf(signs, layout_of(*asked[:2]))
        assert leaves.settle(*asked, domain, 60.0).reason == reason
        assert leaves.settle(*asked, domain, 0.0).reason == reason
