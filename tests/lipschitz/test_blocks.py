"""Blocks stand whole in the graph only if they are what they claim, and are proved from weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxcert import blocks, lipschitz, nn
from jaxcert.errors import MixedRows, UnsupportedEquation
from jaxcert.graph import entered, trace
from jaxcert.lipschitz import parametrise

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)
SCALE, BIAS = jnp.asarray(2 / np.linalg.norm(W, 2) ** 2 * np.ones(6), jnp.float32), jnp.zeros(6)
X = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def names(f):
    return [eqn.name for eqn in trace(f, X).equations if eqn.bounded]


def block(x):
    return blocks.residual(x, W, SCALE, BIAS)


def model(function, *weights):
    """A block as a model whose weights are arguments of compiled programs."""
    return jax.tree_util.Partial(functools.partial(backwards, function), weights)


def backwards(function, weights, x):
    return function(x, *weights)


def test_a_block_is_one_equation_and_can_be_entered():
    assert names(block) == ["jaxcert_residual"]
    inside = [eqn.name for eqn in entered(trace(block, X)).equations if eqn.bounded]
    assert "dot_general" in inside
    assert "jaxcert_residual" not in inside


def impostor(x, kernel, scale, bias):
    return x - 3 * (scale * jax.nn.relu(x @ kernel + bias)) @ kernel.T


impostor.__name__ = "jaxcert_residual"


def test_a_name_proves_nothing():
    f = jax.jit(impostor)
    assert "jaxcert_residual" not in names(lambda x: f(x, W, SCALE, BIAS))
    steepest = np.linalg.norm(np.eye(4) - 3 * np.asarray((W * SCALE) @ W.T), 2)
    assert lipschitz.constant(lambda x: f(x, W, SCALE, BIAS), (4,)) >= steepest > 1.5


def test_a_block_in_another_batch_or_inside_of_loops_is_never_taken_for_less_than_it_is():
    mapped = jax.vmap(lambda z: block(z[None])[0])
    looped = jax.checkpoint(lambda x: jax.lax.scan(lambda h, _: (block(h), None), x, None, 3)[0])
    for f in (mapped, looped):
        x, y = RNG.normal(size=(2, 50, 4)).astype(np.float32)
        ratio = np.linalg.norm(f(x) - f(y), axis=1) / np.linalg.norm(x - y, axis=1)
        assert np.max(ratio) <= lipschitz.constant(f, (4,))
    assert lipschitz.constant(looped, (4,)) <= 1 + 1e-5


def test_a_block_whose_weights_depend_on_the_input_is_no_block():
    def f(x):
        return blocks.residual(x, W * jnp.sum(x), SCALE, BIAS)

    with pytest.raises(MixedRows):  # a kernel is one for all examples
        lipschitz.constant(f, (4,))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 2.0])
def test_a_residual_block_is_proved_from_its_weights_whatever_they_are(factor):
    f = model(blocks.residual, W, factor * SCALE, BIAS)
    value = float(lipschitz.constant(f, (4,)))
    inner = np.linalg.norm(W, 2) ** 2 * float(factor * SCALE[0])  # nu^2
    np.testing.assert_allclose(value, np.sqrt(1 + max(0, inner - 2) * inner), rtol=1e-5)
    # All relus on, or all off: two of the slopes.
    exact = np.asarray(W, np.float64)
    on = np.eye(4) - (exact * np.asarray(factor * SCALE, np.float64)) @ exact.T
    assert max(1, np.linalg.norm(on, 2)) <= value


def test_negative_scales_and_weights_that_are_not_finite_have_no_constant():
    for scale in (-SCALE, SCALE.at[1].set(jnp.nan)):
        f = model(blocks.residual, W, scale, BIAS)
        assert lipschitz.constant(f, (4,)) == jnp.inf


def test_a_sandwich_of_matrices_that_are_not_orthonormal_costs_what_it_may():
    a, b = parametrise.sandwich(jnp.asarray(RNG.normal(size=(7, 5)), jnp.float32), d_out=3)
    psi, bias = jnp.asarray([1.0, 2.0, 0.5, 3.0, 1.0]), jnp.zeros(5)
    for factor in (1.0, 1.2):
        f = model(blocks.sandwich, factor * a, b, psi, bias)
        value = float(lipschitz.constant(f, (4,)))
        slopes = RNG.integers(0, 2, size=(200, 5))
        inner = [factor * 2 * np.asarray(b.T / psi * s @ (psi[:, None] * a)) for s in slopes]
        assert max(np.linalg.norm(j, 2) for j in inner) <= value <= 1 + 4 * (factor - 1) + 1e-4
    f = model(blocks.sandwich, a, b, psi.at[0].set(0.0), bias)
    assert lipschitz.constant(f, (4,)) == jnp.inf


def test_a_householder_normal_that_is_too_long_counts():
    normal = jnp.asarray([[1.2, 0.0], [0.0, 1.0]])
    value = lipschitz.constant(lambda x: blocks.householder(x, normal), (4,))
    np.testing.assert_allclose(value, 2 * 1.2**2 - 1, rtol=1e-6)
    assert lipschitz.constant(lambda x: blocks.householder(x, 0.3 * normal), (4,)) <= 1 + 1e-6


@pytest.mark.parametrize("spatial", [(6,), (5, 4), (2, 3, 4)])
def test_products_by_frequency_agree_with_numpys_transforms(spatial):
    x = RNG.normal(size=(2, *spatial, 3)).astype(np.float32)
    half = (*spatial[:-1], spatial[-1] // 2 + 1)
    real, imaginary = RNG.normal(size=(2, *half, 3, 2)).astype(np.float32)
    axes = tuple(range(1, len(spatial) + 1))
    symbols = real + 1j * imaginary
    spectrum = np.einsum("b...i,...io->b...o", np.fft.rfftn(x, axes=axes), symbols)
    exact = np.fft.irfftn(spectrum, spatial, axes)
    pair = jnp.stack([real, imaginary])
    np.testing.assert_allclose(blocks.frequency_multiplier(x, pair), exact, atol=2e-5)
    inside = np.einsum("b...m,...cm->b...c", spectrum, symbols.conj())
    exact = x - 2 * np.fft.irfftn(inside, spatial, axes)
    np.testing.assert_allclose(blocks.frequency_reflection(x, pair), exact, atol=2e-4)


def test_the_logits_of_a_deep_net_are_enclosed_as_tightly_as_its_constant_allows():
    # Intervals alone would grow by the absolute row sums of 40 orthogonal layers, to 1e30.
    kernels = [jnp.asarray(np.linalg.qr(RNG.normal(size=(16, 16)))[0], jnp.float32)] * 40

    def f(x):
        for kernel in kernels:
            x = nn.maxmin(x @ kernel)
        return x

    x = jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32)
    with jax.enable_x64(True):
        top = np.sort(np.asarray(f(x.astype(jnp.float64))), axis=1)
    expected = (top[:, -1] - top[:, -2]) / np.sqrt(2)
    radius = np.asarray(lipschitz.certify(f, x).radius)
    assert np.all(radius <= expected)
    np.testing.assert_allclose(radius, expected, rtol=1e-4)


def test_ascent_finds_what_a_linear_map_and_a_relu_net_reach_and_no_more():
    x = jax.random.normal(jax.random.key(0), (20, 4))
    found = lipschitz.lower_bound(jax.random.key(1), lambda x: x @ W, x)
    np.testing.assert_allclose(found, np.linalg.norm(W, 2), rtol=1e-2)
    net = nnx.Sequential(
        nnx.Linear(4, 30, rngs=nnx.Rngs(0)), nnx.relu, nn.AOLDense(30, 3, rngs=nnx.Rngs(1))
    )
    steepest = max(
        np.linalg.norm(j, 2) for j in jax.vmap(jax.jacobian(lambda z: net(z[None])[0]))(x)
    )
    found = lipschitz.lower_bound(jax.random.key(1), net, x)
    assert 0.95 * steepest <= found <= lipschitz.constant(net, (4,))
    # Where steps shrink, rounding must not pass for slope.
    flat = lipschitz.lower_bound(jax.random.key(1), lambda x: 100.0 + 1e-3 * jnp.sin(x), x)
    assert 0.9e-3 <= flat <= 2e-3
    most = lipschitz.lower_bound(jax.random.key(1), lambda x: x @ W, x, norm=jnp.inf)
    np.testing.assert_allclose(most, np.max(np.sum(np.abs(W), 0)), rtol=1e-2)


def test_inputs_of_a_wrong_shape_and_linen_modules_without_weights_are_named():
    net = nn.AOLDense(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"no inputs of shape \(b, 1, 5\).*leave out the batch axis"
    ):
        lipschitz.constant(net, (1, 5))
    with pytest.raises(TypeError, match=r"Dense is a Linen module .*functools\.partial"):
        lipschitz.certify(linen.Dense(3), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="norm=2 or norm="):
        lipschitz.constant(net, (4,), norm=1)


# --- found by reading: each of these had a constant that was too small, or crashed ----------------


def test_a_block_with_one_more_result_is_none():
    def two(x, kernel, scale, bias):
        hidden = jax.nn.relu(x @ kernel + bias)
        return x - (scale * hidden) @ kernel.T, hidden

    two.__name__ = "jaxcert_residual"
    kernel = 100 * jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)
    f = jax.jit(two)
    value = lipschitz.constant(lambda x: sum(f(x, kernel, 1e-8 * jnp.ones(4), jnp.zeros(4))), (4,))
    assert value >= np.linalg.norm(kernel, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: blocks.partial_abs(x, jnp.ones((5, 1, 4), bool)),
        lambda x: blocks.residual(x, W, SCALE, jnp.zeros((5, 1, 6))),
        lambda x: blocks.residual(x, W, jnp.ones((4, 6)), BIAS),
        lambda x: blocks.householder(x, jnp.ones((2, 5, 1, 2))),
    ],
)
def test_blocks_do_not_broadcast(call):
    with pytest.raises(ValueError, match="a block takes"):
        call(jnp.ones((4, 4)))


@pytest.mark.parametrize(
    "layer",
    [
        lambda rngs: nn.SLLBlock(2, (3, 3), rngs=rngs),
        lambda rngs: nn.AOLConv(2, 2, (3, 3), padding="CIRCULAR", rngs=rngs),
        lambda rngs: nn.CayleyConv(2, 2, (3, 3), rngs=rngs),
    ],
)
def test_a_model_of_one_example_mapped_over_a_batch_keeps_its_blocks(layer):
    net = layer(nnx.Rngs(0))
    mapped = jax.vmap(lambda z: net(z[None])[0])
    assert lipschitz.constant(mapped, (4, 4, 2)) <= 1 + 1e-4


def test_other_functions_of_a_blocks_name_are_entered():
    def maxmin(x, y):
        return jnp.tanh(x) + y

    def numbers(x):  # a known number where the block has a value
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([jnp.maximum(first, 1.0), jnp.minimum(first, second)], axis=-1)

    maxmin.__name__ = numbers.__name__ = "jaxcert_maxmin"
    assert lipschitz.constant(lambda x: jax.jit(maxmin)(x, 1.0), (3,)) <= 1 + 1e-6
    assert lipschitz.constant(jax.jit(numbers), (4,)) >= 1


def test_an_uncertain_kernel_counts_by_taps_in_any_layout():
    w = jnp.full((1, 1, 9), (1 + 2**-8 + 2**-16) / 2)

    def f(x):
        kernel = (w * 2).astype(jnp.bfloat16).astype(x.dtype)
        names = ("NCH", "OIH", "NCH")
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=names)

    exact = np.convolve(np.ones(40), np.ones(9), "same")  # a lower bound: the image of ones
    kernel = float(jnp.bfloat16(2 * w[0, 0, 0]))
    steepest = kernel * np.linalg.norm(exact) / np.sqrt(40)
    assert steepest <= lipschitz.constant(f, (1, 40)) <= 9 * 1.02


def test_tiny_changes_side_by_side_do_not_vanish():
    def f(x):
        for _ in range(7):
            x = x * 1e-30
        x = jnp.concatenate([x, x], axis=1)
        for _ in range(7):
            x = x * 1e30
        return x

    assert np.sqrt(2) * (1 - 1e-5) <= lipschitz.constant(f, (2,)) <= np.sqrt(2) * (1 + 1e-5)


def test_weights_that_a_model_closes_over_have_the_radius_of_their_type():
    layer = nn.SpectralDense(12, 12, use_bias=False, rngs=nnx.Rngs(1))
    layer.free.kernel[...] = 30 * layer.free.kernel[...] + 30
    exact = np.linalg.norm(np.asarray(nn.freeze(layer).kernel[...], np.float64), 2)
    for f in (layer, lambda x: layer(x)):
        assert exact <= lipschitz.constant(f, (12,))


def test_a_model_with_counters_uses_its_parametrised_weights_elementwise():
    layer = nn.Householder(4)
    f = jax.tree_util.Partial(lambda layer, i, x: layer(x) @ W, layer, jnp.arange(3))
    assert lipschitz.certify(f, jnp.ones((1, 4))).radius.shape == (1,)


def test_a_product_in_a_narrower_type_is_refused():
    def f(x):
        return jax.lax.dot(x, W, preferred_element_type=jnp.bfloat16).astype(x.dtype)

    with pytest.raises(UnsupportedEquation, match="narrower"):
        lipschitz.constant(f, (4,))
