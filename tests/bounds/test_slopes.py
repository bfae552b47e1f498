"""Optimised slopes are bounds that are never worse than what they start from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import dense, weights
from oracles import in_float64, points_of
from reference_nets import load

from jaxcert.bounds import alpha_crown, crown, crown_ibp
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.slopes import Free
from jaxcert.sets import L2Ball, LinfBall
from jaxcert.specs import margins

KINKS = {
    "relu": jax.nn.relu,
    "leaky": lambda x: jax.nn.leaky_relu(x, 0.2),
    "steep left": lambda x: jax.nn.leaky_relu(x, 1.7),  # concave
    "abs": jnp.abs,
    "max": lambda x: jnp.maximum(x, 0.3),
    "min": lambda x: jnp.minimum(x, -0.2),
    "tanh": jnp.tanh,
    "mixed": lambda x: jnp.minimum(jnp.abs(x), 0.5) + jax.nn.relu(-x),
}


def inputs(b=3, d=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (b, d)), jnp.float32)


@functools.cache
def all_kinks():
    """Every activation on its own part of a hidden layer."""
    w1, w2 = weights(4, 3 * len(KINKS), seed=1, scale=1.0), weights(3 * len(KINKS), 3, seed=2)

    def f(x):
        parts = jnp.split(x @ w1, len(KINKS), axis=1)
        return jnp.concatenate([k(p) for k, p in zip(KINKS.values(), parts, strict=True)], 1) @ w2

    return f


@pytest.mark.slow
def test_no_point_lies_outside_and_more_steps_are_never_worse():
    f, eps = all_kinks(), jnp.array([0.0, 0.2, 1.0])
    region = LinfBall(inputs(), eps)

    @jax.jit
    def run(region):
        plain = crown(f)(region)
        return plain, [alpha_crown(f, steps=n)(region) for n in (0, 5)]

    plain, found = run(region)
    points = points_of(f, region, n=64)
    y = in_float64(f)(points.reshape(-1, 4)).reshape(*points.shape[:2], 3)
    before = plain
    for box in found:
        assert (np.asarray(box.lower) <= y + 1e-5).all()
        assert (y <= np.asarray(box.upper) + 1e-5).all()
        assert (box.lower >= before.lower - 1e-5).all()
        assert (box.upper <= before.upper + 1e-5).all()
        before = box
    assert np.allclose(found[0].lower, plain.lower, atol=1e-5)
    gained = (plain.upper - plain.lower) - (found[-1].upper - found[-1].lower)
    assert (gained[2] > 0.1).all()


def test_each_kink_reaches_its_best_slope():
    """act(x) - s x on [-a, b] for one s between the slopes: the best line touches its minimum."""
    eps, x = 1.0, jnp.full((1, 1), 0.1)
    grid = np.linspace(-0.9, 1.1, 4001)[:, None]
    for name, s in (("relu", 0.5), ("leaky", 0.6), ("abs", 0.2), ("max", 0.4), ("min", 0.4)):
        f = lambda x, name=name, s=s: KINKS[name](x) - s * x  # noqa: E731
        values = in_float64(f)(grid)
        plain, best = jax.jit(
            lambda r, f=f: (crown(f)(r), alpha_crown(f, steps=40)(r))
        )(LinfBall(x, eps))  # fmt: skip
        exact = values.min() if name != "min" else values.max()
        found, before = ((b.upper if name == "min" else b.lower)[0, 0] for b in (best, plain))
        assert abs(found - exact) < 0.02, name
        assert abs(before - exact) > 0.1, name


def test_rows_of_a_spec_have_slopes_of_their_own():
    f = dense(4, 8, 8, 3, seed=3)
    spec = margins(jnp.array([0, 1, 2]), 3)
    region = L2Ball(inputs(), 0.6)

    @jax.jit
    def run(region):
        return crown(f)(region, spec), alpha_crown(f, steps=8)(region, spec)

    plain, best = run(region)
    assert (best.lower >= plain.lower - 1e-5).all()
    assert (best.lower > plain.lower + 1e-3).any(axis=0).all()
    single = jax.tree.map(lambda a: a[:, :1] if jnp.ndim(a) > 1 else a, spec)
    row = jax.jit(lambda r: alpha_crown(f, steps=8)(r, single))(region)
    assert np.allclose(row.lower[:, 0], best.lower[:, 0], atol=1e-3)


@pytest.mark.slow
def test_better_hidden_bounds_are_sound_and_no_worse():
    f = dense(4, 8, 8, 8, 3, seed=4)
    region = LinfBall(inputs(), jnp.array([0.0, 0.2, 0.6]))

    @jax.jit
    def run(region):
        return [alpha_crown(f, steps=5, joint=n)(region) for n in (0, 3)]

    alone, joint = run(region)
    points = points_of(f, region, n=64)
    y = in_float64(f)(points.reshape(-1, 4)).reshape(*points.shape[:2], 3)
    assert (np.asarray(joint.lower) <= y + 1e-5).all()
    assert (y <= np.asarray(joint.upper) + 1e-5).all()
    width = [float((box.upper - box.lower)[1:].sum()) for box in (alone, joint)]
    assert width[1] < width[0]


def test_interval_hidden_bounds_and_another_optimiser():
    f = dense(4, 8, 8, 3, seed=3)
    region = LinfBall(inputs(), 0.3)
    method = functools.partial(alpha_crown, hidden=crown_ibp, steps=6, optimiser=optax.sgd(0.5))
    plain, tight, best = jax.jit(lambda r: (crown_ibp(f)(r), crown(f)(r), method(f)(r)))(region)
    assert (best.lower >= plain.lower - 1e-5).all()
    assert (best.upper <= plain.upper + 1e-5).all()
    assert (best.upper - best.lower).sum() < (plain.upper - plain.lower).sum() - 0.01
    assert (best.upper - best.lower).sum() > (tight.upper - tight.lower).sum() - 0.5


def test_a_model_without_free_slopes_has_the_bounds_of_crown():
    w = weights(4, 3, seed=5)
    f = lambda x: x @ w + 1  # noqa: E731
    region = LinfBall(inputs(), 0.3)
    plain, best = jax.jit(lambda r: (crown(f)(r), alpha_crown(f)(r)))(region)
    assert np.allclose(plain.lower, best.lower, atol=1e-6)
    assert np.allclose(plain.upper, best.upper, atol=1e-6)


def test_the_published_implementation_is_no_tighter(data):
    """auto_LiRPA's alpha-CROWN with fixed hidden bounds, 20 iterations."""
    saved, f, x, eps = load(data, "mlp_s")
    box = jax.jit(lambda f, r: alpha_crown(f)(r))(f, LinfBall(x[:16], eps))
    lower, upper = (saved[f"b16/alpha-CROWN-fix/{end}"] for end in ("lb", "ub"))
    assert float((box.upper - box.lower).mean()) <= 1.002 * (upper - lower).mean()
    plain = saved["b16/CROWN/ub"] - saved["b16/CROWN/lb"]
    assert (np.asarray(box.upper - box.lower) <= plain * (1 + 1e-4)).all()


def test_shares_of_a_narrower_type_add_up_to_one():
    """With 1 - share in float32, proofs in float64 were wrong by 3e-8 of a hidden value."""
    with jax.enable_x64(True):
        line = jnp.linspace(0.5, 3e6, 101, dtype=jnp.float64)
        plane = Planes((), jnp.multiply, line, line, line, line)
        share = jnp.asarray(np.random.default_rng(0).uniform(size=101), jnp.float32)
        mixed = Free(plane, plane, 0.0).combined(share)
    for found in (mixed.lower, mixed.upper, mixed.below, mixed.above):
        assert np.allclose(found, line, rtol=1e-15, atol=0)
