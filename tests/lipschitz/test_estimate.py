"""Tight Lipschitz constants against activation patterns, Jacobians, exact numbers and attacks."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from flax import nnx

from jaxcert import Box, L2Ball, LinfBall, bounds, lipschitz
from jaxcert.certificate import ABSTAIN
from jaxcert.errors import MixedRows, UnsupportedEquation
from jaxcert.lipschitz import ellipsoids
from jaxcert.lipschitz.estimate import (
    eclipse_bound,
    fast_multipliers,
    layer_matrices,
    liplt_bound,
    lipsdp_bound,
    multiplier_bound,
    product_bound,
)
from jaxcert.lipschitz.local import certify_local, local_constant
from jaxcert.lipschitz.slopes import slopes
from jaxcert.tracing import trace_rows

SIZES = (4, 5, 4, 3)  # of all nets here, so that programs are compiled once


def mlp(params, x, activation=jax.nn.relu):
    for kernel, bias in params[:-1]:
        x = activation(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def random_params(seed, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(i, o)) * np.sqrt(2 / i), jnp.float32),
            jnp.asarray(rng.normal(size=o) * 0.3, jnp.float32),
        )
        for i, o in itertools.pairwise(sizes)
    ]


def random_mlp(seed, sizes=SIZES):
    return jax.tree_util.Partial(mlp, random_params(seed, sizes))


def kernels(f):
    return [np.asarray(kernel, np.float64).T for kernel, _ in f.args[0]]


def norm2(matrix):
    return np.linalg.norm(matrix, 2, axis=(-2, -1))


def worst_pattern(matrices):
    """The largest norm of a Jacobian over all patterns of slopes 0 and 1: every bound that knows of
    the activations no more than their slopes is at least as large."""
    found = 0.0
    sizes = [len(m) for m in matrices[:-1]]
    for pattern in itertools.product([0.0, 1.0], repeat=sum(sizes)):
        total, rest = matrices[0], np.asarray(pattern)
        for size, matrix in zip(sizes, matrices[1:], strict=True):
            total, rest = matrix @ (rest[:size, None] * total), rest[size:]
        found = max(found, norm2(total))
    return found


def jacobian_norms(f, x):
    """Of an MLP, in float64, by its own formula."""
    x, found = np.asarray(x, np.float64), None
    params = [[np.asarray(p, np.float64) for p in pair] for pair in f.args[0]]
    for kernel, bias in params[:-1]:
        x = x @ kernel + bias
        step = np.broadcast_to(kernel.T, (len(x), *kernel.T.shape)) if found is None else (
            kernel.T @ found
        )  # fmt: skip
        found = (x > 0)[:, :, None] * step
        x = np.maximum(x, 0)
    return norm2(params[-1][0].T @ found)


def crossed(x):
    x = jnp.tanh(x)
    return 2.0 * x + jax.nn.relu(x)


# --- on the whole space ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_above_all_activation_patterns_and_in_the_known_order(seed):
    f = random_mlp(seed)
    least = worst_pattern(kernels(f))
    found = [bound(f, (4,)) for bound in (lipsdp_bound, eclipse_bound, liplt_bound, product_bound)]
    assert all(value.dtype == jnp.float32 for value in found)
    values = [float(value) for value in found]
    assert least <= values[0] <= values[1] <= values[3] * (1 + 1e-6)
    assert values[2] <= values[3]
    assert values[0] < 1.2 * least
    assert values[3] == pytest.approx(np.prod([norm2(w) for w in kernels(f)]), rel=1e-6)
    x = np.random.default_rng(seed).normal(size=(2000, 4)) * 3
    assert jacobian_norms(f, x).max() <= least * (1 + 1e-12)


def test_bounds_equal_what_can_be_found_by_hand():
    def net(first, second):
        """first, then second and nothing else, in the upper left corners of layers of zeros."""
        parts = [[first], [[entry] for entry in second], [[1.0]]]
        corners = [np.zeros(shape, np.float32) for shape in itertools.pairwise(SIZES)]
        for corner, part in zip(corners, parts, strict=True):
            corner[: len(part), : len(part[0])] = part
        return jax.tree_util.Partial(
            mlp, [(jnp.asarray(w), jnp.zeros(w.shape[1], jnp.float32)) for w in corners]
        )

    # One neuron behind another: |w_2| |w_1|, by every method.
    one = net([3.0, 0.0], [0.5, 0.2])
    for bound in (liplt_bound, eclipse_bound, lipsdp_bound):
        assert 1.5 <= float(bound(one, (4,))) < 1.62
    assert float(lipsdp_bound(one, (4,))) == pytest.approx(1.5, rel=1e-3)
    # |x| = relu(x) + relu(-x). W_1 W_1' has the eigenvectors (1, -1) and (1, 1), with 2 and 0. With
    # T = t I, X is t^2 / (t - 1/2) on the first and t on the second, which is all that W_2 = (1, 1)
    # reads: the bound's square is 2 t for every t > 1/2, near 1 at best; ECLipsE-Fast has t = 1.
    absolute = net([1.0, -1.0], [1.0, 1.0])
    assert float(product_bound(absolute, (4,))) == pytest.approx(2.0, rel=1e-6)
    assert float(eclipse_bound(absolute, (4,))) == pytest.approx(2**0.5, rel=1e-6)
    assert 1 < float(lipsdp_bound(absolute, (4,))) < 1.02


class Affine(nnx.Module):
    """Convolutions with strides, groups and dilation, normalisation, pooling; no activation."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Conv(4, 4, (2, 2), feature_group_count=2, kernel_dilation=2, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))
        x = x + 0.5 * self.second(x)[:, ::-1]
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.head(x.reshape(-1, 4)).reshape(x.shape[0], -1)


def test_layers_of_any_affine_kind_become_one_matrix():
    net = Affine(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    net.norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=4), jnp.float32)
    net.norm.mean[...] = jnp.asarray(rng.normal(size=4), jnp.float32)
    with pytest.raises(MixedRows):
        product_bound(net, (8, 6, 2))
    net.eval()
    jacobian = jax.jit(jax.jacobian(lambda z: net(z.reshape(1, 8, 6, 2))[0]))(jnp.zeros(96))
    exact = norm2(np.asarray(jacobian, np.float64))
    assert float(product_bound(net, (8, 6, 2))) == pytest.approx(exact, rel=1e-5)


def test_activations_in_a_row_and_at_both_ends():
    def f(x):
        return jnp.clip(jax.nn.relu6(2.0 * jnp.tanh(x)), 0.5, 3.0)

    value = float(product_bound(f, (4,)))
    assert 2.0 <= value <= 2.0 * (1 + 1e-6)
    assert float(product_bound(lambda x: jnp.ones((len(x), 2)), (4,))) == 0.0


def test_weights_that_are_not_finite_prove_nothing():
    params = random_params(0)
    for value, layer, part in ((jnp.nan, 0, 0), (jnp.inf, 1, 1)):
        broken = [list(pair) for pair in params]
        broken[layer][part] = broken[layer][part].at[0].set(value)
        f = jax.tree_util.Partial(mlp, [tuple(pair) for pair in broken])
        assert product_bound(f, (4,)) == lipsdp_bound(f, (4,)) == jnp.inf
    certificate = certify_local(f, jnp.ones((5, 4)))
    assert certificate.prediction.tolist() == [ABSTAIN] * 5
    assert certificate.radius.tolist() == [0.0] * 5
    assert jnp.all(local_constant(f, L2Ball(jnp.ones((5, 4)), 0.1)) == jnp.inf)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x + jax.nn.relu(x), "'add'.*residual"),
        (lambda x: jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], 1), "parallel branches"),
        (lambda x: jnp.exp(x), "'exp'"),
        (lambda x: x * x, "square|mul"),
        (lambda x: jnp.maximum(x, -2 * x), "'max'"),
        (lambda x: x.max(1, keepdims=True), "reduce_max"),
        (lambda x: x.astype(jnp.bfloat16).astype(x.dtype), "narrower type"),
        (lambda x: crossed(x), "between two activations"),
        (lambda x: jax.nn.relu(x.T).T, "batch axis first"),
    ],
)
def test_what_is_no_chain_is_refused_with_its_place(f, words):
    with pytest.raises(UnsupportedEquation, match=words) as error:
        eclipse_bound(f, (4,))
    assert "test_estimate.py" in str(error.value)


def test_arguments_are_checked():
    f, x = random_mlp(0), jnp.ones((2, 4))
    with pytest.raises(ValueError, match="steps"):
        lipsdp_bound(f, (4,), steps=-1)
    with pytest.raises(ValueError, match="learning_rate"):
        local_constant(f, L2Ball(x, 0.1), learning_rate=0.0)
    with pytest.raises(ValueError, match="tries"):
        certify_local(f, x, tries=0)
    with pytest.raises(ValueError, match="at least 2 logits"):
        certify_local(lambda x: x[:, :1], x)


# --- slopes ---------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "shifted": lambda x: jnp.maximum(x, 0.3),
    "least": lambda x: jnp.minimum(x, 0.3),
    "abs": jnp.abs,
    "clip": lambda x: jax.lax.clamp(-0.4, x, 0.7),
    "leaky_relu": jax.nn.leaky_relu,
    "steep": lambda x: jax.nn.leaky_relu(x, -2.0),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "steep elu": lambda x: jax.nn.elu(x, 1.7),
    "erf": jax.lax.erf,
    "atan": jnp.arctan,
    "asinh": jnp.arcsinh,
    "soft_sign": jax.nn.soft_sign,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "hard_swish": jax.nn.hard_swish,
    "sin": jnp.sin,
    "cos": jnp.cos,
}
LOOSE = {"silu", "gelu", "hard_swish", "sin", "cos"}  # the same on every box


def test_slopes_hold_the_secants_on_a_box_and_are_tight():
    rng = np.random.default_rng(0)
    centres, radii = rng.normal(size=60) * 2, rng.choice([1e-3, 0.3, 3.0], size=60)
    low, high = centres - radii, centres + radii
    spots = np.linspace(low, high, 401)  # (401, 60)

    @jax.jit
    def everything():
        found = {}
        for name, g in ACTIVATIONS.items():
            graph, _ = trace_rows(g, (2, 60), jnp.float64)
            (eqn,) = graph.equations
            box = Box(jnp.stack([low, low]), jnp.stack([high, high]))
            pairs = [slopes(eqn, eqn.inputs, each) for each in (box, None)]
            found[name] = pairs, g(jnp.asarray(spots))
        return found

    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, everything())
    for name, (((least, most), (anywhere_least, anywhere_most)), values) in found.items():
        secants = np.diff(values, axis=0) / np.diff(spots, axis=0)
        slack = 1e-10 / radii
        assert np.all(least[0] - slack <= secants), name
        assert np.all(secants <= most[0] + slack), name
        assert np.all((anywhere_least <= least) & (most <= anywhere_most)), name
        if name not in LOOSE:
            np.testing.assert_allclose(secants.min(0), least[0], atol=0.05, err_msg=name)
            np.testing.assert_allclose(secants.max(0), most[0], atol=0.05, err_msg=name)


def test_ellipsoids_are_above_those_of_exact_arithmetic():
    """X + rounding against 60 digits, with scales as different as decided and undecided neurons."""
    mpmath.mp.dps = 60
    rng = np.random.default_rng(0)
    n = 4
    cases = []
    for _ in range(12):
        half = rng.normal(size=(n, n)) * 10.0 ** rng.uniform(-3, 3, size=(n, 1))
        g = (half @ half.T + (half @ half.T).T) / 2
        low = rng.uniform(-1, 1, size=n)
        high = low + 10.0 ** rng.uniform(-9, 0, size=n)
        r = (high - low) / 2
        q = rng.uniform(0.1, 1, size=n)
        q *= np.sqrt((1 - 10.0 ** rng.uniform(-5, 0)) / norm2(q[:, None] * g * q))
        cases.append((g, (low + high) / 2, r, q))
    with jax.enable_x64(True):
        images = jax.jit(jax.vmap(ellipsoids.image_bound))
        stacked = [jnp.asarray(np.stack(part)) for part in zip(*cases, strict=True)]
        found = np.asarray(images(*stacked))
        refused = np.asarray(images(*stacked[:3], stacked[3] * 40))
    assert np.all(np.isnan(refused))  # where I - q G q is not positive definite
    for (g, m, r, q), x in zip(cases, found, strict=True):
        exact = mpmath.matrix(g.tolist())
        scale, middle, spread = (mpmath.diag(v.tolist()) for v in (q, m, r))
        inverse = (mpmath.eye(n) - scale * exact * scale) ** -1
        image = middle * (exact + exact * scale * inverse * scale * exact) * middle
        image += (spread * scale**-1) ** 2
        gap = mpmath.eigsy(mpmath.matrix(x.tolist()) - image, eigvals_only=True)
        size = norm2(x)
        assert min(gap) >= 0
        assert max(gap) <= 1e-8 * size


# --- on balls, and radii --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    return random_mlp(7)


@pytest.fixture(scope="module")
def inputs():
    return jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), jnp.float32)


def test_local_constants_are_above_jacobians_in_the_ball_and_tight_in_small_ones(net, inputs):
    rng = np.random.default_rng(0)
    before, whole = jacobian_norms(net, inputs), lipsdp_bound(net, (4,))
    for eps in (1e-4, 0.1, 1.0):
        constants = local_constant(net, L2Ball(inputs, eps))
        assert constants.shape == (5,)
        assert constants.dtype == jnp.float32
        directions = rng.normal(size=(400, 5, 4))
        directions *= eps / np.linalg.norm(directions, axis=2, keepdims=True)
        for x, ways, constant in zip(inputs, directions.swapaxes(0, 1), constants, strict=True):
            points = np.asarray(x, np.float64) + ways * rng.uniform(size=(400, 1)) ** 0.25
            assert jacobian_norms(net, points).max() <= float(constant)
        assert np.all(constants <= whole * 1.05)
        if eps == 1e-4:
            np.testing.assert_allclose(constants, before, rtol=1e-3, atol=1e-6)


def test_local_constants_of_a_smooth_net_on_boxes():
    f = jax.tree_util.Partial(smooth, random_params(5))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 4)), jnp.float32)
    constants = local_constant(f, LinfBall(x, 0.3), method=bounds.ibp, steps=0)
    rng = np.random.default_rng(0)
    centres = np.asarray(x, np.float64)
    first = centres + rng.uniform(-0.3, 0.3, size=(3000, 2, 4))
    second = first + (centres - first) * rng.uniform(size=(3000, 2, 1)) * 1e-3  # still in the box
    rises = [smooth(f.args[0], points, np) for points in (first, second)]
    secants = np.linalg.norm(rises[0] - rises[1], axis=2)
    secants /= np.linalg.norm(first - second, axis=2)
    assert np.all(secants <= np.asarray(constants))
    assert np.all(constants <= 4 * secants.max(0))


def smooth(params, x, math=jnp):
    first, second, third = [[math.asarray(p) for p in pair] for pair in params]
    x = math.tanh(x @ first[0] + first[1]) @ second[0] + second[1]
    x = jax.nn.elu(x) if math is jnp else np.where(x > 0, x, np.expm1(x))
    return x @ third[0] + third[1]


def test_radii_stand_up_to_attacks_and_are_larger_than_those_of_the_product(net, inputs):
    certificate = certify_local(net, inputs, largest=3.0)
    assert certificate.norm == 2.0
    assert certificate.within is None
    assert certificate.prediction.tolist() == jnp.argmax(net(inputs), axis=1).tolist()
    assert np.all(certificate.radius > lipschitz.certify(net, inputs).radius)
    assert np.all(certificate.radius < 3.0)
    distances = [nearest_other_class(net, x) for x in inputs]
    assert np.all(np.asarray(certificate.radius) < distances)
    assert np.mean(certificate.radius / np.asarray(distances)) > 0.5


def nearest_other_class(f, x):
    """How far off another class was found, along random ways, the last ones close to the best."""
    params = [[np.asarray(p, np.float64) for p in pair] for pair in f.args[0]]

    def logits(points):
        for kernel, bias in params[:-1]:
            points = np.maximum(points @ kernel + bias, 0)
        return points @ params[-1][0] + params[-1][1]

    x = np.asarray(x, np.float64)
    own = logits(x).argmax()
    rng = np.random.default_rng(0)
    ways = rng.normal(size=(20000, 4))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    best = np.inf
    for _ in range(4):  # closer and closer around the best way
        for length in np.linspace(0.01, 6, 120):
            if length >= best:
                break
            broken = logits(x + length * ways).argmax(1) != own
            if broken.any():
                best, way = length, ways[broken.argmax()]
        ways = way + rng.normal(size=ways.shape) * 0.1
        ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    return best


def test_cut_balls_and_small_limits(net, inputs):
    clipped = jnp.clip(inputs, 0, 1)
    options = {"method": bounds.ibp, "steps": 0, "tries": 1}
    certificate = certify_local(net, clipped, valid=Box(0.0, 1.0), largest=1e-3, **options)
    assert certificate.within == Box(0.0, 1.0)
    assert set(np.asarray(certificate.radius).tolist()) <= {0.0, float(np.float32(1e-3))}


# --- for training ---------------------------------------------------------------------------------


def test_the_bound_of_multipliers_is_differentiable_and_agrees(net):
    matrices = layer_matrices(net, (4,))
    np.testing.assert_allclose(matrices[0], kernels(net)[0], atol=1e-6)
    multipliers = jax.jit(fast_multipliers)(matrices)
    search = jax.jit(jax.value_and_grad(multiplier_bound, argnums=(0, 1)))
    value, (by_matrix, by_multiplier) = search(matrices, multipliers)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(eclipse_bound(net, (4,))), rel=1e-4)
    # Scaling a layer scales the bound: the derivative along the layer is the bound.
    for matrix, slope in zip(matrices, by_matrix, strict=True):
        assert float(jnp.sum(matrix * slope)) == pytest.approx(float(value), rel=1e-3)
    moved = jax.tree.map(lambda p, g: p - 0.05 * g, multipliers, by_multiplier)
    assert search(matrices, moved)[0] < value


def test_bounds_in_float64_and_of_traced_weights(net):
    with jax.enable_x64(True):
        value = jax.jit(lambda f: product_bound(f, (4,)))(net)
        assert value.dtype == jnp.float64
        exact = np.prod([norm2(w) for w in kernels(net)])
        assert exact <= float(value) <= exact * (1 + 1e-11)
