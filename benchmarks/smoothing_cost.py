"""What certifying ImageNet by smoothing costs on 1 to 1024 chips, from a measured or assumed rate.

`python -m benchmarks.smoothing_cost [--quick] [--json PATH] [--n 100000] [--images 50000]` times a
ResNet-50 under `smoothing.certify` on the devices at hand, and prints the hours for the data set on
as many of them as there may be. Rows of other chips are assumptions: seconds per noisy sample are
FLOPs of the net / (published peak x utilisation).

Communication. Processes of a cluster take images of their own, and send nothing (see
`examples/smoothing_cluster.py`). Chips that share the draws of an image add up its 2 k votes
once, after all draws: 8 k bytes through a ring of m chips, 2 (m - 1) / m times, at the bandwidth
of the links, plus 2 (m - 1) times their latency.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import harness
from jaxcert import smoothing

SEED = 0
CLASSES = 1000
FLOPS = 8.2e9  # of ResNet-50 at 224 x 224: 4.1e9 multiply-adds
CHIPS = (1, 8, 64, 256, 1024)
# name: (peak in FLOP/s, utilisation, link in bytes/s, latency in s). Peaks and links are those of
# the vendors' data sheets, dense bfloat16; utilisation and latency are assumptions.
ASSUMED = {
    "TPU v5e": (197e12, 0.4, 200e9, 5e-6),
    "H100 SXM": (989e12, 0.4, 450e9, 5e-6),
}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; batch normalisation folded into the convolutions."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x):
        """(b, h, w, c) -> (b, h / stride, w / stride, 4 channels)."""
        y = nn.relu(nn.Conv(self.channels, (1, 1))(x))
        y = nn.relu(nn.Conv(self.channels, (3, 3), strides=self.stride)(y))
        y = nn.Conv(4 * self.channels, (1, 1))(y)
        if x.shape != y.shape:
            x = nn.Conv(4 * self.channels, (1, 1), strides=self.stride)(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al. (CVPR 2016)."""

    @nn.compact
    def __call__(self, x):
        """Logits (b, 1000) of x (b, 224, 224, 3)."""
        x = nn.relu(nn.Conv(64, (7, 7), strides=2)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and block == 0 else 1)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def measured(samples: int, repeats: int, size: int) -> float:
    """Seconds per noisy sample of `certify` on one device, by the clock: chips do not share."""
    module, x = ResNet50(), jnp.full((1, size, size, 3), 0.5)
    f = jax.tree_util.Partial(module.apply, module.init(jax.random.key(SEED), x))
    plan = smoothing.SmoothingPlan(
        noise=smoothing.GridGaussian(0.5, levels=2), n=samples - 4, n0=4, chunk=4, alpha=0.4
    )
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(smoothing.certify(jax.random.key(SEED), f, x, plan))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / samples


def hours(per_sample: float, n: int, images: int, chips: int) -> float:
    """Wall hours of a data set, in whole images per chip."""
    return math.ceil(images / chips) * n * per_sample / 3600


def reduction(chips: int, link: float, latency: float) -> float:
    """Seconds to add up an image's votes over so many chips."""
    return 2 * (chips - 1) * (8 * CLASSES / chips / link + latency)


def row(name: str, per_sample: float, n: int, images: int) -> dict[str, Any]:
    spent = {chips: hours(per_sample, n, images, chips) for chips in CHIPS}
    print(f"{name:<34}{per_sample:12.3g}" + "".join(f"{spent[c]:12.4g}" for c in CHIPS))
    return {"seconds_per_sample": per_sample, "hours": spent}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=50_000)
    options = parser.parse_args()
    size = 64 if options.quick else 224
    device = jax.devices()[0].device_kind
    rate = measured(16 if options.quick else 40, 1 if options.quick else 3, size)
    rate *= (224 / size) ** 2
    print(f"{'hours for all images':<34}{'s / sample':>12}" + "".join(f"{c:>12}" for c in CHIPS))
    results = {f"measured: {device}": row(f"measured: {device}", rate, options.n, options.images)}
    for name, (peak, utilisation, link, latency) in ASSUMED.items():
        label = f"assumed: {name}, {100 * utilisation:.0f}% of peak"
        results[label] = row(label, FLOPS / (peak * utilisation), options.n, options.images)
        spent = options.n * FLOPS / (peak * utilisation)
        added = reduction(CHIPS[-1], link, latency)
        results[label]["reduction_s_per_image"] = added
        print(
            f"    {spent:.3g} s an image on one chip; sharing its draws over {CHIPS[-1]} chips "
            f"takes {spent / CHIPS[-1]:.3g} s and {added:.2g} s of communication"
        )
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
