"""Constants and certificates of whole models, against exact Jacobians, SVDs and attacks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from thinned import one_in

from jaxcert import lipschitz
from jaxcert.certificate import ABSTAIN
from jaxcert.errors import MixedRows, UnsupportedEquation


def weights(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in shapes]


def mlp(params, x, activation=jax.nn.relu):
    first, b1, second, b2, third, b3 = params
    x = activation(x @ first + b1)
    x = activation(x @ second + b2)
    return x @ third + b3


def random_mlp(seed, activation=jax.nn.relu, sizes=(5, 8, 6, 4)):
    pairs = itertools.pairwise(sizes)
    params = weights(seed, *(shape for i, o in pairs for shape in ((i, o), (o,))))
    return jax.tree_util.Partial(with_activation(activation), params)


@functools.cache  # one object per activation, so that nets of one kind are one kind of pytree
def with_activation(activation):
    return functools.partial(mlp, activation=activation)


def norm2(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64), 2)


class Net(nnx.Module):
    """Two convolutions, batch normalisation, average pooling and two dense layers."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Conv(4, 3, (2, 2), padding="VALID", rngs=rngs)
        self.hidden = nnx.Linear(27, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = nnx.leaky_relu(self.second(x))
        return self.head(jnp.tanh(self.hidden(x.reshape(x.shape[0], -1))))


def random_net(seed=0):
    net = Net(nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    net.norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=4), jnp.float32)
    net.norm.mean[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    net.norm.scale[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    net.eval()
    return net


# --- the constant of a chain ----------------------------------------------------------------------


def test_the_constant_of_an_mlp_is_the_product_of_the_spectral_norms():
    f = random_mlp(0)
    kernels = f.args[0][::2]
    exact = np.prod([norm2(w) for w in kernels])
    value = lipschitz.constant(f, (5,))
    assert value.dtype == jnp.float32
    assert exact <= float(value) <= exact * (1 + 1e-6)
    with jax.enable_x64(True):
        assert exact <= float(lipschitz.constant(f, (5,))) <= exact * (1 + 1e-10)


C = jnp.asarray([0.5, -3.0, 2.0, 1.0], jnp.float32)
LAYERS = {
    "relu": (jax.nn.relu, 1.0),
    "abs": (jnp.abs, 1.0),
    "tanh": (jnp.tanh, 1.0),
    "sigmoid": (jax.nn.sigmoid, 0.25),
    "leaky relu": (jax.nn.leaky_relu, 1.0),
    "steep leaky relu": (lambda x: jax.nn.leaky_relu(x, 3.0), 3.0),
    "bias": (lambda x: 1.0 - x + C, 1.0),
    "negated": (lambda x: -x, 1.0),
    "scaled per channel": (lambda x: x * C, 3.0),
    "divided per channel": (lambda x: x / C, 2.0),
    "clip": (lambda x: jnp.clip(x, -1, 1), 1.0),
    "reshape": (lambda x: x.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)[:, ::-1], 1.0),
    "slice and pad": (lambda x: jnp.pad(x[:, 1:], ((0, 0), (2, 0))), 1.0),
    "sort": (lambda x: jnp.sort(x, axis=1), 1.0),
    "sum": (lambda x: x.sum(1, keepdims=True), 2.0),
    "mean": (lambda x: x.mean(1, keepdims=True), 0.5),
    "copies": (lambda x: jnp.repeat(x[:, None], 9, 1).reshape(-1, 36), 3.0),
    "largest": (lambda x: x.max(1, keepdims=True), 1.0),
    "residual": (lambda x: x + 2 * jnp.tanh(x), 3.0),
    "average pooling": (
        lambda x: nnx.avg_pool(x.reshape(-1, 4, 1), (2,), strides=(2,)).reshape(-1, 2),
        np.sqrt(0.5),
    ),
    "overlapping average pooling": (
        lambda x: nnx.avg_pool(x.reshape(-1, 4, 1), (2,), strides=(1,)).reshape(-1, 3),
        1.0,
    ),
    "max pooling": (lambda x: nnx.max_pool(x.reshape(-1, 4, 1), (2,), strides=(2,))[:, :, 0], 1.0),
    "two branches": (lambda x: jnp.concatenate([2 * x, jnp.tanh(x), x], axis=1), np.sqrt(6)),
    "largest of two": (lambda x: jnp.maximum(3 * x, 4.0 - 4 * x), 5.0),
    "part": (lambda x: jnp.where(jnp.array([True, False, True, False]), x, 0.0), 1.0),
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), 1.129),
    "elu": (lambda x: jax.nn.elu(x, 2.0), 2.0),
    "two blocks": (
        lambda x: jnp.einsum("bpi,pij->bpj", x.reshape(-1, 2, 2), BLOCKS).reshape(-1, 4),
        5.0,
    ),
    "shared matrix": (
        lambda x: (x.reshape(-1, 2, 2) @ BLOCKS[1]).reshape(-1, 4),
        5.0,
    ),
}
BLOCKS = jnp.asarray([[[1.0, 0.0], [0.0, -2.0]], [[3.0, 0.0], [4.0, 0.0]]])


@pytest.mark.parametrize("name", LAYERS)
def test_the_constant_of_one_layer(name):
    layer, wanted = LAYERS[name]
    value = float(lipschitz.constant(layer, (4,)))
    assert wanted * (1 - 1e-7) <= value <= wanted * (1 + 1e-6)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200, 4))
    with jax.enable_x64(True):
        moved = np.linalg.norm(np.asarray(layer(jnp.asarray(x))) - layer(jnp.asarray(y)), axis=1)
    assert np.all(moved <= value * np.linalg.norm(x - y, axis=1) * (1 + 1e-12))


def test_the_constant_of_a_conv_net_is_above_its_jacobians():
    net = random_net()
    value = float(lipschitz.constant(net, (8, 8, 2)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 8, 8, 2)), jnp.float32)
    jacobian = jax.vmap(jax.jacobian(lambda z: net(z[None])[0]))(x).reshape(6, 3, -1)
    slopes = [norm2(j) for j in jacobian]
    assert max(slopes) < value < 40 * max(slopes)


def test_a_constant_function_has_the_constant_zero_and_no_certificate():

    def f(x):
        return jnp.broadcast_to(jnp.array([1.0, 0.0]), (x.shape[0], 2))

    assert lipschitz.constant(f, (3,)) == 0.0
    assert lipschitz.certify(f, jnp.ones((2, 3))).radius.tolist() == [0.0, 0.0]


# --- what has no proof ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x * x, "square|mul"),
        (lambda x: x * jnp.tanh(x), "'mul'"),
        (lambda x: jnp.exp(x), "'exp'"),
        (lambda x: 1 / x, "'div'"),
        (lambda x: x.astype(jnp.float16).astype(x.dtype), "narrower type"),
        (lambda x: jax.nn.softmax(x), "softmax"),
    ],
)
def test_an_equation_without_a_proof_raises_and_says_where(f, words):
    with pytest.raises(UnsupportedEquation, match=words) as error:
        lipschitz.constant(f, (3,))
    assert "test_lipschitz_certify.py" in str(error.value)


def test_batch_normalisation_in_training_mode_is_refused():
    net = random_net()
    net.train()
    with pytest.raises(MixedRows, match="batch axis"):
        lipschitz.certify(net, jnp.ones((2, 8, 8, 2)))


# --- certificates ---------------------------------------------------------------------------------


def test_the_radius_is_the_pairwise_one_for_the_last_dense_layer():
    f = random_mlp(1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(7, 5)), jnp.float32)
    cert = lipschitz.certify(f, x)
    params = [np.asarray(p, np.float64) for p in f.args[0]]
    logits = mlp(params, np.asarray(x, np.float64), lambda z: np.maximum(z, 0))
    backbone = norm2(params[0]) * norm2(params[2])
    rows = params[4].T
    for i, y in enumerate(np.argmax(logits, axis=1)):
        others = [j for j in range(4) if j != y]
        radius = min(
            (logits[i, y] - logits[i, j]) / (backbone * np.linalg.norm(rows[y] - rows[j]))
            for j in others
        )
        assert int(cert.prediction[i]) == y
        assert radius * (1 - 1e-6) <= float(cert.radius[i]) < radius
    assert cert.norm == 2.0
    assert cert.within is None
    assert np.all(np.asarray(cert.confidence) == 1.0)


def test_it_is_never_smaller_than_the_sqrt_two_form():
    f = random_mlp(2)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(20, 5)), jnp.float32)

    def hidden_last(z):  # no final dense layer
        return jnp.tanh(20 * f(z))

    pairwise = lipschitz.certify(f, x)
    plain = lipschitz.margin_certificate(f(x), logit_constant=lipschitz.constant(f, (5,)))
    assert np.all(pairwise.radius * (1 + 1e-6) >= plain.radius)
    assert np.sum(np.asarray(pairwise.radius) > 1.01 * np.asarray(plain.radius)) >= 15
    rough = lipschitz.certify(hidden_last, x)
    margin = lipschitz.margin_certificate(
        hidden_last(x), logit_constant=lipschitz.constant(hidden_last, (5,))
    )
    np.testing.assert_allclose(rough.radius, margin.radius, atol=1e-6)


@pytest.mark.parametrize("name", one_in(2, ["conv", "abs"]))
def test_no_attack_inside_of_the_radius_changes_the_prediction(name):
    if name == "conv":
        f, shape = random_net(), (8, 8, 2)
    else:
        f, shape = random_mlp(3, jnp.abs), (5,)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(6, *shape)), jnp.float32)
    cert = lipschitz.certify(f, x)
    assert np.all(np.asarray(cert.radius) > 0)
    np.testing.assert_array_equal(cert.prediction, np.argmax(f(x), axis=1))
    radius = np.asarray(cert.radius, np.float64).reshape(-1, *(1,) * len(shape))
    y = np.asarray(cert.prediction)

    @jax.jit
    @jax.grad
    def ascent(z, j):
        logits = f(z)
        return jnp.sum(logits[jnp.arange(6), j] - logits[jnp.arange(6), y])

    for start in range(4):
        target = (y + 1 + start % 3) % f(x).shape[1]
        rng = np.random.default_rng(start)
        point = x + rng.normal(size=x.shape) * 1e-3
        for _ in range(15):
            step = ascent(jnp.asarray(point, jnp.float32), target)
            point = point + radius * 0.5 * step / _length(step)
            delta = np.asarray(point - x, np.float64)
            point = np.asarray(x, np.float64) + delta * np.minimum(1, radius / _length(delta))
        with jax.enable_x64(True):
            np.testing.assert_array_equal(np.argmax(f(jnp.asarray(point)), axis=1), y)


def _length(delta):
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.maximum(np.linalg.norm(flat, axis=1), 1e-30).reshape(-1, *(1,) * (np.ndim(delta) - 1))


def test_ties_certify_nothing_and_keep_the_prediction():
    cert = lipschitz.certify(lambda x: x @ jnp.ones((3, 2)), jnp.ones((2, 3)))
    assert cert.radius.tolist() == [0.0, 0.0]
    assert cert.prediction.tolist() == [0, 0]


def test_the_rounding_of_the_forward_pass_is_counted():
    # Over the reals both logits are 1; a sum from the left gives 2^60 + 1 - 2^60 = 0, even float64.
    kernel = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    x = jnp.array([[2.0**60, 1.0, -(2.0**60)]])
    assert lipschitz.certify(lambda z: z @ kernel, x).radius.tolist() == [0.0]
    x = jnp.array([[2.0**24, 1.0, -(2.0**24)]])
    # Here class 0 leads over the reals, by 2^-30: a certificate for it or none.
    apart = kernel.at[1, 0].set(1 + 2.0**-20)
    cert = lipschitz.certify(lambda z: (z @ apart) * 2.0**-10, x)
    assert cert.prediction.tolist() in ([0], [1])
    assert (float(cert.radius[0]) > 0) == (cert.prediction.tolist() == [0])


def test_weights_and_inputs_that_are_not_finite_certify_nothing():
    f = random_mlp(5)
    x = jnp.ones((3, 5))
    broken = jax.tree_util.Partial(f.func, [f.args[0][0].at[0, 0].set(jnp.nan), *f.args[0][1:]])
    cert = lipschitz.certify(broken, x)
    assert cert.radius.tolist() == [0.0] * 3
    assert cert.prediction.tolist() == [ABSTAIN] * 3
    assert lipschitz.constant(broken, (5,)) == jnp.inf
    with pytest.raises(ValueError, match="finite"):
        lipschitz.certify(f, x.at[0, 0].set(jnp.nan))
    traced = jax.jit(lambda z: lipschitz.certify(f, z))(x.at[0, 0].set(jnp.nan))
    assert traced.prediction[0] == ABSTAIN
    assert traced.radius[0] == 0
    assert np.all(np.asarray(traced.radius[1:]) > 0)


def test_certificates_are_the_same_under_jit_and_vmap():
    nets = [random_mlp(seed) for seed in (6, 7)]
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 4, 5)), jnp.float32)
    each = [lipschitz.certify(f, z) for f, z in zip(nets, x, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    for mapped in (jax.vmap(lipschitz.certify), jax.jit(jax.vmap(lipschitz.certify))):
        cert = mapped(stacked, x)
        for i, alone in enumerate(each):
            np.testing.assert_array_equal(cert.prediction[i], alone.prediction)
            np.testing.assert_allclose(cert.radius[i], alone.radius, rtol=1e-6)


def test_a_second_net_of_the_same_shapes_compiles_nothing():
    """It is traced, to see that what its function closes over is the same."""
    traces = []

    def counted(params, x):
        traces.append(None)
        return mlp(params, x)

    x = jnp.ones((3, 5))
    nets = [jax.tree_util.Partial(counted, random_mlp(seed).args[0]) for seed in (8, 9)]
    first = lipschitz.certify(nets[0], x)
    before = len(traces)
    second = lipschitz.certify(nets[1], x)
    assert len(traces) == before + 1
    assert np.any(np.asarray(first.radius) != np.asarray(second.radius))


def test_linen_models_and_partials_are_models():
    module = linen.Dense(3)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, 5)), jnp.float32)
    variables = module.init(jax.random.key(0), x)
    cert = lipschitz.certify(functools.partial(module.apply, variables), x)
    kernel = variables["params"]["kernel"]
    wanted = lipschitz.margin_certificate(x @ kernel, backbone_constant=1.0, rows=kernel.T)
    np.testing.assert_allclose(cert.radius, wanted.radius, rtol=1e-4, atol=1e-5)


def test_the_constant_of_a_model_is_differentiated_inside_of_a_jitted_step():
    layer = nnx.Conv(2, 3, (3, 3), strides=2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: lipschitz.constant(nnx.merge(graph, p), (6, 6, 2)))(params)

    found = gradient(params)
    # A homogeneous function: <gradient, W> is the value.
    value = jnp.vdot(found["kernel"][...], layer.kernel[...])
    np.testing.assert_allclose(value, lipschitz.constant(layer, (6, 6, 2)), rtol=1e-4)
