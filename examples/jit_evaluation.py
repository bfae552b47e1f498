"""One jitted function from a batch to a Certificate for each certifier.

    python examples/jit_evaluation.py

Certifiers are pure functions: they go inside jit, vmap and a training step like any other, here
with the net's weights as arguments, so that the second net below compiles nothing.
"""

import collections

import jax
from flax import nnx

from jaxcert import LinfBall, bounds, lipschitz, smoothing


class Net(nnx.Module):
    """A convolution and two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(8 * 8 * 4, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of x (b, 8, 8, 1)."""
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1)
        return self.out(nnx.relu(self.hidden(x)))


TRACES = collections.Counter()  # a jitted function's Python body runs once per compilation
PLAN = smoothing.SmoothingPlan(noise=smoothing.Gaussian(0.25), n0=50, n=1000, alpha=1e-3)


@jax.jit
def by_interval_bounds(net, x):
    TRACES["interval bounds"] += 1
    return bounds.certify(net, LinfBall(x, 1e-3))


@jax.jit
def by_lipschitz_margin(net, x):
    TRACES["Lipschitz margin"] += 1
    return lipschitz.certify(net, x)


@jax.jit
def by_smoothing(net, x, key):
    TRACES["smoothing"] += 1
    return smoothing.certify(key, net, x, PLAN)


def main():
    x = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
    for seed in (0, 1):
        net = Net(nnx.Rngs(seed))
        certificates = {
            "interval bounds": by_interval_bounds(net, x),
            "Lipschitz margin": by_lipschitz_margin(net, x),
            "smoothing": by_smoothing(net, x, jax.random.key(1)),
        }
        for name, certificate in certificates.items():
            radii = ", ".join(f"{radius:.4f}" for radius in certificate.radius)
            print(f"net {seed}, {name:16s} norm {certificate.norm:g}: radii {radii}")
    print(f"programs compiled for two nets: {dict(TRACES)}")


if __name__ == "__main__":
    main()
