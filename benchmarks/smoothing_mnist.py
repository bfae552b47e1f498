"""Smoothed LeNets on MNIST: how far do trained nets certify, next to the published ones?

`python -m benchmarks.smoothing_mnist [--quick] [--json PATH] [--sigma 0.5] [--method gaussian]`
with the data in the folder that the variable JAXCERT_DATA names. Trains LeNet 20-50-500 with a loss
of `jaxcert.training.losses`, certifies `--images` images, evenly spread over the test set, with `n`
draws at alpha = 0.001, and prints the certified accuracy and the average certified radius (ACR)
beside those that the authors' logs hold for the same images, where JAXCERT_DATA has these (for a
smaller `n`, those that the same nets would have).

The checkpoint and the log of certificates are in `--folder`, one each per net, and a run that was
interrupted continues from them: `--n 1000` first shows within minutes how good a net is.

LeNet is written in a form that XLA compiles to fast code on CPUs (see `convolution` and `lenet`).
`--only speed` measures that form beside a plain Flax one.
"""

import argparse
import dataclasses
import functools
import gzip
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy import stats

from benchmarks import harness
from jaxcert import Box, evaluate, smoothing
from jaxcert.smoothing import Gaussian, SmoothingPlan
from jaxcert.training.losses.smoothing import consistency, macer, noisy_cross_entropy, stability
from jaxcert.training.losses.smoothing_adversarial import smooth_adv, smooth_mix
from jaxcert.training.losses.smoothing_attack import Ascent

SEED = 0
ALPHA = 1e-3
PUBLISHED_N = 100_000
ROWS = 256  # noisy copies per training step
CHUNK = 100  # noisy copies per forward pass of a certificate
SLICE = 32
LAYOUT = ("NHWC", "HWIO", "NHWC")
PIXELS = Box(0.0, 1.0)

# --- LeNet ----------------------------------------------------------------------------------------
#
# On CPUs, XLA computes the gradients of these convolutions at a fraction of the speed of the
# forward pass (measured in `--only speed`). Two rewritings of the same sums help: the kernel's
# gradient by slices of the batch, which is the number of input channels of that convolution, and
# the input's by slices, with two neighbouring columns of the cotangent as channels of one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution without padding, (b, h, w, c) and (kh, kw, c, o) to (b, h', w', o)."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=LAYOUT)


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, Any]:
    return convolution(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    if stride == 1 and g.shape[2] % 2 == 0:
        towards_x = _input_gradient(kernel, g)
    else:
        plain = functools.partial(
            lax.conv_general_dilated,
            rhs=kernel,
            window_strides=(stride, stride),
            padding="VALID",
            dimension_numbers=LAYOUT,
        )
        (towards_x,) = jax.vjp(plain, x)[1](g)
    return towards_x, _kernel_gradient(x, kernel.shape, g, stride)


convolution.defvjp(_forward, _backward)


def _sliced(values: jax.Array) -> jax.Array:
    """(b, ...) in slices of the batch, where it can be cut evenly."""
    b = len(values)
    return values.reshape(b // SLICE, SLICE, *values.shape[1:]) if b % SLICE == 0 else values[None]


def _kernel_gradient(x: jax.Array, shape: Any, g: jax.Array, stride: int) -> jax.Array:
    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, g = lax.optimization_barrier(
            (part[0].transpose(3, 1, 2, 0), part[1].transpose(1, 2, 0, 3))
        )
        here = lax.conv_general_dilated(
            x, g, (1, 1), "VALID", rhs_dilation=(stride, stride), dimension_numbers=LAYOUT
        )
        return total + lax.optimization_barrier(here)[:, : shape[0], : shape[1]], None

    start = jnp.zeros((shape[2], *shape[:2], shape[3]), x.dtype)
    return lax.scan(add, start, (_sliced(x), _sliced(g)))[0].transpose(1, 2, 0, 3)


def _input_gradient(kernel: jax.Array, g: jax.Array) -> jax.Array:
    # dx[p] = sum_q g[q] F[q - p + kw - 1] with the flipped kernel F. For q = 2 m + d, d = 0 or 1,
    # it is a sum over the pairs m, 2 columns apart, with F shifted by d: F_d[t] = F[t + d - 1].
    kh, kw = kernel.shape[:2]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    pair = [jnp.pad(flipped, ((0, 0), (1 - d, d), (0, 0), (0, 0))) for d in (0, 1)]
    pair = lax.optimization_barrier(jnp.concatenate(pair, axis=2))

    def one(g: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            g.reshape(*g.shape[:2], g.shape[2] // 2, -1),
            pair,
            (1, 1),
            ((kh - 1, kh - 1), (kw, kw)),
            lhs_dilation=(1, 2),
            dimension_numbers=LAYOUT,
        )

    return lax.map(one, _sliced(g)).reshape(len(g), g.shape[1] + kh - 1, g.shape[2] + kw - 1, -1)


def pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2 x 2 window; `lax.reduce_window` has a slower gradient."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2 * c)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[..., :c], x[..., c:])


def pooled_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`pool(convolution(x, kernel, 1))`, for few input channels.

    The four places of a window become channels of one convolution of stride 2, whose kernel holds
    the given one at each of the four shifts.
    """
    shifts = [(i, j) for i in (0, 1) for j in (0, 1)]
    shifted = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in shifts]
    y: Any = convolution(x, jnp.concatenate(shifted, axis=3), 2)
    top, bottom = jnp.split(y, 2, axis=3)
    return functools.reduce(
        jnp.maximum, (*jnp.split(top, 2, axis=3), *jnp.split(bottom, 2, axis=3))
    )


def lenet(params: Any, x: jax.Array) -> jax.Array:
    """Logits (b, 10) of x (b, 28, 28, 1): two 5x5 convolutions, max-pooled, then 500-10."""
    (k1, b1), (k2, b2), (w3, b3), (w4, b4) = params
    x = jax.nn.relu(pooled_convolution(x, k1) + b1)
    x = jax.nn.relu(pool(convolution(x, k2, 1)) + b2)
    x = jax.nn.relu(x.reshape(len(x), -1) @ w3 + b3)
    return x @ w4 + b4


def initial(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    shapes = [(5, 5, 1, 20), (5, 5, 20, 50), (800, 500), (500, 10)]
    start = jax.nn.initializers.he_uniform()
    keys = jax.random.split(key, len(shapes))
    return [(start(k, s), jnp.zeros(s[-1])) for k, s in zip(keys, shapes, strict=True)]


# --- training -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss with its settings for MNIST.

    Attributes:
      loss: (key, f, x, y, ramp, noise=..., n=...) -> (b,), where ramp grows from 0 to 1 over the
        first tenth of the training.
      n: noisy copies of each example.
      epochs: that fit into half an hour of a CPU core.
      published: its name in the file of the published certificates.
    """

    loss: Callable[..., jax.Array]
    n: int
    epochs: int
    published: str


def _without_ramp(loss: Callable[..., jax.Array], **settings: Any) -> Callable[..., jax.Array]:
    return lambda key, f, x, y, ramp, **rest: loss(key, f, x, y, **settings, **rest)


def _smooth_adv(key, f, x, y, ramp, **rest):
    return smooth_adv(key, f, x, y, ascent=Ascent(ramp, 4, valid=PIXELS), **rest)


def _smooth_mix(key, f, x, y, ramp, **rest):
    ascent = Ascent(4.0, 4, 1.0, PIXELS)
    return smooth_mix(key, f, x, y, ascent=ascent, weight=5 * ramp, **rest)


def _macer(key, f, x, y, ramp, **rest):
    return macer(key, f, x, y, weight=jnp.where(ramp < 1, 0.0, 16.0), **rest)


METHODS: Mapping[str, Method] = {
    "gaussian": Method(_without_ramp(noisy_cross_entropy), 1, 90, "Gaussian__Cohen_"),
    "stability": Method(_without_ramp(stability), 1, 45, "Stability"),
    "consistency": Method(_without_ramp(consistency, weight=5.0), 2, 60, "Consistency"),
    "macer": Method(_macer, 16, 8, "MACER"),
    "smoothadv": Method(_smooth_adv, 2, 12, "SmoothAdv"),
    "smoothmix": Method(_smooth_mix, 2, 12, "SmoothMix_eta=5"),
}
WEIGHTS = {0.25: 10.0}  # of consistency, where it is not 5


def method(name: str, sigma: float) -> Method:
    chosen = METHODS[name]
    if name == "consistency" and sigma in WEIGHTS:
        loss = _without_ramp(consistency, weight=WEIGHTS[sigma])
        chosen = dataclasses.replace(chosen, loss=loss)
    return chosen


def images(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (m, 28, 28, 1) in [0, 1] and labels (m,) of "train" or "t10k"."""
    folder = pathlib.Path(os.environ["JAXCERT_DATA"]) / "mnist"
    pixels = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return x.astype(np.float32) / 255, np.frombuffer(labels, np.uint8, offset=8).astype(np.int32)


class Training:
    """SGD with momentum and a cosine schedule; saved after every epoch, and resumed."""

    def __init__(self, chosen: Method, sigma: float, steps: int):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.05, steps // 20 + 1, steps)
        optimiser = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(1e-4),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
        self.params = initial(jax.random.key(SEED))
        self.state, self.steps_done = optimiser.init(self.params), 0
        noise = Gaussian(sigma)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, number, x, y):
            key = jax.random.fold_in(jax.random.key(SEED + 1), number)
            ramp = jnp.minimum(number / max(steps / 10, 1), 1.0)

            def objective(params):
                f = functools.partial(lenet, params)
                return jnp.mean(chosen.loss(key, f, x, y, ramp, noise=noise, n=chosen.n))

            value, gradient = jax.value_and_grad(objective)(params)
            updates, state = optimiser.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self._step = step

    def step(self, x: np.ndarray, y: np.ndarray) -> jax.Array:
        """The mean loss on a batch, before the step."""
        self.params, self.state, loss = self._step(self.params, self.state, self.steps_done, x, y)
        self.steps_done += 1
        return loss

    def save(self, path: pathlib.Path) -> None:
        """Write weights, momentum and progress; a file there is replaced as a whole."""
        leaves = jax.tree.leaves((self.params, self.state))
        aside = path.with_suffix(".new.npz")
        np.savez(aside, *map(np.asarray, leaves), steps_done=self.steps_done)
        aside.replace(path)

    def load(self, path: pathlib.Path) -> None:
        """Continue from what `save` wrote."""
        with np.load(path) as saved:
            self.steps_done = int(saved["steps_done"])
            leaves = [jnp.asarray(saved[f"arr_{i}"]) for i in range(len(saved.files) - 1)]
        structure = jax.tree.structure((self.params, self.state))
        self.params, self.state = jax.tree.unflatten(structure, leaves)


def trained(name: str, sigma: float, epochs: int, path: pathlib.Path) -> Any:
    """The weights after the training, from the checkpoint where it holds them."""
    chosen = method(name, sigma)
    x, y = images("train")
    batch = ROWS // chosen.n
    per_epoch = len(x) // batch
    training = Training(chosen, sigma, epochs * per_epoch)
    if path.exists():
        training.load(path)
    for epoch in range(training.steps_done // per_epoch, epochs):
        order = np.random.default_rng([SEED, epoch]).permutation(len(x))
        began, losses = time.process_time(), []
        for rows in order[: per_epoch * batch].reshape(per_epoch, batch):
            losses.append(training.step(x[rows], y[rows]))
        training.save(path)
        seconds = time.process_time() - began
        mean = float(np.mean(jax.device_get(losses)))
        print(f"epoch {epoch + 1}/{epochs}: loss {mean:.4f}, {seconds:.0f} CPU s", flush=True)
    return training.params


# --- certificates ---------------------------------------------------------------------------------


def certified(params: Any, sigma: float, options: argparse.Namespace, name: str) -> Any:
    """The certificates of images spread over the test set; those in the log are not made again."""
    x, y = images("t10k")
    index = np.arange(0, len(x), len(x) // options.images)[: options.images]
    plan = SmoothingPlan(noise=Gaussian(sigma), n=options.n, alpha=ALPHA, chunk=CHUNK)
    f = jax.tree_util.Partial(lenet, params)
    key = jax.random.key(SEED + 2)

    def certifier(x: Any, index: Any) -> Any:
        return smoothing.certify(key, f, x, plan, index=index)

    config = {
        "net": name,
        "noise": repr(plan.noise),
        "n0": plan.n0,
        "n": plan.n,
        "alpha": plan.alpha,
        "chunk": plan.chunk,
        "seed": SEED + 2,
    }
    path = options.folder / f"{name}_n{options.n}.jsonl"
    return evaluate.run(
        certifier, x[index], y[index], index=index, batch=5, path=path, config=config
    )


def radii(sigma: float) -> list[float]:
    """The radii of the published tables, up to where n = 100,000 saturates."""
    step = 0.25 if sigma < 1 else 0.5
    return [float(r) for r in np.arange(0, 3.8 * sigma, step)]


def published(name: str, sigma: float, index: np.ndarray, n: int) -> dict[str, Any] | None:
    """What the authors' logs say of the same images, the mean over their seeds.

    They were made of 100,000 draws. For fewer, votes are drawn anew from the shares of votes that
    the logs' radii rest on.
    """
    folder = pathlib.Path(os.environ["JAXCERT_DATA"]) / "rs_logs"
    path = folder / f"mnist_{METHODS[name].published}_{sigma}.npz"
    if not path.exists():
        return None
    with np.load(path) as logs:
        right = (logs["predict"] == logs["label"]) & (logs["predict"] >= 0)
        size = np.where(right, logs["radius"].astype(np.float64), -1.0)
    here = size[:, index]
    if n < PUBLISHED_N:
        return {**_rates(_at_fewer_draws(here, sigma, n), sigma), "drawn anew": True}
    return {
        **_rates(here, sigma),
        "acr_all_images": float(np.maximum(size, 0).mean()),
    }


def _rates(size: np.ndarray, sigma: float) -> dict[str, Any]:
    certified = [float((size >= r).mean()) for r in radii(sigma)]
    return {"acr": float(np.maximum(size, 0).mean()), "certified": certified}


def _at_fewer_draws(size: np.ndarray, sigma: float, n: int) -> np.ndarray:
    """Radii, -1 for a wrong class, of votes for the same shares as those of `PUBLISHED_N`."""
    votes = np.arange(PUBLISHED_N // 2, PUBLISHED_N + 1)
    known = np.searchsorted(_lower(votes, PUBLISHED_N), stats.norm.cdf(size / sigma) - 1e-7)
    share = votes[np.minimum(known, len(votes) - 1)] / PUBLISHED_N
    drawn = np.random.default_rng(SEED).binomial(n, share)
    p_lower = _lower(np.arange(n + 1), n)[drawn]
    proved = (size > 0) & (p_lower > 0.5)
    return np.where(proved, sigma * stats.norm.ppf(p_lower), -1.0)


def _lower(votes: np.ndarray, n: int) -> np.ndarray:
    """Clopper-Pearson."""
    bound = stats.beta.ppf(ALPHA, np.maximum(votes, 1), n - votes + 1)
    return np.where(votes > 0, bound, 0.0)


def summary(results: Any, name: str, sigma: float, n: int) -> dict[str, Any]:
    """Prints certified accuracies beside the published ones, and returns them."""
    steps, label = radii(sigma), np.asarray(results.label)
    ours = {
        "acr": float(evaluate.average_certified_radius(results, label)),
        "certified": evaluate.certified_accuracy(results, label, steps).tolist(),
        "abstained": float(evaluate.abstention_rate(results)),
        "images": len(label),
    }
    theirs = published(name, sigma, np.asarray(results.index), n)
    print(f"\n{name}, sigma {sigma}, {len(label)} images: certified % at radius")
    print(f"  {'':<10} {'ACR':>6}  " + " ".join(f"{r:5.2f}" for r in steps))
    for who, row in (("ours", ours), ("published", theirs)):
        if row is not None:
            rates = " ".join(f"{100 * rate:5.1f}" for rate in row["certified"])
            print(f"  {who:<10} {row['acr']:6.3f}  {rates}")
    return {"radii": steps, "ours": ours, "published": theirs}


# --- speed ----------------------------------------------------------------------------------------


def flax_lenet(params: Any, x: jax.Array) -> jax.Array:
    """The same function by the layers of Flax."""
    (k1, b1), (k2, b2), (w3, b3), (w4, b4) = params
    for kernel, bias in ((k1, b1), (k2, b2)):
        layer = nn.Conv(kernel.shape[-1], kernel.shape[:2], padding="VALID")
        convolved: Any = layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        x = nn.max_pool(nn.relu(convolved), (2, 2), (2, 2))
    x = nn.relu(x.reshape(len(x), -1) @ w3 + b3)
    return x @ w4 + b4


def speed(repeats: int) -> dict[str, float]:
    """CPU microseconds per noisy sample, forward and in a training step, of both forms."""
    params, key = initial(jax.random.key(SEED)), jax.random.key(SEED)
    noise, y = Gaussian(0.5), jnp.arange(ROWS) % 10
    x, row = jax.random.uniform(key, (ROWS, 28, 28, 1)), jnp.zeros((1, 28, 28, 1))
    plan = SmoothingPlan(noise=noise, n=20 * CHUNK - 100, alpha=ALPHA, chunk=CHUNK)
    cases, counts = {}, {}
    for form, apply in (("flax", flax_lenet), ("ours", lenet)):
        forward = jax.jit(apply)

        @jax.jit
        def gradient(params, apply=apply):
            f = functools.partial(apply, params)
            return jnp.mean(noisy_cross_entropy(key, f, x, y, noise=noise))

        gradient = jax.jit(jax.grad(gradient))
        f = jax.tree_util.Partial(apply, params)
        cases[f"forward, {form}"] = functools.partial(forward, params, x[:CHUNK])
        cases[f"training step, {form}"] = functools.partial(gradient, params)
        cases[f"certify, {form}"] = functools.partial(smoothing.certify, key, f, row, plan)
        counts |= {f"forward, {form}": CHUNK, f"training step, {form}": ROWS}
        counts |= {f"certify, {form}": plan.n + plan.n0}
    seconds = harness.alternate(cases, repeats)
    rates = {name: 1e6 * harness.median(seconds[name]) / counts[name] for name in cases}
    harness.report("LeNet", rates, "CPU us a sample")
    return rates


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", choices=("speed",), help="measure the forms of LeNet, no more")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--method", choices=tuple(METHODS), default="gaussian")
    parser.add_argument("--epochs", type=int, help="default: what fits into half an hour")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("build/smoothing_mnist")
    )
    options = parser.parse_args()
    if options.only == "speed":
        rates = speed(3 if options.quick else 15)
        return harness.write_json(options.json, {"speed": rates}, seed=SEED)
    if "JAXCERT_DATA" not in os.environ:
        sys.exit("say where the folder mnist with the four IDX files is: JAXCERT_DATA=DIR")
    if options.quick:
        options.epochs, options.images, options.n = 1, 20, 1000
    options.epochs = options.epochs or METHODS[options.method].epochs
    options.folder.mkdir(parents=True, exist_ok=True)
    name = f"{options.method}_{options.sigma}_{options.epochs}epochs"
    path = options.folder / f"{name}.npz"
    params = trained(options.method, options.sigma, options.epochs, path)
    results = certified(params, options.sigma, options, name)
    found = summary(results, options.method, options.sigma, options.n)
    found |= {"epochs": options.epochs, "n": options.n, "alpha": ALPHA}
    harness.write_json(options.json, {name: found}, seed=SEED)
    return None


if __name__ == "__main__":
    main()
