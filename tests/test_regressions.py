"""Each of these once gave a wrong certificate, a wrong bound or a crash."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxcert import (
    Box,
    DataDependent,
    LinfBall,
    MixedRows,
    Spec,
    StatefulModel,
    Status,
    UnsupportedEquation,
    bounds,
    lipschitz,
    smoothing,
)

KEY = jax.random.key(0)
PLAN = smoothing.SmoothingPlan(noise=smoothing.Gaussian(0.25), n=200)
FIRST, SECOND = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])


@pytest.mark.parametrize("outward", [False, True])
@pytest.mark.parametrize("b", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_spec_behind_a_merged_batch_axis_keeps_examples_apart(b, outward):
    """Rows of the spec were mixed with tokens where the last layer ran on (b * tokens, d)."""
    weights = jax.random.normal(jax.random.key(3), (2, 3))

    def f(x):
        return (x.reshape(-1, 2) @ weights).reshape(x.shape[0], -1)

    x = jax.random.normal(jax.random.key(1), (b, 3, 2))
    whole = bounds.ibp(f, outward=outward)(LinfBall(x, 0.1))
    rows = bounds.ibp(f, outward=outward)(LinfBall(x, 0.1), Spec(jnp.eye(9)))
    np.testing.assert_allclose(rows.lower, whole.lower, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows.upper, whole.upper, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [1, 12, 20])
def test_random_weights_are_those_the_caller_draws(seed):
    """Traced in float64, jax.random gives other numbers: another function was certified."""

    def weights():
        return jax.random.normal(jax.random.key(seed), (2, 2))

    f = lambda x: x @ weights()  # noqa: E731
    exact = np.linalg.norm(np.asarray(weights(), np.float64), 2)
    assert exact <= lipschitz.constant(f, (2,)) <= 1.0001 * exact
    x = jnp.array([[1.0, 0.0]])
    box = bounds.ibp(f, outward=True)(Box(x, x))
    assert np.all(np.asarray(box.lower) <= np.asarray(f(x)) + 1e-6)
    assert np.all(np.asarray(f(x)) - 1e-6 <= np.asarray(box.upper))


def test_integers_wrap_as_the_callers_do():
    def f(x):
        hashed = jnp.arange(1, 3) * 1103515245 + 12345
        return x * jnp.where(hashed > 0, 1.0, -1.0)

    x, worst = jnp.array([[0.3, -0.2]]), jnp.array([[0.2, -0.3]])
    assert np.argmax(f(x)) != np.argmax(f(worst))
    assert bounds.certify(f, LinfBall(x, 0.11)).radius == 0


def test_replaced_weights_are_seen():
    class Net:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, x):
            return x @ self.weights

    x, net = jnp.array([[1.0, 0.0]]), Net(jnp.eye(2))
    certifiers = (
        lambda: bounds.certify(net, LinfBall(x, 0.1)),
        lambda: lipschitz.certify(net, x),
        lambda: smoothing.certify(KEY, net, x, PLAN),
    )
    assert [int(c().prediction[0]) for c in certifiers] == [0, 0, 0]
    net.weights = jnp.eye(2)[::-1]
    assert [int(c().prediction[0]) for c in certifiers] == [1, 1, 1]


def test_options_that_compare_equal_are_told_apart():
    def f(flag, x):
        return x * (FIRST - SECOND) if flag is True else x * (SECOND - FIRST)

    x = jnp.array([[1.0, 1.0]])
    make = lambda flag: jax.tree_util.Partial(f, flag)  # noqa: E731
    assert bounds.certify(make(True), LinfBall(x, 0.1)).prediction == 0
    assert bounds.certify(make(1), LinfBall(x, 0.1)).prediction == 1


def test_a_bound_linen_module_is_a_model():
    x = jnp.ones((2, 4))
    module = nn.Dense(3)
    net = module.bind(module.init(KEY, x))
    assert bounds.certify(net, LinfBall(x, 1e-4)).radius.shape == (2,)


def test_smoothing_refuses_models_that_mix_rows():
    class TrainMode(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    x = jnp.ones((2, 2))
    across = lambda x: jnp.abs(jnp.fft.fft(x, axis=0))  # noqa: E731  (equations not followed)
    along = lambda x: jnp.abs(jnp.fft.fft(x, axis=1))  # noqa: E731
    for f in (TrainMode(), lambda x: x - x.mean(0), across):
        with pytest.raises(MixedRows):
            smoothing.certify(KEY, f, x, PLAN)
    traced = jax.jit(lambda x: smoothing.certify(KEY, across, x, PLAN).prediction)
    assert np.all(traced(x) == -1)
    assert np.all(smoothing.certify(KEY, along, x, PLAN).prediction == 0)


def test_a_module_in_training_mode_behind_a_function_is_refused():
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    with pytest.raises(StatefulModel, match="pass the module itself"):
        smoothing.certify(KEY, lambda x: norm(x), jnp.ones((2, 2)), PLAN)


def test_active_dropout_is_refused_and_recurrent_cells_are_not():
    class Net(nnx.Module):
        def __init__(self, deterministic):
            rngs = nnx.Rngs(0)
            self.cell = nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs))
            self.drop = nnx.Dropout(0.5, deterministic=deterministic, rngs=rngs)
            self.out = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.drop(self.cell(x)[:, -1]))

    x = jax.random.uniform(KEY, (2, 5, 3))
    with pytest.raises(StatefulModel, match=r"model\.eval"):
        bounds.certify(Net(deterministic=False), LinfBall(x, 1e-4))
    assert np.all(bounds.certify(Net(deterministic=True), LinfBall(x, 1e-5)).radius > 0)
    assert smoothing.certify(KEY, Net(deterministic=True), x, PLAN).prediction.shape == (2,)


@pytest.mark.parametrize("g", [jnp.log, jnp.sqrt, lambda v: jnp.log1p(v - 1)])
def test_a_half_known_value_decides_nothing(g):
    """Below its domain a function is unknown; its known end used to decide comparisons."""
    x = jnp.array([[0.1]])
    f = lambda x: jnp.where(g(x) < 5, FIRST, SECOND)  # noqa: E731
    assert np.argmax(f(x)) == 0
    assert np.argmax(f(x - 0.3)) == 1
    assert bounds.certify(f, LinfBall(x, 0.5)).radius == 0


def test_softmax_over_one_entry_does_not_hide_nan():
    f = lambda x: jnp.stack([jax.nn.softmax(jnp.log(x))[:, 0], 0 * x[:, 0]], 1)  # noqa: E731
    assert bounds.certify(f, LinfBall(jnp.array([[0.1]]), 0.5)).radius == 0


def test_integers_made_from_the_input_are_refused():
    f = lambda x: jnp.where((jnp.where(x > 0, 1, 2) & 1) == 1, FIRST, SECOND)  # noqa: E731
    with pytest.raises(DataDependent, match="integers that depend on the input"):
        bounds.certify(f, LinfBall(jnp.array([[0.1]]), 0.5))


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no mutable references")
def test_mutable_references_are_refused():
    def f(x):
        ref = jax.new_ref(jnp.zeros(x.shape, bool))
        ref[...] = x > 0
        return jnp.where(ref[...], FIRST, SECOND)

    with pytest.raises(UnsupportedEquation, match="side effect"):
        bounds.certify(f, LinfBall(jnp.array([[0.1]]), 0.5))


def test_a_cast_to_a_type_of_smaller_range_can_overflow():
    def f(x):
        small = x.astype(jnp.bfloat16).astype(jnp.float16).astype(jnp.float32)
        return jnp.concatenate([1 / small, 0 * x + 1e-6], axis=1)

    verdict = bounds.certify(f, Box(jnp.array([[63000.0]]), jnp.array([[67000.0]])))
    assert verdict.status == Status.UNKNOWN


@pytest.mark.parametrize(
    ("f", "exact"),
    [
        (lambda h: h.sum(1, keepdims=True) + jnp.zeros(8), 8.0),
        (lambda h: h.sum(1, keepdims=True) * jnp.ones(8), 8.0),
        (lambda h: h.mean(1, keepdims=True) + jnp.zeros(8), 1.0),
        (lambda h: h.max(1, keepdims=True) * jnp.ones(8), 8**0.5),
        (lambda h: h + h.sum(1, keepdims=True), 9.0),
    ],
)
def test_lipschitz_counts_entries_that_arithmetic_repeats(f, exact):
    assert exact <= lipschitz.constant(f, (8,)) <= 1.0001 * exact


def test_a_tiny_alpha_is_not_confidence_one():
    plan = smoothing.SmoothingPlan(noise=smoothing.Gaussian(0.1), n=200, alpha=1e-18)
    f = lambda x: jnp.concatenate([x, -x], 1)  # noqa: E731
    assert smoothing.certify(KEY, f, jnp.ones((1, 1)), plan).confidence < 1


def test_a_key_that_is_an_argument_of_jit_goes_through():
    weights = jnp.ones((4, 3))

    def certify(x, key):
        drop = nn.Dropout(0.5, deterministic=False)
        f = lambda x: drop.apply({}, x @ weights, rngs={"dropout": key})  # noqa: E731
        return bounds.certify(f, LinfBall(x, 1e-3)).radius

    assert jax.jit(certify)(jnp.ones((2, 4)), KEY).shape == (2,)


def test_a_rule_registered_later_is_used():
    f = lambda x: jnp.concatenate([jnp.tanh(x), 0 * x], 1)  # noqa: E731
    ball = LinfBall(jnp.array([[1.0]]), 0.1)
    assert bounds.certify(f, ball).radius > 0
    unknown = lambda eqn, values, outward: Box(*[v.lower * jnp.nan for v in values] * 2)  # noqa: E731
    bounds.register("tanh", unknown)
    assert bounds.certify(f, ball).radius == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: functools.partial(net.scores, train=False),
        lambda net: net.nested,
        lambda net: jax.tree_util.Partial(lambda net, x: x @ net.weights, net),
    ],
)
def test_replaced_weights_are_seen_behind_wrappers(wrap):
    class Net:
        def __init__(self):
            self.weights = jnp.eye(2)

        def scores(self, x, train):
            return x @ self.weights

        def nested(self, x):
            weights = self.weights
            return jax.jit(lambda z: z @ weights)(x)

    x, net = jnp.array([[1.0, 0.0]]), Net()
    f = wrap(net)
    assert bounds.certify(f, LinfBall(x, 0.1)).prediction == 0
    assert lipschitz.certify(f, x).prediction == 0
    net.weights = jnp.eye(2)[::-1]
    assert bounds.certify(f, LinfBall(x, 0.1)).prediction == 1
    assert lipschitz.certify(f, x).prediction == 1


class Holder:
    scale = 1.0


SCALE = {"of": 1.0}


def by_keyword(z, *, holder=Holder):
    return z * holder.scale


@pytest.mark.parametrize(
    "classify",
    [
        by_keyword,
        lambda z: z * SCALE["of"],
        lambda z: jax.vmap(lambda row: row * Holder.scale)(z),
        jax.tree_util.Partial(lambda weight, z: weight * z * Holder.scale, jnp.ones(2)),
    ],
)
def test_numbers_behind_the_functions_that_a_model_is_made_of_are_seen(classify):
    x = jnp.array([[1.0, 0.0]])
    model = smoothing.Denoised(jnp.tanh, classify)
    plan = smoothing.SmoothingPlan(noise=smoothing.Gaussian(0.1), n=50, chunk=50)
    try:
        assert smoothing.certify(KEY, model, x, plan).prediction == 0
        Holder.scale = SCALE["of"] = -1.0
        assert smoothing.certify(KEY, model, x, plan).prediction == 1
    finally:
        Holder.scale = SCALE["of"] = 1.0


class Scaling:
    def __call__(self, z):
        return z * Holder.scale


@pytest.mark.parametrize("activation", [lambda z: z * Holder.scale, Scaling()])
def test_numbers_behind_an_activation_that_a_module_holds_are_seen(activation):
    class Net(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.eye(2))
            self.activation = activation

        def __call__(self, z):
            return self.activation(z @ self.weight[...])

    net, x = Net(), jnp.array([[1.0, 0.0]])
    try:
        assert bounds.certify(net, LinfBall(x, 0.1)).prediction == 0
        Holder.scale = -1.0
        assert bounds.certify(net, LinfBall(x, 0.1)).prediction == 1
    finally:
        Holder.scale = 1.0


def test_float64_weights_do_not_change_what_is_drawn():
    def f(weights, x):
        return x @ weights + jax.random.normal(jax.random.key(21), (3,))

    net, x = jax.tree_util.Partial(f, np.eye(3)), jnp.zeros((1, 3))
    top = np.sort(np.asarray(net(x))[0])
    assert bounds.certify(net, LinfBall(x, float(top[-1] - top[-2]) / 2 + 1e-3)).radius == 0
    assert lipschitz.certify(net, x).radius <= (top[-1] - top[-2]) / np.sqrt(2) + 1e-6


def test_traced_integers_wrap_as_the_callers_do():
    def f(params, x):
        hashed = (params["seed"] * jnp.arange(1, 4) * jnp.arange(7, 10)) % 97
        return x @ params["weights"] + hashed.astype(x.dtype) / 97

    seed = jnp.array(2**29 + 1234567 * 5, jnp.int32)
    net = jax.tree_util.Partial(f, {"seed": seed, "weights": jnp.eye(3)})
    x = jnp.zeros((1, 3))
    top = np.sort(np.asarray(net(x))[0])
    assert bounds.certify(net, LinfBall(x, float(top[-1] - top[-2]) / 2 + 1e-3)).radius == 0


def test_a_function_of_the_float_type_is_the_callers():
    def f(x):
        start = 0 if x.dtype == jnp.float64 else 1
        return jax.lax.slice_in_dim(x, start, start + 2, axis=1)

    x = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(bounds.ibp(f, outward=True)(Box(x, x)).lower, [[2.0, 3.0]])


def test_subnormal_constants_of_the_last_layer_count():
    f = lambda x: x * jnp.full((1, 2), np.float32(1e-39)) + jnp.array([[0.0, 0.005]])  # noqa: E731
    ball = LinfBall(jnp.array([[1e38, 9e37]]), 1e36)
    box = bounds.ibp(f, outward=True)(ball, Spec(jnp.eye(2)))
    assert np.all(np.asarray(box.lower) <= [[0.1, 0.095]])
    assert np.all(np.asarray(box.upper) >= [[0.1, 0.095]])


def test_a_module_that_moves_its_own_key_is_refused():
    class Noisy(nnx.Module):
        def __init__(self):
            self.key = nnx.Variable(jax.random.key(0))

        def __call__(self, x):
            kept, drawn = jax.random.split(self.key[...])
            self.key[...] = kept
            return x + jax.random.normal(drawn, (3,))

    x = jnp.zeros((1, 3))
    with pytest.raises(StatefulModel):
        bounds.ibp(Noisy())(LinfBall(x, 0.1))
    with pytest.raises(StatefulModel):
        smoothing.certify(KEY, Noisy(), x, PLAN)


def test_a_closure_over_a_key_goes_through_jit():
    key, x = jax.random.key(3), jnp.zeros((1, 3))
    f = lambda y: y + jax.random.normal(key, (3,))  # noqa: E731
    assert jax.jit(lambda z: bounds.certify(f, LinfBall(z, 0.01)).radius)(x).shape == (1,)


def test_padding_of_a_pool_is_less_than_what_float32_cannot_hold():
    """A float32 model's least number padded windows whose entries, over the reals, are less."""
    scale = jnp.float32(1e20)

    def f(x):
        return nnx.max_pool(-(x * scale) * scale, (2, 2), padding="SAME").reshape(x.shape[0], -1)

    with jax.enable_x64(True):
        box = bounds.crown(f, outward=True)(LinfBall(jnp.ones((2, 3, 3, 1)), 0.1))
    assert not (np.asarray(box.lower) > -0.9e40).any()
    assert not (np.asarray(box.upper) < -1.1e40).any()
