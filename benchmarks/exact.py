"""Exact verification on VNN-COMP benchmarks: verdicts against the published ones, CPU seconds.

Needs a folder with `vnncomp/<benchmark>/instances.csv` and the consensus in `vnncomp/expected.csv`:

    python -m benchmarks.exact acasxu --data DIR --json benchmarks/results/exact_acasxu.json

All instances run in one process, as `python -m jaxcert verify --instances` runs them. CPU seconds
of an instance include reading its files and whatever was compiled for it, which is also given on
its own (seconds of lowering and compiling); with a persistent compilation cache little of that is
left. Seconds of the wall clock by what was done, compiling included, are given for attacks, ranges
of hidden values, steps of the search and leaves; what is missing is the host's and reading.
"""

import csv
import os
import pathlib
import time
from collections import Counter
from typing import Any

import jax

from benchmarks.harness import parser, write_json
from jaxcert.cli.answers import Answer, answer
from jaxcert.io import onnx, vnnlib


def main() -> None:
    options = parser(__doc__)
    options.add_argument("benchmark", help="a folder under vnncomp")
    options.add_argument("--data", default=os.environ.get("JAXCERT_DATA"), help="where vnncomp is")
    options.add_argument("--timeout", type=float, help="seconds for each; default: the csv's")
    options.add_argument("--every", type=int, default=1, help="only every so many-th instance")
    options.add_argument("--match", default="", help="only instances whose files hold this text")
    given = options.parse_args()
    if given.data is None:
        options.error("say where the benchmarks are: --data DIR, or the variable JAXCERT_DATA")
    folder = pathlib.Path(given.data) / "vnncomp"
    expected = _expected(folder, given.benchmark)
    instances = vnnlib.instances(folder / given.benchmark / "instances.csv")
    chosen = [i for i in instances if given.match in f"{i.network} {i.property}"]
    chosen = chosen[:: 20 if given.quick else given.every]
    models: dict[pathlib.Path, Any] = {}
    rows, compiling = [], _Compiling()
    for each in chosen:
        began, cpu, compiled = time.perf_counter(), time.process_time(), compiling.seconds
        if each.network not in models:
            models[each.network] = onnx.read(each.network)
        limit = given.timeout or each.timeout
        problem = vnnlib.read(each.property)
        found = answer(models[each.network], problem, until=began + limit)
        seconds = time.process_time() - cpu
        rows.append(_row(folder / given.benchmark, each, found, seconds, expected))
        rows[-1]["compile_seconds"] = round(compiling.seconds - compiled, 3)
        print(_line(rows[-1]), flush=True)
        written = {"benchmark": given.benchmark, "timeout": given.timeout, "every": given.every,
                   "match": given.match, "summary": _summary(rows), "instances": rows}  # fmt: skip
        write_json(given.json, written, seed=0)  # each time: what a kill leaves is a result as well
    print(_summary(rows))


class _Compiling:
    """The seconds that JAX has spent on lowering and compiling."""

    EVENTS = ("jaxpr_to_mlir_module_duration", "backend_compile_duration")

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith(self.EVENTS):
            self.seconds += seconds


def _expected(folder: pathlib.Path, benchmark: str) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "expected.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    return {(row["onnx"], row["vnnlib"]): row for row in rows}


def _row(folder, instance, found: Answer, seconds: float, expected) -> dict[str, Any]:
    names = [
        str(path.relative_to(folder)).removesuffix(".gz")
        for path in (instance.network, instance.property)
    ]
    known = expected.get(tuple(names), {})
    return {
        "network": names[0],
        "property": names[1],
        "verdict": found.verdict,
        "expected": known.get("consensus", "unknown"),
        "disputed": bool(known.get("trusted_disagree")),
        "cpu_seconds": round(seconds, 3),
        "domains": found.domains,
        "spent": {name: round(each, 3) for name, each in found.spent.items()},
        "reason": found.reason,
    }


def _wrong(row: dict[str, Any]) -> bool:
    decided = {"sat", "unsat"}
    both = row["verdict"] in decided and row["expected"] in decided
    return both and row["verdict"] != row["expected"] and not row["disputed"]


def _line(row: dict[str, Any]) -> str:
    mark = "  WRONG" if _wrong(row) else ""
    return (
        f"{row['network'].split('/')[-1]:34.34} {row['property'].split('/')[-1]:40.40} "
        f"{row['verdict']:8} expected {row['expected']:8} {row['cpu_seconds']:9.2f} s "
        f"{row['domains']:8} sub-domains{mark}"
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    solved = [row for row in rows if row["verdict"] in ("sat", "unsat")]
    return {
        "instances": len(rows),
        "solved": len(solved),
        "published": sum(row["expected"] in ("sat", "unsat") for row in rows),
        "wrong": sum(map(_wrong, rows)),
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 1),
        "compile_seconds": round(sum(row["compile_seconds"] for row in rows), 1),
        "domains": sum(row["domains"] for row in rows),
        "spent": {name: round(each, 1) for name, each in _spent(rows).items()},
    }


def _spent(rows: list[dict[str, Any]]) -> Counter[str]:
    return sum((Counter(row["spent"]) for row in rows), Counter())


if __name__ == "__main__":
    main()
