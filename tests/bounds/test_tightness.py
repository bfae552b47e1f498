"""Bounds of single operations are the exact range, up to one percent: (-inf, inf) would fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from models import weights
from oracles import corners, in_float64
from thinned import one_in

from jaxcert.bounds import ibp
from jaxcert.bounds.interpreter import RULES
from jaxcert.graph import trace
from jaxcert.idioms import simplify
from jaxcert.sets import Box

ANY = [
    (-2.0, -1.0), (1.0, 2.0), (-1.0, 2.0), (-3.0, 0.5), (0.0, 1.0), (-1.0, 0.0), (-1.3, -1.2),
    (-0.8, -0.7), (-1.6, -1.4), (0.3, 0.301), (-0.301, -0.3), (-5e-4, 5e-4), (-7.0, -6.0),
]  # fmt: skip
WIDE = [*ANY, (-1e3, 1e3), (-1e3, -10.0), (10.0, 1e3)]
POSITIVE = [(1.0, 2.0), (0.3, 0.301), (1e-3, 1e3), (0.01, 0.02), (50.0, 1e3)]
UNIT = [(-0.9, 0.9), (0.1, 0.3), (-0.5, -0.499)]
BELOW_ZERO = [(-2.0, -1.0), (-0.301, -0.3), (-1e3, -1.0)]

# primitive or recognised function: (function of one array, intervals)
ELEMENTWISE = {
    "abs": (jnp.abs, WIDE),
    "add": (lambda x: x + 0.3, WIDE),
    "asinh": (jnp.arcsinh, WIDE),
    "atan": (jnp.arctan, WIDE),
    "cbrt": (jnp.cbrt, WIDE),
    "ceil": (jnp.ceil, WIDE),
    "clamp": (lambda x: lax.clamp(-0.5, x, 1.5), WIDE),
    "convert_element_type": (lambda x: (x > 0).astype(x.dtype), WIDE),
    "cos": (jnp.cos, WIDE),
    "cosh": (jnp.cosh, ANY),
    "div": (lambda x: 2.0 / x, [*POSITIVE, *BELOW_ZERO]),
    "elu": (jax.nn.elu, WIDE),
    "eq": (lambda x: jnp.where(x == 3.0, x, 2 * x), ANY),
    "erf": (lax.erf, WIDE),
    "erf_inv": (lax.erf_inv, UNIT),
    "erfc": (lax.erfc, ANY),
    "exp": (jnp.exp, ANY),
    "exp2": (jnp.exp2, ANY),
    "expm1": (jnp.expm1, ANY),
    "floor": (jnp.floor, WIDE),
    "ge": (lambda x: (x >= 0.4).astype(x.dtype), WIDE),
    "gelu_erf": (functools.partial(jax.nn.gelu, approximate=False), WIDE),
    "gelu_tanh": (jax.nn.gelu, WIDE),
    "gt": (lambda x: (x > -1.0).astype(x.dtype), WIDE),
    "hard_swish": (jax.nn.hard_swish, WIDE),
    "integer_pow": (lambda x: x**3, WIDE),
    "integer_pow even": (lambda x: x**4, WIDE),
    "integer_pow negative": (lambda x: x**-3, [*POSITIVE, *BELOW_ZERO]),
    "integer_pow negative even": (lambda x: x**-2, [*POSITIVE, *BELOW_ZERO]),
    "is_finite": (lambda x: jnp.where(jnp.isfinite(x), x, 7.0), WIDE),
    "le": (lambda x: (x <= 0.0).astype(x.dtype), WIDE),
    "leaky_relu": (jax.nn.leaky_relu, WIDE),
    "leaky_relu negative": (lambda x: jax.nn.leaky_relu(x, -0.5), WIDE),
    "log": (jnp.log, POSITIVE),
    "log1p": (jnp.log1p, [*POSITIVE, (-0.9, 0.5)]),
    "logistic": (jax.nn.sigmoid, WIDE),
    "lt": (lambda x: (x < -0.75).astype(x.dtype), WIDE),
    "max": (lambda x: jnp.maximum(x, 0.2), WIDE),
    "min": (lambda x: jnp.minimum(x, 0.2), WIDE),
    "mish": (jax.nn.mish, WIDE),
    "mul": (lambda x: x * -3.0, WIDE),
    "ne": (lambda x: jnp.where(jnp.isnan(x), 7.0, x), WIDE),
    "neg": (lambda x: -x, WIDE),
    "pow": (lambda x: jnp.power(x, 1.7), POSITIVE),
    "pow negative": (lambda x: jnp.power(x, -0.7), POSITIVE),
    "pow of constant": (lambda x: jnp.power(1.3, x), ANY),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 20), WIDE),
    "relu": (lambda x: jnp.where(x > 0, x, 0.0), WIDE),
    "round": (jnp.round, WIDE),
    "rsqrt": (lax.rsqrt, POSITIVE),
    "select_n": (lambda x: jnp.where(x > 0.1, x - 1.0, x), [(1.0, 2.0), (-2.0, -1.0)]),
    "sign": (jnp.sign, WIDE),
    "silu": (jax.nn.silu, WIDE),
    "sin": (jnp.sin, [*WIDE, (1.5, 1.6), (100.0, 100.5), (4.6, 4.8)]),
    "sinh": (jnp.sinh, ANY),
    "soft_sign": (jax.nn.soft_sign, WIDE),
    "softplus": (jax.nn.softplus, WIDE),
    "sqrt": (jnp.sqrt, POSITIVE),
    "square": (lambda x: x * x, WIDE),
    "sub": (lambda x: 0.3 - x, WIDE),
    "tanh": (jnp.tanh, WIDE),
    "not": (lambda x: jnp.where(~(x > 0), 1.0, 2.0), WIDE),
}
# Functions of several entries: the exact range is found at the corners of the box (b, 4), because
# each is monotone, or affine, in every entry.
_X = (2, 2)
LAYERS = {
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2, 4)),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x], axis=1),
    "conv_general_dilated": lambda x: lax.conv_general_dilated(
        x.reshape(-1, 2, 2, 1), weights(2, 2, 1, 2, seed=1).astype(x.dtype), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "conv transposed": lambda x: lax.conv_transpose(
        x.reshape(-1, 2, 2, 1), weights(3, 3, 1, 2, seed=2).astype(x.dtype), (2, 2), "SAME"
    ),
    "cummax": lambda x: lax.cummax(x, axis=1),
    "cummin": lambda x: lax.cummin(x, axis=1),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "dot_general": lambda x: x @ weights(4, 3, seed=3).astype(x.dtype),
    "dot from the left": lambda x: jnp.einsum("ji,bi->bj", weights(3, 4, seed=4), x),
    "dot of bounded": lambda x: jnp.einsum("bi,bj->bij", x[:, :2], x[:, 2:]),
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (0, 1), (x.shape[0], 2)),
    "gather": lambda x: x[:, np.array([3, 1, 1])],
    "log_softmax": jax.nn.log_softmax,
    "mul of bounded": lambda x: x[:, :2] * x[:, 2:],
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=0.5),
    "reduce_max": lambda x: x.max(axis=1),
    "reduce_min": lambda x: x.min(axis=1),
    "reduce_sum": lambda x: x.sum(axis=1),
    "reduce_window_max": lambda x: nnx.max_pool(x[..., None], (3,), strides=(2,), padding="SAME"),
    "reduce_window_min": lambda x: -nnx.max_pool(-x[..., None], (2,), strides=(2,)),
    "reduce_window_sum": lambda x: nnx.avg_pool(x[..., None], (3,), padding="SAME"),
    "min pooling": lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2), (1, 1), "SAME"),
    "reshape": lambda x: x.reshape(-1, *_X),
    "rev": lambda x: x[:, ::-1],
    "slice": lambda x: x[:, 1:3],
    "softmax": lambda x: jax.nn.softmax(3 * x),
    "sort": lambda x: jnp.sort(x, axis=1),
    "split": lambda x: jnp.concatenate(jnp.split(x, 2, axis=1)[::-1], axis=1),
    "squeeze": lambda x: jnp.squeeze(x[:, :1], 1),
    "stack": lambda x: jnp.stack([x, -x], axis=1),
    "transpose": lambda x: x.reshape(-1, *_X).transpose(0, 2, 1),
    "unstack": lambda x: jnp.stack(jnp.unstack(x, axis=1), axis=1)[:, ::2],
    "reduce_and": lambda x: jnp.all(x > 0.1, axis=1).astype(x.dtype),
    "reduce_or": lambda x: jnp.any(x > 0.1, axis=1).astype(x.dtype),
    "and": lambda x: ((x > 0.0) & (x[:, ::-1] > 0.1)).astype(x.dtype),
    "or": lambda x: ((x > 0.0) | (x[:, ::-1] > 0.1)).astype(x.dtype),
}  # fmt: skip
ELSEWHERE = {
    "copy": "removed while the graph is built",
    "stop_gradient": "no primitive of that name in a forward trace; jax.lax.stop_gradient",
    "tile": "a primitive of newer JAX only; moves data",
    "variance": "depends on all entries at once; its range is tested in test_soundness",
}


def test_every_rule_is_in_a_table():
    covered = {name.split()[0] for name in [*ELEMENTWISE, *LAYERS]}
    assert set(RULES) - covered - set(ELSEWHERE) == set()


@pytest.mark.parametrize("name", [n for n in [*ELEMENTWISE, *LAYERS] if " " not in n])
def test_the_table_exercises_the_rule_it_names(name):
    f, width = (ELEMENTWISE[name][0], 1) if name in ELEMENTWISE else (LAYERS[name], 4)
    graph = simplify(trace(f, jax.ShapeDtypeStruct((2, width), jnp.float32)))
    names = {eqn.name for eqn in graph.equations}
    # pooling by a sum or maximum, and a minimum as a maximum, are named by what they lower to
    assert name in names or name in {"reduce_window_min", "dynamic_slice", "unstack"}, names


def _ranges(f, lower, upper):
    """Both kinds of bounds of f over boxes (b, d)."""
    run = jax.jit(lambda box: (ibp(f)(box), ibp(f, outward=True)(box)))
    return run(Box(jnp.asarray(lower, jnp.float32), jnp.asarray(upper, jnp.float32)))


def _compare(bounds, points_values, slack=0.0):
    """The bounds contain the values and are at most 1.01 times as wide, up to float32 rounding."""
    least, most = points_values.min(0), points_values.max(0)
    size = np.maximum(np.abs(least), np.abs(most)) + 1e-30
    for box, rounding in zip(bounds, (4e-6, 4e-6), strict=True):
        low, high = np.asarray(box.lower, np.float64), np.asarray(box.upper, np.float64)
        assert (high - low <= 1.01 * (most - least) + rounding * size + slack).all()
        assert (low <= high).all()
    proof = bounds[1]
    assert (np.asarray(proof.lower, np.float64) <= least).all()
    assert (most <= np.asarray(proof.upper, np.float64)).all()


@pytest.mark.parametrize("name", one_in(2, ELEMENTWISE))
def test_elementwise_range_is_exact(name):
    f, intervals = ELEMENTWISE[name]
    lower, upper = np.float32(intervals).astype(np.float64).T[:, :, None]
    inside = np.concatenate([np.linspace(0, 1, 2001), np.linspace(0, 1e-4, 101)])
    points = lower + (upper - lower) * inside[:, None, None]
    # where the smooth functions turn, and on both sides of the steps of the others
    special = np.array([0.0, -1.2784645, -0.7517916, -0.7524614, -1.1924312, -1.5, 0.4, -0.75])
    special = np.concatenate([special, special - 1e-12, special + 1e-12])
    special = np.clip(special[:, None, None], lower, upper)
    points = np.clip(np.concatenate([points, special]), lower, upper)
    m, b, _ = points.shape
    values = in_float64(f)(points.reshape(m * b, 1)).reshape(m, b, 1)
    slack = 1e-9  # 1 + tanh(x) cancels in float32 and, for x << 0, in float64
    if name == "reduce_precision":
        slack = 3e-6 * np.maximum(np.abs(lower), np.abs(upper))
    _compare(_ranges(f, lower, upper), values, slack)


@pytest.mark.parametrize("name", one_in(2, LAYERS))
def test_layer_range_is_found_at_the_corners(name):
    f = LAYERS[name]
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(6, 4))
    radius = rng.uniform(0, 1, size=(6, 4)) * np.array([1, 1e-3, 0, 1, 3, 0.1])[:, None]
    lower, upper = np.float32(centre - radius), np.float32(centre + radius)
    points = corners(lower.astype(np.float64), upper.astype(np.float64))
    m, b, d = points.shape
    values = in_float64(f)(points.reshape(m * b, d))
    _compare(_ranges(f, lower, upper), values.reshape(m, b, *values.shape[1:]), slack=2e-6)


@pytest.mark.parametrize("f", [jax.nn.softmax, jax.nn.log_softmax])
def test_softmax_with_huge_spreads_and_masks(f):
    rows = np.array(
        [
            [0, 1e4, -1e4],
            [1e3, 0, 1e3],
            [-1e9, 2, -1e9],
            [1e37, -1e37, 0],
            [5, 5, 5],
            [-9, 0, -np.inf],
        ]
    )
    lower, upper = np.float32(rows - 0.5), np.float32(rows + 0.5)
    points = corners(lower.astype(np.float64), upper.astype(np.float64))
    values = in_float64(f)(points.reshape(-1, 3)).reshape(points.shape)
    for box in _ranges(f, lower, upper)[1:]:
        low, high = np.asarray(box.lower, np.float64), np.asarray(box.upper, np.float64)
        assert (low <= values.min(0)).all()
        assert (values.max(0) <= high).all()
        exact = np.nan_to_num(values.max(0), neginf=0) - np.nan_to_num(values.min(0), neginf=0)
        finite = np.isfinite(low) & np.isfinite(high)
        assert finite[:5].all()
        assert np.isnan(low[5]).sum() == 0
        size = np.abs(np.where(finite, low, 0)) + 1
        width = np.where(finite, high, 0) - np.where(finite, low, 0)
        assert (width <= 1.01 * np.where(finite, exact, 0) + 1e-6 * size).all()


def test_a_row_masked_out_entirely_is_unknown():
    mask = np.array([[False, False, False], [True, False, True]])
    f = lambda x: jax.nn.softmax(jnp.where(mask, x, -jnp.inf))  # noqa: E731
    for box in _ranges(f, np.zeros((2, 3)), np.ones((2, 3))):
        assert not (np.asarray(box.lower[0]) > 0).any()
        assert np.isfinite(np.asarray(box.lower[1])).all()


# --- Random intervals -----------------------------------------------------------------------------

numbers = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-8, 8, width=32)
NAMES = sorted(ELEMENTWISE)
TOTAL = [n for n in NAMES if ELEMENTWISE[n][1] in (ANY, WIDE) and n != "reduce_precision"]


@functools.cache
def _all_bounds():
    """One compiled function for all total functions: (b, 1) ends to (b, functions) bounds."""
    functions = [ELEMENTWISE[n][0] for n in TOTAL]
    together = lambda x: jnp.concatenate([f(x) for f in functions], axis=1)  # noqa: E731
    return jax.jit(ibp(together, outward=True)), in_float64(together)


@given(st.lists(st.tuples(numbers, numbers), min_size=8, max_size=8))
def test_random_intervals_contain_the_values(pairs):
    bounds, evaluate = _all_bounds()
    ends = np.sort(np.float32(pairs), axis=1)
    ends[0, 1] = ends[0, 0]  # always a degenerate one
    lower, upper = ends[:, :1], ends[:, 1:]
    box = bounds(Box(jnp.asarray(lower), jnp.asarray(upper)))
    grid = np.linspace(0, 1, 33)[:, None, None]
    points = np.clip(
        lower * (1 - grid) + upper.astype(np.float64) * grid, lower, upper
    )  # the ends are the first and last point
    values = evaluate(points.reshape(-1, 1)).reshape(33, 8, -1)
    low, high = np.asarray(box.lower, np.float64), np.asarray(box.upper, np.float64)
    broken = (low > values) | (values > high)  # False where an end is NaN: nothing is claimed
    assert not broken.any(), [TOTAL[i] for i in np.unique(np.nonzero(broken)[2])]
    overflowed = ~np.isfinite(values).all(0)
    unknown = np.isnan(low) | np.isnan(high)
    sensible = unknown & ~overflowed & (np.abs(upper) < 50) & (np.abs(lower) < 50)
    assert not sensible.any(), [TOTAL[i] for i in np.unique(np.nonzero(sensible)[1])]


# --- What is not known stays unknown --------------------------------------------------------------


def test_an_unknown_operand_gives_an_unknown_result():
    """1 / x over an interval around zero is unknown (NaN). f of it may take f's values anywhere, so
    nothing narrower than f's whole range may come out."""
    functions = [ELEMENTWISE[n][0] for n in NAMES]
    together = lambda x: jnp.concatenate([f(1 / x) for f in functions], axis=1)  # noqa: E731
    values = in_float64(together)(np.array([[-1e3], [-3], [-1], [-0.1], [0.1], [1], [3], [1e3]]))
    for box in _ranges(together, [[-11.0]], [[11.0]]):
        low, high = np.asarray(box.lower[0]), np.asarray(box.upper[0])
        slack = 1e-6 * np.abs(np.nan_to_num(values, posinf=0, neginf=0))
        broken = (low > values + slack) | (high < values - slack)
        assert not broken.any(), [NAMES[i] for i in np.unique(np.nonzero(broken)[1])]
        assert np.isnan(low).sum() > 0.6 * len(NAMES)


@pytest.mark.parametrize("name", one_in(2, LAYERS))
def test_an_unknown_entry_makes_what_it_reaches_unknown(name):
    f = LAYERS[name]

    def g(x):
        return f(jnp.concatenate([1 / x[:, :1], x[:, 1:]], axis=1))

    lower, upper = np.array([[-1.0, 0.5, 0.6, 0.7]]), np.array([[1.0, 0.6, 0.7, 0.8]])
    first = np.array([-1, -1e-2, 1e-2, 1])[:, None]
    points = np.concatenate([first, np.tile([[0.55, 0.65, 0.75]], (4, 1))], axis=1)
    values = in_float64(g)(points)
    for box in _ranges(g, lower, upper):
        low, high = np.asarray(box.lower[0], np.float64), np.asarray(box.upper[0], np.float64)
        assert not ((low - 1e-5 > values) | (high + 1e-5 < values)).any()


@pytest.mark.parametrize(
    ("f", "lower", "upper"),
    [
        (lambda x: 1 / x, -1.0, 1.0),
        (lambda x: 1 / x, 0.0, 1.0),
        (jnp.log, -1.0, 1.0),
        (jnp.sqrt, -1.0, 1.0),
        (lax.rsqrt, 0.0, 1.0),
        (lambda x: x**-2, -1.0, 1.0),
        (lambda x: jnp.power(x, 0.5), -1.0, 1.0),
        (lambda x: jnp.exp(x) - jnp.exp(x), 800.0, 900.0),
        (lambda x: x / x, 0.0, 0.0),
        (lambda x: jax.nn.leaky_relu(x, jnp.nan), -1.0, 1.0),
        (lambda x: jnp.where(x > jnp.nan, 1.0, x), -1.0, 1.0),
    ],
)
def test_undefined_functions_claim_nothing_positive(f, lower, upper):
    for box in _ranges(f, [[lower]], [[upper]]):
        assert not float(box.lower[0, 0]) > -1.0 or not float(box.upper[0, 0]) < 1.0


def test_a_sort_with_companions_is_refused():
    f = lambda x: lax.sort((x, -x), dimension=1)[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="sort"):
        ibp(f)(Box(jnp.zeros((1, 2)), jnp.ones((1, 2))))
    with pytest.raises(NotImplementedError, match="sort"):
        ibp(lambda x: jnp.argsort(x, axis=1).astype(x.dtype))(
            Box(jnp.zeros((1, 2)), jnp.ones((1, 2)))
        )
