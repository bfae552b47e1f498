"""The trained networks whose auto_LiRPA bounds are saved in the reference data, in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def load(folder, name):
    """(saved arrays, f, inputs, eps) of `mlp_s` or `cnn28`; f takes (b, 784) or (b, 28, 28, 1)."""
    saved = np.load(folder / "autolirpa_ref" / f"{name}.npz")
    weights = {key[2:]: jnp.asarray(saved[key]) for key in saved.files if key.startswith("w/")}
    x = jnp.asarray(saved["x"])
    if name.startswith("mlp"):
        build, x = _mlp, x.reshape(len(x), -1)
    else:
        build, x = _cnn, x.transpose(0, 2, 3, 1)
    return saved, jax.tree_util.Partial(build, weights), x, jnp.float32(saved["eps"])


def _linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _mlp(weights, x):
    last = len(weights) // 2 - 1
    for i in range(last):
        x = jax.nn.relu(_linear(weights, f"l.{i}", x))
    return _linear(weights, f"l.{last}", x)


def _cnn(weights, x):
    for name in ("conv1", "conv2"):
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + weights[f"{name}.bias"])
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch flattens channels first
    return _linear(weights, "fc2", jax.nn.relu(_linear(weights, "fc1", x)))
