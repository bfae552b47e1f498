"""How tight linear bounds are, and what they cost: time, memory, compilation, rounding.

`taskset -c 0 python -m benchmarks.bounds [--quick] [--json PATH] [--data PATH]
[--peer NAME=COMMAND]... [--only PART]...`. One core, because the figures are CPU seconds: threads
that wait for each other count as work. A full run takes about a quarter of an hour, --quick two
minutes. Without --data (or the variable JAXCERT_DATA) the nets have random weights of the same
shapes; there is then nothing to compare tightness with, and peers, which load the nets themselves,
are left out.

- tightness: our float32 bounds against saved ones (`autolirpa_ref/NET.npz` in the data folder): the
  largest difference of an end from theirs, relative to the width there; for optimised slopes the
  mean width, ours over theirs. "alpha-CROWN-fix" are theirs with CROWN's hidden bounds; their
  default, "alpha-CROWN", bounds every hidden layer anew in every step, at many times the cost.
  "alpha, joint" are ours with two such steps before 20 with fixed hidden bounds.
- cost: CPU seconds of a jitted call with the weights closed over, in plain jitted forward passes of
  the same net, and against each peer (above 1: the peer is slower). Where weights are arguments,
  XLA works out |W| at every call, which costs small batches most; so are those of the forward pass
  it is compared with.
- memory: XLA's temporary buffers of `crown` at batch 16, beside those of vmap over single examples
  with all rows at once; and a ResNet with four blocks, bounded in a process of its own.
- compile: `crown` of six convolutions, on two cores, in wall seconds; and what a second net of the
  same structure costs `certify`: no trace and no compilation.
- rounding: the proof (`outward=True`), its rows of coefficients in float64 and in float32, in times
  of the float32 bounds; the width that rounding adds in it, relative to the plain float64 width;
  and the width at eps = 0, where all of it is rounding.

Peers (`harness.Peer`) get {"net": "mlp", "batch": 16, "method": "CROWN", "closure": true}; closure
allows them to treat weights as constants. They take turns with us and inherit our core; they are
shown by their best call of each round, we by a mean over 20 ms, so noise counts against us. Names
with a common part before a colon, `lib` and `lib:tuned`, are one library in two settings, of which
the faster one counts.

XLA:CPU's fusion of dots into YNNPACK is switched off in all that is ours, as dense nets are usually
somewhat cheaper without it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from benchmarks.nets import EPS, LARGE, NETS, SEED, Case, flat, load, mlp, random_case
from jaxcert import LinfBall
from jaxcert.bounds import alpha_crown, certify, crown, crown_ibp, ibp

MIB = 2**20

METHODS = {
    "IBP": ibp,
    "CROWN-IBP": crown_ibp,
    "CROWN": crown,
    "alpha, IBP hidden": functools.partial(alpha_crown, hidden=crown_ibp),
    "alpha, CROWN hidden": alpha_crown,
    "alpha, joint": functools.partial(alpha_crown, joint=2),
}
PLAIN = ("IBP", "CROWN-IBP", "CROWN")
ARGUMENTS = ", weights as arguments"
PEER_METHODS = {  # what a peer calls the same thing, and the most examples that it is asked for
    **{name: {name: 128} for name in PLAIN},
    "alpha, IBP hidden": {"alpha-IBP-lean": 16},
    "alpha, CROWN hidden": {"alpha-CROWN-fix-lean": 16, "alpha-CROWN": 1},
    "alpha, joint": {"alpha-CROWN": 1},
}


# --- Functions to be timed ------------------------------------------------------------------------


def compiled(f: Callable[..., Any]) -> Any:
    """jit, with XLA's fusion of dots off where it costs time."""
    cpu = jax.default_backend() == "cpu"
    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if cpu else None
    return jax.jit(f, compiler_options=options)


@functools.cache
def bound(case: Case, method: str) -> Any:
    """Region -> bounds of the net with its weights closed over."""
    return compiled(METHODS[method](case.closed))


@functools.cache
def bound_of_any(case: Case, method: str) -> Any:
    """(weights, region) -> bounds."""
    f = METHODS[method]
    return compiled(lambda weights, region: f(jax.tree_util.Partial(case.apply, weights))(region))


@functools.cache
def forward(case: Case) -> Any:
    return compiled(case.closed)


@functools.cache
def forward_of_any(case: Case) -> Any:
    return compiled(case.apply)


def contestants(case: Case, batch: int, quick: bool) -> dict[str, Callable[[], Any]]:
    """What is timed of ours."""
    ball, weights = case.ball(batch), case.weights
    runs = {
        "forward": lambda: forward(case)(ball.x),
        "forward" + ARGUMENTS: lambda: forward_of_any(case)(weights, ball.x),
    }
    for name in methods_at(case, batch):
        runs[name] = functools.partial(bound(case, name), ball)
    if batch <= 16 and not quick:
        for name in PLAIN:
            runs[name + ARGUMENTS] = functools.partial(bound_of_any(case, name), weights, ball)
    return runs


def methods_at(case: Case, batch: int) -> Sequence[str]:
    if batch == 1:
        return tuple(METHODS)
    if batch == 16:
        return tuple(name for name in METHODS if name != "alpha, joint")
    return PLAIN if case.apply is mlp else PLAIN[:2]


# --- Tightness ------------------------------------------------------------------------------------


def tightness(case: Case, quick: bool) -> dict[str, float]:
    """Differences from saved bounds relative to the width; ratios of mean widths."""
    found = {}
    for batch in (16,) if quick else (1, 16):
        for method in PLAIN:
            lower, upper = (case.saved[f"b{batch}/{method}/{end}"] for end in ("lb", "ub"))
            box = bound(case, method)(case.ball(batch))
            error = np.maximum(np.abs(box.lower - lower), np.abs(box.upper - upper))
            found[f"{method}, batch {batch}: error / width"] = float(
                (error / (upper - lower)).max()
            )
        pairs = (
            ("alpha, CROWN hidden", "alpha-CROWN-fix"),
            ("alpha, CROWN hidden", "alpha-CROWN"),
            ("alpha, joint", "alpha-CROWN"),
        )
        for ours, theirs in pairs:
            ends = [case.saved.get(f"b{batch}/{theirs}/{end}") for end in ("lb", "ub")]
            if ends[0] is not None:
                saved = float((ends[1] - ends[0]).mean(dtype=float))
                width = mean_width(bound(case, ours)(case.ball(batch)))
                found[f"{ours}, batch {batch}: width / {theirs}"] = width / saved
    return found


def mean_width(box: Any) -> float:
    return float(np.mean(np.asarray(box.upper) - np.asarray(box.lower), dtype=float))


def print_tightness(case: Case, quick: bool) -> dict[str, float]:
    found = tightness(case, quick)
    print(f"\n{case.name}: tightness")
    for name, value in found.items():
        print(f"  {name:<48} {value:10.3g}")
    return found


# --- Cost -----------------------------------------------------------------------------------------


def cost(case: Case, batch: int, peers: Sequence[harness.Peer], quick: bool) -> dict[str, Any]:
    """Each method's seconds, forward passes and ratios to the peers."""
    runs = contestants(case, batch, quick)
    turns = {
        name: [
            harness.Turns(
                peer, {"net": case.name, "batch": batch, "method": theirs, "closure": True}
            )
            for theirs, most in PEER_METHODS.get(name, {}).items()
            for peer in peers
            if batch <= most
        ]
        for name in runs
    }
    seconds = harness.race(runs, turns, rounds=5 if batch == 1 else 3)
    print(f"\n{case.name}, batch {batch}: CPU ms, forward passes, mean width; peers over ours")
    found = {}
    for name, value in seconds.items():
        row = {"seconds": value}
        if not name.startswith("forward"):
            base = "forward" + (ARGUMENTS if ARGUMENTS in name else "")
            row["forward passes"] = value / seconds[base]
            row["mean width"] = mean_width(runs[name]())
            row["peers"] = against(turns[name], value)
        found[name] = row
        print_row(name, row)
    return found


def against(turns: Sequence[harness.Turns], seconds: float) -> dict[str, dict[str, Any]]:
    """For each library and method the faster setting: how many times our seconds, what width."""
    best: dict[str, dict[str, Any]] = {}
    for turn in sorted((t for t in turns if t.seconds), key=lambda t: -harness.median(t.seconds)):
        theirs = harness.median(turn.seconds)
        row = {"setting": turn.peer.name, "seconds": theirs, "ratio": theirs / seconds}
        family = f"{turn.peer.name.split(':')[0]} {turn.request['method']}"
        others = best[family]["all settings"] if family in best else {}
        row |= {"mean width": turn.width, "all settings": {**others, turn.peer.name: theirs}}
        best[family] = row
    return best


def print_row(name: str, row: Mapping[str, Any]) -> None:
    line = f"  {name:<32} {1e3 * row['seconds']:10.3f} ms"
    if "forward passes" in row:
        line += f" {row['forward passes']:8.1f}x  width {row['mean width']:<10.5g}"
        for peer, theirs in row["peers"].items():
            line += f"  {peer}: {theirs['ratio']:.2f}x (width {theirs['mean width']:.5g})"
    print(line, flush=True)


# --- Memory ---------------------------------------------------------------------------------------


def temporary(f: Any, *args: Any) -> float:
    """MiB of XLA's temporary buffers."""
    return f.lower(*args).compile().memory_analysis().temp_size_in_bytes / MIB


def memory(case: Case) -> dict[str, float]:
    """crown at batch 16 in one piece, and mapped over examples with all rows held."""
    ball = case.ball(16)
    rowwise = crown(case.closed, chunk=10**9)
    mapped = compiled(jax.vmap(lambda x: rowwise(LinfBall(x[None], case.eps))))
    found = {
        "crown": temporary(bound(case, "CROWN"), ball),
        "vmap of crown, all rows at once": temporary(mapped, ball.x),
    }
    harness.report(f"{case.name}, batch 16: temporary buffers", found, "MiB")
    return found


def large_net() -> dict[str, float]:
    """crown of a ResNet with four blocks at batch 16, in the process that calls."""
    case = random_case("resnet4b", LARGE, 16)
    start = time.perf_counter()
    f = bound(case, "CROWN").lower(case.ball(16)).compile()
    compiling = time.perf_counter() - start
    start = time.process_time()
    jax.block_until_ready(f(case.ball(16)))
    return {
        "temporary buffers, MiB": f.memory_analysis().temp_size_in_bytes / MIB,
        "peak of the process, MiB": peak() / MIB,
        "trace and compile, s": compiling,
        "run, CPU s": time.process_time() - start,
    }


def peak() -> int:
    """Bytes this process ever held; getrusage also counts what its parent held before exec."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    marks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return 1024 * (marks[0] if marks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def elsewhere(f: Callable[[], Any]) -> Any:
    """f() in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(f).result()


# --- Compilation ----------------------------------------------------------------------------------


class Convolutions(nnx.Module):
    """Convolutions with 8 channels on 12 x 12, then a dense layer."""

    def __init__(self, depth: int, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(depth)])
        self.out = nnx.Linear(12 * 12 * 8, 10, rngs=rngs)

    def __call__(self, x):
        """Logits (b, 10) of x (b, 12, 12, 8)."""
        for each in self.convs:
            x = nnx.relu(each(x))
        return self.out(flat(x))


def twelve(batch: int) -> LinfBall:
    x = jax.random.uniform(jax.random.key(SEED), (batch, 12, 12, 8))
    return LinfBall(x, jnp.float32(EPS))


def compile_time() -> dict[str, float]:
    """Wall seconds for crown of six convolutions at batch 16, on two cores where there are two."""
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads
        os.sched_setaffinity(0, range(min(2, os.cpu_count() or 1)))
    jax.config.update("jax_enable_compilation_cache", False)
    net, ball = Convolutions(6, nnx.Rngs(SEED)), twelve(16)
    start, cpu = time.perf_counter(), time.process_time()
    traced = compiled(lambda net, ball: crown(net)(ball)).trace(net, ball)
    tracing = time.perf_counter() - start
    lowered = traced.lower()
    lowering = time.perf_counter() - start - tracing
    lowered.compile()
    total = time.perf_counter() - start
    return {
        "trace, s": tracing,
        "lower, s": lowering,
        "compile, s": total - tracing - lowering,
        "together, s": total,
        "together, CPU s": time.process_time() - cpu,
    }


def second_net() -> dict[str, float]:
    """Traces and compilations that certifying another net of the same structure takes."""
    ball, events = twelve(2), []
    first, second = (Convolutions(2, nnx.Rngs(seed)) for seed in (0, 1))

    def listen(event: str, seconds: float, **_: Any) -> None:
        events.append((event.rsplit("/", 1)[-1], seconds))

    jax.monitoring.register_event_duration_secs_listener(listen)
    counts = []
    for net in (first, second):
        events.clear()
        jax.block_until_ready(certify(net, ball, method=crown).radius)
        traced = [seconds for event, seconds in events if event == "jaxpr_trace_duration"]
        built = [seconds for event, seconds in events if event == "backend_compile_duration"]
        counts.append({"traces": len(traced), "tracing, ms": 1e3 * sum(traced)})
        counts[-1]["compilations"] = len(built)
    if not counts[0]["compilations"]:
        raise RuntimeError("this JAX reports no compilations under the name known here")
    return counts[1]


# --- Rounding -------------------------------------------------------------------------------------


def rounding(case: Case) -> dict[str, dict[str, float]]:
    """The proof's time and width at batch 16, method by method."""
    return {method: rounding_of(case, method) for method in PLAIN}


def rounding_of(case: Case, method: str) -> dict[str, float]:
    transform = METHODS[method]
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda w: w.astype("float64"), case.weights)
        ball = LinfBall(case.x[:16].astype("float64"), case.eps.astype("float64"))
        point = dataclasses.replace(ball, eps=jnp.zeros_like(ball.eps))

        def net(x):
            return case.apply(weights, x)

        runs = {
            "plain float64": compiled(transform(net)),
            "proof": compiled(transform(net, outward=True)),
        }
        if transform is not ibp:
            single = transform(net, outward=True, coefficients=jnp.float32)
            runs["proof, float32 rows"] = compiled(single)
        ends = {name: [np.asarray(e) for e in ends_of(f(ball))] for name, f in runs.items()}
        at_point = {name: [np.asarray(e) for e in ends_of(f(point))] for name, f in runs.items()}
    seconds = time_in_turn(bound(case, method), case.ball(16), runs, ball)
    width = {name: high - low for name, (low, high) in ends.items()}
    found = {"plain float64 / float32, time": seconds["plain float64"] / seconds["float32"]}
    for name in list(runs)[1:]:
        excess = width[name] / width["plain float64"] - 1
        low, high = at_point[name]
        found[f"{name} / float32, time"] = seconds[name] / seconds["float32"]
        found[f"{name}, excess width, relative, largest"] = float(excess.max())
        found[f"{name}, width at eps = 0, largest"] = float((high - low).max())
    found["largest |bound| at eps = 0"] = float(np.abs(at_point["proof"][1]).max())
    return found


def ends_of(box: Any) -> tuple[Any, Any]:
    return box.lower, box.upper


def time_in_turn(fast: Any, narrow: Any, runs: Mapping[str, Any], wide: Any) -> dict[str, float]:
    """CPU seconds of the float32 bound and of the others, in turn."""

    def doubled(f):
        with jax.enable_x64(True):
            return f(wide)

    turns = {"float32": lambda: fast(narrow)}
    turns |= {name: functools.partial(doubled, f) for name, f in runs.items()}
    return harness.race(turns, {}, rounds=3)


def print_rounding(case: Case) -> dict[str, dict[str, float]]:
    found = rounding(case)
    print(f"\n{case.name}, batch 16: what rounding costs")
    for method, row in found.items():
        print(f"  {method}")
        for name, value in row.items():
            print(f"    {name:<40} {value:10.3g}")
    return found


# --- The run --------------------------------------------------------------------------------------

PARTS = ("tightness", "cost", "memory", "compile", "rounding")


def batches(quick: bool) -> tuple[int, ...]:
    return (16,) if quick else (1, 16, 128)


def measure(
    part: str, cases: Sequence[Case], peers: Sequence[harness.Peer], quick: bool
) -> dict[str, Any]:
    """One part of the benchmark over all nets."""
    if part == "compile":
        return compilation()
    if part == "tightness":
        return {case.name: print_tightness(case, quick) for case in cases if case.saved}
    if part == "rounding":
        return {case.name: print_rounding(case) for case in cases}
    if part == "cost":
        return {
            f"{case.name}, batch {batch}": cost(case, batch, peers, quick)
            for case in cases
            for batch in batches(quick)
        }
    found = {case.name: memory(case) for case in cases}
    if not quick:
        found["resnet4b"] = elsewhere(large_net)
        harness.report("ResNet with four blocks, crown, batch 16", found["resnet4b"], "")
    return found


def compilation() -> dict[str, Any]:
    found = {"six convolutions": elsewhere(compile_time), "second net": elsewhere(second_net)}
    harness.report("crown of six convolutions, batch 16, two cores", found["six convolutions"], "")
    harness.report("certify of a second net of the same structure", found["second net"], "")
    return found


def main() -> None:
    """Print all parts, or those asked for."""
    parser = harness.parser(__doc__)
    parser.add_argument("--data", default=os.environ.get("JAXCERT_DATA"), metavar="PATH")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated")
    options = parser.parse_args()
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        print("more than one core: run this under `taskset -c 0` for comparable figures")
    cases = load(("mlp_s", "cnn28") if options.quick else tuple(NETS), options.data)
    results = {}
    with contextlib.ExitStack() as stack:
        commands = options.peer if options.data else ()
        peers = [stack.enter_context(harness.Peer(command)) for command in commands]
        for part in options.only or PARTS:
            results[part] = measure(part, cases, peers, options.quick)
            harness.write_json(options.json, results, seed=SEED)  # now: a later part may fail


if __name__ == "__main__":
    main()
