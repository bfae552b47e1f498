"""Small models for the tests, one per way of writing a network.

`MODELS` maps a name to a function `() -> (f, input shape without batch)`. Every f maps (b, *input)
to (b, k) logits; inputs around [0, 1] are in its domain.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

IMAGE = (6, 6, 2)


def weights(*shape, seed=0, scale=None):
    scale = 1 / np.sqrt(shape[0]) if scale is None else scale
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


class Tuple(nnx.Module):
    """Layers one after the other; plain functions among them."""

    def __init__(self, *layers):
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else list(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def dense(*sizes, seed=0, dtype=None):
    """Dense layers with ReLU between them, biases not zero."""
    rngs = nnx.Rngs(seed)
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [
            nnx.Linear(a, b, dtype=dtype, rngs=rngs, bias_init=nnx.initializers.normal(0.3)),
            nnx.relu,
        ]
    return nnx.Sequential(*layers[:-1])


def mlp_relu():
    return dense(5, 8, 8, 3), (5,)


ACTIVATIONS = [
    jax.nn.silu, jax.nn.gelu, functools.partial(jax.nn.gelu, approximate=False), jax.nn.elu,
    jax.nn.softplus, jax.nn.mish, jax.nn.hard_swish, jax.nn.soft_sign, jax.nn.leaky_relu, jnp.tanh,
    jax.nn.sigmoid, jax.nn.celu, jax.nn.selu, jax.nn.relu6, jax.nn.log_sigmoid, jax.nn.hard_tanh,
    jax.nn.hard_sigmoid, jax.nn.squareplus, jax.nn.sparse_plus, lambda x: jnp.where(x > 0, x, 0.0),
]  # fmt: skip


def mlp_activations():
    width = 2 * len(ACTIVATIONS)
    w1, w2 = weights(4, width, seed=1, scale=2.0), weights(width, 3, seed=2)

    def f(x):
        pieces = jnp.split(x @ w1 - 0.5, len(ACTIVATIONS), axis=1)
        return jnp.concatenate(
            [act(p) for act, p in zip(ACTIVATIONS, pieces, strict=True)], axis=1
        ) @ w2  # fmt: skip

    return f, (4,)


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = x + nnx.relu(self.norm2(self.second(x)))
        a = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
        m = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return self.head(jnp.concatenate([a.mean(axis=(1, 2)), m.mean(axis=(1, 2))], axis=-1))


def resnet_nnx():
    model = ResNet(nnx.Rngs(0))
    for i, norm in enumerate((model.norm, model.norm2)):
        norm.mean[...] = weights(4, seed=10 + i)
        norm.var[...] = jnp.abs(weights(4, seed=20 + i)) + 0.1
        norm.scale[...] = 1 + weights(4, seed=30 + i)
        norm.bias[...] = weights(4, seed=40 + i)
    model.eval()
    return model, IMAGE


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(4, (3, 3))(x)
        x = nn.avg_pool(x + y, (2, 2), padding="VALID")
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def resnet_linen():
    net = LinenNet()
    variables = net.init(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + jax.random.uniform(k, leaf.shape) / 3 for leaf, k in zip(leaves, keys, strict=True)
    ]
    return functools.partial(net.apply, jax.tree.unflatten(tree, moved)), IMAGE


def convolutions():
    rngs = nnx.Rngs(3)
    return Tuple(
        nnx.Conv(2, 4, (3, 3), padding="CIRCULAR", rngs=rngs),
        nnx.relu,
        nnx.Conv(4, 4, (3, 2), strides=(2, 1), padding="SAME", feature_group_count=2, rngs=rngs),
        nnx.relu,
        nnx.Conv(4, 4, (3, 3), kernel_dilation=2, padding="SAME", feature_group_count=4, rngs=rngs),
        nnx.ConvTranspose(4, 3, (3, 3), strides=(2, 2), padding="VALID", rngs=rngs),
        nnx.relu,
        nnx.Conv(3, 2, (2, 2), padding="VALID", strides=2, rngs=rngs),
        lambda x: x.mean(axis=(1, 2)),
    ), IMAGE  # fmt: skip


def norms():
    rngs = nnx.Rngs(4)
    return Tuple(
        nnx.Linear(4, 8, rngs=rngs),
        nnx.GroupNorm(8, num_groups=2, rngs=rngs),
        nnx.relu,
        nnx.LayerNorm(8, rngs=rngs),
        nnx.RMSNorm(8, rngs=rngs),
        nnx.Linear(8, 3, rngs=rngs),
    ), (4,)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        return self.head((x + self.attend(self.norm(x), mask=mask)).mean(axis=1))


def attention():
    return Attention(nnx.Rngs(5)), (3, 4)


def attention_masked_by_minus_inf():
    q, k, v = (weights(4, 4, seed=s) for s in (1, 2, 3))
    mask = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool)

    def f(x):
        scores = jnp.einsum("btd,bsd->bts", x @ q, x @ k) / 2
        shares = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bts,bsd->btd", shares, x @ v).sum(axis=1)

    return f, (3, 4)


class ScannedLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.silu(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(ScannedLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(x, None)
        return nn.Dense(3)(x)


def scanned_linen():
    net = Scanned()
    variables = net.init(jax.random.key(2), jnp.zeros((1, 4)))
    return jax.tree_util.Partial(net.apply, variables), (4,)


class Rematted(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.act = nnx.PReLU(0.2)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.remat(lambda m, a: m.act(m.first(a)))(self, x)
        return self.second(hidden)


def rematted_nnx():
    return Rematted(nnx.Rngs(6)), (4,)


def recurrent():
    """lax.scan over layers and over time, and jax.checkpoint."""
    stack, inner, out = weights(3, 4, 4, seed=7), weights(4, 4, seed=8), weights(4, 3, seed=9)

    @jax.checkpoint
    def block(x, w):
        return x + jax.nn.leaky_relu(x @ w, 0.1), jnp.max(x, axis=-1)

    def f(x):  # (b, time, 4)
        def step(h, row):
            h = jnp.tanh(h @ inner + row)
            return h, h[:, :2]

        h, trace = lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0), reverse=True)
        h, tops = lax.scan(block, h, stack)
        return h @ out + trace.sum(axis=(0, 2))[:, None] * 0.1 + tops.sum(0)[:, None] * 0.1

    return f, (3, 4)


def arithmetic():
    """Plain functions: data movement, quotients, powers, two bounded factors, order statistics."""
    w = weights(6, 6, seed=11)
    index = np.array([3, 0, 0, 5])

    def f(x):
        h = x @ w
        a, b = jnp.split(h, 2, axis=1)
        pieces = [
            a / (1.5 + jnp.square(b)),
            jnp.log(2.0 + jnp.abs(a)),
            jnp.exp(-b) * a,
            jnp.sqrt(1.0 + a**2) - 1 / (3.0 + b**4),
            jnp.clip(a, -0.3, 0.4),
            h[:, index],
            h[:, ::-2],
            jnp.pad(b, ((0, 0), (1, 1)), constant_values=0.7),
            jnp.stack([a, b], axis=1).max(axis=1),
            jnp.cumsum(a, axis=1) ** 3,
            jnp.sort(h, axis=1)[:, :2],
            jnp.where(a > b, a, 2 * b),
            jnp.power(jnp.abs(b) + 0.1, 1.5),
            lax.rsqrt(jnp.var(h, axis=1, keepdims=True) + 0.2),
            jnp.log1p(jnp.abs(a)) + jnp.expm1(b / 4),
            jnp.sign(a - 10.0) + jnp.floor(b + 20.0) * 0.1,
            jnp.minimum(a, b) - jnp.sort(h, axis=1)[:, 2:3],
            jnp.logaddexp(a, b),
            lax.rsqrt(1.0 + jax.nn.relu(a)) + jnp.cbrt(b) + jnp.arctan(a) + jnp.arcsinh(b),
            jnp.maximum(a, jnp.roll(b, 1, axis=1)),
        ]
        y = jnp.concatenate(pieces, axis=1)
        product = jnp.einsum("bi,bj->bij", a, b) @ b[:, :, None]
        return jnp.concatenate([y, product[:, :, 0]], axis=1)

    return f, (6,)


def log_probabilities():
    model = dense(4, 6, 4, seed=12)
    return lambda x: jax.nn.log_softmax(4 * model(x)) + jax.nn.softmax(model(x)), (4,)


def per_example():
    """A model of one example, mapped over the batch."""
    w1, w2 = weights(3, 3, 2, 4, seed=13), weights(4, 3, seed=14)

    def one(w1, w2, image):
        h = lax.conv_general_dilated(
            image[None], w1, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.gelu(h[0].mean(axis=(0, 1))) @ w2

    return jax.tree_util.Partial(jax.vmap(one, in_axes=(None, None, 0)), w1, w2), IMAGE


def tokens_merged_with_batch():
    """Windows join the batch axis, go through a layer, and part from it again."""
    w, out = weights(4, 4, seed=15), weights(4, 3, seed=16)

    def f(x):  # (b, 6, 4)
        b = x.shape[0]
        windows = x.reshape(b * 3, 2, 4)
        windows = jax.nn.softmax(windows @ w, axis=-1)
        grid = windows.transpose(1, 0, 2).reshape(2, b, 3, 4).transpose(1, 2, 0, 3)
        return grid.reshape(b, 6, 4).mean(axis=1) @ out

    return f, (6, 4)


MODELS = {
    build.__name__: build
    for build in (
        mlp_relu, mlp_activations, resnet_nnx, resnet_linen, convolutions, norms, attention,
        attention_masked_by_minus_inf, scanned_linen, rematted_nnx, recurrent, arithmetic,
        log_probabilities, per_example, tokens_merged_with_batch,
    )
}  # fmt: skip
