"""Certificates from bounds: what they claim holds, and whatever is wrong certifies nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from models import MODELS, dense, weights
from oracles import in_float64, points_of

from jaxcert.bounds import certify, ibp
from jaxcert.certificate import ABSTAIN, Reason, Status
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall
from jaxcert.specs import Spec, margins, proved


@functools.cache
def net():
    return dense(4, 8, 3, seed=1)


def inputs(b=6, d=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(b, d)), jnp.float32)


def scores(x):
    """Logits x_0 and 0: certified at radius x_0 and no further."""
    return jnp.concatenate([x[:, :1], jnp.zeros_like(x[:, :1])], axis=1)


# --- Claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ball", "valid"),
    [
        (LinfBall, Box(0.0, 1.0)), (L2Ball, None),
        pytest.param(L1Ball, Box(0.0, 1.0), marks=pytest.mark.slow),
        pytest.param(LinfBall, None, marks=pytest.mark.slow),
        pytest.param(L2Ball, Box(0.0, 1.0), marks=pytest.mark.slow),
        pytest.param(L1Ball, None, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_no_attack_breaks_a_certificate(ball, valid):
    x = inputs(16)
    eps = jnp.asarray(np.geomspace(1e-4, 0.5, 16), jnp.float32)
    region = ball(x, eps, valid)
    certificate = certify(net(), region)
    radius = np.asarray(certificate.radius)
    assert set(np.unique(radius)) <= {0.0, *np.asarray(eps).tolist()}
    assert 0 < (radius > 0).sum() < 16
    assert certificate.norm == ball.norm
    assert (certificate.within is None) == (valid is None)
    assert (np.asarray(certificate.confidence) == 1).all()
    points = points_of(net(), region, n=64)
    y = in_float64(net())(points.reshape(-1, 4)).reshape(*points.shape[:2], 3)
    assert (np.asarray(certificate.prediction) == np.asarray(net()(x)).argmax(1)).all()
    kept = (y.argmax(-1) == np.asarray(certificate.prediction)).all(0)
    assert kept[radius > 0].all()
    assert not kept.all()


def test_a_box_gives_a_verdict():
    x = inputs()
    small, large = (certify(net(), Box(x - r, x + r)) for r in (1e-4, 2.0))
    assert (small.status == Status.VERIFIED).all()
    assert (small.reason == Reason.NONE).all()
    assert (large.status == Status.UNKNOWN).all()
    assert (large.reason == Reason.LOOSE).all()


def test_margins_must_be_strictly_positive():
    x = jnp.array([[0.5], [0.5], [0.5], [0.0]])
    eps = jnp.array([0.5, 0.49999, 0.50001, 0.0])
    assert certify(scores, LinfBall(x, eps)).radius.tolist() == [0, np.float32(0.49999), 0, 0]
    verdict = certify(scores, Box(jnp.array([[0.0], [1e-6]]), jnp.array([[1.0], [1.0]])))
    assert verdict.status.tolist() == [Status.UNKNOWN, Status.VERIFIED]


def test_ties_are_certified_at_no_radius():
    f = lambda x: jnp.concatenate([x, x, 0 * x], axis=1)  # noqa: E731
    certificate = certify(f, LinfBall(jnp.ones((3, 1)), jnp.array([0.0, 1e-3, 1.0])))
    assert (certificate.radius == 0).all()
    assert (certificate.prediction == 0).all()


def test_an_abstention_as_label_proves_nothing():
    spec = margins(jnp.array([0, ABSTAIN, 3]), 3)
    proof = jax.jit(ibp(net(), outward=True))
    holds = proved(spec, functools.partial(proof, LinfBall(inputs(3), 0.0)))
    assert holds.shape == (3,)
    assert not holds[1:].any()
    assert np.isnan(spec.matrix[1:]).all()


def test_non_finite_logits_abstain():
    f = lambda x: jnp.concatenate([jnp.log(x[:, :1]), x[:, 1:]], axis=1)  # noqa: E731
    x = jnp.array([[-1.0, 5.0], [0.0, 5.0], [1.0, 5.0], [np.finfo(np.float32).max, 3.0]])
    certificate = certify(f, LinfBall(x, 1e-3))
    assert certificate.prediction.tolist() == [ABSTAIN, ABSTAIN, 1, 0]
    assert (certificate.radius > 0).tolist() == [False, False, True, True]
    everything = certify(lambda x: x * jnp.nan, LinfBall(x, 0.1))
    assert (everything.prediction == ABSTAIN).all()
    assert (everything.radius == 0).all()
    verdict = certify(lambda x: x * jnp.inf, Box(x, x))
    assert (verdict.status == Status.UNKNOWN).all()
    assert (verdict.reason == Reason.NUMERICS).all()


def test_nan_weights_and_hidden_poles_certify_nothing():
    def pole(x):  # 1 / x is 10 at the centre, and anything in the ball
        h = 1 / x[:, :1]
        h = jnp.where(h > 0, h, 0.0)
        return jnp.concatenate(
            [jnp.ones_like(h), -jnp.sort(jnp.concatenate([-h, h], 1), 1)], axis=1
        )

    x = jnp.full((2, 1), 0.1)
    assert (certify(pole, LinfBall(x, 0.2)).radius == 0).all()
    broken = dense(4, 8, 3, seed=1)
    broken.layers[0].kernel[...] = broken.layers[0].kernel[...].at[0, 0].set(jnp.nan)
    certificate = certify(broken, LinfBall(inputs(), 0.0))
    assert (certificate.prediction == ABSTAIN).all()
    assert (certificate.radius == 0).all()


def test_huge_inputs_at_radius_zero():
    """At 1e8 a float32 has steps of 8; x + 1 > x over the reals, and float64 sees it."""
    f = lambda x: jnp.concatenate([x + 1, x], axis=1)  # noqa: E731
    x = jnp.full((1, 1), 1e8)
    certificate = certify(f, LinfBall(x, 0.0))
    assert certificate.radius.tolist() == [0.0]  # eps is 0: nothing to report either way
    lower = ibp(f, outward=True)(LinfBall(x, 0.0), margins(jnp.array([0]), 2)).lower
    assert 0 < lower[0, 0] <= 1


def test_float64_inputs_are_taken_whole():
    """x = 1 - 1e-12 rounds to 1 in float32, on the other side of the threshold."""
    f = lambda x: jnp.concatenate([x - 1 + 1e-12 / 2, 0 * x], axis=1)  # noqa: E731
    x = np.array([[1 + 1e-11], [1 - 1e-12], [1.0]])
    certificate = certify(f, LinfBall(x, np.array([1e-12, 1e-13, 1e-13])))
    claimed = np.asarray(certificate.radius) > 0
    margin = x[:, 0] - 1 + 1e-12 / 2
    for i in np.flatnonzero(claimed):
        assert (margin[i] > 0) == (certificate.prediction[i] == 0)
        assert abs(margin[i]) > certificate.radius[i]
    with jax.enable_x64(True):
        whole = certify(f, LinfBall(jnp.asarray(x), jnp.array([1e-12, 1e-13, 1e-13])))
        assert (whole.radius > 0).all()
        assert whole.prediction.tolist() == [0, 1, 0]
        assert whole.radius.dtype == jnp.float64


def test_a_python_radius_is_rounded_up():
    x = jnp.full((1, 1), 0.3)
    certificate = certify(scores, LinfBall(x, 0.1))
    assert np.float64(certificate.radius[0]) >= 0.1
    assert certificate.radius[0] == np.nextafter(np.float32(0.1), np.float32(1)) or (
        np.float64(np.float32(0.1)) >= 0.1
    )


# --- Wrong arguments ------------------------------------------------------------------------------

X = jnp.full((2, 4), 0.5)


@pytest.mark.parametrize(
    ("region", "error", "message"),
    [
        (LinfBall(X, -0.1), ValueError, "eps must be >= 0"),
        (LinfBall(X, jnp.nan), ValueError, "eps must be >= 0"),
        (LinfBall(X, jnp.array([0.1, jnp.nan])), ValueError, "broken in 1 of 2"),
        (LinfBall(X, jnp.ones(3)), ValueError, "one per example"),
        (LinfBall(X * jnp.nan, 0.1), ValueError, "x must be finite"),
        (LinfBall(X / 0, 0.1), ValueError, "x must be finite"),
        (L2Ball(X[0], 0.1), ValueError, r"\[None\]"),
        (L1Ball((X * 255).astype(jnp.uint8), 0.1), TypeError, "astype"),
        (LinfBall(0.5, 0.1), TypeError, "must be an array"),
        (LinfBall(X + 1, 0.1, Box(0.0, 1.0)), ValueError, "outside its valid box"),
        (LinfBall(X, 0.1, (0, 1)), TypeError, "valid must be a Box"),
        (Box(X, X - 1), ValueError, "lower must be <="),
        (Box(X, X * jnp.nan), ValueError, "none NaN"),
        (Box(X, X[:1]), ValueError, "one shape"),
        (X, TypeError, r"LinfBall\(x, eps\)"),
    ],
)
def test_concrete_mistakes_raise(region, error, message):
    with pytest.raises(error, match=message):
        certify(net(), region)
    if not isinstance(region, jax.Array):
        with pytest.raises(error, match=message):
            ibp(net())(region)


def test_traced_mistakes_certify_nothing():
    run = jax.jit(lambda x, eps, low: certify(net(), LinfBall(x, eps, Box(low, 1.0))))
    x = jnp.tile(inputs(1), (5, 1)).at[1, 0].set(jnp.nan).at[2, 0].set(7.0)
    eps = jnp.array([1e-6, 1e-6, 1e-6, -1.0, jnp.nan])
    assert (run(x, eps, 0.0).radius > 0).tolist() == [True, False, False, False, False]
    assert (run(x, eps, jnp.nan).radius == 0).all()
    box = jax.jit(lambda l, u: certify(net(), Box(l, u)).status)
    assert box(X, X - 1).tolist() == [Status.UNKNOWN] * 2
    assert box(X, X * jnp.nan).tolist() == [Status.UNKNOWN] * 2
    for outward in (False, True):
        bounds = jax.jit(lambda l, u, o=outward: ibp(net(), outward=o)(Box(l, u)))
        assert np.isnan(bounds(X, X - 1).lower).all()


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x[:, :1], ValueError, "2 logits"),
        (lambda x: x[:, 0], ValueError, r"\(2, k\)"),
        (lambda x: (x, x), TypeError, "one array"),
        (lambda x: (x > 0).astype(jnp.int32), TypeError, "floating point"),
        (3, TypeError, "callable"),
    ],
)
def test_wrong_models_raise(f, error, message):
    with pytest.raises(error, match=message):
        certify(f, LinfBall(X, 0.1))


def test_wrong_specs_raise():
    with pytest.raises(ValueError, match="matrix must be"):
        ibp(net())(LinfBall(X, 0.1), Spec(jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="matrix must be"):
        ibp(net())(LinfBall(X, 0.1), Spec(jnp.ones((3, 2, 3))))


# --- Transformations ------------------------------------------------------------------------------


def test_jit_vmap_and_map_agree():
    x, eps = inputs(6), jnp.asarray(np.geomspace(1e-3, 0.3, 6), jnp.float32)
    region = LinfBall(x, eps, Box(0.0, 1.0))
    run = functools.partial(certify, net())
    radius = np.asarray(run(region).radius)
    assert 0 < (radius > 0).sum() < 6

    def one(x, e):
        return run(LinfBall(x[None], e[None], Box(0.0, 1.0))).radius[0]

    for batched in (jax.jit(jax.vmap(one)), jax.vmap(jax.jit(one))):
        assert np.array_equal(batched(x, eps), radius)
    assert np.array_equal(jax.jit(run)(region).radius, radius)
    assert np.array_equal(lax.map(lambda a: one(*a), (x, eps)), radius)


@pytest.mark.parametrize("outward", [False, True])
def test_bounds_are_differentiable(outward):
    """Gradients of bounds in the weights and the radius, against finite differences in float64."""
    layers = [
        (weights(4, 6, seed=3), weights(6, seed=4)),
        (weights(6, 3, seed=5), weights(3, seed=6)),
    ]

    def f(layers, x):
        (w1, b1), (w2, b2) = layers
        return jax.nn.softplus(x @ w1 + b1) @ w2 + b2

    @jax.jit
    def loss(layers, eps):
        region = LinfBall(jnp.full((2, 4), 0.5, eps.dtype), eps)
        box = ibp(jax.tree_util.Partial(f, layers), outward=outward)(
            region, margins(jnp.array([0, 1]), 3)
        )
        return jnp.sum(jax.nn.softplus(-box.lower)) + 0.1 * jnp.sum(box.upper)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), layers)
        eps = jnp.float64(0.1)
        slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(wide, eps)
        flat, build = jax.flatten_util.ravel_pytree((wide, eps))
        slope = np.asarray(jax.flatten_util.ravel_pytree(slopes)[0])
        direction = np.random.default_rng(0).normal(size=(8, flat.size))
        for d in direction:
            h = 1e-6
            ends = [float(loss(*build(flat + s * h * d))) for s in (1, -1)]
            assert np.isclose((ends[0] - ends[1]) / (2 * h), slope @ d, rtol=1e-5, atol=1e-7)


def test_gradients_are_finite_where_bounds_touch_kinks():
    def f(w, x):
        h = jax.nn.relu(x * w)
        h = jnp.concatenate([h, jax.nn.leaky_relu(h - h), jax.nn.elu(0 * h), jnp.abs(h)], axis=1)
        return jax.nn.softmax(jnp.sqrt(1 + h**2), axis=1)

    for outward in (False, True):
        slope = jax.jit(jax.grad(
            lambda w, o=outward: ibp(jax.tree_util.Partial(f, w), outward=o)(
                LinfBall(jnp.zeros((1, 2)), 0.0)
            ).lower.sum()
        ))(jnp.ones(2))  # fmt: skip
        assert np.isfinite(slope).all()


# --- Ways of passing models and methods -----------------------------------------------------------


def test_methods_and_models_of_every_kind():
    x = inputs()
    region = LinfBall(x, 1e-3)
    expected = np.asarray(certify(net(), region).radius)
    call = lambda m, x: m(x)  # noqa: E731
    for f in (
        lambda x: net()(x),
        functools.partial(call, net()),
        jax.tree_util.Partial(call, net()),
        jax.jit(lambda x: net()(x)),
    ):
        assert np.array_equal(certify(f, region).radius, expected)
    assert np.array_equal(certify(net(), region, method=functools.partial(ibp)).radius, expected)
    for name in ("scanned_linen", "rematted_nnx"):
        f, shape = MODELS[name]()
        x = jnp.full((1, *shape), 0.5)
        certificate = certify(f, LinfBall(x, 1e-6))
        assert certificate.prediction[0] == jnp.argmax(f(x)[0])
        assert certificate.radius[0] > 0


def test_a_second_net_of_the_same_shapes_compiles_nothing():
    """A module is not even traced; a function is, to see that what it closes over is the same."""
    traces = []

    class Counted(nnx.Module):
        def __init__(self, seed):
            self.inner = nnx.Linear(4, 3, rngs=nnx.Rngs(seed))

        def __call__(self, x):
            traces.append(x.shape)
            return self.inner(x)

    def apply(w, x):
        traces.append(x.shape)
        return x @ w

    pairs = [
        [Counted(0), Counted(1)],
        [jax.tree_util.Partial(apply, weights(4, 3, seed=s)) for s in (1, 2)],
        [functools.partial(apply, weights(4, 3, seed=s)) for s in (3, 4)],
    ]
    for one, other in pairs:
        calls = 0 if isinstance(one, nnx.Module) else 1
        region = LinfBall(inputs(), 1e-3)
        first = certify(one, region)
        before = len(traces)
        again = certify(one, region)
        assert np.array_equal(first.radius, again.radius)
        second = certify(other, LinfBall(inputs(seed=5), jnp.full(6, 1e-3)[0]))
        assert len(traces) == before + 2 * calls
        x = inputs(seed=5)
        assert np.array_equal(second.prediction, jnp.argmax(other(x), axis=1))


def test_the_users_module_is_left_as_it_was():
    model, shape = MODELS["rematted_nnx"]()
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    region = LinfBall(jnp.full((1, *shape), 0.5), 1e-3)
    certify(model, region)
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
