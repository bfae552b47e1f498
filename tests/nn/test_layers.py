"""Layers of jaxcert.nn: proved constants above exact norms, whatever the weights; freezing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from thinned import one_in

from jaxcert import bounds, lipschitz, nn
from jaxcert.errors import MixedRows
from jaxcert.sets import LinfBall

RNGS = nnx.Rngs(0)
IMAGE, VECTOR = (5, 6, 4), (8,)
CONV = functools.partial(nn.AOLConv, 4, 6, (3, 3), rngs=RNGS)

LINEAR = {
    "SpectralDense": (lambda: nn.SpectralDense(8, 5, rngs=RNGS), VECTOR),
    "BjorckDense": (lambda: nn.BjorckDense(8, 5, rngs=RNGS), VECTOR),
    "BjorckDense, one step": (lambda: nn.BjorckDense(8, 5, steps=1, rngs=RNGS), VECTOR),
    "CayleyDense": (lambda: nn.CayleyDense(8, 10, rngs=RNGS), VECTOR),
    "AOLDense": (lambda: nn.AOLDense(8, 5, rngs=RNGS), VECTOR),
    "BRODense": (lambda: nn.BRODense(8, 5, rngs=RNGS), VECTOR),
    "AOLConv": (CONV, IMAGE),
    "AOLConv, many channels": (lambda: nn.AOLConv(4, 20, (3, 2), 2, rngs=RNGS), IMAGE),
    "AOLConv, circular": (lambda: CONV(padding="CIRCULAR"), IMAGE),
    "AOLConv, groups": (lambda: CONV(feature_group_count=2), IMAGE),
    "AOLConv, dilation": (lambda: CONV(kernel_dilation=2, padding="VALID"), (7, 7, 4)),
    "AOLConvTranspose": (lambda: nn.AOLConvTranspose(4, 3, (3, 3), 2, rngs=RNGS), IMAGE),
    "SpectralConv": (lambda: nn.SpectralConv(4, 6, (3, 3), (1, 2), rngs=RNGS), IMAGE),
    "BjorckConv": (lambda: nn.BjorckConv(4, 6, (3, 3), 2, rngs=RNGS), IMAGE),
    "AOCConv": (lambda: nn.AOCConv(4, 6, (3, 2), rngs=RNGS), IMAGE),
    "AOCConv, stride": (lambda: nn.AOCConv(4, 6, (3, 3), 2, rngs=RNGS), IMAGE),
    "CayleyConv": (lambda: nn.CayleyConv(4, 6, (3, 3), rngs=RNGS), IMAGE),
    "BROConv": (lambda: nn.BROConv(4, (3, 3), rngs=RNGS), IMAGE),
}
NONLINEAR = {
    "SLLBlock, dense": (lambda: nn.SLLBlock(8, hidden=11, rngs=RNGS), VECTOR),
    "SLLBlock": (lambda: nn.SLLBlock(4, (3, 2), hidden=5, rngs=RNGS), IMAGE),
    "SLLBlock, circular": (lambda: nn.SLLBlock(4, (3, 3), padding="CIRCULAR", rngs=RNGS), IMAGE),
    "CPLBlock": (lambda: nn.CPLBlock(4, (3, 3), rngs=RNGS), IMAGE),
    "SandwichDense": (lambda: nn.SandwichDense(8, 5, hidden=12, rngs=RNGS), VECTOR),
    "Householder": (lambda: nn.Householder(8), VECTOR),
    "Residual": (lambda: nn.Residual(nn.BjorckDense(8, 8, rngs=RNGS)), VECTOR),
}


def regimes(model):
    """The model as it starts, and with random, large positive, tiny and equal weights."""
    rng = np.random.default_rng(0)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    draws = (
        lambda p: rng.normal(size=p.shape),
        lambda p: 5 * np.abs(rng.normal(size=p.shape)),
        lambda p: 1e-5 * rng.normal(size=p.shape),
        lambda p: np.full(p.shape, 0.7),
    )
    yield model
    for draw in draws:
        drawn = jax.tree.map(lambda p, draw=draw: jnp.asarray(draw(p), p.dtype), params)
        yield nnx.merge(graph, drawn, rest)


@jax.jit
def matrix_of(model, like):
    """The linear part of a layer, one row per input."""
    basis = jnp.eye(like.size).reshape(like.size, *like.shape)
    return jax.jvp(model, (jnp.zeros_like(basis),), (basis,))[1].reshape(like.size, -1)


@jax.jit
def jacobian(model, x):
    return jax.jacobian(lambda z: model(z[None]).ravel())(x)


def largest(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64).reshape(len(matrix), -1), 2)


SLOW = pytest.mark.slow
VARIANTS = {
    "BjorckDense, one step", "AOLConv, many channels", "AOLConv, groups", "AOLConv, dilation",
    "AOCConv, stride", "SpectralConv", "BjorckConv", "AOLConvTranspose", "SLLBlock, dense",
    "CayleyDense", "AOLConv, circular", "BROConv", "AOCConv", "BRODense",
    "SLLBlock, circular", "CPLBlock",
}  # fmt: skip


def most_often(names):
    return [pytest.param(name, marks=SLOW if name in VARIANTS else ()) for name in names]


@pytest.mark.parametrize("name", most_often(LINEAR))
def test_the_constant_of_a_linear_layer_is_above_its_norm_and_at_most_one(name):
    build, shape = LINEAR[name]
    for model in regimes(build()):
        constant = float(lipschitz.constant(model, shape))
        assert largest(matrix_of(model, jnp.zeros(shape))) <= constant <= 1.001


@pytest.mark.parametrize("name", most_often(NONLINEAR))
def test_the_constant_of_a_block_is_above_its_jacobians_and_at_most_one(name):
    build, shape = NONLINEAR[name]
    points = 2 * jax.random.normal(jax.random.key(0), (2, *shape))
    for model in regimes(build()):
        constant = float(lipschitz.constant(model, shape))
        steepest = max(largest(jacobian(model, x)) for x in points)
        assert steepest <= constant <= 1.001


def test_no_layer_that_starts_with_orthogonal_weights_loses_much():
    for layer in (
        nn.BjorckDense(8, 5, rngs=RNGS),
        nn.AOLDense(8, 5, rngs=RNGS),
        nn.AOLConv(4, 12, (3, 3), 2, rngs=RNGS),
        nn.BjorckConv(4, 12, (2, 2), 2, rngs=RNGS),
    ):
        shape = VECTOR if isinstance(layer.free, nnx.Linear) else (6, 6, 4)
        matrix = matrix_of(layer, jnp.zeros(shape))
        values = np.linalg.svd(matrix, compute_uv=False)
        assert abs(values[0] - 1) < 1e-5
        assert np.sum(values > 0.999) >= 0.7 * min(matrix.shape)


def test_retraction_keeps_the_layer_and_makes_its_free_kernel_orthogonal():
    net = nnx.Sequential(nn.BjorckDense(8, 6, steps=1, rngs=RNGS), nn.maxmin)
    net.layers[0].free.kernel[...] *= 1 + 0.1 * jax.random.normal(jax.random.key(0), (8, 6))
    before = net.layers[0].kernel()
    nn.retract(net)
    np.testing.assert_allclose(net.layers[0].free.kernel[...], before)
    for _ in range(4):
        nn.retract(net)
    gram = before.T @ net.layers[0].free.kernel[...]
    np.testing.assert_allclose(np.linalg.svd(net.layers[0].free.kernel[...])[1], 1, atol=1e-5)
    assert np.all(np.diag(gram) > 0.9)


# --- activations and pooling ----------------------------------------------------------------------


def test_activations_do_what_they_say():
    x = jnp.array([[3.0, -1.0, 2.0, -4.0]])
    assert nn.maxmin(x).tolist() == [[3.0, -1.0, 2.0, -4.0]]
    assert nn.maxmin(-x).tolist() == [[-2.0, 4.0, -3.0, 1.0]]
    assert nn.group_sort(x, 2).tolist() == [[-1.0, 3.0, -4.0, 2.0]]
    assert nn.beta_abs(-x).tolist() == [[3.0, 1.0, -2.0, 4.0]]
    np.testing.assert_allclose(nn.Householder(4)(-x), nn.maxmin(-x), atol=1e-6)


def test_pixels_are_moved_and_pooled_as_they_should():
    x = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    apart = nn.pixel_unshuffle(x, (2, 3))
    assert apart.shape == (2, 2, 2, 18)
    assert jnp.array_equal(apart[0, 1, 1, 3:6], x[0, 2, 4])
    assert jnp.array_equal(nn.pixel_shuffle(apart, (2, 3)), x)
    average, pooled = nn.scaled_avg_pool(x, (2, 2)), nn.l2_pool(x, (3, 4))
    np.testing.assert_allclose(average[1, 0, 0], 2 * x[1, :2, :2].mean((0, 1)))
    np.testing.assert_allclose(pooled[:, 0, 0], jnp.sqrt((x[:, :3, :4] ** 2).sum((1, 2))), 1e-6)


MAPS = {
    "maxmin": lambda x: nn.maxmin(x),
    "beta_abs": lambda x: nn.beta_abs(x),
    "group_sort": lambda x: nn.group_sort(x, 4),
    "l2_pool": lambda x: nn.l2_pool(x.reshape(-1, 4, 4, 1), (2, 2)),
    "scaled_avg_pool": lambda x: nn.scaled_avg_pool(x.reshape(-1, 4, 4, 1), (2, 2)),
    "pixel_unshuffle": lambda x: nn.pixel_unshuffle(x.reshape(-1, 4, 4, 1), (2, 2)),
}


@pytest.mark.parametrize("name", MAPS)
def test_activations_and_pooling_have_the_constant_one(name):
    assert 1 <= lipschitz.constant(MAPS[name], (16,)) <= 1 + 1e-6
    x, y = np.random.default_rng(0).normal(size=(2, 100, 16)).astype(np.float32)
    moved = (MAPS[name](x) - MAPS[name](y)).reshape(100, -1)
    apart = np.linalg.norm(x - y, axis=1)
    assert np.all(np.linalg.norm(moved, axis=1) <= apart * (1 + 1e-6))


def test_centering_is_a_bias_at_evaluation_and_refused_in_training():
    net = nnx.Sequential(nn.BatchCentering(3), nn.AOLDense(3, 3, rngs=RNGS))
    x = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert jnp.allclose(net.layers[0](x), x - 2)
    assert jnp.allclose(net.layers[0].mean[...], 0.1)
    with pytest.raises(MixedRows, match="batch axis"):
        lipschitz.constant(net, (3,))
    net.eval()
    assert jnp.allclose(net.layers[0](x), x - 0.1)
    assert lipschitz.constant(net, (3,)) <= 1 + 1e-5


# --- whole nets -----------------------------------------------------------------------------------


class Net(nnx.Module):
    """Every way in which a model may hold layers, one of them shared."""

    def __init__(self, rngs):
        self.first = nn.AOLConv(1, 8, (3, 3), 2, rngs=rngs)
        self.blocks = nnx.List([nn.SLLBlock(8, (3, 3), rngs=rngs)])
        self.named = nnx.Dict(mix=nn.Residual(nn.AOLConv(8, 8, (1, 1), rngs=rngs)))
        self.dense = nnx.Sequential(nn.AOLDense(8, 16, rngs=rngs), nn.Householder(16))
        self.twice = nn.SandwichDense(16, 16, rngs=rngs)
        self.again = self.twice
        self.head = nn.NormalisedDense(16, 3, rngs=rngs)

    def __call__(self, x):
        x = nn.maxmin(self.first(x))
        for block in self.blocks:
            x = block(x)
        x = nn.l2_pool(self.named["mix"](x), (4, 4)).reshape(x.shape[0], -1)
        return self.head(self.again(self.twice(self.dense(x))))


NET = Net(nnx.Rngs(0))
X = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))


def test_a_frozen_model_is_plain_and_the_same():
    frozen = nn.freeze(NET)
    np.testing.assert_allclose(frozen(X), NET(X), atol=1e-5)
    assert not any(isinstance(m, nn.Parametrised) for _, m in nnx.iter_modules(frozen))
    assert type(frozen.first) is nnx.Conv
    assert frozen.twice is frozen.again
    assert isinstance(NET.first, nn.AOLConv)
    assert np.all(lipschitz.certify(frozen, X).radius > 0)


def test_other_certifiers_take_a_model_of_such_layers_and_its_frozen_copy():
    ball = LinfBall(X, 1e-3)
    box, plain = bounds.ibp(NET)(ball), bounds.ibp(nn.freeze(NET))(ball)
    np.testing.assert_allclose(box.lower, plain.lower, atol=1e-4)
    assert np.all(box.lower <= NET(X))
    assert np.all(NET(X) <= box.upper)


def test_layers_train_and_their_gradients_reach_every_weight():
    graph, params, rest = nnx.split(NET, nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p, rest)(X) ** 2)))(params)
    sizes = [float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradients) if g.size]
    assert np.all(np.isfinite(sizes))
    assert np.mean(np.array(sizes) > 0) > 0.9  # biases before a constant may have none


def test_a_layer_in_linen_through_the_bridge_is_certified():
    layer = nnx.bridge.to_linen(nn.AOLDense, 8, 4)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    variables = layer.init(jax.random.key(1), x)
    f = functools.partial(layer.apply, variables)
    assert 0.5 < lipschitz.constant(f, (8,)) <= 1 + 1e-4
    assert np.all(lipschitz.certify(f, x).radius > 0)


def test_what_cannot_be_frozen_says_why():
    net = nnx.Sequential(nn.maxmin, nn.CayleyConv(4, 4, (3, 3), rngs=RNGS))
    with pytest.raises(TypeError, match=r"layers.1 is a CayleyConv.*AOCConv"):
        nn.freeze(net)
    with pytest.raises(TypeError, match=r"Linen module with flax\.nnx"):
        nn.freeze(linen.Dense(3))
    with pytest.raises(TypeError, match="NNX module, got function"):
        nn.freeze(lambda x: x)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CONV(padding="REFLECT"), "count twice"),
        (lambda: CONV(padding="CIRCULAR", strides=2), "pixel_unshuffle"),
        (lambda: CONV(strides=2, kernel_dilation=2), "not both"),
        (lambda: CONV(input_dilation=2), "AOLConvTranspose"),
        (lambda: nn.AOLConv(4, 4, 3, rngs=RNGS), r"write \(3, 3\)"),
        (lambda: nn.AOCConv(4, 4, (2, 2), 3, rngs=RNGS), "at least the strides"),
        (lambda: nn.AOCConv(4, 4, (3, 3), feature_group_count=2, rngs=RNGS), "use AOLConv"),
        (lambda: nn.SLLBlock(4, (3, 3), padding="VALID", rngs=RNGS), "keeps the image's size"),
        (lambda: nn.SLLBlock(4, (3, 3), strides=2, rngs=RNGS), "takes no strides"),
        (lambda: nn.CircularConv(4, 4, (3, 3), strides=2, rngs=RNGS), "pixel_unshuffle"),
        (lambda: nn.BRODense(4, 4, rank=5, rngs=RNGS), "between 1 and 4"),
        (lambda: nn.maxmin(jnp.ones((2, 3))), "even number"),
        (lambda: nn.group_sort(jnp.ones((2, 3)), 2), "does not divide"),
        (lambda: nn.CayleyConv(4, 4, (3, 3), rngs=RNGS)(jnp.ones((2, 4))), "takes images"),
        (lambda: nn.pixel_unshuffle(jnp.ones((2, 3, 4, 1)), (2, 2)), "does not divide"),
        (lambda: nn.BjorckDense(4, 4, steps=0, rngs=RNGS)(jnp.ones((1, 4))), "at least 1 step"),
    ],
)
def test_wrong_arguments_say_what_to_write(build, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build()


# --- Linf -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", one_in(2, [nn.LinfDistDense, nn.SortDense]))
def test_linf_nets_are_certified_by_half_their_margin(kind):
    net = nnx.Sequential(kind(5, 12, rngs=RNGS), kind(12, 3, rngs=RNGS))
    assert 1 <= lipschitz.constant(net, (5,), norm=jnp.inf) <= 1 + 1e-5
    x = jax.random.normal(jax.random.key(0), (40, 5))
    certificate = lipschitz.certify(net, x, norm=jnp.inf)
    top = np.sort(np.asarray(net(x), np.float64), axis=1)
    half = (top[:, -1] - top[:, -2]) / 2
    assert certificate.norm == np.inf
    np.testing.assert_allclose(certificate.radius, half, rtol=1e-4, atol=1e-6)
    # No corner of the ball changes the prediction, as far as float32 can tell.
    corners = np.stack(np.meshgrid(*[[-1, 1]] * 5), -1).reshape(-1, 1, 5)
    moved = net((x + corners * (certificate.radius[:, None] - 1e-5)).reshape(-1, 5))
    assert np.all(jnp.argmax(moved, 1).reshape(-1, 40) == certificate.prediction)


def test_the_distance_of_high_order_is_near_the_maximum():
    layer = nn.LinfDistDense(6, 4, rngs=RNGS)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    np.testing.assert_allclose(layer(x, 1000.0), layer(x), rtol=2e-3)
    p = 3.0
    exact = jnp.sum(jnp.abs(x[:, :, None] - layer.points[...]) ** p, 1) ** (1 / p)
    np.testing.assert_allclose(layer(x, p), exact, rtol=1e-5)
