"""Train 1-Lipschitz nets and print their certified accuracy; three certificates of one plain net.

    python examples/lipschitz.py --data DIR    # MNIST, the four IDX files in DIR, .gz or not
    python examples/lipschitz.py               # scikit-learn's digits instead
    python examples/lipschitz.py --short       # a smaller run of the same program

Two nets of orthogonal dense layers and maxmin differ in the margin that their loss asks for: the
first is the more accurate one, the second certifies larger radii. Beside them stands randomized
smoothing of a plain net trained with noise, on the first of the same images. Then a plain 3 x 64
ReLU net is frozen, and ten images get L2 radii from its global Lipschitz constant, from local
constants and from exact search. Writes a plot and a log of certificates per net.
"""

import argparse
import functools
import gzip
import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from jaxcert import evaluate, exact, lipschitz, nn, smoothing
from jaxcert.training import losses

matplotlib.use("Agg")
RADII = (0.3, 0.5, 1.0, 1.58)
SIGMA = 0.5  # of the smoothing noise


class LipschitzNet(nnx.Module):
    """Orthogonal dense layers with maxmin between them: 1-Lipschitz up to the logits."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        sizes = [inputs, width, width, width]
        pairs = itertools.pairwise(sizes)
        self.hidden = nnx.List([nn.BjorckDense(a, b, steps=2, rngs=rngs) for a, b in pairs])
        self.head = nn.BjorckDense(width, 10, steps=2, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of x (b, *input)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nn.maxmin(layer(x))
        return self.head(x)


class PlainNet(nnx.Module):
    """Dense layers with ReLU."""

    def __init__(self, sizes: list[int], rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x):
        """Logits (b, 10) of x (b, *input)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


# --- Losses: (net, images, labels, key) -> scalar -------------------------------------------------


def margin_loss(net, x, y, key, *, radius):
    """Cross-entropy that asks for the margin of a certified radius."""
    offset = np.sqrt(2) * radius
    return losses.offset_cross_entropy(net(x), y, offset=offset, temperature=0.25).mean()


def noisy_loss(net, x, y, key):
    """Cross-entropy under the noise that the certificate will be about (Cohen et al., 2019)."""
    noisy = x + SIGMA * jax.random.normal(key, x.shape)
    return optax.softmax_cross_entropy_with_integer_labels(net(noisy), y).mean()


def plain_loss(net, x, y, key):
    """Cross-entropy and weight decay, which keeps the constants of a plain net moderate."""
    decay = sum(jnp.sum(layer.kernel[...] ** 2) for layer in net.layers)
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean() + 1e-3 * decay


def train(name, net, loss, data, *, epochs, rate, batch=256, seed=0):
    """Adam with warm-up and a cosine schedule; prints a line every few epochs."""
    x, y = data
    steps = len(x) // batch
    graph, params = nnx.split(net)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, max(1, epochs * steps // 50), epochs * steps
    )
    optimiser = optax.adam(schedule)

    def step(carry, batch_and_key):
        (params, state), (rows, key) = carry, batch_and_key
        value, grads = jax.value_and_grad(
            lambda params: loss(nnx.merge(graph, params), x[rows], y[rows], key)
        )(params)
        updates, state = optimiser.update(grads, state)
        model = nnx.merge(graph, optax.apply_updates(params, updates))
        nn.retract(model)  # back to orthogonal kernels
        return (nnx.split(model)[1], state), value

    # Layers are dense: on CPU convolutions would be slower inside of lax.scan.
    epoch = jax.jit(lambda carry, rows, keys: jax.lax.scan(step, carry, (rows, keys)))
    carry, order, began = (params, optimiser.init(params)), np.random.default_rng(seed), time.time()
    for number in range(epochs):
        rows = order.permutation(len(x))[: steps * batch].reshape(steps, batch)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), steps)
        carry, values = epoch(carry, jnp.asarray(rows, jnp.int32), keys)
        if (number + 1) % max(1, epochs // 5) == 0:
            print(
                f"  {name}: epoch {number + 1:3d}/{epochs}  loss {jnp.mean(values):.3f}  "
                f"{time.time() - began:.0f} s",
                flush=True,
            )
    return nnx.merge(graph, carry[0])


# --- Data -----------------------------------------------------------------------------------------


def read_idx(folder, stem):
    """An array from an IDX file, whose header holds its number of axes and their lengths."""
    found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.exists()]
    if not found:
        raise SystemExit(f"no {stem} or {stem}.gz in {folder}; it takes the four files of MNIST")
    content = found[0].read_bytes()
    if found[0].suffix == ".gz":
        content = gzip.decompress(content)
    axes = content[3]
    shape = np.frombuffer(content, ">i4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load(folder):
    """Training and test images in [0, 1] with labels."""
    if folder is not None:
        arrays = [
            read_idx(folder, f"{part}-{kind}")
            for part in ("train", "t10k")
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        images, labels = arrays[::2], arrays[1::2]
        x = [jnp.asarray(a, jnp.float32) / 255 for a in images]
    else:
        scans, targets = load_digits(return_X_y=True)
        held_out = np.arange(len(targets)) % 5 == 0
        images = [scans[~held_out], scans[held_out]]
        labels = [targets[~held_out], targets[held_out]]
        x = [jnp.asarray(a.reshape(-1, 8, 8) / 16, jnp.float32) for a in images]
    y = [jnp.asarray(a, jnp.int32) for a in labels]
    return (x[0], y[0]), (x[1], y[1])


# --- Certificates ---------------------------------------------------------------------------------


def lipschitz_certificate(net, x, index):
    return lipschitz.certify(net, x)


def smoothed_certificate(net, plan, x, index):
    return smoothing.certify(jax.random.key(7), net, x, plan, index=index)


def three_radii(net, x, seconds):
    """L2 radii of each image by the global constant, by local ones, and by exact search."""
    near = exact.distance(net, x, 2, largest=2.0, budget=exact.Budget(seconds=seconds))
    return {
        "global constant": lipschitz.certify(net, x).radius,
        "local constant": lipschitz.certify_local(net, x).radius,
        "exact search": near.lower,
        "counterexample": near.upper,
    }


def draw(results, radii, path):
    """Certified accuracy of the nets, and the radii of ten images side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (name, result), dash in zip(results.items(), ("-", "--", ":"), strict=True):
        r = np.linspace(0, 2.5, 400)
        accuracy = evaluate.certified_accuracy(result, result.label, r)
        left.plot(r, 100 * np.asarray(accuracy), dash, label=name)
    left.set(xlabel="L2 radius, pixels in [0, 1]", ylabel="certified accuracy, %", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8)
    places = np.arange(len(radii["exact search"]))
    for (name, values), marker in zip(radii.items(), "v^ox", strict=True):
        right.plot(places, values, marker, label=name, fillstyle="none")
    right.set(xlabel="image", ylabel="L2 radius", xticks=places, ylim=(0, None))
    right.set_title("a plain 3 x 64 ReLU net", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, help="folder with the IDX files of MNIST")
    parser.add_argument("--short", action="store_true", help="fewer epochs, images and samples")
    parser.add_argument("--epochs", type=int, help="of the Lipschitz nets")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("lipschitz-results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    training, (x, y) = load(options.data)
    inputs, mnist = int(np.prod(x.shape[1:])), options.data is not None
    epochs = options.epochs or (2 if options.short else 20 if mnist else 60)
    batch = 256 if mnist else 64
    rate = 1e-2 if mnist else 5e-3
    settings = {"epochs": epochs, "rate": rate, "batch": batch}
    nets = {}
    print(f"training on {len(training[1])} images")
    for name, radius in (("Lipschitz net, accurate", 1.0), ("Lipschitz net, robust", 2.2)):
        loss = functools.partial(margin_loss, radius=radius)
        net = LipschitzNet(inputs, 256, nnx.Rngs(0))
        nets[name] = nn.freeze(train(name, net, loss, training, **settings))
    settings["rate"] = 2e-3
    noisy = PlainNet([inputs, 256, 256, 10], nnx.Rngs(1))
    noisy = train("net for smoothing", noisy, noisy_loss, training, **settings)
    plain = PlainNet([inputs, 64, 64, 64, 10], nnx.Rngs(2))
    plain = train("plain net", plain, plain_loss, training, **{**settings, "epochs": epochs // 2})

    plan = smoothing.SmoothingPlan(
        noise=smoothing.Gaussian(SIGMA), n0=100, n=500 if options.short else 10_000, alpha=1e-3
    )
    few = 20 if options.short else 300
    certifiers = {
        name: (functools.partial(lipschitz_certificate, net), len(x)) for name, net in nets.items()
    }
    certifiers["smoothing"] = (functools.partial(smoothed_certificate, noisy, plan), few)
    results = {}
    for name, (certifier, count) in certifiers.items():
        print(f"certifying {count} images: {name}", flush=True)
        log = options.out / f"{name.split()[-1]}.jsonl"
        log.unlink(missing_ok=True)  # the nets are new, so an old log is another run's
        config = {"certifier": name, "sigma": SIGMA, "n": plan.n, "alpha": plan.alpha}
        batch = 1000 if name != "smoothing" else 50
        results[name] = evaluate.run(
            certifier, x[:count], y[:count], path=log, config=config, batch=batch
        )
    print()
    evaluate.show([evaluate.row(name, result, RADII) for name, result in results.items()])

    right = np.flatnonzero(np.asarray(jnp.argmax(plain(x), 1) == y))[:10]
    constant = lipschitz.constant(plain, x.shape[1:])
    print(f"\nL2 radii of ten images of a plain net, Lipschitz constant {constant:.1f}")
    radii = three_radii(plain, x[right], seconds=5 if options.short else 120)
    for name, values in radii.items():
        print(f"  {name:<16}" + "".join(f"{value:7.3f}" for value in np.asarray(values)))
    draw(results, radii, options.out / "lipschitz.png")
    print(f"\nplot and logs are in {options.out}/; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
