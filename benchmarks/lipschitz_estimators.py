"""How tight proved global Lipschitz constants of ordinary nets are, and what they cost.

`python -m benchmarks.lipschitz_estimators [--quick] [--json PATH]`, for classifiers of sklearn's 8
x 8 digits and a random net, all relu, in float64. Columns are multiples of a lower bound, the
largest spectral norm of the Jacobians at 4000 points: random ones, then more around the best.
Seconds are wall time of a second call, when everything is compiled; `cold` is the first one of
lipsdp_bound. Below them, the mean L2 radii around 32 test images of two of the nets, certified by
constants on the whole space, by bounds on balls, and by local constants, with seconds for all 32.
"""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from jaxcert import bounds, lipschitz
from jaxcert.lipschitz.estimate import eclipse_bound, liplt_bound, lipsdp_bound, product_bound
from jaxcert.lipschitz.local import certify_local

SEED = 0
BOUNDS = {
    "product": product_bound,
    "LipLT": liplt_bound,
    "ECLipsE-Fast": eclipse_bound,
    "a-LipSDP": lipsdp_bound,
}


def mlp(params: Sequence[Any], x: jax.Array) -> jax.Array:
    """Dense layers (kernel (out, in), bias), relu between them."""
    x = x.reshape(x.shape[0], -1)
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel.T + bias)
    return x @ params[-1][0].T + params[-1][1]


def cnn(params: Sequence[Any], x: jax.Array) -> jax.Array:
    """Two 3 x 3 convolutions, the second one strided, and dense layers behind them."""
    x = x.reshape(-1, 8, 8, 1)
    for (kernel, bias), stride in zip(params[:2], (1, 2), strict=True):
        axes = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=axes
        )
        x = jax.nn.relu(x + bias)
    return mlp(params[2:], x)


def dense_params(dims: Sequence[int], rng: np.random.Generator) -> list[Any]:
    """He's initialisation."""
    pairs = itertools.pairwise(dims)
    return [(rng.normal(size=(b, a)) * (2 / a) ** 0.5, np.zeros(b)) for a, b in pairs]


def conv_params(
    channels: Sequence[int], dims: Sequence[int], rng: np.random.Generator
) -> list[Any]:
    pairs = itertools.pairwise(channels)
    convs = [(rng.normal(size=(3, 3, a, b)) * (2 / (9 * a)) ** 0.5, np.zeros(b)) for a, b in pairs]
    return convs + dense_params(dims, rng)


def trained(
    apply: Callable[..., Any],
    initial: Callable[[np.random.Generator], list[Any]],
    decay: float,
    steps: int,
) -> Any:
    """AdamW on the first 1400 digits; the net and its accuracy on the other 397."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    optimiser: Any = optax.adamw(2e-3, weight_decay=decay)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    @jax.jit
    def step(params, state, x, y):
        update, state = optimiser.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, update), state

    rng = np.random.default_rng(SEED)
    params = jax.tree.map(jnp.asarray, initial(rng))
    state = optimiser.init(params)
    for _ in range(steps):
        chosen = rng.integers(0, 1400, 128)
        params, state = step(params, state, images[chosen], labels[chosen])
    correct = jnp.argmax(apply(params, jnp.asarray(images[1400:])), 1) == labels[1400:]
    return jax.tree_util.Partial(apply, params), float(correct.mean())


def random_net(dims: Sequence[int]) -> Any:
    rng = np.random.default_rng(1)
    pairs = list(itertools.pairwise(dims))
    kernels = [rng.normal(size=(b, a)) / a**0.5 for a, b in pairs]
    params = [(w, rng.normal(size=len(w)) * 0.1) for w in kernels]
    return jax.tree_util.Partial(mlp, jax.tree.map(jnp.asarray, params)), None


def nets(quick: bool) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each net with its number of inputs."""

    def dense(widths: Sequence[int], decay: float = 0.0) -> tuple[Callable[[], Any], int]:
        def make() -> Any:
            initial = functools.partial(dense_params, [64, *widths, 10])
            return trained(mlp, initial, decay, 100 if quick else 1500)

        return make, 64

    if quick:
        return {
            "digits 64-16-16-10": dense([16, 16]),
            "random 20-16x3-10": (lambda: random_net([20, 16, 16, 16, 10]), 20),
        }

    def conv() -> Any:
        initial = functools.partial(conv_params, [1, 8, 16], [256, 32, 10])
        return trained(cnn, initial, 0.0, 1500)

    return {
        "digits 64-32-32-10": dense([32] * 2),
        "digits 64-64x3-10": dense([64] * 3),
        "digits 64-64x6-10": dense([64] * 6),
        "digits 64-64x3-10, weight decay .3": dense([64] * 3, 0.3),
        "random 20-40x5-10": (lambda: random_net([20] + [40] * 5 + [10]), 20),
        "digits conv 8, 16, dense 32, 10": (conv, 64),
    }


def sampled_lower_bound(f: Any, d: int) -> float:
    """The largest norm of a Jacobian at random points, then around the best of them."""
    norms = jax.jit(
        jax.vmap(lambda x: jnp.linalg.norm(jax.jacobian(lambda z: f(z[None])[0])(x), 2))
    )
    rng = np.random.default_rng(SEED)
    best, where = 0.0, np.zeros(d)
    for turn in range(8):
        x = where + rng.normal(size=(500, d)) * (1.5 / turn if turn else 3.0)
        found = np.asarray(norms(x))
        if found.max() > best:
            best, where = float(found.max()), x[found.argmax()]
    return best


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """A value and the seconds it took."""
    start = time.perf_counter()
    value = float(jax.block_until_ready(run()))
    return value, time.perf_counter() - start


def table(quick: bool) -> list[dict[str, Any]]:
    """One row for each net."""
    rows = []
    with jax.enable_x64(True):
        for name, (make, d) in nets(quick).items():
            f, accuracy = make()
            row: dict[str, Any] = {"net": name, "accuracy": accuracy}
            row["lower"] = sampled_lower_bound(f, d)
            for title, bound in BOUNDS.items():
                run = functools.partial(bound, f, (d,))
                _, cold = timed(run)
                value, seconds = timed(run)
                row[title] = {"constant": value, "seconds": seconds, "cold": cold}
            rows.append(row)
            show(row)
    return rows


def radii(quick: bool) -> list[dict[str, Any]]:
    """Mean certified radii by several methods, one row for each net."""
    from sklearn.datasets import load_digits

    chosen = ["digits 64-32-32-10", "digits 64-64x3-10", "digits 64-64x3-10, weight decay .3"]
    rows = []
    with jax.enable_x64(True):
        x = jnp.asarray(load_digits().data[1400:1432] / 16)
        for name, (make, d) in nets(quick).items():
            if not quick and name not in chosen:
                continue
            f, _ = make()
            if d != x.shape[1]:
                continue
            row: dict[str, Any] = {"net": name}
            for title, certify in certifiers(f, d).items():
                run = functools.partial(certify, x)
                jax.block_until_ready(run())
                start = time.perf_counter()
                mean = float(jnp.mean(run()))
                row[title] = {"radius": mean, "seconds": time.perf_counter() - start}
            rows.append(row)
            print(f"\n{name}: mean certified L2 radius")
            for title in certifiers(f, d):
                cell = row[title]
                print(f"  {title:<34} {cell['radius']:8.4f} {cell['seconds']:10.3f} s", flush=True)
    return rows


def certifiers(f: Any, d: int) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """(b, d) -> radii (b,)."""

    def by_constant(x: jax.Array) -> jax.Array:
        constant = lipsdp_bound(f, (d,))
        return lipschitz.margin_certificate(f(x), logit_constant=constant).radius

    return {
        "product, rows of the last layer": lambda x: lipschitz.certify(f, x).radius,
        "a-LipSDP, sqrt(2) L": by_constant,
        "CROWN, bisection": lambda x: bounds.certified_radius(f, x, 2.0).radius,
        "local constants, ibp": lambda x: certify_local(f, x, method=bounds.ibp).radius,
        "local constants, CROWN, no steps": lambda x: certify_local(f, x, steps=0).radius,
        "local constants, CROWN": lambda x: certify_local(f, x).radius,
        "local constants, CROWN, 50 steps": lambda x: certify_local(f, x, steps=50).radius,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    accuracy = "" if row["accuracy"] is None else f"accuracy {row['accuracy']:.3f}, "
    print(f"\n{row['net']}: {accuracy}sampled {row['lower']:.2f}")
    for title in BOUNDS:
        cell = row[title]
        ratio = cell["constant"] / row["lower"]
        print(
            f"  {title:<14} {cell['constant']:10.2f} {ratio:8.2f} x {cell['seconds']:10.4f} s "
            f"(cold {cell['cold']:.1f} s)",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    options = harness.arguments(__doc__)
    results = {"constants": table(options.quick), "radii": radii(options.quick)}
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
