"""What the benchmarks share: alternating timings in CPU seconds, ratios, and results with context.

CPU seconds count every thread of the process, so that a busy machine slows a run but hardly moves
its figures. Cases alternate within one run, so that what does move them moves all alike.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy")


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark: --quick and --json PATH."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--json", metavar="PATH", help="also write the results there")
    return parser.parse_args()


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


def median(seconds: Sequence[float]) -> float:
    """The middle one: robust against a neighbour's burst, and unlike the best not flattering."""
    return statistics.median(seconds)


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
