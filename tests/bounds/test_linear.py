"""Linear bounds against published bounds, a textbook CROWN, linear programs and exact rationals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import weights
from oracles import corners, exact
from reference_nets import load
from test_tightness import LAYERS
from textbook import crown_of_mlp, triangle_lp

from jaxcert.bounds import (
    LinearBounds,
    alpha_crown,
    certify,
    crown,
    crown_ibp,
    forward_linear,
    hidden_bounds,
    ibp,
    linear_bounds,
    register,
)
from jaxcert.errors import UnsupportedEquation
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall
from jaxcert.specs import Spec

SIZES = (3, 6, 6, 2)


def layers():
    """A small ReLU MLP as [(w, b), ...], float32 numbers."""
    rng = np.random.default_rng(20)
    pairs = itertools.pairwise(SIZES)
    return [
        (np.float32(rng.normal(size=(a, b))), np.float32(0.4 * rng.normal(size=b)))
        for a, b in pairs
    ]


def mlp(layers, x):
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def net():
    return jax.tree_util.Partial(mlp, layers())


def inputs(b=4, d=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, size=(b, d)).astype(np.float32)


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)


ROWS = np.concatenate([np.eye(2), [[1.0, -1.0], [-0.5, 2.0]]])  # a spec of the two outputs


# --- Against others -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_s", "cnn28"])
def test_the_published_implementation_gives_the_same_bounds(data, name):
    """auto_LiRPA 0.7 in float32, two examples."""
    saved, f, x, eps = load(data, name)
    region = LinfBall(x[:2], eps)
    methods = {"IBP": ibp, "CROWN-IBP": crown_ibp, "CROWN": crown}

    @jax.jit
    def bounds(f, region):
        return f(region.x), {key: method(f)(region) for key, method in methods.items()}

    y, found = bounds(f, region)
    assert np.allclose(y, saved["y"][:2], atol=1e-4)
    for key, box in found.items():
        lower, upper = (saved[f"b16/{key}/{end}"][:2] for end in ("lb", "ub"))
        error = np.maximum(np.abs(box.lower - lower), np.abs(box.upper - upper))
        assert (error <= 1e-4 * (upper - lower)).all(), (key, (error / (upper - lower)).max())


def _boxes(b=4):
    x = inputs(b).astype(np.float64)
    eps = np.array([0.0, 0.05, 0.3, 1.0])[:, None]
    return x - eps, x + eps


def test_a_textbook_crown_gives_the_same_bounds():
    lower, upper = _boxes()
    with jax.enable_x64(True):
        spec = Spec(jnp.asarray(ROWS), jnp.asarray(0.5))
        run = jax.jit(lambda f, box: [
            crown(f)(box, spec), crown(f, outward=True)(box, spec), ibp(f)(box, spec)
        ])  # fmt: skip
        boxes = run(wide(net()), Box(jnp.asarray(lower), jnp.asarray(upper)))
        fast, proof, known = jax.tree.map(np.asarray, boxes)
    for i in range(len(lower)):
        low, high, _ = crown_of_mlp(layers(), lower[i], upper[i], ROWS)
        low, high = np.fmax(low, known.lower[i] - 0.5), np.fmin(high, known.upper[i] - 0.5)
        width = high - low
        for box in (fast, proof):
            assert np.allclose(box.lower[i] - 0.5, low, rtol=1e-9, atol=1e-9)
            assert np.allclose(box.upper[i] - 0.5, high, rtol=1e-9, atol=1e-9)
        assert (proof.upper[i] - proof.lower[i] <= width * (1 + 1e-8) + 1e-12).all()


def test_linear_programs_are_between_alpha_crown_and_the_truth():
    """The triangle relaxation with the same hidden bounds is the best of all slopes together."""
    lower, upper = _boxes()
    with jax.enable_x64(True):
        box = Box(jnp.asarray(lower), jnp.asarray(upper))
        spec = Spec(jnp.asarray(ROWS))

        @jax.jit
        def bounds(f):
            return crown(f)(box, spec), alpha_crown(f, steps=60, outward=True)(box, spec)

        plain, best = (np.asarray(b.lower) for b in bounds(wide(net())))
    gap, closed = 0.0, 0.0
    for i in range(1, len(lower)):
        _, _, hidden = crown_of_mlp(layers(), lower[i], upper[i], ROWS)
        for j, row in enumerate(ROWS):
            least = triangle_lp(layers(), lower[i], upper[i], hidden, row)
            assert plain[i, j] <= best[i, j] + 1e-9
            assert best[i, j] <= least + 1e-6
            gap, closed = gap + least - plain[i, j], closed + best[i, j] - plain[i, j]
    assert gap > 0.1  # there is something to gain
    assert closed > 0.9 * gap


# --- What the affine functions are ----------------------------------------------------------------


def test_linear_bounds_hold_at_points_and_give_the_bounds():
    x = inputs()
    region = LinfBall(jnp.asarray(x), jnp.array([0.0, 0.05, 0.3, 1.0]))
    spec = Spec(jnp.asarray(ROWS, jnp.float32), 0.5)

    @jax.jit
    def run(f, region):
        found = {h.__name__: linear_bounds(f, hidden=h)(region, spec) for h in (crown, crown_ibp)}
        boxes = {h.__name__: h(f)(region, spec) for h in (crown, crown_ibp)}
        return found, boxes, ibp(f)(region, spec)

    found, boxes, known = run(net(), region)
    shift = np.random.default_rng(1).uniform(-1, 1, size=(400, 4, 3))
    points = x + shift * np.asarray(region.eps)[:, None]
    y = np.einsum("sk,mbk->mbs", ROWS, _evaluate(points)) + 0.5
    for name, planes in found.items():
        assert isinstance(planes, LinearBounds)
        assert planes.lower_matrix.shape == (4, 4, 3)
        low = np.einsum("bsd,mbd->mbs", planes.lower_matrix, points) + planes.lower_offset
        high = np.einsum("bsd,mbd->mbs", planes.upper_matrix, points) + planes.upper_offset
        assert (low <= y + 1e-5).all()
        assert (y <= high + 1e-5).all()
        eps = np.asarray(region.eps)[:, None]
        at = np.einsum("bsd,bd->bs", planes.lower_matrix, x)
        least = at - eps * np.abs(planes.lower_matrix).sum(2) + planes.lower_offset
        at = np.einsum("bsd,bd->bs", planes.upper_matrix, x)
        most = at + eps * np.abs(planes.upper_matrix).sum(2) + planes.upper_offset
        least, most = np.fmax(least, known.lower), np.fmin(most, known.upper)
        assert np.allclose(least, boxes[name].lower, rtol=1e-4, atol=1e-5)
        assert np.allclose(most, boxes[name].upper, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found["crown"].lower_offset, found["crown_ibp"].lower_offset)


def _evaluate(points):
    """The MLP in float64 numpy, on any leading axes."""
    h = np.asarray(points, np.float64)
    for i, (w, b) in enumerate(layers()):
        h = h @ w.astype(np.float64) + b
        h = np.maximum(h, 0) if i < len(SIZES) - 2 else h
    return h


def _exact_value(x):
    """The MLP at an array of rationals, in rationals."""
    h = x
    for i, (w, b) in enumerate(layers()):
        h = h @ exact(w) + exact(b)
        h = np.where(h > 0, h, 0) if i < len(SIZES) - 2 else h
    return h


def _exact_points(x, eps, n=4):
    """Rational points (n, b, d) of the boxes around x: centre, two corners, one inside."""
    signs = np.random.default_rng(2).choice([-1, 1], size=(n, *x.shape))
    signs[0] = 0
    points = exact(x) + exact(signs) * exact(eps)[:, None]
    points[-1] = (points[-1] + 2 * exact(x)) / 3
    return points


def test_proved_affine_functions_hold_in_rationals():
    x, eps = inputs().astype(np.float64), np.array([0.0, 1e-7, 0.05, 1.0])
    with jax.enable_x64(True):
        region = LinfBall(jnp.asarray(x), jnp.asarray(eps))
        found = jax.jit(linear_bounds(net(), outward=True))(region)
        found = jax.tree.map(exact, found)
    for point in _exact_points(x, eps):
        y = _exact_value(point)
        low = (found.lower_matrix * point[:, None]).sum(2) + found.lower_offset
        high = (found.upper_matrix * point[:, None]).sum(2) + found.upper_offset
        assert (low <= y).all()
        assert (y <= high).all()


def test_planes_of_every_layer_hold_at_points():
    """The affine functions around each operation of the tightness table, at corners and inside."""
    rng = np.random.default_rng(0)
    radius = rng.uniform(0, 1, size=(5, 4)) * np.array([1, 1e-3, 0, 3, 0.1])[:, None]
    centre = rng.normal(size=(5, 4))
    lower, upper = centre - radius, centre + radius
    points = lower + (upper - lower) * rng.uniform(size=(100, 5, 4))
    points = np.concatenate([corners(lower, upper), points])
    skipped = {"min pooling", "reduce_window_min"}  # intervals only
    layers = {name: f for name, f in LAYERS.items() if name not in skipped}
    with jax.enable_x64(True):
        box = Box(jnp.asarray(lower), jnp.asarray(upper))

        @jax.jit
        def run(box, points):
            planes = {n: linear_bounds(f, hidden=crown_ibp)(box) for n, f in layers.items()}
            return planes, {n: jax.vmap(f)(points) for n, f in layers.items()}

        found, values = jax.tree.map(np.asarray, run(box, jnp.asarray(points)))
    for name, planes in found.items():
        y = values[name].reshape(*points.shape[:2], -1)
        low = np.einsum("bsd,mbd->mbs", planes.lower_matrix, points) + planes.lower_offset
        high = np.einsum("bsd,mbd->mbs", planes.upper_matrix, points) + planes.upper_offset
        assert (low <= y + 1e-9 * (1 + np.abs(y))).all(), name
        assert (y - 1e-9 * (1 + np.abs(y)) <= high).all(), name


# --- Proofs ---------------------------------------------------------------------------------------


METHODS = {
    "crown": crown,
    "crown_ibp": crown_ibp,
    "alpha_crown": functools.partial(alpha_crown, steps=2),
    "forward_linear": forward_linear,
}


@pytest.mark.parametrize(
    ("name", "ball"),
    [
        ("crown", LinfBall),
        ("alpha_crown", LinfBall),
        ("crown_ibp", L2Ball),
        *(
            pytest.param(n, LinfBall, marks=pytest.mark.slow)
            for n in ("crown_ibp", "forward_linear")
        ),
    ],
)
def test_proofs_hold_in_rationals_and_cost_almost_nothing(name, ball):
    """At eps = 0 and 1e-7, where rounding is as large as anything else, and where it is not."""
    x, eps = inputs().astype(np.float64), np.array([0.0, 1e-7, 1e-3, 0.5])
    method = METHODS[name]
    with jax.enable_x64(True):
        region = ball(jnp.asarray(x), jnp.asarray(eps))
        run = jax.jit(lambda f, region: (method(f, outward=True)(region), method(f)(region)))
        proof, plain = run(wide(net()), region)
        low, high = exact(proof.lower), exact(proof.upper)
    # of an L2 ball, the part in which every entry moves by at most eps / 2 < eps / sqrt(3)
    for point in _exact_points(x, eps if ball is LinfBall else eps / 2):
        y = _exact_value(point)
        assert (low <= y).all()
        assert (y <= high).all()
    width = np.asarray(plain.upper - plain.lower)
    excess = np.asarray(proof.upper - proof.lower) - width
    assert (excess[2:] <= 1e-8 * width[2:]).all(), (excess / width)[2:].max()
    assert (excess <= 1e-10).all()


# --- Relations between bounds ---------------------------------------------------------------------


def test_each_method_is_within_the_cheaper_ones():
    """Without a spec."""
    methods = {"ibp": ibp, "crown_ibp": crown_ibp, "crown": crown, "forward": forward_linear}
    region = LinfBall(jnp.asarray(inputs(5)), jnp.array([0.0, 0.01, 0.1, 0.5, 2.0]))
    boxes = jax.jit(lambda r: {name: m(net())(r) for name, m in methods.items()})(region)

    def within(a, b):
        inside = boxes[a].lower >= boxes[b].lower - 1e-5
        return (inside & (boxes[a].upper <= boxes[b].upper + 1e-5)).all()

    assert within("crown_ibp", "ibp")
    assert within("crown", "ibp")
    assert within("forward", "ibp")
    total = {name: float((box.upper - box.lower)[1:4].sum()) for name, box in boxes.items()}
    assert total["crown"] < 0.99 * total["crown_ibp"] < 0.8 * total["ibp"]
    assert total["forward"] < 0.9 * total["ibp"]


def test_hidden_bounds_are_used_again():
    """Those of the region give its bounds, those of a larger one sound and looser ones; `unsure`
    entries alone are bounded linearly, the others need not be."""
    f, x, eps = net(), jnp.asarray(inputs()), jnp.array([0.0, 0.05, 0.3, 1.0])

    @jax.jit
    def run(region, larger):
        return {
            "crown": crown(f)(region),
            "again": crown_ibp(f, hidden=hidden_bounds(f)(region))(region),
            "larger": crown_ibp(f, hidden=hidden_bounds(f)(larger))(region),
            "all": crown(f, unsure=6)(region),
            "none": crown(f, unsure=1)(region),
        }

    boxes = run(LinfBall(x, eps), LinfBall(x, 2 * eps))
    assert [box.lower.shape for box in jax.eval_shape(hidden_bounds(f), LinfBall(x, eps))] == [
        (4, 6)
    ]
    ends = {name: np.stack([box.lower, -box.upper]) for name, box in boxes.items()}
    points = np.asarray(x) + np.random.default_rng(1).uniform(-1, 1, (400, 4, 3)) * eps[:, None]
    y = _evaluate(points)
    for name, end in ends.items():
        assert (end <= np.stack([y.min(0), -y.max(0)]) + 1e-5).all(), name
    assert np.allclose(ends["again"], ends["crown"], atol=1e-5)
    assert np.allclose(ends["all"], ends["crown"], atol=1e-5)
    assert (ends["larger"] <= ends["crown"] + 1e-5).all()
    assert ends["larger"].sum() < ends["crown"].sum() - 0.01
    assert ends["none"].sum() < ends["crown"].sum() - 0.01


def test_affine_models_have_exact_bounds():
    """Where intervals lose the sign of what two layers multiply to."""
    w1, w2 = np.asarray(weights(3, 8, seed=1)), np.asarray(weights(8, 2, seed=2))
    f = lambda x: (x[:, ::-1] @ w1 + 0.3) @ w2 - x[:, :2]  # noqa: E731
    x = inputs()
    matrix = (w1 @ w2)[::-1] - np.eye(3)[:, :2]
    value = x.astype(np.float64) @ matrix + 0.3 * w2.sum(0)
    for ball, dual in ((LinfBall, 1), (L2Ball, 2), (L1Ball, np.inf)):
        region = ball(jnp.asarray(x), 0.25)
        reach = 0.25 * np.linalg.norm(matrix, dual, axis=0)
        methods = (crown, crown_ibp, forward_linear) if ball is LinfBall else (forward_linear,)
        for box in jax.jit(lambda r, methods=methods: [m(f)(r) for m in methods])(region):
            assert np.allclose(box.lower, value - reach, atol=2e-5)
            assert np.allclose(box.upper, value + reach, atol=2e-5)
        loose = ibp(f)(LinfBall(jnp.asarray(x), 0.25))
        assert (np.asarray(loose.upper - loose.lower) > 1.2 * 2 * reach).all()


@pytest.mark.parametrize("method", [crown, pytest.param(forward_linear, marks=pytest.mark.slow)])
def test_a_broken_example_does_not_touch_the_others(method):
    """A NaN, or an example with huge activations, next to one that is fine."""
    x = jnp.tile(jnp.asarray(inputs(1)), (3, 1))
    broken = x.at[1, 0].set(jnp.nan).at[2, 0].set(1e30)
    spec = Spec(jnp.asarray(ROWS, jnp.float32))
    run = jax.jit(lambda x: [method(net(), outward=o)(LinfBall(x, 0.3), spec) for o in (0, 1)])
    for whole, beside in zip(run(x), run(broken), strict=True):
        assert np.isnan(beside.lower[1]).all()
        assert np.allclose(beside.lower[0], whole.lower[0], rtol=1e-6)
        assert np.allclose(beside.upper[0], whole.upper[0], rtol=1e-6)


def test_chunks_batches_and_vmap_change_nothing():
    x, eps = jnp.asarray(inputs(5)), jnp.array([0.0, 0.01, 0.1, 0.5, 2.0])
    f = net()

    def one(x, e):
        return jax.tree.map(lambda a: a[0], crown(f)(LinfBall(x[None], e[None])))

    @jax.jit
    def run(x, eps):
        region = LinfBall(x, eps)
        return crown(f)(region), [crown(f, chunk=4)(region), jax.vmap(one)(x, eps)]

    whole, others = run(x, eps)
    alone = [jax.jit(one)(*each) for each in zip(x, eps, strict=True)]
    others.append(jax.tree.map(lambda *ends: jnp.stack(ends), *alone))
    assert len(others) == 3
    for box in others:
        assert np.allclose(box.lower, whole.lower, rtol=1e-5, atol=1e-5)
        assert np.allclose(box.upper, whole.upper, rtol=1e-5, atol=1e-5)


def test_weights_as_arguments_and_a_second_net():
    """One compiled program for all weights, in the user's jit and in `certify`."""
    traces = []

    def apply(layers, x):
        traces.append(x.shape)
        return mlp(layers, x)

    other = jax.tree.map(lambda a: np.float32(a * 0.5), layers())
    region = LinfBall(jnp.asarray(inputs()), 0.02)
    run = jax.jit(lambda layers, r: crown(functools.partial(apply, layers))(r))
    first = run(layers(), region)
    before = len(traces)
    second = run(other, region)
    assert len(traces) == before
    assert not np.allclose(first.lower, second.lower)
    exact_centre = _evaluate(np.asarray(region.x))
    assert not (first.lower > exact_centre).any()

    nets = [jax.tree_util.Partial(apply, w) for w in (layers(), other)]
    certify(nets[0], region, method=crown)
    before = len(traces)
    certify(nets[0], region, method=crown)
    per_call = len(traces) - before  # shape checks only
    certificate = certify(nets[1], region, method=crown)
    assert len(traces) - before == 2 * per_call <= 2
    assert (certificate.prediction == jnp.argmax(nets[1](region.x), axis=1)).all()
    assert (certificate.radius > 0).any()


# --- Gradients ------------------------------------------------------------------------------------


def _tanh_net(w, x):
    return jnp.tanh(x @ w[0][0] + w[0][1]) @ w[1][0][:, :2]


def _conv_net(w, x):
    """(b, 3) as a row of three pixels; both kernels are 1 x 3."""
    numbers = ("NHWC", "HWIO", "NHWC")
    kernels = w[0][0].reshape(1, 3, 1, 6), w[1][0][:, :3].reshape(1, 3, 6, 1)
    x = x.reshape(-1, 1, 3, 1)
    x = jax.nn.relu(
        lax.conv_general_dilated(x, kernels[0], (1, 1), "SAME", dimension_numbers=numbers)
    )
    x = lax.conv_general_dilated(x, kernels[1], (1, 2), "SAME", dimension_numbers=numbers)
    return jax.nn.relu(x).reshape(-1, 2) + w[2][1]


@pytest.mark.parametrize(
    ("f", "method"),
    [
        pytest.param(mlp, crown_ibp, marks=pytest.mark.slow),
        (mlp, crown),
        pytest.param(_tanh_net, crown_ibp, marks=pytest.mark.slow),
        (_conv_net, crown),
    ],
)
def test_gradients_are_those_of_finite_differences(f, method):
    with jax.enable_x64(True):
        x, eps = jnp.asarray(inputs(2).astype(np.float64)), jnp.asarray([0.05, 0.4])

        def loss(w, eps):
            box = method(jax.tree_util.Partial(f, w))(LinfBall(x, eps))
            return jnp.sum(jax.nn.softplus(-box.lower)) + 0.3 * jnp.sum(box.upper**2)

        run = jax.jit(jax.value_and_grad(loss, (0, 1)))
        flat, build = jax.flatten_util.ravel_pytree((wide(layers()), eps))
        slope = np.asarray(jax.flatten_util.ravel_pytree(run(*build(flat))[1])[0])
        assert np.abs(slope).max() > 0.1
        for d in np.random.default_rng(0).normal(size=(6, flat.size)):
            ends = [float(run(*build(flat + s * 1e-6 * d))[0]) for s in (1, -1)]
            assert np.isclose((ends[0] - ends[1]) / 2e-6, slope @ d, rtol=1e-4, atol=1e-6)


# --- Mistakes -------------------------------------------------------------------------------------

REGION = LinfBall(jnp.full((2, 3), 0.5), 0.1)


def test_hidden_must_be_one_of_the_methods():
    for hidden in (forward_linear, lambda f: ibp(f), "crown", [1]):
        for transform in (alpha_crown, linear_bounds):
            with pytest.raises(ValueError, match="crown, crown_ibp and ibp, or boxes"):
                transform(net(), hidden=hidden)
    box = Box(jnp.zeros((2, 5)), jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"hidden value 0 has shape \(2, 6\)"):
        crown_ibp(net(), hidden=[box])(REGION)


LINEAR = [crown, crown_ibp, alpha_crown, forward_linear, linear_bounds]


@pytest.mark.parametrize("method", LINEAR)
def test_what_cannot_be_bounded_raises(method):
    with pytest.raises(UnsupportedEquation, match="lgamma"):
        method(jax.lax.lgamma)(REGION)
    with pytest.raises(ValueError, match="output"):
        method(lambda x: jax.nn.relu(x)[:, :, None])(REGION, Spec(jnp.eye(3)))


def test_equations_with_an_interval_rule_only_are_named():
    register("lgamma", lambda eqn, values, outward: values[0])
    assert ibp(jax.lax.lgamma)(REGION).lower.shape == (2, 3)
    for method in LINEAR:
        with pytest.raises(UnsupportedEquation, match=r"linear bound propagation .* 'lgamma'"):
            method(jax.lax.lgamma)(REGION)


def test_constant_models_have_no_linear_bounds_but_a_value():
    f = lambda x: jnp.full((x.shape[0], 2), 3.0)  # noqa: E731
    for method in LINEAR[:-1]:
        box = method(f)(REGION)
        assert (np.asarray([box.lower, box.upper]) == 3).all()
    with pytest.raises(ValueError, match="does not depend on its input"):
        linear_bounds(f)(REGION)
