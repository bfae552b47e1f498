"""Throughput of `smoothing.certify`: over bare forward passes, next to a peer, noise by noise.

`taskset -c 0 python -m benchmarks.smoothing [--quick] [--only QUESTION] [--peer NAME=COMMAND]
[--json PATH]`, on an MLP 784-256-256-10, a LeNet 20-50-500, and the thin ResNets of depth 20 and
110 for CIFAR-10, with random weights. One run asks, a table for each net:

- overhead: how close certify comes to bare jitted forward passes. `strict` is the ratio to forward
  passes on inputs that already hold their noise: drawing it is all loss here, and bounds the ratio,
  since `bits` is the price of threefry alone, before they become normals, and no sampler that
  spends 32 fresh bits of threefry on a pixel passes forwards / (forwards + bits). `with noise` is
  the ratio to forward passes plus one `jax.random.normal` a batch, both bare; with JAX's default
  numbering of threefry's counters, and `fast` with the one that certify pins. `host` is the loop
  that the published implementations write, in JAX: one dispatch a batch, classes to the host,
  counted there.
- peer: certify next to another implementation with the same weights, each at the best of several
  batch sizes, and at the peer's default. COMMAND answers as `benchmarks/smoothing_peer.py` says;
  that script runs the published PyTorch loop. `pool first` (bias and relu after max-pooling) and
  `rewritten` (besides, convolutions by `benchmarks/convolutions.py`) are other programs for the
  same function, `channels last` is the peer with torch's other memory layout.
- noise: `GridGaussian`, which draws integers from 64 bits each, next to `Gaussian`.
- sharing: noise shared by 8 images (`group`), and the first layer applied to it once for all 8
  (`AffineFirst`).
- precision: a model that computes in bfloat16.

certify is called under `jax.jit`: called by itself it looks at the model and the images first, for
milliseconds to tenths of a second a call, which is nothing next to 100,000 draws and much next to
the few of a round here. Figures are medians over rounds in which all cases take turns. On more than
one processor, wall time says more than CPU time, which counts threads that wait.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.convolutions import rewritten
from benchmarks.smoothing_nets import NETS, for_torch, shape, variables
from jaxcert import smoothing
from jaxcert.smoothing import AffineFirst, Gaussian, GridGaussian, SmoothingPlan

SEED = 0
SIGMA = 0.25
N0 = 100
GROUP = 8
PUBLISHED_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Size:
    """What is run of a net.

    Attributes:
      samples: of one call.
      chunk: ours, of the questions that do not compare chunks.
      chunks, batches: ours and the peer's to choose the best of.
    """

    samples: int
    chunk: int
    chunks: Sequence[int]
    batches: Sequence[int]


SIZES = {
    "mlp": Size(8000, 400, (400, 1000), (100, 400, 1000)),
    "lenet": Size(2000, 100, (100, 400), (100, 400, 1000)),
    "resnet20": Size(400, 25, (10, 25), (25, 100, 1000)),
    "resnet110": Size(200, 25, (10, 25), (10, 25, 100)),
}
# Other forms of the same function.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "mlp": {"": {}},
    "lenet": {
        "": {},
        "pool first, ": {"pool_first": True},
        "rewritten, ": {"pool_first": True, "convolution": rewritten},
    },
    "resnet20": {"": {}, "rewritten, ": {"convolution": rewritten}},
    "resnet110": {"": {}, "rewritten, ": {"convolution": rewritten}},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run and how many samples it draws; it returns its CPU and wall seconds."""

    samples: int
    run: Callable[[], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A net with its weights, images (b, *shape), and their size."""

    name: str
    weights: Any
    images: jax.Array
    size: Size

    @classmethod
    def of(cls, name: str, quick: bool) -> "Subject":
        """The net with random weights."""
        size = SIZES[name]
        if quick:
            size = dataclasses.replace(size, samples=size.samples // 2)
        key = jax.random.key(SEED)
        # On the grid of pixels, for `GridGaussian`.
        images = jnp.round(jax.random.uniform(key, (GROUP, *shape(name))) * 255) / 255
        return cls(name, variables(name, key), images, size)

    def model(self, **form: Any) -> Any:
        """The net as a pytree model; `form` is that of `smoothing_nets.Net`."""
        return jax.tree_util.Partial(NETS[self.name](**form).apply, self.weights)

    def affine_first(self) -> AffineFirst:
        """The net in two parts."""
        net = NETS[self.name]()
        first, rest = (functools.partial(net.apply, method=part) for part in ("first", "rest"))
        parts = (jax.tree_util.Partial(part, self.weights) for part in (first, rest))
        return AffineFirst(*parts)

    def plan(self, chunk: int, **options: Any) -> SmoothingPlan:
        """A plan whose draws fill their chunks."""
        n = math.ceil(self.size.samples / chunk) * chunk - N0
        options.setdefault("noise", Gaussian(SIGMA))
        return SmoothingPlan(n0=N0, n=n, chunk=chunk, **options)

    def certify(self, model: Any, plan: SmoothingPlan, images: int = 1) -> Case:
        """Certificates of the first images, jitted as a whole."""
        key, x = jax.random.key(SEED), self.images[:images]
        certify = jax.jit(lambda key, model, x: smoothing.certify(key, model, x, plan))
        run = functools.partial(certify, key, model, x)
        return Case(images * (plan.n + plan.n0), timed(run))


def timed(run: Callable[[], Any]) -> Callable[[], tuple[float, float]]:
    """The run with its CPU and wall seconds in place of its value."""

    def seconds() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(run())
        return time.process_time() - cpu, time.perf_counter() - wall

    return seconds


def race(cases: Mapping[str, Case], rounds: int) -> dict[str, dict[str, float]]:
    """Median microseconds a sample of each case, after one call that does not count."""
    for case in cases.values():
        case.run()
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(case.run())
    return {
        name: {
            kind: 1e6 * harness.median(values) / cases[name].samples
            for kind, values in zip(("cpu_us", "wall_us"), zip(*pairs, strict=True), strict=True)
        }
        for name, pairs in seconds.items()
    }


def table(title: str, results: Mapping[str, Mapping[str, float]], ratios: Mapping[str, float]):
    """Print a race with its ratios, and return both."""
    print(f"\n{title:<52}{'CPU us':>10}{'wall us':>10}  a sample")
    for name, cost in results.items():
        print(f"  {name:<50}{cost['cpu_us']:10.2f}{cost['wall_us']:10.2f}")
    for name, ratio in ratios.items():
        print(f"  {name:<50}{ratio:10.3f}", flush=True)
    return {"us_per_sample": results, "ratios": ratios}


# The overhead of certify


def bare(subject: Subject, model: Any, plan: SmoothingPlan) -> dict[str, Case]:
    """The parts of certify by themselves, and its like as a loop on the host."""
    x = subject.images[:1]
    forward = jax.jit(lambda model, z: model(z))
    batches = (plan.n + plan.n0) // plan.chunk
    batch, flat = (plan.chunk, *x.shape[1:]), (plan.chunk, x.size)
    key = jax.random.key(SEED)
    noisy = x + SIGMA * jax.random.normal(key, batch)

    def drawing(draw) -> Callable[[], Any]:
        """All draws of a run in one loop on the device, summed so that none is optimised away."""

        @jax.jit
        def run(key):
            def step(c, total):
                return total + draw(jax.random.fold_in(key, c), flat)

            return jax.lax.fori_loop(0, batches, step, jnp.zeros(flat))

        return lambda: run(key)

    def fast(draw) -> Callable[[], Any]:
        def drawn(key, shape):
            with jax.threefry_partitionable(False):
                return draw(key, shape).astype(jnp.float32)

        return drawing(drawn)

    @jax.jit
    def classes(model, key, c):
        noise = jax.random.normal(jax.random.fold_in(key, c), batch)
        return jnp.argmax(model(x + SIGMA * noise), axis=1)

    def host():
        counts = np.zeros(10, int)
        for c in range(batches):
            counts += np.bincount(np.asarray(classes(model, key, c)), minlength=10)
        return counts

    runs = {
        "forwards": lambda: [forward(model, noisy) for _ in range(batches)][-1],
        "normal": drawing(jax.random.normal),
        "normal, fast counters": fast(jax.random.normal),
        "bits, fast counters": fast(jax.random.bits),
        "host": host,
    }
    return {name: Case(plan.n + plan.n0, timed(run)) for name, run in runs.items()}


def overhead(subject: Subject, chunk: int, rounds: int, **form: Any) -> dict:
    """certify and its parts."""
    model, plan = subject.model(**form), subject.plan(chunk)
    cases = {"certify": subject.certify(model, plan), **bare(subject, model, plan)}
    results = race(cases, rounds)
    cost = {name: result["cpu_us"] for name, result in results.items()}
    forwards, certify = cost["forwards"], cost["certify"]
    ratios = {
        "strict: forwards / certify": forwards / certify,
        "its limit: forwards / (forwards + bits)": forwards
        / (forwards + cost["bits, fast counters"]),
        "with noise: (forwards + normal) / certify": (forwards + cost["normal"]) / certify,
        "with noise, fast: (forwards + normal) / certify": (
            forwards + cost["normal, fast counters"]
        )
        / certify,
        "host loop / certify": cost["host"] / certify,
    }
    return table(f"overhead: {subject.name}, chunk {chunk} {', '.join(form)}", results, ratios)


def all_overheads(quick: bool, rounds: int) -> dict:
    subjects = {name: Subject.of(name, quick) for name in ("mlp", "lenet", "resnet20")}
    return {
        "mlp": overhead(subjects["mlp"], 400, rounds),
        "mlp, larger chunk": overhead(subjects["mlp"], 1000, rounds),
        "lenet": overhead(subjects["lenet"], 400, rounds),
        "lenet, smaller chunk": overhead(subjects["lenet"], 100, rounds),
        "lenet, pool first": overhead(subjects["lenet"], 100, rounds, pool_first=True),
        "resnet20": overhead(subjects["resnet20"], 25, rounds),
        "lenet, rewritten": overhead(
            subjects["lenet"], 100, rounds, pool_first=True, convolution=rewritten
        ),
        "resnet20, rewritten": overhead(subjects["resnet20"], 25, rounds, convolution=rewritten),
    }


# Noise, sharing, precision


def noises(quick: bool, rounds: int) -> dict:
    """Grid noise next to float noise."""
    found = {}
    for name in ("mlp", "lenet", "resnet20"):
        subject = Subject.of(name, quick)
        model, chunk = subject.model(), subject.size.chunk
        cases = {
            type(noise).__name__: subject.certify(model, subject.plan(chunk, noise=noise))
            for noise in (Gaussian(SIGMA), GridGaussian(SIGMA))
        }
        results = race(cases, rounds)
        ratio = results["GridGaussian"]["cpu_us"] / results["Gaussian"]["cpu_us"]
        title = f"noise: {name}, chunk {chunk}"
        found[name] = table(title, results, {"GridGaussian / Gaussian": ratio})
    return found


def sharing(quick: bool, rounds: int) -> dict:
    """Noise of one's own, shared, and shared behind the first layer."""
    found = {}
    for name in ("mlp", "lenet"):
        subject = Subject.of(name, quick)
        size = dataclasses.replace(subject.size, samples=subject.size.samples // 2)
        subject = dataclasses.replace(subject, size=size)
        model, affine = subject.model(), subject.affine_first()
        plans = {group: subject.plan(size.chunk, group=group) for group in (1, GROUP)}
        grid = subject.plan(size.chunk, group=GROUP, noise=GridGaussian(SIGMA))
        cases = {
            "own noise": subject.certify(model, plans[1], GROUP),
            f"group {GROUP}": subject.certify(model, plans[GROUP], GROUP),
            f"group {GROUP}, AffineFirst": subject.certify(affine, plans[GROUP], GROUP),
            f"group {GROUP}, GridGaussian": subject.certify(model, grid, GROUP),
        }
        results = race(cases, rounds)
        own, *rest = results
        ratios = {f"{own} / {case}": faster(results, own, case) for case in rest}
        found[name] = table(f"sharing: {name}, chunk {size.chunk}, 8 images", results, ratios)
    return found


def precision(quick: bool, rounds: int) -> dict:
    """Models that compute in bfloat16."""
    found = {}
    for name in ("mlp", "lenet", "resnet20"):
        subject = Subject.of(name, quick)
        chunk = subject.size.chunk
        cases = {
            dtype: subject.certify(subject.model(dtype=jnp.dtype(dtype)), subject.plan(chunk))
            for dtype in ("float32", "bfloat16")
        }
        results = race(cases, rounds)
        ratios = {"float32 / bfloat16": faster(results, "float32", "bfloat16")}
        found[name] = table(f"precision: {name}, chunk {chunk}", results, ratios)
    return found


def faster(results: Mapping[str, Mapping[str, float]], slow: str, fast: str) -> float:
    """How many times as fast the second is, in CPU time."""
    return results[slow]["cpu_us"] / results[fast]["cpu_us"]


# Next to a peer


def peer_case(peer: harness.Peer, request: Mapping[str, Any], batch: int, samples: int) -> Case:
    """The peer's certification of one image, in batches."""
    n = max(samples, batch)
    request = {**request, "batch": batch, "n0": N0, "n": n - N0, "sigma": SIGMA}

    def run() -> tuple[float, float]:
        reply = peer.ask(request)
        if "error" in reply:
            raise RuntimeError(f"{peer.name}: {reply['error']}")
        return reply["cpu_s"], reply["wall_s"]

    return Case(n, run)


def same_net(peer: harness.Peer, request: Mapping[str, Any], subject: Subject) -> float:
    """The largest difference of logits, relative to the largest logit; raises if it is large."""
    theirs = np.asarray(peer.ask({**request, "logits": True})["logits"])
    ours = [subject.model(**form)(subject.images) for form in FORMS[subject.name].values()]
    difference = max(float(np.abs(logits - theirs).max()) for logits in ours)
    difference /= float(np.abs(theirs).max())
    if not difference < 1e-4:
        raise RuntimeError(f"{subject.name}: not the same net, logits differ by {difference:.1e}")
    return difference


def against(peer: harness.Peer, subject: Subject, folder: pathlib.Path, rounds: int) -> dict:
    """One net, in all forms and batch sizes of both."""
    name, size = subject.name, subject.size
    weights, images, one = (str(folder / f"{name}_{word}.npz") for word in ("w", "x", "x0"))
    np.savez(weights, **for_torch(name, subject.weights))  # pyright: ignore[reportArgumentType]
    np.savez(images, x=subject.images)
    np.savez(one, x=subject.images[:1])
    request = {"net": name, "weights": weights}
    difference = same_net(peer, {**request, "images": images}, subject)
    cases = our_cases(subject)
    layouts = {"": False} if name == "mlp" else {"": False, "channels last, ": True}
    for layout, flag in layouts.items():
        asked = {**request, "images": one, "channels_last": flag}
        for batch in size.batches:
            cases[f"{peer.name}, {layout}batch {batch}"] = peer_case(
                peer, asked, batch, size.samples
            )
    results = race(cases, rounds)
    theirs = [f"{peer.name}, batch {PUBLISHED_BATCH}"] if PUBLISHED_BATCH in size.batches else []
    theirs += [best(results, f"{peer.name}, {layout}batch") for layout in layouts]
    ours = [best(results, f"certify, {form}chunk") for form in FORMS[name]]
    ours += [case for case in cases if "group" in case]
    ratios = {f"{a} / {b}": faster(results, a, b) for b in ours for a in dict.fromkeys(theirs)}
    found = table(f"peer: {name}", results, ratios)
    return {**found, "logits differ relatively by": difference}


def our_cases(subject: Subject) -> dict[str, Case]:
    """certify, for each form of the net and each chunk; small nets also with shared noise."""
    cases = {}
    model, form = subject.model(), ""
    for form, options in FORMS[subject.name].items():
        model = subject.model(**options)
        for chunk in subject.size.chunks:
            cases[f"certify, {form}chunk {chunk}"] = subject.certify(model, subject.plan(chunk))
    plan = subject.plan(subject.size.chunk, group=GROUP)
    if subject.name in ("mlp", "lenet"):
        cases[f"certify, {form}group {GROUP}"] = subject.certify(model, plan, GROUP)
    if subject.name == "mlp":
        affine = subject.affine_first()
        cases[f"certify, AffineFirst, group {GROUP}"] = subject.certify(affine, plan, GROUP)
    return cases


def best(results: Mapping[str, Mapping[str, float]], prefix: str) -> str:
    """The fastest of the cases whose names begin so."""
    names = [name for name in results if name.startswith(prefix)]
    return min(names, key=lambda name: results[name]["cpu_us"])


def main() -> None:
    questions = {
        "overhead": all_overheads,
        "noise": noises,
        "sharing": sharing,
        "precision": precision,
    }
    parser = harness.parser(__doc__)
    parser.add_argument("--only", choices=[*questions, "peer"], action="append")
    parser.add_argument("--peer", metavar="NAME=COMMAND", help="another implementation")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=[*NETS], help="for the peer")
    options = parser.parse_args()
    rounds = 3 if options.quick else 5
    results: dict[str, Any] = {}
    for name, ask in questions.items():
        if not options.only or name in options.only:
            results[name] = ask(options.quick, rounds)
    if options.peer and (not options.only or "peer" in options.only):
        with contextlib.ExitStack() as stack:
            peer = stack.enter_context(harness.Peer(options.peer))
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            results["peer"] = {
                name: against(peer, Subject.of(name, options.quick), folder, rounds)
                for name in options.nets
            }
    harness.write_json(options.json, results, seed=SEED)


if __name__ == "__main__":
    main()
