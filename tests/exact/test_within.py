"""The search inside of a caller's jit, against least values that are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import apply, random_weights
from planar import least_value

from jaxcert import AnyOf, L2Ball, LinfBall, Polytope, Reason, Spec, Status
from jaxcert.exact import decide_within

CENTRES = np.float32([[0.1, -0.2], [-0.4, 0.3], [0.5, 0.5]])
RADII = np.float32([0.5, 0.75, 1.0])
NOWHERE = np.zeros((0, 2)), np.zeros(0)


@jax.jit
def decided(weights, x, eps, row, offset, steps):
    """All that can be is traced; the model closes over traced weights."""
    spec = AnyOf((Spec(row[None], offset[:, None]), Spec(row[None], offset[:, None] - 1.0)))
    return decide_within(lambda z: apply(weights, z), L2Ball(x, eps), spec, steps=steps)


@functools.cache
def case(seed):
    weights, row = random_weights(seed), np.random.default_rng(seed).normal(size=3).astype("f")
    discs = zip(np.float64(CENTRES), np.float64(RADII), strict=True)
    least = [least_value(weights, np.float64(row), NOWHERE, disc) for disc in discs]
    return weights, row, np.array(least)


@pytest.mark.parametrize("seed", [1])
def test_nets_are_decided_around_their_least_value(seed):
    weights, row, least = case(seed)
    margins = np.float32([1e-2, -1e-3, 1e-3])
    verdict = decided(weights, CENTRES, RADII, row, np.float32(margins - least), 5000)
    assert verdict.status.tolist() == [Status.VERIFIED, Status.FALSIFIED, Status.VERIFIED]
    assert verdict.reason.tolist() == [Reason.NONE] * 3
    x = np.asarray(verdict.counterexample)[1]
    assert verdict.counterexample.dtype == jnp.float32
    assert np.linalg.norm(np.float64(x) - CENTRES[1]) <= RADII[1]
    assert np.float64(apply(weights, x[None]))[0] @ row + margins[1] - least[1] <= 1e-6


def test_what_the_steps_do_not_reach_is_unknown():
    weights, row, least = case(1)
    verdict = decided(weights, CENTRES, RADII, row, np.float32(1e-3 - least), 1)
    assert verdict.status.tolist() == [Status.UNKNOWN] * 3
    assert verdict.reason.tolist() == [Reason.DOMAINS] * 3


@pytest.mark.parametrize("place", range(5))
def test_numbers_that_are_not_known_prove_nothing(place):
    """NaN in any of the arguments, and a radius that is negative; the other sets stay decided."""
    weights, row, least = case(0)
    given = [weights, CENTRES.copy(), RADII.copy(), row, np.float32(1.0 - least)]
    if place == 0:
        given[0] = [(w * np.float32(np.nan), b) for w, b in weights]
    elif place == 3:
        given[3] = row * np.float32(np.nan)
    else:
        given[place][0] = -1.0 if place == 2 else np.nan
    verdict = decided(*given, 50)
    hit = slice(None) if place in (0, 3) else slice(1)
    assert (verdict.status[hit] == Status.UNKNOWN).all()
    if place not in (0, 3):
        assert (verdict.status[1:] == Status.VERIFIED).all()


def _folded(x):
    return jnp.sum(jnp.abs(x), 1, keepdims=True) - jnp.abs(x[:, :1] + x[:, 1:])


def test_what_finds_no_room_is_unknown():
    """|a| + |b| - |a + b| >= 0 with equality on half of the plane, at a tiny margin."""
    decided = jax.jit(
        lambda ball: decide_within(
            _folded, ball, Spec(jnp.ones((1, 1)), 1e-6), steps=10_000, batch=4, capacity=16
        )
    )
    verdict = decided(LinfBall(jnp.full((1, 2), 0.1), 1.0))
    assert verdict.status.tolist() == [Status.UNKNOWN]
    assert verdict.reason.tolist() == [Reason.MEMORY]


def test_what_cannot_be_searched_is_refused():
    box, spec = LinfBall(jnp.zeros((3, 2)), 1.0), Spec(jnp.ones((1, 1)), 0.0)
    with pytest.raises(ValueError, match="capacity must be at least"):
        decide_within(_folded, box, spec, steps=1, batch=4, capacity=6)
    half = Polytope(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), -1.0)
    with pytest.raises(TypeError, match="linear inequalities"):
        decide_within(_folded, half, spec, steps=1)  # type: ignore[arg-type]
