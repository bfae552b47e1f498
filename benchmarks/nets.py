"""ReLU nets for benchmarks, with published weights where the data folder has them."""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxcert import LinfBall

SEED = 0
EPS = 2 / 255


@dataclasses.dataclass(frozen=True)
class Net:
    """A ReLU net whose weights are a dict of pairs (kernel, bias).

    Attributes:
      apply: (weights, x) -> logits.
      layers: shapes of the kernels, (height, width, in, out) or (in, out), in order.
      shape: of one input.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    layers: Mapping[str, tuple[int, ...]]
    shape: tuple[int, int, int]


def dense(layer, x):
    kernel, bias = layer
    return x @ kernel + bias


def conv(layer, x, stride, pad):
    kernel, bias = layer
    window = {"window_strides": (stride, stride), "padding": ((pad, pad), (pad, pad))}
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, **window, dimension_numbers=axes) + bias


def flat(x):
    return x.reshape(x.shape[0], -1)


def mlp(w, x):
    x = flat(x)
    for i in range(len(w) - 1):
        x = nnx.relu(dense(w[f"l.{i}"], x))
    return dense(w[f"l.{len(w) - 1}"], x)


def cnn(w, x):
    x = nnx.relu(conv(w["conv1"], x, 2, 1))
    x = nnx.relu(conv(w["conv2"], x, 2, 1))
    return dense(w["fc2"], nnx.relu(dense(w["fc1"], flat(x))))


def resnet(w, x):
    """A strided convolution, residual blocks (strided where they have a shortcut), two dense."""
    x = nnx.relu(conv(w["conv1"], x, 2, 1))
    for i in range(sum(name.endswith("conv2") for name in w)):
        block = f"layer1.{i}."
        shortcut = w.get(block + "shortcut.0")
        y = nnx.relu(conv(w[block + "conv1"], x, 2 if shortcut else 1, 1))
        y = conv(w[block + "conv2"], y, 1, 1)
        x = nnx.relu(y + (conv(shortcut, x, 2, 0) if shortcut else x))
    return dense(w["linear2"], nnx.relu(dense(w["linear1"], flat(x))))


def _mlp(*widths: int) -> Net:
    pairs = itertools.pairwise(widths)
    return Net(mlp, {f"l.{i}": pair for i, pair in enumerate(pairs)}, (28, 28, 1))


def _cnn(size: int, channels: int) -> Net:
    convs = {"conv1": (4, 4, channels, 8), "conv2": (4, 4, 8, 16)}
    denses = {"fc1": (16 * (size // 4) ** 2, 256), "fc2": (256, 10)}
    return Net(cnn, {**convs, **denses}, (size, size, channels))


def _resnet(first: int, *widths: int) -> Net:
    """Blocks of these widths, on 32x32x3; a new width comes with stride 2."""
    layers, before, size = {"conv1": (3, 3, 3, first)}, first, 16
    for i, width in enumerate(widths):
        layers[f"layer1.{i}.conv1"] = (3, 3, before, width)
        layers[f"layer1.{i}.conv2"] = (3, 3, width, width)
        if width != before:
            layers[f"layer1.{i}.shortcut.0"] = (1, 1, before, width)
            size //= 2
        before = width
    layers |= {"linear1": (size * size * before, 100), "linear2": (100, 10)}
    return Net(resnet, layers, (32, 32, 3))


NETS = {
    "mlp_s": _mlp(784, 64, 64, 10),
    "mlp": _mlp(784, 256, 256, 256, 256, 10),
    "cnn28": _cnn(28, 1),
    "cnn32": _cnn(32, 3),
    "resnet2b": _resnet(8, 16, 16),
}
LARGE = _resnet(16, 16, 32, 32, 32)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A net with weights and inputs; `saved` holds published bounds, if there are any."""

    name: str
    apply: Callable[[Any, jax.Array], jax.Array]
    weights: Any
    x: jax.Array
    eps: jax.Array
    saved: Mapping[str, np.ndarray]

    def ball(self, batch: int) -> LinfBall:
        """Around the first inputs."""
        return LinfBall(self.x[:batch], self.eps)

    def closed(self, x: jax.Array) -> jax.Array:
        """The net with its weights closed over."""
        return self.apply(self.weights, x)


def random_case(name: str, net: Net, batch: int) -> Case:
    random = np.random.default_rng(SEED)
    weights = {}
    for layer, shape in net.layers.items():
        kernel = random.normal(size=shape, scale=math.sqrt(2 / math.prod(shape[:-1])))
        weights[layer] = jnp.asarray(kernel, "float32"), jnp.zeros(shape[-1], "float32")
    x = jnp.asarray(random.uniform(size=(batch, *net.shape)), "float32")
    return Case(name, net.apply, weights, x, jnp.float32(EPS), {})


def saved_case(name: str, net: Net, path: pathlib.Path) -> Case:
    """Weights and inputs from a file in channels-first order."""
    saved = dict(np.load(path))
    weights, channels = {}, net.shape[-1]
    for layer, shape in net.layers.items():
        kernel = saved[f"w/{layer}.weight"]
        if len(shape) == 4:
            kernel, channels = kernel.transpose(2, 3, 1, 0), shape[-1]
        elif channels:  # the first dense layer reads a feature map
            kernel = kernel.reshape(shape[1], channels, -1).transpose(2, 1, 0).reshape(shape)
            channels = 0
        else:
            kernel = kernel.T
        weights[layer] = jnp.asarray(kernel), jnp.asarray(saved[f"w/{layer}.bias"])
    x = jnp.asarray(saved["x"].transpose(0, 2, 3, 1))
    case = Case(name, net.apply, weights, x, jnp.asarray(saved["eps"], "float32"), saved)
    np.testing.assert_allclose(jax.jit(case.closed)(x), saved["y"], atol=1e-4, rtol=1e-4)
    return case


def load(names: Sequence[str], data: str | None) -> list[Case]:
    if data is None:
        print("no data folder (--data or JAXCERT_DATA): random weights, no comparison with peers")
        return [random_case(name, NETS[name], 128) for name in names]
    folder = pathlib.Path(data) / "autolirpa_ref"
    return [saved_case(name, NETS[name], folder / f"{name}.npz") for name in names]
