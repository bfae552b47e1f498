"""Rounding is counted: error terms against exact rationals and 140-bit arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from oracles import exact

from jaxcert.bounds import ibp, rounding
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.model import as_float64
from jaxcert.sets import Box, LinfBall
from jaxcert.specs import Spec

rng = np.random.default_rng(0)


def _spread(low, high, n=600):
    """Magnitudes from 10^low to 10^high, both signs."""
    return np.sign(rng.normal(size=n)) * 10 ** rng.uniform(low, high, n)


def _positive(low, high, n=600):
    return np.abs(_spread(low, high, n))


def _near(points, n=200):
    return np.concatenate([p + _spread(-12, -1, n) for p in points])


ALL = np.concatenate([_spread(-300, 300), _spread(-3, 3), _near([0.0, 1.0, -1.0])])
HYPERBOLIC = np.concatenate([rng.uniform(-709, 709, 900), _spread(-300, 0)])
FUNCTIONS = {
    "sqrt": (lax.sqrt, mpmath.sqrt, _positive(-300, 300)),
    "rsqrt": (lax.rsqrt, lambda x: 1 / mpmath.sqrt(x), _positive(-300, 300)),
    "cbrt": (lax.cbrt, lambda x: mpmath.sign(x) * mpmath.cbrt(abs(x)), ALL),
    "exp": (lax.exp, mpmath.exp, np.concatenate([rng.uniform(-708, 709, 900), _spread(-300, 2)])),
    "exp2": (
        lax.exp2,
        lambda x: mpmath.power(2, x),
        np.concatenate([rng.uniform(-1021, 1023, 900), _spread(-300, 2)]),
    ),
    "expm1": (
        lax.expm1, mpmath.expm1, np.concatenate([rng.uniform(-50, 709, 900), _spread(-300, 1)]),
    ),
    "log": (lax.log, mpmath.log, np.concatenate([_positive(-300, 300), np.abs(_near([1.0]))])),
    "log1p": (
        lax.log1p,
        mpmath.log1p,
        np.concatenate(
            [_positive(-300, 300), rng.uniform(-0.999, 1, 900), rng.uniform(-0.415, -0.39, 99)]
        ),
    ),
    "tanh": (lax.tanh, mpmath.tanh, ALL),
    "logistic": (
        lax.logistic,
        lambda x: 1 / (1 + mpmath.exp(-x)),
        np.concatenate([rng.uniform(-707, 707, 900), _spread(-300, 1)]),
    ),
    "erf": (lax.erf, mpmath.erf, ALL),
    "erfc": (lax.erfc, mpmath.erfc, np.concatenate([rng.uniform(-6, 26, 900), _spread(-300, 0)])),
    "erf_inv": (
        lax.erf_inv,
        mpmath.erfinv,
        np.concatenate(
            [1 - _positive(-15, -1, 150), _positive(-9, -7, 50) - 1, _spread(-3, -1, 50)]
        ),
    ),
    "sin": (lax.sin, mpmath.sin, _spread(-300, 4)),
    "cos": (lax.cos, mpmath.cos, _spread(-300, 4)),
    "sinh": (lax.sinh, mpmath.sinh, HYPERBOLIC),
    "cosh": (lax.cosh, mpmath.cosh, HYPERBOLIC),
    "asinh": (lax.asinh, mpmath.asinh, ALL),
    "atan": (lax.atan, mpmath.atan, ALL),
    "pow": (lax.pow, mpmath.power, None),
}  # fmt: skip


def _errors(name):
    """Errors in units of 2^-53 |result|, and of the smallest normal number where flushed."""
    function, reference, points = FUNCTIONS[name]
    if name == "pow":
        base = np.concatenate([_positive(-20, 20), _positive(-1, 1), np.abs(_near([1.0]))])
        columns = (base, rng.uniform(-12, 12, base.size))
    else:
        columns = (points,)
    with jax.enable_x64(True):
        computed = np.asarray(jax.jit(function)(*map(jnp.asarray, columns)))
    assert np.isfinite(computed).all()
    with mpmath.workprec(140):
        true = [reference(*map(mpmath.mpf, row)) for row in zip(*columns, strict=True)]
        gaps = [abs(mpmath.mpf(c) - t) for c, t in zip(computed, true, strict=True)]
        return [
            float((gap - 2 * rounding.TINY) / (abs(mpmath.mpf(c)) * rounding.UNIT)) if c else
            float(gap > 2 * rounding.TINY) * np.inf
            for gap, c in zip(gaps, computed, strict=True)
        ]  # fmt: skip


def test_every_unit_is_checked():
    assert set(FUNCTIONS) == set(rounding.UNITS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_units_leave_head_room(name):
    assert 4 * max(_errors(name)) <= rounding.UNITS[name]


def test_arithmetic_units():
    a, b = _spread(-100, 100, 2000), _spread(-100, 100, 2000)
    with jax.enable_x64(True):
        x, y = jnp.asarray(a), jnp.asarray(b)
        results = jax.jit(lambda x, y: (x + y, x - y, x * y, x / y, x * x, y / 3.7))(x, y)
    p, q = exact(a), exact(b)
    true = (p + q, p - q, p * q, p / q, p * p, q / Fraction(3.7))
    for r, t in zip(results, true, strict=True):
        r = exact(r)
        gap, allowed = abs(r - t), abs(r) * Fraction(rounding.UNIT) * rounding.ARITHMETIC
        assert (gap * 2 <= allowed + Fraction(rounding.TINY)).all()


EDGES = [
    0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1e-310, 2.0**-1022, -(2.0**-1022), 2.0**-1000, 1e300,
    -1e300, 1.7976931348623157e308, 3.0, 1e-5,
]  # fmt: skip


@pytest.mark.parametrize("units", [0, 1, 4, 8, 4096])
def test_widen_against_rationals(units):
    values = np.array([*EDGES, *_spread(-320, 308, 300)])
    with jax.enable_x64(True):
        ends = jnp.asarray(values)
        box = jax.jit(lambda e: rounding.widen(Box(e, e), units))(ends)
    low, high = np.asarray(box.lower), np.asarray(box.upper)
    for v, l, u in zip(values, low, high, strict=True):
        error = abs(Fraction(v)) * units * Fraction(rounding.UNIT) + Fraction(rounding.TINY)
        assert l == -np.inf or Fraction(l) <= Fraction(v) - error
        assert u == np.inf or Fraction(u) >= Fraction(v) + error
        tight = 4 * (units + 4) * rounding.UNIT * abs(v) + 10 * rounding.TINY
        assert np.isinf(u) or u - v <= tight


@pytest.mark.parametrize("v", [np.inf, -np.inf, np.nan])
def test_widen_claims_nothing_about_overflow(v):
    with jax.enable_x64(True):
        box = rounding.widen(Box(jnp.float64(v), jnp.float64(v)), 4)
        assert not box.lower > -1e308
        assert not box.upper < 1e308


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**6, 10**9])
def test_gamma_is_an_upper_bound(n):
    u = Fraction(rounding.UNIT)
    assert Fraction(rounding.gamma(n)) >= n * u / (1 - n * u)
    assert rounding.gamma(n) <= 1.01 * n * rounding.UNIT


CANCELLING = [
    [1e16, 1.0, -1e16],
    [1.0, 1e100, 1.0, -1e100],
    [1e30, 1e15, 1.0, -1e15, -1e30, 1e-10],
    [0.1] * 10 + [-1.0],
    [2.0**53, 1.0, 1.0, -(2.0**53)],
    [3e-308, -2.5e-308, 1e-310],
]


def _points(rows):
    """Boxes of one point each, (1, n) float64, within `enable_x64`."""
    return Box(jnp.asarray([rows], jnp.float64), jnp.asarray([rows], jnp.float64))


SUMS = {
    "reduce_sum": lambda x: x.sum(axis=1, keepdims=True),
    "cumsum": lambda x: jnp.cumsum(x, axis=1)[:, -1:],
    "reverse cumsum": lambda x: jnp.cumsum(x[:, ::-1], axis=1)[:, -1:],
    "window": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, x.shape[1]), (1, 1), "VALID"),
    "dot": lambda x: x @ jnp.ones((x.shape[1], 1)),
    "conv": lambda x: lax.conv_general_dilated(
        x[:, :, None], jnp.ones((x.shape[1], 1, 1)), (1,), "VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )[:, :, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("terms", CANCELLING, ids=len)
def test_cancelling_sums(name, terms):
    with jax.enable_x64(True):
        box = ibp(SUMS[name], outward=True)(_points(terms))
    true = sum(map(Fraction, terms))
    assert Fraction(float(box.lower[0, 0])) <= true <= Fraction(float(box.upper[0, 0]))
    size = sum(abs(Fraction(t)) for t in terms)
    assert float(box.upper[0, 0] - box.lower[0, 0]) <= 1e-13 * size + 1e-300


def test_products_of_bounded_operands_against_rationals():
    a, b = _spread(-8, 8, 12).reshape(1, 3, 4), _spread(-8, 8, 12).reshape(1, 4, 3)
    x = np.concatenate([a.ravel(), b.ravel()])
    with jax.enable_x64(True):
        f = lambda x: (x[:, :12].reshape(-1, 3, 4) @ x[:, 12:].reshape(-1, 4, 3)).reshape(-1, 9)  # noqa: E731
        box = ibp(f, outward=True)(_points(x))
    true = (exact(a[0]) @ exact(b[0])).ravel()
    assert (exact(box.lower[0]) <= true).all()
    assert (true <= exact(box.upper[0])).all()


def test_a_dense_layer_contains_the_exact_product():
    """Big cancelling products, subnormal and huge weights, huge inputs, eps = 0 and eps > 0."""
    x = np.float32(np.concatenate([_spread(-3, 8, (40)), [1e38, -1e38, 1e8, 1e-40]])[None])
    w = np.float32(_spread(-8, 8, 44 * 6)).reshape(44, 6)
    with np.errstate(over="ignore"):
        w[:, 0] = np.clip(1 / x[0], -1e30, 1e30) * np.where(np.arange(44) % 2, 1, -1)
    w[40:, 1] = [1e-40, -3e-41, 1e30, 1e30]
    w[:, 2] = 1e-41
    bias = np.float32(_spread(-3, 3, 6))
    layer = nnx.Linear(44, 6, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = jnp.asarray(w), jnp.asarray(bias)
    spec = np.float32([[1, -1, 0, 0, 0, 0], [0, 1, -1, 0, 1, 0], [0, 0, 0, 1, -1e-20, 0]])
    for eps in (0.0, 0.25):
        with jax.enable_x64(True):
            region = LinfBall(jnp.asarray(x, jnp.float32), eps)
            region = LinfBall(as_float64(region.x), eps)
            proof = jax.jit(ibp(layer, outward=True))
            plain, margin = proof(region), proof(region, Spec(as_float64(jnp.asarray(spec))))
        value = exact(x) @ exact(w) + exact(bias)
        spread = Fraction(eps) * np.abs(exact(w)).sum(0)
        assert (exact(plain.lower) <= value - spread).all()
        assert (value + spread <= exact(plain.upper)).all()
        rows = exact(spec) @ exact(w).T
        value = value @ exact(spec).T
        spread = Fraction(eps) * np.abs(rows).sum(1)
        assert (exact(margin.lower) <= value - spread).all()
        assert (value + spread <= exact(margin.upper)).all()


# --- Casts ----------------------------------------------------------------------------------------


def _both_ways(v, dtype):
    return rounded_down(v, dtype), rounded_up(v, dtype)


_compiled = jax.jit(_both_ways, static_argnums=1)  # XLA may drop casts to and fro under jit


@given(st.lists(st.floats(allow_nan=False), min_size=20, max_size=20))
def test_directed_rounding(values):
    values = np.array([*values, *EDGES, 1e-40, -1e-40, 1e-46, -1e-46, 6e-8, -6e-8, 3.5e38, 65520.0])
    values = np.where(np.abs(values) < rounding.TINY, 0, values)  # XLA takes these for zero
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        for both in (_both_ways, _compiled):
            with jax.enable_x64(True):
                down, up = both(jnp.asarray(values), dtype)
            assert down.dtype == up.dtype == dtype
            down, up = (np.asarray(v).astype(np.float64) for v in (down, up))
            assert (down <= values).all()
            assert (values <= up).all()
            info = jnp.finfo(dtype)
            normal = (np.abs(values) >= float(info.tiny)) & (np.abs(values) < float(info.max))
            gap = up[normal] - down[normal]
            assert (gap <= 1.01 * float(info.eps) * np.abs(values[normal])).all()


def test_directed_rounding_keeps_nan_and_has_the_identity_as_derivative():
    assert jnp.isnan(rounded_down(jnp.float32(jnp.nan), jnp.bfloat16))
    for x in (0.0, 1.0, -1.1, 1e-3):
        for rounded in (rounded_down, rounded_up):
            slope = jax.grad(lambda v, r=rounded: r(v, jnp.bfloat16).astype(jnp.float32))(x)
            assert slope == 1.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("cast", ["astype", "reduce_precision", "weak"])
def test_narrowing_casts_inside_the_model(dtype, cast):
    """f rounds a hidden value to a narrower type, and the rest magnifies it."""
    info = jnp.finfo(dtype)

    def f(x):
        h = 1000 * x
        if cast == "reduce_precision":
            h = lax.reduce_precision(h, info.nexp, info.nmant)
        elif cast == "astype":
            h = h.astype(dtype).astype(x.dtype)
        else:
            h = (h.astype(dtype) * 1).astype(x.dtype)
        return (h - 1000 * x) * 1e4

    x = np.concatenate([np.linspace(0.1, 60.0, 500), -(10 ** np.linspace(-12, -1, 200))])[:, None]
    with jax.enable_x64(True):
        x = jnp.asarray(x)
        proof = jax.jit(ibp(f, outward=True))
        box, wide = proof(Box(x, x)), proof(Box(x - 1e-3, x + 1e-3))
        y = np.asarray(f(x))
    assert np.abs(y).max() > 0.01  # rounding is visible
    for b in (box, wide):
        assert (np.asarray(b.lower) <= y).all()
        assert (y <= np.asarray(b.upper)).all()


def test_casts_that_overflow_are_unknown():
    f = lambda x: 1 / (1e6 * x).astype(jnp.float16).astype(x.dtype)  # noqa: E731
    box = ibp(f, outward=True)(Box(jnp.ones((1, 1)), 2 * jnp.ones((1, 1))))
    assert not box.lower[0, 0] > 0
    assert not box.upper[0, 0] < 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_layers_with_a_narrow_dtype(dtype):
    """A Flax layer casts its input and its weights; the exact dot of the cast numbers, rounded once
    to the layer's type or not at all, lies inside."""
    layer = nnx.Linear(8, 4, dtype=dtype, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.uniform(size=(16, 8)), jnp.float32)
    box = jax.jit(ibp(lambda a: layer(a).astype(jnp.float32), outward=True))(LinfBall(x, 0.0))
    w = np.asarray(layer.kernel[...].astype(dtype)).astype(np.float64)
    h = np.asarray(x.astype(dtype)).astype(np.float64)
    y = h @ w + np.asarray(layer.bias[...].astype(dtype)).astype(np.float64)
    assert (np.asarray(box.lower, np.float64) <= y).all()
    assert (y <= np.asarray(box.upper, np.float64)).all()


def test_subnormal_weights_and_inputs_are_not_flushed():
    """XLA on CPU casts a float32 subnormal to float64 as zero; over the reals it is not zero."""
    w = jnp.asarray(np.float32([[1e-40], [0.0]]))
    x = jnp.asarray(np.float32([[1e38, 1.0], [1e-40, 1.0]]))
    model = jax.tree_util.Partial(lambda w, x: jnp.concatenate([x @ w, x[:, :1] * 1e38], axis=1), w)
    box = jax.jit(lambda m, b: ibp(m, outward=True)(b))(model, Box(x, x))
    true = np.float64(np.float32(1e-40)) * 1e38
    for low, high in ((box.lower[0, 0], box.upper[0, 0]), (box.lower[1, 1], box.upper[1, 1])):
        assert 0 < low <= true <= high
        assert np.isclose(high, true, rtol=1e-6)
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
            info = jnp.finfo(dtype)
            unit = 2.0 ** (info.minexp - info.nmant)
            sizes = np.array([1, 2, 3, 2**info.nmant - 1, 2**info.nmant]) * unit
            for values in (sizes, -sizes):
                narrow = jnp.asarray(values.astype(dtype))
                for widen in (as_float64, jax.jit(as_float64)):
                    assert (np.asarray(widen(narrow)) == values).all()
