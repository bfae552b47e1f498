"""Layers of `jaxcert.nn`: are their constants upper bounds, and what does a training step cost?

`python -m benchmarks.lipschitz [--quick] [--only soundness|speed|estimators] [--json PATH]`.

- soundness: for every layer at its start, with Gaussian weights, with large positive ones, after 50
  training steps, and with these read back from a checkpoint: the largest singular value of its
  Jacobian, a float64 decomposition of the matrix (the largest of several points for layers that are
  not linear), and the constant that `lipschitz.constant` proves. `excess` is their difference and
  must not be positive. Flax's `SpectralNorm` of a convolution, which claims the constant 1, stands
  beside them.
- speed: a training step (value and gradient in weights and input, weights parametrised anew) and a
  forward pass, as multiples of a plain Flax convolution, alternating in one run; then the forward
  pass of the frozen layer.
- estimators: global constants of ordinary nets, see `lipschitz_estimators.py`.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx

from benchmarks import harness, lipschitz_estimators
from jaxcert import lipschitz, nn

SEED = 0
SIDE, CHANNELS, FEATURES = 8, 8, 16
IMAGE, VECTOR = (SIDE, SIDE, CHANNELS), (FEATURES,)


def layers() -> dict[str, tuple[Callable[[], nnx.Module], tuple[int, ...]]]:
    """Every kind of layer, and the shape of its input."""
    rngs, c, d = nnx.Rngs(SEED), CHANNELS, FEATURES
    window = (3, 3)
    return {
        "SpectralDense": (lambda: nn.SpectralDense(d, 12, rngs=rngs), VECTOR),
        "BjorckDense": (lambda: nn.BjorckDense(d, 12, rngs=rngs), VECTOR),
        "CayleyDense": (lambda: nn.CayleyDense(d, 20, rngs=rngs), VECTOR),
        "AOLDense": (lambda: nn.AOLDense(d, 12, rngs=rngs), VECTOR),
        "BRODense": (lambda: nn.BRODense(d, 12, rngs=rngs), VECTOR),
        "SLLBlock, dense": (lambda: nn.SLLBlock(d, hidden=24, rngs=rngs), VECTOR),
        "CPLBlock, dense": (lambda: nn.CPLBlock(d, hidden=24, rngs=rngs), VECTOR),
        "SandwichDense": (lambda: nn.SandwichDense(d, 12, hidden=24, rngs=rngs), VECTOR),
        "Householder": (lambda: nn.Householder(d), VECTOR),
        "Residual": (lambda: nn.Residual(nn.BjorckDense(d, d, rngs=rngs)), VECTOR),
        "AOLConv": (lambda: nn.AOLConv(c, c, window, rngs=rngs), IMAGE),
        "AOLConv, stride 2": (lambda: nn.AOLConv(c, 12, window, 2, rngs=rngs), IMAGE),
        "AOLConv, circular": (
            lambda: nn.AOLConv(c, c, window, padding="CIRCULAR", rngs=rngs),
            IMAGE,
        ),
        "AOLConv, 2 groups": (
            lambda: nn.AOLConv(c, c, window, feature_group_count=2, rngs=rngs),
            IMAGE,
        ),
        "AOLConv, dilation 2": (
            lambda: nn.AOLConv(c, c, window, kernel_dilation=2, rngs=rngs),
            IMAGE,
        ),
        "AOLConvTranspose": (lambda: nn.AOLConvTranspose(c, 4, window, 2, rngs=rngs), IMAGE),
        "SpectralConv": (lambda: nn.SpectralConv(c, c, window, rngs=rngs), IMAGE),
        "BjorckConv": (lambda: nn.BjorckConv(c, c, window, rngs=rngs), IMAGE),
        "AOCConv": (lambda: nn.AOCConv(c, c, window, rngs=rngs), IMAGE),
        "AOCConv, stride 2": (lambda: nn.AOCConv(c, 16, window, 2, rngs=rngs), IMAGE),
        "CayleyConv": (lambda: nn.CayleyConv(c, c, window, rngs=rngs), IMAGE),
        "BROConv": (lambda: nn.BROConv(c, window, rngs=rngs), IMAGE),
        "SLLBlock": (lambda: nn.SLLBlock(c, window, rngs=rngs), IMAGE),
        "SLLBlock, circular": (
            lambda: nn.SLLBlock(c, window, padding="CIRCULAR", rngs=rngs),
            IMAGE,
        ),
        "CPLBlock": (lambda: nn.CPLBlock(c, window, rngs=rngs), IMAGE),
    }


# --- soundness ------------------------------------------------------------------------------------


def regimes(model: nnx.Module, shape: tuple[int, ...]) -> Iterator[tuple[str, nnx.Module]]:
    """The model with its weights at the start, random, positive, trained and read back."""
    rng = np.random.default_rng(SEED)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def with_weights(draw):
        drawn = jax.tree.map(lambda p: jnp.asarray(draw(p.shape), p.dtype), params)
        return nnx.merge(graph, drawn, rest)

    yield "start", model
    yield "random", with_weights(lambda shape: rng.normal(size=shape))
    yield "positive", with_weights(lambda shape: 5 * np.abs(rng.normal(size=shape)))
    params = trained(graph, params, rest, shape)
    yield "trained", nnx.merge(graph, params, rest)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights"
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.to_pure_dict(params))
            checkpointer.wait_until_finished()
            read = checkpointer.restore(path, nnx.to_pure_dict(params))
        nnx.replace_by_pure_dict(params, read)
    yield "restored", nnx.merge(graph, params, rest)


def trained(graph: Any, params: Any, rest: Any, shape: tuple[int, ...], steps: int = 50) -> Any:
    """Weights after steps of Adam towards outputs that are large at random places."""
    x = jax.random.normal(jax.random.key(1), (8, *shape))
    optimiser = optax.adam(0.05)
    aim = jax.random.normal(jax.random.key(2), nnx.merge(graph, params, rest)(x).shape)

    @jax.jit
    def step(params, state):
        def loss(params):
            return -jnp.sum(aim * nnx.merge(graph, params, rest)(x))

        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def steepest(model: nnx.Module, shape: tuple[int, ...], points: int = 3) -> float:
    """The largest singular value of the model's Jacobian at random points."""
    graph, state = nnx.split(model)

    @jax.jit
    def jacobian(state, x):
        return jax.jacobian(lambda z: nnx.merge(graph, state)(z[None])[0].ravel())(x)

    norms = []
    for x in 3 * jax.random.normal(jax.random.key(3), (points, *shape)):
        matrix = np.asarray(jacobian(state, x), np.float64)
        norms.append(np.linalg.norm(matrix.reshape(len(matrix), -1), 2))
    return max(norms)


def soundness(quick: bool) -> list[dict[str, Any]]:
    """Prints a row per layer, and returns its constants and norms in every regime."""
    print("\nproved constant - largest singular value of the Jacobian (negative: no proof)")
    rows = []
    chosen = list(layers().items())[:: 6 if quick else 1]
    for name, (build, shape) in chosen:
        row: dict[str, Any] = {"layer": name}
        for regime, model in regimes(build(), shape):
            constant = float(lipschitz.constant(model, shape))
            exact = steepest(model, shape)
            row[regime] = {"constant": constant, "exact": exact, "slack": constant - exact}
        rows.append(row)
        slacks = {k: v for k, v in row.items() if k != "layer"}
        cells = "".join(f"  {k} {v['constant']:.6f} {v['slack']:+.1e}" for k, v in slacks.items())
        print(f"  {name:<22}{cells}", flush=True)
    for weights in ("start", "positive"):
        exact = flax_spectral_norm(weights == "positive")
        rows.append({"layer": "flax SpectralNorm", weights: {"constant": 1.0, "exact": exact}})
        print(f"  {'Flax SpectralNorm(Conv)':<22}  {weights} claims 1, is {exact:.3f}")
    return rows


def flax_spectral_norm(positive: bool) -> float:
    """The norm of a convolution divided by Flax's `SpectralNorm`, the norm of a reshaped kernel."""
    rngs = nnx.Rngs(SEED)
    conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), use_bias=False, rngs=rngs)
    if positive:
        conv.kernel[...] = jnp.abs(conv.kernel[...])
    layer = nnx.SpectralNorm(conv, n_steps=30, rngs=rngs)
    layer(jnp.ones((1, *IMAGE)), update_stats=True)  # divides the kernel of conv
    return steepest(conv, IMAGE, points=1)


# --- speed ----------------------------------------------------------------------------------------


def speed(quick: bool) -> list[dict[str, Any]]:
    """Prints and returns the multiples of a plain convolution, per image size."""
    sizes = [(16, 8)] if quick else [(32, 16), (64, 16), (32, 32)]
    rows = []
    for c, n in sizes:
        batch = 16 if quick else 128
        x = jax.random.normal(jax.random.key(SEED), (batch, n, n, c))
        kinds = conv_layers(c)
        models = {name: build() for name, build in kinds.items()}
        frozen = {
            name: nn.freeze(model)
            for name, model in models.items()
            if not isinstance(model, nn.CayleyConv | nn.BROConv)
        }
        steps = harness.alternate({k: training_step(m, x) for k, m in models.items()}, 5)
        passes = harness.alternate({k: forward(m, x) for k, m in models.items()}, 5)
        after = harness.alternate({k: forward(m, x) for k, m in frozen.items()}, 5)
        print(f"\n{c} channels, {n}x{n}, batch {batch}: step, forward pass, frozen (of plain)")
        for name in models:
            row = {"layer": name, "channels": c, "side": n, "batch": batch}
            for kind, seconds in (("step", steps), ("forward", passes), ("frozen", after)):
                if name in seconds:
                    plain = harness.median(seconds["Flax Conv"])
                    row[kind] = harness.median(seconds[name]) / plain
                    row[f"{kind} cpu_s"] = harness.median(seconds[name])
            rows.append(row)
            cells = "".join(
                f"{row.get(kind, float('nan')):8.2f}" for kind in ("step", "forward", "frozen")
            )
            print(f"  {name:<22}{cells}", flush=True)
    return rows


def conv_layers(c: int) -> dict[str, Callable[[], nnx.Module]]:
    """The convolutions whose speed is compared."""
    rngs, window = nnx.Rngs(SEED), (3, 3)
    return {
        "Flax Conv": lambda: nnx.Conv(c, c, window, rngs=rngs),
        "AOLConv": lambda: nn.AOLConv(c, c, window, rngs=rngs),
        "SpectralConv": lambda: nn.SpectralConv(c, c, window, rngs=rngs),
        "BjorckConv": lambda: nn.BjorckConv(c, c, window, rngs=rngs),
        "AOCConv": lambda: nn.AOCConv(c, c, window, rngs=rngs),
        "SLLBlock": lambda: nn.SLLBlock(c, window, rngs=rngs),
        "CPLBlock": lambda: nn.CPLBlock(c, window, rngs=rngs),
        "CayleyConv": lambda: nn.CayleyConv(c, c, window, rngs=rngs),
        "BROConv": lambda: nn.BROConv(c, window, rngs=rngs),
    }


def training_step(model: nnx.Module, x: jax.Array) -> Callable[[], Any]:
    """Value and gradient of a loss in the weights and in x."""
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, x):
        def loss(state, x):
            return jnp.sum(nnx.merge(graph, state)(x) ** 2)

        return jax.value_and_grad(loss, (0, 1))(state, x)

    return lambda: step(state, x)


def forward(model: nnx.Module, x: jax.Array) -> Callable[[], Any]:
    """A forward pass with the weights as arguments."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda: run(state, x)


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--only", choices=["soundness", "speed", "estimators"])
    options = parser.parse_args()
    parts = {"soundness": soundness, "speed": speed, "estimators": lipschitz_estimators.table}
    results = {
        name: part(options.quick) for name, part in parts.items() if options.only in (None, name)
    }
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
