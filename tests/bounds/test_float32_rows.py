"""Proofs whose rows of coefficients are float32: they hold, and cost little width."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import exact, in_float64
from test_linear import inputs, mlp, wide
from test_windows import (
    a_bias_per_position,
    average_pool,
    padding_after_a_bias,
    residual_with_strided_shortcut,
)

from jaxcert.bounds import alpha_crown, certify, crown, crown_ibp, hidden_bounds
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall, sample
from jaxcert.specs import Spec

SIZES = (3, 6, 6, 2)
METHODS = {
    "crown": crown,
    "crown_ibp": crown_ibp,
    "alpha_crown": functools.partial(alpha_crown, steps=2, joint=1),
    "unsure": functools.partial(crown, unsure=2),
}


def layers(rng, spread=0):
    """An MLP's weights in float64; each layer's numbers around a size of its own, 10^-spread to
    10^spread."""
    return [
        (rng.normal(size=(a, b)) * size, rng.normal(size=b) * size)
        for (a, b), size in zip(
            itertools.pairwise(SIZES), 10.0 ** rng.uniform(-spread, spread, size=3), strict=True
        )
    ]


def exact_value(weights, x):
    """An MLP at an array of rationals, in rationals."""
    h = x
    for i, (w, b) in enumerate(weights):
        h = h @ exact(w) + exact(b)
        h = np.where(h > 0, h, 0) if i < len(weights) - 1 else h
    return h


def points_in(x, eps, rng, n=4):
    """The centre and other points (n, b, d) of boxes, in rationals."""
    shift = rng.uniform(-1, 1, size=(n, *x.shape))
    shift[0] = 0
    shift[1] = np.sign(shift[1])
    return exact(x) + exact(shift) * exact(eps)[:, None]


@functools.cache
def _proofs(name):
    """(weights, region, spec) -> bounds, with float32 rows and with float64 ones."""
    method = METHODS[name]

    def run(weights, region, spec):
        f = jax.tree_util.Partial(mlp, weights)
        types = (jnp.float32, jnp.float64)
        return [method(f, outward=True, coefficients=t)(region, spec) for t in types]

    return jax.jit(run)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "alpha_crown" else n for n in METHODS]
)
def test_they_hold_in_rationals_and_cost_less_than_a_percent(name):
    """Also at eps = 0, and with rows of the spec that are no float32 numbers."""
    rng = np.random.default_rng(3)
    x, eps = inputs().astype(np.float64) / 3, np.array([0.0, 1e-7, 1e-3, 0.3])
    weights, rows = layers(rng), rng.normal(size=(3, 2))
    with jax.enable_x64(True):
        region = LinfBall(jnp.asarray(x), jnp.asarray(eps))
        spec = Spec(jnp.asarray(rows), jnp.asarray(0.1))
        narrow, double = jax.tree.map(np.asarray, _proofs(name)(wide(weights), region, spec))
    for point in points_in(x, eps, rng):
        y = exact_value(weights, point) @ exact(rows).T + exact(np.array(0.1))
        assert (exact(narrow.lower) <= y).all()
        assert (y <= exact(narrow.upper)).all()
    excess = (narrow.upper - narrow.lower) - (double.upper - double.lower)
    assert (excess <= 0.01 * (double.upper - double.lower) + 1e-9).all()
    assert (excess[2:] > 0).all()  # nothing would show that float32 was used otherwise


@pytest.mark.parametrize("seed", range(40))
def test_they_hold_where_float32_overflows_and_underflows(seed):
    """Weights from 1e-60 to 1e60: what float32 turns into zero or infinity is counted as well."""
    rng = np.random.default_rng(seed)
    weights = layers(rng, spread=rng.choice([5, 25, 45, 60]))
    x = inputs(2).astype(np.float64) * 10.0 ** rng.uniform(-20, 20)
    eps = np.array([0.0, 1.0]) * 10.0 ** rng.uniform(-20, 20)
    with jax.enable_x64(True):
        region = LinfBall(jnp.asarray(x), jnp.asarray(eps))
        spec = Spec(jnp.asarray(rng.normal(size=(2, 2))))
        box, _ = jax.tree.map(np.asarray, _proofs("crown")(wide(weights), region, spec))
    for point in points_in(x, eps, rng):
        y = exact_value(weights, point) @ exact(np.asarray(spec.matrix)).T
        for bound, sign in ((box.lower, 1), (box.upper, -1)):
            known = np.isfinite(bound)
            assert not (sign * exact(np.where(known, bound, 0)) > sign * y)[known].any()


@pytest.mark.parametrize(
    ("kind", "first", "second", "last"),
    [(jnp.float32, 1e-25, 1e-15, 1e38), (jnp.float64, 1e-200, 1e-150, 1e300)],
)
def test_constant_factors_are_not_multiplied_with_each_other(kind, first, second, last):
    """The product of the first two underflows, which in order no product does."""

    def f(x):
        return (x * first * second) @ jnp.full((1, 1), last)  # XLA sees constants

    def g(x):
        return f(x) @ jnp.asarray([[1.0, -1.0]]) + jnp.asarray([0.012, 0.0])

    product = exact(np.array(first)) * exact(np.array(second)) * exact(np.array(last))
    least, most = (exact(np.array(ends)) * product for ends in ([0.5, 1.5], [1.5, 2.5]))
    with jax.enable_x64(True):
        x = jnp.asarray([[1.0], [2.0]])
        for method in (crown, crown_ibp):
            box = jax.jit(method(f, outward=True, coefficients=kind))(LinfBall(x, 0.5))
            assert (exact(np.asarray(box.lower))[:, 0] <= least).all()
            assert (most <= exact(np.asarray(box.upper))[:, 0]).all()
        if kind == jnp.float32:
            method = functools.partial(crown, coefficients=kind)
            assert certify(g, LinfBall(x[:1], 3.0), method=method).radius[0] == 0


SETS = {
    "box": lambda x, eps: Box(x - eps.reshape(-1, 1, 1, 1), x),
    "linf": LinfBall,
    "l2": L2Ball,
    "l1 cut": lambda x, eps: L1Ball(x, eps, Box(0.0, 1.0)),
}


@pytest.mark.parametrize(
    ("f", "name"),
    [
        pytest.param(padding_after_a_bias, "l1 cut", marks=pytest.mark.slow),
        pytest.param(residual_with_strided_shortcut, "linf", marks=pytest.mark.slow),
        pytest.param(a_bias_per_position, "box", marks=pytest.mark.slow),
        (average_pool, "l2"),
    ],
)
def test_windows(f, name):
    """Feature maps, whose hidden bounds come window by window."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 6, 5, 2)))
        region = SETS[name](x, jnp.array([0.0, 0.1]))
        run = jax.jit(
            lambda region: [
                crown(f, outward=True, coefficients=t)(region) for t in (jnp.float32, jnp.float64)
            ]
        )
        narrow, double = jax.tree.map(np.asarray, run(region))
        points = np.asarray(sample(jax.random.key(0), region, 50))
    y = in_float64(f)(points.reshape(-1, *x.shape[1:]))
    y = y.reshape(50, *narrow.lower.shape)
    assert (narrow.lower <= y + 1e-12 * np.abs(y)).all()
    assert (y - 1e-12 * np.abs(y) <= narrow.upper).all()
    excess = (narrow.upper - narrow.lower) - (double.upper - double.lower)
    assert (excess <= 0.01 * (double.upper - double.lower) + 1e-9).all()
    assert excess.max() > 0


@pytest.mark.slow
def test_hidden_bounds_and_certificates():
    rng = np.random.default_rng(1)
    f = jax.tree_util.Partial(mlp, [tuple(np.float32(a) for a in pair) for pair in layers(rng)])
    x = jnp.asarray(inputs())
    narrow = functools.partial(crown, coefficients=jnp.float32)
    ball = LinfBall(x, 0.01)
    assert (certify(f, ball, method=narrow).radius == certify(f, ball, method=crown).radius).all()
    boxes = hidden_bounds(f, outward=True, coefficients=jnp.float32)(ball)
    exact_boxes = hidden_bounds(f, outward=True)(ball)
    for box, other in zip(boxes, exact_boxes, strict=True):
        assert box.lower.dtype == np.float64
        assert (np.asarray(box.lower) != np.asarray(other.lower)).any()
        assert np.allclose(box.lower, other.lower, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [crown, crown_ibp, alpha_crown, hidden_bounds])
def test_other_types_are_refused(method):
    with pytest.raises(ValueError, match=r"jnp.float64 or jnp.float32"):
        method(lambda x: x, coefficients=jnp.bfloat16)
