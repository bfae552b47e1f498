"""How close `smoothing.certify` comes to bare forward passes of the model.

`python -m benchmarks.smoothing [--quick] [--json PATH]`, for an MLP 784-256-256-10 and a LeNet
20-50-500. The ratios of speeds are:

- strict: bare jitted forward passes on inputs that already hold their noise, over certify. Drawing
  the noise is all loss here, and bounds the ratio: `bits` is the price of threefry alone, before
  they become normals, and forwards / (forwards + bits) cannot be passed by any sampler that spends
  32 fresh bits of threefry on a pixel.
- with noise: forward passes plus one `jax.random.normal` a batch, both bare, over certify; with
  JAX's default numbering of threefry's counters, and `fast` with the one that certify pins.

`host` is the loop that the published implementations write, in JAX: one dispatch a batch, classes
to the host, counted there.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from jaxcert import smoothing
from jaxcert.smoothing import Gaussian, SmoothingPlan

SEED = 0
SIGMA = 0.25


class MLP(nn.Module):
    """784-256-256-10."""

    @nn.compact
    def __call__(self, x):
        """Logits (b, 10) of x (b, 28, 28, 1)."""
        x = x.reshape(x.shape[0], -1)
        for width in (256, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class LeNet(nn.Module):
    """Two 5x5 convolutions with 20 and 50 channels, max-pooled, then 500-10."""

    @nn.compact
    def __call__(self, x):
        """Logits (b, 10) of x (b, 28, 28, 1)."""
        for channels in (20, 50):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def cases(module: nn.Module, plan: SmoothingPlan) -> dict[str, Callable[[], Any]]:
    """Every case does plan.n + plan.n0 samples of one image, in batches of plan.chunk."""
    key = jax.random.key(SEED)
    x = jax.random.uniform(key, (1, 28, 28, 1))
    variables = module.init(key, x)
    f = jax.tree_util.Partial(module.apply, variables)
    forward = jax.jit(module.apply)
    shape, batches = (plan.chunk, *x.shape[1:]), (plan.n + plan.n0) // plan.chunk
    flat = (plan.chunk, x.size)  # the shape in which a plain draw is cheapest
    noisy = x + SIGMA * jax.random.normal(key, shape)

    def drawing(draw) -> Callable[[], Any]:
        """All draws of a run in one loop on the device, summed so that none is optimised away."""

        @jax.jit
        def run(key):
            def step(c, total):
                return total + draw(jax.random.fold_in(key, c), flat)

            return jax.lax.fori_loop(0, batches, step, jnp.zeros(flat))

        return lambda: run(key)

    def fast_bits(key, shape):
        with jax.threefry_partitionable(False):
            return jax.random.bits(key, shape).astype(jnp.float32)

    def fast_normal(key, shape):
        with jax.threefry_partitionable(False):
            return jax.random.normal(key, shape)

    @jax.jit
    def classes(variables, key, c):
        noise = jax.random.normal(jax.random.fold_in(key, c), shape)
        return jnp.argmax(module.apply(variables, x + SIGMA * noise), axis=1)

    def host():
        counts = np.zeros(10, int)
        for c in range(batches):
            counts += np.bincount(np.asarray(classes(variables, key, c)), minlength=10)
        return counts

    return {
        "certify": lambda: smoothing.certify(key, f, x, plan),
        "forwards": lambda: [forward(variables, noisy) for _ in range(batches)][-1],
        "normal": drawing(jax.random.normal),
        "normal, fast counters": drawing(fast_normal),
        "bits, fast counters": drawing(fast_bits),
        "host": host,
    }


def compare(name: str, module: nn.Module, chunk: int, batches: int, repeats: int) -> dict:
    plan = SmoothingPlan(noise=Gaussian(SIGMA), n0=100, n=chunk * batches - 100, chunk=chunk)
    seconds = harness.alternate(cases(module, plan), repeats)
    cost = {case: harness.median(times) for case, times in seconds.items()}
    samples = chunk * batches
    rates = {case: 1e6 * value / samples for case, value in cost.items()}
    ratios = {
        "strict: forwards / certify": cost["forwards"] / cost["certify"],
        "its limit: forwards / (forwards + bits)": cost["forwards"]
        / (cost["forwards"] + cost["bits, fast counters"]),
        "with noise: (forwards + normal) / certify": (cost["forwards"] + cost["normal"])
        / cost["certify"],
        "with noise, fast: (forwards + normal) / certify": (
            cost["forwards"] + cost["normal, fast counters"]
        )
        / cost["certify"],
        "host loop / certify": cost["host"] / cost["certify"],
    }
    harness.report(f"{name}, chunk {chunk}, {samples} samples", rates, "CPU us a sample")
    harness.report(f"{name}, chunk {chunk}: ratios of speeds", ratios, "")
    return {"chunk": chunk, "samples": samples, "cpu_us_per_sample": rates, "ratios": ratios}


def main() -> None:
    options = harness.arguments(__doc__)
    repeats, scale = (3, 1) if options.quick else (9, 5)
    results = {
        "mlp": compare("MLP", MLP(), 400, 20 * scale, repeats),
        "mlp, larger chunk": compare("MLP", MLP(), 1000, 8 * scale, repeats),
        "lenet": compare("LeNet", LeNet(), 400, 2 * scale, repeats),
        "lenet, smaller chunk": compare("LeNet", LeNet(), 100, 8 * scale, repeats),
    }
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
