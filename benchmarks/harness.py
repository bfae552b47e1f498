"""What the benchmarks share: alternating timings in CPU seconds, ratios, and results with context.

CPU seconds count every thread of the process, so that a busy machine slows a run but hardly moves
its figures. Cases alternate within one run, so that what does move them moves all alike.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

SLOW = 1.0  # a peer's call of so many seconds is made once, not three times in every round
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark's command line has: --quick and --json PATH."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    options.add_argument("--json", metavar="PATH", help="also write the results there")
    return options


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark without options of its own."""
    return parser(description).parse_args()


def alternate(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each case, `repeats` times in turn, after one untimed call of each."""
    for run in cases.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in cases}
    for _ in range(repeats):
        for name, run in cases.items():
            start = time.process_time()
            jax.block_until_ready(run())
            seconds[name].append(time.process_time() - start)
    return seconds


def sample(run: Callable[[], Any], least: float = 0.02) -> float:
    """CPU seconds of a call, the mean of as many as fill `least` seconds.

    After one that does not count: a thread of JAX may still be freeing what ran before.
    """
    jax.block_until_ready(run())
    start, calls, seconds = time.process_time(), 0, 0.0
    while seconds < least:
        jax.block_until_ready(run())
        calls, seconds = calls + 1, time.process_time() - start
    return seconds / calls


def race(
    runs: Mapping[str, Callable[[], Any]], turns: Mapping[str, Sequence["Turns"]], rounds: int
) -> dict[str, float]:
    """Median CPU seconds a call of ours; after each case, peers take their turns at the same."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(sample(run))
            for turn in turns.get(name, ()):
                turn.take()
    return {name: median(values) for name, values in seconds.items()}


def median(seconds: Sequence[float]) -> float:
    """The middle one: robust against a neighbour's burst, and unlike the best not flattering."""
    return statistics.median(seconds)


class Peer:
    """Another library's process, from NAME=COMMAND.

    It answers each line of JSON, a request with "repeats" in it, with a line {"cpu_s": CPU seconds
    of the fastest repeat, after one that does not count; "mean_width": of the bounds}, or
    {"error": reason}. It ends on {"cmd": "quit"} or at the end of its input.
    """

    def __init__(self, option: str):
        self.name, _, command = option.partition("=")
        if not command:
            raise SystemExit(f"--peer takes NAME=COMMAND, got {option!r}")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(shlex.split(command), text=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request, {"error": ...} from a process that ended."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            return {"error": "the process ended"}
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}


class Turns:
    """A peer's turns at one request: its best call of each round."""

    def __init__(self, peer: Peer, request: Mapping[str, Any]):
        self.peer, self.request = peer, request
        self.seconds: list[float] = []
        self.width = math.nan
        self.error: str | None = None

    def take(self) -> None:
        """One round; a peer that cannot is not asked again, a slow one is asked once."""
        if self.error is None and not self.seconds:
            self._ask(1)
            if self.error is None and self.seconds[0] <= SLOW:
                self.seconds.clear()
        if self.error is None and (not self.seconds or self.seconds[-1] <= SLOW):
            self._ask(3)

    def _ask(self, repeats: int) -> None:
        reply = self.peer.ask({**self.request, "repeats": repeats})
        self.error = reply.get("error")
        if self.error is None:
            self.seconds.append(reply["cpu_s"])
            self.width = reply["mean_width"]


def report(title: str, rows: Mapping[str, float], unit: str) -> None:
    """Print figures under a title, one a line."""
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<48} {value:10.3f} {unit}")


def write_json(path: str | None, results: Any, *, seed: int) -> None:
    """Results with versions, seed and machine; nothing where no path was given."""
    if path is None:
        return
    record = {"results": results, "seed": seed, "context": context()}
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")


def context() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.system(),
    }


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
