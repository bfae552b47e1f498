"""Train three small nets on real digits and certify held-out images three ways.

    python examples/quickstart.py            # under 90 seconds on two CPU cores
    python examples/quickstart.py --short    # a smaller run of the same program

The images are scikit-learn's bundled digits: 1797 real scans of 8 x 8 pixels, scaled to [0, 1].
Writes a plot of the certified accuracy and one log of certificates per net.
"""

import argparse
import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxcert import Box, LinfBall, bounds, evaluate, lipschitz, margins, smoothing

SIGMA = 0.25  # of the smoothing noise, in pixel values
L2_RADII = (0.1, 0.25, 0.5, 0.75)  # what the table shows
LINF_RADII = (0.02, 0.04, 0.06, 0.08, 0.1)
LINF_GRID = np.arange(1, 17) / 100  # where interval bounds are tried
PIXELS = Box(0.0, 1.0)


class ConvNet(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs, strides: int = 2, channels: int = 16, activation=nnx.relu):
        side = 8 // strides
        self.conv1 = nnx.Conv(1, channels, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), strides=strides, rngs=rngs)
        self.dense1 = nnx.Linear(side * side * channels, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        """Logits (b, 10) of x (b, 8, 8, 1)."""
        x = self.activation(self.conv1(x))
        x = self.activation(self.conv2(x))
        x = self.activation(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- One loss per certifier: (net, images, labels, key, progress in [0, 1]) -> scalar -------------


def noisy_loss(net, x, y, key, progress):
    """Cross-entropy under the noise that the certificate will be about (Cohen et al., 2019)."""
    return cross_entropy(net(x + SIGMA * jax.random.normal(key, x.shape)), y)


def interval_loss(net, x, y, key, progress):
    """Cross-entropy of the worst logits inside a box that grows (Gowal et al., 2019)."""
    eps = 1.1 * LINF_RADII[-1] * jnp.minimum(2 * progress, 1)
    worst_margins = bounds.ibp(net)(LinfBall(x, eps, PIXELS), margins(y, 10)).lower
    worst = jnp.concatenate([jnp.zeros((len(y), 1)), -worst_margins], axis=1)
    robust = cross_entropy(worst, jnp.zeros_like(y))
    return robust + (1 - progress) * cross_entropy(net(x), y)


def lipschitz_loss(net, x, y, key, progress):
    """Cross-entropy with every wrong logit raised by what a perturbation of norm 0.5 could add
    (Tsuzuku et al., 2018; Leino et al., 2021)."""
    radius = 0.5 * jnp.minimum(2 * progress, 1)
    rise = jnp.sqrt(2.0) * radius * lipschitz.constant(net, x.shape[1:])
    return cross_entropy(net(x) + rise * (1 - jax.nn.one_hot(y, 10)), y)


def train(name, net, loss, data, *, epochs, rate=5e-3, batch=100, seed=0):
    """Adam with a cosine schedule; prints a line every few epochs."""
    x, y = data
    steps = len(x) // batch
    graph, params = nnx.split(net)
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    # A jitted step in a Python loop: on CPU the gradients of convolutions are several times slower
    # inside of lax.scan.
    @jax.jit
    def step(params, state, rows, key, number):
        def objective(params):
            progress = number / (epochs * steps)
            return loss(nnx.merge(graph, params), x[rows], y[rows], key, progress)

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = optimiser.init(params)
    order = np.random.default_rng(seed)
    for number in range(epochs * steps):
        if number % steps == 0:
            shuffled = order.permutation(len(x))[: steps * batch].reshape(steps, batch)
        key = jax.random.fold_in(jax.random.key(seed), number)
        params, state, value = step(params, state, shuffled[number % steps], key, number)
        epoch, last = divmod(number + 1, steps)
        if not last and epoch % max(1, epochs // 4) == 0:
            print(f"  {name}: epoch {epoch:3d}/{epochs}  loss {value:.3f}", flush=True)
    return nnx.merge(graph, params)


# --- One certifier per net: (images, index) -> Certificate ----------------------------------------


def interval_certificate(net, x, index):
    """The largest radius of a grid at which interval bounds prove the prediction."""
    found = [bounds.certify(net, LinfBall(x, eps, PIXELS)) for eps in LINF_GRID]
    radius = functools.reduce(jnp.maximum, [certificate.radius for certificate in found])
    return dataclasses.replace(found[0], radius=radius)


def smoothed_certificate(net, plan, x, index):
    return smoothing.certify(jax.random.key(7), net, x, plan, index=index)


def lipschitz_certificate(net, x, index):
    return lipschitz.certify(net, x)


def digits():
    """Train and test images (b, 8, 8, 1) in [0, 1] and labels; every fifth scan is held out."""
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    y = jnp.asarray(labels, jnp.int32)
    held_out = np.arange(len(y)) % 5 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer epochs, images and samples")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quickstart-results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    training, (x, y) = digits()
    epochs = 8 if options.short else 60
    if options.short:
        x, y = x[:60], y[:60]
    plan = smoothing.SmoothingPlan(
        noise=smoothing.Gaussian(SIGMA), n0=100, n=500 if options.short else 10_000, alpha=1e-3
    )
    print(f"training three nets on {len(training[1])} scans")
    noisy = train("noise", ConvNet(nnx.Rngs(1)), noisy_loss, training, epochs=epochs)
    boxed = train("interval", ConvNet(nnx.Rngs(2)), interval_loss, training, epochs=epochs)
    tight = ConvNet(nnx.Rngs(3), strides=1, channels=4, activation=jnp.abs)
    tight = train("lipschitz", tight, lipschitz_loss, training, epochs=epochs, rate=1e-2)

    certifiers = {
        "smoothed net, trained with noise": functools.partial(smoothed_certificate, noisy, plan),
        "Lipschitz net, trained for its margin": functools.partial(lipschitz_certificate, tight),
        "interval net, trained on its bounds": functools.partial(interval_certificate, boxed),
    }
    results = {}
    for name, certifier in certifiers.items():
        print(f"certifying {len(y)} held-out scans: {name}", flush=True)
        log = options.out / f"{name.split()[0].lower()}.jsonl"
        log.unlink(missing_ok=True)  # the nets are new, so an old log is another run's
        config = {"certifier": name, "sigma": SIGMA, "n": plan.n, "alpha": plan.alpha}
        results[name] = evaluate.run(certifier, x, y, path=log, config=config, batch=60)

    radii = {name: L2_RADII if results[name].norm == 2 else LINF_RADII for name in results}
    print()
    evaluate.show([evaluate.row(name, results[name], radii[name]) for name in results])
    picture = options.out / "certified_accuracy.png"
    evaluate.plot_certified_accuracy(results, picture, title="Held-out digits", unit="pixel values")
    print(f"\nplot and logs are in {options.out}/; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
