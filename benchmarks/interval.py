"""What interval bounds cost, in plain jitted forward passes of the same net.

`python -m benchmarks.interval [--quick] [--json PATH]`. A forward pass costs one multiplication by
each weight, interval bounds two (centre and radius); the proof does the same in float64, with the
rounding of every sum counted.

What stands above 2 is memory traffic. An elementwise step reads both ends for each end it writes,
and |W| of a layer is written out at every call, unless the weights are closed over: at batch 1 that
costs a dense layer more than multiplying by it. Adding |W| up block by block in a scan makes large
dense layers 3 times faster forwards, and 1.2 times slower in a gradient step, so it is not done.
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


class SmallNet(nnx.Module):
    """The small net of Wong and Kolter (ICML 2018): 16 and 32 channels, 4x4, strides 2; 28 x 28."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (4, 4), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (4, 4), strides=2, rngs=rngs)
        self.dense1 = nnx.Linear(7 * 7 * 32, 100, rngs=rngs)
        self.dense2 = nnx.Linear(100, 10, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of x (b, 28, 28, 1)."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


class ResidualNet(nnx.Module):
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


def cases(net: nnx.Module, x: jax.Array, repeats: int) -> dict[str, Callable[[], Any]]:
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
    width = 8 if options.quick else 32
    nets = {
        "small net": (SmallNet(nnx.Rngs(SEED)), (28, 28, 1)),
        "residual net": (ResidualNet(width, nnx.Rngs(SEED)), (32, 32, 3)),
    }
    results = {}
    for name, (net, shape) in nets.items():
        for batch in (16,) if options.quick else (1, 16, 128):
            x = jax.random.uniform(jax.random.key(SEED), (batch, *shape))
            calls = max(1, 64 // batch)
            timed = harness.alternate(cases(net, x, calls), repeats=3 if options.quick else 9)
            seconds = {case: harness.median(values) / calls for case, values in timed.items()}
            ratios = {
                case: value / seconds["forward" + closed_over(case)]
                for case, value in seconds.items()
            }
            title = f"{name}, batch {batch}"
            harness.report(f"{title}: CPU ms", {k: 1e3 * v for k, v in seconds.items()}, "ms")
            harness.report(f"{title}: forward passes", ratios, "x")
            results[title] = {"seconds": seconds, "ratios": ratios}
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
