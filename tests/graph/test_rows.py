"""Models that mix the rows of a batch are refused, and only those."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from models import MODELS, weights

from jaxcert.bounds import certify, ibp
from jaxcert.errors import DataDependent, MixedRows
from jaxcert.model import split
from jaxcert.rows import Rows
from jaxcert.sets import Box, LinfBall
from jaxcert.tracing import trace_rows


class TrainModeNNX(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def train_mode_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((2, 3)))
    return lambda x: net.apply(variables, x, mutable=["batch_stats"])[0]


MIXING = {
    "batch norm in training, NNX": (TrainModeNNX, "reduce_sum|reduce_mean|mean|variance"),
    "batch norm in training, Linen": (train_mode_linen, "reduce_sum|mean|variance"),
    "mean": (lambda: lambda x: x - x.mean(0), "reduce_sum"),
    "reverse": (lambda: lambda x: x[::-1] + x, "rev"),
    "roll": (lambda: lambda x: jnp.roll(x, 1, axis=0), "slice"),
    "gram": (lambda: lambda x: x @ x.T @ jnp.ones((x.shape[0], 3)), "dot_general"),
    "contract": (lambda: lambda x: jnp.tile(x.T @ jnp.ones((x.shape[0], 1)), 3), "dot_general"),
    "reshape": (lambda: lambda x: x.reshape(3, -1).sum(0).reshape(-1, 1), "reshape|reduce_sum"),
    "interleave": (lambda: lambda x: x.T.reshape(x.shape), "reshape"),
    "gather": (lambda: lambda x: x[jnp.array([1, 0])] if x.shape[0] == 2 else x, "gather"),
    "first row": (lambda: lambda x: x - x[:1], "slice"),
    "softmax": (lambda: lambda x: jax.nn.softmax(x, axis=0), "softmax|reduce_max"),
    "cumsum": (lambda: lambda x: jnp.cumsum(x, axis=0), "cumsum"),
    "sort": (lambda: lambda x: jnp.sort(x, axis=0), "sort"),
    "max": (lambda: lambda x: x / x.max(), "reduce_max"),
    "pairwise": (lambda: lambda x: (x[:, None] - x[None]).max(1), "sub"),
    "pool": (
        lambda: lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME"),
        "reduce_window_max",
    ),
    "batch as feature": (
        lambda: lambda x: lax.conv_general_dilated(
            x.T[:, :, None], jnp.ones((1, x.shape[0], 1), x.dtype), (1,), "SAME",
            dimension_numbers=("NCW", "WIO", "NCW"),
        )[:, 0].T * jnp.ones((x.shape[0], 1)),
        "conv_general_dilated",
    ),
    "concatenate": (lambda: lambda x: jnp.concatenate([x, x])[: x.shape[0]], "concatenate"),
    "swap in a merged axis": (
        lambda: lambda x: x.reshape(-1)[::-1].reshape(x.shape), "rev",
    ),
    "scan over the batch": (
        lambda: lambda x: lax.scan(lambda c, r: (c + r, c + r), jnp.zeros(3), x)[1], "slice",
    ),
    "not at batch 1": (lambda: lambda x: x if x.shape[0] == 1 else x - x.mean(0), "reduce_sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("batch", [1, 2])
def test_mixing_is_refused(name, batch):
    build, equation = MIXING[name]
    region = LinfBall(jnp.ones((batch, 3)), 0.1)
    with pytest.raises(MixedRows, match=f"'({equation})") as info:
        ibp(build())(region)
    assert re.search(r"\w+\.py:\d+", str(info.value))  # the line of the model


def test_an_error_says_what_to_do():
    with pytest.raises(MixedRows, match=r"use_running_average=True .NNX: model.eval"):
        certify(TrainModeNNX(), LinfBall(jnp.ones((1, 3)), 0.1))


def test_indices_that_depend_on_the_input_are_refused():
    with pytest.raises(DataDependent, match=r"integers that depend on the input"):
        ibp(lambda x: jnp.take_along_axis(x, (x > 0).astype(jnp.int32), axis=1))(
            LinfBall(jnp.ones((2, 3)), 0.1)
        )


ACCEPTED = {
    "matmul per example": lambda x: (x.reshape(-1, 2, 3) @ x.reshape(-1, 3, 2)).reshape(-1, 4),
    "einsum per example": lambda x: jnp.einsum("bij,bkj->bik", *[x.reshape(-1, 2, 3)] * 2)[:, 0],
    "merge, work, split": lambda x: jnp.tanh(x.reshape(-1, 3) @ weights(3, 3)).reshape(-1, 6),
    "transpose there and back": lambda x: jnp.cumsum(x.T, axis=0).T,
    "batch last": lambda x: (weights(2, 6) @ x.T).T,
    "softmax per group": lambda x: jax.nn.softmax(x.reshape(-1, 2, 3), axis=1).reshape(-1, 6),
    "vmap": jax.vmap(lambda v: jnp.sort(v) @ weights(6, 2)),
    "vmap of gather": jax.vmap(lambda v: v[np.array([3, 1])]),
    "per-example take": lambda x: jnp.take(x, np.array([0, 5]), axis=1),
    "own constants per row": lambda x: x + jnp.arange(x.shape[0])[:, None],
    "scan over features": lambda x: lax.scan(lambda c, r: (c + r, c * r), x[:, 0], x.T)[1].T,
    "depthwise conv": lambda x: lax.conv_general_dilated(
        x.reshape(-1, 3, 2), weights(2, 1, 2), (1,), "SAME", feature_group_count=2,
        dimension_numbers=("NWC", "WIO", "NWC"),
    ).reshape(x.shape[0], -1),
    "constant output": lambda x: jnp.ones((x.shape[0], 2)),
    "a loop of the batch size": lambda x: jnp.concatenate(
        [x.mean(1, keepdims=True)] * 2, axis=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("batch", [1, 3])
def test_independent_rows_are_accepted(name, batch):
    f = ACCEPTED[name]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(batch, 6)), jnp.float32)
    box = jax.jit(ibp(f))(LinfBall(x, 0.0))
    assert box.lower.shape == f(x).shape
    assert np.allclose(box.lower, f(x), atol=1e-5)
    assert np.allclose(box.upper, f(x), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["attention", "tokens_merged_with_batch", "recurrent", "per_example"]
)
def test_the_examples_stay_first_in_real_models(name):
    f, shape = MODELS[name]()
    for batch in (1, 3):
        graph, rows = trace_rows(f, (batch, *shape), jnp.float32)
        assert graph.outputs[0].shape[0] == batch
        assert rows[graph.outputs[0]] == Rows(0)


def test_a_model_different_at_batch_one_is_judged_as_it_is_there():
    f = lambda x: 2 * x if x.shape[0] == 1 else x  # noqa: E731
    assert ibp(f)(Box(jnp.ones((1, 2)), jnp.ones((1, 2)))).lower[0, 0] == 2
    assert ibp(f)(Box(jnp.ones((2, 2)), jnp.ones((2, 2)))).lower[0, 0] == 1


def test_permuted_rows_get_permuted_bounds():
    f, shape = MODELS["tokens_merged_with_batch"]()
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(4, *shape)), jnp.float32)
    eps = jnp.array([0.0, 0.1, 0.2, 0.3])
    order = np.array([2, 0, 3, 1])
    bound = jax.jit(ibp(f))
    one, other = bound(LinfBall(x, eps)), bound(LinfBall(x[order], eps[order]))
    assert np.allclose(one.lower[order], other.lower, atol=1e-6)


def test_wrong_outputs_and_batches():
    with pytest.raises(ValueError, match="at least one example"):
        trace_rows(lambda x: x, (0, 3), jnp.float32)
    with pytest.raises(TypeError, match="one array"):
        trace_rows(lambda x: (x, x), (2, 3), jnp.float32)
    with pytest.raises(MixedRows, match="examples not along axis 0"):
        trace_rows(lambda x: x.T, (2, 3), jnp.float32)
    with pytest.raises(TypeError, match="callable"):
        split(3)
    assert functools.partial(jnp.add, 1.0)(1.0) == 2.0
