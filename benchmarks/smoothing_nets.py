"""Nets for the benchmarks of smoothing, in Flax, with weights that torch's forms of them can load.

Layers bear the names that they have in the published nets, so that weights travel by name.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

# A convolution of arguments like those of `lax.conv_general_dilated`, which Flax's `nn.Conv` takes.
Convolution = Callable[..., jax.Array]


class Net(nn.Module):
    """A net of `first`, which is affine, and `rest`.

    Attributes:
      convolution: how convolutions are computed; default XLA's own.
      dtype: what layers compute in; weights and logits stay float32.
    """

    convolution: Convolution | None = None
    dtype: Any = jnp.float32

    def __call__(self, x):
        """Logits (b, 10) of x (b, *shape)."""
        return self.rest(self.first(x))

    def first(self, x):
        """The first layer."""
        raise NotImplementedError

    def rest(self, h):
        """All that follows."""
        raise NotImplementedError


def dense(net: Net, width: int, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=net.dtype, name=name)


def conv(net: Net, channels: int, size: int, name: str, **options) -> nn.Conv:
    options |= {"dtype": net.dtype, "conv_general_dilated": net.convolution}
    return nn.Conv(channels, (size, size), name=name, **options)


def norm(net: Net, name: str, scale: float = 1.0) -> nn.BatchNorm:
    options = {"scale_init": nn.initializers.constant(scale), "dtype": net.dtype}
    return nn.BatchNorm(use_running_average=True, name=name, **options)


class MLP(Net):
    """784-256-256-10."""

    @nn.compact_name_scope
    def first(self, x):
        """The first layer."""
        return dense(self, 256, "1")(x.reshape(x.shape[0], -1))

    @nn.compact_name_scope
    def rest(self, h):
        """Logits of what `first` returns."""
        h = dense(self, 256, "3")(nn.relu(h))
        return dense(self, 10, "5")(nn.relu(h)).astype(jnp.float32)


class LeNet(Net):
    """Two 5x5 convolutions with 20 and 50 channels, max-pooled, then 500-10.

    Attributes:
      pool_first: bias and relu after max-pooling, on a quarter of the values, instead of before:
        the same function, as both are monotone. `first` is not affine then.
    """

    pool_first: bool = False

    @nn.compact_name_scope
    def first(self, x):
        """The first convolution."""
        return pooled_or_not(self, 20, "0")(x)

    @nn.compact_name_scope
    def rest(self, h):
        """Logits of what `first` returns."""
        h = self.pooled(h)
        h = self.pooled(pooled_or_not(self, 50, "3")(h))
        h = nn.relu(dense(self, 500, "7")(h.reshape(h.shape[0], -1)))
        return dense(self, 10, "9")(h).astype(jnp.float32)

    def pooled(self, h):
        """relu and max-pooling, where that is not done yet."""
        return h if self.pool_first else nn.max_pool(nn.relu(h), (2, 2), (2, 2))


class PooledConv(nn.Module):
    """A 5x5 convolution, max-pooled, then bias and relu; weights like those of `nn.Conv`."""

    channels: int
    convolution: Convolution | None = None

    @nn.compact
    def __call__(self, x):
        """(b, h, w, c) -> (b, (h - 4) / 2, (w - 4) / 2, channels)."""
        shape = (5, 5, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        options = {"padding": "VALID", "use_bias": False}
        options["conv_general_dilated"] = self.convolution
        out = nn.Conv(self.channels, (5, 5), **options).apply({"params": {"kernel": kernel}}, x)
        return nn.relu(nn.max_pool(out, (2, 2), (2, 2)) + bias)


def pooled_or_not(net: LeNet, channels: int, name: str) -> nn.Module:
    if net.pool_first:
        return PooledConv(channels, net.convolution, name=name)
    return conv(net, channels, 5, name, padding="VALID")


class ResNet(Net):
    """The thin ResNets for CIFAR-10 of He et al. (CVPR 2016), in eval mode.

    Attributes:
      depth: 6 n + 2.
    """

    depth: int = 20

    @nn.compact_name_scope
    def first(self, x):
        """The first convolution."""
        return conv(self, 16, 3, "conv1", padding=1, use_bias=False)(x)

    @nn.compact_name_scope
    def rest(self, h):
        """Logits of what `first` returns."""
        h = nn.relu(norm(self, "bn1")(h))
        for stage, channels in enumerate((16, 32, 64), start=1):
            for block in range((self.depth - 2) // 6):
                h = residual(self, h, channels, f"layer{stage}.{block}.")
        return dense(self, 10, "fc")(h.mean((1, 2))).astype(jnp.float32)


def residual(net: Net, h: jax.Array, channels: int, name: str) -> jax.Array:
    """Two convolutions and a shortcut."""
    strides = channels // h.shape[-1]
    options = {"padding": 1, "use_bias": False}
    out = conv(net, channels, 3, name + "conv1", strides=strides, **options)(h)
    out = nn.relu(norm(net, name + "bn1")(out))
    out = norm(net, name + "bn2", 0.2)(conv(net, channels, 3, name + "conv2", **options)(out))
    if strides != 1:
        shortcut = conv(net, channels, 1, name + "downsample.0", strides=2, use_bias=False)
        h = norm(net, name + "downsample.1")(shortcut(h))
    return nn.relu(out + h)


NETS: dict[str, Callable[..., Net]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "resnet20": functools.partial(ResNet, depth=20),
    "resnet110": functools.partial(ResNet, depth=110),
}


def shape(name: str) -> tuple[int, int, int]:
    """The shape of one input."""
    return (32, 32, 3) if name.startswith("resnet") else (28, 28, 1)


def variables(name: str, key: jax.Array) -> Any:
    """Random weights, biases and running averages."""
    drawn = jax.jit(NETS[name]().init)(key, jnp.zeros((1, *shape(name))))
    flat: dict[Any, Any] = traverse_util.flatten_dict(drawn)
    keys = jax.random.split(key, len(flat))
    for each, (path, value) in zip(keys, flat.items(), strict=True):
        if path[-1] in ("bias", "mean"):
            flat[path] = 0.1 * jax.random.normal(each, value.shape)
        if path[-1] == "var":
            flat[path] = jax.random.uniform(each, value.shape, minval=0.5, maxval=1.5)
    return traverse_util.unflatten_dict(flat)


WORDS = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def for_torch(name: str, weights: Any) -> dict[str, np.ndarray]:
    """The weights by torch's names and in its layouts."""
    flat = traverse_util.flatten_dict(weights)
    return {
        f"{layer}.{WORDS[word]}": _torch_layout(name, layer, np.asarray(value))
        for (*_, layer, word), value in flat.items()
    }


def _torch_layout(name: str, layer: str, value: np.ndarray) -> np.ndarray:
    if (name, layer) == ("lenet", "7") and value.ndim == 2:  # it reads a feature map
        value = value.reshape(4, 4, 50, 500).transpose(2, 0, 1, 3).reshape(800, 500)
    axes = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim]
    return np.ascontiguousarray(value.transpose(axes))
