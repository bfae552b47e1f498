"""What interval bounds cost, in plain jitted forward passes of the same net.

`python -m benchmarks.interval [--quick] [--json PATH]`. A forward pass costs one multiplication by
each weight, interval bounds two (centre and radius); the proof does the same in float64, with the
rounding of every sum counted. At batch 1 with weights as arguments, forming |W| of a dense layer
costs more than multiplying by it; with weights closed over it is formed once, at compilation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import harness
from jaxcert import LinfBall, margins
from jaxcert.bounds import ibp

SEED = 0
EPS = 2 / 255


class ConvNet(nnx.Module):
    """Four convolutions with batch normalisation, one residual block, two dense layers; 32 x 32."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        def conv(inputs, outputs, strides):
            return nnx.Conv(inputs, outputs, (3, 3), strides=strides, rngs=rngs)

        widths = [
            (3, width, 1),
            (width, width, 2),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
        ]
        self.convs = nnx.List([conv(*each) for each in widths])
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.dense1 = nnx.Linear(8 * 8 * 2 * width, 128, rngs=rngs)
        self.dense2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of x (b, 32, 32, 3)."""
        first, second, third, fourth = self.convs
        x = nnx.relu(self.norm(first(x)))
        x = nnx.relu(third(nnx.relu(second(x))))
        x = nnx.relu(x + fourth(x))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def cases(net: ConvNet, x: jax.Array, repeats: int) -> dict[str, Callable[[], Any]]:
    """`repeats` calls each, with the weights as arguments."""
    spec = margins(jnp.zeros(len(x), int), 10)
    functions = {
        "forward": lambda net, x: net(x),
        "ibp": lambda net, x: ibp(net)(LinfBall(x, EPS)),
        "ibp of the margins": lambda net, x: ibp(net)(LinfBall(x, EPS), spec),
        "proof (outward) of the margins": lambda net, x: ibp(net, outward=True)(
            LinfBall(x, EPS), spec
        ),
    }

    def repeated(f, *args):
        f = jax.jit(f)
        return lambda: [f(*args) for _ in range(repeats)]

    closed = {
        "forward, weights closed over": lambda x: net(x),
        "ibp, weights closed over": lambda x: ibp(net)(LinfBall(x, EPS)),
    }
    return {
        **{name: repeated(f, net, x) for name, f in functions.items()},
        **{name: repeated(f, x) for name, f in closed.items()},
    }


def closed_over(name: str) -> str:
    """What tells the cases apart in which XLA knows the weights, and so their sizes |W|."""
    return name[name.index(",") :] if "," in name else ""


def main() -> None:
    """Print CPU seconds per call and ratios to the forward pass."""
    options = harness.arguments(__doc__)
    results = {}
    for batch in (16,) if options.quick else (1, 16, 128):
        net = ConvNet(8 if options.quick else 32, nnx.Rngs(SEED))
        x = jax.random.uniform(jax.random.key(SEED), (batch, 32, 32, 3))
        calls = max(1, 64 // batch)
        timed = harness.alternate(cases(net, x, calls), repeats=3 if options.quick else 9)
        seconds = {name: harness.median(values) / calls for name, values in timed.items()}
        ratios = {
            name: value / seconds["forward" + closed_over(name)] for name, value in seconds.items()
        }
        harness.report(f"batch {batch}: CPU ms", {k: 1e3 * v for k, v in seconds.items()}, "ms")
        harness.report(f"batch {batch}: forward passes", ratios, "x")
        results[f"batch {batch}"] = {"seconds": seconds, "ratios": ratios}
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
