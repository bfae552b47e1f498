"""Certify a data set on all chips of a cluster, or on the two cores at hand.

On one machine, all of its devices share the work:

    python examples/smoothing_cluster.py --images 64 --n 1000

On a cluster, start it on every host; TPU pods and Slurm tell jax.distributed who they are:

    python examples/smoothing_cluster.py --cluster --out gs-or-shared-folder ...

elsewhere say so: --coordinator HOST:PORT --processes 4 --process 0 (to 3).

Every process takes every m-th image, and shares the draws of each over its own devices; noise
depends on the seed and the image's number alone, so that the result is the same for any number of
processes and devices. Each keeps a log of its own, which survives being killed: start the same
command again to continue. The first process puts the logs together once all are complete.
"""

import argparse
import pathlib
import time

import jax
import numpy as np
from flax import nnx

from jaxcert import evaluate, smoothing

SEED = 0
LEVELS = 255


class ConvNet(nnx.Module):
    """Stands for the net to certify: replace it, and load weights."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, channels, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(channels, 2 * channels, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(2 * channels, 10, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of images (b, h, w, 3)."""
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.head(x.mean((1, 2)))


def images(path: pathlib.Path | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images k / 255 and labels: those of an .npz with `x` (uint8) and `y`, or made up."""
    if path is None:
        rng = np.random.default_rng(SEED)
        x, y = rng.integers(0, LEVELS + 1, (count, 32, 32, 3)), rng.integers(0, 10, count)
    else:
        with np.load(path) as data:
            x, y = data["x"][:count], data["y"][:count]
    return (x / LEVELS).astype(np.float32), y.astype(int)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help=".npz with x uint8 (m, h, w, 3) and y")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=200, help="noisy copies per forward pass")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("smoothing-cluster"))
    parser.add_argument("--cluster", action="store_true", help="let JAX find the other processes")
    parser.add_argument("--coordinator", help="HOST:PORT of the first process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.cluster:
        jax.distributed.initialize()
    elif options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    process, processes = jax.process_index(), jax.process_count()
    x, y = images(options.data, options.images)
    mine = np.arange(process, len(x), processes)
    options.out.mkdir(parents=True, exist_ok=True)
    logs = [options.out / f"{i}-of-{processes}.jsonl" for i in range(processes)]
    plan = smoothing.SmoothingPlan(
        noise=smoothing.GridGaussian(options.sigma), n=options.n, chunk=options.chunk
    )
    evaluate.run_smoothing(
        SEED,
        ConvNet(16, nnx.Rngs(SEED)),
        x[mine],
        y[mine],
        plan,
        net="ConvNet(16), seed 0",
        path=logs[process],
        index=mine,
        batch=8,
        mesh=jax.make_mesh(
            (len(jax.local_devices()),),
            ("samples",),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.local_devices(),
        ),
    )
    if process == 0:
        finish(logs, options.out / "all.jsonl", len(x))


def finish(logs: list[pathlib.Path], whole: pathlib.Path, m: int) -> None:
    """Wait for the other processes' logs, and print the table of all."""
    while sum(recorded(log) for log in logs) < m:
        time.sleep(1)
    whole.unlink(missing_ok=True)
    results = evaluate.merge(logs, whole)
    evaluate.show([evaluate.row("the net", results, (0.0, 0.25, 0.5))])
    print(f"votes of all {m} images: {whole}")


def recorded(log: pathlib.Path) -> int:
    """How many records another process has written so far: lines after the header."""
    return max(log.read_bytes().count(b"\n") - 1, 0) if log.exists() else 0


if __name__ == "__main__":
    main()
