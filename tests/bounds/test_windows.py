"""Windows give what the dense pass gives, transposes what JAX's give, minima what scipy's give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import weights
from scipy import optimize

from jaxcert.bounds import convolution, crown, hidden
from jaxcert.bounds.concretise import least
from jaxcert.graph import trace
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall

relu = jax.nn.relu


def conv(x, shape, padding="SAME", strides=None, seed=0, numbers=None, **options):
    strides = strides or (1,) * (len(shape) - 2)
    w = weights(*shape, seed=seed, scale=0.5).astype(x.dtype)
    axes = "HW"[: len(shape) - 2]
    numbers = numbers or (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


def bias(*shape, seed=9):
    return weights(*shape, seed=seed, scale=0.7)


# --- Windows against the dense pass ---------------------------------------------------------------
#
# Each net ends in a feature map, so that the map itself is bounded window by window.


def stride_two(x):
    h = relu(conv(x, (3, 3, 2, 3), strides=(2, 2)) + bias(3))
    return conv(h, (3, 3, 3, 2), ((1, 1), (1, 1)), (2, 1), seed=1)


def uneven_and_negative_padding(x):
    h = relu(conv(x, (3, 3, 2, 3), ((2, 0), (-1, 1))) + bias(3))
    h = conv(h, (2, 2, 3, 2), ((-1, 2), (1, 0)), seed=1)
    return conv(relu(h), (3, 2, 2, 2), ((2, -1), (0, 1)), seed=2)


def padding_after_a_bias(x):
    """No relu between: the rows must not leak back through the padding of the second layer."""
    h = relu(conv(x, (3, 3, 2, 3)) + bias(3))
    h = conv(h, (3, 3, 3, 2), seed=1) + bias(2, seed=8)
    h = conv(h, (3, 3, 2, 2), seed=2) + bias(2, seed=7)
    return conv(h, (3, 3, 2, 2), seed=3)


def a_bias_per_position(x):
    h = relu(conv(x, (3, 3, 2, 3)) + bias(6, 5, 3))
    return conv(h * bias(6, 5, 1), (3, 3, 3, 2), seed=1) + bias(6, 5, 2, seed=8)


def residual_with_strided_shortcut(x):
    h = relu(conv(x, (3, 3, 2, 3)) + bias(3))
    y = conv(h, (3, 3, 3, 4), ((1, 1), (1, 1)), (2, 2), seed=1) + bias(4)
    return conv(y, (2, 2, 4, 2), seed=2) + conv(h, (1, 1, 3, 2), "VALID", (2, 2), seed=3)


def groups_and_dilation(x):
    h = relu(conv(x, (3, 3, 1, 4), feature_group_count=2))
    return conv(h, (2, 3, 2, 2), rhs_dilation=(2, 2), feature_group_count=2, seed=1)


def transposed_convolution(x):
    h = relu(conv(x, (3, 3, 2, 3)))
    h = conv(h, (3, 3, 3, 2), ((2, 2), (2, 2)), lhs_dilation=(2, 2), seed=1)
    return conv(h, (3, 3, 2, 2), "VALID", (3, 3), seed=2)


def max_pool(x):
    h = relu(conv(x, (3, 3, 2, 2)))
    h = nnx.max_pool(conv(h, (3, 3, 2, 2), seed=1), (3, 3), strides=(2, 2), padding="SAME")
    return conv(h, (2, 2, 2, 2), seed=2)


def average_pool(x):
    h = relu(conv(x, (3, 3, 2, 3)) + bias(3))
    h = nnx.avg_pool(h, (2, 2), padding="SAME", count_include_pad=False)
    h = nnx.avg_pool(conv(h, (2, 2, 3, 2), seed=1), (2, 3), strides=(2, 1), padding="SAME")
    return h * bias(2)


def channels_first(x):
    numbers = ("NCHW", "OIHW", "NCHW")
    h = x.transpose(0, 3, 1, 2)
    h = relu(conv(h, (3, 2, 3, 3), numbers=numbers) + bias(3, 1, 1))
    return conv(h, (2, 3, 3, 2), strides=(2, 1), numbers=numbers, seed=1)


def one_dimension(x):
    h = relu(conv(x, (3, 2, 3)) + bias(3))
    return conv(h, (4, 3, 2), ((2, 1),), (2,), seed=1)


def padding_with_a_value(x):
    h = relu(conv(x, (3, 3, 2, 2), "VALID") + bias(2))
    h = jnp.pad(h, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.7)
    h = conv(h, (3, 3, 2, 2), seed=1) + bias(2, seed=8)
    h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-0.4)
    return conv(h, (2, 2, 2, 2), "VALID", seed=2)


def branches(x):
    h = relu(conv(x, (3, 3, 2, 3)) + bias(3))
    wide, narrow = conv(h, (5, 5, 3, 2), seed=1), conv(h, (1, 1, 3, 2), seed=2) + bias(2)
    return conv(relu(jnp.concatenate([wide, h, narrow], -1)), (2, 2, 7, 2), seed=3)


def one_column(x):
    """Only one of the two spatial axes moves: windows if at all, never an error."""
    h = relu(conv(x[:, :, :1], (3, 1, 2, 2), strides=(2, 1)))
    return conv(h, (2, 1, 2, 2), seed=1)


def window_as_large_as_the_map(x):
    h = relu(conv(x, (3, 3, 2, 2), strides=(2, 2)))
    return conv(relu(conv(h, (3, 3, 2, 2), seed=1)), (5, 5, 2, 2), seed=2) + bias(2)


IMAGES = [
    stride_two, uneven_and_negative_padding, padding_after_a_bias, a_bias_per_position,
    residual_with_strided_shortcut, groups_and_dilation, transposed_convolution, max_pool,
    average_pool, channels_first, padding_with_a_value, branches, one_column,
    window_as_large_as_the_map,
]  # fmt: skip
EPS = jnp.array([0.02, 0.3])


def _both(monkeypatch, f, region, outward=False):
    """Bounds by windows and by the dense pass, and how many maps were bounded by windows."""
    used = []
    by_window = hidden.bounds_by_window

    def counted(*args):
        used.append(args[2])
        return by_window(*args)

    monkeypatch.setattr(hidden, "bounds_by_window", counted)

    @jax.jit
    def run(region):
        windows = crown(f, outward=outward)(region)
        count = len(used)
        with monkeypatch.context() as patch:
            patch.setattr(hidden, "geometry", lambda *_: None)
            dense = crown(f, outward=outward)(region)
        assert len(used) == count
        return windows, dense

    return *run(region), len(used)


def _close(a, b):
    size = float(jnp.max(jnp.abs(b.upper - b.lower)))
    assert size > 0.1
    assert np.abs(a.lower - b.lower).max() <= 1e-5 * size
    assert np.abs(a.upper - b.upper).max() <= 1e-5 * size


SLOW = {
    transposed_convolution, branches, groups_and_dilation, one_dimension, channels_first,
    window_as_large_as_the_map,
}  # fmt: skip


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(f, id=f.__name__, marks=pytest.mark.slow if f in SLOW else ())
        for f in [*IMAGES, one_dimension]
    ],
)
def test_windows_give_the_dense_bounds(monkeypatch, f):
    shape = (2, 9, 2) if f is one_dimension else (2, 6, 5, 2)
    x = jnp.asarray(np.random.default_rng(0).uniform(0.2, 0.8, shape), jnp.float32)
    windows, dense, used = _both(monkeypatch, f, LinfBall(x, EPS))
    assert used > 0 or f is one_column
    _close(windows, dense)


@pytest.mark.parametrize("ball", [L2Ball, pytest.param(L1Ball, marks=pytest.mark.slow)])
def test_windows_of_cut_balls(monkeypatch, ball):
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 6, 5, 2)), jnp.float32)
    valid = Box(jnp.zeros(x.shape), 0.9 + 0.1 * x)
    region = ball(jnp.minimum(x, 0.9), 2 * EPS, valid)
    windows, dense, used = _both(monkeypatch, stride_two, region)
    assert used > 1  # without the box of a ball that intervals know, the first layer as well
    _close(windows, dense)


def test_windows_of_a_proof(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 6, 5, 2)), jnp.float32)
    with jax.enable_x64(True):
        x = x.astype(jnp.float64)
        windows, dense, used = _both(monkeypatch, padding_after_a_bias, LinfBall(x, 0.1), True)
        assert used > 0
        assert np.allclose(windows.lower, dense.lower, rtol=1e-10, atol=1e-10)
        assert np.allclose(windows.upper, dense.upper, rtol=1e-10, atol=1e-10)


def test_windows_in_several_chunks(monkeypatch):
    """A cache too small for all positions at once; the last chunk is not full."""
    from jaxcert.bounds import windows as module

    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (2, 6, 5, 2)), jnp.float32)
    monkeypatch.setattr(module, "memory", lambda: 2**14)
    windows, dense, used = _both(monkeypatch, padding_after_a_bias, LinfBall(x, EPS))
    assert used > 0
    _close(windows, dense)


# --- Transposed convolutions ----------------------------------------------------------------------

LAYOUTS = {  # operand shape, kernel shape, padding, strides, dimension numbers
    "plain": ((2, 6, 5, 2), (3, 3, 2, 4), "SAME", (1, 1), ("NHWC", "HWIO", "NHWC")),
    "stride": ((2, 7, 6, 2), (3, 2, 2, 4), "SAME", (2, 3), ("NHWC", "HWIO", "NHWC")),
    "stride over the kernel": (
        (1, 9, 8, 2),
        (2, 1, 2, 3),
        "VALID",
        (4, 3),
        ("NHWC", "HWIO", "NHWC"),
    ),
    "uneven": ((1, 6, 5, 2), (4, 3, 2, 3), ((3, 0), (0, 2)), (2, 2), ("NHWC", "HWIO", "NHWC")),
    "negative": ((1, 8, 7, 2), (3, 3, 2, 3), ((-1, 2), (1, -2)), (2, 1), ("NHWC", "HWIO", "NHWC")),
    "unread edge": ((1, 8, 8, 1), (3, 3, 1, 2), "VALID", (3, 3), ("NHWC", "HWIO", "NHWC")),
    "channels first": ((2, 2, 6, 5), (4, 2, 3, 3), "SAME", (2, 2), ("NCHW", "OIHW", "NCHW")),
    "mixed": ((2, 6, 5, 2), (3, 4, 2, 3), "SAME", (2, 1), ("NHWC", "HOIW", "NCHW")),
    "batch inside": ((6, 2, 5, 2), (3, 3, 2, 4), "SAME", (1, 2), ("HNWC", "HWIO", "HWNC")),
    "one": ((2, 9, 2), (4, 2, 3), ((2, 1),), (3,), ("NHC", "HIO", "NHC")),
    "three": ((1, 4, 5, 4, 2), (2, 3, 2, 2, 3), "SAME", (2, 1, 2), ("NHWDC", "HWDIO", "NHWDC")),
}


@pytest.mark.parametrize("small", [0, 2**30], ids=["convolution", "product"])
def test_transposes_are_those_of_jax(monkeypatch, small):
    monkeypatch.setattr(convolution, "_SMALL", small)
    rng = np.random.default_rng(0)
    cases = {}
    for name, (shape, kernel, padding, strides, numbers) in LAYOUTS.items():
        f = functools.partial(
            lax.conv_general_dilated, window_strides=strides, padding=padding,
            dimension_numbers=numbers, precision="highest",
        )  # fmt: skip
        w = np.float32(rng.normal(size=kernel))
        graph = trace(lambda x, f=f, w=w: f(x, w), jax.ShapeDtypeStruct(shape, jnp.float32))
        (eqn,) = (e for e in graph.equations if e.name == "conv_general_dilated")
        assert convolution.has_fast_transpose(eqn)
        cases[name] = f, eqn, w, np.float32(rng.normal(size=(3, *eqn.outputs[0].shape)))

    @jax.jit
    def both(arrays):
        found = {}
        for name, (w, rows) in arrays.items():
            f, eqn, _, _ = cases[name]
            shape = LAYOUTS[name][0]
            before = [low for low, _ in eqn.params["padding"]]
            ours = convolution.transposed(eqn, w, rows, shape, before)
            struct = jax.ShapeDtypeStruct(shape, jnp.float32)
            transpose = jax.linear_transpose(lambda x, f=f, w=w: f(x, w), struct)
            pairs = [(ours, jax.vmap(transpose)(rows)[0])]

            def squares(rows, w, reverse_only, eqn=eqn, shape=shape, before=before):
                out = convolution.transposed(eqn, w, rows, shape, before, reverse_only)
                return jnp.sum(jnp.square(out))

            gradients = [jax.grad(squares, (0, 1))(rows, w, fast) for fast in (True, False)]
            found[name] = [*pairs, *zip(*gradients, strict=True)]
        return found

    for name, pairs in both({n: (w, rows) for n, (_, _, w, rows) in cases.items()}).items():
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape, name
            assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-4), name


def test_bounds_of_convolutions_have_derivatives_in_forward_mode(monkeypatch):
    monkeypatch.setattr(convolution, "_SMALL", 0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 6, 5, 2)))

        @jax.jit
        def least(eps):
            return crown(padding_after_a_bias)(LinfBall(x, eps)).lower.sum()

        _, slope = jax.jvp(least, (0.1,), (1.0,))
        assert np.isclose(slope, (least(0.1 + 1e-6) - least(0.1 - 1e-6)) / 2e-6, rtol=1e-5)


def test_groups_and_dilations_have_no_fast_transpose():
    x = jax.ShapeDtypeStruct((1, 6, 5, 2), jnp.float32)
    for options in (
        {"feature_group_count": 2}, {"rhs_dilation": (1, 2)}, {"lhs_dilation": (2, 1)},
    ):  # fmt: skip
        features = 1 if "feature_group_count" in options else 2
        graph = trace(
            lambda a, o=options, k=features: conv(a, (2, 2, k, 4), ((0, 1), (1, 0)), **o), x
        )
        (eqn,) = (e for e in graph.equations if e.name == "conv_general_dilated")
        assert not convolution.has_fast_transpose(eqn)


# --- Minima over the input set --------------------------------------------------------------------

B, D = 6, 5


def _sets(ball):
    """Balls cut by boxes: on all sides, on one, not at all, at the centre, and of one point."""
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (B, D))
    low, high = x - rng.uniform(0, 0.4, (B, D)), x + rng.uniform(0, 0.4, (B, D))
    low[1], high[1] = x[1] - 9, x[1] + 9
    low[2] = x[2]
    high[3, 2:] = low[3, 2:] = x[3, 2:]
    eps = np.array([0.3, 0.5, 0.2, 0.7, 0.0, 100.0])
    return ball(jnp.asarray(x), jnp.asarray(eps), Box(jnp.asarray(low), jnp.asarray(high)))


def _rows():
    rows = np.random.default_rng(4).normal(size=(8, B, D))
    rows[0], rows[1] = 0, 1e-6 * rows[1]
    rows[2, :, 1:] = 0
    rows[3] = np.sign(rows[3])  # ties
    rows[4, :, :2] *= 1e4
    return rows


def _feasible_least(region, i, c):
    """The value of c at a point of the set, which is the least one up to a solver's tolerance."""
    x, eps = np.asarray(region.x[i]), float(region.eps[i])
    lo, hi = np.asarray(region.valid.lower[i]) - x, np.asarray(region.valid.upper[i]) - x
    scale = np.abs(c).max() or 1.0
    if region.norm == 1:
        found = optimize.linprog(
            np.concatenate([c, -c]) / scale, np.ones((1, 2 * D)), [eps],
            bounds=[*((0, max(h, 0)) for h in hi), *((0, max(-l, 0)) for l in lo)],
        )  # fmt: skip
        d = found.x[:D] - found.x[D:]
    else:
        radius = max(eps, 1e-9)
        d, best = np.zeros(D), 0.0
        for start in (np.zeros(D), np.clip(-c / scale * radius / np.sqrt(D), lo, hi)):
            found = optimize.minimize(
                lambda d: c @ d / scale, start, jac=lambda d: c / scale, method="SLSQP",
                bounds=list(zip(lo, hi, strict=True)), options={"ftol": 1e-14, "maxiter": 500},
                constraints={"type": "ineq", "fun": lambda d: eps**2 - d @ d,
                             "jac": lambda d: -2 * d},
            )  # fmt: skip
            if c @ found.x < best:
                d, best = found.x, c @ found.x
    d = np.clip(d, lo, hi)
    length = np.linalg.norm(d, region.norm)
    d = d * min(1.0, eps / length) * (1 - 1e-12) if length > 0 else d
    return c @ (x + d)


@pytest.mark.parametrize("ball", [L1Ball, L2Ball])
def test_minima_over_cut_balls_are_those_of_scipy(ball):
    with jax.enable_x64(True):
        region, rows = _sets(ball), _rows()
        proof, plain = jax.jit(
            lambda region, rows: (least(region, rows, True), least(region, rows, False))
        )(region, jnp.asarray(rows))
        proof, plain = np.asarray(proof), np.asarray(plain)
        true = np.array([[_feasible_least(region, i, c[i]) for i in range(B)] for c in rows])
    size = np.abs(rows).sum(2)
    assert (proof <= true).all()
    assert (true - proof <= 1e-4 * size + 1e-12).all(), (true - proof).max()
    assert (np.abs(plain - proof) <= 1e-9 * (1 + size)).all()
    narrow = jax.tree.map(lambda a: jnp.asarray(np.float32(a)), region)
    single = jax.jit(lambda r, c: least(r, c, False))(narrow, jnp.asarray(rows, jnp.float32))
    assert (np.abs(single - true) <= 1e-4 * (size + 1e-6)).all()


def test_minima_over_boxes_are_at_corners():
    region, rows = _sets(LinfBall), _rows()
    x, eps = np.asarray(region.x, np.float64), np.asarray(region.eps, np.float64)[:, None]
    low = np.maximum(x - eps, np.asarray(region.valid.lower, np.float64))
    high = np.minimum(x + eps, np.asarray(region.valid.upper, np.float64))
    true = (np.maximum(rows, 0) * low + np.minimum(rows, 0) * high).sum(2)
    size = np.abs(rows).sum(2)
    for r in (region, Box(jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))):
        found = jax.jit(lambda r: least(r, jnp.asarray(rows, jnp.float32), False))(r)
        assert (np.abs(found - true) <= 1e-6 * size).all()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), region)
        found = np.asarray(jax.jit(lambda r: least(r, jnp.asarray(rows), True))(wide))
        assert (found <= true + 1e-15 * size).all()
        assert (true - found <= 1e-13 * (1 + size)).all()


def test_minima_over_uncut_balls_use_the_dual_norm():
    rows, x = _rows(), np.random.default_rng(5).normal(size=(B, D))
    for ball, dual in ((L2Ball, 2), (L1Ball, np.inf)):
        true = (rows * x).sum(2) - 0.3 * np.linalg.norm(rows, dual, axis=2)
        with jax.enable_x64(True):
            region = ball(jnp.asarray(x), jnp.float64(0.3))
            found = np.asarray(least(region, jnp.asarray(rows), True))
        assert (found <= true + 1e-14 * np.abs(rows).sum(2)).all()
        assert (true - found <= 1e-12 * (1 + np.abs(rows).sum(2))).all()
