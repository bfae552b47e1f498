"""Input sets: projections are nearest points, samples lie inside, mistakes are caught."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from thinned import one_in

from jaxcert import bounds
from jaxcert.sets import (
    Box,
    L1Ball,
    L2Ball,
    LinfBall,
    Polytope,
    bounding_box,
    checked,
    contains,
    flat_norm,
    per_example,
    project,
    sample,
    uncut,
)

CENTRES = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 4)), jnp.float32)
EPS = jnp.array([0.0, 0.01, 0.3, 0.7, 5.0])
VALID = Box(0.0, 1.0)
UNEVEN = Box(CENTRES - 0.05, CENTRES + 0.4)
SETS = [
    ball(CENTRES, EPS, valid)
    for ball in (LinfBall, L2Ball, L1Ball)
    for valid in (None, VALID, UNEVEN)
] + [Box(CENTRES - EPS[:, None], CENTRES)]
ids = lambda s: f"{type(s).__name__}-{getattr(s, 'valid', None) is not None}"  # noqa: E731


def inside(region, x, slack):
    """Membership in numpy float64, with slack for float32 rounding."""
    x = np.asarray(x, np.float64)
    box = region if isinstance(region, Box) else region.valid
    ok = np.ones(x.shape[0], bool)
    if box is not None:
        ok &= ((np.asarray(box.lower) - slack <= x) & (x <= np.asarray(box.upper) + slack)).all(1)
    if not isinstance(region, Box):
        size = np.linalg.norm(x - np.asarray(region.x, np.float64), ord=region.norm, axis=1)
        ok &= size <= np.asarray(region.eps, np.float64) + slack
    return ok


@pytest.mark.parametrize("region", one_in(2, SETS), ids=ids)
def test_samples_lie_inside_and_reach_the_boundary(region):
    points = np.asarray(jax.jit(lambda r: sample(jax.random.key(0), r, 200))(region))
    assert points.shape == (200, 5, 4)
    assert all(inside(region, p, 3e-6).all() for p in points)
    box = bounding_box(region)
    spread = (points.max(0) - points.min(0))[1:]
    assert (spread > 0.1 * np.asarray(box.upper - box.lower)[1:]).mean() > 0.7
    if getattr(region, "valid", VALID) is None:
        far = flat_norm(jnp.asarray(points[:, 2] - CENTRES[2]), region.norm).max()
        assert far > 0.99 * EPS[2]


@pytest.mark.parametrize("region", SETS, ids=ids)
def test_projection_is_the_nearest_point(region):
    """No sample of the set is nearer, and points of the set stay."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)) * 2, jnp.float32)
    run = jax.jit(project)
    nearest = np.asarray(run(region, x), np.float64)
    assert inside(region, nearest, 3e-6).all()
    points = np.asarray(sample(jax.random.key(1), region, 400), np.float64)
    distance = np.linalg.norm(points - np.asarray(x), axis=2)
    assert (np.linalg.norm(nearest - np.asarray(x), axis=1) <= distance.min(0) + 1e-5).all()
    for p in points[:4]:
        assert np.allclose(run(region, jnp.asarray(p, jnp.float32)), p, atol=1e-5)


@pytest.mark.parametrize("ball", [L2Ball, L1Ball])
@pytest.mark.parametrize("valid", [None, VALID, UNEVEN], ids=["none", "unit", "uneven"])
def test_projection_against_scipy(ball, valid):
    x = np.random.default_rng(2).normal(size=(5, 4)) * 1.5
    region = ball(CENTRES, EPS, valid)
    got = np.asarray(project(region, jnp.asarray(x, jnp.float32)), np.float64)
    box = Box(-np.inf, np.inf) if valid is None else valid
    low, high = (np.broadcast_to(np.asarray(b, np.float64), (5, 4)) for b in (box.lower, box.upper))
    for i in range(1, 5):
        c, e = np.asarray(CENTRES[i], np.float64), float(EPS[i])
        if ball is L2Ball:
            limit = {"type": "ineq", "fun": lambda z, c=c, e=e: e**2 - ((z - c) ** 2).sum()}
            start, unpack = c, lambda z: z
            bounds = list(zip(low[i], high[i], strict=True))
        else:  # z = c + p - n with p, n >= 0 and sum(p + n) <= e
            limit = {"type": "ineq", "fun": lambda z, e=e: e - z.sum()}
            start, unpack = np.zeros(8), lambda z, c=c: c + z[:4] - z[4:]
            bounds = [(0, h) for h in high[i] - c] + [(0, h) for h in c - low[i]]
        best = optimize.minimize(
            lambda z, unpack=unpack, i=i: ((unpack(z) - x[i]) ** 2).sum(),
            start, bounds=bounds, constraints=[limit], method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )  # fmt: skip
        assert np.allclose(got[i], unpack(best.x), atol=2e-3)
        assert ((got[i] - x[i]) ** 2).sum() <= best.fun + 1e-5


@given(st.lists(st.floats(-3, 3, width=32), min_size=20, max_size=20), st.floats(0, 4, width=32))
def test_projections_stay_inside_and_do_not_expand(values, eps):
    x = jnp.asarray(np.float32(values).reshape(5, 4))
    for ball in (L2Ball, L1Ball):
        region = ball(CENTRES, eps, VALID)
        run = jax.jit(project)
        first, second = run(region, x), run(region, x + 0.5)
        assert inside(region, first, 5e-6).all()
        moved = np.linalg.norm(np.asarray(first - second), axis=1)
        assert (moved <= np.linalg.norm(np.full(4, 0.5)) + 1e-4).all()


def test_contains():
    assert contains(LinfBall(CENTRES, 0.1), CENTRES + 0.09).all()
    assert not contains(LinfBall(CENTRES, 0.1), CENTRES.at[:, 0].add(0.11)).any()
    assert not contains(L2Ball(CENTRES, 0.1), CENTRES + 0.09).any()
    assert contains(L1Ball(CENTRES, EPS), CENTRES.at[:, 1].add(0.2)).tolist() == [0, 0, 1, 1, 1]
    assert not contains(LinfBall(CENTRES, 5.0, VALID), CENTRES + 1).any()
    assert contains(Box(CENTRES, CENTRES), CENTRES).all()


@pytest.mark.parametrize("scale", [1e-160, 1e-20, 1.0, 1e20, 1e160])
def test_sizes_of_extreme_distances(scale):
    """Squares of distances overflowed and vanished."""
    with jax.enable_x64(True):
        delta = scale * np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
        size = np.asarray(flat_norm(jnp.asarray(delta), 2.0))
        assert np.allclose(size, scale * np.array([5.0, 0.0, 1.0]), rtol=1e-12, atol=0)
        ball = L2Ball(jnp.zeros((3, 2)), scale * np.array([4.9, 0.0, 1.0]))
        assert contains(ball, jnp.asarray(delta)).tolist() == [False, True, True]
        slope = jax.grad(lambda d: flat_norm(d, 2.0).sum())(jnp.asarray(delta[:1]))
    assert np.allclose(slope, [[0.6, 0.8]])


def test_bounding_boxes():
    box = bounding_box(L2Ball(CENTRES, EPS, VALID))
    assert (box.lower >= 0).all()
    assert (box.upper <= 1).all()
    assert np.array_equal(box.lower[0], CENTRES[0])
    image = jnp.zeros((5, 2, 3))
    assert per_example(EPS, image).shape == (5, 1, 1)
    assert per_example(0.5, image).shape == ()
    free = bounding_box(LinfBall(image, EPS))
    assert np.allclose(free.upper[3], 0.7)


@pytest.mark.parametrize("region", SETS, ids=ids)
def test_sets_are_pytrees(region):
    leaves, tree = jax.tree.flatten(region)
    rebuilt = jax.tree.unflatten(tree, leaves)
    assert type(rebuilt) is type(region)
    jax.tree.unflatten(tree, [object()] * len(leaves))  # JAX does this: no checks in constructors
    doubled = jax.jit(lambda r: jax.tree.map(lambda a: a * 2, r))(region)
    assert np.allclose(bounding_box(doubled).lower, 2 * bounding_box(region).lower, atol=1e-6)
    if getattr(region, "valid", None) is not VALID:
        each = jax.vmap(lambda r: bounding_box(jax.tree.map(lambda a: a[None], r)).upper[0])(region)
        assert np.allclose(each, bounding_box(region).upper)


def polytope(seed=0, cuts=3):
    """A random one for each centre, which has the centre well inside."""
    matrix = jnp.asarray(np.random.default_rng(seed).normal(size=(5, cuts, 4)), jnp.float32)
    offset = -jnp.sum(matrix * CENTRES[:, None], 2) - 0.1
    return Polytope(CENTRES - 1, CENTRES + 0.5, matrix, offset)


def test_projection_on_a_polytope_against_scipy():
    region, x = polytope(), np.float32(np.random.default_rng(1).normal(size=(5, 4)) * 2)
    got = np.asarray(project(region, jnp.asarray(x)), np.float64)
    for i in range(5):
        low, high, matrix, offset = (np.asarray(a[i], np.float64) for a in jax.tree.leaves(region))
        best = optimize.minimize(
            lambda z, i=i: ((z - x[i]) ** 2).sum(), np.asarray(CENTRES[i], np.float64),
            bounds=list(zip(low, high, strict=True)), method="SLSQP", options={"ftol": 1e-12},
            constraints=[{"type": "ineq", "fun": lambda z, m=matrix, b=offset: -(m @ z + b)}],
        )  # fmt: skip
        assert (low <= got[i]).all()
        assert (got[i] <= high).all()
        assert (matrix @ got[i] + offset <= 2e-2).all()
        assert np.allclose(got[i], best.x, atol=5e-2)


def test_polytopes_are_cut_boxes():
    region = polytope()
    assert contains(region, CENTRES).all()
    beyond = CENTRES + 0.4 * region.matrix[:, 0] / jnp.abs(region.matrix[:, 0]).sum(1)[:, None]
    rows = np.einsum("bpi,bi->bp", *(np.asarray(a) for a in (region.matrix, beyond)))
    assert (contains(region, beyond) == (rows + region.offset <= 0).all(1)).all()
    assert not contains(region, CENTRES + 0.6).any()
    points = sample(jax.random.key(0), region, 50)
    assert points.shape == (50, 5, 4)
    assert np.mean([contains(region, p - 1e-3 * (p - CENTRES)) for p in points]) > 0.9
    assert contains(checked(region), CENTRES).all()
    shared = checked(Polytope(region.lower, region.upper, region.matrix[0], -9.0))
    assert contains(shared, CENTRES).all()


@pytest.mark.parametrize(
    ("matrix", "offset", "message"),
    [
        (jnp.ones((2, 3)), 0.0, "matrix must have shape"),
        (jnp.ones((2, 2, 4)), 0.0, "matrix must have shape"),
        (jnp.ones(4), 0.0, "matrix must have shape"),
        (jnp.ones((2, 4)), jnp.ones(3), "offset must be a number"),
        (jnp.full((2, 4), jnp.nan), 0.0, "matrix must be finite"),
        (jnp.ones((2, 4)), jnp.inf, "offset must be finite"),
        (jnp.ones((2, 4), int), 0.0, "matrix must be an array of floating point"),
    ],
)
def test_wrong_inequalities_are_refused(matrix, offset, message):
    with pytest.raises((ValueError, TypeError), match=message):
        checked(Polytope(CENTRES, CENTRES, matrix, offset))


def test_traced_inequalities_that_are_not_finite_turn_into_nan():
    region = polytope()
    wrong = region.offset.at[2, 0].set(jnp.inf)
    made = jax.jit(lambda o: checked(Polytope(region.lower, region.upper, region.matrix, o)))(wrong)
    assert np.isnan(made.lower).all(1).tolist() == [False, False, True, False, False]


def test_bounds_on_a_polytope_are_those_on_its_box():
    region, f = polytope(), lambda x: jnp.maximum(x[:, :2] - x[:, 2:], 0)
    for method in (bounds.ibp, bounds.crown):
        found, box = method(f, outward=True)(region), method(f, outward=True)(uncut(region))
        assert np.array_equal(found.lower, box.lower)
        assert np.array_equal(found.upper, box.upper)
    assert bounds.certify(f, region).status.shape == (5,)


def test_checked_keeps_what_is_right():
    region = checked(LinfBall(CENTRES, EPS, VALID))
    assert np.array_equal(region.eps, EPS)
    assert region.x is CENTRES
    for eps in (0.1, 1 / 3, 1e-8, np.float64(0.1), np.array([0.1] * 5), 1):
        assert (np.asarray(checked(LinfBall(CENTRES, eps)).eps, np.float64) >= eps).all()
    assert checked(LinfBall(CENTRES, 0)).eps == 0


def test_checked_turns_traced_mistakes_into_nan():
    run = jax.jit(lambda x, e: bounding_box(checked(LinfBall(x, e, VALID))))
    x = CENTRES.at[1, 0].set(jnp.nan).at[2, 0].set(jnp.inf).at[3, 0].set(-0.1)
    box = run(x, EPS.at[4].set(-1.0))
    known = ~(np.isnan(box.lower) | np.isnan(box.upper)).all(1)
    assert known.tolist() == [True, False, False, False, False]
    wrong = jax.jit(lambda l, u: checked(Box(l, u)))(CENTRES, CENTRES.at[2, 1].add(-1e-6))
    assert np.isnan(wrong.lower).all(1).tolist() == [False, False, True, False, False]
